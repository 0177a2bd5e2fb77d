"""What one does with runs: cancel them from elsewhere, fork them, run many, recover and shut down."""

import asyncio
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.fixtures import store_fixture
from tests.kit import (
    NEVER,
    ONCE,
    THRICE,
    Num,
    SimpleStore,
    cancel,
    computing,
    context_of,
    failing_with,
    node,
    noting,
    quick_on,
    same,
)
from tests.shared_stores import IN_PROCESS

from stroma import (
    AsyncInMemoryStore,
    CheckpointNotFound,
    FailureClass,
    NodeContract,
    NodeHooks,
    Pipeline,
    RunExists,
    RunStatus,
    SQLiteStore,
    StoreError,
    StromaRunner,
    execute_step,
    parallel,
    stroma_node,
)
from stroma.checkpoint import RunRequest
from stroma.contracts.schema import schema_of
from stroma.runner.stored_runs import StoredRuns
from stroma.testing.checkpoints import settled

store = store_fixture(*IN_PROCESS)


class Work:
    """Nodes that add 1; "b" waits for its gate. Counts calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.gate = asyncio.Event()
        self.inside = asyncio.Event()
        self.nodes = [self.make(node_id) for node_id in "abc"]

    def make(self, node_id: str) -> Any:
        async def func(state: Num) -> Any:
            self.calls.append(node_id)
            if node_id == "b":
                self.inside.set()
                await self.gate.wait()
            return {"n": state.n + 1}, 10

        return stroma_node(node_id, input=Num, output=Num)(func)


async def test_a_store_says_where_an_attempt_failed(store: Any) -> None:
    """A store has the frames of the last failed attempt at a place, with the line that raised."""

    async def bad(state: Num) -> Any:
        raise LookupError("nothing there")

    runner = StromaRunner.quick(store=store, policy_map=ONCE)
    await runner.run([stroma_node("bad", input=Num, output=Num)(bad)], Num(), run_id="r")
    trouble = store.failure_site_of("r", 0)
    frame = trouble.own[-1]
    assert (trouble.attempt, frame.file, frame.name) == (2, __file__, "bad")
    assert frame.source == 'raise LookupError("nothing there")'


@pytest.mark.core
async def test_a_run_is_cancelled_from_elsewhere(store: Any) -> None:
    """runner.cancel() ends a run of another task or process; it is CANCELLED, and may be resumed."""
    work, ended = Work(), []

    runner = quick_on(store, hooks=NodeHooks(on_run_end=noting(ended, lambda run_id, result: result.status)))
    task = asyncio.create_task(runner.run(work.nodes, Num(), run_id="r"))
    await work.inside.wait()
    assert await quick_on(store).cancel("r")
    result = await asyncio.wait_for(task, 10)
    assert (result.status, result.final_state, result.failure) == (RunStatus.CANCELLED, Num(n=1), None)
    assert not task.cancelled()
    assert task.cancelling() == 0
    assert ended == [RunStatus.CANCELLED]
    assert store.get_run("r").status == "CANCELLED"
    assert [e.outcome for e in result.trace] == ["success", "cancelled"]
    work.gate.set()
    again = await quick_on(store).run(work.nodes, Num(), run_id="r", resume=True)
    assert (again.status, again.final_state) == (RunStatus.RESUMED, Num(n=3))


async def test_children_are_cancelled_from_elsewhere(store: Any) -> None:
    """A run inside a group ends as well, its children awaited."""
    work = Work()
    group = parallel(work.nodes[1], work.nodes[0])
    task = asyncio.create_task(quick_on(store).run([group], Num(), run_id="r"))
    await work.inside.wait()
    await quick_on(store).cancel("r")
    assert (await asyncio.wait_for(task, 10)).status is RunStatus.CANCELLED


async def test_steps_of_a_cancelled_run_are_not_called(store: Any) -> None:
    """Code that attaches to a run calls no step after its cancellation; the failure says how it ended."""
    work = Work()
    task = asyncio.create_task(quick_on(store).run(work.nodes, Num(), run_id="r"))
    await work.inside.wait()
    runner = quick_on(store, run_id="r", if_running="attach")
    ctx = context_of(runner)
    step = asyncio.create_task(execute_step("c", work.make("c"), Num(), ctx))
    assert await quick_on(store).cancel("r")
    await task
    result = await asyncio.wait_for(step, 10)
    failure = result.failure
    assert (result.status, failure.node_id, failure.attempt) == (RunStatus.PARTIAL, "c", 1)
    assert failure.failure_class is FailureClass.RECOVERABLE
    assert failure.message == "run 'r' has ended: CANCELLED"
    assert "c" not in work.calls


async def test_a_run_whose_loop_was_closed_can_be_cancelled(tmp_path: Path) -> None:
    """A run that was left behind in a closed event loop is nobody's once somebody asks for its end."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        work, entries = Work(), []

        def leave() -> None:
            loop = asyncio.new_event_loop()

            async def begin() -> None:
                work.gate, work.inside = asyncio.Event(), asyncio.Event()
                entries.append(asyncio.create_task(quick_on(store).run(work.nodes, Num(), run_id="r")))
                await work.inside.wait()

            loop.run_until_complete(begin())
            loop.close()

        await asyncio.to_thread(leave)
        assert store.get_run("r").holder is not None
        assert await quick_on(store).cancel("r")
        assert store.get_run("r").status == "CANCELLED"
        entries[0]._log_destroy_pending = False


