"""The metrics of runs and nodes, by DogStatsD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution
from stroma.telemetry.labels import MetricLabels
from stroma.telemetry.observer import Ended, exceeded
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from datadog.dogstatsd.base import DogStatsd

__all__ = ["DatadogMetrics"]


class DatadogMetrics:
    """The metrics that a client of DogStatsD sends; none without a client. Each method adds one event to them."""

    def __init__(self, statsd: DogStatsd | None) -> None:
        self._statsd = statsd
        self._labels = MetricLabels()

    # ------------------------------------------------------------------ runs

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult, seconds: float) -> None:
        """Count a run that ended, and how long it took."""
        tags = self._of_run(run)
        status = [*tags, f"status:{result.status.value}"]
        self._count("runs", 1, status)
        self._distribution("run.duration", seconds, status)
        dimension = exceeded(result)
        if dimension is not None:
            self._count("budget.exceeded", 1, [*tags, f"dimension:{self._labels.dimension(dimension)}"])

    def run_returned(self, run: ReliabilityContext, status: str) -> None:
        """Count a call that got the result of a run that it did not run."""
        self._count("runs.returned", 1, [*self._of_run(run), f"status:{status}"])

    def budget_warned(self, run: ReliabilityContext, dimension: str) -> None:
        """Count a run that has used 80 % of a limit of its budget."""
        tags = [*self._of_run(run), f"dimension:{self._labels.dimension(dimension)}"]
        self._count("budget.warnings", 1, tags)

    def limit_cooled_down(self, run: ReliabilityContext, limit: str) -> None:
        """Count a cooldown of a limit."""
        self._count("limit.cooldowns", 1, [*self._of_run(run), f"limit:{self._labels.limit(limit)}"])

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        """Count a change of a circuit."""
        tags = [*self._of_run(run), f"circuit:{self._labels.circuit(key)}", f"state:{state}"]
        self._count("circuit.changes", 1, tags)

    def hook_raised(self, run: ReliabilityContext, hook: str) -> None:
        """Count an exception of a hook."""
        self._count("hook.errors", 1, [*self._of_run(run), f"hook:{hook}"])

    # ------------------------------------------------------------------ nodes

    def attempt_ended(self, node: NodeExecution, ended: Ended) -> None:
        """Count an attempt: its end and duration, tokens and cost."""
        usage, tags = node.usage, self._of_node(node)
        outcome = [*tags, f"outcome:{ended.outcome}", f"failure_class:{ended.class_name}"]
        self._count("node.executions", 1, outcome)
        self._distribution("node.duration", (node.duration_ms or 0.0) / 1000, tags)
        if usage.tokens:
            tags = [*tags, f"model:{self._labels.model(usage.model)}"]
            self._count("tokens", usage.input_tokens, [*tags, "direction:input"])
            self._count("tokens", usage.output_tokens, [*tags, "direction:output"])
            self._count("cost_usd", usage.cost_usd, tags)

    def retried(self, node: NodeExecution, failure_class: str) -> None:
        """Count an attempt that follows a failed one."""
        self._count("node.retries", 1, [*self._of_node(node), f"failure_class:{failure_class}"])

    def restored(self, node: NodeExecution) -> None:
        """Count an output that was restored from the journal."""
        self._count("nodes.restored", 1, self._of_node(node))

    def queued(self, node: NodeExecution) -> None:
        """Count an attempt that is queued."""
        self._count("node.waits", 1, self._of_node(node))

    # ------------------------------------------------------------------ tags

    def _of_run(self, run: ReliabilityContext) -> list[str]:
        return [f"pipeline:{self._labels.pipeline(run.pipeline)}"]

    def _of_node(self, node: NodeExecution) -> list[str]:
        pipeline, node_id = self._labels.place(node.pipeline, node.node_id)
        return [f"pipeline:{pipeline}", f"node_id:{node_id}"]

    def _count(self, name: str, value: float, tags: list[str]) -> None:
        if self._statsd is not None:
            self._statsd.increment(f"stroma.{name}", value, tags=tags)

    def _distribution(self, name: str, value: float, tags: list[str]) -> None:
        if self._statsd is not None:
            self._statsd.distribution(f"stroma.{name}", value, tags=tags)
