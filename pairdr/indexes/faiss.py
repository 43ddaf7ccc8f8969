"""Approximate search: a faiss index names candidates, the store's own vectors score them.

So scores are inner products of what the store holds, whatever the index has kept of a vector. An index covers the
shards it was built from; rows of other shards (the delta) are searched exactly and merged, deleted rows are left out.
Where a filter leaves little, or the index finds too few, exact search answers. docs/search.md tells when it pays.

A .faiss file is read only if it is the one that `pairdr index` wrote: a crafted one could run code.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_info

from pairdr.artefact import Manifest, read_manifest
from pairdr.errors import ArtefactError, MissingExtraError
from pairdr.indexes.exact import Allowed, Block, Rows, Scores, score_candidates, search_exact
from pairdr.vectors import VectorStore

INDEX_FILE = "index.faiss"
BLOCK = 8192  # rows
_LEAST_ALLOWED = 0.1  # below this share of allowed rows, exact search looks at fewer vectors than the index would
_OLD_CORES = ("Haswell", "SkylakeX", "Zen")


@dataclass(frozen=True)
class Effort:
    """How hard an index searches.

    Attributes:
        probes: lists of an ivf index that are looked into, or the queue of an hnsw one.
        candidates: rows that are scored exactly, for each that is asked for.
    """

    probes: int
    candidates: int


class _Chosen(NamedTuple):
    """Rows that may be found: a mask [N] or None for all, their count, those in the index, and faiss's selector."""

    rows: Allowed | None
    total: int
    known: int
    selector: Any


class FaissIndex:
    """An index over a store: `search` has the form of `search_exact`.

    Attributes:
        effort: how hard it searches, as `pairdr index` tuned it.
        changed: share of the store's live rows that the index does not know, and of its own that were deleted.
        needs_rebuild: whether that is past the option rebuild_share.
    """

    def __init__(
        self,
        index: Any,
        kind: str,
        shards: Sequence[tuple[str, int]],
        effort: Effort,
        depth: int,
        store: VectorStore,
        *,
        rebuild_share: float = 1.0,
        threads: int | None = None,
    ) -> None:
        """Put an index over a store.

        Args:
            index: faiss's; None for kind flat, which is exact search.
            kind: flat, ivf or hnsw.
            shards: name and row count of the shards it covers, in its own order.
            effort: how hard it searches.
            depth: results per query at which it was tuned; candidates are not fewer where fewer are asked for.
            store: what it was built from, in this or a later version.
            rebuild_share: share of changed rows from which it should be built anew.
            threads: of a search; None is all.
        """
        self.kind, self.effort, self.store = kind, effort, store
        self._index, self._depth, self._threads = index, depth, threads
        places = {shard.name: shard.start for shard in store.shards}
        ranges = [_count_from(places.get(name), count) for name, count in shards]
        # The row of each place in the index; -1 where it is gone from the store.
        self._rows = np.concatenate([np.zeros(0, np.int64), *ranges])
        known = np.zeros(store.count, dtype=np.bool_)
        known[self._rows[self._rows >= 0]] = True
        self._new = ~known if store.alive is None else ~known & store.alive
        self._all = self._choose(None)
        found = int((~self._new).sum()) - (store.count - self._all.total)  # live rows that the index knows
        changed = self._all.total + len(self._rows) - 2 * found
        self.changed = 0.0 if index is None else changed / max(1, self._all.total)
        self.needs_rebuild = self.changed > rebuild_share

    @classmethod
    def open(cls, folder: str | Path, store: VectorStore, *, threads: int | None = None) -> FaissIndex:
        """Open what `pairdr index` wrote over the store that it was built from.

        Raises:
            ArtefactError: no index, a file that is not the one that was written, or vectors of another model or corpus.
            MissingExtraError: faiss is not installed.
        """
        manifest, index = _read_index(Path(folder))
        facts = manifest.facts
        _require_store(manifest, store, Path(folder))
        return cls(
            index,
            facts["kind"],
            [(name, count) for name, count in facts["shards"]],
            Effort(**facts["effort"]),
            facts["recall_depth"],
            store,
            rebuild_share=manifest.options["rebuild_share"],
            threads=threads,
        )

    def search(self, queries: Scores, k: int, allowed: Allowed | None = None) -> tuple[Rows, Scores]:
        """Return the k best rows that it finds for each query, best first, ties by id rank.

        Args:
            queries: [Q, D].
            k: how many; fewer than k live rows leave places of row -1 and score -inf.
            allowed: [N] rows that may be found; None is all. Deleted ones never are.

        Returns:
            rows [Q, k] and scores [Q, k].
        """
        chosen = self._all if allowed is None else self._choose(allowed)
        if self._index is None or chosen.total < _LEAST_ALLOWED * self.store.count or not len(queries):
            return self._search_exactly(queries, k, chosen.rows)
        candidates = self._find_candidates(queries, k, chosen)
        if self._new.any():
            new = self._new if chosen.rows is None else self._new & chosen.rows
            blocks = (block for block in self.store.read_raw(BLOCK) if new[block[0] : block[0] + len(block[1])].any())
            found, _ = self._search_exactly(queries, k, new, blocks)
            candidates = np.concatenate([candidates, found], axis=1)
        rows, scores = self._score(queries, candidates, k)
        lacking = (rows >= 0).sum(axis=1) < min(k, chosen.total)
        if lacking.any():
            rows[lacking], scores[lacking] = self._search_exactly(queries[lacking], k, chosen.rows)
        return rows, scores

    def search_known(self, queries: Scores, k: int) -> tuple[Rows, Scores]:
        """Return what the index itself finds, as `search`: nothing of the delta, and too few where it finds too few."""
        return self._score(queries, self._find_candidates(queries, k, self._all), k)

    def _score(self, queries: Scores, candidates: Rows, k: int) -> tuple[Rows, Scores]:
        return score_candidates(queries, candidates, self.store.take, self.store.id_rank, k)

    def _find_candidates(self, queries: Scores, k: int, chosen: _Chosen) -> Rows:
        """Return rows [Q, c] that the index names, -1 where it names none."""
        depth = min(max(k, self._depth) * self.effort.candidates, chosen.known)
        if depth == 0:
            return np.full((len(queries), 0), -1, dtype=np.int64)
        faiss = load_faiss()
        probes = math.ceil(self.effort.probes * len(self._rows) / chosen.known)  # as many live ones as without a filter
        if self.kind == "ivf":
            options = faiss.SearchParametersIVF(nprobe=min(probes, self._index.nlist), sel=chosen.selector)
        else:
            options = faiss.SearchParametersHNSW(efSearch=max(probes, depth), sel=chosen.selector)
        with use_threads(self._threads):
            _, places = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), depth, params=options)
        return np.where(places < 0, -1, self._rows[places])

    def _search_exactly(
        self, queries: Scores, k: int, allowed: Allowed | None, blocks: Iterable[Block] | None = None
    ) -> tuple[Rows, Scores]:
        source = self.store.read_raw(BLOCK) if blocks is None else blocks
        return search_exact(queries, source, self.store.id_rank, k, allowed, threads=self._threads)

    def _choose(self, allowed: Allowed | None) -> _Chosen:
        alive = self.store.alive
        rows = allowed if alive is None else alive if allowed is None else alive & allowed
        known = self._rows >= 0 if rows is None else (self._rows >= 0) & rows[self._rows]
        selector = None
        if self._index is not None and not known.all():
            selector = load_faiss().IDSelectorBitmap(np.packbits(known, bitorder="little"))
        return _Chosen(rows, self.store.count if rows is None else int(rows.sum()), int(known.sum()), selector)


