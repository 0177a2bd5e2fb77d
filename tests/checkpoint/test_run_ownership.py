"""A run has one owner: between tasks, between processes, and when processes die, stop or block."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.kit import NEVER, Num, cancel, environment, returning
from tests.shared_stores import IN_PROCESS

from stroma import (
    FailureClass,
    Fenced,
    PipelineChanged,
    RunBusy,
    RunExists,
    RunFailed,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    stroma_node,
)
from stroma.checkpoint.durable.owner import LIVE_SESSIONS, Owner, is_gone, new_owner
from stroma.checkpoint.durable.rows import Fence
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.payloads import Payloads

HELPER = Path(__file__).with_name("owner_helper.py")


class Process:
    """One helper process, told line by line what it prints."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.child = child

    async def line(self) -> str:
        async with asyncio.timeout(30):
            line = await self.child.stdout.readline()
        if not line:
            raise AssertionError((await self.child.stderr.read()).decode()[-2000:])
        return line.decode().strip()

    async def until(self, what: str) -> str:
        while not (line := await self.line()).startswith(what):
            pass
        return line

    async def outcome(self) -> str:
        """What the run came to: the last line."""
        line = ""
        while not line or line.startswith(("in ", "ready")):
            line = await self.line()
        return line


class Machine:
    """A store, and the processes that share it."""

    def __init__(self, kind: str, where: str, folder: Path) -> None:
        self.kind, self.where = kind, where
        self.side = folder / "calls"
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self, **options: Any) -> Process:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            str(HELPER),
            self.kind,
            self.where,
            str(self.side),
            json.dumps(options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(),
        )
        self.processes.append(child)
        process = Process(child)
        assert await process.line() == "ready"
        return process

    def calls(self) -> list[str]:
        """The nodes called, in order."""
        return [line.split()[1] for line in self.side.read_text().splitlines()] if self.side.exists() else []

    async def end(self) -> None:
        for child in self.processes:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.communicate()


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    instance = Machine("sqlite", str(tmp_path / "runs.db"), tmp_path)
    yield instance
    await instance.end()


@pytest.fixture
async def any_machine(journal: tuple[str, str], tmp_path: Path) -> AsyncIterator[Machine]:
    """One whose store is of each kind that processes can share."""
    instance = Machine(*journal, tmp_path)
    yield instance
    await instance.end()


@pytest.mark.slow
async def test_a_run_has_one_owner(machine: Machine) -> None:
    """G10: A second process that resumes a run gets RunBusy with the name of the owner, and calls nothing."""
    first = await machine.start(waits={"sleep1": 30})
    await first.until("in n1")
    second = await machine.start()
    assert await second.outcome() == f"busy process {first.child.pid} on {os.uname().nodename}"
    assert machine.calls() == ["n0", "n1"]


async def _five(machine: Machine, **options: Any) -> list[str]:
    """Let five processes begin at once, and return what became of each."""
    processes = await asyncio.gather(*(machine.start(**options) for _ in range(5)))
    for process in processes:
        process.child.stdin.write(b"go\n")
    return await asyncio.gather(*(process.outcome() for process in processes))


@pytest.mark.slow
async def test_five_processes_at_once(any_machine: Machine) -> None:
    """G10: Of five processes that start one run at once, one executes it and the others get RunBusy."""
    outcomes = await _five(any_machine, waits={"wait": 1, "sleep0": 0.5, "sleep1": 0.5})
    assert Counter(outcome.split()[0] for outcome in outcomes) == {"COMPLETED": 1, "busy": 4}
    assert any_machine.calls() == ["n0", "n1", "n2"]


@pytest.mark.slow
async def test_five_processes_attach(machine: Machine) -> None:
    """Processes that attach wait for the one that runs, and all have its result."""
    outcomes = await _five(machine, waits={"wait": 1, "sleep1": 0.2}, if_running="attach")
    # Whoever comes after the end begins anew, as ever.
    assert set(outcomes) == {"COMPLETED - Count(n=3)"}
    assert len(machine.calls()) % 3 == 0


@pytest.mark.slow
async def test_a_run_whose_process_died_is_free_at_once(machine: Machine) -> None:
    """After kill -9 another process goes on at once, whatever is left of the lease."""
    first = await machine.start(waits={"sleep1": 30}, lease_seconds=3600)
    await first.until("in n1")
    first.child.kill()
    await first.child.wait()
    second = await machine.start(resume=True)
    assert await second.outcome() == "RESUMED - Count(n=3)"
    assert machine.calls() == ["n0", "n1", "n1", "n2"]


