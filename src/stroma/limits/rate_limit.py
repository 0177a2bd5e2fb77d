"""Limit: how many calls, and how many tokens, a minute; how many calls at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stroma.checkpoint.cells import CellStore
from stroma.checkpoint.errors import StoreError
from stroma.cost.usage import shown
from stroma.failures.errors import LimitError, Wait, WaitedTooLong
from stroma.limits.gate import Caller, Gate, OnStoreError, a_count, an_amount, seconds_or_none
from stroma.limits.rate_state import Never, Rates, acquire, give_back, renew

if TYPE_CHECKING:
    from stroma.trace.events import AttemptUsage

__all__ = ["Limit", "RateGate", "check_limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What attempts of the nodes under one name may do together; attempts wait for their turn.

    The name is the limit's key in ``RunConfig.limits``. Runs of this process share it by that name; with a ``store``, those
    of all processes that use that store.

    Attributes:
        requests_per_minute: attempts that begin within any 60 seconds.
        tokens_per_minute: tokens, input and output, of the attempts that begin within any 60 seconds. An attempt counts
            for what is reserved for it, and once it has ended for what it used.
        concurrent: attempts in flight, their end hooks included.
        reserve_tokens: what one attempt uses at the least; what those of the node used lately counts where it is more. Of
            a node that nobody knows anything of, the first attempt takes all that is left of the minute.
        store: what keeps it, or its URL; None: this process.
        max_wait_seconds: for how long an attempt waits; then its run ends as PARTIAL. None: without end.
        lease_seconds: for how long the place of an attempt outlives its process.
        on_store_error: "refuse" makes no call while the store is down; "allow" makes it.

    Raises ValueError for a wrong figure.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    reserve_tokens: int | None = None
    store: CellStore | str | os.PathLike[str] | None = None
    max_wait_seconds: float | None = None
    lease_seconds: float = 30.0
    on_store_error: OnStoreError = "refuse"
    _gates: dict[str, RateGate] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent", "reserve_tokens"):
            value = getattr(self, name)
            if value is not None:
                a_count(name, value)
        if self.requests_per_minute is self.tokens_per_minute is self.concurrent is None:
            raise ValueError(
                "the limit has none; give requests_per_minute=, tokens_per_minute= or concurrent="
            )
        if self.reserve_tokens is not None:
            if self.tokens_per_minute is None:
                raise ValueError(
                    "reserve_tokens is of no use without tokens_per_minute; give that, or leave it out"
                )
            if self.reserve_tokens > self.tokens_per_minute:
                raise ValueError(
                    f"reserve_tokens is {self.reserve_tokens}, more than tokens_per_minute={self.tokens_per_minute}: no call "
                    "could ever be made; raise the limit, or lower what a call reserves"
                )
        seconds_or_none("max_wait_seconds", self.max_wait_seconds)
        if an_amount("lease_seconds", self.lease_seconds, "seconds") < 0.1:
            raise ValueError(f"lease_seconds is {self.lease_seconds!r}; give 0.1 or more")

    def __deepcopy__(self, memo: object) -> Limit:
        return self  # It is what runs share: copies of a config have the same.

    def named(self, name: str) -> RateGate:
        """The gate of this limit under a name. Raises ValueError for a name that another limit in use here has."""
        found = self._gates.get(name)
        if found is None:
            found = self._gates.setdefault(name, RateGate(name, self))
        return found


class RateGate(Gate):
    """A Limit under its name."""

    kind = "limit"

    def __init__(self, name: str, limit: Limit) -> None:
        figures = (limit.requests_per_minute, limit.tokens_per_minute, limit.concurrent)
        names = ("requests_per_minute", "tokens_per_minute", "concurrent")
        self._declared = limit.reserve_tokens
        self.max_wait_seconds = limit.max_wait_seconds
        terms = tuple(zip(names, figures, strict=True))
        super().__init__(name, limit.store, terms, limit.lease_seconds, limit.on_store_error)
        self._rates = Rates(name, *figures)
        #: Whether the end of a call is of any interest.
        self._follows = limit.tokens_per_minute is not None or limit.concurrent is not None

    async def ask(self, node_id: str, token: str, caller: Caller | None) -> Wait | Exception | None:
        try:
            answer = await self.change(acquire(self._rates, token, node_id, self._declared, self.lease_ms))
        except StoreError as error:
            return None if self.allows(error) else error
        if isinstance(answer, Never):
            return LimitError(
                f"one call of node {node_id!r} takes {answer.asked} tokens, more than tokens_per_minute="
                f"{self._rates.tokens} of {self.label}: it could never be made; raise that, or make the calls smaller"
            )
        if answer is None and self._follows:
            self.keep_up(token)
        return answer

    async def left(self, node_id: str, token: str, used: AttemptUsage, *, began: bool, learns: bool) -> Any:
        if self._follows:
            self.drop(token)
            took = used.tokens
            await self.change(give_back(self.name, token, took, learns=learns or took > 0, began=began))
        return ()

    def abandon(self, node_id: str, token: str, used: AttemptUsage | None) -> None:
        if self._follows:
            self.drop(token)
            took = None if used is None else used.tokens
            self.post(give_back(self.name, token, took, learns=False, began=used is not None))

    def too_long(self, wait: Wait, node_id: str) -> Exception:
        figure = dict(self._terms).get(wait.reason)
        return WaitedTooLong(
            f"node {node_id!r} waited {self.max_wait_seconds:g} s at {self.label} for its turn ({wait.reason}={figure}); "
            "resume the run later, raise the limit, or max_wait_seconds"
        )

    def _renew(self, tokens: list[str]) -> None:
        self.post(renew(self.name, tokens, int(self.lease_seconds * 1000)))


def check_limits(limits: Mapping[str, Limit], node_limits: Mapping[str, str]) -> None:
    """Refuse limits that cannot be: two of one name, nodes under a name that is not there. Raises ValueError."""
    for name, limit in limits.items():
        if not isinstance(limit, Limit):
            raise ValueError(f"limits[{name!r}] is {shown(limit)}; give a Limit(...)")
        limit.named(name)
    for node, name in node_limits.items():
        if name not in limits:
            raise ValueError(
                f"node_limits[{node!r}] is {name!r}, and there is no such limit; give limits={{{name!r}: Limit(...)}}"
            )
