"""What the pages of the web interface say."""

import asyncio
import contextlib
import html
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import BaseModel
from tests.kit import Text, passing, returning
from tests.store_suite.journal import State as Kept
from tests.store_suite.journal import begin, commit, finish
from tests.ui.conftest import BAD, GOOD, Site, State, make_runs, node
from tests.ui.scenes import lineage, make_map
from tests.ui.test_security import attempts_of

from stroma import (
    BudgetExceeded,
    FailurePolicy,
    Pipeline,
    SQLiteStore,
    StromaRunner,
    Usage,
    current_node,
    map_over,
    stroma_node,
)
from stroma.checkpoint import open_store
from stroma.checkpoint.history.run_graph import StepNode
from stroma.telemetry import otel_hooks
from stroma.ui.formatting import to_address


def rows(text: str) -> list[list[str]]:
    """The cells of a page's table as plain text."""
    result = re.findall(r"<tr data-row>(.*?)</tr>", text, re.DOTALL)
    return [
        [
            " ".join(re.sub(r"<[^>]*>", " ", cell).split())
            for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL)
        ]
        for row in result
    ]


def test_runs(site: Site) -> None:
    """Each run has status, pipeline, cause, duration, failed attempts, cost and start, the newest first."""
    bad, good = rows(site.get("/").text)
    assert bad[0] == "FAILED"
    assert bad[1].startswith("bad ")
    assert "nightly" in bad[1]
    assert bad[2] == "flows"
    assert bad[3].startswith(
        "total: contract: ContractViolation: Contract violation for &#39;total&#39; (output): lines.0.price"
    )
    assert re.fullmatch(r"\d\.\d\d s", bad[4])
    assert bad[5] == "2"
    assert re.fullmatch(r"\$0\.000\d{3}", bad[6])
    assert (good[0], good[3], good[5]) == ("COMPLETED", "", "1")


def test_searching(site: Site) -> None:
    """Runs are found by id, text of the error, node, tag, class and status; what matches nothing says so."""

    def run_ids(**request: str) -> list[str]:
        return [row[1].split()[0] for row in rows(site.get("/", **request).text)]

    assert run_ids() == ["bad", "good"]
    assert run_ids(q="goo") == ["good"]
    assert run_ids(q="VALID integer") == ["bad"]
    assert run_ids(q="tag:nightly") == ["bad", "good"]
    assert run_ids(q="tag:other") == []
    assert run_ids(q="node:flaky") == ["bad", "good"]
    assert run_ids(q="node:total class:terminal") == ["bad"]
    assert run_ids(status="failed") == ["bad"]
    assert run_ids(status="COMPLETED") == ["good"]
    assert run_ids(**{"class": "TERMINAL"}) == ["bad"]
    assert run_ids(q="pipeline:flows", status="FAILED") == ["bad"]
    assert "No run matches" in site.get("/", q="nowhere").text


def test_pages_of_runs(store: SQLiteStore, serve: Any) -> None:
    """Older runs follow page by page, each once, though new ones come meanwhile."""
    make_runs(store, *((f"run-{i:03}", Pipeline("p", GOOD.nodes[:1])) for i in range(120)))
    site = serve(store)
    events: list[str] = []
    path = "/"
    while path:
        text = site.ask("GET", path).text
        events += [row[1] for row in rows(text)]
        make_runs(store, (f"new-{len(events)}", Pipeline("p", GOOD.nodes[:1])))
        following = re.search(r'rel="next" href="([^"]*)"', text)
        path = following[1].replace("&amp;", "&") if following else ""
    assert events == [f"run-{i:03}" for i in range(119, -1, -1)]


def test_an_empty_store(tmp_path: Path, serve: Any) -> None:
    """Before the first run the page shows the one command to begin with, and makes no file."""
    path = tmp_path / "none.db"
    with SQLiteStore(path) as store:
        site = serve(store, command=lambda name, run: f"stroma {name} FILE.py:NAME --db none.db")
        answer = site.get("/")
        assert answer.status == 200
        assert re.findall(r'<pre class="command">(.*)</pre>', answer.text) == [
            "stroma run FILE.py:NAME --db none.db"
        ]
        assert not path.exists()
        make_runs(store, ("one", GOOD))
        assert len(rows(site.get("/").text)) == 1


