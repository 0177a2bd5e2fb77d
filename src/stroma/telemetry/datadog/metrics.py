"""The metrics of runs and nodes, by DogStatsD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution
from stroma.telemetry.labels import MetricLabels
from stroma.telemetry.observer import AttemptEnd, exceeded
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from datadog.dogstatsd.base import DogStatsd

__all__ = ["DatadogMetrics"]


class DatadogMetrics:
    """The metrics that a client of DogStatsD sends; none without a client. Each method adds one event to them."""

    def __init__(self, statsd: DogStatsd | None) -> None:
        self._statsd = statsd
        self._labels = MetricLabels()
        # As many as there are series, which the labels bound.
        self._tags: dict[tuple[str, ...], list[str]] = {}
        #: The tags of what an attempt feeds, by its labels: one look-up for two or three metrics.
        self._attempts: dict[tuple[object, ...], tuple[list[str], list[str]]] = {}
        self._usages: dict[tuple[object, ...], tuple[list[str], list[str], list[str]]] = {}

    # ------------------------------------------------------------------ runs

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult, seconds: float) -> None:
        """Count a run that ended, and how long it took."""
        status = self._of_run(run, "status", result.status.value)
        self._count("stroma.runs", 1, status)
        self._distribution("stroma.run.duration", seconds, status)
        dimension = exceeded(result)
        if dimension is not None:
            dimension = self._labels.dimension(dimension)
            self._count("stroma.budget.exceeded", 1, self._of_run(run, "dimension", dimension))

    def run_returned(self, run: ReliabilityContext, status: str) -> None:
        """Count a call that got the result of a run that it did not run."""
        self._count("stroma.runs.returned", 1, self._of_run(run, "status", status))

    def budget_warned(self, run: ReliabilityContext, dimension: str) -> None:
        """Count a run that has used 80 % of a limit of its budget."""
        tags = self._of_run(run, "dimension", self._labels.dimension(dimension))
        self._count("stroma.budget.warnings", 1, tags)

    def limit_cooled_down(self, run: ReliabilityContext, limit: str) -> None:
        """Count a cooldown of a limit."""
        self._count("stroma.limit.cooldowns", 1, self._of_run(run, "limit", self._labels.limit(limit)))

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        """Count a change of a circuit."""
        circuit = "circuit", self._labels.circuit(key), "state", state
        self._count("stroma.circuit.changes", 1, self._of_run(run, *circuit))

    def hook_raised(self, run: ReliabilityContext, hook: str) -> None:
        """Count an exception of a hook."""
        self._count("stroma.hook.errors", 1, self._of_run(run, "hook", hook))

    # ------------------------------------------------------------------ nodes

    def attempt_ended(self, node: NodeExecution, ended: AttemptEnd) -> None:
        """Count an attempt: its end and duration, tokens and cost."""
        if self._statsd is None:
            return
        usage, place = node.usage, self._labels.place(node.pipeline, node.node_id)
        outcome, every = self._of_attempt(
            place, ended.outcome, ended.class_name, self._labels.reason(ended.reason)
        )
        self._count("stroma.node.executions", 1, outcome)
        self._distribution("stroma.node.duration", (node.duration_ms or 0.0) / 1000, every)
        if usage.tokens or usage.cost_usd:
            consumed, produced, cost = self._of_usage(
                place, self._labels.model(usage.model), self._labels.agent(node.agent)
            )
            self._count("stroma.tokens", usage.input_tokens, consumed)
            self._count("stroma.tokens", usage.output_tokens, produced)
            self._count("stroma.cost_usd", usage.cost_usd, cost)
            for cache, tokens in (
                ("read", usage.cached_input_tokens),
                ("write", usage.cache_write_tokens),
            ):
                if tokens:
                    self._count("stroma.cached_tokens", tokens, [*cost, f"cache:{cache}"])

    def retried(self, node: NodeExecution, failure_class: str) -> None:
        """Count an attempt that follows a failed one."""
        self._count("stroma.node.retries", 1, self._of_node(node, "failure_class", failure_class))

    def restored(self, node: NodeExecution) -> None:
        """Count an output that was restored from the journal."""
        self._count("stroma.nodes.restored", 1, self._of_node(node))

    def queued(self, node: NodeExecution) -> None:
        """Count an attempt that is queued."""
        self._count("stroma.node.waits", 1, self._of_node(node))

    # ------------------------------------------------------------------ tags

    def _of_run(self, run: ReliabilityContext, *more: str) -> list[str]:
        """Return the tags of a metric of runs: the pipeline and ``more``, name after name with its value."""
        return self._tags_of("pipeline", self._labels.pipeline(run.pipeline), *more)

    def _of_node(self, node: NodeExecution, *more: str) -> list[str]:
        """Return the tags of a metric of nodes, likewise."""
        pipeline, node_id = self._labels.place(node.pipeline, node.node_id)
        return self._tags_of("pipeline", pipeline, "node_id", node_id, *more)

    def _of_attempt(
        self, place: tuple[str, str], outcome: str, failure_class: str, reason: str
    ) -> tuple[list[str], list[str]]:
        """Return the tags of the counter and of the distribution of attempts that end in this way."""
        tags = self._attempts.get((place, outcome, failure_class, reason))
        if tags is None:
            at = "pipeline", place[0], "node_id", place[1]
            ended = self._tags_of(*at, "outcome", outcome, "failure_class", failure_class, "reason", reason)
            tags = self._attempts[place, outcome, failure_class, reason] = ended, self._tags_of(*at)
        return tags

    def _of_usage(
        self, place: tuple[str, str], model: str, agent: str
    ) -> tuple[list[str], list[str], list[str]]:
        """Return the tags of input tokens, output tokens and cost of a node with a model, in an agent or none."""
        tags = self._usages.get((place, model, agent))
        if tags is None:
            at = "pipeline", place[0], "node_id", place[1], "model", model, "agent", agent
            consumed, produced = (self._tags_of(*at, "direction", way) for way in ("input", "output"))
            tags = self._usages[place, model, agent] = consumed, produced, self._tags_of(*at)
        return tags

    def _tags_of(self, *pairs: str) -> list[str]:
        tags = self._tags.get(pairs)
        if tags is None:
            names = zip(pairs[::2], pairs[1::2], strict=True)
            tags = self._tags[pairs] = [f"{name}:{value}" for name, value in names]
        return tags

    def _count(self, name: str, value: float, tags: list[str]) -> None:
        if self._statsd is not None:
            self._statsd.increment(name, value, tags=tags)

    def _distribution(self, name: str, value: float, tags: list[str]) -> None:
        if self._statsd is not None:
            self._statsd.distribution(name, value, tags=tags)
