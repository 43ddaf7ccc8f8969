"""The tables of the study: means over seeds, paired differences, verdicts, and the relation that L_P asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pairdr.measures import compute_p_value
from pairdr.table import say_p

MEASURE, EQUAL = "RR@10", 0.5
PAIRS = (("query_centric", "labelled_only"), ("pair", "query_centric"), ("pair", "labelled_only"))
Result = dict[str, Any]


def read_results(folder: Path, cell: str, arm: str, seeds: Sequence[int]) -> dict[int, Result]:
    """Return the results of an arm's runs, by seed; those that were not made are missing."""
    found = {}
    for seed in seeds:
        places = list((folder / "runs" / cell / f"{arm}-{seed}").glob("*.json"))
        if places:
            found[seed] = json.loads(places[0].read_text(encoding="utf-8")) | {"rate": places[0].stem}
    return found


def mean_points(result: Result, name: str, measure: str = MEASURE) -> float:
    """Return the mean of a measure over a set's queries, in points."""
    return 100 * float(np.mean(list(result["sets"][name][measure].values())))


def compare_seeds(differences: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Return mean, 95 % interval, p-value of the paired t-test and the difference found in 80 % of all cases."""
    from scipy.stats import nct, t

    values, count = np.array(differences), len(differences)
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(count))
    critical = float(t.ppf(0.975, count - 1))
    p_value = float(2 * t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    effects = np.linspace(0, 20, 4001)
    power = nct.sf(critical, count - 1, effects)
    detectable = float(effects[np.argmax(power >= 0.8)]) * error
    return mean, mean - critical * error, mean + critical * error, p_value, detectable


def judge(mean: float, low: float, high: float, detectable: float) -> str:
    """Return the verdict in words."""
    if low > 0 or high < 0:
        word = "better" if mean > 0 else "worse"
        return word + (", and equal within 0.5 points" if low >= -EQUAL and high <= EQUAL else "")
    if low >= -EQUAL and high <= EQUAL:
        return "equal within 0.5 points"
    return f"nothing could be shown; {detectable:.2f} points would have been"


def print_tables(folder: Path, cells: Sequence[Any], main: Any) -> None:
    """Print every table of the study."""
    start = json.loads((folder / "runs" / "start.json").read_text(encoding="utf-8"))
    sets = list(start["sets"])
    print(
        f"start{'':31}" + "".join(f"{name} {mean_points(start, name):.2f}   " for name in sets) + f"{MEASURE}, points"
    )
    for cell in cells:
        results = {arm: read_results(folder, cell.name, arm, cell.seeds) for arm in cell.arms}
        print(f"\n## {cell.name}")
        if not any(results.values()):
            print("not run")
            continue
        for arm, found in results.items():
            print_arm(cell, arm, found, sets)
        against = {arm: read_results(folder, main.name, arm, cell.seeds) for arm in main.arms}
        for arm in results:
            rivals = [(other, results[other]) for one, other in PAIRS if one == arm and other in results]
            if cell is not main and cell.start == main.start and cell.hidden == main.hidden:
                rivals.append((f"main {arm}", against[arm]))
            for title, rival in rivals:
                print_difference(f"{arm} - {title}", results[arm], rival, sets)
        print_relation(results, sets[0])


def print_arm(cell: Any, arm: str, found: dict[int, Result], sets: Sequence[str]) -> None:
    """Print an arm's means over seeds."""
    if not found:
        print(f"{arm:16} not run")
        return
    rates = {result["rate"] for result in found.values()}
    hours = sum(result["cpu_hours"] for result in found.values())
    missing = "" if len(found) == len(cell.seeds) else f", {len(cell.seeds) - len(found)} seeds not run"
    print(
        f"{arm:16} {len(found)} seeds{missing}, learning rate {', '.join(sorted(rates))}, {hours:.2f} processor hours"
    )
    for measure in next(iter(found.values()))["sets"][sets[0]]:
        line = f"    {measure:8}"
        for name in sets:
            values = [mean_points(result, name, measure) for result in found.values()]
            spread = f" ({np.std(values, ddof=1):.2f})" if len(values) > 1 else ""
            line += f"  {name} {np.mean(values):.2f}{spread}"
        print(line)


def print_difference(title: str, mine: dict[int, Result], theirs: dict[int, Result], sets: Sequence[str]) -> None:
    """Print the paired difference of two arms on every set."""
    seeds = sorted(mine.keys() & theirs.keys())
    if len(seeds) < 2:
        print(f"{title}: fewer than two seeds")
        return
    for name in sets:
        differences = [mean_points(mine[seed], name) - mean_points(theirs[seed], name) for seed in seeds]
        mean, low, high, p_value, detectable = compare_seeds(differences)
        one, other = (_mean_queries([found[seed] for seed in seeds], name) for found in (mine, theirs))
        print(
            f"{title:34} {name:12} {mean:+.2f} ({low:+.2f} to {high:+.2f}), {say_p(p_value)} over {len(seeds)} seeds, "
            f"{say_p(compute_p_value(one, other))} over {len(one)} queries: {judge(mean, low, high, detectable)}"
        )


def print_relation(results: dict[str, dict[int, Result]], name: str) -> None:
    """Print how often s(q,p+) <= s(p+,p-), and how the queries fare whose triple was so before training."""
    for arm, found in results.items():
        if not found:
            continue
        parts = [[_find_violated(result[key]) for key in ("before", "margins")] for result in found.values()]
        shares = np.mean([[np.mean(list(part.values())) for part in seed] for seed in parts], axis=0)
        line = (
            f"s(q,p+) <= s(p+,p-)  {arm:16} {shares[0]:.1%} of {len(parts[0][0])} triples before, {shares[1]:.1%} after"
        )
        for title, flag in (("violated before", True), ("others", False)):
            means = []  # of each seed: every one may have a start of its own
            for result, (before, _) in zip(found.values(), parts, strict=True):
                scores = result["sets"][name][MEASURE]
                means.append([100 * scores[q] for q, violated in before.items() if violated == flag and q in scores])
            if all(means):
                line += f"; {title} (about {len(means[0])}): {MEASURE} {np.mean([np.mean(m) for m in means]):.2f}"
        print(line)


def _find_violated(margins: dict[str, list[float]]) -> dict[str, bool]:
    return {query_id: own <= cross for query_id, (own, _, cross) in margins.items()}


def _mean_queries(results: Sequence[Result], name: str) -> dict[str, float]:
    values = [result["sets"][name][MEASURE] for result in results]
    return {query_id: float(np.mean([value[query_id] for value in values])) for query_id in values[0]}
