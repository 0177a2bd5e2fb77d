"""Events that nodes emit, and the events of a stream around them."""

import asyncio
import contextvars
import json
import logging
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr
from tests.kit import NEVER, TWICE, Num, failing_with, node, noting, quick, returning

from stroma import (
    AsyncInMemoryStore,
    CheckpointManager,
    ContractRegistry,
    InMemoryStore,
    NodeHooks,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StreamEvent,
    Suspend,
    current_node,
    map_over,
    parallel,
)
from stroma.engine.execution import RunningNode
from stroma.runner.events import MAX_EMITTED, EventHub


async def events_of(runner: Any, nodes: Any, **options: Any) -> list[StreamEvent]:
    return [event async for event in runner.stream(nodes, Num(), **options)]


def emitted(events: list[StreamEvent]) -> list[Any]:
    return [event.data for event in events if event.kind == "node_event"]


def emitting(name: str, *data: Any) -> Any:
    async def func(state: Num) -> Any:
        for one in data:
            current_node().emit(one)
        return {"n": state.n + 1}

    return node(name, func)


@pytest.mark.core
async def test_emitted_events_lie_between_the_start_and_the_end() -> None:
    """A node's events come in order between its start and its end, with place, attempt, name and data."""

    async def func(state: Num) -> Any:
        here = current_node()
        here.emit("Hel")
        await asyncio.sleep(0)
        here.emit("lo")
        here.emit({"done": 1, "of": [2, None, 0.5]}, name="progress")
        return {"n": 1}

    events = await events_of(quick(run_id="run"), [node("a", func), emitting("b", "x")])
    shown = [(e.kind, e.node_id, e.name, e.data) for e in events]
    assert shown == [
        ("run_start", None, None, None),
        ("node_start", "a", None, None),
        ("node_event", "a", "delta", "Hel"),
        ("node_event", "a", "delta", "lo"),
        ("node_event", "a", "progress", {"done": 1, "of": [2, None, 0.5]}),
        ("node_success", "a", None, None),
        ("node_start", "b", None, None),
        ("node_event", "b", "delta", "x"),
        ("node_success", "b", None, None),
        ("run_end", None, None, None),
    ]
    assert [event.number for event in events] == list(range(1, 11))
    first = events[2]
    assert (first.run_id, first.position, first.branch, first.attempt) == ("run", 0, "", 1)
    of_a, of_b = ({e.attempt_id for e in events if e.node_id == name} for name in "ab")
    assert len(of_a) == len(of_b) == 1
    assert of_a != of_b
    assert None not in of_a | of_b


@pytest.mark.parametrize("is_async", [True, False])
async def test_an_event_is_read_while_its_node_runs(is_async: bool) -> None:
    """A reader gets an event at once, also of a plain function in a thread, which waits here for it."""
    read = threading.Event()

    async def waits(state: Num) -> Any:
        current_node().emit("now")
        async with asyncio.timeout(30):
            while not read.is_set():
                await asyncio.sleep(0)
        return {"n": 1}

    def blocks(state: Num) -> Any:
        current_node().emit("now")
        assert read.wait(30)
        return {"n": 1}

    func = waits if is_async else blocks
    async with quick(policy_map=NEVER).stream([node("a", func)], Num()) as stream:
        async for event in stream:
            if event.data == "now":
                read.set()
    assert stream.result.status is RunStatus.COMPLETED


@pytest.mark.core
async def test_threads_emit_at_the_same_time() -> None:
    """Each of many threads emits in its order; no event is lost, doubled or out of order."""

    def func(state: Num) -> Any:
        here = current_node()

        def talk(who: int) -> None:
            for index in range(100):
                here.emit([who, index])

        threads = [threading.Thread(target=talk, args=(who,)) for who in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"n": 1}

    events = await events_of(quick(), [node("a", func)])
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    for who in range(8):
        assert [data[1] for data in emitted(events) if data[0] == who] == list(range(100))


async def test_without_a_reader_emit_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """In a run without readers nothing looks at the data."""
    assert (await quick().run([emitting("a", object(), "x")], Num())).status is RunStatus.COMPLETED
    assert caplog.records == []


