"""Blocks of work on a Ray cluster: read on this machine, done by workers that hold a model, back in any order.

Ray Data does the work. Its read tasks run on this node, so that no file system has to be shared; its pool of actors
holds the model; its back-pressure keeps a few blocks per worker in the object store, whatever there is to do. A worker
that dies is started again, and what it had in hand is done again. The rest is what Ray Data does not do: its pool waits
for room where a node is gone, and nothing more can come. Then the blocks that are left are begun anew, by as many
workers as there is room for.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pairdr.errors import PairdrError, StoppedError, UsageError
from pairdr.progress import say
from pairdr.ray_connection import connect_ray, first_line, load_ray
from pairdr.store_config import RayConfig
from pairdr.workers import Answer, OpenWork, Read, Runner

_TURNS = 3
"""Pools of workers in a row that bring nothing, before it is given up."""
_PATIENCE = 10.0
"""Seconds without a block, beside three times the longest one, after which those of a lost node are begun anew."""


@contextlib.contextmanager
def join_cluster(config: RayConfig) -> Iterator[Cluster]:
    """Be part of a Ray cluster while the block runs: of one that is named, else of one of this machine alone.

    A program that has called `ray.init` itself keeps its connection.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: no cluster answers at the address, or it is one of Ray's client.
    """
    ray = load_ray()
    if not connect_ray(config.ray_address):
        yield Cluster(config)
        return
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):  # Ray tells there of lost nodes
        try:
            yield Cluster(config)
        finally:
            ray.shutdown()


class Cluster:
    """A cluster that this process is part of. Made by `join_cluster`.

    Attributes:
        config: workers, and what each takes of its node.
        told: the signal that has told this process to stop.
    """

    def __init__(self, config: RayConfig) -> None:
        self.config, self.told = config, 0

    def map_blocks(self, blocks: Mapping[int, Any], read: Read, open_work: OpenWork) -> Iterator[tuple[int, Any]]:
        """Yield (number, what was made of it) of every block, in the order in which workers end them.

        A block may be done twice where a node was lost; it is yielded once.

        Args:
            blocks: number to what `read` is called with; small.
            read: gets a block's content, on this node.
            open_work: makes each worker's function.

        Raises:
            UsageError: no node has room for a worker.
            PairdrError: of a worker, with its node; or workers that die again and again.
            StoppedError: SIGTERM came.
        """
        left, fruitless, reason = dict(blocks), 0, ""
        with self._heed_signals():
            while left:
                before = len(left)
                turn = _Turn(self, left, read, open_work)
                for number, result in turn.run():
                    if left.pop(number, None) is not None:
                        yield number, result
                reason = turn.problem or reason
                fruitless = 0 if len(left) < before else fruitless + 1
                if left and fruitless == _TURNS:
                    raise PairdrError(
                        f"The workers end before a block is done: {reason}.",
                        remedy="Check that every node has pairdr, and memory for its workers.",
                    )

    def require_time(self) -> None:
        """Stop where a signal has come.

        Raises:
            StoppedError: SIGTERM came.
            KeyboardInterrupt: Ctrl-C.
        """
        if self.told == signal.SIGINT:
            raise KeyboardInterrupt
        if self.told:
            raise StoppedError("Told to stop.", remedy="What was finished stays; the same command goes on from there.")

    @contextlib.contextmanager
    def _heed_signals(self) -> Iterator[None]:
        """Note signals while the block runs: an exception would be lost inside a call of Ray's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: Any) -> None:
            self.told = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def count_workers(config: RayConfig, nodes: list[dict[str, Any]], most: int) -> int:
    """Return how many workers there is room for.

    Args:
        config: what each takes.
        nodes: of the cluster, as `ray.nodes` describes them.
        most: more have nothing to do.

    Raises:
        UsageError: no node has room for one.
    """
    room = 0
    for node in nodes:
        if node["Alive"]:
            found = node["Resources"]
            fits = found.get("CPU", 0) // config.cpus_per_worker
            room += int(min(fits, found.get("GPU", 0) // config.gpus_per_worker) if config.gpus_per_worker else fits)
    if not room:
        gpus = f" and {config.gpus_per_worker:g} GPUs" if config.gpus_per_worker else ""
        raise UsageError(
            f"No node of the cluster has {config.cpus_per_worker} CPUs{gpus} for a worker.",
            remedy="Lower --cpus-per-worker or --gpus-per-worker, or add nodes.",
        )
    return min(room, most, config.workers or room)


class _Turn:
    """One pool of workers, from its start until all is done or nothing more can come."""

    def __init__(self, cluster: Cluster, blocks: Mapping[int, Any], read: Read, open_work: OpenWork) -> None:
        self.problem = ""
        self._cluster, self._config = cluster, cluster.config
        self._blocks, self._read, self._open_work = dict(blocks), read, open_work

    def run(self) -> Iterator[tuple[int, Any]]:
        """Yield what comes; note why the turn ended where blocks are left."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = _find_nodes()
        workers = count_workers(self._config, ray.nodes(), len(self._blocks))
        # In a process of its own Ray Data can be ended where it waits for ever.
        pinned = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        runner = ray.remote(Runner).options(num_cpus=0, scheduling_strategy=pinned).remote()
        try:
            ray.get(runner.start.remote(self._blocks, self._read, self._open_work, self._config, workers))
            yield from self._receive(runner, nodes)
        except ray.exceptions.RayError as error:
            self.problem = first_line(getattr(error, "cause", None) or error)
        finally:
            with contextlib.suppress(Exception):  # Ray may be gone
                ray.kill(runner)

    def _receive(self, runner: Any, nodes: set[str]) -> Iterator[tuple[int, Any]]:
        longest = 0.0
        while True:
            coming, since = runner.next.remote(), time.monotonic()
            while True:
                self._cluster.require_time()
                if _is_ready(coming):
                    break
                lost = nodes - _find_nodes()
                if lost and time.monotonic() - since > _PATIENCE + 3 * longest:
                    self.problem = f"{len(lost)} nodes were lost"
                    say(f"pairdr: {self.problem}; what they had in hand is begun anew")
                    return
            answer = _fetch(coming)
            if answer is None:
                return
            longest = max(longest, answer.seconds)
            if answer.error is not None:
                what, path, remedy = answer.error
                raise PairdrError(f"{what} (on node {answer.node})", path=path, remedy=remedy)
            yield answer.number, pickle.loads(answer.result)


def _find_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _is_ready(reference: Any) -> bool:
    import ray

    return bool(ray.wait([reference], timeout=1)[0])


def _fetch(reference: Any) -> Answer | None:
    import ray

    answer: Answer | None = ray.get(reference)
    return answer
