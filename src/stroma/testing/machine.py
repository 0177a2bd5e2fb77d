"""Stateful tests that compare a store with a model: both get the same calls and must return the same.

Needs hypothesis.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from stroma.checkpoint import (
    AttemptRecord,
    CheckpointNotFound,
    Committed,
    Fenced,
    PipelineChanged,
    RunBusy,
    RunExists,
    RunRequest,
    StoreError,
)
from stroma.contracts.schema import schema_of
from stroma.failures.classes import FailureClass
from stroma.testing.stores import State, restored, row, settled
from stroma.trace.events import AttemptRow

__all__ = ["JournalStoreMachine"]

T = TypeVar("T")

#: No id begins with another one by chance: find_run() looks by their beginnings.
_RUNS: Final = ("run", "run:1", "é")
_NODES: Final = ("a", "b")
_BRANCHES: Final = ("", "0", "1", "0.1")
_POSITIONS: Final = 4
_ENDS: Final = ("COMPLETED", "RESUMED", "PARTIAL", "FAILED", "CANCELLED", "INTERRUPTED")
_SCHEMA: Final = schema_of(State)
_LEASE_SECONDS: Final = 3600.0  # longer than any example takes

_run_ids = st.sampled_from(_RUNS)
_inputs = st.sampled_from((0, 0, 0, 1))
_which = st.integers(0, 1000)
_usages = st.tuples(st.integers(0, 50), st.sampled_from((0.0, 0.1, 0.25, 1e-12)), st.integers(0, 20))


# ---------------------------------------------------------------------- what should be so


@dataclass
class _ModelAttempt:
    """An attempt."""

    row: AttemptRow
    process: int  # counts how often the run was opened
    output: State | None
    #: Counts everything that is kept: what came later is newer.
    order: int
    discarded: bool = False


@dataclass
class _Execution:
    pipeline: str
    input: State
    began: int
    status: str = "RUNNING"
    error: str | None = None
    attempts: list[_ModelAttempt] = field(default_factory=list)
    #: Status and number of attempts at its completion, before it was opened again.
    was: tuple[str, str | None, int] | None = None

    def commits(self) -> dict[tuple[int, str], _ModelAttempt]:
        return {
            (entry.row.position, entry.row.branch): entry
            for entry in self.attempts
            if entry.output is not None and not entry.discarded
        }

    def used(self) -> tuple[int, float, float]:
        """Return tokens, USD and ms. The time of children is part of the group."""
        usages = [usage for entry in self.attempts if (usage := entry.row.usage) is not None]
        top = (entry.row.function_ns for entry in self.attempts if not entry.row.branch)
        return sum(u.tokens for u in usages), sum(u.cost_usd for u in usages), sum(top) / 1e6


@dataclass
class _Run:
    executions: list[_Execution] = field(default_factory=list)
    saved: dict[str, tuple[int, State]] = field(default_factory=dict)
    opened: int = 0
    #: The session that may write; None before the first and after a deletion.
    owner: _Handle | None = None

    @property
    def last(self) -> _Execution:
        return self.executions[-1]

    @property
    def has_owner(self) -> bool:
        return self.owner is not None and self.owner.holds


@dataclass(eq=False)
class _Handle:
    """A session with its expected state."""

    run_id: str
    session: Any
    process: int
    #: It blocks other owners; it may still write.
    holds: bool
    writes: bool = True
    #: Its store object was closed.
    closed: bool = False
    sent: list[tuple[AttemptRow, State | None]] = field(default_factory=list)


class JournalStoreMachine(RuleBasedStateMachine):
    """State machine for a journal store. Inherit, and define how your store is created::

        class MyMachine(JournalStoreMachine):
            def make_store(self):
                return MyStore(self.path)

        TestMyStore = MyMachine.TestCase

    Everything runs on one event loop. What the store says of every run is compared after every call with what was
    written, and all of it at the end. ``teardown`` closes the store; extend it to remove what the store kept.

    Attributes:
        durable: whether a new object finds what the one before kept.
        keeps_history: whether attempts() knows earlier executions, and tells one process after the other.
    """

    durable = True
    keeps_history = True

    def make_store(self) -> Any:
        """Return a store on the data of this example: empty at first, later with the data of before."""
        raise NotImplementedError("override make_store()")

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.store: Any = self.make_store()
        self.runs: dict[str, _Run] = {}
        self.handles: list[_Handle] = []
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

    # ------------------------------------------------------------------ opening

    @rule(
        run_id=_run_ids,
        input_number=_inputs,
        if_exists=st.sampled_from(("restart", "resume", "return", "attach", "error")),
        if_running=st.sampled_from(("error", "attach", "take_over")),
        pipeline=st.sampled_from(("p", "q")),
        ends=st.sampled_from((True, True, True, False)),
        refuses=st.sampled_from((*[False] * 7, True)),
    )
    def open(
        self,
        run_id: str,
        input_number: int,
        if_exists: Any,
        if_running: Any,
        pipeline: str,
        ends: bool,
        refuses: bool,
    ) -> None:
        self._open(run_id, State(n=input_number), if_exists, if_running, pipeline, ends, refuses, None)

    @rule(
        run_id=_run_ids,
        input_number=_inputs,
        first=st.integers(0, _POSITIONS),
        refuses=st.sampled_from((False, False, True)),
    )
    def open_from(self, run_id: str, input_number: int, first: int, refuses: bool) -> None:
        """Resume without the commits from a position on."""
        self._open(run_id, State(n=input_number), "resume", "error", "p", True, refuses, first)

    @rule(which=_which)
    def take_over(self, which: int) -> None:
        self._take_over(self._owner(which).run_id)

    def _take_over(self, run_id: str) -> None:
        self._open(run_id, self.runs[run_id].last.input, "resume", "take_over", "p", True, False, None)

    def _open(
        self,
        run_id: str,
        state: State,
        if_exists: Any,
        if_running: Any,
        pipeline: str,
        ends: bool,
        refuses: bool,
        first: int | None,
    ) -> None:
        accepted: set[tuple[int, str, str]] = set()

        def accept(position: int, branch: str, committed: Committed) -> None:
            accepted.add((position, branch, committed.node_id))
            if refuses:
                raise PipelineChanged("refused; give another")

        self._next_millisecond()
        request = RunRequest(
            run_id, pipeline, state, _SCHEMA, if_exists, first, accept, if_running, _LEASE_SECONDS, ends
        )

        async def opening() -> Any:
            return await settled(self.store.open_run(request))

        run = self.runs.get(run_id, _Run())
        there = bool(run.executions)
        commits = run.last.commits() if there else {}
        stay = {at: entry for at, entry in commits.items() if first is None or at[0] < first}
        same = there and run.last.input == state
        expected: type[StoreError] | None = None
        way = "begin"
        if run.has_owner and if_running != "take_over":
            expected = RunBusy
        elif there and if_exists == "error":
            expected = RunExists
        elif there and if_exists != "restart":
            finished = if_exists == "return" and run.last.status in ("COMPLETED", "RESUMED")
            finished |= if_exists == "attach" and run.last.status != "RUNNING"
            way = "return" if finished else "continue"
            if (first is None and not same) or (refuses and stay):
                expected = PipelineChanged
        if expected is not None:
            error = self._raises(expected, opening())
            if isinstance(error, RunBusy):
                assert error.same_input is same, "RunBusy.same_input is wrong"
                assert error.holder, "RunBusy.holder is empty"
                assert error.left_seconds > 0, "the lease of a held run has expired"
            self._compare(run_id)
            return

        session = self._do(opening())
        self.runs[run_id] = run
        if way == "begin":
            run.executions.append(_Execution(pipeline, state, self._later()))
            stay = {}
        elif way == "continue":
            for at in commits.keys() - stay.keys():
                commits[at].discarded = True
            used = run.last.used()
            prior = session.prior
            assert prior.tokens == used[0], f"prior.tokens is {prior.tokens}, used were {used[0]}"
            assert abs(prior.cost_usd - used[1]) < 1e-9, f"prior.cost_usd is {prior.cost_usd}, not {used[1]}"
            assert abs(prior.latency_ms - used[2]) < 1e-6, f"prior.latency_ms is {prior.latency_ms}"
        self._assert_same("restored", restored(session), {at: entry.output for at, entry in stay.items()})
        nodes = {at: actual.node_id for at, actual in session.restored.items()}
        self._assert_same(
            "the nodes of restored", nodes, {at: entry.row.node_id for at, entry in stay.items()}
        )
        self._assert_same("execution", session.execution, len(run.executions))
        self._assert_same("continued", session.continued, way == "continue")
        if way != "begin":
            self._assert_same(
                "accept() saw", accepted, {(*at, entry.row.node_id) for at, entry in stay.items()}
            )
        if way == "return":
            assert session.finished is not None, "a finished run was to be returned"
            self._assert_same("finished", session.finished[:2], (run.last.status, run.last.error))
            self._do(self._ending(session, "FAILED", "it may say so"))  # Of what is over it changes nothing.
        else:
            self._assert_same("finished", session.finished, None)
            run.last.was = None
            if way == "continue" and run.last.status in ("COMPLETED", "RESUMED") and first is None:
                run.last.was = run.last.status, run.last.error, len(run.last.attempts)
            run.last.status, run.last.error = "RUNNING", None
            run.opened += 1
            run.owner = _Handle(run_id, session, run.opened, holds=ends)
            self.handles.append(run.owner)
        self._compare(run_id)

    # ------------------------------------------------------------------ writing

    def _owner(self, which: int) -> _Handle:
        """Return a session that may write; open the run if there is none."""
        if not self._owners():
            run_id = _pick(_RUNS, which)
            there = self.runs.get(run_id, _Run()).executions
            state = there[-1].input if there else State()
            self._open(run_id, state, "resume", "take_over", "p", True, False, None)
        return _pick(self._owners(), which)

    def _owners(self) -> list[_Handle]:
        owners = (run.owner for run in self.runs.values())
        return [owner for owner in owners if owner is not None and owner.writes and not owner.closed]

    def _stale(self) -> list[_Handle]:
        """Return sessions whose run was taken over or deleted."""
        return [
            handle
            for handle in self.handles
            if not handle.closed
            and (handle.run_id not in self.runs or self.runs[handle.run_id].owner is not handle)
        ]

    @rule(
        which=_which,
        position=st.integers(0, _POSITIONS - 1),
        branch=st.sampled_from(_BRANCHES),
        node=st.sampled_from(_NODES),
        n=st.integers(0, 2**70),
        usage=_usages,
        number=st.integers(1, 3),
    )
    def commit(
        self,
        which: int,
        position: int,
        branch: str,
        node: str,
        n: int,
        usage: tuple[int, float, int],
        number: int,
    ) -> None:
        owner = self._owner(which)
        if (position, branch) not in self.runs[owner.run_id].last.commits():
            self._send(owner, [self._attempt(position, branch, node, usage, number, State(n=n))])

    @rule(which=_which, position=st.integers(0, _POSITIONS - 1), usage=_usages, many=st.integers(2, 5))
    def commit_branches(self, which: int, position: int, usage: tuple[int, float, int], many: int) -> None:
        """Commit the children of a group concurrently."""
        owner = self._owner(which)
        there = self.runs[owner.run_id].last.commits()
        free = [branch for branch in map(str, range(many)) if (position, branch) not in there]
        self._send(
            owner, [self._attempt(position, branch, "a", usage, 1, State(text=branch)) for branch in free]
        )

    @rule(
        which=_which,
        position=st.integers(0, _POSITIONS - 1),
        branch=st.sampled_from(_BRANCHES),
        usage=_usages,
        kind=st.sampled_from(list(FailureClass)),
        message=st.sampled_from(("", "no", "é: 🦜")),
    )
    def fail(
        self,
        which: int,
        position: int,
        branch: str,
        usage: tuple[int, float, int],
        kind: FailureClass,
        message: str,
    ) -> None:
        attempt = self._attempt(position, branch, "a", usage, 1, None, failure=kind, message=message)
        self._send(self._owner(which), [attempt])

    @rule(which=_which, sent=_which)
    def send_again(self, which: int, sent: int) -> None:
        """Repeat a write, as after a lost acknowledgement: nothing changes."""
        owner = self._owner(which)
        if owner.sent:
            self._do(self._recording(owner, *_pick(owner.sent, sent)))
            self._compare(owner.run_id)

    @rule(which=_which, how=st.sampled_from(("commit", "fail", "finish", "abandon", "again")))
    def write_too_late(self, which: int, how: str) -> None:
        """Write after a takeover: the write is rejected and changes nothing."""
        if not self._stale():
            self._take_over(self._owner(which).run_id)
        stale = _pick(self._stale(), which)
        if how == "abandon":
            stale.session.abandon()
        elif how == "finish":
            # Only once: a session that has said its end says no more.
            if stale.writes:
                self._raises(Fenced, self._ending(stale.session, "COMPLETED", None))
                stale.writes = False
        elif how == "again":
            if stale.sent:
                try:  # It is kept, and it came too late: both may be said.
                    self._do(self._recording(stale, *_pick(stale.sent, which)))
                except Fenced:
                    pass
        else:
            output = State(n=-1) if how == "commit" else None
            attempt = self._attempt(0, "", "a", (7, 0.5, 3), 1, output)
            self._raises(Fenced, self._recording(stale, *attempt))
        self._compare(stale.run_id)

    @rule(
        which=_which,
        status=st.sampled_from(_ENDS),
        error=st.sampled_from((None, "why", "é")),
    )
    def finish(self, which: int, status: str, error: str | None) -> None:
        owner = self._owner(which)
        self._do(self._ending(owner.session, status, error))
        execution = self.runs[owner.run_id].last
        if (
            (was := execution.was)
            and status in ("COMPLETED", "RESUMED")
            and was[2] == len(execution.attempts)
        ):
            status, error = was[:2]  # It had nothing to do.
        execution.status, execution.error = status, error
        owner.holds = owner.writes = False
        self._compare(owner.run_id)

    @rule(which=_which)
    def abandon(self, which: int) -> None:
        """Release a run without recording its end."""
        owner = self._owner(which)
        owner.session.abandon()
        owner.holds = owner.writes = False
        self._compare(owner.run_id)

    # ------------------------------------------------------------------ the simple protocol

    @rule(run_id=_run_ids, node=st.sampled_from(_NODES), n=st.integers(0, 9))
    def save(self, run_id: str, node: str, n: int) -> None:
        state = State(n=n, text="saved")

        async def saving() -> None:
            await settled(self.store.save(run_id, node, state))

        self._do(saving())
        self.runs.setdefault(run_id, _Run()).saved[node] = (self._later(), state)
        self._compare(run_id)
        self._compare_states(run_id)

    @rule(run_id=_run_ids, sure=st.sampled_from((True, False, False)))
    def delete(self, run_id: str, sure: bool) -> None:
        if sure:
            self._delete(run_id)

    def _delete(self, run_id: str) -> None:
        async def deleting() -> None:
            await settled(self.store.delete(run_id))

        self._do(deleting())
        self.runs.pop(run_id, None)
        self._compare(run_id)
        self._compare_states(run_id)

    # ------------------------------------------------------------------ the store object

    @precondition(lambda self: self.durable)
    @rule(abandon=st.booleans())
    def reopen(self, abandon: bool) -> None:
        """Close the store and open a new one. Old sessions write no more; those not abandoned still own their runs."""
        if abandon:
            for owner in self._owners():
                owner.session.abandon()
                owner.holds = owner.writes = False
        self._close()
        for handle in self.handles:
            handle.closed = True
        self.store = self.make_store()
        self.compare_all()

    @precondition(lambda self: any(handle.closed and handle.writes for handle in self.handles))
    @rule(which=_which)
    def write_to_a_closed_store(self, which: int) -> None:
        handle = _pick([handle for handle in self.handles if handle.closed and handle.writes], which)
        attempt = self._attempt(0, "", "a", (7, 0.5, 3), 1, State(n=-1))
        self._raises(StoreError, self._recording(handle, *attempt))
        self._compare(handle.run_id)

    # ------------------------------------------------------------------ looking

    def compare_all(self) -> None:
        """Compare everything that can be read with the model."""
        for run_id in _RUNS:
            self._compare(run_id)
            self._compare_states(run_id)
        run_ids = sorted(
            (run_id for run_id, run in self.runs.items() if run.executions),
            key=lambda run_id: -self.runs[run_id].last.began,
        )
        assert [run.run_id for run in self.store.list_runs()] == run_ids, "list_runs() tells another order"
        assert [run.run_id for run in self.store.list_runs(limit=1)] == run_ids[:1]
        for name in ("p", "q"):
            actual = [run.run_id for run in self.store.list_runs(pipeline=name)]
            assert actual == [r for r in run_ids if self.runs[r].last.pipeline == name]
        for status in ("RUNNING", *_ENDS):
            actual = [run.run_id for run in self.store.list_runs(status=status)]
            assert actual == [r for r in run_ids if self.runs[r].last.status == status]
        assert self.store.find_run("last") == run_ids[:1]
        for prefix in ("r", "run", "run:", "é", "x"):
            actual = [prefix] if prefix in run_ids else [r for r in run_ids if r.startswith(prefix)]
            assert self.store.find_run(prefix) == actual, f"find_run({prefix!r})"
        assert self.store.find_run("r", limit=1) == [r for r in run_ids if r.startswith("r")][:1]

    def _compare(self, run_id: str) -> None:
        """Compare one run and its history with the model."""
        run, record = self.runs.get(run_id, _Run()), self.store.get_run(run_id)
        if not run.executions:
            assert record is None, f"get_run() knows a run that is not there: {record}"
            self._assert_same("attempts()", self.store.attempts(run_id), [])
            return
        assert record is not None, f"run {run_id!r} is gone"
        last = run.last
        tokens, cost, _ = last.used()
        actual = (
            record.run_id,
            record.pipeline,
            record.status,
            record.execution,
            record.error,
            record.tokens,
        )
        should = (run_id, last.pipeline, last.status, len(run.executions), last.error, tokens)
        self._assert_same("get_run()", actual, should)
        assert abs(record.cost_usd - cost) < 1e-9, f"cost_usd is {record.cost_usd}, not {cost}"
        assert record.nodes == sum(not branch for _, branch in last.commits()), f"nodes is {record.nodes}"
        assert (record.holder is not None) is run.has_owner, f"the holder is {record.holder!r}"
        self._assert_same("attempts()", self.store.attempts(run_id), self._history(last))
        if self.keeps_history:
            for number, execution in enumerate(run.executions, 1):
                earlier = self.store.attempts(run_id, execution=number)
                self._assert_same(f"attempts() of execution {number}", earlier, self._history(execution))

    def _compare_states(self, run_id: str) -> None:
        run = self.runs.get(run_id, _Run())
        if run.executions:
            self._assert_same("input_of()", _SCHEMA.decode(self.store.input_of(run_id)), run.last.input)
        else:
            try:
                self.store.input_of(run_id)
            except CheckpointNotFound:
                pass
            else:
                raise AssertionError(f"input_of() knows an input of run {run_id!r}")
        for node in _NODES:
            outputs = [run.saved[node]] if node in run.saved else []
            if run.executions:
                commits = run.last.commits().values()
                outputs += [(c.order, c.output) for c in commits if c.row.node_id == node and c.output]
            newest = max(outputs, key=lambda output: output[0], default=(0, None))[1]

            async def loading(node: str = node) -> tuple[Any, Any]:
                loaded = await settled(self.store.load(run_id, node))
                return loaded, await settled(self.store.load_typed(run_id, node, State))

            self._assert_same(f"load({run_id!r}, {node!r})", self._do(loading()), (newest, newest))

    def _history(self, execution: _Execution) -> list[AttemptRecord]:
        def place(entry: _ModelAttempt) -> tuple[Any, ...]:
            at = (entry.row.position, entry.row.started_ns, entry.row.branch, entry.row.attempt)
            return (entry.process, *at) if self.keeps_history else at

        return [_record(entry) for entry in sorted(execution.attempts, key=place)]

    @staticmethod
    def _assert_same(what: str, actual: Any, expected: Any) -> None:
        assert actual == expected, f"{what}: {actual!r}, and should be {expected!r}"

    # ------------------------------------------------------------------ driving

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def _raises(self, kind: type[StoreError], work: Coroutine[Any, Any, Any]) -> StoreError:
        try:
            self._do(work)
        except kind as error:
            return error
        raise AssertionError(f"{kind.__name__} was not raised")

    async def _recording(self, handle: _Handle, attempt: AttemptRow, output: State | None) -> None:
        await settled(handle.session.record(attempt, None if output is None else _SCHEMA, output))

    async def _ending(self, session: Any, status: str, error: str | None) -> None:
        await settled(session.end(status, error))

    def _attempt(
        self,
        position: int,
        branch: str,
        node: str,
        usage: tuple[int, float, int],
        number: int,
        output: State | None,
        **failure: Any,
    ) -> tuple[AttemptRow, State | None]:
        tokens, cost, ms = usage
        picture = None if output is None else _SCHEMA.snapshot(output)
        attempt = row(
            position,
            node,
            attempt=number,
            branch=branch,
            tokens=tokens,
            cost=cost,
            ms=ms,
            output=picture,
            schema=_SCHEMA,
            **failure,
        )
        return attempt, output

    def _send(self, owner: _Handle, attempts: list[tuple[AttemptRow, State | None]]) -> None:
        """Record attempts concurrently; each is stored."""

        async def sending() -> None:
            await asyncio.gather(*(self._recording(owner, *attempt) for attempt in attempts))

        self._do(sending())
        for attempt, output in attempts:
            entry = _ModelAttempt(attempt, owner.process, output, self._later())
            self.runs[owner.run_id].last.attempts.append(entry)
            owner.sent.append((attempt, output))
        self._compare(owner.run_id)

    def _close(self) -> None:
        async def closing() -> None:
            close: Callable[[], Awaitable[None]] | None = getattr(self.store, "aclose", None)
            if close is not None:
                await close()

        self._do(closing())

    def _later(self) -> int:
        self.order += 1
        return self.order

    def _next_millisecond(self) -> None:
        """Wait for a later millisecond than the last one: runs are ordered by their start, and a clock may be set back."""
        while (now := time.time_ns() // 1_000_000) <= self.last_ms:
            time.sleep(0.0002)
        self.last_ms = now


def _pick(candidates: Sequence[T], which: int) -> T:
    return candidates[which % len(candidates)]


def _record(entry: _ModelAttempt) -> AttemptRecord:
    """Return the expected record of an attempt, without a discarded output."""
    attempt, output = entry.row, entry.output
    failure, message, reason, error_type = attempt.failure or (None, None, None, None)
    usage = attempt.usage
    assert usage is not None
    return AttemptRecord(
        position=attempt.position,
        branch=attempt.branch,
        node_id=attempt.node_id,
        attempt=attempt.attempt,
        started_ms=attempt.started_ns // 1_000_000,
        duration_ms=attempt.duration_ns / 1e6,
        outcome=attempt.outcome,
        failure_class=None if failure is None else failure.value,
        message=message,
        reason=reason,
        tokens=usage.tokens,
        output_tokens=usage.output_tokens,
        cost_usd=usage.cost_usd,
        model=usage.model,
        output=None if output is None or entry.discarded else _SCHEMA.encode(output),
        error_type=error_type,
    )
