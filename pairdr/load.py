"""Load a vector store into a database, or bring what is loaded up to date; tune it, measure it, publish it.

The first load of a store, or one of another model, is made beside what is published and takes its name once it is
whole; a killed one goes on. Later versions of the same store are followed in place: new shards are added and noted,
then readers are told, and only then rows that are dead or gone are taken out.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from pairdr.errors import ArtefactError, UsageError
from pairdr.files import hash_json
from pairdr.filters import write_forms
from pairdr.ids import hash_text
from pairdr.index import Plan, make_judge, tune_effort
from pairdr.indexes.candidates import Effort
from pairdr.indexes.database import (
    FORMAT,
    DatabaseIndex,
    describe_live,
    hash_mark,
    mask_live,
    open_database,
    require_store,
)
from pairdr.indexes.engine import Database, Facts, Held, make_keys, read_offsets
from pairdr.indexes.exact import Rows, Scores
from pairdr.progress import show_progress
from pairdr.store_config import IndexConfig
from pairdr.vectors import Shard, VectorStore

_ROWS = 4096  # that are sent at once
_NUMBERS = 2**31  # of shards: so that a key is a whole number of 63 bits


def load_database(
    store: VectorStore, url: str, config: IndexConfig = IndexConfig(), queries: Scores | None = None
) -> DatabaseIndex:
    """Load the vectors of a store, or what has changed since the last time, and tune the search.

    Args:
        store: the vectors.
        url: of the database; docs/databases.md has its forms.
        config: what is wanted; of kinds a database has hnsw.
        queries: [Q, D] vectors of real queries to tune and judge it by; without them, vectors of the corpus serve.

    Raises:
        ServerError: the server is absent, refuses, or is full; a call after that goes on where this one stopped.
        RefusedError: the wanted recall cannot be reached; what was published before stays.
        DataError: an id or metadata that the engine cannot keep.
        UsageError: an option that a database does not have, or another load of this name is under way (BusyError).
        MissingExtraError: the engine's client is not installed.
    """
    if config.index_kind not in ("auto", "hnsw") or config.quantiser != "auto":
        raise UsageError("A database has graphs (hnsw) of whole vectors.", remedy="Leave the other options out.")
    database = open_database(url)
    with contextlib.closing(database), database.hold():
        published = database.find_load()
        load = _choose_load(database, published, store, config)
        facts, is_new = _begin(database, load, store, config)
        _bring_up(database, load, facts, store, is_new)
        if load != published:
            database.finish(load, config.memory_limit)
        facts |= _tune(database, load, store, config, queries)
        database.write_facts(load, facts | {"revision": _draw_revision()})
        if load != published:
            database.publish(load)
        for half in database.list_halves():
            database.drop(half)
    return DatabaseIndex.open(url, store, threads=config.index_threads)


def drop_database(url: str) -> None:
    """Remove what a URL names from its database, halves that were never published among it.

    Raises:
        ServerError: the server is absent or refuses.
        ArtefactError: something else has the name.
    """
    database = open_database(url)
    with contextlib.closing(database), database.hold():
        load = database.find_load()
        for found in [*database.list_halves(), *([] if load is None else [load])]:
            database.drop(found)


def describe_database(url: str) -> Facts:
    """Return what is loaded: the facts of `pairdr index`, the count of rows, and their bytes where they are known.

    Raises:
        ServerError: the server is absent or refuses.
        ArtefactError: nothing is loaded there.
    """
    database = open_database(url)
    with contextlib.closing(database):
        load = database.find_load()
        facts = None if load is None else database.read_facts(load)
        if load is None or facts is None:
            raise ArtefactError(
                "Nothing is loaded here.", path=database.place, remedy="Run pairdr index VECTORS -o URL first."
            )
        size = database.measure_size(load)
        return facts | {"count": database.count(load)} | ({} if size is None else {"bytes": size})


def _choose_load(database: Database, published: str | None, store: VectorStore, config: IndexConfig) -> str:
    """Return the published load where it can follow the store; else one beside it."""
    if published is not None and not config.rebuild:
        with contextlib.suppress(ArtefactError):
            facts = database.read_facts(published)
            if facts is not None:
                require_store(facts, database.read_shards(published), store, database.place)
                return published
    made_of = [FORMAT, store.encoder, store.similarity, store.dimensions, store.dtype]
    names = [f"{database.name}__{hash_json(made_of)[:12]}_{number}" for number in (0, 1)]
    return names[1] if published == names[0] else names[0]


def _begin(database: Database, load: str, store: VectorStore, config: IndexConfig) -> tuple[Facts, bool]:
    """Return the facts of a load, and whether it was begun just now: its place is made, and no row is there."""
    database.create(load, store.dimensions, store.similarity, store.dtype)
    found = database.read_facts(load)
    facts: Facts = {"effort": asdict(Effort(1, 1)), "recall_depth": config.recall_depth} | (found or {})
    facts |= {
        "revision": _draw_revision(),
        "format": FORMAT,
        "encoder": store.encoder,
        "similarity": store.similarity,
        "dimensions": store.dimensions,
        "rebuild_share": config.rebuild_share,
        "store": store.fingerprint,
        "store_version": store.version,
        "options": config.as_dict(),
    }
    if found is None:
        database.write_facts(load, facts)  # before any row
    return facts, found is None


def _bring_up(database: Database, load: str, facts: Facts, store: VectorStore, is_new: bool) -> None:
    """Make the rows of a load those that live in the store."""
    held = {one.name: one for one in database.read_shards(load)}
    taken = {one.number for one in held.values()}
    leaving: list[tuple[Held, Rows]] = []
    with show_progress("load", store.live) as advance:
        for shard in store.shards:
            number = held[shard.name].number if shard.name in held else _choose_number(shard.name, taken)
            taken.add(number)
            wanted = Held(number, shard.name, shard.count, *describe_live(store, shard), True)
            if held.get(shard.name) == wanted:
                advance(wanted.kept)
                continue
            if shard.name not in held:  # noted first: who finds half of it later knows whose rows these are
                database.note_shard(load, wanted._replace(kept=0, digest="", whole=False))
            there = np.zeros(0, np.int64) if is_new else database.list_keys(load, number, shard.count)
            live = make_keys(number, np.flatnonzero(mask_live(store, shard.start, shard.count)))
            _add_rows(database, load, store, shard, np.setdiff1d(live, there), advance)
            gone = np.setdiff1d(there, live)
            database.note_shard(load, wanted._replace(whole=not len(gone)))
            leaving += [(wanted, gone)] if len(gone) else []
    names = {shard.name for shard in store.shards}
    for one in (one for name, one in held.items() if name not in names):
        database.note_shard(load, one._replace(kept=0, digest="", whole=False))
        leaving.append((one._replace(kept=0), database.list_keys(load, one.number, one.rows)))
    facts["revision"] = _draw_revision()
    database.write_facts(load, facts)  # who reads now learns of it before any row goes
    for one, gone in leaving:
        database.remove(load, gone)
        if one.name in names:
            database.note_shard(load, one)
        else:
            database.forget_shard(load, one.number)


def _draw_revision() -> str:
    """Return what no load had before: names of loads come back."""
    return secrets.token_hex(8)


def _add_rows(
    database: Database, load: str, store: VectorStore, shard: Shard, keys: Rows, advance: Callable[[int], None]
) -> None:
    for at in range(0, len(keys), _ROWS):
        some = keys[at : at + _ROWS]
        rows = shard.start + read_offsets(some)
        marks = [_list_marks(metadata) for metadata in store.metadata_of(rows)]
        database.add(load, some, store.ids_of(rows), store.take(rows), marks)
        advance(len(some))


def _list_marks(metadata: str) -> list[int]:
    """Return the marks of a passage: every condition that it meets."""
    fields: dict[str, Any] = json.loads(metadata) if metadata else {}
    return sorted({hash_mark(field, form) for field, value in fields.items() for form in write_forms(value)})


def _choose_number(name: str, taken: set[int]) -> int:
    """Return a number that is free: by the name, so that two who load the same shard give it the same."""
    number = hash_text(name) % _NUMBERS
    while number in taken:
        number = (number + 1) % _NUMBERS
    return number


def _tune(database: Database, load: str, store: VectorStore, config: IndexConfig, queries: Scores | None) -> Facts:
    """Return what the search was tuned to, and the recall of it."""
    plan = Plan("hnsw", links=database.links, longest=database.longest)
    facts: Facts = {"name": plan.name, "vectors": store.live}
    if not store.live:
        return facts | {"recall": 1.0, "recall_by": "no vectors"}
    judge = make_judge(store, config, queries)
    index = DatabaseIndex(database, load, store, threads=config.index_threads)
    index._depth = judge.k
    effort, recall = tune_effort(index, judge, plan, config)
    return facts | {
        "effort": asdict(effort),
        "recall": round(recall, 4),
        "recall_depth": judge.k,
        "recall_by": judge.said,
    }
