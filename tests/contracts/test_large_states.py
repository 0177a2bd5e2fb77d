"""States of many values: what makes them quick to copy changes nothing of what is promised of a state."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from pydantic import BaseModel, RootModel
from tests.kit import node, quick

from stroma import AsyncInMemoryStore, NodeHooks
from stroma.contracts import NotSerialisable
from stroma.contracts.schema import schema_of


class Anything(RootModel[Any]):
    pass


@pytest.mark.core
@pytest.mark.parametrize("root", [{"rows": [1, 2, 3]}, [1, 2, 3]], ids=["a dict", "a list"])
async def test_what_a_node_keeps_of_its_output_is_not_what_hooks_see(root: Any) -> None:
    """G7, G8: a change of what a node has returned, made in its hooks, reaches no later hook."""
    shown: list[Any] = []
    entries: list[Any] = []

    async def work(state: Anything) -> Any:
        entries.append(deepcopy(root))
        return entries[0]

    async def spoils(*_: Any) -> None:
        entries[0].clear()

    async def looks(run_id: str, node_id: str, state: Any, tokens: int) -> None:
        shown.append(state)

    # The hooks of an end are called from the last set to the first.
    hooks = [NodeHooks(on_node_success=looks), NodeHooks(on_node_success=spoils)]
    runner = quick(store=AsyncInMemoryStore(), hooks=hooks)
    result = await runner.run([node("a", work, Anything, Anything)], Anything(None))
    assert shown == [root if isinstance(root, dict) else {"root": root}]
    assert result.final_state == Anything(root)


@pytest.mark.parametrize("before", [0, 1, 4299, 4300, 9000])
@pytest.mark.parametrize("digits", [4299, 4300, 4301, 9000])
def test_numbers_that_python_does_not_read_have_a_stored_form(before: int, digits: int) -> None:
    """An integer of 4,300 digits and more is found wherever it stands in what is written."""

    class Long(BaseModel):
        text: str
        number: int

    state = Long(text="x" * before, number=10 ** (digits - 1))
    schema = schema_of(Long)
    if digits > 4300:
        with pytest.raises(NotSerialisable, match="keep it smaller"):
            schema.encode(state)
    else:
        assert schema.decode(schema.encode(state)) == state
