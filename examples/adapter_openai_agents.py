"""Two agents that hand off to each other, under one budget; the journal keeps what they did.

    python examples/adapter_openai_agents.py

Needs `pip install "stroma-runner[openai-agents]"`, and neither a key nor a network. Prints:

> billing: paid
> triage success, model success, billing success, model failure, model success
> in the journal: COMPLETED, 80 tokens
"""

from typing import Any

from agents import Agent, Model, ModelResponse, Usage, set_tracing_disabled
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

from stroma import InMemoryStore, StromaRunner
from stroma.adapters import Guard
from stroma.adapters.openai_agents import GuardedRunner, attach

set_tracing_disabled(True)


class FakeModel(Model):
    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def get_response(
        self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any
    ) -> ModelResponse:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return ModelResponse(
            output=[answer], usage=Usage(1, 30, output_tokens=10, total_tokens=40), response_id=None
        )

    def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


text = ResponseOutputText(text="paid", type="output_text", annotations=[])
done = ResponseOutputMessage(id="2", content=[text], role="assistant", status="completed", type="message")
hand_off = ResponseFunctionToolCall(
    name="transfer_to_billing", arguments="{}", call_id="1", type="function_call"
)

store = InMemoryStore()
guard = Guard(StromaRunner.quick(store=store))
billing = Agent(name="billing", model=FakeModel(TimeoutError("slow"), done))
triage = attach(Agent(name="triage", model=FakeModel(hand_off), handoffs=[billing]), guard)

result = GuardedRunner(guard).run_sync(triage, "Please pay.")
print(f"> {result.last_agent.name}: {result.final_output}")
assert guard.last is not None
print(">", ", ".join(f"{event.node_id} {event.outcome}" for event in guard.last.ctx.trace.walk()))
(run,) = store.list_runs()
print(f"> in the journal: {run.status}, {run.tokens} tokens")
