"""The values that a type of the source can hold after validation."""

from __future__ import annotations

import operator
import typing
from collections.abc import Callable
from typing import Any, Final, cast

from pydantic import TypeAdapter
from pydantic_core import PydanticUndefined

from stroma.contracts.checks.leaves import choices_of
from stroma.contracts.checks.types import LISTS, UNKNOWN, Side
from stroma.contracts.core_schema import builds_instances, calls_user_code, decodes_text, nodes_of

#: Records cross in ways of their own, and a default was never validated.
_NEVER_ALIKE: Final = frozenset({"model", "dataclass", "definition-ref", "default"})


def alternatives_of(source: Side, stays_instance: Callable[[Side], bool]) -> list[Side] | None:
    """Return the types that a value may have: one if the source only wraps it; None if it wraps nothing."""
    node, kind = source.node, source.kind
    if kind == "default":
        inner = source.part("schema")
        return [inner, *_of_default(inner, node)]
    if kind == "nullable":
        return [source.part("schema"), source.to({"type": "none"})]
    if kind in ("union", "tagged-union"):
        return source.choices()
    if kind == "json":
        return [source.part("schema")]
    if kind == "model" and node.get("root_model") and not stays_instance(source):
        return [source.root()]
    return [source.to(_made_by(node))] if kind.startswith("function-") else None


def _of_default(inner: Side, node: dict[str, Any]) -> list[Side]:
    """Return None as a type if that is the default of a field that does not accept it."""
    is_accepted = inner.resolved().kind in ("nullable", "any", "none")
    if is_accepted or node.get("default", PydanticUndefined) is not None:
        return []
    return [inner.to({"type": "none"})]


def _made_by(node: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the values that a validator function returns, as far as it is declared."""
    inner: dict[str, Any] = node.get("schema", UNKNOWN)
    kind, function = node["type"], node["function"].get("function")
    if kind == "function-before" or inner["type"] in ("model", "dataclass"):
        return inner
    if takes_value(node):
        return {"type": "literal", "expected": [getattr(v, "value", v) for v in choices_of(inner) or ()]}
    if not calls_user_code(node):
        if inner["type"] == "list" and kind == "function-wrap":  # A Sequence stays what it was.
            items = [inner.get("items_schema", UNKNOWN)]
            many = {"type": "tuple", "items_schema": items, "variadic_item_index": 0}
            return {"type": "union", "choices": [inner, many]}
        return inner if inner["type"] in ("url", *LISTS) else UNKNOWN
    try:
        returned = typing.get_type_hints(function).get("return", Any)
        schema = cast("dict[str, Any]", TypeAdapter(returned).core_schema)
    except Exception:  # It says nothing that we understand.
        return UNKNOWN
    return schema if schema["type"] != "definitions" else UNKNOWN


def takes_value(node: dict[str, Any]) -> bool:
    """Return True for a function that replaces enum members by their values: ``use_enum_values``."""
    function = node["function"].get("function") if node["type"] == "function-after" else None
    kind = node.get("schema", UNKNOWN)["type"]
    return (kind == "enum" and isinstance(function, operator.attrgetter)) or (
        kind == "literal" and function is not None and not calls_user_code(node)
    )


def is_alike(source: Side, target: Side) -> bool:
    """Return True for two equal types: a type accepts what it has validated."""
    if source.kind != target.kind or source.kind == "any":
        return False
    is_special = any(
        calls_user_code(node)
        or decodes_text(node)
        or builds_instances(node)
        or node["type"] in _NEVER_ALIKE
        or (node["type"] == "function-after" and takes_value(node))
        for node in nodes_of(source.node)
    )
    own, its = {**source.config, "title": 0}, {**target.config, "title": 0}
    return not is_special and own == its and _is_same(source.node, target.node)


def _is_same(one: Any, other: Any) -> bool:
    """Return True for two schemas that differ only in functions that pydantic creates for each class."""
    if one is other:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - {"metadata", "serialization", "ref"}
        return all(key in one and key in other and _is_same(one[key], other[key]) for key in keys)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if callable(one) and callable(other) and not isinstance(one, type):
        own = str(getattr(one, "__module__", "")).startswith("pydantic.")
        return one == other or (own and getattr(one, "__qualname__", 0) == getattr(other, "__qualname__", 1))
    return type(one) is type(other) and bool(one == other)
