"""The server: a socket, signals, and the time to finish what is under way."""

from __future__ import annotations

import math
import socket
from contextlib import suppress
from types import FrameType

import uvicorn

from pairdr.errors import UsageError
from pairdr.progress import say
from pairdr.serve.guard import Asgi, Keys, is_loopback
from pairdr.serve.service import Service
from pairdr.serve.wire import Protocol
from pairdr.store_config import ServeConfig


def serve_app(app: Asgi, service: Service, keys: Keys, config: ServeConfig) -> None:
    """Answer requests until SIGTERM or Ctrl-C, and then finish those that are under way.

    Raises:
        UsageError: the address cannot be listened on.
    """
    listener = listen(config)
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    if not is_loopback(host) and not keys:
        say("pairdr: this service is open to everybody who reaches it; --api-keys FILE asks for a key")
    say(f"pairdr: http://{name}:{port}  (Ctrl-C ends it)")
    with suppress(KeyboardInterrupt):  # it has ended as it should
        make_server(app, service).run(sockets=[listener])


def make_server(app: Asgi, service: Service) -> uvicorn.Server:
    """Return what serves the application on a socket, by the options of the service."""
    config = service.config
    protocol = type("TimedProtocol", (Protocol,), {"head_seconds": config.body_seconds})
    return _Server(
        uvicorn.Config(
            app,
            http=protocol,
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


def listen(config: ServeConfig) -> socket.socket:
    """Return the socket of an address.

    Raises:
        UsageError: it cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # Named in full: of a socket without its protocol asyncio does not know that it is TCP, and leaves out TCP_NODELAY.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise UsageError(
            f"{config.host}:{config.port} cannot be listened on: {error.strerror or error}.",
            remedy="Choose another --host or --port; --port 0 takes a free one.",
        ) from error
    listener.listen(2048)
    listener.set_inheritable(True)
    return listener
