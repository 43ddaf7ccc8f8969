"""Audits: every kind of fault is planted and found first; from an audit to a comparison."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from auditing import OTHERS, POOL, TRAIN, Plant, copy_of, make_row, make_run, make_text, positive_of, write_rows

from pairdr.artefact import read_manifest, verify_artefact
from pairdr.audit import audit_labels, format_audit
from pairdr.cli import main
from pairdr.collection import open_collection
from pairdr.config import (
    EvaluateConfig,
    LexicalConfig,
    MineConfig,
    ModelConfig,
    RunConfig,
    SearchConfig,
    TeachConfig,
    TrainConfig,
)
from pairdr.errors import ArtefactError, UsageError
from pairdr.evidence import AuditSources, open_parts, open_sources, open_work
from pairdr.findings import (
    KINDS,
    read_audit,
    write_marks,
)
from pairdr.formats import read_qrels, write_trec_run
from pairdr.origin import read_origin
from pairdr.records import Run
from pairdr.search import rank_dense
from pairdr.store_config import AuditConfig

if TYPE_CHECKING:
    from conftest import WriteBeir


@pytest.fixture
def plant(tmp_path: Path, write_beir: WriteBeir) -> Plant:
    return Plant(tmp_path, write_beir)


# --- what is found ----------------------------------------------------------------------------------------------------


def test_where_nothing_is_wrong_nothing_is_found(plant: Plant) -> None:
    assert plant.audit() == []
    facts = verify_artefact(plant.folder / "audit").facts
    assert facts["looked at"] == {
        "near_copy": 60,
        "negative_above_positive": 60,
        "contradicted": 4,
        "unretrieved_positive": 6,
    }
    assert set(facts["found"].values()) == {0}
    assert format_audit(facts).splitlines()[1].split() == ["near_copy", "60", "0", "0.0%", "0"]


def test_a_near_copy_among_the_negatives_is_found_first(plant: Plant) -> None:
    plant.corpus |= {"copy": copy_of(2), "far": copy_of(2, 12), "near": copy_of(2, 3)}
    plant.candidates["t2"][1:1] = ["far", "near", "copy"]
    plant.negatives["t2"] += ["far", "near", "copy"]
    first, second = plant.audit()
    assert (first.kind, first.label, first.pair, first.other_id) == ("near_copy", "negative", ("t2", "copy"), "p2")
    assert first.jaccard == pytest.approx(15 / 17, abs=1e-5)
    assert (first.rank, first.student_rank, first.bm25_rank, first.model_rank) == (1, 4, 4, None)
    assert (first.query, first.passage, first.other) == ("question t2", copy_of(2), make_text(2))
    assert (second.rank, second.pair, second.jaccard) == (2, ("t2", "near"), pytest.approx(13 / 19, abs=1e-5))


def test_a_copy_that_mining_kept_out_is_found_as_unlabelled(plant: Plant) -> None:
    plant.corpus["copy"] = make_text(2)
    plant.corpus["mined"] = make_text(3)
    plant.candidates["t2"].append("copy")
    plant.negatives["t3"].append("mined")
    first, second = plant.audit()
    assert (first.kind, first.label, first.pair, first.jaccard) == ("near_copy", "negative", ("t3", "mined"), 1)
    assert (second.kind, second.label, second.pair, second.jaccard) == ("near_copy", "unlabelled", ("t2", "copy"), 1)


def test_a_negative_that_the_teacher_has_above_the_positive_is_found_first(plant: Plant) -> None:
    plant.scores |= {("t1", "p22"): 0.95, ("t4", "p23"): 1.9, ("t4", "p24"): 0.9}
    first, second = plant.audit()
    assert (first.kind, first.label, first.pair) == ("negative_above_positive", "negative", ("t4", "p23"))
    assert (first.teacher_score, first.other_id, first.other_teacher_score) == (1.9, "p4", 0.9)
    assert (first.model_rank, first.other_model_rank, first.student_rank) == (5, 1, 5)
    assert (second.pair, second.teacher_score) == (("t1", "p22"), 0.95)
    assert second.suggestion.startswith("May answer the question too")


def test_a_negative_above_a_sure_positive_comes_first_and_the_best_of_several(plant: Plant) -> None:
    plant.scores |= {("t1", "p1"): 0.3, ("t1", "p22"): 5.0, ("t4", "p22"): 0.91, ("t4", "p23"): 0.92}
    assert [found.pair for found in plant.audit()] == [("t4", "p23"), ("t4", "p22"), ("t1", "p22")]


def test_a_positive_below_most_of_its_negatives_is_doubted_itself(plant: Plant) -> None:
    plant.scores["t1", "p1"] = 0.0
    findings = plant.audit()
    assert {found.pair[0] for found in findings} == {"t1"}
    assert findings[0].suggestion == "10 of 10 negatives are above this positive: look at the positive too."


def test_a_near_copy_above_the_positive_is_one_row(plant: Plant) -> None:
    plant.corpus["copy"] = copy_of(2)
    plant.candidates["t2"].append("copy")
    plant.negatives["t2"].append("copy")
    plant.scores["t2", "copy"] = 0.95
    (found,) = plant.audit()
    assert (found.kind, found.teacher_score, found.other_teacher_score) == ("near_copy", 0.95, 0.9)


def test_a_negative_is_compared_with_the_best_of_several_positives(plant: Plant) -> None:
    plant.qrels["train"]["t1"]["p11"] = 2
    plant.scores |= {("t1", "p11"): 0.05, ("t1", "p20"): 0.5, ("t1", "p21"): 0.95}
    assert [(found.pair, found.other_id) for found in plant.audit() if found.kind == "negative_above_positive"] == [
        (("t1", "p21"), "p1")
    ]


def test_a_positive_that_no_system_finds_is_found(plant: Plant) -> None:
    for systems in (plant.candidates, plant.model):
        systems["t3"].remove("p3")
        systems["t5"].remove("p5")
    plant.model["t0"].remove("p0")  # the others find it
    plant.scores |= {("t3", "p3"): 0.2, ("t5", "p5"): 0.01, ("t5", "p20"): 0.011}
    by_kind = [found for found in plant.audit() if found.kind == "unretrieved_positive"]
    assert [(found.label, found.pair) for found in by_kind] == [("positive", ("t5", "p5")), ("positive", ("t3", "p3"))]
    assert by_kind[0].suggestion.startswith("None of bm25, student, model finds it")
    assert (by_kind[0].model_rank, by_kind[0].bm25_rank, by_kind[0].other_id) == (None, None, "p20")


def test_a_pseudo_positive_that_the_final_model_ranks_low_is_found(plant: Plant) -> None:
    plant.model["u1"] = [*OTHERS[4:], "p11", *OTHERS[:4]]  # seventh, above all of its negatives
    plant.model["u2"] = [OTHERS[0], "p12", *OTHERS[1:]]
    plant.model["u3"] = list(OTHERS)
    first, second = plant.audit()
    assert (first.kind, first.label, first.pair, first.model_rank) == ("contradicted", "pseudo", ("u3", "p13"), None)
    assert first.suggestion.startswith("The final model has it not among its first 100, below 4 of its 4 negatives")
    assert (second.pair, second.model_rank, second.other_id) == (("u2", "p12"), 2, "p20")
    assert (second.teacher_score, second.other_teacher_score) == (0.9, pytest.approx(0.1))
    assert second.suggestion.startswith("The final model has it at 2, below 1 of its 4 negatives")


def test_hidden_labels_measure_what_is_contradicted(plant: Plant) -> None:
    collection = plant.open(hide_labels=0.5)
    first, second, third = collection.hidden
    plant.pseudo = [make_row(q, "pseudo", positive_id=p) for q, p in [(first, "p15"), (second, positive_of(second))]]
    plant.pseudo += [make_row(third, "pseudo"), make_row("u0", "pseudo")]
    plant.model |= {first: list(OTHERS), second: list(OTHERS), "u0": list(OTHERS)}
    audit_labels(collection, plant.sources(collection), AuditConfig(), plant.folder / "audit")
    assert format_audit(read_manifest(plant.folder / "audit").facts).splitlines()[-2:] == [
        "by hidden labels 1 of 2 pseudo labels are right: contradicted",
        "by hidden labels 1 of 1 pseudo labels are right: others",
    ]


def test_kinds_take_turns(plant: Plant) -> None:
    plant.corpus |= {"copy0": copy_of(0), "copy1": copy_of(1, 2)}
    plant.candidates["t0"].append("copy0")
    plant.candidates["t1"].append("copy1")
    plant.scores |= {("t4", "p23"): 0.95, ("t5", "p23"): 0.95}
    plant.model["u3"] = list(OTHERS)
    assert [(found.rank, found.kind) for found in plant.audit()] == [
        (1, "near_copy"),
        (2, "negative_above_positive"),
        (3, "contradicted"),
        (4, "near_copy"),
        (5, "negative_above_positive"),
    ]


def test_what_was_judged_is_not_asked_about_again(plant: Plant) -> None:
    plant.corpus["copy"] = copy_of(2)
    plant.candidates["t2"].append("copy")
    plant.negatives["t2"].append("copy")
    plant.scores["t4", "p23"] = 0.95
    assert len(plant.audit()) == 2
    plant.qrels["train"]["t2"]["copy"] = plant.qrels["train"]["t4"]["p23"] = 0
    assert plant.audit() == []


def test_test_and_dev_queries_are_never_looked_at(plant: Plant) -> None:
    for query_id in ("d0", "e0"):
        plant.candidates[query_id] = plant.model[query_id] = list(OTHERS)
        plant.negatives[query_id] = list(OTHERS)
        plant.scores |= {(query_id, passage_id): 5.0 for passage_id in OTHERS}
    assert plant.audit() == []


# --- options ----------------------------------------------------------------------------------------------------------


def test_most_rows_of_a_kind_are_listed_and_all_are_counted(plant: Plant) -> None:
    plant.scores |= {(q, "p23"): 0.95 + at / 100 for at, q in enumerate(TRAIN)}
    assert [found.query_id for found in plant.audit(most=2)] == ["t5", "t4"]
    facts = read_manifest(plant.folder / "audit").facts
    assert (facts["found"]["negative_above_positive"], facts["listed"]["negative_above_positive"]) == (6, 2)


def test_one_query_has_not_all_the_rows(plant: Plant) -> None:
    plant.scores["t1", "p1"] = 0.0
    plant.scores["t4", "p23"] = 0.901
    assert [found.pair for found in plant.audit(most_per_query=2)] == [("t4", "p23"), ("t1", "p20"), ("t1", "p21")]


def test_of_many_queries_a_seeded_sample_is_looked_at(plant: Plant) -> None:
    plant.scores |= {(q, "p23"): 0.95 for q in TRAIN}
    plant.model |= {q: list(OTHERS) for q in POOL}
    samples = {seed: {found.query_id for found in plant.audit(most_queries=2, audit_seed=seed)} for seed in range(5)}
    assert all(len(sample) == 4 and len(sample & set(POOL)) == 2 for sample in samples.values())
    assert len({frozenset(sample) for sample in samples.values()}) > 1
    assert {found.query_id for found in plant.audit(most_queries=2, audit_seed=3)} == samples[3]
    assert read_manifest(plant.folder / "audit").facts["labelled queries"] == 2


def test_the_teacher_scores_no_deeper_than_it_is_told(plant: Plant) -> None:
    plant.scores["t4", "p23"] = 0.95  # the fifth candidate
    assert plant.audit(scored_depth=4) == []
    assert [found.pair for found in plant.audit(scored_depth=5)] == [("t4", "p23")]


def test_a_positive_below_the_depth_is_not_retrieved(plant: Plant) -> None:
    for systems in (plant.candidates, plant.model):
        systems["t3"] = [*OTHERS[:5], "p3"]
    assert plant.audit(audit_depth=6) == []
    (found,) = plant.audit(audit_depth=5)
    assert (found.kind, found.pair) == ("unretrieved_positive", ("t3", "p3"))


def test_agreement_is_a_matter_of_depth(plant: Plant) -> None:
    plant.model["u1"] = [*OTHERS[4:], "p11", *OTHERS[:4]]
    assert plant.audit(agree_depth=7) == []
    assert [found.pair for found in plant.audit(agree_depth=6)] == [("u1", "p11")]


def test_the_level_decides_what_is_a_near_copy(plant: Plant) -> None:
    plant.corpus["copy"] = copy_of(2, 3)
    plant.candidates["t2"].append("copy")
    assert [found.pair for found in plant.audit(copy_level=0.68)] == [("t2", "copy")]
    assert plant.audit(copy_level=0.69) == []


@pytest.mark.parametrize(
    "name", ["most", "most_per_query", "most_queries", "scored_depth", "audit_depth", "agree_depth"]
)
def test_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"Option {name} is 0; it must be at least 1"):
        AuditConfig(**{name: 0})


def test_every_option_stands_in_its_page() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    assert [name for name in AuditConfig().as_dict() if f"`{name}`" not in text] == []


# --- parts ------------------------------------------------------------------------------------------------------------


def test_examples_and_a_run_will_do(plant: Plant) -> None:
    plant.model["u3"] = list(OTHERS)
    plant.model["t3"].remove("p3")
    plant.corpus["copy"] = copy_of(2)
    collection = plant.open()
    rows = [make_row("t2", negative_ids=("copy",), negative_scores=(math.nan,)), make_row("t1", positive_score=0.095)]
    write_rows(plant.folder / "examples", collection, labelled=rows, pseudo=plant.pseudo)
    write_trec_run(plant.folder / "final.trec", make_run(plant.model), "final")
    sources = open_parts(plant.folder / "examples", collection, run=plant.folder / "final.trec")
    findings = audit_labels(collection, sources, AuditConfig(), plant.folder / "audit")
    assert [(found.kind, found.pair) for found in findings] == [
        ("near_copy", ("t2", "copy")),
        ("negative_above_positive", ("t1", "p20")),
        ("contradicted", ("u3", "p13")),
        ("unretrieved_positive", ("t3", "p3")),
    ]
    assert findings[1].other_teacher_score == pytest.approx(0.095)
    inputs = read_manifest(plant.folder / "audit").inputs
    assert set(inputs) == {"collection", "examples", "run"}
    assert inputs["examples"] == read_manifest(plant.folder / "examples").fingerprint


def test_examples_alone_say_what_could_not_be_looked_for(plant: Plant) -> None:
    collection = plant.open()
    examples = write_rows(plant.folder / "examples", collection)
    assert audit_labels(collection, AuditSources(examples), AuditConfig(), plant.folder / "audit") == []
    lines = format_audit(read_manifest(plant.folder / "audit").facts).splitlines()
    assert lines[1:] == [
        "near_copy                   there are neither candidates nor negatives",
        "negative_above_positive     no teacher scored a positive and its negatives",
        "contradicted                there is no pseudo label, or no run of the final model",
        "unretrieved_positive        there is no run of the training queries",
        "of 6 labelled and 0 pseudo-labelled queries",
    ]


def test_examples_and_candidates_of_other_data_are_refused(plant: Plant) -> None:
    collection = plant.open()
    sources = plant.sources(collection)
    mined = replace(sources.candidates, collection="other")
    with pytest.raises(ArtefactError, match="These candidates were mined from data other"):
        audit_labels(collection, replace(sources, candidates=mined), AuditConfig(), plant.folder / "audit")
    write_rows(plant.folder / "examples", plant.open(hide_labels=0.5))
    with pytest.raises(ArtefactError, match="These examples were made from data"):
        audit_labels(collection, sources, AuditConfig(), plant.folder / "audit")


def test_marks_are_not_overwritten(plant: Plant) -> None:
    plant.scores["t4", "p23"] = 0.95
    plant.audit()
    write_marks(plant.folder / "audit", {("t4", "p23"): "drop"})
    verify_artefact(plant.folder / "audit")
    with pytest.raises(UsageError, match=r"audit\.tsv: 1 marks stand here"):
        plant.audit()
    write_marks(plant.folder / "audit", {("t4", "p23"): ""})
    assert len(plant.audit()) == 1


def test_a_marked_copy_beside_the_table_is_not_deleted(plant: Plant) -> None:
    plant.audit()
    copy = plant.folder / "audit" / "audit-marked.tsv"
    copy.write_text("marks", encoding="utf-8")
    with pytest.raises(UsageError, match=r"This folder also holds audit-marked\.tsv, which would be lost with it"):
        plant.audit()
    assert copy.read_text(encoding="utf-8") == "marks"


# --- the whole way ----------------------------------------------------------------------------------------------------

CONFIG = RunConfig(
    mine=MineConfig(depth=40, relative_margin=None),
    teach=TeachConfig(rerank_depth=40),
    train=TrainConfig(max_steps=2, per_device_train_batch_size=8, eval_passages=20, eval_queries=5),
    evaluate=EvaluateConfig(resamples=200),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """Return the toy data with a copy, but for its last word, of the passages that answer six training questions."""
    folder = tmp_path_factory.mktemp("copied") / "data"
    shutil.copytree(toy, folder)
    lines = (toy / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = {next(iter(judged)) for judged in list(read_qrels(toy / "qrels" / "train.tsv").values())[:6]}
    with (folder / "corpus.jsonl").open("a", encoding="utf-8") as stream:
        for passage in map(json.loads, lines):
            if passage["_id"] in wanted:
                text = passage["text"].rsplit(" ", 1)[0] + " indeed"
                stream.write(json.dumps(passage | {"_id": f"{passage['_id']}-copy", "text": text}) + "\n")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_model: Path) -> Path:
    """Return the work folder of a run on these data."""
    from pairdr.pipeline import run_pipeline

    folder = tmp_path_factory.mktemp("audited") / "work"
    run_pipeline(data, folder, CONFIG, start=str(tiny_model))
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    assert not end.value.code, errors
    return output


@pytest.mark.slow
def test_from_an_audit_to_a_comparison(
    data: Path, work: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = tmp_path / "audit"
    output = call(capsys, "audit", work, "-o", audit, "--most", "500", "--most-per-query", "5")
    findings = read_audit(audit)
    counts = {line.split()[0]: line.split() for line in output.splitlines()}
    assert all(
        int(counts[kind][4]) == sum(found.kind == kind for found in findings)
        for kind in KINDS
        if len(counts[kind]) == 5
    )
    copies = [found for found in findings if found.kind == "near_copy"]
    assert {found.passage_id for found in copies} >= {f"{p}-copy" for p in {found.other_id for found in copies}}
    assert len(copies) >= 6
    assert {"collection", "examples", "candidates", "teacher", "model"} == set(read_manifest(audit).inputs)

    rule = {"near_copy": "relabel", "negative_above_positive": "accept", "contradicted": "drop"}
    write_marks(audit, {found.pair: rule[found.kind] for found in findings if found.kind in rule})
    new = tmp_path / "new"
    output = call(capsys, "apply-audit", audit, work, "-o", new)
    assert f"labels:   {len(copies)} made positive" in output

    collection, before = open_collection(new), open_collection(data)
    assert all(collection.qrels("train")[found.query_id][found.passage_id] == 1 for found in copies)
    assert collection.qrels("test") == before.qrels("test")
    call(capsys, "run", new, "-o", tmp_path / "again", "--config", work / "run.toml")
    options = [read_origin(folder).config for folder in (work, tmp_path / "again")]
    assert options[0] == options[1]
    assert "RR@10" in call(capsys, "compare", work, tmp_path / "again", "--resamples", "200")

    renewed = read_manifest(f"{new}.examples")
    assert renewed.files.keys() == read_manifest(work / "examples").files.keys()
    quick = ("--start", tiny_model, "--max-steps", "2", "--per-device-train-batch-size", "8", "--eval-passages", "20")
    call(capsys, "train", new, f"{new}.examples", "-o", tmp_path / "model", *quick)
    trained = ("--start", tmp_path / "model")
    call(capsys, "encode", new, "-o", tmp_path / "vectors", *trained)
    call(capsys, "search", tmp_path / "vectors", "--data", new, "-o", tmp_path / "run", "-k", "100", *trained)
    places = f"before={work / 'runs/test/pair'}", f"after={tmp_path / 'run'}"
    compared = call(capsys, "compare", *places, "--qrels", new / "qrels/test.tsv", "--resamples", "200")
    assert "after is " in compared or "between after and before could be shown" in compared


@pytest.mark.slow
def test_the_parts_of_a_work_folder_give_the_same_audit(data: Path, work: Path, tmp_path: Path) -> None:
    collection = open_collection(data)
    whole = audit_labels(collection, open_work(work, collection), AuditConfig(), tmp_path / "whole")
    encoder, store = open_work(work, collection).model or pytest.fail("no model")
    query_ids = [*collection.qrels("train"), *collection.pool]
    ranked = [(ids, hits) for ids, hits in rank_dense(map(collection.query, query_ids), encoder, store, SearchConfig())]
    run = Run.from_mapping({q: hits for ids, block in ranked for q, hits in zip(ids, block, strict=True)})
    write_trec_run(tmp_path / "final.trec", run, "final")
    parts = {"candidates": work / "candidates", "teacher": work / "teacher", "run": tmp_path / "final.trec"}
    options = {"model": ModelConfig(), "lexical": LexicalConfig(), "words": tmp_path / "bm25"}
    sources = open_sources(work / "examples", collection, parts, **options)
    found = audit_labels(collection, sources, AuditConfig(), tmp_path / "parts")
    assert len(found) > 6
    assert [(one.kind, one.pair, one.model_rank) for one in found] == [
        (one.kind, one.pair, one.model_rank) for one in whole
    ]
    with pytest.raises(UsageError, match=r"work: A work folder is audited as it is, without --run\. Name .*examples"):
        open_sources(work, collection, {"run": tmp_path / "final.trec"}, **options)


@pytest.mark.slow
def test_other_data_are_refused(toy: Path, work: Path, tmp_path: Path) -> None:
    collection = open_collection(toy)
    with pytest.raises(ArtefactError, match="These examples were made from data"):
        audit_labels(collection, open_work(work, collection), AuditConfig(), tmp_path / "audit")


@pytest.mark.slow
def test_commands_say_what_is_missing(
    work: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments), "-o", str(tmp_path / "out")])
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("pairdr: ")

    examples, options = work / "examples", f"{work}: A work folder has its own options of the data. Leave them out."
    assert fail("audit", examples) == f"{examples}: This does not say which data it is of. Name them as --data."
    assert fail("audit", work, "--hide-labels", "0.5") == options
    assert fail("apply-audit", tmp_path, work, "--hide-labels", "0.5") == options
    assert fail("apply-audit", tmp_path) == "This does not say which data it is of. Name them as --data."
    assert fail("audit", work, "--teacher", work / "teacher").startswith(f"{work}: A work folder is audited as it is")
    assert fail("apply-audit", tmp_path, "--data", data).startswith(f"{tmp_path / 'audit.tsv'}: There is no such file.")
