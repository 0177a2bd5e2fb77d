"""Frameworks whose models call litellm, with a guard on both: each token counts once."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import crewai
import dspy
import litellm
import pytest
from agents import Model
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langgraph.graph import START, MessagesState, StateGraph
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import PrivateAttr
from tests.frameworks.kit import emitted_by, guard_of, lines_of, result_of

from stroma.adapters import Guard
from stroma.adapters.crewai import guard_llm
from stroma.adapters.dspy import attach as attach_dspy
from stroma.adapters.langgraph import attach as attach_langgraph
from stroma.adapters.litellm import attach as attach_litellm
from stroma.adapters.openai_agents import GuardedModel

pytestmark = pytest.mark.filterwarnings("ignore")
#: The tokens that litellm counts for a made-up answer.
TOKENS = 30


def complete() -> Any:
    """Make a request that litellm answers itself."""
    messages = [{"role": "user", "content": "x"}]
    return litellm.completion(model="gpt-4o", messages=messages, mock_response="hi")


def stream() -> Iterator[str]:
    """Stream an answer that litellm makes up itself."""
    messages = [{"role": "user", "content": "x"}]
    for part in litellm.completion(
        model="gpt-4o", messages=messages, mock_response="It is cold", stream=True
    ):
        yield part.choices[0].delta.content or ""


class Chat(BaseChatModel):
    """A chat model of LangChain that asks litellm, or says itself that it used as many tokens."""

    _asks: list[bool] = PrivateAttr(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "chat"

    def _stream(self, *_: Any, **__: Any) -> Any:
        words = stream() if self._asks.pop(0) else iter(["own ", "words"])
        for word in words:
            yield ChatGenerationChunk(message=AIMessageChunk(word))

    def _generate(self, *_: Any, **__: Any) -> ChatResult:
        input_tokens, output_tokens = 10, 20
        if self._asks.pop(0):
            used = complete().usage
            input_tokens, output_tokens = used.prompt_tokens, used.completion_tokens
        usage: Any = {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": TOKENS}
        message = AIMessage("hi", usage_metadata=usage, response_metadata={"model_name": "gpt-4o"})
        return ChatResult(generations=[ChatGeneration(message=message)])


class Agent(Model):
    """A model of the OpenAI Agents SDK that asks litellm, and streams what that says."""

    async def get_response(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    async def stream_response(self, *_: Any, **__: Any) -> Any:
        for word in stream():
            yield ResponseTextDeltaEvent(
                content_index=0,
                delta=word,
                item_id="1",
                output_index=0,
                sequence_number=1,
                logprobs=[],
                type="response.output_text.delta",
            )


def langgraph(guard: Guard, *asks: bool) -> None:
    """Call a node that asks a chat model, as often as there are ``asks``: whether through litellm."""
    chat = Chat()
    chat._asks = list(asks)
    graph = StateGraph(MessagesState)
    graph.add_node("ask", lambda _: {"messages": [chat.invoke("x") for _ in asks]})
    graph.add_edge(START, "ask")
    attach_langgraph(graph.compile(), guard).invoke({"messages": []})


class Crew(crewai.BaseLLM):
    """An LLM of CrewAI that asks litellm."""

    def call(self, *_: Any, **__: Any) -> Any:
        self._track_token_usage_internal(dict(complete().usage))
        return "hi"


def crew(guard: Guard, *asks: bool) -> None:
    llm = guard_llm(Crew(model="gpt-4o"), guard)
    with guard.run():
        for _ in asks:
            llm.call("x")


def predictor(guard: Guard, *asks: bool) -> None:
    answer = "[[ ## answer ## ]]\nhi\n\n[[ ## completed ## ]]"
    options: Any = {"mock_response": answer, "api_key": "none", "cache": False}
    program = attach_dspy(dspy.Predict("question -> answer"), guard)
    with dspy.context(lm=dspy.LM("openai/gpt-4o", **options)), guard.run():
        for _ in asks:
            program(question="x")


@pytest.fixture(autouse=True)
def _litellm_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("completion", "acompletion", "text_completion", "atext_completion", "embedding"):
        monkeypatch.setattr(litellm, name, getattr(litellm, name))
    for name in ("aembedding", "responses", "aresponses"):
        monkeypatch.setattr(litellm, name, getattr(litellm, name))


@pytest.mark.parametrize("program", [langgraph, crew, predictor])
def test_tokens_are_counted_once_by_the_innermost_step(program: Callable[..., None]) -> None:
    """The framework reports the same tokens as litellm, which is a step inside of its own."""
    attach_litellm(litellm, guard := guard_of())
    program(guard, True, True)
    assert result_of(guard).total_tokens == 2 * TOKENS
    counted = [line.strip() for line in lines_of(guard) if line.endswith(f" {TOKENS}")]
    assert counted == [f"model success {TOKENS}"] * 2


def test_a_call_of_another_provider_counts_beside_one_of_litellm() -> None:
    """Also if both use as many tokens, in one step."""
    attach_litellm(litellm, guard := guard_of())
    langgraph(guard, True, False)
    assert lines_of(guard) == [f"ask success {TOKENS}", f"  model success {TOKENS}"]


def test_a_streamed_answer_is_emitted_once() -> None:
    """By the step of litellm, not the framework; that of another provider by the framework."""
    attach_litellm(litellm, guard := guard_of())

    def node(chat: Chat) -> Any:
        return {"messages": [part for _ in range(2) for part in chat.stream("x")]}

    def graph() -> None:
        chat = Chat()
        chat._asks = [True, False]
        builder = StateGraph(MessagesState)
        builder.add_node("ask", lambda _: node(chat))
        builder.add_edge(START, "ask")
        attach_langgraph(builder.compile(), guard).invoke({"messages": []})

    litellms = "It is cold"
    assert "".join(data for _, data in emitted_by(graph)) == f"{litellms}own words"

    async def model() -> None:
        async with guard.run():
            async for _ in GuardedModel(Agent(), guard).stream_response():
                pass

    assert "".join(data for _, data in emitted_by(lambda: asyncio.run(model()))) == litellms


def test_an_answer_from_the_cache_of_litellm_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the framework around it reports the tokens of the call that filled the cache."""
    bare = litellm.completion

    def cached(*args: Any, **kwargs: Any) -> Any:
        response = bare(*args, **kwargs)
        response._hidden_params["cache_hit"] = True
        return response

    monkeypatch.setattr(litellm, "completion", cached)
    attach_litellm(litellm, guard := guard_of())
    langgraph(guard, True, True)
    assert lines_of(guard) == ["ask success", "  model success", "  model success"]
