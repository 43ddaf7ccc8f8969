"""What is watched: a dev sample of the stated size, means, similarities, speed, and signs that training goes wrong."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from training import make_config

from pairdr import watch
from pairdr.watch import DEV, DevSample, Means, Meter, find_alarms, measure_peak, measure_similarities

if TYPE_CHECKING:
    from conftest import Parts


# --- dev --------------------------------------------------------------------------------------------------------------


def test_the_dev_sample_has_the_stated_size(toy_parts: Parts) -> None:
    small = DevSample(toy_parts.collection, make_config(eval_queries=7, eval_passages=20))
    assert len(small.queries) == 7
    assert 7 <= len(small.passages) <= 20
    assert set().union(*small.positives) <= {passage.passage_id for passage in small.passages}
    full = DevSample(toy_parts.collection, make_config(eval_queries=500, eval_passages=5000))
    assert (len(full.queries), len(full.passages)) == (48, 120)


def test_the_dev_positives_are_there_however_small_the_sample(toy_parts: Parts) -> None:
    sample = DevSample(toy_parts.collection, make_config(eval_queries=7, eval_passages=1))
    assert {passage.passage_id for passage in sample.passages} == set().union(*sample.positives)


def test_the_dev_sample_over_all_passages_is_the_measure_over_the_corpus(toy_parts: Parts) -> None:
    from pairdr.config import SearchConfig
    from pairdr.measures import mean_measures, measure_run
    from pairdr.records import Run
    from pairdr.search import rank_dense

    data = toy_parts.collection
    queries = [data.query(query_id) for query_id in data.qrels("dev")]
    ((ids, ranked),) = rank_dense(queries, toy_parts.encoder, toy_parts.store, SearchConfig(k=10))
    measured = measure_run(Run.from_mapping(dict(zip(ids, ranked, strict=True))), data.qrels("dev"), ["RR@10"])
    sample = DevSample(data, make_config(eval_queries=500, eval_passages=5000))
    assert sample.measure(toy_parts.encoder) == pytest.approx(mean_measures(measured)["RR@10"])


def test_the_dev_sample_is_a_function_of_the_seed(toy_parts: Parts) -> None:
    def draw(seed: int) -> list[str]:
        return [query.query_id for query in DevSample(toy_parts.collection, make_config(seed=seed)).queries]

    assert draw(1) == draw(1) != draw(2)


# --- means and similarities -------------------------------------------------------------------------------------------


def test_a_mean_is_over_the_steps_that_have_the_value() -> None:
    means = Means()
    means.add(loss=1.0)
    means.add(loss=3.0, other=5.0)
    assert means.flush() == {"loss": 2.0, "other": 5.0}
    assert means.flush() == {}


def test_padding_does_not_count_in_the_similarities() -> None:
    query, positive = torch.eye(2), torch.eye(2)
    negative = torch.tensor([[[3.0, 1.0]], [[9.0, 9.0]]])
    found = measure_similarities(query, positive, negative, torch.tensor([[True], [False]]))
    assert found == {"s(q,p+)": 1.0, "s(q,p-)": 3.0, "s(p+,p-)": 3.0, "alike": 0.0}
    nothing = measure_similarities(query, positive, negative, torch.zeros(2, 1, dtype=torch.bool))
    assert nothing == {"s(q,p+)": 1.0, "alike": 0.0}


def test_alike_is_the_mean_cosine_between_different_positives_whatever_their_length() -> None:
    positive = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
    negative, valid = torch.zeros(3, 0, 2), torch.zeros(3, 0, dtype=torch.bool)
    found = measure_similarities(positive, positive, negative, valid)
    assert found["alike"] == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3)
    assert measure_similarities(*[torch.ones(3, 2)] * 2, negative, valid)["alike"] == pytest.approx(1.0)
    assert "alike" not in measure_similarities(positive[:1], positive[:1], negative[:1], valid[:1])


def test_similarities_have_no_graph() -> None:
    query = torch.eye(2).requires_grad_()
    found = measure_similarities(query, query, torch.zeros(2, 0, 2), torch.zeros(2, 0, dtype=torch.bool))
    assert all(type(value) is float for value in found.values())


# --- speed ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a clock that shows what its `now` is set to."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_the_meter_gives_tokens_per_second_padding_and_the_share_of_the_peak(clock: SimpleNamespace) -> None:
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 10), nn.LayerNorm(10), nn.Linear(10, 6))
    meter = Meter(model, peak=30_000.0)
    meter.add([[5, 10], [3]])
    meter.add([[10, 12]])
    clock.now += 4.0
    # 40 tokens, padded to 20 + 3 + 24; 100 weights in linear layers, 6 operations each a token.
    found = meter.flush()
    assert found == pytest.approx({"tokens_per_second": 10.0, "padding": 7 / 47, "gemm_share": 600 * 10 / 30_000})


def test_a_frozen_layer_costs_no_gradient_of_its_weights(clock: SimpleNamespace) -> None:
    model = nn.Sequential(nn.Linear(4, 10), nn.Linear(4, 10).requires_grad_(False))
    meter = Meter(model, 1e3)
    meter.add([[8]])
    clock.now += 1.0
    assert meter.flush()["gemm_share"] == pytest.approx((6 + 4) * 40 * 8 / 1e3)


def test_a_token_costs_the_weights_of_one_tower(clock: SimpleNamespace) -> None:
    model, shares = nn.Sequential(nn.Linear(4, 10), nn.Linear(4, 10)), []
    for towers in (1, 2):
        meter = Meter(model, 1e3, towers)
        meter.add([[8]])
        clock.now += 1.0
        shares.append(meter.flush()["gemm_share"])
    assert shares == pytest.approx([6 * 80 * 8 / 1e3, 6 * 40 * 8 / 1e3])


def test_the_meter_starts_anew_after_each_line(clock: SimpleNamespace) -> None:
    meter = Meter(nn.Linear(1, 1), peak=1.0)
    meter.add([[8]])
    clock.now += 1.0
    meter.flush()
    clock.now += 50.0  # what is not training, such as a look at dev
    assert meter.flush() == {}
    meter.add([[6, 6]])
    clock.now += 2.0
    assert meter.flush() == pytest.approx({"tokens_per_second": 6.0, "padding": 0.0, "gemm_share": 36.0})


def test_the_peak_is_that_of_the_quickest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = iter([9.0, 2.0, 0.5, 4.0])
    ticks = iter([0.0, *(tick for span in spans for tick in (span, 0.0))])
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert measure_peak(torch.device("cpu"), torch.float32, size=8, rounds=3) == 2 * 8**3 / 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_this_machine_is_a_finite_number(dtype: torch.dtype) -> None:
    assert 0 < measure_peak(torch.device("cpu"), dtype, size=64, rounds=2) < math.inf


# --- alarms -----------------------------------------------------------------------------------------------------------

START = 0.4


def make_line(**values: Any) -> dict[str, Any]:
    return {"step": 10, "loss": 1.0, "alike": 0.5, DEV: 0.4} | values


def test_a_healthy_line_gives_no_alarm() -> None:
    assert find_alarms(make_line(), START) == []
    assert find_alarms({"step": 10, "loss": 1.0}, START) == []


def test_passages_that_are_all_alike_give_an_alarm_with_what_helps() -> None:
    (alarm,) = find_alarms(make_line(alike=0.985), START)
    assert "all passages are nearly alike (mean cosine 0.985): lower learning_rate or alpha" in alarm
    assert find_alarms(make_line(alike=0.98), START) == []


def test_a_model_below_its_start_on_dev_gives_an_alarm_with_both_numbers() -> None:
    assert find_alarms(make_line(**{DEV: 0.3999}), START) == ["dev_RR@10 0.3999 is below the start model's 0.4000"]


def test_two_worries_are_two_alarms() -> None:
    assert len(find_alarms(make_line(alike=1.0, **{DEV: 0.0}), START)) == 2
