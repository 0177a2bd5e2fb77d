"""What a failed attempt leaves behind, with hooks that are called for it."""

import gc
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import failing_with, passing

from stroma import NodeHooks, StromaRunner, map_over, parallel


class Item(BaseModel):
    value: int


class Many(BaseModel):
    items: list[int] = list(range(20))
    out: list[dict[str, Any]] = []


@pytest.mark.core
@pytest.mark.parametrize("shape", ["node", "sequence", "parallel"])
async def test_a_failed_attempt_with_hooks_leaves_no_cycle(shape: str) -> None:
    """An exception that a map has collected is freed without the garbage collector."""

    async def watch(*_: Any) -> None: ...

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_failure=watch))

    same = runner.node("same", input=Item, output=Item)(passing())
    item = runner.node("item", input=Item, output=Item)(failing_with(LookupError))
    inside: Any = {"node": item, "sequence": [same, item], "parallel": parallel(item)}[shape]
    nodes: list[Any] = [map_over("items", inside, into="out", on_item_failure="collect")]
    await runner.run(nodes, Many())
    gc.collect()
    gc.disable()
    try:
        await runner.run(nodes, Many())
        assert not [one for one in gc.get_objects() if type(one) is LookupError]
    finally:
        gc.enable()
