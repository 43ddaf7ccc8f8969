"""What the page of a work folder shows, gathered from the folder and, for questions and labels, from its data.

Every part is there, or is `Absent` with the reason: a run that was interrupted, or had no teacher, has a page too.
How a part looks is the business of report_sections.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pairdr.artefact import MANIFEST, read_manifest
from pairdr.charts import Histogram
from pairdr.collection import Collection, open_collection
from pairdr.config import DataConfig
from pairdr.errors import ArtefactError, DataError, PairdrError, UsageError
from pairdr.formats import read_run
from pairdr.geometry import Geometry, measure_geometry
from pairdr.label import SCORES
from pairdr.lengths import Lengths, count_lengths
from pairdr.mine import read_candidates
from pairdr.origin import Origin, read_origin
from pairdr.parts import STATE
from pairdr.records import Run, positives_of
from pairdr.store_config import ReportConfig
from pairdr.table import MAIN, TITLES, Table, read_table, read_values
from pairdr.train import LOG
from pairdr.work import read_state

T = TypeVar("T")
BINS = 20
"""Bins of differences; an even number, so that none holds gains and losses both."""


@dataclass(frozen=True)
class Absent:
    """A part that is not there, and why."""

    why: str


@dataclass(frozen=True)
class Found:
    """A passage as it is shown: its text cut, and whether the labels call it relevant."""

    passage_id: str
    title: str
    text: str
    is_relevant: bool


@dataclass(frozen=True)
class Texts:
    """What there is to read of a query: the question, a labelled passage, and what both systems put first.

    `ranks` are the places of the first relevant passage, before and after; None where none was found.
    """

    question: str
    wanted: Found
    before: Found | None
    after: Found | None
    ranks: tuple[int | None, int | None]


@dataclass(frozen=True)
class Change:
    """One query before and after."""

    query_id: str
    before: float
    after: float
    texts: Texts | None


@dataclass(frozen=True)
class Changes:
    """PAIR against another system, query by query.

    Attributes:
        measure: the table's first one.
        against: the other system.
        better: queries.
        equal: queries.
        worse: queries.
        histogram: of the differences that are not 0.
        best: what gains most.
        worst: what loses most.
    """

    measure: str
    against: str
    better: int
    equal: int
    worse: int
    histogram: Histogram
    best: tuple[Change, ...]
    worst: tuple[Change, ...]


@dataclass(frozen=True)
class Stage:
    """The log of one training stage.

    Attributes:
        name: of the stage.
        alpha: weight of the passage-centric loss.
        lines: of the log, one every so many steps.
        taken: the step whose model was taken: the last one, or the best on dev where that was asked for.
    """

    name: str
    alpha: float
    lines: list[dict[str, Any]]
    taken: int


@dataclass(frozen=True)
class Teaching:
    """Facts of teacher, examples and candidates as their manifests have them, and the teacher's scores."""

    teacher: dict[str, Any]
    examples: dict[str, Any]
    negatives: dict[str, int]
    scores: Histogram | Absent


@dataclass(frozen=True)
class DataFacts:
    """What `check` found, and lengths of passages and queries."""

    warnings: list[str]
    facts: dict[str, Any]
    passages: Lengths | Absent
    queries: Lengths | Absent


@dataclass(frozen=True)
class StepFacts:
    """What is recorded of a finished step; memory in bytes, None where an earlier pairdr did not record it."""

    name: str
    fingerprint: str
    seconds: float
    at: str
    memory: int | None
    device_memory: int | None
    environment: dict[str, str] | None


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    name: str
    table: Table | Absent
    changes: Changes | Absent
    stages: tuple[Stage, ...] | Absent
    teaching: Teaching | Absent
    geometry: Geometry | Absent
    data: DataFacts | Absent
    steps: tuple[StepFacts, ...]
    origin: Origin | Absent
    weights: dict[str, str | Absent]
    """Model to the sha256 of its weights."""


