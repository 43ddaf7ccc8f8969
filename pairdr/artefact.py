"""Output folders: written beside, hashed, made durable, renamed. Whole or absent.

An artefact is a folder with `manifest.json`, which names its kind, the options and inputs it was made from, and the
sha256 and size of every file in it. Its *fingerprint* is a hash of the files' hashes: two artefacts with the same
content have the same fingerprint, whatever the time and the place they were made at.

This module knows nothing of what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairdr.errors import ArtefactError, PairdrError, UsageError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        kind: what the folder holds, such as "candidates" or "vectors".
        options: the options it was made with.
        inputs: name of each input to its fingerprint.
        files: relative path to {"sha256", "bytes"}.
        facts: counts and measures that the stage wants kept.
        pairdr_version: the version that wrote it.
        format_version: the version of this layout.
    """

    kind: str
    options: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    pairdr_version: str
    format_version: int

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over kind, content and facts: equal content, equal fingerprint."""
        return hash_json([self.kind, sorted((n, entry["sha256"]) for n, entry in self.files.items()), self.facts])


@dataclass
class Staging:
    """A folder under construction: write files below `path`, put what is worth keeping into `facts`."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


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
def publish(
    folder: str | Path,
    kind: str,
    *,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    resume: bool = False,
) -> Iterator[Staging]:
    """Build an artefact beside its place and rename it there when the block ends well.

    When the block raises, what was there before stays as it was. With `resume`, an unfinished folder of an earlier
    call with the same options and inputs is taken up again; the caller checks the files it finds.

    Args:
        folder: where the artefact will stand; an earlier one there is replaced as a whole.
        kind: what it holds.
        options: what it is made with; kept in the manifest.
        inputs: name of each input to its fingerprint; kept in the manifest.
        resume: take up the files of an interrupted call.

    Raises:
        ArtefactError: the disk is full or the place cannot be written; the earlier artefact is still there.
        UsageError: something else than an artefact of this kind stands there.
    """
    folder = Path(folder)
    _require_replaceable(folder, kind)
    key = hash_json([kind, dict(options), dict(inputs), FORMAT_VERSION])[:16]
    staging = folder.parent / f".{folder.name}.{key if resume else 'new'}.partial"
    with explain_failed_writes(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _recover(folder)
            for stale in _find_partials(folder):
                if not (resume and stale == staging):
                    _discard(stale)
            staging.mkdir(exist_ok=resume)
            work = Staging(staging)
            yield work
            _seal(staging, kind, dict(options), dict(inputs), work.facts)
            _swap(staging, folder)
        except BaseException:
            if not resume:
                shutil.rmtree(staging, ignore_errors=True)
            _recover(folder)
            raise


def publish_version(
    folder: Path,
    kind: str,
    *,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    facts: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    """Let an artefact's manifest name other files of its folder, in one step: readers see the old set or the new one.

    Args:
        folder: where the artefact stands.
        kind: what it holds.
        options: what it was made with.
        inputs: name of each input to its fingerprint.
        facts: what is worth keeping.
        files: path below the folder to what `describe_file` gave.
    """
    from pairdr import __version__

    for name in files:
        with (folder / name).open("rb+") as stream:
            os.fsync(stream.fileno())
    for directory in {(folder / name).parent for name in files} | {folder}:
        _sync_directory(directory)
    entries = {name: dict(entry) for name, entry in sorted(files.items())}
    manifest = Manifest(kind, dict(options), dict(inputs), entries, dict(facts), __version__, FORMAT_VERSION)
    replace_file(folder / MANIFEST, json.dumps(vars(manifest), indent=1, ensure_ascii=False) + "\n")
    _sync_directory(folder)


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a file."""
    return {"sha256": hash_file(path), "bytes": path.stat().st_size}


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


def read_manifest(folder: str | Path, kind: str | None = None) -> Manifest:
    """Read an artefact's manifest and check that its files are there at their sizes.

    Raises:
        ArtefactError: the folder is missing, no artefact, of another kind or format, or a file is missing or cut.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    _recover(folder)
    if not path.is_file():
        raise ArtefactError(
            f"No {kind or 'artefact'} here: {MANIFEST} is missing.", path=folder, remedy="Run the stage that makes it."
        )
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.files.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtefactError(
            "The manifest cannot be read.", path=path, remedy="Delete the folder and run its stage again."
        ) from error
    if kind is not None and manifest.kind != kind:
        raise ArtefactError(
            f"This folder holds {manifest.kind!r}, not {kind!r}.", path=folder, remedy="Name the right folder."
        )
    if manifest.format_version != FORMAT_VERSION:
        raise ArtefactError(
            f"Format version {manifest.format_version} is not the {FORMAT_VERSION} that this pairdr reads.",
            path=folder,
            remedy="Run its stage again.",
        )
    for name, (size, _) in expected.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise ArtefactError(
                f"{name} is missing." if found is None else f"{name} has {found} bytes, the manifest says {size}.",
                path=folder,
                remedy="Delete the folder and run its stage again.",
            )
    return manifest


def verify_artefact(folder: str | Path) -> Manifest:
    """Check the sha256 of every file of an artefact.

    Raises:
        ArtefactError: naming the first file whose bytes are not those that were written.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        if hash_file(Path(folder) / name) != entry["sha256"]:
            raise ArtefactError(
                f"{name} is not the file that was written: its sha256 differs.",
                path=folder,
                remedy="Delete the folder and run its stage again.",
            )
    return manifest


def _require_replaceable(folder: Path, kind: str) -> None:
    """Refuse to replace what is not an artefact of this kind: publishing replaces the whole folder."""
    if folder.name in ("", "..") or (folder.exists() and not folder.is_dir()):
        raise UsageError("This is no place for an output folder.", path=folder, remedy="Name a new folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["kind"] if path.is_file() else None
    except (ValueError, TypeError, KeyError):
        found = kind  # a broken manifest of ours: the stage makes it anew
    if found != kind:
        raise UsageError(
            f"This folder holds {'other files' if found is None else repr(found)}; {kind!r} would replace them all.",
            path=folder,
            remedy="Choose another --output, or delete the folder.",
        )


def _seal(staging: Path, kind: str, options: dict[str, Any], inputs: dict[str, str], facts: dict[str, Any]) -> None:
    from pairdr import __version__

    files = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file() and p != staging / MANIFEST):
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
        files[path.relative_to(staging).as_posix()] = describe_file(path)
    manifest = Manifest(kind, options, inputs, files, facts, __version__, FORMAT_VERSION)
    write_json(staging / MANIFEST, vars(manifest))
    with (staging / MANIFEST).open("rb+") as stream:
        os.fsync(stream.fileno())
    for directory in [staging, *(p for p in staging.rglob("*") if p.is_dir())]:
        _sync_directory(directory)


def _swap(staging: Path, folder: Path) -> None:
    retired = _retired(folder)
    while staging.exists():
        if folder.exists():
            folder.rename(retired)
        try:
            staging.rename(folder)
        except OSError:
            # A reader has put the earlier one back in between: once more.
            if not folder.exists():
                raise
    _sync_directory(folder.parent)
    _discard(retired)


def _recover(folder: Path) -> None:
    """Put the earlier artefact back where a process was killed between the two renames of `_swap`."""
    if not folder.exists() and (_retired(folder) / MANIFEST).is_file():
        with contextlib.suppress(OSError):
            _retired(folder).rename(folder)


def _retired(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old.partial"


def _find_partials(folder: Path) -> list[Path]:
    name = re.compile(rf"\.{re.escape(folder.name)}\.(new|old|[0-9a-f]{{16}})\.partial")
    return [path for path in folder.parent.iterdir() if name.fullmatch(path.name)]


def _discard(folder: Path) -> None:
    """Delete a folder, manifest first, so that one half deleted is never taken for an artefact."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


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


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
