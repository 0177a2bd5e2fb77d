"""Annotations of the functions behind nodes and flows, compared with their contracts."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Union

from pydantic import BaseModel

from stroma.contracts.contract import NodeContract

__all__ = ["annotation_of", "check_annotations"]


def check_annotations(
    name: str, func: Any, contract: NodeContract[Any, Any], scope: types.FrameType | None, position: int = 0
) -> None:
    """Raise TypeError if a function is annotated with another model than its contract has.

    Accept whatever is not certainly wrong: no annotation, one that cannot be resolved, one that is not a
    model, a base or a subclass of the model, a union with one of these.

    Args:
        name: "node 'a'", for the message.
        func: the function. Other callables are not compared, nor are functions that a decorator wraps.
        contract: the contract that the decorator received.
        scope: the frame that decorates, for annotations that are strings.
        position: that of the state among the parameters, from 0.
    """
    if type(func) is types.MethodType:
        func, position = func.__func__, position + 1
    if type(func) is not types.FunctionType or {"__wrapped__", "__signature__"} & vars(func).keys():
        return
    if func.__code__.co_argcount > position:
        taken = annotation_of(func, func.__code__.co_varnames[position], scope)
        _compare(name, "input", contract.input_schema, taken)
    returned = annotation_of(func, "return", scope)
    if typing.get_origin(returned) is tuple and typing.get_args(returned):
        returned = typing.get_args(returned)[0]  # The others are usage.
    _compare(name, "output", contract.output_schema, returned)


def annotation_of(func: Callable[..., Any], name: str, scope: types.FrameType | None) -> Any:
    """Return the annotation of a parameter, or of "return"; Any without one, and for one that cannot be resolved.

    ``scope``: the frame that the function was defined in, if it is known.
    """
    try:
        annotation = func.__annotations__.get(name, Any)  # From Python 3.14 on this resolves it.
        namespaces = _namespaces_of(func, scope)

        def resolved() -> None: ...

        resolved.__annotations__ = {name: annotation}
        return typing.get_type_hints(resolved, *namespaces)[name]
    except Exception:  # A name that is known to type checkers only, or not yet.
        return Any


def _namespaces_of(
    func: Callable[..., Any], scope: types.FrameType | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the global and the local names that the annotations of a function can mean; empty where that is not certain."""
    names: dict[str, Any] = getattr(func, "__globals__", {})
    outer = func.__qualname__.rpartition(".")[0]
    if not outer:
        return names, {}
    if scope is None or scope.f_globals is not names or _inside(scope) != outer:
        return {}, {}
    local = dict(scope.f_locals)
    # Further out there are functions whose names this frame does not show.
    is_deep = outer.count("<locals>") > outer.endswith("<locals>")
    return ({} if is_deep else names), local


def _inside(scope: types.FrameType) -> str:
    """Return the beginning of the qualified names of what is defined in a frame."""
    code = scope.f_code
    return f"{code.co_qualname}.<locals>" if code.co_flags & inspect.CO_OPTIMIZED else code.co_qualname


def _compare(name: str, side: str, model: type[BaseModel], annotation: Any) -> None:
    if _may_be(annotation, model):
        return
    shown = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    passed = model.__name__
    if shown == passed:
        shown, passed = f"{annotation.__module__}.{shown}", f"{model.__module__}.{passed}"
    raise TypeError(f"{name} has {side}={passed}, and its function is annotated with {shown}; let them agree")


def _may_be(annotation: Any, model: type[BaseModel]) -> bool:
    """Return False if an annotation certainly means other models."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = [one for one in typing.get_args(annotation) if one is not type(None)]
        return any(_may_be(one, model) for one in members)
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return True
    return (
        issubclass(model, annotation)
        or issubclass(annotation, model)
        # Defined again, in a notebook or by a reload.
        or (annotation.__module__, annotation.__qualname__) == (model.__module__, model.__qualname__)
    )
