"""Encode a corpus into a vector store, shard by shard; an interrupted call goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pairdr.backends import Encoder
from pairdr.collection import Collection
from pairdr.config import EncodeConfig, OnDuplicate
from pairdr.errors import ArtefactError, DataError
from pairdr.files import hash_json
from pairdr.progress import Advance, say, show_progress
from pairdr.records import Passage, split_blocks
from pairdr.vectors import BLOCK, Dtype, Rows, Vectors, VectorStore, hash_passage
from pairdr.versions import StoreWriter, write_store

_ROUNDING: dict[Dtype, float] = {"float32": 1e-6, "float16": 1e-3, "int8": 1 / 127}
"""Of a vector's largest number."""


class Shard(NamedTuple):
    """A shard that is still to be made.

    Attributes:
        name: of the shard.
        rows: [n] its passages, by their rows in the corpus.
        new: [m] those of them that need a vector.
    """

    name: str
    rows: Rows
    new: Rows


MakeVectors = Callable[[Iterator[Shard]], Iterator[tuple[Shard, Vectors]]]
"""Takes shards and yields each with the vectors [m, D] of its new passages, in any order."""


def encode_corpus(
    collection: Collection,
    encoder: Encoder,
    config: EncodeConfig,
    output: str | Path,
    make_vectors: MakeVectors | None = None,
) -> VectorStore:
    """Make a store hold the vectors of exactly this corpus, and publish it as one version.

    Vectors by the same encoder that are there already are kept where the text is the same; what is gone is deleted.
    The batch plan is a function of the shard, so the same shard on the same kind of processor gives the same bytes.

    Args:
        collection: the corpus.
        encoder: the model.
        config: shard size, batch size, and how vectors are stored.
        output: the folder of the store.
        make_vectors: makes them elsewhere, by the same model; None makes them here.

    Returns:
        The published store.

    Raises:
        PairdrError: a vector that is not finite; the disk is full.
        UsageError: another writer is at work.
    """
    passages, total = collection.passages_fingerprint, len(collection.passages)

    def make_here(shards: Iterator[Shard]) -> Iterator[tuple[Shard, Vectors]]:
        for shard in shards:
            yield shard, encoder.encode_passages(collection.passages_at(shard.new), config.tokens_per_batch)

    with write_store(output, config.dtype, encoder.fingerprint) as writer, show_progress("encode", total) as step:
        if writer.base is not None and writer.base.passages_fingerprint == passages:
            return writer.base
        if writer.base is None:
            size = np.dtype(config.dtype).itemsize * encoder.contract.dimensions
            writer.require_space(total * size)
        gone = np.ones(len(writer.dead), dtype=np.bool_)
        for shard, vectors in (make_vectors or make_here)(_plan_shards(collection, writer, config, gone, step)):
            _write_vectors(writer, shard.name, collection.passages_at(shard.rows), vectors)
            step(len(shard.rows))
        if writer.base is not None:
            writer.dead |= gone
            say(f"pairdr: {int((~gone).sum())} of {total} passages had vectors already")
        writer.publish(passages, encoder.contract.dimensions, encoder.contract.similarity, config.as_dict())
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
    changes = sorted((p.passage_id, hash_passage(p), p.metadata) for p in passages)
    with write_store(output, store.dtype, store.encoder) as writer:
        store = writer.require_base()
        unchanged = _find_unchanged(writer, passages)
        new = [passage for passage, row in zip(passages, unchanged.tolist(), strict=True) if row < 0]
        if not new:
            return store
        old = store.rows_of([passage.passage_id for passage in new])
        with show_progress("encode", len(new)) as step:
            for block in split_blocks(new, config.shard_size):
                name, fresh = _name_shard(writer, block, config)
                if not writer.find_shard(name):
                    changed = [passage for passage, is_new in zip(block, fresh.tolist(), strict=True) if is_new]
                    _write_vectors(writer, name, block, encoder.encode_passages(changed, config.tokens_per_batch))
                writer.shards.append((name, len(block)))
                step(len(block))
        writer.dead[old[old >= 0]] = True
        fingerprint = hash_json([store.passages_fingerprint, "upserted", changes])
        writer.publish(fingerprint, store.dimensions, store.similarity, store.manifest.options)
    return VectorStore(output)


