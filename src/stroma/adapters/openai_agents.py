"""OpenAI Agents SDK: in a flow, agents whose model requests and tools are its steps; elsewhere, guarded agents.

::

    result = await DurableRunner().run(agent, "...")  # in the body of a flow

    attach(agent, guard, {"search": (Query, Hits)})
    result = await GuardedRunner(guard).run(agent, "...")  # a run; inside `with guard.run()`, part of that
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from stroma._utils.lazy import lazy
from stroma.adapters._releases import import_error, warn_if_untested

try:
    from agents import FunctionTool, Model, Runner, RunState, Usage

    from stroma.adapters._openai_agents import (
        GuardedModel,
        GuardedProvider,
        ServerContracts,
        control,
        guard_model,
        guard_tool,
        used_before,
    )
    from stroma.adapters._openai_agents_graph import reached_agents
except ImportError as error:
    raise import_error("openai-agents", error) from error

from stroma.adapters._step import Control, GuardedStep
from stroma.adapters.guard import Contracts, Guard

warn_if_untested("openai-agents")

if TYPE_CHECKING:
    from stroma.adapters._openai_agents_durability import DurableRunner, ToolApproval, ToolOptions

__all__ = [
    "DurableRunner",
    "GuardedModel",
    "GuardedProvider",
    "GuardedRunner",
    "ToolApproval",
    "ToolOptions",
    "attach",
]

_OF_FLOWS: dict[str, str] = dict.fromkeys(
    ("DurableRunner", "ToolApproval", "ToolOptions"), "_openai_agents_durability"
)
__getattr__, __dir__ = lazy(__name__, _OF_FLOWS, "stroma.adapters")

A = TypeVar("A")


def attach(agent: A, guard: Guard, contracts: Contracts | None = None) -> A:
    """Make steps of the tools of an agent and of those it hands off to or has as tools, and of the requests of their models.

    ``contracts``: by the names of tools; input is the arguments, output the result. The agents are changed in
    place. In a run of a guard all other models and tools that the SDK uses are steps, too: a model that is
    only named, one of ``RunConfig(model=)``, judges of guardrails, tools of MCP servers. Raises UnknownNode
    for a contract of no tool; of an agent with MCP servers when these have listed their tools.

    A realtime agent is attached in the same way. Enter its session inside ``async with guard.run():``: the
    tokens of its model count in that run and in no step, and a spent budget ends the session with
    BudgetExceeded.
    """
    agents, _ = reached_agents(agent)
    tools = {tool.name for each in agents for tool in each.tools if isinstance(tool, FunctionTool)}
    servers = [server for each in agents for server in each.mcp_servers]
    listed = tools if not servers else {*tools, *(contracts or {})}
    by_name = guard.contracts(contracts, listed, "tool")
    for each in agents:
        if isinstance(getattr(each, "model", None), Model):  # A realtime agent has none of its own.
            each.model = guard_model(each.model, guard)
        each.tools = [
            guard_tool(tool, guard, by_name.get(tool.name)) if isinstance(tool, FunctionTool) else tool
            for tool in each.tools
        ]
    if servers:
        ServerContracts(guard, {name: by_name[name] for name in by_name if name not in tools}, servers)
    return agent


class GuardedRunner:
    """``Runner`` whose calls are runs of a guard, each with the agent as a step around its models and tools."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._run = guard.each_call(self._arun_step, _input_view, _is_continuation)
        self._run_sync = guard.each_call(self._run_step, _input_view, _is_continuation)

    async def run(self, agent: Any, input: Any, **options: Any) -> Any:
        """Call ``Runner.run`` under this guard."""
        return await self._run(agent, input, **options)

    def run_sync(self, agent: Any, input: Any, **options: Any) -> Any:
        """Call ``Runner.run_sync`` under this guard."""
        return self._run_sync(agent, input, **options)

    async def _arun_step(self, agent: Any, input: Any, **options: Any) -> Any:
        async def run() -> Any:
            before = self._begin(agent, input, options)
            return self._end(await Runner.run(agent, input, **options), before)

        try:
            with self.guard.current.here():
                return await self.guard.acall(_step_of(agent, input), run)
        except _Interrupted as interrupted:
            return interrupted.result

    def _run_step(self, agent: Any, input: Any, **options: Any) -> Any:
        def run() -> Any:
            before = self._begin(agent, input, options)
            return self._end(Runner.run_sync(agent, input, **options), before)

        try:
            with self.guard.current.here():
                return self.guard.call(_step_of(agent, input), run)
        except _Interrupted as interrupted:
            return interrupted.result

    def _begin(self, agent: Any, input: Any, options: dict[str, Any]) -> int:
        """Take the stored answers to what a run waits for; return the tokens that its own figure begins with."""
        if isinstance(input, RunState):
            for step_id, answer in self.guard.current.questions.answers_of_steps:
                if step_id == agent.name:
                    _decide(input, answer)
        return used_before(input, options.get("context"))

    def _end(self, result: Any, before: int) -> Any:
        used = result.context_wrapper.usage
        if isinstance(used, Usage):
            self.guard.compare_usage("the OpenAI Agents SDK", used.total_tokens - before)
        if isinstance(result.interruptions, list) and result.interruptions:
            raise _Interrupted(result)
        return result


class _Interrupted(Exception):
    """The run of an agent that waits for approvals."""

    def __init__(self, result: Any) -> None:
        super().__init__("; ".join(f"approval of {item.name}" for item in result.interruptions))
        self.result = result


def _decide(state: Any, answer: Any) -> None:
    """Approve or reject what is pending by an answer: true or false, or one of these by the name of each tool."""
    for item in state.get_interruptions():
        decision = answer.get(item.name) if isinstance(answer, dict) else answer
        if decision is True:
            state.approve(item)
        elif decision is False:
            state.reject(item)


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
    about: Any = {"input_view": lambda *_: seen, "output_view": _final, "control": _control}
    return GuardedStep(agent.name, can_retry=False, role="agent", **about)


def _control(error: BaseException) -> Control | None:
    return Control("suspended", str(error)) if isinstance(error, _Interrupted) else control(error)
