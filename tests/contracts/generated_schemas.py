"""Pairs of classes as hypothesis makes them, and outputs of the first one."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NotRequired, Optional, Union

from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, RootModel, SecretStr, computed_field, create_model
from typing_extensions import TypedDict


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    YES = "yes"
    NO = "no"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class Puppy(Dog):
    weeks: int


class Plain(BaseModel):
    name: str


class Aliased(BaseModel):
    name: str = Field(alias="title")


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str


class Roomy(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str = ""


class Computed(BaseModel):
    width: int

    @computed_field
    @property
    def name(self) -> str:
        return str(self.width)


class Names(RootModel[list[str]]):
    pass


class Number(RootModel[int]):
    pass


class Tree(BaseModel):
    name: str
    branches: list[Tree] = []


class Shrub(BaseModel):
    name: str
    branches: list[Shrub] = Field(default=[], max_length=2)


class Movie(TypedDict):
    name: str
    year: NotRequired[int]


Point = make_dataclass("Point", [("x", int), ("name", str)])
Pets = Annotated[Cat | Dog, Field(discriminator="kind")]

Values = Callable[[bool], st.SearchStrategy[Any]]


@dataclass(frozen=True)
class Kind:
    """A type, and values of it; ``full``: lists and dicts in them are not empty."""

    annotation: Any
    values: Values


def of(annotation: Any, strategy: st.SearchStrategy[Any]) -> Kind:
    return Kind(annotation, lambda full: strategy)


names = st.sampled_from(["", "a", "ab", "7", "1.5", "red", "yes", "cat", "true", "2020-01-01", "http://a.b/"])
numbers = st.integers(-20, 20)
trees = st.fixed_dictionaries(
    {"name": names, "branches": st.lists(st.fixed_dictionaries({"name": names}), max_size=3)}
)
dogs = st.fixed_dictionaries({"name": names})
LEAVES = [
    of(str, names),
    of(int, numbers),
    of(float, st.floats()),
    of(bool, st.booleans()),
    of(bytes, st.binary(max_size=3)),
    of(Decimal, st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-50, max_value=50)),
    of(dt.date, st.dates()),
    of(dt.datetime, st.datetimes()),
    of(dt.time, st.times()),
    of(dt.timedelta, st.timedeltas()),
    of(uuid.UUID, st.uuids()),
    of(None, st.none()),
    of(Colour, st.sampled_from(list(Colour))),
    of(Level, st.sampled_from(list(Level))),
    of(Word, st.sampled_from(list(Word))),
    of(Literal["red", "yes"], st.sampled_from(["red", "yes"])),
    of(Literal["red"], st.just("red")),
    of(Literal[1, 2, "x"], st.sampled_from([1, 2, "x"])),
    of(Literal[Colour.RED], st.just(Colour.RED)),
    of(HttpUrl, st.just("http://a.b/")),
    of(SecretStr, names),
    of(PurePosixPath, st.just("a/b")),
    of(Any, st.none() | numbers | names),
]
RECORDS = [
    of(Plain, dogs),
    of(Aliased, st.fixed_dictionaries({"title": names})),
    of(Closed, dogs),
    of(Roomy, st.dictionaries(st.sampled_from(["name", "other"]), names)),
    of(Cat, st.just({})),
    of(Dog, dogs),
    of(Puppy, st.fixed_dictionaries({"name": names, "weeks": numbers})),
    of(Computed, st.fixed_dictionaries({"width": numbers})),
    Kind(Names, lambda full: st.lists(names, min_size=full, max_size=3)),
    of(Number, numbers),
    of(Tree, trees),
    of(Shrub, trees),
    of(Movie, st.fixed_dictionaries({"name": names}, optional={"year": numbers})),
    of(Point, st.fixed_dictionaries({"x": numbers, "name": names})),
    of(Pets, st.just({"kind": "cat"}) | st.just({"kind": "dog", "name": "Rex"})),
]


@st.composite
def limited(draw: st.DrawFn) -> Kind:
    """A type with a constraint."""
    low = draw(st.integers(-9, 9))
    high = draw(st.integers(low, 12))
    size = draw(st.integers(0, 2))
    most = draw(st.integers(size, 4))
    between = st.integers(low, high)
    text = st.text("ab ", min_size=size, max_size=most)
    return draw(
        st.sampled_from(
            [
                of(Annotated[int, Field(ge=low, le=high)], between),
                of(Annotated[int, Field(gt=low - 1)], st.integers(low, 20)),
                of(Annotated[int, Field(lt=high + 1)], st.integers(-20, high)),
                of(Annotated[float, Field(ge=low, le=high)], st.floats(low, high)),
                of(
                    Annotated[float, Field(gt=low, allow_inf_nan=False)], st.floats(low, 50, exclude_min=True)
                ),
                of(Annotated[int, Field(multiple_of=2)], numbers.map(lambda n: 2 * n)),
                of(Annotated[int, Field(multiple_of=4)], numbers.map(lambda n: 4 * n)),
                of(Annotated[str, Field(min_length=size, max_length=most)], text),
                of(Annotated[str, Field(min_length=size)], text),
                of(Annotated[str, Field(max_length=most)], text),
                of(Annotated[str, Field(pattern="^a*$")], st.text("a", max_size=3)),
                of(
                    Annotated[Decimal, Field(max_digits=4, decimal_places=2)],
                    st.integers(-999, 999).map(lambda n: Decimal(n) / 100),
                ),
                of(Annotated[int, Field(strict=True)], numbers),
                of(Annotated[str, Field(strict=True)], names),
            ]
        )
    )


@st.composite
def around(draw: st.DrawFn, inner: st.SearchStrategy[Kind]) -> Kind:
    """A type made of others."""
    one, two = draw(inner), draw(inner)
    size = draw(st.integers(0, 2))
    most = draw(st.integers(2, 3))
    how = draw(
        st.sampled_from(
            ["optional", "optional", "list", "list", "sized", "set", "tuple", "pair", "dict", "union"]
        )
    )
    if how == "optional":
        return Kind(Optional[one.annotation], lambda full: st.none() | one.values(full))  # noqa: UP045
    if how == "list":
        return Kind(list[one.annotation], lambda full: st.lists(one.values(full), min_size=full, max_size=3))
    if how == "sized":
        return Kind(
            Annotated[list[one.annotation], Field(min_length=size, max_length=most)],
            lambda full: st.lists(one.values(full), min_size=max(size, full), max_size=most),
        )
    if how == "set":
        leaf = draw(st.sampled_from(LEAVES[:5]))
        return Kind(set[leaf.annotation], lambda full: st.sets(leaf.values(full), min_size=full, max_size=3))
    if how == "tuple":
        return Kind(
            tuple[one.annotation, ...],
            lambda full: st.lists(one.values(full), min_size=full, max_size=3).map(tuple),
        )
    if how == "pair":
        return Kind(
            tuple[one.annotation, two.annotation], lambda full: st.tuples(one.values(full), two.values(full))
        )
    if how == "dict":
        key = draw(st.sampled_from([LEAVES[0], LEAVES[1]]))
        return Kind(
            dict[key.annotation, one.annotation],
            lambda full: st.dictionaries(key.values(full), one.values(full), min_size=full, max_size=2),
        )
    return Kind(Union[one.annotation, two.annotation], lambda full: one.values(full) | two.values(full))  # noqa: UP007


kinds = st.recursive(st.sampled_from(LEAVES) | st.sampled_from(RECORDS) | limited(), around, max_leaves=3)


@dataclass(frozen=True)
class Made:
    """A class, and the dicts that it is made of by the names of its fields."""

    model: type[BaseModel]
    values: Values


CONFIGS: list[ConfigDict] = [
    {},
    {},
    {},
    {"extra": "forbid"},
    {"extra": "allow"},
    {"strict": True},
    {"use_enum_values": True},
    {"str_strip_whitespace": True},
    {"coerce_numbers_to_str": True},
]


@st.composite
def models(draw: st.DrawFn, name: str, fields: dict[str, Kind]) -> Made:
    """A class with these fields, some with an alias, a default, or excluded."""
    defined: dict[str, Any] = {}
    inputs: dict[str, Values] = {}
    for field, kind in fields.items():
        options: dict[str, Any] = {}
        if draw(st.integers(0, 5)) == 0:
            # Two fields that read one key are more than the checker tells apart.
            free = [key for key in ("a", "b", "c", "other") if key not in inputs and key not in fields]
            options["validation_alias"] = draw(st.sampled_from([*free, field]))
        if draw(st.integers(0, 5)) == 0:
            options["default"] = None
        elif draw(st.integers(0, 9)) == 0:
            options["exclude"] = True
        defined[field] = (kind.annotation, Field(**options))
        inputs[options.get("validation_alias", field)] = kind.values
    config = draw(st.sampled_from(CONFIGS))

    def values(full: bool) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({key: value(full) for key, value in inputs.items()})

    return Made(create_model(name, __config__=config, **defined), values)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Made, Made]:
    """An output and the next node's input: mostly alike, as in pipelines, with some difference."""
    if draw(st.integers(0, 9)) == 0:
        one, two = draw(kinds), draw(kinds)
        first, second = RootModel[one.annotation], RootModel[two.annotation]
        return Made(first, one.values), Made(second, two.values)
    fields = draw(st.dictionaries(st.sampled_from(["a", "b", "c"]), kinds, min_size=1, max_size=3))
    target = dict(fields)
    for name in list(target):
        change = draw(st.sampled_from(["", "", "other", "wider", "less"]))
        if change == "other":
            target[name] = draw(kinds)
        elif change == "wider":
            target[name] = Kind(Optional[target[name].annotation], target[name].values)  # noqa: UP045
        elif change == "less" and len(target) > 1:
            del target[name]
    if draw(st.integers(0, 4)) == 0:
        target["other"] = draw(kinds)
    if draw(st.booleans()):  # What only the target has is as much to the point.
        fields, target = target, fields
    return draw(models("Output", fields)), draw(models("Input", target))
