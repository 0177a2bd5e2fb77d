"""The account of a shared budget: what was spent in its window, and what calls in flight have reserved.

Pure: each function here makes a change of a cell (see stroma.checkpoint.cells), which is told its data and the store's
clock. Money is in whole pico-dollars, so that sums are exact in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, get_args

from stroma.checkpoint.errors import StoreError
from stroma.limits.reservations import estimate, is_live, keep_up, learn, load, pack, prune

__all__ = [
    "PERIODS",
    "PICO",
    "Account",
    "Ask",
    "Left",
    "Per",
    "Place",
    "Refusal",
    "Spend",
    "Terms",
    "left_by",
    "release",
    "renew",
    "reserve",
    "settle",
    "view",
    "window",
]

Per = Literal["minute", "hour", "day", "month"]
PERIODS: Final = get_args(Per)
PICO: Final = 10**12
_FORMAT: Final = 1
_WARN_AT: Final = 4, 5  # 80 %, in whole numbers
#: A clock that was set back by less stays in the window that had begun: else it would begin anew, and again.
_SET_BACK_MS: Final = 3600 * 1000
_DIMENSIONS: Final[tuple[Literal["cost"], Literal["tokens"]]] = ("cost", "tokens")


class Terms(NamedTuple):
    """What one process goes by.

    Attributes:
        limits: of a window: pico-dollars, tokens; None for no limit.
        caps: pico-dollars of a window by node id.
    """

    name: str
    per: Per | None
    limits: tuple[int | None, int | None]
    caps: Mapping[str, int]


class Place(NamedTuple):
    """The place in a journal of the attempt that a call belongs to.

    Attributes:
        address: of the journal's store, see DurableStore.
        since_ns: when the call asked, in nanoseconds since the epoch by the clock of its attempt's start.
    """

    address: str
    run_id: str
    execution: int
    epoch: int
    position: int
    branch: str
    attempt: int
    since_ns: int


class Ask(NamedTuple):
    """A call that wants to begin.

    Attributes:
        declared: what it may take at least; None if nobody said.
        place: None for a call that no journal records.
        looked: tokens of calls whose journal was looked at after their lease had ended, in vain.
    """

    token: str
    node: str
    declared: tuple[int | None, int | None]
    lease_ms: int | None
    place: Place | None = None
    looked: Collection[str] = ()


class Left(NamedTuple):
    """Calls whose lease has ended and that nobody settled, by token: look into their journal, then ask again."""

    calls: dict[str, tuple[str, Place]]


class Spend(NamedTuple):
    """A call that has ended. ``known``: it was reserved, so that a token that is not there says that it is settled
    already. ``learns``: whether what it took tells what the next one will."""

    token: str
    node: str
    took: tuple[int, int]
    known: bool = True
    learns: bool = True


class Refusal(NamedTuple):
    """Why a call may not begin. ``waits``: it may, once calls in flight turn out to take less than they reserved."""

    dimension: Literal["cost", "tokens"]
    capped: bool
    limit: int
    spent: int
    reserved: int
    asked: int
    ends_ms: int | None
    waits: bool


class Account(NamedTuple):
    """A shared budget as it stands, for people."""

    per: str | None
    limits: tuple[int | None, int | None]
    spent: tuple[int, int]
    reserved: tuple[int, int]
    calls: int
    start_ms: int | None
    ends_ms: int | None
    by_node: dict[str, tuple[int, int]]


def window(per: str | None, now_ms: int) -> tuple[int, int | None]:
    """When the window began that a moment is in, and when it ends, in ms since the epoch: calendar units of UTC."""
    if per is None:
        return 0, None
    now = datetime.fromtimestamp(now_ms // 1000, UTC)
    start = now.replace(second=0)
    if per != "minute":
        start = start.replace(minute=0)
    if per in ("day", "month"):
        start = start.replace(hour=0)
    if per == "month":
        start = start.replace(day=1)
        end = (start + timedelta(days=32)).replace(day=1)
    else:
        end = start + {"minute": timedelta(minutes=1), "hour": timedelta(hours=1)}.get(per, timedelta(days=1))
    return int(start.timestamp()) * 1000, int(end.timestamp()) * 1000


@dataclass
class _State:
    per: str | None
    limits: list[int | None]
    start: int
    spent: list[int] = field(default_factory=lambda: [0, 0])
    #: By node id: what its calls took in this window.
    by: dict[str, list[int]] = field(default_factory=dict)
    #: By token: [until, node, cost, tokens, place].
    holds: dict[str, list[Any]] = field(default_factory=dict)
    #: By node id: what its last calls took, by dimension.
    seen: list[dict[str, list[int]]] = field(default_factory=lambda: [{}, {}])
    warned: list[str] = field(default_factory=list)

    def pack(self) -> bytes:
        return pack(vars(self), _FORMAT)

    def reserved(self, dimension: int, now: int, node: str | None = None) -> int:
        return sum(
            hold[2 + dimension]
            for hold in self.holds.values()
            if is_live(hold, now) and node in (None, hold[1])
        )

    def ends_ms(self) -> int | None:
        return window(self.per, self.start)[1]


def _called(name: str) -> str:
    return f"shared budget {name!r}"


def _read(data: bytes | None, name: str) -> _State | None:
    found = load(data, _called(name), _FORMAT)
    return None if found is None else _State(**found)


def _roll(state: _State, now: int) -> None:
    """Begin the window anew if its time has come."""
    start = window(state.per, now)[0]
    if start > state.start:
        state.start, state.spent, state.by, state.warned = start, [0, 0], {}, []
    elif state.start - now > _SET_BACK_MS:
        # The clock was far ahead. What was spent meanwhile stays spent; nobody waits for a day that is years away.
        state.start = start


def _open(data: bytes | None, now: int, terms: Terms) -> _State:
    state = _read(data, terms.name)
    if state is None:
        state = _State(terms.per, list(terms.limits), window(terms.per, now)[0])
    if state.per != terms.per:
        error = StoreError(
            f"shared budget {terms.name!r} goes by per={state.per!r} in this store, and here by per={terms.per!r}; "
            "give all processes the same, or use another name"
        )
        error.transient = False
        raise error
    state.limits = list(terms.limits)
    _roll(state, now)
    prune(state.holds, now)
    return state


def reserve(
    terms: Terms, ask: Ask
) -> Callable[[bytes | None, int], tuple[bytes | None, Refusal | Left | tuple[int, int]]]:
    """A change that reserves what a call may take. It tells the amounts, or why it may not begin.

    Left comes first: what a process that is gone spent belongs to what is spent.
    """

    def change(data: bytes | None, now: int) -> tuple[bytes | None, Refusal | Left | tuple[int, int]]:
        state = _open(data, now, terms)
        if ask.token in state.holds:  # By the try whose answer was lost.
            held = state.holds[ask.token]
            return None, (held[2], held[3])
        if ask.place is not None:
            address = ask.place.address
            left = _calls(state, lambda hold, at: at.address == address and not is_live(hold, now))
            if new := {token: call for token, call in left.items() if token not in ask.looked}:
                return None, Left(new)
        amounts = [0, 0]
        for i in (0, 1):
            bounds = _bounds(state, terms, ask.node, i, now)
            if not bounds:
                continue
            lowest = min(limit for limit, *_ in bounds)
            amount = estimate(state.seen[i], ask.node, ask.declared[i], lowest)
            if amount is None:
                # Of what nobody knows anything of, all that is left: no other call begins beside the first one.
                amount = max(1, min(limit - spent - reserved for limit, spent, reserved, _ in bounds))
            for limit, spent, reserved, capped in bounds:
                # What takes nothing need not wait for those who do.
                if spent + (reserved if amount else 0) + amount > limit:
                    waits = spent + amount <= limit
                    dimension = _DIMENSIONS[i]
                    refusal = Refusal(
                        dimension, capped, limit, spent, reserved, amount, state.ends_ms(), waits
                    )
                    return None, refusal
            amounts[i] = amount
        until = None if ask.lease_ms is None else now + ask.lease_ms
        state.holds[ask.token] = [until, ask.node, *amounts, ask.place]
        return state.pack(), (amounts[0], amounts[1])

    return change


def _calls(state: _State, which: Callable[[list[Any], Place], bool]) -> dict[str, tuple[str, Place]]:
    """The node and the place of some calls that are not settled, by token."""
    found: dict[str, tuple[str, Place]] = {}
    for token, hold in state.holds.items():
        if hold[4] is not None and which(hold, place := Place(*hold[4])):
            found[token] = hold[1], place
    return found


def left_by(name: str, data: bytes | None, run: Place) -> dict[str, tuple[str, Place]]:
    """The calls of a run that are not settled, by token; those of its execution and epoch left out."""
    state = _read(data, name)
    if state is None:
        return {}
    return _calls(
        state,
        lambda _, at: at[:2] == run[:2] and (at.execution, at.epoch) != (run.execution, run.epoch),
    )


def _bounds(state: _State, terms: Terms, node: str, i: int, now: int) -> list[tuple[int, int, int, bool]]:
    """(limit, spent, reserved, of one node alone) of each limit that a call stands under."""
    bounds = []
    limit, cap = terms.limits[i], None if i else terms.caps.get(node)
    if limit is not None:
        bounds.append((limit, state.spent[i], state.reserved(i, now), False))
    if cap is not None:
        bounds.append((cap, state.by.get(node, [0, 0])[i], state.reserved(i, now, node), True))
    return bounds


def settle(
    terms: Terms, spends: Iterable[Spend]
) -> Callable[[bytes | None, int], tuple[bytes | None, list[tuple[str, int, int]]]]:
    """A change that counts what calls took in place of what they reserved.

    It tells (dimension, used, limit) of each limit that this uses to 80 %, once in a window.
    """
    spends = list(spends)

    def change(data: bytes | None, now: int) -> tuple[bytes | None, list[tuple[str, int, int]]]:
        state = _open(data, now, terms)
        for token, node, took, known, learns in spends:
            if state.holds.pop(token, None) is None and known:
                continue
            totals = state.by.setdefault(node, [0, 0])
            for i, amount in enumerate(took):
                state.spent[i] += amount
                totals[i] += amount
                if learns:
                    learn(state.seen[i], node, amount)
        due = []
        for name, used, limit in zip(_DIMENSIONS, state.spent, terms.limits, strict=True):
            if limit is not None and name not in state.warned and used * _WARN_AT[1] >= limit * _WARN_AT[0]:
                state.warned.append(name)
                due.append((name, used, limit))
        return state.pack(), due

    return change


def release(name: str, tokens: Iterable[str]) -> Callable[[bytes | None, int], tuple[bytes | None, None]]:
    """A change that gives back what calls had reserved that never began."""
    tokens = list(tokens)

    def change(data: bytes | None, now: int) -> tuple[bytes | None, None]:
        state = _read(data, name)
        if state is None:
            return None, None
        held = [token for token in tokens if state.holds.pop(token, None) is not None]
        return (state.pack() if held else None), None

    return change


def renew(
    name: str, tokens: Iterable[str], lease_ms: int
) -> Callable[[bytes | None, int], tuple[bytes | None, None]]:
    """A change that keeps up the leases of calls in flight."""
    return keep_up(_called(name), _FORMAT, tokens, lease_ms)


def view(name: str, data: bytes | None, now: int) -> Account | None:
    """What a cell says at a moment; None if there is no such budget."""
    state = _read(data, name)
    if state is None:
        return None
    _roll(state, now)
    return Account(
        state.per,
        (state.limits[0], state.limits[1]),
        (state.spent[0], state.spent[1]),
        (state.reserved(0, now), state.reserved(1, now)),
        sum(is_live(hold, now) for hold in state.holds.values()),
        None if state.per is None else state.start,
        state.ends_ms(),
        {node: (took[0], took[1]) for node, took in sorted(state.by.items())},
    )
