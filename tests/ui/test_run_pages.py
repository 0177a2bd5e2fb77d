"""Pages of runs of every kind, the text of an attempt in progress, and figures of the overview."""

import asyncio
import html
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import BaseModel
from tests.kit import NEVER, Note, Num, Receipt, node, same
from tests.ui.browser import Browser
from tests.ui.conftest import Site
from tests.ui.test_actions import form_of, json_form_of
from tests.ui.test_pages import rows
from tests.ui.test_security import attempts_of

from stroma import (
    FailurePolicy,
    Flow,
    NotDone,
    Pipeline,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    current_node,
    parallel,
    stroma_flow,
)
from stroma.adapters import Guard
from stroma.checkpoint.identity import idempotency_key
from stroma.checkpoint.records import Tally, digits_seconds, duration_digits
from stroma.cli import main as stroma_command
from stroma.contracts.checks.lineage import Lineage
from stroma.runner.events import StreamEvent
from stroma.testing import crash_at
from stroma.ui.events import LiveText
from stroma.ui.overview import Overview
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


@stroma_flow("sleeps", input=Num, output=Num)
async def sleeps(flow: Flow, state: Num) -> Num:
    await flow.sleep(hours=2)
    return state


def test_the_sleep_of_a_cancelled_run_ends_with_it(
    store: SQLiteStore, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timeline of a cancelled run is the same an hour later: what it waited for does not go on."""
    runner = StromaRunner.quick(store=store, run_id="r")
    asyncio.run(runner.run(sleeps, Num()))
    asyncio.run(runner.cancel("r"))
    site: Site = serve(store)
    took = re.compile(r"([\d.]+ m?s) so far")
    before = took.findall(site.get("/run", id="r").text)
    later = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert before
    assert took.findall(site.get("/run", id="r").text) == before


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


class Framework:
    """An agent as they all are: it calls its model and its tools by itself."""

    def __init__(self, guard: Guard) -> None:
        self.guard, self.failures = guard, [TimeoutError("the provider took too long")]
        self.model = guard.wrap("model", self._model, usage=lambda answer: answer["usage"])
        self.tool = guard.wrap("weather", self._tool)
        self.run = guard.each_call(guard.wrap("forecaster", self._run), lambda args, _: {"asked": args[0]})

    async def _model(self, text: str) -> dict[str, Any]:
        if self.failures:
            raise self.failures.pop()
        return {"text": text, "usage": {"input_tokens": 9, "output_tokens": 1, "model": "gpt-4o"}}

    async def _tool(self, city: str) -> int:
        if city == "Nowhere":
            raise LookupError("no such city")
        return len(city)

    async def _run(self, city: str) -> int:
        await self.model("which tool?")
        return await self.tool(city)


def test_a_guarded_run_is_shown(store: SQLiteStore, serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It is shown with its tree, attempts, tokens, cost and cause, and how its program resumes it."""
    quick = {kind: FailurePolicy(max_retries=1, backoff_seconds=0) for kind in ("RECOVERABLE", "AMBIGUOUS")}
    guard = Guard(StromaRunner.quick(store=store, policy_map=quick, pipeline="agents"))
    assert asyncio.run(Framework(guard).run("Oslo")) == 4
    with pytest.raises(LookupError):
        asyncio.run(Framework(guard).run("Nowhere"))
    site: Site = serve(store)
    bad, good = rows(site.get("/").text)
    assert (good[0], good[2]) == ("COMPLETED", "agents")
    assert bad[0] == "PARTIAL"
    assert bad[3].startswith("weather: AMBIGUOUS")
    failed, done = (run.run_id for run in store.list_runs())
    page = site.get("/run", id=done).text
    # Behind "@" stands a checksum of the step's input.
    assert [[row[0].partition("@")[0], *row[1:4]] for row in rows(page)] == [
        ["0", "forecaster", "1", "success"],
        ["0.model#0", "model", "1", "failure"],
        ["0.model#0", "model", "2", "success"],
        ["0.weather#0", "weather", "1", "success"],
    ]
    assert [row[6] for row in rows(page)] == ["", "", "10", ""]
    assert page.count('<details open><summary class="row">') == 1
    text = html.unescape(site.get("/run", id=failed).text)
    assert ">weather</a></b>" in text
    assert f"<b>Resume with</b> <code>run_id='{failed}', resume=True</code>" in text
    assert {site.ask("GET", address).status for address in attempts_of(site, failed)} == {200}

    assert stroma_command(["show", done, "--tree", "--db", str(Path(store.path))]) == 0
    shown = capsys.readouterr().out
    steps = [line.split()[1:3] for line in shown.splitlines() if line.startswith("0.")]
    assert steps == [["├─", "model"], ["├─", "model"], ["└─", "weather"]]
    assert "the provider took too long" in shown
    assert stroma_command(["show", failed, "--db", str(Path(store.path))]) == 0
    assert f"continue it with its program, under run_id='{failed}' and resume=True" in capsys.readouterr().err
    assert stroma_command(["export", failed, "--format", "html", "--db", str(Path(store.path))]) == 0
    exported = html.unescape(capsys.readouterr().out)
    assert f"<b>Resume with</b> <code>run_id='{failed}', resume=True</code>" in exported


class Writer:
    """A node that writes a half whenever it is asked to; its first attempt fails in the middle."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.loop = asyncio.new_event_loop()
        self.steps = asyncio.Queue[str]()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def write() -> None:
            async with SQLiteStore(self.url) as store:
                runner = StromaRunner.quick(store=store, events="store")

                @runner.node("write", input=Note, output=Note)
                async def node(state: Note) -> Note:
                    while (word := await self.steps.get()) != "end":
                        if word == "fail":
                            raise ConnectionError("cut off")
                        current_node().emit(word)
                    return Note(text="done")

                await runner.run([node], Note(), run_id="r")

        self.loop.run_until_complete(write())

    def step(self, word: str) -> None:
        self.loop.call_soon_threadsafe(self.steps.put_nowait, word)


@pytest.mark.timeout(90)
def test_text_grows_and_goes(store: SQLiteStore, serve: Callable[..., Site], chromium: Browser) -> None:
    """A page shows text as it is written, also after a reload; a failed attempt and the end discard it."""
    writer, site = Writer(str(store.path)), serve(store)
    shown = "document.querySelector('#texts pre')?.textContent ?? ''"
    writer.thread.start()
    while not store.exists() or store.get_run("r") is None:
        threading.Event().wait(0.02)
    chromium.size(1280, 900)
    chromium.goto(f"{site.url}/run?id=r")
    writer.step("Dear ")
    chromium.until(shown, lambda text: text == "Dear ")
    writer.step("<b>Ada</b>")
    chromium.goto(f"{site.url}/run?id=r")
    chromium.until(shown, lambda text: text == "Dear <b>Ada</b>")
    writer.step("fail")
    chromium.until(shown, lambda text: text == "")
    writer.step("Dear Bob")
    chromium.until(shown, lambda text: text == "Dear Bob")
    writer.step("end")
    chromium.until(shown, lambda text: text == "")
    writer.thread.join()


def event(kind: Any, attempt_id: str = "1-1", **fields: Any) -> StreamEvent:
    return StreamEvent(1, kind, "r", "write", 0, "", 1, attempt_id, **fields)


def test_texts_are_those_of_attempts_under_way() -> None:
    """A text belongs to its attempt: another one, its end and a suspension discard it, and redact sees it."""

    def hide(state: dict[str, Any]) -> dict[str, Any]:
        return {name: str(value).replace("secret", "***") for name, value in state.items()}

    live = LiveText(hide)
    live.take(event("node_event", name="delta", data="a secret"))
    live.take(event("node_event", name="progress", data="half"))
    assert live.shown() == [{"node": "write", "text": "a ***"}]
    live.take(event("node_event", "1-2", name="delta", data="b"))
    assert live.shown() == [{"node": "write", "text": "b"}]
    live.take(event("node_success", "1-2"))
    assert live.shown() == []
    live.take(event("node_event", "1-3", name="delta", data="c"))
    live.take(StreamEvent(2, "run_suspended", "r"))
    assert live.changed.is_set()
    assert live.shown() == []


@pytest.mark.parametrize(
    ("ns", "seconds"), [(0, 0), (7, 7e-9), (12, 12e-9), (1_234_567_890, 1.2), (999_999_999, 0.99)]
)
def test_durations_to_two_digits(ns: int, seconds: float) -> None:
    """A duration is summed up by its first two digits."""
    assert digits_seconds(duration_digits(ns)) == pytest.approx(seconds)


def test_the_percentiles_of_slow_nodes() -> None:
    """Slow nodes have p50 and p95 over pipelines, classes and time, to two digits, the slowest p95 first."""

    def tallies(node_id: str, *runs: tuple[int, int]) -> list[Tally]:
        return [
            Tally(
                bucket,
                "p",
                node_id,
                None,
                None,
                count,
                0,
                0,
                0,
                ms * count * 10**6,
                ms * 10**6,
                duration_digits(ms * 10**6),
            )
            for bucket, (ms, count) in enumerate(runs)
        ]

    slow, steady = Overview.of(
        [*tallies("steady", (80, 100)), *tallies("slow", (10, 93), (4321, 6), (9000, 1))]
    ).slowest
    assert (slow.name, steady.name) == ("slow", "steady")
    assert [slow.quantile(part) for part in (0.5, 0.93, 0.95, 1.0)] == [0.01, 0.01, 4.3, 9.0]
    assert [steady.quantile(part) for part in (0.5, 0.95)] == [0.08, 0.08]
