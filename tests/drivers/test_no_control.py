"""Requests about runs that a cluster does not know."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from stroma import NodeContract, RunConfig, stroma_node


class Num(BaseModel):
    n: int = 0


@stroma_node("n", NodeContract(node_id="n", input_schema=Num, output_schema=Num))
async def number(state: Num) -> dict[str, Any]:
    return {"n": 1}


async def test_no_control_of_runs_on_temporal() -> None:
    """pause(), set_budget() and on_budget="wait" are refused with what to do in their place, before a server is asked."""
    from stroma.temporal import TemporalRunner

    client: Any = None
    runner = TemporalRunner(client, "queue")
    with pytest.raises(NotImplementedError, match="cannot be paused; cancel it"):
        await runner.pause("r")
    with pytest.raises(NotImplementedError, match="resume it with another one"):
        await runner.set_budget("r", cost_usd=1.0)
    waits = TemporalRunner(client, "queue", config=RunConfig(on_budget="wait"))
    with pytest.raises(ValueError, match='on_budget="wait" needs a StromaRunner'):
        await waits.run([number], Num())
