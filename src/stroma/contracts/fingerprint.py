"""Fingerprints of model classes: short hashes that change when a contract does."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

__all__ = ["fingerprint_of"]

_DEFINITIONS: Final = "#/$defs/"
#: Keys of a JSON schema that hold values and no schemas.
_VALUES: Final = frozenset({"const", "default", "enum"})
#: Keys that hold schemas by names of the user's own.
_MAPS: Final = frozenset({"mapping", "patternProperties", "properties"})
_WORDS: Final = ("title", "description", "examples")
#: Of functions and objects in the text of an annotation: another one in each process.
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint_of(model: type[BaseModel]) -> str:
    """Return 16 hexadecimal digits that change when the fields, their types or their constraints change.

    Names, docstrings, titles and examples of the class and of the classes inside it do not count.
    """
    try:
        with (
            warnings.catch_warnings()
        ):  # pydantic warns of defaults that JSON cannot represent; a contract has none.
            warnings.simplefilter("ignore")
            shape = model.model_json_schema(by_alias=False)
        shape = _without_words(shape)
    except Exception:  # Not every type has a JSON schema.
        shape = {name: _text_of(info) for name, info in model.model_fields.items()}
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _text_of(info: FieldInfo) -> str:
    return _ADDRESS.sub("", f"{info.annotation} {info.metadata} {info.is_required()}")


def _without_words(shape: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema without titles, descriptions and examples, whose definitions have numbers."""
    definitions: dict[str, Any] = shape.get("$defs", {})
    numbers: dict[str, int] = {}

    def strip(value: Any) -> Any:
        if isinstance(value, list):
            return [strip(item) for item in value]
        if isinstance(value, str) and value.startswith(_DEFINITIONS):
            return f"{_DEFINITIONS}{numbers.setdefault(value.removeprefix(_DEFINITIONS), len(numbers))}"
        return strip_schema(value) if isinstance(value, dict) else value

    def strip_schema(schema: dict[str, Any]) -> dict[str, Any]:
        stripped: dict[str, Any] = {}
        for key in sorted(schema):
            value = schema[key]
            if key in _MAPS:
                stripped[key] = {name: strip(value[name]) for name in sorted(value)}
            elif key in _VALUES:
                stripped[key] = value
            elif key not in _WORDS and key != "$defs":
                stripped[key] = strip(value)
        return stripped

    def strip_definitions() -> Iterator[tuple[int, Any]]:
        done = 0
        while done < len(numbers):  # A definition may refer to further ones.
            name = list(numbers)[done]
            yield done, strip(definitions.get(name))
            done += 1

    return {"schema": strip_schema(shape), "definitions": dict(strip_definitions())}
