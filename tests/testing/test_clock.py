"""FakeClock."""

import asyncio
import importlib
import pkgutil
import socketserver
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from tests.testing.pipelines import Number, add_one, make, patient

from stroma import (
    AsyncInMemoryStore,
    Breaker,
    ExecutionBudget,
    Limit,
    NodeHooks,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    engine,
    hooks,
    runner,
    stroma_node,
)
from stroma.testing import FakeClock


def failing(node_id, times, error):
    left = [times]

    async def step(state):
        if left[0]:
            left[0] -= 1
            raise error
        return {"n": state.n + 1}

    return make(node_id, step)


async def test_waits_between_attempts_take_no_time():
    """A run that waits for an hour between its attempts ends, and the clock shows the hours."""
    with FakeClock() as clock:
        result = await patient(3600).run([failing("a", 2, TimeoutError("x"))], Number())
    assert result.status is RunStatus.COMPLETED
    assert clock.waits == [3600, 3600]
    assert clock.elapsed == pytest.approx(7200)


def test_it_works_around_code_that_makes_its_own_event_loop():
    """run_sync() inside of the clock goes by it, and the next loop after it does not."""
    with FakeClock() as clock:
        nodes = [failing("a", 1, TimeoutError("x"))]
        assert patient(3600).run_sync(nodes, Number()).status is RunStatus.COMPLETED
    assert clock.elapsed == pytest.approx(3600)

    async def now():
        return asyncio.get_running_loop().time()

    assert abs(asyncio.run(now()) - time.monotonic()) < 600


def test_no_module_of_a_run_goes_by_another_clock():
    """Whatever the engine, the runner, hooks and guarded calls read the time by is the clock's."""
    found = [
        importlib.import_module(module.name)
        for package in (engine, runner, hooks)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    found.append(importlib.import_module("stroma.adapters._guarded_call"))
    real = (time.perf_counter, time.perf_counter_ns, time.monotonic, time.time_ns)
    readers = [
        module for module in found if any(value in real for value in vars(module).values() if callable(value))
    ]
    assert len(readers) > 10
    with FakeClock():
        left = [
            (module.__name__, name)
            for module in readers
            for name, value in vars(module).items()
            if callable(value) and value in real
        ]
    assert left == []


async def test_several_sleepers_wake_in_the_order_in_which_they_are_due():
    """Runs side by side wait by one clock: each wakes at its time, the earliest first."""
    woken = []
    with FakeClock() as clock:

        async def sleeper(seconds):
            await asyncio.sleep(seconds)
            woken.append((seconds, round(clock.elapsed, 3)))

        async def run(seconds):
            await patient(seconds).run([failing(f"after {seconds}", 1, TimeoutError("x"))], Number())
            woken.append((seconds, round(clock.elapsed, 3)))

        await asyncio.gather(sleeper(30), run(20), run(5), sleeper(10))
    assert woken == [(5, 5), (10, 10), (20, 20), (30, 30)]


async def test_time_limits_are_reached_at_once():
    """A node that hangs fails of its timeout, and a hook that hangs of its own."""

    async def hang(state):
        await asyncio.sleep(1e6)

    async def hook(*_):
        await asyncio.sleep(1e6)

    with FakeClock() as clock:
        runner = patient(retries=0, node_timeouts={"hang": 30_000}, hooks=NodeHooks(on_run_start=hook))
        result = await runner.run([make("hang", hang)], Number())
    assert result.status is RunStatus.PARTIAL
    assert "within 30000 ms" in result.failure.message
    assert [error.hook for error in result.hook_errors] == ["on_run_start"]
    assert clock.elapsed == pytest.approx(35)
    assert result.trace.events_for("hang")[0].duration_ms == 30_000


async def test_the_latency_budget_counts_what_the_clock_shows():
    """A node that sleeps for 3 s has taken 3 s, of its trace and of its budget."""

    async def slow(state):
        await asyncio.sleep(3)
        return state

    budget = ExecutionBudget(max_tokens_total=None, max_cost_usd=None, max_latency_ms=4000)
    with FakeClock():
        result = await patient(retries=0, budget=budget).run([make("a", slow), make("b", slow)], Number())
    assert result.status is RunStatus.PARTIAL
    assert [event.duration_ms for event in result.trace] == [3000, 1000]


async def test_a_date_in_retry_after_is_a_date_of_the_clock():
    """Retry-After as a date waits until the clock shows it."""
    start = datetime(2030, 1, 1, tzinfo=UTC)

    class Response:
        status_code = 429

        def __init__(self):
            self.headers = {"retry-after": "Tue, 01 Jan 2030 00:01:30 GMT"}

    class TooMany(Exception):
        def __init__(self):
            super().__init__("too many")
            self.response = Response()

    with FakeClock(start=start) as clock:
        result = await patient(0).run([failing("a", 1, TooMany())], Number())
        assert clock.now() - start == timedelta(seconds=clock.elapsed)
    assert result.status is RunStatus.COMPLETED
    assert clock.waits == [pytest.approx(90)]


@pytest.mark.parametrize("entry", ["memory", "sqlite"])
async def test_limits_wait_by_the_clock(entry, tmp_path):
    """Three calls under a limit of one a minute take two minutes, and no time."""
    store = SQLiteStore(tmp_path / "x.db") if entry == "sqlite" else None
    limit = Limit(requests_per_minute=1, store=store)
    with FakeClock() as clock:
        runner = patient(limits={"a": limit})
        await asyncio.gather(*(runner.run([make("a", add_one)], Number()) for _ in range(3)))
    assert 60 <= clock.elapsed <= 181
    if store is not None:
        await store.aclose()


async def test_a_breaker_closes_by_the_clock():
    """A circuit that is open for 30 s is tried again after those, at once."""
    breaker = Breaker(min_calls=1, open_seconds=30, max_wait_seconds=None)
    with FakeClock() as clock:
        runner = patient(0, breaker=breaker, limits={"a": Limit(concurrent=9)})
        result = await runner.run([failing("a", 1, ConnectionError("x"))], Number())
    assert result.status is RunStatus.COMPLETED
    assert clock.elapsed == pytest.approx(30, abs=0.5)


async def test_advance_lets_time_pass_for_who_waits():
    """Time that passes by hand is time for everybody; less than none cannot pass."""
    with FakeClock() as clock:
        before = asyncio.get_running_loop().time()
        clock.advance(90)
        assert asyncio.get_running_loop().time() - before == pytest.approx(90)
        assert clock.elapsed == pytest.approx(90)
        with pytest.raises(ValueError, match="at least 0"):
            clock.advance(-1)


async def test_years_pass():
    """Timers are due at any reading of the clock, also where a nanosecond no longer changes it."""
    loop = asyncio.get_running_loop()
    resolution = loop._clock_resolution
    with FakeClock() as clock:
        await asyncio.sleep(timedelta(days=3650).total_seconds())
        await asyncio.gather(*(asyncio.sleep(seconds) for seconds in (0.1, 0.2, 0.1)))
        sleeper = asyncio.create_task(asyncio.sleep(10))
        await asyncio.sleep(0)
        clock.advance(10)
        await sleeper
    assert clock.elapsed == pytest.approx(3650 * 86400 + 10.2, abs=0.01)
    assert loop._clock_resolution == resolution


@pytest.mark.core
async def test_a_thread_at_work_is_waited_for():
    """A sync node at work is not cut off by its timeout, however much the clock could jump meanwhile."""
    release = threading.Event()

    @stroma_node("sync", input=Number, output=Number)
    def sync(state):
        release.wait(60)
        return state

    async def let_go():
        # Not by the clock: it stands still while the thread is at work.
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.05)
        release.set()

    with FakeClock() as clock:
        runner = patient(retries=0, node_timeouts={"sync": 50_000})
        result, _ = await asyncio.gather(runner.run([sync], Number()), let_go())
    assert result.status is RunStatus.COMPLETED
    assert clock.elapsed < 50


