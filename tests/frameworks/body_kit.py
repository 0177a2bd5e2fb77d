"""What tests of frameworks in a flow's body share: a model, a tool, and the proof that it resumes."""

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel, JsonValue
from tests.kit import NEVER, Num

from stroma import Flow, InMemoryStore, NodeContract, RunStatus, StromaRunner, stroma_flow, stroma_node
from stroma.testing import assert_resumable


class Asked(BaseModel):
    messages: list[JsonValue]


class Said(BaseModel):
    response: JsonValue = None


class City(BaseModel):
    city: str


class Degrees(BaseModel):
    celsius: int


Body = Callable[["Steps"], Awaitable[Any]]


class Steps:
    """A model that is a step of a flow, as is a tool; ``respond`` returns its answer to messages."""

    def __init__(self, flow: Flow, respond: Callable[[list[Any]], Any]) -> None:
        self._flow = flow

        async def model(state: Asked) -> Any:
            return {"response": respond(state.messages)}, 30, 10, "gpt-4o"

        async def weather(state: City) -> Any:
            return {"celsius": len(state.city)}

        self._model: Any = stroma_node(
            "model", NodeContract(node_id="model", input_schema=Asked, output_schema=Said)
        )(model)
        self._weather: Any = stroma_node(
            "weather", NodeContract(node_id="weather", input_schema=City, output_schema=Degrees)
        )(weather)

    async def ask(self, messages: list[Any]) -> Any:
        """Ask the model with messages that are JSON data."""
        return (await self._flow.step(self._model, Asked(messages=messages))).response

    async def weather(self, city: str) -> int:
        """The weather of a city."""
        degrees: int = (await self._flow.step(self._weather, City(city=city))).celsius
        return degrees


def _flow_of(body: Body, respond: Callable[[list[Any]], Any]) -> Any:
    @stroma_flow("f", input=Num, output=Said)
    async def f(flow: Flow, state: Num) -> Said:
        return Said(response=await body(Steps(flow, respond)))

    return f


async def run_in_a_flow(body: Body, respond: Callable[[list[Any]], Any]) -> tuple[Any, list[str]]:
    """Return what a body returns, and its steps, once it is shown to resume at every record."""
    flow, store = _flow_of(body, respond), InMemoryStore()
    result = await StromaRunner.quick(store=store, run_id="r").run(flow, Num())
    steps = [one.node_id for one in store.attempts("r") if one.node_id != "f"]
    assert result.total_tokens == 40 * steps.count("model")
    response = result.output.response
    await assert_resumable(flow, Num(), runner=StromaRunner.quick(policy_map=NEVER), processes=False)
    return response, steps


async def ended_in_a_flow(body: Body, respond: Callable[[list[Any]], Any] = str) -> str:
    """Return the message with which a body fails."""
    result = await StromaRunner.quick().run(_flow_of(body, respond), Num())
    assert result.failure is not None, result.output
    return result.failure.message


async def answer_in_rounds(flow: Any, *rounds: list[Any], **config: Any) -> tuple[list[list[str]], Any]:
    """Run a flow, which stops to ask as often as there are ``rounds`` of answers, to its end.

    Return the questions of each round, and the flow's output.
    """
    options: dict[str, Any] = {"store": InMemoryStore(), "run_id": "r", "resume": True, **config}
    runner = StromaRunner.quick(**options)
    asked: list[list[str]] = []
    for answers in rounds:
        result = await runner.run(flow, Num())
        assert result.status is RunStatus.SUSPENDED, result.failure
        asked.append(result.suspended)
        # The last question first: an answer belongs to its question, not to its place.
        for question, answer in reversed(list(zip(result.questions, answers, strict=True))):
            await runner.signal("r", answer, question=question.id)
    result = await runner.run(flow, Num())
    assert result.status is RunStatus.RESUMED, result.failure
    return asked, result.output


async def survive(flow: Any) -> int:
    """Raise AssertionError unless a flow that is killed at any record ends as undisturbed, and repeats no
    call that ended. Return at how many records it was killed."""
    runner = StromaRunner.quick(policy_map=NEVER)
    return len((await assert_resumable(flow, Num(), runner=runner, processes=False)).boundaries)
