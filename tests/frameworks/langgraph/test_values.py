"""Values of LangGraph's state as JSON: each kind comes back as it was, and nothing is imported for it."""

import dataclasses
import datetime
import decimal
import enum
import json
import uuid
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    AnyMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langgraph.types import Command, Overwrite, Send
from pydantic import BaseModel

from stroma.adapters._langgraph_values import NotStorable, classes_in, decode, encode


class Colour(enum.StrEnum):
    RED = "red"


class Plan(BaseModel):
    topic: str
    tags: set[str] = set()
    newest: AnyMessage | None = None
    link: Any = None


@dataclasses.dataclass(frozen=True)
class Order:
    number: int
    plan: Plan | None = None


TOOL_CALL: Any = {"name": "search", "args": {"q": 1.5}, "id": "1", "type": "tool_call"}
USAGE: Any = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
VALUES: list[Any] = [
    None,
    True,
    7,
    1.5,
    float("inf"),
    "text",
    b"\xff",
    (1, (2,)),
    {1: "a"},
    {"@set": 1},
    {3, 1, 2},
    frozenset({"a"}),
    datetime.datetime(2026, 11, 30, 7, 1, tzinfo=datetime.UTC),
    datetime.date(2026, 1, 2),
    datetime.timedelta(hours=3),
    decimal.Decimal("1.20"),
    uuid.UUID(int=7),
    Colour.RED,
    {"nested": [{"order": (Order(1),)}]},
    Plan(topic="tea", tags={"b", "a"}, newest=HumanMessage("hi", id="1"), link=Order(2)),
    Order(1, Plan(topic="tea")),
    AIMessage("hi", tool_calls=[TOOL_CALL], usage_metadata=USAGE, response_metadata={"model_name": "gpt-4o"}),
    AIMessageChunk("h", id="r"),
    HumanMessage([{"type": "text", "text": "a"}], name="me"),
    SystemMessage("s"),
    ToolMessage("r", tool_call_id="1", artifact=[Order(3)], status="error"),
    RemoveMessage("1"),
    Document("text"),
    Command(
        update={"messages": [HumanMessage("q")]}, goto=[Send("a", {"x": (1,)}), "b"], graph=Command.PARENT
    ),
    Overwrite([1]),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    """Each kind has a form that is JSON, and is the same again, with its class."""
    back = decode(json.loads(json.dumps(encode(value))), {})
    assert (type(back), back) == (type(value), value)


def test_sets_have_one_form() -> None:
    """Sets are stored in an order that does not depend on the process."""
    assert encode({"b", "a", "c"}) == {"@set": ["a", "b", "c"]}


def test_a_value_without_a_form_is_named_with_its_place() -> None:
    """Any other object is refused, with its class and the way to it."""
    with pytest.raises(NotStorable, match=r"builtins.object in \['order'\].plan.link\[1\]"):
        encode({"order": Order(1, Plan(topic="tea", link=[0, object()]))})


def test_classes_are_found_in_annotations() -> None:
    """A class of a program that was __main__, or is inside a function, is found by annotations."""

    class Local(BaseModel):
        colour: Colour

    form = encode(Local(colour=Colour.RED))
    form["@object"][0] = form["@object"][0].replace(Local.__module__, "__main__")
    with pytest.raises(LookupError, match="is in no imported module"):
        decode(form, {})
    assert decode(form, classes_in(dict[str, list[Local]])) == Local(colour=Colour.RED)


def test_only_data_is_built() -> None:
    """A name in a store builds models, dataclasses and enums only, of modules that are imported."""
    with pytest.raises(LookupError, match="neither a model nor a dataclass"):
        decode({"@object": ["subprocess:Popen", {"args": "true"}]}, {})
    with pytest.raises(LookupError, match="is in no imported module"):
        decode({"@object": ["antigravity:Plan", {}]}, {})
