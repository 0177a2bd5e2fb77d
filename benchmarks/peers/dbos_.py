"""DBOS: a workflow of steps, on its system database in a SQLite file or a PostgreSQL server."""

from __future__ import annotations

import importlib
import importlib.metadata
import sqlite3
from typing import Any

from benchmarks.peers.work import START, Close, In, Out, Run, node


def versions() -> str:
    return f"dbos {importlib.metadata.version('dbos')}"


async def opened(address: str, nodes: int) -> tuple[Run, Close]:
    dbos: Any = importlib.import_module("dbos")
    if not address.startswith("postgresql:"):
        # It leaves the journal as it finds it: a rollback journal, unless the file says otherwise.
        # synchronous is FULL.
        file = sqlite3.connect(address)
        file.execute("PRAGMA journal_mode=WAL")
        file.close()
        address = f"sqlite:///{address}"
    config = {
        "name": "bench",
        "system_database_url": address,
        "log_level": "ERROR",
        "run_admin_server": False,
    }
    dbos.DBOS(config=config)
    steps = []
    for number in range(nodes):

        async def step(state: dict[str, Any]) -> dict[str, Any]:
            return Out.model_validate(await node(In.model_validate(state))).model_dump()

        steps.append(dbos.DBOS.step(name=f"n{number}")(step))

    async def flow(state: dict[str, Any]) -> dict[str, Any]:
        for each in steps:
            state = await each(state)
        return state

    workflow = dbos.DBOS.workflow(name="flow")(flow)
    dbos.DBOS.launch()

    async def run(name: str) -> int:
        with dbos.SetWorkflowID(name):
            state = await workflow(START)
        return int(state["count"])

    async def close() -> None:
        dbos.DBOS.destroy()

    return run, close
