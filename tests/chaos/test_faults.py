"""A few rounds of each fault: `./dev chaos` has as many as you like.

I1: no acknowledged step is lost or changed. I2: one row for each run, position and branch. I3: effects are
repeated only for attempts that were in flight when a process was struck. I4: what a run cost is the sum over
its attempts. I5: every run ends, or raises a named error. I6: a shared budget has counted what the journals
of its runs have. I7: what a node was given is what the journal has.
"""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.chaos.disk import FailedSync, Name, Sync, Truncate, Write, survives
from tests.chaos.worker import POINTS
from tests.shared_stores import ON_SERVERS, SHARED

ROOT = Path(__file__).parents[2]


def strike(fault: str, rounds: int, store: str = "sqlite", seed: int = 20) -> dict[str, int]:
    """The figures of some rounds, by name. A process of its own: it forks, and so must have no threads."""
    command = [sys.executable, "-m", "tests.chaos", "--fault", fault, "--rounds", str(rounds)]
    options = [*command, "--store", store, "--seed", str(seed)]
    done = subprocess.run(options, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    print(done.stdout)
    return {name: int(count) for count, name in re.findall(r"(\d+) ([^,\n]+)", done.stdout)}


@pytest.mark.parametrize(
    ("store", "rounds"),
    [
        pytest.param("sqlite", 2, marks=pytest.mark.example),
        pytest.param("sqlite", 20, marks=pytest.mark.nightly),
        *(pytest.param(kind, 8, marks=pytest.mark.nightly) for kind in ON_SERVERS),
    ],
)
def test_killed_at_random(store: str, rounds: int) -> None:
    """G5: Runs whose workers are killed with SIGKILL at any instant end with every node committed once."""
    figures = strike("kill", rounds, store, seed=21)
    assert figures["kills"] >= rounds // 2
    assert figures["commits"] == 10 * figures["runs"]


def test_killed_at_each_point_of_the_protocol() -> None:
    """I1 to I5, killed before and after node, commit, acknowledgement, hook, the run's begin and its end."""
    figures = strike("points", 22)
    assert [point for point in POINTS if not figures.get(f"at {point!r}")] == []


@pytest.mark.slow
def test_killed_around_the_calls_of_effects() -> None:
    """G13: killed around calls while the provider drops connections, each step charges a card once."""
    figures = strike("effect", 4)
    assert figures["kills"] >= 4
    assert (figures["commits"], figures["duplicated"], figures["lost"]) == (5 * figures["runs"], 0, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("store", ON_SERVERS)
def test_killed_around_the_calls_of_effects_on_a_server(store: str) -> None:
    """G13: the same on a server that all processes share."""
    figures = strike("effect", 6, store)
    assert figures["kills"] >= 6
    assert (figures["duplicated"], figures["lost"]) == (0, 0)


@pytest.mark.slow
def test_workers_and_what_befalls_them() -> None:
    """G5, G13: Whatever befalls workers and clients, runs end; nodes are committed and cards charged once."""
    figures = strike("queue", 2)
    assert figures["kills"] >= 2
    assert (figures["lost"], figures["duplicated"], figures["overspent"]) == (0, 0, 0)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "store"),
    [("queue", "sqlite"), ("queue", "postgres"), ("queue", "redis"), ("temporal", "postgres")],
)
def test_workers_and_servers_and_what_befalls_them(fault: str, store: str) -> None:
    """G5 and G13: the same, more often, while servers are killed and started again, Temporal's too."""
    figures = strike(fault, 10 if fault == "queue" else 6, store)
    assert figures["kills"] >= 6
    assert figures["commits"] == 99 / 12 * figures["runs"]


@pytest.mark.nightly
def test_killed_inside_of_groups() -> None:
    """I1 and I3: branches of parallel() and items of map_over() that have finished are not run again."""
    figures = strike("group", 12)
    assert figures["kills"] >= 12
    assert figures["repeated in flight"] > 0


@pytest.mark.nightly
def test_stopped_for_longer_than_its_lease() -> None:
    """I1, I2 and I4: a process that wakes up after another took its run over commits nothing."""
    figures = strike("stop", 6)
    assert figures["fenced"] > 0


