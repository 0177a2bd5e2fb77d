"""Metrics of runs and nodes: one table with the name in each system, and what each event adds.

Labels are bounded in number and length: a label with a value for each run fills up the server that stores it.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, Final, Literal, NamedTuple

from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RunningNode
from stroma.engine.outcome import limit_that_stopped
from stroma.failures.classes import FailureClass
from stroma.telemetry.observer import AttemptEnd, Observer, is_returned
from stroma.trace.result import ExecutionResult

#: Seconds, from a fast function to minutes of a slow model.
NODE_BUCKETS: Final = tuple(0.01 * 2**n for n in range(16))


class Metric(NamedTuple):
    """One metric.

    Attributes:
        kind: "seconds" is a histogram, "active" goes up and down, "gauge" is set.
        labels: their names; systems have names of their own for some of them.
        unit: in the notation of OpenTelemetry.
        otel, datadog, prometheus: its name; None in a system that does not have it.
    """

    kind: Literal["counter", "seconds", "active", "gauge"]
    text: str
    labels: tuple[str, ...]
    unit: str
    otel: str | None = None
    datadog: str | None = None
    prometheus: str | None = None


def _counter(
    name: str, unit: str, text: str, *labels: str, datadog: str | None = None, prometheus: str | None = None
) -> Metric:
    """Return a counter with the same name in each system, but where a system has another one."""
    return Metric(
        kind="counter",
        text=text,
        labels=("pipeline", *labels),
        unit=unit,
        otel=f"stroma.{name}",
        datadog=datadog or f"stroma.{name}",
        prometheus=prometheus or f"stroma_{name.replace('.', '_')}",
    )


def _gauge(name: str, unit: str, text: str) -> Metric:
    """Return a gauge of the queues that workers of this process serve."""
    suffix = "_seconds" if unit == "s" else ""
    prometheus = f"stroma_{name.replace('.', '_')}{suffix}"
    return Metric("gauge", text, ("pipeline",), unit, otel=f"stroma.{name}", prometheus=prometheus)


#: OpenTelemetry counts runs by their durations.
RUNS: Final = Metric(
    "counter",
    "Runs that ended, by status",
    ("pipeline", "status"),
    "{run}",
    datadog="stroma.runs",
    prometheus="stroma_runs",
)
ACTIVE: Final = Metric(
    "active",
    "Runs that have begun and not ended",
    ("pipeline",),
    "{run}",
    otel="stroma.runs.active",
    prometheus="stroma_runs_in_progress",
)
RUN_SECONDS: Final = Metric(
    "seconds",
    "Wall time of a run",
    ("pipeline", "status"),
    "s",
    otel="gen_ai.invoke_agent.duration",
    datadog="stroma.run.duration",
    prometheus="stroma_run_duration_seconds",
)
RETURNED: Final = _counter(
    "runs.returned", "{run}", "Calls that got the result of a run that they did not run", "status"
)
EXECUTIONS: Final = _counter(
    "node.executions", "{attempt}", "Attempts that ended", "node_id", "outcome", "failure_class", "reason"
)
NODE_SECONDS: Final = Metric(
    "seconds",
    "Wall time of an attempt's function",
    ("pipeline", "node_id"),
    "s",
    otel="stroma.node.duration",
    datadog="stroma.node.duration",
    prometheus="stroma_node_duration_seconds",
)
RETRIES: Final = _counter(
    "node.retries", "{attempt}", "Attempts that follow a failed one", "node_id", "failure_class"
)
RESTORED: Final = _counter(
    "nodes.restored",
    "{node}",
    "Outputs that were restored from the journal",
    "node_id",
    prometheus="stroma_nodes_skipped",
)
_OF_USAGE: Final = ("node_id", "model", "agent")
TOKENS: Final = _counter("tokens", "{token}", "Tokens that nodes reported", *_OF_USAGE, "direction")
CACHED: Final = _counter(
    "cached_tokens", "{token}", "Input tokens that a cache had, or got", *_OF_USAGE, "cache"
)
COST: Final = _counter(
    "cost",
    "USD",
    "What they cost, in US dollars",
    *_OF_USAGE,
    "outcome",
    datadog="stroma.cost_usd",
    prometheus="stroma_cost_usd",
)
WARNINGS: Final = _counter(
    "budget.warnings", "{run}", "Runs that used 80 % of a limit of their budget", "dimension"
)
EXCEEDED: Final = _counter("budget.exceeded", "{run}", "Runs that a budget stopped", "dimension")
WAITS: Final = _counter(
    "node.waits", "{wait}", "Times that an attempt was queued for a limit, a budget or a circuit", "node_id"
)
CIRCUITS: Final = _counter(
    "circuit.changes", "{change}", "Circuits that became open, half open or closed", "circuit", "state"
)
COOLDOWNS: Final = _counter(
    "limit.cooldowns", "{cooldown}", "Times that a refused call has closed a limit", "limit"
)
HOOK_ERRORS: Final = _counter("hook.errors", "{error}", "Exceptions that hooks raised", "hook")
#: In the order of a QueueReading.
QUEUE_GAUGES: Final = (
    _gauge("runs.queued", "{run}", "Runs that were submitted and have not started"),
    _gauge("runs.oldest_due", "s", "For how long the oldest due run is due"),
    _gauge("runs.blocked", "{run}", "Runs that code of their version could not continue"),
    _gauge("runs.oldest_blocked", "s", "For how long the oldest blocked run is blocked"),
)
#: All but the gauges of queues.
METRICS: Final = (
    RUNS,
    ACTIVE,
    RUN_SECONDS,
    RETURNED,
    EXECUTIONS,
    NODE_SECONDS,
    RETRIES,
    RESTORED,
    TOKENS,
    CACHED,
    COST,
    WARNINGS,
    EXCEEDED,
    WAITS,
    CIRCUITS,
    COOLDOWNS,
    HOOK_ERRORS,
)


# ---------------------------------------------------------------------- labels

#: Label of every value above the bound.
OTHER: Final = "other"
_MAX_PLACES: Final = 1000
_MAX_VALUES: Final = 200
_MAX_REASONS: Final = 50
_MAX_LENGTH: Final = 200  # characters
_MAX_MODEL_LENGTH: Final = 100


class _BoundedLabels:
    """Values of one label: the first ``max_count``, cut to ``max_length``; further ones are "other"."""

    def __init__(self, max_count: int = _MAX_VALUES, max_length: int = _MAX_LENGTH) -> None:
        self._known: dict[str, str] = {}
        self._max_count, self._max_length = max_count, max_length

    def __call__(self, value: str | None) -> str:
        """Return the label for a value; "" for None. A value that has had a label keeps it."""
        key = "" if value is None else value[: self._max_length]
        label = self._known.get(key)
        if label is None:
            if len(self._known) >= self._max_count:
                return OTHER
            label = self._known[key] = _encodable(key)[: self._max_length]
        return label


class MetricLabels:
    """Labels of the metrics of one destination: names of pipelines, models, agents, limits and the like."""

    def __init__(self) -> None:
        self.pipeline = _BoundedLabels(_MAX_PLACES)
        self.model = _BoundedLabels(max_length=_MAX_MODEL_LENGTH)
        self.agent = _BoundedLabels()
        self.reason = _BoundedLabels(_MAX_REASONS, _MAX_MODEL_LENGTH)
        self.limit = _BoundedLabels()
        self.circuit = _BoundedLabels()  # Each host has one.
        self.dimension = _BoundedLabels()  # A shared budget has its name in front.
        self._places: dict[tuple[str, str], tuple[str, str]] = {}

    def place(self, node: RunningNode) -> tuple[str, str]:
        """Return the labels for a node and its pipeline: 1,000 pairs, then the node is "other"."""
        key = node.pipeline[:_MAX_LENGTH], node.node_id[:_MAX_LENGTH]
        labels = self._places.get(key)
        if labels is None:
            if len(self._places) >= _MAX_PLACES:
                return self.pipeline(key[0]), OTHER
            labels = self._places[key] = self.pipeline(key[0]), _encodable(key[1])[:_MAX_LENGTH]
        return labels


def _encodable(text: str) -> str:
    """Return a text that UTF-8 can encode: a lone surrogate in a label can cost a whole page of metrics."""
    return text.encode("utf-8", "backslashreplace").decode()


# ---------------------------------------------------------------------- events


class MetricsObserver(Observer):
    """Base of the exporters with metrics: a subclass sends figures, and may show more than metrics."""

    def __init__(self, labels: MetricLabels | None = None) -> None:
        super().__init__()
        self._labels = MetricLabels() if labels is None else labels

    def send(self, metric: Metric, value: float, *labels: str) -> None:
        """Add to a counter, or record seconds, with the values of the metric's labels."""
        raise NotImplementedError

    def send_run_duration(self, pipeline: str, result: ExecutionResult, seconds: float) -> None:
        """Record how long a run took."""
        self.send(RUN_SECONDS, seconds, pipeline, result.status.value)

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        if not is_returned(run):
            run.notes[self, "since"] = perf_counter()
            self.send(ACTIVE, 1, self._labels.pipeline(run.pipeline))

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        since, pipeline = run.notes.pop((self, "since"), None), self._labels.pipeline(run.pipeline)
        if is_returned(run):
            self.send(RETURNED, 1, pipeline, result.status.value)
        elif since is not None:
            self.send(ACTIVE, -1, pipeline)
            self.send(RUNS, 1, pipeline, result.status.value)
            self.send_run_duration(pipeline, result, perf_counter() - since)
            error = limit_that_stopped(run, result)
            if error is not None:
                self.send(EXCEEDED, 1, pipeline, self._labels.dimension(error.dimension))

    def attempt_ended(self, node: RunningNode, ended: AttemptEnd) -> None:
        labels, usage = self._labels, node.usage
        place, reason = labels.place(node), labels.reason(ended.reason)
        self.send(EXECUTIONS, 1, *place, ended.outcome, ended.class_name, reason)
        self.send(NODE_SECONDS, (node.duration_ms or 0.0) / 1000, *place)
        if usage.tokens or usage.cost_usd:
            of_usage = *place, labels.model(usage.model), labels.agent(node.agent)
            self.send(TOKENS, usage.input_tokens, *of_usage, "input")
            self.send(TOKENS, usage.output_tokens, *of_usage, "output")
            self.send(COST, usage.cost_usd, *of_usage, ended.outcome)
            if usage.cached_input_tokens:
                self.send(CACHED, usage.cached_input_tokens, *of_usage, "read")
            if usage.cache_write_tokens:
                self.send(CACHED, usage.cache_write_tokens, *of_usage, "write")

    def retrying(
        self, node: RunningNode, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        self.send(RETRIES, 1, *self._labels.place(node), failure_class.value)

    def skipped(self, node: RunningNode) -> None:
        if not is_returned(node.ctx):
            self.send(RESTORED, 1, *self._labels.place(node))

    def waiting(self, node: RunningNode, reason: str, seconds: float) -> None:
        self.send(WAITS, 1, *self._labels.place(node))

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        labels = self._labels
        self.send(WARNINGS, 1, labels.pipeline(run.pipeline), labels.dimension(dimension))

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        labels = self._labels
        self.send(CIRCUITS, 1, labels.pipeline(run.pipeline), labels.circuit(key), state)

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        labels = self._labels
        self.send(COOLDOWNS, 1, labels.pipeline(run.pipeline), labels.limit(limit))

    def hook_raised(self, run: ReliabilityContext | None, hook: str) -> None:
        if run is not None:
            self.send(HOOK_ERRORS, 1, self._labels.pipeline(run.pipeline), hook)
