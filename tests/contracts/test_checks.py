"""The static checker, rule by rule. Each verdict is held against what the engine does with real outputs."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import re
import uuid
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

import pytest
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    AnyUrl,
    AwareDatetime,
    Base64Str,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    HttpUrl,
    InstanceOf,
    Json,
    NaiveDatetime,
    PastDate,
    RootModel,
    SecretStr,
    SkipValidation,
    computed_field,
    create_model,
    field_validator,
    model_validator,
)
from tests.kit import Item, Text, computing, run_python
from typing_extensions import TypedDict

from stroma import (
    CheckFailed,
    Finding,
    NodeContract,
    Pipeline,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    map_over,
    parallel,
    stroma_node,
)
from stroma.contracts.schema import schema_of


class Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


def node(
    node_id: str,
    input_model: type[BaseModel] = Anything,
    output_model: type[BaseModel] = Anything,
    returned: Any = None,
) -> Any:
    return stroma_node(node_id, input=input_model, output=output_model)(computing(lambda _: returned))


def bare(node_id: str, returned: Any = None) -> Any:
    return stroma_node(node_id, None)(computing(lambda _: returned))


def check(*nodes: Any) -> list[Finding]:
    return StromaRunner.quick().check(nodes)


def one(*nodes: Any) -> Finding:
    (finding,) = check(*nodes)
    return finding


def kinds(output_model: type[BaseModel], input_model: type[BaseModel]) -> list[tuple[str, str, str]]:
    """What is found between an output and the next node's input: severity, kind and field."""
    return [
        (f.severity, f.kind, f.path)
        for f in check(node("a", output_model=output_model), node("b", input_model))
    ]


def crosses(output_model: type[BaseModel], input_model: type[BaseModel], **fields: Any) -> bool:
    """Whether an output with these fields crosses the engine's boundary."""
    output, _ = schema_of(output_model).accept_output(fields.get("root", fields))
    try:
        schema_of(input_model).convert(output)
    except ValueError:
        return False
    return True


def model_of(annotation: Any, **options: Any) -> type[BaseModel]:
    """A class with one field, x."""
    config = options.pop("config", None)
    name = options.pop("name", "Made")
    return create_model(name, __config__=config, x=(annotation, Field(**options)))


def fits(output_model: Any, input_model: Any, *values: Any) -> None:
    """Nothing is found between two types, and all values cross."""
    assert kinds(model_of(output_model), model_of(input_model)) == []
    assert [
        value for value in values if not crosses(model_of(output_model), model_of(input_model), x=value)
    ] == []


def never(kind: str, output_model: Any, input_model: Any, *values: Any) -> None:
    """An error of this kind, and no value crosses."""
    assert ("error", kind, "x") in [
        (s, k, p.partition("[")[0].partition(".")[0])
        for s, k, p in kinds(model_of(output_model), model_of(input_model))
    ]
    assert [
        value for value in values if crosses(model_of(output_model), model_of(input_model), x=value)
    ] == []


def maybe(kind: str, output_model: Any, input_model: Any, good: Any, bad: Any) -> None:
    """A warning of this kind: one value crosses, and one does not."""
    result = kinds(model_of(output_model), model_of(input_model))
    assert [(severity, k) for severity, k, _ in result] == [("warning", kind)]
    assert crosses(model_of(output_model), model_of(input_model), x=good)
    assert not crosses(model_of(output_model), model_of(input_model), x=bad)


# ---------------------------------------------------------------------- fields


@pytest.mark.core
def test_a_field_that_is_not_given_is_an_error() -> None:
    """A required field that the node before does not give is found, with nodes, field, type and fix."""
    finding = one(node("a", output_model=Text), node("b", Item))
    assert (finding.severity, finding.kind, finding.source, finding.target) == ("error", "missing", "a", "b")
    assert (finding.source_at, finding.target_at, finding.path, finding.target_type) == ("0", "1", "n", "int")
    assert finding.message == "'b' needs n (int), and Text has no such field"
    assert finding.fix == "add it to the output of 'a', or give it a default in Item"
    assert "'a' -> 'b'" in str(finding)
    assert not crosses(Text, Item, text="x")


def test_a_field_with_a_default_need_not_be_given() -> None:
    """What has a default is not missing."""
    assert kinds(Text, model_of(int, default=0)) == []


def test_a_name_that_is_almost_right_is_suggested() -> None:
    """The mend of a missing field names one that is spelt alike."""
    source = node("a", output_model=create_model("A", sentence=(str, ...)))
    finding = one(source, node("b", create_model("B", sentences=(str, ...))))
    assert "did you mean its 'sentence'?" in finding.fix


def test_a_dropped_field_names_who_gave_it_and_who_dropped_it() -> None:
    """A field that an earlier node gave, and that a node between does not hand on, is told as dropped."""
    both = create_model("Both", text=(str, ...), n=(int, ...))
    finding = one(node("a", output_model=both), node("b", Text, Text), node("c", both))
    assert (finding.severity, finding.source, finding.target, finding.path) == ("error", "b", "c", "n")
    assert "'a' gave it, and 'b' does not hand it on" in finding.message
    assert finding.fix == "add 'n' to Text, the output of 'b', or give it a default in Both"


