"""Stored events: order, limits, and what ends them; over every store."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from tests.fixtures import store_fixture
from tests.shared_stores import SHARED, STORES, opened, place
from tests.store_suite.helpers import State, begin, commit, finish, settled, suspend_run

from stroma.checkpoint import CorruptCheckpoint, StoreError
from stroma.checkpoint.durable import session as session_module
from stroma.checkpoint.events import MAX_BATCHES, EventPlace, parse_cursor
from stroma.checkpoint.redis import rows as redis_rows
from stroma.checkpoint.sql import rows as sql_rows

store = store_fixture(*STORES)

START = EventPlace(0, 0)


async def append(session: Any, last: int, text: str = "") -> None:
    await settled(session.append_events(last, (text or f"{session.epoch}-{last}").encode()))


def read(store: Any, after: str | None = None, limit: int = 5000, run_id: str = "run") -> list[str | None]:
    page = store.read_events(run_id, START if after is None else parse_cursor(after), limit)
    return [None if one.lines is None else one.lines.decode() for one in page.batches]


async def test_batches_are_read_in_their_order(store: Any) -> None:
    """Batches come back as they were appended, from any place on; one that is sent again is there once."""
    session = await begin(store)
    assert read(store) == []
    for last in (2, 3, 10, 11):
        await append(session, last)
        await append(session, last)
    assert read(store) == ["1-2", "1-3", "1-10", "1-11"]
    assert read(store, "1-3") == read(store, "1-9") == ["1-10", "1-11"]
    assert read(store, "1-2", limit=2) == ["1-3", "1-10"]
    assert read(store, "1-11") == read(store, "1-suspended") == read(store, "2-0") == []
    page = store.read_events("run", START, 1)
    assert (page.execution, page.epoch, page.record) == (1, 1, None)
    assert page.batches[0].last == EventPlace(1, 2)
    assert store.read_events("unknown", START, 1) is None


async def test_a_session_comes_after_those_before_it(store: Any) -> None:
    """Events of a resumed run come after those of the process before, although they count from 1."""
    first = await begin(store)
    await append(first, 30)
    second = await begin(store, if_exists="resume", if_running="take_over")
    await append(second, 1)
    assert read(store) == ["1-30", "2-1"]
    assert read(store, "1-30") == ["2-1"]


async def test_a_late_batch_comes_before_the_takeover(store: Any) -> None:
    """What a fenced owner appends is refused or comes in its place: no reader of the next session sees it."""
    first = await begin(store)
    await append(first, 1)
    second = await begin(store, if_exists="resume", if_running="take_over")
    await append(second, 1)
    await append(first, 2)
    assert read(store) in (["1-1", "2-1"], ["1-1", "1-2", "2-1"])
    assert read(store, "2-1") == []


async def test_events_are_stored_before_the_end(store: Any) -> None:
    """A batch that was submitted before the end of the run is there once the end is, without a wait."""
    session = await begin(store)
    _ = session.append_events(1, b"last words")
    await finish(session)
    assert read(store) == ["last words"]
    assert store.read_events("run", START, 1).record.status == "COMPLETED"


async def test_a_restart_has_no_events_of_before(store: Any) -> None:
    """A restart deletes the events of the last execution, and what its owner still appends is not read."""
    first = await begin(store)
    await append(first, 1)
    second = await begin(store, if_exists="restart", if_running="take_over")
    if hasattr(store, "read"):
        assert store.read(lambda rows: list(rows.events(rows.find("run").run, 1, START, 9)), None) == []
    await append(first, 2)
    assert read(store) == []
    await append(second, 1)
    await append(first, 3)
    assert read(store) == ["2-1"]
    assert store.read_events("run", START, 1).execution == 2


@pytest.mark.parametrize("way", ["delete", "gc"])
async def test_a_deleted_run_has_no_events(store: Any, way: str) -> None:
    """Events end with their run; a session that has not noticed appends none to a later run of the id."""
    if way == "gc" and not hasattr(store, "gc"):
        return
    session = await begin(store)
    await append(session, 1)
    await finish(session)
    if way == "gc":
        await asyncio.sleep(0.002)  # A run that ended in this millisecond is not older than it.
        await store.gc(keep_for=timedelta(0))
    else:
        await settled(store.delete("run"))
    assert store.read_events("run", START, 1) is None
    await append(session, 2)
    await begin(store)
    await append(session, 3)
    assert read(store) == []


async def test_a_fork_has_no_events(store: Any) -> None:
    """A fork starts without the events of its origin, which keeps them."""
    session = await begin(store)
    await append(session, 1)
    await commit(session, 0, State(n=1))
    await finish(session)
    await store.fork("run", "fork", 1)
    assert read(store, run_id="fork") == []
    assert read(store) == ["1-1"]


async def test_a_suspended_run_keeps_its_events(store: Any) -> None:
    """Events stay over a suspension, and a resume."""
    await suspend_run(store, "run")
    session = await begin(store, if_exists="resume")
    await append(session, 1)
    await finish(session, "SUSPENDED", "may I?")
    await begin(store, if_exists="resume")
    assert read(store) == ["2-1"]


async def test_the_oldest_events_are_deleted(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run keeps about its newest 1,000 batches, whatever it appends; other runs keep theirs."""
    most = 1000 if "edis" in type(store).__name__ or "Memory" in type(store).__name__ else 50
    monkeypatch.setattr(sql_rows, "MAX_BATCHES", most)
    monkeypatch.setattr(session_module, "_TRIM_INTERVAL", 10)
    other, session = await begin(store, "other"), await begin(store)
    await append(other, 1)
    count = 3 * most
    await asyncio.gather(*(append(session, last) for last in range(1, count + 1)))
    kept = read(store)
    assert most <= len(kept) <= most * 1.3
    assert kept == [f"1-{last}" for last in range(count - len(kept) + 1, count + 1)]
    assert read(store, run_id="other") == ["1-1"]
    assert MAX_BATCHES == 1000


