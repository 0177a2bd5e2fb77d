"""Following a run of the store in any process: its events, its suspensions, end; over every store."""

import asyncio
import gc
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.kit import NEVER, ONCE, Num, SimpleStore, Text, computing, node, noting
from tests.runner.page import Page
from tests.shared_stores import STORES

from stroma import (
    CheckpointNotFound,
    FailureClass,
    Flow,
    InMemoryStore,
    NodeHooks,
    Pipeline,
    StoreError,
    StreamEvent,
    StromaRunner,
    current_node,
)
from stroma.adapters import Guard
from stroma.checkpoint.durable import session as session_module
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.entries import RunRequest
from stroma.checkpoint.events import EventBatch, EventPage, EventPlace
from stroma.checkpoint.sql import rows as sql_rows
from stroma.checkpoint.sql import statements
from stroma.runner import follow as follow_module
from stroma.runner.follow import decode_events
from stroma.wire import ag_ui, vercel

store = store_fixture(*STORES)
one_store = store_fixture("sqlite")

WORDS = [f"word{i} " for i in range(8)]


def runner_of(store: Any, **config: Any) -> StromaRunner:
    return StromaRunner.quick(store=store, **{"events": "store", "policy_map": NEVER, **config})


async def say(state: Num) -> Text:
    """Emit the words, and return them."""
    for word in WORDS:
        current_node().emit(word)
        await asyncio.sleep(0.001)
    return Text(text="".join(WORDS))


talk = Pipeline("talk", [node("say", say, output=Text)])


async def collect(events: AsyncIterator[StreamEvent]) -> list[StreamEvent]:
    return [event async for event in events]


def plain(event: StreamEvent) -> dict[str, Any]:
    """Return what a stream and a follow have in common."""
    data = event.to_dict()
    return {name: value for name, value in data.items() if name not in ("number", "cursor", "details")}


async def started(runner: StromaRunner, work: Any, run_id: str = "run", **options: Any) -> asyncio.Task[Any]:
    """Start a run; return its task once the run is in the store."""
    run = asyncio.create_task(runner.run(work, Num(n=3), run_id=run_id, **options))
    store: Any = runner.checkpoint_manager.store
    await until(lambda: store.exists() and store.get_run(run_id) is not None)
    return run


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_follow_has_the_events_of_a_stream(store: Any) -> None:
    """Whoever follows a run, during it or afterwards, sees the events and the end that its stream has."""
    runner = runner_of(store)
    live: asyncio.Task[list[StreamEvent]] | None = None
    streamed: list[StreamEvent] = []
    async with runner.stream(talk, Num(n=1), run_id="run") as stream:
        async for event in stream:
            streamed.append(event)
            if event.kind == "node_start":
                live = asyncio.create_task(collect(runner.follow("run")))
    assert live is not None
    followed = await live
    assert [plain(event) for event in followed] == [plain(event) for event in streamed]
    assert await collect(runner.handle("run", talk).follow()) == followed
    assert followed[-1].details == streamed[-1].details
    assert [event.number for event in followed] == list(range(1, len(followed) + 1))
    assert followed[1].to_sse().startswith("id: 1-2\nevent: node_start\n")
    assert StreamEvent.from_dict(json.loads(json.dumps(followed[3].to_dict()))) == followed[3]


async def test_a_follow_has_text_with_a_lone_surrogate(store: Any) -> None:
    """A cut emoji in emitted text and in an output loses no event."""

    async def cut(state: Num) -> Text:
        current_node().emit("cut \ud83d")
        return Text(text="\ud83d")

    runner = runner_of(store)
    await runner.run([node("cut", cut, output=Text)], Num(), run_id="run")
    events = await collect(runner.follow("run"))
    kinds = [event.kind for event in events]
    assert kinds == ["run_start", "node_start", "node_event", "node_success", "run_end"]
    assert events[2].data == "cut \ud83d"
    assert events[3].state == {"text": "\ud83d"}


