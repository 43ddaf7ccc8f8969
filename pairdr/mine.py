"""Candidates for every query, and hard negatives for the labelled ones.

Candidates are the top of the student and of BM25, taken in turns. A candidate of a labelled query becomes a hard
negative unless it is a known positive, a near copy of one, too near to the positive's score, or above the maximum
score. How many were kept, and why the others were not, is counted. Passages that the data holds out are no candidates
for training queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pairdr.artefact import publish, read_manifest
from pairdr.blocks import Blocks as KeptBlocks
from pairdr.blocks import keep_blocks
from pairdr.collection import Collection, normalise_text
from pairdr.config import MineConfig, SearchConfig
from pairdr.errors import ArtefactError, DataError
from pairdr.files import hash_file
from pairdr.formats import join_runs, read_run, write_run
from pairdr.lexical import LexicalIndex
from pairdr.progress import show_progress
from pairdr.records import Query, Run, Scored, positives_of, split_blocks
from pairdr.search import Blocks, rank_dense, rank_words
from pairdr.vectors import VectorStore

if TYPE_CHECKING:
    from pairdr.encoder import DualEncoder

GRAM = 5
"""Words per gram when near copies are compared."""
PART = 4096
"""Queries whose ranked passages are kept as one file: what a killed call can lose."""


@dataclass(frozen=True)
class Candidates:
    """What mining found.

    Attributes:
        student: the student's best passages for train, dev and pool queries.
        bm25: BM25's.
        merged: both in turns, with the student's scores: what is labelled.
        negatives: hard negatives for labelled training queries, with the student's scores.
        fingerprint: of the content.
        collection: fingerprint of the data that was mined; None for a run of another tool.
    """

    student: Run
    bm25: Run
    merged: Run
    negatives: Run
    fingerprint: str
    collection: str | None

    def require_collection(self, collection: Collection) -> None:
        """Refuse candidates of other data, or of other splits of it.

        Raises:
            ArtefactError: naming both fingerprints.
        """
        if self.collection not in (None, collection.fingerprint):
            raise ArtefactError(
                f"These candidates were mined from data {str(self.collection)[:12]}, "
                f"this is {collection.fingerprint[:12]}.",
                path=collection.source,
                remedy="Use the same data and the same --hide-labels, --unlabelled and --data-seed, or mine again.",
            )


def mine_candidates(
    collection: Collection,
    encoder: DualEncoder,
    store: VectorStore,
    index: LexicalIndex,
    config: MineConfig,
    output: str | Path,
) -> Candidates:
    """Search for every train, dev and pool query, and choose the hard negatives of the labelled ones.

    Memory is bounded by a block of queries, whatever the number of queries and passages. Runs are kept in parts beside
    the output until it is published: a call that was killed is followed by one that has them.

    Args:
        collection: the data.
        encoder: the student.
        store: the student's vectors of the corpus.
        index: BM25.
        config: depth, margins, sampling.
        output: the folder of the candidates.

    Raises:
        DataError: there is no labelled training query.
        ArtefactError: the vectors were not made by this student.
    """
    query_ids = [*collection.qrels("train"), *collection.qrels("dev"), *collection.pool]
    search = SearchConfig(k=config.depth)
    inputs = {"collection": collection.fingerprint, "encoder": encoder.fingerprint, "bm25": index.fingerprint}

    def merge(ids: list[str]) -> Blocks:
        for block in split_blocks(ids, search.query_block):
            vectors = encoder.encode_queries([collection.query(query_id).text for query_id in block])  # [Q, D]
            merged_ids = [merge_hits(student[query_id], bm25[query_id], config.depth) for query_id in block]
            triples = zip(block, merged_ids, vectors, strict=True)
            yield block, [_score_hits(collection, q, found, vector, store) for q, found, vector in triples]

    with (
        keep_blocks(output, [inputs, store.fingerprint, config.depth, search.query_block, PART]) as parts,
        publish(output, "candidates", options=config.as_dict(), inputs=inputs) as staging,
    ):

        def write(name: str, rank: Callable[[list[str]], Blocks]) -> Run:
            return _write_ranked(staging.path / f"{name}.arrow", name, query_ids, rank, parts)

        student = write("student", lambda ids: rank_dense(_read_queries(collection, ids), encoder, store, search))
        bm25 = write("bm25", lambda ids: rank_words(_read_queries(collection, ids), index, search))
        merged = write("merged", merge)
        margins = config
        if encoder.contract.similarity != "cosine":
            # A share of an unbounded inner product means nothing: 5 % of 180 is more than the candidates' whole spread.
            margins = replace(config, relative_margin=None)
        counts: Counter[str] = Counter()
        with write_run(staging.path / "negatives.arrow") as add:
            for block in split_blocks(enumerate(collection.qrels("train")), search.query_block):
                chosen = [choose_negatives(collection, merged, q, margins, counts, number) for number, q in block]
                add([query_id for _, query_id in block], chosen)
        staging.facts |= {
            "labelled": len(collection.qrels("train")),
            "pool": len(collection.pool),
            "depth": config.depth,
            "negatives": dict(counts),
        }
    return read_candidates(output)


def read_candidates(folder: str | Path) -> Candidates:
    """Memory-map what `mine_candidates` wrote."""
    manifest = read_manifest(folder, "candidates")
    names = ("student", "bm25", "merged", "negatives")
    student, bm25, merged, negatives = (Run.open(Path(folder) / f"{name}.arrow") for name in names)
    return Candidates(student, bm25, merged, negatives, manifest.fingerprint, manifest.inputs["collection"])


def open_candidates(path: str | Path, collection: Collection) -> Candidates:
    """Open what `mine` wrote, or take a run of another tool, such as Lucene's, as the student's candidates.

    Of such a run every candidate of a labelled query that is no known positive counts as a negative.
    """
    if Path(path).is_dir():
        return read_candidates(path)
    run = read_run(Path(path))
    train = collection.qrels("train")
    if collection.held_out:
        seen = {*train, *collection.pool}
        run = Run.from_mapping(
            {q: [hit for hit in run[q] if q not in seen or hit.passage_id not in collection.held_out] for q in run}
        )
    negatives = Run.from_mapping(
        {
            query_id: [
                hit for hit in run[query_id] if not _answers(collection, hit.passage_id, positives_of(train, query_id))
            ]
            for query_id in train
            if query_id in run
        }
    )
    return Candidates(run, run, run, negatives, hash_file(Path(path)), None)


def choose_negatives(
    collection: Collection, ranked: Run, query_id: str, config: MineConfig, counts: Counter[str], number: int = 0
) -> list[Scored]:
    """Return the hard negatives of one labelled query in rank order, and count what became of each candidate.

    The margins compare with the best-scored known positive among the candidates; where none was retrieved, every
    candidate already beats it, so the margins do not apply.

    Args:
        collection: the data.
        ranked: candidates with the student's scores.
        query_id: a labelled query.
        config: margins, maximum score, sampling.
        counts: reason to number of candidates; added to.
        number: the query's place, which with the seed decides random sampling.
    """
    positives = positives_of(collection.qrels("train"), query_id)
    if not positives:
        raise DataError(f"Query {query_id!r} has no relevant passage.", remedy="Remove its labels or add one above 0.")
    hits = ranked[query_id]
    known = [hit.score for hit in hits if hit.passage_id in positives]
    limit = _highest_score(max(known, default=None), config)
    survivors = []
    for hit in hits:
        reason = (
            "known positive"
            if hit.passage_id in positives
            else "too near the positive's score"
            if hit.score > limit
            else "near copy of a positive"
            if is_near_copy(collection, hit.passage_id, positives, config.near_copy)
            else None
        )
        if reason is None:
            survivors.append(hit)
        else:
            counts[reason] += 1
    if config.sampling == "random" and len(survivors) > config.keep:
        chosen = np.random.default_rng((config.mine_seed, number)).choice(len(survivors), config.keep, replace=False)
        kept = [survivors[place] for place in sorted(chosen)]
    else:
        kept = survivors[: config.keep]
    counts["kept"] += len(kept)
    counts["beyond the number kept"] += len(survivors) - len(kept)
    return kept


def jaccard_grams(first: str, second: str) -> float:
    """Return the Jaccard similarity of two normalised texts' sets of five-word grams."""
    one, two = _grams(first), _grams(second)
    if min(len(one), len(two)) == 0:
        return float(first == second)
    return len(one & two) / len(one | two)


