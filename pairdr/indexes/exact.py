"""Exact inner-product search: blocked matrix products and a running top k. No approximation, no torch.

Ties are broken by (-score, id): `id_rank[row]` is the place of a row's id in the order of all ids.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


def search_exact(
    queries: npt.NDArray[np.float32], blocks: Iterable[tuple[int, npt.NDArray[np.float32]]], id_rank: Rows, k: int
) -> tuple[Rows, Scores]:
    """Return the k best rows for each query, best first.

    Memory is bounded by queries x (block + k), whatever the size of the corpus.

    Args:
        queries: [Q, D].
        blocks: (first row, [n, D] vectors) of the corpus.
        id_rank: [N] rank of each row's id.
        k: how many; fewer than k rows leave places of row -1 and score -inf.

    Returns:
        rows [Q, k] and scores [Q, k].
    """
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for start, vectors in blocks:
        found = queries @ vectors.T  # [Q, n]
        places = select_top(found, id_rank[start : start + len(vectors)], k)
        rows = np.concatenate([rows, places + start], axis=1)  # [Q, k + min(k, n)]
        scores = np.concatenate([scores, np.take_along_axis(found, places, axis=1)], axis=1)
        rows, scores = _order(rows, scores, id_rank, k)
    return rows, scores


def select_top(scores: Scores, id_rank: Rows, k: int) -> Rows:
    """Return the places [Q, min(k, n)] of the best scores of [Q, n], ties at the border by id rank; unordered."""
    count = scores.shape[1]
    if k >= count:
        return np.broadcast_to(np.arange(count), scores.shape)
    places = np.argpartition(scores, count - k, axis=1)[:, count - k :]  # [Q, k]
    border = np.take_along_axis(scores, places, axis=1).min(axis=1, keepdims=True)
    crowded = np.flatnonzero((scores >= border).sum(axis=1) > k)
    for query in crowded:
        # More rows than places share the border's score: the partition chose among them at random.
        within = np.flatnonzero(scores[query] >= border[query])
        places[query] = within[np.lexsort((id_rank[within], -scores[query, within]))[:k]]
    return places


def _order(rows: Rows, scores: Scores, id_rank: Rows, k: int) -> tuple[Rows, Scores]:
    rank = np.where(rows < 0, np.iinfo(np.int64).max, id_rank[rows])
    order = np.lexsort((rank, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
