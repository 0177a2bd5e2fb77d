"""The form that answers a question: fields of the stored JSON schema, and an error beside each field."""

import json
import re
from enum import Enum
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, RootModel, field_validator
from tests.kit import Item as Inner
from tests.ui.conftest import GOOD, Site, make_runs, node
from tests.ui.test_actions import answered, form_of, json_form_of

from stroma import Pipeline, SQLiteStore, current_node
from stroma.contracts.examples import example_text
from stroma.ui.answer_fields import PREFIX, fields_of, parse_fields


class Colour(Enum):
    red = "red"
    blue = "blue"


class Review(BaseModel):
    approved: bool
    colour: Colour
    level: Literal["low", "high"] = "low"
    note: str = Field("", description="For the customer.", title="Your note")
    cents: int
    share: float | None = None
    names: list[str] = []
    inner: Inner | None = None

    @field_validator("cents")
    @classmethod
    def _is_positive(cls, cents: int) -> int:
        if cents < 0:
            raise ValueError("must not be negative")
        return cents


class Cleared(BaseModel):
    ok: bool = True
    send_to: list[str] = ["everyone@example.org"]
    max_usd: int | None = 100
    note: str = "as usual"
    cents: int = 5
    names: list[str] = []
    by: str | None = None


class Nullable(BaseModel):
    by: str | None


async def _asks(state: Any) -> Any:
    current_node().wait_for(Review, reason="Is it right?")
    return state


ASKS = Pipeline("flows", [GOOD.nodes[0], node("asks", _asks)])


def parsed(model: type[BaseModel], texts: dict[str, str]) -> Any:
    """The answer in a form with these fields, or what is wrong with each."""
    form = {f"{PREFIX}{name}": text for name, text in texts.items()}
    answer, errors = parse_fields(fields_of(model.model_json_schema()), form)
    return {error.name: error.message for error in errors} or answer


def test_each_simple_property_is_a_field() -> None:
    """Text, number, boolean, enum, literal, list of text, optional have a field; others are JSON."""
    fields = {field.name: field for field in fields_of(Review.model_json_schema())}
    assert {name: (field.input, field.is_required) for name, field in fields.items()} == {
        "approved": ("choice", True),
        "colour": ("choice", True),
        "level": ("choice", True),
        "note": ("text", False),
        "cents": ("integer", True),
        "share": ("number", False),
        "names": ("lines", False),
        "inner": ("json", False),
    }
    assert fields["colour"].choices == (('"red"', "red"), ('"blue"', "blue"))
    assert fields["level"].value == '"low"'
    assert (fields["note"].label, fields["note"].hint) == ("Your note", "For the customer.")


def test_fields_become_an_answer() -> None:
    """Fields are read by their types; an empty one that is not required, and shows no default, is omitted."""
    texts = {"approved": "false", "colour": '"blue"', "level": '"low"', "note": "a\r\nb", "cents": "7"}
    more = {"share": "0.5", "names": "x\n\ny\n", "inner": '{"n": 1}'}
    assert parsed(Review, texts | more) == {
        "approved": False,
        "colour": "blue",
        "level": "low",
        "note": "a\nb",
        "cents": 7,
        "share": 0.5,
        "names": ["x", "y"],
        "inner": {"n": 1},
    }
    wrong = {"approved": "maybe", "cents": "1,5", "share": "much", "inner": "{"}
    assert parsed(Review, wrong) == {
        "approved": "not one of the choices",
        "colour": "required",
        "level": "required",
        "cents": "not a number",
        "share": "not a number",
        "inner": "not JSON",
    }


def test_a_cleared_field_does_not_send_its_default() -> None:
    """A field that shows a default and comes back empty is [], null or "", or an error: never the default."""
    texts = {"ok": "", "send_to": "", "max_usd": "", "note": "", "cents": "", "names": "", "by": ""}
    assert parsed(Cleared, texts) == {"ok": "required", "cents": "required"}
    answer = parsed(Cleared, {**texts, "ok": "false", "cents": "3"})
    assert answer == {"ok": False, "send_to": [], "max_usd": None, "note": "", "cents": 3}
    assert Cleared.model_validate(answer).send_to == []