def test_a_failed_run(site: Site) -> None:
    """A failed run's page opens on its cause: class, node, field, cost, command; its bar is marked."""
    text = site.get("/run", id="bad").text
    box = text[text.index('<section class="cause"') :].partition("</section>")[0]
    assert "TERMINAL (contract)" in box
    (linked,) = re.findall(r'<b><a href="([^"]*)">total</a></b>', box)
    assert "<code>lines.0.price</code>" in box
    assert re.search(
        r"Spent</b> \d+ tok, \$0\.000\d+, including 40 tok, \$0\.000\d+ on attempts without output", box
    )
    assert "<b>After a fix, resume with</b> <code>stroma resume bad FILE.py:NAME</code>" in box
    assert text.count('<rect class="b-') == text.count('<rect class="b-success') + 2 + 1
    (marked,) = re.findall(r'<a href="([^"]*)"><title>[^<]*</title><rect class="b-failure b-on"', text)
    assert "at=3" in marked
    assert linked == marked
    # Children of groups are folded away.
    assert re.search(r'<details><summary class="row">.*?parallel\(left, right\)', text, re.DOTALL)
    assert len(rows(text)) == 7


def test_pages_name_the_type_of_an_exception(site: Site) -> None:
    """The list of runs, the page of a run and that of an attempt show a failure as `Type: message`."""
    assert "ContractViolation: Contract violation for" in site.get("/").text
    run = site.get("/run", id="bad").text
    assert '<td data-name="Message" class="cause-cell">TimeoutError: ' in run
    assert "<pre>ContractViolation: Contract violation for" in run
    pages = [site.ask("GET", address).text for address in attempts_of(site)]
    assert (
        sum('<pre class="warn">TimeoutError: ' in page or "<pre>TimeoutError: " in page for page in pages)
        == 1
    )


def test_a_run_that_went_well(site: Site) -> None:
    """A run that completed has no cause box, though an attempt of it failed on the way."""
    text = site.get("/run", id="good").text
    assert '<section class="cause"' not in text
    assert text.count('<rect class="b-failure') == 1
    assert text.count('<rect class="b-wait') == 1


def test_attempts(site: Site) -> None:
    """An attempt has its states, broken field, difference from the one before, usage, key and siblings."""
    pages = [site.ask("GET", address).text for address in attempts_of(site)]
    by_title = {re.findall(r"<title>(.*?) ·", page)[0]: page for page in pages}
    second = by_title["flaky, attempt 2"]
    assert "attempt 1: failure" in second
    assert 'aria-current="page" class="good">attempt 2: success' in second
    changes = second[second.index('<ul class="changes">') :].partition("</ul>")[0]
    assert re.search(r'outcome</span>: <span class="was">(&#34;|&quot;)failure.* → .*success', changes)
    cards = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)<", second))
    assert (cards["Tokens in"], cards["Tokens out"]) == ("10", "5")
    assert "<code>ac206920fefdaa7bba8463ac6a19e7ae</code>" in second
    assert '<span class="key">n</span>: 2' in second
    total = by_title["total, attempt 1"]
    assert "<code>lines.0.price</code>" in total
    assert "<h2>Rejected output</h2>" in total
    first = by_title["flaky, attempt 1"]
    frames = first[first.index("Where it failed") :].partition("</ol>")[0]
    assert re.search(r"conftest\.py:\d+</span> in <b>flaky</b><pre>raise TimeoutError", frames)
    assert "Where it failed" not in second
    child = by_title["left, attempt 1"]
    assert "Input of its group." in child


