"""Traits of a model class: facts that hold for all of its instances, read once from pydantic's core schema.

Must not import the schema, codec or snapshot modules, which act on these facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel

from stroma.contracts.core_schema import (
    CLOSED,
    FLAT_LEAVES,
    JSON_LEAVES,
    MODELS,
    core_schema_of,
    decodes_text,
    field_nodes,
    has_ambiguous_choices,
    has_callable_discriminator,
    is_exact_in_json,
    is_renewable,
    is_strict,
    may_change_on_revalidation,
    nodes_of,
    reachable,
)

__all__ = ["SchemaTraits", "analyse"]

#: Wrappers of a leaf that leave its value immutable.
_FLAT_WRAPPERS: Final = frozenset({"nullable", "default", "union", "model-field", "function-before"})
#: Nodes whose values JSON may change: a set becomes a list, a dataclass a dict.
_NOT_JSON: Final = frozenset({"set", "frozenset", "tuple", "dataclass"})
#: The type of the values of a node, where JSON can represent all of them.
_JSON_TYPES: Final[dict[str, type]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": float,
    "none": type(None),
    "nullable": type(None),
}
_SERIALIZER_SETTINGS: Final = ("json_encoders", "ser_json_bytes", "ser_json_inf_nan")


@dataclass(frozen=True, slots=True)
class SchemaTraits:
    """Facts about a model class that decide how its instances are validated, copied and encoded."""

    model: type[BaseModel]
    #: In order, as a flat snapshot holds their values.
    field_names: tuple[str, ...]
    is_root: bool
    #: A root model of Any: every value stays as it is.
    is_untyped: bool
    #: All values are immutable leaves, so that a shallow copy of the fields is isolated.
    is_flat: bool
    #: Values of unknown names are kept, in ``__pydantic_extra__``.
    allows_extra: bool
    excluded_fields: frozenset[str]
    computed_fields: frozenset[str]
    #: Field names and aliases must be distinguished by the arguments of each validation.
    has_validation_aliases: bool
    #: The class has a ``model_validate`` of its own, which must be called instead of the validator.
    overrides_validation: bool
    #: Some value is decoded from text (``Json``, ``Base64Str``): the decoder refuses its own output.
    has_decoders: bool
    decoded_fields: frozenset[str]
    is_strict: bool
    #: pydantic itself validates instances again.
    revalidates_instances: bool

    #: Validation calls no user code, and leaves the dict that it reads unchanged.
    is_pure: bool
    #: Validation may change or refuse a value that it returned before.
    may_change_on_revalidation: bool
    #: pydantic can validate all models inside again in one call, and loses nothing of them.
    can_renew: bool
    #: A copy must be validated: copied values would share private attributes, or keep what is excluded.
    must_reconstruct: bool

    #: Some values are described by no schema (``Any``): validation passes them on without a copy.
    has_undescribed_values: bool
    #: The undescribed values are the only mutable ones that need a look: a pickle of plain data is a
    #: snapshot.
    is_picklable: bool
    #: The fields that need a recursive copy.
    deep_fields: tuple[str, ...]
    #: Those of them in which models stay instances, because no schema describes them.
    opaque_fields: frozenset[str]
    #: For each deep field, the classes that its schema names: a value of one of them crosses as an instance.
    field_classes: Mapping[str, frozenset[type]]
    #: All classes of ``field_classes``. An instance of a subclass would be stored as its parent.
    nested_classes: frozenset[type]
    #: Validated instances are remembered, so that they need no second validation.
    tracks_instances: bool

    #: pydantic's JSON serializer changes no value.
    is_exact_in_json: bool
    #: The same, if no float is NaN or infinite: the fields are compared, since the class is flat.
    is_exact_in_json_if_finite: bool
    #: The same, but such a float may be anywhere inside: the written JSON must be searched.
    may_hide_floats_in_json: bool
    #: For each field of a flat class, the types that JSON represents exactly; None if the type does not
    #: decide.
    exact_types: tuple[tuple[str, frozenset[type]], ...] | None
    #: Some union may take the fields of one of its classes for another choice.
    has_ambiguous_union: bool

    @property
    def needs_isolation(self) -> bool:
        """True if a validated model may share values with the object that it was validated from."""
        return self.has_undescribed_values or bool(self.nested_classes)

    @property
    def passes_values_unchanged(self) -> bool:
        """True if ``__dict__`` of an instance is exactly the input that another class would validate."""
        return self.is_flat and not (
            self.computed_fields or self.tracks_instances or self.has_validation_aliases
        )


def analyse(model: type[BaseModel]) -> SchemaTraits:
    """Return the traits of a model class. Resolves its forward references first; raises if it cannot."""
    core = core_schema_of(model)
    nodes = list(nodes_of(core))
    kinds = {node["type"] for node in nodes}
    excluded = frozenset(name for name, field in model.model_fields.items() if field.exclude)
    is_root = bool(model.__pydantic_root_model__)
    allows_extra = model.model_config.get("extra") == "allow"
    is_simple = not (excluded or allows_extra or is_root)
    is_flat = _is_flat(nodes, kinds) and is_simple
    deep, opaque, classes = ((), frozenset[str](), {}) if is_flat else _deep_fields(core, model)
    nested: frozenset[type] = frozenset().union(*classes.values())
    is_exact_if_finite = is_simple and _is_json(model, nodes, kinds - {"float"})
    return SchemaTraits(
        model=model,
        field_names=tuple(model.model_fields),
        is_root=is_root,
        is_untyped=is_root and kinds <= {"model", "any"},
        is_flat=is_flat,
        allows_extra=allows_extra,
        excluded_fields=excluded,
        computed_fields=frozenset(model.model_computed_fields),
        deep_fields=deep,
        opaque_fields=opaque,
        field_classes=classes,
        nested_classes=nested,
        is_exact_in_json=is_exact_if_finite and "float" not in kinds,
        is_exact_in_json_if_finite=is_flat and is_exact_if_finite,
        may_hide_floats_in_json=not is_flat and is_exact_if_finite and "float" in kinds,
        exact_types=_exact_types(core, model) if is_flat and is_exact_if_finite else None,
        **_validation_traits(model, core, nodes, nested),
    )


def _validation_traits(
    model: type[BaseModel], core: Any, nodes: list[dict[str, Any]], nested: frozenset[type]
) -> dict[str, Any]:
    """Return the traits that say how instances are validated again, renewed and copied."""
    kinds = {node["type"] for node in nodes}
    is_root = bool(model.__pydantic_root_model__)
    allows_extra = model.model_config.get("extra") == "allow"
    has_excluded = any(field.exclude for field in model.model_fields.values())
    has_aliases = any("validation_alias" in node for node in nodes)
    has_private = bool(model.__private_attributes__)
    has_own_code = any(node.get("custom_init") or node.get("post_init") for node in nodes)
    overrides_validation = _overrides_validation(model)
    is_pure = not (has_own_code or overrides_validation or any(kind.startswith("function") for kind in kinds))
    has_undescribed_values = allows_extra or not kinds <= CLOSED
    must_reconstruct = has_own_code or any("serialization_exclude" in node for node in nodes)
    may_change = overrides_validation or any(
        may_change_on_revalidation(node) or has_callable_discriminator(node) for node in nodes
    )
    definitions = {node["ref"]: node for node in nodes if "ref" in node}
    has_ambiguous_union = any(has_ambiguous_choices(node, definitions) for node in nodes)
    has_decoders = any(map(decodes_text, nodes))
    decoded = _decoded_fields(core, model) if has_decoders else frozenset()
    has_surprises = (
        has_undescribed_values
        or has_aliases
        or decoded
        or has_ambiguous_union
        or may_change
        or must_reconstruct
    )
    is_plain = not (has_excluded or allows_extra or is_root) or (is_root and kinds <= {"model", "any"})
    return {
        "has_validation_aliases": has_aliases,
        "overrides_validation": overrides_validation,
        "has_decoders": has_decoders,
        "decoded_fields": decoded,
        "is_strict": any(map(is_strict, nodes)),
        "revalidates_instances": model.model_config.get("revalidate_instances") == "always",
        "is_pure": is_pure,
        "may_change_on_revalidation": may_change,
        "can_renew": bool(nested) and is_pure and all(map(is_renewable, nodes)) and not has_surprises,
        "must_reconstruct": must_reconstruct,
        "has_undescribed_values": has_undescribed_values,
        "is_picklable": has_undescribed_values
        and is_pure
        and is_plain
        and not (model.model_computed_fields or must_reconstruct or has_private),
        "tracks_instances": may_change and bool(model.__weakrefoffset__),
        "has_ambiguous_union": has_ambiguous_union,
    }


def _decoded_fields(core: Any, model: type[BaseModel]) -> frozenset[str]:
    """Return the names of the fields whose values are decoded from text."""
    return frozenset(
        name for name in model.model_fields if any(map(decodes_text, _nodes_of_field(core, model, name)))
    )


def _is_json(model: type[BaseModel], nodes: list[dict[str, Any]], kinds: set[str]) -> bool:
    """Return True if JSON represents all values of these types exactly, and no serializer changes them."""
    return kinds <= CLOSED - (FLAT_LEAVES - JSON_LEAVES) - _NOT_JSON and not _has_custom_serialization(
        model, nodes
    )


def _overrides_validation(model: type[BaseModel]) -> bool:
    return bool(getattr(model.model_validate, "__func__", None) is not BaseModel.model_validate.__func__)  # type: ignore[attr-defined]


def _is_flat(nodes: list[dict[str, Any]], kinds: set[str]) -> bool:
    return (
        kinds <= FLAT_LEAVES | _FLAT_WRAPPERS | {"model", "model-fields"}
        and sum(node["type"] == "model" for node in nodes) == 1
    )


def _has_custom_serialization(model: type[BaseModel], nodes: list[dict[str, Any]]) -> bool:
    decorators = model.__pydantic_decorators__
    return (
        bool(decorators.field_serializers or decorators.model_serializers)
        or any(setting in model.model_config for setting in _SERIALIZER_SETTINGS)
        or any("serialization" in node or "serialization_exclude" in node for node in nodes)
        or not all(map(is_exact_in_json, nodes))
    )


def _deep_fields(
    core: Any, model: type[BaseModel]
) -> tuple[tuple[str, ...], frozenset[str], dict[str, frozenset[type]]]:
    """Return the fields that need a recursive copy, those of them that no schema describes, and their classes."""
    opaque: set[str] = set()
    classes: dict[str, frozenset[type]] = {}
    # A validator of the whole model may have put any value into any field.
    is_wrapped = core["type"] != "model" or core["schema"]["type"] != "model-fields"
    definitions = {node["ref"]: node for node in nodes_of(core) if "ref" in node}
    for name in model.model_fields:
        field = next(field_nodes(core, model, name), None)
        kinds, named = ({"any"}, frozenset[type]()) if field is None else reachable(field, definitions)
        if not is_wrapped and kinds <= FLAT_LEAVES | _FLAT_WRAPPERS:
            continue
        classes[name] = named
        if kinds - CLOSED and not kinds & MODELS:
            opaque.add(name)
    return tuple(classes), frozenset(opaque), classes


def _nodes_of_field(core: Any, model: type[BaseModel], name: str) -> Iterable[dict[str, Any]]:
    return nodes_of([*field_nodes(core, model, name)])


def _exact_types(core: Any, model: type[BaseModel]) -> tuple[tuple[str, frozenset[type]], ...] | None:
    exact: list[tuple[str, frozenset[type]]] = []
    for name in model.model_fields:
        field = next(field_nodes(core, model, name), None)
        kinds = {"any"} if field is None else reachable(field, {})[0]
        types = frozenset(_JSON_TYPES[kind] for kind in kinds & _JSON_TYPES.keys())
        if not types or kinds - _JSON_TYPES.keys() - {"model-field", "default", "union"}:
            return None
        exact.append((name, types))
    return tuple(exact)
