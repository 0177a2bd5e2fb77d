"""Definition of flows: the decorator, and the checks of what it decorates."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Generic, TypeVar, Unpack, overload

from pydantic import BaseModel

from stroma.contracts.annotations import annotation_of, check_annotations
from stroma.contracts.contract import NodeContract
from stroma.runner.flows.flow import Flow, FlowFunction, FlowLimits

__all__ = ["AnnotatedFlowDecorator", "FlowDecorator", "define_flow", "stroma_flow"]

In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)


def define_flow(
    flow_id: str,
    body: Any,
    schemas: tuple[type[BaseModel] | None, type[BaseModel] | None],
    limits: FlowLimits,
    scope: FrameType,
) -> FlowFunction[Any, Any]:
    """Return a function as a flow. Raises TypeError for one that cannot be the body of a flow.

    ``schemas``: those of input and output; None: as annotated. ``scope``: the frame that decorates.
    """
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
    input_model = _class_of(flow_id, "input", schemas[0], annotation_of(body, parameters[1], scope))
    output_model = _class_of(flow_id, "output", schemas[1], annotation_of(body, "return", scope))
    contract: NodeContract[Any, Any] = NodeContract(
        node_id=flow_id, input_schema=input_model, output_schema=output_model
    )
    check_annotations(f"flow {flow_id!r}", body, contract, scope, position=1)
    return FlowFunction(flow_id, body, contract, **limits)


def _class_of(flow_id: str, what: str, passed: Any, annotated: Any) -> type[BaseModel]:
    if passed is None:
        if not (isinstance(annotated, type) and issubclass(annotated, BaseModel)):
            raise TypeError(f"flow {flow_id!r} needs {what}=, or the annotation of a pydantic model")
        return annotated
    if not (isinstance(passed, type) and issubclass(passed, BaseModel)):
        raise TypeError(f"flow {flow_id!r}: {what}= must be a pydantic model, got {passed!r}")
    return passed


class FlowDecorator(typing.Protocol, Generic[In, Out]):
    """Makes a flow of an async function of ``(flow, state)``."""

    def __call__(self, body: Callable[[Flow, In], Coroutine[Any, Any, Out]], /) -> FlowFunction[In, Out]: ...


class AnnotatedFlowDecorator(typing.Protocol):
    """Makes a flow of an async function of ``(flow, state)``, with the classes of its annotations."""

    def __call__(self, body: Callable[[Flow, In], Coroutine[Any, Any, Out]], /) -> FlowFunction[In, Out]: ...


@overload
def stroma_flow(
    flow_id: str, *, input: type[In], output: type[Out], **limits: Unpack[FlowLimits]
) -> FlowDecorator[In, Out]: ...
@overload
def stroma_flow(flow_id: str, **limits: Unpack[FlowLimits]) -> AnnotatedFlowDecorator: ...
def stroma_flow(
    flow_id: str,
    *,
    input: type[BaseModel] | None = None,
    output: type[BaseModel] | None = None,
    **limits: Unpack[FlowLimits],
) -> Any:
    """Make a flow of an async function of ``(flow, state)``: a pipeline that decides in plain Python what comes next.

    Args:
        flow_id: name of the flow in stores, metrics and spans.
        input: pydantic model of its input. Default: the annotation of ``state``.
        output: pydantic model of its output. Default: the annotation of the returned value.
        limits: see FlowLimits.
    """
    return lambda body: define_flow(flow_id, body, (input, output), limits, sys._getframe(1))