def test_a_cost_without_tokens(store: SQLiteStore, serve: Any) -> None:
    """An attempt that is priced per call has its cost in its row; one that failed says what it spent."""

    async def draw(state: Any) -> Any:
        current_node().report_usage(Usage(model="dall-e-3", cost_usd=0.04))
        raise ValueError("no image")

    make_runs(store, ("x", Pipeline("p", [node("draw", draw)])))
    site = serve(store)
    row = re.search(r"<tr data-row>.*</tr>", site.get("/run", id="x").text)
    assert 'data-name="Cost">$0.040000<' in row[0]
    address = re.search(r'data-open href="([^"]*)"', row[0])
    assert "Spent without output: 0 tok, $0.040000" in site.ask("GET", html.unescape(address[1])).text


def test_failed_items_are_named(store: SQLiteStore, serve: Any) -> None:
    """The page of a run names its failed items and --retry-failed, and counts each failed call once."""

    class Parts(BaseModel):
        parts: list[str] = ["a", "b"]

    async def fail(part: Text) -> Text:
        raise PermissionError("no")

    work = map_over("parts", stroma_node("fail")(fail), into="out", on_item_failure="collect")
    runner = StromaRunner.quick(store=store, run_id="map")
    result = asyncio.run(runner.run(Pipeline("maps", [work]), Parts()))
    assert (result.status, result.failed_items) == ("COMPLETED", 2)
    site = serve(store)
    page = re.sub(r"<[^>]*>", " ", site.get("/run", id="map").text)
    assert (
        "Failed  2 items, the run continued without them; resume it with --retry-failed to run them again"
        in page
    )
    assert page.count("stroma resume map FILE.py:NAME --retry-failed") == 2
    assert re.search(r"Attempts\s+5\s+4 failed", page)
    assert sum(one.attempts for one in site.store.tally(0, 1000)) == 5


@pytest.mark.parametrize(
    ("error", "option"),
    [
        (f"BudgetExceeded: {BudgetExceeded('cost', 1, 2, 'a')}", " --budget-usd USD"),
        (f"BudgetExceeded: {BudgetExceeded('tokens', 1, 2, 'a')}", " --budget-tokens N"),
        (f"DeadlineExceeded: {BudgetExceeded('latency', 1, 2, 'a')}", ""),
        ("poison: the process died 3 times", " --force"),
        ("ValueError: no", ""),
    ],
)
def test_the_command_of_a_page_has_the_option_that_the_run_needs(
    store: SQLiteStore, serve: Any, error: str, option: str
) -> None:
    """The page of a run offers the resume command with the option without which it would not continue."""

    async def write() -> None:
        await finish(await begin(store, "r"), "FAILED", error)

    asyncio.run(write())
    assert f"stroma resume r FILE.py:NAME{option}<" in serve(store).get("/run", id="r").text


def test_the_field_that_broke_is_marked(store: SQLiteStore, serve: Any) -> None:
    """Input that broke a contract is shown with the field marked that did."""

    class Loose(BaseModel):
        lines: list[dict[str, Any]] = []

    class Strict(BaseModel):
        lines: list[dict[str, int]]

    loose = returning({"lines": [{"price": 1}, {"price": "many"}]})
    strict_node = stroma_node("strict", input=Strict, output=Strict)(passing())
    pipeline = Pipeline("p", [stroma_node("loose", input=Loose, output=Loose)(loose), strict_node])
    asyncio.run(StromaRunner.quick(store=store).run(pipeline, Loose(), run_id="x"))
    site = serve(store)
    page = site.ask("GET", attempts_of(site, "x")[-1]).text
    assert re.findall(r'<li class="broke">(.*?)</li>', page) == [
        '<span class="key">price</span>: &quot;many&quot;'
    ]


