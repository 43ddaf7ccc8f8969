"""An opened data set: passages and queries by id, labels by split, and the pool of unlabelled queries.

The first opening of a BEIR folder converts it to memory-mapped Arrow in a cache (`PAIRDR_CACHE`, else
`~/.cache/pairdr`); later ones reuse that as long as the files' sizes and times are the same. No corpus is ever wholly
in memory as Python objects.

What this module decides, once and for all: which queries are dev, which labels are hidden, which queries are the
pool, and that no dev or test question, nor a copy of one, is trained on.
"""

from __future__ import annotations

import os
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pairdr.artefact import Staging, publish, read_manifest
from pairdr.config import DataConfig, OnDuplicate
from pairdr.errors import ArtefactError, DataError, UsageError
from pairdr.files import hash_json, hold_lock
from pairdr.formats import PASSAGE_KEYS, QUERY_KEYS, read_qrels, read_texts, read_unlabelled, write_qrels
from pairdr.lines import Place, read_lines, stamp_place
from pairdr.records import PASSAGE_COLUMNS, Passage, Qrels, Query
from pairdr.sources.named import find_data, name_data
from pairdr.texts import BLOCK, TextTable, write_table

SPLITS = ("train", "dev", "test")
_NOT_WORD = re.compile(r"[\W_]+")


def normalise_text(text: str) -> str:
    """Return a text as copies are compared: NFKC, lower case, words only."""
    return _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", text).lower()).strip()


