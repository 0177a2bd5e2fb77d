"""Example values for a JSON schema, for people who have to write one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import BaseModel

from stroma.contracts.schema import schema_of

__all__ = ["NoExampleError", "example_for", "example_of"]

_DEFINITIONS: Final = "#/$defs/"
_FORMATS: Final = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "time": "00:00:00",
    "duration": "PT0S",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "uuid1": "00000000-0000-1000-8000-000000000000",
    "uuid3": "00000000-0000-3000-8000-000000000000",
    "uuid5": "00000000-0000-5000-8000-000000000000",
    "email": "name@example.com",
    "name-email": "name@example.com",
    "uri": "https://example.com/",
    "json-string": "null",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "ipvanyaddress": "192.0.2.1",
    "ipv4network": "192.0.2.0/24",
    "ipv6network": "2001:db8::/32",
    "ipvanynetwork": "192.0.2.0/24",
    "ipv4interface": "192.0.2.1/24",
    "ipv6interface": "2001:db8::1/32",
    "ipvanyinterface": "192.0.2.1/24",
}
#: Texts that are tried for a pattern, each repeated to the length that is required.
_TEXTS: Final = ("...", "a", "A", "0", "1", "-1", "0.0", "a0", "A0", "2026-01-01", "a@b.cc")


class NoExampleError(ValueError):
    """No example of a schema is known."""


def example_of(schema: Mapping[str, Any]) -> Any:
    """Return the smallest value for a JSON schema: required properties only. Raises NoExampleError."""
    definitions = schema.get("$defs")
    return _Examples(definitions if isinstance(definitions, Mapping) else {}).of(schema)


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

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions
        self._open: list[str] = []  # The definitions around the present one.

    def of(self, schema: Any) -> Any:
        """Return an example of a part of the document. Raises NoExampleError."""
        if not isinstance(schema, Mapping):
            return None
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
        return None if make is None else make(schema)

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
        items = [self.of(item) for item in schema.get("prefixItems") or ()]
        needed = schema.get("minItems", 0)
        if schema.get("uniqueItems") and needed > len(items) + 1:
            raise NoExampleError("the items of an example would be equal")
        while len(items) < needed:
            items.append(self.of(schema.get("items")))
        return items

    def _object(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        properties, names = schema.get("properties") or {}, schema.get("required") or ()
        value = {name: self.of(properties.get(name)) for name in names}
        while len(value) < schema.get("minProperties", 0):
            value[f"key{len(value)}"] = self.of(schema.get("additionalProperties"))
        return value


def _text(schema: Mapping[str, Any]) -> str:
    at_least: int = schema.get("minLength", 0)
    at_most: float = schema.get("maxLength", math.inf)
    known = _FORMATS.get(schema.get("format", ""))
    for one in _TEXTS if known is None else (known,):
        text: str = one * max(1, math.ceil(at_least / len(one)))
        text = text[: int(min(at_most, max(at_least, len(text))))] if known is None else text
        if at_least <= len(text) <= at_most and re.search(schema.get("pattern", ""), text):
            return text
    raise NoExampleError("no text is known that has the pattern")


def _number(schema: Mapping[str, Any]) -> float:
    step = schema.get("multipleOf", 1 if schema.get("type") == "integer" else None)
    least = max(schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf))
    most = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf))
    near: float = max(0, least) if most > 0 else most  # Zero if it is within the limits.
    candidates: list[float] = [near, near + 1, near - 1, (least + most) / 2]
    if step:
        candidates = [(math.floor(near / step) + offset) * step for offset in (0, 1, -1)]
    excluded = (schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum"))
    for number in candidates:
        if least <= number <= most and number not in excluded:
            return number
    raise NoExampleError("no number is known that has these limits")
