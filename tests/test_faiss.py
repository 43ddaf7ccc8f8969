"""Approximate search: recall that was asked for, new and deleted vectors, files that are whole and our own."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from storing import WordEncoder, to_passages, write_collection

from pairdr import index as index_stage
from pairdr import vectors
from pairdr.artefact import read_manifest
from pairdr.cli import main
from pairdr.config import EncodeConfig
from pairdr.encode import encode_corpus, upsert_passages
from pairdr.errors import ArtefactError, MissingExtraError, RefusedError, UsageError
from pairdr.index import build_index, plan_index
from pairdr.indexes import faiss as faiss_index
from pairdr.indexes.exact import search_exact
from pairdr.indexes.faiss import INDEX_FILE, Effort, FaissIndex, load_faiss, use_threads
from pairdr.store_config import IndexConfig
from pairdr.vectors import VectorStore
from pairdr.versions import compact_store, delete_passages

COUNT, SIZE = 3000, 32


class Shard(NamedTuple):
    name: str
    start: int
    count: int


class MemoryStore:
    """What an index needs of a vector store."""

    similarity, dtype, version = "cosine", "float32", 1

    def __init__(
        self,
        shards: Mapping[str, np.ndarray],
        dead: tuple[int, ...] = (),
        *,
        encoder: str = "e" * 64,
        fingerprint: str = "v" * 64,
    ) -> None:
        self.vectors = np.concatenate(list(shards.values()))
        starts = np.cumsum([0, *map(len, shards.values())]).tolist()
        self.shards = [Shard(name, at, len(v)) for (name, v), at in zip(shards.items(), starts, strict=False)]
        self.count, self.dimensions = self.vectors.shape
        self.alive = None
        if dead:
            self.alive = np.ones(self.count, dtype=np.bool_)
            self.alive[list(dead)] = False
        self.encoder, self.fingerprint = encoder, fingerprint
        self.id_rank = np.random.default_rng(13).permutation(self.count)

    def read_raw(self, size: int) -> Iterator[tuple[int, np.ndarray, None]]:
        for shard in self.shards:
            for at in range(shard.start, shard.start + shard.count, size):
                yield at, self.vectors[at : min(at + size, shard.start + shard.count)], None

    def read_blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        return ((start, block) for start, block, _ in self.read_raw(size))

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.vectors[rows]


def draw_vectors(count: int, seed: int, groups: int = 60, spread: float = 0.6) -> np.ndarray:
    """Draw unit vectors around some centres; the same ones for every seed."""
    centres = np.random.default_rng(0).standard_normal((groups, SIZE))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, groups, count)] + spread * rng.standard_normal((count, SIZE))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


VECTORS, QUERIES = draw_vectors(COUNT, 1), draw_vectors(50, 2)
EVEN, EVEN_QUERIES = draw_vectors(COUNT, 1, spread=9), draw_vectors(50, 2, spread=9)
THREE = {"a": VECTORS[:1000], "b": VECTORS[1000:2000], "c": VECTORS[2000:]}


def options(**changes: Any) -> IndexConfig:
    return IndexConfig(
        **({"index_kind": "ivf", "wanted_recall": 0.9, "recall_depth": 20, "index_threads": 1} | changes)
    )


def measure(index: FaissIndex, store: Any, queries: np.ndarray, k: int = 20) -> float:
    """Return the share of the exact results that an index finds."""
    exact = search_exact(queries, store.read_raw(500), store.id_rank, k, store.alive)[0]
    found = index.search(queries, k)[0]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(exact, found, strict=True)]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ivf index of shards a and b."""
    folder = tmp_path_factory.mktemp("built") / "index"
    build_index(MemoryStore({name: THREE[name] for name in "ab"}), options(), folder, QUERIES)
    return folder


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("quantiser", ["sq8", "pq"])
@pytest.mark.parametrize("clustered", [True, False])
def test_the_wanted_recall_is_reached_and_written_down(
    tmp_path: Path, kind: str, quantiser: str, clustered: bool
) -> None:
    vectors, queries = (VECTORS, QUERIES) if clustered else (EVEN, EVEN_QUERIES)
    store = MemoryStore({"a": vectors})
    config = options(index_kind=kind, quantiser=quantiser, wanted_recall=0.95)
    index = build_index(store, config, tmp_path / "index", queries)
    facts = read_manifest(tmp_path / "index", "index").facts
    assert facts["recall"] >= 0.95
    assert (facts["recall_depth"], facts["recall_by"]) == (20, "50 real queries")
    assert measure(index, store, queries) >= facts["recall"] - 0.02  # 21 are looked for in the one, 20 in the other
    assert measure(index, store, queries, k=5) >= 0.93  # as many candidates as for 20
    assert measure(index, store, draw_vectors(200, 3, spread=0.6 if clustered else 9)) >= 0.9


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_scores_are_inner_products_of_the_stored_vectors_best_first(tmp_path: Path, kind: str) -> None:
    store = MemoryStore(THREE)
    index = build_index(store, options(index_kind=kind, quantiser="pq", wanted_recall=0.5), tmp_path / "index", QUERIES)
    rows, scores = index.search(QUERIES, 30)
    assert scores == pytest.approx(np.einsum("qkd,qd->qk", store.vectors[rows], QUERIES), abs=1e-6)
    assert (np.diff(scores) <= 0).all()
    assert all(len(set(found)) == 30 for found in rows.tolist())


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_vectors_of_any_length_are_found_by_inner_product(tmp_path: Path, kind: str) -> None:
    lengths = np.random.default_rng(13).uniform(0.5, 2, (COUNT, 1)).astype(np.float32)
    store = MemoryStore({"a": VECTORS * lengths})
    store.similarity = "dot"
    index = build_index(store, options(index_kind=kind), tmp_path / "index", QUERIES)
    assert measure(index, store, QUERIES) >= 0.88


