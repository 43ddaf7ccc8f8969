"""What the service refuses, and how it says so: hosts, keys, forms, sizes, times; and what every answer carries."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError
from serving import (
    KEY,
    PATIENCE,
    QUESTION,
    Running,
    check_error,
    exchange,
    make_place,
    read_metrics,
    run_service,
    wait_until,
)

from pairdr import searcher
from pairdr.errors import UsageError
from pairdr.serve import forms, wire
from pairdr.serve.guard import KEYS_VARIABLE, POLICY, Keys
from pairdr.serve.measuring import Meters
from pairdr.serve.run import bind_address, serve_app
from pairdr.serve.service import Service
from pairdr.store_config import ServeConfig

if TYPE_CHECKING:
    from conftest import Parts

JSON = {"content-type": "application/json"}
OTHER = "another-key"
OPEN = ("/", "/page.css", "/settings", "/health", "/ready", "/docs", "/review")
CLOSED = ("/search?q=a", "/v1/models", "/metrics", "/openapi.json", "/no/such", "/passages", "/audit", "/settings/")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, toy: Path, toy_parts: Parts) -> Path:
    """Return a place that nobody changes."""
    return make_place(tmp_path_factory.mktemp("place"), toy, toy_parts.encoder)


@pytest.fixture(scope="module")
def asked(kept: Path, toy_parts: Parts) -> Iterator[Running]:
    """Return an open service."""
    with run_service(kept, toy_parts.start) as running:
        yield running


@pytest.fixture(scope="module")
def locked(kept: Path, toy_parts: Parts) -> Iterator[Running]:
    """Return a service with two keys that nobody writes to, and a client without one."""
    with run_service(kept, toy_parts.start, keys=[OTHER, KEY]) as running:
        del running.client.headers["Authorization"]
        yield running


class Gate:
    """Holds up the encoder of a service."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []

    def __call__(self, service: Service) -> None:
        encoder = service.shelf.take(None).encoder
        encode = encoder._encoder.encode_queries

        def encode_late(texts: Any, tokens_per_batch: int | None = None) -> Any:
            self.batches.append(list(texts))
            self.begun.set()
            assert self.go.wait(PATIENCE)
            return encode(texts, tokens_per_batch)

        encoder._encoder.encode_queries = encode_late  # type: ignore[method-assign]


def ask(pool: ThreadPoolExecutor, running: Running, *questions: str, **more: Any) -> Future[httpx.Response]:
    body = {"queries": list(questions), "mode": "dense", "k": 1, **more}
    return pool.submit(running.client.post, "/search", json=body)


# --- hosts ------------------------------------------------------------------------------------------------------------


def say_host(running: Running, host: bytes | None, path: bytes = b"/health") -> int:
    """Return the status for a Host header."""
    line = b"" if host is None else b"Host: " + host + b"\r\n"
    return exchange(running.url, b"GET " + path + b" HTTP/1.1\r\n" + line + b"Connection: close\r\n\r\n")[0]


@pytest.mark.parametrize(
    "host", [b"127.0.0.1", b"127.0.0.1:8000", b"localhost", b"LocalHost:1", b"[::1]", b"[::1]:8000", b" localhost "]
)
def test_this_machines_own_names_are_answered(asked: Running, host: bytes) -> None:
    assert say_host(asked, host) == 200


@pytest.mark.parametrize(
    "host",
    [
        *(b"example.org", b"example.org:8000", b"localhost.example.org", b"127.0.0.1.example.org", b"evil@localhost"),
        *(b"", b":8000", b"localhost:8000:8000", b"[::1", b"::1", b"[::2]", b"0.0.0.0", b"\xff", b"localhost,a", None),
    ],
)
def test_other_names_are_refused_even_for_the_page(asked: Running, host: bytes | None) -> None:
    for path in (b"/health", b"/", b"/search?q=a"):
        assert say_host(asked, host, path) in ((421, 400) if host in (None, b"\xff") else (421,))


def test_other_names_are_answered_where_they_are_given(kept: Path, toy_parts: Parts) -> None:
    with run_service(kept, toy_parts.start, hosts=("Search.Example.org",)) as running:
        for host in (b"search.example.org", b"SEARCH.example.org:443", b"localhost"):
            assert say_host(running, host) == 200
        assert say_host(running, b"example.org") == 421
        answer = running.client.get("/health", headers={"host": "example.org"})
        assert "--hosts" in check_error(answer, 421, "wrong_host")


def test_a_service_for_others_is_called_as_they_like_unless_names_are_given(kept: Path, toy_parts: Parts) -> None:
    with run_service(kept, toy_parts.start, host="0.0.0.0") as running:
        assert say_host(running, b"anything.example.org") == 200
    with run_service(kept, toy_parts.start, host="0.0.0.0", hosts=("search",)) as running:
        assert [say_host(running, name) for name in (b"search", b"127.0.0.1", b"other")] == [200, 200, 421]
    with run_service(kept, toy_parts.start, hosts=("2001:DB8::1",)) as running:
        named = [say_host(running, name) for name in (b"[2001:db8::1]", b"[2001:db8::1]:8000", b"[2001:db8::2]")]
        assert named == [200, 200, 421]


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "127.0.0.1"])
def test_every_address_of_this_machine_alone_is_guarded(kept: Path, toy_parts: Parts, host: str) -> None:
    with run_service(kept, toy_parts.start, host=host) as running:
        answer = httpx.get(running.url + "/health", headers={"host": "example.org"})
        check_error(answer, 421, "wrong_host")
        assert httpx.get(running.url + "/health").status_code == 200


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OPEN)
def test_pages_and_health_need_no_key(locked: Running, path: str) -> None:
    assert locked.client.get(path).status_code == 200
    assert locked.client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 200


@pytest.mark.parametrize("path", CLOSED)
def test_all_else_needs_one(locked: Running, path: str) -> None:
    answer = locked.client.get(path)
    check_error(answer, 401, "missing_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    check_error(locked.client.get(path, headers={"Authorization": "Bearer wrong"}), 403, "wrong_key")
    for key in (KEY, OTHER):
        found = locked.client.get(path, headers={"Authorization": f"Bearer {key}"})
        assert found.status_code not in (401, 403)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer " + KEY.encode(), 200),
        (b"bearer  " + KEY.encode(), 200),
        (b"BEARER " + KEY.encode() + b" ", 200),
        (b"Bearer", 401),
        (b"Bearer ", 401),
        (b"Basic " + KEY.encode(), 401),
        (KEY.encode(), 401),
        (b"", 401),
        (b"Bearer " + KEY.encode()[:-1], 403),
        (b"Bearer " + KEY.encode() + b"x", 403),
        (b"Bearer " + KEY.upper().encode(), 403),
        (b"Bearer " + KEY.encode() + b" " + KEY.encode(), 403),
        (b"Bearer " + KEY.encode() + b"," + OTHER.encode(), 403),
        (b"Bearer \xff\xfe", 403),
        (b"Bearer " + b"x" * 10_000, 403),
    ],
)
def test_a_key_is_the_whole_key(locked: Running, header: bytes, status: int) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: " + header
    assert exchange(locked.url, head + b"\r\n\r\n")[0] == status


