"""Labels: strict thresholds, calibrated on dev; every negative below s_neg, every positive above s_pos."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairdr.artefact import read_manifest
from pairdr.collection import Collection, open_collection
from pairdr.config import DataConfig, LabelConfig
from pairdr.errors import ArtefactError, RefusedError
from pairdr.formats import Examples
from pairdr.label import (
    LEAST_QUERIES,
    Calibration,
    calibrate,
    choose_s_pos,
    label_examples,
    measure_precision,
    pick_pseudo_labels,
)
from pairdr.mine import Candidates
from pairdr.records import Example, Passage, Query, Run, Scored

DEV = 48


class TableTeacher:
    """Gives the scores of a table; a pair that is not in it scores 0.5."""

    name = "table"

    def __init__(self, scores: Mapping[tuple[str, str], float]) -> None:
        self.scores = scores
        self.asked: dict[str, int] = {}

    def score(self, queries: Sequence[Query], candidates: Sequence[Sequence[Passage]]) -> list[np.ndarray]:
        self.asked |= {query.query_id: len(row) for query, row in zip(queries, candidates, strict=True)}
        return [
            np.array([self.scores.get((query.query_id, p.passage_id), 0.5) for p in row], dtype=float)
            for query, row in zip(queries, candidates, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        return {"kind": "table"}


@pytest.fixture
def folder(tmp_path: Path, write_beir: Callable[..., Path]) -> Path:
    """Return passages p0 to p59; t0, t1 of train, d0 to d47 of dev (d_i is answered by p_i), u0 to u3 in the pool."""
    queries = {f"t{i}": f"train {i}" for i in range(2)} | {f"d{i}": f"dev {i}" for i in range(DEV)}
    queries |= {f"u{i}": f"pool {i}" for i in range(4)}
    dev = {f"d{i}": {f"p{i}": 1} for i in range(DEV)}
    qrels = {"train": {"t0": {"p0": 1, "p1": 2}, "t1": {"p2": 1}}, "dev": dev}
    return write_beir(tmp_path / "data", {f"p{i}": f"passage {i}" for i in range(60)}, queries, qrels)


@pytest.fixture
def data(folder: Path) -> Collection:
    return open_collection(folder)


def make_candidates(negatives: Mapping[str, Sequence[str]], **hits: Sequence[str]) -> Candidates:
    """Return the given candidates in rank order for some queries, p0 to p47 for the others."""
    queries = [*(f"t{i}" for i in range(2)), *(f"d{i}" for i in range(DEV)), *(f"u{i}" for i in range(4))]
    ranked = {query_id: hits.get(query_id, [f"p{i}" for i in range(DEV)]) for query_id in queries}
    return make_of(make_run(ranked), negatives)


def make_of(run: Run, negatives: Mapping[str, Sequence[str]], collection: str | None = None) -> Candidates:
    return Candidates(run, run, run, make_run(negatives), "candidates", collection)


def make_run(ranked: Mapping[str, Sequence[str]]) -> Run:
    return Run.from_mapping({q: [Scored(p, -float(rank)) for rank, p in enumerate(ids)] for q, ids in ranked.items()})


def label(
    data: Collection, candidates: Candidates, teacher: TableTeacher | None, output: Path, **options: Any
) -> tuple[dict[str, Any], dict[str, list[Example]]]:
    """Label, and return the facts and the rows of each file."""
    config = LabelConfig(**{"s_pos": 0.9, "s_neg": 0.1} | options)
    facts = label_examples(data, candidates, teacher, config, output)
    return facts, {name: list(Examples.open(output / f"{name}.arrow")) for name in ("plain", "labelled", "pseudo")}


def pick(
    scores: Sequence[float], s_pos: float = 0.9, s_neg: float = 0.1, most: int = 4
) -> tuple[int, list[int]] | None:
    hits = [Scored(f"p{place}", -float(place)) for place in range(len(scores))]
    return pick_pseudo_labels(hits, scores, s_pos, s_neg, most)


# --- one query of the pool --------------------------------------------------------------------------------------------


def test_the_best_scored_candidate_is_the_positive_and_negatives_keep_their_order() -> None:
    assert pick([0.05, 0.92, 0.5, 0.01, 0.95, 0.08]) == (4, [0, 3, 5])


def test_a_positive_scores_strictly_above_s_pos() -> None:
    assert pick([0.9, 0.0]) is None
    assert pick([np.nextafter(0.9, 1), 0.0]) == (0, [1])


def test_a_negative_scores_strictly_below_s_neg() -> None:
    assert pick([0.95, 0.1]) is None
    assert pick([0.95, np.nextafter(0.1, 0)]) == (0, [1])


def test_only_the_best_is_a_positive_and_the_second_best_is_nothing() -> None:
    assert pick([0.92, 0.99, 0.05]) == (1, [2])


def test_no_more_negatives_than_asked_for_are_taken_from_the_top() -> None:
    assert pick([0.95, 0.03, 0.05, 0.01, 0.02], most=2) == (0, [1, 2])


def test_a_query_without_candidates_gets_nothing() -> None:
    assert pick([]) is None


def test_the_positive_is_never_among_its_negatives() -> None:
    assert pick([0.5, 0.4], s_pos=0.0, s_neg=1.0) == (0, [1])
    assert pick([0.5], s_pos=0.0, s_neg=1.0) is None


scores = st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.9, 0.95, 1.0]), max_size=12)


@given(scores, st.integers(1, 5))
def test_thresholds_and_order_hold_for_all_scores(found: list[float], most: int) -> None:
    picked = pick(found, most=most)
    below = [place for place, score in enumerate(found) if score < 0.1]
    if picked is None:
        assert not found or max(found) <= 0.9 or not below
    else:
        assert found[picked[0]] == max(found) > 0.9
        assert picked[1] == below[:most]


def test_an_id_that_is_part_of_another_is_another_passage(tmp_path: Path, write_beir: Callable[..., Path]) -> None:
    corpus = {"9123": "the answer", "12": "something else", "123": "again something else", "912": "more"}
    queries = {"q": "which answer", "d": "dev", "u": "pool", "v": "another of the pool"}
    folder = write_beir(tmp_path / "data", corpus, queries, {"train": {"q": {"9123": 1}}, "dev": {"d": {"12": 1}}})
    found = make_run({query_id: ["9123", "12", "123", "912"] for query_id in queries})
    candidates = make_of(found, {"q": ["12", "123", "912"]})
    sure = {("u", "9123"): 0.99} | {(query_id, p): 0.01 for query_id in "qu" for p in ("12", "123", "912")}
    _, rows = label(open_collection(folder), candidates, TableTeacher(sure), tmp_path / "x")
    assert [row.negative_ids for row in rows["pseudo"]] == [("12", "123", "912")]
    assert [row.negative_ids for row in rows["labelled"]] == [("12", "123", "912")]


# --- calibration ------------------------------------------------------------------------------------------------------


def test_s_pos_is_the_lowest_threshold_with_the_precision() -> None:
    # The 20 best are right, then one wrong, then three right, then all wrong.
    right = [True] * 20 + [False] + [True] * 3 + [False] * 20
    tops = [(1 - place / 100, ok) for place, ok in enumerate(right)]
    assert choose_s_pos(tops, 1.0) == pytest.approx(0.80)
    assert choose_s_pos(tops, 0.95) == pytest.approx(0.76)
    assert choose_s_pos(tops, 0.9) == pytest.approx(0.75)


def test_s_pos_looks_past_a_dip() -> None:
    tops = [(1 - place / 100, ok) for place, ok in enumerate([True] * 19 + [False] * 6 + [True] * 60)]
    assert count_above(tops, choose_s_pos(tops, 0.9)) == 76


def test_s_pos_leaves_a_tenth_unlabelled() -> None:
    tops = [(place / 100, True) for place in range(60)]
    assert count_above(tops, choose_s_pos(tops, 0.9)) == 54


def test_s_pos_lies_below_all_scores_where_twenty_are_all_there_are() -> None:
    tops = [(place / 100, True) for place in range(20)]
    assert count_above(tops, choose_s_pos(tops, 0.9)) == 20


def test_scores_of_one_value_are_taken_or_left_together() -> None:
    tops = [(1.0, True)] * 20 + [(0.5, True)] * 5 + [(0.5, False)] * 5 + [(0.1, False)] * 10
    assert choose_s_pos(tops, 0.8) == 0.1
    assert choose_s_pos(tops, 0.9) == 0.5


def test_there_is_no_s_pos_where_nothing_is_precise_enough() -> None:
    assert choose_s_pos([(float(place), place % 2 == 0) for place in range(40)], 0.8) is None


def test_fewer_than_twenty_queries_say_nothing() -> None:
    assert LEAST_QUERIES == 20
    assert choose_s_pos([(float(place), True) for place in range(19)], 0.5) is None
    assert choose_s_pos([(float(place), True) for place in range(20)], 0.5) is not None


def count_above(tops: Sequence[tuple[float, bool]], threshold: float | None) -> int:
    assert threshold is not None
    return sum(score > threshold for score, _ in tops)


tops = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0]), st.booleans()), max_size=60)


@given(tops, st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]))
def test_the_precision_above_s_pos_is_what_was_asked_for(found: list[tuple[float, bool]], target: float) -> None:
    s_pos = choose_s_pos(found, target)

    def is_good(threshold: float) -> bool:
        above = [right for score, right in found if score > threshold]
        enough = LEAST_QUERIES <= len(above) <= max(LEAST_QUERIES, 0.9 * len(found))
        return enough and sum(above) / len(above) >= target

    good = [threshold for threshold in (-2.0, *(score for score, _ in found)) if is_good(threshold)]
    if s_pos is None:
        assert good == []
    else:
        assert count_above(found, s_pos) == count_above(found, min(good))


def make_dev_teacher(right: Container[int]) -> TableTeacher:
    """Return a teacher whose best candidate is right for some dev queries and the next passage for the others.

    Scores fall from query to query.
    """
    return TableTeacher(
        {(f"d{i}", f"p{i if i in right else (i + 1) % DEV}"): 0.9 - i / 1000 for i in range(DEV)}
        | {(f"d{i}", f"p{i}"): 0.6 for i in range(DEV) if i not in right}
    )


def calibrate_on_dev(data: Collection, right: Container[int], **options: Any) -> Calibration:
    config = LabelConfig(label_depth=DEV, **options)
    return calibrate(data, make_candidates({}).merged, make_dev_teacher(right), config)


def test_thresholds_are_chosen_on_all_of_dev_and_judged_on_the_halves(data: Collection) -> None:
    found = calibrate_on_dev(data, range(DEV))
    # 43 of 48 are nine tenths. Of 24, 21 are: those above d42 on one side, above d43 on the other.
    assert found.s_pos == pytest.approx(0.9 - 43 / 1000)
    assert (found.precision, found.yield_share, found.queries) == (1.0, 43 / 48, DEV)


def test_the_expected_precision_is_not_flattered_by_the_choice(data: Collection) -> None:
    # Every second query is right: the half that is all right chooses a threshold, and the other half is all wrong.
    found = calibrate_on_dev(data, range(0, DEV, 2), target_precision=0.5)
    assert (found.precision, found.yield_share) == (0.0, 21 / 48)


def test_a_higher_target_labels_less(data: Collection) -> None:
    low, high = (calibrate_on_dev(data, range(40), target_precision=target) for target in (0.8, 1.0))
    assert low.s_pos == pytest.approx(0.9 - 43 / 1000)
    assert high.s_pos == pytest.approx(0.9 - 40 / 1000)
    assert high.yield_share < low.yield_share
    assert high.precision > low.precision


def test_s_neg_is_below_all_but_a_share_of_the_known_positives(data: Collection) -> None:
    positives = [0.9 - i / 1000 for i in range(DEV)]
    for share in (0.05, 0.5):
        found = calibrate_on_dev(data, range(DEV), s_pos=2.0, false_negatives=share)
        assert found.s_neg == pytest.approx(np.quantile(positives, share))
        assert np.mean(np.array(positives) < found.s_neg) == pytest.approx(share, abs=1 / DEV)


def test_s_neg_is_never_above_s_pos(data: Collection) -> None:
    found = calibrate_on_dev(data, range(DEV), s_pos=0.2, false_negatives=0.5)
    assert found.s_neg == found.s_pos == 0.2


def test_given_thresholds_are_kept_and_judged_on_all_of_dev(data: Collection) -> None:
    found = calibrate_on_dev(data, range(40), s_pos=0.9 - 44 / 1000, s_neg=0.3)
    assert (found.s_pos, found.s_neg) == (0.9 - 44 / 1000, 0.3)
    assert (found.precision, found.yield_share) == (pytest.approx(40 / 44), pytest.approx(44 / 48))


def test_no_threshold_with_the_precision_is_refused_with_the_best(data: Collection) -> None:
    with pytest.raises(RefusedError, match=r"precision of 0\.9 on 20 of 48 dev queries or more; the best is 0\.50"):
        calibrate_on_dev(data, range(10), target_precision=0.9)


def test_too_few_dev_queries_are_refused_unless_the_thresholds_are_given(data: Collection) -> None:
    few = make_run({f"d{i}": [f"p{i}"] for i in range(39)})
    with pytest.raises(RefusedError, match="39 dev queries are too few to calibrate a teacher; it takes 40"):
        calibrate(data, few, make_dev_teacher(range(DEV)), LabelConfig())
    assert calibrate(data, few, make_dev_teacher(range(DEV)), LabelConfig(s_pos=0.5)).queries == 39


def test_a_dev_query_without_candidates_is_passed_over(data: Collection) -> None:
    candidates = make_candidates({}, d0=[])
    found = calibrate(data, candidates.merged, make_dev_teacher(range(DEV)), LabelConfig(label_depth=DEV))
    assert found.queries == DEV - 1


# --- the stage --------------------------------------------------------------------------------------------------------

SURE = {("u0", "p3"): 0.99, ("u0", "p1"): 0.01, ("u0", "p5"): 0.02, ("u1", "p4"): 0.95, ("u2", "p1"): 0.01}


def test_a_pool_query_gets_its_sure_positive_and_negatives_with_scores(data: Collection, tmp_path: Path) -> None:
    facts, rows = label(data, make_candidates({}), TableTeacher(SURE), tmp_path / "x")
    (row,) = rows["pseudo"]
    assert (row.query_id, row.positive_id, row.negative_ids) == ("u0", "p3", ("p1", "p5"))
    assert (row.known_positive_ids, row.source) == (("p3",), "pseudo")
    assert row.positive_score == pytest.approx(0.99)
    assert row.negative_scores == pytest.approx((0.01, 0.02))
    assert (facts["pseudo"], facts["pool"]) == (1, 4)
    assert facts["counts"]["pool queries without a sure positive or negative"] == 3


def test_a_labelled_query_keeps_the_mined_negatives_below_s_neg(data: Collection, tmp_path: Path) -> None:
    # p9 is below s_neg too, but mining has not taken it.
    table = SURE | {("t1", "p5"): 0.05, ("t1", "p6"): 0.1, ("t1", "p7"): 0.8, ("t1", "p8"): 0.0, ("t1", "p9"): 0.0}
    candidates = make_candidates({"t1": ["p5", "p6", "p7", "p8"]})
    facts, rows = label(data, candidates, TableTeacher(table), tmp_path / "x")
    (row,) = rows["labelled"]
    assert (row.query_id, row.positive_id, row.negative_ids) == ("t1", "p2", ("p5", "p8"))
    assert row.negative_scores == pytest.approx((0.05, 0.0))
    assert row.positive_score == 0.5
    assert facts["counts"]["mined negatives kept"] == 2
    assert facts["counts"]["mined negatives the teacher rejects"] == 2


def test_a_labelled_query_also_keeps_negatives_below_its_own_positive_where_asked(
    data: Collection, tmp_path: Path
) -> None:
    table = SURE | {("t1", "p2"): 0.7, ("t1", "p5"): 0.6, ("t1", "p6"): 0.7, ("t1", "p7"): 0.8, ("t1", "p8"): 0.0}
    candidates = make_candidates({"t1": ["p5", "p6", "p7", "p8"]})
    _, rows = label(data, candidates, TableTeacher(table), tmp_path / "x", negatives_below="positive")
    assert rows["labelled"][0].negative_ids == ("p5", "p8")  # strictly below, in rank order
    assert rows["pseudo"][0].negative_ids == ("p1", "p5")  # the pool has no known positive


def test_of_several_positives_the_one_that_scores_lowest_is_the_limit(data: Collection, tmp_path: Path) -> None:
    table = SURE | {("t0", "p0"): 0.9, ("t0", "p1"): 0.7, ("t0", "p5"): 0.8, ("t0", "p6"): 0.6}
    candidates = make_candidates({"t0": ["p5", "p6"]}, t0=["p0", "p1", "p5", "p6"])
    _, rows = label(data, candidates, TableTeacher(table), tmp_path / "x", negatives_below="positive")
    assert {row.negative_ids for row in rows["labelled"]} == {("p6",)}


@pytest.mark.parametrize("positive", [None, 0.1])
def test_a_positive_that_is_not_scored_or_scores_low_leaves_s_neg_the_limit(
    data: Collection, tmp_path: Path, positive: float | None
) -> None:
    table = SURE | {("t1", "p5"): 0.2, ("t1", "p6"): 0.3} | ({} if positive is None else {("t1", "p2"): positive})
    listed = ["p5", "p6"] if positive is None else ["p2", "p5", "p6"]
    candidates = make_candidates({"t1": ["p5", "p6"]}, t1=listed)
    options = {"s_neg": 0.25, "negatives_below": "positive"}
    _, rows = label(data, candidates, TableTeacher(table), tmp_path / "x", **options)
    assert rows["labelled"][0].negative_ids == ("p5",)


def test_a_labelled_row_keeps_the_teachers_score_of_its_positive_where_there_is_one(
    data: Collection, tmp_path: Path
) -> None:
    # Of the positives p0 and p1 of t0 only p1 is a candidate: nobody scored the other.
    table = SURE | {("t0", "p1"): 0.75, ("t0", "p5"): 0.25, ("t1", "p2"): 0.625}
    candidates = make_candidates({"t0": ["p5"], "t1": []}, t0=["p1", "p5", "p6"])
    _, rows = label(data, candidates, TableTeacher(table), tmp_path / "x", s_neg=0.5)
    first, second, third = (row.positive_score for row in rows["labelled"])
    assert math.isnan(first)
    assert (second, third) == (0.75, 0.625)
    assert {row.negative_scores for row in rows["labelled"]} == {(0.25,), ()}
    assert all(math.isnan(row.positive_score) for row in rows["plain"])


def test_there_is_one_row_per_positive_and_each_knows_the_others(data: Collection, tmp_path: Path) -> None:
    table = SURE | {("t0", "p5"): 0.0}
    _, rows = label(data, make_candidates({"t0": ["p5"], "t1": []}), TableTeacher(table), tmp_path / "x")
    assert [(row.query_id, row.positive_id) for row in rows["labelled"]] == [("t0", "p0"), ("t0", "p1"), ("t1", "p2")]
    assert rows["labelled"][0].known_positive_ids == ("p0", "p1")
    assert rows["labelled"][1].negative_ids == ("p5",)
    assert rows["labelled"][2].negative_ids == ()


def test_no_more_negatives_than_asked_for_are_stored(data: Collection, tmp_path: Path) -> None:
    table = {("u0", "p3"): 0.99} | {(q, f"p{i}"): 0.0 for q in ("u0", "t1") for i in range(4, 12)}
    mined = {"t1": [f"p{i}" for i in range(4, 12)]}
    _, rows = label(data, make_candidates(mined), TableTeacher(table), tmp_path / "x", negatives=3)
    for name in ("plain", "labelled", "pseudo"):
        assert [row.negative_ids for row in rows[name]] == [("p4", "p5", "p6")], name


def test_the_teacher_sees_candidates_to_the_depth_and_no_further(data: Collection, tmp_path: Path) -> None:
    teacher = TableTeacher(SURE | {("t1", "p5"): 0.0, ("t1", "p7"): 0.0})
    _, rows = label(data, make_candidates({"t1": ["p5", "p7"]}), teacher, tmp_path / "x", label_depth=7)
    assert set(teacher.asked.values()) == {7}
    assert rows["labelled"][0].negative_ids == ("p5",)


def test_plain_rows_have_the_negatives_as_mined(data: Collection, tmp_path: Path) -> None:
    _, rows = label(data, make_candidates({"t1": ["p7", "p5"]}), TableTeacher(SURE), tmp_path / "x")
    (row,) = rows["plain"]
    assert row.negative_ids == ("p7", "p5")
    assert all(math.isnan(score) for score in row.negative_scores)


def test_without_a_teacher_the_labels_are_all_there_is(data: Collection, tmp_path: Path) -> None:
    candidates = make_candidates({"t0": ["p5"], "t1": ["p7"]})
    facts = label_examples(data, candidates, None, LabelConfig(), tmp_path / "x", note="nothing beat the student")
    rows = {name: list(Examples.open(tmp_path / "x" / f"{name}.arrow")) for name in ("plain", "labelled", "pseudo")}
    assert [(row.query_id, row.positive_id, row.negative_ids) for row in rows["labelled"]] == [
        ("t0", "p0", ("p5",)),
        ("t0", "p1", ("p5",)),
        ("t1", "p2", ("p7",)),
    ]
    assert len(rows["plain"]) == 3
    assert rows["pseudo"] == []
    assert (facts["teacher"], facts["note"], facts["labelled"], facts["pseudo"]) == (
        None,
        "nothing beat the student",
        3,
        0,
    )


def test_the_facts_are_kept_in_the_manifest(data: Collection, tmp_path: Path) -> None:
    facts, _ = label(data, make_candidates({"t1": ["p5"]}), TableTeacher(SURE), tmp_path / "x")
    assert read_manifest(tmp_path / "x", "examples").facts == facts
    assert facts["teacher"] == "table"
    assert facts["calibration"]["s_pos"] == 0.9
    assert facts["hidden"] is None


def test_next_to_no_pseudo_label_is_refused(data: Collection, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"0 of 4 pool queries \(0\.0%\) get a pseudo label with s_pos 0\.900"):
        label(data, make_candidates({}), TableTeacher({}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_pseudo_label_for_nearly_every_query_is_refused(data: Collection, tmp_path: Path) -> None:
    table = {(f"u{i}", "p3"): 0.99 for i in range(4)} | {(f"u{i}", "p5"): 0.0 for i in range(4)}
    with pytest.raises(RefusedError, match=r"4 of 4 pool queries \(100\.0%\)"):
        label(data, make_candidates({}), TableTeacher(table), tmp_path / "x")


def test_a_near_copy_of_the_pseudo_positive_is_no_negative(tmp_path: Path, write_beir: Callable[..., Path]) -> None:
    corpus = {"p": "the quick brown fox", "copy": "The QUICK brown fox!", "n": "a slow dog"}
    qrels = {"train": {"t": {"n": 1}}, "dev": {"d": {"n": 1}}}
    queries = {"t": "train", "d": "dev", "u": "pool", "v": "another of the pool"}
    data = open_collection(write_beir(tmp_path / "data", corpus, queries, qrels))
    candidates = make_of(make_run({query_id: ["copy", "p", "n"] for query_id in queries}), {"t": ["p"]})
    table = {("u", "p"): 0.99, ("u", "copy"): 0.0, ("u", "n"): 0.0, ("v", "p"): 0.99, ("v", "copy"): 0.0}
    facts, rows = label(data, candidates, TableTeacher(table), tmp_path / "x")
    assert [(row.query_id, row.negative_ids) for row in rows["pseudo"]] == [("u", ("n",))]
    assert facts["counts"]["pool queries without a sure positive or negative"] == 1


def test_candidates_of_other_data_are_refused(data: Collection, tmp_path: Path) -> None:
    candidates = make_of(make_candidates({}).merged, {}, collection="0123456789abcdef")
    with pytest.raises(ArtefactError, match="mined from data 0123456789ab"):
        label(data, candidates, TableTeacher(SURE), tmp_path / "x")


def test_an_empty_pool_is_no_reason_to_refuse(tmp_path: Path, write_beir: Callable[..., Path]) -> None:
    qrels = {"train": {"q": {"p0": 1}}, "dev": {"d": {"p1": 1}}}
    data = open_collection(
        write_beir(tmp_path / "data", {"p0": "a", "p1": "b", "p2": "c"}, {"q": "x", "d": "y"}, qrels)
    )
    run = make_run({"q": ["p2", "p0"], "d": ["p1"]})
    candidates = make_of(run, {"q": ["p2"]})
    facts, rows = label(data, candidates, TableTeacher({("q", "p2"): 0.0}), tmp_path / "x")
    assert (facts["pool"], facts["pseudo"]) == (0, 0)
    assert [row.negative_ids for row in rows["labelled"]] == [("p2",)]


def test_precision_is_measured_on_hidden_labels(folder: Path, tmp_path: Path) -> None:
    data = open_collection(folder, DataConfig(hide_labels=0.5))
    ((hidden, judged),) = data.hidden.items()
    right = next(iter(judged))
    table = {(hidden, right): 0.99, (hidden, "p9"): 0.0, ("u0", "p3"): 0.99, ("u0", "p9"): 0.0}
    facts, rows = label(data, make_candidates({}), TableTeacher(table), tmp_path / "x")
    assert {row.query_id for row in rows["pseudo"]} == {hidden, "u0"}
    assert facts["hidden"] == {"checked": 1, "right": 1, "precision": 1.0}


def test_a_wrong_pseudo_positive_lowers_the_measured_precision() -> None:
    rows = [Example(f"q{i}", "p0", ("p1",), ("p0",), "pseudo", 1.0, (0.0,)) for i in range(4)]
    hidden = {"q0": {"p0": 1}, "q1": {"p5": 1}, "q2": {"p0": 0, "p5": 1}}
    assert measure_precision(rows, hidden) == {"checked": 3, "right": 1, "precision": pytest.approx(1 / 3)}
    assert measure_precision(rows, {}) is None
