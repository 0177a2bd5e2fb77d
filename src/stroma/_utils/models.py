"""Base class of settings, which refuses unknown names; what is wrong with data, in words."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from stroma._utils.text import did_you_mean


class StrictModel(BaseModel):
    """A model that refuses unknown fields; its error names the nearest field."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and cls.model_config.get("extra") == "forbid":
            unknown = value.keys() - cls.model_fields.keys()
            if unknown and not any(field.validation_alias for field in cls.model_fields.values()):
                raise _unknown_fields(cls, value, unknown)
        return value  # With aliases, which a subclass may have, pydantic itself decides.


def complaints_of(error: ValidationError) -> list[tuple[str, str]]:
    """Return path and message of each wrong field, without its value: it may be secret. "": of the whole."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    return [(".".join(map(str, one["loc"])), one["msg"]) for one in errors]


def _unknown_fields(model: type[BaseModel], value: dict[Any, Any], unknown: set[Any]) -> ValidationError:
    from pydantic_core import InitErrorDetails, PydanticCustomError

    errors: list[InitErrorDetails] = []
    for name in value:
        if name in unknown:
            hint = did_you_mean(str(name), model.model_fields) or _all_of(model.model_fields)
            # As pydantic itself says it, but for the hint.
            error = PydanticCustomError(
                "extra_forbidden", "Extra inputs are not permitted{hint}", {"hint": hint and f"; {hint}"}
            )
            errors.append({"type": error, "loc": (str(name),), "input": value[name]})
    return ValidationError.from_exception_data(model.__name__, errors)


def _all_of(names: Any) -> str:
    """Return a sentence that lists the names, if they are few."""
    return f"the fields are {', '.join(names)}" if len(names) <= 12 else ""
