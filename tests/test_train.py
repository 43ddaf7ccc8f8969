"""Training: the stages, what is kept between them, what is trained again, and the student that mines."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from training import BOTH, PAIR, QUERY, make_config, make_row

from pairdr import losses, objective
from pairdr import train as module
from pairdr.artefact import publish, read_manifest, verify_artefact
from pairdr.collection import open_collection
from pairdr.config import DataConfig, LabelConfig, ModelConfig, StageConfig, TrainConfig, WarmConfig, list_stages
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, PairdrError, UsageError
from pairdr.formats import Examples, write_examples
from pairdr.label import label_examples
from pairdr.records import positives_of
from pairdr.teachers import LexicalTeacher
from pairdr.train import count_steps, is_trained, read_stage_examples, train_model
from pairdr.warm import warm_student

if TYPE_CHECKING:
    from conftest import Parts


@pytest.fixture(autouse=True)
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare every stage the measurement of the machine."""
    monkeypatch.setattr("pairdr.loop.measure_peak", lambda device, dtype: 1e12)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, toy_parts: Parts) -> Path:
    """Return the folder of examples that BM25 as the teacher makes of the toy data."""
    folder = tmp_path_factory.mktemp("labelled") / "examples"
    teacher = LexicalTeacher(toy_parts.index)
    label_examples(toy_parts.collection, toy_parts.candidates, teacher, LabelConfig(), folder)
    return folder


def train(
    parts: Parts, examples: Path, output: Path, *stages: StageConfig, device: str | None = None, **options: Any
) -> DualEncoder:
    config = make_config(**options)
    stages = stages or (PAIR, QUERY)
    return train_model(parts.collection, examples, parts.start, stages, config, output, device=device)


def read_rows(examples: Path) -> Examples:
    return read_stage_examples(examples, PAIR, make_config())


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]


# --- stages and what is kept ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_with_alpha_zero_pair_is_the_query_centric_model(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    config = make_config(alpha=0.0)
    for arm in ("pair", "query_centric"):
        stages = list_stages(arm, config)
        train_model(toy_parts.collection, examples, toy_parts.start, stages, config, tmp_path / arm)
    pair, query_centric = (
        read_manifest(tmp_path / arm, "model").facts["weights_sha256"] for arm in ("pair", "query_centric")
    )
    assert pair == query_centric
    assert pair != toy_parts.encoder.hash_weights()


