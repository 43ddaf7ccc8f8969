"""MS MARCO's rules, walked through by hand beside the measures that pairdr reports.

The official script: the reciprocal rank of the first relevant passage of ten, and whether one is among the first n,
each summed over the queries and divided by the queries of the labels. Ours differs where the script is silent or wrong:
equal scores are ordered by id, a passage that stands twice is an error, and no rank is filled with a passage 0.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import write_lines
from hypothesis import given
from hypothesis import strategies as st

from pairdr.cli import main
from pairdr.errors import DataError
from pairdr.formats import read_qrels, read_run
from pairdr.measures import mean_measures, measure_run

MEASURES = ("RR@10", "Success@1", "Success@50", "Success@1000")
Labels = set[tuple[int, int]]
Lines = list[tuple[int, int, float]]

LABELS: Labels = {(1, 11), (1, 12), (2, 20), (3, 30), (4, 40), (5, 50)}
# 1: second; 2: first of two with one score; 3: eleventh; 4: not found; 5: not searched for; 6: not labelled
RUN: Lines = [
    *((1, 99, 3.0), (1, 12, 2.0), (1, 11, 1.0)),
    *((2, 200, 1.0), (2, 20, 1.0)),
    *((3, 100 + rank, 20.0 - rank) for rank in range(10)),
    (3, 30, 0.5),
    *((4, 41, 1.0), (6, 60, 1.0)),
]
BY_HAND = {"RR@10": (1 / 2 + 1) / 5, "Success@1": 1 / 5, "Success@50": 3 / 5, "Success@1000": 3 / 5}


def judge(labels: Labels, run: Lines) -> dict[str, float]:
    """Return the means as the script's loops make them, of a run in any order."""
    relevant: dict[int, set[int]] = {}
    for query, passage in labels:
        relevant.setdefault(query, set()).add(passage)
    sums = dict.fromkeys(MEASURES, 0.0)
    for query, wanted in relevant.items():
        ranked = sorted((-score, str(passage)) for asked, passage, score in run if asked == query)
        ranks = [rank for rank, (_, passage) in enumerate(ranked, start=1) if int(passage) in wanted]
        if ranks and ranks[0] <= 10:
            sums["RR@10"] += 1 / ranks[0]
        for name in MEASURES[1:]:
            sums[name] += bool(ranks) and ranks[0] <= int(name.partition("@")[2])
    return {name: value / len(relevant) for name, value in sums.items()}


def write_labels(path: Path, labels: Labels, columns: int) -> Path:
    lines = (f"{q}\t0\t{p}\t1" if columns == 4 else f"{q}\t{p}" for q, p in sorted(labels))
    write_lines(path, lines)
    return path


def write_run(path: Path, run: Lines) -> Path:
    write_lines(path, (f"{query} Q0 {passage} 0 {score} hand" for query, passage, score in run))
    return path


def measure(folder: Path, labels: Labels, run: Lines, columns: int = 4) -> dict[str, float]:
    qrels = read_qrels(write_labels(folder / "qrels.dev.small.tsv", labels, columns))
    return mean_measures(measure_run(read_run(write_run(folder / "run.trec", run)), qrels, MEASURES))


@pytest.mark.parametrize("columns", [2, 4])
def test_a_run_made_by_hand_has_the_numbers_worked_out_by_hand(tmp_path: Path, columns: int) -> None:
    assert judge(LABELS, RUN) == pytest.approx(BY_HAND)
    assert measure(tmp_path, LABELS, RUN, columns) == pytest.approx(BY_HAND)


@pytest.mark.parametrize("columns", [2, 4])
def test_the_command_prints_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: int) -> None:
    run, qrels = write_run(tmp_path / "r.trec", RUN), write_labels(tmp_path / "q.tsv", LABELS, columns)
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), str(qrels), "--json", "--measures", *MEASURES])
    assert json.loads(capsys.readouterr().out) == pytest.approx(BY_HAND)


PAIRS = st.tuples(st.integers(1, 4), st.integers(0, 15))


@given(st.sets(PAIRS, min_size=1), st.dictionaries(PAIRS, st.sampled_from([0.5, 1.0, 2.0]), max_size=60), st.randoms())
def test_any_run_has_the_scripts_numbers(
    tmp_path_factory: pytest.TempPathFactory, labels: Labels, scores: dict[tuple[int, int], float], order: random.Random
) -> None:
    run = [(query, passage, score) for (query, passage), score in scores.items()]
    order.shuffle(run)
    assert measure(tmp_path_factory.mktemp("run"), labels, run) == pytest.approx(judge(labels, run))


def test_a_passage_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.trec", [*RUN, (1, 12, 0.5)])
    with pytest.raises(DataError, match=rf"run\.trec:{len(RUN) + 1}: Passage 12 stands twice under query 1"):
        read_run(path)


def test_no_rank_is_filled_with_a_passage_0(tmp_path: Path) -> None:
    """The script's lists of 1,000 begin with zeros: passage 0 would be a hit of every short run."""
    assert measure(tmp_path, {(1, 0)}, [(1, 7, 1.0)])["Success@1000"] == 0
