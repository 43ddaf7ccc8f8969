"""The tables of the study: means over seeds, paired differences, verdicts, and the relation that L_P asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pairdr.measures import compute_p_value
from pairdr.table import say_p

MEASURE, EQUAL = "RR@10", 0.5
RANKS = "0123456789A"
"""The first relevant passage's rank in one letter; 0: below ten."""
PAIRS = (("query_centric", "labelled_only"), ("pair", "query_centric"), ("pair", "labelled_only"))
Result = dict[str, Any]


def read_results(folder: Path, cell: str, arm: str, seeds: Sequence[int]) -> dict[int, Result]:
    """Return the results of an arm's runs, by seed; those that were not made are missing."""
    places = {seed: folder / f"{cell}-{arm}-{seed}.json" for seed in seeds}
    return {seed: json.loads(place.read_text(encoding="utf-8")) for seed, place in places.items() if place.is_file()}


def mean_points(result: Result, name: str, measure: str = MEASURE) -> float:
    """Return the mean of a measure over a set's queries, in points."""
    if measure == MEASURE:
        return 100 * float(read_reciprocals(result, name).mean())
    return 100 * float(result["sets"][name][measure])


def read_reciprocals(result: Result, name: str) -> npt.NDArray[np.float64]:
    """Return RR@10 of a set's queries, by id."""
    ranks = np.array([RANKS.index(letter) for letter in result["sets"][name]["ranks"]], dtype=float)
    return np.divide(1, ranks, out=np.zeros_like(ranks), where=ranks > 0)


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
    start = json.loads((folder / "start.json").read_text(encoding="utf-8"))
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
        print_relation(results)


def print_arm(cell: Any, arm: str, found: dict[int, Result], sets: Sequence[str]) -> None:
    """Print an arm's means over seeds."""
    if not found:
        print(f"{arm:16} not run")
        return
    rates = {f"{result['learning_rate']:g}" for result in found.values()}
    hours = sum(result["cpu_hours"] for result in found.values())
    missing = "" if len(found) == len(cell.seeds) else f", {len(cell.seeds) - len(found)} seeds not run"
    print(
        f"{arm:16} {len(found)} seeds{missing}, learning rate {', '.join(sorted(rates))}, {hours:.2f} processor hours"
    )
    for measure in (MEASURE, "nDCG@10", "R@100"):
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


def print_relation(results: dict[str, dict[int, Result]]) -> None:
    """Print how often s(q,p+) <= s(p+,p-), and how the queries fare whose triple was so before training."""
    for arm, found in results.items():
        relations = [result["relation"] for result in found.values()]
        if not relations:
            continue
        shares = [np.mean([part[name] for part in relations]) for name in ("violated_before", "violated_after")]
        line = f"s(q,p+) <= s(p+,p-)  {arm:16} {shares[0]:.1%} of {relations[0]['triples']} triples before, "
        line += f"{shares[1]:.1%} after; {MEASURE} of those violated before and of the others"
        for flag in ("true", "false"):
            means = [part["scores"][flag] for part in relations if part["scores"][flag] is not None]
            line += f" {100 * np.mean(means):.2f}" if means else " -"
        print(line)


def _mean_queries(results: Sequence[Result], name: str) -> dict[str, float]:
    """Return RR@10 of every query, the mean over seeds."""
    means = np.mean([read_reciprocals(result, name) for result in results], axis=0)
    return {str(number): float(value) for number, value in enumerate(means)}