@pytest.mark.slow
async def test_a_stopped_process_loses_its_run(machine: Machine) -> None:
    """G10: The late writes of a process that was stopped for longer than its lease are refused."""
    first = await machine.start(waits={"sleep1": 0.3}, lease_seconds=0.5)
    await first.until("in n1")
    first.child.send_signal(signal.SIGSTOP)
    second = await machine.start(resume=True)
    outcome = await second.outcome()
    while outcome.startswith("busy"):
        second = await machine.start(resume=True)
        outcome = await second.outcome()
    assert outcome == "RESUMED - Count(n=3)"
    first.child.send_signal(signal.SIGCONT)
    assert await first.outcome() == "PARTIAL Fenced Count(n=1)"
    assert machine.calls() == ["n0", "n1", "n1", "n2"]
    with SQLiteStore(machine.where) as store:
        run = store.get_run("owned")
        assert (run.status, run.nodes, run.tokens) == ("RESUMED", 3, 30)


@pytest.mark.slow
async def test_a_stopped_process_is_cancelled(machine: Machine) -> None:
    """A process that is stopped beyond its lease while its run is cancelled calls nothing when it wakes."""
    first = await machine.start(waits={"sleep1": 0.3}, lease_seconds=0.5)
    await first.until("in n1")
    first.child.send_signal(signal.SIGSTOP)
    with SQLiteStore(machine.where) as store:
        while store.read(lambda rows: rows.find("owned").holder, None) is not None:  # type: ignore[union-attr]
            await asyncio.sleep(0.05)
        assert await store.cancel("owned") is True
        first.child.send_signal(signal.SIGCONT)
        assert await first.outcome() == "PARTIAL Fenced Count(n=1)"
        assert machine.calls() == ["n0", "n1"]
        run = store.get_run("owned")
        assert (run.status, run.nodes) == ("CANCELLED", 1)


@pytest.mark.slow
async def test_a_blocked_loop_keeps_its_run(machine: Machine) -> None:
    """A lease is kept up while a node blocks the event loop for longer than it lasts."""
    first = await machine.start(waits={"block1": 4}, lease_seconds=0.3)
    await first.until("in n1")
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        second = await machine.start(resume=True)
        assert (await second.outcome()).startswith("busy")
    assert await first.outcome() == "COMPLETED - Count(n=3)"


@pytest.mark.slow
async def test_an_attached_process_goes_on_when_the_owner_dies(machine: Machine) -> None:
    """Whoever waits for a run whose process dies goes on with it."""
    first = await machine.start(waits={"sleep1": 30})
    await first.until("in n1")
    second = await machine.start(if_running="attach")
    await asyncio.sleep(0.1)
    first.child.kill()
    assert await second.outcome() == "RESUMED - Count(n=3)"
    assert machine.calls() == ["n0", "n1", "n1", "n2"]


@pytest.mark.slow
async def test_a_process_may_be_declared_dead(machine: Machine) -> None:
    """if_running="take_over" does not wait for the lease, and fences the owner off."""
    first = await machine.start(waits={"sleep1": 8}, lease_seconds=3600)
    await first.until("in n1")
    second = await machine.start(resume=True, if_running="take_over")
    assert await second.outcome() == "RESUMED - Count(n=3)"
    assert await first.outcome() == "PARTIAL Fenced Count(n=1)"


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-1, 1])
async def test_moved_clocks_change_nothing(machine: Machine, hours: int) -> None:
    """A process whose wall clock is an hour wrong takes no run away, and loses none."""
    first = await machine.start(waits={"sleep1": 30})
    await first.until("in n1")
    async with SQLiteStore(machine.where) as store:
        with pytest.MonkeyPatch.context() as patch:
            real = time.time_ns
            patch.setattr(time, "time_ns", lambda: real() + hours * 3_600_000_000_000)
            with pytest.raises(RunBusy):
                await _runner(store).run(_nodes([]), Num())


def _nodes(calls: list[str], gate: asyncio.Event | None = None, fails: bool = False) -> list[Any]:
    def make(node_id: str) -> Any:
        async def func(state: Num) -> Any:
            calls.append(node_id)
            if gate is not None and node_id == "b":
                await gate.wait()
            if fails and node_id == "b":
                raise ValueError("b is broken")
            return {"n": state.n + 1}, 10

        return stroma_node(node_id, input=Num, output=Num)(func)

    return [make("a"), make("b"), make("c")]


def _runner(store: Any, **config: Any) -> StromaRunner:
    config.setdefault("run_id", "owned")
    return StromaRunner.quick(store=store, policy_map=NEVER, **config)


