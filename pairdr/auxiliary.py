"""Losses beside PAIR's two, each a function of embeddings or scores; all are off by default.

| function | asks | source |
|---|---|---|
| `passage_to_query_loss` | that each positive be nearer to its query than to other queries | symmetric InfoNCE |
| `listwise_loss` | that the student rank a query's passages like the teacher | KL(teacher, student) |
| `margin_mse_loss` | that the student's margins be the teacher's | Hofstätter et al., arXiv 2010.02666 |
| `shorten` | the first dimensions to be vectors of their own | Matryoshka, Kusupati et al., arXiv 2205.13147 |

Query-side negatives (SamToNe) and the filter of false negatives are options of PAIR's losses themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pairdr.errors import UsageError
from pairdr.losses import passage_centric_loss
from pairdr.ranks import average_count


def passage_to_query_loss(query: Tensor, positive: Tensor, **options: Any) -> Tensor:
    """Ask that each positive be nearer to its query than to the other queries: the other direction of L_Q.

    Args:
        query: [B, D].
        positive: [B, D].
        **options: temperature, masks, rows and false_negative_margin, as in `query_centric_loss`.
    """
    masks = options.get("masks")
    if masks is not None:
        options |= {"masks": masks._replace(negative=masks.negative[:, :, :0])}
    return passage_centric_loss(query, positive, query.new_zeros(len(query), 0, query.shape[1]), **options)


def listwise_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Ask that the student's distribution over a query's passages be the teacher's: KL(teacher || student).

    Args:
        student: [b, 1 + K], logits of the positive and the hard negatives.
        teacher: [b, 1 + K], the teacher's scores; NaN where it gave none. Rows with fewer than two are left out.
        temperature: divides the teacher's scores, whose scale is its own; below 1 it sharpens.

    Returns:
        The mean over the rows that count, of all ranks; 0 where none does.
    """
    known, rows = _find_scored(student, teacher)
    target = F.log_softmax((teacher / temperature).masked_fill(~known, -torch.inf)[rows], 1)
    found = F.log_softmax(student.masked_fill(~known, -torch.inf)[rows], 1)
    terms = torch.where(known[rows], target.exp() * (target - found), 0.0)
    return terms.sum() / average_count(rows.sum())


def margin_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Ask that the student's signed margins between positive and negatives be the teacher's.

    Args:
        student: [b, 1 + K], scores of the positive and the hard negatives, before any temperature.
        teacher: [b, 1 + K], the teacher's scores; NaN where it gave none.

    Returns:
        The mean squared difference over the margins that the teacher knows, of all ranks; 0 where it knows none.
    """
    known, _ = _find_scored(student, teacher)
    pairs = known[:, 1:] & known[:, :1]  # [b, K]
    wanted = (teacher[:, :1] - teacher[:, 1:])[pairs]
    return ((student[:, :1] - student[:, 1:])[pairs] - wanted).square().sum() / average_count(pairs.sum())


def score_own(query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return [b, 1 + K]: each query's similarity to its own positive and hard negatives."""
    own = torch.cat([positive[:, None], negative], 1)  # [b, 1 + K, D]
    return torch.einsum("bd,bkd->bk", query.float(), own.float())


def shorten(vectors: Tensor, dimensions: int, *, normalise: bool) -> Tensor:
    """Return the first dimensions of vectors [..., D], normalised again where the similarity is cosine.

    Raises:
        UsageError: more dimensions than there are.
    """
    if dimensions > vectors.shape[-1]:
        raise UsageError(f"matryoshka_dims names {dimensions} dimensions, the model has {vectors.shape[-1]}.")
    short = vectors[..., :dimensions]
    return F.normalize(short, dim=-1) if normalise else short


def _find_scored(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return which scores the teacher gave [b, 1 + K], and which rows have two of them or more [b]."""
    if student.shape != teacher.shape:
        raise UsageError(f"Student and teacher scores differ in shape: {list(student.shape)}, {list(teacher.shape)}.")
    known = teacher.isfinite()
    return known, known.sum(1) >= 2
