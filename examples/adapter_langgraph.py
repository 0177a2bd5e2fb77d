"""A graph whose model fails once and whose budget ends it: retried, counted and stopped, without a change to its nodes.

    python examples/adapter_langgraph.py

Needs `pip install "stroma-runner[langgraph]"`, and neither a key nor a network. Prints:

> retry ask after TimeoutError
> 80 tokens for 2 answers
> stopped: budget exceeded: max_tokens_total limit 100 tokens, used 120 tokens (tokens) at node 'ask'
"""

from typing import Any, TypedDict

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, StateGraph

from stroma import BudgetExceeded, ExecutionBudget, FailureClass, NodeHooks, StromaRunner
from stroma.adapters import Guard
from stroma.adapters.langgraph import attach

USED = {"input_tokens": 30, "output_tokens": 10, "total_tokens": 40}
model = GenericFakeChatModel(
    messages=iter(AIMessage(f"answer {n}", usage_metadata=USED) for n in range(1, 99))  # type: ignore[arg-type]
)


class State(TypedDict, total=False):
    question: str
    answer: str
    rounds: int


calls = 0


def ask(state: State) -> Any:
    global calls
    calls += 1
    if calls == 1:
        raise TimeoutError("the provider is slow today")
    return {"answer": model.invoke(state["question"]).content, "rounds": state.get("rounds", 0) + 1}


def again(state: State) -> str:
    return END if state["rounds"] >= wanted else "ask"


async def on_node_failure(run_id: str, node_id: str, error: Exception, kind: FailureClass) -> None:
    if kind is FailureClass.RECOVERABLE and not isinstance(error, BudgetExceeded):
        print(f"> retry {node_id} after {type(error).__name__}")


builder = StateGraph(State)
builder.add_node("ask", ask)
builder.add_edge(START, "ask")
builder.add_conditional_edges("ask", again)

guard = Guard(
    StromaRunner.quick(
        budget=ExecutionBudget(max_tokens_total=100), hooks=NodeHooks(on_node_failure=on_node_failure)
    )
)
graph = attach(builder, guard).compile()

wanted = 2
graph.invoke({"question": "why?"})
assert guard.last is not None
print(f"> {guard.last.ctx.cost_tracker.total_tokens} tokens for {wanted} answers")

wanted = 9  # More rounds than the budget allows.
try:
    graph.invoke({"question": "why?"})
except BudgetExceeded:
    assert guard.stopped is not None
    print("> stopped:", guard.stopped.message.split(";")[0])
