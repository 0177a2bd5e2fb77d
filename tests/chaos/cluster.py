"""Faults of a Temporal cluster: workers and the server are killed, and workers are stopped and go on.

What must hold: no attempt is called after the server has kept its end, every place has one output, which one call made; the
cost is the sum over the attempts; every run ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos.check import Figures
from tests.chaos.rounds import MOST_BROKEN, Processes, apart_later
from tests.chaos.worker import prepare, read_diary
from tests.servers_temporal import TemporalServer

#: Rounds that go on at the same time: most of one is waiting for a heartbeat that does not come.
AT_ONCE = 4
ROUND_SECONDS = 300.0

# What the processes import is imported once, before they are forked; the client's own threads begin with its first call.
Strike = Callable[["Round"], None]


class Round:
    """The processes of one round, and what struck them."""

    def __init__(
        self, processes: Processes, name: str, draw: random.Random, server: TemporalServer, report_file: Path
    ) -> None:
        self.processes = processes
        self.draw = draw
        self.server = server
        self.queue = name
        self.runs = [f"{name}-{i}" for i in range(draw.choice((1, 1, 2)))]
        self.report_file = report_file
        self.figures = Figures(rounds=1, runs=len(self.runs))

    def work(self, pause: float = 0.04) -> int:
        """A worker, until it is killed."""
        from tests.chaos.cluster_worker import work

        inputs = (self.server.address, self.queue, self.processes.diary, pause)
        return self.processes.call(lambda: self._quietly(lambda: work(*inputs)))

    def begin(self, stopped: int | None = None) -> int:
        """Begin the runs, in a process that ends when they have been judged."""
        from tests.chaos.cluster_worker import run_and_judge

        inputs = (
            self.server.address,
            self.queue,
            self.runs,
            self.processes.diary,
            str(self.report_file),
            stopped,
        )
        return self.processes.call(lambda: self._quietly(lambda: run_and_judge(*inputs)))

    def _quietly(self, do: Callable[[], None]) -> None:
        log = os.open(f"{self.processes.errors}-log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for descriptor in (1, 2):  # The client's own threads write there, too.
            os.dup2(log, descriptor)
        do()

    def calls(self) -> int:
        return sum(line[0] == "call" for line in read_diary(self.processes.diary))

    def wait_for_calls(self, count: int, judge: int) -> bool:
        """Until so many calls have begun; False if the runs have ended before."""
        self.processes.wait(
            ROUND_SECONDS, until=lambda: self.calls() >= count or judge not in self.processes.alive
        )
        return judge in self.processes.alive

    def end(self, judge: int) -> None:
        """Wait for the judge, end the workers, and take what was found."""
        instance, figures = self.processes, self.figures
        if not instance.wait(ROUND_SECONDS, until=lambda: judge not in instance.alive):
            figures.broken.append(f"I5: runs {self.runs} did not end in {ROUND_SECONDS:g} s")
        figures.kills = instance.kills
        figures.broken += instance.broken
        instance.end()
        if self.report_file.exists():
            result = json.loads(self.report_file.read_text())
            figures.broken += result["broken"]
            figures.commits = result["commits"]
            figures.repeated = result["repeated"]


def worker(this: Round) -> None:
    """Two workers share the runs and are killed at any instant, again and again, and others take their place."""
    pids = [this.work() for _ in range(2)]
    judge = this.begin()
    for _ in range(this.draw.randint(1, 3)):
        if not this.wait_for_calls(this.calls() + this.draw.randint(1, 25), judge):
            break
        time.sleep(this.draw.uniform(0, 0.05))
        which = this.draw.randrange(2)
        this.processes.kill(pids[which])
        pids[which] = this.work()
    this.end(judge)


def server(this: Round) -> None:
    """The server is killed while two workers are at work, and comes back with what its file has."""
    for _ in range(2):
        this.work()
    judge = this.begin()
    kills = 0
    for _ in range(this.draw.randint(1, 2)):
        if not this.wait_for_calls(this.calls() + this.draw.randint(1, 30), judge):
            break
        time.sleep(this.draw.uniform(0, 0.05))
        this.server.kill()
        time.sleep(this.draw.uniform(0, 0.5))
        this.server.start()
        kills += 1
    this.end(judge)
    this.figures.kills = kills


def stop(this: Round) -> None:
    """A worker is stopped in the middle of nodes for longer than its heartbeat, and goes on after others did its work."""
    first = this.work(0.3)
    judge = this.begin(stopped=first)
    this.wait_for_calls(this.draw.randint(1, 12), judge)
    # In the middle of a node: one that was called and is not done.
    deadline = time.monotonic() + ROUND_SECONDS
    while time.monotonic() < deadline:
        os.kill(first, signal.SIGSTOP)
        lines = list(read_diary(this.processes.diary))
        if {line[4] for line in lines if line[0] == "call"} - {
            line[4] for line in lines if line[0] == "done"
        }:
            break
        os.kill(first, signal.SIGCONT)
        time.sleep(0.002)
    this.work()
    called = this.calls()
    # Others have begun what it was at, and more; so many calls are left in any run.
    this.wait_for_calls(called + this.draw.randint(2, 8), judge)
    os.kill(first, signal.SIGCONT)
    this.end(judge)
    this.figures.kills = 1
    this.figures.fenced = this.figures.repeated
    this.figures.repeated = 0


FAULTS: dict[str, Strike] = {"temporal-worker": worker, "temporal-server": server, "temporal-stop": stop}
STRIKES = {"temporal-server": "server kills", "temporal-stop": "stops"}


def rounds(fault: str, seed: int, numbers: range, broke: Callable[[int, Figures], None]) -> Figures:
    """Some rounds of one fault, a few at the same time. ``broke`` is told of each round that broke an invariant."""
    from tests.chaos import cluster_worker  # noqa: F401

    prepare()
    total, bad = Figures(), 0
    folder = Path(tempfile.mkdtemp(prefix="stroma-cluster-"))
    # A server that is killed is a round's own.
    own = fault == "temporal-server"
    shared = contextlib.nullcontext() if own else _served()
    with shared as cluster:
        waiting: list[tuple[int, Callable[[], Figures]]] = []
        for number in numbers:
            waiting.append((number, apart_later(lambda n=number: _round(fault, seed, n, folder, cluster))))  # type: ignore[misc]
            if len(waiting) == AT_ONCE or number == numbers[-1]:
                for struck, fetch in waiting:
                    figures = fetch()
                    total.add(figures)
                    if figures.broken:
                        broke(struck, figures)
                        bad += 1
                waiting.clear()
            if bad >= MOST_BROKEN:
                print(f"{fault}: given up after {bad} broken rounds", file=sys.stderr)
                break
    if total.broken:
        print(f"what it left behind is in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return total


@contextlib.contextmanager
def _served(file: Path | None = None) -> Iterator[TemporalServer]:
    instance = TemporalServer(file)
    try:
        yield instance
    finally:
        instance.kill()


def _round(fault: str, seed: int, number: int, folder: Path, cluster: Any) -> Figures:
    name = f"{fault}-{seed}-{number}"
    draw = random.Random(name)
    instance = Processes("", str(folder / f"diary-{number}"), str(folder / f"errors-{number}"))
    with contextlib.ExitStack() as stack:
        stack.callback(instance.end)
        if cluster is None:
            cluster = stack.enter_context(_served(folder / f"server-{number}.db"))
        this = Round(instance, name, draw, cluster, folder / f"told-{number}")
        FAULTS[fault](this)
    return this.figures
