"""`stroma runs`, `stroma show`, and the command as a whole."""

import asyncio
import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import time

import pytest
from tests.store_suite.journal import State, begin, commit, finish

from stroma import SQLiteStore
from stroma._utils.text import clean, format_duration
from stroma.checkpoint.history import History
from stroma.cli import formatting
from stroma.trace.redaction import HIDDEN

GOOD = '{"start": 1}'


@pytest.fixture
def filled(stroma, inside):
    """A store with a finished run, a failed one and one whose process was killed."""
    done = inside("run", "sums.py:pipeline", GOOD, "--run-id", "run-a")
    failed = inside(
        "run",
        "sums.py:pipeline",
        GOOD,
        "--run-id",
        "run-b",
        env={
            "SECOND": "current_node().report_usage(input_tokens=7, model='gpt-4o-mini'); raise "
            "TimeoutError('too slow')"
        },
    )
    killed = stroma(
        "run",
        "sums.py:pipeline",
        GOOD,
        "--run-id",
        "other",
        env={"SECOND": "os.kill(os.getpid(), signal.SIGKILL)"},
    )
    assert (done.code, failed.code, killed.code) == (0, 1, -9)
    return stroma


@pytest.mark.slow
def test_runs(filled, inside):
    """The newest run is first; each line has status, nodes, tokens, the cost to the micro-dollar, and the
    error."""
    done = inside("runs")
    assert (done.code, done.err) == (0, "resume a run without owner: stroma resume RUN FILE.py:NAME\n")
    lines = [re.split(r"  +", line) for line in done.out.splitlines()]
    assert lines[0] == [
        "RUN",
        "PIPELINE",
        "STATUS",
        "NODES",
        "TOKENS",
        "COST",
        "STARTED",
        "DURATION",
        "MESSAGE",
    ]
    assert [line[:5] for line in lines[1:]] == [
        ["other", "sums", "INTERRUPTED", "1", "120"],
        ["run-b", "sums", "PARTIAL", "1", "134"],
        ["run-a", "sums", "COMPLETED", "3", "135"],
    ]
    assert all(re.fullmatch(r"\$\d\.\d{6}", line[5]) for line in lines[1:])
    assert lines[1][8].startswith("owner lost; last record ")
    assert lines[2][8] == "TimeoutError: too slow"

    only = json.loads(inside("runs", "--json", "--status", "partial").out)
    assert only["schema"] == "stroma.runs/1"
    (run,) = only["runs"]
    assert run["run_id"] == "run-b"
    assert set(run) == {
        "run_id",
        "pipeline",
        "status",
        "execution",
        "started",
        "updated",
        "due",
        "seconds",
        "nodes",
        "tokens",
        "cost_usd",
        "error",
        "holder",
        "parent",
        "tags",
        "version",
        "blocked",
        "cause",
    }
    assert [r["run_id"] for r in json.loads(inside("runs", "--json", "--limit", "2").out)["runs"]] == [
        "other",
        "run-b",
    ]
    assert "no run matches" in inside("runs", "--pipeline", "nobody").err

    # The killed one can be finished.
    assert inside("resume", "other", "sums.py:pipeline").code == 0
    assert filled.calls()[-3:] == ["second", "second", "third"]


def test_blocked_runs(tmp_path, inside):
    """`runs --blocked` lists the runs that code could not continue; `show` and JSON have the message, since
    when, and the code."""

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
    assert re.search(r"^blocked +since (60 m .*|1 h) ago: the flow makes step 'audit'$", shown, re.MULTILINE)
    with SQLiteStore(db[1]) as store:  # The message may have the input of any call.
        assert History(store, dict).run("held").blocked.message == HIDDEN


def test_runs_say_who_is_at_work(tmp_path, inside, monkeypatch):
    """Of a run in progress, `runs` names the process and host that runs it, for how long, and when it
    recorded something last."""

    with SQLiteStore(tmp_path / "stroma.db") as store, asyncio.Runner() as loop:

        async def work():
            session = await begin(store, "busy")
            await commit(session, 0, State(n=1), "n")
            return session

        session = loop.run(work())  # A session that nothing refers to any more is closed.
        started = store.get_run("busy").started_ms
        monkeypatch.setattr("stroma.cli.commands.runs.time.time", lambda: started / 1000 + 12)
        done = inside("runs", "--db", "stroma.db")
        loop.run(finish(session))
    assert done.code == 0
    line = re.split(r"  +", done.out.splitlines()[1])
    assert line[:4] == ["busy", "pipeline", "RUNNING", "1"]
    assert line[7] == "12.0 s"
    assert re.fullmatch(rf"run by process {os.getpid()} on \S+ for 12\.0 s; last record .*", line[8])


