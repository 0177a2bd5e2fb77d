"""Records histories for the replay test: ``./dev run python -m tests.drivers.record NAME ...``; all without names.

A recorded history is kept for good: it is what a run in flight looks like when a newer release takes it over. Give a new
name to what a release adds; never record an old one again.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import pathlib
import sys
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any

from temporalio.client import Client
from tests.drivers.conftest import TemporalDriver, connect
from tests.drivers.scenarios import (
    Left,
    Right,
    Texts,
    counted,
    failing,
    half,
    joined,
    lengths,
    measuring,
    sleeping,
)
from tests.drivers.test_parity import asking
from tests.kit import THRICE, Num
from tests.servers_temporal import TemporalServer

from stroma import RunStatus, map_over, parallel
from stroma.checkpoint.payloads import DirectoryBlobs

HISTORIES = pathlib.Path(__file__).parent / "histories"


async def retries(driver: TemporalDriver) -> None:
    calls: list[str] = []
    nodes = [failing(calls, "a", TimeoutError("slow"), ValueError("odd")), counted(calls, "b")]
    async with driver.bind(nodes, policy_map=THRICE) as bound:
        assert (await bound.run(Num(), run_id="retries")).status is RunStatus.COMPLETED


async def groups(driver: TemporalDriver) -> None:
    calls: list[str] = []
    nodes = [
        parallel(
            half(calls, "l", "left", Left), parallel(half(calls, "r", "right", Right), max_concurrency=1)
        ),
        joined(calls),
    ]
    async with driver.bind(nodes) as bound:
        assert (await bound.run(Num(), run_id="groups")).status is RunStatus.COMPLETED


async def items(driver: TemporalDriver) -> None:
    """The last of several histories of one run."""
    driver.options["history_events"] = 50
    with tempfile.TemporaryDirectory() as folder:
        driver.options["payloads"] = driver.worker_options["payloads"] = DirectoryBlobs(folder)
        async with driver.bind([map_over("texts", lengths([]), into="lengths", max_concurrency=4)]) as bound:
            result = await bound.run(Texts(texts=["x"] * 210), run_id="items")
            assert result.status is RunStatus.COMPLETED


async def items_in_turn(driver: TemporalDriver) -> None:
    """A map of several nodes, one of which fails once."""
    nodes = [map_over("texts", measuring([], failing_once="y"), into="lengths", max_concurrency=4)]
    async with driver.bind(nodes, policy_map=THRICE) as bound:
        result = await bound.run(Texts(texts=["x", "y", *["z"] * 8]), run_id="items_in_turn")
        assert result.status is RunStatus.COMPLETED


async def suspended(driver: TemporalDriver) -> None:
    async with driver.bind([asking([], "ask")]) as bound:
        assert (await bound.run(Num(), run_id="suspended")).status is RunStatus.SUSPENDED
        await bound.runner.signal("suspended", {"approved": True})
        assert (await bound.go_on(Num(), "suspended")).status is RunStatus.RESUMED


async def cancelled(driver: TemporalDriver) -> None:
    calls: list[str] = []
    async with driver.bind([parallel(sleeping(calls, "a"), sleeping(calls, "b"))]) as bound:
        running = asyncio.create_task(bound.run(Num(), run_id="cancelled"))
        while len(calls) < 2:
            await asyncio.sleep(0.01)
        await bound.runner.cancel("cancelled")
        assert (await running).status is RunStatus.CANCELLED


RECORDINGS: dict[str, Callable[[TemporalDriver], Awaitable[None]]] = {
    recording.__name__: recording
    for recording in (retries, groups, items, items_in_turn, suspended, cancelled)
}


def _scrub(report: Any) -> None:
    """Nothing of the machine that recorded it: who, and where its files are."""
    if isinstance(report, dict):
        for key, value in report.items():
            if key == "identity":
                report[key] = "worker"
            elif key == "stackTrace":
                report[key] = ""
            else:
                _scrub(value)
    elif isinstance(report, list):
        for value in report:
            _scrub(value)


async def main(names: list[str]) -> None:
    server = TemporalServer()
    try:
        client: Client = await connect(server)
        for name in names or RECORDINGS:
            await RECORDINGS[name](TemporalDriver(client))
            history: Any = json.loads((await client.get_workflow_handle(name).fetch_history()).to_json())
            _scrub(history)
            HISTORIES.mkdir(exist_ok=True)
            data = json.dumps(history, separators=(",", ":")).encode()
            (HISTORIES / f"{name}.json.gz").write_bytes(gzip.compress(data, mtime=0))
            print(f"{name}: {len(history['events'])} events")
    finally:
        server.kill()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
