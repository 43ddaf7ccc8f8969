"""What people see: results on standard output; bars and lines on standard error, of the first process only."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Task


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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.0f}/s" if task.speed else "")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
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


def print_text(text: str) -> None:
    """Print a result at once, whoever reads."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_facts(facts: dict[str, Any]) -> None:
    """Print names and values, a line each."""
    print_text("\n".join(f"{name:44}{value}" for name, value in facts.items()))


def quiet_libraries() -> None:
    """Turn off the libraries' own bars and advice, of those that are loaded and of those that will be."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # of databases' clients
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


def _is_second() -> bool:
    """Return whether torchrun started this process beside a first one."""
    return os.environ.get("RANK", "0") != "0"
