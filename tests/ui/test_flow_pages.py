"""Runs of flows in the web interface."""

import asyncio
import re
import time
from typing import Any
from xml.etree import ElementTree

from tests.kit import NEVER, Num, node, same
from tests.ui.conftest import Site

from stroma import Flow, SQLiteStore, StromaRunner, stroma_flow
from stroma.contracts.checks.lineage import Lineage
from stroma.ui.pages import figures_of

step = node("judge", same)


@stroma_flow("letter", input=Num, output=Num)
async def letter(flow: Flow, state: Num) -> Num:
    for n in range(3):
        await flow.step(step, Num(n=n))
    await flow.sleep(seconds=0.01)
    await flow.wait_for(Num, reason="Send <it>?")
    return state


def test_the_page_of_a_flow(store: SQLiteStore, serve: Any) -> None:
    """Steps of a flow are shown at once, repeated calls on a click, waits as what they are, not as causes."""
    runner = StromaRunner.quick(store=store, run_id="r", policy_map=NEVER)
    asyncio.run(runner.run(letter, Num()))
    site: Site = serve(store)
    page = site.get("/run", id="r").text
    lines = re.findall(r'<span class="dim mono">([^<]*)</span> (.*?)</span><svg', page)
    assert [(place, name.partition(" until <time data-ms=")[0]) for place, name in lines] == [
        ("0", "letter"),
        ("#0", "judge x3"),
        ("#0", "judge"),
        ("#1", "judge"),
        ("#2", "judge"),
        ("#0", "sleep"),
        ("#3", "question: Send &lt;it&gt;?"),
    ]
    assert page.count('<details open><summary class="row">') == 1  # The flow.
    assert page.count('<details><summary class="row">') == 1  # The loop.
    assert "waiting for an answer" in page
    assert 'class="cause"' not in page


@stroma_flow("asks", input=Num, output=Num)
async def asks(flow: Flow, state: Num) -> Num:
    await flow.wait_for(Num, reason="with a limit?", timeout=3600)
    await flow.wait_for(Num, reason="without?")
    return state


def test_answered_questions_of_a_flow_have_one_line(store: SQLiteStore, serve: Any) -> None:
    """The page of a run shows until when it waits; an answered question is one line, timeout or not."""
    runner = StromaRunner.quick(store=store, run_id="r", policy_map=NEVER)
    asyncio.run(runner.run(asks, Num()))
    site: Site = serve(store)
    for also in (1, 0):
        page = site.get("/run", id="r").text
        assert len(re.findall(r"<b>Due</b> .*20\d\d-.* at the latest, even if nothing arrives", page)) == also
        asyncio.run(runner.signal("r", Num(n=7)))
        asyncio.run(runner.run(asks, Num(), resume=True))
    page = site.get("/run", id="r").text
    names = re.findall(r'<span class="dim mono">[^<]*</span> ([^<]*)</span><svg', page)
    assert names == ["asks", "question: with a limit?", "question: without?"]
    assert "so far" not in page
    assert page.count('<span class="all">answered</span>') == 2


def test_what_continued_a_run_is_named(store: SQLiteStore, serve: Any) -> None:
    """The timeline shows when a run was continued and what it waited for; queueing shifts nothing."""
    runner = StromaRunner.quick(store=store, policy_map=NEVER)
    asyncio.run(runner.submit(letter, Num(), run_id="r"))
    time.sleep(0.3)
    asyncio.run(runner.drive("r", pipelines=[letter]))
    site: Site = serve(store)
    page = site.get("/run", id="r").text
    assert "continued" not in page
    (first,) = re.findall(r'<rect class="b-wait" x="([\d.]+)%"[^>]*><title>question', page)
    assert float(first) > max(map(float, re.findall(r'b-success" x="([\d.]+)%"', page)))
    asyncio.run(runner.signal("r", Num(n=7)))
    asyncio.run(runner.drive("r", pipelines=[letter]))
    page = site.get("/run", id="r").text
    assert re.findall(r"<title>(continued) after [^<]*: question: Send &lt;it&gt;\?", page) == ["continued"]
    assert "another process" not in page


def test_the_steps_of_the_latest_runs(store: SQLiteStore, serve: Any) -> None:
    """The page of a flow has an image of the steps that its runs took; that of a list has none."""
    runner = StromaRunner.quick(store=store, policy_map=NEVER)
    for _ in range(2):
        asyncio.run(runner.run(letter, Num()))
    site: Site = serve(store, pipeline="letter", lineage=Lineage("letter", (), ()))
    assert "/steps.svg" in site.get("/pipeline").text
    image = site.get("/steps.svg")
    assert image.headers["content-type"] == "image/svg+xml"
    assert "6 calls" in {text.text for text in ElementTree.fromstring(image.text).iter() if text.text}

    asyncio.run(StromaRunner.quick(store=store, pipeline="list").run([step], Num()))
    site = serve(store, pipeline="list", lineage=Lineage("letter", (), ()))
    assert "/steps.svg" not in site.get("/pipeline").text


def test_the_duration_of_a_flow(store: SQLiteStore) -> None:
    """The percentiles of a flow cover all processes of a run, not the last one alone."""
    runner = StromaRunner.quick(store=store, run_id="r")

    async def slow(state: Num) -> Num:
        await asyncio.sleep(0.3)
        return state

    @runner.flow("slowly", input=Num, output=Num)
    async def slowly(flow: Flow, state: Num) -> Num:
        await flow.step(node("slow", slow), state)
        return await flow.wait_for(Num, reason="well?")

    async def run() -> None:
        await runner.run(slowly, Num())
        await runner.signal("r", Num())
        assert (await runner.resume(slowly, "r")).ok

    asyncio.run(run())
    looked_at, (flow, step_in_it) = figures_of(store, "slowly")
    assert (looked_at, flow.path, step_in_it.path) == (1, ("slowly",), ("slow",))
    assert flow.quantile(0.5) >= step_in_it.quantile(0.5) >= 0.3
