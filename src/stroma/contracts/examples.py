"""Example values for a JSON schema, for people who have to write one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import BaseModel

from stroma.contracts.schema import schema_of

#: Characters of a text, and items of a list.
_MAX_SIZE: Final = 100
_ANY: Final = "\x00any\x00"
_DEFINITIONS: Final = "#/$defs/"
_FORMATS: Final = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "time": "00:00:00",
    "duration": "PT0S",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "email": "name@example.com",
    "uri": "https://example.com/",
}


class NoExampleError(ValueError):
    """No example of a schema is known."""


def example_text(schema: Mapping[str, Any] | None) -> str:
    """Return an example of a JSON schema as JSON; "" if none is known, or any JSON fits.

    Inside of it, "..." stands for a value that may be any JSON: a person has to replace it.
    """
    try:
        value = None if schema is None else example_of(schema, any_value=_ANY)
    except NoExampleError:
        return ""
    return "" if value is None else json.dumps(value, ensure_ascii=False).replace(json.dumps(_ANY), "...")


def example_of(schema: Mapping[str, Any], *, any_value: Any = None) -> Any:
    """Return the smallest value for a JSON schema: required properties, or without any the defaults.

    ``any_value``: stands for a part that may be any JSON. Raises NoExampleError, also for a schema that says
    nothing: few questions mean null.
    """
    definitions = schema.get("$defs")
    try:
        value = _Examples(definitions if isinstance(definitions, Mapping) else {}, any_value).of(schema)
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


class _Examples:
    """Makes examples of one document."""

    def __init__(self, definitions: Mapping[str, Any], any_value: Any) -> None:
        self._definitions = definitions
        self._any_value = any_value
        self._open: list[str] = []  # The definitions around the present one.

    def of(self, schema: Any) -> Any:
        """Return an example of a part of the document. Raises NoExampleError."""
        if not isinstance(schema, Mapping):
            return self._any_value
        reference = schema.get("$ref")
        if isinstance(reference, str):
            return self._of_definition(reference.removeprefix(_DEFINITIONS))
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][0]
        for word in ("anyOf", "oneOf", "allOf"):
            if schema.get(word):
                return self._first_of(schema[word])
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = kind[0] if kind else None
        make: Callable[[Mapping[str, Any]], Any] | None = {
            "string": _text,
            "integer": _number,
            "number": _number,
            "boolean": lambda _: False,
            "array": lambda array: self._list(array),
            "object": lambda shape: self._object(shape),
        }.get(str(kind))
        if kind == "null":
            return None
        return self._any_value if make is None else make(schema)

    def _of_definition(self, name: str) -> Any:
        if name in self._open:
            raise NoExampleError("the schema requires itself")
        self._open.append(name)
        try:
            return self.of(self._definitions.get(name))
        finally:
            self._open.pop()

    def _first_of(self, choices: list[Any]) -> Any:
        """Return the example of the first choice that has one."""
        for choice in choices:
            try:
                return self.of(choice)
            except NoExampleError:
                continue
        raise NoExampleError("no choice of the schema has an example")

    def _list(self, schema: Mapping[str, Any]) -> list[Any]:
        if schema.get("minItems", 0) > _MAX_SIZE:
            raise NoExampleError("an example would be too long")
        items = [self.of(item) for item in schema.get("prefixItems") or ()]
        return items + [self.of(schema.get("items")) for _ in range(schema.get("minItems", 0) - len(items))]

    def _object(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        properties = schema.get("properties") or {}
        if required := schema.get("required"):
            return {name: self.of(properties.get(name)) for name in required}
        return {name: one["default"] for name, one in properties.items() if _shows_default(one)}


def _shows_default(schema: Mapping[str, Any]) -> bool:
    """Return True for a property with a default that is a value of it: that of a secret is masked."""
    is_null = schema.get("default") is None
    takes_null = {"type": "null"} in schema.get("anyOf", ())
    return "default" in schema and not schema.get("writeOnly") and (takes_null or not is_null)


def _text(schema: Mapping[str, Any]) -> str:
    if schema.get("minLength", 0) > _MAX_SIZE:
        raise NoExampleError("an example would be too long")
    text: str = _FORMATS.get(schema.get("format", "")) or "." * max(schema.get("minLength", 3), 1)
    text = text[: schema.get("maxLength")]
    if "pattern" in schema or len(text) < schema.get("minLength", 0):
        raise NoExampleError("no text with this pattern is known")
    return text


def _number(schema: Mapping[str, Any]) -> float:
    least, most = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    step = schema.get("multipleOf", 1)
    for number in (0, least, most, above + step, below - step):
        is_multiple = "multipleOf" not in schema or number % step == 0
        if least <= number <= most and above < number < below and is_multiple:
            return number
    raise NoExampleError("no number within these limits is known")
