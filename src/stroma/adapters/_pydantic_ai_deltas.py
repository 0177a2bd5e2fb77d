"""The text of streamed answers of Pydantic AI."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta

from stroma.adapters._step import emit_delta
from stroma.engine.execution import NodeExecution

__all__ = ["emit_deltas", "emitting"]


def emit_deltas(response: Any, node: NodeExecution) -> None:
    """Have a streamed response emit its text on a node, while it is read."""
    response._event_iterator = emitting(aiter(response), node)


async def emitting(events: AsyncIterator[Any], node: NodeExecution) -> AsyncIterator[Any]:
    """Yield the events of a streamed response, and emit the text in them on a node."""
    async for event in events:
        if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
            emit_delta(node, event.part.content)
        elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
            emit_delta(node, event.delta.content_delta)
        yield event
