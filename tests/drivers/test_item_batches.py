"""The items of a map are put together, out of the run's own state."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from tests.drivers.scenarios import Texts, lengths

from stroma import Pipeline, map_over
from stroma.checkpoint.payloads import BlobStore, DirectoryBlobs
from stroma.drivers.remote.attempts import Attempts
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


async def test_without_a_store_they_stay_in_the_run() -> None:
    """Some hundred items need no store."""
    assert "text" in await packed(None, ROOM)
