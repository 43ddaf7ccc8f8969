"""Vectors to ranked passages: runs for many queries, and a searcher for one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pairdr.artefact import publish
from pairdr.collection import Collection, open_collection
from pairdr.config import DataConfig, SearchConfig
from pairdr.errors import ArtefactError, UsageError
from pairdr.formats import write_run, write_trec_run
from pairdr.fusion import fuse_runs
from pairdr.indexes.exact import search_exact
from pairdr.lexical import LexicalIndex
from pairdr.progress import show_progress
from pairdr.records import Passage, Query, Run, Scored, split_blocks
from pairdr.vectors import VectorStore

if TYPE_CHECKING:
    from pairdr.backends import Encoder

Mode = Literal["dense", "bm25", "hybrid"]
WORK_FILE = "work.json"


class Hit(NamedTuple):
    """A found passage."""

    passage_id: str
    score: float
    passage: Passage


def rank_dense(
    queries: Iterable[Query], encoder: Encoder, store: VectorStore, config: SearchConfig
) -> Iterator[tuple[list[str], list[list[Scored]]]]:
    """Yield blocks of query ids and their k best passages by vector, ties by (-score, id).

    Memory is bounded by the block, whatever the number of queries and passages.

    Raises:
        ArtefactError: the vectors were made by another model, prefix or length.
    """
    store.require_encoder(encoder.fingerprint)
    yield from _rank_vectors(queries, encoder, store, config)


def rank_words(
    queries: Iterable[Query], collection: Collection, index: LexicalIndex, config: SearchConfig
) -> Iterator[tuple[list[str], list[list[Scored]]]]:
    """Yield blocks of query ids and their k best passages by BM25, ties by (-score, id)."""
    for block in split_blocks(queries, config.query_block):
        ranked = []
        for query in block:
            rows, scores = index.search(query.text, config.k)
            ids = collection.passages.ids_of(rows)
            ranked.append([Scored(*hit) for hit in zip(ids, scores.tolist(), strict=True)])
        yield [query.query_id for query in block], ranked


def write_search(
    blocks: Iterator[tuple[list[str], list[list[Scored]]]],
    config: SearchConfig,
    output: str | Path,
    *,
    total: int,
    inputs: dict[str, str],
    options: dict[str, object],
) -> Run:
    """Publish ranked blocks as `run.arrow` and TREC's `run.trec`."""
    with publish(output, "run", options=config.as_dict() | options, inputs=inputs) as staging:
        with show_progress("search", total) as advance, write_run(staging.path / "run.arrow") as add:
            for ids, ranked in blocks:
                add(ids, ranked)
                advance(len(ids))
        run = Run.open(staging.path / "run.arrow")
        write_trec_run(staging.path / "run.trec", run, Path(output).name)
        staging.facts |= {"queries": len(run), "hits": run.count_hits()}
    return Run.open(Path(output) / "run.arrow")


class Searcher:
    """Searches a work folder that `pairdr run` made."""

    def __init__(
        self,
        collection: Collection,
        encoder: Encoder,
        store: VectorStore,
        index: LexicalIndex,
        mode: Mode,
        weights: Sequence[float],
        depth: int,
    ) -> None:
        self.collection, self.encoder, self.store, self.index = collection, encoder, store, index
        self.mode, self.weights, self.depth = mode, tuple(weights), depth

    @classmethod
    def open(cls, work: str | Path) -> Searcher:
        """Open the model, vectors and BM25 index that `work.json` names.

        Raises:
            ArtefactError: there is no finished work folder, or its parts do not fit each other.
        """
        from pairdr.backends import open_encoder

        path = Path(work) / WORK_FILE
        if not path.is_file():
            raise ArtefactError(
                "This is no finished work folder.", path=work, remedy="Run pairdr run DATA -o WORK first."
            )
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            data = dict(facts["data"])
            data["unlabelled"] = tuple(Path(name) for name in data["unlabelled"])
            data["held_out"] = Path(data["held_out"]) if data["held_out"] else None
            mode, weights, depth = facts["mode"], facts["weights"], facts["k"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError("The file cannot be read.", path=path, remedy="Run pairdr run again.") from error
        collection = open_collection(facts["collection"], DataConfig(**data))
        encoder = open_encoder(Path(work) / facts["model"])
        store = VectorStore(Path(work) / facts["vectors"])
        store.require_encoder(encoder.fingerprint)
        if store.collection != collection.passages_fingerprint:
            raise ArtefactError(
                "The corpus has changed since it was encoded.", path=work, remedy="Run pairdr run again."
            )
        return cls(collection, encoder, store, LexicalIndex(Path(work) / "bm25"), mode, weights, depth)

    def search(self, text: str, k: int = 10, mode: Mode | None = None) -> list[Hit]:
        """Return the k best passages for a question.

        Args:
            text: the question.
            k: how many.
            mode: dense, bm25 or hybrid; unset is what won on dev.

        Raises:
            UsageError: an empty question, k below 1, or an unknown mode.
        """
        mode = mode or self.mode
        if not text.strip():
            raise UsageError("The question is empty.", remedy="Write one.")
        if k < 1:
            raise UsageError(f"k is {k}; it must be at least 1.")
        config = SearchConfig(k=max(k, self.depth) if mode == "hybrid" else k)
        query = [Query("q", text)]
        rankers: dict[str, Callable[[], Iterator[tuple[list[str], list[list[Scored]]]]]] = {
            "dense": lambda: _rank_vectors(query, self.encoder, self.store, config),
            "bm25": lambda: rank_words(query, self.collection, self.index, config),
        }
        if mode not in (*rankers, "hybrid"):
            raise UsageError(f"Unknown mode {mode!r}.", remedy="There are: dense, bm25, hybrid.")
        runs = [_collect(rankers[name]()) for name in (("dense", "bm25") if mode == "hybrid" else (mode,))]
        run = fuse_runs(runs, self.weights, k) if mode == "hybrid" else runs[0]
        return [Hit(hit.passage_id, hit.score, self.collection.passage(hit.passage_id)) for hit in run["q"]]


def _rank_vectors(
    queries: Iterable[Query], encoder: Encoder, store: VectorStore, config: SearchConfig
) -> Iterator[tuple[list[str], list[list[Scored]]]]:
    for block in split_blocks(queries, config.query_block):
        vectors = encoder.encode_queries([query.text for query in block])  # [Q, D]
        k = min(config.k, store.live)
        rows, scores = search_exact(vectors, store.read_raw(config.passage_block), store.id_rank, k, store.alive)
        ids = store.ids_of(rows.reshape(-1))
        yield (
            [query.query_id for query in block],
            [
                [Scored(*hit) for hit in zip(ids[at * k : (at + 1) * k], scores[at].tolist(), strict=True)]
                for at in range(len(block))
            ],
        )


def _collect(blocks: Iterator[tuple[list[str], list[list[Scored]]]]) -> Run:
    return Run.from_mapping(
        {query_id: hits for ids, ranked in blocks for query_id, hits in zip(ids, ranked, strict=True)}
    )
