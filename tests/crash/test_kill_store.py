"""Encoding, upserts and compactions killed at random moments (kill -9): readers see a whole version, old or new.

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

import pytest

from pairdr.artefact import MANIFEST, verify_artefact

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from storing import SMALL, WordEncoder, make_texts, read_texts, to_passages, write_collection  # noqa: E402

from pairdr.encode import encode_corpus, upsert_passages  # noqa: E402
from pairdr.vectors import VectorStore  # noqa: E402
from pairdr.versions import compact_store, delete_passages, verify_store  # noqa: E402

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("PAIRDR_KILLS", "2"))
OLD, NEW = make_texts(40), make_texts(40, 100)
GONE = [f"p{number:03d}" for number in range(0, 40, 3)]
HELD = {
    "encode": (None, OLD),
    "upsert": (OLD, OLD | NEW),
    "compact": ({i: text for i, text in OLD.items() if i not in GONE},) * 2,
}
"""What a store holds before and after each."""


class SlowEncoder(WordEncoder):
    """Takes its time, so that a kill falls between and into shards."""

    def encode_passages(self, passages, tokens_per_batch=None):  # type: ignore[no-untyped-def]
        time.sleep(0.02)
        return super().encode_passages(passages, tokens_per_batch)


def prepare(action: str, folder: Path) -> None:
    """Make what the action changes."""
    data = write_collection(folder / "data", OLD)
    if action != "encode":
        encode_corpus(data, WordEncoder(), SMALL, folder / "v")
    if action == "compact":
        delete_passages(folder / "v", GONE)


def act(action: str, folder: Path) -> None:
    """Change the store: what the child does, and what is called again after it was killed."""
    if action == "encode":
        encode_corpus(write_collection(folder / "data", OLD), SlowEncoder(), SMALL, folder / "v")
    elif action == "upsert":
        upsert_passages(to_passages(NEW), SlowEncoder(), SMALL, folder / "v")
    else:
        compact_store(folder / "v")


def start_child(action: str, folder: Path) -> subprocess.Popen[str]:
    """Start the action in a process of its own and wait until it has loaded what it needs."""
    child = subprocess.Popen([sys.executable, __file__, action, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """Return the fingerprint that each action ends with when nobody kills it, and its seconds."""
    found = {}
    for action in HELD:
        folder = tmp_path_factory.mktemp(action)
        prepare(action, folder)
        child, begin = start_child(action, folder), time.perf_counter()
        child.communicate(timeout=60)
        assert child.returncode == 0
        found[action] = verify_artefact(folder / "v").fingerprint, time.perf_counter() - begin
    return found


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("action", HELD)
def test_a_killed_writer_leaves_a_whole_version(
    undisturbed: dict[str, tuple[str, float]], tmp_path: Path, action: str, number: int
) -> None:
    fingerprint, seconds = undisturbed[action]
    prepare(action, tmp_path)
    child = start_child(action, tmp_path)
    moment = random.Random(f"{action}{number}").random() * seconds
    time.sleep(moment)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    before, after = HELD[action]
    seen = None
    if (tmp_path / "v" / MANIFEST).exists():
        verify_artefact(tmp_path / "v")
        seen = read_texts(VectorStore(tmp_path / "v"))
    assert seen in (before, after)
    print(f"{action} {number + 1}: killed after {moment:.3f} of {seconds:.3f} s")
    act(action, tmp_path)
    assert verify_artefact(tmp_path / "v").fingerprint == fingerprint
    verify_store(tmp_path / "v")
    assert read_texts(VectorStore(tmp_path / "v")) == after
    assert not list((tmp_path / "v").rglob("*.done"))


if __name__ == "__main__":
    print("ready", flush=True)
    act(sys.argv[1], Path(sys.argv[2]))
