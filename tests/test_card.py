"""The model card: what stands in it, that it may be edited, and that a model reaches a hub with it."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from pairdr import card, makers
from pairdr.artefact import read_manifest, verify_artefact
from pairdr.card import read_measured, write_card
from pairdr.cli import main
from pairdr.collection import open_collection
from pairdr.config import (
    DataConfig,
    EvaluateConfig,
    MineConfig,
    ModelConfig,
    RunConfig,
    TeachConfig,
    TrainConfig,
    WarmConfig,
)
from pairdr.encoder import DualEncoder
from pairdr.files import hash_json
from pairdr.measures import find_interval
from pairdr.pipeline import RunResult, run_pipeline
from pairdr.table import TITLES, read_values
from pairdr.work import Work

if TYPE_CHECKING:
    from conftest import Parts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> RunResult:
    """Return a run of two arms on the toy data."""
    return run_pipeline(toy, tmp_path_factory.mktemp("finished") / "work", make_config(tiny_model, "CC0-1.0"))


def make_config(start: Path, licence: str) -> RunConfig:
    return RunConfig(
        data=DataConfig(licence=licence),
        model=ModelConfig(start=str(start)),
        warm=WarmConfig(warm="always", warm_steps=1),
        mine=MineConfig(depth=40, relative_margin=None),
        teach=TeachConfig(rerank_depth=40),
        train=TrainConfig(max_steps=2, per_device_train_batch_size=8, eval_passages=20, eval_queries=5),
        evaluate=EvaluateConfig(resamples=200),
        arms=("labelled_only", "pair"),
    )


def read_card(work: Path, model: str) -> tuple[dict[str, Any], str]:
    """Return the header and the text of a card."""
    text = (work / "models" / model / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def find_section(card: str, title: str) -> str:
    """Return a section of a card."""
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


def test_a_card_names_data_stages_and_measures_with_intervals(finished: RunResult, toy: Path) -> None:
    header, body = read_card(finished.work, "pair")
    assert header["library_name"] == "sentence-transformers"
    assert "dense-retrieval" in header["tags"]
    assert "base_model" not in header  # a folder of this machine is nobody else's base
    assert f"`{toy.name}`" in body
    assert str(toy.parent) not in body
    assert "Licence of the data: CC0-1.0." in body
    assert "1. pair: (1 - 0.1) L_Q + 0.1 L_P, on the pseudo and labelled rows" in body
    assert "2. query-centric: L_Q, on the pseudo and labelled rows" in body
    assert read_manifest(finished.work / "models" / "pair").facts["weights_sha256"] in body
    for row in finished.table.rows:
        line = next(line for line in body.splitlines() if line.startswith("|") and TITLES[row.system] in line)
        assert all(f"{value:.4f} (" in line for value in row.means.values())
    assert f"**{TITLES['pair']}** (this model)" in body
    assert all(f"- {note}" in body for note in finished.table.notes)
    assert f"**{TITLES['labelled_only']}** (this model)" in read_card(finished.work, "labelled_only")[1]


TRAINED = ("student", "labelled_only", "pair.stage1", "pair")


def read_commands(card: str) -> list[list[str]]:
    """Return the words of the commands that stand in a card."""
    block = find_section(card, "How it was made").split("```sh\n")[1].split("```")[0]
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("model", TRAINED)
def test_every_trained_model_has_a_whole_card(finished: RunResult, toy: Path, model: str) -> None:
    _, body = read_card(finished.work, model)
    titles = [line.removeprefix("## ") for line in body.splitlines() if line.startswith("## ")]
    assert titles == ["Use", "Results", "Training", "Data", "Intended use and limits", "How it was made"]
    assert "Licence of the data: CC0-1.0." in body
    assert ("Not measured yet" in body) == (model in ("student", "pair.stage1"))
    assert f"# makes WORK/models/{model}\n" in body
    assert read_commands(body)[0] == ["pairdr", "run", toy.name, "-o", "WORK", "--config", "WORK/run.toml"]


def test_a_card_between_the_stages_has_the_first_alone(finished: RunResult) -> None:
    _, body = read_card(finished.work, "pair.stage1")
    assert "in the first of the two stages of PAIR" in body
    assert "1. pair: " in body
    assert "2. " not in find_section(body, "Training")
    assert "1. warm: L_Q, on the plain rows" in read_card(finished.work, "student")[1]


def test_the_start_of_a_run_is_named_as_a_copy(finished: RunResult, tiny_model: Path) -> None:
    text = (finished.work / "models" / "start" / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# A copy of `{tiny_model.name}`\n")


@pytest.mark.parametrize("form", [0, 1])
def test_the_commands_of_a_card_make_its_model_again(
    finished: RunResult, toy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: int
) -> None:
    for place in (toy, tiny_model):
        (tmp_path / place.name).symlink_to(place)
    monkeypatch.chdir(tmp_path)
    words = read_commands(read_card(finished.work, "pair")[1])[form]
    words = [str(finished.work / "run.toml") if word == "WORK/run.toml" else word for word in words]
    with pytest.raises(SystemExit) as end:
        main(words[1:])
    assert end.value.code == 0
    for model in TRAINED:
        first, again = (read_manifest(work / "models" / model) for work in (finished.work, tmp_path / "WORK"))
        assert first.fingerprint == again.fingerprint


def test_a_licence_that_is_given_later_stands_in_every_card(
    finished: RunResult, toy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Path(shutil.copytree(finished.work, tmp_path / "work"))
    before = {name: (read_manifest(work / "models" / name).fingerprint, read_card(work, name)[1]) for name in TRAINED}
    (work / "models" / "labelled_only" / "README.md").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(card, "find_interval", pytest.fail)  # what was measured is known
    result = run_pipeline(toy, work, make_config(tiny_model, "MIT\n---\nlicense: other"))
    assert result.steps_run == ()
    for name, (fingerprint, text) in before.items():
        assert read_manifest(work / "models" / name).fingerprint == fingerprint
        if name == "labelled_only":
            assert (work / "models" / name / "README.md").read_text(encoding="utf-8") == "mine"
            continue
        _, body = read_card(work, name)
        assert "Licence of the data: MIT --- license: other." in body
        assert "--licence 'MIT" in body
        assert find_section(body, "Results") == find_section(text, "Results")


def test_a_card_that_is_gone_comes_back_with_its_measures(
    finished: RunResult, toy: Path, tiny_model: Path, tmp_path: Path
) -> None:
    work = Path(shutil.copytree(finished.work, tmp_path / "work"))
    path = work / "models" / "pair" / "README.md"
    text = path.read_text(encoding="utf-8")
    path.unlink()
    assert run_pipeline(toy, work, make_config(tiny_model, "CC0-1.0")).steps_run == ()
    assert path.read_text(encoding="utf-8") == text


def test_a_model_of_the_train_command_has_its_own_command(
    finished: RunResult, toy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {toy.name: toy, tiny_model.name: tiny_model, "examples": finished.work / "examples"}
    for name, place in places.items():
        (tmp_path / name).symlink_to(place)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        return read_manifest("model").fingerprint

    few = ("--max-steps", "2", "--per-device-train-batch-size", "8", "--eval-passages", "20", "--device", "cpu")
    first = call("train", str(toy), "examples", "-o", "model", "--start", str(tiny_model), "--licence", "MIT", *few)
    card = Path("model/README.md").read_text(encoding="utf-8")
    assert "Licence of the data: MIT." in card
    assert "# makes model.stage1\n" in Path("model.stage1/README.md").read_text(encoding="utf-8")
    assert Path("model.start/README.md").read_text(encoding="utf-8").startswith(f"# A copy of `{tiny_model.name}`\n")
    (words,) = read_commands(card)
    assert words[:5] == ["pairdr", "train", toy.name, "examples", "-o"]
    for name in ("model", "model.stage1", "model.start"):
        shutil.rmtree(name)
    assert call(*words[1:]) == first


def test_intervals_are_those_of_the_values_per_query(finished: RunResult) -> None:
    report, config = finished.work / "report", EvaluateConfig(resamples=400)
    measured = read_measured(report, "pair", config)
    for system, intervals in measured.intervals.items():
        for name, (low, high) in intervals.items():
            values = np.array(list(read_values(report, system)[name].values()))
            spread = values.std(ddof=1) / np.sqrt(len(values))
            assert low <= values.mean() <= high
            assert (low, high) == pytest.approx(values.mean() + np.array([-1.96, 1.96]) * spread, abs=0.5 * spread)


def test_all_cards_of_a_table_have_its_intervals_which_are_found_once(
    finished: RunResult, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(evaluate=EvaluateConfig(measures=("RR@5",), resamples=200))
    work = Work(shutil.copytree(finished.work, tmp_path / "work"), open_collection(toy), config)
    systems, found = [row.system for row in finished.table.rows], []

    def find_counted(values: list[float], **options: Any) -> tuple[float, float]:
        found.append(values)
        return find_interval(values, **options)

    monkeypatch.setattr(card, "find_interval", find_counted)
    makers.evaluate(work, "test", systems)
    assert len(found) == len(systems)
    for arm in ("labelled_only", "pair"):
        _, body = read_card(work.folder, arm)
        assert f"**{TITLES[arm]}** (this model)" in body
        assert "| | RR@5 |" in body


def test_a_card_may_be_edited(finished: RunResult, toy: Path) -> None:
    folder = finished.work / "models" / "pair"
    before, text = read_manifest(folder).fingerprint, (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text("mine", encoding="utf-8")
    assert verify_artefact(folder).fingerprint == before
    (folder / "README.md").unlink()
    assert verify_artefact(folder).fingerprint == before
    DualEncoder.open(folder, device="cpu")
    (folder / "README.md").write_text(text, encoding="utf-8")


def test_a_model_that_nobody_measured_says_so(finished: RunResult, toy: Path) -> None:
    models = finished.work / "models"
    path = models / "pair" / "README.md"
    text = path.read_text(encoding="utf-8")
    write_card(models / "pair", models / "start", open_collection(toy), "make it")
    assert find_section(path.read_text(encoding="utf-8"), "Results") == find_section(text, "Results")
    path.unlink()
    write_card(models / "pair", models / "start", open_collection(toy), "make it")
    bare = path.read_text(encoding="utf-8")
    assert "Not measured yet" in bare
    assert "Licence of the data: not given" in bare
    path.write_text(text, encoding="utf-8")


def test_an_edited_card_is_left_as_it_is(finished: RunResult, toy: Path) -> None:
    models, data = finished.work / "models", open_collection(toy)
    path = models / "pair" / "README.md"
    text = path.read_text(encoding="utf-8")
    measured = read_measured(finished.work / "report", "pair", EvaluateConfig(resamples=200))
    for edited in (text.replace("Intended use", "Use"), "mine"):
        path.write_text(edited, encoding="utf-8")
        write_card(models / "pair", models / "start", data, "make it", measured)
        assert path.read_text(encoding="utf-8") == edited
    path.write_text(text, encoding="utf-8")
    write_card(models / "pair", models / "start", data, "make it", measured)
    assert "not given" in path.read_text(encoding="utf-8")  # the licence: this one was written anew
    path.write_text(text, encoding="utf-8")


def test_a_card_that_an_older_manifest_names_may_be_edited_too(finished: RunResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.work / "models" / "pair", tmp_path / "old"))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["seal"]
    manifest["files"]["README.md"] = {"sha256": "0" * 64, "bytes": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seal": hash_json(manifest)}), encoding="utf-8")
    verify_artefact(folder)


def test_the_licence_of_the_data_changes_nothing_that_is_made(toy: Path) -> None:
    one, other = (open_collection(toy, DataConfig(licence=licence)) for licence in (None, "CC0-1.0"))
    assert one.fingerprint == other.fingerprint


def test_a_start_from_the_hub_is_named(toy_parts: Parts, tmp_path: Path) -> None:
    encoder = DualEncoder.open(toy_parts.start, device="cpu")
    options = {"start": "some/model"}
    encoder.save(tmp_path / "start", options=options, inputs={})
    last = {"step": 1, "loss": 0.5}
    facts = {"stages": [{"name": "query_centric", "alpha": 0.0, "sources": ["plain"]}], "examples": 3, "summary": last}
    encoder.save(tmp_path / "models" / "mine", options=options, inputs={}, facts=facts)
    write_card(tmp_path / "models" / "mine", tmp_path / "start", toy_parts.collection, "make it")
    header, _ = read_card(tmp_path, "mine")
    assert header["base_model"] == "some/model"


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """As much of the hub's interface as an upload needs, on this machine."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Desk)
        self.files: dict[str, bytes] = {}
        self.made: list[dict[str, Any]] = []
        self.refuses = False

    address_override: str | None = None

    @property
    def address(self) -> str:
        return self.address_override or f"http://127.0.0.1:{self.server_port}"


