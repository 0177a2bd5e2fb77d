"""A tool of an MCP server whose connection is lost once: called again, and its result judged by a contract.

    python examples/adapter_mcp.py

Needs `pip install "stroma-runner[mcp]"`, and neither a key nor a network. Prints:

> {"celsius": 4}
> weather 1 failure, weather 2 success
"""

import asyncio
from typing import Any

from mcp import ClientSession, types
from pydantic import BaseModel

from stroma import FailureClass, FailurePolicy, InMemoryStore, StromaRunner
from stroma.adapters import Guard
from stroma.adapters.mcp import attach

answers: list[Any] = [ConnectionError("gone"), '{"celsius": 4}']


class City(BaseModel):
    city: str


class Weather(BaseModel):
    celsius: int


class FakeSession(ClientSession):
    """Answers in place of a server."""

    def __init__(self) -> None:
        pass

    async def call_tool(self, name: str, arguments: Any = None) -> Any:  # type: ignore[override]
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return types.CallToolResult(content=[types.TextContent(type="text", text=answer)])


async def main() -> None:
    store = InMemoryStore()
    at_once = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=1, backoff_seconds=0)}
    guard = Guard(StromaRunner.quick(store=store, policy_map=at_once))
    session = attach(FakeSession(), guard, {"weather": (City, Weather)})
    async with guard.run():
        result: Any = await session.call_tool("weather", {"city": "Oslo"})
    print(">", result.content[0].text)
    (run,) = store.list_runs()
    attempts = store.attempts(run.run_id)
    print(">", ", ".join(f"{tried.node_id} {tried.attempt} {tried.outcome}" for tried in attempts))


asyncio.run(main())
