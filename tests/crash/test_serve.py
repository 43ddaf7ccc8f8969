"""`pairdr serve` as a process: drained, killed (kill -9) and restarted under load, versions swapped, the wire abused.

PAIRDR_KILLS says how often it is killed while it writes (2); `make test-crash` kills 20 times.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from serving import (  # noqa: E402
    HEADERS,
    KEY,
    PATIENCE,
    QUESTION,
    Process,
    check_error,
    exchange,
    make_place,
    make_work,
    mark_edition,
    name_version,
    read_metrics,
    read_rows,
    split_answer,
    wait_until,
)

from pairdr.backends import Encoder, open_encoder  # noqa: E402
from pairdr.config import EncodeConfig, LexicalConfig  # noqa: E402
from pairdr.encode import upsert_passages  # noqa: E402
from pairdr.export import export_model  # noqa: E402
from pairdr.formats import format_metadata  # noqa: E402
from pairdr.lexical import index_words  # noqa: E402
from pairdr.parts import find_parts  # noqa: E402
from pairdr.records import Passage  # noqa: E402
from pairdr.serve.shelf import follow_words  # noqa: E402
from pairdr.vectors import VectorStore  # noqa: E402

if TYPE_CHECKING:
    from conftest import Parts

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("PAIRDR_KILLS", "2"))
WAYS = ("dense", "bm25", "hybrid")
ENVIRONMENT = {"PAIRDR_API_KEYS": KEY}
Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, toy_parts: Parts) -> Path:
    """Return the tiny model, exported for onnxruntime."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(toy_parts.start, folder, to="onnx")
    return folder


@pytest.fixture(scope="module")
def encoder(model: Path) -> Encoder:
    return open_encoder(model)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, toy: Path, encoder: Encoder) -> Path:
    """Return a place that nobody changes."""
    return make_place(tmp_path_factory.mktemp("place"), toy, encoder)


@pytest.fixture
def place(kept: Path, tmp_path: Path) -> Path:
    """Return a copy of it."""
    for name in ("v", "bm25"):
        shutil.copytree(kept.parent / name, tmp_path / name)
    return tmp_path / "v"


@pytest.fixture(scope="module")
def running(kept: Path, model: Path) -> Iterator[Process]:
    """Return a service that has little patience."""
    with Process(kept, model, "--body-seconds", 1, "--most-bytes", 1_000_000) as process:
        yield process


def open_client(process: Process) -> httpx.Client:
    return httpx.Client(base_url=process.url, headers=HEADERS, timeout=PATIENCE)


def publish(place: Path, encoder: Encoder, edition: int) -> str:
    """Publish another edition from this process, words after vectors, and return the version's name."""
    store = publish_vectors(place, encoder, edition)
    index_words(store, LexicalConfig(), place.parent / "bm25")
    return name_version(place)


def publish_vectors(place: Path, encoder: Encoder, edition: int) -> VectorStore:
    rows = mark_edition(read_rows(place), edition)
    passages = [Passage(r["_id"], r["title"], r["text"], format_metadata(r["metadata"])) for r in rows]
    return upsert_passages(passages, encoder, EncodeConfig(), place)


def find_edition(answer: dict[str, Any]) -> int:
    """Return the edition of which all hits of an answer are; texts and metadata say the same."""
    hits = answer["results"][0]["hits"]
    editions = {hit["metadata"]["edition"] for hit in hits}
    assert len(editions) == 1
    assert {hit["text"].split(" Edition ")[1] for hit in hits} == {f"{edition}." for edition in editions}
    return int(editions.pop())


@contextmanager
def load(process: Process, answers: Answers, errors: list[Exception]) -> Iterator[None]:
    """Ask without a pause, in every way, while the block runs."""
    done = threading.Event()

    def ask(mode: str) -> None:
        with open_client(process) as client:
            while not done.is_set():
                try:
                    answer = client.post("/search", json={"query": QUESTION, "k": 30, "mode": mode})
                except httpx.TransportError as error:
                    errors.append(error)
                    return
                assert answer.status_code == 200, answer.text
                answers.append(answer.json())

    with ThreadPoolExecutor(len(WAYS)) as pool:
        futures = [pool.submit(ask, mode) for mode in WAYS]
        try:
            yield
        finally:
            done.set()
        for future in futures:
            future.result()


# --- an exported model ------------------------------------------------------------------------------------------------


def test_an_exported_model_is_served_where_there_is_no_torch(running: Process, toy_parts: Parts) -> None:
    with open_client(running) as client:
        texts = ["the river of Ashford", "a text"]
        answer = client.post("/v1/embeddings", json={"input": texts}).json()
        expected = toy_parts.encoder.encode_passages([Passage("", "", text) for text in texts])
        assert np.array([row["embedding"] for row in answer["data"]]) == pytest.approx(expected, abs=2e-5)
        for mode in WAYS:
            assert find_edition(client.post("/search", json={"query": QUESTION, "mode": mode}).json()) == 1
        assert "<html" in client.get("/").text
    assert running.url.startswith("http://127.0.0.1:")
    assert not [line for line in running.said if "Traceback" in line]


