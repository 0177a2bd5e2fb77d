"""What only a cluster can do, or can do wrong."""

from __future__ import annotations

import asyncio
import gzip
import json
import pathlib
import subprocess
import sys
import uuid
from dataclasses import replace
from datetime import UTC, timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from temporalio.api.common.v1 import Payload
from temporalio.client import WorkflowFailureError, WorkflowHistory
from temporalio.converter import DataConverter, PayloadCodec
from temporalio.worker import Replayer
from tests.drivers import worker_helper
from tests.drivers.conftest import TemporalDriver, connect
from tests.drivers.scenarios import Left, Right, Texts, counted, failing, half, joined, lengths
from tests.drivers.test_parity import asking
from tests.kit import NEVER, THRICE, Num, node
from tests.servers_temporal import TemporalServer

from stroma import (
    FailureClass,
    Pipeline,
    RunBusy,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    map_over,
    parallel,
)
from stroma.checkpoint.payloads import DirectoryBlobs
from stroma.temporal import RemoteFailure, StromaPlugin, register_search_attributes, stroma_worker

HISTORIES = pathlib.Path(__file__).parent / "histories"
HISTORY_NAMES = sorted(path.name.partition(".")[0] for path in HISTORIES.glob("*.json.gz"))


class Blob(BaseModel):
    text: str


def large(calls: list[str], size: int) -> Any:
    async def func(state: Num) -> dict[str, str]:
        calls.append("large")
        return {"text": "x" * size}

    return node("large", func, Num, Blob)


def measured(calls: list[str]) -> Any:
    async def func(state: Blob) -> dict[str, int]:
        calls.append("measure")
        return {"n": len(state.text)}

    return node("measure", func, Blob, Num)


# ---------------------------------------------------------------------- large states


async def test_a_large_output_executes_its_node_once(
    temporal: TemporalDriver, tmp_path: pathlib.Path
) -> None:
    """3 MB go to the payload store: the next node gets them, and so do the trace and the history does not."""
    calls: list[str] = []
    blobs = DirectoryBlobs(tmp_path)
    temporal.options["payloads"] = temporal.worker_options["payloads"] = blobs
    async with temporal.bind([large(calls, 3_000_000), measured(calls)]) as bound:
        result = await bound.run(Num(), run_id=(run_id := uuid.uuid4().hex))
        history = await temporal.client.get_workflow_handle(run_id).fetch_history()
    assert (result.status, calls) == (RunStatus.COMPLETED, ["large", "measure"])
    assert result.final_state == Num(n=3_000_000)
    (first, second) = result.trace
    assert first.output_state == second.input_state == {"text": "x" * 3_000_000}
    assert len(history.to_json()) < 100_000


@pytest.mark.core
async def test_a_large_output_without_a_payload_store_is_refused_once(temporal: TemporalDriver) -> None:
    """The node is not called again; the failure names what to give."""
    calls: list[str] = []
    async with temporal.bind([large(calls, 3_000_000), measured(calls)], policy_map=THRICE) as bound:
        result = await bound.run(Num())
    assert (result.status, calls) == (RunStatus.PARTIAL, ["large"])
    assert result.failure is not None
    assert "payloads=" in result.failure.message


async def test_a_large_initial_state(temporal: TemporalDriver, tmp_path: pathlib.Path) -> None:
    """It goes the same way, and comes back as the final state of a run that failed."""
    calls: list[str] = []
    temporal.options["payloads"] = temporal.worker_options["payloads"] = DirectoryBlobs(tmp_path)
    async with temporal.bind([measured(calls)]) as bound:
        result = await bound.run(Blob(text="y" * 3_000_000))
    assert result.final_state == Num(n=3_000_000)


