"""A connection to PostgreSQL: opened again where it was lost, with the server's errors as ours, pgvector required."""

from __future__ import annotations

import os
import re
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pairdr.errors import MissingExtraError, ServerError
from pairdr.indexes.address import Address
from pairdr.indexes.engine import MovedError

if TYPE_CHECKING:
    from psycopg import Connection

_EXTENSION = "vector"
_LEAST_VERSION = (0, 8)  # iterative scans
_WAIT = 5  # seconds for a connection
_ROUTE = "postgresql://?keepalives_idle=30&keepalives_interval=10&keepalives_count=3&tcp_user_timeout=60000"
"""A route that is lost is noticed after a minute, where a URL says nothing else."""
_CAUSES = (
    (
        "28",
        r"password|authentication|no pg_hba.conf entry|role .* does not exist",
        "The server refuses this user or password",
        "Look at the URL, PGUSER and PGPASSWORD",
    ),
    ("3D000", r"database .* does not exist", "There is no such database", "Look at the URL, or create it"),
    (
        "53300",
        r"too many (clients|connections)|connection slots are reserved",
        "The server has no connection left",
        "End some, or raise max_connections",
    ),
    (
        "42501",
        r"permission denied",
        "The server does not let this user do that",
        "A load needs CREATE on the schema, a search SELECT on both tables",
    ),
    (
        "53",
        r"No space left",
        "The server is full",
        "Free some space there, and run it again: it goes on where it stopped",
    ),
)
"""How a state begins, or words where there is none, as while a connection is made; what to say, and the way out."""


class PostgresServer:
    """A server with pgvector, used by one thread at a time.

    Raises:
        ServerError: it is absent, refuses, or has no pgvector that is new enough.
        MissingExtraError: psycopg is not installed.
    """

    def __init__(self, address: Address) -> None:
        try:
            import psycopg
        except ImportError as error:
            raise MissingExtraError("psycopg", "pgvector") from error
        self._psycopg, self._address, self.place = psycopg, address, address.shown
        self._lock = threading.RLock()
        self._open: Connection[Any] | None = None
        with self.ask(within=_WAIT) as connection:
            self._require_extension(connection)

    @contextmanager
    def ask(self, within: float | None = None) -> Iterator[Connection[Any]]:
        """Yield a connection that lives, and turn what the server says into errors of ours.

        Args:
            within: seconds for all that the block asks, past which the server counts as away.
        """
        with self._lock:
            try:
                if self._open is None or self._open.closed:
                    self._open = self._connect()
                with _limit(self._open, within):
                    yield self._open
            except self._psycopg.Error as error:
                raise self._explain(error) from error

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._open is not None:
                self._open.close()
            self._open = None

    def _require_extension(self, connection: Connection[Any]) -> None:
        query = "SELECT extversion FROM pg_extension WHERE extname = %s"
        row = connection.execute(query, (_EXTENSION,)).fetchone()
        if row is None:
            try:
                connection.execute(f'CREATE EXTENSION IF NOT EXISTS "{_EXTENSION}"')
            except self._psycopg.Error as error:
                raise ServerError(
                    f"There is no pgvector here: {_first_line(error)}.",
                    path=self.place,
                    remedy="Install it on the server, and let a superuser run CREATE EXTENSION vector here.",
                ) from error
            row = connection.execute(query, (_EXTENSION,)).fetchone()
        version = "" if row is None else str(row[0])
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _LEAST_VERSION:
            raise ServerError(
                f"pgvector {version} is too old: iterative scans came with {'.'.join(map(str, _LEAST_VERSION))}.",
                path=self.place,
                remedy="Install a newer one, and run ALTER EXTENSION vector UPDATE.",
            )

    def _connect(self) -> Connection[Any]:
        from psycopg.conninfo import conninfo_to_dict, make_conninfo

        given: Any = conninfo_to_dict(self._address.target)
        target = make_conninfo(_ROUTE, **given | {"connect_timeout": _WAIT, "application_name": "pairdr"})
        # Prepared statements do not outlive a transaction behind a pooler.
        connection = self._psycopg.connect(target, autocommit=True, prepare_threshold=None)
        weakref.finalize(self, connection.close)  # who forgets us leaves no connection
        return connection

    def _explain(self, error: Any) -> Exception:
        said, state = _first_line(error), error.sqlstate or ""
        said, broken = self._address.hide(said), self._open is None or self._open.broken
        if broken:
            self._open = None
        known = [
            (what, way)
            for begin, words, what, way in _CAUSES
            if (state.startswith(begin) if state else re.search(words, said))
        ]
        if state == "42P01":
            return MovedError("The load is gone.", path=self.place, remedy="Run pairdr index again.")
        if isinstance(error, self._psycopg.ProgrammingError) and not state:
            what, remedy = "This URL cannot be used", "Write postgresql://USER@HOST:5432/DATABASE?name=NAME"
        elif known:
            what, remedy = known[0]
        elif broken or state[:2] in ("08", "57") or not state:
            what, remedy = "The server does not answer", "Look whether it runs, and at host, port and database"
        else:
            what, remedy = "The server refuses", "Look into its log"
        return ServerError(f"{what}: {said}.", path=self.place, remedy=f"{remedy}.")


@contextmanager
def _limit(connection: Connection[Any], seconds: float | None) -> Iterator[None]:
    """Cut a connection where the block takes longer: a server that is frozen or out of reach says nothing."""
    if seconds is None:
        yield
        return
    with socket.socket(fileno=os.dup(connection.fileno())) as line:
        timer = threading.Timer(seconds, _shut, [line])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def _shut(line: socket.socket) -> None:
    with suppress(OSError):  # the other side may have
        line.shutdown(socket.SHUT_RDWR)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
