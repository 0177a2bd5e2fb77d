"""``runner.submit`` and the handle of a run, with workers that execute it; over every store."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, create_model
from tests.fixtures import store_fixture
from tests.flows.steps import World
from tests.kit import Num, Text, cancel, node, quick_on, record_hooks, same
from tests.shared_stores import STORES

from stroma import (
    AsyncInMemoryStore,
    CheckpointNotFound,
    Flow,
    Pipeline,
    PipelineChanged,
    RunExists,
    RunStatus,
    SQLiteStore,
    StoreError,
    StromaRunner,
    parallel,
    stroma_flow,
)
from stroma.runner import submission
from stroma.runner.drive import Blocked, Ended

store = store_fixture(*STORES)


class Counts(BaseModel):
    by_name: dict[str, int]


@asynccontextmanager
async def serving(store: Any, *pipelines: Any, **options: Any) -> AsyncIterator[StromaRunner]:
    """Serve pipelines in this process, with another runner than the one that submits."""
    runner = quick_on(store)
    task = asyncio.ensure_future(runner.serve(*pipelines, **{"poll_seconds": 0.02, **options}))
    try:
        yield runner
    finally:
        await runner.shutdown()
        await task


async def test_a_worker_executes_a_submitted_run(store: Any) -> None:
    """A submitted run waits as QUEUED; a worker executes it from the start, its handle returns the result."""
    world = World()
    pipeline = Pipeline("p", [world.step("a"), world.step("b")])
    handle = await quick_on(store).submit(pipeline, Num(n=3), run_id="r")
    assert (handle.run_id, await handle.status(), world.calls) == ("r", "QUEUED", [])
    async with serving(store, pipeline):
        result = await handle.result(timeout=20)
    assert (result.status, result.output, result.run_id) == (RunStatus.COMPLETED, Num(n=5), "r")
    assert (await handle.status(), world.calls) == ("COMPLETED", ["a 3", "b 4"])


async def test_a_flow_that_asks(store: Any) -> None:
    """A handle waits over a suspension: an answer continues the run, and result() returns its end."""
    runner = quick_on(store)

    @runner.flow("ask", input=Num, output=Text)
    async def ask(flow: Flow, state: Num) -> Text:
        return await flow.wait_for(Text, reason="Well?")

    handle = await runner.submit(ask, Num())
    async with serving(store, ask):
        waiting = asyncio.ensure_future(handle.result(timeout=20))
        while await handle.status() != "SUSPENDED":
            await asyncio.sleep(0.01)
        await runner.signal(handle.run_id, Text(text="yes"))
        assert (await waiting).output == Text(text="yes")
    assert (await runner.handle(handle.run_id).result(timeout=20)).output == Text(text="yes")


async def test_every_end_is_a_result(store: Any) -> None:
    """result() returns a failed, a cancelled and an expired run as their results, and raises none of it.

    The failure of the expired run names what starts it after all: submitting it again does not.
    """
    world = World()
    world.failing.add("a")
    pipeline = Pipeline("p", [world.step("a")])
    runner = quick_on(store)
    failed = await runner.submit(pipeline, Num())
    late = await runner.submit(pipeline, Num(), expires=0.0)
    cancelled = await runner.submit(pipeline, Num())
    assert await cancelled.cancel()
    assert (await cancelled.status(), await cancelled.cancel()) == ("CANCELLED", False)
    await asyncio.sleep(0.01)
    async with serving(store, pipeline):
        results = await asyncio.gather(*(one.result(timeout=20) for one in (failed, late, cancelled)))
    assert [str(result.status) for result in results] == ["PARTIAL", "FAILED", "CANCELLED"]
    failures = [result.failure for result in results]
    assert "a 0 failed" in failures[0].message
    assert failures[1].reason == "expired"
    assert world.calls == ["a 0"]
    await runner.submit(pipeline, Num(), run_id=late.run_id, expires=3600)
    assert await late.status() == "FAILED"
    assert "resume it" in failures[1].message
    world.failing.clear()
    assert (await runner.resume(pipeline, late.run_id)).status is RunStatus.RESUMED


async def test_giving_up_a_wait_changes_nothing(store: Any) -> None:
    """A result() that times out or is cancelled leaves the run as it is, and others that wait for it."""
    world = World()
    pipeline = Pipeline("p", [world.step("a")])
    handle = await quick_on(store).submit(pipeline, Num())
    with pytest.raises(TimeoutError, match=f"run '{handle.run_id}' has not ended within 0.05 s"):
        await handle.result(timeout=0.05)
    waits = [asyncio.ensure_future(handle.result(timeout=20)) for _ in range(2)]
    await asyncio.sleep(0.05)
    waits[0].cancel()
    assert await handle.status() == "QUEUED"
    async with serving(store, pipeline):
        assert (await waits[1]).status is RunStatus.COMPLETED


async def test_a_wait_without_time_looks_once(store: Any) -> None:
    """result(timeout=0) returns the result of a run that has ended, and raises TimeoutError for any other."""
    pipeline = Pipeline("p", [World().step("a")])
    handle = await quick_on(store).submit(pipeline, Num())
    with pytest.raises(TimeoutError, match=f"run '{handle.run_id}' has not ended within 0 s"):
        await handle.result(timeout=0)
    async with serving(store, pipeline):
        await handle.result(timeout=20)
    assert (await handle.result(timeout=0)).status is RunStatus.COMPLETED
    with pytest.raises(CheckpointNotFound):
        await quick_on(store).handle("unknown", pipeline).result(timeout=0)


async def test_a_wait_that_begins_beside_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is queried soon after a wait starts, also if other waits make the next query a late one."""
    monkeypatch.setattr(submission, "_POLL_SECONDS", (0.02, 3600.0))
    store, looked = AsyncInMemoryStore(), asyncio.Event()
    pipeline, runner = Pipeline("p", [World().step("a")]), quick_on(store)
    long, short = [await runner.submit(pipeline, Num(), run_id=run_id) for run_id in ("long", "short")]
    await runner.drive("short", pipelines=[pipeline])
    loop, statuses = asyncio.get_running_loop(), store.statuses

    def look(run_ids: Sequence[str]) -> dict[str, str]:
        loop.call_soon_threadsafe(looked.set)
        return statuses(run_ids)

    monkeypatch.setattr(store, "statuses", look)
    waiting = asyncio.ensure_future(long.result())
    await looked.wait()
    runner._waits_here()._delay = 3600.0
    await asyncio.sleep(0.1)  # By now the next query is an hour away.
    async with asyncio.timeout(10):
        assert (await short.result()).status is RunStatus.COMPLETED
    await cancel(waiting)


