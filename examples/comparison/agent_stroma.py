"""An agent finds an order and refunds it, once, after an approval; it continues after an exit and a kill.

Start it three times: alone, with "approve" (and CRASH=1, which kills it in the refund), and alone again.
"""

import asyncio
import sys

from pydantic import BaseModel
from world import Move, Ticket, ask_for_move, find_order, refund, was_refunded

from stroma import Flow, NotDone, StromaRunner, current_node


class Messages(BaseModel):
    messages: list[str]


class Text(BaseModel):
    text: str


class Approval(BaseModel):
    by: str


runner = StromaRunner.quick(store="runs.db")


@runner.node
async def ask(state: Messages) -> Move:
    return await ask_for_move(state.messages)


@runner.node
async def find(move: Move) -> Text:
    return Text(text=await find_order(move.argument))


def look_up(move: Move, key: str) -> Text | NotDone:
    return Text(text=f"refunded {move.argument}") if was_refunded(key) else NotDone()


@runner.node(effect=True, reconcile=look_up)
async def pay(move: Move) -> Text:
    return Text(text=await refund(move.argument, current_node().idempotency_key))


@runner.flow
async def support(flow: Flow, ticket: Ticket) -> Text:
    messages = [ticket.text]
    while (move := await flow.step(ask, Messages(messages=messages))).tool:
        if move.tool == "refund":
            await flow.wait_for(Approval, reason=f"refund {move.argument}?")
        step = pay if move.tool == "refund" else find
        messages.append((await flow.step(step, move)).text)
    return Text(text=move.argument)


if "approve" in sys.argv:
    asyncio.run(runner.signal("case-7", Approval(by="Grace")))
result = runner.run_sync(support, Ticket(text="a refund, please"), run_id="case-7", resume=True)
print(result.suspended[0] if result.suspended else result.output.text)
