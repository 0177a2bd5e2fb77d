"""assert_contract_holds, and what is made up for it."""

import asyncio
import dataclasses
import datetime as dt
import decimal
import enum
import ipaddress
import uuid
from typing import Annotated, Any, Literal, NotRequired

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AliasPath,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FutureDate,
    HttpUrl,
    Json,
    NaiveDatetime,
    PastDatetime,
    RootModel,
    SecretStr,
    StringConstraints,
    field_validator,
    model_validator,
)
from tests.kit import computing, same
from tests.testing.pipelines import Number, make
from tests.tiers import examples
from typing_extensions import TypedDict

from stroma import StromaRunner, current_node, parallel, stroma_node
from stroma.testing import assert_contract_holds
from stroma.testing.contracts import inputs_of


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=1, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    name: Annotated[str, StringConstraints(min_length=2, max_length=5)]


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


class Loose(TypedDict):
    a: int
    b: NotRequired[str]


class Numbers(BaseModel):
    positive: Annotated[int, Field(gt=0)]
    step: Annotated[int, Field(multiple_of=7, ge=10, lt=100)]
    share: Annotated[float, Field(gt=0, lt=1)]
    money: Annotated[decimal.Decimal, Field(gt=0, max_digits=5, decimal_places=2)]
    exact: bool
    strict: Annotated[int, Field(strict=True)]


class Texts(BaseModel):
    code: Annotated[str, StringConstraints(pattern=r"^[a-z]+$", max_length=5)]
    short: Annotated[str, Field(min_length=1, max_length=3)]
    data: Annotated[bytes, Field(max_length=4)]
    url: HttpUrl
    secret: SecretStr
    ident: uuid.UUID
    address: ipaddress.IPv4Address


class Times(BaseModel):
    when: dt.datetime
    aware: AwareDatetime
    naive: NaiveDatetime
    past: PastDatetime
    future: FutureDate
    day: Annotated[dt.date, Field(ge=dt.date(2020, 1, 1), lt=dt.date(2021, 1, 1))]
    took: Annotated[dt.timedelta, Field(ge=dt.timedelta(0))]
    clock: dt.time


class Collections(BaseModel):
    some: Annotated[list[int], Field(min_length=2, max_length=4)]
    unique: set[Colour]
    frozen: frozenset[str]
    pair: tuple[int, str]
    many: tuple[int, ...]
    sizes: dict[str, Annotated[int, Field(ge=0)]]
    anything: Any