@pytest.mark.parametrize("char", ["x", "\u0436", '"'])
async def test_many_states_of_some_size_fit_or_are_refused_once(temporal: TemporalDriver, char: str) -> None:
    """Without a payload store a run holds a mebibyte; what goes beyond stops it as PARTIAL, with each node called once."""
    calls: list[str] = []

    def grows(node_id: str) -> Any:
        async def func(state: Blob) -> dict[str, str]:
            calls.append(node_id)
            return {"text": state.text + char * 9_000}

        return node(node_id, func, Blob, Blob)

    nodes = [grows(f"n{number}") for number in range(30)]
    async with temporal.bind(nodes, policy_map=THRICE) as bound:
        result = await bound.run(Blob(text=""))
    assert result.status is RunStatus.PARTIAL
    assert result.failure is not None
    assert "payloads=" in result.failure.message
    assert len(calls) == len(set(calls)) == len(result.trace) > 3


async def test_a_large_output_that_breaks_its_contract_executes_its_node_once(
    temporal: TemporalDriver,
) -> None:
    """Neither the violation nor an enormous message is too large to be told."""
    calls: list[str] = []

    async def odd(state: Num) -> dict[str, Any]:
        calls.append("odd")
        return {"n": "z" * 3_000_000}

    async def wordy(state: Num) -> dict[str, Any]:
        calls.append("wordy")
        raise ValueError("z" * 3_000_000)

    for one, kind in (
        (node("odd", odd), FailureClass.TERMINAL),
        (node("wordy", wordy), FailureClass.AMBIGUOUS),
    ):
        async with temporal.bind([one], policy_map=NEVER) as bound:
            result = await bound.run(Num())
        assert result.failure is not None
        assert result.failure.failure_class is kind
    assert calls == ["odd", "wordy"]


async def test_a_large_value_in_the_context_stays_where_it_is(temporal: TemporalDriver) -> None:
    """It is told in the log, the node is called once, and small ones reach the next node."""
    calls: list[str] = []

    async def puts(state: Num, ctx: dict[str, Any]) -> dict[str, int]:
        calls.append("puts")
        ctx["large"], ctx["small"] = "x" * 3_000_000, 1
        return {"n": 1}

    async def gets(state: Num, ctx: dict[str, Any]) -> dict[str, int]:
        calls.append("gets")
        return {"n": ctx["small"] + ("large" in ctx)}

    async with temporal.bind([node("puts", puts), node("gets", gets)]) as bound:
        result = await bound.run(Num())
    assert (calls, result.final_state) == (["puts", "gets"], Num(n=1))


# ---------------------------------------------------------------------- code that changes


async def test_a_worker_that_lacks_a_node_says_which(temporal: TemporalDriver) -> None:
    """The run is PARTIAL, not stuck; the message names the node, what the worker has, and the mend."""
    calls: list[str] = []
    with_b = Pipeline("pipe", [counted(calls, "a"), counted(calls, "b")])
    async with temporal.bind([counted(calls, "a")]) as bound:
        result = await asyncio.wait_for(bound.runner.run(with_b, Num()), 60)
    assert (result.status, calls) == (RunStatus.PARTIAL, [])
    assert result.failure is not None
    assert isinstance(result.failure.exception, RemoteFailure)
    assert result.failure.exception.type_name == "MissingNode"
    assert "lacks node 'b'" in result.failure.message
    assert "it has 'a'" in result.failure.message


@pytest.mark.core
async def test_another_contract_is_another_node(temporal: TemporalDriver) -> None:
    """Client and worker must have the same schemas: their hashes travel with the plan."""

    class Other(BaseModel):
        n: float = 0

    calls: list[str] = []
    other = Pipeline("pipe", [counted(calls, "a", input=Other, output=Other)])
    async with temporal.bind([counted(calls, "a")]) as bound:
        result = await asyncio.wait_for(bound.runner.run(other, Num()), 60)
    assert (result.status, calls) == (RunStatus.PARTIAL, [])
    assert result.failure is not None
    assert "another input contract" in result.failure.message


