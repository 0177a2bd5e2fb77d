"""What a user's own mypy says of nodes; `tests/typing` has the rest, under `./dev check`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

USERS_FILE = """\
from typing import Any
from pydantic import BaseModel
from stroma import NodeContract, StromaRunner, stroma_node

class Query(BaseModel):
    text: str

class Hits(BaseModel):
    urls: list[str]

runner = StromaRunner.quick()
contract = NodeContract(node_id="marked", input_schema=Query, output_schema=Hits)

@runner.node("good", input=Query, output=Hits)
async def good(state: Query) -> Hits:
    return Hits(urls=[state.text])

@runner.node("good dict", input=Query, output=Hits)
async def good_dict(state: Query) -> dict[str, Any]:
    return {"urls": []}

@stroma_node("marked", contract)
async def good_marked(state: Query) -> Hits:
    return Hits(urls=[])

@runner.node("bad input", input=Query, output=Hits)  # wrong: the node takes Hits
async def bad_input(state: Hits) -> Hits:
    return state

@runner.node("bad output", input=Query, output=Hits)  # wrong: the node gives Query
async def bad_output(state: Query) -> Query:
    return state

@stroma_node("marked", contract)  # wrong: the node gives Query
async def bad_marked(state: Query) -> Query:
    return state
"""


@pytest.mark.nightly
def test_a_node_typed_for_the_wrong_model_is_an_error(tmp_path: Path) -> None:
    """mypy as a user has it, without our settings and plugin, finds a node typed for the wrong model."""
    file = tmp_path / "users_file.py"
    file.write_text(USERS_FILE)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", file.name]
    settings = {"MYPYPATH": str(SOURCE), "MYPY_CACHE_DIR": str(tmp_path / "cache"), "NO_COLOR": "1"}
    environment = os.environ | settings
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    result = re.findall(r"^users_file\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    lines = enumerate(USERS_FILE.splitlines(), 1)
    expected = [(str(number), "arg-type") for number, line in lines if "# wrong" in line]
    assert len(expected) == 3
    assert result == expected, done.stdout + done.stderr
    assert done.returncode == 1
