"""What cells of budgets and of rate limits have in common: holds under a lease, and what calls took lately."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from stroma.checkpoint.errors import StoreError

__all__ = ["LATELY", "estimate", "is_live", "keep_up", "learn", "load", "pack", "prune", "readable"]

T = TypeVar("T")

#: How many calls of a node are remembered.
LATELY: Final = 16
#: For how long a hold is kept that nobody renewed: whoever was stopped that long may still say what its call cost, and
#: whoever reads its journal.
_KEPT_MS: Final = 7 * 24 * 3600 * 1000


def load(data: bytes | None, what: str, form: int) -> dict[str, Any] | None:
    """The state in a cell, None for a new one. Raises StoreError for one of a later format, anything for damage."""
    if data is None:
        return None
    state: dict[str, Any] = json.loads(data)
    if int(state.pop("format")) > form:
        error = StoreError(f"{what} was written by a newer stroma; upgrade stroma, or use another name")
        error.transient = False
        raise error
    return state


def pack(state: Mapping[str, Any], form: int) -> bytes:
    """A state as :func:`load` reads it."""
    return json.dumps({"format": form, **state}, separators=(",", ":")).encode()


def keep_up(
    what: str, form: int, tokens: Iterable[str], lease_ms: int
) -> Callable[[bytes | None, int], tuple[bytes | None, None]]:
    """A change that keeps up the leases of calls in flight."""
    tokens = list(tokens)

    def change(data: bytes | None, now: int) -> tuple[bytes | None, None]:
        state = load(data, what, form)
        if state is None:
            return None, None
        for token in tokens:
            if token in state["holds"]:
                state["holds"][token][0] = now + lease_ms
        return pack(state, form), None

    return change


def readable(what: str, change: Callable[[bytes | None, int], T]) -> Callable[[bytes | None, int], T]:
    """A change that says of data that makes no sense to it, whatever that is, that it is damaged: StoreError."""

    def careful(data: bytes | None, now: int) -> T:
        try:
            return change(data, now)
        except StoreError:
            raise
        except Exception as error:
            told = StoreError(
                f"what the store keeps of {what} is damaged; restore the store, or use another name"
            )
            told.transient = False
            raise told from error

    return careful


def is_live(hold: list[Any], now: int) -> bool:
    """Whether a hold counts: its holder is heard of, or lives in this process (no lease)."""
    until = hold[0]
    return until is None or until > now


def prune(holds: dict[str, list[Any]], now: int) -> None:
    """Forget the holds of those who will not come back."""
    for token in [
        token for token, hold in holds.items() if hold[0] is not None and hold[0] + _KEPT_MS <= now
    ]:
        del holds[token]


def estimate(seen: Mapping[str, list[int]], node: str, declared: int | None, limit: int) -> int | None:
    """What a call of a node may take: the most of what was declared and what its calls took lately; None if unknown.

    One call that took more than the limit allows does not keep all that follow from being made: of those the limit is
    reserved, unless every one took more.
    """
    lately = seen.get(node)
    if not lately:
        return declared
    most = max(lately)
    if most > limit >= min(lately) and limit:
        most = limit
    return most if declared is None else max(declared, most)


def learn(seen: dict[str, list[int]], node: str, took: int) -> None:
    """Remember what a call took."""
    seen[node] = [*seen.get(node, ())[-LATELY + 1 :], took]