async def test_a_pipeline_that_is_edited_breaks_no_run_in_flight(
    temporal: TemporalDriver, temporal_server: TemporalServer
) -> None:
    """A run goes through the nodes that it began with, in their order and groups, on a worker with new ones around them."""
    calls: list[str] = []
    started, go_on = asyncio.Event(), asyncio.Event()

    async def waits(state: Num) -> dict[str, int]:
        calls.append("w")
        started.set()
        await go_on.wait()
        return {"n": state.n + 1}

    pipeline = Pipeline("pipe", [node("w", waits), parallel(counted(calls, "a"), counted(calls, "b", 2))])
    edited = Pipeline("pipe", [
        counted(calls, "new"), counted(calls, "b", 2), node("w", waits),
        parallel(counted(calls, "a"), counted(calls, "new")),
    ])  # fmt: skip
    old = stroma_worker(
        temporal.client, temporal.queue, [pipeline], graceful_shutdown_timeout=timedelta(seconds=60)
    )
    working = asyncio.create_task(old.run())
    running = asyncio.create_task(temporal.runner().run(pipeline, Num()))
    await started.wait()
    stopping = asyncio.create_task(old.shutdown())  # It ends the attempt that it is in, and takes no other.
    async with stroma_worker(await connect(temporal_server), temporal.queue, [edited]):
        go_on.set()
        await stopping
        await working
        result = await asyncio.wait_for(running, 60)
    assert result.status is RunStatus.COMPLETED
    assert result.final_state is not None
    assert result.final_state.model_dump() == {"n": 3}
    assert sorted(calls) == ["a", "b", "w"]


@pytest.mark.parametrize("name", HISTORY_NAMES)
async def test_old_histories_replay(name: str) -> None:
    """What earlier code recorded, the present workflow replays: runs in flight survive a release."""
    history = WorkflowHistory.from_json(
        name, json.loads(gzip.decompress((HISTORIES / f"{name}.json.gz").read_bytes()))
    )
    await Replayer(workflows=[], plugins=[StromaPlugin()]).replay_workflow(history)


def test_there_are_histories() -> None:
    """The test above is no test without any."""
    assert set(HISTORY_NAMES) >= {
        "retries",
        "groups",
        "items",
        "items_in_turn",
        "suspended",
        "cancelled",
    }


# ---------------------------------------------------------------------- many items


@pytest.mark.core
async def test_many_items_have_a_bounded_history(temporal: TemporalDriver, tmp_path: pathlib.Path) -> None:
    """500 items in histories of at most a few hundred events; each item runs once, the outputs are in order."""
    calls: list[str] = []
    temporal.options |= {"history_events": 300, "payloads": DirectoryBlobs(tmp_path)}
    temporal.worker_options["payloads"] = DirectoryBlobs(tmp_path)
    texts = [f"{number:03d}"[: 1 + number % 3] for number in range(500)]
    async with temporal.bind([map_over("texts", lengths(calls), into="lengths"), total(calls)]) as bound:
        run_id = uuid.uuid4().hex
        result = await bound.run(Texts(texts=texts), run_id=run_id)
        handle = temporal.client.get_workflow_handle(run_id)
        last = await handle.describe()
        assert (
            last.raw_description.workflow_execution_info.first_run_id != last.run_id
        )  # It went on with a fresh one.
        assert last.history_length < 2000
    assert result.status is RunStatus.COMPLETED, result.failure
    assert result.final_state == Num(n=sum(map(len, texts)))
    assert calls.count("length") == 500
    (group, _) = result.trace
    assert sorted(int(child.branch) for child in group.children) == list(range(500))


def total(calls: list[str]) -> Any:
    class Length(BaseModel):
        length: int

    class Given(BaseModel):
        lengths: list[Length]

    async def func(state: Given) -> dict[str, int]:
        calls.append("total")
        return {"n": sum(one.length for one in state.lengths)}

    return node("total", func, Given, Num)


