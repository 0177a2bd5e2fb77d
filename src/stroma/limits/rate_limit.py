"""Rate limits: calls and tokens per minute, and concurrent calls."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from stroma.checkpoint.cells import CellStore
from stroma.checkpoint.errors import StoreError
from stroma.contracts.contract import check_id
from stroma.cost.usage import shown
from stroma.failures.errors import COOLDOWN, LimitError, Wait, WaitedTooLong
from stroma.failures.providers import requested_waits
from stroma.limits.breaker import Breaker
from stroma.limits.gate import DueHook, Gate, check_max_wait, positive_int, positive_number
from stroma.limits.rate_state import (
    CallReport,
    LimitState,
    RateLimits,
    TooLarge,
    acquire,
    end_lease,
    list_cooldown,
    names_of_cooldowns,
    read_limit_state,
    release_call,
    renew_calls,
)
from stroma.limits.reservations import RENEWER

if TYPE_CHECKING:
    from stroma.failures.failure import Failure
    from stroma.trace.events import AttemptUsage

#: Cell that lists the limits which have begun a cooldown last.
_COOLDOWNS: Final = "cooldowns"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Rate limit of the nodes under one name; attempts wait for their turn.

    The name is the limit's key in ``RunConfig.limits``. Runs of this process share it by that name; with a
    ``store``, those of all processes that use that store.

    A call that receives a Retry-After, a 429 or a 529 closes the limit for all of them until the time is
    over. Then one attempt probes. If the provider answers it, the others follow at the limit's rate; if it is
    refused, the limit closes again. Waiting uses none of the retries of a node.

    Attributes:
        requests_per_minute: attempts that begin within any 60 seconds.
        tokens_per_minute: tokens, input and output, of the attempts that begin within any 60 seconds. An
            attempt counts with its reservation, and with its usage once it has ended.
        concurrent: attempts in flight, their end hooks included.
        reserve_tokens: tokens to reserve for an attempt; the recent usage of the node counts if it is higher.
            The first attempt of a node without either reserves the rest of the minute.
        store: the store that holds the state, or its URL; None: this process.
        max_wait_seconds: maximum wait of an attempt; then its run ends as PARTIAL. None: no maximum.
        lease_seconds: time for which a reservation outlives its process.

    Raises ValueError for an invalid value.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    reserve_tokens: int | None = None
    store: CellStore | str | os.PathLike[str] | None = None
    max_wait_seconds: float | None = None
    lease_seconds: float = 30.0
    _gates: dict[str, RateGate] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent", "reserve_tokens"):
            value = getattr(self, name)
            if value is not None:
                positive_int(name, value)
        if self.requests_per_minute is self.tokens_per_minute is self.concurrent is None:
            raise ValueError(
                "Limit has no limit; pass requests_per_minute=, tokens_per_minute= or concurrent="
            )
        if self.reserve_tokens is not None:
            if self.tokens_per_minute is None:
                raise ValueError("reserve_tokens needs tokens_per_minute; pass both, or neither")
            if self.reserve_tokens > self.tokens_per_minute:
                raise ValueError(
                    f"reserve_tokens={self.reserve_tokens} is more than "
                    f"tokens_per_minute={self.tokens_per_minute}, so no call "
                    "could be made; raise the limit, or lower reserve_tokens"
                )
        check_max_wait(self.max_wait_seconds)
        if positive_number("lease_seconds", self.lease_seconds, "seconds") < 0.1:
            raise ValueError(f"lease_seconds must be at least 0.1, got {self.lease_seconds!r}")

    def __deepcopy__(self, memo: object) -> Limit:
        return self  # Runs share it, so copies of a config do too.

    def named(self, name: str) -> RateGate:
        """Return this limit's gate under a name. Raises ValueError for an illegal name."""
        gate = self._gates.get(name)
        if gate is None:
            gate = self._gates.setdefault(name, RateGate(name, self))
        return gate


