"""`stroma prices`."""

import json

import genai_prices
import pytest
from genai_prices import data_snapshot

from stroma import KNOWN_MODELS


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
