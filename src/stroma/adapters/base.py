"""Protocols of adapters, conversion of a state to a dict, and functions that were marked as nodes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel

from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.contracts.schema import schema_of
from stroma.engine.context import ReliabilityContext

__all__ = [
    "FrameworkAdapter",
    "LoopAdapter",
    "StepInterceptor",
    "TurnAdapter",
    "extract_state_dict",
    "marked",
    "marks_of",
]


@runtime_checkable
class FrameworkAdapter(Protocol):
    """Guards a whole graph, flow or agent of a framework."""

    def wrap(self, graph: Any) -> Any:
        """Guard what the framework runs, and return it."""
        ...

    def node_decorator(self, node_id: str, contract: NodeContract[Any, Any]) -> Callable[..., Any]:
        """Return a decorator that marks a function of the framework as a node with a contract."""
        ...


@runtime_checkable
class StepInterceptor(Protocol):
    """Makes a step of one function."""

    def wrap_step(
        self, step_id: str, func: Callable[..., Any], contract: NodeContract[Any, Any] | None = None
    ) -> Callable[..., Any]:
        """Return the function as a step with the same signature and results."""
        ...


@runtime_checkable
class LoopAdapter(Protocol):
    """For an agent's own loop, which calls tools itself and says so before and after."""

    def on_tool_call(self, tool_name: str, args: dict[str, Any], ctx: ReliabilityContext) -> dict[str, Any]:
        """Return the arguments of the tool, or raise to prevent the call."""
        ...

    def on_tool_result(self, tool_name: str, result: Any, ctx: ReliabilityContext) -> Any:
        """Return the result to use, or raise to reject it."""
        ...


@runtime_checkable
class TurnAdapter(Protocol):
    """Adapter for a conversation whose turns another program runs."""

    def on_turn_start(self, turn_id: str, message: Any, ctx: ReliabilityContext) -> Any:
        """Return the message to answer, or raise to prevent the turn."""
        ...

    def on_turn_end(self, turn_id: str, result: Any, ctx: ReliabilityContext) -> Any:
        """Return the answer to use, or raise to reject it."""
        ...


def extract_state_dict(state: Any) -> dict[str, Any]:
    """Return a new dict of a state: a mapping, model, dataclass, or object with ``dict()`` or attributes.

    Raises TypeError for what has none of them.
    """
    if isinstance(state, Mapping):
        return dict(state)
    if isinstance(state, BaseModel):
        # Not taken apart: what is validated next wants the instances inside.
        names = {*schema_of(type(state)).field_names, *(state.__pydantic_extra__ or {})}
        return {name: getattr(state, name) for name in names if hasattr(state, name)}
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    as_dict = getattr(state, "dict", None)
    if callable(as_dict) and not isinstance(state, type):
        data = as_dict()
        if isinstance(data, Mapping):
            return dict(data)
    if hasattr(state, "__dict__") and not isinstance(state, type) and not callable(state):
        return {name: value for name, value in vars(state).items() if not name.startswith("_")}
    raise TypeError(
        f"{type(state).__name__} is not a state; pass a dict, a pydantic model, a dataclass or "
        "an object with attributes"
    )


def marked(*candidates: Any) -> Any:
    """Return the first function with a marker, or None; partials and wrappers are unwrapped."""
    waiting = list(candidates)
    for func in waiting:
        if getattr(func, "_stroma_node_id", None) is not None:
            return func
        if isinstance(func, functools.partial):
            waiting.extend((func.func, *func.args))
    return None


def marks_of(func: Any, registry: ContractRegistry) -> tuple[str, NodeContract[Any, Any] | None]:
    """Return the id of a marked function and its contract: the registry's, else its own."""
    node_id: str = func._stroma_node_id
    return node_id, registry.find(node_id) or func._stroma_contract
