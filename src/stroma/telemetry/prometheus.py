"""Prometheus: counters, histograms and gauges in a registry of ``prometheus_client``."""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from stroma._utils.distributions import missing
from stroma.checkpoint.queue import QueueReading
from stroma.telemetry.metrics import (
    EXECUTIONS,
    METRICS,
    NODE_BUCKETS,
    NODE_SECONDS,
    QUEUE_GAUGES,
    RUN_SECONDS,
    RUNS,
    Metric,
    MetricLabels,
    MetricsObserver,
)
from stroma.telemetry.observer import ExporterHooks

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# In seconds.
_RUN_BUCKETS: Final = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
#: Parts of names, by OpenTelemetry's units.
_UNITS: Final = {"s": "seconds", "{token}": "tokens", "USD": "usd"}
_WITH_EXEMPLAR: Final = {metric.prometheus for metric in (RUNS, RUN_SECONDS, EXECUTIONS, NODE_SECONDS)}


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
    collectors = _known.get(target)
    if collectors is None:  # A second one of the same names would be refused.
        collectors = _known[target] = _Collectors(target)
    else:
        collectors.ensure_registered(target)
    return _Prometheus(collectors, target).hooks()


class _Collectors:
    """The metrics of one registry, and their children by label values."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.labels = MetricLabels()
        self._by_name: dict[str, Any] = {}
        #: What adds to a child: looking one up takes microseconds.
        self._children: dict[tuple[str, tuple[str, ...]], Callable[..., None]] = {}
        self._make(registry)

    def ensure_registered(self, registry: CollectorRegistry) -> None:
        """Make the metrics again if they were taken out of their registry, as test suites do."""
        present = getattr(registry, "_collector_to_names", None)
        if present is not None and not all(one in present for one in self._by_name.values()):
            for collector in self._by_name.values():
                if collector in present:
                    registry.unregister(collector)
            self._make(registry)

    def _make(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._children.clear()
        for metric in (*METRICS, *QUEUE_GAUGES):
            name = metric.prometheus
            assert name is not None
            about: Any = {"unit": _UNITS.get(metric.unit, ""), "registry": registry}
            text = f"{metric.text}."
            if metric.kind == "counter":
                self._by_name[name] = Counter(name, text, metric.labels, **about)
            elif metric.kind == "seconds":
                buckets = _RUN_BUCKETS if metric is RUN_SECONDS else NODE_BUCKETS
                self._by_name[name] = Histogram(name, text, metric.labels, buckets=buckets, **about)
            else:
                # Where processes share their metrics: the sum over live processes; of queues the largest, as
                # any live worker has read the same store.
                mode: Any = "livesum" if metric.kind == "active" else "livemax"
                self._by_name[name] = Gauge(name, text, metric.labels, multiprocess_mode=mode, **about)

    def child(self, name: str, labels: tuple[str, ...]) -> Callable[..., None]:
        """Return what adds to a metric with some label values."""
        add = self._children.get((name, labels))
        if add is None:
            child = self._by_name[name].labels(*labels)
            add = child.observe if hasattr(child, "observe") else child.inc
            self._children[name, labels] = add
        return add

    def show(self, name: str, pipeline: str, value: float | None) -> None:
        """Set the gauge of a pipeline; None removes it.

        The client cannot remove it where processes share metrics. There it is 0: the largest one counts.
        """
        gauge = self._by_name[name]
        if value is None and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            with contextlib.suppress(KeyError):  # Of older releases, where there is none.
                gauge.remove(pipeline)
        else:
            gauge.labels(pipeline).set(value or 0)


_known: weakref.WeakKeyDictionary[CollectorRegistry, _Collectors] = weakref.WeakKeyDictionary()


class _Prometheus(MetricsObserver):
    name = "Prometheus"

    def __init__(self, collectors: _Collectors, registry: CollectorRegistry) -> None:
        super().__init__(collectors.labels)
        self._collectors = collectors
        #: Where its metrics are.
        self.registry = registry

    @property
    def destination(self) -> object:
        return self._collectors

    def send(self, metric: Metric, value: float, *labels: str) -> None:
        name = metric.prometheus
        assert name is not None
        add = self._collectors.child(name, labels)
        if name in _WITH_EXEMPLAR:
            add(value, _exemplar())
        else:
            add(value)

    def queue_read(self, pipeline: str, figures: QueueReading | None) -> None:
        label = self._labels.pipeline(pipeline)
        for at, metric in enumerate(QUEUE_GAUGES):
            self._collectors.show(str(metric.prometheus), label, None if figures is None else figures[at])


def _exemplar() -> dict[str, str] | None:
    """Return the ids of OpenTelemetry's current span if that is sampled, else None."""
    # Not imported here: without an import elsewhere there are no spans.
    current: Any = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if current is None:
        return None
    context = current().get_span_context()
    if not (context.is_valid and context.trace_flags.sampled):
        return None
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
