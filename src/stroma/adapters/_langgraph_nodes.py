"""One node of LangGraph as a step."""

from __future__ import annotations

import copy
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph._internal._runnable import RunnableCallable
from langgraph.errors import GraphBubbleUp, GraphInterrupt, GraphRecursionError, ParentCommand

from stroma._values import with_records
from stroma.adapters._langchain import counting
from stroma.adapters._langchain_messages import update
from stroma.adapters.guard import GUARDED, Control, Guard
from stroma.context import current_node
from stroma.contracts import NodeContract

__all__ = ["control", "guarded"]


def guarded(inner: Any, guard: Guard, step_id: str, contract: NodeContract[Any, Any] | None) -> Any:
    """What a node runs, as a step: a Runnable still, so that config, runtime and control flow are LangGraph's."""

    def call(state: Any, config: Any, first: Any) -> Any:
        with counting():
            return inner.invoke(_given(state, first), config)

    async def acall(state: Any, config: Any, first: Any) -> Any:
        with counting():
            return await inner.ainvoke(_given(state, first), config)

    options: Any = {
        "contract": contract,
        "given": lambda args, _: args[2],
        "made": update,
        "control": control,
    }
    step, astep = guard.wrap(step_id, call, **options), guard.wrap(step_id, acall, **options)

    def func(state: Any, config: RunnableConfig) -> Any:
        _ = inner  # LangGraph looks for subgraphs in the variables of this function.
        return step(state, config, with_records(state, copy.copy))

    async def afunc(state: Any, config: RunnableConfig) -> Any:
        return await astep(state, config, with_records(state, copy.copy))

    func.__dict__[GUARDED] = step_id
    return RunnableCallable(
        func, afunc, name=getattr(inner, "name", None) or step_id, trace=False, recurse=False
    )


def _given(state: Any, first: Any) -> Any:
    """The state itself; for another attempt, as it was before the first, which may have changed it."""
    node = current_node()
    return state if node is None or node.attempt == 1 else with_records(first, copy.copy)


def control(error: BaseException) -> Control | None:
    """What an exception of LangGraph means."""
    if isinstance(error, GraphInterrupt):
        return Control(
            "suspended", "; ".join(str(asked.value) for asked in error.args[0]) if error.args else None
        )
    if isinstance(error, ParentCommand):
        return Control("returned", error.args[0])
    return Control("passed") if isinstance(error, (GraphBubbleUp, GraphRecursionError)) else None
