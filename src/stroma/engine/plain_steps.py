"""Steps that plain code calls with ``execute_step``: their positions, and the run that they make up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import final

from stroma.checkpoint import Session
from stroma.checkpoint.identity import StepCalls
from stroma.failures.failure import Failure
from stroma.trace.result import RunStatus

__all__ = ["PlainSteps"]


@final
class PlainSteps:
    """The steps of plain code in one run.

    Attributes:
        calls: the steps that were called, by their identity.
        has_end: the code says when its run ends, with ``async with ctx``.
        status: outcome of the last step.
        failure: failure of the last step.
        fenced: the failure of a step that found that another process owns the run, or has ended it; no other
            step is called.
    """

    __slots__ = (
        "_next_position",
        "_opening",
        "_positions",
        "calls",
        "failure",
        "fenced",
        "has_end",
        "status",
    )

    def __init__(self) -> None:
        self.calls: StepCalls | None = None
        self.has_end = False
        self.status: RunStatus | None = None
        self.failure: Failure | None = None
        self.fenced: Failure | None = None
        #: Ends when the first step has announced the run.
        self._opening: asyncio.Future[None] | None = None
        self._next_position = 0
        #: Positions at which the journal has an entry.
        self._positions: set[int] | None = None

    @property
    def has_begun(self) -> bool:
        """True once the first step has begun to announce the run."""
        return self._opening is not None

    async def begin(self, announce: Callable[[], Awaitable[None]]) -> None:
        """Announce the run, once, at its first step; steps that begin at the same time wait for that."""
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_future()
            try:
                await announce()
            finally:
                self._opening.set_result(None)
        elif not self._opening.done():
            await asyncio.shield(self._opening)

    def position_of(self, identity: str, session: Session) -> int:
        """Return the position of a step: the one it has in the journal, else the next without an entry."""
        position = session.places.get(identity)
        if position is None:
            if self._positions is None:
                self._positions = {at for at, _ in (*session.restored, *session.waiting)}
                self._positions.update(session.places.values())
            while self._next_position in self._positions:
                self._next_position += 1
            position = self._next_position
            self._next_position += 1
        session.note_call(position, identity)
        return position
