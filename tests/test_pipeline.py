"""The whole way: every step once, what depends on a change again, and a table that says how it came about."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pairdr import pipeline as module
from pairdr import steps as steps_module
from pairdr.artefact import publish, read_manifest, verify_artefact
from pairdr.collection import Collection, open_collection
from pairdr.config import (
    DataConfig,
    EncodeConfig,
    EvaluateConfig,
    LabelConfig,
    LexicalConfig,
    MineConfig,
    ModelConfig,
    RunConfig,
    SearchConfig,
    TeachConfig,
    TrainConfig,
    WarmConfig,
)
from pairdr.costs import ENCODE_SHARE, TRAIN_SHARE, CostModel, measure_costs
from pairdr.encode import encode_corpus
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, DataError, UsageError
from pairdr.lexical import index_words
from pairdr.measures import compute_p_value, measure_run
from pairdr.pipeline import RunResult, format_plan, plan_run, run_demo, run_pipeline
from pairdr.records import Run, Scored
from pairdr.search import rank_dense
from pairdr.searcher import Searcher
from pairdr.steps import list_arms
from pairdr.table import Table, compare_systems, read_table
from pairdr.teachers import DualEncoderTeacher
from pairdr.vectors import VectorStore
from pairdr.versions import delete_passages
from pairdr.work import Work

if TYPE_CHECKING:
    from conftest import Parts

pytestmark = pytest.mark.slow

MODELS = ("start", "labelled_only", "query_centric", "pair")
STEPS = (
    *("check", "start", "bm25", "encode start", "mine", "teach", "label"),
    *("train labelled_only", "encode labelled_only", "train query_centric", "encode query_centric"),
    *("train pair", "encode pair", "search test/bm25", "search test/start", "search test/labelled_only"),
    *("search test/query_centric", "search test/pair", "search dev/bm25", "search dev/pair", "fuse", "evaluate"),
)


def make_config(start: Path, **changes: Any) -> RunConfig:
    """Return options for a run of seconds; without a margin, since to an untrained model all texts are alike."""
    config = RunConfig(
        model=ModelConfig(start=str(start)),
        mine=MineConfig(depth=40, relative_margin=None),
        teach=TeachConfig(rerank_depth=40),
        train=TrainConfig(max_steps=2, per_device_train_batch_size=8, eval_passages=20, eval_queries=5),
        evaluate=EvaluateConfig(resamples=200),
    )
    return replace(config, **changes)


class Finished:
    """A finished work folder with all arms, and how it was made."""

    def __init__(self, result: RunResult, config: RunConfig, collection: Collection) -> None:
        self.result, self.config, self.collection = result, config, collection
        self.folder = result.work

    def copy(self, target: Path) -> Path:
        return Path(shutil.copytree(self.folder, target))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> Finished:
    """Return the toy data's work folder; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_config(tiny_model, arms=("all",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIRDR_CACHE", str(folder / "cache"))
        return Finished(run_pipeline(toy, folder / "work", config), config, open_collection(toy))


def write_changed(toy: Path, folder: Path, keep: Callable[[dict[str, Any]], bool]) -> Path:
    """Copy the toy data, keeping only some of its queries."""
    shutil.copytree(toy, folder)
    path = folder / "queries.jsonl"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if keep(json.loads(line))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_every_step_runs_once_and_in_order(finished: Finished) -> None:
    assert finished.result.steps_run == STEPS


def test_every_folder_is_an_artefact_that_verifies(finished: Finished) -> None:
    found = {path.parent.relative_to(finished.folder).as_posix() for path in finished.folder.rglob("manifest.json")}
    systems = ("bm25", *MODELS, "pair_bm25")
    assert found == {
        *("check", "bm25", "candidates", "teacher", "examples", "report"),
        *(f"models/{name}" for name in (*MODELS, "pair.stage1", "query_centric.stage1")),
        *(f"vectors/{name}" for name in MODELS),
        *(f"runs/test/{name}" for name in systems),
        *("runs/dev/bm25", "runs/dev/pair"),
    }
    for name in found:
        verify_artefact(finished.folder / name)


