"""A session in a real browser, beside another server of the same machine."""

import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.ui.browser import Browser, find_chromium
from tests.ui.conftest import GOOD, make_runs
from tests.ui.page_tools import missing

from stroma import SQLiteStore

pytestmark = pytest.mark.slow


class Other:
    """Another server on this machine. ``cookies``: what browsers have sent to it."""

    def __init__(self) -> None:
        self.cookies: list[str | None] = []
        cookies = self.cookies

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                cookies.append(self.headers.get("cookie"))
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.end_headers()
                self.wfile.write(f"<title>other</title><iframe src='{Other.framed}'></iframe>".encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    framed = ""


@pytest.fixture
def other() -> Iterator[Other]:
    instance = Other()
    yield instance
    instance.server.shutdown()
    instance.server.server_close()


def test_the_session_stays_with_its_server(store: SQLiteStore, other: Other) -> None:
    """The printed address signs a browser in, pages and live updates work, and other ports get no cookie."""
    program = find_chromium()
    if program is None:
        missing("there is no Chromium here; name it with CHROMIUM=")
    assert program is not None
    make_runs(store, ("good", GOOD))
    command = [str(Path(sys.executable).with_name("stroma")), "ui", "--db", store.path, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = process.stdout.readline().strip()
        host, port = re.findall(r"http://([^:]+):(\d+)/", address)[0]
        with Browser(program) as browser:
            browser.goto(address)
            assert browser.eval("location.href") == f"http://{host}:{port}/"
            assert browser.eval("document.body.textContent.includes('good')")
            browser.until("document.getElementById('liveness').textContent === 'live'")
            # By an address that other servers have too, it leads to the same session.
            browser.goto(address.replace(host, "127.0.0.1"))
            assert browser.eval("location.hostname") == host
            Other.framed = f"http://{host}:{port}/"
            for name in ("127.0.0.1", "localhost", "other.localhost"):
                browser.goto(f"http://{name}:{other.port}/")
                assert browser.eval("document.title") == "other"
            assert len(other.cookies) >= 3
            assert set(other.cookies) == {None}
            assert browser.eval("document.querySelector('iframe').contentDocument") is None
    finally:
        process.terminate()
        process.communicate(timeout=60)