@pytest.mark.core
async def test_a_reader_that_stands_still() -> None:
    """The newest emitted events are pending, one event counts the others, beside all starts and ends."""

    async def func(state: Num) -> Any:
        for index in range(MAX_EMITTED):
            current_node().emit(index)
        return {"n": 1}

    nodes = [node("a", func), node("b", func), node("c", func)]
    async with quick(policy_map=NEVER).stream(nodes, Num()) as stream:
        await asyncio.wait({stream._run._task})
        events = [event async for event in stream]
    assert [(event.kind, event.details.get("dropped")) for event in events if event.kind != "node_event"] == [
        ("run_start", None),
        ("node_start", None),
        ("events_dropped", 2 * MAX_EMITTED),
        ("node_success", None),
        ("node_start", None),
        ("node_success", None),
        ("node_start", None),
        ("node_success", None),
        ("run_end", None),
    ]
    assert emitted(events) == list(range(MAX_EMITTED))
    assert {event.node_id for event in events if event.kind == "node_event"} == {"c"}
    numbers = [event.number for event in events]
    assert numbers == sorted(set(numbers))


def started_hub() -> tuple[EventHub, RunningNode]:
    """Return a hub with a running attempt "1-1", whose start was read, and its node."""
    hub = EventHub()
    hub.publish("node_start", "run", "a", attempt_id="1-1")
    assert hub.take() is not None
    manager = CheckpointManager(InMemoryStore())
    context = ReliabilityContext.for_run(RunConfig(), ContractRegistry(), manager)
    return hub, RunningNode(context, "a", "node", 0, "")


async def test_drops_are_counted_each_time() -> None:
    """A reader that falls behind twice gets a count for each gap: read and dropped make all."""
    hub, here = started_hub()
    read, dropped, sent = 0, 0, 0
    for burst in (MAX_EMITTED + 7, 3, 2 * MAX_EMITTED):
        for _ in range(burst):
            hub.emit(here, "1-1", "delta", sent)
            sent += 1
        while (event := hub.take()) is not None:
            read += event.kind == "node_event"
            dropped += event.details.get("dropped", 0)
            if event.kind == "node_event":
                assert event.data == read + dropped - 1
    assert (read + dropped, dropped) == (sent, 7 + MAX_EMITTED)


def test_a_hub_takes_events_of_running_attempts_only() -> None:
    """However a thread races with an end: an event never precedes a start or follows an end."""
    for end in ("node_success", "node_failure", "node_cancelled", "node_suspended"):
        hub, here = started_hub()
        hub.emit(here, "1-2", "delta", "early")
        hub.emit(here, "1-1", "delta", "in time")
        hub.publish(end, "run", "a", attempt_id="1-1")
        hub.emit(here, "1-1", "delta", "late")
        assert [hub.take().data for _ in range(2)] == ["in time", None]
        assert hub.take() is None


async def test_a_thread_wakes_a_reader_by_its_loop() -> None:
    """The future of a waiting reader is set in its own event loop, which alone may do that."""
    hub, here = started_hub()
    asyncio.get_running_loop().set_debug(True)  # It refuses calls from other threads.
    waiting = asyncio.create_task(hub.get())
    await asyncio.sleep(0)
    await asyncio.to_thread(hub.emit, here, "1-1", "delta", "x")
    event = await waiting
    assert event.data == "x"


async def test_a_stream_that_stands_still_stops_no_stored_event() -> None:
    """While one reader does not read, another one gets the newest events, and the run does not wait."""
    store = AsyncInMemoryStore()

    async def func(state: Num) -> Any:
        for index in range(3 * MAX_EMITTED):
            current_node().emit(index)
            await asyncio.sleep(0)
        return {"n": 1}

    runner = quick(store=store, policy_map=NEVER, run_id="run", events="store")
    async with runner.stream([node("a", func)], Num()) as still:
        await anext(still)  # The run is in the store.
        events = [event async for event in runner.follow("run")]
        rest = [event async for event in still]
    assert emitted(events)[-1] == 3 * MAX_EMITTED - 1
    assert emitted(rest) == list(range(2 * MAX_EMITTED, 3 * MAX_EMITTED))


