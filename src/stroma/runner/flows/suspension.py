"""Waits of a flow: for a time, or for the answer of a person. They are durable, and are no steps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from time import time_ns
from typing import Final, NoReturn, Protocol

from stroma.checkpoint import StoreError, Waiting
from stroma.engine.context import ReliabilityContext
from stroma.engine.outcome import STOPPED, Halt, Stopped
from stroma.engine.tasks import Shield, raise_if
from stroma.failures.classes import FailureClass
from stroma.failures.errors import Suspend
from stroma.failures.failure import Failure
from stroma.trace.events import MarkKind, TraceMark

__all__ = ["EXPIRED", "WITHDRAWN", "OpenWait", "Waits", "now_ms", "text_of_time"]

_ANSWER_POLL_SECONDS: Final = 1.0
_STOP_POLL_SECONDS: Final = 0.25

#: Stands for an answer that did not come in time.
EXPIRED: Final = object()
#: Payload of a question that the body has cancelled: no answer is taken any more. It is no JSON, as answers are.
WITHDRAWN: Final = b"withdrawn"


def now_ms() -> int:
    """Return the time in ms since the epoch."""
    return time_ns() // 1_000_000


def text_of_time(ms: int) -> str:
    """Return a time as it is shown: ISO 8601, in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")


class OpenWait:
    """One open wait.

    Attributes:
        branch: of the call.
        reason: shown where the run is suspended.
        wake_ms: when it ends at the latest, since the epoch; None: never by itself.
        question: of a wait for an answer.
        is_of_step: a step is suspended, whose question its node has recorded.
        done: the answer in stored form, or EXPIRED.
    """

    __slots__ = ("began_ms", "branch", "done", "is_of_step", "question", "reason", "timer", "wake_ms")

    def __init__(
        self,
        branch: str,
        reason: str,
        *,
        wake_ms: int | None = None,
        question: Waiting | None = None,
        is_of_step: bool = False,
    ) -> None:
        self.branch = branch
        self.reason = reason
        self.wake_ms = wake_ms
        self.question = question
        self.is_of_step = is_of_step
        self.done: asyncio.Future[object] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.began_ms = 0.0

    def end(self, outcome: object) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(outcome)


class PlacedFlow(Protocol):
    """A flow at a position of a run."""

    position: int


class WaitingFlow(Protocol):
    """The driver of a flow, as its waits see it."""

    ctx: ReliabilityContext
    loop: asyncio.AbstractEventLoop

    @property
    def flows(self) -> Sequence[PlacedFlow]: ...
    @property
    def flow_id(self) -> str: ...
    def now_ms(self) -> int: ...
    def clock_ms(self) -> float: ...
    @property
    def busy(self) -> int: ...
    @property
    def has_returned(self) -> bool: ...
    def signs(self) -> tuple[int, int, int]: ...
    def wake(self) -> None: ...
    def stop(self, end: Halt | Stopped | BaseException) -> None: ...
    async def stop_here(self, end: Halt | Stopped | BaseException) -> NoReturn: ...


