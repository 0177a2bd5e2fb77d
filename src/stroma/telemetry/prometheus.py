"""Prometheus: counters, histograms and a gauge in a registry of ``prometheus_client``."""

from __future__ import annotations

import sys
import weakref
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from stroma.checkpoint.queue import QueueReading
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution
from stroma.failures.classes import FailureClass
from stroma.telemetry.labels import MetricLabels
from stroma.telemetry.observer import (
    NODE_BUCKETS,
    AttemptEnd,
    ExporterHooks,
    Observer,
    exceeded,
    is_returned,
    missing,
)
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["prometheus_hooks"]

# In seconds.
_RUN_BUCKETS: Final = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)


def prometheus_hooks(*, registry: CollectorRegistry | None = None) -> ExporterHooks:
    """Create hooks that count runs and attempts.

    Labels are the names of pipelines, nodes, models and the like, never a run id or a message. Any number of
    sets may share a ``registry`` (prometheus_client's own if none is given): they feed the same metrics.
    Serving them is the application's part, as with ``prometheus_client.start_http_server``. Where a span of
    OpenTelemetry is current and sampled, counts of runs and attempts and their durations have it as exemplar,
    which pages in the OpenMetrics format show.

    Raises ImportError with the line that installs the extra.
    """
    try:
        from prometheus_client import REGISTRY
    except ImportError as error:
        raise missing("prometheus-client", "prometheus_hooks", "prometheus") from error
    target = REGISTRY if registry is None else registry
    metrics = _known.get(target)
    if metrics is None:  # A second one of the same names would be refused.
        metrics = _known[target] = _Metrics(target)
    else:
        metrics.ensure_registered(target)
    return _Prometheus(metrics, target).hooks()


