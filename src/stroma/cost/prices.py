"""Prices of tokens: those of genai-prices, overlaid by KNOWN_MODELS. US dollars per million tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from stroma._utils.forks import process_lock
from stroma.cost.usage import Report, Usage

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelInfo, ModelPrice, Provider

#: USD per million (input, output) tokens. What stands here wins over the data of ``genai-prices``; add your
#: own models, or correct a price. List prices of the vendors' pages, November 2026 data of genai-prices. What
#: ships here is flat in the data too: a model that costs more for large calls (claude-sonnet-4-5) would lose
#: that.
KNOWN_MODELS: dict[str, tuple[float, float]] = {
    "gpt-4o": (2.50, 10.00),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "claude-haiku-4-5": (1.00, 5.00),
}

#: What a call costs in US dollars, from its input and output tokens.
Pricer = Callable[[int, int], float]
#: Prices by the size of the input: (for more input tokens than this, USD per million), the largest first. The
#: last one is for any size. A step holds for all tokens of the call, not only for those above it.
Steps: TypeAlias = tuple[tuple[int, float], ...]
_ANY_SIZE: Final = -1


class Rates(NamedTuple):
    """The prices of one model, by kind of token. None: that kind has no separate price.

    Attributes:
        cached_input: of input that was read from a cache; without one it costs what other input does.
        cache_write: of input that was written to a cache; likewise.
        cache_write_1h: of what is kept there for an hour; without one it costs what other writes do.
        request_usd: US dollars for each call, of any size.
    """

    input: Steps
    output: Steps
    cached_input: Steps | None = None
    cache_write: Steps | None = None
    cache_write_1h: Steps | None = None
    request_usd: float = 0.0

    def cost(self, usage: Usage) -> float:
        """US dollars."""
        size, written, hour = usage.input_tokens, usage.cache_write_tokens, usage.cache_write_1h_tokens
        write = self.cache_write or self.input
        total = (
            (size - usage.cached_input_tokens - written) * _at(self.input, size)
            + usage.cached_input_tokens * _at(self.cached_input or self.input, size)
            + (written - hour) * _at(write, size)
            + hour * _at(self.cache_write_1h or write, size)
            + usage.output_tokens * _at(self.output, size)
        )
        return total / 1_000_000 + self.request_usd

    def plain_cost(self, input_tokens: int, output_tokens: int) -> float:
        """Return the same for a call without a cache, without building a Usage."""
        total = input_tokens * _at(self.input, input_tokens) + output_tokens * _at(self.output, input_tokens)
        return total / 1_000_000 + self.request_usd


def _at(steps: Steps, size: int) -> float:
    for above, price in steps:
        if size > above:
            return price
    return steps[-1][1]


def _flat(price: float) -> Steps:
    return ((_ANY_SIZE, price),)


# ---------------------------------------------------------------------- genai-prices


class _Listing:
    """One model in genai-prices' data."""

    def __init__(self, provider: Provider, info: ModelInfo) -> None:
        self.provider = provider
        self.info = info
        self.id = info.id
        #: By service tier. Prices that depend on the date or the time of day are looked up for each call.
        self._rates: dict[str | None, Rates] = {}
        variants = info.price_variants or ()
        self._is_timed = isinstance(info.prices, list) or any(one.constraint is not None for one in variants)

    @property
    def tiers(self) -> list[str]:
        """Return the service tiers that have prices of their own."""
        tiers = [value for variant in self.info.price_variants or () for value in variant.when.values()]
        return [tier for tier in dict.fromkeys(tiers) if self.rates(tier) != self.rates(None)]

    def rates(self, tier: str | None) -> Rates:
        rates = self._rates.get(tier)
        if rates is None:
            # Who calls it what: OpenAI and Google service_tier, Anthropic speed; all of them have batches.
            context = () if tier is None else ({"processing": tier, "service_tier": tier, "speed": tier},)
            rates = _read_rates(self.info.get_prices(datetime.now(UTC), *context))
            if not self._is_timed:
                self._rates[tier] = rates
        return rates


def _read_rates(prices: ModelPrice) -> Rates:
    per_request = _steps(prices.requests_kcount)
    return Rates(
        input=_steps(prices.input_mtok) or _flat(0.0),
        output=_steps(prices.output_mtok) or _flat(0.0),
        cached_input=_steps(prices.cache_read_mtok),
        cache_write=_steps(prices.cache_write_mtok),
        cache_write_1h=_steps(prices.cache_write_1h_mtok),
        request_usd=0.0 if per_request is None else per_request[-1][1] / 1000,
    )


