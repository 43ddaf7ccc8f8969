"""The kinds of index at several efforts, their recall and speed, and the plot of both: `search.py approximate`."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from drawing import BLOCK, SEED, clock, say_range

CORPORA = ("debian_packages", "en_qa_mix", "pycode")
COLOURS = ("#222222", "#1b6ca8", "#c8553d", "#3a7d44", "#8e5aa8")


class ArrayStore:
    """Vectors in one array, as a store of one shard."""

    alive, encoder, fingerprint, similarity = None, "none", "none", "cosine"

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors, self.count, self.dimensions = vectors, *vectors.shape
        self.id_rank = np.arange(self.count)
        self.shards = [argparse.Namespace(name="all", start=0, count=self.count)]

    def read_raw(self, size: int) -> Any:
        """Yield (first row, vectors, None)."""
        return ((at, self.vectors[at : at + size], None) for at in range(0, self.count, size))

    def read_blocks(self, size: int) -> Any:
        """Yield (first row, vectors)."""
        return ((at, self.vectors[at : at + size]) for at in range(0, self.count, size))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of rows."""
        return self.vectors[rows]


def compare_indexes(store: Any, queries: np.ndarray, rounds: int) -> list[Point]:
    """Print build time, size, speed and recall of the kinds of index, at some efforts, and return what was found."""
    from pairdr.indexes.exact import search_exact

    asked, judges = queries[-1000:], queries[:-1000]  # those that are timed, and those that tune

    def search(chosen: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return search_exact(chosen, store.read_raw(BLOCK), store.id_rank, k)

    exact, points = {k: search(asked, k)[0] for k in (10, 100)}, []
    print(f"{store.count} vectors of {store.dimensions} dimensions, {len(asked)} queries, {os.cpu_count()} processors")
    head = f"{'':16}{'build s':>8}{'MiB':>7}{'effort':>12}{'1 query ms':>12}{'batch q/s':>11}{'range':>14}{'R@10':>7}"
    print(head + f"{'R@100':>7}")
    size = store.count * store.dimensions * 4 / 2**20
    found = _measure_search(search, asked, exact, rounds)
    points.append(("exact", found, True))
    print(f"{'exact':16}{'':8}{size:7.0f}{'':12}{found}", flush=True)
    for kind, quantiser in itertools.product(("ivf", "hnsw"), ("sq8", "pq")):
        with tempfile.TemporaryDirectory() as folder:
            points += _compare_efforts(store, kind, quantiser, judges, asked, exact, rounds, Path(folder) / "index")
    print("effort: lists that are looked into, or the queue of a graph / candidates scored exactly for each result;")
    print("* is what pairdr index chose for a recall@100 of 0.95")
    return points


def _compare_efforts(
    store: Any,
    kind: Any,
    quantiser: Any,
    judges: np.ndarray,
    asked: np.ndarray,
    exact: dict[int, np.ndarray],
    rounds: int,
    folder: Path,
) -> list[Point]:
    from pairdr.artefact import read_manifest
    from pairdr.errors import RefusedError
    from pairdr.index import build_index
    from pairdr.indexes.faiss import INDEX_FILE, Effort
    from pairdr.store_config import IndexConfig

    begin = time.perf_counter()
    try:
        index = build_index(store, IndexConfig(index_kind=kind, quantiser=quantiser), folder, judges)
    except RefusedError as error:
        print(f"{kind}, {quantiser}: refused after {time.perf_counter() - begin:.0f} s: {error}")
        return []
    built, size = time.perf_counter() - begin, (folder / INDEX_FILE).stat().st_size / 2**20
    name, chosen = read_manifest(folder).facts["name"], index.effort
    points: list[Point] = []
    for factor in (0.25, 0.5, 1, 2, 4):
        index.effort = Effort(max(1, round(chosen.probes * factor)), chosen.candidates)
        effort = f"{index.effort.probes}/{chosen.candidates}{' *' if factor == 1 else '  '}"
        found = _measure_search(index.search, asked, exact, rounds)
        points.append((name, found, factor == 1))
        print(f"{name:16}{built:8.1f}{size:7.0f}{effort:>12}{found}", flush=True)
    return points


class Measured(NamedTuple):
    """Speed and recall of one setting.

    Attributes:
        one: milliseconds of a single query, k = 100.
        rates: queries per second of all at once, k = 100, by round.
        recalls: at 10 and at 100.
    """

    one: float
    rates: list[float]
    recalls: list[float]

    def __str__(self) -> str:
        speed = f"{self.one:12.2f}{statistics.median(self.rates):11.0f}{say_range(self.rates, '.0f'):>14}"
        return speed + "".join(f"{recall:7.3f}" for recall in self.recalls)


Point = tuple[str, Measured, bool]
"""An index's name, what was measured, and whether that is the setting that is chosen unasked."""


def _measure_search(search: Any, asked: np.ndarray, exact: dict[int, np.ndarray], rounds: int) -> Measured:
    recalls = [_share(rows, search(asked, k)[0]) for k, rows in exact.items()]
    one = statistics.median(clock(search, asked[at : at + 1], 100) for at in range(50))
    return Measured(1000 * one, [len(asked) / clock(search, asked, 100) for _ in range(rounds)], recalls)


def draw_plot(points: list[Point], title: str, path: Path) -> None:
    """Write recall@100 against queries per second (logarithmic) as SVG; rings are the settings chosen unasked."""
    left, top, width, height = 60, 40, 560, 320
    rates = [statistics.median(found.rates) for _, found, _ in points]
    low, high = math.log10(min(rates)) - 0.1, math.log10(max(rates)) + 0.1
    floor = min(found.recalls[1] for _, found, _ in points) - 0.01
    colours = dict(zip(dict.fromkeys(name for name, _, _ in points), COLOURS, strict=False))
    parts = [f'<text x="{left}" y="20" font-size="14">{title}</text>']
    for recall in np.linspace(math.ceil(floor * 20) / 20, 1, 1 + round((1 - math.ceil(floor * 20) / 20) * 20)):
        y = top + height * (1 - recall) / (1 - floor)
        parts.append(
            f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/><text x="20" y="{y + 4:.1f}">{recall:.2f}</text>'
        )
    for rate in (digit * 10**power for power in range(7) for digit in (1, 2, 5)):
        x = left + width * (math.log10(rate) - low) / (high - low)
        if low <= math.log10(rate) <= high:
            parts.append(f'<path d="M{x:.1f} {top}v{height}" stroke="#eee"/>')
            parts.append(f'<text x="{x - 12:.1f}" y="{top + height + 18}">{rate}</text>')
    for number, (name, colour) in enumerate(colours.items()):
        here = [
            (rate, found, chosen) for (other, found, chosen), rate in zip(points, rates, strict=True) if other == name
        ]
        places = [
            (
                left + width * (math.log10(rate) - low) / (high - low),
                top + height * (1 - found.recalls[1]) / (1 - floor),
            )
            for rate, found, _ in here
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for (x, y), (_, _, chosen) in zip(places, here, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            if chosen:
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="{colour}"/>')
        parts.append(f'<text x="{left + width + 10}" y="{top + 14 + 18 * number}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{left + width / 2 - 70}" y="{top + height + 38}">queries per second</text>')
    parts.append(f'<text x="20" y="{top - 8}">recall@100</text>')
    size = f'width="{left + width + 140}" height="{top + height + 50}"'
    body = "\n".join(parts)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n',
        encoding="utf-8",
    )


def encode_corpora(start: str, work: Path) -> tuple[Any, np.ndarray]:
    """Encode the passages of three data sets into one store, and 2,000 of their questions; what is there is kept."""
    from pairdr.backends import load_encoder
    from pairdr.collection import open_collection
    from pairdr.config import EncodeConfig, ModelConfig
    from pairdr.encode import encode_corpus

    data, questions = work / "data", []
    (data / "qrels").mkdir(parents=True, exist_ok=True)
    with (data / "corpus.jsonl").open("w", encoding="utf-8") as corpus:
        for name in CORPORA:
            found = open_collection(Path(os.environ["PAIRDR_DATA"]) / name)
            for passage in itertools.chain.from_iterable(found.read_passages()):
                row = {"_id": f"{name} {passage.passage_id}", "title": passage.title, "text": passage.text}
                corpus.write(json.dumps(row) + "\n")
            questions += [text for block in found.queries.read_blocks(("text",)) for (text,) in block]
    (data / "queries.jsonl").write_text('{"_id": "q", "text": "none"}\n', encoding="utf-8")
    encoder = load_encoder(ModelConfig(start=start))
    store = encode_corpus(open_collection(data), encoder, EncodeConfig(), work / "vectors")
    return store, encoder.encode_queries(random.Random(SEED).sample(questions, 2000))


def _share(exact: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, found, strict=True)]))
