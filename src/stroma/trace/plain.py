"""Plain data of a state: what JSON can hold, and the secrets in it."""

from __future__ import annotations

import dataclasses
import marshal
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin
from uuid import UUID
from weakref import WeakKeyDictionary

from pydantic import BaseModel, Secret, SecretBytes, SecretStr
from pydantic_core import to_jsonable_python

__all__ = []


_DEEPEST: Final = 100
#: Types that hold nothing else.
_PLAIN: Final = frozenset({str, int, float, bool, bytes, type(None), datetime})
_MORE_PLAIN: Final = frozenset({date, time, timedelta, Decimal, UUID})
_CONTAINERS: Final = frozenset({dict, list, tuple})
_LARGE: Final = 100  # values


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


def secrets_in(value: Any) -> Iterator[str]:
    """Yield the texts that pydantic's secret types hide in any state, as deep as jsonable() goes."""
    # With a stack, and no call for each plain value: 4 ms for a state of 60,000 values instead of 60.
    stack = [(value, 0)]
    while stack:
        value, depth = stack.pop()
        kind = type(value)
        inside: Iterable[Any]
        if kind is dict:
            inside = value.values()
        elif kind is list or kind is tuple:
            inside = value
        elif isinstance(value, (SecretStr, SecretBytes, Secret)):
            yield from texts_in(value.get_secret_value(), depth)
            continue
        elif depth > _DEEPEST:
            continue
        elif isinstance(value, BaseModel):
            extra = value.__pydantic_extra__
            if not extra and not may_hold_secrets(kind):
                continue
            inside = [value.__dict__, extra] if extra else [value.__dict__]
        elif isinstance(value, Mapping):
            inside = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside = value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            # Those with slots have no __dict__.
            fields = [getattr(value, one.name, None) for one in dataclasses.fields(value)]
            inside = [getattr(value, "__dict__", {}), *fields]
        else:
            continue
        if depth > _DEEPEST:
            continue
        depth += 1
        stack += [
            (inner, depth)
            for inner in inside
            if type(inner) not in _PLAIN and not (type(inner) in _CONTAINERS and _is_plain(inner))
        ]


def _is_plain(container: Any) -> bool:
    """Return True for a large container that holds nothing but plain data."""
    if len(container) < _LARGE:
        return False
    try:
        # Takes exact types alone, and runs no code of theirs: 2 ms for 60,000 values.
        marshal.dumps(container)
    except ValueError:
        return False
    return True


#: What is known of classes of models: the classes that one involves, or None if it may hold secrets.
_secretless: WeakKeyDictionary[type, tuple[type, ...] | None] = WeakKeyDictionary()


def may_hold_secrets(model: type[BaseModel]) -> bool:
    """Return False if the annotations of a model say that no instance holds a secret."""
    try:
        involved = _secretless[model]
    except KeyError:
        classes: dict[type, None] = {}
        involved = tuple(classes) if _declares_no_secret(model, classes) else None
        _secretless[model] = involved
    # An instance of a subclass may hold more.
    return involved is None or any(one is not model and one.__subclasses__() for one in involved)


def _declares_no_secret(annotation: Any, classes: dict[type, None]) -> bool:
    if annotation in _PLAIN or annotation in _MORE_PLAIN or annotation is None:
        return True
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if annotation in classes:
            return True
        if issubclass(annotation, BaseModel):
            classes[annotation] = None
            return annotation.model_config.get("extra") != "allow" and all(
                _declares_no_secret(one.annotation, classes) for one in annotation.model_fields.values()
            )
        return issubclass(annotation, Enum)
    origin = get_origin(annotation)
    if origin is Literal:
        return True
    if origin in (list, dict, tuple, set, frozenset, Union, UnionType, Annotated):
        arguments = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
        return bool(arguments) and all(
            one is Ellipsis or _declares_no_secret(one, classes) for one in arguments
        )
    return False


def texts_in(secret: Any, depth: int = 0) -> Iterator[str]:
    """Yield every text in the value of a Secret, which may be a structure."""
    if isinstance(secret, bytes):  # As a message has it after decode(), and after repr().
        yield from filter(None, (secret.decode("utf-8", "ignore"), repr(secret)[2:-1]))
    elif isinstance(secret, (Mapping, list, tuple)) and depth <= _DEEPEST:
        for inner in secret.values() if isinstance(secret, Mapping) else secret:
            yield from texts_in(inner, depth + 1)
    elif secret is not None and not isinstance(secret, bool) and str(secret):
        yield str(secret)
