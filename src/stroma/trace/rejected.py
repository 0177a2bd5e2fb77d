"""Outputs that broke their contract, as plain data: for the store, and for who inspects the run.

They are for people. Nodes and hooks find such an output in the exception, ``ContractViolation.raw``.
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple, final

from stroma._utils.text import clean

#: Stands for a value that an output does not have.
MISSING: Final[Any] = object()
_MAX_BYTES: Final = 4 * 1024 * 1024


class Complaint(NamedTuple):
    """A complaint of a contract. ``path``: keys and indexes of the field; () for the whole output."""

    path: tuple[str | int, ...]
    message: str

    @property
    def field(self) -> str:
        """The path as text: "lines.0.price"; "the whole output" without one."""
        return ".".join(map(str, self.path)) or "the whole output"


class RejectedOutput(NamedTuple):
    """An output that broke its contract.

    Attributes:
        value: plain JSON data.
        is_cut: the output was larger, or deeper, than ``value``.
        complaints: the first complaints of the contract, each about one field.
        more: how many complaints there are besides.
    """

    value: Any
    is_cut: bool
    complaints: tuple[Complaint, ...]
    more: int = 0

    def at(self, path: tuple[str | int, ...]) -> Any:
        """Return the value at a path; MISSING if there is none."""
        value = self.value
        for part in path:
            if isinstance(value, dict) and str(part) in value:
                value = value[str(part)]
            elif isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value):
                value = value[part]
            else:
                return MISSING
        return value

    def text_of(self, complaint: Complaint) -> str:
        """Return the value that a complaint is about, or the object that lacks it; "" if unknown."""
        value = self.at(complaint.path)
        if value is MISSING:
            value = self.at(complaint.path[:-1])
        return "" if value is MISSING else clean(json.dumps(value, ensure_ascii=False, default=str), 160)

    def to_json(self) -> dict[str, Any]:
        """Return the output in the form of the JSON schemas."""
        return {
            "value": self.value,
            "cut": self.is_cut,
            "complaints": [{"path": list(path), "message": message} for path, message in self.complaints],
            "more_complaints": self.more,
        }

    def encode(self) -> bytes:
        """Return the stored form."""
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        # Lone surrogates become the escapes that JSON has for them.
        return text.encode("utf-8", "backslashreplace")


def read_rejected(data: bytes | str) -> RejectedOutput | None:
    """Decode a rejected output; None for other data."""
    try:
        stored = json.loads(data)
        complaints = []
        for one in stored["complaints"]:
            path = tuple(part if isinstance(part, int) else str(part) for part in one["path"])
            complaints.append(Complaint(path, str(one["message"])))
        more = int(stored["more_complaints"])
        return RejectedOutput(stored["value"], bool(stored["cut"]), tuple(complaints), more)
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


@final
class RecentOutputs:
    """The newest rejected outputs of a run in memory, in stored form: at most 4 MiB, or one."""

    def __init__(self) -> None:
        #: By position, branch and start of the attempt in ns.
        self._outputs: dict[tuple[int, str, int], bytes] = {}
        self._bytes = 0

    def add(self, position: int, branch: str, started_ns: int, data: bytes) -> None:
        """Add the output of an attempt, and remove the oldest ones if they are too many."""
        outputs, place = self._outputs, (position, branch, started_ns)
        self._bytes += len(data) - len(outputs.pop(place, b""))
        outputs[place] = data
        while self._bytes > _MAX_BYTES and len(outputs) > 1:
            self._bytes -= len(outputs.pop(next(iter(outputs))))

    def find(self, position: int, branch: str, started_ns: int) -> RejectedOutput | None:
        """Return the output of an attempt; its start may be in whole microseconds."""
        data = self._outputs.get((position, branch, started_ns))
        if data is None and started_ns % 1000 == 0:
            at, outputs = (position, branch, started_ns // 1000), self._outputs.items()
            data = next((one for (p, b, start), one in outputs if (p, b, start // 1000) == at), None)
        return None if data is None else read_rejected(data)
