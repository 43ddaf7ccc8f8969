"""What the benchmarks of search share: synthetic vectors, a store of them, a clock, a range in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pairdr.vectors import Dtype, VectorStore

SEED, DIMENSIONS, BLOCK = 13, 384, 8192
SHARD = 65536


def draw_vectors(count: int, path: Path) -> None:
    """Write unit vectors around centres, and questions around the same ones."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((max(1, count // 500), DIMENSIONS), dtype=np.float32)
    for name, rows in (("vectors", count), ("queries", 2048)):
        drawn = np.lib.format.open_memmap(path / f"{name}.npy", "w+", np.float32, (rows, DIMENSIONS))
        for at in range(0, rows, BLOCK):
            size = min(BLOCK, rows - at)
            part = centres[rng.integers(0, len(centres), size)]
            part = part + rng.standard_normal((size, DIMENSIONS), dtype=np.float32)
            drawn[at : at + size] = part / np.linalg.norm(part, axis=1, keepdims=True)
        drawn.flush()


def draw_unit_vectors(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return [count, DIMENSIONS] unit vectors around nothing."""
    vectors = rng.standard_normal((count, DIMENSIONS), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_drawn_store(folder: Path, count: int, dtype: Dtype) -> VectorStore:
    """Write a store of drawn vectors whose passages have no text."""
    from pairdr.records import Passage
    from pairdr.vectors import VectorStore
    from pairdr.versions import write_store

    rng = np.random.default_rng(SEED)
    with write_store(folder, dtype, "drawn") as writer:
        for at in range(0, count, SHARD):
            passages = [Passage(f"p{number}", "", "") for number in range(at, min(at + SHARD, count))]
            name = writer.name_shard(passages)
            writer.write_shard(name, passages, draw_unit_vectors(rng, len(passages)))
            writer.shards.append((name, len(passages)))
        writer.publish("drawn", DIMENSIONS, "cosine", {})
    return VectorStore(folder)


def clock(work: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds that some work takes."""
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


def say_range(values: list[float], form: str) -> str:
    """Return the smallest and the largest value."""
    return f"{min(values):{form}}-{max(values):{form}}"
