"""The vector store: any order of changes searches as a rebuild does; a killed or failed call leaves the old version."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import rewrite_manifest
from storing import SIZE, SMALL, WordEncoder, make_texts, read_texts, to_passages, write_collection

from pairdr import versions
from pairdr.artefact import MANIFEST, read_manifest, verify_artefact
from pairdr.cli import main
from pairdr.config import EncodeConfig, LexicalConfig, SearchConfig
from pairdr.encode import encode_corpus, upsert_passages
from pairdr.errors import ArtefactError, PairdrError, UsageError
from pairdr.files import hash_file
from pairdr.index import build_index
from pairdr.indexes.exact import search_exact
from pairdr.indexes.faiss import FaissIndex
from pairdr.lexical import index_words
from pairdr.records import Passage, Query
from pairdr.search import rank_dense
from pairdr.store_config import IndexConfig
from pairdr.vectors import VectorStore, to_float32, to_stored
from pairdr.versions import compact_store, delete_passages, verify_store, write_store

ENCODER = WordEncoder()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRDR_CACHE", str(tmp_path / "cache"))


def build(folder: Path, texts: dict[str, str], encoder: WordEncoder = ENCODER, **options: Any) -> VectorStore:
    config = EncodeConfig(**{"shard_size": 8} | options)
    return encode_corpus(write_collection(folder.parent / f"{folder.name}.data", texts), encoder, config, folder)


def search(store: VectorStore, text: str, k: int = 12) -> list[tuple[str, float]]:
    """Return ids and scores of the k best passages."""
    query = ENCODER.encode_queries([text])
    rows, scores = search_exact(query, store.read_raw(5), store.id_rank, k, store.alive)
    found = rows[0] >= 0
    return list(zip(store.ids_of(rows[0][found]), scores[0][found].round(5).tolist(), strict=True))


def hash_shards(store: VectorStore) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted((store.folder / "shards").iterdir())}


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_rows_ids_texts_and_vectors_are_found_in_any_order(tmp_path: Path, dtype: str) -> None:
    texts = make_texts(30)
    store = build(tmp_path / "v", texts, dtype=dtype)
    assert (store.count, store.live, store.dimensions, store.dtype, len(store.shards)) == (30, 30, SIZE, dtype, 4)
    order = np.random.default_rng(13).permutation(30)
    ids = [list(texts)[row] for row in order]
    assert store.ids_of(order) == ids
    assert store.rows_of([*ids, "nobody"]).tolist() == [*order.tolist(), -1]
    assert [p.text for p in store.passages_of(order)] == [texts[i] for i in ids]
    expected = ENCODER.encode_queries([texts[i] for i in ids])
    close = {"float32": 0, "float16": 1e-3, "int8": 1 / 127}[dtype]
    assert np.abs(store.take(order) - expected).max() <= close
    assert np.array_equal(store.take_passages(ids), store.take(order))
    assert np.array_equal(np.concatenate([block for _, block in store.read_blocks(3)])[order], store.take(order))
    assert store.id_rank.tolist() == list(range(30))
    verify_artefact(tmp_path / "v")
    verify_store(tmp_path / "v")


@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4))
def test_int8_is_within_half_a_step_of_every_number(row: list[float]) -> None:
    vectors = np.array([row], dtype=np.float32)
    stored, scales = to_stored(vectors, "int8")
    assert scales is not None
    assert np.abs(to_float32(stored, scales) - vectors).max() <= scales[0] * 0.5001 + 1e-30


def test_an_empty_corpus_has_a_store_that_finds_nothing(tmp_path: Path) -> None:
    store = build(tmp_path / "v", make_texts(1))
    store = delete_passages(tmp_path / "v", ["p000"])
    assert (store.count, store.live, search(store, "word1")) == (1, 0, [])
    store = compact_store(tmp_path / "v")
    assert (store.count, store.shards, search(store, "word1")) == (0, [], [])


# --- versions ---------------------------------------------------------------------------------------------------------


def test_only_what_changed_is_encoded_again(tmp_path: Path) -> None:
    encoder, texts = WordEncoder(), make_texts(30)
    first = build(tmp_path / "v", texts, encoder)
    encoder.encoded.clear()
    assert build(tmp_path / "v", texts, encoder).fingerprint == first.fingerprint
    assert encoder.encoded == []
    del texts["p003"]
    texts |= {"p007": "another text", "q1": "a new one"}
    store = build(tmp_path / "v", texts, encoder)
    assert sorted(encoder.encoded) == ["p007", "q1"]
    assert (store.version, store.count, store.live) == (2, 32, 30)
    assert read_texts(store) == texts
    assert search(store, "another text")[0] == ("p007", 1.0)
    assert "p003" not in dict(search(store, "word3 town3", 32))


def test_upserts_and_deletes_by_id(tmp_path: Path) -> None:
    encoder = WordEncoder()
    build(tmp_path / "v", make_texts(20), encoder)
    encoder.encoded.clear()
    changes = {"p001": "word1 town1", "p002": "moved away", "n": "new here"}  # the first is as it was
    store = upsert_passages(to_passages(changes), encoder, SMALL, tmp_path / "v")
    assert encoder.encoded == ["p002", "n"]
    assert read_texts(store) == make_texts(20) | changes
    store = delete_passages(tmp_path / "v", ["p002", "p010"])
    assert set(read_texts(store)) == set(make_texts(20)) - {"p002", "p010"} | {"n"}
    assert store.rows_of(["p002", "p010"]).tolist() == [-1, -1]
    with pytest.raises(UsageError, match="There is no passage 'p010' here"):
        delete_passages(tmp_path / "v", ["p010"])
    with pytest.raises(ArtefactError, match="made by encoder"):
        upsert_passages(to_passages(changes), WordEncoder("other"), SMALL, tmp_path / "v")


class Machine:
    """A store and what it should hold."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.texts = folder, make_texts(12)
        build(folder, self.texts, dtype=dtype)

    def take(self, step: tuple[str, list[int]]) -> None:
        kind, numbers = step
        ids = list(dict.fromkeys(f"p{number:03d}" for number in numbers))
        if kind == "upsert":
            changes = {passage_id: f"word{at} town{len(self.texts) % 5}" for at, passage_id in enumerate(ids)}
            upsert_passages(to_passages(changes), ENCODER, SMALL, self.folder)
            self.texts |= changes
        elif kind == "delete":
            there = [passage_id for passage_id in ids if passage_id in self.texts]
            if there:
                delete_passages(self.folder, there)
                self.texts = {i: text for i, text in self.texts.items() if i not in there}
        else:
            compact_store(self.folder)


