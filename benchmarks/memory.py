"""Memory that is the process's own (RssAnon) while a large corpus is encoded, and while large vectors are searched.

    python benchmarks/memory.py encode --start MODEL [--passages 1000000] [--work FOLDER]
    python benchmarks/memory.py search [--vectors 5000000] [--work FOLDER]

encode: synthetic passages of five words, by any model that `pairdr encode` takes. The data are converted first,
which is measured too. search: fp16 vectors of 384 dimensions in a store, 256 questions at once and then one, k = 100.
Pages of mapped files are not counted: the system takes them back when somebody needs the room.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from drawing import draw_unit_vectors, write_drawn_store

WORDS = ("river", "town", "bridge", "market", "stone", "castle", "north", "winter", "farm", "mill", "road", "church")


@dataclass
class Seen:
    """What a block took: RssAnon before it and at its highest, in bytes; seconds, and those of a processor."""

    before: int = 0
    highest: int = 0
    seconds: float = 0.0
    processor: float = 0.0


@contextmanager
def watch_memory(what: str) -> Iterator[Seen]:
    """Print the highest RssAnon of the process, looked at every 20 ms, and the seconds that the block took."""
    seen, over = Seen(_read_memory()), threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            seen.highest = max(seen.highest, _read_memory())

    watcher, begin, used = threading.Thread(target=look), time.perf_counter(), time.process_time()
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
        seen.seconds, seen.processor = time.perf_counter() - begin, time.process_time() - used
        print(f"{what:34}{seen.seconds:9.1f} s{seen.highest / 2**30:9.2f} GiB", flush=True)


def _read_memory() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def write_corpus(folder: Path, count: int, words: int) -> Path:
    """Write synthetic passages of a number and some words, in BEIR form."""
    rng = random.Random(13)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(count):
            text = " ".join((str(number), *rng.choices(WORDS, k=words)))
            stream.write(json.dumps({"_id": f"p{number}", "text": text}) + "\n")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "river"}\n', encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("q\tp0\t1\n", encoding="utf-8")
    return folder


def encode_many(folder: Path, start: str, count: int) -> None:
    """Write, convert and encode a corpus."""
    from pairdr.backends import load_encoder
    from pairdr.collection import open_collection
    from pairdr.config import EncodeConfig, ModelConfig
    from pairdr.encode import encode_corpus

    data = write_corpus(folder / "data", count, words=4)
    with watch_memory(f"convert {count} passages"):
        collection = open_collection(data)
    with watch_memory("open the model"):
        encoder = load_encoder(ModelConfig(start=start, query_length=32, passage_length=128))
    with watch_memory(f"encode {count} passages"):
        store = encode_corpus(collection, encoder, EncodeConfig(dtype="float16"), folder / "vectors")
    with watch_memory("open the vectors, search one"):
        from pairdr.searcher import Searcher

        Searcher(store, encoder).search("river town", k=10)


def search_many(folder: Path, count: int) -> None:
    """Write a store of drawn vectors and search it."""
    from pairdr.indexes.exact import search_exact
    from pairdr.vectors import VectorStore

    with watch_memory(f"write {count} vectors"):
        write_drawn_store(folder / "vectors", count, "float16")
    with watch_memory("open"):
        store = VectorStore(folder / "vectors")
    for number in (256, 1):
        with watch_memory(f"{number} questions, k=100"):
            search_exact(draw_unit_vectors(np.random.default_rng(number), number), store.read_raw(), store.id_rank, 100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("encode", "search"))
    parser.add_argument("--start", help="a model, best an exported one")
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--vectors", type=int, default=5_000_000)
    parser.add_argument("--work", type=Path, help="folder that is kept; unset: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = options.work or Path(temporary)
        os.environ["PAIRDR_CACHE"] = str(place / "cache")
        if options.what == "encode":
            encode_many(place, options.start or parser.error("--start is needed"), options.passages)
        else:
            search_many(place, options.vectors)
