"""litellm: real requests with and without the guard, to a local provider in the process."""

import asyncio
from collections.abc import Iterator
from typing import Any

import litellm
import pytest
from litellm import CustomLLM, ModelResponse
from tests.frameworks.kit import Seen, emitted_by, fifty_at_once, guard_of, lines_of, result_of, spent

from stroma import BudgetExceeded, ExecutionBudget
from stroma.adapters import Guard
from stroma.adapters.litellm import attach

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["completion", "acompletion"]
MESSAGES = [{"role": "user", "content": "How warm is it?"}]


class Provider(CustomLLM):
    """Answers what it is told to; raises exceptions, in a stream after one word. Has a token ledger."""

    def __init__(self, *answers: Any) -> None:
        super().__init__()
        self.answers, self.asked, self.ledger = list(answers), 0, list[int]()

    def _answer(self) -> tuple[str, dict[str, int]]:
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else "It is 4 C"
        if isinstance(answer, Exception):
            raise answer
        prompt, tokens = 10, 10 + len(self.ledger) % 7
        self.ledger.append(prompt + tokens)
        return answer, {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def completion(self, *_: Any, **__: Any) -> ModelResponse:
        text, used = self._answer()
        message = litellm.Message(role="assistant", content=text)
        choice = litellm.Choices(finish_reason="stop", index=0, message=message)
        return ModelResponse(choices=[choice], usage=litellm.Usage(**used), model="fake-1")

    async def acompletion(self, *_: Any, **__: Any) -> ModelResponse:
        await asyncio.sleep(0)
        return self.completion()

    def streaming(self, *_: Any, **__: Any) -> Iterator[Any]:
        text, used = self._answer()
        words = text.split()
        for number, word in enumerate(words):
            if word == "LOST":
                raise ConnectionError("lost")
            last = number == len(words) - 1
            yield {
                "text": word + ("" if last else " "),
                "index": 0,
                "tool_use": None,
                "is_finished": last,
                "finish_reason": "stop" if last else "",
                "usage": used if last else None,
            }

    async def astreaming(self, *_: Any, **__: Any) -> Any:
        for part in self.streaming():
            await asyncio.sleep(0)
            yield part


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Provider:
    """A provider, behind a litellm that is as it was when the test has ended."""
    fake = Provider()
    monkeypatch.setattr(litellm, "custom_provider_map", [{"provider": "fake", "custom_handler": fake}])
    litellm.utils.custom_llm_setup()
    for name in (
        "completion",
        "acompletion",
        "text_completion",
        "atext_completion",
        "embedding",
        "aembedding",
    ):
        monkeypatch.setattr(litellm, name, getattr(litellm, name))
    for name in ("responses", "aresponses"):
        monkeypatch.setattr(litellm, name, getattr(litellm, name))
    return fake


def ask(kind: str, **options: Any) -> str:
    """Return the answer, whole or of its parts."""
    options = {"model": "fake/fake-1", "messages": MESSAGES, "num_retries": 0, "max_retries": 0, **options}

    async def main() -> str:
        response = await litellm.acompletion(**options)
        if not options.get("stream"):
            return str(response.choices[0].message.content)
        return "".join([text_of(part) async for part in response])

    if kind == "acompletion":
        return asyncio.run(main())
    response = litellm.completion(**options)
    if not options.get("stream"):
        return str(response.choices[0].message.content)
    return "".join(text_of(part) for part in response)


def text_of(part: Any) -> str:
    """Return the text of a part; the last one has the usage, and no choice."""
    return part.choices[0].delta.content or "" if part.choices else ""


STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_a_step_and_its_answer_the_same(kind: str, options: Any, provider: Provider) -> None:
    """The answer is litellm's own, a failed request alone is made again, and each token counts once."""
    expected = ask(kind, **options)
    guard = guard_of()
    attach(attach(litellm, guard), guard)
    provider.answers, before = [ConnectionError("gone")], sum(provider.ledger)
    with guard.run():
        assert ask(kind, **options) == expected == "It is 4 C"
    assert lines_of(guard) == ["model failure", f"model success {sum(provider.ledger) - before}"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_streamed_answer_is_emitted(kind: str, provider: Provider) -> None:
    """The node around a request emits each part of a streamed answer once, and of no other."""
    attach(litellm, guard_of())
    emitted = emitted_by(lambda: ask(kind, **STREAMED))
    assert emitted == [("delta", "It "), ("delta", "is "), ("delta", "4 "), ("delta", "C")]
    assert emitted_by(lambda: ask(kind)) == []


def test_a_stream_without_usage_is_estimated(provider: Provider) -> None:
    """Where a stream does not report its tokens, litellm's own count of them is what counts."""
    attach(litellm, guard := guard_of())
    with guard.run():
        assert ask("completion", stream=True) == "It is 4 C"
    assert result_of(guard).total_tokens > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_not_made_again_after_its_first_part(kind: str, provider: Provider) -> None:
    """What a caller has seen is not made a second time."""
    attach(litellm, guard := guard_of())
    provider.answers = ["It LOST", "again"]
    with pytest.raises(Exception, match="lost"), guard.run():
        ask(kind, **STREAMED)
    assert provider.asked == 1


def test_a_reader_that_has_enough_has_paid_for_what_it_read(provider: Provider) -> None:
    """A stream that is closed ends its step; its attributes are those of litellm's."""
    attach(litellm, guard := guard_of())
    with guard.run(), litellm.completion(model="fake/fake-1", messages=MESSAGES, **STREAMED) as stream:
        assert isinstance(stream.model, str)
        next(stream)
    assert [line.split()[:2] for line in lines_of(guard)] == [["model", "cancelled"]]


async def test_a_reader_of_an_async_stream_that_has_enough(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An async stream that is closed ends its step, and closes litellm's: no request goes on unread."""
    closed: list[Any] = []

    async def close(stream: Any) -> None:
        closed.append(stream.model)

    monkeypatch.setattr(litellm.CustomStreamWrapper, "aclose", close)
    attach(litellm, guard := guard_of())
    async with guard.run():
        asked = litellm.acompletion(model="fake/fake-1", messages=MESSAGES, **STREAMED)
        async with await asked as stream:
            await anext(stream)
    assert closed == ["fake-1"]
    assert [line.split()[:2] for line in lines_of(guard)] == [["model", "cancelled"]]


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_stops_requests_to_the_token(kind: str, options: Any, provider: Provider) -> None:
    """The request that crosses the limit is the last one."""
    attach(litellm, guard := guard_of(budget=ExecutionBudget(max_tokens_total=30)))
    with pytest.raises(BudgetExceeded), guard.run():
        for _ in range(9):
            ask(kind, **options)
    assert (provider.asked, result_of(guard).total_tokens) == (2, sum(provider.ledger))


def test_fifty_runs_at_once_spend_what_the_provider_has_counted(provider: Provider) -> None:
    """Each in its own run, streamed or not, to the token."""
    seen = Seen()
    attach(litellm, guard := guard_of(seen))

    async def one(number: int) -> None:
        async with guard.run(number):
            await litellm.acompletion(model="fake/fake-1", messages=MESSAGES)
            response = await litellm.acompletion(model="fake/fake-1", messages=MESSAGES, **STREAMED)
            assert "".join([text_of(part) async for part in response]) == "It is 4 C"

    fifty_at_once(one)
    assert len(provider.ledger) == 100
    assert spent(seen, guard) == (50, sum(provider.ledger))


def test_what_litellm_says_it_cost_is_what_it_cost(provider: Provider) -> None:
    """Its own prices are the truth where it has one."""
    attach(litellm, guard := guard_of())
    with guard.run():
        response = litellm.completion(model="gpt-4o", messages=MESSAGES, mock_response="It is 4 C")
    assert result_of(guard).total_cost_usd == pytest.approx(litellm.completion_cost(response))


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["whole", "streamed"])
def test_a_model_that_costs_nothing_runs_under_a_cost_limit(options: Any, provider: Provider) -> None:
    """A cost of 0 is a cost, as a local model has it, and no missing price."""
    attach(litellm, guard := guard_of(budget=ExecutionBudget(max_cost_usd=1)))
    with guard.run():
        local = {"model": "ollama/llama3", "mock_response": "It is 4 C"}
        assert ask("completion", **local, **options) == "It is 4 C"
    assert (result_of(guard).total_cost_usd, result_of(guard).unpriced_models) == (0, [])


def test_a_model_that_litellm_lists_without_a_price_has_ours(provider: Provider) -> None:
    """A cost of 0 is none for a model whose price is known."""
    attach(litellm, guard := guard_of())
    with guard.run():
        ask("completion", model="heroku/claude-4-sonnet", mock_response="It is 4 C")
    assert result_of(guard).total_cost_usd > 0


def test_another_guard_is_an_error(provider: Provider) -> None:
    """One guard at a time."""
    attach(litellm, Guard())
    with pytest.raises(ValueError, match="another guard"):
        attach(litellm, Guard())