store = store_fixture(*IN_PROCESS)


async def _held(store: Any, calls: list[str], gate: asyncio.Event, **config: Any) -> asyncio.Task[Any]:
    """A run that is under way, inside node b."""
    task = asyncio.create_task(_runner(store, **config).run(_nodes(calls, gate), Num()))
    while "b" not in calls:
        await asyncio.sleep(0.001)
    return task


async def test_a_task_is_told_too(store: Any) -> None:
    """Two tasks of one process do not run the same run side by side either."""
    calls: list[str] = []
    gate = asyncio.Event()
    task = await _held(store, calls, gate)
    with pytest.raises(RunBusy, match='if_running="attach"'):
        await _runner(store).run(_nodes(calls), Num())
    gate.set()
    assert (await task).status is RunStatus.COMPLETED
    assert calls == ["a", "b", "c"]
    assert (await _runner(store).run(_nodes(calls), Num())).status is RunStatus.COMPLETED


async def test_attaching_gives_the_result(store: Any) -> None:
    """if_running="attach" waits for the result of the one that runs, and calls nothing."""
    calls: list[str] = []
    gate = asyncio.Event()
    task = await _held(store, calls, gate)
    waiting = [
        asyncio.create_task(_runner(store, if_running="attach").run(_nodes(calls), Num())) for _ in range(5)
    ]
    await asyncio.sleep(0.05)
    gate.set()
    for result in await asyncio.gather(task, *waiting):
        assert (result.status, result.final_state, result.failure) == (RunStatus.COMPLETED, Num(n=3), None)
    assert calls == ["a", "b", "c"]


async def test_a_node_cannot_attach_to_its_own_run(store: Any) -> None:
    """A node that waits for the end of its own run gets RunBusy at once, in place of a deadlock."""
    runner = _runner(store, if_running="attach")

    async def wait(state: Num) -> Num:
        return (await runner.run([waits], Num(), run_id="r")).output

    waits = stroma_node("waits", input=Num, output=Num)(wait)
    result = await runner.run([waits], Num(), run_id="r")
    assert isinstance(result.failure.exception, RunBusy)
    assert "cannot wait for its own end in its node 'waits'" in result.failure.message


async def test_attaching_to_a_failure_gives_the_failure(store: Any) -> None:
    """Whoever waits for a run that fails is told so, with its reason, and runs nothing again."""
    calls: list[str] = []
    gate = asyncio.Event()
    task = asyncio.create_task(_runner(store).run(_nodes(calls, gate, fails=True), Num()))
    while "b" not in calls:
        await asyncio.sleep(0.001)
    waiting = asyncio.create_task(_runner(store, if_running="attach").run(_nodes(calls), Num()))
    await asyncio.sleep(0.05)
    gate.set()
    assert (await task).status is RunStatus.PARTIAL
    result = await waiting
    assert (result.status, result.final_state) == (RunStatus.PARTIAL, Num(n=1))
    assert isinstance(result.failure.exception, RunFailed)
    failure = result.failure
    assert (str(failure), failure.message) == ("ValueError: b is broken", "b is broken")
    assert (failure.node_id, failure.attempt, failure.failure_class) == ("b", 1, FailureClass.AMBIGUOUS)
    assert calls == ["a", "b"]


@pytest.mark.core
@pytest.mark.parametrize(
    ("given", "resume_from", "text"), [(5, None, "with another input"), (0, "b", "is already running")]
)
async def test_another_request_cannot_attach(
    store: Any, given: int, resume_from: str | None, text: str
) -> None:
    """Only a request with the same input may attach to a run, and none that wants outputs of its own."""
    calls: list[str] = []
    gate = asyncio.Event()
    task = await _held(store, calls, gate)
    with pytest.raises(RunBusy, match=text):
        async with asyncio.timeout(5):
            runner = _runner(store, if_running="attach")
            await runner.run(_nodes(calls), Num(n=given), resume_from=resume_from)
    gate.set()
    await task


