"""Plain data of a state: what JSON can hold, and the secrets in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import Enum
from typing import Any, Final

from pydantic import BaseModel, Secret, SecretBytes, SecretStr
from pydantic_core import to_jsonable_python

__all__ = []


_DEEPEST: Final = 100


def jsonable(value: Any, depth: int = 0) -> Any:
    """Plain JSON data for any state: what JSON cannot say becomes text, never an error; what lies deeper than 100 levels is named."""
    if depth > _DEEPEST:
        return f"<{type(value).__name__}>"
    if value is None or isinstance(value, (bool, str)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Mapping):
        return {
            k if isinstance(k, str) else str(jsonable(k, depth + 1)): jsonable(v, depth + 1)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [jsonable(v, depth + 1) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(v, depth + 1) for v in value), key=lambda v: (type(v).__name__, str(v)))
    if isinstance(value, Enum):
        return jsonable(value.value, depth + 1)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, BaseModel):
        return {name: jsonable(getattr(value, name, None), depth + 1) for name in type(value).model_fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name), depth + 1) for f in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    try:
        return to_jsonable_python(value)
    except Exception:
        try:
            return repr(value)
        except Exception:
            return f"<{type(value).__name__}>"


def secrets_in(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield the texts that pydantic's secret types hide in any state, as deep as jsonable() goes."""
    if isinstance(value, (SecretStr, SecretBytes, Secret)):
        yield from texts_in(value.get_secret_value(), depth)
    elif depth > _DEEPEST:
        return
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from secrets_in(inner, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for inner in value:
            yield from secrets_in(inner, depth + 1)
    elif isinstance(value, BaseModel):
        for inner in (value.__dict__, value.__pydantic_extra__ or {}):
            yield from secrets_in(inner, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from secrets_in(getattr(value, "__dict__", {}), depth + 1)
        for one in dataclasses.fields(value):  # Those with slots have no __dict__.
            yield from secrets_in(getattr(value, one.name, None), depth + 1)


def texts_in(secret: Any, depth: int = 0) -> Iterator[str]:
    """Yield every text in the value of a Secret, which may be a structure."""
    if isinstance(secret, bytes):  # As a message has it after decode(), and after repr().
        yield from filter(None, (secret.decode("utf-8", "ignore"), repr(secret)[2:-1]))
    elif isinstance(secret, (Mapping, list, tuple)) and depth <= _DEEPEST:
        for inner in secret.values() if isinstance(secret, Mapping) else secret:
            yield from texts_in(inner, depth + 1)
    elif secret is not None and not isinstance(secret, bool) and str(secret):
        yield str(secret)
