"""Fusion of runs: by weighted scores, whose weights are chosen on dev, or by ranks alone.

Each system's scores of a query's candidates are standardised (mean 0, deviation 1), so that BM25's and a model's can
be added. A passage that a system did not retrieve counts as that system's lowest one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from pairdr.measures import reciprocal_ranks
from pairdr.records import Qrels, Run, Scored

STEP = 0.1
RANK_CONSTANT = 60
Array = npt.NDArray[np.float64]


def standardise(scores: npt.ArrayLike) -> Array:
    """Return scores with mean 0 and deviation 1 along the last axis; equal scores become 0."""
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        return values
    spread = values.std(axis=-1, keepdims=True)
    centred: Array = values - values.mean(axis=-1, keepdims=True)
    even: Array = np.zeros_like(centred)
    np.divide(centred, spread, out=even, where=spread > 1e-12)
    return even


def list_weights(systems: int) -> list[tuple[float, ...]]:
    """Return all weightings of so many systems in steps of 0.1 that sum to 1."""
    parts = round(1 / STEP)
    whole = itertools.product(range(parts + 1), repeat=systems)
    return [tuple(round(w * STEP, 10) for w in weights) for weights in whole if sum(weights) == parts]


def fuse_runs(runs: Sequence[Run], weights: Sequence[float], k: int) -> Run:
    """Return the k best passages per query by the weighted sum of standardised scores.

    Ties are broken by (-score, id). A query that only some runs answer is ranked by those.
    """
    queries = dict.fromkeys(query_id for run in runs for query_id in run)
    return Run.from_mapping({query_id: _fuse_query(runs, weights, query_id, k) for query_id in queries})


def fuse_ranks(runs: Sequence[Run], k: int) -> Run:
    """Return the k best passages per query by reciprocal rank fusion: the sum of 1 / (60 + rank) over the runs.

    Needs no weights and no labels. Ties are broken by (-score, id). Source: Cormack, Clarke and Buettcher, 2009.
    """
    fused: dict[str, list[Scored]] = {}
    for query_id in dict.fromkeys(query_id for run in runs for query_id in run):
        scores: dict[str, float] = {}
        for hits in (run[query_id] for run in runs if query_id in run):
            for rank, hit in enumerate(hits, start=1):
                scores[hit.passage_id] = scores.get(hit.passage_id, 0.0) + 1 / (RANK_CONSTANT + rank)
        fused[query_id] = sort_hits(scores.items(), k)
    return Run.from_mapping(fused)


def sort_hits(hits: Iterable[tuple[str, float]], k: int) -> list[Scored]:
    """Return the k best of (passage id, score), best first, ties by (-score, id); scores in the precision of runs."""
    kept = ((passage_id, float(np.float32(score))) for passage_id, score in hits)
    return [Scored(*hit) for hit in sorted(kept, key=lambda hit: (-hit[1], hit[0]))[:k]]


def tune_weights(scores: Sequence[Sequence[Array]], relevant: Sequence[npt.NDArray[np.bool_]]) -> tuple[float, ...]:
    """Return the weights with the best mean RR@10; of equal ones the most even.

    Args:
        scores: per query, one array of standardised scores per system, over the same candidates.
        relevant: per query, which candidates are relevant.
    """
    choices = list_weights(len(scores[0]))
    means = [float(np.mean(fused_reciprocal_ranks(scores, relevant, weights))) for weights in choices]
    return max(zip(means, choices, strict=True), key=lambda pair: (round(pair[0], 12), -float(np.var(pair[1]))))[1]


def fused_reciprocal_ranks(
    scores: Sequence[Sequence[Array]], relevant: Sequence[npt.NDArray[np.bool_]], weights: Sequence[float]
) -> Array:
    """Return RR@10 per query of the weighted sum; ties keep the candidates' order."""
    ranked = []
    for systems, truth in zip(scores, relevant, strict=True):
        fused = sum(w * s for w, s in zip(weights, systems, strict=True))
        ranked.append(truth[np.argsort(-np.asarray(fused), kind="stable")])
    return reciprocal_ranks(ranked)


def cross_fit(
    scores: Sequence[Sequence[Array]], relevant: Sequence[npt.NDArray[np.bool_]]
) -> tuple[Array, tuple[float, ...]]:
    """Return RR@10 per query with weights that the other half of the queries chose, and the weights that all choose.

    So a fusion is judged on queries that did not choose its weights, and still uses all of them.
    """
    if len(scores[0]) == 1:
        return fused_reciprocal_ranks(scores, relevant, (1.0,)), (1.0,)
    values = np.zeros(len(scores))
    halves = [range(0, len(scores), 2), range(1, len(scores), 2)]
    for chosen, judged in (halves, halves[::-1]):
        source = chosen if len(chosen) else judged
        weights = tune_weights([scores[at] for at in source], [relevant[at] for at in source])
        parts = [scores[at] for at in judged], [relevant[at] for at in judged]
        values[list(judged)] = fused_reciprocal_ranks(*parts, weights)
    return values, tune_weights(scores, relevant)


def tune_run_weights(runs: Sequence[Run], qrels: Qrels) -> tuple[tuple[float, ...], float]:
    """Return the weights for `fuse_runs` with the best RR@10 on labelled queries, and its cross-fitted RR@10."""
    scores, relevant = [], []
    for query_id, judged in qrels.items():
        ids, systems = _align([dict(run[query_id]) if query_id in run else {} for run in runs])
        scores.append(systems)
        relevant.append(np.array([judged.get(passage_id, 0) > 0 for passage_id in ids], dtype=bool))
    values, weights = cross_fit(scores, relevant)
    return weights, float(values.mean())


def _fuse_query(runs: Sequence[Run], weights: Sequence[float], query_id: str, k: int) -> list[Scored]:
    ids, systems = _align([dict(run[query_id]) if query_id in run else {} for run in runs])
    fused = np.asarray(sum(w * s for w, s in zip(weights, systems, strict=True)))
    return sort_hits(zip(ids, fused.tolist(), strict=True), k)


def _align(found: Sequence[dict[str, float]]) -> tuple[list[str], list[Array]]:
    """Return the union of the passages, ordered by id, and each system's standardised scores of it."""
    ids = sorted(set().union(*found))
    systems = []
    for scores in found:
        floor = min(scores.values(), default=0.0)
        systems.append(standardise([scores.get(passage_id, floor) for passage_id in ids]))
    return ids, systems
