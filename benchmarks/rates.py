"""The rates of this machine that `scale.py` plans with.

    python benchmarks/rates.py [--passages 100000] [--words 100] [--vectors 200000] [--rounds 5]

Passages are synthetic: words drawn from a vocabulary of 50,000 by Zipf's law, so that BM25 has common and rare ones.
Vectors are drawn unit vectors of 384 dimensions in a store, asked as `pairdr search` asks. Rates of a core are by the
seconds of processors that were used, so other work beside it changes them little; the GB/s of a single query are those
of the fastest round. The lines that are printed are options of scale.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from drawing import DIMENSIONS, clock, draw_unit_vectors, write_drawn_store
from memory import watch_memory

if TYPE_CHECKING:
    from pairdr.vectors import VectorStore

VOCABULARY, QUESTION_WORDS = 50_000, 6


def draw_texts(rng: np.random.Generator, count: int, words: int) -> list[str]:
    """Return texts of words that are as unevenly common as those of a language."""
    common = 1 / np.arange(1, VOCABULARY + 1)
    drawn = rng.choice(VOCABULARY, size=(count, words), p=common / common.sum())
    return [" ".join(f"w{word}x" for word in row) for row in drawn.tolist()]


def measure_texts(folder: Path, passages: int, words: int, rounds: int) -> None:
    """Convert passages, index their words, and ask for some."""
    from pairdr.collection import open_collection
    from pairdr.config import LexicalConfig
    from pairdr.lexical import index_words

    rng = np.random.default_rng(13)
    data = folder / "data"
    (data / "qrels").mkdir(parents=True)
    with (data / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for at in range(0, passages, 10_000):
            for number, text in enumerate(draw_texts(rng, min(10_000, passages - at), words), start=at):
                stream.write(json.dumps({"_id": f"p{number}", "text": text}) + "\n")
    (data / "queries.jsonl").write_text('{"_id": "q", "text": "w1x"}\n', encoding="utf-8")
    (data / "qrels" / "test.tsv").write_text("q\tp0\t1\n", encoding="utf-8")
    total = passages * words
    with watch_memory(f"convert {passages} passages") as converted:
        collection = open_collection(data)
    with watch_memory(f"index the words of {passages}") as indexed:
        index = index_words(collection, LexicalConfig(), folder / "bm25")
    questions = draw_texts(rng, 50, QUESTION_WORDS)
    seconds = [use_processors(lambda: [index.search(q, 100) for q in questions]) for _ in range(rounds)]
    size = sum(path.stat().st_size for path in (folder / "bm25").iterdir())
    say("convert", total / converted.processor, "words/s")
    say("bm25-index", total / indexed.processor, "words/s")
    say("bm25-memory", (indexed.highest - indexed.before) / total, "bytes a word")
    say("bm25-disk", size / total, "bytes a word")
    say("bm25-search", passages * len(questions) / statistics.median(seconds), "passages/s")


def measure_search(folder: Path, vectors: int, rounds: int) -> None:
    """Search stores of each kind of number, many queries at once and one alone."""
    from pairdr.config import SearchConfig
    from pairdr.indexes.exact import search_exact

    block, rng = SearchConfig().passage_block, np.random.default_rng(14)
    many, one = draw_unit_vectors(rng, 256), draw_unit_vectors(rng, 1)
    for dtype in ("float32", "float16", "int8"):
        store = write_drawn_store(folder / dtype, vectors, dtype)
        size = sum(path.stat().st_size for path in (folder / dtype / "shards").glob("*.npy"))

        def search(queries: np.ndarray, store: VectorStore = store) -> None:
            search_exact(queries, store.read_raw(block), store.id_rank, 100)

        search(one)  # reads the file
        used = statistics.median(use_processors(search, many) for _ in range(rounds))
        say("batch", 2 * len(many) * vectors * DIMENSIONS / used, f"operations/s of a core, {dtype}")
        say("single", size / min(clock(search, one) for _ in range(3 * rounds)) / 1e9, f"GB/s, {dtype}")


def use_processors(work: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds of processors that some work uses."""
    begin = time.process_time()
    work(*arguments)
    return time.process_time() - begin


def say(name: str, value: float, unit: str) -> None:
    """Print an option of scale.py."""
    print(f"--{name:12} {value:<10.3g} {unit}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        os.environ["PAIRDR_CACHE"] = str(place / "cache")
        measure_texts(place, options.passages, options.words, options.rounds)
        measure_search(place, options.vectors, options.rounds)
    print(f"{len(os.sched_getaffinity(0))} cores")
