"""SIGINT stops at once with 130, SIGTERM after a node with 0; commits are kept, and a resume finishes."""

import json
import signal
import time

import pytest

GOOD = '{"start": 1}'
HANG = {"SECOND_AWAITS": "asyncio.sleep(60)"}


def wait_for(process, text):
    """Read the progress until a line has a text in it; what was read."""
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} was never said:\n{seen}")


def test_sigint_in_the_middle_of_a_node(stroma):
    """SIGINT cancels the run, what was finished is kept, and resume calls only what was not."""
    process = stroma.popen("run", "sums.py:pipeline", GOOD, "--run-id", "x", "--json", env=HANG)
    wait_for(process, "second                          start")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    assert "stroma: SIGINT: stopping" in err
    assert "cancelled" in err
    assert "stroma: stopped by SIGINT: run x is CANCELLED" in err
    assert "resume with: stroma resume x sums.py:pipeline" in err
    assert "Traceback" not in err
    data = json.loads(out)
    assert (data["exit_code"], data["status"], data["final_state"]) == (130, "CANCELLED", {"n": 2})

    resumed = stroma("resume", "x", "sums.py:pipeline", "-q")
    assert (resumed.code, json.loads(resumed.out)) == (0, {"n": 4})
    assert stroma.calls() == ["first", "second", "second", "third"]


def test_sigterm_lets_the_node_in_flight_finish(stroma):
    """SIGTERM begins no further node, keeps the one in flight, gives up the run, and is no failure."""
    env = {"SECOND_AWAITS": "asyncio.sleep(1.5)"}
    process = stroma.popen("run", "sums.py:pipeline", GOOD, "--run-id", "x", "--json", env=env)
    wait_for(process, "second                          start")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "stroma: SIGTERM: stopping after the node in flight, in 10.0 s at most" in err
    assert "stopped by SIGTERM: run x is INTERRUPTED\n" in err
    assert "or continue it here: stroma resume x sums.py:pipeline" in err
    data = json.loads(out)
    assert (data["exit_code"], data["status"], data["final_state"]) == (0, "INTERRUPTED", {"n": 4})
    assert data["resume"] == "stroma resume x sums.py:pipeline"
    (run,) = json.loads(stroma("runs", "--json").out)["runs"]
    assert (run["status"], run["holder"], run["nodes"]) == ("INTERRUPTED", None, 2)

    resumed = stroma("resume", "x", "sums.py:pipeline", "-q")
    assert (resumed.code, json.loads(resumed.out)) == (0, {"n": 4})
    assert stroma.calls() == ["first", "second", "third"]


def test_a_quiet_run_says_only_how_it_ended(stroma):
    """With -q the first signal prints nothing."""
    process = stroma.popen("run", "sums.py:pipeline", GOOD, "--run-id", "x", "-q", "--drain", "0.2", env=HANG)
    while stroma.calls() != ["first", "second"]:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, "stopping after the node" in err) == (0, False), err
    assert "stopped by SIGTERM: run x is INTERRUPTED" in err


def test_a_node_that_takes_longer_than_the_drain_is_cut_short(stroma):
    """Past --drain the node in flight is cancelled: still no failure, and everything before it is kept."""
    process = stroma.popen("run", "sums.py:pipeline", GOOD, "--run-id", "x", "--drain", "0.2", env=HANG)
    wait_for(process, "second                          start")
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert (process.returncode, out) == (0, ""), err
    assert "second                          cancelled" in err
    assert "run x is INTERRUPTED" in err
    assert stroma("resume", "x", "sums.py:pipeline", "-q").code == 0
    assert stroma.calls() == ["first", "second", "second", "third"]


def test_a_drain_of_no_time_at_all(inside, fails):
    """--drain takes seconds, zero or more."""
    for text in ("-1", "nan", "x"):
        fails(inside("run", "sums.py:pipeline", GOOD, "--drain", text), 2, "--drain")


def test_a_second_signal_stops_a_node_that_does_not_listen(stroma):
    """A node that blocks the loop ends with the second signal; committed work is kept all the same."""
    process = stroma.popen("run", "sums.py:pipeline", GOOD, "--run-id", "x", env={"SECOND": "time.sleep(60)"})
    wait_for(process, "second                          start")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    wait_for(process, "SIGTERM: stopping")
    process.send_signal(signal.SIGINT)  # An echo: a terminal and a parent may both send one.
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "stopped at once; finished nodes are stored; resume with: stroma resume x" in err
    assert stroma("resume", "x", "sums.py:pipeline", "-q").code == 0
    assert stroma.calls() == ["first", "second", "second", "third"]


def test_a_signal_while_the_file_is_imported(stroma):
    """Ctrl-C before the run is 130 in one line."""
    stroma.file(
        "slow.py", "import sys, time\nprint('importing', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    )
    process = stroma.popen("run", "slow.py:pipeline")
    wait_for(process, "importing")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "\nstroma: stopped\n")


@pytest.mark.parametrize(("name", "codes"), [("SIGTERM", {0}), ("SIGINT", {0, 130})])
def test_a_signal_in_the_last_node(stroma, name, codes):
    """A run that a signal finds in its last node keeps the output, and nothing is called again for it."""
    stroma.file("one.py", "from sums import *\npipeline = Pipeline('one', [first, second])")
    kill = f"os.kill(os.getpid(), signal.{name})"
    process = stroma.popen("run", "one.py:pipeline", GOOD, "-q", env={"SECOND": kill})
    out, err = process.communicate(timeout=30)
    # Whether SIGINT is seen before or after the run's end is a matter of luck.
    assert process.returncode in codes, err
    assert process.returncode or json.loads(out) == {"n": 4}
    resumed = stroma("resume", "last", "one.py:pipeline", "-q")
    assert (resumed.code, json.loads(resumed.out)) == (0, {"n": 4})
    assert stroma.calls() == ["first", "second"]
