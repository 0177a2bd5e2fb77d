"""The work of the comparisons in memory, bare and with Stroma: a small state, an async function that adds one.

Each ``make`` gives a coroutine function that does all of it once and returns how many nodes it ran.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.peers.in_memory.floor import build as floor
from benchmarks.peers.in_memory.work import START, In, Out, Run, add_one
from stroma import (
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    Flow,
    NodeContract,
    NodeHooks,
    StromaRunner,
    parallel,
    stroma_flow,
    stroma_node,
)

__all__ = [
    "START",
    "In",
    "Run",
    "floor",
    "flowing",
    "gathered",
    "limited",
    "ours",
    "retried",
    "sequence",
    "side_by_side",
    "watched",
    "yielding",
]


def fails_once() -> Callable[[Any], Awaitable[Any]]:
    """Raises at every other call."""
    failed = False

    async def node(state: Any) -> dict[str, Any]:
        nonlocal failed
        failed = not failed
        if failed:
            raise ValueError("not yet")
        return {"i": state.i + 1, "s": state.s}

    return node


def reports_usage() -> Callable[[Any], Awaitable[Any]]:
    async def node(state: Any) -> Any:
        return {"i": state.i + 1, "s": state.s}, 10, 5, "gpt-4o"

    return node


def yielding() -> Callable[[Any], Awaitable[Any]]:
    """Lets others run in between, as a call of a model does."""

    async def node(state: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"i": state.i + 1, "s": state.s}

    return node


def sequence(nodes: int, make: Callable[[], Callable[[Any], Awaitable[Any]]] = add_one) -> list[Any]:
    made: list[Any] = []
    for k in range(nodes):
        contract: Any = NodeContract(node_id=f"n{k}", input_schema=In, output_schema=Out)
        made.append(stroma_node(f"n{k}", contract)(make()))
    return made


def ours(nodes: int, make: Callable[[], Callable[[Any], Awaitable[Any]]] = add_one, **config: Any) -> Run:
    """Each run with a store and a runner of its own."""
    made = sequence(nodes, make)

    async def run() -> int:
        result = await StromaRunner.quick(**config).run(made, In(**START))
        assert isinstance(result.final_state, Out), result.failure
        return result.final_state.i

    return run


def retried(nodes: int) -> Run:
    at_once = FailurePolicy(max_retries=1, backoff_seconds=0.0)
    return ours(nodes, fails_once, policy_map=dict.fromkeys(FailureClass, at_once))


def limited(nodes: int) -> Run:
    budget = ExecutionBudget(max_tokens_total=10**9, max_cost_usd=1e9, max_latency_ms=10**9)
    return ours(nodes, reports_usage, budget=budget)


def watched(nodes: int) -> Run:
    async def see(*_: Any) -> None:
        return None

    return ours(nodes, hooks=NodeHooks(on_node_start=see, on_node_success=see, on_node_failure=see))


def flowing(nodes: int) -> Run:
    """As many steps of a flow as :func:`ours` has nodes."""
    made = sequence(10)

    @stroma_flow("flow", input=In, output=Out)
    async def body(flow: Flow, state: Any) -> Out:
        for number in range(nodes):
            state = await flow.step(made[number % 10], state)
        assert isinstance(state, Out)
        return state

    async def run() -> int:
        return (await StromaRunner.quick().run(body, In(**START))).output.i

    return run


def _children(number: int) -> list[Callable[[Any], Awaitable[dict[str, Any]]]]:
    def child(k: int) -> Callable[[Any], Awaitable[dict[str, Any]]]:
        async def call(state: Any) -> dict[str, Any]:
            await asyncio.sleep(0.001)
            return {f"k{k}": k}

        return call

    return [child(k) for k in range(number)]


def gathered(number: int) -> Run:
    children = _children(number)

    async def run() -> int:
        merged: dict[str, Any] = {}
        for output in await asyncio.gather(*(child(None) for child in children)):
            merged.update(output)
        return len(merged)

    return run


def side_by_side(number: int) -> Run:
    nodes: list[Any] = _children(number)
    for k, node in enumerate(nodes):
        node._stroma_node_id = f"c{k}"  # Without a contract, as the bare tasks are.
    group = parallel(*nodes)

    async def run() -> int:
        result = await StromaRunner.quick().run([group], In(**START))
        assert result.final_state is not None
        return len(result.final_state.model_dump())

    return run