def test_a_rejected_output_is_shown(store: SQLiteStore, serve: Any) -> None:
    """An attempt's page shows what broke its contract beside each complaint, also as a file, redacted.

    The page of a run that stopped there shows the values, too.
    """

    class Strict(BaseModel):
        stars: int
        why: str

    rate = returning({"stars": "<b>five", "notes": [1]})
    pipeline = Pipeline("p", [stroma_node("rate", input=State, output=Strict)(rate)])
    asyncio.run(StromaRunner.quick(store=store).run(pipeline, State(), run_id="x"))
    site = serve(store)
    address = attempts_of(site, "x")[0]
    page = site.ask("GET", address).text
    table = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert table == [
        (
            "<code>stars</code>",
            "Input should be a valid integer, unable to parse string as an integer",
            "<code>&quot;&lt;b&gt;five&quot;</code>",
        ),
        (
            "<code>why</code>",
            "Field required",
            "<code>{&quot;stars&quot;: &quot;&lt;b&gt;five&quot;, &quot;notes&quot;: [1]}</code>",
        ),
    ]
    assert re.findall(r'<li class="broke">(.*?)</li>', page) == [
        '<span class="key">stars</span>: &quot;&lt;b&gt;five&quot;'
    ]
    file = f"{address.replace('/attempt', '/payload')}&side=rejected"
    assert json.loads(site.ask("GET", file).body)["value"] == {"stars": "<b>five", "notes": [1]}
    got = "<code>stars</code> got <code>&quot;&lt;b&gt;five&quot;</code>"
    assert got in site.get("/run", id="x").text
    assert got in site.get("/export", id="x", format="html").text
    private = serve(store, redact=lambda state: dict.fromkeys(state, "hidden"))
    assert got.replace("&lt;b&gt;five", "hidden") in private.get("/run", id="x").text
    for text in (private.ask("GET", address).text, private.ask("GET", file).text):
        assert "five" not in text
        assert "hidden" in text
    asyncio.run(StromaRunner.quick(store=store, keep_rejected="no").run(pipeline, State(), run_id="none"))
    address = attempts_of(site, "none")[0]
    assert "Rejected output" not in site.ask("GET", address).text
    assert site.ask("GET", f"{address.replace('/attempt', '/payload')}&side=rejected").status == 404


def test_downloads(site: Site) -> None:
    """States and the run itself are handed out as files."""
    address = attempts_of(site)[0].replace("/attempt", "/payload")
    answer = site.ask("GET", f"{address}&side=output")
    assert json.loads(answer.body)["n"] == 1
    assert answer.headers["content-disposition"] == 'attachment; filename="output-0.json"'
    answer = site.get("/export", id="bad", format="html")
    assert answer.status == 200
    assert answer.headers["content-disposition"].startswith("attachment")
    assert site.ask("GET", "/export?id=bad&format=other").status == 404


def test_idle_time(store: SQLiteStore, serve: Any) -> None:
    """A run that waited long has a link that folds the time without work, and one that unfolds it."""

    async def fails_once(state: Any) -> Any:
        if current_node().attempt == 1:
            raise TimeoutError("slow")
        return {"n": 1}

    waits = FailurePolicy(max_retries=1, backoff_seconds=0.3, jitter=False)
    make_runs(store, ("x", Pipeline("p", [node("n", fails_once)])), policy_map={"RECOVERABLE": waits})
    site = serve(store)
    page = site.get("/run", id="x").text
    assert '<a class="btn small fold-idle" href="/run?id=x&amp;idle=folded">fold idle time</a>' in page
    folded = site.get("/run", id="x", idle="folded").text
    assert '<a class="btn small fold-idle" href="/run?id=x">show idle time</a>' in folded

    def widest(text: str) -> float:
        return max(
            float(width) for width in re.findall(r'<rect class="b-(?!wait)[^>]* width="([\d.]+)%"', text)
        )

    assert widest(folded) > 2 * widest(page)


