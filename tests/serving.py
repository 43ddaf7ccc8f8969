"""What the tests of the service share: passages to serve, a service in a thread, and what is asked of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import uvicorn

from pairdr.backends import Encoder
from pairdr.config import EncodeConfig, LexicalConfig, ModelConfig
from pairdr.encode import encode_corpus
from pairdr.files import hash_json
from pairdr.lexical import LexicalIndex, index_words
from pairdr.serve.app import create_app
from pairdr.serve.guard import Asgi, Keys
from pairdr.serve.labels import Feedback, Review
from pairdr.serve.measuring import Meters
from pairdr.serve.run import bind_address, make_server
from pairdr.serve.service import Service
from pairdr.serve.shelf import Shelf
from pairdr.store_config import ServeConfig
from pairdr.vectors import VectorStore

KEY = "a-key-of-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
QUESTION = "which river runs through Calder"
PATIENCE = 30.0
"""Seconds after which a test gives up waiting."""


class Running(NamedTuple):
    """A service that answers."""

    url: str
    client: httpx.Client
    service: Service
    stop: Callable[[], None]

    def search(self, **body: Any) -> dict[str, Any]:
        """Return what a search answers."""
        answer = self.client.post("/search", json={"query": QUESTION, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


def write_edition(folder: Path, corpus: Path, edition: int = 1) -> Path:
    """Write the toy data with metadata: the kind of a passage, its number, and an edition that stands in its text too.

    Twice as many passages as towns have the same words as another: those of one kind.
    """
    from conftest import write_lines

    (folder / "qrels").mkdir(parents=True)
    rows = [json.loads(line) for line in (corpus / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    write_lines(folder / "corpus.jsonl", (json.dumps(row) for row in mark_edition(rows, edition)))
    for name in ("queries.jsonl", "qrels/train.tsv"):
        (folder / name).write_bytes((corpus / name).read_bytes())
    return folder


def mark_edition(rows: Sequence[Mapping[str, Any]], edition: int) -> list[dict[str, Any]]:
    """Return passages of another edition: every text and every metadata says which."""
    marked = []
    for number, row in enumerate(rows):
        text = str(row["text"]).split(" Edition ")[0] + f" Edition {edition}."
        metadata = {"kind": str(row["_id"]).split("-")[-1], "number": number, "edition": edition}
        marked.append({"_id": row["_id"], "title": row["title"], "text": text, "metadata": metadata})
    return marked


def make_place(folder: Path, corpus: Path, encoder: Encoder) -> Path:
    """Write the first edition, its vectors and its words, and return the folder of the vectors."""
    from pairdr.collection import open_collection

    store = encode_corpus(
        open_collection(write_edition(folder / "data", corpus)), encoder, EncodeConfig(), folder / "v"
    )
    index_words(store, LexicalConfig(), folder / "bm25")
    return folder / "v"


def name_version(vectors: Path, words: Path | None = None, settings: Sequence[Any] = (None, "auto", 100, None)) -> str:
    """Return the version that a service names: of vectors, words, and weights, mode, depth and reranker."""
    store, index = VectorStore(vectors), LexicalIndex(words or vectors.parent / "bm25")
    parts = [store.fingerprint, index.fingerprint, store.encoder, *settings, None]
    return f"{store.version}-{hash_json(parts)[:12]}"


def read_rows(place: Path) -> list[dict[str, Any]]:
    """Return the live passages of vectors as they are sent to /passages."""
    return [
        {"_id": p.passage_id, "title": p.title, "text": p.text, "metadata": json.loads(p.metadata or "{}")}
        for block in VectorStore(place).read_passages()
        for p in block
    ]


@contextmanager
def run_service(
    place: Path,
    start: Path | None = None,
    *,
    keys: Sequence[str] = (),
    names: Sequence[str] = (),
    words: Path | None = None,
    index: Path | None = None,
    reranker: str | None = None,
    feedback: Path | None = None,
    audit: Path | None = None,
    prepare: Callable[[Service], None] = lambda _: None,
    **options: Any,
) -> Iterator[Running]:
    """Serve a place as `pairdr serve` does, in a thread of this process.

    Args:
        place: vectors, or a work folder.
        start: the model of vectors.
        keys: what opens it.
        names: models of a work folder.
        words: BM25; unset: the folder beside the vectors where there is one.
        index: of the vectors.
        reranker: as the option.
        feedback: as the option.
        audit: as the option.
        prepare: is done to the service before it answers.
        **options: of `ServeConfig`.
    """
    config, meters = ServeConfig(**{"port": 0, **options}), Meters()
    if words is None and start is not None and (place.parent / "bm25").is_dir():
        words = place.parent / "bm25"
    model = ModelConfig(device="cpu") if start is None else ModelConfig(start=str(start), device="cpu")
    parts: dict[str, Any] = {"words": words, "index": index, "reranker": reranker}
    shelf = Shelf(place, model, names, **parts, writes=bool(keys), batch_texts=config.batch_texts, clock=meters.clock)
    service = Service(shelf, config, meters)
    prepare(service)
    labels = None if feedback is None else Feedback(feedback)
    review = None if audit is None else Review(audit)
    app = create_app(service, meters, Keys(keys), feedback=labels, review=review)
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    with (
        run_app(app, service) as (url, stop),
        httpx.Client(base_url=url, headers=headers, timeout=PATIENCE) as client,
    ):
        yield Running(url, client, service, stop)


@contextmanager
def run_app(app: Asgi, service: Service) -> Iterator[tuple[str, Callable[[], None]]]:
    """Answer requests in a thread, and yield the address, and what SIGTERM does."""
    listener = bind_address(service.config)
    listener.listen()
    server: uvicorn.Server = make_server(app, service)
    thread = threading.Thread(target=server.run, args=([listener],))

    def stop() -> None:
        server.should_exit = True

    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        host, port = listener.getsockname()
        yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}", stop
    finally:
        stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def read_metrics(client: httpx.Client) -> dict[str, float]:
    """Return the series of /metrics by their names and labels."""
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def check_error(answer: httpx.Response, status: int, code: str) -> str:
    """Check that an answer is an error in the one form, and return its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code"}
    assert body["error"]["code"] == code
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    assert body["error"]["type"] == kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return str(body["error"]["message"])


