"""A cancel() that was acknowledged ends its run, whatever becomes of the process that the run was in."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.dying_helper import State, pipeline
from tests.servers import environment
from tests.shared_stores import opened

from stroma import ExecutionResult, NodeContract, Pipeline, SQLiteStore, StromaRunner, stroma_node
from stroma.checkpoint import Fenced
from stroma.checkpoint.durable.leases import LeaseRenewer


@pytest.mark.slow
@pytest.mark.parametrize("way", ["recover", "resume", "attach"])
def test_killed_before_it_knew(journal: tuple[str, str], tmp_path: Path, way: str) -> None:
    """Whoever goes on with a run that was cancelled finds it CANCELLED and calls nothing, whichever way it goes on."""
    wish = {"run_id": "r", "hang": True, "calls": str(tmp_path / "calls"), "options": {"lease_seconds": 60.0}}
    command = [sys.executable, "-m", "tests.checkpoint.dying_helper", *journal, json.dumps(wish)]

    async def outcome() -> Any:
        with opened(*journal) as store:
            runner = StromaRunner.quick(store=store)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
            assert process.stdout is not None
            with process:
                assert process.stdout.readline() == "calling\n"
                # Stopped, it looks no more; killed, it never will.
                process.send_signal(19)
                assert await store.cancel("r") is True  # As runner.cancel(), which waits for the owner.
                process.kill()
            nodes = pipeline(wish)
            if way == "recover":
                return (await runner.recover(nodes))["r"]
            if way == "resume":
                return await runner.resume(nodes, "r")
            return await runner.run(nodes, State(), run_id="r", if_running="attach", resume=True)

    result = asyncio.run(outcome())
    assert isinstance(result, ExecutionResult)
    assert result.status == "CANCELLED"
    assert (tmp_path / "calls").read_text() == "call\n"
    with opened(*journal) as store:
        assert store.get_run("r").status == "CANCELLED"


@pytest.mark.core
async def test_fences_off_an_owner_that_lost_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel ends a run whose live owner could not renew its lease: that one calls and stores nothing more."""
    async with SQLiteStore(tmp_path / "runs.db") as store, SQLiteStore(tmp_path / "runs.db") as other:
        await _cancel_late_owner(store, other, monkeypatch)


@pytest.mark.slow
async def test_fences_off_in_every_store(journal: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for every store that processes can share."""
    with opened(*journal) as store, opened(*journal) as other:
        await _cancel_late_owner(store, other, monkeypatch)


async def _cancel_late_owner(store: Any, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LeaseRenewer, "watch", lambda *_: None)
    calls: list[str] = []
    called, gate = asyncio.Event(), asyncio.Event()

    @stroma_node("first", NodeContract(node_id="first", input_schema=State, output_schema=State))
    async def first(state: State) -> State:
        calls.append("first")
        called.set()
        await gate.wait()
        return state

    @stroma_node("second", NodeContract(node_id="second", input_schema=State, output_schema=State))
    async def second(state: State) -> State:
        calls.append("second")
        return state

    runner = StromaRunner.quick(store=store, lease_seconds=0.1)
    owner = asyncio.create_task(runner.run(Pipeline("paid", [first, second]), State(), run_id="r"))
    await called.wait()
    while other.read(lambda rows: rows.find("r").holder, None) is not None:
        await asyncio.sleep(0.01)
    assert await other.cancel("r") is True
    assert other.get_run("r").status == "CANCELLED"
    gate.set()
    result = await owner
    assert result.failure is not None
    assert isinstance(result.failure.exception, Fenced)
    assert "run 'r' was cancelled by process" in str(result.failure.exception)
    assert calls == ["first"]
    assert other.get_run("r").status == "CANCELLED"
    assert await other.cancel("r") is False