STEPS = st.lists(
    st.tuples(st.sampled_from(["upsert", "delete", "compact"]), st.lists(st.integers(0, 20), min_size=1, max_size=9)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, st.sampled_from(["float32", "float16", "int8"]))
def test_any_sequence_of_changes_searches_as_a_rebuild_does(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, list[int]]], dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("machine")
    machine = Machine(folder / "v", dtype)
    config = IndexConfig(index_kind="hnsw", quantiser="sq8", wanted_recall=0.5, recall_depth=5)
    build_index(VectorStore(folder / "v"), config, folder / "index")
    for step in steps:
        machine.take(step)
        store = VectorStore(folder / "v")
        assert read_texts(store) == machine.texts
        require_sound_index(store, folder / "index", config)
    verify_artefact(folder / "v")
    verify_store(folder / "v")
    if machine.texts:
        rebuilt = build(folder / "again", machine.texts, dtype=dtype)
        words, again = (
            index_words(source, LexicalConfig(language="none"), folder / name)
            for source, name in ((store, "words"), (rebuilt, "words again"))
        )
        for text in ("word1 town1", "town3", "word5 town0 word2"):
            assert search(store, text) == search(rebuilt, text)
            found, expected = words.search(text, 12), again.search(text, 12)
            assert words.ids_of(found[0]) == again.ids_of(expected[0])
            assert found[1].tolist() == expected[1].tolist()


def require_sound_index(store: VectorStore, folder: Path, config: IndexConfig) -> None:
    """Check that an index over a changed store finds live passages, each once, with their scores of now."""
    try:
        index = FaissIndex.open(folder, store)
    except ArtefactError:  # every shard that it knew was written anew
        if not store.live:
            return
        index = build_index(store, config, folder)
    query = ENCODER.encode_queries(["word1 town1"])
    (rows,), (scores,) = index.search(query, 9)
    ids = store.ids_of(rows[rows >= 0])
    assert len(ids) == min(9, store.live) == len(set(ids))
    assert (store.rows_of(ids) == rows[rows >= 0]).all()
    np.testing.assert_allclose(scores[rows >= 0], store.take(rows[rows >= 0]) @ query[0], atol=1e-6)


