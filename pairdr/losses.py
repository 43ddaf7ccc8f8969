"""PAIR's two losses and their mix, as pure functions of embeddings.

Ren et al., PAIR, Findings of ACL 2021, section 4; the candidates in each denominator are those of the official code
(PaddlePaddle/RocketQA, research/PAIR_ACL2021). In one line each, with s the similarity divided by the temperature:

    L_Q = -mean_i log( exp s(q_i, p+_i) / sum of exp s(q_i, c) over all positives and all hard negatives c )
    L_P = -mean_i log( exp s(p+_i, q_i) / [ exp s(p+_i, q_i) + sum of exp s(p+_i, c) over the candidates c below ] )
    L   = (1 - alpha) L_Q + alpha L_P

| passage_negatives | candidates c of L_P besides the numerator | terms |
|---|---|---|
| official | all other queries, all hard negatives (the released checkpoints) | B(1+K) |
| own | the row's own hard negatives | 1+K |
| hard_all | all hard negatives (the paper's form) | 1+BK |
| hard_all_pos | all hard negatives, all other positives | B(1+K) |

Nothing here knows of models, tokens or devices. Cosine is a dot product of normalised vectors: normalise first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairdr.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sentence_transformers import SentenceTransformer

PassageNegatives = Literal["official", "own", "hard_all", "hard_all_pos"]


class Masks(NamedTuple):
    """Which candidates are known positives and therefore never negatives. True removes a candidate.

    b rows are this process's share of the joint batch of B rows; b = B in one process.

    Attributes:
        positive: [b, B]; row i, column j: p+_j is known to answer q_i (a row's own column is never read).
        negative: [b, B, K]; row i, column (j, k): p-_jk is known to answer q_i, or is p+_i.
        query: [b, B]; row i, column j: p+_i is known to answer q_j (a row's own column is never read).
    """

    positive: Tensor
    negative: Tensor
    query: Tensor


class PairParts(NamedTuple):
    """The mix and its named parts; `passage_centric` is None where alpha is 0 and L_P was not computed."""

    loss: Tensor
    query_centric: Tensor
    passage_centric: Tensor | None


def query_centric_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    temperature: float = 1.0,
    negative_valid: Tensor | None = None,
    masks: Masks | None = None,
    rows: slice | None = None,
    false_negative_margin: float | None = None,
    query_negatives: bool = False,
) -> Tensor:
    """Ask that each query be nearer to its positive than to every other passage of the batch (PAIR, section 4, L_Q).

    Args:
        query: [B, D].
        positive: [B, D].
        negative: [B, K, D]; K may be 0.
        temperature: divides the scores.
        negative_valid: [B, K] bool; False marks the padding of rows with fewer negatives.
        masks: known positives, by id.
        rows: the b rows that this process answers for; the other rows are candidates only. Unset: all.
        false_negative_margin: leave out candidates whose similarity to the query exceeds the positive's by more than
            this; unset keeps all.
        query_negatives: the other queries are candidates too (SamToNe, arXiv 2306.02516).

    Returns:
        The mean over the b rows, a scalar of at least fp32.

    Raises:
        UsageError: shapes that do not fit each other.
    """
    _require_shapes(query, positive, negative)
    own = _own(query, rows)  # [b, B]
    anchor = query if rows is None else query[rows]  # [b, D]
    pools = [
        (_score(anchor, positive, temperature), _others(masks and masks.positive, own)),
        (_score(anchor, negative.flatten(0, 1), temperature), _hard(negative, negative_valid, masks, len(anchor))),
    ]
    if query_negatives:
        pools.append((_score(anchor, query, temperature), own | _others(masks and masks.positive, own)))
    return _softmax_loss(pools, own, _limit(pools[0][0], own, false_negative_margin, temperature))


def passage_centric_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    passage_negatives: PassageNegatives = "official",
    *,
    temperature: float = 1.0,
    negative_valid: Tensor | None = None,
    masks: Masks | None = None,
    rows: slice | None = None,
    false_negative_margin: float | None = None,
) -> Tensor:
    """Ask that each positive be nearer to its query than to negative passages (PAIR, section 4, L_P).

    Args:
        query: [B, D].
        positive: [B, D], the anchors.
        negative: [B, K, D].
        passage_negatives: the candidates; see the table at the top of this module.
        temperature: divides the scores.
        negative_valid: [B, K] bool; False marks the padding of rows with fewer negatives.
        masks: known positives, by id.
        rows: the b rows that this process answers for, as in `query_centric_loss`.
        false_negative_margin: as in `query_centric_loss`, with the similarity to the positive passage.

    Returns:
        The mean over the b rows, a scalar of at least fp32.

    Raises:
        UsageError: shapes that do not fit, or a row of `own` or a batch of `hard_all` without any hard negative:
            its loss would be 0 without a word.
    """
    _require_shapes(query, positive, negative)
    own = _own(query, rows)  # [b, B]
    anchor = positive if rows is None else positive[rows]  # [b, D]
    hard_removed = _hard(negative, negative_valid, masks, len(anchor))  # [b, B*K]
    if passage_negatives == "own":
        hard_removed = hard_removed | ~own.repeat_interleave(negative.shape[1], 1)
    _require_negatives(passage_negatives, hard_removed, negative_valid, negative.shape[1])
    to_query = _score(anchor, query, temperature)  # [b, B]
    if passage_negatives == "official":
        others, others_removed = to_query, _others(masks and masks.query, own)
    elif passage_negatives == "hard_all_pos":
        # The column of the anchor itself gives its place to the numerator s(p+_i, q_i).
        others = torch.where(own, to_query, _score(anchor, positive, temperature))
        others_removed = _others(masks and masks.positive, own)
    else:
        others, others_removed = to_query, ~own
    pools = [(others, others_removed), (_score(anchor, negative.flatten(0, 1), temperature), hard_removed)]
    return _softmax_loss(pools, own, _limit(to_query, own, false_negative_margin, temperature))


def pair_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    alpha: float = 0.1,
    passage_negatives: PassageNegatives = "official",
    temperature: float = 1.0,
    negative_valid: Tensor | None = None,
    masks: Masks | None = None,
    rows: slice | None = None,
    false_negative_margin: float | None = None,
    query_negatives: bool = False,
) -> PairParts:
    """Mix both relations: (1 - alpha) L_Q + alpha L_P (PAIR, section 4). With alpha 0, L_P is not computed.

    Args: as `query_centric_loss` and `passage_centric_loss`; `alpha` is the weight of L_P, 0 to 1.

    Raises:
        UsageError: alpha outside 0 to 1, or what the two losses raise.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha is {alpha}; it must be 0 to 1.")
    common: dict[str, Any] = {
        "temperature": temperature,
        "negative_valid": negative_valid,
        "masks": masks,
        "rows": rows,
        "false_negative_margin": false_negative_margin,
    }
    by_query = query_centric_loss(query, positive, negative, query_negatives=query_negatives, **common)
    if alpha == 0:
        return PairParts(by_query, by_query, None)
    by_passage = passage_centric_loss(query, positive, negative, passage_negatives, **common)
    return PairParts((1 - alpha) * by_query + alpha * by_passage, by_query, by_passage)


class PairLoss(nn.Module):
    """PAIR's loss inside sentence-transformers' trainer.

    The dataset's columns are query, positive, and any number of hard negatives, in this order. Without ids, copies in
    a batch cannot be seen: use sentence-transformers' no-duplicates sampler.

    Args:
        model: the model that is trained.
        alpha: weight of the passage-centric loss.
        passage_negatives: its candidates.
        temperature: divides the scores; unset: 0.05 for a model with cosine similarity, else 1.0.

    Example:
        >>> trainer = SentenceTransformerTrainer(model, train_dataset=rows, loss=PairLoss(model))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: SentenceTransformer,
        alpha: float = 0.1,
        passage_negatives: PassageNegatives = "official",
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.model, self.alpha, self.passage_negatives = model, alpha, passage_negatives
        self.cosine = model.similarity_fn_name == "cosine"
        self.temperature = temperature if temperature is not None else 0.05 if self.cosine else 1.0

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the named parts of the loss, each weighted so that their sum is the mix."""
        vectors = [self.model(features)["sentence_embedding"] for features in sentence_features]
        if self.cosine:
            vectors = [F.normalize(vector, dim=-1) for vector in vectors]
        query, positive, *rest = vectors
        negative = torch.stack(rest, 1) if rest else query.new_zeros(len(query), 0, query.shape[1])
        parts = pair_loss(
            query,
            positive,
            negative,
            alpha=self.alpha,
            passage_negatives=self.passage_negatives,
            temperature=self.temperature,
        )
        if parts.passage_centric is None:
            return {"query_centric": parts.query_centric}
        return {
            "query_centric": (1 - self.alpha) * parts.query_centric,
            "passage_centric": self.alpha * parts.passage_centric,
        }

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options for sentence-transformers' model card."""
        return {"alpha": self.alpha, "passage_negatives": self.passage_negatives, "temperature": self.temperature}


def _score(anchor: Tensor, candidate: Tensor, temperature: float) -> Tensor:
    """Return the logits [rows, candidates], in fp32 or better whatever the precision of the vectors."""
    if anchor.dtype in (torch.float16, torch.bfloat16):
        anchor, candidate = anchor.float(), candidate.float()
    with torch.autocast(anchor.device.type, enabled=False):
        return anchor @ candidate.T / temperature


def _own(query: Tensor, rows: slice | None) -> Tensor:
    """Return [b, B] bool: where the column of a row of this process is its own."""
    column = torch.arange(len(query), device=query.device)
    return (column if rows is None else column[rows])[:, None] == column[None]


def _others(mask: Tensor | None, own: Tensor) -> Tensor:
    """Return a [b, B] mask that never removes the numerator."""
    return torch.zeros_like(own) if mask is None else mask & ~own


def _hard(negative: Tensor, valid: Tensor | None, masks: Masks | None, rows: int) -> Tensor:
    """Return the [b, B*K] mask of hard negatives that are padding or known positives."""
    removed = torch.zeros(rows, *negative.shape[:2], dtype=torch.bool, device=negative.device)
    if valid is not None:
        removed = removed | ~valid.bool()[None]
    if masks is not None:
        removed = removed | masks.negative
    return removed.flatten(1)


def _limit(scores: Tensor, own: Tensor, margin: float | None, temperature: float) -> Tensor | None:
    """Return [b, 1]: the logit above which a candidate is taken for a false negative; None for no such limit."""
    return None if margin is None else scores.detach()[own][:, None] + margin / temperature


def _softmax_loss(pools: list[tuple[Tensor, Tensor]], own: Tensor, limit: Tensor | None) -> Tensor:
    """Return the mean cross-entropy over (scores, removed) pools; the first one, [b, B], holds the numerators."""
    scores, removed = (torch.cat(parts, 1) for parts in zip(*pools, strict=True))  # [b, candidates]
    target = own.int().argmax(1)  # [b]
    if limit is not None:
        removed = removed | (scores.detach() > limit).scatter(1, target[:, None], value=False)
    return F.cross_entropy(scores.masked_fill(removed, -torch.inf), target)


def _require_shapes(query: Tensor, positive: Tensor, negative: Tensor) -> None:
    shapes = f"query {list(query.shape)}, positive {list(positive.shape)}, negative {list(negative.shape)}"
    if query.dim() != 2 or query.shape != positive.shape or negative.dim() != 3:
        raise UsageError(f"Expected query [B, D], positive [B, D], negative [B, K, D]; got {shapes}.")
    if len(negative) != len(query) or (negative.numel() and negative.shape[2] != query.shape[1]):
        raise UsageError(f"Query, positive and negative differ in B or D: {shapes}.")


def _require_negatives(variant: str, removed: Tensor, valid: Tensor | None, count: int) -> None:
    if variant not in ("own", "hard_all"):
        return
    has_any = count > 0 and (valid is None or bool(valid.any(1).all() if variant == "own" else valid.any()))
    if not has_any or bool(removed.all(1).any() if variant == "own" else removed.all()):
        raise UsageError(
            f"passage_negatives={variant!r} needs at least one valid hard negative "
            f"{'in every row' if variant == 'own' else 'in the batch'}; its loss would be 0.",
            remedy="Mine negatives, or use 'official'.",
        )
