"""Exact search shared among workers: to the bit that of one process, whatever the split, and whoever dies."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storing import WordEncoder, make_texts, to_passages, write_collection

from pairdr.cli import main
from pairdr.config import EncodeConfig, ModelConfig
from pairdr.encode import encode_corpus, upsert_passages
from pairdr.errors import ArtefactError, MissingExtraError, PairdrError, UsageError
from pairdr.indexes import sharded
from pairdr.indexes.exact import search_exact
from pairdr.indexes.sharded import ShardedIndex, WorkerGoneError
from pairdr.indexes.shards import ShardWorker, Task, split_rows
from pairdr.searcher import Searcher
from pairdr.serve.shelf import Shelf
from pairdr.store_config import WorkersConfig
from pairdr.vectors import Dtype, Shard, VectorStore
from pairdr.versions import compact_store, delete_passages

if TYPE_CHECKING:
    from conftest import Parts

SCRIPT = Path(__file__).with_name("sharded_script.py")
ROOT = SCRIPT.parents[1]
ENCODER = WordEncoder()
Found = tuple[np.ndarray, np.ndarray]


def make_store(folder: Path, dtype: Dtype = "float32", count: int = 60, deleted: Sequence[int] = ()) -> VectorStore:
    """Encode passages, many of them copies, in shards of eight; take some out again."""
    collection = write_collection(folder / "data", make_texts(count))
    encode_corpus(collection, ENCODER, EncodeConfig(shard_size=8, dtype=dtype), folder / "vectors")
    if deleted:
        delete_passages(folder / "vectors", [f"p{number:03d}" for number in deleted])
    return VectorStore(folder / "vectors")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[VectorStore]:
    """Return stores of every kind of number, with deleted rows and without."""
    folder = tmp_path_factory.mktemp("stores")
    kinds: list[tuple[Dtype, Sequence[int]]] = [
        ("float32", ()), ("float32", (0, 7, 8, 59)), ("float16", range(20, 45)), ("int8", (3,)),
    ]  # fmt: skip
    return [make_store(folder / str(at), dtype, 60, gone) for at, (dtype, gone) in enumerate(kinds)]


@pytest.fixture(scope="module")
def store(stores: list[VectorStore]) -> VectorStore:
    return stores[1]


def ask(count: int) -> np.ndarray:
    return ENCODER.encode_queries([f"word{number} town{number % 7}" for number in range(count)])


def search_here(
    store: VectorStore, queries: np.ndarray, k: int, allowed: np.ndarray | None = None, block: int = 16384
) -> Found:
    """Search as one process does."""
    rows = allowed if store.alive is None else store.alive if allowed is None else store.alive & allowed
    return search_exact(queries, store.read_raw(block), store.id_rank, k, rows)


def require_same(found: Found, expected: Found) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


def find_process(worker: Any) -> subprocess.Popen[bytes]:
    return worker._process


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it never came true")


class Local:
    """A worker in this process."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def start(self) -> None:
        pass

    def send(self, method: str, *arguments: Any) -> None:
        self.worker = getattr(self, "worker", None) or ShardWorker(self.task)
        self.answer = getattr(self.worker, method)(*arguments)

    def receive(self, method: str) -> Any:
        return self.answer

    def end(self) -> None:
        pass


# --- how rows are split -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=8), st.integers(1, 30), st.integers(1, 12))
def test_ranges_are_whole_blocks_and_as_even_as_these_allow(counts: list[int], block: int, workers: int) -> None:
    starts = [sum(counts[:at]) for at in range(len(counts) + 1)]
    shards = [Shard(str(at), starts[at], count) for at, count in enumerate(counts)]
    ranges = split_rows(shards, block, workers)
    assert [row for rows in ranges for row in rows] == list(range(sum(counts)))
    assert len(ranges) <= workers
    blocks = {shard.start + at for shard in shards for at in range(0, shard.count, block)}
    assert {rows.start for rows in ranges} <= blocks
    assert all(len(rows) < sum(counts) / workers + block + 1 for rows in ranges)


