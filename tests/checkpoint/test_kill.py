"""kill -9 at a random instant: what was committed is there, and is never run again."""

import asyncio
import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import stroma

CHILD = Path(__file__).with_name("kill_helper.py")
NODES = 20
ROUNDS = 50
AT_ONCE = 4


@asynccontextmanager
async def _child(database: Path, side: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child that has imported everything and is about to begin; dead at the end, whatever happens here."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(CHILD),
        str(database),
        str(side),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": str(Path(stroma.__file__).parent.parent), "PATH": ""},
    )
    try:
        assert child.stdout is not None
        line = await child.stdout.readline()
        if line != b"ready\n":
            _, errors = await child.communicate()
            raise AssertionError(errors.decode())
        yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.communicate()


def _committed(database: Path) -> list[str]:
    """The committed nodes of the run, in order, read past the library."""
    if not database.exists():
        return []
    with sqlite3.connect(database) as db:
        try:
            rows = db.execute(
                "SELECT node_id FROM steps WHERE branch = '' AND position >= 0 ORDER BY position"
            )
            return [node_id for (node_id,) in rows]
        except sqlite3.OperationalError:  # Killed before the schema was committed.
            return []
        finally:
            db.rollback()


def _calls(side: Path) -> Counter[str]:
    lines = side.read_text().splitlines() if side.exists() else []
    return Counter(line.removeprefix("call ") for line in lines if line.startswith("call "))


async def _round(folder: Path, delay: float) -> bool:
    """Kill a run, resume it, check it. Returns whether the kill came before the run's end."""
    folder.mkdir()
    database, side = folder / "runs.db", folder / "side"
    async with _child(database, side) as child:
        await asyncio.sleep(delay)
        try:
            child.send_signal(signal.SIGKILL)
        except ProcessLookupError:
            pass
        out, _ = await child.communicate()
    killed = child.returncode == -signal.SIGKILL and b"COMPLETED" not in out
    before, entry = _calls(side), await asyncio.to_thread(_committed, database)
    # Commits are a prefix of the pipeline, and nothing was called beyond the one node in flight.
    assert entry == [f"node {n}" for n in range(len(entry))]
    assert set(before.values()) <= {1}
    assert len(before) <= len(entry) + 1

    async with _child(database, side) as child:
        out, errors = await child.communicate()
    assert child.returncode == 0, errors.decode()
    # "COMPLETED" if the run was not even begun when the kill came.
    assert out in ((b"RESUMED\n",) if entry else (b"RESUMED\n", b"COMPLETED\n"))
    after = _calls(side)
    assert await asyncio.to_thread(_committed, database) == [f"node {n}" for n in range(NODES)]
    for node_id in entry:
        number = node_id.removeprefix("node ")
        assert after[number] == before[number] == 1, f"{node_id} was committed and ran again"
    assert set(after) == {str(n) for n in range(NODES)}
    # Only the node in flight may have been called a second time.
    assert sum(after.values()) <= NODES + 1
    return killed


@pytest.mark.example
async def test_g5_killed_on_the_way(tmp_path: Path) -> None:
    """G5: killed once with SIGKILL, a run resumes with every node committed once and none run again."""
    for number, delay in enumerate((0.2, 0.1, 0.05, 0.02)):
        if await _round(tmp_path / str(number), delay):
            return
    raise AssertionError("every kill came after the end of its run")


@pytest.mark.nightly
async def test_g5_killed_at_random_instants(tmp_path: Path) -> None:
    """G5: A run that is killed with SIGKILL at 50 random instants resumes with every node committed once."""
    # How long a whole run takes here, from "ready" on, sets the range of instants: a little over its half, so
    # that a machine that gets quicker meanwhile still sees most of them before the end.
    async with _child(tmp_path / "measure.db", tmp_path / "measure") as child:
        began = time.perf_counter()
        await child.communicate()
        whole = time.perf_counter() - began

    draw = random.Random(20)
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> bool:
        nonlocal whole
        # Every eighth may come at any time, so that the end of a run is struck too.
        part = draw.uniform(0, 1 if number % 8 == 7 else 0.55)
        async with gate:
            is_killed = await _round(tmp_path / str(number), part * whole)
        if not is_killed and part < 0.55:  # The machine has become quicker.
            whole *= 0.8
        return is_killed

    async with asyncio.TaskGroup() as tasks:
        rounds = [tasks.create_task(one(number)) for number in range(ROUNDS)]
    killed = sum(task.result() for task in rounds)
    print(f"{killed} of {ROUNDS} runs were killed before their end")
    assert killed >= 40
