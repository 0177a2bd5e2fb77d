"""The graph of the recorded runs of a flow, over every store, in the command line and the web interface."""

import asyncio
from typing import Any
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
from tests.fixtures import store_fixture
from tests.flows.steps import Text, World, runner_on
from tests.kit import Num
from tests.shared_stores import SHARED

from stroma import Flow, stroma_flow
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.history.run_graph import RunGraph
from stroma.trace.story import Bar

store = store_fixture(*SHARED)


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
