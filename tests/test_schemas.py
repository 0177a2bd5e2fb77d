"""How states are taken apart, stored and read back: round trips over every kind of value."""

import dataclasses
import datetime as dt
import json
import math
import threading
from collections.abc import Callable
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    SecretBytes,
    SecretStr,
    ValidationError,
    create_model,
    field_serializer,
)

from stroma import NotSerialisable
from stroma.schemas import schema_of

MANY = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


class Colour(Enum):
    RED = "red"
    BLUE = (1, 2)


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Word(StrEnum):
    YES = "yes"


@dataclasses.dataclass
class Point:
    x: float
    label: str = ""


def same(a: Any, b: Any) -> bool:
    """Equality that tells types apart and takes NaN for NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, Decimal):
        return a.as_tuple() == b.as_tuple()
    if isinstance(a, dt.datetime):
        # Two zones may show the same wall clock: the zone and the fold count too.
        return (
            a.replace(tzinfo=None) == b.replace(tzinfo=None)
            and a.fold == b.fold
            and a.utcoffset() == b.utcoffset()
        )
    if isinstance(a, BaseModel):
        extra_a, extra_b = a.__pydantic_extra__ or {}, b.__pydantic_extra__ or {}
        return same(dict(vars(a)), dict(vars(b))) and same(extra_a, extra_b)
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def check(model: BaseModel) -> None:
    """Everything that a boundary, a trace and a store do to a state gives it back unchanged."""
    schema = schema_of(type(model))
    data = schema.encode(model)
    json.loads(data, parse_constant=lambda word: pytest.fail(f"not strict JSON: {word}"))
    back = schema.decode(data)
    assert same(back, model), (back, model)
    snapshot = schema.snapshot(model)
    assert same(schema.restore(snapshot), model)
    assert same(schema.thaw(snapshot), schema.state(model))
    assert same(schema.cross(model), model)


ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"]
datetimes = st.one_of(
    st.datetimes(),
    st.datetimes(timezones=st.sampled_from(ZONES).map(ZoneInfo)),
    st.datetimes(timezones=st.integers(-1439, 1439).map(lambda m: dt.timezone(dt.timedelta(minutes=m)))),
    st.datetimes(timezones=st.just(dt.UTC)),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LEAVES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "str": (str, texts),
    "surrogates": (str, st.text(st.characters(categories=["Cs", "L"]), max_size=5)),
    "int": (int, st.integers()),
    "large-int": (int, st.integers(10**30, 10**60).flatmap(lambda n: st.sampled_from([n, -n]))),
    "float": (float, st.floats()),
    "bool": (bool, st.booleans()),
    "bytes": (bytes, st.binary(max_size=20)),
    "decimal": (Annotated[Decimal, Field(allow_inf_nan=True)], st.decimals(allow_nan=False)),
    "uuid": (UUID, st.uuids()),
    "datetime": (dt.datetime, datetimes),
    "date": (dt.date, st.dates()),
    "time": (dt.time, st.times()),
    "timedelta": (dt.timedelta, st.timedeltas(dt.timedelta(-99999), dt.timedelta(99999))),
    "enum": (Colour, st.sampled_from(Colour)),
    "int-enum": (Level, st.sampled_from(Level)),
    "str-enum": (Word, st.sampled_from(Word)),
    "literal": (Literal["a", 1, None], st.sampled_from(["a", 1, None])),
    "complex": (complex, st.complex_numbers(allow_nan=False)),
    "path": (Path, texts.filter(lambda t: "\0" not in t).map(Path)),
    "dataclass": (Point, st.builds(Point, st.floats(), texts)),
}


def containers(kind: Any, values: st.SearchStrategy[Any]) -> list[tuple[Any, st.SearchStrategy[Any]]]:
    return [
        (kind, values),
        (kind | None, st.none() | values),
        (list[kind], st.lists(values, max_size=3)),  # type: ignore[valid-type]
        (dict[str, kind], st.dictionaries(texts, values, max_size=3)),  # type: ignore[valid-type]
        (tuple[kind, ...], st.lists(values, max_size=3).map(tuple)),  # type: ignore[valid-type]
    ]


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("shape", range(5), ids=["plain", "optional", "list", "dict", "tuple"])
def test_declared_values_come_back(name: str, shape: int) -> None:
    """What comes back from a store equals what was stored, type for type, whatever the declared field holds."""
    kind, values = containers(*LEAVES[name])[shape]
    model = create_model("Holder", value=(kind, ...))

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(values)
    def holds(value: Any) -> None:
        try:
            made = model(value=value)
        except ValidationError:
            return  # pydantic itself does not take it
        check(made)

    holds()


anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        texts,
        st.binary(max_size=8),
        st.decimals(allow_nan=False),
        st.uuids(),
        datetimes,
        st.dates(),
        st.timedeltas(),
        st.sampled_from(["$c", "$f", "$d", "$x", "stroma/1"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(texts | st.sampled_from(["$c", "$f", "$d", "$"]), inner, max_size=3),
        st.dictionaries(st.integers() | st.booleans() | texts, inner, max_size=3),
        st.frozensets(st.integers() | texts, max_size=3),
        st.sets(st.integers() | texts, max_size=3),
    ),
    max_leaves=12,
)


class Loose(BaseModel):
    value: Any = None


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    n: int = 0


class Rooted(RootModel[Any]):
    pass


@MANY
@given(anything)
def test_any_value_comes_back_under_any(value: Any) -> None:
    """Under Any, in extra fields and in a root model every value of the known kinds comes back as it was."""
    check(Loose(value=value))
    check(Rooted(value))
    check(Open(n=1, extra=value))  # type: ignore[call-arg]


class Leaf(BaseModel):
    when: dt.datetime
    ratio: float = 0.5


class Aliased(BaseModel):
    first: str = Field(alias="First-Name")
    second: int = Field(validation_alias=AliasChoices("b", "B"))
    third: bytes = Field(serialization_alias="x", default=b"\xff")


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    leaf: Leaf | None = None


class Tree(BaseModel):
    leaf: Leaf
    children: list["Tree"] = []
    by_name: dict[str, Leaf] = {}
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = []
    alias: Aliased | None = None


leaves = st.builds(Leaf, when=datetimes, ratio=st.floats())
aliased = st.builds(
    lambda a, b, c: Aliased.model_validate({"First-Name": a, "b": b, "third": c}),
    texts,
    st.integers(),
    st.binary(max_size=5),
)
pets = st.builds(Cat, lives=st.integers()) | st.builds(Dog, leaf=st.none() | leaves)
trees: st.SearchStrategy[Tree] = st.recursive(
    st.builds(Tree, leaf=leaves),
    lambda inner: st.builds(
        Tree,
        leaf=leaves,
        children=st.lists(inner, max_size=2),
        by_name=st.dictionaries(texts, leaves, max_size=2),
        pets=st.lists(pets, max_size=2),
        alias=st.none() | aliased,
    ),
    max_leaves=4,
)


@MANY
@given(trees)
def test_nested_aliased_and_discriminated_models_come_back(tree: Tree) -> None:
    """Nested, recursive, aliased and discriminated models come back with every class and every value."""
    check(tree)


@MANY
@given(aliased)
def test_aliased_models_come_back(model: Aliased) -> None:
    """A model with aliases comes back, stored by the names of its fields."""
    check(model)
    assert set(schema_of(Aliased).state(model)) == {"first", "second", "third"}


@pytest.mark.parametrize("instant", [dt.datetime(2026, 10, 25, 2, 30), dt.datetime(2026, 3, 29, 2, 30)])
@pytest.mark.parametrize("fold", [0, 1])
def test_a_zone_is_kept_with_its_fold(instant: dt.datetime, fold: int) -> None:
    """A datetime under a named zone keeps the zone and the fold: arithmetic after a resume is as before."""

    class When(BaseModel):
        at: dt.datetime

    given_ = When(at=instant.replace(tzinfo=ZoneInfo("Europe/Berlin"), fold=fold))
    check(given_)
    back = schema_of(When).decode(schema_of(When).encode(given_))
    assert isinstance(back, When)
    assert back.at.tzinfo == ZoneInfo("Europe/Berlin")
    assert (back.at + dt.timedelta(days=90)).utcoffset() == (given_.at + dt.timedelta(days=90)).utcoffset()


def test_lossy_serializers_do_not_touch_what_is_stored() -> None:
    """A custom serializer that loses data has no say in what a store keeps."""

    class Masked(BaseModel):
        card: str
        n: int = 1

        @field_serializer("card")
        def _mask(self, value: str) -> str:
            return "****"

    check(Masked(card="4111"))


def test_subclasses_in_a_declared_field() -> None:
    """A subclass's own fields are not silently lost: they come back, or the field is refused by name."""

    class Base(BaseModel):
        n: int

    class Sub(Base):
        more: str

    class Holder(BaseModel):
        item: Base

    schema = schema_of(Holder)
    model = Holder(item=Sub(n=1, more="x"))
    back = schema.decode(schema.encode(model))
    assert isinstance(back, Holder)
    assert type(back.item) is Base
    assert schema.state(schema.cross(model)) == schema.state(back)


