"""Core schemas of pydantic: kinds of values that a class can hold, and derived validators."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel, EncodedBytes, EncodedStr
from pydantic_core import SchemaSerializer, SchemaValidator

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
    "function-before",  # The output of other validators is described by no schema.
    "chain",
    "lax-or-strict",
    "json-or-python",
}


_NO_SCHEMAS: Final = frozenset({"metadata", "serialization", "default", "config", "function"})


def nodes_of(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every node of a pydantic core schema, outermost first."""
    stack = [schema]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if isinstance(item.get("type"), str):
                yield item
                # These hold callables, and schemas that validate nothing ("function" has a "type" of its
                # own).
                stack.extend(v for k, v in item.items() if k not in _NO_SCHEMAS)
            else:  # Nodes by field name.
                stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)


def is_exact_in_json(node: dict[str, Any]) -> bool:
    """Return True if JSON represents the values of a node as exactly as those of the nodes in it."""
    match node["type"]:
        case "literal":
            return all(type(value) in (str, int, bool, type(None)) for value in node["expected"])
        case "dict":
            return bool(node.get("keys_schema", {}).get("type") == "str")
        case "union" | "tagged-union":  # pydantic writes null for NaN and Infinity in any of its choices.
            return all(inner["type"] not in ("float", "definition-ref") for inner in nodes_of(node))
    settings = node.get("config") or {}
    return "allow" not in (node.get("extra_behavior"), settings.get("extra_fields_behavior"))


def core_schema_of(model: type[BaseModel]) -> Any:
    """Return the core schema of a model, which is rebuilt if it has unresolved references."""
    if not model.__pydantic_complete__:
        # Forward references that could not be resolved when the class was made; raises if they still cannot.
        model.model_rebuild()
    return model.__pydantic_core_schema__


def field_nodes(core: Any, model: type[BaseModel], name: str) -> Iterator[dict[str, Any]]:
    """Yield the schema nodes of one field of a model."""
    for node in nodes_of(core):
        if node["type"] == "model" and node["cls"] is model:
            inner = node["schema"]
            while inner.get("type") not in ("model-fields", None):
                inner = inner.get("schema", {})
            if name in inner.get("fields", {}):
                yield inner["fields"][name]
            elif node.get("root_model"):
                yield node["schema"]


