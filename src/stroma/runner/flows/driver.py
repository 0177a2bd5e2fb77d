"""State that a flow shares with the flows inside it: progress, suspension, and the gate of its replay."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from time import perf_counter_ns
from typing import Any, Final, NoReturn

from pydantic import BaseModel

from stroma.contracts.node import Group, Node
from stroma.engine.context import ReliabilityContext
from stroma.engine.loop import execute_in_turn
from stroma.engine.outcome import Halt, Place, Stopped
from stroma.runner.flows.endings import Endings, RunningFlow
from stroma.runner.flows.errors import FlowClosed
from stroma.runner.flows.journal import FlowJournal
from stroma.runner.flows.stuck import waits_for_itself
from stroma.runner.flows.suspension import Waits, now_ms

__all__ = ["REPLAY_ONLY", "STUCK_SECONDS", "FlowDriver"]

#: How often a replay that waits is looked at. If it can go no further, twice in a row, the body has changed.
STUCK_SECONDS: Final = 0.5
#: A body may wait for this long for something else than its flow while a replay waits for it.
_PATIENCE_SECONDS: Final = 60.0

#: Set while ``check_deterministic`` replays: a call without a record is a change.
REPLAY_ONLY: contextvars.ContextVar[bool] = contextvars.ContextVar("stroma_replay_only", default=False)


class FlowDriver:
    """State that one flow of a run shares with the flows inside it: progress, waits, and its end.

    Attributes:
        activity: number of calls so far.
        busy: calls that are at work: not those that wait for a person, for a time, or for a flow inside.
        has_siblings: steps ran side by side.
        unreached: recorded results that the bodies have not asked for yet.
        stopping: the end of the flow, whatever its body does: a crossed budget, a suspension, a changed body.
    """

    __slots__ = (
        "_held", "_watching", "activity", "body", "busy", "closing", "ctx", "endings", "flows", "has_siblings", "is_over",
        "is_woken", "journal", "loop", "ready", "replay_only", "stopping", "thread_id", "to_cancel", "unreached",
        "waits", "waker",
    )  # fmt: skip

    def __init__(self, ctx: ReliabilityContext, journal: FlowJournal) -> None:
        self.ctx = ctx
        self.journal = journal
        self.loop = asyncio.get_running_loop()
        self.thread_id = threading.get_ident()
        self.activity = self.busy = self.unreached = 0
        #: What the loop does in its next turn, a task that has not begun, say. Of other loops than asyncio's nobody knows.
        self.ready = getattr(self.loop, "_ready", (True,))
        self.stopping: Halt | Stopped | BaseException | None = None
        self.closing = self.is_over = self.has_siblings = False
        self.waits: Waits = Waits(self)
        self.flows: list[RunningFlow] = []
        self.body: asyncio.Task[Any] | None = None
        self.waker: asyncio.Future[None] | None = None
        self.is_woken = False
        self._held: asyncio.Future[None] | None = None
        self._watching = False
        #: Replayed calls that wait until the body cancels them again: when it did so before, and the text if it does not.
        self.to_cancel: list[tuple[float, str]] = []
        self.endings = Endings(ctx, journal)
        self.replay_only = REPLAY_ONLY.get()

    def now_ms(self) -> int:
        """Return the time in ms since the epoch."""
        return now_ms()

    def clock_ms(self) -> float:
        """Return the time in ms since the epoch on the clock of the attempts: waits and steps are shown in their order."""
        return (perf_counter_ns() + self.ctx.epoch_ns) / 1e6

    def execute(
        self, node: Node | Group, state: BaseModel, place: Place
    ) -> Coroutine[Any, Any, BaseModel | Halt | Stopped]:
        """Run a node with its attempts. Return its committed output, or its end."""
        return execute_in_turn(self.ctx, (node,), state, place)

    # ------------------------------------------------------------------ what flows look at

    @property
    def flow_id(self) -> str:
        return self.flows[0].node.node_id

    @property
    def has_returned(self) -> bool:
        return self.body is not None and self.body.done()

    @property
    def is_collected(self) -> bool:
        """True while a coroutine of the flow is closed by garbage collection, after its event loop: it cannot await."""
        return asyncio._get_running_loop() is not self.loop

    def signs(self) -> tuple[int, int, int]:
        """Return numbers that change with what the body does."""
        return self.activity, self.endings.count, len(self.waits.open)

    def note_busy(self) -> None:
        """Record the function time of the flow so far."""
        outermost = self.flows[0]
        self.journal.note_busy(outermost.position, outermost.execution.busy_ns)

    def wake(self) -> None:
        """Have the driver look at what is open."""
        self.is_woken = True
        if self.waker is not None and not self.waker.done():
            self.waker.set_result(None)

    # ------------------------------------------------------------------ ends

    def stop(self, end: Halt | Stopped | BaseException) -> None:
        """End the flow whatever its body does, once the steps that are at work have ended."""
        if self.stopping is None:
            self.stopping = end
            self.disturb()
        self.wake()

    def close(self) -> None:
        """Have each further call of the flow raise FlowClosed."""
        self.closing = True
        self.disturb()
        self.waits.close()

    def disturb(self) -> None:
        """Have each flow look again if its calls are sequential."""
        for flow in self.flows:
            flow.is_sequential = False

    async def never(self) -> NoReturn:
        """Wait until the body is cancelled: it must not learn of what ends it."""
        self.wake()
        if not self.closing:
            await self.loop.create_future()
        raise FlowClosed("the flow has ended")

    async def stop_here(self, end: Halt | Stopped | BaseException) -> NoReturn:
        self.stop(end)
        await self.never()

    def changed(self, message: str) -> Halt:
        """Return the end of a flow whose body does not do what it did before."""
        return self.endings.changed(message, self.flow_id)

    # ------------------------------------------------------------------ replay

    async def replayed(self) -> None:
        """Wait until everything that is recorded has been replayed: nothing new is called before."""
        while self.unreached:
            if self._held is None or self._held.done():
                self._held = self.loop.create_future()
            self.watch()
            # Shielded: the cancellation of one call does not end the waiting of the others.
            await asyncio.shield(self._held)

    def reached(self) -> None:
        """Count a recorded result that the body has asked for."""
        self.unreached -= 1
        if not self.unreached:
            self.release_held()

    def release_held(self) -> None:
        if self.stopping is None and not self.closing:
            self.journal.note_held()
        if self._held is not None and not self._held.done():
            self._held.set_result(None)

    def watch(self) -> None:
        """See that a replay which waits for a recorded call meets it."""
        if not self._watching:
            self._look_later(self.loop.time(), is_stuck=False)

    def _look_later(self, since: float, *, is_stuck: bool) -> None:
        self._watching = True
        self.loop.call_later(STUCK_SECONDS, self._look, self.activity, since, is_stuck)

    def _look(self, seen: int, since: float, was_stuck: bool) -> None:
        self._watching = False
        is_waiting = self.unreached or self.to_cancel or any(flow.order.is_waiting for flow in self.flows)
        if not is_waiting or self.closing or self.stopping is not None:
            return
        now = self.loop.time()
        is_active = self.activity != seen or self.busy or any(flow.order.is_turning for flow in self.flows)
        if is_active or any(due > now for due, _ in self.to_cancel):
            self.watch()
            return
        is_stuck = now - since > _PATIENCE_SECONDS or waits_for_itself(self, self.loop)
        if is_stuck and was_stuck:  # Twice in a row: a timer that is due may not have been called yet.
            self.stop(self.changed(self._missing()))
        else:
            self._look_later(since, is_stuck=is_stuck)

    def _missing(self) -> str:
        """Return the text for what a replay waits for, and does not come."""
        for _, text in self.to_cancel:
            return text
        for flow in self.flows:
            missing = None if flow.has_ended else flow.missing() or flow.order.missing()
            if missing is not None:
                return f"flow {flow.node.node_id!r} {missing}"
        return f"flow {self.flow_id!r} waits for a result that is recorded, and does not come"