async def test_fan_out_is_bounded(temporal: TemporalDriver) -> None:
    """No more items at once than max_concurrency says."""
    running = [0, 0]

    class Text(BaseModel):
        text: str

    async def func(state: Text) -> dict[str, int]:
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0.01)
        running[0] -= 1
        return {"n": 1}

    nodes = [map_over("texts", node("one", func, Text, Num), into="done", max_concurrency=3)]
    async with temporal.bind(nodes) as bound:
        result = await bound.run(Texts(texts=["x"] * 12))
    assert result.status is RunStatus.COMPLETED
    assert running[1] <= 3


# ---------------------------------------------------------------------- cluster


async def test_one_id_is_run_once(temporal: TemporalDriver) -> None:
    """A second run() of an id that runs is RunBusy, or waits for the result of the first."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def waits(state: Num) -> dict[str, int]:
        started.set()
        await go_on.wait()
        return {"n": state.n + 1}

    run_id = uuid.uuid4().hex
    async with temporal.bind([node("w", waits)]) as bound:
        running = asyncio.create_task(bound.run(Num(), run_id=run_id))
        await started.wait()
        with pytest.raises(RunBusy, match="attach"):
            await bound.run(Num(), run_id=run_id)
        attached = asyncio.create_task(bound.run(Num(), run_id=run_id, if_running="attach"))
        go_on.set()
        assert (await running).final_state == (await attached).final_state == Num(n=1)


async def test_who_stops_waiting_leaves_the_run_alone(temporal: TemporalDriver) -> None:
    """A client that is gone changes nothing: the run goes on, and another client has its result."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def waits(state: Num) -> dict[str, int]:
        started.set()
        await go_on.wait()
        return {"n": state.n + 1}

    run_id = uuid.uuid4().hex
    async with temporal.bind([node("w", waits)]) as bound:
        running = asyncio.create_task(bound.run(Num(), run_id=run_id))
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        go_on.set()
        result = await asyncio.wait_for(
            temporal.runner().run(
                bound.pipeline, Num(), run_id=run_id, if_running="attach", if_exists="return"
            ),
            60,
        )
    assert result.final_state == Num(n=1)


