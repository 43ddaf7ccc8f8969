"""The models that are served, each as one version of its parts; newly published versions are picked up.

A request holds the snapshot that it began with: files that a newer version replaces stay readable for those that have
them open, so no answer is mixed of two versions and none is dropped.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairdr.artefact import MANIFEST, read_manifest
from pairdr.config import ModelConfig
from pairdr.errors import ArtefactError, BusyError, PairdrError, ServerError, UsageError
from pairdr.files import hash_json, hold_lock, replace_file
from pairdr.indexes.address import is_url
from pairdr.lexical import LexicalIndex, index_words
from pairdr.parts import TEACHER, Parts, find_parts, is_work_folder, names_start
from pairdr.progress import say
from pairdr.searcher import Searcher, open_searcher
from pairdr.serve.failures import ApiError
from pairdr.serve.sharing import Clock, SharedEncoder
from pairdr.store_config import ServeConfig, WorkersConfig
from pairdr.vectors import VectorStore

if TYPE_CHECKING:
    from pairdr.teachers import Teacher

START = "start"
AWAY = "away"
"""Stands for an index in a database whose server does not answer."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One version of a model with its vectors and all that searches them.

    Attributes:
        name: of the model.
        searcher: answers questions.
        encoder: makes vectors.
        widths: dimensions that a vector may be cut to.
        settings: what else decides an answer, as JSON values.
    """

    name: str
    searcher: Searcher
    encoder: SharedEncoder
    widths: tuple[int, ...]
    settings: list[Any]

    @cached_property
    def version(self) -> str:
        """Return the number of the vectors' version, and a hash of all that decides an answer."""
        store, words = self.searcher.store, self.searcher.words
        parts = [store.fingerprint, None if words is None else words.fingerprint, self.encoder.fingerprint]
        return f"{store.version}-{hash_json([*parts, *self.settings])[:12]}"


@dataclass(frozen=True)
class Stamp:
    """What differs once something was published.

    Attributes:
        files: of the vectors, the model and the words.
        index: names an approximate index; None is exact search.
    """

    files: object
    index: str | None


