"""Snapshots: immutable forms of a state, for traces and stores.

Each kind of state has the form that is cheapest to take (see :meth:`SchemaSnapshots.take`):

* a tuple of the field values, for a flat class;
* :class:`PickledSnapshot`, for plain data that no schema describes;
* the encoded bytes, for every other state that has a stored form;
* a private copy of the model, or a dict of its fields, for a state that has none.

:class:`SameSnapshot` and :class:`StoredSnapshot` refer to another snapshot, and to one that a store holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from stroma.contracts.codec import decode_raw, has_class_tags
from stroma.contracts.copying import isolate, pickle_data, unpickle_data
from stroma.contracts.tagged_json import NotSerialisable
from stroma.contracts.traits import SchemaTraits
from stroma.contracts.validators import Validators

__all__ = [
    "PickledSnapshot",
    "SameSnapshot",
    "SchemaSnapshots",
    "Snapshot",
    "StoredSnapshot",
    "as_state_dict",
]


class SnapshotSchema(Protocol):
    """The methods of :class:`~stroma.contracts.schema.Schema` that snapshots call."""

    @property
    def traits(self) -> SchemaTraits: ...
    @property
    def validators(self) -> Validators: ...
    @property
    def validate(self) -> Callable[[Any], BaseModel]: ...
    def clone(self, model: BaseModel) -> BaseModel: ...
    def construct(self, values: dict[str, Any]) -> BaseModel: ...
    def encode(self, model: BaseModel) -> bytes: ...
    @property
    def decode(self) -> Callable[[bytes], BaseModel]: ...
    def state(self, model: BaseModel) -> dict[str, Any]: ...
    @property
    def thaw_encoded(self) -> Callable[[bytes], dict[str, Any]]: ...


class PickledSnapshot:
    """A state of plain data as a pickle: several times faster to take and to open than a copy made in Python."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """The approximate size in bytes."""
        return len(self._data)

    def open(self) -> Any:
        """Return the field values, as new objects on each call."""
        return unpickle_data(self._data)

    def thaw(self, schema: SnapshotSchema) -> dict[str, Any]:
        """Return the state as a dict."""
        values: dict[str, Any] = self.open()
        return as_state_dict(values["root"] if schema.traits.is_root else values)

    def restore(self, schema: SnapshotSchema) -> BaseModel:
        """Return a model equal to the one of which the snapshot was taken."""
        return schema.construct(self.open())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PickledSnapshot):
            return NotImplemented
        # Equal values may have different pickles.
        return self._data == other._data or bool(self.open() == other.open())


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """A reference to a state that a store holds in encoded form.

    Attributes:
        load: reads the encoded state. May block. Raises StoreError.
    """

    load: Callable[[], bytes]

    def thaw(self, schema: SnapshotSchema) -> dict[str, Any]:
        """Return the state as a dict. Never raises: a deleted blob must not make the rest of the trace unreadable."""
        try:
            data = self.load()
            if schema.traits.is_flat or schema.traits.is_picklable:
                return schema.state(schema.decode(data))
            return schema.thaw_encoded(data)
        except Exception as error:
            return {"unavailable": str(error)}

    def restore(self, schema: SnapshotSchema) -> BaseModel:
        """Return a model equal to the one of which the snapshot was taken."""
        return schema.decode(self.load())


@dataclass(frozen=True, slots=True)
class SameSnapshot:
    """The snapshot of an input that was validated from the output before it, by reference to that output's snapshot."""

    source: PickledSnapshot | bytes | StoredSnapshot

    def open(self) -> Any:
        """Return the values that were validated."""
        if isinstance(self.source, PickledSnapshot):
            return self.source.open()
        return decode_raw(self.source.load() if isinstance(self.source, StoredSnapshot) else self.source)

    def thaw(self, schema: SnapshotSchema) -> dict[str, Any]:
        """Return the state as a dict."""
        return schema.state(self.restore(schema))

    def restore(self, schema: SnapshotSchema) -> BaseModel:
        """Return a model equal to the one of which the snapshot was taken."""
        return schema.validate(self.open())


Snapshot = (
    tuple[Any, ...] | bytes | PickledSnapshot | SameSnapshot | StoredSnapshot | dict[str, Any] | BaseModel
)


def as_state_dict(raw: Any) -> dict[str, Any]:
    """Return the fields of a state, or its root value under the name "root"."""
    return raw if isinstance(raw, dict) else {"root": raw}


class SchemaSnapshots:
    """Takes and reads the snapshots of one model class.

    Attributes:
        flat_values: returns the field values of a ``__dict__``, and no cached_property that is in it too.
    """

    def __init__(self, schema: SnapshotSchema) -> None:
        self._schema = schema
        self._traits = schema.traits
        self._names = schema.traits.field_names
        self.flat_values = _picker(self._names)

    def take(self, model: BaseModel) -> Snapshot:
        """Return an immutable form of a state; :meth:`thaw` and :meth:`restore` read it."""
        schema, traits = self._schema, self._traits
        if traits.is_flat:
            try:
                return self.flat_values(model.__dict__)
            except KeyError:  # Constructed without validation, and without some fields.
                return schema.state(model)
        if traits.is_picklable and len(model.__dict__) == len(self._names):
            data = pickle_data(model.__dict__)
            if data is not None:
                return PickledSnapshot(data)
        try:
            return schema.encode(model)
        except NotSerialisable:
            pass
        try:
            return schema.clone(model)
        except Exception:  # It was not validated, and is invalid.
            return schema.state(model)

    def thaw(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return the state of a snapshot as a dict, new on each call."""
        if isinstance(snapshot, tuple):
            return dict(zip(self._names, snapshot, strict=True))
        if isinstance(snapshot, bytes):
            return self.thaw_encoded(snapshot)
        if isinstance(snapshot, BaseModel):
            return self._schema.state(snapshot)
        if isinstance(snapshot, dict):
            copied: dict[str, Any] = isolate(snapshot)
            return copied
        return snapshot.thaw(self._schema)

    def thaw_encoded(self, data: bytes) -> dict[str, Any]:
        """Return the state of an encoded snapshot as a dict."""
        if has_class_tags(data):
            try:
                return self._schema.state(self._schema.decode(data))
            except Exception:  # A class that refuses its own output must not make the trace unreadable.
                pass
        return as_state_dict(decode_raw(data))

    def restore(self, snapshot: Snapshot) -> BaseModel:
        """Return a model equal to the one of which the snapshot was taken."""
        schema = self._schema
        if isinstance(snapshot, bytes):
            return schema.decode(snapshot)
        if isinstance(snapshot, BaseModel):
            return schema.clone(snapshot)
        if isinstance(snapshot, (tuple, dict)):
            model = schema.validators.rebuild(self.thaw(snapshot))
            # Validators may have changed the values.
            if isinstance(snapshot, tuple) and not self._traits.is_pure:
                vars(model).update(zip(self._names, snapshot, strict=True))
            return model
        return snapshot.restore(schema)


def _picker(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Return a function that makes a tuple of the named values."""
    if len(names) > 1:
        return operator.itemgetter(*names)
    return lambda values: tuple(values[name] for name in names)
