"""What a database has to be able to do, so that vectors in it are an index over a local store.

A row has a key: the number of its shard, and its place there. Shards never change, so a key always means the same
passage, whatever versions of the store come and go. Beside the rows stand the facts (encoder, similarity, dimensions,
version, tuned effort) and a note of every shard that is there. A *load* is one whole set of these under a name of its
own. People's name for it points to one load, the published one; half a load is never searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from pairdr.errors import ArtefactError
from pairdr.indexes.exact import Rows, Scores
from pairdr.vectors import Dtype

BITS = 32  # of a key for the place in the shard
Facts = dict[str, Any]
Marks = Sequence[Sequence[int]]


class MovedError(ArtefactError):
    """The load that was open is no longer what its name holds."""


class Held(NamedTuple):
    """A shard in a database.

    Attributes:
        number: its own, the first part of its keys.
        name: in the store.
        rows: how many it has in the store, dead ones among them.
        kept: those that the database has.
        digest: of which these are.
        whole: whether it has just these: not so while rows are taken out.
    """

    number: int
    name: str
    rows: int
    kept: int
    digest: str
    whole: bool


class Database(Protocol):
    """What an engine does. Everything may raise ServerError; what reads a load also MovedError.

    Attributes:
        place: the URL without its password, for messages.
        name: people's name for what is loaded.
        links: of a node of its graph.
        longest: most that the queue of its graph may be.
    """

    place: str
    name: str
    links: int
    longest: int

    def hold(self) -> AbstractContextManager[None]:
        """Keep other loads of this name out while the block runs, as far as the engine can."""

    def find_load(self) -> str | None:
        """Return the load that the name holds, or None; ArtefactError where something else has the name."""

    def list_halves(self) -> list[str]:
        """Return loads of this name that were begun and never published."""

    def create(self, load: str, dimensions: int, similarity: str, dtype: Dtype) -> None:
        """Make the place of a load; what is there is kept."""

    def read_facts(self, load: str, *, fresh: bool = True) -> Facts | None:
        """Return the facts of a load, None where there are none yet; not fresh: some seconds old is good enough."""

    def write_facts(self, load: str, facts: Facts) -> None:
        """Replace the facts of a load."""

    def read_shards(self, load: str) -> list[Held]:
        """Return the notes of shards."""

    def note_shard(self, load: str, held: Held) -> None:
        """Write or replace the note of a shard."""

    def forget_shard(self, load: str, number: int) -> None:
        """Remove the note of a shard."""

    def list_keys(self, load: str, number: int, count: int) -> Rows:
        """Return the keys [n] of a shard's rows that are there, in order."""

    def add(self, load: str, keys: Rows, ids: Sequence[str], vectors: Scores, marks: Marks) -> None:
        """Add rows: keys [n], passage ids [n], vectors [n, D], hashes of what filters may ask of each [n]."""

    def remove(self, load: str, keys: Rows) -> None:
        """Remove rows."""

    def finish(self, load: str, memory: int | None) -> None:
        """Make what a search needs once the rows are there; at most so many MiB where the engine can be told."""

    def publish(self, load: str) -> None:
        """Let the name hold this load, in one step, and drop the one that it held."""

    def drop(self, load: str) -> None:
        """Remove a load with its facts and notes; nothing where there is none."""

    def search(self, load: str, queries: Scores, depth: int, queue: int, filters: Marks) -> Rows:
        """Return the keys [Q, c] that are found, -1 is none: of rows with any mark of every filter."""

    def count(self, load: str) -> int:
        """Return how many rows there are."""

    def measure_size(self, load: str) -> int | None:
        """Return bytes on the server's disk, or None where it does not tell."""

    def close(self) -> None:
        """Close what is open."""


def make_keys(number: int, offsets: Rows) -> Rows:
    """Return the keys [n] of a shard's rows at some places."""
    found: Rows = (np.int64(number) << BITS) | offsets.astype(np.int64)
    return found


def read_offsets(keys: Rows) -> Rows:
    """Return the places [n] in their shard that keys name."""
    found: Rows = keys & (2**BITS - 1)
    return found


def key_range(number: int) -> tuple[int, int]:
    """Return the first key of a shard, and the first after it."""
    return number << BITS, (number + 1) << BITS
