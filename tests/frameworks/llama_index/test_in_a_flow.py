"""Workflows of LlamaIndex in the body of a flow, unmodified: their async steps call steps of the flow."""

from typing import Any

from tests.frameworks.body_kit import Steps, ended_in_a_flow, run_in_a_flow
from workflows import Context, Workflow, step
from workflows.events import Event, StartEvent, StopEvent


class City(Event):
    name: str


class Found(Event):
    celsius: int


class Forecast(Workflow):
    """Looks for cities side by side, and asks the model about them."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    @step
    async def split(self, ctx: Context, ev: StartEvent) -> City | None:
        for name in ("Oslo", "Reykjavik"):
            ctx.send_event(City(name=name))
        return None

    @step(num_workers=2)
    async def find(self, ev: City) -> Found:
        return Found(celsius=await self.steps.weather(ev.name))

    @step
    async def tell(self, ctx: Context, ev: Found) -> StopEvent | None:
        found = ctx.collect_events(ev, [Found, Found])
        if found is None:
            return None
        return StopEvent(result=await self.steps.ask(sorted(one.celsius for one in found)))


class Plain(Workflow):
    @step
    def answer(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result="4 C")


async def test_a_workflow_resumes() -> None:
    """G5: A workflow whose async steps call steps resumes at every record, with steps side by side."""

    async def body(steps: Steps) -> Any:
        return await Forecast(steps).run()

    response, made = await run_in_a_flow(body, str)
    assert (response, made) == ("[4, 9]", ["weather", "weather", "model"])


async def test_a_plain_step_is_refused() -> None:
    """A step that is a plain function would run in a thread: the body refuses it."""

    async def body(steps: Steps) -> Any:
        return await Plain().run()

    assert "the body of a flow waits for its steps" in await ended_in_a_flow(body)
