"""Durable waits of a flow: for a time, or for the answer of a person."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from stroma.checkpoint import PipelineChanged
from stroma.contracts.schema import schema_of
from stroma.cost.usage import shown
from stroma.engine.attempt import NodeAttempt
from stroma.engine.execution import decode_answer
from stroma.engine.outcome import Place
from stroma.engine.questions import make_question
from stroma.runner.flows.call import FlowCall
from stroma.runner.flows.driver import FlowDriver
from stroma.runner.flows.endings import end_of
from stroma.runner.flows.path import FlowPath
from stroma.runner.flows.suspension import text_of_time
from stroma.trace.events import MarkKind

__all__ = ["NOTHING", "call_sleep", "call_wait_for", "wake_ms_of"]

AnswerT = TypeVar("AnswerT", bound=BaseModel)


def call_sleep(path: FlowPath, wake_ms: int) -> Coroutine[Any, Any, None]:
    """Return the coroutine of a sleep: a timer of the body that those who look at the run see."""
    path.sleep_count += 1
    return _sleep(path, wake_ms, f"{path.prefix}!sleep#{path.sleep_count - 1}")


async def _sleep(path: FlowPath, wake_ms: int, branch: str) -> None:
    driver = path.driver
    reason, began_ms = f"until {text_of_time(wake_ms)}", driver.clock_ms()
    driver.journal.note_wait(path.position, branch, wake_ms, began_ms)
    driver.sleeps[branch] = f"sleeping {reason}"
    kind: MarkKind = "sleeping"
    try:
        await asyncio.sleep(wake_ms / 1000 - driver.loop.time())
        kind = "slept"
    finally:
        del driver.sleeps[branch]
        if driver.is_live:
            driver.mark(kind, branch, f"sleep {reason}", began_ms)


def call_wait_for(
    path: FlowPath, answer: type[AnswerT], reason: str, wake_ms: int | None, key: str | None
) -> Coroutine[Any, Any, AnswerT]:
    """Return the coroutine of a question."""
    if not (isinstance(answer, type) and issubclass(answer, BaseModel)):
        raise TypeError(f"flow.wait_for takes a pydantic model, a RootModel for plain values, got {answer!r}")
    if not isinstance(reason, str):
        raise TypeError(f"the reason of flow.wait_for must be a string, got {shown(reason)}")
    call = FlowQuestion(path, path.identify("wait", key, "!"), path.node, NOTHING)
    at = Place(path.position, call.branch)
    call.question = make_question(path.ctx.session, at, path.node.node_id, reason, answer)
    call.driver, call.wake_ms = path.driver, wake_ms
    return _wait_for(call, answer)


NOTHING: Any = None  # The input of a wait.


class FlowQuestion(FlowCall):
    """A question of a flow to a person."""

    driver: FlowDriver

    def perform(self, cancelling: int = 0, attempt: NodeAttempt | None = None) -> Coroutine[Any, Any, Any]:
        return self.driver.open_question(self)

    async def restore(self) -> Any:
        waiting = self.scope.ctx.session.waiting.get((self.scope.position, self.branch))
        return None if waiting is None else waiting.payload

    def take(self) -> Any:
        return self.outcome


async def _wait_for(call: FlowQuestion, answer: type[AnswerT]) -> AnswerT:
    driver, question = call.driver, call.question
    assert question is not None
    began_ms = driver.clock_ms()
    if call.wake_ms is not None:
        driver.journal.note_wait(call.scope.position, call.branch, call.wake_ms, began_ms)
    kind: MarkKind = "open"
    timeout = asyncio.timeout_at(None if call.wake_ms is None else call.wake_ms / 1000)
    try:
        async with timeout:
            payload = await driver.request(call)
        kind = "answered"
    except TimeoutError as error:
        if not timeout.expired():
            raise
        kind = "expired"
        driver.journal.note_expired(call.scope.position, call.branch)
        raise TimeoutError(f"no answer came in time: {question.reason}") from error
    finally:
        if driver.is_live:
            driver.mark(kind, call.branch, question.reason, began_ms)
    answered = driver.ctx.session.waiting.get((question.position, question.branch), question)
    try:
        return cast("AnswerT", decode_answer(schema_of(answer), answered._replace(payload=payload)))
    except PipelineChanged as error:
        driver.stop(end_of(error, call.node))
        return cast("AnswerT", await driver.loop.create_future())


def wake_ms_of(duration: timedelta, until: datetime | None, now_ms: Callable[[], int]) -> int:
    """Return the end of a wait, in ms since the epoch. Raises ValueError for a duration and a time at once."""
    if until is None:
        return now_ms() + max(0, round(duration.total_seconds() * 1000))
    if duration:
        raise ValueError("pass a duration or until=, not both")
    if until.tzinfo is None:
        raise ValueError(f"until must be an aware datetime, got {until!r}; pass datetime(..., tzinfo=UTC)")
    return round(until.timestamp() * 1000)
