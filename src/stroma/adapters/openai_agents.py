"""OpenAI Agents SDK: in a flow, agents whose requests and tools are its steps; elsewhere, guarded agents.

::

    result = await DurableRunner().run(agent, "...")  # in the body of a flow

    attach(agent, guard, {"search": (Query, Hits)})
    result = await GuardedRunner(guard).run(agent, "...")  # a run; inside `with guard.run()`, part of that
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from stroma._utils.lazy import lazy
from stroma.adapters._patches import patch
from stroma.adapters._releases import imports_of

with imports_of("openai-agents"):
    from agents import Agent, FunctionTool, Model, Runner, RunResult, RunState
    from agents import run as agents_run
    from agents.exceptions import (
        InputGuardrailTripwireTriggered,
        OutputGuardrailTripwireTriggered,
        ToolInputGuardrailTripwireTriggered,
        ToolOutputGuardrailTripwireTriggered,
    )
    from agents.realtime import RealtimeAgent, RealtimeSession
    from agents.run_internal import run_loop
    from agents.tool import maybe_invoke_function_tool_failure_error_function

    from stroma.adapters._openai_agents_steps import (
        Proxy,
        input_of,
        messages_of,
        model_name_of,
        reached_agents,
    )

from stroma.adapters._guarded_call import Call
from stroma.adapters._guarded_run import active_run
from stroma.adapters._state_views import as_it_is, newest_of, parse_text
from stroma.adapters._step import Control, GuardedStep
from stroma.adapters.guard import Contracts, Guard, what_stopped
from stroma.contracts.contract import NodeContract
from stroma.cost.usage import Usage, usage_from
from stroma.engine.execution import CURRENT

if TYPE_CHECKING:
    from stroma.adapters._durable_steps import ToolApproval, ToolOptions
    from stroma.adapters._openai_agents_durability import DurableRunner

__all__ = [
    "DurableRunner",
    "GuardedModel",
    "GuardedRunner",
    "GuardedStream",
    "ToolApproval",
    "ToolOptions",
    "attach",
]

_OF_FLOWS = {
    "_durable_steps": ("ToolApproval", "ToolOptions"),
    "_openai_agents_durability": ("DurableRunner",),
}
__getattr__, __dir__ = lazy(__name__, _OF_FLOWS, "stroma.adapters")

A = TypeVar("A")


def attach(agent: A, guard: Guard, contracts: Contracts | None = None) -> A:
    """Make steps of the tools and model requests of an agent, its handoffs, and agents that are its tools.

    ``contracts``: by the names of tools; input is the arguments, output the result. The agents are changed in
    place. In a run of a guard all other models and tools that the SDK uses are steps, too: a model that is
    only named, one of ``RunConfig(model=)``, judges of guardrails, tools of MCP servers. Raises UnknownNode
    for a contract of no tool; if one agent has all MCP servers, a run does when they have listed their tools.

    A realtime agent is attached in the same way. Enter its session inside ``async with guard.run():``: the
    tokens of its model count in that run and in no step, and a spent budget ends the session with
    BudgetExceeded.
    """
    _guard_whole_runs(guard)
    agents, _ = reached_agents(agent)
    tools = {tool.name for each in agents for tool in each.tools if isinstance(tool, FunctionTool)}
    servers = [server for each in agents for server in each.mcp_servers]
    listed = tools if not servers else {*tools, *(contracts or {})}
    by_name = guard.contracts(contracts, listed, "tool")
    for each in agents:
        if isinstance(getattr(each, "model", None), Model):  # A realtime agent has none of its own.
            each.model = _guard_model(each.model, guard)
        each.tools = [
            _guard_tool(tool, guard, by_name.get(tool.name)) if isinstance(tool, FunctionTool) else tool
            for tool in each.tools
        ]
    remote = {name: contract for name, contract in by_name.items() if name not in tools}
    for server in servers:
        setattr(server, _ATTACHED, _ServerContracts(guard, remote, servers))
    return agent


class GuardedRunner:
    """``Runner`` whose calls are runs of a guard, each with the agent as a step around models and tools."""

    def __init__(self, guard: Guard) -> None:
        _guard_whole_runs(guard)
        self.guard = guard
        self._run = guard.each_call(self._arun_step, _input_view, _is_continuation)
        self._run_sync = guard.each_call(self._run_step, _input_view, _is_continuation)

    async def run(self, agent: Agent[Any], input: Any, **options: Any) -> RunResult:
        """Call ``Runner.run`` under this guard."""
        result: RunResult = await self._run(agent, input, **options)
        return result

    def run_sync(self, agent: Agent[Any], input: Any, **options: Any) -> RunResult:
        """Call ``Runner.run_sync`` under this guard."""
        result: RunResult = self._run_sync(agent, input, **options)
        return result

    def run_streamed(self, agent: Agent[Any], input: Any, **options: Any) -> GuardedStream:
        """Call ``Runner.run_streamed`` under this guard."""
        return GuardedStream(self.guard, agent, input, options)

    async def _arun_step(self, agent: Any, input: Any, **options: Any) -> Any:
        with self.guard.current.here():
            return await self.guard.acall(_step_of(agent, input), Runner.run, agent, input, **options)

    def _run_step(self, agent: Any, input: Any, **options: Any) -> Any:
        with self.guard.current.here():
            return self.guard.call(_step_of(agent, input), Runner.run_sync, agent, input, **options)


class GuardedStream:
    """The streamed run of an agent: the run of the guard, and its agent's step, last as long as its events.

    Its other attributes are those of the SDK's ``RunResultStreaming``, once the first event was asked for.
    """

    def __init__(self, guard: Guard, agent: Any, input: Any, options: dict[str, Any]) -> None:
        self._guard, self._agent, self._input, self._options = guard, agent, input, options
        self._result: Any = None

    async def stream_events(self) -> AsyncIterator[Any]:
        """Yield the events of the SDK, in a run of the guard or as part of the one around. Call it once."""
        if self._result is not None:
            raise RuntimeError("the events of this stream were read already; call run_streamed() again")
        step = dataclasses.replace(_step_of(self._agent, self._input), collect=lambda _: self._result)
        args = (self._agent, self._input)
        events = self._guard.aover(
            lambda: Call(self._guard.current, step, self._events, (), {}).astream(),
            _input_view(args, {}),
            is_continuation=_is_continuation(args),
        )
        async with contextlib.aclosing(cast("AsyncGenerator[Any, None]", events)):
            async for event in events:
                yield event

    async def _events(self) -> AsyncIterator[Any]:
        self._result = result = Runner.run_streamed(self._agent, self._input, **self._options)
        try:
            async for event in result.stream_events():
                yield event
        finally:
            if not result.is_complete:
                result.cancel()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self._result is None:
            raise AttributeError(f"a stream has no {name!r} before stream_events() is read")
        return getattr(self._result, name)


def _judge(result: Any) -> Control | None:
    """Return the meaning of a result with interruptions: the run waits for approvals."""
    waits = getattr(result, "interruptions", None)
    if not isinstance(waits, list) or not waits:
        return None
    return Control("suspended", "; ".join(f"approval of {item.name}" for item in waits))


def _is_continuation(args: tuple[Any, ...]) -> bool:
    return isinstance(args[1], RunState)


def _input_view(args: tuple[Any, ...], _: dict[str, Any]) -> dict[str, Any]:
    # A run that continues is the same step: its state has what it began with.
    value = args[1]._original_input if isinstance(args[1], RunState) else args[1]
    return {"input": value if isinstance(value, (str, list)) else type(value).__name__}


def _final(result: Any) -> Any:
    return {"final_output": result.final_output}


def _step_of(agent: Any, input: Any) -> GuardedStep:
    """Return the step around an agent. Its models and tools had their retries: it is called once."""
    seen = _input_view((agent, input), {})
    about: Any = {"input_view": lambda *_: seen, "output_view": _final, "control": _control_of}
    return GuardedStep(agent.name, judge=_judge, can_retry=False, role="agent", **about)


# ---------------------------------------------------------------------- models


if TYPE_CHECKING:

    class _ModelProxy(Proxy, Model):
        """A GuardedModel, for type checkers."""
else:  # Not a base: what Model defines would hide what is wrapped.
    _ModelProxy = Proxy


class GuardedModel(_ModelProxy):
    """A model whose requests are steps: ``Agent(model=GuardedModel(model, guard))``.

    It has the class and the attributes of the model, private ones too: the SDK sees no difference.
    """

    def __init__(self, model: Model, guard: Guard) -> None:
        super().__init__(model, guard)

    def __eq__(self, other: object) -> bool:
        """Return True for the model itself, and for what guards it: agents are compared by their models."""
        return (other._wrapped if isinstance(other, GuardedModel) else other) is self._wrapped

    def __hash__(self) -> int:
        return hash(self._wrapped)

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        """Request a response of the model as the step ``model``."""
        return await self._run.acall(_request(self), self._wrapped.get_response, *args, **kwargs)

    def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Stream a response of the model as the step ``model``; it is retried only until its first event."""
        step = _request(self, collect=_last_response, delta=_delta)
        return Call(self._run.current, step, self._wrapped.stream_response, args, kwargs).astream()


