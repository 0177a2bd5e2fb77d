"""Spans of model calls that nobody instruments: one for each attempt that used tokens, failed ones too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from stroma.engine.execution import NodeExecution
from stroma.telemetry.conventions import Vocabulary, about_run
from stroma.trace.events import AttemptUsage

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

__all__ = ["INSTRUMENTED", "InferenceMode", "InferenceSpans"]

InferenceMode = Literal["auto", "always", "never"]

#: Key in the notes of a node: the last attempt of it in which a span of somebody else reported tokens.
INSTRUMENTED: Final = "attempt with a span that reports usage"
#: Names of providers in the conventions, where they are not those of the price list.
_PROVIDERS: Final = {
    "aws": "aws.bedrock",
    "azure": "azure.ai.openai",
    "google": "gcp.gemini",
    "mistral": "mistral_ai",
    "x-ai": "x_ai",
}


#: Key of a node's note: a span of another library, for the same call of a model, is around it.
AROUND_CALL: Final = "stroma.telemetry call around"
_KIND: Final = "openinference.span.kind"
_CALLS: Final = ("chat", "generate_content", "text_completion")


class InferenceSpans:
    """Creates the spans from which backends read the bill: model, tokens and cost of each attempt.

    Attributes:
        mode: "auto" creates them for attempts in which no span of another library reports tokens.
        can_see: spans of other libraries are seen; without that, "auto" creates none.
    """

    def __init__(self, mode: InferenceMode, vocabulary: Vocabulary) -> None:
        if mode not in ("auto", "always", "never"):
            raise ValueError(f'inference must be "auto", "always" or "never", got {mode!r}')
        self.mode = mode
        self.can_see = False
        self._vocabulary = vocabulary
        self._providers: dict[str, str | None] = {}

    def are_due(self, node: NodeExecution) -> bool:
        """Return True if the present attempt of a node gets a span."""
        if not node.usage.tokens or self.mode == "never":
            return False
        if self.mode == "always":
            return True
        if node.notes.get(AROUND_CALL) and node.outcome == "success":
            return False  # It has the tokens of the attempt that succeeded, and of no other one.
        return self.can_see and node.notes.get(INSTRUMENTED) != node.attempt

    def look_around(self, node: NodeExecution, current: Any) -> None:
        """Note if the current span, in which a step of a guard opens, is one that another library has for the same call."""
        attributes = getattr(current, "attributes", None) or {}
        if attributes.get("gen_ai.operation.name") in _CALLS or attributes.get(_KIND) == "LLM":
            node.notes[AROUND_CALL] = True

    def start(self, tracer: Tracer, node: NodeExecution, around: Context) -> tuple[Span, int]:
        """Start the span of an attempt that has ended; return it with the nanosecond at which it ends."""
        usage = node.usage
        started = node.started_ns or 0
        span = tracer.start_span(
            "chat" if usage.model is None else f"chat {usage.model}",
            context=around,
            start_time=started or None,
            attributes=self._attributes(node, usage),
        )
        return span, started + int((node.duration_ms or 0.0) * 1e6)

    def _attributes(self, node: NodeExecution, usage: AttemptUsage) -> dict[str, Any]:
        model, provider = usage.model, None if usage.model is None else self._provider_of(usage.model)
        cached, written = usage.cached_input_tokens or None, usage.cache_write_tokens or None
        about: dict[str, Any] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": cached,
            "gen_ai.usage.cache_creation.input_tokens": written,
            "gen_ai.usage.cost": usage.cost_usd,
            "operation.cost": usage.cost_usd,
            "stroma.node.id": node.node_id,
            "stroma.node.attempt": node.attempt,
            **about_run(node.ctx),
        }
        if self._vocabulary == "openinference":
            about |= {
                "openinference.span.kind": "LLM",
                "llm.model_name": model,
                "llm.provider": provider,
                "llm.token_count.prompt": usage.input_tokens,
                "llm.token_count.completion": usage.output_tokens,
                "llm.token_count.total": usage.tokens,
                "llm.token_count.prompt_details.cache_read": cached,
                "llm.token_count.prompt_details.cache_write": written,
                "llm.cost.total": usage.cost_usd,
            }
        return {name: value for name, value in about.items() if value is not None}

    def _provider_of(self, model: str) -> str | None:
        if model not in self._providers:
            if len(self._providers) >= 200:
                return None
            from stroma.cost.prices import prices_of

            prices = prices_of(model)
            listed = None if prices is None or prices.listed_as is None else prices.listed_as[0]
            self._providers[model] = None if listed is None else _PROVIDERS.get(listed, listed)
        return self._providers[model]
