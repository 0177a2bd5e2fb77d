"""A run of a flow as it is shown: calls as a tree, waits as what they are, and the graph of its runs."""

import asyncio
import re
import time
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fixtures import store_fixture
from tests.flows.steps import Text, World, runner_on
from tests.kit import Num
from tests.shared_stores import SHARED

from stroma import Flow, Pipeline, RunStatus, StepFailed, parallel, stroma_flow
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.history.run_graph import RunGraph
from stroma.checkpoint.identity import StepCalls
from stroma.trace.outline import OutlineEntry, fold, folded_part, outline, parse_call
from stroma.trace.story import Bar, Story
from stroma.trace.terminal import lines_of
from stroma.trace.timeline import Timeline

store = store_fixture(*SHARED)


@pytest.fixture
def triage() -> Any:
    """A flow with everything that a flow may call."""
    world = World()
    world.failing.add("lookup")
    first, judge, lookup, extract = map(world.step, ("first", "judge", "lookup", "extract"))
    both = parallel(world.step("left"), world.step("right"))

    @stroma_flow("check", input=Num, output=Num)
    async def check(flow: Flow, state: Num) -> Num:
        return await flow.step(judge, await flow.step(judge, state))

    @stroma_flow("triage", input=Num, output=Num)
    async def triage(flow: Flow, state: Num) -> Num:
        await flow.step(first, state)
        try:
            await flow.step(lookup, state)
        except StepFailed:
            pass
        for n in range(3):
            await flow.step(judge, Num(n=n))
        await flow.map(extract, [Num(n=n) for n in range(4)])
        await flow.run(check, state)
        await flow.run(Pipeline("steps", [first, judge]), state)
        await flow.step(both, state)

        async def branch() -> None:
            for n in range(2):
                await flow.step(judge, Num(n=n))

        await asyncio.gather(branch(), branch())
        await flow.sleep(seconds=0.01)
        answer = await flow.wait_for(Text, reason="Send it?")
        return Num(n=len(answer.text))

    return triage


LINES = [
    "first",
    "lookup",
    "judge x7",
    "map over extract",
    "  extract x4",
    "check",
    "  judge x2",
    "steps",
    "  first",
    "  judge",
    "parallel(left, right)",
    "  left",
    "  right",
]


def lines(entries: list[OutlineEntry], depth: int = 0) -> list[str]:
    shown: list[str] = []
    for entry in entries:
        shown.append("  " * depth + re.sub(r"until \S+", "until T", entry.label))
        if entry.kind != "fold":
            shown += lines(entry.entries, depth + 1)
    return shown


async def test_waits_for_messages_are_shown(store: Any) -> None:
    """A message that came, one that did not in time and one that is awaited are lines, live and stored."""

    @stroma_flow("chat", input=Num, output=Num)
    async def chat(flow: Flow, state: Num) -> Num:
        await flow.receive(Text)
        with pytest.raises(TimeoutError):
            await flow.receive(Text, topic="<x>", timeout=0)
        race = asyncio.create_task(flow.receive(Text, topic="given up"))
        await asyncio.sleep(0)
        race.cancel()
        await flow.receive(Text, topic="y")
        return state

    runner = runner_on(store)
    assert (await runner.run(chat, Num())).status is RunStatus.SUSPENDED
    await runner.send("r", {"text": "a"})
    result = await runner_on(store).run(chat, Num())
    assert result.suspended == ["waiting for a message on 'y'"]
    labels = ["message", "message on '<x>'", "message on 'y'"]
    history = History(store)
    record = await asyncio.to_thread(store.get_run, "r")
    assert record is not None
    waits = await asyncio.to_thread(history.flow_waits, record, [])
    waits.sort(key=lambda bar: bar.at)
    assert [(bar.node_id, bar.outcome) for bar in waits] == list(
        zip(labels, ("received", "missed", "receiving"), strict=True)
    )
    assert [(mark.reason, mark.kind) for mark in result.trace.marks if mark.reason in labels] == list(
        zip(labels, ("received", "missed", "receiving"), strict=True)
    )
    entries = outline([], waits)
    assert [entry.kind for top in entries for entry in top.entries] == ["message"] * 3
    assert "none in time" in Timeline(Story("r", "", "RUNNING", [], 0, 0.0, waits=waits), link=None).draw()


