"""Durable agents of the OpenAI Agents SDK, killed at random records: in one process, and with SIGKILL."""

from pathlib import Path
from typing import Any

import pytest
from agents import Agent, function_tool, set_tracing_disabled
from pydantic import BaseModel
from tests.frameworks.durable_kit import KINDS, Bill, approve_with, kill_at_random_records, kill_workers
from tests.frameworks.openai_agents.test_durable_agents import Fake, asks, outputs_of, says
from tests.kit import Num
from tests.shared_stores import SHARED

from stroma import Flow, NotDone, current_node, stroma_flow
from stroma.adapters.openai_agents import DurableRunner, ToolApproval

set_tracing_disabled(True)


class Report(BaseModel):
    text: str
    tokens: int
    items: int


class Research(Bill):
    """Thirteen requests: parallel searches, an agent as a tool, a charge with approval, and a handoff."""

    def __init__(self, *, streamed: bool, side: Path | None = None) -> None:
        super().__init__(side)
        self.streamed = streamed

    def flow(self) -> Any:
        @function_tool
        async def search(what: str) -> str:
            self.pay(f"search {what}")
            return f"found {what}"

        @function_tool
        def look_up(topic: str) -> str:
            self.pay(f"look up {topic}")
            return topic

        @function_tool(needs_approval=True)
        async def charge(cents: int) -> int:
            self.pay(f"charge {cents}", current_node().idempotency_key)
            return cents

        writer: Agent[Any] = Agent(name="writer", model=Fake(self._write), tools=[look_up])
        closer: Agent[Any] = Agent(name="closer", model=Fake(self._close))
        lead: Agent[Any] = Agent(
            name="lead",
            model=Fake(self._lead),
            tools=[search, charge, writer.as_tool("write", "Write.")],
            handoffs=[closer],
        )
        runner = DurableRunner(
            tools={"charge": {"effect": True, "reconcile": lambda _, key: self.charges.get(key, NotDone())}}
        )

        @stroma_flow("research", input=Num, output=Report)
        async def research(flow: Flow, state: Num) -> Report:
            result: Any
            if self.streamed:
                result = runner.run_streamed(lead, f"go {state.n}", max_turns=20)
                async for _ in result.stream_events():
                    pass
            else:
                result = await runner.run(lead, f"go {state.n}", max_turns=20)
            tokens = result.context_wrapper.usage.total_tokens
            return Report(text=result.final_output, tokens=tokens, items=len(result.new_items))

        return research

    def _lead(self, items: Any) -> list[Any]:
        done = len(outputs_of(items))
        self.pay(f"lead {done}")
        if done < 10:
            return asks(*(("search", {"what": f"{done}{side}"}, f"s{done}{side}") for side in "ab"))
        if done == 10:
            return asks(*(("write", {"input": topic}, f"w{topic}") for topic in ("one", "two")))
        return asks(("charge", {"cents": 500}, "c")) if done == 12 else asks(("transfer_to_closer", {}, "h"))

    def _write(self, items: Any) -> list[Any]:
        topic = items[0]["content"] if isinstance(items, list) else items
        self.pay(f"writer {topic} {len(outputs_of(items))}")
        return says(f"{topic} written") if outputs_of(items) else asks(("look_up", {"topic": topic}, topic))

    def _close(self, items: Any) -> list[Any]:
        self.pay("closer")
        return says(f"the end of {len(outputs_of(items))}")


approve = approve_with(ToolApproval(approved=True))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_killed_agents_end_as_undisturbed_ones(kind: str, streamed: bool) -> None:
    """G5, G13: Killed at random records, the agents have the answer, the items and the bill that they have
    undisturbed; what was called again was in flight, and the charge is made once."""
    await kill_at_random_records(kind, lambda: Research(streamed=streamed), approve, in_flight=2)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", SHARED)
def test_workers_finish_the_agents_of_killed_ones(kind: str) -> None:
    """G5, G13: The same for workers that are killed with SIGKILL: another one takes over."""
    kill_workers(kind, lambda side: Research(streamed=True, side=side), approve, in_flight=2)
