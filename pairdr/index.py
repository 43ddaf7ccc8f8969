"""Build an index over a vector store: choose it by size, memory and wanted recall, tune it, measure it, publish it."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pairdr.artefact import publish
from pairdr.errors import RefusedError
from pairdr.indexes.candidates import BLOCK, CandidateIndex, Effort
from pairdr.indexes.exact import Rows, Scores, search_exact
from pairdr.indexes.faiss import INDEX_FILE, FaissIndex, load_faiss, use_blas, use_threads
from pairdr.progress import show_progress
from pairdr.store_config import IndexConfig
from pairdr.vectors import VectorStore

FEW = 20_000
"""Vectors up to which auto is flat: exact search of so few is quick, and an index has little to save."""
_LINKS = 32  # per node of a graph
_WIDTH = 80  # of the queue in which a graph's neighbours are looked for while it is built
_PER_LIST = 64  # training vectors
_CENTRES = 256  # of each part of a product quantiser: a byte
_MOST_TRAINING = 2**30  # bytes of training vectors
_MOST_CANDIDATES = 64  # per wanted result
_LONGEST_QUEUE = 4096  # of a graph
_SATURATED = 0.002  # gain in recall below which twice the probes are no way forward
_HITS = 1e-6  # a score this near to the exact k-th best counts as found


@dataclass(frozen=True)
class Plan:
    """What to build.

    Attributes:
        kind: flat, ivf or hnsw.
        quantiser: sq8 (one byte per dimension), pq, or none.
        code: bytes per vector.
        lists: of an ivf index.
        size: bytes of the whole, about.
        links: of a node of a graph.
        longest: most that the queue of a graph may be.
    """

    kind: str
    quantiser: str = ""
    code: int = 0
    lists: int = 0
    size: int = 0
    links: int = _LINKS
    longest: int = _LONGEST_QUEUE

    @property
    def name(self) -> str:
        """Return the name in faiss's own spelling."""
        if self.kind == "flat":
            return "Flat"
        codes = {"": "", "sq8": ",SQ8", "pq": f",PQ{self.code}"}
        return f"{'IVF' if self.lists else 'HNSW'}{self.lists or self.links}{codes[self.quantiser]}"


@dataclass(frozen=True)
class Judge:
    """Queries with their exact results.

    Attributes:
        queries: [Q, D].
        own: [Q] rows of the queries themselves, where they are vectors of the corpus; else -1.
        border: [Q] score of the k-th best row other than its own.
        k: how many rows are looked for.
        said: what the queries are, for people.
    """

    queries: Scores
    own: Rows
    border: Scores
    k: int
    said: str

    def measure(self, index: CandidateIndex) -> float:
        """Return recall@k: the mean share of the exact results that the index finds."""
        scores = _drop_own(*index.search_known(self.queries, self.k + 1), self.own)[:, : self.k]
        least = self.border - _HITS * np.maximum(1, np.abs(self.border))
        return float((scores >= least[:, None]).mean())


