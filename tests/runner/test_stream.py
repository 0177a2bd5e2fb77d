"""stream(): a run as an async iterator, also behind a real web server; and run_sync()."""

import asyncio
import gc
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tests.kit import ONCE, Num, cancel, computing, failing_with, noting, returning

import stroma
from stroma import (
    ExecutionBudget,
    NodeHooks,
    Pipeline,
    RunBusy,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StreamEvent,
    StromaRunner,
    Suspend,
    map_over,
    parallel,
    stroma_node,
)


def node(name: str, func: Any = None, *, gives: Any = None) -> Any:
    plain = computing(lambda state: ({"n": state.n + 1}, 5))
    return stroma_node(name, input=Num, output=Num)(func or plain)


quick = partial(StromaRunner.quick, policy_map=ONCE)


def summary_of(events: list[StreamEvent]) -> list[tuple[str, str | None]]:
    return [(event.kind, event.node_id) for event in events]


async def until(condition: Any) -> None:
    """Let others go on until something is so."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def test_events_in_order_and_the_result_at_the_end() -> None:
    """Every start, end, retry and skip is an event, in order and numbered; ends carry the trace's event; the
    result is last."""
    left = [TimeoutError("again")]

    async def flaky(state: Num) -> Any:
        if left:
            raise left.pop()
        return {"n": state.n * 10}, 7

    runner = quick(run_id="run")
    stream = runner.stream([node("a"), node("b", flaky)], Num(n=1))
    events = [event async for event in stream]
    assert summary_of(events) == [
        ("run_start", None),
        ("node_start", "a"),
        ("node_success", "a"),
        ("node_start", "b"),
        ("node_failure", "b"),
        ("node_retry", "b"),
        ("node_start", "b"),
        ("node_success", "b"),
        ("run_end", None),
    ]
    assert [event.number for event in events] == list(range(1, 10))
    assert {event.run_id for event in events} == {"run"}
    result = events[-1].result
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, Num(n=20))
    assert stream.result is result
    ends = [event.event for event in events if event.event is not None]
    assert ends == list(result.trace)
    assert (events[1].state, events[1].position, events[1].attempt) == ({"n": 1}, 0, 1)
    assert events[5].details["delay_seconds"] == 0
    assert events[5].attempt == 2
    assert events[-1].details["final_state"] == {"n": 20}


async def test_a_stream_is_as_quick_as_the_run() -> None:
    """Events come as things happen: a node that waits for its reader to have seen its start goes on."""
    seen = asyncio.Event()

    async def waits(state: Num) -> Any:
        await seen.wait()
        return {"n": 1}

    async with asyncio.timeout(60), quick().stream([node("a", waits)], Num()) as stream:
        async for event in stream:
            if event.kind == "node_start":
                seen.set()
    assert stream.result.status is RunStatus.COMPLETED


async def test_groups_and_maps_are_told() -> None:
    """Children of groups have their place; a map tells how far it is; a group's event holds no child's."""
    group = map_over(lambda s: [{"n": 1}, {"n": 2}], node("c"), into="made")
    pipeline = [parallel(node("a"), node("b")), group]
    events = [event async for event in quick().stream(pipeline, Num())]
    places = [(e.node_id, e.position, e.branch) for e in events if e.kind == "node_success"]
    assert sorted(places[:3], key=str) == [("a", 0, "0"), ("b", 0, "1"), ("parallel(a, b)", 0, "")]
    assert sorted(places[3:], key=str) == [("c", 1, "0"), ("c", 1, "1"), ("map_over(<lambda>, c)", 1, "")]
    progress = [e.progress for e in events if e.progress is not None]
    assert (progress[-1].done, progress[-1].total, progress[-1].ended) == (2, 2, True)
    assert all(e.event.children == [] for e in events if e.event is not None)


async def test_suspended_skipped_cancelled_and_budgets_are_told(tmp_path: Path) -> None:
    """A wait for a person, a restored output and a budget warning are events."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        runner = quick(store=store, run_id="run", budget=ExecutionBudget(max_tokens_total=6))
        nodes = [node("a"), node("b", failing_with(Suspend, "may I?"))]
        first = [event async for event in runner.stream(nodes, Num())]
        assert ("node_suspended", "b") in summary_of(first)
        details = next(e for e in first if e.kind == "node_suspended").details
        assert (details["reason"], details["question"]["id"]) == ("may I?", "1:1")
        warning = next(e for e in first if e.kind == "budget_warning")
        assert warning.details == {"dimension": "tokens", "used": 5, "limit": 6}
        again = [event async for event in runner.stream(nodes, Num(), resume=True)]
        assert summary_of(again)[1] == ("node_skipped", "a")
        assert again[1].state == {"n": 1}
        assert again[-1].result.status is RunStatus.SUSPENDED


