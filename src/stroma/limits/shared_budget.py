"""Budgets of money and tokens that several runs, in any process, share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from stroma._utils.logs import get_logger
from stroma.checkpoint.cells import CellStore, Change
from stroma.checkpoint.errors import StoreError
from stroma.contracts.contract import check_id
from stroma.cost.usage import shown
from stroma.failures.errors import SharedBudgetExceeded, Wait
from stroma.limits.budget_state import (
    PERIODS,
    PICO,
    BudgetTerms,
    CallRequest,
    CallUsage,
    Per,
    Refusal,
    give_back,
    read_account,
    release,
    renew_calls,
    reserve,
    settle,
)
from stroma.limits.gate import DueHook, Gate, check_max_wait, positive_int, positive_number

if TYPE_CHECKING:
    from stroma.failures.failure import Failure
    from stroma.trace.events import AttemptUsage

logger = get_logger()

_MIN_LEASE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class BudgetState:
    """State of a shared budget in its store. Money in US dollars, times in UTC.

    Attributes:
        max_cost_usd, max_tokens: the limits of the process that changed it last.
        spent_usd, spent_tokens: in this window.
        reserved_usd, reserved_tokens: by calls in flight.
        calls: number of calls in flight.
        window_start, window_end: None for a budget without ``per=``.
        by_node: (USD, tokens) of this window by node id.
    """

    name: str
    per: str | None
    max_cost_usd: float | None
    max_tokens: int | None
    spent_usd: float
    spent_tokens: int
    reserved_usd: float
    reserved_tokens: int
    calls: int
    window_start: datetime | None
    window_end: datetime | None
    by_node: Mapping[str, tuple[float, int]]


class SharedBudget(Gate):
    """A budget that runs share by its name: in this process or, with a ``store``, in all that use it.

    Before each attempt it reserves the usage that the call may have, and afterwards it counts the actual
    usage. A call that does not fit is not made, and its run ends as PARTIAL, as with the budget of a run. So
    at most the limit is spent, plus the usage of calls in flight beyond their reservations.

    Args:
        name: any legal id.
        max_cost_usd: limit of a window in US dollars; pass this or ``max_tokens``, or both. Usage equal to
            the limit is allowed; 0 allows none.
        max_tokens: limit of a window in tokens.
        per: "minute", "hour", "day" or "month": the window is that unit of the calendar in UTC, by the
            store's clock. None: there is one window without an end.
        store: the store that holds its state, or its URL; None: this process. Not a store of the simple
            protocol.
        reserve_usd: minimum reservation of a call, or a mapping by node id. The recent usage of the node
            counts if it is higher. The first call of a node without either reserves the rest of the budget,
            so that no other call begins at the same time.
        reserve_tokens: the same in tokens.
        max_cost_usd_by_node: limits of single nodes, in the same window.
        nodes: ids of the nodes that spend from it; None: all.
        max_wait_seconds: maximum wait of a call that only reservations prevent; None: no maximum.
        lease_seconds: time for which a reservation outlives its process. A running process renews it.

    Raises ValueError for an invalid value.
    """

    kind = "budget"

    def __init__(
        self,
        name: str,
        *,
        max_cost_usd: float | None = None,
        max_tokens: int | None = None,
        per: Per | None = None,
        store: CellStore | str | os.PathLike[str] | None = None,
        reserve_usd: float | Mapping[str, float] | None = None,
        reserve_tokens: int | Mapping[str, int] | None = None,
        max_cost_usd_by_node: Mapping[str, float] | None = None,
        nodes: Collection[str] | None = None,
        max_wait_seconds: float | None = 600.0,
        lease_seconds: float = 30.0,
    ) -> None:
        if max_cost_usd is None and max_tokens is None:
            raise ValueError(f"shared budget {shown(name)} has no limit; pass max_cost_usd= or max_tokens=")
        if per is not None and per not in PERIODS:
            raise ValueError(f'per must be "minute", "hour", "day", "month" or None, got {shown(per)}')
        if isinstance(nodes, str):
            raise TypeError(f"nodes must be a list of node ids, got {shown(nodes)}")
        cost = (
            None
            if max_cost_usd is None
            else positive_number("max_cost_usd", max_cost_usd, "US dollars", zero=True)
        )
        tokens = None if max_tokens is None else positive_int("max_tokens", max_tokens, zero=True)
        caps = {
            check_id(node, "node id"): positive_number(
                f"max_cost_usd_by_node[{node!r}]", cap, "US dollars", zero=True
            )
            for node, cap in (max_cost_usd_by_node or {}).items()
        }
        self.per = per
        self.max_cost_usd, self.max_tokens = cost, tokens
        self.nodes = None if nodes is None else frozenset(check_id(node, "node id") for node in nodes)
        self.max_wait_seconds = check_max_wait(max_wait_seconds)
        if positive_number("lease_seconds", lease_seconds, "seconds") < _MIN_LEASE_SECONDS:
            raise ValueError(f"lease_seconds must be at least {_MIN_LEASE_SECONDS}, got {lease_seconds!r}")
        self._declared = _declared_estimates(reserve_usd, cost, reserve_tokens, tokens)
        #: All node ids that the arguments name.
        self.node_ids = frozenset().union(self.nodes or (), caps, *self._declared) - {""}
        #: Usage that could not be written to the store yet.
        self._unwritten: list[CallUsage] = []
        terms = (("max_cost_usd", cost), ("max_tokens", tokens), ("per", per), ("max_cost_usd_by_node", caps))
        super().__init__(name, store, terms, lease_seconds)
        limits = (None if cost is None else _pico(cost), tokens)
        self._budget_terms = BudgetTerms(name, per, limits, {node: _pico(cap) for node, cap in caps.items()})

    def __repr__(self) -> str:
        limits = [f"{name}={value!r}" for name, value in self._terms if value not in (None, {})]
        return f"SharedBudget({self.name!r}, {', '.join(limits)})"

    def has_limit(self, dimension: Literal["tokens", "cost"], node_id: str) -> bool:
        """Return True if the budget limits the tokens, or the cost, of a node."""
        if self.nodes is not None and node_id not in self.nodes:
            return False
        if dimension == "tokens":
            return self.max_tokens is not None
        return self.max_cost_usd is not None or node_id in self._budget_terms.caps

    async def state(self) -> BudgetState | None:
        """Return the state in the store; None before the first call. Raises StoreError."""
        return await asyncio.to_thread(read_budget, self.store, self.name)

    # ------------------------------------------------------------------ the gate

    async def ask(self, node_id: str, token: str) -> Wait | Exception | None:
        declared = [estimates.get(node_id, estimates.get("")) for estimates in self._declared]
        request = CallRequest(token, node_id, (declared[0], declared[1]), self.lease_ms)
        try:
            if self._unwritten:
                await self._write_usage()
            answer = await self.change(reserve(self._budget_terms, request))
        except StoreError as error:
            return error
        if not isinstance(answer, Refusal):
            self.renew_lease(token)
            return None
        if answer.waits:
            return Wait("reserved", None, self._refusal(answer, node_id))
        return self._refusal(answer, node_id)

    async def count_call(
        self, node_id: str, token: str, used: AttemptUsage, failure: Failure | None, *, has_output: bool
    ) -> list[DueHook]:
        """See Gate. Returns the limits that have reached 80 %."""
        self.release(token)
        spend = self._spend(node_id, token, used, has_output)
        try:
            due = await self.change(settle(self._budget_terms, [spend]))
        except StoreError:
            self._unwritten.append(spend)
            raise
        return self._warnings(due)

    def _warnings(self, due: list[tuple[str, int, int]]) -> list[DueHook]:
        def amount(what: str, figure: int) -> float:
            return _usd(figure) if what == "cost" else figure

        return [
            DueHook("on_budget_warning", (f"{self.name}:{what}", amount(what, used), amount(what, limit)))
            for what, used, limit in due
        ]

    def charge(
        self, node_id: str, token: str, took: tuple[int, int], *, learns: bool
    ) -> Change[list[tuple[str, int, int]] | StoreError]:
        """Return the idempotent change that counts a call, for the transaction that records its attempt."""
        count = settle(self._budget_terms, [CallUsage(token, node_id, took, learns or any(took))])

        def change(data: bytes | None, now: int) -> tuple[bytes | None, Any]:
            try:
                return count(data, now)
            except StoreError as error:  # A damaged budget must not lose the output, which is paid for.
                return None, error

        return change

    def finish_charge(self, token: str, answer: list[tuple[str, int, int]] | StoreError) -> list[DueHook]:
        """Return the same as :meth:`count_call`, for a call that a charge has counted. Raises StoreError."""
        self.release(token)
        if isinstance(answer, StoreError):
            raise answer
        return self._warnings(answer)

    def abandon(self, node_id: str, token: str, used: AttemptUsage | None) -> None:
        self.release(token)
        if used is None:
            self.post(release(self.name, [token]))
        else:
            self.post(settle(self._budget_terms, [self._spend(node_id, token, used, False)]))

    async def give_back(self, token: str) -> None:
        await self.change(give_back(self.name, token))
        self.wake()

    def too_long(self, wait: Wait, node_id: str) -> Exception:
        assert wait.refusal is not None
        return wait.refusal

    def _renew(self, tokens: list[str]) -> None:
        self.post(renew_calls(self.name, tokens, int(self.lease_seconds * 1000)))

    def _spend(self, node_id: str, token: str, used: AttemptUsage, learns: bool) -> CallUsage:
        took = (_pico(used.cost_usd), used.tokens)
        return CallUsage(token, node_id, took, learns or any(took))

    async def _write_usage(self) -> None:
        usages, self._unwritten = self._unwritten, []
        try:
            await self.change(settle(self._budget_terms, usages))
        except BaseException:
            self._unwritten = [*usages, *self._unwritten]
            raise
        logger.info("%s: counted %d calls after the store was available again", self.label, len(usages))

    def _refusal(self, why: Refusal, node_id: str) -> SharedBudgetExceeded:
        unit = PICO if why.dimension == "cost" else 1
        figures = (why.limit / unit, why.spent / unit, why.reserved / unit, why.requested / unit)
        return SharedBudgetExceeded(
            self.name, why.dimension, *figures, node_id, _utc(why.ends_ms), why.capped
        )


def check_budgets(value: Any) -> tuple[SharedBudget, ...]:
    """Return the budgets of a run, in one order for every process. Raises ValueError for another value."""
    budgets = (value,) if isinstance(value, SharedBudget) else value
    if not isinstance(budgets, Sequence) or not all(isinstance(one, SharedBudget) for one in budgets):
        raise ValueError(f"shared_budgets must be a SharedBudget or a list of them, got {shown(value)}")
    if len({one.name for one in budgets}) < len(budgets):
        raise ValueError("shared_budgets must not have two budgets of one name; rename one of them")
    return tuple(sorted(budgets, key=lambda one: one.name))


def read_budget(store: Any, name: str) -> BudgetState | None:
    """Return the state of a shared budget in a store; None if it does not exist.

    Blocking. Raises ValueError for an illegal name, StoreError.
    """
    data, now = store.read_cell(f"{SharedBudget.kind}:{check_id(name, 'name of a budget')}")
    account = read_account(name, data, now)
    if account is None:
        return None
    (cost, tokens), start_ms = account.limits, None if account.per is None else account.start
    return BudgetState(
        name=name,
        per=account.per,
        max_cost_usd=None if cost is None else _usd(cost),
        max_tokens=tokens,
        spent_usd=_usd(account.spent[0]),
        spent_tokens=account.spent[1],
        reserved_usd=_usd(account.reserved(0, now)),
        reserved_tokens=account.reserved(1, now),
        calls=account.reserved("calls", now),
        window_start=_utc(start_ms),
        window_end=_utc(account.ends_ms()),
        by_node={node: (_usd(took[0]), took[1]) for node, took in sorted(account.by_node.items())},
    )


def _utc(ms: int | None) -> datetime | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC)


def _declared_estimates(
    usd: Any, max_cost_usd: float | None, tokens: Any, max_tokens: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the declared estimates by node id, in pico-dollars and in tokens. Raises ValueError."""
    costs = _estimates_by_node("reserve_usd", usd, max_cost_usd, partial(positive_number, unit="US dollars"))
    return (
        {node: _pico(cost) for node, cost in costs.items()},
        _estimates_by_node("reserve_tokens", tokens, max_tokens, positive_int),
    )


def _estimates_by_node(name: str, value: Any, limit: float | None, check: Any) -> dict[str, Any]:
    """Return the declared estimates by node id, and under "" that of all other nodes. Raises ValueError."""
    if value is None:
        return {}
    if limit is None:
        raise ValueError(f"{name} needs a limit in the same unit; pass both, or neither")
    by_node = value if isinstance(value, Mapping) else {"": value}
    estimates: dict[str, Any] = {}
    for node, estimate in by_node.items():
        what = f"{name}[{node!r}]" if node else name
        estimates[node] = check(what, estimate)
        if estimates[node] > limit > 0:
            raise ValueError(
                f"{what} must be at most the budget of {limit:.12g}, got {shown(estimate)}; no call could "
                "be made"
            )
    return estimates


def _pico(usd: float) -> int:
    return round(usd * PICO)


def _usd(pico: int) -> float:
    return pico / PICO