async def test_the_trace_can_be_seen_while_it_runs(temporal: TemporalDriver) -> None:
    """A query gives the attempts so far."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def waits(state: Num) -> dict[str, int]:
        started.set()
        await go_on.wait()
        return {"n": state.n + 1}

    run_id = uuid.uuid4().hex
    async with temporal.bind([counted([], "a"), node("w", waits)]) as bound:
        running = asyncio.create_task(bound.run(Num(), run_id=run_id))
        await started.wait()
        seen = await temporal.runner().trace(bound.pipeline, run_id)
        go_on.set()
        await running
    assert [(e.node_id, e.outcome, e.output_state) for e in seen.trace] == [("a", "success", {"n": 1})]


class Scrambled(PayloadCodec):
    """A codec that anybody could read, but nobody by chance."""

    async def encode(self, payloads: Any) -> list[Payload]:
        return [
            Payload(metadata={"encoding": b"scrambled"}, data=bytes(255 - b for b in p.SerializeToString()))
            for p in payloads
        ]

    async def decode(self, payloads: Any) -> list[Payload]:
        outputs = []
        for p in payloads:
            assert p.metadata["encoding"] == b"scrambled"
            plain = Payload()
            plain.ParseFromString(bytes(255 - b for b in p.data))
            outputs.append(plain)
        return outputs


@pytest.mark.core
async def test_the_codec_of_the_user_is_kept(temporal_server: TemporalServer) -> None:
    """States, and the words of failures, which hold values of states, stand in no history in plain text."""
    converter = DataConverter(payload_codec=Scrambled())
    driver = TemporalDriver(
        await connect(temporal_server, data_converter=converter, plugins=[StromaPlugin()])
    )
    run_id = uuid.uuid4().hex

    async def fails(state: Num) -> dict[str, str]:
        raise ValueError("the password is tiger")

    async with driver.bind([counted([], "a", 76543), node("b", fails)], policy_map=NEVER) as bound:
        result = await bound.run(Num(), run_id=run_id)
        history = await driver.client.get_workflow_handle(run_id).fetch_history()
    assert result.failure is not None
    assert result.failure.message == "the password is tiger"
    assert result.final_state == Num(n=76543)
    raw = b"".join(event.SerializeToString() for event in history.events)
    assert b"tiger" not in raw
    assert b"76543" not in raw
    assert b"scrambled" in raw


async def test_search_attributes_where_they_are_registered(temporal_server: TemporalServer) -> None:
    """Without them a run goes without; with them it can be found by its pipeline and status."""
    driver = TemporalDriver(await connect(temporal_server))
    run_id = uuid.uuid4().hex
    async with driver.bind([failing([], "a", ValueError("odd"))], policy_map=NEVER) as bound:
        await register_search_attributes(driver.client)
        await register_search_attributes(driver.client)  # Again: no harm.
        for _ in range(100):  # A server takes a moment to know of them.
            if await bound.runner._cluster.has_search_attributes():
                break
            bound.runner._search = None
            await asyncio.sleep(0.1)
        await bound.run(Num(), run_id=run_id)
        described = await driver.client.get_workflow_handle(run_id).describe()
    findings = {pair.key.name: pair.value for pair in described.typed_search_attributes}
    assert findings["StromaPipeline"] == "pipe"
    assert findings["StromaStatus"] == "PARTIAL"


@pytest.mark.core
async def test_a_worker_that_ends_hands_its_attempt_on(temporal: TemporalDriver) -> None:
    """A worker that is shut down in the middle of an attempt cancels no run: another one makes the attempt anew."""
    calls: list[str] = []
    redelivered: list[bool] = []
    started, go_on = asyncio.Event(), asyncio.Event()

    async def waits(state: Num) -> dict[str, int]:
        from stroma import current_node

        execution = current_node()
        calls.append("w")
        redelivered.append(execution.redelivered)
        started.set()
        await go_on.wait()
        return {"n": state.n + 1}

    pipeline = Pipeline("pipe", [node("w", waits)])
    runner = temporal.runner(RunConfig(policy_map=NEVER))
    first = stroma_worker(temporal.client, temporal.queue, [pipeline])
    running_worker = asyncio.create_task(first.run())
    running = asyncio.create_task(runner.run(pipeline, Num()))
    await started.wait()
    await first.shutdown()
    await running_worker
    go_on.set()
    async with stroma_worker(temporal.client, temporal.queue, [pipeline]):
        result = await asyncio.wait_for(running, 60)
    assert (result.status, calls, redelivered) == (RunStatus.COMPLETED, ["w", "w"], [False, True])
    assert [e.attempt for e in result.trace] == [1]


async def test_what_cannot_be_sent_is_refused_by_name(temporal: TemporalDriver) -> None:
    """A context value that is no JSON, a map of one machine's file: before anything is begun."""
    from stroma import Journal

    async with temporal.bind([counted([], "a")]) as bound:
        with pytest.raises(TypeError, match=r"context\['client'\]"):
            await bound.run(Num(), context={"client": object()})
        with pytest.raises(ValueError, match="only one machine has"):
            await bound.runner.run([map_over("texts", lengths([]), into=Journal())], Num())


