"""`pairdr reproduce`: a finished run once more, into another folder, and what differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pairdr.check import check_collection
from pairdr.collection import Collection, open_collection
from pairdr.config import RunConfig
from pairdr.errors import ArtefactError, DataError, UsageError
from pairdr.files import hash_file, replace_file
from pairdr.origin import DATA_FILE, OPTIONS_FILE, Origin, make_absolute, read_origin
from pairdr.parts import STATE
from pairdr.pipeline import run_pipeline
from pairdr.table import TITLES, Table, read_table
from pairdr.vectors import VectorStore
from pairdr.work import read_state

CLAIM = "reproduces.json"
"""Of which run a work folder is made: hashes of its options and of what it says of its data."""


@dataclass(frozen=True)
class StepPair:
    """A step's fingerprint then and now; None where it is not recorded.

    Attributes:
        name: of the step.
        then: of the run that is made again.
        now: of the new one.
        difference: in words, where both made vectors of the same passages and not the same ones; else empty.
    """

    name: str
    then: str | None
    now: str
    difference: str = ""

    @property
    def is_equal(self) -> bool:
        """Return whether both runs made the same."""
        return self.then == self.now


@dataclass(frozen=True)
class Reproduction:
    """A run and the same run once more.

    Attributes:
        data: fingerprints of the data, then and now.
        versions: of what differs, the values then and now.
        steps: in the order of the run.
        measures: system to measure to its means, then and now.
    """

    data: tuple[str, str]
    versions: dict[str, tuple[str, str]]
    steps: tuple[StepPair, ...]
    measures: dict[str, dict[str, tuple[float | None, float]]]

    @property
    def is_equal(self) -> bool:
        """Return whether every step made the same from the same data."""
        return self.data[0] == self.data[1] and all(step.is_equal for step in self.steps)

    def format(self) -> str:
        """Return what is equal and what differs, as plain text."""
        lines = [f"{'data':28}{_say_pair(*self.data)}"]
        for step in self.steps:
            lines.append(f"{step.name:28}{_say_pair(step.then, step.now)}")
            if step.difference:
                lines.append(f"{'':28}{step.difference}")
        lines += ["", *(f"{name:28}{then} -> {now}" for name, (then, now) in self.versions.items())]
        lines.append("" if self.versions else "versions and machine are those of then")
        names = list(next(iter(self.measures.values())))
        lines += ["", f"{'then -> now':26}" + "".join(f"{name:>20}" for name in names)]
        for system, means in self.measures.items():
            cells = "".join(f"{_say_means(*means[name]):>20}" for name in names)
            lines.append(f"{TITLES[system]:26}{cells}")
        equal = sum(step.is_equal for step in self.steps)
        verdict = "Reproduced: every step made the same." if self.is_equal else "Not the same."
        return "\n".join([*lines, "", f"{verdict} {equal} of {len(self.steps)} steps are equal."])


def reproduce_run(source: str | Path, output: str | Path, data: str | Path | None = None) -> Reproduction:
    """Run a finished run again with its options and seeds, and compare.

    Args:
        source: a work folder of `pairdr run`, or a manifest or folder in it.
        output: the new work folder; one that an interrupted call left is gone on with.
        data: other data, or the same at another place; None takes those of then, which must not have changed.

    Raises:
        ArtefactError: no finished run there.
        DataError: the data have changed, or are no longer there.
        UsageError: `output` is the run itself, or another one.
    """
    work = find_work(Path(source))
    output = Path(output)
    if output.resolve() == work.resolve() or work.resolve() in output.resolve().parents:
        raise UsageError("This is the run that is to be made again.", path=output, remedy="Choose another --output.")
    origin = read_origin(work)
    collection = open_again(origin, work, None if data is None else Path(data))
    config = replace(origin.config, data=collection.config)
    _claim_output(output, work, config)
    result = run_pipeline(collection, output, config)
    return compare_runs(work, output, result.table, (origin.collection, collection.fingerprint))


def find_work(source: Path) -> Path:
    """Return the finished work folder that a path names or lies in.

    Raises:
        ArtefactError: there is none.
    """
    for place in (source, *source.resolve().parents):
        if (place / OPTIONS_FILE).is_file():
            return place
    raise ArtefactError(
        f"This lies in no finished work folder: there is no {OPTIONS_FILE}.",
        path=source,
        remedy="Name the folder of a pairdr run that has ended.",
    )


def open_again(origin: Origin, work: Path, data: Path | None) -> Collection:
    """Open a run's data once more.

    Args:
        origin: what the run came from.
        work: its work folder.
        data: data that were asked for, which may be others; None takes those of then and refuses changed ones.

    Raises:
        DataError: the data have changed, naming what of them, or are no longer there.
    """
    if data is None and not origin.data.is_dir():
        raise DataError("The data of this run are no longer here.", path=origin.data, remedy="Name them as --data.")
    collection = open_collection(data or origin.data, _move_files(origin, data).data, strict=False)
    if data is None and collection.fingerprint != origin.collection:
        raise DataError(
            f"The data have changed since: {_find_changes(work, collection, origin)}.",
            path=origin.data,
            remedy="Bring them back; or name data as --data, which may be others.",
        )
    return collection


def compare_runs(then: Path, now: Path, table: Table, data: tuple[str, str]) -> Reproduction:
    """Compare two finished work folders.

    Args:
        then: the first run's.
        now: the second run's.
        table: of the second run.
        data: fingerprints of the data, then and now.
    """
    old, new = read_state(then), read_state(now)
    before = {row.system: row.means for row in read_table(then / "report").rows}
    return Reproduction(
        data=data,
        versions=_compare_versions(old, new),
        steps=tuple(_compare_step(name, old, new, then, now) for name in new),
        measures={
            row.system: {name: (before.get(row.system, {}).get(name), mean) for name, mean in row.means.items()}
            for row in table.rows
        },
    )


def _claim_output(output: Path, work: Path, config: RunConfig) -> None:
    """Write into the new work folder of which run it is made.

    Args:
        output: the new work folder.
        work: the run that is made again.
        config: what it is made with.

    Raises:
        UsageError: a run stands there that was not made again from this one.
    """
    text = json.dumps({name: hash_file(work / name) for name in (OPTIONS_FILE, DATA_FILE)}, indent=1) + "\n"
    path = output / CLAIM
    ours = path.is_file() and path.read_text(encoding="utf-8") == text
    ended = (output / OPTIONS_FILE).is_file()
    if ours and (not ended or read_origin(output).config == make_absolute(config)):  # nothing else was run here since
        return
    if (output / STATE).exists():
        raise UsageError(
            "Another run stands here, which this one would replace.", path=output, remedy="Choose another --output."
        )
    output.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)


def _compare_step(name: str, old: Mapping[str, Any], new: Mapping[str, Any], then: Path, now: Path) -> StepPair:
    pair = StepPair(name, old.get(name, {}).get("fingerprint"), new[name]["fingerprint"])
    places = [folder / "vectors" / name.removeprefix("encode ") for folder in (then, now)]
    if pair.is_equal or not name.startswith("encode "):
        return pair
    try:
        return replace(pair, difference=_compare_vectors(*(VectorStore(place) for place in places)))
    except ArtefactError:  # the vectors of then are gone
        return pair


def _compare_vectors(then: VectorStore, now: VectorStore) -> str:
    """Return in words how far vectors of the same passages are apart, and whether they came about at once.

    Nothing is said where they are of other passages, or of another width.
    """
    if (then.live, then.dimensions) != (now.live, now.dimensions):
        return ""
    gap = 0.0
    for start, vectors in then.read_blocks():
        rows = np.arange(start, start + len(vectors))
        alive = np.ones(len(rows), dtype=np.bool_) if then.alive is None else then.alive[rows]
        others = now.rows_of(then.ids_of(rows[alive]))
        if (others < 0).any():
            return ""
        gap = max(gap, float(np.abs(vectors[alive] - now.take(others)).max(initial=0)))
    found = f"of the same {then.live} passages, " + (f"at most {gap:.1e} apart" if gap else "with equal numbers")
    return found if then.version == 1 else f"{found}; then they came about in {then.version} versions"


def _move_files(origin: Origin, data: Path | None) -> RunConfig:
    """Return the options; files that lay among the data are looked for among those that are named now."""
    config = origin.config
    if data is None:
        return config

    def move(path: Path) -> Path:
        return data / path.relative_to(origin.data) if path.is_relative_to(origin.data) else path

    held_out = config.data.held_out
    moved = replace(
        config.data,
        unlabelled=tuple(map(move, config.data.unlabelled)),
        labelled=tuple(map(move, config.data.labelled)),
        held_out=None if held_out is None else move(held_out),
    )
    return replace(config, data=moved)


def _find_changes(work: Path, collection: Collection, origin: Origin) -> str:
    """Return in words what of the data is no longer as the first run's check found it."""
    then = json.loads((work / "check" / "report.json").read_text(encoding="utf-8"))["facts"]
    now = check_collection(collection, origin.config.model).facts
    changes = [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]
    if not changes:
        same = collection.passages_fingerprint == origin.passages
        changes = ["questions or labels, in equal numbers" if same else "the corpus, in equal numbers"]
    return ", ".join(changes)


def _compare_versions(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return what differs of the environments; a run whose steps ran in several has all their values."""

    def collect(state: Mapping[str, Any]) -> dict[str, str]:
        found: dict[str, dict[str, None]] = {}
        for name in new:
            for key, value in state.get(name, {}).get("environment", {}).items():
                found.setdefault(key, {})[str(value)] = None
        return {key: ", ".join(values) for key, values in found.items()}

    then, now = collect(old), collect(new)
    names = [*now, *(name for name in then if name not in now)]
    pairs = {name: (then.get(name, "not recorded"), now.get(name, "none")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _say_pair(then: str | None, now: str) -> str:
    if then == now:
        return f"equal       {now[:12]}"
    return f"different   {then[:12] if then else 'not recorded'} -> {now[:12]}"


def _say_means(then: float | None, now: float) -> str:
    if then is None:
        return f"- -> {now:.4f}"
    return f"{now:.4f}" if then == now else f"{then:.4f} -> {now:.4f}"
