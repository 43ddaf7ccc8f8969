"""Does the memory of exact search grow with queries x passages? Peak resident memory of one process per size.

    python benchmarks/search_memory.py

Each size runs in a process of its own; vectors are read from a file as search reads its shards. Printed beside the
peak: what the scores of all queries and passages would take at once.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

DIMENSIONS, DEPTH, BLOCK, QUERY_BLOCK = 64, 200, 16384, 256
SIZES = ((1000, 25_000), (1000, 100_000), (4000, 100_000), (4000, 400_000))
MIB = 2**20


def search(queries: int, passages: int) -> float:
    """Search synthetic vectors as mining does, block by block, and return the peak in MiB of anonymous memory."""
    from pairdr.indexes.exact import search_exact

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        np.save(path, rng.standard_normal((passages, DIMENSIONS), dtype=np.float32))
        rank = np.arange(passages)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(0, queries, QUERY_BLOCK):
            vectors = np.load(path, mmap_mode="r")
            blocks = ((at, vectors[at : at + BLOCK]) for at in range(0, passages, BLOCK))
            search_exact(rng.standard_normal((QUERY_BLOCK, DIMENSIONS), dtype=np.float32), blocks, rank, DEPTH)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Run each size in its own process and print one line for it."""
    if len(sys.argv) == 3:
        print(search(int(sys.argv[1]), int(sys.argv[2])))
        return
    print(f"{'queries':>8} {'passages':>9} {'grew by, MiB':>13} {'all scores, MiB':>16}")
    for queries, passages in SIZES:
        command = [sys.executable, __file__, str(queries), str(passages)]
        grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{queries:8} {passages:9} {grown:13.0f} {4 * queries * passages / MIB:16.0f}", flush=True)


if __name__ == "__main__":
    main()
