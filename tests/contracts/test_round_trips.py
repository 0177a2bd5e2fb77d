"""Values that come back from a store as they were, or are refused by name."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import ipaddress
import pathlib
import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import (
    AliasChoices,
    AnyUrl,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    IPvAnyNetwork,
    PostgresDsn,
    PrivateAttr,
    RedisDsn,
    create_model,
    model_validator,
)
from tests.fixtures import store_fixture
from tests.kit import Loose, Num, computing, environment, node, quick_without_retries, run_python, same

from stroma import FailureClass, RunStatus
from stroma.contracts import NotSerialisable
from stroma.contracts.schema import schema_of
from stroma.failures.failure import diagnose

TAGGED = [
    {"$f": "nan"},
    {"$t": [1, 2]},
    {"$": 1},
    {"$c": {"$c": 1}},
    {"a": {"$d": [[1, 2]]}},
    [{"$u": "no uuid"}],
    {1: {"$b": ""}},
]


@pytest.mark.core
@pytest.mark.parametrize("value", TAGGED, ids=str)
def test_keys_that_look_like_tags_come_back(value: Any) -> None:
    """A dict whose keys look like the marks of the stored form comes back as the dict that it was."""
    schema = schema_of(Loose)
    assert schema.decode(schema.encode(Loose(anything=value))) == Loose(anything=value)


CONTAINERS = [
    (1, 2),
    [(1,), [2]],
    {1, 2},
    frozenset({"a"}),
    {(1, 2): [3]},
    {1: "int", "1": "text"},
    b"\xff",
    bytearray(b"x"),
]


@pytest.mark.core
@pytest.mark.parametrize("value", CONTAINERS, ids=repr)
def test_containers_under_any_come_back_as_they_were(value: Any) -> None:
    """A container under Any comes back as one of its type with contents of theirs."""
    schema = schema_of(Loose)
    result = schema.decode(schema.encode(Loose(anything=value))).anything
    assert result == value
    assert type(result) is type(value)
    assert repr(result) == repr(value) or isinstance(value, (set, frozenset))


@pytest.mark.slow
def test_equal_sets_are_stored_as_equal_bytes() -> None:
    """A set is stored as the same bytes in every process, however its hashes fall."""
    code = """
from typing import Any
from pydantic import BaseModel
from stroma.contracts.schema import schema_of
class Loose(BaseModel):
    anything: Any = None
