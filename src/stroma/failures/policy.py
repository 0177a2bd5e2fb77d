"""Retry policies: how often, after how long, and when to stop."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pydantic import Field

from stroma._utils.models import StrictModel
from stroma.contracts.copying import construct
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure


class FailurePolicy(StrictModel):
    """The number and delays of the retries of a node.

    Attributes:
        max_retries: further attempts after the first.
        backoff_seconds: the delay before the first retry; with ``jitter`` the upper end of a uniform draw
            from 0.
        multiplier: factor of each further delay.
        max_backoff_seconds: no computed delay is longer. A server's Retry-After may be.
        jitter: draw each delay uniformly from 0 to the computed one.
        max_retry_after_seconds: a server that asks to wait longer stops the run as PARTIAL instead.
    """

    max_retries: int = Field(default=3, ge=0)
    backoff_seconds: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    multiplier: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    max_backoff_seconds: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    jitter: bool = True
    max_retry_after_seconds: float = Field(default=120.0, ge=0)


PolicyMap = dict[FailureClass, FailurePolicy]

_DEFAULTS: PolicyMap = {
    FailureClass.RECOVERABLE: FailurePolicy(max_retries=3, backoff_seconds=1.0),
    FailureClass.TERMINAL: FailurePolicy(max_retries=0, backoff_seconds=0.0),
    FailureClass.AMBIGUOUS: FailurePolicy(max_retries=1, backoff_seconds=0.5),
}


def default_policy_map() -> PolicyMap:
    """RECOVERABLE 3 retries within 1 s each, TERMINAL none, AMBIGUOUS 1 within 0.5 s. A fresh dict."""
    # New ones, since a policy can be changed.
    return {
        failure_class: construct(FailurePolicy, policy.__dict__.copy(), policy.__pydantic_fields_set__.copy())
        for failure_class, policy in _DEFAULTS.items()
    }


@dataclass(eq=False, repr=False)
class RetryBudget:
    """Counts retries by (run id, node id), for code that retries by hand. The engine keeps its own counts."""

    _counts: dict[tuple[str, str], int] = field(default_factory=dict, init=False)

    def increment(self, run_id: str, node_id: str) -> int:
        """Count one more retry and return the new count."""
        count = self._counts.get((run_id, node_id), 0) + 1
        self._counts[run_id, node_id] = count
        return count

    def exhausted(self, run_id: str, node_id: str, policy: FailurePolicy) -> bool:
        """Return True if the retries of a policy are used up."""
        return self._counts.get((run_id, node_id), 0) >= policy.max_retries


# ---------------------------------------------------------------------- the decision


class Retry(NamedTuple):
    """Try again after ``delay_seconds``."""

    delay_seconds: float


class Stop(NamedTuple):
    """Try no more. ``why`` is a sentence for the log."""

    why: str


def policy_for(
    failure_class: FailureClass,
    node_policies: Mapping[FailureClass, FailurePolicy] | None,
    policy_map: PolicyMap,
) -> FailurePolicy:
    """Return the node's own policy for a class, else the run's, else the built-in default."""
    if node_policies is not None and failure_class in node_policies:
        return node_policies[failure_class]
    return policy_map.get(failure_class) or _DEFAULTS[failure_class]


def decide(
    failure: Failure, policy: FailurePolicy, *, attempt: int, draw: Callable[[], float] = random.random
) -> Retry | Stop:
    """Return the decision on a failed attempt: Retry or Stop. Pure, but for ``draw`` (uniform in 0..1).

    ``attempt`` is 1-based: attempt n was the (n-1)-th retry, so one count serves all classes. Additional
    attempts (to repair an output) are not in it.
    """
    if failure.failure_class is FailureClass.TERMINAL:
        return Stop("a terminal failure is not retried")
    retries = attempt - 1
    if retries >= policy.max_retries:
        return Stop(f"gave up after {failure.attempt} attempt{'s' if failure.attempt > 1 else ''}")
    try:
        delay = min(policy.backoff_seconds * policy.multiplier**retries, policy.max_backoff_seconds)
    except OverflowError:
        delay = policy.max_backoff_seconds
    if policy.jitter:
        delay *= draw()
    retry_after = failure.retry_after_seconds
    if retry_after is not None:
        if retry_after > policy.max_retry_after_seconds:
            return Stop(f"the server asks to come back in {retry_after:.6g} s")
        delay = max(delay, retry_after)
    return Retry(delay)


_NO_RETRIES: Final = FailurePolicy(max_retries=0, backoff_seconds=0.0)


def follow_up(
    failure: Failure,
    own: Mapping[FailureClass, FailurePolicy] | None,
    policy_map: PolicyMap,
    *,
    attempt: int,
    group: bool,
    repairing: bool,
    repairs: int,
    draw: Callable[[], float] = random.random,
) -> Retry | Stop:
    """:func:`decide` under the policy of a node or group; for every driver. Pure, but for ``draw``.

    ``own``: what ``node_policies`` says of it. ``repairs``: attempts that were granted so far to repair an
        output; ``repairing``: another one is.
    """
    if own is None and group:
        # Its children had their retries; a group has its own only if asked.
        return decide(failure, _NO_RETRIES, attempt=attempt, draw=draw)
    if repairing:
        return Retry(0.0)  # The attempt was granted, and the next request does not repeat this one.
    policy = policy_for(failure.failure_class, own, policy_map)
    return decide(failure, policy, attempt=attempt - repairs, draw=draw)