def test_equal_shards_are_shared_out_evenly() -> None:
    shards = [Shard(str(at), 8 * at, 8) for at in range(12)]
    assert [len(rows) for rows in split_rows(shards, 16384, 4)] == [24] * 4
    assert [len(rows) for rows in split_rows(shards[:3], 16384, 5)] == [8] * 3
    assert [len(rows) for rows in split_rows([Shard("one", 0, 100)], 25, 2)] == [50, 50]


# --- the same as one process ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    which=st.integers(0, 3), block=st.sampled_from([1, 3, 8, 16384]), workers=st.integers(1, 9), k=st.integers(1, 70),
    count=st.integers(0, 12), data=st.data(),
)  # fmt: skip
def test_any_split_finds_what_one_process_does_to_the_bit(
    stores: list[VectorStore], which: int, block: int, workers: int, k: int, count: int, data: st.DataObject
) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    share = data.draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]))
    allowed = None if share is None else draw.random(stores[which].count) < share
    if allowed is not None and data.draw(st.booleans()):
        allowed[:30] = False  # some workers have nothing that may be found
    with patch.object(sharded, "_Process", Local):
        index = ShardedIndex(stores[which], workers, block=block)
    queries = ask(count)
    require_same(index.search(queries, k, allowed), search_here(stores[which], queries, k, allowed, block))


@pytest.mark.parametrize("which", range(4))
def test_processes_find_what_one_process_does_to_the_bit(stores: list[VectorStore], which: int) -> None:
    allowed = np.arange(60) % 3 > 0
    with ShardedIndex(stores[which], 3) as index:
        assert len({find_process(worker).pid for worker in index.workers}) == 3
        for queries in (ask(1), ask(7), ask(0)):
            for k in (1, 10, 100):
                for rows in (None, allowed, np.zeros(60, np.bool_)):
                    require_same(index.search(queries, k, rows), search_here(stores[which], queries, k, rows))


