"""How states are taken apart, stored and read back: round trips over every kind of value."""

import dataclasses
import datetime as dt
import enum
import json
import math
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    AliasChoices,
    AnyUrl,
    Base64Bytes,
    Base64Str,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    RootModel,
    SecretBytes,
    SecretStr,
    Strict,
    ValidationError,
    create_model,
    field_serializer,
    field_validator,
    model_validator,
)
from tests.contracts.values import Colour, Level, Word, anything, datetimes, same, texts
from tests.kit import run_python
from tests.tiers import examples

from stroma import NotSerialisable
from stroma.contracts.schema import schema_of

PYDANTIC = tuple(int(part) for part in pydantic.VERSION.split(".")[:2])
MANY = examples(80)


@dataclasses.dataclass
class Point:
    x: float
    label: str = ""


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
    assert same(schema.convert(model), model)


edges = st.sampled_from([math.nan, math.inf, -math.inf, 1.5])


class Scored(BaseModel):
    kind: Literal["scored"] = "scored"
    score: float | None


class Unscored(BaseModel):
    kind: Literal["unscored"] = "unscored"


class Extended(BaseModel):
    model_config = ConfigDict(extra="allow")
    n: int = 0


LEAVES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "str": (str, texts),
    "surrogates": (str, st.text(st.characters(categories=["Cs", "L"]), max_size=5)),
    "surrogate-keys": (
        dict[str, bool],
        st.dictionaries(st.sampled_from(["\ud800", "\udfff", "a"]), st.booleans(), max_size=3),
    ),
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
    "float-or-int": (float | int | None, edges | st.integers()),
    "text-or-floats": (str | list[float], st.lists(edges, max_size=2)),
    "tagged": (
        Annotated[Scored | Unscored, Field(discriminator="kind")],
        st.builds(Scored, score=st.none() | edges),
    ),
    "extended": (Extended, st.builds(Extended, extra=st.binary() | st.decimals(allow_nan=False) | edges)),
}


def containers(kind: Any, values: st.SearchStrategy[Any]) -> list[tuple[Any, st.SearchStrategy[Any]]]:
    return [
        (kind, values),
        (kind | None, st.none() | values),
        (list[kind], st.lists(values, max_size=3)),
        (dict[str, kind], st.dictionaries(texts, values, max_size=3)),
        (tuple[kind, ...], st.lists(values, max_size=3).map(tuple)),
    ]


@pytest.mark.core
@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("shape", range(5), ids=["plain", "optional", "list", "dict", "tuple"])
def test_declared_values_come_back(name: str, shape: int) -> None:
    """What comes back from a store equals what was stored, by type, whatever the declared field holds."""
    kind, values = containers(*LEAVES[name])[shape]
    model = create_model("Holder", value=(kind, ...))

    @examples(25)
    @given(values)
    def holds(value: Any) -> None:
        try:
            instance = model(value=value)
        except ValidationError:
            return  # pydantic itself does not take it
        check(instance)

    holds()


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
    check(Open(n=1, extra=value))


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


class Comment(BaseModel):
    replies: list["Comment"] = []


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


@pytest.mark.core
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


class Base(BaseModel):
    n: int


class Sub(Base):
    more: str


class Twin(BaseModel):
    """Of the same shape as Base."""

    n: int


T = TypeVar("T")


class Box(BaseModel, Generic[T]):
    item: T


class Knot(BaseModel):
    item: Base
    next: "Knot | None" = None


class LongKnot(Knot):
    length: float = 1.5


@dataclasses.dataclass
class Spot(Point):
    size: int = 1


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)
    item: Base


class Always(BaseModel):
    model_config = ConfigDict(revalidate_instances="always")
    word: str = Field(alias="Word")


class UserId(RootModel[str]):
    pass


