"""Spans of model calls that nobody instruments: one for each attempt that used tokens, failed ones too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from stroma.engine.execution import RunningNode
from stroma.telemetry.conventions import NODE_ID, Vocabulary, about_run
from stroma.trace.events import AttemptUsage

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

InferenceMode = Literal["auto", "always", "never"]

#: Key in the notes of a node: the id of the span of a model call of somebody else around it, which reports
#: what its answer used; and in the notes of a run, the ids of those whose answer has come.
_ENCLOSED: Final = "inside the span of a model call"
_ANSWERED: Final = "spans of model calls that have an answer"
#: Operations of the conventions that are model calls.
_CALLS: Final = frozenset({"chat", "generate_content", "text_completion"})
#: Keys in the notes of a node: the attempts in which a span of somebody else reported tokens; the spans of
#: model calls of somebody else that have not ended, with their attempts; and by attempt what makes our span
#: if none of them reports tokens.
_INSTRUMENTED: Final = "attempts with a span that reports usage"
_OPEN: Final = "open spans of model calls"
_DEFERRED: Final = "deferred span of a model call"
#: Names of providers in the conventions, where they are not those of the price list.
_PROVIDERS: Final = {
    "aws": "aws.bedrock",
    "azure": "azure.ai.openai",
    "google": "gcp.gemini",
    "mistral": "mistral_ai",
    "x-ai": "x_ai",
}


def _is_call(about: Any) -> bool:
    """Return True for the attributes of the span of a model call that has begun."""
    if about.get("gen_ai.operation.name") in _CALLS:
        return True
    kind = about.get("openinference.span.kind")
    # Some spans get their kind when they end, and what the model is asked when they begin.
    return kind == "LLM" if kind is not None else any(name.startswith("llm.") for name in about)


def note_call(node: RunningNode, attempt: int, key: object, about: Any) -> None:
    """Note the span of somebody else that begins in an attempt, if it is one of a model call."""
    if _is_call(about):
        node.notes.setdefault(_OPEN, {})[key] = attempt


def note_end(node: RunningNode, attempt: int, key: object, *, has_usage: bool) -> None:
    """Note the end of another's span. If the last one of an attempt has no usage either, ours is made."""
    calls = node.notes.get(_OPEN, {})
    calls.pop(key, None)
    if has_usage:
        node.notes.setdefault(_INSTRUMENTED, set()).add(attempt)
        node.notes.pop((_DEFERRED, attempt), None)
    elif attempt not in calls.values():
        make = node.notes.pop((_DEFERRED, attempt), None)
        if make is not None:
            make()


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

    def note_surroundings(self, node: RunningNode, around: Span) -> None:
        """Note if a node begins inside the span of a model call, as where a framework instruments its models.

        That span then belongs to the node, unless it is inside of another one.
        """
        about: Any = getattr(around, "attributes", None) or {}
        if not _is_call(about):
            return
        node.notes[_ENCLOSED] = around.get_span_context().span_id
        if NODE_ID not in about and about.get("stroma.run.id") == node.run_id:
            around.set_attribute(NODE_ID, node.node_id)

    def are_due(self, node: RunningNode, *, is_answer: bool) -> bool:
        """Return True if the present attempt of a node gets a span. ``is_answer``: its caller gets it."""
        if not node.usage.tokens or self.mode == "never":
            return False
        if self.mode == "always":
            return True
        enclosing = node.notes.get(_ENCLOSED)
        if is_answer and enclosing is not None:
            # One answer for each: some frameworks call a model again and again inside of one such span.
            answered = node.ctx.notes.setdefault(_ANSWERED, set())
            if enclosing not in answered:
                answered.add(enclosing)
                return False
        return self.can_see and node.attempt not in node.notes.get(_INSTRUMENTED, ())

    def emit(self, tracer: Tracer, node: RunningNode, around: Context, more: dict[str, Any]) -> None:
        """Make the span of an attempt that has ended, with ``more`` attributes.

        While the span of a model call in it is open, as that of a stream which the node hands on, that is put
        off.
        """
        usage, started = node.usage, node.started_ns or 0
        name = "chat" if usage.model is None else f"chat {usage.model}"
        attributes = self._attributes(node, usage) | more
        ended = started + int((node.duration_ms or 0.0) * 1e6)

        def make() -> None:
            # No error: the call was answered, or another attempt may follow.
            tracer.start_span(name, context=around, start_time=started or None, attributes=attributes).end(
                ended
            )

        if self.mode == "auto" and node.attempt in node.notes.get(_OPEN, {}).values():
            node.notes[_DEFERRED, node.attempt] = make
        else:
            make()

    def _attributes(self, node: RunningNode, usage: AttemptUsage) -> dict[str, Any]:
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
            "gen_ai.usage.cache_write.input_tokens": written,
            "gen_ai.agent.name": node.agent,
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
