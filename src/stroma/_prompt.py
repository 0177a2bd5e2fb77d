"""A broken contract as a text for the model that broke it: what is wrong, what came, what was expected.

No secret is in it: what a schema declares as one is masked wherever it stands, before anything is cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Final, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import AliasChoices, AliasPath, BaseModel, Secret, SecretBytes, SecretStr

__all__ = ["repair_prompt"]

_MASK: Final = "**********"
_LONG: Final = (
    4000  # characters of what came that are searched for secrets; less than a tenth of them is shown
)
_SHORTEST_SECRET: Final = 4  # characters; shorter ones would be found in half of all words
_VALUE: Final = 200  # characters of one value that came
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
    """What is wrong with each field, what came there, and a compact schema of the fields concerned."""
    looked_at = errors[: max(_FEWEST, max_chars // 20)]  # No line is shorter than that.
    secrets = _Secrets(schema, [raw, *(e.get("input") for e in looked_at if isinstance(e, Mapping))])
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
            wrong[f"- {_cut(_line(secrets.scrub(str(error))), _MESSAGE)}"] = None
            continue
        loc = tuple(error.get("loc", ()))
        place = _follow(loc, document)
        where = secrets.scrub(_written(place.path, each=False)) or "the whole"
        if place.kind:
            where += f" (if it is a {place.kind})"
        wrong[f"- {where}: {_complaint(error, secrets)}{_came(error, loc, secrets)}"] = None
        if document is not None and place.node is not None:
            what = _cut(_shape(place.node, document.get("$defs", {}), _DEEP), _EXPECTED)
            expected.setdefault(secrets.scrub(_written(place.whole, each=True)), what)
    unseen = len(errors) - seen
    room = max_chars - len(head) - len(tail) - 60
    said = _fitting(list(wrong), room * 6 // 10 if expected else room, unseen)
    text = f"{head}\n\nWhat is wrong:\n{said}"
    if expected:
        lines = [f"- {where}: {what}" if where else f"- {what}" for where, what in expected.items()]
        text += f"\n\nWhat is expected:\n{_fitting(lines, room - len(said))}"
    text += f"\n\n{tail}" if tail else ""
    return _cut(text, max_chars)


def _fitting(lines: list[str], room: int, unseen: int = 0) -> str:
    kept: list[str] = []
    for line in lines:
        room -= len(line) + 1
        if room < 0 and kept:
            break
        kept.append(line)
    rest = len(lines) - len(kept) + unseen
    return "\n".join([*kept, *([_MORE.format(rest)] if rest else [])])


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else (text[: max(0, limit - 1)] + "…")[: max(0, limit)]


def _line(text: str) -> str:
    """The same in one line that shows as it is: what came can hold line breaks, and marks that reverse a text."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _complaint(error: Mapping[str, Any], secrets: _Secrets) -> str:
    message = _WORDS.get(error.get("type", ""), str(error.get("msg", "invalid")))
    if message == _AN_OBJECT and isinstance(error.get("input"), (str, bytes)):
        message += _why_text(error["input"])
    if secrets.names.intersection(map(str, error.get("loc", ()))) and error.get("type") in _SPOKEN:
        message = "is not valid"  # What a validator of the user's says may quote the value.
    if secrets.told_in(message):
        message = "is not valid"
    return _cut(_line(secrets.scrub(message)), _MESSAGE).rstrip(".")