@pytest.mark.parametrize(
    "path",
    ["/passages", "/passages/", "/passages/delete", "/%70assages", "/passages%2fdelete", "/passages/../passages"],
)
def test_nobody_writes_where_there_are_no_keys(asked: Running, path: str) -> None:
    body = {"passages": [{"_id": "new", "text": "a"}]}
    target = path.encode()
    content = json.dumps(body).encode()
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % target
    head += b"Authorization: Bearer x\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(content)
    status, _, answer = exchange(asked.url, head + content)
    assert (status, json.loads(answer)["error"]["code"]) == (403, "writes_off")
    assert asked.search()["version"].startswith("1-")


@pytest.mark.parametrize("path", ["//passages", "/search/../passages", "/./passages", "/PASSAGES", "/search/", "/v1"])
def test_other_ways_to_write_a_path_lead_nowhere(locked: Running, path: str) -> None:
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % path.encode()
    tail = b"Content-Length: 2\r\nConnection: close\r\n\r\n{}"
    assert exchange(locked.url, head + tail)[0] == 401
    key = b"Authorization: Bearer " + KEY.encode() + b"\r\n"
    assert exchange(locked.url, head + key + tail)[0] in (307, 404)


def test_a_key_is_needed_before_anything_is_read(locked: Running) -> None:
    """Who has no key learns of no path, no limit and no form."""
    for content, headers in ((b"{", JSON), (b"x" * 5_000_000, JSON), (b"a=b", {"content-type": "text/plain"})):
        check_error(locked.client.post("/search", content=content, headers=headers), 401, "missing_key")
        check_error(locked.client.post("/no/such", content=content, headers=headers), 401, "missing_key")


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def note(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    keys = Keys(["first", "second", "third"])
    monkeypatch.setattr(hmac, "compare_digest", note)
    for given, found in (("first", True), ("third", True), ("fourth", False), ("", False)):
        compared.clear()
        assert (given in keys) is found
        assert len(compared) == 3  # also after one that fits
        assert {len(value) for pair in compared for value in pair} == {32}  # hashes: lengths say nothing either
    assert not any(key in repr(vars(keys)) for key in ("first", "second", "third"))


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the page\n one \n\ntwo\r\n#three\n", encoding="utf-8")
    found = Keys.read(path)
    assert len(found) == 2
    assert ["one" in found, "two" in found, "#three" in found, "three" in found] == [True, True, False, False]
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert len(Keys.read(None)) == 0
    monkeypatch.setenv(KEYS_VARIABLE, "four, five,,")
    found = Keys.read(None)
    assert (len(found), "four" in found, "five" in found) == (2, True, True)
    assert "four" not in Keys.read(path)


@pytest.mark.parametrize("content", ["", " , "])
def test_a_variable_without_a_key_opens_nothing(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, content)
    with pytest.raises(UsageError, match=f"no key in {KEYS_VARIABLE}"):
        Keys.read(None)


@pytest.mark.parametrize("content", ["", "# nothing\n\n", "a key\n", "schlüssel\n", "tab\tkey\n", "\ufeffone\n"])
def test_a_file_without_a_usable_key_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        Keys.read(path)
    assert not content.strip() or content.strip() not in str(error.value)  # a key is not shown in an error either
    with pytest.raises(UsageError, match="no such file"):
        Keys.read(tmp_path / "missing")


def test_no_key_is_ever_said(
    locked: Running, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for key in (KEY, "wrong-and-secret"):
        headers = {"Authorization": f"Bearer {key}"}
        said = [locked.client.get(path, headers=headers).text for path in ("/metrics", "/settings", "/openapi.json")]
        said.append(locked.client.post("/search", content=b"{", headers=headers | JSON).text)
        assert not [text for text in said if key in text]
    exchange(locked.url, b"GET / HTTP/1.1\r\nAuthorization: Bearer " + KEY.encode() + b"\r\nbroken\r\n\r\n")
    written = "".join(capfd.readouterr()) + caplog.text
    assert KEY not in written
    assert "wrong-and-secret" not in written


# --- forms and sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"not json", b'{"query": "a"} x', b'{"query": "\xff\xfe"}', b"\xff", b"\x00", b"{'query': 'a'}"),
        *(b'{"query": "a", "k": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 100_000, b'{"query": "a\nb"}'),
    ],
)
def test_what_is_no_json_is_400_or_names_what_is_missing(asked: Running, content: bytes) -> None:
    answer = asked.client.post("/search", content=content, headers=JSON)
    said = check_error(answer, *((422, "invalid_value") if content == b"" else (400, "invalid_json")))
    assert content == b"" or said == "The body is no JSON."


@pytest.mark.parametrize(
    ("form", "body"),
    [
        (forms.SearchForm, {"queries": [1] * 100}), (forms.SearchForm, {f"a{n}": 1 for n in range(100)}),
        (forms.SearchForm, {"query": "a", "filters": [1] * 100}), (forms.EmbeddingForm, {"input": [1] * 100}),
        (forms.RerankForm, {"query": "a", "documents": [{}] * 100}), (forms.UpsertForm, {"passages": [{}] * 100}),
        (forms.DeleteForm, {"ids": [1] * 100}),
    ],
)  # fmt: skip
def test_the_first_of_many_errors_is_enough(form: type[BaseModel], body: dict[str, Any]) -> None:
    """To note millions would take the service half a minute, in which it answers nobody."""
    with pytest.raises(ValidationError) as error:
        form.model_validate(body)
    assert error.value.error_count() <= 2  # and of a list that it was needed


@pytest.mark.parametrize("content", [b"null", b"[]", b"3", b'"a"', b"NaN", b"true", b"[{}]", b"{}"])
def test_what_is_another_json_is_422(asked: Running, content: bytes) -> None:
    for path in ("/search", "/v1/embeddings", "/v1/rerank"):
        check_error(asked.client.post(path, content=content, headers=JSON), 422, "invalid_value")


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; b=a"]
)
def test_what_is_not_sent_as_json_is_415(asked: Running, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    for path in ("/search", "/no/such"):
        check_error(asked.client.post(path, content=b'{"query": "a"}', headers=headers), 415, "not_json")
    sent = asked.client.post("/search", content=b'{"query": "a"}', headers={"content-type": "Application/JSON; a=b"})
    assert sent.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/search", {"GET", "POST"}),
        ("DELETE", "/v1/models", {"GET"}),
        ("HEAD", "/search?q=a", {"GET", "POST"}),
        ("OPTIONS", "/search", {"GET", "POST"}),
        ("OPTIONS", "/passages", {"POST"}),
        ("GET", "/v1/rerank", {"POST"}),
        ("TRACE", "/health", {"GET", "HEAD"}),
        ("PROPFIND", "/", {"GET", "HEAD"}),
        ("POST", "/settings", {"GET"}),
    ],
)
def test_other_methods_are_405_with_those_there_are(locked: Running, method: str, path: str, allowed: set[str]) -> None:
    answer = locked.client.request(method, path, headers={"Authorization": f"Bearer {KEY}", **JSON})
    assert answer.status_code == 405
    (line,) = answer.headers.get_list("allow")
    assert {name.strip() for name in line.split(",")} == allowed
    if method != "HEAD":
        check_error(answer, 405, "method_not_allowed")


