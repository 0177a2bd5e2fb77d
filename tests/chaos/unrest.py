"""The faults that kill nobody: the store fails or is held up, clocks are moved, runs are cancelled, processes
told to end.

Here nothing excuses that a node is run again: none of the processes has died. Only where a fault cuts nodes
short (a cancellation, a full disk, a SIGTERM without time to drain) may those that were in flight be.
"""

import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from typing import Any

from tests.chaos.check import Figures
from tests.chaos.rounds import RUNS, Pace, Place, Processes, judged, kill, processes
from tests.chaos.worker import read_diary

#: The stores that can have a fault, where not all can.
ONLY = {
    "lock": ("sqlite",),
    "full": ("sqlite",),
    "terminate": ("postgres",),
    "restart": ("postgres", "redis"),
}
#: What the second figure of a line counts.
STRIKES = {
    "lock": "locks",
    "full": "full disks",
    "terminate": "connections ended",
    "restart": "server kills",
    "cancel": "cancellations",
    "term": "SIGTERMs",
}


def _runs(name: str) -> list[str]:
    return [f"{name}-{i}" for i in range(RUNS)]


def _counted(instance: Processes, kind: str) -> int:
    return sum(line[0] == kind for line in read_diary(instance.diary))


def clock(place: Place, name: str, number: int, draw: random.Random, pace: Pace) -> Figures:
    """Two processes are killed and restarted, and each wall clock jumps to and fro by up to an hour."""
    return kill(place, name, number, draw, pace, clock=True)


def cancel(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """Runs are cancelled at any await, again and again, and gone on with."""
    runs = _runs(name)
    with processes(place, number) as instance:
        # One process: a run is cancelled here, and resumed here.
        pid = instance.start(runs, seed=name, cancels=draw.randint(3, 30), at_once=RUNS)
        instance.finish()
        instance.killed.append(pid)
        instance.restless.append(pid)
        instance.kills = _counted(instance, "cancel")
        return judged(instance, runs)


def term(place: Place, name: str, number: int, draw: random.Random, pace: Pace) -> Figures:
    """Processes are told to end and exit with 0, with time for the node in flight, which is not rerun."""
    runs = _runs(name)
    strikes = 0
    with processes(place, number) as instance:
        for turn in range(draw.randint(1, 3)):
            drain = draw.choice((0.0, 10.0))
            pid = instance.start(runs, seed=f"{name}-{turn}", drain=drain, pause=0.03)
            calls = _counted(instance, "call") + 1
            instance.wait(until=lambda calls=calls: _counted(instance, "call") >= calls)
            time.sleep(draw.uniform(0, 0.4 * pace.seconds))  # Less than it lasts, on a quick machine too.
            instance.poll()
            if pid in instance.alive:
                os.kill(pid, signal.SIGTERM)
                strikes += 1
                if not drain:
                    instance.killed.append(pid)
            instance.wait_for(pid)
        instance.start(runs, seed=f"{name}-last")
        instance.finish()
        instance.kills = strikes
        return judged(instance, runs)


def lock(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """A third process holds the write lock of the file again and again, longer than any transaction."""
    runs = _runs(name)
    with processes(place, number) as instance:
        holds = [draw.uniform(0.01, 0.3) for _ in range(4)]
        path = instance.url.removeprefix("sqlite:///")
        for i in range(2):
            instance.start(runs, seed=f"{name}-{i}")
        instance.call(lambda: _hold(path, holds))
        instance.finish()
        instance.kills = len(holds)
        return judged(instance, runs)


def _hold(path: str, holds: list[float]) -> None:
    for seconds in holds:
        while True:
            try:
                db = sqlite3.connect(f"file:{path}?mode=rw", uri=True, isolation_level=None, timeout=0)
                db.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError:
                time.sleep(0.0005)
        time.sleep(seconds)
        db.close()


def full(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """The disk is full for one process (no file may grow beyond a limit); one that has room goes on."""
    runs = _runs(name)
    with processes(place, number, fresh=True) as instance:
        limit = draw.choice((draw.randint(4_000, 60_000), draw.randint(60_000, 400_000)))
        pid = instance.start(runs, seed=f"{name}-full", file_bytes=limit, once=True, patient=True)
        instance.finish()
        report = sum(line[0] == "end" and line[3] == "StoreError" for line in read_diary(instance.diary))
        instance.killed.append(pid)
        instance.refused.append(pid)
        instance.start(runs, seed=f"{name}-last")
        instance.finish()
        instance.kills = int(report > 0)
        figures = judged(instance, runs)
    figures.more["runs that were told"] += report
    return figures


def terminate(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """The server ends the connections of the processes in the middle of what they do."""
    runs = _runs(name)
    with processes(place, number) as instance:
        for i in range(2):
            instance.start(runs, seed=f"{name}-{i}", patient=True)
        pauses = [draw.uniform(0.001, 0.06) for _ in range(8)]
        ended = f"{instance.diary}-ended"
        instance.call(lambda: _terminate(place.store, pauses, ended))
        instance.finish()
        with open(ended) as file:
            instance.kills = int(file.read())
        os.unlink(ended)
        return judged(instance, runs)


def _terminate(dsn: str, pauses: list[float], ended: str) -> None:
    import psycopg

    count = 0
    with psycopg.connect(dsn, autocommit=True) as db:
        for pause in pauses:
            time.sleep(pause)
            result = db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            count += len(result.fetchall())
    with open(ended, "w") as file:
        file.write(str(count))


def restart(place: Place, name: str, number: int, draw: random.Random, pace: Pace) -> Figures:
    """The server is killed (SIGKILL) and started again, while two processes are at work."""
    runs = _runs(name)
    with processes(place, number) as instance:
        for i in range(2):
            instance.start(runs, seed=f"{name}-{i}", patient=True, pause=0.02)
        time.sleep(draw.uniform(0, 0.8 * pace.seconds))
        place.server.kill()
        time.sleep(draw.uniform(0, 0.3))
        place.server.start()
        instance.finish()
        instance.kills = 1
        return judged(instance, runs)


FAULTS: dict[str, Callable[[Place, str, int, random.Random, Pace], Figures]] = {
    "clock": clock,
    "cancel": cancel,
    "term": term,
    "lock": lock,
    "full": full,
    "terminate": terminate,
    "restart": restart,
}


def can_have(store: str, fault: str, server: Any) -> bool:
    """Whether a store can be struck so. ``server``: None for one that is not the tests' own."""
    return store in ONLY.get(fault, (store,)) and (fault != "restart" or server is not None)