def _why_text(text: str | bytes) -> str:
    """Why what came is a text: mostly an answer that the node could not parse, cut short or in a fence of Markdown."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f"; this is text, and no JSON: {error.msg} at character {error.pos}"
    except (ValueError, RecursionError):
        return "; this is text, and no JSON"
    return "; this is text"


_AN_OBJECT: Final = "Input should be a JSON object"
#: What pydantic says in words of Python.
_WORDS: Final = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dataclass_type", "dict_type"), _AN_OBJECT),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "Input should be a list"),
    "none_required": "Input should be null",
    "extra_forbidden": "There should be no such field",
}
_SPOKEN: Final = frozenset({"value_error", "assertion_error"})


def _came(error: Mapping[str, Any], loc: tuple[Any, ...], secrets: _Secrets) -> str:
    if error.get("type") == "missing":
        return ". Nothing came there"
    if "input" not in error:
        return ""
    if secrets.names.intersection(map(str, loc)):
        return f". This came: {_MASK}"
    text = secrets.written(error["input"])
    # The quote is closed: what follows is no longer what came.
    quote = '"' if text.startswith('"') and len(text) > _VALUE else ""
    return f". This came: {_cut(text, _VALUE)}{quote}"


# ---------------------------------------------------------------------- secrets


class _Secrets:
    """What must not be said: fields that hold secrets, by every name they have, and the secrets that came."""

    def __init__(self, schema: type[BaseModel] | None, values: list[Any]) -> None:
        self.names: set[str] = set()
        self._seen: set[Any] = set()
        self._texts: set[str] = set()
        self._looked_at: set[int] = set()  # Many errors can have the same value.
        self._whole = schema is not None and self._collect(schema)
        if self._whole:
            self._note(values)  # The model is nothing but a secret.
        self._find(values, 0)
        self._sorted = sorted(self._texts, key=len, reverse=True)
        # A text that nobody has parsed, with one of the fields in it.
        names = "|".join(sorted(map(re.escape, self.names)))
        self._telling = re.compile(rf"""(?<!\w)({names})["'\\*`]*\s*[:=]""") if names else None

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
        if depth > 20 or id(value) in self._looked_at:
            return
        if isinstance(value, (SecretStr, SecretBytes, Secret)):
            self._note(value.get_secret_value())
            return
        opened = _opened(value)
        if not isinstance(opened, (Mapping, list, tuple, set, frozenset)):
            return
        self._looked_at.add(id(value))
        value = opened
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if key in self.names:
                    self._note(inner)
                self._find(inner, depth + 1)
        else:
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
        if not self._sorted:
            return text
        # Not all of what is long: there can be as many secrets as items. At a cut, the half of one goes too.
        longest = len(self._sorted[0])
        piece = text[: _LONG + longest]
        for secret in self._sorted:
            if secret in piece:
                piece = piece.replace(secret, _MASK)
        return piece if len(text) <= _LONG + longest else piece[:-longest]

    def told_in(self, text: str) -> bool:
        """Whether a text names a field that holds a secret, and what is in it."""
        return self._telling is not None and self._telling.search(text) is not None

    def written(self, value: Any) -> str:
        """A value as JSON, without its secrets."""
        try:
            text = json.dumps(self._masked(value, 0), ensure_ascii=False, default=_plain)
            return _line(self.scrub(text)[: 2 * _VALUE])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # A key or a value that cannot be written.
            return f"a {type(value).__name__}"

    def _masked(self, value: Any, depth: int) -> Any:
        if isinstance(value, (SecretStr, SecretBytes, Secret)):
            return _MASK
        if isinstance(value, (str, bytes)):
            text = value if isinstance(value, str) else value.decode("utf-8", "replace")
            return _MASK if self.told_in(text) else value
        value = _opened(value)
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


def _opened(value: Any) -> Any:
    """The fields of a model or a dataclass; anything else as it is."""
    if isinstance(value, BaseModel):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {name: getattr(value, name, None) for name in value.__dataclass_fields__}
    return value


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


class _Place(NamedTuple):
    """Where an error is.

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


def _follow(loc: tuple[Any, ...], document: dict[str, Any] | None) -> _Place:
    if document is None:
        return _Place(list(loc), None, None, list(loc))
    defs = document.get("$defs", {})
    path: list[str | int] = []
    node: dict[str, Any] | None = document
    union: _Place | None = None
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
                union = _Place(path, node, kind, list(path))
            node = chosen
            continue
        for branch in branches:
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
                return union._replace(path=path) if union else _Place(path, None, None, path)
            if isinstance(found, dict):
                path.append(part)
                node = found
                break
    return union._replace(path=path) if union else _Place(path, node, None, path)


def _branch(
    part: Any, node: dict[str, Any], branches: list[dict[str, Any]], defs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The branch of a union that a part of a path names, by its discriminator, its class or its plain type."""
    if not isinstance(part, str) or len([b for b in branches if b.get("type") != "null"]) < 2:
        return None
    reference = node.get("discriminator", {}).get("mapping", {}).get(part)
    if isinstance(reference, str):
        found = defs.get(reference.rpartition("/")[2])
        return found if isinstance(found, dict) else None
    kind = _TYPES.get(part.partition("[")[0])
    for branch in branches:
        title = branch.get("title")
        if part == title or (title and part.endswith(f" {title}]")) or kind == branch.get("type", ""):
            return branch
    return None


_TYPES: Final = {
    "int": "integer", "str": "string", "float": "number", "bool": "boolean", "list": "array", "tuple": "array",
    "set": "array", "dict": "object",
}  # fmt: skip


def _written(path: list[str | int], *, each: bool) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += "[]" if each else f"[{part}]"
        elif _NAME.fullmatch(str(part)):
            text += f".{part}" if text else str(part)
        else:  # What came is quoted, a key too.
            text += f"[{_line(json.dumps(_cut(str(part), _KEY), ensure_ascii=False))}]"
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
        f"{json.dumps(name, ensure_ascii=False)}{'' if name in needed else '?'}: {_shape(inner, defs, depth - 1)}"
        for name, inner in properties.items()
    )
    more = node.get("additionalProperties") is False
    return "{" + ", ".join(fields) + "}" + (" and no other field" if more else "")
