"""Search speed beside faiss: exact search, and the kinds of index; and exact search by several workers.

    python benchmarks/search.py exact [--vectors 100000] [--rounds 5]
    python benchmarks/search.py approximate [--vectors 100000] [--rounds 5] [--plot FILE.svg]
    python benchmarks/search.py sharded [--vectors 100000] [--rounds 5] [--workers 2]
    PAIRDR_DATA=... python benchmarks/search.py approximate --start MODEL --work FOLDER [--rounds 5] [--plot FILE.svg]

exact: pairdr, faiss's IndexFlatIP as its wheel is, and the same tuned: products by BLAS for every batch, the kernels
that fit the processor (OPENBLAS_CORETYPE, which has to be set before faiss is loaded), block sizes and the kind of
result list tried out before the clock starts. Each has a process of its own and answers in turn, round by round. pairdr
reads the vectors from a memory-mapped file as search does; faiss holds them in memory. The read bandwidth is that of
the fastest of some plain reductions over the same file by as many threads.

approximate: what `pairdr index` builds, at the efforts on both sides of the one it chooses.

sharded: workers of this machine beside the threads of one process, with as many processors.

With --start, the passages of the data sets debian_packages, en_qa_mix and pycode are encoded together by that model,
and their questions asked. Else vectors are synthetic: unit vectors around centres, 500 to a centre, 384 dimensions,
seeded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from drawing import BLOCK, DIMENSIONS, clock, draw_vectors, say_range
from indexes import ArrayStore, Point, compare_indexes, draw_plot, encode_corpora
from sharding import compare_workers
from threadpoolctl import threadpool_info

CASES = ((256, 100), (1024, 100), (256, 1000), (1024, 1000), (1, 100))
CONTENDERS = ("pairdr", "faiss as shipped", "faiss tuned")


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
            times = {index: min(clock(self._spread, w, parts) for _ in range(3)) for index, w in enumerate(ways)}
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
            times.append((clock(self.index.search, queries, k), list(found.items())))
        return dict(min(times)[1])

    def _set(self, found: dict[str, int]) -> None:
        for name, value in found.items():
            setattr(self.faiss.cvar, name, value)


_KNOBS = {
    "distance_compute_blas_query_bs": (256, 1024, 4096),
    "distance_compute_blas_database_bs": (1024, 4096),
    "distance_compute_min_k_reservoir": (1, 100, 100_000),
}


def serve_contender(name: str, folder: Path) -> None:
    """Answer the parent's cases on standard input: one line of JSON in, one out."""
    contender: Any = Ours(folder) if name == "pairdr" else Faiss(folder, name == "faiss tuned")
    queries = np.load(folder / "queries.npy")
    for line in sys.stdin:
        case = json.loads(line)
        if case == "settings":
            answer: Any = contender.settings
        elif case == "read":
            answer = clock(contender.read)
        else:
            count, k, keep = case
            asked = np.ascontiguousarray(queries[:count])
            if keep:
                rows, scores = contender.search(asked, k)
                np.savez(folder / f"{name}-{count}-{k}.npz", rows=rows, scores=scores)
            answer = clock(contender.search, asked, k)
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
        same = _compare_ids(folder, title, queries, k)
        print(
            f"{queries:7}{k:6}  {title:18}{statistics.median(rates):10.1f}{say_range(rates, '.1f'):>18}"
            f"{statistics.median(ratios):10.2f}x{say_range(ratios, '.2f'):>14}  {same}"
        )
    speeds = [4 * count * DIMENSIONS / second / 1e9 for second in reads]
    shares = [read / own for read, own in zip(reads, seconds["pairdr", 1, 100], strict=True)]
    print(f"memory is read at {statistics.median(speeds):.1f} GB/s ({say_range(speeds, '.1f')})")
    print(f"a single query of pairdr has {statistics.median(shares):.0%} of that ({say_range(shares, '.0%')})")


def _compare_ids(folder: Path, title: str, queries: int, k: int) -> str:
    ours, theirs = (np.load(folder / f"{name}-{queries}-{k}.npz") for name in ("pairdr", title))
    other = ours["rows"] != theirs["rows"]
    gap = np.abs(ours["scores"] - theirs["scores"]).max()
    return f"{1 - other.mean():.3%}, scores within {gap:.0e}"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exact", "approximate", "sharded", "serve"))
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--start", help="model that encodes real texts, best an exported one")
    parser.add_argument("--work", type=Path, default=Path("build/search"), help="where these are kept")
    parser.add_argument("--plot", type=Path, help="SVG file of recall and speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    points: list[Point] = []
    if options.what == "serve":
        serve_contender(options.name, options.folder)
    elif options.what == "exact":
        compare_exact(options.vectors, options.rounds)
    elif options.what == "sharded":
        compare_workers(options.vectors, options.workers, options.rounds)
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
