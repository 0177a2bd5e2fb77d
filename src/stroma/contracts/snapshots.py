"""Snapshots: immutable forms of a state, for traces and stores.

Each kind of state has the form that is cheapest to take (see :meth:`Schema.snapshot`):

* a tuple of the field values, for a flat class;
* :class:`PickledSnapshot`, for plain data that no schema describes;
* the encoded bytes, for every other state that has a stored form;
* a private copy of the model, for a state that has none.

:class:`StoredSnapshot` refers to one that a store holds. A dict is an input that its contract refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from stroma.contracts.copying import unpickle_data

__all__ = ["PickledSnapshot", "Snapshot", "StoredSnapshot"]


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
