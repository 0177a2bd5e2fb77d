"""Reading pydantic's core schemas: which kinds of values a class can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel

__all__ = [
    "CLOSED",
    "FLAT_LEAVES",
    "JSON_LEAVES",
    "MODELS",
    "core_schema_of",
    "field_nodes",
    "nodes_of",
    "plain_json",
    "reachable",
]

JSON_LEAVES: Final = frozenset({"str", "int", "bool", "none", "literal"})
FLAT_LEAVES: Final = JSON_LEAVES | {
    "float",
    "bytes",
    "decimal",
    "date",
    "time",
    "datetime",
    "timedelta",
    "uuid",
    "enum",
    "url",
    "multi-host-url",
    "complex",
}
MODELS: Final = frozenset({"model", "dataclass", "typed-dict"})
CLOSED: Final = FLAT_LEAVES | {
    # Containers and wrappers whose contents are described by the schema itself.
    "list",
    "set",
    "frozenset",
    "dict",
    "tuple",
    "nullable",
    "default",
    "union",
    "tagged-union",
    "definitions",
    "definition-ref",
    "model",
    "model-field",
    "model-fields",
    "dataclass",
    "dataclass-args",
    "dataclass-field",
    "typed-dict",
    "typed-dict-field",
    "function-before",  # What other validators give back, nothing describes.
    "chain",
    "lax-or-strict",
    "json-or-python",
}


_NO_SCHEMAS: Final = frozenset({"metadata", "serialization", "default", "config", "function"})


def nodes_of(schema: Any) -> Iterator[dict[str, Any]]:
    """Every node of a pydantic core schema, outermost first."""
    stack = [schema]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if isinstance(item.get("type"), str):
                yield item
            # These hold callables and schemas that validate nothing ("function" has a "type" of its own).
            stack.extend(v for k, v in item.items() if k not in _NO_SCHEMAS)
        elif isinstance(item, (list, tuple)):
            stack.extend(item)


def plain_json(node: dict[str, Any]) -> bool:
    """Whether JSON keeps a literal's values, or a dict's keys, for what they are."""
    if node["type"] == "literal":
        return all(type(value) in (str, int, bool, type(None)) for value in node["expected"])
    return bool(node["type"] != "dict" or node.get("keys_schema", {}).get("type") == "str")


def core_schema_of(model: type[BaseModel]) -> Any:
    if not model.__pydantic_complete__:
        # Forward references that could not be resolved when the class was made; raises if they still cannot.
        model.model_rebuild()
    return model.__pydantic_core_schema__


def field_nodes(core: Any, model: type[BaseModel], name: str) -> Iterator[dict[str, Any]]:
    for node in nodes_of(core):
        if node["type"] == "model" and node["cls"] is model:
            inner = node["schema"]
            while inner.get("type") not in ("model-fields", None):
                inner = inner.get("schema", {})
            if name in inner.get("fields", {}):
                yield inner["fields"][name]
            elif node.get("root_model"):
                yield node["schema"]


def reachable(field: dict[str, Any], defs: Mapping[str, dict[str, Any]]) -> set[str]:
    kinds: set[str] = set()
    seen: set[str] = set()
    todo = [field]
    while todo:
        for node in nodes_of(todo.pop()):
            kinds.add(node["type"])
            ref = node.get("schema_ref")
            if isinstance(ref, str) and ref not in seen:
                seen.add(ref)
                if ref in defs:
                    todo.append(defs[ref])
                else:
                    kinds.add("model")
    return kinds