def test_compaction_keeps_whole_shards_and_clears_the_rest_away(tmp_path: Path) -> None:
    build(tmp_path / "v", make_texts(24))
    store = delete_passages(tmp_path / "v", ["p001", "p002"])
    before = search(store, "town3")
    compacted = compact_store(tmp_path / "v")
    assert (compacted.count, compacted.alive) == (22, None)
    assert [s.name for s in compacted.shards[1:]] == [s.name for s in store.shards[1:]]
    assert search(compacted, "town3") == before
    assert compact_store(tmp_path / "v").fingerprint == compacted.fingerprint
    assert search(store, "town3") == before  # a reader of the version before goes on


# --- readers and writers ----------------------------------------------------------------------------------------------


def test_a_reader_keeps_its_version_while_others_write(tmp_path: Path) -> None:
    store = build(tmp_path / "v", make_texts(24))
    before = search(store, "word1 town1")
    for number in range(4):
        delete_passages(tmp_path / "v", [f"p{number:03d}"])
        compact_store(tmp_path / "v")
    assert search(store, "word1 town1") == before
    assert store.ids_of(np.arange(3)) == ["p000", "p001", "p002"]
    assert VectorStore(tmp_path / "v").live == 20


def test_readers_beside_a_writer_see_whole_versions(tmp_path: Path) -> None:
    folder, ended = tmp_path / "v", threading.Event()
    build(folder, make_texts(24))
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not ended.is_set():
                store = VectorStore(folder)
                texts = read_texts(store)
                assert len(texts) == store.live
                assert len({text for passage_id, text in texts.items() if passage_id >= "x"}) <= 1
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(12):  # the same five passages, always of one text
        upsert_passages(to_passages({f"x{i}": f"round{number}" for i in range(5)}), ENCODER, SMALL, folder)
        compact_store(folder)
    ended.set()
    reader.join()
    assert failures == []


def test_a_passage_that_comes_back_is_in_a_shard_of_another_name(tmp_path: Path) -> None:
    build(tmp_path / "v", make_texts(9))
    for text in ("one", "two", "one", "two"):
        store = upsert_passages([Passage("x", "", text), Passage("y", "", text)], ENCODER, SMALL, tmp_path / "v")
    assert len({shard.name for shard in store.shards}) == len(store.shards)
    assert read_texts(store) == make_texts(9) | {"x": "two", "y": "two"}


def test_a_reader_keeps_its_bytes_when_a_shard_comes_back_under_its_name(tmp_path: Path) -> None:
    build(tmp_path / "v", make_texts(9))
    more = to_passages(make_texts(8, 50))
    ids = [passage.passage_id for passage in more]
    reader = upsert_passages(more, ENCODER, SMALL, tmp_path / "v")
    before = reader.take_passages(ids)
    delete_passages(tmp_path / "v", ids)
    compact_store(tmp_path / "v")
    places = {path.name: path.stat().st_ino for path in (tmp_path / "v" / "shards").iterdir()}
    upsert_passages(more, ENCODER, SMALL, tmp_path / "v")
    after = {path.name: path.stat().st_ino for path in (tmp_path / "v" / "shards").iterdir()}
    assert all(after[name] != inode for name, inode in places.items() if name.startswith(reader.shards[-1].name))
    np.testing.assert_array_equal(reader.take_passages(ids), before)


def test_what_else_stands_in_the_folder_stays(tmp_path: Path) -> None:
    build(tmp_path / "v", make_texts(9))
    for place in ("notes.txt", "index/index.faiss", "shards/kept/by-a-user.txt"):
        (tmp_path / "v" / place).parent.mkdir(exist_ok=True)
        (tmp_path / "v" / place).write_text("mine", encoding="utf-8")
    delete_passages(tmp_path / "v", ["p000"])
    compact_store(tmp_path / "v")
    for place in ("notes.txt", "index/index.faiss", "shards/kept/by-a-user.txt"):
        assert (tmp_path / "v" / place).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["shards_backup", "versions2"])
def test_a_folder_that_only_begins_like_one_of_ours_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "v" / name).mkdir(parents=True)
    with pytest.raises(UsageError, match="holds 'other files'"):
        build(tmp_path / "v", make_texts(3))


def test_markers_of_a_call_that_was_killed_after_publishing_are_swept(tmp_path: Path) -> None:
    store = build(tmp_path / "v", make_texts(9))
    marker = tmp_path / "v" / "shards" / f"{store.shards[0].name}.done"
    marker.write_text("{}", encoding="utf-8")
    build(tmp_path / "v", make_texts(9))
    assert not marker.exists()


