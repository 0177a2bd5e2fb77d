"""The tables of the SQLite and the Postgres store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, get_type_hints

from stroma.checkpoint.durable.rows import Step
from stroma.checkpoint.records import ATTEMPT_COLUMNS, AttemptRecord

SCHEMA_VERSION: Final = 15  # of the tables, in every SQL store

# Any stands for an output: bytes in these stores.
_TYPES: Final = {bytes: "bytea", int: "bigint", str: "text"}
_MAX_PLAIN_KEY_BYTES: Final = 64


def _types(record: Any, fields: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return the type of the column of each field, and True if it may be NULL."""
    hints = get_type_hints(record)
    return {
        name: next(
            (sql, hints[name] not in (kind, Any))
            for kind, sql in _TYPES.items()
            if hints[name] in (kind, kind | None, Any)
        )
        for name in fields
    }


ATTEMPT_TYPES: Final = _types(AttemptRecord, ATTEMPT_COLUMNS)
STEP_TYPES: Final = _types(Step, Step._fields)


class Types(NamedTuple):
    """Differences between the tables of two databases.

    Attributes:
        names: the name of each type of column, by its name in :data:`ATTEMPT_TYPES`.
        run: the column that numbers runs, and never uses a number again.
        id: the column that numbers steps.
        options: after each table.
        by_key: after a table whose rows are small and stored in the order of the key, if there is a choice.
        rewritten: after a table whose rows change often.
    """

    names: dict[str, str]
    run: str
    id: str
    options: str
    by_key: str
    rewritten: str


def key(text: str) -> str:
    """Return the index key of an id: itself if it is short, otherwise a hash, which is longer than that."""
    if len(text) * 4 <= _MAX_PLAIN_KEY_BYTES or len(data := text.encode()) <= _MAX_PLAIN_KEY_BYTES:
        return text
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# ``run`` is never used again, so that a session of a deleted run cannot reach the rows of another one. An
# index entry of PostgreSQL holds at most 2.7 kB, and ids have any length: run_key, branch_key and cell_key
# hold key() of an id. attempt_count and commit_count: rows that the last execution must have, counted in the
# transaction of each. Attempts: the start distinguishes attempts of one number; a resumed run, and a retried
# group, count from 1. The order of the key is the order of the history. Steps: one committed output per
# position and branch. Annotations of a run have positions below 0 and execution 0, see durable/rows.py. Ids
# grow with each commit: the newest output of a node has the highest. Cells: shared by all runs. The lease
# columns: every opening increments the epoch and writes its owner and the end of its lease.
# wake_ms: from when on a worker continues a run that stopped or is queued; every opening deletes it.
# claim: the worker that is about to open the run, until claim_until_ms by the clock of leases.
# blocked and the three columns after it: the mark of a blocked run; every opening and every end deletes it.
# Events: batches of events of sessions, in the order of their key.
# The indexes of runs use columns that no commit changes, and `failed` contains rows that few commits write.
# Identities: only steps of plain code have one; they can be longer than an index entry.
def tables(types: Types) -> list[str]:
    """Return the statements that create the tables."""
    data, number, text = (types.names[name] for name in _TYPES.values())

    def columns(of: dict[str, tuple[str, bool]]) -> str:
        return ", ".join(
            f"{name} {types.names[kind]}{'' if nullable else ' NOT NULL'}"
            for name, (kind, nullable) in of.items()
        )

    def table(name: str, body: str, options: str = types.options) -> str:
        return f"CREATE TABLE {name} ({body}){options}"

    return [
        table(
            "runs",
            f"""{types.run}, run_key {text} NOT NULL UNIQUE, run_id {text} NOT NULL, pipeline {text}
                NOT NULL, execution {number} NOT NULL, status {text} NOT NULL, error {text},
                started_ms {number} NOT NULL CHECK (started_ms >= 0), updated_ms {number} NOT NULL,
                tokens {number} NOT NULL, cost_pico {number} NOT NULL, latency_ns {number} NOT NULL,
                lease_owner {text}, lease_epoch {number} NOT NULL, lease_until_ms {number},
                attempt_count {number} NOT NULL DEFAULT 0, commit_count {number} NOT NULL DEFAULT 0,
                wake_ms {number}, priority {number} NOT NULL DEFAULT 0, queue_key {text}, expires_ms
                {number}, claim {text}, claim_until_ms {number}, version {text} NOT NULL DEFAULT '',
                blocked {text}, blocked_since_ms {number}, blocked_until_ms {number}, blocked_codes
                {text}, parent {text}, tags {text} NOT NULL DEFAULT '', cause {text}""",
            types.rewritten,
        ),
        table(
            "steps",
            f"""{types.id}, run {number} NOT NULL, execution {number} NOT NULL, position {number} NOT
                NULL, branch_key {text} NOT NULL, branch {text} NOT NULL, node_id {text} NOT NULL,
                epoch {number} NOT NULL, attempt {number} NOT NULL, started_ns {number} NOT NULL,
                {columns(STEP_TYPES)}, UNIQUE (run, execution, position, branch_key)""",
        ),
        table(
            "attempts",
            f"""run {number}, execution {number}, epoch {number}, branch_key {text}, {columns(ATTEMPT_TYPES)},
            PRIMARY KEY (run, execution, epoch, position, started_ns, branch_key, attempt)""",
            types.by_key,
        ),
        table(
            "cells",
            f"cell_key {text} PRIMARY KEY, name {text} NOT NULL, data {data} NOT NULL",
            types.rewritten,
        ),
        table(
            "events",
            f"""run {number}, execution {number} NOT NULL, epoch {number}, last {number}, written_ms
                {number} NOT NULL, data {data} NOT NULL, PRIMARY KEY (run, epoch, last)""",
        ),
        *_INDEXES,
    ]


_INDEXES: Final = (
    "CREATE INDEX runs_by_start ON runs (started_ms, run)",
    "CREATE INDEX runs_by_id ON runs (substr(run_id, 1, 64))",
    "CREATE INDEX runs_by_pipeline ON runs (pipeline, started_ms, run)",
    "CREATE INDEX runs_by_status ON runs (status, started_ms, run)",
    """CREATE INDEX runs_by_wake ON runs (pipeline, wake_ms, version)
        WHERE status IN ('SUSPENDED', 'INTERRUPTED') AND blocked_since_ms IS NULL""",
    """CREATE INDEX runs_by_queue ON runs (pipeline, priority, wake_ms, run, version)
        WHERE status = 'QUEUED' AND queue_key IS NULL AND blocked_since_ms IS NULL""",
    """CREATE INDEX runs_by_key ON runs (pipeline, queue_key, priority, wake_ms, run, version)
        WHERE status = 'QUEUED' AND queue_key IS NOT NULL AND blocked_since_ms IS NULL""",
    "CREATE INDEX runs_by_block ON runs (pipeline, blocked_since_ms, version) WHERE blocked_since_ms IS "
    "NOT NULL",
    "CREATE INDEX runs_by_claim ON runs (pipeline, claim_until_ms) WHERE claim_until_ms IS NOT NULL",
    "CREATE INDEX events_by_time ON events (written_ms)",
    "CREATE INDEX failed ON attempts (run, execution, (started_ns + duration_ns)) WHERE failure_class IS "
    "NOT NULL",
    "CREATE INDEX called ON attempts (run, execution, position) WHERE identity IS NOT NULL",
)
