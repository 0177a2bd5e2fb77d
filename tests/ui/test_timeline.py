"""The timeline of a run's page: its axis, bars, waits, cells, and what runs now."""

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import pytest
from tests.kit import failing_with
from tests.ui import scenes
from tests.ui.conftest import GOOD, Site, make_runs, node
from tests.ui.test_pages import rows

from stroma import FailurePolicy, Pipeline, SQLiteStore, Suspend, current_node
from stroma.trace.story import Bar, InProgress, Story
from stroma.trace.timeline import Timeline, axis_of
from stroma.ui.components import Column, columns_chart


def draw(
    bars: list[Bar], waits: Sequence[Bar] = (), resumes: Any = (), first_ns: int = 0, **settings: Any
) -> str:
    story = Story("r", "", "RUNNING", bars, 0, 0.0, waits=waits, resumes=resumes, first_ns=first_ns)
    return str(Timeline(story, link=lambda bar: f"/attempt?at={bar.at}", **settings).draw())


def test_a_wait_in_which_the_run_was_continued() -> None:
    """A gap with a stretch after which the run was continued is not called a wait after the failure."""
    asking = Bar("ask", "0", 1, 0, 10, "failure", "RECOVERABLE", "rate_limit", is_committed=False)
    bars = [asking, Bar("ask", "0", 2, 5000, 10, "success")]
    assert "waited 4.99 s after RECOVERABLE (rate_limit) in attempt 1" in draw(bars)
    drawn = draw(bars, resumes=[(200.0, 5000.0, "its process stopped or died")])
    assert "4.99 s until attempt 2; the run was continued in between" in drawn
    assert "after RECOVERABLE" not in drawn


def test_the_time_of_a_flow_is_that_of_all_its_processes() -> None:
    """The row of a flow counts from its first call on, also if an earlier process made that."""
    bars = [Bar("agent", "0", 1, 10_000, 170, "success"), Bar("ask", "0.ask#0", 1, 0, 400, "success")]
    assert '<span class="fig"><span>10.2 s</span>' in draw(bars)


def test_figures_of_the_axis_have_no_exponent() -> None:
    """Small amounts are written in full."""
    drawn = columns_chart([[Column(0.00005, "run", "x")]], ["a"], "cost", unit="$")
    assert ">$0.00005<" in drawn


@pytest.mark.parametrize("end", [0.4, 3, 99, 250, 1001, 59_000, 61_000, 3_700_000, 90_000_000, 4e9, 4e11])
def test_the_axis_is_round(end: float) -> None:
    """The axis has 4 to 10 equal steps of round milliseconds, and wastes at most a quarter of its width."""
    start, step, count = axis_of(0.0, end)
    assert (start, 4 <= count <= 10) == (0.0, True)
    assert end <= step * count + 1e-6
    if end > 4:
        assert step * count <= 1.34 * end


def test_places_on_the_axis() -> None:
    """Bars stand where the axis says, and a wait says after which failure it came."""
    failed = Bar("a", "0", 1, 0, 100, "failure", "RECOVERABLE", "rate_limit")
    bars = [failed, Bar("a", "0", 2, 300, 100, "success")]
    text = draw(bars)
    ticks = [("0", "0"), ("25", "100 ms"), ("50", "200 ms"), ("75", "300 ms")]
    assert re.findall(r'<text x="([\d.]+)%"[^>]*>([^<]*)<', text)[::2] == ticks
    drawn = [("wait", "25.00", "50.00"), ("failure", "0.00", "25.00"), ("success", "75.00", "25.00")]
    assert re.findall(r'<rect class="b-(\w+)" x="([\d.]+)%" y="\d+" width="([\d.]+)%"', text) == drawn
    assert "waited 0.20 s after RECOVERABLE (rate_limit) in attempt 1" in text
    zoomed = draw(bars, window=(300.0, 400.0))
    assert re.findall(r'<rect class="b-(\w+)"', zoomed) == ["success"]