async def test_calls_are_a_tree_with_loops_folded(store: Any, triage: Any) -> None:
    """Repeated calls of one node in a flow are one entry; a question, a sleep, a map and a flow are named."""
    runner = runner_on(store)
    assert (await runner.run(triage, Num())).status is RunStatus.SUSPENDED
    history = History(store)
    record = await asyncio.to_thread(store.get_run, "r")
    assert record is not None
    story = await asyncio.to_thread(history.story, record)
    waiting = ["  sleep until T", "  question: Send it?"]
    printed = lines(fold(outline(story.bars, story.waits)))
    assert printed == ["flow", *(f"  {line}" for line in LINES), *waiting]
    assert [bar.outcome for bar in story.waits] == ["open", "slept"]

    # Each call is in there once, and unfolded all are there.
    inside = [
        bar
        for top in fold(outline(story.bars))
        for _, one in top.walk()
        if one.kind != "fold"
        for bar in one.bars
    ]
    assert sorted(bar.key for bar in inside) == sorted(bar.key for bar in story.bars)
    assert lines(outline(story.bars)).count("  judge") == 7

    began, _ = time.time(), await asyncio.sleep(0.05)
    await runner.signal("r", Text(text="yes"))
    answered = time.time()
    assert (await runner.resume(triage, "r")).output == Num(n=3)
    record = await asyncio.to_thread(store.get_run, "r")
    assert record is not None
    story = await asyncio.to_thread(history.story, record)
    printed = lines(fold(outline(story.bars, story.waits)))
    assert printed == ["triage", *(f"  {line}" for line in LINES), *waiting]
    assert [bar.outcome for bar in story.waits] == ["answered", "slept"]
    # A question ends when it is answered, not when the run is resumed.
    question, first_s = story.waits[0], story.first_ns / 1e9
    assert began + 0.045 <= first_s + (question.began_ms + question.took_ms) / 1000 <= answered + 0.005


async def test_a_question_without_an_answer_in_time(store: Any) -> None:
    """A question whose time is over shows as expired at that time, and is not a sleep."""

    @stroma_flow("asks", input=Num, output=Num)
    async def asks(flow: Flow, state: Num) -> Num:
        try:
            await flow.wait_for(Text, reason="Well?", timeout=0.2)
        except TimeoutError:
            return Num(n=1)
        return state

    assert (await runner_on(store).run(asks, Num())).output == Num(n=1)
    history = History(store)
    record = await asyncio.to_thread(store.get_run, "r")
    assert record is not None
    attempts = await asyncio.to_thread(history.attempts, "r", 10)
    (bar,) = await asyncio.to_thread(history.flow_waits, record, attempts[0])
    assert (bar.node_id, bar.outcome) == ("question: Well?", "expired")
    assert bar.took_ms > 0


async def test_inputs_of_steps_are_shown(store: Any) -> None:
    """The input of each step of a flow is read from the store, also if it failed or is an item of a map."""
    world = World()
    world.failing.add("bad")
    one, bad, item = map(world.step, ("one", "bad", "item"))

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(one, Num(n=state.n * 10))

    @stroma_flow("outer", input=Num, output=Num)
    async def outer(flow: Flow, state: Num) -> Num:
        await flow.step(one, Num(n=1))
        try:
            await flow.step(bad, Num(n=2))
        except StepFailed:
            pass
        await flow.map(item, [Num(n=3), Num(n=4)])
        return await flow.run(inner, Num(n=5))

    assert (await runner_on(store).run(outer, Num())).status is RunStatus.COMPLETED
    history = History(store)

    def read() -> dict[str, Any]:
        attempts, _ = history.attempts("r", 100)
        return {one.branch: history.input_of("r", one).value for one in attempts if one.branch}

    assert await asyncio.to_thread(read) == {
        "one#0": {"n": 1},
        "bad#1": {"n": 2},
        "*item#2.0": {"n": 3},
        "*item#2.1": {"n": 4},
        "inner#3": {"n": 5},
        "inner#3.one#0": {"n": 50},
    }


