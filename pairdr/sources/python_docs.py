"""The demo's data: questions and passages made of the docstrings of Python and of the libraries pairdr stands on.

Source files are parsed with `ast`; nothing is imported or run. A docstring's summary stands in for a question; the
qualified name, the signature and the rest of the docstring are the passage that answers it:

    find_sources -> read_entries -> merge_entries -> choose_questions -> a BEIR folder

Training, development and test questions come from different sub-packages, chosen once and for all below. This module
knows nothing of models; how well anything ranks had no say in what is kept.
"""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import random
import re
import sysconfig
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from pairdr.artefact import publish
from pairdr.errors import MissingExtraError, UsageError
from pairdr.files import hash_file, hash_json
from pairdr.formats import write_qrels
from pairdr.records import Passage

PACKAGES = ("accelerate", "numpy", "scipy", "sentence_transformers", "torch", "transformers")
TEST_PACKAGES = ("numpy", "scipy.optimize", "scipy.stats", "torch.nn")
DEV_PACKAGES = ("scipy.linalg", "scipy.signal", "scipy.sparse", "torch.distributions", "torch.optim")
SPLITS = ("test", "dev", "train")
HELD_OUT = "held_out.txt"

MIN_SUMMARY_WORDS = 4
MIN_REST_WORDS = 8
MAX_DEFAULT_CHARACTERS = 24

_SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
_SUMMARY_END = re.compile(
    r"""
      (?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?:[ ]*\n|\s+(?=[A-Z]))   # the end of a sentence
    | \n[ ]*\n                                                 # an empty line
    | \n(?=[ ]*(?:[:@*>-]|\.\.|[A-Z]\w+:[ ]*$))                # a field, a list, an example or a heading
    """,
    re.VERBOSE | re.MULTILINE,
)
_NO_SENTENCE = re.compile(r"[\w.*]+ ?\(.*\)(:|$| ->)|:|\.\. |@|>>>")
_UNWRITABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

_T = TypeVar("_T")
_Function = (ast.FunctionDef, ast.AsyncFunctionDef)
_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class SourceTree(NamedTuple):
    """A folder of Python files: the package called `package`, or top-level modules where that is empty."""

    name: str
    version: str
    folder: Path
    package: str


class Entry(NamedTuple):
    """A question, and the passage that answers it; the passage's id is the qualified name."""

    question: str
    passage: Passage

    @property
    def name(self) -> str:
        """Return the qualified name."""
        return self.passage.passage_id

    @property
    def split(self) -> str:
        """Return the split ("test", "dev" or "train") that the name's sub-package belongs to."""
        for split, packages in (("test", TEST_PACKAGES), ("dev", DEV_PACKAGES)):
            if any(f"{self.name}.".startswith(f"{package}.") for package in packages):
                return split
        return "train"


@dataclass
class Tally:
    """What was met while reading: files and what became of them, docstrings, and those dropped, by reason."""

    files: Counter[str] = field(default_factory=Counter)
    docstrings: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def build_python_docs(
    output: Path,
    *,
    passages: int = 6000,
    test_queries: int = 600,
    dev_queries: int = 300,
    train_queries: int = 2000,
    pool_queries: int = 1000,
    seed: int = 13,
    sources: Sequence[SourceTree] | None = None,
) -> Path:
    """Write a BEIR folder of docstrings as an artefact of kind "beir" and return it.

    The pool are the queries that no qrels name; `held_out.txt` names the passages of the test packages. Where fewer
    questions are usable than asked, all are taken, train and pool keeping their ratio. The same sources, sizes and
    seed give the same bytes.

    Args:
        output: where the folder will stand; an earlier one there is replaced.
        passages: size of the corpus: the passages of all questions, filled up with others.
        test_queries: questions from `TEST_PACKAGES`.
        dev_queries: questions from `DEV_PACKAGES`.
        train_queries: labelled questions from everywhere else.
        pool_queries: questions from everywhere else whose label is withheld.
        seed: of the sampling.
        sources: what to read; the standard library and `PACKAGES` as installed, if not given.

    Raises:
        MissingExtraError: one of `PACKAGES` is not installed.
        UsageError: a negative size, or fewer passages than questions.
    """
    sizes = {"test": test_queries, "dev": dev_queries, "train": train_queries, "pool": pool_queries}
    _require_sizes(passages, sizes)
    sources = find_sources() if sources is None else sources
    tally = Tally()
    entries = merge_entries(read_entries(sources, tally), tally)
    chosen = choose_questions(entries, sizes, seed)
    corpus = choose_corpus(entries, chosen, passages, seed)
    versions = {source.name: source.version for source in sources}
    splits = {"test_packages": TEST_PACKAGES, "dev_packages": DEV_PACKAGES}
    options = {"passages": passages, "queries": sizes, "seed": seed, **splits}
    with publish(output, "beir", options=options, inputs=versions) as work:
        _write_folder(work.path, corpus, chosen)
        work.facts = {
            "packages": versions,
            **vars(tally),
            "usable": dict(Counter(entry.split for entry in entries)),
            "queries": {split: len(taken) for split, taken in chosen.items()},
            "passages": len(corpus),
            "content_sha256": _hash_content(work.path),
        }
    return output


