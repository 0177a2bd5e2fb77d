"""A Prometheus server that scrapes what tests expose, and promtool."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import generate_latest
from tests.receivers.processes import Child, answers, fetch_json, free_port, need, wait_until

_CONFIG = """\
global:
  scrape_interval: 1s
  scrape_timeout: 1s
  evaluation_interval: 1s
scrape_configs:
  - job_name: stroma
    static_configs:
      - targets: ["{target}"]
"""


class _Pages(ThreadingHTTPServer):
    daemon_threads = True
    registry: Any = None


class _Page(BaseHTTPRequestHandler):
    server: _Pages

    def log_message(self, format: str, *args: object) -> None:
        """A line per second would hide what a failed test prints."""

    def do_GET(self) -> None:
        registry = self.server.registry
        body = b"" if registry is None else generate_latest(registry)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class SharedPrometheus:
    """A server for many tests, which scrapes what one of them exposes every second.

    Its first scrape comes 5 s after the start, which no setting changes. The test is skipped where there is
    no `prometheus`.
    """

    def __init__(self) -> None:
        program = need("prometheus", "prometheus")
        self._pages = _Pages(("127.0.0.1", 0), _Page)
        threading.Thread(target=self._pages.serve_forever, daemon=True).start()
        self._child = Child("prometheus")
        self._url = f"http://127.0.0.1:{(port := free_port())}"
        config = self._child.home / "prometheus.yml"
        config.write_text(_CONFIG.format(target=f"127.0.0.1:{self._pages.server_address[1]}"))
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={self._child.home / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        self._child.start(command, lambda: answers(f"{self._url}/-/ready"))

    def query(self, promql: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series of an instant query."""
        answer = fetch_json(f"{self._url}/api/v1/query", query=promql)
        assert answer["status"] == "success", answer
        result = answer["data"]["result"]
        if answer["data"]["resultType"] == "scalar":
            return [({}, float(result[1]))]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, promql: str) -> float:
        """The value of a query that gives one series."""
        ((_, value),) = self.query(promql)
        return value

    def scraped(self) -> None:
        """Wait until the registry was scraped after this moment, so that its data can be queried."""
        request = time.time()
        query = 'min(timestamp(up{job="stroma"}) * (up{job="stroma"} == 1))'

        def check() -> bool:
            result = self.query(query)
            return bool(result) and result[0][1] > request

        wait_until(check, "the registry is scraped")

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
        self._child.close()
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
    promtool("check", "metrics", text=generate_latest(registry).decode())