@pytest.mark.core
def test_an_excluded_field_is_not_handed_on() -> None:
    """A field with exclude=True crosses no boundary, so who needs it does not get it."""
    hidden = create_model("Hidden", n=(int, Field(exclude=True)))
    assert kinds(hidden, Item) == [("error", "missing", "n")]
    assert not crosses(hidden, Item, n=1)


def test_a_computed_field_is_handed_on_to_who_has_it() -> None:
    """A computed field counts as given for a node with a field of its name, and disturbs no other."""

    class Sized(BaseModel):
        text: str

        @computed_field
        @property
        def n(self) -> int:
            return len(self.text)

    assert kinds(Sized, Item) == []
    assert crosses(Sized, Item, text="abc")
    assert kinds(Sized, create_model("Closed", __config__={"extra": "forbid"}, text=(str, ...))) == []


def test_an_alias_is_found_by_either_name() -> None:
    """Values cross by field name: the target's alias, or its name, may be the field's name before."""
    aliased = create_model("Aliased", text=(str, Field(alias="body")))
    fits_both = [(Text, aliased), (create_model("Body", body=(str, ...)), aliased), (aliased, Text)]
    assert [kinds(value, input_model) for value, input_model in fits_both] == [[], [], []]
    assert crosses(Text, aliased, text="x")
    assert crosses(create_model("Body", body=(str, ...)), aliased, body="x")
    assert crosses(aliased, Text, body="x")
    assert kinds(Item, aliased) == [("error", "missing", "text")]


def test_alias_choices_are_all_looked_up() -> None:
    """Any of several aliases will do, and a way into another field cannot be told."""
    several = create_model("Several", x=(str, Field(validation_alias=AliasChoices("body", "text"))))
    assert kinds(Text, several) == []
    assert crosses(Text, several, text="x")
    inside = create_model("Inside", x=(str, Field(validation_alias=AliasPath("text", 0))))
    assert kinds(Text, inside) == [("warning", "undecidable", "x")]


@pytest.mark.core
def test_an_alias_wins_over_the_name() -> None:
    """Where both are given, the alias is what counts."""
    both = create_model("Both", body=(dict, ...), text=(str, ...))
    aliased = create_model("Aliased", text=(str, Field(alias="body")))
    assert kinds(both, aliased) == [("error", "type", "text")]
    assert not crosses(both, aliased, body={}, text="x")


@pytest.mark.core
def test_forbidden_fields_are_an_error() -> None:
    """Who forbids extra fields never takes what gives more; one that may give more is a warning."""
    closed = create_model("Closed", __config__={"extra": "forbid"}, text=(str, ...))
    more = create_model("More", text=(str, ...), n=(int, ...))
    assert kinds(more, closed) == [("error", "extra", "n")]
    assert not crosses(more, closed, text="x", n=1)
    assert kinds(Text, closed) == []
    roomy = create_model("Roomy", __config__={"extra": "allow"}, text=(str, ...))
    assert kinds(roomy, closed) == [("warning", "extra", "")]


def test_what_may_hold_more_may_hold_the_field() -> None:
    """A field that is missed may be among the extra ones of a class that allows them: a warning."""
    assert kinds(Anything, Item) == [("warning", "missing", "n")]
    assert crosses(Anything, Item, n=1)
    assert not crosses(Anything, Item)


def test_the_same_class_on_both_sides_always_fits() -> None:
    """What a class has validated it takes again, whatever its validators do."""

    class Odd(BaseModel):
        n: int
        data: Json[list[int]]

        @field_validator("n")
        @classmethod
        def more(cls, value: int) -> int:
            return value + 1

    assert kinds(Odd, Odd) == []
    assert crosses(Odd, Odd, n=1, data="[1]")


# ---------------------------------------------------------------------- types


def test_types_that_never_fit_are_errors() -> None:
    """No value of the one type is a value of the other: text for list, number for text, time for date."""
    never("type", str, list[str], "a")
    never("type", int, str, 1)
    never("type", bool, str, True)
    never("type", dt.date, str, dt.date(2020, 1, 1))
    never("type", dict[str, int], list[int], {"a": 1})
    never("type", HttpUrl, str, "http://a.b/")
    never("type", None, int, None)


def test_types_that_always_convert_are_no_finding() -> None:
    """What pydantic converts without loss is told by nobody."""
    fits(int, float, 1, -5)
    fits(bool, int, True)
    fits(dt.date, dt.datetime, dt.date(2020, 1, 1))
    fits(str, bytes, "ä")
    fits(list[int], tuple[int, ...], [1], [])
    fits(set[int], list[float], {1, 2})
    fits(int, Any, 1)
    fits(HttpUrl, HttpUrl, "http://a.b/")


def test_conversions_that_may_fail_are_warnings() -> None:
    """What converts for some values only is told."""
    maybe("conversion", str, int, "1", "a")
    maybe("conversion", float, int, 1.0, 1.5)
    maybe("conversion", str, dt.date, "2020-01-01", "a")
    maybe("conversion", str, HttpUrl, "http://a.b/", "a")
    maybe("conversion", dt.datetime, dt.date, dt.datetime(2020, 1, 1), dt.datetime(2020, 1, 1, 5))
    maybe("undecidable", str, Json[list[int]], "[1]", "a")


