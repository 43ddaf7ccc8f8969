"""Answer recall, the measure of open-domain question answering: do the k best passages hold an answer?

A passage holds an answer when the answer's tokens stand in a row among the tokens of its text; the title does not
count (DPR, and RocketQA after it). A token is a run of letters, digits and marks, or one other visible sign; both
sides are decomposed (NFD) and lower-cased. The mean is over the questions that have answers, never over those that a
run happens to have.
"""

from __future__ import annotations

import ast
import csv
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pairdr.errors import DataError, UsageError
from pairdr.lines import Place, read_jsonl, read_lines
from pairdr.measures import PerQuery
from pairdr.records import Query, Run, split_blocks
from pairdr.rows import RowReader
from pairdr.texts import TextTable

if TYPE_CHECKING:
    import regex

ANSWERS = "answers.jsonl"
"""Where a BEIR folder keeps the accepted answers of its questions."""
Answers = dict[str, tuple[str, ...]]
"""query_id to the answers that are accepted."""

AnswerMode = Literal["dpr", "rocketqa"]
"""dpr takes answers as they are; rocketqa without dots at their ends, as RocketQA's evaluation reads them."""

MEASURES = ("answer_recall@5", "answer_recall@20", "answer_recall@100")
_NAME = re.compile(r"answer_recall@([1-9][0-9]*)")
_BLOCK = 1024
_FORMS = 'one of {"_id": ..., "answers": [...]}, question<TAB>[\'answer\', ...], query-id<TAB>answer<TAB>answer...'


def read_answers(path: Place, questions: Iterable[Query] = ()) -> Answers:
    """Read accepted answers: JSON lines, DPR's `question<TAB>['a', 'b']`, or RocketQA's `query-id<TAB>a<TAB>b`.

    Args:
        path: the file, `.jsonl` for JSON lines, plain or gzipped.
        questions: those that a run answers. DPR's form has no ids: a line stands for the question with its words, the
            second line with the same words for the second such question. Not read for the other forms.

    Raises:
        UsageError: there is no such file.
        DataError: a broken line, an id that stands twice, or a question that nobody asked.
    """
    answers: Answers = {}
    asked: dict[str, deque[str]] | None = None
    for number, query_id, question, accepted in _read_rows(path):
        if query_id is None:
            if asked is None:
                asked = {}
                for query in questions:
                    asked.setdefault(query.text.strip(), deque()).append(query.query_id)
            if not asked.get(question):
                raise DataError(
                    f"The run lacks the question {question!r}.",
                    path=path,
                    line=number,
                    remedy="Search for all questions of the file, in the same words.",
                )
            query_id = asked[question].popleft()
        if query_id in answers:
            raise DataError(f"Question {query_id} stands twice.", path=path, line=number, remedy="Keep one of the two.")
        answers[query_id] = accepted
    if not answers:
        raise DataError("There are no answers here.", path=path, remedy=f"A line is {_FORMS}.")
    return answers


def measure_answers(
    run: Run, answers: Answers, passages: TextTable, measures: Sequence[str] = MEASURES, mode: AnswerMode = "dpr"
) -> PerQuery:
    """Return for each question whether its k best passages hold an answer, 1 or 0.

    Args:
        run: ranked passages; questions without answers are passed over.
        answers: what is accepted, for every question that counts.
        passages: the corpus; each passage that was found is read and tokenised once.
        measures: names such as "answer_recall@20".
        mode: how answers are read.

    Raises:
        UsageError: a measure of another name.
        DataError: a question that the run lacks, a passage that the corpus lacks, or no question at all.
    """
    cutoffs = parse_answer_measures(measures)
    if not answers:
        raise DataError("No question has answers.", remedy="Check the answers and --split.")
    lacking = [query_id for query_id in answers if query_id not in run]
    if lacking:
        raise DataError(
            f"The run lacks {len(lacking)} of {len(answers)} questions, such as {lacking[0]!r}.",
            remedy="Search for all of them: recall is a share of all questions that have answers.",
        )
    first = find_first_hits(run, answers, passages, max(cutoffs.values()), mode)
    return {
        name: {query_id: float(first.get(query_id, cutoff + 1) <= cutoff) for query_id in answers}
        for name, cutoff in cutoffs.items()
    }


