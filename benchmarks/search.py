"""Search speed beside faiss: exact search, and the kinds of index.

    python benchmarks/search.py exact [--vectors 100000] [--rounds 5]
    python benchmarks/search.py approximate [--vectors 100000] [--rounds 5] [--plot FILE.svg]
    PAIRDR_DATA=... python benchmarks/search.py approximate --start MODEL --work FOLDER [--rounds 5] [--plot FILE.svg]

exact: pairdr, faiss's IndexFlatIP as its wheel is, and the same tuned: products by BLAS for every batch, the kernels
that fit the processor (OPENBLAS_CORETYPE, which has to be set before faiss is loaded), block sizes and the kind of
result list tried out before the clock starts. Each has a process of its own and answers in turn, round by round. pairdr
reads the vectors from a memory-mapped file as search does; faiss holds them in memory. The read bandwidth is that of
the fastest of some plain reductions over the same file by as many threads.

approximate: what `pairdr index` builds, at the efforts on both sides of the one it chooses.

With --start, the passages of the data sets debian_packages, en_qa_mix and pycode are encoded together by that model,
and their questions asked. Else vectors are synthetic: unit vectors around centres, 500 to a centre, 384 dimensions,
seeded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_info

SEED, DIMENSIONS, BLOCK = 13, 384, 8192
CORPORA = ("debian_packages", "en_qa_mix", "pycode")
COLOURS = ("#222222", "#1b6ca8", "#c8553d", "#3a7d44", "#8e5aa8")
CASES = ((256, 100), (1024, 100), (256, 1000), (1024, 1000), (1, 100))
CONTENDERS = ("pairdr", "faiss as shipped", "faiss tuned")


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


# --- one contender, in a process of its own ---------------------------------------------------------------------------


class Ours:
    """pairdr's exact search over a memory-mapped file."""

    settings = "numpy"

    def __init__(self, folder: Path) -> None:
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        self.rank = np.arange(len(self.vectors))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and scores."""
        from pairdr.indexes.exact import search_exact

        blocks = ((at, self.vectors[at : at + BLOCK]) for at in range(0, len(self.vectors), BLOCK))
        return search_exact(queries, blocks, self.rank, k)

    def read(self) -> None:
        """Read every vector once, with as many threads as there are processors, in the fastest of some ways."""
        parts = np.array_split(self.vectors, 8 * (os.cpu_count() or 1))
        ways: list[Callable[[np.ndarray], Any]] = [np.max, lambda part: np.dot(part.reshape(-1), part.reshape(-1))]
        way = getattr(self, "_way", None)
        if way is None:
            times = {index: min(_clock(self._spread, w, parts) for _ in range(3)) for index, w in enumerate(ways)}
            way = self._way = ways[min(times, key=times.__getitem__)]
        self._spread(way, parts)

    def _spread(self, way: Callable[[np.ndarray], Any], parts: list[np.ndarray]) -> None:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(way, parts))


class Faiss:
    """faiss's exact index."""

    def __init__(self, folder: Path, tuned: bool) -> None:
        import faiss

        self.faiss, self.tuned = faiss, tuned
        self.index = faiss.IndexFlatIP(DIMENSIONS)
        vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        for at in range(0, len(vectors), BLOCK):
            self.index.add(np.ascontiguousarray(vectors[at : at + BLOCK]))
        self.best: dict[tuple[int, int], dict[str, int]] = {}

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and scores."""
        if self.tuned:
            case = len(queries), k
            if case not in self.best:
                self.best[case] = self._tune(queries, k)
            self._set(self.best[case])
        scores, rows = self.index.search(queries, k)
        return rows, scores

    @property
    def settings(self) -> str:
        """Return what decides its speed, in words."""
        cores = {
            pool["architecture"] for pool in threadpool_info() if "faiss" in pool["filepath"] and "architecture" in pool
        }
        said = f"OpenBLAS kernels {', '.join(cores)}, {self.faiss.omp_get_max_threads()} threads"
        if not self.tuned:
            names = ("distance_compute_blas_threshold", *_KNOBS)
            return said + ", " + ", ".join(f"{name} {getattr(self.faiss.cvar, name)}" for name in names)
        return said + "".join(f"\n    {q} queries, k={k}: {found}" for (q, k), found in self.best.items())

    def _tune(self, queries: np.ndarray, k: int) -> dict[str, int]:
        """Return the fastest settings for a case, of all those in the grid."""
        thresholds = (1, 10**9) if len(queries) == 1 else (1,)
        times = []
        for values in itertools.product(thresholds, *_KNOBS.values()):
            found = dict(zip(("distance_compute_blas_threshold", *_KNOBS), values, strict=True))
            self._set(found)
            times.append((_clock(self.index.search, queries, k), list(found.items())))
        return dict(min(times)[1])

    def _set(self, found: dict[str, int]) -> None:
        for name, value in found.items():
            setattr(self.faiss.cvar, name, value)


_KNOBS = {
    "distance_compute_blas_query_bs": (256, 1024, 4096),
    "distance_compute_blas_database_bs": (1024, 4096),
    "distance_compute_min_k_reservoir": (1, 100, 100_000),
}


def _clock(work: Callable[..., Any], *arguments: Any) -> float:
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


def serve_contender(name: str, folder: Path) -> None:
    """Answer the parent's cases on standard input: one line of JSON in, one out."""
    contender: Any = Ours(folder) if name == "pairdr" else Faiss(folder, name == "faiss tuned")
    queries = np.load(folder / "queries.npy")
    for line in sys.stdin:
        case = json.loads(line)
        if case == "settings":
            answer: Any = contender.settings
        elif case == "read":
            answer = _clock(contender.read)
        else:
            count, k, keep = case
            asked = np.ascontiguousarray(queries[:count])
            if keep:
                rows, scores = contender.search(asked, k)
                np.savez(folder / f"{name}-{count}-{k}.npz", rows=rows, scores=scores)
            answer = _clock(contender.search, asked, k)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


