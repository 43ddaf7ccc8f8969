"""Encode a corpus into a vector store, shard by shard; an interrupted call goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from pairdr.artefact import hash_json
from pairdr.backends import Encoder
from pairdr.collection import Collection
from pairdr.config import EncodeConfig
from pairdr.errors import DataError
from pairdr.progress import say, show_progress
from pairdr.records import Passage, split_blocks
from pairdr.vectors import Rows, VectorStore, hash_passage
from pairdr.versions import StoreWriter, write_store


def encode_corpus(collection: Collection, encoder: Encoder, config: EncodeConfig, output: str | Path) -> VectorStore:
    """Make a store hold the vectors of exactly this corpus, and publish it as one version.

    Vectors by the same encoder that are there already are kept where the text is the same; what is gone is deleted.
    The batch plan is a function of the shard, so the same shard on the same kind of processor gives the same bytes.

    Args:
        collection: the corpus.
        encoder: the model.
        config: shard size, batch size, and how vectors are stored.
        output: the folder of the store.

    Returns:
        The published store.

    Raises:
        PairdrError: a vector that is not finite; the disk is full.
        UsageError: another writer is at work.
    """
    inputs = {"passages": collection.passages_fingerprint, "encoder": encoder.fingerprint}
    with write_store(output, config.dtype, inputs) as writer, show_progress("encode", len(collection.passages)) as step:
        if writer.base is not None and writer.base.collection == collection.passages_fingerprint:
            return writer.base
        gone = np.ones(len(writer.dead), dtype=np.bool_)

        def read_new() -> Iterator[Passage]:
            for block in collection.read_passages(config.shard_size):
                old = _find_unchanged(writer, block)
                gone[old[old >= 0]] = False
                step(int((old >= 0).sum()))
                yield from (passage for passage, row in zip(block, old.tolist(), strict=True) if row < 0)

        for block in split_blocks(read_new(), config.shard_size):
            _add_shard(writer, block, encoder, config)
            step(len(block))
        if writer.base is not None:
            writer.dead |= gone
            say(f"pairdr: {int((~gone).sum())} of {len(collection.passages)} passages had vectors already")
        writer.publish(encoder.contract.dimensions, encoder.contract.similarity, config.as_dict())
    return VectorStore(output)


def upsert_passages(
    passages: Sequence[Passage], encoder: Encoder, config: EncodeConfig, output: str | Path
) -> VectorStore:
    """Make a version of a store in which some passages are new, or have another text.

    Raises:
        ArtefactError: there is no store, or it is of another encoder.
        UsageError: another writer is at work.
        DataError: an id that occurs twice.
    """
    store = VectorStore(output)
    store.require_encoder(encoder.fingerprint)
    passages = settle_duplicates(passages, "error")
    changes = sorted((p.passage_id, hash_passage(p)) for p in passages)
    inputs = {"encoder": store.encoder, "passages": hash_json([store.collection, "upserted", changes])}
    with write_store(output, store.dtype, inputs) as writer:
        store = writer.base or store
        unchanged = _find_unchanged(writer, passages)
        new = [passage for passage, row in zip(passages, unchanged.tolist(), strict=True) if row < 0]
        if not new:
            return store
        old = store.rows_of([passage.passage_id for passage in new])
        with show_progress("encode", len(new)) as step:
            for block in split_blocks(new, config.shard_size):
                _add_shard(writer, block, encoder, config)
                step(len(block))
        writer.dead[old[old >= 0]] = True
        writer.publish(store.dimensions, store.similarity, store.manifest.options)
    return VectorStore(output)


def settle_duplicates(passages: Sequence[Passage], on_duplicate: Literal["error", "first", "last"]) -> list[Passage]:
    """Return passages with one of each id.

    Raises:
        DataError: an id occurs twice, and no choice was made.
    """
    chosen: dict[str, Passage] = {}
    for passage in passages:
        if passage.passage_id in chosen and on_duplicate == "error":
            raise DataError(
                f"The id {passage.passage_id!r} occurs twice.", remedy="Choose --on-duplicate first or last."
            )
        if passage.passage_id not in chosen or on_duplicate == "last":
            chosen[passage.passage_id] = passage
    return list(chosen.values())


def _find_unchanged(writer: StoreWriter, passages: Sequence[Passage]) -> Rows:
    """Return the row of each passage that the present version has with the same text, else -1."""
    if writer.base is None:
        return np.full(len(passages), -1, dtype=np.int64)
    rows = writer.base.rows_of([passage.passage_id for passage in passages])
    there = np.flatnonzero(rows >= 0)
    hashes = np.array([hash_passage(passages[at]) for at in there.tolist()], dtype=np.uint64)
    rows[there[writer.base.hashes_of(rows[there]) != hashes]] = -1
    return rows


def _add_shard(writer: StoreWriter, block: list[Passage], encoder: Encoder, config: EncodeConfig) -> None:
    name = writer.name_shard(block, config.tokens_per_batch)
    if not writer.find_shard(name):
        writer.write_shard(name, block, encoder.encode_passages(block, config.tokens_per_batch))
    writer.shards.append((name, len(block)))
