"""The tagged JSON in which states are stored that plain JSON would change.

``{"$f": "nan"}`` is a float, ``{"$b": ...}`` bytes, ``{"$t": [...]}`` a tuple, and so on; ``{"$c": ...}`` is
a value of a class that only the schema of its field can restore. No class, module or function is ever named.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import ipaddress
import json
import math
import pathlib
import re
import uuid
import zoneinfo
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Final

from pydantic import BaseModel, SecretBytes, SecretStr

#: True while secrets may be written, because the result goes through a codec.
_KEEPS_SECRETS: ContextVar[bool] = ContextVar("stroma_keeps_secrets", default=False)

Plain = Callable[[Any], Any]


class NotSerialisable(TypeError):
    """A state holds a value that cannot be stored. The message names the field.

    Where: ``result.failure`` of a FAILED run whose input or output cannot be stored.
    Cause: a secret, an open file, a client, a value that contains itself, or a class that its field does not
    declare.
    Fix: keep it out of the state, pass it in the run's context, or declare the field with the class of its
    value.
    """


def tag(value: Any, path: tuple[str, ...], plain: Plain) -> Any:
    """Return tagged JSON for a value. "$c" tags a value that only the declared class can restore.

    ``path`` names the value in errors; ``plain`` converts models and dataclasses to dicts. Raises
    NotSerialisable.
    """
    kind = type(value)
    if value is None or kind is str or kind is bool or kind is int:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$f": repr(value)}
    if kind is list:
        return [tag(v, (*path, str(i)), plain) for i, v in enumerate(value)]
    if kind is dict:
        if all(type(k) is str and not k.startswith("$") for k in value):
            return {k: tag(v, (*path, k), plain) for k, v in value.items()}
        return {"$d": [[tag(k, path, plain), tag(v, (*path, str(k)), plain)] for k, v in value.items()]}
    write = _WRITERS.get(kind)
    if write is not None:
        return write(value, path, plain)
    if isinstance(value, (SecretStr, SecretBytes)):
        if _KEEPS_SECRETS.get():
            secret = value.get_secret_value()
            return (
                {"$sb": base64.b64encode(secret).decode()} if isinstance(secret, bytes) else {"$ss": secret}
            )
        raise NotSerialisable(
            f"{'.'.join(path)} cannot be serialised: it is a secret, and a store without a codec "
            "stores no secrets; keep it in the run's context, or give the store a codec"
        )
    if isinstance(value, enum.Enum):
        return {"$c": tag(value.value, path, plain)}
    if isinstance(value, collections.deque):
        return {"$q": [tag(list(value), path, plain), value.maxlen]}
    if isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
        return {"$c": tag(plain(value), path, plain)}
    if isinstance(value, re.Pattern):
        return {"$r": [tag(value.pattern, path, plain), value.flags & ~re.DEBUG]}  # A text, or bytes.
    if isinstance(value, _textual()):
        return {"$c": str(value)}
    base: Any
    for base in (str, int, float, dict, list, tuple):
        if isinstance(value, base):
            return {"$c": tag(base(value), path, plain)}
    raise NotSerialisable(
        f"{'.'.join(path)} cannot be serialised: {kind.__module__}.{kind.__qualname__} has no stored form; "
        "keep it out of the state, or hand it to nodes through the run's context"
    )


def _write_datetime(value: dt.datetime, path: tuple[str, ...], plain: Plain) -> Any:
    zone = value.tzinfo
    if isinstance(zone, zoneinfo.ZoneInfo) and zone.key:
        return {"$dtz": [value.replace(tzinfo=None).isoformat(), zone.key, value.fold]}
    if zone is not None and zone.utcoffset(value) is None:
        raise NotSerialisable(
            f"{'.'.join(path)} cannot be serialised: its time zone has no offset; use one with an offset"
        )
    return {"$dt": [value.isoformat(), value.fold]}


#: The largest exponent of a stored Decimal, positive or negative. Converting one to int takes 0.1 ms; with
#: 10**9, a few stored bytes would hang the reader.
_MAX_EXPONENT: Final = 10_000


def _write_decimal(value: decimal.Decimal, path: tuple[str, ...]) -> Any:
    if _is_beyond(value):
        raise NotSerialisable(
            f"{'.'.join(path)} cannot be serialised: the exponent of a Decimal is at most "
            f"{_MAX_EXPONENT:,}, got {value.adjusted():,}; store such a number as text"
        )
    return {"$n": str(value)}


def _read_decimal(text: Any) -> decimal.Decimal:
    value = decimal.Decimal(text)
    if _is_beyond(value):
        raise ValueError(
            f"a stored Decimal has the exponent {value.adjusted():,}; at most {_MAX_EXPONENT:,} is written"
        )
    return value


def _is_beyond(value: decimal.Decimal) -> bool:
    exponent = value.as_tuple().exponent
    # A number with all of its digits written is as long as its stored form.
    return isinstance(exponent, int) and (exponent > _MAX_EXPONENT or value.adjusted() < -_MAX_EXPONENT)


def _sorted(values: Iterable[Any], path: tuple[str, ...], plain: Plain) -> list[Any]:
    # The order of a set differs from process to process, and equal states must be stored as equal bytes.
    return sorted(
        (tag(value, path, plain) for value in values), key=lambda tagged: json.dumps(tagged, sort_keys=True)
    )


@functools.cache
def _textual() -> tuple[type, ...]:
    """Return the classes that are stored as text; pydantic's URLs take long to import."""
    from pydantic import AnyUrl, PostgresDsn

    return (
        pathlib.PurePath,
        AnyUrl,
        PostgresDsn.__base__ or PostgresDsn,  # The base of all URLs with several hosts.
        ipaddress.IPv4Address,
        ipaddress.IPv6Address,
        ipaddress.IPv4Network,
        ipaddress.IPv6Network,
        ipaddress.IPv4Interface,
        ipaddress.IPv6Interface,
    )


