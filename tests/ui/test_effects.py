"""An effect whose outcome is unknown, on the page of its run."""

import asyncio
import html
import re
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import Receipt
from tests.ui.test_actions import form_of, json_form_of

from stroma import NotDone, Pipeline, RunStatus, SQLiteStore, StromaRunner, parallel
from stroma.checkpoint.identity import idempotency_key
from stroma.testing import crash_at


class Bill(BaseModel):
    cents: int = 100


def test_a_page_states_how_a_call_ended(store: SQLiteStore, serve: Any) -> None:
    """The page of a run shows the unknown call and its key. Its buttons ask for confirmation, then store the
    output, validated, or that it did not happen; the page shows what was stated."""
    calls: list[int] = []
    runner = StromaRunner.quick(store=store)

    @runner.node("charge", input=Bill, output=Receipt, effect=True)
    async def charge(bill: Bill) -> Any:
        calls.append(bill.cents)
        raise TimeoutError("<no answer>")

    pipeline = Pipeline("shop", [charge])
    for run_id in ("yes", "no"):
        asyncio.run(runner.run(pipeline, Bill(), run_id=run_id))
    site = serve(store)
    for run_id, happened in (("yes", "yes"), ("no", "no")):
        page = site.get("/run", id=run_id).text
        assert "nobody knows if call 1 happened (TimeoutError: &lt;no answer&gt;)" in page
        assert f"its idempotency key is {idempotency_key(run_id, 1, 0, '')}<" in page
        forms = re.findall(r'<form method="post" action="/approve">.*?</form>', page, re.DOTALL)
        assert "State that call 1 of charge happened?" in page
        (no,) = [form for form in forms if 'name="happened" value="no"' in form]
        assert "State that call 1 of charge did not happen? When the run continues" in no
        denied, fields = form_of(no, "approve"), form_of(page, "approve")
        assert denied == {**json_form_of(page), "happened": "no"}
        assert site.post("/approve", {**denied, "key": "x"}).status == 403
        for output in ("", "x"):
            wrong = site.post("/approve", {**fields, "field:number": output})
            assert (wrong.status, f'value="{output}"' in wrong.text) == (422, True)
        for output in ("{", "{}", '{"number": "x"}'):
            wrong = site.post("/approve", {**json_form_of(page), "answer": output})
            assert (wrong.status, output in html.unescape(wrong.text)) == (422, True)
            assert f'href="/run?id={run_id}"' in wrong.text
        stale = site.post("/approve", {**denied, "question": "0:2"})
        assert (stale.status, store.waiting(run_id)[0].payload) == (409, None)
        stated = denied if happened == "no" else {**fields, "field:number": "7"}
        assert site.post("/approve", stated).status == 303
        page = site.get("/run", id=run_id).text
        assert "nobody knows" not in page
        text = "did not happen" if happened == "no" else 'happened: {"number": 7}'
        assert f"charge: a person stated that call 1 {text}" in html.unescape(page)
        assert site.post("/approve", {**fields, "field:number": "8"}).status == 409
    result = asyncio.run(runner.run(pipeline, Bill(), run_id="yes", resume=True))
    assert (result.final_state, len(calls)) == (Receipt(number=7), 2)
    result = asyncio.run(runner.run(pipeline, Bill(), run_id="no", resume=True))
    assert (result.status, len(calls)) == (RunStatus.SUSPENDED, 3)


def test_a_page_shows_the_call_in_flight(store: SQLiteStore, serve: Any) -> None:
    """The page of a run says since when a call of an effect is in flight, and until when the lease lives."""
    site, pages = serve(store), list[str]()
    runner = StromaRunner.quick(store=store)

    @runner.node("<charge>", input=Bill, output=Receipt, effect=True)
    async def charge(bill: Bill) -> Receipt:
        pages.append((await asyncio.to_thread(site.get, "/run", id="x")).text)
        return Receipt(number=1)

    asyncio.run(runner.run(Pipeline("shop", [charge]), Bill(), run_id="x"))
    call = r"<b>In flight</b> &lt;charge&gt; \(at 0\): call 1 since <time[^,]+, idempotency key \w{32}<"
    assert re.search(call, pages[0])
    assert re.search(r"<b>Owner</b> process \d+ on [^,]+, lease until <time", pages[0])
    assert "in flight" not in site.get("/run", id="x").text


@pytest.mark.parametrize("in_group", [False, True])
def test_a_takeover_in_the_midst_of_a_call_is_named(store: SQLiteStore, serve: Any, in_group: bool) -> None:
    """The timeline of a run names the call of an effect that the death of its process has cut off."""
    runner, site = StromaRunner.quick(store=store), serve(store)
    sent = asyncio.Event()

    @runner.node("charge", input=Bill, output=Receipt, effect=True, reconcile=lambda bill, key: NotDone())
    async def charge(bill: Bill) -> Receipt:
        sent.set()
        await asyncio.sleep(0.05)
        return Receipt(number=1)

    @runner.node("log", input=Bill, output=Bill)
    async def log(bill: Bill) -> Bill:
        if in_group:  # It ends in the midst of the call.
            await sent.wait()
        return bill

    nodes = [parallel(log, charge)] if in_group else [log, charge]
    with crash_at("after_node", "charge", **({"branch": "1"} if in_group else {})):
        asyncio.run(runner.run(nodes, Bill(), run_id="x"))
    asyncio.run(runner.run(nodes, Bill(), run_id="x", resume=True))
    page = html.unescape(site.get("/run", id="x").text)
    assert re.findall("<title>continued after [^:]*: ([^<]*)", page) == [
        "its process stopped or died during call 1 of 'charge'"
    ]