def test_the_pipeline(store: SQLiteStore, serve: Any) -> None:
    """Under the picture stands how each node did in the last runs: attempts, failure rate, p50 and p95."""
    drawn = lineage(GOOD)
    site = serve(store, pipeline="flows", lineage=drawn)
    assert "It has none in this store" in site.get("/pipeline").text
    make_runs(store, ("good", GOOD), ("bad", BAD), ("other", Pipeline("other", GOOD.nodes)))
    text = site.get("/pipeline").text
    assert "Its last 2 runs" in text
    boxes = re.findall(r'<g class="node [^"]*?(failing|hot|) ?" data-at="([^"]*)">', text)
    assert ("failing", "1") in boxes
    assert ("failing", "0") not in boxes
    assert "4 calls" not in text
    assert "2 calls, 50.0% of 4 attempts failed" in text
    assert re.search(r"p50 \d\.\d\d s, p95 \d\.\d\d s, \$0\.\d{6} a call", text)
    # An edge tells of contracts alone: none is red because the node that it leads to fails.
    assert re.search(r'<path class="link ?" data-from="0" data-to="1"', text)
    assert "link failing" not in text
    for link in re.findall(r'<a (?:data-open )?href="(/\?q=[^"]*)"', text):
        assert "data-row" in site.ask("GET", html.unescape(link)).text, link
    report = rows(text)
    assert [row[:3] for row in report] == [
        ["first", "2", "0.0%"],
        ["flaky", "4", "50.0%"],
        ["parallel(left, right)", "2", "0.0%"],
        ["left", "2", "0.0%"],
        ["right", "2", "0.0%"],
        ["total", "1", "100.0%"],
    ]
    assert all(re.fullmatch(r"\d\.\d\d s", cell) for row in report for cell in row[3:5])
    assert [row[5] for row in report] == ["2", "2", "2", "2", "2", "1"]


def test_quantiles() -> None:
    """Half of the attempts took p50 at most, nineteen of twenty p95."""

    def quantiles(*seconds: float) -> tuple[float, float]:
        figures = StepNode(("n",), "node", took_ms=[1000 * one for one in seconds])
        return figures.quantile(0.5), figures.quantile(0.95)

    assert quantiles(*range(100, 0, -1)) == (50.0, 95.0)
    assert quantiles(3.0) == (3.0, 3.0)
    assert quantiles(2.0, 1.0) == (1.0, 2.0)


@pytest.mark.core
def test_runs_whose_owner_is_gone(store: SQLiteStore, serve: Any) -> None:
    """A run whose lease has expired is shown as interrupted, one in progress with its owner, and one that was
    left to workers as due."""

    async def leave(run_id: str, seconds: float) -> Any:
        session = await begin(store, run_id, lease_seconds=seconds)
        await commit(session, 0, Kept(n=1))
        return session

    here = asyncio.run(leave("here", 60.0))
    gone = asyncio.run(leave("gone", 60.0))
    gone.abandon()
    left = asyncio.run(leave("left", 60.0))
    asyncio.run(finish(left, "INTERRUPTED"))
    site = serve(store)
    events = {row[1]: row for row in rows(site.get("/").text)}
    assert (events["here"][0], events["gone"][0]) == ("RUNNING", "INTERRUPTED")
    assert (events["gone"][3], events["left"][3]) == ("owner lost", "due for a worker")
    assert "The owner of this run is gone" in site.get("/run", id="gone").text
    assert "<b>Owner</b>" in site.get("/run", id="here").text
    assert "/delete" not in site.get("/run", id="here").text
    assert here is not None


def test_forks(store: SQLiteStore, serve: Any) -> None:
    """What a fork took over from its parent is marked, and the parent is linked."""

    async def go() -> None:
        runner = StromaRunner.quick(store=store)
        await runner.run(GOOD, State(), run_id="parent")
        await runner.fork("parent", GOOD, at="flaky", new_run_id="child")

    asyncio.run(go())
    site = serve(store)
    text = site.get("/run", id="child").text
    assert 'Forked from</b> <a class="mono" href="/run?id=parent">' in text
    assert rows(text)[0][3] == "forked restored"
    assert '<rect class="b-forked' in text
    assert ">continued<" not in text  # Its first process did not continue another.