async def test_a_run_that_nobody_holds_is_cancelled_at_once(store: Any) -> None:
    """Cancelling a run that waits or was interrupted marks it; one that has ended stays as it is."""
    work = Work()
    work.gate.set()
    with pytest.raises(CheckpointNotFound):
        await quick_on(store).cancel("r")
    await quick_on(store).run(work.nodes, Num(), run_id="r")
    assert await quick_on(store).cancel("r") is False
    assert store.get_run("r").status == "COMPLETED"
    stopped = quick_on(store)
    work.gate.clear()
    work.inside.clear()
    task = asyncio.create_task(stopped.run(work.nodes, Num(), run_id="i"))
    await work.inside.wait()
    await stopped.shutdown(drain_seconds=0)
    assert (await task).status is RunStatus.INTERRUPTED
    assert await quick_on(store).cancel("i")
    assert store.get_run("i").status == "CANCELLED"


@pytest.mark.core
async def test_a_cancellation_of_the_task_itself_still_comes_out(store: Any) -> None:
    """A run whose own task is cancelled raises CancelledError, also if somebody asked for its end as well."""
    work = Work()
    task = asyncio.create_task(quick_on(store).run(work.nodes, Num(), run_id="r"))
    await work.inside.wait()
    await store.cancel("r")
    await cancel(task)


@pytest.mark.core
async def test_a_fork_goes_on_from_a_node(store: Any) -> None:
    """fork() runs on from a committed node with an edited state, as a new run that names its parent."""
    work = Work()
    work.gate.set()
    await quick_on(store).run(work.nodes, Num(), run_id="r")
    work.calls.clear()
    result = await quick_on(store).fork("r", work.nodes, at="c", state=Num(n=40), new_run_id="f")
    assert (result.run_id, result.status, result.final_state) == ("f", RunStatus.RESUMED, Num(n=41))
    assert work.calls == ["c"]
    assert (store.get_run("f").parent, store.get_run("r").parent) == ("r", None)
    assert store.get_run("r").status == "COMPLETED"
    assert [a.node_id for a in store.attempts("r")] == ["a", "b", "c"]
    plain = await quick_on(store).fork("r", work.nodes, at="b")
    assert plain.final_state == Num(n=3)
    assert plain.run_id not in ("r", "f")
    first = await quick_on(store).fork("r", work.nodes, at="a", state=Num(n=7), new_run_id="g")
    assert first.final_state == Num(n=10)
    assert (
        await quick_on(store).run(work.nodes, Num(n=7), run_id="g", if_exists="return")
    ).final_state == Num(n=10)


