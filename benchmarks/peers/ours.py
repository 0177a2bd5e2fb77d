"""Stroma on one of its stores; ``alone+`` before the address: each commit a transaction of its own."""

from __future__ import annotations

import importlib.metadata
import sqlite3
from typing import Any

from benchmarks.peers.disk import SLOWER, Connection
from benchmarks.peers.work import START, Close, In, Out, Run, node
from stroma import NodeContract, SQLiteStore, StromaRunner, stroma_node
from stroma.checkpoint import open_store
from stroma.checkpoint.durable import worker


def versions() -> str:
    return f"stroma {importlib.metadata.version('stroma-runner')}"


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, factory=Connection)


class _SlowerStore(SQLiteStore):
    _open_file = staticmethod(_connect)


async def opened(address: str, nodes: int) -> tuple[Run, Close]:
    if address.startswith("alone+"):
        address = address.removeprefix("alone+")
        worker._MAX_BATCH_SIZE = 1  # type: ignore[misc]
    store: Any
    if SLOWER and address.startswith("sqlite:///"):
        store = _SlowerStore(address.removeprefix("sqlite:///"))
    else:
        store = open_store(address)
    runner = StromaRunner.quick(store=store)
    sequence = []
    for number in range(nodes):

        async def func(state: In) -> Any:
            return await node(state)

        contract: NodeContract[Any, Any] = NodeContract(
            node_id=f"n{number}", input_schema=In, output_schema=Out
        )
        sequence.append(stroma_node(f"n{number}", contract)(func))

    async def run(name: str) -> int:
        result = await runner.run(sequence, In(**START), run_id=name)
        assert isinstance(result.final_state, Out), result.failure
        return result.final_state.count

    async def close() -> None:
        await store.aclose()

    return run, close
