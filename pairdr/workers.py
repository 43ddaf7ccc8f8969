"""What runs inside a Ray cluster: the actor that runs Ray Data, the workers that hold a model, the tasks that read."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairdr.errors import PairdrError
from pairdr.progress import quiet_libraries
from pairdr.ray_connection import first_line
from pairdr.store_config import RayConfig

if TYPE_CHECKING:
    import pyarrow as pa

Read = Callable[[Any], Any]
"""Takes what a block is described by and returns what is in it; called in other processes of the driver's node."""
Work = Callable[[Any], Any]
"""Takes what a block holds and returns what is made of it; called in a worker."""
OpenWork = Callable[[], Work]
"""Loads what a worker needs, once."""

BLOCKS_PER_WORKER = 4
"""Blocks, in and out, for which the object store has room per worker."""
LEAST_STORE = 2**26
RESTARTS = 3
"""Of a worker that dies, and of a block that it dies over."""


@dataclass(frozen=True)
class ShippedFolder:
    """A folder's files in Ray's object store, which carries them to each node once."""

    files: Mapping[str, Any]
    """Path below the folder to the reference of its bytes."""

    @classmethod
    def put(cls, folder: Path) -> ShippedFolder:
        """Put all files of a folder into the object store."""
        import ray

        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return cls({path.relative_to(folder).as_posix(): ray.put(path.read_bytes()) for path in paths})

    @contextlib.contextmanager
    def unpack(self) -> Iterator[Path]:
        """Write the files into a folder that is there while the block runs."""
        import ray

        with tempfile.TemporaryDirectory(prefix="pairdr-") as place:
            for name, reference in self.files.items():
                path = Path(place) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(ray.get(reference))
            yield Path(place)


@dataclass(frozen=True)
class Answer:
    """What a worker made of a block, or (what, path, remedy) of its error."""

    number: int
    result: bytes
    error: tuple[str, str | None, str | None] | None
    node: str
    seconds: float


class Runner:
    """Runs Ray Data; an actor on the driver's node."""

    def start(
        self, blocks: Mapping[int, Any], read: Read, open_work: OpenWork, config: RayConfig, workers: int
    ) -> None:
        """Begin; `next` then waits for what comes."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.downstream_capacity_backpressure_ratio = 1.0
        size = len(pickle.dumps(read(next(iter(blocks.values())))))
        room = max(LEAST_STORE, BLOCKS_PER_WORKER * (workers + 1) * size)
        context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=room)
        passages = ray.data.read_datasource(
            _make_source(blocks, read), num_cpus=0, concurrency=2, override_num_blocks=len(blocks)
        )  # without a CPU of its own: workers may have them all, and a head node may have none
        made = passages.map_batches(
            _Worker,
            fn_constructor_args=(open_work,),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker or None,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        self._rows = iter(made.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0))

    def next(self) -> Answer | None:
        """Return the next answer, or None after the last."""
        table = next(self._rows, None)
        return None if table is None else pickle.loads(table["payload"][0].as_py())


class _Worker:
    """Holds a model and makes of each block what it is for; an actor of Ray Data's pool."""

    def __init__(self, open_work: OpenWork) -> None:
        import ray

        quiet_libraries()
        self._open_work, self._node = open_work, ray.get_runtime_context().get_node_id()[:12]
        self._work: Work | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        number, begin = table["number"][0].as_py(), time.monotonic()
        result, error = b"", None
        try:
            content = pickle.loads(table["payload"][0].as_py())
            if self._work is None:
                self._work = self._open_work()
            result = pickle.dumps(self._work(content))
        except Exception as failure:  # an answer like any other: raised, Ray would wrap it and try again
            error = _describe(failure)
        answer = Answer(number, result, error, self._node, time.monotonic() - begin)
        return _make_row(pa, number, answer)


def _make_source(blocks: Mapping[int, Any], read: Read) -> Any:
    """Return a source of Ray Data with a read task per block, all on this node."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Blocks(Datasource):  # type: ignore[misc]
        supports_distributed_reads = False

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            return [
                ReadTask(_ReadBlock(number, read, block), BlockMetadata(1, None, None, None))
                for number, block in blocks.items()
            ]

    return Blocks()


@dataclass(frozen=True)
class _ReadBlock:
    """Makes a block one row, which nothing splits or joins."""

    number: int
    read: Read
    block: Any

    def __call__(self) -> list[pa.Table]:
        import pyarrow as pa

        return [_make_row(pa, self.number, self.read(self.block))]


def _make_row(pa: Any, number: int, payload: Any) -> pa.Table:
    return pa.table({"number": [number], "payload": pa.array([pickle.dumps(payload)], pa.large_binary())})


def _describe(error: Exception) -> tuple[str, str | None, str | None]:
    if isinstance(error, PairdrError):
        return error.what, None if error.path is None else str(error.path), error.remedy
    return f"A worker failed: {type(error).__name__}: {first_line(error)}.", None, None
