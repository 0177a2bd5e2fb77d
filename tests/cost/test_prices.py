"""What tokens cost: genai-prices' arithmetic beside ours, KNOWN_MODELS over it, each price's properties."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import genai_prices
import pytest
from genai_prices import data_snapshot
from genai_prices.types import ModelInfo, Provider
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.kit import Note
from tests.providers.server import Answer, Server

from stroma import KNOWN_MODELS, StromaRunner, Usage, estimate_cost_usd, update_prices
from stroma.cost.prices import Rates, cached_pricer, data_state, find_pricer, prices_of


def everything() -> list[tuple[Provider, ModelInfo]]:
    """Every model that is found by its id alone."""
    snapshot = data_snapshot.get_snapshot()
    findings = []
    for provider in snapshot.providers:
        for model in provider.models:
            try:
                listed = snapshot.find_provider_model(model.id, None, None, None)
            except LookupError:
                continue
            if listed[1] is model:
                findings.append((provider, model))
    return findings


MODELS = everything()
#: Priced by more than tokens of text: genai-prices counts what a usage of ours does not have.
MIXED = ("audio", "image", "video", "hours", "mchars", "messages", "kpages")
CONTEXTS = {
    "batch": {"processing": "batch"},
    "priority": {"service_tier": "priority"},
    "flex": {"service_tier": "flex"},
}


@st.composite
def usages(draw: st.DrawFn, model: str | None = None) -> Usage:
    size = draw(
        st.one_of(st.integers(0, 3_000_000), st.sampled_from([0, 1, 199_999, 200_000, 200_001, 272_001]))
    )
    cached = draw(st.integers(0, size))
    written = draw(st.integers(0, size - cached))
    return Usage(
        size, draw(st.integers(0, 200_000)), cached, written, model, None, draw(st.integers(0, written))
    )


def price(model: str, usage: Usage) -> float:
    pricer = find_pricer(model, usage)
    assert pricer is not None
    return pricer(usage.input_tokens, usage.output_tokens)


@given(st.sampled_from(MODELS), st.data(), st.sampled_from([None, *CONTEXTS]))
def test_a_price_is_what_genai_prices_makes_of_it(
    listed: tuple[Provider, ModelInfo], data: st.DataObject, tier: str | None
) -> None:
    """Cached, written, tiered, batch: our arithmetic equals genai-prices' own, for every model."""
    _, model = listed
    assume(model.id not in KNOWN_MODELS)
    usage = data.draw(usages(model.id))
    usage = Usage(
        *[
            getattr(usage, f)
            for f in ("input_tokens", "output_tokens", "cached_input_tokens", "cache_write_tokens")
        ],
        model.id,
        tier,
        usage.cache_write_1h_tokens,
    )
    theirs = genai_prices.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cached_input_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
    )
    context = CONTEXTS[tier] if tier else None
    kinds = [k for k, v in model.get_prices(datetime.now(UTC), context).__dict__.items() if v is not None]
    assume(not any(word in kind for kind in kinds for word in MIXED))
    total = genai_prices.calc_price(theirs, model.id, price_context=context).total_price
    assert price(model.id, usage) == pytest.approx(float(total), rel=1e-9, abs=1e-15)


@pytest.mark.core
def test_tiers_hold_for_the_whole_call() -> None:
    """Beyond 200,000 tokens of input all tokens have the higher price, output too."""
    assert estimate_cost_usd("claude-sonnet-4-5", 200_000, 1000) == pytest.approx(0.2 * 3 + 0.001 * 15)
    assert estimate_cost_usd("claude-sonnet-4-5", 200_001, 1000) == pytest.approx(0.200001 * 6 + 0.001 * 22.5)


@pytest.mark.core
def test_each_kind_of_token_has_its_price() -> None:
    """Read from a cache, written to it for minutes or an hour, and the rest."""
    usage = Usage(1000, 100, 300, 500, "claude-sonnet-4-5", None, 200)
    expected = 200 * 3 + 300 * 0.3 + 300 * 3.75 + 200 * 6 + 100 * 15
    assert price("claude-sonnet-4-5", usage) == pytest.approx(expected / 1e6)


@pytest.mark.core
def test_a_batch_costs_half() -> None:
    """A tier has its own price where the data has one, and the standard price where it has none."""
    assert estimate_cost_usd("claude-sonnet-4-5", 1000, 100, tier="batch") == pytest.approx(0.00225)
    assert estimate_cost_usd("command-a-03-2025", 1000, tier="batch") == estimate_cost_usd(
        "command-a-03-2025", 1000
    )
    assert estimate_cost_usd("gpt-4o", 1000, tier="no such") == estimate_cost_usd("gpt-4o", 1000)


