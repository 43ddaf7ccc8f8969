"""Rounds: mining, labelling and training again with the model of the round before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pairdr.artefact import read_manifest
from pairdr.config import EvaluateConfig, MineConfig, ModelConfig, RunConfig, TeachConfig, TrainConfig
from pairdr.errors import UsageError
from pairdr.pipeline import run_pipeline

pytestmark = pytest.mark.slow


def make_config(start: Path, rounds: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(start=str(start)),
        mine=MineConfig(depth=40, relative_margin=None),
        teach=TeachConfig(rerank_depth=40),
        train=TrainConfig(max_steps=2, per_device_train_batch_size=8, eval_passages=20, eval_queries=5),
        evaluate=EvaluateConfig(resamples=200),
        rounds=rounds,
    )


def test_a_second_round_mines_with_the_first_rounds_model_and_trains_from_the_start(
    toy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAIRDR_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    config = make_config(tiny_model, rounds=2)
    ran = run_pipeline(toy, work, config).steps_run
    first = ("mine.1", "teach.1", "label.1", "train pair.1", "encode pair.1")
    assert ran[4:14] == (*first, *(name.replace(".1", "") for name in first))

    def encoder_of(name: str) -> str:
        return str(read_manifest(work / "models" / name, "model").facts["encoder"])

    assert read_manifest(work / "candidates.1").inputs["encoder"] == encoder_of("start")
    assert read_manifest(work / "candidates").inputs["encoder"] == encoder_of("pair.1") != encoder_of("start")
    start = read_manifest(work / "models" / "start").fingerprint
    assert read_manifest(work / "models" / "pair.stage1").inputs["start"] == start
    assert not run_pipeline(toy, work, config).steps_run

    # With one round fewer the start mines again.
    again = run_pipeline(toy, work, replace(config, rounds=1)).steps_run
    assert again[:3] == ("mine", "teach", "label")


@pytest.mark.parametrize("rounds", [0, 1.5])
def test_rounds_are_whole_numbers_from_one(rounds: float) -> None:
    with pytest.raises(UsageError, match=r"Option rounds is .*; it must be"):
        RunConfig(rounds=rounds)  # type: ignore[arg-type]
