"""Token counts of model calls, for LangGraph, LangChain and Deep Agents."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

from stroma.adapters._guarded_run import GuardedRun, active_run
from stroma.adapters._langchain_messages import usage_of
from stroma.adapters._step import emit_text, mark_published, report_uncounted, streams_inside
from stroma.cost.prices import cost_of
from stroma.cost.tracker import CostTracker
from stroma.engine.execution import NodeExecution, current_node_or_none

__all__ = ["acounted", "counted", "counting"]

_END: Final = object()


class _ModelCall(NamedTuple):
    """A call of a model: the step or run that makes it, and the texts of other models that the step had emitted before."""

    asked_by: NodeExecution | GuardedRun
    streamed: int


class _Counter(BaseCallbackHandler):
    """Counts every model call on the innermost step around it, else on the run, and refuses calls beyond the budget.

    Emits the text of streamed answers there. There is one for the whole process, so that LangChain never adds
    it twice, and it stores nothing but who asked.
    """

    raise_error = True  # What it raises stops the call.
    run_inline = True  # On the task that calls the model, where the step is known.
    ignore_chain = ignore_retriever = ignore_agent = True

    def __init__(self) -> None:
        self._calls: dict[UUID, _ModelCall] = {}

    def on_chat_model_start(self, *_: Any, run_id: UUID, **__: Any) -> None:
        asking = current_node_or_none() or active_run()  # Edges call models too.
        if asking is not None:
            _refuse_beyond_budget(asking)
            streamed = streams_inside(asking) if isinstance(asking, NodeExecution) else 0
            self._calls[run_id] = _ModelCall(asking, streamed)

    on_llm_start = on_chat_model_start

    def on_llm_new_token(self, token: Any, *, chunk: Any = None, run_id: UUID, **_: Any) -> None:
        self._emit(run_id, token if chunk is None else chunk.text)

    def on_stream_event(self, event: Any, *, run_id: UUID, **_: Any) -> None:
        delta = event.get("delta") or {}
        self._emit(run_id, delta.get("text") if delta.get("type") == "text-delta" else None)

    def _emit(self, run_id: UUID, text: Any) -> None:
        mark_published()  # Models stream only where somebody listens.
        call = self._calls.get(run_id)
        if call is None or not text or not isinstance(call.asked_by, NodeExecution):
            return
        if streams_inside(call.asked_by) == call.streamed:  # Else a step of litellm inside has emitted it.
            emit_text(call.asked_by, text)

    def on_llm_end(self, response: Any, *, run_id: UUID, **_: Any) -> None:
        call = self._calls.pop(run_id, None)
        if call is None:
            return
        asked_by = call.asked_by
        used = usage_of(response)
        if used is not None and isinstance(asked_by, NodeExecution):
            report_uncounted(asked_by, used)
        elif used is not None:
            asked_by.report_usage(used)
        elif asked_by.ctx.limits:
            asked_by.ctx.run_logger.warning(
                "a model call in %s does not say what it used: it counts as 0 against the budget",
                f"node {asked_by.node_id!r}" if isinstance(asked_by, NodeExecution) else "no node",
            )

    def on_llm_error(self, *_: Any, run_id: UUID, **__: Any) -> None:
        self._calls.pop(run_id, None)


def _refuse_beyond_budget(asking: NodeExecution | GuardedRun) -> None:
    """Check the budget before each model call, as a node may make many before the engine's own check."""
    ctx = asking.ctx
    if isinstance(asking, GuardedRun):
        asking.usage.check_budget()
        return
    if not ctx.limits:
        return
    spent = ctx.cost_tracker
    # What attempts under way have reported is in the totals only when they end.
    ahead = CostTracker()
    ahead.prior_tokens = spent.prior_tokens + spent.total_tokens
    ahead.prior_cost_usd = spent.prior_cost_usd + spent.total_cost_usd
    ahead.prior_latency_ms = spent.latency_ms
    node: NodeExecution | None = asking
    while node is not None:
        for report in node.reported or ():
            ahead.spend(report[0] + report[1], cost_of(report) or 0.0)
        node = node.parent
    ahead.check_budget(ctx.budget, asking.node_id)


_COUNTER = _Counter()
_HERE: ContextVar[BaseCallbackHandler | None] = ContextVar("stroma_langchain_counter", default=None)
register_configure_hook(_HERE, inheritable=True)


@contextmanager
def counting() -> Iterator[None]:
    """Around a step: its model calls are count_tokens, in its threads and tasks too."""
    token = _HERE.set(_COUNTER)
    try:
        yield
    finally:
        _HERE.reset(token)


def counted(parts: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """Iterate over a graph's stream and count the model calls that no step makes. LangChain passes the counter on."""
    with contextlib.closing(parts):
        with counting():
            first = next(parts, _END)
        if first is not _END:
            yield first
            yield from parts


async def acounted(parts: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Do the same as :func:`counted` for an async stream."""
    async with contextlib.aclosing(parts):
        with counting():
            first = await anext(parts, _END)
        if first is not _END:
            yield first
            async for part in parts:
                yield part
