"""Output folders: written beside, hashed, made durable, renamed. Whole or absent.

An artefact is a folder with `manifest.json`, which names its kind, the options and inputs it was made from, and the
sha256 and size of every file in it but a README.md. Its *fingerprint* is a hash of the files' hashes: two artefacts
with the same content have the same fingerprint, whatever the time and the place they were made at, and whatever stood
there before. What people have put into such a folder is not replaced with it.

This module knows nothing of what the files mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pairdr.errors import ArtefactError, UsageError
from pairdr.files import (
    describe_file,
    explain_failed_writes,
    hash_file,
    hash_json,
    replace_file,
    sync_directory,
    write_json,
)

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
UNSEALED = "README.md"
"""A file for people, who may edit it: the manifest does not name it."""
VERSION = "version"
"""The fact that counts the versions of a folder. It and the number in the names of their files are history."""
T = TypeVar("T")
_AGAIN = "Delete the folder and run its stage again."
_LEFT = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\._.*|\.nfs.*|\.~lock\..*#|\..*\.sw[a-p]")
"""What systems and editors leave beside files."""
_LOOKS = 50  # at a place where a folder is about to be put, 10 ms apart


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
        """Return the sha256 over kind, content and facts: equal content, equal fingerprint, whichever version it is."""
        files = sorted((re.sub(r"^versions/\d+", "versions/", name), e["sha256"]) for name, e in self.files.items())
        return hash_json([self.kind, files, {name: fact for name, fact in self.facts.items() if name != VERSION}])


@dataclass
class Staging:
    """A folder under construction: write files below `path`, put what is worth keeping into `facts`."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def publish(
    folder: str | Path,
    kind: str,
    *,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    resume: bool = False,
    beside: Sequence[str] = (),
    edited: bool = False,
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
        beside: as `require_replaceable`.
        edited: as `require_replaceable`.

    Raises:
        ArtefactError: the disk is full or the place cannot be written; the earlier artefact is still there.
        UsageError: something else than an artefact of this kind stands there, or files of others in it.
    """
    folder = Path(folder)
    require_replaceable(folder, kind, beside=beside, edited=edited)
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
        sync_directory(directory)
    entries = {name: dict(entry) for name, entry in sorted(files.items())}
    manifest = Manifest(kind, dict(options), dict(inputs), entries, dict(facts), __version__, FORMAT_VERSION)
    replace_file(folder / MANIFEST, json.dumps(_seal_manifest(manifest), indent=1, ensure_ascii=False) + "\n")
    sync_directory(folder)


def read_manifest(folder: str | Path, kind: str | None = None) -> Manifest:
    """Read an artefact's manifest and check that its files are there at their sizes.

    Raises:
        ArtefactError: the folder is missing, no artefact, of another kind or format, or a file is missing or cut.
    """
    folder = Path(folder)
    text = _read_manifest_text(folder, kind)
    while True:
        manifest = _parse_manifest(text, folder / MANIFEST)
        if kind is not None and manifest.kind != kind:
            raise ArtefactError(
                f"This folder holds {manifest.kind!r}, not {kind!r}.", path=folder, remedy="Name the right folder."
            )
        problem = _find_missing(manifest, folder)
        if problem is None:
            return manifest
        before, text = text, _read_manifest_text(folder, kind)
        if text == before:  # else a newer version was published while the files were looked at
            raise ArtefactError(problem, path=folder, remedy=_AGAIN)


def read_whole(folder: str | Path, kind: str, read: Callable[[Manifest], T]) -> T:
    """Read an artefact's files, all of one version, even while another process replaces it.

    Args:
        folder: of the artefact.
        kind: what it holds.
        read: reads the files.

    Raises:
        ArtefactError: as `read_manifest`; and what `read` raises where nothing was replaced.
    """
    while True:
        manifest = read_manifest(folder, kind)
        try:
            found = read(manifest)
        except Exception:
            if read_manifest(folder, kind) == manifest:
                raise
        else:
            if read_manifest(folder, kind) == manifest:
                return found


def _read_manifest_text(folder: Path, kind: str | None) -> str:
    for _ in range(_LOOKS):
        _recover(folder)
        try:
            return (folder / MANIFEST).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            if not any(folder.parent.glob(f".{folder.name}.*")):  # nobody is about to put a new one in its place
                break
            time.sleep(0.01)
        except ValueError as error:
            raise ArtefactError("The manifest cannot be read.", path=folder / MANIFEST, remedy=_AGAIN) from error
    raise ArtefactError(
        f"No {kind or 'artefact'} here: {MANIFEST} is missing.", path=folder, remedy="Run the stage that makes it."
    )


def _parse_manifest(text: str, path: Path) -> Manifest:
    try:
        content = json.loads(text)
        seal, version = content.pop("seal", None), content["format_version"]
        if version != FORMAT_VERSION:
            raise ArtefactError(
                f"Format version {version} is not the {FORMAT_VERSION} that this pairdr reads.",
                path=path.parent,
                remedy="Run its stage again.",
            )
        if seal != hash_json(content):
            raise ArtefactError(
                "The manifest is not the one that was written: its seal differs.", path=path, remedy=_AGAIN
            )
        manifest = Manifest(**content)
        for entry in manifest.files.values():
            int(entry["bytes"]), str(entry["sha256"])
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtefactError("The manifest cannot be read.", path=path, remedy=_AGAIN) from error


def _seal_manifest(manifest: Manifest) -> dict[str, Any]:
    """Return what is written: everything, and a hash of everything, so that a flipped bit is found here too."""
    content: dict[str, Any] = json.loads(json.dumps(vars(manifest)))
    return content | {"seal": hash_json(content)}


def _find_missing(manifest: Manifest, folder: Path) -> str | None:
    for name, entry in manifest.files.items():
        if name == UNSEALED:  # of a pairdr that named it
            continue
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != entry["bytes"]:
            size = entry["bytes"]
            return f"{name} is missing." if found is None else f"{name} has {found} bytes, the manifest says {size}."
    return None


def verify_artefact(folder: str | Path) -> Manifest:
    """Check the sha256 of every file of an artefact.

    Raises:
        ArtefactError: naming the first file whose bytes are not those that were written.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        if name != UNSEALED and hash_file(Path(folder) / name) != entry["sha256"]:
            raise ArtefactError(
                f"{name} is not the file that was written: its sha256 differs.",
                path=folder,
                remedy=_AGAIN,
            )
    return manifest


