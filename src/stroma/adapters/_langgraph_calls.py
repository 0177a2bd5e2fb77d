"""Calls of nodes of LangGraph in a flow: their config, their interrupts, and what they stream.

Of LangGraph's internals they need four keys of a node's config: without them no answer could reach an
``interrupt()``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables.config import var_child_runnable_config
from langgraph import errors
from langgraph._internal._constants import (
    CONFIG_KEY_CALL,
    CONFIG_KEY_RUNTIME,
    CONFIG_KEY_SCRATCHPAD,
    CONFIG_KEY_SEND,
)
from pydantic import JsonValue, RootModel, field_validator

from stroma.adapters._langgraph_values import messages_in
from stroma.engine.execution import current_node
from stroma.runner.flows.flow import Flow, current_flow

__all__ = [
    "CallEnd",
    "InterruptAnswer",
    "body_flow",
    "config_of_step",
    "invoke",
    "send",
    "until_answered",
    "with_answers",
]


class InterruptAnswer(RootModel[JsonValue]):
    """Answer to an ``interrupt()``: any JSON data but null."""

    @field_validator("root")
    @classmethod
    def _is_answer(cls, value: JsonValue) -> JsonValue:
        if value is None:
            raise ValueError("the answer to interrupt() must not be null")
        return value


class CallEnd(NamedTuple):
    """The end of a call of a node.

    ``questions``: what it asks in place of an update. ``refused``: why it refuses the last answer.
    """

    update: Any = None
    questions: Sequence[Any] = ()
    refused: str | None = None


#: The error of an answer that the schema of an interrupt() refuses: of newer releases.
_is_invalid_resume: Callable[[BaseException], bool] = getattr(errors, "is_invalid_resume", lambda _: False)


def body_flow() -> Flow:
    """Return the flow whose body calls a node."""
    flow = current_flow()
    assert flow is not None
    return flow


async def until_answered(call: Callable[[list[Any]], Awaitable[CallEnd]]) -> Any:
    """Call a node until it needs no further answer of a person, and return its update."""
    answers: list[Any] = []
    reason = ""
    while True:
        end = await call(answers)
        if end.refused is not None:
            answers.pop()
            text = f"{reason} (the last answer was refused: {end.refused})"
        elif end.questions:
            (question,) = end.questions
            reason = text = (
                question if isinstance(question, str) else json.dumps(question, ensure_ascii=False)
            )
        else:
            return end.update
        answers.append((await body_flow().wait_for(InterruptAnswer, reason=text)).root)


async def invoke(inner: Any, state: Any, config: Any, make_id: Callable[[], str]) -> CallEnd:
    """Call a node. The messages in its update have ids."""
    token = var_child_runnable_config.set(config)  # interrupt(), stream writers and models find it there.
    try:
        update = await inner.ainvoke(state, config)
    except errors.GraphInterrupt as error:
        interrupts: Any = error.args[0] if error.args else ()
        if len(interrupts) != 1:
            raise NotImplementedError(
                f"node {inner.name!r} calls a graph that asks {len(interrupts)} questions at once; add that graph as a node"
            ) from error
        return CallEnd(questions=[interrupts[0].value])
    except errors.ParentCommand as error:  # Of a graph that the node calls.
        update = dataclasses.replace(error.args[0], graph=None)
    except Exception as error:
        if not _is_invalid_resume(error):
            raise
        return CallEnd(refused=str(error))
    finally:
        var_child_runnable_config.reset(token)
    for message in messages_in(update):
        message.id = message.id or make_id()
    return CallEnd(update)


def with_answers(config: Any, answers: list[Any]) -> Any:
    """Return the config of a node whose interrupts return answers, in the order in which they are called."""
    pending, configurable = list(answers), config["configurable"]

    def take(consume: bool = False) -> Any:
        return (pending.pop(0) if consume else pending[0]) if pending else None

    scratchpad = dataclasses.replace(
        configurable[CONFIG_KEY_SCRATCHPAD],
        resume=[],
        get_null_resume=take,
        interrupt_counter=itertools.count().__next__,
    )
    return {**config, "configurable": {**configurable, CONFIG_KEY_SCRATCHPAD: scratchpad}}


def config_of_step(
    config: Any, answers: list[Any], write: Callable[[Any], object], writes: list[tuple[str, Any]]
) -> Any:
    """Return the config of a node in its step. ``write``: takes what it streams; ``writes``: get what it writes itself."""

    def refuse_task(*_: Any, **__: Any) -> Any:
        node_id = current_node().node_id
        raise NotImplementedError(
            f"node {node_id!r} calls a @task; in a flow call its function without @task"
        )

    config = with_answers(config, answers)
    configurable = config["configurable"]
    configurable[CONFIG_KEY_RUNTIME] = configurable[CONFIG_KEY_RUNTIME].override(stream_writer=write)
    configurable[CONFIG_KEY_SEND], configurable[CONFIG_KEY_CALL] = writes.extend, refuse_task
    # The streams of the body hear of a step when it has end.
    manager = config["callbacks"] = config["callbacks"].copy()
    streams = [handler for handler in manager.handlers if hasattr(handler, "tap_output_aiter")]
    for handler in streams:
        manager.remove_handler(handler)
    if streams or current_node().ctx.takes_events:
        manager.add_handler(_STREAMS, inherit=True)
    return config


def send(config: Any, parts: list[Any], writes: list[Any]) -> None:
    """Send to the streams of the body, and to the state, what a node has sent in its step."""
    configurable = config["configurable"]
    for part in parts:
        configurable[CONFIG_KEY_RUNTIME].stream_writer(part)
    configurable[CONFIG_KEY_SEND](writes)


class _Streams(BaseCallbackHandler):
    """Has models stream, so that the counter of a step emits their text."""

    run_inline = True

    def tap_output_aiter(self, run_id: Any, output: Any) -> Any:
        """Return the output: LangChain takes a handler with this method for one that streams."""
        return output

    tap_output_iter = tap_output_aiter


_STREAMS: Final = _Streams()
