"""What tests of flows share: nodes that count their calls, and lives of a process that ends at a call."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import NEVER, Num, node

from stroma import StromaRunner
from stroma.runner.flows import suspension


class Text(BaseModel):
    text: str = ""


class World:
    """What was called, in all lives; what fails, how long calls take, and where the process dies."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.keys: dict[str, set[str]] = {}
        self.failing: set[str] = set()
        self.turns: dict[str, int] = {}
        self.dies_in: str | None = None
        self.dies = asyncio.Event()

    def step(
        self, node_id: str, change: Callable[[int], int] = lambda n: n + 1
    ) -> Callable[[Num], Coroutine[Any, Any, Num]]:
        async def step(state: Num) -> Num:
            await self._call(f"{node_id} {state.n}")
            return Num(n=change(state.n))

        made: Callable[[Num], Coroutine[Any, Any, Num]] = node(node_id, step)
        return made

    async def _call(self, what: str) -> None:
        from stroma import current_node

        self.calls.append(what)
        here = current_node()
        self.keys.setdefault(what, set()).add(here.idempotency_key)
        for _ in range(self.turns.get(what, self.turns.get(what.split()[0], 1))):
            await asyncio.sleep(0)
        if what == self.dies_in:
            self.dies.set()
            await asyncio.Event().wait()
        if what in self.failing or what.split()[0] in self.failing:
            raise ValueError(f"{what} failed")

    async def live(self, run: Callable[[], Awaitable[Any]], dies_in: str | None = None) -> Any:
        """One process: it ends in a call, or by itself. Return the result; None if it died."""
        self.dies_in = dies_in
        self.dies.clear()
        life: asyncio.Future[Any] = asyncio.ensure_future(run())
        dying = asyncio.ensure_future(self.dies.wait())
        await asyncio.wait([life, dying], return_when=asyncio.FIRST_COMPLETED)
        if life.done():
            dying.cancel()
            return await life
        life.cancel()
        await asyncio.wait([life])
        return None


class Clock:
    """The time of waits and of due runs, which tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ms = 1_800_000_000_000
        monkeypatch.setattr(suspension, "time_ns", lambda: self.ms * 1_000_000)

    def pass_by(self, **duration: float) -> None:
        self.ms += round(timedelta(**duration).total_seconds() * 1000)


def runner_on(store: Any, **config: Any) -> StromaRunner:
    """Return a runner that resumes run "r" of a store, without retries."""
    return StromaRunner.quick(
        **{"store": store, "run_id": "r", "resume": True, "policy_map": NEVER, **config}
    )


def run_of(flow: Any, store: Any, **config: Any) -> Callable[[], Awaitable[Any]]:
    """Return what each process does: begin or resume run "r" of a flow, with a runner of its own."""
    return lambda: runner_on(store, **config).run(flow, Num())
