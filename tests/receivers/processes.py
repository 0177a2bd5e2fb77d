"""Shared by receivers: free ports, children that always end, waiting by polling, HTTP without proxies."""

import contextlib
import json
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

# A machine's proxy settings are not about loopback.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """A TCP port that nothing listened on a moment ago. For programs that cannot choose one."""
    with socket.socket() as result:
        result.bind(("127.0.0.1", 0))
        port: int = result.getsockname()[1]
        return port


def wait_until(check: Callable[[], bool], what: str) -> None:
    """Poll until `check` is true; `what` names it in the error."""
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline, f"after 20 s still not: {what}"
        time.sleep(0.02)


def fetch(url: str, **parameters: str) -> bytes:
    """The body of an answer; a failed request is an `OSError`, which is what urllib raises."""
    if parameters:
        url = f"{url}?{urllib.parse.urlencode(parameters)}"
    with _opener.open(url, timeout=20) as answer:
        body: bytes = answer.read()
        return body


def fetch_json(url: str, **parameters: str) -> Any:
    return json.loads(fetch(url, **parameters))


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        fetch(url)
        return True
    return False


def need(command: str, package: str) -> str:
    """The path of a command, else the test is skipped with a reason that names the package."""
    result = shutil.which(command)
    if result is None:
        pytest.skip(f"the command {command} is missing; on Debian and Ubuntu: apt-get install {package}")
    return result


class Child:
    """A program in a temporary directory of its own; its output is shown when it fails to start."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.home = pathlib.Path(tempfile.mkdtemp(prefix=f"stroma-{name}-"))
        self.log = self.home / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self, command: Sequence[str], ready: Callable[[], bool], env: Mapping[str, str] | None = None
    ) -> None:
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                list(command),
                cwd=self.home,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(lambda: self.process_ended() or ready(), f"{self.name} is ready")
            assert not self.process_ended(), f"{self.name} ended at once"
        except BaseException as exc:
            exc.add_note(self.log.read_text(errors="replace")[-3000:])
            self.close()
            raise

    def process_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)
