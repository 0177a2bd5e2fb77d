"""Runs that a worker may continue, and runs that are given up because they take their process with them."""

import asyncio
import inspect
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field
from tests.checkpoint.dying_helper import State, pipeline
from tests.fixtures import store_fixture
from tests.kit import NEVER, THRICE, Num, cancel, ended, failing_with, start_python
from tests.shared_stores import SHARED, STORES, opened, place
from tests.store_suite.helpers import due_runs

from stroma import (
    FailureClass,
    FailurePolicy,
    Fenced,
    NodeHooks,
    RunExists,
    RunFailed,
    SQLiteStore,
    StromaRunner,
    current_node,
    stroma_node,
)
from stroma.checkpoint import RunRequest
from stroma.checkpoint.durable.owner import Owner
from stroma.checkpoint.entries import Waiting
from stroma.contracts.schema import schema_of
from stroma.failures.errors import BUDGET

Dying = Callable[..., list[str]]


@pytest.fixture
def dying(journal: tuple[str, str], tmp_path: Path) -> Dying:
    """Runs a process of tests.checkpoint.dying_helper to its end; the statuses that it printed."""

    def run(**wish: Any) -> list[str]:
        wish = {"calls": str(tmp_path / "calls"), **wish}
        wish["options"] = {"lease_seconds": 0.5, **wish.get("options", {})}
        process = start_python("-m", "tests.checkpoint.dying_helper", *journal, json.dumps(wish))
        return ended(process, 0, -9).split()

    return run


def calls(tmp_path: Path) -> int:
    return (tmp_path / "calls").read_text().count("call")


@pytest.mark.kills
@pytest.mark.slow
def test_no_recovery_without_end(dying: Dying, journal: tuple[str, str], tmp_path: Path) -> None:
    """A run whose process died max_recoveries times is FAILED ("poison"), not called again until forced."""
    dying(run_id="r", die="node", options={"max_recoveries": 3})
    for _ in range(2):
        assert dying(recover=True, die="node", options={"max_recoveries": 3}) == []
    assert calls(tmp_path) == 3
    assert dying(recover=True, die="node", options={"max_recoveries": 3}) == ["FAILED"]
    assert dying(recover=True, die="node", options={"max_recoveries": 3}) == []
    assert dying(run_id="r", options={"max_recoveries": 3}) == ["FAILED"]
    assert calls(tmp_path) == 3

    async def look() -> None:
        with opened(*journal) as store:
            record = store.get_run("r")
            assert (record.status, record.holder) == ("FAILED", None)
            assert "poison" in record.error
            result = await StromaRunner.quick(store=store, max_recoveries=3).run(
                pipeline({"calls": str(tmp_path / "calls")}), State(), run_id="r", resume=True
            )
            assert (result.status, result.failure.reason) == ("FAILED", "poison")
            assert result.failure.failure_class == "TERMINAL"

    asyncio.run(look())
    # Whoever forces it has as many deaths once more.
    assert dying(run_id="r", die="node", options={"max_recoveries": 3, "force_resume": True}) == []
    assert dying(run_id="r", options={"max_recoveries": 3}) == ["RESUMED"]
    assert calls(tmp_path) == 5


@pytest.mark.kills
@pytest.mark.slow
def test_retries_count_across_crashes(dying: Dying, tmp_path: Path) -> None:
    """Attempts of killed processes count: beyond the policy a resume ends PARTIAL without a call."""
    wish: dict[str, Any] = {"fails": 9, "retries": 2}
    dying(run_id="r", die="failure", **wish)
    assert calls(tmp_path) == 1
    dying(recover=True, die="failure", **wish)
    dying(recover=True, die="failure", **wish)
    assert calls(tmp_path) == 3
    # The last failure was recorded, what follows from it was not.
    assert dying(recover=True, **wish) == ["PARTIAL"]
    assert calls(tmp_path) == 3
    # A resume of a run that has ended begins anew, as ever.
    assert dying(run_id="r", **wish) == ["PARTIAL"]
    assert calls(tmp_path) == 6


