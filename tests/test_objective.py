"""The loss of a batch: PAIR's two relations, and what each option adds, checked against the parts it is made of."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training import make_config, make_row

from pairdr.auxiliary import listwise_loss, margin_mse_loss, passage_to_query_loss, score_own
from pairdr.batches import Batch, collate
from pairdr.errors import UsageError
from pairdr.losses import pair_loss
from pairdr.objective import compute_loss
from pairdr.records import Example

ROWS, COUNT, SIZE = 4, 2, 6
COSINE = SimpleNamespace(temperature=0.05, contract=SimpleNamespace(similarity="cosine"))
DOT = SimpleNamespace(temperature=1.0, contract=SimpleNamespace(similarity="dot"))


def make_batch(mask: bool = True) -> Batch:
    """Return four rows: the second has one negative, the third brings the first's positive as its negative."""
    rows = [
        Example("q0", "a", ("n0", "n1"), ("a",), "labelled", 2.0, (1.0, 0.5)),
        Example("q1", "b", ("n2",), ("b",), "labelled", 1.5, (-1.0,)),
        Example("q2", "c", ("a", "n3"), ("c",), "pseudo", 0.5, (math.nan, 0.25)),
        Example("q3", "d", ("n4", "n5"), ("d", "c"), "labelled", math.nan, (0.5, 0.0)),
    ]
    return collate(rows, COUNT, mask=mask, rng=random.Random(0))


