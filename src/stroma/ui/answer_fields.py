"""Fields of a form that asks for an answer, made from the JSON schema stored with its question.

Simple properties (texts, numbers, booleans, choices, lists of texts, each of them optional) have a field of
their own; any other property is written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from stroma._utils.text import clean

#: Beginning of the names of these fields in a form.
PREFIX: Final = "field:"
_MAX_FIELDS: Final = 100
_DEFINITIONS: Final = "#/$defs/"
_INPUTS: Final[dict[str, Input]] = {"string": "text", "integer": "integer", "number": "number"}

Input = Literal["text", "integer", "number", "choice", "lines", "json"]


class AnswerField(NamedTuple):
    """One field of the form.

    Attributes:
        name: the property; "" for an answer that is not an object.
        input: "lines": one text a line. "choice": one of ``choices``. "json": any JSON.
        is_required: an empty field is not omitted; so of any field that shows a default.
        takes_null: an empty field is null, if it is required.
        choices: each as JSON, and as it is shown.
        value: the default, as text of the field.
    """

    name: str
    label: str
    input: Input
    is_required: bool
    takes_null: bool = False
    choices: tuple[tuple[str, str], ...] = ()
    value: str = ""
    hint: str = ""


class FieldError(NamedTuple):
    """An error of a field; ``name`` is "" for the answer as a whole."""

    name: str
    message: str


def fields_of(schema: Mapping[str, Any] | None) -> list[AnswerField]:
    """Return the fields for a JSON schema; [] for an answer that is written as JSON."""
    if schema is None:
        return []
    definitions = _mapping(schema.get("$defs"))
    shape = _resolve(schema, definitions)
    properties = _mapping(shape.get("properties"))
    if shape.get("type") != "object":
        field = _field("", shape, definitions, is_required=True)
        return [] if field.input == "json" else [field]
    if not properties or len(properties) > _MAX_FIELDS:
        return []
    required = shape.get("required")
    names = required if isinstance(required, list) else []
    return [
        _field(name, _mapping(one), definitions, is_required=name in names)
        for name, one in properties.items()
    ]


def parse_fields(fields: list[AnswerField], form: Mapping[str, str]) -> tuple[Any, list[FieldError]]:
    """Return the answer in a form, and its errors. An empty field that is not required is omitted."""
    answer: dict[str, Any] = {}
    errors: list[FieldError] = []
    for field in fields:
        text = form.get(PREFIX + field.name, "")
        try:
            if text.strip():
                answer[field.name] = _parse(field, text)
            elif field.is_required:
                answer[field.name] = _empty(field)
        except (ValueError, RecursionError) as error:
            errors.append(FieldError(field.name, clean(str(error), 300)))
    is_value = [field.name for field in fields] == [""]
    return (answer.get("") if is_value else answer), errors


def _empty(field: AnswerField) -> Any:
    """Return the value of an empty field that is required. Raises ValueError."""
    if field.takes_null:
        return None
    if field.input == "lines":
        return []
    if field.input == "text" and field.value:
        return ""
    raise ValueError("required")


def _parse(field: AnswerField, text: str) -> Any:
    """Return the value of a field. Raises ValueError, RecursionError."""
    if field.input == "text":
        return text.replace("\r\n", "\n")
    if field.input == "lines":
        return [line for line in text.splitlines() if line.strip()]
    if field.input == "choice":
        if text not in dict(field.choices):
            raise ValueError("not one of the choices")
        return json.loads(text)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError("not JSON" if field.input == "json" else "not a number") from error


def _field(
    name: str, schema: Mapping[str, Any], definitions: Mapping[str, Any], *, is_required: bool
) -> AnswerField:
    shape, takes_null = _without_null(_resolve(schema, definitions), definitions)
    kind, choices = _input_of(shape)
    title = schema.get("title", shape.get("title"))
    label = title if isinstance(title, str) and title else name or "Answer"
    hint = schema.get("description", shape.get("description"))
    value = _shown(kind, schema["default"]) if schema.get("default") is not None else ""
    return AnswerField(
        name,
        clean(label, 200),
        kind,
        is_required or bool(value),
        takes_null,
        choices,
        value,
        clean(hint, 500) if isinstance(hint, str) else "",
    )


def _input_of(shape: Mapping[str, Any]) -> tuple[Input, tuple[tuple[str, str], ...]]:
    """Return what a value is written with, and the choices."""
    kind, values = shape.get("type"), shape.get("enum")
    if "const" in shape:
        values = [shape["const"]]
    if kind == "boolean" and values is None:
        values = [True, False]
    if isinstance(values, list):
        choices = [(json.dumps(one), one if isinstance(one, str) else json.dumps(one)) for one in values]
        return "choice", tuple(choices)
    if kind == "array" and _mapping(shape.get("items")).get("type") == "string":
        return "lines", ()
    return (_INPUTS.get(kind, "json") if isinstance(kind, str) else "json"), ()


def _without_null(shape: Mapping[str, Any], definitions: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return the schema of a value that may be null without that, and True if it may be."""
    either = shape.get("anyOf")
    if not isinstance(either, list):
        return shape, False
    others = [one for one in map(_mapping, either) if one.get("type") != "null"]
    if len(others) != 1:
        return {}, len(others) < len(either)
    return _resolve(others[0], definitions), len(others) < len(either)


def _resolve(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema in place of a reference to it."""
    for _ in range(10):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith(_DEFINITIONS):
            return schema
        schema = _mapping(definitions.get(reference.removeprefix(_DEFINITIONS)))
    return {}


def _shown(kind: Input, value: Any) -> str:
    """Return a default as text of a field."""
    if kind == "text" and isinstance(value, str):
        return value
    if kind == "lines" and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n".join(value)
    return json.dumps(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
