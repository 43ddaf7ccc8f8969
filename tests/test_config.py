"""Options: each is defined once, checked when it is set, explained, and exercised by a test."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from pairdr.config import ARMS, EvaluateConfig, Options, RunConfig, TrainArm, TrainConfig, change_options, list_stages
from pairdr.errors import UsageError
from pairdr.store_config import CompareConfig, ExportConfig, IndexConfig, QueryConfig

TESTS = Path(__file__).resolve().parent
SECTIONS = {name: value for name, value in vars(RunConfig()).items() if isinstance(value, Options)}


def list_options() -> Iterator[tuple[str, type[Options], Field[Any]]]:
    """Yield (option, class, field) of every option of every section."""
    for section in SECTIONS.values():
        yield from ((spec.name, type(section), spec) for spec in fields(section))


def list_bounds(name: str) -> list[tuple[str, type[Options], float]]:
    """Return (option, class, bound) of every option with a lower or an upper bound."""
    found = [(option, kind, spec.metadata.get(name)) for option, kind, spec in list_options()]
    return [row for row in found if row[2] is not None]


def list_choices() -> list[tuple[str, type[Options]]]:
    found = [(option, kind, get_type_hints(kind)[option]) for option, kind, _ in list_options()]
    return [(option, kind) for option, kind, hint in found if get_origin(hint) is Literal]


OPTIONS = [name for name, _, _ in list_options()]


@pytest.mark.parametrize(("name", "kind", "low"), list_bounds("low"), ids=lambda value: str(value))
def test_a_value_below_its_range_is_refused_and_named(name: str, kind: type[Options], low: float) -> None:
    with pytest.raises(UsageError, match=rf"Option {name} is .*; it must be (at least )?{low}"):
        kind(**{name: low - 1})
    assert getattr(kind(**{name: low}), name) == low


@pytest.mark.parametrize(("name", "kind", "high"), list_bounds("high"), ids=lambda value: str(value))
def test_a_value_above_its_range_is_refused_and_named(name: str, kind: type[Options], high: float) -> None:
    with pytest.raises(UsageError, match=rf"Option {name} is {high + 1}; it must be .*{high}"):
        kind(**{name: high + 1})
    assert getattr(kind(**{name: high}), name) == high


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match="Option alpha is nan"):
        TrainConfig(alpha=float("nan"))


def test_there_is_something_to_measure() -> None:
    with pytest.raises(UsageError, match=r"Option measures is \(\); it must be at least one name"):
        EvaluateConfig(measures=())


def test_a_text_is_no_number() -> None:
    with pytest.raises(UsageError, match="Option alpha is 'much'; it must be a number"):
        TrainConfig(alpha="much")


def test_a_fraction_is_no_whole_number() -> None:
    with pytest.raises(UsageError, match=r"Option max_steps is 2\.5; it must be a whole number"):
        TrainConfig(max_steps=2.5)
    assert TrainConfig(alpha=1).alpha == 1


@pytest.mark.parametrize(("name", "kind"), list_choices())
def test_a_value_that_is_no_choice_is_refused_with_the_choices(name: str, kind: type[Options]) -> None:
    choices = get_args(get_type_hints(kind)[name])
    with pytest.raises(UsageError, match=rf"Option {name} is 'other'; it must be .*{choices[-1]}"):
        kind(**{name: "other"})
    needed = {"bf16": True} if name == "attn_implementation" else {}  # what one of the choices asks for
    assert [getattr(kind(**needed, **{name: choice}), name) for choice in choices] == list(choices)


@pytest.mark.parametrize("variant", ["own", "hard_all"])
def test_a_loss_over_hard_negatives_alone_needs_some(variant: str) -> None:
    with pytest.raises(UsageError, match=f"passage_negatives is '{variant}', which needs train_negatives"):
        TrainConfig(passage_negatives=variant, train_negatives=0)
    assert TrainConfig(passage_negatives="official", train_negatives=0).train_negatives == 0


def test_an_unset_option_has_no_range() -> None:
    assert TrainConfig(max_steps=None, dropout=None).max_steps is None


def test_changed_options_leave_the_others_alone() -> None:
    changed = change_options(RunConfig(), {"train": {"alpha": 0.3}, "evaluate": {"measures": ["RR@5"]}})
    assert changed.train == TrainConfig(alpha=0.3)
    assert changed.evaluate.measures == ("RR@5",)
    assert changed.mine == RunConfig().mine


def test_an_unknown_section_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"Unknown section \[training\]. There are: data, model, .*train"):
        change_options(RunConfig(), {"training": {"alpha": 0.3}})


def test_a_section_that_is_no_table_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Unknown section \[train\]"):
        change_options(RunConfig(), {"train": 3})  # type: ignore[dict-item]


def test_an_unknown_option_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"Unknown option alfa in \[train\]. There are: alpha, "):
        change_options(RunConfig(), {"train": {"alfa": 0.3}})


def test_a_changed_option_is_checked_against_its_range() -> None:
    with pytest.raises(UsageError, match="Option alpha is 2"):
        change_options(RunConfig(), {"train": {"alpha": 2}})


@pytest.mark.parametrize("path", sorted((TESTS.parent / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_fills_the_options(path: Path) -> None:
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    arms = content.pop("arms", ["pair"])
    changed = change_options(RunConfig(), content)
    assert all(getattr(changed, name).as_dict() != SECTIONS[name].as_dict() for name in content)
    assert set(arms) <= {*ARMS, "all"}


def test_the_defaults_are_plain_json() -> None:
    options = RunConfig().as_dict()
    assert json.loads(json.dumps(options)) == options
    assert options["train"]["alpha"] == 0.1


def test_paths_and_tuples_become_plain_json_too() -> None:
    changed = change_options(RunConfig(), {"data": {"unlabelled": [Path("more.txt")]}})
    assert changed.data.as_dict()["unlabelled"] == ["more.txt"]


def test_every_option_has_help() -> None:
    assert [name for name, _, spec in list_options() if not str(spec.metadata.get("help", "")).endswith(".")] == []


def test_no_two_sections_share_an_option() -> None:
    assert sorted(OPTIONS) == sorted(set(OPTIONS))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_set_by_some_test(name: str) -> None:
    used = re.compile(rf"(?<![\w.]){name}=|--{name.replace('_', '-')}\b|\"{name}\"")
    files = [path for path in TESTS.glob("*.py") if path != Path(__file__).resolve()]
    assert [path.name for path in files if used.search(path.read_text(encoding="utf-8"))] != []


def test_pair_trains_both_relations_first_and_the_query_centric_one_then() -> None:
    first, second = list_stages("pair", TrainConfig(alpha=0.3))
    assert (first.alpha, second.alpha) == (0.3, 0.0)
    assert first.sources == second.sources == ("pseudo", "labelled")


def test_query_centric_is_pair_without_the_passage_centric_loss() -> None:
    assert list_stages("query_centric", TrainConfig(alpha=0.3)) == list_stages("pair", TrainConfig(alpha=0.0))


def test_labelled_only_sees_neither_pseudo_labels_nor_a_teacher() -> None:
    (stage,) = list_stages("labelled_only", TrainConfig())
    assert (stage.alpha, stage.sources) == (0.0, ("plain",))


def test_stage_1_of_pair_can_be_trained_alone() -> None:
    config = TrainConfig(alpha=0.3)
    assert list_stages("pair_stage1", config) == list_stages("pair", config)[:1]


def test_train_takes_every_arm_and_run_those_of_its_table() -> None:
    assert get_args(TrainArm) == (*ARMS, "pair_stage1")


def test_an_unknown_arm_is_refused_with_those_that_exist() -> None:
    with pytest.raises(
        UsageError, match=r"Unknown arm 'best'. There are: labelled_only, query_centric, pair, pair_stage1"
    ):
        list_stages("best", TrainConfig())


@pytest.mark.parametrize(
    ("section", "page"),
    [
        ("train", "training"),
        ("encode", "vectors"),
        *((ExportConfig, "export"), (IndexConfig, "search"), (QueryConfig, "search"), (CompareConfig, "compare")),
    ],
)
def test_every_option_stands_in_its_page(section: Any, page: str) -> None:
    options = section if isinstance(section, type) else get_type_hints(RunConfig)[section]
    text = (Path(__file__).resolve().parents[1] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert [spec.name for spec in fields(options) if f"`{spec.name}`" not in text] == []
