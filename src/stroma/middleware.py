"""Published path of the plain steps, see :mod:`stroma.runner.steps`, and of their names."""

from stroma.checkpoint.manager import CheckpointManager
from stroma.contracts.contract import ContractRegistry, NodeContract
from stroma.cost.budget import CostTracker, ExecutionBudget, NodeUsage
from stroma.cost.fallback import FallbackPolicy, resolve_model
from stroma.cost.prices import estimate_cost_usd
from stroma.engine.context import ReliabilityContext
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Classifier, NodeContext, classify
from stroma.failures.policy import PolicyMap, RetryBudget, default_policy_map
from stroma.runner.steps import StromaStep, execute_step
from stroma.trace.events import TraceEvent
from stroma.trace.result import ExecutionResult, RunStatus
from stroma.trace.trace import ExecutionTrace

__all__ = [
    "CheckpointManager",
    "Classifier",
    "ContractRegistry",
    "CostTracker",
    "ExecutionBudget",
    "ExecutionResult",
    "ExecutionTrace",
    "FailureClass",
    "FallbackPolicy",
    "NodeContext",
    "NodeContract",
    "NodeUsage",
    "PolicyMap",
    "ReliabilityContext",
    "RetryBudget",
    "RunStatus",
    "StromaStep",
    "TraceEvent",
    "classify",
    "default_policy_map",
    "estimate_cost_usd",
    "execute_step",
    "resolve_model",
]
