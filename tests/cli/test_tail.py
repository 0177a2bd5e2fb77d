"""`stroma tail`: attempts of runs as they are recorded. Its lines are compared with golden/tail.txt."""

import asyncio
import functools
import json
import re
import subprocess

import pytest
from tests.cli.conftest import GOOD
from tests.store_suite.journal import State, begin, commit, finish

from stroma import SQLiteStore


@pytest.fixture
def db(any_url, monkeypatch):
    monkeypatch.setenv("STROMA_DB", any_url)
    return any_url


@pytest.mark.slow
def test_following(db, stroma, inside):
    """--follow prints each attempt once while the run is in progress, and ends when the run does."""
    waits = "asyncio.to_thread(lambda: [time.sleep(0.02) for _ in iter(pathlib.Path('go').exists, True)])"
    words = ("run", "sums.py:pipeline", GOOD, "--run-id", "x", "-q")
    work = stroma.popen(*words, env={"SECOND_AWAITS": waits, "STROMA_DB": db})
    while stroma.calls()[-1:] != ["second"]:
        assert work.poll() is None
    watch = stroma.popen("tail", "x", "--follow", env={"STROMA_DB": db})
    assert " first  #1  success" in watch.stdout.readline()
    assert watch.poll() is None
    stroma.file("go", "")
    out, err = watch.communicate(timeout=60)
    assert work.wait(timeout=60) == 0
    work.communicate()
    assert (watch.returncode, err) == (0, "")
    assert [re.split(r"  +", line)[2] for line in out.splitlines()[:-1]] == ["second", "third"]
    assert out.splitlines()[-1].startswith("COMPLETED")


@pytest.mark.slow
def test_following_a_queued_run(stroma, inside):
    """--follow waits for a queued run to start, and ends when the run does."""
    assert inside("submit", "sums.py:pipeline", GOOD, "--run-id", "x").code == 0
    watch = stroma.popen("tail", "x", "--follow")
    with pytest.raises(subprocess.TimeoutExpired):
        watch.wait(timeout=2)
    assert inside("drive", "x", "sums.py:pipeline").code == 0
    out, _ = watch.communicate(timeout=60)
    assert (watch.returncode, out.splitlines()[-1].split()[0]) == (0, "COMPLETED")


@pytest.mark.slow
def test_all_runs(stroma):
    """Without a RUN, --follow prints every run that begins, with its id, until it is stopped."""
    watch = stroma.popen("tail", "--follow")
    for name in ("one", "two"):
        assert stroma("run", "sums.py:pipeline", GOOD, "--run-id", name, "-q").code == 0
        lines = [watch.stdout.readline() for _ in range(4)]
        assert [line.split()[0] for line in lines] == [name] * 4
        assert " COMPLETED " in lines[-1]
    watch.send_signal(subprocess.signal.SIGINT)
    _, err = watch.communicate(timeout=60)
    assert (watch.returncode, err) == (130, "\nstroma: stopped\n")


def test_attempts_of_several_runs_are_in_the_order_of_their_ends(tmp_path, inside):
    """Without a RUN, an attempt of an older run that ended later is printed later."""
    with SQLiteStore(tmp_path / "stroma.db") as store, asyncio.Runner() as loop:

        async def work():
            sessions = [await begin(store, name) for name in ("old", "new")]
            for number in range(4):  # Each attempt starts after the one before.
                await commit(sessions[number % 2], number // 2, State())
            return sessions

        sessions = loop.run(work())
        lines = inside("tail", "--db", "stroma.db").out.splitlines()
        for session in sessions:
            loop.run(finish(session))
    assert [line.split()[0] for line in lines] == ["old", "new", "old", "new"]


SPEAK = """
import asyncio, pathlib
from pydantic import BaseModel
from stroma import NodeContract, Pipeline, RunConfig, current_node, stroma_node


class Start(BaseModel):
    start: int


@stroma_node("speak", NodeContract(node_id="speak", input_schema=Start, output_schema=Start))
async def speak(state):
    current_node().emit("Half a ")
    current_node().emit("sentence")
    current_node().emit({"done": 0.5}, name="progress")
    while not pathlib.Path("go").exists():
        await asyncio.sleep(0.02)
    current_node().emit(", and the rest")
    return state


def hide(state):
    return {**state, **({"delta": "hidden"} if "delta" in state else {})}


pipeline = Pipeline("p", [speak], config=RunConfig(events="store"))
private = Pipeline("p", [speak], config=RunConfig(redact=hide))
"""


@pytest.mark.slow
def test_what_nodes_emit(db, stroma, inside):
    """The text of an attempt in progress comes in one line, then what is new; an ended attempt has none."""
    stroma.file("speak.py", SPEAK)
    tail = functools.partial(inside, "tail", env={"STROMA_DB": db})
    work = stroma.popen("run", "speak.py:pipeline", GOOD, "--run-id", "x", "-q", env={"STROMA_DB": db})
    while "progress" not in (shown := tail("x").out):  # It is emitted last.
        assert work.poll() is None
    assert [re.split(r"  +", line.strip()) for line in shown.splitlines()] == [
        ["0", "speak", "#1", "delta", "Half a sentence"],
        ["0", "speak", "#1", "progress", '{"done": 0.5}'],
    ]
    hidden = tail("x", "--redact", "speak.py:private").out
    assert "sentence" not in hidden
    assert "hiddenhidden" in hidden
    events = [json.loads(line) for line in tail("x", "--json").out.splitlines()]
    expected = [("node_event", "Half a "), ("node_event", "sentence"), ("node_event", {"done": 0.5})]
    assert [(one["event"], one["node_event"]["data"]) for one in events] == expected
    assert events[0]["node_event"]["cursor"] == "1-3"
    watch = stroma.popen("tail", "x", "--follow", env={"STROMA_DB": db})
    assert "delta  Half a sentence" in watch.stdout.readline()
    stroma.file("go", "")
    out, err = watch.communicate(timeout=60)
    assert work.wait(timeout=60) == 0
    work.communicate()
    assert (watch.returncode, err) == (0, "")
    # Events are stored up to 0.1 s later than the attempt.
    assert {"delta", "success"} <= set(re.findall(r"speak  #1  (\w+)", out)), out
    assert ", and the rest" in out
    ended = tail("x").out
    assert "delta" not in ended
    assert "speak  #1  success" in ended
