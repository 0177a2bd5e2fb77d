"""LangGraph on its own savers. ``sync+`` before the address: a checkpoint is written before the next node begins.

Without it a checkpoint is written while the next node runs, which is LangGraph's default.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from typing import Any

os.environ.update(LANGSMITH_TRACING="false", LANGCHAIN_TRACING_V2="false")

from benchmarks.peers.work import START, Close, In, Out, Run, node


def versions() -> str:
    names = ("langgraph", "langgraph-checkpoint-sqlite", "langgraph-checkpoint-postgres")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


async def opened(address: str, nodes: int) -> tuple[Run, Close]:
    graphs: Any = importlib.import_module("langgraph.graph")
    durability = "async"
    if address.startswith("sync+"):
        address, durability = address.removeprefix("sync+"), "sync"

    async def step(state: In) -> Any:  # LangGraph validates the input; the output's contract is ours.
        output = await node(state)
        Out.model_validate(output)
        return output

    graph = graphs.StateGraph(In)
    for number in range(nodes):
        graph.add_node(f"n{number}", step)
        graph.add_edge(f"n{number - 1}" if number else graphs.START, f"n{number}")
    graph.add_edge(f"n{nodes - 1}", graphs.END)

    if address.startswith("postgresql:"):
        pools: Any = importlib.import_module("psycopg_pool")
        rows: Any = importlib.import_module("psycopg.rows")
        aio: Any = importlib.import_module("langgraph.checkpoint.postgres.aio")
        options = {"autocommit": True, "prepare_threshold": 0, "row_factory": rows.dict_row}
        pool = pools.AsyncConnectionPool(address, min_size=4, max_size=20, kwargs=options, open=False)
        await pool.open()
        saver, end = aio.AsyncPostgresSaver(pool), pool.close
    else:
        aiosqlite: Any = importlib.import_module("aiosqlite")
        aio = importlib.import_module("langgraph.checkpoint.sqlite.aio")
        db = await aiosqlite.connect(address)
        await db.execute("PRAGMA synchronous=FULL")
        saver, end = aio.AsyncSqliteSaver(db), db.close
    await saver.setup()
    app = graph.compile(checkpointer=saver)

    async def run(name: str) -> int:
        config = {"recursion_limit": nodes + 10, "configurable": {"thread_id": name}}
        state = await app.ainvoke(START, config, durability=durability)
        return int(state["count"])

    async def close() -> None:
        await end()

    print(sys.version, file=sys.stderr)
    return run, close
