"""Generated stores of a million attempts, and their use. See test_scale.py and benchmarks.scale."""

from __future__ import annotations

import os
import sqlite3
from datetime import timedelta
from typing import Any

from tests.kit import Num
from tests.store_suite.journal import row, settled

from stroma import SQLiteStore, stroma_node
from stroma.checkpoint import RunQuery, RunRequest, open_store
from stroma.checkpoint.durable.integrity import input_step, seal
from stroma.checkpoint.durable.rows import Annotation, Step
from stroma.checkpoint.identity import mark_of
from stroma.contracts.schema import schema_of

SCHEMA = schema_of(Num)
OUTPUT = SCHEMA.encode(Num())


def run_name(number: int) -> str:
    return f"run-{number:06d}"


def fill(url: str, runs: int, attempts: int, *, vacuum: bool = True) -> None:
    """A thousand pipelines take turns; one run in 1,000 failed. ``vacuum``: PostgreSQL has its statistics."""
    kind = url.partition(":")[0]
    {"sqlite": fill_sqlite, "postgresql": fill_postgres, "unix": fill_redis}[kind](url, runs, attempts)
    if kind == "postgresql" and vacuum:
        import psycopg

        with psycopg.connect(url, autocommit=True) as db:
            db.execute("VACUUM ANALYZE")


# What SQL of SQLite and PostgreSQL shares: columns, by their names so that a new one does not move them, and
# their values for a generated run i and its attempt j (both from 0).
_RUN_COLUMNS = """pipeline, execution, status, started_ms, updated_ms, tokens, cost_pico, latency_ns,
    lease_epoch, attempt_count, commit_count"""
_RUN = (
    "'p' || (i % 1000), 1, CASE i % 1000 WHEN 999 THEN 'FAILED' ELSE 'COMPLETED' END, 1000 + i, 1000 + "
    "i, 1, 1, 1, 1"
)
INPUT = input_step(SCHEMA.fingerprint, OUTPUT)
_INPUT = f"i + 1, 0, {int(Annotation.INPUT)}, '', '', 0, 0, 0, ''"
_ATTEMPT_COLUMNS = """run, execution, epoch, position, started_ns, branch, attempt, node_id, duration_ns,
    outcome, tokens, output_tokens, cost_pico, function_ns"""
_ATTEMPT = "i + 1, 1, 1, j, j, '', 1, 'n' || j, 1, 'success', 1, 0, 1, 1"
_STEP_COLUMNS = """run, execution, position, branch, node_id, epoch, attempt, started_ns, schema_ref,
    contract, output, sha256"""
_STEP = "i + 1, 1, j, '', 'n' || j, 1, 1, j, ''"


def fill_sqlite(url: str, runs: int, attempts: int) -> None:
    path = url.removeprefix("sqlite:///")
    SQLiteStore(path)._file.open().close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA synchronous=OFF")
    db.create_function("checksum", 1, _sha_of, deterministic=True)
    db.execute("BEGIN")
    numbers = f"WITH RECURSIVE r(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM r WHERE i < {runs - 1})"
    both = f"{numbers}, a(j) AS (SELECT 0 UNION ALL SELECT j + 1 FROM a WHERE j < {attempts - 1})"
    db.execute(
        f"""{numbers} INSERT INTO runs (run, run_key, run_id, {_RUN_COLUMNS})
        SELECT i + 1, printf('run-%06d', i), printf('run-%06d', i), {_RUN}, {attempts}, {attempts} FROM r"""
    )
    inputs = (SCHEMA.fingerprint, OUTPUT, INPUT.sha256)
    values = f"SELECT '', {_INPUT}, ?, ?, ? FROM r"
    db.execute(f"{numbers} INSERT INTO steps (branch_key, {_STEP_COLUMNS}) {values}", inputs)
    db.execute(
        f"{both} INSERT INTO attempts (branch_key, {_ATTEMPT_COLUMNS}) SELECT '', {_ATTEMPT} FROM r, a"
    )
    values = f"SELECT '', {_STEP}, ?, ?, checksum(j) FROM r, a"
    steps = f"{both} INSERT INTO steps (branch_key, {_STEP_COLUMNS}) {values}"
    db.execute(steps, inputs[:2])
    db.execute("COMMIT")
    db.close()


