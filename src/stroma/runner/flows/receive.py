"""Waits of a flow for a message."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel

from stroma.checkpoint import PipelineChanged
from stroma.checkpoint.entries import SentMessage
from stroma.checkpoint.flow_notes import message_label
from stroma.contracts.codec import decode_raw
from stroma.contracts.contract import check_id
from stroma.contracts.schema import Schema, describe_error, schema_of
from stroma.runner.flows.call import FlowCall
from stroma.runner.flows.driver import FlowDriver
from stroma.runner.flows.endings import end_of
from stroma.runner.flows.errors import StepFailed
from stroma.runner.flows.path import FlowPath
from stroma.runner.flows.waits import NOTHING
from stroma.trace.events import MarkKind

__all__ = ["call_receive"]

MessageT = TypeVar("MessageT", bound=BaseModel)


def call_receive(
    path: FlowPath, message: type[MessageT], topic: str, wake_ms: int | None, key: str | None
) -> Coroutine[Any, Any, MessageT]:
    """Return the coroutine of a wait for a message."""
    if not (isinstance(message, type) and issubclass(message, BaseModel)):
        raise TypeError(f"flow.receive takes a pydantic model, a RootModel for plain values, got {message!r}")
    call = FlowReceive(path, path.identify("receive", key, "?"), path.node, NOTHING)
    if topic != "":
        check_id(topic, "topic")
    call.driver, call.topic, call.wake_ms, call.schema = path.driver, topic, wake_ms, schema_of(message)
    return _receive(call)


class FlowReceive(FlowCall):
    """A wait of a flow for a message."""

    driver: FlowDriver
    schema: Schema

    def problem_of(self, message: SentMessage) -> str | None:
        try:
            self.decode(message)
        except ValueError as error:
            return f"message {message.id!r} is not a {self.schema.model.__name__}: {describe_error(error)[0]}"
        return None

    def decode(self, message: SentMessage) -> BaseModel:
        """Return a message as a model. Raises ValueError."""
        try:
            return self.schema.decode(message.payload)
        except ValueError:
            if not self.schema.traits.has_validation_aliases:
                raise
            return self.schema.validate(
                decode_raw(message.payload)
            )  # JSON of a page or a command, with the aliases.

    def take(self) -> Any:
        return super().take() if type(self.outcome) is StepFailed else self.outcome


async def _receive(call: FlowReceive) -> Any:
    driver, position, topic = call.driver, call.scope.position, call.topic or ""
    began_ms = driver.clock_ms()
    driver.journal.note_receive(position, call.branch, topic, began_ms)
    if call.wake_ms is not None:
        driver.journal.note_wait(position, call.branch, call.wake_ms, began_ms)
    kind: MarkKind = "received"
    timeout = asyncio.timeout_at(None if call.wake_ms is None else call.wake_ms / 1000)
    try:
        async with timeout:
            message = await driver.request(call)
    except asyncio.CancelledError:
        kind = "receiving"
        if driver.stopping is None:  # Else the run waits on.
            driver.journal.forget_receive(position, call.branch)
        raise
    except TimeoutError as error:
        if not timeout.expired():
            raise
        kind = "missed"
        driver.journal.note_expired(position, call.branch)
        raise TimeoutError(f"no {message_label(topic)} came in time") from error
    finally:
        if driver.is_live:
            driver.mark(kind, call.branch, message_label(topic), began_ms)
    try:
        return call.decode(message)
    except ValueError as error:
        why, cause = describe_error(error)
        changed = PipelineChanged(
            f"the accepted message {message.id!r} is not a {call.schema.model.__name__}: {why}; restore a class that accepts it"
        )
        changed.__cause__ = cause
        driver.stop(end_of(changed, call.node))
        return await driver.loop.create_future()