class _Metrics:
    """The metrics of one registry. Children are kept by their labels: looking one up takes microseconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        #: The children that an attempt feeds, by its labels: one look-up for two or three of them, which is 2
        #: us less of 10.
        self._attempts: dict[tuple[object, ...], tuple[Any, Any]] = {}
        self._usages: dict[tuple[object, ...], tuple[Any, Any, Any]] = {}
        self._collectors: list[Any] = []
        self._make(registry)

    def ensure_registered(self, registry: CollectorRegistry) -> None:
        """Begin anew if the metrics were taken out of their registry, as test suites do: every set that feeds them follows."""
        present = getattr(registry, "_collector_to_names", None)
        if present is not None and not all(collector in present for collector in self._collectors):
            for collector in self._collectors:
                if collector in present:
                    registry.unregister(collector)
            self._make(registry)

    def of_attempt(
        self, place: tuple[str, str], outcome: str, failure_class: str, reason: str
    ) -> tuple[Any, Any]:
        """Return the counter and the histogram of attempts that end in this way."""
        children = self._attempts.get((place, outcome, failure_class, reason))
        if children is None:
            children = self.executions(*place, outcome, failure_class, reason), self.node_seconds(*place)
            self._attempts[place, outcome, failure_class, reason] = children
        return children

    def of_usage(self, place: tuple[str, str], model: str, agent: str) -> tuple[Any, Any, Any]:
        """Return the counters of input tokens, output tokens and cost of a node with a model, in an agent or none."""
        children = self._usages.get((place, model, agent))
        if children is None:
            tokens, at = self.tokens, (*place, model, agent)
            children = tokens(*at, "input"), tokens(*at, "output"), self.cost(*at)
            self._usages[place, model, agent] = children
        return children

    def _make(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._attempts.clear()
        self._usages.clear()

        def counter(name: str, text: str, *labels: str, unit: str = "") -> _Children:
            return _Children(Counter(name, text, ("pipeline", *labels), unit=unit, registry=registry))

        self.runs = counter("stroma_runs", "Runs that ended, by status.", "status")
        self.in_progress = _Children(
            Gauge(
                "stroma_runs_in_progress",
                "Runs that have begun and not ended.",
                ("pipeline",),
                registry=registry,
                # Where processes share their metrics: the sum, without those of processes that were killed.
                multiprocess_mode="livesum",
            )
        )
        #: In the order of a QueueReading.
        self.queues = tuple(
            # Where processes share their metrics: any worker that lives has read the same store.
            _Children(
                Gauge(name, text, ("pipeline",), unit=unit, registry=registry, multiprocess_mode="livemax")
            )
            for name, unit, text in (
                ("stroma_runs_queued", "", "Runs that were submitted and have not started."),
                ("stroma_runs_oldest_due", "seconds", "For how long the oldest due run is due."),
                ("stroma_runs_blocked", "", "Runs that code of their version could not continue."),
                ("stroma_runs_oldest_blocked", "seconds", "For how long the oldest blocked run is blocked."),
            )
        )
        self.run_seconds = _Children(
            Histogram(
                "stroma_run_duration",
                "Wall time of runs.",
                ("pipeline", "status"),
                unit="seconds",
                buckets=_RUN_BUCKETS,
                registry=registry,
            )
        )
        self.node_seconds = _Children(
            Histogram(
                "stroma_node_duration",
                "Wall time of a node's function, by attempt.",
                ("pipeline", "node_id"),
                unit="seconds",
                buckets=NODE_BUCKETS,
                registry=registry,
            )
        )
        self.executions = counter(
            "stroma_node_executions", "Attempts that ended.", "node_id", "outcome", "failure_class", "reason"
        )
        self.retries = counter(
            "stroma_node_retries", "Attempts that followed a failed one.", "node_id", "failure_class"
        )
        self.skipped = counter(
            "stroma_nodes_skipped", "Outputs that were restored from the journal.", "node_id"
        )
        of_usage = "node_id", "model", "agent"
        self.tokens = counter(
            "stroma_tokens", "Tokens that nodes reported.", *of_usage, "direction", unit="tokens"
        )
        self.cached_tokens = counter(
            "stroma_cached_tokens",
            "Input tokens that a cache had, or got.",
            *of_usage,
            "cache",
            unit="tokens",
        )
        self.cost = counter("stroma_cost_usd", "What they cost, in US dollars.", *of_usage, unit="usd")
        self.warnings = counter(
            "stroma_budget_warnings", "Runs that used 80 % of a limit of their budget.", "dimension"
        )
        self.exceeded = counter("stroma_budget_exceeded", "Runs that a budget stopped.", "dimension")
        self.waits = counter("stroma_node_waits", "Attempts that waited for their turn.", "node_id")
        self.circuits = counter("stroma_circuit_changes", "What circuits came to.", "circuit", "state")
        self.cooldowns = counter(
            "stroma_limit_cooldowns", "Times that a refused call has closed a limit.", "limit"
        )
        self.labels = MetricLabels()
        self.returned = counter(
            "stroma_runs_returned", "Calls that got the result of a run that they did not run.", "status"
        )
        self.hook_errors = counter("stroma_hook_errors", "Exceptions that hooks raised.", "hook")
        own = [one for one in vars(self).values() if isinstance(one, _Children)]
        self._collectors = [one.metric for one in (*own, *self.queues)]


class _Children:
    """A metric's children by label values."""

    __slots__ = ("_of", "metric")

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self._of: dict[tuple[str, ...], Any] = {}

    def __call__(self, *values: str) -> Any:
        child = self._of.get(values)
        if child is None:
            child = self._of[values] = self.metric.labels(*values)
        return child

    def remove(self, *values: str) -> None:
        """Show no value for these labels any more."""
        if self._of.pop(values, None) is not None:
            self.metric.remove(*values)


_known: weakref.WeakKeyDictionary[CollectorRegistry, _Metrics] = weakref.WeakKeyDictionary()