def _steps(price: Any) -> Steps | None:
    if price is None:
        return None
    tiers = getattr(price, "tiers", None)
    if tiers is None:
        return _flat(float(price))
    above = sorted(((int(tier.start), float(tier.price)) for tier in tiers), reverse=True)
    return (*above, (_ANY_SIZE, float(price.base)))


#: By the name of a model: the data it was looked up in, and what is there.
_looked_up: dict[str, tuple[DataSnapshot, _Listing | None]] = {}
#: genai_prices.data_snapshot, once it was imported.
_data: Any = None
_loading = process_lock()


def _load() -> Any:
    # A quarter of a second; nothing but prices needs it.
    global _data
    with _loading:
        if _data is None:
            from genai_prices import data_snapshot

            _data = data_snapshot
    return _data


def _listing(model: str) -> _Listing | None:
    """Return the entry of a model in genai-prices. Slow the first time: call it off the event loop."""
    data = (_data or _load()).get_snapshot()
    cached = _looked_up.get(model)
    if cached is not None and cached[0] is data:
        return cached[1]
    listing: _Listing | None = None
    for provider in (None, *_MAKERS):
        try:
            listing = _Listing(*data.find_provider_model(model, None, provider, None))
            break
        except LookupError:
            continue
    _looked_up[model] = (data, listing)
    return listing


#: Who is asked for a name that does not tell whose it is (text-embedding-3-small): who makes models, not who
#: resells them.
_MAKERS: Final = ("openai", "anthropic", "google", "mistral", "cohere")


# ---------------------------------------------------------------------- the price of a call


def cached_pricer(model: str, detail: Usage | None = None) -> Pricer | Literal["unread"] | None:
    """Return the price function of a model without an import; "unread" before :func:`find_pricer` was called.

    ``detail`` is the whole usage, where more than input and output makes the price.
    """
    known = KNOWN_MODELS.get(model)
    if known is not None and detail is None:
        return Rates(_flat(known[0]), _flat(known[1])).plain_cost
    cached = _looked_up.get(model)
    # Whoever has genai-prices refresh itself gets the new prices at once.
    if cached is None or cached[0] is not _data.get_snapshot():
        return "unread"
    return _pricer(known, cached[1], detail)


def find_pricer(model: str, detail: Usage | None = None) -> Pricer | None:
    """Return the price function of a model, or None. Slow the first time: call it off the event loop."""
    known = KNOWN_MODELS.get(model)
    return _pricer(known, None if known is not None and detail is None else _listing(model), detail)


def _pricer(
    known: tuple[float, float] | None, listing: _Listing | None, detail: Usage | None
) -> Pricer | None:
    if known is None and listing is not None:
        # An entry is for all names of its model: gpt-4o-2024-11-20 is gpt-4o.
        known = KNOWN_MODELS.get(listing.id)
    if known is not None and detail is None:
        return Rates(_flat(known[0]), _flat(known[1])).plain_cost
    if known is None and listing is None:
        return None
    rates = _overlaid(known, listing, None if detail is None else detail.tier)
    return rates.plain_cost if detail is None else lambda _input, _output: rates.cost(detail)


def _overlaid(known: tuple[float, float] | None, listing: _Listing | None, tier: str | None) -> Rates:
    """Return the rates of a model with the two numbers of KNOWN_MODELS; the others change in proportion."""
    if listing is None:
        assert known is not None
        return Rates(_flat(known[0]), _flat(known[1]))
    rates = listing.rates(tier)
    if known is None:
        return rates
    standard = listing.rates(None)

    def scaled(steps: Steps | None, own: float, whole: Steps) -> Steps | None:
        if steps is None:
            return None
        base = whole[-1][1]
        return _flat(own * (steps[-1][1] / base) if base else own)

    input_price, output_price = known
    return Rates(
        scaled(rates.input, input_price, standard.input) or _flat(input_price),
        scaled(rates.output, output_price, standard.output) or _flat(output_price),
        scaled(rates.cached_input, input_price, standard.input),
        scaled(rates.cache_write, input_price, standard.input),
        scaled(rates.cache_write_1h, input_price, standard.input),
    )