SUBS: dict[str, tuple[Any, Any]] = {
    "plain": (Base, Sub(n=1, more="x")),
    "optional": (Base | None, Sub(n=1, more="x")),
    "list": (list[Base], [Base(n=0), Sub(n=1, more="x")]),
    "dict": (dict[str, Base], {"k": Sub(n=1, more="x")}),
    "tuple": (tuple[int, Base], (1, Sub(n=1, more="x"))),
    "deep": (list[dict[str, Base | None]], [{"k": Sub(n=1, more="x")}]),
    "generic": (Box[Base], Box[Base](item=Sub(n=1, more="x"))),
    "recursive": (Knot, Knot(item=Base(n=1), next=LongKnot(item=Sub(n=2, more="x")))),
    "dataclass": (Point, Spot(1.0, "a", 3)),
    "strict": (Frozen, Frozen(item=Sub(n=1, more="x"))),
    "root": (str | UserId, UserId("u-1")),
    "roots": (dict[str, UserId | str], {"a": UserId("u-1"), "b": "u-2"}),
}


def holder(kind: Any, name: str = "Holder", **config: Any) -> type[BaseModel]:
    return create_model(name, __config__=ConfigDict(**config), value=(kind, ...))


@pytest.mark.core
@pytest.mark.parametrize("strict", [False, True], ids=["lax", "strict"])
@pytest.mark.parametrize("name", SUBS)
def test_a_subclass_crosses_as_what_it_is(name: str, strict: bool) -> None:
    """An instance of a subclass in a declared field crosses with its class and fields, as a new object."""
    kind, value = SUBS[name]
    model = holder(kind, strict=strict).model_construct(value=value)
    for target in (type(model), holder(kind, "Other", strict=strict)):
        for crossed in (
            schema_of(target).convert(model),
            schema_of(target).accept_output({"value": value})[0],
        ):
            assert type(crossed) is target
            assert same(crossed.value, value)
            assert not shared(crossed, model)


def shared(a: Any, b: Any) -> bool:
    """Whether two values have a model, a list or a dict in common."""
    return bool({id(v) for v in mutables(a)} & {id(v) for v in mutables(b)})


def mutables(value: Any) -> Iterator[Any]:
    if isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
        yield value
        value = vars(value)
    elif isinstance(value, (list, dict, bytearray)):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for v in inner:
        yield from mutables(v)


@pytest.mark.parametrize("name", SUBS)
def test_a_subclass_is_refused_by_stores_and_comes_back_from_memory(name: str) -> None:
    """Nothing stored names a class: a subclass is refused by name; a snapshot in memory gives it back."""
    kind, value = SUBS[name]
    model = holder(kind)(value=value)
    schema = schema_of(type(model))
    with pytest.raises(
        NotSerialisable, match=r"Holder\.value cannot be serialised: its \w+ would come back as"
    ):
        schema.encode(model)
    snapshot = schema.snapshot(model)
    thawed = schema.thaw(snapshot)
    assert same(thawed, schema.state(model))
    restored = schema.restore(snapshot)
    assert same(restored, model)
    assert not shared(restored, model)
    assert not shared(restored, schema.restore(snapshot))


def test_a_field_of_any_model_crosses_in_memory() -> None:
    """A field of the type BaseModel takes any model at a boundary; a store refuses it with the reason."""
    model = holder(BaseModel)(value=Base(n=1))
    schema = schema_of(type(model))
    assert same(schema.accept_output(model)[0], model)
    assert same(schema.restore(schema.snapshot(model)), model)
    with pytest.raises(NotSerialisable, match="BaseModel itself describes no state"):
        schema.encode(model)


@pytest.mark.core
def test_a_subclass_defined_later_is_seen() -> None:
    """What is stored is decided by the classes that exist when it is stored, not by earlier ones."""

    class Early(BaseModel):
        n: int

    model = holder(Early)
    data = schema_of(model).encode(model(value=Early(n=1)))

    class Late(Early):
        more: str

    assert schema_of(model).encode(model(value=Early(n=1))) == data
    with pytest.raises(NotSerialisable, match="its Late would come back as Early; declare the field"):
        schema_of(model).encode(model(value=Late(n=1, more="x")))
    check(model(value=Early(n=1)))


