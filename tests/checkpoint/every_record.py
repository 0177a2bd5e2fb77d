"""Every kind of record of a run in a durable store, and what a store holds, read behind its back."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import redis
from tests.checkpoint.damage import database
from tests.kit import words
from tests.store_suite.journal import State, row, settled

from stroma.checkpoint import RunRequest, StepCall
from stroma.checkpoint.durable.annotations import annotate
from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.rows import Annotation, Rows, Step
from stroma.checkpoint.queue import BlockedMark
from stroma.contracts.schema import schema_of
from stroma.failures import FailureClass
from stroma.trace import AttemptUsage
from stroma.trace.events import Failed

#: Tables and keys that hold no record of a run: versions, and what runs share.
OF_NO_RUN = ("meta", "cells", "cell", "format")
#: Columns that hold numbers, ids or checksums only, and what only a submitted run has.
PLAIN = words("""
    run_id run_key status lease_owner lease_until_ms contract schema_ref sha256 branch_key outcome
    failure_class wake_ms number claim claim_until_ms expires_ms queue_key blocked_since_ms blocked_until_ms
""")


async def write_every_kind(store: Any, run_id: str, text: str) -> Any:
    """Write a record of each kind with a text in it, in a run that is not ended. Return its session."""
    schema = schema_of(State)
    state = State(text=text)
    request = RunRequest(run_id, text, state, schema, tags=(text,), deliver=True, version=text)
    session = await store.open_run(request)
    session.note_call(0, text)
    failed = row(0, text, branch=text, failure=FailureClass.TERMINAL, message=text)
    failure = Failed(FailureClass.TERMINAL, text, text, text)
    failed = failed._replace(failure=failure, group=text, usage=AttemptUsage(1, 1, 0.1, text))
    await settled(session.record(failed, None, None))
    for position, one in enumerate((state, State(text=text * 1000))):
        attempt = row(position, text, output=schema.snapshot(one), schema=schema, branch=text)
        await settled(session.record(attempt, schema, one, StepCall(1, text.encode())))
    await annotate_all(store, run_id, text)
    await settled(session.append_events(1, text.encode()))

    def mark(rows: Rows) -> None:
        run = rows.find(run_id, lock=True)
        assert run is not None
        rows.update(run.run, {"parent": text})
        rows.block(run, BlockedMark(text, 1, 2, (text,)))

    await store._submit(Transaction(run_id, mark))
    return session


async def annotate_all(store: Any, run_id: str, text: str) -> None:
    """Write an annotation of each kind with a text in each of its fields."""

    def write(rows: Rows) -> None:
        for kind in Annotation:
            step = Step(text, text, text.encode(), b"", 1, text.encode())
            annotate(rows, rows.key_of(run_id), kind, text, text, step)

    await store._submit(Transaction(run_id, write))


def contents(kind: str, where: str, blobs: Path) -> dict[str, bytes]:
    """Return all that a store holds, by column of each table or kind of key."""
    found: defaultdict[str, bytes] = defaultdict(bytes)
    for file in blobs.rglob("*"):
        if file.is_file():
            found["blobs"] += file.read_bytes()
    if kind == "redis":
        with redis.Redis.from_url(where) as client:
            for key in client.keys("*"):
                found[key_kind(key.decode())] += key + _value(client, key)
        return dict(found)
    for table, columns, rows in _tables(kind, where):
        for values in rows:
            for column, value in zip(columns, values, strict=True):
                if not isinstance(value, int):
                    found[f"{table}.{column}"] += value if isinstance(value, bytes) else str(value).encode()
    return dict(found)


def key_kind(key: str) -> str:
    """Return the kind of a key of Redis: its name without ids and numbers of executions."""
    name = key.rpartition("}:")[2].removeprefix("stroma:")
    return name if name.startswith("annotations:") else name.partition(":")[0]


def _value(client: Any, key: bytes) -> bytes:
    kind = client.type(key)
    if kind == b"hash":
        return b"\n".join(part for item in client.hgetall(key).items() for part in item)
    if kind == b"stream":
        return b"\n".join(fields[b"data"] for _, fields in client.xrange(key))
    if kind == b"list":
        return b"\n".join(client.lrange(key, 0, -1))
    return b"\n".join(client.zrange(key, 0, -1)) if kind == b"zset" else client.get(key)


def _tables(kind: str, where: str) -> list[tuple[str, list[str], list[Any]]]:
    with database(kind, where) as db:
        return [(name, *db.select(f"SELECT * FROM {name}")) for name in db.tables()]
