"""Two machines, each a torchrun of its own, over the loopback: the weights of one process, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rank_script import write_plan

from pairdr.artefact import read_manifest
from pairdr.encoder import DualEncoder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
OPTIONS = (
    *("--max-steps", "6", "--dropout", "0", "--learning-rate", "1e-3", "--alpha", "0.3", "--device", "cpu"),
    *("--eval-passages", "20", "--eval-queries", "5", "--save-steps", "2"),
)


class Place(NamedTuple):
    """What one machine sees."""

    data: Path
    examples: Path
    start: Path
    output: Path
    cache: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> Place:
    folder = tmp_path_factory.mktemp("nodes")
    write_plan(folder, toy, tiny_model)
    shutil.rmtree(folder / "start")
    for source in ("labelled", "pseudo"):
        shutil.copy(folder / "examples" / "plain.arrow", folder / "examples" / f"{source}.arrow")
    return Place(toy, folder / "examples", tiny_model, folder / "out" / "model", folder / "cache")


def list_command(place: Place, batch: int) -> list[str]:
    return [
        *("train", str(place.data), str(place.examples), "-o", str(place.output), "--start", str(place.start)),
        *("--per-device-train-batch-size", str(batch), *OPTIONS),
    ]


def start(arguments: list[str], place: Place) -> subprocess.Popen[str]:
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PAIRDR_CACHE": str(place.cache)}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_alone(place: Place, batch: int) -> subprocess.CompletedProcess[str]:
    child = start(["pairdr", *list_command(place, batch)], place)
    output, errors = child.communicate(timeout=300)
    return subprocess.CompletedProcess(child.args, child.returncode, output, errors)


def train_on_nodes(
    *places: Place, batch: int = 4, more: Sequence[Sequence[str]] = ((), ()), kill_after: Path | None = None
) -> list[tuple[int, str]]:
    """Start a torchrun for each machine; return their exit codes and what they said.

    Args:
        places: what each sees.
        batch: rows of a rank.
        more: options of each.
        kill_after: once this folder has a checkpoint, kill the second machine's rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "pairdr")
    nodes = ("--nnodes", str(len(places)), "--nproc-per-node", "1", *meeting, "-m", "--")
    children = [
        start(["torch.distributed.run", *nodes, "pairdr", *list_command(place, batch), *options], place)
        for place, options in zip(places, more, strict=True)
    ]
    if kill_after is not None:
        while not list(kill_after.glob("step-*")):
            assert children[1].poll() is None
            time.sleep(0.01)
        for pid in Path(f"/proc/{children[1].pid}/task/{children[1].pid}/children").read_text("ascii").split():
            os.kill(int(pid), signal.SIGKILL)
    said = [child.communicate(timeout=300)[1] for child in children]
    return [(child.returncode, errors) for child, errors in zip(children, said, strict=True)]


def copy_place(place: Place, folder: Path) -> Place:
    """Return another machine's copy of the data and the examples; the output is one for all."""
    shutil.copytree(place.data, folder / "data")
    shutil.copytree(place.examples, folder / "examples")
    return place._replace(data=folder / "data", examples=folder / "examples", cache=folder / "cache")


