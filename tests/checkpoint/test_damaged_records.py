"""Damage of one record is CorruptCheckpoint with its name, or changes nothing, on every store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import redis
from hypothesis import HealthCheck, Phase, example, given, note, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from tests.checkpoint.damage import database, reseal
from tests.kit import Num, failing_with
from tests.shared_stores import SHARED, opened, place
from tests.store_suite.journal import State, begin, commit, row, settled

from stroma import Flow, SQLiteStore, StepFailed, StromaRunner
from stroma.checkpoint import CheckpointLost, CorruptCheckpoint, RunRequest, StepCall, StoreError
from stroma.checkpoint.decoding import RecordName, decode_json
from stroma.checkpoint.durable.annotations import annotate
from stroma.checkpoint.durable.control import accept_requests
from stroma.checkpoint.durable.integrity import input_step
from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.owner import new_owner
from stroma.checkpoint.durable.rows import Annotation, Opening, Rows, Step
from stroma.checkpoint.durable.session import DurableSession
from stroma.checkpoint.entries import USAGE_NOTE, PriorUsage, SentMessage, Waiting, effect_note
from stroma.checkpoint.flow_notes import decode_flow_note
from stroma.checkpoint.redis.format import step_row
from stroma.contracts.schema import schema_of
from stroma.failures import FailureClass
from stroma.failures.tracebacks import read_failure_site
from stroma.trace.events import Failed
from stroma.trace.rejected import Complaint, RejectedOutput

SCHEMA = schema_of(State)
FRAMES = json.dumps([[["a.py", 1, "f", "x = 1"]], []]).encode()
REJECTED = RejectedOutput({"n": "x"}, False, (Complaint(("n",), "no number"),)).encode()
#: Notes of each form.
NOTES: dict[str, bytes] = {
    "0:b:": b"7",
    "0:d:": b"[[3, 4]]",
    "0:e:1": b'["x#0", 0, ""]',
    "0:f:y#0": json.dumps(
        {
            "event": 2,
            "node": "y",
            "kind": "TERMINAL",
            "message": "no",
            "reason": None,
            "attempt": 1,
            "type": "ValueError",
            "retry_after": None,
            "input_key": "{}",
            "mark": None,
        }
    ).encode(),
    "0:s:!sleep#0": b"[1700000000000, 1.5]",
    "0:v:0": b"1700000000000",
    "0:w:!wait#0": b"1.5",
    "0:x:!wait#0": b"true",
    "0:seed:": b"\x00\xff",
    USAGE_NOTE: PriorUsage(3, 0.5).as_note(),
    effect_note(0, ""): b'["n", 1, true, "", ""]',
}
#: Rows without a checksum: their damage shows only where a value has a type that no store writes.
UNSIGNED = ("runs", "attempts", "run", "failed", "identities", "ids", "due")


async def fill(store: Any, run_id: str) -> None:
    """Write a record of each kind, as the library writes it."""
    await settled(store.save(run_id, "saved", State(n=1)))
    session = await begin(store, run_id, State(n=1), deliver=True, tags=("a", "b"), lease_seconds=3600.0)
    session.note_call(0, "call")
    session.note_attribution({"trace": "00-a-b-01"})
    session.note_attribution({"user": "alice"})
    for key, data in NOTES.items():
        session.note(key, data)
    attempt = row(0, "n", output=SCHEMA.snapshot(State(n=2)))
    await settled(session.record(attempt, SCHEMA, State(n=2), StepCall(1, b"{}")))
    await commit(session, 1, State(n=3), "m", branch="0")
    failed = row(1, "m", branch="1", failure=FailureClass.RECOVERABLE, message="no")
    failure = Failed(FailureClass.RECOVERABLE, "no", "contract", "ValueError")
    failed = failed._replace(started_ns=5, failure=failure)
    session.record_failure_site(1, "1", 1, failed.started_ns, lambda: FRAMES)
    session.record_rejected(1, "1", failed.started_ns, REJECTED)
    await settled(session.record(failed, None, None))
    await settled(session.suspend(row(2, "ask"), Waiting(2, "", "ask", "may I?", "m:Q")))
    await settled(session.ask(Waiting(3, "", "ask", "and this?", "m:Q", b"7")))

    def control(rows: Rows) -> None:
        rows.update(rows.find(run_id).run, {"parent": "parent"})
        annotate(
            rows,
            rows.key_of(run_id),
            Annotation.DEATHS,
            "",
            "deaths",
            Step("1", str(session.epoch), b"", b"", 1),
        )
        accept_requests(session._records(rows))

    await store.set_budget(run_id, {"max_tokens_total": 100})
    await store._submit(Transaction(run_id, control))
    await store.set_budget(run_id, {"max_cost_usd": 1.5})
    session.abandon()  # Its process has died.


class Looked(StoreError):
    """Ends a transaction without a change."""


async def resumed(store: Any, run_id: str) -> Any:
    """Return what a session that resumes a run has of it; the store stays as it is."""
    session = DurableSession(run_id, store._submit, store._payloads)
    data = SCHEMA.encode(State(n=1))
    request = RunRequest(
        run_id, "pipeline", State(n=1), SCHEMA, if_exists="resume", if_running="take_over", deliver=True
    )
    opening = Opening(run_id, "pipeline", str(new_owner(session)), 30.0, input_step("", data))

    def look(rows: Rows) -> None:
        session.open(request, opening, data, rows)
        raise Looked

    with contextlib.suppress(Looked):
        await store._submit(Transaction(run_id, look))
    notes = {}
    for key, value in session.notes.items():
        if key == USAGE_NOTE:
            notes[key] = PriorUsage.of_no_attempt(session.notes, run_id)
        elif "effect" in key:
            notes[key] = decode_json(value, tuple[str, int, bool, str, str], RecordName(run_id, "note", key))
        else:
            notes[key] = decode_flow_note(run_id, key, [*key.split(":", 2), ""][1], value)
    signed = (
        session.restored,
        notes,
        session.waiting,
        session.control,
        session.attribution,
        session.traceparent,
    )
    return *signed, session.undelivered


#: What reads a run.
READS: dict[str, Callable[[Any], Any]] = {
    "resume": lambda store: asyncio.run(resumed(store, "r")),
    "waiting": lambda store: store.waiting("r"),
    "input": lambda store: store.input_of("r"),
    "output": lambda store: (store.output_of("r", 0), store.output_of("r", 1, "0")),
    "saved": lambda store: asyncio.run(store.load_typed("r", "saved", State)),
    "newest": lambda store: asyncio.run(store.load_typed("r", "n", State)),
    "site": lambda store: store.failure_site_of("r", 1, "1"),
    "rejected": lambda store: store.rejected_of("r", 1, "1", 5),
}
#: What reads several runs, or a run with what is damaged of it.
LISTS: dict[str, Callable[[Any], Any]] = {
    "list": lambda store: store.list_runs(),
    "page": lambda store: store.run_page().runs,
    "found": lambda store: [run for run in (store.get_run(one) for one in ("r", "other")) if run is not None],
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "attempts": lambda store: len(store.attempts("r")),
    "attempt page": lambda store: len(store.attempt_page("r").attempts),
    "notes": lambda store: store.flow_notes("other"),
    "of another run": lambda store: asyncio.run(resumed(store, "other")),
}


class Record(NamedTuple):
    """A place of a store that holds a value. ``write`` changes it."""

    table: str
    column: str
    value: Any
    write: Callable[[Any], None]


def records(kind: str, where: str) -> list[Record]:
    """Return all that a store holds of run r, or all rows."""
    if kind == "redis":
        return list(_keys(where))
    return list(_cells(kind, where))


def _keys(where: str) -> Iterator[Record]:
    client = redis.Redis.from_url(where)
    for key in sorted(client.keys("stroma:{r}:*")):
        name = key.decode().rpartition("}:")[2].partition(":")[0]
        if client.type(key) == b"hash":
            for field, value in sorted(client.hgetall(key).items()):
                yield Record(name, field.decode(), value, lambda new, k=key, f=field: client.hset(k, f, new))
        else:
            for at, value in enumerate(client.lrange(key, 0, -1)):
                yield Record(name, str(at), value, lambda new, k=key, i=at: client.lset(k, i, new))


def _cells(kind: str, where: str) -> Iterator[Record]:
    keys = {"runs": "run", "steps": "id"}
    keys["attempts"] = "run, execution, epoch, position, started_ns, branch, attempt"
    for table, key in keys.items():
        at = " AND ".join(f"{name} = ?" for name in key.split(", "))
        with database(kind, where) as db:
            names, rows = db.select(f"SELECT * FROM {table}")
        for values in rows:
            one = dict(zip(names, values, strict=True))
            if one["run"] != 1:
                continue
            row = [one[name] for name in key.split(", ")]
            for name, value in one.items():
                if name in key or name in ("run", "id", "run_id", "run_key", "branch_key") or value is None:
                    continue
                # The bytes of a text, which SQLite does not look at.
                cast = "CAST(? AS TEXT)" if isinstance(value, str) and kind == "sqlite" else "?"
                statement = f"UPDATE {table} SET {name} = {cast} WHERE {at}"
                yield Record(table, name, value, partial(_write, kind, where, statement, row))


def _write(kind: str, where: str, statement: str, row: list[Any], new: Any) -> None:
    with database(kind, where) as db:
        db.execute(statement, new, *row)


REPLACEMENTS = (
    b"",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"7",
    b"-1",
    b"null",
    b"true",
    b'"x"',
    b"{}",
    b"[]",
    b"[[],[]]",
    b"9" * 5000,
    b"9" * 19,
    b"1e999",
    b"NaN",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x00",
    b"x" * 1000,
)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A function that damages some bytes."""
    way = draw(st.sampled_from(["truncate", "flip", "replace", "replace line", "append"]))
    at = draw(st.floats(0, 1, exclude_max=True))
    new = draw(st.sampled_from(REPLACEMENTS))
    bit = 1 << draw(st.integers(0, 7))

    def damage(data: bytes) -> bytes:
        index = int(at * len(data))
        if way == "truncate":
            return data[:index]
        if way == "flip":
            return data[:index] + bytes([data[index] ^ bit]) + data[index + 1 :] if data else b"x"
        if way == "append":
            return data + new
        _, newline, rest = data.partition(b"\n")
        return new + newline + rest if way == "replace line" else new

    return damage


