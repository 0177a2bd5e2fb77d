"""OpenTelemetry: a span for each run and node, and metrics. Needs ``opentelemetry-api`` alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from stroma._utils.distributions import missing
from stroma.telemetry.content import DENY_KEYS, Content, ContentMode
from stroma.telemetry.conventions import Vocabulary
from stroma.telemetry.inference import InferenceMode, InferenceSpans
from stroma.telemetry.observer import ExporterHooks

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.trace import Tracer, TracerProvider

__all__ = ["otel_hooks"]


def otel_hooks(
    *,
    tracer: Tracer | TracerProvider | None = None,
    meter: Meter | MeterProvider | None = None,
    attempts: Literal["events", "spans"] = "events",
    content: ContentMode = "none",
    deny_keys: Collection[str] = DENY_KEYS,
    max_bytes: int = 8192,
    vocabulary: Vocabulary = "openinference",
    inference: InferenceMode = "auto",
    baggage: bool = False,
) -> ExporterHooks:
    """Create hooks that emit spans and metrics.

    ``invoke_workflow {pipeline}`` is the span of a run, a child of the span that is current where the run is
    started (or of ``run(traceparent=)``); ``stroma.node {node_id}`` is that of a node with all its attempts,
    under the run or the group around it. It is current while the node's function runs, in its threads and
    tasks too. A resumed run links to the span of the first one. Only a failure that is final makes a span an
    error: an attempt that is tried again, a cancelled and a waiting node do not. On other machines only the
    end of the run tells what was final.

    Args:
        tracer: what to make spans with, or the provider to take it from, which flush() needs; else the global
            provider.
        meter: the same for metrics.
        attempts: "events" notes attempts on the node's span, "spans" gives each a span of its own under it.
        content: see :class:`stroma.telemetry.content.Content`; with "redacted" states are attributes.
        deny_keys: names of fields whose values are never sent.
        max_bytes: of one state or message.
        vocabulary: "openinference" also gives spans the kinds that Phoenix, Langfuse and others show, and
            content under the names that these read; "none" leaves both out.
        inference: a span with model, tokens and cost for each attempt that used tokens: "auto" makes it where
            no span inside the attempt reports tokens itself, as those of an instrumented client do; that is
            seen with a provider of the SDK, to which an AttributionProcessor is added. Else, and for "never",
            there is none.
        baggage: pass the ids of run, session and user on to the services that nodes call.

    Raises ImportError with the line that installs the extra, ValueError for an unknown choice.
    """
    try:
        import opentelemetry.trace  # noqa: F401
    except ImportError as error:
        raise missing("opentelemetry-api", "otel_hooks", "otel") from error
    from stroma.telemetry.opentelemetry.exporter import OpenTelemetry

    if attempts not in ("events", "spans"):
        raise ValueError(f'attempts must be "events" or "spans", got {attempts!r}')
    if vocabulary not in ("openinference", "none"):
        raise ValueError(f'vocabulary must be "openinference" or "none", got {vocabulary!r}')
    return OpenTelemetry(
        tracer,
        meter,
        own_spans=attempts == "spans",
        content=Content.make(content, deny_keys, max_bytes),
        vocabulary=vocabulary,
        inference=InferenceSpans(inference, vocabulary),
        baggage=baggage,
    ).hooks()
