"""What a provider's response says it used: from real SDKs' responses of a real server and from plain data."""

import asyncio
import contextlib
import re
import types
from typing import Any
from unittest.mock import MagicMock

import pytest
from genai_prices import extract_usage
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from tests.kit import THRICE, Note, computing
from tests.providers.clients import _openai, ask_openai
from tests.providers.replies import _CHAT, _CHAT_CHUNKS, _CONTENT, _MESSAGE_EVENTS, REPLIES, Reply, sse
from tests.providers.server import Server

from stroma import (
    KNOWN_MODELS,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    Flow,
    NodeHooks,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    Usage,
    UsageError,
    current_node,
    current_run,
    execute_step,
    map_over,
    parallel,
    usage_from,
)


def last(reply: Reply, provider: Server) -> Any:
    """What the SDK makes of the answer; of a stream its last chunk."""
    response: Any = reply.ask(provider.url(reply.answer), reply.answer)
    return response[-1] if isinstance(response, list) else response


@pytest.mark.core
@pytest.mark.parametrize("reply", REPLIES, ids=str)
def test_the_usage_of_an_sdks_response(reply: Reply, provider: Server) -> None:
    """The response of each SDK, or the last chunk of its stream, gives the tokens by kind and the model."""
    assert usage_from(last(reply, provider)) == reply.usage


@pytest.mark.parametrize(
    "reply", [r for r in REPLIES if not r.answer.stream and r.extractor is not None], ids=str
)
def test_the_usage_of_plain_data(reply: Reply) -> None:
    """The same as plain data gives the same, and what genai-prices' own extractor of that provider reads."""
    assert usage_from(reply.answer.body) == reply.usage
    assert reply.extractor is not None
    provider, flavour = reply.extractor
    theirs = extract_usage(reply.answer.body, provider_id=provider, api_flavor=flavour).usage
    ours = reply.usage
    assert theirs.input_tokens == ours.input_tokens
    assert ours.output_tokens == theirs.reported_value("output_tokens")
    assert theirs.reported_value("cache_read_tokens") == ours.cached_input_tokens
    assert theirs.reported_value("cache_write_tokens") == ours.cache_write_tokens
    assert theirs.reported_value("cache_write_1h_tokens") == ours.cache_write_1h_tokens