@pytest.mark.core
def test_strict_mode_converts_nothing() -> None:
    """In strict mode what would be converted is an error, by the field as by the class."""
    assert kinds(model_of(str), model_of(int, strict=True)) == [("error", "type", "x")]
    assert kinds(model_of(str), model_of(int, config={"strict": True})) == [("error", "type", "x")]
    assert not crosses(model_of(str), model_of(int, config={"strict": True}), x="1")
    assert kinds(model_of(int), model_of(float, config={"strict": True})) == []
    assert kinds(model_of(list[int]), model_of(tuple[int, ...], config={"strict": True})) == [
        ("error", "type", "x")
    ]
    assert not crosses(model_of(list[int]), model_of(tuple[int, ...], config={"strict": True}), x=[1])


def test_the_config_of_the_class_counts() -> None:
    """coerce_numbers_to_str may let numbers be text, and str_max_length is a constraint."""
    assert kinds(model_of(int), model_of(str, config={"coerce_numbers_to_str": True})) == [
        ("warning", "conversion", "x")
    ]
    assert crosses(model_of(int), model_of(str, config={"coerce_numbers_to_str": True}), x=1)
    assert kinds(model_of(str), model_of(str, config={"str_max_length": 3})) == [
        ("warning", "constraint", "x")
    ]
    assert kinds(model_of(str, config={"str_max_length": 3}), model_of(str, max_length=5)) == []


def test_any_is_told_where_something_is_wanted() -> None:
    """A field of which nothing is known may not be what is wanted."""
    maybe("unknown", Any, int, 1, "a")
    fits(Any, Any, 1)


# ---------------------------------------------------------------------- constraints, literals, enums


@pytest.mark.core
def test_narrowed_constraints_are_warnings() -> None:
    """A constraint that is not promised may be broken."""
    maybe("constraint", int, Annotated[int, Field(ge=0)], 1, -1)
    maybe("constraint", str, Annotated[str, Field(max_length=3)], "a", "abcd")
    maybe("constraint", str, Annotated[str, Field(pattern="^a$")], "a", "b")
    maybe("constraint", list[int], Annotated[list[int], Field(min_length=1)], [1], [])
    maybe("constraint", int, Annotated[int, Field(multiple_of=2)], 2, 3)
    maybe("constraint", float, Annotated[float, Field(allow_inf_nan=False)], 1.0, float("nan"))
    maybe("constraint", Annotated[float, Field(gt=0)], Annotated[float, Field(ge=1)], 1.0, 0.5)
    finding = one(node("a", output_model=model_of(int)), node("b", model_of(Annotated[int, Field(le=3)])))
    assert "it may be outside of le=3" in finding.message


def test_constraints_that_are_promised_are_no_finding() -> None:
    """A promise that is as narrow, or narrower, is enough."""
    fits(Annotated[int, Field(ge=1, le=5)], Annotated[int, Field(ge=0, lt=6)], 1, 5)
    fits(Annotated[int, Field(gt=0)], Annotated[float, Field(ge=1)], 1)
    fits(Annotated[str, Field(max_length=3)], Annotated[str, Field(max_length=5)], "abc")
    fits(Annotated[int, Field(multiple_of=4)], Annotated[int, Field(multiple_of=2)], 8)
    fits(tuple[int, int], Annotated[list[int], Field(min_length=2)], (1, 2))


@pytest.mark.core
def test_constraints_that_exclude_each_other_are_errors() -> None:
    """Where no value satisfies both constraints, it can never work."""
    never("constraint", Annotated[int, Field(ge=10)], Annotated[int, Field(lt=10)], 10, 20)
    never("constraint", Annotated[str, Field(min_length=5)], Annotated[str, Field(max_length=4)], "abcde")
    never("constraint", tuple[int, int], tuple[int, int, int], (1, 2))


def test_literals_are_tried_one_by_one() -> None:
    """Of a literal that is taken in part the rest is named; one that is not taken at all is an error."""
    finding = one(
        node("a", output_model=model_of(Literal["a", "b", "c"])), node("b", model_of(Literal["a", "b"]))
    )
    assert (finding.severity, finding.kind) == ("warning", "choices")
    assert "'c' is not accepted" in finding.message
    maybe("choices", Literal["a", "b"], Literal["a"], "a", "b")
    maybe("choices", Literal["1", "b"], int, "1", "b")
    never("type", Literal["a"], Literal["b"], "a")
    fits(Literal["a"], Literal["a", "b"], "a")
    fits(Literal["a"], str, "a")
    maybe("choices", str, Literal["a"], "a", "b")
    never("type", int, Literal["a"], 1)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Red(enum.Enum):
    RED = "red"


def test_enums_are_tried_member_by_member() -> None:
    """An enum fits itself; another one takes what it has by value."""
    fits(Colour, Colour, Colour.RED)
    maybe("choices", str, Colour, "red", "a")
    fits(Literal["red"], Colour, "red")
    assert [(s, k) for s, k, _ in kinds(model_of(Colour), model_of(Red))] != []


