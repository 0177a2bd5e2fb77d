"""Runs that somebody else pauses, cancels or forks, or whose budget somebody changes."""

import asyncio
import contextlib
import json
import pathlib
import re
import signal
import time

import pytest
from tests.cli.test_signals import wait_for
from tests.store_suite.journal import begin

from stroma import SQLiteStore
from stroma.runner import stored_runs

GOOD = '{"start": 1}'
HANG = {"SECOND_AWAITS": "asyncio.sleep(60)"}
BUSY = {"SECOND_AWAITS": "asyncio.sleep(2)"}
STARTED = "second                          start"
#: Its second node ends once another process has loaded this file, too, and had time to look at the run.
SHARED = """
    from sums import *
    import sums
    with open("loaded", "a") as file:
        file.write("x")
    async def other_process():
        while pathlib.Path("loaded").read_text() != "xx":
            await asyncio.sleep(0.02)
        await asyncio.sleep(1.5)
    sums.other_process = other_process
"""


@contextlib.contextmanager
def at_work(stroma, env, *words, file="sums.py"):
    """A process in the midst of run x."""
    process = stroma.popen("run", f"{file}:pipeline", GOOD, "--run-id", "x", *words, env=env)
    try:
        wait_for(process, STARTED)
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.slow
def test_a_run_of_somebody_else(stroma, inside, fails):
    """A run that is at work elsewhere is 3, with its holder and ways out; runs and show name it."""
    with at_work(stroma, HANG) as process:
        for words in (
            ["resume", "x", "sums.py:pipeline"],
            ["run", "sums.py:pipeline", GOOD, "--run-id", "x"],
        ):
            done = inside(*words, "-q")
            events = ["run x is already running in process ", f"{process.pid} on ", "lease expires in "]
            fails(done, 3, *events, "resume x sums.py:pipeline --attach", "cancel x", "--take-over")
        other = inside("run", "sums.py:pipeline", '{"start": 2}', "--run-id", "x", "-q")
        fails(other, 3, "with another input")
        listed = inside("runs")
        assert re.search(rf"run by process {process.pid} on .*; last record ", listed.out)
        assert listed.err == ""
        shown = inside("show", "x")
        assert re.search(rf"\nowner +process {process.pid} on .*; last record ", shown.out)
        assert "wait for its result: stroma resume x sums.py:pipeline --attach" in shown.err
        (run,) = json.loads(inside("runs", "--json").out)["runs"]
        assert run["holder"].startswith(f"process {process.pid} on ")
        assert stroma.calls() == ["first", "second"]


@pytest.mark.slow
def test_attach(stroma):
    """--attach waits for the result of whoever has the run, and calls nothing itself."""
    stroma.file("shared.py", SHARED)
    with at_work(stroma, {"SECOND_AWAITS": "other_process()"}, file="shared.py"):
        done = stroma("resume", "x", "shared.py:pipeline", "--attach", "--json")
    data = json.loads(done.out)
    assert (done.code, data["status"], data["final_state"]) == (0, "COMPLETED", {"n": 4})
    assert (data["totals"]["tokens"], data["totals"]["earlier_tokens"]) == (0, 135)
    assert stroma.calls() == ["first", "second", "third"]


@pytest.mark.slow
def test_attach_to_a_run_that_fails(stroma):
    """A run that was waited for and fails is reported with the exception that it had where it was run."""
    stroma.file(
        "shared.py",
        SHARED + "    async def breaks():\n        await other_process()\n"
        "        raise PermissionError('no')\n    sums.breaks = breaks\n",
    )
    with at_work(stroma, {"SECOND_AWAITS": "breaks()"}, file="shared.py"):
        done = stroma("resume", "x", "shared.py:pipeline", "--attach", "--json")
    assert (done.code, json.loads(done.out)["failure"]["exception"]) == (1, "PermissionError")


@pytest.mark.slow
def test_attach_to_a_run_that_comes_to_wait(stroma):
    """A run that was waited for and now waits for a person itself ends with 7, as where it was run."""
    env = {"SECOND": "", "SECOND_AWAITS": "ask_later()"}
    stroma.file("shared.py", SHARED)
    stroma.file(
        "later.py",
        """
        from shared import *
        import sums
        async def ask_later():
            await sums.other_process()
            raise Suspend("well?")
        sums.ask_later = ask_later
        """,
    )
    process = stroma.popen("run", "later.py:pipeline", GOOD, "--run-id", "x", "-q", env=env)
    while stroma.calls() != ["first", "second"]:
        assert process.poll() is None
        time.sleep(0.02)
    done = stroma("resume", "x", "later.py:pipeline", "--attach", "--json")
    process.communicate(timeout=30)
    data = json.loads(done.out)
    assert (process.returncode, done.code, data["failure"]) == (7, 7, None)
    assert [one["reason"] for one in data["suspended"]] == ["well?"]
    assert "approve x later.py:pipeline ANSWER" in done.err


