"""The faults that strike processes. A driver without threads forks them, so a new one is there at once."""

import contextlib
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos import worker
from tests.chaos.check import Figures, check
from tests.chaos.worker import COMMITS, POINTS, read_diary

ROUND_SECONDS = 60.0
RUNS = 3
MOST_BROKEN = 5
FILE_ROUNDS = 10  # that share one SQLite file: now and then the making of the file is struck too


class Place:
    """Where the runs of a round are kept, and what the processes write meanwhile."""

    def __init__(self, store: str, folder: Path, server: Any, runs: int) -> None:
        self.store = store
        self.folder = folder
        self.server = server
        self.runs = runs

    def url(self, number: int, *, fresh: bool = False) -> str:
        if self.store != "sqlite":
            return self.store
        name = f"round-{number}" if fresh else f"rounds-{number // FILE_ROUNDS}"
        return f"sqlite:///{self.folder / name}.db"

    def diary(self, number: int) -> str:
        return str(self.folder / f"diary-{number}")

    def tidy(self, number: int) -> None:
        """Forget what a good round left behind."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.diary(number))
        for path in self.folder.glob("round*.db*"):
            kind, _, n = path.name.partition(".")[0].partition("-")
            if int(n) < (number + 1 if kind == "round" else number // FILE_ROUNDS):
                path.unlink()


class Processes:
    """The processes of one round. Every one of them is dead and fetched at the end."""

    def __init__(self, url: str, diary: str, errors: str) -> None:
        self.url = url
        self.diary = diary
        self.errors = errors
        self.alive: dict[int, float] = {}
        self.killed: list[int] = []
        self.stopped: list[int] = []
        #: Processes that were struck more than once, and lived.
        self.restless: list[int] = []
        #: Processes whose store had no room.
        self.refused: list[int] = []
        self.kills = 0
        self.broken: list[str] = []
        self.lasted: list[float] = []

    def start(self, runs: list[str], *, gate: int | None = None, **options: Any) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            worker.main(self.errors, gate, url=self.url, diary_path=self.diary, runs=runs, **options)
        self.alive[pid] = time.monotonic()
        return pid

    def call(self, do: Callable[[], None]) -> int:
        """Do something else in a process of its own."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            worker.guarded(self.errors, do)
        self.alive[pid] = time.monotonic()
        return pid

    def poll(self) -> list[int]:
        """The processes that have ended since; one that killed itself is a kill."""
        ended = []
        for pid in list(self.alive):
            result, status = os.waitpid(pid, os.WNOHANG)
            if result:
                ended.append(pid)
                self.fetched(pid, status)
        return ended

    def fetched(self, pid: int, status: int) -> None:
        began = self.alive.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            self.kills += 1
            self.killed.append(pid)
        elif code:
            report = Path(self.errors).read_text()[-2000:] if os.path.exists(self.errors) else ""
            self.broken.append(f"I5: process {pid} ended with {code}: {report}")
        else:
            self.lasted.append(time.monotonic() - began)

    def kill(self, pid: int) -> bool:
        """Whether it was still there."""
        if pid not in self.alive:
            return False
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        self.fetched(pid, status)
        return os.waitstatus_to_exitcode(status) == -signal.SIGKILL

    def wait(self, seconds: float = ROUND_SECONDS, until: Callable[[], bool] = lambda: False) -> bool:
        """Until all have ended, or something else is so. False if neither was in time."""
        deadline = time.monotonic() + seconds
        while self.alive and not until():
            if time.monotonic() > deadline:
                return False
            if not self.poll():
                time.sleep(0.002)
        return True

    def wait_for(self, pid: int) -> None:
        self.wait(until=lambda: pid not in self.alive)

    def finish(self) -> None:
        if not self.wait():
            report = Path(self.errors).read_text()[-20_000:] if os.path.exists(self.errors) else ""
            self.broken.append(
                f"I5: processes {sorted(self.alive)} did not end in {ROUND_SECONDS:g} s: {report}"
            )

    def end(self) -> None:
        for pid in list(self.alive):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            del self.alive[pid]


@contextlib.contextmanager
def processes(place: Place, number: int, *, fresh: bool = False) -> Iterator[Processes]:
    instance = Processes(
        place.url(number, fresh=fresh), place.diary(number), str(place.folder / f"errors-{number}")
    )
    try:
        yield instance
    finally:
        instance.end()


def apart(call: Callable[[], Figures]) -> Figures:
    """Call in a fork: the driver itself has no threads, no open files and no connections."""
    return apart_later(call)()


