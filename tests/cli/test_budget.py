"""`stroma budget`, and what `stroma run` says of a shared budget that is spent."""

import json
import re
from pathlib import Path

import pytest

PIPELINE = """
from pydantic import BaseModel
from stroma import *

class Sum(BaseModel):
    n: int

CONTRACT = NodeContract(node_id="ask", input_schema=Sum, output_schema=Sum)

@stroma_node("ask", CONTRACT)
async def ask(state):
    return {"n": state.n + 1}, 10, "cents"

KNOWN_MODELS["cents"] = (10_000.0, 10_000.0)
team = SharedBudget("team-a", max_cost_usd=0.25, max_tokens=1000, per="month", store="runs.db",
                    reserve_usd=0.1)
pipeline = Pipeline("asks", [ask, ask], config=RunConfig(shared_budgets=team))
"""


@pytest.fixture
def spent(tmp_path: Path, stroma):
    """A store with a run that a shared budget stopped at its second node... of the second run."""
    (tmp_path / "asks.py").write_text(PIPELINE)
    first = stroma("run", "asks.py:pipeline", '{"n": 1}', "--db", "runs.db", "--run-id", "first")
    assert first.code == 0, first.err
    return stroma("run", "asks.py:pipeline", '{"n": 1}', "--db", "runs.db", "--run-id", "second")


def test_a_run_that_a_shared_budget_stops(spent) -> None:
    """It exits with 5, says what is spent, and offers to go on without raising the run's own budget."""
    assert spent.code == 5
    assert "shared budget 'team-a' has no room for a call of node 'ask'" in spent.err
    assert "when the shared budget has room, resume with" in spent.err
    assert "--budget-usd" not in spent.err
    assert "stroma resume second asks.py:pipeline" in spent.err


def test_the_state_of_a_budget(spent, inside) -> None:
    """A person sees what was spent, what is left and until when; a program sees the same as JSON."""
    done = inside("budget", "team-a", "--db", "runs.db")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "team-a: per month, 0 calls in flight"
    assert re.split(r"  +", lines[1].strip()) == ["SPENT", "RESERVED", "LEFT", "LIMIT"]
    assert re.split(r"  +", lines[2].strip()) == ["$0.200000", "$0.000000", "$0.050000", "$0.250000"]
    assert re.split(r"  +", lines[3].strip()) == ["20 tok", "0 tok", "980 tok", "1,000 tok"]
    assert re.split(r"  +", lines[5].strip()) == ["ask", "$0.200000", "20 tok"]
    assert lines[6].startswith("it resets at ")

    findings = json.loads(inside("budget", "team-a", "--db", "runs.db", "--json").out)
    assert re.fullmatch(r"\d{4}-\d\d-01T00:00:00\+00:00", findings.pop("window_start"))
    assert re.fullmatch(r"\d{4}-\d\d-01T00:00:00\+00:00", findings.pop("window_end"))
    assert findings == {
        "schema": "stroma.budget/1",
        "name": "team-a",
        "per": "month",
        "limit": {"cost_usd": 0.25, "tokens": 1000},
        "spent": {"cost_usd": 0.2, "tokens": 20},
        "reserved": {"cost_usd": 0.0, "tokens": 0},
        "calls": 0,
        "nodes": {"ask": {"cost_usd": 0.2, "tokens": 20}},
    }


def test_a_budget_that_is_not_there(spent, inside) -> None:
    """It is an error that says where was looked, as is a name that can be none."""
    done = inside("budget", "team-b", "--db", "runs.db")
    assert (done.code, done.out) == (4, "")
    assert "no run has spent from a shared budget 'team-b' in runs.db" in done.err
    done = inside("budget", "", "--db", "runs.db")
    assert done.code == 2
    done = inside("budget", "team-a", "--db", "none.db")
    assert done.code == 4
    assert "store none.db does not exist" in done.err