def test_enums_by_value_are_their_values() -> None:
    """With use_enum_values a field holds values, which a strict class does not take for members."""
    by_value: Any = {"use_enum_values": True}
    for annotation in (Colour, Colour | None, list[Colour], dict[str, Colour]):
        plain, valued = model_of(annotation), model_of(annotation, config=by_value)
        assert [kinds(a, b) for a in (plain, valued) for b in (plain, valued)] == [[], [], [], []]
    assert kinds(model_of(Colour, config=by_value), model_of(Colour, config={"strict": True})) == [
        ("error", "type", "x")
    ]
    assert not crosses(
        model_of(Colour, config=by_value), model_of(Colour, config={"strict": True}), x=Colour.RED
    )
    only = model_of(Literal[Colour.RED], config=by_value)
    assert kinds(only, model_of(Literal[Colour.RED], config=by_value)) == [("error", "type", "x")]
    assert not crosses(only, model_of(Literal[Colour.RED], config=by_value), x=Colour.RED)


# ---------------------------------------------------------------------- None and unions


@pytest.mark.core
def test_optional_to_required_is_a_warning() -> None:
    """What may be None, by its type or by its default, is told where None is not taken."""
    maybe("optional", int | None, int, 1, None)
    fits(int, int | None, 1)
    value = model_of(int, default=None)
    assert kinds(value, model_of(int)) == [("warning", "optional", "x")]
    assert not crosses(value, model_of(int))


@pytest.mark.core
def test_a_union_is_taken_apart() -> None:
    """A union may fail where one of its types is not taken, and never works where none is."""
    maybe("union", int | list[int], list[int], [1], 1)
    never("type", int | bool, list[int], 1, True)
    fits(int | str, str | int, 1, "a")
    fits(int, int | str, 1)
    fits(int | float, float, 1, 1.5)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


class Fish(BaseModel):
    kind: Literal["fish"]


class Named(BaseModel):
    kind: Literal["cat", "dog", "fish"]
    name: str


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]
CAT = {"kind": "cat", "lives": 9}


def test_discriminated_unions_go_by_the_tag() -> None:
    """A record goes to the type that its tag names; a tag that no type has is never taken."""
    fits(Cat, Pet, CAT)
    fits(Pet, Pet, CAT)
    never("type", Fish, Pet, {"kind": "fish"})
    result = kinds(model_of(Named), model_of(Pet))
    assert ("warning", "choices", "x.kind") in result
    maybe("undecidable", dict[str, str], Pet, {"kind": "dog", "name": "x"}, {})


# ---------------------------------------------------------------------- what holds others


def test_items_are_looked_into() -> None:
    """What is wrong with the items of a list, the values of a dict or a place in a tuple has its path."""
    assert kinds(model_of(list[str]), model_of(list[list[str]])) == [("error", "type", "x[]")]
    assert kinds(model_of(dict[str, list[int | None]]), model_of(dict[str, list[int]])) == [
        ("warning", "optional", "x[][]")
    ]
    assert kinds(model_of(tuple[int, str]), model_of(tuple[int, int])) == [("warning", "conversion", "x[1]")]
    assert kinds(model_of(dict[int, int]), model_of(dict[str, int])) == [("error", "type", "x[key]")]
    fits(list[int], list[float], [1])
    fits(dict[str, int], dict[str, float], {"a": 1})
    finding = one(node("a", output_model=model_of(list[Text])), node("b", model_of(set[Text])))
    assert finding.message.endswith("x: only what can be hashed is in a set")


class Street(BaseModel):
    name: str
    number: int | None = None


class StreetIn(BaseModel):
    name: str
    number: int


def test_nested_models_are_compared_field_by_field() -> None:
    """A model of another class is taken apart, and compared inside; the path leads to the field."""
    finding = one(node("a", output_model=model_of(list[Street])), node("b", model_of(list[StreetIn])))
    assert (finding.kind, finding.path, finding.source_type) == ("optional", "x[].number", "int | None")
    assert finding.target_type == "int"
    maybe("optional", Street, StreetIn, {"name": "a", "number": 1}, {"name": "a"})
    never("missing", Street, Item, {"name": "a"})
    fits(Street, Street, {"name": "a"})


class House(Street):
    model_config = ConfigDict(extra="forbid")


class Villa(House):
    pool: bool


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    number: int | None = None


@pytest.mark.core
def test_an_instance_crosses_where_its_class_is_named() -> None:
    """A subclass crosses as the instance that it is for its parent, and as a dict of fields elsewhere."""
    fits(Villa, House, {"name": "a", "pool": True})
    never("extra", Villa, Closed, {"name": "a", "pool": True})
    fits(House, Street, {"name": "a"})
    fits(Street, House, {"name": "a"})
    fits(Street, dict[str, Any], {"name": "a"})
    never("type", Street, str, {"name": "a"})


def test_an_instance_is_no_dict_where_its_class_is_named() -> None:
    """A class that the target names anywhere in a field crosses as an instance there, not as a dict."""
    fits(Street, Street | dict[str, Any], {"name": "a"})
    never("type", Street, dict[str, Street] | dict[str, Any], {"name": "a"})
    reader = create_model("Reader", __config__=ConfigDict(from_attributes=True), name=(str, ...))
    wanted = model_of(dict[str, Street] | reader)
    assert kinds(model_of(Street), wanted) == [("warning", "undecidable", "x")]
    assert crosses(model_of(Street), wanted, x={"name": "a"})