def left_by_death(database: Path) -> Path:
    """Return a copy of a database that is what the next process finds if this one is killed now."""
    copy = database.with_name("left.db")
    with sqlite3.connect(database) as source, sqlite3.connect(copy) as left:
        source.backup(left)
        owner = Owner.read(left.execute("SELECT lease_owner FROM runs").fetchone()[0])
        left.execute("UPDATE runs SET lease_owner = ?", (str(owner._replace(pid=owner.pid + 1)),))
    return copy


class Rating(BaseModel):
    stars: int = Field(ge=1, le=5)


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        ("b", "o", "RESUMED"),
        ("t", "bbo", "RESUMED"),
        ("tt", "bo", "RESUMED"),
        ("ttt", "bbb", "FAILED"),
        ("tb", "bo", "RESUMED"),
        ("bb", "b", "FAILED"),
        ("bb", "ttto", "RESUMED"),
        ("bttt", "t", "PARTIAL"),
        ("btb", "ttt", "PARTIAL"),
    ],
)
async def test_retries_and_repairs_count_apart_across_a_crash(
    before: str, after: str, status: str, tmp_path: Path
) -> None:
    """Retries and repairs of a killed process are used up, and the next one tells the model its mistake."""
    answers, in_flight = list(before), asyncio.Event()
    prompts: list[str | None] = []

    async def rate(state: State) -> Any:
        failure = current_node().last_failure
        prompts.append(None if failure is None else failure.as_prompt())
        if not answers:
            in_flight.set()
            await asyncio.Event().wait()
        answer = answers.pop(0)
        if answer == "t":
            raise TimeoutError
        return {"stars": 4 if answer == "o" else 9}

    nodes = [stroma_node("rate", input=State, output=Rating)(rate)]
    THRICE[FailureClass.TERMINAL] = FailurePolicy(max_retries=0)
    options: Any = {"policy_map": THRICE, "contract_retries": {"rate": 2}}
    with SQLiteStore(tmp_path / "runs.db") as store:
        running = asyncio.create_task(
            StromaRunner.quick(store=store, **options).run(nodes, State(), run_id="r")
        )
        await in_flight.wait()
        left = left_by_death(tmp_path / "runs.db")
        expected = prompts[-1]
        await cancel(running)
    answers += after
    prompts.clear()
    with SQLiteStore(left) as store:
        runner = StromaRunner.quick(store=store, if_running="take_over", **options)
        result = await runner.run(nodes, State(), run_id="r", resume=True)
    assert (result.status, answers) == (status, [])
    assert prompts[0] == expected
    assert (expected is not None) is ("b" in before)


async def test_the_failure_of_a_process_that_died_is_the_last_one(tmp_path: Path) -> None:
    """A node whose retries were used up before its process died is not called again: its failure stands."""
    failed = asyncio.Event()

    async def retried(*_: Any) -> None:
        failed.set()

    node = stroma_node("pay", input=State, output=State)(failing_with(ConnectionError, "no"))
    patient = {cls: FailurePolicy(max_retries=1, backoff_seconds=60, jitter=False) for cls in FailureClass}
    hooks = NodeHooks(on_node_retry=retried)
    with SQLiteStore(tmp_path / "runs.db") as store:
        runner = StromaRunner.quick(store=store, policy_map=patient, hooks=hooks)
        running = asyncio.create_task(runner.run([node], State(), run_id="r"))
        await failed.wait()
        left = left_by_death(tmp_path / "runs.db")
        await cancel(running)
    with SQLiteStore(left) as store:
        runner = StromaRunner.quick(store=store, policy_map=NEVER, if_running="take_over")
        result = await runner.run([node], State(), run_id="r", resume=True)
    failure = result.failure
    assert (failure.node_id, failure.attempt, failure.failure_class) == ("pay", 1, FailureClass.RECOVERABLE)
    assert type(failure.exception) is RunFailed
    assert str(failure.exception) == failure.message == "no"
    assert [event.outcome for event in result.trace] == []


