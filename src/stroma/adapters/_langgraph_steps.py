"""Nodes of LangGraph in a flow: those that are steps, tools among them, and those that are code of the body.

Of LangGraph's internals they need four keys of a node's config: without them no answer could reach an
``interrupt()``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import inspect
import itertools
import json
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any, Final, Literal, NamedTuple, TypedDict
from uuid import uuid4

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import var_child_runnable_config
from langgraph import errors
from langgraph._internal._constants import (
    CONFIG_KEY_CALL,
    CONFIG_KEY_RUNTIME,
    CONFIG_KEY_SCRATCHPAD,
    CONFIG_KEY_SEND,
)
from pydantic import BaseModel, JsonValue, RootModel, field_validator

from stroma.adapters._langchain import counting, result_of, update
from stroma.adapters._langgraph_values import Classes, NotStorable, decode, encode, messages_in
from stroma.adapters._state_views import violation
from stroma.adapters.guard import contract_for
from stroma.contracts.contract import NodeContract
from stroma.contracts.effects import NotDone, Unknown
from stroma.contracts.node import stroma_node
from stroma.engine.execution import current_node
from stroma.runner.flows.flow import Flow, current_flow

__all__ = ["BodyNode", "InterruptAnswer", "NodeOptions", "Options", "RecordedNode", "RecordedTools"]


class NodeOptions(TypedDict, total=False):
    """Options of a node, or of a tool.

    input, output: schemas of the state that a node gets and of its update; of a tool's arguments and its
        result.
    effect: it must not be called twice blindly, see :class:`NodeContract`.
    reconcile: function, async or not, of the node's state (the tool's arguments) and the idempotency key. It
        returns what the node or tool returned, NotDone or Unknown.
    """

    input: type[BaseModel]
    output: type[BaseModel]
    effect: bool
    reconcile: Callable[[Any, str], Any]


#: False: no step.
Options = NodeOptions | Literal[False]


class NodeInput(BaseModel):
    """Input of the step of a node: its state, with the newest message in place of a conversation.

    ``digest``: of the whole state. ``answers``: to the interrupts of the node so far.
    """

    state: JsonValue
    digest: str
    answers: list[JsonValue] = []


class ToolInput(BaseModel):
    """Input of the step of a tool."""

    tool: str
    arguments: JsonValue
    call_id: str | None = None
    answers: list[JsonValue] = []


class NodeOutput(BaseModel):
    """Output of a step: the end of the call, ``parts`` of the custom stream, and ``writes`` to the state."""

    update: JsonValue = None
    questions: list[JsonValue] = []
    refused: str | None = None
    parts: list[JsonValue] = []
    writes: list[JsonValue] = []


# ---------------------------------------------------------------------- nodes, in the body


class BodyNode(Runnable[Any, Any]):
    """A node that is not a step."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.name = inner, getattr(inner, "name", None)

    def invoke(self, input: Any, config: Any = None, **_: Any) -> Any:
        raise NotImplementedError  # In a flow graphs are called with astream().

    async def ainvoke(self, input: Any, config: Any = None, **_: Any) -> Any:
        async def call(answers: list[Any]) -> _CallEnd:
            return await _invoke(
                self.inner, input, _with_answers(config, answers), lambda: str(_body_flow().uuid())
            )

        return await _until_answered(call)


class RecordedNode(BodyNode):
    """A node that is a step."""

    def __init__(self, inner: Any, step_id: str, options: NodeOptions, classes: Classes) -> None:
        super().__init__(inner)
        self._step = _NodeStep(step_id, inner, options, classes)

    async def ainvoke(self, input: Any, config: Any = None, **_: Any) -> Any:
        state = self._step.stored(input, "takes")
        digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
        return await self._step.call(NodeInput(state=_shown(state), digest=digest), state, config)


class RecordedTools(BodyNode):
    """A node of tools: each call of one is a step, side by side."""

    def __init__(self, inner: Any, step_id: str, tools: dict[str, Options], classes: Classes) -> None:
        super().__init__(inner)
        self._steps = {
            name: _NodeStep(f"{step_id}.{name}", inner, options, classes, is_tool=True)
            for name, options in tools.items()
            if options is not False
        }

    async def ainvoke(self, input: Any, config: Any = None, **_: Any) -> Any:
        calls = _tool_calls_of(input, _messages_key_of(self.inner))
        if not calls:
            return await super().ainvoke(input, config)  # It says what is wrong.
        results = await asyncio.gather(*(self._call(call, state, config) for call, state in calls))
        updates = [part for result in results for part in (result if isinstance(result, list) else [result])]
        if not all(isinstance(update, dict) for update in updates):
            return updates
        messages = [message for update in updates for items in update.values() for message in items]
        is_list = isinstance(input, list) and isinstance(input[-1], BaseMessage)
        return messages if is_list else {_messages_key_of(self.inner): messages}

    async def _call(self, call: Any, input: Any, config: Any) -> Any:
        step = self._steps.get(call["name"])
        if step is None:  # It is not a step, or the model has made its name up.
            return await super().ainvoke(input, config)
        call_input = ToolInput(tool=call["name"], arguments=call["args"], call_id=call["id"])
        return await step.call(call_input, step.stored(input, "takes"), config)


