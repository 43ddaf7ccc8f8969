"""Teachers: one contract, `score(queries, candidates)`, whatever is behind it.

A teacher is a cross-encoder, a dual encoder, BM25, or a weighted fusion of such. Its scores need only order the
candidates of one query; calibration (label.py) finds out what a score is worth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pairdr.artefact import read_manifest
from pairdr.config import ModelConfig
from pairdr.encoder import DualEncoder, hash_parameters
from pairdr.errors import UsageError
from pairdr.files import hash_json
from pairdr.fusion import standardise
from pairdr.lexical import LexicalIndex
from pairdr.records import Passage, Query
from pairdr.vectors import VectorStore, hash_passage

RECIPE = "teacher.json"
_MOST_KNOWN = 100_000  # passages whose vectors a dual encoder keeps
Scores = npt.NDArray[np.float64]


class Teacher(Protocol):
    """Scores candidates.

    Attributes:
        name: what the tables call it.
        needs_index: whether it can score passages of the indexed corpus alone.
    """

    name: str
    needs_index: bool

    def score(self, queries: Sequence[Query], candidates: Sequence[Sequence[Passage]]) -> list[Scores]:
        """Return, per query, one score per candidate; larger is better."""

    def describe(self) -> dict[str, Any]:
        """Return what `load_teacher` needs to make it again."""


class DualEncoderTeacher:
    """Inner products of a dual encoder; a passage is encoded once, however many queries it is a candidate of.

    Where one of the stores has the corpus by this encoder, passages are not encoded at all.
    """

    needs_index = False

    def __init__(self, encoder: DualEncoder, name: str, source: str, stores: Sequence[VectorStore] = ()) -> None:
        self.encoder, self.name, self.source = encoder, name, source
        self._known = next((store for store in stores if store.encoder == encoder.fingerprint), None)
        self._vectors: dict[int, npt.NDArray[np.float32]] = {}

    @property
    def known_vectors(self) -> str:
        """Return the fingerprint of the vectors that spare encoding; empty without."""
        return "" if self._known is None else self._known.fingerprint

    def forget(self) -> None:
        """Forget the passages that were encoded: a vector depends, in its last bits, on what it is batched with."""
        self._vectors = {}

    def score(self, queries: Sequence[Query], candidates: Sequence[Sequence[Passage]]) -> list[Scores]:
        """Return the similarities."""
        vectors = self.encoder.encode_queries([query.text for query in queries])  # [Q, D]
        passages = (
            [self._known.take_passages([p.passage_id for p in row]) for row in candidates]
            if self._known
            else self._encode(candidates)
        )  # [n, D] each
        return [(found @ vector).astype(np.float64) for vector, found in zip(vectors, passages, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Return kind and source."""
        return {"kind": "dual_encoder", "name": self.name, "source": self.source}

    def _encode(self, candidates: Sequence[Sequence[Passage]]) -> list[npt.NDArray[np.float32]]:
        asked = {hash_passage(p): p for row in candidates for p in row}
        if len(self._vectors) > _MOST_KNOWN:
            self._vectors = {}
        missing = {key: p for key, p in asked.items() if key not in self._vectors}
        if missing:
            found = self.encoder.encode_passages(list(missing.values()))
            self._vectors |= dict(zip(missing, found, strict=True))
        none = np.empty((0, self.encoder.contract.dimensions), dtype=np.float32)
        return [np.stack([self._vectors[hash_passage(p)] for p in row]) if row else none for row in candidates]


class LexicalTeacher:
    """BM25."""

    name = "bm25"
    needs_index = True

    def __init__(self, index: LexicalIndex) -> None:
        self.index = index

    def score(self, queries: Sequence[Query], candidates: Sequence[Sequence[Passage]]) -> list[Scores]:
        """Return BM25 scores."""
        scored = []
        for query, row in zip(queries, candidates, strict=True):
            rows = self.index.rows_of([passage.passage_id for passage in row])
            scored.append(self.index.score_all(query.text)[rows].astype(np.float64))
        return scored

    def describe(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": "bm25"}


class CrossEncoderTeacher:
    """A sentence-transformers CrossEncoder over (query, passage) pairs."""

    needs_index = False

    def __init__(
        self, source: str, name: str = "cross-encoder", device: str | None = None, recorded: str | None = None
    ) -> None:
        """Load a cross-encoder.

        Args:
            source: a folder or a hub name.
            name: what the tables call it.
            device: cpu, cuda, ...; unset picks the best there is.
            recorded: how its description names the source; unset: as `source`.
        """
        from sentence_transformers import CrossEncoder

        self.source, self.name = recorded or source, name
        try:
            self.model = CrossEncoder(source, device=device)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The cross-encoder {source!r} cannot be loaded.", remedy="Name a folder or a hub name."
            ) from error
        architectures = getattr(self.model.config, "architectures", None) or ()
        if architectures and all(name.endswith("Model") for name in architectures):
            raise UsageError(
                f"The model {source!r} is a bare encoder without the head of a cross-encoder.",
                remedy="Name a cross-encoder, or train one here with --cross-encoder train.",
            )

    def score(self, queries: Sequence[Query], candidates: Sequence[Sequence[Passage]]) -> list[Scores]:
        """Return the model's scores, after its own activation."""
        pairs = [(query.text, p.joined) for query, row in zip(queries, candidates, strict=True) for p in row]
        if not pairs:
            return [np.zeros(0) for _ in candidates]
        flat = np.asarray(self.model.predict(pairs, show_progress_bar=False), dtype=np.float64)
        if flat.ndim != 1:
            raise UsageError(
                f"The cross-encoder {self.source!r} gives {flat.shape[1]} scores a pair, not one.",
                remedy="Use one with num_labels = 1.",
            )
        return list(np.split(flat, np.cumsum([len(row) for row in candidates])[:-1]))

    def describe(self) -> dict[str, Any]:
        """Return kind and source."""
        return {"kind": "cross_encoder", "name": self.name, "source": self.source}


