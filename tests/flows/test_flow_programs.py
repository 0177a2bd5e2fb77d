"""Random programs of flows that are killed, resumed and cut at any event end as if undisturbed."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.flows.program_world import Kills, ProgramWorld, runner_of
from tests.flows.programs import Life, Program, Value, flow_of, program_of
from tests.shared_stores import FAMILIES, IN_PROCESS, SHARED, opened, place, store_of

from stroma import InMemoryStore
from stroma.engine.context import INTERCEPTORS
from stroma.engine.outcome import STOPPED
from stroma.runner.flows.driver import FlowDriver
from stroma.runner.flows.journal import FlowJournal
from stroma.runner.flows.path import FlowPath
from stroma.testing.crash import Crashed

HELPER = Path(__file__).with_name("kill_flow_helper.py")
#: How many programs each store runs, by tier, and the first seed.
_COUNT = int(os.environ.get("STROMA_PROGRAMS", "0"))
_FIRST = int(os.environ.get("STROMA_FIRST_PROGRAM", "0"))


def seeds(dev: int, nightly: int) -> range:
    from hypothesis import settings

    count = _COUNT or {"nightly": nightly}.get(settings.get_current_profile_name(), dev)
    return range(_FIRST, _FIRST + count)


async def undisturbed(program: Program, seed: int) -> Any:
    world = ProgramWorld(random.Random(f"{seed} undisturbed"))
    await world.live_on(InMemoryStore(), program)
    return world.outcome()


async def disturbed(store: Any, program: Program, seed: int) -> ProgramWorld:
    """Run a program to its end over several lives that end at random records or calls. Return its world."""
    chance = random.Random(f"{seed} disturbed")
    world = ProgramWorld(chance, has_faults=True)
    for _ in range(200):
        kills = Kills(chance)
        INTERCEPTORS.insert(0, kills)
        try:
            if await world.live_on(store, program, kills) is not None:
                return world
        except (Crashed, asyncio.CancelledError):
            pass
        finally:
            INTERCEPTORS.remove(kills)
    raise AssertionError("the program does not end")


def unpaid_keys(world: ProgramWorld, what: str) -> set[str]:
    """Return the keys of the calls of an effect that did not happen."""
    return world.keys[what] - set(world.ledger) if what.startswith(("pay ", "wire ")) else set()


def check(world: ProgramWorld, store: Any) -> None:
    """Check what holds of each program, however often it was killed."""
    attempts = store.attempts("r")
    done = [at for at in attempts if at.outcome == "success"]
    assert [branch for branch, count in Counter(at.branch for at in done).items() if count > 1] == []
    # An effect that was given up and did not happen is called again with another key; and so is a step that
    # had not ended, on another path.
    keys = {what: keys - unpaid_keys(world, what) for what, keys in world.keys.items() if not world.has_paths}
    assert {what: known for what, known in keys.items() if len(known) > 1} == {}
    made = Counter(at for at, _ in world.ledger.values())
    assert {at: count for at, count in made.items() if count > 1} == {}
    assert set(world.life.paid) - set(made) == set()
    # A call that takes the outcome of one that the body gave up has an attempt of its own.
    assert len(world.charged) <= len([at for at in done if at.node_id in ("pay", "wire")])
    received = world.life.received.items()
    assert {topic: texts for topic, texts in received if texts != list(map(str, range(len(texts))))} == {}
    assert store.get_run("r").tokens == sum(at.tokens for at in attempts)


@pytest.mark.parametrize("kind", FAMILIES)
def test_killed_programs_end_as_undisturbed_ones(kind: str) -> None:
    """G5, G13: A flow killed at random records repeats no committed call, and ends as without kills."""
    for seed in seeds(15 if kind in IN_PROCESS else 5, 500):
        program = program_of(seed)

        async def trial(program: Program = program, seed: int = seed) -> None:
            plain = await undisturbed(program, seed)
            with store_of(kind) as store:
                world = await disturbed(store, program, seed)
                assert world.outcome() == plain
                check(world, store)

        try:
            asyncio.run(trial())
        except BaseException as error:
            error.add_note(f"seed {seed}: {program}")
            raise


@pytest.mark.kills
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", SHARED)
def test_programs_survive_sigkill(kind: str, tmp_path: Path) -> None:
    """G5, G13: The same, for processes that are killed with SIGKILL."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    deaths = 0
    for seed in seeds(2, 20):
        side = tmp_path / f"side{seed}"
        expected = asyncio.run(undisturbed(program_of(seed), seed))
        with place(kind) as where:
            for life in range(40):
                command = [sys.executable, str(HELPER), kind, where, str(side), str(seed), str(life)]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, timeout=120, env=environment
                )
                assert done.returncode in (0, -signal.SIGKILL), done.stderr
                if done.returncode == 0:
                    break
                deaths += 1
            assert done.stdout == f"{expected}\n", done.stdout
            with opened(kind, where) as store:
                check(ProgramWorld(random.Random(0), side=side), store)
    assert deaths > 1


class Prefixes:
    """Replay a run from each prefix of its events, up to the first live event, and note the body's calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, str, str, str]] = []
        self.cut: int | None = None
        self.events: list[int] = []
        prepare, finish, run_live = FlowPath.prepare, FlowJournal._finish, FlowDriver._run_live

        def note(path: FlowPath, call: Any) -> Any:
            if not path.driver.closing:
                self.calls.append((path.driver.woken_by, call.branch, call.node.node_id, repr(call.state)))
            return prepare(path, call)

        def cut(journal: FlowJournal, position: int, records: Any) -> None:
            finish(journal, position, records)
            self.events = [event.number for event in records.events]
            if self.cut is not None:
                records.events = records.events[: self.cut]

        async def stop(driver: FlowDriver) -> None:
            if self.cut is None:
                await run_live(driver)
            else:
                driver.stop(STOPPED)

        monkeypatch.setattr(FlowPath, "prepare", note)
        monkeypatch.setattr(FlowJournal, "_finish", cut)
        monkeypatch.setattr(FlowDriver, "_run_live", stop)


def test_a_replay_of_any_prefix_makes_the_calls_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """From each prefix of its events a body makes its calls up to there, in order and with equal inputs."""
    prefixes = Prefixes(monkeypatch)

    async def trial(program: Program, seed: int) -> None:
        world, store = ProgramWorld(random.Random(seed)), InMemoryStore()
        prefixes.cut = None
        prefixes.calls.clear()
        await world.live_on(store, program)
        calls = list(dict.fromkeys(prefixes.calls))
        run = store._runs["r"]
        run.steps.pop(0, None)
        while prefixes.cut is None or prefixes.cut < len(prefixes.events):
            prefixes.cut = 0 if prefixes.cut is None else prefixes.cut + 1
            run.status = "INTERRUPTED"
            prefixes.calls.clear()
            await runner_of(store).run(flow_of(program, world.nodes, Life()), Value())
            after = next(iter(prefixes.events[prefixes.cut :]), 10**9)
            assert prefixes.calls == [one for one in calls if one[0] < after], prefixes.cut

    for seed in seeds(15, 500):
        program = program_of(seed)
        try:
            asyncio.run(trial(program, seed))
        except BaseException as error:
            error.add_note(f"seed {seed}: {program}")
            raise
