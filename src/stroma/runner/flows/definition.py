"""Definition of flows: the decorator, and the checks of what it decorates."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Generic, TypeVar, Unpack, overload

from pydantic import BaseModel

from stroma.contracts.annotations import infer_contract
from stroma.contracts.node import name_of
from stroma.runner.flows.flow import Flow, FlowFunction, FlowLimits

__all__ = ["AnnotatedFlowDecorator", "FlowDecorator", "define_flow", "stroma_flow"]

In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)


def define_flow(
    flow_id: str | None,
    body: Any,
    schemas: tuple[type[BaseModel] | None, type[BaseModel] | None],
    limits: FlowLimits,
    scope: FrameType,
) -> FlowFunction[Any, Any]:
    """Return a function as a flow. Raises TypeError for one that cannot be the body of a flow.

    ``flow_id``: by default the function's name. ``schemas``: of input and output; None: as annotated. ``scope``: the frame that decorates.
    """
    if flow_id is None:
        flow_id = name_of(body)
    name = getattr(body, "__qualname__", repr(body))
    if inspect.isasyncgenfunction(body):
        raise TypeError(
            f"flow {flow_id!r}: {name} is an async generator; return the output in place of yielding it"
        )
    if not inspect.iscoroutinefunction(body):
        raise TypeError(f"flow {flow_id!r}: {name} must be an `async def` function of (flow, state)")
    max_concurrency = limits.get("max_concurrency")
    if max_concurrency is not None and (not isinstance(max_concurrency, int) or max_concurrency < 1):
        raise ValueError(f"max_concurrency must be at least 1, or None for no bound, got {max_concurrency!r}")
    parameters = list(inspect.signature(body).parameters)
    if len(parameters) < 2:
        raise TypeError(f"flow {flow_id!r}: {name} must take (flow, state), got ({', '.join(parameters)})")
    contract = infer_contract("flow", flow_id, body, schemas, scope)
    return FlowFunction(flow_id, body, contract, **limits)


class FlowDecorator(typing.Protocol, Generic[In, Out]):
    """Makes a flow of an async function of ``(flow, state)``."""

    def __call__(self, body: Callable[[Flow, In], Coroutine[Any, Any, Out]], /) -> FlowFunction[In, Out]: ...


class AnnotatedFlowDecorator(typing.Protocol):
    """Makes a flow of an async function of ``(flow, state)``, with the classes of its annotations."""

    def __call__(self, body: Callable[[Flow, In], Coroutine[Any, Any, Out]], /) -> FlowFunction[In, Out]: ...


@overload
def stroma_flow(body: Callable[[Flow, In], Coroutine[Any, Any, Out]], /) -> FlowFunction[In, Out]: ...
@overload
def stroma_flow(
    flow_id: str | None = None, *, input: type[In], output: type[Out], **limits: Unpack[FlowLimits]
) -> FlowDecorator[In, Out]: ...
@overload
def stroma_flow(flow_id: str | None = None, **limits: Unpack[FlowLimits]) -> AnnotatedFlowDecorator: ...
def stroma_flow(
    flow_id: str | Callable[..., Any] | None = None,
    *,
    input: type[BaseModel] | None = None,
    output: type[BaseModel] | None = None,
    **limits: Unpack[FlowLimits],
) -> Any:
    """Make a flow of an async function of ``(flow, state)``: a pipeline that decides in plain Python what comes next.

    Args:
        flow_id: name of the flow in stores, metrics and spans. Default: the name of the function; then
            ``@stroma_flow`` needs no parentheses.
        input: pydantic model of its input. Default: the annotation of ``state``.
        output: pydantic model of its output. Default: the annotation of the returned value.
        limits: see FlowLimits.
    """
    if callable(flow_id):
        return define_flow(None, flow_id, (input, output), limits, sys._getframe(1))
    return lambda body: define_flow(flow_id, body, (input, output), limits, sys._getframe(1))
