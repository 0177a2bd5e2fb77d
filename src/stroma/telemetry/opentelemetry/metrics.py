"""The metrics of runs and nodes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from opentelemetry import metrics

from stroma.checkpoint.queue import QueueReading
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution
from stroma.telemetry.conventions import SCHEMA_URL, SCOPE, version
from stroma.telemetry.labels import MetricLabels
from stroma.telemetry.observer import NODE_BUCKETS, AttemptEnd, exceeded
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter, MeterProvider

__all__ = ["OtelMetrics", "meter_of"]

# The histogram of runs and what it calls the pipeline: of release 0.1.0 of the conventions, and before it.
_RUN_NAMES: Final = (
    ("gen_ai.invoke_agent.duration", "gen_ai.agent.name"),
    ("gen_ai.invoke_workflow.duration", "gen_ai.workflow.name"),
)
# In seconds. The first as the conventions advise; https://opentelemetry.io/docs/specs/semconv/gen-ai/
_RUN_BUCKETS: Final = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)

#: In the order of a QueueReading.
_QUEUE_GAUGES: Final = (
    ("stroma.runs.queued", "{run}", "Runs that were submitted and have not started"),
    ("stroma.runs.oldest_due", "s", "For how long the oldest due run is due"),
    ("stroma.runs.blocked", "{run}", "Runs that code of their version could not continue"),
    ("stroma.runs.oldest_blocked", "s", "For how long the oldest blocked run is blocked"),
)


def meter_of(source: Meter | MeterProvider) -> Meter:
    """Return a meter as it is, or that of a provider under our name, version and schema."""
    if isinstance(source, metrics.Meter):
        return source
    return source.get_meter(SCOPE, version() or "", SCHEMA_URL)


class OtelMetrics:
    """The instruments of a meter. Each method adds one event to them.

    Attributes:
        pipeline_names: attributes that have the name of a run's pipeline, on its span too.
    """

    def __init__(self, meter: Meter, *, earlier_names: bool) -> None:
        self._labels = MetricLabels()
        self._attributes: dict[tuple[str, ...], dict[str, str]] = {}
        #: Histograms of runs, with the name of the pipeline's label: the second is that of earlier
        #: conventions.
        self._run_seconds = [
            (
                meter.create_histogram(
                    name, "s", "Wall time of a run", explicit_bucket_boundaries_advisory=_RUN_BUCKETS
                ),
                label,
            )
            for name, label in (_RUN_NAMES if earlier_names else _RUN_NAMES[:1])
        ]
        self.pipeline_names = tuple(label for _, label in self._run_seconds)
        self._node_seconds = meter.create_histogram(
            "stroma.node.duration",
            "s",
            "Wall time of an attempt's function",
            explicit_bucket_boundaries_advisory=NODE_BUCKETS,
        )
        self._active = meter.create_up_down_counter("stroma.runs.active", "{run}", "Runs in progress")
        self._executions = meter.create_counter("stroma.node.executions", "{attempt}", "Attempts that ended")
        self._retries = meter.create_counter(
            "stroma.node.retries", "{attempt}", "Attempts that follow a failed one"
        )
        self._tokens = meter.create_counter("stroma.tokens", "{token}", "Tokens that nodes reported")
        self._cached = meter.create_counter(
            "stroma.cached_tokens", "{token}", "Input tokens that a cache had, or got"
        )
        self._cost = meter.create_counter("stroma.cost", "USD", "What they cost")
        self._exceeded = meter.create_counter("stroma.budget.exceeded", "{run}", "Runs that a budget stopped")
        self._cooldowns = meter.create_counter(
            "stroma.limit.cooldowns", "{cooldown}", "Times that a refused call has closed a limit"
        )
        self._waits = meter.create_counter(
            "stroma.node.waits",
            "{wait}",
            "Times that an attempt was queued for a limit, a budget or a circuit",
        )
        self._circuits = meter.create_counter(
            "stroma.circuit.changes", "{change}", "Circuits that became open, half open or closed"
        )
        self._restored = meter.create_counter(
            "stroma.nodes.restored", "{node}", "Outputs that were restored from the journal"
        )
        self._warnings = meter.create_counter(
            "stroma.budget.warnings", "{run}", "Runs that used 80 % of a limit of their budget"
        )
        self._meter = meter
        #: Figures of the queues that workers of this process serve, by the label of the pipeline.
        self._queues: dict[str, QueueReading] = {}
        self._shows_queues = False
        self._returned = meter.create_counter(
            "stroma.runs.returned", "{run}", "Calls that got the result of a run that they did not run"
        )
        self._hook_errors = meter.create_counter(
            "stroma.hook.errors", "{error}", "Exceptions that hooks raised"
        )

    # ------------------------------------------------------------------ runs

    def run_started(self, run: ReliabilityContext) -> None:
        """Count a run that is in progress."""
        self._active.add(1, self._of_run(run))

    def run_ended(
        self, run: ReliabilityContext, result: ExecutionResult, seconds: float, error_type: str | None
    ) -> None:
        """Record a run that ended, by its status and the type of the exception that ended it."""
        self._active.add(-1, self._of_run(run))
        outcome = {"stroma.status": result.status.value}
        if error_type is not None:
            outcome["error.type"] = error_type
        pipeline = self._labels.pipeline(run.pipeline)
        for histogram, label in self._run_seconds:
            histogram.record(seconds, {label: pipeline, **outcome})
        dimension = exceeded(result)
        if dimension is not None:
            dimension = self._labels.dimension(dimension)
            self._exceeded.add(1, self._of_run(run, "stroma.budget.dimension", dimension))

    def run_returned(self, run: ReliabilityContext, status: str) -> None:
        """Count a call that got the result of a run that it did not run."""
        self._returned.add(1, self._of_run(run, "stroma.status", status))

    def budget_warned(self, run: ReliabilityContext, dimension: str) -> None:
        """Count a run that has used 80 % of a limit of its budget."""
        label = self._labels.dimension(dimension)
        self._warnings.add(1, self._of_run(run, "stroma.budget.dimension", label))

    def limit_cooled_down(self, run: ReliabilityContext, limit: str) -> None:
        """Count a cooldown of a limit."""
        self._cooldowns.add(1, self._of_run(run, "stroma.limit", self._labels.limit(limit)))

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        """Count a change of a circuit."""
        circuit = self._labels.circuit(key)
        self._circuits.add(1, self._of_run(run, "stroma.circuit", circuit, "stroma.circuit.state", state))

    def hook_raised(self, run: ReliabilityContext, hook: str) -> None:
        """Count an exception of a hook."""
        self._hook_errors.add(1, self._of_run(run, "stroma.hook", hook))

    def queue_read(self, pipeline: str, figures: QueueReading | None) -> None:
        """Show the figures of a queue, until they are None."""
        label = self._labels.pipeline(pipeline)
        if figures is None:
            self._queues.pop(label, None)
            return
        self._queues[label] = figures
        if not self._shows_queues:  # Where no worker serves, the gauges would only be empty.
            self._shows_queues = True
            for at, (name, unit, text) in enumerate(_QUEUE_GAUGES):
                self._meter.create_observable_gauge(name, [partial(self._observe, at)], unit, text)

    def _observe(self, at: int, _: metrics.CallbackOptions) -> list[metrics.Observation]:
        return [
            metrics.Observation(figures[at], self._attributes_of("stroma.pipeline", label))
            for label, figures in list(self._queues.items())  # Called in the thread of a reader.
        ]

    # ------------------------------------------------------------------ nodes

    def attempt_ended(self, node: NodeExecution, ended: AttemptEnd) -> None:
        """Record an attempt: its end and duration, tokens and cost."""
        usage, place = node.usage, self._place_of(node)
        reason = self._labels.reason(ended.reason)
        outcome = (
            "stroma.outcome",
            ended.outcome,
            "stroma.failure_class",
            ended.class_name,
            "stroma.reason",
            reason,
        )
        self._executions.add(1, self._attributes_of(*place, *outcome))
        self._node_seconds.record((node.duration_ms or 0.0) / 1000, self._attributes_of(*place))
        if usage.tokens or usage.cost_usd:
            model, agent = self._labels.model(usage.model), self._labels.agent(node.agent)
            place = *place, "stroma.model", model, "gen_ai.agent.name", agent
            self._tokens.add(usage.input_tokens, self._attributes_of(*place, "stroma.direction", "input"))
            self._tokens.add(usage.output_tokens, self._attributes_of(*place, "stroma.direction", "output"))
            self._cost.add(usage.cost_usd, self._attributes_of(*place))
            for cache, tokens in (
                ("read", usage.cached_input_tokens),
                ("write", usage.cache_write_tokens),
            ):
                if tokens:
                    self._cached.add(tokens, self._attributes_of(*place, "stroma.cache", cache))

    def retried(self, node: NodeExecution, failure_class: str) -> None:
        """Count an attempt that follows a failed one."""
        self._retries.add(1, self._of_node(node, "stroma.failure_class", failure_class))

    def restored(self, node: NodeExecution) -> None:
        """Count an output that was restored from the journal."""
        self._restored.add(1, self._of_node(node))

    def queued(self, node: NodeExecution) -> None:
        """Count an attempt that is queued."""
        self._waits.add(1, self._of_node(node))

    # ------------------------------------------------------------------ attributes

    def _of_run(self, run: ReliabilityContext, *more: str) -> dict[str, str]:
        """Return the attributes of a metric of runs: the pipeline and ``more``, name after name with its value."""
        return self._attributes_of("stroma.pipeline", self._labels.pipeline(run.pipeline), *more)

    def _of_node(self, node: NodeExecution, *more: str) -> dict[str, str]:
        """Return the attributes of a metric of nodes, likewise."""
        return self._attributes_of(*self._place_of(node), *more)

    def _place_of(self, node: NodeExecution) -> tuple[str, ...]:
        pipeline, node_id = self._labels.place(node.pipeline, node.node_id)
        return "stroma.pipeline", pipeline, "stroma.node.id", node_id

    def _attributes_of(self, *pairs: str) -> dict[str, str]:
        # As many as there are series, which the labels bound.
        attributes = self._attributes.get(pairs)
        if attributes is None:
            attributes = self._attributes[pairs] = dict(zip(pairs[::2], pairs[1::2], strict=True))
        return attributes