@pytest.mark.parametrize("kind", SHARED)
async def test_only_deaths_count(kind: str) -> None:
    """An owner that says how its run ended, or is of this process, or never says so, is no death."""

    def request(**more: Any) -> RunRequest:
        return RunRequest(
            "r", "p", State(), schema_of(State), "resume", lease_seconds=0.2, max_recoveries=1, **more
        )

    with place(kind) as where, opened(kind, where) as store:
        for status in ("INTERRUPTED", "PARTIAL", None):
            session = await store.open_run(request())
            assert session.finished is None
            if status is None:
                session.abandon()
            else:
                await session.end(status, None)
        plain = await store.open_run(request(ends=False))
        again = await store.open_run(request())
        assert (plain.finished, again.finished) == (None, None)
        owner = Owner.read(again.fence.owner)
        assert owner is not None
        await again.end("INTERRUPTED", None)


@pytest.mark.kills
@pytest.mark.slow
def test_plain_steps_are_no_deaths(journal: tuple[str, str]) -> None:
    """Plain code that calls a step in each of many processes without an end of its run goes on for ever."""
    code = """
import asyncio, sys
from tests.checkpoint.dying_helper import State, pipeline
from tests.shared_stores import opened
from stroma import CheckpointManager, ContractRegistry, ReliabilityContext, RunConfig, execute_step

async def main():
    with opened(*sys.argv[1:3]) as store:
        config = RunConfig(run_id="r", resume=True, max_recoveries=2)
        ctx = ReliabilityContext.for_run(config, ContractRegistry(), CheckpointManager(store))
        node = pipeline({"calls": "/dev/null"}).nodes[0]
        result = await execute_step("pay", node, State(), ctx)
        print(result.status, result.final_state)

asyncio.run(main())
"""
    for _ in range(4):
        assert ended(start_python(*journal, code=code)).endswith(" n=1\n")


_QUESTION = Waiting(0, "w", "approve", "Well?", "")


store = store_fixture(*STORES)


async def _done(call: Any) -> Any:
    return await call if inspect.isawaitable(call) else call


async def _open(store: Any, run_id: str = "r", **request: Any) -> Any:
    defaults = {"if_exists": "resume", "initial_state": Num(), "pipeline": "p", "schema": schema_of(Num)}
    return await _done(store.open_run(RunRequest(run_id=run_id, **{**defaults, **request})))


async def _end(session: Any, status: str, wake_ms: int | None = None) -> None:
    await _done(session.end(status, None, wake_ms))


async def _due(store: Any, now_ms: int, pipeline: str = "p", limit: int = 100) -> list[str]:
    return await due_runs(store, now_ms, pipeline, limit)


async def test_a_suspended_run_is_due_from_its_time_on(store: Any) -> None:
    """A suspended run is due from its wake time on, for its own pipeline, until a process claims it."""
    await _end(await _open(store), "SUSPENDED", 5000)
    assert [await _due(store, now) for now in (4999, 5000, 9_999_999_999_999)] == [[], ["r"], ["r"]]
    assert await _due(store, 5000, "other") == []
    session = await _open(store)
    assert await _due(store, 5000) == []
    await _end(session, "SUSPENDED")
    assert await _due(store, 5000) == []


async def test_the_end_of_a_stale_owner_leaves_a_changed_budget(store: Any) -> None:
    """A run whose budget was changed is due when it stops for its budget, even if an owner ended it."""
    stale = await _open(store)
    owner = await _open(store, if_running="take_over")
    assert await _done(store.set_budget("r", {"max_tokens_total": 5}))
    with pytest.raises(Fenced):
        await _end(stale, "INTERRUPTED")
    await _done(owner.end("SUSPENDED", BUDGET, None))
    assert await _due(store, 1000) == ["r"]


async def test_runs_that_are_due_for_longest_come_first(store: Any) -> None:
    """The limit leaves out those that have been due for the shortest time."""
    for number in (3, 1, 2):
        await _end(await _open(store, f"r{number}"), "SUSPENDED", number)
    due = await _due(store, 10)
    assert sorted(due) == ["r1", "r2", "r3"]
    if not type(store).__name__.endswith("MemoryStore"):
        assert due == ["r1", "r2", "r3"]
    assert len(await _due(store, 10, limit=2)) == 2


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "PARTIAL", "CANCELLED"])
async def test_a_run_that_ended_is_never_due(store: Any, status: str) -> None:
    """Only runs that were suspended or interrupted, or whose owner is gone, are due."""
    session = await _open(store)
    assert await _due(store, 9_999_999_999_999) == []
    await _end(session, status, 1)
    assert await _due(store, 9_999_999_999_999) == []


