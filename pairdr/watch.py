"""What is watched while a model trains: dev, loss parts, similarities, speed, and signs that it goes wrong."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pairdr.collection import Collection
from pairdr.config import TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.indexes.exact import search_exact
from pairdr.measures import reciprocal_ranks
from pairdr.records import Passage, Query, positives_of

COLLAPSED = 0.98
"""Mean cosine of unlike passages above which they are taken to be all alike."""
DEV = "dev_RR@10"


class DevSample:
    """A fixed, seeded sample of dev: some queries, their positives, and passages drawn at random beside them.

    Its RR@10 is easier than that over the corpus: it serves to watch training, never to report.
    """

    def __init__(self, collection: Collection, config: TrainConfig) -> None:
        dev = collection.qrels("dev")
        rng = random.Random(config.seed)
        query_ids = sorted(dev)
        query_ids = sorted(rng.sample(query_ids, min(config.eval_queries, len(query_ids))))
        self.queries: list[Query] = [collection.query(query_id) for query_id in query_ids]
        self.positives = [set(positives_of(dev, query_id)) for query_id in query_ids]
        needed = sorted(set().union(*self.positives))
        count = min(max(0, config.eval_passages - len(needed)), len(collection.passages))
        drawn = [collection.passages.id_of(row) for row in rng.sample(range(len(collection.passages)), count)]
        self.passages: list[Passage] = [collection.passage(p) for p in sorted({*needed, *drawn})]

    def measure(self, encoder: DualEncoder) -> float:
        """Return RR@10 over the sample."""
        vectors = encoder.encode_passages(self.passages)  # [n, D]
        queries = encoder.encode_queries([query.text for query in self.queries])  # [Q, D]
        rows, _ = search_exact(queries, [(0, vectors)], np.arange(len(vectors)), 10)
        flags = [
            np.array([row >= 0 and self.passages[row].passage_id in positives for row in ranked], dtype=bool)
            for ranked, positives in zip(rows, self.positives, strict=True)
        ]
        return float(reciprocal_ranks(flags).mean())


@dataclass
class Means:
    """Means between two lines of the log; a value that some steps do not have counts where it is there."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        """Add one step's values."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def flush(self) -> dict[str, float]:
        """Return the means and start anew."""
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        self.values = {}
        return means


class Meter:
    """Speed between two lines of the log.

    Args:
        model: counts the operations that a token costs: per weight of a linear layer 2 forward, 2 for the gradient of
            its input, 2 for that of a weight that is trained. Attention's own products are left out, so the share of
            the peak is on the low side.
        peak: operations per second of a matrix product on this device; see `measure_peak`.
        towers: encoders in the model; a token goes through one of them.
    """

    def __init__(self, model: nn.Module, peak: float, towers: int = 1) -> None:
        layers = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        self.operations = sum((6 if weight.requires_grad else 4) * weight.numel() for weight in layers) / towers
        self.peak = peak
        self.begin, self.tokens, self.padded = time.perf_counter(), 0, 0

    def add(self, groups: Sequence[Sequence[int]]) -> None:
        """Count the tokens of some forward passes, given the lengths of the texts of each."""
        self.tokens += sum(map(sum, groups))
        self.padded += sum(len(lengths) * max(lengths) for lengths in groups)

    def flush(self) -> dict[str, float]:
        """Return tokens/s, the share of padding, the share of the matrix-product peak, and start anew."""
        now = time.perf_counter()
        found = {}
        if self.tokens:
            rate = self.tokens / (now - self.begin)
            found = {
                "tokens_per_second": rate,
                "padding": 1 - self.tokens / self.padded,
                "gemm_share": self.operations * rate / self.peak,
            }
        self.begin, self.tokens, self.padded = now, 0, 0
        return found


@cache
def measure_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, rounds: int = 5) -> float:
    """Return operations per second of a square matrix product on a device, the best of some rounds."""
    size = size or (2048 if device.type == "cpu" else 8192)  # a GPU needs larger ones to show its rate
    left = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(rounds + 1):
        _wait(device)
        begin = time.perf_counter()
        left @ left
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


@torch.no_grad()
def measure_similarities(query: Tensor, positive: Tensor, negative: Tensor, valid: Tensor) -> dict[str, float]:
    """Return mean s(q,p+), s(q,p-), s(p+,p-) of a batch, what the passage-centric loss is meant to move.

    `alike` is the mean cosine between the positives of different rows: near 1 the model has collapsed.
    """
    pairs = valid.to(query.device)
    found = {"s(q,p+)": (query * positive).sum(-1).mean()}
    if pairs.any():
        found["s(q,p-)"] = torch.einsum("bd,bkd->bk", query, negative)[pairs].mean()
        found["s(p+,p-)"] = torch.einsum("bd,bkd->bk", positive, negative)[pairs].mean()
    rows = len(positive)
    if rows > 1:
        unit = torch.nn.functional.normalize(positive.float(), dim=-1)
        found["alike"] = (unit.sum(0).square().sum() - rows) / (rows * (rows - 1))
    return {name: float(value) for name, value in found.items()}


def find_alarms(line: dict[str, Any], start_dev: float) -> list[str]:
    """Return what a line of the log gives cause to worry about, in words.

    Args:
        line: the newest line.
        start_dev: the start model's measure on dev.
    """
    alarms = []
    if line.get("alike", 0.0) > COLLAPSED:
        alarms.append(
            f"all passages are nearly alike (mean cosine {line['alike']:.3f}): lower learning_rate or alpha, or raise "
            "temperature"
        )
    if line.get(DEV, math.inf) < start_dev:
        alarms.append(f"{DEV} {line[DEV]:.4f} is below the start model's {start_dev:.4f}")
    return alarms


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
