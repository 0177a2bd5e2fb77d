"""Types of flows: those of their steps, and errors where a step or a flow gets or returns another class.

An ignore that nothing needs is an error in mypy and pyright, so this file fails the check if one of the
errors goes away.
"""

from __future__ import annotations

import asyncio
from typing import Any, assert_type

from pydantic import BaseModel

from stroma import ExecutionResult, Flow, FlowFunction, Pipeline, StromaRunner, stroma_flow, stroma_node


class Ticket(BaseModel):
    text: str


class Label(BaseModel):
    topic: str


class Reply(BaseModel):
    text: str


runner = StromaRunner.quick()


@runner.node("label", input=Ticket, output=Label)
async def label(ticket: Ticket) -> Label:
    return Label(topic=ticket.text)


@runner.node("loose", input=Ticket, output=Label)
async def loose(ticket: Ticket) -> dict[str, Any]:
    return {"topic": ticket.text}


@runner.node("loose with usage", input=Ticket, output=Label)
async def loose_with_usage(ticket: Ticket) -> tuple[dict[str, str], int, int, str]:
    return {"topic": ticket.text}, 10, 5, "gpt-4o-mini"


@runner.node("loose contextual", input=Ticket, output=Label)
async def loose_contextual(ticket: Ticket, ctx: dict[str, Any]) -> dict[str, str]:
    return {"topic": ticket.text}


@runner.node("loose plain", input=Ticket, output=Label)
def loose_plain(ticket: Ticket) -> dict[str, str]:
    return {"topic": ticket.text}


@runner.node("plain", input=Ticket, output=Label)
def plain(ticket: Ticket) -> Label:
    return Label(topic=ticket.text)


@runner.node("contextual", input=Ticket, output=Label)
async def contextual(ticket: Ticket, ctx: dict[str, Any]) -> Label:
    return Label(topic=ticket.text)


@runner.node
def plain_contextual(ticket: Ticket, ctx: dict[str, Any]) -> Label:
    return Label(topic=ticket.text)


@stroma_flow("inner")
async def inner(flow: Flow, ticket: Ticket) -> Label:
    return await flow.step(label, ticket)


@runner.flow("triage", input=Ticket, output=Reply)
async def triage(flow: Flow, ticket: Ticket) -> Reply:
    assert_type(await flow.step(label, ticket), Label)
    assert_type(await flow.step(plain, ticket), Label)
    assert_type(await flow.step(contextual, ticket), Label)
    assert_type(await flow.step(plain_contextual, ticket), Label)
    assert_type(await flow.map(plain_contextual, [ticket]), list[Label])
    one, two = await asyncio.gather(flow.step(label, ticket), flow.step(plain, ticket))
    assert_type(one, Label)
    assert_type(two, Label)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(flow.step(label, ticket))
    assert_type(task.result(), Label)
    labels = await flow.map(label, [ticket])
    assert_type(labels, list[Label])
    assert_type(await flow.run(inner, ticket), Label)
    assert_type(await flow.wait_for(Label, reason="Which?"), Label)
    assert_type(await flow.step(loose, ticket), Label)
    assert_type(await flow.step(loose_with_usage, ticket), Label)
    assert_type(await flow.map(loose_with_usage, [ticket]), list[Label])
    assert_type(await flow.step(loose_contextual, ticket), Label)
    assert_type(await flow.step(loose_plain, ticket), Label)
    return Reply(text=one.topic)


assert_type(triage, FlowFunction[Ticket, Reply])


async def results() -> None:
    result = await runner.run(triage, Ticket(text=""))
    assert_type(result, ExecutionResult[Reply])
    assert_type(result.output, Reply)
    assert_type(runner.run_sync(triage, Ticket(text="")).output, Reply)
    assert_type((await runner.handle("r-1", triage).result()).output, Reply)
    tickets = [Ticket(text="a")]
    many = await runner.run_many(triage, tickets, run_ids=lambda number, ticket: f"{number}-{ticket.text}")
    assert_type(many, list[ExecutionResult[Reply] | Exception])
    assert_type(await runner.run_many([label], tickets), list[ExecutionResult | Exception])
    listed: ExecutionResult = await runner.run([label], Ticket(text=""))
    assert_type(listed.final_state, BaseModel | None)


async def one_name_for_two_results() -> None:
    result = await runner.run([label], Ticket(text=""))
    result = await runner.run(triage, Ticket(text=""))
    print(result.output)


async def wrong_calls(flow: Flow, ticket: Ticket, reply: Reply) -> Reply:
    await flow.step(label, reply)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await flow.step(loose, reply)  # type: ignore[type-var, arg-type, unused-ignore]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await flow.step(3, ticket)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    flow.step(label, ticket)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    await flow.run(inner, reply)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await runner.run(triage, reply)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await runner.run_many(triage, [reply])  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    runner.run_sync(triage, reply)  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await flow.run(Pipeline("p", [label]), ticket)
    await runner.run(Pipeline("p", [label]), ticket)
    return await flow.step(label, ticket)  # type: ignore[arg-type]  # pyright: ignore[reportReturnType]


@runner.flow("wrong", input=Ticket, output=Reply)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def wrong_output(flow: Flow, ticket: Ticket) -> Label:
    return Label(topic="")


class Response:
    pass


@runner.node
async def bare(ticket: Ticket) -> Label:
    return Label(topic=ticket.text)


@runner.node("metered", effect=True)
async def metered(ticket: Ticket) -> tuple[Label, Response]:
    return Label(topic=ticket.text), Response()


@stroma_node
def metered_plain(ticket: Ticket, ctx: dict[str, Any]) -> tuple[Label, int, int, str]:
    return Label(topic=ticket.text), 1, 2, "model"


@runner.node  # type: ignore[type-var]  # pyright: ignore[reportCallIssue, reportArgumentType]
async def no_model(ticket: Ticket) -> str:
    return ticket.text


@runner.flow
async def bare_flow(flow: Flow, ticket: Ticket) -> Label:
    assert_type(await flow.step(bare, ticket), Label)
    assert_type(await flow.step(metered, ticket), Label)
    assert_type(await flow.step(metered_plain, ticket), Label)
    assert_type(await flow.map(metered, [ticket]), list[Label])
    await flow.step(bare, Label(topic=""))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    return Label(topic="")