def build_index(
    store: VectorStore, config: IndexConfig, output: str | Path, queries: Scores | None = None
) -> FaissIndex:
    """Build, tune, measure and publish an index.

    The same store, options and queries give the same index on the same kind of processor.

    Args:
        store: the vectors.
        config: what is wanted.
        output: the folder of the index; an earlier one there is replaced once this one is whole.
        queries: [Q, D] vectors of real queries to tune and judge it by; without them, vectors of the corpus serve.

    Raises:
        RefusedError: no index fits the memory, or the wanted recall cannot be reached.
        MissingExtraError: faiss is not installed.
    """
    live = store.count if store.alive is None else int(store.alive.sum())
    plan = plan_index(store.count, store.dimensions, config) if live else Plan("flat")
    if plan.quantiser == "pq" and live < _CENTRES:
        raise RefusedError(
            f"A product quantiser needs at least {_CENTRES} vectors; there are {live}.", remedy="Use --quantiser sq8."
        )
    inputs = {"vectors": store.fingerprint, "encoder": store.encoder}
    shards = [(shard.name, shard.count) for shard in store.shards]
    with publish(output, "index", options=config.as_dict(), inputs=inputs) as staging:
        effort = Effort(1, 1)
        facts: dict[str, Any] = {"recall": 1.0, "recall_depth": config.recall_depth, "recall_by": "exact search"}
        if plan.kind != "flat":
            index = _fill(plan, store, config)
            judge = make_judge(store, config, queries)
            opened = FaissIndex(index, plan.kind, shards, Effort(1, 1), judge.k, store, threads=config.index_threads)
            effort, recall = tune_effort(opened, judge, plan, config)
            facts = {"recall": round(recall, 4), "recall_depth": judge.k, "recall_by": judge.said}
            load_faiss().write_index(index, str(staging.path / INDEX_FILE))
        staging.facts |= {
            "kind": plan.kind,
            "name": plan.name,
            "vectors": store.count,
            "dimensions": store.dimensions,
            "shards": shards,
            "effort": asdict(effort),
            **facts,
        }
    return FaissIndex.open(output, store, threads=config.index_threads)


