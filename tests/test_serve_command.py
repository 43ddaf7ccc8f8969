"""`pairdr serve`: what its options make of the service, and with which sentence it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from serving import KEY, make_place, make_work, wait_until
from test_serve_labels import make_findings

from pairdr.cli import main
from pairdr.errors import UsageError
from pairdr.findings import write_audit
from pairdr.index import build_index
from pairdr.serve import run
from pairdr.serve.guard import KEYS_VARIABLE, Keys
from pairdr.serve.service import Service
from pairdr.store_config import IndexConfig, ServeConfig
from pairdr.vectors import VectorStore

if TYPE_CHECKING:
    from conftest import Parts

Call = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, toy: Path, toy_parts: Parts) -> Path:
    """Return a place that nobody changes."""
    return make_place(tmp_path_factory.mktemp("place"), toy, toy_parts.encoder)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> Path:
    return make_work(tmp_path_factory.getbasetemp(), toy, tiny_model)


class Served:
    """What the command hands to the server."""

    service: Service
    keys: Keys
    config: ServeConfig
    paths: set[str]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """Return what is served in the end; nothing listens."""
    found = Served()

    @contextmanager
    def bind(config: ServeConfig) -> Iterator[ServeConfig]:
        found.config = config
        yield config

    def note(app: Any, service: Service, keys: Keys, listener: ServeConfig) -> None:
        assert listener is found.config
        found.service, found.keys = service, keys
        while not hasattr(app, "openapi"):  # inside what guards it
            app = getattr(app, "_app", None) or app.app
        found.paths = set(app.openapi()["paths"])

    monkeypatch.setattr(run, "bind_address", bind)
    monkeypatch.setattr(run, "serve_app", note)
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    return found


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Return `call(*arguments)`: the exit code and standard error of `pairdr serve`."""

    def run_command(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["serve", *map(str, arguments)])
        return int(end.value.code or 0), capsys.readouterr().err

    return run_command


def test_unsaid_options_are_the_defaults(served: Served, call: Call, work: Path) -> None:
    code, errors = call(work)
    assert code == 0, errors
    assert served.config == ServeConfig()
    assert (served.config.host, len(served.keys)) == ("127.0.0.1", 0)
    assert served.service.shelf.names == ["pair", "start"]
    assert served.service.shelf.take(None).searcher.reranker is None
    assert not served.paths & {"/feedback", "/audit"}


def test_every_option_arrives(
    served: Served, call: Call, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "host": "0.0.0.0",
        "port": 0,
        "models": ("start",),
        "batch_texts": 3,
        "batch_wait": 4.5,
        "queue_texts": 50,
        "most_results": 6,
        "most_hits": 60,
        "most_texts": 7,
        "most_characters": 80,
        "most_bytes": 900,
        "request_seconds": 1.5,
        "body_seconds": 2.5,
        "drain_seconds": 3.5,
        "watch_seconds": 4.5,
        "cors_origins": ("https://example.org",),
        "hosts": ("search.example.org",),
    }
    assert set(given) == {field.name for field in fields(ServeConfig)}
    options: list[object] = []
    for name, value in given.items():
        options += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,))]
    write_audit(tmp_path / "audit.tsv", make_findings())
    monkeypatch.setenv(KEYS_VARIABLE, f"{KEY},other")
    others = ("--reranker", "teacher", "--feedback", tmp_path / "feedback", "--audit", tmp_path / "audit.tsv")
    code, errors = call(work, *options, *others)
    assert code == 0, errors
    assert {name: getattr(served.config, name) for name in given} == given
    assert served.service.config is served.config
    assert (len(served.keys), KEY in served.keys) == (2, True)
    assert served.service.shelf.names == ["start"]
    reranker = served.service.shelf.take(None).searcher.reranker
    assert reranker is not None
    assert reranker.name == "bm25"
    assert served.paths >= {"/feedback", "/audit"}
    assert (tmp_path / "feedback" / "qrels").is_dir()