@pytest.mark.parametrize(
    "path",
    [
        "/no/such",
        "/page.css/",
        "/search/",
        "/../run.py",
        "/page/index.html",
        "/%2e%2e/guard.py",
        "/index.html",
        "/.",
        "/page%2ecss%00",
    ],
)
def test_what_is_not_there_is_404_and_no_file_is_opened(
    asked: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a file was opened")

    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    status, _, body = exchange(asked.url, head)
    assert status == 404, body
    assert json.loads(body)["error"]["code"] == "not_found"


def test_a_page_is_answered_to_head_without_its_body(asked: Running) -> None:
    whole, head = asked.client.get("/"), asked.client.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_load_balancers_may_ask_for_the_head(locked: Running, path: str) -> None:
    answer = httpx.head(locked.url + path)
    assert (answer.status_code, answer.content) == (200, b"")
    check_headers(answer)


def test_limits_are_those_of_the_options_and_are_named(kept: Path, toy_parts: Parts) -> None:
    options = {"most_results": 5, "most_texts": 3, "most_characters": 50, "most_bytes": 1000, "queue_texts": 3}
    options["most_hits"] = 12
    with run_service(kept, toy_parts.start, keys=[KEY], **options) as running:
        post = running.client.post
        assert running.client.get("/settings").json()["limits"] == {"k": 5, "texts": 3, "characters": 50}
        assert len(running.search(k=5)["results"][0]["hits"]) == 5
        assert post("/search", json={"queries": ["a" * 50] * 3, "k": 4}).status_code == 200
        passage = {"_id": "a", "text": "b" * 30, "title": "c" * 10}
        long = "is 51; this service allows at most 50."
        many = "is 4; this service allows at most 3."
        for path, body, message in (
            ("/search", {"query": "a", "k": 6}, "k is 6; this service allows at most 5."),
            ("/search", {"query": "a", "k": 10**100}, "; this service allows at most 5."),
            ("/search", {"queries": ["a"] * 4}, many),
            ("/search", {"queries": ["a"] * 3, "k": 5}, "results is 15; this service allows at most 12."),
            ("/search", {"query": "a" * 51}, long),
            ("/search", {"query": "a", "filters": ["kind=a"] * 4}, many),
            ("/search", {"query": "a", "filters": ["kind=" + "a" * 46]}, long),
            ("/v1/embeddings", {"input": ["a"] * 4}, many),
            ("/v1/embeddings", {"input": "a" * 51}, long),
            ("/v1/rerank", {"query": "a", "documents": ["a"] * 4}, many),
            ("/v1/rerank", {"query": "a", "documents": ["a" * 51]}, long),
            ("/v1/rerank", {"query": "a", "documents": [{"title": "a" * 25, "text": "a" * 25}]}, long),
            ("/v1/rerank", {"query": "a" * 51, "documents": ["a"]}, long),
            ("/passages", {"passages": [passage | {"_id": str(number)} for number in range(4)]}, many),
            ("/passages", {"passages": [passage | {"title": "c" * 20}]}, long),
            (
                "/passages",
                {"passages": [passage | {"metadata": {"a": 1, "b": "2"}}]},
                "; this service allows at most 50.",
            ),
            ("/passages", {"passages": [passage | {"_id": "a" * 11}]}, long),
            ("/passages/delete", {"ids": ["a"] * 4}, many),
            ("/passages/delete", {"ids": ["a" * 51]}, long),
        ):
            said = check_error(post(path, json=body), 422, "limit_exceeded")
            assert said.endswith(message), said
        for query in ("q=a&k=6", "q=" + "a" * 51, "q=a" + "&filter=kind=a" * 4):
            check_error(running.client.get(f"/search?{query}"), 422, "limit_exceeded")
        fits = json.dumps({"query": "a"}).encode().ljust(1000)
        assert post("/search", content=fits, headers=JSON).status_code == 200
        assert "at most 1000 bytes" in check_error(
            post("/search", content=fits + b" ", headers=JSON), 413, "body_too_large"
        )
        chunks = post("/search", content=iter([fits, b" "]), headers=JSON)
        assert "at most 1000 bytes" in check_error(chunks, 413, "body_too_large")
        assert running.search()["version"].startswith("1-")


def test_ten_thousand_texts_are_refused_and_harm_nobody(asked: Running) -> None:
    for path, body in (("/search", {"queries": ["a"] * 10_000}), ("/v1/embeddings", {"input": ["a"] * 10_000})):
        said = check_error(asked.client.post(path, json=body), 422, "limit_exceeded")
        assert said.endswith("is 10000; this service allows at most 256.")
    check_error(asked.client.post("/search", json={"query": "a" * 3_000_000}), 422, "limit_exceeded")
    assert asked.search()["results"]


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large_is_refused_in_words_however_it_is_sent(asked: Running, is_announced: bool) -> None:
    """A client that sends all before it reads gets the answer, and not a reset."""
    if is_announced:
        sent = POST + b"Content-Length: 50000000\r\n\r\n" + b" " * 50_000_000
    else:
        sent = CHUNKED + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 50 + b"0\r\n\r\n"
    for _ in range(3):
        with connect(asked) as connection:
            connection.sendall(sent)
            answer = b""
            while part := connection.recv(65_536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"


def test_a_client_of_the_library_is_told_that_its_body_is_too_large(asked: Running) -> None:
    request = urllib.request.Request(f"{asked.url}/search", b" " * 20_000_000, JSON)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=PATIENCE)
    with refused.value as answer:
        assert (answer.code, json.load(answer)["error"]["code"]) == (413, "body_too_large")


def test_the_rest_of_a_refused_body_is_read_no_longer_than_a_body_may_take(kept: Path, toy_parts: Parts) -> None:
    with run_service(kept, toy_parts.start, body_seconds=0.3) as running, connect(running) as connection:
        begin = time.monotonic()
        connection.sendall(POST + b"Content-Length: 50000000\r\n\r\n ")
        while connection.recv(65_536):
            assert time.monotonic() - begin < PATIENCE
        assert time.monotonic() - begin >= 0.2


def test_the_head_that_is_refused_may_be_sent_to_its_end(asked: Running) -> None:
    for _ in range(5):
        with connect(asked) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 60_000)
            answer = b""
            while part := connection.recv(65_536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 431 ")


# --- queues and times -------------------------------------------------------------------------------------------------


def test_past_the_queue_there_is_429_and_room_again_later(kept: Path, toy_parts: Parts) -> None:
    gate = Gate()
    options = {"queue_texts": 4, "most_texts": 4, "batch_wait": 0.0}
    with run_service(kept, toy_parts.start, prepare=gate, **options) as running, ThreadPoolExecutor(4) as pool:
        first = ask(pool, running, "first")
        assert gate.begun.wait(PATIENCE)
        waits = ask(pool, running, "a", "b", "c")
        queue = 'pairdr_queue_texts{queue="texts"}'
        wait_until(lambda: read_metrics(running.client)[queue] == 3)
        refused = ask(pool, running, "d", "e").result()
        check_error(refused, 429, "queue_full")
        assert refused.headers["retry-after"] == "1"
        check_error(running.client.post("/v1/embeddings", json={"input": ["d", "e"]}), 429, "queue_full")
        last = ask(pool, running, "f")
        wait_until(lambda: read_metrics(running.client)[queue] == 4)
        check_error(running.client.post("/search", content=b"{", headers=JSON), 429, "queue_full")  # is not even read
        assert read_metrics(running.client)['pairdr_requests_total{path="/search",status="429"}'] == 2
        assert running.client.get("/health").status_code == 200
        gate.go.set()
        assert [future.result().status_code for future in (first, waits, last)] == [200, 200, 200]
        assert ask(pool, running, "d", "e").result().status_code == 200
        assert read_metrics(running.client)[queue] == 0


def test_a_queue_that_has_no_room_for_a_request_is_refused(kept: Path, toy_parts: Parts) -> None:
    with (
        pytest.raises(UsageError, match=r"A request may have 256 texts, and only 100 may wait\. Raise --queue-texts"),
        run_service(kept, toy_parts.start, queue_texts=100),
    ):
        pass


def test_what_takes_too_long_is_504_and_the_next_is_answered(kept: Path, toy_parts: Parts) -> None:
    gate = Gate()
    options = {"request_seconds": 0.3, "batch_wait": 0.0}
    with run_service(kept, toy_parts.start, prepare=gate, **options) as running:
        for path, body in (("/search", {"query": "a"}), ("/v1/embeddings", {"input": "a", "input_type": "query"})):
            assert "within 0.3 seconds" in check_error(running.client.post(path, json=body), 504, "timeout")
        gate.go.set()
        wait_until(lambda: running.client.get("/search?q=a").status_code == 200)
    assert len([batch for batch in gate.batches if batch != ["a"]]) == 0


def test_requests_meet_in_batches_of_the_options(kept: Path, toy_parts: Parts) -> None:
    """Three requests of two texts: a batch is full at four, and none waits for the second that it might."""
    gate = Gate()
    gate.go.set()
    options = {"batch_texts": 6, "batch_wait": 1000.0}
    with run_service(kept, toy_parts.start, prepare=gate, **options) as running, ThreadPoolExecutor(3) as pool:
        futures = [ask(pool, running, f"a{number}", f"b{number}") for number in range(3)]
        for number, future in enumerate(futures):
            assert [row["query"] for row in future.result().json()["results"]] == [f"a{number}", f"b{number}"]
        assert [len(batch) for batch in gate.batches] == [6]
        found = read_metrics(running.client)
        assert found['pairdr_batch_texts_count{queue="texts"}'] == 1
        assert found['pairdr_batch_texts_sum{queue="texts"}'] == 6
        assert found['pairdr_stage_seconds_count{stage="queue"}'] == 3
    with run_service(kept, toy_parts.start, prepare=gate, batch_texts=2, batch_wait=1000.0) as running:
        gate.batches.clear()
        running.client.post("/search", json={"queries": ["a", "b"], "mode": "dense"})
        running.client.post("/search", json={"queries": ["a", "b", "c"], "mode": "dense"})
        assert [len(batch) for batch in gate.batches] == [2, 2, 1]  # none waited for more


def test_questions_of_all_ways_of_searching_are_encoded_at_once(kept: Path, toy_parts: Parts) -> None:
    """Whatever k, filters and mode they have."""
    gate = Gate()
    kinds = ("kind=river", "kind=market", "kind=museum")
    ways: list[dict[str, Any]] = [
        {"k": 1 + at % 7, "filters": [kinds[at % 3]], "mode": ("dense", "hybrid")[at % 2], "fold": at > 20}
        for at in range(32)
    ]
    with run_service(kept, toy_parts.start, prepare=gate, batch_wait=0.0) as running, ThreadPoolExecutor(34) as pool:
        first = ask(pool, running, "first")
        assert gate.begun.wait(PATIENCE)
        queue = 'pairdr_queue_texts{queue="texts"}'
        futures = [ask(pool, running, f"river {number}", **way) for number, way in enumerate(ways)]
        futures.append(ask(pool, running, "river 3", mode="bm25"))
        wait_until(lambda: read_metrics(running.client)[queue] == 33)
        gate.go.set()
        answers = [future.result().json() for future in futures]
        assert first.result().status_code == 200
        assert [len(batch) for batch in gate.batches] == [1, 32]
        for number, (way, answer) in enumerate(zip(ways, answers, strict=False)):
            hits = answer["results"][0]["hits"]
            alone = running.search(query=f"river {number}", **way)["results"][0]["hits"]
            assert [hit["id"] for hit in hits] == [hit["id"] for hit in alone]
            assert len(hits) == way["k"]
            assert {f"kind={hit['metadata']['kind']}" for hit in hits} == set(way["filters"])


def test_searches_come_between_the_parts_of_many_texts_to_embed(kept: Path, toy_parts: Parts) -> None:
    gate = Gate()
    texts = [f"text {number}" for number in range(200)]
    with (
        run_service(kept, toy_parts.start, prepare=gate, batch_texts=8, batch_wait=0.0) as running,
        ThreadPoolExecutor(2) as pool,
    ):
        body = {"input": texts, "input_type": "query"}
        embedded = pool.submit(running.client.post, "/v1/embeddings", json=body)
        assert gate.begun.wait(PATIENCE)
        found = ask(pool, running, "meanwhile")
        wait_until(lambda: read_metrics(running.client)['pairdr_queue_texts{queue="texts"}'] == 193)
        gate.go.set()
        assert found.result().status_code == 200
        assert len(embedded.result().json()["data"]) == 200
    assert gate.batches[:2] == [texts[:8], ["meanwhile"]]
    assert max(map(len, gate.batches)) == 8


def test_a_search_does_not_wait_for_all_passages_of_a_write(kept: Path, toy_parts: Parts, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "v")
    said: list[str] = []
    begun, answered = threading.Event(), threading.Event()

    def hold_up(service: Service) -> None:
        shared = service.shelf.take(None).encoder
        inside = shared._encoder
        encode_passages, encode_queries = inside.encode_passages, inside.encode_queries

        def encode_late(passages: Any, tokens_per_batch: int | None = None) -> Any:
            said.append(f"{len(passages)} passages")
            begun.set()
            if said.count("4 passages") <= 3:
                wait_until(shared._turn.locked)  # a question waits for the encoder
            else:
                assert answered.wait(PATIENCE)
            return encode_passages(passages, tokens_per_batch)

        def note(texts: Any, tokens_per_batch: int | None = None) -> Any:
            said.append("question")
            return encode_queries(texts, tokens_per_batch)

        inside.encode_passages, inside.encode_queries = encode_late, note  # type: ignore[method-assign]

    rows = [{"_id": f"new{number}", "text": f"a text {number}"} for number in range(60)]
    options: dict[str, Any] = {"keys": [KEY], "prepare": hold_up, "batch_texts": 4}
    with run_service(tmp_path / "v", toy_parts.start, **options) as running, ThreadPoolExecutor(1) as pool:
        written = pool.submit(running.client.post, "/passages", json={"passages": rows})
        assert begun.wait(PATIENCE)
        for _ in range(3):
            running.search(mode="dense")
        assert not written.done()
        answered.set()
        assert written.result().status_code == 200
        assert len(running.search(query="a text 7", mode="dense", k=100)["results"][0]["hits"]) == 100
    assert said.count("4 passages") == 15
    assert said[:6] == ["4 passages", "question"] * 3


def test_a_filter_that_takes_long_holds_up_nobody_else(
    kept: Path, toy_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    match_rows = searcher.match_rows

    def match_late(*arguments: Any) -> Any:
        begun.set()
        assert go.wait(PATIENCE)
        return match_rows(*arguments)

    monkeypatch.setattr(searcher, "match_rows", match_late)
    with run_service(kept, toy_parts.start) as running, ThreadPoolExecutor(1) as pool:
        filtered = ask(pool, running, QUESTION, filters=["kind=river"])
        assert begun.wait(PATIENCE)
        assert running.search()["results"]
        assert not filtered.done()
        go.set()
        assert filtered.result().status_code == 200


def test_a_batch_looks_no_filter_up_however_many_wait(
    kept: Path, toy_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    match_rows = searcher.match_rows

    def note(*arguments: Any) -> Any:
        looked_up.append(threading.current_thread().name)
        return match_rows(*arguments)

    monkeypatch.setattr(searcher, "match_rows", note)
    monkeypatch.setattr(searcher, "KEPT_FILTERS", 2)
    gate = Gate()
    filters = [["kind=river", f"kind={number}"] for number in range(9)]
    options: dict[str, Any] = {"prepare": gate, "batch_wait": 0.0, "queue_texts": 9, "most_texts": 9}
    with run_service(kept, toy_parts.start, **options) as running, ThreadPoolExecutor(10) as pool:
        first = ask(pool, running, "first")
        assert gate.begun.wait(PATIENCE)
        futures = [ask(pool, running, QUESTION, filters=one, mode="hybrid", k=3) for one in filters[:8]]
        wait_until(lambda: read_metrics(running.client)['pairdr_queue_texts{queue="texts"}'] == 8)
        refused = ask(pool, running, "a", "b", filters=["kind=other"], mode="hybrid")
        check_error(refused.result(), 429, "queue_full")  # before it is looked up
        assert len(looked_up) == 2 * 8
        gate.go.set()
        answers = [future.result().json()["results"][0]["hits"] for future in (*futures, first)]
    assert [[hit["metadata"]["kind"] for hit in hits] for hits in answers[:8]] == [["river"] * 3] * 8
    assert len(looked_up) == 2 * 8
    assert not [name for name in looked_up if name.startswith("texts")]


def test_one_text_waits_for_company_as_long_as_the_option_says(kept: Path, toy_parts: Parts) -> None:
    waited = {}
    for wait in (0.0, 300.0):
        with run_service(kept, toy_parts.start, batch_wait=wait) as running:
            running.search()
            found = read_metrics(running.client)
            waited[wait] = found['pairdr_stage_seconds_sum{stage="queue"}']
    assert waited[300.0] >= 0.3 > waited[0.0]


# --- what goes wrong inside -------------------------------------------------------------------------------------------


def test_what_nobody_expected_is_500_without_details(
    kept: Path, toy_parts: Parts, capfd: pytest.CaptureFixture[str]
) -> None:
    def spoil(service: Service) -> None:
        def fail(*_: Any) -> Any:
            raise RuntimeError("a secret of this machine")

        service.shelf.take(None).encoder._encoder.encode_queries = fail  # type: ignore[method-assign]

    with run_service(kept, toy_parts.start, prepare=spoil) as running:
        for path, body in (("/search", {"query": "a"}), ("/v1/embeddings", {"input": "a", "input_type": "query"})):
            answer = running.client.post(path, json=body)
            assert "secret" not in check_error(answer, 500, "internal")
            check_headers(answer)
        assert running.client.post("/search", json={"query": "river", "mode": "bm25"}).status_code == 200
        found = read_metrics(running.client)
        assert found['pairdr_requests_total{path="/search",status="500"}'] == 1
    assert "a secret of this machine" in capfd.readouterr().err  # which the log says


def test_a_service_that_stops_says_that_it_is_not_ready(kept: Path, toy_parts: Parts) -> None:
    with run_service(kept, toy_parts.start) as running:
        assert running.client.get("/ready").json() == {"status": "ready"}
        running.service.draining = True
        check_error(running.client.get("/ready"), 503, "not_ready")
        assert running.client.get("/health").json() == {"status": "ok"}
        assert running.search()["results"]


def test_what_is_under_way_past_the_time_to_drain_is_503(kept: Path, toy_parts: Parts) -> None:
    gate = Gate()
    with run_service(kept, toy_parts.start, prepare=gate, drain_seconds=0.2, batch_wait=0.0) as running:
        body = b'{"query": "a"}'
        head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: len(gate.batches) > 0)
            running.stop()
            answer = b""
            while part := connection.recv(65536):
                answer += part
            gate.go.set()
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(content)["error"]["code"] == "stopping"


def test_requests_are_counted_by_their_path_and_status(kept: Path, toy_parts: Parts) -> None:
    with run_service(kept, toy_parts.start) as running:
        running.search(mode="dense")
        running.client.get("/search?q=")
        running.client.get("/")
        for number in range(3):
            running.client.get(f"/no/such/{number}")
        answer = running.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        found = read_metrics(running.client)
        requests = {name: value for name, value in found.items() if name.startswith("pairdr_requests_total")}
        assert requests['pairdr_requests_total{path="/search",status="200"}'] == 1
        assert requests['pairdr_requests_total{path="/search",status="422"}'] == 1
        assert requests['pairdr_requests_total{path="other",status="404"}'] == 3
        assert not [name for name in requests if "/no/such" in name]  # what clients make up is no label
        assert found['pairdr_request_seconds_count{path="/search"}'] == 2
        for stage in ("encode", "search", "queue"):
            assert found[f'pairdr_stage_seconds_count{{stage="{stage}"}}'] >= 1
        (model,) = running.client.get("/settings").json()["models"]
        assert found[f'pairdr_index_info{{model="v",version="{model["version"]}"}}'] == 1
        assert found['pairdr_index_version{model="v"}'] == 1
        assert found['pairdr_index_passages{model="v"}'] == 120
        assert "which river" not in answer.text  # questions are nobody's business


# --- what every answer carries ----------------------------------------------------------------------------------------


def check_headers(answer: httpx.Response) -> None:
    """Check that an answer has each header of security, once."""
    for name, value in {
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cross-origin-opener-policy": "same-origin",
    }.items():
        assert answer.headers.get_list(name) == [value]
    assert "server" not in answer.headers


def test_the_policy_is_the_strict_one() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    for name in ("script-src", "style-src", "connect-src", "form-action"):
        assert rules[name] == "'self'"
    assert rules["img-src"] == "'self' data:"
    assert not re.search(r"unsafe|\*|http", POLICY)


def test_every_answer_is_signed(locked: Running, asked: Running) -> None:
    client, key = locked.client, {"Authorization": f"Bearer {KEY}"}
    answers = [
        *(client.get(path, headers=key) for path in (*OPEN, *CLOSED)),
        client.get("/search?q=a"),
        client.get("/search?q=a", headers={"Authorization": "Bearer wrong"}),
        client.get("/health", headers={"host": "example.org"}),
        client.post("/search", content=b"{", headers=key | JSON),
        client.post("/search", content=b"a=b", headers=key),
        client.post("/search", content=b" " * 5_000_000, headers=key | JSON),
        client.request("OPTIONS", "/search"),
        asked.client.post("/passages", json={}),
    ]
    assert {answer.status_code for answer in answers} >= {200, 400, 401, 403, 404, 405, 413, 415, 421}
    for answer in answers:
        check_headers(answer)
    broken = exchange(locked.url, b"this is no HTTP\r\n\r\n")
    assert (broken[0], json.loads(broken[2])["error"]["code"]) == (400, "invalid_http")
    assert broken[1]["content-security-policy"] == POLICY


@pytest.mark.parametrize("path", ["/", "/docs", "/review"])
def test_the_pages_bear_the_policy(asked: Running, path: str) -> None:
    """No script, no style and no handler stands in a page; what it names comes from here, and is there."""
    answer = asked.client.get(path)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            names = dict(attrs)
            assert tag not in ("style", "base", "iframe", "object", "embed")
            assert not [name for name in names if name == "style" or name.startswith("on")]
            if tag == "script":
                assert names.get("src")
            found.extend(str(names[name]) for name in ("src", "href") if names.get(name))

    Reader().feed(answer.text)
    assert found
    for target in found:
        if target.startswith(("#", "data:")):
            continue
        assert not re.match(r"[a-z]+:|//", target), target
        assert asked.client.get(httpx.URL(str(answer.url)).join(target)).status_code == 200, target


def test_other_sites_may_not_ask_unless_they_are_named(kept: Path, toy_parts: Parts) -> None:
    site, other = "https://example.org", "https://example.com"
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with run_service(kept, toy_parts.start, keys=[KEY]) as running:
        for answer in (
            running.client.get("/search?q=a", headers={"Origin": site}),
            running.client.request("OPTIONS", "/search", headers={"Origin": site, **preflight}),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control")]
    with run_service(kept, toy_parts.start, keys=[KEY], cors_origins=(site,)) as running:
        client = running.client
        allowed = client.request("OPTIONS", "/search", headers={"Origin": site, **preflight})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == site
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        found = client.get("/search?q=a", headers={"Origin": site}).headers
        assert found["access-control-allow-origin"] == site
        assert found["access-control-expose-headers"] == "Retry-After"
        refused = client.request("OPTIONS", "/search", headers={"Origin": other, **preflight})
        assert refused.status_code == 400
        for answer in (refused, client.get("/search?q=a", headers={"Origin": other})):
            assert "access-control-allow-origin" not in answer.headers
        for preflighted in (allowed, refused):
            check_headers(preflighted)
        foreign = {"Origin": site, "Host": "example.net", **preflight}
        check_error(client.request("OPTIONS", "/search", headers=foreign), 421, "wrong_host")
        del client.headers["Authorization"]
        locked = client.get("/search?q=a", headers={"Origin": site})  # an error can be read there too
        check_error(locked, 401, "missing_key")
        assert locked.headers["access-control-allow-origin"] == site
        assert "access-control-allow-credentials" not in locked.headers


# --- the socket -------------------------------------------------------------------------------------------------------


def test_a_socket_is_this_machines_own_unless_another_address_is_named() -> None:
    for config, address in ((ServeConfig(port=0), "127.0.0.1"), (ServeConfig(host="0.0.0.0", port=0), "0.0.0.0")):
        with bind_address(config) as listener:
            assert listener.getsockname()[0] == address
            # Else asyncio leaves TCP_NODELAY out, and every answer waits 40 ms for the client's acknowledgement.
            assert listener.proto == socket.IPPROTO_TCP


def test_a_port_that_is_taken_is_said_so() -> None:
    with bind_address(ServeConfig(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port} cannot be listened on: .*in use.*--port 0"):
            bind_address(ServeConfig(port=port))
    config = ServeConfig(port=port)
    with bind_address(config) as free, bind_address(config) as other:  # two have it, and one is the first to listen
        assert free.getsockname()[1] == port
        free.listen()
        idle = type("Idle", (), {"config": config})
        with pytest.raises(UsageError, match="cannot be listened on"):
            serve_app(lambda *_: None, idle, Keys([]), other)  # type: ignore[arg-type, return-value]
    with pytest.raises(UsageError, match="cannot be listened on"):
        bind_address(ServeConfig(host="no.such.host.invalid"))
    with pytest.raises(UsageError, match="--host is empty"):
        bind_address(ServeConfig(host=""))


@pytest.mark.parametrize(
    ("host", "keys", "is_said"),
    [("127.0.0.1", [], False), ("0.0.0.0", [], True), ("0.0.0.0", [KEY], False), ("127.0.0.2", [], False)],
)
def test_a_service_that_is_open_to_all_says_so(
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str,
    keys: list[str],
    is_said: bool,
) -> None:
    import uvicorn

    class Idle:
        config = ServeConfig(host=host, port=0)

    def run(_: Any, sockets: list[socket.socket]) -> None:
        for listener in sockets:
            listener.close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    serve_app(lambda *_: None, Idle(), Keys(keys), bind_address(Idle.config))  # type: ignore[arg-type, return-value]
    said = capsys.readouterr().err
    assert ("open to everybody" in said) is is_said
    assert re.search(rf"http://{re.escape(host)}:\d+ ", said)


# --- what comes before a request --------------------------------------------------------------------------------------


def test_what_is_no_plain_request_is_answered_as_one(locked: Running) -> None:
    """There is no other protocol to change to, and so no way around the guard."""
    key = b"Authorization: Bearer " + KEY.encode() + b"\r\n"
    socket_ = b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    clear = b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    for upgrade in (socket_, clear):
        for more, host, status in ((b"", b"localhost", 401), (key, b"localhost", 200), (key, b"example.org", 421)):
            head = b"GET /v1/models HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade, close\r\n" % host
            assert exchange(locked.url, head + upgrade + more + b"\r\n")[0] == status
    for line in (
        b"CONNECT localhost:80 HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET /\xff HTTP/1.1",
    ):
        assert exchange(locked.url, line + b"\r\nHost: localhost\r\n\r\n")[0] == 400
    begun = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    assert exchange(locked.url, begun + key + b"Content-Length: 50000000\r\n\r\n")[0] == 413  # and not 100


def test_a_head_that_does_not_come_is_given_up(kept: Path, toy_parts: Parts) -> None:
    with run_service(kept, toy_parts.start, body_seconds=0.3) as running:
        for begun in (b"", b"GET", b"GET / HTTP/1.1\r\nHost: local", b"\r\n\r\n"):
            status, _, body = exchange(running.url, begun)
            assert (status, json.loads(body)["error"]["code"]) == (408, "slow_head")
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            connection.sendall(whole)
            found = b""
            while not found.endswith(b'{"status":"ok"}'):
                found += connection.recv(65_536)
            connection.sendall(b"GET / HTTP/1.1\r\nHos")
            while data := connection.recv(65_536):
                found += data
        assert found.endswith(b'"code":"slow_head"}}')


def test_a_head_without_end_is_431(asked: Running) -> None:
    for head in (b"GET /" + b"a" * 200_000, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 40_000):
        status, headers, body = exchange(asked.url, head)
        assert (status, json.loads(body)["error"]["code"]) == (431, "head_too_large")
        assert headers["connection"] == "close"
    assert wire.MOST_HEAD == 65_536
    long = "a" * 15_000  # what fits is read
    assert asked.client.get(f"/search?q={long}").status_code == 200


def test_a_head_that_is_refused_is_not_served_though_it_came_whole(
    asked: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    served: list[bytes] = []
    start = wire.Protocol._start_asgi_task

    def note(self: wire.Protocol, *arguments: Any) -> None:
        served.append(self.url)
        start(self, *arguments)

    monkeypatch.setattr(wire.Protocol, "_start_asgi_task", note)
    line, host, long = b"GET / HTTP/1.1\r\n", b"Host: localhost\r\n", b"a" * 70_000
    for head in (
        b"GET /" + long + b" HTTP/1.1\r\n" + host,
        line + host + b"X-A: " + long + b"\r\n",
        line + b"X-A: " + long + b"\r\n" + host,
    ):
        for rest in (b"", line + host + b"\r\n"):
            status, headers, body = exchange(asked.url, head + b"\r\n" + rest)
            assert (status, json.loads(body)["error"]["code"]) == (431, "head_too_large")
            assert headers["connection"] == "close"
    assert asked.client.get("/health").status_code == 200
    assert served == [b"/health"]
    assert (
        "".join(capfd.readouterr()) + "".join(record.message for record in caplog.records if record.levelno >= 30) == ""
    )


def read_answers(connection: socket.socket, count: int) -> list[bytes]:
    """Return the bodies of some answers that come one after the other."""
    found, bodies = b"", []
    while len(bodies) < count:
        data = connection.recv(65_536)
        assert data, found
        found += data
        while b"\r\n\r\n" in found:
            head, _, rest = found.partition(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]
            if len(rest) < length:
                break
            bodies.append(rest[:length])
            found = rest[length:]
    return bodies


def connect(running: Running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), PATIENCE)


POST = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def test_headers_after_a_body_are_read_over_and_have_an_end(asked: Running, locked: Running) -> None:
    body = b'e\r\n{"query": "a"}\r\n0\r\n'
    with connect(asked) as connection:
        connection.sendall(CHUNKED + body + b"X-Sum: 1\r\nHost: elsewhere\r\n\r\n" + CHUNKED + body + b"\r\n")
        assert [len(json.loads(answer)["results"]) for answer in read_answers(connection, 2)] == [1, 1]
    for running in (asked, locked):  # of the second the answer, 401, is there before
        for line in (b"a: b\r\n", b"a"):
            with connect(running) as connection, pytest.raises(ConnectionError):
                connection.sendall(CHUNKED + body)
                for _ in range(1000):
                    connection.sendall(line * 20_000)


def test_what_comes_in_pieces_is_counted_once(asked: Running) -> None:
    piece = b" " * 8190 + b"\r\n1ffe\r\n"  # of one chunk the end, of the next the size
    with connect(asked) as connection:
        connection.sendall(CHUNKED + b"1ffe\r\n")
        for part in [piece] * 12 + [b" " * 8176 + b'{"query": "a"}\r\n0\r\n\r\n']:
            connection.sendall(part)
            time.sleep(0.01)
        assert len(json.loads(read_answers(connection, 1)[0])["results"]) == 1
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nCookie: ")
        for _ in range(40):
            connection.sendall(b"c" * 1_448)
            time.sleep(0.002)
        connection.sendall(b"\r\n\r\n")
        assert json.loads(read_answers(connection, 1)[0]) == {"status": "ok"}


def test_requests_that_follow_each_other_at_once_are_both_answered(asked: Running) -> None:
    long = json.dumps({"query": "a", "filters": ["kind=" + "b" * 5_000] * 30}).encode()
    sent = POST + b"Content-Length: %d\r\n\r\n" % len(long) + long
    with connect(asked) as connection:
        connection.sendall(sent + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        first, second = read_answers(connection, 2)
    assert (json.loads(first)["results"][0]["hits"], json.loads(second)) == ([], {"status": "ok"})


@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_who_would_rather_speak_another_protocol_is_answered_in_this_one(asked: Running, offer: bytes) -> None:
    """Clients of Java and curl offer HTTP/2 with every first request."""
    body = b'{"query": "a", "k": 2}'
    head = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + offer + b"\r\nHTTP2-Settings: AAEAAEAA\r\n"
    with connect(asked) as connection:
        for part in (head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:5], body[5:]):
            connection.sendall(part)
            time.sleep(0.05)
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answers = [json.loads(answer) for answer in read_answers(connection, 2)]
    assert [len(answer["results"][0]["hits"]) for answer in answers] == [2, 2]
    offers = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: " + offer + b"\r\n\r\n"
    with connect(asked) as connection:
        connection.sendall(offers * 1_200)
        assert read_answers(connection, 1_200) == [b'{"status":"ok"}'] * 1_200
    with connect(asked) as connection:
        connection.sendall(offers.replace(b"Upgrade\r", b"Upgrade, close\r") + b"more")
        assert read_answers(connection, 1) == [b'{"status":"ok"}']
    assert exchange(asked.url, b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0] in (400, 405)


@pytest.mark.parametrize("begun", [b"", b'{"query": ', b"2\r\n"])
def test_a_body_that_does_not_come_is_408(kept: Path, toy_parts: Parts, begun: bytes) -> None:
    length = b"Transfer-Encoding: chunked" if begun.startswith(b"2") else b"Content-Length: 100"
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + length + b"\r\n\r\n"
    with run_service(kept, toy_parts.start, body_seconds=0.3) as running:
        status, headers, body = exchange(running.url, head + begun)
        assert (status, json.loads(body)["error"]["code"]) == (408, "slow_body")
        assert "within 0.3 seconds" in json.loads(body)["error"]["message"]
        assert headers["connection"] == "close"
        assert running.search()["results"]


def test_a_client_that_does_not_read_its_answers_is_cut_off(
    kept: Path, asked: Running, toy_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[Any] = []
    meet, lose = wire.Protocol.connection_made, wire.Protocol.connection_lost

    def keep_little(self: wire.Protocol, transport: asyncio.Transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        meet(self, transport)

    def note(self: wire.Protocol, exc: Exception | None) -> None:
        lost.append(self.client)
        lose(self, exc)

    body = json.dumps({"queries": [QUESTION] * 20, "k": 100, "mode": "bm25"}).encode()
    sent, count = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body, 4
    whole = len(asked.client.post("/search", content=body, headers=JSON).content)
    monkeypatch.setattr(wire.Protocol, "connection_made", keep_little)
    monkeypatch.setattr(wire.Protocol, "connection_lost", note)
    with run_service(kept, toy_parts.start, request_seconds=3.0) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(PATIENCE)
            connection.connect((host, int(port)))
            connection.sendall(sent * count)
            wait_until(lambda: connection.getsockname() in lost)
            found = 0
            with suppress(ConnectionError):
                while part := connection.recv(65_536):
                    found += len(part)
        assert 0 < found < whole
        assert running.search()["results"]


def test_a_client_that_reads_slowly_but_in_time_gets_all(kept: Path, toy_parts: Parts) -> None:
    body = json.dumps({"queries": [QUESTION] * 20, "k": 100}).encode()
    with run_service(kept, toy_parts.start) as running, connect(running) as connection:
        connection.sendall(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while part := connection.recv(20_000):
            answer += part
            time.sleep(0.01)
    assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["results"]) == 20


def test_the_meters_of_two_services_are_apart() -> None:
    one, other = Meters(), Meters()
    one.note_request("/search", 200, 0.1)
    assert b"pairdr_requests_total{" in one.write()
    assert b"pairdr_requests_total{" not in other.write()


def test_a_client_that_goes_away_harms_nobody(kept: Path, toy_parts: Parts) -> None:
    gate = Gate()
    content = json.dumps({"query": QUESTION, "mode": "dense"}).encode()
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with run_service(kept, toy_parts.start, prepare=gate) as running:
        host, port = running.url.removeprefix("http://").split(":")
        for sent in (head % len(content) + content, head % 100 + content):
            with socket.create_connection((host, int(port)), PATIENCE) as connection:
                connection.sendall(sent)
                if sent.endswith(content) and b": 100" not in sent:
                    assert gate.begun.wait(PATIENCE)
        gate.go.set()
        assert running.search()["results"]