def test_a_run_that_exists(stroma, inside, fails):
    """Where the pipeline's config refuses repeated run ids, a second run is a usage error with ways out."""
    stroma.file(
        "once.py",
        """
        from sums import *
        pipeline = Pipeline("once", [first], config=RunConfig(if_exists="error"))
        """,
    )
    assert inside("run", "once.py:pipeline", GOOD, "--run-id", "x").code == 0
    done = inside("run", "once.py:pipeline", GOOD, "--run-id", "x", "-q")
    fails(done, 2, "run 'x' already exists", "resume it: stroma resume x once.py:pipeline", "--run-id ID")


def _catches(pid: int, number: int) -> bool:
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", pathlib.Path(f"/proc/{pid}/status").read_text(), re.M)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_sigterm_while_it_waits_for_somebody_else(stroma):
    """A process that only waits ends at once; the run is not touched."""
    with at_work(stroma, HANG) as holder:
        process = stroma.popen("resume", "x", "sums.py:pipeline", "--attach")
        while not _catches(process.pid, signal.SIGTERM):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=10)
        assert process.returncode == 130
        assert "stopped by SIGTERM before the run started; no node was called" in err
        assert holder.poll() is None
        assert json.loads(stroma("runs", "--json").out)["runs"][0]["status"] == "RUNNING"


@pytest.mark.slow
def test_take_over(stroma):
    """--take-over takes the run from a silent holder, which then writes no more."""
    with at_work(stroma, BUSY) as holder:
        holder.send_signal(signal.SIGSTOP)
        done = stroma("resume", "x", "sums.py:pipeline", "--take-over", "-q")
        assert (done.code, json.loads(done.out)) == (0, {"n": 4})
        holder.send_signal(signal.SIGCONT)
        out, err = holder.communicate(timeout=30)
        assert (holder.returncode, out) == (3, ""), err
        assert json.loads(stroma("runs", "--json").out)["runs"][0]["status"] == "RESUMED"


def test_what_cannot_be_meant(inside, fails):
    """--attach with --take-over or --from, --fork without --from and --state without --fork are refused."""
    for words, report in {
        ("--attach", "--take-over"): "exclude each other",
        ("--attach", "--from", "first"): "exclude each other",
        ("--fork",): "--fork needs --from",
        ("--from", "first", "--state", "{}"): "--state needs --fork",
    }.items():
        fails(inside("resume", "x", "sums.py:pipeline", *words), 2, report)


@pytest.mark.slow
def test_cancel(stroma, inside, fails):
    """The holder is asked and ends within about a second; a run without one is cancelled at once."""
    fails(inside("cancel", "x"), 4, "no run whose id begins with 'x'")
    with at_work(stroma, HANG) as process:
        done = inside("cancel", "x", "--json")
        request = json.loads(done.out)
        assert (done.code, request["schema"], request["outcome"]) == (0, "stroma.cancel/1", "asked")
        assert request["holder"].startswith(f"process {process.pid} on ")
        _, err = process.communicate(timeout=10)
        assert process.returncode == 130
        assert "stroma: cancelled by another process: run x is CANCELLED" in err
    done = inside("cancel", "x")
    assert (done.code, done.err) == (0, "run x has ended already: it is CANCELLED; nothing was changed\n")
    assert inside("resume", "x", "sums.py:pipeline", env={"SECOND": "raise TimeoutError"}).code == 1
    done = inside("cancel", "last")
    assert (done.code, done.err) == (0, "run x is CANCELLED; it had no owner\n")
    assert json.loads(inside("cancel", "x", "--json").out) == {
        "schema": "stroma.cancel/1",
        "run_id": "x",
        "outcome": "ended",
        "holder": None,
        "status": "CANCELLED",
    }
    assert inside("resume", "x", "sums.py:pipeline").code == 0
    assert "it is RESUMED" in inside("cancel", "x").err


def test_fork(stroma, inside, fails):
    """--fork begins a new run at a node of another one, which stays as it is; show names its parent."""
    inside("run", "sums.py:pipeline", GOOD, "--run-id", "x")
    done = inside("resume", "x", "sums.py:pipeline", "--from", "second", "--fork", "--state", '{"n": 40}')
    assert (done.code, json.loads(done.out)) == (0, {"n": 80})
    new = re.match(r"run (\w{32}) starts at 'second' of x\n", done.err)
    assert stroma.calls() == ["first", "second", "third", "second", "third"]
    shown = inside("show", new[1], "--timing").out
    assert re.search(r"\nparent +x, source of this fork\n", shown)
    assert re.search(r"\n0 +first +1 +forked +[+]0[.]\d{3} s ", shown)  # The time of the fork.
    assert json.loads(inside("show", "x", "--json").out)["run"]["status"] == "COMPLETED"

    plain = json.loads(inside("resume", "x", "sums.py:pipeline", "--from", "second", "--fork", "--json").out)
    assert (plain["final_state"], plain["parent"]) == ({"n": 4}, "x")
    assert plain["run_id"] not in ("x", new[1])
    words = ["resume", "x", "sums.py:pipeline", "--from", "first", "--fork", "-q", "--state"]
    assert json.loads(inside(*words, '{"start": 4}').out) == {"n": 10}
    fails(inside(*words, '{"start": "x"}'), 2, "start: Input should be a valid integer")
    words[4] = "third"
    fails(inside(*words, "{}"), 2, "--state does not fit the output of node 'second'", "n: Field required")


