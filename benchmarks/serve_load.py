"""Clients that ask again as soon as they are answered, each on one connection, and the services that they ask.

The load shares the processors with the service, so it is lean: requests are bytes that were made before, and of an
answer nothing but its status and its length is read.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOST_SECONDS = 300  # of one load
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


class Service:
    """A service in a process of its own, on a free port of loopback; its output goes to a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as stream:
            self.begin = time.perf_counter()
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        self.port = 0

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait_until_ready(self) -> float:
        """Return the seconds from the start of the process until /ready answers 200."""
        while time.perf_counter() < self.begin + MOST_SECONDS:
            said = ADDRESS.search(self._log.read_text(encoding="utf-8", errors="replace"))
            if said:
                self.port = int(said[1])
                status, _ = asyncio.run(ask_once(self.port, form_request("GET", "/ready")))
                if status == 200:
                    return time.perf_counter() - self.begin
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise SystemExit(f"The service did not start; see {self._log}.")

    def read_memory(self) -> float:
        """Return the MiB that are the process's own (RssAnon)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    def read_work(self) -> float:
        """Return the processor seconds that the process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def form_request(method: str, path: str, body: Any = None) -> bytes:
    """Return the bytes of a request."""
    sent = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent


async def ask_once(port: int, request: bytes) -> tuple[int, bytes]:
    """Return status and body of one answer; status 0 where nobody listens."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return 0, b""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    found = LENGTH.search(head)
    body = await reader.readexactly(int(found[1]) if found else 0)
    writer.close()
    await writer.wait_closed()
    return int(head[9:12]), body


class Measured(NamedTuple):
    """What a load has seen.

    Attributes:
        seconds: that were counted.
        waits: [n] seconds of each answer with status 200 in that time.
        statuses: how often each came, those before and after the counted time among them.
        broken: connections that were refused, or ended before an answer.
    """

    seconds: float
    waits: np.ndarray
    statuses: Counter[int]
    broken: int

    @property
    def rate(self) -> float:
        """Return the answers with status 200 per second."""
        return len(self.waits) / self.seconds

    def percentile(self, share: float) -> float:
        """Return the milliseconds within which a share of them, in percent, came."""
        return 1000 * float(np.percentile(self.waits, share)) if len(self.waits) else float("nan")


def load(port: int, requests: Iterator[bytes], clients: int, seconds: float = 0, least: int = 0) -> Measured:
    """Ask by some clients at once, from when each has been answered once until enough was counted.

    Args:
        port: of loopback.
        requests: without end.
        clients: connections.
        seconds: counted at least.
        least: answers that are counted at least.
    """
    return asyncio.run(_Load(port, requests, clients, seconds, least).run())


class _Load:
    def __init__(self, port: int, requests: Iterator[bytes], clients: int, seconds: float, least: int) -> None:
        self.requests, self.statuses = requests, Counter[int]()
        self.broken, self.waits, self.is_over = 0, [], False
        self._port, self._clients, self._seconds, self._least = port, clients, seconds, least
        self._cold, self._begin, self._end, self._counted = clients, 0.0, 0.0, 0
        self._open, self._closed = 0, asyncio.Event()

    async def run(self) -> Measured:
        """Run until the last client has its last answer."""
        loop = asyncio.get_running_loop()
        for _ in range(self._clients):
            try:
                await loop.create_connection(lambda: _Client(self), "127.0.0.1", self._port)
            except OSError:
                self.broken += 1
                self.warm()
        if self._open:
            await asyncio.wait_for(self._closed.wait(), MOST_SECONDS)
        return Measured(self._end - self._begin or 1.0, np.array(self.waits), self.statuses, self.broken)

    def open(self) -> None:
        self._open += 1

    def close(self) -> None:
        self._open -= 1
        if not self._open:
            self._end = self._end or time.perf_counter()
            self._closed.set()

    def warm(self) -> None:
        """Note that a client has had its first answer, or will have none."""
        self._cold -= 1
        if not self._cold:
            self._begin = time.perf_counter()

    def note(self, status: int, begin: float, is_first: bool) -> None:
        """Note an answer."""
        self.statuses[status] += 1
        now = time.perf_counter()
        if is_first:
            self.warm()
        elif self._begin and not self.is_over:
            self._counted += 1
            if status == 200:
                self.waits.append(now - begin)
            if now - self._begin >= self._seconds and self._counted >= self._least:
                self.is_over, self._end = True, now


class _Client(asyncio.Protocol):
    def __init__(self, load: _Load) -> None:
        self._load, self._buffer, self._whole = load, bytearray(), 0
        self._is_first, self._waits = True, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._load.open()
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._whole:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            found = LENGTH.search(self._buffer, 0, end)
            self._whole = end + 4 + (int(found[1]) if found else 0)
        if len(self._buffer) < self._whole:
            return
        self._load.note(int(self._buffer[9:12]), self._begin, self._is_first)
        self._is_first = self._waits = False
        self._buffer.clear()
        self._whole = 0
        if self._load.is_over:
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if self._waits:
            self._load.broken += 1
            if self._is_first:
                self._load.warm()
        self._load.close()

    def _send(self) -> None:
        self._waits, self._begin = True, time.perf_counter()
        self._transport.write(next(self._load.requests))