def fill_postgres(url: str, runs: int, attempts: int) -> None:
    import psycopg

    store: Any = open_store(url)
    store._server.connect().close()
    with psycopg.connect(url) as db:
        db.execute(f'SET search_path = "{store._server.schema}"'.encode())
        numbers, both = (
            f"generate_series(0, {runs - 1}) AS r(i)",
            f"generate_series(0, {attempts - 1}) AS a(j)",
        )
        name = "'run-' || lpad(i::text, 6, '0')"
        db.execute(
            f"""INSERT INTO runs (run, run_key, run_id, {_RUN_COLUMNS}) OVERRIDING SYSTEM VALUE
            SELECT i + 1, {name}, {name}, {_RUN}, {attempts}, {attempts} FROM {numbers}""".encode()
        )
        db.execute(f"SELECT setval(pg_get_serial_sequence('runs', 'run'), {runs})".encode())
        inputs = (SCHEMA.fingerprint, OUTPUT, INPUT.sha256)
        values = f"SELECT '', {_INPUT}, %s, %s, %s FROM {numbers}"
        db.execute(f"INSERT INTO steps (branch_key, {_STEP_COLUMNS}) {values}".encode(), inputs)
        db.execute(
            f"""INSERT INTO attempts (branch_key, {_ATTEMPT_COLUMNS})
            SELECT '', {_ATTEMPT} FROM {numbers}, {both}""".encode()
        )
        # As seal() in stroma.checkpoint.durable.integrity.
        head = f"""'[' || j || ', "", "n' || j || '", "{SCHEMA.fingerprint}", "", null, null]'"""
        db.execute(
            f"""INSERT INTO steps (branch_key, {_STEP_COLUMNS})
            SELECT '', {_STEP}, %s, %s, sha256(convert_to({head}, 'UTF8') || %s)
            FROM {numbers}, {both}""".encode(),
            (SCHEMA.fingerprint, OUTPUT, OUTPUT),
        )


