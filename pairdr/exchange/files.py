"""What files of other tools are made of: JSON objects, one a line or in one large array, and tab-separated columns.

Memory is bounded by the largest object or line. Whatever is broken is named with file and line. A column cannot hold
a tab or a line break: writing makes each a blank, and counts the texts.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from pairdr.errors import DataError, UsageError
from pairdr.formats import BREAKS, require_clean, require_id
from pairdr.lines import read_jsonl, read_lines

NO_TITLE = "-"
"""What RocketQA writes where there is no title."""
CHANGED = "texts with tabs or line breaks made blanks"
_SPACE = re.compile(r"\s*")
_HEAD = 4096  # bytes that tell an array from lines
_CHUNK = 1 << 20  # characters of an array that are read at a time
_LONGEST_FIELD = 1 << 24  # characters; a quote that is never closed ends there
_NEAR_END = 16  # a literal or an escape that is cut off is shorter
_TOO_LARGE = 2.0**128 - 2.0**103  # from here on a score is no 32-bit number
_MEND = "Mend or remove it."


class JsonObject:
    """The keys of one object of a file.

    Attributes:
        value: the object.
        path: of the file.
        line: that the object begins on.
    """

    def __init__(self, value: dict[str, Any], path: Path, line: int) -> None:
        self.value, self.path, self.line = value, path, line

    def text(self, *names: str) -> str:
        """Return the text of the first of these keys that is there.

        Raises:
            DataError: none is there, or it is no string, or one that cannot be stored.
        """
        value = self._first(names)
        if not isinstance(value, str):
            raise self._fail(f'"{names[0]}" is missing or is no string.', "Add it.")
        return require_clean(value, f'"{names[0]}"', self.path, self.line)

    def text_or_empty(self, name: str) -> str:
        """Return the text of a key, empty where it is missing or null."""
        return "" if self.value.get(name) is None else self.text(name)

    def find_id(self, *names: str) -> str:
        """Return the id of the first of these keys that is there, a number as a string; empty where there is none."""
        return self._as_id(self._first(names), names[0])

    def id(self, *names: str) -> str:
        """Return the id of the first of these keys that is there.

        Raises:
            DataError: none is there, or it is no id.
        """
        found = self.find_id(*names)
        if not found:
            raise self._fail(f'"{names[0]}" is missing.', "Add it.")
        return found

    def ids(self, name: str) -> list[str]:
        """Return a list of ids, empty where the key is missing or null."""
        return [self._as_id(item, name) for item in self._items(name, required=False)]

    def texts(self, name: str, *, required: bool = False) -> list[str]:
        """Return a list of texts, empty where the key is missing or null and may be."""
        return [JsonObject({name: item}, self.path, self.line).text(name) for item in self._items(name, required)]

    def objects(self, name: str, *, required: bool = False) -> list[JsonObject]:
        """Return a list of objects, empty where the key is missing or null and may be."""
        items = self._items(name, required)
        if not all(isinstance(item, dict) for item in items):
            raise self._fail(f'"{name}" has an item that is no object.', _MEND)
        return [JsonObject(item, self.path, self.line) for item in items]

    def score(self, name: str) -> float:
        """Return a score, NaN where there is none."""
        return self._as_score(self.value.get(name), name)

    def scores(self, name: str, count: int) -> list[float]:
        """Return a list of scores of so many texts, NaN for all where the list is missing or empty."""
        found = [self._as_score(item, name) for item in self._items(name, required=False)] or [math.nan] * count
        if len(found) != count:
            raise self._fail(f'"{name}" has {len(found)} scores for {count} texts.', _MEND)
        return found

    def _first(self, names: Sequence[str]) -> Any:
        return next((self.value[name] for name in names if self.value.get(name) is not None), None)

    def _items(self, name: str, required: bool) -> list[Any]:
        value = self.value.get(name)
        if value is None and not required:
            return []
        if not isinstance(value, list):
            raise self._fail(f'"{name}" is missing or is no list.', "Add it.")
        return value

    def _as_id(self, value: Any, name: str) -> str:
        if value is None:
            return ""
        if type(value) not in (int, str):
            raise self._fail(f'"{name}" is no string.', _MEND)
        return require_id(str(value), f'"{name}"', self.path, self.line)

    def _as_score(self, value: Any, name: str) -> float:
        try:
            score = math.nan if value is None else float(value)
            if isinstance(value, bool) or abs(score) >= _TOO_LARGE:
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            raise self._fail(f'"{name}" is {value!r}, no finite number of 32 bits.', _MEND) from error
        return score

    def _fail(self, what: str, remedy: str) -> DataError:
        return DataError(what, path=self.path, line=self.line, remedy=remedy)


def read_objects(path: Path) -> Iterator[JsonObject]:
    """Yield the objects of a file of JSON lines, or of one JSON array, plain or gzipped.

    Raises:
        UsageError: there is no such file.
        DataError: what is broken, with its line.
    """
    if not path.is_file():
        raise UsageError("There is no such file.", path=path, remedy="Check the path.")
    if not _is_array(path):
        for line, value in read_jsonl(path):
            yield JsonObject(value, path, line)
        return
    with _open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
        yield from _ArrayReader(path, stream).read()


def read_columns(path: Path, counts: Sequence[int], expected: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, columns) of a tab-separated file; every line has as many columns as the first one.

    Args:
        path: the file, plain or gzipped.
        counts: how many columns there may be.
        expected: the columns, for the error.
    """
    width = 0
    for line, text in read_lines(path):
        columns = text.split("\t")
        width = width or len(columns)
        if len(columns) != width or width not in counts:
            raise DataError(
                f"{len(columns)} columns; expected {expected}, on every line.", path=path, line=line, remedy=_MEND
            )
        yield line, [require_clean(column, "A column", path, line) for column in columns]


