"""What is served, and how a newly published version takes the place of an older one."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from manifests import rewrite_manifest
from serving import QUESTION, make_place, make_work, mark_edition, name_version, read_rows

from pairdr.artefact import MANIFEST, read_manifest
from pairdr.backends.exported import ExportedEncoder
from pairdr.config import EncodeConfig, LexicalConfig, ModelConfig
from pairdr.encode import upsert_passages
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, BusyError, UsageError
from pairdr.export import export_model
from pairdr.files import hold_lock
from pairdr.formats import format_metadata
from pairdr.index import build_index
from pairdr.lexical import LexicalIndex, index_words
from pairdr.parts import find_parts
from pairdr.records import Passage
from pairdr.serve import shelf as shelf_module
from pairdr.serve.failures import ApiError
from pairdr.serve.measuring import Meters
from pairdr.serve.service import Service
from pairdr.serve.sharing import SharedEncoder
from pairdr.serve.shelf import Shelf, Snapshot, follow_words, mend_words, read_widths
from pairdr.store_config import IndexConfig, ServeConfig
from pairdr.vectors import VectorStore
from pairdr.versions import delete_passages

if TYPE_CHECKING:
    from conftest import Parts


@contextmanager
def no_clock(_: str) -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, toy: Path, toy_parts: Parts) -> Path:
    """Return a place that nobody changes."""
    return make_place(tmp_path_factory.mktemp("place"), toy, toy_parts.encoder)


@pytest.fixture
def place(kept: Path, tmp_path: Path) -> Path:
    """Return a copy of it."""
    for name in ("v", "bm25"):
        shutil.copytree(kept.parent / name, tmp_path / name)
    return tmp_path / "v"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> Path:
    """Return the work folder of a run; tests that change it take a copy."""
    return make_work(tmp_path_factory.getbasetemp(), toy, tiny_model)


def open_shelf(place: Path, parts: Parts, **options: Any) -> Shelf:
    model = ModelConfig(start=str(parts.start), device="cpu")
    return Shelf(place, model, **{"words": place.parent / "bm25", "clock": no_clock, **options})


def publish_vectors(place: Path, parts: Parts, edition: int) -> VectorStore:
    """Let every passage say another edition."""
    rows = mark_edition(read_rows(place), edition)
    passages = [Passage(r["_id"], r["title"], r["text"], format_metadata(r["metadata"])) for r in rows]
    return upsert_passages(passages, parts.encoder, EncodeConfig(), place)


def publish(place: Path, parts: Parts, edition: int) -> VectorStore:
    store = publish_vectors(place, parts, edition)
    index_words(store, LexicalConfig(), place.parent / "bm25")
    return store


def find_editions(snapshot: Snapshot) -> set[int]:
    """Return what the texts that are found in any way say."""
    hits = [hit for mode in ("dense", "bm25", "hybrid") for hit in snapshot.searcher.search(QUESTION, 20, mode=mode)]
    said = {int(hit.passage.text.split(" Edition ")[1].rstrip(".")) for hit in hits}
    assert said == {json.loads(hit.passage.metadata)["edition"] for hit in hits}
    return said


# --- new versions -----------------------------------------------------------------------------------------------------


def test_a_new_version_is_picked_up_and_who_holds_the_old_one_keeps_it(place: Path, toy_parts: Parts) -> None:
    shelf = open_shelf(place, toy_parts)
    old = shelf.take(None)
    assert shelf.refresh() == []
    assert shelf.take(None) is old
    for edition in (2, 3, 4):  # the writer after next clears away what the version before no longer needs
        publish(place, toy_parts, edition)
        assert shelf.refresh() == ["v"]
        new = shelf.take(None)
        assert new.version == name_version(place)
        assert find_editions(new) == {edition}
    assert find_editions(old) == {1}
    assert old.version.startswith("1-")
    assert new.encoder is old.encoder  # the model has not changed, and is not opened again
    assert shelf.stale == {}


def test_versions_of_equal_content_have_equal_names(kept: Path, place: Path, toy_parts: Parts) -> None:
    assert open_shelf(place, toy_parts).take("v").version == open_shelf(kept, toy_parts).take("v").version


def test_vectors_without_their_words_wait_for_them(
    place: Path, toy_parts: Parts, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = open_shelf(place, toy_parts)
    old = shelf.take(None)
    store = publish_vectors(place, toy_parts, 2)
    capsys.readouterr()
    for _ in range(3):
        assert shelf.refresh() == []
    assert shelf.take(None) is old
    assert find_editions(old) == {1}
    assert shelf.stale == {"v": "The passages have changed since their words were indexed."}
    assert capsys.readouterr().err.count("the new version of v is not served") == 1
    index_words(store, LexicalConfig(), place.parent / "bm25")
    assert shelf.refresh() == ["v"]
    assert shelf.stale == {}
    assert find_editions(shelf.take(None)) == {2}


def test_dense_search_alone_follows_at_once(place: Path, toy_parts: Parts) -> None:
    shelf = open_shelf(place, toy_parts, words=None)
    assert shelf.take(None).searcher.modes == ("dense",)
    delete_passages(place, ["calder-river"])
    assert shelf.refresh() == ["v"]
    assert shelf.take(None).searcher.store.live == 119


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda place: (place / MANIFEST).write_text("{", encoding="utf-8"), "The manifest cannot be read."),
        (lambda place: shutil.rmtree(place), "These are no vectors, and no finished work folder."),
        (lambda place: shutil.rmtree(place.parent / "bm25"), "No bm25 here: manifest.json is missing."),
        (lambda place: next((place / "shards").glob("*.npy")).unlink(), "is missing."),
    ],
)
def test_what_cannot_be_read_is_refused_and_the_old_version_answers_on(
    place: Path, toy_parts: Parts, tmp_path: Path, spoil: Any, why: str
) -> None:
    shelf = open_shelf(place, toy_parts)
    shutil.copytree(place, tmp_path / "good" / "v")
    shutil.copytree(place.parent / "bm25", tmp_path / "good" / "bm25")
    spoil(place)
    manifest = place / MANIFEST
    if manifest.is_file():  # as of a new version
        manifest.write_bytes(manifest.read_bytes())
        manifest.touch()
    assert shelf.refresh() == []
    assert why in shelf.stale["v"]
    assert find_editions(shelf.take(None)) == {1}
    for name in ("v", "bm25"):
        shutil.rmtree(place.parent / name, ignore_errors=True)
        shutil.copytree(tmp_path / "good" / name, place.parent / name)
    shelf.refresh()
    assert shelf.stale == {}
    assert find_editions(shelf.take(None)) == {1}


def test_vectors_of_another_model_are_refused(place: Path, toy: Path, toy_parts: Parts, bare_model: Path) -> None:
    from pairdr.collection import open_collection
    from pairdr.encode import encode_corpus

    shelf = open_shelf(place, toy_parts, words=None)
    other = DualEncoder.load(ModelConfig(start=str(bare_model), device="cpu"))
    encode_corpus(open_collection(toy), other, EncodeConfig(), place)
    assert shelf.refresh() == []
    assert "made by encoder" in shelf.stale["v"]
    assert shelf.take(None).version.startswith("1-")


def test_what_is_published_while_a_version_is_opened_is_opened_next(
    place: Path, toy_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = open_shelf(place, toy_parts, words=None)
    delete_passages(place, ["calder-river"])
    open_searcher, late = shelf_module.open_searcher, ["calder-market"]

    def open_late(*arguments: Any, **options: Any) -> Any:
        found = open_searcher(*arguments, **options)
        if late:
            delete_passages(place, [late.pop()])
        return found

    monkeypatch.setattr(shelf_module, "open_searcher", open_late)
    assert shelf.refresh() == ["v"]
    assert shelf.take(None).searcher.store.live == 119
    assert shelf.refresh() == ["v"]
    assert shelf.take(None).searcher.store.live == 118
    assert shelf.refresh() == []


def test_a_new_index_is_picked_up(place: Path, toy_parts: Parts, tmp_path: Path) -> None:
    config = IndexConfig(index_kind="ivf", quantiser="sq8", wanted_recall=0.9, recall_depth=10)
    build_index(VectorStore(place), config, tmp_path / "index")
    shelf = open_shelf(place, toy_parts, index=tmp_path / "index")
    first = shelf.take(None)
    build_index(VectorStore(place), IndexConfig(index_kind="flat"), tmp_path / "index")
    assert shelf.refresh() == ["v"]
    found = shelf.take(None)
    assert [snapshot.searcher._index and snapshot.searcher._index.kind for snapshot in (first, found)] == [
        "ivf",
        "flat",
    ]
    assert first.version != found.version and found.version.startswith("1-")  # the same vectors, another index
    publish(place, toy_parts, 2)
    assert shelf.refresh() == ["v"]
    assert find_editions(shelf.take(None)) == {2}


@pytest.mark.parametrize(("name", "opened"), [("judge", 1), ("teacher", 2)])
def test_a_reranker_that_knows_nothing_of_the_index_stays_open(
    place: Path, toy_parts: Parts, monkeypatch: pytest.MonkeyPatch, name: str, opened: int
) -> None:
    class Judge:
        def score(self, queries: Any, candidates: Any) -> list[np.ndarray]:
            return [np.zeros(len(row)) for row in candidates]

    made: list[Judge] = []
    monkeypatch.setattr("pairdr.searcher._open_reranker", lambda *_: made.append(Judge()) or made[-1])
    shelf = open_shelf(place, toy_parts, reranker=name)
    assert shelf.take(None).searcher.reranker is made[0]
    publish(place, toy_parts, 2)
    assert shelf.refresh() == ["v"]
    assert shelf.take(None).searcher.reranker is made[-1]
    assert len(made) == opened


def test_words_of_a_killed_writer_are_indexed_where_its_note_names_them(
    place: Path, toy_parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a service leaves them that was killed between the vectors and their words."""
    words = place.parent / "bm25"
    index_words(VectorStore(place), LexicalConfig(k1=1.1, language="none"), words)
    parts = find_parts(place, words=words)
    with pytest.raises(KeyboardInterrupt), follow_words(parts):
        store = publish_vectors(place, toy_parts, 2)
        raise KeyboardInterrupt
    with pytest.raises(ArtefactError, match="have changed since their words were indexed"):
        open_shelf(place, toy_parts)
    capsys.readouterr()
    shelf = open_shelf(place, toy_parts, writes=True)
    assert "indexing the words of version 2" in capsys.readouterr().err
    assert find_editions(shelf.take(None)) == {2}
    found = LexicalIndex(words)
    assert found.config == LexicalConfig(k1=1.1, language="none")
    assert found.passages_fingerprint == store.passages_fingerprint
    before, files = read_manifest(words), set(place.parent.iterdir())
    with follow_words(parts):
        pass
    mend_words(parts)
    assert (read_manifest(words), set(place.parent.iterdir())) == (before, files)