def test_a_disk_without_room_is_seen_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions.shutil, "disk_usage", lambda place: SimpleNamespace(free=4 * SIZE * 9 - 1))
    encoder = WordEncoder()
    with pytest.raises(ArtefactError, match=r"The vectors take 0 MiB; 0 MiB are free\. Free some space"):
        encode_corpus(write_collection(tmp_path / "data", make_texts(9)), encoder, SMALL, tmp_path / "v")
    assert encoder.encoded == []
    monkeypatch.setattr(versions.shutil, "disk_usage", lambda place: SimpleNamespace(free=4 * SIZE * 9))
    encode_corpus(write_collection(tmp_path / "data", make_texts(9)), encoder, SMALL, tmp_path / "v")


@pytest.mark.parametrize("byte", range(0, 1500, 37))
def test_one_flipped_bit_of_the_manifest_is_found(tmp_path: Path, byte: int) -> None:
    build(tmp_path / "v", make_texts(9))
    path = tmp_path / "v" / MANIFEST
    written = path.read_bytes()
    flipped = bytearray(written)
    flipped[byte % len(written)] ^= 1
    path.write_bytes(flipped)
    try:
        same = json.loads(flipped) == json.loads(written)  # white space between two values
    except ValueError:
        same = False
    if not same:
        with pytest.raises(ArtefactError):
            verify_artefact(tmp_path / "v")


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "v", make_texts(9))
    with (
        write_store(tmp_path / "v", "float32", ENCODER.fingerprint),
        pytest.raises(UsageError, match="Another command is at work here"),
    ):
        delete_passages(tmp_path / "v", ["p001"])


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds 'other files'; 'vectors' would replace them all"):
        build(tmp_path / "v", make_texts(9))
    assert (tmp_path / "v" / "thesis.txt").read_text() == "mine"


# --- killed, full, broken ---------------------------------------------------------------------------------------------


