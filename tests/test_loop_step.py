"""One step of the loop: what is embedded and how, whose gradients they are, and how far parameters move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from training import (
    PAIR,
    QUERY,
    dense_gradients,
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
from pairdr.batches import collate
from pairdr.encoder import DualEncoder
from pairdr.formats import Examples
from pairdr.loop import backward_batch
from pairdr.records import Example, positives_of
from pairdr.tuning import prepare_model, seed_step

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


# --- what is embedded -------------------------------------------------------------------------------------------------


def loss_of(parts: Parts, encoder: DualEncoder, rows: Sequence[Example], **options: Any) -> float:
    config = make_config(**options)
    (batch,) = take_batches(make_examples(rows), 1, per_device_train_batch_size=len(rows), **options)
    encoder.model.eval()
    return backward_batch(parts.collection, encoder, batch, 0.0, config)[0]["loss"]


def test_a_positive_that_is_another_rows_negative_is_masked_unless_told_otherwise(
    toy_parts: Parts, encoder: DualEncoder
) -> None:
    train_ids = list(toy_parts.collection.qrels("train"))[:2]
    first, second = (positives_of(toy_parts.collection.qrels("train"), query_id)[0] for query_id in train_ids)
    clash = [make_row(train_ids[0], first), make_row(train_ids[1], second, first)]
    apart = [make_row(train_ids[0], first), make_row(train_ids[1], second, "ashford-river")]
    for pair, differ in ((clash, True), (apart, False)):
        masked, plain = (loss_of(toy_parts, encoder, pair, mask_false_negatives=mask) for mask in (True, False))
        assert (masked < plain) == differ
        assert (masked == plain) != differ


def watch_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of texts in each forward pass, which grows."""
    texts: list[int] = []
    embed = DualEncoder.embed

    def watch(self: DualEncoder, tokens: Sequence[Any], *rest: Any) -> torch.Tensor:
        texts.append(len(tokens))
        return embed(self, tokens, *rest)

    monkeypatch.setattr(DualEncoder, "embed", watch)
    return texts


