"""Stroma: guarantees around the steps of an LLM or agent pipeline, and every step in sight.

Every public name can be imported from here; each is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stroma._lazy import lazy

if TYPE_CHECKING:
    from stroma.breaker import *
    from stroma.checkpoint import *
    from stroma.checks import *
    from stroma.config import *
    from stroma.context import *
    from stroma.contracts import *
    from stroma.cost import *
    from stroma.execution import *
    from stroma.failures import *
    from stroma.groups import *
    from stroma.hooks import *
    from stroma.items import *
    from stroma.limits import *
    from stroma.middleware import *
    from stroma.nodes import *
    from stroma.prices import *
    from stroma.refusals import *
    from stroma.runner import *
    from stroma.schemas import *
    from stroma.shared_budget import *
    from stroma.trace import *
    from stroma.usage import *

_HOMES = {
    "breaker": ("Breaker",),
    "checkpoint": (
        "AsyncCheckpointStore",
        "AsyncInMemoryStore",
        "CheckpointLost",
        "CheckpointManager",
        "CheckpointNotFound",
        "CheckpointStore",
        "CorruptCheckpoint",
        "Fenced",
        "InMemoryStore",
        "PipelineChanged",
        "PostgresStore",
        "RedisStore",
        "RunBusy",
        "RunExists",
        "SQLiteStore",
        "StoreError",
        "SyncRedisStore",
        "open_store",
    ),
    "checks": ("CheckFailed", "Finding"),
    "config": ("RunConfig",),
    "context": ("ReliabilityContext",),
    "contracts": (
        "BoundaryValidator",
        "ContractRegistry",
        "ContractViolation",
        "NodeContract",
        "StepContract",
        "StepViolation",
    ),
    "cost": (
        "KNOWN_MODELS",
        "BudgetExceeded",
        "CostTracker",
        "ExecutionBudget",
        "FallbackPolicy",
        "ModelHint",
        "NodeUsage",
        "StepUsage",
        "estimate_cost_usd",
        "resolve_model",
    ),
    "execution": ("NodeExecution", "current_node", "current_run"),
    "failures": (
        "Classifier",
        "Failure",
        "FailureClass",
        "FailurePolicy",
        "ItemFailure",
        "NodeContext",
        "RetryBudget",
        "RunFailed",
        "Suspend",
        "StepContext",
        "classify",
        "default_policy_map",
    ),
    "groups": ("map_over", "parallel"),
    "hooks": ("HookError", "MapProgress", "NodeHooks", "StepHooks"),
    "items": ("Journal", "JsonLines"),
    "limits": ("Limit",),
    "middleware": ("StromaStep", "execute_step"),
    "nodes": ("stroma_node", "stroma_step"),
    "prices": ("update_prices",),
    "refusals": ("CircuitOpen", "LimitError", "SharedBudgetExceeded", "WaitedTooLong"),
    "runner": ("Pipeline", "RunStream", "StreamEvent", "StromaRunner"),
    "schemas": ("NotSerialisable",),
    "shared_budget": ("BudgetState", "SharedBudget"),
    "trace": ("AttemptUsage", "ExecutionResult", "ExecutionTrace", "RunStatus", "TraceEvent", "TraceMark"),
    "usage": ("Usage", "UsageError", "usage_from"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "KNOWN_MODELS",
    "AsyncCheckpointStore",
    "AsyncInMemoryStore",
    "AttemptUsage",
    "BoundaryValidator",
    "Breaker",
    "BudgetExceeded",
    "BudgetState",
    "CheckFailed",
    "CheckpointLost",
    "CheckpointManager",
    "CheckpointNotFound",
    "CheckpointStore",
    "CircuitOpen",
    "Classifier",
    "ContractRegistry",
    "ContractViolation",
    "CorruptCheckpoint",
    "CostTracker",
    "ExecutionBudget",
    "ExecutionResult",
    "ExecutionTrace",
    "Failure",
    "FailureClass",
    "FailurePolicy",
    "FallbackPolicy",
    "Fenced",
    "Finding",
    "HookError",
    "InMemoryStore",
    "ItemFailure",
    "Journal",
    "JsonLines",
    "Limit",
    "LimitError",
    "MapProgress",
    "ModelHint",
    "NodeContext",
    "NodeContract",
    "NodeExecution",
    "NodeHooks",
    "NodeUsage",
    "NotSerialisable",
    "Pipeline",
    "PipelineChanged",
    "PostgresStore",
    "RedisStore",
    "ReliabilityContext",
    "RetryBudget",
    "RunBusy",
    "RunConfig",
    "RunExists",
    "RunFailed",
    "RunStatus",
    "RunStream",
    "SQLiteStore",
    "SharedBudget",
    "SharedBudgetExceeded",
    "StepContext",
    "StepContract",
    "StepHooks",
    "StepUsage",
    "StepViolation",
    "StoreError",
    "StreamEvent",
    "StromaRunner",
    "StromaStep",
    "Suspend",
    "SyncRedisStore",
    "TraceEvent",
    "TraceMark",
    "Usage",
    "UsageError",
    "WaitedTooLong",
    "classify",
    "current_node",
    "default_policy_map",
    "estimate_cost_usd",
    "execute_step",
    "map_over",
    "open_store",
    "parallel",
    "resolve_model",
    "stroma_node",
    "stroma_step",
    "update_prices",
    "usage_from",
]

__getattr__, __dir__ = lazy(__name__, _HOME_OF)
