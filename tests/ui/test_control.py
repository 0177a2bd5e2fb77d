"""Buttons of a run's page: pause, take the pause back, cancel, change the budget."""

import asyncio
import threading
import time
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from tests.kit import returning
from tests.store_suite.helpers import due_runs
from tests.store_suite.journal import State
from tests.ui.conftest import BAD, GOOD, Site, make_runs, node
from tests.ui.test_actions import ASKS, Answer, form_of, json_form_of
from tests.ui.test_security import keys

from stroma import (
    CheckpointNotFound,
    ExecutionBudget,
    Pipeline,
    RequestRefused,
    SQLiteStore,
    StoreError,
    StromaRunner,
    current_node,
    stroma_node,
)
from stroma.ui.rendering import Renderer, SharedPages


def test_a_refused_form_leads_back(store: SQLiteStore, serve: Any) -> None:
    """The page of a form that is refused leads back to its run."""
    make_runs(store, ("x", ASKS))
    site: Site = serve(store)
    form = form_of(site.get("/run", id="x").text, "budget")
    refused = site.post("/budget", {**form, "cost_usd": "much"})
    assert (refused.status, 'href="/run?id=x">Back to the run' in refused.text) == (422, True)


def test_a_limit_behind_another_failure(store: SQLiteStore, serve: Any) -> None:
    """The pages name the limit that stopped a run whose last output broke its contract."""
    budget = ExecutionBudget(max_tokens_total=150)
    runner = StromaRunner.quick(store=store, budget=budget, contract_retries={"a": 5})
    asyncio.run(runner.run([node("a", returning(({"n": "x"}, 100, 0, "gpt-4o-mini")))], State(), run_id="x"))
    site: Site = serve(store)
    for path in ("/", "/run?id=x"):
        assert "BudgetExceeded: budget exceeded: max_tokens_total limit 150" in site.ask("GET", path).text
    assert "Contract violation" in site.get("/run", id="x").text


@pytest.fixture
def living(store: SQLiteStore) -> Any:
    """A run in another thread whose first node waits until it is let go: (let go, result of the run)."""
    go, reached = threading.Event(), threading.Event()
    results: list[Any] = []

    async def work(state: State) -> Any:
        reached.set()
        await asyncio.to_thread(go.wait, 60)
        current_node().report_usage(input_tokens=10)
        return state

    node: Any = stroma_node("n", input=State, output=State)(work)
    runner = StromaRunner.quick(store=store, budget=ExecutionBudget(max_tokens_total=5))

    def run() -> None:
        results.append(asyncio.run(runner.run(Pipeline("lives", [node, node]), State(), run_id="lives")))

    thread = threading.Thread(target=run)
    thread.start()
    assert reached.wait(30)

    def end() -> Any:
        go.set()
        thread.join(60)
        return results[0]

    yield end
    end()


def test_a_page_pauses_a_living_run(store: SQLiteStore, serve: Any, living: Any) -> None:
    """Buttons need the key of their action and run; the page says that the run is paused, and the undo."""
    site: Site = serve(store)
    found = keys(site, "lives")
    assert set(found) == {"send", "pause", "budget", "cancel"}
    for action, key in found.items():
        others = [*(other for name, other in found.items() if name != action), "", "x", key[:-1]]
        for wrong in others:
            assert site.post(f"/{action}", {"id": "lives", "key": wrong, "tokens": "9"}).status == 403
        form = {"id": "lives", "key": key, "tokens": "9"}
        assert site.post(f"/{action}", form, content_type="text/plain").status == 415
        assert site.post(f"/{action}", form, origin="http://evil.example").status == 403
        assert site.get(f"/{action}", **form).status == 405
    for limits in ({}, {"tokens": "-1"}, {"tokens": "1.5"}, {"cost_usd": "nan"}, {"cost_usd": "<b>"}):
        answer = site.post("/budget", {"id": "lives", "key": found["budget"], **limits})
        assert answer.status == 422, limits
        assert "<b>" not in answer.text
    answer = site.post("/budget", {"id": "lives", "key": found["budget"], "tokens": "100", "cost_usd": ""})
    assert (answer.status, answer.headers["location"]) == (303, "/run?id=lives")
    answer = site.post("/pause", {"id": "lives", "key": found["pause"]})
    assert (answer.status, answer.headers["location"]) == (303, "/run?id=lives")
    result = living()
    assert (result.status, result.suspended) == ("SUSPENDED", ["paused"])
    page = site.get("/run", id="lives").text
    assert "<b>Paused</b> no attempt begins until somebody resumes it" in page
    found = keys(site, "lives")
    assert {"unpause", "budget", "cancel"} <= set(found)
    assert site.post("/unpause", {"id": "lives", "key": found["unpause"]}).status == 303
    assert asyncio.run(due_runs(store, 1 << 60, "lives")) == ["lives"]
    assert site.post("/unpause", {"id": "lives", "key": found["unpause"]}).status == 409
    assert site.post("/cancel", {"id": "lives", "key": found["cancel"]}).status == 303
    assert store.get_run("lives").status == "CANCELLED"
    assert not {"pause", "unpause", "budget", "cancel"} & set(keys(site, "lives"))
    assert site.post("/cancel", {"id": "lives", "key": found["cancel"]}).status == 409


