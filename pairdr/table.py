"""The table at the end of a run: every system on the same queries, with PAIR tested against each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pairdr.artefact import publish, read_manifest
from pairdr.config import EvaluateConfig
from pairdr.files import write_json
from pairdr.measures import PerQuery, compute_p_value, mean_measures, measure_run
from pairdr.records import Qrels, Run

TITLES = {
    "bm25": "BM25",
    "start": "start, as trained from",
    "whole": "whole model, untrained",
    "labelled_only": "labelled only",
    "query_centric": "query-centric, same data",
    "pair": "PAIR",
    "pair_bm25": "PAIR + BM25",
}
MAIN = "pair"


@dataclass(frozen=True)
class Row:
    """One system: its means, and the p-value of PAIR against it (None for PAIR itself)."""

    system: str
    means: dict[str, float]
    p_pair: float | None


@dataclass(frozen=True)
class Table:
    """The rows, the number of queries behind them, and what has to be said beside them."""

    split: str
    queries: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    p_fused_bm25: float | None

    def format(self) -> str:
        """Return the table as plain text."""
        names = list(self.rows[0].means)
        widths = [max(10, len(name) + 2) for name in names]
        titles = "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
        head = f"{'':26}{titles}{'p (PAIR)':>12}"
        lines = [head, "-" * len(head)]
        for row in self.rows:
            cells = "".join(f"{row.means[name]:{width}.4f}" for name, width in zip(names, widths, strict=True))
            lines.append(f"{TITLES[row.system]:26}{cells}{_p(row.p_pair):>12}")
        lines.append("")
        lines.append(
            f"{self.queries} {self.split} queries; "
            f"p: two-sided paired randomisation test of {names[0]}, PAIR against the row."
        )
        if self.p_fused_bm25 is not None:
            lines.append(f"PAIR + BM25 against BM25: {say_p(self.p_fused_bm25)}.")
        return "\n".join([*lines, *self.notes])


def compare_systems(
    runs: Mapping[str, Run],
    qrels: Qrels,
    split: str,
    config: EvaluateConfig,
    notes: tuple[str, ...],
    output: str | Path,
    *,
    inputs: dict[str, str],
) -> Table:
    """Measure all systems, test PAIR against each, and publish the table with the values per query.

    Args:
        runs: system to run; "pair" is among them.
        qrels: labels.
        split: their name.
        config: measures; the first one is tested.
        notes: sentences to print below the table.
        output: the folder of the report.
        inputs: fingerprints to keep.
    """
    values = {system: measure_run(run, qrels, config.measures) for system, run in runs.items()}
    first = config.measures[0]

    def test(one: str, other: str) -> float:
        return compute_p_value(
            values[one][first], values[other][first], resamples=config.resamples, seed=config.test_seed
        )

    rows = tuple(
        Row(system, mean_measures(values[system]), None if system == MAIN else test(MAIN, system))
        for system in TITLES
        if system in values
    )
    fused = test("pair_bm25", "bm25") if "pair_bm25" in values else None
    table = Table(split, len(values[MAIN][first]), rows, notes, fused)
    with publish(output, "report", options=config.as_dict(), inputs=inputs) as staging:
        write_json(staging.path / "table.json", asdict(table))
        (staging.path / "table.txt").write_text(table.format() + "\n", encoding="utf-8")
        for system, by_query in values.items():
            _write_values(staging.path / f"{system}.json", by_query)
    return table


def read_table(folder: str | Path) -> Table:
    """Read a published table."""
    read_manifest(folder, "report")
    facts: dict[str, Any] = json.loads((Path(folder) / "table.json").read_text(encoding="utf-8"))
    rows = tuple(Row(**row) for row in facts.pop("rows"))
    return Table(rows=rows, notes=tuple(facts.pop("notes")), **facts)


def read_values(folder: str | Path, system: str) -> PerQuery:
    """Read a system's values per query of a published table."""
    values: PerQuery = json.loads((Path(folder) / f"{system}.json").read_text(encoding="utf-8"))
    return values


def describe_labels(examples: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[str]:
    """Return what the labels were made of, as sentences.

    Args:
        examples: facts of the examples' manifest.
        teacher: facts of the teacher's manifest.
    """
    if examples["teacher"] is None:
        return [
            f"No pseudo labels: {examples['note']}. All stages ran on {examples['labelled']} labelled rows "
            "with margin-filtered negatives."
        ]
    student = teacher["verdicts"][0]
    chosen = next(verdict for verdict in teacher["verdicts"] if verdict["name"] == examples["teacher"])
    found, hidden = examples["calibration"], examples["hidden"]
    lines = [
        f"Teacher: {chosen['name']}; re-ranking for {teacher['dev_queries']} dev queries it has RR@10 "
        f"{chosen['rr10']:.4f}, the student {student['rr10']:.4f}, {say_p(chosen['p_value'])}.",
        f"Rows: {examples['labelled']} labelled, {examples['pseudo']} pseudo-labelled of a pool of {examples['pool']}.",
    ]
    if found["precision"] is not None:
        lines.append(
            f"Expected from {found['queries']} dev queries: {found['yield_share']:.0%} of the pool labelled, "
            f"{found['precision']:.2f} of the pseudo positives right."
        )
    if hidden is not None:
        lines.append(
            f"Measured on hidden labels: {hidden['right']} of {hidden['checked']} pseudo positives are right "
            f"({hidden['precision']:.2f})."
        )
    if not examples["pool"]:
        lines.append("The pool is empty: stage 1 ran on the labelled queries with the teacher's labels.")
    return lines


def describe_fusion(facts: Mapping[str, Any]) -> str:
    """Return which weights dev chose and what search uses.

    Args:
        facts: of the fused run's manifest.
    """
    dense, words = facts["weights"]
    return f"PAIR + BM25: weights {dense:g} and {words:g}, chosen on dev; search uses {facts['mode']}."


def _write_values(path: Path, values: PerQuery) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def say_p(value: float) -> str:
    """Return a p-value as people write it."""
    return f"p {_p(value)}" if value < 0.001 else f"p = {_p(value)}"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
