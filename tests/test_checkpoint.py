"""Checkpoints: an interrupted training ends with the weights and the log of one that nobody interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_script import count_calls, make_config, start_child, train_plan, wrap, write_plan
from torch import nn

from pairdr import loop
from pairdr.artefact import read_manifest, verify_artefact
from pairdr.checkpoint import Checkpoints, catch_termination
from pairdr.cli import main
from pairdr.collection import open_collection
from pairdr.config import list_stages
from pairdr.encoder import DualEncoder
from pairdr.errors import StoppedError
from pairdr.train import train_model

SPEEDS = ("tokens_per_second", "padding", "gemm_share")
STEPS = {"max_steps": 8, "save_steps": 1, "logging_steps": 3, "per_device_train_batch_size": 12}
"""46 rows make 3 batches of 12 rows an epoch."""
CASES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "few checkpoints": {"save_steps": 3},
    "every line logged": {"logging_steps": 1},
    "lamb": {"optimizer": "lamb"},
    "lora": {"lora_rank": 2},
    "gradient cache": {"grad_cache": True, "tokens_per_forward": 256},
    "a batch that shrank": {"per_device_train_batch_size": 90},
    "looks at dev": {"eval_steps": 2, "load_best_model_at_end": True},
}

Train = Callable[..., DualEncoder]
Straight = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> dict[str, Any]:
    return write_plan(tmp_path_factory.mktemp("plan"), toy, tiny_model, options=STEPS)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, plan: dict[str, Any]) -> Straight:
    """Return a function that trains without an interruption, once for the same options: its weights and its log."""
    found: dict[str, tuple[str, list[dict[str, Any]]]] = {}

    def train_once(**options: Any) -> tuple[str, list[dict[str, Any]]]:
        key = json.dumps(options, sort_keys=True)
        if key not in found:
            folder = tmp_path_factory.mktemp("straight") / "model"
            found[key] = train_plan(plan, folder, **options).hash_weights(), read_log(folder)
        return found[key]

    return train_once


@pytest.fixture(autouse=True)
def no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time that it takes to measure the machine."""
    monkeypatch.setattr(loop, "measure_peak", lambda *rest: 1.0)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the log of a model without its speeds."""
    lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in SPEEDS} for line in lines]


def stop_training() -> None:
    raise KeyboardInterrupt


def interrupt(plan: dict[str, Any], folder: Path, before: int, both: bool = False, **options: Any) -> Path:
    """Train until a step is about to move the parameters, and stop there; return the folder of the checkpoints."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "update_parameters", loop.update_parameters)  # put back afterwards
        wrap(loop, "update_parameters", count_calls({before: stop_training}))
        train_plan(plan | {"both": both}, folder, **options)
    assert not folder.exists()
    return Path(f"{folder}.stage1.checkpoints" if both else f"{folder}.checkpoints")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def step_names(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


def require_as_straight(plan: dict[str, Any], straight: Straight, folder: Path, **options: Any) -> None:
    """Go on, and compare weights and log with those of a run that nobody interrupted."""
    weights, log = straight(**options)
    assert train_plan(plan, folder, **options).hash_weights() == weights
    assert read_log(folder) == log
    assert names_in(folder.parent) == [folder.name]  # no checkpoints are left


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("before", [3, 6, 8], ids=lambda step: f"before step {step}")
@pytest.mark.parametrize("name", ["plain", "few checkpoints"])
def test_a_resumed_training_has_the_weights_and_the_log_of_a_straight_one(
    plan: dict[str, Any],
    straight: Straight,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    before: int,
) -> None:
    checkpoints = interrupt(plan, tmp_path / "model", before, **CASES[name])
    every = CASES[name].get("save_steps", 1)
    saved = (before - 1) // every * every
    assert (names_in(checkpoints)[-1:] if checkpoints.exists() else []) == step_names(saved)[: saved > 0]
    capsys.readouterr()
    torch.manual_seed(before)  # what was drawn before makes no difference
    require_as_straight(plan, straight, tmp_path / "model", **CASES[name])
    assert (f"pairdr: going on after step {saved}\n" in capsys.readouterr().err) == (saved > 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("plain", "few checkpoints")])