def test_other_answers() -> None:
    """A required field that takes null is null if empty; an answer of no object has one field or JSON."""
    assert parsed(Nullable, {"by": ""}) == {"by": None}
    assert parsed(RootModel[bool], {"": "true"}) is True
    assert parsed(RootModel[list[str]], {"": "a\nb"}) == ["a", "b"]
    mapping = RootModel[dict[str, int]].model_json_schema()
    for schema in (None, mapping, {"type": "object"}, {"$ref": "#/$defs/x"}):
        assert fields_of(schema) == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": 1, "b": {"anyOf": 1}, "c": {"enum": [[1]]}, "d": {"type": 1}}},
        {"type": "object", "properties": [1], "required": 3},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"type": "array", "items": [1], "$defs": 3},
    ],
)
def test_a_strange_schema_is_written_as_json(schema: Any) -> None:
    """A stored schema that pydantic did not write raises nothing: an unknown part is a JSON field."""
    assert {field.input for field in fields_of(schema)} <= {"json", "choice"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": [1], "required": 3},
        {"type": "array", "items": [1], "$defs": 3, "minItems": "x"},
        {"type": "array", "minItems": 1_000_000_000},
        {"enum": 7},
        {"anyOf": 7},
        {"title": "InterruptAnswer"},
        None,
    ],
)
def test_a_strange_schema_has_no_example(schema: Any) -> None:
    """A stored schema that nobody can answer neither raises nor takes memory: the form begins empty."""
    assert example_text(schema) == ""


def test_an_answer_by_fields(store: SQLiteStore, serve: Any) -> None:
    """The page has a field for each property without the pipeline; errors are beside them, and texts stay."""
    make_runs(store, ("x", ASKS))
    page = serve(store).get("/run", id="x").text
    assert 'name="field:note"' in page
    assert "For the customer." in page
    assert "Answer as JSON" in page
    site: Site = serve(store, pipeline="flows", find_schema=lambda one: Review)
    fields = {
        "approved": "true",
        "colour": '"red"',
        "cents": "seven",
        "note": "<b>kept</b>",
        "inner": '{"n": "x"}',
        "level": '"low"',
    }
    sent = form_of(site.get("/run", id="x").text, "approve")
    sent |= {f"field:{name}": text for name, text in fields.items()}
    wrong = site.post("/approve", sent)
    assert wrong.status == 422
    assert "not a number" in wrong.text
    assert "&lt;b&gt;kept&lt;/b&gt;" in wrong.text
    wrong = site.post("/approve", {**sent, "field:cents": "-7"})
    assert (wrong.status, answered(store, "x")) == (422, False)
    assert "must not be negative" in wrong.text
    assert "n: Input should be a valid integer" in wrong.text
    good = {**sent, **form_of(wrong.text, "approve"), "field:cents": "7", "field:inner": ""}
    assert site.post("/approve", good).status == 303
    (question,) = store.waiting("x")
    assert question.payload is not None
    assert b"<b>kept</b>" in question.payload
    page = site.get("/run", id="x").text
    shown = r"<b>Answered</b> asks asked &#34;Is it right\?&#34;: \{[^<]*&lt;b&gt;kept&lt;/b&gt;"
    assert re.search(shown, page)
    assert "<b>Due</b> for a worker; no longer waiting for an answer: Is it right?" in page
    for path in ("/", "/overview"):
        assert "due for a worker; no longer waiting for an answer: Is it right?" in site.get(path).text
    site = serve(store, redact=lambda state: {**state, "note": "hidden"} if "note" in state else state)
    assert "kept" not in site.get("/run", id="x").text


def test_an_answer_as_json(store: SQLiteStore, serve: Any) -> None:
    """An answer as JSON names the class that it needs; one that does not fit is shown with what is wrong."""
    make_runs(store, ("x", ASKS))
    site: Site = serve(store, pipeline="flows", find_schema=lambda one: Review)
    page = site.get("/run", id="x").text
    assert "Answer as JSON (Review) " in page
    form = json_form_of(page)
    wrong = site.post("/approve", {**form, "answer": '{"approved": "perhaps"}'})
    assert wrong.status == 422
    assert "&#34;perhaps&#34;" in wrong.text
    assert "Input should be a valid boolean" in wrong.text
    wrong = site.post("/approve", {**form, "answer": "{"})
    assert (wrong.status, "a text needs quotes" in wrong.text, answered(store, "x")) == (422, True, False)


def test_a_question_that_is_not_open(store: SQLiteStore, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A form of an earlier question is refused, and so is an answer whose class this server does not have."""
    make_runs(store, ("x", ASKS))
    site: Site = serve(store)
    form = json_form_of(site.get("/run", id="x").text)
    form["answer"] = json.dumps({"approved": True, "colour": "red", "cents": 1})
    assert site.post("/approve", {**form, "question": "1:0"}).status == 409
    (question,) = store.waiting("x")
    monkeypatch.setattr(store, "waiting", lambda run_id: [question._replace(schema_ref="antigravity:Review")])
    refused = site.post("/approve", form)
    assert (refused.status, question.payload) == (409, None)
    assert "is not imported" in refused.text
