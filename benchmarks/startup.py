"""Seconds from the command line to the first result, wall clock, processes started anew each time.

    python benchmarks/startup.py --start MODEL [--passages 50000] [--rounds 10] [--work FOLDER]

`pairdr --help`, and `pairdr search VECTORS --start MODEL "..."` over synthetic passages encoded by that model: an
exported one, or any other, which needs torch. The first call of each is not counted: it reads the files from the disk.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("river", "town", "bridge", "market", "stone", "castle", "north", "winter", "farm", "mill", "road", "church")


def encode_passages(folder: Path, start: str, count: int) -> Path:
    """Write and encode a corpus."""
    rng = random.Random(13)
    (folder / "data" / "qrels").mkdir(parents=True, exist_ok=True)
    with (folder / "data" / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(count):
            text = " ".join((str(number), *rng.choices(WORDS, k=12)))
            stream.write(json.dumps({"_id": f"p{number}", "text": text}) + "\n")
    (folder / "data" / "queries.jsonl").write_text('{"_id": "q", "text": "river"}\n', encoding="utf-8")
    (folder / "data" / "qrels" / "test.tsv").write_text("q\tp0\t1\n", encoding="utf-8")
    run_command("encode", str(folder / "data"), "--start", start, "-o", str(folder / "vectors"))
    return folder / "vectors"


def run_command(*arguments: str) -> float:
    """Run pairdr in a process of its own and return its seconds."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pairdr.cli", *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def measure(title: str, rounds: int, *arguments: str) -> None:
    """Print the median and the range of some calls."""
    run_command(*arguments)
    found = [run_command(*arguments) for _ in range(rounds)]
    print(f"{title:24}{statistics.median(found):8.2f} s{min(found):8.2f}-{max(found):.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", required=True, help="the model")
    parser.add_argument("--passages", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--work", type=Path, help="folder that is kept; unset: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        vectors = encode_passages(options.work or Path(temporary), options.start, options.passages)
        measure("pairdr --help", options.rounds, "--help")
        question = ("search", str(vectors), "which river runs by the old mill", "--start", options.start)
        measure(f"search {options.passages}", options.rounds, *question)
