"""`stroma pause`, `stroma resume` of a paused run, and `stroma budget` of a run."""

import asyncio
import json
import re
import signal

import pytest
from tests.cli.test_operations import GOOD, at_work
from tests.store_suite.journal import begin

from stroma import SQLiteStore
from stroma.runner import stored_runs

WAITS = """
from sums import *
config = RunConfig(budget=ExecutionBudget(max_tokens_total=100), on_budget="wait")
pipeline = Pipeline("sums", list(pipeline.nodes), config=config)
"""


@pytest.mark.slow
def test_a_living_run_is_paused(stroma, inside, fails):
    """Its process ends with 7 after the node at work; the run says so, and what continues it."""
    fails(inside("pause", "x"), 4, "no run whose id begins with 'x'")
    with at_work(stroma, {"SECOND_AWAITS": "asyncio.sleep(4)"}) as process:
        done = inside("pause", "x", "--json")
        data = json.loads(done.out)
        assert (done.code, data["schema"], data["outcome"]) == (0, "stroma.pause/1", "asked")
        assert data["holder"].startswith(f"process {process.pid} on ")
        again = inside("pause", "last")
        assert "begins no further attempt; those at work finish" in again.err
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (7, "")
    assert "suspended: run x is paused" in err
    assert "continue a paused run: stroma resume x" in err
    assert stroma.calls() == ["first", "second"]
    shown = inside("show", "x")
    assert "paused    no attempt begins until somebody resumes it\n" in shown.out
    assert "continue a paused run: stroma resume x" in shown.err
    assert "or continue it here: stroma resume x sums.py:pipeline" in shown.err
    listed = inside("runs")
    assert "paused" in listed.out
    assert "continue a paused run: stroma resume RUN" in listed.err


async def _suspend(store, run_id):
    await (await begin(store, run_id)).end("SUSPENDED", "why?")


GENERATED = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    "words",
    [
        ("cancel", "RUN"),
        ("pause", "RUN"),
        ("send", "RUN", "1"),
        ("budget", "RUN", "--tokens", "9"),
        ("approve", "RUN", "sums.py:pipeline", "1"),
        ("resume", "RUN", "sums.py:pipeline"),
        ("drive", "RUN", "sums.py:pipeline"),
    ],
    ids=lambda words: words[0],
)
def test_a_prefix_names_no_run_to_change(stroma, inside, fails, words):
    """Commands that change a run take whole ids: a prefix changes nothing, and the message names the run."""
    with SQLiteStore(stroma.home / "runs.db") as store:
        for run_id in ("order-17", GENERATED):
            asyncio.run(_suspend(store, run_id))
        for prefix, run_id in (("order-1", "order-17"), (GENERATED[:11], GENERATED)):
            done = inside(*[prefix if one == "RUN" else one for one in words], "--db", "runs.db")
            fails(done, 4, f"no run {prefix!r} in runs.db; pass the whole id", run_id)
        assert store.statuses(["order-17"]) == {"order-17": "SUSPENDED"}
        assert inside("show", "order-1", "--db", "runs.db").code == 0
        assert inside("cancel", GENERATED[:12], "--db", "runs.db").code == 0  # As tables show it.
        assert store.statuses([GENERATED]) == {GENERATED: "CANCELLED"}


def test_an_owner_that_does_not_read_a_pause(stroma, inside, monkeypatch):
    """The command returns, and says that the owner may begin further attempts."""
    monkeypatch.setattr(stored_runs, "_OWNER_SECONDS", 0.2)
    with SQLiteStore(stroma.home / "runs.db") as store:
        session = asyncio.run(begin(store, "x"))
        done = inside("pause", "x", "--db", "runs.db")
        assert done.code == 0
        assert "has not read the request, and may begin further attempts" in done.err
        session.abandon()
    assert inside("pause", "x", "--db", "runs.db").err.startswith("run x is SUSPENDED, paused")


