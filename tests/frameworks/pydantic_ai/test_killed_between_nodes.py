"""Pydantic AI killed between the nodes of an agent: its message history and our journal, in files."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai import Agent, ModelRequestNode
from pydantic_ai.messages import ModelMessagesTypeAdapter, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.usage import RequestUsage
from tests.frameworks.kit import PAID, Ledger, answer, check_killed, die, guard_of, holds

from stroma.adapters.pydantic_ai import StromaCapability

#: What the agent does, one call after another: "ask" is a request of its model, "tool" a call of its tool.
CALLS = ("ask 1", "tool 1", "ask 2", "tool 2", "ask 3")


def live(folder: str, dies_before: str) -> None:
    """One process: run the agent and store its messages before each node, or go on from them."""
    ledger, history = Ledger(folder), Path(folder, "history")

    def work(name: str) -> None:
        if name == dies_before:
            die()
        ledger.pay(name)

    def respond(messages: Any, _: Any) -> ModelResponse:
        number = 1 + sum(isinstance(message, ModelResponse) for message in messages)
        work(f"ask {number}")
        part: Any = TextPart("done") if number == 3 else ToolCallPart("tool", {"n": number})
        return ModelResponse(parts=[part], usage=RequestUsage(input_tokens=1), model_name="gpt-4o")

    guard = guard_of(store=str(Path(folder, "r.db")), run_id="r", resume=True, lease_seconds=0.2)
    agent = Agent(FunctionModel(respond), name="a", capabilities=[StromaCapability(guard)])

    @agent.tool_plain
    def tool(n: int) -> str:
        work(f"tool {n}")
        return f"result {n}"

    async def main() -> str:
        stored = ModelMessagesTypeAdapter.validate_json(history.read_bytes()) if history.exists() else None
        prompt = "go" if stored is None else None
        async with agent.iter(prompt, message_history=stored) as run:
            async for node in run:
                messages = run.ctx.state.message_history
                if isinstance(node, ModelRequestNode):
                    messages = [*messages, node.request]
                if messages:
                    new = history.with_suffix(".new")
                    new.write_bytes(ModelMessagesTypeAdapter.dump_json(messages))
                    new.replace(history)
        return str(run.result.output)

    answer(folder, asyncio.run(main()))


@pytest.mark.nightly
@pytest.mark.timeout(600)
@holds("killed")
@pytest.mark.parametrize("dies_before", CALLS)
def test_killed_between_nodes_it_goes_on_and_pays_for_nothing_twice(dies_before: str, tmp_path: Path) -> None:
    """After SIGKILL at a boundary, the stored history gives the right answer in one run, paid once."""
    check_killed(live, tmp_path, dies_before, ("done", CALLS, len(CALLS) * PAID + 3))
