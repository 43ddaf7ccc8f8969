"""Training files of other tools: rows of a query, its positives and its negatives, read and written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pairdr.errors import DataError
from pairdr.exchange.files import (
    NO_TITLE,
    JsonObject,
    dump_json,
    read_columns,
    read_objects,
    read_title,
    write_columns,
    write_objects,
)
from pairdr.records import Passage, Query

ROWS = "rows"
UNPAIRED = "queries without a negative, left out"
_DUAL, _CROSS = 6, 4  # columns of RocketQA's training files


class Candidate(NamedTuple):
    """A passage of a training row.

    Attributes:
        passage_id: empty where the file has none.
        title: may be empty.
        text: None where the file names the passage by its id alone.
        score: NaN where the file has none.
    """

    passage_id: str
    title: str
    text: str | None
    score: float = math.nan

    @property
    def joined(self) -> str:
        """Return title and text as the one string that is encoded."""
        return Passage(self.passage_id, self.title, self.text or "").joined


@dataclass(frozen=True)
class TrainingRow:
    """What a training file says of one query.

    Attributes:
        query: its id is empty where the file has none.
        positives: passages that answer it.
        negatives: hard negatives, in the order of the file.
        answers: accepted answers, where the file has some.
        others: passages that are neither; they belong to the corpus.
    """

    query: Query
    positives: tuple[Candidate, ...]
    negatives: tuple[Candidate, ...]
    answers: tuple[str, ...] = ()
    others: tuple[Candidate, ...] = ()


RowReader = Callable[[Path], Iterator[tuple[int, TrainingRow]]]
RowWriter = Callable[[Path, Iterable[TrainingRow], Counter[str]], None]


# --- training files, read ---------------------------------------------------------------------------------------------


def read_dpr(path: Path) -> Iterator[tuple[int, TrainingRow]]:
    """Yield the rows of DPR's JSON. Negatives are `hard_negative_ctxs`, or `negative_ctxs` where there are none."""
    for found in read_objects(path):
        positives = _read_passages(found, "positive_ctxs", required=True)
        hard, easy = _read_passages(found, "hard_negative_ctxs"), _read_passages(found, "negative_ctxs")
        query = Query(found.find_id("question_id", "query_id"), found.text("question"))
        answers = tuple(found.texts("answers"))
        yield found.line, TrainingRow(query, positives, hard or easy, answers, easy if hard else ())


def read_tevatron(path: Path) -> Iterator[tuple[int, TrainingRow]]:
    """Yield the rows of Tevatron's JSON lines: with passages (old keys), or with ids of a corpus (new keys)."""
    for found in read_objects(path):
        if "positive_document_ids" in found.value:
            positives, negatives = (
                tuple(Candidate(passage_id, "", None) for passage_id in found.ids(name))
                for name in ("positive_document_ids", "negative_document_ids")
            )
        else:
            positives = _read_passages(found, "positive_passages", required=True)
            negatives = _read_passages(found, "negative_passages")
        query = Query(found.find_id("query_id"), found.text("query_text", "query"))
        yield found.line, TrainingRow(query, positives, negatives, tuple(found.texts("answers")))


def read_flagembedding(path: Path) -> Iterator[tuple[int, TrainingRow]]:
    """Yield the rows of FlagEmbedding's JSON lines."""
    for found in read_objects(path):
        positives, negatives = found.texts("pos", required=True), found.texts("neg")
        positive_scores = found.scores("pos_scores", len(positives))
        negative_scores = found.scores("neg_scores", len(negatives))
        yield (
            found.line,
            TrainingRow(
                Query("", found.text("query")),
                tuple(Candidate("", "", *pair) for pair in zip(positives, positive_scores, strict=True)),
                tuple(Candidate("", "", *pair) for pair in zip(negatives, negative_scores, strict=True)),
            ),
        )


def read_rocketqa(path: Path) -> Iterator[tuple[int, TrainingRow]]:
    """Yield the rows of RocketQA's training files, dual encoder (6 columns) or cross-encoder (4 columns).

    Lines that follow one another with the same query, and in the dual form with the same positive, are one row.
    """
    expected = "query, title, text, title, text, 0; or query, title, text, label"
    lines = read_columns(path, (_DUAL, _CROSS), expected)
    for key, group in groupby(lines, key=lambda line: line[1][:3] if len(line[1]) == _DUAL else line[1][:1]):
        positives, negatives, first = [], [], 0
        for line, columns in group:
            first = first or line
            if len(columns) == _DUAL:
                positives = [_read_pair(*columns[1:3])]
                negatives.append(_read_pair(*columns[3:5]))
            elif columns[3] in ("0", "1"):
                (positives if columns[3] == "1" else negatives).append(_read_pair(*columns[1:3]))
            else:
                raise DataError(f"{columns[3]!r} is no label.", path=path, line=line, remedy="Write 1 or 0.")
        yield first, TrainingRow(Query("", key[0]), tuple(positives), tuple(negatives))


