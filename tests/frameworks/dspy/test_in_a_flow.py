"""Programs of DSPy in the body of a flow, unmodified: ``acall`` of their LM and their tools call steps."""

import asyncio
from typing import Any

import dspy
from tests.frameworks.body_kit import Steps, ended_in_a_flow, run_in_a_flow


def respond(messages: list[Any]) -> Any:
    text = str(messages)
    if "next_tool_name" not in text:
        fields = {"reasoning": "so", "answer": "tea"}
    elif "observation_0" in text:
        fields = {"next_thought": "so", "next_tool_name": "finish", "next_tool_args": "{}"}
    else:
        fields = {"next_thought": "so", "next_tool_name": "weather", "next_tool_args": '{"city": "Oslo"}'}
    return "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in fields.items())


class StepLM(dspy.BaseLM):
    """Its ``acall`` is a step; that of DSPy prepares its request in a thread."""

    def __init__(self, steps: Steps) -> None:
        super().__init__(model="fake")
        self.steps = steps

    async def acall(self, prompt: Any = None, messages: Any = None, **_: Any) -> Any:
        return [{"text": await self.steps.ask(messages)}]


async def test_predictors_resume() -> None:
    """G5: Predictors that are awaited side by side resume at every record."""

    async def body(steps: Steps) -> Any:
        with dspy.context(lm=StepLM(steps)):
            program = dspy.ChainOfThought("question -> answer")
            found = await asyncio.gather(*(program.acall(question=str(n)) for n in range(3)))
        return [one.answer for one in found]

    response, made = await run_in_a_flow(body, respond)
    assert (response, made) == (["tea"] * 3, ["model"] * 3)


async def test_agents_with_tools_resume() -> None:
    """G5: So does ReAct, whose async tools call steps."""

    async def body(steps: Steps) -> Any:
        with dspy.context(lm=StepLM(steps)):
            agent = dspy.ReAct("question -> answer", tools=[steps.weather])
            return (await agent.acall(question="q")).answer

    response, made = await run_in_a_flow(body, respond)
    assert (response, made) == ("tea", ["model", "weather", "model", "model"])


async def test_an_lm_of_dspy_is_refused() -> None:
    """An LM without an ``acall`` of its own waits for a thread, or for its provider: the body refuses it."""

    class Plain(dspy.BaseLM):
        async def aforward(self, prompt: Any = None, messages: Any = None, **_: Any) -> Any:
            return await asyncio.to_thread(str)

    async def body(steps: Steps) -> Any:
        with dspy.context(lm=Plain(model="fake")):
            return (await dspy.Predict("question -> answer").acall(question="q")).answer

    assert "the body of a flow waits for its steps" in await ended_in_a_flow(body)
