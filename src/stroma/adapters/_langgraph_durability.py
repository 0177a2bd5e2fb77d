"""LangGraph in a flow: each node of a graph, and each call of a tool, is a step of the flow around it.

Of LangGraph's internals it needs four keys of a node's config: without them no answer could reach an
``interrupt()``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypedDict, TypeVar, cast
from uuid import uuid4

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import merge_configs, var_child_runnable_config
from langgraph import errors
from langgraph._internal._constants import (
    CONFIG_KEY_CALL,
    CONFIG_KEY_RUNTIME,
    CONFIG_KEY_SCRATCHPAD,
    CONFIG_KEY_SEND,
)
from langgraph.channels import BinaryOperatorAggregate
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

try:
    from langgraph.prebuilt import ToolNode
except ImportError:  # Releases of it need a newer LangGraph than they say. With those nobody has such a node.
    ToolNode = ()
from pydantic import BaseModel, ConfigDict, JsonValue, RootModel, field_validator, model_validator

from stroma.adapters._durable_steps import check_options, perform_step, work_node
from stroma.adapters._langchain import counting, result_of, update
from stroma.adapters._langgraph_values import Classes, NotStorable, classes_in, decode, encode, messages_in
from stroma.adapters._state_views import violation
from stroma.adapters.guard import UnknownNode, contract_for
from stroma.contracts.contract import NotDone, Unknown
from stroma.engine.execution import AGENT, AgentRun, current_node, running_agent
from stroma.runner.flows.body_loop import WITHOUT_THREADS, BodyLoop
from stroma.runner.flows.flow import Flow, current_flow

G = TypeVar("G")
_END: Final = object()
#: The name of a graph that has none.
_UNNAMED: Final = "LangGraph"


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


class InterruptAnswer(RootModel[JsonValue]):
    """Answer to an ``interrupt()``: any JSON data but null."""

    @field_validator("root")
    @classmethod
    def _is_answer(cls, value: JsonValue) -> JsonValue:
        if value is None:
            raise ValueError("the answer to interrupt() must not be null")
        return value


def durable(graph: G, nodes: Mapping[str, Options] | None = None) -> G:
    """Return a compiled graph that is durable in the body of a flow.

    There each node is a step, and so is each call of a tool by a ToolNode, with everything that a step has.
    Policies and timeouts go by their ids: "search" for a node, "sub.search" for one of a subgraph,
    "tools.lookup" for a tool, and with the name of the graph in front if it has one
    (``compile(name="triage")``: "triage.search"). ``interrupt()`` is a question of the flow, answered with an
    InterruptAnswer. Edges and reducers run in the body. Anywhere else the graph is as it was.

    Args:
        graph: of ``StateGraph.compile()``, ``create_agent`` and the like.
        nodes: options by the ids without the name of the graph. False: no step, but code of the body.

    Raises TypeError for another object, unknown options, and an effect whose ToolNode handles its errors;
    UnknownNode for an id that the graph does not have.
    """
    target: Any = graph
    if not isinstance(graph, CompiledStateGraph):
        raise TypeError(
            f"durable() takes a compiled StateGraph, got {type(graph).__name__}; call compile() "
            "first, and write what an "
            "@entrypoint does as a flow"
        )
    if hasattr(graph, "_stroma_kind"):
        raise TypeError("durable() takes a graph without a guard; in a flow its nodes are steps anyway")
    parts = _Parts(nodes or {})
    inside = parts.in_flow(target, "" if target.name == _UNNAMED else f"{target.name}.", "")
    parts.check()
    kind: Any = type(graph)

    def stream(self: Any, input: Any, config: Any = None, **kwargs: Any) -> Any:
        if current_flow() is not None:
            raise TypeError(
                f"graph {self.name!r} was called with invoke() or stream() in a flow; use ainvoke()"
            )
        return kind.stream(self, input, config, **kwargs)

    def astream(self: Any, input: Any, config: Any = None, **kwargs: Any) -> Any:
        if current_flow() is None:
            return kind.astream(self, input, config, **kwargs)
        if parts.unfit or kwargs.get("interrupt_before") or kwargs.get("interrupt_after"):
            raise ValueError(
                f"graph {parts.unfit or self.name!r} has a checkpointer, interrupt_before or "
                "interrupt_after; in a flow "
                "the journal has its steps: compile it without, and call interrupt() in a node"
            )
        agent = AgentRun(self.name, AGENT.get()) if self.name != _UNNAMED else AGENT.get()
        return _in_body(inside.astream(input, merge_configs(self.config, config), **kwargs), agent)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_stroma_in_flow": inside}
    # A class, since LangGraph copies graphs by their attributes.
    copied = target.copy()
    copied.__class__ = type(kind.__name__, (kind,), names | {"stream": stream, "astream": astream})
    return cast("G", copied)


async def _in_body(parts: Any, agent: AgentRun | None) -> AsyncIterator[Any]:
    """Iterate over the stream of a graph, whose plain functions (edges, above all) run in the body."""
    loop = cast("BodyLoop", asyncio.get_running_loop())
    async with contextlib.aclosing(parts):
        while True:
            token = WITHOUT_THREADS.set(True)
            try:
                with running_agent(agent):
                    part = await anext(parts, _END)
            finally:
                WITHOUT_THREADS.reset(token)
                asyncio.set_event_loop(loop.outer)  # LangGraph has set that of the body.
            if part is _END:
                return
            yield part


class _Parts:
    """Makes the graph that runs in a flow. ``unfit``: name of a graph in it that cannot."""

    def __init__(self, options: Mapping[str, Options]) -> None:
        self._options = options
        self._known: set[str] = set()
        self.unfit: str | None = None

    def in_flow(self, graph: Any, prefix: str, path: str) -> Any:
        """Return a copy of a graph. ``prefix``: of ids; ``path``: without the name of the outermost graph."""
        if graph.checkpointer or graph.interrupt_before_nodes or graph.interrupt_after_nodes:
            self.unfit = graph.name
        classes = classes_in(*graph.builder.schemas)
        nodes = {
            name: node if name.startswith("__") else self._node(node, prefix + name, path + name, classes)
            for name, node in graph.nodes.items()
        }
        channels = {name: _with_same_ids(channel) for name, channel in graph.channels.items()}
        # What repeats, skips or stores nodes is left to the flow.
        return graph.copy({"nodes": nodes, "channels": channels, "cache": None, "retry_policy": ()})

    def _node(self, node: Any, step_id: str, path: str, classes: Classes) -> Any:
        bound = node.bound
        if not isinstance(bound, Pregel):
            bound = self._bound(bound, step_id, path, classes)
        elif not hasattr(bound, "_stroma_in_flow"):  # Else it has options of its own.
            bound = self.in_flow(bound, f"{step_id}.", f"{path}.")
        without = {"retry_policy": None, "cache_policy": None, "timeout": None}
        changed = {key: value for key, value in without.items() if hasattr(node, key)}
        return node.copy({"bound": bound, **changed})

    def _bound(self, bound: Any, step_id: str, path: str, classes: Classes) -> Any:
        options = self._options_of(path, {})
        if isinstance(bound, ToolNode):
            tools: dict[str, Options] = {
                tool: self._options_of(f"{path}.{tool}", options) for tool in bound.tools_by_name
            }
            if _gives_errors_to_model(bound):
                for tool, own in tools.items():
                    if own and own.get("effect"):
                        raise TypeError(
                            f"tool {tool!r} is an effect, and the model may call it again after a lost "
                            "connection; create its ToolNode without handle_tool_errors"
                        )
            return _RecordedTools(bound, step_id, tools, classes)
        return _BodyNode(bound) if options is False else _RecordedNode(bound, step_id, options, classes)

    def _options_of(self, path: str, default: Options) -> Options:
        self._known.add(path)
        return self._options.get(path, default)

    def check(self) -> None:
        for path, options in self._options.items():
            if path not in self._known:
                known = ", ".join(map(repr, sorted(self._known))) or "none"
                raise UnknownNode(f"options of unknown node {path!r}; known: {known}")
            check_options(f"node {path!r}", options, NodeOptions)


def _gives_errors_to_model(node: Any) -> bool:
    """Return True for a ToolNode that makes an answer to the model of errors that a tool raises."""
    default = inspect.signature(ToolNode.__init__).parameters["handle_tool_errors"].default
    handles = node._handle_tool_errors
    return bool(handles) and (handles is True or handles is not default)


def _with_same_ids(channel: Any) -> Any:
    """Return a channel whose reducer gives new messages ids that are the same on replay."""
    if (batch := getattr(channel, "reducer", None)) is not None:
        # A DeltaChannel, to whose messages LangGraph gives ids by itself.
        single = BinaryOperatorAggregate(channel.typ, lambda left, right: batch(left, [right]))
        single.key, channel = channel.key, single
    elif not hasattr(channel, "operator"):
        return channel
    reduce = channel.operator

    @functools.wraps(reduce)
    def reduced(left: Any, right: Any) -> Any:
        known = {*_ids_in(left), *_ids_in(right)}
        result, flow = reduce(left, right), current_flow()
        if flow is not None:  # Else a step reads the state.
            for message in messages_in(result):
                if message.id is None or message.id not in known:
                    message.id = str(flow.uuid())
        return result

    channel = channel.copy()
    channel.operator = reduced
    return channel


def _ids_in(value: Any) -> set[Any]:
    if isinstance(value, dict):
        return {value.get("id")}
    if isinstance(value, (list, tuple)):
        return {id for item in value for id in _ids_in(item)}
    return {getattr(value, "id", None)}


# ---------------------------------------------------------------------- nodes, in the body


class _BodyNode(Runnable[Any, Any]):
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


class _RecordedNode(_BodyNode):
    """A node that is a step."""

    def __init__(self, inner: Any, step_id: str, options: NodeOptions, classes: Classes) -> None:
        super().__init__(inner)
        self._step = _NodeStep(step_id, inner, options, classes)

    async def ainvoke(self, input: Any, config: Any = None, **_: Any) -> Any:
        state = self._step.stored(input, "takes")
        digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
        return await self._step.call(_NodeInput(state=_shown(state), digest=digest), state, config)


class _RecordedTools(_BodyNode):
    """A node of tools: each call of one is a step, side by side."""

    def __init__(self, inner: Any, step_id: str, tools: dict[str, Options], classes: Classes) -> None:
        super().__init__(inner)
        self._messages_key = getattr(inner, "_messages_key", "messages")
        self._steps = {
            name: _NodeStep(f"{step_id}.{name}", inner, options, classes, self._messages_key)
            for name, options in tools.items()
            if options is not False
        }

    async def ainvoke(self, input: Any, config: Any = None, **_: Any) -> Any:
        calls = self._calls_in(input)
        if not calls:
            return await super().ainvoke(input, config)  # It says what is wrong.
        results = await asyncio.gather(*(self._call(call, state, config) for call, state in calls))
        updates = [part for result in results for part in (result if isinstance(result, list) else [result])]
        if not all(isinstance(update, dict) for update in updates):
            return updates
        messages = [message for update in updates for items in update.values() for message in items]
        is_list = isinstance(input, list) and isinstance(input[-1], BaseMessage)
        return messages if is_list else {self._messages_key: messages}

    async def _call(self, call: Any, input: Any, config: Any) -> Any:
        step = self._steps.get(call["name"])
        if step is None:  # It is not a step, or the model has made its name up.
            return await super().ainvoke(input, config)
        call_input = _ToolInput(tool=call["name"], arguments=call["args"], call_id=call["id"])
        return await step.call(call_input, step.stored(input, "takes"), config)

    def _calls_in(self, input: Any) -> list[tuple[Any, Any]]:
        """Return the calls that the node makes, each with the input of a node that makes only this one."""
        if isinstance(input, list) and input and isinstance(input[-1], dict):
            return [(call, [call]) for call in input]
        if isinstance(input, dict) and "tool_call" in input:
            return [(input["tool_call"], input)]
        messages, key = input, self._messages_key
        if not isinstance(input, list):
            messages = input.get(key) if isinstance(input, dict) else getattr(input, key, None)
        newest = next((one for one in reversed(messages or ()) if isinstance(one, AIMessage)), None)
        calls = [] if newest is None else newest.tool_calls
        own = {"__type": "tool_call_with_context", "state": input}
        return [(call, {**own, "tool_call": call}) for call in calls]


def _shown(state: Any) -> Any:
    """Return a state with the number and the newest of its messages: whole ones would grow as the square."""
    if isinstance(state, dict):
        return {key: _shown(item) for key, item in state.items()}
    is_list = isinstance(state, list) and state
    if is_list and all(isinstance(one, dict) and "@message" in one for one in state):
        return {"messages": len(state), "newest": state[-1]}
    return state


# ---------------------------------------------------------------------- steps


class _NodeInput(BaseModel):
    """Input of the step of a node: its state, with the newest message in place of a conversation.

    ``digest``: of the whole state. ``answers``: to the interrupts of the node so far.
    """

    state: JsonValue
    digest: str
    answers: list[JsonValue] = []


class _ToolInput(BaseModel):
    """Input of the step of a tool."""

    tool: str
    arguments: JsonValue
    call_id: str | None = None
    answers: list[JsonValue] = []


def _of_statement(schema: dict[str, Any]) -> None:
    """Reduce a JSON schema to what a person states; forms and examples of answers are made of it."""
    schema.update(properties={"result": schema["properties"]["result"]}, required=["result"])


class CallOutput(BaseModel):
    """Output of a step: the end of the call, ``parts`` of the custom stream, and ``writes`` to the state.

    A person who states that an effect happened passes its ``result`` alone: what ``reconcile`` returns.
    """

    model_config = ConfigDict(json_schema_extra=_of_statement)

    kind: Literal["call", "statement"] = "statement"
    result: JsonValue = None
    update: JsonValue = None
    questions: list[JsonValue] = []
    refused: str | None = None
    parts: list[JsonValue] = []
    writes: list[JsonValue] = []

    @model_validator(mode="before")
    @classmethod
    def _has_result(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("kind") != "call" and "result" not in raw:
            raise ValueError('the statement needs "result", which the tool or node returned')
        return raw


class _NodeStep:
    """The step of a node, or of a tool. ``messages_key``: of the state of a node of tools."""

    def __init__(
        self, step_id: str, inner: Any, options: NodeOptions, classes: Classes, messages_key: str = ""
    ) -> None:
        self._id, self._inner, self._options, self._classes = step_id, inner, options, classes
        self._messages_key = messages_key
        #: Of what the node takes and returns; that of the step is of its records.
        self._contract = contract_for(step_id, (options.get("input"), options.get("output")))
        self._node = work_node(
            step_id,
            (_ToolInput if messages_key else _NodeInput, CallOutput),
            role="tool" if messages_key else None,
            effect=options.get("effect", False),
            reconciles="reconcile" in options,
        )

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

    async def call(self, call_input: _NodeInput | _ToolInput, state: Any, config: Any) -> Any:
        """Call the node, in the body, and return its update. ``state``: in JSON form."""

        async def call(answers: list[Any]) -> _CallEnd:
            current_input = call_input.model_copy(update={"answers": list(answers)})
            work = functools.partial(self._perform, state, config, current_input.answers)
            look = functools.partial(self._look, call_input, state)
            output = await perform_step(_body_flow(), self._node, current_input, work, look)
            parts, writes = (decode(sent, self._classes) for sent in (output.parts, output.writes))
            for part in parts:
                config["configurable"][CONFIG_KEY_RUNTIME].stream_writer(part)
            config["configurable"][CONFIG_KEY_SEND](writes)
            update = decode(output.update, self._classes)
            if output.kind == "statement":
                update = self._update_of(call_input, decode(output.result, self._classes))
            return _CallEnd(update, output.questions, output.refused)

        return await _until_answered(call)

    async def _perform(self, stored: Any, body_config: Any, answers: list[Any]) -> Any:
        """Call the node, in the step, and return its output in JSON form."""
        node, state = current_node(), decode(stored, self._classes)
        parts: list[Any] = []
        writes: list[tuple[str, Any]] = []
        self._check("input", self._arguments_of(state) if self._messages_key else state)

        def write(part: Any) -> None:
            parts.append(self.stored(part, "streams"))
            node.emit(part, "custom")

        with counting():
            config = _config_of_step(body_config, answers, write, writes)
            end = await _invoke(self._inner, state, config, lambda: str(uuid4()))
        has_update = not end.questions and end.refused is None
        own = [write for write in writes if not write[0].startswith("__")]  # The others are of interrupt().
        return {
            "kind": "call",
            "update": self._returned(end.update) if has_update else None,
            "questions": self.stored(list(end.questions), "asks"),
            "refused": end.refused,
            "parts": parts,
            "writes": self.stored(own, "writes"),
        }

    def _arguments_of(self, input: Any) -> Any:
        return (input[0] if isinstance(input, list) else input["tool_call"])["args"]

    def _returned(self, result: Any) -> Any:
        """Return what a node returned in JSON form. Raises ContractViolation."""
        message = next(messages_in(result), None) if self._messages_key else None
        self._check("output", update(result) if message is None else result_of(message))
        return self.stored(result, "returns")

    def _check(self, direction: Literal["input", "output"], view: Any) -> None:
        if direction in self._options:
            broken = violation(self._id, self._contract, direction, view)
            if broken is not None:
                raise broken

    async def _look(self, call: _NodeInput | _ToolInput, stored: Any, key: str) -> Any:
        state = decode(stored, self._classes)
        reconcile = self._options.get("reconcile")
        assert reconcile is not None
        answer = reconcile(self._arguments_of(state) if self._messages_key else state, key)
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, (NotDone, Unknown)):
            return answer
        return {"kind": "call", "update": self._returned(self._update_of(call, answer))}

    def _update_of(self, call: _NodeInput | _ToolInput, result: Any) -> Any:
        """Return the update for the result of a call that was stated: of a tool, with its message."""
        if not isinstance(call, _ToolInput):
            return result
        if not isinstance(result, ToolMessage):
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            result = ToolMessage(text, name=call.tool, tool_call_id=call.call_id)
        return {self._messages_key: [result]}


# ---------------------------------------------------------------------- calls of nodes


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
    # The streams of the body hear of a step when it has ended.
    manager = config["callbacks"] = config["callbacks"].copy()
    streams = [handler for handler in manager.handlers if hasattr(handler, "tap_output_aiter")]
    for handler in streams:
        manager.remove_handler(handler)
    if streams or current_node().ctx.fire.takes_events:
        manager.add_handler(_STREAMS, inherit=True)
    return config


class _Streams(BaseCallbackHandler):
    """Has models stream, so that the counter of a step emits their text."""

    run_inline = True

    def tap_output_aiter(self, run_id: Any, output: Any) -> Any:
        """Return the output: LangChain takes a handler with this method for one that streams."""
        return output

    tap_output_iter = tap_output_aiter


_STREAMS: Final = _Streams()
