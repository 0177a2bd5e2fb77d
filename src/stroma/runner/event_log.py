"""Events of a run on their way into its store: batches in the background, which never touch the run."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import suppress
from typing import Any, Final

from stroma._utils.logs import get_logger
from stroma.checkpoint import Session
from stroma.checkpoint.sessions import NULL_SESSION
from stroma.engine.config import RunConfig
from stroma.engine.execution import NodeExecution, current_run
from stroma.hooks.sets import flatten
from stroma.runner.event_hooks import event_hooks
from stroma.runner.events import EventHub, EventKind, StreamEvent

__all__ = ["with_event_log"]

logger = get_logger()

#: Between two batches. All runs of a process write at the same time, so that a store can write their batches
#: together.
_SECONDS: Final = 0.1
_MAX_BATCH_SIZE: Final = 500
#: An event with more bytes is stored without its state and data.
_MAX_EVENT_BYTES: Final = 1_000_000


def with_event_log(config: RunConfig) -> RunConfig:
    """Return the config for one run that stores its events."""
    return config.model_copy(
        update={"hooks": [*flatten(config.hooks), event_hooks(EventLog(), with_trace=False)]}
    )


class EventLog(EventHub):
    """A hub whose only reader writes to the store of the run. What the store refuses is lost."""

    def __init__(self) -> None:
        super().__init__()
        self._reader = self.add_reader()
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

    def emit(self, node: NodeExecution, attempt_id: str, name: str, data: Any) -> None:
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
            for _ in range(
                2
            ):  # All that nodes emitted; a thread that floods must not keep the event loop here.
                self._write_batch()
        if self._reader.pending:
            self._wake()

    def flush(self) -> None:
        """Write all pending events. They reach the store before the end of the run, which is written next."""
        while self._reader.pending:
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
        while len(lines) < _MAX_BATCH_SIZE and size < _MAX_EVENT_BYTES and (event := self._reader.take()):
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