@pytest.mark.core
async def test_own_hooks_and_configs_stay() -> None:
    """The runner's hooks are told too, a pipeline's own config holds, and redact holds for events."""
    seen = []

    start = noting(seen, lambda run_id, node_id, state: node_id)
    hooks = NodeHooks(on_node_start=start)
    config = RunConfig(run_id="mine", hooks=hooks, redact=lambda state: {"hidden": 1})
    pipeline = Pipeline("named", [node("a")], config=config)
    events = [event async for event in quick_bare().stream(pipeline, Num(n=777_777_777_777))]
    assert (seen, events[0].run_id, events[0].details) == (["a"], "mine", {"pipeline": "named"})
    assert "777777777777" not in json.dumps([event.to_dict() for event in events])
    assert config.hooks == NodeHooks(on_node_start=start)


def quick_bare() -> StromaRunner:
    return StromaRunner.quick()


async def test_events_as_json() -> None:
    """Every event is plain JSON data, and a message of an event stream."""
    async for event in quick().stream([node("a")], Num()):
        data = json.loads(json.dumps(event.to_dict(), allow_nan=False))
        assert data["kind"] == event.kind
        lines = event.to_sse().split("\n")
        assert lines[:2] == [f"id: {event.number}", f"event: {event.kind}"]
        assert json.loads(lines[2].removeprefix("data: ")) == data
        assert lines[3:] == ["", ""]


@pytest.mark.core
async def test_the_run_waits_for_a_slow_reader() -> None:
    """With more than ``buffer`` events before the reader the run waits, with no time limit; none is lost."""
    calls = []

    async def count(state: Num) -> Any:
        calls.append(1)
        return {"n": 1}

    nodes = [node(f"n{i}", count) for i in range(30)]
    runner = quick(hook_timeout_ms=1)
    async with runner.stream(nodes, Num(), buffer=4) as stream:
        await until(lambda: len(calls) >= 1)
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert len(calls) <= 3
        events = [event async for event in stream]
    assert len(calls) == 30
    assert [e.kind for e in events].count("node_success") == 30
    assert stream.result.hook_errors == []


async def test_a_cancellation_while_the_run_waits_loses_no_end() -> None:
    """A run that is cancelled from elsewhere while its reader is slow tells every end that has happened."""
    runner = quick(run_id="run")
    stream = runner.stream([node(f"n{i}") for i in range(9)], Num(), buffer=1)
    async with stream:
        await anext(stream)
        await until(lambda: stream._run.hub.pending > 1)
        assert await runner.cancel("run")
        events = [event async for event in stream]
    assert stream.result.status is RunStatus.CANCELLED
    kinds = [event.kind for event in events]
    assert kinds[-1] == "run_end"
    starts = kinds.count("node_start")
    assert starts == sum(kinds.count(kind) for kind in ("node_success", "node_cancelled"))


@pytest.mark.core
async def test_reading_may_time_out_and_go_on() -> None:
    """A timeout around anext() loses nothing and does not end the run."""
    go = asyncio.Event()

    async def waits(state: Num) -> Any:
        await go.wait()
        return {"n": 1}

    events = []
    async with quick().stream([node("a", waits)], Num()) as stream:
        while True:
            try:
                events.append(await asyncio.wait_for(anext(stream), 0.01))
            except TimeoutError:
                go.set()
            except StopAsyncIteration:
                break
    summary = summary_of(events)
    assert summary == [("run_start", None), ("node_start", "a"), ("node_success", "a"), ("run_end", None)]