def _request(model: Any, **options: Any) -> GuardedStep:
    def used(response: Any) -> Usage | None:
        if getattr(response, "usage", None) is None:
            return None
        return usage_from(response.usage, model=model_name_of(response) or model_name_of(model))

    return GuardedStep(
        "model",
        input_view=lambda args, kwargs: newest_of(input_of(args, kwargs)),
        messages=messages_of,
        output_view=_response_view,
        usage=used,
        control=_control_of,
        **options,
    )


def _guard_model(model: Any, guard: Guard) -> Any:
    return model if isinstance(model, GuardedModel) else GuardedModel(model, guard)


def _response_view(response: Any) -> dict[str, Any]:
    return {"output": getattr(response, "output", None)}


def _last_response(events: list[Any]) -> Any:
    """Return the last response of a stream, which has the usage."""
    return next((event.response for event in reversed(events) if hasattr(event, "response")), None)


def _delta(event: Any) -> str | None:
    return event.delta if event.type == "response.output_text.delta" else None


def _control_of(error: BaseException) -> Control | None:
    """Return the meaning of a tripped guardrail: it ends the run of an agent without a retry."""
    return Control("passed") if isinstance(error, _TRIPWIRES) else None


_TRIPWIRES = (
    InputGuardrailTripwireTriggered,
    OutputGuardrailTripwireTriggered,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
)


