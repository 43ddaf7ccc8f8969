"""Seconds from the command line to the first result, wall clock, processes started anew each time.

    python benchmarks/startup.py --start MODEL [--passages 50000] [--rounds 10] [--work FOLDER]

`pairdr --help`, and `pairdr search VECTORS --start MODEL "..."` over synthetic passages encoded by that model: an
exported one, or any other, which needs torch. The first call of each is not counted: it reads the files from the disk.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import write_corpus


def encode_passages(folder: Path, start: str, count: int) -> Path:
    """Write and encode a corpus."""
    data = write_corpus(folder / "data", count, words=12)
    run_command("encode", str(data), "--start", start, "-o", str(folder / "vectors"))
    return folder / "vectors"


def run_command(*arguments: str) -> float:
    """Run pairdr in a process of its own and return its seconds."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pairdr", *arguments], stdout=subprocess.DEVNULL, check=True)
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