async def test_a_follow_continues_after_any_event(store: Any) -> None:
    """From the cursor of each event on, exactly the later ones come, and after the end none."""
    runner = runner_of(store)
    await runner.run(talk, Num(n=1), run_id="run")
    every = await collect(runner.follow("run"))
    for number, event in enumerate(every, start=1):
        assert await collect(runner.follow("run", after=event.cursor)) == every[number:]


async def fail(state: Any) -> Any:
    current_node().emit("half a sen")
    raise ValueError("no more")


async def wait(state: Num) -> Text:
    current_node().emit("half a sen")
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize("kind", ["PARTIAL", "CANCELLED", "RESUMED"])
async def test_the_end_is_that_of_the_record(store: Any, kind: str) -> None:
    """A run that fails, is cancelled or resumed ends for a follower as it ended, with usage and reason."""
    func = {"PARTIAL": fail, "CANCELLED": wait, "RESUMED": say}[kind]
    runner, work = runner_of(store), [node("before", lambda s: s), node("work", func, output=Text)]
    if kind == "RESUMED":
        await runner.run(work[:1], Num(n=3), run_id="run")
    options = {"resume": True} if kind == "RESUMED" else {}
    run = await started(runner, work, **options)
    page = Page()
    if kind == "CANCELLED":
        await page.read(runner.follow("run"), 5)
        assert await runner.cancel("run")
    result = await run
    await page.read(runner.follow("run", page.cursor))
    details = page.end.details
    assert details["status"] == result.status == kind
    assert details["final_state"] == result.final_state.model_dump()
    if kind == "PARTIAL":
        assert result.failure is not None
        assert details["failure"] == {"class": "AMBIGUOUS", "message": "no more", "reason": None}
    else:
        assert "failure" not in details
    assert page.texts == {}


async def test_a_retry_discards_the_half_sentence(store: Any) -> None:
    """A page that goes by the rule shows the text of the attempt in progress, and the truth in the end."""

    async def stumble(state: Num) -> Text:
        if current_node().attempt == 1:
            return await fail(state)
        return await say(state)

    runner = runner_of(store, policy_map=ONCE)
    await runner.run([node("say", stumble, output=Text)], Num(n=1), run_id="run")
    page = Page()
    await page.read(runner.follow("run"))
    assert page.seen[0] == "half a sen"
    assert page.seen[1:] == ["".join(WORDS[: i + 1]) for i in range(8)]
    assert page.truths == {(0, ""): {"text": "".join(WORDS)}}
    assert [kind for kind in page.kinds if kind != "node_event"] == [
        "run_start",
        "node_start",
        "node_failure",
        "node_retry",
        "node_start",
        "node_success",
        "run_end",
    ]


async def asked(runner: StromaRunner) -> tuple[Page, str]:
    """Follow a run until it is suspended. Return the page and the cursor of that event."""
    page = Page()
    async with aclosing(runner.follow("run")) as events:
        async for event in events:
            page.take(event)
            if event.kind == "run_suspended":
                break
    assert event.details["suspended"] == ["how many?"]
    assert event.details["questions"][0]["kind"] == "approval"
    assert event.to_sse().startswith("id: 1-suspended\n")
    return page, event.cursor


async def test_a_follow_goes_on_over_suspensions(store: Any) -> None:
    """A suspension comes once, with its questions, also after a reconnect; an answer and the end follow."""
    runner = runner_of(store)

    @runner.flow("ask", input=Num, output=Text)
    async def ask(flow: Flow, state: Num) -> Text:
        answer = await flow.wait_for(Num, reason="how many?")
        return await flow.step(node("say", say, output=Text), answer)

    await runner.run(ask, Num(n=1), run_id="run")
    page, cursor = await asked(runner)
    following = asyncio.create_task(page.read(runner.follow("run", page.cursor)))
    await asyncio.sleep(0.3)
    assert page.cursor == cursor
    await runner.signal("run", Num(n=2))
    other = runner_of(store)
    other._flows = runner._flows
    await other.resume(ask, "run")
    await following
    assert (page.kinds.count("run_suspended"), page.status) == (1, "RESUMED")
    followed = await collect(runner.follow("run"))
    assert (followed[0].kind, followed[-1]) == ("run_start", page.end)
    assert "run_suspended" not in [event.kind for event in followed]  # It is over.