async def test_a_person_gives_the_output_of_a_node_that_failed(store: Any) -> None:
    """A fork starts after a node that failed, and has the given state or output as that node's output."""
    work = Work()
    nodes = [
        work.nodes[0],
        stroma_node("broken", input=Num, output=Num)(failing_with(KeyError, "x")),
        work.nodes[2],
    ]
    assert not (await quick_on(store).run(nodes, Num(), run_id="r")).ok
    forked = await quick_on(store).fork("r", nodes, at="c", state=Num(n=40), new_run_id="f")
    assert (forked.status, forked.final_state) == (RunStatus.RESUMED, Num(n=41))
    assert store.get_run("r").status == "PARTIAL"
    again = await quick_on(store, resume=True).run(nodes, Num(), run_id="f")
    assert (again.final_state, work.calls) == (Num(n=41), ["a", "c"])
    given = await quick_on(store).fork("r", nodes, at="broken", output=Num(n=50))
    assert (given.final_state, work.calls) == (Num(n=51), ["a", "c", "c"])
    last = await quick_on(store).fork("r", nodes[:2], at="broken", output=Num(n=50))
    assert (last.status, last.final_state) == (RunStatus.RESUMED, Num(n=50))
    only = await quick_on(store).fork("r", nodes[:1], at="a", output=Num(n=9))
    assert (only.status, only.final_state, work.calls) == (RunStatus.RESUMED, Num(n=9), ["a", "c", "c"])
    with pytest.raises(ValueError, match="exclude each other"):
        await quick_on(store).fork("r", nodes, at="c", state=Num(), output=Num())


async def test_a_fork_behind_a_group_and_a_node_without_a_contract(store: Any) -> None:
    """The edited state may stand for the output of a group, or of a node that has no contract."""

    class Free(BaseModel):
        n: int = 0
        more: str = ""

    async def loose(state: Num) -> Any:
        return {"n": state.n + 1, "more": "made"}

    last = computing(lambda state: {"n": state.n * 10, "more": str(getattr(state, "more", ""))})
    loose._stroma_node_id = "loose"
    loose._stroma_contract = None
    work = Work()
    work.gate.set()
    group = stroma_node("last", input=Free, output=Free)(last)
    nodes = [parallel(work.nodes[0], work.nodes[1]), loose, group]
    result = await quick_on(store).run(nodes, Num(), run_id="r")
    assert result.final_state == Free(n=20, more="made"), result.failure
    forked = await quick_on(store).fork(
        "r", nodes, at="last", state=Free(n=7, more="edited"), input_schema=Num
    )
    assert forked.final_state == Free(n=70, more="edited")
    forked = await quick_on(store).fork("r", nodes, at="loose", state=Num(n=3), input_schema=Num)
    assert forked.final_state == Free(n=40, more="made")
    with pytest.raises(TypeError, match="input_schema="):
        await quick_on(store).fork("r", nodes, at="last")


@pytest.mark.core
async def test_what_cannot_be_forked(store: Any) -> None:
    """An unknown run or node, a node with nothing before it, a taken id and a wrong state are refused."""
    work = Work()
    work.gate.set()
    with pytest.raises(CheckpointNotFound):
        await quick_on(store).fork("r", work.nodes, at="b")
    await quick_on(store).run(work.nodes[:1], Num(), run_id="r")
    with pytest.raises(ValueError, match="its nodes are"):
        await quick_on(store).fork("r", work.nodes, at="d")
    with pytest.raises(CheckpointNotFound, match="no output at position 1"):
        await quick_on(store).fork("r", work.nodes, at="c", new_run_id="stray")
    with pytest.raises(CheckpointNotFound, match="no output at position 1"):
        await quick_on(store).fork(
            "r", [*work.nodes, work.make("d")], at="d", state=Num(), new_run_id="stray"
        )
    assert store.get_run("stray") is None
    with pytest.raises(RunExists):
        await quick_on(store).fork("r", work.nodes, at="b", new_run_id="r")
    with pytest.raises(TypeError, match="must be a pydantic model"):
        await quick_on(store).fork("r", work.nodes, at="b", state={"n": 1}, new_run_id="stray")
    assert store.get_run("stray") is None


