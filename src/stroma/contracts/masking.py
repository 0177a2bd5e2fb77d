"""Secrets that must not be said: known by the schema that declares them, found in what came, masked in texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Final, get_args, get_origin, get_type_hints

from pydantic import AliasChoices, AliasPath, BaseModel, Secret, SecretBytes, SecretStr

from stroma._utils.text import one_line

__all__ = ["MASK", "Secrets", "names_of_field"]

MASK: Final = "**********"
_LONG: Final = 4000  # characters of what came that are searched for secrets
_SHOWN: Final = 400  # characters of a value that are given back, at most
#: Hold no secret of their own.
_PLAIN: Final = frozenset({str, bytes, int, float, bool, type(None)})
_SHORTEST_SECRET: Final = 4  # characters; shorter ones would be found in half of all words


class Secrets:
    """The secrets of one input: secret fields by every name they have, and the secret values."""

    def __init__(self, schema: type[BaseModel] | None, values: list[Any]) -> None:
        self.names: set[str] = set()
        self._seen: set[Any] = set()
        self._texts: set[str] = set()
        self._looked_at: set[int] = set()  # Many errors can have the same value.
        #: The model is nothing but a secret.
        self.is_secret = schema is not None and self._collect(schema)
        if self.is_secret:
            self._note(values)
        self._find(values, 0)
        self._sorted = sorted(self._texts, key=len, reverse=True)
        # A text that nobody has parsed, with one of the fields in it.
        names = "|".join(sorted(map(re.escape, self.names)))
        self._revealing = re.compile(rf"""(?<!\w)({names})["'\\*`]*\s*[:=]""") if names else None

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
        is_secret = False
        for argument in get_args(annotation):
            is_secret |= self._collect(argument)
        fields = _fields(annotation)
        if fields and annotation not in self._seen:
            self._seen.add(annotation)
            for names, inner in fields:
                if self._collect(inner):
                    self.names.update(names)
                    is_secret |= "root" in names and issubclass(annotation, BaseModel)
        return is_secret

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
                if type(inner) not in _PLAIN:
                    self._find(inner, depth + 1)
        else:
            for inner in value:
                if type(inner) not in _PLAIN:  # A list of a million texts takes 20 ms, in place of 700.
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
                piece = piece.replace(secret, MASK)
        return piece if len(text) <= _LONG + longest else piece[:-longest]

    def is_revealed_in(self, text: str) -> bool:
        """Return True if a text names a field that holds a secret, followed by a value."""
        return self._revealing is not None and self._revealing.search(text) is not None

    def written(self, value: Any) -> str:
        """Return a value as JSON, without its secrets."""
        try:
            text = json.dumps(self._masked(value, 0), ensure_ascii=False, default=_plain)
            return one_line(self.scrub(text)[:_SHOWN])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # A key or a value that cannot be written.
            return f"a {type(value).__name__}"

    def _masked(self, value: Any, depth: int) -> Any:
        if isinstance(value, (SecretStr, SecretBytes, Secret)):
            return MASK
        if isinstance(value, (str, bytes)):
            text = value if isinstance(value, str) else value.decode("utf-8", "replace")
            return MASK if self.is_revealed_in(text) else value
        value = _opened(value)
        if depth > 20:
            return "..."
        if isinstance(value, Mapping):
            return {
                str(key): MASK if key in self.names else self._masked(inner, depth + 1)
                for key, inner in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._masked(inner, depth + 1) for inner in value]
        return value


def _plain(value: Any) -> str:
    return str(value)


def _opened(value: Any) -> Any:
    """Return the fields of a model or a dataclass, and any other value unchanged."""
    if isinstance(value, BaseModel):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {name: getattr(value, name, None) for name in value.__dataclass_fields__}
    return value


def _fields(annotation: Any) -> list[tuple[set[str], Any]]:
    """Return the names and annotations of the fields of a model, dataclass or typed dict; [] for any other annotation."""
    if not isinstance(annotation, type):
        return []
    if issubclass(annotation, BaseModel):
        return [
            (set(names_of_field(name, info)), info.annotation)
            for name, info in annotation.model_fields.items()
        ]
    if not (hasattr(annotation, "__dataclass_fields__") or hasattr(annotation, "__total__")):
        return []
    try:
        hints = get_type_hints(annotation, include_extras=True)
    except Exception:  # They name what is not there at run time.
        hints = annotation.__annotations__
    return [({name}, hint) for name, hint in hints.items()]


def names_of_field(name: str, info: Any) -> Iterator[str]:
    """Yield the name of a field and its aliases."""
    yield name
    for alias in (info.alias, info.validation_alias, info.serialization_alias):
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        for choice in choices:
            if isinstance(choice, AliasPath):
                yield from (part for part in choice.path if isinstance(part, str))
            elif isinstance(choice, str):
                yield choice
