"""`stroma gc`."""

import json
import os
import sqlite3
import time

import pytest

from stroma.testing import crash_at

GOOD = '{"start": 1}'


@pytest.fixture
def old(stroma, inside, ran):
    """A store whose runs were last written two days ago: one ended, one gave up, one was killed."""
    ran("ended", "--db", "runs.db")
    ran("gave up", "--db", "runs.db", code=1, SECOND="raise TimeoutError")
    with crash_at("before_node", "second"):
        inside("run", "sums.py:pipeline", GOOD, "--run-id", "killed", "--db", "runs.db")
    with sqlite3.connect(stroma.home / "runs.db") as db:
        db.execute("UPDATE runs SET updated_ms = updated_ms - 172800000")
    db.close()
    ran("young", "--db", "runs.db")
    return stroma


def left(inside):
    return {run["run_id"] for run in json.loads(inside("runs", "--json", "--db", "runs.db").out)["runs"]}


def test_old_runs_go(old, inside):
    """What ended longer ago is deleted, what could be resumed only if asked for; a younger run stays."""
    done = inside("gc", "--older-than", "3d", "--db", "runs.db")
    assert (done.code, done.out, done.err) == (0, "", "0 runs deleted from runs.db\n")
    done = inside("gc", "--older-than", "24h", "--dry-run", "--db", "runs.db")
    assert [line.split()[0] for line in done.out.splitlines()] == ["RUN", "ended"]
    assert done.err == "1 run would be deleted from runs.db\n"
    assert inside("gc", "--older-than", "24h", "--db", "runs.db").err == "1 run deleted from runs.db\n"
    assert left(inside) == {"gave up", "killed", "young"}
    options = ("--older-than", "1.5d", "--unfinished", "--json", "--db", "runs.db")
    data = json.loads(inside("gc", *options, "--dry-run").out)
    assert {run["run_id"] for run in data["runs"]} == {"gave up", "killed"}
    done = inside("gc", *options)
    assert json.loads(done.out) == {"schema": "stroma.gc/1", "runs": 2, "blobs": 0}
    assert left(inside) == {"young"}


@pytest.mark.slow
def test_a_run_that_somebody_is_at_work_on_stays(old, inside):
    """However old a run is, nobody who is at work on it loses it."""
    hang, calls = {"SECOND_AWAITS": "asyncio.Event().wait()"}, len(old.calls())
    process = old.popen("resume", "gave up", "sums.py:pipeline", "--db", "runs.db", env=hang)
    try:
        deadline = time.monotonic() + 20
        while len(old.calls()) == calls:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with sqlite3.connect(old.home / "runs.db") as db:
            db.execute("UPDATE runs SET updated_ms = updated_ms - 172800000 WHERE run_id = 'gave up'")
        db.close()
        options = ("--older-than", "1d", "--unfinished", "--db", "runs.db")
        assert inside("gc", *options, "--dry-run").err.endswith("2 runs would be deleted from runs.db\n")
        done = inside("gc", *options)
        assert done.err == "2 runs deleted from runs.db\n"
        assert left(inside) == {"gave up", "young"}
    finally:
        process.kill()
        process.communicate()


def test_blobs_go_with_their_runs(old, inside):
    """With --blobs, payloads that no run names are deleted, and nothing else that lies in that directory."""
    blobs, other = old.home / "blobs" / "ab" / ("ab" * 32), old.home / "blobs" / "go" / "main.go"
    for path in (blobs, other):
        path.parent.mkdir(parents=True)
        path.write_text("x")
        os.utime(path, (0, 0))
    done = inside("gc", "--older-than", "1d", "--blobs", "blobs", "--db", "runs.db")
    assert done.err == "1 run and 1 blob deleted from runs.db\n"
    assert not blobs.exists()
    assert other.exists()


def test_what_cannot_be_meant(old, inside, fails):
    """Without a span, or with one that is none, nothing is deleted; a store that is not there is not made."""
    fails(inside("gc", "--db", "runs.db"), 2, "--older-than")
    fails(inside("gc", "--older-than", "1d", "--dry-run", "--blobs", "x"), 2, "leave out --blobs")
    for span in ("30", "-1d", "d", "30 days", "1e9d", "nan", "99999999w"):
        fails(inside("gc", "--older-than", span, "--db", "runs.db"), 2, "is not a time span")
    fails(inside("gc", "--older-than", "1d", "--db", "none.db"), 4, "store none.db does not exist")
    assert not (old.home / "none.db").exists()
    assert left(inside) == {"ended", "gave up", "killed", "young"}
    assert inside("gc", "--older-than", "1d").code == 0  # The default store, which nobody has used yet.
