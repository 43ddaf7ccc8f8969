"""What comes before anything is a request: a head has to come in time, to be of some size, and to be HTTP."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pairdr.serve.failures import ApiError
from pairdr.serve.guard import SECURITY

MOST_HEAD = 65_536
"""Bytes of a request's line and headers."""


class Protocol(HttpToolsProtocol):
    """A connection that is closed where a head does not come; uvicorn itself waits for one, and reads it, for ever."""

    head_seconds = 10.0
    _timer: asyncio.TimerHandle | None = None
    _is_head = False
    _head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._forget_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; what belongs to no request under way has to become one in time."""
        super().data_received(data)
        if self._is_head:
            self._head += len(data)
            if self._head > MOST_HEAD:
                self._refuse(ApiError(431, "head_too_large", f"A request's head may have at most {MOST_HEAD} bytes."))
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()

    def on_message_begin(self) -> None:
        """Begin to read a head."""
        self._is_head, self._head = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """End it."""
        self._is_head = False
        self._forget_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(ApiError(400, "invalid_http", "This is no HTTP request."))

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._end_wait)

    def _end_wait(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(ApiError(408, "slow_head", f"No request came within {self.head_seconds:g} seconds."))

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        body = error.to_bytes()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            *SECURITY,
        ]
        line = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n".encode()
        self.transport.write(line + b"".join(b"%s: %s\r\n" % header for header in headers) + b"\r\n" + body)
        self.transport.close()