def test_the_table_says_how_the_labels_came_about(finished: Finished) -> None:
    facts = read_manifest(finished.folder / "examples").facts
    assert facts["pseudo"] > 0
    notes = "\n".join(finished.result.table.notes)
    assert f"Teacher: {facts['teacher']}; re-ranking for 48 dev queries it has RR@10" in notes
    assert f"Rows: 48 labelled, {facts['pseudo']} pseudo-labelled of a pool of 48." in notes
    assert "Expected from 48 dev queries: " in notes
    assert "PAIR + BM25: weights " in notes


def test_nothing_half_written_is_left(finished: Finished) -> None:
    assert [path.name for path in finished.folder.rglob("*.partial")] == []


def test_a_second_call_runs_nothing(finished: Finished, toy: Path) -> None:
    again = run_pipeline(toy, finished.folder, finished.config)
    assert again.steps_run == ()
    assert again.table == finished.result.table == read_table(finished.folder / "report")


def test_two_runs_make_the_same_models_and_the_same_table(finished: Finished, toy: Path, tmp_path: Path) -> None:
    config = replace(finished.config, arms=("pair",))
    other = run_pipeline(toy, tmp_path / "other", config)
    for name in ("models/pair", "vectors/pair", "runs/test/pair", "candidates", "examples"):
        assert read_manifest(other.work / name).fingerprint == read_manifest(finished.folder / name).fingerprint, name
    rows = {row.system: row for row in finished.result.table.rows}
    assert [row.system for row in other.table.rows] == ["bm25", "start", "pair", "pair_bm25"]
    assert all(row == rows[row.system] for row in other.table.rows)


def test_query_centric_takes_the_steps_of_pair_and_labelled_only_as_many_in_one_stage(finished: Finished) -> None:
    def last(name: str) -> int:
        return read_manifest(finished.folder / "models" / name).facts["summary"]["step"]

    assert last("pair.stage1") == last("pair") == last("query_centric.stage1") == last("query_centric") == 2
    assert last("labelled_only") == 4


def test_an_open_collection_and_options_by_name_will_do(finished: Finished, toy: Path) -> None:
    config = replace(finished.config, model=ModelConfig())
    again = run_pipeline(open_collection(toy), finished.folder, config, start=finished.config.model.start)
    assert again.steps_run == ()


# --- what runs again --------------------------------------------------------------------------------------------------


def test_another_alpha_trains_only_pair_again(finished: Finished, toy: Path, tmp_path: Path) -> None:
    work = finished.copy(tmp_path / "work")
    changed = replace(finished.config, train=replace(finished.config.train, alpha=0.4))
    assert run_pipeline(toy, work, changed).steps_run == (
        *("train pair", "encode pair", "search test/pair", "search dev/pair", "fuse", "evaluate"),
    )


def test_another_k_only_searches_again(finished: Finished, toy: Path, tmp_path: Path) -> None:
    work = finished.copy(tmp_path / "work")
    changed = replace(finished.config, search=SearchConfig(k=110))
    assert run_pipeline(toy, work, changed).steps_run == STEPS[STEPS.index("search test/bm25") :]
    assert read_manifest(work / "runs/test/pair").facts["hits"] == 24 * 110


def test_other_measures_only_make_another_table(finished: Finished, toy: Path, tmp_path: Path) -> None:
    changed = replace(finished.config, evaluate=EvaluateConfig(measures=("Success@1",), resamples=200))
    result = run_pipeline(toy, finished.copy(tmp_path / "work"), changed)
    assert result.steps_run == ("evaluate",)
    assert list(result.table.rows[0].means) == ["Success@1"]


def test_a_damaged_artefact_is_made_again(finished: Finished, toy: Path, tmp_path: Path) -> None:
    work = finished.copy(tmp_path / "work")
    (work / "runs/test/start/run.arrow").unlink()
    assert run_pipeline(toy, work, finished.config).steps_run == ("search test/start",)


def test_another_teacher_runs_all_that_follows_from_it(finished: Finished, toy: Path, tmp_path: Path) -> None:
    config = replace(finished.config, label=LabelConfig(negatives=2), arms=("pair",))
    plan = dict(line[:2] for line in plan_run(toy, finished.folder, config))
    assert [name for name, verdict in plan.items() if verdict == "runs"] == ["label"]
    assert [name for name, verdict in plan.items() if verdict == "follows"] == [
        *("train pair", "encode pair", "search test/pair", "search dev/pair", "fuse", "evaluate")
    ]