def test_a_name_that_tells_no_provider_is_looked_up_with_those_who_make_models() -> None:
    """text-embedding-3-small does not say whose it is; it is OpenAI's price, not a reseller's."""
    shown = prices_of("text-embedding-3-small")
    assert shown.listed_as == ("openai", "text-embedding-3-small")


@pytest.mark.core
def test_known_models_win_and_the_rest_keeps_its_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers correct a price; cached, written and batch tokens keep the data's proportion."""
    model = "claude-haiku-4-5"
    list_price = price(model, Usage(1000, 100, 300, 500, None, None, 200))
    half = tuple(figure / 2 for figure in KNOWN_MODELS[model])
    monkeypatch.setitem(KNOWN_MODELS, model, half)
    assert price(model, Usage(1000, 100, 300, 500, None, None, 200)) == pytest.approx(list_price / 2)
    assert estimate_cost_usd(model, 1000, 100) == pytest.approx((1000 * 0.5 + 100 * 2.5) / 1e6)
    assert estimate_cost_usd(model, 1000, 100, tier="batch") == pytest.approx(
        (1000 * 0.25 + 100 * 1.25) / 1e6
    )


@pytest.mark.slow
def test_the_models_that_are_built_in_cost_what_the_data_says() -> None:
    """KNOWN_MODELS as it ships changes no price: it only spares the import of the data."""
    # Of a process of its own: other tests have models of theirs in it.
    code = "import json, stroma.cost.prices; print(json.dumps(stroma.cost.prices.KNOWN_MODELS))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    snapshot = data_snapshot.get_snapshot()
    for model, (given_price, made_price) in json.loads(printed.stdout).items():
        prices = snapshot.find_provider_model(model, None, None, None)[1].get_prices(datetime.now(UTC))
        assert (float(prices.input_mtok), float(prices.output_mtok)) == (given_price, made_price), model


@pytest.mark.core
def test_an_entry_is_for_all_names_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A response names a dated model: its plain name's entry holds, unless that release has another price."""
    monkeypatch.setitem(KNOWN_MODELS, "gpt-4o", (1.0, 1.0))
    assert estimate_cost_usd("gpt-4o-2024-11-20", 1_000_000) == 1.0
    assert estimate_cost_usd("gpt-4o-2024-05-13", 1_000_000) == 5.0
    monkeypatch.setitem(KNOWN_MODELS, "gpt-4o-2024-11-20", (2.0, 2.0))
    assert estimate_cost_usd("gpt-4o-2024-11-20", 1_000_000) == 2.0


def test_an_entry_without_data_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that only KNOWN_MODELS has, cached input costs what other input does: never too little."""
    monkeypatch.setitem(KNOWN_MODELS, "ours", (2.0, 4.0))
    assert price("ours", Usage(1000, 10, 400, 500, None, "batch")) == (1000 * 2 + 10 * 4) / 1e6
    assert estimate_cost_usd("nobody's", 1000) == 0.0


def test_a_free_model_can_be_given_a_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the data says 0 there is no proportion: every kind costs what the entry says."""
    free = next(
        model.id
        for _, model in MODELS
        if (rates := prices_of(model.id)) and rates.rates["standard"] == Rates(((-1, 0.0),), ((-1, 0.0),))
    )
    monkeypatch.setitem(KNOWN_MODELS, free, (2.0, 4.0))
    assert price(free, Usage(1000, 10, 400)) == pytest.approx((1000 * 2 + 10 * 4) / 1e6)


