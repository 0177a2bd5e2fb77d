"""CrewAI: the methods of flows, the calls of LLMs and the tools of crews as steps.

::

    flow = attach(TripFlow(), Guard(runner), {"book": (Trip, Booking)})
    flow.kickoff()  # a run
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

from stroma.adapters._releases import imports_of

with imports_of("crewai"):
    from crewai import BaseLLM, Crew
    from crewai.flow.async_feedback import HumanFeedbackPending
    from crewai.flow.flow import Flow
    from crewai.tools import BaseTool
    from crewai.tools.agent_tools.base_agent_tools import BaseAgentTool
    from crewai.utilities.llm_utils import create_llm
    from crewai.utilities.planning_handler import CrewPlanner

from stroma.adapters._delegation import before, guard_methods, within, wrap_method
from stroma.adapters._state_views import newest_of
from stroma.adapters._step import Control, report_uncounted
from stroma.adapters.base import marked, marks_of
from stroma.adapters.guard import Contracts, Guard, what_stopped
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.node import framework_node as stroma_crewai_step
from stroma.cost.usage import Usage
from stroma.engine.execution import current_node
from stroma.runner.runner import StromaRunner

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
        by_name = guard.contracts(contracts, [tool.name for tool in _tools_of(program)], "tool")
        _attach_crew(program, guard, by_name)
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
        _make_run(flow, name, guard, is_continuation=name == "resume_async")
    return flow


def _control(error: BaseException) -> Control | None:
    is_pending = isinstance(error, HumanFeedbackPending)
    return Control("suspended", cast("Any", error).context.message) if is_pending else None


class CrewAIAdapter:
    """Guards the marked methods of a flow, by the registry's contracts, else their own."""

    def __init__(self, registry: ContractRegistry, runner: StromaRunner[Any] | None = None) -> None:
        self.registry, self.guard = registry, Guard(runner)

    def wrap(self, flow: Any) -> Any:
        """Make steps of the marked methods of a flow; returns it. Raises ValueError if there is none."""
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


# ---------------------------------------------------------------------- crews

#: Where agents and crews have LLMs.
_LLMS: Final = ("llm", "function_calling_llm", "manager_llm", "planning_llm", "chat_llm")


