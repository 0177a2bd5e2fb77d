"""How any value is written for people and machines, and which secrets are found in it."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections import UserDict
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from types import MappingProxyType
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Secret, SecretBytes, SecretStr, create_model

from stroma.trace.plain import jsonable, may_hold_secrets, secrets_in


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


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


@dataclasses.dataclass
class Record:
    x: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Any


class Plain:
    def __repr__(self) -> str:
        return "a plain thing"


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
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_plain_data(value: Any, written: Any) -> None:
    """What JSON can say it says, as a plain type of Python's; all else is text, and nothing is an error."""
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


# ---------------------------------------------------------------- how deep


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


@pytest.mark.parametrize(
    ("value", "levels", "written"),
    [
        (Kind.PAIR, 98, [1, 2.5]),
        (Kind.PAIR, 99, ["<int>", "<float>"]),
        (Kind.PAIR, 100, "<tuple>"),
        (Kind.PAIR, 101, "<Kind>"),
        ({(7,): 0}, 98, {"[7]": 0}),
        ({(7,): 0}, 99, {"['<int>']": 0}),
        ({(7,): 0}, 100, {"<tuple>": "<int>"}),
        ({(7,): 0}, 101, "<dict>"),
    ],
    ids=str,
)
def test_the_value_of_an_enum_and_the_keys_of_a_dict_are_a_level_deeper(
    value: Any, levels: int, written: Any
) -> None:
    """They count like what stands in a list."""
    assert inside(jsonable(nested(value, levels)), levels) == written


def test_a_list_that_contains_itself_has_an_end() -> None:
    """What lies deeper than a hundred levels is named, so that a loop ends."""
    loop: list[Any] = []
    loop.append(loop)
    assert inside(jsonable(loop), 101) == "<list>"


# ---------------------------------------------------------------- secrets


def secret(value: Any) -> Any:
    class Hidden(BaseModel):
        value: Secret[Any]

    return Hidden(value=value).value


@pytest.mark.parametrize(
    ("value", "result"),
    [
        (SecretStr("one"), ["one"]),
        (SecretStr(""), []),
        (SecretBytes(b"one"), ["one", "one"]),
        (SecretBytes(b""), []),
        (SecretBytes(b"\xff"), ["\\xff"]),
        (SecretBytes(b"a'b\n"), ["a'b\n", "a'b\\n"]),
        ({"a": SecretStr("one"), SecretStr("two"): 1}, ["one"]),
        ([SecretStr("one"), (SecretStr("two"),), {SecretStr("one")}], ["one", "two", "one"]),
        (frozenset({SecretStr("one")}), ["one"]),
        (Model(x=SecretStr("one")), ["one"]),
        (Open(y=SecretStr("one")), ["one"]),
        (Record(SecretStr("one")), ["one", "one"]),
        (Slotted(SecretStr("one")), ["one"]),
        (Record, []),
        (Model, []),
        ("plain", []),
        (None, []),
        (secret("one"), ["one"]),
        (secret(None), []),
        (secret(True), []),
        (secret(0), ["0"]),
        (secret(7.5), ["7.5"]),
        (secret(""), []),
        (secret(b"\xff"), ["\\xff"]),
        (
            secret(["one", b"two", None, False, ("three", {"key": "four"})]),
            ["one", "two", "two", "three", "four"],
        ),
        (secret({"key": ["one"]}), ["one"]),
    ],
    ids=str,
)
def test_every_text_that_a_secret_hides(value: Any, result: list[str]) -> None:
    """Of a state all the texts in its secrets, in order, bytes in the two forms that a message can have; no flags, no keys."""
    assert list(secrets_in(value)) == result


def test_what_a_dataclass_has_beside_its_fields() -> None:
    """A secret in an attribute that is no field is one, too."""
    one = Record(None)
    one.token = SecretStr("one")  # type: ignore[attr-defined]
    assert list(secrets_in(one)) == ["one"]


def test_a_dataclass_that_lacks_a_value() -> None:
    """A field with slots that was deleted hides nothing, and is no error."""
    one = Slotted(SecretStr("one"))
    del one.x
    assert list(secrets_in(one)) == []


#: What goes around a secret, and how many levels that is.
SECRET_WRAPPERS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "list": (lambda x: [x], 1),
    "tuple": (lambda x: (x,), 1),
    "dict": (lambda x: {"k": x}, 1),
    "set": (lambda x: {x}, 1),
    "model": (lambda x: Model.model_construct(x=x), 2),
    "extras": (lambda x: Open(y=x), 2),
    "slots": (Slotted, 1),
    "dataclass": (Record, 1),
}


def deep(kind: str, levels: int) -> Any:
    return SECRET_WRAPPERS[kind][0](nested(SecretStr("one"), levels))


@pytest.mark.parametrize("kind", SECRET_WRAPPERS)
def test_secrets_are_looked_for_a_hundred_levels_deep(kind: str) -> None:
    """As deep as values are written: a container at the hundredth level is looked into, one at the next is not."""
    levels = SECRET_WRAPPERS[kind][1]
    assert set(secrets_in(deep(kind, 101 - levels))) == {"one"}
    assert set(secrets_in(deep(kind, 102 - levels))) == set()
    assert set(secrets_in(nested(deep(kind, 0), 101 - levels))) == {"one"}
    assert set(secrets_in(nested(deep(kind, 0), 101))) == set()


def test_attributes_of_a_dataclass_are_looked_for_as_deep() -> None:
    """What is no field lies one level deeper."""
    for levels, result in [(99, ["one"]), (100, [])]:
        one = Record(None)
        one.token = nested(SecretStr("one"), levels)  # type: ignore[attr-defined]
        assert list(secrets_in(one)) == result


@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_what_a_secret_hides_is_told_a_hundred_levels_deep(kind: str) -> None:
    """Each text by itself as far down, and what is deeper as one text; the levels around the secret count."""
    wrap = WRAPPERS[kind][0]
    inner = nested("one", 100)
    assert list(secrets_in(secret(wrap(inner)))) == ["one"]
    assert list(secrets_in(secret(wrap([inner])))) == ["('one',)"]
    assert list(secrets_in([secret(wrap(nested("one", 99)))])) == ["one"]
    assert list(secrets_in([secret(wrap(inner))])) == ["('one',)"]
    assert list(secrets_in(nested(secret(wrap("one")), 100))) == ["one"]
    assert list(secrets_in(nested(secret(wrap("one")), 101))) == [str(wrap("one"))]


class Plain(BaseModel):
    n: int = 0


class WithSecret(BaseModel):
    key: SecretStr = SecretStr("")


@pytest.mark.parametrize(("inner", "may"), [(Plain, False), (WithSecret, True)])
@pytest.mark.parametrize("around", [list, dict, tuple, None])
def test_a_class_may_hold_the_secrets_of_the_classes_inside(inner: Any, may: bool, around: Any) -> None:
    """Models inside of containers count: only a class that cannot hold a secret anywhere is not searched for one."""
    kind = {list: list[inner], dict: dict[str, inner], tuple: tuple[inner, ...], None: inner | None}[around]
    assert may_hold_secrets(create_model("Outer", field=(kind, ...))) is may
