"""Marks of runs that some code could not continue. All journal stores make them here."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["BlockedMark", "block"]

#: For how long a run is kept from code that could not continue it, in ms: at least, and at most.
_BLOCKED_MS: Final = (1_000, 300_000)
_MAX_CODES: Final = 20  # in one mark


class BlockedMark(NamedTuple):
    """Mark of a run that some code could not continue.

    Attributes:
        message: what did not fit, the last time.
        since_ms: when that happened first, in ms since the epoch.
        until_ms: until then, the run is kept from the code in ``codes``.
        codes: names of the code that could not continue it, the last one last; see
            :class:`stroma.checkpoint.queue.ServedCode`.
    """

    message: str
    since_ms: int
    until_ms: int
    codes: tuple[str, ...]


def block(earlier: BlockedMark | None, message: str, code: str, now_ms: int) -> BlockedMark:
    """Return the mark of a run that code could not continue now. Each try doubles the time."""
    since_ms = now_ms if earlier is None else min(earlier.since_ms, now_ms)
    least, most = _BLOCKED_MS
    until_ms = now_ms + max(least, min(now_ms - since_ms, most))
    codes = () if earlier is None else earlier.codes
    codes = (*(one for one in codes if one != code), code)[-_MAX_CODES:]
    return BlockedMark(message, since_ms, until_ms, codes)