class Slow:
    """A node that is in flight until it is told to go on."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.ends: list[str] = []

        async def waits(state: Num) -> Any:
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.ends.append("cancelled")
                raise
            self.ends.append("done")
            return {"n": 5}

        self.node = node("slow", waits)


@pytest.mark.core
@pytest.mark.parametrize("way", ["aclose", "with", "error", "cancelled", "dropped", "broken off"])
async def test_a_reader_that_leaves_ends_the_run(tmp_path: Path, way: str) -> None:
    """Whichever way the reader leaves, the run is CANCELLED in its store, its node ended, and resumable."""
    slow = Slow()
    nodes = [node("a"), slow.node]
    before = asyncio.all_tasks()
    async with SQLiteStore(tmp_path / "runs.db") as store:
        runner = quick(store=store, run_id="run")
        if way == "aclose":
            stream = runner.stream(nodes, Num())
            await read_until_slow(stream)
            await stream.aclose()
            await stream.aclose()
            assert [event async for event in stream] == []
        elif way == "with":
            async with runner.stream(nodes, Num()) as stream:
                await read_until_slow(stream)
        elif way == "error":
            with pytest.raises(KeyError):
                async with runner.stream(nodes, Num()) as stream:
                    await read_until_slow(stream)
                    raise KeyError
        elif way == "cancelled":
            task = asyncio.create_task(consume(runner, nodes))
            await until(lambda: runner._live.runs and slow_started(runner))
            await cancel(task)
        elif way == "dropped":
            stream = runner.stream(nodes, Num())
            await read_until_slow(stream)
            del stream
            gc.collect()
        else:
            async for event in runner.stream(nodes, Num()):
                if event.node_id == "slow":
                    break
            gc.collect()
        await until(lambda: not runner._live.runs)
        assert slow.ends == ["cancelled"]
        record = store.get_run("run")
        assert (record.status, record.holder) == ("CANCELLED", None)
        assert asyncio.all_tasks() - before == set()
        slow.go.set()
        result = await runner.run(nodes, Num(), resume=True)
        assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=5))
        assert [event.node_id for event in result.trace] == ["slow"]


async def read_until_slow(stream: AsyncIterator[StreamEvent]) -> None:
    async for event in stream:
        if event.node_id == "slow":
            return


async def consume(runner: StromaRunner, nodes: Any) -> None:
    async with runner.stream(nodes, Num()) as stream:
        async for _ in stream:
            pass


def slow_started(runner: StromaRunner) -> bool:
    (run,) = runner._live.runs
    return len(run.ctx.trace) == 1


async def test_leaving_before_the_beginning() -> None:
    """A stream that nobody reads begins no run, and is left without a trace."""
    runner = quick()
    stream = runner.stream([node("a")], Num())
    await stream.aclose()
    del stream
    dropped = runner.stream([node("a")], Num())
    del dropped
    gc.collect()
    assert not runner._live.runs
    async with runner.stream([node("a")], Num()):
        pass  # Left at once: it may or may not have begun.
    assert not runner._live.runs


def test_a_stream_outlives_its_loop(tmp_path: Path) -> None:
    """A stream that is thrown away after its event loop was closed does no harm, and the run is free."""
    slow: Any = None
    entries = []

    async def main() -> None:
        nonlocal slow
        slow = Slow()
        stream = quick(store=store, run_id="run").stream([slow.node], Num())
        await read_until_slow(stream)
        entries.append(stream)

    with SQLiteStore(tmp_path / "runs.db") as store:
        asyncio.run(main())
        entries.clear()
        gc.collect()
        record = store.get_run("run")
        assert (record.status, record.holder, slow.ends) == ("CANCELLED", None, ["cancelled"])


@pytest.mark.core
async def test_what_run_raises_comes_out() -> None:
    """What run() would raise comes out of the iterator, once everything before it was read."""
    runner = quick(run_id="run")
    with pytest.raises(TypeError, match="is not a stroma node"):
        _ = [event async for event in runner.stream([lambda s: s], Num())]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        _ = [event async for event in runner.stream([node("a")], Num(), nonsense=1)]
    slow = Slow()
    async with runner.stream([slow.node], Num()) as stream:
        await read_until_slow(stream)
        busy = runner.stream([slow.node], Num())
        with pytest.raises(RunBusy, match=r"in process [0-9]+ on [^(]*; pass if_running="):
            await anext(busy)
        with pytest.raises(RunBusy):
            _ = busy.result
        with pytest.raises(RuntimeError, match="no result before its end"):
            _ = stream.result

    wrong = quick(hooks=NodeHooks(on_node_success=lambda *_: len(_)))
    events = []
    with pytest.raises(TypeError, match="is not async"):
        async for event in wrong.stream([node("a")], Num()):
            events.append(event)
    assert summary_of(events)[-1] == ("run_end", None)


async def test_a_failed_run_is_an_event() -> None:
    """What goes wrong inside the run is a result, and told in the last event."""
    events = [event async for event in quick().stream([node("a", returning({"n": "x"}))], Num())]
    assert events[-1].result.status is RunStatus.FAILED
    assert events[-1].details["failure"]["class"] == "TERMINAL"
    assert "Contract violation" in events[-1].details["failure"]["message"]


async def test_what_is_refused() -> None:
    """Options that mean nothing are refused where they are written."""
    for options in ({"buffer": 0}, {"buffer": True}, {"buffer": 1.5}):
        with pytest.raises(ValueError, match="buffer"):
            quick().stream([node("a")], Num(), **options)


async def test_two_that_read_one_stream() -> None:
    """A second reader of the same stream is refused; the first one goes on."""
    slow = Slow()
    async with quick().stream([slow.node], Num()) as stream:
        await read_until_slow(stream)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="is already being read"):
            await anext(stream)
        slow.go.set()
        assert (await first).kind == "node_success"


async def test_run_sync_in_a_running_loop_names_the_call_to_use() -> None:
    """run_sync() inside of a coroutine is refused, with the call that works there."""
    with pytest.raises(RuntimeError, match=r"use `await runner\.run\("):
        quick().run_sync([node("a")], Num())


def test_an_exception_of_run_sync_has_no_other_one_before_it() -> None:
    """What run_sync() raises is the exception of run(), without one of its own as the context."""
    with pytest.raises(TypeError, match="is not a stroma node") as raised:
        quick().run_sync([len], Num())
    assert raised.value.__context__ is None


_INTERRUPTED = """
import asyncio, sys
from pydantic import BaseModel
from stroma import NodeContract, SQLiteStore, StromaRunner, stroma_node

