"""A broken contract as a text for the model that broke it: what is wrong, what came, what was expected.

No secret is in it: what a schema declares as one is masked wherever it stands, before anything is cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from stroma._utils.bounded_copy import BoundedCopy, map_texts
from stroma._utils.secrets import MASK, DeclaredSecrets, Secrets, declared_secrets
from stroma._utils.text import one_line

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
    """Return the errors of each field, the values received, and a compact schema of the fields concerned."""
    looked_at = errors[: max(_FEWEST, max_chars // 20)]  # No line is shorter than that.
    declared = declared_secrets(schema)
    secrets = Secrets(schema, [raw, [e.get("input") for e in looked_at if isinstance(e, Mapping)]])
    document = _json_schema(schema)
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
        loc = tuple(error.get("loc", ()))
        place = _follow(loc, document)
        where = secrets.mask(_written(place.path, each=False)) or "the whole"
        if place.kind:
            where += f" (if it is a {place.kind})"
        wrong[f"- {where}: {_complaint(error, declared, secrets)}{_came(error, loc, declared, secrets)}"] = (
            None
        )
        if document is not None and place.node is not None:
            what = _cut(_shape(place.node, document.get("$defs", {}), _DEEP), _EXPECTED)
            expected.setdefault(secrets.mask(_written(place.whole, each=True)), what)
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
    errors: Sequence[Any], schema: type[BaseModel] | None, secrets: Secrets
) -> list[tuple[tuple[str | int, ...], str]]:
    """Return (path, message) of each error as the prompt has them, without secrets and what came."""
    document, declared = _json_schema(schema), declared_secrets(schema)
    faults: dict[tuple[tuple[str | int, ...], str], None] = {}
    for error in errors:
        if isinstance(error, Mapping):
            path = _follow(tuple(error.get("loc", ())), document).path
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


def _came(error: Mapping[str, Any], loc: tuple[Any, ...], declared: DeclaredSecrets, secrets: Secrets) -> str:
    if error.get("type") == "missing":
        return ". Nothing came there"
    if "input" not in error:
        return ""
    if declared.names.intersection(map(str, loc)):
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


def _branches(node: Any, defs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the alternatives of a node, without references and unions around them."""
    stack, seen = [node], 0
    while stack and seen < 100:
        node, seen = stack.pop(), seen + 1
        if not isinstance(node, dict):
            continue
        if "$ref" in node:
            stack.append(defs.get(node["$ref"].rpartition("/")[2]))
            continue
        inner = [part for key in ("anyOf", "oneOf", "allOf") for part in node.get(key, ())]
        stack += reversed(inner)
        if not inner:
            yield node


class _ErrorLocation(NamedTuple):
    """The location of an error.

    Attributes:
        path: without the names of a union's branches.
        node: the schema of what is expected at ``whole``; None where nothing is.
        kind: the class that it was taken for, where it could be several.
        whole: where what is expected stands: ``path``, or the place of the union around it.
    """

    path: list[str | int]
    node: dict[str, Any] | None
    kind: str | None
    whole: list[str | int]


def _follow(loc: tuple[Any, ...], document: dict[str, Any] | None) -> _ErrorLocation:
    if document is None:
        return _ErrorLocation(list(loc), None, None, list(loc))
    defs = document.get("$defs", {})
    path: list[str | int] = []
    node: dict[str, Any] | None = document
    union: _ErrorLocation | None = None
    for part in loc:
        if node is None:
            path.append(part)
            continue
        branches = list(_branches(node, defs))
        chosen = _branch(part, node, branches, defs)
        if chosen is not None:
            # Without a discriminator all branches complain, each of what it would have been.
            if union is None and "discriminator" not in node:
                kind = str(chosen.get("title", part)) if "properties" in chosen else None
                union = _ErrorLocation(path, node, kind, list(path))
            node = chosen
            continue
        for branch in branches:
            subschema: Any = None
            if isinstance(part, int) and branch.get("type") == "array":
                places = branch.get("prefixItems", [])
                subschema = places[part] if part < len(places) else branch.get("items", {})
            elif isinstance(part, str) and part in branch.get("properties", {}):
                subschema = branch["properties"][part]
            elif isinstance(part, str) and isinstance(branch.get("additionalProperties"), dict):
                subschema = branch["additionalProperties"]
            elif isinstance(part, str) and branch.get("additionalProperties") is False and part == loc[-1]:
                path.append(part)  # It is not expected at all: what is expected is around it.
                return union._replace(path=path) if union else _ErrorLocation(path, None, None, path)
            if isinstance(subschema, dict):
                path.append(part)
                node = subschema
                break
    return union._replace(path=path) if union else _ErrorLocation(path, node, None, path)


def _branch(
    part: Any, node: dict[str, Any], branches: list[dict[str, Any]], defs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the branch of a union that a part of a path names: by tag, class or plain type."""
    if not isinstance(part, str) or len([b for b in branches if b.get("type") != "null"]) < 2:
        return None
    reference = node.get("discriminator", {}).get("mapping", {}).get(part)
    if isinstance(reference, str):
        definition = defs.get(reference.rpartition("/")[2])
        return definition if isinstance(definition, dict) else None
    kind = _TYPES.get(part.partition("[")[0])
    for branch in branches:
        title = branch.get("title")
        if part == title or (title and part.endswith(f" {title}]")) or kind == branch.get("type", ""):
            return branch
    return None


_TYPES: Final = {
    "int": "integer",
    "str": "string",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}


def _written(path: list[str | int], *, each: bool) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += "[]" if each else f"[{part}]"
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
            text = f"list of {item}" if item[:1] in "{[" or not _SEVERAL.search(item) else f"list of ({item})"
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
