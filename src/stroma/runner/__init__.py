"""Runners: pipelines, plain steps, groups, maps, batches, streams."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.contracts.node import stroma_node, stroma_step
    from stroma.engine.config import RunConfig
    from stroma.hooks.sets import NodeHooks, StepHooks
    from stroma.runner.flows.definition import stroma_flow
    from stroma.runner.flows.errors import StepFailed
    from stroma.runner.flows.flow import Flow, FlowFunction
    from stroma.runner.groups import map_over, parallel
    from stroma.runner.items import Journal, JsonLines
    from stroma.runner.pipeline import Pipeline
    from stroma.runner.runner import StromaRunner
    from stroma.runner.steps import StromaStep, execute_step
    from stroma.runner.stream import RunStream, StreamEvent

__all__ = [
    "Flow",
    "FlowFunction",
    "Journal",
    "JsonLines",
    "NodeHooks",
    "Pipeline",
    "RunConfig",
    "RunStream",
    "StepFailed",
    "StepHooks",
    "StreamEvent",
    "StromaRunner",
    "StromaStep",
    "execute_step",
    "map_over",
    "parallel",
    "stroma_flow",
    "stroma_node",
    "stroma_step",
]

_HOMES = {
    "Flow": "runner.flows.flow",
    "FlowFunction": "runner.flows.flow",
    "Journal": "runner.items",
    "JsonLines": "runner.items",
    "NodeHooks": "hooks.sets",
    "Pipeline": "runner.pipeline",
    "RunConfig": "engine.config",
    "RunStream": "runner.stream",
    "StepFailed": "runner.flows.errors",
    "StepHooks": "hooks.sets",
    "StreamEvent": "runner.stream",
    "StromaRunner": "runner.runner",
    "StromaStep": "runner.steps",
    "execute_step": "runner.steps",
    "map_over": "runner.groups",
    "parallel": "runner.groups",
    "stroma_flow": "runner.flows.definition",
    "stroma_node": "contracts.node",
    "stroma_step": "contracts.node",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