def test_a_subclass_in_a_discriminated_union_is_stored() -> None:
    """The mend that the refusal names works."""

    class Child(Cat):
        kind: Literal["child"] = "child"
        more: str

    check(holder(list[Annotated[Cat | Child, Field(discriminator="kind")]])(value=[Child(lives=1, more="x")]))
    check(holder(Child)(value=Child(lives=1, more="x")))


@pytest.mark.parametrize(
    "kind", [Base | Twin, Twin | Base, list[Base | Twin | str], dict[str, Base] | Twin | Base]
)
def test_a_union_keeps_the_class(kind: Any) -> None:
    """A union of models of one shape keeps the class at a boundary; a store keeps or refuses it."""
    for value in (Base(n=1), Twin(n=1)):
        model = holder(kind)(value=[value, "x"] if kind == list[Base | Twin | str] else value)
        schema = schema_of(type(model))
        assert same(schema.convert(model), model)
        assert same(schema.restore(schema.snapshot(model)), model)
        try:
            back = schema.decode(schema.encode(model))
        except NotSerialisable as refused:
            assert "Holder.value cannot be serialised: its" in str(refused)  # noqa: PT017
        else:
            assert same(back, model)


def test_a_union_of_a_model_and_a_dict_keeps_the_model() -> None:
    """A model that a union would read back as a dict is not stored as one."""
    model = holder(dict[str, Any] | Base)(value=Base(n=1))
    schema = schema_of(type(model))
    assert same(schema.convert(model), model)
    with pytest.raises(NotSerialisable, match="its Base would come back as dict"):
        schema.encode(model)
    check(holder(dict[str, Any] | Base)(value={"n": 1}))


@pytest.mark.core
def test_models_inside_are_validated_again() -> None:
    """A model instance inside an output is revalidated from its field values, whatever it is in."""
    model = holder(list[Base])
    broken = [Sub.model_construct(n="no number", more="x")]
    for output in (model.model_construct(value=broken), {"value": broken}):
        with pytest.raises(ValidationError) as raised:
            schema_of(model).accept_output(output)
        assert raised.value.errors()[0]["loc"] == ("value", 0, "n")
    loose = Sub.model_construct(n="7", more="x")
    given_, _ = schema_of(model).accept_output({"value": [loose]})
    assert same(given_.value, [Sub(n=7, more="x")])
    point = Point("no number")
    with pytest.raises(ValidationError):
        schema_of(holder(Point)).accept_output(holder(Point).model_construct(value=point))


def test_another_class_of_the_same_shape_is_built_from_the_fields() -> None:
    """A node whose field declares another class gets that class, made of the fields; shared ones stay."""

    class Source(BaseModel):
        one: Base
        two: Base

    class Target(BaseModel):
        one: Twin
        two: Base

    crossed = schema_of(Target).convert(Source(one=Base(n=1), two=Sub(n=2, more="x")))
    assert same(crossed, Target(one=Twin(n=1), two=Sub(n=2, more="x")))


def test_aliased_models_inside_cross_and_come_back() -> None:
    """Models inside need no alias to cross, revalidated by pydantic or not."""
    first = Aliased.model_validate({"First-Name": "a", "b": 1})
    for kind, value in ((Always, Always(Word="x")), (Aliased, first)):
        check(holder(kind).model_validate({"value": value}, by_name=True))
        check(holder(list[kind]).model_validate({"value": [value]}, by_name=True))


@pytest.mark.core
def test_a_field_may_have_any_name() -> None:
    """A field is described by its schema, whatever it is called; a name of pydantic's own changes nothing."""
    for name in ("metadata", "config", "default", "function", "serialization", "type", "schema_"):
        model = create_model("Named", **{name: (dict[str, Any], ...)})(**{name: {"a": [1]}})
        schema = schema_of(type(model))
        assert not schema.is_flat
        check(model)
        assert not shared(schema.convert(model), model)


class Loud(BaseModel):
    word: Annotated[str, AfterValidator(lambda v: v + "!")]


class Doubled(BaseModel):
    n: Annotated[int, BeforeValidator(lambda v: v * 2)]


