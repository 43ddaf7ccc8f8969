"""A searcher: questions to passages with their texts, by vectors, words or both, filtered, folded and reranked."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pairdr.collection import normalise_text
from pairdr.config import ModelConfig, SearchConfig
from pairdr.errors import ArtefactError, UsageError
from pairdr.filters import match_rows, parse_filters
from pairdr.fusion import fuse_ranks, fuse_runs, sort_hits
from pairdr.indexes.address import is_url
from pairdr.indexes.exact import Allowed
from pairdr.parts import TEACHER, Parts, find_parts
from pairdr.progress import say
from pairdr.records import Passage, Query, Run, Scored, split_blocks
from pairdr.search import Blocks, Known, rank_dense, rank_words
from pairdr.store_config import QueryConfig, WorkersConfig
from pairdr.vectors import VectorStore

if TYPE_CHECKING:
    from pairdr.backends import Encoder
    from pairdr.indexes.candidates import CandidateIndex
    from pairdr.indexes.sharded import ShardedIndex
    from pairdr.lexical import LexicalIndex
    from pairdr.teachers import Teacher

Systems = Mapping[str, Allowed | None]
"""What is asked, dense or bm25, and which of its own rows [N] may be found; None is all."""
Way = Literal["dense", "bm25", "hybrid"]
KEPT_FILTERS = 16
"""Filters whose rows a searcher remembers; for hybrid one counts twice, of the vectors and of the words."""
RERANKED = 50
"""Best passages that a reranker puts into a new order, where nobody says otherwise."""


class Hit(NamedTuple):
    """A found passage."""

    passage_id: str
    score: float
    passage: Passage


class Searcher:
    """Answers questions from vectors, from the words of the same passages, or from both.

    Attributes:
        store: the vectors and the passages' texts.
        words: BM25 of the same passages, or None.
        config: how a question is answered where a call says nothing else.
    """

    def __init__(
        self,
        store: VectorStore,
        encoder: Encoder,
        *,
        words: LexicalIndex | None = None,
        index: CandidateIndex | ShardedIndex | None = None,
        reranker: Teacher | None = None,
        weights: Sequence[float] | None = None,
        config: QueryConfig = QueryConfig(),
    ) -> None:
        """Put the parts together.

        Args:
            store: the vectors.
            encoder: what made them.
            words: BM25.
            index: an approximate index over the store, or exact search by workers; None is exact search here.
            reranker: a teacher, or another cross-encoder.
            weights: of dense and BM25 in a weighted fusion, as dev chose them.
            config: how a question is answered.

        Raises:
            ArtefactError: parts that do not fit each other.
        """
        store.require_encoder(encoder.fingerprint)
        if words is not None:
            words.require_passages(store.passages_fingerprint)
        if index is not None and index.store.fingerprint != store.fingerprint:
            raise ArtefactError(
                "The index was opened over another version of these vectors.",
                path=store.folder,
                remedy="Open both again.",
            )
        self.store, self.words, self.config = store, words, config
        self._encoder, self._index, self._reranker, self.weights = encoder, index, reranker, weights
        self._matches: dict[tuple[str, tuple[str, ...]], Allowed] = {}
        self._remembering = threading.Lock()

    @classmethod
    def open(
        cls,
        place: str | Path,
        model: ModelConfig = ModelConfig(),
        *,
        words: str | Path | None = None,
        index: str | Path | None = None,
        reranker: str | None = None,
        workers: WorkersConfig = WorkersConfig(),
    ) -> Searcher:
        """Open a work folder that `pairdr run` made, or vectors that `pairdr encode` made.

        Args:
            place: the folder.
            model: what made the vectors; a work folder names its own, and only the device counts, or an export of it.
            words: BM25 by `pairdr index-words`; a work folder has its own.
            index: an index by `pairdr index`: a folder, or the URL of a database.
            reranker: "teacher" for that of a work folder; else a cross-encoder's folder or hub name.
            workers: that share exact search; none unless asked for.

        Raises:
            ArtefactError: there is no such folder, or its parts do not fit each other.
            UsageError: a model that is no export of the work folder's, or both an index and workers.
        """
        parts = find_parts(place, words=words, index=index)
        return open_searcher(parts, parts.open_encoder(model), reranker=reranker, device=model.device, workers=workers)

    def search(self, text: str, k: int = 10, **options: Any) -> list[Hit]:
        """Return the k best passages for a question.

        Args:
            text: the question.
            k: how many.
            **options: of `QueryConfig`, such as mode="bm25".

        Raises:
            UsageError: an empty question, k below 1, or options that need a part that is not here.
        """
        return self.search_many([text], k, **options)[0]

    def search_many(self, texts: Sequence[str], k: int = 10, **options: Any) -> list[list[Hit]]:
        """Return the k best passages for each question, as `search`; all that `rank` takes may be given."""
        if not all(text.strip() for text in texts):
            raise UsageError("The question is empty.", remedy="Write one.")
        queries = [Query(str(number), text) for number, text in enumerate(texts)]
        ranked = [hits for _, block in self.rank(queries, k, **options) for hits in block]
        return [[Hit(*hit, passage) for hit, passage in zip(hits, self._read(hits), strict=True)] for hits in ranked]

    def settle(self, **options: Any) -> QueryConfig:
        """Return how a question is answered where some options of `QueryConfig` are given; the mode is never auto."""
        config = replace(self.config, **options)
        if config.mode != "auto":
            return config
        return replace(config, mode="dense" if self.words is None else "hybrid")

    @property
    def modes(self) -> tuple[Way, ...]:
        """Return the ways in which questions can be answered."""
        return ("dense",) if self.words is None else ("dense", "bm25", "hybrid")

    @property
    def reranker(self) -> Teacher | None:
        """Return what reranks, or None."""
        return self._reranker

    def match_filters(self, **options: Any) -> Systems:
        """Return, to be given to a search, which passages fit its filters; those of the last few are remembered.

        Args:
            **options: of `QueryConfig`, those of the search.

        Raises:
            UsageError: what is no filter, or a field that no passage has.
        """
        return self._choose_systems(self.settle(**options))

    def describe_index(self, **options: Any) -> dict[str, Any]:
        """Return by which index, or how many workers, such questions were answered; nothing of exact search here."""
        if self._index is None or self.settle(**options).mode == "bm25":
            return {}
        return {"index": self._index.describe()}

    def rank(
        self,
        queries: Iterable[Query],
        k: int,
        *,
        vectors: Known | None = None,
        matched: Systems | None = None,
        **options: Any,
    ) -> Blocks:
        """Return blocks of query ids and their k best passages, for as many queries as there are.

        Args:
            queries: the questions.
            k: how many passages each.
            vectors: of the questions, where they were made before.
            matched: by `match_filters` with the same options, where that was called before.
            **options: of `QueryConfig`.

        Raises:
            UsageError: k below 1, or options that need a part that is not here.
        """
        config = self.settle(**options)
        systems = self._choose_systems(config) if matched is None else matched
        return self._rank_blocks(queries, SearchConfig(k=k), config, systems, vectors)

    def _rank_blocks(
        self,
        queries: Iterable[Query],
        search: SearchConfig,
        config: QueryConfig,
        systems: Systems,
        vectors: Known | None,
    ) -> Blocks:
        reranked = (RERANKED if self._reranker else 0) if config.rerank is None else config.rerank
        for block in split_blocks(queries, search.query_block):
            wanted = depth = max(search.k, reranked)
            ranked: list[list[Scored]] = [[] for _ in block]
            lacking: Sequence[int] = range(len(block))
            while lacking:
                found = self._find([block[at] for at in lacking], depth, config, systems, vectors)
                for at, hits in zip(lacking, found, strict=True):
                    ranked[at] = self._fold(hits) if config.fold else hits
                pairs = zip(lacking, found, strict=True)  # of those with many copies, deeper passages are needed
                lacking = [at for at, hits in pairs if len(ranked[at]) < wanted and len(hits) >= depth]
                depth *= 2
            if reranked and self._reranker is not None:
                ranked = self._rerank(block, [hits[:wanted] for hits in ranked], self._reranker)
            yield [query.query_id for query in block], [hits[: search.k] for hits in ranked]

    def _find(
        self, block: Sequence[Query], depth: int, config: QueryConfig, systems: Systems, vectors: Known | None
    ) -> list[list[Scored]]:
        """Return the best passages [Q][at most depth] of one system, or of several by fusion."""
        fused = len(systems) > 1
        search = SearchConfig(k=max(depth, config.depth) if fused else depth)
        runs = []
        for system, rows in systems.items():
            if system == "bm25" and self.words is not None:
                blocks = rank_words(block, self.words, search, allowed=rows)
            else:
                filters = parse_filters(config.where) or None
                blocks = rank_dense(
                    block,
                    self._encoder,
                    self.store,
                    search,
                    index=self._index,
                    allowed=rows,
                    filters=filters,
                    known=vectors,
                )
            runs.append([hits for _, ranked in blocks for hits in ranked])
        if not fused:
            return runs[0]
        names = [str(number) for number in range(len(block))]  # a question may be asked twice
        found = [Run.from_mapping(dict(zip(names, ranked, strict=True))) for ranked in runs]
        weighted = config.fusion == "weighted" or (config.fusion == "auto" and self.weights is not None)
        run = fuse_runs(found, self.weights or (), depth) if weighted else fuse_ranks(found, depth)
        return [run[name] for name in names]

    def _fold(self, hits: Sequence[Scored]) -> list[Scored]:
        """Return the hits without those that have the same words as a better one."""
        best: dict[str, Scored] = {}
        for hit, passage in zip(hits, self._read(hits), strict=True):
            best.setdefault(normalise_text(passage.joined), hit)
        return list(best.values())

    def _rerank(
        self, block: Sequence[Query], ranked: Sequence[Sequence[Scored]], reranker: Teacher
    ) -> list[list[Scored]]:
        """Return the hits in the order of the reranker's scores, and with these."""
        scores = reranker.score(block, [self._read(hits) for hits in ranked])
        return [
            sort_hits(zip([hit.passage_id for hit in hits], found.tolist(), strict=True), len(hits))
            for hits, found in zip(ranked, scores, strict=True)
        ]

    def _read(self, hits: Sequence[Scored]) -> list[Passage]:
        return self.store.passages_of(self.store.rows_of([hit.passage_id for hit in hits]))

    def _choose_systems(self, config: QueryConfig) -> Systems:
        """Return what has to be asked.

        Raises:
            UsageError: a part that is not here.
        """
        names = ("dense", "bm25") if config.mode == "hybrid" else (config.mode,)
        if "bm25" in names and self.words is None:
            raise UsageError("There is no BM25 here.", remedy="Give --words, made by pairdr index-words.")
        if config.fusion == "weighted" and self.weights is None:
            raise UsageError("No weights were chosen for these vectors.", remedy="Use --fusion rrf.")
        if config.rerank and self._reranker is None:
            raise UsageError("There is nothing to rerank with.", remedy="Give --reranker.")
        return {name: self._match(name, config.where) if config.where else None for name in names}

    def _match(self, system: str, where: tuple[str, ...]) -> Allowed:
        """Return which rows of a system pass, remembering the last filters."""
        key = system, where
        found = self._matches.get(key)
        if found is None:
            source = self.words if system == "bm25" and self.words is not None else self.store
            found = match_rows(source.metadata, parse_filters(where))
            with self._remembering:
                if len(self._matches) >= KEPT_FILTERS:
                    del self._matches[next(iter(self._matches))]  # the oldest
                self._matches[key] = found
        return found