def test_vectors_are_served_with_their_model_words_and_index(
    served: Served, call: Call, kept: Path, toy_parts: Parts, tmp_path: Path
) -> None:
    build_index(VectorStore(kept), IndexConfig(index_kind="flat"), tmp_path / "index")
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n", encoding="utf-8")
    words = kept.parent / "bm25"
    options = ("--words", words, "--index", tmp_path / "index", "--api-keys", keys, "--device", "cpu")
    code, errors = call(kept, "--start", toy_parts.start, *options)
    assert code == 0, errors
    searcher = served.service.shelf.take(None).searcher
    assert searcher.modes == ("dense", "bm25", "hybrid")
    assert searcher._index is not None
    assert KEY in served.keys


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--models", "other"), 2, "There is no model 'other'"),
        (("--reranker", "no/such/folder"), 2, "The cross-encoder 'no/such/folder' cannot be loaded"),
        (("--api-keys", "no-such-file"), 2, "There is no such file. Check --api-keys."),
        (("--audit", "no-such-file"), 2, "There is no such file. Name what pairdr audit wrote."),
        (("--queue-texts", "10"), 2, "A request may have 256 texts, and only 10 may wait."),
        (("--port", "65536"), 2, "port"),
    ],
)
def test_what_cannot_be_served_ends_with_one_sentence(
    served: Served, call: Call, work: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    found, errors = call(work, *options)
    assert found == code, errors
    assert message in errors
    assert "Traceback" not in errors
    assert not hasattr(served, "service")


def test_what_is_wrong_at_once_is_said_before_a_model_is_loaded(
    call: Call, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pairdr.serve import shelf

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(shelf, "Shelf", refuse)
    with run.bind_address(ServeConfig(port=0)) as taken:
        taken.listen()
        code, errors = call(work, "--port", taken.getsockname()[1])
        assert (code, "cannot be listened on" in errors) == (2, True)
    (tmp_path / "file").touch()
    for option in ("--audit", "--feedback", "--api-keys"):
        code, errors = call(work, "--port", 0, option, tmp_path / "file")
        assert (code > 0, "Traceback" in errors, "loaded" in errors) == (True, False, False), errors


def test_a_folder_that_is_none_ends_with_one_sentence(served: Served, call: Call, tmp_path: Path) -> None:
    code, errors = call(tmp_path / "missing")
    assert code == 1
    assert "These are no vectors, and no finished work folder. Run pairdr run" in errors
    assert not hasattr(served, "service")


def test_a_missing_package_is_named_with_its_extra(call: Call, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("pairdr.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, errors = call(work)
    assert code == 2
    assert "fastapi" in errors
    assert "pairdr[serve]" in errors


@pytest.mark.parametrize(
    "options",
    [
        *({"port": -1}, {"port": 65536}, {"batch_texts": 0}, {"batch_wait": -1.0}, {"batch_wait": 1001.0}),
        *({"queue_texts": 0}, {"most_results": 0}, {"most_hits": 0}, {"most_texts": 0}),
        *({"most_characters": 0}, {"most_bytes": 0}),
        *({"request_seconds": 0.0}, {"body_seconds": 0.0}, {"drain_seconds": -1.0}, {"watch_seconds": 0.0}),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"Option {next(iter(options))} is .*; it must be "):
        ServeConfig(**options)


def test_the_server_has_the_time_to_drain_that_the_option_says() -> None:
    class Idle:
        def __init__(self, **options: Any) -> None:
            self.config = ServeConfig(**options)
            self.draining = False

    async def nothing(*_: Any) -> None:
        pass

    for seconds, found in ((0.0, 0), (0.2, 1), (12.0, 12)):
        server = run.make_server(nothing, Idle(drain_seconds=seconds))  # type: ignore[arg-type]
        assert server.config.timeout_graceful_shutdown == found
    idle = Idle()
    server = run.make_server(nothing, idle)  # type: ignore[arg-type]
    server.handle_exit(15, None)
    wait_until(lambda: idle.draining)
    assert server.should_exit