async def test_a_wait_that_begins_while_the_store_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure of a query ends the waits that it was for. One that began meanwhile ends with its run."""
    store, failing, fail = AsyncInMemoryStore(), asyncio.Event(), threading.Event()
    pipeline, runner = Pipeline("p", [World().step("a")]), quick_on(store)
    first, second = [await runner.submit(pipeline, Num(), run_id=run_id) for run_id in ("first", "second")]
    loop, statuses = asyncio.get_running_loop(), store.statuses

    def fails(run_ids: Sequence[str]) -> dict[str, str]:
        monkeypatch.setattr(store, "statuses", statuses)
        loop.call_soon_threadsafe(failing.set)
        fail.wait()
        raise StoreError("the server was restarted")

    monkeypatch.setattr(store, "statuses", fails)
    waits = [asyncio.ensure_future(first.result(timeout=20))]
    await failing.wait()
    waits.append(asyncio.ensure_future(second.result(timeout=20)))
    await asyncio.sleep(0)
    fail.set()
    with pytest.raises(StoreError, match="the server was restarted"):
        await waits[0]
    await runner.drive("second", pipelines=[pipeline])
    assert (await waits[1]).status is RunStatus.COMPLETED


def _letters(**fields: Any) -> tuple[Pipeline, type[BaseModel]]:
    """Return a pipeline whose input class has a text and further fields, as another deploy has it."""
    letter = create_model("Letter", text=(str, ...), **fields)
    return Pipeline("letters", [node("echo", same, letter, letter)]), letter


async def test_a_deploy_may_add_fields_to_the_input(store: Any) -> None:
    """A queued run starts with the defaults of fields that its class got since, and is the same submission.

    A class that lacks a recorded field, or refuses the input, leaves the run blocked.
    """
    runner = quick_on(store)
    before, letter = _letters(seal=(str, "red"))
    await runner.submit(before, letter(text="hi"), run_id="r")
    renamed, _ = _letters(wax=(str, "green"))
    refusing, _ = _letters(seal=(int, 1))
    for pipeline, why in ((renamed, "another input"), (refusing, "is not a Letter: seal")):
        outcome = await runner.drive("r", pipelines=[pipeline])
        assert isinstance(outcome, Blocked)
        assert why in outcome.reason
        with pytest.raises(PipelineChanged, match=why):
            await runner.resume(pipeline, "r")
    after, letter = _letters(seal=(str, "red"), stamps=(list[bytes], [b"1"]))
    handle = await runner.submit(after, letter(text="hi"), run_id="r")
    with pytest.raises(RunExists, match="another input"):
        await runner.submit(after, letter(text="hi", stamps=[]), run_id="r")
    assert isinstance(await runner.drive("r", pipelines=[after]), Ended)
    assert (await handle.result(timeout=20)).output == letter(text="hi")


async def test_submitting_again_restarts_nothing(store: Any) -> None:
    """The same submission, in any order of keys, gives the handle of the run; another input is RunExists."""
    world = World()
    pipeline = Pipeline("p", [world.step("a")])
    runner = quick_on(store)
    handle = await runner.submit(pipeline, Num(), run_id="r")
    async with serving(store, pipeline):
        await handle.result(timeout=20)
        again = await runner.submit(pipeline, Num(), run_id="r")
        assert (await again.result(timeout=20)).output == Num(n=1)
    assert world.calls == ["a 0"]
    with pytest.raises(RunExists, match="another input"):
        await runner.submit(pipeline, Num(n=1), run_id="r")

    @stroma_flow("counts")
    async def counts(flow: Flow, state: Counts) -> Counts:
        return state

    for value in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        await runner.submit(counts, Counts(by_name=value), run_id="counts")
    with pytest.raises(RunExists, match="another input"):
        await runner.submit(counts, Counts(by_name={"a": 2, "b": 1}), run_id="counts")


async def test_a_delay(store: Any) -> None:
    """A run with a delay is due at its time, given as seconds, a duration, or a time with a zone."""
    pipeline = Pipeline("p", [node("a", same)])
    runner = quick_on(store)
    before = datetime.now(UTC)
    for delay in (3600, timedelta(hours=1), before + timedelta(hours=1)):
        handle = await runner.submit(pipeline, Num(), delay=delay)
        due = store.get_run(handle.run_id).due_ms / 1000 - before.timestamp()
        assert 3599 <= due < 3700


async def test_hooks_are_called_where_the_run_is_executed(store: Any) -> None:
    """The worker calls the hooks of the run, once; submitting and waiting for the result call none."""
    pipeline = Pipeline("p", [node("a", same)])
    submitter: list[str] = []
    runner = quick_on(store, hooks=record_hooks(submitter))
    handle = await runner.submit(pipeline, Num())
    seen: list[str] = []
    worker = quick_on(store, hooks=record_hooks(seen))
    task = asyncio.ensure_future(worker.serve(pipeline, poll_seconds=0.02))
    await handle.result(timeout=20)
    await worker.shutdown()
    await task
    assert submitter == []
    assert seen == ["run_start", "start a", "success a", "run_end"]


@pytest.mark.parametrize("method", ["status", "resume", "signal", "drive"])
async def test_a_run_that_was_never_submitted(tmp_path: Path, method: str) -> None:
    """An unknown run is CheckpointNotFound, also before the first run has created the store."""
    runner = quick_on(SQLiteStore(tmp_path / "runs.db"))
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "status": lambda: runner.handle("unknown").status(),
        "resume": lambda: runner.resume([node("a", same)], "unknown"),
        "signal": lambda: runner.signal("unknown", Num()),
        "drive": lambda: runner.drive("unknown"),
    }
    with pytest.raises(CheckpointNotFound, match="unknown"):
        await calls[method]()


async def test_wrong_submissions() -> None:
    """Wrong submissions are refused to the submitter, and nothing is stored."""
    store = AsyncInMemoryStore()
    runner = quick_on(store)
    text = node("a", same, input=Text, output=Text)
    pipeline = Pipeline("p", [text])
    with pytest.raises(ValidationError):
        await runner.submit(pipeline, Num())
    with pytest.raises(TypeError, match="pass a flow or Pipeline"):
        await runner.submit([text], Text(text="x"))
    with pytest.raises(TypeError, match="starts with 'parallel"):
        await runner.submit(Pipeline("g", [parallel(text)]), Text(text="x"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"delay": datetime(2030, 1, 1)}, "delay must have a time zone"),
        ({"delay": -1}, "delay must be from 0"),
        ({"delay": ""}, "delay must be seconds, a timedelta or a datetime, got ''"),
        ({"expires": timedelta(days=10_000_000)}, "expires must be from 0"),
        ({"delay": 3600, "expires": 60}, "expires must not be before delay"),
        ({"priority": 1 << 40}, "priority must be"),
        ({"run_id": ""}, "run id must not be empty"),
        ({"dealy": 5}, r"submit\(\) got an unexpected keyword argument 'dealy'; did you mean 'delay'"),
        ({"budget": None}, "'budget'; it is a field of RunConfig"),
    ]
    for options, text_of_error in wrong:
        with pytest.raises((TypeError, ValueError), match=text_of_error):
            await runner.submit(pipeline, Text(text="x"), **options)
    states: list[Any] = [{"text": "x"}, Text]
    for state in states:
        with pytest.raises(TypeError, match="the initial state must be"):
            await runner.submit(pipeline, state)
    assert store.list_runs() == []
    with pytest.raises(CheckpointNotFound):
        await runner.handle("r").result(timeout=1)


async def test_limits_hold_over_workers(store: Any) -> None:
    """At most max_runs runs of a pipeline are executed at once, by however many workers."""
    active, most = 0, 0

    async def work(state: Num) -> Num:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.01)
        active -= 1
        return state

    pipeline = Pipeline("p", [node("work", work)], max_runs=2)
    runner = quick_on(store)
    handles = [await runner.submit(pipeline, Num(n=n)) for n in range(8)]
    async with serving(store, pipeline), serving(store, pipeline):
        await asyncio.gather(*(handle.result(timeout=30) for handle in handles))
    assert most <= 2


async def test_a_flow_has_limits() -> None:
    """A flow takes the limits of a Pipeline; a limit below 1 is refused."""

    @stroma_flow("f", input=Num, output=Num, max_runs=3, max_runs_per_key=1)
    async def flow(flow: Flow, state: Num) -> Num:
        return state

    assert tuple(flow.limits) == (3, 1)
    with pytest.raises(ValueError, match="max_runs must be at least 1"):
        Pipeline("p", [], max_runs=0)


async def test_a_runner_without_a_store_warns(recwarn: pytest.WarningsRecorder) -> None:
    """Submitting to the in-memory store of a runner without a store warns once, to a passed one never."""
    pipeline = Pipeline("p", [World().step("a")])
    await StromaRunner.quick(store=AsyncInMemoryStore()).submit(pipeline, Num())
    assert recwarn.list == []
    runner = StromaRunner.quick()
    for run_id in ("first", "second"):
        await runner.submit(pipeline, Num(), run_id=run_id)
    (warning,) = recwarn.list
    assert str(warning.message).startswith("run 'first' is only in the memory of this process")
    assert warning.filename == __file__
    state: Any = {"n": 1}
    with pytest.raises(TypeError, match=r"got dict; pass Num\(\.\.\.\)"):
        await runner.submit(pipeline, state)
