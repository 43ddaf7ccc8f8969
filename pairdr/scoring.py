"""A teacher's scores of candidates: a part of the queries at a time, kept as they come, made here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pairdr.blocks import Blocks
from pairdr.collection import Collection
from pairdr.files import hash_json
from pairdr.progress import show_progress
from pairdr.records import Passage, Query, Run, Scored, split_blocks

if TYPE_CHECKING:
    from pairdr.teachers import Teacher

BLOCK = 64
"""Queries that a teacher scores together: what is batched with what is a function of them."""
PART = 2048
"""Queries whose scores are kept as one file: what a killed call can lose."""

Scores = npt.NDArray[np.float64]
Found = Iterator[tuple[str, list[Scored], Scores]]
"""Per query: its id, its candidates [n], their scores [n]."""
Score = Callable[[str, Iterable[str]], Found]
"""Scores the candidates of some queries, which a name tells from others."""
Spread = Callable[[Mapping[int, list[str]]], Iterator[tuple[int, Scores]]]
"""Takes parts of the queries by number, and yields the scores of each part, one after the other, in any order."""


def score_candidates(collection: Collection, run: Run, teacher: Teacher, query_ids: Iterable[str], depth: int) -> Found:
    """Yield (query id, its first candidates, the teacher's scores), scoring a part of the queries at a time."""
    return make_scorer(collection, run, teacher, depth)("", query_ids)


def make_scorer(
    collection: Collection,
    run: Run,
    teacher: Teacher,
    depth: int,
    blocks: Blocks | None = None,
    spread: Spread | None = None,
) -> Score:
    """Return what scores candidates.

    Args:
        collection: the data.
        run: candidates in rank order; queries that it does not have are left out.
        teacher: whose scores they are.
        depth: candidates per query.
        blocks: keeps the scores of finished parts, and has those of an earlier call; None keeps nothing.
        spread: scores elsewhere, with the same teacher; it needs `blocks`.
    """

    def score_ids(query_ids: Sequence[str]) -> Scores:
        hits = {query_id: run[query_id][:depth] for query_id in query_ids}
        passages = {query_id: [collection.passage(hit.passage_id) for hit in row] for query_id, row in hits.items()}
        return score_part(teacher, [(collection.query(query_id), row) for query_id, row in passages.items()])

    def find_scores(name: str, query_ids: Sequence[str], made: Scores | None = None) -> Scores:
        def write(path: Path) -> None:
            with path.open("wb") as stream:
                np.save(stream, score_ids(query_ids) if made is None else made, allow_pickle=False)

        if blocks is None:
            return score_ids(query_ids)
        found: Scores = np.load(blocks.make(name, write), allow_pickle=False)
        return found

    def score(name: str, query_ids: Iterable[str]) -> Found:
        parts = dict(enumerate(split_blocks((query_id for query_id in query_ids if query_id in run), PART)))
        files = {number: f"{name}-{number:05}.npy" for number in parts}
        with show_progress("label", sum(map(len, parts.values()))) as advance:
            if blocks is not None and spread is not None:
                missing = {number: ids for number, ids in parts.items() if not blocks.has(files[number])}
                for number, made in spread(missing) if missing else ():
                    find_scores(files[number], parts[number], made)
                    advance(len(parts[number]))
            for number, ids in parts.items():
                flat = find_scores(files[number], ids)
                at = 0
                for query_id in ids:
                    hits = run[query_id][:depth]
                    yield query_id, hits, flat[at : at + len(hits)]
                    at += len(hits)
                advance(len(ids) if spread is None else 0)

    return score


def fingerprint_scores(teacher: Teacher) -> str | None:
    """Return a hash of all that decides a teacher's scores here; None where nobody can tell it from another's."""
    from pairdr.teachers import fingerprint_teacher

    found = fingerprint_teacher(teacher)
    return None if found is None else hash_json([found, BLOCK, PART])


def score_part(teacher: Teacher, part: Sequence[tuple[Query, list[Passage]]]) -> Scores:
    """Return the scores of all candidates of a part, one query after the other: a function of the part alone."""
    from pairdr.teachers import forget_passages

    forget_passages(teacher)
    found = [np.zeros(0)]
    for block in split_blocks(part, BLOCK):
        found += teacher.score([query for query, _ in block], [passages for _, passages in block])
    return np.concatenate(found)