class Shelf:
    """All models that are served.

    Args:
        place: a work folder, or vectors.
        model: what made the vectors; a work folder names its own, and only the device counts, or an export of it.
        names: models of a work folder, the default first; none: the trained one and, without an export, the start.
        words: BM25; a work folder has its own.
        index: an approximate index of the first model's vectors, or the URL of one in a database.
        reranker: "teacher", or a cross-encoder's folder or hub name.
        workers: that share exact search; each model has its own.
        writes: passages are changed through this service; words that do not follow the vectors, since a service was
            killed between the two, are indexed anew.
        batch_texts: passages that are encoded before searches have their turn.
        clock: takes the time of stages.

    Raises:
        ArtefactError: a part is missing or does not fit the others.
        UsageError: a model that the work folder does not have, or no export of it.
    """

    def __init__(
        self,
        place: Path,
        model: ModelConfig,
        names: Sequence[str] = (),
        *,
        words: Path | None = None,
        index: str | Path | None = None,
        reranker: str | None = None,
        workers: WorkersConfig = WorkersConfig(),
        writes: bool = False,
        batch_texts: int = ServeConfig().batch_texts,
        clock: Clock,
    ) -> None:
        self.place, self._model, self._clock, self._batch_texts = place, model, clock, batch_texts
        self._reranker: str | Teacher | None = reranker
        self._reranker_name = reranker
        self._words, self._index = words, index
        self._workers = workers
        self._lock = threading.Lock()  # one reload at a time
        self._encoders: dict[str, tuple[object, SharedEncoder]] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._stamps: dict[str, Stamp] = {}
        self._refused: dict[str, tuple[object, str]] = {}
        chosen = self._choose_names(names)
        if writes and len(chosen) == 1:
            with self.lock():
                mend_words(self.find_parts(chosen[0]))
        for name in chosen:
            try:
                self._stamps[name], self._snapshots[name] = self._open(name, self.find_parts(name))
            except ArtefactError as error:
                if names or not self._snapshots:
                    raise
                say(f"pairdr: {name} is not served: {error}")  # passages were changed where the first alone was served

    @property
    def names(self) -> list[str]:
        """Return the models, the default first."""
        return list(self._snapshots)

    @property
    def is_work(self) -> bool:
        """Return whether this is a work folder, where other commands may be at work."""
        return is_work_folder(self.place)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other commands out of a work folder while the block runs.

        Raises:
            UsageError: one is at work there.
        """
        try:
            with hold_lock(self.place, wait=False) if self.is_work else nullcontext():
                yield
        except BlockingIOError as error:
            raise BusyError(self.place) from error

    @property
    def stale(self) -> dict[str, str]:
        """Return why the newest version of a model is not served, by its name."""
        return {name: why for name, (_, why) in self._refused.items()}

    def take(self, name: str | None) -> Snapshot:
        """Return the present version of a model, or of the default.

        Raises:
            ApiError: no such model (404).
        """
        found = self._snapshots.get(self.names[0] if name is None else name)
        if found is None:
            said = str(name)[:100]
            raise ApiError(404, "unknown_model", f"There is no model {said!r}. There are: {', '.join(self.names)}.")
        return found

    def find_parts(self, name: str) -> Parts:
        """Return where a model's parts stand now."""
        is_first = not self._snapshots or name == self.names[0]
        system = name if self.is_work else None
        index = self._index if is_first else None
        return find_parts(self.place, words=self._words, index=index, system=system)

    def refresh(self) -> list[str]:
        """Open what was newly published, and return the models that changed.

        A version that does not fit (new vectors whose words are not indexed yet, say) is left until it does. While the
        server of a database is away, new vectors are searched exactly.
        """
        changed = []
        with self._lock:
            for name in self.names:
                refused, stamp = self._refused.get(name), None
                try:
                    parts, known = self.find_parts(name), self._stamps[name]
                    stamp = _stamp_parts(parts)
                    if refused is not None and stamp == refused[0]:
                        continue
                    is_away = stamp.index == AWAY
                    if stamp.files != known.files or (stamp.index != known.index and not is_away):
                        if is_away:
                            say(f"pairdr: the database of {name} is away: its new version is searched exactly")
                            parts = replace(parts, index=None)
                        self._stamps[name], self._snapshots[name] = self._open(name, parts)
                        changed.append(name)
                    self._refused.pop(name, None)
                except PairdrError as error:
                    self._refused[name] = stamp, error.what
                    if refused != self._refused[name]:
                        say(f"pairdr: the new version of {name} is not served: {error}")
        return changed

    def _choose_names(self, names: Sequence[str]) -> list[str]:
        if not self.is_work:
            if names:
                raise UsageError("Vectors have one model.", remedy="Leave --models out, or name a work folder.")
            return [self.place.resolve().name]
        trained = find_parts(self.place).name
        chosen = list(dict.fromkeys(names or ((trained,) if names_start(self._model) else (trained, START))))
        there = [name for name in chosen if _has_vectors(find_parts(self.place, system=name))]
        missing = [name for name in names if name not in there]
        if missing:
            raise UsageError(
                f"There is no model {missing[0]!r}.", path=self.place, remedy="Look into its models/ and vectors/."
            )
        return there

    def _open(self, name: str, parts: Parts) -> tuple[Stamp, Snapshot]:
        stamp = _stamp_parts(parts)  # before the parts are opened: what changes meanwhile is opened again
        encoder = self._open_encoder(parts)
        searcher = open_searcher(
            parts, encoder, reranker=self._reranker, device=self._model.device, workers=self._workers
        )
        if self._reranker != TEACHER:
            self._reranker = searcher.reranker  # knows nothing of versions: one is enough for all
        # Loads what is loaded late, before anybody waits for it.
        searcher.search("a first question", k=1, rerank=0 if searcher.reranker is None else 1)
        widths = read_widths(parts.model or Path(self._model.start))
        judge = read_manifest(parts.teacher).fingerprint if self._reranker_name == TEACHER else self._reranker_name
        settings = [parts.weights, parts.mode, parts.depth, judge, stamp.index]
        return stamp, Snapshot(name, searcher, encoder, widths, settings)

    def _open_encoder(self, parts: Parts) -> SharedEncoder:
        """Return the model, or the one that is open already where its folder has not changed."""
        stamp = None if parts.model is None else _stamp(parts.model / MANIFEST)
        known = self._encoders.get(parts.name)
        if known is None or known[0] != stamp:
            encoder = SharedEncoder(parts.open_encoder(self._model), self._clock, self._batch_texts)
            known = self._encoders[parts.name] = (stamp, encoder)
        return known[1]


