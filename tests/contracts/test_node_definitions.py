"""What a node may be, and what is refused when it is defined."""

from typing import Any

import pytest
from pydantic import ValidationError
from tests.kit import Num, One, context_of, give_one, node, quick_without_retries, same

from stroma import (
    ExecutionBudget,
    FailurePolicy,
    NodeContract,
    ReliabilityContext,
    RunConfig,
    current_node,
    execute_step,
    map_over,
    parallel,
)


@pytest.mark.parametrize(
    ("kind", "misspelt"),
    [
        (ExecutionBudget, {"max_tokens": 100}),
        (FailurePolicy, {"max_retry": 0}),
        (NodeContract, {"node_id": "n", "input_schema": Num, "output_schema": Num, "upcasts": None}),
        (RunConfig, {"budgets": None}),
    ],
)
def test_a_misspelt_setting_is_refused(kind: Any, misspelt: dict[str, Any]) -> None:
    """A limit, a policy or a contract with an unknown field is an error that names it."""
    with pytest.raises(ValidationError, match="Extra inputs are not permitted") as raised:
        kind(**misspelt)
    assert list(misspelt)[-1] in str(raised.value)


def context(**config: Any) -> ReliabilityContext:
    runner = quick_without_retries(**config)
    return context_of(runner)


async def test_what_cannot_be_a_node() -> None:
    """What cannot be called cannot be a node; a callable without a signature takes the state alone."""
    with pytest.raises(TypeError, match="not callable"):
        node("a", 5)

    class Unsigned:
        __signature__ = "none"

        async def __call__(self, state: Num) -> Any:
            return {"n": 1}

    result = await quick_without_retries().run([node("a", Unsigned())], Num())
    assert result.final_state == Num(n=1)

    first = node("a", same)
    second = node("b", first)
    assert await second(Num(n=7)) == Num(n=7)
    assert (first._stroma_node_id, second._stroma_node_id) == ("a", "b")


async def test_what_a_step_may_be_given() -> None:
    """The input of a step is a model: anything else is a TypeError that names the step."""
    with pytest.raises(TypeError, match="'a'"):
        await execute_step("a", same, {"n": 1}, context())


async def test_where_a_node_stands_can_be_printed() -> None:
    """repr(current_node()) names run, node, position and attempt."""
    shown: list[str] = []

    async def func(state: Num) -> Any:
        shown.append(repr(current_node()))
        return state

    await quick_without_retries().run([node("a", func)], Num(), run_id="r")
    assert shown == ["<node 'a' of run 'r', position 0, attempt 1>"]


@pytest.mark.parametrize("name", ["", "a b", "1"])
def test_map_over_wants_names_of_fields(name: str) -> None:
    """map_over refuses what can be no field's name, where it is made."""
    with pytest.raises(ValueError, match="is not the name of a field"):
        map_over(name, node("a", same), into="out")
    with pytest.raises(ValueError, match="is not the name of a field"):
        map_over("items", node("a", same), into=name)


async def test_a_single_node_is_told_to_stand_in_a_list() -> None:
    """run(node, state) and run(parallel(...), state) say to use a list; a function hears how to be a node."""
    a = node("a", give_one, output=One)
    for single in (a, parallel(a), map_over("items", a, into="items")):
        with pytest.raises(TypeError, match="in a list"):
            await quick_without_retries().run(single, Num())

    async def plain(state: Num) -> Any:
        return {}

    for nodes in (plain, [plain]):
        with pytest.raises(TypeError, match="decorate it with @stroma_node"):
            await quick_without_retries().run(nodes, Num())
