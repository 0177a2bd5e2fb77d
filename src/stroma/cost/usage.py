"""The usage of model calls: tokens by kind, read from a provider's response by its shape. Imports no SDK."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, cast

from stroma._utils.access import safe_get

#: Tokens of one report. Beyond it neither floats nor the integers of a store can count the costs.
MOST_TOKENS: Final = 10**9
#: US dollars of one report. Stores keep sums of pico-dollars in 64 bits.
MOST_USD: Final = 10**6
#: Entry of ``unpriced_models`` for tokens that were reported without a model.
NO_MODEL: Final = "(no model)"


class UsageError(ValueError):
    """A node reported usage that cannot be counted: negative, not finite, not a number, or without a price.

    Where: ``result.failure`` of a FAILED run; out of ``CostTracker.record``, ``report_usage`` and
    ``usage_from``.
    Cause: the numbers or the response that a node returned beside its output; or tokens without a model, or
    of a model without a known price, under a cost limit or ``unknown_model="error"``.
    Fix: report whole numbers of tokens, zero or more, and the model with them; add the model to
    ``KNOWN_MODELS``. The output is stored.
    """

    #: Whether it is a provider's response all the same, which only leaves its usage out.
    silent = False


def shown(value: object) -> str:
    """Return a value as text for a message: at most one line, whatever its repr returns."""
    try:
        text = repr(value)
    except Exception:  # Among others an integer with more digits than Python prints.
        return f"a {_kind(value)}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _kind(value: object) -> str:
    try:
        return type(value).__name__
    except Exception:  # A metaclass may refuse.
        return "object"


def check_usage(node_id: str, *counts: object) -> None:
    """Raise UsageError unless every count is a whole number of tokens, from zero to MOST_TOKENS."""
    for count in counts:
        if type(count) is int and 0 <= count <= MOST_TOKENS:
            continue  # What almost all are.
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST_TOKENS:
            raise UsageError(
                f"node {node_id!r} reported {shown(count)} tokens; report whole numbers of tokens, "
                f"0 to {MOST_TOKENS:,}, or return the output alone"
            )


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that one call of a model used.

    Attributes:
        input_tokens: all input tokens, including those read from or written to a cache.
        output_tokens: all output tokens, including reasoning.
        cached_input_tokens: the part of the input that was read from the provider's cache.
        cache_write_tokens: the part of the input that was written to it.
        model: as the provider names it; None if the response does not say.
        tier: service tier with separate prices: "batch", "flex", "priority" ...
        cache_write_1h_tokens: the part of ``cache_write_tokens`` that is kept for an hour, which costs more.
        cost_usd: cost of the call in US dollars, if the provider reports it; None: computed from the model's
            prices.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    model: str | None = None
    tier: str | None = None
    cache_write_1h_tokens: int = 0
    cost_usd: float | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST_TOKENS:
                raise UsageError(
                    f"{name} must be a whole number of tokens from 0 to {MOST_TOKENS:,}, got {shown(count)}"
                )
        if self.cached_input_tokens + self.cache_write_tokens > self.input_tokens:
            raise UsageError(
                f"{self.cached_input_tokens} tokens from a cache and {self.cache_write_tokens} to "
                "it are more than "
                f"input_tokens={self.input_tokens}; report the whole input there, which includes them"
            )
        if self.cache_write_1h_tokens > self.cache_write_tokens:
            raise UsageError(
                f"cache_write_1h_tokens={self.cache_write_1h_tokens} is more than "
                f"cache_write_tokens={self.cache_write_tokens}; it is a part of them"
            )
        cost = self.cost_usd
        if cost is not None and (
            isinstance(cost, bool) or not isinstance(cost, (int, float)) or not 0 <= cost <= MOST_USD
        ):
            raise UsageError(f"cost_usd must be a number of dollars, 0 to {MOST_USD:,}, got {shown(cost)}")
        if any(value is not None and not isinstance(value, str) for value in (self.model, self.tier)):
            raise UsageError(
                f"model and tier of a usage must be strings or None, got {shown(self.model)} and "
                f"{shown(self.tier)}"
            )

    @property
    def is_plain(self) -> bool:
        """Return True if the price depends on input and output tokens alone."""
        own_price = self.tier is not None or self.cost_usd is not None
        return not own_price and not self.cached_input_tokens and not self.cache_write_tokens


_COUNTS: Final = (
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "cache_write_1h_tokens",
)

# ---------------------------------------------------------------------- reading a response


def usage_from(response: object, *, model: str | None = None, tier: str | None = None) -> Usage:
    """Return the usage that a provider's response reports.

    The response of OpenAI (chat, responses, embeddings), Anthropic, Google, Mistral, Cohere, AWS (Converse),
    LangChain, Pydantic AI or of anything with the same fields, as an object of the SDK or as plain data. Of a
    stream: the last chunk or event, or of Anthropic's raw streams a list of all events.

    Args:
        response: the response, or a Usage.
        model: name of the model; takes precedence over that in the response.
        tier: service tier; takes precedence over that in the response.

    Raises UsageError where there is no usage, or none that can be counted.
    """
    usage = _read(response)
    if model is None and tier is None:
        return usage
    return replace(
        usage, model=usage.model if model is None else model, tier=usage.tier if tier is None else tier
    )


def _read(response: object) -> Usage:
    # By type: isinstance asks an object for its __class__, which may raise.
    kind = type(response)
    if issubclass(kind, Usage):
        return cast("Usage", response)
    if issubclass(kind, _NO_RESPONSES):
        raise UsageError(f"{shown(response)} is not a response of a provider; pass the response as it came")
    if issubclass(kind, (list, tuple)):
        return _read_events(cast("Sequence[Any]", response))
    if safe_get(response, "type") == "message_start":
        raise UsageError(
            "message_start has the input tokens but not the output tokens; pass the final message, "
            "or a list of all events"
        )
    for level in _levels(response):
        for name in ("usage", "usage_metadata", "usageMetadata", "meta"):
            usage = _read_figures(safe_get(level, name), level)
            if usage is not None:
                return usage
    usage = _read_figures(response, None)  # The usage itself.
    if usage is not None:
        return usage
    error = UsageError(
        f"a {_kind(response)} carries no usage; report figures instead, or for a stream of OpenAI "
        "its last chunk, "
        'which has it if it was asked for with stream_options={"include_usage": True}'
    )
    error.silent = _is_silent(response)
    raise error


def _is_silent(response: object) -> bool:
    """Return True for a response without usage: its usage field is empty, or usage was not requested."""
    try:
        if isinstance(response, Mapping):
            empty = any(name in response and response[name] is None for name in _PLACES)
            return empty or "choices" in response or "candidates" in response
        return any(getattr(response, name, ...) is None for name in _PLACES)
    except Exception:
        return False


_PLACES: Final = ("usage", "usage_metadata", "usageMetadata")
_NO_RESPONSES: Final = (type(None), bool, int, float, complex, str, bytes)


def _levels(response: object) -> Iterator[Any]:
    """Yield the objects that may hold usage: a response, and what a stream event or batch line wraps."""
    inner = safe_get(response, "response")
    yield response
    yield inner  # OpenAI: response.completed; Google: a batch
    yield safe_get(inner, "body")  # OpenAI: a line of a batch
    yield safe_get(response, "data")  # Mistral: an event
    yield safe_get(response, "delta")  # Cohere: message-end
    yield safe_get(response, "metadata")  # AWS: the last event of a stream
    yield safe_get(safe_get(response, "result"), "message")  # Anthropic: a line of a batch
    yield safe_get(response, "message")  # Anthropic: message_stop, where the SDK has put the message together


def _read_events(events: Sequence[Any]) -> Usage:
    """Return the usage of one raw stream of Anthropic: later events report totals, not increments."""
    first = (
        safe_get(events[0], "message") if events and safe_get(events[0], "type") == "message_start" else None
    )
    if first is None or any(safe_get(event, "type") == "message_start" for event in events[1:]):
        raise UsageError(
            f"a {_kind(events)} is no response; report each response by itself with report_usage(), "
            "of a stream the "
            "last chunk; a list can only be the events of one stream of Anthropic, from message_start on"
        )
    usages = [safe_get(first, "usage")]
    usages += [safe_get(event, "usage") for event in events[1:] if safe_get(event, "type") == "message_delta"]
    figures = {
        name: value
        for usage in usages
        for name in _ANTHROPIC_FIELDS
        if (value := safe_get(usage, name)) is not None
    }
    return _read({"usage": figures, "model": safe_get(first, "model")})


_ANTHROPIC_FIELDS: Final = (
    "input_tokens",
    "output_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "cache_creation",
    "service_tier",
    "speed",
)


def _read_figures(usage: Any, level: Any) -> Usage | None:
    if usage is None:
        return None
    for reader in _READERS:
        figures = reader(usage)
        if figures is not None:
            input_tokens, output_tokens, cached, written, hour = figures
            # LangChain and Pydantic AI have in a place of its own what the provider said beside.
            beside = safe_get(level, "response_metadata") or safe_get(level, "provider_details")
            model = _text(level, *_MODEL_NAMES) or _text(beside, *_MODEL_NAMES)
            tier = tier_of(usage, level) or tier_of(safe_get(beside, "usage"), None) or tier_of(beside, None)
            # A gateway may count what was cached beside the input: never less than the sum of its parts.
            return Usage(
                max(input_tokens, cached + written),
                output_tokens,
                cached,
                written,
                model,
                tier,
                min(hour, written),
                cost_of_call(usage),
            )
    return None


_MODEL_NAMES: Final = ("model", "model_version", "modelVersion", "model_name")


def tier_of(usage: Any, response: Any) -> str | None:
    """Return the service tier that a usage or the response around it names."""
    if _text(usage, "speed") == "fast":  # Anthropic
        return "fast"
    return _text(usage, "service_tier") or _text(response, "service_tier")


def _text(owner: Any, *names: str) -> str | None:
    return next((value for name in names if isinstance(value := safe_get(owner, name), str) and value), None)


def cost_of_call(usage: Any) -> float | None:
    """Return what OpenRouter says that a call cost, in dollars; None where it or another does not say."""
    cost = _dollars(usage, "cost")
    if cost is None or safe_get(usage, "is_byok") is not True:
        return cost
    # With a key of the caller's own this is the fee; the provider bills the rest.
    billed = _dollars(safe_get(usage, "cost_details"), "upstream_inference_cost")
    return None if billed is None else cost + billed


def _dollars(owner: Any, name: str) -> float | None:
    value = safe_get(owner, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and 0 <= value <= MOST_USD else None


def _count(owner: Any, name: str) -> int | None:
    value = safe_get(owner, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value) or value < 0 or value != int(value):
        raise UsageError(f"the response has {name}={shown(value)}; what it used cannot be counted")
    return int(value)  # Cohere counts in floats.


def _sum(owner: Any, *names: str) -> int:
    return sum(_count(owner, name) or 0 for name in names)


#: Input, output, and of the input: from a cache, to a cache, to a cache for an hour.
_Figures: TypeAlias = tuple[int, int, int, int, int]


def _chat(usage: Any) -> _Figures | None:
    """OpenAI's chat and embeddings, Mistral, and most who are compatible."""
    input_tokens = _count(usage, "prompt_tokens")
    if input_tokens is None:
        return None
    # xAI counts reasoning beside what it calls completion; the total has it.
    output_tokens = max(_sum(usage, "completion_tokens"), (_count(usage, "total_tokens") or 0) - input_tokens)
    details = safe_get(usage, "prompt_tokens_details")
    # Beside OpenAI's names those of Anthropic, where a framework puts its usage in this format.
    cached = (
        _sum(details, "cached_tokens")
        or _sum(usage, "cache_read_input_tokens")
        or _sum(usage, "prompt_cache_hit_tokens")  # DeepSeek
    )
    written = (
        _sum(details, "cache_write_tokens")
        or _sum(details, "cache_creation_tokens")  # litellm
        or _sum(usage, "cache_creation_input_tokens")
    )
    hour = _sum(safe_get(usage, "cache_creation"), "ephemeral_1h_input_tokens") or _sum(
        safe_get(details, "cache_creation_token_details"), "ephemeral_1h_input_tokens"
    )
    return input_tokens, output_tokens, cached, written, hour


