"""Stored events of runs: batches of lines of JSON beside the journal, of which the newest stay for a day."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from stroma.checkpoint.decoding import MAX_INT

if TYPE_CHECKING:
    from stroma.checkpoint.records import RunRecord

#: Batches of a run that stay at least; older ones are deleted now and then.
MAX_BATCHES: Final = 1000
#: Batches older than this are deleted now and then.
EXPIRY_MS: Final = 24 * 3600 * 1000
#: Numbers of what a reader makes of the record of a run, after all events of a session.
_NAMES: Final = {"suspended": MAX_INT - 1, "end": MAX_INT}


class EventPlace(NamedTuple):
    """Place of an event among the events of a run, which is their order. As text it is a cursor.

    Attributes:
        epoch: that of the session which published it; each session has a higher one than those before.
        number: 1-based, among the events of the session.
    """

    epoch: int
    number: int

    def __str__(self) -> str:
        names = {number: name for name, number in _NAMES.items()}
        return f"{self.epoch}-{names.get(self.number, self.number)}"

    @property
    def is_of_record(self) -> bool:
        """True for the suspension or the end of the run."""
        return self.number in _NAMES.values()

    @classmethod
    def of_suspension(cls, epoch: int) -> EventPlace:
        """Return the place of the suspension of the run after the events of a session."""
        return cls(epoch, _NAMES["suspended"])

    @classmethod
    def of_end(cls, epoch: int) -> EventPlace:
        """Return the place of the end of the run after the events of a session, and its suspension."""
        return cls(epoch, _NAMES["end"])


def parse_cursor(cursor: str) -> EventPlace:
    """Return the place that a cursor names. Raises ValueError for any other text."""
    epoch, _, number = cursor.partition("-")
    number = str(_NAMES.get(number, number))
    if not all(one.isdecimal() and one.isascii() and int(one) <= MAX_INT for one in (epoch, number)):
        raise ValueError(f"after must be the cursor of an event, got {cursor[:100]!r}")
    return EventPlace(int(epoch), int(number))


class EventBatch(NamedTuple):
    """Consecutive events of one session.

    Attributes:
        last: place of the last one.
        lines: a line of JSON for each event; None if they are damaged.
    """

    last: EventPlace
    lines: bytes | None


class EventPage(NamedTuple):
    """Events of the last execution of a run, and what the run was just before they were read.

    Attributes:
        run: the key of the run in its store, which differs from that of a later run of its id.
        record: the run; None while its status is RUNNING.
    """

    run: Any
    execution: int
    epoch: int
    record: RunRecord | None
    batches: list[EventBatch]
