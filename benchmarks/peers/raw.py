"""The floor: a plain loop over sqlite3, a transaction for each node, from the event loop's own thread."""

from __future__ import annotations

import sqlite3

from benchmarks.peers.disk import Connection
from benchmarks.peers.work import START, Close, In, Out, Run, node


def versions() -> str:
    return f"sqlite {sqlite3.sqlite_version}"


async def opened(address: str, nodes: int) -> tuple[Run, Close]:
    db = sqlite3.connect(address, isolation_level=None, factory=Connection)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE runs (id TEXT PRIMARY KEY, node INTEGER, tokens INTEGER)")
    db.execute("CREATE TABLE steps (run INTEGER, node INTEGER, output BLOB, PRIMARY KEY (run, node))")

    async def run(name: str) -> int:
        state = START
        key = db.execute("INSERT INTO runs VALUES (?, 0, 0)", (name,)).lastrowid
        for number in range(nodes):
            output = Out.model_validate(await node(In.model_validate(state)))
            db.execute("BEGIN IMMEDIATE")
            db.execute("UPDATE runs SET node = ?, tokens = tokens + 1 WHERE rowid = ?", (number, key))
            db.execute(
                "INSERT INTO steps VALUES (?, ?, ?)",
                (key, number, output.__pydantic_serializer__.to_json(output)),
            )
            db.execute("COMMIT")
            state = output.__dict__
        return int(state["count"])

    async def close() -> None:
        db.close()

    return run, close
