"""Datadog: spans through ddtrace, metrics through DogStatsD."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from stroma._utils.distributions import missing
from stroma.telemetry.content import DENY_KEYS, Content, ContentMode
from stroma.telemetry.observer import ExporterHooks

if TYPE_CHECKING:
    from datadog.dogstatsd.base import DogStatsd
    from ddtrace.trace import Tracer

__all__ = ["datadog_hooks"]

#: Packets of metrics that wait to be sent, 1.4 kB each.
_MOST_PACKETS: Final = 1000


def datadog_hooks(
    *,
    tracer: Tracer | None = None,
    statsd: DogStatsd | str | None = None,
    service: str | None = None,
    content: ContentMode = "none",
    deny_keys: Collection[str] = DENY_KEYS,
    max_bytes: int = 4096,
) -> ExporterHooks:
    """Create hooks that emit spans ``stroma.run`` and ``stroma.node`` by pipeline and node, and metrics.

    A node's span is active while its function runs, so that what integrations trace in it is under it. Only a
    final failure makes a span an error.

    Args:
        tracer: ddtrace's own if none is given; it goes by the ``DD_*`` variables.
        statsd: a client, or "host:port" of an agent, for metrics under ``stroma.``; None sends none.
        service: of the spans; the tracer's if none is given.
        content: see :class:`stroma.telemetry.content.Content`; with "redacted" states are tags.
        deny_keys: names of fields whose values are never sent.
        max_bytes: of one state or message.

    Raises ImportError with the line that installs the extra, ValueError for an address that is none.
    """
    content_rules = Content.make(content, deny_keys, max_bytes)
    if tracer is None:
        try:
            from ddtrace.trace import tracer
        except ImportError as error:
            raise missing("ddtrace", "datadog_hooks", "datadog") from error
        assert tracer is not None
    from stroma.telemetry.datadog.exporter import Datadog

    own = isinstance(statsd, str)
    return Datadog(
        tracer, _client(statsd) if isinstance(statsd, str) else statsd, service, content_rules, own_client=own
    ).hooks()


def _client(address: str) -> DogStatsd:
    try:
        from datadog.dogstatsd.base import DogStatsd
    except ImportError as error:
        raise missing("datadog", "datadog_hooks(statsd=...)", "datadog") from error
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f'statsd must be "host:port", such as "localhost:8125", got {address!r}')
    # Buffered, and sent by a thread of its own: each packet looks its host up until that has an address.
    return DogStatsd(
        host=host.strip("[]"),
        port=int(port),
        disable_telemetry=True,
        disable_buffering=False,
        disable_background_sender=False,
        sender_queue_size=_MOST_PACKETS,
    )
