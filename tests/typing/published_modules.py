"""The published module paths export their names to type checkers too."""

# ruff: noqa: F401  (The imports are the test.)

from typing import assert_type

from stroma.checkpoint import (
    AsyncCheckpointStore,
    AsyncInMemoryStore,
    CheckpointKey,
    CheckpointManager,
    CheckpointStore,
    InMemoryStore,
    RedisStore,
    SyncRedisStore,
    resolve_schema,
    schema_ref,
)
from stroma.contracts import (
    BoundaryValidator,
    ContractRegistry,
    ContractViolation,
    NodeContract,
    StepContract,
    StepViolation,
)
from stroma.cost import (
    KNOWN_MODELS,
    BudgetExceeded,
    CostTracker,
    ExecutionBudget,
    FallbackPolicy,
    ModelHint,
    NodeUsage,
    StepUsage,
    estimate_cost_usd,
    resolve_model,
)
from stroma.failures import (
    Classifier,
    FailureClass,
    FailurePolicy,
    NodeContext,
    PolicyMap,
    RetryBudget,
    StepContext,
    classify,
    default_policy_map,
)
from stroma.middleware import ReliabilityContext, StromaStep, execute_step
from stroma.runner import NodeHooks, RunConfig, StepHooks, StromaRunner, parallel, stroma_node, stroma_step
from stroma.trace import ExecutionResult, ExecutionTrace, RunStatus, TraceEvent

assert_type(estimate_cost_usd("gpt-4o", 1), float)
assert_type(KNOWN_MODELS, dict[str, tuple[float, float]])
assert_type(default_policy_map(), PolicyMap)
