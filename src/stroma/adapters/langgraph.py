"""LangGraph: in a flow, graphs whose nodes are its steps; elsewhere, guarded graphs.

::

    graph = durable(builder.compile())
    await graph.ainvoke({"text": "..."})  # in the body of a flow

    graph = attach(builder, Guard(runner), {"search": (Query, Hits)}).compile()
    graph.invoke({"text": "..."})  # each call is a run
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from stroma._utils.lazy import lazy
from stroma.adapters._releases import imports_of

with imports_of("langgraph"):
    from langchain_core.runnables import RunnableLambda
    from langgraph.errors import GraphBubbleUp, GraphInterrupt, GraphRecursionError, ParentCommand
    from langgraph.graph.state import StateGraph
    from langgraph.pregel import Pregel
    from langgraph.types import Command

from stroma.adapters._langchain import acounted, counted, counting, update
from stroma.adapters._step import Control, copy_for_retries, input_of_attempt
from stroma.adapters.base import marked, marks_of
from stroma.adapters.guard import Contracts, Guard
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.node import framework_node as stroma_langgraph_node
from stroma.engine.execution import CURRENT
from stroma.runner.runner import StromaRunner

if TYPE_CHECKING:
    from stroma.adapters._langgraph_durability import InterruptAnswer, NodeOptions, durable

__all__ = ["InterruptAnswer", "LangGraphAdapter", "NodeOptions", "attach", "durable", "stroma_langgraph_node"]

_OF_FLOWS = {"_langgraph_durability": ("durable", "InterruptAnswer", "NodeOptions")}
__getattr__, __dir__ = lazy(__name__, _OF_FLOWS, "stroma.adapters")

G = TypeVar("G")


def attach(graph: G, guard: Guard, contracts: Contracts | None = None) -> G:
    """Make every node of a StateGraph, or of a compiled graph, a step of ``guard``; return the graph.

    ``contracts``: by the names that the graph has for its nodes; input is the state that a node gets, output
    its update. A call of the graph is a run, unless one of the guard is under way. Raises UnknownNode for a
    contract of no node, and ValueError for an ``@entrypoint``, which counts its tasks and interrupts as it
    runs and cannot be called again.
    """
    target: Any = graph
    if "__previous__" in getattr(target, "channels", ()):
        raise ValueError(
            "an @entrypoint has tasks in place of nodes; guard their functions, below @task: "
            "task(guard.wrap(name, func)), "
            "and call it in `with guard.run():`"
        )
    names = [name for name in target.nodes if not name.startswith("__")]
    by_name = guard.contracts(contracts, names, "node")
    attach_steps(target, guard, {name: (name, by_name.get(name)) for name in names})
    return graph


def attach_steps(
    graph: Any,
    guard: Guard,
    steps: dict[str, tuple[str, NodeContract[Any, Any] | None]],
    adapter: LangGraphAdapter | None = None,
) -> Any:
    """Make steps of some nodes, with these ids and contracts; without an ``adapter``, of later ones too."""
    for name, (step_id, contract) in steps.items():
        node = graph.nodes[name]
        inner = node.bound if isinstance(graph, Pregel) else node.runnable
        if guard.has(inner, contract):
            continue  # It was attached before it was compiled.
        step = _GuardedNode(inner, guard, step_id, contract)
        if isinstance(graph, Pregel):
            graph.nodes[name] = node.copy({"bound": step})
        else:
            graph.nodes[name] = dataclasses.replace(node, runnable=step)
    kind: Any = type(graph)
    if not hasattr(kind, "_stroma_kind"):
        graph.__class__ = _graph_class(kind, guard, adapter)
    return graph


def _graph_class(kind: Any, guard: Guard, adapter: LangGraphAdapter | None) -> Any:
    """Return a subclass whose calls are runs. A class, since LangGraph copies graphs by their attributes."""
    known = guard.classes.get((kind, adapter))
    if known is not None:
        return known

    def compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        if adapter is None:  # What was added since.
            attach(self, guard)
        else:
            adapter.attach_marked(self)
        graph = kind.compile(self, *args, **kwargs)
        compiled: Any = type(graph)
        graph.__class__ = _graph_class(compiled, guard, adapter)
        return graph

    def stream(self: Any, input: Any, config: Any = None, **kwargs: Any) -> Any:
        def parts() -> Any:
            yield from counted(kind.stream(self, input, config, **kwargs))
            if _may_be_suspended(self, guard, kwargs):
                _note_suspended(guard, self.get_state(config))

        return guard.over(parts, input, is_continuation=_is_continuation(input))

    def astream(self: Any, input: Any, config: Any = None, **kwargs: Any) -> Any:
        async def parts() -> AsyncIterator[Any]:
            async with contextlib.aclosing(acounted(kind.astream(self, input, config, **kwargs))) as stream:
                async for part in stream:
                    yield part
            if _may_be_suspended(self, guard, kwargs):
                _note_suspended(guard, await self.aget_state(config))

        return guard.aover(parts, input, is_continuation=_is_continuation(input))

    calls = {"stream": stream, "astream": astream}
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_stroma_kind": kind}
    own = {"compile": compile} if issubclass(kind, StateGraph) else calls
    subclass = guard.classes[kind, adapter] = type(kind.__name__, (kind,), names | own)
    return subclass


def _is_continuation(input: Any) -> bool:
    return input is None or isinstance(input, Command)


def _may_be_suspended(graph: Any, guard: Guard, options: dict[str, Any]) -> bool:
    """Return True if LangGraph may have ended the call without an interrupt() that a step has seen."""
    if CURRENT.get() is not None or not graph.checkpointer or guard.current.ctx.account.suspended:
        return False
    own = graph.interrupt_before_nodes or graph.interrupt_after_nodes
    return bool(own or options.get("interrupt_before") or options.get("interrupt_after"))


def _note_suspended(guard: Guard, state: Any) -> None:
    if state.next:
        guard.current.ctx.account.note_suspended(f"before {', '.join(map(repr, state.next))}")


class LangGraphAdapter:
    """Guards the marked nodes of a graph, by the registry's contracts, else their own."""

    def __init__(self, registry: ContractRegistry, runner: StromaRunner[Any] | None = None) -> None:
        self.registry, self.guard = registry, Guard(runner)

    def wrap(self, graph: Any) -> Any:
        """Make the marked nodes steps, under any name; returns it. Raises ValueError if there is none."""
        if not self.attach_marked(graph):
            raise ValueError(
                "no node of the graph is marked; decorate their functions with @stroma_langgraph_node"
            )
        return graph

    def attach_marked(self, graph: Any) -> bool:
        """Make the marked nodes steps; return True if there are any."""
        steps = {}
        for name, node in graph.nodes.items():
            inner = getattr(node, "bound", None) or getattr(node, "runnable", None)
            func = marked(inner, getattr(inner, "func", None), getattr(inner, "afunc", None))
            if func is not None:
                steps[name] = marks_of(func, self.registry)
        if steps:
            attach_steps(graph, self.guard, steps, self)
        return bool(steps)

    def node_decorator(self, node_id: str, contract: NodeContract[Any, Any]) -> Callable[..., Any]:
        """Return :func:`stroma_langgraph_node` for a node id and contract."""
        return stroma_langgraph_node(node_id, contract)


