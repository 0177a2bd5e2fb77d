"""A run in its store: its opening, the records of earlier processes, and its end."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from time import perf_counter_ns, time_ns
from typing import Any, Final, NamedTuple

from stroma.checkpoint import CheckpointManager, Committed, RunBusy, RunRequest, Session
from stroma.checkpoint.entries import PriorUsage, Tried
from stroma.checkpoint.sessions import NULL_SESSION
from stroma.engine.tasks import Shield
from stroma.trace.events import AttemptUsage

#: Seconds between queries for a run that another process owns: at first, and at most.
_ATTACH_DELAYS: Final = (0.02, 1.0)
_NOTHING: Final = PriorUsage()
_NO_FAILED_MAPS: Final[Mapping[tuple[int, str], int]] = {}


class Dispatch(NamedTuple):
    """Conditions under which a dispatcher opens a run.

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


class RunJournal:
    """A run in its store, with the settings of the code around it.

    Attributes:
        session: the run in its store; NULL_SESSION before it is opened.
        restored: committed outputs by position and branch. Flows and maps replace it by a dict of their own.
        tried: attempts of processes that died, until their node runs again.
        prior_unrecorded: usage of earlier processes that no attempt has; unrecorded: that of attempts of this
            process which the store refuses.
        failed_maps: of committed maps, how many items failed.
        apart: see RunRequest.
        dispatch: how a dispatcher opens the run.
        versions: the versions of runs that the pipeline can continue, its own first; None for plain code,
            which has none.
        caller: calls nodes with a place, see stroma.engine.placed_calls; None where they cannot be called.
        wake_ms: when the suspended or interrupted run is due; see Session.end().
        number_event: returns the number of the event that the output at a branch is to the body of a flow;
            None outside of flows.
        noticed: number of the last event that this body has noticed.
        traceparent: the W3C trace context of the caller.
        kept_traces: trace contexts for processes that resume the run, by system: the first one that each
            system recorded.
        effects: the last calls of effects in this process, by the keys of their notes.
        unknown_ends: calls that ended in this process with an unknown outcome, by the place of their notes.
        flights: calls of effects that this process makes now, by the place of their notes.
        body_calls: by the position of a flow and the branch, the calls that its body awaits (False), and
            those whose output it has received (True).
        effect_places, taken_over: by position, the places of the notes of effects by node and digest; and by
            the place of a note, the place of the call that takes its effect.
        attempt_count: the attempts whose events have an id.
        epoch_ns: turns perf_counter_ns into nanoseconds since the epoch: a step of the wall clock changes no
            order in the run.
    """

    def __init__(self) -> None:
        self.session: Session = NULL_SESSION
        self.restored: Mapping[tuple[int, str], Committed] = NULL_SESSION.restored
        self.epoch_ns = time_ns() - perf_counter_ns()
        self.effects: dict[str, Any] = {}
        self.unknown_ends: dict[tuple[int, str], Any] = {}
        self.flights: dict[tuple[int, str], Any] = {}
        self.body_calls: dict[int, dict[str, bool]] = {}
        self.effect_places: dict[int, dict[tuple[str, str], dict[tuple[int, str], None]]] = {}
        self.taken_over: dict[tuple[int, str], tuple[int, str]] = {}
        self.kept_traces: dict[str, str] = {}
        self.tried: dict[tuple[int, str], Tried] | None = None

    # On the class until a run needs them.
    prior_unrecorded: PriorUsage = _NOTHING
    unrecorded: PriorUsage = _NOTHING
    failed_maps: Mapping[tuple[int, str], int] = _NO_FAILED_MAPS
    apart: tuple[tuple[int, str], ...] = ()
    dispatch: Dispatch = BY_HAND
    versions: tuple[str, ...] | None = None
    caller: Any = None
    wake_ms: int | None = None
    number_event: Callable[[str], int] | None = None
    noticed: int = 0
    traceparent: str | None = None
    attempt_count: int = 0
    #: The call of the store that opens the run. It waits between two looks at a run of another process; and
    #: it need not look again.
    _opening: asyncio.Future[Session] | None = None
    _is_waiting: bool = False
    _is_over: bool = False

    def wake_by(self, wake_ms: int | None) -> None:
        """Make the run due at a time once it is suspended, unless it is due earlier; None: no time."""
        if wake_ms is not None and (self.wake_ms is None or wake_ms < self.wake_ms):
            self.wake_ms = wake_ms

    def note_unrecorded(self, usage: AttemptUsage) -> None:
        """Note the usage of an attempt that the store refuses; the end of the run stores it."""
        before = self.unrecorded
        self.unrecorded = PriorUsage(before.tokens + usage.tokens, before.cost_usd + usage.cost_usd)

    @property
    def has_begun(self) -> bool:
        """True once the run is being opened in the background."""
        return self._opening is not None

    async def _attach(self, manager: CheckpointManager, request: RunRequest) -> Session:
        """Open the run once no other process owns it, to return its outcome."""
        delay, longest = _ATTACH_DELAYS
        while True:
            try:
                opened = manager.open_run(request)
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

    def start(self, manager: CheckpointManager, request: RunRequest) -> Session | None:
        """Begin to open the run. Return its session if it is there at once; else :meth:`wait` does."""
        if request.if_running == "attach":
            opened: Any = self._attach(manager, request)
        else:
            opened = manager.open_run(request)
        if not hasattr(opened, "__await__"):  # inspect.isawaitable() takes 1 us more of the 50 of a run.
            session: Session = opened
            return session
        self._opening = asyncio.ensure_future(opened)
        return None

    async def wait(self) -> Session:
        """Return the session. Raises StoreError; then the next call opens it again."""
        assert self._opening is not None
        try:
            # Steps that begin at the same time wait for one opening, which the cancellation of one of them
            # does not end.
            return await asyncio.shield(self._opening)
        except Exception:
            self._opening = None
            raise

    async def finish(self, shield: Shield) -> Session | None:
        """Return the session of a run that will end; None for a run of another process. Raises StoreError."""
        assert self._opening is not None
        self._is_over = True
        if self._is_waiting:
            self._opening.cancel()
            return None
        problem = await shield.finish(self._opening)
        if self._opening.cancelled():
            return None  # All tasks were cancelled, and the store has released what it claimed.
        if problem is not None:
            raise problem
        return self._opening.result()

    def abandon(self) -> None:
        """Release the run where nothing can be awaited, also once it is opened; records nothing."""
        if self.session is not NULL_SESSION:
            self.session.abandon()
        elif self._opening is not None:
            self._opening.add_done_callback(_abandon)


def _abandon(opened: asyncio.Future[Session]) -> None:
    if not opened.cancelled() and opened.exception() is None:
        opened.result().abandon()
