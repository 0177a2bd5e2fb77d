"""What a shared budget counts of processes that were killed: what the journal in its store has, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.kit import Num, ended, start_python
from tests.shared_stores import SHARED, opened, store_of

from stroma import SharedBudget, StromaRunner, current_node, parallel, stroma_node
from stroma.limits.shared_budget import read_budget

Dying = Callable[..., list[str]]


@pytest.fixture
def dying(journal: tuple[str, str], tmp_path: Path) -> Dying:
    """Runs a process of tests.checkpoint.dying_helper to its end; the statuses that it printed."""

    def run(**wish: Any) -> list[str]:
        wish = {"calls": str(tmp_path / "calls"), **wish}
        process = start_python("-m", "tests.checkpoint.dying_helper", *journal, json.dumps(wish))
        return ended(process, -9 if wish.get("die") else 0).split()

    return run


def spent(kind: str, where: str) -> tuple[int, int]:
    """(spent, reserved) tokens of the budget."""
    with opened(kind, where) as store:
        result = read_budget(store, "team")
    return result.spent_tokens, result.reserved_tokens


def journaled(kind: str, where: str) -> int:
    with opened(kind, where) as store:
        return sum(run.tokens for run in store.list_runs())


def calls(tmp_path: Path) -> int:
    return (tmp_path / "calls").read_text().count("call")


@pytest.mark.kills
@pytest.mark.slow
@pytest.mark.parametrize("when", ["success", "failure"])
def test_a_process_killed_behind_its_commit(dying: Dying, journal: tuple[str, str], when: str) -> None:
    """If budget and journal share a store, usage is counted by the transaction that records it."""
    dying(run_id="r", die=when, budget=[*journal, 500], fails=1 if when == "failure" else 0)
    assert spent(*journal) == (100, 0)
    assert journaled(*journal) == 100


@pytest.mark.kills
@pytest.mark.slow
def test_killed_again_and_again(dying: Dying, journal: tuple[str, str], tmp_path: Path) -> None:
    """However often commits are followed by kills, no call is made beyond a shared budget."""
    for number in range(3):
        dying(run_id=f"r{number}", die="success", budget=[*journal, 300])
    assert dying(run_id="r3", budget=[*journal, 300]) == ["PARTIAL"]
    assert dying(recover=True, budget=[*journal, 300]) == ["RESUMED"] * 3
    assert (spent(*journal), journaled(*journal), calls(tmp_path)) == ((300, 0), 300, 3)


@pytest.mark.kills
@pytest.mark.slow
def test_killed_in_the_call(dying: Dying, journal: tuple[str, str], tmp_path: Path) -> None:
    """A call that no journal has is given back when its lease has ended."""
    dying(run_id="r", die="node", budget=[*journal, 100])
    assert spent(*journal) == (0, 100)
    assert dying(run_id="s", budget=[*journal, 100]) == ["COMPLETED"]
    assert (spent(*journal), calls(tmp_path)) == ((100, 0), 2)


@pytest.mark.kills
@pytest.mark.slow
def test_another_store(dying: Dying, journal: tuple[str, str], tmp_path: Path) -> None:
    """A budget in another store misses only the attempt of a process that was killed behind its record."""
    budget = ["sqlite", str(tmp_path / "budget.db")]
    dying(run_id="r", die="failure", fails=1, retries=3, budget=[*budget, 500])
    assert spent(*budget) == (0, 100)
    assert dying(recover=True, retries=3, budget=[*budget, 500]) == ["RESUMED"]
    assert (spent(*budget)[0], journaled(*journal)) == (100, 200)


def node(node_id: str, tokens: int) -> Any:
    @stroma_node(node_id, input=Num, output=Num)
    async def call(state: Num) -> Any:
        current_node().report_usage(input_tokens=tokens)
        return {"n": tokens}

    return call


@pytest.mark.parametrize("kind", SHARED)
async def test_children_and_two_budgets(kind: str) -> None:
    """Children of a group settle each of several budgets with their own commits, and all is counted once."""
    with store_of(kind) as store:
        budgets = [SharedBudget(name, max_tokens=1000, store=store, reserve_tokens=10) for name in ("b", "a")]
        runner = StromaRunner.quick(store=store, shared_budgets=budgets)
        children = [node(f"n{size}", size) for size in (1, 20, 300)]
        result = await runner.run([parallel(*children), node("last", 7)], Num(), run_id="r")
        assert result.status == "COMPLETED", result.failure
        for budget in budgets:
            match = await budget.state()
            assert (match.spent_tokens, match.reserved_tokens) == (328, 0)


@pytest.mark.parametrize("kind", SHARED)
async def test_a_damaged_budget_costs_no_output(kind: str) -> None:
    """A budget that is damaged while a call is in flight does not keep the output from being committed."""
    with store_of(kind) as store:
        budget = SharedBudget("team", max_tokens=1000, store=store, reserve_tokens=10)

        @stroma_node("breaks", input=Num, output=Num)
        async def breaks(state: Num) -> Any:
            await store.change_cell(budget.cell, lambda data, now: (b"{", None))
            return {"n": 5}

        runner = StromaRunner.quick(store=store, shared_budgets=budget)
        result = await runner.run([breaks], Num(), run_id="r")
        assert (result.status, result.final_state) == ("COMPLETED", Num(n=5))
        assert store.get_run("r").nodes == 1
