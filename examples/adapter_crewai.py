"""A flow whose LLM fails once: the call is made again, the flow goes on, and its bill is right.

    python examples/adapter_crewai.py

Needs `pip install "stroma-runner[crewai]"` on Python before 3.14, and neither a key nor a network. Prints:

> tea is a drink
> draft: llm failure, llm success
> polish: llm success
> 120 tokens
"""

import os

os.environ.update(CREWAI_DISABLE_TELEMETRY="true", CREWAI_TRACING_ENABLED="false", OTEL_SDK_DISABLED="true")

from typing import Any

from crewai import BaseLLM
from crewai.flow.flow import Flow, listen, start
from pydantic import BaseModel

from stroma import StromaRunner
from stroma.adapters import Guard
from stroma.adapters.crewai import attach, guard_llm

answers: list[Any] = [ConnectionError("gone"), "tea", "tea is a drink"]


class FakeLLM(BaseLLM):
    def call(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        self._track_token_usage_internal({"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40})
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


guard = Guard(StromaRunner.quick())
llm = guard_llm(FakeLLM(model="fake"), guard)


class State(BaseModel):
    topic: str = "tea"


class Writing(Flow[State]):
    @start()
    def draft(self) -> Any:
        return llm.call(f"Write about {self.state.topic}")

    @listen(draft)
    def polish(self, text: str) -> Any:
        return llm.call(f"Polish: {text}")


print(">", attach(Writing(), guard).kickoff())
assert guard.last is not None
result = guard.last.result
for event in result.trace:
    inside = ", ".join(f"{child.node_id} {child.outcome}" for child in event.children)
    print(f"> {event.node_id}: {inside}")
print(f"> {result.total_tokens} tokens")
