"""An answer is repaired and booked; it is paid for once, within a budget, although the process is killed in between."""

import asyncio
from typing import Any

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import RetryPolicy
from pydantic import BaseModel, ValidationError
from world import Invoice, ask_for_euros, crash_if_asked, price_of


class State(BaseModel):
    mail: str
    complaint: str | None = None
    repairs: int = 0
    cost_usd: float = 0
    euros: int = 0


async def extract(state: State) -> dict[str, Any]:
    if state.cost_usd >= 0.10:
        raise RuntimeError("over the budget")
    response = await ask_for_euros(state.mail, state.complaint)
    cost_usd = state.cost_usd + price_of(response)
    try:
        invoice = Invoice.model_validate(response["answer"])
    except ValidationError as error:
        if state.repairs == 2:
            raise
        return {"complaint": str(error), "repairs": state.repairs + 1, "cost_usd": cost_usd}
    return {"euros": invoice.euros, "cost_usd": cost_usd}


async def book(state: State) -> dict[str, Any]:
    crash_if_asked()
    return {}


def after_extract(state: State) -> str:
    return "book" if state.euros else "extract"


builder = StateGraph(State)
policy = RetryPolicy(max_attempts=4, initial_interval=0.1, retry_on=TimeoutError)
builder.add_node("extract", extract, retry_policy=policy)
builder.add_node("book", book)
builder.add_edge(START, "extract")
builder.add_conditional_edges("extract", after_extract, ["extract", "book"])


async def main() -> None:
    async with AsyncSqliteSaver.from_conn_string("runs.db") as saver:
        graph = builder.compile(checkpointer=saver)
        thread: Any = {"configurable": {"thread_id": "mail-7"}}
        is_new = not (await graph.aget_state(thread)).next
        start = State(mail="Twelve EUR") if is_new else None
        result = await graph.ainvoke(start, thread, durability="sync")
        print(Invoice(euros=result["euros"]), f"${result['cost_usd']:.6f}")


asyncio.run(main())
