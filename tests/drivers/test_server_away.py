"""Runs that are begun while the Temporal server is away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("temporalio")

from pydantic import BaseModel
from temporalio.client import Client
from tests.servers_temporal import TemporalServer, wait_until_ready

from stroma import NodeContract, Pipeline, StoreError, stroma_node
from stroma.temporal import TemporalRunner, stroma_worker


class State(BaseModel):
    n: int = 0


@stroma_node("a", NodeContract(node_id="a", input_schema=State, output_schema=State))
async def a(state: State) -> Any:
    return State(n=1)


PIPELINE = Pipeline("away", [a])


@pytest.mark.slow
async def test_a_run_that_is_begun_waits_for_the_server(tmp_path: Path) -> None:
    """run() waits for a server that is away and begins once it is back; after server_seconds it is a StoreError."""
    server = TemporalServer(tmp_path / "temporal.db")
    try:
        await asyncio.to_thread(wait_until_ready, server.address)
        client = await Client.connect(server.address)
        async with stroma_worker(client, "q", [PIPELINE]):
            runner = TemporalRunner(client, "q")
            assert (await runner.run(PIPELINE, State(), run_id="r0")).status == "COMPLETED"
            server.kill()
            started = asyncio.create_task(runner.run(PIPELINE, State(), run_id="r1"))
            hasty = TemporalRunner(client, "q", server_seconds=0.5)
            with pytest.raises(StoreError, match=f"server at {server.address} cannot be reached"):
                await hasty.run(PIPELINE, State(), run_id="r2")
            assert not started.done()
            await asyncio.to_thread(server.start)
            assert (await asyncio.wait_for(started, 60)).status == "COMPLETED"
    finally:
        server.kill()
