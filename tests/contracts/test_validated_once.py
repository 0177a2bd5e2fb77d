"""Values that were validated once: in groups, by whom they are trusted, and in other classes."""

import enum
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import (
    AfterValidator,
    Base64Str,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Json,
    RootModel,
    Tag,
    create_model,
    field_validator,
)
from tests.kit import NEVER, Num, computing, context_of, node, same

from stroma import RunConfig, RunStatus, SQLiteStore, StromaRunner, execute_step, map_over, parallel
from stroma.contracts import NotSerialisable
from stroma.contracts.schema import schema_of


class Value(BaseModel):
    value: int


class Text(BaseModel):
    """Its validators refuse or change what they have returned."""

    data: Json[list[int]]
    text: Base64Str
    loud: Annotated[str, AfterValidator(lambda value: f"{value}!")]


SENT = {"data": "[1]", "text": "aGk=", "loud": "hi"}
TAKEN = {"data": [1], "text": "hi", "loud": "hi!"}


def gives(
    node_id: str, output: Any, output_model: type[BaseModel], input_model: type[BaseModel] = Num
) -> Any:
    return node(node_id, computing(lambda _: output), input_model, output_model)


def quick(tmp_path: Path | None = None, **config: Any) -> StromaRunner:
    store = None if tmp_path is None else SQLiteStore(tmp_path / "x.db")
    return StromaRunner.quick(policy_map=NEVER, store=store, **config)


def held(state: Any) -> Any:
    """The values of its fields; a dump would encode them again."""
    return schema_of(type(state)).fields(state)


async def resumed(runner: StromaRunner, nodes: list[Any], state: BaseModel | None = None) -> tuple[Any, Any]:
    """What a state was when it was made, and what it is when it is restored."""
    state = Num() if state is None else state
    first = await runner.run(nodes, state, run_id="r")
    first.raise_for_status()
    return first.final_state, (await runner.run(nodes, state, run_id="r", resume=True)).final_state


@pytest.mark.core
@pytest.mark.parametrize("durable", [False, True], ids=["memory", "sqlite"])
async def test_outputs_merge_without_another_validation(durable: bool, tmp_path: Path) -> None:
    """Outputs that a child's contract has validated merge as they are: no validator or decoder again."""
    runner = quick(tmp_path if durable else None)
    group = parallel(gives("a", SENT, Text), gives("b", {"value": 1}, Value))
    instance, restored = await resumed(runner, [group])
    assert held(instance) == held(restored) == {**TAKEN, "value": 1}


@pytest.mark.core
@pytest.mark.parametrize("durable", [False, True], ids=["memory", "sqlite"])
async def test_items_are_collected_without_another_validation(durable: bool, tmp_path: Path) -> None:
    """What is around a map_over, and the outputs of its items, are kept as they were validated."""
    runner = quick(tmp_path if durable else None)
    wide = create_model("Wide", __base__=Text, values=(list[int], ...))
    first = gives("first", {**SENT, "values": [1, 2]}, wide)
    instance, restored = await resumed(
        runner, [first, map_over("values", gives("a", SENT, Text, Value), into="out")]
    )
    assert held(instance) == held(restored) == {**TAKEN, "values": [1, 2], "out": [TAKEN, TAKEN]}


@pytest.mark.core
async def test_decoded_values_reach_another_class() -> None:
    """What a node's class decoded the next one does not decode again, if it would do the same."""
    both = create_model("Both", data=(Json[list[int]], ...), text=(Base64Str, ...), value=(int, 0))
    seen = []

    async def last(state: Any) -> Any:
        seen.append({"data": state.data, "text": state.text})
        return state

    decoded = {"data": [1], "text": "hi"}
    plain = create_model("Plain", data=(Json[list[int]], ...), text=(Base64Str, ...))
    result = await quick().run([gives("a", SENT, plain), node("last", last, both, both)], Num())
    result.raise_for_status()
    group = parallel(gives("a", SENT, plain), gives("b", {"value": 1}, Value))
    result = await quick().run([group, node("last", last, both, both)], Num())
    result.raise_for_status()
    assert seen == [decoded, decoded]


@pytest.mark.core
async def test_text_of_another_class_is_decoded() -> None:
    """A field that is plain text in one class and decoded in the next is decoded there."""
    sender = create_model("Sender", data=(str, ...), text=(str, ...), more=(list[int], []))
    taker = create_model("Taker", data=(Json[list[int]], ...), text=(Base64Str, ...))

    sent = {"data": "[1]", "text": "aGk="}
    result = await quick().run([gives("a", sent, sender), node("last", same, taker, taker)], Num())
    assert result.final_state is not None
    assert held(result.final_state) == {"data": [1], "text": "hi"}


@pytest.mark.core
async def test_a_dict_that_is_a_root_model_merges() -> None:
    """A child whose output is a root model of a dict gives that dict's keys; one of a list gives "root"."""
    first = gives("a", {"x": 1, "n": 5}, RootModel[dict[str, int]])
    group = parallel(first, gives("b", [1], RootModel[list[int]]), gives("c", {"n": 2}, Num))
    instance, restored = await resumed(quick(), [group])
    assert held(instance) == held(restored) == {"x": 1, "root": [1], "n": 2}


