"""What a request may be before anybody reads it: its host, its key, its size, the time that it takes to come.

Around the whole service, in plain ASGI, so that nothing of a request that is refused is ever parsed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from pairdr.errors import UsageError
from pairdr.serve.failures import ApiError, refuse_busy
from pairdr.serve.measuring import Meters
from pairdr.store_config import ServeConfig

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_DISCARDED = 2**27
"""Bytes of a refused body that are read, and kept nowhere."""
KEYS_VARIABLE = "PAIRDR_API_KEYS"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
SECURITY = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


class Keys:
    """The keys that open the service. Only hashes are held, and each is compared in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hash(key) for key in keys]

    @classmethod
    def read(cls, path: Path | None) -> Keys:
        """Read keys of a file, one a line, or of the environment, with commas between; none: the service is open.

        Raises:
            UsageError: there is no such file, no key in it or in the variable, or a key that no header could carry.
        """
        if path is None:
            given = os.environ.get(KEYS_VARIABLE)
            keys = [] if given is None else _require_keys(given.split(","), None)
            if given is not None and not keys:
                raise UsageError(f"There is no key in {KEYS_VARIABLE}.", remedy="Unset it for an open service.")
            return cls(keys)
        if not path.is_file():
            raise UsageError("There is no such file.", path=path, remedy="Check --api-keys.")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        keys = _require_keys([line for line in lines if not line.startswith("#")], path)
        if not keys:
            raise UsageError("There is no key in this file.", path=path, remedy="Write one a line.")
        return cls(keys)

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, key: object) -> bool:
        given = _hash(str(key))
        return sum(hmac.compare_digest(given, known) for known in self._hashes) > 0  # all are compared, whichever fits


class Guard:
    """Stands around the service: refuses, counts, and signs what leaves it.

    Outside is what looks at hosts and signs, inside what looks at keys and bodies. Between them is what lets pages of
    other sites ask, so that they can read what they are refused with.

    Args:
        app: the service.
        config: limits and names of hosts.
        keys: what opens it.
        open_paths: what needs no key.
        key_paths: prefixes of what needs one even where none is configured, and is off then.
        busy_paths: what is refused while `is_full`: a body that nobody can answer is not read.
        is_full: whether too much waits.
        meters: what is counted.
    """

    def __init__(
        self,
        app: Asgi,
        *,
        config: ServeConfig,
        keys: Keys,
        open_paths: frozenset[str],
        key_paths: tuple[str, ...],
        busy_paths: frozenset[str],
        is_full: Callable[[], bool],
        meters: Meters,
    ) -> None:
        self._app, self._config, self._keys, self._meters = app, config, keys, meters
        self._open_paths, self._key_paths = open_paths, key_paths
        self._busy_paths, self._is_full = busy_paths, is_full
        own = (*LOOPBACK, config.host, *config.hosts)
        self._hosts = {name_host(name).lower() for name in own} if is_loopback(config.host) or config.hosts else None
        self._inside: Any = self._admit
        if config.cors_origins:
            self._inside = CORSMiddleware(
                self._admit,
                allow_origins=config.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
                expose_headers=["Retry-After"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500
        is_sent = is_whole = False

        async def note() -> Message:
            nonlocal is_whole
            message = await receive()
            is_whole = not message.get("more_body", False)
            return message

        async def sign(message: Message) -> None:
            nonlocal status, is_sent
            if message["type"] == "http.response.start":
                status, is_sent = message["status"], True
                message = {**message, "headers": [*message["headers"], *SECURITY]}
            elif status == 413 and not is_whole:
                await send({**message, "more_body": True})  # all of the answer; its end closes the connection
                await self._discard_body(note)
                message = {"type": "http.response.body"}
            await send(message)

        try:
            self._require_host(scope)
            await self._inside(scope, note, sign)
        except ApiError as error:
            if is_sent:
                raise
            await send_error(sign, error)
        except asyncio.CancelledError:  # the time to drain is over
            if is_sent:
                raise
            await send_error(sign, ApiError(503, "stopping", "The service stops before this is answered."))
        finally:
            path = getattr(scope.get("route"), "path", None)  # as the service names it: what is asked has no end
            path = path or (scope["path"] if scope["path"] in self._busy_paths else "other")
            self._meters.note_request(path, status, time.perf_counter() - begin)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request to the service, or answer it."""
        try:
            self._require_key(scope)
            self._require_form(scope)
            if scope["path"] in self._busy_paths and self._is_full():
                raise refuse_busy()
        except ApiError as error:
            await send_error(send, error)
            return
        await self._app(scope, self._limit_body(receive), send)

    def _require_host(self, scope: Scope) -> None:
        """Refuse other names than ours: a page elsewhere can point a name of its own at this machine."""
        if self._hosts is None:
            return
        host = _read_header(scope, b"host").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name not in self._hosts:
            raise ApiError(421, "wrong_host", "This service is not called by that name; --hosts NAME allows it.")

    def _require_key(self, scope: Scope) -> None:
        path = scope["path"]
        if path in self._open_paths or scope["method"] == "OPTIONS":
            return
        if not self._keys:
            if path.startswith(self._key_paths):
                raise ApiError(403, "writes_off", "Writing is off: the service was started without --api-keys.")
            return
        scheme, _, key = _read_header(scope, b"authorization").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401, "missing_key", "Send a key as Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"}
            )
        if key.strip() not in self._keys:
            raise ApiError(403, "wrong_key", "This key is not one of the service's.")

    def _require_form(self, scope: Scope) -> None:
        """Refuse what is no JSON by its own word: a page elsewhere cannot send JSON without being asked first."""
        if scope["method"] == "POST" and not _read_header(scope, b"content-type").lower().startswith(
            "application/json"
        ):
            raise ApiError(415, "not_json", "Send JSON, with Content-Type: application/json.")
        length = _read_header(scope, b"content-length")
        if length.isdigit() and int(length) > self._config.most_bytes:
            raise self._exceed_size()

    def _limit_body(self, receive: Receive) -> Receive:
        """Return a `receive` that counts bytes and seconds of the body."""
        count, is_whole = 0, False
        deadline = asyncio.get_running_loop().time() + self._config.body_seconds

        async def limited() -> Message:
            nonlocal count, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(
                    408, "slow_body", f"The body did not come within {self._config.body_seconds:g} seconds."
                ) from error
            count += len(message.get("body", b""))
            if count > self._config.most_bytes:
                raise self._exceed_size()
            is_whole = not message.get("more_body", False)
            return message

        return limited

    async def _discard_body(self, receive: Receive) -> None:
        """Read what still comes of a body: a client that sends into a closed connection never sees its answer."""
        count, is_whole = 0, False
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.body_seconds):
                while not is_whole and count < MOST_DISCARDED:
                    message = await receive()
                    count += len(message.get("body", b""))
                    is_whole = not message.get("more_body", False)

    def _exceed_size(self) -> ApiError:
        return ApiError(413, "body_too_large", f"A body may have at most {self._config.most_bytes} bytes.")


async def send_error(send: Send, error: ApiError) -> None:
    """Send an error in its form; the connection is closed where the rest of a body would still come."""
    body = error.to_bytes()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def name_host(host: str) -> str:
    """Return an address as it stands in a URL: of IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1").strip() for key, value in scope["headers"] if key == name), "")


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _require_keys(given: Sequence[str], path: Path | None) -> list[str]:
    keys = [key.strip() for key in given if key.strip()]
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UsageError("A key has other than visible ASCII characters.", path=path, remedy="Choose another.")
    return keys
