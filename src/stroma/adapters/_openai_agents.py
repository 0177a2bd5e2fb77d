"""Requests and tools of the OpenAI Agents SDK as steps, wherever it makes them."""

from __future__ import annotations

import copy
import functools
import json
import types
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar, cast

from agents import Agent, FunctionTool, Model, ModelProvider, MultiProvider, RunContextWrapper, RunState
from agents import Usage as SDKUsage
from agents import run as agents_run
from agents.exceptions import (
    InputGuardrailTripwireTriggered,
    OutputGuardrailTripwireTriggered,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
)
from agents.realtime import RealtimeAgent, RealtimeSession
from agents.run import AgentRunner
from agents.run_internal import run_loop
from agents.tool import maybe_invoke_function_tool_failure_error_function

from stroma.adapters._guarded_call import Call
from stroma.adapters._guarded_run import active_run
from stroma.adapters._state_views import as_it_is, newest_of
from stroma.adapters._step import Control, GuardedStep
from stroma.adapters.guard import Guard, what_stopped
from stroma.contracts.contract import NodeContract
from stroma.cost.usage import Usage, usage_from
from stroma.engine.execution import current_node_or_none

__all__ = [
    "GuardedModel",
    "GuardedProvider",
    "ServerContracts",
    "control",
    "guard_model",
    "guard_tool",
    "used_before",
]

T = TypeVar("T")


# ---------------------------------------------------------------------- models


def _twin(original: T, mixin: type[Any], guard: Any) -> T:
    """Return an object of the original's class whose methods are those of ``mixin``, and which has all attributes in common."""
    kind = type(original)
    twins = _TWINS.setdefault(mixin, weakref.WeakKeyDictionary())
    if kind not in twins:
        about = {
            "__slots__": ("_stroma_guard",),
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
        }
        twins[kind] = types.new_class(kind.__name__, (mixin, kind), {}, lambda body: body.update(about))
    twin: Any = object.__new__(twins[kind])
    twin.__dict__ = original.__dict__
    twin._stroma_guard = guard
    return cast("T", twin)


_TWINS: dict[type[Any], weakref.WeakKeyDictionary[type[Any], type[Any]]] = {}


class GuardedModel(Model):
    """A model whose requests are steps: ``Agent(model=GuardedModel(model, guard))``.

    It is of the class of the model and shares its attributes, private ones too: the SDK sees no difference.
    """

    _stroma_guard: Guard

    def __new__(cls, model: Any = None, guard: Any = None) -> Any:
        return object.__new__(cls) if model is None else _twin(model, GuardedModel, guard)

    def __init__(self, model: Model, guard: Guard) -> None:
        """Do nothing: the attributes are those of the model."""

    def __eq__(self, other: object) -> bool:
        """Return True for the model itself, and for what guards it: agents are compared by their models."""
        return getattr(other, "__dict__", None) is self.__dict__

    def __hash__(self) -> int:
        return id(self.__dict__)

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        """Request a response of the model as the step ``model``."""
        return await self._stroma_guard.acall(_request(self), super().get_response, *args, **kwargs)

    def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Stream a response of the model as the step ``model``; it is retried only until its first event."""
        run, bare = self._stroma_guard.current, super().stream_response
        step = _request(self, collect=_last_response, delta=_delta)
        return Call(run, step, bare, args, kwargs).astream()


def _request(model: Any, **options: Any) -> GuardedStep:
    def used(response: Any) -> Usage | None:
        if getattr(response, "usage", None) is None:
            return None
        name = getattr(response, "model", None) or getattr(model, "model", None)
        return usage_from(response.usage, model=name if isinstance(name, str) else None)

    return GuardedStep(
        "model", input_view=_request_view, output_view=_response_view, usage=used, control=control, **options
    )


class GuardedProvider(ModelProvider):
    """Guards the models that a provider finds by their names: ``RunConfig(model_provider=GuardedProvider(guard))``.

    In a run of a guard there is no need for it.
    """

    _stroma_guard: Guard

    def __new__(cls, guard: Any = None, provider: Any = None) -> Any:
        if guard is None:
            return object.__new__(cls)
        return _twin(MultiProvider() if provider is None else provider, GuardedProvider, guard)

    def __init__(self, guard: Guard, provider: ModelProvider | None = None) -> None:
        """Do nothing: the attributes are those of the provider."""

    def get_model(self, model_name: str | None) -> Model:
        """Return the provider's model of a name, whose requests are steps."""
        return guard_model(super().get_model(model_name), self._stroma_guard)


def guard_model(model: Model, guard: Guard) -> Model:
    return model if isinstance(model, GuardedModel) else GuardedModel(model, guard)