@pytest.mark.core
async def test_siblings_that_spend_more_together(temporal: TemporalDriver) -> None:
    """Each alone is within the limit; the run is settled where all spending is known, and stops."""
    calls: list[str] = []
    both = asyncio.Barrier(2)

    def spends(node_id: str) -> Any:
        async def func(state: Num) -> Any:
            calls.append(node_id)
            await both.wait()
            return {"n": 1}, 60

        return node(node_id, func)

    from stroma import ExecutionBudget

    nodes = [parallel(spends("a"), spends("b")), counted(calls, "c")]
    async with temporal.bind(nodes, budget=ExecutionBudget(max_tokens_total=100)) as bound:
        result = await bound.run(Num())
    assert result.status is RunStatus.PARTIAL
    assert sorted(calls) == ["a", "b"]
    assert result.total_tokens == 120
    assert result.final_state == Num(n=0)  # As in a local run: the group has failed with its child.
    (group,) = result.trace
    assert sorted(child.outcome for child in group.children) == ["failure", "success"]
    assert result.failure is not None
    assert result.failure.failure_class is FailureClass.RECOVERABLE
    assert "max_tokens_total" in result.failure.message


# ---------------------------------------------------------------------- the store that shows runs


async def test_a_store_shows_runs_as_those_of_the_local_runner(
    temporal: TemporalDriver, tmp_path: pathlib.Path
) -> None:
    """Runs, attempts and outputs are in the journal as a local run leaves them there; one that waits, with what for."""

    def nodes(calls: list[str]) -> list[Any]:
        return [
            failing(calls, "a", TimeoutError("slow"), tokens=7),
            parallel(half(calls, "l", "left", Left), half(calls, "r", "right", Right), max_concurrency=1),
            joined(calls), asking(calls, "ask"),
        ]  # fmt: skip

    def shown(store: SQLiteStore, run_id: str) -> Any:
        run = store.get_run(run_id)
        assert run is not None
        attempts = [
            replace(attempt, started_ms=0, duration_ms=0.0, started_ns=0, epoch=0)
            for attempt in store.attempts(run_id)
        ]
        return (run.status, run.pipeline, run.tokens, run.nodes, run.error), attempts

    run_id = uuid.uuid4().hex
    async with SQLiteStore(tmp_path / "mirror.db") as store, SQLiteStore(tmp_path / "local.db") as journal:
        temporal.worker_options["store"] = store
        async with temporal.bind(nodes([]), policy_map=THRICE) as bound:
            await bound.run(Num(), run_id=run_id)
            runner = StromaRunner.quick(store=journal, policy_map=THRICE)
            local = Pipeline("pipe", nodes([]))
            await runner.run(local, Num(), run_id=run_id)
            assert shown(store, run_id) == shown(journal, run_id)
            assert [w.reason for w in store.waiting(run_id)] == ["may ask go on?"]
            await bound.runner.signal(run_id, {"approved": True})
            resumed = await bound.go_on(Num(), run_id)
            await runner.signal(run_id, {"approved": True})
            await runner.run(local, Num(), run_id=run_id, resume=True)
            assert resumed.status is RunStatus.RESUMED
            assert shown(store, run_id) == shown(journal, run_id)


