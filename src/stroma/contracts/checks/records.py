"""Types with fields, on either side of a boundary: models, dataclasses, typed dicts, and dicts of any value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from stroma.contracts.core_schema import nodes_of, reachable

if TYPE_CHECKING:
    from stroma.contracts.checks.pairs import Side

__all__ = [
    "Record",
    "Wanted",
    "WantedField",
    "by_name",
    "classes_of",
    "first_word",
    "is_record",
    "look_up",
    "loses_fields",
    "name_of",
    "record_of",
    "wanted_of",
]

_EMPTY: Final[dict[str, Any]] = {}


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of a source record that reach the target.

    Attributes:
        fields: by name; what is excluded is not handed on.
        optional: fields that need not be there.
        is_open: there may be more.
        others: the type of what more there may be, if that is known.
        computed: computed fields, which only the outermost record hands on, to who has a field of the name.
    """

    name: str
    fields: Mapping[str, Side]
    optional: frozenset[str] = frozenset()
    is_open: bool = False
    others: Side | None = None
    computed: Mapping[str, Side] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WantedField:
    """A field of the target. ``keys``: by which it is looked up, each a way through dicts, but for its name."""

    name: str
    side: Side
    required: bool
    keys: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The fields that a target takes. ``code``: a user function that runs after them, or ""."""

    name: str
    fields: tuple[WantedField, ...]
    extra: str
    extras: Side | None
    code: str = ""


@dataclass(frozen=True, slots=True)
class SourceField:
    """The source of the value of a field. ``deeper``: the value is inside that field."""

    name: str
    side: Side
    deeper: bool


def is_record(side: Side) -> bool:
    """Return True for a type with fields that is no root model."""
    return side.kind in ("dataclass", "typed-dict") or (
        side.kind == "model" and not side.node.get("root_model")
    )


def _inside(side: Side) -> tuple[Side, dict[str, Any]]:
    """Return the node that lists the fields, without the validators around it, and the config that applies there."""
    config = side.node.get("config") or _EMPTY
    if side.kind == "typed-dict":
        return side, config or side.config
    inner = side.to(side.node["schema"]).resolved()
    while inner.kind not in ("model-fields", "dataclass-args"):
        inner = inner.to(inner.node["schema"]).resolved()
    return inner, config


def record_of(side: Side) -> Record:
    """Return the fields of a value of the source as a dict of them holds it."""
    if side.kind == "dict":
        others = side.to(side.node.get("values_schema", {"type": "any"}))
        return Record(str(side), {}, is_open=True, others=others)
    inner, config = _inside(side)
    node = inner.node
    fields: dict[str, Side] = {}
    optional: set[str] = set()
    for name, item in _fields(node):
        if item.get("serialization_exclude") or item.get("init_only") or item.get("init") is False:
            continue
        fields[name] = _side(inner, item, config)
        if side.kind == "typed-dict" and not item.get("required", node.get("total", True)):
            optional.add(name)
    computed = {
        item["property_name"]: _side(inner, {"schema": item["return_schema"]}, config)
        for item in node.get("computed_fields", ())
    }
    extra = node.get("extra_behavior") or config.get("extra_fields_behavior")
    return Record(str(side), fields, frozenset(optional), extra == "allow", _extras(inner, config), computed)


def wanted_of(side: Side) -> Wanted:
    """Return the fields that a record of the target looks up in a dict."""
    inner, config = _inside(side)
    node = inner.node
    fields = []
    for name, item in _fields(node):
        if item.get("init") is False:
            continue
        required = item["schema"]["type"] != "default"
        if side.kind == "typed-dict":
            required = required and bool(item.get("required", node.get("total", True)))
        fields.append(
            WantedField(name, _side(inner, item, config), required, _keys(item.get("validation_alias")))
        )
    extra = node.get("extra_behavior") or config.get("extra_fields_behavior") or "ignore"
    return Wanted(str(side), tuple(fields), extra, _extras(inner, config), _last_word(side))


def _extras(inner: Side, config: dict[str, Any]) -> Side | None:
    """Return the type of extra fields, if the class declares one."""
    schema = inner.node.get("extras_schema")
    return None if schema is None else _side(inner, {"schema": schema}, config)


def name_of(node: dict[str, Any]) -> str:
    """Return the name of a validator function."""
    function = node["function"].get("function")
    return str(getattr(function, "__qualname__", None) or type(function).__name__)


def first_word(side: Side) -> str:
    """Return the user validator that may change the input before its fields are read, or ""."""
    if side.kind not in ("model", "dataclass") or side.node.get("root_model"):
        return ""
    inner = side.to(side.node["schema"]).resolved()
    while inner.kind not in ("model-fields", "dataclass-args"):
        if inner.kind != "function-after":
            return name_of(inner.node)
        inner = inner.to(inner.node["schema"]).resolved()
    return ""


def loses_fields(side: Side) -> bool:
    """Return True if a required field of a class, or of one inside it, is excluded, so that no copy can be made."""
    seen: set[str] = set()
    todo = [side.node]
    while todo:
        for node in nodes_of(todo.pop()):
            if node.get("serialization_exclude") and node["schema"]["type"] != "default":
                return True
            ref = node.get("schema_ref")
            if isinstance(ref, str) and ref not in seen:
                seen.add(ref)
                todo += [side.defs[ref]] if ref in side.defs else []
    return False


def classes_of(side: Side) -> frozenset[type]:
    """Return the classes that a value of a type holds, its own included."""
    return reachable(side.node, side.defs)[1]


def by_name(wanted: Wanted) -> Wanted:
    """Return the same fields looked up by name alone: an alias may be the name of another field."""
    return replace(wanted, fields=tuple(replace(field, keys=()) for field in wanted.fields))


def _last_word(side: Side) -> str:
    """Return the user code that runs once all fields are known, or ""."""
    if not side.node.get("post_init"):
        return ""
    cls = side.node["cls"]
    for name in ("model_post_init", "__post_init__"):
        for parent in cls.__mro__:
            function = parent.__dict__.get(name)
            # pydantic's own fills in private attributes, and calls the user's if there is one.
            if function is not None and not str(getattr(function, "__module__", "")).startswith("pydantic."):
                return f"{cls.__name__}.{name}"
    return ""


def _fields(node: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    nodes = node["fields"]
    return list(nodes.items()) if isinstance(nodes, Mapping) else [(item["name"], item) for item in nodes]


def _side(inner: Side, item: dict[str, Any], config: dict[str, Any]) -> Side:
    return type(inner)(item["schema"], config, inner.defs)


def _keys(alias: Any) -> tuple[tuple[Any, ...], ...]:
    if alias is None:
        return ()
    if isinstance(alias, str):
        return ((alias,),)
    if alias and isinstance(alias[0], (list, tuple)):
        return tuple(tuple(key) for key in alias)
    return (tuple(alias),)


def look_up(wanted: WantedField, record: Record, *, by_name: bool) -> SourceField | None:
    """Return the source field of a value as the engine looks it up: by alias first, then by name."""
    keys = (*wanted.keys, (wanted.name,)) if by_name or not wanted.keys else wanted.keys
    for key in keys:
        field_side = record.fields.get(key[0])
        if field_side is not None:
            return SourceField(key[0], field_side, len(key) > 1)
    return None
