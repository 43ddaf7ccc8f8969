"""Lines of text files, here or at a URL: read as they come, with file and line in every error."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from pairdr.errors import DataError, MissingExtraError, PairdrError, UsageError

_URL = re.compile(r"(?:^|(?<=::))([A-Za-z][A-Za-z0-9+.-]+):/+")
_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):(?!:|\d+/)(?:(?!::)\S)*@")
_STAMPS = ("ETag", "etag", "md5Hash", "CRC", "LastModified", "last_modified", "Last-Modified", "updated", "mtime")
"""What file systems of fsspec call the hash of a file, or the time when it was last changed."""
_BUFFER = 2**20


class UrlPath:
    """A file or folder of whatever fsspec opens: `s3://bucket/data`, `zip://data::file.zip`, `memory://data`.

    It has those methods of `Path` that reading data needs. As text it is without the password in it.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        first, _, self._container = self.url.partition("::")
        self._first = first

    def __str__(self) -> str:
        return _hide_password(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlPath) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> UrlPath:
        gap = "" if self._first.endswith("/") else "/"
        return UrlPath(f"{self._first}{gap}{name}" + (f"::{self._container}" if self._container else ""))

    @property
    def name(self) -> str:
        """Return the last part of the path; of an archive's root, the archive's name."""
        inner = self._first.rpartition("/")[2]
        return inner or (UrlPath(self._container).name if self._container else self._first.rstrip(":/"))

    @property
    def suffix(self) -> str:
        """Return the ending of the name."""
        return Path(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        """Return all endings of the name."""
        return Path(self.name).suffixes

    @property
    def stem(self) -> str:
        """Return the name without its ending."""
        return Path(self.name).stem

    def resolve(self) -> UrlPath:
        """Return this one: a URL is absolute."""
        return self

    def is_file(self) -> bool:
        """Return whether there is such a file."""
        with self._explain():
            system, path = self._system
            return bool(system.isfile(path))

    def glob(self, pattern: str) -> list[UrlPath]:
        """Return the files in this folder whose names fit."""
        with self._explain():
            system, path = self._system
            found = system.glob(f"{path.rstrip('/')}/{pattern}")
        return [self / name for name in sorted(str(path).rpartition("/")[2] for path in found)]

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open the file; it is read as a stream."""
        with self._explain():
            system, path = self._system
            return io.BufferedReader(system.open(path, mode), _BUFFER)

    def stamp(self) -> list[Any]:
        """Return what changes when the file does: its size, and its hash or time."""
        with self._explain():
            system, path = self._system
            info = system.info(path)
        known = [str(info[key]) for key in (*_STAMPS, "created") if info.get(key) is not None]
        # Where nothing is known but the size, no earlier conversion can be trusted.
        return [str(self), info.get("size"), known[0] if known else time.time_ns()]

    @cached_property
    def _system(self) -> tuple[Any, str]:
        """Return the file system, which is open as long as this is there, and the path in it."""
        try:
            import fsspec
        except ImportError as error:
            raise MissingExtraError("fsspec", "ray") from error
        system, path = fsspec.url_to_fs(self.url)
        return system, str(path)

    @contextlib.contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except PairdrError:
            raise
        except ImportError as error:
            raise UsageError(
                f"A package is missing: {error}.", path=str(self), remedy="Install it beside pairdr."
            ) from error
        except Exception as error:  # each file system has errors of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UsageError(
                f"The place cannot be read: {_hide_password(reason)}.",
                path=str(self),
                remedy="Check the URL and your rights to it.",
            ) from None  # the cause's own text may hold a password


def _hide_password(text: str) -> str:
    return _PASSWORD.sub(r"\1:***@", text)


Place = Path | UrlPath
"""Where data are."""


def find_place(name: str | Path) -> Place:
    """Return the place that is named: a URL of fsspec, else a path.

    A URL that was taken for a path, and lost a slash, is a URL again.
    """
    if not _URL.match(str(name)) or Path(name).exists():
        return Path(name)
    return UrlPath(_URL.sub(lambda found: f"{found[1]}://" + "/" * (found[1] in ("file", "local")), str(name)))


def stamp_place(path: Place) -> list[Any]:
    """Return what changes when a file does."""
    if isinstance(path, UrlPath):
        return path.stamp()
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]


def copy_file(source: Place, target: Path) -> None:
    """Copy a file as it is; the folder that it comes into is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as stream, target.open("wb") as sink:
        shutil.copyfileobj(stream, sink)


def read_lines(path: Place) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of a UTF-8 file, gzipped or not; empty lines are passed over.

    Raises:
        UsageError: there is no such file.
        DataError: bytes that are no UTF-8, or a truncated gzip file.
    """
    if not path.is_file():
        raise UsageError("There is no such file.", path=path, remedy="Check the path.")
    number = 0
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
            for number, line in enumerate(stream, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise DataError(
            f"Not UTF-8 (byte 0x{error.object[error.start]:02x}).", path=path, line=number, remedy="Save it as UTF-8."
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            "The gzip file is broken or cut off.", path=path, line=number + 1, remedy="Copy it again."
        ) from error


def read_jsonl(path: Place) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON-lines file.

    Raises:
        DataError: a line that is no JSON object.
    """
    for number, text in read_lines(path):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"Broken JSON: {error}.", path=path, line=number, remedy="Mend or remove the line."
            ) from error
        if not isinstance(value, dict):
            raise DataError("Not a JSON object.", path=path, line=number, remedy='Write {"_id": ..., "text": ...}.')
        yield number, value