def test_without_queries_vectors_of_the_corpus_judge_without_themselves(tmp_path: Path) -> None:
    store = MemoryStore({"a": EVEN})
    index = build_index(store, options(), tmp_path / "index")
    facts = read_manifest(tmp_path / "index").facts
    assert facts["recall_by"] == "256 vectors of the corpus, each without itself"
    assert facts["recall"] >= 0.9
    assert measure(index, store, EVEN_QUERIES) >= 0.85


def test_of_many_queries_a_seeded_sample_judges(tmp_path: Path) -> None:
    build_index(MemoryStore(THREE), options(tuning_queries=30), tmp_path / "index", QUERIES)
    assert read_manifest(tmp_path / "index").facts["recall_by"] == "30 real queries"


def test_copies_are_ordered_by_id(tmp_path: Path) -> None:
    vectors = VECTORS.copy()
    vectors[[5, 700, 2900]] = QUERIES[0]
    store = MemoryStore({"a": vectors})
    rows, _ = build_index(store, options(), tmp_path / "index", QUERIES).search(QUERIES[:1], 3)
    assert rows[0].tolist() == sorted([5, 700, 2900], key=lambda row: store.id_rank[row])


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_the_same_build_gives_the_same_index(tmp_path: Path, kind: str) -> None:
    config = options(index_kind=kind, index_threads=None)
    for name in ("one", "two"):
        build_index(MemoryStore(THREE), config, tmp_path / name)
    assert read_manifest(tmp_path / "one").fingerprint == read_manifest(tmp_path / "two").fingerprint


@pytest.mark.parametrize("k", [1, 20, 1999, 2000, 2500])
def test_any_number_of_results(built: Path, k: int) -> None:
    store = MemoryStore({name: THREE[name] for name in "ab"})
    rows, scores = FaissIndex.open(built, store).search(QUERIES[:3], k)
    assert rows.shape == scores.shape == (3, k)
    assert ((rows >= 0).sum(axis=1) == min(k, 2000)).all()
    assert (scores[:, 2000:] == -math.inf).all()


def test_no_queries(built: Path) -> None:
    rows, scores = FaissIndex.open(built, MemoryStore({name: THREE[name] for name in "ab"})).search(QUERIES[:0], 4)
    assert rows.shape == scores.shape == (0, 4)


# --- a store that changes ---------------------------------------------------------------------------------------------