def is_near_copy(
    collection: Collection, passage_id: str, positives: Iterable[str], level: float = MineConfig.near_copy
) -> bool:
    """Return whether a passage has the text of a positive, or nearly: word-5-gram Jaccard of at least `level`."""
    text = _normalised(collection, passage_id)
    return any(
        text == other or jaccard_grams(text, other) >= level
        for other in (_normalised(collection, positive) for positive in positives)
    )


def merge_hits(first: Sequence[Scored], second: Sequence[Scored], most: int) -> list[str]:
    """Return passage ids of two rankings in turns, each once."""
    pairs = zip_longest(first, second)
    return list(dict.fromkeys(hit.passage_id for pair in pairs for hit in pair if hit is not None))[:most]


def _score_hits(
    collection: Collection, query_id: str, passage_ids: list[str], vector: npt.NDArray[np.float32], store: VectorStore
) -> list[Scored]:
    """Return the hits with the student's scores; held-out passages are dropped unless the query is a dev one."""
    if query_id not in collection.qrels("dev"):
        passage_ids = [passage_id for passage_id in passage_ids if passage_id not in collection.held_out]
    scores = store.take_passages(passage_ids) @ vector
    return [Scored(*hit) for hit in zip(passage_ids, scores.tolist(), strict=True)]


