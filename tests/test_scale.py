"""The plan on paper: its numbers follow from what goes in, and the page shows what the script prints."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
SMALL = (
    *("--passages", "1000000", "--tokens", "100", "--query-tokens", "10", "--dimensions", "64", "--dtype", "float16"),
    *("--machines", "2", "--cores", "4", "--memory", "0.1", "--network", "8", "--disk", "0.5", "--queries", "3600"),
    *("--k", "10", "--depth", "5", "--negatives", "2", "--epochs", "3", "--convert", "1e5", "--bm25-index", "2e5"),
    *("--bm25-memory", "20", "--bm25-disk", "10", "--bm25-search", "1e7", "--batch", "1e9", "--encode", "1000"),
    *("--score", "500", "--train", "250", "--cross", "400", "--ivf", "1e9", "--hnsw", "1000"),
)


def run(*arguments: str) -> str:
    script = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(script, capture_output=True, text=True, check=True, env=environment).stdout


def read_rows(printed: str) -> dict[str, list[str]]:
    """Return the cells of each line of a table by its name."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines() if line.startswith("  ")]
    return {cells[0]: cells[1:] for cells in lines if len(cells) > 1}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    return read_rows(run(*SMALL))


def test_stages_follow_by_hand(rows: dict[str, list[str]]) -> None:
    words, texts = 75e6, 500e6  # of 1e8 tokens
    assert rows["check and convert"] == [f"{words / 1e5 / 3600:.2f}"] * 2 + ["1 core", "1.0", "0.0", "0.5"]
    assert rows["BM25: index"] == [f"{words / 2e5 / 3600:.2f}"] * 2 + ["1 core", "0.8", "1.5!", "0.5"]
    stored = texts + 1e6 * (64 * 2 + 24)
    hours = 1e8 / 1000 / 3600
    network = f"{(texts + stored) / 1e9:.1f}"
    assert rows["encode"] == [f"{hours:.2f}", f"{hours / 8:.2f}", "all", f"{stored / 1e9:.1f}", "0.0", network]
    exact = 3600 * 1e6 * 2 * 64 / 1e9 + 3600 * 10 / 1000
    assert rows["mine: exact"][:2] == [f"{exact / 3600:.2f}", f"{exact / 3600 / 8:.2f}"]
    assert rows["mine: BM25"][:2] == [f"{1e6 / 1e7:.2f}", f"{1e6 / 1e7 / 8:.2f}"]
    assert rows["label"][:3] == [f"{5 * 160 / 500:.2f}", f"{5 * 160 / 500 / 8:.2f}", "all"]
    assert rows["train, two stages"][0] == f"{2 * 3 * (10 + 3 * 100) / 250:.2f}"


def test_indexes_have_the_sizes_that_pairdr_index_plans(rows: dict[str, list[str]]) -> None:
    lists = 2 ** round(math.log2(4 * 1000))
    size = 4 * lists * 64 + 1e6 * (64 + 8)
    core = 1e6 * lists * 2 * 64 / 1e9 / 3600
    memory = (size + 64 * lists * 64 * 4) / 1e9
    assert rows[f"index: ivf, {lists} lists, sq8"] == [
        *(f"{core:.2f}", f"{core / 4:.2f}", "1 machine", f"{size / 1e9:.1f}", f"{memory:.1f}!"),
    ]  # fmt: skip
    assert rows["index: hnsw, sq8"][3:] == [f"{1e6 * (64 + 8 + 256) / 1e9:.1f}", f"{1e6 * 328 / 1e9:.1f}!"]


def test_search_follows_by_hand(rows: dict[str, list[str]]) -> None:
    # 128 MB of vectors do not fit 0.8 of 0.1 GB: one machine reads them from the disk, two have them in memory.
    assert rows["exact, 1 machine"] == ["0.1!", f"{4e9 / (2 * 64e6):.1f}", "256", "0.0"]
    sent = 2 * (4 * 64 + 12 * 10)
    printed = read_rows(run(*SMALL, "--single", "2"))["exact, 2 machines"]
    one = 1e3 * (64e6 / 2e9 + 8 * sent / 8e9)
    assert printed == ["0.1", f"{2 * 4e9 / (2 * 64e6):.1f}", f"{one:.0f}", f"{sent / 1e3:.1f}"]


def test_more_machines_are_shown_where_fewer_cannot_hold_the_vectors() -> None:
    printed = run(*SMALL, "--memory", "0.02")
    assert f"exact, {math.ceil(128e6 / (0.8 * 0.02e9))} machines" in printed


def test_gpus_are_shown_where_there_are_any_and_derived_unless_given(rows: dict[str, list[str]]) -> None:
    assert "GPU" not in run(*SMALL)
    derived = run(*SMALL, "--gpus", "1", "--gpu-operations", "1e13", "--gpu-share", "0.5", "--body", "2")
    weights = 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert "~GPU-hours" in derived
    assert read_rows(derived)["encode"][-1] == f"{1e8 / (5e12 / (2 * weights)) / 3600:.2f}"
    rates = ("--gpu-encode", "1e4", "--gpu-score", "1e4", "--gpu-train", "1e3")
    given = run(*SMALL, "--gpus", "1", *rates)
    assert "~GPU" not in given
    assert read_rows(given)["encode"][-1] == f"{1e8 / 1e4 / 3600:.2f}"


def test_prices_are_hours_by_what_an_hour_costs(rows: dict[str, list[str]]) -> None:
    priced = read_rows(run(*SMALL, "--core-price", "0.36"))
    assert priced["encode"][-1] == f"{1e8 / 1000 / 3600 * 0.36:.2f}"
    both = read_rows(run(*SMALL, "--core-price", "0.36", "--gpus", "1", "--gpu-price", "3", "--gpu-encode", "1e4"))
    assert both["encode"][-1] == f"{1e8 / 1e4 / 3600 * 3:.2f}"


def test_databases_load_at_the_rate_that_is_given() -> None:
    printed = run(*SMALL, "--milvus-load", "1000", "--pgvector-load", "100")
    assert re.findall(r"loading: ([0-9.]+) h", printed) == [f"{1e6 / 1000 / 3600:.1f}", f"{1e6 / 100 / 3600:.1f}"]


def test_the_page_shows_what_the_script_prints() -> None:
    shown = re.findall(r"```\n\$ python benchmarks/scale\.py(.*?)\n(.*?)\n```", PAGE.read_text("utf-8"), re.DOTALL)
    assert shown
    for arguments, printed in shown:
        assert run(*arguments.split()).rstrip() == printed
