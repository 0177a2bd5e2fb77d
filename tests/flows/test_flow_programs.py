"""Random programs with faults and kills equal the same programs without."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flows.programs import Program, flow_of, programs
from tests.kit import NEVER, Num, node, retry_policies
from tests.shared_stores import SHARED, opened, place

from stroma import InMemoryStore, RunStatus, SQLiteStore, StromaRunner, current_node
from stroma.engine.interceptors import INTERCEPTORS
from stroma.testing.crash import Boundary, Crashed, Deaths

HELPER = Path(__file__).with_name("kill_flow_helper.py")


def _nodes(calls: list[str], turns: Any, faults: Any) -> dict[str, Any]:
    async def call(state: Num, change: int) -> Num:
        here = current_node()
        calls.append(f"{here.branch} {state.n}")
        for _ in range(next(turns)):
            await asyncio.sleep(0)
        if next(faults):
            raise ConnectionError("a fault, which a retry heals")
        return Num(n=(state.n + change) % 1000)

    async def add(state: Num) -> Num:
        return await call(state, 1)

    async def double(state: Num) -> Num:
        return await call(state, state.n)

    async def bad(state: Num) -> Num:
        raise NotImplementedError(f"bad {state.n}")

    return {"add": node("add", add), "double": node("double", double), "bad": node("bad", bad)}


def _outcome(result: Any) -> Any:
    if result.failure is not None:
        return "failed", result.failure.message
    return "ended", result.final_state


@settings(max_examples=40, deadline=None)
@given(
    program=programs,
    turns=st.lists(st.integers(0, 4), min_size=7, max_size=7),
    deaths=st.lists(st.integers(1, 25), max_size=3),
    faults=st.lists(st.booleans(), min_size=11, max_size=11),
)
def test_programs_survive_faults_and_deaths(
    program: Program, turns: list[int], deaths: list[int], faults: list[bool], tmp_path_factory: Any
) -> None:
    """G5: A program whose nodes fail now and then, and whose process dies, commits each step once and ends as without."""

    async def undisturbed() -> Any:
        nodes = _nodes([], itertools.repeat(1), itertools.repeat(False))
        runner = StromaRunner.quick(store=InMemoryStore(), policy_map=NEVER, run_id="r")
        return _outcome(await runner.run(flow_of(program, nodes), Num()))

    async def disturbed() -> Any:
        nodes = _nodes([], itertools.cycle(turns), itertools.cycle([*faults, False]))
        folder = tmp_path_factory.mktemp("programs", numbered=True)
        for number in itertools.count():
            left = deaths[number] if number < len(deaths) else 10**9
            seen = itertools.count(1)

            def at(_: Boundary, left: int = left, seen: Any = seen) -> bool:
                return bool(next(seen) == left)

            probe = Deaths(at)
            INTERCEPTORS.insert(0, probe)
            try:
                async with SQLiteStore(folder / "runs.db", synchronous="normal") as store:
                    runner = StromaRunner.quick(
                        store=store, policy_map=retry_policies(30), run_id="r", resume=True, max_recoveries=10
                    )
                    result = await runner.run(flow_of(program, nodes), Num())
                    branches = [at.branch for at in store.attempts("r") if at.outcome == "success"]
                    assert len(branches) == len(set(branches))
                    return _outcome(result)
            except Crashed:
                continue
            finally:
                INTERCEPTORS.remove(probe)
        raise AssertionError

    plain = asyncio.run(undisturbed())
    if "value" in repr(program):  # Another run has other random values.
        asyncio.run(disturbed())
        return
    assert asyncio.run(disturbed()) == plain


@pytest.mark.kills
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", SHARED)
def test_killed_flows_lose_and_double_nothing(kind: str, tmp_path: Path) -> None:
    """G5: A flow with branches, loops, tasks, a map, a flow inside, a sleep and a question is killed with SIGKILL at random
    calls, again and again: each step is committed once, with one idempotency key, and the end is the same."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with place(kind) as where:
        for run in range(2):
            ends = []
            for life in range(40):
                command = [
                    sys.executable,
                    str(HELPER),
                    kind,
                    where,
                    str(tmp_path / f"side{run}"),
                    str(run),
                    str(life),
                ]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, timeout=120, env=environment
                )
                ends.append(done.returncode)
                assert done.returncode in (0, -signal.SIGKILL), done.stderr
                if done.returncode == 0 and "ended" in done.stdout:
                    break
            assert ends[-1] == 0
            assert ends.count(-signal.SIGKILL) >= 3
            assert done.stdout.strip() == "ended RESUMED 3 6 4 [0, 2, 4, 6] 14 yes"
            keys: dict[str, set[str]] = {}
            for line in (tmp_path / f"side{run}").read_text().splitlines():
                what, _, key = line.partition("|")
                keys.setdefault(what, set()).add(key)
            assert {what: len(found) for what, found in keys.items()} == dict.fromkeys(keys, 1)
            with opened(kind, where) as store:
                committed = [at.branch for at in store.attempts(f"r{run}") if at.outcome == "success"]
                assert len(committed) == len(set(committed))
                assert store.get_run(f"r{run}").status in (RunStatus.RESUMED, RunStatus.COMPLETED)
