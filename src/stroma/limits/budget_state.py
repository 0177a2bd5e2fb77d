"""State of a shared budget: the usage of its window, and the reservations of calls in flight.

Pure functions: each returns a change of a cell (see stroma.checkpoint.cells), which receives the data and the
clock of the store. Money is in whole pico-dollars, so that sums are exact in any order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, get_args

from stroma.checkpoint.errors import StoreError
from stroma.limits.reservations import CellState, StateChange, estimate_usage, remember_usage, renew_leases

Per = Literal["minute", "hour", "day", "month"]
PERIODS: Final = get_args(Per)
PICO: Final = 10**12
_WARN_AT: Final = 4, 5  # 80 %, in whole numbers
#: A clock that is set back by less stays in the current window; otherwise that window would start twice.
_SET_BACK_MS: Final = 3600 * 1000
_DIMENSIONS: Final[tuple[Literal["cost"], Literal["tokens"]]] = ("cost", "tokens")


class BudgetTerms(NamedTuple):
    """The limits of one process.

    Attributes:
        limits: pico-dollars and tokens of a window; None for no limit.
        caps: pico-dollars of a window by node id.
    """

    name: str
    per: Per | None
    limits: tuple[int | None, int | None]
    caps: Mapping[str, int]


class CallRequest(NamedTuple):
    """Request to admit a call. ``declared``: declared usage; None if unknown."""

    token: str
    node: str
    declared: tuple[int | None, int | None]
    lease_ms: int | None


class CallUsage(NamedTuple):
    """Usage of a call that has ended. ``learns``: it counts for the estimate of the next call."""

    token: str
    node: str
    took: tuple[int, int]
    learns: bool = True


class Refusal(NamedTuple):
    """Answer: the call may not begin. ``waits``: it may once calls in flight have used less."""

    dimension: Literal["cost", "tokens"]
    capped: bool
    limit: int
    spent: int
    reserved: int
    requested: int
    ends_ms: int | None
    waits: bool


def window(per: str | None, now_ms: int) -> tuple[int, int | None]:
    """Return start and end of the window around a time, in ms since the epoch: calendar units of UTC."""
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


@dataclass(kw_only=True)
class BudgetCell(CellState):
    """The state of a shared budget. A reservation is [until, node, cost, tokens]."""

    per: str | None
    limits: list[int | None]
    start: int
    spent: list[int] = field(default_factory=lambda: [0, 0])
    #: By node id: usage in this window.
    by_node: dict[str, list[int]] = field(default_factory=dict)
    #: By dimension and node id: usage of recent calls.
    recent: list[dict[str, list[int]]] = field(default_factory=lambda: [{}, {}])
    warned: list[str] = field(default_factory=list)

    def figures(self, hold: list[Any]) -> Iterable[tuple[Hashable, int]]:
        return (0, hold[2]), (1, hold[3]), ((0, hold[1]), hold[2]), ("calls", 1)

    def ends_ms(self) -> int | None:
        return window(self.per, self.start)[1]

    def roll_window(self, now: int) -> None:
        """Start the next window if the current one has ended."""
        start = window(self.per, now)[0]
        if start > self.start:
            self.start, self.spent, self.by_node, self.warned = start, [0, 0], {}, []
        elif self.start - now > _SET_BACK_MS:
            # The clock was far ahead. The usage stays; do not wait for a window in the far future.
            self.start = start


def _label(name: str) -> str:
    return f"budget {name!r}"


def _open(state: BudgetCell | None, now: int, terms: BudgetTerms) -> BudgetCell:
    if state is None:
        state = BudgetCell(per=terms.per, limits=list(terms.limits), start=window(terms.per, now)[0])
    if state.per != terms.per:
        error = StoreError(
            f"shared budget {terms.name!r} has per={state.per!r} in this store, but per={terms.per!r} here; "
            "use the same in all processes, or another name"
        )
        error.transient = False
        raise error
    state.limits = list(terms.limits)
    state.roll_window(now)
    state.prune_holds(now)
    return state


def reserve(terms: BudgetTerms, request: CallRequest) -> StateChange[BudgetCell, Refusal | tuple[int, int]]:
    """Return a change that reserves what a call may use; its answer: the amounts, or a refusal."""

    def apply(cell: BudgetCell | None, now: int) -> tuple[BudgetCell | None, Refusal | tuple[int, int]]:
        state = _open(cell, now, terms)
        if request.token in state.holds:  # Reserved by an earlier try whose answer was lost.
            hold = state.holds[request.token]
            return None, (hold[2], hold[3])
        answer = _amounts(state, terms, request, now)
        if isinstance(answer, Refusal):
            return None, answer
        until = None if request.lease_ms is None else now + request.lease_ms
        state.put_hold(request.token, [until, request.node, *answer])
        return state, answer

    return StateChange(BudgetCell, _label(terms.name), apply)


def _amounts(
    state: BudgetCell, terms: BudgetTerms, request: CallRequest, now: int
) -> tuple[int, int] | Refusal:
    """Return the amounts that a call reserves, or why there is no room for them."""
    amounts = [0, 0]
    for i in (0, 1):
        bounds = _bounds(state, terms, request.node, i, now)
        if not bounds:
            continue
        lowest = min(limit for limit, *_ in bounds)
        amount = estimate_usage(state.recent[i], request.node, request.declared[i], lowest)
        if amount is None:
            # Without an estimate, reserve the rest, so that no other call begins at the same time.
            amount = max(1, min(limit - spent - reserved for limit, spent, reserved, _ in bounds))
        for limit, spent, reserved, capped in bounds:
            # A call that uses nothing need not wait for reservations.
            if spent + (reserved if amount else 0) + amount > limit:
                waits = spent + amount <= limit
                return Refusal(_DIMENSIONS[i], capped, limit, spent, reserved, amount, state.ends_ms(), waits)
        amounts[i] = amount
    return amounts[0], amounts[1]


def _bounds(
    state: BudgetCell, terms: BudgetTerms, node: str, i: int, now: int
) -> list[tuple[int, int, int, bool]]:
    """Return (limit, spent, reserved, is_node_cap) of each limit of a call."""
    bounds = []
    limit, cap = terms.limits[i], None if i else terms.caps.get(node)
    if limit is not None:
        bounds.append((limit, state.spent[i], state.reserved(i, now), False))
    if cap is not None:
        bounds.append((cap, state.by_node.get(node, [0, 0])[i], state.reserved((0, node), now), True))
    return bounds


def settle(
    terms: BudgetTerms, spends: Iterable[CallUsage]
) -> StateChange[BudgetCell, list[tuple[str, int, int]]]:
    """Return a change that counts what calls used in place of their reservations.

    It answers (dimension, used, limit) of each limit that has reached 80 %, once in a window.
    """
    spends = list(spends)

    def apply(cell: BudgetCell | None, now: int) -> tuple[BudgetCell, list[tuple[str, int, int]]]:
        state = _open(cell, now, terms)
        for token, node, took, learns in spends:
            if state.pop_hold(token, now) is None:
                continue  # It is counted already.
            totals = state.by_node.setdefault(node, [0, 0])
            for i, amount in enumerate(took):
                state.spent[i] += amount
                totals[i] += amount
                if learns:
                    remember_usage(state.recent[i], node, amount)
        due = []
        for name, used, limit in zip(_DIMENSIONS, state.spent, terms.limits, strict=True):
            if limit is not None and name not in state.warned and used * _WARN_AT[1] >= limit * _WARN_AT[0]:
                state.warned.append(name)
                due.append((name, used, limit))
        return state, due

    return StateChange(BudgetCell, _label(terms.name), apply)


def release(name: str, tokens: Iterable[str]) -> StateChange[BudgetCell, None]:
    """Return a change that releases the reservations of calls that never began."""
    tokens = list(tokens)

    def apply(state: BudgetCell | None, now: int) -> tuple[BudgetCell | None, None]:
        released = [] if state is None else [state.pop_hold(token, now) for token in tokens]
        return state if any(released) else None, None

    return StateChange(BudgetCell, _label(name), apply)


def give_back(name: str, token: str) -> StateChange[BudgetCell, None]:
    """Return a change that reduces a reservation to 0. Its call stays in flight, to be settled."""

    def apply(state: BudgetCell | None, now: int) -> tuple[BudgetCell | None, None]:
        if state is None or token not in state.holds:
            return None, None
        state.holds[token][2:4] = [0, 0]
        state.changed_holds()
        return state, None

    return StateChange(BudgetCell, _label(name), apply)


def renew_calls(name: str, tokens: Iterable[str], lease_ms: int) -> StateChange[BudgetCell, None]:
    """Return a change that renews the leases of calls in flight."""
    return renew_leases(BudgetCell, _label(name), tokens, lease_ms)


def read_account(name: str, data: bytes | None, now: int) -> BudgetCell | None:
    """Return the state in a cell at a time; None if there is no such budget. Raises StoreError."""

    def apply(state: BudgetCell | None, now: int) -> tuple[None, BudgetCell | None]:
        if state is not None:
            state.roll_window(now)
        return None, state

    return StateChange(BudgetCell, _label(name), apply)(data, now)[1]
