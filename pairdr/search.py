"""Queries to ranked passages, by vectors or by words: blocks of hits, and runs written of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pairdr.artefact import publish
from pairdr.config import SearchConfig
from pairdr.filters import Filters
from pairdr.formats import write_run, write_trec_run
from pairdr.indexes.exact import Allowed, search_exact
from pairdr.progress import show_progress
from pairdr.records import Query, Run, Scored, split_blocks
from pairdr.vectors import VectorStore

if TYPE_CHECKING:
    from pairdr.backends import Encoder
    from pairdr.indexes.candidates import CandidateIndex
    from pairdr.indexes.sharded import ShardedIndex
    from pairdr.lexical import LexicalIndex

Blocks = Iterator[tuple[list[str], list[list[Scored]]]]
Known = Mapping[str, npt.NDArray[np.float32]]
"""Vectors [D] of questions, by their text."""


def rank_dense(
    queries: Iterable[Query],
    encoder: Encoder,
    store: VectorStore,
    config: SearchConfig,
    *,
    index: CandidateIndex | ShardedIndex | None = None,
    allowed: Allowed | None = None,
    filters: Filters | None = None,
    known: Known | None = None,
) -> Blocks:
    """Yield blocks of query ids and their k best passages by vector, ties by (-score, id).

    Memory is bounded by the block, whatever the number of queries and passages.

    Args:
        queries: the questions.
        encoder: what made the vectors.
        store: the vectors.
        config: k and the sizes of blocks.
        index: an approximate one, or exact search by workers; None is exact search here.
        allowed: [N] rows that may be found; None is all.
        filters: what they were found by, for an index that can look it up itself.
        known: vectors of all questions, where they were made before; None: they are made here.

    Raises:
        ArtefactError: the vectors were made by another model, prefix or length.
    """
    store.require_encoder(encoder.fingerprint)
    k = min(config.k, store.live)
    alive = allowed if store.alive is None else store.alive if allowed is None else store.alive & allowed
    device = "cuda" if encoder.device == "cuda" else None
    for block in split_blocks(queries, config.query_block):
        texts = [query.text for query in block]
        vectors = encoder.encode_queries(texts) if known is None else np.stack([known[text] for text in texts])
        rows, scores = (
            search_exact(vectors, store.read_raw(config.passage_block), store.id_rank, k, alive, device=device)
            if index is None
            else index.search(vectors, k, allowed, filters)
        )  # [Q, k] each, -1 where fewer may be found
        ids = iter(store.ids_of(rows[rows >= 0]))
        ranked = [
            [Scored(next(ids), score) for row, score in zip(*pair, strict=True) if row >= 0]
            for pair in zip(rows.tolist(), scores.tolist(), strict=True)
        ]
        yield [query.query_id for query in block], ranked


def rank_words(
    queries: Iterable[Query], index: LexicalIndex, config: SearchConfig, *, allowed: Allowed | None = None
) -> Blocks:
    """Yield blocks of query ids and their k best passages by BM25, ties by (-score, id)."""
    for block in split_blocks(queries, config.query_block):
        ranked = []
        for query in block:
            rows, scores = index.search(query.text, config.k, allowed)
            ranked.append([Scored(*hit) for hit in zip(index.ids_of(rows), scores.tolist(), strict=True)])
        yield [query.query_id for query in block], ranked


def write_search(
    blocks: Blocks,
    config: SearchConfig,
    output: str | Path,
    *,
    total: int,
    inputs: dict[str, str],
    options: dict[str, object],
    describe: Callable[[], dict[str, Any]] = dict,
) -> Run:
    """Publish ranked blocks as `run.arrow` and TREC's `run.trec`; `describe` says at the end how it was searched."""
    with publish(output, "run", options=config.as_dict() | options, inputs=inputs) as staging:
        with show_progress("search", total) as advance, write_run(staging.path / "run.arrow") as add:
            for ids, ranked in blocks:
                add(ids, ranked)
                advance(len(ids))
        run = Run.open(staging.path / "run.arrow")
        write_trec_run(staging.path / "run.trec", run, Path(output).name)
        staging.facts |= {"queries": len(run), "hits": run.count_hits()} | describe()
    return Run.open(Path(output) / "run.arrow")
