"""What approximate indexes share: they name candidates, the store's own vectors score them.

So scores are inner products of what the store holds, whatever an index has kept of a vector, and an answer is always
that of the version that is open. An index covers shards by their names; live rows of other shards (the delta) are
searched exactly and merged, deleted rows are left out. Where a filter leaves little, or an index finds too few, exact
search answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from pairdr.filters import Filters
from pairdr.indexes.exact import Allowed, Block, Rows, Scores, score_candidates, search_exact
from pairdr.vectors import VectorStore

BLOCK = 8192  # rows
_LEAST_ALLOWED = 0.1  # below this share of allowed rows, exact search looks at fewer vectors than an index would


@dataclass(frozen=True)
class Effort:
    """How hard an index searches.

    Attributes:
        probes: lists of an ivf index that are looked into, or the queue of an hnsw one.
        candidates: rows that are scored exactly, for each that is asked for.
    """

    probes: int
    candidates: int


class Chosen(NamedTuple):
    """Rows that may be found: a mask [N] or None for all, their count, those in the index, and its way to choose."""

    rows: Allowed | None
    total: int
    known: int
    selector: Any


class CandidateIndex(ABC):
    """An index over a store: `search` has the form of `search_exact`.

    Attributes:
        store: what it was built from, in this or a later version.
        effort: how hard it searches, as it was tuned.
        changed: share of the store's live rows that the index does not know, and of its own that were deleted.
        origin: where it stands, and which it is.
    """

    def __init__(
        self, store: VectorStore, effort: Effort, depth: int, *, rebuild_share: float = 1.0, threads: int | None = None
    ) -> None:
        """Put an index over a store; `_cover` says of which shards.

        Args:
            store: what it was built from, in this or a later version.
            effort: how hard it searches.
            depth: results per query at which it was tuned; candidates are not fewer where fewer are asked for.
            rebuild_share: share of changed rows from which it should be built anew.
            threads: of a search; None is all.
        """
        self.store, self.effort, self.changed, self.origin = store, effort, 0.0, dict[str, str]()
        self._depth, self._rebuild_share, self._threads = depth, rebuild_share, threads

    @property
    def needs_rebuild(self) -> bool:
        """Return whether more has changed than the option rebuild_share."""
        return self.changed > self._rebuild_share

    def search(
        self, queries: Scores, k: int, allowed: Allowed | None = None, filters: Filters | None = None
    ) -> tuple[Rows, Scores]:
        """Return the k best rows that it finds for each query, best first, ties by id rank.

        Args:
            queries: [Q, D].
            k: how many; fewer than k live rows leave places of row -1 and score -inf.
            allowed: [N] rows that may be found; None is all. Deleted ones never are.
            filters: the conditions that `allowed` was made of, for an index that can look them up itself.

        Returns:
            rows [Q, k] and scores [Q, k].
        """
        chosen = self._all if allowed is None else self._choose(allowed)
        if not self._has_index or chosen.total < _LEAST_ALLOWED * self.store.count or not len(queries):
            return self._search_exactly(queries, k, chosen.rows)
        candidates = self._find_candidates(queries, k, chosen, filters)
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

    def describe(self) -> dict[str, Any]:
        """Return what a run keeps of how it was searched."""
        return self.origin | {"effort": asdict(self.effort)}

    def search_known(self, queries: Scores, k: int) -> tuple[Rows, Scores]:
        """Return what the index itself finds, as `search`: nothing of the delta, and too few where it finds too few."""
        return self._score(queries, self._find_candidates(queries, k, self._all, None), k)

    @property
    @abstractmethod
    def _has_index(self) -> bool:
        """Return whether there is anything that names candidates."""

    @abstractmethod
    def _find_places(self, queries: Scores, depth: int, chosen: Chosen, filters: Filters | None) -> Rows:
        """Return places [Q, c] in the index, each once, of rows that may be found; -1 is none."""

    def _make_selector(self, known: Allowed) -> Any:
        """Return the index's own way to choose the places [n] that may be found."""
        return None

    def _cover(self, shards: Sequence[tuple[str, int]], held: int | None = None) -> None:
        """Settle which rows of the store the index covers.

        Args:
            shards: name and row count of the shards in the index, in its own order.
            held: rows that it holds; None is all of these.
        """
        places = {shard.name: shard.start for shard in self.store.shards}
        ranges = [_count_from(places.get(name), count) for name, count in shards]
        # The row of each place in the index; -1 where it is gone from the store.
        self._rows = np.concatenate([np.zeros(0, np.int64), *ranges])
        known = np.zeros(self.store.count, dtype=np.bool_)
        known[self._rows[self._rows >= 0]] = True
        self._new = ~known if self.store.alive is None else ~known & self.store.alive
        self._all = self._choose(None)
        found = int((~self._new).sum()) - (self.store.count - self._all.total)  # live rows that the index knows
        changed = self._all.total + (len(self._rows) if held is None else held) - 2 * found
        self.changed = changed / max(1, self._all.total) if self._has_index else 0.0

    def _find_candidates(self, queries: Scores, k: int, chosen: Chosen, filters: Filters | None) -> Rows:
        """Return rows [Q, c] that the index names, -1 where it names none."""
        depth = min(max(k, self._depth) * self.effort.candidates, chosen.known)
        if depth == 0:
            return np.full((len(queries), 0), -1, dtype=np.int64)
        places = self._find_places(queries, depth, chosen, filters)
        return np.where(places < 0, -1, self._rows[places])

    def _score(self, queries: Scores, candidates: Rows, k: int) -> tuple[Rows, Scores]:
        return score_candidates(queries, candidates, self.store.take, self.store.id_rank, k)

    def _search_exactly(
        self, queries: Scores, k: int, allowed: Allowed | None, blocks: Iterable[Block] | None = None
    ) -> tuple[Rows, Scores]:
        source = self.store.read_raw(BLOCK) if blocks is None else blocks
        return search_exact(queries, source, self.store.id_rank, k, allowed, threads=self._threads)

    def _choose(self, allowed: Allowed | None) -> Chosen:
        alive = self.store.alive
        rows = allowed if alive is None else alive if allowed is None else alive & allowed
        known = self._rows >= 0 if rows is None else (self._rows >= 0) & rows[self._rows]
        selector = self._make_selector(known)
        return Chosen(rows, self.store.count if rows is None else int(rows.sum()), int(known.sum()), selector)


def _count_from(start: int | None, count: int) -> Rows:
    return np.full(count, -1, dtype=np.int64) if start is None else np.arange(start, start + count, dtype=np.int64)
