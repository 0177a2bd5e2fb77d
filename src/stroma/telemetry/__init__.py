"""Exporters, one per system; each imports its SDK when its factory is called.

They compose with ``|`` among themselves and with hooks of your own::

    runner = StromaRunner.quick(hooks=otel_hooks() | prometheus_hooks())

None of them sets a global, sends inputs or outputs unless it is configured to (``content="redacted"``), or
can change the result of a run. ``await runner.flush()`` sends what is queued.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.telemetry.attribution import AttributionProcessor as AttributionProcessor
    from stroma.telemetry.content import DENY_KEYS as DENY_KEYS
    from stroma.telemetry.datadog import datadog_hooks as datadog_hooks
    from stroma.telemetry.logs import log_hooks as log_hooks
    from stroma.telemetry.observer import ExporterHooks as ExporterHooks
    from stroma.telemetry.opentelemetry import otel_hooks as otel_hooks
    from stroma.telemetry.prometheus import prometheus_hooks as prometheus_hooks
    from stroma.telemetry.sentry import sentry_hooks as sentry_hooks

_HOMES = {
    "attribution": ("AttributionProcessor",),
    "content": ("DENY_KEYS",),
    "datadog": ("datadog_hooks",),
    "logs": ("log_hooks",),
    "observer": ("ExporterHooks",),
    "opentelemetry": ("otel_hooks",),
    "prometheus": ("prometheus_hooks",),
    "sentry": ("sentry_hooks",),
}


__getattr__, __dir__ = lazy(__name__, _HOMES)
