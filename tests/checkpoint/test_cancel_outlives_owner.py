"""A cancel() that was acknowledged ends its run, whatever becomes of the process that the run was in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.dying_helper import State, pipeline
from tests.kit import context_of, read_line, start_python
from tests.shared_stores import opened

from stroma import (
    ExecutionResult,
    Limit,
    Pipeline,
    SQLiteStore,
    StromaRunner,
    current_run,
    execute_step,
    stroma_node,
)
from stroma.adapters import Guard
from stroma.checkpoint import Fenced
from stroma.checkpoint.durable.owner import Owner
from stroma.checkpoint.durable.store import LeaseRenewer
from stroma.failures.errors import RunCancelled


@pytest.mark.slow
@pytest.mark.parametrize("way", ["recover", "resume", "attach"])
def test_killed_before_it_knew(journal: tuple[str, str], tmp_path: Path, way: str) -> None:
    """Whoever resumes a cancelled run finds it CANCELLED and calls nothing, whichever way it goes on."""
    wish = {"run_id": "r", "hang": True, "calls": str(tmp_path / "calls"), "options": {"lease_seconds": 60.0}}

    async def outcome() -> Any:
        with opened(*journal) as store:
            runner = StromaRunner.quick(store=store)
            with start_python("-m", "tests.checkpoint.dying_helper", *journal, json.dumps(wish)) as process:
                assert read_line(process) == "calling"
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


@pytest.mark.parametrize("method", ["cancel", "pause", "set_budget"])
async def test_fences_off_an_owner_that_lost_its_lease(
    journal: tuple[str, str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A request about a run whose live owner could not renew its lease fences it: nothing more is stored."""
    with opened(*journal) as store, opened(*journal) as other:
        await _request_late_owner(store, other, monkeypatch, method)


_CHANGED = (
    "run 'r' was paused, or got another budget, while this process did not renew its lease; this execution "
    "records nothing more, resume the run"
)
#: By request: the status of the run afterwards, and what the late owner gets to read.
REFUSALS = {
    "cancel": ("CANCELLED", "run 'r' was cancelled by {place}; this execution records nothing more"),
    "pause": ("SUSPENDED", _CHANGED),
    "set_budget": ("RUNNING", _CHANGED),
}


