"""Dropout: as many dropped as asked for, the expectation kept, replayed from torch's state, and no trace afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from pairdr.dropout import ATTENTION, Dropout, attend, draw_mask, use_dropout

COUNT = 1_000_000


def make_attention(rows: int = 2, length: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return query, key and value [n, heads, L, d]."""
    torch.manual_seed(0)
    return [torch.randn(rows, 2, length, 4, dtype=dtype) for _ in range(3)]


def mask_padding(lengths: list[int], width: int) -> Tensor:
    """Return [n, 1, L, L] bool, True where a token may be seen."""
    seen = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return seen[:, None, None, :].expand(-1, 1, width, -1)


MODULE = SimpleNamespace(is_causal=False, training=True)


@pytest.fixture
def model(tiny_model: Path) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_model), device="cpu")


# --- the mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p(p: float) -> None:
    torch.manual_seed(0)
    mask = draw_mask(torch.empty(COUNT), p)
    dropped = int((mask == 0).sum())
    assert abs(dropped - p * COUNT) < 5 * math.sqrt(COUNT * p * (1 - p))
    assert abs(float(mask.double().mean()) - 1) < 5 * math.sqrt(p / (1 - p) / COUNT)


@pytest.mark.parametrize("p", [1e-4, 0.01, 0.1, 1 / 3, 0.5, 0.9])
def test_what_is_kept_is_scaled_by_the_exact_inverse(p: float) -> None:
    torch.manual_seed(0)
    dropped = round(p * 2**16)
    mask = draw_mask(torch.empty(100_000, dtype=torch.float64), p)
    assert sorted(set(mask.tolist())) == [0.0, 2**16 / (2**16 - dropped)]


