"""Files: their hashes, replaced as a whole, locked, and what is said where the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pairdr.errors import ArtefactError, PairdrError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a file."""
    return {"sha256": hash_file(path), "bytes": path.stat().st_size}


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people: indented, sorted by nothing but the writer's order, ending in a newline."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_file(path: Path, text: str) -> None:
    """Replace a small file as a whole: a reader sees the old text or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def hold_lock(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; a killed process leaves no lock behind.

    Raises:
        BlockingIOError: with `wait` off, another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def explain_failed_writes(folder: Path) -> Iterator[None]:
    """Turn what the disk says into an error of ours while the block runs.

    Raises:
        ArtefactError: the disk is full or the place cannot be written.
    """
    try:
        yield
    except BaseException as error:
        reason = _explain_failed_write(error)
        if reason is None:
            raise
        raise ArtefactError(
            f"Writing failed: {reason}.",
            path=folder,
            remedy="Free some space or choose another place; what was there before is untouched.",
        ) from error


def sync_directory(path: Path) -> None:
    """Make durable which files a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain_failed_write(error: BaseException) -> str | None:
    """Return what the disk said, or None for an error that is not the disk's.

    On a full disk numpy raises an OSError without errno, and safetensors an error of its own.
    """
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return os.strerror(error.errno)
    if isinstance(error, PairdrError) or not re.search(
        r"No space left on device|requested and \d+ written", str(error)
    ):
        return None
    return os.strerror(errno.ENOSPC)