def used(**figures: Any) -> dict[str, Any]:
    """Return a response with this usage."""
    return {"usage": figures}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # xAI counts reasoning beside completion, DeepSeek has another name for what was cached.
        (used(prompt_tokens=10, completion_tokens=5, total_tokens=40), Usage(10, 30)),
        (used(prompt_tokens=10, completion_tokens=5, prompt_cache_hit_tokens=8), Usage(10, 5, 8)),
        # Anthropic's names in the format of OpenAI: Haystack and litellm, which has others as well.
        (
            used(
                prompt_tokens=30,
                cache_read_input_tokens=8,
                cache_creation_input_tokens=9,
                cache_creation={"ephemeral_1h_input_tokens": 4},
                service_tier="standard",
            ),
            Usage(30, 0, 8, 9, tier="standard", cache_write_1h_tokens=4),
        ),
        (
            used(
                prompt_tokens=30,
                cache_creation_input_tokens=9,
                prompt_tokens_details={"cached_tokens": 0, "cache_creation_tokens": 9},
            ),
            Usage(30, 0, 0, 9),
        ),
        (
            used(
                prompt_tokens=30,
                prompt_tokens_details={
                    "cache_creation_tokens": 9,
                    "cache_creation_token_details": {"ephemeral_1h_input_tokens": 4},
                },
            ),
            Usage(30, 0, 0, 9, cache_write_1h_tokens=4),
        ),
        # OpenRouter says what a call cost; with a key of one's own, what its fee is and what the provider
        # bills.
        (
            used(prompt_tokens=5, cost=0.0123, is_byok=False, cost_details={"upstream_inference_cost": 0.01}),
            Usage(5, cost_usd=0.0123),
        ),
        (
            used(prompt_tokens=5, cost=0.25, is_byok=True, cost_details={"upstream_inference_cost": 0.5}),
            Usage(5, cost_usd=0.75),
        ),
        (used(prompt_tokens=5, cost=0.25, is_byok=True), Usage(5)),
        (used(prompt_tokens=5, cost=0), Usage(5, cost_usd=0)),
        (used(prompt_tokens=5, cost={"total_cost": 1}), Usage(5)),
        (used(prompt_tokens=5, cost=-1.0), Usage(5)),
        # A gateway that counts what was cached beside the input.
        (used(prompt_tokens=10, prompt_tokens_details={"cached_tokens": 90}), Usage(90, 0, 90)),
        (used(tokens={"input_tokens": 9.0, "output_tokens": 2.0}, cached_tokens=4.0), Usage(9, 2, 4)),
        ({"meta": {"billed_units": {"input_tokens": 3}}}, Usage(3)),
        (
            {"usage": {"input_tokens": 5, "output_tokens": 1, "service_tier": "batch"}, "model": "m"},
            Usage(5, 1, model="m", tier="batch"),
        ),
        (used(input_tokens=5, speed="fast", service_tier="standard"), Usage(5, tier="fast")),
        # A line of OpenAI's batch results, a usage by itself, and one of ours.
        (
            {"custom_id": "1", "response": {"status_code": 200, "body": _CHAT}},
            Usage(1200, 30, 1024, 0, "gpt-4o-mini-2024-07-18", "flex"),
        ),
        ({"prompt_tokens": 7, "completion_tokens": 2}, Usage(7, 2)),
        (Usage(1, 2, model="m"), Usage(1, 2, model="m")),
        # A line of Anthropic's batch results.
        (
            {
                "custom_id": "1",
                "result": {
                    "type": "succeeded",
                    "message": {
                        "model": "m",
                        "usage": {"input_tokens": 5, "output_tokens": 2, "service_tier": "batch"},
                    },
                },
            },
            Usage(5, 2, model="m", tier="batch"),
        ),
        # Google's total has what nothing else counts, the others are never less than it.
        (
            {"usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 2, "totalTokenCount": 40}},
            Usage(10, 30),
        ),
        ({"usageMetadata": {"totalTokenCount": 12}}, Usage(0, 12)),
        (
            {"usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 2, "totalTokenCount": 11}},
            Usage(10, 2),
        ),
        # Messages of LangChain, and responses of Pydantic AI: their input includes what was cached.
        (
            {
                "usage_metadata": {
                    "input_tokens": 20,
                    "output_tokens": 2,
                    "input_token_details": {
                        "flex_cache_read": 8,
                        "cache_creation": 0,
                        "ephemeral_1h_input_tokens": 4,
                    },
                },
                "response_metadata": {"model_name": "m", "service_tier": "flex"},
            },
            Usage(20, 2, 8, 4, "m", "flex", 4),
        ),
        (
            {
                "usage": {
                    "input_tokens": 20,
                    "output_tokens": 2,
                    "cache_read_tokens": 8,
                    "cache_write_tokens": 4,
                },
                "model_name": "m",
                "provider_details": {"service_tier": "flex"},
            },
            Usage(20, 2, 8, 4, "m", "flex"),
        ),
        # A stream that broke off has used what it said so far.
        (_MESSAGE_EVENTS[:2], Usage(950, 1, 900, model="claude-haiku-4-5-20251001")),
        (
            types.SimpleNamespace(usage=types.SimpleNamespace(prompt_tokens=4, completion_tokens=None)),
            Usage(4),
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_other_shapes(response: Any, expected: Usage) -> None:
    """Whatever answers alike is read alike."""
    assert usage_from(response) == expected


def test_what_the_response_does_not_say_can_be_said() -> None:
    """model= and tier= are for responses that name none (Cohere, AWS), and win over those that do."""
    cohere = next(reply for reply in REPLIES if reply.what == "cohere").answer.body
    assert usage_from(cohere, model="command-a-03-2025") == Usage(60, 9, model="command-a-03-2025")
    assert usage_from(_CHAT, model="my-deployment", tier="batch").model == "my-deployment"
    assert usage_from(_CHAT, tier="batch").tier == "batch"


class Classless:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no class")


class Refusing(type):
    def __getattribute__(cls, name: str) -> Any:
        raise RuntimeError(name)


class Nameless(metaclass=Refusing):
    pass


class Hostile:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


@pytest.mark.core
@pytest.mark.parametrize(
    ("response", "says"),
    [
        ({"choices": []}, "carries no usage"),
        (_CHAT_CHUNKS[0], "include_usage"),
        (_MESSAGE_EVENTS[-2], "pass the final message"),
        (_MESSAGE_EVENTS[0], "a list of all events"),
        (_MESSAGE_EVENTS[1:], "a list is no response"),
        (_MESSAGE_EVENTS * 2, "one stream of Anthropic"),
        ([_CHAT, _CHAT], "report each response by itself"),
        ([], "a list is no response"),
        (MagicMock(), "carries no usage"),
        (Hostile(), "carries no usage"),
        (object(), "carries no usage"),
        (Nameless(), "carries no usage"),
        ({"usage": {"prompt_tokens": -1}}, "prompt_tokens=-1"),
        ({"usage": {"prompt_tokens": 1.5}}, "prompt_tokens=1.5"),
        ({"usage": {"prompt_tokens": float("nan")}}, "prompt_tokens=nan"),
        ({"usage": {"prompt_tokens": True}}, "carries no usage"),
        ({"usage": {"prompt_tokens": 10**12}}, "0 to 1,000,000,000"),
        (None, "not a response of a provider"),
        ("text", "not a response of a provider"),
        (7, "not a response of a provider"),
    ],
    ids=range(20),
)
def test_what_cannot_be_counted_is_said(response: Any, says: str) -> None:
    """No usage, half of one, or one that makes no sense is a UsageError with a fix, never a zero."""
    with pytest.raises(UsageError, match=says):
        usage_from(response)


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"input_tokens": -1}, "whole number"),
        ({"input_tokens": True}, "whole number"),
        ({"input_tokens": 5, "cached_input_tokens": 6}, "report the whole input"),
        ({"input_tokens": 5, "cached_input_tokens": 3, "cache_write_tokens": 3}, "report the whole input"),
        ({"input_tokens": 5, "cache_write_tokens": 3, "cache_write_1h_tokens": 4}, "a part of them"),
        ({"model": 5}, "strings or None"),
        ({"cost_usd": -1.0}, "number of dollars, 0 to 1,000,000"),
        ({"cost_usd": float("nan")}, "number of dollars"),
        ({"cost_usd": 1e300}, "number of dollars"),  # No store has room for it.
    ],
    ids=str,
)
def test_a_usage_makes_sense(figures: dict[str, Any], says: str) -> None:
    """The parts of the input are parts of it, and counts are counts."""
    with pytest.raises(UsageError, match=says):
        Usage(**figures)


