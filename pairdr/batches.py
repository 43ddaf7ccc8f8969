"""Examples to batches: which rows meet, which negatives they bring, and which candidates are known positives."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pairdr.formats import Examples
from pairdr.losses import Masks
from pairdr.records import Example


class Batch(NamedTuple):
    """Rows by id; the trainer looks the texts up and embeds each once.

    Attributes:
        query_ids: [B].
        passage_ids: every passage of the batch once.
        positive: [B] places in `passage_ids`.
        negative: [B, K] places in `passage_ids`; padding points at place 0.
        negative_valid: [B, K] bool.
        masks: known positives by id, or None when masking is off.
    """

    query_ids: list[str]
    passage_ids: list[str]
    positive: Tensor
    negative: Tensor
    negative_valid: Tensor
    masks: Masks | None


def plan_epoch(examples: Examples, batch_size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield rows of `batch_size` in a seeded order; no two rows of a batch share a query or a positive.

    A row that would clash waits for a later batch; what is left when nothing fits any more is dropped, as is a last
    short batch, so that every batch has the same number of candidates.
    """
    order = list(range(len(examples)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    query_of = examples.table.column("query_id").to_pylist()
    positive_of = examples.table.column("positive_id").to_pylist()
    waiting: deque[int] = deque()
    stream = iter(order)
    while True:
        batch: list[int] = []
        taken: set[tuple[str, str]] = set()

        def fits(row: int, taken: set[tuple[str, str]] = taken) -> bool:
            return ("q", query_of[row]) not in taken and ("p", positive_of[row]) not in taken

        def add(row: int, batch: list[int] = batch, taken: set[tuple[str, str]] = taken) -> None:
            batch.append(row)
            taken.update((("q", query_of[row]), ("p", positive_of[row])))

        for _ in range(len(waiting)):
            row = waiting.popleft()
            if len(batch) < batch_size and fits(row):
                add(row)
            else:
                waiting.append(row)
        while len(batch) < batch_size and (row := next(stream, -1)) >= 0:
            if fits(row):
                add(row)
            else:
                waiting.append(row)
        if len(batch) < batch_size:
            return
        yield batch


def collate(rows: Sequence[Example], negatives: int, *, mask: bool, rng: random.Random) -> Batch:
    """Make a batch of examples.

    Args:
        rows: B examples.
        negatives: K, hard negatives drawn per row; a row with fewer brings all it has.
        mask: make the masks of known positives.
        rng: draws the negatives.
    """
    drawn = [
        list(row.negative_ids) if len(row.negative_ids) <= negatives else rng.sample(row.negative_ids, negatives)
        for row in rows
    ]
    width = max((len(ids) for ids in drawn), default=0)
    places: dict[str, int] = {}
    positive = torch.tensor([places.setdefault(row.positive_id, len(places)) for row in rows])
    negative = torch.zeros(len(rows), width, dtype=torch.long)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for at, ids in enumerate(drawn):
        for column, passage_id in enumerate(ids):
            negative[at, column] = places.setdefault(passage_id, len(places))
            valid[at, column] = True
    masks = make_masks(rows, drawn, width) if mask else None
    return Batch([row.query_id for row in rows], list(places), positive, negative, valid, masks)


def make_masks(rows: Sequence[Example], negatives: Sequence[Sequence[str]], width: int) -> Masks:
    """Return which candidates are known positives, by id: [B, B], [B, B, K], [B, B].

    Rows of one query share their known positives, so a repeated query masks its twin's positive.
    """
    known: dict[str, set[str]] = {}
    for row in rows:
        known.setdefault(row.query_id, set()).update(row.known_positive_ids, (row.positive_id,))
    answers = [known[row.query_id] for row in rows]
    count = len(rows)
    positive = torch.tensor([[row.positive_id in answers[i] for row in rows] for i in range(count)])
    query = torch.tensor([[rows[i].positive_id in answers[j] for j in range(count)] for i in range(count)])
    negative = torch.zeros(count, count, width, dtype=torch.bool)
    for i in range(count):
        for j, ids in enumerate(negatives):
            for column, passage_id in enumerate(ids):
                negative[i, j, column] = passage_id in answers[i]
    return Masks(positive, negative, query)
