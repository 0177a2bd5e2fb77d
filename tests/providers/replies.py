"""What providers answer when all is well, with what each answer used; and how each SDK is asked for it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.providers import clients
from tests.providers.server import Answer

from stroma import Usage


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        ask: gives what the SDK makes of it, of a stream all chunks or events.
        usage: what it says it used.
        extractor: the provider and the flavour by which genai-prices reads the plain data; None if it cannot.
    """

    what: str
    ask: Callable[[str, Answer], Any]
    answer: Answer
    usage: Usage
    extractor: tuple[str, str] | None = None

    def __str__(self) -> str:
        return self.what


def sse(*events: dict[str, Any], named: bool = False) -> Answer:
    """A stream of events, with their names where the provider gives them."""
    lines = [
        (f"event: {event['type']}\n" if named else "") + f"data: {json.dumps(event)}\n\n" for event in events
    ]
    return Answer(body="".join(lines))


def _ask_responses(url: str, answer: Answer) -> Any:
    api = clients._openai().with_options(base_url=url).responses
    reply = api.create(model="gpt-4.1-mini", input="hello", stream=answer.stream)
    return list(reply) if answer.stream else reply


def _ask_embeddings(url: str, answer: Answer) -> Any:
    api = clients._openai().with_options(base_url=url).embeddings
    return api.create(model="text-embedding-3-small", input="hello", encoding_format="float")


def _stream_final(url: str, answer: Answer) -> Any:
    """Anthropic's helper puts the events together."""
    api = clients._anthropic().with_options(base_url=url).messages
    with api.stream(model="claude-haiku-4-5", max_tokens=9, messages=clients.MESSAGES) as stream:
        return [stream.get_final_message()]


def _stream_events(url: str, answer: Answer) -> Any:
    """All events of a raw stream of Anthropic, which are read together."""
    return [clients.ask_anthropic(url, answer)]


_CHAT_USAGE = {
    "prompt_tokens": 1200,
    "completion_tokens": 30,
    "total_tokens": 1230,
    "prompt_tokens_details": {"cached_tokens": 1024, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 10},
}
_CHAT = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o-mini-2024-07-18",
    "service_tier": "flex",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": '{"text": "hi"}'}}
    ],
    "usage": _CHAT_USAGE,
}
_CHAT_CHUNKS = [
    {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}],
        "usage": None,
    },
    {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [],
        "usage": _CHAT_USAGE,
    },
]
_RESPONSE = {
    "id": "r1",
    "object": "response",
    "created_at": 1,
    "status": "completed",
    "model": "gpt-4.1-mini-2025-04-14",
    "output": [],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": {
        "input_tokens": 1300,
        "input_tokens_details": {"cached_tokens": 1024, "cache_write_tokens": 100},
        "output_tokens": 40,
        "output_tokens_details": {"reasoning_tokens": 8},
        "total_tokens": 1340,
    },
}
_EMBEDDING = {
    "object": "list",
    "model": "text-embedding-3-small",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.1]}],
    "usage": {"prompt_tokens": 8, "total_tokens": 8},
}
_MESSAGE = {
    "id": "m1",
    "type": "message",
    "role": "assistant",
    "model": "claude-haiku-4-5-20251001",
    "content": [{"type": "text", "text": '{"text": "hi"}'}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 50,
        "output_tokens": 20,
        "cache_read_input_tokens": 900,
        "cache_creation_input_tokens": 300,
        "cache_creation": {"ephemeral_5m_input_tokens": 200, "ephemeral_1h_input_tokens": 100},
        "service_tier": "standard",
    },
}
_MESSAGE_EVENTS = [
    {
        "type": "message_start",
        "message": {
            **_MESSAGE,
            "content": [],
            "stop_reason": None,
            "usage": {"input_tokens": 50, "cache_read_input_tokens": 900, "output_tokens": 1},
        },
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {"output_tokens": 20},
    },
    {"type": "message_stop"},
]
#: A server's tool makes another turn: message_delta says the sums of the whole stream, and not how long the
#: cache is.
_TOOL_EVENTS = [
    {
        "type": "message_start",
        "message": {
            **_MESSAGE,
            "content": [],
            "stop_reason": None,
            "usage": {**_MESSAGE["usage"], "output_tokens": 3, "service_tier": "priority"},
        },
    },
    {
        "type": "message_delta",
        "delta": {"stop_reason": None, "stop_sequence": None},
        "usage": {"input_tokens": 200, "cache_read_input_tokens": 1000, "output_tokens": 40},
    },
    {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {
            "input_tokens": 250,
            "cache_read_input_tokens": 1900,
            "cache_creation_input_tokens": 300,
            "output_tokens": 90,
        },
    },
    {"type": "message_stop"},
]
_CONTENT = {
    "modelVersion": "gemini-2.5-flash",
    "candidates": [{"content": {"role": "model", "parts": [{"text": "hi"}]}, "finishReason": "STOP"}],
    "usageMetadata": {
        "promptTokenCount": 700,
        "cachedContentTokenCount": 512,
        "candidatesTokenCount": 12,
        "thoughtsTokenCount": 30,
        "toolUsePromptTokenCount": 40,
        "totalTokenCount": 782,
    },
}
_MISTRAL = {
    "id": "x1",
    "object": "chat.completion",
    "created": 1,
    "model": "mistral-small-latest",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}],
    "usage": {"prompt_tokens": 90, "completion_tokens": 11, "total_tokens": 101},
}
_MISTRAL_CHUNK = {
    **_MISTRAL,
    "object": "chat.completion.chunk",
    "choices": [{"index": 0, "finish_reason": "stop", "delta": {"role": "assistant", "content": "hi"}}],
}
_COHERE_USAGE = {
    "billed_units": {"input_tokens": 60.0, "output_tokens": 9.0},
    "tokens": {"input_tokens": 160.0, "output_tokens": 12.0},
}
_COHERE = {
    "id": "x1",
    "finish_reason": "COMPLETE",
    "message": {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
    "usage": _COHERE_USAGE,
}
_COHERE_END = {
    "type": "message-end",
    "id": "x1",
    "delta": {"finish_reason": "COMPLETE", "usage": _COHERE_USAGE},
}
_CONVERSE = {
    "output": {"message": {"role": "assistant", "content": [{"text": "hi"}]}},
    "stopReason": "end_turn",
    "metrics": {"latencyMs": 5},
    "usage": {
        "inputTokens": 70,
        "outputTokens": 13,
        "totalTokens": 883,
        "cacheReadInputTokens": 600,
        "cacheWriteInputTokens": 200,
    },
}
_CONVERSE_EVENTS = b"".join(
    clients.aws_event(kind, data)
    for kind, data in [
        ("messageStart", {"role": "assistant"}),
        ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "hi"}}),
        ("messageStop", {"stopReason": "end_turn"}),
        ("metadata", {"usage": _CONVERSE["usage"], "metrics": {"latencyMs": 5}}),
    ]
)

