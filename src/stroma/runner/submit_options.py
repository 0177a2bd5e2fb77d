"""Keywords of a submission, and the place in the queue that they make."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, TypedDict

from stroma.checkpoint.queue import QueueEntry
from stroma.engine.config import check_label

__all__ = ["SubmitOptions", "queue_entry", "to_ms"]

_MAX_PRIORITY: Final = 1_000_000_000  # Every store has such numbers exactly.


class SubmitOptions(TypedDict, total=False):
    """Keywords of :meth:`StromaRunner.submit`.

    Attributes:
        run_id: id of the run, any text; by default that of the config, else a new one.
        delay: earliest start: seconds from now, a timedelta, or a datetime with a time zone.
        priority: runs with a lower number start first; the default is 0.
        key: runs of one key share the workers fairly with those of other keys, for instance a customer's id.
        expires: latest start, as ``delay``. A run that no worker has started by then is FAILED with reason
            "expired".
    """

    run_id: str | None
    delay: float | timedelta | datetime | None
    priority: int
    key: str | None
    expires: float | timedelta | datetime | None


def to_ms(value: float | timedelta | datetime, now_ms: int, name: str) -> int:
    """Return a time in ms since the epoch: so many seconds from now, after a duration, or at a time with a zone.

    Raises ValueError for a negative or infinite number, and for a time without a zone.
    """
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"{name} must have a time zone, got {value!r}; use datetime.now(UTC) + ...")
        return int(value.timestamp() * 1000)
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{name} must be 0 or more seconds, got {value!r}")
    return now_ms + round(seconds * 1000)


def queue_entry(options: SubmitOptions, now_ms: int) -> QueueEntry:
    """Return the place in the queue of a run that is submitted now. Raises ValueError for an invalid keyword."""
    expires, key, priority = options.get("expires"), options.get("key"), options.get("priority", 0)
    if not isinstance(priority, int) or abs(priority) > _MAX_PRIORITY:
        raise ValueError(
            f"priority must be a whole number from -{_MAX_PRIORITY} to {_MAX_PRIORITY}, got {priority!r}"
        )
    return QueueEntry(
        to_ms(options.get("delay") or 0, now_ms, "delay"),
        priority,
        None if key is None else check_label(key, "key"),
        None if expires is None else to_ms(expires, now_ms, "expires"),
    )
