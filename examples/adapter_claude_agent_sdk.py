"""A tool of one's own that fails once, in a query: called again, and the journal has both attempts.

    python examples/adapter_claude_agent_sdk.py

Needs `pip install "stroma-runner[claude-agent-sdk]"`, and neither a key nor a network: the tool is called as
the SDK would call it. Prints:

> {'celsius': 4}
> weather failure, weather success
"""

import asyncio
import json
from typing import Any

from claude_agent_sdk import tool
from pydantic import BaseModel

from stroma import FailureClass, FailurePolicy, StromaRunner
from stroma.adapters import Guard
from stroma.adapters.claude_agent_sdk import guarded_tools


class City(BaseModel):
    city: str


class Weather(BaseModel):
    celsius: int


calls = 0


@tool("weather", "The weather of a city.", {"city": str})
async def weather(arguments: dict[str, Any]) -> dict[str, Any]:
    global calls
    calls += 1
    if calls == 1:
        raise ConnectionError("gone")
    return {"content": [{"type": "text", "text": json.dumps({"celsius": len(arguments["city"])})}]}


at_once = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=3, backoff_seconds=0)}
guard = Guard(StromaRunner.quick(policy_map=at_once))
(guarded,) = guarded_tools(guard, [weather], {"weather": (City, Weather)})


async def main() -> None:
    async with guard.run():
        made = await guarded.handler({"city": "Oslo"})
        print(">", json.loads(made["content"][0]["text"]))


asyncio.run(main())
assert guard.last is not None
print(">", ", ".join(f"{event.node_id} {event.outcome}" for event in guard.last.ctx.trace))