def test_new_vectors_are_found_and_deleted_ones_are_not(built: Path) -> None:
    best = search_exact(QUERIES, MemoryStore(THREE).read_raw(500), np.arange(COUNT), 3)[0]
    dead = tuple(np.unique(best[:, 0]).tolist())
    store = MemoryStore(THREE, dead, fingerprint="w" * 64)
    index = FaissIndex.open(built, store)
    rows, _ = index.search(QUERIES, 20)
    assert not np.isin(rows, dead).any()
    assert measure(index, store, QUERIES) >= 0.9
    new = [row for row in best[:, 1] if row >= 2000 and row not in dead]
    assert new
    assert np.isin(new, rows).all()


def test_shards_keep_their_place_in_the_index_when_rows_move(built: Path) -> None:
    # Shard a was compacted away; c came before b.
    store = MemoryStore({"c": THREE["c"], "b": THREE["b"]}, fingerprint="w" * 64)
    index = FaissIndex.open(built, store)
    rows, scores = index.search(QUERIES, 20)
    assert scores == pytest.approx(np.einsum("qkd,qd->qk", store.vectors[rows], QUERIES), abs=1e-6)
    assert measure(index, store, QUERIES) >= 0.9


def test_an_index_says_when_it_should_be_built_anew(built: Path, tmp_path: Path) -> None:
    same = {name: THREE[name] for name in "ab"}
    index = FaissIndex.open(built, MemoryStore(same))
    assert (index.changed, index.needs_rebuild) == (0, False)
    index = FaissIndex.open(built, MemoryStore(same | {"d": VECTORS[:200]}, dead=(1, 2, 3)))
    assert index.changed == pytest.approx(203 / 2197)
    assert not index.needs_rebuild
    assert FaissIndex.open(built, MemoryStore(THREE)).needs_rebuild
    never = build_index(MemoryStore(same), options(rebuild_share=1.0), tmp_path / "index", QUERIES)
    assert not FaissIndex.open(tmp_path / "index", MemoryStore(THREE)).needs_rebuild
    assert never.changed == 0


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("share", [0.9, 0.3, 0.05, 0.002, 0.0])
def test_a_filter_leaves_as_many_results_as_there_are(tmp_path: Path, kind: str, share: float) -> None:
    store = MemoryStore(THREE, dead=(7, 8, 9))
    index = build_index(store, options(index_kind=kind), tmp_path / "index", QUERIES)
    allowed = np.random.default_rng(13).random(COUNT) < share
    live = allowed & store.alive
    rows, scores = index.search(QUERIES, 20, allowed)
    found = rows >= 0
    assert (found.sum(axis=1) == min(20, live.sum())).all()
    assert live[rows[found]].all()
    assert (scores[~found] == -math.inf).all()
    exact = search_exact(QUERIES, store.read_raw(500), store.id_rank, 20, live)[0]
    shares = [len(set(a) & set(b)) for a, b in zip(exact, rows, strict=True)]  # -1 is in both or in neither
    assert np.mean(shares) >= 0.85 * np.mean([len(set(a)) for a in exact])


def test_an_index_that_finds_too_few_is_completed_exactly(tmp_path: Path) -> None:
    store = MemoryStore(THREE)
    index = build_index(store, options(), tmp_path / "index", QUERIES)
    index.effort = Effort(1, 1)  # one list holds fewer vectors than are asked for
    rows, scores = index.search(QUERIES, 1500)
    exact_rows, exact_scores = search_exact(QUERIES, store.read_raw(500), store.id_rank, 1500)
    assert rows.tolist() == exact_rows.tolist()
    assert scores == pytest.approx(exact_scores, abs=1e-6)


# --- what is built ----------------------------------------------------------------------------------------------------


def test_a_small_corpus_is_searched_exactly_without_a_file(tmp_path: Path) -> None:
    store = MemoryStore(THREE)
    index = build_index(store, IndexConfig(), tmp_path / "index", QUERIES)
    manifest = read_manifest(tmp_path / "index")
    assert (manifest.facts["kind"], manifest.facts["recall"], list(manifest.files)) == ("flat", 1.0, [])
    assert measure(index, store, QUERIES) == 1
    assert not index.needs_rebuild


