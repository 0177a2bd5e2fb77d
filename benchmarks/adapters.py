"""What the guard costs a node, in microseconds of CPU: `PYTHON -m benchmarks.adapters NAME`, in the environment of a framework.

NAME: guard, langgraph, langchain, pydantic_ai, openai_agents, crewai, agent_framework, google_adk, dspy or haystack. `./dev test --framework NAME` makes the environment,
whose Python is .venv-NAME-newest/bin/python. What is measured does nothing: what is left is the framework, and the guard.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from time import process_time
from typing import Any

from stroma import StromaRunner
from stroma.adapters import Guard

ROUNDS = 7


def best(work: Callable[[], Any], steps: int) -> float:
    """Microseconds of CPU per step, in the fastest of some rounds."""
    taken = []
    for _ in range(ROUNDS):
        begin = process_time()
        work()
        taken.append(process_time() - begin)
    return min(taken) / steps * 1e6


def guard() -> dict[str, tuple[float, float]]:
    guarded = Guard(StromaRunner.quick())

    def plain(n: int) -> dict[str, int]:
        return {"n": n}

    async def aplain(n: int) -> dict[str, int]:
        return {"n": n}

    step, astep = guarded.wrap("n", plain), guarded.wrap("n", aplain)

    def sync(func: Any) -> Any:
        def work() -> None:
            with guarded.run():
                for n in range(500):
                    func(n)

        return work

    def asynchronous(func: Any) -> Any:
        async def main() -> None:
            async with guarded.run():
                for n in range(500):
                    await func(n)

        return lambda: asyncio.run(main())

    return {
        "function": (best(sync(plain), 500), best(sync(step), 500)),
        "coroutine function": (best(asynchronous(aplain), 500), best(asynchronous(astep), 500)),
    }


def langgraph() -> dict[str, tuple[float, float]]:
    from typing import TypedDict

    from langgraph.graph import START, StateGraph

    from stroma.adapters.langgraph import attach

    class State(TypedDict, total=False):
        n: int

    def graph(asynchronous: bool) -> Any:
        builder = StateGraph(State)
        previous = START
        for i in range(20):

            async def anode(state: Any) -> Any:
                return {"n": 1}

            builder.add_node(f"n{i}", anode if asynchronous else lambda state: {"n": 1})
            builder.add_edge(previous, f"n{i}")
            previous = f"n{i}"
        return builder

    config: Any = {"recursion_limit": 100}
    found = {}
    for name, asynchronous in (("invoke", False), ("ainvoke", True)):
        both = []
        for build in (lambda b: b, lambda b: attach(b, Guard(StromaRunner.quick()))):
            compiled = build(graph(asynchronous)).compile()
            if asynchronous:
                both.append(best(lambda: asyncio.run(compiled.ainvoke({"n": 0}, config)), 20))  # noqa: B023
            else:
                both.append(best(lambda: compiled.invoke({"n": 0}, config), 20))  # noqa: B023
        found[name] = (both[0], both[1])
    return found


def pydantic_ai() -> dict[str, tuple[float, float]]:
    from pydantic_ai import Agent
    from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
    from pydantic_ai.models.function import FunctionModel

    from stroma.adapters.pydantic_ai import StromaCapability

    def answer(messages: Any, _: Any) -> ModelResponse:
        return ModelResponse(parts=[TextPart("x") if len(messages) > 20 else ToolCallPart("tool", {})])

    def work(capabilities: list[Any]) -> Any:
        agent = Agent(FunctionModel(answer), capabilities=capabilities)
        agent.tool_plain(lambda: "x", name="tool")
        return lambda: asyncio.run(agent.run("x"))

    return {
        "model or tool": (best(work([]), 21), best(work([StromaCapability(Guard(StromaRunner.quick()))]), 21))
    }


def openai_agents() -> dict[str, tuple[float, float]]:
    from agents import Agent, Runner, function_tool, set_tracing_disabled
    from tests.frameworks.openai_agents.test_openai_agents import Script

    from stroma.adapters.openai_agents import GuardedRunner, attach

    set_tracing_disabled(True)

    def agent() -> Any:
        model = Script(*[("tool", "{}")] * 9, "done")
        return Agent(name="a", model=model, tools=[function_tool(lambda: "x", name_override="tool")])

    def guarded() -> None:
        guard = Guard(StromaRunner.quick())
        asyncio.run(GuardedRunner(guard).run(attach(agent(), guard), "x"))

    return {"model or tool": (best(lambda: asyncio.run(Runner.run(agent(), "x")), 19), best(guarded, 19))}


def langchain() -> dict[str, tuple[float, float]]:
    from langchain.agents import create_agent
    from langchain_core.tools import tool
    from tests.frameworks.langchain.fakes import Script

    from stroma.adapters.langchain import StromaMiddleware

    @tool
    def nothing() -> str:
        """Nothing."""
        return "x"

    def work(guarded: bool) -> Any:
        middleware = StromaMiddleware(Guard(StromaRunner.quick()))
        model = Script(answers=[])
        agent = create_agent(model, [nothing], middleware=[middleware] if guarded else [])
        if guarded:
            middleware.attach(agent)

        def run() -> None:
            model.answers = [("nothing", {})] * 9 + ["done"]
            agent.invoke({"messages": [("user", "x")]}, {"recursion_limit": 100})

        return run

    return {"model or tool": (best(work(False), 19), best(work(True), 19))}


def crewai() -> dict[str, tuple[float, float]]:
    os.environ.update(
        CREWAI_DISABLE_TELEMETRY="true", CREWAI_TRACING_ENABLED="false", OTEL_SDK_DISABLED="true"
    )
    from crewai.flow.flow import Flow, listen, start

    from stroma.adapters.crewai import attach

    class Two(Flow[dict[str, Any]]):
        @start()
        def one(self) -> int:
            return 1

        @listen(one)
        def two(self, given: int) -> int:
            return given + 1

    def work(guarded: bool) -> Any:
        flow = Two(suppress_flow_events=True)
        if guarded:
            attach(flow, Guard(StromaRunner.quick()))
        return flow.kickoff

    return {"method": (best(work(False), 2), best(work(True), 2))}


def haystack() -> dict[str, tuple[float, float]]:
    from tests.frameworks.haystack.test_haystack import Script, pipeline_of

    from stroma.adapters.haystack import attach

    def work(guarded: bool) -> Any:
        scripts = [Script() for _ in range(20)]
        pipeline = pipeline_of(scripts[0], "run", *scripts[1:])
        if guarded:
            attach(pipeline, Guard(StromaRunner.quick()))

        def run() -> None:
            for script in scripts:
                script.answers = ["x"]
            pipeline.run({"ask": {"text": "x"}})

        return run

    return {"component": (best(work(False), 21), best(work(True), 21))}


def dspy() -> dict[str, tuple[float, float]]:
    from tests.frameworks.dspy.test_dspy import GOOD, Script, Writing, run

    from stroma.adapters.dspy import attach

    def work(guarded: bool) -> Any:
        program = attach(Writing(), Guard(StromaRunner.quick())) if guarded else Writing()
        return lambda: run(program, Script(*GOOD), "call")

    return {"predictor": (best(work(False), 3), best(work(True), 3))}


def google_adk() -> dict[str, tuple[float, float]]:
    from tests.frameworks.google_adk.test_google_adk import CALL, Script, agent_of, ask

    def work(guarded: bool) -> None:
        guard = Guard(StromaRunner.quick()) if guarded else None
        ask(agent_of(Script.of(*[CALL] * 9, "x"), guard), "run_async", guard)

    return {"model or tool": (best(lambda: work(False), 19), best(lambda: work(True), 19))}


def agent_framework() -> dict[str, tuple[float, float]]:
    from tests.frameworks.agent_framework.test_agent_framework import CALL, Script, agent_of, ask

    def work(guarded: bool) -> None:
        ask(agent_of(Script(*[CALL] * 9, "x"), Guard(StromaRunner.quick()) if guarded else None))

    return {"model or tool": (best(lambda: work(False), 19), best(lambda: work(True), 19))}


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) == 2 else "guard"
    for what, (bare, guarded) in globals()[name]().items():
        print(f"{name}, {what}: {bare:.0f} us without, {guarded:.0f} us with, {guarded - bare:.0f} us more")