def test_going_on_is_exact_whatever_is_trained(
    plan: dict[str, Any], straight: Straight, tmp_path: Path, name: str
) -> None:
    interrupt(plan, tmp_path / "model", 6, **CASES[name])
    torch.manual_seed(0)
    require_as_straight(plan, straight, tmp_path / "model", **CASES[name])


def test_a_training_that_is_interrupted_at_every_step_ends_all_the_same(
    plan: dict[str, Any], straight: Straight, tmp_path: Path
) -> None:
    for _ in range(7):
        interrupt(plan, tmp_path / "model", 2)  # one step is done, the next one is not
    require_as_straight(plan, straight, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["plain", "lora"])
def test_both_stages_go_on(plan: dict[str, Any], tmp_path: Path, options: dict[str, Any]) -> None:
    both = plan | {"both": True}
    straight = train_plan(both, tmp_path / "straight", **options)
    interrupt(plan, tmp_path / "model", 8 + 4, both=True, **options)
    assert names_in(Path(f"{tmp_path}/model.checkpoints")) == step_names(2, 3)
    torch.manual_seed(0)
    assert train_plan(both, tmp_path / "model", **options).hash_weights() == straight.hash_weights()
    for stage in ("", ".stage1"):
        assert read_log(tmp_path / f"model{stage}") == read_log(tmp_path / f"straight{stage}")


def test_different_options_give_different_weights(straight: Straight) -> None:
    weights = [straight(**CASES[name])[0] for name in ("plain", "accumulation", "lamb", "lora")]
    assert len(set(weights)) == 4


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_checkpoints_are_kept(plan: dict[str, Any], tmp_path: Path, limit: int) -> None:
    checkpoints = interrupt(plan, tmp_path / "model", 6, save_total_limit=limit)
    assert names_in(checkpoints) == step_names(*range(6 - limit, 6))


