"""Encode a corpus into a vector store, shard by shard; an interrupted call goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from pairdr.artefact import hash_file, publish, replace_file
from pairdr.collection import Collection
from pairdr.config import EncodeConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import PairdrError
from pairdr.progress import show_progress
from pairdr.records import Passage
from pairdr.vectors import ID_SCHEMA, VectorStore


def encode_corpus(
    collection: Collection, encoder: DualEncoder, config: EncodeConfig, output: str | Path
) -> VectorStore:
    """Encode every passage and publish the vectors.

    The batch plan is a function of the shard, so the same shard on the same kind of processor gives the same bytes.

    Args:
        collection: the corpus.
        encoder: the model.
        config: shard size and batch size.
        output: the folder of the store.

    Returns:
        The published store.

    Raises:
        PairdrError: a vector that is not finite; the disk is full.
    """
    inputs = {"passages": collection.passages_fingerprint, "encoder": encoder.fingerprint}
    with publish(output, "vectors", options=config.as_dict(), inputs=inputs, resume=True) as staging:
        with show_progress("encode", len(collection.passages)) as advance:
            for number, block in enumerate(collection.read_passages(config.shard_size)):
                path = staging.path / f"{number:05d}.npy"
                if not _is_finished(path):
                    _write_shard(path, block, encoder, config)
                advance(len(block))
        for marker in staging.path.glob("*.done"):
            marker.unlink()
        _write_ids(staging.path / "ids.arrow", collection)
        staging.facts |= {
            "count": len(collection.passages),
            "dimensions": encoder.contract.dimensions,
            "dtype": "float32",
            "similarity": encoder.contract.similarity,
        }
    return VectorStore(output)


def _is_finished(path: Path) -> bool:
    marker = path.with_suffix(".done")
    return path.is_file() and marker.is_file() and json.loads(marker.read_text())["sha256"] == hash_file(path)


def _write_shard(path: Path, block: list[Passage], encoder: DualEncoder, config: EncodeConfig) -> None:
    vectors = encoder.encode_passages(block, config.tokens_per_batch)  # [n, D]
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise PairdrError(
            f"The vector of passage {block[row].passage_id!r} is not finite.",
            path=path,
            remedy="The model is broken; train or download it again.",
        )
    np.save(path, vectors, allow_pickle=False)
    replace_file(path.with_suffix(".done"), json.dumps({"sha256": hash_file(path)}))


def _write_ids(path: Path, collection: Collection) -> None:
    passages = collection.passages
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, ID_SCHEMA) as writer:
        at = 0
        for block in passages.read_blocks(("id",)):
            ids = pa.array([row[0] for row in block], pa.large_string())
            ranks = pa.array(passages.id_rank[at : at + len(block)], pa.int64())
            writer.write_batch(pa.RecordBatch.from_arrays([ids, ranks], schema=ID_SCHEMA))
            at += len(block)