class Waits:
    """The open waits of a flow, and the suspension of the run when nothing else is left."""

    #: An event loop may not take longer timers than a day.
    max_timer_seconds = 3600.0

    def __init__(self, driver: WaitingFlow) -> None:
        self._driver = driver
        self.open: dict[str, OpenWait] = {}

    def add(self, wait: OpenWait) -> OpenWait:
        """Open a wait. It ends by its timer, if it has one, while the process lives."""
        driver = self._driver
        wait.done = driver.loop.create_future()
        wait.began_ms = driver.clock_ms()
        self.open[wait.branch] = wait
        if wait.wake_ms is not None:
            self._start_timer(wait)
        driver.wake()
        return wait

    def _start_timer(self, wait: OpenWait) -> None:
        assert wait.wake_ms is not None
        remaining = (wait.wake_ms - self._driver.now_ms()) / 1000
        if remaining <= 0:
            wait.end(EXPIRED)
        else:
            seconds = min(remaining, self.max_timer_seconds)
            wait.timer = self._driver.loop.call_later(seconds, self._start_timer, wait)

    def remove(self, wait: OpenWait) -> None:
        if wait.timer is not None:
            wait.timer.cancel()
        self.open.pop(wait.branch, None)
        if not wait.is_of_step:
            self._mark(wait)

    def _mark(self, wait: OpenWait) -> None:
        """Show a wait in the trace."""
        driver, done = self._driver, wait.done
        has_ended = done is not None and done.done() and not done.cancelled()
        kind: MarkKind
        reason = wait.reason
        if wait.question is None:
            kind = "slept" if has_ended else "sleeping"
            reason = reason.replace("sleeping", "sleep", 1)
        else:
            kind = (
                "open"
                if not has_ended or done is None
                else "expired"
                if done.result() is EXPIRED
                else "answered"
            )
        now = driver.clock_ms()
        at_utc = datetime.fromtimestamp(now / 1000, UTC)
        position = driver.flows[0].position
        driver.ctx.trace.marks.append(
            TraceMark(
                driver.flow_id, 1, position, wait.branch, kind, reason, max(0, now - wait.began_ms), at_utc
            )
        )

    def close(self) -> None:
        for wait in self.open.values():
            if wait.timer is not None:
                wait.timer.cancel()

    def poll_seconds(self) -> float | None:
        """Return after how many seconds the driver is to look again, for an answer or a shutdown; None: when it is woken."""
        return _STOP_POLL_SECONDS

    async def settle(self) -> bool:
        """Nothing but waits is open: end one, or the flow. Return False to wait in the process."""
        driver = self._driver
        if driver.ctx.stops:
            driver.stop(STOPPED)
            return True
        pending = [wait for wait in self.open.values() if wait.done is not None and not wait.done.done()]
        if len(pending) < len(self.open):
            return False  # One has ended, and its call goes on in the next turn.
        if any(wait.question is not None for wait in pending):
            signs = driver.signs()
            if await self._take_answers(pending):
                return True
            if driver.busy or driver.has_returned or driver.signs() != signs:
                return True  # The body went on while the store was read.
            if any(wait.done is not None and wait.done.done() for wait in pending):
                return True
        wake_ms = min((wait.wake_ms for wait in pending if wait.wake_ms is not None), default=None)
        if self.stays(pending, wake_ms):
            return False
        driver.ctx.wake_ms = wake_ms
        driver.stop(self._suspension(pending))
        return True

    def stays(self, pending: list[OpenWait], wake_ms: int | None) -> bool:
        """Return True if the flow waits in the process, and is not suspended."""
        if wake_ms is None:
            return False
        return wake_ms - self._driver.now_ms() <= self._driver.ctx.config.inline_wait_seconds * 1000

    async def _take_answers(self, pending: list[OpenWait]) -> bool:
        """End the waits whose answers have come since the run was opened. Return True if there is one."""
        session = self._driver.ctx.session
        try:
            answers = session.answers()
            by_place = answers if isinstance(answers, Mapping) else await answers
        except StoreError as error:
            self._driver.ctx.run_logger.warning("answers cannot be read now: %s", error)
            return False
        has_ended = False
        for wait in pending:
            question = wait.question
            if question is None:
                continue
            answer = by_place.get((question.position, question.branch))
            if answer is not None and answer.payload is not None:
                wait.end(answer.payload)
                has_ended = True
        return has_ended

    def _suspension(self, pending: list[OpenWait]) -> Halt:
        ctx = self._driver.ctx
        reasons = [wait.reason for wait in pending]
        # A suspended step has reported its own.
        ctx.suspended += [wait.reason for wait in pending if not wait.is_of_step]
        reason = "; ".join(reasons)
        node_id = self._driver.flow_id
        failure = Failure(Suspend(reason), FailureClass.RECOVERABLE, node_id, 1, reason)
        return Halt(failure, suspended=True)

    async def flush(self) -> None:
        """Store what was noted, before a wait begins. Ends the flow if the store refuses it."""
        await self._see_through(self._driver.ctx.session.flush)

    async def ask(self, question: Waiting) -> None:
        """Store a question, or that nobody answered it. Ends the flow if the store refuses it."""
        session = self._driver.ctx.session
        if question.payload is None:  # When it was asked, for those who look at the run.
            session.note(f"{question.position}:w:{question.branch}", str(self._driver.clock_ms()).encode())
        await self._see_through(partial(self._driver.ctx.session.ask, question))

    async def _see_through(self, write: Callable[[], Awaitable[None] | None]) -> None:
        try:
            pending = write()
        except Exception as error:
            await self.refuse(error)
        if pending is None:
            return
        shield = Shield()
        problem = await shield.finish(pending)
        if problem is not None:
            await self.refuse(problem)
        raise_if(shield.cancellation)

    async def refuse(self, error: Exception) -> NoReturn:
        node_id = self._driver.flow_id
        failure = Failure(error, FailureClass.RECOVERABLE, node_id, 1, str(error), "store")
        await self._driver.stop_here(Halt(failure, partial=True))
