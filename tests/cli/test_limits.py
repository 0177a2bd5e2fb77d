"""`stroma budget`, `stroma limit` and `stroma prices`."""

import asyncio
import json
import re
from pathlib import Path

import genai_prices
import pytest
from genai_prices import data_snapshot
from tests.telemetry.test_queue_metrics import close_limit

from stroma import KNOWN_MODELS, SQLiteStore

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


def test_the_state_of_a_limit(tmp_path: Path, inside) -> None:
    """A person sees the calls of the last minute and the cooldown; a program sees the same as JSON."""
    path = str(tmp_path / "limits.db")
    with SQLiteStore(path) as store:
        asyncio.run(close_limit("llm", store=store))
    done = inside("limit", "llm", "--db", path)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "llm: 1 call and 0 tok in the last minute, 0 calls in flight"
    assert re.fullmatch(r"it is closed for another (1\d|20)\.\d s: the provider asked to wait", lines[1])
    state = json.loads(inside("limit", "llm", "--db", path, "--json").out)
    assert 10_000 < state.pop("cooldown_ms") <= 20_000
    assert state == {"schema": "stroma.limit/1", "name": "llm", "requests": 1, "tokens": 0, "calls": 0}


def test_a_limit_that_probes(tmp_path: Path, inside) -> None:
    """Of a limit whose cooldown is over and that no call has opened yet, the command says so."""
    path = str(tmp_path / "limits.db")
    with SQLiteStore(path) as store:
        asyncio.run(close_limit("llm", store=store, seconds="0.001"))
    assert "it is closed until a call succeeds" in inside("limit", "llm", "--db", path).out


def test_a_limit_that_is_not_there(tmp_path: Path, inside, fails) -> None:
    """It is an error that says where was looked, as is a name that can be none."""
    path = str(tmp_path / "limits.db")
    with SQLiteStore(path) as store:
        asyncio.run(close_limit("llm", store=store))
    fails(inside("limit", "other", "--db", path), 4, "no call was made under a limit 'other' in")
    fails(inside("limit", "", "--db", path), 2)


@pytest.fixture
def offline(monkeypatch):
    """genai-prices looks for its data where nobody answers."""
    real = genai_prices.UpdatePrices
    monkeypatch.setattr(genai_prices, "UpdatePrices", lambda: real(url="http://127.0.0.1:1/"))


@pytest.fixture
def fetched(monkeypatch):
    """What genai-prices fetches: the data that came with it, as if it were of today."""

    class Fetching(genai_prices.UpdatePrices):
        def fetch(self):
            return data_snapshot.DataSnapshot(data_snapshot.get_snapshot().providers, from_auto_update=True)

    monkeypatch.setattr(genai_prices, "UpdatePrices", Fetching)
    yield
    data_snapshot.set_custom_snapshot(None)


def test_the_prices_of_a_model(inside, golden, monkeypatch):
    """Each kind of token, size of call and tier that has a price, and its source, as a table and as JSON."""
    monkeypatch.setitem(KNOWN_MODELS, "ours", (2.0, 4.5))
    golden("prices", "prices claude-sonnet-4-5", "prices ours", "prices claude-sonnet-4-5 --json")
    first = inside("prices", "gpt-4o-2024-11-20").out.splitlines()[0]
    assert first.startswith(
        "gpt-4o-2024-11-20: KNOWN_MODELS['gpt-4o']; the other prices in proportion to openai/gpt-4o in "
    )


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_model_nobody_knows(inside, options):
    """Exit code 4, with how to give it a price; the others are shown."""
    done = inside("prices", "gpt-4oo", "claude-haiku-4-5", *options)
    assert done.code == 4
    assert "no price for gpt-4oo, which would count as $0" in done.err
    assert "KNOWN_MODELS" in done.err
    assert "claude-haiku-4-5" in done.out
    if options:
        unknown = {"model": "gpt-4oo", "source": None, "listed_as": None, "rates": {}}
        assert json.loads(done.out)["models"][0] == unknown


def test_without_a_network_the_prices_are_shown_all_the_same(inside, offline):
    """--update-prices says on stderr that it could not, and which prices stay in use."""
    done = inside("prices", "gpt-4o", "--update-prices")
    assert done.code == 0
    assert done.err.startswith("stroma: the prices could not be fetched (ConnectError: ")
    assert done.err.rstrip().endswith(
        f"those that came with genai-prices {genai_prices.__version__} stay in use"
    )
    assert "$2.5" in done.out


def test_fetched_prices_say_when(inside, fetched):
    """After --update-prices it says when they were fetched."""
    done = inside("prices", "gpt-5", "--update-prices", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["fetched_at"] is not None
    assert " (fetched 20" in inside("prices", "gpt-5").out


def test_what_is_missing_is_a_usage_error(inside):
    """A model has to be named."""
    done = inside("prices")
    assert (done.code, done.out) == (2, "")
    assert "MODEL" in done.err


def test_a_hostile_name_cannot_move_the_cursor(inside):
    """Names are shown as one line of text."""
    done = inside("prices", "gpt\x1b[2J\n-4")
    assert done.code == 4
    assert "\x1b" not in done.err
