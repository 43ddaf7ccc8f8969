"""Mining and labelling killed at random moments (kill -9): the next call does what is missing, and ends the same.

PAIRDR_KILLS says how often each (2); `make test-crash` kills 20 times each and prints a line for every one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pairdr import mine, scoring
from pairdr.artefact import verify_artefact
from pairdr.collection import open_collection
from pairdr.config import LabelConfig, MineConfig
from pairdr.encoder import DualEncoder
from pairdr.label import label_examples
from pairdr.lexical import LexicalIndex
from pairdr.mine import mine_candidates, read_candidates
from pairdr.teachers import LexicalTeacher
from pairdr.vectors import VectorStore

if TYPE_CHECKING:
    from conftest import Parts

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("PAIRDR_KILLS", "2"))
PART = 8
QUERIES = {"mine": 2 * 144, "label": 3 * 48}
"""Queries that are ranked, twice each, or scored."""


def act(action: str, toy: Path, made: Path, output: Path, log: Path) -> None:
    """Mine or label; note every query whose hits or scores are new."""
    mine.PART = scoring.PART = PART

    def note(count: int) -> None:
        time.sleep(0.01)
        with log.open("a") as stream:
            stream.write("\n" * count)

    class SlowTeacher(LexicalTeacher):
        def score(self, queries: Any, candidates: Any) -> Any:
            note(len(queries))
            return super().score(queries, candidates)

    def slow(rank: Any) -> Any:
        def ranking(*arguments: Any) -> Any:
            for ids, hits in rank(*arguments):
                note(len(ids))
                yield ids, hits

        return ranking

    data, index = open_collection(toy), LexicalIndex(made / "bm25")
    if action == "label":
        config = LabelConfig(label_depth=5, s_pos=2.0, s_neg=1.4)
        label_examples(data, read_candidates(made / "candidates"), SlowTeacher(index), config, output)
        return
    mine.rank_dense, mine.rank_words = slow(mine.rank_dense), slow(mine.rank_words)
    encoder = DualEncoder.open(made / "models" / "start", device="cpu")
    mine_candidates(data, encoder, VectorStore(made / "vectors"), index, MineConfig(depth=9), output)


def start_child(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the action in a process of its own and wait until it has loaded what it needs."""
    child = subprocess.Popen([sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    return child


def count(log: Path) -> int:
    return len(log.read_text()) if log.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, toy: Path, toy_parts: Parts
) -> dict[str, tuple[str, float, Path]]:
    """Return the fingerprint that each action ends with when nobody kills it, its seconds, and what it reads."""
    made, found = toy_parts.start.parent.parent, {}
    for action, queries in QUERIES.items():
        folder = tmp_path_factory.mktemp(action)
        child, begin = start_child(action, toy, made, folder / "out", folder / "log"), time.perf_counter()
        child.communicate(timeout=120)
        assert (child.returncode, count(folder / "log")) == (0, queries)
        found[action] = verify_artefact(folder / "out").fingerprint, time.perf_counter() - begin, made
    return found


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("action", QUERIES)
def test_what_a_killed_call_has_finished_is_kept(
    undisturbed: dict[str, tuple[str, float, Path]], toy: Path, tmp_path: Path, action: str, number: int
) -> None:
    fingerprint, seconds, made = undisturbed[action]
    output, log = tmp_path / "out", tmp_path / "log"
    child = start_child(action, toy, made, output, log)
    moment = random.Random(f"{action}{number}").random() * seconds
    time.sleep(moment)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    whole = output.exists()
    parts = [path for path in (tmp_path / "out.parts").rglob("*-*") if not path.name.startswith((".", "merged"))]
    kept = QUERIES[action] if whole else PART * len(parts)
    print(f"{action} {number + 1}: killed after {moment:.3f} of {seconds:.3f} s, {kept} of {QUERIES[action]} kept")
    assert kept >= count(log) - PART
    log.unlink(missing_ok=True)
    act_again = start_child(action, toy, made, output, log)
    act_again.communicate(timeout=120)
    assert act_again.returncode == 0
    assert count(log) == QUERIES[action] - (0 if whole else kept)
    assert verify_artefact(output).fingerprint == fingerprint
    assert not (tmp_path / "out.parts").exists()


if __name__ == "__main__":
    print("ready", flush=True)
    act(sys.argv[1], *map(Path, sys.argv[2:]))
