"""Three workers of one store, killed with SIGKILL at random."""

from __future__ import annotations

import asyncio
import collections
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.flows.serving_helper import CONFIG, STEPS, Yes, expected, pipeline
from tests.kit import Num
from tests.shared_stores import SHARED, opened, place

from stroma import StromaRunner
from stroma.checkpoint.entries import RunRequest
from stroma.contracts.schema import schema_of

_HELPER = Path(__file__).with_name("serving_helper.py")
_ROOT = Path(__file__).parents[2]


class Workers:
    """Three worker processes; one that is killed is replaced."""

    def __init__(self, kind: str, where: str, side: Path) -> None:
        self._command = [sys.executable, str(_HELPER), kind, where, str(side)]
        self.processes = [self._start() for _ in range(3)]
        self.killed = 0

    def _start(self) -> subprocess.Popen[bytes]:
        env = os.environ | {"PYTHONPATH": str(_ROOT)}
        return subprocess.Popen(self._command, stdout=subprocess.DEVNULL, env=env)

    def kill(self, last: bytes, chance: random.Random) -> None:
        """Kill a worker: mostly the one that wrote this last line, which is in a step, or about to commit it."""
        index = chance.randrange(3)
        pids = [process.pid for process in self.processes]
        if last and chance.random() < 0.8 and (pid := int(last.split()[-1])) in pids:
            index = pids.index(pid)
        process = self.processes[index]
        assert process.poll() is None, "a worker ended by itself"
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.processes[index] = self._start()
        self.killed += 1

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


async def _begin(store: Any, run_id: str, n: int) -> None:
    """Record a run as one whose process was shut down before its first step."""
    request = RunRequest(run_id, "work", Num(n=n), schema_of(Num), lease_seconds=CONFIG.lease_seconds)
    session = await store.open_run(request)
    await session.end("INTERRUPTED", None)


async def _answer(store: Any, runner: StromaRunner, run_ids: set[str]) -> None:
    """Answer the question of every run that waits for one."""
    for run in await asyncio.to_thread(store.list_runs, status="SUSPENDED", limit=1000):
        if run.run_id not in run_ids:
            waiting = await asyncio.to_thread(store.waiting, run.run_id)
            if waiting and waiting[0].payload is None:
                run_ids.add(run.run_id)
                await runner.signal(run.run_id, Yes(add=3), schema=Yes)


async def _trial(kind: str, where: str, side: Path, runs: int, calls_per_kill: int, seconds: float) -> str:
    chance = random.Random(f"{kind} {runs}")
    with opened(kind, where) as store:
        runner = StromaRunner.quick(store=store)
        for number in range(runs):
            await _begin(store, f"r{number}", number)
        side.touch()
        workers = Workers(kind, where, side)
        started, answered, next_kill = time.monotonic(), set[str](), calls_per_kill
        try:
            while True:
                done = await asyncio.to_thread(store.list_runs, status="RESUMED", limit=runs + 1)
                if len(done) == runs:
                    break
                assert time.monotonic() - started < seconds, [
                    (r.run_id, r.status, r.error)
                    for r in store.list_runs(limit=runs)
                    if r.status != "RESUMED"
                ]
                lines = side.read_bytes().splitlines()
                calls = len(lines)
                if calls >= next_kill:
                    workers.kill(lines[-1], chance)
                    next_kill = calls + chance.randint(1, 2 * calls_per_kill)
                await _answer(store, runner, answered)
                await asyncio.sleep(0.02)
        finally:
            workers.close()
        took = time.monotonic() - started
        for number in range(runs):
            attempts = store.attempts(f"r{number}")
            commits = collections.Counter((a.position, a.branch) for a in attempts if a.outcome == "success")
            steps = [a for a in attempts if a.outcome == "success" and a.node_id in ("add", "double")]
            assert set(commits.values()) == {1}, (number, commits)
            assert len(steps) == STEPS, (number, attempts)
            checker = StromaRunner(runner.registry, runner.checkpoint_manager, CONFIG)
            result = await checker.run(pipeline, Num(n=number), run_id=f"r{number}", if_exists="return")
            assert result.final_state == Num(n=expected(number, 3))
        calls = side.read_bytes().count(b"\n")
        return (
            f"{kind}: {runs} runs of {STEPS} steps, {workers.killed} kills, {calls - runs * STEPS} of {calls} calls "
            f"were cut short and repeated, {took:.1f} s"
        )


@pytest.mark.kills
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", SHARED)
async def test_workers_killed_at_random(kind: str, tmp_path: Path) -> None:
    """Of three workers that share a store and are killed at random, some finish every run, and each step is committed once."""
    with place(kind) as where:
        print(await _trial(kind, where, tmp_path / "calls", 12, 15, 240))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
async def test_500_runs_of_workers_killed_at_random(tmp_path: Path) -> None:
    """The same with 500 runs on one Postgres."""
    with place("postgres") as where:
        print(await _trial("postgres", where, tmp_path / "calls", 500, 60, 3500))
