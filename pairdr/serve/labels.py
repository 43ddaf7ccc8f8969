"""What people say: of results, as labels that `pairdr run` can train on; of audited labels, as marks in their file."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from typing import Any

from pairdr.collection import normalise_text
from pairdr.errors import PairdrError, UsageError
from pairdr.files import hold_lock, replace_file
from pairdr.findings import Finding, find_audit_file, read_audit, write_marks
from pairdr.formats import QUERY_KEYS, format_qrels, read_qrels, read_texts
from pairdr.records import Qrels
from pairdr.serve.failures import ApiError

MOST_LABELS = 100_000
PREFIX = "feedback-"
"""Of the ids of questions."""


class Feedback:
    """Labels of found passages in a folder of their own: `queries.jsonl` and `qrels/train.tsv`.

    Both are replaced as a whole, in an order in which a label's question is always there; questions whose labels were
    taken back go when the service starts again, or are too many. Questions with the same words are one.

    Args:
        folder: made where there is none; what it holds already is kept.

    Raises:
        UsageError: another service writes there, or it holds other questions than feedback's, which would be rewritten.
        DataError: what it holds cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._queries, self._qrels_file = folder / "queries.jsonl", folder / "qrels" / "train.tsv"
        self._lock = threading.Lock()
        with ExitStack() as opening:
            try:
                opening.enter_context(hold_lock(folder, wait=False))
            except BlockingIOError as error:
                raise UsageError(
                    "Another service writes there.", path=folder, remedy="Choose another folder."
                ) from error
            self._read(folder)  # what the service before has written last is there now
            self._open = opening.pop_all()

    def _read(self, folder: Path) -> None:
        lines = read_texts(self._queries, QUERY_KEYS) if self._queries.is_file() else ()
        asked = {query_id: text for _, (query_id, text) in lines}
        self._qrels: Qrels = read_qrels(self._qrels_file) if self._qrels_file.is_file() else {}
        self._texts = {query_id: text for query_id, text in asked.items() if query_id in self._qrels}
        is_data = any((folder / f"corpus.jsonl{end}").exists() for end in ("", ".gz"))
        if is_data or not all(query_id.startswith(PREFIX) for query_id in (*asked, *self._qrels)):
            raise UsageError("Other data stand there.", path=folder, remedy="Choose a folder of its own for feedback.")
        self._qrels_file.parent.mkdir(parents=True, exist_ok=True)

    def label(self, query: str, passage_id: str, relevant: bool | None) -> int:
        """Write a label, or take it back (None), and return how many there are.

        Raises:
            ApiError: there are too many.
        """
        query_id = PREFIX + hashlib.sha256(normalise_text(query).encode()).hexdigest()[:16]
        with self._lock:
            judged = dict(self._qrels.get(query_id, {}))
            if relevant is None:
                if judged.pop(passage_id, None) is None:
                    return self._count()
            elif passage_id not in judged and self._count() >= MOST_LABELS:
                raise ApiError(409, "limit_exceeded", f"There are {MOST_LABELS} labels; train on them first.")
            else:
                judged[passage_id] = int(relevant)
            self._write({query_id: query} | self._texts, self._qrels | {query_id: judged})
            return self._count()

    def _count(self) -> int:
        return sum(map(len, self._qrels.values()))

    def _write(self, texts: dict[str, str], qrels: Qrels) -> None:
        """Write both files, and hold what they have once they have it."""
        if len(texts) > MOST_LABELS:
            texts = {query_id: text for query_id, text in texts.items() if qrels.get(query_id)}
        lines = (json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
        replace_file(self._queries, "".join(lines))
        self._texts = texts
        qrels = {query_id: judged for query_id, judged in qrels.items() if judged}
        replace_file(self._qrels_file, "".join(format_qrels(qrels)))
        self._qrels = qrels

    def close(self) -> None:
        """Let others write there."""
        self._open.close()


class Review:
    """The findings of an audit, gone through and marked. The file stays what it is: edits from elsewhere are seen.

    Args:
        place: the file, or the folder of an audit.

    Raises:
        UsageError: there is none.
        DataError: it cannot be read.
    """

    def __init__(self, place: Path) -> None:
        self._path, self._lock = find_audit_file(place), threading.Lock()
        read_audit(self._path)

    def list(self, start: int, count: int, kind: str | None, unmarked: bool) -> dict[str, Any]:
        """Return some findings, and how many of their kind there are and are marked."""
        findings = [finding for finding in self._read() if kind in (None, finding.kind)]
        shown = [finding for finding in findings if not (unmarked and finding.mark)]
        return self._count(findings) | {
            "start": start,
            "findings": [_write_finding(finding) for finding in shown[start : start + count]],
        }

    def mark(self, query_id: str, passage_id: str, mark: str) -> dict[str, Any]:
        """Write a mark, and return how many findings there are and are marked.

        Raises:
            ApiError: the audit has no such finding.
        """
        with self._lock:
            self._read()
            try:
                return self._count(write_marks(self._path, {(query_id, passage_id): mark}))
            except UsageError as error:
                raise ApiError(422, "invalid_value", error.what) from error

    def _read(self) -> Sequence[Finding]:
        try:
            return read_audit(self._path)
        except PairdrError as error:
            where = "" if error.line is None else f" (line {error.line})"
            raise ApiError(409, "conflict", f"The file of the audit cannot be read now: {error.what}{where}") from error

    def _count(self, findings: Sequence[Finding]) -> dict[str, int]:
        return {"total": len(findings), "marked": sum(bool(finding.mark) for finding in findings)}


def _write_finding(finding: Finding) -> dict[str, Any]:
    """Return a finding as it is sent: JSON has no NaN."""
    values = vars(finding).items()
    return {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in values}
