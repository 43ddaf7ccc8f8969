"""A work folder: where each artefact stands, what is already done, and the open parts that steps share."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pairdr.artefact import FORMAT_VERSION, read_manifest
from pairdr.collection import Collection
from pairdr.config import RunConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, UsageError
from pairdr.files import hash_json, hold_lock, replace_file
from pairdr.formats import read_run
from pairdr.lexical import LexicalIndex
from pairdr.origin import describe_environment, measure_memory
from pairdr.parts import STATE
from pairdr.records import Run
from pairdr.start import is_retriever
from pairdr.vectors import VectorStore


class Work:
    """The folder that `pairdr run` fills.

    Attributes:
        folder: the work folder.
        collection: the data.
        config: all options.
    """

    def __init__(self, folder: str | Path, collection: Collection, config: RunConfig) -> None:
        self.folder, self.collection, self.config = Path(folder), collection, config
        self._encoders: dict[str, DualEncoder] = {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of the folder while the block runs; a killed process leaves no lock behind.

        Raises:
            UsageError: another run is at work here.
        """
        try:
            with hold_lock(self.folder, wait=False):
                yield
        except BlockingIOError as error:
            raise UsageError(
                "Another run is at work here.", path=self.folder, remedy="Wait for it, or choose another --output."
            ) from error

    @property
    def student(self) -> str:
        """Return the name of the model that mines: the start, or one that is warmed from it."""
        when = self.config.warm.warm
        warms = when == "always" or (when == "auto" and not is_retriever(self.config.model))
        return "student" if warms else "start"

    def list_sources(self) -> dict[str, str]:
        """Return the fingerprints of what no step makes: the data as a whole, and its corpus alone."""
        return {"collection": self.collection.fingerprint, "passages": self.collection.passages_fingerprint}

    def path(self, *parts: str) -> Path:
        """Return a place in the folder."""
        return self.folder.joinpath(*parts)

    def encoder(self, name: str) -> DualEncoder:
        """Return a model of `models/`; the last one that was asked for stays open."""
        if name not in self._encoders:
            self._encoders = {name: DualEncoder.open(self.path("models", name), device=self.config.model.device)}
        return self._encoders[name]

    def store(self, name: str) -> VectorStore:
        """Return the vectors of a model."""
        return VectorStore(self.path("vectors", name))

    def stores(self, student: str) -> list[VectorStore]:
        """Return the vectors that teachers may have: of the student, and of the whole model where it was cut."""
        return [self.store(name) for name in (student, *(["whole"] if self.config.model.layers is not None else []))]

    @cached_property
    def index(self) -> LexicalIndex:
        """Return BM25."""
        return LexicalIndex(self.path("bm25"))

    def run(self, split: str, system: str) -> Run:
        """Return a run."""
        return read_run(self.path("runs", split, system, "run.arrow"))

    def forget(self) -> None:
        """Close what is open, so that a step's new artefact is read anew."""
        self._encoders = {}
        self.__dict__.pop("index", None)

    def key(self, name: str, options: Any, inputs: dict[str, str]) -> str:
        """Return what decides whether a step is up to date: options, input fingerprints, format version."""
        return hash_json([name, options, inputs, FORMAT_VERSION])

    def fingerprint(self, name: str, output: Path, key: str) -> str | None:
        """Return the fingerprint of a finished step's artefact, or None if it has to run."""
        record = read_state(self.folder).get(name)
        if record is None or record["key"] != key:
            return None
        try:
            found = read_manifest(output).fingerprint
        except ArtefactError:
            return None
        return found if found == record["fingerprint"] else None

    def record(self, name: str, output: Path, key: str, seconds: float) -> str:
        """Note that a step is done and return its artefact's fingerprint."""
        fingerprint = read_manifest(output).fingerprint
        state = read_state(self.folder)
        state[name] = {
            "key": key,
            "fingerprint": fingerprint,
            "seconds": round(seconds, 1),
            **measure_memory(),
            "at": time.strftime("%Y-%m-%d %H:%M:%S"),
            "environment": describe_environment(),
        }
        replace_file(self.path(STATE), json.dumps(state, indent=1) + "\n")
        return fingerprint


def read_state(folder: Path) -> dict[str, Any]:
    """Return what a work folder records of each finished step, by its name; nothing where there is no record.

    A record holds `key` and `fingerprint`, `seconds`, `memory` and perhaps `device_memory` in bytes, `at`, and the
    `environment` that the step ran in.

    Raises:
        ArtefactError: the record cannot be read.
    """
    path = folder / STATE
    if not path.is_file():
        return {}
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ArtefactError(
            "The record of finished steps cannot be read.", path=path, remedy="Delete it; all steps run again."
        ) from error
    return state