COUNT = st.one_of(st.none(), st.integers(-2, 10**7), st.floats(), st.booleans(), st.text(max_size=3))
NAMES = """
    prompt_tokens completion_tokens total_tokens prompt_tokens_details input_tokens output_tokens
    cache_read_input_tokens cache_creation_input_tokens promptTokenCount candidatesTokenCount inputTokens
    billed_units cached_tokens service_tier model usage response delta data cost is_byok cost_details
    upstream_inference_cost
"""
NAME = st.sampled_from(re.findall(r"\w+", NAMES))
SHAPE = st.recursive(COUNT, lambda inner: st.dictionaries(NAME, inner, max_size=5), max_leaves=12)


@given(SHAPE)
def test_any_data_is_a_usage_or_a_usage_error(response: Any) -> None:
    """Whatever a server sends: a usage that makes sense, or a UsageError."""
    try:
        usage = usage_from(response)
    except UsageError:
        return
    assert usage.cached_input_tokens + usage.cache_write_tokens <= usage.input_tokens


@pytest.mark.parametrize("kind", ["Classless", "Nameless"])
async def test_a_response_that_will_not_be_looked_at_is_bad_usage(kind: str) -> None:
    """An object that raises whatever it is asked: its class, or its class's name. The output is kept."""
    instance = {"Classless": Classless, "Nameless": Nameless}[kind]
    with pytest.raises(UsageError, match="carries no usage"):
        usage_from(instance())
    runner, ask = node_of(lambda: ({"text": "kept"}, instance()))
    result = await runner.run([ask], Note())
    assert (result.status, result.failure and result.failure.reason) == (RunStatus.FAILED, "usage")
    assert next(iter(result.trace)).output_state == {"text": "kept"}


