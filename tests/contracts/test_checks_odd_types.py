"""The static checker on odd and on generated types: each verdict is compared with the engine."""

import enum
import time
import uuid
import xml.etree.ElementTree as ElementTree
from collections import Counter, deque
from collections.abc import Collection, Hashable
from typing import Annotated, Any, ClassVar, Literal, Optional

import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import (
    UUID1,
    UUID4,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    RootModel,
    create_model,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import core_schema
from tests.contracts.generated_schemas import Made, pairs
from tests.contracts.test_checks import Anything, node
from tests.kit import NEVER, Item, Text, computing
from typing_extensions import TypedDict

from stroma import ContractRegistry, Finding, RunStatus, StromaRunner, map_over, parallel, stroma_node
from stroma.contracts.checks.lineage import lineage_of
from stroma.contracts.node import find_node
from stroma.contracts.schema import schema_of


def model_of(annotation: Any, **options: Any) -> type[BaseModel]:
    """A class with one field, x."""
    config = ConfigDict(arbitrary_types_allowed=True, **options)
    return create_model("Made", __config__=config, x=(annotation, ...))


def check(*nodes: Any) -> list[Finding]:
    return StromaRunner.quick().check(nodes)


async def works(output_model: type[BaseModel], input_model: type[BaseModel], output: Any) -> bool:
    """Whether a run of two nodes gets from the one class to the other."""
    nodes = [node("a", output_model=output_model, returned=output), node("b", input_model, returned={})]
    result = await StromaRunner.quick(policy_map=NEVER).run(nodes, Anything())
    assert any(event.node_id == "a" and event.failure is None for event in result.trace), result.failure
    return result.status is RunStatus.COMPLETED


def severities(output_model: type[BaseModel], input_model: type[BaseModel]) -> set[str]:
    result = check(node("a", output_model=output_model), node("b", input_model))
    assert not [finding for finding in result if "raised" in finding.message]
    return {finding.severity for finding in result}


class Level(enum.Enum):
    LOW = "low"

    @classmethod
    def _missing_(cls, value: object) -> "Level":
        return cls.LOW


class Rights(enum.IntFlag):
    READ = 1
    WRITE = 2


class Low(enum.IntEnum):
    ONE = 1
    TWO = 2


class Pairs(enum.Enum):
    ONE = (1, 2)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Red(BaseModel):
    kind: Literal[Colour.RED] = Colour.RED


class Blue(BaseModel):
    kind: Literal[Colour.BLUE] = Colour.BLUE


class Word(BaseModel):
    kind: Literal["red"] = "red"


Coloured = Annotated[Red | Blue, Field(discriminator="kind")]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)
    n: int


class Filled(BaseModel):
    n: int

    @model_validator(mode="before")
    @classmethod
    def fill(cls, raw: Any) -> Any:
        return {"n": 1}


@dataclass(config=ConfigDict(strict=True))
class StrictPoint:
    n: int


class Optionally(TypedDict, total=False):
    n: int


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    n: int


class Typed(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]
    n: int


class WithTags(BaseModel):
    n: int
    tags: list[str] = []


class WithText(BaseModel):
    n: str = ""


class Secretive(BaseModel):
    n: int
    hidden: int = Field(exclude=True)


