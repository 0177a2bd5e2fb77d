"""A flow whose processes are killed at any instant: branches, a loop, parallel steps, a map, a child, a sleep
and a question.

It must show: each step is committed once, under one idempotency key, nothing that was committed is called
again, and the end is that of a flow that was left alone.
"""

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from tests.chaos.check import Figures
from tests.chaos.rounds import ROUND_SECONDS, Pace, Place, apart, processes

from stroma import (
    FailureClass,
    FailurePolicy,
    Flow,
    RunStatus,
    StepFailed,
    StoreError,
    StromaRunner,
    current_node,
    open_store,
    stroma_flow,
    stroma_node,
)

#: Steps that may be under way when a process is killed.
AT_ONCE = 4
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


def work(url: str, diary: str, run: str, seed: str) -> None:
    """Bring a run to its end. Each call is noted in a file, in one write that survives a kill."""
    file = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(line: str) -> None:
        os.write(file, f"{line}\n".encode())

    async def main() -> None:
        opened: Any = open_store(url)
        async with opened as store:
            runner = StromaRunner.quick(
                store=store,
                run_id=run,
                resume=True,
                if_exists="return",
                if_running="take_over",
                max_recoveries=10**6,
                policy_map={kind: FailurePolicy(max_retries=0) for kind in FailureClass},
            )
            f = make_flow(note, random.Random(seed))
            while (result := await runner.run(f, Number())).status is RunStatus.SUSPENDED:
                with contextlib.suppress(StoreError):  # It was answered before a kill.
                    await runner.signal(run, Text(text="yes"))
            result.raise_for_status()
            note(f"end {result.output.text}")

    asyncio.run(main())


def flow(place: Place, name: str, number: int, draw: random.Random, pace: Pace) -> Figures:
    """A process that runs a flow is killed at any instant, again and again, and started anew."""
    diary = place.diary(number)
    with processes(place, number) as instance:

        def start(life: int) -> int:
            return instance.call(lambda: work(instance.url, diary, name, f"{name} {life}"))

        pid = start(0)
        for life in range(1, draw.randint(2, 6)):
            time.sleep(draw.uniform(0, pace.seconds))
            instance.poll()
            instance.kill(pid)
            pid = start(life)
        if not instance.wait(ROUND_SECONDS):
            instance.broken.append(f"I5: run {name} does not end")
        pace.learn(instance)
        figures = apart(lambda: check_flow(instance.url, diary, name))
        figures.rounds = figures.runs = 1
        figures.kills = instance.kills
        figures.broken += instance.broken
        if figures.repeated > AT_ONCE * instance.kills:
            figures.broken.append(f"I3: {figures.repeated} calls repeated after {instance.kills} kills")
        return figures


def check_flow(url: str, diary: str, run: str) -> Figures:
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


FAULTS = {"flow": flow}
