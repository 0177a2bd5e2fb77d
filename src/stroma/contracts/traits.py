"""Traits of a model class: facts that hold for all of its instances, read once from pydantic's core schema.

Must not import the schema and codec modules, which act on these facts.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

from pydantic import BaseModel

from stroma.contracts.core_schema import (
    CLOSED,
    FLAT_LEAVES,
    JSON_LEAVES,
    MODELS,
    build_renewing_validator,
    build_validator_without,
    calls_user_code,
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

#: Wrappers of a leaf that leave its value immutable.
_FLAT_WRAPPERS: Final = frozenset({"nullable", "default", "union", "model-field", "function-before"})
#: Nodes whose values JSON changes no more than their parts: a set becomes a list, a dataclass a dict.
_JSON_KINDS: Final = (CLOSED - FLAT_LEAVES | JSON_LEAVES | {"float"}) - {
    "set",
    "frozenset",
    "tuple",
    "dataclass",
}
_SERIALIZER_SETTINGS: Final = ("json_encoders", "ser_json_bytes", "ser_json_inf_nan")


class SchemaTraits:
    """Facts about a model class that decide how its instances are validated, copied and encoded.

    Resolves the forward references of the class first; raises if it cannot.
    """

    def __init__(self, model: type[BaseModel]) -> None:
        core = core_schema_of(model)
        nodes = list(nodes_of(core))
        kinds = {node["type"] for node in nodes}
        has_own_code = any(node.get("custom_init") or node.get("post_init") for node in nodes)
        self.model: Final = model
        #: In order, as a flat snapshot holds their values.
        self.field_names: Final = tuple(model.model_fields)
        self.is_root: Final = bool(model.__pydantic_root_model__)
        #: A root model of Any: every value stays as it is.
        self.is_untyped: Final = self.is_root and kinds <= {"model", "any"}
        #: Values of unknown names are kept, in ``__pydantic_extra__``.
        self.allows_extra: Final = model.model_config.get("extra") == "allow"
        self.excluded_fields: Final = frozenset(k for k, v in model.model_fields.items() if v.exclude)
        self.computed_fields: Final = frozenset(model.model_computed_fields)
        #: ``__dict__`` holds all that an instance hands on.
        self.is_simple: Final = not (self.excluded_fields or self.allows_extra or self.is_root)
        #: All values are immutable leaves, so that a shallow copy of the fields is isolated.
        self.is_flat: Final = (
            self.is_simple
            and kinds <= FLAT_LEAVES | _FLAT_WRAPPERS | {"model", "model-fields"}
            and sum(node["type"] == "model" for node in nodes) == 1
        )

        #: Field names and aliases must be distinguished by the arguments of each validation.
        self.has_validation_aliases: Final = any("validation_alias" in node for node in nodes)
        #: The class has a ``model_validate`` of its own, which must be called instead of the validator.
        own = inspect.getattr_static(model, "model_validate")
        self.overrides_validation: Final = own is not BaseModel.__dict__["model_validate"]
        #: Some value is decoded from text (``Json``, ``Base64Str``): the decoder refuses its own output.
        self.has_decoders: Final = any(map(decodes_text, nodes))
        self.decoded_fields: Final = frozenset(
            name
            for name in (model.model_fields if self.has_decoders else ())
            if any(map(decodes_text, nodes_of([*field_nodes(core, model, name)])))
        )
        self.is_strict: Final = any(map(is_strict, nodes))
        #: pydantic itself validates instances again.
        self.revalidates_instances: Final = model.model_config.get("revalidate_instances") == "always"
        #: Validation calls no user code, and leaves the dict that it reads unchanged.
        self.is_pure: Final = not (
            has_own_code or self.overrides_validation or any(kind.startswith("function") for kind in kinds)
        )
        #: Validation may change or refuse a value that it returned before.
        self.may_change_on_revalidation: Final = self.overrides_validation or any(
            may_change_on_revalidation(node) or has_callable_discriminator(node) for node in nodes
        )
        #: Validated instances are remembered, so that they need no second validation.
        self.tracks_instances: Final = self.may_change_on_revalidation and bool(model.__weakrefoffset__)
        #: A copy must be validated: copied values would share private attributes, or keep what is excluded.
        self.must_reconstruct: Final = has_own_code or any("serialization_exclude" in node for node in nodes)

        #: For each field that needs a recursive copy, the classes that its schema names: values of these
        #: classes cross as instances.
        self.field_classes: Final[dict[str, frozenset[type]]] = {}
        #: Those of these fields in which models stay instances, because no schema describes them.
        self.opaque_fields: Final[set[str]] = set()
        if not self.is_flat:
            self._add_deep_fields(core)
        #: All classes of ``field_classes``. An instance of a subclass would be stored as its parent.
        self.nested_classes: Final[frozenset[type]] = frozenset().union(*self.field_classes.values())
        #: Some values are described by no schema (``Any``): validation passes them on without a copy.
        self.has_undescribed_values: Final = self.allows_extra or not kinds <= CLOSED
        #: A validated model may share values with the object that it was validated from.
        self.needs_isolation: Final = self.has_undescribed_values or bool(self.nested_classes)
        #: Some union may take the fields of one of its classes for another choice.
        definitions = {node["ref"]: node for node in nodes if "ref" in node}
        self.has_ambiguous_union: Final = any(has_ambiguous_choices(node, definitions) for node in nodes)
        #: pydantic can validate all models inside again in one call, and loses nothing of them.
        self.can_renew: Final = (
            bool(self.nested_classes)
            and self.is_pure
            and all(map(is_renewable, nodes))
            and not (self.has_undescribed_values or self.has_validation_aliases or self.has_decoders)
            and not (self.has_ambiguous_union or self.may_change_on_revalidation or self.must_reconstruct)
        )
        #: The undescribed values are the only mutable ones that need a look: a pickle of plain data is a
        #: snapshot.
        self.is_picklable: Final = (
            self.has_undescribed_values
            and self.is_pure
            and (self.is_simple or self.is_untyped)
            and not (self.computed_fields or self.must_reconstruct)
        )
        #: ``__dict__`` of an instance is exactly the input that another class would validate.
        self.passes_values_unchanged: Final = self.is_flat and not (
            self.computed_fields or self.tracks_instances or self.has_validation_aliases
        )

        decorators = model.__pydantic_decorators__
        #: pydantic's JSON serializer changes no value but NaN and infinite floats.
        self.is_exact_in_json: Final = (
            self.is_simple
            and kinds <= _JSON_KINDS
            and not (decorators.field_serializers or decorators.model_serializers)
            and not any(setting in model.model_config for setting in _SERIALIZER_SETTINGS)
            and not any("serialization" in node or "serialization_exclude" in node for node in nodes)
            and all(map(is_exact_in_json, nodes))
        )
        self.has_floats: Final = "float" in kinds
        #: Equal instances may be stored as different bytes, as their dicts may have another order.
        self.has_mappings: Final = "dict" in kinds or self.has_undescribed_values

    def _add_deep_fields(self, core: Any) -> None:
        """Find the fields that need a recursive copy."""
        # A validator of the whole model may have put any value into any field.
        is_wrapped = core["type"] != "model" or core["schema"]["type"] != "model-fields"
        definitions = {node["ref"]: node for node in nodes_of(core) if "ref" in node}
        for name in self.field_names:
            field = next(field_nodes(core, self.model, name), None)
            kinds, named = ({"any"}, frozenset[type]()) if field is None else reachable(field, definitions)
            if not is_wrapped and kinds <= FLAT_LEAVES | _FLAT_WRAPPERS:
                continue
            self.field_classes[name] = named
            if kinds - CLOSED and not kinds & MODELS:
                self.opaque_fields.add(name)


ModelValidator = Callable[[Any], BaseModel]


class Validators:
    """The validators of one model class. Each raises pydantic's ValidationError.

    A class that calls user code or decodes text may change or refuse its own output, so values that it has
    seen are validated without its decoders (``decoded``, ``rebuild``) or without both (``reinstate``). The
    same holds for a strict class that keeps the values of enum members.

    Attributes:
        validate: for values of unknown origin.
        decoded: for values of another class whose text is decoded already.
        rebuild: for field values of an instance of this very class, by field name.
    """

    validate: ModelValidator
    decoded: ModelValidator
    rebuild: ModelValidator

    def __init__(self, traits: SchemaTraits) -> None:
        self._traits = traits
        model = traits.model
        if traits.overrides_validation:
            self.validate = self.decoded = self.rebuild = model.model_validate
            return
        run = decoded = model.__pydantic_validator__.validate_python
        if traits.has_decoders or (traits.is_strict and model.model_config.get("use_enum_values")):
            decoded = build_validator_without(core_schema_of(model), decodes_text).validate_python
        if traits.has_validation_aliases:
            self.validate = functools.partial(run, by_alias=True, by_name=True)
            self.decoded = functools.partial(decoded, by_alias=True, by_name=True)
            self.rebuild = functools.partial(decoded, by_alias=False, by_name=True)
        else:
            self.validate, self.decoded, self.rebuild = run, decoded, decoded

    @functools.cached_property
    def reinstate(self) -> ModelValidator:
        """Validates field values that this class has validated before, and changes none of them.

        The schema is the same without all that could refuse or change them now: user code, decoders,
        strictness.
        """
        core = core_schema_of(self._traits.model)
        run = build_validator_without(
            core, lambda node: decodes_text(node) or calls_user_code(node)
        ).validate_python
        if self._traits.has_validation_aliases:
            return functools.partial(run, strict=False, by_alias=False, by_name=True)
        return functools.partial(run, strict=False)

    @functools.cached_property
    def renew(self) -> ModelValidator | None:
        """Validates field values and all models inside in one call; None if pydantic cannot."""
        validator = (
            build_renewing_validator(core_schema_of(self._traits.model)) if self._traits.can_renew else None
        )
        return None if validator is None else validator.validate_python
