"""What a batch's loss is made of: PAIR's two relations, and the losses beside them that were asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pairdr.auxiliary import listwise_loss, margin_mse_loss, passage_to_query_loss, score_own, shorten
from pairdr.batches import Batch
from pairdr.config import TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.losses import Masks, pair_loss
from pairdr.ranks import count_ranks, gather_rows, place_rows


def compute_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    batch: Batch,
    alpha: float,
    config: TrainConfig,
    encoder: DualEncoder,
) -> dict[str, Tensor]:
    """Return the named parts of the loss; "loss" is what is minimised, the mean over this rank's rows.

    Args:
        query: [b, D].
        positive: [b, D].
        negative: [b, K, D].
        batch: masks, padding, teacher's scores.
        alpha: weight of the passage-centric loss.
        config: the losses beside it.
        encoder: similarity and temperature.
    """
    taught = _distil(query, positive, negative, batch, config, encoder)
    if count_ranks() > 1 and config.cross_batch_negatives:
        # Whose loss has other queries among its candidates needs them; else this rank's own are enough.
        by_query = (alpha > 0 and config.passage_negatives == "official") or config.query_negatives or config.symmetric
        query = gather_rows(query) if by_query else place_rows(query)
        positive, negative = gather_rows(positive), gather_rows(negative)
    device = query.device
    options: dict[str, Any] = {
        "temperature": encoder.temperature,
        "rows": batch.rows,
        "masks": None if batch.masks is None else Masks(*(mask.to(device) for mask in batch.masks)),
        "false_negative_margin": config.false_negative_margin,
    }
    negative_valid = batch.negative_valid.to(device)
    dimensions = query.shape[1]
    widths = sorted({*config.matryoshka_dims, dimensions})
    parts: dict[str, Tensor] = {}
    for width in widths:
        normalise = encoder.contract.similarity == "cosine" and width < dimensions
        q, p, n = (shorten(vectors, width, normalise=normalise) for vectors in (query, positive, negative))
        for name, value in _relate(q, p, n, negative_valid, alpha, config, options).items():
            parts[name] = parts.get(name, query.new_zeros(())) + value / len(widths)
    if taught is not None:
        parts |= {"distillation": taught, "loss": parts["loss"] + config.distillation_weight * taught}
    return parts


def _relate(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    negative_valid: Tensor,
    alpha: float,
    config: TrainConfig,
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Return PAIR's loss and its parts for vectors of one width; the rows of all ranks [B, D], [B, D], [B, K, D]."""
    found = pair_loss(
        query,
        positive,
        negative,
        alpha=alpha,
        passage_negatives=config.passage_negatives,
        negative_valid=negative_valid,
        query_negatives=config.query_negatives,
        **options,
    )
    parts = {"loss": found.loss, "query_centric": found.query_centric}
    if found.passage_centric is not None:
        parts["passage_centric"] = found.passage_centric
    if config.symmetric:
        back = passage_to_query_loss(query, positive, **options)
        parts["passage_to_query"] = back
        parts["loss"] = found.loss + (1 - alpha) * (back - found.query_centric) / 2
    return parts


def _distil(
    query: Tensor, positive: Tensor, negative: Tensor, batch: Batch, config: TrainConfig, encoder: DualEncoder
) -> Tensor | None:
    if config.distillation == "none":
        return None
    student, teacher = score_own(query, positive, negative), batch.teacher_scores.to(query.device)  # [b, 1 + K]
    if config.distillation == "margin_mse":
        return margin_mse_loss(student, teacher)
    return listwise_loss(student / encoder.temperature, teacher, config.distillation_temperature)
