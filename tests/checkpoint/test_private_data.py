"""What a run recorded ends with the run, whatever kind of record it is, on every store."""

from __future__ import annotations

import gc
import os
import time
import types
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from tests.checkpoint.every_record import OF_NO_RUN, PLAIN, annotate_all, contents, key_kind, write_every_kind
from tests.shared_stores import SHARED, opened, place, store_of
from tests.store_suite.journal import State, begin, commit, finish, row, settled

from stroma.checkpoint.durable.rows import OF_EXECUTION, Annotation
from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.redis.format import EXECUTION_KEYS, RUN_KEYS
from stroma.failures import FailureClass

MARK = "private"


@pytest.fixture(params=SHARED)
def at(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    with place(request.param) as where:
        yield request.param, where


def holding(found: dict[str, bytes]) -> set[str]:
    return {name for name, data in found.items() if MARK.encode() in data}


def opened_with_blobs(kind: str, where: str, blobs: Path, **options: Any) -> Any:
    """Return a durable store that keeps large payloads in a directory."""
    return opened(kind, where, blobs=blobs, blob_bytes=1000, **options)


def age(blobs: Path) -> None:
    """Make all blobs old enough to be collected."""
    for file in blobs.rglob("*"):
        os.utime(file, (1, 1))


def is_of_run(name: str) -> bool:
    return name.partition(".")[0] not in OF_NO_RUN


@pytest.mark.slow
@pytest.mark.parametrize("way", ["delete", "gc", "ttl"])
async def test_nothing_remains_of_a_run(at: tuple[str, str], way: str, tmp_path: Path) -> None:
    """A run that is deleted, collected or expired leaves no record of any kind behind."""
    kind, where = at
    if way == "ttl" and kind != "redis":
        return  # Only Redis has an expiry.
    options = {"ttl_seconds": 1 if way == "ttl" else None} if kind == "redis" else {}
    async with opened_with_blobs(kind, where, tmp_path, **options) as store:
        session = await write_every_kind(store, "r", MARK)
        found = contents(kind, where, tmp_path)
        every = {name for name in found if is_of_run(name) and name.partition(".")[2] not in PLAIN}
        # A new column or key must hold the mark too: write it in write_every_kind().
        assert every - {"ids", "runs", "runs.cause", "runs.error"} <= holding(found)
        if kind == "redis":
            assert every == {*RUN_KEYS, *EXECUTION_KEYS, "saved", "ids", "runs", "blocked", "live", "blobs"}
        await session.end("COMPLETED", MARK)
        assert holding(contents(kind, where, tmp_path)) >= {"run" if kind == "redis" else "runs.error"}
        await annotate_all(store, "r", MARK)
        if way == "delete":
            await store.delete("r")
        elif way == "ttl":
            await expired(where)
        age(tmp_path)
        time.sleep(0.002)  # A run that ended in this millisecond is not older than it.
        await store.gc(keep_for=timedelta(0))
        left = contents(kind, where, tmp_path)
        assert {name for name in left if is_of_run(name)} == set()
        assert holding(left) == set()


async def expired(where: str) -> None:
    """Wait until all keys of run r are gone; none may be without an expiry."""
    with redis.Redis.from_url(where) as client:
        keys = [key for key in client.keys("stroma:{r}:*") if key_kind(key.decode()) not in OF_NO_RUN]
        assert [key for key in keys if client.pttl(key) < 0] == []
        end = time.monotonic() + 10
        while client.exists(*keys):
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.slow
async def test_a_restart_has_nothing_of_the_execution_before(at: tuple[str, str], tmp_path: Path) -> None:
    """A restart keeps the records that belong to the run; no annotation from before reaches it."""
    kind, where = at
    async with opened_with_blobs(kind, where, tmp_path) as store:
        await finish(await write_every_kind(store, "r", MARK), "INTERRUPTED")
        session = await begin(store, "r", if_exists="restart")
        assert_has_nothing(session)
        assert set(kinds_of(store, "r")) == {*Annotation} - {*OF_EXECUTION} | {Annotation.INPUT}
        await finish(session)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["delete", "gc"])
