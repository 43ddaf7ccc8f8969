"""The command line: every command by itself, and one clear sentence for whatever is wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from pairdr import audit_commands, commands, exchange_commands, pipeline, report_commands, store_commands
from pairdr.artefact import read_manifest
from pairdr.cli import main
from pairdr.collection import open_collection
from pairdr.config import ModelConfig, Options, RunConfig
from pairdr.formats import Examples, read_run
from pairdr.lexical import LexicalIndex
from pairdr.records import Passage, Query
from pairdr.table import read_table
from pairdr.teachers import load_teacher, read_recipe

COMMANDS = (
    *("run", "demo", "check", "mine", "teach", "label", "train", "encode", "search", "evaluate", "verify"),
    *("upsert", "delete", "compact", "export", "index", "index-words", "compare"),
    *("audit", "apply-audit"),
    *("import-data", "export-data"),
    *("report", "reproduce", "push"),
)
ROOT = Path(__file__).resolve().parents[1]
CORPUS = {"p1": "The Lune is a river.", "p2": "A market on Monday.", "p3": "An old bridge."}
QUERIES = {"t1": "which river", "t2": "which market", "d1": "which bridge", "e1": "what is old"}
QRELS = {"train": {"t1": {"p1": 1}, "t2": {"p2": 1}}, "dev": {"d1": {"p3": 1}}, "test": {"e1": {"p3": 1}}}
QUICK = (
    *("--max-steps", "2", "--per-device-train-batch-size", "8", "--eval-passages", "20", "--eval-queries", "5"),
    *("--depth", "40", "--relative-margin", "0", "--rerank-depth", "40", "--resamples", "200"),
)

Call = Callable[..., tuple[int, str, str]]
Fail = Callable[..., str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Return `call(*arguments)`: the exit code, standard output and standard error of a command."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        output, errors = capsys.readouterr()
        return int(end.value.code or 0), output, errors

    return run_command


@pytest.fixture
def fail(call: Call) -> Fail:
    """Return `fail(exit code, *arguments)`: the one sentence with which a command ends."""

    def run_command(code: int, *arguments: object) -> str:
        found, output, errors = call(*arguments)
        assert found == code, output + errors
        assert "Traceback" not in errors
        *progress, sentence = errors.splitlines()
        assert sentence.startswith("pairdr: ")
        assert not any(line.startswith("pairdr: ") for line in progress)
        return sentence.removeprefix("pairdr: ")

    return run_command


@pytest.fixture
def folder(tmp_path: Path, write_beir: Callable[..., Path]) -> Path:
    """Return a small sound data set."""
    return write_beir(tmp_path / "data", CORPUS, QUERIES, QRELS)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> Path:
    """Return the work folder of `pairdr run` on the toy data."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setenv("PAIRDR_CACHE", str(folder / "cache"))
        with pytest.raises(SystemExit) as end:
            main(["run", str(toy), "-o", str(folder / "work"), "--start", str(tiny_model), *QUICK])
    assert not end.value.code
    (folder / "output.txt").write_text(output.getvalue(), encoding="utf-8")
    return folder / "work"


def add_line(path: Path, line: str | bytes) -> int:
    """Add a line to a file and return its number."""
    content = path.read_bytes() + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    path.write_bytes(content)
    return content.count(b"\n")


# --- bad data ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(fail: Fail, tmp_path: Path) -> None:
    sentence = fail(2, "check", tmp_path / "nowhere")
    assert sentence.startswith(f"{tmp_path / 'nowhere'}: There is no such folder. Name a BEIR folder")


@pytest.mark.parametrize("name", ["corpus", "queries"])
def test_a_file_that_is_missing(fail: Fail, folder: Path, name: str) -> None:
    (folder / f"{name}.jsonl").unlink()
    assert fail(2, "check", folder).startswith(f"{folder}: {name}.jsonl (or .jsonl.gz) is missing.")


@pytest.mark.parametrize("name", ["corpus", "queries"])
def test_broken_json(fail: Fail, folder: Path, name: str) -> None:
    path = folder / f"{name}.jsonl"
    line = add_line(path, '{"_id": "x", "text": ')
    assert fail(1, "check", folder).startswith(f"{path}:{line}: Broken JSON: ")


def test_bytes_that_are_no_utf_8(fail: Fail, folder: Path) -> None:
    path = folder / "corpus.jsonl"
    line = add_line(path, b'{"_id": "x", "text": "caf\xe9"}')
    assert fail(1, "check", folder) == f"{path}:{line}: Not UTF-8 (byte 0xe9). Save it as UTF-8."


def test_a_broken_line_of_labels(fail: Fail, folder: Path) -> None:
    path = folder / "qrels" / "dev.tsv"
    line = add_line(path, "d1\tp1")
    assert fail(1, "check", folder).startswith(f"{path}:{line}: Not a qrels line: expected")


