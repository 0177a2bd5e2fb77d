"""Runs whose process died: given up after a while, forced on, and shown as what they are."""

import json
import re

import pytest

GOOD = '{"start": 1}'


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
    assert "poison: the process died 2 times under this run" in given_up.err
    assert stroma.calls() == ["deadly", "deadly"]
    assert "poison" in inside("runs").out
    forced = inside("resume", "x", "deadly.py:pipeline", "--force", "-q", env={"WELL": "1"})
    assert (forced.code, json.loads(forced.out)) == (0, {"n": 2})


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
    done = inside("tail", "x1", "--follow")
    assert (done.code, done.out.splitlines()[-1]) == (0, "INTERRUPTED  owner lost")
    assert "resume it: stroma resume x1 sums.py:pipeline" in done.err
    ran("x2")
    listed = inside("show", "x").err
    assert "x1  sums  INTERRUPTED" in listed, listed
    assert "x2  sums  COMPLETED" in listed, listed


def test_where_a_failed_run_failed(stroma, inside):
    """show names the line of the user's code where the attempt that stopped a run failed, with its source."""
    stroma.file(
        "prices.py",
        """
        from stroma import Flow, stroma_flow
        from sums import *
        @stroma_node
        async def price(state: Count) -> Count:
            return {}["pens"]
        @stroma_flow
        async def buys(flow: Flow, state: Count) -> Count:
            return await flow.step(price, state)
        """,
    )
    assert inside("run", "prices.py:buys", GOOD, "--run-id", "x", "-q", "--db", "runs.db").code == 1
    shown = inside("show", "x", "--db", "runs.db").out
    assert re.search(
        r'error     KeyError: .*\n +File ".*prices.py", line \d, in price\n +return \{\}\["pens"\]\n', shown
    )
    assert inside("resume", "x", "--db", "runs.db").code == 0
    assert inside("runs", "--db", "runs.db").out.rstrip().endswith("due for a worker")
