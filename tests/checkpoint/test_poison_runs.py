"""Runs that take their process with them are given up, and attempts made before a crash count behind it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field
from tests.checkpoint.dying_helper import State, pipeline
from tests.kit import NEVER, THRICE, cancel, ended, failing_with, start_python
from tests.shared_stores import SHARED, opened, place

from stroma import (
    FailureClass,
    FailurePolicy,
    NodeHooks,
    RunFailed,
    SQLiteStore,
    StromaRunner,
    current_node,
    stroma_node,
)
from stroma.checkpoint import RunRequest
from stroma.checkpoint.durable.owner import Owner
from stroma.contracts.schema import schema_of

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
