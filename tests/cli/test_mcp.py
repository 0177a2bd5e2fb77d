"""`stroma mcp`, asked by the client of the SDK."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp")
from mcp import Client, ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

from stroma.cli.commands.mcp import RunReader, make_server
from stroma.cli.redaction import load_redact
from stroma.cli.stores import Database

GOOD = '{"start": 1}'
HIDES = """
    from sums import *
    def hide(value):
        return {**value, "n": "hidden"} if isinstance(value, dict) and "n" in value else value
    pipeline = Pipeline("sums", [first, second, third], config=RunConfig(policy_map=quick, redact=hide))
    """


@pytest.fixture
def ask(stroma, inside, monkeypatch):
    """Ask a tool of the server of a store with a good run and a bad one; with ``redact``, by that pipeline's."""
    stroma.file("hides.py", HIDES)
    assert inside("run", "sums.py:pipeline", GOOD, "--run-id", "good", "--db", "r.db", "-q").code == 0
    breaks = {"SECOND": "raise ContractViolation('second', 'output', {}, ['no luck'])"}
    assert (
        inside("run", "sums.py:pipeline", GOOD, "--run-id", "bad", "--db", "r.db", "-q", env=breaks).code == 1
    )
    monkeypatch.chdir(stroma.home)

    def call(tool: str, *, redact: str | None = None, **arguments: Any) -> Any:
        server = make_server(RunReader(Database.from_option("r.db"), load_redact(redact)))

        async def main() -> Any:
            async with Client(server) as client:
                if tool == "":
                    return await client.list_tools()
                return await client.call_tool(tool, arguments)

        return asyncio.run(main())

    return call


def _data(result: Any) -> Any:
    assert not result.is_error, result
    return json.loads(result.content[0].text)


def test_the_tools_only_read(ask):
    """There are four tools; each says that it only reads, and what it is for."""
    tools = ask("").tools
    assert [tool.name for tool in tools] == ["list_runs", "explain_failure", "read_attempt", "compare_runs"]
    assert all(tool.annotations.read_only_hint and tool.description for tool in tools)


def test_an_agent_finds_out_what_went_wrong(ask):
    """Runs are listed, a failure is explained, an attempt is read and two runs are compared."""
    assert [run["run_id"] for run in _data(ask("list_runs"))["runs"]] == ["bad", "good"]
    assert [run["run_id"] for run in _data(ask("list_runs", status="failed"))["runs"]] == ["bad"]
    why = _data(ask("explain_failure", run="bad"))
    assert (why["status"], why["run"]["cause"]["node_id"]) == ("FAILED", "second")
    assert [(one["node_id"], one["reason"]) for one in why["failed_attempts"]] == [("second", "contract")]
    attempt = _data(ask("read_attempt", run="good", node="second"))
    assert (attempt["input"], attempt["output"], attempt["outcome"]) == ({"n": 2}, {"n": 4}, "success")
    differs = _data(ask("compare_runs", a="good", b="bad"))
    assert (differs["same"], [node["node_id"] for node in differs["nodes"]]) == (False, ["second", "third"])


def test_the_redaction_of_the_pipeline_applies(ask):
    """With --redact, states are shown as `show --redact` shows them."""
    attempt = _data(ask("read_attempt", run="good", node="second", redact="hides.py:pipeline"))
    assert (attempt["input"], attempt["output"]) == ({"n": "hidden"}, {"n": "hidden"})


def test_a_large_state_is_not_sent(ask, monkeypatch):
    """An output beyond the limit is named as too large, and its content stays out."""
    monkeypatch.setattr("stroma.cli.commands.mcp._MAX_BYTES", 1)
    attempt = _data(ask("read_attempt", run="good", node="second"))
    assert [list(attempt[state]) for state in ("input", "output")] == [["problem"], ["problem"]]


def test_large_differences_are_not_sent(ask, stroma, inside, monkeypatch):
    """Of values that differ beyond the limit a comparison names the size, of many changes and nodes the first and how many follow."""
    odd = {"SECOND": "state = Sum(n=10)"}
    assert (
        inside(
            "run", "sums.py:pipeline", '{"start": 5}', "--run-id", "odd", "--db", "r.db", "-q", env=odd
        ).code
        == 0
    )
    (change,) = _data(ask("compare_runs", a="good", b="odd"))["input"]
    assert (change["a"], change["b"]) == (1, 5)
    monkeypatch.setattr("stroma.cli.commands.mcp._MAX_BYTES", 0)
    monkeypatch.setattr("stroma.cli.commands.mcp._MAX_ATTEMPTS", 2)
    compared = _data(ask("compare_runs", a="good", b="odd"))
    assert "too large to show" in compared["input"][0]["a"]["problem"]
    assert len(compared["nodes"]) == 3
    assert compared["nodes"][-1] == {"omitted": "1 more nodes that differ"}
    monkeypatch.setattr("stroma.cli.commands.mcp._MAX_CHANGES", 0)
    assert _data(ask("compare_runs", a="good", b="odd"))["input"] == [{"omitted": "1 more changes"}]


@pytest.mark.slow
def test_the_command_speaks_over_stdio(ask, stroma):
    """`stroma mcp` as an agent starts it, a process of its own: it answers on stdout, and ends when its input does."""

    async def main() -> Any:
        program = str(Path(sys.executable).with_name("stroma"))
        server = StdioServerParameters(
            command=program, args=["mcp", "--db", "r.db"], cwd=stroma.home, env=stroma.env
        )
        async with stdio_client(server) as streams, ClientSession(*streams) as session:
            await session.initialize()
            tools = await session.list_tools()
            return tools, await session.call_tool("explain_failure", {"run": "last"})

    tools, why = asyncio.run(asyncio.wait_for(main(), 60))
    assert [tool.name for tool in tools.tools] == [
        "list_runs",
        "explain_failure",
        "read_attempt",
        "compare_runs",
    ]
    assert _data(why)["run"]["cause"]["node_id"] == "second"


def test_a_wrong_question_is_a_message(ask):
    """An unknown run or node is an error that says what there is; the server goes on."""
    unknown = ask("explain_failure", run="nope")
    assert unknown.is_error
    assert "nope" in unknown.content[0].text
    node = ask("read_attempt", run="good", node="nope")
    assert node.is_error
    assert "its nodes are: first, second, third" in node.content[0].text
