"""An index build that is killed at random moments (kill -9): readers see the old index or the new one, whole.

PAIRDR_KILLS says how often (2); `make test-crash` kills 20 times and prints a line for each.
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

from pairdr.artefact import read_manifest, verify_artefact
from pairdr.indexes.faiss import FaissIndex

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from test_faiss import QUERIES, THREE, MemoryStore, build_index, options  # noqa: E402

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("PAIRDR_KILLS", "2"))
CHILD = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from test_faiss import QUERIES, THREE, MemoryStore, build_index, load_faiss, options
load_faiss()
import time
print("ready", flush=True)
begin = time.perf_counter()
build_index(MemoryStore(THREE), options(), sys.argv[1], QUERIES)
print(time.perf_counter() - begin, flush=True)
"""


def start_build(folder: Path) -> subprocess.Popen[str]:
    """Start a build in a process of its own and wait until it has loaded what it needs."""
    command = [sys.executable, "-c", CHILD, str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """Return the fingerprint of a build that nobody killed, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed") / "index"
    child = start_build(folder)
    seconds, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    return read_manifest(folder).fingerprint, float(seconds)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_build_leaves_the_old_index_or_the_new_one(
    undisturbed: tuple[str, float], tmp_path: Path, number: int
) -> None:
    new, seconds = undisturbed
    folder, store = tmp_path / "index", MemoryStore(THREE)
    build_index(store, options(quantiser="pq"), folder, QUERIES)
    old = read_manifest(folder).fingerprint
    assert old != new
    child = start_build(folder)
    moment = random.Random(number).random() * seconds
    time.sleep(moment)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    found = verify_artefact(folder).fingerprint
    assert found in (old, new)
    rows, _ = FaissIndex.open(folder, store).search(QUERIES, 5)  # type: ignore[arg-type]
    assert (rows >= 0).all()
    which = "new" if found == new else "old"
    print(f"{number + 1}: killed after {moment:.3f} of {seconds:.3f} s; the {which} index is there")
    child = start_build(folder)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    assert verify_artefact(folder).fingerprint == new
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