def find_sources() -> tuple[SourceTree, ...]:
    """Return the standard library and the installed `PACKAGES`, without importing any.

    Raises:
        MissingExtraError: naming the first package that is not installed.
    """
    library = SourceTree("python", platform.python_version(), Path(sysconfig.get_path("stdlib")), "")
    return (library, *(_find_package(package) for package in PACKAGES))


def read_entries(sources: Iterable[SourceTree], tally: Tally) -> list[Entry]:
    """Return every usable docstring below the sources' folders; `tally` counts what was met and dropped."""
    entries = []
    with _collector_paused():
        for name, private, definition in _find_definitions(sources, tally):
            docstring = ast.get_docstring(definition, clean=False)
            if docstring is None:
                continue
            tally.docstrings += 1
            summary, rest = _split_docstring(docstring)
            fault = "private name" if private else _find_fault(summary, rest)
            if fault:
                tally.dropped[fault] += 1
            else:
                text = f"{_write_signature(definition)}\n{rest}".strip()
                entries.append(Entry(summary, Passage(name, name, text)))
    return entries


def merge_entries(entries: Iterable[Entry], tally: Tally) -> list[Entry]:
    """Return the entries sorted by id, one of each name and each text, without summaries that several have.

    Of copies, a test sub-package's stays before a development one's, and that before a training one's.
    """
    ranked = sorted(entries, key=lambda entry: (SPLITS.index(entry.split), entry.name))
    named = _keep_first(ranked, lambda entry: entry.name)
    tally.dropped["name defined twice"] += len(ranked) - len(named)
    merged = _keep_first(named, lambda entry: _normalise(entry.passage.text))
    tally.dropped["copy of another passage"] += len(named) - len(merged)
    frequency = Counter(_normalise(entry.question) for entry in merged)
    unique = [entry for entry in merged if frequency[_normalise(entry.question)] == 1]
    tally.dropped["summary occurs more than once"] += len(merged) - len(unique)
    return sorted(unique, key=lambda entry: entry.name)


def choose_questions(entries: Sequence[Entry], sizes: Mapping[str, int], seed: int) -> dict[str, list[Entry]]:
    """Return `sizes` sampled entries each of "test", "dev", "train" and "pool", or as many as there are."""
    usable = {split: [entry for entry in entries if entry.split == split] for split in SPLITS}
    wanted = sizes["train"] + sizes["pool"]
    rest = _sample(usable["train"], wanted, f"train {seed}")
    labelled = len(rest) * sizes["train"] // max(wanted, 1)
    chosen = {split: _sample(usable[split], sizes[split], f"{split} {seed}") for split in ("test", "dev")}
    return {**chosen, "train": rest[:labelled], "pool": rest[labelled:]}


def choose_corpus(
    entries: Sequence[Entry], chosen: Mapping[str, Sequence[Entry]], passages: int, seed: int
) -> list[Passage]:
    """Return the passages of the chosen questions, filled up with a sample of the others, sorted by id."""
    needed = {entry.passage for taken in chosen.values() for entry in taken}
    others = [entry.passage for entry in entries if entry.passage not in needed]
    return sorted([*needed, *_sample(others, passages - len(needed), f"corpus {seed}")])


def _find_package(package: str) -> SourceTree:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(package, "demo")
    folder = Path(spec.submodule_search_locations[0])
    return SourceTree(package, importlib.metadata.version(package), folder, package)


def _require_sizes(passages: int, sizes: Mapping[str, int]) -> None:
    if min(sizes.values()) < 0:
        raise UsageError(f"A number of questions is negative: {dict(sizes)}.", remedy="Give 0 or more.")
    if passages < sum(sizes.values()):
        raise UsageError(
            f"{sum(sizes.values())} questions need as many passages, but the corpus is to have {passages}.",
            remedy="Ask for more passages or fewer questions.",
        )


@contextmanager
def _collector_paused() -> Iterator[None]:
    # Syntax trees hold no cycles; having the collector look through each costs a quarter of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _find_definitions(sources: Iterable[SourceTree], tally: Tally) -> Iterator[tuple[str, bool, _Definition]]:
    """Yield (qualified name, whether it is private, node) of all that the sources define, in the order of paths."""
    for source in sources:
        for path in _list_files(source.folder):
            tree, outcome = _parse_file(path)
            tally.files[outcome] += 1
            if tree is not None:
                module = _name_module(source, path)
                for name, definition in _walk_definitions(module, tree):
                    yield name, _is_private(name, module), definition


