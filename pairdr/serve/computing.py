"""What a batch computes in its thread: questions to passages, texts to vectors, pairs to scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pairdr.records import Passage, Query
from pairdr.searcher import Hit, Systems, Way
from pairdr.serve.shelf import Snapshot
from pairdr.tokens import Side

Vectors = npt.NDArray[np.float32]


class Search(NamedTuple):
    """How a question is searched."""

    snapshot: Snapshot
    k: int
    mode: Way
    filters: tuple[str, ...]
    fold: bool


class Asked(NamedTuple):
    """A question.

    Attributes:
        search: how it is searched.
        matched: what passes the filters, looked up before; None where there are none.
        text: what is asked.
    """

    search: Search
    matched: Systems | None
    text: str


class Questions(NamedTuple):
    """What questions have in common that are computed together, however each is searched."""

    snapshot: Snapshot
    need_vectors: bool


class Texts(NamedTuple):
    """What texts have in common that are encoded together."""

    snapshot: Snapshot
    side: Side


def search_questions(common: Questions, asked: Sequence[Asked]) -> list[list[Hit]]:
    """Return the hits of questions: all are encoded at once, and searched together where they are searched alike."""
    vectors: dict[str, Vectors] | None = None
    if common.need_vectors:
        texts = list(dict.fromkeys(question.text for question in asked))
        vectors = dict(zip(texts, common.snapshot.encoder.encode_queries(texts), strict=True))
    found: list[list[Hit]] = [[] for _ in asked]
    for search in dict.fromkeys(question.search for question in asked):
        places = [place for place, question in enumerate(asked) if question.search == search]
        hits = common.snapshot.searcher.search_many(
            [asked[place].text for place in places],
            search.k,
            vectors=vectors,
            matched=asked[places[0]].matched,
            mode=search.mode,
            where=search.filters,
            fold=search.fold,
            rerank=0,
        )
        for place, row in zip(places, hits, strict=True):
            found[place] = row
    return found


def encode_texts(common: Texts, texts: Sequence[str] | Sequence[Passage]) -> list[tuple[Vectors, int]]:
    """Return (vector [D], tokens) of each text."""
    encoder = common.snapshot.encoder
    if common.side == "query":
        questions = [str(text) for text in texts]
        tokens, vectors = encoder.tokenize_queries(questions), encoder.encode_queries(questions)
    else:
        passages = [Passage("", "", text) if isinstance(text, str) else text for text in texts]
        tokens, vectors = encoder.tokenize_passages(passages), encoder.encode_passages(passages)
    return list(zip(vectors, [len(found.input_ids) for found in tokens], strict=True))


def judge_pairs(snapshot: Snapshot, pairs: Sequence[tuple[Query, list[Passage]]]) -> Sequence[npt.NDArray[np.float64]]:
    """Return the reranker's scores of passages for questions."""
    teacher = snapshot.searcher.reranker
    assert teacher is not None
    return teacher.score([query for query, _ in pairs], [passages for _, passages in pairs])
