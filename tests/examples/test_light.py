"""The examples that the main environment can run: one command each, no key, no network, and their output."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text("utf-8")


def run(name: str, *arguments: str, folder: Path) -> str:
    """What the example prints; it leaves nothing in the current folder and only logs on stderr."""
    env = {**os.environ, "HOME": str(folder), "NO_COLOR": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout


def steady(text: str) -> list[str]:
    """Its lines without what differs from run to run: times and how far a killed process came."""
    text = re.sub(r"\d+\.\d\d s", "N s", text)
    text = re.sub(r"\d+ of 10000 done|\d+ of them|\$0\.0\d\d\d", "N", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def documented_output(name: str) -> str:
    """The output of the example on the page that lists them."""
    result = re.search(rf"^## .*{re.escape(name)}.*?^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert result is not None, f"examples/README.md does not show what {name} prints"
    return result[1]


@pytest.mark.parametrize("name", ["document_pipeline.py", "agent_loop.py", "evaluate_models.py", "batch.py"])
def test_an_example_prints_what_its_page_says(name: str, tmp_path: Path) -> None:
    """Word for word, but for times and chance."""
    assert steady(run(name, folder=tmp_path)) == steady(documented_output(name))


def test_the_chat_says_why_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that the chat does not accept is answered with a status and a reason, not a traceback."""
    monkeypatch.setenv("CHAT_DB", str(tmp_path / "chat.db"))
    client = TestClient(runpy.run_path(str(EXAMPLES / "chat.py"))["app"])
    reply = {"question": "0.!wait#0:1", "send": True}
    assert client.put("/chats/r", json={"text": "why?"}).status_code == 202
    for path, data, status, reason in (
        ("/chats/r", {}, 422, "Field required"),
        ("/chats/r", {"text": "how?"}, 409, "run 'r' already exists"),
        ("/chats/r/decision", reply, 409, "has no question"),
        ("/chats/x/decision", reply, 404, "no run 'x'"),
    ):
        answer = client.put(path, json=data)
        assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text
    assert client.get("/chats/x/events").status_code == 404


def test_every_example_is_listed() -> None:
    """The page has them all, and nothing that is not there."""
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"\(([\w.]+\.(?:py|ipynb))\)", README)) == there


def test_the_requirements_of_the_others_are_pinned_with_hashes() -> None:
    """What `./dev test --examples` installs was looked at and comes from the machine's package index."""
    text = (Path(__file__).parent / "newest.txt").read_text()
    assert "://" not in text
    pinned = re.findall(r"^([\w.-]+)==\S+.*?((?: \\\n    --hash=\S+)*)$", text, re.MULTILINE)
    assert {"fastapi", "nbclient", "wordllama", "pydantic"} <= {name for name, _ in pinned}
    assert [name for name, hashes in pinned if "--hash=sha256:" not in hashes] == []