def require_replaceable(folder: Path, kind: str, *, beside: Sequence[str] = (), edited: bool = False) -> None:
    """Refuse to replace what is not an artefact of this kind, or not it alone: publishing replaces the whole folder.

    Args:
        folder: where an artefact is to be put.
        kind: of it.
        beside: files that the stage itself keeps there, unsealed, and has looked after: a card, a table to mark.
        edited: people edit what such a folder holds: its files have to be those that were written.

    Raises:
        UsageError: something else stands there, or files that were put or changed there since.
    """
    if folder.name in ("", "..") or (folder.exists() and not folder.is_dir()):
        raise UsageError("This is no place for an output folder.", path=folder, remedy="Name a new folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    found, named = _read_claim(folder / MANIFEST)
    if found != kind:
        raise UsageError(
            f"This folder holds {'other files' if found is None else repr(found)}; {kind!r} would replace them all.",
            path=folder,
            remedy="Choose another --output, or delete the folder.",
        )
    ours = (MANIFEST, *beside)
    half = tuple(f".{name}." for name in ours)  # of a call of ours that was killed
    for path in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        name = path.relative_to(folder).as_posix()
        if name not in (*named, *ours) and not (_LEFT.fullmatch(path.name) or path.name.startswith(half)):
            raise UsageError(
                f"This folder also holds {name}, which would be lost with it.",
                path=folder,
                remedy="Move that file, or choose another --output.",
            )
        if edited and name in named and hash_file(path) != named[name]:
            raise UsageError(
                f"{name} was changed since it was written, and would be replaced.",
                path=folder,
                remedy="Choose another --output, or delete the folder.",
            )


def _read_claim(path: Path) -> tuple[str | None, dict[str, str]]:
    """Return the kind and the sha256 of each file that a manifest names, however else it is; None where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = str(content["kind"])
    except (OSError, ValueError, TypeError, KeyError):
        return None, {}
    try:
        return kind, {name: str(entry["sha256"]) for name, entry in content["files"].items()}
    except (TypeError, KeyError, AttributeError):
        return kind, {}


def _seal(staging: Path, kind: str, options: dict[str, Any], inputs: dict[str, str], facts: dict[str, Any]) -> None:
    from pairdr import __version__

    files = {}
    for path in sorted(
        p for p in staging.rglob("*") if p.is_file() and p not in (staging / MANIFEST, staging / UNSEALED)
    ):
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
        files[path.relative_to(staging).as_posix()] = describe_file(path)
    manifest = Manifest(kind, options, inputs, files, facts, __version__, FORMAT_VERSION)
    write_json(staging / MANIFEST, _seal_manifest(manifest))
    with (staging / MANIFEST).open("rb+") as stream:
        os.fsync(stream.fileno())
    for directory in [staging, *(p for p in staging.rglob("*") if p.is_dir())]:
        sync_directory(directory)


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
    sync_directory(folder.parent)
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