@pytest.mark.core
async def test_many_runs(store: Any) -> None:
    """run_many runs each input, so many at once, with outcomes in order; a failure stops no other."""
    inside, most = 0, 0

    async def func(state: Num) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        while most < 4:
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        inside -= 1
        if state.n == 3:
            raise ValueError("three")
        return {"n": state.n * 10}

    nodes = [stroma_node("x", input=Num, output=Num)(func)]
    events: list[int] = []
    outcomes = await quick_on(store).run_many(
        nodes,
        (Num(n=i) if i != 5 else None for i in range(20)),
        max_concurrency=4,
        run_ids=lambda number, state: f"run {number}",
        on_result=lambda number, outcome: events.append(number),
    )
    assert most == 4
    assert sorted(events) == list(range(20))
    assert isinstance(outcomes[5], TypeError)
    for i, outcome in enumerate(outcomes):
        if i != 5:
            assert not isinstance(outcome, Exception)
            assert outcome.run_id == f"run {i}"
            assert outcome.status is (RunStatus.PARTIAL if i == 3 else RunStatus.COMPLETED)
            assert outcome.final_state == Num(n=3 if i == 3 else i * 10)
    with pytest.raises(ValueError, match="max_concurrency"):
        await quick_on(store).run_many(nodes, [Num()], max_concurrency=0)


async def test_run_many_starts_no_tasks_without_an_input() -> None:
    """A bound far above the number of inputs costs nothing: it can mean no bound."""
    tasks: list[int] = []

    async def func(state: Num) -> Num:
        tasks.append(len(asyncio.all_tasks()))
        return state

    await quick_on(AsyncInMemoryStore()).run_many([node("a", func)], [Num()], max_concurrency=1000)
    assert tasks[0] < 10


async def test_runs_of_run_many_have_contexts_of_their_own() -> None:
    """A context variable that one run sets is not set in the next run."""
    seen: list[str] = []
    user: ContextVar[str] = ContextVar("user", default="nobody")

    async def func(state: Num) -> Num:
        seen.append(user.get())
        user.set("first")
        return state

    await quick_on(AsyncInMemoryStore()).run_many([node("a", func)], [Num(), Num()], max_concurrency=1)
    assert seen == ["nobody", "nobody"]


async def test_recovery_without_a_name_is_warned_of(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Runs are found by the name of their pipeline: without one a warning says that others may be found."""
    work = Work()
    await quick_on(store).recover(Pipeline("p", work.nodes))
    await quick_on(store, pipeline="q").recover(work.nodes)
    assert not caplog.records
    await quick_on(store).recover(work.nodes)
    assert "name it with Pipeline" in caplog.text


@pytest.mark.parametrize("broken", ["inputs", "run_ids", "on_result"])
async def test_what_breaks_run_many_comes_out_as_itself(store: Any, broken: str) -> None:
    """An exception of the caller's own code ends run_many; what is in flight is resumable."""
    work = Work()

    def breaks(*_: Any) -> Any:
        raise KeyError(broken)

    def inputs() -> Any:
        yield Num()
        yield breaks() if broken == "inputs" else Num(n=1)

    options: dict[str, Any] = {"run_ids": lambda number, _: f"r{number}", "max_concurrency": 2}
    if broken != "inputs":
        options[broken] = breaks
    if broken == "on_result":
        work.gate.set()
    with pytest.raises(KeyError, match=broken):
        await quick_on(store).run_many(work.nodes, inputs(), **options)
    if broken != "run_ids":  # Which no run came before.
        assert all(run.holder is None for run in store.list_runs())


@pytest.mark.core
async def test_interrupted_runs_are_recovered(store: Any) -> None:
    """recover() goes on with what was interrupted under this pipeline's name, and with nothing else."""
    work = Work()
    pipeline = Pipeline("p", work.nodes)
    first = quick_on(store)
    stopped = [asyncio.create_task(first.run(pipeline, Num(n=i), run_id=f"i{i}")) for i in range(3)]
    while work.calls.count("b") < 3:
        await asyncio.sleep(0.001)
    theirs = Work()  # It is at work for as long as this looks for others.
    held = asyncio.create_task(quick_on(store).run(Pipeline("p", theirs.nodes), Num(), run_id="held"))
    other = quick_on(store)
    another = asyncio.create_task(other.run(Pipeline("q", work.nodes), Num(), run_id="q"))
    while work.calls.count("b") < 4 or "b" not in theirs.calls:
        await asyncio.sleep(0.001)
    await asyncio.gather(first.shutdown(drain_seconds=0), other.shutdown(drain_seconds=0))
    assert {(await task).status for task in (*stopped, another)} == {RunStatus.INTERRUPTED}
    work.gate.set()
    work.calls.clear()
    outcomes = await quick_on(store).recover(pipeline)
    assert sorted(outcomes) == ["i0", "i1", "i2"]
    assert [getattr(outcomes[f"i{i}"], "final_state", None) for i in range(3)] == [
        Num(n=i + 3) for i in range(3)
    ]
    theirs.gate.set()
    assert (await held).status is RunStatus.COMPLETED
    assert theirs.calls == ["a", "b", "c"]
    assert sorted(work.calls) == ["b", "b", "b", "c", "c", "c"]
    assert await quick_on(store).recover(pipeline) == {}


async def test_a_run_is_resumed_by_its_id_alone(store: Any) -> None:
    """With the input that it was begun with, in any process; what is committed is not called again."""
    work = Work()
    first = quick_on(store)
    stopped = asyncio.create_task(first.run(work.nodes, Num(n=5), run_id="r"))
    await work.inside.wait()
    await first.shutdown(drain_seconds=0)
    assert (await stopped).status is RunStatus.INTERRUPTED
    work.gate.set()
    work.calls.clear()
    result = await quick_on(store).resume(work.nodes, "r", if_running="error")
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=8))
    assert work.calls == ["b", "c"]
    again = await quick_on(store).resume(iter(work.nodes), "r")
    assert (again.status, again.final_state, work.calls) == (RunStatus.RESUMED, Num(n=8), ["b", "c"])
    with pytest.raises(CheckpointNotFound, match="'other'"):
        await quick_on(store).resume(work.nodes, "other")


