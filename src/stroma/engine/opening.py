"""The beginning of a run in the store, for which several steps may wait."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from typing import Final, NamedTuple, final

from stroma.checkpoint import CheckpointManager, RunBusy, RunRequest, Session
from stroma.engine.tasks import Shield

__all__ = ["BY_HAND", "Dispatch", "RunOpening"]

#: Between looks at a run that another process owns, in seconds: at first, and at most.
_ATTACH_DELAYS: Final = (0.02, 1.0)


class Dispatch(NamedTuple):
    """Conditions under which a dispatcher, and not a person, opens a run.

    Attributes:
        due_ms: raise RunExists for a run that is not due at this time, in ms since the epoch. A store that
            fails in the middle of the run leaves it INTERRUPTED.
        max_seconds: end the run at the first step boundary after this time; None: no limit.
        claim: token of the claim of the worker; RunExists if the run has no such claim.
        reads: return the outcome of a run that has ended or is suspended, and raise RunExists for any other.
    """

    due_ms: int | None = None
    max_seconds: float | None = None
    claim: str | None = None
    reads: bool = False


#: A person opens the run.
BY_HAND: Final = Dispatch()


@final
class RunOpening:
    """One call of ``open_run``; with ``if_running="attach"`` as many as it takes until the owner has ended."""

    __slots__ = ("_future", "_is_over", "_is_waiting", "_manager")

    def __init__(self, manager: CheckpointManager) -> None:
        self._manager = manager
        self._future: asyncio.Future[Session] | None = None
        #: It waits between two looks at a run of another process; and it need not look again.
        self._is_waiting = self._is_over = False

    @property
    def has_begun(self) -> bool:
        """Return True from the first call of a store that has to be awaited."""
        return self._future is not None

    def start(self, request: RunRequest) -> Session | None:
        """Call the store. Return its session, or None if :meth:`wait` is to be awaited for it. Raises StoreError."""
        opened: Session | Awaitable[Session]
        if request.if_running == "attach":
            opened = self._attach(request)
        else:
            opened = self._manager.open_run(request)
        if not inspect.isawaitable(opened):
            return opened
        self._future = asyncio.ensure_future(opened)
        return None

    async def wait(self) -> Session:
        """Return the session. Raises StoreError; then the next call begins anew."""
        assert self._future is not None
        try:
            # Steps that begin at the same time wait for one opening, which the cancellation of one of them
            # does not end.
            return await asyncio.shield(self._future)
        except Exception:
            self._future = None
            raise

    async def finish(self, shield: Shield) -> Session | None:
        """Return the session of a run that is to end, or None for a run of another process. Raises StoreError."""
        assert self._future is not None
        self._is_over = True
        if self._is_waiting:
            self._future.cancel()
            return None
        problem = await shield.finish(self._future)
        if self._future.cancelled():
            return None  # All tasks were cancelled, and the store has released what it claimed.
        if problem is not None:
            raise problem
        return self._future.result()

    def abandon(self) -> None:
        """Release the run when nothing can be awaited any more, also once it is opened."""
        if self._future is not None:
            self._future.add_done_callback(_abandon)

    async def _attach(self, request: RunRequest) -> Session:
        """Open the run once no other process owns it, to return its outcome."""
        delay, longest = _ATTACH_DELAYS
        while True:
            try:
                opened = self._manager.open_run(request)
                return await opened if inspect.isawaitable(opened) else opened
            except RunBusy as busy:
                # A run that is to begin anew has no use for the outcome.
                if not busy.same_input or self._is_over or request.discard_from is not None:
                    raise
            request = request._replace(if_exists="attach")
            self._is_waiting = True
            await asyncio.sleep(delay)
            self._is_waiting = False
            delay = min(delay * 1.5, longest)


def _abandon(opened: asyncio.Future[Session]) -> None:
    if not opened.cancelled() and opened.exception() is None:
        opened.result().abandon()