def _messages_key_of(node: Any) -> str:
    key: str = getattr(node, "_messages_key", "messages")
    return key


def _tool_calls_of(input: Any, messages_key: str) -> list[tuple[Any, Any]]:
    """Return the calls that a node of tools makes, each with the input of a node that makes only this one."""
    if isinstance(input, list) and input and isinstance(input[-1], dict):
        return [(call, [call]) for call in input]
    if isinstance(input, dict) and "tool_call" in input:
        return [(input["tool_call"], input)]
    messages = input
    if not isinstance(input, list):
        messages = input.get(messages_key) if isinstance(input, dict) else getattr(input, messages_key, None)
    newest = next((one for one in reversed(messages or ()) if isinstance(one, AIMessage)), None)
    calls = [] if newest is None else newest.tool_calls
    return [(call, {"__type": "tool_call_with_context", "tool_call": call, "state": input}) for call in calls]


def _shown(state: Any) -> Any:
    """Return a state with the number and the newest of its messages: whole ones would grow as the square."""
    if isinstance(state, dict):
        return {key: _shown(item) for key, item in state.items()}
    if (
        isinstance(state, list)
        and state
        and all(isinstance(one, dict) and "@message" in one for one in state)
    ):
        return {"messages": len(state), "newest": state[-1]}
    return state


# ---------------------------------------------------------------------- steps


class _Work(NamedTuple):
    """The arguments of a call of a node. ``state``: in JSON form."""

    state: Any
    config: Any
    answers: list[Any]


#: Of the step around this code.
_WORK: ContextVar[_Work | None] = ContextVar("stroma_langgraph_work", default=None)


class _NodeStep:
    """The step of a node, or of a tool."""

    def __init__(
        self, step_id: str, inner: Any, options: NodeOptions, classes: Classes, *, is_tool: bool = False
    ) -> None:
        self._id, self._inner, self._classes, self._is_tool = step_id, inner, classes, is_tool
        self._options = options
        #: Of what the node takes and returns; that of the step is of its records.
        self._contract = contract_for(step_id, (options.get("input"), options.get("output")))
        contract: NodeContract[Any, Any] = NodeContract(
            node_id=step_id,
            input_schema=ToolInput if is_tool else NodeInput,
            output_schema=NodeOutput,
            role="tool" if is_tool else None,
            effect=options.get("effect", False),
            reconcile=self._look if "reconcile" in options else None,
        )

        async def perform(_: Any) -> Any:
            return await self._perform()

        self._node: Any = stroma_node(step_id, contract)(perform)

    def stored(self, value: Any, does: str) -> Any:
        """Return the JSON form of a value. Raises TypeError with the node and what it ``does`` with it."""
        try:
            return encode(value)
        except NotStorable as error:
            raise TypeError(
                f"node {self._id!r} {does} a {error}, which cannot be stored; use JSON data, "
                "messages, dataclasses or "
                "pydantic models, or make it no step: durable(graph, {name: False})"
            ) from error

    async def call(self, call_input: NodeInput | ToolInput, state: Any, config: Any) -> Any:
        """Call the node, in the body, and return its update."""

        async def call(answers: list[Any]) -> _CallEnd:
            flow, classes = _body_flow(), self._classes
            token = _WORK.set(_Work(state, config, list(answers)))
            try:
                output = await flow.step(self._node, call_input.model_copy(update={"answers": list(answers)}))
            finally:
                _WORK.reset(token)
            _send(config, decode(output.parts, classes), decode(output.writes, classes))
            return _CallEnd(decode(output.update, classes), output.questions, output.refused)

        return await _until_answered(call)

    async def _perform(self) -> Any:
        """Call the node, in the step, and return its output in JSON form."""
        work, node = _WORK.get(), current_node()
        assert work is not None
        parts: list[Any] = []
        writes: list[tuple[str, Any]] = []
        state = decode(work.state, self._classes)
        self._check("input", self._arguments_of(state) if self._is_tool else state)

        def write(part: Any) -> None:
            parts.append(self.stored(part, "streams"))
            node.emit(part, "custom")

        config = _config_of_step(work.config, work.answers, write, writes)
        with counting():
            end = await _invoke(self._inner, state, config, lambda: str(uuid4()))
        has_update = not end.questions and end.refused is None
        own = [write for write in writes if not write[0].startswith("__")]  # The others are of interrupt().
        return {
            "update": self._returned(end.update) if has_update else None,
            "questions": self.stored(list(end.questions), "asks"),
            "refused": end.refused,
            "parts": parts,
            "writes": self.stored(own, "writes"),
        }

    def _arguments_of(self, input: Any) -> Any:
        """Return the arguments of a call of a tool."""
        return (input[0] if isinstance(input, list) else input["tool_call"])["args"]

    def _returned(self, result: Any) -> Any:
        """Return what a node returned in JSON form. Raises ContractViolation."""
        message = next(messages_in(result), None) if self._is_tool else None
        self._check("output", update(result) if message is None else result_of(message))
        return self.stored(result, "returns")

    def _check(self, direction: Literal["input", "output"], view: Any) -> None:
        if direction in self._options:
            broken = violation(self._id, self._contract, direction, view)
            if broken is not None:
                raise broken

    async def _look(self, call: NodeInput | ToolInput, key: str) -> Any:
        """Return what ``reconcile`` says of a call."""
        work = _WORK.get()
        assert work is not None
        state = decode(work.state, self._classes)
        reconcile = self._options.get("reconcile")
        assert reconcile is not None
        answer = reconcile(self._arguments_of(state) if self._is_tool else state, key)
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, (NotDone, Unknown)):
            return answer
        if isinstance(call, ToolInput):
            if not isinstance(answer, ToolMessage):
                text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
                answer = ToolMessage(text, name=call.tool, tool_call_id=call.call_id)
            answer = {_messages_key_of(self._inner): [answer]}
        return {"update": self._returned(answer)}


