"""Exact inner-product search: matrix products tile by tile, and a running top k. No approximation, no torch.

Most scores are never looked at twice: once k rows are known for a query, the k-th best score is its *border*, and of
each further tile only the few scores that reach it are picked out. Ties are broken by (-score, id): `id_rank[row]` is
the place of a row's id in the order of all ids. A candidate is kept as one whole number, its *key*, which sorts by
score and then by id rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from pairdr.vectors import to_float32

Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Allowed = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.uint64]
Stored = npt.NDArray[Any]
Block = tuple[int, Stored] | tuple[int, Stored, Scores | None]
Hits = tuple[Rows, Rows, Scores]
_T = TypeVar("_T")

_TILE = 2**20  # scores: 4 MiB, which stay in the cache until they are looked at
_MOST_ROWS, _LEAST_ROWS = 8192, 2048
_DEVICE_ROWS = 65536
_STEP = 64  # rows
_SMALL = 10**6  # multiplications
_GATHERED = 2**21  # numbers: 8 MiB of candidates' vectors at once


def search_exact(
    queries: Scores,
    blocks: Iterable[Block],
    id_rank: Rows,
    k: int,
    allowed: Allowed | None = None,
    *,
    threads: int | None = None,
    device: str | None = None,
) -> tuple[Rows, Scores]:
    """Return the k best rows for each query, best first.

    Memory is bounded by queries x (tile + k), and four bytes a row. The score of a query and a row does not
    depend on where blocks begin and end, so shards that are searched apart and merged equal the whole; only OpenBLAS's
    kernels for Haswell and Zen add up rows in two orders, by their place, and a last bit can differ.

    Args:
        queries: [Q, D].
        blocks: (first row, [n, D] finite vectors as they are stored), with the [n] scales of int8 ones as a third.
        id_rank: [N] rank of each row's id; below 2**32.
        k: how many; fewer than k rows leave places of row -1 and score -inf.
        allowed: [N] rows that may be found; None is all.
        threads: searching at once; None is as many as numpy's matrix products use.
        device: a torch device such as "cuda" that multiplies; None is numpy.

    Returns:
        rows [Q, k] and scores [Q, k].
    """
    wanted = min(k, len(id_rank))
    if not len(queries) or not wanted:
        return _find_nothing(len(queries), k)
    size = _DEVICE_ROWS if device else min(_MOST_ROWS, max(_LEAST_ROWS, _TILE // len(queries), 2 * wanted))
    best = _Best(len(queries), wanted, wanted + size, int(id_rank.max()) + 1)
    tiles = _Shared(_cut_tiles(blocks, size))

    def search_tiles() -> None:
        find = _find_on(device, queries, wanted) if device else _find_with_numpy(queries, size, wanted)
        for first, stored, scales in tiles:
            kept = None
            if allowed is not None and not allowed[first : first + len(stored)].all():
                kept = np.flatnonzero(allowed[first : first + len(stored)])
                stored, scales = stored[kept], None if scales is None else scales[kept]
            query, place, reached = find(to_float32(stored, scales), best.border)
            rows = first + (place if kept is None else kept[place])
            best.add(query, rows, reached, id_rank[rows])

    with _find_blas().hold() as most:
        _run_threads(search_tiles, tiles.end, 1 if device else threads or most)
    return best.list_sorted(k)


def merge_results(results: Iterable[tuple[int, Rows, Scores]], id_rank: Rows, k: int) -> tuple[Rows, Scores]:
    """Return the k best rows of shards that were searched apart, best first.

    Args:
        results: (first row of the shard, rows [Q, k'] counted from there, scores [Q, k']) of each shard, the results of
            `search_exact`.
        id_rank: [N] rank of each row's id in the whole.
        k: how many.

    Returns:
        rows [Q, k] and scores [Q, k], those of one search over all the shards.
    """
    parts = list(results)
    rows = np.concatenate([np.where(found < 0, -1, found + first) for first, found, _ in parts], axis=1)
    ranks = id_rank[rows] if len(id_rank) else rows
    keys = np.where(rows < 0, 0, _make_keys(np.concatenate([part[2] for part in parts], axis=1), ranks))
    return _sort_keys(keys, rows, k)


def score_candidates(
    queries: Scores, rows: Rows, take: Callable[[Rows], Scores], id_rank: Rows, k: int
) -> tuple[Rows, Scores]:
    """Return the k best of given rows for each query by inner product, best first.

    Args:
        queries: [Q, D].
        rows: [Q, c] the candidates of each query, each once; -1 is none.
        take: returns the [n, D] vectors of rows.
        id_rank: [N] rank of each row's id.
        k: how many.

    Returns:
        rows [Q, k] and scores [Q, k].
    """
    scores = np.empty(rows.shape, dtype=np.float32)
    step = max(1, _GATHERED // max(1, queries.shape[1] * rows.shape[1]))
    if not rows.size:
        return _find_nothing(len(queries), k)
    for at in range(0, len(queries), step):
        here = rows[at : at + step]
        vectors = take(np.maximum(here, 0).reshape(-1)).reshape(*here.shape, -1)  # [q, c, D]
        # Not a matrix product: there, a score can depend on the place of its row.
        scores[at : at + step] = np.einsum("qcd,qd->qc", vectors, queries[at : at + step])
    return merge_results([(0, rows, scores)], id_rank, k)


def select_top(scores: Scores, id_rank: Rows, k: int) -> Rows:
    """Return the places [Q, min(k, n)] of the best scores of [Q, n], ties at the border by id rank; unordered."""
    count = scores.shape[1]
    if k >= count:
        return np.broadcast_to(np.arange(count), scores.shape)
    return np.argpartition(_make_keys(scores, id_rank), count - k, axis=1)[:, count - k :]


class _Best:
    """The best candidates so far: k of each query, and room for what is found before they are cut to k again.

    Attributes:
        border: [Q] score that a row has to reach to be a candidate.
    """

    def __init__(self, queries: int, k: int, width: int, ranks: int) -> None:
        self.k, self.border = k, np.full(queries, -np.inf, dtype=np.float32)
        self._keys = np.zeros((queries, width), dtype=np.uint64)  # 0 is a free place
        self._starts, self._filled = np.arange(queries) * width, np.zeros(queries, dtype=np.int64)
        self._due = k * queries  # candidates at which they are cut
        self._row_of = np.empty(ranks, dtype=np.uint32)  # of a rank; known for candidates alone
        self._lock = threading.Lock()

    def add(self, query: Rows, rows: Rows, scores: Scores, ranks: Rows) -> None:
        """Add candidates: numbers of queries [n], rows [n], scores [n] and ranks of their ids [n]."""
        keys = _make_keys(scores, ranks)
        counts = np.bincount(query, minlength=len(self._filled))
        order = np.argsort(query.astype(np.uint16) if len(counts) < 2**16 else query, kind="stable")  # by radix
        before = np.cumsum(counts) - counts
        with self._lock:
            if (self._filled + counts).max() > self._keys.shape[1]:
                self._cut()
            places = np.arange(len(query)) + np.repeat(self._starts + self._filled - before, counts)
            self._keys.reshape(-1)[places] = keys[order]
            self._row_of[ranks] = rows
            self._filled += counts
            if self._filled.sum() >= self._due:
                self._cut()

    def list_sorted(self, k: int) -> tuple[Rows, Scores]:
        """Return rows [Q, k] and scores [Q, k], best first."""
        self._cut()
        keys = self._keys[:, : self.k]
        rows = self._row_of[np.where(keys == 0, 0, _read_ranks(keys))]
        return _sort_keys(keys, rows.astype(np.int64), k)

    def _cut(self) -> None:
        used = int(self._filled.max())
        if used < self.k:
            return
        keys = self._keys[:, :used]
        keys.partition(used - self.k, axis=1)
        keys[:, : self.k], keys[:, self.k :] = keys[:, used - self.k :].copy(), 0
        self._filled[:], self._due = self.k, 3 * self.k * len(keys) // 2
        self.border = np.where(keys[:, 0] == 0, -np.inf, _read_scores(keys[:, 0])).astype(np.float32)


def _make_keys(scores: Scores, id_rank: Rows) -> Keys:
    """Return whole numbers that are larger the better: by score, then by id rank; none is 0."""
    bits = (scores + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 the equal of 0.0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered.astype(np.uint64) << np.uint64(32)) | (np.uint64(2**32 - 1) - id_rank.astype(np.uint64))


def _read_scores(keys: Keys) -> Scores:
    ordered = (keys >> np.uint64(32)).astype(np.uint32)
    return np.where(ordered >> 31, ordered & np.uint32(2**31 - 1), ~ordered).view(np.float32)


def _read_ranks(keys: Keys) -> Rows:
    return (np.uint64(2**32 - 1) - (keys & np.uint64(2**32 - 1))).astype(np.int64)


def _sort_keys(keys: Keys, rows: Rows, k: int) -> tuple[Rows, Scores]:
    order = np.argsort(keys, axis=1)[:, ::-1][:, :k]
    keys = np.take_along_axis(keys, order, axis=1)
    sorted_rows, scores = _find_nothing(len(keys), k)
    sorted_rows[:, : keys.shape[1]] = np.where(keys == 0, -1, np.take_along_axis(rows, order, axis=1))
    scores[:, : keys.shape[1]] = np.where(keys == 0, -np.inf, _read_scores(keys))
    return sorted_rows, scores


def _find_nothing(queries: int, k: int) -> tuple[Rows, Scores]:
    return np.full((queries, k), -1, dtype=np.int64), np.full((queries, k), -np.inf, dtype=np.float32)


def _cut_tiles(blocks: Iterable[Block], size: int) -> Iterator[tuple[int, Stored, Scores | None]]:
    for first, stored, *rest in blocks:
        scales = rest[0] if rest else None
        for at in range(0, len(stored), size):
            part = slice(at, at + size)
            yield first + at, np.asarray(stored[part]), None if scales is None else scales[part]


def _find_with_numpy(queries: Scores, size: int, k: int) -> Callable[[Scores, Scores], Hits]:
    """Return `find(vectors [n, D], border [Q])`: the queries, rows of the tile and scores that reach the border."""
    across = np.ascontiguousarray(queries.T, dtype=np.float32)  # [D, Q]
    width, count = across.shape
    # OpenBLAS adds up small products, and those of the last rows, in another order: such rows are padded.
    least = -(-_SMALL // (_STEP * width * count)) * _STEP if count > 1 else _STEP
    found = np.empty((size + least, count), dtype=np.float32)
    reached = np.empty((size, count), dtype=np.bool_)
    padded = np.zeros((least, width), dtype=np.float32)

    def find(vectors: Scores, border: Scores) -> Hits:
        rows = len(vectors)
        even = rows // _STEP * _STEP if rows >= least else 0
        np.matmul(vectors[:even], across, out=found[:even])
        if even < rows:
            padded[: rows - even] = vectors[even:]
            np.matmul(padded, across, out=found[even : even + least])
        scores, hits = found[:rows], reached[:rows]
        if even >= k and np.isneginf(border).any():  # the first tile: its own k-th best will do
            border = np.maximum(border, _find_border(scores[:even], k))
        places = np.flatnonzero(np.greater_equal(scores, border, out=hits))
        place, query = np.divmod(places, count)
        return query, place, scores.reshape(-1)[places]

    return find


def _find_border(scores: Scores, k: int) -> Scores:
    """Return the k-th best [Q] of [n, Q] scores, n a multiple of _STEP."""
    rows, count = scores.shape
    apart = (
        scores.reshape(-1, _STEP, count).swapaxes(1, 2).copy()
    )  # turned in two steps, each of which goes along memory
    turned = apart.swapaxes(0, 1).reshape(count, rows)
    turned.partition(rows - k, axis=1)
    return turned[:, rows - k]


def _find_on(device: str, queries: Scores, k: int) -> Callable[[Scores, Scores], Hits]:
    """Return the same as `_find_with_numpy`, with the products on a torch device."""
    import torch

    across = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(device)  # [Q, D]

    def find(vectors: Scores, border: Scores) -> Hits:
        scores = across @ torch.from_numpy(np.array(vectors)).to(device).T  # [Q, n]
        least = torch.from_numpy(border).to(device)[:, None]
        if scores.shape[1] > k:
            least = torch.maximum(least, scores.topk(k, dim=1).values[:, -1:])
        query, place = torch.nonzero(scores >= least, as_tuple=True)
        return query.cpu().numpy(), place.cpu().numpy(), scores[query, place].cpu().numpy()

    return find


class _Shared(Iterator[_T]):
    """What several threads take from in turn, each item once, until one of them ends it."""

    def __init__(self, items: Iterator[_T]) -> None:
        self._items, self._lock, self._ended = items, threading.Lock(), False

    def __next__(self) -> _T:
        """Return the next item."""
        with self._lock:
            if self._ended:
                raise StopIteration
            return next(self._items)

    def end(self) -> None:
        """Give out no more."""
        self._ended = True


def _run_threads(work: Callable[[], None], stop: Callable[[], None], threads: int) -> None:
    """Run the same work in some threads, this one among them; stop all when one fails, and raise what it raised."""

    def work_or_stop() -> None:
        try:
            work()
        except BaseException:
            stop()
            raise

    if threads == 1:
        work()
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work_or_stop) for _ in range(threads - 1)]
        work_or_stop()
        for other in others:
            other.result()


class _Blas:
    """The threads of numpy's matrix products: held at one while searches run, which have threads of their own."""

    def __init__(self) -> None:
        self._pools = ThreadpoolController().select(user_api="blas")
        self._lock, self._searches, self._threads = threading.Lock(), 0, 1
        self._limit: Any = None

    @contextmanager
    def hold(self) -> Iterator[int]:
        """Hold the threads while the block runs; yield how many there were."""
        with self._lock:
            self._searches += 1
            if self._searches == 1:
                self._threads = max((pool["num_threads"] for pool in self._pools.info()), default=1)
                self._take_control()
                self._limit = self._pools.limit(limits=1)
            threads = self._threads
        try:
            yield threads
        finally:
            with self._lock:
                self._searches -= 1
                if self._searches == 0:
                    self._take_control()
                    self._limit.restore_original_limits()

    def _take_control(self) -> None:
        """Let this thread set limits: else threadpoolctl leaves those of every thread but the first unheeded."""
        for pool in self._pools.lib_controllers:
            if hasattr(pool, "clear_controlling_thread"):
                pool.clear_controlling_thread(force=True)


@cache
def _find_blas() -> _Blas:
    return _Blas()