async def test_a_run_that_begins_with_a_group_is_resumed_with_the_class_of_its_input(store: Any) -> None:
    work = Work()
    work.gate.set()
    nodes = [parallel(*work.nodes[:2])]
    await quick_on(store).run(nodes, Num(n=1), run_id="r")
    with pytest.raises(TypeError, match="input_schema="):
        await quick_on(store).resume(nodes, "r")
    assert (await quick_on(store).resume(nodes, "r", input_schema=Num)).status is RunStatus.RESUMED


async def test_the_advice_about_a_group_at_the_beginning_works(store: Any) -> None:
    """run_many(recover=True) has no input_schema=: its error names calls that have it; a first node helps."""
    work = Work()
    work.gate.set()
    nodes = [parallel(*work.nodes[:2])]
    with pytest.raises(TypeError, match=r"to resume\(\), recover\(\) or fork\(\).* need a node there"):
        await quick_on(store).run_many(Pipeline("group", nodes), [Num(n=1)], recover=True)
    assert await quick_on(store).recover(Pipeline("group", nodes), input_schema=Num) == {}
    first = Pipeline("node", [work.nodes[2], *nodes])
    (result,) = await quick_on(store).run_many(first, [Num(n=1)], recover=True)
    assert getattr(result, "status", result) is RunStatus.COMPLETED


async def test_what_keeps_no_journal_resumes_nothing_by_its_id() -> None:
    with pytest.raises(StoreError, match="has no journal of runs"):
        await quick_on(SimpleStore()).resume(Work().nodes, "r")


async def test_the_first_start_of_all_recovers_nothing(tmp_path: Path) -> None:
    """recover=True in a store that is not there yet, and with resume=True beside it, only runs the inputs."""
    work = Work()
    work.gate.set()
    async with SQLiteStore(tmp_path / "runs.db") as store:
        options = {"recover": True, "resume": True, "run_ids": lambda number, _: f"r{number}"}
        (first,) = await quick_on(store).run_many(work.nodes, [Num()], **options)
        assert getattr(first, "status", first) is RunStatus.COMPLETED
        session = await store.open_run(
            RunRequest("r1", "pipeline", Num(), schema_of(Num), lease_seconds=0.1, ends=False)
        )
        session.abandon()  # Its process died.
        _, second = await quick_on(store).run_many(work.nodes, [Num(), Num()], **options)
        assert getattr(second, "status", second) is RunStatus.RESUMED
        assert work.calls == ["a", "b", "c"] * 2