class FusionTeacher:
    """A weighted sum of standardised scores of other teachers."""

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float]) -> None:
        self.members, self.weights = list(members), tuple(weights)
        self.needs_index = any(m.needs_index for m, w in zip(members, weights, strict=True) if w > 0)
        self.name = " + ".join(f"{w:g} {m.name}" for m, w in zip(members, weights, strict=True) if w > 0)

    def score(self, queries: Sequence[Query], candidates: Sequence[Sequence[Passage]]) -> list[Scores]:
        """Return the fused scores; each member's are standardised within a query's candidates."""
        used = [(m, w) for m, w in zip(self.members, self.weights, strict=True) if w > 0]
        per_member = [(member.score(queries, candidates), weight) for member, weight in used]
        return [
            np.asarray(sum(weight * standardise(scores[row]) for scores, weight in per_member))
            for row in range(len(candidates))
        ]

    def describe(self) -> dict[str, Any]:
        """Return members and weights."""
        return {"kind": "fusion", "members": [m.describe() for m in self.members], "weights": list(self.weights)}


def forget_passages(teacher: Teacher) -> None:
    """Forget the passages that a teacher has met: what it says next is then a function of what it is asked."""
    if isinstance(teacher, DualEncoderTeacher):
        teacher.forget()
    for member in teacher.members if isinstance(teacher, FusionTeacher) else ():
        forget_passages(member)


def fingerprint_teacher(teacher: Teacher) -> str | None:
    """Return a hash of all that decides a teacher's scores; None for one of another kind than these."""
    if isinstance(teacher, LexicalTeacher):
        return hash_json(["bm25", teacher.index.fingerprint])
    if isinstance(teacher, DualEncoderTeacher):
        return hash_json(["dual encoder", teacher.encoder.fingerprint, teacher.known_vectors])
    if isinstance(teacher, CrossEncoderTeacher):
        return hash_json(["cross-encoder", hash_parameters(teacher.model), str(teacher.model.config)])
    if isinstance(teacher, FusionTeacher):
        members = [fingerprint_teacher(member) for member in teacher.members]
        return None if None in members else hash_json(["fusion", members, teacher.weights])
    return None


def read_recipe(folder: str | Path) -> dict[str, Any] | None:
    """Return the accepted teacher's description, or None where none was accepted."""
    read_manifest(folder, "teacher")
    recipe: dict[str, Any] | None = json.loads((Path(folder) / RECIPE).read_text(encoding="utf-8"))
    return recipe


def load_teacher(
    recipe: dict[str, Any],
    folder: str | Path,
    index: LexicalIndex | None,
    model: ModelConfig,
    stores: Sequence[VectorStore] = (),
) -> Teacher:
    """Make a teacher again from its description.

    Args:
        recipe: what `describe` gave; sources are hub names, or paths relative to `folder`.
        folder: where the description was saved.
        index: BM25; None will do for a teacher that does not need it.
        model: lengths and prefixes of a dual encoder that pairdr did not save.
        stores: vectors of the corpus that are there; those of a teacher spare encoding it again.

    Raises:
        UsageError: a kind that this version does not know.
    """
    kind = recipe.get("kind")
    if kind == "bm25":
        if index is None:
            raise ValueError("this teacher needs BM25")
        return LexicalTeacher(index)
    if kind == "fusion":
        members = [load_teacher(member, folder, index, model, stores) for member in recipe["members"]]
        return FusionTeacher(members, recipe["weights"])
    local = (Path(folder) / str(recipe.get("source"))).resolve()
    source = str(local) if local.exists() else str(recipe.get("source"))
    if kind == "cross_encoder":
        return CrossEncoderTeacher(source, recipe["name"], model.device)
    if kind == "dual_encoder":
        return DualEncoderTeacher(load_dual_encoder(source, model), recipe["name"], recipe["source"], stores)
    raise UsageError(f"Unknown kind of teacher {kind!r}.", path=folder, remedy="Run pairdr teach again.")


def load_dual_encoder(source: str, model: ModelConfig) -> DualEncoder:
    """Load a dual encoder, whole, with the lengths and the title form of the student and all else its own."""
    return DualEncoder.load(
        replace(
            model,
            start=source,
            layers=None,
            query_prefix=None,
            passage_prefix=None,
            pooling="auto",
            similarity="auto",
            towers="tied",
            temperature=None,
        )
    )