def test_the_best_step_on_dev_is_what_is_kept_in_the_end(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = iter([0.1, 0.2, 0.9, 0.9, 0.3])  # before, after steps 2, 4, 6, 8
    weights: list[str] = []

    def measure(sample: Any, encoder: DualEncoder) -> float:
        weights.append(encoder.hash_weights())
        return next(dev)

    monkeypatch.setattr("pairdr.watch.DevSample.measure", measure)
    options = {"eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    model = train_plan(plan, tmp_path / "model", **options)
    assert model.hash_weights() == weights[2]
    assert len(set(weights)) == 5
    line = {"step": 4, "stage": "pair", "dev_RR@10": 0.9, "chosen": True}
    assert read_log(tmp_path / "model")[-1] == line
    assert read_manifest(tmp_path / "model").facts["summary"] == line


def test_the_best_checkpoint_outlives_the_newer_ones_and_an_interruption(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    dev = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    weights: list[str] = []

    def measure(sample: Any, encoder: DualEncoder) -> float:
        weights.append(encoder.hash_weights())
        return next(dev)

    monkeypatch.setattr("pairdr.watch.DevSample.measure", measure)
    checkpoints = interrupt(plan, tmp_path / "model", 6, **options)
    assert names_in(checkpoints) == step_names(2, 5)
    assert train_plan(plan, tmp_path / "model", **options).hash_weights() == weights[1]


def test_nothing_in_a_checkpoint_is_a_pickle(plan: dict[str, Any], tmp_path: Path) -> None:
    checkpoints = interrupt(plan, tmp_path / "model", 3)
    newest = checkpoints / step_names(2)[0]
    assert names_in(newest) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    for path in newest.iterdir():
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))  # a pickle, torch's archive of pickles
        header = content[8 : 8 + int.from_bytes(content[:8], "little")] if path.suffix == ".safetensors" else content
        assert isinstance(json.loads(header), dict)
    facts = verify_artefact(newest).facts
    assert facts == {"step": 2, "ranks": 1}


# --- beginning anew ---------------------------------------------------------------------------------------------------


def test_without_resuming_training_begins_anew(
    plan: dict[str, Any], straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(plan, tmp_path / "model", 6)
    capsys.readouterr()
    model = train_plan(plan, tmp_path / "model", resume_from_checkpoint=False)
    assert model.hash_weights() == straight()[0]
    assert read_log(tmp_path / "model") == straight()[1]
    assert "going on" not in capsys.readouterr().err


@pytest.mark.parametrize("limit", [1, 2])
def test_a_training_begun_anew_goes_on_at_its_own_checkpoints(plan: dict[str, Any], tmp_path: Path, limit: int) -> None:
    interrupt(plan, tmp_path / "model", 7, save_total_limit=limit)
    checkpoints = interrupt(plan, tmp_path / "model", 3, save_total_limit=limit, resume_from_checkpoint=False)
    assert names_in(checkpoints) == step_names(1, 2)[-limit:]


@pytest.mark.parametrize("changed", [{"seed": 99}, {"learning_rate": 5e-4}, {"max_steps": 7}])
def test_checkpoints_of_other_options_are_not_resumed(
    plan: dict[str, Any],
    straight: Straight,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
) -> None:
    interrupt(plan, tmp_path / "model", 6, **changed)
    capsys.readouterr()
    require_as_straight(plan, straight, tmp_path / "model")
    assert "going on" not in capsys.readouterr().err


def test_an_option_that_moves_no_weight_leaves_the_checkpoints_usable(
    plan: dict[str, Any], straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(plan, tmp_path / "model", 6, save_steps=2, save_total_limit=1)
    capsys.readouterr()
    require_as_straight(plan, straight, tmp_path / "model")
    assert "going on after step 4" in capsys.readouterr().err


# --- damage -----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def break_json(path: Path) -> None:
    path.write_text("{", encoding="utf-8")


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated": ("model.safetensors", cut, "the manifest says"),
    "a flipped bit in the weights": ("model.safetensors", flip, "its sha256 differs"),
    "a flipped bit in the moments": ("optimizer.safetensors", flip, "its sha256 differs"),
    "a flipped bit in the state": ("state.json", flip, "its sha256 differs"),
    "no weights": ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    "no state": ("state.json", Path.unlink, "state.json is missing"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json is missing"),
    "a broken manifest": ("manifest.json", break_json, "The manifest cannot be read"),
}


@pytest.mark.parametrize(("name", "limit"), [*((name, 2) for name in DAMAGE), ("truncated", 1), ("no manifest", 1)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    plan: dict[str, Any],
    straight: Straight,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    limit: int,
) -> None:
    file, damage, sentence = DAMAGE[name]
    newest = interrupt(plan, tmp_path / "model", 6, save_total_limit=limit) / step_names(5)[0]
    damage(newest / file)
    capsys.readouterr()
    require_as_straight(plan, straight, tmp_path / "model", save_total_limit=limit)
    said = capsys.readouterr().err
    assert str(newest) in said
    assert sentence in said
    assert ("going on after step 4" in said) == (limit == 2)


def test_checkpoints_of_other_options_are_named_with_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = write_checkpoint(tmp_path / "checkpoints", {"alpha": 0.1, "seed": 1})
    other = Checkpoints(tmp_path / "checkpoints", {"alpha": 0.2, "seed": 1}, {}, keep=2)
    model = nn.Linear(2, 2)
    assert other.load_newest(model, torch.optim.AdamW(model.parameters())) is None
    assert f"{step}: made with other alpha; it is not used" in capsys.readouterr().err


def test_a_best_checkpoint_that_is_damaged_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = write_checkpoint(tmp_path / "checkpoints", {})
    flip(step / "model.safetensors")
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    assert not Checkpoints(tmp_path / "checkpoints", {}, {}, keep=2).load_model(1, model)
    assert torch.equal(model.weight, before)
    assert "its sha256 differs" in capsys.readouterr().err


def write_checkpoint(folder: Path, options: dict[str, Any]) -> Path:
    """Write the checkpoint of a tiny layer after one step and return its place."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    Checkpoints(folder, options, {}, keep=2).save(1, model, optimizer, {}, best=0)
    return folder / "step-00000001"


def test_a_damaged_newer_checkpoint_does_not_crowd_out_the_next_ones(plan: dict[str, Any], tmp_path: Path) -> None:
    checkpoints = interrupt(plan, tmp_path / "model", 6)
    flip(checkpoints / step_names(5)[0] / "state.json")
    flip(checkpoints / step_names(4)[0] / "state.json")
    interrupt(plan, tmp_path / "model", 3)
    verify_artefact(checkpoints / step_names(2)[0])


def test_what_a_killed_save_left_is_skipped_and_swept(
    plan: dict[str, Any], straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = interrupt(plan, tmp_path / "model", 6)
    for step in (5, 6):
        half = checkpoints / f".{step_names(step)[0]}.new.partial"
        shutil.copytree(checkpoints / step_names(5)[0], half)
        cut(half / "model.safetensors")
        (half / "manifest.json").unlink()
    capsys.readouterr()
    require_as_straight(plan, straight, tmp_path / "model")
    said = capsys.readouterr().err
    assert "going on after step 5" in said
    for step in (5, 6):
        assert f".{step_names(step)[0]}.new.partial: only begun, by a call that was ended" in said


# --- SIGTERM ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_terminated_command_saves_its_step_and_the_next_call_goes_on(
    plan: dict[str, Any], toy: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = STEPS | {"save_steps": 100, "eval_passages": 10, "eval_queries": 5, "learning_rate": 1e-3}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = ["train", str(toy), plan["examples"], "--output", str(tmp_path / "model"), "--arm", "labelled_only"]
    command += ["--start", str(tiny_model), "--device", "cpu", *flags]
    (tmp_path / "plan.json").write_text(json.dumps({"command": command, "pause_at": 3}), encoding="utf-8")

    child = start_child("command", tmp_path)
    while child.poll() is None and not (tmp_path / "paused").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    _, said = child.communicate(timeout=120)
    assert child.returncode == 143, said
    sentence = "pairdr: Stopped after step 3 of 8 of stage query_centric. The same command goes on from there."
    assert [line for line in said.splitlines() if "pairdr:" in line] == [sentence]
    assert "Traceback" not in said
    assert names_in(tmp_path / "model.checkpoints") == step_names(3)

    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert "going on after step 3" in capsys.readouterr().err
    config = make_config(**STEPS)
    straight = train_model(
        open_collection(toy), plan["examples"], plan["start"], list_stages("labelled_only", config), config,
        tmp_path / "straight", device="cpu",
    )  # fmt: skip
    assert DualEncoder.open(tmp_path / "model").hash_weights() == straight.hash_weights()
    assert not (tmp_path / "model.checkpoints").exists()


@pytest.mark.parametrize("step", [2, 8], ids=["a step", "the last step"])
def test_being_terminated_in_a_stage_never_lets_the_next_one_begin(
    plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    stages: list[str] = []
    monkeypatch.setattr(loop, "DevSample", loop.DevSample)
    monkeypatch.setattr(loop, "update_parameters", loop.update_parameters)
    wrap(loop, "DevSample", lambda *rest: stages.append("begun"))
    wrap(loop, "update_parameters", count_calls({step: lambda: signal.raise_signal(signal.SIGTERM)}))
    with pytest.raises(StoppedError, match=rf"^Stopped after step {step} of 8 of stage pair\."):
        train_plan(plan | {"both": True}, tmp_path / "model")
    assert stages == ["begun"]
    assert not (tmp_path / "model").exists()


def test_the_handler_of_termination_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with catch_termination() as stopped:
        assert signal.getsignal(signal.SIGTERM) != before
        signal.raise_signal(signal.SIGTERM)
        assert stopped.is_set()
    assert signal.getsignal(signal.SIGTERM) == before