async def test_an_interrupted_run_is_due_at_once(store: Any) -> None:
    """A run that a shutdown ended is due at once."""
    await _end(await _open(store), "INTERRUPTED")
    assert await _due(store, 1) == ["r"]


async def test_a_run_without_its_owner_is_due(store: Any) -> None:
    """A run whose owner is gone is due; in Redis, once its lease has expired."""
    session = await _open(store, lease_seconds=1)
    if hasattr(session, "fence"):
        assert await _due(store, 1) == []
    session.abandon()
    while await _due(store, 1) != ["r"]:
        await asyncio.sleep(0.01)
    await _end(await _open(store), "COMPLETED")
    assert await _due(store, 1) == []


@pytest.mark.parametrize("way", ["cancel", "delete"])
async def test_a_cancelled_or_deleted_run_is_due_no_more(store: Any, way: str) -> None:
    """cancel() and delete() of a suspended run leave nothing to do."""
    await _end(await _open(store), "SUSPENDED", 5000)
    await _done(getattr(store, way)("r"))
    assert await _due(store, 5000) == []


async def test_an_answer_makes_a_run_due(store: Any) -> None:
    """A run that waits for an answer is due once it is stored; an earlier timeout stays."""
    session = await _open(store)
    await _done(session.ask(_QUESTION))
    await _end(session, "SUSPENDED", 5000)
    assert await _due(store, 4999) == []
    await store.signal("r", _QUESTION._replace(payload=b"1"))
    assert await _due(store, 1) == ["r"]
    session = await _open(store)
    assert session.waiting[0, "w"].payload == b"1"
    await _end(session, "SUSPENDED", 5000)
    assert [await _due(store, now) for now in (4999, 5000)] == [[], ["r"]]


async def test_an_answer_beside_a_suspension_is_not_lost(store: Any) -> None:
    """An answer that is stored after the session has looked for it makes the run due when it is suspended."""
    session = await _open(store)
    await _done(session.ask(_QUESTION))
    await store.signal("r", _QUESTION._replace(payload=b"1"))
    assert await _due(store, 9_999_999_999_999) == []
    await _end(session, "SUSPENDED", 5000)
    assert await _due(store, 1) == ["r"]


async def test_a_restarted_run_is_due_under_its_new_pipeline_only(store: Any) -> None:
    """A new execution forgets the wake time of the last one."""
    await _end(await _open(store), "SUSPENDED", 5000)
    session = await _open(store, pipeline="q", if_exists="restart")
    assert await _due(store, 5000) == await _due(store, 5000, "q") == []
    await _end(session, "SUSPENDED", 6000)
    assert (await _due(store, 6000), await _due(store, 6000, "q")) == ([], ["r"])


async def test_a_fork_is_not_due_before_its_first_start(store: Any) -> None:
    """The process that forks a run starts it: a worker does not take it away in between."""
    session = await _open(store)
    await _end(session, "INTERRUPTED")
    await store.fork("r", "s", 0)
    assert await _due(store, 1) == ["r"]


async def test_a_run_is_claimed_only_while_it_is_due(store: Any) -> None:
    """Of two workers with the same due run, the second is refused, also once the first has finished."""
    await _end(await _open(store), "SUSPENDED", 5000)
    with pytest.raises(RunExists, match="not due"):
        await _open(store, due_ms=4999)
    first = await _open(store, due_ms=5000)
    await _end(first, "SUSPENDED", 7000)
    with pytest.raises(RunExists, match="not due"):
        await _open(store, due_ms=5000)
    await _end(await _open(store, due_ms=7000), "COMPLETED")
    with pytest.raises(RunExists, match="not due"):
        await _open(store, due_ms=9_999_999_999_999)
