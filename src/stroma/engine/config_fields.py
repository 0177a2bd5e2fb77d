"""The keywords of RunConfig, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from stroma.cost.budget import ExecutionBudget
from stroma.cost.fallback import FallbackPolicy
from stroma.engine.timeouts import NodeTimeout
from stroma.failures.failure import Classifier
from stroma.failures.policy import FailurePolicy, PolicyMap
from stroma.hooks.sets import NodeHooks
from stroma.limits.breaker import Breaker
from stroma.limits.rate_limit import Limit
from stroma.limits.shared_budget import SharedBudget

__all__ = ["OtherFields", "Policies", "RunConfigFields"]

#: Retries by failure class, or by the name of one. Not Literal: mypy would take no dict of names for it.
Policies: TypeAlias = PolicyMap | Mapping[str, FailurePolicy]


class OtherFields(TypedDict, total=False):
    """The keywords of :meth:`stroma.StromaRunner.quick` beside those that it names; RunConfig says what each means."""

    run_id: str
    pipeline: str
    shared_budgets: SharedBudget | Sequence[SharedBudget]
    limits: dict[str, Limit]
    node_limits: dict[str, str]
    breaker: Breaker | None
    node_policies: Mapping[str, Policies]
    context: dict[str, Any]
    node_timeouts: Mapping[str, int | NodeTimeout]
    contract_retries: dict[str, int]
    resume_from: str | None
    resume: bool
    retry_failed_items: bool
    if_exists: Literal["new", "restart", "resume", "return", "error"]
    if_running: Literal["error", "attach", "take_over"]
    max_recoveries: int
    force_resume: bool
    allow_changes: bool
    check: bool
    on_budget: Literal["stop", "wait"]
    lease_seconds: float
    inline_wait_seconds: float
    model_fallbacks: Sequence[FallbackPolicy]
    unknown_model: Literal["warn", "error"] | None
    max_threads: int
    hook_errors: Literal["isolate", "raise"]
    hook_delivery: Literal["at_most_once", "at_least_once"]
    hook_timeout_ms: int | None
    tags: Sequence[str]
    conversation: str | None
    user: str | None
    redact: Callable[[dict[str, Any]], dict[str, Any]] | None
    keep_rejected: Literal["redacted", "full", "no"]
    events: Literal["none", "store"]


class RunConfigFields(OtherFields, total=False):
    """The keywords of :class:`stroma.RunConfig`."""

    budget: ExecutionBudget
    policy_map: Policies
    hooks: NodeHooks | Sequence[NodeHooks]
    classifiers: list[Classifier]