@pytest.mark.core
async def test_each_attempt_has_an_id_of_its_own() -> None:
    """Attempts of a node, of a group and of its children have different ids, on start, events and end."""
    left = [TimeoutError("again")]

    async def flaky(state: Num) -> Any:
        current_node().emit(current_node().attempt)
        if left:
            raise left.pop()
        return {"n": 1}

    group = parallel(node("x", flaky))
    runner = quick(policy_map=NEVER, node_policies={group.node_id: TWICE})
    left.append(TimeoutError("once more"))
    events = await events_of(
        runner, [group, map_over(lambda _: [{"n": 1}, {"n": 2}], node("m", flaky), into="made")]
    )
    ids: dict[str, list[StreamEvent]] = {}
    for event in events:
        if event.attempt_id is not None:
            ids.setdefault(event.attempt_id, []).append(event)
    others = [event.kind for event in events if event.attempt_id is None and event.node_id]
    assert others == ["node_retry", "node_retry", "map_progress", "map_progress"]
    # Three attempts of the group and of its child, those of the two items, and that of the map.
    assert len(ids) == 3 + 3 + 2 + 1
    for same_attempt in ids.values():
        assert len({(e.node_id, e.branch, e.attempt) for e in same_attempt}) == 1
        kinds = [event.kind for event in same_attempt]
        assert kinds[0] == "node_start"
        assert kinds[-1] in ("node_success", "node_failure")
        assert set(kinds[1:-1]) <= {"node_event"}


@pytest.mark.core
async def test_ids_of_attempts_differ_over_processes(tmp_path: Path) -> None:
    """A runner that resumes a run gives its attempts ids that no earlier one has given."""
    ids: list[str | None] = []
    async with SQLiteStore(tmp_path / "runs.db") as store:
        for answer in (None, {"n": 1}, {"n": 2}):
            runner = quick(store=store, run_id="run")
            if answer is not None:
                await runner.signal("run", answer)
            nodes = [node("a", failing_with(Suspend, "may I?"))]
            events = await events_of(runner, nodes, resume=answer is not None)
            ids += [event.attempt_id for event in events if event.kind == "node_start"]
    assert len(ids) == len(set(ids)) == 3


def _keep(emits: list[Callable[[], None]]) -> Any:
    """Return a node whose first attempt fails, and leaves an emitting function in its context."""

    async def func(state: Num) -> Any:
        here = current_node()
        if here.attempt == 1:
            context = contextvars.copy_context()
            emits.append(lambda: context.run(here.emit, "late"))
            here.emit("first")
            raise TimeoutError
        emits[0]()
        here.emit("second")
        emits[0]()
        return {"n": 1}

    return node("a", func)


@pytest.mark.core
async def test_a_dead_attempt_emits_nothing() -> None:
    """What outlives its attempt, in a thread or a task, emits nothing more, nor for the next attempt."""
    emits: list[Callable[[], None]] = []

    async def after(*_: Any) -> None:
        emits[0]()

    hooks = NodeHooks(on_node_failure=after, on_node_retry=after, on_node_success=after)
    events = await events_of(quick(hooks=hooks), [_keep(emits), emitting("b", "x")])
    assert emitted(events) == ["first", "second", "x"]
    emits[0]()


async def test_a_thread_that_was_given_up_emits_nothing() -> None:
    """A plain function whose time is up goes on in its thread; the next attempt has none of its events."""
    go, over = threading.Event(), threading.Event()

    def func(state: Num) -> Any:
        here = current_node()
        if here.attempt == 1:
            here.emit("first")
            assert go.wait(30)
            here.emit("late")
            over.set()
        else:
            go.set()
            assert over.wait(30)
            here.emit("second")
        return {"n": 1}

    events = await events_of(quick(node_timeouts={"a": 100}), [node("a", func)])
    assert emitted(events) == ["first", "second"]
    assert events[-1].details["status"] == "COMPLETED"


class Progress(BaseModel):
    done: int
    secret: SecretStr = SecretStr("hunter2-hunter2")


async def test_models_and_copies() -> None:
    """A model is emitted as JSON, without its secrets; later changes to data are not seen."""

    async def func(state: Num) -> Any:
        here, data = current_node(), {"list": [1]}
        here.emit(Progress(done=3))
        here.emit({"inside": [Progress(done=4)]})
        here.emit(data)
        data["list"].append(2)
        here.emit(None)
        return {"n": 1}

    events = await events_of(quick(), [node("a", func)])
    hidden = "**********"
    inside = {"inside": [{"done": 4, "secret": hidden}]}
    assert emitted(events) == [{"done": 3, "secret": hidden}, inside, {"list": [1]}, None]


