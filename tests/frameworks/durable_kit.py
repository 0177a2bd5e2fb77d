"""What the tests of durable agents share: lives of a process that end at random records, and a bill."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.flows.program_world import Kills
from tests.frameworks.kit import answer
from tests.kit import Num, retry_policies
from tests.shared_stores import store_of

from stroma import RunStatus, SQLiteStore, StromaRunner
from stroma.engine.interceptors import INTERCEPTORS
from stroma.testing.crash import Crashed

__all__ = ["Bill", "approve_with", "check", "kill_at_random_records", "live", "run_lives", "undisturbed"]

ROOT = Path(__file__).parents[2]
#: The last life in which a process may be killed.
LAST_DEATH = 12
Approve = Callable[[StromaRunner, Any], Awaitable[object]]


class Bill:
    """What a provider has been paid for, in all lives: requests, calls of tools, and charges by idempotency
    key.

    ``side``: a file that outlives the process.
    """

    def __init__(self, side: Path | None = None) -> None:
        self.calls: list[str] = []
        self.charges: dict[str, int] = {}
        self.side = side
        if side is not None and side.exists():
            for line in side.read_text("utf-8").splitlines():
                what, _, key = line.partition("|")
                self._note(what, key)

    def flow(self) -> Any:
        """Return the flow that is paid for."""
        raise NotImplementedError

    def pay(self, what: str, key: str = "") -> None:
        """Note a call, also for other processes; with the key of a charge."""
        self._note(what, key)
        if self.side is not None:
            with self.side.open("a", encoding="utf-8") as file:
                file.write(f"{what}|{key}\n")

    def _note(self, what: str, key: str) -> None:
        self.calls.append(what)
        if key:
            self.charges[key] = 500

    def repeated(self) -> int:
        """Return how many calls were made more than once."""
        return len(self.calls) - len(set(self.calls))


def approve_with(answer: Any) -> Approve:
    """Return what answers every question of a suspended run alike."""

    async def approve(runner: StromaRunner, result: Any) -> None:
        for question in result.questions:
            await runner.signal("r", answer, question=question.id)

    return approve


def _runner_on(store: Any) -> StromaRunner:
    return StromaRunner.quick(
        store=store,
        run_id="r",
        resume=True,
        max_recoveries=1000,
        if_running="take_over",
        policy_map=retry_policies(5),
    )


async def _run(store: Any, world: Bill, approve: Approve, chance: random.Random | None) -> tuple[Any, int]:
    """Run a flow to its end, in lives that end at random records. Return the result and the number of deaths.

    Without ``chance`` nothing is killed.
    """
    deaths, flow = 0, world.flow()
    for _ in range(200):
        kills = None if chance is None else Kills(chance)
        if kills is not None:
            INTERCEPTORS.insert(0, kills)
        try:
            runner = _runner_on(store)
            life = asyncio.ensure_future(runner.run(flow, Num()))
            if kills is not None:
                kills.task = life
            result: Any = await life
            if result.status == "SUSPENDED":
                await approve(runner, result)
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


async def undisturbed(make: Callable[[], Bill], approve: Approve) -> tuple[Bill, Any]:
    """Return the bill and the result of a run that nothing disturbs; it pays for each call once."""
    world = make()
    with store_of("memory") as store:
        result, _ = await _run(store, world, approve, None)
    assert world.repeated() == 0
    return world, result


def check(world: Bill, result: Any, store: Any, plain: tuple[Bill, Any]) -> None:
    """Raise AssertionError unless a killed agent has the answer and the bill of an undisturbed one."""
    assert result.status in (RunStatus.COMPLETED, RunStatus.RESUMED), result.failure
    assert result.final_state == plain[1].final_state
    assert list(world.charges.values()) == [500]
    assert set(world.calls) == set(plain[0].calls)
    recorded = store.get_run("r").tokens
    attempted = sum(one.tokens for one in store.attempts("r"))
    assert recorded == attempted >= plain[1].total_tokens


async def kill_at_random_records(
    kind: str, make: Callable[[], Bill], approve: Approve, in_flight: int
) -> None:
    """Kill agents at random records: what is called again was in flight, ``in_flight`` calls at most."""
    plain, total = await undisturbed(make, approve), 0
    for seed in range(int(os.environ.get("STROMA_PROGRAMS", "6"))):
        with store_of(kind) as store:
            world = make()
            result, deaths = await _run(store, world, approve, random.Random(f"{kind} {seed}"))
            check(world, result, store, plain)
            assert world.repeated() <= in_flight * deaths
            total += deaths
    assert total


async def live(
    make: Callable[[Path | None], Bill], approve: Approve, folder: str, seed: str, life: str
) -> None:
    """One life of a process that runs the agents, and may kill itself at a random record."""
    if int(life) < LAST_DEATH:
        INTERCEPTORS.insert(0, Kills(random.Random(f"{seed} {life}"), kill=True))
    with SQLiteStore(Path(folder, "r.db")) as store:
        world = make(Path(folder, "paid"))
        result, _ = await _run(store, world, approve, None)
        INTERCEPTORS.clear()
        check(world, result, store, await undisturbed(lambda: make(None), approve))
    answer(folder, world.repeated())


def run_lives(module: str, function: str, folder: Path, seed: int) -> int:
    """Call a function of a module in one process after the other, until one ends by itself. Return how many
    were killed.

    Each process has another order of sets.
    """
    program = f"import sys; from {module} import {function}; {function}(*sys.argv[1:])"
    for life in range(LAST_DEATH + 1):
        command = [sys.executable, "-W", "ignore", "-c", program, str(folder), str(seed), str(life)]
        env = {**os.environ, "PYTHONHASHSEED": str(life)}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=250, cwd=ROOT, env=env
        )
        if done.returncode == 0:
            return life
        assert done.returncode == -signal.SIGKILL, (seed, life, done.returncode, done.stderr)
    raise AssertionError("the agents do not end")