def outcome(read: Callable[[Any], Any], store: Any) -> Any:
    """Return the result of reading, or the message of a CorruptCheckpoint that names the run."""
    try:
        return read(store)
    except StoreError as error:
        problem = error
    assert "'r'" in str(problem), problem
    assert isinstance(problem, CorruptCheckpoint | CheckpointLost), problem
    return problem


def check(store: Any, whole: dict[str, Any], table: str, *, is_resealed: bool) -> None:
    """Check what is read of a store in which one record of run r is damaged."""
    may_differ = table in UNSIGNED or is_resealed
    for name, read in READS.items():
        result = outcome(read, store)
        assert isinstance(result, StoreError) or may_differ or result == whole[name], name
    for name, read in LISTS.items():
        listed = outcome(read, store)
        if isinstance(listed, StoreError):
            assert table in UNSIGNED
            continue
        runs = {run.run_id: run for run in listed}
        expected = {run.run_id: run for run in whole[name]}
        assert runs["other"] == expected["other"]
        if "r" in runs and not may_differ and table != "annotations":
            assert runs["r"] == expected["r"]
    for name, read in OTHERS.items():
        result = outcome(read, store)
        may_change = name.startswith("attempt") and (table in UNSIGNED or isinstance(result, StoreError))
        assert result == whole[name] or may_change, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_damage_of_any_record(kind: str) -> None:
    """Reading a damaged record is CorruptCheckpoint with the run's id or changes nothing; deleting works."""
    with place(kind) as where, opened(kind, where) as store:
        for run_id in ("r", "other"):
            asyncio.run(fill(store, run_id))
        whole = {name: read(store) for name, read in {**READS, **LISTS, **OTHERS}.items()}
        assert whole["site"] == read_failure_site(FRAMES, 1, 5)
        assert len(whole["resume"][1]) == len(NOTES)
        assert whole["resume"][3].budget == {"max_tokens_total": 100, "max_cost_usd": 1.5}
        places = records(kind, where)

        @settings(
            max_examples=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            print_blob=False,
            phases=[Phase.generate],
            report_multiple_bugs=False,
        )
        @given(st.integers(0, len(places) - 1), damages(), st.booleans())
        def damaged(number: int, damage: Callable[[bytes], bytes], is_resealed: bool) -> None:
            record = places[number]
            before = record.value if isinstance(record.value, bytes) else str(record.value).encode()
            new: Any = damage(before)
            if new == before:
                return
            note(f"{record.table}, {record.column}: {record.value!r:.60} -> {new!r:.60}")
            is_resealed = is_resealed and kind == "sqlite" and record.table == "steps"
            try:
                record.write(new if isinstance(record.value, bytes) or kind == "sqlite" else new.decode())
                if is_resealed:
                    _reseal(where)
            except (sqlite3.Error, psycopg.Error, UnicodeError):
                record.write(record.value)
                return  # The server refuses such a value.
            try:
                # An annotation at the position of a commit or of another execution, and a saved state of
                # another node, are as ones that were deleted: no store counts them.
                moved = ("steps", "position"), ("steps", "node_id")
                is_moved = (record.table, record.column) in moved
                is_moved |= (record.table, record.column, record.value) == ("steps", "execution", 0)
                check(store, whole, record.table, is_resealed=is_resealed or is_moved)
            finally:
                record.write(record.value)
                if is_resealed:
                    _reseal(where)

        damaged()
        assert {name: read(store) for name, read in {**READS, **LISTS, **OTHERS}.items()} == whole
        if kind == "redis":
            redis.Redis.from_url(where).hset("stroma:{r}:saved", "nobody", "x y\n")
            with pytest.raises(CorruptCheckpoint, match="the saved state 'nobody' of run 'r' is damaged"):
                store.map_items("r", "nobody", 0, 1)
            redis.Redis.from_url(where).hset("stroma:{r}:run", "tokens", "x")
            assert "the field 'tokens' of run 'r' is damaged" in str(outcome(LISTS["list"], store))
        asyncio.run(store.delete("r"))
        assert [run.run_id for run in store.list_runs()] == ["other"]


