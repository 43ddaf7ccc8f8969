"""Ray: two nodes on this machine; what they make is what a local call makes, whichever of them dies."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from clustering import Note, OpenSlowEncoder, Slowly, open_broken, open_clumsy, open_deadly

from pairdr import cluster as module
from pairdr import encode_ray
from pairdr.artefact import publish
from pairdr.cli import main
from pairdr.cluster import Cluster, count_workers, join_cluster
from pairdr.collection import open_collection
from pairdr.config import EncodeConfig, LabelConfig, ModelConfig
from pairdr.encode_ray import OpenEncoder, encode_collection
from pairdr.errors import PairdrError, RefusedError, StoppedError, UsageError
from pairdr.files import hash_file, write_json
from pairdr.store_config import RayConfig
from pairdr.teachers import RECIPE
from pairdr.vectors import VectorStore
from pairdr.workers import Answer, OpenWork, ShippedFolder

if TYPE_CHECKING:
    from conftest import Parts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Return a cluster of two nodes with two CPUs each; pairdr joins it by its address."""
    from ray.cluster_utils import Cluster as LocalCluster

    places = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(places))  # of the workers, which are started elsewhere
        cluster = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        cluster.add_node(num_cpus=2)
        yield cluster
        cluster.shutdown()


def on(nodes: Any, **options: Any) -> RayConfig:
    return RayConfig(**{"on": "ray", "ray_address": nodes.address, "cpus_per_worker": 1} | options)


def hash_shards(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted((folder / "shards").glob("*.*"))}


def count_lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_are_read_on_the_drivers_node_and_only_a_few_at_a_time(nodes: Any, tmp_path: Path) -> None:
    read, done = tmp_path / "read", tmp_path / "done"
    used, workers, first = 0.0, set(), ""
    with join_cluster(on(nodes)) as cluster:
        import ray

        here, room = ray.get_runtime_context().get_node_id(), ray.cluster_resources()["object_store_memory"]
        found = {}
        for number, (twice, node, _) in cluster.map_blocks(
            {n: n for n in range(60)}, Note(read, 4 * 2**20), Slowly(done, 0.05)
        ):
            found[number] = twice
            workers.add(node)
            used = max(used, room - ray.available_resources().get("object_store_memory", 0))
            first = first or f"{len(count_lines(read))} of 60 read"
    assert found == {number: 2 * number for number in range(60)}
    assert set(count_lines(read)) == {here}
    assert len(workers) == 2
    assert 4 * 2**20 <= used <= 110 * 2**20, first  # all of it, in and out, is 480 MiB


def test_a_workers_error_is_an_error_of_ours_with_its_node(nodes: Any) -> None:
    with join_cluster(on(nodes, workers=1)) as cluster:
        with pytest.raises(PairdrError, match=r"^model: The model is broken. \(on node \w{12}\) Make it again\.$"):
            list(cluster.map_blocks({0: 0}, int, open_broken))
        with pytest.raises(PairdrError, match=r"A worker failed: ZeroDivisionError: division by zero. \(on node"):
            list(cluster.map_blocks({0: 0}, int, open_clumsy))


