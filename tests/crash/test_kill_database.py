"""Loads into a database that are killed (kill -9), and servers that are, in the middle of one: the old version answers.

PAIRDR_KILLS says how often (1); `make test-crash` kills 20 times.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from servers import ENGINES, Server  # noqa: E402
from storing import WordEncoder, make_texts, to_passages, write_collection  # noqa: E402

from pairdr.config import EncodeConfig  # noqa: E402
from pairdr.encode import encode_corpus, upsert_passages  # noqa: E402
from pairdr.indexes.database import DatabaseIndex, open_database  # noqa: E402
from pairdr.indexes.exact import search_exact  # noqa: E402
from pairdr.load import describe_database, load_database  # noqa: E402
from pairdr.store_config import IndexConfig  # noqa: E402
from pairdr.vectors import VectorStore  # noqa: E402

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("PAIRDR_KILLS", "1"))
CONFIG = IndexConfig(recall_depth=5, wanted_recall=0.9, tuning_queries=10)
SHARDS = EncodeConfig(shard_size=10)
CHILD = """
import sys
from pairdr import load
from pairdr.errors import PairdrError
from pairdr.store_config import IndexConfig
from pairdr.vectors import VectorStore
add = load._add_rows
def add_and_wait(*arguments):
    add(*arguments)
    print("added", flush=True)
    sys.stdin.readline()
load._add_rows = add_and_wait
try:
    load.load_database(VectorStore(sys.argv[1]), sys.argv[2], IndexConfig(recall_depth=5, tuning_queries=10))
except PairdrError as error:
    sys.exit(str(error))
"""


@pytest.fixture(params=ENGINES)
def server(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> Iterator[Server]:
    yield servers(request.param)
    servers(request.param)  # others need it too


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VectorStore, VectorStore]:
    """Return vectors by two models, in six shards each."""
    monkeypatch.setenv("PAIRDR_CACHE", str(tmp_path / "cache"))
    found = []
    for name in ("old", "new"):
        data = write_collection(tmp_path / name / "data", make_texts(60))
        found.append(encode_corpus(data, WordEncoder(name), SHARDS, tmp_path / name / "v"))
    return found[0], found[1]


def start_load(store: VectorStore, url: str, shards: int) -> subprocess.Popen[str]:
    """Start a load in a process of its own, and let it send some shards."""
    command = [sys.executable, "-c", CHILD, str(store.folder), url]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS.parent
    )
    assert child.stdin
    assert child.stdout
    for number in range(shards):
        assert child.stdout.readline() == "added\n", child.communicate()[1]
        if number < shards - 1:
            child.stdin.write("go on\n")
            child.stdin.flush()
    return child


def require_answers(url: str, store: VectorStore, encoder: str) -> None:
    """Assert that the database finds nearly what exact search finds, with the scores of the store."""
    queries = WordEncoder(encoder).encode_queries(["word1 town3", "word2", "town5"])
    index = DatabaseIndex.open(url, store)
    index._search_exactly = None  # type: ignore[assignment, method-assign]
    _, scores = index.search(queries, 5)
    exact = search_exact(queries, store.read_raw(50), store.id_rank, 5)[1]
    assert scores[:, 0].tolist() == pytest.approx(exact[:, 0].tolist(), abs=1e-6)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_load_leaves_what_was_published_and_goes_on(
    server: Server, stores: tuple[VectorStore, VectorStore], number: int
) -> None:
    old, new = stores
    url, shards = server.url(), random.Random(number).randint(1, 6)
    load_database(old, url, CONFIG)
    server.release()
    child = start_load(new, url, shards)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    require_answers(url, old, "old")
    assert describe_database(url)["count"] == 60
    load_database(new, url, CONFIG)
    require_answers(url, new, "new")
    assert describe_database(url)["count"] == 60
    assert open_database(url).list_halves() == []


def test_a_killed_update_in_place_leaves_a_database_that_answers(
    server: Server, stores: tuple[VectorStore, VectorStore]
) -> None:
    old, url = stores[0], server.url()
    load_database(old, url, CONFIG)
    changed = upsert_passages(
        to_passages(make_texts(25, first=50)), WordEncoder("old"), SHARDS, old.folder
    )  # ten as they were, fifteen new
    server.release()
    child = start_load(changed, url, 1)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    require_answers(url, old, "old")
    load_database(changed, url, CONFIG)
    require_answers(url, changed, "old")
    assert describe_database(url)["count"] == changed.live == 75


@pytest.mark.parametrize("server", ["postgres", "milvus"], indirect=True)
def test_a_server_that_is_killed_in_the_middle_of_a_load_answers_with_the_old_version(
    server: Server, stores: tuple[VectorStore, VectorStore], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = stores
    url = server.url()
    load_database(old, url, CONFIG)
    open_index = DatabaseIndex.open(url, old)
    child = start_load(new, url, 3)
    server.kill()
    _, said = child.communicate("go on\n", timeout=120)
    assert child.returncode == 1
    assert "The server does not answer" in said
    queries = WordEncoder("old").encode_queries(["word1 town3"])
    exact = search_exact(queries, old.read_raw(50), old.id_rank, 5)[0]
    assert open_index.search(queries, 5)[0].tolist() == exact.tolist()  # by exact search meanwhile
    server.start()
    end = time.monotonic() + 120
    while not open_index._usable:  # Milvus has to load the vectors first
        assert time.monotonic() < end
        open_index._next_look, open_index._unsaid = 0, True
        assert open_index.search(queries, 5)[0].tolist() == exact.tolist()
    told = capsys.readouterr().err
    assert "Run pairdr index again" not in told
    require_answers(url, old, "old")
    load_database(new, url, CONFIG)
    require_answers(url, new, "new")
    assert VectorStore(new.folder).live == describe_database(url)["count"]
