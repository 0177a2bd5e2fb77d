"""A realistic durable agent of Pydantic AI, killed at random records: in one process, and by workers."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel
from pydantic_ai.usage import RequestUsage
from tests.frameworks.durable_kit import KINDS, Bill, approve_with, kill_at_random_records, kill_workers
from tests.kit import Num
from tests.shared_stores import SHARED

from stroma import Flow, NotDone, current_node, stroma_flow

pytest.importorskip("stroma.adapters._pydantic_ai_durability", exc_type=ImportError)
from stroma.adapters.pydantic_ai import StromaDurability, ToolApproval


class Report(BaseModel):
    text: str
    tokens: int
    messages: int


class Research(Bill):
    """Twelve requests: a streamed plan, searches in parallel, a sub-agent, an approved charge, an answer."""

    def flow(self) -> Any:
        writer = self._writer()
        model = FunctionModel(self._respond, stream_function=self._stream)
        agent = Agent(model, name="lead", capabilities=[StromaDurability(event_stream_handler=_read)])

        @agent.tool_plain
        async def search(what: str) -> str:
            self.pay(f"search {what}")
            return f"found {what}"

        @agent.tool_plain(metadata={"stroma": False})
        async def write(topic: str) -> str:
            return (await writer.run(topic)).output

        @agent.tool_plain(
            requires_approval=True, metadata={"stroma": {"effect": True, "reconcile": self._look}}
        )
        async def charge(cents: int) -> int:
            self.pay(f"charge {cents}", current_node().idempotency_key)
            return cents

        @stroma_flow("research", input=Num, output=Report)
        async def research(flow: Flow, state: Num) -> Report:
            result = await agent.run(f"go {state.n}")
            used = result.usage
            return Report(text=result.output, tokens=used.total_tokens, messages=len(result.all_messages()))

        return research

    def _writer(self) -> Agent[None, str]:
        def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
            topic = str(messages[0].parts[0].content)
            self.pay(f"writer {topic} {len(messages)}")
            parts: list[Any] = [TextPart(f"{topic} written")]
            if len(messages) == 1:
                parts = [ToolCallPart("look_up", {"topic": topic})]
            return ModelResponse(parts=parts, usage=RequestUsage(input_tokens=3, output_tokens=1))

        writer = Agent(FunctionModel(respond), name="writer", capabilities=[StromaDurability()])

        @writer.tool_plain
        async def look_up(topic: str) -> str:
            self.pay(f"look up {topic}")
            return topic

        return writer

    async def _stream(self, messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        step = sum(isinstance(message, ModelResponse) for message in messages)
        self.pay(f"lead {step}")
        calls: list[tuple[str, str]] = []
        if step < 6:
            calls = [("search", f'{{"what": "{step}{side}"}}') for side in "ab"]
        elif step == 6:
            calls = [("write", f'{{"topic": "{topic}"}}') for topic in ("one", "two")]
        elif step == 7:
            calls = [("charge", '{"cents": 500}')]
        if not calls:
            yield "the "
            yield "end"
        for index, (name, arguments) in enumerate(calls):
            delta: DeltaToolCalls = {index: DeltaToolCall(name, arguments, tool_call_id=f"{step}-{index}")}
            yield delta

    def _respond(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        raise AssertionError("the answers of this agent are streamed")

    def _look(self, arguments: dict[str, Any], key: str) -> Any:
        return self.charges.get(key, NotDone())


async def _read(_: Any, events: Any) -> None:
    async for _event in events:
        pass


approve = approve_with(ToolApproval(approved=True))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_killed_agent_ends_as_an_undisturbed_one(kind: str) -> None:
    """G5, G13: Killed at random records, the agent has the answer, the messages and the bill that it has
    undisturbed; what was called again was in flight, and the charge is made once."""
    await kill_at_random_records(kind, Research, approve, in_flight=2)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", SHARED)
def test_workers_finish_the_agents_of_killed_ones(kind: str) -> None:
    """G5, G13: The same for workers that are killed with SIGKILL: another one takes over."""
    kill_workers(kind, Research, approve, in_flight=2)