@pytest.mark.parametrize("entry", [(-1.0, 1.0), (float("nan"), 1.0), (1.0,), ("a", "b")], ids=str)
@pytest.mark.parametrize("cached", [0, 10])
async def test_an_entry_that_makes_no_sense_is_said(
    entry: Any, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong price is bad usage, which names the model; what was bought is kept."""
    monkeypatch.setitem(KNOWN_MODELS, "gpt-4o", entry)
    runner = StromaRunner.quick()

    @runner.node("ask", input=Note, output=Note)
    async def ask(state: Note) -> tuple[dict[str, Any], Usage]:
        return {"text": "kept"}, Usage(100, 10, cached, model="gpt-4o")

    result = await runner.run([ask], Note())
    assert result.failure.reason == "usage"
    assert "'gpt-4o', whose price makes no sense" in result.failure.message
    assert next(iter(result.trace)).output_state == {"text": "kept"}


RATE = st.floats(0, 1000, allow_nan=False)


@st.composite
def steps(draw: st.DrawFn, largest: float = 1000) -> Any:
    """Prices that do not fall with the size of the call."""
    base = draw(st.floats(0, largest))
    above = sorted(draw(st.sets(st.integers(0, 1_000_000), max_size=3)))
    dearer = sorted(draw(st.lists(st.floats(base, largest), min_size=len(above), max_size=len(above))))
    return (*reversed(list(zip(above, dearer, strict=True))), (-1, base))


RATES = st.builds(
    Rates, steps(), steps(), st.none() | steps(), st.none() | steps(), st.none() | steps(), st.floats(0, 1)
)


@given(RATES, usages())
def test_a_price_is_never_negative(rates: Rates, usage: Usage) -> None:
    """Whatever is used costs nothing or something, and nothing used costs no more than the call."""
    assert rates.cost(usage) >= 0
    assert rates.cost(Usage()) == rates.request_usd


@given(RATES, usages(), st.integers(0, 100_000), st.integers(0, 100_000))
def test_more_tokens_never_cost_less(rates: Rates, usage: Usage, given_more: int, made_more: int) -> None:
    """More input or output, of whatever kind, costs as much or more."""
    entries = (usage.cached_input_tokens, usage.cache_write_tokens, None, None, usage.cache_write_1h_tokens)
    more = Usage(usage.input_tokens + given_more, usage.output_tokens + made_more, *entries)
    assert rates.cost(more) >= rates.cost(usage) * (1 - 1e-12)


@given(RATES, usages())
def test_a_price_is_the_sum_of_its_parts(rates: Rates, usage: Usage) -> None:
    """Each kind of token at its rate for a call of this size, and the call itself."""
    size = usage.input_tokens

    def at(steps: Any) -> float:
        return next(price for above, price in steps if size > above)

    write = rates.cache_write or rates.input
    parts = [
        (size - usage.cached_input_tokens - usage.cache_write_tokens) * at(rates.input),
        usage.cached_input_tokens * at(rates.cached_input or rates.input),
        (usage.cache_write_tokens - usage.cache_write_1h_tokens) * at(write),
        usage.cache_write_1h_tokens * at(rates.cache_write_1h or write),
        usage.output_tokens * at(rates.output),
    ]
    assert rates.cost(usage) == pytest.approx(sum(parts) / 1e6 + rates.request_usd, rel=1e-9)


@given(RATES, st.integers(0, 3_000_000), st.integers(0, 200_000))
def test_a_plain_call_costs_the_same_the_short_way(rates: Rates, size: int, made: int) -> None:
    """A call without a cache costs what a Usage of it does."""
    assert rates.plain_cost(size, made) == rates.cost(Usage(size, made))


@given(RATE, RATE, st.lists(usages(), max_size=5))
def test_calls_at_one_rate_cost_their_sum(given_price: float, made_price: float, calls: list[Usage]) -> None:
    """Without steps, several calls cost what one of all their tokens would."""
    rates = Rates(((-1, given_price),), ((-1, made_price),))
    whole = Usage(sum(c.input_tokens for c in calls), sum(c.output_tokens for c in calls))
    assert sum(map(rates.cost, calls)) == pytest.approx(rates.cost(whole), rel=1e-9)


@given(st.sampled_from(MODELS), usages())
def test_every_price_of_the_data_is_finite_and_not_negative(listed: Any, usage: Usage) -> None:
    """For every model of genai-prices."""
    assert 0 <= price(listed[1].id, usage) < 1e6
    assert price(listed[1].id, usage) >= price(listed[1].id, Usage()) - 1e-15


@pytest.mark.core
def test_a_price_of_the_day_is_looked_up_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A price that changes with the date or the hour changes in a process that runs on."""

    class Clock(datetime):
        today = datetime(2025, 1, 1, tzinfo=UTC)

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return cls.today

    monkeypatch.setattr("stroma.cost.prices.datetime", Clock)
    before = {
        model.id: estimate_cost_usd(model.id, 1_000_000)
        for _, model in MODELS
        if isinstance(model.prices, list)
    }
    Clock.today = datetime(2026, 11, 1, tzinfo=UTC)
    after = {model: estimate_cost_usd(model, 1_000_000) for model in before}
    changed = [model for model in before if before[model] != after[model]]
    assert changed
    for model in changed:
        theirs = genai_prices.calc_price(
            genai_prices.Usage(input_tokens=1_000_000), model, genai_request_timestamp=Clock.today
        )
        assert after[model] == pytest.approx(float(theirs.total_price))


#: Data with less than half as many models would be refused.
OTHERS = [
    {"id": f"old-{number}", "match": {"equals": f"old-{number}"}, "prices": {"input_mtok": 1}}
    for number in range(sum(len(provider.models) for provider in data_snapshot.get_snapshot().providers))
]
DATA: list[dict[str, Any]] = [
    {
        "id": "here",
        "name": "Here",
        "api_pattern": "https://here",
        "model_match": {"starts_with": "new-model"},
        "models": [
            {
                "id": "new-model",
                "match": {"equals": "new-model"},
                "prices": {"input_mtok": 7, "output_mtok": 9},
            },
            *OTHERS,
        ],
    }
]


@pytest.fixture
def fetched(provider: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], None]]:
    """Set what genai-prices fetches in this test, at first ``DATA``."""
    real, url = genai_prices.UpdatePrices, provider.url(Answer(body=DATA))
    monkeypatch.setattr(genai_prices, "UpdatePrices", lambda: real(url=url))
    yield lambda answer: provider.answers.update({url.rpartition("/")[2]: (answer,)})
    data_snapshot.set_custom_snapshot(None)