def _answers(collection: Collection, passage_id: str, positives: Sequence[str]) -> bool:
    return passage_id in positives or is_near_copy(collection, passage_id, positives)


def _highest_score(positive: float | None, config: MineConfig) -> float:
    limits = [np.inf if config.max_score is None else config.max_score]
    if positive is not None and config.absolute_margin is not None:
        limits.append(positive - config.absolute_margin)
    if positive is not None and config.relative_margin is not None:
        limits.append(positive - abs(positive) * config.relative_margin)
    return float(min(limits))


@lru_cache(maxsize=65536)
def _normalised(collection: Collection, passage_id: str) -> str:
    return normalise_text(collection.passage(passage_id).joined)


@lru_cache(maxsize=65536)
def _grams(text: str) -> frozenset[tuple[str, ...]]:
    words = text.split()
    size = min(GRAM, len(words))
    return frozenset(tuple(words[at : at + size]) for at in range(len(words) - size + 1)) if words else frozenset()


def _read_queries(collection: Collection, query_ids: Iterable[str]) -> Iterator[Query]:
    return (collection.query(query_id) for query_id in query_ids)


def _write_ranked(
    path: Path, name: str, query_ids: Sequence[str], rank: Callable[[list[str]], Blocks], parts: KeptBlocks
) -> Run:
    """Write a run of all queries, a part of them at a time; parts that are there are not ranked again."""
    with show_progress(f"mine: {name}", len(query_ids)) as advance:

        def write_part(ids: list[str], place: Path) -> None:
            with write_run(place) as add:
                for block, ranked in rank(ids):
                    add(block, ranked)
                    advance(len(block))

        places = []
        for number, ids in enumerate(split_blocks(query_ids, PART)):
            file = f"{name}-{number:05}.arrow"
            advance(len(ids) if parts.has(file) else 0)
            places.append(parts.make(file, partial(write_part, ids)))
    join_runs(path, places)
    return Run.open(path)
