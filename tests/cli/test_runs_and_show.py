"""The command as a whole: its start, imports, pipes and help; runs in progress, blocked and damaged ones."""

import asyncio
import contextlib
import json
import os
import re
import sqlite3
import time

import pytest
from tests.cli.conftest import GOOD
from tests.cli.test_signals import wait_for
from tests.kit import NEVER, Num
from tests.store_suite.journal import State, begin, commit, finish

from stroma import SQLiteStore, StromaRunner
from stroma._utils.text import clean, format_duration
from stroma.cli import formatting
from stroma.cli.loading import note_target

MAIN = "import sys; from stroma.cli import main; "


@pytest.mark.parametrize(
    ("target", "offered"),
    [
        ("jobs/mail.py:inbox", "jobs/mail.py:inbox"),
        ("package.mail:inbox", "package.mail:inbox"),
        ("x.py:p; rm -rf .", "FILE.py:NAME"),
        ("--db=x:p", "FILE.py:NAME"),
        ("x.py:p\n", "FILE.py:NAME"),
    ],
)
def test_a_hint_offers_what_named_the_pipeline_last(target, offered, tmp_path, inside):
    """FILE:NAME of a run is remembered as text: a hint offers it if it can be pasted, and imports nothing."""

    async def write():
        runner = StromaRunner.quick(store=tmp_path / "runs.db", hooks=note_target(target), policy_map=NEVER)

        @runner.node
        async def fail(state: Num) -> Num:
            raise ValueError("no")

        await runner.run([fail], Num(), run_id="r")
        await runner.checkpoint_manager.store.aclose()

    asyncio.run(write())
    done = inside("show", "r", "--db", str(tmp_path / "runs.db"))
    assert f"resume with: stroma resume r {offered} --db" in done.err, done


STATES = """
from stroma import Pipeline, stroma_node
from tests.store_suite.journal import State

@stroma_node
def n(state: State) -> State:
    return state

pipeline = Pipeline("states", [n])
"""


