"""A store that comes back as it was a moment ago, under a living process: a restored copy, or a replica that
lagged behind.

What was acknowledged since is gone, and nobody can bring it back. But the process that knows of it must not
go on as if nothing had happened: its next attempt at such a run is CheckpointLost. (Of a run that had only
its end to record, the process returns what it had made.) And whoever goes on with the run from what is left
makes one history of it.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.check import Figures
from tests.chaos.rounds import RUNS, Pace, Place, Processes, apart, judged, processes
from tests.chaos.worker import Diary, read_diary

from stroma import open_store

#: For how long a file may be locked by the process that was stopped.
LOCKED_SECONDS = 0.5


def restored(place: Place, name: str, number: int, draw: random.Random, _pace: Pace) -> Figures:
    """A store is restored to an earlier moment while a process is at work on its runs."""
    runs = [f"{name}-{i}" for i in range(RUNS)]
    with processes(place, number, fresh=True) as instance:
        pid = instance.start(runs, seed=f"{name}-first", pause=0.04, patient=True, may_get_lost=True)
        copy = Path(f"{instance.diary}-copy")
        _after_calls(instance, draw.randint(1, 12))
        take, bring_back = _way(place, instance.url)
        _stopped(instance, pid, lambda: take(copy))
        _after_calls(instance, _calls(instance) + draw.randint(1, 8))
        before, after = set[str](), set[str]()

        def restore() -> None:
            before.update(apart_tokens(instance.url, runs))
            Diary(instance.diary).write("restored", "-", "-", "-", str(pid))
            bring_back(copy)
            after.update(apart_tokens(instance.url, runs))

        struck = _stopped(instance, pid, restore)
        instance.finish()
        figures = Figures()
        if struck:
            figures = _goes_on(instance, pid, before, after)
        instance.killed.append(pid)
        instance.stopped.append(pid)
        instance.restless.append(pid)
        instance.start(runs, seed=f"{name}-last", pause=0.002, patient=True)
        instance.finish()
        instance.kills = int(struck)
        figures.add(judged(instance, runs))
    copy.unlink(missing_ok=True)
    return figures


def _calls(instance: Processes) -> int:
    return sum(line[0] == "call" for line in read_diary(instance.diary))


def _after_calls(instance: Processes, calls: int) -> None:
    instance.wait(until=lambda: _calls(instance) >= calls)


def _stopped(instance: Processes, pid: int, do: Callable[[], None]) -> bool:
    """Do something while a process is stopped. Return whether it was still there."""
    while True:
        instance.poll()
        if pid not in instance.alive:
            return False
        os.kill(pid, signal.SIGSTOP)
        _, status = os.waitpid(pid, os.WUNTRACED)  # It may run on for a moment.
        if not os.WIFSTOPPED(status):
            instance.fetched(pid, status)
            return False
        try:
            do()
            return True
        except sqlite3.OperationalError:  # It was stopped in a transaction.
            pass
        finally:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.005)


def apart_tokens(url: str, runs: list[str]) -> set[str]:
    """Return "run token" of every commit that a store has."""
    return set(apart(lambda: _tokens(url, runs)).broken)


def _tokens(url: str, runs: list[str]) -> Figures:
    store: Any = open_store(url)
    findings = []
    try:
        for run_id in runs:
            for attempt in store.attempts(run_id):
                if attempt.output is not None:
                    findings.append(f"{run_id} {json.loads(attempt.output)['mine'] or '-'}")
    finally:
        if hasattr(store, "close"):
            store.close()
    return Figures(broken=findings)


def _goes_on(instance: Processes, pid: int, before: set[str], after: set[str]) -> Figures:
    """Judge what the process did after the store came back older, and strike what is gone from the diary."""
    figures, since = Figures(), False
    gone = before - after
    lines, events = list(read_diary(instance.diary)), set[str]()
    acknowledged = {f"{line[1]} {line[3]}" for line in lines if line[0] == "ack"} & gone
    runs = {one.partition(" ")[0] for one in acknowledged}
    left = []
    for line in lines:
        kind, run_id, place, token = line[:4]
        if kind == "restored":
            since = True
            continue
        one = f"{run_id} {token}"
        if kind == "ack" and since and run_id in runs and one not in before:
            figures.mixed += 1
            figures.broken.append(
                f"I7: run {run_id}: {place} was acknowledged after its store had come back older"
            )
        if kind == "end" and line[3] == "CheckpointLost":
            events.add(run_id)
        forgotten = kind == "noted" or (run_id in runs and kind == "end") or (kind == "ack" and one in gone)
        if line[4] != str(pid) or not forgotten:
            left.append(line)
    if figures.broken:
        shutil.copyfile(instance.diary, f"{instance.diary}-whole")
    Path(instance.diary).write_text("".join(" ".join(line) + "\n" for line in left))
    figures.more["commits rolled back"] += len(gone)
    figures.more["runs told of it"] += len(events & runs)
    return figures


def _way(place: Place, url: str) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """Return what takes a copy of a store, and what brings it back."""
    if url.startswith("sqlite"):
        path = url.removeprefix("sqlite:///")
        return (lambda copy: _backup(path, str(copy))), (lambda copy: _backup(str(copy), path))
    if url.startswith("redis"):
        server, data = place.server, place.server.home / "appendonly.aof"
        return (lambda copy: _down(server, data, copy)), (lambda copy: _down(server, copy, data))
    schema = "stroma"
    return (lambda copy: _keep_tables(url, schema)), (lambda copy: _bring_tables(url, schema))


def _backup(source: str, target: str) -> None:
    deadline = time.monotonic() + LOCKED_SECONDS

    def look(*_: int) -> None:  # It would wait for a lock for ever.
        if time.monotonic() > deadline:
            raise sqlite3.OperationalError("database is locked")

    with (
        contextlib.closing(sqlite3.connect(source, timeout=LOCKED_SECONDS)) as old,
        contextlib.closing(sqlite3.connect(target, timeout=LOCKED_SECONDS)) as new,
    ):
        old.backup(new, progress=look)


def _down(server: Any, source: Path, target: Path) -> None:
    """Copy the file of a server that is down meanwhile."""
    server.kill()
    try:
        shutil.copyfile(source, target)
    finally:
        server.start()


def _tables(db: Any, schema: str) -> list[str]:
    result = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", (schema,)).fetchall()
    return [name for (name,) in result]


def _keep_tables(url: str, schema: str) -> None:
    import psycopg

    with psycopg.connect(url) as db:
        db.execute("DROP SCHEMA IF EXISTS copy CASCADE")
        db.execute("CREATE SCHEMA copy")
        for table in _tables(db, schema):
            db.execute(f"CREATE TABLE copy.{table} AS TABLE {schema}.{table}".encode())


def _bring_tables(url: str, schema: str) -> None:
    """Put rows back as they were, in one transaction: others see it as a server that came back older."""
    import psycopg

    with psycopg.connect(url) as db:
        for table in _tables(db, "copy"):
            db.execute(f"DELETE FROM {schema}.{table}".encode())
            db.execute(f"INSERT INTO {schema}.{table} OVERRIDING SYSTEM VALUE TABLE copy.{table}".encode())


FAULTS = {"restored": restored}