def node_of(returned: Any, **config: Any) -> tuple[StromaRunner, Any]:
    runner = StromaRunner.quick(**config)

    @runner.node("ask", input=Note, output=Note)
    async def ask(state: Note) -> Any:
        return returned() if callable(returned) else returned

    return runner, ask


@pytest.mark.core
@pytest.mark.parametrize("reply", REPLIES, ids=str)
async def test_a_node_returns_its_output_and_the_response(reply: Reply, provider: Server) -> None:
    """(output, response) counts what the response says, at its price, like the figures by hand."""
    response = await asyncio.to_thread(last, reply, provider)
    runner, ask = node_of(({"text": "hi"}, response))
    result = await runner.run([ask], Note())
    assert result.status is RunStatus.COMPLETED, result.failure
    (event,) = result.trace
    assert event.usage.tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert (event.usage.output_tokens, event.usage.model) == (reply.usage.output_tokens, reply.usage.model)
    runner, ask = node_of(({"text": "hi"}, reply.usage))
    assert (await runner.run([ask], Note())).total_cost_usd == result.total_cost_usd
    assert (result.total_cost_usd > 0) == (reply.usage.model is not None)


async def test_the_split_of_the_input_is_in_the_trace() -> None:
    """Cache reads and writes, summed over the calls of an attempt, in the trace and while it runs."""
    runner = StromaRunner.quick()

    @runner.node("ask", input=Note, output=Note)
    async def ask(state: Note) -> Any:
        node = current_node()
        node.report_usage(_CHAT)
        node.report_usage(input_tokens=10, cached_input_tokens=4, cache_write_tokens=5, model="gpt-4o-mini")
        node.report_usage(input_tokens=10)
        assert (node.usage.cached_input_tokens, node.usage.cache_write_tokens) == (1028, 5)
        return {"text": "hi"}, Usage(20, 0, 1, 2)

    (event,) = (await runner.run([ask], Note())).trace
    used = event.usage
    assert (used.input_tokens, used.cached_input_tokens, used.cache_write_tokens) == (1240, 1029, 7)