def test_blocked_runs(tmp_path, stroma, inside):
    """`runs --blocked` lists the runs that code could not continue, with the message and the code.

    `resume --dry-run` says if that is the code at hand.
    """

    stroma.file("states.py", STATES)

    async def write(store):
        for run_id in ("held", "free"):
            session = await begin(store, run_id, version="1")
            await finish(session, "INTERRUPTED")
        since = time.time_ns() // 1_000_000 - 3_600_000
        await store.block("held", "the flow makes step 'audit'", "2+abc", None, since)

    db = "--db", str(tmp_path / "stroma.db")
    with SQLiteStore(db[1]) as store:
        asyncio.run(write(store))
    (run,) = json.loads(inside("runs", "--blocked", "--json", *db).out)["runs"]
    mark = run["blocked"]
    assert (run["run_id"], run["status"], run["version"]) == ("held", "INTERRUPTED", "1")
    assert (mark["message"], mark["version"], mark["code"]) == ("the flow makes step 'audit'", "1", "2+abc")
    assert mark["since"].endswith("+00:00")
    listed = inside("runs", "--blocked", *db).out
    assert "blocked for 60 m" in listed
    assert "free" not in listed
    shown = inside("show", "held", *db).out
    assert re.search(r"^version +1$", shown, re.MULTILINE)
    assert re.search(
        r"^blocked +since [\d :-]{19}; code 2\+abc could not continue it: the flow makes step 'audit'$",
        shown,
        re.MULTILINE,
    )
    next_steps = inside("show", "held", *db).err
    assert "deploy code that fits, then a worker of its pipeline continues the run; or" in next_steps
    planned = inside("resume", "held", "states.py:pipeline", "--dry-run", *db).err
    blocked = "could not continue it: the flow makes step 'audit'"
    text = rf"^blocked: code 2\+abc {blocked}; this is code (\w+), which fits$"
    this = re.search(text, planned, re.MULTILINE)
    assert this is not None, planned
    with SQLiteStore(db[1]) as store:
        asyncio.run(
            store.block("held", "the flow makes step 'audit'", this[1], None, time.time_ns() // 1_000_000)
        )
    planned = inside("resume", "held", "states.py:pipeline", "--dry-run", *db).err
    assert f"blocked: this code ({this[1]}) {blocked}\n" in planned


def test_runs_name_the_owner(tmp_path, inside, monkeypatch):
    """`runs` names the process and host of a run in progress, for how long it runs, and its last record."""
    with SQLiteStore(tmp_path / "stroma.db") as store, asyncio.Runner() as loop:

        async def work():
            session = await begin(store, "busy")
            await commit(session, 0, State(n=1), "n")
            return session

        session = loop.run(work())  # A session that nothing refers to any more is closed.
        started = store.get_run("busy").started_ms
        monkeypatch.setattr("stroma.checkpoint.history.facts.time.time", lambda: started / 1000 + 12)
        done = inside("runs", "--db", "stroma.db")
        shown = inside("show", "busy", "--db", "stroma.db")
        loop.run(finish(session))
    assert done.code == 0
    line = re.split(r"  +", done.out.splitlines()[1])
    assert line[:4] == ["busy", "pipeline", "RUNNING", "1"]
    assert line[7] == "12.0 s"
    assert "duration  12.0 s\n" in shown.out
    assert re.fullmatch(rf"run by process {os.getpid()} on \S+; last record .*", line[8])


def test_runs_are_named_by_a_unique_prefix(ran, inside, fails):
    """A run is named by its id, a unique prefix of it, or "last"; an ambiguous prefix lists the runs."""
    for run_id in ("run-a", "run-b", "other"):
        ran(run_id)
    assert inside("show", "last").out.startswith("run       other\n")
    assert inside("show", "oth").out.startswith("run       other\n")
    fails(inside("show", "run-"), 2, "is a prefix of 2 run ids", "run-a", "run-b")
    fails(inside("show", "nope"), 4, "no run whose id begins with 'nope'", "stroma runs")
    done = inside("runs", "--search", "a\udcff")
    fails(done, 2, "argument 'a\\udcff' is not UTF-8 text; pass it in UTF-8")
    assert "COMPLETED" in inside("runs", "--limit", str(10**23)).out


def test_an_empty_store(stroma, inside, fails):
    """Before the first run the list is empty and says how to begin; a store that was named must exist."""
    done = inside("runs")
    assert (done.code, done.out) == (0, "")
    assert "begin one: stroma run FILE.py:NAME" in done.err
    assert "for another store, pass --db PATH_OR_URL or set STROMA_DB" in done.err
    totals = {"runs": 0, "statuses": {}, "causes": []}
    assert json.loads(inside("runs", "--json").out) == {
        "schema": "stroma.runs/1",
        "runs": [],
        "totals": totals,
    }
    fails(inside("show", "last"), 4, "no runs in ", "pass --db PATH_OR_URL")
    fails(inside("runs", "--db", "no.db"), 4, "store no.db does not exist")
    assert not list(stroma.home.rglob("*.db"))


@pytest.mark.slow
def test_a_reader_that_goes_away(stroma, ran):
    """`stroma runs | head -1` ends quietly, whenever the reader leaves."""
    ran("run-a")
    for words in (
        ["runs", "--status", "completed"],
        ["show", "run-a"],
        ["run", "sums.py:pipeline", GOOD, "-q", "--json"],
    ):
        process = stroma.popen(*words)
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert err.replace("printed by a node\n", "") == ""
        assert process.wait(30) == 0
    process = stroma.popen("run", "sums.py:pipeline", GOOD)
    process.stderr.close()
    assert json.loads(process.stdout.read()) == {"n": 4}
    process.stdout.close()
    assert process.wait(30) == 0


@pytest.mark.slow
def test_output_that_cannot_be_written(stroma, inside, fails):
    """A full disk under the output is one message, and the run is stored."""
    with open("/dev/full", "w") as full:
        done = stroma("run", "sums.py:pipeline", GOOD, "-q", stdout=full)
    done.out, done.err = "", done.err.replace("printed by a node\n", "")
    fails(done, 3, "cannot write the output", "No space left")
    assert json.loads(inside("runs", "--json").out)["runs"][0]["status"] == "COMPLETED"


def test_version_and_help(inside):
    """The version is one line, and the help has the exit codes and the options."""
    assert re.fullmatch(r"stroma \d+\.\d+\.\S+\n", inside("--version").out)
    text = " ".join(inside("-h").out.split())
    assert "5 stopped by the budget" in text
    assert "7 suspended" in text
    for command in ("run", "resume", "approve", "cancel", "runs", "show"):
        assert "STROMA_DB" in inside(command, "--help").out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "command", "words"),
    [
        ("click", "runs", "stroma: the command line needs click; install it with: "),
        ("openai", "demo", "pip install 'stroma-runner[demo]'"),
    ],
)
def test_a_missing_extra(stroma, missing, command, words):
    """Without the packages of its extra a command says what to install."""
    done = stroma.python(f"import sys; sys.modules[{missing!r}] = None; {MAIN}sys.exit(main([{command!r}]))")
    assert done.code == 3
    assert words in done.err


