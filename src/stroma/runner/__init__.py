"""Runners: pipelines, plain steps, groups, maps, batches, streams."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.checkpoint.manager import CheckpointManager
    from stroma.contracts.contract import ContractRegistry, NodeContract
    from stroma.contracts.node import stroma_node, stroma_step
    from stroma.cost.budget import ExecutionBudget, NodeUsage
    from stroma.cost.fallback import FallbackPolicy, resolve_model
    from stroma.cost.prices import estimate_cost_usd
    from stroma.engine.config import RunConfig
    from stroma.engine.context import ReliabilityContext
    from stroma.failures.classes import FailureClass
    from stroma.failures.failure import Classifier, NodeContext, classify
    from stroma.failures.policy import PolicyMap, default_policy_map
    from stroma.hooks.sets import NodeHooks, StepHooks
    from stroma.runner.events import StreamEvent
    from stroma.runner.flows.endings import StepFailed
    from stroma.runner.flows.flow import Flow, FlowFunction, stroma_flow
    from stroma.runner.groups import map_over, parallel
    from stroma.runner.items import Journal, JsonLines
    from stroma.runner.pipeline import Pipeline
    from stroma.runner.runner import StromaRunner
    from stroma.runner.steps import StromaStep, execute_step
    from stroma.runner.stream import RunStream
    from stroma.trace.events import TraceEvent
    from stroma.trace.result import ExecutionResult, RunStatus

__all__ = [
    "CheckpointManager",
    "Classifier",
    "ContractRegistry",
    "ExecutionBudget",
    "ExecutionResult",
    "FailureClass",
    "FallbackPolicy",
    "Flow",
    "FlowFunction",
    "Journal",
    "JsonLines",
    "NodeContext",
    "NodeContract",
    "NodeHooks",
    "NodeUsage",
    "Pipeline",
    "PolicyMap",
    "ReliabilityContext",
    "RunConfig",
    "RunStatus",
    "RunStream",
    "StepFailed",
    "StepHooks",
    "StreamEvent",
    "StromaRunner",
    "StromaStep",
    "TraceEvent",
    "classify",
    "default_policy_map",
    "estimate_cost_usd",
    "execute_step",
    "map_over",
    "parallel",
    "resolve_model",
    "stroma_flow",
    "stroma_node",
    "stroma_step",
]

_HOMES = {
    "checkpoint.manager": ("CheckpointManager",),
    "contracts.contract": ("ContractRegistry", "NodeContract"),
    "contracts.node": ("stroma_node", "stroma_step"),
    "cost.budget": ("ExecutionBudget", "NodeUsage"),
    "cost.fallback": ("FallbackPolicy", "resolve_model"),
    "cost.prices": ("estimate_cost_usd",),
    "engine.config": ("RunConfig",),
    "engine.context": ("ReliabilityContext",),
    "failures.classes": ("FailureClass",),
    "failures.failure": ("Classifier", "classify", "NodeContext"),
    "failures.policy": ("default_policy_map", "PolicyMap"),
    "hooks.sets": ("NodeHooks", "StepHooks"),
    "runner.events": ("StreamEvent",),
    "runner.flows.endings": ("StepFailed",),
    "runner.flows.flow": ("Flow", "FlowFunction", "stroma_flow"),
    "runner.groups": ("map_over", "parallel"),
    "runner.items": ("Journal", "JsonLines"),
    "runner.pipeline": ("Pipeline",),
    "runner.runner": ("StromaRunner",),
    "runner.steps": ("execute_step", "StromaStep"),
    "runner.stream": ("RunStream",),
    "trace.events": ("TraceEvent",),
    "trace.result": ("ExecutionResult", "RunStatus"),
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