def test_limits_that_are_closed(tmp_path: Path, serve: Callable[..., Site]) -> None:
    """The overview and a running run name limits that are closed by a cooldown, and for how long."""
    from tests.telemetry.test_queue_metrics import close_limit

    store = SQLiteStore(tmp_path / "runs.db")
    asyncio.run(close_limit("llm <b>", store=store, seconds="50"))
    asyncio.run(close_limit("mail", store=store, seconds="0.001"))
    site = serve(store)
    text = site.get("/overview").text
    assert re.search(
        r"Limit <b>llm &lt;b&gt;</b> is closed for another (?:4\d\.\d|50\.0) s: its provider asked to wait",
        text,
    )
    assert "Limit <b>mail</b> is closed until a call succeeds: its provider asked to wait" in text

    async def go() -> None:
        async def look(state: State) -> Any:
            text = await asyncio.to_thread(lambda: site.get("/run", id="now").text)
            assert "Limit <b>llm &lt;b&gt;</b> is closed" in text
            return state

        await StromaRunner.quick(store=store).run([node("look", look)], State(), run_id="now")

    asyncio.run(go())
    assert "is closed" not in site.get("/run", id="now").text


def test_overview(site: Site) -> None:
    """It has failures by class over time, cost by pipeline, node and model, waste, and slow nodes."""
    text = site.get("/overview").text
    cards = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)<", text))
    assert (cards["Runs"], cards["Success rate"], cards["Attempts"]) == ("2", "50.0%", "13")
    assert "<small>3 failed</small>" in text
    assert re.fullmatch(r"\$0\.00001\d", cards["Wasted"])
    marks = re.findall(r'<rect class="c-(\w+)"[^>]*><title>[^<]*: ([A-Z]+), (\d) attempts?<', text)
    assert marks == [("terminal", "TERMINAL", "1"), ("recoverable", "RECOVERABLE", "2")]
    report = rows(text)
    assert re.findall(r"1 run (succeeded|failed)</title>", text) == ["succeeded", "failed"]
    assert '<td data-name="Reason">contract</td>' in text
    assert report[0][:3] == ["flows", "13", "3"]
    assert ["gpt-4o-mini", "9", "1"] in [row[:3] for row in report]
    slowest = text[text.index("Slowest nodes") :].partition("</table>")[0]
    of_pipeline = re.escape(to_address("/", q="pipeline:flows"))
    linked = set(re.findall(rf'data-open href="{of_pipeline}">(\w+)</a>', slowest))
    assert linked == {"first", "flaky", "left", "right", "total"}
    links = [html.unescape(link) for link in re.findall(r'<a (?:data-open )?href="(/\?[^"]+)"', text)]
    assert to_address("/", q="node:flaky") in links
    assert to_address("/", q="node:total", status="failed", **{"class": "TERMINAL"}) in links
    for link in links:
        assert "data-row" in site.ask("GET", link).text, link
    for days, form in (("1", r"\d\d:\d\d"), ("7", r"\d\d-\d\d \d\d:\d\d"), ("30", r"\d\d-\d\d \d\d:\d\d")):
        chart = site.get("/overview", days=days).text.partition('class="chart"')[2].partition("</svg>")[0]
        assert len(re.findall(rf">{form}</text>", chart)) == 5, days
    assert "No attempt in that time" not in text


def test_a_run_is_found_by_its_trace(store: SQLiteStore, serve: Any) -> None:
    """A search for the id of a trace leads to its run; the trace in the backend is OpenTelemetry's."""
    provider, kept = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    runner = StromaRunner.quick(store=store, hooks=otel_hooks(tracer=provider))
    asyncio.run(runner.run(GOOD, State(), run_id="traced"))
    asyncio.run(StromaRunner.quick(store=store).run(GOOD, State(), run_id="untraced"))
    trace_id = {span.context.trace_id for span in kept.get_finished_spans() if span.context}.pop()
    site = serve(store, trace_url="https://traces.example/{trace_id}")
    answer = site.get("/", q=f"{trace_id:032x}")
    assert (answer.status, answer.headers["location"]) == (303, "/run?id=traced")
    location = site.get("/trace", id="traced").headers["location"]
    assert location == f"https://traces.example/{trace_id:032x}"
    assert "No run matches" in site.get("/", q="ab" * 16).text


