"""Claude Agent SDK: queries and your own tools as steps.

::

    tools = guarded_tools(guard, [weather], {"weather": (City, Weather)})
    async for message in guarded_query(guard)(prompt="...", options=options):  # a run
        ...
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

from stroma.adapters._releases import import_error, warn_if_untested

try:
    from claude_agent_sdk import ClaudeAgentOptions, ResultMessage, query
except ImportError as error:
    raise import_error("claude-agent-sdk", error) from error

from stroma.adapters.guard import Contracts, Guard, what_stopped
from stroma.cost.usage import Usage, usage_from
from stroma.engine.execution import current_run

warn_if_untested("claude-agent-sdk")

__all__ = ["guarded_query", "guarded_tools"]

#: Counts of a model in what the program says about each.
_COUNTS: Final = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")
#: What stopped a run inside a tool, by the run: the SDK tells the model of it, and would continue.
_FATAL: dict[str, BaseException] = {}


def guarded_query(guard: Guard) -> Callable[..., AsyncIterator[Any]]:
    """Return the SDK's ``query`` as a function whose calls are runs with a step ``query``.

    What is left of the budget's dollars is its ``max_budget_usd``, where the release has that; tokens are known at its end.
    """
    # The program reports what it used itself; what our tools use is beside that.
    about: Any = {
        "input_view": _input_view,
        "output_view": _answer,
        "usage": _used,
        "collect": _whole,
        "usage_includes_calls": False,
        "role": "agent",
    }
    step: Any = guard.wrap("query", _messages, **about)

    def run(**options: Any) -> AsyncIterator[Any]:
        return guard.aover(lambda: step(**options), _input_view((), options))

    return run


def guarded_tools(guard: Guard, tools: Sequence[Any], contracts: Contracts | None = None) -> list[Any]:
    """Return tools for ``create_sdk_mcp_server`` as steps; input is the arguments, output the parsed text."""
    by_name = guard.contracts(contracts, [tool.name for tool in tools], "tool")
    guarded = []
    for tool in tools:
        step = guard.wrap(
            tool.name,
            tool.handler,
            contract=by_name.get(tool.name),
            input_view=lambda a, _: a[0],
            output_view=_result,
            role="tool",
        )
        guarded.append(dataclasses.replace(tool, handler=_noting(step)))
    return guarded


def _noting(step: Any) -> Any:
    async def handler(arguments: Any) -> Any:
        try:
            return await step(arguments)
        except Exception as error:
            run = current_run()
            if run is not None and what_stopped(error) is not None:
                _FATAL[run.run_id] = error
            raise

    return handler


async def _messages(*, options: Any = None, **kwargs: Any) -> Any:
    run = current_run()
    assert run is not None
    limit = run.budget.max_cost_usd
    if limit is not None and "max_budget_usd" in {
        field.name for field in dataclasses.fields(ClaudeAgentOptions)
    }:
        options = options or ClaudeAgentOptions()
        left = max(0.0, limit - run.cost_tracker.used("cost"))
        limit = options.max_budget_usd
        options = dataclasses.replace(options, max_budget_usd=left if limit is None else min(left, limit))
    async for message in query(options=options, **kwargs):
        fatal = _FATAL.pop(run.run_id, None)
        if fatal is not None:
            raise fatal
        yield message


def _whole(messages: list[Any]) -> dict[str, Any]:
    """Return the end of a query and the model that answered."""
    models = [message.model for message in messages if getattr(message, "model", None)]
    ends = [message for message in messages if isinstance(message, ResultMessage)]
    return {"end": ends[-1] if ends else None, "model": models[-1] if models else None}


def _used(whole: dict[str, Any]) -> Any:
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


def _answer(whole: dict[str, Any]) -> dict[str, Any]:
    return {"result": getattr(whole["end"], "result", None)}


def _input_view(_: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    prompt = kwargs.get("prompt")
    return {"prompt": prompt if isinstance(prompt, str) else type(prompt).__name__}


def _result(result: Any) -> Any:
    parts = result.get("content", ()) if isinstance(result, dict) else ()
    text = "".join(part.get("text", "") for part in parts)
    try:
        return json.loads(text)
    except ValueError:
        return text
