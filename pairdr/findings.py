"""Suspicious labels as a table that people mark: a row per finding, tab-separated, for a spreadsheet or a script.

Fields are quoted as spreadsheets do it (a field with a tab, a quote or a line break stands in quotes, a quote is
doubled), so what a spreadsheet saves as tab-separated UTF-8 is read again. Rows may be sorted and removed; of the
columns only mark, kind, label and the two ids have to be there, in any order, and others may be added. An id or a text
that a spreadsheet would take for a formula has an apostrophe before it in the file, and only there.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_type_hints

from pairdr.errors import DataError, UsageError
from pairdr.files import hold_lock, replace_file

AUDIT_FILE = "audit.tsv"
KINDS = ("near_copy", "negative_above_positive", "contradicted", "unretrieved_positive")
LABELS = ("positive", "negative", "unlabelled", "pseudo")
MARKS = ("accept", "relabel", "drop")
MOST_CHARACTERS = 400
"""Texts are shortened to this."""
_NEEDED = ("mark", "kind", "label", "query_id", "passage_id")
_SPECIAL = re.compile(r'[\t\n\r"]')
_AS_TEXT = "If a spreadsheet changed it, import that column as text."


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One suspicious label. Numbers are None where they are not known; a rank beyond the depth that was looked at too.

    Attributes:
        rank: place in the audit, from 1.
        mark: what a person says: accept, relabel, drop, or nothing yet.
        kind: one of `KINDS`.
        label: what the passage is to the query now: one of `LABELS`.
        query_id: the query.
        query: its text, shortened.
        passage_id: the passage.
        passage: its title and text, shortened.
        other_id: the passage that it is compared with: a positive, or what the final model ranks first.
        other: the text of that, shortened.
        teacher_score: the teacher's score of the passage.
        other_teacher_score: that of the other one.
        model_rank: the passage's rank for the final model, from 1.
        model_score: its score there.
        other_model_rank: the other one's rank there.
        student_rank: the passage's rank for the model that mined.
        bm25_rank: its rank for BM25.
        jaccard: share of the five-word grams of both passages that both have.
        suggestion: what to think of, in words.
    """

    rank: int | None = None
    mark: str = ""
    kind: str
    label: str
    query_id: str
    query: str = ""
    passage_id: str
    passage: str = ""
    other_id: str = ""
    other: str = ""
    teacher_score: float | None = None
    other_teacher_score: float | None = None
    model_rank: int | None = None
    model_score: float | None = None
    other_model_rank: int | None = None
    student_rank: int | None = None
    bm25_rank: int | None = None
    jaccard: float | None = None
    suggestion: str = ""

    @property
    def pair(self) -> tuple[str, str]:
        """Return query id and passage id, which no other finding of an audit has."""
        return self.query_id, self.passage_id


_COLUMNS = tuple(spec.name for spec in fields(Finding))
_HINTS = get_type_hints(Finding)


