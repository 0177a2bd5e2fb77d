"""What the tests of durable agents share: lives of a process that end at random records, and a bill."""

import asyncio
import importlib
import itertools
import os
import random
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.rounds import Processes
from tests.flows.program_world import Kills
from tests.frameworks.kit import answer, is_killed
from tests.kit import Num, retry_policies
from tests.shared_stores import opened, place, store_of

from stroma import RunStatus, SQLiteStore, StromaRunner
from stroma.engine.context import INTERCEPTORS
from stroma.testing.crash import Crashed

#: The last life in which a process may be killed.
LAST_DEATH = 12
#: How many workers serve a store, and how long a dead one owns its run.
WORKERS, LEASE_SECONDS = 2, 0.5
KINDS = (
    "memory",
    "sqlite",
    *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("redis", "postgres")),
)
#: How many agents each store runs.
ROUNDS = int(os.environ.get("STROMA_PROGRAMS", "6"))
Approve = Callable[[StromaRunner, Any], Awaitable[object]]


class Bill:
    """What a provider has been paid for, in all lives: requests, calls of tools, and charges by idempotency
    key.

    ``side``: a file that outlives the process.
    """

    def __init__(self, side: Path | None = None) -> None:
        self.side = side
        self._lines: list[str] = []

    def notes(self) -> list[tuple[str, str]]:
        """Return the calls so far, each with the key of its charge, in the order in which they were made."""
        if self.side is not None:  # Others may have written since.
            self._lines = self.side.read_text("utf-8").splitlines() if self.side.exists() else []
        return [(what, key) for what, _, key in (line.partition("|") for line in self._lines)]

    @property
    def calls(self) -> list[str]:
        return [what for what, _ in self.notes()]

    @property
    def charges(self) -> dict[str, int]:
        return {key: 500 for _, key in self.notes() if key}

    def flow(self) -> Any:
        """Return the flow that is paid for."""
        raise NotImplementedError

    def pay(self, what: str, key: str = "") -> None:
        """Note a call, also for other processes; with the key of a charge."""
        if self.side is None:
            self._lines.append(f"{what}|{key}")
            return
        with self.side.open("a", encoding="utf-8") as file:
            file.write(f"{what}|{key}\n")

    def repeated(self) -> int:
        """Return how many calls were made more than once."""
        calls = self.calls
        return len(calls) - len(set(calls))


def approve_with(answer: Any) -> Approve:
    """Return what answers every question of a suspended run alike."""

    async def approve(runner: StromaRunner, result: Any) -> None:
        for question in result.questions:
            await runner.signal("r", answer, question=question.id)

    return approve


def _runner_on(store: Any, **config: Any) -> StromaRunner:
    return StromaRunner.quick(store=store, max_recoveries=1000, policy_map=retry_policies(5), **config)


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
            runner = _runner_on(store, run_id="r", resume=True, if_running="take_over")
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
    assert len([key for _, key in world.notes() if key]) == 1, "charged twice"
    assert set(world.calls) == set(plain[0].calls)
    recorded = store.get_run("r").tokens
    attempted = sum(one.tokens for one in store.attempts("r"))
    assert recorded == attempted >= plain[1].total_tokens


async def kill_at_random_records(
    kind: str, make: Callable[[], Bill], approve: Approve, in_flight: int
) -> None:
    """Kill agents at random records: what is called again was in flight, ``in_flight`` calls at most."""
    plain, total = await undisturbed(make, approve), 0
    for seed in range(ROUNDS):
        with store_of(kind) as store:
            world = make()
            result, deaths = await _run(store, world, approve, random.Random(f"{kind} {seed}"))
            check(world, result, store, plain)
            assert world.repeated() <= in_flight * deaths
            total += deaths
    assert total


def kill_workers(kind: str, make: Callable[[Path | None], Bill], approve: Approve, in_flight: int) -> None:
    """Have workers serve agents, each of which may kill itself at a random record, and is replaced."""
    for module in ("anyio._backends._asyncio", "genai_prices.data"):
        importlib.import_module(module)  # Half of the time of a life, unless its fork has it.
    assert sum(_serve(kind, make, approve, in_flight, seed) for seed in range(ROUNDS))


def _serve(
    kind: str, make: Callable[[Path | None], Bill], approve: Approve, in_flight: int, seed: int
) -> int:
    """Return how many workers an agent has outlived. It starts none of its threads here: forks have none."""

    async def attend() -> None:
        with opened(kind, where) as store:
            world, runner = make(bill), _runner_on(store)
            handle = await runner.submit(world.flow(), Num(), run_id="r")
            owners = 2  # Who submits the run, and who runs it.
            while (result := await handle.until_stopped()).status is RunStatus.SUSPENDED:
                owners += 1
                await approve(runner, result)
            check(world, result, store, await undisturbed(lambda: make(None), approve))
            # A living worker loses its lease too, where the machine is too busy for it to be renewed.
            assert world.repeated() <= in_flight * (store.get_run("r").epoch - owners)

    async def work(life: int) -> None:
        if life < LAST_DEATH:
            INTERCEPTORS.insert(0, Kills(random.Random(f"{kind} {seed} {life}"), kill=True))
        with opened(kind, where) as store:
            runner = _runner_on(store, lease_seconds=LEASE_SECONDS)
            await runner.serve(make(bill).flow(), poll_seconds=0.1)

    with place(kind) as where, tempfile.TemporaryDirectory() as folder:
        bill = Path(folder, "paid")
        processes, lives = Processes(where, str(bill), f"{folder}/errors"), itertools.count()
        client = processes.call(lambda: asyncio.run(attend()))
        try:
            while client in processes.alive:
                while len(processes.alive) <= WORKERS:
                    life = next(lives)
                    processes.call(lambda life=life: asyncio.run(work(life)))
                assert processes.wait(until=lambda: len(processes.alive) <= WORKERS), "it does not end"
            assert processes.broken == []
        finally:
            processes.end()
    return processes.kills


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


def run_lives(live: Callable[..., None], folder: Path, seed: int) -> int:
    """Call a function in one process after the other, until one ends by itself. Return how many were killed.

    Each process has another order of sets.
    """
    for life in range(LAST_DEATH + 1):
        if not is_killed(live, folder, seed, life, PYTHONHASHSEED=str(life)):
            return life
    raise AssertionError("the agents do not end")