async def test_a_suspension_says_what_the_run_waits_for(store: Any) -> None:
    """The event of a suspension has the questions that are open; a later reconnect does not repeat it."""
    runner = runner_of(store)

    @runner.flow("ask", input=Num, output=Num)
    async def ask(flow: Flow, state: Num) -> Num:
        return await flow.wait_for(Num, reason="how many?")

    await runner.run(ask, Num(n=1), run_id="run")
    page, _cursor = await asked(runner)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await page.read(runner.follow("run", page.cursor))
    await runner.cancel("run")
    await page.read(runner.follow("run", page.cursor))
    assert page.status == "CANCELLED"


async def test_a_run_without_stored_events(store: Any) -> None:
    """It has its suspensions and its end."""
    runner = runner_of(store, events="none")
    await runner.run(talk, Num(n=1), run_id="run")
    (event,) = await collect(runner.follow("run"))
    assert (event.kind, event.details["status"]) == ("run_end", "COMPLETED")


async def test_a_queued_run_is_waited_for(store: Any) -> None:
    """Whoever follows a run before it starts sees it from its start."""
    runner = runner_of(store)
    handle = await runner.submit(talk, Num(n=1), run_id="run")
    page = Page()
    following = asyncio.create_task(page.read(handle.follow()))
    await asyncio.sleep(0.15)
    assert page.kinds == []
    await runner.drive("run", pipelines=[talk])
    await following
    assert page.kinds[0] == "run_start"
    assert page.end is not None


async def test_a_resumed_run_has_the_truth_of_what_was_committed(store: Any) -> None:
    """A process that resumes yields the outputs of committed nodes for readers that missed their ends."""
    runner = runner_of(store, events="none")
    work = [node("say", say, output=Text), node("fail", fail, input=Text, output=Text)]
    await runner.run(work, Num(n=1), run_id="run")
    await runner_of(store).run(work, Num(n=1), run_id="run", resume=True)
    page = Page()
    await page.read(runner.follow("run"))
    assert page.truths == {(0, ""): {"text": "".join(WORDS)}}


def sentence_of(attempt_id: str) -> list[str]:
    return [f"<{attempt_id} {i}>" for i in range(8)]


class Speaker:
    """A node that stops in the middle of its sentence until it is let go, the first ``deaths`` times."""

    def __init__(self, deaths: int, rng: random.Random) -> None:
        self.stops = [rng.randrange(1, 8) for _ in range(deaths)]
        self.stopped = 0
        self.let_go = asyncio.Event()

    async def speak(self, state: Num) -> Text:
        stop = self.stops.pop(0) if self.stops else None
        sentence = sentence_of(str(current_node().attempt_id))
        for i, part in enumerate(sentence):
            if i == stop:
                self.stopped += 1
                await self.let_go.wait()
            current_node().emit(part)
            await asyncio.sleep(0.005)
        return Text(text="".join(sentence))


@pytest.mark.parametrize("seed", range(4))
async def test_a_run_that_is_taken_over_in_the_middle_of_a_sentence(store: Any, seed: int) -> None:
    """A follower that reconnects shows sentences of one attempt only, in the end the right one."""
    rng = random.Random(seed)
    speaker = Speaker(2, rng)
    work = [node("speak", speaker.speak, output=Text)]
    page = Page()

    async def watch() -> None:
        while page.end is None:
            await page.read(runner_of(store).follow("run", page.cursor), rng.randrange(1, 6))

    watching: asyncio.Task[None] | None = None
    owners: list[asyncio.Task[Any]] = []
    for number in range(3):
        options: dict[str, Any] = {"resume": True, "if_running": "take_over"} if number else {}
        owners.append(asyncio.create_task(runner_of(store).run(work, Num(n=1), run_id="run", **options)))
        if number < 2:
            await until(lambda: speaker.stopped > len(owners) - 1)
        else:
            speaker.let_go.set()
        if watching is None:
            watching = asyncio.create_task(watch())
        await asyncio.sleep(rng.choice((0.0, 0.05, 0.15)))
    result = await owners[-1]
    assert watching is not None
    await watching
    await asyncio.gather(*owners, return_exceptions=True)
    assert page.truths == {(0, ""): result.final_state.model_dump()}
    for text in page.seen:
        attempt_id = text[1:].partition(" ")[0]
        assert "".join(sentence_of(attempt_id)).startswith(text)
    assert page.seen[-1] == result.final_state.text
    # Whoever comes later sees the same, whatever the fenced owners have appended since.
    later = Page()
    await later.read(runner_of(store).follow("run"))
    assert later.truths == page.truths
    assert later.seen[-8:] == page.seen[-8:]