def test_a_date_is_a_time_without_a_zone() -> None:
    """A date, or a datetime without a zone, may not be what a field with a zone accepts."""
    for annotation in (dt.date, NaiveDatetime):
        assert kinds(model_of(annotation), model_of(AwareDatetime)) == [("warning", "constraint", "x")]
    fits(dt.date, dt.datetime, dt.date(2020, 1, 1))


def test_recursive_models_come_to_an_end() -> None:
    """A class that holds itself fits another one like it, and what differs inside is told."""
    assert kinds(Tree, Bush) == [("warning", "constraint", "branches")]
    assert crosses(Tree, Bush, branches=[{"branches": []}])


class Tree(BaseModel):
    branches: list[Tree]


class Bush(BaseModel):
    branches: list[Bush] = Field(max_length=2)


class Movie(TypedDict):
    name: str
    year: NotRequired[int]


@dataclass
class Point:
    x: int
    y: int = 0


class XOnly(BaseModel):
    x: int


class NameYear(BaseModel):
    name: str
    year: int


def test_typed_dicts_and_dataclasses_are_records() -> None:
    """Typed dicts and dataclasses are compared like models; a key that may be missing is told."""
    fits(Point, XOnly, {"x": 1})
    fits(XOnly, Point, {"x": 1})
    maybe("missing", Movie, NameYear, {"name": "a", "year": 1}, {"name": "a"})
    fits(Movie, Movie, {"name": "a"})
    never("missing", Point, Movie, {"x": 1})


class Pair(NamedTuple):
    a: int
    b: str


#: Types whose schemas are made of functions and chains, with values of them.
EXOTIC: dict[Any, list[Any]] = {
    Sequence[int]: [[1], (1, 2)],
    Sequence[str]: [["a"], ["1"]],
    Mapping[str, int]: [{"a": 1}],
    deque[int]: [deque([1])],
    IPv4Address: ["1.2.3.4"],
    Pair: [Pair(1, "b")],
    re.Pattern: ["a"],
    Json[list[int]]: ["[1]"],
    Base64Str: ["YQ=="],
    AwareDatetime: [dt.datetime(2020, 1, 1, tzinfo=dt.UTC)],
    PastDate: [dt.date(2000, 1, 1)],
    dt.datetime: [dt.datetime(2020, 1, 1), dt.datetime(2020, 1, 1, 3)],
    type[Text]: [Text],
    Hashable: [1],
    Text: [{"text": "a"}],
    list[Text]: [[{"text": "a"}]],
    dict[str, Text]: [{"x": {"text": "a"}}],
    str: ["a", "1", "YQ=="],
    int: [1, 5],
    float: [1.0, 1.5],
    bytes: [b"a"],
    set[int]: [{1}],
    Iterable[int]: [[1]],
    dict[str, Any]: [{"a": 1}, {"b": 1}],
    complex: [1j],
    uuid.UUID: [uuid.uuid4()],
    AnyUrl: ["http://a.b/", "ftp://x/"],
    HttpUrl: ["http://a.b/"],
    SecretStr: ["a"],
    Path: ["a/b"],
    ByteSize: ["1kb", 5],
    InstanceOf[Text]: [Text(text="a")],
    SkipValidation[int]: [1, "a"],
    list[Text] | dict[str, Any]: [[{"text": "a"}]],
    Pet: [CAT],
    Colour: [Colour.RED],
    Point: [{"x": 1}],
    Movie: [{"name": "a"}],
}


def test_no_pair_of_exotic_types_is_misjudged() -> None:
    """Of any two of many odd types: what has no finding always crosses, what is an error never does."""
    judged = 0
    for argument, values in EXOTIC.items():
        outputs = [schema_of(model_of(argument)).accept_output({"x": value})[0] for value in values]
        for input_model in EXOTIC:
            findings = kinds(model_of(argument), model_of(input_model))
            for output in outputs:
                try:
                    schema_of(model_of(input_model)).convert(output)
                    crossed = True
                except ValueError:
                    crossed = False
                assert findings or crossed, (argument, input_model, output)
                assert not (crossed and "error" in [severity for severity, _, _ in findings]), (
                    argument,
                    input_model,
                    output,
                )
            judged += 1
    assert judged > 1400


def test_root_models_are_what_they_hold() -> None:
    """A root model's value meets the next node's input as it is."""
    numbers, words = RootModel[list[int]], RootModel[list[str]]
    assert kinds(numbers, RootModel[list[float]]) == []
    assert crosses(numbers, RootModel[list[float]], root=[1])
    assert kinds(numbers, words) == [("error", "type", "[]")]
    assert not crosses(numbers, words, root=[1])
    assert kinds(numbers, Item) == [("error", "type", "")]
    assert not crosses(numbers, Item, root=[1])
    assert kinds(RootModel[dict[str, int]], Item) == [("warning", "missing", "n")]
    assert kinds(Item, RootModel[dict[str, int]]) == []
    assert crosses(Item, RootModel[dict[str, int]], n=1)


# ---------------------------------------------------------------------- what cannot be told


