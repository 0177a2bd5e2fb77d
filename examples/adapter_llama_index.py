"""A workflow of LlamaIndex whose model fails once: its step alone is called again.

    python examples/adapter_llama_index.py

Needs `pip install "stroma-runner[llama-index]"`, and neither a key nor a network. Prints:

> it is 4 C
> weather success, tell success, model failure, model success
> 10 tokens
"""

import asyncio
from typing import Any

from workflows import Workflow, step
from workflows.events import Event, StartEvent, StopEvent

from stroma import FailureClass, FailurePolicy, StromaRunner, Usage
from stroma.adapters import Guard
from stroma.adapters.llama_index import attach

answers: list[Any] = [ConnectionError("gone"), "it is 4 C"]
at_once = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=1, backoff_seconds=0)}
guard = Guard(StromaRunner.quick(policy_map=at_once))


@guard.step("model", usage=lambda _: Usage(8, 2, model="gpt-4o"))
async def model(celsius: int) -> str:
    answer = answers.pop(0)
    if isinstance(answer, Exception):
        raise answer
    return str(answer)


class Weather(Event):
    celsius: int


class Forecast(Workflow):
    @step
    async def weather(self, ev: StartEvent) -> Weather:
        return Weather(celsius=len(ev.city))

    @step
    async def tell(self, ev: Weather) -> StopEvent:
        return StopEvent(result=await model(ev.celsius))


async def main() -> None:
    workflow = attach(Forecast(), guard)
    async with guard.run() as run:
        print(">", await workflow.run(city="Oslo"))
    print(">", ", ".join(f"{event.node_id} {event.outcome}" for event in run.result.trace.walk()))
    print(f"> {run.result.total_tokens} tokens")


asyncio.run(main())
