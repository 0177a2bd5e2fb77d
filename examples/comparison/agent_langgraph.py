"""An agent finds an order and refunds it, once, after an approval; it continues after an exit and a kill.

Start it three times: alone, with "approve" (and CRASH=1, which kills it in the refund), and alone again.
"""

import asyncio
import operator
import sys
from typing import Annotated, Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt
from pydantic import BaseModel
from world import Move, ask_for_move, find_order, refund, was_refunded


class State(BaseModel):
    messages: Annotated[list[str], operator.add]
    tool: str = ""
    argument: str = ""


async def ask(state: State) -> dict[str, Any]:
    move: Move = await ask_for_move(state.messages)
    return {"tool": move.tool, "argument": move.argument}


async def find(state: State) -> dict[str, Any]:
    return {"messages": [await find_order(state.argument)]}


async def approve(state: State) -> dict[str, Any]:
    interrupt(f"refund {state.argument}?")
    return {}


async def pay(state: State, config: RunnableConfig) -> dict[str, Any]:
    key = f"{config['configurable']['thread_id']}:{len(state.messages)}"
    text = f"refunded {state.argument}" if was_refunded(key) else await refund(state.argument, key)
    return {"messages": [text]}


def after_ask(state: State) -> str:
    return {"find_order": "find", "refund": "approve"}.get(state.tool, END)


builder = StateGraph(State)
for node in (ask, find, approve, pay):
    builder.add_node(node.__name__, node)
builder.add_edge(START, "ask")
builder.add_conditional_edges("ask", after_ask, ["find", "approve", END])
builder.add_edge("find", "ask")
builder.add_edge("approve", "pay")
builder.add_edge("pay", "ask")


async def main() -> None:
    async with AsyncSqliteSaver.from_conn_string("runs.db") as saver:
        graph = builder.compile(checkpointer=saver)
        thread: Any = {"configurable": {"thread_id": "case-7"}}
        is_new = not (await graph.aget_state(thread)).next
        start: Any = State(messages=["a refund, please"]) if is_new else None
        if "approve" in sys.argv:
            start = Command(resume=True)
        result = await graph.ainvoke(start, thread, durability="sync")
        questions = result.get("__interrupt__")
        print(questions[0].value if questions else result["argument"])


asyncio.run(main())
