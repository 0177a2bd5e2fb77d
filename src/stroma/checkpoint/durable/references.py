"""References of the trace to large states, which a store has in blobs."""

from __future__ import annotations

from stroma.checkpoint.durable.integrity import checksum
from stroma.checkpoint.payloads import Payloads
from stroma.contracts.schema import Schema, Snapshot
from stroma.contracts.snapshots import PickledSnapshot, StoredSnapshot
from stroma.trace.events import AttemptRow

__all__ = ["BlobReferences"]


class BlobReferences:
    """The outputs that one session has stored in blobs."""

    __slots__ = ("_by_content", "_by_place", "_last", "_payloads")

    def __init__(self, payloads: Payloads) -> None:
        self._payloads = payloads
        self._by_content: dict[bytes, StoredSnapshot] = {}  # by checksum
        #: By position and branch, until the row of the attempt is replaced.
        self._by_place: dict[tuple[int, str], StoredSnapshot] = {}
        #: The snapshot of the last of these outputs, and the reference to it.
        self._last: tuple[Snapshot | None, StoredSnapshot | None] = (None, None)

    def add(self, position: int, branch: str, content: bytes, stored: StoredSnapshot) -> None:
        """Add an output; ``content`` is the checksum of its plain form."""
        self._by_content[content] = self._by_place[position, branch] = stored

    def replace_in(self, row: AttemptRow) -> AttemptRow:
        """Return a row for the trace, with references in place of states that are stored in blobs."""
        stored_output = self._by_place.pop((row.position, row.branch), None)
        schemas = row.schemas
        if not self._by_content or schemas is None:
            return row
        input_snapshot, output = row.input, row.output
        stored_input = self._find_input(schemas[0], input_snapshot)
        if stored_input is not None:
            input_snapshot = stored_input
        if stored_output is not None:
            self._last = output, stored_output  # The next node may get this object as its input.
            output = stored_output
        return row._replace(input=input_snapshot, output=output)

    def _find_input(self, schema: Schema, snapshot: Snapshot) -> StoredSnapshot | None:
        """Return a reference to a large input, which usually is the previous output; None for any other."""
        if snapshot is self._last[0]:
            return self._last[1]
        data = snapshot if isinstance(snapshot, bytes) else None
        size = 0
        if isinstance(snapshot, tuple):
            size = sum(len(value) for value in snapshot if isinstance(value, (str, bytes)))
        elif isinstance(snapshot, PickledSnapshot):
            size = snapshot.size
        if 4 * size >= self._payloads.blob_bytes:  # UTF-8 may be 4 times larger, JSON smaller.
            try:
                data = schema.encode(schema.restore(snapshot), secrets=self._payloads.codec is not None)
            except Exception:  # It has no stored form.
                return None
        if data is None or len(data) < self._payloads.blob_bytes:
            return None
        return self._by_content.get(checksum(data))