class _Prometheus(Observer):
    name = "Prometheus"

    def __init__(self, metrics: _Metrics, registry: CollectorRegistry) -> None:
        super().__init__()
        self._metrics = metrics
        #: Where its metrics are.
        self.registry = registry

    @property
    def destination(self) -> object:
        return self._metrics

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        if is_returned(run):
            return
        run.notes[self] = perf_counter()
        self._metrics.in_progress(self._metrics.labels.pipeline(run.pipeline)).inc()

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        started = run.notes.pop(self, None)
        metrics, status = self._metrics, result.status.value
        pipeline = metrics.labels.pipeline(run.pipeline)
        if is_returned(run):
            metrics.returned(pipeline, status).inc()
            return
        if started is None:
            return
        metrics.in_progress(pipeline).dec()
        seconds = perf_counter() - started
        exemplar = _exemplar()
        metrics.runs(pipeline, status).inc(1, exemplar)
        metrics.run_seconds(pipeline, status).observe(seconds, exemplar)
        dimension = exceeded(result)
        if dimension is not None:
            metrics.exceeded(pipeline, metrics.labels.dimension(dimension)).inc()

    def hook_raised(self, run: ReliabilityContext | None, hook: str) -> None:
        if run is not None:
            self._metrics.hook_errors(self._metrics.labels.pipeline(run.pipeline), hook).inc()

    def queue_read(self, pipeline: str, figures: QueueReading | None) -> None:
        label = self._metrics.labels.pipeline(pipeline)
        for at, gauge in enumerate(self._metrics.queues):
            if figures is None:
                gauge.remove(label)
            else:
                gauge(label).set(figures[at])

    def attempt_ended(self, node: NodeExecution, ended: AttemptEnd) -> None:
        metrics, usage, exemplar = self._metrics, node.usage, _exemplar()
        place = metrics.labels.place(node.pipeline, node.node_id)
        executions, seconds = metrics.of_attempt(
            place, ended.outcome, ended.class_name, metrics.labels.reason(ended.reason)
        )
        executions.inc(1, exemplar)
        seconds.observe((node.duration_ms or 0.0) / 1000, exemplar)
        if usage.tokens or usage.cost_usd:
            model, agent = metrics.labels.model(usage.model), metrics.labels.agent(node.agent)
            consumed, produced, cost = metrics.of_usage(place, model, agent)
            consumed.inc(usage.input_tokens)
            produced.inc(usage.output_tokens)
            cost.inc(usage.cost_usd)
            for cache, tokens in (
                ("read", usage.cached_input_tokens),
                ("write", usage.cache_write_tokens),
            ):
                if tokens:
                    metrics.cached_tokens(*place, model, agent, cache).inc(tokens)

    def retrying(
        self, node: NodeExecution, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        place = self._metrics.labels.place(node.pipeline, node.node_id)
        self._metrics.retries(*place, failure_class.value).inc()

    def skipped(self, node: NodeExecution) -> None:
        if is_returned(node.ctx):
            return
        self._metrics.skipped(*self._metrics.labels.place(node.pipeline, node.node_id)).inc()

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        labels = self._metrics.labels
        self._metrics.warnings(labels.pipeline(run.pipeline), labels.dimension(dimension)).inc()

    def waiting(self, node: NodeExecution, reason: str, seconds: float) -> None:
        self._metrics.waits(*self._metrics.labels.place(node.pipeline, node.node_id)).inc()

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        labels = self._metrics.labels
        self._metrics.circuits(labels.pipeline(run.pipeline), labels.circuit(key), state).inc()

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        labels = self._metrics.labels
        self._metrics.cooldowns(labels.pipeline(run.pipeline), labels.limit(limit)).inc()


def _exemplar() -> dict[str, str] | None:
    """Return the ids of OpenTelemetry's current span if that is sampled, else None."""
    # Not imported here: where nobody has, there is no span.
    current: Any = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if current is None:
        return None
    context = current().get_span_context()
    if not (context.is_valid and context.trace_flags.sampled):
        return None
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
