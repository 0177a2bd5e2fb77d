"""`stroma mcp`, asked by the client of the SDK."""

import asyncio
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp")
from mcp import Client, ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from pydantic_core import to_json

from stroma.cli.commands.mcp import RunReader, bound_answer, make_server
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
def ask(stroma, inside, monkeypatch, ran):
    """Ask a tool of a server with a good and a bad run; with ``redact``, by that pipeline's."""
    stroma.file("hides.py", HIDES)
    ran("good", "--db", "r.db")
    breaks = {"SECOND": "raise ContractViolation('second', 'output', {}, ['no luck'])"}
    done = inside("run", "sums.py:pipeline", GOOD, "--run-id", "bad", "--db", "r.db", "-q", env=breaks)
    assert done.code == 1
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
    monkeypatch.setattr("stroma.cli.commands.mcp.MAX_ANSWER_BYTES", 1)
    attempt = _data(ask("read_attempt", run="good", node="second"))
    assert [list(attempt[state]) for state in ("input", "output")] == [["problem"], ["problem"]]


ODD = """
    from typing import Any
    from pydantic import BaseModel
    from stroma import Pipeline, StromaRunner
    class Value(BaseModel):
        v: Any = None
    class Number(BaseModel):
        v: int
    policies = {"AMBIGUOUS": {"max_retries": 3, "backoff_seconds": 0}}
    runner = StromaRunner.quick(keep_rejected="full", policy_map=policies)
    @runner.node("half", input=Value, output=Value)
    async def half(state):
        return {"v": {"half \\ud83d": ["half \\ud83d", float("nan")]}}
    @runner.node("strict", input=Value, output=Number)
    async def strict(state):
        return {"v": "z" * 3_000_000}
    @runner.node("speaks", input=Value, output=Value)
    async def speaks(state):
        raise ValueError("half \\ud83d" + "m" * 2_000_000)
    @runner.node("wide", input=Value, output=Value)
    async def wide(state):
        return {"v": {f"key {n}": n for n in range(100_000)}}
    ok = Pipeline("ok", [half])
    rejected = Pipeline("rejected", [half, strict])
    message = Pipeline("message", [half, speaks])
    many = Pipeline("many", [wide, half])
    """
QUESTIONS = [
    ("list_runs", {}),
    *[("explain_failure", {"run": run}) for run in ("rejected", "message")],
    *[
        ("read_attempt", {"run": run, "node": node})
        for run, node in [("ok", "half"), ("rejected", "strict"), ("message", "speaks"), ("many", "wide")]
    ],
    *[("compare_runs", {"a": "ok", "b": run}) for run in ("rejected", "message", "many")],
]


def test_no_answer_floods_an_agent(ask, stroma, inside):
    """Every answer has at most 64 KiB and is complete JSON, whatever text, messages and states runs have."""
    stroma.file("odd.py", ODD)
    for name in ("ok", "rejected", "message", "many"):
        result = inside("run", f"odd.py:{name}", "{}", "--run-id", name, "--db", "r.db", "-q")
        assert result.code in (0, 1), result
    for tool, arguments in QUESTIONS:
        answer = ask(tool, **arguments)
        size = len(answer.content[0].text.encode())
        assert size <= 64 * 1024, (tool, arguments, size)
        assert "\ud83d" not in answer.content[0].text
        if _data(answer).get("cut"):
            assert "stroma export RUN --db r.db" in _data(answer)["cut"]
    runs = _data(ask("list_runs"))
    assert [run["run_id"] for run in runs["runs"]] == ["many", "message", "rejected", "ok", "bad", "good"]
    why = _data(ask("explain_failure", run="message"))
    assert "more characters" in why["run"]["error"]
    assert [one["attempt"] for one in why["failed_attempts"]] == [1, 2, 3, 4]
    output = _data(ask("read_attempt", run="ok", node="half"))["output"]
    assert output == {"v": {"half \ufffd": ["half \ufffd", "nan"]}}


@pytest.mark.parametrize(
    "value",
    [
        "x" * 1_000_000,
        '\n\0"' * 100_000,
        "\U0001f600" * 100_000,
        ["\ud83d"] * 100_000,
        {"k" * 5_000 + str(n): "v" * n for n in range(500)},
        [[["deep"] * 50] * 50] * 50,
        functools.reduce(lambda inner, _: {"inner": inner, "text": "t" * 1000}, range(100), 1),
        10**4000,
    ],
    ids=["text", "escapes", "wide characters", "halves", "keys", "lists", "depth", "number"],
)
def test_small_values_survive_large_ones(value):
    """An answer is cut to 64 KiB of indented JSON; small fields stay whole beside large ones of any kind."""
    answer = bound_answer({"status": "FAILED", "value": value, "cost": 0.5}, "read less")
    assert len(to_json(answer, indent=2)) <= 64 * 1024
    assert (answer["status"], answer["cost"]) == ("FAILED", 0.5)
    assert ("cut" in answer) is (value != 10**4000)


def test_an_error_text_is_bounded(ask):
    """An error message for an agent is bounded too: it may quote the question."""
    assert len(ask("explain_failure", run="x" * 100_000).content[0].text) <= 66 * 1024


@pytest.mark.slow
def test_the_command_speaks_over_stdio(ask, stroma):
    """`stroma mcp` as an agent starts it, as a process: it answers on stdout and ends with its input."""

    async def main() -> Any:
        program = str(Path(sys.executable).with_name("stroma"))
        arguments = ["mcp", "--db", "r.db"]
        server = StdioServerParameters(command=program, args=arguments, cwd=stroma.home, env=stroma.env)
        async with stdio_client(server) as streams, ClientSession(*streams) as session:
            await session.initialize()
            tools = await session.list_tools()
            return tools, await session.call_tool("explain_failure", {"run": "last"})

    tools, why = asyncio.run(asyncio.wait_for(main(), 60))
    names = [tool.name for tool in tools.tools]
    assert names == ["list_runs", "explain_failure", "read_attempt", "compare_runs"]
    assert _data(why)["run"]["cause"]["node_id"] == "second"


def test_a_wrong_question_is_a_message(ask):
    """An unknown run, node or status is an error that says what there is; the server goes on.

    So is a run in an argument of another name: it does not get the failure of the last run.
    """
    unknown = ask("explain_failure", run="nope")
    assert unknown.is_error
    assert "nope" in unknown.content[0].text
    assert ask("explain_failure", run_id="bad").is_error
    node = ask("read_attempt", run="good", node="nope")
    assert node.is_error
    assert "its nodes are: first, second, third" in node.content[0].text
    status = ask("list_runs", status="broken")
    assert status.is_error
    assert "FAILED" in status.content[0].text
