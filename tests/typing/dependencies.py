"""Runners whose nodes take an object of a class as ``ctx``, as a user writes them."""

from dataclasses import dataclass
from typing import Any, assert_type

from pydantic import BaseModel

from stroma import ExecutionResult, Flow, Pipeline, StromaRunner, stroma_node


class Question(BaseModel):
    text: str


class Answer(BaseModel):
    text: str


@dataclass
class Deps:
    language: str


runner = StromaRunner[Deps].quick(context=Deps("de"))
assert_type(runner, StromaRunner[Deps])
plain = StromaRunner.quick()
assert_type(plain, StromaRunner[dict[str, Any]])


@runner.node
async def ask(question: Question, ctx: Deps) -> Answer:
    return Answer(text=f"{ctx.language}: {question.text}")


@runner.node("ask_again", input=Answer, output=Answer)
async def ask_again(answer: Answer, ctx: Deps) -> dict[str, Any]:
    return {"text": answer.text}


@runner.node
async def alone(answer: Answer) -> Answer:
    return answer


@stroma_node
async def of_any_runner(answer: Answer, ctx: Deps) -> Answer:
    return answer


@runner.node(effect=True)
def send(answer: Answer, ctx: Deps) -> Answer:
    return answer


@plain.node
async def of_a_dict(answer: Answer, ctx: dict[str, Any]) -> Answer:
    return answer


@runner.node  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
async def wrong(question: Question, ctx: dict[str, Any]) -> Answer:
    return Answer(text="")


@runner.node(effect=True)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
def wrong_effect(question: Question, ctx: dict[str, Any]) -> Answer:
    return Answer(text="")


@runner.flow
async def flow(flow: Flow, question: Question) -> Answer:
    assert_type(await flow.step(ask, question), Answer)
    await flow.step(ask, Answer(text=""))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    return await flow.step(ask_again, Answer(text=""))


async def use() -> None:
    nodes = Pipeline("p", [ask, ask_again, alone, of_any_runner])
    assert_type(await runner.run(nodes, Question(text=""), context=Deps("en")), ExecutionResult)
    assert_type(await runner.run(flow, Question(text=""), run_id="r"), ExecutionResult[Answer])
    await runner.run(nodes, Question(text=""), context={"language": "en"})  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    await plain.run([of_a_dict], Answer(text=""), context={"language": "en"})
    assert_type(runner.with_context(Deps("fr")), StromaRunner[Deps])
    runner.with_context({})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    StromaRunner[Deps].quick(context={})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