async def test_a_new_run_has_nothing_of_the_old_one(at: tuple[str, str], way: str, tmp_path: Path) -> None:
    """A new run with the id of a deleted run has none of its records."""
    kind, where = at
    async with opened_with_blobs(kind, where, tmp_path) as store:
        session = await write_every_kind(store, "r", MARK)
        await finish(session)
        time.sleep(0.002)
        await (store.delete("r") if way == "delete" else store.gc(keep_for=timedelta(0)))
        # An owner that has not noticed yet.
        session.note_attribution({"user": MARK})
        session.note_attribution({"trace": MARK})
        _ = session.append_events(9, MARK.encode())
        session = await begin(store, "r")
        assert_has_nothing(session)
        assert kinds_of(store, "r") == [Annotation.INPUT]
        assert "events" not in {name.partition(".")[0] for name in contents(kind, where, tmp_path)}
        await finish(session)


@pytest.mark.slow
async def test_a_fork_has_only_what_it_copies(at: tuple[str, str], tmp_path: Path) -> None:
    """A fork gets input, earlier commits with the effects that they called, and labels; no other record."""
    kind, where = at
    async with opened_with_blobs(kind, where, tmp_path) as store:
        session = await write_every_kind(store, "r", MARK)
        await commit(session, 0, State(text="public"))
        await finish(session)
        await store.fork("r", "f", 1)
        assert {*kinds_of(store, "f")} == {Annotation.ATTRIBUTION, Annotation.EFFECT, Annotation.INPUT}
        session = await begin(store, "f", State(text=MARK), if_exists="resume")
        assert (session.notes, session.waiting, session.undelivered) == ({}, {}, [])
        assert session.attribution["session"] == "r"
        await finish(session)


def kinds_of(store: Any, run_id: str) -> list[Annotation]:
    """Return the kinds of annotations that a run has."""

    def query(rows: Any) -> list[Annotation]:
        run = rows.find(run_id)
        # Redis reads annotations of a parent only if there is one.
        return [] if run is None else [kind for kind in Annotation if list(rows.annotations(run.run, kind))]

    found: list[Annotation] = store.read(query, [])
    return found


def assert_has_nothing(session: Any) -> None:
    assert (session.restored, session.notes, session.waiting, session.tried) == ({}, {}, {}, {})
    assert (session.attribution, session.traceparent, session.places) == ({}, None, {})
    assert list(session.undelivered) == []


@pytest.mark.parametrize("way", ["delete", "restart"])
async def test_nothing_remains_of_a_run_in_memory(way: str) -> None:
    """A run in memory that is deleted or restarted leaves no record behind, except states from save()."""
    with store_of("async-memory") as store:
        session = await begin(store, "r", State(text=MARK + "!"), tags=(MARK + "!",), if_exists="restart")
        session.note("0:x:" + MARK, (MARK + "!").encode())
        session.note_attribution({"trace": MARK + "!"})
        session.note_attribution({"user": MARK + "!"})
        session.note_call(0, MARK + "!")
        session.record_failure_site(0, "", 1, 1, lambda: (MARK + "!").encode())
        session.record_rejected(0, "", 1, (MARK + "!").encode())
        session.append_events(1, (MARK + "!").encode())
        failed = row(0, MARK + "!", failure=FailureClass.TERMINAL, message=MARK + "!")
        await settled(session.record(failed, None, None))
        await commit(session, 0, State(text=MARK + "!"))
        await settled(session.suspend(row(1), Waiting(1, "", "n", MARK + "!", "")))
        await finish(session, "SUSPENDED", MARK + "!")
        await store.set_budget("r", {"max_tokens_total": 1.0})
        assert remains(store)
        if way == "delete":
            await store.delete("r")
        else:
            await finish(await begin(store, "r", if_exists="restart"))
        del session, failed
        assert not remains(store)


def remains(store: Any) -> list[Any]:
    """Return the texts with the mark that a store still refers to."""
    seen: dict[int, Any] = {}
    todo: list[Any] = [store]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.FunctionType):
            continue
        seen[id(one)] = one
        todo += gc.get_referents(one)
    texts = [one for one in seen.values() if isinstance(one, str | bytes)]
    return [text for text in texts if MARK in str(text)]
