"""Every file of recipes/ is read by the command line's own reader, and says in itself how it is run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from pairdr.cli import _read_config
from pairdr.config import ARMS, RunConfig, change_options

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.toml"))

pytestmark = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_the_command_line_reads_a_recipe(path: Path) -> None:
    (config,) = _read_config(["run", "--config", str(path)])
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    plain = [key for key, value in content.items() if not isinstance(value, dict)]
    options = [key for value in content.values() if isinstance(value, dict) for key in value]
    assert sorted(config.config) == sorted(key.replace("_", "-") for key in (*plain, *options))


def test_a_recipe_changes_options_within_their_ranges(path: Path) -> None:
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    assert set(content.pop("arms", [])) <= {*ARMS, "all"}
    assert content.pop("rounds", 1) >= 1
    assert change_options(RunConfig(), content) != RunConfig()


def test_a_recipe_says_how_it_is_run(path: Path) -> None:
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"--config recipes/{path.name}" in line for line in comments)
