"""A run once more: its options and data are kept as they were, and what differs is said."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairdr.artefact import read_manifest
from pairdr.cli import main
from pairdr.collection import open_collection
from pairdr.config import DataConfig, EvaluateConfig, MineConfig, ModelConfig, RunConfig, TeachConfig, TrainConfig
from pairdr.errors import ArtefactError, DataError, UsageError
from pairdr.options import Options
from pairdr.origin import describe_environment, format_options, measure_memory, parse_options, read_origin
from pairdr.pipeline import run_pipeline
from pairdr.reproduce import compare_runs, find_work, reproduce_run
from pairdr.table import read_table

SECTIONS = {name: type(value) for name, value in vars(RunConfig()).items() if isinstance(value, Options)}


# --- options as TOML --------------------------------------------------------------------------------------------------


def draw_value(spec: Any, hint: Any) -> st.SearchStrategy[Any]:
    """Return values that an option may have."""
    kinds = get_args(hint) or (hint,)
    texts = st.text(st.characters(codec="utf-8"), min_size=1)
    if get_origin(hint) is Literal:
        return st.sampled_from(kinds)
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    choices: list[st.SearchStrategy[Any]] = [st.none()] if type(None) in kinds and spec.default is None else []
    if Path in kinds:
        paths = texts.map(Path)
        return st.lists(paths, max_size=2).map(tuple) if get_origin(hint) is tuple else st.one_of(*choices, paths)
    if kinds == (int, ...):
        return st.lists(st.integers(1, 9), max_size=3).map(tuple)
    if kinds == (str, ...):
        return st.lists(texts, max_size=3).map(tuple)
    if bool in kinds:
        return st.booleans()
    if float in kinds:
        if type(None) in kinds:
            choices.append(st.none())
        return st.one_of(*choices, st.floats(low, high, allow_nan=False, allow_infinity=False))
    if int in kinds:
        return st.one_of(*choices, st.integers(int(low or 0), high))
    return st.one_of(*choices, texts)


@st.composite
def draw_config(draw: st.DrawFn) -> RunConfig:
    changes: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        hints = get_type_hints(kind)
        chosen = draw(st.sets(st.sampled_from([spec.name for spec in fields(kind)]), max_size=3))
        values = {
            spec.name: draw(draw_value(spec, hints[spec.name])) for spec in fields(kind) if spec.name in sorted(chosen)
        }
        try:
            changes[name] = kind(**values)
        except UsageError:  # options that exclude each other
            changes[name] = kind()
    arms = draw(st.lists(st.sampled_from(["pair", "all", "labelled_only"]), min_size=1).map(tuple))
    return RunConfig(**changes, arms=arms, rounds=draw(st.integers(1, 3)))


@given(draw_config())
def test_options_are_read_as_they_were_written(config: RunConfig) -> None:
    assert parse_options(format_options(config)) == config
    assert parse_options(format_options(config, changed_only=True)) == config


def test_only_what_was_changed_may_be_written() -> None:
    config = replace(RunConfig(), mine=MineConfig(relative_margin=None), rounds=2)
    assert format_options(config, changed_only=True) == 'rounds = 2\n\n[mine]\nrelative_margin = "none"\n'
    assert format_options(RunConfig(), changed_only=True) == "\n"


def test_none_stays_a_text_where_texts_are_meant() -> None:
    config = parse_options('[lexical]\nlanguage = "none"\n[train]\ndistillation = "none"\n[data]\nlicence = "none"\n')
    assert (config.lexical.language, config.train.distillation, config.data.licence) == ("none", "none", "none")


def test_the_environment_has_versions_and_the_machine() -> None:
    import torch

    found = describe_environment()
    assert found["torch"] == torch.__version__
    assert {"pairdr", "python", "transformers", "numpy", "cpu", "cores", "system"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


def test_memory_is_the_most_that_was_held() -> None:
    before = measure_memory()["memory"]
    held = bytearray(before + 2**26)
    held[::4096] = b"x" * len(held[::4096])
    assert measure_memory()["memory"] >= before + 2**26
    del held
    assert measure_memory()["memory"] >= before + 2**26


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """Return the toy data with a file of further questions and one of held-out passages beside them."""
    folder = Path(shutil.copytree(toy, tmp_path_factory.mktemp("reproduce") / "data"))
    (folder / "more.txt").write_text("which river is the longest\nwhat is the oldest bridge\n", encoding="utf-8")
    (folder / "held_out.txt").write_text("kendal-river\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def work(data: Path, tiny_model: Path) -> Path:
    """Return a finished work folder; tests that change it take a copy."""
    config = RunConfig(
        data=DataConfig(unlabelled=(data / "more.txt",), held_out=data / "held_out.txt", hide_labels=0.25),
        model=ModelConfig(start=str(tiny_model)),
        mine=MineConfig(depth=40, relative_margin=None),
        teach=TeachConfig(rerank_depth=40),
        train=TrainConfig(max_steps=2, per_device_train_batch_size=8, eval_passages=20, eval_queries=5),
        evaluate=EvaluateConfig(resamples=200),
    )
    return run_pipeline(data, data.parent / "work", config).work


@pytest.fixture
def copy(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work, tmp_path / "copy"))


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def change_state(work: Path, step: str, **values: Any) -> None:
    path = work / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state[step] |= values
    path.write_text(json.dumps(state), encoding="utf-8")


def add_question(folder: Path) -> None:
    with (folder / "queries.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"_id": "new", "text": "which town is the smallest"}\n')


@pytest.mark.slow
def test_a_run_keeps_its_options_and_its_data(work: Path, data: Path, tiny_model: Path) -> None:
    origin = read_origin(work)
    assert (origin.data, origin.collection) == (data, read_manifest(work / "report").inputs["collection"])
    assert origin.passages == read_manifest(work / "bm25").inputs["passages"]
    assert origin.config.data.held_out == data / "held_out.txt"
    assert (origin.config.train.max_steps, origin.config.mine.relative_margin) == (2, None)
    assert open_collection(origin.data, origin.config.data).fingerprint == origin.collection


@pytest.mark.slow
def test_paths_are_kept_as_absolute_ones(
    data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Path
) -> None:
    monkeypatch.chdir(data.parent)
    copy = Path(shutil.copytree(work, tmp_path / "copy"))
    config = read_origin(work).config
    options = replace(config.data, held_out=Path("data/held_out.txt"), unlabelled=(Path("data/more.txt"),))
    assert run_pipeline("data", copy, replace(config, data=options)).steps_run == ()
    assert read_origin(copy) == read_origin(work)


@pytest.mark.slow
def test_a_run_of_its_own_file_of_options_has_nothing_to_do(
    copy: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    assert call("run", data, "-o", copy, "--config", copy / "run.toml") == 0
    assert "Nothing to do: everything is up to date." in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "report", "models/pair/manifest.json"])
def test_a_run_is_found_from_what_lies_in_it(work: Path, name: str) -> None:
    assert find_work(work / name).resolve() == work.resolve()


@pytest.mark.slow
def test_the_same_run_again_makes_the_same(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("reproduce", work / "report" / "manifest.json", "-o", tmp_path / "new") == 0
    output = capsys.readouterr().out
    state = json.loads((work / "state.json").read_text(encoding="utf-8"))
    assert (
        output.splitlines()[-1]
        == f"Reproduced: every step made the same. {len(state)} of {len(state)} steps are equal."
    )
    assert "different" not in output
    assert "versions and machine are those of then" in output
    lines = {line[:28].strip(): line.split() for line in output.splitlines()}
    assert all(lines[name][-2:] == ["equal", record["fingerprint"][:12]] for name, record in state.items())
    means = next(row.means for row in read_table(work / "report").rows if row.system == "pair")
    pair = next(line for line in output.splitlines() if line.startswith("PAIR  "))
    assert pair.split()[1:] == [f"{value:.4f}" for value in means.values()]
    assert call("reproduce", work, "-o", tmp_path / "new", "--json") == 0  # it goes on where it was: nothing is left
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["versions"], found["data"][0]) == (True, {}, read_origin(work).collection)
    assert found["measures"]["pair"]["RR@10"] == [means["RR@10"]] * 2
    assert [step["name"] for step in found["steps"]] == list(state)


@pytest.mark.slow
def test_what_differs_is_said(copy: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_state(copy, "train pair", fingerprint="0" * 64)
    change_state(copy, "mine", environment=describe_environment() | {"torch": "0.1", "gpu": "a large one"})
    table = read_table(work / "report")
    path = copy / "report" / "table.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rows"][-2]["means"]["RR@10"] = 0.125
    size = path.stat().st_size
    path.write_text(json.dumps(content, indent=1).ljust(size)[:size], encoding="utf-8")
    found = compare_runs(copy, work, table, ("a", "a"))
    assert not found.is_equal
    assert [step.name for step in found.steps if not step.is_equal] == ["train pair"]
    torch = describe_environment()["torch"]
    assert found.versions == {"torch": (f"{torch}, 0.1", torch), "gpu": ("a large one", "none")}
    text = found.format()
    assert "train pair                  different   000000000000 -> " in text
    assert f"torch                       {torch}, 0.1 -> {torch}" in text
    assert f"0.1250 -> {table.rows[-2].means['RR@10']:.4f}" in text
    assert text.splitlines()[-1] == f"Not the same. {len(found.steps) - 1} of {len(found.steps)} steps are equal."


@pytest.mark.slow
def test_changed_data_are_refused_unless_they_are_asked_for(
    copy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(data, tmp_path / "other"))
    add_question(other)
    path = copy / "run.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(facts | {"data": str(other)}), encoding="utf-8")
    with pytest.raises(DataError, match="The data have changed since: queries 170 -> 171, pool 62 -> 63"):
        reproduce_run(copy, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert call("reproduce", copy, "-o", tmp_path / "new", "--data", other) == 1
    output = capsys.readouterr().out
    assert output.splitlines()[0].startswith(f"data                        different   {facts['collection'][:12]} -> ")
    assert "bm25                        equal " in output
    assert "mine                        different " in output
    assert output.splitlines()[-1].startswith("Not the same. ")


@pytest.mark.slow
def test_data_that_changed_in_no_count_are_refused_too(copy: Path, data: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(data, tmp_path / "other"))
    facts = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    (copy / "run.json").write_text(json.dumps(facts | {"data": str(other)}), encoding="utf-8")
    queries = other / "queries.jsonl"
    whole = queries.read_text(encoding="utf-8")
    queries.write_text(whole.replace("which river runs through", "which water runs through"), encoding="utf-8")
    with pytest.raises(DataError, match="questions or labels, in equal numbers"):
        reproduce_run(copy, tmp_path / "new")
    corpus = other / "corpus.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8").replace("miles", "leagues"), encoding="utf-8")
    with pytest.raises(DataError, match="the corpus, in equal numbers"):
        reproduce_run(copy, tmp_path / "new")


@pytest.mark.slow
def test_data_that_moved_bring_their_files_along(copy: Path, data: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    old = str(tmp_path / "gone")
    for name in ("run.toml", "run.json"):
        path = copy / name
        path.write_text(path.read_text(encoding="utf-8").replace(str(data), old), encoding="utf-8")
    with pytest.raises(DataError, match=r"gone: The data of this run are no longer here\. Name them as --data\."):
        reproduce_run(copy, tmp_path / "new")
    found = reproduce_run(copy, tmp_path / "new", moved)
    assert found.is_equal
    assert read_origin(tmp_path / "new").config.data.held_out == moved / "held_out.txt"


@pytest.mark.slow
def test_a_run_that_was_changed_on_the_way_is_reproduced(copy: Path, work: Path, data: Path, tmp_path: Path) -> None:
    config = read_origin(work).config
    more = replace(config, train=replace(config.train, max_steps=3))
    run_pipeline(data, copy, more)
    run_pipeline(data, copy, config)  # vectors of the third version, with the content of the first
    assert read_manifest(copy / "vectors" / "pair").facts["version"] == 3
    found = reproduce_run(copy, tmp_path / "new")
    assert found.is_equal, found.format()


@pytest.mark.slow
def test_vectors_of_then_that_are_gone_are_not_compared(copy: Path, work: Path) -> None:
    change_state(copy, "encode pair", fingerprint="0" * 64)
    (copy / "vectors" / "pair" / "manifest.json").unlink()
    found = compare_runs(copy, work, read_table(work / "report"), ("a", "a"))
    assert [(step.name, step.difference) for step in found.steps if not step.is_equal] == [("encode pair", "")]


@pytest.mark.slow
def test_vectors_that_came_about_bit_by_bit_are_said_to_have(work: Path, data: Path, tmp_path: Path) -> None:
    grown, moved = Path(shutil.copytree(data, tmp_path / "grown")), tmp_path / "work"
    config, corpus = read_origin(work).config, grown / "corpus.jsonl"
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    corpus.write_text("".join(lines[:-1]), encoding="utf-8")
    orphan = json.loads(lines[-1])["_id"]
    for path in (grown / "qrels").iterdir():
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(row for row in rows if f"\t{orphan}\t" not in row), encoding="utf-8")
    run_pipeline(grown, moved, config)
    corpus.write_text("".join([*lines[-1:], *lines[:-1]]), encoding="utf-8")
    run_pipeline(grown, moved, config)
    found = reproduce_run(moved, tmp_path / "new")
    assert not found.is_equal
    (start,) = [step for step in found.steps if step.name == "encode start"]
    words = re.fullmatch(
        rf"of the same {len(lines)} passages, (with equal numbers|at most (\S+) apart); "
        "then they came about in 2 versions",
        start.difference,
    )
    assert words is not None and float(words[2] or 0) < 1e-5
    assert f"{'':28}{start.difference}" in found.format().splitlines()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"there is no run\.toml\. Name the folder of a pairdr run that has ended"):
        reproduce_run(tmp_path, tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "again"])
def test_a_run_is_not_made_over_itself(work: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"This is the run that is to be made again\. Choose another --output"):
        reproduce_run(work, work / name)


@pytest.mark.slow
def test_another_run_is_not_replaced(copy: Path, work: Path, data: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"Another run stands here, which this one would replace\."):
        reproduce_run(work, copy)  # a copy of it is none that was made again
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before
    new = tmp_path / "new"
    reproduce_run(work, new)
    config = read_origin(work).config
    run_pipeline(data, copy, replace(config, train=replace(config.train, max_steps=1)))
    with pytest.raises(UsageError, match="Another run stands here"):
        reproduce_run(copy, new)
    run_pipeline(data, new, replace(config, mine=replace(config.mine, depth=30)))
    with pytest.raises(UsageError, match="Another run stands here"):
        reproduce_run(work, new)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.toml", "[train]\nalfa = 3\n", r"run\.toml: Unknown option alfa in \[train\]"),
        ("run.toml", "[train", "What the run came from cannot be read"),
        ("run.json", "{}", "What the run came from cannot be read"),
        ("run.json", "[1", "What the run came from cannot be read"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(
    copy: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (copy / name).write_text(content, encoding="utf-8")
    with pytest.raises((ArtefactError, UsageError), match=message):
        reproduce_run(copy, tmp_path / "new")


@pytest.mark.slow
def test_half_a_record_is_none(copy: Path, tmp_path: Path) -> None:
    (copy / "run.json").unlink()
    with pytest.raises(ArtefactError, match=r"run\.json is missing: no run has ended here"):
        reproduce_run(copy, tmp_path / "new")
