"""Stream readers and writers of the files that others can make or read: BEIR, TREC, and our Arrow forms.

Every reader yields one record at a time and says file and line when a record is broken.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pairdr.errors import DataError
from pairdr.lines import Place, read_jsonl, read_lines
from pairdr.records import RUN_SCHEMA, Example, Passage, Qrels, Run, Scored, split_blocks
from pairdr.rows import RowReader

EXAMPLE_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("positive_id", pa.string()),
        ("negative_ids", pa.list_(pa.string())),
        ("known_positive_ids", pa.list_(pa.string())),
        ("source", pa.string()),
        ("positive_score", pa.float32()),
        ("negative_scores", pa.list_(pa.float32())),
    ]
)
BREAKS = re.compile(r"[\t\n\r]")
"""What a tab-separated column cannot hold."""
_BLANK = re.compile(r"\s")
PASSAGE_KEYS = ("_id", "title", "text", "metadata")
"""The keys of a line of corpus.jsonl, in the order of `Passage`."""
QUERY_KEYS = ("_id", "text")
"""Those of queries.jsonl."""
_READ_AT_ONCE = 1024
MOST_RELEVANCE = 2**31
"""Relevances are smaller: what measures them has 32 bits."""
QRELS_HEADER = "query-id\tcorpus-id\tscore"


def read_texts(path: Place, keys: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, values of `keys`) of a BEIR corpus or query file.

    A missing title is empty; `_id` and `text` have to be there. Ids that are numbers become strings. `metadata`, an
    object, becomes JSON with sorted keys, or empty.

    Raises:
        DataError: a missing or wrongly typed key, an empty id, or a text with a lone surrogate or a NUL.
    """
    for number, value in read_jsonl(path):
        row = []
        for key in keys:
            item = value.get(key)
            if key == "metadata":
                item = _write_metadata(item, path, number)
            elif item is None and key == "title":
                item = ""
            elif type(item) is int and key == "_id":
                item = str(item)
            if not isinstance(item, str) or (key == "_id" and not item.strip()):
                raise DataError(f'"{key}" is missing or is no string.', path=path, line=number, remedy="Add it.")
            require = require_id if key == "_id" else require_clean
            row.append(require(item, f'"{key}"', path, number))
        yield number, row


def format_metadata(value: dict[str, Any]) -> str:
    """Return metadata as `Passage` has it.

    Raises:
        ValueError: a number that JSON does not have, such as NaN.
    """
    return json.dumps(value, sort_keys=True, allow_nan=False) if value else ""


def require_clean(text: str, name: str, path: Place, line: int) -> str:
    """Return a text, unless it cannot be stored: with a NUL character, or half a surrogate pair.

    Args:
        text: what was read.
        name: what the error calls it.
        path: of the file.
        line: that it stands in.

    Raises:
        DataError: naming file and line.
    """
    if "\0" in text:
        raise DataError(f"{name} has a NUL character.", path=path, line=line, remedy="Remove it.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{name} has half a surrogate pair.", path=path, line=line, remedy="Remove it.") from error
    return text


def require_id(text: str, name: str, path: Place, line: int) -> str:
    """Return an id, empty if it is blank; arguments and errors as of `require_clean`.

    Raises:
        DataError: also for a tab or a line break, which qrels and runs cannot hold.
    """
    if BREAKS.search(text):
        raise DataError(
            f"{name} has a tab or a line break.", path=path, line=line, remedy="Qrels and runs need ids without."
        )
    return require_clean(text, name, path, line) if text.strip() else ""


def read_passages(path: Place) -> Iterator[Passage]:
    """Yield the passages of a BEIR corpus file, errors as of `read_texts`."""
    for _, row in read_texts(path, PASSAGE_KEYS):
        yield Passage(*row)


