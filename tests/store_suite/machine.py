"""Stateful tests that compare a store with a model: both get the same calls and must return the same.

Needs hypothesis.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests.store_suite.journal import State, row, settled
from tests.store_suite.machine_checks import ENDS, NODES, RUNS, StoreComparison
from tests.store_suite.machine_model import (
    SCHEMA,
    ModelAttempt,
    ModelExecution,
    ModelPlace,
    ModelRun,
    OpenArguments,
    RecordedUsage,
    SessionHandle,
)

from stroma.checkpoint import CheckpointLost, Committed, Fenced, PipelineChanged, RunRequest, StoreError
from stroma.failures.classes import FailureClass
from stroma.trace.events import AttemptRow

T = TypeVar("T")

_POSITIONS: Final = 4
_LEASE_SECONDS: Final = 3600.0  # longer than any example takes

_run_ids = st.sampled_from(RUNS)
_inputs = st.sampled_from((0, 0, 0, 1)).map(lambda number: State(n=number))
_indexes = st.integers(0, 1000)
_usages = st.builds(
    RecordedUsage, st.integers(0, 50), st.sampled_from((0.0, 0.1, 0.25, 1e-12)), st.integers(0, 20)
)
_positions = st.integers(0, _POSITIONS - 1)
_branches = st.sampled_from(("", "0", "1", "0.1"))
_openings = st.builds(
    OpenArguments,
    _run_ids,
    _inputs,
    if_exists=st.sampled_from(("new", "restart", "resume", "return", "attach", "error")),
    if_running=st.sampled_from(("error", "attach", "take_over")),
    pipeline=st.sampled_from(("p", "q")),
    ends=st.sampled_from((True, True, True, False)),
    refuses=st.sampled_from((*[False] * 7, True)),
)
_partial_openings = st.builds(
    OpenArguments,
    _run_ids,
    _inputs,
    refuses=st.sampled_from((False, False, True)),
    first_position=st.integers(0, _POSITIONS),
)


class JournalStoreMachine(StoreComparison, RuleBasedStateMachine):
    """State machine for a journal store.

    Inherit, and define how your store is created:

    ```python
    class MyMachine(JournalStoreMachine):
        def make_store(self):
            return MyStore(self.path)

    TestMyStore = MyMachine.TestCase
    ```

    Everything runs on one event loop. After every call, what the store returns for that run is compared with
    the model, and at the end all of it. ``teardown`` closes the store; extend it to remove the store's data.

    Attributes:
        durable: whether a new store object finds the data of the one before.
        keeps_history: whether attempts() returns earlier executions, in the order of their processes.
    """

    durable = True

    def make_store(self) -> Any:
        """Return a store on the data of this example: empty at first, later with the data of before."""
        raise NotImplementedError("override make_store()")

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.store = self.make_store()
        self.runs = {}
        self.handles: list[SessionHandle] = []
        self.order = 0
        self.last_ms = 0
        self._delete("run")  # A store may have nothing to be read before it was first written to.

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.compare_all()
        finally:
            self._close()
            self.loop.close()

    @rule(opening=_openings)
    def open(self, opening: OpenArguments) -> None:
        self._open(opening)

    @rule(opening=_partial_openings)
    def open_from(self, opening: OpenArguments) -> None:
        """Resume without the commits from a position on."""
        self._open(opening)

    @rule(index=_indexes)
    def take_over(self, index: int) -> None:
        self._take_over(self._pick_owner(index).run_id)

    def _take_over(self, run_id: str) -> None:
        self._open(OpenArguments(run_id, self.runs[run_id].last.input, if_running="take_over"))

    def _open(self, opening: OpenArguments) -> None:
        accepted: set[tuple[int, str, str]] = set()

        def accept(position: int, branch: str, committed: Committed) -> None:
            accepted.add((position, branch, committed.node_id))
            if opening.refuses:
                raise PipelineChanged("refused; pass another")

        self._wait_for_next_millisecond()
        request = RunRequest(
            opening.run_id,
            opening.pipeline,
            opening.input,
            SCHEMA,
            opening.if_exists,
            opening.first_position,
            accept,
            opening.if_running,
            _LEASE_SECONDS,
            opening.ends,
        )

        async def open_run() -> Any:
            return await settled(self.store.open_run(request))

        run = self.runs.get(opening.run_id, ModelRun())
        expected = run.expected_opening(opening)
        if not isinstance(expected, str):
            self._assert_refused(opening, expected, open_run())
            return
        remaining = {} if expected == "begin" else run.remaining(opening)
        session = self._wait_for(open_run())
        self.runs[opening.run_id] = run
        if expected == "begin":
            run.executions.append(ModelExecution(opening.pipeline, opening.input, self._next_order()))
        elif expected == "resume":
            for at, entry in run.last.commits().items():
                entry.is_discarded = at not in remaining
            self._assert_prior(session, run.last)
        self._assert_restored(session, remaining)
        self._assert_same("execution", session.execution, len(run.executions))
        self._assert_same("continued", session.continued, expected == "resume")
        if expected != "begin":
            nodes = {(*at, entry.row.node_id) for at, entry in remaining.items()}
            self._assert_same("the commits that accept() got", accepted, nodes)
        if expected == "return":
            assert session.finished is not None, "a finished run was to be returned"
            self._assert_same("finished", session.finished[:2], (run.last.status, run.last.error))
            # The run is over, so its end does not change.
            self._wait_for(self._end(session, "FAILED", "a second end"))
        else:
            self._assert_same("finished", session.finished, None)
            is_resumed_whole = expected == "resume" and opening.first_position is None
            run.last.reopen(keeps_completion=is_resumed_whole)
            run.open_count += 1
            run.owner = SessionHandle(opening.run_id, session, run.open_count, is_owner=opening.ends)
            self.handles.append(run.owner)
        self._compare(opening.run_id)

    def _pick_owner(self, index: int) -> SessionHandle:
        """Return a session that may write; open the run if there is none."""
        if not self._owners():
            run_id = _pick(RUNS, index)
            executions = self.runs.get(run_id, ModelRun()).executions
            state = executions[-1].input if executions else State()
            self._open(OpenArguments(run_id, state, if_running="take_over"))
        return _pick(self._owners(), index)

    def _owners(self) -> list[SessionHandle]:
        owners = (run.owner for run in self.runs.values())
        return [owner for owner in owners if owner is not None and owner.can_write and not owner.is_closed]

    def _stale_sessions(self) -> list[SessionHandle]:
        """Return sessions whose run was taken over or deleted."""
        return [
            handle
            for handle in self.handles
            if not handle.is_closed
            and (handle.run_id not in self.runs or self.runs[handle.run_id].owner is not handle)
        ]

    @rule(
        index=_indexes,
        place=st.builds(ModelPlace, _positions, _branches, st.sampled_from(NODES)),
        n=st.integers(0, 2**70),
        usage=_usages,
        number=st.integers(1, 3),
    )
    def commit(self, index: int, place: ModelPlace, n: int, usage: RecordedUsage, number: int) -> None:
        owner = self._pick_owner(index)
        if (place.position, place.branch) not in self.runs[owner.run_id].last.commits():
            self._record(owner, [self._attempt(place, usage, State(n=n), number)])

    @rule(index=_indexes, position=_positions, usage=_usages, count=st.integers(2, 5))
    def commit_branches(self, index: int, position: int, usage: RecordedUsage, count: int) -> None:
        """Commit the children of a group concurrently."""
        owner = self._pick_owner(index)
        commits = self.runs[owner.run_id].last.commits()
        free = [branch for branch in map(str, range(count)) if (position, branch) not in commits]
        self._record(
            owner, [self._attempt(ModelPlace(position, branch), usage, State(text=branch)) for branch in free]
        )

    @rule(
        index=_indexes,
        place=st.builds(ModelPlace, _positions, _branches),
        usage=_usages,
        kind=st.sampled_from(list(FailureClass)),
        message=st.sampled_from(("", "no", "é: 🦜")),
    )
    def fail(
        self, index: int, place: ModelPlace, usage: RecordedUsage, kind: FailureClass, message: str
    ) -> None:
        attempt = self._attempt(place, usage, None, failure=kind, message=message)
        self._record(self._pick_owner(index), [attempt])

    @rule(index=_indexes, write=_indexes)
    def send_again(self, index: int, write: int) -> None:
        """Repeat a write, as after a lost acknowledgement: nothing changes."""
        owner = self._pick_owner(index)
        if owner.writes:
            self._wait_for(self._write(owner, *_pick(owner.writes, write)))
            self._compare(owner.run_id)

    @rule(index=_indexes, how=st.sampled_from(("commit", "fail", "finish", "abandon", "again")))
    def write_too_late(self, index: int, how: str) -> None:
        """Write after a takeover: the write is rejected and changes nothing."""
        if not self._stale_sessions():
            self._take_over(self._pick_owner(index).run_id)
        stale = _pick(self._stale_sessions(), index)
        if how == "abandon":
            stale.session.abandon()
        elif how == "finish":
            # Only once: later calls of end() do nothing.
            if stale.can_write:
                self._assert_raises((Fenced, CheckpointLost), self._end(stale.session, "COMPLETED", None))
                stale.can_write = False
        elif how == "again":
            if stale.writes:
                try:  # The row is stored, and the session is stale: either answer is right.
                    self._wait_for(self._write(stale, *_pick(stale.writes, index)))
                except (Fenced, CheckpointLost):
                    pass
        else:
            output = State(n=-1) if how == "commit" else None
            attempt = self._attempt(ModelPlace(0), RecordedUsage(7, 0.5, 3), output)
            self._assert_raises((Fenced, CheckpointLost), self._write(stale, *attempt))
        self._compare(stale.run_id)

    @rule(index=_indexes, status=st.sampled_from(ENDS), error=st.sampled_from((None, "why", "é")))
    def finish(self, index: int, status: str, error: str | None) -> None:
        owner = self._pick_owner(index)
        self._wait_for(self._end(owner.session, status, error))
        self.runs[owner.run_id].last.end(status, error)
        owner.release()
        self._compare(owner.run_id)

    @rule(index=_indexes)
    def abandon(self, index: int) -> None:
        """Release a run without recording its end."""
        owner = self._pick_owner(index)
        owner.session.abandon()
        owner.release()
        self._compare(owner.run_id)

    @rule(run_id=_run_ids, node=st.sampled_from(NODES), n=st.integers(0, 9))
    def save(self, run_id: str, node: str, n: int) -> None:
        state = State(n=n, text="saved")

        async def save_state() -> None:
            await settled(self.store.save(run_id, node, state))

        self._wait_for(save_state())
        self.runs.setdefault(run_id, ModelRun()).saved[node] = (self._next_order(), state)
        self._compare(run_id)
        self._compare_states(run_id)

    @rule(run_id=_run_ids, is_certain=st.sampled_from((True, False, False)))
    def delete(self, run_id: str, is_certain: bool) -> None:
        if is_certain:
            self._delete(run_id)

    def _delete(self, run_id: str) -> None:
        async def delete_run() -> None:
            await settled(self.store.delete(run_id))

        self._wait_for(delete_run())
        self.runs.pop(run_id, None)
        self._compare(run_id)
        self._compare_states(run_id)

    @precondition(lambda self: self.durable)
    @rule(abandon=st.booleans())
    def reopen(self, abandon: bool) -> None:
        """Close the store and open a new one. Old sessions write no more, but own their runs."""
        if abandon:
            for owner in self._owners():
                owner.session.abandon()
                owner.release()
        self._close()
        for handle in self.handles:
            handle.is_closed = True
        self.store = self.make_store()
        self.compare_all()

    @precondition(lambda self: any(handle.is_closed and handle.can_write for handle in self.handles))
    @rule(index=_indexes)
    def write_to_a_closed_store(self, index: int) -> None:
        handle = _pick([handle for handle in self.handles if handle.is_closed and handle.can_write], index)
        attempt = self._attempt(ModelPlace(0), RecordedUsage(7, 0.5, 3), State(n=-1))
        self._assert_raises(StoreError, self._write(handle, *attempt))
        self._compare(handle.run_id)

    async def _write(self, handle: SessionHandle, attempt: AttemptRow, output: State | None) -> None:
        await settled(handle.session.record(attempt, None if output is None else SCHEMA, output))

    async def _end(self, session: Any, status: str, error: str | None) -> None:
        await settled(session.end(status, error))

    def _attempt(
        self, place: ModelPlace, usage: RecordedUsage, output: State | None, number: int = 1, **failure: Any
    ) -> tuple[AttemptRow, State | None]:
        attempt = row(
            place.position,
            place.node_id,
            attempt=number,
            branch=place.branch,
            tokens=usage.tokens,
            cost=usage.cost_usd,
            ms=usage.duration_ms,
            output=None if output is None else SCHEMA.snapshot(output),
            schema=SCHEMA,
            **failure,
        )
        return attempt, output

    def _record(self, owner: SessionHandle, attempts: list[tuple[AttemptRow, State | None]]) -> None:
        """Record attempts concurrently; each is stored."""

        async def record_all() -> None:
            await asyncio.gather(*(self._write(owner, *attempt) for attempt in attempts))

        self._wait_for(record_all())
        for attempt, output in attempts:
            entry = ModelAttempt(attempt, owner.process, output, self._next_order())
            self.runs[owner.run_id].last.attempts.append(entry)
            owner.writes.append((attempt, output))
        self._compare(owner.run_id)

    def _close(self) -> None:
        async def close_store() -> None:
            close: Callable[[], Awaitable[None]] | None = getattr(self.store, "aclose", None)
            if close is not None:
                await close()

        self._wait_for(close_store())

    def _next_order(self) -> int:
        self.order += 1
        return self.order

    def _wait_for_next_millisecond(self) -> None:
        """Wait for a later millisecond than the last: runs are ordered by start, clocks may be set back."""
        while (now := time.time_ns() // 1_000_000) <= self.last_ms:
            time.sleep(0.0002)
        self.last_ms = now


def _pick(candidates: Sequence[T], index: int) -> T:
    return candidates[index % len(candidates)]