@pytest.mark.core
async def test_a_shutdown_lets_the_node_in_flight_finish(store: Any) -> None:
    """shutdown() waits for the nodes in flight, begins no other, and leaves the runs to recovery."""
    work, runner = Work(), quick_on(store)
    task = asyncio.create_task(runner.run(work.nodes, Num(), run_id="r"))
    await work.inside.wait()
    closing = asyncio.create_task(runner.shutdown(drain_seconds=30))
    await asyncio.sleep(0.01)
    assert not closing.done()
    work.gate.set()
    await closing
    result = await task
    assert (result.status, result.final_state) == (RunStatus.INTERRUPTED, Num(n=2))
    assert work.calls == ["a", "b"]
    run = store.get_run("r")
    assert (run.status, run.holder, run.nodes) == ("INTERRUPTED", None, 2)
    again = await quick_on(store).run(work.nodes, Num(), run_id="r", resume=True)
    assert again.final_state == Num(n=3)
    assert work.calls == ["a", "b", "c"]


async def test_a_node_that_shuts_down_is_the_last_of_its_run(store: Any) -> None:
    """A node may call shutdown(), which does not wait for it: its run is INTERRUPTED after it."""
    runner = quick_on(store)

    async def leave(state: Num) -> dict[str, int]:
        await runner.shutdown()
        return {"n": state.n + 1}

    nodes = [node("leave", leave), node("after", same)]
    result = await runner.run(nodes, Num(), run_id="r")
    assert (result.status, result.final_state) == (RunStatus.INTERRUPTED, Num(n=1))
    assert store.get_run("r").nodes == 1


async def test_a_shutdown_does_not_wait_for_ever(store: Any) -> None:
    """A node that does not end within the limit is cut short; what was committed is kept."""
    work, runner = Work(), quick_on(store)
    task = asyncio.create_task(runner.run(work.nodes, Num(), run_id="r"))
    await work.inside.wait()
    await runner.shutdown(drain_seconds=0.02)
    result = await task
    assert (result.status, result.final_state) == (RunStatus.INTERRUPTED, Num(n=1))
    assert store.get_run("r").holder is None
    await runner.shutdown()


@pytest.mark.core
async def test_a_shutdown_waits_for_runs_not_for_what_comes_after_them(store: Any) -> None:
    """A task that goes on after its run, as a worker awaiting a message, holds up no shutdown."""
    work, runner = Work(), quick_on(store)
    over = asyncio.Event()

    async def worker() -> None:
        await runner.run(work.nodes, Num(), run_id="r")
        await over.wait()

    task = asyncio.create_task(worker())
    await work.inside.wait()
    async with asyncio.timeout(20):
        closing = asyncio.create_task(runner.shutdown(drain_seconds=30))
        await asyncio.sleep(0.01)
        assert not closing.done()
        work.gate.set()
        await closing
    assert store.get_run("r").status == "INTERRUPTED"
    over.set()
    await task


@pytest.mark.core
@pytest.mark.parametrize("drain_seconds", [0, 30])
async def test_a_shutdown_ends_run_many(store: Any, drain_seconds: float) -> None:
    """After a shutdown run_many begins no further run, and gives what became of those that it had begun."""
    work, runner = Work(), quick_on(store)
    starts: list[int] = []

    def inputs() -> Any:
        for n in range(100):
            starts.append(n)
            yield Num(n=n)

    task = asyncio.create_task(
        runner.run_many(work.nodes, inputs(), max_concurrency=3, run_ids=lambda number, _: f"r{number}")
    )
    while work.calls.count("b") < 3:
        await asyncio.sleep(0.001)
    asyncio.get_running_loop().call_later(0.02, work.gate.set)
    await runner.shutdown(drain_seconds=drain_seconds)
    outcomes = await task
    assert [getattr(outcome, "status", outcome) for outcome in outcomes] == [RunStatus.INTERRUPTED] * 3
    assert starts == [0, 1, 2]
    assert "c" not in work.calls