def _list_files(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        files += [Path(parent, name) for name in names if name.endswith(".py")]
    return sorted(files)


def _parse_file(path: Path) -> tuple[ast.Module | None, str]:
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return None, "without docstrings"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd backslashes in other people's docstrings
            return ast.parse(source), "parsed"
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None, "not parsable"


def _name_module(source: SourceTree, path: Path) -> str:
    parts = [source.package, *path.relative_to(source.folder).with_suffix("").parts]
    return ".".join(part for part in parts if part and part != "__init__")


def _walk_definitions(name: str, node: _Definition) -> Iterator[tuple[str, _Definition]]:
    """Yield (qualified name, node) of a module or class and of all that it defines, but nothing local to a function."""
    yield name, node
    pending: list[ast.AST] = [] if isinstance(node, _Function) else list(reversed(node.body))
    while pending:
        child = pending.pop()
        if isinstance(child, (ast.ClassDef, _Function)):
            yield from _walk_definitions(f"{name}.{child.name}", child)
        elif isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            pending += reversed(list(ast.iter_child_nodes(child)))


def _is_private(name: str, module: str) -> bool:
    """Tell whether the name inside its module starts with an underscore; a public name may live in `_module.py`."""
    inner = name.removeprefix(module).strip(".") or module.rpartition(".")[2]
    return any(part.startswith("_") and not part.endswith("__") for part in inner.split("."))


def _split_docstring(docstring: str) -> tuple[str, str]:
    """Return the summary, on one line, and the rest, with its lines kept."""
    cleaned = inspect.cleandoc(_UNWRITABLE.sub(" ", docstring)).strip()
    end = _SUMMARY_END.search(cleaned)
    summary, rest = (cleaned, "") if end is None else (cleaned[: end.start()], cleaned[end.end() :])
    return " ".join(summary.split()), rest.strip()


def _find_fault(summary: str, rest: str) -> str | None:
    if _NO_SENTENCE.match(summary):
        return "summary is no sentence"
    if len(summary.split()) < MIN_SUMMARY_WORDS:
        return f"summary under {MIN_SUMMARY_WORDS} words"
    if len(rest.split()) < MIN_REST_WORDS:
        return f"rest under {MIN_REST_WORDS} words"
    if f" {_normalise(summary)} " in f" {_normalise(rest)} ":
        return "summary found in the rest"
    return None


def _normalise(text: str) -> str:
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))


def _write_signature(definition: _Definition) -> str:
    """Return `name(arguments)` as a caller types it; a class has its constructor's arguments, a module nothing."""
    if isinstance(definition, ast.Module):
        return ""
    function: ast.AST | None = definition
    if isinstance(definition, ast.ClassDef):
        function = next((node for node in definition.body if getattr(node, "name", "") == "__init__"), None)
    arguments = _shorten_arguments(function.args) if isinstance(function, _Function) else ""
    return f"{definition.name}({arguments})"


def _shorten_arguments(arguments: ast.arguments) -> str:
    """Write arguments without annotations, `self`, or defaults too long to read."""
    return ast.unparse(
        ast.arguments(
            posonlyargs=_strip_annotations(arguments.posonlyargs),
            args=_strip_annotations(arguments.args),
            vararg=arguments.vararg and ast.arg(arguments.vararg.arg),
            kwonlyargs=_strip_annotations(arguments.kwonlyargs),
            kw_defaults=[default and _shorten_default(default) for default in arguments.kw_defaults],
            kwarg=arguments.kwarg and ast.arg(arguments.kwarg.arg),
            defaults=[_shorten_default(default) for default in arguments.defaults],
        )
    )


def _strip_annotations(arguments: Iterable[ast.arg]) -> list[ast.arg]:
    return [ast.arg(argument.arg) for argument in arguments if argument.arg not in ("self", "cls")]


def _shorten_default(default: ast.expr) -> ast.expr:
    return default if len(ast.unparse(default)) <= MAX_DEFAULT_CHARACTERS else ast.Constant(...)


def _keep_first(entries: Iterable[Entry], key: Callable[[Entry], str]) -> list[Entry]:
    kept: dict[str, Entry] = {}
    for entry in entries:
        kept.setdefault(key(entry), entry)
    return list(kept.values())


def _sample(items: Sequence[_T], count: int, key: str) -> list[_T]:
    return random.Random(key).sample(items, min(count, len(items)))


def _write_folder(folder: Path, corpus: Sequence[Passage], chosen: Mapping[str, Sequence[Entry]]) -> None:
    questions = sorted((_name_query(entry), entry.question) for taken in chosen.values() for entry in taken)
    _write_rows(folder / "corpus.jsonl", (dict(zip(("_id", "title", "text"), row[:3], strict=True)) for row in corpus))
    _write_rows(folder / "queries.jsonl", ({"_id": name, "text": text} for name, text in questions))
    held_out = (p.passage_id for p in corpus if Entry("", p).split == "test")
    (folder / HELD_OUT).write_text("".join(f"{passage_id}\n" for passage_id in held_out), encoding="utf-8")
    for split in SPLITS:
        labels = sorted((_name_query(entry), entry.name) for entry in chosen[split])
        write_qrels(folder / "qrels" / f"{split}.tsv", {query_id: {name: 1} for query_id, name in labels})


def _name_query(entry: Entry) -> str:
    return f"q:{entry.name}"  # not the passage's own id: BEIR's evaluation leaves out a passage named like the query


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _hash_content(folder: Path) -> str:
    files = filter(Path.is_file, sorted(folder.rglob("*")))
    return hash_json([[path.relative_to(folder).as_posix(), hash_file(path)] for path in files])
