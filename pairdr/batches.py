"""Examples to batches: which rows meet, which negatives they bring, and which candidates are known positives.

A batch is planned for all ranks together, by every rank alike: no rank waits for another to learn which rows meet.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pairdr.formats import Examples
from pairdr.losses import Masks
from pairdr.records import Example

WINDOW = 1024
"""Rows whose ids are read at a time."""

Waiting = tuple[int, list[str]]
"""A row, and the ids that no other row of its batch may have: its query's and its known positives'."""


class Batch(NamedTuple):
    """One rank's rows of a joint batch, by id; the trainer looks the texts up and embeds each once.

    b rows of this rank, B rows in all: b = B in one process.

    Attributes:
        query_ids: [b].
        passage_ids: every passage of these rows once.
        positive: [b] places in `passage_ids`.
        negative: [b, K] places in `passage_ids`; padding points at place 0.
        negative_valid: [B, K] bool, of all rows.
        masks: known positives by id among all rows' candidates, or None when masking is off.
        rows: where these rows stand in the joint batch.
        teacher_scores: [b, 1 + K], of the positive and the negatives; NaN where no teacher scored, and in padding.
    """

    query_ids: list[str]
    passage_ids: list[str]
    positive: Tensor
    negative: Tensor
    negative_valid: Tensor
    masks: Masks | None
    rows: slice
    teacher_scores: Tensor


def plan_epoch(examples: Examples, batch_size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield rows of `batch_size` in a seeded order; no two rows of a batch share a query or a known positive.

    A row that would clash waits, in the line of the id that it clashed on, and the heads of the lines come first in
    the next batch. A batch looks at no more lines than four times its size, so an epoch costs time linear in its rows.
    What fills no batch any more is dropped, so that every batch has the same number of candidates.

    Args:
        examples: the rows; ids are read a window at a time.
        batch_size: B, the rows of the joint batch.
        seed: decides the order.
        epoch: so does the pass.
    """
    lines: dict[str, deque[Waiting]] = {}  # the id that is waited for: its rows
    turns: deque[str] = deque()  # the ids of the lines, the longest wait first
    stream = _read_keys(examples, f"{seed}/{epoch}")
    while True:
        batch: list[int] = []
        taken: set[str] = set()

        def admit(row: Waiting, batch: list[int] = batch, taken: set[str] = taken) -> None:
            place, keys = row
            clash = next((key for key in keys if key in taken), None)
            if clash is None:
                batch.append(place)
                taken.update(keys)
            else:
                if clash not in lines:
                    lines[clash] = deque()
                    turns.append(clash)
                lines[clash].append(row)

        for _ in range(min(4 * batch_size, len(turns))):
            if len(batch) == batch_size:
                break
            key = turns.popleft()
            row = lines[key].popleft()
            if lines[key]:
                turns.append(key)
            else:
                del lines[key]
            admit(row)
        while len(batch) < batch_size and (head := next(stream, None)) is not None:
            admit(head)
        if len(batch) < batch_size:
            return
        yield batch


def permute(count: int, seed: str) -> Iterator[np.ndarray]:
    """Yield windows of a seeded permutation of 0 .. count - 1, in memory that does not grow with `count`.

    A Feistel network permutes the numbers below the next even power of two; those outside go through it again.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)  # bits
    low = np.uint64((1 << half) - 1)
    keys = np.frombuffer(hashlib.sha512(seed.encode()).digest(), dtype=np.uint64)

    def shuffle(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half), values & low
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        return (left << np.uint64(half)) | right

    for start in range(0, count, WINDOW):
        values = shuffle(np.arange(start, min(start + WINDOW, count), dtype=np.uint64))
        while (outside := values >= count).any():
            values[outside] = shuffle(values[outside])
        yield values.astype(np.int64)


def collate(
    rows: Sequence[Example], negatives: int, *, mask: bool, rng: random.Random, share: slice | None = None
) -> Batch:
    """Make a rank's batch of the examples of a joint batch.

    Args:
        rows: B examples, of all ranks.
        negatives: K, hard negatives drawn per row; a row with fewer brings all it has.
        mask: make the masks of known positives.
        rng: draws the negatives; equal on all ranks.
        share: the b rows of this rank; unset takes all.
    """
    share = share or slice(0, len(rows))
    drawn = [
        range(len(row.negative_ids))
        if len(row.negative_ids) <= negatives
        else rng.sample(range(len(row.negative_ids)), negatives)
        for row in rows
    ]
    width = max(map(len, drawn), default=0)
    mine = rows[share]
    places: dict[str, int] = {}
    positive = torch.tensor([places.setdefault(row.positive_id, len(places)) for row in mine])
    negative = torch.zeros(len(mine), width, dtype=torch.long)
    scores = torch.full((len(mine), 1 + width), torch.nan)
    for at, (row, columns) in enumerate(zip(mine, drawn[share], strict=True)):
        count = len(columns)
        negative[at, :count] = torch.tensor(
            [places.setdefault(row.negative_ids[column], len(places)) for column in columns], dtype=torch.long
        )
        scores[at, : 1 + count] = torch.tensor([row.positive_score, *(row.negative_scores[c] for c in columns)])
    valid = torch.arange(width)[None] < torch.tensor([len(columns) for columns in drawn])[:, None]  # [B, K]
    brought = [[row.negative_ids[column] for column in columns] for row, columns in zip(rows, drawn, strict=True)]
    masks = make_masks(rows, brought, width, share) if mask else None
    return Batch([row.query_id for row in mine], list(places), positive, negative, valid, masks, share, scores)


def make_masks(
    rows: Sequence[Example], negatives: Sequence[Sequence[str]], width: int, share: slice | None = None
) -> Masks:
    """Return which candidates are known positives, by id: [b, B], [b, B, K], [b, B].

    Rows of one query share their known positives, so a repeated query masks its twin's positive. Only the pairs that
    are masked are walked, so the time grows with the rows, not with their square.

    Args:
        rows: B examples, of all ranks.
        negatives: the negatives that each brings.
        width: K.
        share: the b rows of this rank; unset takes all.
    """
    share = share or slice(0, len(rows))
    known: dict[str, set[str]] = {}
    places: dict[str, list[tuple[int, int]]] = {}  # passage: (row, column), column 0 for the row's positive
    for at, row in enumerate(rows):
        known.setdefault(row.query_id, set()).update(row.known_positive_ids, (row.positive_id,))
        places.setdefault(row.positive_id, []).append((at, 0))
        for column, passage_id in enumerate(negatives[at], start=1):
            places.setdefault(passage_id, []).append((at, column))
    candidate = torch.zeros(len(rows[share]), len(rows), 1 + width, dtype=torch.bool)  # [b, B, 1 + K]
    query = torch.zeros(len(rows[share]), len(rows), dtype=torch.bool)  # [b, B]
    begin, end, _ = share.indices(len(rows))
    for at, row in enumerate(rows):
        for passage_id in known[row.query_id]:
            for other, column in places.get(passage_id, ()):
                if begin <= at < end:
                    candidate[at - begin, other, column] = True
                if column == 0 and begin <= other < end:
                    query[other - begin, at] = True
    return Masks(candidate[:, :, 0], candidate[:, :, 1:], query)


def _read_keys(examples: Examples, seed: str) -> Iterator[Waiting]:
    """Yield rows in a seeded order; a query's id cannot be taken for a passage's."""
    for window in permute(len(examples), seed):
        for row, (query_id, positives) in zip(window.tolist(), examples.keys(window), strict=True):
            yield row, [f"q{query_id}", *(f"p{passage_id}" for passage_id in sorted(positives))]