@pytest.mark.parametrize(("kernels", "needs"), [("Haswell", "avx2"), ("SkylakeX", "avx512f")])
def test_other_kernels_of_matrix_products_give_the_same_bits_too(tmp_path: Path, kernels: str, needs: str) -> None:
    cpu = Path("/proc/cpuinfo")
    if not cpu.is_file() or needs not in cpu.read_text(encoding="utf-8").split():
        pytest.skip(f"this processor does not say that it has {needs}")
    # Haswell's and Zen's add up the rows of 40 queries in two orders, by their place in a product; but ranges begin
    # where blocks do.
    script = f"""
import sys
import numpy as np
sys.path.insert(0, {str(SCRIPT.parent)!r})
from threadpoolctl import threadpool_info
from pathlib import Path
from test_sharded import require_same, search_here
from storing import WordEncoder, to_passages, write_collection, make_texts
from pairdr.config import EncodeConfig
from pairdr.encode import encode_corpus
from pairdr.indexes.sharded import ShardedIndex
folder = Path({str(tmp_path)!r})
store = encode_corpus(write_collection(folder / "data", make_texts(900)), WordEncoder(), EncodeConfig(), folder / "v")
queries = np.random.default_rng(1).standard_normal((40, 16)).astype(np.float32)
with ShardedIndex(store, 3, block=211) as index:
    assert len(index.ranges) == 3
    require_same(index.search(queries, 50), search_here(store, queries, 50, block=211))
print(*[pool["architecture"] for pool in threadpool_info() if pool.get("internal_api") == "openblas"])
"""
    environment = os.environ | {"OPENBLAS_CORETYPE": kernels, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    if kernels not in found.stdout:
        pytest.skip(f"this processor runs {found.stdout.strip() or 'no OpenBLAS'}")


def test_a_store_without_passages_has_no_workers_and_finds_nothing(tmp_path: Path) -> None:
    make_store(tmp_path, count=3, deleted=range(3))
    compact_store(tmp_path / "vectors")
    with ShardedIndex(VectorStore(tmp_path / "vectors"), 3) as index:
        assert index.workers == []
        rows, scores = index.search(ask(2), 3)
    assert (rows.tolist(), scores.tolist()) == ([[-1] * 3] * 2, [[-math.inf] * 3] * 2)


# --- workers that die -------------------------------------------------------------------------------------------------


@pytest.fixture
def index(store: VectorStore) -> Iterator[ShardedIndex]:
    with ShardedIndex(store, 2) as index:
        yield index


@pytest.mark.parametrize("killed", [(0,), (1,), (0, 1)])
def test_a_worker_that_was_killed_is_started_again(
    index: ShardedIndex, store: VectorStore, killed: tuple[int, ...]
) -> None:
    before = [find_process(worker) for worker in index.workers]
    for number in killed:
        before[number].kill()
        before[number].wait()
    require_same(index.search(ask(3), 5), search_here(store, ask(3), 5))
    after = [find_process(worker) for worker in index.workers]
    assert [number for number in (0, 1) if after[number] is not before[number]] == list(killed)


def test_a_worker_that_is_killed_while_it_searches_is_started_again(index: ShardedIndex, store: VectorStore) -> None:
    worker, send = index.workers[0], index.workers[0].send
    os.kill(find_process(worker).pid, signal.SIGSTOP)

    def send_and_kill(*question: Any) -> None:
        send(*question)
        find_process(worker).kill()
        worker.send = send  # type: ignore[method-assign]

    worker.send = send_and_kill  # type: ignore[method-assign]
    require_same(index.search(ask(3), 5), search_here(store, ask(3), 5))


def test_a_worker_that_dies_twice_ends_the_search_with_a_word(index: ShardedIndex, store: VectorStore) -> None:
    def give_up(method: str) -> Any:
        raise WorkerGoneError("exit code -9")

    with (
        patch.object(index.workers[1], "receive", give_up),
        pytest.raises(PairdrError, match="A search worker died, and so did the one in its place: exit code -9"),
    ):
        index.search(ask(2), 5)
    require_same(index.search(ask(2), 5), search_here(store, ask(2), 5))  # and the next one is well


def test_a_search_that_was_broken_off_leaves_no_answer_for_the_next(index: ShardedIndex, store: VectorStore) -> None:
    def interrupt(method: str) -> Any:
        raise KeyboardInterrupt

    with patch.object(index.workers[0], "receive", interrupt), pytest.raises(KeyboardInterrupt):
        index.search(ask(2), 7)
    require_same(index.search(ask(4), 5), search_here(store, ask(4), 5))


def test_workers_end_with_the_index(store: VectorStore) -> None:
    index = ShardedIndex(store, 2)
    processes = [find_process(worker) for worker in index.workers]
    del index
    gc.collect()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_workers_end_when_their_owner_is_killed(store: VectorStore) -> None:
    owner = subprocess.Popen(
        [sys.executable, str(SCRIPT), "owner", str(store.folder)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with owner:
        assert owner.stdout is not None
        pids = json.loads(owner.stdout.readline())
        assert [is_running(pid) for pid in pids] == [True, True]
        owner.kill()
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_what_a_worker_raises_is_said(store: VectorStore, index: ShardedIndex) -> None:
    with pytest.raises(PairdrError, match=r"A search worker failed: ValueError: .*matmul"):
        index.search(np.ones((2, 3), np.float32), 5)
    require_same(index.search(ask(2), 5), search_here(store, ask(2), 5))


def test_a_newer_version_is_not_searched_in_place_of_the_one_that_was_opened(tmp_path: Path) -> None:
    old = make_store(tmp_path, count=20)
    with ShardedIndex(old, 2) as index:
        upsert_passages(to_passages(make_texts(9, first=100)), ENCODER, EncodeConfig(), old.folder)
        require_same(index.search(ask(2), 5), search_here(old, ask(2), 5))  # who has opened it has it
        find_process(index.workers[0]).kill()
        with pytest.raises(ArtefactError, match="Another version of the vectors was published"):
            index.search(ask(2), 5)
    with pytest.raises(ArtefactError, match="Another version"):
        ShardedIndex(old, 2)


# --- options, commands ------------------------------------------------------------------------------------------------


def test_options_say_how_many_workers_and_threads(store: VectorStore) -> None:
    with patch.object(sharded, "_Process", Local):
        index = ShardedIndex.open(store, WorkersConfig(search_workers=3, search_threads=5))
        shared = ShardedIndex.open(store, WorkersConfig(search_workers=10**6))
    assert [worker.task.threads for worker in index.workers] == [5] * 3
    assert [worker.task.threads for worker in shared.workers] == [1] * 8  # as many as there are blocks


@pytest.mark.parametrize("option", ["search_workers", "search_threads"])
def test_none_of_them_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"Option {option} is 0; it must be at least 1"):
        WorkersConfig(**{option: 0})


def test_without_ray_it_is_named(store: VectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"This needs the package ray. .*pairdr\[ray\]"):
        ShardedIndex.open(store, WorkersConfig(on="ray"))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://somewhere:10001", "ray://somewhere:10001: Ray's client cannot reach"),
        ("127.0.0.1:1", "127.0.0.1:1: No Ray cluster answers"),
    ],
)
def test_a_cluster_that_cannot_be_asked_is_named(store: VectorStore, address: str, said: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match=said):
        ShardedIndex.open(store, WorkersConfig(on="ray", ray_address=address))


