"""The field of a run's page that sends a message to it."""

import asyncio
from typing import Any

from tests.kit import NEVER, Num, node, same
from tests.ui.conftest import GOOD, Site, make_runs
from tests.ui.test_actions import form_of

from stroma import Flow, SQLiteStore, StromaRunner, stroma_flow

step = node("judge", same)


@stroma_flow("chat", input=Num, output=Num)
async def chat(flow: Flow, state: Num) -> Num:
    await flow.step(step, state)
    first = await flow.receive(Num, topic="<b>")
    return Num(n=first.n + (await flow.receive(Num)).n)


def advance(store: SQLiteStore, run_id: str) -> Any:
    runner = StromaRunner.quick(store=store, run_id=run_id, resume=True, policy_map=NEVER)
    return asyncio.run(runner.run(chat, Num()))


def test_a_message_is_sent_from_the_page(store: SQLiteStore, serve: Any) -> None:
    """The page says what a run waits for, and its form sends a message, once, with the rules of all forms."""
    advance(store, "r")
    advance(store, "s")
    site: Site = serve(store)
    page = site.get("/run", id="r").text
    assert "Waits for a message on <b>&lt;b&gt;</b>" in page
    assert 'name="topic" value="&lt;b&gt;"' in page
    assert ">waiting</span>" in page
    sent = {**form_of(page, "send"), "message": '{"n": 1}', "topic": "<b>"}
    assert site.post("/send", {**sent, "key": "x"}).status == 403
    assert site.post("/send", {**sent, "id": "s"}).status == 403
    assert site.post("/send", sent, origin="http://other").status == 403
    for wrong in ("{", "", "[" * 30_000, "NaN"):
        assert site.post("/send", {**sent, "message": wrong}).status == 422, wrong
    assert site.post("/send", {**sent, "topic": "\0"}).status == 422
    assert site.ask("GET", "/send").status == 405
    assert store.get_run("r").due_ms is None
    for _ in range(2):  # The second one is the same form.
        answer = site.post("/send", sent)
        assert (answer.status, answer.headers["location"]) == (303, "/run?id=r")
    assert advance(store, "r").suspended == ["waiting for a message"]
    page = site.get("/run", id="r").text
    assert "Waits for a message</p>" in page
    assert ">received</span>" in page
    sent = {**form_of(page, "send"), "message": '{"n": 2}', "topic": ""}
    assert site.post("/send", sent).status == 303
    assert advance(store, "r").output == Num(n=3)
    assert site.post("/send", {**sent, "message": '{"n": 5}'}).status == 409
    assert 'action="/send"' not in site.get("/run", id="r").text


def test_a_run_that_takes_no_message(store: SQLiteStore, serve: Any) -> None:
    """The page of a list of nodes that has called some has no field for a message."""
    make_runs(store, ("x", GOOD))
    site: Site = serve(store)
    assert 'action="/send"' not in site.get("/run", id="x").text