def _reseal(where: str) -> None:
    with contextlib.closing(sqlite3.connect(where, isolation_level=None)) as db:
        db.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        reseal(db)


def test_a_damaged_place_of_a_commit_in_redis_is_named() -> None:
    """A row whose place cannot be read is a damaged commit of its run."""
    with pytest.raises(CorruptCheckpoint, match="the commit 'x:0' of run 'r' is damaged"):
        step_row("r", "x:0", b"")


async def test_a_message_that_cannot_be_decrypted_is_named(tmp_path: Path) -> None:
    """A message that the codec does not open is CorruptCheckpoint with its number and its run."""

    class Codec:
        is_broken = False

        def encode(self, data: bytes) -> bytes:
            return data[::-1]

        def decode(self, data: bytes) -> bytes:
            if self.is_broken:
                raise ValueError("another key")
            return data[::-1]

    codec = Codec()
    async with SQLiteStore(tmp_path / "runs.db", codec=codec) as store:
        session = await begin(store)
        await settled(store.send("run", SentMessage(0, "", "id", b"1")))
        codec.is_broken = True
        with pytest.raises(CorruptCheckpoint, match="the message '000000000001' of run 'run'"):
            await settled(session.messages(0))


class Pair(NamedTuple):
    """Two numbers."""

    one: int
    two: float | None


