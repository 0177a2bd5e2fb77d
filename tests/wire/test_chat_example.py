"""examples/chat.py in Chromium: its web server and its worker are processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.ui.browser import Browser, find_chromium

EXAMPLE = Path(__file__).parents[2] / "examples" / "chat.py"
TEXT = "You asked: why is the sky blue? Here is what I know about it."


@pytest.fixture
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("Chromium is not installed")
    with Browser(program) as browser:
        yield browser


class Processes:
    """The web server, and one worker after another."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        database = f"sqlite:///{folder / 'chat.db'}"
        self.env = {**os.environ, "CHAT_DB": database, "CHAT_PORT": str(self.port), "CHAT_PAUSE": "0.25"}
        self.started: list[subprocess.Popen[bytes]] = []
        self.start()

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, str(EXAMPLE), *words], env=self.env)
        self.started.append(process)
        return process

    def wait_for_server(self) -> str:
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 5).close()
            except OSError:
                continue
            return f"http://127.0.0.1:{self.port}/"

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    yield processes
    processes.end()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_chat_over_reloads_a_retry_a_dead_worker_and_an_approval(
    processes: Processes, browser: Browser
) -> None:
    """The answer streams, a reload in mid-sentence shows it again, a failed attempt and a killed worker
    discard their half, the approval is clicked, and the end is seen."""
    shown = "document.getElementById('answer').textContent.trim()"
    url = processes.wait_for_server()
    worker = processes.start("worker")
    browser.goto(url)
    browser.eval("document.querySelector('form button').click()")
    browser.until(shown, lambda text: text == "You asked: why is")  # The half of the first attempt.
    address = browser.eval("location.href")
    browser.until(shown, lambda text: text in ("", "You"))
    browser.until(shown, lambda text: text == "You asked: why")
    browser.goto("about:blank")
    browser.goto(address)
    browser.until(shown, lambda text: text.startswith("You asked: why is the"))
    os.kill(worker.pid, signal.SIGKILL)
    processes.start("worker")
    browser.until(shown, lambda text: text == "You")
    seen: list[str] = []

    def is_whole(text: str) -> bool:
        seen.append(text)
        return text == TEXT

    browser.until(shown, is_whole)
    assert [text for text in seen if not TEXT.startswith(text)] == []
    browser.until("!document.getElementById('ask').hidden", bool)
    browser.eval("document.getElementById('send').click()")
    browser.until("document.getElementById('end').textContent", lambda text: text == "It was sent.")
    assert browser.eval(shown) == TEXT