@pytest.mark.parametrize(
    ("error", "status"), [(RequestRefused, 409), (CheckpointNotFound, 404), (StoreError, 503)]
)
def test_the_class_of_an_error_is_the_status(
    error: type[StoreError], status: int, store: SQLiteStore, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An action answers 409 if the run refuses it, 404 if the run is gone, and 503 if the store fails."""

    async def fail(*_arguments: Any) -> None:
        raise error("no")

    make_runs(store, ("held", ASKS))
    site: Site = serve(store, find_schema=lambda one: Answer)
    key, form = keys(site, "held")["cancel"], json_form_of(site.get("/run", id="held").text)
    monkeypatch.setattr("stroma.runner.stored_runs.request", fail)
    monkeypatch.setattr(store, "signal", fail)
    assert site.post("/cancel", {"id": "held", "key": key}).status == status
    assert site.post("/approve", {**form, "answer": '{"approved": true, "note": "yes"}'}).status == status


def test_open_pages_share_a_rendering(
    store: SQLiteStore, serve: Any, living: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open pages of a run or the list that ask for one event are rendered once for all; others always."""
    rendered: list[str] = []
    page = Renderer.page

    def counted(self: Renderer, template: str, *args: Any, **values: Any) -> Any:
        rendered.append(template)
        return page(self, template, *args, **values)

    monkeypatch.setattr(Renderer, "page", counted)
    site: Site = serve(store)
    for path, template in (("/run?id=lives", "run.html"), ("/", "runs.html")):
        rendered.clear()
        answers = [site.ask("GET", path, x_stroma_state="a") for _ in range(50)]
        assert rendered == [template]
        assert len({answer.body for answer in answers}) == 1
        site.ask("GET", path, x_stroma_state="b")
        assert rendered == [template] * 2
    form = {"id": "lives", "key": keys(site, "lives")["budget"], "tokens": "100"}
    assert site.post("/budget", form).status == 303
    assert " of 100<" in site.get("/run", id="lives").text
    living()


def test_events_are_as_seldom_as_they_cost() -> None:
    """The more viewers a page has and the slower it renders, the longer is the time between two events."""
    shared = SharedPages()
    request = Request({"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []})

    def slow() -> Response:
        began = time.thread_time()
        while time.thread_time() - began < 0.02:
            pass
        return Response("page")

    shared.get(request, "slow", slow)
    assert shared.interval("other", 1) < 0.1
    assert 25 * 0.02 <= shared.interval("slow", 1) < shared.interval("slow", 50)
    assert shared.interval("other", 50) >= 2


def test_no_buttons_for_runs_that_have_ended(store: SQLiteStore, serve: Any) -> None:
    """A run that has completed or failed can neither be paused nor cancelled."""
    make_runs(store, ("good", GOOD), ("bad", BAD))
    site: Site = serve(store)
    for run_id in ("good", "bad"):
        assert not {"pause", "unpause", "budget", "cancel"} & set(keys(site, run_id))