@contextmanager
def follow_words(parts: Parts) -> Iterator[None]:
    """Let words follow the vectors that the block changes. A note beside the vectors says so until both are there."""
    if parts.words is None:
        yield
        return
    note = _find_note(parts)
    replace_file(note, json.dumps(_describe_words(parts.words)))
    try:
        yield
        _index_anew(parts)
    finally:
        if _fit_words(parts):
            note.unlink(missing_ok=True)


def mend_words(parts: Parts) -> None:
    """Index the words of vectors whose writer was killed before it did; words that no note names are left alone."""
    note = _find_note(parts)
    if parts.words is None or not note.is_file():
        return
    if json.loads(note.read_text(encoding="utf-8")) == _describe_words(parts.words):
        _index_anew(parts)
    note.unlink(missing_ok=True)


def _find_note(parts: Parts) -> Path:
    return parts.vectors.with_name(f".{parts.vectors.name}.words.json")


def _describe_words(words: Path) -> dict[str, str]:
    return {"words": str(words.resolve()), "fingerprint": read_manifest(words, "bm25").fingerprint}


def _fit_words(parts: Parts) -> bool:
    assert parts.words is not None
    return LexicalIndex(parts.words).passages_fingerprint == VectorStore(parts.vectors).passages_fingerprint


def _index_anew(parts: Parts) -> None:
    if parts.words is None or _fit_words(parts):
        return
    words = LexicalIndex(parts.words)
    with hold_lock(parts.vectors):  # else words of this version could be put in the place of a newer one's
        store = VectorStore(parts.vectors)
        say(f"pairdr: indexing the words of version {store.version}")
        index_words(store, words.config, words.folder)


def read_widths(model: Path) -> tuple[int, ...]:
    """Return the dimensions that a model's vectors may be cut to: those it was trained for (Matryoshka)."""
    if not (model / MANIFEST).is_file():
        return ()
    manifest = read_manifest(model)
    return tuple(manifest.facts.get("widths") or manifest.options.get("matryoshka_dims") or ())


def _has_vectors(parts: Parts) -> bool:
    return all(folder is not None and (folder / MANIFEST).is_file() for folder in (parts.model, parts.vectors))


def _stamp_parts(parts: Parts) -> Stamp:
    folders = (parts.vectors, parts.model, parts.words)
    files = tuple(None if folder is None else _stamp(folder / MANIFEST) for folder in folders)
    return Stamp((replace(parts, index=None), files), _name_index(parts.index))


def _name_index(index: str | Path | None) -> str | None:
    """Return what names an approximate index as it was built or loaded: AWAY where a server does not answer."""
    if index is None or not is_url(index):
        return None if index is None else read_manifest(Path(index)).fingerprint
    from pairdr.indexes.database import stamp_database

    try:
        return stamp_database(str(index))
    except ServerError:
        return AWAY


def _stamp(path: Path) -> object:
    """Return what differs after a file was replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
