"""``runner.serve``: continues the runs that are due, over every store."""

import asyncio
import logging
from datetime import timedelta
from typing import Any

import pytest
from pydantic import field_validator
from tests.fixtures import store_fixture
from tests.flows.steps import Clock, Text, World
from tests.kit import Num, SimpleStore, cancel, node, passing, quick_on
from tests.runner.serving import Serving
from tests.shared_stores import STORES
from tests.shared_stores import opened as open_kind
from tests.store_suite.helpers import due_runs

from stroma import (
    AsyncInMemoryStore,
    Flow,
    NodeHooks,
    Pipeline,
    RunStatus,
    StoreError,
    StromaRunner,
    parallel,
    stroma_flow,
)
from stroma.checkpoint.entries import RunRequest
from stroma.checkpoint.queue import Candidate, ClaimRequest, ServedCode
from stroma.contracts.schema import schema_of
from stroma.engine.context import RunJournal
from stroma.runner.drive import Ended, Suspended
from stroma.testing import FakeClock

store = store_fixture(*STORES)


def _sleepy(world: World) -> Any:
    add = world.step("add")

    @stroma_flow("sleepy", input=Num, output=Num)
    async def sleepy(flow: Flow, state: Num) -> Num:
        state = await flow.step(add, state)
        await flow.sleep(hours=1)
        return await flow.step(add, state)

    return sleepy


async def test_a_worker_wakes_a_sleeping_run(store: Any, clock: Clock) -> None:
    """A suspended run is continued once its wake time has come, and not before."""
    world = World()
    sleepy = _sleepy(world)
    assert (await quick_on(store).run(sleepy, Num(), run_id="r")).status is RunStatus.SUSPENDED
    async with Serving(quick_on(store), sleepy) as serving:
        clock.pass_by(minutes=59)
        await asyncio.sleep(0.1)
        assert (serving.outcomes, world.calls) == ({}, ["add 0"])
        clock.pass_by(minutes=1)
        await serving.until(1)
    assert serving.statuses("r") == ["RESUMED"]
    assert world.calls == ["add 0", "add 1"]


async def test_a_worker_continues_an_answered_run(store: Any, clock: Clock) -> None:
    """A run whose question was answered is continued; one whose timeout is over gets its TimeoutError."""

    @stroma_flow("ask", input=Num, output=Text)
    async def ask(flow: Flow, state: Num) -> Text:
        try:
            return await flow.wait_for(Text, reason="Well?", timeout=timedelta(days=7))
        except TimeoutError:
            return Text(text="late")

    for run_id in ("answered", "late"):
        await quick_on(store).run(ask, Num(), run_id=run_id)
    async with Serving(quick_on(store), ask) as serving:
        await quick_on(store).signal("answered", Text(text="yes"))
        await serving.until(1)
        assert serving.outcomes["answered"][0].output == Text(text="yes")
        clock.pass_by(days=7)
        await serving.until(2)
    assert serving.outcomes["late"][0].output == Text(text="late")


async def test_concurrency_is_bounded(clock: Clock) -> None:
    """At most max_concurrency runs are in progress at once; the others follow as these end."""
    active, most, release = 0, 0, asyncio.Event()

    async def work(state: Num) -> Num:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await release.wait()
        active -= 1
        return state

    step = node("work", work)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        await flow.sleep(hours=1)
        return await flow.step(step, state)

    store = AsyncInMemoryStore()
    for number in range(7):
        await quick_on(store).run(f, Num(), run_id=f"r{number}")
    clock.pass_by(hours=1)
    async with Serving(quick_on(store), f, max_concurrency=3) as serving:
        while active < 3:
            await asyncio.sleep(0.01)
        assert serving.health.active == 3
        release.set()
        await serving.until(7)
    assert (most, serving.health.active) == (3, 0)


@pytest.mark.parametrize("limits", [{"max_runs": 1}, {"max_runs_per_key": 1}], ids=" ".join)
async def test_the_next_run_starts_when_a_limit_allows_it(limits: dict[str, int]) -> None:
    """A worker queries the store at once when a run ends and others are due, also within ``max_runs``."""
    pipeline = Pipeline("p", [node("a", passing())], **limits)
    runner = quick_on(AsyncInMemoryStore())
    for number in range(3):
        await runner.submit(pipeline, Num(n=number), run_id=f"r{number}", key="k")
    async with Serving(runner, pipeline, poll_seconds=3600) as serving, asyncio.timeout(10):
        await serving.until(3)