def _google(usage: Any) -> _Figures | None:
    names = _GOOGLE
    if _count(usage, names[0]) is None and _count(usage, "total_token_count") is None:
        names = _GOOGLE_JSON
        if _count(usage, names[0]) is None and _count(usage, "totalTokenCount") is None:
            return None
    prompt, tools, answer, thoughts, cached, total = names
    input_tokens = _sum(usage, prompt, tools)
    # What only the total has came out: some models do not count their thoughts apart.
    output_tokens = max(_sum(usage, answer, thoughts), _sum(usage, total) - input_tokens)
    written = _sum(usage, "cache_creation_input_tokens")  # ADK, of models of Anthropic
    return input_tokens, output_tokens, _sum(usage, cached), written, 0


_GOOGLE: Final = (
    "prompt_token_count",
    "tool_use_prompt_token_count",
    "candidates_token_count",
    "thoughts_token_count",
    "cached_content_token_count",
    "total_token_count",
)
_GOOGLE_JSON: Final = (
    "promptTokenCount",
    "toolUsePromptTokenCount",
    "candidatesTokenCount",
    "thoughtsTokenCount",
    "cachedContentTokenCount",
    "totalTokenCount",
)


def _cohere(usage: Any) -> _Figures | None:
    billed = safe_get(usage, "billed_units")
    if _count(billed, "input_tokens") is not None:
        return _sum(billed, "input_tokens"), _sum(billed, "output_tokens"), 0, 0, 0
    counted = safe_get(usage, "tokens")
    if _count(counted, "input_tokens") is None:
        return None
    return (_sum(counted, "input_tokens"), _sum(counted, "output_tokens"), _sum(usage, "cached_tokens"), 0, 0)


