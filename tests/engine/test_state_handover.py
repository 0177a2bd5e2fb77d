"""Handover from node to node, by any engine path: nobody changes what another was given or returned."""

from typing import Any

import pytest
from pydantic import BaseModel, RootModel
from tests.kit import NEVER, ONCE, computing

from stroma import AsyncInMemoryStore, NodeHooks, StromaRunner, map_over, parallel, stroma_node


class Flat(BaseModel):
    seen: str = ""


class Listed(BaseModel):
    seen: list[str] = []


class Word(BaseModel):
    text: str
    weight: float = 0.5


class Nested(BaseModel):
    seen: list[Word] = []


class Loose(BaseModel):
    seen: dict[str, Any] = {"order": []}


class Rooted(RootModel[list[str]]):
    root: list[str] = []


class Opaque(BaseModel):
    seen: list[str] = []
    odd: set[str] = set()


KINDS: list[type[BaseModel]] = [Flat, Listed, Nested, Loose, Rooted, Opaque]


def write(state: Any, word: str) -> None:
    """Add a word to what a state holds, in place where that can be."""
    if isinstance(state, dict):
        held = state["seen"]
        if isinstance(held, str):
            state["seen"] = held + word
        else:
            held = held["order"] if isinstance(held, dict) else held
            held.append({"text": word} if held and isinstance(held[0], dict) else word)
    elif isinstance(state, list):
        state.append(word)
    elif isinstance(state, Flat):
        state.seen += word
    elif isinstance(state, Nested):
        for part in state.seen if word == "!" else ():
            part.text = word
        state.seen.append(Word(text=word))
    elif isinstance(state, Loose):
        state.seen["order"].append(word)
    elif isinstance(state, Rooted):
        state.root.append(word)
    elif isinstance(state, Opaque):
        state.seen.append(word)
        state.odd.add(word)
    else:
        state.seen.append(word)


def words(state: Any) -> list[str]:
    """What was written, of a state or of the plain data that a trace shows of it."""
    raw = state.model_dump() if isinstance(state, BaseModel) else state
    if isinstance(raw, dict) and "root" in raw:
        raw = raw["root"]
    held = raw["seen"] if isinstance(raw, dict) else raw
    if isinstance(held, str):
        return list(held)
    if isinstance(held, dict):
        held = held["order"]
    return [part["text"] if isinstance(part, dict) else part for part in held]


class Scribblers:
    """Nodes that add their letter, and scribble on all that they ever had in their hands."""

    def __init__(self, kind: type[BaseModel], returns: str) -> None:
        self.kind = kind
        self.returns = returns
        self.snapshots: list[Any] = []
        self.received: list[list[str]] = []

    def node(self, letter: str, *, fails: int = 0, node_id: str | None = None) -> Any:
        left = [fails]

        async def func(state: Any) -> Any:
            for old in self.snapshots:
                write(old, "!")
            self.received.append(words(state))
            write(state, letter)
            if left[0]:
                left[0] -= 1
                self.snapshots.append(state)
                raise ConnectionError("down")
            if self.returns == "itself":
                out: Any = state
            elif self.returns == "a model":
                out = state.model_copy(deep=True)
            else:
                out = state.model_dump()
            self.snapshots += [state, out]
            return out

        return stroma_node(node_id or letter, input=self.kind, output=self.kind)(func)


def hooks() -> NodeHooks:
    async def scribble(run_id: str, node_id: str, state: dict[str, Any], *_: Any) -> None:
        state.clear()

    return NodeHooks(on_node_start=scribble, on_node_success=scribble)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("returns", ["itself", "a model", "a dict"])
@pytest.mark.parametrize("kind", KINDS)
async def test_each_node_is_given_what_the_one_before_it_returned(
    kind: type[BaseModel], returns: str, watched: bool
) -> None:
    """Whatever nodes and hooks do to their objects, inputs, retries, trace, journal and result are exact."""
    desk, store = Scribblers(kind, returns), AsyncInMemoryStore()
    runner = StromaRunner.quick(store=store, policy_map=ONCE, hooks=[hooks()] if watched else [])
    nodes = [desk.node("a"), desk.node("b", fails=1), desk.node("c"), desk.node("d")]
    initial = kind()
    result = await runner.run(nodes, initial, run_id="r")
    assert desk.received == [[], ["a"], ["a"], ["a", "b"], ["a", "b", "c"]]
    assert type(result.final_state) is kind
    assert words(result.final_state) == ["a", "b", "c", "d"]
    shown = [
        (words(event.input_state), None if event.output_state is None else words(event.output_state))
        for event in result.trace
    ]
    assert shown == [
        ([], ["a"]),
        (["a"], None),
        (["a"], ["a", "b"]),
        (["a", "b"], ["a", "b", "c"]),
        (["a", "b", "c"], ["a", "b", "c", "d"]),
    ]
    assert words(initial) == []
    again = await StromaRunner.quick(store=store).run(nodes, kind(), run_id="r", resume=True)
    assert words(again.final_state) == ["a", "b", "c", "d"]
    assert len(desk.received) == 5