@pytest.mark.slow
@pytest.mark.parametrize("dies_in", ["first", "second"])
def test_the_gap_before_a_resume_is_named(dies_in: str, tmp_path: Path, serve: Any) -> None:
    """The timeline of a killed run begins with its first process, and shows when the run was continued."""

    def run(*, dies: bool) -> Any:
        def step(id: str) -> Any:
            @stroma_node(id, input=State, output=State)
            async def call(state: State) -> State:
                if dies and id == dies_in:
                    os.kill(os.getpid(), signal.SIGKILL)
                return state

            return call

        async def go() -> Any:
            async with SQLiteStore(tmp_path / "runs.db") as store:
                runner = StromaRunner.quick(store=store, resume=True, lease_seconds=1)
                return await runner.run([step("first"), step("second")], State(), run_id="r")

        return asyncio.run(go())

    child = os.fork()
    if child == 0:
        run(dies=True)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert run(dies=False).ok
    with SQLiteStore(tmp_path / "runs.db") as store:
        text = serve(store).get("/run", id="r").text
    (gap,) = re.findall(
        r'<rect class="b-wait" x="([\d.]+)%"[^>]*><title>continued after [^<]*: its process', text
    )
    assert float(gap) < 5
    first = re.findall(r'<rect class="b-success" x="([\d.]+)%"', text)[0]
    assert (float(first) < 5) == (dies_in == "second")


def test_restored_nodes(store: SQLiteStore, serve: Any) -> None:
    """What a resumed run did not make again is marked as restored; what it made since is not."""
    calls: list[int] = []

    async def stops(state: Any) -> Any:
        calls.append(1)
        if len(calls) < 3:
            raise ValueError("not yet")
        return {"n": 3}

    pipeline = Pipeline("p", [GOOD.nodes[0], node("stops", stops)])
    make_runs(store, ("x", pipeline))
    site = serve(store)
    assert [row[3] for row in rows(site.get("/run", id="x").text)] == ["success", "failure", "failure"]
    make_runs(store, ("x", pipeline), resume=True)
    statuses = [row[3] for row in rows(site.get("/run", id="x").text)]
    assert statuses == ["success restored", "failure", "failure", "success"]


def test_live(site: Site) -> None:
    """A page that is open is told when a run begins or goes on, also while it had no connection."""

    def read_event(path: str, known: bytes = b"", change: Callable[[], None] = lambda: None) -> bytes:
        request = urllib.request.Request(f"{site.url}{path}")
        if known:
            request.add_header("Last-Event-ID", known.decode())
        with urllib.request.urlopen(request, timeout=60) as events:
            assert events.headers["content-type"].startswith("text/event-stream")
            assert [events.readline(), events.readline()[:4]] == [b"retry: 2000\n", b"id: "]
            change()
            lines = iter(events.readline, b"")
            assert next(line for line in lines if line.startswith(b"event:")) == b"event: changed\n"
            return events.readline().removeprefix(b"id: ").strip()

    known = read_event("/events", change=lambda: make_runs(site.store, ("another", GOOD)))
    make_runs(site.store, ("good", GOOD))
    assert read_event("/events", known) not in (b"", known)

    def both() -> None:
        make_runs(site.store, ("more", GOOD))
        make_runs(site.store, ("good", GOOD))

    read_event("/events?id=good", change=both)