class _GuardedNode(RunnableLambda[Any, Any]):
    """A node as a step. LangGraph looks for its subgraphs in ``deps``."""

    def __init__(
        self, inner: Any, guard: Guard, step_id: str, contract: NodeContract[Any, Any] | None
    ) -> None:
        super().__init__(inner.invoke, inner.ainvoke, name=getattr(inner, "name", None) or step_id)
        options: Any = {
            "contract": contract,
            "input_view": lambda args, _: args[2],
            "output_view": update,
            "control": control,
        }

        def call(state: Any, config: Any, first: Any) -> Any:
            with counting():
                return inner.invoke(input_of_attempt(state, first), config)

        async def acall(state: Any, config: Any, first: Any) -> Any:
            with counting():
                return await inner.ainvoke(input_of_attempt(state, first), config)

        self.deps = [inner]
        self._step, self._astep = guard.wrap(step_id, call, **options), guard.wrap(step_id, acall, **options)
        guard.mark(self, contract)

    def invoke(self, input: Any, config: Any = None, **_: Any) -> Any:
        return self._step(input, config, copy_for_retries(input))

    async def ainvoke(self, input: Any, config: Any = None, **_: Any) -> Any:
        return await self._astep(input, config, copy_for_retries(input))


def control(error: BaseException) -> Control | None:
    """Return the meaning of an exception that LangGraph uses for control flow."""
    if isinstance(error, GraphInterrupt):
        return Control(
            "suspended",
            "; ".join(str(interrupt.value) for interrupt in error.args[0]) if error.args else None,
        )
    if isinstance(error, ParentCommand):
        return Control("returned", error.args[0])
    return Control("passed") if isinstance(error, (GraphBubbleUp, GraphRecursionError)) else None