@pytest.mark.core
@pytest.mark.usefixtures("fetched")
def test_prices_can_be_refreshed() -> None:
    """update_prices() fetches with genai-prices' own means; what was looked up before is looked up anew."""
    assert estimate_cost_usd("new-model", 1_000_000) == 0.0
    assert estimate_cost_usd("gpt-4o-2024-05-13", 1_000_000) == 5.0
    assert data_state()[1] is None
    update_prices()
    assert data_state()[1] is not None
    assert cached_pricer("new-model") == "unread"
    assert estimate_cost_usd("new-model", 1_000_000, 1_000_000) == 16.0
    assert estimate_cost_usd("gpt-4o-2024-05-13", 1_000_000) == 0.0
    shown = prices_of("new-model")
    assert (shown.source, shown.listed_as) == ("genai-prices", ("here", "new-model"))
    assert shown.fetched_at == data_state()[1]


@pytest.mark.core
@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"{}",
        b'[{"id": 1}]',
        b"",
        # Cut short, empty, or of a few models alone: all others would cost nothing.
        json.dumps(DATA).encode()[:-5],
        b"[]",
        json.dumps([{**DATA[0], "models": DATA[0]["models"][:3]}]).encode(),
        None,
    ],
    ids=lambda body: f"{body[:12]!r} {len(body)}" if body is not None else "lost",
)
def test_what_cannot_be_fetched_changes_nothing(body: bytes | None, fetched: Any) -> None:
    """A proxy's page, other data, or a lost connection is an error that says which prices stay in use."""
    fetched(Answer(body=DATA, fault="cut") if body is None else Answer(body=body))
    with pytest.raises(RuntimeError, match=r"those that came with genai-prices .* stay in use"):
        update_prices()
    assert data_state()[1] is None
    assert estimate_cost_usd("gpt-4o-2024-05-13", 1_000_000) == 5.0


@pytest.mark.usefixtures("fetched")
def test_fetched_prices_are_kept_in_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is written, so no disk has to be writable; another process does not see them."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    update_prices()
    assert estimate_cost_usd("new-model", 1_000_000) == 7.0
    assert list(tmp_path.iterdir()) == []


def test_a_fetch_that_failed_keeps_what_was_fetched_before(fetched: Any) -> None:
    """The prices in use stay, and are said to be those of then."""
    update_prices()
    fetched(Answer(body=b"[]"))
    with pytest.raises(RuntimeError, match=r"the data has 0 models.*; those of 20.* stay in use"):
        update_prices()
    assert estimate_cost_usd("new-model", 1_000_000) == 7.0


def test_without_a_network_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is an error that says which prices stay in use."""
    real = genai_prices.UpdatePrices
    monkeypatch.setattr(genai_prices, "UpdatePrices", lambda: real(url="http://127.0.0.1:1/"))
    with pytest.raises(RuntimeError, match=r"could not be fetched \(ConnectError: .*stay in use"):
        update_prices()