def test_words_that_no_note_names_are_left_alone(place: Path, toy_parts: Parts, tmp_path: Path) -> None:
    """They may be another folder's, or those of a command that is about to index them itself."""
    words = place.parent / "bm25"
    publish_vectors(place, toy_parts, 2)
    before = read_manifest(words)
    with pytest.raises(ArtefactError, match="have changed since their words were indexed"):
        open_shelf(place, toy_parts, writes=True)
    other = Path(shutil.copytree(words, tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt), follow_words(find_parts(place, words=other)):
        raise KeyboardInterrupt
    with pytest.raises(ArtefactError, match="have changed since their words were indexed"):
        open_shelf(place, toy_parts, writes=True)
    assert read_manifest(words) == before


def test_nobody_mends_words_beside_another_command(work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    with hold_lock(copy), pytest.raises(BusyError):
        Shelf(copy, ModelConfig(device="cpu"), ["pair"], writes=True, clock=no_clock)


# --- what is there ----------------------------------------------------------------------------------------------------


def test_vectors_have_one_model_named_by_their_folder(place: Path, toy_parts: Parts) -> None:
    shelf = open_shelf(place, toy_parts)
    assert (shelf.names, shelf.is_work) == (["v"], False)
    assert shelf.take("v") is shelf.take(None)
    with pytest.raises(UsageError, match="Vectors have one model"):
        open_shelf(place, toy_parts, names=["v"])


@pytest.mark.parametrize("name", ["other", "", "../v", "/etc/passwd", "v/", "V", "start"])
def test_an_unknown_model_is_named_and_nothing_is_opened(
    place: Path, toy_parts: Parts, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = open_shelf(place, toy_parts)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("a file was opened"))
    with pytest.raises(ApiError) as error:
        shelf.take(name)
    assert (error.value.status, error.value.code) == (404, "unknown_model")
    assert repr(name) in error.value.message
    assert str(place) not in error.value.message


def test_what_holds_something_else_is_refused_before_a_model_is_loaded(work: Path) -> None:
    with pytest.raises(ArtefactError, match="model"):
        find_parts(work / "models" / "pair")


def test_a_folder_that_is_neither_is_refused(tmp_path: Path, toy_parts: Parts) -> None:
    with pytest.raises(ArtefactError, match="no vectors, and no finished work folder"):
        open_shelf(tmp_path, toy_parts)


def test_a_work_folder_serves_the_trained_model_and_the_start(work: Path) -> None:
    shelf = Shelf(work, ModelConfig(device="cpu"), clock=no_clock)
    assert (shelf.names, shelf.is_work) == (["pair", "start"], True)
    trained, start = shelf.take(None), shelf.take("start")
    assert trained.name == "pair"
    facts = json.loads((work / "work.json").read_text(encoding="utf-8"))
    assert trained.searcher.settle().mode == facts["mode"]
    assert trained.searcher.weights == tuple(facts["weights"])
    assert start.searcher.weights is None  # no weights were chosen for it
    assert trained.encoder.fingerprint != start.encoder.fingerprint
    for snapshot in (trained, start):
        store = VectorStore(work / "vectors" / snapshot.name)
        assert snapshot.searcher.store.fingerprint == store.fingerprint
        hits = snapshot.searcher.search(QUESTION, 3, mode="dense")
        vector = snapshot.encoder.encode_queries([QUESTION])[0]
        assert hits[0].score == pytest.approx(float((store.take(np.arange(store.count)) @ vector).max()), abs=1e-5)


def test_named_models_are_served_in_their_order(work: Path) -> None:
    shelf = Shelf(work, ModelConfig(device="cpu"), ["start", "pair", "start"], clock=no_clock)
    assert shelf.names == ["start", "pair"]
    assert shelf.take(None).name == "start"
    assert Shelf(work, ModelConfig(device="cpu"), ["start"], clock=no_clock).names == ["start"]


@pytest.mark.parametrize("name", ["other", "pair.stage1", ".."])
def test_a_named_model_that_is_not_there_is_refused(work: Path, name: str) -> None:
    with pytest.raises(UsageError, match="There is no model"):
        Shelf(work, ModelConfig(device="cpu"), ["pair", name], clock=no_clock)


def test_a_start_without_vectors_is_left_out(work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    shutil.rmtree(copy / "vectors" / "start")
    assert Shelf(copy, ModelConfig(device="cpu"), clock=no_clock).names == ["pair"]


def test_a_start_that_no_longer_fits_the_words_is_left_out(work: Path, tmp_path: Path) -> None:
    """Passages were changed where the trained model alone was served; named, the other one is refused."""
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    shelf = Shelf(copy, ModelConfig(device="cpu"), ["pair"], writes=True, clock=no_clock)
    with follow_words(shelf.find_parts("pair")):
        delete_passages(copy / "vectors" / "pair", ["calder-river"])
    assert shelf.refresh() == ["pair"]
    assert Shelf(copy, ModelConfig(device="cpu"), clock=no_clock).names == ["pair"]
    with pytest.raises(ArtefactError, match="have changed since their words were indexed"):
        Shelf(copy, ModelConfig(device="cpu"), ["pair", "start"], clock=no_clock)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, work: Path) -> Path:
    """Return the trained model of the work folder, exported for onnxruntime."""
    folder = tmp_path_factory.mktemp("exported") / "pair"
    export_model(work / "models" / "pair", folder, to="onnx")
    return folder


def test_an_export_stands_for_the_model_of_a_work_folder(work: Path, exported: Path) -> None:
    model = ModelConfig(start=str(exported), device="cpu")
    shelf = Shelf(work, model, clock=no_clock)
    assert shelf.names == ["pair"]  # it is no export of the start
    snapshot, trained = shelf.take(None), Shelf(work, ModelConfig(device="cpu"), ["pair"], clock=no_clock).take(None)
    assert isinstance(snapshot.encoder._encoder, ExportedEncoder)
    texts = ["the river of Ashford", "a text"]
    expected = trained.encoder.encode_queries(texts)
    assert snapshot.encoder.encode_queries(texts) == pytest.approx(expected, abs=1e-5)
    found, other = (s.searcher.search(QUESTION, 5, mode="dense") for s in (snapshot, trained))
    assert [hit.passage_id for hit in found] == [hit.passage_id for hit in other]
    assert (snapshot.version, snapshot.widths) == (trained.version, trained.widths)


def test_what_is_no_export_of_the_served_model_is_refused(
    work: Path, exported: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = "is no export of the model that made the vectors.*or leave --start out"
    for start, names in ((work / "models" / "pair", []), (tiny_model, []), ("no/such", []), (exported, ["start"])):
        with pytest.raises(UsageError, match=other):
            Shelf(work, ModelConfig(start=str(start), device="cpu"), names, clock=no_clock)
    quantised = Path(shutil.copytree(exported, tmp_path / "int8"))
    rewrite_manifest(quantised, lambda manifest: manifest["facts"].update(precision="int8"))
    with pytest.raises(UsageError, match="In int8 a model's vectors are others"):
        Shelf(work, ModelConfig(start=str(quantised), device="cpu"), clock=no_clock)


def test_a_model_that_was_trained_anew_is_opened_with_its_vectors(work: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The model comes before its vectors; until both are there the old pair answers."""
    from pairdr.collection import open_collection
    from pairdr.encode import encode_corpus

    copy = Path(shutil.copytree(work, tmp_path / "work"))
    shelf = Shelf(copy, ModelConfig(device="cpu"), clock=no_clock)
    old, other = shelf.take("pair"), shelf.take("start")
    encoder = DualEncoder.load(ModelConfig(start=str(tiny_model), device="cpu", query_prefix="ask: "))
    data = json.loads((copy / "run.json").read_text(encoding="utf-8"))["data"]
    encoder.save(copy / "models" / "pair", options={"matryoshka_dims": [4]}, inputs={})
    assert shelf.refresh() == []
    assert "made by encoder" in shelf.stale["pair"]
    assert shelf.take("pair") is old
    encode_corpus(open_collection(data), encoder, EncodeConfig(), copy / "vectors" / "pair")
    assert shelf.refresh() == ["pair"]
    assert shelf.take("pair").encoder.fingerprint == encoder.fingerprint != old.encoder.fingerprint
    assert (old.widths, shelf.take("pair").widths) == ((8, 16), (4,))
    assert shelf.take("start") is other


def test_widths_are_those_that_a_model_was_trained_for(work: Path, tiny_model: Path) -> None:
    assert read_widths(work / "models" / "pair") == (8, 16)
    assert read_widths(work / "models" / "start") == ()
    assert read_widths(tiny_model) == ()  # not ours: nobody knows


def test_an_encoder_is_used_by_one_thread_at_a_time() -> None:
    class Fragile:
        contract, device, noise, fingerprint = None, "cpu", 0.0, "f"

        def __init__(self) -> None:
            self.inside, self.most, self.entered = 0, 0, threading.Event()

        def _use(self, texts: Any, tokens_per_batch: int | None = None) -> Any:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.entered.set()
            others.wait(0.05)  # whoever comes meanwhile has to wait outside
            self.inside -= 1
            return list(texts)

        encode_queries = encode_passages = tokenize_queries = tokenize_passages = _use

    others = threading.Event()
    fragile, stages = Fragile(), []

    @contextmanager
    def clock(stage: str) -> Iterator[None]:
        stages.append(stage)
        yield

    shared = SharedEncoder(fragile, clock, 64)  # type: ignore[arg-type]
    uses = (shared.encode_queries, shared.encode_passages, shared.tokenize_queries, shared.tokenize_passages)
    threads = [threading.Thread(target=use, args=(["a"],)) for use in uses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fragile.most == 1
    assert stages == ["encode", "encode"]


def test_who_waits_for_an_encoder_comes_before_the_next_part_of_many_passages() -> None:
    class Encoder:
        contract, device, noise, fingerprint = None, "cpu", 0.0, "f"

        def __init__(self) -> None:
            self.calls: list[str] = []

        def encode_passages(self, passages: Any, tokens_per_batch: int | None = None) -> Any:
            self.calls.append("passages")
            time.sleep(0.0005)
            return list(passages)

        def encode_queries(self, texts: Any, tokens_per_batch: int | None = None) -> Any:
            self.calls.append("question")
            return list(texts)

    for _ in range(20):
        encoder = Encoder()
        shared = SharedEncoder(encoder, no_clock, 1)  # type: ignore[arg-type]
        thread = threading.Thread(target=shared.encode_passages, args=(["a"] * 200,))
        thread.start()
        time.sleep(0.02)
        before = len(encoder.calls)
        shared.encode_queries(["a"])
        assert encoder.calls.index("question") <= before + 2
        thread.join()
        assert encoder.calls.count("passages") == 200


# --- looking for versions ---------------------------------------------------------------------------------------------


def test_versions_are_looked_for_as_often_as_the_option_says_and_a_broken_look_is_no_end(
    place: Path, toy_parts: Parts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    looks: list[int] = []

    def look() -> list[str]:
        looks.append(1)
        if len(looks) in (1, 2, 4):
            raise OSError("the disk is gone")
        return []

    async def live() -> None:
        service = Service(shelf, ServeConfig(watch_seconds=7.5), Meters())
        monkeypatch.setattr(asyncio, "sleep", note)
        service.start()
        while len(looks) < 6:
            await sleep(0.001)
        await service.stop()

    shelf = open_shelf(place, toy_parts)
    monkeypatch.setattr(shelf, "refresh", look)
    asyncio.run(live())
    assert set(slept) == {7.5}
    said = capsys.readouterr().err  # once for as long as it lasts
    assert said.count("looking for new versions failed: the disk is gone") == 2