def apart_later(call: Callable[[], Figures]) -> Callable[[], Figures]:
    """The same; what is given back waits for it."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                value = call()
            except BaseException as error:
                import traceback

                traceback.print_exc()
                value = Figures(broken=[f"I5: the check itself failed: {type(error).__name__}: {error}"])
            with os.fdopen(writing, "wb") as file:
                pickle.dump(value, file)
        finally:
            os._exit(0)
    os.close(writing)

    def fetch() -> Figures:
        with os.fdopen(reading, "rb") as file:
            data = file.read()
        os.waitpid(pid, 0)
        if not data:
            return Figures(broken=["I5: the check died"])
        figures = pickle.loads(data)
        assert isinstance(figures, Figures)
        return figures

    return fetch


def judged(cluster_processes: Processes, runs: list[str], budget: worker.Budget | None = None) -> Figures:
    struck = (
        cluster_processes.killed,
        cluster_processes.stopped,
        cluster_processes.restless,
        cluster_processes.refused,
    )
    figures = apart(lambda: check(cluster_processes.url, cluster_processes.diary, runs, *struck, budget))
    figures.rounds, figures.kills = 1, cluster_processes.kills
    figures.broken += cluster_processes.broken
    return figures


class Pace:
    """How long a process of this fault usually lasts: instants are drawn from that."""

    seconds = 0.25

    def learn(self, cluster_processes: Processes) -> None:
        for lasted in cluster_processes.lasted:
            self.seconds += 0.1 * (min(lasted, 5.0) - self.seconds)


def kill(place: Place, name: str, number: int, draw: random.Random, pace: Pace, **options: Any) -> Figures:
    """Two processes share some runs and are killed at any instant, again and again, and started anew."""
    runs = [f"{name}-{i}" for i in range(RUNS)]
    with processes(place, number) as instance:
        pids = [instance.start(runs, seed=f"{name}-{i}", **options) for i in range(2)]
        for strike in range(draw.randint(1, 4)):
            # Sometimes very early: while files and connections are made.
            time.sleep(draw.uniform(0, 0.02 if draw.random() < 0.15 else 0.6 * pace.seconds))
            instance.poll()
            which = draw.randrange(2)
            if instance.kill(pids[which]):
                pids[which] = instance.start(runs, seed=f"{name}-{which}-{strike}", **options)
        instance.finish()
        pace.learn(instance)
        return judged(instance, runs)


def points(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """A process kills itself at one point of the protocol; another takes its runs over, then or later."""
    runs = [f"{name}-{i}" for i in range(2)]
    hit: list[str] = []
    with processes(place, number) as instance:
        for turn in range(3):
            point = POINTS[(number + 4 * turn) % len(POINTS)]
            nth = draw.randint(1, 2 if point in ("opened", "ended", "return") else 6)
            at_once = draw.choice((1, 2))
            pid = instance.start(
                runs, seed=f"{name}-{turn}", point=point, nth=nth, pause=0.002, at_once=at_once
            )
            if turn == 2:
                instance.start(runs, seed=f"{name}-beside", pause=0.002)
            instance.wait_for(pid)
            if pid in instance.killed:
                hit.append(point)
        instance.start(runs, seed=f"{name}-last", pause=0.002)
        instance.finish()
        figures = judged(instance, runs)
    figures.more.update(f"at {point!r}" for point in hit)
    return figures


def group(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """A process is killed between the branches of parallel() and the items of map_over()."""
    runs = [f"{name}-{i}" for i in range(2)]
    with processes(place, number) as instance:
        for turn in range(3):
            point = draw.choice(("branch", "branch end"))
            pid = instance.start(
                runs, seed=f"{name}-{turn}", point=point, nth=draw.randint(1, 5), pause=0.003
            )
            instance.wait_for(pid)
        instance.start(runs, seed=f"{name}-last", pause=0.003)
        instance.finish()
        return judged(instance, runs)


def stop(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """A process is stopped for longer than its lease, another one takes its run over; then it wakes up."""
    runs = [f"{name}-0"]
    lease = 0.3
    with processes(place, number) as instance:
        options: dict[str, Any] = {"lease_seconds": lease, "pause": 0.02, "patient": True}
        first = instance.start(runs, seed=f"{name}-first", **options)
        calls = draw.randint(1, 6)
        instance.wait(until=lambda: sum(line[0] == "call" for line in read_diary(instance.diary)) >= calls)
        time.sleep(draw.uniform(0, 0.01))
        instance.poll()
        if first in instance.alive:
            os.kill(first, signal.SIGSTOP)
            instance.stopped.append(first)
        second = instance.start(runs, seed=f"{name}-second", **options)
        # A process that is stopped while it holds the lock of a file holds up everybody else.
        deadline = time.monotonic() + draw.choice((lease * 1.5, lease * 4))
        while second in instance.alive and time.monotonic() < deadline:
            instance.poll()
            time.sleep(0.002)
        if first in instance.alive:
            os.kill(first, signal.SIGCONT)
        instance.finish()
        figures = judged(instance, runs)
    figures.more["stopped"] += len(instance.stopped)
    return figures


def duplicate(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """2 or 8 processes begin one run at the same moment, in a store still to be made: one executes it."""
    runs = [f"{name}-0"]
    many = 8 if number % 2 else 2
    with processes(place, number, fresh=True) as instance:
        reading, writing = os.pipe()
        attached = 0
        for i in range(many):
            attach = draw.random() < 0.5
            attached += attach
            if_running = "attach" if attach else "error"
            instance.start(runs, seed=f"{name}-{i}", gate=reading, once=True, if_running=if_running)
        time.sleep(0.02)
        os.write(writing, b"." * many)
        os.close(writing)
        os.close(reading)
        instance.finish()
        figures = judged(instance, runs)
    ends = [line[3] for line in read_diary(instance.diary) if line[0] == "end"]
    if len(ends) != many:
        figures.broken.append(f"I5: run {runs[0]}: {many} processes, {len(ends)} ends")
    figures.more["processes"] += many
    figures.more["told that it is busy"] += ends.count("RunBusy")
    return figures


def settle(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """Processes are killed between a commit and the settlement of what it took from a shared budget.

    The limit is enough for half of the calls. In every second round the budget is in another store than the
    runs.
    """
    runs = [f"{name}-{i}" for i in range(RUNS)]
    points = ("transaction", "applied", "acknowledged", "hook", "hook end", "settle")
    url = f"sqlite:///{place.folder / f'round-{number}'}.db" if number % 2 else None
    budget = worker.Budget(f"{name}-budget", COMMITS * worker.CALL_TOKENS, url)
    hit: list[str] = []
    with processes(place, number) as instance:
        for turn in range(4):
            point, options = draw.choice(points), {"pause": 0.002, "budget": budget}
            pid = instance.start(runs, seed=f"{name}-{turn}", point=point, nth=draw.randint(1, 4), **options)
            if turn == 2:
                instance.start(runs, seed=f"{name}-beside", **options)
            instance.wait_for(pid)
            if pid in instance.killed:
                hit.append(point)
        # Once for the runs, and once more when what the dead have reserved is free.
        for turn in range(2):
            instance.start(runs, seed=f"{name}-last-{turn}", pause=0.002, budget=budget)
            instance.finish()
            time.sleep(worker.BUDGET_LEASE_SECONDS * (1 - turn))
        figures = judged(instance, runs, budget)
    figures.more.update(f"at {point!r}" for point in hit)
    return figures


FAULTS: dict[str, Callable[[Place, str, int, random.Random, Pace], Figures]] = {
    "kill": kill,
    "points": points,
    "stop": stop,
    "duplicate": duplicate,
    "group": group,
    "settle": settle,
}


def rounds(
    fault: str,
    strike: Callable[[Place, str, int, random.Random, Pace], Figures],
    store: str,
    server: Any,
    seed: int,
    numbers: range,
    broke: Callable[[int, Figures], None],
    runs: int,
) -> Figures:
    """Some rounds of one fault. ``broke`` is told at once of each round that broke an invariant. ``runs``: of
    a round, for faults whose size is not given."""
    total, pace, bad = Figures(), Pace(), 0
    worker.prepare()
    folder = Path(tempfile.mkdtemp(prefix="stroma-chaos-"))
    place = Place(store, folder, server, runs)
    for number in numbers:
        draw = random.Random(f"{seed} {fault} {number}")
        try:
            figures = strike(place, f"{fault}-{seed}-{number}", number, draw, pace)
        except KeyboardInterrupt:
            print(f"{fault}: interrupted in round {number}", file=sys.stderr)
            break
        total.add(figures)
        if figures.broken:
            broke(number, figures)
            bad += 1
            if bad == MOST_BROKEN:
                print(f"{fault}: given up after {bad} broken rounds", file=sys.stderr)
                break
        else:
            place.tidy(number)
    if not total.broken:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"what it left behind is in {folder}", file=sys.stderr)
    return total
