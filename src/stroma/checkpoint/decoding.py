"""Decoding of stored records: all that a store holds besides outputs and inputs.

Damage can change anything, so everything is checked here: encoding, depth, numbers and types. Whatever is
wrong is one kind of error, CorruptCheckpoint, which names the record.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

from stroma.checkpoint.errors import CorruptCheckpoint

__all__ = ["MAX_INT", "RecordName", "decode_json", "decode_number", "decode_text"]

MAX_INT: Final = 2**63 - 1
#: Levels of a value of any type. Writers nest less: the deepest one is a rejected output.
_MAX_DEPTH: Final = 200


class RecordName(NamedTuple):
    """Name of a record for messages.

    Attributes:
        kind: such as "note" or "question".
        place: its key among the records of this kind; "" if there is only one.
    """

    run_id: str
    kind: str
    place: str = ""

    def __str__(self) -> str:
        return f"the {self.kind}{self.place and f' {self.place!r}'} of run {self.run_id!r}"

    def damaged(self, problem: str = "") -> CorruptCheckpoint:
        """Return the error for the record."""
        record, why = str(self), problem and f": {problem}"
        return CorruptCheckpoint(
            f"{record} is damaged{why}; restore the store from a backup, restart the run, or start a new one"
        )


def decode_json(data: bytes | str, shape: Any, name: RecordName) -> Any:
    """Return a record: a JSON type, a NamedTuple, or a TypedDict of them. Raises CorruptCheckpoint."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, TypeError, RecursionError) as error:
        raise name.damaged(type(error).__name__) from error
    try:
        return _checker(shape)(value)
    except _Misfit as error:
        raise name.damaged(str(error)) from None


def decode_text(data: bytes, name: RecordName) -> str:
    """Return a record that is a text. Raises CorruptCheckpoint."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise name.damaged(type(error).__name__) from error


def decode_number(text: str | bytes, name: RecordName) -> int:
    """Return a record, or a part of its key, that is a number from 0 on. Raises CorruptCheckpoint."""
    if not (text.isdigit() and text.isascii() and len(text) < 20 and int(text) <= MAX_INT):
        raise name.damaged(f"{text[:40]!a} is not a number")
    return int(text)


class _Misfit(Exception):
    """A value is not of the shape that it must have."""


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


Check = Callable[[Any], Any]


@lru_cache(maxsize=256)
def _checker(shape: Any) -> Check:
    """Return the function that checks a value and makes its NamedTuples. It raises _Misfit."""
    origin, parts = get_origin(shape), get_args(shape)
    if shape is Any:
        return _check_depth
    if shape is float:
        return _check_float
    if shape is int:
        return _check_int
    if origin in (Union, types.UnionType):
        return _union(tuple(map(_checker, parts)))
    if origin is Literal:
        return _literal(parts)
    if origin is list or (origin is tuple and parts[1:] == (...,)):
        return _sequence(_checker(parts[0]), origin)
    if origin is tuple:
        return _fields(tuple(map(_checker, parts)), tuple)
    if origin is dict:
        return _mapping(_checker(parts[0]), _checker(parts[1]))
    hints = get_type_hints(shape) if is_typeddict(shape) or hasattr(shape, "_fields") else {}
    checks = {name: _checker(hint) for name, hint in hints.items()}
    if is_typeddict(shape):
        return _record(checks)
    if hints:
        return _fields(tuple(checks.values()), shape._make)
    return _exactly(shape)


def _check_depth(value: Any, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise _Misfit("it is too deep")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, depth + 1)
    return value


def _check_float(value: Any) -> float:
    if type(value) not in (int, float) or not _is_finite(value):
        raise _wrong(value, "a number")
    return value  # type: ignore[no-any-return]


def _is_finite(value: float) -> bool:
    return math.isfinite(value) if type(value) is float else abs(value) <= MAX_INT


def _check_int(value: Any) -> int:
    if type(value) is not int or abs(value) > MAX_INT:
        raise _wrong(value, "an integer")
    return value


def _exactly(kind: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise _wrong(value, kind.__name__)
        return value

    return check


def _literal(values: tuple[Any, ...]) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or value not in values:
            raise _wrong(value, " or ".join(map(repr, values)))
        return value

    return check


def _union(checks: tuple[Check, ...]) -> Check:
    def check(value: Any) -> Any:
        problem = _Misfit("")
        for one in checks:
            try:
                return one(value)
            except _Misfit as error:
                problem = error
        raise problem

    return check


def _sequence(item: Check, make: Callable[[Any], Any]) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not list:
            raise _wrong(value, "a list")
        return make([item(one) for one in value])

    return check


def _fields(checks: tuple[Check, ...], make: Callable[[Any], Any]) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not list or len(value) != len(checks):
            raise _wrong(value, f"a list of {len(checks)}")
        return make([one(part) for one, part in zip(checks, value, strict=True)])

    return check


def _mapping(key: Check, item: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not dict:
            raise _wrong(value, "an object")
        return {key(name): item(inner) for name, inner in value.items()}

    return check


def _record(checks: dict[str, Check]) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not dict or value.keys() != checks.keys():
            raise _wrong(value, f"an object of {', '.join(checks)}")
        return {key: one(value[key]) for key, one in checks.items()}

    return check


def _wrong(value: Any, wanted: str) -> _Misfit:
    return _Misfit(f"it has a {type(value).__name__} in place of {wanted}")
