"""Training that is killed at random moments (kill -9) and called again ends with the weights of an undisturbed run.

PAIRDR_KILLS says how often (2); `make test-crash` kills 20 times and prints a line for each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rank_script import start_child, train_plan, write_plan

from pairdr import loop
from pairdr.artefact import verify_artefact
from pairdr.checkpoint import Checkpoints

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("PAIRDR_KILLS", "2"))
OPTIONS = {"max_steps": 10, "save_steps": 1, "logging_steps": 4, "per_device_train_batch_size": 12}


class Undisturbed(NamedTuple):
    """A run that nobody killed: the stages' weights, and the seconds from its first checkpoint to its end."""

    plan: dict[str, Any]
    weights: list[str]
    seconds: float


def start(plan: dict[str, Any], folder: Path, number: int = 0) -> subprocess.Popen[str]:
    """Start a training in a process of its own and wait for its first checkpoint."""
    options = OPTIONS | {"save_steps": 1 + number % 2}
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan | {"options": options}), encoding="utf-8")
    child = start_child("train", folder)
    while child.poll() is None and not any(folder.glob("model.stage1.checkpoints/step-*")):
        time.sleep(0.002)
    return child


def hash_stages(folder: Path) -> list[str]:
    """Return the hashes of the weights of both stages, every file of which is whole."""
    return [verify_artefact(folder / name).facts["weights_sha256"] for name in ("model.stage1", "model")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    plan = write_plan(folder, toy, tiny_model, both=True, options=OPTIONS)
    child = start(plan, folder / "run")
    begin = time.perf_counter()
    while child.poll() is None and not (folder / "run" / "model").exists():
        time.sleep(0.002)
    seconds = time.perf_counter() - begin
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    return Undisturbed(plan, hash_stages(folder / "run"), seconds)


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what a training in this process says; spare the time that it takes to measure the machine."""
    lines: list[str] = []
    monkeypatch.setattr(loop, "measure_peak", lambda *rest: 1.0)
    monkeypatch.setattr(loop, "say", lines.append)
    return lines


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(
    undisturbed: Undisturbed, tmp_path: Path, said: list[str], number: int
) -> None:
    draw = random.Random(f"kill {number}")
    longest = undisturbed.seconds
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        child = start(undisturbed.plan, folder, number)
        delay = draw.uniform(0, longest)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
        if child.returncode == -signal.SIGKILL:
            break
        longest = delay  # it had ended before
    assert child.returncode == -signal.SIGKILL
    begun = len((folder / "steps").read_bytes())
    train_plan(undisturbed.plan, folder / "model")
    found = hash_stages(folder)
    went_on = next(
        (line.removeprefix("pairdr: going on ") for line in said if "going on" in line), "without a checkpoint"
    )
    print(
        f"\n{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, kill {number + 1} of {KILLS}: {delay:.3f} s after the first "
        f"checkpoint, in step {begun} of {2 * OPTIONS['max_steps']} of both stages; resumed: {went_on}; "
        f"equal weights: {found == undisturbed.weights}"
    )
    assert found == undisturbed.weights
    assert {path.name for path in folder.iterdir()} == {"model", "model.stage1", "plan.json", "steps"}


def test_a_kill_before_the_checkpoints_are_swept_leaves_none_behind(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(checkpoints: Checkpoints) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "remove", stop)
        train_plan(undisturbed.plan, tmp_path / "model")
    assert (tmp_path / "model.stage1.checkpoints").exists()
    train_plan(undisturbed.plan, tmp_path / "model")
    assert hash_stages(tmp_path) == undisturbed.weights
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.stage1"}