def test_workers_that_die_again_and_again_end_the_call(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TURNS", 1)
    with join_cluster(on(nodes, workers=1)) as cluster, pytest.raises(PairdrError, match="The workers end before"):
        list(cluster.map_blocks({0: 0}, int, open_deadly))


def test_sigterm_ends_the_call_and_what_came_stays(nodes: Any, tmp_path: Path) -> None:
    came = []
    with join_cluster(on(nodes, workers=1)) as cluster, pytest.raises(StoppedError, match="Told to stop"):
        before = signal.getsignal(signal.SIGTERM)
        for number, _ in cluster.map_blocks({n: n for n in range(50)}, Note(tmp_path / "r"), Slowly(tmp_path / "d")):
            came.append(number)
            if len(came) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert len(came) == 2
    assert signal.getsignal(signal.SIGTERM) == before


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_shards_are_those_of_the_local_encoder_and_only_what_is_missing_is_made(
    nodes: Any, toy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    spread = Cluster.map_blocks

    def count(self: Cluster, blocks: Any, *rest: Any) -> Any:
        asked.append(sum(len(rows) for rows in blocks.values()))
        return spread(self, blocks, *rest)

    monkeypatch.setattr(Cluster, "map_blocks", count)
    model = ModelConfig(start=str(tiny_model))
    command = [sys.executable, "-m", "pairdr", "encode", str(toy), "-o", str(tmp_path / "ray"), "--shard-size", "8"]
    options = ["--start", str(tiny_model), "--on", "ray", "--ray-address", nodes.address, "--workers", "1"]
    child = subprocess.Popen([*command, *options, "--tokens-per-batch", "16"], stderr=subprocess.PIPE, text=True)
    while child.poll() is None and len(list((tmp_path / "ray").rglob("*.done"))) < 3:
        time.sleep(0.01)
    child.kill()
    child.communicate()
    there = len(list((tmp_path / "ray").rglob("*.done")))
    assert 3 <= there < 15

    data = open_collection(toy)
    config = EncodeConfig(shard_size=8, tokens_per_batch=16)
    encode_collection(data, model, config, RayConfig(), tmp_path / "local")
    encode_collection(data, model, config, on(nodes, cpus_per_worker=2), tmp_path / "ray")
    assert asked == [120 - 8 * there]
    assert hash_shards(tmp_path / "ray") == hash_shards(tmp_path / "local")
    assert VectorStore(tmp_path / "ray").fingerprint == VectorStore(tmp_path / "local").fingerprint


def test_only_passages_without_a_vector_are_carried(
    toy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Here(Cluster):
        def map_blocks(self, blocks: Any, read: Any, open_work: Any) -> Iterator[tuple[int, Any]]:
            asked.extend(len(read(block)) for block in blocks.values())
            work = open_work()
            yield from ((number, work(read(block))) for number, block in reversed(blocks.items()))

    monkeypatch.setattr(encode_ray, "join_cluster", lambda config: nullcontext(Here(config)))
    monkeypatch.setattr(ShippedFolder, "put", lambda folder: None)
    model, config = ModelConfig(start=str(tiny_model)), EncodeConfig(shard_size=50)
    lines = [json.loads(line) for line in (toy / "corpus.jsonl").read_text().splitlines()]
    for name, rows in {
        "first": lines,
        "second": [*lines[5:], {"_id": "new", "text": "a new town"}, lines[0] | {"metadata": {"seen": 1}}],
    }.items():
        (tmp_path / name / "corpus").mkdir(parents=True)
        (tmp_path / name / "queries.jsonl").write_bytes((toy / "queries.jsonl").read_bytes())
        for number, part in enumerate((rows[:60], rows[60:])):
            text = "\n".join(map(json.dumps, part)) + "\n"
            (tmp_path / name / "corpus" / f"{number}.jsonl").write_text(text)
        data = open_collection(tmp_path / name)
        encode_collection(data, model, config, RayConfig(), tmp_path / "local")
        encode_collection(data, model, config, RayConfig(on="ray"), tmp_path / "ray")
        assert hash_shards(tmp_path / "ray") == hash_shards(tmp_path / "local")
        encode_collection(data, model, config, RayConfig(on="ray"), tmp_path / "ray")
    assert asked == [50, 50, 20, 1]
    assert VectorStore(tmp_path / "ray").fingerprint == VectorStore(tmp_path / "local").fingerprint


def test_another_model_on_a_node_is_refused(tiny_model: Path) -> None:
    work = OpenEncoder(ModelConfig(start=str(tiny_model), device="cpu"), None, "f" * 64, 1, None)
    with pytest.raises(RefusedError, match=r"The model is \w{12} here, and f{12} where the corpus is"):
        work()


# --- labelling --------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_local_teacher(
    nodes: Any, toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pairdr import scoring
    from pairdr.label import label_examples
    from pairdr.label_ray import open_spread
    from pairdr.teachers import load_teacher

    monkeypatch.setattr(scoring, "PART", 20)
    dual = {"kind": "dual_encoder", "name": "student", "source": str(toy_parts.start)}
    idle = dual | {"name": "nobody", "source": "a model that is nowhere"}
    recipe = {"kind": "fusion", "members": [dual, {"kind": "bm25"}], "weights": [0.5, 0.5]}
    config = LabelConfig(label_depth=5, s_pos=0.6, s_neg=0.0)
    data, found = toy_parts.collection, toy_parts.candidates
    teacher = load_teacher(recipe, tmp_path, toy_parts.index, ModelConfig())
    shipped = recipe | {"members": [*recipe["members"], idle], "weights": [0.5, 0.5, 0.0]}
    label_examples(data, found, teacher, config, tmp_path / "local")
    with open_spread(
        on(nodes, workers=1), data, found.merged, 5, shipped, tmp_path, toy_parts.index, ModelConfig()
    ) as spread:
        monkeypatch.setattr(scoring, "score_part", lambda *_: pytest.fail("scored here"))
        label_examples(data, found, teacher, config, tmp_path / "ray", spread=spread)
    for name in ("labelled", "pseudo"):
        assert hash_file(tmp_path / "local" / f"{name}.arrow") == hash_file(tmp_path / "ray" / f"{name}.arrow")


def test_a_killed_call_has_its_scores_and_the_next_makes_the_others(
    nodes: Any, toy: Path, toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pairdr import scoring

    dual = {"kind": "dual_encoder", "name": "student", "source": str(toy_parts.start)}
    recipe = {"kind": "fusion", "members": [dual, {"kind": "bm25"}], "weights": [0.5, 0.5]}
    with publish(tmp_path / "teacher", "teacher", options={}, inputs={}) as staging:
        write_json(staging.path / RECIPE, recipe)
    folder, options = (
        toy_parts.start.parent.parent / "candidates",
        ("--label-depth", "5", "--s-pos", "0.6", "--s-neg", "0"),
    )
    command = ["label", str(toy), str(folder), str(tmp_path / "teacher"), *options]
    spread = ["--on", "ray", "--ray-address", nodes.address, "--workers", "1", "--cpus-per-worker", "1"]
    program = (
        "import sys; from pairdr import scoring; scoring.PART = 2; from pairdr.cli import main; main(sys.argv[1:])"
    )
    child = subprocess.Popen([sys.executable, "-c", program, *command, "-o", str(tmp_path / "ray"), *spread])
    while child.poll() is None and len(list((tmp_path / "ray.parts").rglob("[!.]*.npy"))) < 3:
        time.sleep(0.01)
    child.kill()
    child.communicate()
    there = len(list((tmp_path / "ray.parts").rglob("[!.]*.npy")))
    asked, map_blocks = list[int](), Cluster.map_blocks

    def count(self: Cluster, blocks: Any, *rest: Any) -> Any:
        asked.append(len(blocks))
        return map_blocks(self, blocks, *rest)

    monkeypatch.setattr(scoring, "PART", 2)
    monkeypatch.setattr(Cluster, "map_blocks", count)
    for arguments in (["-o", str(tmp_path / "ray"), *spread], ["-o", str(tmp_path / "local")]):
        with pytest.raises(SystemExit) as end:
            main([*command, *arguments])
        assert end.value.code in (None, 0)
    assert 3 <= there < 72
    assert sum(asked) == 72 - there
    for name in ("labelled", "pseudo"):
        assert hash_file(tmp_path / "local" / f"{name}.arrow") == hash_file(tmp_path / "ray" / f"{name}.arrow")


# --- a node that dies; the cluster has one node after it --------------------------------------------------------------


def hold_back(open_work: OpenWork, node: str, there: Path) -> OpenWork:
    """Return work that other nodes begin when this one has ended its first block: so it has a part in it."""

    def open_held() -> Any:
        import ray

        work, first = open_work(), ray.get_runtime_context().get_node_id() == node

        def do(block: Any) -> Any:
            end = time.monotonic() + 120
            while not first and not there.exists() and time.monotonic() < end:
                time.sleep(0.05)
            found = work(block)
            if first:
                there.touch()
            return found

        return do

    return open_held


def note_makers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the node of each answer; what was held back counts as quick, and patience stays short."""
    fetch, makers = module._fetch, list[str]()

    def note(reference: Any) -> Answer | None:
        answer = fetch(reference)
        if answer is None:
            return None
        makers.append(answer.node)
        return replace(answer, seconds=min(answer.seconds, 0.5))

    monkeypatch.setattr(module, "_fetch", note)
    return makers


def test_encoding_that_loses_a_node_ends_with_the_shards_of_the_local_encoder(
    nodes: Any, toy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 2.0)
    victim = next(iter(nodes.worker_nodes))

    def open_held(*work: Any, **options: Any) -> OpenWork:
        return hold_back(OpenSlowEncoder(*work, **options), victim.node_id, tmp_path / "there")

    monkeypatch.setattr(encode_ray, "OpenEncoder", open_held)
    spread, came, lost = Cluster.map_blocks, list[int](), list[str]()
    makers = note_makers(monkeypatch)

    def lose(self: Cluster, *work: Any) -> Any:
        for number, vectors in spread(self, *work):
            came.append(number)
            if len(came) >= 8 and not lost and victim.node_id[:12] in makers:  # it has work
                lost.append(victim.node_id)
                nodes.remove_node(victim, allow_graceful=False)
            yield number, vectors

    monkeypatch.setattr(Cluster, "map_blocks", lose)
    data, model, config = open_collection(toy), ModelConfig(start=str(tiny_model)), EncodeConfig(shard_size=4)
    encode_collection(data, model, config, RayConfig(), tmp_path / "local")
    encode_collection(data, model, config, on(nodes, cpus_per_worker=2), tmp_path / "ray")
    assert lost == [victim.node_id]
    assert sorted(came) == list(range(30))
    assert hash_shards(tmp_path / "ray") == hash_shards(tmp_path / "local")
    assert VectorStore(tmp_path / "ray").fingerprint == VectorStore(tmp_path / "local").fingerprint
    nodes.add_node(num_cpus=2)


def test_a_lost_node_costs_only_what_had_not_come(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 2.0)
    done, came, before = tmp_path / "done", [], set()
    makers = note_makers(monkeypatch)
    victim = next(iter(nodes.worker_nodes))
    work = hold_back(Slowly(done), victim.node_id, tmp_path / "there")
    with join_cluster(on(nodes)) as cluster:
        for number, (twice, _, _) in cluster.map_blocks({n: n for n in range(60)}, Note(tmp_path / "read"), work):
            assert twice == 2 * number
            came.append(number)
            if len(came) >= 16 and not before and victim.node_id[:12] in makers:
                before = set(came)
                nodes.remove_node(victim, allow_graceful=False)
    assert 16 <= len(before) < 60
    assert sorted(came) == list(range(60))
    counts = {number: count_lines(done).count(str(number)) for number in range(60)}
    assert all(counts.values())
    assert {number for number in before if counts[number] > 1} == set()


# --- without a cluster ------------------------------------------------------------------------------------------------


def test_there_are_as_many_workers_as_have_room() -> None:
    def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
        return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus} if cpus else {}}

    def count(most: int, *there: dict[str, Any], **options: Any) -> int:
        return count_workers(RayConfig(**options), list(there), most)

    assert count(99, node(0), node(7), node(2), node(64, alive=False)) == 4
    assert count(99, node(8), node(8), cpus_per_worker=1) == 16
    assert count(99, node(8, 2), node(8), gpus_per_worker=1) == 2
    assert count(99, node(8, 2), gpus_per_worker=0.5) == 4
    assert count(3, node(8)) == 3
    assert count(99, node(8), workers=2) == 2
    assert count(99, node(8), workers=9) == 4
    with pytest.raises(UsageError, match="No node of the cluster has 2 CPUs and 1 GPUs for a worker"):
        count(99, node(8), gpus_per_worker=1)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "127.0.0.1:1: No Ray cluster answers: .*refused"),
        ("127.0.0.1:99999", "No Ray cluster answers"),
        ("ray://127.0.0.1:10001", "Ray's client cannot reach the files of this machine"),
    ],
)
def test_a_cluster_that_does_not_answer_is_a_usage_error(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=said), join_cluster(RayConfig(on="ray", ray_address=address)):
        pass


def test_the_address_is_the_environments_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere:1")
    with pytest.raises(UsageError, match="ray://somewhere:1"), join_cluster(RayConfig(on="ray")):
        pass


def test_without_ray_the_extra_is_named(
    toy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as end:
        main(["encode", str(toy), "-o", str(tmp_path / "v"), "--start", str(tiny_model), "--on", "ray"])
    assert end.value.code == 2
    assert "pip install 'pairdr[ray]'" in capsys.readouterr().err


def test_a_device_is_not_the_drivers_to_choose(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["encode", str(toy), "-o", str(tmp_path / "v"), "--start", "x", "--on", "ray", "--device", "cpu"])
    assert end.value.code == 2
    assert "--gpus-per-worker" in capsys.readouterr().err


def test_what_a_lost_node_had_in_hand_is_begun_anew_when_nothing_more_comes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's pool waits for room, for ever where there is none: the turn ends, and no block is lost or done twice."""
    turns: list[list[int]] = []

    def answer(number: int) -> Answer:
        return Answer(number, pickle.dumps(number), None, "node", 0.01)

    class Runner:
        def __init__(self, blocks: Mapping[int, Any]) -> None:
            coming = iter([answer(number) for number in blocks][: 2 if not turns else None])
            turns.append(list(blocks))
            self.next = SimpleNamespace(remote=lambda: next(coming, "waits" if len(turns) == 1 else None))

    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    monkeypatch.setattr(module, "_is_ready", lambda reference: reference != "waits")
    monkeypatch.setattr(module, "_find_nodes", lambda: {"first"})
    monkeypatch.setattr(module, "_fetch", lambda reference: reference)
    monkeypatch.setattr(module._Turn, "run", lambda self: self._receive(Runner(self._blocks), {"first", "second"}))
    came = list(Cluster(RayConfig()).map_blocks({n: n for n in range(5)}, int, int))
    assert came == [(n, n) for n in range(5)]
    assert turns == [[0, 1, 2, 3, 4], [2, 3, 4]]
    assert "1 nodes were lost" in capsys.readouterr().err


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with Cluster(RayConfig())._heed_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]
