"""The study's in-domain queries by the data set that each came from: where an arm gains, and where it loses.

PAIRDR_DATA=... python benchmarks/study_sources.py [--cells main]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from study import CELLS, SETS
from study_runs import RESULTS
from study_tables import PAIRS, compare_seeds, read_reciprocals, read_results

from pairdr.collection import open_collection
from pairdr.table import say_p


def read_sources(data: Path, split: str) -> npt.NDArray[np.str_]:
    """Return the source of each query of a split, which its id begins with, in the order of the files of runs."""
    return np.array([query_id.partition(":")[0] for query_id in sorted(open_collection(data).labels(split))])


def list_groups(data: Path) -> dict[str, npt.NDArray[np.bool_]]:
    """Return which test queries are of a source that is trained on, of one that is not, and of each source."""
    sources = read_sources(data, "test")
    is_trained = np.isin(sources, read_sources(data, "train"))
    groups = {"sources with training queries": is_trained, "sources without": ~is_trained}
    return groups | {str(source): sources == source for source in sorted(set(sources))}


def print_sources(
    name: str, arms: Sequence[str], seeds: Sequence[int], groups: Mapping[str, npt.NDArray[np.bool_]]
) -> None:
    """Print RR@10 in points by groups of queries, and the paired differences of arms."""
    runs = {arm: read_results(RESULTS, name, arm, seeds) for arm in arms}
    values = {
        arm: {seed: 100 * read_reciprocals(found, SETS[0]) for seed, found in results.items()}
        for arm, results in runs.items()
    }
    print(f"\n## {name}")
    for group, here in groups.items():
        print(f"{group} ({here.sum()} queries)")
        for arm, by_seed in values.items():
            if by_seed:
                print(
                    f"    {arm:34}{np.mean([row[here].mean() for row in by_seed.values()]):6.2f}, {len(by_seed)} seeds"
                )
        for one, other in PAIRS:
            shared = sorted(values.get(one, {}).keys() & values.get(other, {}).keys())
            if len(shared) > 1:
                gaps = [(values[one][seed] - values[other][seed])[here].mean() for seed in shared]
                mean, low, high, p_value, _ = compare_seeds(gaps)
                print(f"    {f'{one} - {other}':34}{mean:+6.2f} ({low:+.2f} to {high:+.2f}), {say_p(p_value)}")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=["main"])
    options = parser.parse_args()
    groups = list_groups(Path(os.environ["PAIRDR_DATA"]) / SETS[0])
    for cell in CELLS:
        if cell.name in options.cells:
            print_sources(cell.name, cell.arms, cell.seeds, groups)


if __name__ == "__main__":
    main()