# ---------------------------------------------------------------------- tools


def _guard_tool(
    tool: Any,
    guard: Guard,
    contract: NodeContract[Any, Any] | None,
    output_view: Callable[[Any], Any] = as_it_is,
) -> Any:
    if guard.has(tool.on_invoke_tool, contract):
        return tool
    guarded = copy.copy(tool)
    guarded.on_invoke_tool = _Invoker(tool, guard, contract, output_view)
    return guarded


class _Invoker:
    """Calls a tool as a step, and handles an error as the tool does; raises what stopped the run."""

    def __init__(
        self,
        tool: Any,
        guard: Guard,
        contract: NodeContract[Any, Any] | None,
        output_view: Callable[[Any], Any],
    ) -> None:
        self._tool, self._guard = tool, guard
        # A copy that does not turn its errors into messages: what the model sees of them is decided after the
        # step.
        self._bare = copy.copy(tool)
        self._bare._failure_error_function, self._bare._use_default_failure_error_function = None, False
        guard.mark(self, contract)
        about: Any = {"input_view": _arguments, "output_view": output_view, "control": _control_of}
        self._step = GuardedStep(tool.name, contract, role="tool", **about)

    async def __call__(self, context: Any, arguments: str) -> Any:
        try:
            return await self._guard.acall(self._step, self._bare.on_invoke_tool, context, arguments)
        except Exception as error:
            message = None
            if what_stopped(error) is None and _control_of(error) is None:
                message = await maybe_invoke_function_tool_failure_error_function(
                    function_tool=self._tool, context=context, error=error
                )
            if message is None:
                raise
            # The SDK notes the error in its trace.
            note = getattr(self._bare.on_invoke_tool, "_on_handled_error", None)
            if note is not None:
                note(self._tool, error, arguments, context)
            return message

    def __getattr__(self, name: str) -> Any:
        if name in ("_tool", "_bare", "__agents_bind_function_tool__"):
            raise AttributeError(name)
        return getattr(self._bare.on_invoke_tool, name)


def _of_server(result: Any) -> Any:
    """Return the result of a tool of an MCP server, parsed if its text is JSON."""
    if isinstance(result, list) and len(result) == 1:
        result = result[0]
    if isinstance(result, dict) and result.get("type") == "text":
        result = result.get("text")
    return parse_text(result)


