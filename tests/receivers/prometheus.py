"""A Prometheus server that scrapes what tests expose, and promtool."""

from __future__ import annotations

import contextlib
import math
import pathlib
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.receivers.processes import Child, answers, fetch_json, free_port, need, wait_until

_CONFIG = """\
global:
  scrape_interval: 1s
  scrape_timeout: 1s
  evaluation_interval: 1s
rule_files: [{rules}]
scrape_configs:
  - job_name: stroma
    static_configs:
      - targets: [{targets}]
"""


class PrometheusServer:
    """Scrapes the targets (`host:port`, at `/metrics`) every second. The first scrape comes 5 s after the
    start, which no setting changes; tests that only want their registry scraped are quicker with the fixture
    `prometheus`.

    The test is skipped where there is no `prometheus`.
    """

    def __init__(self, targets: Sequence[str], *, rules: Sequence[pathlib.Path] = ()) -> None:
        program = need("prometheus", "prometheus")
        self._child = Child("prometheus")
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        config = self._child.home / "prometheus.yml"
        shown = ", ".join(repr(str(r)) for r in rules)
        config.write_text(_CONFIG.format(targets=", ".join(map(repr, targets)), rules=shown))
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={self._child.home / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        self._child.start(command, lambda: answers(f"{self.url}/-/ready"))

    def query(self, promql: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series of an instant query."""
        answer = fetch_json(f"{self.url}/api/v1/query", query=promql)
        assert answer["status"] == "success", answer
        result = answer["data"]["result"]
        if answer["data"]["resultType"] == "scalar":
            return [({}, float(result[1]))]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, promql: str) -> float:
        """The value of a query that gives one series."""
        ((_, value),) = self.query(promql)
        return value

    def wait_for(self, promql: str, expected: float, *, seconds: float = 20) -> None:
        """Poll until the query gives one series of this value."""

        def check() -> bool:
            result = self.query(promql)
            return len(result) == 1 and math.isclose(result[0][1], expected)

        try:
            wait_until(check, f"{promql} is {expected}", seconds=seconds)
        except AssertionError as exc:
            exc.add_note(f"it is {self.query(promql)}")
            raise

    def scraped(self, *, seconds: float = 20) -> None:
        """Wait until every target was scraped after this moment, so that its data can be queried."""
        request = time.time()
        query = 'min(timestamp(up{job="stroma"}) * (up{job="stroma"} == 1))'

        def check() -> bool:
            result = self.query(query)
            return bool(result) and result[0][1] > request

        wait_until(check, "the targets are scraped", seconds=seconds)

    def alerts(self) -> list[dict[str, Any]]:
        """The alerts that are pending or fire, of the rules that it was started with."""
        result: list[dict[str, Any]] = fetch_json(f"{self.url}/api/v1/alerts")["data"]["alerts"]
        return result

    def close(self) -> None:
        self._child.close()

    def __enter__(self) -> PrometheusServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Pages(ThreadingHTTPServer):
    daemon_threads = True
    registry: Any = None


class _Page(BaseHTTPRequestHandler):
    server: _Pages

    def log_message(self, format: str, *args: object) -> None:
        """A line per second would hide what a failed test prints."""

    def do_GET(self) -> None:
        from prometheus_client import generate_latest

        registry = self.server.registry
        body = b"" if registry is None else generate_latest(registry)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class SharedPrometheus(PrometheusServer):
    """A server for many tests, which costs each of them two scrapes instead of a start."""

    def __init__(self) -> None:
        self._pages = _Pages(("127.0.0.1", 0), _Page)
        threading.Thread(target=self._pages.serve_forever, daemon=True).start()
        try:
            super().__init__([f"127.0.0.1:{self._pages.server_address[1]}"])
        except BaseException:
            self._pages.server_close()
            raise

    @contextlib.contextmanager
    def exposing(self, registry: Any) -> Iterator[None]:
        """Have a registry scraped, and forgotten afterwards. Ask `scraped()` before a query. A range in a
        query reaches back into earlier tests, so give each test a pipeline name of its own."""
        self._pages.registry = registry
        try:
            yield
        finally:
            self._pages.registry = None
            self.scraped()  # Now its series are stale, and the next test does not see them.

    def close(self) -> None:
        super().close()
        self._pages.shutdown()
        self._pages.server_close()


def promtool(*arguments: str, text: str | None = None) -> str:
    """Run promtool, with `text` as its input; what it says is in the AssertionError if it finds a fault. The
    test is skipped where there is no promtool."""
    command = [need("promtool", "prometheus"), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, (
        f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout + done.stderr


def check_metrics(registry: Any) -> None:
    """What `promtool check metrics` says about a registry's page: names, units, types and help texts."""
    from prometheus_client import generate_latest

    promtool("check", "metrics", text=generate_latest(registry).decode())
