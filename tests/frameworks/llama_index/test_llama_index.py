"""LlamaIndex workflows: real workflows with and without the guard, with a fake model and no network."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.frameworks.contract import ANSWER, FrameworkContract, weather
from tests.frameworks.kit import Seen, fifty_at_once, guard_of, holds, lines_of, result_of, spent
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from stroma import RunStatus, Usage
from stroma.adapters import Guard
from stroma.adapters.llama_index import attach


class Script:
    """A model that answers what it is told to; what is an exception, it raises."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), list[str]()

    async def ask(self, text: str) -> str:
        self.asked.append(text)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


def used(_: Any) -> Usage:
    return Usage(9, 1, model="gpt-4o")


class Known(Event):
    celsius: int


class Forecast(Workflow):
    """A sync step that calls a function and an async one that asks a model, once or more."""

    def __init__(self, model: Any, tool: Any = weather, times: int = 1) -> None:
        super().__init__(timeout=20)
        self.model, self.tool, self.times = model, tool, times

    @step
    def weather(self, ev: StartEvent) -> Known:
        return Known(**self.tool(ev.city))

    @step
    async def tell(self, ctx: Context, ev: Known) -> StopEvent:
        answers = [await self.model(f"{ev.celsius} C") for _ in range(self.times)]
        return StopEvent(result=answers[-1])


def run(program: Workflow, guard: Guard | None = None) -> Any:
    async def main() -> Any:
        if guard is None:
            return await program.run(city="Oslo")
        async with guard.run({"city": "Oslo"}):
            return await program.run(city="Oslo")

    return asyncio.run(main())


@holds("sync and async")
class TestLlamaIndex(FrameworkContract):
    KINDS = ("run",)
    GOOD = (ANSWER,)
    STEPS = ("weather success", "tell success", "  model success 10")
    TOKENS = 10
    UNKNOWN = r"unknown step 'wether'; .* 'weather'"

    def script(self, *answers: Any, break_after: int | None = None) -> Script:
        return Script(*answers)

    def program(self, script: Script, guard: Any = None, contracts: Any = None, tool: Any = weather) -> Any:
        if guard is None:
            return Forecast(script.ask, tool)
        return attach(Forecast(guard.wrap("model", script.ask, usage=used), tool), guard, contracts)

    def call(self, program: Any, kind: str, guard: Any = None) -> Any:
        return run(program, guard)

    def nested(self, guard: Guard, die: Callable[[], None]) -> str:
        """A step, killed between two calls of its model."""
        script = Script("one", "two")

        class Asking(Workflow):
            @step
            async def ask(self, ev: StartEvent) -> StopEvent:
                model = guard.wrap("model", script.ask)
                first = await model("x")
                die()
                return StopEvent(result=f"{first} {await model('y')}")

        return str(run(attach(Asking(), guard), guard))

    def endless(self, guard: Any) -> tuple[Any, Script]:
        script = self.script(*["more"] * 9)
        model = guard.wrap("model", script.ask, usage=used)
        return attach(Forecast(model, times=9), guard), script

    test_a_stream_is_not_retried_after_its_first_part = None


def test_a_step_of_the_guard_below_that_of_the_workflow() -> None:
    """``@step @guard.step(...)``: the workflow sees the signature of the method."""
    guard = guard_of()

    class Decorated(Workflow):
        @step
        @guard.step("answer")
        async def answer(self, ev: StartEvent) -> StopEvent:
            return StopEvent(result=ev.city)

    assert run(Decorated(), guard) == "Oslo"
    assert lines_of(guard) == ["answer success"]


def test_another_workflow_of_the_class_is_left_alone() -> None:
    """Only the one that is attached makes steps."""
    guard = guard_of()
    attach(Forecast(Script().ask), guard)
    assert run(Forecast(Script(ANSWER).ask)) == ANSWER
    assert guard.last is None


def test_a_free_function_is_refused() -> None:
    """It belongs to all workflows of the class: the error says how it is guarded."""

    class Free(Workflow):
        pass

    @step(workflow=Free)
    async def alone(ev: StartEvent) -> StopEvent:
        return StopEvent(result="x")

    with pytest.raises(ValueError, match=r"'alone' are free functions.*@guard\.step"):
        attach(Free(), guard_of())


class Asks(InputRequiredEvent):
    prefix: str = "really?"


@holds("control flow")
def test_a_step_that_waits_for_an_answer_is_called_again_as_ever() -> None:
    """wait_for_event(): the step ends without a failure, and is repeated with the answer, in its run."""
    answers = []

    class Careful(Workflow):
        @step
        async def decide(self, ctx: Context, ev: StartEvent) -> StopEvent:
            response = await ctx.wait_for_event(HumanResponseEvent, waiter_event=Asks())
            return StopEvent(result=response.response)

    async def main(program: Workflow, guard: Guard | None) -> Any:
        async def talk() -> Any:
            handler = program.run(city="Oslo")
            async for event in handler.stream_events():
                if isinstance(event, Asks):
                    handler.ctx.send_event(HumanResponseEvent(response="yes"))
            return await handler

        if guard is None:
            return await talk()
        async with guard.run():
            return await talk()

    for guard in (None, guard_of()):
        program = Careful() if guard is None else attach(Careful(), guard)
        answers.append(asyncio.run(main(program, guard)))
        if guard is not None:
            assert result_of(guard).status is RunStatus.COMPLETED
            assert lines_of(guard) == ["decide success", "decide success"]
    assert answers == ["yes", "yes"]


class Part(Event):
    number: int


class Ended(Event):
    text: str


class Parallel(Workflow):
    """Asks a model for each of three parts at once, and sums up."""

    def __init__(self, model: Any) -> None:
        super().__init__(timeout=60)
        self.model = model

    @step
    async def split(self, ctx: Context, ev: StartEvent) -> Part | None:
        for number in range(3):
            ctx.send_event(Part(number=number))
        return None

    @step(num_workers=3)
    async def work(self, ev: Part) -> Ended:
        return Ended(text=await self.model(str(ev.number)))

    @step
    async def join(self, ctx: Context, ev: Ended) -> StopEvent | None:
        parts = ctx.collect_events(ev, [Ended] * 3)
        if parts is None:
            return None
        return StopEvent(result=await self.model(" ".join(part.text for part in parts)))


def test_fifty_workflows_at_once_spend_what_the_provider_has_counted() -> None:
    """All spend is counted, to the token, in the run that it belongs to: steps in parallel among it."""
    ledger, seen = list[int](), Seen()
    guard = guard_of(seen)

    async def ask(text: str) -> int:
        await asyncio.sleep(0)
        ledger.append(10 + len(ledger) % 7)
        return ledger[-1]

    asking: Any = guard.wrap("model", ask, usage=lambda tokens: Usage(tokens - 1, 1, model="gpt-4o"))

    async def model(text: str) -> str:
        return f"{len(text)} {await asking(text)}"[:1]

    workflow = attach(Parallel(model), guard)

    async def one(number: int) -> Any:
        async with guard.run(number):
            return await workflow.run()

    assert set(fifty_at_once(one)) == {"5"}
    assert (len(ledger), spent(seen, guard)) == (200, (50, sum(ledger)))
    for result in seen.results:
        assert [event.node_id for event in result.trace.walk()].count("model") == 4
