"""Comparisons against scipy, against counting by hand, and their words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pairdr.artefact import verify_artefact
from pairdr.cli import main
from pairdr.compare import compare_seeds, compare_values, correct_holm, find_detectable, read_system
from pairdr.config import EvaluateConfig
from pairdr.errors import ArtefactError, DataError, UsageError
from pairdr.evaluate import evaluate_run
from pairdr.formats import read_run
from pairdr.measures import PerQuery
from pairdr.store_config import CompareConfig

CONFIG = CompareConfig(measures=("RR@10",), resamples=2000)


def make(values: np.ndarray) -> PerQuery:
    return {"RR@10": {f"q{at:03d}": float(value) for at, value in enumerate(values)}}


def draw(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([0, 0.1, 0.2, 0.5, 1.0], count)


def test_means_intervals_and_counts_are_those_of_the_numbers() -> None:
    first, second = draw(200, 1), np.clip(draw(200, 1) + 0.1 * (np.arange(200) % 4 == 0), 0, 1)
    found = compare_values({"start": [make(first)], "pair": [make(second)]}, CONFIG)
    (difference,) = found.differences
    gaps = second - first
    assert difference.difference == pytest.approx(gaps.mean())
    assert (difference.wins, difference.ties, difference.losses) == ((gaps > 0).sum(), (gaps == 0).sum(), 0)
    t = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert difference.interval == pytest.approx((t.low, t.high), abs=0.004)
    mean = stats.ttest_1samp(first, 0).confidence_interval(0.95)
    assert found.systems[0].interval == pytest.approx((mean.low, mean.high), abs=0.01)
    assert difference.p_value == difference.p_holm < 0.001
    assert difference.verdict.startswith("pair is better than start: +0.0")
    assert "better on" in found.format()


def test_the_p_value_is_that_of_a_paired_test() -> None:
    first, second = draw(60, 1), draw(60, 2)
    found = compare_values({"a": [make(first)], "b": [make(second)]}, CompareConfig(measures=("RR@10",)))
    expected = stats.ttest_rel(first, second).pvalue  # nearly that of the randomisation test for so many queries
    assert found.differences[0].p_value == pytest.approx(expected, abs=0.03)


def test_where_nothing_is_shown_it_says_what_would_have_been() -> None:
    first = draw(100, 3)
    second = first.copy()
    second[:2] = second[:2][::-1] + 0.01
    (found,) = compare_values({"a": [make(first)], "b": [make(second)]}, CONFIG).differences
    assert found.verdict.startswith("No difference between b and a could be shown")
    assert f"100 queries would show one of {found.detectable:.4f} in 80% of all cases." in found.verdict


def test_equal_systems_have_no_difference() -> None:
    values = draw(50, 4)
    comparison = compare_values({"a": [make(values)], "b": [make(values)]}, CONFIG)
    (found,) = comparison.differences
    assert (found.difference, found.interval, found.p_value, found.p_seeds, found.ties) == (0, (0, 0), 1, None, 50)
    assert found.verdict.endswith("p = 1.000.")  # no difference that these queries would have shown
    assert comparison.format().splitlines()[-1] == "One run of each: what another seed would give is not known."


def test_a_handful_of_queries_is_not_said_to_show_what_no_measure_can_have() -> None:
    (found,) = compare_values({"a": [make(np.array([0, 1, 0]))], "b": [make(np.array([1, 0, 1]))]}, CONFIG).differences
    assert found.detectable is not None and found.detectable > 1
    assert "would show" not in found.verdict


def test_one_query_has_a_comparison_that_is_json(tmp_path: Path) -> None:
    (found,) = compare_values({"a": [make(np.ones(1))], "b": [make(np.zeros(1))]}, CONFIG, tmp_path / "o").differences
    assert found.detectable is None and "would show" not in found.verdict

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((tmp_path / "o" / "comparison.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_where_the_seeds_are_the_limit_nothing_is_said_of_the_queries() -> None:
    base = np.full(60, 0.2)
    pairs = [(base, base + gap) for gap in (0.2, 0.3, 0.05)]
    first, second = ([make(pair[at]) for pair in pairs] for at in (0, 1))
    (found,) = compare_values({"a": first, "b": second}, CONFIG).differences
    assert found.p_value < 0.05 < found.p_holm
    assert "would show one of" not in found.verdict
    assert found.verdict.endswith("Over queries alone it would be: the seeds are too few, or differ too much.")


def test_a_level_that_no_resample_reaches_is_refused() -> None:
    systems = {"a": [make(draw(60, 1))], "b": [make(draw(60, 2))]}
    with pytest.raises(UsageError, match=r"no p-value is below 0\.0002") as error:
        compare_values(systems, CompareConfig(measures=("RR@10",), level=1e-4))
    words = str(error.value.remedy).split()
    compare_values(systems, CompareConfig(measures=("RR@10",), level=1e-4, resamples=int(words[2].strip(","))))


def test_equal_runs_are_said_to_be_no_seeds() -> None:
    values = draw(50, 4)
    comparison = compare_values({"a": [make(values)] * 3, "b": [make(draw(50, 5))] * 2}, CONFIG)
    found = comparison.format()
    assert "The 3 runs of a are 1 different ones, the others equal on every query" in found
    assert "The 2 runs of b are 1 different ones" in found
    assert comparison.differences[0].p_seeds is None
    assert "different ones" not in compare_values({"a": [make(values)], "b": [make(values)]}, CONFIG).format()


def test_seeds_that_tie_on_the_tested_measure_alone_are_seeds() -> None:
    seeds = [make(np.ones(20)) | {"nDCG@10": make(draw(20, seed))["RR@10"]} for seed in (1, 2)]
    config = CompareConfig(measures=("RR@10", "nDCG@10"), resamples=2000)
    found = compare_values({"a": seeds, "b": seeds[::-1]}, config)
    assert [system.distinct for system in found.systems] == [2, 2]
    assert "different ones" not in found.format() and "One run of each" not in found.format()


def test_so_few_queries_that_nothing_can_be_shown_are_said_to_be() -> None:
    (found,) = compare_values({"a": [make(np.zeros(5))], "b": [make(np.full(5, 0.9))]}, CONFIG).differences
    assert found.verdict.endswith("p = 0.062. 5 queries can show none.")
    six = {name: [make(np.full(6, value))] for name, value in {"a": 0.0, "b": 0.9, "c": 0.8}.items()}
    first, _ = compare_values(six, CONFIG).differences  # p = 2 / 2^6, twice that by Holm
    assert first.verdict.endswith("6 queries can show none.")
    (enough,) = compare_values({name: six[name] for name in "ab"}, CONFIG).differences
    assert enough.verdict.startswith("b is better than a")


def test_holms_correction_of_the_queries_says_whether_it_is_the_seeds() -> None:
    base, gaps = np.full(30, 0.2), np.zeros(30)
    gaps[:6] = 0.3  # p = 2 / 2^6
    apart = [make(base + 0.2 + gaps), make(base - 0.2 + gaps)]
    systems = {"a": [make(base)], "b": [make(base + 0.5)], "c": apart}
    found = compare_values(systems, CONFIG).differences[1]
    assert 0.025 < found.p_value < 0.05 and found.p_seeds is not None
    assert found.verdict.endswith("Over queries alone it would be: the seeds are too few, or differ too much.")


def test_rounding_is_no_difference() -> None:
    seeds = [make(np.full(200, value)) for value in (0.1, 0.2, 0.3)]
    (found,) = compare_values({"a": seeds, "b": seeds[::-1]}, CONFIG).differences
    assert (found.p_value, found.wins, found.ties, found.losses) == (1, 0, 200, 0)
    assert found.verdict.startswith("No difference")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holms_correction_is_that_of_its_definition(p_values: list[float]) -> None:
    corrected = correct_holm(p_values)
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    before = 0.0
    for rank, at in enumerate(order):
        before = max(before, min(1.0, (len(p_values) - rank) * p_values[at]))
        assert corrected[at] == pytest.approx(before)
    assert all(one >= other for one, other in zip(corrected, p_values, strict=True))


def test_the_detectable_difference_is_detected_as_often_as_it_says() -> None:
    noise = np.random.default_rng(5).normal(0, 0.3, (2000, 80))
    found = [find_detectable(row, 1, 0.05, 0.8) for row in noise]
    shown = stats.ttest_1samp(noise + np.mean(found), 0, axis=1).pvalue < 0.05
    assert shown.mean() == pytest.approx(0.8, abs=0.03)
    assert find_detectable(noise[0], 5, 0.05, 0.8) > found[0] > find_detectable(noise[0], 1, 0.05, 0.5)


def test_several_comparisons_are_corrected_and_each_is_with_the_first() -> None:
    base = draw(150, 6)
    systems = {
        "bm25": [make(base)],
        "same": [make(base)],
        "better": [make(np.clip(base + 0.2, 0, 1))],
        "worse": [make(np.clip(base - 0.2, 0, 1))],
    }
    found = compare_values(systems, CONFIG)
    assert [difference.name for difference in found.differences] == ["same", "better", "worse"]
    assert [difference.p_holm >= difference.p_value for difference in found.differences] == [True] * 3
    assert found.differences[1].verdict.startswith("better is better than bm25")
    assert found.differences[2].verdict.startswith("worse is worse than bm25")


def test_seeds_are_averaged_per_query_and_counted() -> None:
    base = draw(100, 7)
    ours = [make(np.clip(base + step, 0, 1)) for step in (0.1, 0.2, -0.05)]
    found = compare_values({"a": [make(base), make(base)], "b": ours}, CONFIG)
    (difference,) = found.differences
    assert found.systems[1].seeds == pytest.approx([np.mean(list(seed["RR@10"].values())) for seed in ours])
    assert difference.difference == pytest.approx(np.mean(found.systems[1].seeds) - base.mean())
    assert (difference.agreeing, difference.pairs) == (4, 6)
    assert "3 seeds, deviation" in found.format()
    assert "4 of 6 pairs of seeds agree" in found.format()


def test_a_difference_has_to_stand_over_the_seeds_too() -> None:
    base = draw(300, 10)
    values = {"a": [make(base)], "b": [make(np.clip(base + step, 0, 1)) for step in (0.3, -0.05, -0.05)]}
    (found,) = compare_values(values, CONFIG).differences
    assert found.difference > 0
    assert found.p_value < 0.001 < 0.05 < found.p_seeds == found.p_holm
    assert found.verdict.startswith("No difference between b and a could be shown")
    assert "over queries p < 0.001, over seeds p = 0." in found.verdict
    values["b"] = [make(np.clip(base + step, 0, 1)) for step in (0.2, 0.21, 0.22)]
    (found,) = compare_values(values, CONFIG).differences
    assert found.verdict.startswith("b is better than a")
    assert found.p_seeds is not None
    assert found.p_holm == max(found.p_value, found.p_seeds)


def test_seeds_are_tested_as_scipy_does() -> None:
    mine, theirs = np.array([0.5, 0.52, 0.55]), np.array([0.48, 0.51, 0.5])
    assert compare_seeds(mine, theirs) == pytest.approx(stats.ttest_rel(mine, theirs).pvalue)
    assert compare_seeds(mine, theirs[:2]) == pytest.approx(stats.ttest_ind(mine, theirs[:2], equal_var=False).pvalue)
    alone = stats.ttest_1samp(mine, 0.48).pvalue
    assert compare_seeds(mine, theirs[:1]) == compare_seeds(theirs[:1], mine) == pytest.approx(alone)
    assert compare_seeds(mine[:1], theirs[:1]) is None
    assert compare_seeds(mine, mine) is compare_seeds(mine, mine - 0.1) is None  # no deviation to test by


def test_what_is_published_is_what_was_found(tmp_path: Path) -> None:
    found = compare_values({"a": [make(draw(20, 8))], "b": [make(draw(20, 9))]}, CONFIG, tmp_path / "out")
    verify_artefact(tmp_path / "out")
    assert (tmp_path / "out" / "comparison.txt").read_text(encoding="utf-8") == found.format() + "\n"
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert kept["differences"][0]["verdict"] == found.differences[0].verdict
    lines = (tmp_path / "out" / "per_query.tsv").read_text(encoding="utf-8").splitlines()
    assert (lines[0], len(lines)) == ("query\ta\tb", 21)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare_values({"a": [make(draw(5, 1))]}, CONFIG)
    with pytest.raises(DataError, match="'b' was measured on other queries"):
        compare_values({"a": [make(draw(5, 1))], "b": [make(draw(6, 1))]}, CONFIG)


RUN = "q1 Q0 a 1 2.0 x\nq1 Q0 b 2 1.0 x\nq2 Q0 b 1 2.0 x\n"


def test_places_of_every_kind_are_read(tmp_path: Path) -> None:
    (tmp_path / "one.trec").write_text(RUN, encoding="utf-8")
    (tmp_path / "two.trec").write_text(RUN.replace("q1 Q0 a 1", "q1 Q0 c 1"), encoding="utf-8")
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}}
    evaluate_run(read_run(tmp_path / "one.trec"), qrels, EvaluateConfig(), tmp_path / "evaluation")
    name, (values,) = read_system(str(tmp_path / "one.trec"), qrels, ("RR@10",))
    assert (name, values) == ("one", {"RR@10": {"q1": 1.0, "q2": 1.0}})
    name, seeds = read_system(f"both={tmp_path / 'one.trec'},{tmp_path / 'two.trec'}", qrels, ("RR@10",))
    assert (name, [seed["RR@10"]["q1"] for seed in seeds]) == ("both", [1.0, 0.0])
    assert read_system(f"kept={tmp_path / 'evaluation'}", None, ("RR@10",)) == ("kept", [values])
    with pytest.raises(UsageError, match=r"one\.trec: A run is measured by labels\. Name them as --qrels"):
        read_system(str(tmp_path / "one.trec"), None, ("RR@10",))
    with pytest.raises(UsageError, match=r"evaluation: This was measured already, and --qrels would not count"):
        read_system(str(tmp_path / "evaluation"), qrels, ("RR@10",))
    with pytest.raises(UsageError, match=r"There is no nDCG@3 here\. --measures can be: RR@10, nDCG@10, R@100"):
        read_system(str(tmp_path / "evaluation"), None, ("nDCG@3",))


def test_names_may_hold_dots_and_places_equals_signs(tmp_path: Path) -> None:
    qrels = {"q1": {"a": 1}}
    folder = tmp_path / "alpha=0.1"
    folder.mkdir()
    for name in ("run.trec", "pair-0.3"):
        (folder / name).write_text(RUN, encoding="utf-8")
    assert read_system(str(folder / "run.trec"), qrels, ("RR@10",))[0] == "run"
    assert read_system(f"x={folder / 'run.trec'}", qrels, ("RR@10",))[0] == "x"
    assert read_system(str(folder / "pair-0.3"), qrels, ("RR@10",))[0] == "pair-0.3"
    (folder / "a,b.trec").write_text(RUN, encoding="utf-8")
    name, seeds = read_system(str(folder / "a,b.trec"), qrels, ("RR@10",))
    assert (name, len(seeds)) == ("a,b", 1)
    places = [folder / f"{number}.trec" for number in range(40)]
    for place in places:
        place.write_text(RUN, encoding="utf-8")
    name, seeds = read_system(f"x={','.join(map(str, places))}", qrels, ("RR@10",))  # longer than a name may be
    assert (name, len(seeds)) == ("x", 40)
    with pytest.raises(UsageError, match=r"0\.trec: This run is named twice; it is one seed"):
        read_system(f"x={places[0]},{places[1]},{places[0].parent / 'x' / '..' / places[0].name}", qrels, ("RR@10",))


def test_a_work_folder_whose_run_has_not_ended_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"The run has not ended here\. Call pairdr run once more"):
        read_system(str(tmp_path), None, ("RR@10",))
    with pytest.raises(SystemExit) as end:
        main(["audit", str(tmp_path), "-o", str(tmp_path / "audit")])
    assert end.value.code == 1


def test_a_run_of_other_queries_is_refused_and_one_that_lacks_some_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "one.trec"
    run.write_text(RUN, encoding="utf-8")
    with pytest.raises(DataError, match=r"The run has no query of the labels\. Take the labels of the split"):
        read_system(str(run), {"q7": {"a": 1}}, ("RR@10",))
    _, (values,) = read_system(str(run), {"q1": {"a": 1}, "q7": {"a": 1}}, ("RR@10",))
    assert values["RR@10"] == {"q1": 1.0, "q7": 0.0}
    assert "1 of 2 queries of the labels are not in this run; they count as 0." in capsys.readouterr().err