async def test_a_shutdown_drains(store: Any, clock: Clock) -> None:
    """After a shutdown no run is taken up; one in progress ends, or another worker continues it."""
    world = World()
    sleepy = _sleepy(world)
    for number in (0, 100):
        await quick_on(store).run(sleepy, Num(n=number), run_id=f"r{number}")
    clock.pass_by(hours=1)
    world.dies_in = "add 1"
    async with Serving(quick_on(store), sleepy, max_concurrency=1) as serving:
        while "add 1" not in world.calls:
            await asyncio.sleep(0.01)
        assert serving.health.is_ok
        await serving.runner.shutdown(drain_seconds=0.05)
        await serving.task
        assert not serving.health.is_ok
        assert serving.statuses("r0") == ["INTERRUPTED"]
    world.dies_in = None
    taken = set(serving.outcomes)
    async with Serving(quick_on(store), sleepy) as serving:
        await serving.until(1 if "r100" in taken else 2)
    assert world.calls.count("add 1") == 2
    assert world.calls.count("add 101") == 1


async def test_a_worker_that_drains_gives_claimed_runs_back_as_they_were(store: Any) -> None:
    """A run claimed when its worker begins to drain has the same due time afterwards."""
    runner = StromaRunner.quick(store=store)
    pipeline = Pipeline("p", [World().step("a")])
    handle = await runner.submit(pipeline, Num(), run_id="r")
    due_ms = store.get_run("r").due_ms
    claim = store.claim

    async def claim_then_drain(request: Any) -> Any:
        claimed = await claim(request)
        draining.append(asyncio.ensure_future(runner.shutdown(drain_seconds=0)))
        await asyncio.sleep(0)
        return claimed

    draining: list[Any] = []
    store.claim = claim_then_drain
    try:
        await runner.serve(pipeline, poll_seconds=0.02)
    finally:
        del store.claim
    await asyncio.gather(*draining)
    assert (await handle.status(), store.get_run("r").due_ms) == ("QUEUED", due_ms)
    assert due_ms is not None
    assert store.queue_figures({"p": ServedCode()}, due_ms)["p"].oldest_due_ms == due_ms


async def test_a_cancelled_worker_interrupts_its_runs(store: Any, clock: Clock) -> None:
    """Cancelling serve() ends its runs as INTERRUPTED, so another worker continues them; others go on."""
    world = World()
    sleepy = _sleepy(world)
    await quick_on(store).run(sleepy, Num(), run_id="r")
    clock.pass_by(hours=1)
    world.dies_in = "add 1"
    serving = Serving(quick_on(store), sleepy)
    await world.dies.wait()
    await cancel(serving.task)
    assert serving.statuses("r") == ["INTERRUPTED"]
    assert store.get_run("r").status == "INTERRUPTED"
    assert await due_runs(store, clock.ms, "sleepy") == ["r"]