def reachable_nodes(schema: Any, defs: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every node of a schema, and of the definitions that it refers to, once each."""
    seen: set[str] = set()
    todo = [schema]
    while todo:
        for node in nodes_of(todo.pop()):
            yield node
            ref = node.get("schema_ref")
            if isinstance(ref, str) and ref not in seen:
                seen.add(ref)
                todo += [defs[ref]] if ref in defs else []


def reachable(field: dict[str, Any], defs: Mapping[str, dict[str, Any]]) -> tuple[set[str], frozenset[type]]:
    """Return the types of all nodes that a value of a field can meet, and the classes with fields."""
    nodes = list(reachable_nodes(field, defs))
    kinds = {node["type"] for node in nodes}
    if any(node["type"] == "definition-ref" and node["schema_ref"] not in defs for node in nodes):
        kinds.add("model")
    return kinds, frozenset(node["cls"] for node in nodes if node["type"] in ("model", "dataclass"))


def has_ambiguous_choices(node: dict[str, Any], defs: Mapping[str, dict[str, Any]]) -> bool:
    """Return True for a union that may take the fields of one of its classes for another choice."""
    if node["type"] != "union":
        return False
    choices = [choice[0] if isinstance(choice, tuple) else choice for choice in node["choices"]]
    reached = [reachable(choice, defs) for choice in choices]
    open_choices = [kinds for kinds, _ in reached if not kinds <= FLAT_LEAVES | {"nullable"}]
    # The value of a root model can be a choice of its own: str | UserId.
    has_root = any(
        getattr(cls, "__pydantic_root_model__", False) for _, classes in reached for cls in classes
    )
    return (len(open_choices) > 1 or has_root) and any(kinds & MODELS for kinds in open_choices)


def is_never_dict(core: Any) -> bool:
    """Return True if the value of a root model, such as a list or text, cannot be read as fields."""
    while core["type"] in ("definitions", "model"):
        core = core["schema"]
    return core["type"] in FLAT_LEAVES | {"list", "tuple", "set", "frozenset"}


def is_strict(node: dict[str, Any]) -> bool:
    """Return True if a schema node validates in strict mode."""
    return bool(node.get("strict") or (node.get("config") or {}).get("strict"))


# ---------------------------------------------------------------------- validation of values that were
# validated before


def decodes_text(node: dict[str, Any]) -> bool:
    """Return True for a node that decodes text, and so refuses its own output."""
    if node["type"] == "json":
        return True
    owner = getattr(_function(node), "__self__", None)
    return isinstance(owner, (EncodedBytes, EncodedStr))


def has_callable_discriminator(node: dict[str, Any]) -> bool:
    """Return True for a union whose class is chosen by user code, which may know no stored form."""
    return node["type"] == "tagged-union" and callable(node["discriminator"])


def calls_user_code(node: dict[str, Any]) -> bool:
    """Return True for a node that calls a function of the user's: it may change a value each time."""
    function = _function(node)
    return function is not None and not str(getattr(function, "__module__", None)).startswith("pydantic.")


def _function(node: dict[str, Any]) -> Any:
    function = node["function"].get("function") if node["type"].startswith("function-") else None
    # A class builds an equal instance from the same value each time.
    return None if isinstance(function, type) else function


def may_change_on_revalidation(node: dict[str, Any]) -> bool:
    """Return True for a node that may change or refuse a value that it has validated before."""
    own_code = node.get("custom_init") or node.get("post_init")
    return bool(decodes_text(node) or calls_user_code(node) or own_code or builds_instances(node))


def builds_instances(node: dict[str, Any]) -> bool:
    """Return True for a node that calls a user class: its instances may not be valid input for that class."""
    function = node["function"].get("function") if node["type"] == "function-after" else None
    return isinstance(function, type) and function.__module__.partition(".")[0] not in _PLAIN


#: Packages of classes whose schemas accept their own instances.
_PLAIN: Final = frozenset({"pydantic", "pydantic_core", *sys.stdlib_module_names}) - {"__main__"}


def build_validator_without(core: Any, is_dropped: Callable[[dict[str, Any]], bool]) -> SchemaValidator:
    """Return a validator of the same schema without some of its nodes, but with those inside them.

    It also takes the values of enum members where the schema is strict: ``use_enum_values`` keeps those.
    """
    schema = _without(core, is_dropped)
    try:
        # The validators that nested classes have already hold those nodes.
        return SchemaValidator(schema, _use_prebuilt=False)
    except TypeError:  # pydantic before 2.12: nested classes keep them.
        return SchemaValidator(schema)


def build_renewing_validator(core: Any) -> SchemaValidator | None:
    """Return a validator of the same schema that validates each instance again and builds a new one.

    None if this version of pydantic cannot make one.
    """
    try:
        return SchemaValidator(_with_models(core, _RENEWED), _use_prebuilt=False)
    except TypeError:  # pydantic before 2.12
        return None


def build_constant_writer(core: Any) -> Callable[..., bytes] | None:
    """Return a JSON serializer that writes NaN and Infinity, where pydantic writes null.

    None if this version of pydantic cannot.
    """
    try:
        return SchemaSerializer(_with_models(core, _CONSTANTS), _use_prebuilt=False).to_json
    except TypeError:
        return None


_RENEWED: Final = {"revalidate_instances": "always"}
_CONSTANTS: Final = {"config": {"ser_json_inf_nan": "constants"}}


def _with_models(item: Any, more: Mapping[str, Any]) -> Any:
    """Return a copy in which the node of each model has more settings."""
    if type(item) is list or type(item) is tuple:
        return type(item)(_with_models(part, more) for part in item)
    if not isinstance(item, dict):
        return item
    copied = {k: v if k in _NO_SCHEMAS else _with_models(v, more) for k, v in item.items()}
    if item.get("type") == "model" and "cls" in item:
        for name, value in more.items():
            copied[name] = {**copied.get(name, {}), **value} if isinstance(value, dict) else value
    return copied


def is_renewable(node: dict[str, Any]) -> bool:
    """Return True if pydantic can build an instance again from its values without loss."""
    if node["type"] == "model":
        cls = node["cls"]
        open_to_more = cls.model_config.get("extra") == "allow"
        # BaseModel itself, as the class of a field, has no private attributes to ask for.
        return cls is not BaseModel and not (
            cls.__private_attributes__ or node.get("root_model") or open_to_more
        )
    return bool(node["type"] != "dataclass")


def _without(item: Any, is_dropped: Callable[[dict[str, Any]], bool]) -> Any:
    if type(item) is list or type(item) is tuple:
        return type(item)(_without(part, is_dropped) for part in item)
    if not isinstance(item, dict):
        return item
    if not isinstance(item.get("type"), str):
        return {k: _without(v, is_dropped) for k, v in item.items()}
    while is_dropped(item):
        inner = item.get("schema", {"type": "any"})
        item = {**inner, "ref": item["ref"]} if "ref" in item else inner
    if item["type"] == "enum":
        item = {**item, "strict": False}
    return {
        k: v if k in _NO_SCHEMAS else _without(v, is_dropped) for k, v in item.items() if k != "custom_init"
    }
