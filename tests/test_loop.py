"""The loop of one stage: the same seed gives the same weights, every option does what it says, the log tells it all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from training import (
    BOTH,
    PAIR,
    QUERY,
    hash_after,
    make_config,
    make_examples,
    make_row,
    make_toy_rows,
    open_start,
    run,
    take_batches,
)

from pairdr import loop
from pairdr.config import StageConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import DataError, PairdrError
from pairdr.formats import Examples
from pairdr.loop import State, backward_batch, read_batches, run_stage, update_parameters
from pairdr.tuning import make_optimizer, prepare_model

if TYPE_CHECKING:
    from conftest import Parts


@pytest.fixture(autouse=True)
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare every stage the measurement of the machine."""
    monkeypatch.setattr(loop, "measure_peak", lambda device, dtype: 1e12)


@pytest.fixture(scope="module")
def rows(toy_parts: Parts) -> Examples:
    """Return the labelled questions of the toy data with mined negatives."""
    return make_toy_rows(toy_parts)


@pytest.fixture
def encoder(toy_parts: Parts) -> DualEncoder:
    """Return the start model, to be trained in place."""
    return open_start(toy_parts)


# --- the two relations ------------------------------------------------------------------------------------------------


def test_any_other_alpha_is_another_model(toy_parts: Parts, rows: Examples) -> None:
    weights = {hash_after(toy_parts, rows, StageConfig("pair", alpha, BOTH)) for alpha in (0.0, 0.1, 0.5)}
    assert len(weights) == 3


@pytest.mark.slow
def test_the_passage_centric_loss_parts_positives_from_negatives(toy_parts: Parts, rows: Examples) -> None:
    def measure_gap(alpha: float) -> float:
        """Return mean s(p+,p-) - s(p+,q) over all rows after training."""
        fresh = open_start(toy_parts)
        options = {"max_steps": 25, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "dropout": 0.0}
        run(toy_parts, rows, fresh, StageConfig("pair", alpha, BOTH), **options)
        data = toy_parts.collection
        gaps = []
        for row in rows:
            texts = [data.passage(p) for p in (row.positive_id, *row.negative_ids)]
            positive, *negatives = fresh.encode_passages(texts)
            query = fresh.encode_queries([data.query(row.query_id).text])[0]
            gaps += [float(positive @ negative - positive @ query) for negative in negatives]
        return float(np.mean(gaps))

    assert measure_gap(0.1) < measure_gap(0.0) - 0.01


@pytest.mark.slow
def test_the_loss_falls_and_dev_rises(toy_parts: Parts, rows: Examples, encoder: DualEncoder) -> None:
    options = {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "eval_queries": 30}
    log = run(toy_parts, rows, encoder, PAIR, **options | {"eval_passages": 120})
    losses_found = [line["loss"] for line in log[1:]]
    assert losses_found[-1] < 0.7 * losses_found[0]
    assert log[-1]["dev_RR@10"] > log[0]["dev_RR@10"] + 0.1