class RateGate(Gate):
    """A Limit under its name."""

    kind = "limit"

    def __init__(self, name: str, limit: Limit) -> None:
        figures = (limit.requests_per_minute, limit.tokens_per_minute, limit.concurrent)
        names = ("requests_per_minute", "tokens_per_minute", "concurrent")
        self._declared = limit.reserve_tokens
        self.max_wait_seconds = limit.max_wait_seconds
        terms = tuple(zip(names, figures, strict=True))
        super().__init__(name, limit.store, terms, limit.lease_seconds)
        self._rates = RateLimits(name, *figures)
        #: Calls in flight that probe.
        self._probes: set[str] = set()
        #: The end of a call must be recorded.
        self._records_end = limit.tokens_per_minute is not None or limit.concurrent is not None

    async def ask(self, node_id: str, token: str) -> Wait | Exception | None:
        try:
            answer = await self.change(acquire(self._rates, token, node_id, self._declared, self.lease_ms))
        except StoreError as error:
            return error
        if isinstance(answer, TooLarge):
            return LimitError(
                f"one call of node {node_id!r} needs {answer.tokens} tokens, more than tokens_per_minute="
                f"{self._rates.tokens} of {self.label}; raise the limit, or make the calls smaller"
            )
        if isinstance(answer, Wait):
            return answer
        if answer is not None:
            self._probes.add(token)
        if answer is not None or self._records_end:
            self.renew_lease(token)
        return None

    async def count_call(
        self, node_id: str, token: str, used: AttemptUsage, failure: Failure | None, *, has_output: bool
    ) -> list[DueHook]:
        end = CallReport(answered=True) if has_output else _end_of_call(failure)
        if not (self._records_end or end.refused or token in self._probes):
            return []
        self._probes.discard(token)
        self.release(token)
        learns = has_output or used.tokens > 0
        seconds = await self.change(release_call(self.name, token, used.tokens, end, learns=learns))
        if seconds is None:
            return []
        self.store.post_cell(_COOLDOWNS, list_cooldown(self.name))
        return [DueHook("on_limit_cooldown", (self.name, seconds))]

    def abandon(self, node_id: str, token: str, used: AttemptUsage | None) -> None:
        # A call that was cancelled while it asked may have become the probe.
        if self._records_end or used is None or token in self._probes:
            self._probes.discard(token)
            self.release(token)
            took = None if used is None else used.tokens
            self.post(release_call(self.name, token, took, CallReport(began=used is not None), learns=False))

    async def give_back(self, token: str) -> None:
        if self._records_end or token in self._probes:
            RENEWER.remove(token)
            await self.change(end_lease(self.name, token))
            self.wake()

    def too_long(self, wait: Wait, node_id: str) -> Exception:
        if wait.reason == COOLDOWN:
            return WaitedTooLong(
                f"node {node_id!r} waited {self.max_wait_seconds:g} s at {self.label}, which is closed "
                "because the provider asked to wait; resume the run later, or raise max_wait_seconds"
            )
        figure = dict(self._terms).get(wait.reason)
        return WaitedTooLong(
            f"node {node_id!r} waited {self.max_wait_seconds:g} s at {self.label} for its turn "
            f"({wait.reason}={figure}); resume the run later, raise the limit, or max_wait_seconds"
        )

    def _renew(self, tokens: list[str]) -> None:
        self.post(renew_calls(self.name, tokens, int(self.lease_seconds * 1000)))


def _end_of_call(failure: Failure | None) -> CallReport:
    """Return what the failure of a call says about the provider; None for a call that was cancelled."""
    if failure is None:
        return CallReport()
    waits = requested_waits(failure.exception)
    if waits:
        longest = math.ceil(min(max(waits), 1e9) * 1000)
        return CallReport(refused=True, wait_ms=longest or None)
    return CallReport(answered=Breaker.verdict(failure) is True)


def read_limit(store: Any, name: str) -> LimitState | None:
    """Return the state of a limit in a store; None if no call was made under it.

    Blocking. Raises ValueError for an illegal name, StoreError.
    """
    return read_limit_state(name, *store.read_cell(f"{RateGate.kind}:{check_id(name, 'name of a limit')}"))


def read_cooldowns(store: Any) -> dict[str, int]:
    """Return the closed limits in a store, with the milliseconds left; 0 while a call probes.

    Of the 50 limits that have begun a cooldown last. Blocking. Raises StoreError.
    """
    names = names_of_cooldowns(store.read_cell(_COOLDOWNS)[0])
    states = {name: read_limit(store, name) for name in names}
    return {
        name: state.cooldown_ms
        for name, state in states.items()
        if state is not None and state.cooldown_ms is not None
    }


def check_limits(limits: Mapping[str, Limit], node_limits: Mapping[str, str]) -> None:
    """Raise ValueError for an illegal limit or name, and for nodes under an unknown name."""
    for name, limit in limits.items():
        if not isinstance(limit, Limit):
            raise ValueError(f"limits[{name!r}] must be a Limit, got {shown(limit)}")
        limit.named(name)
    for node, name in node_limits.items():
        if name not in limits:
            raise ValueError(
                f"node_limits[{node!r}] names an unknown limit {name!r}; pass limits={{{name!r}: Limit(...)}}"
            )