def test_a_passage_that_occurs_twice_is_embedded_once(
    toy_parts: Parts, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = watch_forwards(monkeypatch)
    train_ids = list(toy_parts.collection.qrels("train"))[:3]
    rows = [
        make_row(query_id, place, "ryde-river")
        for query_id, place in zip(train_ids, ("ryde-market", "ryde-school", "ryde-bridge"), strict=True)
    ]
    loss_of(toy_parts, encoder, rows)
    assert sum(texts) == 3 + 4


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients_of(parts: Parts, rows: Examples, seed: int = 1, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of the first batch and its gradients by parameter."""
    (batch,) = take_batches(rows, 1)
    config, fresh = make_config(**options), open_start(parts)
    with prepare_model(fresh, config) as model:
        model.train()
        seed_step(seed, 1)
        found, _ = backward_batch(parts.collection, fresh, batch, 0.1, config)
        return found["loss"], dense_gradients(model)


def require_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_recomputed_activations_give_the_same_gradient_dropout_included(toy_parts: Parts, rows: Examples) -> None:
    (plain, wanted), (again, found), (_, other) = (
        gradients_of(toy_parts, rows, seed, gradient_checkpointing=option)
        for seed, option in ((1, False), (1, True), (2, True))
    )
    assert again == plain
    require_close(found, wanted)
    name = next(name for name in wanted if "query.weight" in name)
    assert not torch.allclose(other[name], wanted[name], atol=1e-6, rtol=1e-4)  # the seed's dropout shows in it


def test_the_tokens_of_a_forward_pass_change_nothing_but_rounding(
    toy_parts: Parts, rows: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = watch_forwards(monkeypatch)
    loss, wanted = gradients_of(toy_parts, rows, dropout=0.0, tokens_per_forward=100_000)
    few = len(texts)
    again, found = gradients_of(toy_parts, rows, dropout=0.0, tokens_per_forward=64)
    assert len(texts) - few > 2 * few
    assert sum(texts[:few]) == sum(texts[few:])
    assert again == pytest.approx(loss, abs=1e-5)
    require_close(found, wanted)


def test_vectors_stand_in_the_order_of_the_batch_however_they_were_grouped(
    toy_parts: Parts, rows: Examples, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    compute = loop.compute_loss
    monkeypatch.setattr(loop, "compute_loss", lambda *parts: seen.append(parts[:3]) or compute(*parts))
    batch = collate(list(rows)[:6], 2, mask=True, rng=loop.random.Random(0))
    encoder.model.eval()
    backward_batch(toy_parts.collection, encoder, batch, 0.1, make_config(tokens_per_forward=64))
    data = toy_parts.collection
    query = encoder.encode_queries([data.query(query_id).text for query_id in batch.query_ids])
    passage = encoder.encode_passages([data.passage(passage_id) for passage_id in batch.passage_ids])
    for found, wanted in zip(seen[0], (query, passage[batch.positive], passage[batch.negative]), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-6)


def test_bf16_is_for_the_encoder_and_not_for_the_loss(
    toy_parts: Parts, rows: Examples, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: set[torch.dtype] = set()
    seen: list[torch.dtype] = []
    compute = loop.compute_loss

    def watch(*parts: Any) -> Any:
        found = compute(*parts)
        seen.extend(part.dtype for part in (*parts[:3], *found.values()))
        return found

    monkeypatch.setattr(loop, "compute_loss", watch)
    layer = encoder.model[0].model.encoder.layer[0].intermediate.dense
    layer.register_forward_hook(lambda module, _, out: kinds.add(out.dtype) if out.requires_grad else None)
    log = run(toy_parts, rows, encoder, bf16=True)
    assert kinds == {torch.bfloat16}
    assert set(seen) == {torch.float32}
    assert math.isfinite(log[-1]["loss"])
    assert all(parameter.dtype == torch.float32 for parameter in encoder.model.parameters())
    assert encoder.hash_weights() != hash_after(toy_parts, rows, PAIR)


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """Return the list of gradients of each optimizer step, which grows."""
    seen: list[list[torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def watch(self: torch.optim.AdamW, *rest: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append([gradient.clone() for gradient in gradients])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    return seen


def test_gradients_are_clipped_to_the_norm(toy_parts: Parts, rows: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = watch_steps(monkeypatch)
    for norm in (0.0, 0.01):
        hash_after(toy_parts, rows, max_grad_norm=norm, max_steps=1)
    free, clipped = (float(torch.cat([gradient.flatten() for gradient in found]).norm()) for found in steps)
    assert free > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_accumulated_gradients_are_the_mean_over_their_batches(
    toy_parts: Parts, rows: Examples, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 3, "dropout": 0.0, "max_grad_norm": 0.0}
    seen: list[list[str]] = []
    backward = loop.backward_batch

    def watch(collection: Any, model: Any, batch: Any, *rest: Any) -> Any:
        seen.append(batch.query_ids)
        return backward(collection, model, batch, *rest)

    steps = watch_steps(monkeypatch)
    monkeypatch.setattr(loop, "backward_batch", watch)
    run(toy_parts, rows, encoder, QUERY, **options)
    batches = take_batches(rows, 6, **options)
    assert len(steps) == 3
    assert seen == [batch.query_ids for batch in batches]

    fresh = open_start(toy_parts)
    fresh.model.eval()
    for batch in batches[:2]:
        backward(toy_parts.collection, fresh, batch, 0.0, make_config())
    sums = [p.grad for p in fresh.model.parameters() if p.grad is not None]
    expected = [g / 2 for g in sums if g.dim() > 1] + [g / 2 for g in sums if g.dim() <= 1]  # in AdamW's two groups
    for found, wanted in zip(steps[0], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_the_learning_rate_and_the_warm_up_show_in_the_log(
    toy_parts: Parts, rows: Examples, encoder: DualEncoder
) -> None:
    log = run(toy_parts, rows, encoder, QUERY, learning_rate=0.008, warmup_steps=3, max_steps=2)
    assert log[-1]["learning_rate"] == pytest.approx(0.008 * 2 / 4)


def test_the_papers_schedule_shows_in_the_log(toy_parts: Parts, rows: Examples, encoder: DualEncoder) -> None:
    options = {"learning_rate": 0.01, "warmup_steps": 2, "max_steps": 5, "logging_steps": 1, "lr_schedule": "paper"}
    log = run(toy_parts, rows, encoder, QUERY, **options)
    down = [0.01 * (1 - step / 5) for step in (2, 3, 4)]
    assert [line["learning_rate"] for line in log[1:]] == pytest.approx([0.01 / 3, 0.02 / 3, *down])


def test_a_learning_rate_of_zero_moves_nothing(toy_parts: Parts, rows: Examples) -> None:
    assert hash_after(toy_parts, rows, learning_rate=0.0) == toy_parts.encoder.hash_weights()