class Shapes(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    either: int | str | None
    colour: Colour
    point: Point
    loose: Loose
    inner: Numbers | None = None


class Aliased(BaseModel):
    name: int = Field(alias="theName")
    deep: str = Field(validation_alias=AliasPath("outer", "inner"))


class Tree(BaseModel):
    value: int
    children: "list[Tree]" = []
    parent: "Tree | None" = None


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    day: dt.date
    pet: Cat
    colour: Colour
    items: list[int]


class Picky(BaseModel):
    low: int
    high: int

    @field_validator("low")
    @classmethod
    def even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("odd")
        return value

    @model_validator(mode="after")
    def ordered(self) -> "Picky":
        if self.low > self.high:
            raise ValueError("not in order")
        return self


class Words(RootModel[list[str]]):
    pass


MODELS = [Numbers, Texts, Times, Collections, Shapes, Aliased, Tree, Strict, Picky, Words]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_what_is_made_up_is_valid(model):
    """Every input is an instance that the schema admits: its fields, given again, are taken."""
    seen = 0

    @examples(60)
    @given(inputs_of(model))
    def check(value):
        nonlocal seen
        seen += 1
        assert type(value) is model
        model.model_validate(value)
        again = model.model_validate(value, from_attributes=True) if model is not Words else value
        assert again == value

    check()
    assert seen >= 10


def test_all_of_a_schema_is_used():
    """Both sides of a union, optional fields and defaults are met."""
    kinds, inners = set(), set()

    @examples(100)
    @given(inputs_of(Shapes))
    def look(value):
        kinds.add(value.pet.kind)
        inners.add((type(value.either), value.inner is None))

    look()
    assert kinds == {"cat", "dog"}
    assert {kind for kind, _ in inners} == {int, str, type(None)}
    assert {absent for _, absent in inners} == {True, False}


class Items(BaseModel):
    items: list[Annotated[int, Field(ge=0)]]
    name: str


class Total(BaseModel):
    total: Annotated[int, Field(lt=1000)]


def adder(func):
    return make("sum", func, Items, Total)


def test_a_contract_that_holds():
    """As many examples as were asked for, each a call of the node with another run's state."""
    calls = []

    async def good(state):
        calls.append(state)
        state.items.append(1)  # Its own.
        return {"total": min(sum(state.items), 999)}

    assert_contract_holds(adder(good), examples=37)
    assert len(calls) == 37


def test_the_smallest_input_that_breaks_it_is_shown():
    """The failure has the shrunk input and what is wrong with the output."""

    with pytest.raises(AssertionError) as result:
        assert_contract_holds(adder(computing(lambda state: {"total": sum(state.items)})))
    assert str(result.value) == (
        "node 'sum' breaks its output contract: Contract violation for 'sum' (output): total: Input should "
        "be less than 1000; "
        'its input was {"items": [1000], "name": ""}'
    )
    before: BaseException | None = result.value
    while before is not None:
        assert "no running event loop" not in str(before)
        before = before.__context__


@pytest.mark.core
def test_an_exception_of_the_node_is_a_failure():
    """A node must not raise for what its contract admits, but for what is allowed."""

    async def divides(state):
        return {"total": 10 // len(state.items)}

    with pytest.raises(
        AssertionError,
        match=r"raises ZeroDivisionError for an input that its contract accepts.*\"items\": \[\]",
    ):
        assert_contract_holds(adder(divides))
    assert_contract_holds(adder(divides), allow=(ZeroDivisionError,))


@pytest.mark.parametrize("ends", ["raises", "asks"])
def test_a_node_that_returns_nothing_is_not_proven(ends: str) -> None:
    """A contract of which no output was checked does not hold."""

    async def empty(state: Any) -> Any:
        if ends == "asks":
            return current_node().wait_for(Number, reason="how many?")
        raise ConnectionError("no server in this test")

    with pytest.raises(AssertionError, match="node 'sum' returned no output for any example"):
        assert_contract_holds(adder(empty), examples=3, allow=(ConnectionError,))


async def test_it_works_where_an_event_loop_is_running():
    """In an async test the examples run beside the loop of the test."""

    async def good(state):
        await asyncio.sleep(3600)  # No example waits.
        return {"total": 1}

    assert_contract_holds(adder(good), examples=5)
    with pytest.raises(AssertionError):
        assert_contract_holds(adder(lambda state: asyncio.sleep(0, {"total": 1000})), examples=5)


def test_sync_nodes_and_nodes_of_a_runner():
    """A plain def holds a contract, too, and the contract of the runner is the one that counts."""

    @stroma_node("sync", input=Number, output=Number)
    def sync(state):
        return state

    assert_contract_holds(sync, examples=5)
    runner = StromaRunner.quick()
    runner.node("sync", input=Number, output=Total)(sync)
    with pytest.raises(AssertionError, match="total"):
        assert_contract_holds(sync, examples=5, runner=runner)


def test_strategies_of_ones_own():
    """A field, or the whole input, may be given; a field that is not there is named."""
    seen = []

    async def note(state):
        seen.append(state)
        return {"total": 1}

    node = adder(note)
    assert_contract_holds(node, examples=5, fields={"name": st.just("me")})
    assert {state.name for state in seen} == {"me"}
    seen.clear()
    assert_contract_holds(node, examples=3, inputs=st.just({"items": [7], "name": "it"}))
    assert {tuple(state.items) for state in seen} == {(7,)}
    with pytest.raises(TypeError, match="has no field 'nme'"):
        assert_contract_holds(node, fields={"nme": st.just("me")})


class Handle:
    def __init__(self, number):
        self.number = number


class Holder(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    what: Annotated[Any, Field(exclude=False)]
    handles: dict[str, Handle]


def test_a_field_that_cannot_be_made_up_is_named():
    """The error says which field, and what to do."""
    with pytest.raises(TypeError, match=r"cannot generate values for Holder.handles\[\] .*fields="):
        inputs_of(Holder)
    inputs_of(Holder, {"handles": st.just({})})


def test_inputs_that_no_strategy_finds_are_named():
    """A contract that accepts none of the generated inputs asks for strategies, with the name of the node."""

    class Text(BaseModel):
        items: Json[list[int]]

    with pytest.raises(TypeError, match="the contract of node 'a' accepts; pass strategies with fields="):
        assert_contract_holds(make("a", same, Text, Text))


def test_what_has_no_contract():
    """A group, or a node without a contract, has nothing that could hold."""
    node = make("a", None)
    with pytest.raises(TypeError, match="has no contract"):
        assert_contract_holds(parallel(node))


def test_the_same_examples_each_time():
    """Without a seed the examples are always the same ones; a seed makes others."""

    def examples(**options):
        seen = []

        async def note(state):
            seen.append(state.model_dump_json())
            return {"total": 1}

        assert_contract_holds(adder(note), examples=20, **options)
        return seen

    assert examples() == examples()
    assert examples(seed=1) == examples(seed=1) != examples(seed=2)
