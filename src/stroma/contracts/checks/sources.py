"""The values that a type of the source can hold after validation."""

from __future__ import annotations

import operator
import typing
from collections.abc import Callable
from typing import Any, Final, cast

from pydantic import TypeAdapter
from pydantic_core import PydanticUndefined, SchemaValidator, ValidationError

from stroma.contracts.checks.pairs import EMPTY, LISTS, UNKNOWN, Side
from stroma.contracts.checks.records import record_of
from stroma.contracts.checks.scalars import LEAVES, choices_of
from stroma.contracts.core_schema import builds_instances, calls_user_code, decodes_text, nodes_of

__all__ = ["alternatives_of", "chosen", "is_alike", "is_harmless", "tags_of"]


def alternatives_of(source: Side, is_kept_whole: Callable[[Side], bool]) -> list[Side] | None:
    """Return the types that a value may have: one if the source only wraps it; None if it wraps nothing.

    ``kept``: whether an instance crosses as the instance that it is.
    """
    node, kind = source.node, source.kind
    if kind == "default":
        inner = source.to(node["schema"])
        default = node.get("default", PydanticUndefined)
        # A default is not validated.
        if default is not PydanticUndefined and not node.get("copy_default") and not _holds(inner, default):
            if default is None:
                return [inner, source.to({"type": "none"})]
            if type(default) in (str, int, bool):
                return [inner, source.to({"type": "literal", "expected": [default]})]
            return [inner, source.to(UNKNOWN)]
        return [inner]
    if kind == "nullable":
        return [source.to(node["schema"]), source.to({"type": "none"})]
    if kind == "union":
        return [source.to(c[0] if isinstance(c, tuple) else c) for c in node["choices"]]
    if kind == "tagged-union":
        return [source.to(choice) for choice in node["choices"].values()]
    if kind == "chain":
        return [source.to(node["steps"][-1])]
    if kind == "lax-or-strict":
        return [source.to(node["strict_schema"])]
    if kind == "json":
        return [source.to(node.get("schema", UNKNOWN))]
    if kind == "model" and node.get("root_model") and not is_kept_whole(source):
        return [Side(node["schema"], node.get("config") or EMPTY, source.defs)]
    if kind.startswith("function-"):
        return [source.to(_made_by(node))]
    return None


def _holds(inner: Side, default: Any) -> bool:
    kind = inner.resolved().kind
    if kind in ("int", "str", "bool", "none", "float"):
        return {"int": int, "str": str, "bool": bool, "none": type(None), "float": float}[kind] is type(
            default
        )
    # Of what is not that simple, only None is a surprise worth telling.
    return default is not None or kind in ("nullable", "any")


#: Records cross in ways of their own, and a default was never validated.
_LOOKED_INTO: Final = frozenset({"model", "dataclass", "definition-ref", "default"})


def is_alike(source: Side, target: Side) -> bool:
    """Return True for two equal types: a type accepts what it has validated."""
    if source.kind != target.kind or source.kind == "any":
        return False
    if any(map(builds_instances, nodes_of(source.node))):
        return False
    if source.node is target.node:
        same = not any(
            calls_user_code(n) or decodes_text(n) or n["type"] in _LOOKED_INTO for n in nodes_of(source.node)
        )
    else:
        same = source.kind not in LEAVES and _is_same(source.node, target.node)
    return same and {**source.config, "title": 0} == {**target.config, "title": 0}


def tags_of(source: Side, discriminator: Any) -> list[Any] | None:
    """Return the possible values of a record's discriminator; None if they are not known."""
    record = record_of(source)
    ways = [discriminator] if isinstance(discriminator, str) else discriminator
    if not isinstance(ways, list):
        return None
    # One name, or a list of ways: each the keys that lead to it.
    names = [way if isinstance(way, str) else way[0] for way in ways if isinstance(way, str) or len(way) == 1]
    name = next((name for name in names if name in record.fields), None)
    if name is None or name in record.optional or len(names) < len(ways):
        return None
    field = record.fields[name]
    while True:
        field = field.resolved()
        if field.kind not in ("default", "nullable"):
            return choices_of(field.node)
        if field.kind == "nullable":
            return None
        field = field.to(field.node["schema"])


def chosen(tags: list[Any], value: Any) -> Any:
    """Return the tag of a union that a value stands for, by the rules of pydantic; None if there is none."""
    try:
        return SchemaValidator({"type": "literal", "expected": tags}).validate_python(value)
    except ValidationError:
        return None


def _made_by(node: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the values that a validator function returns, as far as it is declared."""
    inner: dict[str, Any] = node.get("schema", UNKNOWN)
    kind, function = node["type"], node["function"].get("function")
    if kind == "function-before" or decodes_text(node) or inner["type"] in ("model", "dataclass"):
        return inner
    if isinstance(function, type):
        return {"type": "is-instance", "cls": function}
    if _takes_value(node):
        return {"type": "literal", "expected": [getattr(v, "value", v) for v in choices_of(inner) or ()]}
    if not calls_user_code(node):
        if inner["type"] == "list" and kind == "function-wrap":  # A Sequence stays what it was.
            items = [inner.get("items_schema", UNKNOWN)]
            many = {"type": "tuple", "items_schema": items, "variadic_item_index": 0}
            return {"type": "union", "choices": [inner, many]}
        if is_harmless(node) or inner["type"] in ("url", "multi-host-url", "str", *LISTS):
            return inner
        return UNKNOWN
    try:
        returned = typing.get_type_hints(function).get("return", Any)
        schema = cast("dict[str, Any]", TypeAdapter(returned).core_schema)
    except Exception:  # It says nothing that we understand.
        return UNKNOWN
    return schema if schema["type"] != "definitions" else UNKNOWN


def is_harmless(node: dict[str, Any]) -> bool:
    """Return True for a function of pydantic that refuses no value of the source."""
    function = node["function"].get("function")
    return "path_validator" in str(getattr(function, "__qualname__", "")) or _takes_value(node)


def _takes_value(node: dict[str, Any]) -> bool:
    """Return True for a function that replaces enum members by their values: ``use_enum_values``."""
    function = node["function"].get("function") if node["type"] == "function-after" else None
    kind = node.get("schema", UNKNOWN)["type"]
    return (kind == "enum" and isinstance(function, operator.attrgetter)) or (
        kind == "literal" and function is not None and not calls_user_code(node)
    )


def _is_same(one: Any, other: Any) -> bool:
    """Return True for two schemas that differ only in pydantic's own functions, which it creates for each class."""
    if isinstance(one, dict) and isinstance(other, dict):
        if isinstance(one.get("type"), str) and (one["type"] != other.get("type") or calls_user_code(one)):
            return False
        if isinstance(one.get("type"), str) and (
            decodes_text(one)
            or one["type"] in _LOOKED_INTO
            or (one["type"] == "function-after" and _takes_value(one))
        ):
            return False
        skipped = {"metadata", "serialization", "ref"}
        keys = (one.keys() | other.keys()) - skipped
        return all(k in one and k in other and _is_same(one[k], other[k]) for k in keys)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if callable(one) and callable(other) and not isinstance(one, type):
        own = str(getattr(one, "__module__", "")).startswith("pydantic.")
        return one == other or (own and getattr(one, "__qualname__", 0) == getattr(other, "__qualname__", 1))
    return type(one) is type(other) and bool(one == other)