def open_searcher(
    parts: Parts,
    encoder: Encoder,
    *,
    reranker: str | Teacher | None = None,
    device: str | None = None,
    workers: WorkersConfig = WorkersConfig(),
) -> Searcher:
    """Open a searcher.

    Args:
        parts: where they stand.
        encoder: what made the vectors.
        reranker: "teacher", a cross-encoder's folder or hub name, or one that is open.
        device: of the reranker.
        workers: that share exact search.

    Raises:
        ArtefactError: a part is missing, or does not fit the others.
        UsageError: both an index and workers.
    """
    store = VectorStore(parts.vectors)
    words = None if parts.words is None else _open_words(parts.words)
    return Searcher(
        store,
        encoder,
        words=words,
        index=_open_workers(store, workers) if parts.index is None else _open_index(parts.index, store, workers),
        reranker=_open_reranker(reranker, parts, encoder, words, device) if isinstance(reranker, str) else reranker,
        weights=parts.weights,
        config=QueryConfig(mode=parts.mode, depth=parts.depth),
    )


def _open_words(folder: str | Path) -> LexicalIndex:
    from pairdr.lexical import LexicalIndex

    return LexicalIndex(folder)


def _open_workers(store: VectorStore, workers: WorkersConfig) -> ShardedIndex | None:
    if not workers.are_wanted:
        return None
    from pairdr.indexes.sharded import ShardedIndex

    return ShardedIndex.open(store, workers)