def test_many_children_are_cells() -> None:
    """A map of many items is a strip with a cell each by outcome; only final failures have a row."""
    bars = [Bar("map", "0", 1, 0, 500, "success")]
    for item in range(200):
        place = f"0.{item}"
        if item in (3, 4):
            bars.append(Bar("page", place, 1, item, 1, "failure", "RECOVERABLE"))
        if item == 9:
            continue  # No attempt of it has ended.
        bars.append(Bar("page", place, 2, item + 2, 1, "failure" if item in (4, 7) else "success"))
    text = draw(bars, attempt_prefix="/attempt?id=r")
    cells = re.findall(r'data-cells="(\w+)"', text)[0]
    assert (len(cells), cells[:10]) == (200, "gggrbggbgx")
    assert "200 items: 197 ok, 1 retried, 2 failed, 1 without an attempt" in text
    assert text.count('<div class="row">') == 2
    assert 'data-prefix="0."' in text
    assert len(text) < 12_000


def test_items_with_nodes_inside_are_cells() -> None:
    """An item of several nodes is one cell: retried if a node in it was; its map has the cost of all."""
    bars = [Bar("map_over(pages, [read, rate])", "0", 1, 0, 500, "success")]
    for item in range(20):
        outcome = "failure" if item == 7 else "success"
        bars.append(Bar("[read, rate]", f"0.{item}", 1, item, 4, outcome))
        if item == 3:
            bars.append(Bar("read", f"0.{item}.0", 1, item, 1, "failure", "RECOVERABLE"))
        bars.append(Bar("read", f"0.{item}.0", 2, item + 2, 1, "success", tokens=10, cost_usd=0.01))
        bars.append(Bar("rate", f"0.{item}.1", 1, item + 3, 1, "success", tokens=10, cost_usd=0.02))
    text = draw(bars)
    assert re.findall(r'data-cells="(\w+)"', text) == ["gggrgggbgggggggggggg"]
    assert "20 items: 19 ok, 1 retried, 1 failed" in text
    assert "<span>$0.600000</span>" in text
    # The map, its one failed item and the two nodes inside that.
    assert text.count('<span class="fig">') == 5, text


def test_the_cost_of_a_flow_counts_each_call_once() -> None:
    """The line of a flow has the cost of the calls inside it, also of those that are folded."""
    bars = [Bar("loop", "0", 1, 0, 20, "success")]
    bars += [
        Bar("judge", f"0.judge#{call}", 1, call, 1, "success", tokens=5, cost_usd=0.01) for call in range(2)
    ]
    text = draw(bars)
    costs = re.findall(r"<span>(\$[\d.]+)</span>", text)
    assert costs == ["$0.020000", "$0.020000", "$0.010000", "$0.010000"]


def test_ten_thousand_items_are_one_strip() -> None:
    """A map of 10,000 items takes a few bytes for each and a bar of stretches; ten failed ones have rows."""
    bars = [Bar("map", "0", 1, 0, 10_000, "success")]
    bars += [
        Bar("page", f"0.{item}", 1, item, 1, "failure" if item % 1000 == 5 else "success")
        for item in range(10_000)
    ]
    text = draw(bars)
    assert len(text) < 220_000
    assert text.count('<div class="row">') == 10
    assert "10,000 items: 9,990 ok, 0 retried, 10 failed" in text
    assert "more that failed" not in text
    bars[1:] = [
        Bar("page", f"0.{item}", 1, item, 1, "failure" if item % 100 == 5 else "success")
        for item in range(10_000)
    ]
    text = draw(bars)
    assert text.count('<div class="row">') == 10
    assert "and 90 more that failed" in text


