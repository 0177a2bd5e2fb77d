"""OpenAI Agents SDK in a flow: each model request and each call of a tool is a step of the flow.

Built on what the SDK lets its caller replace: models and their provider, tools, handoffs, MCP servers, the
session, hooks, and the runner of agents that are tools and of judges in guardrails. Imports nothing that
patches the SDK.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import inspect
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, Literal, cast

from agents import (
    Agent,
    ApplyPatchTool,
    ComputerTool,
    CustomTool,
    FunctionTool,
    Handoff,
    LocalShellTool,
    Model,
    RunConfig,
    RunHooks,
    Runner,
    RunResult,
    RunResultStreaming,
    RunState,
    ShellTool,
    handoff,
)
from agents.run import get_default_agent_runner, set_default_agent_runner

from stroma.adapters._durable_steps import ToolOptions, agent_step, ask_approval, check_options
from stroma.adapters._openai_agents_steps import (
    AgentSession,
    DurableModel,
    DurableProvider,
    DurableServer,
    Proxy,
    ToolInvoker,
    agent_of_tool,
    reached_agents,
)
from stroma.adapters.guard import UnknownNode
from stroma.engine.execution import AGENT, AgentRun, running_agent
from stroma.runner.flows.flow import current_flow


class DurableRunner:
    """``Runner`` whose agents are durable in the body of a flow: ``await DurableRunner().run(agent, "...")``.

    There each model request is the step ``AGENT.model`` and each call of a tool the step ``AGENT.TOOL``, with
    everything that a step has; policies and timeouts go by these ids. This holds for agents that it hands off
    to or has as tools, and for judges in guardrails. Approvals are questions of the flow, answered with a
    ToolApproval. Anywhere else it is ``Runner``.

    ``tools``: options by the names of tools, see ToolOptions. False: the tool is not a step, and must not
        wait.
    """

    def __init__(self, *, tools: Mapping[str, ToolOptions | Literal[False]] | None = None) -> None:
        self.tools: dict[str, ToolOptions | Literal[False]] = dict(tools or {})
        for name, options in self.tools.items():
            check_options(f"tool {name!r}", options)
        if type(get_default_agent_runner()) is not _InnerRunner:
            set_default_agent_runner(cast("Any", _InnerRunner(get_default_agent_runner())))

    async def run(self, agent: Agent[Any], input: Any, **options: Any) -> RunResult:
        """Call ``Runner.run``. Raises UnknownNode for options of no tool; in a flow refuses a RunState."""
        if current_flow() is None:
            return await Runner.run(agent, input, **options)
        run = _DurableRun(self, agent, input, options)
        result: RunResult = await run.call(input)
        while result.interruptions:
            result = await run.call(await run.decide(result))
        return result

    def run_streamed(self, agent: Agent[Any], input: Any, **options: Any) -> RunResultStreaming:
        """Call ``Runner.run_streamed``. In a flow the events of an answer come at the end of its step."""
        if current_flow() is None:
            return Runner.run_streamed(agent, input, **options)
        run = _DurableRun(self, agent, input, options)
        return cast("RunResultStreaming", _AnsweringStream(run.call_streamed(input), run))


#: The durable runner around this code.
_RUNNER: ContextVar[DurableRunner | None] = ContextVar("stroma_openai_agents", default=None)


class _InnerRunner(Proxy):
    """The SDK's runner: an agent that is run inside of a durable one is durable as well."""

    async def run(self, starting_agent: Any, input: Any, **options: Any) -> Any:
        return await self._here().run(starting_agent, input, **options)

    def run_streamed(self, starting_agent: Any, input: Any, **options: Any) -> Any:
        return self._here().run_streamed(starting_agent, input, **options)

    def _here(self) -> Any:
        runner = _RUNNER.get()
        return self._wrapped if runner is None or current_flow() is None else runner


def _bare_runner() -> Any:
    runner: Any = get_default_agent_runner()
    return runner._wrapped if type(runner) is _InnerRunner else runner