_WRITERS: Final[dict[type, Callable[[Any, tuple[str, ...], Plain], Any]]] = {
    bytes: lambda v, _path, _plain: {"$b": base64.b64encode(v).decode()},
    bytearray: lambda v, _path, _plain: {"$ba": base64.b64encode(v).decode()},
    decimal.Decimal: lambda v, path, _plain: _write_decimal(v, path),
    uuid.UUID: lambda v, _path, _plain: {"$u": str(v)},
    complex: lambda v, _path, _plain: {"$j": [repr(v.real), repr(v.imag)]},
    dt.datetime: _write_datetime,
    dt.date: lambda v, _path, _plain: {"$da": v.isoformat()},
    dt.time: lambda v, _path, _plain: {"$ti": [v.isoformat(), v.fold]},
    dt.timedelta: lambda v, _path, _plain: {"$td": [v.days, v.seconds, v.microseconds]},
    tuple: lambda v, p, plain: {"$t": [tag(x, p, plain) for x in v]},
    set: lambda v, p, plain: {"$s": _sorted(v, p, plain)},
    frozenset: lambda v, p, plain: {"$fs": _sorted(v, p, plain)},
}
_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "$c": lambda v: untag(v),
    "$f": float,
    "$b": base64.b64decode,
    "$ba": lambda v: bytearray(base64.b64decode(v)),
    "$n": lambda v: _read_decimal(v),
    "$u": uuid.UUID,
    "$j": lambda v: complex(float(v[0]), float(v[1])),
    "$dt": lambda v: dt.datetime.fromisoformat(v[0]).replace(fold=v[1]),
    "$dtz": lambda v: dt.datetime.fromisoformat(v[0]).replace(tzinfo=zoneinfo.ZoneInfo(v[1]), fold=v[2]),
    "$da": dt.date.fromisoformat,
    "$ti": lambda v: dt.time.fromisoformat(v[0]).replace(fold=v[1]),
    "$ss": SecretStr,
    "$sb": lambda v: SecretBytes(base64.b64decode(v)),
    "$td": lambda v: dt.timedelta(*v),
    "$d": lambda v: {untag(k): untag(x) for k, x in v},
    "$t": lambda v: tuple(untag(x) for x in v),
    "$s": lambda v: {untag(x) for x in v},
    "$q": lambda v: collections.deque(untag(v[0]), v[1]),
    "$r": lambda v: re.compile(untag(v[0]), v[1]),
    "$fs": lambda v: frozenset(untag(x) for x in v),
}


@contextlib.contextmanager
def keeping_secrets() -> Iterator[None]:
    """Let tag() write secrets within this context."""
    token = _KEEPS_SECRETS.set(True)
    try:
        yield
    finally:
        _KEEPS_SECRETS.reset(token)


def untag(value: Any) -> Any:
    """Return decoded JSON with tagged values restored to their types."""
    if isinstance(value, list):
        return [untag(v) for v in value]
    if isinstance(value, dict):
        if len(value) == 1:
            ((tag, inner),) = value.items()
            read = _READERS.get(tag)
            if read is not None:
                return read(inner)
            if tag.startswith("$"):
                raise ValueError(f"unknown tag {tag!r} in a stored value")
        return {k: untag(v) for k, v in value.items()}
    return value