def parse_answer_measures(measures: Sequence[str]) -> dict[str, int]:
    """Return the cutoff of each measure.

    Raises:
        UsageError: naming all that are no answer recall.
    """
    found = {name: _NAME.fullmatch(name) for name in measures}
    unknown = [name for name, match in found.items() if match is None]
    if unknown or not found:
        raise UsageError(
            f"Answers do not measure {', '.join(unknown) or 'nothing'}.", remedy="Write answer_recall@20, ..."
        )
    return {name: int(match[1]) for name, match in found.items() if match is not None}


def find_first_hits(run: Run, answers: Answers, passages: TextTable, depth: int, mode: AnswerMode) -> dict[str, int]:
    """Return the rank of the first passage that holds an answer, for the questions that have one within the depth."""
    sought = {query_id: _prepare(accepted, mode) for query_id, accepted in answers.items()}
    places: dict[int, list[tuple[str, int]]] = {}  # row of a passage: the questions and ranks at which it was found
    for query_id in answers:
        for rank, hit in enumerate(run[query_id][:depth], start=1):
            places.setdefault(passages.row_of(hit.passage_id), []).append((query_id, rank))
    reader = RowReader([passages.table])
    first: dict[str, int] = {}
    for rows in split_blocks(sorted(places), _BLOCK):
        for row, (text,) in zip(rows, reader.take(rows, ("text",)), strict=True):
            tokens = join_tokens(text)
            for query_id, rank in places[row]:
                if rank < first.get(query_id, depth + 1) and any(answer in tokens for answer in sought[query_id]):
                    first[query_id] = rank
    return first


def join_tokens(text: str) -> str:
    """Return the tokens with a blank around each, so that a run of tokens is a substring. No token has a blank."""
    tokens = _find_pattern().findall(unicodedata.normalize("NFD", text))
    return f" {' '.join([token.lower() for token in tokens])} "


def _prepare(accepted: Sequence[str], mode: AnswerMode) -> list[str]:
    """Return the tokens of each answer; one without any is nowhere."""
    texts = [answer.strip(".").lower() for answer in accepted] if mode == "rocketqa" else accepted
    return [tokens for tokens in map(join_tokens, texts) if tokens.strip()]


@cache
def _find_pattern() -> regex.Pattern[str]:
    import regex

    return regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def _read_rows(path: Place) -> Iterator[tuple[int, str | None, str, tuple[str, ...]]]:
    """Yield (line number, query id or None, question where there is no id, answers)."""
    if ".jsonl" in path.suffixes:
        for number, value in read_jsonl(path):
            query_id = value.get("_id")
            if type(query_id) not in (int, str):
                raise DataError('"_id" is missing or is no string.', path=path, line=number, remedy="Add it.")
            yield number, str(query_id), "", _require_answers(value.get("answers"), path, number)
        return
    by_text: bool | None = None
    for number, line in read_lines(path):
        if by_text is None:  # the first line says which form this is
            second = line.partition("\t")[2].lstrip('"')
            by_text = second.startswith("[")
        if by_text:
            question, accepted = _parse_line(line)
            yield number, None, question, _require_answers(accepted, path, number)
        else:
            query_id, *texts = line.split("\t")
            yield number, query_id, "", _require_answers(texts, path, number)


def _parse_line(line: str) -> tuple[str, Any]:
    """Return question and answers of DPR's form; a list with both kinds of quotes in it is quoted once more."""
    try:
        question, written = next(csv.reader([line], delimiter="\t"))
        return question.strip(), ast.literal_eval(written)
    except (csv.Error, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return "", None


def _require_answers(value: Any, path: Place, line: int) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(answer, str) for answer in value):
        raise DataError("No answers here.", path=path, line=line, remedy=f"A line is {_FORMS}.")
    return tuple(value)
