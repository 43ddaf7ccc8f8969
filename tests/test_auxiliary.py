"""The losses beside PAIR's: each equals its formula, written otherwise or by others; what is unknown does not count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from pairdr.auxiliary import listwise_loss, margin_mse_loss, passage_to_query_loss, score_own, shorten
from pairdr.errors import UsageError
from pairdr.losses import Masks

NAN = math.nan


def draw(*shape: int, seed: int = 13) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_masks(rows: int, count: int) -> Masks:
    return Masks(*(torch.zeros(shape, dtype=torch.bool) for shape in ((rows, rows), (rows, rows, count), (rows, rows))))


# --- passage to query -------------------------------------------------------------------------------------------------


def test_passage_to_query_is_the_cross_entropy_of_each_positive_over_the_queries() -> None:
    query, positive = draw(4, 3), draw(4, 3, seed=14)
    expected = F.cross_entropy(positive @ query.T / 0.5, torch.arange(4))
    assert passage_to_query_loss(query, positive, temperature=0.5).item() == pytest.approx(expected.item(), abs=1e-12)


def test_a_query_that_the_positive_answers_too_is_no_other_query() -> None:
    query, positive, masks = draw(4, 3), draw(4, 3, seed=14), make_masks(4, 2)
    masks.query[0, 2] = masks.query[3, 3] = True  # a row's own column is never read
    scores = (positive @ query.T).masked_fill(masks.query & ~torch.eye(4, dtype=torch.bool), -torch.inf)
    expected = F.cross_entropy(scores, torch.arange(4))
    found = passage_to_query_loss(query, positive, masks=masks)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    assert found < passage_to_query_loss(query, positive)


def test_shares_of_the_rows_have_the_mean_of_the_whole() -> None:
    query, positive, masks = draw(4, 3), draw(4, 3, seed=14), make_masks(4, 2)
    masks.query[0, 2] = masks.query[3, 1] = True
    halves = [
        passage_to_query_loss(query, positive, masks=Masks(*(mask[rows] for mask in masks)), rows=rows)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    whole = passage_to_query_loss(query, positive, masks=masks)
    assert sum(halves).item() / 2 == pytest.approx(whole.item(), abs=1e-12)


def test_queries_far_nearer_than_the_own_one_are_left_out_of_the_way_back() -> None:
    query = torch.tensor([[1.0, 0.0], [0.9, 0.1], [3.0, 0.0]])
    found = passage_to_query_loss(query, torch.eye(2)[[0, 0, 1]], false_negative_margin=1.0)
    first = F.cross_entropy(torch.tensor([[1.0, 0.9]]), torch.tensor([0]))
    second = F.cross_entropy(torch.tensor([[1.0, 0.9]]), torch.tensor([1]))
    third = F.cross_entropy(torch.tensor([[0.0, 0.1, 0.0]]), torch.tensor([2]))
    assert found.item() == pytest.approx((first + second + third).item() / 3, abs=1e-6)


# --- the order of a teacher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_the_listwise_loss_is_torchs_divergence(temperature: float) -> None:
    student, teacher = draw(5, 4), draw(5, 4, seed=14)
    logs, target = F.log_softmax(student, 1), F.softmax(teacher / temperature, 1)
    expected = F.kl_div(logs, target, reduction="batchmean")
    assert listwise_loss(student, teacher, temperature).item() == pytest.approx(expected.item(), abs=1e-12)


def test_unscored_passages_are_as_if_they_were_not_there() -> None:
    student, teacher = draw(2, 4), draw(2, 4, seed=14)
    teacher[0, 2] = teacher[1, 0] = NAN
    rows = [
        listwise_loss(student[row : row + 1, columns], teacher[row : row + 1, columns], 2.0)
        for row, columns in ((0, [0, 1, 3]), (1, [1, 2, 3]))
    ]
    assert listwise_loss(student, teacher, 2.0).item() == pytest.approx(sum(rows).item() / 2, abs=1e-12)


def test_a_row_with_fewer_than_two_scores_does_not_count() -> None:
    student, teacher = draw(3, 3), draw(3, 3, seed=14)
    teacher[1] = NAN
    teacher[2, 1:] = NAN
    assert listwise_loss(student, teacher).item() == pytest.approx(listwise_loss(student[:1], teacher[:1]).item())


@pytest.mark.parametrize("loss", [listwise_loss, margin_mse_loss])
def test_without_any_score_there_is_nothing_to_learn(loss: object) -> None:
    student = draw(3, 4).requires_grad_()
    found = loss(student, torch.full((3, 4), NAN))
    found.backward()
    assert found.item() == 0.0
    assert not student.grad.any()


@pytest.mark.parametrize("loss", [listwise_loss, margin_mse_loss])
def test_unscored_passages_get_no_gradient_and_spoil_none(loss: object) -> None:
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 4, seed=14)
    teacher[0, 2] = teacher[1, 3] = NAN
    teacher[2] = NAN
    loss(student, teacher).backward()
    assert torch.equal(student.grad == 0, teacher.isnan())


@given(arrays(np.float64, (3, 4), elements=st.floats(-5, 5)), st.sampled_from([0.5, 1.0, 4.0]))
def test_a_student_with_the_teachers_scores_has_nothing_to_learn(scores: np.ndarray, temperature: float) -> None:
    teacher = torch.from_numpy(scores)
    # Neither loss asks for the level.
    softened, same = (teacher / temperature + 3.0).requires_grad_(), (teacher + 3.0).requires_grad_()
    loss = listwise_loss(softened, teacher, temperature) + margin_mse_loss(same, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert max(softened.grad.abs().max(), same.grad.abs().max()) < 1e-9


# --- the margins of a teacher -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_the_margin_loss_is_that_of_sentence_transformers(count: int) -> None:
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss
    from sentence_transformers.util import pairwise_dot_score

    query, positive, negative = draw(5, 3), draw(5, 3, seed=14), draw(5, count, 3, seed=15)
    teacher = draw(5, 1 + count, seed=16)
    rival = MarginMSELoss(model=None, similarity_fct=pairwise_dot_score)
    margins = teacher[:, :1] - teacher[:, 1:]
    theirs = rival.compute_loss_from_embeddings([query, positive, *negative.unbind(1)], margins)
    ours = margin_mse_loss(score_own(query, positive, negative).double(), teacher)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_margins_that_the_teacher_does_not_know_are_left_out() -> None:
    student = torch.tensor([[1.0, 0.5, 0.0], [2.0, 0.0, 9.0], [1.0, 2.0, 3.0]])
    teacher = torch.tensor([[3.0, 1.0, 2.0], [1.0, -1.0, NAN], [NAN, 1.0, 1.0]])
    # Margins of the student 0.5, 1.0, 2.0 and of the teacher 2.0, 1.0, 2.0; no margin without the positive's score.
    assert margin_mse_loss(student, teacher).item() == pytest.approx(1.5**2 / 3)


@pytest.mark.parametrize("loss", [listwise_loss, margin_mse_loss])
def test_scores_of_other_shapes_are_refused(loss: object) -> None:
    with pytest.raises(UsageError, match=r"differ in shape: \[3, 4\], \[3, 3\]"):
        loss(draw(3, 4), draw(3, 3))


def test_own_scores_are_those_of_the_positive_and_then_of_the_negatives() -> None:
    query, positive, negative = draw(3, 2), draw(3, 2, seed=14), draw(3, 2, 2, seed=15)
    found = score_own(query, positive, negative)
    expected = [[float(query[row] @ p) for p in (positive[row], *negative[row])] for row in range(3)]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


# --- shorter vectors --------------------------------------------------------------------------------------------------


def test_shorter_vectors_are_the_first_dimensions() -> None:
    vectors = draw(2, 3, 4)
    assert torch.equal(shorten(vectors, 2, normalise=False), vectors[:, :, :2])
    assert torch.equal(shorten(vectors, 4, normalise=False), vectors)


def test_shorter_vectors_are_normalised_again_where_asked_for() -> None:
    vectors = draw(5, 4)
    found = shorten(vectors, 2, normalise=True)
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 5)
    assert F.cosine_similarity(found, vectors[:, :2]).tolist() == pytest.approx([1.0] * 5)


def test_more_dimensions_than_there_are_are_refused() -> None:
    with pytest.raises(UsageError, match="matryoshka_dims names 5 dimensions, the model has 4"):
        shorten(draw(2, 4), 5, normalise=False)
