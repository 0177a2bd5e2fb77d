"""Spans of model calls: tokens and costs of each attempt on one span, and the messages that it had."""

import json
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import NoOpTracerProvider
from pydantic import BaseModel, SecretStr
from tests.kit import Num, passing
from tests.providers.clients import ask_openai_async
from tests.providers.server import Answer, Server
from tests.telemetry.test_opentelemetry import Seen, quick

from stroma import StromaRunner, Usage, current_node, parallel, usage_from
from stroma.adapters import Guard
from stroma.telemetry import otel_hooks

MODEL = "gpt-4o-mini"
PAID = Usage(100, 20, 40, 10, model=MODEL)


@pytest.fixture
def seen() -> Seen:
    return Seen()


def calls(seen: Seen) -> list[ReadableSpan]:
    return [span for span in seen.spans if (span.attributes or {}).get("gen_ai.operation.name") == "chat"]


def of(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {})[name]


def asking(
    runner: StromaRunner, seen: Seen, *, failures: int = 0, instrumented: bool = False, id: str = "ask"
) -> Any:
    """A node that pays for each attempt, and breaks its contract a number of times."""
    left = [failures]

    @runner.node(id, input=Num, output=Num)
    async def ask(state: Num) -> Any:
        if instrumented:
            with seen.user.start_as_current_span("chat by the client") as span:
                span.set_attributes({"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 20})
        left[0] -= 1
        return ({"n": "no number"} if left[0] >= 0 else state), PAID

    return ask


@pytest.mark.core
async def test_each_attempt_has_one_span_with_its_bill(seen: Seen) -> None:
    """Attempts that failed and were paid have spans too; tokens and cost add up to those of the run, once."""
    runner = quick(seen.hooks(inference="auto"), retries=0, contract_retries={"ask": 2})
    result = await runner.run([asking(runner, seen, failures=2)], Num(), user="u-7")
    spans = calls(seen)
    assert [span.name for span in spans] == [f"chat {MODEL}"] * 3
    assert sum(of(span, "gen_ai.usage.input_tokens") for span in spans) == 300
    assert (
        sum(of(span, "gen_ai.usage.input_tokens") + of(span, "gen_ai.usage.output_tokens") for span in spans)
        == result.total_tokens
    )
    for name in ("gen_ai.usage.cost", "operation.cost", "llm.cost.total"):
        assert sum(of(span, name) for span in spans) == pytest.approx(result.total_cost_usd, abs=1e-12)
    first = spans[0]
    assert of(first, "gen_ai.usage.cache_read.input_tokens") == 40
    assert of(first, "gen_ai.usage.cache_write.input_tokens") == 10
    assert (of(first, "gen_ai.request.model"), of(first, "gen_ai.provider.name")) == (MODEL, "openai")
    assert (of(first, "openinference.span.kind"), of(first, "user.id")) == ("LLM", "u-7")
    assert of(first, "stroma.node.id") == "ask"
    assert [of(span, "stroma.outcome") for span in spans] == ["failure", "failure", "success"]
    assert all(span.status.is_ok for span in spans)
    node = seen.span("stroma.node ask")
    assert {span.parent and span.parent.span_id for span in spans} == {node.context.span_id}
    assert all(node.start_time <= span.start_time <= span.end_time <= node.end_time for span in spans)
    assert not any(name.startswith(("gen_ai.usage", "llm.")) for name in node.attributes or {})


@pytest.mark.parametrize("reports", [True, False])
@pytest.mark.parametrize("late", [False, True], ids=["between the attempts", "after the run"])
async def test_a_call_that_ends_after_its_attempt_counts_once(seen: Seen, reports: bool, late: bool) -> None:
    """An open stream's span has its attempt's tokens; if it reports none, ours is made then."""
    runner = quick(seen.hooks(inference="auto"), retries=0, contract_retries={"ask": 1})
    left_open: list[Any] = []

    def end(span: Any) -> None:
        if reports:
            span.set_attributes({"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 20})
        span.end()

    @runner.node("ask", input=Num, output=Num)
    async def ask(state: Num) -> Any:
        if current_node().attempt == 1:
            about = {"gen_ai.operation.name": "chat"}
            left_open.append(seen.user.start_span("chat by the client", attributes=about))
            return {"n": "no number"}, PAID
        if not late:
            end(left_open[0])
        return state, PAID

    result = await runner.run([ask], Num())
    if late:
        assert len(seen.named(f"chat {MODEL}")) == 1
        end(left_open[0])
    billed = [span for span in seen.spans if "gen_ai.usage.input_tokens" in (span.attributes or {})]
    assert result.total_tokens == 240
    assert len(billed) == 2
    ours = sorted(of(span, "stroma.node.attempt") for span in seen.named(f"chat {MODEL}"))
    assert ours == ([2] if reports else [1, 2])


@pytest.mark.core
async def test_an_instrumented_client_is_not_counted_twice(seen: Seen) -> None:
    """Where a span inside the attempt reports tokens there is no second; its neighbour has ours."""
    runner = quick(seen.hooks(inference="auto"), retries=0, contract_retries={"with": 1})
    nodes = parallel(
        asking(runner, seen, failures=1, instrumented=True, id="with"), asking(runner, seen, id="without")
    )
    result = await runner.run([nodes], Num())
    assert [of(span, "stroma.node.id") for span in calls(seen)] == ["without"]
    reported = [span for span in seen.spans if "gen_ai.usage.input_tokens" in (span.attributes or {})]
    assert (
        sum(
            of(span, "gen_ai.usage.input_tokens") + of(span, "gen_ai.usage.output_tokens")
            for span in reported
        )
        == result.total_tokens
    )


#: Dollars for a million tokens of MODEL: fresh input, input from the cache, output.
RATES = (0.15, 0.075, 0.60)


def price(input_tokens: int, cached: int, output_tokens: int) -> float:
    fresh, from_cache, output = RATES
    return ((input_tokens - cached) * fresh + cached * from_cache + output_tokens * output) / 1e6


@pytest.mark.parametrize("instrumented", [True, False])
async def test_the_bill_is_that_of_the_provider(seen: Seen, provider: Server, instrumented: bool) -> None:
    """Two answers that break the contract and one that holds it: spans cost what the provider billed."""
    sizes = [(1_200_000, 1_000_000, 90_000), (2_000_000, 0, 70_001), (3_000_003, 512, 11)]
    contents = ['{"n": "no number"}', '{"n": []}', '{"n": 3}']
    urls = []
    for (prompt, cached, output), content in zip(sizes, contents, strict=True):
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        body = {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [message]}
        urls.append(provider.url(Answer(200, body | {"usage": usage})))
    runner = quick(seen.hooks(inference="auto"), retries=0, contract_retries={"ask": 2})

    @runner.node("ask", input=Num, output=Num)
    async def ask(state: Num) -> Any:
        node = current_node()
        with seen.user.start_as_current_span("client") as span:
            reply = await ask_openai_async(urls[node.attempt - 1])
            if instrumented:
                details = reply.usage.prompt_tokens_details
                span.set_attributes(
                    {
                        "gen_ai.request.model": reply.model,
                        "gen_ai.usage.input_tokens": reply.usage.prompt_tokens,
                        "gen_ai.usage.output_tokens": reply.usage.completion_tokens,
                        "gen_ai.usage.cache_read.input_tokens": details.cached_tokens,
                    }
                )
        return json.loads(reply.choices[0].message.content), usage_from(reply)

    result = await runner.run([ask], Num())
    assert result.status == "COMPLETED"
    ledger = sum(provider.calls_of(url) * price(*size) for url, size in zip(urls, sizes, strict=True))
    billed = [
        span.attributes for span in seen.spans if "gen_ai.usage.input_tokens" in (span.attributes or {})
    ]
    assert len(billed) == 3
    tokens = ("input_tokens", "cache_read.input_tokens", "output_tokens")
    spans = sum(price(*(about.get(f"gen_ai.usage.{name}", 0) for name in tokens)) for about in billed)
    assert spans == pytest.approx(ledger, abs=1e-9)
    assert result.total_cost_usd == pytest.approx(ledger, abs=1e-9)
    if not instrumented:
        assert sum(of(span, "gen_ai.usage.cost") for span in calls(seen)) == pytest.approx(ledger, abs=1e-9)


async def test_only_the_instrumented_attempt_counts(seen: Seen) -> None:
    """An attempt without a span of the client has ours, though another attempt of the node had one."""
    runner = quick(seen.hooks(inference="auto"), retries=0, contract_retries={"ask": 1})
    attempts = [0]

    @runner.node("ask", input=Num, output=Num)
    async def ask(state: Num) -> Any:
        attempts[0] += 1
        if attempts[0] == 1:
            with seen.user.start_as_current_span("chat") as span:
                span.set_attribute("llm.token_count.total", 120)
            return {"n": "no number"}, PAID
        return state, PAID

    await runner.run([ask], Num())
    assert [of(span, "stroma.node.attempt") for span in calls(seen)] == [2]


async def test_a_client_in_a_thread_is_seen(seen: Seen) -> None:
    """A span of a client counts wherever in the attempt it is made, in a thread or below another span."""
    runner = quick(seen.hooks(inference="auto"))

    @runner.node("ask", input=Num, output=Num)
    def ask(state: Num) -> Any:
        with seen.user.start_as_current_span("chain"), seen.user.start_as_current_span("chat") as span:
            span.set_attribute("gen_ai.usage.output_tokens", 20)
        return state, PAID

    await runner.run([ask], Num())
    assert calls(seen) == []


async def test_always_and_never(seen: Seen) -> None:
    """ "always" has a span for each attempt that used tokens, "never" none; without usage none."""
    for mode, expected in (("always", 1), ("never", 0)):
        mine = Seen()
        runner = quick(mine.hooks(inference=mode))
        await runner.run([asking(runner, mine, instrumented=True)], Num())
        assert len(calls(mine)) == expected

    free = runner.node("free", input=Num, output=Num)(passing())
    await runner.run([free], Num())
    assert calls(seen) == []


async def test_a_failed_call_that_was_paid(seen: Seen) -> None:
    """Usage reported before the exception is on a span of that attempt with its outcome; the node errs."""
    runner = quick(seen.hooks(inference="auto"), retries=0)

    @runner.node("ask", input=Num, output=Num)
    async def ask(state: Num) -> Num:
        current_node().report_usage(input_tokens=100, output_tokens=20, model=MODEL)
        raise ValueError("no")

    await runner.run([ask], Num())
    (span,) = calls(seen)
    assert (of(span, "gen_ai.usage.input_tokens"), of(span, "stroma.outcome")) == (100, "failure")


async def test_a_provider_that_shows_no_spans_of_others(seen: Seen) -> None:
    """Where spans of others cannot be seen, "auto" makes none: a double bill is worse than none."""
    for tracer in (NoOpTracerProvider(), TracerProvider().get_tracer("mine")):
        runner = quick(otel_hooks(tracer=tracer, meter=seen.meter))
        result = await runner.run([asking(runner, seen)], Num())
        assert result.total_tokens == 120
    assert calls(seen) == []


async def test_a_call_whose_span_is_around_the_node(seen: Seen) -> None:
    """A model call's span around the node has its answer's tokens; ours have those of failed attempts."""
    guard = Guard(quick(seen.hooks(inference="auto"), retries=1))

    @guard.step("model")
    async def model() -> str:
        node = current_node()
        node.report_usage(input_tokens=40 if node.attempt == 1 else 100, output_tokens=2, model=MODEL)
        if node.attempt == 1:
            raise ConnectionError
        return "answer"

    async with guard.run() as run:
        with seen.user.start_as_current_span(
            "by the framework", attributes={"gen_ai.operation.name": "chat"}
        ) as span:
            await model()
            span.set_attributes({"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 2})
    used = [(span.name, of(span, "gen_ai.usage.input_tokens")) for span in calls(seen)]
    assert sorted(used) == [("by the framework", 100), (f"chat {MODEL}", 40)]
    assert run.result.total_tokens == 144


def guarded_model(seen: Seen) -> tuple[Guard, Any]:
    """Return a guard, and a step of it that stands for a call of a model."""
    guard = Guard(quick(seen.hooks(inference="auto")))

    @guard.step("model")
    async def model() -> str:
        current_node().report_usage(input_tokens=100, output_tokens=2, model=MODEL)
        return "answer"

    return guard, model


async def test_a_call_whose_span_gets_its_kind_when_it_ends(seen: Seen) -> None:
    """The answer of a span that shows its kind at its end, as OpenInference's do, counts once."""
    guard, model = guarded_model(seen)

    async with guard.run() as run:
        with seen.user.start_as_current_span("theirs", attributes={"llm.model_name": MODEL}) as span:
            await model()
            span.set_attributes({"openinference.span.kind": "LLM", "llm.token_count.prompt": 100})
    assert run.result.total_tokens == 102
    assert calls(seen) == []
    assert of(span, "stroma.node.id") == "model"


async def test_calls_that_share_the_span_around_them(seen: Seen) -> None:
    """A model call's span around several calls, each written over the one before, stands for one answer."""
    guard, model = guarded_model(seen)

    about = {"gen_ai.operation.name": "chat"}
    async with guard.run():
        with seen.user.start_as_current_span("by the framework", attributes=about) as span:
            for _ in range(3):
                await model()
                span.set_attributes({"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 2})
    used = [(span.name, of(span, "gen_ai.usage.input_tokens")) for span in calls(seen)]
    assert sorted(used) == [("by the framework", 100), *[(f"chat {MODEL}", 100)] * 2]


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