def shorten_text(text: str) -> str:
    """Return a text on one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 1].rstrip() + "…"


def read_audit(path: str | Path) -> list[Finding]:
    """Read findings and their marks.

    Numbers that a spreadsheet has changed beyond recognition become None: they are for the person who marks.

    Args:
        path: the file, or the folder of an audit.

    Raises:
        UsageError: there is no such file.
        DataError: other columns, an unknown mark, kind or label, a missing id, or a pair with two marks.
    """
    return [finding for _, finding in read_audit_lines(path)]


def read_audit_lines(path: str | Path) -> list[tuple[int, Finding]]:
    """Return (line in the file, finding), errors as of `read_audit`."""
    path = find_audit_file(path)
    rows = _read_rows(path)
    line, header = next(rows, (1, []))
    missing = [name for name in _NEEDED if name not in header]
    if missing:
        raise DataError(
            f"The column {missing[0]!r} is missing.",
            path=path,
            line=line,
            remedy="Save it as tab-separated text in UTF-8, with the line that names the columns.",
        )
    twice = [name for name in _COLUMNS if header.count(name) > 1]
    if twice:
        raise DataError(
            f"Two columns are named {twice[0]!r}.", path=path, line=line, remedy="Give one of them another name."
        )
    found: dict[tuple[str, str], tuple[int, Finding]] = {}
    for line, row in rows:
        finding = _parse_row(header, row, path, line)
        before, twin = found.setdefault(finding.pair, (line, finding))
        if twin.mark != finding.mark:
            raise DataError(
                f"The same query and passage stand in line {before} with another mark.",
                path=path,
                line=line,
                remedy="Keep one of the two lines.",
            )
    return list(found.values())


def write_audit(path: Path, findings: Iterable[Finding]) -> None:
    """Write findings as a whole: a reader sees the old file or the new one."""
    _write_rows(path, [_COLUMNS, *([_format(getattr(finding, name)) for name in _COLUMNS] for finding in findings)])


def write_marks(path: str | Path, marks: Mapping[tuple[str, str], str]) -> list[Finding]:
    """Set some marks in a file of findings and leave all else as it is, columns that people added too.

    Args:
        path: the file, or the folder of an audit.
        marks: (query id, passage id) to one of `MARKS`, or to nothing, which takes a mark away.

    Returns:
        All findings as they are now.

    Raises:
        UsageError: an unknown mark, or a pair that the audit does not have.
    """
    path = find_audit_file(path)
    unknown = [mark for mark in marks.values() if mark not in ("", *MARKS)]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is no mark.", path=path, remedy=f"There are: {', '.join(MARKS)}.")
    with hold_lock(path.parent):  # else of two who mark at once one loses
        strangers = marks.keys() - {finding.pair for finding in read_audit(path)}
        if strangers:
            query_id, passage_id = min(strangers)
            raise UsageError(
                f"There is no finding for query {query_id!r} and passage {passage_id!r}.",
                path=path,
                remedy="Mark what the audit lists.",
            )
        (_, header), *rows = _read_rows(path)
        _write_rows(path, [header, *(_mark_row(header, row, marks, path, line) for line, row in rows)])
        return read_audit(path)


def find_audit_file(path: str | Path) -> Path:
    """Return the file of findings that a path names: itself, or the one in a folder.

    Raises:
        UsageError: there is none.
    """
    place = Path(path) / AUDIT_FILE if Path(path).is_dir() else Path(path)
    if not place.is_file():
        raise UsageError("There is no such file.", path=place, remedy="Name what pairdr audit wrote.")
    return place


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, cells) of every row that is not empty."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("Not UTF-8.", path=path, remedy="Save it as tab-separated text in UTF-8.") from error
    reader = csv.reader(io.StringIO(text, newline=""), "excel-tab", strict=True)
    line = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"A row cannot be read: {error}.", path=path, line=line, remedy="Save it as tab-separated text in UTF-8."
        ) from error


def _write_rows(path: Path, rows: Iterable[Sequence[str]]) -> None:
    lines = ["\t".join(map(_quote, row)) + "\n" for row in rows]
    replace_file(path, "".join(lines))


def _quote(cell: str) -> str:
    """Return a cell as spreadsheets write it; the library's writer leaves a line's end of another kind bare."""
    return '"' + cell.replace('"', '""') + '"' if _SPECIAL.search(cell) else cell


def _mark_row(
    header: list[str], row: list[str], marks: Mapping[tuple[str, str], str], path: Path, line: int
) -> list[str]:
    mark = marks.get(_parse_row(header, row, path, line).pair)
    if mark is None:
        return row
    cells = zip_longest(header, row[: len(header)], fillvalue="")
    return [mark if name == "mark" else cell for name, cell in cells]


def _parse_row(header: list[str], row: list[str], path: Path, line: int) -> Finding:
    if any(cell.strip() for cell in row[len(header) :]):
        raise DataError(
            f"{len(row)} cells stand under {len(header)} columns.", path=path, line=line, remedy="Mend the line."
        )
    cells = dict(zip_longest(header, row[: len(header)], fillvalue=""))
    values: dict[str, Any] = {name: _parse(cells[name], _HINTS[name]) for name in _COLUMNS if name in cells}
    for name, known in (("mark", ("", *MARKS)), ("kind", KINDS), ("label", LABELS)):
        values[name] = values[name].strip().lower()
        if values[name] not in known:
            raise DataError(
                f"{cells[name]!r} is no {name}.",
                path=path,
                line=line,
                remedy=f"There are: {', '.join(filter(None, known))}.",
            )
    for name in ("query_id", "passage_id"):
        if not values[name]:
            raise DataError(f"There is no {name}.", path=path, line=line, remedy=_AS_TEXT)
    return Finding(**values)


def _parse(cell: str, hint: Any) -> Any:
    if hint is str:
        return cell.removeprefix("'") if _is_formula(cell) else cell
    try:
        return int(cell) if hint == int | None else float(cell.replace(",", "."))
    except ValueError:
        return None


def _format(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}" if _is_formula(value) else value
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _is_formula(text: str) -> bool:
    """Return whether a spreadsheet would take a text for a formula, but for apostrophes before it."""
    return text.lstrip("'").startswith(("=", "+", "-", "@", "\t", "\r"))
