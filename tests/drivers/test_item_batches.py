"""The items of a map are put together, out of the run's own state."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from pydantic import BaseModel
from tests.drivers.scenarios import Texts, lengths
from tests.drivers.seam import SeamRunner
from tests.kit import Num, node

from stroma import Pipeline, RunConfig, map_over
from stroma.checkpoint.payloads import BlobStore, DirectoryBlobs
from stroma.drivers.remote.attempts import Attempts
from stroma.drivers.remote.children import FAN_OUT
from stroma.drivers.remote.results import fetch
from stroma.drivers.remote.wire import ROOM, size_of


async def packed(payloads: BlobStore | None, room: int) -> Any:
    """What a worker makes of two small items."""
    pipeline = Pipeline("pipe", [map_over("texts", lengths([]), into="lengths")])
    value = {"text": Texts(texts=["a"]).model_dump_json(), "size": 20, "cls": ["raw"]}
    request: Any = {
        "op": "pack", "run_id": "run", "execution": 1, "pipeline": "pipe", "settings": {}, "traceparent": None,
        "context": {}, "gone": [], "spent": {"tokens": 0, "cost_usd": 0.0, "latency_ms": 0.0}, "warned": [],
        "room": room, "value": value, "outputs": [value, value], "indexes": [0, 1], "rows": [],
    }  # fmt: skip
    return (await Attempts([pipeline], payloads=payloads).perform(request))["packed"]


@pytest.mark.core
async def test_small_items_take_no_room_either(tmp_path: pathlib.Path) -> None:
    """With a payload store packs are names of blobs, however small: 20,000 items have a hundred of them."""
    blobs = DirectoryBlobs(tmp_path)
    pack = await packed(blobs, ROOM)
    assert "text" not in pack
    assert size_of(pack) <= 100
    assert set(json.loads(await fetch(blobs, pack))["outputs"]) == {"0", "1"}


async def test_any_number_of_items_of_several_nodes_fits(tmp_path: pathlib.Path) -> None:
    """The outputs between the nodes of an item take no room once it has ended: together they are larger than a run may be."""

    held: list[int] = []

    class Page(BaseModel):
        text: str

    async def write(state: Num) -> dict[str, str]:
        return {"text": "x" * 8000}

    async def measure(state: Page) -> dict[str, int]:
        held.append(len(runner.state["done"]))
        return {"n": len(state.text)}

    class Numbers(BaseModel):
        numbers: list[Num]

    steps = [
        node("write", write, Num, Page),
        node("copy", _same, Page, Page),
        node("measure", measure, Page, Num),
    ]
    pipeline = Pipeline("pipe", [map_over("numbers", steps, into="sizes")])
    attempts = Attempts([pipeline], payloads=DirectoryBlobs(tmp_path))
    runner = SeamRunner(attempts, RunConfig())
    result = await runner.run(pipeline, Numbers(numbers=[Num(n=n) for n in range(600)]))
    assert result.failure is None, result.failure
    assert result.final_state is not None
    assert result.final_state.model_dump()["sizes"] == [{"n": 8000}] * 600
    (group,) = result.trace
    assert sum(len(item.children) for item in group.children) == 1800
    assert max(held) <= 3 * FAN_OUT


async def _same(state: Any) -> Any:
    return state


async def test_without_a_store_they_stay_in_the_run() -> None:
    """Some hundred items need no store."""
    assert "text" in await packed(None, ROOM)