def test_a_searcher_asks_workers_and_refuses_an_index_beside_them(toy_parts: Parts, tmp_path: Path) -> None:
    model, place = ModelConfig(start=str(toy_parts.start), device="cpu"), toy_parts.store.folder
    plain = Searcher.open(place, model).search("which river runs through Kendal", 5)
    searcher = Searcher.open(place, model, workers=WorkersConfig(search_workers=1))
    with patch.object(ShardedIndex, "search", autospec=True, side_effect=ShardedIndex.search) as asked:
        assert searcher.search("which river runs through Kendal", 5) == plain
    assert asked.call_count == 1
    with pytest.raises(UsageError, match="Workers share exact search, not an index"):
        Searcher.open(place, model, index=tmp_path, workers=WorkersConfig(search_workers=2))


def test_the_command_finds_the_same_with_workers(toy_parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*options: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["search", str(toy_parts.store.folder), "which river runs through Kendal", *start, *options])
        assert not end.value.code
        return capsys.readouterr().out

    start = ("--start", str(toy_parts.start), "--device", "cpu", "--json")
    assert call("--search-workers", "2", "--search-threads", "1", "--on", "here") == call()


def test_a_service_searches_with_workers_and_ends_those_of_an_old_version(toy_parts: Parts, tmp_path: Path) -> None:
    shutil.copytree(toy_parts.store.folder, tmp_path / "v")
    model = ModelConfig(start=str(toy_parts.start), device="cpu")
    shelf = Shelf(tmp_path / "v", model, workers=WorkersConfig(search_workers=1), clock=lambda name: nullcontext())
    index: Any = shelf.take(None).searcher._index
    process = find_process(index.workers[0])
    del index
    upsert_passages(to_passages({"new": "a new passage"}), toy_parts.encoder, EncodeConfig(), tmp_path / "v")
    assert shelf.refresh() == ["v"]
    gc.collect()
    assert process.returncode == -signal.SIGKILL
    hits = shelf.take(None).searcher.search("a new passage", 1)
    assert (hits[0].passage_id, round(hits[0].score, 3)) == ("new", 1)
    process = find_process(shelf.take(None).searcher._index.workers[0])  # type: ignore[union-attr]
    assert process.poll() is None


def test_the_command_tells_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def stop(*_: Any, **options: Any) -> None:
        told.update(options)
        raise UsageError("That is enough.")

    monkeypatch.setattr("pairdr.serve.shelf.Shelf", stop)
    with pytest.raises(SystemExit):
        main(
            [
                "serve",
                "vectors",
                "--search-workers",
                "3",
                "--search-threads",
                "2",
                "--on",
                "ray",
                "--ray-address",
                "a:1",
            ]
        )
    assert told["workers"] == WorkersConfig("ray", "a:1", 3, 2)


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cluster_finds_the_same_also_when_an_actor_and_a_node_are_lost(store: VectorStore) -> None:
    pytest.importorskip("ray")
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "ray", str(store.folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    queries, allowed = store.take(np.arange(5)), np.arange(60) % 3 > 0
    expected = [part.tolist() for rows in (None, allowed) for part in search_here(store, queries, 9, rows)]
    assert found["nodes"] == 2
    assert [found[name] == expected for name in ("whole", "actor lost", "node lost")] == [True] * 3
    assert found["no room"].startswith("The Ray cluster had no room for a worker of 50 threads")
