"""What the checks say of themselves: what is left out is said so, and where all is to run, all does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Return a folder with the few programs that are found: no browser."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "env"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def write_program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def test_browser_tests_that_are_left_out_are_named(programs: Path) -> None:
    call = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_serve_page.py"]
    found = subprocess.run(
        call, cwd=ROOT, env={**os.environ, "PATH": str(programs)}, capture_output=True, text=True, check=False
    )
    lines = [line for line in found.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(lines) == 1, found.stdout
    assert "the pages are not tested: there is no Chromium with chromedriver" in lines[0]


@pytest.mark.parametrize(
    ("user", "there", "fails", "code", "ran"),
    [
        (0, (), "update", 1, []),
        (0, (), "install", 1, []),
        (0, ("chromedriver",), "install", 1, []),  # of a browser that was taken away
        (0, (), "nothing", 0, ["update", "install", "make test"]),
        (0, ("chromium", "chromedriver"), "update", 0, ["make test"]),
        (1000, (), "update", 0, ["make test"]),
    ],
)
def test_the_merge_check_fails_where_a_browser_should_be_and_is_not(
    programs: Path, tmp_path: Path, user: int, there: tuple[str, ...], fails: str, code: int, ran: list[str]
) -> None:
    log = tmp_path / "log"
    log.touch()
    write_program(programs, "id", f"echo {user}")
    write_program(programs, "apt-get", f'[ "$1" != {fails} ] || exit 100; echo "$1" >> {log}')
    write_program(programs, "make", f'echo "make $*" >> {log}')
    for name in there:
        write_program(programs, name, "")
    shell = str(shutil.which("bash"))
    found = subprocess.run(
        [shell, ROOT / ".ci" / "run"], env={"PATH": str(programs)}, capture_output=True, text=True, check=False
    )
    assert found.returncode == code
    assert ("Chromium could not be installed" in found.stderr) == (code != 0)
    done = log.read_text(encoding="utf-8").splitlines()
    assert done == ran or (code and "make test" not in done)