async def test_a_store_at_work_is_waited_for(tmp_path):
    """A timeout around a run on SQLite is not reached while the store writes."""
    async with SQLiteStore(tmp_path / "x.db") as store:
        with FakeClock():
            async with asyncio.timeout(3600):
                result = await StromaRunner.quick(store=store).run([make("a", add_one)], Number())
    assert result.status is RunStatus.COMPLETED


@pytest.mark.core
async def test_with_sockets_open_it_jumps_over_waits_between_attempts_only():
    """An answer that is on its way is not timed out, and a retry beside it waits for nothing."""
    request, answered = threading.Event(), threading.Event()

    class Slow(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            request.set()
            answered.wait(60)
            self.wfile.write(b"answer\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Slow) as server:
        # Threads that the clock knows nothing of.
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

        async def ask(state):
            reader, writer = await asyncio.open_connection(*server.server_address)
            writer.write(b"question\n")
            async with asyncio.timeout(600):
                line = await reader.readline()
            writer.close()
            return {"n": len(line)}

        with FakeClock() as clock:
            asking = asyncio.create_task(patient(0, retries=0).run([make("ask", ask)], Number()))
            await asyncio.to_thread(request.wait, 60)
            retried = await patient(60).run([failing("a", 1, TimeoutError("x"))], Number())
            answered.set()
            result = await asking
        server.shutdown()
    assert retried.status is RunStatus.COMPLETED
    assert (result.status, result.final_state.n) == (RunStatus.COMPLETED, 7)
    assert 60 <= clock.elapsed < 600


def test_there_is_one_clock_at_a_time():
    """A second clock says that there is one; afterwards another can be used."""
    with FakeClock():
        with pytest.raises(RuntimeError, match="active already"):
            FakeClock().__enter__()
    with FakeClock():
        pass


@pytest.mark.core
async def test_everything_is_put_back():
    """After it the loop has its own time and selector again, and timers are as far away as they were."""
    loop = asyncio.get_running_loop()
    selector = loop._selector
    fired = asyncio.Event()
    with FakeClock():
        await asyncio.sleep(3600)
        timer = loop.call_later(0.01, fired.set)
    assert loop._selector is selector
    assert "time" not in vars(loop)
    assert abs(timer.when() - loop.time()) < 600
    await asyncio.wait_for(fired.wait(), 60)


@pytest.mark.core
@pytest.mark.parametrize("entry", ["memory", "sqlite"])
async def test_attempts_of_one_moment_are_told_apart(entry, tmp_path):
    """A journal keeps both attempts of one place that began while the clock stood still."""
    store = SQLiteStore(tmp_path / "x.db") if entry == "sqlite" else AsyncInMemoryStore()
    with FakeClock():
        runner = patient(0, 0, store=store)
        broken = failing("a", 1, PermissionError("x"))
        await runner.run([broken], Number(), run_id="r")
        await runner.run([broken], Number(), run_id="r", resume=True)
    assert [attempt.outcome for attempt in store.attempts("r")] == ["failure", "success"]
    if entry == "sqlite":
        await store.aclose()


@pytest.mark.filterwarnings("error")
def test_the_end_of_a_loop_waits_for_its_threads():
    """asyncio.run inside of a clock ends as it does without one: no time passes meanwhile."""
    with FakeClock() as clock:
        asyncio.run(asyncio.to_thread(time.sleep, 0))
        before = clock.elapsed
        asyncio.run(asyncio.to_thread(time.sleep, 0))
    assert before < 100
    assert clock.elapsed < 100
