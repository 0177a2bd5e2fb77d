"""Stroma: guarantees around the steps of an LLM or agent pipeline, and every step in sight.

Every public name can be imported from here; each is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stroma._utils.distributions import warn_of_other_distribution
from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.checkpoint import *
    from stroma.contracts import *
    from stroma.cost import *
    from stroma.engine import *
    from stroma.failures import *
    from stroma.hooks import *
    from stroma.limits import *
    from stroma.runner import *
    from stroma.trace import *

_HOMES = {
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
        "RequestRefused",
        "RunBusy",
        "RunExists",
        "SQLiteStore",
        "StoreError",
        "SyncRedisStore",
        "open_store",
    ),
    "contracts": (
        "BoundaryValidator",
        "CheckFailed",
        "ContractRegistry",
        "ContractViolation",
        "Finding",
        "NodeContract",
        "NotDone",
        "NotSerialisable",
        "StepContract",
        "StepViolation",
        "Unknown",
        "stroma_node",
        "stroma_step",
    ),
    "cost": (
        "BudgetExceeded",
        "CostTracker",
        "ExecutionBudget",
        "FallbackPolicy",
        "KNOWN_MODELS",
        "ModelHint",
        "NodeUsage",
        "StepUsage",
        "Usage",
        "UsageError",
        "estimate_cost_usd",
        "resolve_model",
        "update_prices",
        "usage_from",
    ),
    "engine": (
        "NodeExecution",
        "NodeTimeout",
        "ReliabilityContext",
        "RunConfig",
        "current_node",
        "current_node_or_none",
        "current_run",
    ),
    "failures": (
        "CircuitOpen",
        "Classifier",
        "Failure",
        "FailureClass",
        "FailurePolicy",
        "ItemFailure",
        "LimitError",
        "NodeContext",
        "PlaceError",
        "RetryBudget",
        "RunFailed",
        "SharedBudgetExceeded",
        "StepContext",
        "Suspend",
        "WaitedTooLong",
        "WorkerLost",
        "classify",
        "default_policy_map",
    ),
    "hooks": ("HookError", "MapProgress", "NodeHooks", "StepHooks"),
    "limits": ("Breaker", "BudgetState", "Limit", "SharedBudget"),
    "runner": (
        "Flow",
        "FlowFunction",
        "Journal",
        "JsonLines",
        "Pipeline",
        "RunStream",
        "StepFailed",
        "StreamEvent",
        "StromaRunner",
        "StromaStep",
        "execute_step",
        "map_over",
        "parallel",
        "stroma_flow",
    ),
    "trace": (
        "AttemptUsage",
        "ExecutionResult",
        "ExecutionTrace",
        "Question",
        "RunStatus",
        "TraceEvent",
        "TraceMark",
    ),
}


warn_of_other_distribution(__file__)
__getattr__, __dir__ = lazy(__name__, _HOMES)