def read_quoted_columns(path: Path, width: int) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, columns) of a tab-separated file in which columns may be quoted, as csv writes them."""
    line = 0

    def follow() -> Iterator[str]:
        nonlocal line
        for number, text in read_lines(path):
            line = number
            yield text + "\n"

    csv.field_size_limit(_LONGEST_FIELD)  # the library's own limit is shorter than a long document
    try:
        for columns in csv.reader(follow(), delimiter="\t"):
            if len(columns) != width:
                raise DataError(f"{len(columns)} columns, not {width}.", path=path, line=line, remedy=_MEND)
            yield line, [require_clean(column, "A column", path, line) for column in columns]
    except csv.Error as error:
        raise DataError(f"Broken columns: {error}.", path=path, line=line, remedy="Close the quotes.") from error


def write_columns(stream: IO[str], tally: Counter[str], *columns: str) -> None:
    """Write a line of tab-separated columns."""
    stream.write("\t".join([flatten(column, tally) for column in columns]) + "\n")


def flatten(text: str, tally: Counter[str]) -> str:
    """Return a text with a blank for each tab and line break, and count it if it had one."""
    flat = BREAKS.sub(" ", text)
    tally[CHANGED] += flat != text
    return flat


def read_title(text: str) -> str:
    """Return a title of a tab-separated file, empty where there is none."""
    return "" if text == NO_TITLE else text


def write_objects(path: Path, values: Iterable[dict[str, Any]]) -> int:
    """Write JSON lines and return how many."""
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for value in values:
            stream.write(dump_json(value) + "\n")
            count += 1
    return count


def dump_json(value: Any) -> str:
    """Return a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False)


def _open_bytes(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _is_array(path: Path) -> bool:
    try:
        with _open_bytes(path) as stream:
            return stream.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return False  # whoever reads the lines says what is wrong


class _ArrayReader:
    """Reads the objects of a JSON array one by one; what is read is dropped from memory."""

    def __init__(self, path: Path, stream: IO[str]) -> None:
        self._path, self._stream = path, stream
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def _peek(self) -> str:
        """Pass over white space and return the next character, empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._move(space.end() if space else self._at)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_more()

    def read(self) -> Iterator[JsonObject]:
        """Yield the objects, each with the line that it begins on."""
        self._peek()
        self._move(self._at + 1)
        while self._peek() != "]":
            line, value = self._line, self._read_value()
            if not isinstance(value, dict):
                raise DataError("Not a JSON object.", path=self._path, line=line, remedy=_MEND)
            yield JsonObject(value, self._path, line)
            follower = self._peek()
            if follower == ",":
                self._move(self._at + 1)
                if self._peek() == "]":
                    raise self._fail("a comma without an object after it", self._at)
            elif follower != "]":
                raise self._fail("the array is cut off" if not follower else "no comma between objects", self._at)
        self._move(self._at + 1)
        if self._peek():
            raise self._fail("more than one array", self._at)

    def _read_value(self) -> Any:
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_END
                if self._ended or not cut:
                    raise self._fail(error.msg, error.pos) from error
                self._read_more()
            except (ValueError, RecursionError) as error:
                raise self._fail(str(error), self._at) from error
            else:
                self._move(end)
                return value

    def _move(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _read_more(self) -> None:
        """Read as much again as has not been understood yet, so that a large object costs linear time."""
        rest = self._text[self._at :]
        try:
            more = self._stream.read(max(_CHUNK, len(rest)))
        except UnicodeDecodeError as error:
            raise DataError(
                "Not UTF-8, here or after it.", path=self._path, line=self._line, remedy="Save it as UTF-8."
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                "The gzip file is broken or cut off.", path=self._path, line=self._line, remedy="Copy it again."
            ) from error
        self._text, self._at, self._ended = rest + more, 0, not more

    def _fail(self, what: str, at: int) -> DataError:
        line = self._line + self._text.count("\n", self._at, at)
        return DataError(f"Broken JSON: {what}.", path=self._path, line=line, remedy=_MEND)
