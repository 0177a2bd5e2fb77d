"""CrewAI: the methods of flows, the calls of LLMs and the tools of crews as steps.

::

    flow = attach(TripFlow(), Guard(runner), {"book": (Trip, Booking)})
    flow.kickoff()  # a run
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from stroma.adapters._releases import import_error, warn_if_untested

try:
    from crewai import Crew
    from crewai.flow.async_feedback import HumanFeedbackPending
    from crewai.flow.flow import Flow

    from stroma.adapters._crewai_crews import attach_crew, make_run, tools_of
    from stroma.adapters._crewai_llms import guard_llm
except ImportError as error:
    raise import_error("crewai", error) from error

from stroma.adapters._discovery import marked, marks_of
from stroma.adapters._step import Control
from stroma.adapters.guard import Contracts, Guard
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.node import framework_node as stroma_crewai_step
from stroma.runner.runner import StromaRunner

warn_if_untested("crewai")

__all__ = ["CrewAIAdapter", "attach", "guard_llm", "stroma_crewai_step"]

T = TypeVar("T")


def attach(target: T, guard: Guard, contracts: Contracts | None = None) -> T:
    """Make steps of the methods of a flow, or of the LLMs and tools of a crew; changes it and returns it.

    ``contracts``: by the names of methods or tools. A method's input is what it is passed, or else the flow's
    state; its output is what it returns, or else that state. Each kickoff of it or of a copy is a run, and
    guards the agents, tasks and tools that were added since. Raises UnknownNode for a contract of none.
    """
    program: Any = target
    if isinstance(program, Crew):
        by_name = guard.contracts(contracts, [tool.name for tool in tools_of(program)], "tool")
        attach_crew(program, guard, by_name)
    else:
        by_name = guard.contracts(contracts, map(str, program._methods), "method")
        _attach(program, guard, {name: (str(name), by_name.get(str(name))) for name in program._methods})
    return target


# ---------------------------------------------------------------------- flows


def _attach(flow: Any, guard: Guard, steps: dict[Any, tuple[str, NodeContract[Any, Any] | None]]) -> Any:
    def input_view(first: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        passed = (*args[first:], *kwargs.values())
        return passed[0] if passed else flow._state

    for name, (step_id, contract) in steps.items():
        method = flow._methods[name]
        # In some releases @persist makes a plain method of it; otherwise the flow itself comes first.
        is_plain = inspect.ismethod(method)
        bare = method if is_plain else method._meth
        if guard.has(bare, contract):
            continue
        step = guard.wrap(
            step_id,
            bare,
            contract=contract,
            input_view=functools.partial(input_view, 0 if is_plain else 1),
            output_view=lambda result: flow._state if result is None else result,
            control=_control,
        )
        # What the flow runs is this table, which it made when it was made; the class's methods it never looks
        # at again.
        guarded: Any = step if is_plain else copy.copy(method)
        if not is_plain:
            guarded._meth = step
        flow._methods[name] = guarded
    for name in ("kickoff_async", "resume_async"):
        make_run(flow, name, guard, is_continuation=name == "resume_async")
    return flow


def _control(error: BaseException) -> Control | None:
    is_pending = isinstance(error, HumanFeedbackPending)
    return Control("suspended", str(error), asks=False) if is_pending else None


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
