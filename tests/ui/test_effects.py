"""An effect whose outcome is unknown, on the page of its run."""

import asyncio
import html
import re
from typing import Any

from pydantic import BaseModel
from tests.kit import Receipt

from stroma import Pipeline, RunStatus, SQLiteStore, StromaRunner
from stroma.checkpoint.identity import idempotency_key


class Bill(BaseModel):
    cents: int = 100


def test_a_page_states_how_a_call_ended(store: SQLiteStore, serve: Any) -> None:
    """The page of a run shows the unknown call and its key; its buttons store the output, validated, or that
    it did not happen."""
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
        assert f"<code>{idempotency_key(run_id, 1, 0, '')}</code>" in page
        form = re.search(r'<form method="post" action="/effect">(.*?)</form>', page)
        assert form is not None
        fields = {
            name: html.unescape(value)
            for name, value in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form[1])
        }
        assert site.post("/effect", {**fields, "key": "x", "happened": "no"}).status == 403
        for output in ("{", "{}", '{"number": "x"}'):
            answer = site.post("/effect", {**fields, "happened": "yes", "output": output})
            assert answer.status == 422
        stale = site.post("/effect", {**fields, "question": "0:2", "happened": "no"})
        assert (stale.status, store.waiting(run_id)[0].payload) == (409, None)
        stated = {**fields, "happened": happened, "output": '{"number": 7}'}
        assert site.post("/effect", stated).status == 303
        assert "nobody knows" not in site.get("/run", id=run_id).text
        assert site.post("/effect", {**stated, "happened": "yes", "output": '{"number": 8}'}).status == 409
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
    call = r"<b>Effect in flight</b> &lt;charge&gt; \(at 0\): call 1 since [^,]+, idempotency key \w{32}<"
    assert re.search(call, pages[0])
    assert re.search(r"<b>Owner</b> process \d+ on [^,]+, lease until <time", pages[0])
    assert "in flight" not in site.get("/run", id="x").text