class Peeled(BaseModel):
    text: str
    whole: bool = True

    @field_validator("text")
    @classmethod
    def _peel(cls, value: str) -> str:
        return value[1:]


class Grown(BaseModel):
    n: int

    @model_validator(mode="after")
    def _grow(self) -> "Grown":
        self.__dict__["n"] += 1
        return self


class Counting(BaseModel):
    n: int
    _seen: int = 0

    def model_post_init(self, context: Any) -> None:
        self.n += 1


class Refusing(BaseModel):
    text: Annotated[str, AfterValidator(lambda v: v + "!")]

    @field_validator("text", mode="before")
    @classmethod
    def _fresh(cls, value: str) -> str:
        if value.endswith("!"):
            raise ValueError("has one already")
        return value


class Secretive(BaseModel):
    data: Json[list[int]]
    text: Base64Str
    raw: Base64Bytes


SECRETIVE: dict[str, Any] = {"data": "[1,2]", "text": "YWJjZA==", "raw": b"AAEC"}
RESTLESS: dict[str, Callable[[], BaseModel]] = {
    "after": lambda: Loud(word="a"),
    "before": lambda: Doubled(n=1),
    "field": lambda: Peeled(text="  abc"),
    "model": lambda: Grown(n=1),
    "refusing": lambda: Refusing(text="a"),
    "inside": lambda: holder(list[Loud])(value=[Loud(word="a")]),
    "keyed": lambda: holder(dict[str, Grown])(value={"k": Grown(n=1)}),
    "decoders": lambda: Secretive(**SECRETIVE),
    "decoders-inside": lambda: holder(list[Secretive])(value=[Secretive(**SECRETIVE)]),
    "json-str": lambda: holder(Json[str])(value='"\\"1\\""'),
    "json-any": lambda: holder(Json)(value='{"a": [1.5, null]}'),
}


@pytest.mark.core
@pytest.mark.parametrize("name", RESTLESS)
def test_what_was_stored_comes_back_without_another_validation(name: str) -> None:
    """What comes back from a store equals what was stored even if its validators would now refuse it."""
    model = RESTLESS[name]()
    schema = schema_of(type(model))
    before = schema.state(model)
    if name in ("inside", "decoders-inside") and PYDANTIC < (2, 13):
        # Such a release validates what is inside of a list or a dict once more; that is refused, and never
        # kept as it is not.
        with pytest.raises(NotSerialisable, match=r"Holder\.value"):
            schema.encode(model)
        return
    data = schema.encode(model)
    assert same(schema.decode(data), model)
    assert schema.encode(schema.decode(data)) == data
    snapshot = schema.snapshot(model)
    assert same(schema.restore(snapshot), model)
    assert same(schema.thaw(snapshot), before)
    assert same(schema.state(model), before)


@pytest.mark.parametrize("kind", [Counting, list[Counting]])
def test_a_model_that_its_own_making_changes_is_kept_or_refused(kind: Any) -> None:
    """What model_post_init would change again stays as it is in memory; stores refuse it by name."""
    instance = Counting(n=1)
    model = instance if kind is Counting else holder(kind)(value=[instance])
    schema = schema_of(type(model))
    with pytest.raises(
        NotSerialisable, match=r"\.(n|value) cannot be serialised: it would come back as another value"
    ):
        schema.encode(model)
    assert same(schema.restore(schema.snapshot(model)), model)
    output = schema.mark_exclusive(schema.clone(model))
    assert same(schema.convert(output), model)


@pytest.mark.parametrize("name", RESTLESS)
def test_a_validated_output_is_the_next_input_as_it_is(name: str) -> None:
    """What a class validated as output is the next node's input unchanged, at each attempt, as a copy."""
    model = RESTLESS[name]()
    schema = schema_of(type(model))
    committed = schema.mark_exclusive(schema.clone(model))
    for _ in range(3):
        state = schema.convert(committed)
        assert same(state, committed)
        assert not shared(state, committed)


