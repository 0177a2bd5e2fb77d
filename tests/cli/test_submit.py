"""`stroma submit` and `stroma drive`: a run that a worker or a scheduler executes."""

import json
import re
import signal
import time
import urllib.error
import urllib.parse
import urllib.request
from datetime import datetime, timedelta

import pytest
from tests.cli.test_worker import FLOW

DB = ("--db", "runs.db")
INPUT = '{"start": 3}'


def test_a_submitted_run_is_driven(stroma, inside):
    """`submit` prints the id of a queued run; `drive` executes it, and says how it ended, each time it is
    called."""
    done = inside("submit", "sums.py:pipeline", INPUT, "--run-id", "r", "--tag", "nightly", *DB)
    assert (done.code, done.out) == (0, "r\n")
    assert "queued for a worker: stroma worker sums.py:pipeline --db runs.db" in done.err
    shown = inside("show", "r", *DB)
    assert "status    QUEUED" in shown.out
    assert "stroma worker FILE.py:NAME --db runs.db" in shown.err
    assert stroma.calls() == []
    for calls in (["first", "second", "third"],) * 2:
        done = inside("drive", "r", "sums.py:pipeline", "--json", *DB)
        assert (done.code, json.loads(done.out)) == (
            0,
            {"schema": "stroma.drive/1", "run_id": "r", "outcome": "ended", "status": "COMPLETED"},
        )
        assert "run r has ended: COMPLETED" in done.err
        assert stroma.calls() == calls
    assert "r " in inside("runs", "--tag", "nightly", *DB).out


def test_submitting_again(stroma, inside, fails):
    """The same submission is the same run; another input is refused with exit code 2."""
    words = ("submit", "sums.py:pipeline", INPUT, "--run-id", "r", *DB)
    inside(*words)
    done = inside(*words, "--json")
    assert json.loads(done.out) == {
        "schema": "stroma.submit/1",
        "run_id": "r",
        "pipeline": "sums",
        "status": "QUEUED",
    }
    inside("drive", "r", "sums.py:pipeline", *DB)
    done = inside(*words)
    assert (done.code, done.out) == (0, "r\n")
    assert "the run exists already, its status is COMPLETED: stroma show r" in done.err
    fails(inside("submit", "sums.py:pipeline", '{"start": 4}', "--run-id", "r", *DB), 2, "another input")
    fails(inside("submit", "sums.py:pipeline", '{"start": "x"}', *DB), 2, "start")


def test_queued_runs_are_listed(stroma, inside):
    """`runs` finds queued runs by their status, and says when each is due; so does its JSON, and null for a
    run that has ended."""
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
    """`stroma ui` with a pipeline has a form that submits its runs, validated with its first contract."""
    process = stroma.popen("ui", "sums.py:pipeline", *DB, "--port", "0", "--token", "")
    try:
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}submit", timeout=30) as answer:
            key = re.findall('name="key" value="([^"]*)"', answer.read().decode())[0]
        with pytest.raises(urllib.error.HTTPError) as refused:
            send(url, key, '{"start": "x"}')
        assert refused.value.code == 422
        assert "start" in refused.value.read().decode()
        assert "queued" in send(url, key, INPUT).lower()
    finally:
        process.terminate()
        process.communicate(timeout=30)
    ((run_id, status),) = [
        (run["run_id"], run["status"]) for run in json.loads(inside("runs", "--json", *DB).out)["runs"]
    ]
    assert status == "QUEUED"
    assert inside("drive", run_id, "sums.py:pipeline", *DB).code == 0


def send(url, key, text):
    """Submit the form, and return the page of the run."""
    data = urllib.parse.urlencode({"key": key, "input": text}).encode()
    request = urllib.request.Request(f"{url}submit", data, {"Origin": url.rstrip("/")})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def test_a_delayed_run_is_left_alone(stroma, inside, fails):
    """A run that is not due, of code that is not served, or that fails is told apart by the exit code of
    `drive`."""
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
    assert (done.code, data["outcome"], data["until"], data["questions"]) == (
        7,
        "suspended",
        None,
        ["Go on?"],
    )


@pytest.mark.slow
def test_a_signal_yields(stroma):
    """SIGTERM ends a driven run at the next step boundary with exit code 130; another call completes it."""
    stroma("submit", "sums.py:pipeline", INPUT, "--run-id", "r", *DB)
    with stroma.popen(
        "drive", "r", "sums.py:pipeline", *DB, env={"SECOND_AWAITS": "asyncio.sleep(1)"}
    ) as process:
        while "second" not in stroma.calls():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "was interrupted at a step boundary" in err
    assert stroma("drive", "r", "sums.py:pipeline", *DB).code == 0
    assert stroma.calls() == ["first", "second", "third"]
