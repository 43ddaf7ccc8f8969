"""Databases as indexes: what they find, a store that changes, loads that stop halfway, what is refused and how."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Parts
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import ENGINES, MILVUS_TOKEN, PASSWORD, Milvus, Postgres, Server
from serving import make_place
from storing import SIZE, WordEncoder, make_texts, to_passages, write_collection

from pairdr import load as load_stage
from pairdr.artefact import read_manifest
from pairdr.ask import answer_questions, measure_searcher
from pairdr.cli import main
from pairdr.collection import open_collection
from pairdr.config import EncodeConfig, EvaluateConfig, LexicalConfig, ModelConfig, SearchConfig
from pairdr.encode import encode_corpus, upsert_passages
from pairdr.errors import (
    ArtefactError,
    BusyError,
    DataError,
    MissingExtraError,
    RefusedError,
    ServerError,
    UsageError,
)
from pairdr.filters import match_rows, parse_filters
from pairdr.indexes import database as database_index
from pairdr.indexes import pgvector
from pairdr.indexes import postgres as postgres_server
from pairdr.indexes.address import is_url, read_address
from pairdr.indexes.candidates import Effort
from pairdr.indexes.database import DatabaseIndex, mask_live, open_database, stamp_database
from pairdr.indexes.engine import Database, read_offsets
from pairdr.indexes.exact import search_exact
from pairdr.indexes.sharded import ShardedIndex
from pairdr.lexical import index_words
from pairdr.load import describe_database, drop_database, load_database
from pairdr.records import Passage
from pairdr.searcher import Searcher
from pairdr.serve.shelf import Shelf
from pairdr.store_config import IndexConfig, QueryConfig
from pairdr.vectors import VectorStore
from pairdr.versions import compact_store, delete_passages

ENCODER = WordEncoder()
CONFIG = IndexConfig(recall_depth=10, wanted_recall=0.9, tuning_queries=20)
SHARDS = EncodeConfig(shard_size=100)
KINDS = ('"red"', "1", "2.0", '[1, true, "red"]', "null", '"a=b"')
QUESTIONS = [f"w{number} t{number % 9}" for number in range(0, 300, 12)]
QUERIES = ENCODER.encode_queries(QUESTIONS)


def make_passages(count: int = 300) -> list[Passage]:
    return [
        Passage(f"p{n:03d}", "", f"w{n} t{n % 9}", f'{{"kind": {KINDS[n % 6]}, "parity": {n % 2}}}')
        for n in range(count)
    ]


def make_store(folder: Path, passages: list[Passage], encoder: WordEncoder = ENCODER) -> VectorStore:
    folder.mkdir(parents=True, exist_ok=True)
    encode_corpus(write_collection(folder / "data", {"x": "x"}), encoder, SHARDS, folder / "v")
    upsert_passages(passages, encoder, SHARDS, folder / "v")
    delete_passages(folder / "v", ["x"])
    return compact_store(folder / "v")


@pytest.fixture(scope="session", params=ENGINES)
def server(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> Server:
    return servers(request.param)


@pytest.fixture(scope="session")
def postgres(servers: Callable[[str], Server]) -> Postgres:
    found = servers("postgres")
    assert isinstance(found, Postgres)
    return found


@pytest.fixture(scope="session")
def milvus(servers: Callable[[str], Server]) -> Milvus:
    found = servers("milvus")
    assert isinstance(found, Milvus)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> VectorStore:
    """Return a store of 300 passages in three shards that nobody changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIRDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return make_store(tmp_path_factory.mktemp("kept"), make_passages())


@pytest.fixture(scope="session")
def loaded(server: Server, kept: VectorStore) -> str:
    """Return the URL of a load of it that nobody changes."""
    url = server.url("loaded")
    load_database(kept, url, CONFIG)
    return url


def find_exactly(store: VectorStore, k: int, allowed: Any = None) -> list[list[int]]:
    alive = allowed if store.alive is None else store.alive if allowed is None else store.alive & allowed
    found: list[list[int]] = search_exact(QUERIES, store.read_raw(50), store.id_rank, k, alive)[0].tolist()
    return found


def search_hard(index: DatabaseIndex, store: VectorStore, k: int = 10, **options: Any) -> list[list[int]]:
    """Search with all rows as candidates; exact search must not have to help."""
    index._look()
    index.effort = Effort(index.database.longest, 1 + store.count // k)
    rows, scores = index.search(QUERIES, k, **options)
    assert scores[rows >= 0] == pytest.approx(np.einsum("nd,nd->n", *_pair(store, rows)), abs=1e-6)
    return [list(map(int, line)) for line in rows]


def require_found(index: DatabaseIndex, store: VectorStore, k: int = 10) -> None:
    """Assert that nearly all is found: a graph from which rows were taken may not reach every one that is left."""
    pairs = zip(search_hard(index, store, k), find_exactly(store, k), strict=True)
    assert np.mean([len(set(found) & set(exact)) / k for found, exact in pairs]) >= 0.95


def _pair(store: VectorStore, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    query, _ = np.nonzero(rows >= 0)
    return store.take(rows[rows >= 0]), QUERIES[query]


# --- what is found ----------------------------------------------------------------------------------------------------


def test_what_a_database_finds_at_full_effort_is_what_exact_search_finds(loaded: str, kept: VectorStore) -> None:
    index = DatabaseIndex.open(loaded, kept)
    assert search_hard(index, kept) == find_exactly(kept, 10)
    assert index.changed == 0
    index.effort = Effort(1, 1)
    rows, _ = index.search(QUERIES, 10)
    overlap = [len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), find_exactly(kept, 10), strict=True)]
    assert np.mean(overlap) > 0.5
    assert index.search(QUERIES[:0], 3)[0].shape == (0, 3)
    assert (index.search(QUERIES, 400)[0] >= 0).sum(axis=1).tolist() == [300] * len(QUERIES)