def read_unlabelled(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, query id, text) of a file of questions: JSON lines, or one question a line.

    A question without `_id` gets the id `file name:line`.
    """
    if ".jsonl" in path.suffixes:
        for number, value in read_jsonl(path):
            text = value.get("text")
            if not isinstance(text, str):
                raise DataError('"text" is missing or is no string.', path=path, line=number, remedy="Add it.")
            query_id = value.get("_id", f"{path.name}:{number}")
            if type(query_id) not in (int, str) or not str(query_id).strip():
                raise DataError('"_id" is no string.', path=path, line=number, remedy="Mend it or leave it out.")
            query_id = require_id(str(query_id), '"_id"', path, number)
            yield number, query_id, require_clean(text, '"text"', path, number)
    else:
        for number, text in read_lines(path):
            yield number, f"{path.name}:{number}", require_clean(text.strip(), '"text"', path, number)


def read_qrels(path: Place) -> Qrels:
    """Read relevance labels: BEIR's three columns, TREC's four (query 0 passage relevance), or two, all relevant.

    A first line that names the columns is passed over.

    Raises:
        DataError: a line with another number of columns than the first, or a relevance that is no whole number.
    """
    return {query_id: dict(judged) for query_id, judged in _group(read_qrels_lines(path)).items()}


def read_qrels_lines(path: Place) -> Iterator[tuple[int, str, str, int]]:
    """Yield (line number, query id, passage id, relevance) of a qrels file."""
    columns = 0
    for number, text in read_lines(path):
        parts = text.split("\t") if "\t" in text else text.split()
        if number == 1 and parts[-1].strip() in ("score", "relevance", "rel", "corpus-id"):
            continue
        columns = columns or len(parts)
        try:
            if len(parts) != columns or columns > 4:
                raise ValueError(f"{len(parts)} columns")
            query_id, passage_id, relevance = [*parts, "1"] if columns == 2 else [parts[0], *parts[columns - 2 :]]
            if abs(int(relevance)) >= MOST_RELEVANCE:
                raise ValueError(f"relevance {relevance}")
            yield number, query_id, passage_id, int(relevance)
        except ValueError as error:
            raise DataError(
                "Not a qrels line: expected 'query-id<TAB>corpus-id<TAB>score' on every line, score a whole number "
                "below 2^31.",
                path=path,
                line=number,
                remedy="Mend or remove the line.",
            ) from error


def write_qrels(path: Path, qrels: Qrels) -> None:
    """Write labels in BEIR's form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(format_qrels(qrels))


def format_qrels(qrels: Qrels) -> Iterator[str]:
    """Yield the lines of labels in BEIR's form."""
    yield QRELS_HEADER + "\n"
    for query_id, judged in qrels.items():
        for passage_id, relevance in judged.items():
            yield f"{query_id}\t{passage_id}\t{relevance}\n"


def read_run(path: Path) -> Run:
    """Read a run: our Arrow file, or TREC's `query Q0 passage rank score tag`, plain or gzipped.

    TREC runs are ordered by (-score, passage id) whatever their rank column says.

    Raises:
        UsageError: there is no such file.
        DataError: a broken line, or a passage that stands twice under one query.
    """
    if path.suffix == ".arrow" and path.is_file():
        try:
            run = Run.open(path)
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DataError("Not a run in Arrow form.", path=path, remedy="Make it again.") from error
        if run.table.schema != RUN_SCHEMA:
            raise DataError("These are other columns than a run has.", path=path, remedy="Make it again.")
        return run
    ranked: dict[str, dict[str, float]] = {}
    for number, text in read_lines(path):
        try:
            query_id, _, passage_id, _, score, _ = text.split("\t") if "\t" in text else text.split()
            value = float(score)
            if math.isnan(value):
                raise ValueError("no number")
        except ValueError as error:
            raise DataError(
                "Not a TREC run line: expected 'query Q0 passage rank score tag'.",
                path=path,
                line=number,
                remedy="Mend or remove the line.",
            ) from error
        hits = ranked.setdefault(query_id, {})
        if passage_id in hits:
            raise DataError(
                f"Passage {passage_id} stands twice under query {query_id}.",
                path=path,
                line=number,
                remedy="Keep one of the two.",
            )
        hits[passage_id] = value
    return Run.from_mapping({q: sorted(hits.items(), key=lambda hit: (-hit[1], hit[0])) for q, hits in ranked.items()})


def write_trec_run(path: Path, run: Run, tag: str) -> None:
    """Write a run in TREC's form, ranks from 1, scores with all digits of a float32.

    Fields are separated by a blank, or by tabs where an id has a blank in it.
    """
    with path.open("w", encoding="utf-8") as stream:
        for query_id in run:
            for rank, (passage_id, score) in enumerate(run[query_id], start=1):
                gap = "\t" if _BLANK.search(query_id + passage_id) else " "
                stream.write(gap.join((query_id, "Q0", passage_id, str(rank), f"{score:.9g}", tag)) + "\n")


