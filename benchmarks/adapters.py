"""What a guard costs: the same small program of a framework, plain and guarded in turns, with a fake model.

``./dev run python -m benchmarks.adapters [NAME ...]`` runs each framework in the environment of its tests,
and makes that if it is missing. It prints one line of a Markdown table per program: CPU time of a call
without and with the guard in milliseconds, their ratio, and what the guard adds to each step. The fakes take
no time: the plain figure is the framework's.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time
from typing import Any, Final, NamedTuple, TypedDict

from stroma import StromaRunner
from stroma.adapters import Guard

ROOT: Final = Path(__file__).parents[1]
ROUNDS: Final = 15
#: Set in the process that runs inside a framework's environment.
INSIDE: Final = "STROMA_BENCHMARK_INSIDE"


class Program(NamedTuple):
    """One program of a framework.

    Attributes:
        name: what is called.
        guard: the guard of ``guarded``, each call of which is one run.
    """

    name: str
    guard: Guard
    plain: Callable[[], Any]
    guarded: Callable[[], Any]


class Cost(NamedTuple):
    """CPU time in milliseconds of the fastest call of a program, plain and guarded, and its number of steps."""

    plain_ms: float
    guarded_ms: float
    steps: int


def measure(program: Program, rounds: int = ROUNDS) -> Cost:
    """Return what a program costs: both forms are called in turns, after one call of each that does not count."""
    best = [float("inf")] * 2
    for number in range(rounds + 1):
        for form, call in enumerate((program.plain, program.guarded)):
            begin = process_time()
            call()
            taken = process_time() - begin
            if number:
                best[form] = min(best[form], taken * 1e3)
    last = program.guard.last
    if last is None or last.result is None:
        raise RuntimeError(f"{program.name} made no run; the guard is not attached to it")
    return Cost(*best, sum(1 for _ in last.result.trace.walk()))


def new_guard() -> Guard:
    return Guard(StromaRunner.quick())


#: What an agent's model does: nine calls of its tool one after another, and an answer.
def scripted(call: Any) -> list[Any]:
    return [call] * 9 + ["done"]


# ---------------------------------------------------------------------- the guard alone


def guard() -> Iterator[Program]:
    alone, aalone = new_guard(), new_guard()

    def nothing(n: int) -> dict[str, int]:
        return {"n": n}

    async def anothing(n: int) -> dict[str, int]:
        return {"n": n}

    def call(func: Any, own: Guard | None) -> None:
        with contextlib.nullcontext() if own is None else own.run():
            for n in range(100):
                func(n)

    async def acall(func: Any, own: Guard | None) -> None:
        async with contextlib.nullcontext() if own is None else own.run():
            for n in range(100):
                await func(n)

    step, astep = alone.wrap("nothing", nothing), aalone.wrap("nothing", anothing)
    yield Program("a function", alone, lambda: call(nothing, None), lambda: call(step, alone))
    yield Program(
        "a coroutine function",
        aalone,
        lambda: asyncio.run(acall(anothing, None)),
        lambda: asyncio.run(acall(astep, aalone)),
    )


# ---------------------------------------------------------------------- frameworks


class Count(TypedDict, total=False):
    n: int


def langgraph() -> Iterator[Program]:
    from langgraph.graph import START, StateGraph

    from stroma.adapters.langgraph import attach

    def node(_: Any) -> Any:
        return {"n": 1}

    async def anode(_: Any) -> Any:
        return {"n": 1}

    def graph(func: Any, guard: Guard | None) -> Any:
        builder, previous = StateGraph(Count), START
        for n in range(20):
            builder.add_node(f"n{n}", func)
            builder.add_edge(previous, f"n{n}")
            previous = f"n{n}"
        return (builder if guard is None else attach(builder, guard)).compile()

    config: Any = {"recursion_limit": 100}
    guard, aguard = new_guard(), new_guard()
    graphs, agraphs = (
        [graph(node, one) for one in (None, guard)],
        [graph(anode, one) for one in (None, aguard)],
    )
    yield Program(
        "`invoke` of a graph of 20 nodes", guard, *[lambda g=g: g.invoke({"n": 0}, config) for g in graphs]
    )
    yield Program(
        "`ainvoke` of it", aguard, *[lambda g=g: asyncio.run(g.ainvoke({"n": 0}, config)) for g in agraphs]
    )


def langchain() -> Iterator[Program]:
    from deepagents import create_deep_agent
    from langchain.agents import create_agent
    from tests.frameworks.contract import CALL
    from tests.frameworks.langchain.fakes import Script
    from tests.frameworks.langchain.test_langchain import tool_of

    from stroma.adapters.langchain import StromaMiddleware

    def program(name: str, create: Any) -> Program:
        guard, script = new_guard(), Script(answers=[])
        middleware = StromaMiddleware(guard)
        plain = create(script, [tool_of()])
        guarded = middleware.attach(create(script, [tool_of()], middleware=[middleware]))

        def call(agent: Any) -> None:
            script.answers = scripted(CALL)
            agent.invoke({"messages": [("user", "hello")]}, {"recursion_limit": 100})

        return Program(name, guard, lambda: call(plain), lambda: call(guarded))

    yield program("agent", create_agent)
    yield program("Deep Agent", create_deep_agent)


def pydantic_ai() -> Iterator[Program]:
    from tests.frameworks.contract import CALL
    from tests.frameworks.pydantic_ai.test_pydantic_ai import Script, agent_of

    from stroma.adapters.pydantic_ai import StromaCapability

    guard, script = new_guard(), Script()
    agents = [agent_of(script), agent_of(script, StromaCapability(guard))]

    def call(agent: Any) -> None:
        script.answers = scripted(CALL)
        asyncio.run(agent.run("hello"))

    yield Program("agent", guard, *[lambda a=a: call(a) for a in agents])


def openai_agents() -> Iterator[Program]:
    from agents import Runner
    from tests.frameworks.contract import CALL
    from tests.frameworks.openai_agents.test_openai_agents import Script, agent_of

    from stroma.adapters.openai_agents import GuardedRunner

    guard, script = new_guard(), Script()
    plain, guarded = agent_of(script), agent_of(script, guard)

    def call(runner: Any, agent: Any) -> None:
        script.answers = scripted(CALL)
        asyncio.run(runner.run(agent, "hello", max_turns=20))

    runner = GuardedRunner(guard)
    yield Program("agent", guard, lambda: call(Runner, plain), lambda: call(runner, guarded))


def crewai() -> Iterator[Program]:
    from tests.frameworks.crewai import conftest  # noqa: F401  (It switches telemetry off.)
    from tests.frameworks.crewai.test_crewai import ACTION, ANSWER, Script, crew_of, forecast

    from stroma.adapters.crewai import attach, guard_llm

    guard, script = new_guard(), Script.of()
    guarded_script = guard_llm(Script.of(), guard)

    def flow(llm: Any, guard: Guard | None) -> None:
        llm._answers = ["x"] * 10
        made = forecast(llm, 10)
        made.suppress_flow_events = True  # Panels on the terminal.
        (made if guard is None else attach(made, guard)).kickoff()

    yield Program(
        "flow that asks an LLM", guard, lambda: flow(script, None), lambda: flow(guarded_script, guard)
    )

    of_crew, llms = new_guard(), [Script.of(), Script.of()]
    crews = [crew_of(llms[0]), attach(crew_of(llms[1]), of_crew)]

    def kickoff(n: int) -> None:
        llms[n]._answers = [ACTION, ANSWER]
        crews[n].kickoff()

    yield Program("crew", of_crew, lambda: kickoff(0), lambda: kickoff(1))


def agent_framework() -> Iterator[Program]:
    from tests.frameworks.agent_framework.test_agent_framework import Script, agent_of, ask
    from tests.frameworks.contract import CALL

    guard, script = new_guard(), Script()
    agents = [agent_of(script), agent_of(script, guard)]

    def call(agent: Any) -> None:
        script.answers = scripted(CALL)
        ask(agent)

    yield Program("agent", guard, *[lambda a=a: call(a) for a in agents])


def claude_agent_sdk() -> Iterator[Program]:
    from tests.frameworks.claude_agent_sdk.fakes import Script
    from tests.frameworks.claude_agent_sdk.test_claude_agent_sdk import ask
    from tests.frameworks.contract import CALL

    guard = new_guard()
    yield Program(
        "query with your own tools",
        guard,
        lambda: ask(Script(*scripted(CALL))),
        lambda: ask(Script(*scripted(CALL)), guard),
    )


def google_adk() -> Iterator[Program]:
    from tests.frameworks.contract import CALL
    from tests.frameworks.google_adk.test_google_adk import Script, agent_of, ask

    guard, scripts = new_guard(), [Script.of(), Script.of()]
    agents = [agent_of(scripts[0]), agent_of(scripts[1], guard)]

    def call(n: int) -> None:
        scripts[n]._answers = scripted(CALL)
        ask(agents[n], guard=guard if n else None)

    yield Program("agent", guard, lambda: call(0), lambda: call(1))


def dspy() -> Iterator[Program]:
    import dspy as module
    from tests.frameworks.dspy.test_dspy import Forecast, Plain, Script

    from stroma.adapters.dspy import attach

    guard = new_guard()
    programs = [Forecast(9), attach(Forecast(9), guard)]

    def call(program: Any) -> None:
        with module.context(lm=Script({"celsius": 4}, *[{"text": "x"}] * 9), adapter=Plain()):
            program(city="Oslo")

    yield Program("program of predictors", guard, *[lambda p=p: call(p) for p in programs])


def haystack() -> Iterator[Program]:
    from tests.frameworks.haystack.test_haystack import Script, pipeline_of

    from stroma.adapters.haystack import attach

    guard, scripts = new_guard(), [Script() for _ in range(40)]
    pipelines = [
        pipeline_of(scripts[0], "run", *scripts[1:20]),
        attach(pipeline_of(scripts[20], "run", *scripts[21:]), guard),
    ]

    def call(pipeline: Any) -> None:
        for script in scripts:
            script.answers = ["x"]
        pipeline.run({"ask": {"text": "x"}})

    yield Program("pipeline of 21 components", guard, *[lambda p=p: call(p) for p in pipelines])


def llama_index() -> Iterator[Program]:
    from tests.frameworks.llama_index.test_llama_index import Forecast, Script, run, used

    from stroma.adapters.llama_index import attach

    guard, script = new_guard(), Script()
    model = guard.wrap("model", script.ask, usage=used)

    def call(guarded: bool) -> None:
        script.answers = ["x"] * 10
        if guarded:
            run(attach(Forecast(model, times=10), guard), guard)
        else:
            run(Forecast(script.ask, times=10))

    yield Program("workflow that asks a model", guard, lambda: call(False), lambda: call(True))


def litellm() -> Iterator[Program]:
    from types import SimpleNamespace

    import litellm as module
    from tests.frameworks.litellm.test_litellm import MESSAGES, Provider

    from stroma.adapters.litellm import attach

    module.custom_provider_map = [{"provider": "fake", "custom_handler": Provider()}]
    module.utils.custom_llm_setup()
    module.suppress_debug_info = True
    guard = new_guard()
    plain, guarded = (
        module.completion,
        attach(SimpleNamespace(completion=module.completion), guard).completion,
    )

    def call(completion: Any, own: Guard | None) -> None:
        with contextlib.nullcontext() if own is None else own.run():
            for _ in range(10):
                completion(model="fake/fake-1", messages=MESSAGES)

    yield Program("`completion`, ten times", guard, lambda: call(plain, None), lambda: call(guarded, guard))


def mcp() -> Iterator[Program]:
    from tests.frameworks.mcp.test_mcp import session_of

    guard = new_guard()

    async def call(own: Guard | None) -> None:
        async with session_of(own) as session, contextlib.nullcontext() if own is None else own.run():
            await session.list_tools()
            for _ in range(10):
                await session.call_tool("weather", {"city": "Oslo"})

    yield Program(
        "`call_tool`, ten times", guard, lambda: asyncio.run(call(None)), lambda: asyncio.run(call(guard))
    )


#: By the name of the folder of its tests: what makes the programs, the distribution, and its name in the
#: table.
FRAMEWORKS: Final[dict[str, tuple[Callable[[], Iterator[Program]], str, str]]] = {
    "guard": (guard, "stroma", "The guard alone"),
    "langgraph": (langgraph, "langgraph", "LangGraph"),
    "langchain": (langchain, "langchain", "LangChain"),
    "pydantic_ai": (pydantic_ai, "pydantic-ai-slim", "Pydantic AI"),
    "openai_agents": (openai_agents, "openai-agents", "OpenAI Agents SDK"),
    "crewai": (crewai, "crewai", "CrewAI"),
    "agent_framework": (agent_framework, "agent-framework-core", "Microsoft Agent Framework"),
    "claude_agent_sdk": (claude_agent_sdk, "claude-agent-sdk", "Claude Agent SDK"),
    "google_adk": (google_adk, "google-adk", "Google ADK"),
    "dspy": (dspy, "dspy", "DSPy"),
    "haystack": (haystack, "haystack-ai", "Haystack"),
    "llama_index": (llama_index, "llama-index-workflows", "LlamaIndex workflows"),
    "litellm": (litellm, "litellm", "litellm"),
    "mcp": (mcp, "mcp", "MCP"),
}


# ---------------------------------------------------------------------- environments, and the table


def environment(name: str) -> str:
    """Return the Python of the environment that a framework's tests have, which is made if it is missing."""
    if name == "guard":
        return sys.executable
    python = f"{sys.prefix}-{name}-newest/bin/python"
    if not os.path.exists(python):
        command = [str(ROOT / "dev"), "test", "--framework", name, "--newest", "--collect-only", "-q"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return python


def report(name: str) -> None:
    """Print a line of the table for each program of a framework."""
    make, distribution, title = FRAMEWORKS[name]
    logging.disable(logging.WARNING)
    release = "" if name == "guard" else " " + importlib.metadata.version(distribution)
    for program in make():
        plain, guarded, steps = measure(program)
        added, ratio = (guarded - plain) / steps, f"{guarded / plain:.2f}" if plain > 0.01 * steps else ""
        print(
            f"| {title}{release}: {program.name} | {steps} | {plain:.2f} | {guarded:.2f} | {ratio} | {added:.2f} |",
            flush=True,
        )


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in FRAMEWORKS]
    if unknown:
        print(f"unknown framework {unknown[0]!r}; one of: {', '.join(FRAMEWORKS)}", file=sys.stderr)
        return 2
    if INSIDE in os.environ:
        report(names[0])
        return 0
    print(f"CPU time of a call, the fastest of {ROUNDS}; Python {platform.python_version()}\n")
    print(
        "| program | steps | plain, ms | guarded, ms | ratio | added per step, ms |\n|---|---|---|---|---|---|"
    )
    sys.stdout.flush()
    worst = 0
    for name in names or FRAMEWORKS:
        command = [environment(name), "-W", "ignore", "-m", "benchmarks.adapters", name]
        env = {**os.environ, INSIDE: "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        worst = worst or subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
