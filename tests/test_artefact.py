"""Artefacts: whole or absent, equal content gives equal fingerprints, and damage is named."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from textwrap import dedent

import pytest
from manifests import rewrite_manifest

from pairdr import artefact
from pairdr.artefact import FORMAT_VERSION, MANIFEST, publish, read_manifest, verify_artefact
from pairdr.errors import ArtefactError, PairdrError, UsageError
from pairdr.files import hash_file
from pairdr.files import replace_file as replace_small_file


def write_thing(folder: Path, text: str = "content", *, kind: str = "thing", options: dict | None = None) -> Path:
    with publish(folder, kind, options=options or {}, inputs={}) as staging:
        (staging.path / "part").mkdir()
        (staging.path / "part" / "a.txt").write_text(text, encoding="utf-8")
        (staging.path / "b.txt").write_text("b", encoding="utf-8")
    return folder


def read_thing(folder: Path) -> str:
    """Read the content through the manifest, as a stage does."""
    verify_artefact(folder)
    return (folder / "part" / "a.txt").read_text(encoding="utf-8")


def change_manifest(folder: Path, **changes: object) -> None:
    rewrite_manifest(folder, lambda content: content.update(changes))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_child(program: str, folder: Path) -> int:
    """Run a program that publishes "new" into the folder in a process of its own; return its exit status."""
    head = "import os, signal, sys\nfrom pathlib import Path\nimport pairdr.artefact as artefact\n"
    die = "def die(*rest):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    arguments = [sys.executable, "-c", head + die + dedent(program), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.run(arguments, env=environment, check=False, capture_output=True).returncode


def test_a_manifest_names_every_file_with_size_and_hash(tmp_path: Path) -> None:
    with publish(tmp_path / "x", "thing", options={"k": 3}, inputs={"data": "abc"}) as staging:
        (staging.path / "a.txt").write_text("four", encoding="utf-8")
        staging.facts["count"] = 1
    manifest = read_manifest(tmp_path / "x", "thing")
    assert manifest.files == {"a.txt": {"sha256": hash_file(tmp_path / "x" / "a.txt"), "bytes": 4}}
    assert (manifest.options, manifest.inputs, manifest.facts) == ({"k": 3}, {"data": "abc"}, {"count": 1})


def test_nothing_stands_at_its_place_before_the_block_has_ended(tmp_path: Path) -> None:
    with publish(tmp_path / "x", "thing", options={}, inputs={}) as staging:
        (staging.path / "a.txt").write_text("a", encoding="utf-8")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "a.txt").is_file()


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_one_and_no_trace(tmp_path: Path, error: BaseException) -> None:
    folder = write_thing(tmp_path / "x", "old")
    with pytest.raises(type(error)), publish(folder, "thing", options={}, inputs={}) as staging:
        (staging.path / "a.txt").write_text("half", encoding="utf-8")
        raise error
    assert read_thing(folder) == "old"
    assert names_in(tmp_path) == ["x"]


def test_a_new_one_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x", "old")
    with publish(folder, "thing", options={}, inputs={}) as staging:
        (staging.path / "other.txt").write_text("new", encoding="utf-8")
    assert names_in(folder) == [MANIFEST, "other.txt"]
    assert names_in(tmp_path) == ["x"]


def test_equal_content_has_an_equal_fingerprint_whatever_the_options(tmp_path: Path) -> None:
    first = read_manifest(write_thing(tmp_path / "x", options={"seed": 1}))
    second = read_manifest(write_thing(tmp_path / "y", options={"seed": 2}))
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("change", [{"text": "other content"}, {"kind": "other kind"}])
def test_other_content_or_kind_has_another_fingerprint(tmp_path: Path, change: dict[str, str]) -> None:
    first = read_manifest(write_thing(tmp_path / "x"))
    assert read_manifest(write_thing(tmp_path / "y", **change)).fingerprint != first.fingerprint


def test_verify_names_the_file_with_a_flipped_byte(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x", "content")
    (folder / "part" / "a.txt").write_text("cantent", encoding="utf-8")
    read_manifest(folder)  # the sizes are right
    with pytest.raises(ArtefactError, match=r"part/a\.txt is not the file that was written"):
        verify_artefact(folder)


def test_a_cut_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x", "content")
    os.truncate(folder / "part" / "a.txt", 3)
    with pytest.raises(ArtefactError, match=r"part/a\.txt has 3 bytes, the manifest says 7"):
        read_manifest(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x")
    (folder / "b.txt").unlink()
    with pytest.raises(ArtefactError, match=r"b\.txt is missing"):
        read_manifest(folder)


def test_another_kind_is_refused_and_both_are_named(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x", kind="vectors")
    with pytest.raises(ArtefactError, match="holds 'vectors', not 'model'"):
        read_manifest(folder, "model")


@pytest.mark.parametrize("folder", ["absent", "."])
def test_a_folder_without_a_manifest_is_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ArtefactError, match="No model here"):
        read_manifest(tmp_path / folder, "model")


def test_a_reader_that_comes_between_two_versions_reads_the_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_thing(tmp_path / "x", "old")
    find = artefact._find_missing
    asked: list[str] = []

    def find_late(manifest: artefact.Manifest, place: Path) -> str | None:
        asked.append(manifest.fingerprint)
        if len(asked) == 1:  # while the files are looked at, they are replaced by longer ones
            write_thing(folder, "the new content")
        return find(manifest, place)

    monkeypatch.setattr(artefact, "_find_missing", find_late)
    assert read_manifest(folder).fingerprint == asked[-1] != asked[0]


def test_a_reader_waits_where_a_folder_is_just_being_replaced(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x", "content")
    staging = folder.rename(tmp_path / ".x.new.partial")
    timer = threading.Timer(0.1, lambda: staging.rename(folder))
    timer.start()
    try:
        assert read_manifest(folder).kind == "thing"
    finally:
        timer.join()


def test_what_is_read_is_of_one_version(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x", "old")
    seen: list[str] = []

    def read(manifest: artefact.Manifest) -> str:
        seen.append((folder / "part" / "a.txt").read_text(encoding="utf-8"))
        if len(seen) == 1:
            write_thing(folder, "new")
        if len(seen) == 2:
            write_thing(folder, "newest")
            raise ValueError("two halves that do not fit")
        return seen[-1]

    assert artefact.read_whole(folder, "thing", read) == "newest"
    assert seen == ["old", "new", "newest"]
    with pytest.raises(ZeroDivisionError):
        artefact.read_whole(folder, "thing", lambda manifest: 1 / 0)


def test_a_manifest_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x")
    path = folder / MANIFEST
    path.write_text(path.read_text(encoding="utf-8").replace('"thing"', '"thong"'), encoding="utf-8")
    with pytest.raises(ArtefactError, match=f"{MANIFEST}: The manifest is not the one that was written: its seal"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "thing"}', '{"a": 1}'])
def test_a_broken_manifest_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    folder = write_thing(tmp_path / "x")
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ArtefactError, match=f"{MANIFEST}: The manifest cannot be read"):
        read_manifest(folder)


def test_a_manifest_with_a_broken_list_of_files_is_refused(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x")
    change_manifest(folder, files={"b.txt": {}})
    with pytest.raises(ArtefactError, match="The manifest cannot be read"):
        read_manifest(folder)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x")
    change_manifest(folder, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ArtefactError, match=f"Format version {FORMAT_VERSION + 1} is not the {FORMAT_VERSION}"):
        read_manifest(folder)


DISK_FULL = {
    "plain": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "numpy": OSError("1000000 requested and 262112 written"),
    "safetensors": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("writer", DISK_FULL)
def test_a_full_disk_is_an_artefact_error_and_the_old_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, resume: bool
) -> None:
    folder = write_thing(tmp_path / "x", "old")

    def fail(*_: object, **__: object) -> None:
        raise DISK_FULL[writer]

    with (
        pytest.raises(ArtefactError, match="No space left on device") as caught,
        publish(folder, "thing", options={}, inputs={}, resume=resume) as staging,
        monkeypatch.context() as patch,
    ):
        patch.setattr(Path, "write_text", fail)
        (staging.path / "a.txt").write_text("new")
    assert str(folder) in str(caught.value)
    assert "untouched" in str(caught.value)
    assert read_thing(folder) == "old"


def test_a_disk_that_fills_while_the_manifest_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_thing(tmp_path / "x", "old")

    def fail(*_: object) -> None:
        raise DISK_FULL["plain"]

    monkeypatch.setattr("pairdr.artefact.write_json", fail)
    with pytest.raises(ArtefactError, match="No space left on device"):
        write_thing(folder, "new")
    assert read_thing(folder) == "old"


def test_an_error_of_pairdr_is_never_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PairdrError) as caught, publish(tmp_path / "x", "thing", options={}, inputs={}):
        raise PairdrError("The teacher said: No space left on device.")
    assert type(caught.value) is PairdrError


def interrupt(folder: Path, options: dict[str, int]) -> None:
    """Write one file of a resumable artefact and stop."""
    with pytest.raises(KeyboardInterrupt), publish(folder, "thing", options=options, inputs={}, resume=True) as staging:
        (staging.path / "first.txt").write_text("first", encoding="utf-8")
        raise KeyboardInterrupt


def test_resume_takes_up_the_files_of_an_interrupted_call_with_the_same_options(tmp_path: Path) -> None:
    interrupt(tmp_path / "x", {"size": 1})
    with publish(tmp_path / "x", "thing", options={"size": 1}, inputs={}, resume=True) as staging:
        assert names_in(staging.path) == ["first.txt"]
    assert (tmp_path / "x" / "first.txt").read_text(encoding="utf-8") == "first"


def test_resume_drops_the_files_of_a_call_with_other_options(tmp_path: Path) -> None:
    interrupt(tmp_path / "x", {"size": 1})
    with publish(tmp_path / "x", "thing", options={"size": 2}, inputs={}, resume=True) as staging:
        assert names_in(staging.path) == []
    assert names_in(tmp_path) == ["x"]


def test_resume_drops_the_files_of_a_call_with_other_inputs(tmp_path: Path) -> None:
    interrupt(tmp_path / "x", {"size": 1})
    with publish(tmp_path / "x", "thing", options={"size": 1}, inputs={"model": "b"}, resume=True) as staging:
        assert names_in(staging.path) == []


def test_a_call_without_resume_starts_from_nothing(tmp_path: Path) -> None:
    interrupt(tmp_path / "x", {"size": 1})
    with publish(tmp_path / "x", "thing", options={"size": 1}, inputs={}) as staging:
        assert names_in(staging.path) == []


def test_the_unfinished_work_of_a_neighbour_with_a_longer_name_is_left_alone(tmp_path: Path) -> None:
    interrupt(tmp_path / "pair.v2", {"size": 1})
    write_thing(tmp_path / "pair")
    with publish(tmp_path / "pair.v2", "thing", options={"size": 1}, inputs={}, resume=True) as staging:
        assert names_in(staging.path) == ["first.txt"]


def test_a_name_with_brackets_is_published_twice(tmp_path: Path) -> None:
    interrupt(tmp_path / "run[1]", {"size": 1})
    write_thing(tmp_path / "run[1]", "old")
    assert read_thing(write_thing(tmp_path / "run[1]", "new")) == "new"
    assert names_in(tmp_path) == ["run[1]"]


KILLS = {
    "while files are written": """
        with artefact.publish(sys.argv[1], "thing", options={}, inputs={}) as staging:
            (staging.path / "part").mkdir()
            (staging.path / "part" / "a.txt").write_text("new")
            die()
        """,
    "while the manifest is written": """
        artefact.write_json = die
        with artefact.publish(sys.argv[1], "thing", options={}, inputs={}) as staging:
            (staging.path / "part").mkdir()
            (staging.path / "part" / "a.txt").write_text("new")
        """,
    "before the first rename": """
        artefact._swap = die
        with artefact.publish(sys.argv[1], "thing", options={}, inputs={}) as staging:
            (staging.path / "part").mkdir()
            (staging.path / "part" / "a.txt").write_text("new")
        """,
    "between the two renames": """
        rename = Path.rename
        def rename_once(path, target):
            rename(path, target)
            die()
        Path.rename = rename_once
        with artefact.publish(sys.argv[1], "thing", options={}, inputs={}) as staging:
            (staging.path / "part").mkdir()
            (staging.path / "part" / "a.txt").write_text("new")
        """,
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_leaves_the_old_one_readable(tmp_path: Path, moment: str) -> None:
    folder = write_thing(tmp_path / "x", "old")
    assert run_child(KILLS[moment], folder) == -signal.SIGKILL
    assert read_thing(folder) == "old"


@pytest.mark.parametrize("moment", KILLS)
def test_the_call_after_a_kill_publishes_and_cleans_up(tmp_path: Path, moment: str) -> None:
    folder = write_thing(tmp_path / "x", "old")
    assert run_child(KILLS[moment], folder) == -signal.SIGKILL
    assert read_thing(write_thing(folder, "newer")) == "newer"
    assert names_in(tmp_path) == ["x"]


def test_a_kill_while_the_old_one_is_deleted_leaves_the_new_one(tmp_path: Path) -> None:
    folder = write_thing(tmp_path / "x", "old")
    program = """
        artefact.shutil.rmtree = die
        with artefact.publish(sys.argv[1], "thing", options={}, inputs={}) as staging:
            (staging.path / "part").mkdir()
            (staging.path / "part" / "a.txt").write_text("new")
        """
    assert run_child(program, folder) == -signal.SIGKILL
    assert read_thing(folder) == "new"


def test_the_deleted_rest_of_an_old_one_is_never_brought_back(tmp_path: Path) -> None:
    test_a_kill_while_the_old_one_is_deleted_leaves_the_new_one(tmp_path)
    (tmp_path / "x").rename(tmp_path / "moved")
    with pytest.raises(ArtefactError, match="No thing here"):
        read_manifest(tmp_path / "x", "thing")


def test_a_reader_that_restores_the_old_one_during_the_swap_does_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_thing(tmp_path / "x", "old")
    rename, renamed = Path.rename, []

    def rename_and_read(path: Path, target: Path) -> Path:
        result = rename(path, target)
        renamed.append(target)
        if len(renamed) == 1:
            assert read_thing(folder) == "old"
        return result

    monkeypatch.setattr(Path, "rename", rename_and_read)
    write_thing(folder, "new")
    assert read_thing(folder) == "new"


def test_a_replaced_small_file_keeps_no_temporary_one(tmp_path: Path) -> None:
    replace_small_file(tmp_path / "work.json", "old")
    replace_small_file(tmp_path / "work.json", "new")
    assert (tmp_path / "work.json").read_text(encoding="utf-8") == "new"
    assert names_in(tmp_path) == ["work.json"]


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UsageError, match="other files"), publish(tmp_path, "vectors", options={}, inputs={}):
        raise AssertionError("the block must not run")
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize(
    ("manifest", "held"),
    [
        ('{"kind": "plugin", "version": 3}', "'plugin'"),
        ('{"kind": "plugin", "files": ["thesis.txt"]}', "'plugin'"),
        ('{"name": "my app"}', "other files"),
        ("[1]", "other files"),
        ("{", "other files"),
    ],
)
def test_a_manifest_of_another_program_is_none_of_ours(tmp_path: Path, manifest: str, held: str) -> None:
    (tmp_path / MANIFEST).write_text(manifest, encoding="utf-8")
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UsageError, match=held), publish(tmp_path, "vectors", options={}, inputs={}):
        raise AssertionError("the block must not run")
    assert names_in(tmp_path) == [MANIFEST, "thesis.txt"]


@pytest.mark.parametrize("name", ["notes.txt", "part/notes.txt", ".git/HEAD", "README.md", "link"])
def test_what_people_put_into_a_folder_is_not_replaced(tmp_path: Path, name: str) -> None:
    folder = write_thing(tmp_path / "x", "old")
    if name == "link":
        (folder / name).symlink_to(tmp_path)
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=f"This folder also holds {name}, which would be lost with it"):
        write_thing(folder, "new")
    assert read_thing(folder) == "old"


@pytest.mark.parametrize("name", [".DS_Store", "part/Thumbs.db", f".{MANIFEST}.k3j", ".a.txt.swp"])
def test_what_systems_and_killed_calls_leave_is_nobodys(tmp_path: Path, name: str) -> None:
    folder = write_thing(tmp_path / "x", "old")
    (folder / name).touch()
    assert read_thing(write_thing(folder, "new")) == "new"


def test_an_artefact_of_another_kind_is_never_replaced(tmp_path: Path) -> None:
    with publish(tmp_path / "a", "model", options={}, inputs={}) as staging:
        (staging.path / "weights").write_text("w", encoding="utf-8")
    with pytest.raises(UsageError, match="'model'"), publish(tmp_path / "a", "vectors", options={}, inputs={}):
        raise AssertionError("the block must not run")
    assert read_manifest(tmp_path / "a", "model").kind == "model"


def test_a_file_is_no_place_for_an_artefact(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError), publish(tmp_path / "corpus.jsonl", "vectors", options={}, inputs={}):
        raise AssertionError("the block must not run")
    assert (tmp_path / "corpus.jsonl").read_text(encoding="utf-8") == "{}"


def test_facts_count_in_the_fingerprint(tmp_path: Path) -> None:
    for name, temperature in (("a", 0.05), ("b", 1.0)):
        with publish(tmp_path / name, "model", options={}, inputs={}) as staging:
            staging.facts["temperature"] = temperature
    assert read_manifest(tmp_path / "a").fingerprint != read_manifest(tmp_path / "b").fingerprint
