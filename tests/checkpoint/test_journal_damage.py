"""Damage to a journal is noticed before anything is built on it, over every durable store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from tests.checkpoint.damage import Moment, lose
from tests.shared_stores import SHARED, opened, place
from tests.store_suite.journal import State, begin, commit, fail, finish, restored, settled

from stroma import FailurePolicy, StromaRunner, stroma_node
from stroma.checkpoint import CheckpointLost, Fenced
from stroma.failures import FailureClass

pytestmark = pytest.mark.slow


@pytest.fixture(params=SHARED)
def at(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    with place(request.param) as where:
        yield request.param, where


async def interrupted(store: Any) -> None:
    """A run with three commits and two failed attempts, that may be resumed."""
    session = await begin(store)
    for position in range(3):
        await commit(session, position, State(n=position))
    await fail(session, 3)
    await fail(session, 3)
    await finish(session, "PARTIAL")


@pytest.mark.parametrize("what", ["output", "attempt", "input"])
@pytest.mark.parametrize("way", ["resume", "return"])
async def test_a_missing_row_is_damage(at: tuple[str, str], what: str, way: str) -> None:
    """A run that lacks an output, an attempt or its input is CheckpointLost, unchanged; a restart works."""
    with opened(*at) as store:
        await interrupted(store)
        before = store.get_run("run")
        lose(*at, what)
        with pytest.raises(CheckpointLost, match="'run'"):
            await begin(store, if_exists=way)
        after = store.get_run("run")
        assert (after.status, after.execution, after.epoch) == ("PARTIAL", 1, before.epoch)
        if at[0] == "redis" and what == "input":
            return
        again = await begin(store)
        assert (again.execution, dict(again.restored)) == (2, {})
        await commit(again, 0, State(n=7))
        await finish(again, "PARTIAL")
        assert restored(await begin(store, if_exists="resume")) == {(0, ""): State(n=7)}


async def test_a_hole_in_what_is_read_later_is_damage(at: tuple[str, str]) -> None:
    """A missing item of a map counts too, though items are not read when the run is opened."""
    with opened(*at) as store:
        session = await begin(store)
        for branch in ("0", "1", "2"):
            await commit(session, 0, State(), branch=branch)
        await finish(session, "PARTIAL")
        lose(*at, "output")
        with pytest.raises(CheckpointLost, match="'run'"):
            await begin(store, if_exists="resume", lazily_loaded=((0, ""),))


async def test_counters_follow_discards_and_replacements(at: tuple[str, str]) -> None:
    """What is discarded, made again or sent twice leaves a run that is whole."""
    with opened(*at) as store:
        await interrupted(store)
        again = await begin(store, if_exists="resume", discard_from=1)
        await commit(again, 1, State(n=10))
        await commit(again, 1, State(n=11))  # In place of the one before.
        await fail(again, 2)
        await finish(again, "PARTIAL")
        last = await begin(store, if_exists="resume")
        assert restored(last) == {(0, ""): State(n=0), (1, ""): State(n=11)}
        await finish(last, "PARTIAL")
        assert (await begin(store, if_exists="resume", discard_from=0)).restored == {}


@pytest.mark.parametrize("act", ["commit", "fail", "finish"])
async def test_a_store_that_came_back_older(at: tuple[str, str], act: str) -> None:
    """A living run whose store lost an acknowledged commit gets CheckpointLost, and adds nothing to it."""
    with opened(*at) as store:
        session = await begin(store)
        await commit(session, 0, State(n=0))
        then = Moment(*at)
        await commit(session, 1, State(n=1))
        then.restore()
        with pytest.raises(CheckpointLost, match=r"older than what it acknowledged|lost data of run 'run'"):
            if act == "commit":
                await commit(session, 2, State(n=2))
            elif act == "fail":
                await fail(session, 2)
            else:
                await finish(session)
        assert (store.get_run("run").status, store.get_run("run").nodes) == ("RUNNING", 1)
        session.abandon()
        again = await begin(store, if_exists="resume", if_running="take_over")
        assert restored(again) == {(0, ""): State(n=0)}
        with pytest.raises(Fenced):
            await commit(session, 2, State(n=2))
        await commit(again, 1, State(n=3))


async def test_a_store_that_lost_the_run_altogether(at: tuple[str, str]) -> None:
    """A living run whose store was restored to before it began is CheckpointLost, as one that was deleted."""
    with opened(*at) as store:
        await finish(await begin(store, "other"))
        then = Moment(*at)
        session = await begin(store)
        await commit(session, 0, State())
        then.restore()
        with pytest.raises(CheckpointLost, match="'run'"):
            await commit(session, 1, State())
        assert store.get_run("run") is None
        session = await begin(store)
        await settled(store.delete("run"))
        with pytest.raises(CheckpointLost, match="was deleted"):
            await commit(session, 0, State())


class Order(BaseModel):
    order: str = ""
    charged: str = ""
    mailed: str = ""


async def test_two_histories_are_never_mixed(at: tuple[str, str]) -> None:
    """A resume of a pipeline with a hole calls nothing: later outputs were made of the missing one."""
    calls: list[str] = []
    fails = [True]

    @stroma_node("order", input=Order, output=Order)
    async def order(state: Order) -> Order:
        calls.append("order")
        return state.model_copy(update={"order": f"order-{len(calls)}"})

    @stroma_node("charge", input=Order, output=Order)
    async def charge(state: Order) -> Order:
        calls.append("charge")
        return state.model_copy(update={"charged": state.order})

    @stroma_node("mail", input=Order, output=Order)
    async def mail(state: Order) -> Order:
        calls.append("mail")
        if fails[0]:
            raise PermissionError("later")
        return state.model_copy(update={"mailed": state.order})

    with opened(*at) as store:
        once = {one: FailurePolicy(max_retries=0) for one in FailureClass}
        runner = StromaRunner.quick(store=store, policy_map=once)
        await runner.run([order, charge, mail], Order(), run_id="run")
        lose(*at, "output")
        fails[0] = False
        calls.clear()
        with pytest.raises(CheckpointLost, match="'run'"):
            await runner.run([order, charge, mail], Order(), run_id="run", resume=True)
        assert calls == []
