"""The forms that answer a question and submit a run, and queued runs on the pages."""

import asyncio
import html
import json
import re
import time
from enum import Enum
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field, RootModel, field_validator
from tests.kit import Item as Inner
from tests.ui.conftest import BAD, GOOD, SCRIPT, Site, State, make_runs, node
from tests.ui.scenes import lineage
from tests.ui.test_actions import answered, form_of, json_form_of
from tests.ui.test_security import keys

from stroma import Pipeline, SQLiteStore, StromaRunner, current_node
from stroma.checkpoint.records import RunQuery
from stroma.contracts.examples import example_text
from stroma.ui.answer_fields import PREFIX, fields_of, parse_fields
from stroma.ui.settings import Served, Submission


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


LATER = 3600.0


@pytest.fixture
def site(store: SQLiteStore, serve: Any) -> Site:
    """A site that submits runs of a pipeline."""

    async def submit(state: Any, run_id: str) -> None:
        await StromaRunner.quick(store=store).submit(GOOD, state, run_id=run_id)

    result: Site = serve(store, pipeline="flows", submission=Submission(State, submit))
    return result


def submit(store: Any, run_id: str, **options: Any) -> None:
    asyncio.run(StromaRunner.quick(store=store).submit(GOOD, State(), run_id=run_id, **options))


def queued(store: SQLiteStore) -> list[str]:
    if not store.exists():
        return []
    return [one.run_id for one in store.run_page(RunQuery(statuses=("QUEUED",))).runs]


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def test_a_blocked_run(store: SQLiteStore, site: Site) -> None:
    """A run that code could not continue has a badge in lists, is counted, and says why on its page."""
    submit(store, "one")
    submit(store, "two")
    assert "BLOCKED" not in site.get("/overview").text
    now_ms = time.time_ns() // 1_000_000
    asyncio.run(store.block("one", f"it makes {SCRIPT}", "2+abc", None, now_ms))
    page = site.get("/run", id="one").text
    for expected in (
        "QUEUED BLOCKED",
        "Blocked since 2",
        "code 2+abc could not continue it",
        f"it makes {SCRIPT}",
    ):
        assert expected in text_of(page)
    assert SCRIPT not in page
    assert text_of(site.get("/").text).count("BLOCKED") == 1
    assert "BLOCKED 1 run : the code of the workers does not fit" in text_of(site.get("/overview").text)
    found = text_of(site.get("/", q="is:blocked").text)
    assert ("one" in found.split(), "two" in found.split()) == (True, False)


def test_open_runs_have_no_part_in_the_success_rate(store: SQLiteStore, site: Site) -> None:
    """The success rate is that of completed and failed runs, and says so; open runs do not count."""
    make_runs(store, ("good", GOOD), ("bad", BAD))
    submit(store, "one")
    submit(store, "two")
    rate = "50.0% of ended runs, 1 failed"
    assert f"Success rate, last 4 runs {rate}" in text_of(site.get("/").text)
    assert "Success rate 50.0% of ended runs" in text_of(site.get("/overview").text)


def test_a_queued_run(store: SQLiteStore, site: Site) -> None:
    """The page of a queued run says since when it is queued, when it is due, its priority and key."""
    make_runs(store, ("good", GOOD))
    submit(store, "one", priority=-4, key=SCRIPT, delay=LATER, expires=2 * LATER)
    submit(store, "two")
    page = text_of(site.get("/run", id="one").text)
    for expected in ("QUEUED", "Submitted 2", "Due 2", "Priority -4", f"Key {SCRIPT[:30]}", "Expires 2"):
        assert expected in page, expected
    assert SCRIPT not in site.get("/run", id="one").text
    plain = text_of(site.get("/run", id="two").text)
    assert not re.search(r"\bKey\b|Expires", plain)
    listed = site.get("/").text
    assert "Queued <b>2</b>" in listed
    assert ", 2 queued" in text_of(listed)
    assert "good" not in text_of(site.get("/", status="QUEUED").text)
    assert ", 2 queued" in text_of(site.get("/overview").text)


def test_control_of_a_queued_run(store: SQLiteStore, site: Site) -> None:
    """A queued run can be cancelled and paused from its page, but not resumed: it has not started."""
    submit(store, "one")
    submit(store, "two")
    found = keys(site, "one")
    assert {"cancel", "pause", "delete"} <= set(found)
    assert "resume" not in found
    assert site.post("/cancel", {"id": "one", "key": found["cancel"]}).status == 303
    assert store.statuses(["one"]) == {"one": "CANCELLED"}
    assert site.post("/pause", {"id": "two", "key": keys(site, "two")["pause"]}).status == 303
    record = store.get_run("two")
    assert record.waits_for == "resume"
    assert "unpause" in keys(site, "two")