@pytest.mark.slow
def test_show(filled, inside, fails):
    """Each attempt has a line, what came to nothing is summed apart, and a run is named by a unique
    beginning."""
    done = inside("show", "run-b")
    assert done.code == 0
    assert re.search(
        r"\nstatus +PARTIAL\n(.*\n)*spent +134 tok, \$0\.0000\d\d\nwasted +14 tok, \$0\.00000\d ", done.out
    )
    assert re.search(r"\n0 +first +1 +success +\d\.\d\d s +120 +\$0\.0000\d\d +gpt-4o-mini\n", done.out)
    assert (
        len(
            re.findall(
                r"\n1 +second +[12] +failure +RECOVERABLE +timeout .* TimeoutError: too slow", done.out
            )
        )
        == 2
    )
    assert "resume with: stroma resume run-b FILE.py:NAME" in done.err

    data = json.loads(inside("show", "run-b", "--json").out)
    assert (data["schema"], data["wasted_tokens"], data["run"]["run_id"]) == ("stroma.show/1", 14, "run-b")
    assert [(a["node_id"], a["attempt"], a["outcome"], a["committed"]) for a in data["attempts"]] == [
        ("first", 1, "success", True),
        ("second", 1, "failure", False),
        ("second", 2, "failure", False),
    ]

    assert inside("show", "last").out.startswith("run       other\n")
    assert "owner     lost; last record " in inside("show", "oth").out
    fails(inside("show", "run-"), 2, "is a prefix of 2 run ids", "run-a", "run-b")
    fails(inside("show", "nope"), 4, "no run whose id begins with 'nope'", "stroma runs")


def test_a_cost_without_tokens(stroma, inside):
    """An attempt that is priced per call has its cost in its progress, in its row and its fold, and in its
    line of tail."""
    stroma.file(
        "images.py",
        """
        from pydantic import BaseModel
        from stroma import Flow, NodeContract, Pipeline, Usage, stroma_flow, stroma_node

        class Prompt(BaseModel):
            text: str

        @stroma_node("draw", NodeContract(node_id="draw", input_schema=Prompt, output_schema=Prompt))
        async def draw(prompt):
            if prompt.text == "bad":
                raise ValueError("no image")
            return prompt, Usage(model="dall-e-3", cost_usd=0.04)

        @stroma_flow("draws", input=Prompt, output=Prompt)
        async def draws(flow: Flow, prompt: Prompt) -> Prompt:
            for _ in range(20):
                await flow.step(draw, prompt)
            return prompt

        one, many = Pipeline("one", [draw]), Pipeline("many", [draws])
    """,
    )
    done = inside("run", "images.py:one", '{"text": "a cat"}', "--run-id", "one")
    assert re.search(r"draw +ok +\d\.\d\d s, 0 tok, \$0\.040000, dall-e-3\n", done.err), done
    assert re.search(r"\n0 +draw +1 +success .* s +\$0\.040000 +dall-e-3\n", inside("show", "one").out)
    assert re.search(r"draw  #1  success .* s  0 tok, \$0\.040000\n", inside("tail", "one").out)
    assert inside("run", "images.py:many", '{"text": "a cat"}', "--run-id", "many", "-q").code == 0
    shown = inside("show", "many").out
    assert re.search(r" s +\$0\.800000 +20 calls: 20 ok", shown), shown


def test_an_empty_store(stroma, inside, fails):
    """Before the first run the list is empty and says how to begin; a store that was named must be there."""
    done = inside("runs")
    assert (done.code, done.out) == (0, "")
    assert "begin one: stroma run FILE.py:NAME" in done.err
    assert "for another store, pass --db PATH_OR_URL or set STROMA_DB" in done.err
    assert json.loads(inside("runs", "--json").out) == {"schema": "stroma.runs/1", "runs": []}
    fails(inside("show", "last"), 4, "no runs in ", "pass --db PATH_OR_URL")
    fails(inside("runs", "--db", "no.db"), 4, "store no.db does not exist")
    assert not list(stroma.home.rglob("*.db"))


@pytest.mark.slow
def test_a_reader_that_goes_away(filled):
    """`stroma runs | head -1` ends quietly, whenever the reader leaves."""
    for words_ in (
        ["runs", "--status", "completed"],
        ["show", "run-a"],
        ["--help"],
        ["run", "sums.py:pipeline", GOOD, "-q", "--json"],
    ):
        process = filled.popen(*words_)
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert err.replace("printed by a node\n", "") == ""
        assert process.wait(30) in (0, 1 if words_ == ["--help"] else 0)
    process = filled.popen("run", "sums.py:pipeline", GOOD)
    process.stderr.close()
    assert json.loads(process.stdout.read()) == {"n": 4}
    process.stdout.close()
    assert process.wait(30) == 0


