"""Stored requests hold whatever becomes of the owner, and in any order under many concurrent runs."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.checkpoint.dying_helper import pipeline
from tests.control.control_machine import ControlMachine
from tests.kit import read_line, start_python
from tests.shared_stores import DURABLE, FAMILIES, IN_PROCESS, ON_SERVERS, opened, place
from tests.store_suite.journal import begin

from stroma import ExecutionResult, StromaRunner
from stroma.runner import stored_runs


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.parametrize("way", ["recover", "serve", "unpause"])
def test_killed_before_it_knew(journal: tuple[str, str], tmp_path: Path, way: str) -> None:
    """recover() and workers find the run SUSPENDED, and call nothing; after unpause() a worker does."""
    wish = {"run_id": "r", "hang": True, "calls": str(tmp_path / "calls"), "options": {"lease_seconds": 1.0}}

    async def serve_once(runner: StromaRunner) -> Any:
        outcomes: list[Any] = []
        ends: list[Any] = []

        def note(run_id: str, outcome: Any) -> None:
            outcomes.append(outcome)
            ends.append(asyncio.create_task(runner.shutdown(drain_seconds=0)))

        await asyncio.wait_for(runner.serve(pipeline(wish), poll_seconds=0.1, on_result=note), 30)
        return outcomes[0]

    async def outcome() -> Any:
        with opened(*journal) as store:
            runner = StromaRunner.quick(store=store)
            with start_python("-m", "tests.checkpoint.dying_helper", *journal, json.dumps(wish)) as process:
                assert read_line(process) == "calling"
                # Stopped, it reads no request; killed, it never will.
                process.send_signal(signal.SIGSTOP)
                assert await runner.pause("r") is True
                process.kill()
            wish["hang"] = False
            nodes = pipeline(wish)
            if way == "recover":
                return (await runner.recover(nodes)).get("r")
            if way == "serve":
                record = store.get_run("r")
                assert (record.status, record.error) == ("SUSPENDED", "paused")
                serving = asyncio.create_task(serve_once(runner))
                await asyncio.wait([serving], timeout=1.0)
                assert not serving.done()
                await runner.shutdown(drain_seconds=0)
                serving.cancel()
                return None
            assert await runner.unpause("r") is True
            return await serve_once(runner)

    result = asyncio.run(outcome())
    calls = (tmp_path / "calls").read_text()
    with opened(*journal) as store:
        status = store.get_run("r").status
    if way == "unpause":
        assert isinstance(result, ExecutionResult)
        assert (result.status, status, calls) == ("RESUMED", "RESUMED", "call\ncall\n")
    else:
        assert result is None  # There was nothing to recover any more.
        assert (status, calls) == ("SUSPENDED", "call\n")


@pytest.mark.parametrize("kind", DURABLE)
@pytest.mark.parametrize("request_name", ["cancel", "pause", "set_budget"])
async def test_an_owner_that_reads_no_request(
    kind: str, request_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A request to an owner that reads nothing returns with a warning, and holds from the next opening on."""
    monkeypatch.setattr(stored_runs, "_OWNER_SECONDS", 0.3)
    with place(kind) as where, opened(kind, where) as store, opened(kind, where) as other:
        session = await begin(store, lease_seconds=2.0)
        limits = {"tokens": 5} if request_name == "set_budget" else {}
        asked = getattr(StromaRunner.quick(store=other), request_name)("run", **limits)
        assert await asyncio.wait_for(asked, 10) is True
        assert "has not read the request" in caplog.text
        assert store.get_run("run").holder is not None
        session.abandon()
        again = await begin(store, if_exists="resume", due_ms=1)
        if request_name == "set_budget":
            assert again.control.budget == {"max_tokens_total": 5}
            again.abandon()
        else:
            assert again.finished.status == ("CANCELLED" if request_name == "cancel" else "SUSPENDED")


def _check(kind: str, runs: int, examples: int, steps: int) -> None:
    machine: Any = type("Machine", (ControlMachine,), {"kind": kind, "runs": runs})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            phases=(Phase.generate,),  # To shrink a history of concurrent runs finds another one.
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_a_few_runs(kind: str) -> None:
    """G5, G6. No attempt begins after an acknowledged pause or cancel, nothing committed is bought again."""
    _check(kind, runs=4, examples=8, steps=10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ON_SERVERS)
def test_a_few_runs_on_servers(kind: str) -> None:
    """The same holds over stores of servers."""
    _check(kind, runs=4, examples=4, steps=8)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", FAMILIES)
def test_two_hundred_runs(kind: str) -> None:
    """The same holds for 200 concurrent runs."""
    _check(kind, runs=100, examples=10, steps=20)