def _request_view(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return newest_of(args[1] if len(args) > 1 else kwargs.get("input"))


def _response_view(response: Any) -> dict[str, Any]:
    return {"output": getattr(response, "output", None)}


def _last_response(events: list[Any]) -> Any:
    """Return the last response of a stream, which has the usage."""
    return next((event.response for event in reversed(events) if hasattr(event, "response")), None)


def _delta(event: Any) -> str | None:
    return event.delta if event.type == "response.output_text.delta" else None


def control(error: BaseException) -> Control | None:
    """Return the meaning of a tripped guardrail: it ends the run of an agent without a retry."""
    return Control("passed") if isinstance(error, _TRIPWIRES) else None


_TRIPWIRES = (
    InputGuardrailTripwireTriggered,
    OutputGuardrailTripwireTriggered,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
)


# ---------------------------------------------------------------------- tools


def guard_tool(
    tool: Any,
    guard: Guard,
    contract: NodeContract[Any, Any] | None,
    output_view: Callable[[Any], Any] = as_it_is,
) -> Any:
    """Return a tool whose calls are steps."""
    if guard.has(tool.on_invoke_tool, contract):
        return tool
    # A copy that does not turn its errors into messages: what the model sees of them is decided after the
    # step.
    bare = copy.copy(tool)
    bare._failure_error_function, bare._use_default_failure_error_function = None, False
    return _twin(tool, GuardedTool, _Invoker(tool, bare, guard, contract, output_view))


class GuardedTool:
    """A tool whose calls are steps. It shares the attributes of the tool, so that what is changed there later holds here."""

    _stroma_guard: _Invoker

    @property
    def on_invoke_tool(self) -> Any:
        try:
            return self._stroma_guard
        except AttributeError:  # Made by dataclasses.replace(): it has what it was made with.
            return self.__dict__["on_invoke_tool"]

    @on_invoke_tool.setter
    def on_invoke_tool(self, invoke: Any) -> None:
        self.__dict__["on_invoke_tool"] = invoke
        invoker = getattr(self, "_stroma_guard", None)
        if invoker is not None:
            invoker.replace(invoke)

    def __copy__(self) -> Any:
        """Return a copy of the tool that is guarded, too."""
        return self._stroma_guard.again()

    def __eq__(self, other: object) -> bool:
        """Return True for the tool itself, and for what guards it."""
        return getattr(other, "__dict__", None) is self.__dict__


class _Invoker:
    """Calls a tool as a step, and then makes of an error what the tool makes of it; what stopped the run comes out."""

    def __init__(
        self,
        tool: Any,
        bare: Any,
        guard: Guard,
        contract: NodeContract[Any, Any] | None,
        output_view: Callable[[Any], Any],
    ) -> None:
        self._tool, self._bare, self._guard = tool, bare, guard
        self._about = guard, contract, output_view
        guard.mark(self, contract)
        about: Any = {"input_view": _arguments, "output_view": output_view, "control": control}
        self._step = GuardedStep(tool.name, contract, role="tool", **about)

    async def __call__(self, context: Any, arguments: str) -> Any:
        try:
            return await self._guard.acall(self._step, self._bare.on_invoke_tool, context, arguments)
        except Exception as error:
            message = None
            if what_stopped(error) is None and control(error) is None:
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

    def replace(self, invoke: Any) -> None:
        """Call another function in place of the tool's."""
        self._bare.on_invoke_tool = invoke

    def again(self) -> Any:
        """Return a copy of the tool, guarded in the same way."""
        return guard_tool(copy.copy(self._tool), *self._about)

    def __getattr__(self, name: str) -> Any:
        if name in ("_tool", "_bare", "__agents_bind_function_tool__"):
            raise AttributeError(name)
        return getattr(self._bare.on_invoke_tool, name)


def _of_server(result: Any) -> Any:
    """Return the result of a tool of an MCP server, parsed if its text is JSON."""
    if isinstance(result, list) and len(result) == 1:
        result = result[0]
    text = result.get("text") if isinstance(result, dict) and result.get("type") == "text" else result
    try:
        return json.loads(text) if isinstance(text, str) else result
    except ValueError:
        return text


def _arguments(args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    try:
        return json.loads(args[1]) if args[1] else {}
    except ValueError:
        return args[1]


# ---------------------------------------------------------------------- in runs of a guard


def _install() -> None:
    """Guard all models and tools that the SDK uses in a run of a guard.

    Judges of guardrails, agents as tools, RunConfig(model=), tools of MCP servers, realtime sessions and what
    was added
    later: none of them can be reached from the agent that was attached.
    """
    bare_model, bare_tools = run_loop.get_model, Agent.get_all_tools

    def get_model(*args: Any, **kwargs: Any) -> Model:
        model, run = bare_model(*args, **kwargs), active_run()
        return model if run is None else guard_model(model, _guard_of(run))

    async def get_all_tools(self: Any, *args: Any, **kwargs: Any) -> list[Any]:
        tools = await bare_tools(self, *args, **kwargs)
        attached: list[ServerContracts] = list(
            filter(None, (getattr(server, _ATTACHED, None) for server in self.mcp_servers))
        )
        run, contracts = active_run(), dict[str, NodeContract[Any, Any]]()
        for one in attached:
            contracts |= one.contracts
            one.check([tool.name for tool in tools], self.mcp_servers)
        if run is None and not attached:
            return list(tools)
        guard = attached[0].guard if attached else _guard_of(run)
        own = {id(tool) for tool in self.tools}
        return [
            guard_tool(tool, guard, contracts.get(tool.name), as_it_is if id(tool) in own else _of_server)
            if _is_bare(tool)
            else tool
            for tool in tools
        ]

    bare_streamed = AgentRunner.run_streamed

    @functools.wraps(bare_streamed)
    def run_streamed(self: Any, starting_agent: Any, input: Any, **kwargs: Any) -> Any:
        run, before = active_run(), used_before(input, kwargs.get("context"))
        result = bare_streamed(self, starting_agent, input, **kwargs)
        if run is not None:
            _compare_at_end(result, run, before)
        return result

    bare_event = RealtimeSession.on_event

    @functools.wraps(bare_event)
    async def on_event(self: Any, event: Any) -> None:
        await bare_event(self, event)
        run = active_run()
        if run is not None and event.type == "usage":
            name = getattr(self.model, "model", None)
            run.report_usage(usage_from(event.usage, model=name if isinstance(name, str) else None))
            run.usage.check_budget()

    run_loop.get_model, AgentRunner.run_streamed = get_model, run_streamed
    for module, name in ((agents_run, "run_single_turn"), (run_loop, "run_single_turn_streamed")):
        setattr(module, name, _turns_in_agents(getattr(module, name)))
    Agent.get_all_tools = RealtimeAgent.get_all_tools = get_all_tools
    RealtimeSession.on_event = on_event


def _turns_in_agents(bare_turn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a turn as a step of its agent if the step of another agent is around it.

    So the spend of an agent that was handed to, or is a tool, is in its own steps.
    """

    @functools.wraps(bare_turn)
    async def turn(*args: Any, **kwargs: Any) -> Any:
        node, run = current_node_or_none(), active_run()
        bound = next((one for one in (*args, *kwargs.values()) if hasattr(one, "public_agent")), None)
        agent = getattr(bound, "public_agent", None) or kwargs.get("agent")
        around = None if node is None or run is None or node.ctx is not run.ctx else node.agent
        if agent is None or around is None or around == agent.name:
            return await bare_turn(*args, **kwargs)
        step = GuardedStep(
            agent.name,
            input_view=lambda *_: {"agent": agent.name},
            output_view=_turn_view,
            control=control,
            can_retry=False,
            role="agent",
        )
        return await _guard_of(run).acall(step, bare_turn, *args, **kwargs)

    return turn


def _turn_view(result: Any) -> dict[str, Any]:
    """Return the answer of an agent, or the agent that it hands to, as far as a turn has either."""
    ended = result.next_step
    next_agent = getattr(ended, "new_agent", None)
    return {
        "final_output": getattr(ended, "output", None),
        "handoff": None if next_agent is None else next_agent.name,
    }


def used_before(input: Any, context: Any) -> int:
    """Return the tokens that the SDK's own figure of a run begins with."""
    about = input._context if isinstance(input, RunState) else context
    return about.usage.total_tokens if isinstance(about, RunContextWrapper) else 0


def _compare_at_end(result: Any, run: Any, before: int) -> None:
    """Compare the SDK's own figure of a streamed run, and of those before it in the same place, once it has ended."""
    node = current_node_or_none()
    counted: Any = _STREAMED if node is None else node.notes
    place = run if node is None else "tokens of streamed runs of the OpenAI Agents SDK"

    def compare(_: Any) -> None:
        used = result.context_wrapper.usage
        if isinstance(used, SDKUsage):
            counted[place] = counted.get(place, 0) + used.total_tokens - before
            run.usage.compare("the OpenAI Agents SDK", counted[place])

    # The name of the task in older releases is the second one.
    task = getattr(result, "run_loop_task", None) or getattr(result, "_run_impl_task", None)
    if task is not None:
        task.add_done_callback(compare)


#: Tokens that the SDK has counted in streamed runs, by the run that called for them; a step has them in its
#: notes.
_STREAMED: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _guard_of(run: Any) -> Guard:
    guard: Guard = run.guard
    return guard


def _is_bare(tool: Any) -> bool:
    return isinstance(tool, FunctionTool) and not isinstance(tool.on_invoke_tool, _Invoker)


#: Where a server of MCP tools keeps the contracts that it was attached with. On the server, as agents are
#: cloned.
_ATTACHED = "_stroma_contracts"


class ServerContracts:
    """Contracts of tools that MCP servers have, which are known once the servers are asked."""

    def __init__(
        self, guard: Guard, contracts: dict[str, NodeContract[Any, Any]], servers: list[Any]
    ) -> None:
        self.guard, self.contracts = guard, contracts
        self._unseen, self._names, self._servers = set(contracts), set[str](), list(servers)
        for server in servers:
            setattr(server, _ATTACHED, self)

    def check(self, names: list[str], servers: list[Any]) -> None:
        """Take the tools of some servers. Raise UnknownNode once all were asked and a contract is of none of them."""
        self._unseen -= set(names)
        self._names.update(names)
        self._servers = [one for one in self._servers if not any(one is server for server in servers)]
        if self._unseen and not self._servers:
            self.guard.contracts(self.contracts, self._names, "tool")


_install()
