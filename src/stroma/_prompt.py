"""A broken contract as a text for the model that broke it: what is wrong, what came, what was expected.

No secret is in it: what a schema declares as one is masked wherever it stands, before anything is cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, get_args, get_origin, get_type_hints

from pydantic import AliasChoices, AliasPath, BaseModel, Secret, SecretBytes, SecretStr

__all__ = ["repair_prompt"]

_MASK: Final = "**********"
_SHORTEST_SECRET: Final = 4  # characters; shorter ones would be found in half of all words
_VALUE: Final = 200  # characters of one value that came
_MESSAGE: Final = 300
_EXPECTED: Final = 600  # of what was expected of one field
_DEEP: Final = 4  # levels of nested models that are spelt out
_PATTERN: Final = 40
_MORE: Final = "- ... and {} more"
_HEADS: Final = {
    "output": "Your last answer was not accepted: it does not have the form that was asked for.",
    "input": "The input was not accepted: it does not have the form that is asked for.",
}
_TAILS: Final = {"output": "Answer again with the whole answer, corrected, and nothing else.", "input": ""}


def repair_prompt(
    direction: str, errors: Sequence[Any], raw: Any, schema: type[BaseModel] | None, max_chars: int
) -> str:
    """What is wrong with each field, what came there, and a compact schema of the fields concerned."""
    secrets = _Secrets(schema, [raw, *(e.get("input") for e in errors if isinstance(e, Mapping))])
    document = _json_schema(schema)
    head, tail = _HEADS[direction], _TAILS[direction]
    wrong: dict[str, None] = {}  # Of a union, several branches complain; each thing is said once.
    expected: dict[str, str] = {}
    for error in errors:
        if not isinstance(error, Mapping):
            wrong[f"- {_cut(secrets.scrub(str(error)), _MESSAGE)}"] = None
            continue
        loc = tuple(error.get("loc", ()))
        path, node = _follow(loc, document)
        where = _written(path, each=False)
        wrong[f"- {where or 'the whole'}: {_complaint(error, secrets)}{_came(error, loc, secrets)}"] = None
        if document is not None and node is not None:
            what = _cut(_shape(node, document.get("$defs", {}), _DEEP), _EXPECTED)
            expected.setdefault(_written(path, each=True), what)
    room = max_chars - len(head) - len(tail) - 60
    said = _fitting(list(wrong), room * 6 // 10 if expected else room)
    text = f"{head}\n\nWhat is wrong:\n{said}"
    if expected:
        lines = [f"- {where}: {what}" if where else f"- {what}" for where, what in expected.items()]
        text += f"\n\nWhat is expected:\n{_fitting(lines, room - len(said))}"
    text += f"\n\n{tail}" if tail else ""
    return _cut(text, max_chars)


def _fitting(lines: list[str], room: int) -> str:
    kept: list[str] = []
    for line in lines:
        room -= len(line) + 1
        if room < 0 and kept:
            break
        kept.append(line)
    rest = len(lines) - len(kept)
    return "\n".join([*kept, *([_MORE.format(rest)] if rest else [])])


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else (text[: max(0, limit - 1)] + "…")[: max(0, limit)]


def _complaint(error: Mapping[str, Any], secrets: _Secrets) -> str:
    message = str(error.get("msg", "invalid"))
    if secrets.names.intersection(map(str, error.get("loc", ()))) and error.get("type") in _SPOKEN:
        message = "is not valid"  # What a validator of the user's says may quote the value.
    return _cut(secrets.scrub(message), _MESSAGE).rstrip(".")


_SPOKEN: Final = frozenset({"value_error", "assertion_error"})


def _came(error: Mapping[str, Any], loc: tuple[Any, ...], secrets: _Secrets) -> str:
    if error.get("type") == "missing":
        return ". Nothing came there"
    if "input" not in error:
        return ""
    if secrets.names.intersection(map(str, loc)):
        return f". This came: {_MASK}"
    return f". This came: {_cut(secrets.written(error['input']), _VALUE)}"


# ---------------------------------------------------------------------- secrets


class _Secrets:
    """What must not be said: fields that hold secrets, by every name they have, and the secrets that came."""

    def __init__(self, schema: type[BaseModel] | None, values: list[Any]) -> None:
        self.names: set[str] = set()
        self._seen: set[Any] = set()
        self._texts: set[str] = set()
        if schema is not None and self._collect(schema):
            self._note(values)  # The model is nothing but a secret.
        self._find(values, 0)

    def _collect(self, annotation: Any) -> bool:
        """Note the secret fields of all models in an annotation; whether it can be a secret itself."""
        aliased = getattr(annotation, "__value__", getattr(annotation, "__supertype__", None))
        if aliased is not None:
            return self._collect(aliased)
        kind = get_origin(annotation) or annotation
        if isinstance(kind, type) and issubclass(kind, (SecretStr, SecretBytes, Secret)):
            return True
        if isinstance(annotation, str):  # A hint that could not be read.
            return "Secret" in annotation
        found = False
        for argument in get_args(annotation):
            found |= self._collect(argument)
        fields = _fields(annotation)
        if fields and annotation not in self._seen:
            self._seen.add(annotation)
            for names, inner in fields:
                if self._collect(inner):
                    self.names.update(names)
                    found |= "root" in names and issubclass(annotation, BaseModel)
        return found

    def _find(self, value: Any, depth: int) -> None:
        if depth > 20:
            return
        if isinstance(value, (SecretStr, SecretBytes, Secret)):
            self._note(value.get_secret_value())
        elif isinstance(value, BaseModel):
            self._find(dict(value), depth + 1)
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                if key in self.names:
                    self._note(inner)
                self._find(inner, depth + 1)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for inner in value:
                self._find(inner, depth + 1)

    def _note(self, value: Any) -> None:
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, (list, tuple, set, frozenset)):
            for inner in value:
                self._note(inner)
        elif isinstance(value, (str, bytes, int, float)) and not isinstance(value, bool):
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
            self._texts |= {
                t for t in (text, repr(text)[1:-1], json.dumps(text)[1:-1]) if len(t) >= _SHORTEST_SECRET
            }

    def scrub(self, text: str) -> str:
        for secret in sorted(self._texts, key=len, reverse=True):
            text = text.replace(secret, _MASK)
        return text

    def written(self, value: Any) -> str:
        """A value as JSON, without its secrets."""
        try:
            return self.scrub(json.dumps(self._masked(value, 0), ensure_ascii=False, default=_plain))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # A key or a value that cannot be written.
            return f"a {type(value).__name__}"

    def _masked(self, value: Any, depth: int) -> Any:
        if isinstance(value, (SecretStr, SecretBytes, Secret)):
            return _MASK
        if isinstance(value, BaseModel):
            value = dict(value)
        if depth > 20:
            return "..."
        if isinstance(value, Mapping):
            return {
                str(key): _MASK if key in self.names else self._masked(inner, depth + 1)
                for key, inner in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._masked(inner, depth + 1) for inner in value]
        return value


def _plain(value: Any) -> str:
    return str(value)


def _fields(annotation: Any) -> list[tuple[set[str], Any]]:
    """The names and annotations of the fields of a model, dataclass or typed dict; [] for anything else."""
    if not isinstance(annotation, type):
        return []
    if issubclass(annotation, BaseModel):
        return [(set(_names(name, info)), info.annotation) for name, info in annotation.model_fields.items()]
    if not (hasattr(annotation, "__dataclass_fields__") or hasattr(annotation, "__total__")):
        return []
    try:
        hints = get_type_hints(annotation, include_extras=True)
    except Exception:  # They name what is not there at run time.
        hints = annotation.__annotations__
    return [({name}, hint) for name, hint in hints.items()]


def _names(name: str, info: Any) -> Iterator[str]:
    yield name
    for alias in (info.alias, info.validation_alias, info.serialization_alias):
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        for choice in choices:
            if isinstance(choice, AliasPath):
                yield from (part for part in choice.path if isinstance(part, str))
            elif isinstance(choice, str):
                yield choice


# ---------------------------------------------------------------------- the schema


def _json_schema(schema: type[BaseModel] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    try:
        return schema.model_json_schema()
    except Exception:  # A field of a class that JSON knows nothing of.
        return None


def _branches(node: Any, defs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What a node can be, without references and unions around it."""
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