async def test_an_unknown_run(store: Any) -> None:
    """It is an error that names the run, as a text that is no cursor is one, at once."""
    runner = runner_of(store)
    await runner.run(talk, Num(n=1), run_id="other")
    with pytest.raises(CheckpointNotFound, match="there is no run 'run'"):
        await collect(runner.follow("run"))
    with pytest.raises(ValueError, match="must be the cursor of an event, got 'nothing'"):
        runner.follow("run", after="nothing")
    with pytest.raises(ValueError, match="run id"):
        runner.follow("")


@pytest.mark.parametrize("way", ["delete", "restart"])
async def test_a_run_that_is_deleted_or_restarted_meanwhile(store: Any, way: str) -> None:
    """Its follower gets an error that says so; a new follower sees the new execution only."""
    runner = runner_of(store)
    run = await started(runner, [node("wait", wait, output=Text)])
    page = Page()
    with pytest.raises(CheckpointNotFound, match="there is no run" if way == "delete" else "restarted"):
        async with aclosing(runner.follow("run")) as events:
            async for event in events:
                page.take(event)
                if event.kind == "node_event":
                    if way == "delete":
                        deleted = store.delete("run")
                        await (deleted if asyncio.iscoroutine(deleted) else asyncio.sleep(0))
                    else:
                        options: dict[str, Any] = {"if_exists": "restart", "if_running": "take_over"}
                        await runner_of(store).run(talk, Num(n=1), run_id="run", **options)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    if way == "restart":
        again = Page()
        await again.read(runner.follow("run", page.cursor))
        assert "".join(WORDS) in again.seen
        assert again.end is not None


async def test_a_cursor_of_a_run_that_was_deleted(store: Any) -> None:
    """After a run was deleted and begun again, a cursor of it is an error, so its reader begins again."""
    runner = runner_of(store)
    await runner.run(talk, Num(n=1), run_id="run")
    with pytest.raises(CheckpointNotFound, match="run 'run' has no event '7-12'"):
        await collect(runner.follow("run", after="7-12"))


async def test_a_store_without_a_journal() -> None:
    """Following says that a journal is needed; a run that should store its events warns, and runs."""
    runner = runner_of(SimpleStore())
    assert (await runner.run(talk, Num(n=1), run_id="run")).status == "COMPLETED"
    with pytest.raises(StoreError, match="has no journal of runs"):
        await collect(runner.follow("run"))


async def test_a_follower_that_stands_still_holds_one_page(one_store: Any) -> None:
    """However much is stored meanwhile, a follower that does not read keeps at most a page in memory."""

    async def flood(state: Num) -> Text:
        for _ in range(12):
            for i in range(900):
                current_node().emit(i)
            await asyncio.sleep(0.11)
        return Text(text="")

    runner = runner_of(one_store)
    run = await started(runner, [node("flood", flood, output=Text)])
    async with aclosing(runner.follow("run")) as events:
        await anext(events)
        await run
        await asyncio.sleep(1.1)  # Shared reads are forgotten.
        gc.collect()
        held = sum(type(one) is StreamEvent for one in gc.get_objects())
        rest = [event async for event in events]
    assert len(rest) > 10_000
    assert held <= 2600