@pytest.mark.parametrize(
    ("count", "changes", "name"),
    [
        (20_000, {}, "Flat"),
        (20_001, {}, "IVF512,SQ8"),
        (100_000, {}, "IVF1024,SQ8"),
        (1_000_000, {"memory_limit": 500}, "IVF4096,SQ8"),
        (1_000_000, {"memory_limit": 150}, "IVF4096,PQ96"),
        (1_000_000, {"memory_limit": 80}, "IVF4096,PQ48"),
        (1_000_000, {"index_kind": "hnsw"}, "HNSW32,SQ8"),
        (1_000_000, {"index_kind": "hnsw", "memory_limit": 400}, "HNSW32,PQ96"),
        (100, {"index_kind": "ivf"}, "IVF2,SQ8"),
    ],
)
def test_what_is_built_follows_from_size_and_memory(count: int, changes: dict[str, Any], name: str) -> None:
    config = IndexConfig(**({"memory_limit": 10_000} | changes))
    assert plan_index(count, 384, config).name == name


def test_a_plan_is_as_large_as_the_file(tmp_path: Path) -> None:
    for kind in ("ivf", "hnsw"):
        for quantiser in ("sq8", "pq"):
            config = options(index_kind=kind, quantiser=quantiser, wanted_recall=0.5)
            build_index(MemoryStore(THREE), config, tmp_path / "index", QUERIES)
            size = (tmp_path / "index" / INDEX_FILE).stat().st_size
            assert plan_index(COUNT, SIZE, config).size == pytest.approx(size, rel=0.35)


@pytest.mark.parametrize("quantiser", ["auto", "sq8", "pq"])
def test_too_little_memory_is_refused(quantiser: str) -> None:
    with pytest.raises(RefusedError, match=r"1000000 vectors needs at least \d+ MiB; allowed are 9\..*--memory-limit"):
        plan_index(1_000_000, 384, options(memory_limit=9, quantiser=quantiser))


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_very_few_vectors(tmp_path: Path, kind: str, count: int) -> None:
    store = MemoryStore({"a": VECTORS[:count]})
    index = build_index(store, options(index_kind=kind), tmp_path / "index", QUERIES)
    assert measure(index, store, QUERIES, k=count) >= 0.9
    with pytest.raises(RefusedError, match=f"needs at least 256 vectors; there are {count}"):
        build_index(store, options(index_kind=kind, quantiser="pq"), tmp_path / "index", QUERIES)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_a_store_whose_vectors_are_all_deleted(tmp_path: Path, kind: str) -> None:
    store = MemoryStore({"a": VECTORS[:3]}, dead=(0, 1, 2))
    rows, _ = build_index(store, options(index_kind=kind), tmp_path / "index", QUERIES).search(QUERIES, 2)
    assert (rows == -1).all()


def test_dimensions_that_cannot_be_split_are_kept_as_one() -> None:
    assert plan_index(COUNT, 31, options(quantiser="pq")).name == "IVF76,PQ1"


def test_a_recall_out_of_reach_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_stage, "_MOST_CANDIDATES", 1)
    with pytest.raises(RefusedError, match=r"IVF\d+,PQ8 finds 0\.\d+ of the 20 best; wanted are 0.99"):
        build_index(MemoryStore({"a": EVEN}), options(quantiser="pq", wanted_recall=0.99), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.7, 0.9, 0.99])
