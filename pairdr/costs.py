"""What a run would cost: time and memory, by arithmetic from a short measurement of this machine.

A forward pass takes about 2 operations per weight and token, a training step 3 times that (forward, gradient of
activations, gradient of weights). Good to a factor of two; said as such.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pairdr.check import find_body, load_tokenizer
from pairdr.collection import Collection
from pairdr.config import ModelConfig
from pairdr.sources.minilm import find_minilm

ENCODE_SHARE, TRAIN_SHARE = 0.45, 0.30
"""Shares of the matrix-product rate that encoding and training reached on the reference machine (docs/results.md)."""
SAMPLE = 500
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """Predicted seconds of one step, and peak memory in bytes."""

    seconds: float = 0.0
    memory: float = 0.0


@dataclass(frozen=True)
class CostModel:
    """What one token costs here.

    Attributes:
        rate: measured floating-point operations per second of fp32 matrix products.
        weights: parameters of the encoder's layers.
        embeddings: parameters of its embedding tables.
        hidden: D.
        layers: transformer layers.
        passage_tokens: mean tokens of a passage, cut at the chosen length.
        query_tokens: mean tokens of a query, likewise.
        towers: encoders in memory; a text goes through one of them.
    """

    rate: float
    weights: float
    embeddings: float
    hidden: int
    layers: int
    passage_tokens: float
    query_tokens: float
    towers: int = 1

    def encode(self, passages: int, queries: int = 0) -> Cost:
        """Return the cost of encoding so many texts."""
        tokens = passages * self.passage_tokens + queries * self.query_tokens
        return Cost(
            2 * self.weights * tokens / (self.rate * ENCODE_SHARE), self._model_bytes() + 4 * self.hidden * passages
        )

    def train(self, steps: int, rows: int, negatives: int) -> Cost:
        """Return the cost of so many steps of so many rows: model, gradients, two moments, activations."""
        tokens = rows * (self.query_tokens + (1 + negatives) * self.passage_tokens)
        activations = 4 * tokens * self.hidden * self.layers * 16
        return Cost(
            6 * self.weights * tokens * steps / (self.rate * TRAIN_SHARE), 4 * self._model_bytes() + activations
        )

    def search(self, queries: int, passages: int) -> Cost:
        """Return the cost of exact search."""
        seconds = 2 * queries * passages * self.hidden / (self.rate * 0.2)
        return Cost(seconds + self.encode(0, queries).seconds, self._model_bytes() + 4 * self.hidden * passages)

    def _model_bytes(self) -> float:
        return 4 * self.towers * (self.weights + self.embeddings)


def measure_costs(collection: Collection, model: ModelConfig) -> CostModel | None:
    """Measure the matrix-product rate for half a second and read the start model's size.

    Returns:
        The model of costs, or None where the start model's config.json or tokenizer is not at hand.
    """
    folder = Path(find_minilm() if model.start == "minilm" else model.start)
    body = find_body(folder)
    towers = 1 if body == folder and model.towers == "tied" else 2
    folder = body
    tokenizer = load_tokenizer(str(folder)) if folder.is_dir() else None
    if tokenizer is None or not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden = int(config.get("hidden_size", config.get("dim", 768)))
    inner = int(config.get("intermediate_size", config.get("hidden_dim", 4 * hidden)))
    layers = model.layers or int(config.get("num_hidden_layers", config.get("n_layers", 12)))
    rng = random.Random(0)
    passages = [
        collection.passage_at(row).joined
        for row in rng.sample(range(len(collection.passages)), min(SAMPLE, len(collection.passages)))
    ]
    queries = [
        str(collection.queries.table.column("text")[row].as_py())
        for row in rng.sample(range(len(collection.queries)), min(SAMPLE, len(collection.queries)))
    ]

    def count(texts: list[str], length: int) -> float:
        return (
            float(np.mean([min(length, len(coded.ids)) for coded in tokenizer.encode_batch(texts)])) if texts else 0.0
        )

    return CostModel(
        measure_rate(),
        layers * (4 * hidden * hidden + 2 * hidden * inner),
        float(config.get("vocab_size", 30522)) * hidden,
        hidden,
        layers,
        count(passages, model.passage_length),
        count(queries, model.query_length),
        towers,
    )


def measure_rate(size: int = 1024, seconds: float = 0.5) -> float:
    """Return fp32 operations per second of numpy's matrix product on this machine."""
    left = np.ones((size, size), dtype=np.float32)
    best = 0.0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin = time.perf_counter()
        left @ left
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best