def _open_index(place: str | Path, store: VectorStore, workers: WorkersConfig) -> CandidateIndex:
    if workers.are_wanted:
        raise UsageError("Workers share exact search, not an index.", remedy="Leave out --index, or the workers.")
    index: CandidateIndex
    if is_url(place):
        from pairdr.indexes.database import DatabaseIndex

        index = DatabaseIndex.open(str(place), store)
        place = index.database.place
    else:
        from pairdr.indexes.faiss import FaissIndex

        index = FaissIndex.open(place, store)
    if index.needs_rebuild:
        say(f"pairdr: {index.changed:.0%} of the vectors changed since {place} was built: run pairdr index again.")
    return index


def _open_reranker(
    source: str, parts: Parts, encoder: Encoder, words: LexicalIndex | None, device: str | None
) -> Teacher:
    from pairdr.teachers import CrossEncoderTeacher, load_teacher, read_recipe

    if source != TEACHER:
        return CrossEncoderTeacher(source, device=device)
    known = words is not None and parts.model is not None
    recipe = read_recipe(parts.teacher) if known else None
    if recipe is None or words is None:
        raise ArtefactError(
            "No teacher was accepted here.", path=parts.vectors, remedy="Name a cross-encoder's folder as --reranker."
        )
    contract = encoder.contract
    lengths = ModelConfig(
        query_length=contract.query_length, passage_length=contract.passage_length, title=contract.title, device=device
    )
    return load_teacher(recipe, parts.teacher, words, lengths)
