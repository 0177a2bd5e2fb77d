"""Nodes that keep their contract, in every shape that a node may have; the decorator changes no type."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, TypedDict, assert_type

import openai
import openai.types.chat
from pydantic import BaseModel

from stroma import NodeContract, StromaRunner, Usage, current_node, stroma_node, usage_from


class Query(BaseModel):
    text: str


class LongQuery(Query):
    limit: int = 10


class Hits(BaseModel):
    urls: list[str]


class RankedHits(Hits):
    scores: list[float]


class HitsDict(TypedDict):
    urls: list[str]


runner = StromaRunner.quick()
contract = NodeContract(node_id="search", input_schema=Query, output_schema=Hits)
assert_type(contract, NodeContract[Query, Hits])

# ---------------------------------------------------------------------- what a node may return


@runner.node("model", input=Query, output=Hits)
async def gives_model(state: Query) -> Hits:
    return Hits(urls=[state.text])


@runner.node("subclass", input=Query, output=Hits)
async def gives_subclass(state: Query) -> RankedHits:
    return RankedHits(urls=[], scores=[])


@runner.node("dict", input=Query, output=Hits)
async def gives_dict(state: Query) -> dict[str, Any]:
    return {"urls": [state.text]}


@runner.node("typed dict", input=Query, output=Hits)
async def gives_typed_dict(state: Query) -> HitsDict:
    return {"urls": [state.text]}


@runner.node("mapping", input=Query, output=Hits)
async def gives_mapping(state: Query) -> Mapping[str, object]:
    return {"urls": [state.text]}


@runner.node("tokens", input=Query, output=Hits)
async def gives_tokens(state: Query) -> tuple[dict[str, Any], int]:
    return {"urls": []}, 10


@runner.node("usage", input=Query, output=Hits)
async def gives_usage(state: Query) -> tuple[Hits, int, int, str]:
    return Hits(urls=[]), 10, 5, "gpt-4o"


class Reply(Protocol):
    """A provider's response, whichever SDK it is of."""


def ask() -> Reply: ...


@runner.node("response", input=Query, output=Hits)
async def gives_response(state: Query) -> tuple[Hits, Reply]:
    return Hits(urls=[]), ask()


@runner.node("dict and response", input=Query, output=Hits)
async def gives_dict_and_response(state: Query) -> tuple[dict[str, Any], openai.types.chat.ChatCompletion]:
    client = openai.AsyncOpenAI()
    answer = await client.chat.completions.create(model="gpt-4o", messages=[])
    node = current_node()
    node.report_usage(answer)
    node.report_usage(answer, model="ours", tier="batch")
    node.report_usage(input_tokens=9, cached_input_tokens=3, cache_write_tokens=2, model="gpt-4o")
    return {"urls": []}, answer


@runner.node("a usage", input=Query, output=Hits)
def gives_usage_record(state: Query) -> tuple[Hits, Usage]:
    usage = usage_from(ask(), model="ours")
    assert_type(usage, Usage)
    assert_type(usage.cached_input_tokens, int)
    assert_type(usage.model, str | None)
    return Hits(urls=[]), usage


@runner.node("anything", input=Query, output=Hits)
async def gives_anything(state: Query) -> Any:
    return {"urls": []}


# ---------------------------------------------------------------------- what a node may take


@runner.node("context", input=Query, output=Hits)
async def takes_context(state: Query, ctx: dict[str, Any]) -> Hits:
    return Hits(urls=[ctx["base"]])


@runner.node("a wider input", input=LongQuery, output=Hits)
async def takes_wider(state: Query) -> Hits:
    return Hits(urls=[state.text])


@runner.node("keyword-only", input=Query, output=Hits)
async def takes_keyword_only(state: Query, *, top: int = 3) -> Hits:
    return Hits(urls=[state.text] * top)


# ---------------------------------------------------------------------- sync nodes


@runner.node("sync", input=Query, output=Hits)
def sync_model(state: Query) -> Hits:
    return Hits(urls=[state.text])


@runner.node("sync, usage", input=Query, output=Hits)
def sync_usage(state: Query) -> tuple[Hits, int]:
    return Hits(urls=[state.text]), 5


@runner.node("sync, context", input=Query, output=Hits)
def sync_context(state: Query, ctx: dict[str, Any]) -> Hits:
    return Hits(urls=[ctx["base"]])


# ---------------------------------------------------------------------- other callables, other decorators


@stroma_node("search", contract)
async def marked(state: Query) -> Hits:
    return Hits(urls=[state.text])


@stroma_node("search", NodeContract[Query, Hits](node_id="search", input_schema=Query, output_schema=Hits))
async def marked_explicitly(state: Query) -> Hits:
    return Hits(urls=[state.text])


@stroma_node("search", input=Query, output=Hits)
async def marked_by_models(state: Query) -> dict[str, Any]:
    return {"urls": [state.text]}


@stroma_node(role="tool")
async def marked_by_annotations(state: Query) -> tuple[Hits, int]:
    return Hits(urls=[state.text]), 5


class Client:
    async def search(self, state: Query) -> Hits:
        return Hits(urls=[state.text])


method = runner.node("method", input=Query, output=Hits)(Client().search)
anonymous = runner.node("lambda", input=Query, output=Hits)(lambda state: Hits(urls=[state.text]))


def contract_of_unknown_models(given: type[BaseModel], promised: type[BaseModel]) -> None:
    """A contract whose classes are known at run time only takes any function of models."""
    node = stroma_node("n", NodeContract(node_id="n", input_schema=given, output_schema=promised))

    @node
    async def anything(state: BaseModel) -> BaseModel:
        return state

    print(anything)


# ---------------------------------------------------------------------- a node is still its function


async def call_by_hand() -> None:
    """Calling a node by hand is calling the function: its own type, not the decorator's."""
    query = Query(text="x")
    assert_type(await gives_model(query), Hits)
    assert_type(await gives_dict(query), dict[str, Any])
    assert_type(await gives_usage(query), tuple[Hits, int, int, str])
    assert_type(await takes_context(query, {}), Hits)
    assert_type(sync_model(query), Hits)
    assert_type(sync_context(query, {}), Hits)
    typed: Callable[[Query], Coroutine[Any, Any, Hits]] = gives_model
    print(typed)
