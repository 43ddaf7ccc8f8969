"""New versions of a vector store: rows added, deleted, compacted. A killed call loses at most the shard under way."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pairdr.artefact import MANIFEST, VERSION, publish_version, read_manifest
from pairdr.errors import ArtefactError, BusyError, PairdrError, UsageError
from pairdr.files import describe_file, explain_failed_writes, hash_file, hash_json, hold_lock, replace_file
from pairdr.ids import hash_text, write_id_index
from pairdr.lines import UrlPath, find_place
from pairdr.records import Passage
from pairdr.vectors import BLOCK, SCHEMA, Dtype, Rows, Vectors, VectorStore, hash_passage, map_table, to_stored

PARTS = ("shards", "versions")


class StoreWriter:
    """Makes the next version of a store: shards first, then the manifest. Made by `write_store`.

    Attributes:
        base: the present version; None where there is none that can be built upon.
        shards: name and count of the shards of the next version; those of the base come first.
        dead: which rows of the base the next version no longer has.
    """

    def __init__(self, folder: Path, dtype: Dtype, encoder: str) -> None:
        self.folder, self.dtype, self.encoder = folder, dtype, encoder
        self.base = _open_base(folder, dtype, encoder)
        self.shards: list[tuple[str, int]] = [] if self.base is None else [(s.name, s.count) for s in self.base.shards]
        self.dead = np.zeros(0 if self.base is None else self.base.count, dtype=np.bool_)
        if self.base is not None and self.base.alive is not None:
            self.dead = ~self.base.alive
        self._entries: dict[str, dict[str, Any]] = {} if self.base is None else dict(self.base.manifest.files)
        for shard, _ in self.shards:  # of a call that was killed after it had published
            (folder / "shards" / f"{shard}.done").unlink(missing_ok=True)

    def require_base(self) -> VectorStore:
        """Return the present version, seen from inside the lock.

        Raises:
            ArtefactError: another writer has made vectors of another encoder of them.
        """
        if self.base is None:
            raise ArtefactError(
                "Another writer has just changed the encoder of these vectors.", path=self.folder, remedy="Start again."
            )
        return self.base

    def require_space(self, size: int) -> None:
        """Refuse to begin where so many bytes have no room.

        Raises:
            ArtefactError: naming what is needed and what is free.
        """
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise ArtefactError(
                f"The vectors take {size / 2**20:.0f} MiB; {free / 2**20:.0f} MiB are free.",
                path=self.folder,
                remedy="Free some space, choose another place, or store them as --dtype float16 or int8.",
            )

    def name_shard(self, passages: Sequence[Passage], *made_with: object) -> str:
        """Return the name of the shard of these passages."""
        rows = [(p.passage_id, hash_passage(p), p.metadata) for p in passages]
        names = (hash_json([self.encoder, self.dtype, made_with, rows, number])[:32] for number in itertools.count())
        listed = {shard for shard, _ in self.shards}  # maybe the same passages, dead by now: an index goes by names
        return next(name for name in names if name not in listed)

    def find_shard(self, name: str) -> bool:
        """Return whether a shard is there whole, from a call that was killed; note its files."""
        marker = self.folder / "shards" / f"{name}.done"
        try:
            entries = json.loads(marker.read_text(encoding="utf-8"))
            whole = all(hash_file(self.folder / file) == entry["sha256"] for file, entry in entries.items())
        except (OSError, ValueError):
            return False
        if whole:
            self._entries |= entries
        return whole

    def write_shard(self, name: str, passages: Sequence[Passage], vectors: Vectors, old: Rows | None = None) -> None:
        """Write the vectors of some passages.

        Args:
            name: of the shard.
            passages: its rows.
            vectors: [n, D].
            old: [n] rows of the base whose stored bytes are kept in their place; -1 is none.

        Raises:
            PairdrError: a vector that is not finite.
        """
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise PairdrError(
                f"The vector of passage {passages[int(np.argmin(finite))].passage_id!r} is not finite.",
                path=self.folder,
                remedy="The model is broken; train or download it again.",
            )
        folder = self.folder / "shards"
        folder.mkdir(exist_ok=True)
        stored, scales = to_stored(vectors, self.dtype)
        if self.base is not None and old is not None:
            kept, factors = self.base.take_stored(old[old >= 0])
            stored[old >= 0] = kept
            if scales is not None and factors is not None:
                scales[old >= 0] = factors
        paths = [folder / f"{name}.npy", folder / f"{name}.arrow"]
        try:
            with _write_beside(paths[0]) as path:
                np.save(path, stored, allow_pickle=False)
            with _write_beside(paths[1]) as path:
                _write_table(path, passages)
            if scales is not None:
                paths.append(folder / f"{name}.scales.npy")
                with _write_beside(paths[2]) as path:
                    np.save(path, scales, allow_pickle=False)
        except BaseException:
            for path in paths:
                path.unlink(missing_ok=True)
            raise
        entries = {f"shards/{path.name}": describe_file(path) for path in paths}
        replace_file(folder / f"{name}.done", json.dumps(entries))
        self._entries |= entries

    def publish(self, passages: str, dimensions: int, similarity: str, options: dict[str, Any]) -> None:
        """Write the index of ids and the dead rows of `shards`, and make this the present version.

        Args:
            passages: fingerprint of the passages.
            dimensions: D.
            similarity: cosine or dot.
            options: what the vectors were made with.
        """
        version = 1 + _read_version(self.folder)
        folder, name = self.folder / "versions", f"{version:08d}"
        folder.mkdir(exist_ok=True)
        tables = [map_table(self.folder / "shards" / f"{shard}.arrow") for shard, _ in self.shards]
        rows = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        dead = np.flatnonzero(self.dead)
        live = np.setdiff1d(np.arange(rows.num_rows), dead, assume_unique=True)
        write_id_index(folder, name, rows["id"], rows["key"].to_numpy(), live)
        np.save(folder / f"{name}.dead.npy", dead, allow_pickle=False)
        named = {shard for shard, _ in self.shards}
        files = {file: entry for file, entry in self._entries.items() if file.split("/")[-1].split(".")[0] in named}
        for file in sorted(folder.glob(f"{name}.*")):
            files[f"versions/{file.name}"] = describe_file(file)
        facts = {
            VERSION: version,
            "count": rows.num_rows,
            "live": len(live),
            "dimensions": dimensions,
            "dtype": self.dtype,
            "similarity": similarity,
            "shards": self.shards,
        }
        before = _list_files(self.folder)
        inputs = {"passages": passages, "encoder": self.encoder}
        publish_version(self.folder, "vectors", options=options, inputs=inputs, facts=facts, files=files)
        _sweep(self.folder, {*before, *files})


@contextlib.contextmanager
def write_store(folder: str | Path, dtype: Dtype, encoder: str) -> Iterator[StoreWriter]:
    """Keep other writers out of a store while the block makes its next version.

    Args:
        folder: of the store; made where there is none.
        dtype: how vectors are stored.
        encoder: fingerprint of what makes the vectors.

    Raises:
        UsageError: another writer is at work, or something else stands there.
        ArtefactError: the disk is full; the present version is untouched.
    """
    folder = Path(folder)
    _require_place(folder)
    with explain_failed_writes(folder):
        try:
            with hold_lock(folder, wait=False):
                yield StoreWriter(folder, dtype, encoder)
        except BlockingIOError as error:
            raise BusyError(folder) from error


def delete_passages(folder: str | Path, passage_ids: Sequence[str]) -> VectorStore:
    """Make a version without some passages.

    Raises:
        UsageError: an id that is not there.
    """
    store = VectorStore(folder)
    with write_store(folder, store.dtype, store.encoder) as writer:
        store = writer.require_base()
        rows = store.rows_of(passage_ids)
        if (rows < 0).any():
            missing = [passage_ids[at] for at in np.flatnonzero(rows < 0).tolist()]
            raise UsageError(f"There is no passage {missing[0]!r} here ({len(missing)} in all).", path=folder)
        writer.dead[rows] = True
        passages = hash_json([store.passages_fingerprint, "deleted", sorted(set(passage_ids))])
        writer.publish(passages, store.dimensions, store.similarity, store.manifest.options)
    return VectorStore(folder)


def compact_store(folder: str | Path) -> VectorStore:
    """Make a version of the same passages without dead rows; shards that have none are kept as they are."""
    store = VectorStore(folder)
    with write_store(folder, store.dtype, store.encoder) as writer:
        store = writer.require_base()
        if not writer.dead.any():
            return store
        kept: list[tuple[str, int]] = []
        for shard in store.shards:
            rows: Rows = np.arange(shard.start, shard.start + shard.count, dtype=np.int64)
            live = rows if store.alive is None else rows[store.alive[rows]]
            if len(live) == shard.count:
                kept.append((shard.name, shard.count))
            elif len(live):
                passages = store.passages_of(live)
                name = writer.name_shard(passages, "compacted", shard.name)
                if not writer.find_shard(name):
                    none = np.zeros((len(live), store.dimensions), dtype=np.float32)
                    writer.write_shard(name, passages, none, live)
                kept.append((name, len(live)))
        writer.shards = kept
        writer.dead = np.zeros(0, dtype=np.bool_)
        writer.publish(store.passages_fingerprint, store.dimensions, store.similarity, store.manifest.options)
    return VectorStore(folder)


def verify_store(folder: str | Path) -> None:
    """Check that vectors are finite and ids are unique; `verify_artefact` checks the bytes.

    Raises:
        ArtefactError: naming the passage.
    """
    store = VectorStore(folder)
    for start, vectors in store.read_blocks():
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            (passage_id,) = store.ids_of(np.array([start + int(np.argmin(finite))]))
            raise ArtefactError(
                f"The vector of passage {passage_id!r} is not finite.", path=folder, remedy="Run pairdr encode again."
            )
    for start in range(0, store.count, BLOCK):
        rows: Rows = np.arange(start, min(start + BLOCK, store.count), dtype=np.int64)
        rows = rows if store.alive is None else rows[store.alive[rows]]
        ids = store.ids_of(rows)
        twice = np.flatnonzero(store.rows_of(ids) != rows)
        if len(twice):
            raise ArtefactError(
                f"Two vectors have the id {ids[int(twice[0])]!r}.", path=folder, remedy="Run pairdr encode again."
            )


def _open_base(folder: Path, dtype: Dtype, encoder: str) -> VectorStore | None:
    try:
        store = VectorStore(folder)
    except ArtefactError:
        return None
    return store if (store.encoder, store.dtype) == (encoder, dtype) else None


def _read_version(folder: Path) -> int:
    try:
        return int(read_manifest(folder, "vectors").facts.get(VERSION, 0))
    except ArtefactError:
        return 0


def _list_files(folder: Path) -> set[str]:
    try:
        return set(read_manifest(folder, "vectors").files)
    except ArtefactError:
        return set()


def _sweep(folder: Path, named: set[str]) -> None:
    """Remove the files of a store that no manifest needs any more; what else stands in its folder stays."""
    ours = [*folder.glob(f".{MANIFEST}.*"), *(path for part in PARTS for path in (folder / part).glob("*"))]
    for path in sorted(path for path in ours if path.is_file()):
        if path.relative_to(folder).as_posix() not in named:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _write_beside(path: Path) -> Iterator[Path]:
    """Yield a place for a file that is put at `path` once it is whole: a reader of an older file there keeps that."""
    place = path.with_name(f"part.{path.name}")
    try:
        yield place
        place.replace(path)
    except BaseException:
        place.unlink(missing_ok=True)
        raise


def _require_place(folder: Path) -> None:
    """Refuse a folder with other files: a store clears away what it does not know. Refuse a URL."""
    if isinstance(find_place(folder), UrlPath):
        raise UsageError(
            "Vectors are memory-mapped, so their place is a folder of this machine, or one that is mounted there.",
            path=folder,
            remedy="Name such a folder.",
        )
    if folder.is_file():
        raise UsageError("This is no place for an output folder.", path=folder, remedy="Name a new folder.")
    if not folder.is_dir():
        return
    others = {path.name for path in folder.iterdir() if not path.name.startswith(f".{MANIFEST}.")} - {*PARTS}
    if not others:  # new, or of a call that was killed before there was a version
        return
    kind = "other files"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kind = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kind"]
    if kind != "vectors":
        raise UsageError(
            f"This folder holds {kind!r}; 'vectors' would replace them all.",
            path=folder,
            remedy="Choose another --output, or delete the folder.",
        )


def _write_table(path: Path, passages: Sequence[Passage]) -> None:
    columns = [
        pa.array([p.passage_id for p in passages], pa.large_string()),
        pa.array([hash_text(p.passage_id) for p in passages], pa.uint64()),
        pa.array([hash_passage(p) for p in passages], pa.uint64()),
        pa.array([p.title for p in passages], pa.large_string()),
        pa.array([p.text for p in passages], pa.large_string()),
        pa.array([p.metadata for p in passages], pa.large_string()),
    ]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
