"""Messages on the spans of model calls: those that a framework sends, and the answers that nodes report."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr
from tests.kit import Num
from tests.telemetry.test_opentelemetry import Seen, quick

from stroma import current_node
from stroma.adapters import Guard

USAGE = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
CALL = {"type": "tool_call", "id": "c1", "name": "weather", "arguments": {"city": "Oslo"}}


def completion(message: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of OpenAI's chat completions."""
    return {"model": "gpt-4o", "choices": [{"index": 0, "message": message}], "usage": USAGE}


def shown(seen: Seen, number: int = 0) -> dict[str, Any]:
    """Return the messages on a span of a model call, by their direction."""
    calls = [span for span in seen.spans if span.name.startswith("chat")]
    about = dict(calls[number].attributes or {})
    return {
        name: json.loads(str(about[f"gen_ai.{name}.messages"]))
        for name in ("input", "output")
        if f"gen_ai.{name}.messages" in about
    }


def text(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": content}]}


async def ask(seen: Seen, messages: Any, response: Any, **options: Any) -> None:
    """Ask a model as a step of a guard that sees its messages."""
    guard = Guard(quick(seen.hooks(inference="always", **options)))

    def model(messages: Any) -> Any:
        return response

    step = guard.wrap("model", model, messages=lambda args, _: args[0], usage=lambda answer: answer)
    async with guard.run(conversation="c-1"):
        step(messages)


RESPONSES: dict[str, Any] = {
    "chat completions": completion(
        {
            "role": "assistant",
            "content": "Let me see",
            "tool_calls": [
                {
                    "id": "c1",
                    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
                    "type": "function",
                }
            ],
        }
    ),
    "responses": {
        "model": "gpt-4o",
        "output": [
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Let me see"}],
            },
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        ],
        "usage": {"input_tokens": 9, "output_tokens": 1},
    },
    "anthropic": {
        "model": "claude-sonnet-4-5",
        "role": "assistant",
        "type": "message",
        "content": [
            {"type": "text", "text": "Let me see"},
            {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
        ],
        "usage": {"input_tokens": 9, "output_tokens": 1},
    },
}


@pytest.mark.core
@pytest.mark.parametrize("provider", RESPONSES)
@pytest.mark.parametrize("is_reported", [False, True], ids=["returned", "reported"])
async def test_the_answer_that_a_node_reports_is_on_its_span(provider: str, is_reported: bool) -> None:
    """The response of a provider that a node returns or reports shows its text and its calls of tools."""
    seen = Seen()
    runner = quick(seen.hooks(inference="always", content="redacted"))

    @runner.node("node", input=Num, output=Num)
    async def node(state: Num) -> Any:
        if not is_reported:
            return state, RESPONSES[provider]
        current_node().report_usage(RESPONSES[provider])
        return state

    await runner.run([node], Num())
    parts = [{"type": "text", "content": "Let me see"}, CALL]
    answer = {"role": "assistant", "parts": parts, "finish_reason": "tool_call"}
    assert shown(seen) == {"output": [answer]}


@pytest.mark.core
async def test_messages_are_sent_only_where_content_is() -> None:
    """Without content="redacted" no message leaves the process."""
    seen = Seen()
    await ask(seen, "who are you?", completion({"role": "assistant", "content": "a secret plan"}))
    assert shown(seen) == {}
    assert "plan" not in str([dict(span.attributes or {}) for span in seen.spans])


async def test_a_conversation_has_roles_and_parts() -> None:
    """What a model is asked has a role each, and results of tools beside the ids of their calls."""
    seen = Seen()
    asked = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "weather?"}, {"type": "image_url", "image_url": "x"}],
        },
        RESPONSES["chat completions"]["choices"][0]["message"],
        {"role": "tool", "tool_call_id": "c1", "content": "4 C"},
    ]
    answer = completion({"role": "assistant", "content": "4 C"})
    await ask(seen, asked, answer, content="redacted")
    assert shown(seen)["input"] == [
        text("system", "be brief"),
        {"role": "user", "parts": [{"type": "text", "content": "weather?"}, {"type": "image_url"}]},
        {"role": "assistant", "parts": [{"type": "text", "content": "Let me see"}, CALL]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "4 C"}]},
    ]
    assert shown(seen)["output"] == [text("assistant", "4 C") | {"finish_reason": "stop"}]


async def test_of_a_long_conversation_the_newest_messages_are_sent() -> None:
    """The attribute stays JSON within max_bytes, and ends with the newest message."""
    seen = Seen()
    asked = [
        {"role": role, "content": f"{n} {'x' * 50}"} for n in range(100) for role in ("user", "assistant")
    ]
    await ask(seen, asked, completion({"content": "y" * 5000}), content="redacted", max_bytes=500)
    found = shown(seen)
    assert found["input"][-1] == text("assistant", f"99 {'x' * 50}")
    assert 1 < len(found["input"]) < 10
    assert 300 < len(found["output"][0]["parts"][0]["content"]) < 600


class Account(BaseModel):
    n: int = 0
    key: SecretStr = SecretStr("sk-hunter2-long")


async def test_secrets_and_denied_names_are_not_in_messages() -> None:
    """Secrets of the run are masked in messages, and values of denied names are left out of arguments."""
    seen = Seen()
    runner = quick(seen.hooks(inference="always", content="redacted"))
    arguments = '{"password": "hunter3", "city": "Oslo"}'

    @runner.node("node", input=Account, output=Account)
    async def node(state: Account) -> Any:
        call = {"id": "c1", "function": {"name": "login", "arguments": arguments}}
        said = f"with {state.key.get_secret_value()}"
        return state, completion({"role": "assistant", "content": said, "tool_calls": [call]})

    await runner.run([node], Account())
    told, call = shown(seen)["output"][0]["parts"]
    assert call["arguments"] == {"password": "[redacted]", "city": "Oslo"}
    assert told["content"].startswith("with ")
    assert "hunter" not in str([dict(span.attributes or {}) for span in seen.spans])


async def test_what_redact_removes_is_not_in_messages() -> None:
    """RunConfig.redact sees messages as {"messages": [...]}, and nothing is sent of what it removes."""
    seen = Seen()
    hooks = seen.hooks(inference="always", content="redacted")
    runner = quick(
        hooks, redact=lambda state: {key: value for key, value in state.items() if key != "messages"}
    )

    @runner.node("node", input=Num, output=Num)
    async def node(state: Num) -> Any:
        return state, completion({"role": "assistant", "content": "hello"})

    await runner.run([node], Num())
    assert shown(seen) == {}
