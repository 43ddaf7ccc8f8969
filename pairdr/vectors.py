"""The vector store: immutable shards, and a manifest that says which of their rows are the present version.

    manifest.json                        the present version: its shards, dead rows, encoder, sha256 of every file
    shards/NAME.npy                      [n, D] vectors: float32, float16, or int8
    shards/NAME.scales.npy               [n] what an int8 row is multiplied by
    shards/NAME.arrow                    the rows: id, hash of the text, title, text, metadata
    versions/00000003.{hashes,rows,rank,dead}.npy     which rows live, and where an id is

A shard is named by what it was made from, so equal input has an equal name, and a shard that a killed call has
finished is found again. A new version is new files and then one renamed manifest: a reader has the old version or the
new one. Files that neither the present manifest nor the one before it names are removed by the next writer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pairdr.artefact import VERSION, Manifest, read_whole
from pairdr.errors import ArtefactError
from pairdr.ids import IdIndex, hash_text
from pairdr.records import PASSAGE_COLUMNS, Passage
from pairdr.rows import RowReader

Dtype = Literal["float32", "float16", "int8"]
Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
BLOCK = 8192
SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("key", pa.uint64()),
        ("hash", pa.uint64()),
        ("title", pa.large_string()),
        ("text", pa.large_string()),
        ("metadata", pa.large_string()),
    ]
)


@dataclass(frozen=True)
class Shard:
    """Rows start .. start + count - 1 of a store."""

    name: str
    start: int
    count: int


def hash_passage(passage: Passage) -> int:
    """Return a 64-bit hash of what a passage's vector is made of."""
    return hash_text(f"{passage.title}\0{passage.text}")


def to_float32(stored: npt.NDArray[Any], scales: Vectors | None = None) -> Vectors:
    """Return [n, D] fp32 vectors of stored ones, times the [n] scales of int8 ones."""
    if scales is not None:
        found: Vectors = np.multiply(stored, scales[:, None], dtype=np.float32)
        return found
    return stored.astype(np.float32, copy=False)


def to_stored(vectors: Vectors, dtype: Dtype) -> tuple[npt.NDArray[Any], Vectors | None]:
    """Return [n, D] vectors as they are stored, and the [n] scales of int8 ones: the largest number becomes 127."""
    if dtype != "int8":
        return vectors.astype(dtype, copy=False), None
    largest = np.abs(vectors).max(axis=1, initial=0)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(vectors / scales[:, None]).astype(np.int8), scales