def _aws(usage: Any) -> _Figures | None:
    input_tokens = _count(usage, "inputTokens")
    if input_tokens is None:
        return None
    cached, written = _sum(usage, "cacheReadInputTokens"), _sum(usage, "cacheWriteInputTokens")
    return input_tokens + cached + written, _sum(usage, "outputTokens"), cached, written, 0


def _input_output(usage: Any) -> _Figures | None:
    """OpenAI's responses, and Anthropic, who counts what was cached beside the input."""
    input_tokens, output_tokens = _count(usage, "input_tokens"), _count(usage, "output_tokens")
    if input_tokens is None and output_tokens is None:
        return None
    if input_tokens is None:
        raise UsageError(
            "the event has the output tokens but not the input tokens; pass the final message, or a "
            "list of all events"
        )
    cached, written = _count(usage, "cache_read_input_tokens"), _count(usage, "cache_creation_input_tokens")
    if cached is None and written is None:
        details = safe_get(usage, "input_tokens_details")
        return (
            input_tokens,
            output_tokens or 0,
            _sum(details, "cached_tokens"),
            _sum(details, "cache_write_tokens"),
            0,
        )
    cached, written = cached or 0, written or 0
    hour = _sum(safe_get(usage, "cache_creation"), "ephemeral_1h_input_tokens")
    return input_tokens + cached + written, output_tokens or 0, cached, written, hour