def _attach_crew(crew: Any, guard: Guard, contracts: dict[str, NodeContract[Any, Any]]) -> None:
    """Make steps of the LLMs and tools of a crew and its copies, and a run of each kickoff."""
    _guard_parts(crew, guard, contracts)

    def renewed(kickoff: Callable[..., Any]) -> Callable[..., Any]:
        return before(kickoff, lambda self, *_, **__: _guard_parts(self, guard, contracts))

    def copied(bare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(bare)
        def make_copy(self: Any) -> Any:
            other = bare(self)
            _attach_crew(other, guard, contracts)
            return other

        return make_copy

    def managed(bare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(bare)
        def create(self: Any) -> None:
            if self.manager_agent is None:
                self.manager_llm = _guarded_llm(self.manager_llm, guard)
            bare(self)
            _guard_parts(self, guard, contracts)

        return create

    def planned(bare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(bare)
        def plan(self: Any) -> None:
            own = self.planning_llm
            # What CrewAI takes where none is named.
            self.planning_llm = _guarded_llm(
                CrewPlanner(tasks=[], planning_agent_llm=own).planning_agent_llm, guard
            )
            try:
                bare(self)
            finally:
                self.planning_llm = own

        return plan

    for name in ("kickoff", "akickoff", "kickoff_async"):
        _make_run(crew, name, guard, renewed)
    for name, wrapper in (
        ("copy", copied),
        ("_create_manager_agent", managed),
        ("_handle_crew_planning", planned),
    ):
        wrap_method(crew, name, guard, wrapper)


def _guard_parts(crew: Any, guard: Guard, contracts: dict[str, NodeContract[Any, Any]]) -> None:
    # By its values: newer releases deprecate the attribute, and will not have it.
    llms = [vars(part).get(name) for part in (crew, *_agents_of(crew)) for name in _LLMS]
    for llm in llms:
        if isinstance(llm, BaseLLM):
            guard_llm(llm, guard)
    for tool in _tools_of(crew):
        _guard_tool(tool, guard, contracts.get(tool.name))


def _agents_of(crew: Any) -> list[Any]:
    agents = [*crew.agents, *(task.agent for task in crew.tasks), crew.manager_agent]
    return list({id(agent): agent for agent in agents if agent is not None}.values())


def _tools_of(crew: Any) -> list[Any]:
    holders = (*_agents_of(crew), *crew.tasks)
    tools = [tool for holder in holders for tool in holder.tools or () if isinstance(tool, BaseTool)]
    # Those with which a manager delegates call agents of the crew.
    return list({id(tool): tool for tool in tools if not isinstance(tool, BaseAgentTool)}.values())


def _guarded_llm(llm: Any, guard: Guard) -> Any:
    resolved = llm if llm is None else create_llm(llm)
    return guard_llm(resolved, guard) if isinstance(resolved, BaseLLM) else llm


def _make_run(
    target: Any,
    name: str,
    guard: Guard,
    renewed: Callable[[Any], Any] = lambda call: call,
    *,
    is_continuation: bool = False,
) -> None:
    """Make each call of a method of a flow or crew a run. A stream returns at once and calls again inside."""

    def wrapper(entered: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = entered(self, *args, **kwargs)
            _raise_fatal(guard)
            return result

        async def arun(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = await entered(self, *args, **kwargs)
            _raise_fatal(guard)
            if isinstance(result, HumanFeedbackPending):
                guard.current.ctx.account.note_suspended(result.context.message)
            return result

        bare = inspect.unwrap(entered, stop=lambda func: func is not entered)
        each = guard.each_call(
            renewed(functools.wraps(entered)(arun if inspect.iscoroutinefunction(entered) else run)),
            _inputs,
            lambda _: is_continuation,
        )

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return (bare if self.stream else each)(self, *args, **kwargs)

        async def acall(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await (bare if self.stream else each)(self, *args, **kwargs)

        return functools.wraps(entered)(acall if inspect.iscoroutinefunction(entered) else call)

    wrap_method(target, name, guard, wrapper)


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"inputs": kwargs.get("inputs", args[1] if len(args) > 1 else None)}


# ---------------------------------------------------------------------- LLMs and tools

_LOCK: Final = threading.Lock()


def guard_llm(llm: Any, guard: Guard) -> Any:
    """Make steps of the calls of an LLM and of its copies; changes it and returns it."""

    @contextmanager
    def booking(self: Any, *_: Any, **__: Any) -> Iterator[None]:
        ledger = _Ledger.of(self)
        try:
            yield
        finally:
            ledger.book(self)

    names, around = ("call", "acall"), functools.partial(within, context=booking)
    output_view = lambda answer: {"answer": answer}  # noqa: E731
    guard_methods(
        llm,
        names,
        guard,
        "llm",
        around,
        input_view=_input_view,
        output_view=output_view,
        messages=_messages_of,
    )
    for name in names:
        wrap_method(llm, name, guard, lambda step: before(step, lambda *_, **__: _raise_fatal(guard)))
    return llm


def _guard_tool(tool: Any, guard: Guard, contract: NodeContract[Any, Any] | None) -> None:
    """Make steps of a tool's calls; a broken contract or a spent budget in one ends the run."""

    @contextmanager
    def ending(*_: Any, **__: Any) -> Iterator[None]:
        _raise_fatal(guard)
        try:
            yield
        except Exception as error:
            if what_stopped(error) is not None:  # CrewAI tells the model of it, and would continue.
                guard.current.fatal = error
            raise

    names = ("_run", "_arun")
    guard_methods(tool, names, guard, tool.name, contract=contract, role="tool")
    for name in names:
        wrap_method(tool, name, guard, functools.partial(within, context=ending))


def _raise_fatal(guard: Guard) -> None:
    if (fatal := guard.current.fatal) is not None:
        raise fatal


_COUNTED: Final = ("prompt_tokens", "completion_tokens", "cached_prompt_tokens", "cache_creation_tokens")


def _counted(llm: Any) -> tuple[int, ...]:
    return tuple(llm._token_usage.get(name, 0) for name in _COUNTED)


class _Ledger:
    """Usage of an LLM that no step has counted yet. The LLM and its shallow copies share one counter."""

    def __init__(self, llm: Any) -> None:
        self._counter = llm._token_usage
        self._lock = threading.Lock()
        self._booked = _counted(llm)

    @classmethod
    def of(cls, llm: Any) -> _Ledger:
        with _LOCK:
            ledger: _Ledger | None = vars(llm).get("_stroma_ledger")
            if ledger is None or ledger._counter is not llm._token_usage:  # A deep copy counts for itself.
                ledger = cls(llm)
                object.__setattr__(llm, "_stroma_ledger", ledger)
            return ledger

    def __deepcopy__(self, _: Any) -> _Ledger:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()

    def book(self, llm: Any) -> None:
        """Count what is new on the step that is under way; of a failed call, too."""
        node = current_node()._own
        with self._lock:
            now, before = _counted(llm), self._booked
            self._booked = now
        input_tokens, output_tokens, cached, written = (
            max(0, a - b) for a, b in zip(now, before, strict=True)
        )
        if input_tokens or output_tokens:
            input_tokens = max(input_tokens, cached + written)
            report_uncounted(node, Usage(input_tokens, output_tokens, cached, written, llm.model))


def _messages_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("messages")


def _input_view(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return newest_of(_messages_of(args, kwargs))
