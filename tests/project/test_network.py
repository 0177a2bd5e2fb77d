"""Nothing is asked of the network that nobody asked for."""

from pathlib import Path

import pytest
from tests.docs.blocks import reader_env
from tests.kit import run_python

#: Runs a pipeline and the commands in one process, and prints every address that this process turned to.
SCRIPT = """
import asyncio, contextlib, io, socket, sys

asked = []
EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"}
def hear(event, args):
    if event in EVENTS:
        asked.append((event, str(args[1:] or args)))
sys.addaudithook(hear)

from pydantic import BaseModel
import stroma
from stroma import ExecutionBudget, NodeContract, Pipeline, SQLiteStore, StromaRunner, stroma_node
from stroma.telemetry import log_hooks


class Text(BaseModel):
    text: str = "hi"


@stroma_node("known", NodeContract(node_id="known", input_schema=Text, output_schema=Text))
async def known(state: Text):
    return state, 100, 10, "gpt-4o-mini"


@stroma_node("unknown", NodeContract(node_id="unknown", input_schema=Text, output_schema=Text))
async def unknown(state: Text):
    return state, 100, 10, "a-model-that-nobody-knows"


flow = Pipeline("flow", [known, unknown])


def main():
    from stroma.cli.app import start

    async def run():
        async with SQLiteStore("runs.db") as store:
            runner = StromaRunner.quick(
                store=store, hooks=log_hooks(), budget=ExecutionBudget(max_cost_usd=1), check=True,
                unknown_model="warn"
            )
            result = await runner.run(flow, Text(), run_id="r1")
            result.raise_for_status()
            result.to_html("run.html")
            async with runner.stream(flow, Text()) as stream:
                async for event in stream:
                    event.to_sse()

    asyncio.run(run())
    for command in (
        ["run", "flow.py:flow", "--db", "runs.db"], ["check", "flow.py:flow"], ["graph", "flow.py:flow"],
        ["runs", "--db", "runs.db"], ["show", "r1", "--db", "runs.db"], ["doctor", "--db", "runs.db"],
        ["export", "r1", "--db", "runs.db", "--format", "html", "-o", "r1.html"],
        ["prices", "gpt-4o-mini", "claude-haiku-4-5"],
        ["gc", "--older-than", "30d", "--db", "runs.db"], ["--version"],
    ):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            try:
                code = start(command, "stroma")
            except SystemExit as ended:
                code = ended.code
        assert not code, (command, out.getvalue())
    print(asked)
    with contextlib.suppress(OSError), socket.socket() as other:
        other.connect(("127.0.0.1", 1))
    print(len(asked))


if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_nothing_phones_home(tmp_path: Path) -> None:
    """A pipeline with prices, a store and logs, and its commands, use no address and look up no name."""
    (tmp_path / "flow.py").write_text(SCRIPT)
    # The last line shows that a connection would have been seen.
    assert run_python("flow.py", cwd=tmp_path, env=reader_env()).splitlines() == ["[]", "1"]
