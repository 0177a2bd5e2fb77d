"""A flow for the fault "queue": branches, a loop, parallel steps, a map, a child, a sleep and a question.

It must show: each step is committed once, under one idempotency key, and the end is that of a flow that was
left alone.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from tests.chaos.check import Figures

from stroma import Flow, StepFailed, current_node, open_store, stroma_flow, stroma_node

END = "3 6 5 [0, 2, 4, 6] 14 yes"
COMMITTED = frozenset(
    (
        *(f"add#{n}" for n in (0, 1, 2, 4, 5)),
        *("double#3", "inner#8", "inner#8.add#0", "inner#8.double#1"),
        *(f"*double#7.{n}" for n in range(4)),
    )
)


class Number(BaseModel):
    n: int = 0


class Text(BaseModel):
    text: str = ""


def make_flow(note: Callable[[str], None], draw: random.Random) -> Any:
    """Return the flow of a round, whose steps note their calls and take a random time."""

    def step(name: str, change: Callable[[int], int]) -> Any:
        @stroma_node(name, input=Number, output=Number)
        async def func(state: Number) -> Any:
            here = current_node()
            note(f"call {here.branch} {here.idempotency_key}")
            await asyncio.sleep(draw.random() * 0.003)
            if name == "bad":
                raise NotImplementedError("bad")
            return {"n": change(state.n)}, 1

        return func

    add, double, bad = step("add", lambda n: n + 1), step("double", lambda n: 2 * n), step("bad", int)

    @stroma_flow("inner", input=Number, output=Number)
    async def inner(flow: Flow, state: Number) -> Number:
        one: Number = await flow.step(add, state)
        other: Number = await flow.step(double, one)
        return other

    @stroma_flow("f", input=Number, output=Text)
    async def f(flow: Flow, state: Number) -> Text:
        while state.n < 3:
            state = await flow.step(add, state)

        async def branch(number: Number) -> Number:
            one: Number = await flow.step(add, number)
            other: Number = await flow.step(add, one)
            return other

        async with asyncio.TaskGroup() as group:
            x = group.create_task(flow.step(double, state))
            y = group.create_task(branch(state))
        items: list[Any] = []
        try:
            await flow.step(bad, state)
        except StepFailed:
            items = await flow.map(double, [Number(n=n) for n in range(4)], max_concurrency=2)
        child = await flow.run(inner, x.result())
        await flow.sleep(0.01)
        answer = await flow.wait_for(Text, reason="Well?")
        numbers = [one.n for one in items]
        return Text(text=f"{state.n} {x.result().n} {y.result().n} {numbers} {child.n} {answer.text}")

    return f


def check_flow(url: str, diary: str, run: str) -> Figures:
    """Return the figures of a run of the flow that has ended."""
    figures = Figures()
    with open(diary) as file:
        lines = [line.rstrip("\n").partition(" ") for line in file]
    ends = {text for kind, _, text in lines if kind == "end"}
    calls = [text.split(" ") for kind, _, text in lines if kind == "call"]

    async def read() -> tuple[Any, list[Any]]:
        opened: Any = open_store(url)
        async with opened as store:
            record, attempts = store.get_run(run), store.attempts(run)
            if asyncio.iscoroutine(record):
                record, attempts = await record, await attempts
            return record, list(attempts)

    record, attempts = asyncio.run(read())
    if ends != {END} or record.status not in ("COMPLETED", "RESUMED"):
        figures.broken.append(f"I5: run {run} is {record.status} and ended with {ends}")
    committed = Counter(a.branch for a in attempts if a.branch and a.outcome == "success")
    figures.commits = len(committed)
    figures.lost = len(COMMITTED - committed.keys())
    figures.duplicated = sum(count - 1 for count in committed.values())
    if committed.keys() != COMMITTED or figures.duplicated:
        figures.broken.append(f"I1: run {run} has committed {committed}")
    keys: dict[str, set[str]] = {}
    for branch, key in calls:
        keys.setdefault(branch, set()).add(key)
    if any(len(found) > 1 for found in keys.values()):
        figures.broken.append(f"I3: calls of run {run} have several idempotency keys: {keys}")
    recorded = Counter(a.branch for a in attempts)
    figures.repeated = sum(count - recorded[branch] for branch, count in Counter(b for b, _ in calls).items())
    return figures