def _arguments(args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    return parse_text(args[1] or "{}")


# ---------------------------------------------------------------------- in runs of a guard


def _guard_whole_runs(guard: Guard) -> None:
    """Guard all models and tools that the SDK uses in a run of a guard.

    Judges of guardrails, agents as tools, RunConfig(model=), tools of MCP servers, realtime sessions and what
    was added later: none of them can be reached from the agent that was attached.
    """
    patch(guard, run_loop, "get_model", _with_guarded_models)
    patch(guard, agents_run, "run_single_turn", _turns_in_agents)
    patch(guard, run_loop, "run_single_turn_streamed", _turns_in_agents)
    for kind in (Agent, RealtimeAgent):
        patch(guard, kind, "get_all_tools", _with_guarded_tools)
    patch(guard, RealtimeSession, "on_event", _with_counted_events)


def _with_guarded_models(bare: Callable[..., Any]) -> Callable[..., Any]:
    def get_model(*args: Any, **kwargs: Any) -> Model:
        model, run = bare(*args, **kwargs), active_run()
        return model if run is None else _guard_model(model, run.guard)

    return get_model


def _with_guarded_tools(bare: Callable[..., Any]) -> Callable[..., Any]:
    async def get_all_tools(self: Any, *args: Any, **kwargs: Any) -> list[Any]:
        tools = await bare(self, *args, **kwargs)
        attached: list[_ServerContracts] = list(
            filter(None, (getattr(server, _ATTACHED, None) for server in self.mcp_servers))
        )
        run, contracts = active_run(), dict[str, NodeContract[Any, Any]]()
        for one in attached:
            contracts |= one.contracts
            one.check([tool.name for tool in tools], self.mcp_servers)
        guard: Guard | None = attached[0].guard if attached else getattr(run, "guard", None)
        if guard is None:
            return list(tools)
        own = {id(tool) for tool in self.tools}
        return [
            _guard_tool(tool, guard, contracts.get(tool.name), as_it_is if id(tool) in own else _of_server)
            if _is_bare(tool)
            else tool
            for tool in tools
        ]

    return get_all_tools


def _with_counted_events(bare: Callable[..., Any]) -> Callable[..., Any]:
    async def on_event(self: Any, event: Any) -> None:
        await bare(self, event)
        run = active_run()
        if run is not None and event.type == "usage":
            run.report_usage(usage_from(event.usage, model=model_name_of(self.model)))
            run.check_budget()

    return on_event


def _turns_in_agents(bare_turn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a turn as a step of its agent if the step of another agent is around it.

    So the spend of an agent that was handed to, or is a tool, is in its own steps.
    """

    async def turn(*args: Any, **kwargs: Any) -> Any:
        node, run = CURRENT.get(), active_run()
        bound = next((one for one in (*args, *kwargs.values()) if hasattr(one, "public_agent")), None)
        agent = getattr(bound, "public_agent", None) or kwargs.get("agent")
        if agent is None or node is None or run is None or node.ctx is not run.ctx:
            return await bare_turn(*args, **kwargs)
        if node.agent in (None, agent.name):
            return await bare_turn(*args, **kwargs)
        step = GuardedStep(
            agent.name,
            input_view=lambda *_: {"agent": agent.name},
            output_view=_turn_view,
            control=_control_of,
            can_retry=False,
            role="agent",
        )
        return await run.guard.acall(step, bare_turn, *args, **kwargs)

    return turn


def _turn_view(result: Any) -> dict[str, Any]:
    """Return the answer of an agent, or the agent that it hands to, as far as a turn has either."""
    ended = result.next_step
    next_agent = getattr(ended, "new_agent", None)
    return {
        "final_output": getattr(ended, "output", None),
        "handoff": None if next_agent is None else next_agent.name,
    }


def _is_bare(tool: Any) -> bool:
    return isinstance(tool, FunctionTool) and not isinstance(tool.on_invoke_tool, _Invoker)


#: Where a server of MCP tools keeps the contracts that it was attached with. On the server, as agents are
#: cloned.
_ATTACHED = "_stroma_contracts"


class _ServerContracts(NamedTuple):
    """Contracts of tools that MCP servers have, which are known once the servers are asked."""

    guard: Guard
    contracts: dict[str, NodeContract[Any, Any]]
    servers: list[Any]

    def check(self, names: list[str], servers: list[Any]) -> None:
        """Raise UnknownNode for a contract of no tool, if the tools are those of all servers."""
        if all(any(one is server for server in servers) for one in self.servers):
            self.guard.contracts(self.contracts, names, "tool")
