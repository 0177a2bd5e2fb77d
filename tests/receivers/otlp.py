"""A receiver of OTLP over HTTP, in a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

from tests.kit import environment
from tests.receivers.processes import fetch_json


class OtlpReceiver:
    """Takes what OTLP/HTTP exporters send, and can be told to behave badly.

    Attributes:
        url: for `OTEL_EXPORTER_OTLP_ENDPOINT`; the signals are at `/v1/traces`, `/v1/metrics` and `/v1/logs`.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.receivers.otlp_process"]
        self._process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        ports = self._process.stdout.readline().split()
        assert len(ports) == 2, "the receiver ended at once; its error is above"
        self.port, control = int(ports[0]), int(ports[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._control = f"http://127.0.0.1:{control}"

    def _kept(self, signal: str, at_least: int, seconds: float) -> list[dict[str, Any]]:
        url = f"{self._control}/{signal}?at_least={at_least}&seconds={seconds}"
        result: list[dict[str, Any]] = fetch_json(url, seconds=seconds + 20)
        assert len(result) >= at_least, f"{len(result)} {signal} in {seconds} s, not {at_least}: {result}"
        return result

    def spans(self, at_least: int = 0, *, seconds: float = 20) -> list[dict[str, Any]]:
        """All spans so far, in the order of their arrival; waits for as many as are asked for."""
        return self._kept("spans", at_least, seconds)

    def span(self, name: str) -> dict[str, Any]:
        """The one span of that name."""
        (result,) = [span for span in self.spans() if span["name"] == name]
        return result

    def metrics(self, at_least: int = 0, *, seconds: float = 20) -> list[dict[str, Any]]:
        """The newest point of each cumulative series, and every delta point."""
        return self._kept("metrics", at_least, seconds)

    def points(self, name: str) -> list[dict[str, Any]]:
        """The points of one metric."""
        return [point for point in self.metrics() if point["name"] == name]

    def logs(self, at_least: int = 0, *, seconds: float = 20) -> list[dict[str, Any]]:
        return self._kept("logs", at_least, seconds)

    def posts(self, at_least: int = 0, *, seconds: float = 20) -> list[dict[str, Any]]:
        """Each post with its path, its size and the status that it was answered with."""
        return self._kept("posts", at_least, seconds)

    def _tell(self, **report: Any) -> None:
        fetch_json(self._control, report)

    def fail(self, posts: int, *, status: int = 503, retry_after: float | None = None) -> None:
        """Answer the next posts with this status, and keep nothing of them. `retry_after` is in seconds."""
        self._tell(fail=posts, status=status, retry_after=retry_after)

    def slow(self, seconds: float) -> None:
        """Answer each post only after this time, until told otherwise."""
        self._tell(delay=seconds)

    def refuse(self) -> None:
        """Refuse connections, and drop those that are open, until `listen()`."""
        self._tell(refuse=True)

    def listen(self) -> None:
        self._tell(refuse=False)

    def clear(self) -> None:
        """Forget what came, and behave well again."""
        self._tell(clear=True, refuse=False)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> OtlpReceiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
