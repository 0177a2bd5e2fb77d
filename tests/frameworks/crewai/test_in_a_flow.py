"""CrewAI in the body of a flow: refused, as it works with threads; a crew is one step of a flow."""

from importlib.metadata import version
from typing import Any

import pytest
from crewai import Agent, BaseLLM, Crew, Task
from crewai.flow.flow import Flow as CrewFlow
from crewai.flow.flow import start
from tests.frameworks.body_kit import Steps, ended_in_a_flow
from tests.kit import Num

from stroma import Flow, InMemoryStore, NodeContract, StromaRunner, stroma_flow, stroma_node


class FakeLLM(BaseLLM):
    def call(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        return "Thought: I now can give a great answer\nFinal Answer: tea"


def crew() -> Crew:
    agent = Agent(role="r", goal="g", backstory="b", llm=FakeLLM(model="fake"))
    return Crew(agents=[agent], tasks=[Task(description="d", expected_output="e", agent=agent)])


class Draft(CrewFlow[Num]):
    @start()
    async def draft(self) -> str:
        return "tea"


@pytest.mark.skipif(version("crewai").startswith("1.13."), reason="not all of it waits for threads")
@pytest.mark.parametrize("kind", ["flow", "akickoff", "kickoff_async"])
async def test_it_waits_for_threads_and_is_refused(kind: str) -> None:
    """The body refuses a flow and a crew, which wait for threads of their event bus and plain calls."""

    async def body(steps: Steps) -> Any:
        if kind == "flow":
            return await Draft().kickoff_async()
        return await getattr(crew(), kind)()

    message = await ended_in_a_flow(body)
    assert "the body of a flow waits for its steps" in message or "no step, timer or question" in message


async def test_a_crew_is_one_step() -> None:
    """A crew in a node of a flow is one step: what is inside it is called again if it did not end."""

    async def ask(state: Num) -> Any:
        return {"n": len((await crew().kickoff_async()).raw)}

    node: Any = stroma_node("crew", NodeContract(node_id="crew", input_schema=Num, output_schema=Num))(ask)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        number: Num = await flow.step(node, state)
        return number

    store = InMemoryStore()
    result = await StromaRunner.quick(store=store, run_id="r").run(f, Num())
    assert result.output == Num(n=len("tea"))
    assert [one.node_id for one in store.attempts("r")] == ["f", "crew"]