# --- training files, written ------------------------------------------------------------------------------------------


def write_dpr(path: Path, rows: Iterable[TrainingRow], counts: Counter[str]) -> None:
    """Write DPR's JSON array; a query keeps its id as `question_id`."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            value = {
                "question_id": row.query.query_id,
                "question": row.query.text,
                "answers": row.answers,
                "positive_ctxs": [_make_object(found, "passage_id") for found in row.positives],
                "negative_ctxs": [],
                "hard_negative_ctxs": [_make_object(found, "passage_id") for found in row.negatives],
            }
            stream.write((",\n" if counts[ROWS] else "[\n") + dump_json(value))
            counts[ROWS] += 1
        stream.write("\n]\n" if counts[ROWS] else "[]\n")


def write_tevatron(path: Path, rows: Iterable[TrainingRow], counts: Counter[str]) -> None:
    """Write Tevatron's JSON lines with the new keys; these have no scores."""
    counts[ROWS] += write_objects(path, map(_make_tevatron, rows))


def write_tevatron_old(path: Path, rows: Iterable[TrainingRow], counts: Counter[str]) -> None:
    """Write Tevatron's JSON lines with the old keys: passages, with scores where there are some."""
    counts[ROWS] += write_objects(path, map(_make_tevatron_old, rows))


def write_flagembedding(path: Path, rows: Iterable[TrainingRow], counts: Counter[str]) -> None:
    """Write FlagEmbedding's JSON lines; scores where every passage of the row has one."""
    counts[ROWS] += write_objects(path, map(_make_flagembedding, rows))


def write_rocketqa(path: Path, rows: Iterable[TrainingRow], counts: Counter[str]) -> None:
    """Write RocketQA's dual-encoder file: a line for each negative of each positive, without ids and scores."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            counts[ROWS if row.negatives else UNPAIRED] += 1
            for positive in row.positives:
                for negative in row.negatives:
                    texts = (*_make_pair(positive, NO_TITLE), *_make_pair(negative, NO_TITLE))
                    write_columns(stream, counts, row.query.text, *texts, "0")


def write_rocketqa_cross(path: Path, rows: Iterable[TrainingRow], counts: Counter[str]) -> None:
    """Write RocketQA's cross-encoder file: a line for each passage, with label 1 or 0."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            counts[ROWS] += 1
            for label, chosen in (("1", row.positives), ("0", row.negatives)):
                for found in chosen:
                    write_columns(stream, counts, row.query.text, *_make_pair(found, ""), label)


# --- parts ------------------------------------------------------------------------------------------------------------


def _read_passages(found: JsonObject, name: str, *, required: bool = False) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(
            passage.find_id("docid", "passage_id", "psg_id", "id"),
            passage.text_or_empty("title"),
            passage.text("text"),
            passage.score("score"),
        )
        for passage in found.objects(name, required=required)
    )


def _read_pair(title: str, text: str) -> Candidate:
    return Candidate("", read_title(title), text)


def _make_object(found: Candidate, name: str) -> dict[str, Any]:
    scored = {} if math.isnan(found.score) else {"score": found.score}
    return {name: found.passage_id, "title": found.title, "text": found.text} | scored


def _make_pair(found: Candidate, no_title: str) -> tuple[str, str]:
    return found.title or no_title, found.text or ""


def _make_tevatron(row: TrainingRow) -> dict[str, Any]:
    return {
        "query_id": row.query.query_id,
        "query_text": row.query.text,
        "positive_document_ids": [found.passage_id for found in row.positives],
        "negative_document_ids": [found.passage_id for found in row.negatives],
    }


def _make_tevatron_old(row: TrainingRow) -> dict[str, Any]:
    texts = {"query_id": row.query.query_id, "query": row.query.text}
    return (
        texts
        | ({"answers": row.answers} if row.answers else {})
        | {
            "positive_passages": [_make_object(found, "docid") for found in row.positives],
            "negative_passages": [_make_object(found, "docid") for found in row.negatives],
        }
    )


def _make_flagembedding(row: TrainingRow) -> dict[str, Any]:
    sides = {"pos": row.positives, "neg": row.negatives}
    value: dict[str, Any] = {"query": row.query.text}
    value |= {name: [found.joined for found in chosen] for name, chosen in sides.items()}
    if not any(math.isnan(found.score) for chosen in sides.values() for found in chosen):
        value |= {f"{name}_scores": [found.score for found in chosen] for name, chosen in sides.items()}
    return value