async def test_spans_of_a_run_stand_under_one_trace(temporal: TemporalDriver) -> None:
    """What begins, attempts and ends a run are requests of their own: they nest by its trace context."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from stroma.telemetry.opentelemetry import otel_hooks

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    nodes = [counted([], "a"), parallel(half([], "l", "left", Left), half([], "r", "right", Right))]
    async with temporal.bind(nodes, hooks=otel_hooks(tracer=provider)) as bound:
        result = await bound.run(Num(), traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    assert result.hook_errors == []
    spans = {span.name: span for span in exporter.get_finished_spans()}
    names = {span.context.span_id: span.name for span in spans.values()}
    parents = {
        name: None if span.parent is None else names.get(span.parent.span_id) for name, span in spans.items()
    }
    group = "stroma.node parallel(l, r)"
    assert parents == {
        "invoke_workflow pipe": None,  # Under the caller's own.
        "stroma.node a": "invoke_workflow pipe",
        group: "invoke_workflow pipe",
        "stroma.node l": group,
        "stroma.node r": group,
        "stroma.node_end parallel(l, r)": group,
        "stroma.run_end pipe": "invoke_workflow pipe",
    }
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {
        "0af7651916cd43dd8448eb211c80319c"
    }
    assert spans["stroma.run_end pipe"].attributes["stroma.status"] == "COMPLETED"


async def test_limits_of_all_runs_hold_in_every_attempt(
    temporal: TemporalDriver, tmp_path: pathlib.Path
) -> None:
    """A shared budget in a store stops the second run, whichever worker it is on; a limit bounds how many run at once."""
    from stroma import Limit, SharedBudget, SharedBudgetExceeded

    running = [0, 0]

    async def spends(state: Num) -> Any:
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0.02)
        running[0] -= 1
        return {"n": state.n + 1}, 60

    async with SQLiteStore(tmp_path / "shared.db") as store:
        budget = SharedBudget("team", store=store, max_tokens=100, per="month")
        nodes = [parallel(node("a", spends), node("b", spends))]
        limits = {"calls": Limit(concurrent=1, store=store)}
        async with temporal.bind(
            nodes, shared_budgets=budget, limits=limits, node_limits={"a": "calls", "b": "calls"}
        ) as bound:
            first = await bound.run(Num())
            second = await bound.run(Num())
    assert running[1] == 1
    assert first.total_tokens == 120
    assert (second.status, second.total_tokens) == (RunStatus.PARTIAL, 0)
    assert second.failure is not None
    refused = second.failure.exception
    assert isinstance(refused, SharedBudgetExceeded)
    assert (refused.budget, refused.limit, refused.actual) == ("team", 100, 120)
    assert refused.resets_at is not None
    assert refused.resets_at.tzinfo is UTC


async def test_a_worker_that_is_killed_loses_only_what_it_was_at(
    temporal: TemporalDriver, temporal_server: TemporalServer, tmp_path: pathlib.Path
) -> None:
    """After SIGKILL in the middle of an attempt another process makes that attempt anew, and no finished node again."""

    def start() -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "tests.drivers.worker_helper",
            temporal_server.address,
            temporal.queue,
        ]
        return subprocess.Popen([*command, str(tmp_path)], cwd=pathlib.Path(__file__).parents[2])

    def called(node_id: str) -> list[str]:
        return sorted(path.name.split(".")[1] for path in tmp_path.glob(f"{node_id}.*"))

    temporal.options["heartbeat_seconds"] = 3.0
    first = start()
    others: list[subprocess.Popen[bytes]] = []
    try:
        running = asyncio.create_task(temporal.runner().run(worker_helper.pipeline(tmp_path), Num()))
        while not called("slow"):
            await asyncio.sleep(0.02)
            assert first.poll() is None
        first.kill()
        first.wait()
        others.append(start())
        (tmp_path / "go").touch()
        result = await asyncio.wait_for(running, 90)
    finally:
        for process in (first, *others):
            process.kill()
            process.wait()
    assert (result.status, result.final_state, result.total_tokens) == (RunStatus.COMPLETED, Num(n=3), 30)
    assert called("before") == [str(first.pid)]
    assert sorted(called("slow")) == sorted([str(first.pid), str(others[0].pid)])
    assert called("after") == [str(others[0].pid)]
    assert [(e.node_id, e.attempt, e.outcome) for e in result.trace] == [
        ("before", 1, "success"), ("slow", 1, "success"), ("after", 1, "success"),
    ]  # fmt: skip


async def test_what_nobody_foresaw_fails_a_workflow(temporal: TemporalDriver) -> None:
    """It ends, and is not tried again for ever; other workflows on the worker are none of the plugin's business."""
    async with temporal.bind([counted([], "a")]):
        with pytest.raises(WorkflowFailureError):
            await asyncio.wait_for(
                temporal.client.execute_workflow(
                    "stroma.run",
                    {"plan": {"options": {}}, "state": {}},
                    id=uuid.uuid4().hex,
                    task_queue=temporal.queue,
                ),
                30,
            )
    assert StromaPlugin().workflow_failure_exception_types is None
