"""Exact search shared among workers: processes of this machine, or actors of a Ray cluster.

A worker reads its own rows of the store alone, so the vectors may be larger than the memory of one machine; what all
find is merged, and equals one process to the bit. A worker that dies is started again, once for a search.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from pairdr.backends.exported import count_cores
from pairdr.config import SearchConfig
from pairdr.errors import PairdrError
from pairdr.indexes.exact import Allowed, Rows, Scores, merge_results
from pairdr.indexes.shards import ShardWorker, Task, split_rows
from pairdr.ray_connection import connect_ray, load_ray
from pairdr.store_config import WorkersConfig
from pairdr.vectors import VectorStore

START_SECONDS = 120.0
"""Until an actor that has found no place in the cluster is given up."""


class WorkerGoneError(Exception):
    """A worker ended before it answered."""


class Worker(Protocol):
    """A `ShardWorker` somewhere: questions are sent, and answered in turn."""

    def start(self) -> None:
        """Begin anew, wherever it was before."""

    def send(self, method: str, *arguments: Any) -> None:
        """Ask without waiting."""

    def receive(self, method: str) -> Any:
        """Wait for the answer; raise WorkerGoneError where none will come."""

    def end(self) -> None:
        """End it, whatever it does."""


class ShardedIndex:
    """Exact search over a store by several workers: `search` has the form of `search_exact`.

    Attributes:
        store: what is searched.
        ranges: the rows of each worker.
        workers: as many.
    """

    def __init__(
        self,
        store: VectorStore,
        workers: int,
        *,
        threads: int | None = None,
        on: Literal["here", "ray"] = "here",
        block: int = SearchConfig().passage_block,
    ) -> None:
        """Start the workers, and wait until all have opened the store.

        Args:
            store: the vectors.
            workers: how many, at most; a store of few blocks has fewer.
            threads: of each; None shares out the processors, of this machine or of the smallest node.
            on: processes here, or actors of the Ray cluster that this process is connected to.
            block: rows that are read at a time; ranges begin where a block does.

        Raises:
            ArtefactError: another version was published meanwhile, or a node does not see the folder.
            PairdrError: a worker cannot be started.
        """
        self.store, self.ranges = store, split_rows(store.shards, block, workers)
        self._lock = threading.Lock()
        count = len(self.ranges)
        threads = threads or (_share_nodes(count) if on == "ray" else _share_processors(count))
        folder = store.folder.resolve()
        tasks = [Task(folder, store.fingerprint, rows.start, rows.stop, block, threads) for rows in self.ranges]
        self.workers: list[Worker] = [_Actor(task) if on == "ray" else _Process(task) for task in tasks]
        self._finalizer = weakref.finalize(self, _end_workers, self.workers)
        try:
            self._ask([(worker, "open", ()) for worker in self.workers])
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, store: VectorStore, config: WorkersConfig) -> ShardedIndex:
        """Start the workers that options ask for.

        Raises:
            MissingExtraError: Ray is not installed.
            UsageError: no cluster answers.
            PairdrError: as the constructor.
        """
        workers = config.search_workers
        if config.on == "ray":
            connect_ray(config.ray_address)
            workers = workers or len(_list_processors())
        return cls(store, workers or 1, threads=config.search_threads, on=config.on)

    def describe(self) -> dict[str, Any]:
        """Return what a run keeps of how it was searched."""
        return {"workers": len(self.workers)}

    def search(
        self, queries: Scores, k: int, allowed: Allowed | None = None, filters: object = None
    ) -> tuple[Rows, Scores]:
        """Return the k best rows for each query, best first, ties by id rank: those of `search_exact`, to the bit.

        Args:
            queries: [Q, D].
            k: how many; fewer than k live rows leave places of row -1 and score -inf.
            allowed: [N] rows that may be found; None is all. Deleted ones never are.
            filters: what `allowed` was made of, which is not needed here.

        Returns:
            rows [Q, k] and scores [Q, k].

        Raises:
            PairdrError: a worker failed, or died twice.
        """
        asked = []
        for rows, worker in zip(self.ranges, self.workers, strict=True):
            part = None if allowed is None else allowed[rows.start : rows.stop]
            if part is None or part.any():
                asked.append((rows.start, worker, None if part is None or part.all() else part))
        with self._lock:
            found = self._ask([(worker, "search", (queries, k, part)) for _, worker, part in asked])
        shape = (len(queries), 0)
        results = [(0, np.empty(shape, np.int64), np.empty(shape, np.float32))]
        results += [(first, *answer) for (first, *_), answer in zip(asked, found, strict=True)]
        return merge_results(results, self.store.id_rank, k)

    def close(self) -> None:
        """End the workers; the index's end, and this process's, do so too."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, questions: Sequence[tuple[Worker, str, tuple[Any, ...]]]) -> list[Any]:
        """Ask workers at once, and return their answers."""
        try:
            for worker, method, arguments in questions:
                worker.send(method, *arguments)
            answers = [_receive(*question) for question in questions]
        except BaseException:  # answers that nobody has read would be taken for those of the next search
            for worker, *_ in questions:
                worker.end()
            raise
        for answer in answers:
            if isinstance(answer, PairdrError):
                raise answer
        return answers


