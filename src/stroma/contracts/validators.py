"""The validators of one model class: one for each origin that a value may have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from stroma.contracts.core_schema import (
    build_renewing_validator,
    build_validator_without,
    calls_user_code,
    core_schema_of,
    decodes_text,
)
from stroma.contracts.traits import SchemaTraits

__all__ = ["ModelValidator", "Validators"]

ModelValidator = Callable[[Any], BaseModel]


class Validators:
    """The validators of one model class. Each raises pydantic's ValidationError.

    A class that calls user code or decodes text may change or refuse its own output, so values that it has
    seen are validated without its decoders (``decoded``, ``rebuild``) or without both (``reinstate``).

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
        if traits.has_decoders:
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
