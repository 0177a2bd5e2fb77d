"""What a node returned by mistake, named in the message of its failure."""

from __future__ import annotations

import asyncio
import pickle
import warnings
from typing import Any

import pytest
from pydantic import BaseModel, RootModel
from tests.kit import Note, context_of, returning

from stroma import (
    ContractViolation,
    FailureClass,
    NodeContract,
    RunStatus,
    StromaRunner,
    execute_step,
    map_over,
    parallel,
)


class Texts(BaseModel):
    items: list[Note] = [Note()]
    text: str = ""


async def answer() -> dict[str, str]:
    return {"text": "x"}


async def forgot_await(state: Any) -> Any:
    return answer()


async def forgot_await_beside_usage(state: Any) -> Any:
    return answer(), 5


def forgot_await_of_a_task(state: Any) -> Any:
    async def give() -> Any:
        return asyncio.ensure_future(answer())

    return give()


async def forgot_return(state: Any) -> Any:
    state.text = "y"


def forgot_return_in_a_thread(state: Any) -> Any:
    state.text = "y"


async def yields(state: Any) -> Any:
    yield {"text": "x"}


def yields_in_a_thread(state: Any) -> Any:
    yield {"text": "x"}


async def returns_five(state: Any) -> Any:
    return {"text": "x"}, 1, 2, "gpt-4o-mini", "more"


async def returns_one(state: Any) -> Any:
    return ({"text": "x"},)


MISTAKES: list[tuple[Any, str]] = [
    (forgot_await, "the function returned a coroutine; did you forget await?"),
    (forgot_await_beside_usage, "the function returned a coroutine; did you forget await?"),
    (forgot_await_of_a_task, "the function returned an awaitable Task; did you forget await?"),
    (forgot_return, "the function returned None; return the output"),
    (forgot_return_in_a_thread, "the function returned None; return the output"),
    (yields, "the function returned an async generator; return the output in place of yielding it"),
    (yields_in_a_thread, "the function returned a generator; return the output in place of yielding it"),
    (
        returns_five,
        "the function returned a tuple of 5; return the output, (output, response), (output, tokens), "
        "(output, input_tokens, model) or (output, input_tokens, output_tokens, model)",
    ),
    (
        returns_one,
        "the function returned a tuple of 1; return the output, (output, response), (output, tokens), "
        "(output, input_tokens, model) or (output, input_tokens, output_tokens, model)",
    ),
]


@pytest.mark.parametrize(("func", "says"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("place", ["node", "child", "item", "step"])
async def test_what_a_function_returned_by_mistake_is_named(func: Any, says: str, place: str) -> None:
    """A coroutine, None, a generator or a tuple of the wrong length as output is named, with the fix."""
    runner = StromaRunner.quick()
    contract: NodeContract[Any, Any] = NodeContract(node_id="ask", input_schema=Note, output_schema=Note)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # No "coroutine was never awaited" beside the message.
        if place == "step":
            ctx = context_of(runner)
            result = await execute_step("ask", func, Note(), ctx, contract=contract)
        else:
            node = runner.node("ask", input=Note, output=Note)(func)
            nodes = {"node": node, "child": parallel(node), "item": map_over("items", node, into="out")}
            result = await runner.run([nodes[place]], Texts())
    assert (result.status, result.failure.failure_class) == (RunStatus.FAILED, FailureClass.TERMINAL)
    assert result.failure.reason == "contract"
    assert result.failure.message == f"Contract violation for 'ask' (output): {says}"
    violation = result.failure.exception
    assert isinstance(violation, ContractViolation)
    assert says in (result.failure.as_prompt() or "")
    assert str(pickle.loads(pickle.dumps(violation))) == str(violation)


async def test_outputs_that_a_contract_takes_are_no_mistakes() -> None:
    """None and a tuple of five are outputs like any other where the contract takes them."""

    class Nothing(RootModel[None]):
        pass

    class Five(RootModel[tuple[int, ...]]):
        pass

    runner = StromaRunner.quick()
    none = runner.node("none", input=Note, output=Nothing)(returning(None))
    five = runner.node("five", input=Note, output=Five)(returning((1, 2, 3, 4, 5)))
    for node in (none, five):
        assert (await runner.run([node], Note())).status is RunStatus.COMPLETED


async def test_other_wrong_outputs_are_told_field_by_field() -> None:
    """What is wrong inside an output is still what pydantic says of its fields."""
    runner = StromaRunner.quick()
    ask = runner.node("ask", input=Note, output=Note)(returning({"text": None}))
    result = await runner.run([ask], Note())
    assert (
        result.failure.message
        == "Contract violation for 'ask' (output): text: Input should be a valid string"
    )
