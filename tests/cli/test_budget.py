"""`stroma budget`, and what `stroma run` says of a shared budget that is spent."""

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
def spent(stroma, ran):
    """The second run of a store, which a shared budget stopped at its second node."""
    stroma.file("asks.py", PIPELINE)
    ran("first", "--db", "runs.db", target="asks.py:pipeline", given='{"n": 1}')
    return ran("second", "--db", "runs.db", target="asks.py:pipeline", given='{"n": 1}', code=5)


def test_a_run_that_a_shared_budget_stops(spent) -> None:
    """It exits with 5, says what is spent, and offers to resume without raising the run's own budget."""
    assert "shared budget 'team-a' has no room for a call of node 'ask'" in spent.err
    assert "when the shared budget has room, resume with: stroma resume second asks.py:pipeline" in spent.err
    assert "--budget-usd" not in spent.err


def test_the_state_of_a_budget(spent, golden, inside, fails) -> None:
    """A person sees what was spent, what is left and until when; a program sees the same as JSON."""
    golden("budget", "budget team-a --db runs.db", "budget team-a --db runs.db --json")
    fails(inside("budget", "team-b", "--db", "runs.db"), 4, "no run has spent from a shared budget 'team-b'")
    run = inside("budget", "second", "--db", "runs.db")
    fails(run, 4, "a run has this id; what it spent: stroma show second --db runs.db")
    fails(inside("budget", "", "--db", "runs.db"), 2)
    fails(inside("budget", "team-a", "--db", "none.db"), 4, "store none.db does not exist")
