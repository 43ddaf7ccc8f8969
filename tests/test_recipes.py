"""The recipes, and every command of docs/recipes.md, on small files of the same form.

Only what cannot be small is changed: the start model, steps and batches, half precision (it needs a GPU), and the
thresholds of a cross-encoder, since one of a few steps is worth nothing and BM25 takes its place.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_lines

from pairdr.answers import MEASURES
from pairdr.artefact import read_manifest
from pairdr.cli import main
from pairdr.collection import open_collection
from pairdr.config import RunConfig, change_options
from pairdr.evaluate import read_evaluation
from pairdr.formats import Examples, read_run
from pairdr.measures import mean_measures
from pairdr.records import Passage, positives_of
from pairdr.table import read_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
PAPER = ("msmarco", "nq")
SMALL = (
    *("--warm-steps", "4", "--cross-encoder-steps", "4", "--cross-encoder-batch", "8"),
    *("--per-device-train-batch-size", "8", "--max-steps", "20", "--logging-steps", "1"),
    *("--no-fp16", "--s-pos", "1.5", "--resamples", "200", "--device", "cpu"),
)
CONTRACT = {"pooling": "cls", "similarity": "dot", "title": "segment", "towers": "tied"}
CONTRACT |= {"query_length": 32, "passage_length": 128, "dimensions": 32}
SIZES = {"per_device_train_batch_size", "num_train_epochs", "max_steps", "fp16"}
"""Options of training that the tests make small."""


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0, arguments


def read_recipe(name: str) -> RunConfig:
    content = tomllib.loads((ROOT / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))
    arms = tuple(content.pop("arms", ("pair",)))
    config = change_options(RunConfig(), content)
    return RunConfig(**vars(config) | {"arms": arms})


def read_log(model: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (model / "training.jsonl").read_text(encoding="utf-8").splitlines()[1:]]


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=PAPER)
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy: Path, bare_model: Path) -> Path:
    """Return the work folder of a recipe; it has the recipe's name."""
    if read_recipe(request.param).train.optimizer == "lamb":
        pytest.importorskip("pytorch_optimizer")
    folder = tmp_path_factory.mktemp("recipe") / request.param
    run("run", toy, "-o", folder, "--config", ROOT / "recipes" / f"{request.param}.toml", "--start", bare_model, *SMALL)
    return folder


@pytest.mark.slow
def test_a_recipe_of_the_paper_makes_a_model_of_its_form(work: Path) -> None:
    manifest = read_manifest(work / "models" / "pair")
    assert {name: manifest.facts["contract"][name] for name in CONTRACT} == CONTRACT
    assert manifest.facts["temperature"] == 1
    recipe = read_recipe(work.name).train.as_dict()
    assert {name: manifest.options[name] for name in manifest.options if name in recipe and name not in SIZES} == {
        name: recipe[name] for name in manifest.options if name in recipe and name not in {*SIZES, "alpha"}
    } | {"alpha": 0}


@pytest.mark.slow
def test_a_recipe_of_the_paper_trains_both_relations_first_and_the_query_centric_one_then(work: Path) -> None:
    first, second = (read_log(work / "models" / name) for name in ("pair.stage1", "pair"))
    stages = read_manifest(work / "models" / "pair").facts["stages"]
    assert [(stage["name"], stage["alpha"]) for stage in stages] == [("pair", 0.1), ("query_centric", 0)]
    assert all("passage_centric" in line for line in first)
    assert not any("passage_centric" in line for line in second)
    facts = read_manifest(work / "examples").facts
    assert (facts["labelled"], 1 < facts["pseudo"] < 48) == (48, True)
    most = read_recipe(work.name).label.negatives
    assert {len(row.negative_ids) for row in Examples.open(work / "examples" / "pseudo.arrow")} == {most}


@pytest.mark.slow
def test_the_rate_is_highest_where_the_page_says(work: Path) -> None:
    rates = [line["learning_rate"] for line in read_log(work / "models" / "pair")]
    assert max(rates) == pytest.approx(2.7e-5)
    assert rates.index(max(rates)) == 2  # of 20 steps, a tenth is warm-up
    assert rates[-1] == pytest.approx(3e-5 / 20)


@pytest.mark.slow
def test_a_bare_encoder_begins_above_the_logarithm_of_the_candidates(work: Path) -> None:
    first = read_log(work / "models" / "pair.stage1")[0]
    assert math.log(2 * 8) < first["query_centric"] < 3 * math.log(2 * 8)


