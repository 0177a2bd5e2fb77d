"""Responses of models of Pydantic AI: their usage, and the text of streamed ones."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta

from stroma.adapters._step import emit_delta
from stroma.cost.usage import cost_of_call, usage_from
from stroma.engine.execution import RunningNode

__all__ = ["emitting", "usage_of"]


async def emitting(events: AsyncIterator[Any], node: RunningNode) -> AsyncIterator[Any]:
    """Yield the events of a streamed response, and emit the text in them on a node."""
    async for event in events:
        if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
            emit_delta(node, event.part.content)
        elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
            emit_delta(node, event.delta.content_delta)
        yield event


def usage_of(response: Any) -> Any:
    """Return the usage of a response, or one that leaves it out as it is, which stops a run with a limit."""
    used, details = response.usage, response.provider_details or {}
    if getattr(used, "unmeasured_requests", 0) and not (used.input_tokens or used.output_tokens):
        return dataclasses.replace(response, usage=None)
    return dataclasses.replace(usage_from(response), cost_usd=_charged(used, details))


def _charged(used: Any, details: Any) -> float | None:
    """Return what a gateway says that a request cost, in dollars; None where it does not say."""
    cost = getattr(used, "cost", None)  # The framework adds its own estimate only after the step.
    # OpenRouter's fields are on one level.
    return cost_of_call({**details, "cost_details": details}) if cost is None else float(cost)