class VectorStore:
    """One version of the vectors of a corpus by one encoder, memory-mapped.

    Attributes:
        count: N rows, dead ones among them.
        alive: [N] which rows are not deleted; None where all are alive.
        dimensions: D.
        dtype: float32, float16 or int8.
        similarity: cosine or dot.
        version: counts up.
        fingerprint: of the content.
        encoder: fingerprint of the model that made the vectors.
        passages_fingerprint: of the corpus that they were last made equal to; a hash of its own after other changes.
        shards: its parts, in the order of rows.
        id_rank: [N] place of each row's id in the order of all ids.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        read_whole(folder, "vectors", self._open)

    def _open(self, manifest: Manifest) -> None:
        facts = manifest.facts
        self.manifest, self.fingerprint = manifest, manifest.fingerprint
        self.count, self.dimensions, self.version = facts["count"], facts["dimensions"], facts[VERSION]
        self.dtype: Dtype = facts["dtype"]
        self.similarity = str(facts["similarity"])
        self.encoder, self.passages_fingerprint = manifest.inputs["encoder"], manifest.inputs["passages"]
        self._starts: Rows = np.cumsum([0, *(count for _, count in facts["shards"])])
        self.shards = [Shard(name, int(at), n) for (name, n), at in zip(facts["shards"], self._starts, strict=False)]
        folder = self.folder / "shards"
        self._vectors = [np.load(folder / f"{shard.name}.npy", mmap_mode="r") for shard in self.shards]
        self._scales = [
            np.load(folder / f"{shard.name}.scales.npy", mmap_mode="r") if self.dtype == "int8" else None
            for shard in self.shards
        ]
        self._tables = [map_table(folder / f"{shard.name}.arrow") for shard in self.shards]
        self._rows = RowReader(self._tables)
        ids = pa.chunked_array([chunk for t in self._tables for chunk in t["id"].chunks], pa.large_string())
        self._index = IdIndex(self.folder / "versions", f"{self.version:08d}", ids)
        self.id_rank = self._index.rank
        dead = np.load(self.folder / "versions" / f"{self.version:08d}.dead.npy", allow_pickle=False)
        self.alive: npt.NDArray[np.bool_] | None = None
        if len(dead):
            self.alive = np.ones(self.count, dtype=np.bool_)
            self.alive[dead] = False

    @property
    def live(self) -> int:
        """Return how many passages there are."""
        return self.count if self.alive is None else int(self.alive.sum())

    def require_encoder(self, fingerprint: str) -> None:
        """Refuse vectors of another model, prefix or length.

        Raises:
            ArtefactError: naming both fingerprints.
        """
        if fingerprint != self.encoder:
            raise ArtefactError(
                f"These vectors were made by encoder {self.encoder[:12]}, not by {fingerprint[:12]}.",
                path=self.folder,
                remedy="Run pairdr encode with this model.",
            )

    def rows_of(self, passage_ids: Sequence[str]) -> Rows:
        """Return the row of each id [n], -1 where no passage has it."""
        return self._index.find_rows(passage_ids)

    def ids_of(self, rows: Rows) -> list[str]:
        """Return the passage ids of rows."""
        return [str(row[0]) for row in self._rows.take(rows, ("id",))]

    def passages_of(self, rows: Rows) -> list[Passage]:
        """Return the passages of rows."""
        return [Passage(*row) for row in self._rows.take(rows, PASSAGE_COLUMNS)]

    def metadata_of(self, rows: Rows) -> list[str]:
        """Return the metadata of rows, as `Passage` has it."""
        return [str(row[0]) for row in self._rows.take(rows, ("metadata",))]

    def hashes_of(self, rows: Rows) -> npt.NDArray[np.uint64]:
        """Return `hash_passage` of rows."""
        return np.array([row[0] for row in self._rows.take(rows, ("hash",))], dtype=np.uint64)

    @property
    def metadata(self) -> pa.ChunkedArray:
        """Return the metadata [N] of all rows, as `Passage` has it."""
        return pa.chunked_array([chunk for t in self._tables for chunk in t["metadata"].chunks], pa.large_string())

    def read_raw(
        self, size: int = BLOCK, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[Any], Vectors | None]]:
        """Yield (first row, [n, D] vectors as stored, their [n] scales) in order; a block never spans two shards.

        Only the blocks that begin at `first` or later, and before `last`.
        """
        rows = range(first, self.count if last is None else last)
        for shard, vectors, scales in zip(self.shards, self._vectors, self._scales, strict=True):
            for at in range(0, shard.count, size):
                if shard.start + at in rows:
                    part = slice(at, at + size)
                    yield shard.start + at, vectors[part], None if scales is None else scales[part]

    def read_blocks(self, size: int = BLOCK) -> Iterator[tuple[int, Vectors]]:
        """Yield (first row, [n, D] fp32 vectors) in order, dead rows among them."""
        for start, stored, scales in self.read_raw(size):
            yield start, to_float32(stored, scales)

    def read_passages(self, size: int = BLOCK) -> Iterator[list[Passage]]:
        """Yield the live passages in the order of rows, a block at a time."""
        for start in range(0, self.count, size):
            rows: Rows = np.arange(start, min(start + size, self.count), dtype=np.int64)
            yield self.passages_of(rows if self.alive is None else rows[self.alive[rows]])

    def take(self, rows: Rows) -> Vectors:
        """Return [n, D] fp32 vectors of rows."""
        return to_float32(*self.take_stored(rows))

    def take_stored(self, rows: Rows) -> tuple[npt.NDArray[Any], Vectors | None]:
        """Return [n, D] vectors of rows as they are stored, and the [n] scales of int8 ones."""
        taken = np.empty((len(rows), self.dimensions), dtype=self.dtype)
        factors = np.empty(len(rows), dtype=np.float32) if self.dtype == "int8" else None
        for number, here in self._split(rows):
            places, scales = rows[here] - self._starts[number], self._scales[number]
            taken[here] = self._vectors[number][places]
            if factors is not None and scales is not None:
                factors[here] = scales[places]
        return taken, factors

    def take_passages(self, passage_ids: Sequence[str]) -> Vectors:
        """Return the [n, D] fp32 vectors of passages by id; all of them have to be there."""
        return self.take(self.rows_of(passage_ids))

    def _split(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Yield the number of each shard that some rows are in, and the places of these in `rows`."""
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard_of).tolist():
            yield number, np.flatnonzero(shard_of == number)


def map_table(path: Path) -> pa.Table:
    """Return the memory-mapped rows of a shard."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
