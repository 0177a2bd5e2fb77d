"""What LangGraph, LangChain and Deep Agents have in common: who counts the tokens of a model call, and what a message says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

from stroma.adapters._calls import handed_on
from stroma.context import NodeExecution, current_node
from stroma.cost import BudgetExceeded, estimate_cost_usd
from stroma.usage import Usage

__all__ = ["counting", "usage_of"]


class _Counter(BaseCallbackHandler):
    """Books every model call on the innermost step around it, and refuses one that the budget has no room for.

    There is one for the whole process, so that LangChain never adds it twice, and it keeps nothing but who asked.
    """

    raise_error = True  # What it raises stops the call.
    run_inline = True  # On the task that calls the model, where the step is known.

    def __init__(self) -> None:
        self._asked_by: dict[UUID, NodeExecution] = {}

    def on_chat_model_start(self, *_: Any, run_id: UUID, **__: Any) -> None:
        node = current_node()
        if node is not None:
            _refuse_beyond_budget(node)
            self._asked_by[run_id] = node

    on_llm_start = on_chat_model_start

    def on_llm_new_token(self, *_: Any, **__: Any) -> None:
        handed_on()  # Models stream only where somebody listens.

    def on_llm_end(self, response: Any, *, run_id: UUID, **_: Any) -> None:
        node = self._asked_by.pop(run_id, None)
        if node is None:
            return
        used = usage_of(response)
        if used is not None:
            node.report_usage(used)
        elif node.ctx.limits:
            node.ctx.run_logger.warning(
                "a model call in node %r does not say what it used: it counts as 0 against the budget",
                node.node_id,
            )

    def on_llm_error(self, *_: Any, run_id: UUID, **__: Any) -> None:
        self._asked_by.pop(run_id, None)


def _refuse_beyond_budget(node: NodeExecution) -> None:
    """A node may call its model many times before the engine looks at the budget: look at each call."""
    ctx = node.ctx
    if not ctx.limits:
        return
    ctx.cost_tracker.check_budget(ctx.budget, node.node_id)
    tokens, cost, inner = 0, 0.0, node
    while True:
        for given, made, model, _ in inner.reported or ():
            tokens += given + made
            cost += 0.0 if model is None else estimate_cost_usd(model, given, made)
        if inner.parent is None:
            break
        inner = inner.parent
    for dimension, more in (("tokens", tokens), ("cost", cost)):
        limit = dict(ctx.limits).get(dimension)  # type: ignore[call-overload]
        used = ctx.cost_tracker.used(dimension) + more  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        if limit is not None and used > limit:
            raise BudgetExceeded(dimension, limit, used, node.node_id)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


_COUNTER = _Counter()
_HERE: ContextVar[BaseCallbackHandler | None] = ContextVar("stroma_langchain_counter", default=None)
register_configure_hook(_HERE, inheritable=True)


@contextmanager
def counting() -> Iterator[None]:
    """Around a step: its model calls are counted, in its threads and tasks too."""
    token = _HERE.set(_COUNTER)
    try:
        yield
    finally:
        _HERE.reset(token)


def usage_of(result: Any) -> Usage | None:
    """What the messages of an ``LLMResult`` say that they used."""
    used = [
        _of_message(choice.message)
        for prompt in result.generations
        for choice in prompt
        if hasattr(choice, "message")
    ]
    found = [usage for usage in used if usage is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else _sum(found)


def _of_message(message: Any) -> Usage | None:
    said = getattr(message, "usage_metadata", None)
    if not said:
        return None
    given, details = said.get("input_tokens", 0), said.get("input_token_details") or {}
    cached = min(details.get("cache_read") or 0, given)
    about = getattr(message, "response_metadata", None) or {}
    return Usage(
        given,
        said.get("output_tokens", 0),
        cached_input_tokens=cached,
        cache_write_tokens=min(details.get("cache_creation") or 0, given - cached),
        model=about.get("model_name") or about.get("model"),
    )


def _sum(parts: list[Usage]) -> Usage:
    return Usage(
        sum(part.input_tokens for part in parts),
        sum(part.output_tokens for part in parts),
        sum(part.cached_input_tokens for part in parts),
        sum(part.cache_write_tokens for part in parts),
        parts[0].model,
    )
