"""Exact search against brute force: ties, filters, blocks and tiles of any size, stored forms, shards merged."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from threadpoolctl import threadpool_info

from pairdr.indexes import exact
from pairdr.indexes.exact import (
    merge_results,
    score_candidates,
    search_exact,
    select_top,
    to_float32,
)

# Whole numbers: their inner products are exact, so equal vectors have equal scores however they are added up.
WHOLE = st.integers(-3, 3).map(float)


KERNELS = {pool.get("architecture") for pool in threadpool_info()}
to_the_bit = pytest.mark.skipif(
    not KERNELS.isdisjoint({"Haswell", "Zen"}), reason="these kernels of OpenBLAS add up rows in two orders"
)


class Corpus(NamedTuple):
    """Queries, passages (few different ones, so that there are many ties), and the rank of the ids."""

    queries: np.ndarray
    vectors: np.ndarray
    id_rank: np.ndarray


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    count, size = draw(st.integers(1, 24)), draw(st.integers(1, 3))
    queries = draw(arrays(np.float32, (draw(st.integers(1, 4)), size), elements=WHOLE))
    distinct = draw(arrays(np.float32, (draw(st.integers(1, 4)), size), elements=WHOLE))
    chosen = draw(st.lists(st.integers(0, len(distinct) - 1), min_size=count, max_size=count))
    return Corpus(queries, distinct[chosen], np.array(draw(st.permutations(range(count))), dtype=np.int64))


def in_blocks(vectors: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    return [(start, vectors[start : start + size]) for start in range(0, len(vectors), size)]


@contextmanager
def tiles_of(rows: int) -> Iterator[None]:
    """Make tiles small, so that few vectors fill many."""
    with patch.multiple(exact, _TILE=1, _LEAST_ROWS=rows, _MOST_ROWS=rows, _DEVICE_ROWS=rows, _STEP=2, _SMALL=1):
        yield


def sort_by_hand(scores: np.ndarray, id_rank: np.ndarray, k: int, allowed: np.ndarray | None = None) -> list[int]:
    rows = [row for row in range(len(scores)) if allowed is None or allowed[row]]
    return sorted(rows, key=lambda row: (-scores[row], id_rank[row]))[:k]


def check_by_hand(
    corpus: Corpus, k: int, found: tuple[np.ndarray, np.ndarray], allowed: np.ndarray | None = None
) -> None:
    rows, scores = found
    assert rows.shape == scores.shape == (len(corpus.queries), k)
    assert (rows.dtype, scores.dtype) == (np.int64, np.float32)
    for query, found_rows, found_scores in zip(corpus.queries, rows, scores, strict=True):
        expected = sort_by_hand(corpus.vectors @ query, corpus.id_rank, k, allowed)
        lacking = k - len(expected)
        assert found_rows.tolist() == expected + [-1] * lacking
        assert found_scores.tolist() == [*(corpus.vectors[expected] @ query).tolist(), *[-math.inf] * lacking]


def draw_vectors(count: int, size: int, seed: int = 13) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@given(corpora(), st.integers(1, 30), st.integers(1, 25), st.integers(1, 9), st.integers(1, 3))
def test_exact_search_is_brute_force_with_ties_by_id(
    corpus: Corpus, k: int, block: int, tile: int, threads: int
) -> None:
    with tiles_of(tile):
        found = search_exact(corpus.queries, in_blocks(corpus.vectors, block), corpus.id_rank, k, threads=threads)
    check_by_hand(corpus, k, found)


@given(corpora(), st.integers(1, 30), st.integers(1, 25), st.integers(1, 9), st.data())
def test_rows_that_are_not_allowed_are_never_found(
    corpus: Corpus, k: int, block: int, tile: int, data: st.DataObject
) -> None:
    allowed = data.draw(arrays(np.bool_, len(corpus.vectors)))
    with tiles_of(tile):
        found = search_exact(corpus.queries, in_blocks(corpus.vectors, block), corpus.id_rank, k, allowed, threads=2)
    check_by_hand(corpus, k, found, allowed)


@given(corpora(), st.integers(1, 30), st.integers(1, 9), st.data())
def test_products_on_a_torch_device_give_the_same(corpus: Corpus, k: int, tile: int, data: st.DataObject) -> None:
    allowed = data.draw(arrays(np.bool_, len(corpus.vectors)))
    with tiles_of(tile):
        found = search_exact(corpus.queries, in_blocks(corpus.vectors, 10), corpus.id_rank, k, allowed, device="cpu")
    check_by_hand(corpus, k, found, allowed)


@given(corpora(), st.integers(1, 30), st.lists(st.integers(0, 24), max_size=4), st.integers(1, 9))
def test_shards_searched_apart_and_merged_equal_the_whole(
    corpus: Corpus, k: int, cuts: Sequence[int], tile: int
) -> None:
    borders = [0, *sorted(min(cut, len(corpus.vectors)) for cut in cuts), len(corpus.vectors)]
    with tiles_of(tile):
        results = [
            (start, *search_exact(corpus.queries, [(0, corpus.vectors[start:end])], corpus.id_rank[start:end], k))
            for start, end in pairwise(borders)
        ]
    check_by_hand(corpus, k, merge_results(results, corpus.id_rank, k))


@to_the_bit
@pytest.mark.parametrize("queries", [1, 2, 7, 40])
def test_real_vectors_searched_apart_and_merged_equal_the_whole_to_the_bit(queries: int) -> None:
    # Sums of fractions depend on their order, which must not depend on where a shard or a block ends.
    vectors, asked = draw_vectors(5000, 48), draw_vectors(queries, 48, seed=14)
    rank = np.random.default_rng(15).permutation(5000)
    borders = [0, 3, 700, 2749, 5000]
    parts = [
        (start, *search_exact(asked, in_blocks(vectors[start:end], 99), rank[start:end], 20))
        for start, end in pairwise(borders)
    ]
    rows, scores = search_exact(asked, [(0, vectors)], rank, 20)
    merged_rows, merged_scores = merge_results(parts, rank, 20)
    assert rows.tolist() == merged_rows.tolist()
    assert scores.tolist() == merged_scores.tolist()


@to_the_bit
@pytest.mark.parametrize("queries", [1, 2, 40])
def test_copies_of_a_passage_are_ordered_by_id_wherever_they_stand(queries: int) -> None:
    vectors, asked = draw_vectors(4100, 33), draw_vectors(queries, 33, seed=14)
    copies = np.array([0, 1, 63, 64, 2047, 2048, 4095, 4098, 4099])
    vectors[copies] = asked[0]
    rank = np.random.default_rng(15).permutation(4100)
    rows, scores = search_exact(asked, in_blocks(vectors, 3000), rank, len(copies))
    assert rows[0].tolist() == sorted(copies, key=lambda row: rank[row])
    assert len(set(scores[0].tolist())) == 1


@given(corpora(), st.integers(1, 30), st.sampled_from([np.float16, np.int8]), st.integers(1, 9))
def test_stored_forms_are_searched_as_the_numbers_they_stand_for(corpus: Corpus, k: int, kind: type, tile: int) -> None:
    stored = corpus.vectors.astype(kind)
    scales = np.float32(2.0) ** (np.arange(len(stored)) % 3) if kind is np.int8 else None
    meant = to_float32(stored, scales)
    blocks = [(at, stored[at : at + 5], None if scales is None else scales[at : at + 5]) for at in range(0, 25, 5)]
    with tiles_of(tile):
        found = search_exact(corpus.queries, blocks, corpus.id_rank, k)
    check_by_hand(corpus._replace(vectors=meant), k, found)


@pytest.mark.parametrize("order", [1, -1])
def test_a_corpus_in_the_order_of_its_scores_is_searched_right(order: int) -> None:
    # Rising scores reach every border; falling ones none after the first tile.
    vectors = np.arange(3000, dtype=np.float32)[::order, None]
    rows, scores = search_exact(np.ones((2, 1), np.float32), in_blocks(vectors, 700), np.arange(3000), 5)
    assert scores.tolist() == [[2999, 2998, 2997, 2996, 2995]] * 2
    assert rows[0].tolist() == ([2999, 2998, 2997, 2996, 2995] if order == 1 else [0, 1, 2, 3, 4])


def test_equal_scores_everywhere_leave_the_order_of_the_ids() -> None:
    rank = np.random.default_rng(13).permutation(9000)
    rows, _ = search_exact(np.ones((3, 2), np.float32), in_blocks(np.ones((9000, 2), np.float32), 4000), rank, 7)
    assert rows.tolist() == [np.argsort(rank)[:7].tolist()] * 3


def test_zero_and_minus_zero_are_the_same_score() -> None:
    vectors = np.array([[0.0], [-0.0], [0.0], [-0.0]], dtype=np.float32)
    rows, scores = search_exact(np.ones((1, 1), np.float32), [(0, vectors)], np.array([3, 2, 1, 0]), 3)
    assert rows.tolist() == [[3, 2, 1]]
    assert scores.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_without_queries_or_passages_nothing_is_found(device: str | None) -> None:
    vectors, nothing = np.ones((3, 2), np.float32), np.ones((0, 2), np.float32)
    rows, scores = search_exact(nothing, [(0, vectors)], np.arange(3), 2, device=device)
    assert rows.shape == scores.shape == (0, 2)
    for blocks in ([], [(0, nothing)]):
        rows, scores = search_exact(vectors, blocks, np.arange(0), 2, device=device)
        assert (rows.tolist(), scores.tolist()) == ([[-1, -1]] * 3, [[-math.inf] * 2] * 3)
    assert merge_results([(0, rows, scores), (0, rows, scores)], np.arange(0), 3)[0].tolist() == [[-1, -1, -1]] * 3


def test_many_random_vectors_in_tiles_of_the_real_size() -> None:
    queries, vectors = draw_vectors(300, 16), draw_vectors(10_000, 16, seed=14)
    rows, scores = search_exact(queries, in_blocks(vectors, 3500), np.arange(10_000), 50, threads=2)
    products = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    assert rows.tolist() == np.argsort(-products, axis=1)[:, :50].tolist()
    assert scores == pytest.approx(-np.sort(-products, axis=1)[:, :50], abs=1e-6)


def test_memory_mapped_vectors_are_searched_as_they_are(tmp_path: object) -> None:
    vectors = draw_vectors(100, 8)
    np.save(f"{tmp_path}/v.npy", vectors)
    mapped = np.load(f"{tmp_path}/v.npy", mmap_mode="r")
    found = [search_exact(vectors[:3], [(0, v)], np.arange(100), 5)[0].tolist() for v in (vectors, mapped)]
    assert found[0] == found[1]


@given(corpora(), st.integers(1, 30))
def test_candidates_scored_by_their_vectors_are_ordered_as_a_search(corpus: Corpus, k: int) -> None:
    count = len(corpus.vectors)
    rows = np.array([np.random.default_rng(at).permutation(count) for at in range(len(corpus.queries))])
    rows = np.concatenate([np.full((len(rows), 1), -1), rows], axis=1)
    check_by_hand(
        corpus, k, score_candidates(corpus.queries, rows, lambda found: corpus.vectors[found], corpus.id_rank, k)
    )


def test_candidates_are_gathered_in_parts() -> None:
    queries, vectors = draw_vectors(9, 4), draw_vectors(50, 4, seed=14)
    rows = np.tile(np.arange(50), (9, 1))
    whole = score_candidates(queries, rows, vectors.__getitem__, np.arange(50), 6)
    with patch.object(exact, "_GATHERED", 401):
        parts = score_candidates(queries, rows, vectors.__getitem__, np.arange(50), 6)
    assert [array.tolist() for array in parts] == [array.tolist() for array in whole]


@given(
    st.lists(st.lists(WHOLE, min_size=9, max_size=9), min_size=1, max_size=3), st.permutations(range(9)),
    st.integers(1, 12),
)  # fmt: skip
def test_select_top_is_the_best_k_with_ties_at_the_border_by_id(
    values: list[list[float]], ranks: Sequence[int], k: int
) -> None:
    scores, id_rank = np.array(values, dtype=np.float32), np.array(ranks, dtype=np.int64)
    places = select_top(scores, id_rank, k)
    assert places.shape == (len(scores), min(k, 9))
    for row, found in zip(scores, places, strict=True):
        assert sorted(found.tolist()) == sorted(sort_by_hand(row, id_rank, k))


# --- threads ----------------------------------------------------------------------------------------------------------


def blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


def test_searches_at_once_leave_the_threads_of_numpy_as_they_were() -> None:
    before, during = blas_threads(), []
    queries, vectors = draw_vectors(4, 8), draw_vectors(500, 8, seed=14)
    gate = threading.Barrier(3, timeout=60)

    def read() -> Iterator[tuple[int, np.ndarray]]:
        gate.wait()
        during.extend(blas_threads())
        yield 0, vectors

    with ThreadPoolExecutor(3) as pool:
        searches = [pool.submit(search_exact, queries, read(), np.arange(500), 5, threads=2) for _ in range(3)]
        results = [search.result()[0].tolist() for search in searches]
    assert results == [search_exact(queries, [(0, vectors)], np.arange(500), 5)[0].tolist()] * 3
    assert set(during) == {1}
    assert blas_threads() == before


def test_a_search_holds_the_threads_of_numpy_whichever_thread_searched_first() -> None:
    script = """
