"""Haystack: the components of a pipeline as steps.

::

    pipeline = attach(pipeline, Guard(runner), {"llm": (Prompt, Replies)})
    pipeline.run({...})  # a run
"""

from __future__ import annotations

import inspect
from typing import Any

from stroma.adapters._releases import import_error, warn_if_untested

try:
    from haystack.core.errors import BreakpointException
    from haystack.core.pipeline.base import PipelineBase
except ImportError as error:
    raise import_error("haystack", error) from error

from stroma.adapters._delegation import guard_methods
from stroma.adapters._step import Control, copy_for_retries, mark_published
from stroma.adapters.guard import Contracts, Guard
from stroma.contracts.contract import NodeContract
from stroma.cost.usage import Usage, UsageError, usage_from

warn_if_untested("haystack")

__all__ = ["attach"]


def attach(pipeline: Any, guard: Guard, contracts: Contracts | None = None) -> Any:
    """Make steps of the components of a pipeline, of pipelines inside it too; changes it and returns it.

    ``contracts``: by the names that the pipeline has for its components; input is what goes into one, output what comes
    out. Each run of the pipeline is a run of the guard. Raises UnknownNode for a contract of no component.
    """
    nodes = pipeline.graph.nodes(data="instance")
    by_name = guard.contracts(contracts, [name for name, _ in nodes], "component")
    for name, component in nodes:
        _guard_component(component, guard, name, by_name.get(name))
    for name in ("run", "run_async"):
        method = getattr(pipeline, name, None)
        if method is not None and not guard.has(method):
            setattr(pipeline, name, guard.each_call(method, _data))
    parts = getattr(pipeline, "run_async_generator", None)
    if parts is not None and not guard.has(parts):
        over = lambda *args, **kwargs: guard.aover(lambda: parts(*args, **kwargs), _data(args, kwargs))  # noqa: E731
        pipeline.run_async_generator = guard.mark(over)
    return pipeline


def _guard_component(
    component: Any, guard: Guard, name: str, contract: NodeContract[Any, Any] | None
) -> None:
    inner = getattr(component, "pipeline", None)
    if isinstance(inner, PipelineBase):
        attach(inner, guard)
    generator = getattr(component, "chat_generator", None)
    if generator is not None:  # An agent's.
        _guard_component(generator, guard, f"{name}.chat_generator", None)
    passes = lambda error: Control("passed") if isinstance(error, BreakpointException) else None  # noqa: E731
    about: Any = {"input_view": lambda _, kwargs: kwargs, "usage": _used, "control": passes}
    guard_methods(component, ("run", "run_async"), guard, name, _around, contract=contract, **about)
    if getattr(component, "streaming_callback", None) is not None:
        component.streaming_callback = _publishing(component.streaming_callback)


def _around(bare: Any) -> Any:
    """Return a component's method with copies of its inputs for each attempt, and with a watched stream."""

    def inputs(kwargs: dict[str, Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = copy_for_retries(kwargs)
        if inputs.get("streaming_callback") is not None:
            inputs["streaming_callback"] = _publishing(inputs["streaming_callback"])
        return inputs

    def call(*args: Any, **kwargs: Any) -> Any:
        return bare(*args, **inputs(kwargs))

    async def acall(*args: Any, **kwargs: Any) -> Any:
        return await bare(*args, **inputs(kwargs))

    return acall if inspect.iscoroutinefunction(bare) else call


def _publishing(callback: Any) -> Any:
    if hasattr(callback, "_stroma_publishes"):
        return callback

    def notify(chunk: Any) -> Any:
        mark_published()
        return callback(chunk)

    async def anotify(chunk: Any) -> Any:
        mark_published()
        return await callback(chunk)

    wrapper = anotify if inspect.iscoroutinefunction(callback) else notify
    wrapper.__dict__["_stroma_publishes"] = True
    return wrapper


def _used(result: Any) -> Usage | None:
    """Return the usage of the replies. All choices of one answer repeat the same usage, which counts once."""
    metas = [getattr(reply, "meta", None) for reply in result.get("replies") or ()]
    beside = result.get("meta")  # Of generators of plain text, and of embedders.
    metas += beside if isinstance(beside, list) else [beside]
    for meta in metas:
        if isinstance(meta, dict) and meta.get("usage"):
            try:
                return usage_from(meta["usage"], model=meta.get("model"))
            except UsageError:
                continue
    return None


def _data(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return {"data": kwargs.get("data", args[0] if args else None)}
