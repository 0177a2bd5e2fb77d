"""State that a flow shares with the flows inside it: progress, suspension, and the gate of its replay."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any, Final, NoReturn

from stroma.engine.context import ReliabilityContext
from stroma.engine.outcome import Halt, Stopped
from stroma.runner.flows.endings import Endings, RunningFlow
from stroma.runner.flows.errors import FlowClosed
from stroma.runner.flows.journal import FlowJournal
from stroma.runner.flows.suspension import Waits

__all__ = ["REPLAY_ONLY", "STUCK_SECONDS", "FlowDriver"]

#: For how long a replay may go without a call before what is missing counts as a change of the body.
STUCK_SECONDS: Final = 1.0

#: Set while ``check_deterministic`` replays: a call without a record is a change.
REPLAY_ONLY: contextvars.ContextVar[bool] = contextvars.ContextVar("stroma_replay_only", default=False)


class FlowDriver:
    """State that one flow of a run shares with the flows inside it: progress, waits, and its end.

    Attributes:
        activity: number of calls so far.
        busy: calls that are at work: not those that wait for a person, for a time, or for a flow inside.
        unreached: recorded results that the bodies have not asked for yet.
        stopping: the end of the flow, whatever its body does: a crossed budget, a suspension, a changed body.
    """

    def __init__(self, ctx: ReliabilityContext, journal: FlowJournal) -> None:
        self.ctx = ctx
        self.journal = journal
        self.loop = asyncio.get_running_loop()
        self.activity = self.busy = self.unreached = 0
        #: What the loop does in its next turn, a task that has not begun, say. Of other loops than asyncio's nobody knows.
        self.ready = getattr(self.loop, "_ready", (True,))
        self.stopping: Halt | Stopped | BaseException | None = None
        self.closing = self.is_over = False
        self.waits = Waits(self)
        self.flows: list[RunningFlow] = []
        self.body: asyncio.Task[Any] | None = None
        self.waker: asyncio.Future[None] | None = None
        self.is_woken = False
        self._held: asyncio.Future[None] | None = None
        self._watching = False
        #: Replayed calls that wait until the body cancels them again, as it did in real time.
        self.to_cancel = 0
        self.endings = Endings(ctx, journal)
        self.replay_only = REPLAY_ONLY.get()

    @property
    def flow_id(self) -> str:
        return self.flows[0].node.node_id

    @property
    def has_returned(self) -> bool:
        return self.body is not None and self.body.done()

    def signs(self) -> tuple[int, int, int]:
        """Return numbers that change with what the body does."""
        return self.activity, self.endings.count, len(self.waits.open)

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
        self.wake()

    async def never(self) -> NoReturn:
        """Wait until the body is cancelled: it must not learn of what ends it."""
        self.wake()
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
        if self._held is not None and not self._held.done():
            self._held.set_result(None)

    def watch(self) -> None:
        """See that a replay which waits for a recorded call meets it in time."""
        if not self._watching:
            self._watching = True
            self.loop.call_later(STUCK_SECONDS, self._look, self.activity)

    def _look(self, seen: int) -> None:
        self._watching = False
        is_stuck = self.unreached or any(flow.order.is_waiting for flow in self.flows)
        if not is_stuck or self.closing or self.stopping is not None:
            return
        if (
            self.activity != seen
            or self.busy
            or self.to_cancel
            or any(flow.order.is_turning for flow in self.flows)
        ):
            self.watch()
            return
        for flow in self.flows:
            text = None if flow.has_ended else flow.missing() or flow.order.missing()
            if text is not None:
                self.stop(self.changed(f"flow {flow.node.node_id!r} {text}"))
                return
