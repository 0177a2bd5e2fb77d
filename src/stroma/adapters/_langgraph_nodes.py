"""One node of LangGraph as a step."""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph._internal._runnable import RunnableCallable
from langgraph.errors import GraphBubbleUp, GraphInterrupt, GraphRecursionError, ParentCommand

from stroma.adapters._langchain_messages import update
from stroma.adapters._langchain_usage import counting
from stroma.adapters._step import Control, as_at_first, kept_for_retries
from stroma.adapters.guard import Guard
from stroma.contracts.contract import NodeContract

__all__ = ["control", "guarded"]


def guarded(inner: Any, guard: Guard, step_id: str, contract: NodeContract[Any, Any] | None) -> Any:
    """What a node runs, as a step: a Runnable still, so that config, runtime and control flow are LangGraph's."""

    def call(state: Any, config: Any, first: Any) -> Any:
        with counting():
            return inner.invoke(as_at_first(state, first), config)

    async def acall(state: Any, config: Any, first: Any) -> Any:
        with counting():
            return await inner.ainvoke(as_at_first(state, first), config)

    options: Any = {
        "contract": contract,
        "given": lambda args, _: args[2],
        "made": update,
        "control": control,
    }
    step, astep = guard.wrap(step_id, call, **options), guard.wrap(step_id, acall, **options)

    def func(state: Any, config: RunnableConfig) -> Any:
        _ = inner  # LangGraph looks for subgraphs in the variables of this function.
        return step(state, config, kept_for_retries(state))

    async def afunc(state: Any, config: RunnableConfig) -> Any:
        return await astep(state, config, kept_for_retries(state))

    guard.mark(func)
    return RunnableCallable(
        func, afunc, name=getattr(inner, "name", None) or step_id, trace=False, recurse=False
    )


def control(error: BaseException) -> Control | None:
    """What an exception of LangGraph means."""
    if isinstance(error, GraphInterrupt):
        return Control(
            "suspended", "; ".join(str(asked.value) for asked in error.args[0]) if error.args else None
        )
    if isinstance(error, ParentCommand):
        return Control("returned", error.args[0])
    return Control("passed") if isinstance(error, (GraphBubbleUp, GraphRecursionError)) else None
