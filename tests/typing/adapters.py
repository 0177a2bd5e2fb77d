"""Types of guarded callables: those of what is wrapped."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

from pydantic import BaseModel

from stroma import StromaRunner
from stroma.adapters import FrameworkAdapter, Guard, LangGraphAdapter, StepInterceptor
from stroma.adapters._step import GuardedStep
from stroma.adapters.base import LoopAdapter, TurnAdapter
from stroma.adapters.langchain import StromaMiddleware
from stroma.adapters.langgraph import attach as attach_graph
from stroma.adapters.openai_agents import attach as attach_agent
from stroma.contracts import ContractRegistry


class Out(BaseModel):
    text: str


guard = Guard(StromaRunner.quick())


@guard.step("plain", output=Out)
def plain(query: str, *, limit: int = 3) -> dict[str, str]:
    return {"text": query * limit}


@guard.step("coroutine")
async def coroutine(query: str) -> int:
    return len(query)


@guard.step("parts")
def parts(n: int) -> Iterator[int]:
    yield from range(n)


@guard.step("aparts")
async def aparts(n: int) -> AsyncIterator[int]:
    yield n


async def use() -> None:
    assert_type(plain("x", limit=1), dict[str, str])
    assert_type(await coroutine("x"), int)
    assert_type(parts(1), Iterator[int])
    assert_type(aparts(1), AsyncIterator[int])
    plain(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    plain("x", 3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(await guard.acall(GuardedStep("x"), coroutine, "x"), int)


interceptor: StepInterceptor = guard
loop: LoopAdapter = guard
turn: TurnAdapter = guard
adapter: FrameworkAdapter = LangGraphAdapter(ContractRegistry())


class Graph:
    """A graph, or an agent, of a framework."""


assert_type(attach_graph(Graph(), guard, {"node": (Out, Out)}), Graph)
assert_type(attach_agent(Graph(), guard), Graph)
assert_type(StromaMiddleware(guard).attach(Graph()), Graph)