class Collection:
    """A data set that stages read. Made by `open_collection`.

    Attributes:
        folder: the converted tables in the cache.
        source: the user's folder, or its URL.
        name: the source's name.
        given_name: what the data are called where others may have them: `ir:NAME`, a URL, or the folder's name.
        passages: the corpus.
        queries: all questions, those of the unlabelled files among them.
        fingerprint: hash of the content and of the options that decide splits and pool.
        passages_fingerprint: hash of the corpus alone.
        duplicates: "passage" and "query" to the ids that occur twice.
        hidden: labels taken from training queries by `hide_labels`; used only to measure.
        held_out: passages that no training query may have as a candidate.
        removed: reason to number of queries kept out of training and pool.
    """

    def __init__(self, folder: Path, source: Place, config: DataConfig) -> None:
        manifest = read_manifest(folder, "collection")
        self.folder, self.source, self.name, self.config = folder, source, source.resolve().name, config
        self.given_name = name_data(source)
        self.passages, self.queries = TextTable(folder, "passages"), TextTable(folder, "queries")
        self.held_out = (
            frozenset(line.strip() for _, line in read_lines(config.held_out)) if config.held_out else frozenset()
        )
        kept = config.as_dict() | {"unlabelled": [], "held_out": sorted(self.held_out)}
        del kept["licence"], kept["labelled"]
        self.fingerprint = hash_json([manifest.fingerprint, kept])
        self.passages_fingerprint = manifest.files["passages.arrow"]["sha256"]
        self.duplicates: dict[str, list[str]] = manifest.facts["duplicates"]
        given = {split: read_qrels(folder / "qrels" / f"{split}.tsv") for split in manifest.facts["splits"]}
        self.given_splits = tuple(given)
        self._qrels = {split: qrels for split, qrels in given.items() if split in SPLITS}
        self._others: Qrels = {
            q: labels for split, qrels in given.items() if split not in SPLITS for q, labels in qrels.items()
        }
        self.hidden: Qrels = {}
        self.removed: dict[str, int] = {}
        if manifest.facts.get("strangers"):
            self.removed["labels of --labelled for passages that are not there"] = manifest.facts["strangers"]
        self._settle_splits()

    @property
    def licence(self) -> str:
        """Return the licence of the data on one line, as cards say it."""
        return " ".join((self.config.licence or "not given; ask who made the data").split())

    def qrels(self, split: str) -> Qrels:
        """Return the labels of a split.

        Raises:
            DataError: the split has no labels.
        """
        if not self._qrels.get(split):
            taken = bool(self.labels(split))
            raise DataError(
                f"The split {split!r} has no labels"
                + (" left: all are hidden, or copies of held-out ones." if taken else "."),
                path=self.source,
                remedy="Give more labelled queries or hide fewer."
                if taken
                else f"Add qrels/{split}.tsv with at least one line.",
            )
        return self._qrels[split]

    def labels(self, split: str) -> Qrels:
        """Return the labels of a split as the folder has them: nothing hidden, made or removed; empty if absent."""
        path = self.folder / "qrels" / f"{split}.tsv"
        return read_qrels(path) if path.is_file() else {}

    def query(self, query_id: str) -> Query:
        """Return a question by its id."""
        row = self.queries.row_of(query_id)
        return Query(query_id, str(self.queries.table.column("text")[row].as_py()))

    def passage(self, passage_id: str) -> Passage:
        """Return a passage by its id."""
        return self.passage_at(self.passages.row_of(passage_id))

    def passage_at(self, row: int) -> Passage:
        """Return the passage of a row."""
        return Passage(*(self.passages.table.column(name)[int(row)].as_py() for name in PASSAGE_COLUMNS))

    def passages_at(self, rows: npt.NDArray[np.int64]) -> list[Passage]:
        """Return the passages of some rows."""
        return [Passage(*row) for row in self.passages.take(rows, PASSAGE_COLUMNS)]

    def read_passages(self, size: int = BLOCK) -> Iterator[list[Passage]]:
        """Yield the corpus in order, a block of passages at a time."""
        for block in self.passages.read_blocks(PASSAGE_COLUMNS, size):
            yield [Passage(*row) for row in block]

    @cached_property
    def pool(self) -> tuple[str, ...]:
        """Return the ids of the unlabelled queries: no split names them, and none is a copy of a dev or test one."""
        named = set().union(*(self._qrels.get(split, {}) for split in SPLITS), self._others, self._kept_out)
        held_out = self._held_out_texts
        pool, copies = [], 0
        for block in self.queries.read_blocks(("id", "text")):
            for query_id, text in block:
                if query_id in named or not text.strip():
                    continue
                if normalise_text(text) in held_out:
                    copies += 1
                else:
                    pool.append(query_id)
        self.removed["pool queries that copy a dev or test query"] = copies
        return tuple(pool)

    @cached_property
    def _held_out_texts(self) -> set[str]:
        return self._normalised_texts([*self._qrels.get("dev", {}), *self._qrels.get("test", {}), *self._others])

    def _normalised_texts(self, query_ids: Iterable[str]) -> set[str]:
        return {normalise_text(self.query(query_id).text) for query_id in query_ids if query_id in self.queries}

    def _settle_splits(self) -> None:
        """Make a dev split where there is none, drop what leaks from test to dev to training, hide labels."""
        train = self._qrels.get("train", {})
        if len(train) > 1 and not self._qrels.get("dev"):
            count = max(1, min(self.config.dev_queries, len(train) // 10))
            self._qrels["dev"] = {q: train.pop(q) for q in _sample(train, count, self.config.data_seed)}
        kept_out = self._drop_copies("dev", self._normalised_texts(self._qrels.get("test", {})), "test")
        kept_out |= self._drop_copies("train", self._held_out_texts, "dev or test")
        self._kept_out = frozenset(kept_out)
        count = round(self.config.hide_labels * len(train))
        for query_id in _sample(train, count, self.config.data_seed):
            self.hidden[query_id] = train.pop(query_id)

    def _drop_copies(self, split: str, texts: set[str], of: str) -> set[str]:
        """Take the queries out of a split whose words are those of a held-out one, and count them."""
        qrels = self._qrels.get(split, {})
        copies = {q for q in qrels if q in self.queries and normalise_text(self.query(q).text) in texts}
        for query_id in copies:
            del qrels[query_id]
        self.removed[f"{'training' if split == 'train' else split} queries that copy a {of} query"] = len(copies)
        return copies


def open_collection(source: str | Path, config: DataConfig | None = None, *, strict: bool = True) -> Collection:
    """Open a BEIR folder: `corpus.jsonl[.gz]`, `queries.jsonl[.gz]`, `qrels/{train,dev,test}.tsv`.

    A corpus of many files is a folder, `corpus/*.jsonl[.gz]`, read in the order of their names.

    Args:
        source: the folder, or its URL, or `ir:NAME` of ir_datasets, or `hf:NAME` of the hub: docs/sources.md.
        config: unlabelled files, hidden labels, the made dev split.
        strict: raise on what would corrupt training; `pairdr check` opens with False and lists it instead.

    Raises:
        UsageError: a file is missing.
        DataError: a broken line, a duplicate id, or a label for an id that does not exist.
    """
    config = config or DataConfig()
    folder = find_data(source, cache_folder())
    inputs = _find_files(folder, config)
    stamp: dict[str, Any] = {"on_duplicate": config.on_duplicate}
    for name, path in inputs.items():
        stamp[name] = stamp_place(path)
    place = cache_folder() / "collections" / hash_json(stamp)[:24]
    with hold_lock(place.parent):
        try:
            read_manifest(place, "collection")
        except ArtefactError:
            with publish(place, "collection", options={"stamp": stamp}, inputs={}) as staging:
                _convert(inputs, staging, config.on_duplicate)
    collection = Collection(place, folder, config)
    if strict:
        problem = next(iter(find_problems(collection)), None)
        if problem is not None:
            remedy = "Run pairdr check for all that is wrong; --on-duplicate chooses among equal ids."
            raise DataError(f"{problem}.", path=folder, remedy=remedy)
    return collection


def find_problems(collection: Collection) -> Iterator[str]:
    """Yield what would corrupt training: duplicate ids and labels for ids that do not exist."""
    if not len(collection.passages):
        yield "corpus.jsonl has no passage"
    for kind, ids in collection.duplicates.items():
        if ids and collection.config.on_duplicate == "error":
            yield f"{len(ids)} {kind} ids occur twice, such as {ids[0]!r}"
    for split in collection.given_splits:
        for column, file in (("query", "queries"), ("passage", "corpus")):
            orphans = find_orphans(collection, split, column)
            if orphans:
                yield (
                    f"qrels/{split}.tsv names {len(orphans)} {column} ids that {file}.jsonl does not have, "
                    f"such as {orphans[0]!r}"
                )


def find_orphans(collection: Collection, split: str, column: str) -> list[str]:
    """Return the ids that a split's labels name and the data does not have."""
    qrels = collection.labels(split)
    if column == "query":
        return [query_id for query_id in qrels if query_id not in collection.queries]
    named = dict.fromkeys(passage_id for judged in qrels.values() for passage_id in judged)
    return [passage_id for passage_id in named if passage_id not in collection.passages]


def cache_folder() -> Path:
    """Return the folder for converted collections."""
    return Path(os.environ.get("PAIRDR_CACHE", Path.home() / ".cache" / "pairdr"))


def find_texts(folder: Place) -> dict[str, Place]:
    """Return the files of the corpus and of the questions, by their paths below the folder without endings.

    Raises:
        UsageError: one is missing.
    """
    found = {"corpus": _find_lines(folder, "corpus")}
    if found["corpus"] is None:
        parts = [path for ending in ("*.jsonl", "*.jsonl.gz") for path in (folder / "corpus").glob(ending)]
        found = {f"corpus/{path.name}": path for path in sorted(parts, key=lambda path: path.name)}
    found["queries"] = _find_lines(folder, "queries")
    texts = {name: path for name, path in found.items() if path is not None}
    for name in ("corpus", "queries"):
        if not any(known.partition("/")[0] == name for known in texts):
            raise UsageError(
                f"{name}.jsonl (or .jsonl.gz) is missing.",
                path=folder,
                remedy="A BEIR folder has corpus.jsonl (or corpus/*.jsonl), queries.jsonl and qrels/*.tsv.",
            )
    return texts


def _find_files(folder: Place, config: DataConfig) -> dict[str, Place]:
    if isinstance(folder, Path) and not folder.is_dir():
        raise UsageError(
            "There is no such folder.", path=folder, remedy="Name a BEIR folder (corpus.jsonl ...), ir:NAME or hf:NAME."
        )
    found = find_texts(folder)
    labels: list[Place] = [*(folder / "qrels").glob("*.tsv")]
    for place in sorted(labels, key=lambda place: place.name):
        found[f"qrels/{place.stem}"] = place
    for number, path in enumerate(config.unlabelled):
        if not path.is_file():
            raise UsageError("There is no such file.", path=path, remedy="Check --unlabelled.")
        found[f"unlabelled/{number}"] = path
    for number, path in enumerate(config.labelled):
        train, queries = path / "qrels" / "train.tsv", _find_lines(path, "queries")
        if queries is None or not train.is_file():
            missing = "queries.jsonl (or .jsonl.gz)" if train.is_file() else "qrels/train.tsv"
            raise UsageError(f"{missing} is missing.", path=path, remedy="Check --labelled.")
        found |= {f"labelled/{number}/queries": queries, f"labelled/{number}/qrels": train}
    return found


def _find_lines(folder: Place, name: str) -> Place | None:
    return next((p for p in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if p.is_file()), None)


def _convert(inputs: dict[str, Place], staging: Staging, on_duplicate: OnDuplicate) -> None:
    """Turn the text files into memory-mapped tables."""
    # Labels before their questions: a service may be writing both, questions first.
    added = [name.removesuffix("/qrels") for name in inputs if name.startswith("labelled/") and name.endswith("/qrels")]
    judged = {name: read_qrels(inputs[f"{name}/qrels"]) for name in added}

    def read_queries() -> Iterator[tuple[int, list[str]]]:
        yield from read_texts(inputs["queries"], QUERY_KEYS)
        for name, qrels in judged.items():
            yield from (row for row in read_texts(inputs[f"{name}/queries"], QUERY_KEYS) if row[1][0] in qrels)
        for name, path in inputs.items():
            if name.startswith("unlabelled/") and isinstance(path, Path):
                yield from ((line, [query_id, text]) for line, query_id, text in read_unlabelled(path))

    parts = (path for name, path in inputs.items() if name.partition("/")[0] == "corpus")
    corpus = (row for path in parts for row in read_texts(path, PASSAGE_KEYS))
    staging.facts["duplicates"] = {
        "passage": write_table(staging.path, "passages", PASSAGE_COLUMNS, corpus, on_duplicate),
        "query": write_table(staging.path, "queries", ("id", "text"), read_queries(), on_duplicate),
    }
    splits = {name.removeprefix("qrels/"): read_qrels(inputs[name]) for name in inputs if name.startswith("qrels/")}
    staging.facts["strangers"] = _add_labels(splits, judged.values(), TextTable(staging.path, "passages"))
    for split, qrels in splits.items():
        write_qrels(staging.path / "qrels" / f"{split}.tsv", qrels)
    staging.facts["splits"] = list(splits)


def _add_labels(splits: dict[str, Qrels], more: Iterable[Qrels], passages: TextTable) -> int:
    """Add labels to those of training; return how many are left out: what people judged may have gone since."""
    left_out = 0
    for qrels in more:
        train = splits.setdefault("train", {})
        for query_id, judged in qrels.items():
            known = {passage_id: relevance for passage_id, relevance in judged.items() if passage_id in passages}
            left_out += len(judged) - len(known)
            if known:
                train[query_id] = train.get(query_id, {}) | known
    return left_out


def _sample(qrels: Qrels, count: int, seed: int) -> list[str]:
    return sorted(random.Random(seed).sample(sorted(qrels), count))
