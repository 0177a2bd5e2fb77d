"""examples/chat.py and the page of the docs in Chromium; web servers and workers are separate processes."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.docs.blocks import of_page
from tests.kit import environment
from tests.ui.browser import Browser, find_chromium

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "chat.py"
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
        self.folder = folder

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, *words], env=self.env, cwd=self.folder)
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
def test_a_chat_over_reloads_a_retry_a_death_and_an_approval(processes: Processes, browser: Browser) -> None:
    """An answer streams over a reload, a failed attempt and a killed worker, and the approval is clicked."""
    shown = "document.getElementById('answer').textContent.trim()"
    processes.start(str(EXAMPLE))
    url = processes.wait_for_server()
    worker = processes.start(str(EXAMPLE), "worker")
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
    processes.start(str(EXAMPLE), "worker")
    browser.until(shown, lambda text: len(text) < len("You asked: why is the"))
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


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_page_of_the_docs_shows_answers_and_failures(processes: Processes, browser: Browser) -> None:
    """docs/howto/stream-to-a-page.md: an answer, a reload, a failure, a refusal, an unknown address."""
    fail = '    if "fail" in question.text:\n        raise PermissionError("no words")\n    words ='
    text = (ROOT / "docs" / "howto" / "stream-to-a-page.md").read_text("utf-8").replace("    words =", fail)
    for block in of_page(text):
        if block.title:
            (processes.folder / block.title).write_text(block.text, "utf-8")
    processes.start("-m", "uvicorn", "web:app", "--port", str(processes.port))
    processes.start("-m", "stroma", "worker", "answers.py:answer", "--db", "answers.db")
    shown, note = (f"document.getElementById('{id}').textContent" for id in ("answer", "note"))
    url = processes.wait_for_server()

    def ask(text: str) -> None:
        browser.eval(f"document.querySelector('input').value = {text!r}")
        browser.eval("document.querySelector('button').click()")

    browser.goto(url)
    ask("why?")
    browser.until(shown, lambda text: text == "You asked: why?")
    address = browser.eval("location.href")
    browser.goto("about:blank")
    browser.goto(address)
    browser.until(shown, lambda text: text == "You asked: why?")
    ask("fail")
    browser.until(note, lambda text: text == "PARTIAL: no words")
    assert browser.eval(shown) == ""
    browser.eval("crypto.randomUUID = () => location.hash.slice(1)")
    ask("another question with the same id")
    browser.until(note, lambda text: text.startswith("Not accepted: 409"))
    browser.goto("about:blank")
    browser.goto(f"{url}#gone")
    browser.until(note, lambda text: text.startswith("No connection"))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["docs/howto/stream-to-a-page.md", "examples/chat.py"])
def test_what_is_not_an_id_is_the_mistake_of_the_client(program: str, tmp_path: Path) -> None:
    """A run id that no store takes, or a cursor that is none, is refused, and no error of the server."""
    if program.endswith(".md"):
        for block in of_page((ROOT / program).read_text("utf-8")):
            if block.title:
                (tmp_path / block.title).write_text(block.text, "utf-8")
        module, path = "web", "answers"
    else:
        (tmp_path / "chat.py").write_text((ROOT / program).read_text("utf-8"), "utf-8")
        module, path = "chat", "chats"
    code = f"""
        from starlette.testclient import TestClient
        from {module} import app
        web = TestClient(app)
        refused = web.put("/{path}/%00", json={{"text": "hello"}})
        web.put("/{path}/1", json={{"text": "hello"}}).raise_for_status()
        events = web.get("/{path}/1/events", headers={{"Last-Event-ID": "none"}})
        print(refused.status_code, events.status_code, refused.json()["detail"])
    """
    env = environment() | {"CHAT_DB": f"sqlite:///{tmp_path / 'chat.db'}"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout in (
        "409 400 run id '\\x00' must not contain NUL characters\n",
        "422 422 run id '\\x00' must not contain NUL characters\n",
    )