class Opaque:
    pass


HOPELESS: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "function": lambda: HOPELESS,
    "object": Opaque,
    "generator": lambda: (i for i in ()),
    "module": lambda: math,
    "class": lambda: Opaque,
}


@pytest.mark.parametrize("name", [n for n in HOPELESS if n != "function"])
def test_what_cannot_be_stored_names_its_field(name: str) -> None:
    """NotSerialisable says "cannot be serialised" and names the field, down to the key and the index."""
    schema = schema_of(Loose)
    for value, where in (
        (HOPELESS[name](), "Loose.value"),
        ({"deep": [1, HOPELESS[name]()]}, "Loose.value.deep.1"),
        ((1, {"k": HOPELESS[name]()}), "Loose.value"),
    ):
        with pytest.raises(NotSerialisable, match="cannot be serialised") as raised:
            schema.encode(Loose(value=value))
        assert where in str(raised.value)


def test_what_would_change_its_type_is_refused() -> None:
    """A value under Any that only a declared class could restore is refused by name, never stored as something else."""
    for value in (
        Colour.RED,
        Level.LOW,
        Leaf(when=dt.datetime(2026, 1, 1)),
        Point(1.0),
        Path("a"),
        [Colour.RED],
    ):
        with pytest.raises(NotSerialisable, match=r"Loose\.value"):
            schema_of(Loose).encode(Loose(value=value))