@pytest.mark.core
def test_validators_of_the_target_are_one_warning() -> None:
    """Where functions decide that is said once, with the fields and the functions, and nothing is called."""
    called = []

    def small(value: int) -> int:
        called.append(value)
        return value

    stricter = (Annotated[int, BeforeValidator(small)], ...)
    input_model = create_model("Taken", a=(Annotated[int, AfterValidator(small)], ...), b=stricter)
    argument = create_model("Given", a=(int, ...), b=(int, ...))
    finding = one(node("a", output_model=argument), node("b", input_model))
    assert (finding.severity, finding.kind, finding.path) == ("warning", "undecidable", "a, b")
    assert "small decides" in finding.message
    assert called == []


def test_a_validator_does_not_hide_what_never_fits() -> None:
    """A validator that runs after another check is not asked where that refuses everything."""
    assert kinds(model_of(list[int]), model_of(Annotated[int, AfterValidator(abs)])) == [
        ("error", "type", "x")
    ]


def test_a_validator_of_the_source_is_taken_at_its_word() -> None:
    """What a validator says that it returns is what is handed on; one that says nothing is unknown."""

    def describe(value: int) -> str:
        return str(value)

    assert kinds(model_of(Annotated[int, AfterValidator(describe)]), model_of(str)) == []
    assert crosses(model_of(Annotated[int, AfterValidator(describe)]), model_of(str), x=1)
    assert kinds(model_of(Annotated[int, AfterValidator(describe)]), model_of(list[int])) == [
        ("error", "type", "x")
    ]
    assert kinds(model_of(Annotated[int, AfterValidator(lambda value: str(value))]), model_of(int)) == [
        ("warning", "unknown", "x")
    ]


def test_a_model_validator_cannot_be_told() -> None:
    """A model validator of the target is a warning, and so is a class that validates by code of its own."""

    class Sane(Item):
        @model_validator(mode="after")
        def check(self) -> Sane:
            return self

    class Own(Item):
        @classmethod
        def model_validate(cls, obj: Any, **options: Any) -> Any:
            return super().model_validate(obj, **options)

    class Made(Item):
        def __init__(self, **fields: Any) -> None:
            super().__init__(**fields)

    class Later(Item):
        def model_post_init(self, context: Any) -> None: ...

    class Private(Item):
        _note: str = ""

    value = create_model("Given", n=(int, ...))
    for input_model in (Sane, Own, Made, Later):
        assert [(s, k) for s, k, _ in kinds(value, input_model)] == [("warning", "undecidable")], input_model
    assert kinds(value, Private) == []
    assert kinds(Text, Sane) == kinds(Text, Later)[:1] == [("error", "missing", "n")]


@pytest.mark.core
def test_nothing_is_claimed_about_nodes_without_contract() -> None:
    """A node without contract takes and gives anything; what stands behind it is not looked at."""
    assert check(node("a", output_model=Text), bare("free"), node("b", Item)) == []
    assert check(bare("free"), node("b", Item)) == []
    group = parallel(node("b", Text, Text), bare("free"))
    assert check(node("a", output_model=Text), group, node("c", Item)) == []


def test_a_contract_that_cannot_be_read_is_a_warning() -> None:
    """A class whose annotations are not defined breaks nothing: it is named, with the mend."""
    Broken = create_model("Broken", x=("NotThere", ...))
    finding = one(node("a", output_model=Text), node("b", Broken))
    assert (finding.severity, finding.kind) == ("warning", "broken")
    assert "model_rebuild()" in finding.fix


# ---------------------------------------------------------------------- groups


def test_each_child_of_parallel_is_checked() -> None:
    """Every child of a group, nested ones too, is checked against the state that all of them are given."""
    result = check(
        node("a", output_model=Text), parallel(node("b", Text, Text), parallel(node("c", Item, Item)))
    )
    assert [(f.source, f.target, f.target_at, f.kind) for f in result] == [("a", "c", "1.1.0", "missing")]


@pytest.mark.core
def test_the_merged_state_is_checked_by_who_gave_each_field() -> None:
    """What stands behind a group is checked against the merged fields; the finding names a field's child."""
    both = create_model("Both", text=(list[str], ...), n=(int, ...))
    result = check(
        node("a"), parallel(node("b", output_model=Text), node("c", output_model=Item)), node("d", both)
    )
    assert [(f.source, f.source_at, f.target, f.kind) for f in result] == [("b", "1.0", "d", "type")]
    group = parallel(node("b", output_model=Text), node("c", output_model=Item))
    assert check(node("a"), group, node("d", Item)) == []


@pytest.mark.core
def test_a_collision_tells_who_wins() -> None:
    """Two children that give the same field are a warning; the later wins, and counts for the next node."""
    other = create_model("Other", text=(int, ...))
    result = check(
        node("a"), parallel(node("b", output_model=Text), node("c", output_model=other)), node("d", other)
    )
    assert [(f.severity, f.kind, f.source, f.target, f.path) for f in result] == [
        ("warning", "collision", "b", "c", "text")
    ]
    assert (result[0].source_type, result[0].target_type) == ("str", "int")
    assert "that of 'c' wins" in result[0].message
    (_, wrong) = check(
        node("a"), parallel(node("b", output_model=Text), node("c", output_model=other)), node("d", Text)
    )
    assert (wrong.kind, wrong.source, wrong.source_type) == ("type", "c", "int")


