"""Nodes with a place are refused where no process can call them there, before anything is called."""

from typing import Any

import pytest
from tests.kit import ONCE, Num, node, quick
from tests.shared_stores import store_of

from stroma import (
    ExecutionResult,
    FailureClass,
    Flow,
    NodeContract,
    Pipeline,
    PlaceError,
    RunStatus,
    parallel,
    stroma_flow,
    stroma_node,
)

COMMAND = "stroma worker FILE:NAME --temporal HOST:PORT --place gpu"


def placed(node_id: str, func: Any, **options: Any) -> Any:
    contract = NodeContract(node_id=node_id, input_schema=Num, output_schema=Num, place="gpu", **options)
    return stroma_node(node_id, contract)(func)


async def never(state: Num) -> Num:
    raise AssertionError("it was called")


async def test_run_refuses_a_node_with_a_place() -> None:
    """Without a Temporal client run() and serve() raise PlaceError before any call, and name the commands."""
    runner = quick()
    first = node("first", never)
    for nodes in ([first, placed("a", never)], [first, parallel(placed("b", never), node("c", never))]):
        with pytest.raises(PlaceError, match=COMMAND):
            await runner.run(nodes, Num())
        with store_of("sqlite") as store:
            with pytest.raises(PlaceError, match=COMMAND):
                await quick(store=store).serve(Pipeline("p", nodes))


async def test_the_decorator_of_a_runner() -> None:
    """runner.node(place=) gives a node its place; an empty one is refused."""
    runner = quick()
    marked = runner.node("a", input=Num, output=Num, place="gpu")(never)
    with pytest.raises(PlaceError, match="place='gpu'"):
        await runner.run([marked], Num())
    with pytest.raises(ValueError, match="place must not be empty"):
        NodeContract(node_id="a", input_schema=Num, output_schema=Num, place="")


@pytest.mark.parametrize("effect", [False, True])
async def test_a_step_with_a_place(effect: bool) -> None:
    """A step of a flow with a place is a TERMINAL failure, without call or retry; an effect not in doubt."""
    step = placed("step", never, effect=effect)

    @stroma_flow("flow", input=Num, output=Num)
    async def body(flow: Flow, state: Num) -> Num:
        return Num(n=(await flow.step(step, state)).n)

    with store_of("sqlite") as store:
        result = await quick(store=store, policy_map=ONCE).run(body, Num())
    failure = result.failure
    assert (result.status, failure.failure_class) == (RunStatus.FAILED, FailureClass.TERMINAL)
    assert failure.reason == "place"
    assert (type(failure.exception), failure.attempt, result.suspended) == (PlaceError, 1, [])


async def test_a_stored_result_is_read_anywhere() -> None:
    """The result of a run with placed nodes can be read in a process that could not run it."""
    with store_of("sqlite") as store:
        runner = quick(store=store)
        pipeline = Pipeline("p", [placed("a", never)])
        handle = await runner.submit(pipeline, Num())
        await runner.cancel(handle.run_id)
        result: ExecutionResult = await handle.result(timeout=10)
    assert result.status is RunStatus.CANCELLED
