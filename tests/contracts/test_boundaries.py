"""What crosses a boundary is validated, and what a trace holds does not change afterwards."""

import copy
from functools import partial
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, RootModel
from tests.kit import THRICE, Item, Loose, Num, Text, node, record_node_hooks

from stroma import (
    ContractViolation,
    InMemoryStore,
    NodeHooks,
    RunStatus,
    StromaRunner,
    current_node,
    current_node_or_none,
    parallel,
)
from stroma.contracts.schema import schema_of

pytestmark = pytest.mark.core

quick = partial(StromaRunner.quick, policy_map=THRICE)


class Deep(BaseModel):
    items: list[Num]
    table: dict[str, list[int]] = {}


def giving(output: Any) -> tuple[Any, list[Any]]:
    """A node's function that returns a value, and the list of its inputs."""
    calls: list[Any] = []

    async def func(state: Any) -> Any:
        calls.append(state)
        return output

    return func, calls


def _mutated() -> Any:
    model = Deep(items=[Num(n=1)])
    model.items[0].n = "bad"
    return model


def _mutated_top() -> Any:
    model = Deep(items=[Num(n=1)])
    model.items = "bad"
    return model


def _missing() -> Any:
    model = Deep(items=[])
    del model.items
    return model


BROKEN = {
    "dict": {"items": [{"n": "bad"}]},
    "constructed": Deep.model_construct(items=[{"n": "bad"}]),
    "constructed-empty": Deep.model_construct(),
    "constructed-child": Deep.model_construct(items=[Num.model_construct(n="bad")]),
    "mutated-child": _mutated(),
    "mutated": _mutated_top(),
    "deleted": _missing(),
    "another-class": Text(text="x"),
    "appended": Deep.model_construct(items=[Num(), None]),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in-a-group"])
async def test_broken_output_stops_at_its_boundary(name: str, grouped: bool) -> None:
    """G1: Output that fails its contract is neither committed, nor traced as an output, nor passed on."""
    func, calls = giving(BROKEN[name])
    after, others = giving({"n": 1})
    store = InMemoryStore()
    seen: list[str] = []
    bad = node("bad", func, Num, Deep)
    nodes = [parallel(bad) if grouped else bad, node("after", after, Deep, Num)]
    result = await quick(store=store, run_id="r", hooks=record_node_hooks(seen)).run(nodes, Num(n=3))
    assert result.status is RunStatus.FAILED
    assert isinstance(result.failure.exception, ContractViolation)
    assert (len(calls), others) == (1, [])
    assert [event.output_state for event in result.trace.walk()] == [None] * (2 if grouped else 1)
    assert store.load("r", "bad") is None
    assert result.final_state == Num(n=3)
    assert "success" not in seen


@pytest.mark.parametrize(
    "state",
    [Num.model_construct(n="bad"), Text.model_construct(), Text(text="x"), Loose(anything=1)],
    ids=["constructed", "empty", "another-class", "loose"],
)
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in-a-group"])
async def test_a_function_sees_only_valid_input(state: BaseModel, grouped: bool) -> None:
    """G1: A node is not called with input that fails its contract."""

    func, calls = giving({"n": 1})
    bare = node("a", func, Item, Num)
    assert (await quick().run([parallel(bare) if grouped else bare], state)).status is RunStatus.FAILED
    assert calls == []


async def test_input_is_of_the_inputs_class() -> None:
    """G1: A node gets an instance of its own input class, also if the state before it is of a subclass."""

    class Sub(Num):
        secret: str = "s"

    func, calls = giving({"n": 1})
    await quick().run([node("a", func)], Sub(n=2))
    assert type(calls[0]) is Num
    assert calls == [Num(n=2)]


async def test_a_state_changed_between_nodes_is_validated_again() -> None:
    """G1: A state that a node changes after it returned it is validated again for the next node."""
    entries: list[Num] = []

    async def first(state: Num) -> Num:
        entries.append(Num(n=1))
        return entries[0]

    async def spoil(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        entries[0].n = "bad"

    func, calls = giving({"n": 2})
    hooks = NodeHooks(on_node_success=spoil)
    result = await quick(hooks=hooks).run([node("a", first), node("b", func)], Num())
    assert result.status is RunStatus.COMPLETED
    assert calls == [Num(n=1)]


class Flat(BaseModel):
    n: int = 1
    text: str = "a"


class Nested(BaseModel):
    items: list[dict[str, list[int]]] = [{"a": [1]}]
    child: Num = Num(n=1)


class NestedToo(BaseModel):
    items: list[dict[str, list[int]]]
    child: Num


class Rows(BaseModel):
    rows: list[Num]


class RowsToo(BaseModel):
    rows: list[Num]


class Dicts(BaseModel):
    rows: list[dict[str, Any]]


class DictsToo(BaseModel):
    rows: list[dict[str, Any]]


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    n: int = 1


class Anything(BaseModel):
    value: Any = None


class Rooted(RootModel[list[Any]]):
    pass


class Holder:
    """A plain object under Any."""

    def __init__(self) -> None:
        self.inside = [1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Holder) and self.inside == other.inside

    __hash__ = None


def _change(value: Any, seen: set[int]) -> None:
    """Change everything that can be changed in a value."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, BaseModel):
        for part in [*vars(value).values(), *(value.__pydantic_extra__ or {}).values()]:
            _change(part, seen)
        for name in vars(value):
            object.__setattr__(value, name, "changed")
    elif isinstance(value, Holder):
        value.inside.append("changed")
    elif isinstance(value, dict):
        for part in value.values():
            _change(part, seen)
        value["changed"] = "changed"
    elif isinstance(value, list):
        for part in value:
            _change(part, seen)
        value.append("changed")


STATES: dict[str, Any] = {
    "flat": lambda: Flat(n=2, text="b"),
    "nested": lambda: Nested(items=[{"b": [2]}], child=Num(n=2)),
    "open": lambda: Open(n=2, more={"deep": [1]}),
    "any-list": lambda: Anything(value=[1, {"a": [2]}]),
    "any-model": lambda: Anything(value=[Num(n=5)]),
    "any-object": lambda: Anything(value=Holder()),
    "root": lambda: Rooted([1, [2, {"a": 3}]]),
    "rows": lambda: Rows(rows=[Num(n=k) for k in range(3)]),
    "dicts": lambda: Dicts(rows=[{"id": k, "tags": ["a"]} for k in range(3)]),
}
#: The class of the second node's output, where that differs from the class of the state.
OTHERS: dict[str, Any] = {"nested": NestedToo, "rows": RowsToo, "dicts": DictsToo}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("as_dict", [False, True], ids=["model", "dict"])
async def test_later_changes_do_not_rewrite_history(name: str, as_dict: bool) -> None:
    """G7: Events and hooks have the committed input and output, also if nodes change these objects later."""
    make = STATES[name]
    cls = type(make())
    other = OTHERS.get(name, cls)
    shown: list[Any] = []
    entries: list[Any] = []
    seen: list[Any] = []

    async def func(state: Any) -> Any:
        run = current_node()
        seen.append(schema_of(type(state)).state(state))
        entries.append(state)
        output = make()
        if as_dict:
            output = output.root if isinstance(output, RootModel) else schema_of(cls).state(output)
        entries.append(output)
        if run.position == 1 and run.attempt == 1:
            _change(entries, set())
            raise ValueError
        return output

    async def spoil(*arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, dict):
                _change(argument, set())
        run = current_node_or_none()
        if run is not None and run.position > 0:
            _change(entries, set())

    async def looks(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        shown.append(copy.deepcopy(state))
        await spoil(state)

    hooks = NodeHooks(on_node_start=spoil, on_node_success=looks, on_node_failure=spoil)
    initial = make()
    want = schema_of(cls).state(make())
    # Hooks of position 0 leave `kept` alone: the first node's output must still be what it returned.
    nodes = [node("a", func, cls, cls), node("b", func, cls, other), node("c", func, other, cls)]
    result = await quick(hooks=[hooks, hooks]).run(nodes, initial)
    _change(entries, set())
    _change(initial, set())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert (seen, shown) == ([want] * 4, [want] * 6)
    events = list(result.trace)
    assert [event.attempt for event in events] == [1, 1, 2, 1]
    assert [event.input_state for event in events] == [want] * 4
    assert [event.output_state for event in events] == [want, None, want, want]
    assert schema_of(cls).state(result.final_state) == want
