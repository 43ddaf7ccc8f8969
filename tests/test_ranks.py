"""Ranks: two processes give the gradients and the weights of one process with the joint batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rank_script import (
    list_cases,
    make_batch,
    make_rows,
    start_ranks,
    take_gradients,
    train_plan,
    write_plan,
)
from safetensors.torch import load_file
from torch import Tensor

from pairdr import loop
from pairdr.artefact import read_manifest
from pairdr.collection import Collection, open_collection
from pairdr.encoder import DualEncoder
from pairdr.errors import UsageError

pytestmark = pytest.mark.slow
JOINT = {"dropout": 0.0, "num_train_epochs": 0.6, "save_steps": 2, "train_negatives": 2}
"""0.6 epochs of 46 rows are 3.45 joint batches of 8 rows: 4 steps."""
NAMES = [name for name, *_ in list_cases()]


class Found(NamedTuple):
    """What two ranks wrote."""

    plan: dict[str, Any]
    folder: Path
    reports: list[dict[str, Any]]
    gradients: dict[str, Tensor]
    collection: Collection


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> Found:
    """Run two ranks once; they check everything."""
    folder = tmp_path_factory.mktemp("ranks")
    plan = write_plan(folder, toy, tiny_model, both=True, joint=JOINT)
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    start_ranks(folder)
    reports = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return Found(plan, folder, reports, load_file(folder / "gradients.safetensors"), open_collection(toy))


@pytest.fixture(scope="module")
def encoder(found: Found) -> DualEncoder:
    return DualEncoder.open(found.plan["start"], device="cpu")


@pytest.fixture(autouse=True)
def no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that it takes to measure the machine."""
    monkeypatch.setattr(loop, "measure_peak", lambda *rest: 1.0)


def of_ranks(found: Found, name: str) -> dict[str, Tensor]:
    return {key.split("/")[1]: value for key, value in found.gradients.items() if key.split("/")[0] == name}


def require_equal(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare gradients to the rounding of the largest one; a rank may have zeros where one process has none."""
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 1e-3
    for name, value in gradients.items():
        wanted = expected.get(name, torch.zeros_like(value))
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}")
    assert set(expected) <= set(gradients)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_the_gradients_and_the_loss_of_one(found: Found, encoder: DualEncoder, name: str) -> None:
    alpha, config, least = next((a, c, least) for n, a, c, least in list_cases() if n == name)
    rows = make_rows(found.collection, 8, least)
    parts = [rows] if config.cross_batch_negatives else [rows[:4], rows[4:]]
    taken = [take_gradients(found.collection, encoder, make_batch(part, config), alpha, config) for part in parts]
    expected = {n: sum(gradients[n] for _, gradients in taken) / len(taken) for n in taken[0][1]}
    require_equal(of_ranks(found, name), expected)
    for part in taken[0][0].keys() - {"s(q,p-)", "s(p+,p-)", "alike"}:  # of this rank's rows, not means of ranks' means
        ranks = [report["losses"][name][part] for report in found.reports]
        one = [losses[part] for losses, _ in taken]
        assert sum(ranks) / 2 == pytest.approx(sum(one) / len(one), rel=1e-4)


def test_the_cases_differ_from_each_other(found: Found) -> None:
    plain = [
        name for name in NAMES if not name.endswith("cached") and name not in ("own", "own batches, own negatives")
    ]
    sums = [round(sum(report["losses"][name]["loss"] for report in found.reports), 6) for name in plain]
    assert len(set(sums)) == len(sums)


def test_two_ranks_train_the_weights_of_one_with_the_double_batch(found: Found, tmp_path: Path) -> None:
    train_plan(found.plan, tmp_path / "one", **JOINT | {"per_device_train_batch_size": 8})
    for stage in (".stage1", ""):
        one = load_file(tmp_path / f"one{stage}" / "model.safetensors")
        two = load_file(found.folder / f"joint{stage}" / "model.safetensors")
        start = load_file(Path(found.plan["start"]) / "model.safetensors")
        assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-3
        # Attention's key bias has no gradient but rounding, which AdamW makes as large as any other.
        names = [name for name in one if not name.endswith("key.bias")]
        for name in names:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-5, msg=lambda t, n=name: f"{n}: {t}")
        unused = [name for name in one if torch.equal(one[name], start[name])]
        assert unused  # BERT's pooler: a gradient of zeros would let weight decay shrink it
        assert [name for name in unused if not torch.equal(two[name], start[name])] == []
        assert read_manifest(tmp_path / f"one{stage}").facts["summary"]["step"] == 4


def test_one_rank_writes_and_both_see_as_many_batches(found: Found) -> None:
    first, second = found.reports
    step = ".step-00000002.new.partial"
    assert first["published"]["joint"] == [step, ".joint.stage1.new.partial", step, ".joint.new.partial"]
    assert second["published"]["joint"] == []
    assert first["batches"] == second["batches"]


def test_a_second_training_in_the_same_processes_has_as_many_ranks(found: Found) -> None:
    assert found.reports[0]["batches"] == [2] * (2 + 8 + 8 + 6 + 1)  # stopped, joint, again, resumed, broken
    for stage in (".stage1", ""):
        first, again = (read_manifest(found.folder / f"{name}{stage}").facts for name in ("joint", "again"))
        assert first["weights_sha256"] == again["weights_sha256"]


def test_dropout_and_lora_leave_equal_weights_on_all_ranks(found: Found) -> None:
    first, second = found.reports
    assert first["weights"] == second["weights"]


def test_all_ranks_stop_where_one_is_told_to_and_go_on_only_together(found: Found) -> None:
    for report in found.reports:
        assert report["stopped"] == [143, "Stopped after step 2 of 4 of stage pair."]
    with pytest.raises(UsageError, match="begun with 2 ranks and cannot go on exactly with 1"):
        train_plan(found.plan, found.folder / "stopped", **JOINT)


def test_two_ranks_go_on_to_the_weights_of_a_run_that_nobody_stopped(found: Found) -> None:
    for stage in (".stage1", ""):
        joint, resumed = (read_manifest(found.folder / f"{name}{stage}").facts for name in ("joint", "resumed"))
        assert joint["weights_sha256"] == resumed["weights_sha256"]


def test_a_gradient_that_is_no_number_on_one_rank_ends_all(found: Found) -> None:
    assert [report["broken"] for report in found.reports] == ["The gradient is nan at step 1."] * 2
    assert not (found.folder / "broken.stage1").exists()
