"""Snapshots: immutable forms of a state, for traces and stores.

Each kind of state has the form that is cheapest to take (see :meth:`~stroma.contracts.schema.Schema.snapshot`):

* a tuple of the field values, for a flat class;
* :class:`PickledSnapshot`, for plain data that no schema describes;
* the encoded bytes, for every other state that has a stored form;
* a private copy of the model, or a dict of its fields, for a state that has none.

:class:`SameSnapshot` and :class:`StoredSnapshot` refer to another snapshot, and to one that a store holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from stroma.contracts.codec import decode_raw
from stroma.contracts.copying import unpickle_data
from stroma.contracts.traits import SchemaTraits

__all__ = ["PickledSnapshot", "SameSnapshot", "Snapshot", "StoredSnapshot", "as_state_dict"]


class SnapshotSchema(Protocol):
    """The methods of :class:`~stroma.contracts.schema.Schema` that snapshots call."""

    @property
    def traits(self) -> SchemaTraits: ...
    @property
    def validate(self) -> Callable[[Any], BaseModel]: ...
    def construct(self, values: dict[str, Any]) -> BaseModel: ...
    def decode(self, data: bytes) -> BaseModel: ...
    def state(self, model: BaseModel) -> dict[str, Any]: ...
    def thaw_encoded(self, data: bytes) -> dict[str, Any]: ...


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
