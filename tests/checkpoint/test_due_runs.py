"""The runs that a worker may continue, as every journal store finds them."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.kit import Num
from tests.shared_stores import STORES
from tests.store_suite.helpers import due_runs

from stroma import Fenced, RunExists
from stroma.checkpoint.entries import RunRequest, Waiting
from stroma.contracts.schema import schema_of
from stroma.failures.errors import BUDGET

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