def test_another_class_gets_the_models_inside_as_they_are() -> None:
    """A model inside validated before is not validated again on its way to a node of another class."""
    given_, _ = schema_of(holder(list[Loud])).accept_output({"value": [{"word": "a"}]})
    taken = schema_of(holder(list[Loud], "Other")).convert(given_)
    assert taken.value == [Loud.model_construct(word="a!")]


def test_only_what_was_validated_here_is_trusted() -> None:
    """A state from outside is validated at the first boundary, whoever loaded or copied it."""
    schema = schema_of(Loud)
    output, _ = schema.accept_output({"word": "a"})
    for stranger in (
        output.model_copy(),
        schema.decode(schema.encode(output)),
        schema.restore(schema.snapshot(output)),
    ):
        stranger.__dict__["word"] = 5
        with pytest.raises(ValidationError):
            schema.convert(stranger)


@pytest.mark.parametrize("name", ["decoders", "decoders-inside", "json-str", "json-any"])
def test_decoded_values_cross(name: str) -> None:
    """Json, Base64Str and Base64Bytes cross decoded: an instance that pydantic just made is valid."""
    model = RESTLESS[name]()
    schema = schema_of(type(model))
    assert same(schema.convert(model), model)
    output, _ = schema.accept_output(model)
    assert same(output, model)
    assert not shared(output, model)


def test_decoded_values_are_validated_all_the_same() -> None:
    """What a Json field holds is still what it declares."""
    with pytest.raises(ValidationError):
        schema_of(Secretive).accept_output(Secretive.model_construct(data=["x"], text="a", raw=b""))


STRICT: dict[str, tuple[Any, Any]] = {
    "dataclass": (Point, Point(1.5, "a")),
    "dataclasses": (list[Point], [Point(1.5), Point(math.inf)]),
    "enum": (Colour, Colour.BLUE),
    "int-enum": (Level, Level.HIGH),
    "str-enum": (Word | None, Word.YES),
    "enums": (dict[str, Colour], {"k": Colour.RED}),
    "path": (Path, Path("a/b")),
    "paths": (tuple[Path, ...], (Path("a"),)),
    "ip": (IPv4Address, IPv4Address("1.2.3.4")),
    "url": (AnyUrl, AnyUrl("https://a.example/b")),
    "deque": (deque[int], deque([1, 2])),
    "bounded_deque": (deque[int], deque([1, 2], maxlen=2)),
    "pattern": (re.Pattern, re.compile("a+")),
    "pattern_with_flags": (re.Pattern, re.compile("a+", re.IGNORECASE | re.ASCII)),
    "bytes_pattern": (re.Pattern, re.compile(b"a+")),
    "frozen": (frozenset[bytes], frozenset([b"\xff", b"a"])),
    "model": (Base, Base(n=1)),
    "tuple": (tuple[int, float], (1, math.nan)),
    "zone": (dt.datetime, dt.datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))),
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
@pytest.mark.parametrize("name", STRICT)
def test_strict_classes_cross_and_come_back(name: str, strict: bool) -> None:
    """What a strict class took crosses and comes back: it wants instances, a store has none."""
    kind, value = STRICT[name]
    check(holder(kind, strict=strict)(value=value))
    check(
        create_model("Named", value=(Annotated[kind, Strict()] if name in ("enum", "path") else kind, ...))(
            value=value
        )
    )


def test_strict_fields_do_not_loosen_at_a_boundary() -> None:
    """A strict class stays strict for what a node returns."""
    model = holder(Point, strict=True)
    for output in ({"value": {"x": 1.0}}, {"value": 1}, model.model_construct(value="x")):
        with pytest.raises(ValidationError):
            schema_of(model).accept_output(output)


def test_bytearrays_cross_and_come_back() -> None:
    """A bytearray crosses as a copy and comes back as a bytearray."""
    model = holder(list[bytearray] | bytearray, arbitrary_types_allowed=True)
    for value in (bytearray(b"\xff"), [bytearray(b"a"), bytearray()]):
        check(model(value=value))
        assert not shared(schema_of(model).convert(model(value=value)), model(value=value))
    check(holder(Any)(value=[bytearray(b"a")]))


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