# --- the seed ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights(toy_parts: Parts, rows: Examples) -> None:
    first, again, other = (hash_after(toy_parts, rows, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def embed_twice(parts: Parts, rows: Examples, encoder: DualEncoder, **options: Any) -> list[float]:
    """Return the loss of one batch, computed twice in a row."""
    (batch,) = take_batches(rows, 1)
    config = make_config(**options)
    with prepare_model(encoder, config) as model:
        model.train()
        return [backward_batch(parts.collection, encoder, batch, 0.1, config)[0]["loss"] for _ in "ab"]


def test_dropout_is_an_option_and_zero_turns_it_off(toy_parts: Parts, rows: Examples, encoder: DualEncoder) -> None:
    assert len({hash_after(toy_parts, rows, dropout=dropout) for dropout in (None, 0.0, 0.5)}) == 3
    still, moved = (embed_twice(toy_parts, rows, encoder, dropout=dropout) for dropout in (0.0, 0.5))
    assert still[0] == still[1]
    assert moved[0] != moved[1]


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [["q"], ["q", "q", "q"]], ids=["one row", "one query"])
def test_too_few_examples_are_refused(queries: Sequence[str]) -> None:
    few = make_examples([make_row(q, f"p{number}") for number, q in enumerate(queries)])
    with pytest.raises(DataError, match=f"^{len(queries)} examples make no batch of 2 rows with different queries"):
        take_batches(few, 1)


@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_a_batch_shrinks_to_the_rows_that_there_are(size: int) -> None:
    few = make_examples([make_row(f"q{number}", f"p{number}") for number in range(2)])
    (batch,) = take_batches(few, 1, per_device_train_batch_size=size)
    assert sorted(batch.query_ids) == ["q0", "q1"]


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_each_row_brings_so_many_hard_negatives(rows: Examples, negatives: int) -> None:
    (batch,) = take_batches(rows, 1, train_negatives=negatives)
    assert batch.negative.shape == (8, negatives)


def test_batches_go_on_epoch_after_epoch_in_new_order(rows: Examples) -> None:
    drawn = [batch.query_ids for batch in take_batches(Examples(rows.table.slice(0, 16)), 4)]
    first, second = drawn[0] + drawn[1], drawn[2] + drawn[3]
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("used", [1, 2, 3, 5])
def test_batches_go_on_where_a_saved_state_stands(rows: Examples, used: int) -> None:
    config, few = make_config(train_negatives=2), Examples(rows.table.slice(0, 16))
    whole, state = take_batches(few, 7, train_negatives=2), State(batch_size=8)
    stream = read_batches(few, config, state)
    for _ in range(used):
        next(stream)
    again = read_batches(few, config, State(epoch=state.epoch, batches=state.batches, batch_size=state.batch_size))
    for wanted, found in zip(whole[used:], again, strict=False):
        assert (found.query_ids, found.passage_ids) == (wanted.query_ids, wanted.passage_ids)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_out_the_rows_of_the_joint_batch_without_overlap(
    rows: Examples, monkeypatch: pytest.MonkeyPatch, ranks: int, shared: bool
) -> None:
    few, joint = Examples(rows.table.slice(0, 16)), 2 * ranks

    def read(rank: int, of: int) -> list[list[str]]:
        monkeypatch.setattr(loop, "count_ranks", lambda: of)
        monkeypatch.setattr(loop, "find_rank", lambda: rank)
        stream = read_batches(few, make_config(cross_batch_negatives=shared), State(batch_size=joint))
        return [next(stream).query_ids for _ in range(16 // joint)]

    parts = [read(rank, ranks) for rank in range(ranks)]
    together = [[query for part in batch for query in part] for batch in zip(*parts, strict=True)]
    assert together == read(0, 1)  # of one process
    seen = [query for batch in together for query in batch]
    assert sorted(seen) == sorted({row.query_id for row in few.take(range(16))})


# --- options ----------------------------------------------------------------------------------------------------------

OPTIONS = {
    "query_negatives": {"query_negatives": True},
    "symmetric": {"symmetric": True},
    "margin": {"false_negative_margin": 0.0},
    "matryoshka": {"matryoshka_dims": (8, 16)},
    "listwise": {"distillation": "listwise"},
    "listwise, lighter": {"distillation": "listwise", "distillation_weight": 0.1},
    "listwise, softer": {"distillation": "listwise", "distillation_temperature": 4.0},
    "margin_mse": {"distillation": "margin_mse"},
    "lamb": {"optimizer": "lamb"},
    "paper": {"lr_schedule": "paper", "warmup_steps": 1},
    "bf16": {"bf16": True},
}


@pytest.fixture(scope="module")
def hashes() -> dict[str, str]:
    """Collect the weights after each option, so that no two can be one."""
    return {}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_trains_another_model(
    toy_parts: Parts, rows: Examples, encoder: DualEncoder, hashes: dict[str, str], case: str
) -> None:
    log = run(toy_parts, rows, encoder, PAIR, max_steps=3, dropout=0.0, train_negatives=2, **OPTIONS[case])
    assert all(math.isfinite(value) for value in log[-1].values() if isinstance(value, float))
    expected = {"symmetric": "passage_to_query"} | dict.fromkeys(OPTIONS, "loss")
    assert (expected | {name: "distillation" for name in OPTIONS if OPTIONS[name].get("distillation")})[case] in log[-1]
    hashes[case] = encoder.hash_weights()
    plain = hash_after(toy_parts, rows, PAIR, max_steps=3, dropout=0.0, train_negatives=2)
    assert hashes[case] not in [plain, *(found for name, found in hashes.items() if name != case)]


def test_low_rank_additions_move_linear_layers_by_their_rank_and_nothing_else(
    toy_parts: Parts, rows: Examples, encoder: DualEncoder
) -> None:
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    run(toy_parts, rows, encoder, PAIR, lora_rank=2, learning_rate=1e-2, max_steps=3)
    after = encoder.model.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    layers = {name for name in after if "encoder.layer" in name and name.endswith("weight") and "Norm" not in name}
    assert moved == layers
    assert {int(torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5)) for name in moved} == {2}


def test_the_seed_decides_where_low_rank_additions_begin(toy_parts: Parts, rows: Examples) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))  # whatever was drawn before
        found.append(hash_after(toy_parts, rows, lora_rank=2, dropout=0.0, seed=seed))
    assert found[0] == found[1] != found[2]


# --- the log ----------------------------------------------------------------------------------------------------------