def plan_index(count: int, dimensions: int, config: IndexConfig) -> Plan:
    """Choose kind, quantiser and sizes.

    Args:
        count: N.
        dimensions: D.
        config: what is wanted.

    Raises:
        RefusedError: the smallest that was asked for needs more memory than allowed.
    """
    kind = config.index_kind if config.index_kind != "auto" else "ivf" if count > FEW else "flat"
    if kind == "flat":
        return Plan("flat")
    lists, shared, each = 0, 0, 8 + 4 * 2 * _LINKS  # a graph: links of the lowest level
    if kind == "ivf":
        lists = max(1, min(2 ** round(math.log2(4 * math.sqrt(count))), count // 39))
        shared, each = 4 * lists * dimensions, 8
    codes = [("sq8", dimensions)] if config.quantiser != "pq" else []
    if config.quantiser != "sq8":
        codes += [("pq", dimensions // part) for part in (4, 8, 16, 32) if dimensions % part == 0]
        codes = codes or [("pq", 1)]
    limit = _half_of_memory() if config.memory_limit is None else config.memory_limit * 2**20
    book = 4 * _CENTRES * dimensions  # of a product quantiser
    plans = [
        Plan(kind, name, code, lists, shared + book * (name == "pq") + count * (code + each)) for name, code in codes
    ]
    for plan in plans:
        if plan.size <= limit:
            return plan
    raise RefusedError(
        f"An index of {count} vectors needs at least {math.ceil(plans[-1].size / 2**20)} MiB; allowed are "
        f"{limit // 2**20}.",
        remedy="Raise --memory-limit, or choose another --index-kind or --quantiser.",
    )


def tune_effort(index: CandidateIndex, judge: Judge, plan: Plan, config: IndexConfig) -> tuple[Effort, float]:
    """Find the least effort that reaches the wanted recall, and leave the index at it.

    More candidates are scored exactly only where more probes no longer help: where the quantiser is too coarse.

    Raises:
        RefusedError: no effort reaches it.
    """
    most = plan.lists or plan.longest
    best = 0.0

    def measure(probes: int, candidates: int) -> float:
        nonlocal best
        index.effort = Effort(probes, candidates)
        recall = judge.measure(index)
        best = max(best, recall)
        return recall

    candidates = 2
    while candidates <= _MOST_CANDIDATES:
        first = 1 if plan.lists else min(most, candidates * (judge.k + 1))
        probes, before = first, -1.0
        while (recall := measure(probes, candidates)) < config.wanted_recall:
            if probes >= most or recall - before < (_SATURATED if probes >= 16 else 0):
                break
            probes, before = min(2 * probes, most), recall
        if recall >= config.wanted_recall:
            low, high = probes if probes == first else probes // 2, probes  # the one fails, the other does not
            while high - low > max(1, high // 16):
                middle = (low + high) // 2
                low, high = (low, middle) if measure(middle, candidates) >= config.wanted_recall else (middle, high)
            return Effort(high, candidates), measure(high, candidates)
        candidates *= 2
    raise RefusedError(
        f"{plan.name} finds {best:.3f} of the {judge.k} best; wanted are {config.wanted_recall}.",
        remedy="Lower --wanted-recall, or choose another --index-kind, --quantiser or --memory-limit.",
    )


def _fill(plan: Plan, store: VectorStore, config: IndexConfig) -> Any:
    """Return faiss's index of all rows of the store, in order."""
    faiss = load_faiss()
    dimensions, metric = store.dimensions, faiss.METRIC_INNER_PRODUCT
    if not plan.lists and store.similarity == "cosine":
        metric = faiss.METRIC_L2  # the same order for unit vectors, and a graph in which fewer are out of reach
    if plan.lists:
        index = faiss.index_factory(dimensions, plan.name, metric)
    elif plan.quantiser == "sq8":
        index = faiss.IndexHNSWSQ(dimensions, faiss.ScalarQuantizer.QT_8bit, _LINKS, metric)
    else:
        index = faiss.IndexHNSWPQ(dimensions, plan.code, _LINKS, 8, metric)
    if not plan.lists:
        index.hnsw.efConstruction = _WIDTH
    if plan.quantiser == "pq":
        coded = index if plan.lists else faiss.downcast_index(index.storage)
        coded.do_polysemous_training = False  # takes minutes, for a way of searching that is not used here
        coded.pq.cp.min_points_per_centroid = 1  # no warning of a small corpus: the recall is measured
    # A graph that several threads build differs from one build to the next.
    with use_threads(config.index_threads if plan.lists else 1), use_blas():
        index.train(store.take(_draw_rows(store, max(plan.lists, _CENTRES) * _PER_LIST, config.index_seed)))
        with show_progress("index", store.count) as advance:
            for _, vectors in store.read_blocks(BLOCK):
                index.add(np.ascontiguousarray(vectors, dtype=np.float32))
                advance(len(vectors))
    return index


def make_judge(store: VectorStore, config: IndexConfig, queries: Scores | None) -> Judge:
    """Return queries with their exact results: those that are given, or vectors of the corpus.

    Args:
        store: the vectors.
        config: how many queries, how deep, by which seed.
        queries: [Q, D] vectors of real queries, or None.
    """
    count, alive = config.tuning_queries, store.alive
    if queries is None:
        own = _draw_rows(store, count, config.index_seed + 1)
        queries, said = store.take(own), f"{len(own)} vectors of the corpus, each without itself"
    else:
        rng = np.random.default_rng(config.index_seed)
        queries = queries[np.sort(rng.permutation(len(queries))[:count])]
        own, said = np.full(len(queries), -1, dtype=np.int64), f"{len(queries)} real queries"
    k = max(1, min(config.recall_depth, (store.count if alive is None else int(alive.sum())) - 1))
    rows, scores = search_exact(queries, store.read_raw(BLOCK), store.id_rank, k + 1, alive)
    return Judge(queries, own, _drop_own(rows, scores, own)[:, k - 1], k, said)


def _drop_own(rows: Rows, scores: Scores, own: Rows) -> Scores:
    """Return the scores [Q, k + 1] in order, that of the query's own row last."""
    order = np.argsort(rows == own[:, None], axis=1, kind="stable")
    return np.take_along_axis(np.where(rows == own[:, None], -np.inf, scores), order, axis=1)


def _draw_rows(store: VectorStore, count: int, seed: int) -> Rows:
    """Return some live rows, drawn at random, in order."""
    live = np.arange(store.count) if store.alive is None else np.flatnonzero(store.alive)
    most = min(count, len(live), _MOST_TRAINING // (4 * store.dimensions))
    return np.sort(np.random.default_rng(seed).permutation(live)[:most])


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
