"""Queued runs on the pages, and the form that submits a run."""

import asyncio
import html
import re
import time
from typing import Any

import pytest
from tests.ui.conftest import BAD, GOOD, SCRIPT, Site, State, make_runs
from tests.ui.scenes import lineage
from tests.ui.test_actions import form_of
from tests.ui.test_security import keys

from stroma import Pipeline, SQLiteStore, StromaRunner
from stroma.checkpoint.records import RunQuery
from stroma.ui.settings import Served, Submission

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
    for expected in (
        "QUEUED",
        "Submitted 2",
        "Due 2",
        "Priority -4",
        f"Key {SCRIPT[:30]}",
        "Expires 2",
    ):
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


def test_who_may_submit(store: SQLiteStore, serve: Any, site: Site) -> None:
    """Without a pipeline there is no form; a form needs the key of this server."""
    without: Site = serve(store)
    assert without.get("/submit").status == 404
    assert "/submit" not in without.get("/").text
    submit(store, "one", delay=LATER)
    for key in ("", "x", keys(site, "one")["delete"], keys(site, "one")["cancel"]):
        assert site.post("/submit", {"key": key, "input": "{}"}).status == 403
    assert queued(store) == ["one"]
