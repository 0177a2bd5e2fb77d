"""Datadog's own test agent, and a socket for DogStatsD."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
from typing import Any, NamedTuple

from tests.kit import environment
from tests.receivers.processes import Child, answers, fetch, fetch_json, free_port, wait_until

_ROOT = pathlib.Path(__file__).parents[2]
_REQUIREMENTS = pathlib.Path(__file__).with_name("datadog_agent.txt")


def agent_program() -> pathlib.Path:
    """The agent, installed on first use in an environment of its own below the one that the tests run in."""
    home = pathlib.Path(sys.prefix) / "datadog-agent"
    program = home / "bin" / "ddapm-test-agent"
    stamp = home / "stroma-stamp"
    wanted = hashlib.sha256(_REQUIREMENTS.read_bytes()).hexdigest()
    # Each pytest-xdist worker wants it.
    with open(f"{home}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            _install(home)
            stamp.write_text(wanted)
    return program


def _install(home: pathlib.Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    env = _install_environ()
    uv = pathlib.Path(sys.prefix) / "bin" / "uv"
    python = str(home / "bin" / "python")
    options = ["--require-hashes", "--no-deps", "--only-binary=:all:", "--python", python]
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, home],
        [uv, "pip", "install", "--quiet", *options, "-r", _REQUIREMENTS],
    ):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"could not install Datadog's test agent: {done.stderr}"


def _install_environ() -> dict[str, str]:
    """The index and certificates that ./dev uses, which knows where a machine may name them."""
    loader = importlib.machinery.SourceFileLoader("dev", str(_ROOT / "dev"))
    spec = importlib.util.spec_from_loader("dev", loader)
    assert spec is not None
    dev = importlib.util.module_from_spec(spec)
    loader.exec_module(dev)
    dev.VENV, dev.BIN, dev.PYTHON = sys.prefix, os.path.join(sys.prefix, "bin"), sys.executable
    env: dict[str, str] = dev.install_environ()
    return env


class DatadogAgent:
    """The agent on a port of its own.

    Attributes:
        url: for `DD_TRACE_AGENT_URL`.
        otlp_url: for OTLP over HTTP; traces that come there are asked for there.
    """

    def __init__(self) -> None:
        program = agent_program()
        self._child = Child("datadog-agent")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # It listens for OTLP too, without being asked.
        self.otlp_url = f"http://127.0.0.1:{free_port()}"
        ports = ["--port", str(self.port), "--otlp-http-port", self.otlp_url.rpartition(":")[2]]
        ports += ["--otlp-grpc-port", str(free_port())]
        # Nothing is passed on to the real service.
        options = ["--host", "127.0.0.1", "--disable-llmobs-data-forwarding"]
        env = {key: value for key, value in os.environ.items() if not key.startswith(("DD_", "PYTHON"))}
        self._child.start([str(program), *ports, *options], lambda: answers(f"{self.url}/info"), env)

    def traces(self, at_least: int) -> list[list[dict[str, Any]]]:
        """All traces since `clear()` as lists of spans as ddtrace sent them; waits for so many."""
        traces: list[list[dict[str, Any]]] = []

        def check() -> bool:
            traces[:] = fetch_json(f"{self.url}/test/session/traces")
            return len(traces) >= at_least

        wait_until(check, f"{at_least} traces at the agent")
        return traces

    def clear(self) -> None:
        fetch(f"{self.url}/test/session/clear")

    def environment(self, **variables: str) -> dict[str, str]:
        """For a child process whose ddtrace shall send here, and nothing but traces."""
        own = {key: value for key, value in environment().items() if not key.startswith("DD_")}
        return {
            **own,
            "DD_TRACE_AGENT_URL": self.url,
            "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
            "DD_REMOTE_CONFIGURATION_ENABLED": "false",
            "DD_CRASHTRACKING_ENABLED": "false",
            **variables,
        }

    def __enter__(self) -> DatadogAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()


class Statistic(NamedTuple):
    """One line of DogStatsD: `name:value|type|#key:value,...`."""

    name: str
    value: str
    type: str
    tags: dict[str, str]


class StatsdSocket:
    """A bound UDP socket. `statistics()` returns everything that was sent to it before."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 23)
        self._socket.bind(("127.0.0.1", 0))
        self.host, self.port = self._socket.getsockname()
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._marks = 0
        self._mark = os.urandom(16)
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        # A thread, so that the kernel's buffer does not run over while the test is busy.
        while data := self._socket.recv(65536):
            with self._changed:
                if data == self._mark:
                    self._marks += 1
                else:
                    self._lines += data.decode().splitlines()
                self._changed.notify_all()
        self._socket.close()

    def _send(self, data: bytes) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(data, (self.host, self.port))

    def statistics(self) -> list[Statistic]:
        """All lines so far, taken apart. A line of several values (`d` packs them) becomes several."""
        with self._changed:
            due = self._marks + 1
            # Datagrams on loopback arrive in order: what was sent before this one is in when it is.
            self._send(self._mark)
            assert self._changed.wait_for(lambda: self._marks >= due, timeout=20), "its thread is stuck"
            return [result for line in self._lines for result in _parse(line)]

    def __enter__(self) -> StatsdSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._send(b"")  # An empty datagram ends the thread, which closes the socket.


def _parse(line: str) -> list[Statistic]:
    head, *parts = line.split("|")
    name, *values = head.split(":")
    tags = [part[1:].split(",") for part in parts[1:] if part.startswith("#")]
    pairs = dict(tag.partition(":")[::2] for tag in (tags[0] if tags else []))
    return [Statistic(name, value, parts[0], pairs) for value in values]