names = {f"name {i}" for i in range(50)}
print(schema_of(Loose).encode(Loose(anything=[names, frozenset(names)])).hex())
"""
    assert len({run_python(code=code, env=environment(PYTHONHASHSEED=seed)) for seed in (1, 2)}) == 1


class Loop(BaseModel):
    any: Any = None


async def test_an_output_that_contains_itself_and_a_model() -> None:
    """Output that contains itself is refused by validation, in its words, not by an endless walk."""

    class Holder(BaseModel):
        items: list[Num]

    async def func(state: Num) -> Any:
        items: list[Any] = []
        items.append(items)
        return {"items": items}

    result = await quick_without_retries().run([node("a", func, output=Holder)], Num())
    assert result.status is RunStatus.FAILED


@dataclasses.dataclass
class Doubling:
    n: int
    twice: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        self.twice = self.n * 2


@dataclasses.dataclass
class Counting:
    n: int
    seed: dataclasses.InitVar[int] = 0


async def test_dataclasses_that_do_more_than_hold_fields() -> None:
    """A dataclass with code or fields of its own making crosses as a copy, as it is."""

    class Holder(BaseModel):
        doubling: Doubling
        counting: Counting

    outputs: list[Any] = []

    async def func(state: Num) -> Any:
        outputs.append(Holder(doubling=Doubling(2), counting=Counting(3)))
        outputs[0].doubling.n = 7
        return outputs[0]

    nodes = [node("a", func, output=Holder), node("b", same, Holder, Holder)]
    result = await quick_without_retries().run(nodes, Num())
    state = result.final_state
    assert isinstance(state, Holder), result.failure
    assert (state.doubling.n, state.doubling.twice, state.counting.n) == (7, 4, 3)
    assert state.doubling is not outputs[0].doubling


class Text(str):
    pass


class Patch(BaseModel):
    name: str | None = None
    email: str | None = None
    note: str = Field("none", exclude=True)
    _seen: bool = PrivateAttr(False)


async def test_only_values_of_fields_pass() -> None:
    """Between neighbours of one class private attributes and excluded fields return to their defaults."""
    seen: list[Any] = []

    async def write(state: Num) -> Patch:
        patch = Patch(name="Ada", note="urgent")
        patch._seen = True
        return patch

    async def read(state: Patch) -> Patch:
        seen.append((state.name, state.model_fields_set >= {"name", "email"}, state.note, state._seen))
        if len(seen) == 1:
            raise ConnectionError
        return state

    runner = quick_without_retries(run_id="run")
    nodes = [node("write", write, output=Patch), node("read", read, input=Patch, output=Patch)]
    await runner.run(nodes, Num())
    await runner.run(nodes, Num(), resume=True)
    assert seen == [("Ada", True, "none", False)] * 2


@pytest.mark.parametrize("kind", [collections.deque[int], Any])
def test_a_deque_comes_back_with_its_bound(kind: Any) -> None:
    """The ``maxlen`` of a deque crosses each boundary, and comes back from a store."""
    schema = schema_of(create_model("Window", value=(kind, ...)))
    model = schema.model.model_validate({"value": collections.deque([1, 2], maxlen=2)})
    models: list[Any] = [schema.convert(model), schema.restore(schema.snapshot(model))]
    models.append(schema.decode(schema.encode(model)))
    assert [(one.value, one.value.maxlen) for one in models] == [(collections.deque([1, 2]), 2)] * 3


def test_what_only_a_declared_class_restores_is_refused_under_any() -> None:
    """A subclass of a plain type under Any would come back as that type: it is refused by name."""
    with pytest.raises(NotSerialisable, match=r"Loop\.any"):
        schema_of(Loop).encode(Loop(any=Text("x")))
    with pytest.raises(NotSerialisable, match=r"Loop\.any"):
        schema_of(Loop).encode(Loop(any=threading.Lock()))


async def test_a_class_that_validates_in_its_own_way() -> None:
    """A class that overrides model_validate is asked by it at every boundary."""

    class Own(BaseModel):
        n: int = 0

        @classmethod
        def model_validate(cls, obj: Any, **_: Any) -> Any:
            if isinstance(obj, dict) and obj.get("n") == 13:
                raise ValueError("unlucky")
            return super().model_validate(obj)

    nodes = [node("a", computing(lambda state: {"n": state.n}), output=Own)]
    assert (await quick_without_retries().run(nodes, Num(n=1))).final_state == Own(n=1)
    assert (await quick_without_retries().run(nodes, Num(n=13))).status is RunStatus.FAILED


def test_an_aliased_class_comes_back_though_it_would_refuse_itself() -> None:
    """What an aliased class with validators of its own has taken comes back from a store as it was."""

    class Sender(BaseModel):
        model_config = ConfigDict(populate_by_name=False)
        n: int = Field(alias="N")

        @model_validator(mode="after")
        def once(self) -> Any:
            self.n += 1
            return self

    schema = schema_of(Sender)
    instance = schema.validate({"N": 1})
    assert schema.decode(schema.encode(instance)) == instance


def test_basemodel_itself_is_no_schema() -> None:
    """BaseModel describes nothing: it is refused, with what to use."""
    with pytest.raises(TypeError, match="subclass with fields"):
        schema_of(BaseModel)


def test_what_cannot_be_stored_says_so_in_a_word() -> None:
    """The reason of an output without a stored form is a word to alert on, and trying again is no use."""
    from stroma.failures import NodeContext

    failure = diagnose(NotSerialisable("no"), NodeContext("node", 1, "run"), [])
    assert (failure.failure_class, failure.reason) == (FailureClass.TERMINAL, "not_serialisable")


def exactly(value: Any) -> Any:
    """A value with its types, all the way down: 1 is not True, nor 1.0."""
    if isinstance(value, BaseModel):
        return type(value), {k: exactly(v) for k, v in value.__dict__.items()}
    if isinstance(value, dict):
        return type(value), [(exactly(k), exactly(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), [exactly(v) for v in value]
    return type(value), value


store = store_fixture("async-memory", "sqlite")


class Swapped(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    id: int = Field(alias="x")
    x: int = Field(alias="y")


class SwappedDeep(BaseModel):
    first: str = Field(alias="second")
    second: str = Field(alias="first")
    items: list[float] = []


class SwappedChoices(BaseModel):
    a: bytes = Field(validation_alias=AliasChoices("b", "z"))
    b: bytes = Field(validation_alias=AliasChoices("a", "y"))


class SwappedOptional(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    a: int = Field(0, alias="b")
    b: int = Field(0, alias="c")
    inner: Swapped


ALIASED = [
    Swapped(x=1, y=2),
    SwappedDeep(second="f", first="s", items=[0.5]),
    SwappedChoices.model_validate({"b": b"\xff", "a": b"b"}),
    SwappedOptional.model_validate({"b": 1, "c": 2, "inner": {"x": 3, "y": 4}}),
]


@pytest.mark.parametrize("value", ALIASED, ids=lambda v: type(v).__name__)
def test_an_alias_that_is_another_fields_name(value: BaseModel) -> None:
    """Fields whose aliases are names of other fields keep their values, at boundaries and in stores."""
    schema = schema_of(type(value))
    assert schema.convert(value) == value
    assert schema.decode(schema.encode(value)) == value
    assert schema.restore(schema.snapshot(value)) == value


class Colour(enum.Enum):
    RED = "r"


class Level(enum.IntEnum):
    LOW = 1


Case = tuple[Any, Any, dict[str, Any]]


KEPT: dict[str, Case] = {
    "HttpUrl": (HttpUrl, "http://a.b/c", {}),
    "AnyUrl": (AnyUrl, "x://a", {}),
    "urls": (list[HttpUrl], ["http://a.b/c", "https://d.e/?f=%20"], {}),
    "PostgresDsn": (PostgresDsn, "postgres://u:p@h1,h2:5433/d", {}),
    "RedisDsn": (RedisDsn, "redis://h/0", {}),
    "IPv4Address": (ipaddress.IPv4Address, "1.2.3.4", {}),
    "IPv6Address": (ipaddress.IPv6Address, "::1", {}),
    "IPv4Interface": (ipaddress.IPv4Interface, "1.2.3.4/24", {}),
    "IPvAnyNetwork": (IPvAnyNetwork, "1.2.3.0/24", {}),
    "deque": (collections.deque[int], [1, 2], {}),
    "deque of paths": (collections.deque[pathlib.PurePosixPath], ["a", "b"], {}),
    "int or str keys": (dict[int | str, int], {1: 1, "1": 2}, {}),
    "int keys": (dict[int, int], {1: 1}, {}),
    "literal of bytes": (Literal[b"x"], b"x", {}),
    "literal of 1 and True": (Literal[1, "1"], "1", {}),
    "enum": (Colour, Colour.RED, {}),
    "int enum": (Level, Level.LOW, {}),
    "large int": (int, 10**4000, {}),
    "strict int": (int, 3, {"strict": True}),
    "any float": (Any, 1.0, {}),
    "decimal": (decimal.Decimal, "1.10", {}),
    "datetime": (dt.datetime, dt.datetime(2020, 1, 1, tzinfo=dt.UTC), {}),
    "longest timedelta": (dt.timedelta, dt.timedelta.max, {}),
    "lone surrogate": (str, "\ud800", {}),
}


EITHER: dict[str, Case] = {
    "enum or str": (str | Colour, Colour.RED, {}),
    "literal of an enum": (Literal[Colour.RED], Colour.RED, {}),
    "huge int": (int, 10**5000, {}),
    "huge ints": (list[int], [10**5000], {}),
    "strict enum": (Colour, Colour.RED, {"strict": True}),
    "strict path": (pathlib.Path, pathlib.Path("a"), {"strict": True}),
    "callable": (Callable[..., Any], print, {}),
    "a range": (Any, range(3), {}),
    "enum under Any": (Any, Colour.RED, {}),
}


@pytest.mark.parametrize("name", [*KEPT, *EITHER])
async def test_what_comes_back_equals_what_was_stored(name: str, store: Any) -> None:
    """A stored state comes back equal or is refused with the name of its field; its trace can be read."""
    annotation, value, config = (KEPT | EITHER)[name]
    instance: Any = create_model(
        "Made",
        __config__=ConfigDict(arbitrary_types_allowed=True, **config),
        value=(annotation, ...),
        deep=(list[int], []),
    )
    state = instance(value=value)
    broken = [True]
    calls: list[str] = []

    async def a(_: Any) -> Any:
        calls.append("a")
        return state

    async def b(argument: Any) -> Any:
        calls.append("b")
        assert exactly(argument) == exactly(state)
        if broken[0]:
            raise PermissionError
        return argument

    nodes = [node("a", a, output=instance), node("b", b, instance, instance)]
    runner = quick_without_retries(store=store, run_id="x")
    first = await runner.run(nodes, Num())
    events = list(first.trace)
    if isinstance(first.failure.exception, NotSerialisable):
        assert name not in list(KEPT)
        assert first.status is RunStatus.FAILED
        assert first.failure.node_id == "a"
        assert calls == ["a"]
        assert "Made" in first.failure.message
        assert "cannot be serialised" in first.failure.message
        assert name in ("huge int", "huge ints") or "Made.value " in first.failure.message
        return
    assert isinstance(first.failure.exception, PermissionError), first.failure
    assert exactly(first.final_state) == exactly(state)
    assert [e.node_id for e in events] == ["a", "b"]
    assert exactly(events[0].output_state["value"]) == exactly(state.value)
    broken[0] = False
    result = await runner.run(nodes, Num(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert calls == ["a", "b", "b"]
    assert exactly(result.final_state) == exactly(state)
    assert len(list(result.trace)) == 1
