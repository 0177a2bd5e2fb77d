"""Which run, node, conversation and user the spans of others belong to. Needs ``opentelemetry-sdk``."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any, Final
from weakref import WeakSet

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.trace import get_current_span

from stroma.engine.execution import CURRENT, RunningNode, current_run
from stroma.telemetry.conventions import NODE_ID, OF_RUN, SCOPE, about_run
from stroma.telemetry.inference import note_call, note_end

_COPIED: Final = (*OF_RUN, NODE_ID)
#: Prefixes of attributes with the tokens of a call: OpenTelemetry's and OpenInference's.
_USAGE: Final = ("gen_ai.usage.", "llm.token_count.")
#: Spans that have not ended are followed up to this number; a span that nobody ends is forgotten in time.
_MOST_OPEN: Final = 10_000
#: The providers that have a processor of ours.
_watched: WeakSet[TracerProvider] = WeakSet()
_lock = Lock()


class AttributionProcessor(SpanProcessor):
    """A span processor that stamps every span below ours with its pipeline, run, node, conversation and user.

    It stamps spans of whoever makes them: HTTP clients, LLM instrumentations, frameworks. A span belongs
    where its parent belongs, but to the node of its task where that is inside of it, since frameworks choose
    parents of their own; one without a parent of ours, to the node or run of its task. ``otel_hooks`` adds
    one to the SDK's provider that it sends to; add it yourself to other providers::

        provider.add_span_processor(AttributionProcessor())
    """

    def __init__(self) -> None:
        #: The node and attempt of spans that have not ended; no attempt for a span of ours, which may last
        #: for several.
        self._open: dict[tuple[int, int], tuple[RunningNode, int | None]] = {}

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Stamp a span."""
        parent = _put_inside(span, get_current_span(parent_context))
        of_parent: Any = getattr(parent, "attributes", None) or {}
        node = CURRENT.get()
        is_ours = span.instrumentation_scope is not None and span.instrumentation_scope.name == SCOPE
        if not is_ours:
            if "stroma.run.id" in of_parent:
                about = {name: of_parent[name] for name in _COPIED if name in of_parent}
                if node is not None and _is_inside(node, about):
                    about[NODE_ID] = node.node_id
                span.set_attributes(about)
            else:
                run = current_run()
                if run is None:
                    return
                span.set_attributes(about_run(run) | ({} if node is None else {NODE_ID: node.node_id}))
        above = parent.get_span_context()
        place = self._open.get((above.trace_id, above.span_id))
        if node is not None and is_ours:
            place = (node, None)
        elif node is not None and (place is None or (node is not place[0] and place[0] in node.with_outer())):
            place = (node, node.attempt)
        elif place is not None and place[1] is None:
            place = (place[0], place[0].attempt)
        if place is not None:
            if len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open)), None)
            context = span.get_span_context()
            key = context.trace_id, context.span_id
            self._open[key] = place
            if not is_ours and place[1] is not None:
                note_call(place[0], place[1], key, span.attributes or {})

    def on_end(self, span: ReadableSpan) -> None:
        """Note it if the span of somebody else reports the tokens of an attempt."""
        context = span.context
        place = None if context is None else self._open.pop((context.trace_id, context.span_id), None)
        if place is None or (
            span.instrumentation_scope is not None and span.instrumentation_scope.name == SCOPE
        ):
            return
        has_usage = any(name.startswith(_USAGE) for name in span.attributes or {})
        if place[1] is not None and context is not None:
            note_end(place[0], place[1], (context.trace_id, context.span_id), has_usage=has_usage)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Return True: it holds no spans. Older SDKs flush no processor after one that returns None."""
        return True


def _put_inside(span: Span, parent: Any) -> Any:
    """Return the parent of a span that begins: of OpenInference's, our current span if that is inside it.

    Their instrumentations of LangChain and the OpenAI Agents SDK know their own spans alone, and would put
    those of a step beside it.
    """
    scope, current = span.instrumentation_scope, get_current_span()
    if (
        scope is None
        or not scope.name.startswith("openinference.")
        or not isinstance(current, Span)
        or current.instrumentation_scope is None
        or current.instrumentation_scope.name != SCOPE
        or current.get_span_context().trace_id != parent.get_span_context().trace_id
        or (current.start_time or 0) <= (getattr(parent, "start_time", None) or 0)
    ):
        return parent
    span._parent = current.get_span_context()
    return current


def _is_inside(node: RunningNode, about: Mapping[str, Any]) -> bool:
    """Return True if a node is the one of a span of the same run or inside it, or if the span has none."""
    if about["stroma.run.id"] != node.run_id:
        return False
    node_id = about.get(NODE_ID)
    return node_id is None or any(each.node_id == node_id for each in node.with_outer())


def watch(provider: TracerProvider) -> None:
    """Add a processor to a provider, once."""
    with _lock:
        if provider not in _watched:
            provider.add_span_processor(AttributionProcessor())
            _watched.add(provider)
