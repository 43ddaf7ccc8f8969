"""A disk that is really full: a small tmpfs that grows by a page until the call succeeds, failing at every place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_kill_store import HELD, act, prepare

from pairdr.artefact import MANIFEST, verify_artefact
from pairdr.errors import ArtefactError
from pairdr.vectors import VectorStore

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from storing import read_texts  # noqa: E402

pytestmark = pytest.mark.slow
PAGE = os.sysconf("SC_PAGE_SIZE")
SPACE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Runs a command that may mount, in a space of its own, without rights on the machine."""


def may_mount(folder: Path) -> bool:
    """Return whether this machine lets anybody mount a tmpfs in a space of their own."""
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run([*SPACE, "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.parametrize("action", HELD)
def test_a_full_disk_leaves_the_old_version_wherever_it_strikes(tmp_path: Path, action: str) -> None:
    if not may_mount(tmp_path):
        pytest.skip("this machine lets nobody mount a tmpfs")
    for place in ("full", "undisturbed"):
        (tmp_path / place).mkdir()
    prepare(action, tmp_path / "undisturbed")
    act(action, tmp_path / "undisturbed")
    command = [*SPACE, sys.executable, __file__, action, str(tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fingerprint"] == verify_artefact(tmp_path / "undisturbed" / "v").fingerprint
    assert found["failed"] >= 5
    print(f"{action}: failed {found['failed']} times, then ended as an undisturbed call")


def fill_until_it_fits(action: str, folder: Path) -> dict[str, object]:
    """Call the action on a disk that has another page each time, and look at the store after each failure."""
    place = folder / "v"
    place.mkdir()
    mount(place, "nr_inodes=0")
    prepare(action, folder)
    before, _ = HELD[action]
    failed, pages = 0, count_pages(place)
    while True:
        pages = max(pages + 1, count_pages(place))
        mount(place, f"remount,size={pages * PAGE}")
        try:
            act(action, folder)
        except ArtefactError as error:
            assert "No space left on device" in str(error), error
            assert "what was there before is untouched" in str(error)
            failed += 1
        else:
            return {"fingerprint": verify_artefact(place).fingerprint, "failed": failed}
        seen = None
        if (place / MANIFEST).exists():
            verify_artefact(place)
            seen = read_texts(VectorStore(place))
        assert seen == before, (action, failed)


def count_pages(place: Path) -> int:
    """Return how many pages are in use."""
    stat = os.statvfs(place)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize // PAGE


def mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], check=True)


if __name__ == "__main__":
    print(json.dumps(fill_until_it_fits(sys.argv[1], Path(sys.argv[2]))))