async def test_a_stream_is_reported_by_its_last_chunk(provider: Server) -> None:
    """report_usage takes the last chunk of a stream, while the node still runs; calls add up."""
    url = provider.url(sse(*_CHAT_CHUNKS))
    runner = StromaRunner.quick()

    @runner.node("ask", input=Note, output=Note)
    def ask(state: Note) -> dict[str, Any]:
        node = current_node()
        text = ""
        chunks = (
            _openai()
            .with_options(base_url=url)
            .chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": "hello"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        for chunk in chunks:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            if chunk.usage is not None:
                node.report_usage(chunk)
        assert (node.usage.tokens, node.usage.model) == (1230, "gpt-4o-mini-2024-07-18")
        node.report_usage(_CONTENT)
        node.report_usage(input_tokens=10, cached_input_tokens=10, model="gpt-4o-mini")
        return {"text": text}

    result = await runner.run([ask], Note())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert result.total_tokens == 1230 + 782 + 10
    expected = (176 * 0.15 + 1024 * 0.075 + 30 * 0.6) + (228 * 0.3 + 512 * 0.03 + 42 * 2.5) + 10 * 0.075
    assert result.total_cost_usd == pytest.approx(expected / 1e6, rel=1e-12)


async def test_a_node_that_fails_after_its_call_has_paid_for_it() -> None:
    """G6: a response that was reported counts, whatever becomes of the attempt, and against the budget."""
    runner = StromaRunner.quick(budget=ExecutionBudget(max_tokens_total=2000))
    calls = []

    @runner.node("ask", input=Note, output=Note)
    async def ask(state: Note) -> dict[str, Any]:
        calls.append(1)
        current_node().report_usage(_CHAT)
        raise TimeoutError("late")

    result = await runner.run([ask], Note())
    assert (result.status, len(calls), result.total_tokens) == (RunStatus.PARTIAL, 2, 2460)


async def test_a_model_said_beside_the_response_is_what_is_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node reports is what it is priced at: a deployment's own name, with a price of its own."""
    monkeypatch.setitem(KNOWN_MODELS, "our-deployment", (1.0, 2.0))
    runner, ask = node_of(({"text": "hi"}, usage_from(_CHAT, model="our-deployment")))
    result = await runner.run([ask], Note())
    # Nobody knows what its cached input costs, so it costs what other input does.
    assert result.total_cost_usd == pytest.approx((1200 * 1.0 + 30 * 2.0) / 1e6)


@pytest.mark.parametrize(
    ("used", "says"),
    [
        ({"answer": "42"}, "node 'ask': a dict carries no usage"),
        (Note(text="no response"), "node 'ask': a Note carries no usage"),
        ({"usage": {"prompt_tokens": -1}}, "node 'ask': the response has prompt_tokens=-1"),
        (object(), "node 'ask': a object carries no usage"),
        ("10", "node 'ask' returned '10' in the place of the tokens; return the output, (output, response)"),
        (None, "node 'ask' returned None in the place of the tokens; return the output, (output, response)"),
        (1.5, "node 'ask' reported 1.5 tokens"),
        (True, "node 'ask' reported True tokens"),
        (MagicMock(), "node 'ask': a MagicMock carries no usage"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_response_that_says_nothing_is_bad_usage(used: Any, says: str) -> None:
    """Usage that cannot be counted is TERMINAL, names the node and keeps the output, not bought again."""
    runner, ask = node_of(({"text": "kept"}, used))
    result = await runner.run([ask], Note())
    assert result.status is RunStatus.FAILED
    assert isinstance(result.failure.exception, UsageError)
    assert result.failure.message.startswith(says)
    (event,) = result.trace
    assert event.output_state == {"text": "kept"}


async def test_a_model_before_its_tokens_shows_the_order() -> None:
    """A tuple with the model in the place of the tokens says what a node may return."""
    for returned in (({"text": "kept"}, "gpt-4o", 12), ({"text": "kept"}, "gpt-4o", 12, 3)):
        runner, ask = node_of(returned)
        failure = (await runner.run([ask], Note())).failure
        assert failure.message.startswith("node 'ask' returned 'gpt-4o' in the place of the tokens; return")
        assert "(output, input_tokens, model)" in failure.message


SILENT: list[Any] = [
    {"choices": []},
    {"candidates": []},
    {**_CHAT, "usage": None},
    types.SimpleNamespace(usage=None, model="m"),
    types.SimpleNamespace(usage_metadata=None),
]


def by_returning(response: Any, runner: StromaRunner) -> Any:
    return runner.node("ask", input=Note, output=Note)(computing(lambda _: ({"text": "kept"}, response)))


def by_reporting(response: Any, runner: StromaRunner) -> Any:
    @runner.node("ask", input=Note, output=Note)
    async def ask(state: Note) -> Any:
        current_node().report_usage(response)
        return {"text": "kept"}

    return ask


@pytest.mark.core
@pytest.mark.parametrize("how", [by_returning, by_reporting])
@pytest.mark.parametrize("response", SILENT, ids=lambda r: str(r)[:30])
async def test_a_server_that_leaves_usage_out_stops_no_run_without_a_limit(
    how: Any, response: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What a response omits counts as 0, with one warning for the node, where no limit depends on it."""
    runner = StromaRunner.quick(budget=ExecutionBudget(max_latency_ms=600_000))
    ask = how(response, runner)
    result = await runner.run([ask, ask], Note())
    assert (result.status, result.total_tokens) == (RunStatus.COMPLETED, 0), result.failure
    (message,) = [r.getMessage() for r in caplog.records if "counts as 0" in r.getMessage()]
    assert "': node 'ask': a " in message


@pytest.mark.core
@pytest.mark.parametrize("how", [by_returning, by_reporting])
@pytest.mark.parametrize(
    "config",
    [
        {"budget": ExecutionBudget(max_tokens_total=10**9)},
        {"budget": ExecutionBudget(max_cost_usd=1000.0)},
        {"unknown_model": "error"},
    ],
    ids=str,
)
async def test_a_limit_that_cannot_be_counted_stops_the_run(how: Any, config: dict[str, Any]) -> None:
    """G6: Under a limit of tokens or cost, a response without usage stops the run before the next call."""
    runner = StromaRunner.quick(**config)
    ask = how({**_CHAT, "usage": None}, runner)
    result = await runner.run([ask, ask], Note())
    assert (result.status, result.failure.reason, len(result.trace)) == (RunStatus.FAILED, "usage", 1)
    assert next(iter(result.trace)).output_state == {"text": "kept"}


@pytest.mark.core
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("shape", ["classifier", "group", "map", "flow", "inside"])
async def test_no_call_follows_one_without_a_price(shape: str, fails: bool) -> None:
    """G6: Under a cost limit no call follows one without a price, whoever collects or catches its failure."""
    runner = StromaRunner.quick(
        budget=ExecutionBudget(max_cost_usd=5.0),
        policy_map=THRICE,
        node_policies={"parallel(ask)": THRICE},
        classifiers=[lambda error, context: FailureClass.RECOVERABLE] if shape == "classifier" else [],
    )
    calls: list[str] = []

    @runner.node
    async def ask(state: Note) -> Note:
        calls.append(state.text)
        current_node().report_usage(input_tokens=5, model="unheard-of")
        if fails:
            raise ValueError("no answer")
        return state

    @runner.flow
    async def catching(flow: Flow, state: Note) -> Note:
        for _ in range(3):
            with contextlib.suppress(Exception):
                await flow.step(ask, state)
        return state

    @runner.node
    async def calling(state: Note) -> Note:
        for _ in range(3):
            await execute_step("ask", ask, state, current_run())
        return state

    class Notes(BaseModel):
        notes: list[Note] = [Note()] * 3

    collecting = map_over("notes", ask, into="notes", on_item_failure="collect", max_concurrency=1)
    nodes: Any = [calling if shape == "inside" else ask, ask]
    nodes = {"group": [parallel(ask), ask], "map": [collecting], "flow": catching}.get(shape, nodes)
    result = await runner.run(nodes, Notes() if shape == "map" else Note())
    status = RunStatus.PARTIAL if shape == "classifier" else RunStatus.FAILED
    assert (result.status, result.failure.reason, len(calls)) == (status, "usage", 1)


@pytest.mark.core
@pytest.mark.parametrize("how", [by_returning, by_reporting])
async def test_a_resume_goes_on_behind_a_response_without_usage(how: Any, tmp_path: Any) -> None:
    """G5: what was bought is not bought again because its server did not say what it cost."""
    store = SQLiteStore(tmp_path / "runs.db")
    runner = StromaRunner.quick(store=store, budget=ExecutionBudget(max_cost_usd=5.0))
    ask = how({"choices": []}, runner)
    called: list[str] = []

    @runner.node("next", input=Note, output=Note)
    async def after(state: Note) -> Any:
        called.append(state.text)
        return {"text": "done"}

    first = await runner.run([ask, after], Note(), run_id="r")
    assert (first.status, called) == (RunStatus.FAILED, [])
    second = await runner.run([ask, after], Note(), run_id="r", resume=True)
    assert (second.status, called, len(second.trace)) == (RunStatus.RESUMED, ["kept"], 1)


async def test_a_real_stream_that_was_not_asked_for_usage_is_said(
    provider: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The real client's chunks without include_usage: the warning says what to ask for."""
    answer = sse(_CHAT_CHUNKS[0])
    chunks = await asyncio.to_thread(ask_openai, provider.url(answer), answer)
    runner, ask = node_of(({"text": "kept"}, chunks[-1]))
    assert (await runner.run([ask], Note())).status is RunStatus.COMPLETED
    assert "include_usage" in caplog.text


@pytest.mark.core
@pytest.mark.parametrize(("limit", "status"), [(5.0, RunStatus.FAILED), (None, RunStatus.COMPLETED)])
async def test_a_response_without_a_model_is_refused(limit: float | None, status: RunStatus) -> None:
    """A response with tokens but no model cannot be counted in dollars: a limit in dollars refuses it."""
    cohere = next(reply for reply in REPLIES if reply.what == "cohere").answer.body
    runner, ask = node_of(({"text": ""}, cohere), budget=ExecutionBudget(max_cost_usd=limit))
    result = await runner.run([ask], Note())
    assert (result.status, result.total_tokens) == (status, 69)
    assert result.unpriced_models == ["(no model)"]


@pytest.mark.parametrize(
    ("arguments", "figures", "says"),
    [
        ((_CHAT,), {"input_tokens": 1}, "a response and figures"),
        (("text",), {}, "report a provider's response"),
        ((), {"input_tokens": 1, "cached_input_tokens": 2}, "node 'ask': 2 tokens from a cache"),
        ((), {"input_tokens": -1}, "node 'ask' reported -1 tokens"),
        ((), {"tier": 5}, "node 'ask': model and tier of a usage must be"),
    ],
)
async def test_report_usage_refuses_what_makes_no_sense(
    arguments: tuple[Any, ...], figures: dict[str, Any], says: str
) -> None:
    """A wrong argument of report_usage is an error where it is made, and counts nothing."""

    def report() -> dict[str, Any]:
        node = current_node()
        with pytest.raises(UsageError, match=says):
            node.report_usage(*arguments, **figures)
        return {"text": "done"}

    runner, ask = node_of(report)
    result = await runner.run([ask], Note())
    assert (result.status, result.total_tokens) == (RunStatus.COMPLETED, 0)


@pytest.mark.parametrize("event", ["success", "failure"])
async def test_report_usage_counts_before_the_end_of_an_attempt(event: str) -> None:
    """A start hook reports usage of the attempt that begins; an end hook's is refused, not ignored."""

    async def report(*_: Any) -> None:
        current_node().report_usage(input_tokens=10)

    def ask_it() -> dict[str, Any]:
        if event == "failure":
            raise ValueError("no")
        return {"text": "done"}

    ends: Any = {f"on_node_{event}": report}
    at_once = dict.fromkeys(FailureClass, FailurePolicy(max_retries=0))
    runner, ask = node_of(ask_it, policy_map=at_once)
    hooks = NodeHooks(on_node_start=report, **ends)
    result = await runner.with_hooks(hooks).run([ask], Note())
    assert result.total_tokens == 10
    assert [type(one.exception) for one in result.hook_errors] == [UsageError]
    assert "node 'ask' reported usage after attempt 1 was counted" in str(result.hook_errors[0].exception)


async def test_a_tuple_that_is_no_pair_is_what_it_was(provider: Server) -> None:
    """The published tuple forms keep their meaning."""
    for returned, tokens, model in [
        (({"text": ""}, 10), 10, None),
        (({"text": ""}, 10, "gpt-4o"), 10, "gpt-4o"),
        (({"text": ""}, 10, 5, "gpt-4o"), 15, "gpt-4o"),
    ]:
        runner, ask = node_of(returned)
        (event,) = (await runner.run([ask], Note())).trace
        assert (event.usage.tokens, event.usage.model) == (tokens, model)


async def test_what_a_provider_has_charged_is_what_a_call_cost() -> None:
    """``Usage.cost_usd`` counts in place of the model's prices, and without a model or a price."""
    runner = StromaRunner.quick(unknown_model="error", budget=ExecutionBudget(max_cost_usd=1))

    @runner.node("ask", input=Note, output=Note)
    async def ask(state: Note) -> Any:
        node = current_node()
        node.report_usage(Usage(10, 5, model="gpt-4o", cost_usd=0.25))
        node.report_usage(Usage(10, 5, cost_usd=0.5))
        return {"text": "hi"}, Usage(1, 1, model="a model that nobody knows", cost_usd=0.0)

    result = await runner.run([ask], Note())
    assert (result.status, result.total_tokens, result.total_cost_usd) == (RunStatus.COMPLETED, 32, 0.75)
