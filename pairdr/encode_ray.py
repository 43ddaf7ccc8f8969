"""Encode a corpus on a Ray cluster: the shards of the local encoder, their vectors made by workers that hold the model.

The driver cuts the corpus, skips what is there, and writes each shard as its vectors come. Passages are read on its
node, and a model that is a folder there is carried to the workers, so no file system has to be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from pairdr.backends import load_encoder
from pairdr.cluster import join_cluster
from pairdr.collection import Collection
from pairdr.config import EncodeConfig, ModelConfig
from pairdr.encode import Shard, encode_corpus
from pairdr.errors import RefusedError, UsageError
from pairdr.records import PASSAGE_COLUMNS, Passage
from pairdr.rows import RowReader
from pairdr.sources.minilm import find_minilm
from pairdr.store_config import RayConfig
from pairdr.vectors import Rows, Vectors, VectorStore, map_table
from pairdr.workers import ShippedFolder


def encode_collection(
    collection: Collection, model: ModelConfig, config: EncodeConfig, ray: RayConfig, output: str | Path
) -> VectorStore:
    """Make a store hold the vectors of exactly this corpus: here or on Ray, as the options say."""
    if ray.on == "ray":
        return encode_on_ray(collection, model, config, ray, output)
    return encode_corpus(collection, load_encoder(model), config, output)


def encode_on_ray(
    collection: Collection, model: ModelConfig, config: EncodeConfig, ray: RayConfig, output: str | Path
) -> VectorStore:
    """Make a store hold the vectors of exactly this corpus, as `encode_corpus` does, by workers of a Ray cluster.

    Args:
        collection: the corpus; its cache is on this machine.
        model: what encodes. A folder of this machine is carried to the workers; a hub name is loaded by each.
        config: as of `encode_corpus`.
        ray: the cluster, and how many workers of which size.
        output: the folder of the store, on this machine.

    Returns:
        The published store.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: no cluster, or one without room for a worker; a device, which is not this machine's to choose.
        PairdrError: of a worker, such as a model that is another one there.
    """
    if model.device is not None:
        raise UsageError(
            "Workers choose their device.", remedy="Leave --device out; --gpus-per-worker gives them GPUs."
        )
    model = replace(model, start=find_minilm() if model.start == "minilm" else model.start)
    encoder = load_encoder(replace(model, device="cpu"))

    def make_vectors(shards: Iterator[Shard]) -> Iterator[tuple[Shard, Vectors]]:
        waiting = dict(enumerate(shards))
        if not waiting:
            return
        with join_cluster(ray) as cluster:
            files = ShippedFolder.put(Path(model.start)) if Path(model.start).is_dir() else None
            device = "cuda" if ray.gpus_per_worker else "cpu"
            work = OpenEncoder(
                replace(model, device=device), files, encoder.fingerprint, ray.cpus_per_worker, config.tokens_per_batch
            )
            blocks = {number: shard.new for number, shard in waiting.items()}
            for number, vectors in cluster.map_blocks(blocks, ReadPassages(collection.folder), work):
                yield waiting.pop(number), vectors

    return encode_corpus(collection, encoder, config, output, make_vectors)


@dataclass(frozen=True)
class ReadPassages:
    """Reads passages of a converted collection by their rows."""

    folder: Path

    def __call__(self, rows: Rows) -> list[Passage]:
        """Return the passages."""
        return [Passage(*row) for row in _open_rows(self.folder).take(rows, PASSAGE_COLUMNS)]


@dataclass(frozen=True)
class OpenEncoder:
    """Loads the model in a worker and checks that it is the driver's."""

    model: ModelConfig
    files: ShippedFolder | None
    fingerprint: str
    threads: int
    tokens_per_batch: int | None

    def __call__(self) -> Callable[[list[Passage]], Vectors]:
        """Return what encodes passages.

        Raises:
            RefusedError: it is another model here.
        """
        with nullcontext(Path(self.model.start)) if self.files is None else self.files.unpack() as place:
            encoder = load_encoder(replace(self.model, start=str(place)), self.threads)
        if encoder.fingerprint != self.fingerprint:
            raise RefusedError(
                f"The model is {encoder.fingerprint[:12]} here, and {self.fingerprint[:12]} where the corpus is.",
                path=self.model.start,
                remedy="Name a folder, or a revision that all nodes load alike, and install the same versions on all.",
            )
        return lambda passages: encoder.encode_passages(passages, self.tokens_per_batch)


@lru_cache(maxsize=1)
def _open_rows(folder: Path) -> RowReader:
    return RowReader([map_table(folder / "passages.arrow")])
