"""Copies of any value as plain JSON data of bounded size."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, Final
from uuid import UUID

from pydantic import BaseModel, Secret, SecretBytes, SecretStr

_DEEPEST: Final = 50
_LARGEST_INT: Final = 10_000  # bits; json writes no more than 4,300 digits
_AS_TEXT: Final = (date, time, timedelta, Decimal, UUID, PurePath, complex)
_SEQUENCES: Final = (list, tuple, set, frozenset)
_CUT: Final = "…"
_TYPE_NAME: Final = type.__dict__["__name__"].__get__


class BoundedCopy:
    """Copies any value as plain JSON data of at most so many bytes. Never raises, whatever it holds.

    Only the items of builtin containers and the fields of models and dataclasses are read. Any other value,
    also a mapping of another class, is replaced by the name of its type, unless a subclass copies it.

    Args:
        max_bytes: of the copy as JSON in UTF-8.
        hidden: keys and fields whose values are secrets.
        mask: stands for a secret.

    Attributes:
        is_cut: the value is larger, or deeper, than the copy.
    """

    def __init__(self, max_bytes: int, hidden: Container[str] = frozenset(), mask: str = "") -> None:
        self.is_cut = False
        self._room = max_bytes - 2
        self._hidden = hidden
        self._mask = mask
        #: Ids of the containers around the current value.
        self._around: set[int] = set()

    def copy(self, value: Any) -> Any:
        """Return the copy."""
        return self._copy(value, 0)

    def _copy(self, value: Any, depth: int) -> Any:
        try:
            return self._copy_any(value, depth)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # Code of the object's class.
            return self._text(f"<{_name_of(type(value))}>")

    def _copy_any(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            self._room -= 5
            return value
        if issubclass(kind, Enum):
            return self._copy(value.value, depth)
        if issubclass(kind, str):
            return self._text(str.__str__(value))
        if issubclass(kind, int):
            number = int.__int__(value)
            bits = number.bit_length()
            if bits > _LARGEST_INT:
                self.is_cut = True
                return self._text(f"<int of {bits:,} bits>")
            return self._number(number, len(str(number)))
        if issubclass(kind, float):
            real = float.__float__(value)
            return self._number(real, len(repr(real))) if math.isfinite(real) else self._text(repr(real))
        if issubclass(kind, (bytes, bytearray)):
            part = bytes(value[: max(0, self._room) + 1])
            return self._text(part.decode("utf-8", "backslashreplace"))
        if issubclass(kind, (SecretStr, SecretBytes, Secret)):
            return self._secret()
        if issubclass(kind, _AS_TEXT):
            return self._text(value.isoformat() if issubclass(kind, (date, time)) else str(value))
        if issubclass(kind, type):
            return self._text(f"<class {_name_of(value)}>")
        if issubclass(kind, BaseModel) and kind.__pydantic_root_model__:
            return self._copy(value.__dict__.get("root"), depth + 1)
        if issubclass(kind, (dict, BaseModel)) or dataclasses.is_dataclass(kind):
            return self._container(value, depth, is_mapping=True)
        if issubclass(kind, _SEQUENCES):
            return self._container(value, depth, is_mapping=False)
        return self._copy_other(value, depth)

    def _copy_other(self, value: Any, depth: int) -> Any:
        """Copy a value of another kind."""
        self.is_cut = self.is_cut or issubclass(type(value), Mapping)  # Its items are code of its class.
        return self._text(f"<{_name_of(type(value))}>")

    def _container(self, value: Any, depth: int, *, is_mapping: bool) -> Any:
        if depth >= _DEEPEST or id(value) in self._around:
            self.is_cut = True
            return self._text(_CUT)
        self._room -= 3
        self._around.add(id(value))
        try:
            return self._mapping(value, depth) if is_mapping else self._list(value, depth)
        finally:
            self._around.discard(id(value))

    def _mapping(self, value: Any, depth: int) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for key, inner in items_of(value):
            if self._is_full():
                break
            name = self._copy(key, depth + 1)
            if not isinstance(name, str):
                name = json.dumps(name)
                self._room -= _size(name)
            self._room -= 4
            if self._is_full():
                break
            copied[name] = self._secret() if self._is_hidden(name, value) else self._copy(inner, depth + 1)
        return copied

    def _is_hidden(self, name: str, owner: Any) -> bool:
        """Return True if a key or field of a value holds a secret."""
        return name in self._hidden

    def _list(self, value: Any, depth: int) -> list[Any]:
        base: Any = next(one for one in _SEQUENCES if issubclass(type(value), one))
        copied: list[Any] = []
        for inner in base.__iter__(value):
            if self._is_full():
                break
            self._room -= 1
            copied.append(self._copy(inner, depth + 1))
        return copied

    def _is_full(self) -> bool:
        if self._room < 16:  # The least that a value takes, and the mark of a cut.
            self.is_cut = True
            return True
        return False

    def _secret(self) -> str:
        self._room -= len(self._mask) + 2
        return self._mask

    def _number(self, number: float, size: int) -> Any:
        if size > self._room:
            self.is_cut = True
            return self._text(_CUT)
        self._room -= size
        return number

    def _text(self, text: str) -> str:
        room = max(0, self._room - 2)
        part = text[:room]
        size = _size(part)
        if size <= room and len(part) == len(text):
            self._room -= size + 2
            return part
        self.is_cut = True
        room = max(0, room - 3)
        while size > room:
            part = part[: min(len(part) - 1, len(part) * room // size)]
            size = _size(part)
        self._room -= size + 5
        return part + _CUT


def _name_of(kind: type) -> str:
    # A metaclass can have a __name__ of its own.
    return str(_TYPE_NAME(kind))


def _size(text: str) -> int:
    """Return how many bytes a text takes in JSON, without its quotes."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace")) - 2


def items_of(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return the items of a mapping, or the stored fields of a model or a dataclass, as they are."""
    if issubclass(type(value), dict):
        return dict.items(value)
    if isinstance(value, BaseModel):
        declared = type(value).model_fields
        fields = {k: v for k, v in value.__dict__.items() if k in declared and not declared[k].exclude}
        return {**(value.__pydantic_extra__ or {}), **fields}.items()
    names = [one.name for one in dataclasses.fields(value)]
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def map_texts(value: Any, change: Callable[[list[str]], Sequence[str]]) -> Any:
    """Return plain JSON data with each text, key and number in it replaced by ``change(texts)``.

    A number whose text changes becomes the changed text.
    """
    texts = list(_leaf_texts(value))
    return _rebuild(value, iter(change(texts)))


def _leaf_texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaf_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaf_texts(inner)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _rebuild(value: Any, texts: Iterator[str]) -> Any:
    if isinstance(value, dict):
        return {next(texts): _rebuild(inner, texts) for inner in value.values()}
    if isinstance(value, list):
        return [_rebuild(inner, texts) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    text = next(texts)
    return text if isinstance(value, str) or text != str(value) else value
