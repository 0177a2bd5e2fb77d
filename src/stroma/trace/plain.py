"""Plain data of a state: what JSON can hold."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import Enum
from itertools import islice
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

_DEEPEST: Final = 100
_MOST_ITEMS: Final = 100_000  # of a mapping that is not a dict: it may be endless
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")


def jsonable(value: Any, depth: int = 0) -> Any:
    """Return plain JSON data for any state, never an error: other values become text, level 100 the end.

    The text of an object has no address, so it is the same in every process.
    """
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
            for k, v in islice(value.items(), None if issubclass(type(value), dict) else _MOST_ITEMS)
        }
    if isinstance(value, (list, tuple, deque)):
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
        if not isinstance(value, Iterator):  # It may be endless, and belongs to its code.
            return to_jsonable_python(value)
    except Exception:
        pass
    try:
        return _ADDRESS.sub("", repr(value))
    except Exception:
        return f"<{type(value).__name__}>"
