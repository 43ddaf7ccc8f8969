"""Data at URLs and corpora of many files: the collection is the one of a folder; errors name URL and line."""

from __future__ import annotations

import gzip
import shutil
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairdr.artefact import verify_artefact
from pairdr.cli import main
from pairdr.collection import open_collection
from pairdr.errors import DataError, MissingExtraError, UsageError
from pairdr.lines import UrlPath, copy_file, find_place, stamp_place
from pairdr.vectors import VectorStore


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """Return fsspec's file system in memory, empty before and after."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def url(memory: fsspec.AbstractFileSystem, toy: Path) -> str:
    for path in toy.rglob("*.*"):
        memory.pipe_file(f"/bucket/toy/{path.relative_to(toy).as_posix()}", path.read_bytes())
    return "memory://bucket/toy"


# --- URLs -------------------------------------------------------------------------------------------------------------


def test_a_url_holds_what_the_folder_holds(url: str, toy: Path, tmp_path: Path) -> None:
    archived = tmp_path / "toy.zip"
    with zipfile.ZipFile(archived, "w") as archive:
        for path in toy.rglob("*.*"):
            archive.write(path, path.relative_to(toy))
    plain = open_collection(toy)
    for name in (url, f"{url}/", toy.as_uri(), f"zip://::{archived.as_uri()}"):
        data = open_collection(name)
        assert data.fingerprint == plain.fingerprint
        assert open_collection(Path(name)).folder == data.folder  # as the command line has it
    assert open_collection(url).name == "toy"
    assert open_collection(f"zip://::{archived.as_uri()}").name == "toy.zip"


def test_a_url_is_converted_again_when_a_file_changes(url: str, memory: fsspec.AbstractFileSystem) -> None:
    first = open_collection(url)
    assert open_collection(url).folder == first.folder
    memory.pipe_file(
        "/bucket/toy/queries.jsonl", memory.cat("/bucket/toy/queries.jsonl").replace(b"which river", b"what river")
    )
    second = open_collection(url)
    assert second.folder != first.folder
    assert second.passages_fingerprint == first.passages_fingerprint
    assert second.fingerprint != first.fingerprint


def test_a_place_that_tells_only_its_size_is_never_taken_for_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    system = fsspec.filesystem("memory")
    monkeypatch.setattr(type(system), "info", lambda self, path: {"name": path, "size": 3})
    place = UrlPath("memory://x")
    assert stamp_place(place)[:2] == stamp_place(place)[:2] == ["memory://x", 3]
    assert stamp_place(place) != stamp_place(place)


def test_errors_name_url_and_line(url: str, memory: fsspec.AbstractFileSystem) -> None:
    corpus = memory.cat("/bucket/toy/corpus.jsonl")
    memory.pipe_file("/bucket/toy/corpus.jsonl", corpus + b"{broken\n")
    with pytest.raises(DataError, match=rf"^{url}/corpus\.jsonl:121: Broken JSON"):
        open_collection(url)
    memory.rm("/bucket/toy/corpus.jsonl")
    memory.pipe_file("/bucket/toy/corpus.jsonl.gz", gzip.compress(corpus)[:-9])
    with pytest.raises(DataError, match=rf"^{url}/corpus\.jsonl\.gz:\d+: The gzip file is broken"):
        open_collection(url)
    memory.rm("/bucket/toy/corpus.jsonl.gz")
    with pytest.raises(UsageError, match=rf"^{url}: corpus\.jsonl \(or \.jsonl\.gz\) is missing"):
        open_collection(url)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nosuch://bucket/data", "nosuch://bucket/data/corpus.jsonl: The place cannot be read: Protocol not known"),
        (f"zip://::{Path('/nowhere/x.zip').as_uri()}", "The place cannot be read"),
    ],
)
def test_a_place_that_cannot_be_read_is_a_usage_error(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_collection(name)


def test_a_file_system_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", refuse)
    with pytest.raises(UsageError, match="Install s3fs to access S3"):
        open_collection("s3://bucket/data")


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtraError, match=r"pairdr\[ray\]"):
        open_collection("memory://data")


def test_vectors_of_a_url_stand_in_a_folder_and_nowhere_else(
    url: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for output, code in (("memory://bucket/vectors", 2), ("vectors", 0)):
        with pytest.raises(SystemExit) as end:
            main(["encode", url, "-o", output, "--start", str(tiny_model)])
        assert end.value.code == code
    assert "memory-mapped" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["vectors"]
    verify_artefact(tmp_path / "vectors")
    assert VectorStore(tmp_path / "vectors").live == 120


SEGMENTS = st.text("abz09-_.", min_size=1, max_size=6).filter(lambda part: part.strip("."))


@given(st.sampled_from(["s3", "gs", "memory", "file", "hdfs", "https"]), st.lists(SEGMENTS, min_size=1, max_size=4))
def test_a_url_that_was_taken_for_a_path_is_the_url_again(scheme: str, parts: list[str]) -> None:
    name = f"{scheme}://" + "/" * (scheme == "file") + "/".join(parts)
    for given_name in (name, Path(name), f"{name}/"):
        place = find_place(given_name)
        assert isinstance(place, UrlPath)
        assert str(place) == name
    assert str(place / "corpus.jsonl") == f"{name}/corpus.jsonl"
    assert (place / "qrels").name == "qrels"
    assert str(find_place(f"zip://{parts[0]}::{name}") / "x") == f"zip://{parts[0]}/x::{name}"


@pytest.mark.parametrize("url", ["http://me:topsecret@127.0.0.1:9/x", "zip://x::http://me:topsecret@127.0.0.1:9/x.zip"])
def test_a_password_in_a_url_is_never_shown(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(find_place(url)) == url.replace("topsecret", "***")
    with pytest.raises(SystemExit):
        main(["check", url, "-o", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "me:***@127.0.0.1" in said and "topsecret" not in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://u:p@ss@host/x", "ftp://u:***@host/x"), ("ftp://u:pa/ss@host/x", "ftp://u:***@host/x"),
        ("http://host:80/a@b", "http://host:80/a@b"), ("zip://a::http://h/x@y", "zip://a::http://h/x@y"),
    ],
)  # fmt: skip
def test_odd_passwords_are_not_shown_either(url: str, shown: str) -> None:
    assert str(find_place(url)) == shown


@pytest.mark.parametrize("name", ["data", "/data/x", "ir:", "a b/c", "x:y"])
def test_what_is_no_url_is_a_path(name: str) -> None:
    assert find_place(name) == Path(name)


def test_a_folder_that_looks_like_a_url_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3:" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_place("s3:/data") == Path("s3:/data")


def test_a_file_is_copied_from_a_url(url: str, toy: Path, tmp_path: Path) -> None:
    copy_file(UrlPath(url) / "corpus.jsonl", tmp_path / "new" / "c.jsonl")
    assert (tmp_path / "new" / "c.jsonl").read_bytes() == (toy / "corpus.jsonl").read_bytes()


# --- many files -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 120), max_size=4), st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_corpus_of_many_files_is_that_of_one(
    toy: Path, tmp_path_factory: pytest.TempPathFactory, cuts: list[int], packed: list[bool]
) -> None:
    folder = tmp_path_factory.mktemp("many")
    lines = (toy / "corpus.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "corpus").mkdir()
    borders = [0, *sorted(cuts), len(lines)]
    for number, (begin, end) in enumerate(pairwise(borders)):
        content = b"".join(lines[begin:end])
        name = f"part-{number}.jsonl" + ".gz" * packed[number]
        (folder / "corpus" / name).write_bytes(gzip.compress(content) if packed[number] else content)
    (folder / "corpus" / "README.md").write_text("no part of it")
    shutil.copyfile(toy / "queries.jsonl", folder / "queries.jsonl")
    shutil.copytree(toy / "qrels", folder / "qrels")
    assert open_collection(folder).fingerprint == open_collection(toy).fingerprint


def test_a_new_file_of_a_corpus_is_seen_and_a_broken_one_named(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy, tmp_path / "data")
    (tmp_path / "data" / "corpus").mkdir()
    (tmp_path / "data" / "corpus.jsonl").rename(tmp_path / "data" / "corpus" / "a.jsonl")
    assert len(open_collection(tmp_path / "data").passages) == 120
    more = tmp_path / "data" / "corpus" / "b.jsonl"
    more.write_text('{"_id": "new", "text": "more"}\n')
    assert len(open_collection(tmp_path / "data").passages) == 121
    more.write_text('{"_id": "new", "text": "more"}\n{"_id": "x"}\n')
    with pytest.raises(DataError, match=rf"^{more}:2: \"text\" is missing"):
        open_collection(tmp_path / "data")