def test_neighbours_and_the_four_parts_of_a_draw_are_dropped_independently() -> None:
    torch.manual_seed(0)
    dropped = (draw_mask(torch.empty(COUNT), 0.3) == 0).view(-1, 4).double()
    bound = 5 / math.sqrt(len(dropped))
    correlations = torch.corrcoef(dropped.T) - torch.eye(4)
    assert float(correlations.abs().max()) < bound
    shares = dropped.mean(0)
    assert float((shares - 0.3).abs().max()) < bound * math.sqrt(0.21)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5, 7), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mask_has_the_shape_and_type_of_the_input(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask = draw_mask(torch.ones(shape, dtype=dtype), 0.5)
    assert (mask.shape, mask.dtype) == (torch.Size(shape), dtype)
    assert set(mask.flatten().tolist()) <= {0.0, 2.0}


def test_a_mask_is_a_function_of_torchs_random_state() -> None:
    like = torch.empty(1000)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = draw_mask(like, 0.5), draw_mask(like, 0.5)
    torch.set_rng_state(state)
    again = draw_mask(like, 0.5)
    torch.manual_seed(2)
    other = draw_mask(like, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


# --- the module -------------------------------------------------------------------------------------------------------


def test_in_training_the_input_is_multiplied_by_the_mask() -> None:
    values = torch.linspace(-1, 1, 1000)
    layer = Dropout(0.25)
    torch.manual_seed(3)
    found = layer(values)
    torch.manual_seed(3)
    assert torch.equal(found, values * draw_mask(values, 0.25))
    assert 0 < int((found == 0).sum()) < 1000


def test_evaluation_and_a_probability_of_zero_pass_the_input_through() -> None:
    values = torch.randn(100)
    state = torch.get_rng_state()
    assert Dropout(0.5).eval()(values) is values
    assert Dropout(0.0)(values) is values
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_go_through_what_was_kept() -> None:
    values = torch.randn(20, dtype=torch.float64, requires_grad=True)
    layer = Dropout(0.5)

    def drop(inputs: Tensor) -> Tensor:
        torch.manual_seed(5)
        return layer(inputs) ** 2

    assert torch.autograd.gradcheck(drop, (values,))


# --- a model's --------------------------------------------------------------------------------------------------------


def describe(model: SentenceTransformer) -> tuple[list[tuple[str, type, float]], str]:
    """Return every dropout of a model with its type and probability, and the attention's implementation."""
    drops = [(name, type(m), m.p) for name, m in model.named_modules() if isinstance(m, nn.Dropout)]
    return drops, model[0].model.config._attn_implementation


def test_every_dropout_of_a_model_gets_the_probability_and_afterwards_its_own(model: SentenceTransformer) -> None:
    modules = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    before = describe(model)
    assert len(before[0]) > 3
    assert {(kind, p) for _, kind, p in before[0]} == {(nn.Dropout, 0.1)}
    with use_dropout(model, 0.3):
        drops, attention = describe(model)
        assert [name for name, *_ in drops] == [name for name, *_ in before[0]]
        assert {(kind, p) for _, kind, p in drops} == {(Dropout, 0.3)}
        assert attention == ATTENTION
    assert describe(model) == before
    assert [m for m in model.modules() if isinstance(m, nn.Dropout)] == modules


def test_an_error_leaves_no_trace_either(model: SentenceTransformer) -> None:
    before = describe(model)
    with pytest.raises(KeyboardInterrupt), use_dropout(model, 0.3):
        raise KeyboardInterrupt
    assert describe(model) == before


def test_without_a_probability_each_module_keeps_its_own(model: SentenceTransformer) -> None:
    layers = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    for number, layer in enumerate(layers):
        layer.p = number / 10
    with use_dropout(model, None):
        assert [p for _, _, p in describe(model)[0]] == [number / 10 for number in range(len(layers))]


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_the_mode_of_a_model_is_that_of_its_dropouts(model: SentenceTransformer, mode: bool) -> None:
    model.train(mode)
    with use_dropout(model, 0.3):
        assert {m.training for m in model.modules() if isinstance(m, Dropout)} == {mode}


@pytest.mark.parametrize("moment", ["inside", "after"])
def test_a_saved_model_has_no_trace_and_opens_in_plain_sentence_transformers(
    model: SentenceTransformer, tiny_model: Path, tmp_path: Path, moment: str
) -> None:
    with use_dropout(model, 0.3):
        if moment == "inside":
            model.save(str(tmp_path / "saved"), create_model_card=False)
    if moment == "after":
        model.save(str(tmp_path / "saved"), create_model_card=False)
    for path in (tmp_path / "saved").rglob("*.json"):
        assert ATTENTION not in path.read_text(encoding="utf-8"), path
    saved, original = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (tmp_path / "saved", tiny_model)
    )
    assert saved == original
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert describe(plain) == describe(SentenceTransformer(str(tiny_model), device="cpu"))
    assert torch.equal(*(torch.as_tensor(m.encode(["the river of Ashford"])) for m in (plain, model)))


def test_in_evaluation_and_without_dropout_a_model_gives_the_vectors_that_it_gave(model: SentenceTransformer) -> None:
    features = model.preprocess(["the river", "the old bridge of Calder was built from oak"])
    expected = model.eval()(dict(features))["sentence_embedding"]
    for p, training in ((0.5, False), (0.0, True)):
        with use_dropout(model.train(training), p):
            found = model(dict(features))["sentence_embedding"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_in_training_a_model_replays_its_dropout_from_the_seed(model: SentenceTransformer) -> None:
    features = model.preprocess(["the river", "the old bridge of Calder was built from oak"])
    found = []
    with use_dropout(model.train(), 0.3):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(model(dict(features))["sentence_embedding"])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_a_text_has_the_same_vector_whatever_padding_stands_beside_it(model: SentenceTransformer) -> None:
    # So small a probability drops nothing, but the formula is used: a weight that padding gets would show.
    short, long = "the river", "the old bridge of Calder was built from oak and has many arches"
    with use_dropout(model.train(), 1e-6):
        alone = model(dict(model.preprocess([short])))["sentence_embedding"][0]
        beside = model(dict(model.preprocess([short, long])))["sentence_embedding"][0]
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-6)


# --- attention --------------------------------------------------------------------------------------------------------


def test_without_dropout_attention_is_torchs_own() -> None:
    query, key, value = make_attention()
    for mask in (None, mask_padding([5, 3], 5)):
        found, weights = attend(MODULE, query, key, value, mask, dropout=0.0)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
        torch.testing.assert_close(found, expected)
        assert weights is None


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_with_dropout_is_the_formula_with_the_replayed_mask(scaling: float | None, padded: bool) -> None:
    query, key, value = make_attention()
    mask = mask_padding([5, 3], 5) if padded else None
    torch.manual_seed(7)
    found, _ = attend(MODULE, query, key, value, mask, dropout=0.4, scaling=scaling)
    scores = torch.einsum("nhqd,nhkd->nhqk", query, key) * (scaling or 1 / 2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    torch.manual_seed(7)
    kept = draw_mask(weights, 0.4)
    assert 0 < int((kept == 0).sum()) < kept.numel()
    expected = torch.einsum("nhqk,nhkd->nqhd", weights * kept, value)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()


def test_the_mean_over_many_masks_is_attention_without_dropout() -> None:
    query, key, value = make_attention(rows=1)
    copies = [part.expand(4000, -1, -1, -1) for part in (query, key, value)]
    torch.manual_seed(8)
    found = attend(MODULE, *copies, None, dropout=0.2)[0]
    expected = attend(MODULE, query, key, value, None)[0][0]
    error = (found.mean(0) - expected).abs() / (found.std(0) / math.sqrt(4000))
    assert float(error.max()) < 5


def test_padding_gets_no_weight() -> None:
    query, key, value = make_attention()
    mask = mask_padding([5, 3], 5)
    outputs = []
    for rest in (value, value.masked_fill(torch.arange(5)[None, None, :, None] >= 3, 1e6)):
        torch.manual_seed(9)
        outputs.append(attend(MODULE, query, key, torch.cat([value[:1], rest[1:]]), mask, dropout=0.4)[0])
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_go_through_attention(padded: bool) -> None:
    parts = [part[:, :, :3].clone().requires_grad_() for part in make_attention()]
    mask = mask_padding([3, 2], 3) if padded else None

    def attend_seeded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(6)
        return attend(MODULE, query, key, value, mask, dropout=0.4)[0]

    assert torch.autograd.gradcheck(attend_seeded, parts)


def test_a_causal_layer_stays_causal_under_dropout() -> None:
    # transformers hands such a layer no mask where nothing is padded, and torch's kernel asks the layer itself.
    query, key, value = make_attention()
    changed = value.clone()
    changed[:, :, -1] += 100
    first, second = (
        attend(SimpleNamespace(is_causal=True, training=True), query, key, v, None, dropout=1e-9)[0]
        for v in (value, changed)
    )
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.equal(first[:, -1], second[:, -1])