async def test_a_shutdown_ends_what_waits_or_opens(tmp_path: Path) -> None:
    """A run that attaches to another, or is being opened, is ended by a shutdown as well, with a result."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        work, runner = Work(), quick_on(store)
        held = asyncio.create_task(quick_on(store).run(work.nodes, Num(), run_id="r"))
        await work.inside.wait()
        attached = asyncio.create_task(runner.run(work.nodes, Num(), run_id="r", if_running="attach"))
        await asyncio.sleep(0.05)
        opening = asyncio.create_task(runner.run(work.nodes, Num(), run_id="s"))
        await asyncio.sleep(0)
        await runner.shutdown(drain_seconds=0)
        assert (await attached).status is RunStatus.INTERRUPTED
        assert (await opening).status is RunStatus.INTERRUPTED
        work.gate.set()
        assert (await held).status is RunStatus.COMPLETED


@pytest.mark.core
async def test_a_node_cannot_swallow_the_end_of_its_run(store: Any) -> None:
    """A node that swallows its cancellation is kept; the run ends after it, its task as before."""
    calls: list[str] = []
    inside = asyncio.Event()

    async def stubborn(state: Num) -> Any:
        calls.append("stubborn")
        inside.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            pass
        return {"n": 1}

    async def after(state: Num) -> Any:
        calls.append("after")
        return {"n": 2}

    contracts = [NodeContract(node_id=name, input_schema=Num, output_schema=Num) for name in ("a", "b")]
    first, last = stroma_node("a", contracts[0])(stubborn), stroma_node("b", contracts[1])(after)
    runner = quick_on(store)

    async def run(nodes: list[Any]) -> tuple[Any, int]:
        result = await runner.run(nodes, Num(), run_id="r")
        task = asyncio.current_task()
        return result, task.cancelling()

    for nodes, status in (([first, last], RunStatus.CANCELLED), ([first], RunStatus.COMPLETED)):
        inside.clear()
        task = asyncio.create_task(run(nodes))
        await inside.wait()
        await runner.cancel("r")
        result, cancelling = await task
        assert (result.status, result.final_state, cancelling) == (status, Num(n=1), 0)
        assert store.get_run("r").status == status
    assert calls == ["stubborn", "stubborn"]


@pytest.mark.core
async def test_a_node_that_answers_its_cancellation_with_an_error_is_not_tried_again(
    store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A run cancelled from elsewhere makes no further attempt, whatever its node does; the log says why."""
    caplog.set_level("INFO", "stroma")
    calls, inside = [], asyncio.Event()

    async def wrapping(state: Num) -> Any:
        calls.append(1)
        inside.set()
        try:
            await asyncio.sleep(30)
        except BaseException as error:
            raise ConnectionError("lost") from error

    runner = StromaRunner.quick(store=store, policy_map=THRICE)
    nodes = [stroma_node("a", input=Num, output=Num)(wrapping)]
    task = asyncio.create_task(runner.run(nodes, Num(), run_id="r"))
    await inside.wait()
    await runner.cancel("r")
    result = await task
    assert (result.status, len(calls)) == (RunStatus.CANCELLED, 1)
    assert result.failure.message == "lost"
    assert "node 'a' stopped: the run was cancelled" in caplog.text


async def test_a_run_that_is_deleted_before_a_resume_opens_it(store: Any, monkeypatch: Any) -> None:
    """A run that is deleted while a resume begins is CheckpointNotFound, and does not begin anew."""
    runner = StromaRunner.quick(store=store, policy_map=NEVER)
    work = [node("broken", failing_with(PermissionError))]
    await runner.run(work, Num(), run_id="r")
    read_input = StoredRuns.read_input

    async def read_and_delete(*arguments: Any) -> Any:
        state = await read_input(*arguments)
        await settled(store.delete("r"))
        return state

    monkeypatch.setattr(StoredRuns, "read_input", read_and_delete)
    with pytest.raises(CheckpointNotFound, match="'r' was deleted"):
        await runner.resume(work, "r")
    assert await settled(store.get_run("r")) is None