@pytest.mark.core
def test_what_would_change_its_type_is_refused() -> None:
    """A value under Any that only a declared class restores is refused by name, never stored otherwise."""
    for value in (
        Colour.RED,
        Level.LOW,
        enum.Enum("Corner", {"TOP": Point(1.0)})["TOP"],
        Leaf(when=dt.datetime(2026, 1, 1)),
        Point(1.0),
        Path("a"),
        [Colour.RED],
    ):
        with pytest.raises(NotSerialisable, match=r"Loose\.value"):
            schema_of(Loose).encode(Loose(value=value))


def test_models_in_sets_and_keys_are_refused_by_name() -> None:
    """A set of models, or a dict with models as keys, crosses; a store would read dicts, and refuses it."""

    class Fixed(BaseModel):
        model_config = ConfigDict(frozen=True)
        n: int

    for kind, value in ((frozenset[Fixed], {Fixed(n=1)}), (dict[Fixed, int], {Fixed(n=1): 2})):
        model = create_model("Bag", first=(int, 0), second=(kind, ...))(second=value)
        schema = schema_of(type(model))
        assert schema.convert(model) == model
        assert schema.restore(schema.snapshot(model)) == model
        with pytest.raises(NotSerialisable, match=r"Bag\.second cannot be serialised"):
            schema.encode(model)


def test_a_state_that_contains_itself_is_refused() -> None:
    """A cycle is an error that says so, not an endless loop."""
    ring: list[Any] = []
    ring.append(ring)
    model = Loose()
    model.value = ring
    with pytest.raises(NotSerialisable, match="contains itself"):
        schema_of(Loose).encode(model)


@pytest.mark.core
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
    crossed = schema.convert(model)
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

    def define_class(name: str, doc: str = "", **fields: Any) -> str:
        return schema_of(create_model(name, __doc__=doc, **fields)).fingerprint

    base = define_class("A", n=(int, 0))
    assert define_class("B", doc="Other words.", n=(int, 0)) == base
    assert define_class("A", n=(int, Field(0, description="words", title="T"))) == base
    others = {
        define_class("A", n=(str, "")),
        define_class("A", m=(int, 0)),
        define_class("A", n=(int, Field(0, ge=1))),
        define_class("A", n=(int, 0), m=(int, 0)),
        define_class("A", n=(int, ...)),
    }
    assert base not in others
    assert len(others) == 5


def test_the_fingerprint_follows_the_classes_inside() -> None:
    """The shapes of classes inside count, those of recursive ones too; their names and docstrings do not."""

    def define_tree(name: str, doc: str = "", kind: Any = int) -> str:
        leaf = create_model(name, __doc__=doc, value=(kind, ...), title=(str, "t"))
        pair = create_model("Pair", left=(leaf, ...), right=(Comment | None, None), more=(list[leaf], []))
        return schema_of(pair).fingerprint

    base = define_tree("Leaf")
    assert define_tree("Renamed", doc="Other words.") == base
    assert define_tree("Leaf", kind=str) != base
    one, two = ({"description": text} for text in ("x", "y"))
    defaults = {schema_of(create_model("D", value=(dict[str, str], d))).fingerprint for d in (one, two)}
    assert len(defaults) == 2, "a default is part of the contract, whatever its keys are"


_NO_JSON_SCHEMA = """
from collections.abc import Callable
from typing import Annotated
from pydantic import AfterValidator, BaseModel
from stroma.contracts.schema import schema_of

def check(value: float) -> float:
    return value

class Scores(BaseModel):
    scores: list[Annotated[float, AfterValidator(check)]] = []
    on_done: Callable[[], None] | None = None

print(schema_of(Scores).fingerprint)
"""


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_every_process() -> None:
    """Also of a class without a JSON schema, whose validators stand at another address in each process."""
    # Objects before it move the addresses.
    junk = [f"junk = [object() for _ in range({used})]\n" for used in (10, 100_000)]
    assert len({run_python(code=code + _NO_JSON_SCHEMA) for code in junk}) == 1


@pytest.mark.core
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