@pytest.mark.parametrize(
    ("shape", "data", "value"),
    [
        (Pair, b"[1, 2.5]", Pair(1, 2.5)),
        (Pair, b"[1, null]", Pair(1, None)),
        (dict[str, float], b'{"a": 1}', {"a": 1}),
        (list[tuple[str, bool]], b'[["a", true]]', [("a", True)]),
    ],
)
def test_decoded_records(shape: Any, data: bytes, value: Any) -> None:
    """A record of the right shape has its value."""
    assert decode_json(data, shape, RecordName("r", "note")) == value


@given(
    st.sampled_from([Pair, dict[str, float], list[str], int, float, str, tuple[str, Pair | None]]),
    st.binary(),
)
@example(Pair, b"[1]")
@example(Pair, b"[true, null]")
@example(list[str], b"[" * 100_000)
@example(int, b"9" * 5000)
@example(int, b"9" * 20)
@example(float, b"1e999")
@example(float, b"NaN")
@example(str, b"\xff")
def test_records_of_another_shape(shape: Any, data: bytes) -> None:
    """Any other data is CorruptCheckpoint with the name of the record."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(data), str | int | float | dict | list):
            return
    with pytest.raises(CorruptCheckpoint, match="the note 'k' of run 'r' is damaged"):
        decode_json(data, shape, RecordName("r", "note", "k"))


class Go(BaseModel):
    ok: bool = True


def build(path: Path) -> tuple[StromaRunner, Any]:
    """Return a runner, and a flow with a failure, a value, a sleep, and a question with a time limit."""
    policies = {"AMBIGUOUS": {"max_retries": 0}}
    runner = StromaRunner.quick(store=SQLiteStore(path), inline_wait_seconds=1, policy_map=policies)
    bad = runner.node("bad", input=Num, output=Num)(failing_with(PermissionError, "no"))

    @runner.flow("f", input=Num, output=Num)
    async def body(flow: Flow, state: Num) -> Num:
        flow.now()
        await flow.sleep(0.001)
        with contextlib.suppress(StepFailed):
            await flow.step(bad, state)
        await flow.wait_for(Go, reason="go?", timeout=3600)
        return Num(n=9)

    return runner, body


@pytest.mark.parametrize("data", [b"null", b"{}", b'"x"', b"[" * 100_000, b"9" * 5000, b"\xff", b""])
async def test_notes_of_a_flow_with_foreign_contents(tmp_path: Path, data: bytes) -> None:
    """A note of a flow with a right checksum and a wrong form stops its run; a worker goes on with others."""
    path = tmp_path / "runs.db"
    runner, body = build(path)
    for run_id in ("r", "other"):
        await runner.run(body, Num(), run_id=run_id)
        await runner.signal(run_id, {"ok": True}, schema=Go)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        notes = db.execute("SELECT id, branch, output FROM steps WHERE run = 1 AND position = -9").fetchall()
        assert {branch.split(":")[1] for _, branch, _ in notes} >= {"e", "f", "s", "v", "w"}
        for number, branch, output in notes:
            db.execute("UPDATE steps SET output = ? WHERE id = ?", (data, number))
            reseal(db)
            with pytest.raises(
                CorruptCheckpoint, match=f"the note '{re.escape(branch)}' of run 'r' is damaged"
            ):
                await runner.resume(body, "r")
            db.execute("UPDATE steps SET output = ? WHERE id = ?", (output, number))
        db.execute("UPDATE steps SET output = ? WHERE id = ?", (data, notes[0][0]))
        reseal(db)
    ends: dict[str, Any] = {}
    done = asyncio.Event()

    def on_result(run_id: str, result: Any) -> None:
        ends.setdefault(run_id, result)  # It is tried again after 5 s.
        if len(ends) == 2:
            done.set()

    worker = asyncio.create_task(runner.serve(body, poll_seconds=0.02, on_result=on_result))
    await asyncio.wait_for(done.wait(), 20)
    await runner.shutdown()
    await worker
    assert isinstance(ends["r"], CorruptCheckpoint)
    assert ends["other"].status == "RESUMED"


async def test_a_damaged_budget_stops_the_run(tmp_path: Path) -> None:
    """A limit that was set for a run and is damaged stops the run; it is not ignored."""
    path, calls = tmp_path / "runs.db", list[int]()
    runner = StromaRunner.quick(store=SQLiteStore(path), policy_map={"AMBIGUOUS": {"max_retries": 0}})

    @runner.node("a", input=Num, output=Num)
    async def work(state: Num) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise PermissionError("first")
        return {"n": state.n + 1}, 10

    await runner.run([work] * 5, Num(), run_id="r")
    await runner.set_budget("r", tokens=15)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE steps SET output = CAST('{}' AS BLOB) WHERE position = -3")
    with pytest.raises(CorruptCheckpoint, match="the request 'budget 000000001' of run 'r' is damaged"):
        await runner.resume([work] * 5, "r")
    assert len(calls) == 1


async def test_a_damaged_cause(tmp_path: Path) -> None:
    """A failed run whose cause is damaged is CorruptCheckpoint with its id."""
    path = tmp_path / "runs.db"
    often = {"AMBIGUOUS": {"max_retries": 24, "backoff_seconds": 0}}
    runner = StromaRunner.quick(store=SQLiteStore(path), policy_map=often)
    fail = runner.node("a", input=Num, output=Num)(failing_with(PermissionError, "first"))
    await runner.run([fail], Num(), run_id="r")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE runs SET cause = '1:x'")
    with pytest.raises(CorruptCheckpoint, match="the field 'cause' of run 'r' is damaged"):
        SQLiteStore(path).get_run("r")


async def test_a_damaged_request_pauses_the_owner(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged request about a run that is in progress pauses it, since it may be a smaller budget."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        session = await begin(store, "r")
        received: list[Any] = []
        session.on_control = received.append

        def damage(rows: Rows) -> None:
            rows.annotate(
                rows.key_of("r"), Annotation.REQUEST, "budget 000000001", "", Step("", "", b"{}", b"wrong")
            )
            session.read_requests(rows)

        await store._submit(Transaction("r", damage))
        assert received[0].pause
        assert "the request 'budget 000000001' of run 'r' is damaged" in caplog.text
        session.abandon()


async def test_a_run_that_was_taken_over_receives_no_requests(tmp_path: Path) -> None:
    """A request reaches the owner alone, not the session that was one before."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        stale = await begin(store, "r")
        await begin(store, "r", if_exists="resume", if_running="take_over")
        received: list[Any] = []
        stale.on_control = received.append
        await settled(store.pause("r"))
        await store._submit(Transaction("r", stale.read_requests))
        assert received == []
