"""Runs as guests in a process: signals, threads, files and settings stay as they were."""

import subprocess
import sys

import pytest

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