import threading
import numpy as np
from threadpoolctl import threadpool_info
from pairdr.indexes.exact import search_exact
vectors, during = np.eye(8, dtype=np.float32), []
def read():
    during.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
    yield 0, vectors
search = lambda: search_exact(vectors[:2], read(), np.arange(8), 3)
search()
thread = threading.Thread(target=search)
thread.start()
thread.join()
after = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
assert set(during) == {1}, during
assert set(after) == {2}, after
"""
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    found = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **threads}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_reader_raises_ends_the_search_and_frees_the_threads(threads: int) -> None:
    before, given = blas_threads(), []

    def read() -> Iterator[tuple[int, np.ndarray]]:
        for block in in_blocks(draw_vectors(1000, 4), 10):
            given.append(block[0])
            if len(given) == 5:
                raise OSError("the disk is gone")
            yield block

    with pytest.raises(OSError, match="the disk is gone"):
        search_exact(draw_vectors(2, 4), read(), np.arange(1000), 5, threads=threads)
    assert blas_threads() == before
    assert len(given) == 5


def test_a_search_that_fails_in_one_thread_ends_in_all() -> None:
    given = []

    def read() -> Iterator[tuple[int, np.ndarray]]:
        for at in range(0, 10**6, 10):
            given.append(at)
            yield at, np.ones((10, 4 if at != 500 else 3), np.float32)

    with pytest.raises(ValueError, match="matmul"):
        search_exact(draw_vectors(2, 4), read(), np.arange(10**6), 5, threads=2)
    assert len(given) < 10**4