# --- exact ------------------------------------------------------------------------------------------------------------


class Child:
    """A contender's process."""

    def __init__(self, name: str, folder: Path) -> None:
        environment = dict(os.environ)
        core = next((pool["architecture"] for pool in threadpool_info() if "architecture" in pool), None)
        if name == "faiss tuned" and core:
            environment["OPENBLAS_CORETYPE"] = core
        command = [sys.executable, __file__, "serve", "--name", name, "--folder", str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, case: Any) -> Any:
        """Send a case and wait for the answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        """Let the process end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def compare_exact(count: int, rounds: int) -> None:
    """Measure all contenders in turn and print how they compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_vectors(count, folder)
        children = {name: Child(name, folder) for name in CONTENDERS}
        for queries, k in CASES:  # once to keep the results, to tune, and to warm
            for child in children.values():
                child.ask([queries, k, True])
        seconds: dict[tuple[str, int, int], list[float]] = {}
        reads = []
        for _ in range(rounds):
            reads.append(children["pairdr"].ask("read"))
            for (queries, k), (title, child) in itertools.product(CASES, children.items()):
                seconds.setdefault((title, queries, k), []).append(child.ask([queries, k, False]))
        print(f"{count} synthetic vectors of {DIMENSIONS} dimensions, {rounds} rounds, {os.cpu_count()} processors")
        for title, child in children.items():
            print(f"  {title}: {child.ask('settings')}")
            child.end()
        print_exact(count, seconds, reads, folder)


def print_exact(count: int, seconds: dict[tuple[str, int, int], list[float]], reads: list[float], folder: Path) -> None:
    """Print queries per second and, for a single one, the share of the read bandwidth."""
    print(
        f"{'queries':>7}{'k':>6}  {'':18}{'queries/s':>10}{'range':>18}{'pairdr is':>11}{'range':>14}  same ids, scores"
    )
    for (queries, k), title in itertools.product(CASES, CONTENDERS):
        found, ours = seconds[title, queries, k], seconds["pairdr", queries, k]
        rates, ratios = [queries / s for s in found], [s / o for s, o in zip(found, ours, strict=True)]
        print(
            f"{queries:7}{k:6}  {title:18}{statistics.median(rates):10.1f}{_range(rates, '.1f'):>18}"
            f"{statistics.median(ratios):10.2f}x{_range(ratios, '.2f'):>14}  {_compare_ids(folder, title, queries, k)}"
        )
    speeds = [4 * count * DIMENSIONS / second / 1e9 for second in reads]
    shares = [read / own for read, own in zip(reads, seconds["pairdr", 1, 100], strict=True)]
    print(f"memory is read at {statistics.median(speeds):.1f} GB/s ({_range(speeds, '.1f')})")
    print(f"a single query of pairdr has {statistics.median(shares):.0%} of that ({_range(shares, '.0%')})")


def _range(values: list[float], form: str) -> str:
    return f"{min(values):{form}}-{max(values):{form}}"


def _compare_ids(folder: Path, title: str, queries: int, k: int) -> str:
    ours, theirs = (np.load(folder / f"{name}-{queries}-{k}.npz") for name in ("pairdr", title))
    other = ours["rows"] != theirs["rows"]
    gap = np.abs(ours["scores"] - theirs["scores"]).max()
    return f"{1 - other.mean():.3%}, scores within {gap:.0e}"


# --- approximate ------------------------------------------------------------------------------------------------------


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
    from pairdr.config import IndexConfig
    from pairdr.errors import RefusedError
    from pairdr.index import build_index
    from pairdr.indexes.faiss import INDEX_FILE, Effort

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
        speed = f"{self.one:12.2f}{statistics.median(self.rates):11.0f}{_range(self.rates, '.0f'):>14}"
        return speed + "".join(f"{recall:7.3f}" for recall in self.recalls)


Point = tuple[str, Measured, bool]
"""An index's name, what was measured, and whether that is the setting that is chosen unasked."""