async def test_a_trace_folds_as_the_store_does(triage: Any) -> None:
    """The trace of a run in this process draws the same tree as HTML."""
    result = await runner_on(None).run(triage, Num())
    html = result.trace.to_html()
    names = re.findall(r'<span class="dim mono">[^<]*</span> ([^<]*)(?:<time[^<]*</time>)?</span><svg', html)
    assert {"judge x7", "map over extract", "extract x4", "check", "steps", "question: Send it?"} <= set(
        names
    )
    assert names.count("judge") == 10  # Those that are folded stand inside, closed.
    assert any(name.startswith("sleep until ") for name in names)
    folded = re.search(r'<details><summary class="row"><span class="name fold " title="judge x7">', html)
    assert folded is not None


def test_failures_of_repeated_calls_are_counted() -> None:
    """A fold whose calls failed for good says how many, and is marked as failed."""
    bars = [
        Bar("judge", "0.judge#0", 1, 0, 5, "failure"),
        Bar("judge", "0.judge#0", 2, 6, 5, "success"),
        Bar("judge", "0.judge#1", 1, 12, 5, "failure", "TERMINAL"),
    ]
    drawn = Timeline(Story("r", "", "COMPLETED", bars, 0, 0.0), None).draw()
    assert 'class="name fold bad" title="judge x2"' in drawn
    assert '<span class="bad">1 failed</span>' in drawn


def test_identities_are_read_as_they_are_written() -> None:
    """Calls are parsed as identities of steps: ids with dots and slashes, keys, and calls of other tasks."""

    async def write() -> list[str]:
        calls = StepCalls()
        texts: list[str] = []
        texts.append(calls.next(calls.scope(), "a.b/c#d").text)

        async def inside() -> None:
            texts.append(calls.next(calls.scope(), "x", "*").text)

        await asyncio.create_task(inside())
        return [
            *texts,
            calls.named("page/1"),
            calls.named("wait", "!"),
            calls.next_of_input("tool", "abc").text,
        ]

    parsed = [parse_call(text) for text in asyncio.run(write())]
    assert parsed == [
        ("", "a.b/c#d", "0", ""),
        ("*", "x", "0", "-0"),
        ("", "", "page/1", ""),
        ("!", "", "wait", ""),
        ("", "tool", "0", ""),
    ]
    assert parse_call("12") is None


def test_repeated_calls_have_one_key() -> None:
    """Calls of one node from one place share a line in every drawing; sleeps and questions do not."""
    assert folded_part("judge#0") == folded_part("judge#7") == folded_part("#a%2Fb", "judge")
    assert folded_part("*page#0") != folded_part("page#0")
    assert len({folded_part(part) for part in ("!sleep#0", "!sleep#1", "?#0", "?#1", "3", "4")}) == 6


def test_failures_inside_of_folded_calls_are_shown() -> None:
    """Folded calls of a Pipeline, which have no attempts, name those whose last node failed, by plain ids."""
    bars = [
        Bar(f"n{node}", f"0.mail%2Erun#{call}.{node}", 1, 2 * call + node, 1, "success")
        for call in range(3)
        for node in range(2)
    ]
    bars[3] = Bar("n1", "0.mail%2Erun#1.1", 1, 3, 1, "failure", "TERMINAL")
    cells = [line.cells() for line in lines_of(fold(outline(bars)))]
    (folded,) = [one for one in cells if "x3" in one["NODE"]]
    assert folded["OUTCOME"] == "1 failed"
    assert folded["MESSAGE"] == "3 calls: 1 failed"
    assert [one["AT"] for one in cells if one.get("CLASS")] == ["0.mail.run#1.1"]


def edges_of(graph: RunGraph) -> dict[tuple[str, str], int]:
    return {("/".join(a), "/".join(b)): count for (a, b), count in graph.edges.items()}


