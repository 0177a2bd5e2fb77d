"""Values in general, whatever schema they belong to: walking through them, copying them, telling their classes."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import io
import pathlib
import pickle
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from pydantic import BaseModel, SecretBytes, SecretStr

from stroma.contracts.core_schema import nodes_of, restless

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "Packed",
    "classes_in",
    "holds_record",
    "is_record",
    "isolate",
    "pack",
    "pack_atoms",
    "renew_dataclass",
    "walk",
    "with_records",
]

_ATOMS: Final = frozenset(
    {
        str,
        int,
        bool,
        float,
        type(None),
        bytes,
        complex,
        decimal.Decimal,
        uuid.UUID,
        dt.date,
        dt.time,
        dt.datetime,
        dt.timedelta,
        dt.timezone,
        SecretStr,
        SecretBytes,
        re.Pattern,
        pathlib.PurePosixPath,
        pathlib.PosixPath,
    }
)


def is_record(value: Any) -> bool:
    """Whether it is a model or a dataclass: what has fields."""
    return isinstance(value, BaseModel) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def walk(value: Any, record: Callable[[Any], Any]) -> Any:
    """A copy in containers of its own, in which ``record`` says what becomes of each model and dataclass."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list:
        return [walk(v, record) for v in value]
    if kind is dict:
        return {k: walk(v, record) for k, v in value.items()}
    if kind is tuple or kind is set or kind is frozenset:
        if kind is not tuple and not all(type(v) in _ATOMS for v in value):
            return isolate(value)  # A dict cannot stand in a set.
        return kind(walk(v, record) for v in value)
    return record(value) if is_record(value) else isolate(value)


def holds_record(value: Any) -> bool:
    """Whether there is a model or a dataclass in a list, tuple or dict, however deep."""
    try:
        return _holds_record(value)
    except RecursionError:  # It contains itself; whoever validates it says so better.
        return False


def _holds_record(value: Any) -> bool:
    for item in value.values() if type(value) is dict else value:
        kind = type(item)
        if kind in _ATOMS:
            continue
        if kind is dict or kind is list or kind is tuple:
            if _holds_record(item):
                return True
        elif is_record(item):
            return True
    return False


def with_records(value: Any, record: Callable[[Any], Any]) -> Any:
    """Like walk(), but that all else stays the very object."""
    kind = type(value)
    if kind is dict:
        return {k: with_records(v, record) for k, v in value.items()}
    if kind is list or kind is tuple:
        return kind(with_records(v, record) for v in value)
    return record(value) if is_record(value) else value


def isolate(value: Any) -> Any:
    """A deep copy where one can be made; what cannot be copied (a lock, a client) is shared."""
    kind = type(value)
    if kind in _ATOMS or isinstance(value, enum.Enum):
        return value
    if kind in _CONTAINERS:
        packed = pack(value)
        if packed is not None:
            return packed.open()
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


_CONTAINERS: Final = frozenset({dict, list, tuple, set, frozenset})


class Packed:
    """A value of plain data in a form that nothing can change; several times faster than a copy in Python."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return len(self._data)

    def open(self) -> Any:
        """The value, made anew on each call."""
        return pickle.loads(self._data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Packed):
            return NotImplemented
        return self._data == other._data or bool(self.open() == other.open())


class _Packer(pickle.Pickler):
    """Knows plain data only: what a class of the user's says of copies must be asked of the class."""

    def reducer_override(self, value: Any) -> Any:
        # Asked for all but the containers and atoms that pickle knows itself; an atom's class makes it again.
        if type(value) in _ATOMS or (isinstance(value, type) and value in _ATOMS):
            return NotImplemented
        raise pickle.PicklingError


def pack(value: Any) -> Packed | None:
    """A value as plain data, packed; None if there is anything else in it, or it contains itself."""
    if type(value) is dict and are_atoms(value.get("root") if len(value) == 1 and "root" in value else value):
        return pack_atoms(value)
    buffer = io.BytesIO()
    packer = _Packer(buffer, 5)
    # Without the memory of what it has met. It takes half the time, and plain data is a tree.
    packer.fast = True
    try:
        packer.dump(value)
    except Exception:
        return None
    return Packed(buffer.getvalue())


def pack_atoms(value: Mapping[str, Any]) -> Packed:
    """:func:`pack` for what is known to hold nothing that must be asked about."""
    return Packed(pickle.dumps(value, 5))


def are_atoms(value: Any) -> bool:
    """Whether a value is a small dict of texts to atoms, which a shallow copy isolates."""
    if type(value) is not dict or len(value) > _FEW:
        return False
    for name, held in value.items():  # noqa: SIM110 a generator would take twice as long
        if type(name) is not str or type(held) not in _ATOMS:
            return False
    return True


#: Entries that are looked at one by one, where the whole might as well be copied.
_FEW: Final = 16


def classes_in(value: Any) -> Iterator[type]:
    """The classes of a value and of all that it holds, in an order that equal values share."""
    yield type(value)
    inner: Any = ()
    if isinstance(value, BaseModel):
        fields, extra = type(value).model_fields, value.__pydantic_extra__ or {}
        kept = [k for k, info in fields.items() if not info.exclude and k in value.__dict__]
        inner = [*(value.__dict__[k] for k in kept), *(extra[k] for k in sorted(extra))]
    elif is_record(value):
        inner = [getattr(value, f.name) for f in dataclasses.fields(value) if f.init]
    elif isinstance(value, dict):
        inner = [part for item in value.items() for part in item]
    elif isinstance(value, (list, tuple, collections.deque)):
        inner = value
    elif isinstance(value, (set, frozenset)):
        yield from sorted((kind for v in value for kind in classes_in(v)), key=repr)
    for part in inner:
        yield from classes_in(part)


def renew_dataclass(value: Any, inner: Callable[[Any], Any]) -> Any:
    """A dataclass made anew from its field values, ``inner`` of each. Raises pydantic's ValidationError.

    One whose fields do not say all that it holds, or that runs code of its own, is copied as it is.
    """
    adapter = _adapter(cast("Any", type(value)))
    if adapter is None:
        return isolate(value)
    return adapter.validate_python({f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value)})


@functools.lru_cache(maxsize=256)
def _adapter(kind: Any) -> TypeAdapter[Any] | None:
    from pydantic import TypeAdapter

    members: Any = kind.__dict__.get("__dataclass_fields__", {})
    if hasattr(kind, "__post_init__") or any(not f.init for f in dataclasses.fields(kind)):
        return None
    if len(members) != len(dataclasses.fields(kind)):  # An InitVar, say, or a ClassVar.
        return None
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        nodes = list(nodes_of(adapter.core_schema))
    except Exception:  # Not every class has a schema.
        return None
    own = any(map(restless, nodes)) or any("validation_alias" in node or node.get("strict") for node in nodes)
    # One whose names cannot be looked up from here says nothing of its fields.
    return None if own or not adapter.pydantic_complete else adapter