@pytest.mark.core
async def test_what_goes_wrong_beside_the_leases_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that renews leases continues, whatever a driver or a closed loop raises in it."""
    async with SQLiteStore(tmp_path / "runs.db") as store, SQLiteStore(tmp_path / "runs.db") as other:
        read, surprises = store.read, ["one", "two"]

        def surprising(query: Any, nothing: Any) -> Any:
            if surprises and threading.current_thread().name == "stroma-leases":
                raise RuntimeError(surprises.pop())
            return read(query, nothing)

        monkeypatch.setattr(store, "read", surprising)
        calls: list[str] = []
        gate = asyncio.Event()
        task = await _held(store, calls, gate, lease_seconds=1.0)
        until = time.monotonic() + 3.5
        while time.monotonic() < until:
            await asyncio.sleep(0.05)
        with pytest.raises(RunBusy):
            await _runner(other).run(_nodes(calls), Num())
        assert not surprises
        gate.set()
        assert (await task).status is RunStatus.COMPLETED


async def test_whoever_waits_can_be_cancelled(store: Any) -> None:
    """A task that waits for a run is cancelled like any other; the run goes on."""
    calls: list[str] = []
    gate = asyncio.Event()
    task = await _held(store, calls, gate)
    waiting = asyncio.create_task(_runner(store, if_running="attach").run(_nodes(calls), Num()))
    await asyncio.sleep(0.05)
    await cancel(waiting)
    gate.set()
    assert (await task).status is RunStatus.COMPLETED


@pytest.mark.core
async def test_a_finished_run_is_returned(store: Any) -> None:
    """if_exists="return" gives the result of a finished run without a call or a change; else it continues."""
    calls: list[str] = []
    assert (await _runner(store).run(_nodes(calls, fails=True), Num())).status is RunStatus.PARTIAL
    returning = _runner(store, if_exists="return")
    result = await returning.run(_nodes(calls), Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=3))
    before = store.get_run("owned")
    result = await returning.run(_nodes(calls), Num())
    assert (result.status, result.final_state, len(result.trace)) == (RunStatus.RESUMED, Num(n=3), 0)
    assert store.get_run("owned") == before
    assert calls == ["a", "b", "b", "c"]
    with pytest.raises(PipelineChanged, match="finished without node 'd'"):
        await returning.run([*_nodes(calls), _more("d")], Num())


def _more(node_id: str) -> Any:
    return stroma_node(node_id, input=Num, output=Num)(returning({"n": 0}))


async def test_an_existing_run_can_be_refused(store: Any) -> None:
    """if_exists="error" runs a new id, and raises RunExists for one that was used."""
    calls: list[str] = []
    refusing = _runner(store, if_exists="error")
    assert (await refusing.run(_nodes(calls), Num())).status is RunStatus.COMPLETED
    with pytest.raises(RunExists, match="COMPLETED"):
        await refusing.run(_nodes(calls), Num())
    assert calls == ["a", "b", "c"]


@pytest.mark.core
async def test_an_owner_that_is_taken_over_from_stops(store: Any) -> None:
    """G10: An owner that was replaced stops at its next commit: PARTIAL, with Fenced."""
    calls: list[str] = []
    gate = asyncio.Event()
    task = await _held(store, calls, gate)
    result = await _runner(store, if_running="take_over", resume=True).run(_nodes(calls), Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=3))
    gate.set()
    stopped = await task
    assert stopped.status is RunStatus.PARTIAL
    assert isinstance(stopped.failure.exception, Fenced)
    assert calls == ["a", "b", "b", "c"]


def test_owners_are_read_back() -> None:
    """An owner is text in the store, and anything else there is nobody."""
    owner = new_owner(test_owners_are_read_back)
    assert Owner.read(str(owner)) == owner
    for text in ("", None, "a|b", "a|b|c|d|e|f", "||||||"):
        assert Owner.read(text) is None


def test_only_what_is_known_to_be_gone_is_gone() -> None:
    """A process of another machine, boot or container may be alive; one of ours is looked up."""
    alive = new_owner(test_only_what_is_known_to_be_gone_is_gone)
    if not alive.boot:
        pytest.skip("this system does not say which of its starts it is in")
    assert not is_gone(alive)
    assert is_gone(alive._replace(token="no session of ours"))
    assert is_gone(alive._replace(pid=2**22 + 1))
    assert is_gone(alive._replace(pid=os.getppid(), born=1))  # The id is used again.
    assert not is_gone(alive._replace(pid=2**22 + 1, boot="another"))
    assert not is_gone(alive._replace(pid=2**22 + 1, space=1))


async def test_a_run_has_its_owner_until_its_end_is_kept() -> None:
    """Who looks while the end of a run is being written finds a run at work, and none whose process died."""
    entry: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    session = DurableSession("x", lambda _: entry, Payloads())
    owner = new_owner(session)
    session.fence, session.finished = Fence(1, 1, 1, str(owner), 30.0), None
    pending = session.end("COMPLETED", None)
    assert pending is not None
    await asyncio.sleep(0)
    assert owner.token in LIVE_SESSIONS
    asyncio.get_running_loop().call_soon(entry.set_result, None)
    await pending
    assert owner.token not in LIVE_SESSIONS
