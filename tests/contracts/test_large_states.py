"""States of many values: what makes them quick to copy changes nothing of what is promised of a state."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from pydantic import BaseModel, Field, RootModel
from tests.kit import context_of, node, quick

from stroma import AsyncInMemoryStore, NodeContract, NodeHooks, StromaRunner, execute_step
from stroma.contracts import NotSerialisable
from stroma.contracts.schema import schema_of


class Anything(RootModel[Any]):
    pass


class Row(BaseModel):
    id: int = Field(ge=0)
    score: float
    tags: list[str]


class Rows(BaseModel):
    n: int
    rows: list[Row]


class RowsToo(BaseModel):
    n: int
    rows: list[Row]


class Dicts(BaseModel):
    n: int
    rows: list[dict[str, Any]]


class DictsToo(BaseModel):
    n: int
    rows: list[dict[str, Any]]


KINDS = [pytest.param(Rows, RowsToo, id="models"), pytest.param(Dicts, DictsToo, id="dicts")]


PAIRS = pytest.mark.parametrize(("one", "two"), KINDS)


def start(one: Any) -> Any:
    return one(n=0, rows=[{"id": k, "score": k / 7, "tags": ["a"]} for k in range(3)])


def plain(state: BaseModel) -> Any:
    return json.loads(state.model_dump_json())


@pytest.mark.core
@pytest.mark.parametrize("root", [{"rows": [1, 2, 3]}, [1, 2, 3]], ids=["a dict", "a list"])
async def test_what_a_node_keeps_of_its_output_is_not_what_hooks_see(root: Any) -> None:
    """G7, G8: a change of what a node has returned, made in its hooks, reaches no later hook."""
    shown: list[Any] = []
    entries: list[Any] = []

    async def work(state: Anything) -> Any:
        entries.append(deepcopy(root))
        return entries[0]

    async def spoils(*_: Any) -> None:
        entries[0].clear()

    async def looks(run_id: str, node_id: str, state: Any, tokens: int) -> None:
        shown.append(state)

    # The hooks of an end are called from the last set to the first.
    hooks = [NodeHooks(on_node_success=looks), NodeHooks(on_node_success=spoils)]
    runner = quick(store=AsyncInMemoryStore(), hooks=hooks)
    result = await runner.run([node("a", work, Anything, Anything)], Anything(None))
    assert shown == [root if isinstance(root, dict) else {"root": root}]
    assert result.final_state == Anything(root)


@pytest.mark.core
@PAIRS
async def test_plain_code_between_steps_may_change_the_state(one: Any, two: Any) -> None:
    """What plain code does to the state that a step gave is what the next step gets."""
    runner = StromaRunner.quick()
    ctx = context_of(runner)

    async def keep(state: Any) -> Any:
        return {"n": 1, "rows": state.rows}

    contract: NodeContract[Any, Any] = NodeContract(node_id="a", input_schema=one, output_schema=one)
    result = await execute_step("a", keep, start(one), ctx, contract=contract)
    state = result.final_state
    state.rows.pop()
    again = await execute_step("a", keep, state, ctx, contract=contract)
    assert plain(again.final_state)["rows"] == plain(start(one))["rows"][:2]


@pytest.mark.parametrize("before", [0, 1, 4299, 4300, 9000])
@pytest.mark.parametrize("digits", [4299, 4300, 4301, 9000])
def test_numbers_that_python_does_not_read_have_a_stored_form(before: int, digits: int) -> None:
    """An integer of 4,300 digits and more is found wherever it stands in what is written."""

    class Long(BaseModel):
        text: str
        number: int

    state = Long(text="x" * before, number=10 ** (digits - 1))
    schema = schema_of(Long)
    if digits > 4300:
        with pytest.raises(NotSerialisable, match="keep it smaller"):
            schema.encode(state)
    else:
        assert schema.decode(schema.encode(state)) == state
