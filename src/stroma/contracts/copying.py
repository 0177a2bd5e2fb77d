"""Copies of values of any schema: models built without validation, deep copies, pickles, snapshots.

Must not import the schema module: all that depends on the class of a model is passed in.
"""

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
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from pydantic import BaseModel, SecretBytes, SecretStr

from stroma.contracts.core_schema import may_change_on_revalidation, nodes_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter
from dataclasses import dataclass

ModelT = TypeVar("ModelT", bound=BaseModel)

# The descriptors of a model's slots: half the time of object.__setattr__, which checks the frozen setting of
# the class.
_set_values: Final[Any] = BaseModel.__dict__["__dict__"].__set__
_set_fields_set: Final[Any] = BaseModel.__dict__["__pydantic_fields_set__"].__set__
_set_extra: Final[Any] = BaseModel.__dict__["__pydantic_extra__"].__set__
_set_private: Final[Any] = BaseModel.__dict__["__pydantic_private__"].__set__
_NO_UPDATE: Final[Mapping[str, Any]] = {}

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


_CONTAINERS: Final = frozenset({dict, list, tuple, set, frozenset})


# ---------------------------------------------------------------------- models without validation


def construct(cls: type[ModelT], values: dict[str, Any], fields_set: set[str]) -> ModelT:
    """Return a new model that holds ``values`` unvalidated, with neither extra nor private values.

    ``fields_set``: the fields that were not left to their defaults.
    """
    model: ModelT = object.__new__(cls)
    _set_values(model, values)
    _set_fields_set(model, fields_set)
    if not cls.__pydantic_root_model__:
        _set_extra(model, None)
        _set_private(model, None)
    return model


def replicate(model: ModelT, update: Mapping[str, Any] = _NO_UPDATE) -> ModelT:
    """Return a shallow copy with some values changed.

    A class may override ``model_copy`` with one that changes more, so that is not called.
    """
    twin: ModelT = object.__new__(model.__class__)
    extra = model.__pydantic_extra__
    if extra is None:
        _set_values(twin, {**model.__dict__, **update})
    else:
        _set_values(twin, model.__dict__ | {k: v for k, v in update.items() if k not in extra})
    _set_fields_set(twin, model.__pydantic_fields_set__.copy())
    if not model.__pydantic_root_model__:
        _set_extra(twin, None if extra is None else {k: update.get(k, v) for k, v in extra.items()})
        private = model.__pydantic_private__
        _set_private(twin, None if private is None else private.copy())
    return twin


def set_extra(model: BaseModel, extra: dict[str, Any]) -> None:
    """Set the values of unknown names."""
    _set_extra(model, extra)


# ---------------------------------------------------------------------- copies


def is_record(value: Any) -> bool:
    """Return True for an instance with fields: a model or a dataclass."""
    return isinstance(value, BaseModel) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def copy_containers(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a copy in new containers, with ``convert`` called on each model and dataclass."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list:
        return [copy_containers(v, convert) for v in value]
    if kind is dict:
        return {k: copy_containers(v, convert) for k, v in value.items()}
    if kind is tuple or kind is set or kind is frozenset:
        if kind is not tuple and not all(type(v) in _ATOMS for v in value):
            return isolate(value)  # A set cannot hold the dict that a record may become.
        return kind(copy_containers(v, convert) for v in value)
    return convert(value) if is_record(value) else isolate(value)


def replace_records(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a value with ``convert`` called on each record; all other leaves stay the same objects."""
    kind = type(value)
    if kind is dict:
        return {k: replace_records(v, convert) for k, v in value.items()}
    if kind is list or kind is tuple:
        return kind(replace_records(v, convert) for v in value)
    return convert(value) if is_record(value) else value


def isolate(value: Any) -> Any:
    """Return a deep copy; an object that cannot be copied (a lock, a client) is shared."""
    kind = type(value)
    if kind in _ATOMS or isinstance(value, enum.Enum):
        return value
    if kind in _CONTAINERS:
        data = pickle_data(value)
        if data is not None:
            return unpickle_data(data)
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


# ---------------------------------------------------------------------- pickles of plain data


class _DataPickler(pickle.Pickler):
    """Pickles plain data only: how an instance of a user's class is copied is decided by that class."""

    def reducer_override(self, value: Any) -> Any:
        # Called for all but the containers and atoms that pickle itself knows. An atom is rebuilt by its
        # class.
        if type(value) in _ATOMS or (isinstance(value, type) and value in _ATOMS):
            return NotImplemented
        raise pickle.PicklingError


def pickle_data(value: Any) -> bytes | None:
    """Return a pickle of plain data; None if the value holds anything else, or contains itself."""
    buffer = io.BytesIO()
    pickler = _DataPickler(buffer, 5)
    # Plain data is a tree. Without the memo of repeated objects, pickling takes half the time.
    pickler.fast = True
    try:
        pickler.dump(value)
    except Exception:
        return None
    return buffer.getvalue()


def unpickle_data(data: bytes) -> Any:
    """Return the value of a pickle of :func:`pickle_data`, as new objects on each call."""
    return pickle.loads(data)


# ---------------------------------------------------------------------- records


def classes_in(value: Any) -> Iterator[type]:
    """Yield the classes of a value and of all that it holds, in the same order for equal values."""
    yield type(value)
    inner: Any = ()
    if isinstance(value, BaseModel):
        fields, extra = type(value).model_fields, value.__pydantic_extra__ or {}
        names = [k for k, info in fields.items() if not info.exclude and k in value.__dict__]
        inner = [*(value.__dict__[k] for k in names), *(extra[k] for k in sorted(extra))]
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


def renew_dataclass(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a dataclass validated again from its field values, each converted by ``convert``.

    A class that holds more than its fields, or that runs user code, is copied without validation. Raises
    pydantic's ValidationError.
    """
    adapter = _adapter(cast("Any", type(value)))
    if adapter is None:
        return isolate(value)
    return adapter.validate_python(
        {f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)}
    )


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
    may_change = any(map(may_change_on_revalidation, nodes)) or any(
        "validation_alias" in node or node.get("strict") for node in nodes
    )
    # A class with forward references that cannot be resolved here does not describe its fields.
    return None if may_change or not adapter.pydantic_complete else adapter


class PickledSnapshot:
    """Field values of plain data as a pickle: several times faster than a copy made in Python."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """The approximate size in bytes."""
        return len(self._data)

    def open(self) -> dict[str, Any]:
        """Return the field values, as new objects on each call."""
        values: dict[str, Any] = unpickle_data(self._data)
        return values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PickledSnapshot):
            return NotImplemented
        # Equal values may have different pickles.
        return self._data == other._data or self.open() == other.open()


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """A reference to a state that a store holds in encoded form.

    Attributes:
        load: reads the encoded state. May block. Raises StoreError.
    """

    load: Callable[[], bytes]


Snapshot = tuple[Any, ...] | bytes | PickledSnapshot | StoredSnapshot | BaseModel | dict[str, Any]
