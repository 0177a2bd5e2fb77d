"""The values of secrets: what must not leave in a message either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Final

__all__ = ["secrets_in"]

_DEEPEST: Final = 100


def secrets_in(value: Any, depth: int = 0) -> Iterator[str]:
    """The texts of every SecretStr, SecretBytes and Secret in a state, as a message may say them."""
    if depth > _DEEPEST or value is None or isinstance(value, (str, int, float)):
        return
    # Asked of the class: what states hold may answer to any name.
    reveal = getattr(type(value), "get_secret_value", None)
    if reveal is not None:
        yield from _said(reveal(value), depth)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from secrets_in(item, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from secrets_in(item, depth + 1)
    elif hasattr(type(value), "__pydantic_fields__") or is_dataclass(value):
        yield from secrets_in(getattr(value, "__dict__", None), depth + 1)
        yield from secrets_in(getattr(value, "__pydantic_extra__", None), depth + 1)


def _said(secret: Any, depth: int) -> Iterator[str]:
    texts: tuple[str, ...]
    if isinstance(secret, str):
        texts = (secret,)
    elif isinstance(secret, bytes):
        texts = (secret.decode("utf-8", "ignore"), repr(secret)[2:-1])
    elif isinstance(secret, (Mapping, list, tuple, set, frozenset)):
        items = secret.values() if isinstance(secret, Mapping) else secret
        for item in items:
            if depth <= _DEEPEST:
                yield from _said(item, depth + 1)
        return
    else:
        texts = (str(secret),)
    yield from filter(None, texts)
