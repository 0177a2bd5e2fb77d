"""Types with fields, on either side of a boundary: models, dataclasses, typed dicts and dicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from stroma.contracts.checks.types import UNKNOWN, Side
from stroma.contracts.core_schema import is_never_dict, reachable_nodes
from stroma.contracts.schema import schema_of


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of a source record that reach the target.

    Attributes:
        fields: by name; excluded fields are not passed on.
        optional: fields that need not be there.
        is_open: there may be more fields.
        others: the type of further fields.
        computed: computed fields, which only the outermost record passes on, to classes with such a field.
    """

    name: str
    fields: Mapping[str, Side]
    optional: frozenset[str] = frozenset()
    is_open: bool = False
    others: Side = field(default_factory=lambda: Side(UNKNOWN, {}, {}))
    computed: Mapping[str, Side] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WantedField:
    """A field of the target. ``keys``: its aliases, each a path through dicts."""

    name: str
    side: Side
    required: bool
    keys: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The fields that a target accepts.

    Attributes:
        extra: "ignore", "allow" or "forbid".
        has_typed_extras: the class declares the type of further fields.
        code: a user function that runs after the fields are set, or "".
    """

    name: str
    fields: tuple[WantedField, ...]
    extra: str
    has_typed_extras: bool
    code: str = ""

    def by_name(self) -> Wanted:
        """Return the same fields, looked up by name alone: an alias may be the name of another field."""
        return replace(self, fields=tuple(replace(one, keys=()) for one in self.fields))


def _inside(side: Side) -> Side:
    """Return the side that lists the fields, without validators around it, and with its config."""
    if side.kind == "typed-dict":
        return replace(side, config=side.own_config or side.config)
    inner = replace(side, node=side.node["schema"], config=side.own_config).resolved()
    while inner.kind not in ("model-fields", "dataclass-args"):
        inner = inner.part("schema").resolved()
    return inner


def _fields(node: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    nodes = node["fields"]
    return list(nodes.items()) if isinstance(nodes, Mapping) else [(item["name"], item) for item in nodes]


def _extra_of(inner: Side) -> str:
    return inner.node.get("extra_behavior") or inner.config.get("extra_fields_behavior") or "ignore"


def record_of(side: Side) -> Record:
    """Return the fields of a value of the source, as a dict of them holds it."""
    if side.kind == "dict":
        return Record(str(side), {}, is_open=True, others=side.part("values_schema"))
    inner = _inside(side)
    fields: dict[str, Side] = {}
    optional: set[str] = set()
    for name, item in _fields(inner.node):
        if item.get("serialization_exclude") or item.get("init_only") or item.get("init") is False:
            continue
        fields[name] = inner.to(item["schema"])
        if side.kind == "typed-dict" and not item.get("required", inner.node.get("total", True)):
            optional.add(name)
    computed = {
        item["property_name"]: inner.to(item["return_schema"])
        for item in inner.node.get("computed_fields", ())
    }
    is_open = _extra_of(inner) == "allow"
    return Record(str(side), fields, frozenset(optional), is_open, inner.part("extras_schema"), computed)


def record_of_class(model: type[BaseModel]) -> Record:
    """Return the fields of a model that enter a group; of a root model its keys, or "root"."""
    if not schema_of(model).is_root:
        return record_of(Side.of_model(model))
    root = Side.of_root(model).resolved()
    if is_never_dict(root.node):
        return Record(model.__name__, {"root": root})
    if root.kind == "dict":
        return replace(record_of(root), name=model.__name__)
    return Record(model.__name__, {}, is_open=True)


def wanted_of(side: Side) -> Wanted:
    """Return the fields that a record of the target looks up in a dict."""
    inner = _inside(side)
    fields = []
    for name, item in _fields(inner.node):
        if item.get("init") is False:
            continue
        required = item["schema"]["type"] != "default"
        if side.kind == "typed-dict":
            required = required and bool(item.get("required", inner.node.get("total", True)))
        keys = _keys(item.get("validation_alias"))
        fields.append(WantedField(name, inner.to(item["schema"]), required, keys))
    has_extras = "extras_schema" in inner.node
    return Wanted(str(side), tuple(fields), _extra_of(inner), has_extras, _post_init(side))


def _keys(alias: Any) -> tuple[tuple[Any, ...], ...]:
    if not alias:
        return ()
    if isinstance(alias, str):
        return ((alias,),)
    return tuple(map(tuple, alias)) if isinstance(alias[0], (list, tuple)) else (tuple(alias),)


def look_up(wanted: WantedField, record: Record, *, by_name: bool) -> tuple[str, bool] | None:
    """Return the source field of a value, by alias or name, and True if the value is inside it."""
    keys = (*wanted.keys, (wanted.name,)) if by_name or not wanted.keys else wanted.keys
    return next(((key[0], len(key) > 1) for key in keys if key[0] in record.fields), None)


def loses_fields(side: Side) -> bool:
    """Return True if a required field in a class is excluded, so that its instances cannot be copied."""
    return any(
        node.get("serialization_exclude") and node["schema"]["type"] != "default"
        for node in reachable_nodes(side.node, side.defs)
    )


# ---------------------------------------------------------------------- code of the user's


def function_name(node: dict[str, Any]) -> str:
    """Return the name of a validator function."""
    function = node["function"].get("function")
    return str(getattr(function, "__qualname__", None) or type(function).__name__)


def first_validator(side: Side) -> str:
    """Return the user validator that may change the input before its fields are read, or ""."""
    if side.kind not in ("model", "dataclass") or side.node.get("root_model"):
        return ""
    inner = side.part("schema").resolved()
    while inner.kind not in ("model-fields", "dataclass-args"):
        if inner.kind != "function-after":
            return function_name(inner.node)
        inner = inner.part("schema").resolved()
    return ""


def _post_init(side: Side) -> str:
    """Return the user code that runs once all fields are known, or ""."""
    if side.node.get("post_init"):
        cls = side.node["cls"]
        for name in ("model_post_init", "__post_init__"):
            for parent in cls.__mro__:
                module = getattr(parent.__dict__.get(name), "__module__", None)
                # pydantic's own sets private attributes, and calls the user's if there is one.
                if module is not None and not module.startswith("pydantic."):
                    return f"{cls.__name__}.{name}"
    return ""