def _measure_search(search: Any, asked: np.ndarray, exact: dict[int, np.ndarray], rounds: int) -> Measured:
    recalls = [_share(rows, search(asked, k)[0]) for k, rows in exact.items()]
    one = statistics.median(_clock(search, asked[at : at + 1], 100) for at in range(50))
    return Measured(1000 * one, [len(asked) / _clock(search, asked, 100) for _ in range(rounds)], recalls)


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
    for power in range(math.ceil(low * 3), math.floor(high * 3) + 1):
        x = left + width * (power / 3 - low) / (high - low)
        parts.append(f'<path d="M{x:.1f} {top}v{height}" stroke="#eee"/>')
        parts.append(f'<text x="{x - 12:.1f}" y="{top + height + 18}">{10 ** (power / 3):.0f}</text>')
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


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exact", "approximate", "serve"))
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--start", help="model that encodes real texts, best an exported one")
    parser.add_argument("--work", type=Path, default=Path("build/search"), help="where these are kept")
    parser.add_argument("--plot", type=Path, help="SVG file of recall and speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    points: list[Point] = []
    if options.what == "serve":
        serve_contender(options.name, options.folder)
    elif options.what == "exact":
        compare_exact(options.vectors, options.rounds)
    elif options.start:
        points = compare_indexes(*encode_corpora(options.start, options.work), options.rounds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            draw_vectors(options.vectors, Path(folder))
            vectors, queries = (np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in ("vectors", "queries"))
            points = compare_indexes(ArrayStore(vectors), np.array(queries), options.rounds)
    if options.plot and points:
        what = "real passages" if options.start else "synthetic vectors"
        draw_plot(points, f"Kinds of index over {what}; rings: chosen unasked", options.plot)


if __name__ == "__main__":
    main()
