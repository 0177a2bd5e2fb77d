"""Haystack: the components of a pipeline as steps.

::

    pipeline = attach(pipeline, Guard(runner), {"llm": (Prompt, Replies)})
    pipeline.run({...})  # a run
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from stroma.adapters._releases import imports_of

with imports_of("haystack"):
    from haystack.core.errors import BreakpointException
    from haystack.core.pipeline.base import PipelineBase
    from haystack.tools import ComponentTool, Toolset

from stroma.adapters._delegation import before, guard_methods, wrap_method
from stroma.adapters._step import Control, copy_for_retries, mark_published
from stroma.adapters.guard import Contracts, Guard
from stroma.contracts.contract import NodeContract
from stroma.cost.usage import Usage, UsageError, usage_from

__all__ = ["attach"]

T = TypeVar("T")


def attach(pipeline: T, guard: Guard, contracts: Contracts | None = None) -> T:
    """Make steps of the components of a pipeline, and of what is inside them; changes it and returns it.

    ``contracts``: by the names that the pipeline has for its components; input is what goes into one, output
    what comes out. Each run of the pipeline is a run of the guard, and guards the components that were added
    since. Raises UnknownNode for a contract of no component, TypeError for anything but a pipeline, such as
    an Agent that is in none.
    """
    target: Any = pipeline
    if not isinstance(pipeline, PipelineBase):
        raise TypeError(
            f"attach() takes a Pipeline, got {type(pipeline).__name__}; add it to a Pipeline as a "
            "component, and attach that"
        )
    by_name = guard.contracts(contracts, target.graph.nodes, "component")
    _guard_components(target, guard, by_name)

    def renewed(call: Callable[..., Any]) -> Callable[..., Any]:
        first = lambda self, *_, **__: _guard_components(self, guard, by_name)  # noqa: E731
        return guard.each_call(before(call, first), _data)

    def over(parts: Callable[..., Any]) -> Callable[..., Any]:
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            _guard_components(self, guard, by_name)
            return guard.aover(lambda: parts(self, *args, **kwargs), _data((self, *args), kwargs))

        return generate

    for name in ("run", "run_async"):
        wrap_method(target, name, guard, renewed)
    wrap_method(target, "run_async_generator", guard, over)
    return pipeline


def _guard_components(pipeline: Any, guard: Guard, contracts: dict[str, NodeContract[Any, Any]]) -> None:
    for name, component in pipeline.graph.nodes(data="instance"):
        _guard_component(component, guard, name, contracts.get(name))


def _guard_component(
    component: Any, guard: Guard, name: str, contract: NodeContract[Any, Any] | None = None
) -> None:
    passes = lambda error: Control("passed") if isinstance(error, BreakpointException) else None  # noqa: E731
    sent = lambda _, kwargs: kwargs.get("messages") or kwargs.get("prompt")  # noqa: E731
    about: Any = {"input_view": lambda _, kwargs: kwargs, "usage": _used, "control": passes}
    around = functools.partial(_around, guard)
    guard_methods(
        component, ("run", "run_async"), guard, name, around, contract=contract, messages=sent, **about
    )
    for attribute, value in list(vars(component).items()):
        if not attribute.startswith("__"):
            _guard_inside(value, guard, f"{name}.{attribute.removeprefix('_')}")
    callback = vars(component).get("streaming_callback")
    if callable(callback):
        component.streaming_callback = _publishing(callback)


def _guard_inside(value: Any, guard: Guard, name: str) -> None:
    """Guard what a component has inside: pipelines, components such as an agent's generator, and tools."""
    if isinstance(value, PipelineBase):
        attach(value, guard)
    elif isinstance(value, ComponentTool):
        _guard_component(value._component, guard, value.name)
    elif isinstance(value, Toolset):
        _guard_inside(getattr(value, "tools", None), guard, name)
    elif type(value) in (list, tuple):
        for number, each in enumerate(value):
            _guard_inside(each, guard, f"{name}.{number}")
    elif hasattr(value, "__haystack_input__"):
        _guard_component(value, guard, name)


def _around(guard: Guard, bare: Any) -> Any:
    """Return a component's method with copies of its inputs for each attempt, and with a watched stream."""

    def inputs(kwargs: dict[str, Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = copy_for_retries(kwargs)
        # Not the sentinel of a SuperComponent, which stands for the default of the component inside.
        if callable(callback := inputs.get("streaming_callback")) and not isinstance(callback, type):
            inputs["streaming_callback"] = _publishing(callback)
        _guard_inside(inputs.get("tools"), guard, "tools")
        return inputs

    def call(*args: Any, **kwargs: Any) -> Any:
        return bare(*args, **inputs(kwargs))

    async def acall(*args: Any, **kwargs: Any) -> Any:
        return await bare(*args, **inputs(kwargs))

    return acall if inspect.iscoroutinefunction(bare) else call


def _publishing(callback: Any) -> Any:
    if hasattr(callback, "_stroma_publishes"):
        return callback
    # With the names of the callback, by which Haystack stores it.
    wrapper = before(callback, lambda *_, **__: mark_published())
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
    return {"data": kwargs.get("data", args[1] if len(args) > 1 else None)}