def cost_of(report: Report) -> float | None:
    """Return the cost of a reported call in US dollars: as charged, else by its model's price, or None."""
    input_tokens, output_tokens, model, detail = report
    if detail is not None and detail.cost_usd is not None:
        return detail.cost_usd
    price = None if model is None else find_pricer(model, detail)
    return None if price is None else price(input_tokens, output_tokens)


def estimate_cost_usd(
    model: str,
    input_tokens: int,
    output_tokens: int = 0,
    *,
    cached_input_tokens: int = 0,
    cache_write_tokens: int = 0,
    tier: str | None = None,
) -> float:
    """Return the price of a call in US dollars; 0.0 for an unknown model.

    Args:
        model: name of the model, as the provider reports it.
        input_tokens: all input tokens, the cached ones included.
        output_tokens: output tokens.
        cached_input_tokens: input tokens that were read from the provider's cache.
        cache_write_tokens: input tokens that were written to the provider's cache.
        tier: service tier with separate prices; None: the standard one.
    """
    detail: Usage | None = None
    if cached_input_tokens or cache_write_tokens or tier is not None:
        detail = Usage(input_tokens, output_tokens, cached_input_tokens, cache_write_tokens, model, tier)
    price = find_pricer(model, detail)
    return price(input_tokens, output_tokens) if price else 0.0


# ---------------------------------------------------------------------- showing and refreshing


class ModelPrices(NamedTuple):
    """The prices that are used for a model, and their source.

    Attributes:
        source: "KNOWN_MODELS" or "genai-prices".
        listed_as: the provider and the id of the model in genai-prices; None if it is not there.
        version: of genai-prices.
        fetched_at: when its data was refreshed; None for the data that came with it.
        rates: by how the call is served: "standard", "batch" ...
    """

    model: str
    source: Literal["KNOWN_MODELS", "genai-prices"]
    listed_as: tuple[str, str] | None
    version: str
    fetched_at: datetime | None
    rates: dict[str, Rates]


def prices_of(model: str) -> ModelPrices | None:
    """Return the current prices of a model; None if they are not known."""
    listing = _listing(model)
    known = KNOWN_MODELS.get(model)
    if known is None and listing is not None:
        known = KNOWN_MODELS.get(listing.id)
    if known is None and listing is None:
        return None
    rates = {"standard": _overlaid(known, listing, None)}
    if listing is not None:
        rates |= {tier: _overlaid(known, listing, tier) for tier in listing.tiers}
    version, fetched_at = data_state()
    return ModelPrices(
        model,
        "genai-prices" if known is None else "KNOWN_MODELS",
        None if listing is None else (listing.provider.id, listing.id),
        version,
        fetched_at,
        rates,
    )


def data_state() -> tuple[str, datetime | None]:
    """Return the version of genai-prices and the time of its last refresh, None for its own data."""
    import genai_prices

    snapshot = _load().get_snapshot()
    return genai_prices.__version__, snapshot.timestamp.astimezone() if snapshot.from_auto_update else None


def update_prices() -> None:
    """Fetch the prices of today, for this process. Raises RuntimeError, and changes nothing, on failure.

    Nothing else in Stroma fetches prices. Without it, and without your own ``genai_prices.UpdatePrices``, the
    prices are those of the installed genai-prices.
    """
    import genai_prices

    try:
        snapshot = genai_prices.UpdatePrices().fetch()
        fetched, present = _count(snapshot), _count(_load().get_snapshot())
        # A model that is not there would cost nothing from now on.
        if fetched * 2 < present:
            raise ValueError(f"the data has {fetched} models, where {present} are known")
    except Exception as error:  # A proxy may answer with anything at all.
        version, fetched_at = data_state()
        of = (
            f"those of {fetched_at:%Y-%m-%d %H:%M}"
            if fetched_at
            else f"those that came with genai-prices {version}"
        )
        raise RuntimeError(
            f"the prices could not be fetched ({type(error).__name__}: {error}); {of} stay in use"
        ) from error
    _load().set_custom_snapshot(snapshot)


def _count(snapshot: DataSnapshot | None) -> int:
    return 0 if snapshot is None else sum(len(provider.models) for provider in snapshot.providers)


def kinds(rates: Rates) -> Iterator[tuple[str, Steps]]:
    """Yield the kinds of tokens that have a price of their own, by name."""
    for name, steps in zip(rates._fields, rates, strict=True):
        if isinstance(steps, tuple):
            yield name, steps