@pytest.mark.core
def test_one_form_submits_one_run(store: SQLiteStore, site: Site) -> None:
    """A form that is sent twice submits one run and leads to its page; other content submits another."""
    values = {"input": '{"n": 3}'}
    form = form_of(site.get("/submit").text, "submit") | values
    answers = [site.post("/submit", form) for _ in range(2)]
    assert {one.status for one in answers} == {303}
    assert answers[0].headers["location"] == answers[1].headers["location"]
    (run_id,) = queued(store)
    assert answers[0].headers["location"] == f"/run?id={run_id}"
    record = store.get_run(run_id)
    assert record.pipeline == "flows"
    assert "QUEUED" in site.get("/run", id=run_id).text
    assert site.post("/submit", form | {"input": '{"n": 4}'}).status == 303
    assert len(queued(store)) == 2


def test_several_pipelines(store: SQLiteStore, serve: Any) -> None:
    """Each pipeline that the interface was started with has its graph, its form, and a link from the others;
    another name is not found. A form of one cannot be sent for another."""
    names: list[str] = []

    def served(name: str) -> Served:
        async def submit(state: Any, run_id: str) -> None:
            names.append(name)
            pipeline = Pipeline(name, GOOD.nodes)
            await StromaRunner.quick(store=store).submit(pipeline, state, run_id=run_id)

        return Served(submission=Submission(State, submit), lineage=lineage(Pipeline(name, GOOD.nodes)))

    site: Site = serve(store, pipelines={name: served(name) for name in ("first", "second", SCRIPT)})
    assert "Pipelines</a>" in site.get("/").text
    assert "<h1>first</h1>" in site.get("/pipeline").text
    page = site.get("/pipeline", name="second").text
    for expected in ("<h1>second</h1>", "/pipeline?name=first", "/submit?pipeline=second"):
        assert expected in page
    assert SCRIPT not in page
    form = form_of(site.get("/submit", pipeline="second").text, "submit") | {"input": '{"n": 3}'}
    assert site.post("/submit", form | {"pipeline": "first"}).status == 403
    assert (site.post("/submit", form).status, names) == (303, ["second"])
    for path in ("/pipeline", "/steps.svg"):
        assert site.get(path, name="third").status == 404
    assert site.get("/submit", pipeline="third").status == 404


def test_a_wrong_input(store: SQLiteStore, site: Site) -> None:
    """Errors of the input stand by field on the form, which keeps what was entered; nothing is submitted."""
    form = form_of(site.get("/submit").text, "submit")
    for value, expected in (
        ('{"n": "x", "text": 5}', "n: Input should be a valid integer"),
        ('{"n": "x", "text": 5}', "text: Input should be a valid string"),
        ("{", "Invalid JSON"),
        ("", "Invalid JSON"),
    ):
        answer = site.post("/submit", form | {"input": value})
        shown = " ".join(html.unescape(re.sub(r"</?\w[^>]*>", "", answer.text)).split())
        assert (answer.status, expected in shown) == (422, True), (value, shown)
        assert form_of(answer.text, "submit")["key"] == form["key"]
        assert html.escape(value, quote=True).replace("&quot;", "&#34;") in answer.text
    assert queued(store) == []


class Order(BaseModel):
    amount: int = Field(alias="sum")


def test_an_input_has_names_or_aliases(store: SQLiteStore, serve: Any) -> None:
    """The form takes fields by name or by alias, as the command line does; its own example is accepted."""
    taken: list[Any] = []

    async def submit(state: Any, run_id: str) -> None:
        taken.append(state.amount)

    site: Site = serve(store, pipeline="flows", submission=Submission(Order, submit))
    page = site.get("/submit").text
    example = html.unescape(re.search(r"<textarea[^>]*>([^<]*)", page)[1])
    form = form_of(page, "submit")
    for text in (example, '{"amount": 3}', '{"sum": 4}'):
        assert site.post("/submit", form | {"input": text}).status == 303, text
    assert taken[1:] == [3, 4]


def test_who_may_submit(store: SQLiteStore, serve: Any, site: Site) -> None:
    """Without a pipeline there is no form; a form needs the key of this server."""
    without: Site = serve(store)
    assert without.get("/submit").status == 404
    assert "/submit" not in without.get("/").text
    submit(store, "one", delay=LATER)
    for key in ("", "x", keys(site, "one")["delete"], keys(site, "one")["cancel"]):
        assert site.post("/submit", {"key": key, "input": "{}"}).status == 403
    assert queued(store) == ["one"]