class Stopping(WordEncoder):
    """Stops before a shard."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def encode_passages(self, passages: list[Passage], tokens_per_batch: int | None = None) -> np.ndarray:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().encode_passages(passages, tokens_per_batch)


def test_an_interrupted_call_goes_on_behind_its_finished_shards(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", make_texts(30))
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "v", make_texts(30), Stopping(2))
    with pytest.raises(ArtefactError, match="No vectors here"):
        VectorStore(tmp_path / "v")
    encoder = WordEncoder()
    store = build(tmp_path / "v", make_texts(30), encoder)
    assert len(encoder.encoded) == 30 - 16
    assert hash_shards(store) == hash_shards(whole)
    assert store.fingerprint == whole.fingerprint


def test_a_damaged_shard_of_an_interrupted_call_is_made_again(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", make_texts(30))
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "v", make_texts(30), Stopping(2))
    damaged = tmp_path / "v" / "shards" / f"{whole.shards[0].name}.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    encoder = WordEncoder()
    store = build(tmp_path / "v", make_texts(30), encoder)
    assert len(encoder.encoded) == 30 - 8
    assert hash_shards(store) == hash_shards(whole)


def test_an_interrupted_upsert_leaves_the_old_version_and_goes_on(tmp_path: Path) -> None:
    old = build(tmp_path / "v", make_texts(9))
    with pytest.raises(KeyboardInterrupt):
        upsert_passages(to_passages(make_texts(20, 100)), Stopping(2), SMALL, tmp_path / "v")
    assert VectorStore(tmp_path / "v").fingerprint == old.fingerprint
    encoder = WordEncoder()
    store = upsert_passages(to_passages(make_texts(20, 100)), encoder, SMALL, tmp_path / "v")
    assert len(encoder.encoded) == 4
    assert read_texts(store) == make_texts(9) | make_texts(20, 100)


def test_a_full_disk_leaves_the_old_version_and_no_part_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(tmp_path / "v", make_texts(9))

    def fail(path: Path, rows: object) -> None:
        raise OSError(28, "No space left on device")

    files = hash_shards(old)
    monkeypatch.setattr(versions, "_write_table", fail)
    with pytest.raises(ArtefactError, match=r"Writing failed: No space left on device\. .*untouched"):
        upsert_passages(to_passages(make_texts(3, 50)), ENCODER, SMALL, tmp_path / "v")
    assert VectorStore(tmp_path / "v").fingerprint == old.fingerprint
    assert hash_shards(old) == files


def test_a_vector_that_is_not_finite_is_refused_with_its_passage(tmp_path: Path) -> None:
    class Broken(WordEncoder):
        def encode_passages(self, passages: list[Passage], tokens_per_batch: int | None = None) -> np.ndarray:
            found = super().encode_passages(passages)
            found[[p.passage_id == "p005" for p in passages]] = np.inf
            return found

    with pytest.raises(PairdrError, match="The vector of passage 'p005' is not finite"):
        build(tmp_path / "v", make_texts(9), Broken())


def test_one_flipped_bit_anywhere_is_found_and_named(tmp_path: Path) -> None:
    build(tmp_path / "v", make_texts(9), dtype="int8")
    store = delete_passages(tmp_path / "v", ["p001"])
    draw = np.random.default_rng(13)
    for name in store.manifest.files:
        path = tmp_path / "v" / name
        whole = path.read_bytes()
        place = int(draw.integers(len(whole)))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ArtefactError, match=f"{path.name} is not the file that was written"):
            verify_artefact(tmp_path / "v")
        path.write_bytes(whole)
    verify_artefact(tmp_path / "v")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    store = build(tmp_path / "v", make_texts(9))
    os.truncate(tmp_path / "v" / "shards" / f"{store.shards[0].name}.npy", 100)
    with pytest.raises(ArtefactError, match="has 100 bytes, the manifest says"):
        VectorStore(tmp_path / "v")


def test_two_rows_of_one_id_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "v", make_texts(9))
    with write_store(tmp_path / "v", "float32", ENCODER.fingerprint) as writer:
        passages = to_passages(make_texts(2))
        writer.write_shard("twice", passages, ENCODER.encode_passages(passages))
        writer.shards.append(("twice", 2))
        writer.publish("p", SIZE, "cosine", {})
    with pytest.raises(ArtefactError, match="Two vectors have the id 'p000'"):
        verify_store(tmp_path / "v")


def test_vectors_of_an_earlier_form_are_refused_and_made_anew(tmp_path: Path) -> None:
    build(tmp_path / "v", make_texts(9))
    rewrite_manifest(tmp_path / "v", lambda content: content.update(format_version=1))
    with pytest.raises(ArtefactError, match="Format version 1 is not the"):
        VectorStore(tmp_path / "v")
    assert build(tmp_path / "v", make_texts(9)).live == 9


def test_vectors_of_another_encoder_are_refused_and_replaced(tmp_path: Path) -> None:
    store, other = build(tmp_path / "v", make_texts(9)), WordEncoder("other")
    with pytest.raises(ArtefactError, match=f"{ENCODER.fingerprint[:12]}, not by {other.fingerprint[:12]}"):
        next(rank_dense([Query("q", "word1")], other, store, SearchConfig()))
    assert build(tmp_path / "v", make_texts(9), other).encoder == other.fingerprint
    assert read_manifest(tmp_path / "v").facts["version"] == 2


def test_a_search_leaves_deleted_passages_out(tmp_path: Path) -> None:
    build(tmp_path / "v", make_texts(9))
    store = delete_passages(tmp_path / "v", ["p001"])
    ((_, (hits,)),) = rank_dense([Query("q", "word1 town1")], ENCODER, store, SearchConfig(k=50))
    assert len(hits) == 8
    assert "p001" not in dict(hits)


# --- the commands -----------------------------------------------------------------------------------------------------


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_the_commands_change_a_store(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_collection(tmp_path / "data", make_texts(9))
    start = ("--start", tiny_model)
    assert call("encode", tmp_path / "data", "-o", tmp_path / "v", *start, "--dtype", "int8") == 0
    more = tmp_path / "more.jsonl"
    more.write_text('{"_id": "n", "text": "first"}\n{"_id": "n", "text": "last"}\n', encoding="utf-8")
    assert call("upsert", tmp_path / "v", more, *start) == 1
    assert "The id 'n' occurs twice. Choose --on-duplicate first or last" in capsys.readouterr().err
    assert call("upsert", tmp_path / "v", more, *start, "--on-duplicate", "last") == 0
    assert read_texts(VectorStore(tmp_path / "v"))["n"] == "last"
    assert call("upsert", tmp_path / "v", more, *start, "--on-duplicate", "first") == 0
    assert read_texts(VectorStore(tmp_path / "v"))["n"] == "first"
    assert call("delete", tmp_path / "v", "n", "p001") == 0
    assert call("delete", tmp_path / "v", "nobody") == 2
    assert call("compact", tmp_path / "v") == 0
    assert call("verify", tmp_path / "v") == 0
    store = VectorStore(tmp_path / "v")
    assert (store.count, store.version, store.dtype) == (8, 5, "int8")
