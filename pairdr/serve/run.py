"""The server: a socket, signals, and the time to finish what is under way."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn

from pairdr.errors import UsageError
from pairdr.progress import say
from pairdr.serve.guard import Asgi, Keys, is_loopback, name_host
from pairdr.serve.service import Service
from pairdr.serve.wire import Protocol
from pairdr.store_config import ServeConfig


def serve_app(app: Asgi, service: Service, keys: Keys, listener: socket.socket) -> None:
    """Answer requests on a bound socket until SIGTERM or Ctrl-C, and then finish those that are under way.

    Raises:
        UsageError: another has begun to listen there.
    """
    with _explain_address(service.config):
        listener.listen(2048)
    host, port = listener.getsockname()[:2]
    if not is_loopback(host) and not keys:
        say("pairdr: this service is open to everybody who reaches it; --api-keys FILE asks for a key")
    say(f"pairdr: http://{name_host(host)}:{port}  (Ctrl-C ends it)")
    with suppress(KeyboardInterrupt):  # it has ended as it should
        make_server(app, service).run(sockets=[listener])


def make_server(app: Asgi, service: Service) -> uvicorn.Server:
    """Return what serves the application on a socket, by the options of the service."""
    config = service.config

    class TimedProtocol(Protocol):
        head_seconds = config.body_seconds
        answer_seconds = config.request_seconds

    return _Server(
        uvicorn.Config(
            app,
            http=TimedProtocol,
            ws="none",
            access_log=False,  # questions are nobody's business
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(config.drain_seconds),
            lifespan="on",
        ),
        service,
    )


class _Server(uvicorn.Server):
    """Says at /ready that it is stopping, from the signal on."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        super().handle_exit(sig, frame)


def bind_address(config: ServeConfig) -> socket.socket:
    """Return a socket that has the address, and takes no connection yet.

    Raises:
        UsageError: it cannot be had.
    """
    if not config.host.strip():
        raise UsageError("--host is empty.", remedy="0.0.0.0 listens to every machine that reaches this one.")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # Named in full: of a socket without its protocol asyncio does not know that it is TCP, and leaves out TCP_NODELAY.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        with _explain_address(config):
            listener.bind((config.host, config.port))
    except UsageError:
        listener.close()
        raise
    return listener


@contextmanager
def _explain_address(config: ServeConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{config.host}:{config.port} cannot be listened on: {error.strerror or error}.",
            remedy="Choose another --host or --port; --port 0 takes a free one.",
        ) from error
