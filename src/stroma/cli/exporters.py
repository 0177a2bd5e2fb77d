"""Exporters of `stroma run`: their options, and the environment variables that each system reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import urlsplit

import click

from stroma._utils.text import clean, format_host
from stroma.cli.errors import Code, Problem, cannot_listen
from stroma.cli.output import err
from stroma.cli.stores import add_options
from stroma.hooks.sets import NodeHooks

if TYPE_CHECKING:
    from stroma.telemetry.observer import ExporterHooks, Observer

FLUSH_SECONDS: Final = 5.0
#: Environment variables that enable an exporter without an option.
_VARIABLES: Final = {
    "otel": ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
    "sentry": ("SENTRY_DSN",),
    "datadog": ("DD_TRACE_AGENT_URL", "DD_AGENT_HOST"),
}
#: Names of the systems, as in ``Observer.name``.
_SYSTEMS: Final = {
    "otel": "OpenTelemetry",
    "prometheus": "Prometheus",
    "sentry": "Sentry",
    "datadog": "Datadog",
}
_METRICS_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")


def _exporter(hooks: NodeHooks) -> Observer | None:
    """Return the exporter behind a set of hooks; None for any other set."""
    exporter: Observer | None = getattr(hooks, "exporter", None)
    return exporter


def _endpoint(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise click.BadParameter(
                f"{value!r} is not an OTLP/HTTP endpoint; pass a URL such as http://localhost:4318"
            )
    return value


class HostPort(click.ParamType[str]):
    """HOST:PORT, as text."""

    name = "address"

    def __init__(self, example: str) -> None:
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        host, _, port = str(value).rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            self.fail(f"{value!r} is not an address; pass HOST:PORT, such as {self._example}", param, ctx)
        return str(value)


class ListenAddress(click.ParamType[tuple[str, int]]):
    """[HOST:]PORT, as (host, port)."""

    name = "address"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        host, _, port = str(value).rpartition(":")
        if not (port.isascii() and port.isdecimal() and int(port) < 65536):
            self.fail(f"{value!r} is not an address; pass PORT or HOST:PORT, such as 8080", param, ctx)
        return host.strip("[]") or "127.0.0.1", int(port)


#: Adds the options for telemetry to a command.
exporter_options = add_options(
    click.option(
        "--datadog",
        type=HostPort("localhost:8126"),
        metavar="HOST:PORT",
        help="Datadog agent for spans; metrics go to its port 8125.",
    ),
    click.option("--sentry", metavar="DSN", help="Sentry DSN that captures the final failure."),
    click.option(
        "--prometheus",
        type=ListenAddress(),
        metavar="[HOST:]PORT",
        help="Address that serves metrics, by default on 127.0.0.1.",
    ),
    click.option(
        "--otel", callback=_endpoint, metavar="ENDPOINT", help="OTLP/HTTP endpoint for spans and metrics."
    ),
)


@dataclass
class Exporters:
    """Exporters that a command enables."""

    otel: str | None = None
    prometheus: tuple[str, int] | None = None
    sentry: str | None = None
    datadog: str | None = None
    #: Called by :meth:`close`, after everything was flushed.
    _closing: list[Callable[[], object]] = field(default_factory=list)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Exporters:
        """Remove the telemetry options from ``options`` and return them; call it before a target loads."""
        exporters = cls(**{name: options.pop(name, None) for name in _SYSTEMS})
        if exporters.datadog is not None:
            # The tracer reads its address when it is imported, perhaps by the pipeline's file.
            os.environ["DD_TRACE_AGENT_URL"] = f"http://{exporters.datadog}"
        return exporters

    def hooks(
        self, own: Sequence[NodeHooks] = (), *, quiet: bool, environ: Mapping[str, str] = os.environ
    ) -> list[NodeHooks]:
        """Return the hooks of each enabled exporter. Raises Problem if one cannot be made.

        ``own``: hooks of the pipelines. A variable adds no exporter if a connected one exists among them. An
        exporter added by an option replaces theirs (see :meth:`merge`) and takes over its settings.
        """
        sets: list[NodeHooks] = []
        for name, make in (
            ("otel", self._otel),
            ("prometheus", self._prometheus),
            ("sentry", self._sentry),
            ("datadog", self._datadog),
        ):
            setting = getattr(self, name)
            variable = next((v for v in _VARIABLES.get(name, ()) if environ.get(v)), None)
            if name == "otel" and environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
                variable = None
            if setting is None and variable is None:
                continue
            own_exporters = [
                one for one in map(_exporter, own) if one is not None and one.name == _SYSTEMS[name]
            ]
            if setting is None and any(exporter.is_connected() for exporter in own_exporters):
                continue
            try:
                added_sets = make(quiet, own_exporters)
                if own_exporters:
                    added_sets.exporter.take_settings_of(own_exporters[0])
                sets.append(added_sets)
            except ImportError as error:
                if setting is None:  # The variable may be meant for other programs.
                    err.line(("note: ", "yellow"), f"{variable} is set, but {clean(str(error), 300)}")
                    continue
                raise Problem(f"--{name}: {clean(str(error), 300)}", code=Code.ENVIRONMENT) from error
            except Problem:
                raise
            except Exception as error:
                where = f"--{name}" if setting is not None else str(variable)
                raise Problem(
                    f"{where}: {clean(str(error), 300)}", "correct the value, or remove it"
                ) from error
        return sets

    @staticmethod
    def merge(added_sets: Sequence[NodeHooks], own: Sequence[NodeHooks]) -> list[NodeHooks]:
        """Merge hooks of the command with the pipeline's; the command's exporter for a system wins."""
        systems = [exporter.name for one in added_sets if (exporter := _exporter(one)) is not None]
        others = [one for one in own if getattr(_exporter(one), "name", None) not in systems]
        return [*added_sets, *others]

    def close(self) -> None:
        """Close exporters in daemon threads; their data was flushed before."""
        for close in self._closing:
            threading.Thread(target=close, daemon=True).start()

    def _otel(self, quiet: bool, own_exporters: Sequence[Observer]) -> ExporterHooks:
        from stroma.telemetry import otel_hooks

        try:
            from opentelemetry import metrics as measures
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ImportError(
                "the SDK and its OTLP exporter are required; install them with: pip install "
                "'stroma-runner[otel]'"
            ) from error
        # Without an option the exporters find their endpoints in the environment by themselves.
        base = None if self.otel is None else self.otel.rstrip("/")
        spans = OTLPSpanExporter(endpoint=base and f"{base}/v1/traces")
        resource = Resource.create()  # It reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES.
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "stroma"}))
        tracer = TracerProvider(resource=resource, shutdown_on_exit=False)
        tracer.add_span_processor(BatchSpanProcessor(spans))
        # An endpoint for traces alone does not imply one for metrics: many systems take only traces.
        metrics = base is not None or any(os.environ.get(name) for name in _METRICS_ENDPOINTS)
        readers = []
        if metrics and os.environ.get("OTEL_METRICS_EXPORTER", "").lower() != "none":
            exporter = OTLPMetricExporter(endpoint=base and f"{base}/v1/metrics")
            readers.append(PeriodicExportingMetricReader(exporter))
        meter = MeterProvider(readers, resource=resource, shutdown_on_exit=False)
        self._closing += [tracer.shutdown, meter.shutdown]
        # Spans that nodes open themselves go to the same provider, unless the pipeline has set another.
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            trace.set_tracer_provider(tracer)
            if type(measures.get_meter_provider()).__name__ == "_ProxyMeterProvider":
                measures.set_meter_provider(meter)
        return otel_hooks(tracer=tracer, meter=meter)

    def _prometheus(self, quiet: bool, own_exporters: Sequence[Observer]) -> ExporterHooks:
        from stroma.telemetry import prometheus_hooks

        hooks = prometheus_hooks(registry=cast("Any", own_exporters[0]).registry if own_exporters else None)
        from prometheus_client import REGISTRY, start_http_server

        assert self.prometheus is not None
        host, port = self.prometheus
        try:
            registry = cast("Any", own_exporters[0]).registry if own_exporters else REGISTRY
            server, _ = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            fix = "pass another port, or 0 for any free port"
            raise cannot_listen("--prometheus: ", self.prometheus, error, fix) from error
        self._closing.append(server.shutdown)
        if not quiet:
            err.line(f"metrics are at http://{format_host(host)}:{server.server_port}/metrics while it runs")
        return hooks

    def _sentry(self, quiet: bool, own_exporters: Sequence[Observer]) -> ExporterHooks:
        from stroma.telemetry import sentry_hooks

        try:
            import sentry_sdk
        except ImportError:
            return sentry_hooks()  # Raises, with the command that installs it.
        rate = os.environ.get("SENTRY_TRACES_SAMPLE_RATE")
        client = sentry_sdk.Client(
            dsn=self.sentry,
            traces_sample_rate=None if rate is None else float(rate),
            default_integrations=False,
        )
        return sentry_hooks(client=client)

    def _datadog(self, quiet: bool, own_exporters: Sequence[Observer]) -> ExporterHooks:
        from stroma.telemetry import datadog_hooks

        statsd = os.environ.get("DD_AGENT_HOST", "localhost")
        if self.datadog is not None:
            statsd = self.datadog.rpartition(":")[0]
        os.environ.setdefault("DD_INSTRUMENTATION_TELEMETRY_ENABLED", "false")
        port = os.environ.get("DD_DOGSTATSD_PORT", "8125")
        return datadog_hooks(service=os.environ.get("DD_SERVICE", "stroma"), statsd=f"{statsd}:{port}")
