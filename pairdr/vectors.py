"""The vector store: a folder of fp32 shards, the passage ids, and a manifest that names the encoder.

Shard files are in the order of the collection; row i of all shards together is passage i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pairdr.artefact import read_manifest
from pairdr.collection import Collection
from pairdr.errors import ArtefactError

ID_SCHEMA = pa.schema([("id", pa.large_string()), ("rank", pa.int64())])


class VectorStore:
    """Vectors of one corpus by one encoder, memory-mapped.

    Attributes:
        count: N.
        dimensions: D.
        encoder: fingerprint of the model that made the vectors.
        collection: fingerprint of the corpus.
    """

    def __init__(self, folder: str | Path) -> None:
        manifest = read_manifest(folder, "vectors")
        self.folder, self.fingerprint = Path(folder), manifest.fingerprint
        self.count, self.dimensions = int(manifest.facts["count"]), int(manifest.facts["dimensions"])
        self.encoder, self.collection = str(manifest.inputs["encoder"]), str(manifest.inputs["passages"])
        names = sorted(name for name in manifest.files if name.endswith(".npy"))
        self._shards = [np.load(self.folder / name, mmap_mode="r", allow_pickle=False) for name in names]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        with pa.memory_map(str(self.folder / "ids.arrow")) as source:
            self._ids = pa.ipc.open_file(source).read_all()
        self.id_rank: npt.NDArray[np.int64] = self._ids.column("rank").to_numpy()

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

    def ids_of(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Return the passage ids of rows."""
        return list(self._ids.column("id").take(pa.array(rows)).to_pylist())

    def read_blocks(self, size: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (first row, [n, D] vectors) in order; a block never spans two shards."""
        for start, shard in zip(self._starts[:-1], self._shards, strict=True):
            for at in range(0, len(shard), size):
                yield int(start) + at, shard[at : at + size]

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return [n, D] vectors of rows."""
        taken = np.empty((len(rows), self.dimensions), dtype=np.float32)
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard_of):
            here = shard_of == number
            taken[here] = self._shards[number][rows[here] - self._starts[number]]
        return taken


@dataclass(frozen=True)
class KnownVectors:
    """Vectors of a corpus that are there already, by passage id."""

    collection: Collection
    store: VectorStore

    def take(self, passage_ids: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the [n, D] vectors of passages."""
        rows = [self.collection.passages.row_of(passage_id) for passage_id in passage_ids]
        return self.store.take(np.array(rows, dtype=np.int64))