async def test_a_run_that_fails_does_not_stop_others(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged and tried again after 1 s, 2 s, and so on; others are continued meanwhile."""
    store = AsyncInMemoryStore()
    world = World()
    sleepy = _sleepy(world)
    changed = Pipeline("changed", [world.step("a")])
    runner = quick_on(store, pipeline="changed")
    # A run of another input class than the pipeline has now.
    opened = store.open_run(RunRequest("broken", "changed", Text(text="x"), schema_of(Text)))
    opened.end("INTERRUPTED", None)
    await quick_on(store).run(sleepy, Num(), run_id="r")
    clock.pass_by(hours=1)
    with caplog.at_level(logging.WARNING, "stroma"):
        async with Serving(runner, changed, sleepy) as serving:
            await serving.until(2)
            await asyncio.sleep(0.2)
    assert serving.statuses("r") == ["RESUMED"]
    assert len(serving.outcomes["broken"]) == 1
    message = next(r.getMessage() for r in caplog.records if "broken" in r.getMessage())
    assert message.endswith("trying again in 1 s")


def _refuse_outputs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Have every store refuse outputs while the returned list has an entry."""
    refuses, record = [True], RunJournal.record

    def refuse(self: Any, row: Any, schema: Any = None, output: Any = None, *more: Any) -> Any:
        if output is not None and refuses:
            return StoreError("AccessDenied")
        return record(self, row, schema, output, *more)

    monkeypatch.setattr("stroma.engine.commit._STORE_DELAYS", ())
    monkeypatch.setattr(RunJournal, "record", refuse)
    return refuses


async def test_a_run_whose_store_refuses_its_commits_waits_longer_each_time(
    store: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused commit makes the run due after a doubling delay; another run waits for the first delay."""
    refuses, world = _refuse_outputs(monkeypatch), World()
    pipeline = Pipeline("p", [world.step("add")])
    await quick_on(store).submit(pipeline, Num(), run_id="r")
    for calls, seconds in ((1, 5), (2, 10)):
        async with Serving(quick_on(store), pipeline) as serving:
            await serving.until(1)
            assert [str(one) for one in serving.outcomes["r"]] == ["AccessDenied"]
            clock.pass_by(seconds=seconds - 1)
            await asyncio.sleep(0.1)
            assert len(world.calls) == calls
        assert store.get_run("r").status == "INTERRUPTED"
        clock.pass_by(seconds=1)
    runner = quick_on(store)
    with pytest.raises(StoreError, match="AccessDenied"):
        await runner.drive("r", pipelines=[pipeline])
    waiting = await runner.drive("r", pipelines=[pipeline])
    assert isinstance(waiting, Suspended)
    assert waiting.until.timestamp() == pytest.approx(clock.ms / 1000 + 20)
    clock.pass_by(seconds=20)
    refuses.clear()
    assert await runner.drive("r", pipelines=[pipeline]) == Ended("r", RunStatus.RESUMED)
    assert len(world.calls) == 4


async def test_a_run_whose_failure_hook_is_not_async_waits_longer_each_time(clock: Clock) -> None:
    """A worker with a hook that is not async does not call the node of a run again at once."""
    store, calls = AsyncInMemoryStore(), []
    hooks: Any = NodeHooks(on_node_failure=lambda *_: None)  # type: ignore[arg-type, return-value]

    async def fail(state: Num) -> Any:
        calls.append(1)
        raise ValueError("no")

    pipeline = Pipeline("p", [node("fail", fail)])
    await quick_on(store).submit(pipeline, Num(), run_id="r")
    for count in (1, 2):
        async with Serving(quick_on(store, hooks=hooks), pipeline) as serving:
            await serving.until(1)
            await asyncio.sleep(0.1)
            assert len(calls) == count
        clock.pass_by(seconds=5 * count)


async def test_a_run_whose_end_hook_is_not_async_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    """A worker with an end hook that is not async names it, and says that the run has ended, not that it is
    tried again.
    """
    store, world = AsyncInMemoryStore(), World()
    hooks: Any = NodeHooks(on_run_end=lambda *_: None)  # type: ignore[arg-type, return-value]
    pipeline = Pipeline("p", [world.step("add")])
    await quick_on(store).submit(pipeline, Num(), run_id="r")
    async with Serving(quick_on(store, hooks=hooks), pipeline) as serving:
        await serving.until(1)
    assert store.get_run("r").status == "COMPLETED"
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("run r has ended, COMPLETED: hook on_run_end is not async: ")


async def test_a_stored_input_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The line about a stored input that its class refuses is one line, and has no value of the input."""

    class Strict(Text):
        @field_validator("text")
        @classmethod
        def _known(cls, text: str) -> str:
            raise ValueError(f"unknown: {text}")

    store = AsyncInMemoryStore()
    text = "x\nCRITICAL root logged in: patient 4711"
    opened = store.open_run(RunRequest("broken", "changed", Text(text=text), schema_of(Text)))
    opened.end("INTERRUPTED", None)
    pipeline = Pipeline("changed", [node("a", passing(), Strict, Strict)])
    async with Serving(quick_on(store, pipeline="changed"), pipeline) as serving:
        await serving.until(1)
    (line,) = [r.getMessage() for r in caplog.records if "broken" in r.getMessage()]
    assert "is not a Strict: text (value_error); restore its schema; trying again in" in line
    assert "4711" not in caplog.text
    assert "\n" not in line


async def test_what_on_result_raises_is_logged_in_single_lines(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback of an on_result that raises cannot forge a line of the log."""

    def on_result(run_id: str, outcome: Any) -> None:
        raise ValueError("no\nCRITICAL forged")

    store = AsyncInMemoryStore()
    opened = store.open_run(RunRequest("broken", "changed", Text(text="x"), schema_of(Text)))
    opened.end("INTERRUPTED", None)
    runner = quick_on(store, pipeline="changed")
    serving = asyncio.ensure_future(
        runner.serve(Pipeline("changed", [World().step("a")]), poll_seconds=0.02, on_result=on_result)
    )
    while "forged" not in caplog.text:
        await asyncio.sleep(0.01)
    await runner.shutdown()
    await serving
    assert "no\\nCRITICAL forged" in caplog.text
    assert "\nCRITICAL" not in caplog.text


async def test_a_store_that_is_away_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    """A worker outlives a store that cannot be read; its health tells after a minute."""
    store = AsyncInMemoryStore()
    polls, is_away = 0, False
    claim = store.claim

    async def failing(request: ClaimRequest) -> list[Candidate]:
        nonlocal polls
        polls += 1
        if is_away:
            raise StoreError("the server is away")
        return await claim(request)

    store.claim = failing
    world = World()
    sleepy = _sleepy(world)
    with FakeClock() as fake:
        async with Serving(quick_on(store), sleepy, poll_seconds=1.0) as serving:
            await asyncio.sleep(10)
            assert 6 <= polls <= 21
            polls, is_away = 0, True
            await asyncio.sleep(59)
            assert polls < 20
            assert serving.health.failing_since is not None
            is_away = False
            await asyncio.sleep(50)
            assert serving.health.failing_since is None
            assert await serving.runner.run(sleepy, Num(), run_id="r")
            await asyncio.sleep(3610)
            assert serving.statuses("r") == ["RESUMED"]
        assert fake.elapsed > 3600
    texts = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [text for text in texts if "in memory" not in text] == [
        "the store cannot be asked for due runs: the server is away; trying again"
    ]


async def test_wrong_arguments(tmp_path: Any) -> None:
    """Wrong arguments of serve() and a store that cannot be used are errors of the call."""
    runner = quick_on(AsyncInMemoryStore())
    world = World()
    a = world.step("a")
    one = Pipeline("one", [a])
    with pytest.raises(ValueError, match="at least one"):
        await runner.serve()
    with pytest.raises(ValueError, match="distinct names"):
        await runner.serve(one, Pipeline("one", [a, a]))
    with pytest.raises(ValueError, match="max_concurrency"):
        await runner.serve(one, max_concurrency=0)
    with pytest.raises(ValueError, match="poll_seconds"):
        await runner.serve(one, poll_seconds=0)
    with pytest.raises(TypeError, match="pass a flow or Pipeline"):
        await runner.serve([a])
    with pytest.raises(TypeError, match="starts with"):
        await runner.serve(Pipeline("group", [parallel(a, world.step("b"))]))

    with pytest.raises(StoreError, match="no journal"):
        await quick_on(SimpleStore()).serve(one)
    broken = tmp_path / "runs.db"
    broken.write_text("no database, but text that is long enough to be read as the header of one" * 20)
    with pytest.raises(StoreError):
        await quick_on(open_kind("sqlite", str(broken))).serve(one)


async def test_an_answer_that_comes_while_a_run_is_suspended_is_taken_at_once(store: Any) -> None:
    """A run answered before its worker has left it is continued by that worker at once."""

    @stroma_flow("ask", input=Num, output=Text)
    async def ask(flow: Flow, state: Num) -> Text:
        return await flow.wait_for(Text, reason="Well?")

    runner = quick_on(store)
    handles = [await runner.submit(ask, Num(), run_id=f"r{number}") for number in range(20)]

    async def answer(run_id: str) -> None:
        while True:
            try:
                return await runner.signal(run_id, Text(text="yes"))
            except StoreError:  # It has not asked yet.
                await asyncio.sleep(0)

    async with Serving(quick_on(store), ask, poll_seconds=0.01):
        async with asyncio.timeout(20):
            await asyncio.gather(*(answer(handle.run_id) for handle in handles))
            results = await asyncio.gather(*(handle.result() for handle in handles))
    assert [result.output for result in results] == [Text(text="yes")] * 20