def _follow(
    loc: tuple[Any, ...], document: dict[str, Any] | None
) -> tuple[list[str | int], dict[str, Any] | None]:
    """The path of an error without the names of a union's branches, and the schema there; None where there is none."""
    if document is None:
        return list(loc), None
    defs = document.get("$defs", {})
    path: list[str | int] = []
    node: dict[str, Any] | None = document
    for part in loc:
        if node is None:
            path.append(part)
            continue
        for branch in _branches(node, defs):
            found: Any = None
            if isinstance(part, int) and branch.get("type") == "array":
                places = branch.get("prefixItems", [])
                found = places[part] if part < len(places) else branch.get("items", {})
            elif isinstance(part, str) and part in branch.get("properties", {}):
                found = branch["properties"][part]
            elif isinstance(part, str) and isinstance(branch.get("additionalProperties"), dict):
                found = branch["additionalProperties"]
            elif isinstance(part, str) and branch.get("additionalProperties") is False and part == loc[-1]:
                path.append(part)  # It is not expected at all: what is expected is around it.
                return path, None
            if isinstance(found, dict):
                path.append(part)
                node = found
                break
    return path, node


def _written(path: list[str | int], *, each: bool) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += "[]" if each else f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text


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
    """A JSON schema in a line."""
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
        text = f"[{inner}]" if inner else f"list of {_shape(node.get('items'), defs, depth - 1)}"
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
        f"{json.dumps(name, ensure_ascii=False)}{'' if name in needed else '?'}: {_shape(inner, defs, depth - 1)}"
        for name, inner in properties.items()
    )
    more = node.get("additionalProperties") is False
    return "{" + ", ".join(fields) + "}" + (" and no other field" if more else "")
