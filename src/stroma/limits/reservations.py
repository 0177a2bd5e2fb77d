"""Reservations with leases, and the usage of recent calls: shared by the cells of budgets and rate limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from stroma.checkpoint.errors import StoreError

__all__ = [
    "RECENT_CALLS",
    "estimate_usage",
    "is_live",
    "load_state",
    "pack_state",
    "prune_holds",
    "remember_usage",
    "renew_leases",
    "report_damage",
]

T = TypeVar("T")

#: Calls of a node whose usage is stored.
RECENT_CALLS: Final = 16
#: Retention of a reservation that is not renewed: a process that was stopped so long may still count its
#: call, or its journal may be read.
_HOLD_RETENTION_MS: Final = 7 * 24 * 3600 * 1000


def load_state(data: bytes | None, what: str, form: int) -> dict[str, Any] | None:
    """Return the state in a cell, None for a new cell. Raises StoreError for a later format, anything for damage."""
    if data is None:
        return None
    state: dict[str, Any] = json.loads(data)
    if int(state.pop("format")) > form:
        error = StoreError(f"{what} was written by a newer stroma; upgrade stroma, or use another name")
        error.transient = False
        raise error
    return state


def pack_state(state: Mapping[str, Any], form: int) -> bytes:
    """Return a state as :func:`load_state` reads it."""
    return json.dumps({"format": form, **state}, separators=(",", ":")).encode()


def renew_leases(
    what: str, form: int, tokens: Iterable[str], lease_ms: int
) -> Callable[[bytes | None, int], tuple[bytes | None, None]]:
    """Return a change that renews the leases of calls in flight."""
    tokens = list(tokens)

    def change(data: bytes | None, now: int) -> tuple[bytes | None, None]:
        state = load_state(data, what, form)
        if state is None:
            return None, None
        for token in tokens:
            if token in state["holds"]:
                state["holds"][token][0] = now + lease_ms
        return pack_state(state, form), None

    return change


def report_damage(what: str, change: Callable[[bytes | None, int], T]) -> Callable[[bytes | None, int], T]:
    """Return a change that raises StoreError for data that it cannot read."""

    def checked(data: bytes | None, now: int) -> T:
        try:
            return change(data, now)
        except StoreError:
            raise
        except Exception as error:
            damaged = StoreError(
                f"the data of {what} in the store is damaged; restore the store, or use another name"
            )
            damaged.transient = False
            raise damaged from error

    return checked


def is_live(hold: list[Any], now: int) -> bool:
    """Return True if a reservation counts: its lease is valid, or it has none because its process is this one."""
    until = hold[0]
    return until is None or until > now


def prune_holds(holds: dict[str, list[Any]], now: int) -> None:
    """Delete reservations that expired longer ago than the retention."""
    for token in [
        token for token, hold in holds.items() if hold[0] is not None and hold[0] + _HOLD_RETENTION_MS <= now
    ]:
        del holds[token]


def estimate_usage(
    usages: Mapping[str, list[int]], node: str, declared: int | None, limit: int
) -> int | None:
    """Return what a call of a node may use: the maximum of the declared and the recent usage; None if unknown.

    One recent call above the limit does not block all later ones: they reserve the limit, unless every recent
    call was above it.
    """
    recent = usages.get(node)
    if not recent:
        return declared
    highest = max(recent)
    if highest > limit >= min(recent) and limit:
        highest = limit
    return highest if declared is None else max(declared, highest)


def remember_usage(usages: dict[str, list[int]], node: str, took: int) -> None:
    """Add the usage of a call to the recent ones of its node."""
    usages[node] = [*usages.get(node, ())[-RECENT_CALLS + 1 :], took]