def make_vectors(encoder: Any = COSINE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(13)
    shapes = ((ROWS, SIZE), (ROWS, SIZE), (ROWS, COUNT, SIZE))
    vectors = [torch.randn(*shape, generator=generator) for shape in shapes]
    if encoder is COSINE:
        vectors = [F.normalize(part, dim=-1) for part in vectors]
    query, positive, negative = (part.requires_grad_() for part in vectors)
    return query, positive, negative


def compute(alpha: float = 0.3, encoder: Any = COSINE, batch: Batch | None = None, **options: Any) -> dict[str, float]:
    batch = batch or make_batch()
    parts = compute_loss(*make_vectors(encoder), batch, alpha, make_config(**options), encoder)
    return {name: value.item() for name, value in parts.items()}


def mix(vectors: tuple[Tensor, ...], alpha: float = 0.3, encoder: Any = COSINE, **options: Any) -> float:
    batch = make_batch()
    common = {"negative_valid": batch.negative_valid, "masks": batch.masks, "temperature": encoder.temperature}
    return pair_loss(*vectors, alpha=alpha, **common | options).loss.item()


# --- the two relations ------------------------------------------------------------------------------------------------


def test_the_plain_loss_is_pairs_with_padding_masks_and_temperature() -> None:
    found = compute()
    assert set(found) == {"loss", "query_centric", "passage_centric"}
    assert found["loss"] == pytest.approx(mix(make_vectors()), rel=1e-6)
    assert found["loss"] == pytest.approx(0.7 * found["query_centric"] + 0.3 * found["passage_centric"])
    assert compute(batch=make_batch(mask=False))["loss"] == pytest.approx(mix(make_vectors(), masks=None), rel=1e-6)
    assert compute(batch=make_batch(mask=False))["loss"] > found["loss"]


def test_with_alpha_zero_there_is_no_passage_centric_part() -> None:
    found = compute(alpha=0.0)
    assert set(found) == {"loss", "query_centric"}
    assert found["loss"] == found["query_centric"]


def test_the_candidates_of_the_passage_centric_loss_are_an_option() -> None:
    rows = [make_row(f"q{number}", f"p{number}", f"n{number}", f"m{number}") for number in range(ROWS)]
    batch = collate(rows, COUNT, mask=True, rng=random.Random(0))
    found = {
        variant: compute(batch=batch, passage_negatives=variant)["passage_centric"]
        for variant in ("official", "own", "hard_all", "hard_all_pos")
    }
    assert len(set(found.values())) == 4
    assert found["own"] == min(found.values())


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_candidates_more_similar_than_the_positive_by_the_margin_are_left_out(margin: float) -> None:
    found = compute(false_negative_margin=margin)["loss"]
    assert found == pytest.approx(mix(make_vectors(), false_negative_margin=margin), rel=1e-6)
    assert found < compute()["loss"]


def test_other_queries_are_candidates_too_where_asked_for() -> None:
    found = compute(query_negatives=True)
    assert found["loss"] == pytest.approx(mix(make_vectors(), query_negatives=True), rel=1e-6)
    assert found["query_centric"] > compute()["query_centric"]
    assert found["passage_centric"] == compute()["passage_centric"]


# --- both directions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_symmetric_is_the_mean_of_both_directions_in_the_place_of_the_query_centric_loss(alpha: float) -> None:
    query, positive, _ = make_vectors()
    found = compute(alpha, symmetric=True)
    back = passage_to_query_loss(query, positive, temperature=0.05, masks=make_batch().masks).item()
    assert found["passage_to_query"] == pytest.approx(back, rel=1e-6)
    expected = (1 - alpha) * (found["query_centric"] + back) / 2 + alpha * found.get("passage_centric", 0.0)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert {**found, "loss": 0} == {**compute(alpha), "loss": 0, "passage_to_query": found["passage_to_query"]}


def test_the_margin_counts_in_both_directions() -> None:
    plain, near = (compute(symmetric=True, false_negative_margin=margin) for margin in (None, 0.0))
    assert near["passage_to_query"] < plain["passage_to_query"]


# --- shorter vectors --------------------------------------------------------------------------------------------------


def test_shorter_vectors_are_trained_as_unit_vectors_of_their_own_under_cosine() -> None:
    vectors = make_vectors()
    short = [tuple(F.normalize(part[..., :size], dim=-1) for part in vectors) for size in (2, 4)]
    expected = [mix(parts) for parts in (*short, vectors)]
    assert compute(matryoshka_dims=(4, 2))["loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_shorter_vectors_keep_their_length_under_dot() -> None:
    vectors = make_vectors(DOT)
    expected = [mix(tuple(part[..., :size] for part in vectors), encoder=DOT) for size in (3, SIZE)]
    found = compute(encoder=DOT, matryoshka_dims=(3,))
    assert found["loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert found["loss"] == pytest.approx(0.7 * found["query_centric"] + 0.3 * found["passage_centric"], rel=1e-5)


def test_all_dimensions_are_trained_once_whether_they_are_named_or_not() -> None:
    assert compute(matryoshka_dims=(SIZE,)) == compute()
    assert compute(matryoshka_dims=(3, SIZE, 3)) == compute(matryoshka_dims=(3,))


def test_more_dimensions_than_the_model_has_are_refused() -> None:
    with pytest.raises(UsageError, match="matryoshka_dims names 7 dimensions, the model has 6"):
        compute(matryoshka_dims=(7,))


def test_dimensions_are_whole_numbers_above_zero() -> None:
    for wrong in ((0,), (2.5,), (-3, 4)):
        with pytest.raises(UsageError, match=r"Option matryoshka_dims is .*; it must be whole numbers above 0"):
            make_config(matryoshka_dims=wrong)


# --- the teacher's scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.25, 3.0)])
def test_listwise_distillation_is_added_with_its_weight(weight: float, temperature: float) -> None:
    found = compute(distillation="listwise", distillation_weight=weight, distillation_temperature=temperature)
    student = score_own(*make_vectors()) / 0.05
    expected = listwise_loss(student, make_batch().teacher_scores, temperature).item()
    assert found["distillation"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(compute()["loss"] + weight * expected, rel=1e-5)


def test_margins_are_distilled_before_any_temperature() -> None:
    found = compute(distillation="margin_mse", distillation_weight=0.5, distillation_temperature=3.0)
    expected = margin_mse_loss(score_own(*make_vectors()), make_batch().teacher_scores).item()
    assert found["distillation"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx(compute()["loss"] + 0.5 * expected, rel=1e-5)


def test_distillation_is_of_the_whole_vectors_and_counts_once() -> None:
    found = compute(distillation="margin_mse", matryoshka_dims=(2,))
    plain = compute(matryoshka_dims=(2,))["loss"]
    assert found["distillation"] == compute(distillation="margin_mse")["distillation"]
    assert found["loss"] == pytest.approx(plain + found["distillation"], rel=1e-6)


@pytest.mark.parametrize("kind", ["listwise", "margin_mse"])
def test_distillation_without_hard_negatives_is_refused(kind: Any) -> None:
    with pytest.raises(UsageError, match=f"Option distillation is '{kind}', which needs train_negatives above 0"):
        make_config(distillation=kind, train_negatives=0)


@pytest.mark.parametrize("kind", ["listwise", "margin_mse"])
def test_rows_that_no_teacher_scored_learn_from_their_labels_alone(kind: str) -> None:
    batch = collate(
        [make_row(f"q{n}", f"p{n}", f"n{n}", f"m{n}") for n in range(4)], 2, mask=True, rng=random.Random(0)
    )
    found = compute(batch=batch, distillation=kind)
    assert found["distillation"] == 0.0
    assert found["loss"] == compute(batch=batch)["loss"]


# --- what all have in common ------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "query_negatives": {"query_negatives": True},
    "symmetric": {"symmetric": True},
    "margin": {"false_negative_margin": 0.1},
    "matryoshka": {"matryoshka_dims": (2, 4)},
    "listwise": {"distillation": "listwise"},
    "margin_mse": {"distillation": "margin_mse"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_vector_gets_a_gradient_and_padding_gets_none(case: str) -> None:
    vectors = make_vectors()
    compute_loss(*vectors, make_batch(), 0.3, make_config(**OPTIONS[case]), COSINE)["loss"].backward()
    assert all(part.grad.isfinite().all() for part in vectors)
    query, positive, negative = (part.grad for part in vectors)
    assert query.any(1).all()
    assert positive.any(1).all()
    assert not negative[1, 1].any()
    assert negative[1, 0].any()


@pytest.mark.parametrize("case", OPTIONS)
def test_half_precision_vectors_have_a_loss_in_fp32(case: str) -> None:
    halves = [part.detach().bfloat16() for part in make_vectors()]
    batch, config = make_batch(), make_config(**OPTIONS[case] if case != "matryoshka" else {})
    found = compute_loss(*halves, batch, 0.3, config, COSINE)["loss"]
    assert found.dtype == torch.float32
    again = compute_loss(*(part.float() for part in halves), batch, 0.3, config, COSINE)["loss"]
    assert found.item() == pytest.approx(again.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "options", "gathered"),
    [
        (0.0, {}, 2),
        (0.3, {"passage_negatives": "own"}, 2),
        (0.3, {"passage_negatives": "hard_all_pos"}, 2),
        (0.3, {}, 3),
        (0.0, {"query_negatives": True}, 3),
        (0.0, {"symmetric": True}, 3),
        (0.3, {"cross_batch_negatives": False}, 0),
    ],
)
def test_only_what_a_loss_needs_is_gathered_from_the_other_ranks(
    monkeypatch: pytest.MonkeyPatch, alpha: float, options: dict[str, Any], gathered: int
) -> None:
    whole = make_vectors()
    halves = whole if options.get("cross_batch_negatives") is False else tuple(part[:2] for part in whole)
    calls: list[str] = []

    def gather(local: Tensor) -> Tensor:
        calls.append("gather")
        return next(part for part, half in zip(whole, halves, strict=True) if half is local)

    def place(local: Tensor) -> Tensor:
        calls.append("place")
        return torch.cat([local, torch.zeros_like(local)])

    monkeypatch.setattr("pairdr.objective.count_ranks", lambda: 2)
    monkeypatch.setattr("pairdr.objective.gather_rows", gather)
    monkeypatch.setattr("pairdr.objective.place_rows", place)
    rows = slice(0, len(halves[0]))
    compute_loss(*halves, make_batch(mask=False)._replace(rows=rows), alpha, make_config(**options), COSINE)
    assert calls.count("gather") == gathered
    assert len(calls) == (3 if gathered else 0)
