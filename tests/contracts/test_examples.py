"""Examples of JSON schemas: what they hold, and that the schema allows them."""

from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, JsonValue, RootModel, SecretStr, create_model

from stroma.contracts.examples import NoExampleError, example_for, example_of, example_text


class Colour(Enum):
    RED = "red"


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    n: int = Field(alias="number")
    texts: list[str]


class Tree(BaseModel):
    left: "Tree | None"
    items: list["Tree"]


LEAVES: list[Any] = [str, int, float, bool, Any, Colour, Inner, Tree, Literal["yes", 3], dict[str, int]]
KINDS = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        inner.map(lambda one: list[one]),
        inner.map(lambda one: dict[str, one]),
        inner.map(lambda one: one | None),
    ),
    max_leaves=4,
)
ALIASES = st.sampled_from([None, "other", "with space", AliasChoices("a", "b")])


@given(st.lists(st.tuples(KINDS, ALIASES, st.booleans()), max_size=5))
@settings(max_examples=200, deadline=None)
def test_an_example_fits_its_schema(fields: list[tuple[Any, Any, bool]]) -> None:
    """The model of a JSON schema accepts the example of the schema, whatever its fields and aliases."""
    declared: dict[str, Any] = {
        f"f{number}": (
            kind,
            Field(default=None) if optional else Field(validation_alias=unique(alias, number)),
        )
        for number, (kind, alias, optional) in enumerate(fields)
    }
    model = create_model("Model", __config__=ConfigDict(extra="forbid"), **declared)
    model.model_validate(example_of(model.model_json_schema()))


def unique(alias: Any, number: int) -> Any:
    if isinstance(alias, AliasChoices):
        return AliasChoices(*(f"{one}{number}" for one in alias.choices))
    return alias and f"{alias}{number}"


def test_what_an_example_holds() -> None:
    """An example has the required properties by alias and the first of several choices, else the defaults."""
    assert example_for(Inner) == {"number": 0, "texts": []}
    assert example_for(Tree) == {"left": None, "items": []}
    assert example_for(RootModel[list[int]]) == []
    assert example_for(Defaults) == {"text": "x", "inner": {"number": 4, "texts": ["ab", "cd"]}}


class Defaults(BaseModel):
    text: str = "x"
    inner: Inner = Inner(number=4, texts=["ab", "cd"])
    note: str | None = None
    key: SecretStr = SecretStr("hidden")
    made: list[str] = Field(default_factory=list)


class Free(BaseModel):
    result: JsonValue
    text: str
    nothing: None
    stars: Annotated[int, Field(ge=1)]
    due: date


def test_the_text_of_an_example_is_refused_where_no_example_is_known() -> None:
    """The text of an example has "..." for any JSON and for a value with bounds, which is not JSON itself."""
    text = '{"result": ..., "text": "...", "nothing": null, "stars": ..., "due": ...}'
    assert example_text(Free.model_json_schema()) == text
    none = {"result": None, "text": "...", "nothing": None, "stars": None, "due": None}
    assert example_of(Free.model_json_schema()) == none
    assert example_text(RootModel[JsonValue].model_json_schema()) == example_text(None) == ""


class Impossible(BaseModel):
    text: str = Field(pattern="^x{7}$")


class Odd(BaseModel):
    call: "type[Any]"


@pytest.mark.parametrize("model", [Impossible, Odd, RootModel[JsonValue]])
def test_a_model_without_a_known_example(model: type[BaseModel]) -> None:
    """Where no example is known, NoExampleError is raised rather than a wrong one returned."""
    with pytest.raises(NoExampleError):
        example_for(model)
