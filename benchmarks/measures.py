"""Measures, counts and the test of `pairdr compare` beside those of ranx, on random runs.

    pip install ranx
    python benchmarks/measures.py

ranx compiles itself for a minute and brings plotting libraries, so it is no dependency of the test suite, which checks
the same against scipy and by hand.
"""

from __future__ import annotations

import numpy as np
import ranx

from pairdr.compare import compare_values
from pairdr.measures import measure_run
from pairdr.records import Qrels, Run
from pairdr.store_config import CompareConfig

NAMES = {"RR@10": "mrr@10", "nDCG@10": "ndcg@10", "R@10": "recall@10", "Success@5": "hit_rate@5", "AP": "map"}
QUERIES, PASSAGES, DEPTH, SEED = 200, 60, 30, 11
RUNS = (("first", 0.2, 3), ("second", 0.23, 7), ("third", 0.5, 0))
"""Name, how much relevant passages score above others, queries that are not answered."""


def draw_runs() -> tuple[Qrels, dict[str, Run]]:
    """Return graded labels, and runs of which some lack queries."""
    rng = np.random.default_rng(SEED)
    passages = [f"p{at:03d}" for at in range(PASSAGES)]
    qrels = {
        f"q{at:03d}": {str(p): int(rng.integers(1, 4)) for p in rng.choice(passages, rng.integers(1, 6), replace=False)}
        for at in range(QUERIES)
    }

    def rank(query_id: str, skill: float) -> list[tuple[str, float]]:
        scores = rng.random(PASSAGES) + skill * np.array([passage in qrels[query_id] for passage in passages])
        return [(passages[at], float(scores[at])) for at in np.argsort(-scores)[:DEPTH]]

    runs = {
        name: Run.from_mapping({query_id: rank(query_id, skill) for query_id in list(qrels)[lacking:]})
        for name, skill, lacking in RUNS
    }
    return qrels, runs


def main() -> None:
    """Print the largest differences."""
    qrels, runs = draw_runs()
    theirs = [ranx.Run({query_id: dict(run[query_id]) for query_id in run}, name=name) for name, run in runs.items()]
    report = ranx.compare(
        ranx.Qrels(qrels), theirs, list(NAMES.values()), stat_test="fisher", n_permutations=10000, make_comparable=True
    )
    values = {name: [measure_run(run, qrels, list(NAMES))] for name, run in runs.items()}
    found = compare_values(values, CompareConfig(measures=tuple(NAMES)))
    means = max(
        abs(system.means[ours] - report.results[system.name][other])
        for system in found.systems
        for ours, other in NAMES.items()
    )
    print(f"{QUERIES} queries, {len(runs)} runs: means of {', '.join(NAMES)} differ by {means:.0e} at most")
    for one in found.differences:
        counts = report.win_tie_loss[one.name, "first"]["mrr@10"]
        p_value = report.comparisons[frozenset({one.name, "first"})]["mrr@10"]["p_value"]
        print(f"{one.name}: better, equal, worse on {one.wins}, {one.ties}, {one.losses} queries, ranx {counts}")
        print(f"    p over queries {one.p_value:.4f}, ranx {p_value:.4f}")


if __name__ == "__main__":
    main()