def test_loops_of_flows_are_cells_with_places() -> None:
    """Calls of a loop are cells that know their places, which are no numbers."""
    bars = [Bar("judge", f"0.judge#{call}@ab", 1, call, 1, "success") for call in range(20)]
    text = draw(bars)
    assert re.findall(r'data-places="([^"]*)"', text)[0].split()[:2] == ["0.judge#0@ab", "0.judge#1@ab"]


def test_what_runs_now_grows() -> None:
    """A run in progress has a growing bar since its last record, a line for now, and room to its right."""
    bars = [Bar("a", "0", 1, 0, 100, "success")]
    text = draw(bars, now_ms=1100.0, first_ns=5_000_000_000, progress=InProgress("1", "next", 100.0))
    span = re.findall(r'data-began="5000" data-span="(\d+)"', text)
    assert float(span[0]) > 1200
    assert re.search(r'<span class="name run" title="next"><span class="dim mono">1</span> next</span>', text)
    assert '<span data-since="5100">1.00 s</span>' in text
    assert text.count("b-running") == 1
    assert '<div class="now"' in text
    assert "b-running" not in draw(bars)


def test_a_failure_that_is_tried_again_is_no_cause(store: SQLiteStore, serve: Any) -> None:
    """In a running run, a failed attempt makes no cause on page or list; the node runs since it ended."""
    site: Site = serve(store)
    texts: list[str] = []

    async def fails_once(state: Any) -> Any:
        if current_node().attempt == 1:
            raise TimeoutError("slow")
        for path in ("/run?id=x", "/"):
            texts.append(await asyncio.to_thread(lambda at=path: site.ask("GET", at).text))
        return {"n": 1}

    quick = FailurePolicy(max_retries=1, backoff_seconds=0.0, jitter=False)
    make_runs(store, ("x", Pipeline("p", [node("n", fails_once)])), policy_map={"RECOVERABLE": quick})
    page, runs = texts
    assert 'class="cause"' not in page
    assert page.count("b-running") == 1
    assert 'data-first="' not in page
    assert rows(runs)[0][3] == ""
    assert rows(runs)[0][0] == "RUNNING"


def test_what_a_run_waits_for_is_hatched(store: SQLiteStore, serve: Any) -> None:
    """A suspended node has a hatched bar that says what it waits for."""
    make_runs(
        store, ("x", Pipeline("p", [GOOD.nodes[0], node("asks", failing_with(Suspend, "may it be billed?"))]))
    )
    site: Site = serve(store)
    text = site.get("/run", id="x").text
    assert re.findall(r'<rect class="b-open"[^>]*><title>([^<]*)<', text) == [
        "suspended: waits for an answer"
    ]


def test_totals_against_the_budget(store: SQLiteStore, serve: Any) -> None:
    """The cost is shown against the pipeline's budget, or one set by request; waste has its bar."""
    make_runs(store, ("x", GOOD))
    site: Site = serve(store, pipeline="flows", budget={"max_cost_usd": 0.0005})
    text = site.get("/run", id="x").text
    cost = store.get_run("x").cost_usd  # type: ignore[union-attr]
    assert f"{100 * cost / 0.0005:.0f} % of the budget of $0.000500" in text
    assert "of the budget" not in serve(store).get("/run", id="x").text


def test_a_map_of_items_on_its_page(store: SQLiteStore, serve: Any) -> None:
    """The page of a map of 300 items is short: cells, the rows of items that failed, and a folded table."""
    asyncio.run(scenes.make_map(store, 300, "map"))
    site: Site = serve(store)
    text = site.get("/run", id="map").text
    assert text.count('class="cells"') == 1
    assert '<details class="plain"><summary>' in text
    gantt = text[text.index('<div class="gantt') : text.index("</svg></div>", text.index('class="cells"'))]
    assert gantt.count('<div class="row">') < 15
    at = re.findall(r'data-attempt="([^"]*)" data-prefix="([^"]*)"', text)[0]
    assert site.ask("GET", f"{at[0]}&at={at[1]}17").status == 200