async def test_500_followers_share_their_reads(one_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Followers of one run read the store together: 500, some later, read about as often as one."""
    counts = {"reads": 0}
    read_events = one_store.read_events

    def counted(*args: Any) -> Any:
        counts["reads"] += 1
        return read_events(*args)

    monkeypatch.setattr(one_store, "read_events", counted)
    go = asyncio.Event()

    async def speak(state: Num) -> Text:
        await go.wait()
        for _ in range(10):
            current_node().emit("x")
            await asyncio.sleep(0.1)
        return Text(text="x" * 10)

    runner = runner_of(one_store)
    run = await started(runner, [node("speak", speak, output=Text)])
    followers = [asyncio.create_task(collect(runner.follow("run"))) for _ in range(250)]
    go.set()
    await asyncio.sleep(0.5)
    followers += [asyncio.create_task(collect(runner_of(one_store).follow("run"))) for _ in range(250)]
    await run
    every = await asyncio.gather(*followers)
    assert all(one == every[0] for one in every)
    assert len(every[0]) == 14
    assert counts["reads"] < 60
    # Nothing of it stays.
    await asyncio.sleep(1.2)
    (reads,) = follow_module._READS[one_store].values()
    assert reads._reads == {}


async def test_followers_that_leave_end_the_reads(one_store: Any) -> None:
    """When the last follower of a run is gone, nothing reads it any more, and the others of a place stay."""
    runner = runner_of(one_store)
    run = await started(runner, [node("wait", wait, output=Text)])
    pages = [Page(), Page()]
    followers = [asyncio.create_task(page.read(runner.follow("run"))) for page in pages]
    await until(lambda: all(len(page.kinds) == 3 for page in pages))
    (reads,) = follow_module._READS[one_store].values()
    (polling,) = [read.task for read in reads._reads.values() if not read.task.done()]
    followers[0].cancel()
    await asyncio.gather(followers[0], return_exceptions=True)
    assert not polling.done()
    followers[1].cancel()
    await asyncio.gather(followers[1], return_exceptions=True)
    await asyncio.sleep(0)
    assert polling.cancelled()
    late = Page()
    following = asyncio.create_task(late.read(runner.follow("run", pages[0].cursor)))
    await runner.cancel("run")
    await run
    await following
    assert late.end is not None


async def test_a_store_is_not_held_by_its_followers() -> None:
    """A store that was followed is collected when nothing else references it."""
    gc.collect()
    before = len(follow_module._READS)
    runner = runner_of(InMemoryStore())
    await runner.run(talk, Num(n=1), run_id="run")
    await collect(runner.follow("run"))
    assert len(follow_module._READS) == before + 1
    del runner
    await asyncio.sleep(1.1)
    gc.collect()
    assert len(follow_module._READS) == before


async def test_more_events_than_fit(store: Any) -> None:
    """A node that emits faster than they are written loses its oldest ones, counted by one event."""
    count = 5000

    async def flood(state: Num) -> Text:
        for i in range(count):
            current_node().emit(i)
        return Text(text="")

    runner = runner_of(store)
    await runner.run([node("flood", flood, output=Text)], Num(n=1), run_id="run")
    events = await collect(runner.follow("run"))
    data = [event.data for event in events if event.kind == "node_event"]
    assert data == list(range(count - 1000, count))
    (dropped,) = [event for event in events if event.kind == "events_dropped"]
    assert dropped.details == {"dropped": count - 1000}
    assert events.index(dropped) == 2
    assert await collect(runner.follow("run", dropped.cursor)) == events[3:]


async def test_an_event_that_is_too_large(one_store: Any) -> None:
    """Its data is left out, with the size, and the run goes on; the output is in the journal."""

    async def much(state: Num) -> Text:
        current_node().emit("x" * 1_100_000)
        return Text(text="y" * 1_100_000)

    runner = runner_of(one_store)
    await runner.run([node("much", much, output=Text)], Num(n=1), run_id="run")
    events = {event.kind: event for event in await collect(runner.follow("run"))}
    assert events["node_event"].data is events["node_success"].state is None
    assert events["node_event"].details["omitted_bytes"] > 1_100_000
    assert events["node_success"].details["omitted_bytes"] > 1_100_000
    assert len(events["run_end"].details["final_state"]["text"]) == 1_100_000


async def test_old_events_are_missing_from_the_start(one_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long run the oldest events are deleted: a follow begins with their number, and has the rest."""
    monkeypatch.setattr(sql_rows, "MAX_BATCHES", 3)
    monkeypatch.setattr(session_module, "_TRIM_INTERVAL", 1)

    async def slowly(state: Num) -> Text:
        for word in WORDS:
            current_node().emit(word)
            await asyncio.sleep(0.11)
        return Text(text="".join(WORDS))

    runner = runner_of(one_store)
    await runner.run([node("say", slowly, output=Text)], Num(n=1), run_id="run")
    events = await collect(runner.follow("run"))
    assert events[0].kind == "events_dropped"
    assert events[0].number == 1
    assert events[0].details["dropped"] == 11 - (len(events) - 2)
    assert [event.kind for event in events[-2:]] == ["node_success", "run_end"]


def test_what_is_missing_is_counted_for_each_session() -> None:
    """Numbers missing within a session are one event, also at its ends, as are lines that are no events."""

    def batch(epoch: int, last: int, *numbers: int) -> EventBatch:
        lines = [json.dumps({"number": n, "kind": "node_event", "run_id": "run"}) for n in numbers]
        return EventBatch(
            EventPlace(epoch, last), "\n".join(["nothing", "[1]", '{"number": "x"}', *lines]).encode()
        )

    batches = [batch(1, 4, 3, 4), EventBatch(EventPlace(1, 6), None), batch(3, 2, 2, 1, 9), batch(4, 2, 1, 2)]
    page = EventPage(1, 1, 4, None, batches)
    found = [
        (str(at), event.kind, event.details.get("dropped"))
        for at, event in decode_events("run", page, EventPlace(1, 1))
    ]
    assert found == [
        ("1-2", "events_dropped", 1),
        ("1-3", "node_event", None),
        ("1-4", "node_event", None),
        ("1-6", "events_dropped", 2),
        ("3-1", "events_dropped", 1),
        ("3-2", "node_event", None),
        ("4-1", "node_event", None),
        ("4-2", "node_event", None),
    ]
    assert [event.cursor for _, event in decode_events("run", page, EventPlace(3, 2))] == ["4-1", "4-2"]


async def test_a_damaged_batch_is_missing(one_store: Any) -> None:
    """Events of a damaged batch are counted as dropped, and those around it come."""
    runner = runner_of(one_store)
    await runner.run(talk, Num(n=1), run_id="run")
    before = await collect(runner.follow("run"))
    await one_store._submit(
        lambda rows: rows.db.execute(
            "UPDATE events SET data = CAST(data || x'20' AS BLOB) WHERE last = (SELECT min(last) FROM events)"
        )
    )
    events = await collect(runner.follow("run"))
    assert events[0].kind == "events_dropped"
    assert events[1:] == before[events[0].details["dropped"] :]


@pytest.mark.parametrize("way", ["refused", "seal", "encode"])
async def test_events_that_are_lost_touch_nothing(
    one_store: Any, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that cannot take or seal events changes nothing about the run, and is logged once."""
    if way == "refused":
        monkeypatch.setattr(statements, "APPEND_EVENTS", "INSERT INTO nowhere VALUES (:run)")
    elif way == "seal":

        def broken(*_: Any) -> None:
            raise StoreError("no seal")

        monkeypatch.setattr(DurableSession, "append_events", broken)
    else:
        monkeypatch.setattr("stroma.runner.follow._encode", lambda event, number: 1 / 0)
    runner = runner_of(one_store)
    work = [node("say", say, output=Text), node("again", lambda s: s, input=Text, output=Text)]
    for number in range(2):
        result = await runner.run(work, Num(n=1), run_id=f"run {number}")
        assert result.status == "COMPLETED"
        assert one_store.get_run(f"run {number}").status == "COMPLETED"
    lost = [one for one in caplog.records if "events are lost" in one.getMessage()]
    assert len(lost) == 2  # once for each run
    (end,) = await collect(runner.follow("run 0"))
    assert end.kind == "run_end"


async def test_a_run_that_is_returned_stores_nothing(store: Any) -> None:
    """A call that only returns the outcome of a run adds no events to it."""
    runner = runner_of(store)
    await runner.run(talk, Num(n=1), run_id="run")
    events = await collect(runner.follow("run"))
    again = await runner.run(talk, Num(n=1), run_id="run", if_exists="return")
    assert again.status == "COMPLETED"
    assert await collect(runner.follow("run")) == events


async def test_hidden_data_is_not_stored(one_store: Any) -> None:
    """What ``redact`` hides from hooks is in no stored event, and in no end that a follower gets."""

    def hide(state: dict[str, Any]) -> dict[str, Any]:
        return {
            **state,
            **({"text": "hidden"} if "text" in state else {}),
            **({"delta": "hidden"} if "delta" in state else {}),
        }

    runner = runner_of(one_store, redact=hide)
    await runner.run(talk, Num(n=1), run_id="run")
    found = [json.dumps(event.to_dict()) for event in await collect(runner.follow("run"))]
    assert not [one for one in found if "word1" in one]
    assert sum("hidden" in one for one in found) == len(WORDS) + 2


async def test_redact_holds_for_the_last_message(one_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that ``redact`` removes from states are removed from the failure of "run_end" as well: in a
    stream, a follow, the stream of a run of another runner, and the parts of a chat that are made of them."""
    attached = asyncio.Event()

    def hide(state: dict[str, Any]) -> dict[str, Any]:
        return {key: "***" if key == "text" else value for key, value in state.items()}

    async def fail(state: Text) -> Text:
        await attached.wait()
        raise ValueError(f"no mailbox {state.text}")

    runner, other = [
        runner_of(one_store, redact=hide, classifiers=[lambda error, _: FailureClass.TERMINAL])
        for _ in range(2)
    ]
    work, state = [node("fail", fail, input=Text, output=Text)], Text(text="ada@example.org")
    streamed = asyncio.create_task(collect(runner.stream(work, state, run_id="run")))
    await until(lambda: one_store.exists() and one_store.get_run("run") is not None)
    manager = other.checkpoint_manager
    open_run = manager.open_run

    def watched(request: RunRequest) -> Any:
        if request.if_exists == "attach":
            attached.set()
        return open_run(request)

    monkeypatch.setattr(manager, "open_run", watched)
    attaching = asyncio.create_task(collect(other.stream(work, state, run_id="run", if_running="attach")))
    ends = [(await one)[-1] for one in (streamed, attaching)] + (await collect(runner.follow("run")))[-1:]
    messages = [one.details["failure"]["message"] for one in ends]
    assert messages == ["no mailbox [redacted]"] * 3

    @runner.flow
    async def ask(flow: Flow, state: Num) -> Num:
        found = await flow.step(node("find", lambda _: Text(text="ada@example.org"), output=Text), state)
        raise ValueError(f"no mailbox {found.text}")

    await runner.run(ask, Num(), run_id="flow")
    for protocol in (vercel, ag_ui):
        for one in (runner.stream(work, state), runner.follow("run"), runner.follow("flow")):
            parts = [json.dumps(part) async for part in protocol(one)]
            assert not [part for part in parts if "ada@" in part]


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_events_of_a_guarded_run_are_stored(one_store: Any, kind: str) -> None:
    """A run of a framework under a guard is followed as any other."""
    runner = runner_of(one_store)
    guard = Guard(runner)

    def call() -> None:
        with guard.run("hello", run_id="run"):
            guard.wrap("shout", lambda text: text.upper())("hello")

    async def acall() -> None:
        shout = computing(lambda text: text.upper())
        async with guard.run("hello", run_id="run"):
            await guard.wrap("shout", shout)("hello")

    await (acall() if kind == "async" else asyncio.to_thread(call))
    events = await collect(runner.follow("run"))
    assert [event.kind for event in events] == ["run_start", "node_start", "node_success", "run_end"]


async def test_hooks_of_the_runner_are_called_too(one_store: Any) -> None:
    """Storing events takes nothing from the hooks of the config."""
    started: list[str] = []

    start = noting(started, lambda run_id, node_id, state: node_id)
    runner = runner_of(one_store, hooks=NodeHooks(on_node_start=start))
    await runner.run(talk, Num(n=1), run_id="run")
    assert started == ["say"]
