"""Measures against numbers worked out by hand, and the paired test against every sign change there is."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifests import rewrite_manifest

from pairdr.artefact import read_manifest
from pairdr.config import EvaluateConfig
from pairdr.errors import ArtefactError, DataError, UsageError
from pairdr.evaluate import evaluate_run, read_evaluation
from pairdr.formats import read_qrels, read_run
from pairdr.measures import (
    compute_p_value,
    find_interval,
    mean_measures,
    measure_run,
    parse_measures,
    reciprocal_ranks,
)
from pairdr.records import Run


def make_run(**ranked: str) -> Run:
    """Make a run of {query: "ids in their order"}."""
    return Run.from_mapping(
        {query: [(passage, 9.0 - rank) for rank, passage in enumerate(ids.split())] for query, ids in ranked.items()}
    )


def measure(run: Run, qrels: dict[str, dict[str, int]], name: str) -> dict[str, float]:
    return measure_run(run, qrels, [name])[name]


# --- by hand ----------------------------------------------------------------------------------------------------------

QRELS = {"a": {"p1": 1, "p4": 1}, "b": {"p2": 1}, "c": {"p3": 2, "p5": 1}}
RUN = make_run(a="p9 p1 p2 p4", b="p1 p3 p2")  # c is not answered

BY_HAND = {
    "RR@10": {"a": 1 / 2, "b": 1 / 3, "c": 0},
    "RR@2": {"a": 1 / 2, "b": 0, "c": 0},
    "R@2": {"a": 1 / 2, "b": 0, "c": 0},
    "R@10": {"a": 1, "b": 1, "c": 0},
    "Success@2": {"a": 1, "b": 0, "c": 0},
    "Success@10": {"a": 1, "b": 1, "c": 0},
    "P@2": {"a": 1 / 2, "b": 0, "c": 0},
    "nDCG@10": {"a": (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3)), "b": 1 / math.log2(4), "c": 0},
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_measure_has_the_value_worked_out_by_hand(name: str) -> None:
    assert measure(RUN, QRELS, name) == pytest.approx(BY_HAND[name])


def test_the_mean_divides_by_the_questions_of_the_labels() -> None:
    means = mean_measures(measure_run(RUN, QRELS, ["RR@10", "Success@10"]))
    assert means == pytest.approx({"RR@10": (1 / 2 + 1 / 3) / 3, "Success@10": 2 / 3})


def test_graded_labels_count_in_ndcg() -> None:
    expected = (1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3))
    assert measure(make_run(c="p5 p3"), {"c": QRELS["c"]}, "nDCG@10") == pytest.approx({"c": expected})


def test_recall_is_a_share_and_success_at_least_one() -> None:
    qrels = {"q": {f"p{number}": 1 for number in range(4)}}
    values = measure_run(make_run(q="p0 x y"), qrels, ["R@3", "Success@3"])
    assert values == {"R@3": {"q": 0.25}, "Success@3": {"q": 1.0}}


def test_equal_scores_keep_the_order_of_the_run() -> None:
    tied = Run.from_mapping({"q": [("b", 1.0), ("a", 1.0), ("c", 1.0)]})
    for rank, passage in enumerate("bac", start=1):
        assert measure(tied, {"q": {passage: 1}}, "RR@10") == {"q": pytest.approx(1 / rank)}


def test_a_question_without_relevant_passages_is_left_out() -> None:
    assert measure(RUN, {"a": QRELS["a"], "z": {"p1": 0}}, "RR@10") == {"a": 0.5}


def test_questions_of_the_run_without_labels_are_passed_over() -> None:
    assert measure(RUN, {"b": QRELS["b"]}, "RR@10") == {"b": pytest.approx(1 / 3)}


@pytest.mark.parametrize("run", [make_run(), make_run(a="")], ids=["no questions", "a question without passages"])
def test_an_empty_run_is_all_zeros(run: Run) -> None:
    assert measure(run, QRELS, "nDCG@10") == {"a": 0, "b": 0, "c": 0}


@pytest.mark.parametrize("qrels", [{}, {"a": {}}, {"a": {"p1": 0}, "b": {"p1": -1}}])
def test_labels_without_a_relevant_passage_are_refused(qrels: dict[str, dict[str, int]]) -> None:
    with pytest.raises(DataError, match="No query of the labels has a relevant passage"):
        measure_run(RUN, qrels, ["RR@10"])


def test_unknown_measures_are_named_all_at_once() -> None:
    with pytest.raises(UsageError, match=r"Unknown measures: Foo@3, R@x\.") as caught:
        measure_run(RUN, QRELS, ["RR@10", "Foo@3", "R@x"])
    assert "nDCG@10" in str(caught.value)


@pytest.mark.parametrize("name", ["", "R", "alpha_nDCG@20", "__import__('os')"])
def test_what_cannot_be_computed_is_no_measure(name: str) -> None:
    with pytest.raises(UsageError, match="Unknown measures"):
        parse_measures([name])


def test_two_names_of_one_measure_have_the_same_values() -> None:
    values = measure_run(RUN, QRELS, ["RR@10", "MRR@10"])
    assert values["RR@10"] == values["MRR@10"] == pytest.approx(BY_HAND["RR@10"])


@pytest.mark.parametrize("columns", ["{q}\t{p}\n", "{q}\t0\t{p}\t1\n"], ids=["two columns", "four columns"])
def test_a_hand_made_trec_run_is_measured_with_labels_of_either_form(tmp_path: Path, columns: str) -> None:
    lines = [columns.format(q=query, p=passage) for query, judged in QRELS.items() for passage in judged]
    (tmp_path / "qrels.tsv").write_text("".join(lines), encoding="utf-8")
    ranked = {"a": ["p9", "p1", "p2", "p4"], "b": ["p1", "p3", "p2"]}
    rows = [f"{query} Q0 {p} {r} {9 - r} hand\n" for query, ids in ranked.items() for r, p in enumerate(ids, start=1)]
    (tmp_path / "run.trec").write_text("".join(rows), encoding="utf-8")
    run, qrels = read_run(tmp_path / "run.trec"), read_qrels(tmp_path / "qrels.tsv")
    assert measure(run, qrels, "RR@10") == pytest.approx(BY_HAND["RR@10"])


@given(st.lists(st.lists(st.booleans(), max_size=14), min_size=1, max_size=6), st.sampled_from([1, 3, 10]))
def test_quick_reciprocal_ranks_equal_those_of_ir_measures(relevant: list[list[bool]], cutoff: int) -> None:
    ids = [[f"p{rank}" for rank in range(len(flags))] for flags in relevant]
    run = Run.from_mapping({f"q{row}": [(passage, 1.0) for passage in passages] for row, passages in enumerate(ids)})
    qrels = {
        f"q{row}": {"elsewhere": 1} | {p: int(flag) for p, flag in zip(ids[row], flags, strict=True)}
        for row, flags in enumerate(relevant)
    }
    expected = measure(run, qrels, f"RR@{cutoff}")
    found = reciprocal_ranks([np.array(flags, dtype=bool) for flags in relevant], cutoff)
    assert found.tolist() == pytest.approx([expected[f"q{row}"] for row in range(len(relevant))])


# --- the paired test --------------------------------------------------------------------------------------------------


def by_query(values: list[float]) -> dict[str, float]:
    return {f"q{row}": value for row, value in enumerate(values)}


def enumerate_p_value(differences: list[float]) -> float:
    """Return the share of all sign changes with at least as large a mean difference."""
    observed = abs(mean(differences))
    signs = itertools.product((1, -1), repeat=len(differences))
    means = [abs(mean(s * d for s, d in zip(flips, differences, strict=True))) for flips in signs]
    return mean(value >= observed - 1e-12 for value in means)


def test_five_wins_of_five_have_the_p_value_two_of_thirty_two() -> None:
    assert compute_p_value(by_query([1.0] * 5), by_query([0.0] * 5)) == pytest.approx(2 / 32)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=8))
def test_the_p_value_is_exact_for_few_questions(pairs: list[tuple[int, int]]) -> None:
    first, second = ([value / 8 for value in column] for column in zip(*pairs, strict=True))
    expected = enumerate_p_value([one - other for one, other in zip(first, second, strict=True)])
    assert compute_p_value(by_query(first), by_query(second)) == pytest.approx(expected, abs=1e-12)


def random_values(seed: int, count: int = 60) -> dict[str, float]:
    return by_query(np.random.default_rng(seed).random(count).tolist())


def test_the_p_value_is_the_same_either_way_round_and_in_any_order_of_questions() -> None:
    first, second = random_values(1, 10), random_values(2, 10)
    backwards = dict(reversed(second.items()))
    assert compute_p_value(first, second) == compute_p_value(second, first) == compute_p_value(first, backwards)


def test_many_questions_give_a_seeded_p_value_near_scipys_t_test() -> None:
    from scipy.stats import ttest_rel

    first, second = random_values(1), random_values(2)
    value = compute_p_value(first, second)
    assert value == compute_p_value(first, second)
    assert value == pytest.approx(ttest_rel(list(first.values()), list(second.values())).pvalue, abs=0.03)


def test_the_smallest_p_value_is_two_by_the_resamples() -> None:
    assert compute_p_value(by_query([1.0] * 40), by_query([0.0] * 40), resamples=999) == pytest.approx(2 / 1000)


def test_equal_systems_have_the_p_value_one() -> None:
    assert compute_p_value(random_values(1), random_values(1)) == 1.0


@pytest.mark.parametrize("other", [{"q0": 1.0}, {"q0": 1.0, "q2": 0.0}, {}])
def test_systems_measured_on_different_questions_are_refused(other: dict[str, float]) -> None:
    with pytest.raises(DataError, match="different queries"):
        compute_p_value(by_query([1.0, 0.0]), other)


# --- the interval -----------------------------------------------------------------------------------------------------


def test_an_interval_is_seeded_and_near_students() -> None:
    from scipy.stats import ttest_1samp

    values = list(random_values(1, 200).values())
    low, high = find_interval(values)
    assert (low, high) == find_interval(values, resamples=10000, seed=13) != find_interval(values, seed=14)
    assert (low, high) == pytest.approx(ttest_1samp(values, 0).confidence_interval(0.95), abs=0.005)
    assert find_interval([0.0, 0.0, 0.0, 1.0] * 25) == pytest.approx((0.17, 0.34), abs=0.02)


@pytest.mark.parametrize("values", [[0.25], [0.25] * 9])
def test_equal_values_have_an_interval_of_one_number(values: list[float]) -> None:
    assert find_interval(values) == (0.25, 0.25)


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_an_evaluation_keeps_values_means_and_inputs(tmp_path: Path) -> None:
    config = EvaluateConfig(measures=("RR@10", "R@2"))
    values = evaluate_run(RUN, QRELS, config, tmp_path / "e", inputs={"run": "abc"})
    assert read_evaluation(tmp_path / "e") == values
    manifest = read_manifest(tmp_path / "e", "evaluation")
    assert manifest.facts == {"means": mean_measures(values), "queries": 3}
    assert manifest.inputs == {"run": "abc"}


def test_an_evaluation_without_a_place_writes_nothing(tmp_path: Path) -> None:
    values = evaluate_run(RUN, QRELS, EvaluateConfig(measures=("RR@10",)))
    assert values["RR@10"] == pytest.approx(BY_HAND["RR@10"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_kind_is_no_evaluation(tmp_path: Path) -> None:
    evaluate_run(RUN, QRELS, EvaluateConfig(), tmp_path / "e")
    rewrite_manifest(tmp_path / "e", lambda content: content.update(kind="run"))
    with pytest.raises(ArtefactError, match="holds 'run', not 'evaluation'"):
        read_evaluation(tmp_path / "e")
