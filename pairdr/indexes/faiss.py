"""Approximate search by faiss on this machine: an index in a folder, built by `pairdr index`.

docs/search.md tells when it pays. A .faiss file is read only if it is the one that `pairdr index` wrote: a crafted one
could run code.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from pairdr.artefact import Manifest, read_manifest
from pairdr.errors import ArtefactError, MissingExtraError
from pairdr.filters import Filters
from pairdr.indexes.candidates import CandidateIndex, Chosen, Effort
from pairdr.indexes.exact import Allowed, Rows, Scores
from pairdr.vectors import VectorStore

INDEX_FILE = "index.faiss"
_OLD_CORES = ("Haswell", "SkylakeX", "Zen")


class FaissIndex(CandidateIndex):
    """An index of faiss's over a store.

    Attributes:
        kind: flat, ivf or hnsw.
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
        super().__init__(store, effort, depth, rebuild_share=rebuild_share, threads=threads)
        self.kind, self._index = kind, index
        self._cover(shards)

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
        found = cls(
            index,
            facts["kind"],
            [(name, count) for name, count in facts["shards"]],
            Effort(**facts["effort"]),
            facts["recall_depth"],
            store,
            rebuild_share=manifest.options["rebuild_share"],
            threads=threads,
        )
        found.origin = {"place": str(folder), "fingerprint": manifest.fingerprint}
        return found

    @property
    def _has_index(self) -> bool:
        return self._index is not None

    def _find_places(self, queries: Scores, depth: int, chosen: Chosen, filters: Filters | None) -> Rows:
        faiss = load_faiss()
        probes = math.ceil(self.effort.probes * len(self._rows) / chosen.known)  # as many live ones as without a filter
        if self.kind == "ivf":
            options = faiss.SearchParametersIVF(nprobe=min(probes, self._index.nlist), sel=chosen.selector)
        else:
            options = faiss.SearchParametersHNSW(efSearch=max(probes, depth), sel=chosen.selector)
        with use_threads(self._threads):
            _, places = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), depth, params=options)
        found: Rows = places
        return found

    def _make_selector(self, known: Allowed) -> Any:
        if self._index is None or known.all():
            return None
        return load_faiss().IDSelectorBitmap(np.packbits(known, bitorder="little"))


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