@contextmanager
def write_run(path: Path) -> Iterator[Callable[[list[str], list[list[Scored]]], None]]:
    """Write a run in Arrow form, block by block: the block's queries and their ranked passages."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, RUN_SCHEMA) as writer:

        def add(query_ids: list[str], ranked: list[list[Scored]]) -> None:
            block = Run.from_mapping(dict(zip(query_ids, ranked, strict=True))).table
            for batch in block.to_batches():
                writer.write_batch(batch)

        yield add


def join_runs(path: Path, parts: Iterable[Path]) -> None:
    """Write runs in Arrow form as one, in the given order, as if `write_run` had written it."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, RUN_SCHEMA) as writer:
        for part in parts:
            with pa.memory_map(str(part)) as source:
                reader = pa.ipc.open_file(source)
                for number in range(reader.num_record_batches):
                    writer.write_batch(reader.get_batch(number))


def write_examples(path: Path, examples: Iterable[Example], block: int = 4096) -> int:
    """Write training rows in Arrow form and return how many there were."""
    rows: list[dict[str, Any]] = []
    count = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, EXAMPLE_SCHEMA) as writer:
        for example in examples:
            rows.append(vars(example))
            count += 1
            if len(rows) == block:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, EXAMPLE_SCHEMA))
                rows = []
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, EXAMPLE_SCHEMA))
    return count


class Examples:
    """Training rows, memory-mapped: what is read costs as much as what is asked for, whatever there is."""

    def __init__(self, table: pa.Table, chosen: npt.NDArray[np.int64] | None = None) -> None:
        """Read a table.

        Args:
            table: the rows.
            chosen: which of them there are, in order; None is all.
        """
        self.table, self._chosen, self._rows = table, chosen, RowReader([table])

    @classmethod
    def open(cls, *paths: Path) -> Examples:
        """Memory-map one or more example files and read them as one, in the given order."""
        tables = []
        for path in paths:
            try:
                with pa.memory_map(str(path)) as source:
                    table = pa.ipc.open_file(source).read_all()
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError("No examples in Arrow form here.", path=path, remedy="Run pairdr label.") from error
            if table.schema != EXAMPLE_SCHEMA:
                raise DataError("These are other columns than examples have.", path=path, remedy="Run pairdr label.")
            tables.append(table)
        return cls(pa.concat_tables(tables))

    def __len__(self) -> int:
        return int(self.table.num_rows) if self._chosen is None else len(self._chosen)

    def __getitem__(self, row: int) -> Example:
        return self.take([range(len(self))[row]])[0]

    def __iter__(self) -> Iterator[Example]:
        return (example for rows in split_blocks(range(len(self)), _READ_AT_ONCE) for example in self.take(rows))

    def keep(self, wanted: npt.NDArray[np.bool_]) -> Examples:
        """Return these examples without some, by a mask [n]; nothing is copied."""
        chosen = np.flatnonzero(wanted) if self._chosen is None else self._chosen[wanted]
        return Examples(self.table, chosen)

    def take(self, rows: Sequence[int]) -> list[Example]:
        """Return some rows, read at once."""
        found = self._read(np.asarray(rows, dtype=np.int64), EXAMPLE_SCHEMA.names)
        return [_make_example(row) for row in found]

    def keys(self, rows: npt.NDArray[np.int64]) -> list[tuple[str, set[str]]]:
        """Return (query id, every known positive's id) of some rows; nothing else is read."""
        found = self._read(rows, ("query_id", "positive_id", "known_positive_ids"))
        return [(query, {positive, *known}) for query, positive, known in found]

    def _read(self, rows: npt.NDArray[np.int64], names: Sequence[str]) -> list[tuple[Any, ...]]:
        return self._rows.take(rows if self._chosen is None else self._chosen[rows], names)


def _make_example(values: Sequence[Any]) -> Example:
    query_id, positive_id, negative_ids, known, source, score, scores = values
    return Example(query_id, positive_id, tuple(negative_ids), tuple(known), source, score, tuple(scores))


def _group(lines: Iterable[tuple[int, str, str, int]]) -> Qrels:
    qrels: Qrels = {}
    for _, query_id, passage_id, relevance in lines:
        qrels.setdefault(query_id, {})[passage_id] = relevance
    return qrels


def _write_metadata(value: Any, path: Place, number: int) -> str:
    if not value:
        return ""
    if not isinstance(value, dict):
        raise DataError(
            '"metadata" is no object.', path=path, line=number, remedy='Write {"field": value, ...}, or leave it out.'
        )
    try:
        return format_metadata(value)
    except ValueError as error:
        raise DataError(
            '"metadata" has a number that JSON does not have.', path=path, line=number, remedy="Write null."
        ) from error