# ---------------------------------------------------------------------- calls of nodes


class InterruptAnswer(RootModel[JsonValue]):
    """Answer to an ``interrupt()``: any JSON data but null."""

    @field_validator("root")
    @classmethod
    def _is_answer(cls, value: JsonValue) -> JsonValue:
        if value is None:
            raise ValueError("the answer to interrupt() must not be null")
        return value


class _CallEnd(NamedTuple):
    """The end of a call of a node.

    ``questions``: what it asks in place of an update. ``refused``: why it refuses the last answer.
    """

    update: Any = None
    questions: Sequence[Any] = ()
    refused: str | None = None


#: The error of an answer that the schema of an interrupt() refuses: of newer releases.
_is_invalid_resume: Callable[[BaseException], bool] = getattr(errors, "is_invalid_resume", lambda _: False)


def _body_flow() -> Flow:
    """Return the flow whose body calls a node."""
    flow = current_flow()
    assert flow is not None
    return flow


async def _until_answered(call: Callable[[list[Any]], Awaitable[_CallEnd]]) -> Any:
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
        answers.append((await _body_flow().wait_for(InterruptAnswer, reason=text)).root)


async def _invoke(inner: Any, state: Any, config: Any, make_id: Callable[[], str]) -> _CallEnd:
    """Call a node. The messages in its update have ids."""
    token = var_child_runnable_config.set(config)  # interrupt(), stream writers and models find it there.
    try:
        update = await inner.ainvoke(state, config)
    except errors.GraphInterrupt as error:
        interrupts: Any = error.args[0] if error.args else ()
        if len(interrupts) != 1:
            raise NotImplementedError(
                f"node {inner.name!r} calls a graph that asks {len(interrupts)} questions at once; "
                "add that graph as a node"
            ) from error
        return _CallEnd(questions=[interrupts[0].value])
    except errors.ParentCommand as error:  # Of a graph that the node calls.
        update = dataclasses.replace(error.args[0], graph=None)
    except Exception as error:
        if not _is_invalid_resume(error):
            raise
        return _CallEnd(refused=str(error))
    finally:
        var_child_runnable_config.reset(token)
    for message in messages_in(update):
        message.id = message.id or make_id()
    return _CallEnd(update)


def _with_answers(config: Any, answers: list[Any]) -> Any:
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


def _config_of_step(
    config: Any, answers: list[Any], write: Callable[[Any], object], writes: list[tuple[str, Any]]
) -> Any:
    """Return the config of a node in its step. ``write`` takes what it streams, ``writes`` its own writes."""

    def refuse_task(*_: Any, **__: Any) -> Any:
        node_id = current_node().node_id
        raise NotImplementedError(
            f"node {node_id!r} calls a @task; in a flow call its function without @task"
        )

    config = _with_answers(config, answers)
    configurable = config["configurable"]
    configurable[CONFIG_KEY_RUNTIME] = configurable[CONFIG_KEY_RUNTIME].override(stream_writer=write)
    configurable[CONFIG_KEY_SEND], configurable[CONFIG_KEY_CALL] = writes.extend, refuse_task
    # The streams of the body hear of a step when it has end.
    manager = config["callbacks"] = config["callbacks"].copy()
    streams = [handler for handler in manager.handlers if hasattr(handler, "tap_output_aiter")]
    for handler in streams:
        manager.remove_handler(handler)
    if streams or current_node().ctx.fire.takes_events:
        manager.add_handler(_STREAMS, inherit=True)
    return config


def _send(config: Any, parts: list[Any], writes: list[Any]) -> None:
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
