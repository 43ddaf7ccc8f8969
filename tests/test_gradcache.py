"""The gradient cache: the gradients of the whole batch, with the graph of one forward pass at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_script import make_batch, make_config, make_rows, take_gradients
from torch import Tensor, nn

from pairdr import loop
from pairdr.collection import Collection, open_collection
from pairdr.config import ModelConfig, TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.gradcache import backward_cached, restore_random_state, save_random_state
from pairdr.tuning import densify_gradients, prepare_model, seed_step

CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "L_Q": (0.0, {}),
    "both relations": (0.3, {}),
    "no masks": (0.3, {"mask_false_negatives": False}),
    "no negatives": (0.3, {"train_negatives": 0}),
    "hard_all": (0.3, {"passage_negatives": "hard_all"}),
    "matryoshka": (0.3, {"matryoshka_dims": (8, 16)}),
    "listwise": (0.3, {"distillation": "listwise"}),
    "margin_mse": (0.3, {"distillation": "margin_mse"}),
    "symmetric": (0.3, {"symmetric": True, "query_negatives": True}),
}
SMALL = 64
"""Tokens of a forward pass: one or two texts."""


@pytest.fixture(scope="module")
def collection(toy: Path) -> Collection:
    return open_collection(toy)


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> DualEncoder:
    return DualEncoder.load(ModelConfig(start=str(tiny_model)))


def configure(**options: Any) -> TrainConfig:
    return make_config(**{"train_negatives": 2, "tokens_per_forward": SMALL} | options)


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare gradients to the rounding of the largest one."""
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 1e-3
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4, atol=1e-5 * scale, msg=lambda t, n=name: f"{n}: {t}"
        )


def run_seeded(
    collection: Collection, encoder: DualEncoder, alpha: float, config: TrainConfig
) -> tuple[dict[str, float], dict[str, Tensor], Tensor]:
    """Return the loss parts, the gradients and torch's random state after one batch of 8 rows."""
    seed_step(1, 1)
    found, gradients = take_gradients(collection, encoder, make_batch(make_rows(collection, 8), config), alpha, config)
    return found, gradients, torch.get_rng_state()


@pytest.mark.parametrize("name", CASES)
def test_with_dropout_the_cache_gives_the_gradients_of_the_same_forward_passes(
    collection: Collection, encoder: DualEncoder, name: str
) -> None:
    alpha, options = CASES[name]
    plain, cached = (
        run_seeded(collection, encoder, alpha, configure(dropout=0.3, grad_cache=cache, **options))
        for cache in (False, True)
    )
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    require_equal(cached[1], plain[1])
    assert torch.equal(cached[2], plain[2])  # what is drawn next is the same


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [16, SMALL, 300])
def test_without_dropout_any_cut_of_the_batch_gives_the_gradients_of_the_whole(
    collection: Collection, encoder: DualEncoder, name: str, tokens: int
) -> None:
    alpha, options = CASES[name]
    whole = run_seeded(collection, encoder, alpha, configure(dropout=0.0, tokens_per_forward=100_000, **options))
    cut = run_seeded(
        collection, encoder, alpha, configure(dropout=0.0, grad_cache=True, tokens_per_forward=tokens, **options)
    )
    assert cut[0] == pytest.approx(whole[0], rel=1e-4, abs=1e-6)
    require_equal(cut[1], whole[1])


def test_another_seed_gives_other_gradients_under_dropout(collection: Collection, encoder: DualEncoder) -> None:
    config = configure(dropout=0.3, grad_cache=True)
    first = run_seeded(collection, encoder, 0.3, config)[0]
    batch = make_batch(make_rows(collection, 8), config)
    seed_step(2, 1)
    assert take_gradients(collection, encoder, batch, 0.3, config)[0]["loss"] != first["loss"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulated_batches_give_the_mean_of_their_gradients(
    collection: Collection, encoder: DualEncoder, dropout: float
) -> None:
    rows = make_rows(collection, 16)

    def accumulate(**options: Any) -> dict[str, Tensor]:
        config = configure(dropout=dropout, gradient_accumulation_steps=2, **options)
        seed_step(1, 1)
        with prepare_model(encoder, config) as model:
            model.train()
            model.zero_grad()
            for part in (rows[:8], rows[8:]):
                loop.backward_batch(collection, encoder, make_batch(part, config), 0.3, config)
            densify_gradients(model)
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
        return found

    cached = accumulate(grad_cache=True)
    require_equal(cached, accumulate())
    if dropout == 0.0:
        config = configure(dropout=0.0)
        one, other = (
            take_gradients(collection, encoder, make_batch(part, config), 0.3, config)[1]
            for part in (rows[:8], rows[8:])
        )
        require_equal(cached, {name: (one[name] + other[name]) / 2 for name in one})


class Saved:
    """A tensor that a graph holds on to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def count_graphs(
    collection: Collection, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch, config: TrainConfig
) -> tuple[int, int]:
    """Return the number of forward passes with graphs, and the most of them whose graphs were alive at once."""
    alive: dict[int, weakref.WeakSet[Saved]] = {}
    most = 0
    embed = encoder.embed

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor.detach())  # an output with its graph would hold itself
        alive[len(alive) - 1].add(saved)
        return saved

    def watch(*parts: Any) -> Tensor:
        nonlocal most
        if not torch.is_grad_enabled():
            return embed(*parts)
        alive[len(alive)] = weakref.WeakSet()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            vectors = embed(*parts)
        most = max(most, sum(1 for graph in alive.values() if len(graph) > 0))
        return vectors

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "embed", watch)
        run_seeded(collection, encoder, 0.3, config)
    return len(alive), most


def test_one_forward_pass_has_a_graph_at_a_time(
    collection: Collection, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, most = count_graphs(collection, encoder, monkeypatch, configure(grad_cache=True))
    assert passes > 5
    assert most == 1
    assert count_graphs(collection, encoder, monkeypatch, configure()) == (passes, passes)


def embed_chunks(layer: nn.Linear, dropout: float) -> Callable[[Tensor], Tensor]:
    return lambda chunk: nn.functional.dropout(torch.tanh(layer(chunk)), dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_any_loss_of_the_vectors_gets_its_exact_gradient(dropout: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    chunks = list(torch.randn(7, 4, dtype=torch.float64).split([3, 1, 3]))
    embed = embed_chunks(layer, dropout)

    def backward(vectors: Tensor) -> float:
        loss = torch.logsumexp(vectors @ vectors.T + torch.rand_like(vectors[:, :1]), 1).square().mean()
        loss.backward()
        return float(loss.detach())

    results = []
    for cached in (False, True):
        torch.manual_seed(1)
        layer.zero_grad()
        if cached:
            loss = backward_cached(chunks, embed, backward)
        else:
            loss = backward(torch.cat([embed(chunk) for chunk in chunks]))
        results.append((loss, layer.weight.grad.clone(), layer.bias.grad.clone(), torch.rand(3)))
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)


def test_a_random_state_is_put_back() -> None:
    torch.manual_seed(3)
    state = save_random_state()
    first = torch.rand(5)
    torch.manual_seed(4)
    restore_random_state(state)
    assert torch.equal(torch.rand(5), first)
