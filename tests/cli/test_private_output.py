"""Files that commands write, and who may write to the file of a store."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.kit import undone_command

from stroma.cli import main as stroma_command

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
