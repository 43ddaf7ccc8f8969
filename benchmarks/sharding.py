"""Exact search by workers beside threads of one process: `search.py sharded`."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from drawing import clock, draw_unit_vectors, say_range, write_drawn_store

from pairdr.config import SearchConfig
from pairdr.indexes.exact import search_exact
from pairdr.indexes.sharded import ShardedIndex
from pairdr.vectors import VectorStore

CASES = ((256, 100), (1, 100))


def compare_workers(count: int, workers: int, rounds: int) -> None:
    """Measure one process and some workers in turn over the same store, and print how they compare."""
    with tempfile.TemporaryDirectory() as name:
        store = write_drawn_store(Path(name) / "vectors", count, "float32")
        begun: list[ShardedIndex] = []
        start = clock(lambda: begun.append(ShardedIndex(store, workers)))
        with begun[0] as index:
            found = _measure(store, index, rounds)
        threads = len(os.sched_getaffinity(0))
        print(f"{count} synthetic vectors of {store.dimensions} dimensions, {rounds} rounds, {threads} processors")
        print(f"{len(index.workers)} workers started in {start:.1f} s")
        print(f"{'queries':>7}{'k':>6}  {'':24}{'queries/s':>10}{'range':>18}{'threads are':>13}{'range':>14}")
        for (queries, k), seconds in found.items():
            for title, own in seconds.items():
                rates = [queries / second for second in own]
                ratios = [other / second for other, second in zip(own, seconds["threads"], strict=True)]
                print(
                    f"{queries:7}{k:6}  {title:24}{statistics.median(rates):10.1f}{say_range(rates, '.1f'):>18}"
                    f"{statistics.median(ratios):12.2f}x{say_range(ratios, '.2f'):>14}"
                )


def _measure(store: VectorStore, index: ShardedIndex, rounds: int) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Return the seconds of each case and contender; both have to find the same, to the bit."""
    block = SearchConfig().passage_block
    found: dict[tuple[int, int], dict[str, list[float]]] = {}
    for count, k in CASES:
        queries = draw_unit_vectors(np.random.default_rng(count), count)

        def search(queries: np.ndarray = queries, k: int = k) -> Any:
            return search_exact(queries, store.read_raw(block), store.id_rank, k)

        same = zip(search(), index.search(queries, k), strict=True)
        assert all(one.tobytes() == other.tobytes() for one, other in same)
        seconds = found.setdefault((count, k), {"threads": [], f"{len(index.workers)} workers": []})
        for _ in range(rounds):
            for own, work in zip(seconds.values(), (search, lambda q=queries, k=k: index.search(q, k)), strict=True):
                own.append(clock(work))
    return found
