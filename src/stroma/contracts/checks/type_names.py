"""Types as people write them, from pydantic's core schemas."""

from __future__ import annotations

from typing import Any, Final

from stroma.contracts.checks.scalars import in_words, limits_of
from stroma.contracts.core_schema import calls_user_code

__all__ = ["type_text"]

_NAMES: Final = {
    "none": "None",
    "decimal": "Decimal",
    "uuid": "UUID",
    "any": "Any",
    "callable": "Callable",
    "url": "Url",
    "multi-host-url": "MultiHostUrl",
}
_ITEMS: Final = {"list": "list", "set": "set", "frozenset": "frozenset", "generator": "Generator"}
_DEEP: Final = 4  # levels of a type that are shown; deeper ones are abbreviated


def type_text(node: Any, config: dict[str, Any], defs: dict[str, Any], depth: int = 0) -> str:
    """Return the type of a node with its constraints in parentheses: ``list[str (max_length=5)] | None``."""
    if depth > _DEEP or not isinstance(node, dict):
        return "..."
    kind = node["type"]

    def inner(key: str = "schema", default: Any = None) -> str:
        return type_text(node.get(key, default or {"type": "any"}), config, defs, depth + 1)

    if kind in ("model", "dataclass"):
        return str(node["cls"].__name__)
    if kind == "typed-dict":
        return str(getattr(node.get("cls"), "__name__", node.get("cls_name", "TypedDict")))
    if kind == "definition-ref":
        definition = defs.get(node["schema_ref"])
        return type_text(definition, config, defs, depth + 1) if definition is not None else "..."
    if kind == "enum":
        return str(node["cls"].__name__)
    if kind == "literal":
        return f"Literal[{', '.join(map(in_words, node['expected']))}]"
    if kind in ("is-instance", "is-subclass"):
        return str(node.get("cls_repr") or getattr(node["cls"], "__name__", node["cls"]))
    if kind == "nullable":
        return f"{inner()} | None"
    if kind == "union":
        choices = [c[0] if isinstance(c, tuple) else c for c in node["choices"]]
        return " | ".join(dict.fromkeys(type_text(c, config, defs, depth + 1) for c in choices))
    if kind == "tagged-union":
        return " | ".join(
            dict.fromkeys(type_text(c, config, defs, depth + 1) for c in node["choices"].values())
        )
    if kind in _ITEMS:
        return f"{_ITEMS[kind]}[{inner('items_schema')}]{_limits(node, {})}"
    if kind == "dict":
        return f"dict[{inner('keys_schema')}, {inner('values_schema')}]{_limits(node, {})}"
    if kind == "tuple":
        at = node.get("variadic_item_index")
        items = [type_text(item, config, defs, depth + 1) for item in node["items_schema"]]
        if at is not None:
            items.insert(at + 1, "...")
        return f"tuple[{', '.join(items) or '()'}]{_limits(node, {})}"
    if kind == "json":
        return f"Json[{inner()}]"
    if kind == "chain":
        return type_text(node["steps"][-1], config, defs, depth + 1)
    if kind == "lax-or-strict":
        return inner("strict_schema")
    if kind == "json-or-python":
        return inner("python_schema")
    if kind.startswith("function-"):
        name = _owner(node)
        if name is not None and not calls_user_code(node):
            return name
        return inner() + (" (with a validator)" if calls_user_code(node) else "")
    if "schema" in node:  # default, definitions, model-field ...
        return inner()
    return str(_NAMES.get(kind, kind)) + _limits(node, config)


def _owner(node: dict[str, Any]) -> str | None:
    """Return the name of the class behind a schema of pydantic's own, such as HttpUrl."""
    for function in (node.get("metadata") or {}).get("pydantic_js_functions", ()):
        owner = getattr(function, "__self__", None)
        if isinstance(owner, type):
            return owner.__name__
    function = node["function"].get("function")
    owner = function if isinstance(function, type) else getattr(function, "__self__", None)
    return owner.__name__ if isinstance(owner, type) else None


def _limits(node: dict[str, Any], config: dict[str, Any]) -> str:
    limits = limits_of(node, config)
    strict = ["strict"] if node.get("strict", config.get("strict")) else []
    parts = [
        f"{name}={in_words(value, repr if isinstance(value, str) else str)}" for name, value in limits.items()
    ]
    parts = [*parts, *strict]
    return f" ({', '.join(parts)})" if parts else ""
