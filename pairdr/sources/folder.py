"""A BEIR folder, written from what another library or repository holds.

Its texts are mended on the way, where ours would refuse them: nobody can mend a file in a cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairdr.errors import DataError
from pairdr.formats import write_qrels
from pairdr.records import Qrels

Row = dict[str, Any]
"""A line of corpus.jsonl or queries.jsonl."""

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "validation": "dev",
    "valid": "dev",
    "val": "dev",
    "test": "test",
}
"""What others call a split, to our name of it."""


@dataclass(frozen=True)
class Parts:
    """What a data set holds. Texts are read once, while they are written.

    Attributes:
        passages: the corpus.
        queries: all questions.
        qrels: split to labels.
        labels_from: split to the name of what the labels were read from.
        versions: what was read, to its version.
    """

    passages: Iterable[Row]
    queries: Iterable[Row]
    qrels: Mapping[str, Qrels]
    labels_from: Mapping[str, str]
    versions: Mapping[str, str]


def make_row(
    text_id: str, text: str | None, title: str | None = None, metadata: Mapping[str, Any] | None = None
) -> Row:
    """Return a line of corpus.jsonl or queries.jsonl; no text is an empty one."""
    row: Row = {"_id": text_id, "text": _mend(text)}
    if title:
        row["title"] = _mend(title)
    kept = {name: value for name, value in (metadata or {}).items() if value not in (None, "", [], ())}
    return row | {"metadata": kept} if kept else row


def read_relevance(value: Any, source: str) -> int:
    """Return a relevance as a whole number.

    Raises:
        DataError: it is none.
    """
    try:
        number = float(value)
        if number.is_integer():
            return int(number)
    except (TypeError, ValueError):
        pass
    raise DataError(f"{source} has the relevance {value!r}.", remedy="Only whole numbers are understood.")


def write_folder(folder: Path, parts: Parts) -> dict[str, Any]:
    """Write a BEIR folder and return what is worth keeping about it."""
    counts = {
        "passages": _write_rows(folder / "corpus.jsonl", parts.passages),
        "queries": _write_rows(folder / "queries.jsonl", parts.queries),
    }
    for split, qrels in parts.qrels.items():
        write_qrels(folder / "qrels" / f"{split}.tsv", qrels)
    splits = {split: {"from": parts.labels_from[split], "queries": len(qrels)} for split, qrels in parts.qrels.items()}
    return counts | {"splits": splits}


def _write_rows(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    with path.open("wb") as stream:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
            stream.write(line.encode("utf-8", "replace"))  # half a surrogate pair becomes a question mark
            count += 1
    return count


def _mend(text: str | None) -> str:
    return (text or "").replace("\0", " ")
