"""Stored events of a run: written in the background, and followed from any process."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final
from weakref import WeakKeyDictionary

from stroma._utils.logs import get_logger
from stroma.checkpoint import CheckpointNotFound, Session
from stroma.checkpoint.decisions import UNFINISHED
from stroma.checkpoint.entries import Finished
from stroma.checkpoint.events import EventPage, EventPlace
from stroma.checkpoint.records import FAILED, RunRecord
from stroma.checkpoint.sessions import NULL_SESSION
from stroma.engine.config import RunConfig
from stroma.engine.execution import RunningNode, current_run
from stroma.runner.events import EventHooks, EventHub, EventKind, StreamEvent, describe_failure
from stroma.runner.pipeline import with_hooks
from stroma.runner.stored_runs import StoredRuns
from stroma.trace.redaction import Redact, hide_state

logger = get_logger()

#: Between two batches. All runs of a process write at the same time, so that a store can write their batches
#: together.
_SECONDS: Final = 0.1
_MAX_BATCH_SIZE: Final = 500
#: An event with more bytes is stored without its state and data.
_MAX_EVENT_BYTES: Final = 1_000_000


def with_event_log(config: RunConfig) -> RunConfig:
    """Return the config for one run that stores its events."""
    return with_hooks(config, EventHooks(hub=EventLog(), with_trace=False))


class EventLog(EventHub):
    """A hub whose only reader writes to the store of the run. What the store refuses is lost."""

    def __init__(self) -> None:
        super().__init__()
        self._session: Session = NULL_SESSION
        self.run_logger: Any = logger
        self._loop: asyncio.AbstractEventLoop | None = None
        #: Pending events will be written.
        self._is_due = False
        self._writing: asyncio.Future[None] | None = None
        #: Number of the last event of this run in its store: those that were dropped leave a gap.
        self._last = 0
        self._has_warned = False

    def publish(self, kind: EventKind, run_id: str, node_id: str | None = None, **fields: Any) -> None:
        run = current_run()
        if self._loop is None and run is not None:
            self._loop = asyncio.get_running_loop()
            self._session, self.run_logger = run.session, run.run_logger
        super().publish(kind, run_id, node_id, **fields)
        self._wake()

    def emit(self, node: RunningNode, attempt_id: str, name: str, data: Any) -> None:
        super().emit(node, attempt_id, name, data)
        self._wake()

    def _wake(self) -> None:
        """Have what is pending written soon. Safe to call in any thread."""
        if not self._is_due and self._loop is not None:
            self._is_due = True
            with suppress(RuntimeError):  # The loop was closed, and the run with it.
                self._loop.call_soon_threadsafe(self._schedule, self._loop)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_at((math.floor(loop.time() / _SECONDS) + 1) * _SECONDS, self._write)

    def _write(self) -> None:
        self._is_due = False  # First: an event that comes now is written below, or wakes this again.
        if self._writing is None or self._writing.done():
            for _ in range(2):  # All that nodes emitted, without staying here for a thread that floods.
                self._write_batch()
        if self.pending:
            self._wake()

    def flush(self) -> None:
        """Write all pending events. They reach the store before the end of the run, which is written next."""
        while self.pending:
            self._write_batch()

    def _write_batch(self) -> None:
        try:
            with self.lock:
                lines = self._take_lines()
                # A run that is returned has no new events.
                if not lines or self._session.finished is not None:
                    return
                pending = self._session.append_events(self._last, b"\n".join(lines))
            if pending is not None:
                self._writing = asyncio.ensure_future(pending)
                self._writing.add_done_callback(self._note_end)
        except Exception as error:
            self._warn(error)

    def _take_lines(self) -> list[bytes]:
        lines: list[bytes] = []
        size = 0
        while len(lines) < _MAX_BATCH_SIZE and size < _MAX_EVENT_BYTES and (event := self.take()):
            if event.kind == "events_dropped":
                self._last += event.details["dropped"]
            else:
                self._last += 1
                lines.append(_encode(event, self._last))
                size += len(lines[-1])
        return lines

    def _note_end(self, writing: asyncio.Future[None]) -> None:
        if not writing.cancelled() and (error := writing.exception()) is not None:
            self._warn(error)

    def _warn(self, error: BaseException) -> None:
        if not self._has_warned:
            self._has_warned = True
            self.run_logger.warning("events are lost, which changes nothing else: %s", error)


def _encode(event: StreamEvent, number: int) -> bytes:
    data = {**event.to_dict(), "number": number}
    line = json.dumps(data, allow_nan=False).encode()
    if len(line) > _MAX_EVENT_BYTES:
        data = {**data, "state": None, "data": None, "details": {"omitted_bytes": len(line)}}
        line = json.dumps(data, allow_nan=False).encode()
    return line


#: Batches that are read at once: at most 2,500 events.
_PAGE_SIZE: Final = 5
#: Between two looks for new events, in seconds: at first, at most while the run is running, and at most.
_POLL_SECONDS: Final = (0.1, 0.2, 1.0)
#: For how long a page stays for followers that are a little behind.
_SHARED_SECONDS: Final = 1.0

#: Events, each with its place.
_Events = list[tuple[EventPlace, StreamEvent]]
#: What a follower is bound to: the key of the run in its store, and an execution.
_Bound = tuple[Any, int]
_Key = tuple[str, _Bound | None, EventPlace]


async def follow(
    stored: StoredRuns, run_id: str, after: EventPlace, redact: Redact | None
) -> AsyncIterator[StreamEvent]:
    """Yield the events of a run after a place; see :meth:`StromaRunner.follow`."""
    place, bound = after, None
    #: Of the last event of a session.
    number = 0 if after.is_of_record else after.number
    reads = _READS.setdefault(stored.store, WeakKeyDictionary()).setdefault(
        asyncio.get_running_loop(), _EventReads()
    )
    while True:
        page, events = await reads.next(stored, run_id, bound, place)
        if after.epoch > page.epoch:
            raise CheckpointNotFound(
                f"run {run_id!r} has no event {str(after)!r}: it was deleted, and started again; "
                "follow it without after"
            )
        bound = page.run, page.execution
        for place, event in events:
            number = place.number
            yield event
        record = page.record
        if events or record is None:
            continue  # There may be more.
        if record.status == "SUSPENDED":
            place = EventPlace.of_suspension(page.epoch)
            details = await _describe_suspension(stored, record)
            yield StreamEvent(number + 1, "run_suspended", run_id, details=details, cursor=str(place))
        else:
            place = EventPlace.of_end(page.epoch)
            if after < place:
                details = await _describe_end(stored, record, redact)
                yield StreamEvent(number + 1, "run_end", run_id, details=details, cursor=str(place))
            return


async def _describe_suspension(stored: StoredRuns, record: RunRecord) -> dict[str, Any]:
    waiting = await stored.read_questions(record.run_id)
    questions = [one.question for one in waiting if one.payload is None]
    reasons = [question.reason for question in questions]
    return {
        "status": record.status,
        "suspended": [record.error, *reasons] if record.waits_for or not reasons else reasons,
        "questions": [asdict(question) for question in questions],
        "due_ms": record.due_ms,
    }


async def _describe_end(stored: StoredRuns, record: RunRecord, redact: Redact | None) -> dict[str, Any]:
    """Return the details of a "run_end", as that of the process which executed the run has them."""
    details = {
        "status": record.status,
        "final_state": hide_state(redact, await stored.read_final_state(record)),
        "total_tokens": record.tokens,
        "total_cost_usd": record.cost_usd,
        "failed_items": await stored.count_failed_items(record.run_id),
        "suspended": [],
        "questions": [],
    }
    if record.status in FAILED:
        reason = Finished(record.status, record.error).reason
        cause = record.cause
        if reason is not None or cause is None:
            details["failure"] = describe_failure("TERMINAL", record.error, reason)
        else:
            details["failure"] = describe_failure(cause.failure_class, cause.message, cause.reason)
    return details


class _EventReads:
    """Reads of the events of one store, which followers at one place of a run share in one event loop."""

    def __init__(self) -> None:
        self._reads: dict[_Key, _Read] = {}
        # One at a time: a store has one connection for reading that stays open.
        self._turn = asyncio.Lock()

    async def next(
        self, stored: StoredRuns, run_id: str, bound: _Bound | None, place: EventPlace
    ) -> tuple[EventPage, _Events]:
        """Return the next events after a place, once there are any, or the run has ended or is suspended.

        Raises CheckpointNotFound for an unknown run, and if ``bound`` is not its last execution any more.
        """
        key = (run_id, bound, place)
        read = self._reads.get(key)
        if read is None:
            read = self._reads[key] = _Read(asyncio.ensure_future(_poll(stored, self._turn, *key)))
            read.task.add_done_callback(lambda _: self._share(key, read))
        read.waiting += 1
        try:
            return await asyncio.shield(read.task)
        finally:
            read.waiting -= 1
            if not read.waiting and not read.task.done():
                read.task.cancel()
                self._forget(key, read)

    def _share(self, key: _Key, read: _Read) -> None:
        """Leave a result for those who are a little behind, and not for new followers after a restart."""
        seconds = 0.0 if key[1] is None else _SHARED_SECONDS
        asyncio.get_running_loop().call_later(seconds, self._forget, key, read)

    def _forget(self, key: _Key, read: _Read) -> None:
        if self._reads.get(key) is read:
            del self._reads[key]


#: By store and event loop. It references no store, which would never be collected otherwise.
_READS: WeakKeyDictionary[Any, WeakKeyDictionary[asyncio.AbstractEventLoop, _EventReads]] = (
    WeakKeyDictionary()
)


async def _poll(
    stored: StoredRuns, turn: asyncio.Lock, run_id: str, bound: _Bound | None, place: EventPlace
) -> tuple[EventPage, _Events]:
    """Read until there are events after a place, or the run has ended or was suspended after it."""

    def read() -> tuple[EventPage, _Events]:
        page = stored.read_events(run_id, place, _PAGE_SIZE)
        return page, list(decode_events(run_id, page, place))

    delay, busy, longest = _POLL_SECONDS
    while True:
        async with turn:
            page, events = await asyncio.to_thread(read)
        record = page.record
        if bound not in (None, (page.run, page.execution)):
            raise CheckpointNotFound(
                f"run {run_id!r} was restarted while it was followed; follow it again, without after"
            )
        if events or (record is not None and _is_news(record, page.epoch, place)):
            return page, events
        await asyncio.sleep(delay)
        delay = min(delay * 1.5, busy if record is None else longest)


def _is_news(record: RunRecord, epoch: int, place: EventPlace) -> bool:
    """Return True if a run has ended, or was suspended after a place."""
    if record.status == "SUSPENDED":
        return place < EventPlace.of_suspension(epoch)
    return record.status not in UNFINISHED


class _Read:
    __slots__ = ("task", "waiting")

    def __init__(self, task: asyncio.Task[tuple[EventPage, _Events]]) -> None:
        self.task = task
        self.waiting = 0


def decode_events(
    run_id: str, page: EventPage, place: EventPlace
) -> Iterator[tuple[EventPlace, StreamEvent]]:
    """Yield the events of a page after a place, with "events_dropped" where some are missing."""
    for last, lines in page.batches:
        if last <= place:
            continue
        for line in lines.split(b"\n") if lines else ():
            try:
                data = json.loads(line)  # Unlike pydantic it reads lone surrogates.
                at = EventPlace(last.epoch, int(data["number"]))
                event = StreamEvent.from_dict({**data, "cursor": str(at)})
            except (LookupError, TypeError, ValueError):
                continue
            if place < at <= last:
                yield from _missing(run_id, place, at._replace(number=at.number - 1))
                yield at, event
                place = at
        yield from _missing(run_id, place, last)
        place = last


def _missing(run_id: str, place: EventPlace, last: EventPlace) -> Iterator[tuple[EventPlace, StreamEvent]]:
    """Yield the event that stands for those after a place, up to one of the same session."""
    before = place.number if place.epoch == last.epoch else 0
    if before < last.number:
        details = {"dropped": last.number - before}
        yield (last, StreamEvent(before + 1, "events_dropped", run_id, details=details, cursor=str(last)))
