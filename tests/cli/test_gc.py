"""`stroma gc`, and runs whose process died: given up after a while, forced on, and shown as what they are."""

import json
import os
import re
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


@pytest.mark.slow
def test_a_run_that_kept_dying_is_forced(stroma, inside):
    """A run given up as poison stays FAILED under a plain resume and calls nothing; --force resumes it."""
    stroma.file(
        "deadly.py",
        """
        from sums import *
        import signal

        async def deadly(state):
            called("deadly")
            if "WELL" not in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"n": 2}

        pipeline = Pipeline("deadly", [node("deadly", deadly, Count, Sum)],
                            config=RunConfig(max_recoveries=2))
        """,
    )
    assert stroma("run", "deadly.py:pipeline", GOOD, "--run-id", "x").code == -9
    assert stroma("resume", "x", "deadly.py:pipeline").code == -9
    given_up = inside("resume", "x", "deadly.py:pipeline", env={"WELL": "1"})
    assert given_up.code == 1
    assert "run x is FAILED: TERMINAL (poison)\n  why: poison: the process died 2 times" in given_up.err
    (forced,) = re.findall("resume with: stroma (.*)", given_up.err)
    assert forced == "resume x deadly.py:pipeline --force"
    for words in (["show", "x"], ["resume", "x", "deadly.py:pipeline", "--dry-run"], ["resume", "x"]):
        assert forced in inside(*words).err
    assert stroma.calls() == ["deadly", "deadly"]
    assert "poison" in inside("runs").out
    done = inside(*forced.split(), "-q", env={"WELL": "1"})
    assert (done.code, json.loads(done.out)) == (0, {"n": 2})


@pytest.mark.slow
def test_a_run_whose_owner_is_gone_is_interrupted(stroma, inside, ran):
    """A run whose process died is INTERRUPTED for `runs`, `show` and `resume`, and not RUNNING."""
    env = {"SECOND": "os.kill(os.getpid(), signal.SIGKILL)"}
    assert stroma("run", "sums.py:pipeline", GOOD, "--run-id", "x1", env=env).code == -9
    for request in ((), ("--status", "INTERRUPTED")):
        (run,) = json.loads(inside("runs", "--json", *request).out)["runs"]
        assert (run["run_id"], run["status"], run["holder"]) == ("x1", "INTERRUPTED", None)
    assert json.loads(inside("runs", "--json", "--status", "RUNNING").out)["runs"] == []
    listed = inside("runs")
    assert "  owner lost; last record " in listed.out
    assert listed.err == "resume a run without owner: stroma resume RUN FILE.py:NAME\n"
    shown = inside("show", "x1").out
    assert "INTERRUPTED" in shown
    assert re.search(r"owner     process \d+ on \S+ is gone; last record ", shown)
    planned = inside("resume", "x1", "sums.py:pipeline", "--dry-run", "--json")
    assert json.loads(planned.out)["status"] == "INTERRUPTED"
    for change in (["send", "x1", "{}"], ["budget", "x1", "--tokens", "900"]):
        assert json.loads(inside(*change, "--json").out)["status"] == "INTERRUPTED"
    assert "it is INTERRUPTED" in inside("approve", "x1", "sums.py:pipeline", "{}").err
    done = inside("tail", "x1", "--follow")
    assert (done.code, done.out.splitlines()[-1]) == (0, "INTERRUPTED  owner lost")
    assert "resume it: stroma resume x1 sums.py:pipeline" in done.err
    ran("x2")
    listed = inside("show", "x").err
    assert "x1  sums  INTERRUPTED" in listed, listed
    assert "x2  sums  COMPLETED" in listed, listed


@pytest.mark.parametrize(
    ("body", "error"), [('return {}["pens"]', "KeyError"), ("return state, Usage(cost_usd=-1)", "UsageError")]
)
def test_where_a_failed_run_failed(stroma, inside, body, error):
    """run and show name the line of the user's code where the attempt that stopped a run failed.

    The generated code of Stroma's own dataclasses is not the user's.
    """
    stroma.file(
        "prices.py",
        f"""
        from stroma import Flow, stroma_flow
        from sums import *
        @stroma_node
        async def price(state: Count) -> Count:
            {body}
        @stroma_flow
        async def buys(flow: Flow, state: Count) -> Count:
            return await flow.step(price, state)
        """,
    )
    done = inside("run", "prices.py:buys", GOOD, "--run-id", "x", "-q", "--db", "runs.db")
    assert done.code == 1
    at = rf'{error}: .*\n +File ".*prices.py", line \d, in price\n +{re.escape(body)}\n'
    assert re.search(at, done.err)
    assert re.search(at, inside("show", "x", "--db", "runs.db").out)
    assert inside("resume", "x", "--db", "runs.db").code == 0
    assert inside("runs", "--db", "runs.db").out.rstrip().endswith("due for a worker")
