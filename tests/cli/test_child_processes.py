"""Processes that commands of ours begin, in a directory that others can write to."""

import os
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from tests.kit import undone_command

from stroma.cli import main as stroma_command
from stroma.demo.provider import Provider
from stroma.demo.show import Demo

HOSTILE = "open({path!r}, 'w').write('code of another user ran')\nraise SystemExit(1)\n"
PIPELINE = """
import os, pathlib
from pydantic import BaseModel
from stroma import FailurePolicy, NodeContract, Pipeline, RunConfig, stroma_node

here = pathlib.Path(__file__).parent

class State(BaseModel):
    n: int = 0

async def work(state):
    if not (here / "mended").exists():
        raise PermissionError("later")
    (here / "environment").write_text(repr(dict(os.environ)))
    return state

contract = NodeContract(node_id="work", input_schema=State, output_schema=State)
policies = {"AMBIGUOUS": FailurePolicy(max_retries=0)}
pipeline = Pipeline("p", [stroma_node("work", contract)(work)], config=RunConfig(policy_map=policies))
"""
TOKEN = "a-token-of-more-than-16"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A directory in which somebody has left modules with the names of ours and of what we import."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("click", "pydantic", "jinja2", "starlette", "rich", "sqlite3"):
        (folder / f"{name}.py").write_text(HOSTILE.format(path=str(tmp_path / f"PWNED-{name}")))
    return folder


def ran(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.glob("PWNED-*")]


@pytest.mark.slow
def test_resume_from_the_web_interface(tmp_path: Path, hostile: Path) -> None:
    """A resume that a page begins imports nothing from the current directory nor has the page's token."""
    (tmp_path / "flow.py").write_text(PIPELINE)
    target, db = f"{tmp_path / 'flow.py'}:pipeline", str(tmp_path / "runs.db")
    with undone_command():
        assert stroma_command(["run", target, "--run-id", "r", "--db", db, "-q"]) == 1
    (tmp_path / "mended").touch()
    program = [str(Path(sys.executable).with_name("stroma")), "ui", target, "--db", db, "--port", "0"]
    env = os.environ | {"STROMA_UI_TOKEN": TOKEN}
    process = subprocess.Popen(program, cwd=hostile, env=env, stdout=subprocess.PIPE, text=True)
    try:
        port = int(re.findall(r":(\d+)/", process.stdout.readline())[0])

        def ask(path: str, form: dict[str, str] | None = None) -> str:
            data = None if form is None else urllib.parse.urlencode(form).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
            request.add_header("authorization", f"Bearer {TOKEN}")
            with urllib.request.urlopen(request, timeout=60) as answer:
                return str(answer.read().decode())

        key = re.findall(r'action="/resume".*?name="key" value="([^"]+)"', ask("/run?id=r"))[0]
        events = urllib.request.Request(f"http://127.0.0.1:{port}/events?id=r")
        events.add_header("authorization", f"Bearer {TOKEN}")
        with urllib.request.urlopen(events, timeout=60) as lines:
            ask("/resume", {"id": "r", "key": key})
            while not (tmp_path / "environment").exists():
                assert next(line for line in lines if line.startswith(b"event:")), ran(tmp_path)
        environment = (tmp_path / "environment").read_text()
        assert "STROMA_DB" in environment
        assert TOKEN not in environment
        assert "STROMA_UI_TOKEN" not in environment
        assert ran(tmp_path) == []
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_commands_of_the_demo(
    tmp_path: Path, hostile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's own commands import nothing from the current directory."""
    monkeypatch.chdir(hostile)
    with Provider() as provider:
        assert Demo(tmp_path).run(provider, ["--version"]) == 0
    assert ran(tmp_path) == []


@pytest.mark.slow
def test_python_m_stroma(tmp_path: Path, hostile: Path) -> None:
    """`python -m stroma` imports nothing from the current directory that the command `stroma` would not."""
    command = [sys.executable, "-m", "stroma", "--version"]
    done = subprocess.run(command, cwd=hostile, capture_output=True, check=False, timeout=60)
    assert (done.returncode, ran(tmp_path)) == (0, []), done.stderr