def test_map_over_needs_a_list() -> None:
    """map_over goes over a list or tuple that the state has: anything else is an error, None a warning."""
    work = map_over("x", node("work", Text, Text), into="y")
    for annotation, kind in ((str, "type"), (set[str], "type"), (dict[str, int], "type")):
        assert [(f.severity, f.kind) for f in check(node("a", output_model=model_of(annotation)), work)][
            :1
        ] == [("error", kind)]
    assert [(f.severity, f.kind) for f in check(node("a", output_model=Item), work)] == [("error", "missing")]
    assert [
        (f.severity, f.kind) for f in check(node("a", output_model=model_of(list[str] | None)), work)
    ] == [("warning", "optional")]
    assert check(node("a", output_model=model_of(tuple[str, ...])), work) == []
    assert [(f.severity, f.kind) for f in check(node("a", output_model=model_of(Any)), work)] == [
        ("warning", "unknown")
    ]


@pytest.mark.core
def test_the_items_of_map_over_are_checked_against_the_node() -> None:
    """An item is the node's input: a record by its fields, else as the only required field or a root.

    What an item computes is not among its fields.
    """
    work = map_over("x", node("work", Text, Text), into="y")
    assert check(node("a", output_model=model_of(list[Text])), work) == []
    assert check(node("a", output_model=model_of(list[str])), work) == []
    finding = one(node("a", output_model=model_of(list[int])), work)
    assert (finding.severity, finding.path, finding.source) == ("error", "x[].text", "a")
    assert finding.target_at == "1.0"

    class Computing(BaseModel):
        @computed_field
        @property
        def text(self) -> str:
            return ""

    for without_text in (Item, Computing):
        finding = one(node("a", output_model=model_of(list[without_text])), work)
        assert (finding.kind, finding.path) == ("missing", "x[].text")
    two = map_over("x", node("work", NameYear, Text), into="y")
    assert [(f.severity, f.kind) for f in check(node("a", output_model=model_of(list[str])), two)] == [
        ("error", "items")
    ]
    words = map_over("x", node("work", RootModel[str], Text), into="y")
    assert check(node("a", output_model=model_of(list[str])), words) == []
    grouped = map_over("x", parallel(node("work", Text, Text)), into="y")
    assert [(f.severity, f.kind) for f in check(node("a", output_model=model_of(list[str])), grouped)] == [
        ("error", "items")
    ]


def test_what_map_over_collects_is_checked_further_on() -> None:
    """The other fields are kept, and the outputs become a list of the node's output."""
    value = create_model("Given", x=(list[str], ...), kept=(int, ...))
    work = map_over("x", node("work", Text, Item), into="y")
    fine = create_model("Fine", y=(list[Item], ...), kept=(int, ...), x=(list[str], ...))
    assert check(node("a", output_model=value), work, node("b", fine)) == []
    wrong = create_model("Wrong", y=(list[Text], ...), kept=(str, ...))
    result = check(node("a", output_model=value), work, node("b", wrong))
    problems = [(f.source, f.kind, f.path) for f in result]
    assert problems == [("work", "missing", "y[].text"), ("a", "type", "kept")]


def test_an_output_list_that_replaces_a_field_is_told() -> None:
    """A map_over whose results take the place of another field is a collision; of its own field not."""
    value = create_model("Given", x=(list[str], ...), y=(int, ...))
    assert [
        f.kind for f in check(node("a", output_model=value), map_over("x", node("w", Text, Text), into="y"))
    ] == ["collision"]
    assert check(node("a", output_model=value), map_over("x", node("w", Text, Text), into="x")) == []


async def result_of(*nodes: Any, **config: Any) -> Any:
    return await StromaRunner.quick(**config).run(nodes, Anything())


TEXTS: Any = node("a", output_model=model_of(list[str]), returned={"x": ["a"]})
STREETS: Any = node("a", output_model=model_of(list[Street]), returned={"x": [{"name": "a"}]})
SHOUT: Any = node("w", Text, Text, {"text": "b"})
BOTH: Any = create_model("Both", text=(str, ...), n=(int, ...))
APART: Any = parallel(
    node("a", output_model=Text, returned={"text": "a"}), node("b", output_model=Item, returned={"n": 1})
)
TWICE: Any = parallel(
    node("a", output_model=model_of(str), returned={"x": "a"}),
    node("b", output_model=model_of(int), returned={"x": 1}),
)
GROUPED: list[tuple[list[Any], bool]] = [
    (
        [
            TEXTS,
            map_over("x", SHOUT, into="y"),
            node("b", create_model("Y", y=(list[Text], ...)), Text, {"text": ""}),
        ],
        True,
    ),
    ([TEXTS, map_over("x", node("w", NameYear, Text), into="y")], False),
    ([TEXTS, map_over("x", parallel(SHOUT), into="y")], False),
    (
        [node("a", output_model=model_of(set[str]), returned={"x": ["a"]}), map_over("x", SHOUT, into="y")],
        False,
    ),
    ([STREETS, map_over("x", node("w", StreetIn, Text, {"text": ""}), into="y")], False),
    ([APART, node("c", BOTH, Text, {"text": ""})], True),
    ([TWICE, node("c", model_of(int), Text, {"text": ""})], True),
]


