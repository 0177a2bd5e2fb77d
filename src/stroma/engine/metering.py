"""Usage of an attempt: read from the return value and from reports, and priced."""

from __future__ import annotations

import asyncio
from typing import Any

from stroma.contracts.contract import RETURN_SHAPES
from stroma.cost.prices import cached_pricer, find_pricer
from stroma.cost.usage import MOST_USD, NO_MODEL, UsageError, check_usage, report_of, shown
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RunningNode
from stroma.engine.tasks import Shield, in_thread
from stroma.trace.events import AttemptUsage


def count_returned(run: RunningNode, returned: tuple[Any, ...]) -> tuple[Any, UsageError | None]:
    """Return the output of a tuple, and the error of its usage, which is recorded on the execution."""
    model: Any = None
    produced: Any = 0
    if len(returned) == 2:
        output, used = returned
        if type(used) is not int:
            try:
                report = report_of(run.node_id, used)
            except UsageError as error:
                return output, None if run.counts_as_zero(error) else error
            if report is not None:
                run.note_response(used)
                run.reported = [report] if run.reported is None else [*run.reported, report]
                return output, None
    elif len(returned) == 3:
        output, used, model = returned
    elif len(returned) == 4:
        output, used, produced, model = returned
    else:
        return returned, None  # The output contract will refuse it.
    if used is None or isinstance(used, str):
        misplaced = f"node {run.node_id!r} returned {shown(used)} in the place of the tokens"
        return output, UsageError(f"{misplaced}; {RETURN_SHAPES}")
    if model is not None and not isinstance(model, str):
        return output, UsageError(f"node {run.node_id!r} named the model {shown(model)}; {RETURN_SHAPES}")
    try:
        check_usage(run.node_id, used, produced)
    except UsageError as error:
        return output, error
    # As report_usage() does, which would check it once more.
    reported = (used, produced, model, None)
    run.reported = [reported] if run.reported is None else [*run.reported, reported]
    return output, None


async def price(
    ctx: ReliabilityContext, run: RunningNode
) -> tuple[asyncio.CancelledError | None, UsageError | None]:
    """Price the reported usage of the attempt. Return a cancellation meanwhile, and the error."""
    shield = Shield()
    problem = run.misreported
    if problem is not None:
        run.misreported = None
    tokens, produced, cost, named = 0, 0, 0.0, None
    cached, written = 0, 0
    reported, run.reported = run.reported or [], None
    for consumed, generated, model, detail in reported:
        tokens += consumed + generated
        produced += generated
        if detail is not None:
            cached += detail.cached_input_tokens
            written += detail.cache_write_tokens
            if detail.cost_usd is not None:  # What was charged needs no price.
                cost += detail.cost_usd
                named = named if model is None else model
                continue
        if model is None and not consumed + generated:
            continue
        named = named if model is None else model
        try:
            pricer = None if model is None else cached_pricer(model, detail)
            if pricer == "unread":
                assert model is not None
                # The price data takes a quarter of a second to import: not on the event loop.
                await shield.finish(in_thread(find_pricer, (model, detail)))
                pricer = find_pricer(model, detail)
            amount = 0.0 if pricer is None else pricer(consumed, generated)
            if not 0 <= amount <= MOST_USD:
                raise ValueError(f"it comes to {amount!r} USD")
        except Exception as error:  # The output is safe, whatever its price is.
            problem = UsageError(
                f"node {run.node_id!r} used model {model!r}, whose price makes no sense ({error}); "
                "give KNOWN_MODELS two finite numbers for it, zero or more"
            )
            continue
        cost += amount
        if pricer is None:
            problem = note_unpriced(ctx, run.node_id, f"node {run.node_id!r}", model) or problem
    run.counted = AttemptUsage(tokens, produced, cost, named, cached, written)
    return shield.cancellation, problem


def note_unpriced(ctx: ReliabilityContext, node_id: str, place: str, model: str | None) -> UsageError | None:
    """List a model without a price; return the error if a limit needs the price, else warn once.

    ``model``: None for tokens reported without a model. ``place``: the subject of the message.
    """
    account, chosen = ctx.account, ctx.config.unknown_model
    name = NO_MODEL if model is None else model
    is_listed = name in account.unpriced
    if not is_listed:
        account.unpriced += (name,)
    is_refused = ctx.has_limit("cost", node_id) if chosen is None else chosen == "error"
    if not is_refused:
        if not is_listed:
            if model is None:
                text = "reported tokens without a model: they count as 0 USD; report the model with them"
            else:
                text = (
                    f"used model {model!r}, which has no known price: it counts as 0 USD; add it to "
                    "KNOWN_MODELS"
                )
            ctx.run_logger.warning("%s %s", place, text)
        return None
    if model is None:
        return UsageError(
            f"{place} reported tokens without a model, so they have no price; report "
            "usage_from(response, model=...) or (output, input_tokens, output_tokens, model), or pass "
            'unknown_model="warn" to count them as 0 USD'
        )
    return UsageError(
        f"{place} used model {model!r}, which has no known price; add it to KNOWN_MODELS, or pass "
        'unknown_model="warn" to count it as 0 USD'
    )
