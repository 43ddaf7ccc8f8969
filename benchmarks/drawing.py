"""What the benchmarks of search share: synthetic vectors, a clock, a range in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEED, DIMENSIONS, BLOCK = 13, 384, 8192


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


def clock(work: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds that some work takes."""
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


def say_range(values: list[float], form: str) -> str:
    """Return the smallest and the largest value."""
    return f"{min(values):{form}}-{max(values):{form}}"