@pytest.mark.parametrize("returns", ["itself", "a model", "a dict"])
@pytest.mark.parametrize("kind", [Flat, Listed, Nested, Loose, Opaque])
async def test_an_id_that_stands_twice(kind: type[BaseModel], returns: str) -> None:
    """The same where one id has two contracts in a run, so that its rows are kept in another way."""
    desk = Scribblers(kind, returns)

    begin = computing(lambda _: kind())
    first = stroma_node("a", input=Word, output=kind)(begin)
    nodes = [first, *(desk.node(letter, node_id="a") for letter in "bcd")]
    result = await StromaRunner.quick().run(nodes, Word(text="w"))
    assert result.failure is None
    assert desk.received == [[], ["b"], ["b", "c"]]
    assert words(result.final_state) == ["b", "c", "d"]
    outputs = [words(event.output_state) for event in list(result.trace)[1:]]
    assert outputs == [["b"], ["b", "c"], ["b", "c", "d"]]
    assert [words(event.input_state) for event in list(result.trace)[1:]] == [[], ["b"], ["b", "c"]]


@pytest.mark.parametrize("returns", ["itself", "a model", "a dict"])
@pytest.mark.parametrize("kind", [Listed, Nested, Loose, Opaque])
async def test_children_of_a_group_have_copies_of_their_own(kind: type[BaseModel], returns: str) -> None:
    """Side by side, and behind a node, each child is given the state as it was before the group."""
    desk = Scribblers(kind, returns)
    nodes = [desk.node("a"), parallel(desk.node("b"), desk.node("c"), max_concurrency=1), desk.node("d")]
    result = await StromaRunner.quick().run(nodes, kind())
    assert result.failure is None
    assert desk.received == [[], ["a"], ["a"], ["a", "c"]]
    assert words(result.final_state) == ["a", "c", "d"]
    assert [words(event.output_state) for event in result.trace] == [["a"], ["a", "c"], ["a", "c", "d"]]
    children = list(result.trace)[1].children
    states = [(words(e.input_state), words(e.output_state)) for e in children]
    assert states == [(["a"], ["a", "b"]), (["a"], ["a", "c"])]


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("returns", ["itself", "a model", "a dict"])
@pytest.mark.parametrize("kind", KINDS)
async def test_the_state_of_a_run_that_failed_is_the_last_output(
    kind: type[BaseModel], returns: str, watched: bool
) -> None:
    """Exactly as it was returned, whatever happened since to the objects that came and went, and kept."""
    desk, store = Scribblers(kind, returns), AsyncInMemoryStore()
    runner = StromaRunner.quick(store=store, policy_map=NEVER, hooks=[hooks()] if watched else [])
    nodes = [desk.node("a"), desk.node("b"), desk.node("c", fails=1)]
    result = await runner.run(nodes, kind(), run_id="r")
    assert result.failure is not None
    assert words(result.final_state) == ["a", "b"]
    outputs = [event.output_state and words(event.output_state) for event in result.trace]
    assert outputs == [["a"], ["a", "b"], None]
    for old in desk.snapshots:
        write(old, "!")
    assert words(result.final_state) == ["a", "b"]
    again = await runner.run([nodes[0], nodes[1], desk.node("c")], kind(), run_id="r", resume=True)
    assert words(again.final_state) == ["a", "b", "c"]
    assert desk.received == [[], ["a"], ["a", "b"], ["a", "b"]]


class Batch(BaseModel):
    items: list[Listed]


async def test_items_are_copies_too() -> None:
    """What an item's node does to its item is not seen in the list, nor in what comes of the others."""
    desk = Scribblers(Listed, "itself")
    batch = Batch(items=[Listed(seen=["1"]), Listed(seen=["2"])])
    nodes = [map_over("items", desk.node("x"), into="made", max_concurrency=1)]
    result = await StromaRunner.quick().run(nodes, batch)
    assert result.final_state.model_dump() == {
        "items": [{"seen": ["1"]}, {"seen": ["2"]}],
        "made": [{"seen": ["1", "x"]}, {"seen": ["2", "x"]}],
    }
    assert desk.received == [["1"], ["2"]]
