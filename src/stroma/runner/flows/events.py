"""The events of a flow: numbered when their records are written, and delivered in that order once they are stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

from stroma.engine.context import ReliabilityContext
from stroma.engine.outcome import Halt, Stopped
from stroma.engine.tasks import Shield, raise_if
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure
from stroma.runner.flows.call import FlowCall
from stroma.runner.flows.journal import FlowJournal

__all__ = ["FlowEvents"]


class FlowEvents:
    """The numbers of a flow's events, and what is stored of them. An event is the end of a call, or a time in ms.

    Attributes:
        numbers: those of the events that are not delivered yet, in order; ``number_of``: by branch those of
            calls.
        unstored, stored: what the events are, by number.
    """

    def __init__(self, ctx: ReliabilityContext, journal: FlowJournal, flow_id: str, position: int) -> None:
        self.ctx, self.journal, self.flow_id, self.position = ctx, journal, flow_id, position
        self.records = journal.records(position)
        self.numbers: deque[int] = deque()
        self.number_of: dict[str, int] = {}
        self.stored: dict[int, FlowCall | int] = {}
        self.unstored: dict[int, FlowCall | int] = {}

    def stop(self, end: Halt | Stopped | BaseException) -> None:
        """End the flow whatever its body does, once the steps that are at work have ended."""
        raise NotImplementedError

    def number(self, branch: str) -> int:
        """Return the number of the event that the end of a call is to the body. Called when its record is written."""
        number = self.number_of.get(branch)
        if number is None:
            number = self.records.last = self.records.last + 1
            self.numbers.append(number)
            if branch:
                self.number_of[branch] = number
        return number

    async def store_events(self) -> None:
        events, self.unstored = self.unstored, {}
        await self.flush()
        self.stored |= events

    async def flush(self) -> None:
        """Store what was noted. Ends the flow if the store refuses it."""
        await self.see_through(self.ctx.session.flush)

    async def see_through(self, write: Callable[[], object]) -> None:
        shield, problem = Shield(), None
        try:
            pending = write()
            if isinstance(pending, Awaitable):
                problem = await shield.finish(pending)
        except Exception as error:
            problem = error
        if problem is not None:
            failure = Failure(problem, FailureClass.RECOVERABLE, self.flow_id, 1, str(problem), "store")
            self.stop(Halt(failure, partial=True))
        raise_if(shield.cancellation)
