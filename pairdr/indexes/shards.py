"""A worker of sharded exact search: it opens a store by its folder and searches a range of its rows.

`python -m pairdr.indexes.shards FD` serves one over an open pipe, until the other end is closed: by its owner, or by
the system when the owner has died.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pairdr.errors import ArtefactError, PairdrError
from pairdr.indexes.exact import Allowed, Rows, Scores, search_exact
from pairdr.vectors import Shard, VectorStore

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """What a worker searches.

    Attributes:
        folder: of the store, as every worker sees it.
        fingerprint: of the version that is searched.
        first: its first row.
        last: the row after its last one.
        block: rows that are read at a time.
        threads: of a search.
    """

    folder: Path
    fingerprint: str
    first: int
    last: int
    block: int
    threads: int


class ShardWorker:
    """Searches a range of a store's rows. What goes wrong is returned, since it has to cross to another process."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._store: VectorStore | None = None

    def open(self) -> PairdrError | None:
        """Open the store ahead of the first search; return why that cannot be, or None."""
        found = _return_errors(self._open)
        return found if isinstance(found, PairdrError) else None

    def search(self, queries: Scores, k: int, allowed: Allowed | None) -> tuple[Rows, Scores] | PairdrError:
        """Return the k best of its rows for each query, as `search_exact`, counted from its first one.

        Args:
            queries: [Q, D].
            k: how many.
            allowed: [last - first] rows that may be found; None is all. Deleted ones never are.
        """
        return _return_errors(lambda: self._search(self._open(), queries, k, allowed))

    def _open(self) -> VectorStore:
        if self._store is None:
            store = VectorStore(self._task.folder)
            if store.fingerprint != self._task.fingerprint:
                raise ArtefactError(
                    "Another version of the vectors was published since they were opened.",
                    path=self._task.folder,
                    remedy="Open them again; on several machines, see that all of them have the same folder.",
                )
            self._store = store
        return self._store

    def _search(self, store: VectorStore, queries: Scores, k: int, allowed: Allowed | None) -> tuple[Rows, Scores]:
        task = self._task
        rows = slice(task.first, task.last)
        if store.alive is not None:
            allowed = store.alive[rows] if allowed is None else store.alive[rows] & allowed
        read = store.read_raw(task.block, task.first, task.last)
        blocks = ((at - task.first, stored, scales) for at, stored, scales in read)
        return search_exact(queries, blocks, store.id_rank[rows], k, allowed, threads=task.threads)


def split_rows(shards: Sequence[Shard], block: int, workers: int) -> list[range]:
    """Return the rows of each worker: ranges of nearly equal size, fewer than `workers` where blocks are fewer.

    A range begins where a block does, so that its rows meet in the same matrix products as in one process.

    Args:
        shards: of the store.
        block: rows that are read at a time; none spans two shards.
        workers: how many, at most.
    """
    count = sum(shard.count for shard in shards)
    starts = np.array([shard.start + at for shard in shards for at in range(0, shard.count, block)] + [count])
    wanted = [count * worker // workers for worker in range(workers + 1)]
    cuts = [int(starts[np.abs(starts - row).argmin()]) for row in wanted]
    return [range(first, last) for first, last in pairwise(cuts) if first < last]


def serve_worker(connection: Connection) -> None:
    """Make a worker of the first message, a `Task`; answer the others until the pipe is closed."""
    try:
        worker: Any = ShardWorker(connection.recv())
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(worker, method)(*arguments))
    except (EOFError, OSError):
        return


def _return_errors(work: Callable[[], T]) -> T | PairdrError:
    try:
        return work()
    except PairdrError as error:
        return error
    except Exception as error:
        return PairdrError(f"A search worker failed: {type(error).__name__}: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is its owner's to handle
    serve_worker(Connection(int(sys.argv[1])))