def gather_report(work: Path, config: ReportConfig, data: Path | None = None) -> Report:
    """Read all that the page shows.

    Args:
        work: a work folder of `pairdr run`, finished or not.
        config: what is shown, and how much of it.
        data: the folder of its data; None is where they were.

    Raises:
        ArtefactError: this is no work folder.
        DataError: `data` is not what the run was made of.
        UsageError: PAIR is to be compared with a system that the table does not have.
    """
    if not (work / STATE).is_file():
        raise ArtefactError("This is no work folder of pairdr run.", path=work, remedy="Name the folder of its -o.")
    origin = _gather(lambda: read_origin(work))
    collection = _gather(lambda: _open_data(work, origin, data))
    if data is not None and isinstance(collection, Absent):
        raise DataError(collection.why, path=data, remedy="Name the data of the run, or leave --data out.")
    table = _gather(lambda: read_table(work / "report"))
    systems = list(TITLES) if isinstance(table, Absent) else [row.system for row in table.rows]
    if config.against not in systems:
        others = ", ".join(system for system in systems if system != MAIN)
        raise UsageError(f"{config.against} is not in this table.", remedy=f"--against can be: {others}.")
    models = [name for name in systems if (work / "models" / name).is_dir()]
    return Report(
        name=work.resolve().name,
        table=table,
        changes=_gather(lambda: compare_queries(work, _need(table), collection, config)),
        stages=_gather(lambda: read_stages(work)),
        teaching=_gather(lambda: read_teaching(work)),
        geometry=_gather(lambda: _measure_geometry(work, _need(collection), models, origin, config)),
        data=_gather(lambda: read_data_facts(work, collection, config)),
        steps=read_steps(work),
        origin=origin,
        weights={name: _gather(partial(_read_weights, work / "models" / name)) for name in models},
    )


def compare_queries(work: Path, table: Table, collection: Collection | Absent, config: ReportConfig) -> Changes:
    """Return what changed from another system to PAIR, query by query, by the table's first measure."""
    measure = next(iter(table.rows[0].means))
    before, after = (read_values(work / "report", system)[measure] for system in (config.against, MAIN))
    ordered = sorted(after, key=lambda query_id: (before[query_id] - after[query_id], query_id))
    differences = np.array([after[query_id] - before[query_id] for query_id in ordered])
    moved = differences[differences != 0]
    reach = float(np.abs(moved).max(initial=1e-9))
    counts, edges = np.histogram(moved, BINS, range=(-reach, reach))
    best = [query_id for query_id in ordered if after[query_id] > before[query_id]][: config.shown_queries]
    worst = [query_id for query_id in ordered[::-1] if after[query_id] < before[query_id]][: config.shown_queries]
    runs = tuple(read_run(work / "runs" / table.split / system / "run.arrow") for system in (config.against, MAIN))

    def show(query_id: str) -> Change:
        texts = None if isinstance(collection, Absent) else _read_texts(query_id, runs, table.split, collection, config)
        return Change(query_id, before[query_id], after[query_id], texts)

    return Changes(
        measure=measure,
        against=config.against,
        better=int((differences > 0).sum()),
        equal=int((differences == 0).sum()),
        worse=int((differences < 0).sum()),
        histogram=Histogram(edges.tolist(), {"queries": counts.tolist()}),
        best=tuple(map(show, best)),
        worst=tuple(map(show, worst)),
    )


def read_stages(work: Path) -> tuple[Stage, ...]:
    """Return the logs of PAIR's stages that have ended, in order.

    Raises:
        ArtefactError: none has.
    """
    places = [*sorted((work / "models").glob(f"{MAIN}.stage[0-9]")), work / "models" / MAIN]
    places = [place for place in places if (place / MANIFEST).is_file()] or places
    stages = []
    for place in places:
        facts = read_manifest(place, "model").facts["stages"][-1]
        lines = [json.loads(line) for line in (place / LOG).read_text(encoding="utf-8").splitlines()]
        taken = lines[-1]["step"]
        lines = [line for line in lines if not line.get("chosen")]
        stages.append(Stage(facts["name"], facts["alpha"], lines, taken))
    return tuple(stages)


def read_teaching(work: Path) -> Teaching:
    """Return how the labels came about.

    Raises:
        ArtefactError: nothing was labelled here.
    """
    examples = work / "examples"
    facts = read_manifest(examples, "examples").facts
    scores: Histogram | Absent
    if (examples / SCORES).is_file():
        counts = json.loads((examples / SCORES).read_text(encoding="utf-8"))
        scores = Histogram(counts.pop("edges"), counts)
    elif facts["teacher"] is None:
        scores = Absent(f"No teacher labelled: {facts['note']}.")
    else:
        scores = Absent("These examples were labelled by an earlier pairdr, which did not keep the scores.")
    return Teaching(
        read_manifest(work / "teacher", "teacher").facts,
        facts,
        read_manifest(work / "candidates", "candidates").facts["negatives"],
        scores,
    )


