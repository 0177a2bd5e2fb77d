"""The state of a rate limit: requests and tokens of the last minute, calls in flight, and the cooldown.

Pure functions, as in stroma.limits.budget_state. The minute is a sliding window of 61 one-second slots, so
that no 60 consecutive seconds hold more than the limit.

A call that the provider refused closes the limit (see :class:`CallReport`). When the time is over one call
probes: if the provider answers, the limit is open again, and for one window calls begin at even distances. If
it is refused, the limit closes again. If it ends otherwise, or its lease expires, another call probes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from stroma.failures.errors import COOLDOWN, Wait
from stroma.limits.reservations import (
    CellState,
    StateChange,
    estimate_usage,
    is_live,
    remember_usage,
    renew_leases,
)

_LIST: Final = "the list of cooldowns"
_WINDOW_SECONDS: Final = 61
_MAX_CLOCK_STEP_MS: Final = 60_000
#: Cooldown after a refusal that names no time; it doubles with each probe that is refused, up to the maximum.
_FIRST_COOLDOWN_MS: Final = 1_000
_MAX_DOUBLED_COOLDOWN_MS: Final = 60_000
#: No cooldown is longer: then a call probes, whatever the provider has asked for.
_MAX_COOLDOWN_MS: Final = 3_600_000
#: After a cooldown, calls that began too late may catch up with the even distances by as much.
_CATCH_UP_MS: Final = 1_000
#: Limits in the list of cooldowns.
_MAX_LISTED: Final = 50


class RateLimits(NamedTuple):
    """The limits of one process; None for no limit."""

    name: str
    requests: int | None
    tokens: int | None
    concurrent: int | None


class TooLarge(NamedTuple):
    """Answer for a call that needs more tokens than the limit of a minute."""

    tokens: int


class Probe(NamedTuple):
    """Answer for a call that may begin and has to find out whether the provider accepts calls again."""


class CallReport(NamedTuple):
    """The end of a call, as far as a limit is concerned. The default is a cancelled one.

    Attributes:
        began: the call was made.
        answered: the provider has dealt with it.
        refused: the provider has asked to wait.
        wait_ms: milliseconds that it has asked for; None if it did not say.
    """

    began: bool = True
    answered: bool = False
    refused: bool = False
    wait_ms: int | None = None


class LimitState(NamedTuple):
    """State of a limit at one moment.

    Attributes:
        requests: calls that began within the last minute.
        tokens: tokens of those calls.
        calls: calls in flight that have a reservation.
        cooldown_ms: milliseconds until the end of the cooldown; 0 while a call probes; None if there is no
            cooldown.
    """

    requests: int
    tokens: int
    calls: int
    cooldown_ms: int | None


@dataclass(kw_only=True)
class RateCell(CellState):
    """The state of a rate limit. A reservation is [until, node, second, tokens]."""

    #: [second, requests, tokens], the oldest first.
    slots: list[list[int]] = field(default_factory=list)
    recent: dict[str, list[int]] = field(default_factory=dict)
    #: End of the cooldown; 0 while the limit is open.
    closed_until: int = 0
    #: Cooldowns in a row, and the token of the last call that probed.
    refusals: int = 0
    probe: str = ""
    #: Calls begin at even distances until then, the next one not before ``next_start``.
    paced_until: int = 0
    next_start: float = 0

    def figures(self, hold: list[Any]) -> Iterable[tuple[Hashable, int]]:
        return (("calls", 1),)

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

    def correct_clock(self, now: int) -> None:
        """Forget what a clock that was far ahead has left: nobody is to wait for it."""
        if self.slots and self.slots[-1][0] * 1000 > now + _MAX_CLOCK_STEP_MS:
            self.slots = []
        if self.closed_until > now + _MAX_COOLDOWN_MS:
            self.closed_until = now
        if self.paced_until > now + _WINDOW_SECONDS * 1000:
            self.paced_until = 0

    def cooldown(self, now: int) -> Wait | None:
        """Return the wait for the end of the cooldown; None if the limit is open or to be probed."""
        if self.closed_until > now:
            return Wait(COOLDOWN, self.closed_until - now)
        hold = self.holds.get(self.probe)
        return Wait(COOLDOWN, None) if self.closed_until and hold is not None and is_live(hold, now) else None

    def close(self, wait_ms: int | None, now: int) -> bool:
        """Begin a cooldown, or extend the one that is on. Return True if it begins."""
        begins = self.closed_until <= now
        if begins:
            self.refusals += 1
            if wait_ms is None:
                wait_ms = min(_FIRST_COOLDOWN_MS << min(self.refusals - 1, 10), _MAX_DOUBLED_COOLDOWN_MS)
        # The calls in flight are refused for the same reason: without a time, they do not extend it.
        self.closed_until = max(self.closed_until, now + min(wait_ms or 0, _MAX_COOLDOWN_MS))
        return begins

    def reopen(self, now: int) -> None:
        self.closed_until = self.refusals = 0
        self.probe = ""
        self.paced_until = now + _WINDOW_SECONDS * 1000
        self.next_start = now


def _label(name: str) -> str:
    return f"limit {name!r}"


def acquire(
    rates: RateLimits, token: str, node: str, declared: int | None, lease_ms: int | None
) -> StateChange[RateCell, Wait | TooLarge | Probe | None]:
    """Return a change that admits a call. It answers None or a Probe if the call may begin."""

    def apply(cell: RateCell | None, now: int) -> tuple[RateCell | None, Wait | TooLarge | Probe | None]:
        state = cell or RateCell()
        if token in state.holds:  # Reserved by an earlier try whose answer was lost.
            return None, Probe() if token == state.probe else None
        state.correct_clock(now)
        state.slots = [slot for slot in state.slots if (slot[0] + _WINDOW_SECONDS) * 1000 > now]
        state.prune_holds(now)
        estimate = 0 if rates.tokens is None else estimate_usage(state.recent, node, declared, rates.tokens)
        if rates.tokens is not None and estimate is not None and estimate > rates.tokens:
            # Report it once: smaller calls must not be refused because of earlier ones.
            state.recent.pop(node, None)
            return state, TooLarge(estimate)
        if state.closed_until and (cooldown := state.cooldown(now)) is not None:
            return None, cooldown
        needed = estimate or 0
        if rates.tokens is not None and estimate is None:
            # The first call of a node reserves the rest of the minute.
            needed = max(1, rates.tokens - sum(slot[2] for slot in state.slots))
        wait = _wait_for_room(state, rates, needed, now)
        if wait is not None:
            return None, wait
        slot = state.slot(now // 1000)
        slot[1] += 1
        slot[2] += needed
        if state.paced_until > now:
            state.next_start = max(state.next_start, now - _CATCH_UP_MS) + _distance_ms(rates, estimate)
        is_probe = state.closed_until != 0
        if is_probe:
            state.probe = token
        if is_probe or rates.tokens is not None or rates.concurrent is not None:
            # The end of all other calls is not reported.
            until = None if lease_ms is None else now + lease_ms
            state.put_hold(token, [until, node, slot[0], needed])
        return state, Probe() if is_probe else None

    return StateChange(RateCell, _label(rates.name), apply)


def _wait_for_room(state: RateCell, rates: RateLimits, tokens: int, now: int) -> Wait | None:
    waits: list[tuple[int, str]] = []
    if state.paced_until > now and state.next_start > now and not state.closed_until:
        reason = "tokens_per_minute" if rates.requests is None else "requests_per_minute"
        waits.append((math.ceil(state.next_start - now), reason))
    if rates.requests is not None:
        ms = state.until_fits(1, rates.requests, 1, now)
        if ms is not None:
            waits.append((ms, "requests_per_minute"))
    if rates.tokens is not None:
        ms = state.until_fits(2, rates.tokens, tokens, now)
        if ms is not None:
            waits.append((ms, "tokens_per_minute"))
    if waits:
        ms, reason = max(waits)
        return Wait(reason, ms)
    if rates.concurrent is not None and state.reserved("calls", now) >= rates.concurrent:
        return Wait("concurrent", None)
    return None


def _distance_ms(rates: RateLimits, tokens: int | None) -> float:
    """Return the milliseconds from one call to the next that spread the limit evenly over a minute."""
    of_requests = 0.0 if rates.requests is None else 60_000 / rates.requests
    of_tokens = 0.0 if rates.tokens is None or tokens is None else 60_000 * tokens / rates.tokens
    return max(of_requests, of_tokens)


def release_call(
    name: str, token: str, took: int | None, end: CallReport, *, learns: bool
) -> StateChange[RateCell, float | None]:
    """Return a change that counts a call in place of its reservation, and closes or reopens the limit.

    It answers the seconds of the cooldown that the call has begun; None if it has begun none.
    """

    def apply(state: RateCell | None, now: int) -> tuple[RateCell | None, float | None]:
        hold = None if state is None else state.pop_hold(token, now)
        if hold is None and not end.refused:
            return None, None
        if state is None:
            state = RateCell()
        if hold is not None:
            for slot in state.slots:
                if slot[0] == hold[2]:
                    slot[2] = max(0, slot[2] - hold[3]) + (took or 0)
                    slot[1] = max(0, slot[1] - (not end.began))
            if learns and took is not None:
                remember_usage(state.recent, hold[1], took)
        begins = end.refused and state.close(end.wait_ms, now)
        if hold is not None and end.answered and token == state.probe and state.closed_until <= now:
            state.reopen(now)
        return state, max(0, state.closed_until - now) / 1000 if begins else None

    return StateChange(RateCell, _label(name), apply)


def end_lease(name: str, token: str) -> StateChange[RateCell, None]:
    """Return a change that no longer counts a call in flight, nor waits for it if it probes."""

    def apply(state: RateCell | None, now: int) -> tuple[RateCell | None, None]:
        if state is None or token not in state.holds:
            return None, None
        state.holds[token][0] = now
        state.changed_holds()
        return state, None

    return StateChange(RateCell, _label(name), apply)


@dataclass(kw_only=True)
class CooldownList(CellState):
    """The limits which have begun a cooldown last, so that they can be found, and when, in milliseconds."""

    names: dict[str, int] = field(default_factory=dict)


def list_cooldown(name: str) -> StateChange[CooldownList, None]:
    """Return a change of the list of cooldowns that adds a limit."""

    def apply(state: CooldownList | None, now: int) -> tuple[CooldownList, None]:
        names = {} if state is None else {one: at for one, at in state.names.items() if one != name}
        newest = sorted(names.items(), key=lambda item: -item[1])[: _MAX_LISTED - 1]
        return CooldownList(names={name: now, **dict(newest)}), None

    return StateChange(CooldownList, _LIST, apply)


def names_of_cooldowns(data: bytes | None) -> dict[str, int]:
    """Return the limits that :func:`list_cooldown` listed, with the times in ms. Raises StoreError."""
    read: StateChange[CooldownList, dict[str, int]] = StateChange(
        CooldownList, _LIST, lambda state, now: (None, {} if state is None else dict(state.names))
    )
    return read(data, 0)[1]


def read_limit_state(name: str, data: bytes | None, now: int) -> LimitState | None:
    """Return the state of a limit; None if no call was ever made under it. Raises StoreError."""

    def apply(state: RateCell | None, now: int) -> tuple[None, LimitState | None]:
        if state is None:
            return None, None
        state.correct_clock(now)
        recent = [slot for slot in state.slots if (slot[0] + _WINDOW_SECONDS) * 1000 > now]
        return None, LimitState(
            sum(slot[1] for slot in recent),
            sum(slot[2] for slot in recent),
            state.reserved("calls", now),
            max(0, state.closed_until - now) if state.closed_until else None,
        )

    return StateChange(RateCell, _label(name), apply)(data, now)[1]


def renew_calls(name: str, tokens: Iterable[str], lease_ms: int) -> StateChange[RateCell, None]:
    """Return a change that renews the leases of calls in flight."""
    return renew_leases(RateCell, _label(name), tokens, lease_ms)
