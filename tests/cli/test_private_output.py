"""Files that commands write and processes that they begin, where others can write too."""

import json
import os
import re
import stat
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.kit import undone_command

from stroma.cli import main as stroma_command
from stroma.demo.provider import Provider
from stroma.demo.show import Demo

PIPELINE = """
from typing import Any
from pydantic import BaseModel
from stroma import FailurePolicy, NodeContract, Pipeline, RunConfig, stroma_node

class State(BaseModel):
    v: Any = None

async def good(state):
    return {"v": "half an emoji \\ud83d"}

async def bad(state):
    raise ValueError("half \\ud83d")

def node(name, call):
    return stroma_node(name, NodeContract(node_id=name, input_schema=State, output_schema=State))(call)

config = RunConfig(policy_map={"AMBIGUOUS": FailurePolicy(max_retries=0)})
pipeline = Pipeline("p", [node("good", good)], config=config)
failing = Pipeline("q", [node("good", good), node("bad", bad)], config=config)
"""

Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in a directory with a pipeline and a store of two runs."""
    monkeypatch.chdir(tmp_path)
    old = os.umask(0o022)
    (tmp_path / "flow.py").write_text(PIPELINE, "utf-8")

    def run(*words: str) -> int:
        with undone_command():
            return stroma_command([*words, "--db", "runs.db"])

    assert run("run", "flow.py:pipeline", "{}", "--run-id", "good", "-q") == 0
    assert run("run", "flow.py:failing", "{}", "--run-id", "bad", "-q") == 1
    os.umask(old)
    return run


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_export_is_private(command: Command, tmp_path: Path) -> None:
    """`export -o` makes a file that only its owner can read, also in place of one that others could."""
    (tmp_path / "there.json").write_text("old")
    (tmp_path / "there.json").chmod(0o644)
    for name in ("new.json", "there.json"):
        assert command("export", "good", "-o", name) == 0
        assert mode(tmp_path / name) == 0o600
        assert json.loads((tmp_path / name).read_text())["schema"] == "stroma.export/1"
    assert not list(tmp_path.glob(".stroma-*"))


def test_an_export_follows_no_link(command: Command, tmp_path: Path, capsys: Any) -> None:
    """`export -o` writes through no link, which somebody else may have put there."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link.json").symlink_to("precious")
    (tmp_path / "dangling.json").symlink_to("nowhere")
    for name in ("link.json", "dangling.json"):
        assert command("export", "good", "-o", name) == 3
        assert "is a link" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_an_export_into_a_device(command: Command) -> None:
    """What is no file, such as /dev/null, is written to as it is."""
    assert command("export", "good", "-o", "/dev/null") == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(("run_id", "name"), [("good", "pipeline"), ("bad", "failing")])
def test_a_recorded_test_holds_halves_of_characters(
    command: Command, tmp_path: Path, run_id: str, name: str
) -> None:
    """`record --as-test` writes lone surrogates as recorded, into files that only their owner can read."""
    assert command("record", run_id, f"flow.py:{name}", "--as-test", "test_it.py") == 0
    data = json.loads((tmp_path / "test_it.run.json").read_text("utf-8"))
    assert "half an emoji \ud83d" in json.dumps(data, ensure_ascii=False)
    (tmp_path / "test_it.py").read_text("utf-8")
    assert mode(tmp_path / "test_it.py") == mode(tmp_path / "test_it.run.json") == 0o600


@pytest.mark.parametrize("bits", [0o622, 0o602, 0o620])
def test_a_store_writable_by_others_warns(command: Command, tmp_path: Path, capsys: Any, bits: int) -> None:
    """Commands, and doctor among its findings, warn of a file that other users can change."""
    assert command("runs") == 0
    assert "other users" not in capsys.readouterr().err
    (tmp_path / "runs.db").chmod(bits)
    assert command("runs") == 0
    assert "warning: runs.db can be written by other users" in capsys.readouterr().err
    assert command("doctor", "--json") == 0
    result = json.loads(capsys.readouterr().out)["checks"]
    assert [one["verdict"] for one in result if "other users" in one["message"]] == ["note"]


HOSTILE = "open({path!r}, 'w').write('code of another user ran')\nraise SystemExit(1)\n"
RESUMED_PIPELINE = """
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
    (tmp_path / "flow.py").write_text(RESUMED_PIPELINE)
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
