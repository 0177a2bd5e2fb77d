"""Two typed steps; the first call times out and is repeated; every attempt is listed."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import RetryPolicy
from pydantic import BaseModel
from world import Reply, Sorted, Ticket, ask_for_topic


class State(BaseModel):
    ticket: Ticket
    sorted: Sorted | None = None
    reply: Reply | None = None


@contextmanager
def listed(name: str, runtime: Runtime) -> Iterator[None]:
    number = runtime.execution_info.node_attempt
    try:
        yield
    except Exception:
        print(name, number, "failure")
        raise
    print(name, number, "success")


async def sort(state: State, runtime: Runtime) -> dict[str, Any]:
    with listed("sort", runtime):
        return {"sorted": Sorted(text=state.ticket.text, topic=await ask_for_topic(state.ticket.text))}


async def reply(state: State, runtime: Runtime) -> dict[str, Any]:
    with listed("reply", runtime):
        assert state.sorted is not None
        return {"reply": Reply(topic=state.sorted.topic, reply=f"We look into it: {state.sorted.text}")}


policy = RetryPolicy(max_attempts=4, initial_interval=0.1, retry_on=TimeoutError)
builder = StateGraph(State)
builder.add_node("sort", sort, retry_policy=policy)
builder.add_node("reply", reply, retry_policy=policy)
builder.add_edge(START, "sort")
builder.add_edge("sort", "reply")
result = asyncio.run(builder.compile().ainvoke(State(ticket=Ticket(text="My invoice is wrong"))))
print(result["reply"])