class Own:
    """A class of a user's, that pydantic makes of text."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


UNFIT: list[tuple[Any, Any, Any]] = [
    (Item, StrictPoint, {"n": 1}),
    (Red, Annotated[Word | Blue, Field(discriminator="kind")], {}),
]
MAYBE: list[tuple[Any, Any, Any, bool]] = [
    (set[Frozen], list[Frozen], [{"n": 1}], True),
    (set[Frozen], list[Item], [{"n": 1}], False),
    (int, Level, 1, True),
    (list[int], Level, [1], True),
    (Item, Level, {"n": 1}, True),
    (Rights, Low, 3, False),
    (Rights, Annotated[int, Field(multiple_of=3)], 3, True),
    (tuple[int, ...], Pairs, (1, 2), True),
    (Hashable, str, "a", True),
    (Collection[int], Hashable, [1], False),
    (Literal[1, "1", None], Item | None, None, True),
    (Literal["1", "2"], Annotated[int, BeforeValidator(int)], "1", True),
    (int, Filled, 1, True),
    (Text, Filled, {"text": "a"}, True),
    (Optionally, dict[str, list[int]], {}, True),
    (Optionally, WithText, {}, True),
    (Optionally, WithText, {"n": 1}, False),
    (Optionally, Annotated[dict[str, int], Field(min_length=1)], {}, False),
    (Annotated[dict[str, int], Field(max_length=0)], dict[str, Item], {}, True),
    (Open, WithTags, {"n": 1, "tags": 5}, False),
    (Open, Typed, {"n": 1, "m": "a"}, False),
    (Typed, WithTags, {"n": 1, "tags": 5}, False),
    (Typed, dict[Literal["n"], int], {"n": 1, "m": 2}, False),
]
FITS: list[tuple[Any, Any, Any]] = [
    (Red, Coloured, {}),
    (Annotated[list[int], Field(max_length=0)], list[Item], []),
    (deque[int], deque[int], [1]),
    (Rights, Rights, 3),
]


@pytest.mark.core
@pytest.mark.parametrize(("value", "input_model", "output"), UNFIT, ids=str)
async def test_what_never_works_is_an_error(value: Any, input_model: Any, output: Any) -> None:
    """What the engine refuses whatever the output is told as an error."""
    assert severities(model_of(value), model_of(input_model)) == {"error"}
    assert not await works(model_of(value), model_of(input_model), {"x": output})


@pytest.mark.core
@pytest.mark.parametrize(("value", "input_model", "output", "passes"), MAYBE, ids=str)
async def test_what_may_work_is_no_error_and_what_may_fail_is_told(
    value: Any, input_model: Any, output: Any, passes: bool
) -> None:
    """Where one output passes it is no error; where one fails there is a finding."""
    result = severities(model_of(value), model_of(input_model))
    assert await works(model_of(value), model_of(input_model), {"x": output}) is passes
    assert "error" not in result if passes else result


@pytest.mark.parametrize(("value", "input_model", "output"), FITS, ids=str)
async def test_what_always_works_is_not_told(value: Any, input_model: Any, output: Any) -> None:
    """What passes whatever the output has no finding."""
    assert severities(model_of(value), model_of(input_model)) == set()
    assert await works(model_of(value), model_of(input_model), {"x": output})


async def test_uuids_have_versions() -> None:
    """A UUID of another version, or of any version, may not be accepted."""
    for annotation in (UUID4, uuid.UUID):
        result = check(node("a", output_model=model_of(annotation)), node("b", model_of(UUID1)))
        assert [(finding.severity, finding.kind) for finding in result] == [("warning", "constraint")]
    assert not await works(model_of(UUID4), model_of(UUID1), {"x": uuid.uuid4()})


@pytest.mark.core
async def test_a_default_that_its_own_class_refuses_is_told() -> None:
    """A default is not validated, so the same class on both sides may refuse it."""
    defaulted = create_model("Defaulted", n=(int, None))
    assert [(f.severity, f.kind) for f in check(node("a", output_model=defaulted), node("b", defaulted))] == [
        ("warning", "optional")
    ]
    assert not await works(defaulted, defaulted, {})
    assert await works(defaulted, defaulted, {"n": 1})


@pytest.mark.core
async def test_an_excluded_field_that_is_required_is_missed_by_its_own_class() -> None:
    """An excluded field crosses no boundary: its own class misses it, and may inside of another field."""
    holder = model_of(Secretive)
    for cls, output, finding in (
        (Secretive, {"n": 1, "hidden": 2}, ("error", "missing", "hidden")),
        (holder, {"x": {"n": 1, "hidden": 2}}, ("warning", "undecidable", "x")),
    ):
        result = check(node("a", output_model=cls), node("b", cls))
        assert [(f.severity, f.kind, f.path) for f in result] == [finding]
        assert not await works(cls, cls, output)


async def test_a_class_with_an_alias_fits_itself() -> None:
    """Between the same class on both sides values go by name though an alias may name another field."""
    crossed = create_model("Crossed", a=(int, Field(alias="b")), b=(str, Field(alias="c")))
    assert severities(crossed, crossed) == set()
    assert await works(crossed, crossed, {"b": 1, "c": "x"})


@pytest.mark.core
async def test_what_a_class_of_ones_own_made_crosses_to_the_same_class() -> None:
    """A class that pydantic makes of text is not made again of its own instance; another class may refuse."""
    one, two = model_of(Own), model_of(Own, title="two")
    assert severities(one, one) == set()
    assert await works(one, one, {"x": "a"})
    assert severities(one, two) == {"warning"}
    assert not await works(one, two, {"x": "a"})


@pytest.mark.core
async def test_an_extra_field_never_takes_the_place_of_a_field() -> None:
    """An extra key that has the name of a field with an alias is not handed on as that field."""
    open_ = create_model("Open", __config__=ConfigDict(extra="allow"), n=(int, Field(alias="number")))
    assert severities(open_, open_) == set()
    assert await works(open_, open_, {"number": 1, "n": "other"})


def bare(node_id: str, returned: Any) -> Any:
    return stroma_node(node_id, None)(computing(lambda _: returned))


Words = RootModel[dict[str, list[str]]]
TEXT: Any = node("work", Text, Text, {"text": "b"})
WORK: Any = map_over("x", TEXT, into="y")
END: Any = node("end", create_model("End", y=(list[Text], ...)), Text, {"text": ""})
TAKES_A_ROOT: Any = node("b", create_model("R", root=(list[str], ...)), Text, {"text": ""})


def first(model: Any, returned: Any) -> Any:
    return node("a", output_model=model, returned=returned)


GROUPED: list[tuple[list[Any], set[str], bool]] = [
    ([first(Words, {"x": ["a"]}), WORK, END], {"warning"}, True),
    ([first(Words, {"z": ["a"]}), WORK, END], {"warning"}, False),
    ([first(RootModel[dict[str, int]], {"x": 1}), WORK], {"error", "warning"}, False),
    ([first(RootModel[list[str]], ["a"]), WORK], {"error"}, False),
    ([first(RootModel[tuple[str, ...]], ["a"]), WORK], {"error"}, False),
    ([first(RootModel[list[str]], ["a"]), map_over("root", TEXT, into="y"), END], set(), True),
    ([first(Anything, {"x": ["a"]}), WORK, END], {"warning"}, True),
    ([bare("a", {"x": ["a"]}), WORK, END], set(), True),
    ([first(model_of(list[str]), {"x": ["a"]}), map_over("x", WORK, into="y")], {"error"}, False),
    (
        [first(model_of(list[model_of(list[str])]), {"x": [{"x": ["a"]}]}), map_over("x", WORK, into="y")],
        set(),
        True,
    ),
    ([parallel(first(RootModel[list[str]], ["a"])), TAKES_A_ROOT], set(), True),
]


@pytest.mark.core
@pytest.mark.parametrize(("nodes", "outcome", "passes"), GROUPED)
async def test_groups_over_what_has_no_named_fields(
    nodes: list[Any], outcome: set[str], passes: bool
) -> None:
    """map_over and parallel() are judged with root models, open classes and nodes without contracts."""
    findings = check(*nodes)
    assert {finding.severity for finding in findings} == outcome, findings
    result = await StromaRunner.quick(policy_map=NEVER).run(nodes, Anything())
    assert (result.status is RunStatus.COMPLETED) is passes, result.failure


def broken() -> type[BaseModel]:
    return create_model("Broken", x=("NotThere", ...))


BROKEN: list[Any] = [
    lambda: [node("a", Text, broken()), node("b", Text)],
    lambda: [node("a", broken(), Text)],
    lambda: [parallel(node("a", Text, broken()), node("b", Text, Text)), node("c", Text)],
    lambda: [node("a", Text, broken()), map_over("x", node("b", Text, Text), into="y")],
    lambda: [map_over("x", node("b", Text, broken()), into="y"), node("c", Anything)],
    lambda: [node("a", Text, BaseModel)],
]


@pytest.mark.core
@pytest.mark.parametrize("nodes", BROKEN)
def test_a_class_that_cannot_be_read_is_one_warning_wherever_it_stands(nodes: Any) -> None:
    """A class that names what is not defined breaks no check, as input, output or group."""
    (finding,) = check(*nodes())
    assert (finding.severity, finding.kind) == ("warning", "broken")
    assert "cannot be read" in finding.message


@pytest.mark.parametrize("nodes", BROKEN)
def test_a_class_that_cannot_be_read_is_a_box_without_lines(nodes: Any) -> None:
    """What flows where is shown of a pipeline with a class that cannot be read, in every form."""
    lineage = lineage_of("p", [find_node(node) for node in nodes()], ContractRegistry())
    assert ElementTree.fromstring(lineage.svg()).tag.endswith("svg")
    assert {box["node_id"] for box in lineage.data()["nodes"]} >= {"input"}
    assert lineage.mermaid().startswith("flowchart LR")


def test_a_root_model_flows_as_its_root() -> None:
    """The lineage links the value of a root model with the one that it becomes."""
    numbers = RootModel[list[int]]
    nodes = [find_node(one) for one in (node("a", output_model=numbers), node("b", numbers))]
    (edge,) = lineage_of("p", nodes, ContractRegistry()).data()["edges"]
    assert (edge["field"], edge["feeds"]) == ("root", "root")


def test_the_class_of_the_input_must_be_one() -> None:
    """What is no model class is refused as the class of what runs begin with, in words."""
    with pytest.raises(TypeError, match="pass the class of the initial state"):
        StromaRunner.quick().check([node("a")], input_schema="Text")


def test_values_that_cannot_be_told_break_no_check() -> None:
    """Defaults, limits and members whose repr and comparisons raise end in verdicts all the same."""

    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no")

        __str__ = __repr__
        __hash__: ClassVar[Any] = object.__hash__

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("no")

    class Mood(enum.Enum):
        GOOD = "good"

        def __repr__(self) -> str:
            raise RuntimeError("no")

        __str__ = __repr__

    classes = [
        model_of(Mood),
        model_of(Literal["a"]),
        model_of(InstanceOf[Hostile]),
        create_model("D", x=(int, Hostile())),
        create_model("E", x=(Mood, Mood.GOOD)),
        model_of(Annotated[int, Field(ge=5)]),
    ]
    for value in classes:
        for input_model in classes:
            assert all(
                str(finding) for finding in check(node("a", output_model=value), node("b", input_model))
            )


def tangle(name: str, annotation: Any, size: int = 10) -> type[BaseModel]:
    """A class of which every class inside holds every other one."""
    namespace: dict[str, Any] = {}
    names = [f"{name}{i}" for i in range(size)]
    for own in names:
        fields: dict[str, Any] = {f"to_{other[len(name) :]}": (Optional[other], None) for other in names}  # noqa: UP045
        namespace[own] = create_model(own, x=(annotation, ...), **fields)
    for model in namespace.values():
        model.model_rebuild(_types_namespace=namespace)
    first: type[BaseModel] = namespace[names[0]]
    return first


@pytest.mark.core
@pytest.mark.parametrize(("annotation", "severity"), [(float, set()), (list[int], {"error", "warning"})])
def test_classes_that_hold_each_other_come_to_an_end(annotation: Any, severity: set[str]) -> None:
    """Ten classes that all hold each other have too many paths to follow, and are judged at once."""
    one, two = tangle("One", int), tangle("Two", annotation)
    started = time.process_time()
    result = check(node("a", output_model=one), node("b", two))
    assert {finding.severity for finding in result} == severity
    assert len(result) < 2000
    assert time.process_time() - started < 60  # Going all ways would take hours.


def test_a_long_pipeline_is_checked_once_for_each_pair_of_classes() -> None:
    """A thousand nodes of two classes compare these once, and tell of every place."""
    wide = create_model("Wide", **{f"f{i}": (list[int] | None, ...) for i in range(5)})
    narrow = create_model("Narrow", **{f"f{i}": (list[int], ...) for i in range(5)})
    assert len(check(*(node(f"n{i}", narrow, wide) for i in range(1000)))) == 999 * 5


async def test_the_same_node_twice_and_no_node_at_all() -> None:
    """A node may stand anywhere, several times; nothing is found in nothing."""
    again = node("again", Text, Text, {"text": ""})
    assert check(again, again, again) == check() == []
    one = node("one", output_model=create_model("N", n=(int, ...)), returned={"n": 1})
    assert [(f.source_at, f.target_at) for f in check(one, again, one, again)] == [("0", "1"), ("2", "3")]


PAIRS = 600
OUTPUTS = 5
seen: Counter[str] = Counter()


def checked(first: Made, second: Made) -> list[Finding]:
    nodes = []
    for node_id, consumed, produced in (("first", first, first), ("second", second, second)):

        async def func(state: Any) -> Any: ...

        nodes.append(stroma_node(node_id, input=consumed.model, output=produced.model)(func))
    return StromaRunner.quick().check(nodes)


def crosses(first: Made, second: Made, values: Any) -> bool | None:
    """Whether an output crosses the engine's own boundary; None if the values make no output."""
    source, target = schema_of(first.model), schema_of(second.model)
    try:
        output, _ = source.accept_output(values)
    except Exception:
        return None
    try:
        target.convert(output)
    except Exception:
        return False
    return True


