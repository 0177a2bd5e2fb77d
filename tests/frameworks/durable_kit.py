"""What the tests of durable agents share: lives of a process that end at random records, and a bill."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from tests.flows.program_world import Kills

from stroma import StromaRunner
from stroma.engine.interceptors import INTERCEPTORS
from stroma.testing.crash import Crashed

__all__ = ["Bill", "ledger_of", "run_in_lives"]


class Bill:
    """What a provider has been paid for, in all lives: requests, calls of tools, and charges by idempotency
    key."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.charges: dict[str, int] = {}

    def repeated(self) -> int:
        """Return how many calls were made more than once."""
        return len(self.calls) - len(set(self.calls))


async def run_in_lives(
    chance: random.Random | None,
    runner_of: Callable[[], StromaRunner],
    flow: Any,
    state: Any,
    answer: Callable[[StromaRunner, Any], Awaitable[object]],
) -> tuple[Any, int]:
    """Run a flow as run "r" to its end, in lives that end at random records. Return the result, and the
    number of deaths.

    Without ``chance`` nothing is killed.
    ``answer``: answers the questions of a suspended run.
    """
    deaths = 0
    for _ in range(200):
        kills = None if chance is None else Kills(chance)
        if kills is not None:
            INTERCEPTORS.insert(0, kills)
        try:
            runner = runner_of()
            life = asyncio.ensure_future(runner.run(flow, state))
            if kills is not None:
                kills.task = life
            result: Any = await life
            if result.status == "SUSPENDED":
                await answer(runner, result)
                continue
            if result.status != "INTERRUPTED":
                return result, deaths
        except (Crashed, asyncio.CancelledError):
            pass
        finally:
            if kills is not None:
                INTERCEPTORS.remove(kills)
        deaths += 1
    raise AssertionError("the agent does not end")


def ledger_of(store: Any, run_id: str = "r") -> tuple[int, int]:
    """Return the tokens of a run by its record, and by its attempts."""
    return store.get_run(run_id).tokens, sum(one.tokens for one in store.attempts(run_id))
