"""Progress bars and lines on the terminal: on standard error, bars only on a terminal, of the first process only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Move on by some steps and show a note beside the bar."""


@contextmanager
def show_progress(title: str, total: int) -> Iterator[Advance]:
    """Show a bar with its rate and the time left while the block runs."""
    if not sys.stderr.isatty() or _is_second():
        yield lambda steps=1, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda steps=1, note="": progress.update(task, advance=steps, note=note)


def say(text: str) -> None:
    """Write a line for the person who watches."""
    if _is_second():
        return
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _is_second() -> bool:
    """Return whether torchrun started this process beside a first one."""
    return os.environ.get("RANK", "0") != "0"
