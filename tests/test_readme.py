"""What cards have in common: signatures, names without places, commands as a shell takes them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pairdr.artefact import publish
from pairdr.collection import open_collection
from pairdr.config import DataConfig, MineConfig, ModelConfig, RunConfig, TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.lines import UrlPath
from pairdr.readme import format_command, is_edited, name_place, name_start, quote_card, sign_card
from pairdr.sources.named import name_data


def test_a_signed_card_that_somebody_changes_is_edited() -> None:
    card = sign_card("# A model\n\nIt finds.")
    assert not is_edited(card)
    assert is_edited(card.replace("finds", "seeks"))
    assert is_edited("mine")


def test_a_card_within_another_has_lower_headings_and_neither_header_nor_signature() -> None:
    card = sign_card("---\ntags:\n- a\n---\n\n# A model\n\n```sh\n# a comment\n```\n\n## Use\n\nSo.")
    assert quote_card(card) == "### A model\n\n```sh\n# a comment\n```\n\n#### Use\n\nSo."
    assert quote_card("mine") == "mine"


def test_a_command_has_the_options_that_are_not_the_default() -> None:
    config = RunConfig(
        data=DataConfig(unlabelled=(Path("/far/away/more questions.txt"),), hide_labels=0.25),
        model=ModelConfig(start="/far/away/model", query_prefix="ask: "),
        mine=MineConfig(relative_margin=None),
        train=TrainConfig(cross_batch_negatives=False, fp16=True),
        arms=("labelled_only", "pair"),
    )
    command = format_command(["pairdr", "run", "data", "-o", "work"], config)
    assert shlex.split(command.replace("\\\n", "")) == [
        *("pairdr", "run", "data", "-o", "work", "--unlabelled", "more questions.txt", "--hide-labels", "0.25"),
        *("--start", "model", "--query-prefix", "ask: ", "--relative-margin", "none"),
        *("--no-cross-batch-negatives", "--fp16", "--arms", "labelled_only", "pair"),
    ]
    assert format_command(["pairdr", "run", "data"], RunConfig()) == "pairdr run data"


def test_a_long_command_goes_on_in_the_next_line() -> None:
    lines = format_command(["pairdr", "run", "d" * 90], TrainConfig(max_steps=3, seed=1)).splitlines()
    assert lines == [f"pairdr run {'d' * 90} \\", "    --max-steps 3 --seed 1"]


@pytest.mark.parametrize(
    ("place", "name"),
    [("/far/away/model", "model"), ("a/b/c", "c"), ("some/model", "some/model"), ("minilm", "minilm")],
)
def test_a_place_is_called_by_its_name(place: str, name: str) -> None:
    assert name_place(place) == name


def test_the_packaged_start_has_its_name_of_the_hub() -> None:
    assert name_start("minilm") == "sentence-transformers/all-MiniLM-L6-v2"


def test_a_copy_of_a_start_says_what_it_is_a_copy_of(tiny_model: Path, tmp_path: Path) -> None:
    config = ModelConfig(start=str(tiny_model), layers=1, device="cpu")
    DualEncoder.load(config).save_copy(tmp_path / "start", config)
    card = (tmp_path / "start" / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# A copy of `{tiny_model.name}`\n")
    assert f"the weights of `{tiny_model.name}`, cut after layer 1, not trained here" in card
    assert "| query length | 32 |" in card
    assert str(tiny_model.parent) not in card
    assert not is_edited(card)


@pytest.mark.parametrize(
    ("given", "name"),
    [("ir:beir/scifact", "ir:beir/scifact"), ("hf:BeIR/scifact,test=dev", "hf:BeIR/scifact,test=dev")],
)
def test_converted_data_have_the_name_they_were_given(given: str, name: str, tmp_path: Path) -> None:
    with publish(tmp_path / "place", "beir", options={"source": given}, inputs={}):
        pass
    assert name_data(tmp_path / "place") == name


def test_data_of_this_machine_are_called_by_the_name_of_their_folder(toy: Path, tmp_path: Path) -> None:
    with publish(tmp_path / "place", "beir", options={"source": f"hf:{tmp_path}"}, inputs={}):
        pass
    assert name_data(tmp_path / "place") == "place"
    assert name_data(toy) == open_collection(toy).given_name == toy.name


def test_data_at_a_url_are_called_by_it_without_the_password() -> None:
    assert name_data(UrlPath("ftp://me:secret@host/data")) == "ftp://me:***@host/data"