def _langchain(usage: Any) -> _Figures | None:
    details = safe_get(usage, "input_token_details")
    if not isinstance(details, Mapping):
        return None
    # OpenAI's tiers have names of their own: "flex_cache_read".
    cached = _sum(details, *(name for name in details if name.endswith("cache_read")))
    # Anthropic's integration has the kinds of writes, and a sum of 0 beside them.
    hour = _sum(details, "ephemeral_1h_input_tokens")
    kinds = _sum(details, "ephemeral_5m_input_tokens") + hour
    written = max(kinds, _sum(details, *(name for name in details if name.endswith("cache_creation"))))
    return _sum(usage, "input_tokens"), _sum(usage, "output_tokens"), cached, written, hour


def _pydantic_ai(usage: Any) -> _Figures | None:
    cached = _count(usage, "cache_read_tokens")
    if cached is None:
        return None
    written, hour = _sum(usage, "cache_write_tokens"), _sum(usage, "cache_write_1h_tokens")
    return _sum(usage, "input_tokens"), _sum(usage, "output_tokens"), cached, written, hour


_READERS: Final[tuple[Callable[[Any], _Figures | None], ...]] = (
    _chat,
    _google,
    _cohere,
    _aws,
    _langchain,
    _pydantic_ai,
    _input_output,
)

# ---------------------------------------------------------------------- what a node reports

#: Input and output tokens and the model; and all of it, where more than that makes the price.
Report: TypeAlias = tuple[int, int, str | None, Usage | None]


def as_report(usage: Usage) -> Report:
    """Return a usage in the form in which it is counted."""
    return usage.input_tokens, usage.output_tokens, usage.model, None if usage.is_plain else usage


def report_of(node_id: str, response: object, **options: Any) -> Report | None:
    """Return the usage that a response reports; None for a plain value. Errors name the node."""
    if issubclass(type(response), _NO_RESPONSES):
        return None
    try:
        return as_report(usage_from(response, **options))
    except UsageError as error:
        named = UsageError(f"node {node_id!r}: {error}")
        named.silent = error.silent
        raise named from error


def report_of_figures(node_id: str, figures: dict[str, Any]) -> Report:
    """Return the same for figures that were passed one by one."""
    try:
        return as_report(Usage(**figures))
    except UsageError as error:
        raise UsageError(f"node {node_id!r}: {error}") from error
