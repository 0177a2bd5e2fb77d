"""Where the time of a node goes: docs/images/node-light.svg and node-dark.svg.

    ./dev bench --where

Each part is called by itself, thousands of times, and its least time is taken. What the parts do not explain
is the engine's own bytecode: its questions whether there is a budget, a hook, a timeout, a group or a
cancellation.
"""

from __future__ import annotations

import asyncio
import time
import timeit
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from benchmarks import chart
from benchmarks.peers.in_memory.work import START, In, Out, add_one
from stroma import (
    AsyncInMemoryStore,
    CheckpointManager,
    ContractRegistry,
    NodeContract,
    RunConfig,
    stroma_node,
)
from stroma.checkpoint import RunRequest
from stroma.contracts.node import find_node
from stroma.contracts.schema import schema_of
from stroma.engine import ReliabilityContext
from stroma.engine import loop as engine
from stroma.engine.current import CURRENT
from stroma.engine.execution import NodeExecution
from stroma.engine.outcome import Place
from stroma.trace.events import AttemptRow

IMAGES = Path(__file__).parents[1] / "docs" / "images"
_TIMES, _REPEATS, _CHAIN = 500, 60, 50


def _least(call: Callable[[], Any], times: int = _TIMES) -> float:
    """Microseconds of one call."""
    return min(timeit.repeat(call, timer=time.process_time, number=times, repeat=_REPEATS)) / times * 1e6


def _drive(work: Coroutine[Any, Any, Any]) -> None:
    try:
        work.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits")


def parts() -> list[tuple[str, float]]:
    contract: Any = NodeContract(node_id="n", input_schema=In, output_schema=Out)
    marked: Any = stroma_node("n", contract)(add_one())  # type: ignore[arg-type]
    node: Any = find_node(marked)
    manager, registry = CheckpointManager(AsyncInMemoryStore()), ContractRegistry()
    ctx = ReliabilityContext.for_run(RunConfig(), registry, manager)
    state, output = In(**START), Out(**START)
    session: Any = manager.open_run(RunRequest("run", "bench", state, schema_of(In)))
    ctx.session = session
    run = NodeExecution(ctx, "n", "node", 0, "")
    plan = engine.plan_of(ctx, run, node, state, None)
    before, promised = plan[0], plan[1]
    assert before is not None
    model, snapshot = promised.accept_output(dict(START))
    row = AttemptRow("n", 1, 2, 3, snapshot, snapshot, "success", None, None, 0, "", None, plan, None, 3)
    raw = dict(START)
    validate_in, validate_out = before.validate, promised.validate

    def validate() -> None:
        validate_in(raw)
        validate_out(raw)

    async def nothing() -> None:
        return None

    idle = _least(lambda: None)
    validated = _least(validate) - idle
    crossing = (
        _least(lambda: before.prepare_input(output)) + _least(lambda: promised.accept_output(raw)) - 2 * idle
    )
    function = _least(lambda: _drive(node.func(state))) - idle
    coroutines = _least(lambda: _drive(nothing())) - idle
    noted = (
        _least(lambda: NodeExecution(ctx, "n", "node", 0, "")) + _least(lambda: CURRENT.set(run)) - 2 * idle
    )
    looked_up = _least(lambda: engine.plan_of(ctx, run, node, state, None)) - idle
    recorded = _least(lambda: session.record(row, promised, model, None)) - idle

    def whole() -> None:
        _drive(engine.execute_in_turn(ctx, nodes, output, Place()))
        ctx.trace.rows.clear()

    nodes = [node] * _CHAIN
    total = (_least(whole, _TIMES // _CHAIN) - idle) / _CHAIN
    found = [
        ("validation, in and out", validated),
        ("the node's own function", function),
        ("states taken apart and pictured", crossing - validated),
        ("the coroutine of the attempt", coroutines),
        ("current_node()", noted),
        ("contract and schemas looked up", looked_up),
        ("row and journal", recorded),
    ]
    return [
        *found,
        ("questions: budget, hooks, timeout, group ...", total - sum(amount for _, amount in found)),
    ]


async def _in_loop() -> list[tuple[str, float]]:
    return parts()  # Some of it asks for the running task.


def main() -> int:
    found = asyncio.run(_in_loop())
    for label, amount in found:
        print(f"{label:45} {amount:6.2f} us")
    print(f"{'in all':45} {sum(amount for _, amount in found):6.2f} us")
    for name, theme in chart.THEMES.items():
        (IMAGES / f"node-{name}.svg").write_text(
            chart.stack("Where the time of a node goes", found, "us", theme)
        )
    return 0