def test_what_cannot_be_forked(stroma, inside, fails, ran):
    """A node without a stored input and an output merged of children are refused; no run is made."""
    ran("x", code=1, SECOND="raise TimeoutError")
    done = inside("resume", "x", "sums.py:pipeline", "--from", "third", "--fork", "-q")
    fails(done, 4, "no output at position 1", "fork at an earlier node, or give the state of that output")
    stroma.file(
        "group.py",
        """
        from sums import *
        pipeline = Pipeline("group", [first, parallel(second), third])
        mapped = Pipeline("mapped", [map_over("items", second, into="items"),
                                    node("count", lambda s: {"n": 1}, Sum)])
        """,
    )
    inside("run", "group.py:pipeline", GOOD, "--run-id", "g")
    words = ["resume", "g", "group.py:pipeline", "--from", "third", "--fork", "-q"]
    fails(inside(*words, "--state", "{}"), 2, "cannot replace the output of 'parallel(second)'")
    assert json.loads(inside(*words).out) == {"n": 4}
    assert len(json.loads(inside("runs", "--json").out)["runs"]) == 3


def test_a_person_gives_the_output_of_a_node_that_failed(stroma, inside, fails, ran):
    """With --state or --output, a fork starts after a node without an output, which is the given one."""
    ran("x", code=1, SECOND="raise TimeoutError")
    before = stroma.calls()
    words = ["resume", "x", "sums.py:pipeline", "--from", "third", "--fork", "-q", "--state", '{"n": 40}']
    assert (json.loads(inside(*words).out), stroma.calls()) == ({"n": 40}, [*before, "third"])
    rows = [line.split()[1:] for line in inside("show", "last").out.splitlines() if " forked " in line]
    given = ["output", "given", "at", "the", "fork"]
    assert rows == [["first", "1", "forked", "0.00", "s"], ["second", "1", "forked", "0.00", "s", *given]]
    words[4], words[-2:] = "second", ["--output", '{"n": 50}']
    assert (json.loads(inside(*words).out), stroma.calls()[-1]) == ({"n": 50}, "third")
    calls = stroma.calls()
    words[1], words[4] = json.loads(inside("show", "last", "--json").out)["run"]["run_id"], "third"
    assert (json.loads(inside(*words).out), stroma.calls()) == ({"n": 50}, calls), (
        "the last node is not called"
    )
    fails(inside(*words, "--state", "{}"), 2, "--state and --output exclude each other")
    fails(inside(*words[:5], *words[6:]), 2, "--output needs --fork")


def test_a_fork_of_a_pipeline_that_begins_with_a_group(stroma, inside):
    """The input is read back as what the run began with, not as what a child takes."""
    stroma.file(
        "group.py",
        """
        from sums import *
        bare = stroma_node("bare", None)(lambda state: {"n": state.n + 1})
        pipeline = Pipeline("mapped", [map_over("items", second, into="items")])
        loose = Pipeline("loose", [first, bare, third])
        """,
    )
    inside("run", "group.py:pipeline", '{"items": [1, 2]}', "--run-id", "m")
    done = inside("resume", "m", "group.py:pipeline", "--from", "map_over(items, second)", "--fork", "-q")
    assert (done.code, json.loads(done.out)["items"]) == (0, [{"n": 2}, {"n": 4}])
    inside("run", "group.py:loose", GOOD, "--run-id", "l")
    words = ["resume", "l", "group.py:loose", "--from", "third", "--fork", "-q", "--state", '{"n": 9}']
    assert json.loads(inside(*words).out) == {"n": 9}


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
    """The command returns, and says that the owner may begin further attempts; `resume` leaves it the run."""
    monkeypatch.setattr(stored_runs, "_OWNER_SECONDS", 0.2)
    with SQLiteStore(stroma.home / "runs.db") as store:
        session = asyncio.run(begin(store, "x"))
        done = inside("pause", "x", "--db", "runs.db")
        assert done.code == 0
        assert "has not read the request, and may begin further attempts" in done.err
        done = inside("resume", "x", "--db", "runs.db")
        assert done.code == 0
        assert re.fullmatch(r"run x is not paused any more: process \d+ on \S+ continues it\n", done.err)
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
