"""`stroma submit` and `stroma drive`: a run that a worker or a scheduler executes."""

import contextlib
import json
import re
import shlex
import signal
import time
import urllib.error
import urllib.parse
import urllib.request
from datetime import datetime, timedelta

import pytest
from tests.cli.conftest import GOOD
from tests.cli.test_worker import FLOW

DB = ("--db", "runs.db")
INPUT = '{"start": 3}'


def test_a_submitted_run_is_driven(stroma, inside, fails, golden):
    """`submit` prints a queued run's id, again for the same input; `drive` executes it and says its end."""
    submit = f"submit sums.py:pipeline '{INPUT}' --run-id r --tag nightly --db runs.db"
    golden("queued", submit, f"{submit} --json", "show r --db runs.db", columns=(120,))
    assert stroma.calls() == []
    drive = "drive r sums.py:pipeline --db runs.db"
    golden("driven", drive, f"{drive} --json", submit, columns=(120,))
    assert stroma.calls() == ["first", "second", "third"]
    assert "r " in inside("runs", "--tag", "nightly", *DB).out
    fails(inside("submit", "sums.py:pipeline", '{"start": 4}', "--run-id", "r", *DB), 2, "another input")
    fails(inside("submit", "sums.py:pipeline", '{"start": "x"}', *DB), 2, "start")
    for command in ("submit", "run"):
        fails(inside(command, "sums.py:pipeline", INPUT, "--tag", "x" * 2000, *DB), 2, "--tag: ")
    assert "x" * 100 not in inside("runs", *DB).out


def test_a_wrong_input_gets_an_example(stroma, inside, fails):
    """Input that does not fit is answered with an argument that fits, which repeats nothing of it."""
    stroma.file(
        "orders.py",
        """
        from pydantic import BaseModel
        from stroma import *

        class Order(BaseModel):
            customer: str
            amount: int = 1

        runner = StromaRunner.quick()

        @runner.flow("order")
        async def order(flow: Flow, state: Order) -> Order:
            return state
        """,
    )
    wrong = '{"custmer": "x", "amount": 2}'
    done = inside("submit", "orders.py:order", wrong, "--priority", "2", *DB)
    fails(done, 2, "INPUT does not fit the input of the flow, 'order'")
    hint = done.err.split("for example: ")[1].strip()
    assert "custmer" not in hint
    assert inside("submit", "orders.py:order", *shlex.split(hint), *DB).code == 0


def test_queued_runs_are_listed(stroma, inside):
    """`runs` finds queued runs by status and says when each is due; JSON has null for an ended run."""
    inside("submit", "sums.py:pipeline", INPUT, "--run-id", "r", "--delay", "2h", *DB)
    inside("submit", "sums.py:pipeline", INPUT, "--run-id", "done", *DB)
    inside("drive", "done", "sums.py:pipeline", *DB)
    assert "due at 20" in inside("runs", "--status", "QUEUED", *DB).out
    runs = {run["run_id"]: run for run in json.loads(inside("runs", "--json", *DB).out)["runs"]}
    assert runs["done"]["due"] is None
    wait = datetime.fromisoformat(runs["r"]["due"]) - datetime.fromisoformat(runs["r"]["started"])
    assert timedelta(hours=1, minutes=59) < wait < timedelta(hours=2, minutes=1)


@pytest.mark.slow
def test_a_page_submits_a_run(stroma, inside):
    """`stroma ui` with pipelines has a form that submits their runs, validated with their first contract. The
    pages of those runs name the pipeline, also where no pipeline was passed."""
    stroma.file("flows.py", FLOW)
    with pages(stroma, "flows.py:ask", "sums.py:pipeline") as url:
        with urllib.request.urlopen(f"{url}submit?pipeline=sums", timeout=30) as answer:
            key = re.findall('name="key" value="([^"]*)"', answer.read().decode())[0]
        with pytest.raises(urllib.error.HTTPError) as refused:
            send(url, key, '{"start": "x"}')
        assert refused.value.code == 422
        assert "start" in refused.value.read().decode()
        assert "queued" in send(url, key, INPUT).lower()
    ((run_id, status),) = [
        (run["run_id"], run["status"]) for run in json.loads(inside("runs", "--json", *DB).out)["runs"]
    ]
    assert status == "QUEUED"
    with pages(stroma) as url, urllib.request.urlopen(f"{url}run?id={run_id}", timeout=30) as answer:
        assert "<code>stroma worker sums.py:pipeline --db runs.db</code>" in answer.read().decode()
    assert inside("drive", run_id, "sums.py:pipeline", *DB).code == 0


@contextlib.contextmanager
def pages(stroma, *target):
    """Serve the pages of the store, and yield their address."""
    process = stroma.popen("ui", *target, *DB, "--port", "0", "--token", "")
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate(timeout=30)