def test_a_state_that_contains_itself_is_refused() -> None:
    """A cycle is an error that says so, not an endless loop."""
    ring: list[Any] = []
    ring.append(ring)
    model = Loose()
    model.value = ring
    with pytest.raises(NotSerialisable, match="contains itself"):
        schema_of(Loose).encode(model)


@pytest.mark.parametrize(
    ("kind", "value", "where"),
    [
        (SecretStr, SecretStr("s3cret"), "value"),
        (SecretBytes, SecretBytes(b"s3cret"), "value"),
        (dict[str, SecretStr], {"key": SecretStr("s3cret")}, "value.key"),
        (Any, [SecretStr("s3cret")], "value"),
    ],
    ids=["str", "bytes", "dict", "any"],
)
def test_secrets_are_refused_by_name(kind: Any, value: Any, where: str) -> None:
    """A secret is refused by the name of its field, and its value is in no message."""
    model = create_model("Vault", value=(kind, ...))
    with pytest.raises(NotSerialisable, match="secret") as raised:
        schema_of(model).encode(model(value=value))
    assert f"Vault.{where}" in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_a_secret_crosses_boundaries_unharmed() -> None:
    """In memory a secret goes from node to node as it is."""

    class Vault(BaseModel):
        key: SecretStr

    schema = schema_of(Vault)
    model = Vault(key=SecretStr("s3cret"))
    crossed = schema.cross(model)
    assert isinstance(crossed, Vault)
    assert crossed.key.get_secret_value() == "s3cret"
    restored = schema.restore(schema.snapshot(model))
    assert isinstance(restored, Vault)
    assert restored.key.get_secret_value() == "s3cret"


def test_private_and_excluded_fields_are_not_kept() -> None:
    """Private attributes and exclude=True fields are not kept."""

    class Partly(BaseModel):
        n: int
        hidden: str = Field(default="default", exclude=True)
        _private: int = 0

    model = Partly(n=1, hidden="x")
    model._private = 5
    back = schema_of(Partly).decode(schema_of(Partly).encode(model))
    assert isinstance(back, Partly)
    assert (back.n, back.hidden, back._private) == (1, "default", 0)


def test_the_fingerprint_changes_with_the_shape_only() -> None:
    """The fingerprint changes with fields, types and constraints; not with the class's name or its words."""

    def made(name: str, doc: str = "", **fields: Any) -> str:
        return schema_of(create_model(name, __doc__=doc, **fields)).fingerprint

    base = made("A", n=(int, 0))
    assert made("B", doc="Other words.", n=(int, 0)) == base
    assert made("A", n=(int, Field(0, description="words", title="T"))) == base
    others = {
        made("A", n=(str, "")),
        made("A", m=(int, 0)),
        made("A", n=(int, Field(0, ge=1))),
        made("A", n=(int, 0), m=(int, 0)),
        made("A", n=(int, ...)),
    }
    assert base not in others
    assert len(others) == 5


def test_snapshots_do_not_change_with_the_model() -> None:
    """G7: a snapshot stays as it was taken, whatever becomes of the model and of what was thawed from it."""
    for model in (
        Tree(leaf=Leaf(when=dt.datetime(2026, 1, 1))),
        Loose(value=[{"a": [1]}]),
        Leaf(when=dt.datetime(2026, 1, 1)),
    ):
        schema = schema_of(type(model))
        before = schema.state(model)
        snapshot = schema.snapshot(model)
        for name, value in vars(model).items():
            if isinstance(value, list):
                value.append("changed")
            model.__dict__[name] = "changed"
        thawed = schema.thaw(snapshot)
        assert same(thawed, before)
        for value in thawed.values():
            if isinstance(value, list):
                value.append("changed")
        thawed.clear()
        assert same(schema.thaw(snapshot), before)
