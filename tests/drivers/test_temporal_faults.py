"""Workers and the server of Temporal are killed and stopped: no commit is repeated, and every run ends."""

import asyncio
import collections
import contextlib
import pathlib
import signal
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import CancelledError
from tests.drivers.conftest import Fleet, fleet_of
from tests.drivers.worker_helper import NODES, pipeline
from tests.kit import Num
from tests.servers_temporal import TemporalServer

from stroma import RunStatus

pytestmark = pytest.mark.nightly


def check_records(fleet: Fleet, store: Any, *, in_flight: int) -> None:
    """Check that each node has one output, and that only calls in flight were repeated."""
    outputs = [one.node_id for one in store.attempts(fleet.run_id) if one.output is not None]
    assert sorted(outputs) == [f"n{number}" for number in range(NODES)]
    calls = collections.Counter(node for node, _ in fleet.lines("call"))
    assert set(calls) == set(range(NODES))
    assert sum(calls.values()) <= NODES + in_flight


async def test_a_worker_that_is_killed(temporal_server: TemporalServer, tmp_path: pathlib.Path) -> None:
    """After SIGKILL of its worker another one continues the run; only the call in flight is repeated."""
    async with fleet_of(temporal_server, tmp_path) as (fleet, runner, store):
        first = fleet.start()
        handle = await runner.submit(pipeline(), Num(), run_id=fleet.run_id)
        await fleet.until(lambda: len(fleet.lines("call")) >= 3)
        first.kill()
        second = fleet.start()
        result = await handle.result(timeout=90)
        assert (result.status, result.output) == (RunStatus.RESUMED, Num(n=NODES))
        check_records(fleet, store, in_flight=1)
        assert {pid for _, pid in fleet.lines("call")} == {first.pid, second.pid}


async def test_a_worker_that_is_stopped(temporal_server: TemporalServer, tmp_path: pathlib.Path) -> None:
    """A worker stopped for longer than its lease loses the run, and the store refuses its late results."""
    async with fleet_of(temporal_server, tmp_path) as (fleet, runner, store):
        first = fleet.start()
        handle = await runner.submit(pipeline(), Num(), run_id=fleet.run_id)
        await fleet.until(lambda: len(fleet.lines("call")) >= 3)
        first.send_signal(signal.SIGSTOP)
        second = fleet.start()
        await fleet.until(lambda: any(pid == second.pid for _, pid in fleet.lines("call")))
        first.send_signal(signal.SIGCONT)
        result = await handle.result(timeout=90)
        assert result.output == Num(n=NODES)
        check_records(fleet, store, in_flight=1)
        late = [pid for _, pid in fleet.lines("call")]
        assert late[late.index(second.pid) :].count(first.pid) == 0
        assert first.poll() is None


async def test_a_cancellation_of_a_run_whose_worker_is_lost(
    temporal_server: TemporalServer, tmp_path: pathlib.Path
) -> None:
    """A cancellation that the worker of the run did not live to read is carried out by another worker."""
    async with fleet_of(temporal_server, tmp_path) as (fleet, runner, store):
        first = fleet.start()
        await runner.submit(pipeline(), Num(), run_id=fleet.run_id)
        await fleet.until(lambda: len(fleet.lines("call")) >= 2)
        workflow = fleet.client.get_workflow_handle(fleet.run_id)
        await workflow.cancel()
        while not any(
            event.HasField("activity_task_cancel_requested_event_attributes")
            for event in (await workflow.fetch_history()).events
        ):
            await asyncio.sleep(0)
        first.kill()
        second = fleet.start()
        with pytest.raises(WorkflowFailureError) as caught:
            await asyncio.wait_for(workflow.result(), 90)
        assert isinstance(caught.value.cause, CancelledError)
        assert store.get_run(fleet.run_id).status == "CANCELLED"
        assert second.pid not in {pid for _, pid in fleet.lines("call")}


async def test_a_server_that_is_killed(tmp_path: pathlib.Path) -> None:
    """Steps need the store only: a run continues while the server is away, and ends once it is back."""
    server = TemporalServer(tmp_path / "temporal.db")
    try:
        async with fleet_of(server, tmp_path) as (fleet, runner, store):
            fleet.start()
            handle = await runner.submit(pipeline(), Num(), run_id=fleet.run_id)
            await fleet.until(lambda: len(fleet.lines("call")) >= 2)
            server.kill()
            await fleet.until(lambda: len(fleet.lines("done")) >= 5)
            server.start()
            result = await handle.result(timeout=90)
            assert result.output == Num(n=NODES)
            check_records(fleet, store, in_flight=0)
            async with asyncio.timeout(90):
                while True:
                    with contextlib.suppress(Exception):
                        client = await Client.connect(server.address)
                        status = await client.get_workflow_handle(fleet.run_id).result()
                        assert status in ("COMPLETED", "RESUMED")
                        break
                    await asyncio.sleep(0.2)
    finally:
        server.kill()


async def test_a_worker_that_gets_sigterm(temporal_server: TemporalServer, tmp_path: pathlib.Path) -> None:
    """After SIGTERM a worker commits the step in flight and exits; another continues without repeats."""
    async with fleet_of(temporal_server, tmp_path) as (fleet, runner, store):
        first = fleet.start()
        handle = await runner.submit(pipeline(), Num(), run_id=fleet.run_id)
        await fleet.until(lambda: len(fleet.lines("call")) >= 3)
        first.terminate()
        assert await asyncio.to_thread(first.wait, 60) == 0
        assert await handle.status() == "INTERRUPTED"
        fleet.start()
        result = await handle.result(timeout=90)
        assert result.output == Num(n=NODES)
        check_records(fleet, store, in_flight=0)
