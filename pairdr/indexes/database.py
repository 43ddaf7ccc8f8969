"""Vectors in a database as an index over a local store: the database names candidates, the store decides.

What the database finds is mapped to rows of the version that is open, or dropped, and scored by the store's vectors. So
an answer is always that of one version of the store, whatever state the database is in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pairdr.errors import ArtefactError, PairdrError, ServerError
from pairdr.files import hash_json
from pairdr.filters import Filters
from pairdr.ids import hash_text
from pairdr.indexes.address import read_address
from pairdr.indexes.candidates import CandidateIndex, Chosen, Effort
from pairdr.indexes.engine import BITS, Database, Facts, Held, MovedError
from pairdr.indexes.exact import Allowed, Rows, Scores
from pairdr.progress import say
from pairdr.vectors import Shard, VectorStore

FORMAT = 1
_LOOK = 2.0  # seconds between looks for what has changed in the database
_REST = 10.0  # seconds in which a server that did not answer is left alone


class DatabaseIndex(CandidateIndex):
    """A database over a store. It follows loads that are published while it is open.

    Where the server does not answer, or holds other vectors by now, exact search answers, and it says so once.

    Attributes:
        database: the engine.
        load: what is searched.
        facts: of it.
        exact_searches: searches that were exact, since the database could not: one for each question, and one more for
            each time that it is searched deeper.
    """

    def __init__(self, database: Database, load: str, store: VectorStore, *, threads: int | None = None) -> None:
        self.database, self.load, self.facts = database, load, dict[str, Any]()
        super().__init__(store, Effort(1, 1), 1, threads=threads)
        self._lock = threading.RLock()
        self._next_look, self._unsaid, self._usable = 0.0, True, True
        self.exact_searches = 0
        self._read()

    @classmethod
    def open(cls, url: str, store: VectorStore, *, threads: int | None = None) -> DatabaseIndex:
        """Open what `pairdr index` loaded into a database.

        Raises:
            ArtefactError: nothing is loaded there, or vectors of another model or corpus.
            ServerError: the server is absent, refuses, or is too old.
            MissingExtraError: the engine's client is not installed.
        """
        database = open_database(url)
        load = database.find_load()
        if load is None:
            raise ArtefactError(
                "Nothing is loaded here.", path=database.place, remedy="Run pairdr index VECTORS -o URL first."
            )
        return cls(database, load, store, threads=threads)

    def search(
        self, queries: Scores, k: int, allowed: Allowed | None = None, filters: Filters | None = None
    ) -> tuple[Rows, Scores]:
        """Return the k best rows that it finds for each query, as `CandidateIndex.search`."""
        with self._lock:
            try:
                self._look()
                if self._usable:
                    try:
                        return super().search(queries, k, allowed, filters)
                    except MovedError:
                        self._follow()
                        return super().search(queries, k, allowed, filters)
            except (ServerError, ArtefactError) as error:
                self._rest(error)
            self.exact_searches += len(queries)
            return self._search_exactly(queries, k, self._choose(allowed).rows)

    def describe(self) -> dict[str, Any]:
        """Return what a run keeps of how it was searched; the count is that since the index was opened."""
        return super().describe() | {"exact_searches": self.exact_searches}

    @property
    def _has_index(self) -> bool:
        return True

    def _find_places(self, queries: Scores, depth: int, chosen: Chosen, filters: Filters | None) -> Rows:
        live = max(1, self._all.known)
        depth = -(-depth * max(live, self._kept) // live)  # as many live ones as if no dead were there
        keys = self.database.search(self.load, queries, depth, self.effort.probes, hash_filters(filters or {}))
        if not keys.size or not len(self._numbers):
            return np.full((len(queries), 0), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._numbers, keys >> BITS), len(self._numbers) - 1)
        offsets = keys & (2**BITS - 1)
        ours = (keys >= 0) & (self._numbers[at] == keys >> BITS) & (offsets < self._counts[at])
        places = np.where(ours, self._firsts[at] + offsets, -1)
        rows = np.where(ours, self._rows[places], -1)
        good = rows >= 0 if chosen.rows is None else (rows >= 0) & chosen.rows[rows]
        return _keep_first(np.where(good, places, -1))

    def _look(self) -> None:
        """Follow what has changed in the database since the last look."""
        if time.monotonic() < self._next_look:
            return
        load = self.database.find_load()
        facts = None if load is None else self.database.read_facts(load, fresh=False)
        moved = facts is None or facts["revision"] != self.facts["revision"]
        if moved or not self._usable:
            self._follow()
        if not self._unsaid:
            say(f"pairdr: {self.database.place} answers again")
        self._next_look, self._unsaid, self._usable = time.monotonic() + _LOOK, True, True

    def _follow(self) -> None:
        load = self.database.find_load()
        if load is None:
            raise MovedError("Nothing is loaded here any more.", path=self.database.place)
        self.load = load
        self._read()

    def _read(self) -> None:
        facts = self.database.read_facts(self.load)
        if facts is None:
            raise MovedError("The load is gone.", path=self.database.place, remedy="Run pairdr index again.")
        shards = self.database.read_shards(self.load)
        require_store(facts, shards, self.store, self.database.place)
        live = {shard.name: describe_live(self.store, shard) for shard in self.store.shards}
        covered = sorted(held for held in shards if held.name not in live or _has_all(held, *live[held.name]))
        self.facts, self.origin = facts, {"place": self.database.place, "revision": facts["revision"]}
        self.effort, self._depth = Effort(**facts["effort"]), facts["recall_depth"]
        self._rebuild_share = facts["rebuild_share"]
        self._numbers = np.array([held.number for held in covered], dtype=np.int64)
        self._counts = np.array([held.rows for held in covered], dtype=np.int64)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._kept = sum(held.kept for held in covered if held.name in live)
        self._cover([(held.name, held.rows) for held in covered], sum(held.kept for held in covered))
        self._next_look = time.monotonic() + _LOOK

    def _rest(self, error: PairdrError) -> None:
        """Leave the server alone for a while, and say why, once."""
        if self._unsaid:
            say(f"pairdr: exact search answers, since {error}")
        self._unsaid, self._usable = False, False
        self._next_look = time.monotonic() + _REST


def open_database(url: str) -> Database:
    """Connect to a database.

    Args:
        url: docs/databases.md has its forms.

    Raises:
        UsageError: a URL of another form.
        ServerError: the server is absent, refuses, or is too old.
        MissingExtraError: the engine's client is not installed.
    """
    address = read_address(url)
    if address.scheme == "postgresql":
        from pairdr.indexes.pgvector import PostgresDatabase

        return PostgresDatabase(address)
    from pairdr.indexes.milvus import MilvusDatabase

    return MilvusDatabase(address)


def mask_live(store: VectorStore, start: int, count: int) -> npt.NDArray[np.bool_]:
    """Return which of some rows in order live."""
    if store.alive is None:
        return np.ones(count, dtype=np.bool_)
    return store.alive[start : start + count]


def describe_live(store: VectorStore, shard: Shard) -> tuple[int, str]:
    """Return how many rows of a shard live, and a digest of which."""
    live = mask_live(store, shard.start, shard.count)
    return int(live.sum()), hash_json([shard.name, np.packbits(live).tobytes().hex()])[:32]


def hash_mark(field: str, value: str) -> int:
    """Return what stands in a database for a field with a value: 63 bits, whatever the lengths of both."""
    return hash_text(f"{field}={value}") >> 1


def hash_filters(filters: Filters) -> list[list[int]]:
    """Return for each field the marks of which a row must have one."""
    return [sorted(hash_mark(field, value) for value in values) for field, values in sorted(filters.items())]


def require_store(facts: Facts, shards: Sequence[Held], store: VectorStore, place: str) -> None:
    """Refuse a load that is not of these vectors.

    Raises:
        ArtefactError: of another format, model or corpus.
    """
    if facts.get("format") != FORMAT:
        raise ArtefactError(
            f"This was loaded in format {facts.get('format')}; this version of pairdr reads {FORMAT}.",
            path=place,
            remedy="Run pairdr index again, or use the pairdr that wrote it.",
        )
    wanted = (store.encoder, store.similarity, store.dimensions)
    if (facts["encoder"], facts["similarity"], facts["dimensions"]) != wanted:
        raise ArtefactError(
            f"This database holds vectors by encoder {facts['encoder'][:12]} ({facts['similarity']}, "
            f"{facts['dimensions']} dimensions), not by {store.encoder[:12]} ({store.similarity}, {store.dimensions}).",
            path=place,
            remedy="Load these vectors with pairdr index, under another name if the others are still needed.",
        )
    names = {held.name for held in shards}
    if store.fingerprint != facts["store"] and store.count and names.isdisjoint(s.name for s in store.shards):
        raise ArtefactError(
            f"This database holds vectors {facts['store'][:12]}; the store is {store.fingerprint[:12]} and shares "
            "none of them.",
            path=place,
            remedy="Load these vectors with pairdr index.",
        )


_opened: dict[str, Database] = {}
_opening = threading.Lock()


def stamp_database(url: str) -> str | None:
    """Return what differs after something was loaded; None where nothing is.

    Raises:
        ServerError: the server does not answer.
    """
    with _opening:  # one connection for all looks
        if url not in _opened:
            _opened[url] = open_database(url)
        database = _opened[url]
        load = database.find_load()
        facts = None if load is None else database.read_facts(load, fresh=False)
    return None if facts is None else str(facts["revision"])


def _has_all(held: Held, live: int, digest: str) -> bool:
    """Return whether a database has every row that lives: just these, or more, since rows only ever die."""
    return held.digest == digest or held.kept > live


def _keep_first(places: Rows) -> Rows:
    """Return places [Q, c] with -1 for those that occurred before in their line."""
    order = np.argsort(places, axis=1, kind="stable")
    ordered = np.take_along_axis(places, order, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    found = np.empty_like(places)
    np.put_along_axis(found, order, ordered, axis=1)
    return found