def verify_vectors(store: VectorStore, encoder: Encoder, sample: int | None = None, seed: int = 13) -> int:
    """Encode passages of a store again and compare.

    A text's vector depends on what it is batched with, in its last bits, or more where products are in int8 or bf16. So
    equal means: no number differs by more than that and the stored type explain (`Encoder.noise`, rounding).

    Args:
        store: the vectors.
        encoder: what made them.
        sample: how many passages, drawn at random; None is all.
        seed: of the draw.

    Returns:
        How many were compared.

    Raises:
        ArtefactError: vectors of another encoder, or a vector that differs, with its passage.
    """
    store.require_encoder(encoder.fingerprint)
    live: Rows = np.arange(store.count) if store.alive is None else np.flatnonzero(store.alive)
    if sample is not None:
        live = np.sort(np.random.default_rng(seed).permutation(live)[:sample])
    with show_progress("verify", len(live)) as step:
        for block in split_blocks(live.tolist(), BLOCK):
            rows: Rows = np.array(block, dtype=np.int64)
            stored, fresh = store.take(rows), encoder.encode_passages(store.passages_of(rows))  # [n, D]
            share = encoder.noise + _ROUNDING[store.dtype]
            allowed = share * np.maximum(np.abs(fresh).max(axis=1), 1e-6)
            wrong = np.flatnonzero(np.abs(stored - fresh).max(axis=1) > allowed)
            if len(wrong):
                (passage_id,) = store.ids_of(rows[wrong[:1]])
                raise ArtefactError(
                    f"The vector of passage {passage_id!r} is not that of its text ({len(wrong)} of {len(rows)} here).",
                    path=store.folder,
                    remedy="Delete the folder and run pairdr encode again.",
                )
            step(len(rows))
    return len(live)


def settle_duplicates(passages: Sequence[Passage], on_duplicate: OnDuplicate) -> list[Passage]:
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
    """Return the row of each passage that the present version has as it is, else -1."""
    rows = _find_vectors(writer, passages)
    there = np.flatnonzero(rows >= 0)
    if writer.base is not None and len(there):
        known = [passage.metadata for passage in writer.base.passages_of(rows[there])]
        rows[there[[passages[at].metadata != old for at, old in zip(there.tolist(), known, strict=True)]]] = -1
    return rows


def _find_vectors(writer: StoreWriter, passages: Sequence[Passage]) -> Rows:
    """Return the row of each passage that the present version has with the same text, else -1."""
    if writer.base is None:
        return np.full(len(passages), -1, dtype=np.int64)
    rows = writer.base.rows_of([passage.passage_id for passage in passages])
    there = np.flatnonzero(rows >= 0)
    hashes = np.array([hash_passage(passages[at]) for at in there.tolist()], dtype=np.uint64)
    rows[there[writer.base.hashes_of(rows[there]) != hashes]] = -1
    return rows


def _plan_shards(
    collection: Collection, writer: StoreWriter, config: EncodeConfig, gone: npt.NDArray[np.bool_], step: Advance
) -> Iterator[Shard]:
    """Cut what is new in a corpus into the shards of the next version, and yield those that are not there yet.

    Shards are noted in the writer in the order of the corpus, whenever they are made.

    Args:
        collection: the corpus.
        writer: of the store.
        config: how many passages a shard has.
        gone: [N] of the present version; what the corpus still has is crossed out.
        step: moves on by what is there.
    """

    def read_new() -> Iterator[tuple[int, Passage]]:
        start = 0
        for block in collection.read_passages(config.shard_size):
            old = _find_unchanged(writer, block)
            gone[old[old >= 0]] = False
            step(int((old >= 0).sum()))
            yield from ((start + at, block[at]) for at in np.flatnonzero(old < 0).tolist())
            start += len(block)

    for numbered in split_blocks(read_new(), config.shard_size):
        rows: Rows = np.array([row for row, _ in numbered], dtype=np.int64)
        name, fresh = _name_shard(writer, [passage for _, passage in numbered], config)
        writer.shards.append((name, len(rows)))
        if writer.find_shard(name):
            step(len(rows))
        else:
            yield Shard(name, rows, rows[fresh])


def _name_shard(
    writer: StoreWriter, block: Sequence[Passage], config: EncodeConfig
) -> tuple[str, npt.NDArray[np.bool_]]:
    """Return the name of a shard, and which [n] of its passages need a vector: not where only metadata changed."""
    old = _find_vectors(writer, block)
    return writer.name_shard(block, config.tokens_per_batch, np.flatnonzero(old >= 0).tolist()), old < 0


def _write_vectors(writer: StoreWriter, name: str, block: Sequence[Passage], made: Vectors) -> None:
    """Write a shard of the [m, D] vectors that were made, and those that its other passages have already."""
    old = _find_vectors(writer, block)
    vectors = np.zeros((len(block), made.shape[1]), dtype=np.float32)  # [n, D]
    vectors[old < 0] = made
    writer.write_shard(name, block, vectors, old)
