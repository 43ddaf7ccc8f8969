"""The wire: a head has to come in time, to be of some size, and to be HTTP; an answer has to be read in time."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pairdr.serve.failures import ApiError
from pairdr.serve.guard import SECURITY

MOST_HEAD = 65_536
"""Bytes of a request's line and headers."""
MOST_REST = 2**20
"""Bytes that are read, and kept nowhere, of a client that has its refusal and goes on sending."""
REST_SECONDS = 2.0
"""As long as that is done."""


class Protocol(HttpToolsProtocol):
    """A connection that is closed where a head does not come, or an answer is not read; uvicorn waits for ever."""

    head_seconds = 10.0
    answer_seconds = 30.0
    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None  # runs while something of an answer is unread
    _is_refused = False
    _rest = 0
    _is_head = False
    _is_trailer = False
    _has_told = False
    _head = 0  # bytes of the lines that were read, and of one that has not ended
    _unended = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # any byte that the client has not taken pauses writing
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._forget_timer()
        self._forget_reading()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give a client the time to read its answer."""
        super().pause_writing()
        self._reading = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on once all is read that was written."""
        self._forget_reading()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Read on; what belongs to no request under way has to become one in time."""
        if self._is_refused:
            self._rest += len(data)
            if self._rest > MOST_REST:
                self.transport.close()
            return
        self._unset_keepalive_if_required()
        rest: bytes | None = data
        while rest is not None:
            rest = self._feed(rest)
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()

    def on_message_begin(self) -> None:
        """Begin to read a head."""
        self._is_head = True
        self._begin_count()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Read on in the first line."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; one that follows a body is left alone."""
        self._count_head(len(name) + len(value))
        if not self._is_trailer:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """End the head."""
        self._is_head = False
        if not self._offers_upgrade():
            self._forget_timer()
            super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Read a chunk's size: after the last one more headers may follow."""
        self._is_trailer = True
        self._begin_count()

    def on_body(self, body: bytes) -> None:
        """Read on in a body."""
        self._is_trailer, self._has_told = False, True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._is_trailer = False
        if not self._offers_upgrade():
            super().on_message_complete()

    def _offers_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _feed(self, data: bytes) -> bytes | None:
        """Let the parser read; return what is to be read next, where it stopped at an offer of another protocol."""
        self._has_told = False
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as offer:
            if self._offers_upgrade():
                return self._ignore_upgrade() + data[offer.args[0] :]
        except HttpParserError:
            self._refuse(ApiError(400, "invalid_http", "This is no HTTP request."))
        if (self._is_head or self._is_trailer) and not self._has_told:
            self._unended += len(data)
            self._require_room()
        return None

    def _ignore_upgrade(self) -> bytes:
        """Return a request's head without its offer, to be read anew; Java and curl offer HTTP/2."""
        offers = (b"upgrade", b"http2-settings")
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()]
        for name, value in self.headers:
            if name == b"connection":
                kept = [part for part in value.split(b",") if part.strip().lower() not in offers]
                lines += [b"connection: " + b",".join(kept)] if kept else []
            elif name not in offers:
                lines.append(name + b": " + value)
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as that of every connection
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _begin_count(self) -> None:
        self._has_told, self._head, self._unended = True, 0, 0

    def _count_head(self, count: int) -> None:
        self._has_told, self._unended = True, 0
        self._head += count
        self._require_room()
        if self._head > MOST_HEAD:
            raise HttpParserError("The head is too large.")  # the parser stops, and nothing is served of it

    def _require_room(self) -> None:
        if self._head + self._unended > MOST_HEAD:
            self._refuse(ApiError(431, "head_too_large", f"A request's head may have at most {MOST_HEAD} bytes."))

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._end_wait)

    def _end_wait(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(ApiError(408, "slow_head", f"No request came within {self.head_seconds:g} seconds."))

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _refuse(self, error: ApiError) -> None:
        if self.transport.is_closing() or self._is_refused:
            return
        if self._is_trailer or (self.cycle is not None and not self.cycle.response_complete):
            self.transport.close()  # another answer is under way, or was given
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
        # What a client sends into a closed connection is answered with a reset, and it may never see the refusal.
        self.transport.write_eof()
        self._is_refused = True
        self._forget_timer()
        self._timer = self.loop.call_later(REST_SECONDS, self.transport.close)
