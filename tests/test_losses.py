"""The two losses and their mix: the golden numbers, a twin in plain loops, and what must never happen in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from pairdr import losses
from pairdr.errors import UsageError
from pairdr.losses import Masks, PairLoss, pair_loss, passage_centric_loss, query_centric_loss

VARIANTS = ("official", "own", "hard_all", "hard_all_pos")
NEEDY = ("own", "hard_all")  # not defined without hard negatives

# method.md, section 1: the fixture and its values, computed independently.
GOLDEN_QUERY = [[1, 0], [0, 1]]
GOLDEN_POSITIVE = [[1, 0.5], [0.5, 1]]
GOLDEN_NEGATIVE = [[[1, -0.5]], [[-0.5, 0.5]]]
GOLDEN_L_Q = 0.965296
GOLDEN_L_P = {"official": 0.938769, "own": 0.481405, "hard_all": 0.667589, "hard_all_pos": 1.082019}
GOLDEN_MIX = 0.962644
GOLDEN_WITH_QUERIES = 1.096727  # L_Q with the other queries among its candidates


def as_tensors(*values: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=dtype) for value in values)


def golden() -> tuple[Tensor, ...]:
    return as_tensors(GOLDEN_QUERY, GOLDEN_POSITIVE, GOLDEN_NEGATIVE)


def random_batch(
    rows: int = 4, count: int = 2, size: int = 3, dtype: torch.dtype = torch.float64, seed: int = 13
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(rows, size), draw(rows, size), draw(rows, count, size)


def no_masks(rows: int, count: int) -> Masks:
    zeros = partial(torch.zeros, dtype=torch.bool)
    return Masks(zeros(rows, rows), zeros(rows, rows, count), zeros(rows, rows))


def full_masks(rows: int, count: int) -> Masks:
    return Masks(*(~mask for mask in no_masks(rows, count)))


# --- the twin: four loops and no tensor -------------------------------------------------------------------------------


class Batch(NamedTuple):
    query: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    valid: np.ndarray
    same_positive: np.ndarray
    same_negative: np.ndarray
    same_query: np.ndarray
    temperature: float

    def options(self) -> dict[str, Any]:
        masks = Masks(*(torch.from_numpy(m) for m in (self.same_positive, self.same_negative, self.same_query)))
        return {"temperature": self.temperature, "negative_valid": torch.from_numpy(self.valid), "masks": masks}

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(vectors) for vectors in (self.query, self.positive, self.negative))


def hard_scores(batch: Batch, anchor: np.ndarray, row: int, own_only: bool = False) -> list[float]:
    scores = []
    for j in range(len(batch.query)):
        for k in range(batch.negative.shape[1]):
            if own_only and j != row:
                continue
            if batch.valid[j, k] and not batch.same_negative[row, j, k]:
                scores.append(float(anchor @ batch.negative[j, k]) / batch.temperature)
    return scores


def row_losses(batch: Batch, variant: str, margin: float | None = None, queries: bool = False) -> list[float]:
    """Return each row's loss: of L_Q for the variant "query", else of L_P.

    Candidates more similar than the positive by more than the margin are left out; `queries` adds them to those of L_Q.
    """
    result = []
    for i in range(len(batch.query)):
        query, positive = batch.query[i], batch.positive[i]
        candidates = []
        for j in range(len(batch.query)):
            if j == i:
                continue
            if variant == "query" and not batch.same_positive[i, j]:
                candidates.append(float(query @ batch.positive[j]) / batch.temperature)
            if variant == "query" and queries and not batch.same_positive[i, j]:
                candidates.append(float(query @ batch.query[j]) / batch.temperature)
            if variant == "official" and not batch.same_query[i, j]:
                candidates.append(float(positive @ batch.query[j]) / batch.temperature)
            if variant == "hard_all_pos" and not batch.same_positive[i, j]:
                candidates.append(float(positive @ batch.positive[j]) / batch.temperature)
        anchor = query if variant == "query" else positive
        candidates += hard_scores(batch, anchor, i, own_only=variant == "own")
        numerator = float(query @ positive) / batch.temperature
        if margin is not None:
            candidates = [score for score in candidates if score <= numerator + margin / batch.temperature]
        result.append(math.log(sum(math.exp(score - numerator) for score in [numerator, *candidates])))
    return result


@st.composite
def batches(draw: st.DrawFn, counts: tuple[int, ...] = (0, 1, 3)) -> Batch:
    rows, count, size = draw(st.integers(1, 4)), draw(st.sampled_from(counts)), draw(st.integers(1, 3))
    numbers = st.floats(-2, 2, width=32)

    def vectors(*shape: int) -> np.ndarray:
        return draw(arrays(np.float64, shape, elements=numbers))

    def flags(*shape: int) -> np.ndarray:
        return draw(arrays(np.bool_, shape))

    valid, same_negative = flags(rows, count), flags(rows, rows, count)
    if count:
        # One negative of each row is there and serves its row, so that every variant is defined.
        valid[:, 0] = True
        same_negative[np.arange(rows), np.arange(rows), 0] = False
    return Batch(
        vectors(rows, size), vectors(rows, size), vectors(rows, count, size), valid,
        flags(rows, rows), same_negative, flags(rows, rows), draw(st.sampled_from([1.0, 0.5, 0.05])),
    )  # fmt: skip


@given(batches())
def test_the_query_centric_loss_equals_its_twin(batch: Batch) -> None:
    expected = np.mean(row_losses(batch, "query"))
    assert query_centric_loss(*batch.tensors(), **batch.options()).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@given(data=st.data())
def test_the_passage_centric_loss_equals_its_twin(variant: Any, data: st.DataObject) -> None:
    batch = data.draw(batches((1, 3) if variant in NEEDY else (0, 1, 3)))
    expected = np.mean(row_losses(batch, variant))
    found = passage_centric_loss(*batch.tensors(), variant, **batch.options())
    assert found.item() == pytest.approx(expected, abs=1e-9)


@given(batches())
def test_with_other_queries_as_candidates_the_loss_equals_its_twin(batch: Batch) -> None:
    expected = np.mean(row_losses(batch, "query", queries=True))
    found = query_centric_loss(*batch.tensors(), query_negatives=True, **batch.options())
    assert found.item() == pytest.approx(expected, abs=1e-9)


def snap(vectors: np.ndarray) -> np.ndarray:
    """Round to quarters: products are exact, and no candidate stands on the margin in one form and not in another."""
    return np.round(vectors * 4) / 4


@pytest.mark.parametrize("variant", ["query", *VARIANTS])
@given(data=st.data(), margin=st.sampled_from([-0.53125, 0.03125, 0.53125]))
def test_without_candidates_beyond_the_margin_the_losses_equal_their_twins(
    variant: Any, data: st.DataObject, margin: float
) -> None:
    batch = data.draw(batches((1, 3) if variant in NEEDY else (0, 1, 3)))
    batch = batch._replace(query=snap(batch.query), positive=snap(batch.positive), negative=snap(batch.negative))
    loss = query_centric_loss if variant == "query" else partial(passage_centric_loss, passage_negatives=variant)
    found = loss(*batch.tensors(), false_negative_margin=margin, **batch.options())
    assert found.item() == pytest.approx(np.mean(row_losses(batch, variant, margin)), abs=1e-9)


# --- the golden numbers -----------------------------------------------------------------------------------------------


def test_the_query_centric_loss_has_its_golden_value() -> None:
    assert query_centric_loss(*golden()).item() == pytest.approx(GOLDEN_L_Q, abs=1e-6)


def test_with_other_queries_as_candidates_the_loss_has_its_golden_value() -> None:
    assert query_centric_loss(*golden(), query_negatives=True).item() == pytest.approx(GOLDEN_WITH_QUERIES, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_passage_centric_loss_has_its_golden_value(variant: Any) -> None:
    assert passage_centric_loss(*golden(), variant).item() == pytest.approx(GOLDEN_L_P[variant], abs=1e-6)


def test_the_mix_has_its_golden_value_and_its_parts() -> None:
    parts = pair_loss(*golden(), alpha=0.1)
    assert parts.passage_centric is not None
    found = (parts.loss.item(), parts.query_centric.item(), parts.passage_centric.item())
    assert found == pytest.approx((GOLDEN_MIX, GOLDEN_L_Q, GOLDEN_L_P["official"]), abs=1e-6)


def test_the_official_form_is_the_default() -> None:
    assert torch.equal(passage_centric_loss(*golden()), passage_centric_loss(*golden(), "official"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_twin_has_the_golden_values_too(variant: str) -> None:
    query, positive, negative = (tensor.numpy() for tensor in golden())
    masks = (mask.numpy() for mask in no_masks(2, 1))
    batch = Batch(query, positive, negative, np.ones((2, 1), bool), *masks, 1.0)
    assert np.mean(row_losses(batch, variant)) == pytest.approx(GOLDEN_L_P[variant], abs=1e-6)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "count"),
    [(variant, count) for variant in ("query", *VARIANTS) for count in (0, 1, 3) if count or variant not in NEEDY],
)
def test_gradients_are_those_of_the_function(variant: Any, count: int) -> None:
    batch = random_batch(3, count)
    valid = torch.ones(3, count, dtype=torch.bool)
    valid[0, 1:] = False
    masks = no_masks(3, count)
    masks.positive[0, 1] = masks.query[2, 0] = True
    loss = query_centric_loss if variant == "query" else partial(passage_centric_loss, passage_negatives=variant)
    leaves = [vectors.requires_grad_() for vectors in batch]

    def compute(query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return loss(query, positive, negative, temperature=0.5, negative_valid=valid, masks=masks)

    assert torch.autograd.gradcheck(compute, leaves)


def test_the_passage_centric_loss_moves_positives_and_negatives() -> None:
    query, positive, negative = (vectors.requires_grad_() for vectors in random_batch())
    passage_centric_loss(query, positive, negative).backward()
    assert all(vectors.grad is not None and vectors.grad.abs().sum() > 0 for vectors in (query, positive, negative))


def test_padding_gets_no_gradient() -> None:
    query, positive, negative = random_batch()
    negative.requires_grad_()
    valid = torch.tensor([[True, False]] * 4)
    pair_loss(query, positive, negative, alpha=0.5, negative_valid=valid).loss.backward()
    assert negative.grad is not None
    assert not negative.grad[:, 1].any()
    assert negative.grad[:, 0].all()


# --- a share of the rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["query", *VARIANTS])
@given(data=st.data(), margin=st.sampled_from([None, 0.3]), queries=st.booleans())
def test_two_halves_of_the_rows_have_the_mean_and_the_gradient_of_the_whole(
    variant: Any, data: st.DataObject, margin: float | None, queries: bool
) -> None:
    batch = data.draw(batches((1, 3) if variant in NEEDY else (0, 1, 3)).filter(lambda b: len(b.query) % 2 == 0))
    extra = {"query_negatives": queries} if variant == "query" else {"passage_negatives": variant}
    loss = query_centric_loss if variant == "query" else passage_centric_loss
    options = batch.options() | extra | {"false_negative_margin": margin}
    count = len(batch.query) // 2

    def compute(rows: slice | None) -> tuple[float, list[Tensor]]:
        vectors = [part.clone().requires_grad_() for part in batch.tensors()]
        masks = options["masks"] if rows is None else Masks(*(mask[rows] for mask in options["masks"]))
        found = loss(*vectors, **options | {"masks": masks, "rows": rows})
        found.backward()
        return found.item(), [part.grad for part in vectors]

    (first, second), whole = (compute(slice(0, count)), compute(slice(count, 2 * count))), compute(None)
    assert (first[0] + second[0]) / 2 == pytest.approx(whole[0], abs=1e-9)
    for one, other, both in zip(first[1], second[1], whole[1], strict=True):
        torch.testing.assert_close((one + other) / 2, both, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("variant", ["query", *VARIANTS])
def test_a_single_row_of_the_batch_has_its_own_loss(variant: Any) -> None:
    loss = query_centric_loss if variant == "query" else partial(passage_centric_loss, passage_negatives=variant)
    query, positive, negative = random_batch(4, 2)
    masks = (mask.numpy() for mask in no_masks(4, 2))
    twin = Batch(query.numpy(), positive.numpy(), negative.numpy(), np.ones((4, 2), bool), *masks, 1.0)
    found = [loss(query, positive, negative, rows=slice(row, row + 1)).item() for row in range(4)]
    assert found == pytest.approx(row_losses(twin, variant), abs=1e-9)


# --- candidates that may be false negatives ---------------------------------------------------------------------------


def test_the_margin_is_of_similarities_whatever_the_temperature() -> None:
    query, positive = as_tensors([[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.0], [0.0, 0.5]])
    (negative,) = as_tensors([[[0.7, 0.0]], [[0.0, 0.9]]])
    for temperature in (1.0, 0.05):
        options = {"temperature": temperature, "false_negative_margin": 0.3}
        scores = torch.tensor([[0.5, 0.0, 0.7, 0.0], [0.0, 0.5, 0.0, -math.inf]]) / temperature  # 0.9 > 0.5 + 0.3
        expected = F.cross_entropy(scores, torch.tensor([0, 1])).item()
        assert query_centric_loss(query, positive, negative, **options).item() == pytest.approx(expected, abs=1e-6)


def test_the_margin_never_leaves_out_the_numerator() -> None:
    query, positive, negative = (vectors.requires_grad_() for vectors in random_batch())
    parts = pair_loss(query, positive, negative, alpha=0.5, false_negative_margin=-1e6)
    parts.loss.backward()
    assert parts.loss.item() == 0.0
    assert all(vectors.grad.isfinite().all() for vectors in (query, positive, negative))


def test_both_relations_get_the_margin_and_only_one_the_queries() -> None:
    batch = random_batch()
    plain, near, asked = (
        pair_loss(*batch, alpha=0.5, **options)
        for options in ({}, {"false_negative_margin": 0.1}, {"query_negatives": True})
    )
    assert near.query_centric < plain.query_centric
    assert near.passage_centric < plain.passage_centric
    assert asked.query_centric > plain.query_centric
    assert torch.equal(asked.passage_centric, plain.passage_centric)


# --- alpha ------------------------------------------------------------------------------------------------------------


def test_alpha_zero_is_the_query_centric_loss_bit_for_bit() -> None:
    batch = random_batch(dtype=torch.float32)
    parts = pair_loss(*batch, alpha=0.0)
    assert torch.equal(parts.loss, query_centric_loss(*batch))
    assert parts.passage_centric is None


def test_alpha_zero_computes_no_passage_centric_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("L_P was computed")

    monkeypatch.setattr(losses, "passage_centric_loss", fail)
    pair_loss(*random_batch(), alpha=0.0)
    with pytest.raises(AssertionError, match="L_P was computed"):
        pair_loss(*random_batch(), alpha=0.1)


def test_alpha_one_is_the_passage_centric_loss() -> None:
    batch = random_batch()
    assert torch.equal(pair_loss(*batch, alpha=1.0).loss, passage_centric_loss(*batch))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        pair_loss(*random_batch(), alpha=alpha)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["query", "official", "hard_all_pos"])
def test_masks_of_everything_leave_the_numerator(variant: Any) -> None:
    loss = query_centric_loss if variant == "query" else partial(passage_centric_loss, passage_negatives=variant)
    query, positive, negative = (vectors.requires_grad_() for vectors in random_batch())
    found = loss(query, positive, negative, masks=full_masks(4, 2))
    found.backward()
    assert found.item() == 0.0
    assert all(vectors.grad.isfinite().all() for vectors in (query, positive, negative))


@pytest.mark.parametrize("variant", ["query", *VARIANTS])
def test_the_diagonal_of_the_masks_is_never_read(variant: Any) -> None:
    loss = query_centric_loss if variant == "query" else partial(passage_centric_loss, passage_negatives=variant)
    masks = no_masks(4, 2)
    masks.positive.fill_diagonal_(True)
    masks.query.fill_diagonal_(True)
    assert torch.equal(loss(*random_batch(), masks=masks), loss(*random_batch()))


@pytest.mark.parametrize("variant", ["query", *VARIANTS])
def test_a_masked_hard_negative_is_as_if_it_were_not_there(variant: Any) -> None:
    loss = query_centric_loss if variant == "query" else partial(passage_centric_loss, passage_negatives=variant)
    query, positive, negative = random_batch(count=2)
    masks = no_masks(4, 2)
    masks.negative[:, :, 1] = True
    masked = loss(query, positive, negative, masks=masks)
    assert masked.item() == pytest.approx(loss(query, positive, negative[:, :1]).item(), abs=1e-12)


def repeated_query() -> tuple[tuple[Tensor, ...], Masks, tuple[Tensor, ...]]:
    """Return rows (q, p, n1) and (q, p, n2), their masks, and the one row (q, p, [n1, n2]) that they stand for."""
    query, positive, negative = random_batch(1, 2)
    doubled = query.expand(2, -1), positive.expand(2, -1), negative.transpose(0, 1)
    return (
        doubled,
        full_masks(2, 0)._replace(negative=torch.zeros(2, 2, 1, dtype=torch.bool)),
        (query, positive, negative),
    )


@pytest.mark.parametrize("variant", ["query", "official", "hard_all", "hard_all_pos"])
def test_with_masks_a_repeated_query_loses_as_if_it_stood_there_once(variant: Any) -> None:
    loss = query_centric_loss if variant == "query" else partial(passage_centric_loss, passage_negatives=variant)
    doubled, masks, single = repeated_query()
    assert loss(*doubled, masks=masks).item() == pytest.approx(loss(*single).item(), abs=1e-12)


@pytest.mark.parametrize("variant", ["query", "official", "hard_all_pos"])
def test_without_masks_a_repeated_query_is_its_own_negative(variant: Any) -> None:
    loss = query_centric_loss if variant == "query" else partial(passage_centric_loss, passage_negatives=variant)
    doubled, _, single = repeated_query()
    assert loss(*doubled).item() > loss(*single).item() + 1e-3


@pytest.mark.parametrize("variant", ["query", "official"])
def test_with_masks_the_row_that_survives_in_a_mixed_batch_loses_the_same(variant: str) -> None:
    query, positive, negative = (vectors.numpy() for vectors in random_batch(3, 1))
    query[1], positive[1], negative[1] = query[0], positive[0], negative[0]
    same = np.zeros((3, 3), dtype=bool)
    same[0, 1] = same[1, 0] = True
    valid = np.array([[True], [False], [True]])  # the copy's negative is a copy, too
    no_negative = np.zeros((3, 3, 1), dtype=bool)
    mixed = Batch(query, positive, negative, valid, same, no_negative, same, 1.0)
    rest = [0, 2]
    alone = Batch(
        query[rest], positive[rest], negative[rest], valid[rest], *(mask.numpy() for mask in no_masks(2, 1)), 1.0
    )
    assert row_losses(mixed, variant)[0] == pytest.approx(row_losses(alone, variant)[0], abs=1e-12)
    loss = query_centric_loss if variant == "query" else passage_centric_loss
    assert loss(*mixed.tensors(), **mixed.options()).item() == pytest.approx(np.mean(row_losses(mixed, variant)))


@pytest.mark.parametrize("variant", NEEDY)
@pytest.mark.parametrize("lack", ["no column", "no valid one", "all masked"])
def test_forms_that_need_hard_negatives_refuse_a_batch_without(variant: Any, lack: str) -> None:
    count = 0 if lack == "no column" else 2
    valid = torch.zeros(4, 2, dtype=torch.bool) if lack == "no valid one" else None
    masks = full_masks(4, 2) if lack == "all masked" else None
    with pytest.raises(UsageError, match=f"'{variant}' needs at least one valid hard negative"):
        passage_centric_loss(*random_batch(4, count), variant, negative_valid=valid, masks=masks)


def test_own_refuses_a_row_whose_negatives_are_all_known_positives() -> None:
    batch = random_batch()
    rows, count = batch[2].shape[:2]
    hard = torch.zeros(rows, rows, count, dtype=torch.bool)
    hard[1, 1] = True
    none = torch.zeros(rows, rows, dtype=torch.bool)
    masks = Masks(none, hard, none)
    with pytest.raises(UsageError, match="at least one valid hard negative in every row"):
        passage_centric_loss(*batch, "own", masks=masks)
    assert passage_centric_loss(*batch, "hard_all", masks=masks) > 0


def test_own_refuses_a_single_row_without_a_negative_and_hard_all_does_not() -> None:
    valid = torch.ones(4, 2, dtype=torch.bool)
    valid[2] = False
    with pytest.raises(UsageError, match="in every row"):
        passage_centric_loss(*random_batch(), "own", negative_valid=valid)
    assert passage_centric_loss(*random_batch(), "hard_all", negative_valid=valid).item() > 0


# --- against others ---------------------------------------------------------------------------------------------------


def test_official_without_hard_negatives_is_passage_to_query_info_nce() -> None:
    query, positive, negative = random_batch(count=0)
    expected = F.cross_entropy(positive @ query.T / 0.5, torch.arange(4))
    assert torch.allclose(passage_centric_loss(query, positive, negative, temperature=0.5), expected, atol=1e-12)


def test_official_has_all_queries_and_all_hard_negatives_and_no_other_positive() -> None:
    query, positive, negative = random_batch()
    scores = torch.cat([positive @ query.T, positive @ negative.flatten(0, 1).T], 1)
    expected = F.cross_entropy(scores, torch.arange(4))
    assert torch.allclose(passage_centric_loss(query, positive, negative), expected, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_query_centric_equals_sentence_transformers_ranking_loss(count: int) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    query, positive, negative = random_batch(count=count)
    rival = MultipleNegativesRankingLoss(model=None, scale=1 / 0.05, similarity_fct=dot_score)
    theirs = rival.compute_loss_from_embeddings([query, positive, *negative.unbind(1)], labels=None)
    assert query_centric_loss(query, positive, negative, temperature=0.05).item() == pytest.approx(
        theirs.item(), abs=1e-6
    )


# --- precision and shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_vectors_are_fp32(dtype: torch.dtype) -> None:
    halves = random_batch(dtype=dtype)
    loss = pair_loss(*halves).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, pair_loss(*(vectors.float() for vectors in halves)).loss)


def test_logits_under_autocast_are_fp32() -> None:
    batch = random_batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pair_loss(*batch).loss
    assert inside.dtype == torch.float32
    assert torch.equal(inside, pair_loss(*batch).loss)


def test_large_scores_do_not_overflow() -> None:
    query, positive, negative = (100 * vectors for vectors in random_batch(dtype=torch.float32))
    assert pair_loss(query, positive, negative, temperature=0.01).loss.isfinite()


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


WRONG_SHAPES = {
    "query of one dimension": (ones(3), ones(3), ones(3, 1, 3)),
    "another B": (ones(4, 3), ones(3, 3), ones(4, 1, 3)),
    "another D of the positive": (ones(4, 3), ones(4, 2), ones(4, 1, 3)),
    "another B of the negatives": (ones(4, 3), ones(4, 3), ones(3, 1, 3)),
    "another D of the negatives": (ones(4, 3), ones(4, 3), ones(4, 1, 2)),
    "negatives without K": (ones(4, 3), ones(4, 3), ones(4, 3)),
}


@pytest.mark.parametrize("loss", [query_centric_loss, passage_centric_loss, pair_loss])
@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_shapes_that_do_not_fit_are_refused(loss: Callable[..., Any], case: str) -> None:
    with pytest.raises(UsageError, match=r"query \["):
        loss(*WRONG_SHAPES[case])


# --- inside sentence-transformers' trainer ----------------------------------------------------------------------------


def features_of(model: Any, *columns: list[str]) -> list[dict[str, Tensor]]:
    batches = (model.preprocess(texts) for texts in columns)
    return [{key: value for key, value in batch.items() if torch.is_tensor(value)} for batch in batches]


@pytest.mark.parametrize("modules", [3, 2], ids=["a model that normalises", "a cosine model that does not"])
def test_pair_loss_parts_sum_to_the_mix_of_the_models_vectors(tiny_model: Path, modules: int) -> None:
    from sentence_transformers import SentenceTransformer

    whole = SentenceTransformer(str(tiny_model), device="cpu")
    model = SentenceTransformer(modules=list(whole)[:modules], device="cpu", similarity_fn_name="cosine").eval()
    columns = ["the river", "the market"], ["a river runs", "a market day"], ["a bridge", "a school"]
    parts = PairLoss(model, alpha=0.3)(features_of(model, *columns))
    query, positive, negative = (whole.encode(list(column), convert_to_tensor=True) for column in columns)
    expected = pair_loss(query, positive, negative[:, None], alpha=0.3, temperature=0.05)
    assert set(parts) == {"query_centric", "passage_centric"}
    assert sum(parts.values()).item() == pytest.approx(expected.loss.item(), abs=1e-5)


def test_pair_loss_with_alpha_zero_has_no_passage_centric_part(tiny_model: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny_model), device="cpu").eval()
    assert set(PairLoss(model, alpha=0.0)(features_of(model, ["a", "b"], ["c", "d"]))) == {"query_centric"}


def test_pair_loss_trains_in_sentence_transformers_trainer(tiny_model: Path, toy: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    from pairdr.collection import open_collection

    data = open_collection(toy)
    pairs = [(data.query(q).text, data.passage(p).text) for q, judged in data.qrels("train").items() for p in judged]
    columns = {"query": [q for q, _ in pairs], "positive": [p for _, p in pairs]}
    columns["negative"] = columns["positive"][1:] + columns["positive"][:1]
    model = SentenceTransformer(str(tiny_model), device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=16, learning_rate=3e-3, logging_steps=5,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, seed=13, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(columns), loss=PairLoss(model, alpha=0.1)
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "query_centric" in entry]
    assert trainer.state.global_step == 20
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    for entry in logs:
        parts = entry["query_centric"] + entry["passage_centric"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-3)