@pytest.mark.slow
def test_output_that_cannot_be_written(stroma, fails):
    """A full disk under the output is one message, and the run is kept."""
    with open("/dev/full", "w") as full:
        done = stroma("run", "sums.py:pipeline", GOOD, "-q", stdout=full)
    done.out, done.err = "", done.err.replace("printed by a node\n", "")
    fails(done, 3, "cannot write the output", "No space left")
    assert json.loads(stroma("runs", "--json").out)["runs"][0]["status"] == "COMPLETED"


@pytest.mark.slow
def test_start_is_light(stroma):
    """--version and --help import neither pydantic nor rich nor asyncio; reading off a terminal does without
    rich."""
    for words_ in (["--version"], ["--help"]):
        code = (
            f"import sys; from stroma.cli import main; main({words_!r}); print(sorted(sys.modules), "
            f"file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=stroma.home, capture_output=True, text=True, check=True
        )
        assert not set(eval(done.stderr)) & {"pydantic", "rich", "asyncio", "stroma.runner"}
    code = "import sys; from stroma.cli import main; main(['runs']); print('rich' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=stroma.home,
        env=stroma.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def test_version_and_help(stroma, inside):
    """The version is one line, and the help of all and of each command tells the exit codes and the
    options."""
    assert re.fullmatch(r"stroma \d+\.\d+\.\S+\n", inside("--version").out)
    assert "5\n  stopped by the budget" in inside("-h").out or "5 stopped by the budget" in inside("-h").out
    assert "7 suspended" in " ".join(inside("-h").out.split())
    for command in ("run", "resume", "approve", "cancel", "runs", "show"):
        assert "STROMA_DB" in inside(command, "--help").out


@pytest.mark.slow
def test_without_click(stroma):
    """Installed without its extra, the command says what to install."""
    code = "import sys; sys.modules['click'] = None; from stroma.cli import main; sys.exit(main(['runs']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("stroma: the command line needs click; install it with: ")


@pytest.mark.slow
def test_the_demo_without_its_extra(stroma):
    """The demo says which extra it lacks."""
    code = "import sys; sys.modules['openai'] = None; from stroma.cli import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "pip install 'stroma-runner[demo]'" in done.stderr


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


def test_clean_text():
    """Foreign text is one line of bounded length that cannot steer a terminal."""
    assert clean("a\n\tb\x1b[2J\x00\u202e") == "a b\\x1b[2J\\x00\\u202e"
    assert clean("x" * 1_000_000, 10) == "xxxxxxxxx…"
    assert formatting.format_local_time(10**18) == "?"
    assert formatting.format_local_time(int(time.time() * 1000)).count(":") == 2


@pytest.mark.slow
def test_a_damaged_output_hides_nothing_else(filled, inside):
    """What is damaged is named, with 3; the rest of the run is shown all the same."""
    path = filled.home / ".local/share/stroma/runs.db"
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
@pytest.mark.parametrize(
    ("words", "never"),
    [
        (["--version"], ["pydantic", "sqlite3", "rich", "asyncio", "stroma.checkpoint"]),
        (
            ["runs", "--failed", "--since", "1h"],
            [
                "rich",
                "starlette",
                "uvicorn",
                "jinja2",
                "psycopg",
                "redis",
                "genai_prices",
                "openai",
                "stroma.runner",
                "stroma.engine.loop",
                "stroma.cli.commands.run",
                "stroma.telemetry",
                "stroma.ui",
            ],
        ),
        (["show", "run-a"], ["rich", "starlette", "psycopg", "redis", "genai_prices"]),
    ],
)
def test_what_commands_do_not_load(filled, words, never):
    """Commands that one calls often load little: what takes long to import, or is another command's, stays
    away."""
    code = (
        "import sys\nfrom stroma.cli import main\n"
        f"assert main({words!r}) == 0\nprint(*(m for m in {never!r} if m in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=filled.home,
        env=filled.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, ""), done


def test_every_view_names_the_type(any_url, stroma, inside, monkeypatch):
    """`show`, `runs`, `tail` and exports of every store show a failure as `Type: message`; --json has both
    apart."""
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
    assert inside("run", "dates.py:pipeline", '{"start": 1}', "--run-id", "x", "-q").code == 1
    shown = inside("show", "x").out
    assert "BadDate: bad date" in shown
    assert "ConnectionResetError" in inside("runs").out
    assert "ConnectionResetError: ConnectionResetError" not in shown
    assert "BadDate: bad date" in inside("tail", "x").out
    for kind in ("otlp", "html"):
        assert "BadDate: bad date" in inside("export", "x", "--format", kind).out, kind
    report = json.loads(inside("show", "x", "--json").out)
    first = report["attempts"][0]
    assert (first["error_type"].rpartition(".")[2], first["message"]) == ("BadDate", "bad date")
    assert report["run"]["cause"]["error_type"] == "ConnectionResetError"
