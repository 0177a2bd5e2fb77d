"""What the programs of this folder share and do not count: data, a model, a price, and a service for refunds.

The model and the service write what they did to calls.log, so that a test can see what a program repeats.
"""

import os
import signal
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

LOG = Path("calls.log")
outages = ["the provider did not answer"]


class Ticket(BaseModel):
    text: str


class Sorted(BaseModel):
    text: str
    topic: str


class Reply(BaseModel):
    topic: str
    reply: str


class Mail(BaseModel):
    text: str


class Invoice(BaseModel):
    euros: int = Field(gt=0)


class Move(BaseModel):
    """What the model of the agent wants next: a call of a tool, or to answer."""

    tool: str = ""
    argument: str


def log(line: str) -> None:
    with LOG.open("a") as file:
        file.write(f"{line}\n")


def done(line: str) -> bool:
    return LOG.exists() and line in LOG.read_text().splitlines()


def crash_if_asked() -> None:
    if os.environ.get("CRASH"):
        os.kill(os.getpid(), signal.SIGKILL)


async def ask_for_topic(text: str) -> str:
    """Return the topic of a ticket. The first call of a process times out."""
    if outages:
        raise TimeoutError(outages.pop())
    return "billing" if "invoice" in text else "other"


async def ask_for_euros(text: str, complaint: str | None = None) -> dict[str, Any]:
    """Return the response of a provider. The first call times out, and an answer is bad until it is complained about."""
    log("extract")
    if outages:
        raise TimeoutError(outages.pop())
    usage = {"prompt_tokens": 800, "completion_tokens": 40}
    return {"model": "gpt-4o-mini", "usage": usage, "answer": {"euros": 12 if complaint else "twelve"}}


def price_of(response: dict[str, Any]) -> float:
    """Return the price of a response in US dollars."""
    usage = response["usage"]
    return float(usage["prompt_tokens"] * 0.15 + usage["completion_tokens"] * 0.6) / 1e6


async def ask_for_move(messages: list[str]) -> Move:
    """Return what the model of the agent wants after these messages."""
    log("model")
    moves = [
        Move(tool="find_order", argument="Ada"),
        Move(tool="refund", argument="order 17"),
        Move(argument="It is refunded."),
    ]
    return moves[len(messages) - 1]


async def find_order(customer: str) -> str:
    log("find_order")
    return f"order 17 of {customer}"


async def refund(order: str, key: str) -> str:
    """Refund an order. A second call with the same key would refund it again; was_refunded() tells."""
    log(f"refund {key}")
    crash_if_asked()
    return f"refunded {order}"


def was_refunded(key: str) -> bool:
    return done(f"refund {key}")
