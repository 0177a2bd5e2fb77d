"""Runners: pipelines, plain steps, groups, maps, batches, streams."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.checkpoint.manager import CheckpointManager as CheckpointManager
    from stroma.contracts.contract import ContractRegistry as ContractRegistry
    from stroma.contracts.contract import NodeContract as NodeContract
    from stroma.contracts.node import stroma_node as stroma_node
    from stroma.contracts.node import stroma_step as stroma_step
    from stroma.cost.budget import ExecutionBudget as ExecutionBudget
    from stroma.cost.budget import NodeUsage as NodeUsage
    from stroma.cost.fallback import FallbackPolicy as FallbackPolicy
    from stroma.cost.fallback import resolve_model as resolve_model
    from stroma.cost.prices import estimate_cost_usd as estimate_cost_usd
    from stroma.engine.config import RunConfig as RunConfig
    from stroma.engine.context import ReliabilityContext as ReliabilityContext
    from stroma.failures.classes import FailureClass as FailureClass
    from stroma.failures.failure import Classifier as Classifier
    from stroma.failures.failure import NodeContext as NodeContext
    from stroma.failures.failure import classify as classify
    from stroma.failures.policy import PolicyMap as PolicyMap
    from stroma.failures.policy import default_policy_map as default_policy_map
    from stroma.hooks.sets import NodeHooks as NodeHooks
    from stroma.hooks.sets import StepHooks as StepHooks
    from stroma.runner.events import StreamEvent as StreamEvent
    from stroma.runner.flows.endings import StepFailed as StepFailed
    from stroma.runner.flows.flow import Flow as Flow
    from stroma.runner.flows.flow import FlowFunction as FlowFunction
    from stroma.runner.flows.flow import stroma_flow as stroma_flow
    from stroma.runner.groups import map_over as map_over
    from stroma.runner.groups import parallel as parallel
    from stroma.runner.items import Journal as Journal
    from stroma.runner.items import JsonLines as JsonLines
    from stroma.runner.pipeline import Pipeline as Pipeline
    from stroma.runner.runner import StromaRunner as StromaRunner
    from stroma.runner.steps import StromaStep as StromaStep
    from stroma.runner.steps import execute_step as execute_step
    from stroma.runner.stream import RunStream as RunStream
    from stroma.trace.events import TraceEvent as TraceEvent
    from stroma.trace.result import ExecutionResult as ExecutionResult
    from stroma.trace.result import RunStatus as RunStatus

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
