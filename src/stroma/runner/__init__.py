"""Runners: pipelines, plain steps, groups, maps, batches, streams."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.checkpoint.manager import CheckpointManager
    from stroma.contracts.contract import ContractRegistry, NodeContract
    from stroma.contracts.node import stroma_node, stroma_step
    from stroma.cost.budget import ExecutionBudget
    from stroma.cost.fallback import FallbackPolicy, resolve_model
    from stroma.cost.prices import estimate_cost_usd
    from stroma.cost.tracker import NodeUsage
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
    "CheckpointManager": "checkpoint.manager",
    "Classifier": "failures.failure",
    "ContractRegistry": "contracts.contract",
    "ExecutionBudget": "cost.budget",
    "ExecutionResult": "trace.result",
    "FailureClass": "failures.classes",
    "FallbackPolicy": "cost.fallback",
    "Flow": "runner.flows.flow",
    "FlowFunction": "runner.flows.flow",
    "Journal": "runner.items",
    "JsonLines": "runner.items",
    "NodeContext": "failures.failure",
    "NodeContract": "contracts.contract",
    "NodeHooks": "hooks.sets",
    "NodeUsage": "cost.tracker",
    "Pipeline": "runner.pipeline",
    "PolicyMap": "failures.policy",
    "ReliabilityContext": "engine.context",
    "RunConfig": "engine.config",
    "RunStatus": "trace.result",
    "RunStream": "runner.stream",
    "StepFailed": "runner.flows.endings",
    "StepHooks": "hooks.sets",
    "StreamEvent": "runner.events",
    "StromaRunner": "runner.runner",
    "StromaStep": "runner.steps",
    "TraceEvent": "trace.events",
    "classify": "failures.failure",
    "default_policy_map": "failures.policy",
    "estimate_cost_usd": "cost.prices",
    "execute_step": "runner.steps",
    "map_over": "runner.groups",
    "parallel": "runner.groups",
    "resolve_model": "cost.fallback",
    "stroma_flow": "runner.flows.flow",
    "stroma_node": "contracts.node",
    "stroma_step": "contracts.node",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