@pytest.mark.parametrize(("nodes", "works"), GROUPED)
async def test_groups_do_at_run_time_what_the_checker_says(nodes: list[Any], works: bool) -> None:
    """A pipeline with groups that has no errors runs to its end, and one with errors stops where they are."""
    result = await result_of(*nodes)
    assert (result.status is RunStatus.COMPLETED) == works, result.failure
    findings = [f for f in check(*nodes) if f.kind not in ("collision", "optional")]
    assert not works or findings == []
    assert works or findings or [f for f in check(*nodes) if f.kind == "optional"]


# ---------------------------------------------------------------------- the interface


def test_check_takes_pipelines_and_lists_and_refuses_all_else() -> None:
    """runner.check takes what run() takes, and says of what is no node how to make one."""
    nodes = [node("a", output_model=Text), node("b", Item)]
    runner = StromaRunner.quick()
    assert runner.check(Pipeline("p", nodes)) == runner.check(iter(nodes)) == runner.check(tuple(nodes))
    with pytest.raises(TypeError, match="decorate it"):
        runner.check([result_of])
    assert runner.check([]) == []


def test_the_registry_wins_over_the_marker() -> None:
    """A node is checked by the contract that it would run under."""
    runner = StromaRunner.quick()
    nodes = [node("a", output_model=Text), node("b", Item)]
    runner.registry.register(NodeContract(node_id="b", input_schema=Text, output_schema=Text))
    assert runner.check(nodes) == []


def test_what_runs_begin_with_is_checked_if_it_is_said() -> None:
    """input_schema= says what runs begin with; without it the first node's input is nobody's concern."""
    runner = StromaRunner.quick()
    (finding,) = runner.check([node("a", Item)], input_schema=Text)
    assert (finding.source, finding.target, finding.kind) == ("input", "a", "missing")
    assert runner.check([node("a", Item)]) == []


@pytest.mark.core
async def test_a_run_that_cannot_work_is_refused_before_the_store_is_opened(tmp_path: Path) -> None:
    """With RunConfig(check=True) run() raises CheckFailed with all errors, no warnings and no store."""
    path = tmp_path / "runs.db"
    both = create_model("Both", n=(int, ...), m=(int, ...), text=(int, ...))
    nodes = [node("a", output_model=Text, returned={"text": "1"}), node("b", both)]
    runner = StromaRunner.quick(store=SQLiteStore(path), check=True)
    with pytest.raises(CheckFailed) as caught:
        await runner.run(nodes, Anything())
    assert not path.exists()
    assert [(f.severity, f.path) for f in caught.value.findings] == [("error", "n"), ("error", "m")]
    assert str(caught.value).startswith(
        "2 things in this pipeline can never work:\n  error (missing): 'a' -> 'b', n: "
    )
    assert isinstance(caught.value, ValueError)


@pytest.mark.core
async def test_warnings_refuse_no_run() -> None:
    """A run with warnings alone runs with check=True; without it what cannot work is FAILED."""
    source = node("a", output_model=model_of(str), returned={"x": "1"})
    nodes = [source, node("b", model_of(int), Text, {"text": ""})]
    assert [f.severity for f in check(*nodes)] == ["warning"]
    assert (await result_of(*nodes, check=True)).status is RunStatus.COMPLETED
    wrong = [node("a", output_model=Text, returned={"text": ""}), node("b", Item)]
    assert (await result_of(*wrong)).status is RunStatus.FAILED


async def test_a_pipelines_own_config_may_ask_for_the_check() -> None:
    """check=True in a Pipeline's config counts like that of the runner."""
    pipeline = Pipeline("p", [node("a", output_model=Text), node("b", Item)], config=RunConfig(check=True))
    with pytest.raises(CheckFailed):
        await StromaRunner.quick().run(pipeline, Anything())


@pytest.mark.slow
def test_the_checker_is_not_loaded_unless_it_is_used() -> None:
    """A run that does not ask for it imports no checker."""
    code = (
        "import asyncio, sys\nfrom pydantic import BaseModel\nfrom stroma import NodeContract, "
        "StromaRunner, stroma_node\n"
        "class A(BaseModel): n: int = 0\n"
        "@stroma_node('a', NodeContract(node_id='a', input_schema=A, output_schema=A))\n"
        "async def a(state): return {}\n"
        "asyncio.run(StromaRunner.quick().run([a], A()))\n"
        "print([name for name in sys.modules if name.startswith('stroma.contracts.checks')])"
    )
    assert run_python(code=code) == "[]\n"


def test_checking_is_quick() -> None:
    """A pipeline of 200 nodes is checked within a second or two, also where it runs."""
    wide = create_model("Wide", **{f"f{i}": (list[int] | None, ...) for i in range(10)})
    narrow = create_model("Narrow", **{f"f{i}": (list[int], ...) for i in range(10)})
    nodes = [node(f"n{i}", narrow, wide) for i in range(200)]

    async def timed() -> float:
        loop = asyncio.get_running_loop()
        started = loop.time()
        assert len(check(*nodes)) == 1990
        return loop.time() - started

    assert asyncio.run(timed()) < 5