def test_a_changed_question_runs_the_steps_that_read_the_data(finished: Finished, toy: Path, tmp_path: Path) -> None:
    data = write_changed(toy, tmp_path / "data", lambda row: not row["_id"].startswith("u-a"))
    plan = dict(line[:2] for line in plan_run(data, finished.folder, finished.config))
    assert plan["start"] == "up to date"
    assert plan["mine"] != "up to date"


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_new_folder_predicts_time_and_memory(toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    lines = plan_run(toy, tmp_path / "work", make_config(tiny_model))
    assert {name: verdict for name, verdict, _ in lines} == {
        name: "runs" if name in ("check", "start", "bm25") else "follows"
        for name in STEPS
        if not name.endswith(("labelled_only", "query_centric"))
    }
    assert all(cost is not None and cost.seconds > 0 for _, _, cost in lines)
    text = format_plan(lines)
    assert "GiB, by arithmetic from this machine's speed" in text.splitlines()[-1]
    assert not (tmp_path / "work").exists()


def test_the_plan_of_a_finished_folder_is_nothing_to_do(finished: Finished, toy: Path) -> None:
    lines = plan_run(toy, finished.folder, finished.config)
    assert {verdict for _, verdict, _ in lines} == {"up to date"}
    assert format_plan(lines).splitlines()[-1] == "nothing to do"


def test_nothing_is_predicted_where_the_start_model_is_not_at_hand(toy: Path, tmp_path: Path) -> None:
    config = RunConfig(model=ModelConfig(start="nobody/no-such-model"), warm=WarmConfig(warm="never"))
    text = format_plan(plan_run(toy, tmp_path / "work", config))
    assert text.endswith("time and memory are not predicted: the start model is not on this machine yet")


def test_costs_grow_with_what_is_done(toy: Path, tiny_model: Path) -> None:
    costs = measure_costs(open_collection(toy), ModelConfig(start=str(tiny_model), passage_length=16, query_length=5))
    assert costs is not None
    assert (costs.hidden, costs.layers, costs.passage_tokens, costs.query_tokens) == (32, 2, 16.0, 5.0)
    assert costs.weights == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert costs.encode(200).seconds == pytest.approx(2 * costs.encode(100).seconds)
    assert costs.train(10, 32, 4).seconds > costs.train(10, 32, 1).seconds
    assert costs.train(10, 64, 1).memory > costs.train(10, 32, 1).memory
    assert costs.search(1000, 100).seconds > costs.search(100, 100).seconds


def test_training_costs_three_times_a_forward_pass() -> None:
    costs = CostModel(1e9, 1e6, 1e6, 32, 2, passage_tokens=100.0, query_tokens=0.0)
    forward, training = costs.encode(64 * 2).seconds, costs.train(1, 64, 1).seconds
    assert training == pytest.approx(3 * forward * ENCODE_SHARE / TRAIN_SHARE)


# --- interrupted ------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_was(finished: Finished, toy: Path, tmp_path: Path) -> None:
    work = finished.copy(tmp_path / "work")
    child = dedent("""
        import os, pickle, signal, sys
        from pathlib import Path
        from pairdr import loop, train
        from pairdr.pipeline import run_pipeline

        train_stage = train.run_stage

        def die_in_the_second_stage(*parts):
            if parts[3].name == "query_centric":
                loop.compute_loss = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)
            return train_stage(*parts)

        train.run_stage = die_in_the_second_stage
        run_pipeline(sys.argv[1], sys.argv[2], eval(sys.stdin.read()))
    """)
    config = replace(finished.config, train=replace(finished.config.train, seed=5), arms=("pair",))
    names = "from pathlib import Path\nfrom pairdr.config import *\nfrom pairdr.config import StageConfig\n"
    done = subprocess.run(
        [sys.executable, "-c", names + child, str(toy), str(work)],
        input=repr(config),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    first_stage = read_manifest(work / "models/pair.stage1")
    assert first_stage.options["seed"] == 5
    assert first_stage.fingerprint != read_manifest(finished.folder / "models/pair.stage1").fingerprint
    assert verify_artefact(work / "models/pair").options["seed"] == 13
    stamp = (work / "models/pair.stage1/manifest.json").stat().st_mtime_ns

    result = run_pipeline(toy, work, config)

    assert result.steps_run[:2] == ("train pair", "encode pair")
    assert not any(name.startswith(("mine", "teach", "label")) for name in result.steps_run)
    assert (work / "models/pair.stage1/manifest.json").stat().st_mtime_ns == stamp
    assert verify_artefact(work / "models/pair").options["seed"] == 5


def test_two_runs_do_not_share_a_folder(finished: Finished, toy: Path) -> None:
    work = Work(finished.folder, open_collection(toy), finished.config)
    with work.lock(), pytest.raises(UsageError, match="Another run is at work here"):
        run_pipeline(toy, finished.folder, finished.config)
    assert run_pipeline(toy, finished.folder, finished.config).steps_run == ()


def test_unsound_data_stop_the_run_at_the_check(toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    data = write_changed(toy, tmp_path / "data", lambda row: row["_id"] != "q-ashford-river")
    with pytest.raises(
        DataError, match=r"names 1 query ids that queries.jsonl does not have, such as 'q-ashford-river'"
    ):
        run_pipeline(data, tmp_path / "work", make_config(tiny_model))
    assert not (tmp_path / "work" / "models").exists()


def test_a_record_that_cannot_be_read_says_so(finished: Finished, toy: Path, tmp_path: Path) -> None:
    work = finished.copy(tmp_path / "work")
    (work / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"state.json: The record of finished steps cannot be read. Delete it"):
        run_pipeline(toy, work, finished.config)


# --- the ways a run can differ ----------------------------------------------------------------------------------------


def test_without_a_teacher_a_run_goes_on_with_the_labels_and_says_so(
    finished: Finished, toy: Path, tmp_path: Path
) -> None:
    config = replace(
        finished.config, teach=replace(finished.config.teach, fusion=False, gate_level=0.0), arms=("pair",)
    )
    result = run_pipeline(toy, finished.copy(tmp_path / "work"), config)
    assert result.table.notes[0] == (
        "No pseudo labels: No teacher beat the student. "
        "All stages ran on 48 labelled rows with margin-filtered negatives."
    )
    facts = read_manifest(result.work / "examples").facts
    assert (facts["teacher"], facts["pseudo"], facts["note"]) == (None, 0, "No teacher beat the student")
    assert [verdict["name"] for verdict in read_manifest(result.work / "teacher").facts["verdicts"]] == [
        "student",
        "bm25",
    ]


def test_a_teacher_that_cannot_be_calibrated_is_done_without(finished: Finished, toy: Path, tmp_path: Path) -> None:
    config = replace(finished.config, label=LabelConfig(s_pos=1e9), arms=("pair",))
    result = run_pipeline(toy, finished.copy(tmp_path / "work"), config)
    assert result.table.notes[0].startswith("No pseudo labels: 0 of 48 pool queries (0.0%) get a pseudo label")


def test_with_an_empty_pool_the_table_says_so(toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    data = write_changed(toy, tmp_path / "data", lambda row: row["_id"].startswith("q-"))
    result = run_pipeline(data, tmp_path / "work", make_config(tiny_model))
    assert "The pool is empty: stage 1 ran on the labelled queries with the teacher's labels." in result.table.notes
    assert read_manifest(result.work / "examples").facts["pseudo"] == 0


def test_hidden_labels_measure_the_pseudo_labels(toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, data=DataConfig(hide_labels=0.5))
    result = run_pipeline(toy, tmp_path / "work", config)
    hidden = read_manifest(result.work / "examples").facts["hidden"]
    assert 0 < hidden["right"] <= hidden["checked"] <= 30
    assert any(note.startswith(f"Measured on hidden labels: {hidden['right']} of") for note in result.table.notes)


def test_without_a_test_split_the_table_is_of_dev_and_says_so(toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(toy, tmp_path / "data"))
    (data / "qrels" / "test.tsv").unlink()
    result = run_pipeline(data, tmp_path / "work", make_config(tiny_model))
    assert (result.table.split, result.table.queries) == ("dev", 48)
    assert result.table.notes[-1].startswith("There is no test split: these are dev queries")
    assert not (result.work / "runs" / "test").exists()


def test_a_bare_encoder_is_warmed_before_it_mines(toy: Path, bare_model: Path, tmp_path: Path) -> None:
    config = make_config(bare_model, warm=WarmConfig(warm="auto", warm_steps=3))
    result = run_pipeline(toy, tmp_path / "work", config)
    assert result.steps_run.index("student") < result.steps_run.index("mine")
    student, start, pair = (
        read_manifest(result.work / "models" / name) for name in ("student", "start", "pair.stage1")
    )
    assert (student.facts["summary"]["step"], student.facts["is_retriever"]) == (3, True)
    assert read_manifest(result.work / "candidates").inputs["encoder"] == student.facts["encoder"]
    assert pair.inputs["start"] == start.fingerprint
    changed = replace(config, train=replace(config.train, alpha=0.4, max_steps=3))
    plan = dict(line[:2] for line in plan_run(toy, result.work, changed))
    assert plan["student"] == plan["mine"] == plan["label"] == "up to date"
    assert plan["train pair"] == "runs"


@pytest.mark.parametrize(("warm", "warms"), [("auto", False), ("never", False), ("always", True)])
def test_a_retriever_is_warmed_only_on_request(
    warm: Any, warms: bool, toy: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model, warm=WarmConfig(warm=warm))
    work = Work(tmp_path, open_collection(toy), config)
    assert ("student" in [step.name for step in steps_module.list_steps(work)]) == warms


def test_a_cut_start_is_compared_with_the_whole_model_which_may_teach(
    toy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_model)
    monkeypatch.setattr(DualEncoderTeacher, "_encode", lambda *_: pytest.fail("its vectors are in the work folder"))
    result = run_pipeline(toy, tmp_path / "work", replace(config, model=replace(config.model, layers=1)))
    assert [row.system for row in result.table.rows] == ["bm25", "start", "whole", "pair", "pair_bm25"]
    assert "whole model, untrained" in result.table.format()
    verdicts = read_manifest(result.work / "teacher").facts["verdicts"]
    assert "larger dual encoder" in [verdict["name"] for verdict in verdicts]
    layers = [
        json.loads((result.work / "models" / name / "config.json").read_text())["num_hidden_layers"]
        for name in ("start", "whole", "pair")
    ]
    assert layers == [1, 2, 1]


def test_measures_deeper_than_the_search_are_refused_before_anything_is_made(
    toy: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model, search=SearchConfig(k=30))
    with pytest.raises(UsageError, match=r"R@100 looks 100 deep, and search stops at 30\. Set --k 100\."):
        run_pipeline(toy, tmp_path / "work", config)
    assert not (tmp_path / "work").exists()


def test_unknown_arms_are_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"Unknown arm 'best'. There are: labelled_only, query_centric, pair, all"):
        list_arms(RunConfig(arms=("best",)))


def test_pair_is_always_trained_and_last() -> None:
    assert list_arms(RunConfig(arms=("labelled_only",))) == ["labelled_only", "pair"]
    with pytest.raises(UsageError, match="Unknown arm 'pair_stage1'"):
        list_arms(RunConfig(arms=("pair_stage1",)))
    assert list_arms(RunConfig(arms=("all",))) == ["labelled_only", "query_centric", "pair"]


def test_the_demo_builds_its_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pairdr.sources import python_docs

    built: list[Path] = []
    runs: list[tuple[Any, ...]] = []

    def build(folder: Path, **_: int) -> None:
        built.append(folder)
        with publish(folder, "data", options={}, inputs={}) as staging:
            (staging.path / "corpus.jsonl").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(python_docs, "build_python_docs", build)
    monkeypatch.setattr(module, "run_pipeline", lambda *parts: runs.append(parts))
    run_demo(tmp_path / "demo")
    run_demo(tmp_path / "demo", ("all",))
    assert built == [tmp_path / "demo" / "data"]
    assert [(data, work, config.arms) for data, work, config in runs] == [
        (tmp_path / "demo" / "data", tmp_path / "demo" / "work", ("labelled_only", "pair")),
        (tmp_path / "demo" / "data", tmp_path / "demo" / "work", ("all",)),
    ]
    assert runs[0][2].data.held_out == tmp_path / "demo" / "data" / python_docs.HELD_OUT
    (tmp_path / "demo" / "data" / "corpus.jsonl").write_text("[]", encoding="utf-8")
    run_demo(tmp_path / "demo")
    assert len(built) == 2


# --- what is held in memory at a time ---------------------------------------------------------------------------------


def test_search_takes_queries_and_passages_in_blocks(toy_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read = VectorStore.read_raw
    monkeypatch.setattr(VectorStore, "read_raw", lambda self, size: sizes.append(size) or read(self, size))
    queries = [toy_parts.collection.query(query_id) for query_id in toy_parts.collection.qrels("test")]
    config = SearchConfig(query_block=10, passage_block=50)
    assert [len(ids) for ids, _ in rank_dense(queries, toy_parts.encoder, toy_parts.store, config)] == [10, 10, 4]
    assert sizes == [50, 50, 50]


def test_encoding_takes_no_more_tokens_at_a_time_than_it_is_told(
    toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded: list[int] = []
    embed = DualEncoder.embed

    def watch(self: DualEncoder, tokens: Any, *rest: Any) -> Any:
        padded.append(len(tokens) * max(len(text.input_ids) for text in tokens))
        return embed(self, tokens, *rest)

    monkeypatch.setattr(DualEncoder, "embed", watch)
    encode_corpus(toy_parts.collection, toy_parts.encoder, EncodeConfig(tokens_per_batch=300), tmp_path / "vectors")
    assert len(padded) > 10
    assert max(padded) <= 300


# --- searching what was made ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_a_finished_folder_is_searched_in_every_mode(finished: Finished, mode: Any) -> None:
    searcher = Searcher.open(finished.folder)
    hits = searcher.search("which river runs through kendal", k=5, mode=mode)
    assert len(hits) == 5
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len({hit.passage_id for hit in hits}) == 5
    assert all(hit.passage == finished.collection.passage(hit.passage_id) for hit in hits)
    if mode != "dense":
        assert hits[0].passage_id == "kendal-river"


def test_search_gives_what_the_runs_gave(finished: Finished) -> None:
    searcher = Searcher.open(finished.folder)
    for system, mode in (("pair", "dense"), ("bm25", "bm25"), ("pair_bm25", "hybrid")):
        run = Run.open(finished.folder / "runs/test" / system / "run.arrow")
        query_id = next(iter(run))
        found = searcher.search(finished.collection.query(query_id).text, k=10, mode=mode)
        assert [hit.passage_id for hit in found] == [hit.passage_id for hit in run[query_id][:10]], system
        np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in run[query_id][:10]], atol=1e-5)


def test_the_work_file_names_what_won_on_dev(finished: Finished) -> None:
    facts = json.loads((finished.folder / "work.json").read_text(encoding="utf-8"))
    fused = read_manifest(finished.folder / "runs/test/pair_bm25").facts
    wins = fused["dev_RR@10"]["fused"] > fused["dev_RR@10"]["dense"]
    assert facts["mode"] == fused["mode"] == ("hybrid" if wins else "dense")
    assert facts["weights"] == fused["weights"]
    assert (facts["model"], facts["vectors"]) == ("models/pair", "vectors/pair")
    searcher = Searcher.open(finished.folder)
    question = "who founded the town of ryde"
    assert searcher.search(question) == searcher.search(question, 10, mode=facts["mode"])


def test_more_hits_than_passages_are_all_passages(finished: Finished) -> None:
    assert len(Searcher.open(finished.folder).search("river", k=1000, mode="dense")) == 120


@pytest.mark.parametrize(
    ("text", "k", "mode", "message"),
    [
        ("  ", 5, "auto", "The question is empty"),
        ("river", 0, "auto", "k is 0; it must be at least 1"),
        ("river", 5, "both", "mode is 'both'; it must be one of auto, dense, bm25, hybrid"),
    ],
)
def test_a_search_that_cannot_be_is_refused(finished: Finished, text: str, k: int, mode: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Searcher.open(finished.folder).search(text, k, mode=mode)


def test_an_unfinished_folder_is_not_searched(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no finished work folder\. Run pairdr run"):
        Searcher.open(tmp_path)


def test_words_of_other_passages_are_not_searched(finished: Finished, tmp_path: Path) -> None:
    work = finished.copy(tmp_path / "work")
    delete_passages(work / "vectors/pair", ["kendal-river"])
    with pytest.raises(ArtefactError, match="The passages have changed since their words were indexed"):
        Searcher.open(work)
    index_words(VectorStore(work / "vectors/pair"), LexicalConfig(), work / "bm25")
    found = Searcher.open(work).search("which river runs through kendal", k=120, mode="hybrid")
    assert "kendal-river" not in {hit.passage_id for hit in found}


def test_a_model_that_does_not_fit_the_vectors_is_not_searched_with(finished: Finished, tmp_path: Path) -> None:
    work = finished.copy(tmp_path / "work")
    shutil.rmtree(work / "vectors/pair")
    shutil.copytree(work / "vectors/start", work / "vectors/pair")
    with pytest.raises(ArtefactError, match="made by encoder"):
        Searcher.open(work)


def test_a_moved_work_folder_is_searched_and_run_again(finished: Finished, toy: Path, tmp_path: Path) -> None:
    moved = finished.copy(tmp_path / "elsewhere" / "moved")
    assert Searcher.open(moved).search("river", k=1)
    assert run_pipeline(toy, moved, finished.config).steps_run == ()


# --- the table --------------------------------------------------------------------------------------------------------

QRELS = {f"q{number}": {"right": 1} for number in range(12)}


def make_run(right: int) -> Run:
    """Return a run that has the right passage first for the first queries and second for the others."""
    return Run.from_mapping(
        {
            query_id: [
                Scored(p, -float(rank))
                for rank, p in enumerate(["right", "wrong"] if number < right else ["wrong", "right"])
            ]
            for number, query_id in enumerate(QRELS)
        }
    )


@pytest.fixture
def table(tmp_path: Path) -> Table:
    runs = {"pair_bm25": make_run(12), "pair": make_run(10), "start": make_run(2), "bm25": make_run(1)}
    return compare_systems(runs, QRELS, "test", EvaluateConfig(), ("A note.",), tmp_path / "report", inputs={})


def test_pair_is_tested_against_every_other_row_on_the_first_measure(table: Table) -> None:
    assert [row.system for row in table.rows] == ["bm25", "start", "pair", "pair_bm25"]
    rr = {right: measure_run(make_run(right), QRELS, ["RR@10"])["RR@10"] for right in (1, 2, 10, 12)}
    assert {row.system: row.p_pair for row in table.rows} == {
        "bm25": compute_p_value(rr[10], rr[1]),
        "start": compute_p_value(rr[10], rr[2]),
        "pair": None,
        "pair_bm25": compute_p_value(rr[10], rr[12]),
    }
    assert table.p_fused_bm25 == compute_p_value(rr[12], rr[1])
    assert table.rows[2].means["RR@10"] == pytest.approx((10 + 2 * 0.5) / 12)


def test_the_test_is_a_function_of_its_seed_and_resamples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"p{number}" for number in range(60)]
    qrels = {f"q{number}": {"p0": 1} for number in range(60)}

    def draw() -> Run:
        return Run.from_mapping(
            {q: [Scored(p, -float(rank)) for rank, p in enumerate(rng.permutation(names)[:9])] for q in qrels}
        )

    runs = {"pair": draw(), "bm25": draw()}

    def p_value(**options: Any) -> float | None:
        config = EvaluateConfig(**options)
        return compare_systems(runs, qrels, "test", config, (), tmp_path / "report", inputs={}).rows[0].p_pair

    assert p_value(test_seed=1) == p_value(test_seed=1)
    assert p_value(test_seed=1, resamples=100) != p_value(test_seed=1, resamples=1000)
    assert p_value(test_seed=1, resamples=100) != p_value(test_seed=4, resamples=100)


def test_the_table_reads_as_a_table(table: Table) -> None:
    lines = table.format().splitlines()
    assert lines[0].split() == ["RR@10", "nDCG@10", "R@100", "p", "(PAIR)"]
    assert lines[2].split()[:2] == ["BM25", f"{table.rows[0].means['RR@10']:.4f}"]
    assert lines[4].split() == ["PAIR", *(f"{value:.4f}" for value in table.rows[2].means.values())]
    assert len({len(line) for line in lines[2:6]}) == 1
    assert lines[7].startswith("12 test queries; p: two-sided paired randomisation test of RR@10")
    assert lines[8].startswith("PAIR + BM25 against BM25: p")
    assert lines[-1] == "A note."


def test_a_published_table_is_read_again_with_the_values_per_query(table: Table, tmp_path: Path) -> None:
    assert read_table(tmp_path / "report") == table
    assert (tmp_path / "report" / "table.txt").read_text(encoding="utf-8") == table.format() + "\n"
    per_query = json.loads((tmp_path / "report" / "pair.json").read_text(encoding="utf-8"))
    assert per_query["RR@10"]["q11"] == 0.5
