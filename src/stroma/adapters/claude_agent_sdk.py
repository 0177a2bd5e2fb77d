"""Claude Agent SDK: queries and your own tools as steps.

::

    tools = guarded_tools(guard, [weather], {"weather": (City, Weather)})
    async for message in guarded_query(guard)(prompt="...", options=options):  # a run
        ...
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

from stroma.adapters._patches import patch
from stroma.adapters._releases import imports_of

with imports_of("claude-agent-sdk"):
    import claude_agent_sdk
    from claude_agent_sdk import (
        ClaudeAgentOptions,
        ClaudeSDKClient,
        ClaudeSDKError,
        Message,
        ResultMessage,
        SdkMcpTool,
        StreamEvent,
        query,
    )

from stroma.adapters._guarded_run import active_run
from stroma.adapters._state_views import parse_text
from stroma.adapters._step import Control, emit_text
from stroma.adapters.guard import Contracts, Guard, what_stopped
from stroma.cost.usage import Usage, usage_from
from stroma.engine.execution import CURRENT

__all__ = ["guarded_query", "guarded_tools"]

#: HTTP statuses of the errors of an answer.
_STATUS: Final = {
    "authentication_failed": 401,
    "billing_error": 402,
    "rate_limit": 429,
    "invalid_request": 400,
    "server_error": 500,
}
#: Dollars and tokens of the session that are counted already, by client: its results have those of the
#: session so far.
_COUNTED: WeakKeyDictionary[Any, Usage] = WeakKeyDictionary()


def guarded_query(guard: Guard) -> Callable[..., AsyncIterator[Message]]:
    """Return the SDK's ``query`` as a function whose calls are runs with a step ``query``.

    What is left of the budget's dollars is its ``max_budget_usd``, where the release has that; tokens are
    known at its end.
    """
    patch(guard, ClaudeSDKClient, "receive_messages", _count_results)
    # The program reports what it used itself; what our tools use is beside that.
    about: Any = {
        "input_view": _input_view,
        "output_view": _answer_of,
        "messages": lambda _, kwargs: _input_view((), kwargs)["prompt"],
        "usage": _used_by,
        "collect": _whole_of,
        "delta": _delta_of,
        "usage_includes_calls": False,
        "role": "agent",
    }
    step: Any = guard.wrap("query", functools.partial(_messages, guard), **about)

    def run(**options: Any) -> AsyncIterator[Message]:
        return guard.aover(lambda: step(**options), _input_view((), options))

    return run


def guarded_tools(
    guard: Guard, tools: Sequence[SdkMcpTool[Any]], contracts: Contracts | None = None
) -> list[SdkMcpTool[Any]]:
    """Return tools for ``create_sdk_mcp_server`` as steps; input is the arguments, output the parsed text."""
    patch(guard, ClaudeSDKClient, "receive_messages", _count_results)
    by_name = guard.contracts(contracts, [tool.name for tool in tools], "tool")
    guarded: list[SdkMcpTool[Any]] = []
    for tool in tools:
        step = guard.wrap(
            tool.name,
            tool.handler,
            contract=by_name.get(tool.name),
            input_view=lambda a, _: a[0],
            output_view=_result_of,
            judge=_judge,
            role="tool",
        )
        guarded.append(dataclasses.replace(tool, handler=_noting(step, guard)))
    return guarded


def _judge(answer: Any) -> Control | None:
    is_error = isinstance(answer, dict) and answer.get("is_error")
    return Control("passed", _text_of(answer)) if is_error else None


def _noting(step: Any, guard: Guard) -> Any:
    async def handler(arguments: Any) -> Any:
        try:
            return await step(arguments)
        except Exception as error:
            if what_stopped(error) is not None:  # The SDK tells the model of it, and would continue.
                guard.current.fatal = error
            raise

    return handler


async def _messages(guard: Guard, *, options: Any = None, **kwargs: Any) -> Any:
    run = guard.current
    limit = run.ctx.budget.max_cost_usd
    if limit is not None and "max_budget_usd" in {
        field.name for field in dataclasses.fields(ClaudeAgentOptions)
    }:
        options = options or ClaudeAgentOptions()
        left = max(0.0, limit - run.ctx.cost_tracker.used("cost"))
        limit = options.max_budget_usd
        options = dataclasses.replace(options, max_budget_usd=left if limit is None else min(left, limit))
    messages: list[Any] = []
    try:
        async for message in query(options=options, **kwargs):
            run.raise_fatal()
            messages.append(message)
            yield message
        run.raise_fatal()
    except Exception as error:
        _note_status(error, messages)
        raise
    finally:
        run.fatal = None
    end = _whole_of(messages)["end"]
    if end is not None and end.is_error:
        failed = _error_of(end)
        _note_status(failed, messages)
        raise failed


def _error_of(end: Any) -> Exception:
    """Return the error of a result, as the SDK raises it where the program ends with one."""
    what = "; ".join(map(str, getattr(end, "errors", None) or ())) or getattr(end, "result", None)
    text = f"Claude Code returned an error result: {what or end.subtype}"
    kind = getattr(claude_agent_sdk, "ResultError", None)  # Not in the lowest release.
    failed: Exception = ClaudeSDKError(text) if kind is None else kind(text, data=vars(end))
    return failed


def _note_status(error: Any, messages: list[Any]) -> None:
    """Add the HTTP status of the failed call of the model to an error, which is classified by it."""
    end = _whole_of(messages)["end"]
    if end is None or not end.is_error:
        return
    status = getattr(end, "api_error_status", None)
    if status is None:
        errors = [message.error for message in messages if getattr(message, "error", None) in _STATUS]
        prose = re.match(r"API Error: (\d{3})\b", getattr(end, "result", None) or "")
        status = int(prose[1]) if prose else _STATUS[errors[-1]] if errors else None
    if status is not None and getattr(error, "status_code", None) is None:
        error.status_code = status


def _input_view(_: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    prompt = kwargs.get("prompt")
    return {"prompt": prompt if isinstance(prompt, str) else type(prompt).__name__}


# ---------------------------------------------------------------------- the client


def _count_results(receive: Any) -> Any:
    """Return the client's ``receive_messages``, which counts its results in the run of a guard around it."""

    async def receive_messages(self: Any) -> AsyncIterator[Any]:
        messages: list[Any] = []
        async for message in receive(self):
            node = CURRENT.get()
            if node is not None and (text := _delta_of(message)):
                emit_text(node, text)
            run = active_run() if node is None else None
            if run is not None:
                run.raise_fatal()
            messages.append(message)
            if isinstance(message, ResultMessage):
                used = _since_last_result(self, message, _used_by(_whole_of(messages)))
                messages.clear()
                if run is not None and used is not None:
                    run.report_usage(used)
                    run.check_budget()
            yield message

    return receive_messages