@pytest.mark.slow
def test_the_table_has_the_recipes_measures(work: Path) -> None:
    table = read_table(work / "report")
    assert [row.system for row in table.rows] == ["bm25", "start", "pair", "pair_bm25"]
    assert all(tuple(row.means) == read_recipe(work.name).evaluate.measures for row in table.rows)


@pytest.mark.slow
def test_the_small_recipe_walks_the_whole_way(tmp_path: Path, toy: Path, tiny_model: Path) -> None:
    config = ("--config", ROOT / "recipes" / "small-cpu.toml", "--start", tiny_model, "--layers", "1")
    few = ("--max-steps", "2", "--cross-encoder-steps", "2", "--resamples", "200", "--device", "cpu")
    run("run", toy, "-o", tmp_path / "work", *config, *few, "--per-device-train-batch-size", "8")
    systems = ["bm25", "start", "whole", "labelled_only", "query_centric", "pair", "pair_bm25"]
    assert [row.system for row in read_table(tmp_path / "work" / "report").rows] == systems


# --- the official training files --------------------------------------------------------------------------------------


def read_commands(title: str) -> Iterator[str]:
    """Yield the commands of a section of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


COMMANDS = {
    "msmarco": [*read_commands("MS MARCO, from the official training files")],
    "nq": [*read_commands("Natural Questions, from the official training files")],
}


def write_pair(passage: Passage) -> str:
    return f"{passage.title or '-'}\t{passage.text}"


def write_official_files(folder: Path, toy: Path, prefix: str, corpus: str, negatives: int) -> None:
    """Write what the authors give: training lines of both stages, the collection, dev queries with two-column qrels.

    Lines of stage 1 ask the questions of the pool, those of stage 2 the labelled ones.
    """
    data = open_collection(toy)
    passages = [data.passage_at(row) for row in range(len(data.passages))]
    places = {passage.passage_id: row for row, passage in enumerate(passages)}
    labels = {q: positives_of(data.qrels("train"), q)[0] for q in data.qrels("train")}
    asked = {"pretrain": {f"u-{p}": p for p in labels.values()}, "finetune": labels}
    for stage, rows in asked.items():
        lines = []
        for query_id, positive in rows.items():
            others = [passages[(places[positive] + step) % len(passages)] for step in range(1, 1 + negatives)]
            start = f"{data.query(query_id).text}\t{write_pair(data.passage(positive))}"
            lines += [f"{start}\t{write_pair(other)}\t0" for other in others]
        write_lines(folder / f"{prefix}_{stage}.tsv", lines)
    place = folder / corpus
    place.mkdir()
    write_lines(place / "para.txt", (f"{row}\t{p.text}" for row, p in enumerate(passages)))
    write_lines(place / "para.title.txt", (f"{row}\t{p.title or '-'}" for row, p in enumerate(passages)))
    tests = list(data.qrels("test"))
    write_lines(place / "dev.query.txt", (f"{row}\t{data.query(q).text}" for row, q in enumerate(tests)))
    positives = [places[positives_of(data.qrels("test"), q)[0]] for q in tests]
    write_lines(place / "qrels.dev.tsv", (f"{row}\t{positive}" for row, positive in enumerate(positives)))
    answers = (" ".join(passages[at].text.split()[2:5]) for at in positives)
    write_lines(
        folder / "nq-test.qa.csv", (f"{data.query(q).text}\t{[a]!r}" for q, a in zip(tests, answers, strict=True))
    )


def shrink(words: list[str], model: Path) -> list[str]:
    """Return a command as it is on small files."""
    small = {"nghuyong/ernie-2.0-base-en": str(model), "512": "4"}
    words = [small.get(word, word) for word in words if word not in ("--fp16",)]
    if "train" in words:
        words[words.index("--num-train-epochs")] = "--max-steps"
        words[words.index("--max-steps") + 1] = "2"
        words += ["--logging-steps", "1", "--eval-passages", "20", "--device", "cpu"]
    if words[0] == "torchrun":
        ranks = ["--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        words = [sys.executable, "-m", "torch.distributed.run", *ranks, *words[words.index("-m") :]]
    return words


@pytest.fixture(scope="module", params=PAPER)
def official(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, toy: Path, bare_model: Path
) -> Path:
    """Return the folder in which the commands of a section ran; it has the recipe's name."""
    if request.param == "msmarco":
        pytest.importorskip("pytorch_optimizer")
    folder = tmp_path_factory.mktemp("official") / request.param
    folder.mkdir()
    prefix = {"msmarco": "marco", "nq": "nq"}[request.param]
    write_official_files(folder, toy, prefix, prefix, 4 if request.param == "msmarco" else 1)
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS[request.param]:
            words = shrink(shlex.split(command), bare_model)
            if words[0] == "pairdr":
                run(*words[1:])
            else:
                done = subprocess.run(
                    command if ">" in words else words,
                    shell=">" in words,
                    env=os.environ | paths,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stderr
    return folder


def test_each_section_goes_from_files_to_numbers() -> None:
    wanted = ["import-data"] * 3 + ["train"] * 2 + ["encode", "search", "evaluate"]
    for commands in COMMANDS.values():
        found = [re.search(r"pairdr ([\w-]+)", command) for command in commands]
        assert [match[1] for match in found if match] == wanted


@pytest.mark.slow
def test_official_files_are_read_as_the_page_says(official: Path) -> None:
    name = {"msmarco": "MARCO", "nq": "NQ"}[official.name]
    negatives = {"msmarco": 4, "nq": 1}[official.name]
    for number in (1, 2):
        examples = Examples.open(official / f"{name}-{number}.examples" / "plain.arrow")
        assert {len(row.negative_ids) for row in examples} == {negatives}
        assert len(examples) == 48 - 4  # of queries without a dev split, a tenth becomes one
    collection = open_collection(official / name)
    assert len(collection.passages) == 120
    assert collection.passage("7").title.startswith("The ")


@pytest.mark.slow
def test_commands_of_the_page_train_as_the_recipe_says(official: Path) -> None:
    name = {"msmarco": "MARCO", "nq": "NQ"}[official.name]
    recipe = read_recipe(official.name).train.as_dict()
    other = {*SIZES, "alpha", "grad_cache", "gradient_checkpointing", "eval_passages"}
    for place, alpha in ((f"{name}-STAGE1", 0.1), (f"{name}-PAIR", 0)):
        manifest = read_manifest(official / place, "model")
        assert {key: manifest.facts["contract"][key] for key in CONTRACT} == CONTRACT
        assert manifest.options["alpha"] == alpha
        kept = {key: value for key, value in manifest.options.items() if key in recipe and key not in other}
        assert kept == {key: recipe[key] for key in kept}
    stages = [read_manifest(official / place).inputs for place in (f"{name}-STAGE1", f"{name}-PAIR")]
    first, second = (read_manifest(official / f"{name}-{n}.examples").fingerprint for n in (1, 2))
    assert [stage["examples"] for stage in stages] == [first, second]
    steps = [stage["name"] for stage in read_manifest(official / f"{name}-PAIR").facts["stages"]]
    assert steps == ["pair", "query_centric"]
    ranks = read_manifest(official / f"{name}-PAIR").options["ranks"]
    assert ranks == {"msmarco": 2, "nq": 1}[official.name]


@pytest.mark.slow
def test_commands_of_the_page_end_in_numbers(official: Path) -> None:
    name, k = {"msmarco": ("MARCO", 120), "nq": ("NQ", 100)}[official.name]  # of 120 passages there are no 1,000
    ranked = read_run(official / f"{name}-RUN" / "run.arrow")
    assert (len(ranked), ranked.count_hits()) == (24, 24 * k)
    values = read_evaluation(official / f"{name}-RESULT")
    assert all(len(by_query) == 24 for by_query in values.values())
    means = mean_measures(values)
    if official.name == "nq":
        assert tuple(means) == MEASURES
        assert 0 < means["answer_recall@5"] <= means["answer_recall@100"] <= 1
    else:
        assert 0 < means["RR@10"] <= means["Success@50"] <= means["Success@1000"] == 1


@pytest.mark.slow
def test_the_card_of_the_last_model_lists_both_stages_and_both_data_sets(official: Path) -> None:
    name, ranks = {"msmarco": ("MARCO", 2), "nq": ("NQ", 1)}[official.name]
    card = (official / f"{name}-PAIR" / "README.md").read_text(encoding="utf-8")
    assert "It was trained the PAIR way" in card
    assert f"1. pair: (1 - 0.1) L_Q + 0.1 L_P, on the pseudo and labelled rows, in `{name}-STAGE1`" in card
    assert "2. query-centric: L_Q, on the plain rows" in card
    assert f"`{name}-2`: " in card
    assert f"The stages of `{name}-STAGE1` were trained on `{name}-1`; its own card says more of them." in card
    command = f"pairdr train {name}-2 {name}-2.examples -o {name}-PAIR --arm labelled_only --start {name}-STAGE1 "
    assert f"```sh\n{'torchrun --nproc_per_node 2 -m -- ' if ranks == 2 else ''}{command}" in card
    assert str(official) not in card
    first = (official / f"{name}-STAGE1" / "README.md").read_text(encoding="utf-8")
    assert "in the first of the two stages of PAIR" in first
    assert "2. query-centric" not in first


def test_copies_of_test_questions_are_kept_out_of_an_import_as_the_page_says(
    tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_official_files(tmp_path, toy, "nq", "nq", 1)
    asked = (tmp_path / "nq-test.qa.csv").read_text(encoding="utf-8").split("\t")[0]
    with (tmp_path / "nq_pretrain.tsv").open("a", encoding="utf-8") as stream:
        stream.write(f"{asked.upper()}?\tA title\tA text.\t-\tAnother text.\t0\n")
    monkeypatch.chdir(tmp_path)
    run("import-data", "nq_pretrain.tsv", "--from", "rocketqa", "-o", "alone", "--dev-queries", 1)
    for command in read_commands("Copies of test questions in the training files"):
        if command.startswith("pairdr"):
            run(*shlex.split(command)[1:], "--dev-queries", 1)
        else:
            subprocess.run(command, shell=True, check=True)
    counts = [len(Examples.open(tmp_path / f"{name}.examples" / "plain.arrow")) for name in ("alone", "NQ-1")]
    assert counts == [48, 47]  # a question is set aside as dev


# --- the cost ---------------------------------------------------------------------------------------------------------


def print_costs(*arguments: str) -> str:
    script = [sys.executable, str(ROOT / "benchmarks" / "recipe_cost.py"), *arguments]
    return subprocess.run(
        script, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ).stdout


def test_the_page_shows_what_the_arithmetic_prints() -> None:
    assert f"```\n{print_costs().rstrip()}\n```" in PAGE.read_text(encoding="utf-8")


def test_the_whole_way_trains_on_all_rows_in_both_stages() -> None:
    lines = print_costs(str(ROOT / "recipes" / "msmarco.toml")).splitlines()
    twice = [line.split()[-3] for line in lines if line.startswith("  train, ") and "cross" not in line]
    labelled, million, again, million_again = (float(tokens) for tokens in twice)
    assert (labelled, million) == (again, million_again)
    assert labelled + million == pytest.approx(1.73e10, rel=0.01)


def test_a_recipe_of_data_of_unknown_size_is_refused_in_one_sentence() -> None:
    path = ROOT / "recipes" / "beir.toml"
    script = [sys.executable, str(ROOT / "benchmarks" / "recipe_cost.py"), str(path)]
    done = subprocess.run(
        script, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        f"{path}: how large its data are is not known here, only those of msmarco.toml and nq.toml"
    )


def test_arms_in_a_recipe_are_read(tmp_path: Path) -> None:
    recipe = (ROOT / "recipes" / "nq.toml").read_text(encoding="utf-8")
    (tmp_path / "nq.toml").write_text(f'arms = ["all"]\n{recipe}', encoding="utf-8")
    assert print_costs(str(tmp_path / "nq.toml")) == print_costs(str(ROOT / "recipes" / "nq.toml"))


def test_hours_are_tokens_by_speed() -> None:
    printed = print_costs("--train", "1e5", "--encode", "5e4", "--search", "1e12")
    lines = {line.split("  ")[1]: line.split()[-3:] for line in printed.splitlines() if line.startswith("  ")}
    tokens = 58_812 * 10 * (32 + 2 * 128)  # lines of the last recipe, Natural Questions
    assert lines["train, labelled queries"] == [f"{tokens:.2e}", *[f"{tokens / 1e5 / 3600:.1f}"] * 2]
    assert lines["encode the corpus once"][1] == f"{21_015_324 * 128 / 5e4 / 3600:.1f}"
    assert lines["search for the measured queries"][-1] == f"{3610 * 21_015_324 * 1536 / 1e12 / 3600:.1f}"
