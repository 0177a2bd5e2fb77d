"""OpenAI Agents SDK killed between its turns: its own state of a run and our journal, both in files."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, RunState, function_tool, set_tracing_disabled
from tests.frameworks.kit import PAID, Ledger, answer, check_killed, die, guard_of, holds
from tests.frameworks.openai_agents.test_openai_agents import Script

from stroma import current_node
from stroma.adapters.openai_agents import GuardedRunner, attach

set_tracing_disabled(True)
#: What the agent does; before each tool it has a state, in which the tool waits for its approval.
CALLS = ("ask 1", "tool 1", "ask 2", "tool 2", "ask 3")
#: What is called again after a kill before a call: that behind the last state.
AGAIN = {"ask 2": ["tool 1"], "ask 3": ["tool 2"]}


class Asking(Script):
    """Calls a tool twice, and answers."""

    def __init__(self, work: Any) -> None:
        super().__init__(tokens=1)
        self.work = work

    async def get_response(self, system_instructions: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        done = [
            item for item in input if isinstance(item, dict) and item.get("type") == "function_call_output"
        ]
        number = 1 + len(done)
        self.work(f"ask {number}")
        self.answers = ["done"] if number == 3 else [("tool", {"n": number})]
        self.asked = [None] * number  # The ids of calls are made of it.
        return await super().get_response(system_instructions, input, *args, **kwargs)


def live(folder: str, dies_before: str) -> None:
    """One process: run the agent and store the state of each interruption, or go on from it."""
    ledger, stored = Ledger(folder), Path(folder, "state")

    def work(name: str) -> None:
        if name == dies_before:
            die()
        ledger.pay(f"{name}|{current_node().idempotency_key}")

    @function_tool(needs_approval=True)
    def tool(n: int) -> str:
        """Do something that costs money."""
        work(f"tool {n}")
        return f"result {n}"

    async def main() -> str:
        while True:
            guard = guard_of(store=str(Path(folder, "r.db")), run_id="r", resume=True, lease_seconds=0.2)
            agent = attach(Agent(name="a", model=Asking(work), tools=[tool]), guard)
            value: Any = "go"
            if stored.exists():
                value = await RunState.from_string(agent, stored.read_text("utf-8"))
                value.approve(value.get_interruptions()[0])
            result = await GuardedRunner(guard).run(agent, value)
            if not result.interruptions:
                return str(result.final_output)
            new = stored.with_suffix(".new")
            new.write_text(result.to_state().to_string(), "utf-8")
            new.replace(stored)

    answer(folder, asyncio.run(main()))


@pytest.mark.nightly
@pytest.mark.timeout(600)
@holds("killed")
@pytest.mark.parametrize("dies_before", CALLS)
def test_killed_between_turns_it_goes_on_from_its_last_state(dies_before: str, tmp_path: Path) -> None:
    """After SIGKILL at a boundary, the stored state gives the right answer in one run, paid for once."""
    again, at = AGAIN.get(dies_before, []), CALLS.index(dies_before)
    calls = [*CALLS[:at], *again, *CALLS[at:]]
    check_killed(live, tmp_path, dies_before, ("done", calls, len(calls) * PAID + 3))
    assert len(set(Ledger(tmp_path).calls)) == len(CALLS)
