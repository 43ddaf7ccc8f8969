"""`pairdr run` and `pairdr demo`: one loop over the table of steps (steps.py).

A step is skipped when its options, its inputs' fingerprints and the format version are those it was made with. So a
second call does nothing, a changed option runs again only what depends on it, and an interrupted call goes on at the
step that was under way.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pairdr.artefact import read_manifest, verify_artefact
from pairdr.collection import Collection, open_collection
from pairdr.config import DataConfig, LexicalConfig, ModelConfig, RunConfig, TrainConfig
from pairdr.costs import GIB, Cost, measure_costs
from pairdr.errors import ArtefactError, UsageError
from pairdr.files import replace_file
from pairdr.makers import FUSED, renew_cards, table_split
from pairdr.measures import parse_measures
from pairdr.origin import write_origin
from pairdr.parts import WORK_FILE
from pairdr.progress import say
from pairdr.steps import list_steps, list_trained
from pairdr.table import Table, read_table
from pairdr.work import Work

DEMO = RunConfig(
    data=DataConfig(hide_labels=1 / 3),
    model=ModelConfig(start="minilm", query_length=64, passage_length=64),
    lexical=LexicalConfig(split_names=True),
    train=TrainConfig(max_steps=50, dropout=0.0),
    arms=("labelled_only", "pair"),
)
"""The demo's options, chosen for minutes on two cores: short texts, few steps, no dropout (a sixth of a step)."""


@dataclass(frozen=True)
class RunResult:
    """What a run ended with."""

    work: Path
    table: Table
    steps_run: tuple[str, ...]


def run_pipeline(
    data: str | Path | Collection, output: str | Path, config: RunConfig | None = None, **changes: Any
) -> RunResult:
    """Walk the whole way: check, mine, teach, label, train, encode, search, evaluate.

    Args:
        data: a BEIR folder, or a collection that is open.
        output: the work folder.
        config: all options.
        **changes: options of the start model, such as `start="..."`, on top of `config`.

    Returns:
        The table, and the names of the steps that ran.

    Raises:
        PairdrError: with what is wrong and the way out; what was finished stays.
    """
    config = config or RunConfig()
    config = replace(config, model=replace(config.model, **changes))
    collection = data if isinstance(data, Collection) else open_collection(data, config.data, strict=False)
    work = Work(output, collection, config)
    require_depth(config)
    with work.lock():
        ran = run_steps(work)
        _write_work_file(work)
        write_origin(work.folder, config, collection)
        renew_cards(work, list_trained(work))
    return RunResult(work.folder, read_table(work.path("report")), tuple(ran))


def run_demo(output: str | Path, arms: tuple[str, ...] = DEMO.arms) -> RunResult:
    """Build the documentation data set in `<output>/data` and run the whole way on it, in `<output>/work`.

    Args:
        output: the folder.
        arms: models to train.
    """
    from pairdr.sources.python_docs import HELD_OUT, build_python_docs

    data = Path(output) / "data"
    try:
        verify_artefact(data)
    except ArtefactError:
        say("reading the documentation of Python and its libraries ...")
        build_python_docs(data, train_queries=3000, pool_queries=0)
    # A third of the training labels is hidden: those questions are the pool, and the labels measure what it gets.
    options = replace(DEMO.data, held_out=data / HELD_OUT)
    return run_pipeline(data, Path(output) / "work", replace(DEMO, arms=arms, data=options))


def plan_run(data: str | Path, output: str | Path, config: RunConfig) -> list[tuple[str, str, Cost | None]]:
    """Return (step, what would happen, predicted cost) without running anything.

    What would happen is "up to date", "runs", or "follows": it reads what a step before it will make anew.
    """
    collection = open_collection(data, config.data, strict=False)
    work = Work(output, collection, config)
    costs = measure_costs(collection, config.model)
    fingerprints = work.list_sources()
    lines: list[tuple[str, str, Cost | None]] = []
    for step in list_steps(work):
        found = None
        known = all(name in fingerprints for name in step.inputs)
        if known:
            key = work.key(step.name, step.options, {name: fingerprints[name] for name in step.inputs})
            found = work.fingerprint(step.name, work.path(step.output), key)
        if found is not None:
            fingerprints[step.name] = found
        verdict = "up to date" if found is not None else "runs" if known else "follows"
        lines.append((step.name, verdict, None if found is not None or costs is None else step.cost(costs)))
    return lines


def format_plan(lines: list[tuple[str, str, Cost | None]]) -> str:
    """Return a plan as text, with the sum of the predicted times and the highest memory."""
    rows = []
    for name, verdict, cost in lines:
        price = "" if cost is None else f"{cost.seconds / 60:8.1f} min {cost.memory / GIB:6.1f} GiB"
        rows.append(f"{name:28}{verdict:12}{price}")
    costs = [cost for _, _, cost in lines if cost is not None]
    if costs:
        total = sum(cost.seconds for cost in costs) / 60
        peak = max(cost.memory for cost in costs) / GIB + 0.6
        rows.append(
            f"about {total:.0f} minutes and {peak:.1f} GiB, "
            "by arithmetic from this machine's speed: good to a factor of two"
        )
    elif any(verdict != "up to date" for _, verdict, _ in lines):
        rows.append("time and memory are not predicted: the start model is not on this machine yet")
    else:
        rows.append("nothing to do")
    return "\n".join(rows)


def require_depth(config: RunConfig) -> None:
    """Refuse measures that look deeper than search goes, before anything is made.

    Raises:
        UsageError: naming the measure and the depth.
    """
    for name, measure in zip(config.evaluate.measures, parse_measures(config.evaluate.measures), strict=True):
        depth = measure.params.get("cutoff")
        if depth is not None and depth > config.search.k:
            raise UsageError(
                f"{name} looks {depth} deep, and search stops at {config.search.k}.", remedy=f"Set --k {depth}."
            )


def run_steps(work: Work, last: str | None = None) -> list[str]:
    """Make what is not up to date, in order, and return the names of the steps that ran.

    Args:
        work: the work folder.
        last: the step after which to stop; None makes them all.
    """
    fingerprints = work.list_sources()
    ran = []
    for step in list_steps(work):
        place = work.path(step.output)
        key = work.key(step.name, step.options, {name: fingerprints[name] for name in step.inputs})
        found = work.fingerprint(step.name, place, key)
        if found is None:
            say(f"{step.name} ...")
            begin = time.perf_counter()
            step.make()
            work.forget()
            found = work.record(step.name, place, key, time.perf_counter() - begin)
            ran.append(step.name)
        fingerprints[step.name] = found
        if step.name == last:
            break
    return ran


def _write_work_file(work: Work) -> None:
    facts = read_manifest(work.path("runs", table_split(work), FUSED), "run").facts
    content = {
        "model": "models/pair",
        "vectors": "vectors/pair",
        "bm25": "bm25",
        "mode": facts["mode"],
        "k": work.config.search.k,
        "weights": facts["weights"],
    }
    text = json.dumps(content, indent=1) + "\n"
    path = work.path(WORK_FILE)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        replace_file(path, text)