@pytest.mark.parametrize("kind", SHARED)
async def test_old_events_expire(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that are older than a day are deleted, on SQL at the first append; the run stays."""
    with place(kind) as where, opened(kind, where) as store:
        for module in (sql_rows, redis_rows):
            monkeypatch.setattr(module, "EXPIRY_MS", 1000)
        await append(await begin(store, "old"), 1)
        await asyncio.sleep(1.1)
        await append(await begin(store), 1)
        assert read(store, run_id="old") == []
        assert read(store) == ["1-1"]


@pytest.mark.slow
async def test_events_of_a_finished_run_expire_with_it() -> None:
    """On Redis, events that are appended after the end of a run do not outlive it."""
    with place("redis") as where, opened("redis", where) as store:
        session = await begin(store)
        await finish(session)
        await append(session, 1)
        link = store._server.link()
        run, events = link.send([("PTTL", "stroma:{run}:run"), ("PTTL", "stroma:{run}:events")])
        link.close()
        assert 0 < events <= run + 1000 < 3_700_000


@pytest.mark.parametrize("kind", SHARED)
async def test_batches_of_many_runs_at_once(kind: str) -> None:
    """Batches that many runs append at once are all there; a refused one takes no other with it."""
    with place(kind) as where, opened(kind, where) as store:
        sessions = [await begin(store, f"run {i}") for i in range(20)]
        bad = sessions[7]
        bad.fence.run = object()  # No driver can send it.
        results = await asyncio.gather(*(append(one, 1) for one in sessions), return_exceptions=True)
        assert [i for i, one in enumerate(results) if one is not None] == [7]
        assert isinstance(results[7], (StoreError, AttributeError))
        assert [read(store, run_id=f"run {i}") for i in range(20) if i != 7] == [["1-1"]] * 19
        await commit(sessions[8], 0, State())


class Reversed:
    """A codec."""

    def encode(self, data: bytes) -> bytes:
        return b"k" + data[::-1]

    def decode(self, data: bytes) -> bytes:
        if data[:1] != b"k":
            raise ValueError("not encoded")
        return data[:0:-1]


@pytest.mark.parametrize("kind", SHARED)
async def test_events_are_sealed(kind: str) -> None:
    """With a codec, no text of an event is in the store; without it, reading says that it is needed."""
    with place(kind) as where:
        with opened(kind, where) as plain, opened(kind, where) as store:
            store._payloads.codec, store._payloads.plain = Reversed(), False
            store._payloads._must_be_sealed = True
            session = await begin(store)
            await append(session, 1, "a secret word")
            assert read(store) == ["a secret word"]
            rows = plain.read(lambda rows: rows.events(rows.find("run").run, 1, START, 10), [])
            assert b"secret" not in rows[0].data
            with pytest.raises(CorruptCheckpoint, match="open the store with codec="):
                read(plain)
            await append(await begin(plain, "open"), 1)
            with pytest.raises(CorruptCheckpoint, match="was not written by the codec"):
                read(store, run_id="open")


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("codec", [None, Reversed()])
async def test_a_damaged_batch_has_no_events(kind: str, codec: Any) -> None:
    """A batch that was changed, cut or moved is read as damaged, and those beside it as they were."""
    with place(kind) as where, opened(kind, where) as store:
        store._payloads.codec, store._payloads.plain = codec, codec is None
        session = await begin(store)
        for last in range(1, 6):
            await append(session, last)

        def rewrite(rows: Any) -> None:
            run = rows.find("run")
            first, second, third, *_ = rows.events(run.run, 1, START, 10)
            changed = first.data[:-1] + bytes([first.data[-1] ^ 1])
            replaced = [
                first._replace(last=EventPlace(1, 6), data=changed),
                second._replace(last=EventPlace(1, 7), data=second.data[:20]),
                third._replace(last=EventPlace(1, 8)),
            ]
            rows.append_events(replaced)

        await store._submit(rewrite)
        await append(session, 9)
        assert read(store) == [*(f"1-{last}" for last in range(1, 6)), None, None, None, "1-9"]


@pytest.mark.parametrize(
    "text", ["", "1", "1-", "-1", "a-1", "1-2-3", "1-x", "٣-1", "9" * 30 + "-1", "1-end-", "1 -1"]
)
def test_a_cursor_that_is_none(text: str) -> None:
    """Any other text than a cursor is an error that shows it."""
    with pytest.raises(ValueError, match="must be the cursor of an event"):
        parse_cursor(text)


@pytest.mark.parametrize("text", ["0-0", "1-2", "12-suspended", "12-end"])
def test_a_cursor_and_its_place(text: str) -> None:
    """A cursor is the text of a place; the suspension and the end come after all events of a session."""
    assert str(parse_cursor(text)) == text
    assert parse_cursor("1-99") < parse_cursor("1-suspended") < parse_cursor("1-end") < parse_cursor("2-1")