def at(place: Place, folder: Path) -> Place:
    return place._replace(output=folder / "model")


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Train on two machines, each with copies of its own, to the end."""
    folder = tmp_path_factory.mktemp("whole")
    first = at(place, folder)
    done = train_on_nodes(first, copy_place(first, folder / "other"))
    assert [code for code, _ in done] == [0, 0], done
    return first


def test_two_machines_train_the_weights_of_one_process_with_the_joint_batch(
    place: Place, whole: Place, tmp_path: Path
) -> None:
    alone = at(place, tmp_path / "one")
    done = train_alone(alone, batch=8)
    assert done.returncode == 0, done.stderr
    for stage in (".stage1", ""):
        one, two = (DualEncoder.open(f"{p.output}{stage}", device="cpu").model for p in (alone, whole))
        for (title, expected), found in zip(one.named_parameters(), two.parameters(), strict=True):
            if not title.endswith("key.bias"):  # whose gradient is rounding alone
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3, msg=lambda m, t=title: f"{t}: {m}")
    assert read_manifest(whole.output).options["ranks"] == 2


def test_a_machine_that_lacks_something_is_named_and_all_end(place: Place, tmp_path: Path) -> None:
    first = at(place, tmp_path / "a")
    other = copy_place(first, tmp_path / "o")
    shutil.rmtree(other.examples)
    done = train_on_nodes(first, other)
    assert [code for code, _ in done] == [1, 1]
    said = sorted(line for _, errors in done for line in errors.splitlines() if line.startswith("pairdr: "))
    assert f"pairdr: {other.examples}: No examples here: manifest.json is missing. Run the stage that makes it." in said
    assert "pairdr: Another rank could not begin. Its own message says why." in said


def test_machines_with_outputs_of_their_own_are_refused(place: Place, tmp_path: Path) -> None:
    done = train_on_nodes(at(place, tmp_path / "a"), at(place, tmp_path / "b"))
    assert [code for code, _ in done] == [1, 1]
    said = "".join(errors for _, errors in done)
    assert "model.start: The first rank's output is not here. Give all machines one shared output folder." in said


def test_machines_with_other_options_are_refused(place: Place, tmp_path: Path) -> None:
    first = at(place, tmp_path / "a")
    done = train_on_nodes(first, first, more=((), ("--weight-decay", "0.5")))
    said = "".join(errors for _, errors in done)
    assert said.count("pairdr: The ranks do not have the same options. Give every machine the same files") == 2


def test_a_run_that_lost_a_rank_goes_on_to_the_weights_of_one_that_did_not(
    place: Place, whole: Place, tmp_path: Path
) -> None:
    broken = at(place, tmp_path / "broken")
    done = train_on_nodes(broken, broken, kill_after=broken.output.with_name("model.stage1.checkpoints"))
    assert all(code != 0 for code, _ in done)
    assert any("pairdr: Another rank has ended, or cannot be reached." in errors for _, errors in done), done
    alone = train_alone(broken, batch=4)
    assert alone.returncode == 2
    assert "This training was begun with 2 ranks and cannot go on exactly with 1" in alone.stderr
    done = train_on_nodes(broken, broken)
    assert [code for code, _ in done] == [0, 0]
    assert any(re.search(r"pairdr: going on after step \d", errors) for _, errors in done)
    weights = [read_manifest(p.output).facts["weights_sha256"] for p in (whole, broken)]
    assert weights[0] == weights[1]


def test_what_another_number_of_ranks_has_finished_is_neither_trained_anew_nor_thrown_away(
    place: Place, whole: Place, tmp_path: Path
) -> None:
    broken = at(place, tmp_path / "broken")
    first, checkpoints = (broken.output.with_name(f"model.{name}") for name in ("stage1", "checkpoints"))
    done = train_on_nodes(broken, broken, kill_after=checkpoints)
    assert all(code != 0 for code, _ in done)
    made, left = read_manifest(first).fingerprint, sorted(checkpoints.iterdir())
    alone = train_alone(broken, batch=4)
    assert alone.returncode == 2
    said = "This training was begun with 2 ranks and cannot go on exactly with 1. Start 2 ranks, or delete"
    assert f"pairdr: {first}: {said} {first} to begin anew." in alone.stderr
    assert (read_manifest(first).fingerprint, sorted(checkpoints.iterdir())) == (made, left)
    finished = at(place, Path(shutil.copytree(whole.output.parent, tmp_path / "finished")))
    assert train_alone(finished, batch=4).returncode == 2
    assert read_manifest(finished.output).fingerprint == read_manifest(whole.output).fingerprint