def fill_redis(url: str, runs: int, attempts: int) -> None:
    import redis

    from stroma.checkpoint.records import AttemptRecord
    from stroma.checkpoint.redis.format import annotations_key, pack_attempt, pack_step, prefix_of

    client = redis.Redis.from_url(url)
    steps = {
        f"{j}:": pack_step(f"n{j}", Step(SCHEMA.fingerprint, "", OUTPUT, _sha_of(j))) for j in range(attempts)
    }
    tried = {}
    for j in range(attempts):
        attempt = AttemptRecord(
            position=j,
            started_ns=j,
            branch="",
            attempt=1,
            node_id=f"n{j}",
            duration_ns=1,
            outcome="success",
            failure_class=None,
            message=None,
            reason=None,
            tokens=1,
            output_tokens=0,
            cost_pico=1,
            model=None,
            function_ns=1,
        )
        tried[f"1:{j}:{j}:1:"] = f"{j + 1} {len(OUTPUT)} {pack_attempt(attempt)}"
    value = pack_step("", INPUT)
    pipe = client.pipeline(transaction=False)
    for i in range(runs):
        name, prefix = run_name(i), prefix_of(run_name(i))
        status = "FAILED" if i % 1000 == 999 else "COMPLETED"
        facts = {
            "token": f"t{i}",
            "run_id": name,
            "pipeline": f"p{i % 1000}",
            "execution": 1,
            "status": status,
            "started_ms": 1000 + i,
            "updated_ms": 1000 + i,
            "tokens": 1,
            "cost_pico": 1,
            "latency_ns": 1,
            "owner": "x",
            "epoch": 1,
            "nodes": attempts,
            "commit_count": attempts,
            "attempt_count": attempts,
            "identities": 0,
            "writes": attempts + 2,
            "order": attempts,
        }
        pipe.hset(f"{prefix}run", mapping=facts)
        pipe.hset(f"{prefix}{annotations_key(Annotation.INPUT)}", "", value)
        for part, values in (("steps", steps), ("attempts", tried)):
            pipe.hset(f"{prefix}{part}:1", mapping=values)
        pipe.zadd("stroma:runs", {name: (1000 + i) * 1000})
        pipe.zadd("stroma:ids", {name: 0})
        if i % max(1, 10_000 // attempts) == 0:
            pipe.execute()
    pipe.execute()


def _sha_of(j: int) -> bytes:
    """Return the checksum of the commit of attempt j."""
    return seal(j, "", f"n{j}", Step(SCHEMA.fingerprint, "", OUTPUT, b"")).sha256


async def nothing_expired(store: Any, runs: int) -> Any:
    # Everything generated is of 1970: what is kept for longer than that is all of it.
    return (await store.gc(keep_for=timedelta(days=365 * 80)))[0]


async def resume(store: Any, runs: int) -> Any:
    request = RunRequest(run_name(runs // 2), f"p{runs // 2 % 1000}", Num(), SCHEMA, "resume")
    session = await settled(store.open_run(request))
    result = len(session.restored)
    await settled(session.end("COMPLETED", None))
    return result


async def begin(store: Any, runs: int) -> Any:
    session = await settled(store.open_run(RunRequest("a new one", "p", Num(), SCHEMA)))
    await session.record(row(0), SCHEMA, Num())
    await settled(session.end("COMPLETED", None))


def _middle(store: Any, runs: int) -> str:
    """Where a page ends whose last run is the one in the middle."""
    started = store.get_run(run_name(runs // 2)).started_ms
    return (
        mark_of(started, runs // 2 + 1)
        if hasattr(store, "path") or hasattr(store, "schema")
        else mark_of(started * 1000, run_name(runs // 2))
    )


def blocking(call: Any) -> Any:
    async def operation(store: Any, runs: int) -> Any:
        result = call(store, runs)
        return result if isinstance(result, str) else len(result) if hasattr(result, "__len__") else None

    return operation


OPERATIONS: dict[str, Any] = {
    "list the newest 50": blocking(lambda s, n: s.list_runs()),
    "list 50 of one pipeline": blocking(lambda s, n: s.list_runs(pipeline="p7")),
    "list 50 that failed": blocking(lambda s, n: s.list_runs(status="FAILED")),
    "list the running ones (none)": blocking(lambda s, n: s.list_runs(status="RUNNING")),
    "a page that failed": blocking(lambda s, n: s.run_page(RunQuery(statuses=("FAILED", "PARTIAL"))).runs),
    "a page of a class (none)": blocking(lambda s, n: s.run_page(RunQuery(failure_class="TERMINAL")).runs),
    "a page with a text (none)": blocking(lambda s, n: s.run_page(RunQuery(text="nowhere")).runs),
    "a page with a tag (none)": blocking(lambda s, n: s.run_page(RunQuery(tag="none")).runs),
    "a page far down": blocking(lambda s, n: s.run_page(after=_middle(s, n)).runs),
    "an overview": blocking(lambda s, n: s.tally(0, 10**9)),
    'find "last"': blocking(lambda s, n: s.find_run("last")),
    "find by a prefix of 20": blocking(lambda s, n: s.find_run("run-00001")),
    "find by a prefix of all": blocking(lambda s, n: s.find_run("run-")),
    "get one": blocking(lambda s, n: [s.get_run(run_name(n // 2))]),
    "its attempts": blocking(lambda s, n: s.attempts(run_name(n // 2))),
    "resume one": resume,
    "start one, with a commit": begin,
    "`gc` that finds nothing": nothing_expired,
}


def long_nodes(nodes: int, calls: list[int]) -> list[Any]:
    def make(number: int) -> Any:
        async def func(state: Num) -> Any:
            calls.append(number)
            if number == nodes - 1 and os.environ.get("STOPS"):
                raise ValueError("the last one")
            return {"n": state.n + 1}

        return stroma_node(f"n{number}", input=Num, output=Num)(func)

    return [make(number) for number in range(nodes)]
