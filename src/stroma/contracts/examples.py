"""Example values for a JSON schema, for people who have to write one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

from stroma.contracts.schema import schema_of

_ANY: Final = "\x00any\x00"
_DEFINITIONS: Final = "#/$defs/"
_LEAVES: Final = {"string": "...", "integer": 0, "number": 0, "boolean": False, "null": None, "array": []}
#: Words of a schema that refuse some values of a type, so that none of them is an example.
_BOUNDS: Final = frozenset(
    {
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "maxLength",
        "maximum",
        "minItems",
        "minLength",
        "minimum",
        "multipleOf",
        "pattern",
    }
)


class NoExampleError(ValueError):
    """No example of a schema is known."""


def example_text(schema: Mapping[str, Any] | None) -> str:
    """Return an example of a JSON schema as JSON; "" if none is known, or any JSON fits.

    Inside of it, "..." stands for a value of which no example is known: a person has to replace it.
    """
    try:
        value = None if schema is None else example_of(schema, any_value=_ANY)
    except NoExampleError:
        return ""
    return "" if value is None else json.dumps(value, ensure_ascii=False).replace(json.dumps(_ANY), "...")


def example_of(schema: Mapping[str, Any], *, any_value: Any = None) -> Any:
    """Return a small value for a JSON schema: required properties, or without any the defaults.

    ``any_value``: stands for a part that may be any JSON, or has bounds. Raises NoExampleError, also for a
    schema that says nothing: few questions mean null.
    """
    definitions = schema.get("$defs", {})

    def example(part: Any, around: tuple[str, ...] = ()) -> Any:
        if not isinstance(part, Mapping):
            return any_value
        reference = part.get("$ref")
        if isinstance(reference, str):
            if reference in around:
                raise NoExampleError("the schema requires itself")
            return example(definitions.get(reference.removeprefix(_DEFINITIONS)), (*around, reference))
        if "const" in part or part.get("enum"):
            return part["const"] if "const" in part else part["enum"][0]
        for choice in part.get("anyOf") or part.get("oneOf") or part.get("allOf") or ():
            try:
                return example(choice, around)
            except NoExampleError:
                continue
        if part.get("type") != "object":
            return any_value if part.keys() & _BOUNDS else _LEAVES.get(str(part.get("type")), any_value)
        properties = part.get("properties", {})
        if required := part.get("required"):
            return {name: example(properties.get(name), around) for name in required}
        # The default of a secret is masked.
        shown = {name: one for name, one in properties.items() if not one.get("writeOnly")}
        return {name: one["default"] for name, one in shown.items() if one.get("default") is not None}

    try:
        value = example(schema)
    except NoExampleError:
        raise
    except Exception as error:  # A stored schema may be anything.
        raise NoExampleError(f"the schema cannot be read: {error}") from error
    if value is any_value or value is None:
        raise NoExampleError("the schema does not limit its values")
    return value


def example_for(model: type[BaseModel]) -> Any:
    """Return an example as JSON data that the model accepts. Raises NoExampleError."""
    try:
        value = example_of(model.model_json_schema())
        schema_of(model).validator.validate_python(value, by_alias=True, by_name=True)
    except Exception as error:  # Not every type has a JSON schema, and code of the class may raise anything.
        raise NoExampleError(f"no example of {model.__name__} is known") from error
    return value