@pytest.mark.parametrize("command", ["mine", "encode"])
def test_a_duplicate_id(fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path, command: str) -> None:
    add_line(folder / "corpus.jsonl", '{"_id": "p1", "text": "once more"}')
    sentence = fail(1, command, folder, "-o", tmp_path / "x", "--start", tiny_model)
    assert sentence.startswith(f"{folder}: 1 passage ids occur twice, such as 'p1'.")
    assert not (tmp_path / "x").exists()


def test_a_label_for_an_unknown_id(fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    add_line(folder / "qrels" / "train.tsv", "t1\tgone\t1")
    for command in ("run", "mine"):
        sentence = fail(1, command, folder, "-o", tmp_path / "x", "--start", tiny_model)
        assert "qrels/train.tsv names 1 passage ids that corpus.jsonl does not have, such as 'gone'." in sentence


def test_an_empty_split(fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n", encoding="utf-8")
    for command in ("run", "mine"):
        sentence = fail(1, command, folder, "-o", tmp_path / "x", "--start", tiny_model)
        assert sentence == f"{folder}: The split 'train' has no labels. Add qrels/train.tsv with at least one line."


def test_a_split_whose_labels_are_all_taken(fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    queries = folder / "queries.jsonl"
    text = (
        queries.read_text(encoding="utf-8")
        .replace("which river", "what is old")
        .replace("which market", "WHAT is old?")
    )
    queries.write_text(text, encoding="utf-8")
    sentence = fail(1, "mine", folder, "-o", tmp_path / "x", "--start", tiny_model)
    assert sentence.startswith(f"{folder}: The split 'train' has no labels left: all are hidden, or copies")


def test_an_empty_corpus(fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    (folder / "corpus.jsonl").write_text("", encoding="utf-8")
    for command in ("run", "mine", "encode"):
        assert "corpus.jsonl" in fail(1, command, folder, "-o", tmp_path / "x", "--start", tiny_model)


def test_a_training_query_without_positives(fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = folder / "qrels" / "train.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("t1\tp1\t1", "t1\tp1\t0"), encoding="utf-8")
    sentence = fail(1, "mine", folder, "-o", tmp_path / "x", "--start", tiny_model)
    assert sentence.startswith("Query 't1' has no relevant passage.")
    sentence = fail(1, "run", folder, "-o", tmp_path / "work", "--start", tiny_model)
    assert sentence.startswith("data: 1 train queries have no label above 0, such as 't1'.")


def test_empty_and_very_long_texts_are_taken(call: Call, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    add_line(folder / "corpus.jsonl", '{"_id": "empty", "text": ""}')
    add_line(folder / "corpus.jsonl", json.dumps({"_id": "long", "text": "river and bridge " * 20_000}))
    add_line(folder / "queries.jsonl", json.dumps({"_id": "u1", "text": "which market " * 20_000}))
    add_line(folder / "queries.jsonl", '{"_id": "u2", "text": ""}')
    assert call("check", folder, "--start", tiny_model)[0] == 0
    code, output, _ = call("mine", folder, "-o", tmp_path / "x", "--start", tiny_model)
    assert code == 0
    assert "dev triples before training" in output.splitlines()[-1]
    assert read_manifest(tmp_path / "x").facts["pool"] == 1


def test_check_lists_what_is_wrong_and_ends_with_one(call: Call, folder: Path, tiny_model: Path) -> None:
    add_line(folder / "corpus.jsonl", '{"_id": "p1", "text": ""}')
    add_line(folder / "qrels" / "dev.tsv", "gone\tp1\t1")
    code, output, _ = call("check", folder, "--start", tiny_model)
    assert code == 1
    assert "error: 1 passage ids occur twice, such as 'p1'" in output
    assert "error: qrels/dev.tsv names 1 query ids" in output
    assert "warning: 1 passages are empty" in output


def test_check_calls_sound_data_sound(call: Call, folder: Path, tiny_model: Path) -> None:
    code, output, _ = call("check", folder, "--start", tiny_model)
    assert (code, output.splitlines()[-1]) == (0, "sound")


# --- bad options ------------------------------------------------------------------------------------------------------


def test_an_unknown_command(fail: Fail) -> None:
    assert "fly" in fail(2, "fly")


def test_an_unknown_option(fail: Fail, folder: Path, tmp_path: Path) -> None:
    assert "--alfa" in fail(2, "run", folder, "-o", tmp_path / "x", "--alfa", "3")


def test_a_missing_argument(fail: Fail, folder: Path, tmp_path: Path) -> None:
    assert "--output" in fail(2, "run", folder)
    assert "--data" in fail(2, "run", "-o", tmp_path / "x")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--alpha", "much", "much"),
        ("--alpha", "1.5", "Option alpha is 1.5; it must be 0 to 1."),
        ("--alpha", "nan", "Option alpha is nan; it must be 0 to 1."),
        ("--sampling", "best", "best"),
        ("--max-steps", "few", "few"),
        ("--arms", "best", "Unknown arm 'best'. There are: labelled_only, query_centric, pair, all."),
        ("--language", "klingon", "No stemmer for 'klingon'."),
        ("--unlabelled", "nowhere.txt", "nowhere.txt: There is no such file. Check --unlabelled."),
    ],
)
def test_a_value_that_cannot_be(
    fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path, option: str, value: str, message: str
) -> None:
    assert message in fail(2, "run", folder, "-o", tmp_path / "x", "--start", tiny_model, option, value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[training]\nalpha = 0.3", "Unknown section [training]. There are: data, model,"),
        ("[train]\nalfa = 0.3", "Unknown option alfa in [train]. There are: alpha,"),
        ("[train]\nalpha = 3", "Option alpha is 3; it must be 0 to 1."),
        ("[train]\nalpha = 'much'", "Option alpha is 'much'; it must be a number."),
        ("[train]\nmax_steps = 2.5", "Option max_steps is 2.5; it must be a whole number."),
        ("[train]\nalpha = nan", "Option alpha is nan; it must be 0 to 1."),
        ("[mine]\nsampling = 'best'", "Option sampling is 'best'; it must be one of top, random."),
        ("alpha = 0.3", "Unknown section [alpha]."),
        ("[train\nalpha = 0.3", "Broken TOML:"),
    ],
)
def test_a_toml_that_cannot_be(fail: Fail, folder: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "options.toml"
    path.write_text(content, encoding="utf-8")
    sentence = fail(2, "run", folder, "-o", tmp_path / "x", "--config", path)
    assert sentence.startswith(f"{path}: {message}")


def test_a_toml_that_is_not_there(fail: Fail, folder: Path, tmp_path: Path) -> None:
    sentence = fail(2, "run", folder, "-o", tmp_path / "x", "--config", tmp_path / "none.toml")
    assert sentence == f"{tmp_path / 'none.toml'}: There is no such file. Check --config."
    assert fail(2, "run", folder, "-o", tmp_path / "x", "--config") == "--config needs a file."


def test_an_unknown_measure(fail: Fail, work: Path, toy: Path) -> None:
    sentence = fail(2, "evaluate", work / "runs/test/pair", toy / "qrels/test.tsv", "--measures", "RR@10", "Fame@3")
    assert sentence.startswith("Unknown measures: Fame@3. Write RR@10,")


# --- bad folders ------------------------------------------------------------------------------------------------------


def test_a_start_that_is_no_model(fail: Fail, folder: Path, tmp_path: Path) -> None:
    sentence = fail(2, "encode", folder, "-o", tmp_path / "x", "--start", folder)
    assert sentence == f"{folder}: This is no model folder. It needs config.json or modules.json."


def test_a_start_that_is_another_kind_of_model(fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(tiny_model), num_labels=1).save_pretrained(str(tmp_path / "cross"))
    sentence = fail(2, "encode", folder, "-o", tmp_path / "x", "--start", tmp_path / "cross")
    assert str(tmp_path / "cross") in sentence
    assert "CrossEncoder" in sentence


def test_a_start_that_is_another_kind_of_output(fail: Fail, work: Path, folder: Path, tmp_path: Path) -> None:
    sentence = fail(1, "encode", folder, "-o", tmp_path / "x", "--start", work / "candidates")
    assert sentence == f"{work / 'candidates'}: This folder holds 'candidates', not 'model'. Name the right folder."


def test_a_start_that_nobody_knows(fail: Fail, folder: Path, tmp_path: Path) -> None:
    sentence = fail(2, "encode", folder, "-o", tmp_path / "x", "--start", "nobody/no-such-model")
    assert "'nobody/no-such-model' cannot be loaded" in sentence


def test_a_teacher_that_is_no_cross_encoder(
    fail: Fail, work: Path, toy: Path, tiny_model: Path, tmp_path: Path
) -> None:
    options = ("--start", tiny_model, "--cross-encoder", tiny_model)
    sentence = fail(2, "teach", toy, work / "candidates", "-o", tmp_path / "x", *options)
    assert "without the head of a cross-encoder" in sentence


def test_vectors_of_another_model(fail: Fail, work: Path, toy: Path, bare_model: Path, tmp_path: Path) -> None:
    options = ("--data", toy, "-o", tmp_path / "x", "--start", bare_model)
    assert "These vectors were made by encoder" in fail(1, "search", work / "vectors/pair", *options)


def test_a_folder_that_is_no_work_folder(fail: Fail, tmp_path: Path) -> None:
    sentence = fail(1, "search", tmp_path, "which river")
    assert sentence.startswith(f"{tmp_path}: These are no vectors, and no finished work folder. Run pairdr run DATA")


def test_a_work_file_that_is_broken(fail: Fail, work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    (copy / "work.json").write_text("{", encoding="utf-8")
    assert str(copy / "work.json") in fail(1, "search", copy, "which river")


def test_a_search_for_neither_a_question_nor_a_split(fail: Fail, work: Path) -> None:
    assert fail(2, "search", work).startswith("Name a question; or --output, and --queries or --data")


@pytest.mark.parametrize(
    ("arguments", "message"), [((" ",), "The question is empty."), (("x", "-k", "0"), "Option k is 0;")]
)
def test_a_question_that_cannot_be(fail: Fail, work: Path, arguments: tuple[str, ...], message: str) -> None:
    assert fail(2, "search", work, *arguments).startswith(message)


def test_a_broken_run(fail: Fail, toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    path.write_text("q1 Q0 p1 1 0.5 tag\nq1 Q0 p2\n", encoding="utf-8")
    assert fail(1, "evaluate", path, toy / "qrels/test.tsv").startswith(f"{path}:2: Not a TREC run line")
    assert fail(2, "evaluate", tmp_path / "none.trec", toy / "qrels/test.tsv").endswith("Check the path.")


def test_a_teacher_that_does_not_win(fail: Fail, work: Path, toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    options = ("--start", tiny_model, "--gate-level", "0", "--no-fusion")
    sentence = fail(1, "teach", toy, work / "candidates", "-o", tmp_path / "teacher", *options)
    assert sentence.startswith("No teacher beats the student on dev: the student has RR@10 0.")
    again = fail(1, "label", toy, work / "candidates", tmp_path / "teacher", "-o", tmp_path / "x")
    assert again == sentence
    assert not (tmp_path / "x").exists()


def test_thresholds_that_label_nothing(fail: Fail, work: Path, toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    options = ("-o", tmp_path / "x", "--s-pos", "1000000")
    sentence = fail(1, "label", toy, work / "candidates", work / "teacher", *options)
    assert sentence.startswith("0 of 48 pool queries (0.0%) get a pseudo label")


def test_an_output_that_is_a_file(fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    sentence = fail(1, "run", folder, "-o", tmp_path / "file", "--start", tiny_model)
    assert str(tmp_path / "file") in sentence
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


# --- full disk, Ctrl-C ------------------------------------------------------------------------------------------------


def refuse_to_write(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_what_was_there(
    call: Call, fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("encode", folder, "-o", tmp_path / "vectors", "--start", tiny_model)
    assert call(*arguments)[0] == 0
    before = read_manifest(tmp_path / "vectors").fingerprint
    with (folder / "corpus.jsonl").open("a", encoding="utf-8") as corpus:
        corpus.write('\n{"_id": "one-more", "text": "a passage that has no vector yet"}\n')
    open_collection(folder)
    monkeypatch.setattr(np, "save", refuse_to_write)
    sentence = fail(1, *arguments)
    assert sentence.startswith(f"{tmp_path / 'vectors'}: Writing failed: No space left on device. Free some space")
    assert read_manifest(tmp_path / "vectors").fingerprint == before


@pytest.mark.parametrize("place", ["work", "pipeline"])
def test_a_full_disk_under_a_runs_own_records(
    fail: Fail, toy: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    (copy / "work.json").unlink()
    (copy / "report" / "table.txt").unlink()
    monkeypatch.setattr(f"pairdr.{place}.replace_file", refuse_to_write)
    start = json.loads((copy / "check" / "manifest.json").read_text(encoding="utf-8"))["options"]["start"]
    assert "No space left on device" in fail(1, "run", toy, "-o", copy, "--start", start, *QUICK)


def test_ctrl_c_in_a_command(fail: Fail, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pairdr.check.check_collection", interrupt)
    sentence = fail(130, "check", folder)
    assert sentence == "Interrupted. What was finished stays; the same command goes on from there."


@pytest.mark.slow
def test_ctrl_c_in_a_run_keeps_the_finished_steps(call: Call, toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["run", str(toy), "-o", str(tmp_path / "work"), "--start", str(tiny_model), *QUICK]
    # What a shell starts in the background ignores Ctrl-C, and so would its children.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", heed + "from pairdr.cli import main; main()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        progress = []
        for line in run.stderr:
            progress.append(line)
            if line.startswith("teach"):
                run.send_signal(signal.SIGINT)
                break
        progress += run.stderr.readlines()
    assert run.returncode == 130, progress
    assert progress[-1] == "pairdr: Interrupted. What was finished stays; the same command goes on from there.\n"
    assert "Traceback" not in "".join(progress)
    code, output, errors = call(*arguments)
    assert code == 0
    assert "PAIR + BM25" in output
    assert not {"check ...", "mine ..."} & set(errors.splitlines())
    assert "train pair ..." in errors.splitlines()


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(work: Path) -> None:
    command = f"{sys.executable} -c 'from pairdr.cli import main; main()' search {work} river -k 100 --json | head -n 1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["rank"] == 1
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call: Call, command: str) -> None:
    code, output, _ = call(command, "--help")
    assert code == 0
    assert f"pairdr {command}" in output


def test_only_train_runs_in_several_processes(fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fail(2, "run", tmp_path, "-o", tmp_path / "work").startswith("Only `pairdr train` runs in several")


def test_help_lists_every_command(call: Call) -> None:
    code, output, _ = call("--help")
    assert code == 0
    assert all(f"{command} " in output for command in COMMANDS)


def test_the_help_of_run_lists_every_option(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = call("run", "--help")[1]
    assert [name for _, name, _, _ in list_options() if f"--{name.replace('_', '-')}" not in output] == []


def list_options() -> list[tuple[str, str, Field[Any], Any]]:
    """Return (section, option, field, a value that is not its default) of every option."""
    found = []
    for section in fields(RunConfig):
        options = getattr(RunConfig(), section.name)
        if isinstance(options, Options):
            hints = get_type_hints(type(options))
            found += [
                (section.name, spec.name, spec, change(spec, hints[spec.name], getattr(options, spec.name)))
                for spec in fields(options)
            ]
    return found


def change(spec: Field[Any], hint: Any, default: Any) -> Any:
    """Return a value for an option that is allowed and is not its default."""
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != default)
    if spec.name in ("unlabelled", "labelled"):
        return (Path("more.txt"),)
    if spec.name == "held_out":
        return Path("held-out.txt")
    if spec.name == "measures":
        return ("Success@5", "RR@10")
    if spec.name == "matryoshka_dims":
        return (64, 128)
    if spec.name == "fp16":
        return False  # bf16 is set, and one excludes the other
    if isinstance(default, bool):
        return not default
    kinds = get_args(hint) or (hint,)
    if str in kinds:
        return "other"
    high = spec.metadata["high"]
    value = 0.25 if default is None else default / 2 + 0.1 if isinstance(default, float) else default + 1
    if float not in kinds:
        value = 77 if default is None else default + 1
    return value if high is None else min(value, high)


def expect_all() -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for section, name, _, value in list_options():
        sections.setdefault(section, {})[name] = value
    return sections


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Return the list of configurations that `run --dry-run` gets, which grows."""
    seen: list[RunConfig] = []

    def plan(data: Path, output: Path, config: RunConfig) -> list[Any]:
        seen.append(config)
        return []

    monkeypatch.setattr(pipeline, "plan_run", plan)
    return seen


def read_sections(config: RunConfig) -> dict[str, dict[str, Any]]:
    return {
        section: {name: getattr(getattr(config, section), name) for name in values}
        for section, values in expect_all().items()
    }


def write_toml(path: Path, sections: dict[str, dict[str, Any]]) -> Path:
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        for name, value in values.items():
            plain = (
                [item if isinstance(item, int) else str(item) for item in value] if isinstance(value, tuple) else value
            )
            plain = str(plain) if isinstance(plain, Path) else plain
            lines.append(f"{name} = {json.dumps(plain)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_every_option_can_be_set_on_the_command_line(call: Call, watched: list[RunConfig], tmp_path: Path) -> None:
    tokens: list[object] = []
    for _, name, _, value in list_options():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            tokens.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            tokens += [f"--{flag}", *(value if isinstance(value, tuple) else (value,))]
    assert call("run", "data", "-o", tmp_path, "--dry-run", *tokens)[0] == 0
    assert read_sections(watched[0]) == expect_all()


def test_every_option_can_be_set_in_a_toml(call: Call, watched: list[RunConfig], tmp_path: Path) -> None:
    path = write_toml(tmp_path / "options.toml", expect_all())
    assert call("run", "data", "-o", tmp_path, "--dry-run", "--config", path)[0] == 0
    assert read_sections(watched[0]) == expect_all()


def test_the_command_line_wins_over_the_toml(call: Call, watched: list[RunConfig], tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text('arms = ["all"]\n[train]\nalpha = 0.3\nmax_steps = 7\n[mine]\nkeep = 3\n', encoding="utf-8")
    assert call("run", "data", "-o", tmp_path, "--dry-run", f"--config={path}", "--alpha", "0.2", "--keep", "4")[0] == 0
    assert (watched[0].train.alpha, watched[0].train.max_steps, watched[0].mine.keep) == (0.2, 7, 4)
    assert watched[0].arms == ("all",)
    assert call("run", "data", "-o", tmp_path, "--dry-run", "--config", path, "--arms", "pair")[0] == 0
    assert watched[1].arms == ("pair",)
    assert watched[1].train.alpha == 0.3


def test_a_toml_is_forgotten_after_its_call(call: Call, watched: list[RunConfig], tmp_path: Path) -> None:
    path = write_toml(tmp_path / "options.toml", {"train": {"alpha": 0.3}})
    call("run", "data", "-o", tmp_path, "--dry-run", "--config", path)
    call("run", "data", "-o", tmp_path, "--dry-run")
    assert [config.train.alpha for config in watched] == [0.3, 0.1]


# --- the commands -----------------------------------------------------------------------------------------------------


def test_run_prints_the_table(work: Path) -> None:
    output = (work.parent / "output.txt").read_text(encoding="utf-8")
    assert output.startswith((work / "report" / "table.txt").read_text(encoding="utf-8"))
    assert output.splitlines()[-1] == f"16 steps ran. The work folder is {work}."


def test_a_second_run_has_nothing_to_do(call: Call, toy: Path, tiny_model: Path, work: Path) -> None:
    code, output, _ = call("run", toy, "-o", work, "--start", tiny_model, *QUICK)
    assert code == 0
    assert f"Nothing to do: everything is up to date. The work folder is {work}." in output


def test_a_dry_run_says_what_would_run_and_runs_nothing(call: Call, toy: Path, tiny_model: Path, work: Path) -> None:
    before = (work / "state.json").read_bytes()
    code, output, _ = call("run", toy, "-o", work, "--start", tiny_model, *QUICK, "--alpha", "0.4", "--dry-run")
    verdicts = {line[:28].strip(): line[28:40].strip() for line in output.splitlines()[:-1]}
    assert code == 0
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "up to date"} == {
        "train pair": "runs",
        **dict.fromkeys(("encode pair", "search test/pair", "search dev/pair", "fuse", "evaluate"), "follows"),
    }
    assert output.splitlines()[-1].startswith("about ")
    assert (work / "state.json").read_bytes() == before


def test_search_prints_passages_with_score_and_id(call: Call, work: Path) -> None:
    code, output, _ = call("search", work, "which river runs through kendal", "-k", "3", "--mode", "bm25")
    assert code == 0
    lines = output.splitlines()
    assert len(lines) == 6
    assert lines[0].split()[0] == "1"
    assert lines[0].split()[2] == "kendal-river"
    assert lines[1].strip().startswith("The river that runs through Kendal is called the")


def test_search_prints_json_for_machines(call: Call, work: Path) -> None:
    code, output, _ = call("search", work, "which river runs through kendal", "--k", "4", "--json", "--mode", "hybrid")
    hits = [json.loads(line) for line in output.splitlines()]
    assert code == 0
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4]
    assert hits[0]["passage_id"] == "kendal-river"
    assert hits[0]["title"] == "The river of Kendal"
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)


def test_questions_of_a_file_or_a_split_become_a_run(
    call: Call, fail: Fail, toy: Path, work: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("which river runs through kendal\nwho founded the town of ryde\n", encoding="utf-8")
    options = ("-o", tmp_path / "run", "-k", "5", "--mode", "hybrid", "--fusion", "rrf")
    assert call("search", work, "--queries", questions, *options)[1] == f"2 queries in {tmp_path / 'run'}/run.trec\n"
    run = read_run(tmp_path / "run" / "run.trec")
    assert list(run) == ["questions.txt:1", "questions.txt:2"]
    output = call("search", work, "which river runs through kendal", "--json", *options[2:])[1]
    hits = [json.loads(line) for line in output.splitlines()]
    assert [hit["passage_id"] for hit in hits] == [hit.passage_id for hit in run["questions.txt:1"]]
    made_with = read_manifest(tmp_path / "run", "run").options
    assert (made_with["k"], made_with["mode"], made_with["fusion"]) == (5, "hybrid", "rrf")
    assert call("search", work, "--data", toy, "--split", "dev", "-o", tmp_path / "dev")[0] == 0
    assert len(read_run(tmp_path / "dev" / "run.trec")) == 48
    assert fail(2, "search", work, "-o", tmp_path / "dev").startswith("Name either --queries or --data")
    both = ("--data", toy, "--queries", questions)
    assert fail(2, "search", work, "-o", tmp_path / "dev", *both).startswith("Name either --queries or --data")


def test_a_filter_may_stand_before_the_question(call: Call, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    corpus = folder / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    kinds = {row["_id"]: f"k{number % 2}" for number, row in enumerate(rows)}
    lines = [json.dumps(row | {"metadata": {"kind": kinds[row["_id"]]}}) + "\n" for row in rows]
    corpus.write_text("".join(lines), encoding="utf-8")
    start = ("--start", tiny_model)
    assert call("encode", folder, "-o", tmp_path / "v", *start)[0] == 0
    for arguments in (
        ("--where", "kind=k1", "which river"),
        ("which river", "--where", "kind=k1"),
        ("--where", "kind=k1", "--where", "kind=k9", "which river"),
    ):
        code, output, errors = call("search", tmp_path / "v", *arguments, "--json", *start)
        assert code == 0, errors
        hits = [json.loads(line) for line in output.splitlines()]
        assert [hit["metadata"] for hit in hits] == [{"kind": "k1"}] * list(kinds.values()).count("k1")


def test_every_command_that_reads_data_takes_one_of_equal_ids(
    call: Call, fail: Fail, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    add_line(folder / "corpus.jsonl", '{"_id": "p1", "text": "The last text of this id."}')
    start, last = ("--start", tiny_model), ("--on-duplicate", "last")
    for arguments in (
        ("encode", folder, "-o", tmp_path / "v", *start),
        ("index-words", folder, "-o", tmp_path / "bm25"),
        ("search", tmp_path / "v", "--data", folder, "-o", tmp_path / "run", *start),
        ("index", tmp_path / "v", "--data", folder, "-o", tmp_path / "index", *start),
    ):
        if arguments[0] != "search" or (tmp_path / "v").exists():
            assert "--on-duplicate chooses among equal ids" in fail(1, *arguments)
        code, _, errors = call(*arguments, *last)
        assert code == 0, errors
    output = call("search", tmp_path / "v", "x", "-k", "9", "--json", *start)[1]
    found = {hit["passage_id"]: hit["text"] for hit in map(json.loads, output.splitlines())}
    assert found["p1"] == "The last text of this id."


def test_the_teacher_of_a_work_folder_reranks(call: Call, work: Path) -> None:
    text = "which river runs through kendal"

    def ask(*options: object) -> list[dict[str, Any]]:
        code, output, errors = call("search", work, text, "--json", "--mode", "bm25", *options)
        assert code == 0, errors
        return [json.loads(line) for line in output.splitlines()]

    recipe = read_recipe(work / "teacher")
    assert recipe is not None
    teacher = load_teacher(recipe, work / "teacher", LexicalIndex(work / "bm25"), ModelConfig(device="cpu"))
    passages = [Passage(hit["passage_id"], hit["title"], hit["text"]) for hit in ask("-k", "50")]
    (scores,) = teacher.score([Query("q", text)], [passages])
    best = sorted(zip((-scores).tolist(), [p.passage_id for p in passages], strict=True))[:10]
    hits = ask("--reranker", "teacher")
    assert [hit["passage_id"] for hit in hits] == [passage_id for _, passage_id in best]
    assert [hit["score"] for hit in hits] == pytest.approx([-score for score, _ in best], abs=1e-5)


def test_a_search_without_hits_prints_nothing(call: Call, work: Path) -> None:
    assert call("search", work, "xyzzy", "--mode", "bm25") == (0, "", "")


@pytest.mark.slow
def test_the_commands_read_one_anothers_files(call: Call, toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    start = ("--start", tiny_model)

    def run(*arguments: object) -> str:
        code, output, errors = call(*arguments)
        assert code == 0, errors
        return output

    run("check", toy, *start)
    mined = run("mine", toy, "-o", tmp_path / "candidates", *start, "--relative-margin", "0", "--depth", "40")
    assert "labelled" in mined
    judged = run("teach", toy, tmp_path / "candidates", "-o", tmp_path / "teacher", *start)
    assert judged.splitlines()[0].split()[0] == "student"
    assert judged.splitlines()[-1].split()[0] == "teacher:"
    run("label", toy, tmp_path / "candidates", tmp_path / "teacher", "-o", tmp_path / "examples", *start)
    assert len(Examples.open(tmp_path / "examples" / "labelled.arrow")) == 48
    options = (*start, "--max-steps", "2", "--per-device-train-batch-size", "8", "--eval-passages", "20")
    for arm in ("pair", "labelled_only"):
        run("train", toy, tmp_path / "examples", "-o", tmp_path / arm, "--arm", arm, *options)
    assert [len(read_manifest(tmp_path / arm).facts["stages"]) for arm in ("pair", "labelled_only")] == [2, 1]
    trained = ("--start", tmp_path / "pair")
    assert run("encode", toy, "-o", tmp_path / "vectors", *trained).startswith("120 vectors of 32 dimensions")
    split = ("--data", toy, "--split", "dev", "-o", tmp_path / "run", "-k", "20")
    assert "48 queries" in run("search", tmp_path / "vectors", *split, *trained)
    trec = run("evaluate", tmp_path / "run" / "run.trec", toy / "qrels/dev.tsv", "--json")
    arrow = run("evaluate", tmp_path / "run", toy / "qrels/dev.tsv", "--json", "-o", tmp_path / "evaluation")
    assert json.loads(trec) == json.loads(arrow) == read_manifest(tmp_path / "evaluation").facts["means"]
    assert 0 < json.loads(trec)["R@100"] <= 1


def test_another_tools_run_is_measured(call: Call, toy: Path, tmp_path: Path) -> None:
    queries = [line.split("\t") for line in (toy / "qrels/test.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    path = tmp_path / "lucene.trec"
    path.write_text("".join(f"{q} Q0 {p} 1 3.5 lucene\n" for q, p, _ in queries[:12]), encoding="utf-8")
    code, output, _ = call("evaluate", path, toy / "qrels/test.tsv", "--measures", "RR@10", "Success@1")
    assert (code, output.split()) == (0, ["RR@10", "0.5000", "Success@1", "0.5000"])


def test_systems_of_a_work_folder_are_compared(call: Call, fail: Fail, toy: Path, work: Path, tmp_path: Path) -> None:
    runs, labels = work / "runs" / "test", ("--qrels", toy / "qrels" / "test.tsv", "--resamples", "500")
    systems = [f"{name}={runs / name}" for name in ("bm25", "start", "pair")]
    code, output, errors = call("compare", *systems, *labels, "-o", tmp_path / "out")
    assert code == 0, errors
    table = read_table(work / "report")
    means = {row.system: row.means["RR@10"] for row in table.rows}
    for name in ("bm25", "start", "pair"):
        assert f"{means[name]:.4f}" in next(line for line in output.splitlines() if line.startswith(f"{name} "))
    assert [line.split()[0] for line in output.splitlines() if " than bm25" in line or "and bm25 could" in line]
    kept = json.loads(call("compare", *systems, *labels, "--json")[1])
    assert kept == json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert [found["difference"] for found in kept["differences"]] == pytest.approx(
        [means["start"] - means["bm25"], means["pair"] - means["bm25"]]
    )
    same = call("compare", work, f"again={work}", "--measures", "RR@10", "--resamples", "500")
    assert "No difference between again and work could be shown: +0.0000 RR@10" in same[1]
    assert fail(2, "compare", work, work).startswith("Two systems are named 'work'.")
    assert fail(2, "compare", work).startswith("There is nothing to compare.")


def test_verify_finds_a_flipped_byte(call: Call, fail: Fail, work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work / "vectors/pair", tmp_path / "vectors"))
    code, output, _ = call("verify", copy)
    assert (code, output.split(" ", 1)[1].split("(")[1].split(",")[0]) == (0, "vectors")
    (path,) = (copy / "shards").glob("*.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fail(1, "verify", copy).startswith(
        f"{copy}: shards/{path.name} is not the file that was written: its sha256 differs."
    )


def test_verify_compares_vectors_with_those_of_their_model(call: Call, fail: Fail, work: Path) -> None:
    vectors, model = work / "vectors/pair", ("--start", work / "models/pair")
    assert call("verify", vectors, *model)[1].splitlines()[-1] == "120 vectors are those of their passages"
    sampled = call("verify", vectors, *model, "--sample", "9")
    assert sampled[1].splitlines()[-1] == "9 vectors are those of their passages"
    assert "made by encoder" in fail(1, "verify", vectors, "--start", work / "models/start")
    assert fail(2, "verify", work / "bm25", *model).startswith(f"{work / 'bm25'}: Only vectors are compared")
    assert fail(2, "verify", vectors, "--sample", "9").startswith("--sample says how many passages --start encodes")
    assert "Must be >= 1" in fail(2, "verify", vectors, *model, "--sample", "0")


def test_verify_names_what_is_no_output(fail: Fail, tmp_path: Path) -> None:
    assert fail(1, "verify", tmp_path).startswith(f"{tmp_path}: No artefact here: manifest.json is missing.")


def test_the_demo_says_how_to_go_on(call: Call, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pairdr.pipeline import RunResult

    asked: list[tuple[Path, tuple[str, ...]]] = []

    def run_demo(output: Path, arms: tuple[str, ...]) -> RunResult:
        asked.append((output, arms))
        return RunResult(output / "work", read_table(work / "report"), ())

    monkeypatch.setattr(pipeline, "run_demo", run_demo)
    code, output, _ = call("demo", "-o", tmp_path / "demo", "--arms", "all")
    assert code == 0
    assert asked == [(tmp_path / "demo", ("all",))]
    assert output.splitlines()[-1].startswith(f"Try it: pairdr search {tmp_path / 'demo' / 'work'} ")


def test_the_version_is_printed(call: Call) -> None:
    from pairdr import __version__

    assert call("--version")[1].strip() == __version__


def test_every_command_is_listed_here(call: Call) -> None:
    public = {
        name
        for module in (audit_commands, commands, exchange_commands, report_commands, store_commands)
        for name, value in vars(module).items()
        if callable(value) and value.__module__ == module.__name__
    }
    assert {name.replace("_", "-") for name in public if not name.startswith("_")} == set(COMMANDS)