@pytest.mark.core
async def test_excluded_fields_of_children_do_not_cross() -> None:
    """A field with exclude=True is no part of a merged state, and keeps nothing from being merged."""

    class Half(BaseModel):
        kept: int
        hidden: int = Field(exclude=True)

    group = parallel(gives("a", {"kept": 1, "hidden": 2}, Half), gives("b", {"n": 2}, Num))
    instance, restored = await resumed(quick(), [group])
    assert held(instance) == held(restored) == {"kept": 1, "n": 2}
    wide = create_model("Wide", __base__=Half, values=(list[int], []))
    nodes = [map_over("values", gives("a", {"n": 1}, Num), into="out")]
    result = await quick().run(nodes, wide(kept=1, hidden=2))
    assert result.final_state is not None
    assert held(result.final_state) == {"kept": 1, "values": [], "out": []}


@pytest.mark.core
async def test_values_of_enums_merge_as_they_are(tmp_path: Path) -> None:
    """A child that keeps an enum's value gives that value, also back from a store."""

    class Colour(enum.Enum):
        RED = "red"

    class Paint(BaseModel):
        model_config = ConfigDict(use_enum_values=True)
        colour: Colour

    group = parallel(gives("a", {"colour": "red"}, Paint), gives("b", {"n": 2}, Num))
    instance, restored = await resumed(quick(tmp_path), [group])
    assert instance.colour == restored.colour == "red"


async def test_items_may_have_any_keys() -> None:
    """An item that is a dict may have any keys, also those that a model's making has parameters for."""

    class Odd(BaseModel):
        cls: int
        self: int

    class Odds(BaseModel):
        items: list[dict[str, int]]

    odds = Odds(items=[{"cls": 1, "self": 2}])
    result = await quick().run([map_over("items", node("same", same, Odd, Odd), into="out")], odds)
    assert result.final_state.out == [Odd(cls=1, self=2)]


async def test_annotations_that_mean_something_elsewhere() -> None:
    """A group of children with annotations that only their modules resolve still merges."""
    from pydantic.dataclasses import dataclass

    class Inner(BaseModel):
        n: int

    @dataclass
    class Record:
        inner: "Inner"

    class Holder(BaseModel):
        record: Record

    async def same(state: Holder) -> Any:
        return state

    first = gives("a", {"record": {"inner": {"n": 1}}}, Holder)
    for nodes in (
        [first, node("b", same, Holder, Holder)],
        [parallel(first), node("b", same, Holder, Holder)],
    ):
        result = await quick().run(nodes, Num())
        result.raise_for_status()  # Making a Record here would have pydantic look its names up.


class Positive(BaseModel):
    n: int

    @field_validator("n")
    @classmethod
    def positive(cls, value: int) -> int:
        if value < 0:
            raise ValueError("negative")
        return value


@pytest.mark.core
async def test_a_final_state_is_not_trusted_any_more() -> None:
    """G1: a final state is its caller's; it is validated again as the input of another run."""
    runner = quick()
    same = gives("a", {"n": 1}, Positive, Positive)
    first = await runner.run([same], Positive(n=1))
    assert isinstance(first.final_state, Positive)
    first.final_state.n = -5
    assert (await runner.run([same], first.final_state)).status is RunStatus.FAILED
    ctx = context_of(runner, RunConfig(policy_map=NEVER))
    step = await execute_step("a", same, Positive(n=1), ctx)
    assert isinstance(step.final_state, Positive)
    step.final_state.n = -5
    assert (await execute_step("b", same, step.final_state, ctx)).status is RunStatus.FAILED


async def test_a_class_that_copies_itself_in_its_own_way_crosses_as_it_is() -> None:
    """What a class makes of model_copy, copy or deepcopy has no say in what the next node gets."""

    class Stamped(BaseModel):
        n: int = 0
        inner: Num = Num()
        stamp: int = 0

        def model_copy(self, **_: Any) -> Any:
            return Stamped(stamp=self.stamp + 1)

        def __copy__(self) -> Any:
            return self.model_copy()

        def __deepcopy__(self, memo: Any = None) -> Any:
            return self.model_copy()

    async def same(state: Stamped) -> Any:
        return state

    first, then = gives("a", {"n": 1, "inner": {"n": 2}}, Stamped), node("b", same, Stamped, Stamped)
    result = await quick().run([first, then, parallel(node("c", same, Stamped, Stamped))], Num())
    assert held(result.final_state) == {"n": 1, "inner": {"n": 2}, "stamp": 0}


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"


PETS = Annotated[Cat, Tag("cat")] | Annotated[Dog, Tag("dog")]


@pytest.mark.core
async def test_a_union_whose_class_a_function_picks(tmp_path: Path) -> None:
    """A union by a function is restored if the function knows dicts; else the store refuses it by name."""
    kind = Discriminator(lambda v: v["kind"] if isinstance(v, dict) else v.kind)
    both = create_model("Both", pet=(Annotated[PETS, kind], ...))
    instance, restored = await resumed(quick(tmp_path), [gives("a", {"pet": Dog()}, both)])
    assert instance.pet == restored.pet == Dog()
    instances = create_model("Instances", pet=(Annotated[PETS, Discriminator(lambda v: v.kind)], ...))
    instance, restored = await resumed(quick(), [gives("a", {"pet": Dog()}, instances)])
    assert instance.pet == restored.pet == Dog()
    with pytest.raises(NotSerialisable, match="Instances"):
        schema_of(instances).encode(instance)


async def test_a_step_whose_input_is_of_another_type_warns_of_nothing() -> None:
    """A step's input that breaks its own class is a FAILED result, also with warnings as errors."""
    ctx = context_of(quick(), RunConfig(policy_map=NEVER))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = await execute_step("a", gives("a", {"n": 1}, Num), Num.model_construct(n="x"), ctx)
    assert result.status is RunStatus.FAILED
