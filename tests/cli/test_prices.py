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


def test_the_prices_of_a_model(inside):
    """Each kind of token, each size of call and each way of being served that has a price, and where it is
    from."""
    done = inside("prices", "claude-sonnet-4-5")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        f"claude-sonnet-4-5: genai-prices {genai_prices.__version__} (the data that came with it), as "
        f"claude-sonnet-4-5 of anthropic",
        "PER MILLION TOKENS                   STANDARD   BATCH",
        "input                                      $3    $1.5",
        "input, above 200,000                       $6      $3",
        "  from a cache                           $0.3   $0.15",
        "  from a cache, above 200,000            $0.6    $0.3",
        "  to a cache                            $3.75  $1.875",
        "  to a cache, above 200,000              $7.5   $3.75",
        "  to a cache for 1 h                       $6      $3",
        "  to a cache for 1 h, above 200,000       $12      $6",
        "output                                    $15    $7.5",
        "output, above 200,000                   $22.5  $11.25",
    ]


def test_what_known_models_says_is_named(inside, monkeypatch):
    """A price of KNOWN_MODELS is said to be one, also of a model that is named by its date, or that has no
    data."""
    done = inside("prices", "gpt-4o-2024-11-20", "gpt-4o")
    first, *_ = done.out.splitlines()
    assert first.startswith(
        "gpt-4o-2024-11-20: KNOWN_MODELS['gpt-4o']; the rest in the proportion of genai-prices"
    )
    monkeypatch.setitem(KNOWN_MODELS, "ours", (2.0, 4.5))
    assert inside("prices", "ours").out.splitlines() == [
        "ours: KNOWN_MODELS['ours']",
        "PER MILLION TOKENS  STANDARD",
        "input                     $2",
        "output                  $4.5",
    ]


def test_prices_as_data(inside):
    """--json has what the tables have, smallest calls first."""
    done = inside("prices", "claude-sonnet-4-5", "gpt-4o", "--json")
    data = json.loads(done.out)
    assert (data["schema"], data["genai_prices"], data["fetched_at"]) == (
        "stroma.prices/1",
        genai_prices.__version__,
        None,
    )
    claude, gpt = data["models"]
    assert claude["listed_as"] == {"provider": "anthropic", "id": "claude-sonnet-4-5"}
    assert claude["rates"]["standard"]["input"] == [
        {"above": 0, "usd_per_million": 3.0},
        {"above": 200_000, "usd_per_million": 6.0},
    ]
    assert claude["rates"]["standard"]["request_usd"] == 0
    assert (gpt["source"], gpt["rates"]["batch"]["output"]) == (
        "KNOWN_MODELS",
        [{"above": 0, "usd_per_million": 5.0}],
    )


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_model_nobody_knows(inside, options):
    """Exit code 4, with what is near and how to give it a price; the others are shown."""
    done = inside("prices", "gpt-4oo", "claude-haiku-4-5", *options)
    assert done.code == 4
    assert "no price for gpt-4oo, which would count as $0" in done.err
    assert "near: stroma prices gpt-4o" in done.err
    assert "KNOWN_MODELS" in done.err
    assert "claude-haiku-4-5" in done.out
    if options:
        assert json.loads(done.out)["models"][0] == {
            "model": "gpt-4oo",
            "source": None,
            "listed_as": None,
            "rates": {},
        }


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
