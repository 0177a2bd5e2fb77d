"""Durable waits of a flow: for a time, the answer of a person, or a message."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import datetime, timedelta
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel

from stroma.checkpoint import PipelineChanged
from stroma.checkpoint.entries import SentMessage
from stroma.checkpoint.flow_notes import message_label
from stroma.contracts.codec import decode_raw, describe_error
from stroma.contracts.contract import check_id
from stroma.contracts.schema import Schema, schema_of
from stroma.cost.usage import shown
from stroma.engine.execution import decode_answer
from stroma.engine.outcome import Place
from stroma.engine.questions import make_question
from stroma.runner.flows.call import FlowCall
from stroma.runner.flows.driver import FlowDriver
from stroma.runner.flows.endings import StepFailed, end_of
from stroma.runner.flows.path import FlowPath
from stroma.runner.flows.suspension import text_of_time
from stroma.runner.pipeline import to_ms
from stroma.trace.events import MarkKind

ModelT = TypeVar("ModelT", bound=BaseModel)

_NOTHING: Any = None  # The input of a wait.


def wake_ms_of(path: FlowPath, duration: float | timedelta | None, until: datetime | None) -> int | None:
    """Return the end of a wait, in ms since the epoch; None without one. Raises ValueError for two ends.

    A negative duration is over at once.
    """
    if until is not None:
        if duration:
            raise ValueError("pass a duration or until=, not both")
        return to_ms(until, 0, "until")
    if duration is None:
        return None
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
    return to_ms(0 if seconds < 0 else seconds, path.driver.time_ms(), "a wait")


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
    path: FlowPath, answer: type[ModelT], reason: str, wake_ms: int | None, key: str | None
) -> Coroutine[Any, Any, ModelT]:
    """Return the coroutine of a question."""
    _check_class("flow.wait_for", answer)
    if not isinstance(reason, str):
        raise TypeError(f"the reason of flow.wait_for must be a string, got {shown(reason)}")
    call = _Question(path, path.identify("wait", key, "!"), path.node, _NOTHING)
    at = Place(path.position, call.branch)
    reason = path.ctx.redactor.redact_question(reason, of_flow=True)
    call.question = make_question(path.ctx.session, at, path.node.node_id, reason, answer)
    call.driver, call.wake_ms, call.schema, call.label = path.driver, wake_ms, schema_of(answer), reason
    return _wait(call)


def call_receive(
    path: FlowPath, message: type[ModelT], topic: str, wake_ms: int | None, key: str | None
) -> Coroutine[Any, Any, ModelT]:
    """Return the coroutine of a wait for a message."""
    _check_class("flow.receive", message)
    call = _Receive(path, path.identify("receive", key, "?"), path.node, _NOTHING)
    if topic != "":
        check_id(topic, "topic")
    call.driver, call.topic, call.wake_ms = path.driver, topic, wake_ms
    call.schema, call.label = schema_of(message), message_label(topic)
    return _wait(call)


def _check_class(method: str, model: Any) -> None:
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise TypeError(f"{method} takes a pydantic model, a RootModel for plain values, got {model!r}")


class _Wait(FlowCall):
    """A wait of a flow that the run is suspended for. ``label``: what it waits for, as the trace shows it."""

    driver: FlowDriver
    schema: Schema
    label: str
    #: While it is pending, at its end, and if it expired.
    kinds: ClassVar[tuple[MarkKind, MarkKind, MarkKind]]

    def take(self) -> Any:
        return super().take() if type(self.outcome) is StepFailed else self.outcome

    def decode(self, outcome: Any) -> Any:
        """Return the outcome as the class that the body asked for. Raises PipelineChanged."""
        raise NotImplementedError

    def late(self) -> str:
        """Return the text of the TimeoutError."""
        raise NotImplementedError


class _Question(_Wait):
    """A question of a flow to a person."""

    kinds = ("open", "answered", "expired")

    def perform(self, cancelling: int = 0) -> Coroutine[Any, Any, Any]:
        return self.driver.open_question(self)

    async def restore(self) -> Any:
        waiting = self.scope.ctx.session.waiting.get((self.scope.position, self.branch))
        return None if waiting is None else waiting.payload

    def decode(self, outcome: Any) -> Any:
        assert self.question is not None
        question = self.scope.ctx.session.waiting.get((self.scope.position, self.branch), self.question)
        return decode_answer(self.schema, question._replace(payload=outcome))

    def late(self) -> str:
        return f"no answer came in time: {self.label}"


class _Receive(_Wait):
    """A wait of a flow for a message."""

    kinds = ("receiving", "received", "missed")

    def problem_of(self, message: SentMessage) -> str | None:
        try:
            self._read(message)
        except ValueError as error:
            redactor, state = self.scope.ctx.redactor, decode_raw(message.payload)
            why = redactor.redact_message(describe_error(error)[0], [state])
            return f"message {message.id!r} is not a {self.schema.model.__name__}: {why}"
        return None

    def decode(self, outcome: Any) -> Any:
        try:
            return self._read(outcome)
        except ValueError as error:
            why, cause = describe_error(error)
            raise PipelineChanged(
                f"the accepted message {outcome.id!r} is not a {self.schema.model.__name__}: {why}; "
                "restore a class that accepts it"
            ) from cause

    def late(self) -> str:
        return f"no {self.label} came in time"

    def _read(self, message: SentMessage) -> BaseModel:
        try:
            return self.schema.decode(message.payload)
        except ValueError:
            if not self.schema.traits.has_validation_aliases:
                raise
            # JSON of a page or a command, with the aliases.
            return self.schema.validate(decode_raw(message.payload))


async def _wait(call: _Wait) -> Any:
    driver, position, branch = call.driver, call.scope.position, call.branch
    began_ms = driver.clock_ms()
    if call.topic is not None:
        driver.journal.note_receive(position, branch, call.topic, began_ms)
    if call.wake_ms is not None:
        driver.journal.note_wait(position, branch, call.wake_ms, began_ms)
    pending, kind, expired = call.kinds
    timeout = asyncio.timeout_at(None if call.wake_ms is None else call.wake_ms / 1000)
    try:
        async with timeout:
            outcome = await driver.request(call)
    except asyncio.CancelledError:
        kind = pending
        if call.topic is not None and driver.stopping is None:  # Else the run waits on.
            driver.journal.forget_receive(position, branch)
        raise
    except TimeoutError as error:
        if not timeout.expired():
            raise
        kind = expired
        driver.journal.note_expired(position, branch)
        raise TimeoutError(call.late()) from error
    finally:
        if driver.is_live:
            driver.mark(kind, branch, call.label, began_ms)
    try:
        decoded, redactor = call.decode(outcome), call.scope.ctx.redactor
        redactor.note_secrets(decoded)
        redactor.note_seen(decoded)
        return decoded
    except PipelineChanged as error:
        driver.stop(end_of(error, call.node))
        return await driver.loop.create_future()