@pytest.mark.nightly
def test_started_twice_and_eight_times() -> None:
    """I2 and I3: of 2 and of 8 processes with one run one executes it, in a file that none of them found."""
    figures = strike("duplicate", 8)
    assert figures["repeated in flight"] == 0
    assert figures["told that it is busy"] > 0


@pytest.mark.nightly
def test_clocks_that_jump() -> None:
    """I1 to I5, killed at any instant while each wall clock jumps to and fro by up to an hour."""
    assert strike("clock", 8)["kills"] >= 4


@pytest.mark.nightly
@pytest.mark.parametrize("store", SHARED)
def test_cancelled_at_any_await(store: str) -> None:
    """I1 to I4: cancelled at any await and resumed, a run has each commit once, and no commit runs again."""
    assert strike("cancel", 6, store)["cancellations"] >= 10


@pytest.mark.nightly
def test_told_to_end() -> None:
    """I1 and I3: SIGTERM ends a process with 0 after the node in flight, or at once, and frees its runs."""
    assert strike("term", 8)["SIGTERMs"] >= 4


@pytest.mark.nightly
def test_a_locked_database() -> None:
    """I1 and I3: while the file is locked by another everybody waits; no node is run again for it."""
    figures = strike("lock", 3)
    assert (figures["locks"], figures["repeated in flight"]) == (12, 0)


@pytest.mark.nightly
def test_a_full_disk() -> None:
    """I1 and I5: on a full disk a run stops with a named error and continues once there is room."""
    assert strike("full", 8)["runs that were told"] >= 8


@pytest.mark.nightly
def test_connections_that_are_ended() -> None:
    """I2 and I3: a commit whose connection is ended is looked for and sent again; its node is not rerun."""
    figures = strike("terminate", 4, "postgres")
    assert figures["connections ended"] >= 10
    assert figures["repeated in flight"] == 0


@pytest.mark.nightly
@pytest.mark.parametrize("store", ON_SERVERS)
def test_a_server_that_is_killed(store: str) -> None:
    """I1 and I3: what a server acknowledged survives its SIGKILL; whoever works waits for its return."""
    figures = strike("restart", 2, store)
    assert (figures["server kills"], figures["repeated in flight"]) == (2, 0)


@pytest.mark.nightly
def test_killed_before_what_a_call_took_is_settled() -> None:
    """I6, killed between a commit and its next step; a budget in another store may miss calls in flight."""
    figures = strike("settle", 4)
    assert figures["kills"] >= 4
    assert figures["overspent"] == 0


@pytest.mark.nightly
@pytest.mark.parametrize("store", SHARED)
def test_a_store_that_comes_back_older(store: str) -> None:
    """I7: a process whose acknowledged commits are gone gets CheckpointLost; a resume has one history."""
    figures = strike("restored", 4, store)
    assert figures["restores"] >= 3
    assert figures["mixed"] == 0


@pytest.mark.nightly
def test_power_cuts() -> None:
    """I1 at FULL; at NORMAL what is left is a prefix of what was acknowledged, and is sound."""
    figures = strike("powercut", 400)
    assert figures["cuts at FULL"] >= 100
    # Were nothing ever lost here, the disk would be no good.
    assert figures["cuts at NORMAL that lost the last batches"] > 0


@pytest.mark.nightly
def test_failed_fsyncs() -> None:
    """I1 and I5: after a failed fsync nothing is acknowledged, a new store has what was acknowledged."""
    figures = strike("fsync", 30)
    assert figures["poisoned"] > 0


@pytest.mark.nightly
def test_the_disk_that_loses_its_power() -> None:
    """What the power cuts stand on: what was synced stays, all else may be lost, torn or reordered."""
    old, new = b"a" * 1024, b"b" * 1024
    synced = [Name("f", 1), Write(1, 0, old), Sync(1, True)]

    def images(*events: object) -> set[bytes | None]:
        record = [*synced, *events]
        return {
            image.get("f")
            for seed in range(200)
            for _, image in survives(record, [len(record)], random.Random(seed))
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