def read_data_facts(work: Path, collection: Collection | Absent, config: ReportConfig) -> DataFacts:
    """Return what `check` found, and how long the texts are in tokens of the start model.

    Raises:
        ArtefactError: the data were not checked.
    """
    read_manifest(work / "check", "check")
    found = json.loads((work / "check" / "report.json").read_text(encoding="utf-8"))

    start = work / "models" / "start"
    passages = _gather(lambda: count_lengths(_need(collection), "passage", start, config))
    queries = _gather(lambda: count_lengths(_need(collection), "query", start, config))
    return DataFacts(found["warnings"] + found["errors"], found["facts"], passages, queries)


def read_steps(work: Path) -> tuple[StepFacts, ...]:
    """Return what is recorded of the finished steps, in the order they ended in."""
    steps = [
        StepFacts(
            name,
            str(record["fingerprint"]),
            float(record["seconds"]),
            str(record["at"]),
            record.get("memory"),
            record.get("device_memory"),
            record.get("environment"),
        )
        for name, record in read_state(work).items()
    ]
    return tuple(sorted(steps, key=lambda step: step.at))  # stable: equal times keep the order of the record


def _gather(read: Callable[[], T]) -> T | Absent:
    """Return what is read, or why it cannot be; a damaged file costs its part of the page, not the page."""
    try:
        return read()
    except PairdrError as error:
        return Absent(" ".join([error.what, *([error.remedy] if error.remedy else [])]))
    except (OSError, KeyError, IndexError, ValueError, TypeError):
        return Absent("A file of this part cannot be read.")


def _need(part: T | Absent) -> T:
    if isinstance(part, Absent):
        raise ArtefactError(part.why)
    return part


def _open_data(work: Path, origin: Origin | Absent, data: Path | None) -> Collection:
    """Open the data of a run, and refuse others; of a run that recorded no options, only the corpus is compared."""
    if isinstance(origin, Origin):
        collection = open_collection(data or origin.data, origin.config.data, strict=False)
        is_same = collection.fingerprint == origin.collection
    elif data is not None:
        collection = open_collection(data, DataConfig(), strict=False)
        is_same = collection.passages_fingerprint == read_manifest(work / "bm25", "bm25").inputs["passages"]
    else:
        raise UsageError("Where the data are was not recorded.", remedy="Name their folder as --data.")
    if not is_same:
        raise DataError("The data are not those of this run any more.", remedy="Name those as --data.")
    return collection


def _measure_geometry(
    work: Path, collection: Collection, models: Sequence[str], origin: Origin | Absent, config: ReportConfig
) -> Geometry:
    ranked = read_candidates(work / "candidates").merged
    device = origin.config.model.device if isinstance(origin, Origin) else None
    return measure_geometry(work, collection, ranked, models, config, device)


def _read_weights(model: Path) -> str:
    return str(read_manifest(model, "model").facts["weights_sha256"])


def _read_texts(
    query_id: str, runs: Sequence[Run], split: str, collection: Collection, config: ReportConfig
) -> Texts | None:
    relevant = positives_of(collection.qrels(split), query_id)
    if not relevant:
        return None
    hits = [[hit.passage_id for hit in run[query_id]] if query_id in run else [] for run in runs]
    ranks = [next((at for at, found in enumerate(ids, start=1) if found in relevant), None) for ids in hits]

    def show(passage_id: str) -> Found:
        passage = collection.passage(passage_id)
        text = cut_text(passage.text, config.shown_characters)
        return Found(passage_id, cut_text(passage.title, config.shown_characters), text, passage_id in relevant)

    before, after = (show(ids[0]) if ids else None for ids in hits)
    question = cut_text(collection.query(query_id).text, config.shown_characters)
    return Texts(question, show(relevant[0]), before, after, (ranks[0], ranks[1]))


def cut_text(text: str, most: int) -> str:
    """Return a text of at most so many characters, its end marked where it was cut."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
