"""Views of the messages of the Claude Agent SDK: the end of a query, its usage, and its text as it is streamed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final

from claude_agent_sdk import ResultMessage, StreamEvent

from stroma.cost.usage import Usage, usage_from

__all__ = ["answer_of", "delta_of", "result_of", "used_by", "whole_of"]

#: Counts of a model in what the program says about each.
_COUNTS: Final = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")


def whole_of(messages: list[Any]) -> dict[str, Any]:
    """Return the end of a query and the model that answered."""
    models = [message.model for message in messages if getattr(message, "model", None)]
    ends = [message for message in messages if isinstance(message, ResultMessage)]
    return {"end": ends[-1] if ends else None, "model": models[-1] if models else None}


def used_by(whole: dict[str, Any]) -> Any:
    """Return the usage of a query: what the program says it cost, and the tokens of all its models where it says these."""
    end = whole["end"]
    if end is None:
        return None
    cost, by_model = getattr(end, "total_cost_usd", None), getattr(end, "model_usage", None)
    if not by_model:
        used = usage_from(end.usage, model=whole["model"]) if end.usage else None
        return (
            dataclasses.replace(used or Usage(model=whole["model"]), cost_usd=cost) if used or cost else None
        )
    counts = [sum(one.get(name) or 0 for one in by_model.values()) for name in _COUNTS]
    fresh, output_tokens, cached, written = counts
    return Usage(
        fresh + cached + written, output_tokens, cached, written, model=whole["model"], cost_usd=cost
    )


def delta_of(message: Any) -> str | None:
    """Return the text of a partial message, with ``include_partial_messages``; not that of a subagent."""
    if not isinstance(message, StreamEvent) or message.parent_tool_use_id is not None:
        return None
    delta = message.event.get("delta") or {}
    return delta.get("text") if delta.get("type") == "text_delta" else None


def answer_of(whole: dict[str, Any]) -> dict[str, Any]:
    return {"result": getattr(whole["end"], "result", None)}


def result_of(result: Any) -> Any:
    parts = result.get("content", ()) if isinstance(result, dict) else ()
    text = "".join(part.get("text", "") for part in parts)
    try:
        return json.loads(text)
    except ValueError:
        return text
