"""Where the parts of a searcher stand: what `pairdr run` wrote down of its work folder, or vectors alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairdr.artefact import MANIFEST, read_manifest
from pairdr.backends import load_encoder, open_encoder, open_stand_in
from pairdr.config import ModelConfig
from pairdr.errors import ArtefactError
from pairdr.indexes.address import is_url
from pairdr.store_config import Mode, QueryConfig

if TYPE_CHECKING:
    from pairdr.backends import Encoder

WORK_FILE, STATE = "work.json", "state.json"
TEACHER = "teacher"


@dataclass(frozen=True)
class Parts:
    """Where a searcher's parts stand, and how it answers where a call says nothing else.

    Attributes:
        name: of the model.
        vectors: a store.
        model: the folder of what made it; None where options name it.
        words: BM25, or None.
        index: an approximate index, the URL of one in a database, or None.
        weights: of dense and BM25, as dev chose them, or None.
        mode: what won on dev, or auto.
        depth: passages of each system that hybrid fuses.
        teacher: the folder of the teacher that labelled; there may be none.
    """

    name: str
    vectors: Path
    model: Path | None
    words: Path | None
    index: str | Path | None
    weights: tuple[float, ...] | None
    mode: Mode
    depth: int
    teacher: Path

    def open_encoder(self, model: ModelConfig) -> Encoder:
        """Open what made the vectors: the model that options name, or that of a work folder, or an export of that.

        Raises:
            UsageError: options name what is no export of the work folder's model.
        """
        if self.model is None:
            return load_encoder(model)
        if names_start(model):
            return open_stand_in(model.start, self.model, model.device)
        return open_encoder(self.model, model.device)


def names_start(model: ModelConfig) -> bool:
    """Return whether options name a model."""
    return model.start != ModelConfig().start


def is_work_folder(place: Path) -> bool:
    """Return whether `pairdr run` has finished here."""
    return (place / WORK_FILE).is_file()


def require_no_begun_work(place: Path) -> None:
    """Refuse a work folder that `pairdr run` has only begun.

    Raises:
        ArtefactError: naming it.
    """
    if (place / STATE).is_file() and not is_work_folder(place):
        raise ArtefactError(
            "The run has not ended here.", path=place, remedy="Call pairdr run once more: what is done is skipped."
        )


def find_parts(
    place: str | Path,
    *,
    words: str | Path | None = None,
    index: str | Path | None = None,
    system: str | None = None,
) -> Parts:
    """Return where the parts of a searcher stand.

    Args:
        place: a work folder that `pairdr run` made, or vectors that `pairdr encode` made.
        words: BM25; a work folder has its own.
        index: an approximate index, or the URL of one in a database.
        system: another model of a work folder than the trained one; no weights were chosen for it.

    Raises:
        ArtefactError: there is no such folder.
    """
    place = Path(place)
    chosen = index if index is None or is_url(index) else Path(index)
    if not is_work_folder(place):
        if not (place / MANIFEST).is_file():
            raise ArtefactError(
                "These are no vectors, and no finished work folder.",
                path=place,
                remedy="Run pairdr run DATA -o WORK, or pairdr encode, first.",
            )
        read_manifest(place, "vectors")  # before a model is loaded for something else
        given = None if words is None else Path(words)
        return Parts(place.resolve().name, place, None, given, chosen, None, "auto", QueryConfig().depth, place)
    facts = _read_work(place / WORK_FILE)
    vectors, model, weights, mode = Path(facts["vectors"]), Path(facts["model"]), facts["weights"], facts["mode"]
    if system not in (None, model.name):
        vectors, model, weights, mode = vectors.parent / system, model.parent / system, None, "auto"
    return Parts(
        model.name,
        place / vectors,
        place / model,
        Path(words or place / facts["bm25"]),
        chosen,
        weights and tuple(weights),
        mode,
        facts["k"],
        place / TEACHER,
    )


def _read_work(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = {"model", "vectors", "bm25", "mode", "k", "weights"} - set(facts)
    except (ValueError, TypeError) as error:
        raise ArtefactError("The file cannot be read.", path=path, remedy="Run pairdr run again.") from error
    if missing:
        raise ArtefactError(f"{sorted(missing)[0]!r} is missing.", path=path, remedy="Run pairdr run again.")
    return facts
