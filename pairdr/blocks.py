"""Blocks of a long step's work, kept beside its output until that is published: a killed call goes on from them.

    OUTPUT.parts/KEY/student-00003.arrow     KEY is a hash of all that decides what is in the blocks

A block is written whole or not at all. Blocks of other inputs are removed when a call begins, all of them when one has
published what they are for; whatever else stands there is left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pairdr.errors import BusyError
from pairdr.files import explain_failed_writes, hash_json, hold_lock, sync_directory

_KEY = re.compile(r"[0-9a-f]{24}")


class Blocks:
    """The finished blocks of a step. Made by `keep_blocks`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        """Return whether a block is there."""
        return (self.folder / name).is_file()

    def make(self, name: str, write: Callable[[Path], None]) -> Path:
        """Return the file of a block; `write` makes it where it is not there."""
        path, beside = self.folder / name, self.folder / f".{name}"
        if not path.is_file():
            try:
                write(beside)
                with beside.open("rb+") as stream:
                    os.fsync(stream.fileno())
                beside.replace(path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            sync_directory(self.folder)
        return path


@contextlib.contextmanager
def keep_blocks(output: str | Path, inputs: Any) -> Iterator[Blocks]:
    """Keep blocks beside an output while a step makes it; they are removed when the block ends well.

    Args:
        output: what the step publishes inside the block.
        inputs: all that decides what is in the blocks, as JSON values.

    Raises:
        BusyError: another call makes the same output.
        ArtefactError: the disk is full.
    """
    output = Path(output)
    place = output.parent / f"{output.name}.parts"
    folder = place / hash_json(inputs)[:24]
    with explain_failed_writes(output):
        try:
            with hold_lock(place, wait=False):
                for other in place.iterdir():
                    if other != folder and _KEY.fullmatch(other.name):
                        shutil.rmtree(other)
                folder.mkdir(exist_ok=True)
                yield Blocks(folder)
                shutil.rmtree(folder)
                with contextlib.suppress(OSError):  # something else is in it, which stays
                    place.rmdir()
        except BlockingIOError as error:
            raise BusyError(output) from error