def make_work(folder: Path, corpus: Path, start: Path) -> Path:
    """Return the work folder of a short run that trains two widths, made once for all modules: nobody changes it.

    Args:
        folder: of the session's temporary files.
        corpus: the toy data.
        start: the model to start from.
    """
    from pairdr.config import EvaluateConfig, MineConfig, RunConfig, TeachConfig, TrainConfig
    from pairdr.pipeline import run_pipeline

    if (folder / "served-work").exists():
        return folder / "served-work"
    sizes = {"max_steps": 2, "per_device_train_batch_size": 8, "eval_passages": 20, "eval_queries": 5}
    config = RunConfig(
        model=ModelConfig(start=str(start), device="cpu"),
        mine=MineConfig(depth=40, relative_margin=None),
        teach=TeachConfig(rerank_depth=40),
        train=TrainConfig(matryoshka_dims=(8, 16), **sizes),
        evaluate=EvaluateConfig(resamples=200),
        arms=("pair",),
    )
    return run_pipeline(corpus, folder / "served-work", config).work


def exchange(url: str, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes on a connection of their own and return status, headers and the rest of what comes until its end."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        with suppress(ConnectionError):  # refused before all of it was sent
            connection.sendall(sent)
        found = b""
        with suppress(ConnectionError):
            while data := connection.recv(65_536):
                found += data
    return split_answer(found)


def split_answer(found: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of an answer as it came."""
    head, _, body = found.partition(b"\r\n\r\n")
    line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(line.split(" ")[1]), headers, body


CHILD = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "sentence_transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
from pairdr.cli import main
main()
"""
"""`pairdr` where torch and transformers cannot be imported."""


class Process:
    """A `pairdr serve` of its own, without torch.

    Attributes:
        child: the process.
        url: its address.
        said: the lines of its standard error so far.
    """

    def __init__(self, place: Path, start: Path, *options: object, environment: Mapping[str, str] = {}) -> None:
        arguments = [place, "--start", start, *options]
        if (place.parent / "bm25").is_dir():  # a work folder has its own
            arguments += ["--words", place.parent / "bm25"]
        if "--port" not in arguments:
            arguments += ["--port", 0]
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD, "serve", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.said: list[str] = []
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def url(self) -> str:
        """Return the address, once it is listened on."""
        assert self._listening.wait(4 * PATIENCE)
        found = [match[1] for line in self.said if (match := re.search(r"(http://\S+)", line))]
        assert found, "".join(self.said)
        return found[0]

    def end(self, number: int = signal.SIGKILL) -> int:
        """Send a signal, wait for the end, and return its code."""
        if self.child.poll() is None:
            self.child.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Return the code that it ends with."""
        code = self.child.wait(4 * PATIENCE)
        self._reader.join()
        if self.child.stderr is not None:
            self.child.stderr.close()
        return code

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.said.append(line)
            if "http://" in line:
                self._listening.set()
        self._listening.set()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