class _DurableRun:
    """A run of an agent in the body of a flow.

    Attributes:
        name: of the agent that it starts with; ``asking``: of the one that asks its model.
        provider: of the models that are known by their names.
        arguments: of approved calls by their ids, in place of the model's.
    """

    def __init__(self, runner: DurableRunner, agent: Agent[Any], input: Any, options: dict[str, Any]) -> None:
        if isinstance(input, RunState):
            raise TypeError(
                "a DurableRunner takes no RunState in a flow, where approvals are questions of the "
                "flow; pass the input"
            )
        if _RUNNER.get() is not runner:
            _check_names(runner.tools, agent)
        self.name = self.asking = agent.name
        self.arguments: dict[str, str] = {}
        self._runner = runner
        self._agent_run = AgentRun(agent.name, AGENT.get())
        self._copies: dict[int, tuple[Any, Any]] = {}
        self._agent = self._copy_of(agent)
        config = options.get("run_config") or RunConfig()
        config = RunConfig(**config) if isinstance(config, dict) else config
        self.provider = config.model_provider
        self._options = {
            **options,
            "run_config": dataclasses.replace(
                config,
                model=self._model_of(config.model),
                model_provider=DurableProvider(self.provider, self),
            ),
            "hooks": _Hooks(options.get("hooks") or RunHooks(), self),
        }
        if options.get("session") is not None:
            self._options["session"] = AgentSession(options["session"], self)

    async def call(self, input: Any) -> Any:
        with self._inside(input) as options:
            return await _bare_runner().run(self._agent, input, **options)

    def call_streamed(self, input: Any) -> Any:
        with self._inside(input) as options:
            return _bare_runner().run_streamed(self._agent, input, **options)

    @contextlib.contextmanager
    def _inside(self, input: Any) -> Iterator[dict[str, Any]]:
        """Have the SDK run agents with this runner. Yields the options; a state has some."""
        names = _BESIDE_STATE if isinstance(input, RunState) else self._options
        token = _RUNNER.set(self._runner)
        try:
            with running_agent(self._agent_run):
                yield {name: self._options[name] for name in names if name in self._options}
        finally:
            _RUNNER.reset(token)

    async def decide(self, result: Any) -> Any:
        """Ask for the approvals that a run waits for. Return the state from which it continues."""
        flow, state, items = current_flow(), result.to_state(), result.interruptions
        assert flow is not None
        answers = await asyncio.gather(*(ask_approval(flow, item.name, item.arguments) for item in items))
        for item, answer in zip(items, answers, strict=True):
            if not answer.approved:
                state.reject(item, rejection_message=answer.message)
                continue
            state.approve(item)
            if answer.arguments is not None:
                self.arguments[item.call_id] = json.dumps(answer.arguments)
        return state

    async def step(self, node_id: str, state: Any, work: Any, options: ToolOptions | None = None) -> Any:
        flow = current_flow()
        assert flow is not None
        return await agent_step(flow, node_id, state, work, options)

    def options_of(self, tool: str) -> ToolOptions | Literal[False]:
        return self._runner.tools.get(tool, ToolOptions())

    # ------------------------------------------------------------------ agents and what they have

    def _copy_of(self, agent: Any) -> Any:
        """Return the agent with the models, tools, servers and handoffs of this run; always the same."""
        agent = getattr(agent, _ORIGINAL, agent)
        if id(agent) not in self._copies:
            copied = copy.copy(agent)
            setattr(copied, _ORIGINAL, agent)
            copied.model = self._model_of(agent.model)
            copied.tools = [self._tool_of(agent, tool) for tool in agent.tools]
            copied.handoffs = [self._handoff_of(target) for target in agent.handoffs]
            copied.mcp_servers = [DurableServer(server, self, agent.name) for server in agent.mcp_servers]
            self._copies[id(agent)] = agent, copied
        return self._copies[id(agent)][1]

    def _model_of(self, model: Any) -> Any:
        return DurableModel(model, self) if isinstance(model, Model) else model

    def _tool_of(self, agent: Any, tool: Any) -> Any:
        if isinstance(tool, _LOCAL) or (isinstance(tool, ShellTool) and tool.executor is not None):
            raise TypeError(
                f"agent {agent.name!r} has a {type(tool).__name__}, which cannot run in the body of "
                "a flow; replace it by a "
                "function tool"
            )
        if not isinstance(tool, (FunctionTool, CustomTool)) or agent_of_tool(tool) is not None:
            return tool  # Its provider calls it, or it runs an agent.
        copied: Any = copy.copy(tool)
        copied.on_invoke_tool = ToolInvoker(tool, self, f"{agent.name}.{tool.name}")
        if callable(tool.needs_approval) and hasattr(tool.on_invoke_tool, "prepare_arguments"):
            copied.needs_approval = partial(_needs_approval, tool)
        if isinstance(tool, FunctionTool):
            copied.timeout_seconds = None  # Each attempt of the step has it.
        return copied

    def _handoff_of(self, target: Any) -> Any:
        copied: Any = copy.copy(target if isinstance(target, Handoff) else handoff(target))
        invoke = copied.on_invoke_handoff

        async def invoke_handoff(*args: Any) -> Any:
            return self._copy_of(await invoke(*args))

        copied.on_invoke_handoff = invoke_handoff
        return copied


#: Attribute of the copy of an agent.
_ORIGINAL: Final = "_stroma_original"
_BESIDE_STATE: Final = ("error_handlers", "hooks", "run_config", "session")
_LOCAL: Final = (ApplyPatchTool, ComputerTool, LocalShellTool)


def _check_names(tools: Mapping[str, object], agent: Any) -> None:
    """Raise UnknownNode for options of no tool, unless some tools get known only in the run."""
    agents, is_complete = reached_agents(agent)
    known = {tool.name for each in agents for tool in each.tools}
    unknown = [name for name in tools if name not in known]
    if unknown and is_complete and not any(each.mcp_servers for each in agents):
        have = ", ".join(map(repr, sorted(known))) or "none"
        raise UnknownNode(f"options of unknown tool {unknown[0]!r}; known: {have}")


async def _needs_approval(tool: Any, context: Any, arguments: Any, call_id: str) -> bool:
    """Return True if a call needs approval. A tool is asked only about unchanged arguments."""
    prepared = tool.on_invoke_tool.prepare_arguments(json.dumps(arguments), tool.name)
    if prepared is not None and not prepared.unchanged:
        return True
    answer = tool.needs_approval(context, arguments, call_id)
    return bool(await answer if inspect.isawaitable(answer) else answer)


class _Hooks(Proxy):
    """The hooks of a run, which note which agent asks its model next: models do not get it."""

    async def on_llm_start(self, context: Any, agent: Any, *args: Any) -> None:
        self._run.asking = agent.name
        await self._wrapped.on_llm_start(context, agent, *args)


class _AnsweringStream(Proxy):
    """A streamed run that asks for approvals, and continues."""

    async def stream_events(self) -> AsyncGenerator[Any]:
        while True:
            async with contextlib.aclosing(self._wrapped.stream_events()) as events:
                async for event in events:
                    yield event
            if not self._wrapped.interruptions:
                return
            self._wrapped = self._run.call_streamed(await self._run.decide(self._wrapped))