def test_the_facts_stand_in_the_database(loaded: str, kept: VectorStore) -> None:
    facts = describe_database(loaded)
    assert facts["encoder"] == kept.encoder
    assert facts["store"] == kept.fingerprint
    assert (facts["similarity"], facts["dimensions"]) == ("cosine", SIZE)
    assert (facts["count"], facts["vectors"], facts["store_version"]) == (300, 300, kept.version)
    assert facts["recall"] >= 0.9
    assert facts["recall_by"] == "20 vectors of the corpus, each without itself"
    database = open_database(loaded)
    load = database.find_load()
    assert load is not None
    assert sorted((held.name, held.rows, held.kept) for held in database.read_shards(load)) == sorted(
        (shard.name, shard.count, shard.count) for shard in kept.shards
    )


@pytest.mark.parametrize(
    "where",
    [
        ["kind=red"], ["kind=1"], ["kind=1.0"], ["kind=2"], ["kind=true"], ["kind=null"], ["kind=a=b"],
        ["kind=red", "kind=2"], ["kind=red", "parity=0"], ["kind=1", "parity=1"],
    ],
)  # fmt: skip
def test_filters_in_the_database_mean_what_they_mean_here(
    loaded: str, kept: VectorStore, where: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = parse_filters(where)
    allowed = match_rows(kept.metadata, filters)
    assert allowed.any()
    index = DatabaseIndex.open(loaded, kept)
    marks = database_index.hash_filters(filters)
    keys = index.database.search(index.load, QUERIES[:2], 300, 300, marks)
    numbers = {held.number: held.name for held in index.database.read_shards(index.load)}
    starts = {shard.name: shard.start for shard in kept.shards}
    rows = [[starts[numbers[key >> 32]] + (key & (2**32 - 1)) for key in line if key >= 0] for line in keys.tolist()]
    assert [sorted(line) for line in rows] == [np.flatnonzero(allowed).tolist()] * 2
    monkeypatch.setattr(DatabaseIndex, "_search_exactly", None)  # what the database finds is enough
    if allowed.mean() >= 0.1:
        assert search_hard(index, kept, 5, allowed=allowed, filters=filters) == find_exactly(kept, 5, allowed)


def test_a_mask_without_its_conditions_is_kept_too(loaded: str, kept: VectorStore) -> None:
    allowed = np.random.default_rng(13).random(kept.count) < 0.3
    index = DatabaseIndex.open(loaded, kept)
    assert search_hard(index, kept, 10, allowed=allowed) == find_exactly(kept, 10, allowed)
    rare = np.arange(kept.count) < 4
    assert search_hard(index, kept, 10, allowed=rare) == find_exactly(kept, 10, rare)


def test_a_second_load_of_the_same_store_sends_nothing(
    loaded: str, kept: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_stage, "_add_rows", None)
    assert load_database(kept, loaded, CONFIG).changed == 0


# --- a store that changes ---------------------------------------------------------------------------------------------


def test_a_database_follows_a_store_and_every_reader_finds_its_own_version(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.url()
    first = make_store(tmp_path, make_passages())
    old = load_database(first, url, CONFIG)
    delete_passages(tmp_path / "v", ["p007", "p120"])
    changed = to_passages({"p008": "w5 t2", "n": "w12 t3 new", "p150": "w24 t6"})
    second = upsert_passages(changed, ENCODER, SHARDS, tmp_path / "v")
    early = DatabaseIndex.open(url, second)
    assert early.changed == pytest.approx(7 / second.live)  # 3 are new, 2 are deleted and 2 replaced
    require_found(early, second)
    late = load_database(second, url, CONFIG)
    assert late.changed == 0
    assert describe_database(url)["count"] == second.live == 299
    for index, store in ((late, second), (early, second), (old, first)):
        index._next_look = 0  # as after some seconds
        require_found(index, store)
    third = compact_store(tmp_path / "v")
    again = load_database(third, url, CONFIG)
    assert again.load == late.load  # in place
    assert describe_database(url)["count"] == third.count == 299
    for index, store in ((again, third), (late, second), (old, first)):
        index._next_look = 0
        require_found(index, store)
    anew = load_database(third, url, IndexConfig(recall_depth=10, wanted_recall=0.9, tuning_queries=20, rebuild=True))
    assert anew.load != again.load
    assert open_database(url).list_halves() == []
    assert search_hard(again, third) == find_exactly(third, 10)  # whose load is gone: it follows
    assert again.load == anew.load
    drop_database(url)
    again._next_look = 0
    assert again.search(QUERIES, 10)[0].tolist() == find_exactly(third, 10)
    assert "exact search answers, since" in capsys.readouterr().err
    again.search(QUERIES, 10)
    assert capsys.readouterr().err == ""  # said once
    assert (drop_database(url), stamp_database(url)) == (None, None)
    with pytest.raises(ArtefactError, match="Nothing is loaded here"):
        DatabaseIndex.open(url, third)


@settings(max_examples=4)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("upsert"), st.lists(st.integers(0, 59), min_size=1, max_size=8, unique=True)),
            st.tuples(st.just("delete"), st.lists(st.integers(0, 29), min_size=1, max_size=8, unique=True)),
            st.tuples(st.just("compact"), st.just([0])),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_happens_to_a_store_its_database_holds_what_lives_in_it(
    changing: tuple[str, Path], steps: list[tuple[str, list[int]]]
) -> None:
    url, folder = changing
    readers = []
    for number, (step, chosen) in enumerate(steps):
        names = [f"p{at:03d}" for at in chosen]
        store = VectorStore(folder)
        if step == "upsert":
            texts = {name: f"w{at} t{number}" for name, at in zip(names, chosen, strict=True)}
            store = upsert_passages(to_passages(texts), ENCODER, EncodeConfig(shard_size=10), folder)
        elif step == "compact":
            store = compact_store(folder)
        elif there := [name for name in names if store.rows_of([name])[0] >= 0]:
            store = delete_passages(folder, there)
        index = load_database(store, url, CONFIG)
        readers.append((index, store))
        assert describe_database(url)["count"] == store.live
        database, held = index.database, {one.name: one for one in index.database.read_shards(index.load)}
        for shard in store.shards:
            live = np.flatnonzero(mask_live(store, shard.start, shard.count))
            keys = database.list_keys(index.load, held.pop(shard.name).number, shard.count)
            assert read_offsets(keys).tolist() == live.tolist()
        assert held == {}
    for index, store in readers:  # every version, from what is there now
        index._next_look = 0
        require_found(index, store, 5)


@pytest.fixture(scope="session", params=["postgres", "lite"])
def changing(
    request: pytest.FixtureRequest, servers: Callable[[str], Server], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Return a URL and a store that is changed; Milvus's server, which is slower, has the adapter of Milvus Lite."""
    folder = tmp_path_factory.mktemp("changing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIRDR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        encode_corpus(
            write_collection(folder / "data", make_texts(40)), ENCODER, EncodeConfig(shard_size=10), folder / "v"
        )
    return servers(request.param).url(), folder / "v"


# --- loads that stop halfway ------------------------------------------------------------------------------------------


def test_half_a_load_is_never_searched_and_goes_on_where_it_stopped(
    server: Server, kept: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, other = server.url(), make_store(tmp_path, make_passages(40), WordEncoder("other"))
    load_database(other, url, CONFIG)
    add, added = load_stage._add_rows, []

    def add_or_stop(database: Any, load: str, store: Any, shard: Any, *rest: Any) -> None:
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(shard.name)
        add(database, load, store, shard, *rest)

    monkeypatch.setattr(load_stage, "_add_rows", add_or_stop)
    with pytest.raises(KeyboardInterrupt):
        load_database(kept, url, CONFIG)
    assert len(open_database(url).list_halves()) == 1
    before = DatabaseIndex.open(url, other)  # the old one answers
    assert describe_database(url)["count"] == 40
    with pytest.raises(
        ArtefactError, match=r"holds vectors by encoder \w{12} \(cosine, 16 dimensions\), not by \w{12}"
    ):
        DatabaseIndex.open(url, kept)
    added.clear()
    load_database(kept, url, CONFIG)
    assert added == [kept.shards[2].name]
    assert open_database(url).list_halves() == []
    require_found(DatabaseIndex.open(url, kept), kept)
    before._next_look = 0
    assert before.search(QUERIES, 10)[0].tolist() == find_exactly(other, 10)  # by exact search: its load is gone
    monkeypatch.setattr(load_stage, "tune_effort", _refuse)
    with pytest.raises(RefusedError, match="out of reach"):
        load_database(other, url, CONFIG)
    require_found(DatabaseIndex.open(url, kept), kept)


def _refuse(*arguments: Any) -> None:
    raise RefusedError("The recall is out of reach.")


@pytest.mark.parametrize("server", ["postgres", "lite"], indirect=True)
def test_a_reader_sees_a_load_that_has_the_name_of_one_before_it(server: Server, tmp_path: Path) -> None:
    url, first = server.url(), make_store(tmp_path, make_passages())
    index = load_database(first, url, CONFIG)
    delete_passages(tmp_path / "v", [f"p{n:03d}" for n in range(0, 100, 2)])
    second, rebuild = compact_store(tmp_path / "v"), replace(CONFIG, rebuild=True)
    for _ in range(2):
        load_database(second, url, rebuild)
    assert open_database(url).find_load() == index.load
    index._next_look = 0
    require_found(index, first)


@pytest.mark.parametrize("server", ["postgres", "lite"], indirect=True)
def test_rows_of_a_killed_update_go_with_their_shard(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, first = server.url(), make_store(tmp_path, make_passages())
    load_database(first, url, CONFIG)
    upsert_passages(make_passages(380)[300:], ENCODER, SHARDS, tmp_path / "v")
    add = load_stage._add_rows
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(load_stage, "_add_rows", lambda *arguments: (add(*arguments), _interrupt()))
        load_database(VectorStore(tmp_path / "v"), url, CONFIG)
    assert describe_database(url)["count"] == 380
    require_found(DatabaseIndex.open(url, first), first)
    delete_passages(tmp_path / "v", [f"p{n:03d}" for n in range(300, 380)])
    load_database(compact_store(tmp_path / "v"), url, CONFIG)
    assert describe_database(url)["count"] == 300


@pytest.mark.parametrize("server", ["postgres", "lite"], indirect=True)
def test_rows_that_a_killed_update_left_are_taken_out_by_the_next(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, first = server.url(), make_store(tmp_path, make_passages())
    load_database(first, url, CONFIG)
    delete_passages(tmp_path / "v", ["p007", "p120"])
    second = compact_store(tmp_path / "v")
    engine = type(open_database(url))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "remove", _interrupt)
        load_database(second, url, CONFIG)
    for store in (first, second):
        require_found(DatabaseIndex.open(url, store), store)
    load_database(second, url, CONFIG)
    assert describe_database(url)["count"] == 298


def _interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("server", ["milvus", "lite"], indirect=True)
def test_rows_that_milvus_is_sent_twice_are_there_once(
    server: Server, kept: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, add = server.url(), load_stage._add_rows
    monkeypatch.setattr(load_stage, "_add_rows", lambda *arguments: (add(*arguments), add(*arguments)))
    load_database(kept, url, CONFIG)  # as two loads at a time would, or a call whose answer was lost
    assert describe_database(url)["count"] == 300
    require_found(DatabaseIndex.open(url, kept), kept)


@pytest.mark.parametrize("server", ["lite"], indirect=True)
def test_a_graph_that_milvus_does_not_build_ends_the_load_and_the_next_goes_on(
    server: Server, kept: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pymilvus

    url = server.url()
    said = r"nothing of its graph for 0 seconds; 7 rows are left\..*goes on where"
    with monkeypatch.context() as patch, pytest.raises(ServerError, match=said):
        patch.setattr("pairdr.indexes.milvus._STALL", 0.5)
        patch.setattr(pymilvus.MilvusClient, "describe_index", lambda *_: {"pending_index_rows": 7})
        load_database(kept, url, CONFIG)
    monkeypatch.setattr(load_stage, "_add_rows", None)  # the rows are there
    load_database(kept, url, CONFIG)


@pytest.mark.parametrize("server", ["lite"], indirect=True)
def test_searches_that_tune_milvus_are_waited_for_and_others_are_not(
    server: Server, kept: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pymilvus

    search, limits = pymilvus.MilvusClient.search, []

    def note(*asked: Any, **how: Any) -> Any:
        limits.append(how.get("timeout"))
        return search(*asked, **how)

    monkeypatch.setattr(pymilvus.MilvusClient, "search", note)
    index = load_database(kept, server.url(), CONFIG)
    assert set(limits) == {None}
    limits.clear()
    index.search(QUERIES, 10)
    assert limits == [10.0]


def test_two_loads_of_one_name_do_not_meet_in_postgresql(postgres: Postgres, kept: VectorStore) -> None:
    url = postgres.url()
    with open_database(url).hold(), pytest.raises(BusyError, match="Another command is at work here"):
        load_database(kept, url, CONFIG)
    load_database(kept, url, CONFIG)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_vectors_that_are_not_those_of_the_database_are_refused(
    loaded: str, kept: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_store(tmp_path / "model", make_passages(40), WordEncoder("other"))
    with pytest.raises(ArtefactError, match=rf"{kept.encoder[:12]} .* not by {model.encoder[:12]}.*another name"):
        DatabaseIndex.open(loaded, model)
    corpus = make_store(tmp_path / "corpus", to_passages({"a": "b"}))
    with pytest.raises(ArtefactError, match=rf"{kept.fingerprint[:12]}; the store is {corpus.fingerprint[:12]} and sh"):
        DatabaseIndex.open(loaded, corpus)
    monkeypatch.setattr(database_index, "FORMAT", 2)
    with pytest.raises(ArtefactError, match=r"loaded in format 1; this version of pairdr reads 2"):
        DatabaseIndex.open(loaded, kept)


def test_a_name_that_something_else_has_is_refused(server: Server, kept: VectorStore) -> None:
    url = server.url()
    name = read_address(url).name
    if isinstance(server, Postgres):
        server.execute(f"CREATE TABLE {name} (a int)")
    else:
        open_database(url)._client.create_collection(name, dimension=8)  # type: ignore[attr-defined]
    for refused in (load_database, drop_database):
        with pytest.raises(ArtefactError, match=f"The name '{name}' is taken by a .* that pairdr did not write"):
            refused(*((kept, url, CONFIG) if refused is load_database else (url,)))  # type: ignore[operator]


def test_a_server_that_is_absent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairdr.indexes.milvus._WAIT", 1.0)
    for url in (
        "milvus://127.0.0.1:1/x",
        f"postgresql://me:hush@/db?host={tmp_path}",
        "postgresql://me:hush@127.0.0.1:1/db",
    ):
        with pytest.raises(ServerError, match=r"The server does not answer: .*Look whether it runs") as refused:
            open_database(url)
        assert "hush" not in str(refused.value)


def test_a_file_that_another_process_has_open_is_refused(tmp_path: Path) -> None:
    from milvus_lite import MilvusLite

    other = MilvusLite(str(tmp_path / "file.db"))
    with pytest.raises(ServerError, match="Milvus Lite serves one process"):
        open_database(f"milvus-lite://{tmp_path}/file.db")
    other.close()


@pytest.mark.parametrize("server", ["lite"], indirect=True)
def test_a_file_that_was_closed_is_opened_again(server: Server, kept: VectorStore) -> None:
    url = server.url()
    load_database(kept, url, CONFIG)
    server.release()
    require_found(DatabaseIndex.open(url, kept), kept)


def test_a_wrong_password_is_named_and_never_shown(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres.url(user="guarded:wrong")
    with pytest.raises(ServerError, match="The server refuses this user or password") as refused:
        open_database(url)
    assert "wrong" not in str(refused.value)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert open_database(postgres.url(user="guarded")).find_load() is None


def test_a_plus_in_a_password_is_a_plus(postgres: Postgres) -> None:
    assert open_database(postgres.url(user="plus:a+b")).find_load() is None
    assert open_database(f"{postgres.url(user='plus')}&password=a+b").find_load() is None
    with pytest.raises(ServerError, match="refuses this user or password"):
        open_database(f"{postgres.url(user='plus')}&password=a%20b")


def test_what_a_postgresql_does_not_let_one_do_is_named(postgres: Postgres, kept: VectorStore) -> None:
    import psycopg

    postgres.execute("CREATE ROLE poor LOGIN")
    with pytest.raises(ServerError, match=r"does not let this user do that: permission denied for schema .*CREATE on"):
        load_database(kept, postgres.url(user="poor"), CONFIG)
    with pytest.raises(ServerError, match=r'There is no such database: .*"nowhere" does not exist\. Look at the URL'):
        open_database(postgres.url(database="nowhere"))
    url, held = postgres.url(), list[Any]()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                held.append(stack.enter_context(psycopg.connect(postgres.url().partition("&name")[0])))
        with pytest.raises(
            ServerError, match=r"has no connection left: .*too many clients already\. .*max_connections"
        ):
            open_database(url)
    assert len(held) > 50


def test_who_may_read_a_load_may_read_the_next(postgres: Postgres, kept: VectorStore) -> None:
    url = postgres.url()
    name = read_address(url).name
    load_database(kept, url, CONFIG)
    postgres.execute(
        f"CREATE ROLE reader LOGIN; GRANT SELECT ON {name} TO reader; GRANT SELECT ON {name}__shards TO PUBLIC"
    )
    reader = DatabaseIndex.open(postgres.url(name, user="reader"), kept)
    load_database(kept, url, replace(CONFIG, rebuild=True))
    for index in (reader, DatabaseIndex.open(postgres.url(name, user="reader"), kept)):
        index._next_look = 0
        require_found(index, kept)
        assert index.exact_searches == 0
    with pytest.raises(ServerError, match="does not let this user do that: permission denied for table"):
        reader.database.add(reader.load, np.array([1]), ["x"], np.zeros((1, SIZE), np.float32), [[]])


def test_words_of_postgres_count_where_it_names_no_state(postgres: Postgres) -> None:
    database = open_database(postgres.url())
    said = 'The server refuses: role "nobody" does not exist'  # with the state 42704
    with pytest.raises(ServerError, match=said), database._ask() as connection:
        connection.execute("GRANT pg_monitor TO nobody")
    with pytest.raises(ServerError, match=r"The server refuses this user or password: .*nobody"):
        open_database(postgres.url(user="nobody"))


def test_a_milvus_that_refuses_a_token_is_named(milvus: Milvus, monkeypatch: pytest.MonkeyPatch) -> None:
    def require_refusal(url: str) -> None:
        with pytest.raises(ServerError, match=r"refuses this user or password: .*Look at the URL and MILVUS_TOKEN"):
            open_database(url)

    for token in ("root:hush", "nobody:hush", ":hush", ""):
        require_refusal(milvus.url(token=token))
    monkeypatch.setenv("MILVUS_TOKEN", "root:hush")
    require_refusal(milvus.url(token=""))
    monkeypatch.setenv("MILVUS_TOKEN", MILVUS_TOKEN)
    assert open_database(milvus.url(token="")).find_load() is None


def test_what_milvus_says_is_shown_without_the_password(milvus: Milvus, monkeypatch: pytest.MonkeyPatch) -> None:
    import pymilvus

    said = pymilvus.MilvusException(message=f"no connection for {MILVUS_TOKEN}")
    monkeypatch.setenv("MILVUS_TOKEN", MILVUS_TOKEN)
    for token in (MILVUS_TOKEN, ""):
        database = open_database(milvus.url(token=token))
        monkeypatch.setattr(database._client, "list_collections", lambda **_: _throw(said))  # type: ignore[attr-defined]
        with pytest.raises(ServerError, match=r"does not answer: no connection for .*\*\*\*") as refused:
            database.list_halves()
        assert "Milvus" not in str(refused.value).partition("no connection")[2]


def _throw(error: Exception) -> None:
    raise error


def test_a_server_without_pgvector_or_with_an_old_one_is_named(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres.execute("CREATE DATABASE old")
    assert open_database(postgres.url(database="old")).find_load() is None  # makes the extension
    postgres.execute("UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'", "old")
    with pytest.raises(ServerError, match=r"pgvector 0\.7\.4 is too old: iterative scans came with 0\.8\..*ALTER EXT"):
        open_database(postgres.url(database="old"))
    monkeypatch.setattr("pairdr.indexes.postgres._EXTENSION", "no_vector")
    with pytest.raises(ServerError, match=r"There is no pgvector here: .*no_vector.*CREATE EXTENSION vector"):
        open_database(postgres.url())


def test_an_old_milvus_is_named(milvus: Milvus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairdr.indexes.milvus._LEAST_VERSION", (9, 0))
    with pytest.raises(ServerError, match=r"Milvus v?2\.\S+ is too old: arrays came with 9\.0"):
        open_database(milvus.url())


def test_a_full_server_is_named_and_the_load_goes_on_later(
    postgres: Postgres, kept: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.url()
    postgres.execute(
        "CREATE FUNCTION fill() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
        "'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$"
    )
    postgres.execute(
        "CREATE EVENT TRIGGER full_disk ON ddl_command_end WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION fill()"
    )
    with pytest.raises(ServerError, match=r"The server is full: .*No space left.*goes on where it stopped"):
        load_database(kept, url, CONFIG)
    postgres.execute("DROP EVENT TRIGGER full_disk")
    monkeypatch.setattr(load_stage, "_add_rows", None)  # the rows are there
    load_database(kept, url, CONFIG)


@pytest.mark.parametrize("server", ["lite"], indirect=True)
def test_a_full_milvus_is_named(server: Server, kept: VectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import pymilvus

    def refuse(*arguments: Any, **options: Any) -> None:
        raise pymilvus.MilvusException(
            code=9, message="quota exceeded[reason=disk quota exceeded, please allocate more]"
        )

    monkeypatch.setattr(pymilvus.MilvusClient, "upsert", refuse)
    with pytest.raises(ServerError, match=r"The server is full: quota exceeded"):
        load_database(kept, server.url(), CONFIG)


@pytest.mark.parametrize(
    ("engine", "passage", "message"),
    [
        ("postgres", Passage("a\0b", "", "text"), "PostgreSQL keeps no NUL"),
        ("lite", Passage("a" * 70_000, "", "text"), "Milvus keeps ids of at most 65535 bytes; 'aaaa"),
        ("lite", Passage("a", "", "text", json.dumps({"n": list(range(3000))})), "at most 4096 values .* 'a' has 6000"),
    ],
)
def test_what_an_engine_cannot_keep_is_named(
    servers: Callable[[str], Server], tmp_path: Path, engine: str, passage: Passage, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_database(make_store(tmp_path, [passage]), servers(engine).url(), CONFIG)


def test_options_that_a_database_does_not_have_are_refused(kept: VectorStore, tmp_path: Path) -> None:
    for config in (IndexConfig(index_kind="flat"), IndexConfig(index_kind="ivf"), IndexConfig(quantiser="pq")):
        with pytest.raises(UsageError, match=r"A database has graphs \(hnsw\) of whole vectors"):
            load_database(kept, "milvus://127.0.0.1:1/x", config)


def test_without_its_client_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"psycopg.*pip install 'pairdr\[pgvector\]'"):
        open_database("postgresql://host/db")
    monkeypatch.setitem(sys.modules, "milvus_lite", None)
    with pytest.raises(MissingExtraError, match=r"milvus-lite.*pip install 'pairdr\[milvus\]'"):
        open_database(f"milvus-lite://{tmp_path}/file.db")
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(MissingExtraError, match=r"pymilvus.*pip install 'pairdr\[milvus\]'"):
        open_database("milvus://host/x")


# --- PostgreSQL's forms -----------------------------------------------------------------------------------------------


class Column:
    """A store of given vectors, for their kinds."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def add(self, url: str, similarity: str, dtype: Any, memory: int | None = None) -> tuple[Any, str]:
        database, load = open_database(url), f"{read_address(url).name}__0123456789ab_0"
        database.create(load, self.vectors.shape[1], similarity, dtype)
        keys = np.arange(len(self.vectors), dtype=np.int64)
        database.add(load, keys, [str(key) for key in keys], self.vectors, [[] for _ in keys])
        database.finish(load, memory)
        return database, load


@pytest.mark.parametrize(
    ("dimensions", "dtype", "column"),
    [
        (8, "float32", "vector(8)"),
        (8, "float16", "halfvec(8)"),
        (8, "int8", "halfvec(8)"),
        (3000, "float32", "halfvec(3000)"),
    ],
)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_columns_are_as_wide_as_pgvector_can_index(
    postgres: Postgres, dimensions: int, dtype: str, column: str, similarity: str
) -> None:
    vectors = np.random.default_rng(13).standard_normal((60, dimensions)).astype(np.float32)
    url = postgres.url()
    database, load = Column(vectors).add(url, similarity, dtype)
    query = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attname = 'vector' AND attrelid = "
    assert postgres.execute(f"{query}'{load}'::regclass") == [(column,)]
    found = database.search(load, vectors[:5], 3, 40, [])
    lengths = np.linalg.norm(vectors, axis=1) if similarity == "cosine" else 1
    best = np.argsort(-(vectors[:5] @ vectors.T) / lengths, axis=1)[:, :3]
    assert [set(line) for line in found.tolist()] == [set(line) for line in best.tolist()]


def test_a_search_of_a_large_table_goes_by_its_graph(postgres: Postgres) -> None:
    vectors = np.random.default_rng(13).standard_normal((3000, 64)).astype(np.float32)
    database, load = Column(vectors).add(postgres.url(), "dot", "float32")
    before = postgres.execute(f"SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = '{load}__graph'")
    assert (database.search(load, vectors[:7], 10, 40, []) >= 0).all()
    database.close()  # sends what it has counted
    for _ in range(50):
        postgres.execute("SELECT pg_stat_clear_snapshot()")
        after = postgres.execute(f"SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = '{load}__graph'")
        if after != before:
            break
    assert after[0][0] == before[0][0] + 7


def test_vectors_that_no_column_can_keep_are_refused(postgres: Postgres) -> None:
    with pytest.raises(RefusedError, match="at most 4000 dimensions; these vectors have 4001"):
        Column(np.zeros((1, 4001), dtype=np.float32)).add(postgres.url(), "dot", "float32")
    with pytest.raises(DataError, match="beyond 65504"):
        Column(np.full((1, 8), 1e6, dtype=np.float32)).add(postgres.url(), "dot", "float16")


def test_the_graph_is_built_in_as_much_memory_as_is_given(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    connect = postgres_server.PostgresServer._connect

    def listen(self: Any) -> Any:
        connection = connect(self)
        connection.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
        return connection

    monkeypatch.setattr(postgres_server.PostgresServer, "_connect", listen)
    vectors = np.random.default_rng(13).standard_normal((1200, 400)).astype(np.float32)
    Column(vectors).add(postgres.url(), "dot", "float32", 1)
    assert any("no longer fits into maintenance_work_mem" in line for line in said)
    said.clear()
    Column(vectors).add(postgres.url(), "dot", "float32", 200)
    assert said == []


# --- a server that goes and comes -------------------------------------------------------------------------------------


def test_a_lost_connection_is_opened_anew(postgres: Postgres, kept: VectorStore) -> None:
    url = postgres.url()
    index = load_database(kept, url, CONFIG)
    postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pairdr'")
    assert index.search(QUERIES, 10)[0].tolist() == find_exactly(kept, 10)  # by exact search
    index._next_look = 0
    require_found(index, kept)


def test_a_frozen_server_is_not_waited_for(
    postgres: Postgres, kept: VectorStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pgvector, "_PATIENCE", 0.3)
    monkeypatch.setattr(pgvector, "_PATIENCE_EACH", 0.01)
    index = load_database(kept, postgres.url(), CONFIG)
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pairdr'"
    frozen = [pid for (pid,) in postgres.execute(query)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert index.search(QUERIES, 10)[0].tolist() == find_exactly(kept, 10)
        assert "exact search answers, since" in capsys.readouterr().err
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    index._next_look = 0
    require_found(index, kept)


def test_a_load_does_not_wait_for_a_frozen_server_for_ever(
    postgres: Postgres, kept: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, add, frozen = postgres.url(), load_stage._add_rows, list[int]()

    def freeze(*arguments: Any) -> None:
        patch.setattr(pgvector, "_SILENCE", 0.2)  # what comes before has its time
        query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pairdr'"
        frozen.extend(pid for (pid,) in postgres.execute(query))
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(load_stage, "_add_rows", freeze)
        try:
            with pytest.raises(ServerError, match="The server does not answer"):
                load_database(kept, url, CONFIG)
        finally:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)
    assert frozen
    for _ in range(50):  # until the lock of the connection that was frozen is gone
        with contextlib.suppress(BusyError):
            require_found(load_database(kept, url, CONFIG), kept)
            return
        time.sleep(0.1)
    pytest.fail("the load does not go on")


def test_what_a_load_takes_out_or_counts_does_not_wait_for_a_frozen_server(
    postgres: Postgres, kept: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.url()
    load = load_database(kept, url, CONFIG).load
    asked: list[Callable[[Database], object]] = [
        lambda database: database.count(load),
        lambda database: database.measure_size(load),
        lambda database: database.remove(load, np.array([-1])),
        lambda database: database.drop(f"{load}_other"),
    ]
    for ask in asked:
        database = open_database(url)
        database.find_load()
        pid = database._server._open.info.backend_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            with monkeypatch.context() as patch, pytest.raises(ServerError, match="The server does not answer"):
                patch.setattr(pgvector, "_SILENCE", 0.1)
                ask(database)
        finally:
            os.kill(pid, signal.SIGCONT)
        database.close()
    assert describe_database(url)["count"] == 300


def test_while_a_server_is_away_exact_search_answers_and_says_so_once(
    postgres: Postgres, kept: VectorStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = load_database(kept, postgres.url(), CONFIG)
    asked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(type(index.database), "search", lambda *arguments: asked.append(1) or _be_away())
        for _ in range(3):
            assert index.search(QUERIES, 10)[0].tolist() == find_exactly(kept, 10)
    assert capsys.readouterr().err.count("exact search answers, since") == 1
    assert asked == [1]  # it is left alone for a while
    index._next_look = 0
    index.search(QUERIES, 10)
    assert "answers again" in capsys.readouterr().err


def _be_away() -> None:
    raise ServerError("The server does not answer.")


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "scheme", "target", "name", "shown"),
    [
        ("milvus://host:19530/name", "milvus", "http://host:19530", "name", "milvus://host:19530/name"),
        ("milvus://host", "milvus", "http://host:19530", "pairdr", "milvus://host/pairdr"),
        ("milvus://u:p%2F@host:1/n?secure=true", "milvus", "https://host:1", "n", "milvus://u@host:1/n"),
        ("milvus://[::1]:7/n", "milvus", "http://[::1]:7", "n", "milvus://[::1]:7/n"),
        ("milvus-lite:///file.db", "milvus-lite", "/file.db", "pairdr", "milvus-lite:///file.db?name=pairdr"),
        ("milvus-lite:///a%20b/f.db?name=x_1", "milvus-lite", "/a b/f.db", "x_1", "milvus-lite:///a%20b/f.db?name=x_1"),
        ("milvus://:t%3Ak@host/n", "milvus", "http://host:19530", "n", "milvus://host/n"),
        ("postgresql://h/d", "postgresql", "postgresql://h/d?", "pairdr", "postgresql://h/d?name=pairdr"),
        ("postgresql://a:1,b:2/d", "postgresql", "postgresql://a:1,b:2/d?", "pairdr", "postgresql://a:1,b:2/d?name=pairdr"),
        (
            "postgresql:///d?host=/run/p&options=-c%20a%3Db%2B1", "postgresql",
            "postgresql:///d?host=%2Frun%2Fp&options=-c%20a%3Db%2B1", "pairdr",
            "postgresql:///d?host=/run/p&options=-c%20a%3Db%2B1&name=pairdr",
        ),
        (
            "postgres://u:p@h:5/d?name=n&sslmode=require&password=p", "postgresql",
            "postgresql://u:p@h:5/d?sslmode=require&password=p", "n", "postgresql://u@h:5/d?sslmode=require&name=n",
        ),
    ],
)  # fmt: skip
def test_urls_are_read_as_people_write_them(url: str, scheme: str, target: str, name: str, shown: str) -> None:
    found = read_address(url)
    assert (found.scheme, found.target, found.name, found.shown) == (scheme, target, name, shown)
    assert is_url(url)


@given(password=st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=4))
def test_a_password_is_read_and_never_shown(password: str) -> None:
    from urllib.parse import quote

    secret = f"{password}#secret#"
    found = read_address(f"milvus://me:{quote(secret, safe='')}@host/x")
    assert found.token == f"me:{secret}"
    asked = read_address(f"postgresql://me:{quote(secret, safe='')}@host/x?sslpassword={quote(secret, safe='')}")
    for address in (found, asked):
        assert "secret" not in f"{address!r}{address.shown}"
        assert "secret" not in address.hide(f"no: {secret} {quote(secret, safe='')}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/x", r"mysql:// is no database that is known here\. Write postgresql://"),
        ("postgresql://me:12/34secret@h/d", "an @ after its host.*%2F"), ("milvus://me:12?cret@h/d", "an @ after"),
        ("milvus:///x", "cannot be read.*milvus://HOST:19530/NAME"), ("milvus://h:port/x", "cannot be read"),
        ("milvus://h/x?secure=maybe", "cannot be read"), ("milvus://h/x?timeout=3", "cannot be read"),
        ("milvus-lite://file.db", "three slashes"), ("milvus-lite:///file.sqlite", r"and \.db"),
        ("milvus://h/A-B", "'A-B' is no name .* Use 1 to 32 of"), ("milvus://h/a__b", "'a__b' is no name"),
        ("postgresql://h/d?name=", "'' is no name"), (f"milvus://h/{'a' * 33}", "is no name"),
    ],
)  # fmt: skip
def test_urls_of_other_forms_are_refused(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_address(url)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("place", ["index", "/a/b", "C:/index", "a:b", Path("milvus://host/x")])
def test_a_path_is_no_url(place: str | Path) -> None:
    assert not is_url(place)


# --- commands and the service -----------------------------------------------------------------------------------------


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.mark.parametrize("server", ["postgres", "lite"], indirect=True)
def test_the_commands_take_urls(
    server: Server, toy: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, model = server.url(), ("--start", tiny_model)
    assert call("encode", toy, "-o", tmp_path / "v", *model) == 0
    options = ("--recall-depth", 10, "--rebuild", "--data", toy, *model)
    capsys.readouterr()
    assert call("index", tmp_path / "v", "-o", url, *options) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    store = VectorStore(tmp_path / "v")
    assert (said["name"], int(said["count"]), said["encoder"]) == ("HNSW16", store.live, store.encoder)
    assert said["recall_by"] == "96 real queries"
    assert call("search", tmp_path / "v", "which river runs through Kendal", "--index", url, "--json", *model) == 0
    found = [json.loads(line)["passage_id"] for line in capsys.readouterr().out.splitlines()]
    assert call("search", tmp_path / "v", "which river runs through Kendal", "--json", *model) == 0
    assert found == [json.loads(line)["passage_id"] for line in capsys.readouterr().out.splitlines()]
    assert call("index", tmp_path / "v", "-o", tmp_path / "hnsw", "--index-kind", "hnsw", *options[:2]) == 0
    measured, described = [], []
    for name, index in (("run", ("--index", url)), ("exact", ()), ("faiss", ("--index", tmp_path / "hnsw"))):
        assert call("search", tmp_path / "v", "--data", toy, "-k", 100, "-o", tmp_path / name, *index, *model) == 0
        described.append(read_manifest(tmp_path / name).facts.get("index"))
        capsys.readouterr()
        assert call("evaluate", tmp_path / name / "run.trec", toy / "qrels" / "test.tsv", "--json") == 0
        measured.append(capsys.readouterr().out)
        assert call("evaluate", tmp_path / "v", "--data", toy, "-o", tmp_path / "e", "--json", *index, *model) == 0
        assert capsys.readouterr().out == measured[-1]  # at once
        assert read_manifest(tmp_path / "e.run").facts.get("index") == described[-1]
    assert json.loads(measured[0]) == pytest.approx(json.loads(measured[1]), abs=0.05)
    for arguments, said in (
        (("v", toy / "qrels" / "test.tsv"), "measured by the labels of a split of --data. Name --data"),
        (("v", "--data", toy, "--answers", toy), "measured by the labels of a split of --data. Name --data"),
        (("run", toy / "qrels" / "test.tsv", "--index", url), "searched already. Leave --index and --start out"),
    ):
        assert call("evaluate", tmp_path / arguments[0], *arguments[1:]) == 2
        assert said in capsys.readouterr().err
    place, facts = read_address(url).shown, describe_database(url)
    assert described == [
        {"place": place, "revision": facts["revision"], "effort": facts["effort"], "exact_searches": 0},
        None,
        {"place": str(tmp_path / "hnsw")}
        | {"fingerprint": read_manifest(tmp_path / "hnsw").fingerprint}
        | {"effort": read_manifest(tmp_path / "hnsw").facts["effort"]},
    ]
    assert call("index", tmp_path / "v", "-o", tmp_path / "i", "--rebuild") == 2
    assert "always built anew" in capsys.readouterr().err
    assert call("index", tmp_path / "v", "-o", "mysql://host/x") == 2


def test_a_run_says_what_exact_search_answered_in_place_of_its_database(
    postgres: Postgres, kept: VectorStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = load_database(kept, postgres.url(user="postgres:hush"), CONFIG)
    texts = [f"w{number} t{number % 9}\n" for number in range(300)]  # more than a block
    (tmp_path / "questions.txt").write_text("".join(texts), encoding="utf-8")
    search = type(index.database).search
    asked: list[int] = []

    def be_away_later(*arguments: Any) -> Any:
        asked.append(1)
        return search(*arguments) if len(asked) == 1 else _be_away()

    monkeypatch.setattr(type(index.database), "search", be_away_later)
    searcher = Searcher(kept, ENCODER, index=index)
    for name, count in (("first", 300 - SearchConfig().query_block), ("second", 300)):
        assert len(answer_questions(searcher, tmp_path / name, 5, queries=tmp_path / "questions.txt")) == 300
        kept_of_it = (tmp_path / name / "manifest.json").read_text(encoding="utf-8")
        assert json.loads(kept_of_it)["facts"]["index"]["exact_searches"] == count  # of this run alone
        assert "hush" not in kept_of_it


def test_a_run_says_how_it_was_searched(kept: VectorStore, tmp_path: Path) -> None:
    words = index_words(kept, LexicalConfig(), tmp_path / "bm25")
    (tmp_path / "questions.txt").write_text("w3 t3\n", encoding="utf-8")
    chosen = Searcher(
        kept, ENCODER, words=words, weights=(0.25, 0.75), config=QueryConfig(mode="hybrid", depth=20)
    )  # as a work folder is opened
    bm25 = {"words": words.fingerprint}
    with ShardedIndex(kept, 2, block=100) as index:
        shared = Searcher(kept, ENCODER, words=words, index=index)
        asked: list[tuple[Searcher, dict[str, Any], dict[str, Any]]] = [
            (Searcher(kept, ENCODER), {}, {"mode": "dense"}),
            (
                chosen,
                {},
                bm25 | {"mode": "hybrid", "fusion": "weighted", "depth": 20, "weights": [0.25, 0.75]},
            ),
            (chosen, {"fusion": "rrf"}, bm25 | {"mode": "hybrid", "fusion": "rrf", "depth": 20}),
            (chosen, {"mode": "dense"}, {"mode": "dense"}),
            (shared, {}, bm25 | {"mode": "hybrid", "fusion": "rrf", "depth": 100, "index": {"workers": 2}}),
            (shared, {"mode": "bm25"}, bm25 | {"mode": "bm25"}),
        ]
        for number, (searcher, options, facts) in enumerate(asked):
            answer_questions(searcher, tmp_path / str(number), 5, queries=tmp_path / "questions.txt", **options)
            assert read_manifest(tmp_path / str(number), "run").facts == {"queries": 1, "hits": 5} | facts


@pytest.mark.parametrize("measures", [("AP", "R@10"), ("RR@10", "nDCG", "MRR")])
def test_a_search_is_not_measured_by_what_looks_at_all_passages(
    kept: VectorStore, toy: Path, tmp_path: Path, measures: tuple[str, ...]
) -> None:
    config = EvaluateConfig(measures=measures)
    endless = ", ".join(name for name in measures if "@" not in name)
    with pytest.raises(UsageError, match=rf"deep enough for {endless}\. Write AP@100"):
        measure_searcher(Searcher(kept, ENCODER), open_collection(toy), "test", config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_service_follows_a_database(
    postgres: Postgres,
    toy: Path,
    toy_parts: Parts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, url = make_place(tmp_path, toy, toy_parts.encoder), postgres.url()
    load_database(VectorStore(place), url, CONFIG)
    model = ModelConfig(start=str(toy_parts.start), device="cpu")
    shelf = Shelf(place, model, words=place.parent / "bm25", index=url, clock=lambda _: nullcontext())
    index = shelf.take(None).searcher._index
    assert isinstance(index, DatabaseIndex)
    assert shelf.refresh() == []
    rebuild = IndexConfig(recall_depth=10, wanted_recall=0.9, tuning_queries=20, rebuild=True)
    load_database(VectorStore(place), url, rebuild)
    assert shelf.refresh() == [place.name]
    before = shelf.take(None).version
    with monkeypatch.context() as patch:
        patch.setattr(database_index, "stamp_database", lambda url: _be_away())
        capsys.readouterr()
        assert (shelf.refresh(), shelf.stale, shelf.take(None).version) == ([], {}, before)
        (first,) = shelf.take(None).searcher.search("a river", 1)
        delete_passages(place, [first.passage_id])
        index_words(VectorStore(place), LexicalConfig(), place.parent / "bm25")
        assert (shelf.refresh(), shelf.refresh()) == ([place.name], [])
        assert capsys.readouterr().err.count("is away: its new version is searched exactly") == 1
        assert shelf.take(None).searcher._index is None
        assert first.passage_id not in [hit.passage_id for hit in shelf.take(None).searcher.search("a river", 3)]
    assert (shelf.refresh(), shelf.stale) == ([place.name], {})
    assert isinstance(shelf.take(None).searcher._index, DatabaseIndex)
    drop_database(url)
    with pytest.raises(ArtefactError, match="Nothing is loaded here"):
        Shelf(place, model, words=place.parent / "bm25", index=url, clock=lambda _: nullcontext())