def test_many_open_pages(site: Site) -> None:
    """No more than fifty pages are told of changes at once; one that is closed makes room for another."""

    def is_told() -> Any:
        try:
            return urllib.request.urlopen(f"{site.url}/events", timeout=60)
        except urllib.error.HTTPError as refused:
            return None if refused.code == 503 else refused

    opened = [is_told() for _ in range(50)]
    assert all(one.readline() == b"retry: 2000\n" for one in opened)
    assert is_told() is None
    for one in opened:
        one.close()
    deadline = time.monotonic() + 60
    while (again := is_told()) is None:
        assert time.monotonic() < deadline
    again.close()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command(stop: signal.Signals, tmp_path: Path) -> None:
    """`stroma ui` prints its address once it answers there, and ends without an error at a signal."""
    (tmp_path / "flow.py").write_text("from tests.ui.conftest import GOOD as pipeline\n")
    root = str(Path(__file__).parents[2])
    program = str(Path(sys.executable).with_name("stroma"))
    command = [program, "ui", "flow.py:pipeline", "--port", "0", "--db", "x.db", "--token", ""]
    env = dict(os.environ, PYTHONPATH=root)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address), process.communicate()
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert b"stroma run flow.py:pipeline --db x.db" in answer.read()
            assert answer.headers["server"] is None
        with urllib.request.urlopen(f"{address}submit", timeout=60) as answer:
            assert b"Submit a run" in answer.read()
        with urllib.request.urlopen(f"{address}events", timeout=60) as events:
            assert events.readline()
            process.send_signal(stop)
            assert process.wait(timeout=60) in (0, -stop)
            assert "ERROR" not in process.communicate()[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_resuming(url: str, tmp_path: Path) -> None:
    """The button begins a process of its own that goes on with the run, in the store of the interface."""
    (tmp_path / "flow.py").write_text(
        "import os\nfrom tests.ui.conftest import GOOD, State, node\nfrom stroma import Pipeline\n"
        "async def stops(state):\n    if not os.path.exists('mended'):\n        raise ValueError('not "
        "yet')\n    return {'n': 9}\n"
        "pipeline = Pipeline('p', [GOOD.nodes[0], node('stops', stops)])\n"
    )
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    program = str(Path(sys.executable).with_name("stroma"))
    done = subprocess.run(
        [program, "run", "flow.py:pipeline", "--run-id=-x", "--db", url, "-q"],
        cwd=tmp_path,
        env=env,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 1, done
    (tmp_path / "mended").touch()
    command = [program, "ui", "flow.py:pipeline", "--port", "0", "--db", url, "--token", ""]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline().strip().rpartition(":")[2].rstrip("/"))
        with contextlib.closing(open_store(url)) as store:
            site = Site(port, store)
            page = site.get("/run", id="-x").text
            key = re.findall(
                r'action="/resume"><input type="hidden" name="id" value="-x"><input type="hidden" '
                r'name="key" value="(\w+)"',
                page,
            )[0]
            with urllib.request.urlopen(f"{site.url}/events?id=-x", timeout=60) as events:
                assert site.post("/resume", {"id": "-x", "key": key}).status == 303
                lines = iter(events.readline, b"")
                while store.get_run("-x").status != "RESUMED":
                    assert next(line for line in lines if line.startswith(b"event:"))
            assert store.get_run("-x").nodes == 2
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_a_page_reads_attempts_once(store: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's page reads its attempts in one request, and needs as many requests for 40 items as for 16."""
    requests: list[str] = []

    class Counting:
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def __getattr__(self, name: str) -> Any:
            requests.append(name)
            return getattr(self.rows, name)

    read = type(store).read

    def count_reads(self: Any, query: Any, nothing: Any) -> Any:
        return read(self, lambda rows: query(Counting(rows)), nothing)

    monkeypatch.setattr(type(store), "read", count_reads)
    monkeypatch.setattr("stroma.ui.run_pages._MAX_LISTED", 10)
    monkeypatch.setattr("stroma.ui.run_pages._LISTED_OF_MORE", 5)
    site: Site = serve(store)
    of_run: dict[int, list[str]] = {}
    for items in (16, 40):
        asyncio.run(make_map(store, items, f"map-{items}"))
        requests.clear()
        text = site.get("/run", id=f"map-{items}").text
        # The thread that renews leases looks for requests when it likes.
        of_run[items] = [name for name in requests if not name.startswith("_") and name != "with_requests"]
        assert text.count("<tr data-row>") in (5, 6)  # The attempt that stopped a run is always there.
        assert f"{items} items" in text
    assert of_run[40].count("attempt_page") == 1
    assert of_run[40] == of_run[16]