@pytest.mark.core
async def test_data_that_is_not_json(caplog: pytest.LogCaptureFixture) -> None:
    """It is dropped with one warning for each node and type, without the data; the node goes on."""
    around: list[Any] = []
    around.append(around)
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    bad = ({1, 2}, {"a": {3}}, b"bytes", float("nan"), {("t",): 1}, around, deep, object(), (n for n in [1]))
    runner = quick(policy_map=NEVER)
    with caplog.at_level(logging.WARNING):
        events = await events_of(runner, [emitting("a", *bad, "good", *bad)])
    assert emitted(events) == ["good"]
    assert events[-1].details["status"] == "COMPLETED"
    texts = [record.message.partition(": ")[2] for record in caplog.records]
    kinds = ["set", "bytes", "float", "dict", "list", "object", "generator"]
    assert texts == [
        f"node 'a' emitted data that is not JSON, of type {kind}: it is dropped; emit JSON data or a "
        f"pydantic model"
        for kind in kinds
    ]


@pytest.mark.core
async def test_redact_holds_for_emitted_data() -> None:
    """``redact`` gets the data under its name; what it raises, removes or returns is what readers see."""

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        if "fails" in state:
            raise KeyError
        return {key: "hidden" if value == 777_777 else value for key, value in state.items() if key != "gone"}

    async def func(state: Num) -> Any:
        here = current_node()
        here.emit(777_777)
        here.emit(1, name="other")
        here.emit(777_777, name="gone")
        here.emit(777_777, name="fails")
        return {"n": 1}

    events = await events_of(quick(redact=redact), [node("a", func)])
    assert emitted(events) == ["hidden", 1, {}, {"redacted": "redact raised KeyError"}]
    assert "777777" not in json.dumps([event.to_dict() for event in events])


@pytest.mark.core
async def test_nothing_of_an_event_is_recorded(tmp_path: Path) -> None:
    """Neither the store, the trace, the result nor a hook has what was emitted."""
    seen: list[Any] = []

    see = noting(seen, lambda *arguments: arguments)
    hooks = NodeHooks(on_node_start=see, on_node_success=see, on_run_start=see, on_run_end=see)
    path = tmp_path / "runs.db"
    async with SQLiteStore(path) as store:
        runner = quick(store=store, run_id="run", hooks=hooks)
        stream = runner.stream([emitting("a", "unmistakable")], Num())
        assert emitted([event async for event in stream]) == ["unmistakable"]
    assert "unmistakable" not in stream.result.trace.to_json()
    assert "unmistakable" not in repr((seen, stream.result))
    dump = "\n".join(sqlite3.connect(path).iterdump())
    assert "run" in dump
    assert "unmistakable" not in dump


@pytest.mark.core
async def test_what_an_end_says_as_json() -> None:
    """Ends have, in JSON, the output, usage and duration, and class, message and reason of a failure."""
    fails = failing_with(TimeoutError, "too late for n=777777")

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "n": "hidden"} if state.get("n") == 777_777 else state

    runner = quick(policy_map=NEVER, redact=redact)
    stream = runner.stream([node("a", returning(({"n": 2}, 7))), node("b", fails)], Num(n=1))
    success = next(e.to_dict() for e in [event async for event in stream] if e.kind == "node_success")
    assert success["state"] == {"n": 2}
    assert success["details"]["tokens"] == 7
    assert success["details"]["cost_usd"] == 0
    assert success["details"]["duration_ms"] >= 0
    assert "event" not in success
    stream = runner.stream([node("b", fails)], Num(n=777_777))
    failure = next(e.to_dict() for e in [event async for event in stream] if e.kind == "node_failure")
    expected = {"class": "RECOVERABLE", "message": "too late for n=[redacted]", "reason": "timeout"}
    assert failure["details"]["failure"] == expected


@pytest.mark.core
async def test_events_are_read_back_from_json() -> None:
    """from_dict() is the inverse of to_dict() for every kind, but for ``event`` and ``result``."""
    left = [TimeoutError("again")]

    async def flaky(state: Num) -> Any:
        current_node().emit({"a": [1]}, name="progress")
        if left:
            raise left.pop()
        return {"n": 1}

    nodes = [node("f", flaky), map_over(lambda _: [{"n": 1}], node("m", flaky), into="made")]
    events = await events_of(quick(), nodes)
    assert {"run_start", "node_event", "node_failure", "node_retry", "map_progress", "run_end"} <= {
        event.kind for event in events
    }
    for event in events:
        data = json.loads(json.dumps(event.to_dict(), allow_nan=False))
        read = StreamEvent.from_dict({**data, "unknown": 1})
        assert read.to_dict() == data
        assert (read.progress, read.event, read.result) == (event.progress, None, None)
