"""What the tests of training share: stages, small configurations, rows of the toy data, and short runs of the loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from pairdr.batches import Batch
from pairdr.config import StageConfig, TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.formats import EXAMPLE_SCHEMA, Examples
from pairdr.loop import State, read_batches, run_stage
from pairdr.records import Example, positives_of

if TYPE_CHECKING:
    from conftest import Parts

BOTH = ("pseudo", "labelled")
PAIR = StageConfig("pair", 0.1, BOTH)
QUERY = StageConfig("query_centric", 0.0, BOTH)
FEW = {"max_steps": 2, "per_device_train_batch_size": 8, "eval_passages": 20, "eval_queries": 5}


def make_config(**options: Any) -> TrainConfig:
    return TrainConfig(**FEW | options)


def make_row(query: str, positive: str, *negatives: str) -> Example:
    return Example(query, positive, negatives, (positive,), "labelled", math.nan, (math.nan,) * len(negatives))


def make_examples(rows: Sequence[Example]) -> Examples:
    return Examples(pa.Table.from_pylist([vars(row) for row in rows], EXAMPLE_SCHEMA))


def make_toy_rows(parts: Parts, count: int | None = None) -> Examples:
    """Return the labelled questions of the toy data, each with four mined negatives and scores of a teacher."""
    labels = parts.collection.qrels("train")
    rows = []
    for number, query_id in enumerate(labels):
        negatives = tuple(hit.passage_id for hit in parts.candidates.negatives[query_id])[:4]
        scores = tuple(0.5 - place / 4 - number / 100 for place in range(len(negatives)))
        positives = positives_of(labels, query_id)
        rows.append(Example(query_id, positives[0], negatives, positives, "labelled", 1.0, scores))
    return make_examples(rows[:count])


def open_start(parts: Parts) -> DualEncoder:
    """Return the start model, to be trained in place."""
    return DualEncoder.open(parts.start)


def run(parts: Parts, rows: Examples, encoder: DualEncoder, stage: StageConfig = PAIR, **options: Any) -> list[dict]:
    """Train a few steps in place and return the log."""
    config = make_config(**options)
    assert config.max_steps is not None
    return run_stage(parts.collection, rows, encoder, stage, config, config.max_steps)


def hash_after(parts: Parts, rows: Examples, stage: StageConfig = QUERY, **options: Any) -> str:
    """Train a fresh copy of the start model for a few steps and return the hash of its weights."""
    fresh = open_start(parts)
    run(parts, rows, fresh, stage, **options)
    return fresh.hash_weights()


def take_batches(rows: Examples, count: int, **options: Any) -> list[Batch]:
    """Return the first batches that training with these options sees."""
    config = make_config(**options)
    return list(islice(read_batches(rows, config, State(batch_size=config.per_device_train_batch_size)), count))


def dense_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients by parameter, those of embedding tables dense."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (grad.to_dense() if grad.is_sparse else grad).clone() for name, grad in found.items()}