def test_a_work_folder_is_served_on_an_export_of_its_model_where_there_is_no_torch(
    tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path, tmp_path: Path
) -> None:
    work = make_work(tmp_path_factory.getbasetemp(), toy, tiny_model)
    export_model(work / "models" / "pair", tmp_path / "export", to="onnx")
    with Process(work, tmp_path / "export") as process, open_client(process) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["pair"]
        for mode in WAYS:
            answer = client.post("/search", json={"query": QUESTION, "mode": mode}).json()
            assert (answer["model"], len(answer["results"][0]["hits"])) == ("pair", 10)
    export_model(work / "models" / "start", tmp_path / "other", to="onnx")
    with Process(work, tmp_path / "other") as process:
        assert process.wait() == 2
        assert "is no export of the model that made the vectors." in "".join(process.said)


# --- the wire ---------------------------------------------------------------------------------------------------------


HEAD = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(process: Process) -> socket.socket:
    host, port = process.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), PATIENCE)


def read_code(found: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    status, headers, body = found
    assert headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"
    return status, json.loads(body)["error"]["code"]


def is_well(process: Process) -> bool:
    with open_client(process) as client:
        return find_edition(client.post("/search", json={"query": QUESTION}).json()) == 1


@pytest.mark.parametrize("body", [b'{"query": "\xff\xfe"}', b'{"query": "\xc0\xaf"}', b"\xf8\x88\x80\x80\x80", b"\x80"])
def test_bytes_that_are_no_utf8_are_400(running: Process, body: bytes) -> None:
    head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert read_code(exchange(running.url, head + body)) == (400, "invalid_json")
    assert is_well(running)


def send_all(process: Process, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, and only then read what comes: a reset is an error."""
    with connect(process) as connection:
        connection.sendall(sent)
        found = b""
        while data := connection.recv(65_536):
            found += data
    return split_answer(found)


def test_fifty_megabytes_are_413_whether_they_are_announced_or_not(running: Process) -> None:
    with open_client(running) as client:
        before = read_metrics(client)["process_resident_memory_bytes"]
        body = b'{"query": "' + b"a" * 50_000_000
        announced = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
        assert read_code(send_all(running, announced + body)) == (413, "body_too_large")
        chunks = b"".join(b"100000\r\n" + b"a" * 2**20 + b"\r\n" for _ in range(50)) + b"0\r\n\r\n"
        announced = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        assert read_code(send_all(running, announced + chunks)) == (413, "body_too_large")
        after = read_metrics(client)["process_resident_memory_bytes"]
        assert after - before < 30e6
    assert is_well(running)


def test_a_connection_is_closed_where_the_rest_of_a_body_would_come(running: Process) -> None:
    """What follows a refused body is none of its next requests."""
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    status, headers, body = exchange(running.url, HEAD + b"Content-Length: 2000000\r\n\r\n" + smuggled)
    assert (status, headers["connection"]) == (413, "close")
    assert body.endswith(b'"body_too_large"}}')


def test_lengths_that_contradict_each_other_are_no_request(running: Process) -> None:
    for lengths in (
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: " + b"9" * 5000 + b"\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: \xb2\r\n",
    ):
        assert read_code(exchange(running.url, HEAD + lengths + b"\r\n{}"))[0] in (400, 413)
    assert is_well(running)


@pytest.mark.parametrize("sent", [b"", b"POST /sea", HEAD, HEAD + b'Content-Length: 100\r\n\r\n{"query": "a'])
def test_half_a_request_is_408(running: Process, sent: bytes) -> None:
    begin = time.monotonic()
    status, code = read_code(exchange(running.url, sent))
    assert (status, code) == (408, "slow_body" if b"Length" in sent else "slow_head")
    assert time.monotonic() - begin >= 0.9


@pytest.mark.parametrize(
    "head", [HEAD + b"Content-Length: 1000\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "]
)
def test_a_client_that_drips_is_408_all_the_same(running: Process, head: bytes) -> None:
    """It always sends something, and yet is not waited for longer than others."""
    with connect(running) as connection:
        connection.sendall(head)
        connection.settimeout(0.05)
        begin, found = time.monotonic(), b""
        while not found:
            assert time.monotonic() - begin < PATIENCE
            try:
                found = connection.recv(65_536)
                assert found
            except TimeoutError:
                connection.sendall(b"a")
    assert found.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - begin >= 0.9


def test_clients_that_vanish_harm_nobody(running: Process) -> None:
    body = json.dumps({"query": QUESTION}).encode()
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for end in range(1, len(whole), 7):
        with connect(running) as connection:
            connection.sendall(whole[:end])
    for _ in range(20):
        with connect(running) as connection:
            connection.sendall(whole)
    assert is_well(running)


def test_questions_and_keys_are_in_no_log(running: Process) -> None:
    with open_client(running) as client:
        client.post("/search", json={"query": "a-secret-question"})
        client.get("/search?q=a-secret-question&k=0")
        client.post("/search", content=b'{"query": "a-secret-question', headers={"content-type": "application/json"})
    said = "".join(running.said)
    assert "a-secret-question" not in said
    assert KEY not in said


# --- the end ----------------------------------------------------------------------------------------------------------


def count_taken(client: httpx.Client) -> float:
    """Return how many questions wait, or were taken into batches."""
    found = read_metrics(client)
    return found['pairdr_queue_texts{queue="texts"}'] + found.get('pairdr_batch_texts_sum{queue="texts"}', 0)


def test_what_is_under_way_is_answered_after_sigterm(kept: Path, model: Path) -> None:
    count = 8
    body = json.dumps({"query": QUESTION, "mode": "dense"}).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with Process(kept, model, "--batch-wait", 1000, "--batch-texts", 64) as process:
        with open_client(process) as client, ThreadPoolExecutor(count) as pool:
            asked = [pool.submit(exchange, process.url, request) for _ in range(count)]
            wait_until(lambda: count_taken(client) == count)
            process.child.send_signal(signal.SIGTERM)
            answers = [future.result() for future in asked]
        assert process.wait() in (0, -signal.SIGTERM)
        for status, headers, found in answers:
            assert status == 200
            assert len(found) == int(headers["content-length"])
            assert find_edition(json.loads(found)) == 1
        with pytest.raises(ConnectionRefusedError):
            connect(process)
        assert not [line for line in process.said if "Traceback" in line]


def test_no_answer_is_cut_by_sigterm_under_load(kept: Path, model: Path) -> None:
    """Every request is answered whole, or not taken."""
    body = json.dumps({"query": QUESTION}).encode()
    request = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    found: list[bytes] = []

    def ask(process: Process) -> None:
        while True:
            try:
                with connect(process) as connection:
                    connection.sendall(request)
                    answer = b""
                    while data := connection.recv(65_536):
                        answer += data
                    found.append(answer)
            except ConnectionRefusedError:
                return
            except ConnectionError:
                assert not answer

    with Process(kept, model) as process, ThreadPoolExecutor(4) as pool:
        assert is_well(process)
        futures = [pool.submit(ask, process) for _ in range(4)]
        wait_until(lambda: len(found) > 20)
        assert process.end(signal.SIGTERM) in (0, -signal.SIGTERM)
        for future in futures:
            future.result()
    answered = [answer for answer in found if answer]
    assert len(answered) > 20
    for answer in answered:
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert find_edition(json.loads(content)) == 1


def test_what_never_comes_is_waited_for_no_longer_than_the_option_says(kept: Path, model: Path) -> None:
    with (
        Process(kept, model, "--body-seconds", 600, "--drain-seconds", 1) as process,
        connect(process) as connection,
        open_client(process) as client,
    ):
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert client.get("/health").status_code == 200
        begin = time.monotonic()
        assert process.end(signal.SIGTERM) in (0, -signal.SIGTERM)
        assert 0.9 <= time.monotonic() - begin < 20


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_a_killed_service_answers_again_with_the_same_version(kept: Path, model: Path) -> None:
    answers: Answers = []
    errors: list[Exception] = []
    with Process(kept, model) as process:
        with load(process, answers, errors):
            wait_until(lambda: len(answers) > 20)
            process.end(signal.SIGKILL)
            wait_until(lambda: len(errors) == len(WAYS))
        port = process.url.rsplit(":", 1)[1]
    (version,) = {answer["version"] for answer in answers}
    before = len(answers)
    with Process(kept, model, "--port", port) as process:  # at the same address, at once
        with load(process, answers, errors):
            wait_until(lambda: len(answers) > before + 20)
        assert process.url.endswith(f":{port}")
    assert len(errors) == len(WAYS)
    assert {answer["version"] for answer in answers} == {version}
    for answer in answers:
        answer.pop("milliseconds")
    kinds = {json.dumps(answer, sort_keys=True) for answer in answers}
    assert len(kinds) == len(WAYS)  # the same answers as before


def test_ctrl_c_is_how_it_ends(place: Path, model: Path) -> None:
    with Process(place, model) as process:
        with open_client(process) as client:
            assert client.get("/ready").status_code == 200
        assert process.end(signal.SIGINT) == 0
        assert not [line for line in process.said if "Interrupted" in line or "Traceback" in line]


def test_a_service_that_is_killed_while_it_writes_starts_again_with_a_whole_version(place: Path, model: Path) -> None:
    editions = {name_version(place): 1}
    process = Process(place, model, environment=ENVIRONMENT)
    try:
        for number in range(KILLS):
            edition = number + 2
            rows = mark_edition(read_rows(place), edition)
            begin = time.monotonic()
            with open_client(process) as client, ThreadPoolExecutor(1) as pool:
                assert client.get("/ready").status_code == 200
                sent = pool.submit(post_passages, client, rows)
                time.sleep(random.Random(number).random() * 0.4)  # whichever moment it is
                process.end(signal.SIGKILL)
                answer = sent.result()
            moment = time.monotonic() - begin
            if answer is not None:
                editions[answer["version"]] = edition
            process = Process(place, model, environment=ENVIRONMENT)
            with open_client(process) as client:
                found = [client.post("/search", json={"query": QUESTION, "mode": mode}).json() for mode in WAYS]
                (version,) = {answer["version"] for answer in found}
                (seen,) = {find_edition(answer) for answer in found}
                assert seen in (edition, max(old for old in editions.values() if old <= edition))
                assert editions.setdefault(version, seen) == seen
                assert answer is None or seen == edition
                mended = any("indexing the words" in line for line in process.said)
                print(f"kill {number + 1}: after {moment:.3f} s, edition {seen} of {edition}, words mended: {mended}")
    finally:
        process.end()


def post_passages(client: httpx.Client, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what was answered, or None where nothing was."""
    try:
        answer = client.post("/passages", json={"passages": rows})
    except httpx.TransportError:
        return None
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_killed_between_vectors_and_words_it_starts_again_where_it_may_write(
    place: Path, model: Path, encoder: Encoder
) -> None:
    with pytest.raises(KeyboardInterrupt), follow_words(find_parts(place, words=place.parent / "bm25")):
        publish_vectors(place, encoder, 2)
        raise KeyboardInterrupt
    with Process(place, model) as process:  # where nobody writes through it, it leaves the words alone
        assert process.wait() == 1
        (said,) = process.said
        assert said.startswith("pairdr: ")
        assert "The passages have changed since their words were indexed." in said
    with Process(place, model, environment=ENVIRONMENT) as process, open_client(process) as client:
        assert any("indexing the words of version 2" in line for line in process.said if process.url)
        for mode in WAYS:
            answer = client.post("/search", json={"query": QUESTION, "mode": mode}).json()
            assert (answer["version"], find_edition(answer)) == (name_version(place), 2)


# --- hot swap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["another process", "the service"])
def test_no_request_is_dropped_or_mixed_when_versions_change(
    place: Path, model: Path, encoder: Encoder, who: str
) -> None:
    answers: Answers = []
    errors: list[Exception] = []
    editions = {name_version(place): 1}
    watch = 0.05 if who == "another process" else 3600  # the service itself needs no look
    with (
        Process(place, model, "--watch-seconds", watch, environment=ENVIRONMENT) as process,
        open_client(process) as client,
    ):

        def write(edition: int) -> str:
            if who == "another process":
                return publish(place, encoder, edition)
            answer = post_passages(client, mark_edition(read_rows(place), edition))
            assert answer is not None
            return str(answer["version"])

        with load(process, answers, errors):
            for edition in (2, 3, 4):
                wait_for_more(answers, lambda answer: answer["version"] in editions)
                editions[version := write(edition)] = edition
                wait_for_more(answers, lambda answer, version=version: answer["version"] == version)  # type: ignore[misc]
    assert errors == []
    assert {answer["version"] for answer in answers} == set(editions)
    for answer in answers:
        assert find_edition(answer) == editions[answer["version"]]
        assert len(answer["results"][0]["hits"]) == 30 or answer["mode"] == "bm25"


def wait_for_more(answers: Answers, fits: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until every way of searching has been answered well once more."""
    start = len(answers)
    wait_until(lambda: {a["mode"] for a in answers[start:] if fits(a)} == set(WAYS))


def test_a_wrong_key_and_none_are_refused_by_the_process_too(place: Path, model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# ours\n{KEY}\n", encoding="utf-8")
    with Process(place, model, "--api-keys", keys, "--host", "127.0.0.1") as process, open_client(process) as client:
        assert client.get("/search?q=a").status_code == 200
        check_error(httpx.get(f"{process.url}/search?q=a"), 401, "missing_key")
        check_error(httpx.get(f"{process.url}/search?q=a", headers={"Authorization": "Bearer w"}), 403, "wrong_key")
        assert process.end(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert KEY not in "".join(process.said)
    keys.write_text("a bad key\n", encoding="utf-8")
    with Process(place, model, "--api-keys", keys) as process:
        assert process.wait() == 2
        (said,) = process.said
        assert "A key has other than visible ASCII characters." in said
        assert "bad key" not in said
