"""Nodes that the body of a flow refers to. A worker looks for them there: the body's pipeline does not list them."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache, partial
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, Final

from stroma.contracts.node import FlowNode, Group, Node, find_node
from stroma.runner.pipeline import Pipeline

__all__ = ["nodes_of_flow"]

_MAX_OBJECTS: Final = 20_000  # looked at for one flow
_MAX_ITEMS: Final = 1_000  # of one container
_FOREIGN: Final = frozenset({"annotated_types", "pydantic", "pydantic_core", "stroma", "temporalio"})


def nodes_of_flow(flow: FlowNode) -> list[Node | Group]:
    """Return the nodes and groups that a flow refers to by name, and those of the flows, pipelines and functions it calls.

    Found are globals, variables of enclosing functions, attributes, defaults, and what is in lists and dicts; not what the
    body computes.
    """
    nodes: list[Node | Group] = []
    seen: dict[int, Any] = {}  # With the objects: the id of one that is gone may be that of another.
    pending: deque[Any] = deque([getattr(flow.func, "body", None)])
    while pending and len(seen) < _MAX_OBJECTS:
        one = pending.popleft()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        node = _node_of(one)
        if isinstance(node, FlowNode):
            pending.append(getattr(node.func, "body", None))
        elif node is not None:
            nodes.append(node)
        else:
            pending += _parts(one)
    return nodes


def _node_of(one: Any) -> Node | Group | None:
    if isinstance(one, (ModuleType, type)):
        return None
    try:
        return find_node(one) if isinstance(getattr(one, "_stroma_node_id", None), str) else None
    except Exception:  # A property raised, or it is no node after all.
        return None


def _parts(one: Any) -> Iterator[Any]:
    """Yield the objects that may be called through an object."""
    if isinstance(one, Pipeline):
        yield from one.nodes
    elif isinstance(one, FunctionType):
        if not _is_foreign(one.__module__):
            yield from _referred(one, _names(one.__code__))
    elif isinstance(one, MethodType):
        yield one.__func__
        yield from _attributes(one.__self__, _names(one.__func__.__code__))
    elif isinstance(one, partial):
        yield from (one.func, *one.args, *one.keywords.values())
    elif isinstance(one, Mapping):
        yield from list(one.values())[:_MAX_ITEMS]
    elif isinstance(one, (list, tuple, set, frozenset)):
        yield from list(one)[:_MAX_ITEMS]


@cache
def _is_foreign(module: str | None) -> bool:
    """Return True for a module that refers to no nodes of a user."""
    package = (module or "").partition(".")[0]
    return package in _FOREIGN or package in sys.stdlib_module_names


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _referred(function: FunctionType, names: set[str]) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # Not assigned yet.
            continue
        yield value
        yield from _attributes(value, names)
    for name in sorted(names):
        value = function.__globals__.get(name)
        if value is not None:
            yield value
            yield from _attributes(value, names)


def _attributes(owner: Any, names: set[str]) -> Iterator[Any]:
    """Yield the attributes of a module, class or object that are named in the code."""
    if isinstance(owner, ModuleType) and _is_foreign(owner.__name__):
        return
    is_object = not isinstance(owner, (ModuleType, type))
    classes = type(owner).__mro__ if is_object else owner.__mro__[1:] if isinstance(owner, type) else ()
    for place in (owner, *(one for one in classes if not _is_foreign(one.__module__))):
        values = getattr(place, "__dict__", None)
        if not isinstance(values, (dict, MappingProxyType)):
            continue
        for name in sorted(names.intersection(values)):
            value = values[name]
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            elif is_object and place is not owner and isinstance(value, FunctionType):
                value = MethodType(value, owner)
            yield value