async def test_steps_of_all_runs_are_counted(store: Any) -> None:
    """Nodes have calls and failures, edges how often one call followed another, ends the runs' statuses."""
    world = World()
    write, judge, send, page, alarm = map(world.step, ("write", "judge", "send", "page", "alarm"))
    world.failing.add("send 3")

    @stroma_flow("part", input=Num, output=Num)
    async def part(flow: Flow, state: Num) -> Num:
        return await flow.step(page, state)

    @stroma_flow("letter", input=Num, output=Num)
    async def letter(flow: Flow, state: Num) -> Num:
        for _ in range(state.n):
            await flow.step(write, state)
            await flow.step(judge, state)
        await asyncio.gather(flow.step(page, state), flow.run(part, state))
        await flow.map(page, [state] * 4)
        if state.n == 1:
            await flow.wait_for(Text, reason=f"Send {state.n}?")
        return await flow.step(send, state)

    for n in (1, 2, 3):
        await runner_on(store, run_id=f"run {n}").run(letter, Num(n=n))
    await runner_on(store, run_id="other").run([alarm], Num())
    graph = await asyncio.to_thread(History(store).run_graph, "letter")
    assert graph.runs == 3
    assert edges_of(graph) == {
        ("start", "write"): 3,
        ("write", "judge"): 6,
        ("judge", "write"): 3,
        ("judge", "page"): 3,
        ("judge", "part"): 3,
        ("part", "part/page"): 3,
        ("page", "map over page"): 3,
        ("part", "map over page"): 3,
        ("map over page", "map over page/page"): 12,
        ("map over page", "question Text"): 1,
        ("map over page", "send"): 2,
    }
    figures = {
        "/".join(path): (one.kind, one.calls, one.attempts, one.failed) for path, one in graph.nodes.items()
    }
    assert figures == {
        "write": ("node", 6, 6, 0),
        "judge": ("node", 6, 6, 0),
        "page": ("node", 3, 3, 0),
        "part": ("flow", 3, 3, 0),
        "part/page": ("node", 3, 3, 0),
        "map over page": ("map", 3, 0, 0),
        "map over page/page": ("node", 12, 12, 0),
        "question Text": ("question", 1, 0, 0),
        "send": ("node", 2, 2, 1),
    }
    assert graph.ends == {
        (("question Text",), "SUSPENDED"): 1,
        (("send",), "COMPLETED"): 1,
        (("send",), "PARTIAL"): 1,
    }

    drawn = graph.mermaid()
    assert '["send<br/>2 calls, 50.0#37; of 2 attempts failed"]' in drawn
    ElementTree.fromstring(graph.svg())


def calls(*spans: tuple[str, float, float]) -> list[Bar]:
    """Attempts at places in one flow, each with its start and end."""
    return [
        Bar(at.rpartition("/")[2].partition("#")[0], f"0.{at}", 1, a, b - a, "success") for at, a, b in spans
    ]


def test_forks_and_joins() -> None:
    """First calls of tasks follow the call before them; the call after a gather follows each last one."""
    graph = RunGraph("f")
    graph.add_run(
        calls(
            ("first#0", 0, 1),
            ("-0/a#0", 2, 9),
            ("-1/b#0", 2, 4),
            ("-1/c#0", 5, 8),
            ("-1-0/d#0", 5, 6),
            ("then#0", 10, 11),
            ("-2/e#0", 12, 13),
            ("-3/g#0", 12, 14),
            ("last#0", 15, 16),
        ),
        [],
        "COMPLETED",
    )
    assert edges_of(graph) == {
        ("start", "first"): 1,
        ("first", "a"): 1,
        ("first", "b"): 1,
        ("b", "c"): 1,
        ("b", "d"): 1,
        ("a", "then"): 1,
        ("c", "then"): 1,
        ("d", "then"): 1,
        ("then", "e"): 1,
        ("then", "g"): 1,
        ("e", "last"): 1,
        ("g", "last"): 1,
    }
    assert graph.ends == {(("last",), "COMPLETED"): 1}


HOSTILE = "<script>\"]end';|--&\u202e"


@given(st.text(min_size=1, max_size=30) | st.just(HOSTILE), st.text(max_size=10))
def test_ids_cannot_leave_their_labels(node_id: str, name: str) -> None:
    """Any id is drawn as text: the image is valid XML, and nothing of it is the language of Mermaid."""
    graph = RunGraph(name)
    graph.add_run([Bar(node_id, "0.x#0", 1, 0, 1, "failure")], [], "FAILED")
    ElementTree.fromstring(graph.svg())
    for line in graph.mermaid().splitlines():
        assert line.count('"') in (0, 2)
        assert not set("<>'") & set(line.replace("<br/>", "").replace("-->", ""))