@pytest.mark.slow
def test_an_interrupt_while_the_command_is_imported(stroma):
    """Ctrl-C ends a command without a traceback from its first import on."""
    stroma.file("click.py", "raise KeyboardInterrupt")
    done = stroma.python(f"import sys; {MAIN}sys.exit(main(['runs']))")
    assert (done.code, done.out, done.err) == (130, "", "stroma: stopped\n")


def test_a_damaged_output_hides_nothing_else(stroma, ran, inside):
    """What is damaged is named, with 3; the rest of the run is shown all the same."""
    ran("run-a")
    path = stroma.home / ".local/share/stroma/runs.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE steps SET output = x'00' WHERE node_id = 'first'")
    done = inside("show", "run-a")
    assert done.code == 3
    assert re.search(r"status +COMPLETED\n(.*\n)*spent +135 tok", done.out)
    assert re.search(r"first +1 +success, damaged", done.out)
    assert "the output of node 'first' at 0 is damaged; resume from there" in done.err
    data = json.loads(inside("show", "run-a", "--json").out)
    assert data["run"]["tokens"] == 135
    assert [attempt["damaged"] for attempt in data["attempts"]] == [True, False, False]


@pytest.mark.slow
def test_what_commands_do_not_load(stroma, ran):
    """Commands that are called often do not import what takes long, or is another command's."""
    ran("run-a")
    slow = ["rich", "starlette", "uvicorn", "jinja2", "psycopg", "redis", "genai_prices", "openai"]
    own = ["runner.runner", "engine.loop", "cli.commands.run", "telemetry", "ui"]
    own = [f"stroma.{name}" for name in own]
    checks = (
        (["--version"], ["pydantic", "sqlite3", "rich", "asyncio", "stroma.checkpoint", *own]),
        (["--help"], ["pydantic", "rich", "asyncio", "stroma.runner.runner"]),
        (["runs", "--failed", "--since", "1h"], [*slow, *own]),
        (["show", "run-a"], slow),
    )
    # In one process: each command loads no less than the one before.
    code = f"{MAIN}\nfor words, never in {checks!r}:\n    assert main(words) == 0\n"
    done = stroma.python(f"{code}    print('loaded', *(m for m in never if m in sys.modules))")
    loaded = [line for line in done.out.splitlines() if line.startswith("loaded")]
    assert (done.code, loaded) == (0, ["loaded"] * 4), done


