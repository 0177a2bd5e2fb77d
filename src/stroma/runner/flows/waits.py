"""Durable waits of a flow: for a time, or for the answer of a person."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from time import perf_counter_ns
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from stroma.checkpoint import Waiting, schema_ref
from stroma.contracts.schema import schema_of
from stroma.cost.usage import shown
from stroma.runner.flows.flow_run import FlowRun
from stroma.runner.flows.order import FlowCall
from stroma.runner.flows.suspension import EXPIRED, WITHDRAWN, OpenWait, text_of_time

__all__ = ["call_sleep", "call_wait_for", "wake_ms_of"]

AnswerT = TypeVar("AnswerT", bound=BaseModel)


def call_sleep(run: FlowRun, wake_ms: int, key: str | None) -> Coroutine[Any, Any, None]:
    """Return the coroutine of a timer, which is numbered in the task that calls it."""
    return _sleep(run, wake_ms, run.number_call("flow.sleep", "sleep", key, "!"))


async def _sleep(run: FlowRun, wake_ms: int, call: FlowCall) -> None:
    driver, branch = run.driver, run.prefix + call.identity

    async def work() -> bool:
        recorded = await run.find_recorded(call.identity, None) if run.records else None
        wake = wake_ms if recorded is None else cast("int", recorded.data)
        if recorded is None:
            await run.before_live(call.identity)
            driver.journal.note_wake(run.position, branch, wake, driver.clock_ms())
            await driver.waits.flush()
        elif wake <= driver.now_ms():
            return True
        wait = driver.waits.add(OpenWait(branch, f"sleeping until {text_of_time(wake)}", wake_ms=wake))
        try:
            assert wait.done is not None
            await wait.done
        finally:
            driver.waits.remove(wait)
        return False

    await _wait(run, work, call)


def call_wait_for(
    run: FlowRun, answer: type[AnswerT], reason: str, wake_ms: int | None, key: str | None
) -> Coroutine[Any, Any, AnswerT]:
    """Return the coroutine of a question, which is numbered in the task that calls it."""
    if not (isinstance(answer, type) and issubclass(answer, BaseModel)):
        raise TypeError(f"flow.wait_for takes a pydantic model, a RootModel for plain values, got {answer!r}")
    if not isinstance(reason, str):
        raise TypeError(f"the reason of flow.wait_for must be a string, got {shown(reason)}")
    call = run.number_call("flow.wait_for", "wait", key, "!")
    branch = run.prefix + call.identity
    question = Waiting(run.position, branch, key or answer.__name__, reason, schema_ref(answer))
    return _wait_for(run, answer, question, wake_ms, call)


async def _wait_for(
    run: FlowRun, answer: type[AnswerT], question: Waiting, wake_ms: int | None, call: FlowCall
) -> AnswerT:
    driver, branch = run.driver, question.branch
    outcomes: list[Any] = []
    questions: list[Waiting] = []

    async def work() -> bool:
        recorded = await run.find_recorded(call.identity, None) if run.records else None
        if recorded is not None and recorded.kind in ("answer", "expired"):
            outcomes.append(EXPIRED if recorded.kind == "expired" else recorded.data)
            return True
        wake = wake_ms if recorded is None else cast("int", recorded.data)
        earlier = driver.ctx.session.waiting.get((run.position, branch))
        is_same = earlier is not None and (earlier.reason, earlier.schema_ref) == (
            question.reason,
            question.schema_ref,
        )
        if not is_same or (earlier is not None and earlier.payload == WITHDRAWN):
            await run.before_live(call.identity)
            if wake is not None and recorded is None:
                driver.journal.note_wake(run.position, branch, wake, driver.clock_ms())
            questions.append(question)
            await driver.waits.ask(question)
        else:
            questions.append(question)
        wait = driver.waits.add(OpenWait(branch, question.reason, wake_ms=wake, question=question))
        try:
            assert wait.done is not None
            outcome = await wait.done
            if outcome is EXPIRED and await driver.waits._take_answers([wait]):
                outcome = cast("Any", driver.ctx.session.waiting)[run.position, branch].payload
            outcomes.append(outcome)
            if outcome is EXPIRED:
                driver.journal.note_expired(run.position, branch)
                # An answer that comes later is refused.
                await driver.waits.ask(question._replace(payload=b"null"))
        finally:
            driver.waits.remove(wait)
        return False

    await _wait(run, work, call, questions)
    (outcome,) = outcomes
    if outcome is EXPIRED:
        raise TimeoutError(f"no answer came in time: {question.reason}")
    return cast("AnswerT", schema_of(answer).decode(outcome))


async def _wait(
    run: FlowRun,
    work: Callable[[], Coroutine[Any, Any, bool]],
    call: FlowCall,
    questions: Sequence[Waiting] = (),
) -> None:
    """Wait, and hand out the result in turn.

    ``work`` returns True if the wait had ended when the run was resumed. ``questions``: those of the call, once they are stored.
    """
    if run.driver.closing or run.has_ended:
        run.refuse(call.identity)
    run.alive += 1
    begin = perf_counter_ns()
    task = asyncio.current_task()
    assert task is not None
    run.open[call.identity] = task
    try:
        await run.take_turn(call, await work())
    except asyncio.CancelledError:
        if run.note_cancelled(call.identity, begin, None):
            for question in questions:  # An answer that comes later is refused.
                await run.driver.waits.ask(question._replace(payload=WITHDRAWN))
        raise
    finally:
        run.alive -= 1
        run.open.pop(call.identity, None)
        run.look_for_siblings()


def wake_ms_of(duration: timedelta, until: datetime | None, now_ms: Callable[[], int]) -> int:
    """Return the end of a wait, in ms since the epoch. Raises ValueError for a duration and a time at once."""
    if until is None:
        return now_ms() + max(0, round(duration.total_seconds() * 1000))
    if duration:
        raise ValueError("pass a duration or until=, not both")
    if until.tzinfo is None:
        raise ValueError(f"until must be an aware datetime, got {until!r}; pass datetime(..., tzinfo=UTC)")
    return round(until.timestamp() * 1000)
