"""Runs as guests in a process: its settings stay as they were, and nodes that keep its loop are named."""

import asyncio
import subprocess
import sys
import time
from typing import Any

import pytest
from pydantic import BaseModel

from stroma import StromaRunner, parallel

GUEST = """
import asyncio, logging, signal, sys, threading
met = []
calls = ("socket.connect", "socket.getaddrinfo")
sys.addaudithook(lambda event, _: met.append(event) if event in calls else None)

def installed():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    hooks += (asyncio.get_running_loop().get_exception_handler(),)
    return handlers, hooks, list(logging.root.handlers), logging.root.level

async def main():
    before = installed()
    import stroma
    from pydantic import BaseModel

    class Num(BaseModel):
        n: int = 0

    async def a(state):
        during.append(installed() == before)
        if len(during) == 1:
            raise TimeoutError("once")
        return {"n": 1}, 5, "gpt-4o-2024-08-06"

    during = []
    node = stroma.stroma_node("a", stroma.NodeContract(node_id="a", input_schema=Num, output_schema=Num))(a)
    now = stroma.FailurePolicy(backoff_seconds=0)
    runner = stroma.StromaRunner.quick(policy_map={stroma.FailureClass.RECOVERABLE: now})
    result = await runner.run([node], Num())
    print(result.status, during, installed() == before, logging.getLogger("stroma").handlers, met)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_guest_in_the_process() -> None:
    """A library installs no signal handler and no global handler, and never phones home."""
    done = subprocess.run([sys.executable, "-c", GUEST], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "COMPLETED [True, True] True [<NullHandler (NOTSET)>] []"
    assert done.stderr == ""


class State(BaseModel):
    items: list[int] = []


async def blocks(state: Any) -> Any:
    time.sleep(0.06)
    return state


def in_thread(state: Any) -> Any:
    time.sleep(0.06)
    return state


async def waits(state: Any) -> Any:
    await asyncio.sleep(0.06)
    return state


async def quick(state: Any) -> Any:
    return state


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "event loop" in record.getMessage()]


@pytest.mark.parametrize("limited", [False, True], ids=["for a second", "for its time limit"])
async def test_a_node_that_blocks_is_named_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, limited: bool
) -> None:
    """A node that never awaits for 1 s, or for its time limit, is named; one in a thread or waiting isn't."""
    if not limited:
        monkeypatch.setattr("stroma.engine.diagnosis.BLOCK_NS", 50_000_000)
    functions = {"blocks": blocks, "in_thread": in_thread, "waits": waits, "quick": quick}
    runner = StromaRunner.quick(node_timeouts={"blocks": 50} if limited else {})
    nodes = {name: runner.node(name, input=State, output=State)(func) for name, func in functions.items()}
    pipeline = [nodes["quick"], nodes["blocks"], nodes["blocks"], *nodes.values()]
    result = await runner.run(pipeline, State())
    assert result.status == "COMPLETED", result.failure
    beside = await runner.run([parallel(*nodes.values())], State())
    assert beside.status == "COMPLETED", beside.failure
    texts = warnings_of(caplog)
    assert len(texts) == 2  # One of each run.
    for text in texts:
        assert "': node 'blocks' blocked the event loop for " in text
        assert "define it with def instead of async def" in text


async def test_a_second_is_the_limit_without_a_time_limit(caplog: pytest.LogCaptureFixture) -> None:
    """A node that blocks for less than a second, and less than its time limit, is not named."""
    runner = StromaRunner.quick(node_timeouts={"quick": 10})
    nodes = [
        runner.node(name, input=State, output=State)(func)
        for name, func in (("blocks", blocks), ("quick", quick))
    ]
    await runner.run(nodes, State())
    assert warnings_of(caplog) == []
