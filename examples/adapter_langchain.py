"""An agent and the sub-agent in its tool, under one budget: the tokens of both count, and the limit holds inside.

    python examples/adapter_langchain.py

Needs `pip install "stroma-runner[langchain]"`, and neither a key nor a network. Prints:

> done, 160 tokens
> research used 80 of them
> stopped at 120 of 100 tokens
"""

from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import tool

from stroma import BudgetExceeded, ExecutionBudget, StromaRunner
from stroma.adapters import Guard
from stroma.adapters.langchain import StromaMiddleware

USED: Any = {"input_tokens": 30, "output_tokens": 10, "total_tokens": 40}


class FakeModel(FakeMessagesListChatModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def says(text: str = "", calls: str | None = None) -> AIMessage:
    asked = [{"name": calls, "args": {}, "id": "1", "type": "tool_call"}] if calls else []
    return AIMessage(text, tool_calls=asked, usage_metadata=USED)


@tool
def look() -> str:
    """Look something up."""
    return "found"


@tool
def research() -> str:
    """Have somebody else look."""
    # An agent of its own, which knows nothing of the guard.
    other = create_agent(FakeModel(responses=[says(calls="look"), says("found")]), [look])
    return str(other.invoke({"messages": [("user", "look")]})["messages"][-1].content)


def run(limit: int) -> tuple[Guard, Any]:
    guard = Guard(StromaRunner.quick(budget=ExecutionBudget(max_tokens_total=limit)))
    guarded = StromaMiddleware(guard)
    model = FakeModel(responses=[says(calls="research"), says("done")])
    agent = guarded.attach(create_agent(model, [research], middleware=[guarded]))
    return guard, agent


guard, agent = run(1000)
answer = agent.invoke({"messages": [("user", "go")]})["messages"][-1].content
assert guard.last is not None
result = guard.last.result
print(f"> {answer}, {result.total_tokens} tokens")
for event in result.trace:
    if event.node_id == "research":
        print(f"> research used {event.usage.tokens} of them")

guard, agent = run(100)
try:
    agent.invoke({"messages": [("user", "go")]})
except BudgetExceeded as error:
    print(f"> stopped at {error.actual:.0f} of {error.limit:.0f} tokens")
