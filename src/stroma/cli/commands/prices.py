"""`stroma prices`."""

from __future__ import annotations

from typing import Any, Final

import click

from stroma._utils.text import clean
from stroma.cli.errors import Code, Problem
from stroma.cli.output import emit_fields, err, out, table
from stroma.cost.prices import (
    KNOWN_MODELS,
    ModelPrices,
    Rates,
    Steps,
    data_state,
    kinds,
    prices_of,
    update_prices,
)

_KINDS: Final = {
    "input": "input",
    "cached_input": "  from a cache",
    "cache_write": "  to a cache",
    "cache_write_1h": "  to a cache for 1 h",
    "output": "output",
}


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--update-prices", "update", is_flag=True, help="Fetch current prices first, for this command only."
)
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.prices/1".')
def prices(models: tuple[str, ...], update: bool, as_json: bool) -> int:
    """Show the prices used for a model, their source and their date.

    In US dollars per million tokens. Entries that your own code adds to KNOWN_MODELS are not included.
    """
    if update:
        try:
            update_prices()
        except RuntimeError as error:
            err.line(("stroma: ", "bold red"), clean(str(error)))
    by_model = {model: prices_of(model) for model in dict.fromkeys(models)}
    unknown = [model for model, entry in by_model.items() if entry is None]
    if as_json:
        version, fetched_at = data_state()
        emit_fields(
            "stroma.prices/1",
            genai_prices=version,
            fetched_at=None if fetched_at is None else fetched_at.isoformat(timespec="seconds"),
            models=[_data(model, entry) for model, entry in by_model.items()],
        )
    else:
        for entry in by_model.values():
            if entry is not None:
                _show(entry)
    if unknown:
        raise Problem(
            f"no price for {', '.join(clean(model, 80) for model in unknown)}, which would count as $0",
            'give it one in your code: stroma.KNOWN_MODELS["..."] = (input, output), US dollars per '
            "million tokens",
            code=Code.NOT_FOUND,
        )
    return Code.OK


def _data(model: str, entry: ModelPrices | None) -> dict[str, Any]:
    if entry is None:
        return {"model": model, "source": None, "listed_as": None, "rates": {}}
    return {
        "model": model,
        "source": entry.source,
        "listed_as": None
        if entry.listed_as is None
        else dict(zip(("provider", "id"), entry.listed_as, strict=True)),
        "rates": {tier: _rates(rates) for tier, rates in entry.rates.items()},
    }


def _rates(rates: Rates) -> dict[str, Any]:
    shown_rates: dict[str, Any] = {name: _steps(steps) for name, steps in kinds(rates)}
    return {**shown_rates, "request_usd": rates.request_usd}


def _steps(steps: Steps) -> list[dict[str, Any]]:
    """Return the price steps in ascending order; ``above`` is in input tokens."""
    return [{"above": max(above, 0), "usd_per_million": price} for above, price in reversed(steps)]


def _show(entry: ModelPrices) -> None:
    out.fitted((clean(entry.model, 80), "bold"), f": {_source(entry)}")
    sizes = sorted(
        {above for rates in entry.rates.values() for _, steps in kinds(rates) for above, _ in steps}
    )
    tiers = list(entry.rates)
    rows = []
    for name, label in _KINDS.items():
        if not any(name == kind for rates in entry.rates.values() for kind, _ in kinds(rates)):
            continue
        for above in sizes:
            cells = [_at(entry.rates[tier], name, above) for tier in tiers]
            if above < 0 or any(cells):
                rows.append([label if above < 0 else f"{label}, above {above:,}", *cells, ""])
    table(
        out,
        ("PER MILLION TOKENS", *map(str.upper, tiers), ""),
        rows,
        right=frozenset(range(1, len(tiers) + 1)),
    )
    request = entry.rates["standard"].request_usd
    if request:
        out.line(f"and ${request:g} for each call")


def _at(rates: Rates, name: str, above: int) -> str:
    steps = dict(kinds(rates)).get(name, ())
    return next((f"${price:g}" for start, price in steps if start == above), "")


def _source(entry: ModelPrices) -> str:
    as_of = f"fetched {entry.fetched_at:%Y-%m-%d %H:%M}" if entry.fetched_at else "as installed"
    listed = "" if entry.listed_as is None else f"{'/'.join(entry.listed_as)} in "
    data = f"{listed}genai-prices {entry.version} ({as_of})"
    if entry.source == "genai-prices":
        return data
    name = entry.model if entry.model in KNOWN_MODELS or entry.listed_as is None else entry.listed_as[1]
    rest = f"; the other prices in proportion to {data}" if entry.listed_as else ""
    return f"KNOWN_MODELS[{name!r}]{rest}"