@pytest.mark.slow
def test_the_second_stage_never_computes_the_passage_centric_loss(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    compute = losses.passage_centric_loss

    def watch(*parts: Any, **options: Any) -> Any:
        calls.append("L_P")
        return compute(*parts, **options)

    monkeypatch.setattr(losses, "passage_centric_loss", watch)
    train(toy_parts, examples, tmp_path / "pair", max_steps=3)
    assert len(calls) == 3
    first, second = read_log(tmp_path / "pair.stage1")[1:], read_log(tmp_path / "pair")[1:]
    assert all("passage_centric" in line for line in first)
    assert not any("passage_centric" in line for line in second)


@pytest.mark.slow
def test_the_alarm_of_both_stages_compares_with_the_start_model(
    toy_parts: Parts,
    examples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = iter([0.5, 0.3, 0.3, 0.4])  # before and after each stage of one step
    monkeypatch.setattr("pairdr.loop._measure_dev", lambda *_: next(measured))
    train(toy_parts, examples, tmp_path / "model", max_steps=1)
    said = capsys.readouterr().err
    assert "pair, step 1: dev_RR@10 0.3000 is below the start model's 0.5000" in said
    assert "query_centric, step 1: dev_RR@10 0.4000 is below the start model's 0.5000" in said


@pytest.mark.slow
def test_stage_1_alone_is_the_model_between_the_stages(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    config = make_config()
    for arm in ("pair", "pair_stage1"):
        stages = list_stages(arm, config)
        train_model(toy_parts.collection, examples, toy_parts.start, stages, config, tmp_path / arm)
    assert not (tmp_path / "pair_stage1.stage1").exists()
    between, alone = (read_manifest(tmp_path / name, "model") for name in ("pair.stage1", "pair_stage1"))
    assert between.fingerprint == alone.fingerprint


def test_stages_and_data_of_a_start_that_was_trained_come_first(
    toy_parts: Parts, toy: Path, examples: Path, tmp_path: Path
) -> None:
    first = train(toy_parts, examples, tmp_path / "first", PAIR, max_steps=1)
    first.save_copy(tmp_path / "start", ModelConfig(start=str(tmp_path / "first")))
    stages, config = (QUERY,), make_config(max_steps=1)
    train_model(toy_parts.collection, examples, tmp_path / "start", stages, config, tmp_path / "second")
    for name, wanted in (("first", ["pair"]), ("start", ["pair"]), ("second", ["pair", "query_centric"])):
        manifest = read_manifest(tmp_path / name, "model")
        assert [stage["name"] for stage in manifest.facts["stages"]] == wanted
        assert manifest.options["trained_on"] == [toy.name]


def test_data_under_another_name_train_nothing_anew(
    toy_parts: Parts, toy: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(toy_parts, examples, tmp_path / "model", QUERY, max_steps=1)
    renamed = open_collection(shutil.copytree(toy, tmp_path / "renamed"))
    monkeypatch.setattr(module, "run_stage", pytest.fail)
    train_model(renamed, examples, toy_parts.start, (QUERY,), make_config(max_steps=1), tmp_path / "model")


def test_a_model_of_another_number_of_ranks_is_refused_and_named(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(toy_parts, examples, tmp_path / "model", QUERY, max_steps=1)
    manifest = read_manifest(tmp_path / "model")
    assert is_trained(tmp_path / "model", manifest.options, manifest.inputs)
    monkeypatch.setattr("pairdr.checkpoint.count_ranks", lambda: 4)
    options = manifest.options | {"ranks": 4}
    with pytest.raises(UsageError, match=r"begun with 1 ranks and cannot go on exactly with 4\. Start 1 ranks, or del"):
        is_trained(tmp_path / "model", options, manifest.inputs)
    assert not is_trained(tmp_path / "model", options | {"alpha": 0.7}, manifest.inputs)


def test_the_model_between_the_stages_stands_beside(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    model = train(toy_parts, examples, tmp_path / "pair")
    assert {path.name for path in tmp_path.iterdir()} == {"pair", "pair.stage1"}
    for name in ("pair", "pair.stage1"):
        verify_artefact(tmp_path / name)
    first, second = (read_manifest(tmp_path / name, "model") for name in ("pair.stage1", "pair"))
    assert first.facts["weights_sha256"] != second.facts["weights_sha256"] == model.hash_weights()
    assert [stage["name"] for stage in second.facts["stages"]] == ["pair", "query_centric"]
    assert first.inputs["start"] == read_manifest(toy_parts.start).fingerprint
    assert second.inputs["start"] == first.fingerprint
    assert (first.facts["examples"], first.facts["is_retriever"]) == (len(read_rows(examples)), True)


def stop_at(stage: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Interrupt training at a stage; return the list of stages that are trained, which grows."""
    trained: list[str] = []
    train_stage = module.run_stage

    def watch(collection: Any, rows: Any, encoder: Any, current: StageConfig, *rest: Any) -> Any:
        if current.name == stage:
            raise KeyboardInterrupt
        trained.append(current.name)
        return train_stage(collection, rows, encoder, current, *rest)

    monkeypatch.setattr(module, "run_stage", watch)
    return trained


@pytest.mark.slow
def test_an_interrupted_call_goes_on_at_the_stage_under_way(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        trained = stop_at("query_centric", patch)
        with pytest.raises(KeyboardInterrupt):
            train(toy_parts, examples, tmp_path / "pair")
        assert trained == ["pair"]
        assert not (tmp_path / "pair").exists()
    with monkeypatch.context() as patch:
        trained = stop_at("none", patch)
        resumed = train(toy_parts, examples, tmp_path / "pair")
        assert trained == ["query_centric"]
    straight = train(toy_parts, examples, tmp_path / "straight")
    assert resumed.hash_weights() == straight.hash_weights()


@pytest.mark.slow
def test_only_a_changed_option_trains_again(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = stop_at("none", monkeypatch)
    train(toy_parts, examples, tmp_path / "pair")
    train(toy_parts, examples, tmp_path / "pair")
    assert trained == ["pair", "query_centric"]
    train(toy_parts, examples, tmp_path / "pair", seed=99)
    assert trained == ["pair", "query_centric"] * 2


@pytest.mark.slow
def test_options_of_what_is_not_computed_train_nothing_again(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = stop_at("none", monkeypatch)
    train(toy_parts, examples, tmp_path / "model", QUERY)
    train(toy_parts, examples, tmp_path / "model", QUERY, alpha=0.7, passage_negatives="hard_all")
    train(toy_parts, examples, tmp_path / "model", QUERY, distillation_weight=0.5, distillation_temperature=2.0)
    train(toy_parts, examples, tmp_path / "model", QUERY, logging_steps=1)
    assert trained == ["query_centric"]
    train(toy_parts, examples, tmp_path / "model", PAIR, passage_negatives="hard_all")
    assert trained == ["query_centric", "pair"]
    train(toy_parts, examples, tmp_path / "model", PAIR, passage_negatives="hard_all", symmetric=True)
    assert trained == ["query_centric", "pair", "pair"]


def test_an_argument_for_the_steps_overrides_the_options(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    config = make_config(max_steps=None, num_train_epochs=5.0)
    train_model(toy_parts.collection, examples, toy_parts.start, (QUERY,), config, tmp_path / "model", max_steps=1)
    assert [line["step"] for line in read_log(tmp_path / "model")] == [0, 1]


@pytest.mark.slow
def test_the_number_of_epochs_decides_how_long_it_trains(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    rows = len(read_rows(examples))
    train(toy_parts, examples, tmp_path / "model", QUERY, max_steps=None, num_train_epochs=0.5)
    assert read_log(tmp_path / "model")[-1]["step"] == math.ceil(rows / 2 / 8)


def test_epochs_count_every_row_and_max_steps_overrides_them() -> None:
    config = TrainConfig(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert count_steps(96, config) == 6
    assert count_steps(97, config) == 7
    assert count_steps(96, replace(config, num_train_epochs=2.5)) == 15
    assert count_steps(3, config) == 1
    assert count_steps(100, replace(config, num_train_epochs=2.5, max_steps=4)) == 4


def test_the_trained_model_opens_in_plain_sentence_transformers(
    toy_parts: Parts, examples: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    model = train(toy_parts, examples, tmp_path / "model", QUERY)
    plain = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    passage = toy_parts.collection.passage_at(0)
    np.testing.assert_allclose(plain.encode_document([passage.joined]), model.encode_passages([passage]), atol=1e-6)
    np.testing.assert_allclose(plain.encode_query(["which river"]), model.encode_queries(["which river"]), atol=1e-6)


@pytest.mark.slow
def test_a_model_with_merged_low_rank_additions_is_a_plain_one(
    toy_parts: Parts, examples: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    model = train(toy_parts, examples, tmp_path / "model", PAIR, QUERY, lora_rank=2, learning_rate=1e-2)
    verify_artefact(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir() if "adapter" in path.name} == set()
    plain = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    passages = [toy_parts.collection.passage_at(row) for row in range(3)]
    found = plain.encode_document([passage.joined for passage in passages])
    np.testing.assert_allclose(found, model.encode_passages(passages), atol=1e-6)
    assert np.abs(found - toy_parts.encoder.encode_passages(passages)).max() > 1e-3


def test_the_same_training_gives_an_artefact_of_the_same_content(
    toy_parts: Parts, examples: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        train(toy_parts, examples, tmp_path / name, QUERY)
    first, second = (read_manifest(tmp_path / name, "model") for name in ("a", "b"))
    assert first.facts == second.facts
    assert first.fingerprint == second.fingerprint


def test_a_loss_that_is_not_finite_stops_and_leaves_the_earlier_model(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train(toy_parts, examples, tmp_path / "model", QUERY).hash_weights()
    monkeypatch.setattr(
        objective, "pair_loss", lambda *parts, **options: losses.PairParts(*[parts[0].sum() * math.nan] * 2, None)
    )
    with pytest.raises(PairdrError, match=r"The gradient is nan at step 1\. Lower learning_rate"):
        train(toy_parts, examples, tmp_path / "model", QUERY, seed=99)
    verify_artefact(tmp_path / "model")
    assert DualEncoder.open(tmp_path / "model").hash_weights() == before


def test_half_precision_with_a_scaled_loss_needs_a_gpu(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fp16 needs a GPU\. Use bf16, or neither"):
        train(toy_parts, examples, tmp_path / "model", QUERY, device="cpu", fp16=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_tracker_of_accelerate_gets_the_log_of_both_stages_in_steps_that_rise(
    toy_parts: Parts, examples: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(toy_parts, examples, tmp_path / "model", PAIR, QUERY, report_to="tensorboard", max_steps=3, logging_steps=1)
    (events,) = (tmp_path / "model.trackers").rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events))
    written.Reload()
    steps = [[event.step for event in written.Scalars(f"stage {stage}/loss")] for stage in (1, 2)]
    assert steps == [[1, 2, 3], [4, 5, 6]]
    verify_artefact(tmp_path / "model")


# --- the model that mines ---------------------------------------------------------------------------------------------


@pytest.fixture
def warm(toy_parts: Parts, tmp_path: Path) -> Iterator[tuple[DualEncoder, Path]]:
    folder = tmp_path / "student"
    config = make_config(max_steps=None)
    model = warm_student(
        toy_parts.collection, toy_parts.index, toy_parts.start, WarmConfig(warm_steps=3), config, folder
    )
    yield model, folder


def test_a_student_is_warmed_for_its_own_number_of_steps(warm: tuple[DualEncoder, Path], toy_parts: Parts) -> None:
    model, folder = warm
    assert read_log(folder)[-1]["step"] == 3
    assert model.is_retriever
    assert model.hash_weights() != toy_parts.encoder.hash_weights()


def test_its_negatives_are_bm25s_and_never_known_positives(warm: tuple[DualEncoder, Path], toy_parts: Parts) -> None:
    rows = list(Examples.open(Path(f"{warm[1]}.examples") / "plain.arrow"))
    train_labels = toy_parts.collection.qrels("train")
    assert len(rows) == len(train_labels)
    for row in rows:
        found, _ = toy_parts.index.search(toy_parts.collection.query(row.query_id).text, 5)
        assert 0 < len(row.negative_ids) <= 4
        assert set(row.negative_ids) <= set(toy_parts.collection.passages.ids_of(found))
        assert not set(row.negative_ids) & set(positives_of(train_labels, row.query_id))


# --- the examples of a stage ------------------------------------------------------------------------------------------


def test_examples_of_another_folder_train_another_model(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    inputs = read_manifest(examples).inputs
    with publish(tmp_path / "fewer", "examples", options={}, inputs=inputs) as staging:
        write_examples(staging.path / "labelled.arrow", list(read_rows(examples))[:20])
        write_examples(staging.path / "pseudo.arrow", [])
    whole = train(toy_parts, examples, tmp_path / "a", QUERY)
    fewer = train(toy_parts, tmp_path / "fewer", tmp_path / "b", QUERY)
    assert whole.hash_weights() != fewer.hash_weights()
    assert read_manifest(tmp_path / "b", "model").facts["examples"] == 20


def test_examples_of_other_data_are_refused(toy_parts: Parts, toy: Path, examples: Path, tmp_path: Path) -> None:
    parts = toy_parts._replace(collection=open_collection(toy, DataConfig(hide_labels=0.5)))
    with pytest.raises(ArtefactError, match=r"These examples were made from data \w{12}, this is \w{12}\."):
        train(parts, examples, tmp_path / "model")


def test_rows_without_negatives_are_left_out_where_their_own_are_all_there_is(tmp_path: Path) -> None:
    rows = [make_row("q1", "a", "b"), make_row("q2", "c")]
    for name in BOTH:
        write_examples(tmp_path / f"{name}.arrow", rows)
    counts = {
        (variant, stage.name): len(read_stage_examples(tmp_path, stage, make_config(passage_negatives=variant)))
        for variant in ("own", "official")
        for stage in (PAIR, QUERY)
    }
    assert counts == {
        ("own", "pair"): 2,
        ("own", "query_centric"): 4,
        ("official", "pair"): 4,
        ("official", "query_centric"): 4,
    }


ENDPOINT = ("--rdzv-endpoint", "localhost:0")


@pytest.mark.slow
def test_torchrun_trains_as_one_process_with_the_joint_batch(
    toy: Path, tiny_model: Path, examples: Path, tmp_path: Path
) -> None:
    options = (
        "--max-steps",
        "3",
        "--dropout",
        "0",
        "--learning-rate",
        "1e-3",
        "--seed",
        "13",
        "--arm",
        "query_centric",
    )
    sample = ("--eval-passages", "20", "--eval-queries", "5", "--query-length", "32", "--passage-length", "128")
    ranks = (
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    )
    models = []
    for name, command, batch in (("one", ("pairdr",), "8"), ("two", (*ranks, "-m", "--", "pairdr"), "4")):
        place = tmp_path / name / "model"
        done = subprocess.run(
            [
                *(sys.executable, "-m", *command, "train", str(toy), str(examples), "-o", str(place)),
                *("--start", str(tiny_model), "--device", "cpu", "--per-device-train-batch-size", batch),
                *(*options, *sample),
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        models.append(DualEncoder.open(place, device="cpu").model)
    for (title, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-3, msg=title)
    assert read_manifest(tmp_path / "two" / "model").options["ranks"] == 2
