"""How any value is written for people and machines, and which secrets are found in it."""

import dataclasses
import itertools
import json
import uuid
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from types import MappingProxyType
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from stroma.trace.plain import jsonable


class Colour(StrEnum):
    RED = "red"


class Size(IntEnum):
    BIG = 9


class Kind(Enum):
    PAIR = (1, 2.5)
    WORD = "word"
    INNER = Colour.RED


class Loud(float):
    def __repr__(self) -> str:
        return "loud"


class Long(int):
    def __repr__(self) -> str:
        return "long"


class Model(BaseModel):
    x: Any = None


@dataclasses.dataclass
class Record:
    x: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Any


class Plain:
    def __repr__(self) -> str:
        return "a plain thing"


class Unnamed: ...


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, None),
        (True, True),
        ("text", "text"),
        (3, 3),
        (10**400, 10**400),
        (1.5, 1.5),
        (NAN, "nan"),
        (INFINITE, "inf"),
        (-INFINITE, "-inf"),
        (Loud(1.5), 1.5),
        (Loud(INFINITE), "inf"),
        (Long(4), 4),
        (Colour.RED, "red"),
        (Size.BIG, 9),
        (Kind.PAIR, [1, 2.5]),
        (Kind.WORD, "word"),
        (Kind.INNER, "red"),
        ([1, (2, NAN)], [1, [2, "nan"]]),
        ({"a": NAN, 1: 2, None: 3, (1, NAN): 4, 2.5: 5, Kind.WORD: 6}, None),
        (MappingProxyType({"a": (1,)}), {"a": [1]}),
        (UserDict({"a": (1,)}), {"a": [1]}),
        ({10, 9, "8", 7.5}, [7.5, 10, 9, "8"]),
        (frozenset({(2, 1), (1, 2)}), [[1, 2], [2, 1]]),
        (datetime(2024, 1, 2, 3, 4, 5, 6, UTC), "2024-01-02T03:04:05.000006+00:00"),
        (date(2024, 1, 2), "2024-01-02"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.50"), "1.50"),
        (Model(x=(NAN,)), {"x": ["nan"]}),
        (Model.model_construct(), {"x": None}),
        (Record((1,)), {"x": [1]}),
        (Slotted({"a": Record(NAN)}), {"x": {"a": {"x": "nan"}}}),
        (b"text\xff\xc3\xa4", "text\\xff\u00e4"),
        (SecretStr("hidden"), "**********"),
        (Plain(), "a plain thing"),
        (Broken(), "<Broken>"),
        (Record, repr(Record)),
        (
            [Unnamed(), "a <Job object at 0x7f01>"],
            [f"<{__name__}.Unnamed object>", "a <Job object at 0x7f01>"],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_plain_data(value: Any, written: Any) -> None:
    """What JSON can say stays a plain Python type; all else is text without addresses, and no error."""
    if isinstance(value, dict):
        written = {"a": "nan", "1": 2, "None": 3, "[1, 'nan']": 4, "2.5": 5, "word": 6}
    instance = jsonable(value)
    assert instance == written
    assert type(instance) is type(written)
    if not (isinstance(written, int) and written > 10**300):
        assert json.loads(json.dumps(instance, allow_nan=False)) == instance


def test_a_model_that_lacks_a_value() -> None:
    """A field that was never set is None, and the others are there."""

    class Two(BaseModel):
        x: int
        y: int

    assert jsonable(Two.model_construct(y=2)) == {"x": None, "y": 2}


def nested(value: Any, levels: int) -> Any:
    """In so many tuples: those can stand in a set."""
    for _ in range(levels):
        value = (value,)
    return value


def inside(value: Any, levels: int) -> Any:
    for _ in range(levels):
        (value,) = value
    return value


WRAPPERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "list": (lambda x: [x], lambda x: [x]),
    "tuple": (lambda x: (x,), lambda x: [x]),
    "dict": (lambda x: {"k": x}, lambda x: {"k": x}),
    "set": (lambda x: {x}, lambda x: [x]),
    "frozenset": (lambda x: frozenset({x}), lambda x: [x]),
    "model": (lambda x: Model(x=x), lambda x: {"x": x}),
    "dataclass": (Record, lambda x: {"x": x}),
    "slots": (Slotted, lambda x: {"x": x}),
    "deque": (lambda x: deque([x]), lambda x: [x]),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_hundred_levels_are_written(kind: str) -> None:
    """Whatever a level is: at the hundredth a value is written, at the next it is named by its type."""
    wrap, written = WRAPPERS[kind]
    assert inside(jsonable(nested(wrap(7), 99)), 99) == written(7)
    assert inside(jsonable(nested(wrap(7), 100)), 100) == written("<int>")
    # The level that it is itself counts as one.
    assert "[7]" in json.dumps(jsonable(wrap(nested(7, 99))))
    assert '["<int>"]' in json.dumps(jsonable(wrap(nested(7, 100))))


def test_a_list_that_contains_itself_has_an_end() -> None:
    """What lies deeper than a hundred levels is named, so that a loop ends."""
    loop: list[Any] = []
    loop.append(loop)
    assert inside(jsonable(loop), 101) == "<list>"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one], lambda one: deque([one])])
def test_an_iterator_is_named_and_not_read(wrap: Any) -> None:
    """An iterator may be endless, and belongs to the code that has it: its data is its name."""

    def numbers() -> Iterator[int]:
        yield from itertools.count()

    endless = numbers()
    assert "generator" in json.dumps(jsonable(wrap(endless)))
    assert next(endless) == 0