@pytest.mark.slow
def test_a_pause_is_taken_back(stroma, inside, fails):
    """``resume`` without a pipeline hands the run to a worker, with one continues it here."""
    with at_work(stroma, {"SECOND_AWAITS": "asyncio.sleep(60)"}) as process:
        process.kill()
    assert inside("pause", "x").err.startswith("run x is SUSPENDED, paused")
    done = inside("resume", "x")
    assert done.code == 0
    assert "run x is due: a worker that serves pipeline 'sums' continues it" in done.err
    assert inside("pause", "x").code == 0
    done = inside("resume", "x", "sums.py:pipeline", "-q")
    assert done.code == 0, done.err


def test_a_run_that_waits_for_its_budget(stroma, inside, fails, golden):
    """It ends with 7 and names the command that raises the budget; then it goes on and buys nothing again."""
    stroma.file("waits.py", WAITS)
    golden(
        "budget-wait",
        f"run waits.py:pipeline '{GOOD}' --run-id x -q",
        "show x",
        "resume x",
        "runs",
        columns=(120,),
    )
    before = stroma.calls()
    fails(inside("budget", "y", "--tokens", "9"), 4, "no run whose id begins with 'y'")
    fails(inside("budget", "x", "--cost-usd", "-1"), 2, "--cost-usd")
    fails(inside("budget", "x", "--cost-usd", "inf"), 2, "finite")
    golden(
        "budget-raised",
        "budget x --tokens 100000 --json",
        "budget x --tokens 12345678 --cost-usd 1234567.25",
        "resume x waits.py:pipeline -q",
        "budget x --tokens 1",
        "pause x --json",
        columns=(120,),
    )
    calls = stroma.calls()
    assert sorted(calls) == sorted(set(calls))
    assert calls[: len(before)] == before


def test_a_limit_of_resume_precedes_an_earlier_one(stroma, inside, ran):
    """``resume --budget-tokens`` holds although ``stroma budget`` had set another limit before."""
    stroma.file("waits.py", WAITS)
    ran("x", target="waits.py:pipeline", code=7)
    assert "has a new budget: max_tokens_total 101" in inside("budget", "x", "--tokens", "101").err
    assert inside("resume", "x", "waits.py:pipeline", "-q").code == 7
    done = inside("resume", "x", "waits.py:pipeline", "-q", "--budget-tokens", "100000")
    assert done.code == 0, done.err


@pytest.mark.slow
def test_stopped_runs_are_handed_to_workers(stroma, inside, fails, ran):
    """``resume`` without a pipeline makes a run due that failed, gave up or was cancelled."""
    for run_id, status in (("f", "FAILED"), ("p", "PARTIAL"), ("c", "CANCELLED")):
        second = {"FAILED": "raise NotImplementedError", "PARTIAL": "raise TimeoutError"}.get(status)
        if second is not None:
            ran(run_id, code=1, SECOND=second)
        else:
            with at_work(stroma, {"SECOND_AWAITS": "asyncio.sleep(60)"}, "--run-id", run_id) as process:
                assert inside("cancel", run_id).err.startswith(f"process {process.pid} on ")
                process.communicate(timeout=30)
        assert json.loads(inside("show", run_id, "--json").out)["run"]["status"] == status
        fails(inside("resume", run_id, "--force"), 2, "pass FILE_OR_MODULE:NAME")
        done = inside("resume", run_id)
        assert done.code == 0
        assert f"run {run_id} is due: a worker that serves pipeline 'sums' continues it" in done.err
        assert f"or continue it here: stroma resume {run_id} sums.py:pipeline" in done.err
    worker = stroma.popen("worker", "sums.py:pipeline", "--poll", "0.05")
    ended = set()
    for line in worker.stderr:
        ended |= set(re.findall(r"run (\w): (?:COMPLETED|RESUMED)", line))
        if len(ended) == 3:
            break
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=30)
    assert ended == {"f", "p", "c"}
    fails(inside("resume", "f"), 2, "has ended: it is ", "stroma show f")
