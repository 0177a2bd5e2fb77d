"""A process that runs a pipeline and is killed on the way.

usage: python -m tests.checkpoint.dying_helper KIND PLACE JSON

KIND and PLACE name the journal's store (see tests.shared_stores); JSON says what else there is: ``run_id``,
``die`` ("node", "success", "failure" or "" for never), ``hang`` (in the call, which says "calling"),
``budget`` ([kind, place, limit] of a shared budget in tokens), ``fails`` (attempts that fail first),
``recover`` (go on with what there is), ``force``. Each call of the node appends a line to the file ``calls``.
It prints the status of each run.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any, NoReturn

from pydantic import BaseModel
from tests.shared_stores import opened

from stroma import (
    ExecutionResult,
    FailureClass,
    NodeHooks,
    Pipeline,
    SharedBudget,
    StromaRunner,
    current_node,
    stroma_node,
)
from stroma.failures import FailurePolicy

LEASE_SECONDS = 1.0


class State(BaseModel):
    n: int = 0


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def pipeline(wish: dict[str, Any]) -> Pipeline:
    """One node, whose call takes 100 tokens."""
    calls: list[int] = []

    @stroma_node("pay", input=State, output=State)
    async def pay(state: State) -> Any:
        calls.append(1)
        with open(wish["calls"], "a") as file:
            file.write("call\n")
        if wish.get("die") == "node":
            die()
        if wish.get("hang"):
            print("calling", flush=True)
            await asyncio.sleep(3600)
        current_node().report_usage(input_tokens=100)
        if len(calls) <= wish.get("fails", 0):
            raise ConnectionError("no")
        return State(n=state.n + 1)

    return Pipeline("dying", [pay])


async def main(kind: str, where: str, wish: dict[str, Any]) -> None:
    with opened(kind, where) as store:
        budgets: list[SharedBudget] = []
        if "budget" in wish:
            *at, limit = wish["budget"]
            place = store if at == [kind, where] else opened(*at)
            budgets.append(
                SharedBudget(
                    "team",
                    max_tokens=limit,
                    store=place,
                    reserve_tokens=100,
                    lease_seconds=LEASE_SECONDS,
                    max_wait_seconds=5,
                )
            )

        async def end(*_: Any) -> None:
            die()

        hooks = NodeHooks(
            on_node_success=end if wish.get("die") == "success" else None,
            on_node_failure=end if wish.get("die") == "failure" else None,
        )
        policies = {
            kind: FailurePolicy(max_retries=wish.get("retries", 0), backoff_seconds=0)
            for kind in FailureClass
        }
        options: dict[str, Any] = wish.get("options", {})
        runner = StromaRunner.quick(
            store=store, shared_budgets=budgets, hooks=hooks, policy_map=policies, **options
        )
        if wish.get("recover"):
            outcomes: dict[str, Any] = await runner.recover(pipeline(wish))
        else:
            run_id = wish["run_id"]
            outcomes = {run_id: await runner.run(pipeline(wish), State(), run_id=run_id, resume=True)}
        for outcome in outcomes.values():
            print(outcome.status if isinstance(outcome, ExecutionResult) else repr(outcome), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
