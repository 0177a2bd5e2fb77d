"""CrewAI: the methods of flows, the calls of LLMs and the tools of crews as steps.

::

    flow = attach(TripFlow(), Guard(runner), {"book": (Trip, Booking)})
    flow.kickoff()  # a run
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

from stroma.adapters._releases import import_error, warn_if_untested

try:
    from crewai import BaseLLM, Crew
    from crewai.flow.flow import Flow
except ImportError as error:
    raise import_error("crewai", error) from error

from stroma.adapters._delegation import guard_methods
from stroma.adapters._discovery import marked, marks_of
from stroma.adapters._state_views import newest_of
from stroma.adapters.guard import Contracts, Guard
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.node import stroma_node as stroma_crewai_step
from stroma.cost.usage import Usage
from stroma.engine.execution import current_node
from stroma.runner.runner import StromaRunner

warn_if_untested("crewai")

__all__ = ["CrewAIAdapter", "attach", "guard_llm", "stroma_crewai_step"]


def attach(target: Any, guard: Guard, contracts: Contracts | None = None) -> Any:
    """Make steps of the methods of a flow, or of the LLMs and tools of a crew's agents; changes it and returns it.

    ``contracts``: by the names of methods or tools. A method's input is what it is passed, or else the flow's state; its
    output is what it returns, or else that state. Each kickoff is a run. Raises UnknownNode for a contract of none.
    """
    if isinstance(target, Crew):
        tools = [tool for agent in target.agents for tool in agent.tools or ()]
        by_name = guard.contracts(contracts, [tool.name for tool in tools], "tool")
        for agent in target.agents:
            # By its values: newer releases deprecate the attribute, and will not have it.
            for llm in (agent.llm, vars(agent).get("function_calling_llm")):
                if isinstance(llm, BaseLLM):
                    guard_llm(llm, guard)
        for tool in tools:
            if not guard.has(tool._run):
                step = guard.wrap(tool.name, tool._run, contract=by_name.get(tool.name), role="tool")
                object.__setattr__(tool, "_run", step)
        return _with_runs(target, guard, "kickoff", "akickoff", "kickoff_async")
    by_name = guard.contracts(contracts, map(str, target._methods), "method")
    return _attach(target, guard, {name: (str(name), by_name.get(str(name))) for name in target._methods})


def _attach(flow: Any, guard: Guard, steps: dict[Any, tuple[str, NodeContract[Any, Any] | None]]) -> Any:
    def input_view(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        passed = (*args[1:], *kwargs.values())  # The first one is the flow itself.
        return passed[0] if passed else flow._state

    for name, (step_id, contract) in steps.items():
        method = flow._methods[name]
        if guard.has(method._meth):
            continue
        # What the flow runs is this table, which it made when it was made; the class's methods it never looks at again.
        flow._methods[name] = guarded = copy.copy(method)
        output_view = lambda result: flow._state if result is None else result  # noqa: E731
        guarded._meth = guard.wrap(
            step_id, method._meth, contract=contract, input_view=input_view, output_view=output_view
        )
    return _with_runs(flow, guard, "kickoff_async")


def _with_runs(target: Any, guard: Guard, *names: str) -> Any:
    """Make each call of some methods of an object a run."""
    for name in names:
        kickoff = getattr(target, name, None)
        if kickoff is not None and not guard.has(kickoff):
            object.__setattr__(target, name, guard.each_call(kickoff, _inputs))
    return target


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"inputs": kwargs.get("inputs", args[0] if args else None)}


class CrewAIAdapter:
    """Guards the marked methods of a flow, by the registry's contracts, else their own."""

    def __init__(self, registry: ContractRegistry, runner: StromaRunner | None = None) -> None:
        self.registry, self.guard = registry, Guard(runner)

    def wrap(self, flow: Any) -> Any:
        """Make steps of the marked methods of a flow, whatever it calls them; returns it. ValueError if there is none."""
        if not isinstance(flow, Flow):
            raise TypeError(
                f"adapter.wrap() needs an instance of a Flow, got {flow!r}; pass adapter.wrap(MyFlow())"
            )
        steps = {}
        for name, method in flow._methods.items():
            # The mark stands on the function, or on what @start and the like have made of it.
            func = marked(method, method._meth, inspect.getattr_static(type(flow), str(name), None))
            if func is not None:
                steps[name] = marks_of(func, self.registry)
        if not steps:
            raise ValueError("no method of the flow is marked; decorate them with @stroma_crewai_step")
        return _attach(flow, self.guard, steps)

    def node_decorator(self, node_id: str, contract: NodeContract[Any, Any]) -> Callable[..., Any]:
        """Return :func:`stroma_crewai_step` for a node id and contract."""
        return stroma_crewai_step(node_id, contract)


def guard_llm(llm: Any, guard: Guard) -> Any:
    """Make steps of the calls of an LLM; changes it and returns it."""
    ledger = _Ledger(llm)

    def around(bare: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return bare(*args, **kwargs)
            finally:
                ledger.book()

        async def acall(*args: Any, **kwargs: Any) -> Any:
            try:
                return await bare(*args, **kwargs)
            finally:
                ledger.book()

        return acall if inspect.iscoroutinefunction(bare) else call

    output_view = lambda answer: {"answer": answer}  # noqa: E731
    return guard_methods(
        llm, ("call", "acall"), guard, "llm", around, input_view=_input_view, output_view=output_view
    )


class _Ledger:
    """Usage of an LLM that no step has counted yet. The LLM has one counter for all concurrent calls."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._lock = threading.Lock()
        self._booked = self._counted()

    def _counted(self) -> tuple[int, int, int]:
        usage = self._llm._token_usage
        return usage["prompt_tokens"], usage["completion_tokens"], usage.get("cached_prompt_tokens", 0)

    def book(self) -> None:
        """Count what is new on the step that is under way; of a failed call, too."""
        node = current_node()
        assert node is not None
        with self._lock:
            now, before = self._counted(), self._booked
            self._booked = now
        input_tokens, output_tokens, cached = (max(0, a - b) for a, b in zip(now, before, strict=True))
        if input_tokens or output_tokens:
            cached = min(cached, input_tokens)
            node.report_usage(Usage(input_tokens, output_tokens, cached, model=self._llm.model))


def _input_view(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return newest_of(args[0] if args else kwargs.get("messages"))
