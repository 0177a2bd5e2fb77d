"""The state of a rate limit: requests and tokens of the last minute, and calls in flight.

Pure, as stroma.limits.budget_state is. The minute slides: it is counted in seconds, of which one is looked at more than 60, so that
no 60 seconds, wherever they begin, ever hold more than the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from stroma.failures.errors import Wait
from stroma.limits.reservations import estimate, is_live, keep_up, learn, load, pack, prune

__all__ = ["Never", "Rates", "acquire", "give_back", "renew"]

_FORMAT: Final = 1
_SECONDS: Final = 61
_FAR_MS: Final = 60_000


class Rates(NamedTuple):
    """What one process goes by; None for no limit."""

    name: str
    requests: int | None
    tokens: int | None
    concurrent: int | None


class Never(NamedTuple):
    """The calls of a node take more tokens than a minute ever has."""

    asked: int


@dataclass
class _State:
    #: [second, requests, tokens], the oldest first.
    slots: list[list[int]] = field(default_factory=list)
    #: By token: [until, node, second, tokens].
    holds: dict[str, list[Any]] = field(default_factory=dict)
    seen: dict[str, list[int]] = field(default_factory=dict)

    def pack(self) -> bytes:
        return pack(vars(self), _FORMAT)

    def slot(self, second: int) -> list[int]:
        if not self.slots or self.slots[-1][0] < second:
            self.slots.append([second, 0, 0])
        return self.slots[-1]

    def until_fits(self, column: int, limit: int, more: int, now: int) -> int | None:
        """In how many ms there is room; None if there is."""
        over = sum(slot[column] for slot in self.slots) + more - limit
        if over <= 0:
            return None
        for slot in self.slots:
            over -= slot[column]
            if over <= 0:
                return max(1, (slot[0] + _SECONDS) * 1000 - now)
        return 1000


def _called(name: str) -> str:
    return f"limit {name!r}"


def _read(data: bytes | None, name: str) -> _State | None:
    found = load(data, _called(name), _FORMAT)
    return None if found is None else _State(**found)


def acquire(
    rates: Rates, token: str, node: str, declared: int | None, lease_ms: int | None
) -> Callable[[bytes | None, int], tuple[bytes | None, Wait | Never | None]]:
    """A change that lets a call begin, if it may; it tells None then."""

    def change(data: bytes | None, now: int) -> tuple[bytes | None, Wait | Never | None]:
        state = _read(data, rates.name) or _State()
        if token in state.holds:  # By the try whose answer was lost.
            return None, None
        if state.slots and state.slots[-1][0] * 1000 > now + _FAR_MS:
            state.slots = []  # The clock was far ahead: nobody waits for that.
        state.slots = [slot for slot in state.slots if (slot[0] + _SECONDS) * 1000 > now]
        prune(state.holds, now)
        known = 0 if rates.tokens is None else estimate(state.seen, node, declared, rates.tokens)
        if rates.tokens is not None and known is not None and known > rates.tokens:
            # Told once: whoever makes the calls smaller is not held up by what they were.
            state.seen.pop(node, None)
            return state.pack(), Never(known)
        waits: list[tuple[int, str]] = []
        if rates.requests is not None:
            ms = state.until_fits(1, rates.requests, 1, now)
            if ms is not None:
                waits.append((ms, "requests_per_minute"))
        asked = known or 0
        if rates.tokens is not None:
            if known is None:  # The first call of a node goes alone, with all that is left of the minute.
                asked = max(1, rates.tokens - sum(slot[2] for slot in state.slots))
            ms = state.until_fits(2, rates.tokens, asked, now)
            if ms is not None:
                waits.append((ms, "tokens_per_minute"))
        if waits:
            ms, reason = max(waits)
            return None, Wait(reason, ms)
        in_flight = sum(is_live(hold, now) for hold in state.holds.values())
        if rates.concurrent is not None and in_flight >= rates.concurrent:
            return None, Wait("concurrent", None)
        slot = state.slot(now // 1000)
        slot[1] += 1
        slot[2] += asked
        if rates.tokens is not None or rates.concurrent is not None:  # Else nobody says when it ends.
            until = None if lease_ms is None else now + lease_ms
            state.holds[token] = [until, node, slot[0], asked]
        return state.pack(), None

    return change


def give_back(
    name: str, token: str, took: int | None, *, learns: bool, began: bool = True
) -> Callable[[bytes | None, int], tuple[bytes | None, None]]:
    """A change for the end of a call: what it took in place of what was counted. ``began``: whether it was made."""

    def change(data: bytes | None, now: int) -> tuple[bytes | None, None]:
        state = _read(data, name)
        hold = None if state is None else state.holds.pop(token, None)
        if state is None or hold is None:
            return None, None
        for slot in state.slots:
            if slot[0] == hold[2]:
                slot[2] = max(0, slot[2] - hold[3]) + (took or 0)
                slot[1] = max(0, slot[1] - (not began))
        if learns and took is not None:
            learn(state.seen, hold[1], took)
        return state.pack(), None

    return change


def renew(
    name: str, tokens: Iterable[str], lease_ms: int
) -> Callable[[bytes | None, int], tuple[bytes | None, None]]:
    """A change that keeps up the leases of calls in flight."""
    return keep_up(_called(name), _FORMAT, tokens, lease_ms)