def test_more_recall_takes_more_effort(tmp_path: Path, share: float) -> None:
    store = MemoryStore({"a": EVEN})
    index = build_index(store, options(wanted_recall=share), tmp_path / "index", EVEN_QUERIES)
    reached = read_manifest(tmp_path / "index").facts["recall"]
    assert reached >= share
    index.effort = Effort(index.effort.probes * 3 // 4, index.effort.candidates)
    assert measure(index, store, EVEN_QUERIES) < reached


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("wanted_recall", 1.1, "0.1 to 1"), ("wanted_recall", 0.0, "0.1 to 1"), ("recall_depth", 0, "at least 1"),
        ("memory_limit", 0, "at least 1"), ("tuning_queries", 9, "at least 10"), ("rebuild_share", -0.1, "0 to 1"),
        ("index_threads", 0, "at least 1"), ("index_seed", -1, "at least 0"), ("index_kind", "tree", "one of auto"),
        ("quantiser", "sq4", "one of auto"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(option: str, value: Any, wanted: str) -> None:
    with pytest.raises(UsageError, match=f"Option {option} is .*; it must be {wanted}"):
        IndexConfig(**{option: value})


# --- files ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_build_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore({name: THREE[name] for name in "ab"})
    build_index(store, options(), tmp_path / "index", QUERIES)
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(index_stage, "tune_effort", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_index(MemoryStore(THREE), options(), tmp_path / "index", QUERIES)
    assert {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    FaissIndex.open(tmp_path / "index", store)


def copy_index(built: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in built.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: Any) -> None:
        raise AssertionError("faiss was given the file")

    monkeypatch.setattr(load_faiss(), "read_index", read)


@pytest.mark.parametrize("place", [0, 999, -1])
def test_a_flipped_bit_is_found_before_faiss_reads_the_file(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    path = copy_index(built, tmp_path / "index") / INDEX_FILE
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    forbid_reading(monkeypatch)
    with pytest.raises(ArtefactError, match=rf"{INDEX_FILE} is not the file that was written: its sha256 differs"):
        FaissIndex.open(tmp_path / "index", MemoryStore(THREE))


def test_a_foreign_file_is_never_read(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, faiss = copy_index(built, tmp_path / "index"), load_faiss()
    foreign = faiss.IndexFlatIP(SIZE)
    foreign.add(VECTORS[:2000])
    faiss.write_index(foreign, str(folder / INDEX_FILE))
    forbid_reading(monkeypatch)
    with pytest.raises(ArtefactError, match="the manifest says"):
        FaissIndex.open(folder, MemoryStore(THREE))


def test_a_folder_that_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="No index here"):
        FaissIndex.open(tmp_path, MemoryStore(THREE))


def test_an_index_that_is_replaced_while_it_is_read_is_read_anew(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = MemoryStore(THREE), faiss_index.read_manifest
    copy_index(built, tmp_path / "index")

    def read_then_replace(folder: Path, kind: str) -> Any:
        manifest = read(folder, kind)
        monkeypatch.setattr(faiss_index, "read_manifest", read)
        build_index(store, options(), tmp_path / "index", QUERIES)
        return manifest

    monkeypatch.setattr(faiss_index, "read_manifest", read_then_replace)
    assert FaissIndex.open(tmp_path / "index", store).changed == 0


def test_an_index_of_another_model_is_refused_with_both_names(built: Path) -> None:
    with pytest.raises(ArtefactError, match="by encoder eeeeeeeeeeee, not by ffffffffffff"):
        FaissIndex.open(built, MemoryStore(THREE, encoder="f" * 64))


def test_an_index_of_other_vectors_is_refused_with_both_names(built: Path) -> None:
    with pytest.raises(ArtefactError, match=r"vectors vvvvvvvvvvvv; the store is wwwwwwwwwwww and shares none"):
        FaissIndex.open(built, MemoryStore({"x": VECTORS}, fingerprint="w" * 64))


def test_the_manifest_names_what_the_index_was_made_from(built: Path) -> None:
    manifest = read_manifest(built, "index")
    assert manifest.inputs == {"vectors": "v" * 64, "encoder": "e" * 64}
    assert manifest.facts["shards"] == [["a", 1000], ["b", 1000]]
    assert manifest.options["wanted_recall"] == 0.9
    assert json.dumps(manifest.facts)


# --- the library ------------------------------------------------------------------------------------------------------


def test_without_faiss_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"faiss-cpu.*pip install 'pairdr\[faiss\]'"):
        build_index(MemoryStore(THREE), options(), tmp_path / "index")
    build_index(MemoryStore(THREE), options(index_kind="flat"), tmp_path / "index")


def test_threads_and_products_are_as_before_after_a_build(tmp_path: Path) -> None:
    faiss = load_faiss()
    with use_threads(2):
        before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
        build_index(MemoryStore(THREE), options(index_kind="hnsw"), tmp_path / "index", QUERIES)
        assert (faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold) == before
    assert before[0] == 2


@pytest.mark.parametrize("known", [["SkylakeX", None], ["SkylakeX", "Haswell"], ["SapphireRapids"], []])
def test_faiss_is_told_the_processor_that_numpy_recognised(
    monkeypatch: pytest.MonkeyPatch, known: list[str | None]
) -> None:
    monkeypatch.setattr(faiss_index, "threadpool_info", lambda: [{"architecture": name} for name in known])
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    with faiss_index._name_processor():
        assert os.environ.get("OPENBLAS_CORETYPE") == ("SkylakeX" if known == ["SkylakeX", None] else None)
    assert "OPENBLAS_CORETYPE" not in os.environ


# --- the command ------------------------------------------------------------------------------------------------------


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_the_command_builds_an_index_and_says_what_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = MemoryStore(THREE)
    monkeypatch.setattr(vectors, "VectorStore", lambda folder: store)
    output = tmp_path / "index"
    assert call("index", tmp_path, "-o", output, "--index-kind", "ivf", "--recall-depth", 20) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(said["recall"]) >= 0.95
    assert said["recall_by"] == "256 vectors of the corpus, each without itself"
    assert call("index", tmp_path, "-o", output, "--index-kind", "ivf", "--memory-limit", 1, "--quantiser", "auto") == 0
    assert call("verify", output) == 0


def test_the_command_takes_training_and_unlabelled_questions(
    toy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = MemoryStore(THREE)
    named: list[str] = []
    store.require_encoder = named.append  # type: ignore[attr-defined]
    monkeypatch.setattr(vectors, "VectorStore", lambda folder: store)
    options = ("--index-kind", "ivf", "--recall-depth", 20, "--data", toy, "--start", tiny_model)
    assert call("index", tmp_path, "-o", tmp_path / "index", *options) == 0
    assert "96 real queries" in capsys.readouterr().out  # 48 training questions and 48 of the pool
    assert len(named) == 1


def test_data_without_such_questions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write_beir: Any
) -> None:
    data = write_beir(tmp_path / "data", {"p": "text"}, {"q": "question"}, {"test": {"q": {"p": 1}}})
    monkeypatch.setattr(vectors, "VectorStore", lambda folder: MemoryStore(THREE))
    assert call("index", tmp_path, "-o", tmp_path / "index", "--data", data) == 1
    assert "There are no training and no unlabelled queries. Leave --data out" in capsys.readouterr().err


# --- over a real store ------------------------------------------------------------------------------------------------


def test_an_index_follows_the_versions_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRDR_CACHE", str(tmp_path / "cache"))
    encoder, texts = WordEncoder(), {f"p{number:03d}": f"w{number} t{number % 9}" for number in range(400)}
    config = EncodeConfig(shard_size=100, dtype="float16")
    store = encode_corpus(write_collection(tmp_path / "data", texts), encoder, config, tmp_path / "v")
    build_index(store, options(wanted_recall=0.8), tmp_path / "index")
    delete_passages(tmp_path / "v", ["p007"])
    store = upsert_passages(to_passages({"p008": "w7 t7", "n": "new words"}), encoder, config, tmp_path / "v")
    index = FaissIndex.open(tmp_path / "index", store)
    assert 0 < index.changed < 0.02
    for text, expected in (("new words", "n"), ("w7 t7", "p008")):
        rows, scores = index.search(encoder.encode_queries([text]), 5)
        assert store.ids_of(rows[0])[0] == expected
        assert scores[0, 0] == pytest.approx(1, abs=2e-3)
        assert "p007" not in store.ids_of(rows[0])
    again = FaissIndex.open(tmp_path / "index", compact_store(tmp_path / "v"))
    assert again.changed > index.changed  # a compacted shard is another one
    rows, _ = again.search(encoder.encode_queries(["new words"]), 1)
    assert again.store.ids_of(rows[0]) == ["n"]


def test_the_command_builds_an_index_of_encoded_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PAIRDR_CACHE", str(tmp_path / "cache"))
    data = write_collection(tmp_path / "data", {f"p{number}": f"w{number}" for number in range(300)})
    encode_corpus(data, WordEncoder(), EncodeConfig(), tmp_path / "v")
    with pytest.raises(SystemExit) as end:
        main(["index", str(tmp_path / "v"), "-o", str(tmp_path / "i"), "--index-kind", "ivf", "--wanted-recall", "0.7"])
    assert end.value.code == 0
    assert "recall" in capsys.readouterr().out
    assert FaissIndex.open(tmp_path / "i", VectorStore(tmp_path / "v")).kind == "ivf"
