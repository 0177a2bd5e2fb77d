"""Nodes that break their contract: each is an error in mypy and in pyright.

An ignore that nothing needs is an error in both, so this file fails the check if one of the errors goes away.
"""

from typing import Any

from pydantic import BaseModel

from stroma import NodeContract, StromaRunner, stroma_node


class Query(BaseModel):
    text: str


class Hits(BaseModel):
    urls: list[str]


class RankedHits(Hits):
    scores: list[float]


class Other(BaseModel):
    number: int


runner = StromaRunner.quick()
contract = NodeContract(node_id="search", input_schema=Query, output_schema=Hits)
ranked = NodeContract(node_id="ranked", input_schema=Query, output_schema=RankedHits)

# ---------------------------------------------------------------------- the wrong input


@runner.node("async", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def wrong_input(state: Other) -> Hits:
    return Hits(urls=[])


@runner.node("async, context", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def wrong_input_context(state: Other, ctx: dict[str, Any]) -> Hits:
    return Hits(urls=[])


@runner.node("sync", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
def wrong_input_sync(state: Other) -> Hits:
    return Hits(urls=[])


@stroma_node("search", contract)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def wrong_input_marked(state: Other) -> Hits:
    return Hits(urls=[])


@runner.node("narrower", input=Hits, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def wrong_input_narrower(state: RankedHits) -> Hits:
    return state


# ---------------------------------------------------------------------- the wrong output


@runner.node("async", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def wrong_output(state: Query) -> Other:
    return Other(number=1)


@runner.node("async, optional", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def wrong_output_optional(state: Query) -> Hits | None:
    return None


@runner.node("async, text", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def wrong_output_text(state: Query) -> str:
    return "x"


@runner.node("async, none", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def wrong_output_none(state: Query) -> None:
    return None


@runner.node("sync", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
def wrong_output_sync(state: Query) -> Other:
    return Other(number=1)


@stroma_node("search", contract)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def wrong_output_marked(state: Query) -> Other:
    return Other(number=1)


@stroma_node("ranked", ranked)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def wrong_output_wider(state: Query) -> Hits:
    return Hits(urls=[])


# ---------------------------------------------------------------------- the wrong parameters


@runner.node("no state", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def takes_nothing() -> Hits:
    return Hits(urls=[])


@runner.node("three", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def takes_three(state: Query, ctx: dict[str, Any], more: int) -> Hits:
    return Hits(urls=[])


@runner.node("a wrong context", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def takes_a_wrong_context(state: Query, ctx: int) -> Hits:
    return Hits(urls=[])


@runner.node("a required keyword", input=Query, output=Hits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
async def takes_a_required_keyword(state: Query, *, top: int) -> Hits:
    return Hits(urls=[])


# ---------------------------------------------------------------------- contracts and decorators

runner.node("no model", input=int, output=Hits)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
NodeContract(node_id="no model", input_schema=Query, output_schema=dict)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
NodeContract[Query, Hits](node_id="crossed", input_schema=Hits, output_schema=Query)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
runner.node("not a function", input=Query, output=Hits)(5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
