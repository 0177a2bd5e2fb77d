"""The agent of ``stroma demo agent``: a flow around a scripted model, with tools, an approval and a charge.

The model and the bank are functions here: no key, no network. The bank writes its book into a file, which
outlives processes, and then takes its time to answer: long enough to be killed in between.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from stroma.contracts.contract import NotDone
from stroma.engine.execution import current_node
from stroma.runner.flows.flow import Flow
from stroma.runner.runner import StromaRunner

#: Environment variable with the file of the bank's book.
BOOK_VARIABLE: Final = "STROMA_DEMO_BOOK"
#: How long the bank takes to answer once it has booked.
_BANK_SECONDS: Final = 3.0


class Ticket(BaseModel):
    text: str = "Order 17 arrived broken. I want my 25.00 dollars back."


class Message(BaseModel):
    role: str
    text: str


class Chat(BaseModel):
    messages: list[Message]


class ModelAnswer(BaseModel):
    """Answer of the model: a text, or a tool to call."""

    text: str = ""
    tool: str | None = None
    arguments: dict[str, str] = {}


class OrderQuery(BaseModel):
    order: str


class OrderRecord(BaseModel):
    order: str
    paid_cents: int


class Refund(BaseModel):
    order: str
    cents: int


class RefundReceipt(BaseModel):
    number: int


class Approval(BaseModel):
    approved: bool


class Reply(BaseModel):
    text: str


runner = StromaRunner.quick()


@runner.node("model", input=Chat, output=ModelAnswer)
async def model(chat: Chat) -> ModelAnswer:
    """Answer as a model would that has read the ticket: look the order up, refund it, tell the customer."""
    node, results = current_node(), [message.text for message in chat.messages if message.role == "tool"]
    node.report_usage(input_tokens=200 + 40 * len(chat.messages), output_tokens=30, model="gpt-4o-mini")
    await asyncio.sleep(0.2)
    if not results:
        return ModelAnswer(tool="find_order", arguments={"order": "17"})
    if len(results) == 1:
        return ModelAnswer(tool="refund", arguments={"order": "17", "cents": "2500"})
    text = f"We are sorry. 25.00 dollars are on their way to you ({results[-1]})."
    for word in text.split(" "):
        node.emit(f"{word} ")
        await asyncio.sleep(0.02)
    return ModelAnswer(text=text)


@runner.node("find_order", input=OrderQuery, output=OrderRecord)
async def find_order(query: OrderQuery) -> OrderRecord:
    await asyncio.sleep(0.2)
    return OrderRecord(order=query.order, paid_cents=2500)


def bookings() -> list[dict[str, Any]]:
    """Return what the bank has booked."""
    book = Path(os.environ[BOOK_VARIABLE])
    return [json.loads(line) for line in book.read_text("utf-8").splitlines()] if book.exists() else []


def _book(booking: dict[str, Any]) -> None:
    with Path(os.environ[BOOK_VARIABLE]).open("a", encoding="utf-8") as book:
        book.write(json.dumps(booking) + "\n")


async def look_up_refund(refund: Refund, key: str) -> RefundReceipt | NotDone:
    """Ask the bank for a booking with this key."""
    numbers = [number for number, booking in enumerate(bookings(), 1) if booking["key"] == key]
    return RefundReceipt(number=numbers[0]) if numbers else NotDone()


@runner.node("refund", input=Refund, output=RefundReceipt, effect=True, reconcile=look_up_refund)
async def refund(request: Refund) -> RefundReceipt:
    """Have the bank book the refund, and wait for its answer."""
    _book({"key": current_node().idempotency_key, "cents": request.cents})
    await asyncio.sleep(_BANK_SECONDS)
    return RefundReceipt(number=len(bookings()))


@runner.flow("support", input=Ticket, output=Reply)
async def support(flow: Flow, ticket: Ticket) -> Reply:
    """Ask the model, and call the tools that it chooses, until it has a text for the customer."""
    messages = [Message(role="user", text=ticket.text)]
    while True:
        answer = await flow.step(model, Chat(messages=messages))
        if answer.tool is None:
            return Reply(text=answer.text)
        messages.append(Message(role="tool", text=await _call(flow, answer)))


async def _call(flow: Flow, answer: ModelAnswer) -> str:
    """Call the tool that the model has chosen. Return what the model gets of it."""
    if answer.tool == "find_order":
        record = await flow.step(find_order, OrderQuery(order=answer.arguments["order"]))
        return f"order {record.order}: {record.paid_cents} cents paid"
    order, cents = answer.arguments["order"], int(answer.arguments["cents"])
    decision = await flow.wait_for(Approval, reason=f"refund of {cents} cents for order {order}")
    if not decision.approved:
        return "a person has refused the refund"
    receipt = await flow.step(refund, Refund(order=order, cents=cents))
    return f"booking {receipt.number}"
