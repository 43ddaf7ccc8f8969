"""What the tests of audits share: a data set in which nothing is wrong until something is planted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pairdr.artefact import publish
from pairdr.audit import audit_labels
from pairdr.collection import Collection, open_collection
from pairdr.config import DataConfig
from pairdr.evidence import AuditSources
from pairdr.findings import Finding
from pairdr.formats import write_examples
from pairdr.label import SOURCES
from pairdr.mine import Candidates
from pairdr.records import Example, Passage, Query, Run, Scored
from pairdr.store_config import AuditConfig

if TYPE_CHECKING:
    from conftest import WriteBeir

KEYS = {"kind": "near_copy", "label": "negative", "query_id": "q1", "passage_id": "p1"}
TRAIN = [f"t{i}" for i in range(6)]
POOL = [f"u{i}" for i in range(4)]
WORDS = (
    *("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath"),
    *("inlet", "jetty", "knoll", "ledge", "marsh", "north", "orchard", "pond"),
)


def make_text(number: int) -> str:
    """Return a passage of 20 words that shares no five in a row with another number's."""
    return " ".join(f"{WORDS[(number + place * 7) % len(WORDS)]}{number}" for place in range(20))


CORPUS = {f"p{i}": make_text(i) for i in range(40)}
QUERIES = {q: f"question {q}" for q in [*TRAIN, *POOL, "d0", "e0"]}
QRELS = {
    "train": {f"t{i}": {f"p{i}": 1} for i in range(6)},
    "dev": {"d0": {"p30": 1}},
    "test": {"e0": {"p31": 1}},
}
OTHERS = tuple(f"p{i}" for i in range(20, 30))
"""Candidates of every query, of which the first four are negatives."""


class TableTeacher:
    """Gives the scores of a table; a pair that is not in it scores 0.1 less a little for every place."""

    name = "table"

    def __init__(self, scores: Mapping[tuple[str, str], float]) -> None:
        self.scores = scores

    def score(self, queries: Sequence[Query], candidates: Sequence[Sequence[Passage]]) -> list[np.ndarray]:
        return [
            np.array([self.scores.get((q.query_id, p.passage_id), 0.1 - at / 1000) for at, p in enumerate(row)])
            for q, row in zip(queries, candidates, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        return {"kind": "table"}


def positive_of(query_id: str) -> str:
    return f"p{query_id[1:]}" if query_id.startswith("t") else f"p1{query_id[1:]}"


def make_run(ranked: Mapping[str, Sequence[str]]) -> Run:
    return Run.from_mapping({q: [Scored(p, -float(at)) for at, p in enumerate(ids)] for q, ids in ranked.items()})


def write_rows(folder: Path, collection: Collection, **rows: Iterable[Example]) -> Path:
    with publish(folder, "examples", options={}, inputs={"collection": collection.fingerprint}) as staging:
        for name in SOURCES:
            staging.facts[name] = write_examples(staging.path / f"{name}.arrow", rows.get(name, ()))
    return folder


def make_row(query_id: str, source: str = "labelled", **changes: Any) -> Example:
    positive = positive_of(query_id)
    row = Example(query_id, positive, OTHERS[:4], (positive,), source, 0.9, (0.1, 0.09, 0.08, 0.07))
    return replace(row, **changes)


class Plant:
    """A data set in which nothing is wrong until something is made wrong.

    Attributes:
        corpus: id to text.
        qrels: labels.
        candidates: per training and pool query, in rank order, those of all systems.
        negatives: mined, per training query.
        model: the final model's ranking.
        scores: what the teacher says that is not the usual.
        pseudo: rows of the pool.
    """

    def __init__(self, folder: Path, write_beir: WriteBeir) -> None:
        self.folder, self._write = folder, write_beir
        self.corpus = dict(CORPUS)
        self.qrels = {split: {q: dict(judged) for q, judged in labels.items()} for split, labels in QRELS.items()}
        self.candidates = {q: [positive_of(q), *OTHERS] for q in [*TRAIN, *POOL]}
        self.negatives = {q: list(OTHERS) for q in TRAIN}
        self.model = {q: list(ids) for q, ids in self.candidates.items()}
        self.scores = {(q, positive_of(q)): 0.9 for q in [*TRAIN, *POOL]}
        self.pseudo = [make_row(q, "pseudo") for q in POOL]

    def open(self, **options: Any) -> Collection:
        path = self._write(self.folder / "data", self.corpus, QUERIES, self.qrels)
        return open_collection(path, DataConfig(**options))

    def sources(self, collection: Collection, **changes: Any) -> AuditSources:
        rows = [make_row(q) for q in TRAIN]
        examples = write_rows(self.folder / "examples", collection, labelled=rows, plain=rows, pseudo=self.pseudo)
        run = make_run(self.candidates)
        mined = Candidates(run, run, run, make_run(self.negatives), "candidates", collection.fingerprint)
        sources = AuditSources(examples, mined, TableTeacher(self.scores), run=make_run(self.model))
        return replace(sources, **changes)

    def audit(self, **options: Any) -> list[Finding]:
        collection = self.open()
        return audit_labels(collection, self.sources(collection), AuditConfig(**options), self.folder / "audit")


def copy_of(number: int, changed: int = 1) -> str:
    """Return a passage with some of its words changed, from the end."""
    words = make_text(number).split()
    return " ".join([*words[: len(words) - changed], *(f"other{at}" for at in range(changed))])


def write_table(path: Path, *lines: str, header: str = "mark\tkind\tlabel\tquery_id\tpassage_id") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path
