"""States that are made or copied in a shorter way: nothing that is promised of a state changes."""

import asyncio
import json
from copy import deepcopy
from typing import Any

import pytest
from pydantic import BaseModel, Field, RootModel
from tests.kit import bare, computing, context_of, node, quick

from stroma import AsyncInMemoryStore, NodeContract, NodeHooks, StromaRunner, execute_step, parallel
from stroma.contracts import NotSerialisable
from stroma.contracts.copying import replicate
from stroma.contracts.schema import schema_of


class State(BaseModel):
    i: int = 0
    s: str = ""


@pytest.mark.core
@pytest.mark.parametrize("run_id", ["", "a\0b", "\ud800"])
async def test_an_illegal_run_id_is_refused_for_one_run(run_id: str) -> None:
    """run(run_id=) takes what every store can keep, and leaves the runner's config alone."""
    runner = StromaRunner.quick(tags=("kept",))
    with pytest.raises(ValueError, match="run id"):
        await runner.run([], State(), run_id=run_id)
    result = await runner.run([], State(), run_id="mine")
    assert result.run_id == "mine"
    assert "run_id" not in runner.config.model_fields_set


def test_a_stamped_copy_is_the_model_and_apart_from_it() -> None:
    """A copy is equal, of the same class, and what is set on one is not seen on the other."""
    model = State(i=3)
    twin = replicate(model)
    assert twin == model
    assert twin.model_fields_set == {"i"}
    twin.s = "changed"
    assert (model.s, model.model_fields_set) == ("", {"i"})


@pytest.mark.core
def test_a_state_that_was_not_validated_is_copied_deeply() -> None:
    """A list where the class declares text is no atom: a node without a contract gets one of its own."""
    held: Any = ["a"]
    model = State.model_construct(i=1, s=held)
    twin = schema_of(State).copy(model)
    twin.s.append("b")
    assert held == ["a"]


async def test_what_a_child_does_to_its_state_no_sibling_sees() -> None:
    """Children without contracts each have a copy of a flat state, and of what is nested in it."""
    seen: list[int] = []

    async def changes(state: Any) -> dict[str, Any]:
        state.i = 99
        return {"a": 1}

    async def looks(state: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        seen.append(state.i)
        return {"b": state.i}

    nodes = [parallel(bare("changes", changes), bare("looks", looks))]
    result = await StromaRunner.quick().run(nodes, State(i=1))
    assert seen == [1]
    assert result.trace.replay().__next__().input_state == {"i": 1, "s": ""}


@pytest.mark.core
@pytest.mark.parametrize("output", [{"a": 1}, {"a": {"deep": 1}}, {f"k{n}": n for n in range(100)}])
async def test_what_a_child_returned_is_kept_as_it_was(output: dict[str, Any]) -> None:
    """A dict that a child goes on changing changes neither the merged state nor the trace."""
    before = json.loads(json.dumps(output))

    async def changes(state: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        if isinstance(output.get("a"), dict):
            output["a"]["deep"] = "changed"
        output["new"] = output["a" if "a" in output else "k1"] = "changed"
        return {}

    nodes = [parallel(bare("gives", computing(lambda _: output)), bare("changes", changes))]
    result = await StromaRunner.quick().run(nodes, State())
    assert result.final_state is not None, result.failure
    assert result.final_state.model_dump() == before
    value = next(event for event in result.trace.walk() if event.node_id == "gives")
    assert value.output_state == before


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