_GPT = Usage(1200, 30, 1024, 0, "gpt-4o-mini-2024-07-18")
_CLAUDE = "claude-haiku-4-5-20251001"
REPLIES = [
    Reply(
        "openai chat",
        clients.ask_openai,
        Answer(200, _CHAT),
        Usage(1200, 30, 1024, 0, _GPT.model, "flex"),
        ("openai", "chat"),
    ),
    Reply("openai chat, a stream", clients.ask_openai, sse(*_CHAT_CHUNKS), _GPT),
    Reply(
        "openai responses",
        _ask_responses,
        Answer(200, _RESPONSE),
        Usage(1300, 40, 1024, 100, "gpt-4.1-mini-2025-04-14"),
        ("openai", "responses"),
    ),
    Reply(
        "openai responses, a stream",
        _ask_responses,
        sse({"type": "response.completed", "sequence_number": 1, "response": _RESPONSE}, named=True),
        Usage(1300, 40, 1024, 100, "gpt-4.1-mini-2025-04-14"),
    ),
    Reply(
        "openai embeddings",
        _ask_embeddings,
        Answer(200, _EMBEDDING),
        Usage(8, 0, model="text-embedding-3-small"),
        ("openai", "embeddings"),
    ),
    Reply(
        "anthropic",
        clients.ask_anthropic,
        Answer(200, _MESSAGE),
        Usage(1250, 20, 900, 300, _CLAUDE, "standard", 100),
        ("anthropic", "default"),
    ),
    Reply(
        "anthropic, a raw stream",
        _stream_events,
        sse(*_MESSAGE_EVENTS, named=True),
        Usage(950, 20, 900, 0, _CLAUDE),
    ),
    Reply(
        "anthropic, a raw stream with tools",
        _stream_events,
        sse(*_TOOL_EVENTS, named=True),
        Usage(2450, 90, 1900, 300, _CLAUDE, "priority", 100),
    ),
    Reply(
        "anthropic, a stream with tools",
        _stream_final,
        sse(*_TOOL_EVENTS, named=True),
        Usage(2450, 90, 1900, 300, _CLAUDE, "priority", 100),
    ),
    Reply(
        "anthropic, a stream",
        _stream_final,
        sse(*_MESSAGE_EVENTS, named=True),
        Usage(950, 20, 900, 0, _CLAUDE),
    ),
    Reply(
        "google",
        clients.ask_google,
        Answer(200, _CONTENT),
        Usage(740, 42, 512, 0, "gemini-2.5-flash"),
        ("google", "default"),
    ),
    Reply("google, a stream", clients.ask_google, sse(_CONTENT), Usage(740, 42, 512, 0, "gemini-2.5-flash")),
    Reply(
        "mistral",
        clients.ask_mistral,
        Answer(200, _MISTRAL),
        Usage(90, 11, model="mistral-small-latest"),
        ("mistral", "default"),
    ),
    Reply(
        "mistral, a stream",
        clients.ask_mistral,
        sse(_MISTRAL_CHUNK),
        Usage(90, 11, model="mistral-small-latest"),
    ),
    Reply("cohere", clients.ask_cohere, Answer(200, _COHERE), Usage(60, 9), ("cohere", "default")),
    Reply("cohere, a stream", clients.ask_cohere, sse(_COHERE_END), Usage(60, 9)),
    Reply(
        "aws converse", clients.ask_aws, Answer(200, _CONVERSE), Usage(870, 13, 600, 200), ("aws", "default")
    ),
    Reply("aws converse, a stream", clients.ask_aws, Answer(200, _CONVERSE_EVENTS), Usage(870, 13, 600, 200)),
]