async def _request_late_owner(store: Any, other: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    status, message = REFUSALS[method]
    first, second = Paid("first", waits=True), Paid("second")
    runner = StromaRunner.quick(store=store, lease_seconds=0.1)
    pipeline = Pipeline("paid", [first.node(), second.node()])
    arguments = ({"max_tokens_total": 7},) if method == "set_budget" else ()
    async with _late(monkeypatch, other, first, runner.run(pipeline, State(), run_id="r")) as owner:
        epoch = other.get_run("r").epoch
        assert await getattr(other, method)("r", *arguments) is True
        assert (other.get_run("r").status, other.get_run("r").holder) == (status, None)
        assert other.get_run("r").epoch == epoch  # No other process has made attempts.
        first.gate.set()
        result = await owner
    assert isinstance(result.failure.exception, Fenced)
    place = Owner.read(other.read(lambda rows: rows.find("r").owner, None)).place
    assert str(result.failure.exception) == message.format(place=place)
    assert (first.calls, second.calls) == (1, 0)
    assert other.get_run("r").status == status
    if method == "set_budget":
        again = await StromaRunner.quick(store=other).resume(pipeline, "r")
        assert (again.status, second.limits) == ("RESUMED", [7])
    assert await other.cancel("r") is (method == "pause")


async def test_a_late_owner_of_a_run_that_was_begun_anew_learns_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late owner whose run was paused and resumed, or deleted and started again, learns the new owner."""
    for way, change in (("paused", "taken over"), ("deleted", "deleted, and started again")):
        path = tmp_path / f"{way}.db"
        first = Paid("first", waits=True)
        async with SQLiteStore(path) as store, SQLiteStore(path) as other:
            run = StromaRunner.quick(store=store, lease_seconds=0.1).run([first.node()], State(), run_id="r")
            async with _late(monkeypatch, other, first, run) as owner:
                node = [Paid("first").node()]
                if way == "paused":
                    await other.pause("r")
                    await StromaRunner.quick(store=other).resume(node, "r")
                else:
                    await other.delete("r")
                    await StromaRunner.quick(store=other).run(node, State(), run_id="r")
                first.gate.set()
                result = await owner
        assert f"run 'r' was {change} by process {os.getpid()} on " in str(result.failure.exception)


@pytest.mark.core
async def test_a_budget_of_a_dead_process_leaves_its_death_to_be_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that kills each process is given up in spite of budgets that are set in between."""
    gone = Owner("elsewhere", "boot", 1, 1, 1, "token")
    monkeypatch.setattr("stroma.checkpoint.durable.store.new_owner", lambda *_, **__: gone)
    monkeypatch.setattr(LeaseRenewer, "watch", lambda *_: None)
    first = Paid("first", waits=True)
    async with SQLiteStore(tmp_path / "runs.db") as store, SQLiteStore(tmp_path / "runs.db") as other:
        run = StromaRunner.quick(store=store, lease_seconds=0.1).run([first.node()], State(), run_id="r")
        async with _late(monkeypatch, other, first, run) as owner:
            monkeypatch.undo()
            assert await other.set_budget("r", {"max_tokens_total": 7}) is True
            runner = StromaRunner.quick(store=other, max_recoveries=1)
            result = await runner.resume([Paid("first").node()], "r")
            assert result.failure.reason == "poison"
            first.gate.set()
            await owner


@pytest.mark.core
async def test_plain_code_that_was_fenced_off_calls_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the step that found another owner, the next steps of its run are not called, and say the same."""
    first, second = Paid("first", waits=True), Paid("second")

    async def plain() -> list[ExecutionResult]:
        runner = StromaRunner.quick(store=store, run_id="r", lease_seconds=0.1)
        async with context_of(runner) as ctx:
            return [await execute_step(one.step_id, one.node(), State(), ctx) for one in (first, second)]

    async with SQLiteStore(tmp_path / "runs.db") as store, SQLiteStore(tmp_path / "runs.db") as other:
        async with _late(monkeypatch, other, first, plain()) as owner:
            assert await other.cancel("r") is True
            first.gate.set()
            results = await owner
        ends = [(one.status, one.failure.node_id) for one in results]
        assert ends == [("PARTIAL", "first"), ("PARTIAL", "second")]
        assert all(isinstance(one.failure.exception, Fenced) for one in results)
        assert (first.calls, second.calls) == (1, 0)
        assert other.get_run("r").status == "CANCELLED"


@pytest.mark.core
async def test_a_guard_that_was_fenced_calls_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the code around its steps catches their exceptions: the run of the guard is PARTIAL."""
    first, second = Paid("first", waits=True), Paid("second")

    async def guarded() -> ExecutionResult:
        guard = Guard(StromaRunner.quick(store=store, run_id="r", lease_seconds=0.1))
        async with guard.run() as run:
            for one in (first, second):
                with contextlib.suppress(Fenced):
                    await guard.wrap(one.step_id, one)(State())
        return run.result

    async with SQLiteStore(tmp_path / "runs.db") as store, SQLiteStore(tmp_path / "runs.db") as other:
        async with _late(monkeypatch, other, first, guarded()) as owner:
            assert await other.cancel("r") is True
            first.gate.set()
            result = await owner
    assert result.status == "PARTIAL"
    assert (first.calls, second.calls) == (1, 0)


@pytest.mark.core
async def test_a_step_of_plain_code_that_waits_for_its_turn_is_not_called_after_a_cancel() -> None:
    """After ``cancel()`` returned, plain code calls no step, nor one that was queued for a limit by then."""
    before, queued = Paid("pay", waits=True), Paid("pay")
    runner = StromaRunner.quick(run_id="r", limits={"pay": Limit(concurrent=1)})

    async def plain() -> ExecutionResult:
        async with context_of(runner) as ctx:
            return await execute_step("pay", queued.node(), State(), ctx)

    other = asyncio.create_task(runner.run([before.node()], State(), run_id="other"))
    await before.called.wait()
    gate = runner.config.limits["pay"].named("pay")
    owner = asyncio.create_task(plain())
    while not gate.line.waiting:
        await asyncio.sleep(0)
    assert await runner.cancel("r") is True
    before.gate.set()
    assert ((await owner).status, queued.calls) == ("CANCELLED", 0)
    assert (await other).status == "COMPLETED"


@pytest.mark.core
async def test_plain_code_without_an_end_stores_what_it_calls(tmp_path: Path) -> None:
    """A cancel does not reach plain code without ``async with``, and does not take its outputs from it."""
    first, second = Paid("first", waits=True), Paid("second")
    async with SQLiteStore(tmp_path / "runs.db") as store:
        runner = StromaRunner.quick(store=store, run_id="r")
        ctx = context_of(runner)

        async def plain() -> list[ExecutionResult]:
            return [await execute_step(one.step_id, one.node(), State(), ctx) for one in (first, second)]

        owner = asyncio.create_task(plain())
        await first.called.wait()
        assert await store.cancel("r") is True
        first.gate.set()
        assert [result.status for result in await owner] == ["COMPLETED", "COMPLETED"]
        assert store.get_run("r").nodes == 2


@pytest.mark.core
async def test_a_guard_without_a_run_of_its_own_is_cancelled(tmp_path: Path) -> None:
    """A cancel reaches the steps that a guard has outside of ``guard.run()``: the current one is the last."""
    first, second = Paid("first", waits=True), Paid("second")
    async with SQLiteStore(tmp_path / "runs.db") as store:
        guard = Guard(StromaRunner.quick(store=store, run_id="r"))
        owner = asyncio.create_task(guard.wrap("first", first)(State()))
        await first.called.wait()
        assert await store.cancel("r") is True
        while not guard.current.ctx.stopping.is_cancelled:
            await asyncio.sleep(0.01)
        first.gate.set()
        assert await owner == State()
        with pytest.raises(RunCancelled):
            await guard.wrap("second", second)(State())
        assert (first.calls, second.calls) == (1, 0)


@pytest.mark.core
async def test_is_true_if_an_earlier_answer_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that was lost after it had committed repeats the operation: this call cancelled the run."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        await StromaRunner.quick(store=store, run_id="r").run([Paid("fails", fails=True).node()], State())
        submit = store._submit

        async def twice(operation: Any) -> Any:
            await submit(operation)
            return await submit(operation)

        with monkeypatch.context() as patched:
            patched.setattr(store, "_submit", twice)
            assert await store.cancel("r") is True
        assert await store.cancel("r") is False


class Paid:
    """A function that counts its calls, and may wait in one."""

    def __init__(self, step_id: str, *, waits: bool = False, fails: bool = False) -> None:
        self.step_id = step_id
        self.calls = 0
        self.limits: list[int | None] = []
        self.fails = fails
        self.called, self.gate = asyncio.Event(), asyncio.Event()
        if not waits:
            self.gate.set()

    async def __call__(self, state: State) -> State:
        self.calls += 1
        run = current_run()
        self.limits.append(None if run is None else run.budget.max_tokens_total)
        self.called.set()
        await self.gate.wait()
        if self.fails:
            raise TimeoutError
        return state

    def node(self) -> Any:
        @stroma_node(self.step_id, input=State, output=State)
        async def node(state: State) -> State:
            return await self(state)

        return node


@contextlib.asynccontextmanager
async def _late(
    monkeypatch: pytest.MonkeyPatch, other: Any, first: Paid, work: Coroutine[Any, Any, Any]
) -> AsyncIterator[asyncio.Task[Any]]:
    """Yield the task of an owner that is in its first call, once its lease is over."""
    monkeypatch.setattr(LeaseRenewer, "watch", lambda *_: None)
    owner = asyncio.create_task(work)
    await first.called.wait()
    while other.read(lambda rows: rows.find("r").holder, None) is not None:
        await asyncio.sleep(0.01)
    yield owner