class Num(BaseModel):
    n: int = 0

contract = NodeContract(node_id="slow", input_schema=Num, output_schema=Num)

@stroma_node("slow", contract)
async def slow(state):
    print("in it", flush=True)
    await asyncio.sleep(3600)

with SQLiteStore(sys.argv[1]) as store:
    try:
        StromaRunner.quick(store=store, run_id="run").run_sync([slow], Num())
    except KeyboardInterrupt:
        print("interrupted", store.get_run("run").status, store.get_run("run").holder, flush=True)
"""


@pytest.mark.slow
def test_run_sync_is_interrupted(tmp_path: Path) -> None:
    """Ctrl-C ends the run, commits that, and comes out of run_sync() as KeyboardInterrupt."""
    source = str(Path(stroma.__file__).parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "runs.db")],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": source, "PATH": ""},
    )
    try:
        assert child.stdout.readline() == "in it\n"
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=60)
        assert out == "interrupted CANCELLED None\n"
        assert child.returncode == 0
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


EXAMPLE = Path(__file__).parents[2] / "examples" / "streaming.py"


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Any, str]]:
    """The example as a module, and where it is served."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("streaming_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = uvicorn.Server(uvicorn.Config(module.app, port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(60):
        while not server.started:
            await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield module, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving
        await module.runner.checkpoint_manager.store.aclose()


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_a_run_over_http(site: tuple[Any, str]) -> None:
    """A browser gets every event of the run as a message, and the result in the last one."""
    module, url = site
    async with httpx.AsyncClient(timeout=60) as client:
        assert "EventSource" in (await client.get(url)).text
        async with client.stream("GET", f"{url}/runs?topic=owls") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            findings = [event async for event in events(response)]
    assert [event["number"] for event in findings] == list(range(1, len(findings) + 1))
    kinds = [event["kind"] for event in findings]
    assert (kinds[0], kinds[-1]) == ("run_start", "run_end")
    assert kinds.count("node_start") == kinds.count("node_success") == 12
    assert findings[-1]["details"]["status"] == "COMPLETED"
    assert len(findings[-1]["details"]["final_state"]["answers"]) == 10
    assert not module.runner._live.runs


async def test_a_browser_that_leaves(site: tuple[Any, str]) -> None:
    """A browser that leaves in the middle ends the run: it is CANCELLED in the store; nothing is left."""
    module, url = site
    run_id = ""
    async with httpx.AsyncClient(timeout=60) as client, client.stream("GET", f"{url}/runs") as response:
        async for event in events(response):
            run_id = event["run_id"]
            if event["kind"] == "node_success" and event["node_id"] == "answer":
                break
    async with asyncio.timeout(60):
        while module.runner._live.runs:
            await asyncio.sleep(0.01)
    store = module.runner.checkpoint_manager.store
    record = await asyncio.to_thread(store.get_run, run_id)
    assert (record.status, record.holder) == ("CANCELLED", None)
    again = await module.runner.run(module.pipeline, module.Topic(topic="otters"), run_id=run_id, resume=True)
    assert again.status == "RESUMED"
