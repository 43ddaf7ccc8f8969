"""Runs of a study: each made once, by one process, in a folder of its own, and kept as a small file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pairdr.files import hold_lock, replace_file

RESULTS = Path(__file__).parents[1] / "docs" / "study"


class HoursSpentError(Exception):
    """No further run is begun."""


class TakenError(Exception):
    """Another process makes this run."""


def make_run(result: Path, place: Path, make: Callable[[Path], dict[str, Any]], hours: float) -> dict[str, Any]:
    """Make a run, or read what was found.

    Args:
        result: the file that keeps what is found.
        place: the run's folder, which goes when the run has ended.
        make: makes the run in that folder.
        hours: processor hours after which none is begun.

    Raises:
        HoursSpentError: it is not there, and the hours are spent.
        TakenError: it is not there yet.
    """
    if not result.is_file():
        if sum_hours(result.parent) >= hours:
            raise HoursSpentError
        try:
            with hold_lock(place, wait=False):
                with count_cost(place / "cost.json") as cost:
                    found = make(place)
                write_result(result, found | cost)
                shutil.rmtree(place)
        except BlockingIOError as error:
            raise TakenError from error
    read: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return read


def make_all(results: Path, runs: Iterable[Callable[[], Any]]) -> None:
    """Make all runs, each time the first that is not there and that no other process makes."""
    waiting = list(runs)
    while _make_next(results, waiting):
        pass


def _make_next(results: Path, runs: Iterable[Callable[[], Any]]) -> bool:
    """Make a run; return whether there was one to make."""
    before = len(list_results(results))
    for run in runs:
        with suppress(TakenError):
            run()
        if len(list_results(results)) > before:
            return True
    return False


@contextmanager
def count_cost(place: Path) -> Iterator[dict[str, float]]:
    """Yield what the block costs, in hours, and what it cost before where it was interrupted; known after it."""
    cost = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"cpu_hours": 0.0, "wall_hours": 0.0}
    begin, wall = time.process_time(), time.time()
    try:
        yield cost
    finally:
        cost["cpu_hours"] += (time.process_time() - begin) / 3600
        cost["wall_hours"] += (time.time() - wall) / 3600
        replace_file(place, json.dumps(cost))


def write_result(place: Path, found: dict[str, Any]) -> None:
    """Write what was found of a run, a line for each thing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    replace_file(place, json.dumps(found, indent=1) + "\n")


def list_results(results: Path) -> list[Path]:
    """Return the files of all runs, those for dev alone and the start among them."""
    return list(results.glob("*.json"))


def sum_hours(results: Path) -> float:
    """Return the processor hours that all runs have cost so far."""
    return sum(json.loads(place.read_text(encoding="utf-8")).get("cpu_hours", 0.0) for place in list_results(results))
