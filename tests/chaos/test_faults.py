"""A few rounds of each fault: `./dev chaos` has as many as you like.

I1: no acknowledged step is lost or changed. I2: one row for each run, position and branch. I3: effects are repeated only
for attempts that were in flight when a process was struck. I4: what a run cost is the sum over its attempts. I5: every
run ends, or raises a named error.
"""

import random
import re
import subprocess
import sys
from pathlib import Path

from tests.chaos.disk import FailedSync, Name, Sync, Truncate, Write, survives
from tests.chaos.worker import POINTS

ROOT = Path(__file__).parents[2]


def strike(fault: str, rounds: int, store: str = "sqlite", seed: int = 20) -> dict[str, int]:
    """The figures of some rounds, by name. A process of its own: it forks, and so must have no threads."""
    command = [sys.executable, "-m", "tests.chaos", "--fault", fault, "--rounds", str(rounds)]
    done = subprocess.run(
        [*command, "--store", store, "--seed", str(seed)],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    print(done.stdout)
    return {name: int(count) for count, name in re.findall(r"(\d+) ([^,\n]+)", done.stdout)}


def test_killed_at_random() -> None:
    """I1 to I5, with two workers that are killed at any instant and started anew."""
    figures = strike("kill", 20)
    assert figures["kills"] >= 10
    assert figures["commits"] == 10 * figures["runs"]


def test_killed_at_each_point_of_the_protocol() -> None:
    """I1 to I5, killed before and after node, commit, acknowledgement, hook, the run's begin and its end."""
    figures = strike("points", 22)
    assert [point for point in POINTS if not figures.get(f"at {point!r}")] == []


def test_killed_inside_of_groups() -> None:
    """I1 and I3: branches of parallel() and items of map_over() that have finished are not run again."""
    figures = strike("group", 12)
    assert figures["kills"] >= 12
    assert figures["repeated in flight"] > 0


def test_stopped_for_longer_than_its_lease() -> None:
    """I1, I2 and I4: what a process commits that wakes up after another one has taken its run over is fenced."""
    figures = strike("stop", 6)
    assert figures["fenced"] > 0


def test_started_twice_and_eight_times() -> None:
    """I2 and I3: of 2 and of 8 processes with one run one executes it, in a file that none of them has found."""
    figures = strike("duplicate", 8)
    assert figures["repeated in flight"] == 0
    assert figures["told that it is busy"] > 0


def test_power_cuts() -> None:
    """I1 at FULL; at NORMAL what is left is a prefix of what was acknowledged, and is sound."""
    figures = strike("powercut", 400)
    assert figures["cuts at FULL"] >= 100
    # Were nothing ever lost here, the disk would be no good.
    assert figures["cuts at NORMAL that lost the last batches"] > 0


def test_failed_fsyncs() -> None:
    """I1 and I5: after a failed fsync nothing is acknowledged, and a new store has all that was acknowledged before."""
    figures = strike("fsync", 30)
    assert figures["poisoned"] > 0


def test_the_disk_that_loses_its_power() -> None:
    """What the power cuts stand on: what was synced stays, all else may be lost, torn, or done in another order."""
    old, new = b"a" * 1024, b"b" * 1024
    synced = [Name("f", 1), Write(1, 0, old), Sync(1, True)]

    def images(*events: object) -> set[bytes | None]:
        record = [*synced, *events]
        return {
            image.get("f")
            for seed in range(200)
            for _, image in survives(record, [len(record)], random.Random(seed))  # type: ignore[arg-type]
        }

    assert images() == {old}
    torn = {old, new, old[:512] + new[:512], new[:512] + old[:512]}
    assert images(Write(1, 0, new)) == torn
    assert images(Write(1, 0, new), Sync(1, False)) == {new}
    assert images(Truncate(1, 0)) == {old, b""}
    assert images(Name("f", None)) == {old, None}
    assert images(Name("f", None, directory=True)) == {None}
    # The kernel drops what it could not write; a later sync, of something else, does not bring it back.
    assert old in images(Write(1, 0, new), FailedSync(1, True), Sync(1, False))