class _Process:
    """A worker in a process of its own, which ends when the pipe to it is closed."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.end()
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pairdr.indexes.shards", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._send(self._task)

    def send(self, method: str, *arguments: Any) -> None:
        if self._process is None:
            self.start()
        self._send((method, arguments))

    def receive(self, method: str) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            code = None if self._process is None else self._process.wait()
            raise WorkerGoneError(f"exit code {code}") from error

    def end(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it has died; `receive` says so
            self._pipe.send(message)


class _Actor:
    """A worker as a Ray actor, on whichever node has room."""

    def __init__(self, task: Task) -> None:
        self._task, self._ray = task, load_ray()
        self._actor: Any = None
        self._answer: Any = None

    def start(self) -> None:
        self.end()
        kind = self._ray.remote(ShardWorker)
        self._actor = kind.options(num_cpus=self._task.threads, scheduling_strategy="SPREAD").remote(self._task)

    def send(self, method: str, *arguments: Any) -> None:
        if self._actor is None:
            self.start()
        self._answer = getattr(self._actor, method).remote(*arguments)

    def receive(self, method: str) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(self._answer, timeout=START_SECONDS if method == "open" else None)
        except errors.GetTimeoutError:
            return PairdrError(
                f"The Ray cluster had no room for a worker of {self._task.threads} threads in {START_SECONDS:.0f} s.",
                remedy="Give fewer --search-workers or --search-threads.",
            )
        except errors.RayActorError as error:
            raise WorkerGoneError(str(error).splitlines()[0]) from error

    def end(self) -> None:
        if self._actor is not None and self._ray.is_initialized():
            self._ray.kill(self._actor)
        self._actor = None


def _receive(worker: Worker, method: str, arguments: tuple[Any, ...]) -> Any:
    """Return a worker's answer; where it has died, that of one that is started in its place."""
    try:
        return worker.receive(method)
    except WorkerGoneError:
        worker.start()
    try:
        worker.send("open")
        opened = worker.receive("open")  # on Ray with a limit: what was lost may leave no room
        if method == "open" or opened is not None:
            return opened
        worker.send(method, *arguments)
        return worker.receive(method)
    except WorkerGoneError as error:
        raise PairdrError(
            f"A search worker died, and so did the one in its place: {error}.",
            remedy="See whether memory was short; more workers on more machines need less on each.",
        ) from error


def _end_workers(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.end()


def _share_processors(workers: int) -> int:
    return max(1, count_cores() // max(1, workers))


def _share_nodes(workers: int) -> int:
    """Return the threads of a worker that fit wherever it is put, the workers being spread over the nodes."""
    found = _list_processors()
    return max(1, int(min(found)) // -(-max(1, workers) // len(found)))


def _list_processors() -> list[float]:
    """Return the processors of each node of the cluster that has any.

    Raises:
        PairdrError: none has.
    """
    nodes = [node["Resources"].get("CPU", 0) for node in load_ray().nodes() if node["Alive"]]
    found = [count for count in nodes if count >= 1]
    if not found:
        raise PairdrError("No node of the Ray cluster has a processor.", remedy="Add one with ray start.")
    return found
