"""A broken contract as a text for the model that broke it: what is wrong, what came, what was expected.

No secret is in it: what a schema declares as one is masked wherever it stands, before anything is cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel

from stroma._utils.bounded_copy import BoundedCopy, map_texts
from stroma._utils.secrets import MASK, DeclaredSecrets, Secrets, declared_secrets
from stroma._utils.text import one_line
from stroma.contracts.copying import is_record

_VALUE: Final = 200  # characters of one value that came
_READ: Final = 4000  # bytes of it that are read
_MESSAGE: Final = 300
_EXPECTED: Final = 600  # of what was expected of one field
_DEEP: Final = 4  # levels of nested models that are spelt out
_PATTERN: Final = 40
_KEY: Final = 60  # of a key that came
_FEWEST: Final = 50  # errors that are looked at, however short the text is to be
_MORE: Final = "- ... and {} more"
_HEADS: Final = {
    "output": "Your last answer was not accepted: it does not have the form that was asked for.",
    "input": "The input was not accepted: it does not have the form that is asked for.",
}
_TAILS: Final = {"output": "Answer again with the whole answer, corrected, and nothing else.", "input": ""}


def repair_prompt(
    direction: str, errors: Sequence[Any], raw: Any, schema: type[BaseModel] | None, max_chars: int
) -> str:
    """Return the errors of each field, the values received, and a compact schema of the fields concerned.

    Those are fields of the whole: a part of one is understood within it only.
    """
    looked_at = errors[: max(_FEWEST, max_chars // 20)]  # No line is shorter than that.
    declared = declared_secrets(schema)
    secrets = Secrets(schema, [raw, [e.get("input") for e in looked_at if isinstance(e, Mapping)]])
    document = _json_schema(schema)
    definitions, fields = (document or {}).get("$defs", {}), _fields_of(document)
    head, tail = _HEADS[direction], _TAILS[direction]
    wrong: dict[str, None] = {}  # Of a union, several branches complain; each thing is said once.
    expected: dict[str, str] = {}
    seen = 0
    for error in looked_at:
        if sum(map(len, wrong)) > max_chars:
            break
        seen += 1
        if not isinstance(error, Mapping):
            wrong[f"- {_cut(one_line(secrets.mask(str(error))), _MESSAGE)}"] = None
            continue
        path, branches = _follow(error, raw, fields)
        where = secrets.mask(_written(path)) or "the whole"
        kinds = [one for one in branches if one in definitions]
        if kinds:
            where += f" (if it is a {kinds[-1]})"
        came = _came(error, declared, secrets)
        wrong[f"- {where}: {_complaint(error, declared, secrets)}{came}"] = None
        field = path[:1] if fields else []
        node = fields.get(str(field[0])) if field else document
        if node is not None:
            what = _cut(_shape(node, definitions, _DEEP), _EXPECTED)
            expected.setdefault(secrets.mask(_written(field)), what)
    unseen = len(errors) - seen
    room = max_chars - len(head) - len(tail) - 60
    problems = _fitting(list(wrong), room * 6 // 10 if expected else room, unseen)
    text = f"{head}\n\nWhat is wrong:\n{problems}"
    if expected:
        lines = [f"- {where}: {what}" if where else f"- {what}" for where, what in expected.items()]
        text += f"\n\nWhat is expected:\n{_fitting(lines, room - len(problems))}"
    text += f"\n\n{tail}" if tail else ""
    return _cut(text, max_chars)


def complaints(
    errors: Sequence[Any], raw: Any, schema: type[BaseModel] | None, secrets: Secrets
) -> list[tuple[tuple[str | int, ...], str]]:
    """Return (path, message) of each error as the prompt has them, without secrets and what came."""
    fields, declared = _fields_of(_json_schema(schema)), declared_secrets(schema)
    faults: dict[tuple[tuple[str | int, ...], str], None] = {}
    for error in errors:
        if isinstance(error, Mapping):
            path = _follow(error, raw, fields)[0]
            masked = tuple(
                part if isinstance(part, int) else _cut(secrets.mask(str(part)), _KEY) for part in path
            )
            faults[masked, _complaint(error, declared, secrets)] = None
        else:
            faults[(), _cut(one_line(secrets.mask(str(error))), _MESSAGE)] = None
    return list(faults)


def _fitting(lines: list[str], room: int, unseen: int = 0) -> str:
    fitting: list[str] = []
    for line in lines:
        room -= len(line) + 1
        if room < 0 and fitting:
            break
        fitting.append(line)
    rest = len(lines) - len(fitting) + unseen
    return "\n".join([*fitting, *([_MORE.format(rest)] if rest else [])])


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else (text[: max(0, limit - 1)] + "…")[: max(0, limit)]


def _complaint(error: Mapping[str, Any], declared: DeclaredSecrets, secrets: Secrets) -> str:
    message = describe_text(error) or _WORDS.get(error.get("type", ""), str(error.get("msg", "invalid")))
    if declared.names.intersection(map(str, error.get("loc", ()))) and error.get("type") in _SPOKEN:
        message = "is not valid"  # What a validator of the user's says may quote the value.
    if declared.reveals(message):
        message = "is not valid"
    return _cut(one_line(secrets.mask(message)), _MESSAGE).rstrip(".")


_AN_OBJECT: Final = "Input should be a JSON object"
#: Types of pydantic's errors about a value in place of an object.
_OBJECT_ERRORS: Final = ("model_type", "model_attributes_type", "dataclass_type", "dict_type")


def describe_text(error: Mapping[str, Any]) -> str | None:
    """Return the problem of a text in place of an object, mostly a model's answer that is cut or in a fence.

    Returns None for any other error.
    """
    text = error.get("input")
    if error.get("type") not in _OBJECT_ERRORS or not isinstance(text, (str, bytes)):
        return None
    try:
        json.loads(text)
    except json.JSONDecodeError as problem:
        why = problem.msg.removesuffix(" at")
        return f"{_AN_OBJECT}; this is text that is not JSON: {why} at character {problem.pos}"
    except (ValueError, RecursionError):
        return f"{_AN_OBJECT}; this is text that is not JSON"
    return f"{_AN_OBJECT}; this is text"


#: What pydantic says in words of Python.
_WORDS: Final = {
    **dict.fromkeys(_OBJECT_ERRORS, _AN_OBJECT),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "Input should be a list"),
    "none_required": "Input should be null",
    "extra_forbidden": "There should be no such field",
}
_SPOKEN: Final = frozenset({"value_error", "assertion_error"})


def _came(error: Mapping[str, Any], declared: DeclaredSecrets, secrets: Secrets) -> str:
    if error.get("type") == "missing":
        return ". Nothing came there"
    if "input" not in error:
        return ""
    if declared.names.intersection(map(str, error.get("loc", ()))):
        return f". This came: {MASK}"
    text = _input_text(error["input"], declared, secrets)
    # The quote is closed: what follows is no longer what came.
    quote = '"' if text.startswith('"') and len(text) > _VALUE else ""
    return f". This came: {_cut(text, _VALUE)}{quote}"


def _input_text(value: Any, declared: DeclaredSecrets, secrets: Secrets) -> str:
    """Return the beginning of a value as JSON, without its secrets."""
    plain = BoundedCopy(_READ, declared.names, MASK).copy(value)
    plain = map_texts(plain, lambda texts: [MASK if declared.reveals(text) else text for text in texts])
    return one_line(secrets.mask(json.dumps(plain, ensure_ascii=False))[: 2 * _VALUE])


# ---------------------------------------------------------------------- the schema


def _json_schema(schema: type[BaseModel] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    try:
        return schema.model_json_schema()
    except Exception:  # A field of a class that JSON knows nothing of.
        return None


def _fields_of(document: dict[str, Any] | None) -> dict[str, Any]:
    """Return the fields of a JSON schema by name; {} if it is not an object."""
    node = document or {}
    if "$ref" in node:  # A class that holds itself.
        node = node["$defs"].get(node["$ref"].rpartition("/")[2], {})
    fields: dict[str, Any] = node.get("properties", {})
    return fields


def _follow(
    error: Mapping[str, Any], raw: Any, fields: Mapping[str, Any]
) -> tuple[list[str | int], list[str]]:
    """Return the place of an error in what came, and the branches of unions that pydantic names on the way.

    ``fields``: those of the schema, by name.
    """
    path: list[str | int] = []
    branches: list[str] = []
    loc = tuple(error.get("loc", ()))
    if "input" not in error:  # It was made by hand.
        return list(loc), []
    value = raw["value"] if isinstance(raw, dict) and [*raw] == ["value"] != [*loc[:1]] else raw
    for at, part in enumerate(loc):
        inner = _part_of(value, part)
        is_missing = error.get("type") == "missing" and at == len(loc) - 1
        is_known = inner is not _ABSENT or (at == 0 and part in fields)
        if is_known or is_missing or isinstance(part, int):
            path.append(part)
            value = inner
        else:
            branches.append(str(part))
    return path, branches


_ABSENT: Final = object()


def _part_of(value: Any, part: Any) -> Any:
    """Return a field or an item of a value; _ABSENT without it."""
    if isinstance(value, dict):
        return dict.get(value, part, _ABSENT)
    if isinstance(value, (list, tuple)):
        return value[part] if isinstance(part, int) and part < len(value) else _ABSENT
    return vars(value).get(part, _ABSENT) if is_record(value) else _ABSENT


def _written(path: Sequence[str | int]) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _NAME.fullmatch(str(part)):
            text += f".{part}" if text else str(part)
        else:  # What came is quoted, a key too.
            text += f"[{one_line(json.dumps(_cut(str(part), _KEY), ensure_ascii=False))}]"
    return text


_NAME: Final = re.compile(r"[\w$-]{1,60}")


_SEVERAL: Final = re.compile(r", | \| ")
_BOUNDS: Final = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "pattern": "matching {}",
}


def _shape(node: Any, defs: Mapping[str, Any], depth: int) -> str:
    """Return a JSON schema in one line."""
    if not isinstance(node, dict):
        return "anything"
    about = f" ({node['description']})" if isinstance(node.get("description"), str) and depth == _DEEP else ""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return (_shape(defs.get(name), defs, depth - 1) if depth else name) + about
    if "const" in node:
        return json.dumps(node["const"], ensure_ascii=False) + about
    if "enum" in node:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in node["enum"]) + about
    for key in ("anyOf", "oneOf", "allOf"):
        if key in node:
            return " | ".join(dict.fromkeys(_shape(part, defs, depth - 1) for part in node[key])) + about
    kind = node.get("type", "anything")
    if kind == "array":
        places = node.get("prefixItems")
        inner = ", ".join(_shape(place, defs, depth - 1) for place in places) if places else None
        if inner:
            text = f"[{inner}]"
        else:
            item = _shape(node.get("items"), defs, depth - 1)
            is_one = item[:1] in "{[" and " | " not in item
            text = f"list of {item}" if is_one or not _SEVERAL.search(item) else f"list of ({item})"
    elif kind == "object":
        text = _object(node, defs, depth)
    else:
        text = f"{kind} as {node['format']}" if "format" in node else str(kind)
    bounds = [
        words.format(node[key])
        for key, words in _BOUNDS.items()
        if key in node and not (key == "pattern" and len(str(node[key])) > _PATTERN)
    ]
    return text + (f", {', '.join(bounds)}" if bounds else "") + about


def _object(node: dict[str, Any], defs: Mapping[str, Any], depth: int) -> str:
    properties = node.get("properties")
    if properties is None:
        inner = node.get("additionalProperties")
        return f"object of {_shape(inner, defs, depth - 1)}" if isinstance(inner, dict) else "object"
    if depth <= 0:
        return f"object with {', '.join(properties)}"
    needed = node.get("required", ())
    fields = (
        json.dumps(name, ensure_ascii=False)
        + ("" if name in needed else "?")
        + f": {_shape(inner, defs, depth - 1)}"
        for name, inner in properties.items()
    )
    more = node.get("additionalProperties") is False
    return "{" + ", ".join(fields) + "}" + (" and no other field" if more else "")