@pytest.mark.filterwarnings("ignore")  # pydantic's, of odd names and defaults.
@seed(20260)
@settings(
    max_examples=PAIRS, phases=[Phase.generate]
)  # So many in every profile: what is decided is counted.
@given(pairs(), st.data())
def agree(pair: tuple[Made, Made], data: st.DataObject) -> None:
    first, second = pair
    findings = checked(first, second)
    assert not [finding for finding in findings if "comparing them raised" in finding.message], findings
    errors = [finding for finding in findings if finding.severity == "error"]
    # A list of the wrong items is an error, though an empty one would pass: outputs have items then.
    outputs = [data.draw(first.values(bool(errors) or n % 2 == 0)) for n in range(OUTPUTS)]
    crossed = [
        result for result in (crosses(first, second, values) for values in outputs) if result is not None
    ]
    if not crossed:
        seen["no output"] += 1
        return
    seen["error" if errors else "warning" if findings else "nothing"] += 1
    if not findings:
        assert all(crossed), (outputs, crossed)
    if errors:
        assert not any(crossed), (outputs, crossed, [str(error) for error in errors])


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_checker_agrees_with_the_boundary_on_generated_pairs() -> None:
    """A pair without a finding is crossed by every output, one with an error by none; 200 are decided."""
    seen.clear()
    agree()
    assert seen["nothing"] + seen["error"] + seen["warning"] > 400, seen
    assert min(seen["nothing"], seen["error"], seen["warning"]) > 50, seen
    assert seen["nothing"] + seen["error"] >= 200, seen