class Desk(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        self.answer({}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses or self.headers.get("Authorization") != "Bearer hf_test":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/me/mine"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/models/me/mine/preupload/main":
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif self.path == "/api/models/me/mine/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/me/mine/commit/1", "commitOid": "1"})
        else:
            self.answer({"error": self.path}, 404)

    def answer(self, content: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(hub: Hub, model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-m", "pairdr", "push", str(model), "me/mine", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_model_is_uploaded_with_its_card(hub: Hub, finished: RunResult) -> None:
    model = finished.work / "models" / "pair"
    outcome = push(hub, model, "--private")
    assert outcome.returncode == 0, outcome.stderr
    assert hub.made[0]["name"] == "mine"
    assert hub.made[0]["visibility"] == "private"
    sent = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert hub.files == sent


def test_a_hub_that_cannot_be_reached_is_named_in_one_sentence(hub: Hub, finished: RunResult) -> None:
    hub.address_override = "http://127.0.0.1:9"
    outcome = push(hub, finished.work / "models" / "pair")
    assert outcome.returncode == 2
    assert "The hub did not take the model" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_hub_that_refuses_is_named_in_one_sentence(hub: Hub, finished: RunResult) -> None:
    hub.refuses = True
    outcome = push(hub, finished.work / "models" / "pair")
    assert outcome.returncode == 2
    assert "The hub did not take the model" in outcome.stderr
    assert "HF_TOKEN" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert hub.files == {}


def test_what_is_no_model_is_not_uploaded(hub: Hub, finished: RunResult) -> None:
    outcome = push(hub, finished.work / "report")
    assert outcome.returncode == 1
    assert "'report'" in outcome.stderr
    assert hub.made == []