def test_every_view_names_the_type(any_url, stroma, ran, inside, monkeypatch):
    """All commands show a failure as `Type: message` on every store; --json has both apart."""
    monkeypatch.setenv("STROMA_DB", any_url)
    stroma.file(
        "dates.py",
        """
        from sums import *
        class BadDate(ValueError):
            pass
        async def parse(state):
            if current_node().attempt == 1:
                raise BadDate("bad date")
            raise ConnectionResetError("")
        once = {c: FailurePolicy(max_retries=1, backoff_seconds=0) for c in ("RECOVERABLE", "AMBIGUOUS")}
        pipeline = Pipeline("dates", [node("parse", parse, Count)], config=RunConfig(policy_map=once))
        """,
    )
    ran("x", target="dates.py:pipeline", code=1)
    shown = inside("show", "x").out
    assert "BadDate: bad date" in shown
    assert "ConnectionResetError" in inside("runs").out
    assert "ConnectionResetError: ConnectionResetError" not in shown
    for line in ("tail x", "export x --format html"):
        assert "BadDate: bad date" in inside(*line.split()).out, line
    report = json.loads(inside("show", "x", "--json").out)
    first = report["attempts"][0]
    assert (first["error_type"].rpartition(".")[2], first["message"]) == ("BadDate", "bad date")
    assert report["run"]["cause"]["error_type"] == "ConnectionResetError"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sums.py:pipeline", "seen.py:pipeline"])
def test_a_node_in_flight_is_shown(stroma, inside, target):
    """show names the next node of a list, and with stored events the nodes that have started."""
    stroma.file(
        "seen.py",
        """
        from sums import *
        pipeline = Pipeline("seen", [first, second, third], config=RunConfig(events="store"))
        """,
    )
    env = {"SECOND_AWAITS": "asyncio.sleep(60)"}
    process = stroma.popen("run", target, '{"start": 1}', "--run-id", "x", env=env)
    wait_for(process, "second                          start")
    try:
        expected = r"in flight second \(at 1\): attempt 1\n"
        if target == "sums.py:pipeline":
            expected = r"in flight next node \(at 1\), since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n"
        deadline = time.monotonic() + 10  # Events are written in the background.
        while not re.search(expected, shown := inside("show", "x").out):
            assert time.monotonic() < deadline, shown
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    assert "in flight" not in inside("show", "x").out


def test_diff_shows_long_texts_from_where_they_differ(stroma, ran, inside):
    """Two texts with a long common beginning are shown from shortly before their first difference."""
    stroma.file(
        "echo.py",
        """
        from sums import *
        class Text(BaseModel):
            text: str
        async def echo(state):
            return state
        pipeline = Pipeline("echo", [node("echo", echo, Text, Text)])
        """,
    )
    for name in ("old", "new"):
        ran(name, target="echo.py:pipeline", given=json.dumps({"text": "x" * 500 + name}))
    shown = inside("diff", "old", "new").out
    assert f'~ text: …{"x" * 40}old" -> …{"x" * 40}new"' in " ".join(shown.split())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (-1, "0.00 s"),
        (9.999, "10.0 s"),
        (99.99, "1 m 40 s"),
        (3600, "60 m 00 s"),
        (7200, "2 h 00 m"),
        (200_000, "2 d 7 h"),
    ],
)
def test_spans(seconds, text):
    """A duration is shown in at most two units."""
    assert format_duration(seconds) == text


def test_a_dry_run_counts_the_time_of_calls_once(tmp_path, stroma, inside):
    """The calls of a flow in progress save their time; that of a group includes its children's."""
    stroma.file("states.py", STATES)

    async def write(store):
        session = await begin(store, "r")
        for branch, ms in (("step#0", 250), ("group#1.0", 400), ("group#1", 500)):
            await commit(session, 0, State(), branch=branch, ms=ms)
        await finish(session, "INTERRUPTED")

    with SQLiteStore(tmp_path / "stroma.db") as store:
        asyncio.run(write(store))
    words = ("resume", "r", "states.py:pipeline", "--dry-run", "--json")
    planned = inside(*words, "--db", str(tmp_path / "stroma.db"))
    assert json.loads(planned.out)["saves"]["seconds"] == 0.75


def test_clean_text():
    """Foreign text is one line of bounded length that cannot steer a terminal."""
    assert clean("a\n\tb\x1b[2J\x00\u202e") == "a b\\x1b[2J\\x00\\u202e"
    assert clean("x" * 1_000_000, 10) == "xxxxxxxxx…"
    assert formatting.format_local_time(10**18) == "?"
    assert formatting.format_local_time(int(time.time() * 1000)).count(":") == 2