def _since_last_result(client: Any, end: Any, used: Usage | None) -> Usage | None:
    """Return the usage since the client's last result. ``usage`` is of one turn, the rest of the session."""
    if used is None:
        return None
    before = _COUNTED.get(client, Usage())
    _COUNTED[client] = used
    names = ["cost_usd"]
    if getattr(end, "model_usage", None):
        names += ["input_tokens", "output_tokens", "cached_input_tokens", "cache_write_tokens"]
    changes = {}
    for name in names:
        now, then = getattr(used, name), getattr(before, name) or 0
        changes[name] = now if now is None or now < then else now - then  # Less: another session has begun.
    return dataclasses.replace(used, **changes)


# ---------------------------------------------------------------------- views

#: Counts of a model in what the program says about each.
_COUNTS: Final = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")


def _whole_of(messages: list[Any]) -> dict[str, Any]:
    """Return the end of a query, its text, and the model that answered."""
    models = [message.model for message in messages if getattr(message, "model", None)]
    ends = [message for message in messages if isinstance(message, ResultMessage)]
    end = ends[-1] if ends else None
    return {"end": end, "text": getattr(end, "result", None), "model": models[-1] if models else None}


def _used_by(whole: dict[str, Any]) -> Any:
    """Return the usage of a query: its stated cost, and the tokens of its models if stated."""
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


def _delta_of(message: Any) -> str | None:
    """Return the text of a partial message, with ``include_partial_messages``; not that of a subagent."""
    if not isinstance(message, StreamEvent) or message.parent_tool_use_id is not None:
        return None
    delta = message.event.get("delta") or {}
    return delta.get("text") if delta.get("type") == "text_delta" else None


def _answer_of(whole: dict[str, Any]) -> dict[str, Any]:
    return {"result": whole["text"]}


def _text_of(result: Any) -> str:
    parts = result.get("content", ()) if isinstance(result, dict) else ()
    return "".join(part.get("text", "") for part in parts)


def _result_of(result: Any) -> Any:
    return parse_text(_text_of(result))
