"""A pipeline whose generator fails once: called again on what it was given, and the journal keeps both attempts.

    python examples/adapter_haystack.py

Needs `pip install "stroma-runner[haystack]"`, and neither a key nor a network. Prints:

> it is 4 C
> ask 1 success, llm 1 failure, llm 2 success
> 40 tokens
"""

from typing import Any

from haystack import Pipeline, component
from haystack.dataclasses import ChatMessage

from stroma import InMemoryStore, StromaRunner
from stroma.adapters import Guard
from stroma.adapters.haystack import attach

answers: list[Any] = [ConnectionError("gone"), "it is 4 C"]


@component
class Ask:
    @component.output_types(messages=list[ChatMessage])
    def run(self, text: str) -> Any:
        return {"messages": [ChatMessage.from_user(text)]}


@component
class FakeGenerator:
    @component.output_types(replies=list[ChatMessage])
    def run(self, messages: list[ChatMessage]) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        used = {"prompt_tokens": 30, "completion_tokens": 10}
        return {"replies": [ChatMessage.from_assistant(answer, meta={"usage": used})]}


pipeline = Pipeline()
pipeline.add_component("ask", Ask())
pipeline.add_component("llm", FakeGenerator())
pipeline.connect("ask.messages", "llm.messages")

store = InMemoryStore()
attach(pipeline, Guard(StromaRunner.quick(store=store)))
print(">", pipeline.run({"ask": {"text": "How warm is it?"}})["llm"]["replies"][0].text)

(run,) = store.list_runs()
attempts = store.attempts(run.run_id)
print(">", ", ".join(f"{tried.node_id} {tried.attempt} {tried.outcome}" for tried in attempts))
print(f"> {run.tokens} tokens")
