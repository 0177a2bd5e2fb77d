"""The state of a rate limit: requests and tokens of the last minute, and calls in flight.

Pure functions, as in stroma.limits.budget_state. The minute is a sliding window of 61 one-second slots, so that no 60
consecutive seconds hold more than the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from stroma.failures.errors import Wait
from stroma.limits.reservations import (
    estimate_usage,
    is_live,
    load_state,
    pack_state,
    prune_holds,
    remember_usage,
    renew_leases,
)

__all__ = ["RateLimits", "TooLarge", "acquire", "release_call", "renew_calls"]

_FORMAT: Final = 1
_WINDOW_SECONDS: Final = 61
_MAX_CLOCK_STEP_MS: Final = 60_000


class RateLimits(NamedTuple):
    """The limits of one process; None for no limit."""

    name: str
    requests: int | None
    tokens: int | None
    concurrent: int | None


class TooLarge(NamedTuple):
    """Answer for a call that needs more tokens than the limit of a minute."""

    tokens: int


@dataclass
class _RateCell:
    #: [second, requests, tokens], the oldest first.
    slots: list[list[int]] = field(default_factory=list)
    #: By token: [until, node, second, tokens].
    holds: dict[str, list[Any]] = field(default_factory=dict)
    recent: dict[str, list[int]] = field(default_factory=dict)

    def pack_state(self) -> bytes:
        return pack_state(vars(self), _FORMAT)

    def slot(self, second: int) -> list[int]:
        if not self.slots or self.slots[-1][0] < second:
            self.slots.append([second, 0, 0])
        return self.slots[-1]

    def until_fits(self, column: int, limit: int, more: int, now: int) -> int | None:
        """Return the milliseconds until there is room; None if there is room now."""
        excess = sum(slot[column] for slot in self.slots) + more - limit
        if excess <= 0:
            return None
        for slot in self.slots:
            excess -= slot[column]
            if excess <= 0:
                return max(1, (slot[0] + _WINDOW_SECONDS) * 1000 - now)
        return 1000


def _label(name: str) -> str:
    return f"limit {name!r}"


def _read(data: bytes | None, name: str) -> _RateCell | None:
    fields = load_state(data, _label(name), _FORMAT)
    return None if fields is None else _RateCell(**fields)


def acquire(
    rates: RateLimits, token: str, node: str, declared: int | None, lease_ms: int | None
) -> Callable[[bytes | None, int], tuple[bytes | None, Wait | TooLarge | None]]:
    """Return a change that admits a call. It answers None if the call may begin."""

    def change(data: bytes | None, now: int) -> tuple[bytes | None, Wait | TooLarge | None]:
        state = _read(data, rates.name) or _RateCell()
        if token in state.holds:  # Reserved by an earlier try whose answer was lost.
            return None, None
        if state.slots and state.slots[-1][0] * 1000 > now + _MAX_CLOCK_STEP_MS:
            state.slots = []  # The clock was far ahead: do not wait for it.
        state.slots = [slot for slot in state.slots if (slot[0] + _WINDOW_SECONDS) * 1000 > now]
        prune_holds(state.holds, now)
        estimate = 0 if rates.tokens is None else estimate_usage(state.recent, node, declared, rates.tokens)
        if rates.tokens is not None and estimate is not None and estimate > rates.tokens:
            # Report it once: smaller calls must not be refused because of earlier ones.
            state.recent.pop(node, None)
            return state.pack_state(), TooLarge(estimate)
        waits: list[tuple[int, str]] = []
        if rates.requests is not None:
            ms = state.until_fits(1, rates.requests, 1, now)
            if ms is not None:
                waits.append((ms, "requests_per_minute"))
        needed = estimate or 0
        if rates.tokens is not None:
            if estimate is None:  # The first call of a node reserves the rest of the minute.
                needed = max(1, rates.tokens - sum(slot[2] for slot in state.slots))
            ms = state.until_fits(2, rates.tokens, needed, now)
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
        slot[2] += needed
        if rates.tokens is not None or rates.concurrent is not None:  # Otherwise its end is not reported.
            until = None if lease_ms is None else now + lease_ms
            state.holds[token] = [until, node, slot[0], needed]
        return state.pack_state(), None

    return change


def release_call(
    name: str, token: str, took: int | None, *, learns: bool, began: bool = True
) -> Callable[[bytes | None, int], tuple[bytes | None, None]]:
    """Return a change that counts what a call used in place of its reservation. ``began``: the call was made."""

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
            remember_usage(state.recent, hold[1], took)
        return state.pack_state(), None

    return change


def renew_calls(
    name: str, tokens: Iterable[str], lease_ms: int
) -> Callable[[bytes | None, int], tuple[bytes | None, None]]:
    """Return a change that renews the leases of calls in flight."""
    return renew_leases(_label(name), _FORMAT, tokens, lease_ms)