def load_faiss() -> Any:
    """Return the library.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        with _name_processor():
            import faiss
    except ImportError as error:
        raise MissingExtraError("faiss-cpu", "faiss") from error
    return faiss


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Let faiss use so many threads while the block runs; None leaves it as it is."""
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def use_blas() -> Iterator[None]:
    """Let faiss use matrix products while the block runs, which its wheel leaves to very large batches."""
    settings = load_faiss().cvar
    before = settings.distance_compute_blas_threshold
    settings.distance_compute_blas_threshold = 1
    try:
        yield
    finally:
        settings.distance_compute_blas_threshold = before


@contextmanager
def _name_processor() -> Iterator[None]:
    """Tell faiss's OpenBLAS the processor that numpy's has recognised; being years older, it may not know it."""
    if "faiss" in sys.modules or "OPENBLAS_CORETYPE" in os.environ:
        yield
        return
    found = {pool.get("architecture") for pool in threadpool_info()} & set(_OLD_CORES)
    if len(found) != 1:
        yield
        return
    os.environ["OPENBLAS_CORETYPE"] = str(found.pop())
    try:
        yield
    finally:
        del os.environ["OPENBLAS_CORETYPE"]


def _count_from(start: int | None, count: int) -> Rows:
    return np.full(count, -1, dtype=np.int64) if start is None else np.arange(start, start + count, dtype=np.int64)


def _read_index(folder: Path) -> tuple[Manifest, Any]:
    """Return the manifest and faiss's index; the file is read only after its sha256 has been found right."""
    manifest = read_manifest(folder, "index")
    if INDEX_FILE not in manifest.files:
        return manifest, None
    faiss = load_faiss()
    try:
        with (folder / INDEX_FILE).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() == manifest.files[INDEX_FILE]["sha256"]:
                stream.seek(0)
                return manifest, faiss.read_index(faiss.PyCallbackIOReader(stream.read))
    except FileNotFoundError:
        pass
    if read_manifest(folder, "index").fingerprint != manifest.fingerprint:
        return _read_index(folder)  # a newer one was published in between
    raise ArtefactError(
        f"{INDEX_FILE} is not the file that was written: its sha256 differs.",
        path=folder,
        remedy="Run pairdr index again.",
    )


def _require_store(manifest: Manifest, store: VectorStore, folder: Path) -> None:
    encoder, vectors = manifest.inputs["encoder"], manifest.inputs["vectors"]
    if encoder != store.encoder:
        raise ArtefactError(
            f"This index is of vectors by encoder {encoder[:12]}, not by {store.encoder[:12]}.",
            path=folder,
            remedy="Run pairdr index with these vectors.",
        )
    covered = {name for name, _ in manifest.facts["shards"]}
    if store.fingerprint != vectors and store.count and covered.isdisjoint(shard.name for shard in store.shards):
        raise ArtefactError(
            f"This index is of vectors {vectors[:12]}; the store is {store.fingerprint[:12]} and shares none of them.",
            path=folder,
            remedy="Run pairdr index with these vectors.",
        )
