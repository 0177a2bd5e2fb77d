"""LangGraph in a flow: each node of a graph, and each call of a tool, is a step of the flow around it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, TypeVar, cast

from langchain_core.runnables.config import merge_configs
from langgraph.channels import BinaryOperatorAggregate
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel

try:
    from langgraph.prebuilt import ToolNode
except ImportError:  # Releases of it need a newer LangGraph than they say. With those nobody has such a node.
    ToolNode = ()

from stroma.adapters._langgraph_steps import (
    BodyNode,
    InterruptAnswer,
    NodeOptions,
    Options,
    RecordedNode,
    RecordedTools,
)
from stroma.adapters._langgraph_values import Classes, classes_in, messages_in
from stroma.adapters.guard import UnknownNode
from stroma.engine.current import AGENT, AgentRun, running_agent
from stroma.runner.flows.body_loop import WITHOUT_THREADS, BodyLoop
from stroma.runner.flows.flow import current_flow

__all__ = ["InterruptAnswer", "NodeOptions", "durable"]

G = TypeVar("G")
_END: Final = object()
#: The name of a graph that has none.
_UNNAMED: Final = "LangGraph"


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

    Raises TypeError for another object and unknown options, UnknownNode for an id that the graph does not
    have.
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
    parts = _Parts(dict(nodes or {}))
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

    def __init__(self, options: dict[str, Options]) -> None:
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
        if isinstance(bound, Pregel):
            if not hasattr(bound, "_stroma_in_flow"):  # Else it has options of its own.
                bound = self.in_flow(bound, f"{step_id}.", f"{path}.")
        else:
            bound = self._bound(bound, step_id, path, classes)
        without = {"retry_policy": None, "cache_policy": None, "timeout": None}
        return node.copy(
            {"bound": bound, **{key: value for key, value in without.items() if hasattr(node, key)}}
        )

    def _bound(self, bound: Any, step_id: str, path: str, classes: Classes) -> Any:
        options = self._options_of(path, {})
        if isinstance(bound, ToolNode):
            tools: dict[str, Options] = {
                tool: self._options_of(f"{path}.{tool}", options) for tool in bound.tools_by_name
            }
            return RecordedTools(bound, step_id, tools, classes)
        return BodyNode(bound) if options is False else RecordedNode(bound, step_id, options, classes)

    def _options_of(self, path: str, default: Options) -> Options:
        self._known.add(path)
        return self._options.get(path, default)

    def check(self) -> None:
        for path, options in self._options.items():
            if path not in self._known:
                known = ", ".join(map(repr, sorted(self._known))) or "none"
                raise UnknownNode(f"options of unknown node {path!r}; known: {known}")
            unknown = set(options or ()) - set(NodeOptions.__annotations__)
            if unknown:
                raise TypeError(
                    f"node {path!r} has unknown options {sorted(unknown)}; pass "
                    f"{' or '.join(NodeOptions.__annotations__)}, or False"
                )


def _with_same_ids(channel: Any) -> Any:
    """Return a channel whose reducer gives new messages ids that are the same on replay."""
    batch = getattr(channel, "reducer", None)
    if batch is not None:  # A DeltaChannel, to whose messages LangGraph gives ids by itself.
        single = BinaryOperatorAggregate(channel.typ, _same_ids(lambda left, right: batch(left, [right])))
        single.key = channel.key
        return single
    if hasattr(channel, "operator"):
        channel = channel.copy()
        channel.operator = _same_ids(channel.operator)
    return channel


def _same_ids(reduce: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @functools.wraps(reduce)
    def reduced(left: Any, right: Any) -> Any:
        known = {*_ids_in(left), *_ids_in(right)}
        result, flow = reduce(left, right), current_flow()
        if flow is not None:  # Else a step reads the state.
            for message in messages_in(result):
                if message.id is None or message.id not in known:
                    message.id = str(flow.uuid())
        return result

    return reduced


def _ids_in(value: Any) -> set[Any]:
    """Return the ids of messages, also of those that are dicts."""
    if isinstance(value, dict):
        return {value.get("id")}
    if isinstance(value, (list, tuple)):
        return {id for item in value for id in _ids_in(item)}
    return {getattr(value, "id", None)}