def send(url, key, text):
    """Submit the form, and return the page of the run."""
    data = urllib.parse.urlencode({"key": key, "pipeline": "sums", "input": text}).encode()
    request = urllib.request.Request(f"{url}submit", data, {"Origin": url.rstrip("/")})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def test_a_delayed_run_is_left_alone(stroma, inside, fails):
    """A run not due, of unserved code, or failing is told apart by the exit code of `drive`."""
    stroma.file("flows.py", FLOW)
    inside("submit", "sums.py:pipeline", INPUT, "--run-id", "later", "--delay", "2h", *DB)
    done = inside("drive", "later", "sums.py:pipeline", *DB)
    assert done.code == 7
    assert "is suspended until 20" in done.err
    inside("submit", "sums.py:pipeline", INPUT, "--run-id", "bad", *DB)
    done = inside("drive", "bad", "flows.py:ask", "--json", *DB)
    assert (done.code, json.loads(done.out)["outcome"]) == (3, "blocked")
    done = inside("drive", "bad", "sums.py:pipeline", *DB, env={"SECOND": "raise ValueError('no')"})
    assert done.code == 1
    assert "run bad has ended: PARTIAL" in done.err
    fails(inside("drive", "unknown", "sums.py:pipeline", *DB), 4, "unknown")
    fails(inside("submit", "sums.py:pipeline", INPUT, "--db", "memory://"), 2, "not durable")


def test_a_question(stroma, inside):
    """`drive` names the open questions of a suspended run."""
    stroma.file("flows.py", FLOW)
    inside("submit", "flows.py:ask", "{}", "--run-id", "q", *DB)
    done = inside("drive", "q", "flows.py:ask", "--json", *DB)
    data = json.loads(done.out)
    assert (done.code, data["outcome"], data["until"]) == (7, "suspended", None)
    assert data["questions"] == ["Go on?"]


@pytest.mark.slow
def test_a_signal_yields(stroma):
    """SIGTERM ends a driven run at the next step boundary with exit code 130; another call completes it."""
    stroma("submit", "sums.py:pipeline", INPUT, "--run-id", "r", *DB)
    env = {"SECOND_AWAITS": "asyncio.sleep(1)"}
    with stroma.popen("drive", "r", "sums.py:pipeline", *DB, env=env) as process:
        while "second" not in stroma.calls():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "was interrupted at a step boundary" in err
    assert stroma("drive", "r", "sums.py:pipeline", *DB).code == 0
    assert stroma.calls() == ["first", "second", "third"]


@pytest.mark.parametrize(("store", "warned"), [("own.db", True), ("here.db", False), ("memory://", False)])
def test_another_store_in_the_file_is_named(stroma, inside, store, warned):
    """A command warns if the runner in FILE has another durable store, but not with -q."""
    stroma.file(
        "own.py",
        f"""
        from sums import *
        runner = StromaRunner.quick(store={store!r})
        pipeline = Pipeline("sums", [first, second, third])
        """,
    )
    for command in (["run", "-q"], ["run"], ["submit"]):
        done = inside(command[0], "own.py:pipeline", GOOD, *command[1:], "--db", "here.db")
        assert done.code == 0
        text = f"warning: 'runner' in own.py has the store sqlite:{stroma.home / 'own.db'}, and this command"
        assert (text in " ".join(done.err.split())) == (warned and "-q" not in command), done


@pytest.mark.parametrize(
    "words", [["approve", "x", "own.py:pipeline", "{}"], ["resume", "x", "own.py:pipeline"]]
)
def test_a_run_that_another_store_may_have(stroma, inside, words):
    """A command that does not find its run names the store of the runner in FILE first."""
    stroma.file(
        "own.py",
        """
        from sums import *
        runner = StromaRunner.quick(store="own.db")
        pipeline = Pipeline("sums", [first, second, third])
        """,
    )
    assert inside("run", "sums.py:pipeline", GOOD, "--run-id", "y", "-q", "--db", "here.db").code == 0
    done = inside(*words, "--db", "here.db")
    assert (done.code, "no run whose id begins with 'x' in here.db" in done.err) == (4, True)
    assert f"'runner' in own.py has the store sqlite:{stroma.home / 'own.db'}," in " ".join(done.err.split())


def test_the_default_store_beside_that_of_the_file_is_refused(stroma, inside, fails):
    """Without --db and STROMA_DB, `submit` and `worker` refuse FILE whose runner has a store: the run would
    be in one store and the worker at another. The message has the option for that store."""
    stroma.file(
        "own.py",
        """
        from sums import *
        runner = StromaRunner.quick(store="own.db")
        pipeline = Pipeline("sums", [first, second, third])
        """,
    )
    own = str(stroma.home / "own.db")
    for words in (["submit", "own.py:pipeline", GOOD], ["worker", "own.py:pipeline"]):
        done = inside(*words)
        fails(done, 2, "'runner' in own.py has the store sqlite:", "runs.db by default")
        assert shlex.split(done.err.split("pass the store: ")[1]) == ["--db", own]
    assert inside("submit", "own.py:pipeline", GOOD, env={"STROMA_DB": own}).code == 0
    assert inside("run", "own.py:pipeline", GOOD, "-q").code == 0