def test_dev_is_looked_at_at_the_start_at_intervals_and_at_the_end(
    toy_parts: Parts, rows: Examples, encoder: DualEncoder
) -> None:
    log = run(toy_parts, rows, encoder, PAIR, max_steps=13, eval_steps=4)
    assert [line["step"] for line in log] == [0, 4, 8, 10, 12, 13]
    assert [line["step"] for line in log if "dev_RR@10" in line] == [0, 4, 8, 12, 13]
    names = ("loss", "query_centric", "passage_centric", "s(q,p+)", "s(q,p-)", "s(p+,p-)", "alike", "learning_rate")
    for name in (*names, "tokens_per_second", "padding", "gemm_share"):
        assert all(math.isfinite(line[name]) for line in log[1:])
    assert all(
        line["loss"] == pytest.approx(0.9 * line["query_centric"] + 0.1 * line["passage_centric"]) for line in log[1:]
    )


@pytest.mark.parametrize("grad_cache", [False, True])
def test_a_scaled_loss_in_half_precision_trains(
    toy_parts: Parts, rows: Examples, encoder: DualEncoder, grad_cache: bool
) -> None:
    before = encoder.hash_weights()
    log = run(toy_parts, rows, encoder, PAIR, max_steps=3, fp16=True, grad_cache=grad_cache, logging_steps=1)
    assert encoder.hash_weights() != before
    assert all(math.isfinite(line["loss"]) for line in log[1:])
    assert all(bool(parameter.isfinite().all()) for parameter in encoder.model.parameters())


def test_a_step_whose_scaled_gradient_overflows_is_left_out(encoder: DualEncoder) -> None:
    config = make_config(fp16=True)
    optimizer = make_optimizer(encoder.model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    before = encoder.hash_weights()
    for parameter in encoder.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.scale(torch.ones(()))
    update_parameters(encoder.model, optimizer, scaler, 0.1, config, 1)
    assert encoder.hash_weights() == before
    assert scaler.get_scale() == 2**15


def test_a_gradient_that_is_no_number_at_any_scale_stops_the_training(encoder: DualEncoder) -> None:
    config = make_config(fp16=True)
    optimizer = make_optimizer(encoder.model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(torch.ones(()))
    for step in range(1, 30):
        for parameter in encoder.model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)
        if step <= 16:
            update_parameters(encoder.model, optimizer, scaler, 0.1, config, step)
            continue
        with pytest.raises(
            PairdrError, match=r"no number at step 17, however little the loss is scaled\. Train with bf16"
        ):
            update_parameters(encoder.model, optimizer, scaler, 0.1, config, step)
        return


def test_a_line_is_written_every_so_many_steps_and_trackers_get_it(
    toy_parts: Parts, rows: Examples, encoder: DualEncoder
) -> None:
    lines: list[dict[str, Any]] = []
    config = make_config(logging_steps=3)
    log = run_stage(toy_parts.collection, rows, encoder, PAIR, config, 8, track=lines.append)
    assert [line["step"] for line in log] == [0, 3, 6, 8]
    assert lines == log[1:]


def test_a_line_holds_the_mean_since_the_line_before(toy_parts: Parts, rows: Examples) -> None:
    each, both = (
        run(toy_parts, rows, open_start(toy_parts), PAIR, max_steps=2, logging_steps=every) for every in (1, 2)
    )
    assert both[1]["loss"] == pytest.approx((each[1]["loss"] + each[2]["loss"]) / 2)


def test_the_first_line_has_the_size_of_the_dev_sample(toy_parts: Parts, rows: Examples, encoder: DualEncoder) -> None:
    log = run(toy_parts, rows, encoder, QUERY, max_steps=1, eval_queries=7)
    assert (log[0]["dev_queries"], log[0]["step"]) == (7, 0)
    assert 7 <= log[0]["dev_passages"] <= 20


def test_alarms_are_said_with_stage_and_step(
    toy_parts: Parts, rows: Examples, encoder: DualEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        # A bias that outweighs all else: every text has nearly the same vector.
        encoder.model[0].model.encoder.layer[-1].output.LayerNorm.bias.fill_(50.0)
    run(toy_parts, rows, encoder, QUERY, max_steps=1)
    assert "pairdr: query_centric, step 1: all passages are nearly alike (mean cosine 1.000)" in capsys.readouterr().err


def test_an_example_whose_passage_is_gone_is_named(toy_parts: Parts, encoder: DualEncoder) -> None:
    train_ids = list(toy_parts.collection.qrels("train"))[:8]
    lost = make_examples([make_row(query_id, f"lost-{query_id}") for query_id in train_ids])
    with pytest.raises(DataError, match="There is no id 'lost-"):
        run(toy_parts, lost, encoder)
