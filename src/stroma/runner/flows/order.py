"""The order in which a flow's body gets the results of its calls: the same live and on replay.

Where one call is under way at a time, there is no order to record. Where several are, results are handed out one at a time,
each once the event loop has nothing else to do, so that the body has done all that it does on the one before; and the order is
recorded with the next commit.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["FlowCall", "ResultOrder"]

_RECENT: Final = 1000  # results among which one is looked for
#: Turns of the event loop without a call of the flow, after which its body waits for a result, where other work keeps the loop
#: busy. The result of a call in a task group, in wait_for(), in gather(), in a task takes about ten to reach the body.
_QUIET_TURNS: Final = 16


class FlowCall(NamedTuple):
    """A call of a flow, as it was numbered in the task that made it.

    Attributes:
        number: the driver's activity then: of two recorded calls, the earlier one has its result first.
        in_main: it was made in the first task of the body.
    """

    identity: str
    number: int
    in_main: bool


class ResultOrder:
    """Hands out the results of one flow, one at a time.

    Attributes:
        recorded: identities by the number of their result, where that was recorded.
        delivered: identities of the results that were handed out, in order.
        stuck: called when the next recorded result is not asked for.
    """

    __slots__ = (
        "_activity",
        "_last_recorded",
        "_listed",
        "_note",
        "_pending",
        "_queue",
        "_quiet",
        "_seen",
        "delivered",
        "is_turning",
        "recorded",
        "stuck",
    )  # fmt: skip

    def __init__(
        self,
        recorded: dict[int, str],
        activity: Callable[[], int],
        note: Callable[[int, str], None],
        stuck: Callable[[], None],
    ) -> None:
        self.recorded = recorded
        self._last_recorded = max(recorded, default=-1)
        self._listed = set(recorded.values())
        self._activity = activity
        self._note = note
        self.stuck = stuck
        self.delivered: list[str] = []
        self._pending: dict[str, asyncio.Future[int]] = {}
        self._queue: list[tuple[int, int, str]] = []
        self.is_turning = False
        self._seen = self._quiet = 0

    @property
    def is_recorded_ahead(self) -> bool:
        """True while the numbers of results that were not handed out yet are recorded."""
        return self._last_recorded >= len(self.delivered)

    @property
    def is_waiting(self) -> bool:
        """True while results wait for their turn."""
        return bool(self._pending)

    def is_next(self, identity: str) -> bool:
        """Return True if a result may be handed out at once where no other call is under way."""
        if self._pending:
            return False
        while self.recorded and self.recorded.get(len(self.delivered)) == "":
            self.delivered.append("")
        return not self.recorded or self.recorded.get(len(self.delivered), identity) == identity

    def missing(self) -> str | None:
        """Return the text for a recorded result that is not asked for while others wait; None if there is none."""
        if not self._pending or len(self.delivered) not in self.recorded:
            return None
        return f"does not ask for result {len(self.delivered) + 1}, which is recorded"

    def withdraw(self, identity: str) -> None:
        """Take back the number of a result that was handed out to a call which was cancelled in the same turn."""
        for index in range(len(self.delivered) - 1, -1, -1):
            if self.delivered[index] == identity:
                self._note(index, "")
                return
            if len(self.delivered) - index > _RECENT:
                return

    def deliver(self, identity: str, *, noted: bool) -> int:
        """Count a result that is handed out, and record its number. Return it."""
        index = len(self.delivered)
        self.delivered.append(identity)
        if noted and index not in self.recorded:
            self._note(index, identity)
        return index

    async def wait(self, identity: str, rank: int, number: int) -> int:
        """Wait until it is the turn of a result, and return its number. Lower ranks, then lower numbers come first."""
        loop = asyncio.get_running_loop()
        future = self._pending[identity] = loop.create_future()
        if identity not in self._listed:
            heapq.heappush(self._queue, (rank, number, identity))
        self._start(loop)
        try:
            index: int = await future
            return index
        finally:
            self._pending.pop(identity, None)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self.is_turning:
            self.is_turning = True
            self._seen, self._quiet = self._activity(), 0
            loop.call_soon(self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        activity = self._activity()
        if activity == self._seen:
            self._quiet += 1
        else:
            self._seen, self._quiet = activity, 0
        # asyncio's own loops list what is ready to run; this callback is off the list by now.
        if self._quiet >= _QUIET_TURNS or not getattr(loop, "_ready", True):
            self._quiet = 0
            if not self._release():
                self.is_turning = False
                if self._pending:
                    self.stuck()
                return
        loop.call_soon(self._turn, loop)

    def _release(self) -> bool:
        """Hand out the next result. Return False if it is not there."""
        identity = self.recorded.get(len(self.delivered))
        while identity == "":  # Of a call that was cancelled.
            self.delivered.append("")
            identity = self.recorded.get(len(self.delivered))
        while identity is None and self._queue:
            queued = heapq.heappop(self._queue)[2]
            if queued in self._pending:
                identity = queued
        future = None if identity is None else self._pending.pop(identity, None)
        if identity is None or future is None:
            return False
        index = self.deliver(identity, noted=True)
        if not future.done():
            future.set_result(index)
        return True
