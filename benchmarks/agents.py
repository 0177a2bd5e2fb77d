"""Cost of a step of a durable agent of Pydantic AI, beside the agent alone and its DBOS backend, in one run.

    python -m benchmarks.agents [POSTGRES_URL]

It needs an environment with this package, ``pydantic-ai-slim`` and ``dbos``; a row without its package is
left out. Each agent makes 50 requests with a tool each, to a model that answers at once: 100 steps. A row is
the CPU of this process and the time of the wall, per step, the median of five runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel

from stroma import Flow, InMemoryStore, StromaRunner, open_store

_ROUNDS, _STEPS = 5, 100


class In(BaseModel):
    prompt: str = "go"


class Out(BaseModel):
    text: str


def agent_of(name: str, *capabilities: Any) -> Any:
    """Return an agent of 50 requests and 50 calls of a tool."""
    ai: Any = importlib.import_module("pydantic_ai")
    messages: Any = importlib.import_module("pydantic_ai.messages")
    models: Any = importlib.import_module("pydantic_ai.models.function")

    def respond(history: list[Any], info: Any) -> Any:
        done = len(history) // 2
        part = messages.TextPart("done") if done == _STEPS // 2 else messages.ToolCallPart("add", {"x": done})
        return messages.ModelResponse(parts=[part])

    agent = ai.Agent(models.FunctionModel(respond), name=name, capabilities=list(capabilities))

    async def add(x: int) -> int:
        return x + 1

    agent.tool_plain(add)
    limits = ai.UsageLimits(request_limit=None)

    async def run() -> str:
        return str((await agent.run("go", usage_limits=limits)).output)

    return run


def in_flow(store: Any) -> Callable[[], Awaitable[str]]:
    adapter: Any = importlib.import_module("stroma.adapters.pydantic_ai")
    run = agent_of("ours", adapter.StromaDurability())
    runner = StromaRunner.quick(store=store)

    @runner.flow("agent", input=In, output=Out)
    async def flow(flow: Flow, state: In) -> Out:
        return Out(text=await run())

    async def once() -> str:
        result = await runner.run(flow, In())
        assert result.failure is None, result.failure
        return "done"

    return once


def on_dbos(url: str) -> Callable[[], Awaitable[str]]:
    dbos: Any = importlib.import_module("dbos")
    backend: Any = importlib.import_module("pydantic_ai.durable_exec.dbos")
    dbos.DBOS.destroy()
    dbos.DBOS(config={"name": "agents", "system_database_url": url, "log_level": "ERROR"})
    run = agent_of("theirs", backend.DBOSDurability())
    workflow = dbos.DBOS.workflow(name="agent")(run)
    dbos.DBOS.launch()

    async def once() -> str:
        with dbos.SetWorkflowID(str(uuid.uuid4())):
            return str(await workflow())

    return once


async def measure(run: Callable[[], Awaitable[str]]) -> tuple[float, float]:
    """Return microseconds of CPU and of the wall, per step."""
    assert await run() == "done"
    rows = []
    for _ in range(_ROUNDS):
        cpu, wall = time.process_time(), time.perf_counter()
        await run()
        rows.append((time.process_time() - cpu, time.perf_counter() - wall))
    return tuple(1e6 / _STEPS * statistics.median(column) for column in zip(*rows, strict=True))


async def main(postgres: str | None) -> None:
    """Print the table."""
    folder = tempfile.mkdtemp()
    cases: list[tuple[str, Callable[[], Callable[[], Awaitable[str]]]]] = [
        ("the agent alone", lambda: agent_of("alone")),
        ("in a flow, in memory", lambda: in_flow(InMemoryStore())),
        ("in a flow, SQLite", lambda: in_flow(open_store(f"sqlite:///{folder}/runs.db"))),
    ]
    cases.append(("DBOS, SQLite", lambda: on_dbos(f"sqlite:///{folder}/dbos.sqlite")))
    if postgres is not None:
        cases.append(("in a flow, Postgres", lambda: in_flow(open_store(postgres))))
        cases.append(("DBOS, Postgres", lambda: on_dbos(postgres)))
    print(f"{'':24}{'CPU':>10}{'wall':>10}   us a step")
    for name, make in cases:
        with contextlib.suppress(ImportError):
            cpu, wall = await measure(make())
            print(f"{name:24}{cpu:10.0f}{wall:10.0f}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
