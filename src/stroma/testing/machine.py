"""Any history of calls, on a store and on plain dicts that are told the same: both must always say the same.

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
class _Kept:
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
    attempts: list[_Kept] = field(default_factory=list)
    #: How it had completed before it was opened once more, and how many attempts it had then.
    was: tuple[str, str | None, int] | None = None

    def commits(self) -> dict[tuple[int, str], _Kept]:
        return {
            (kept.row.position, kept.row.branch): kept
            for kept in self.attempts
            if kept.output is not None and not kept.discarded
        }

    def used(self) -> tuple[int, float, float]:
        """Tokens, USD, ms. The time of what is inside of a group is part of the group's."""
        usages = [usage for kept in self.attempts if (usage := kept.row.usage) is not None]
        top = (kept.row.function_ns for kept in self.attempts if not kept.row.branch)
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
    def held(self) -> bool:
        return self.owner is not None and self.owner.holds


@dataclass(eq=False)
class _Handle:
    """A session, and what is known of it."""

    run_id: str
    session: Any
    process: int
    #: Whether others are kept out; whether it may still be asked to write, by itself.
    holds: bool
    writes: bool = True
    #: Its store object was closed.
    closed: bool = False
    sent: list[tuple[AttemptRow, State | None]] = field(default_factory=list)


class JournalStoreMachine(RuleBasedStateMachine):
    """Inherit, and say how a store of yours is made::

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
        """A store on the data of this example: empty at the first call, and then what was there before."""
        raise NotImplementedError("override make_store()")

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.store: Any = self.make_store()
        self.runs: dict[str, _Run] = {}
        self.handles: list[_Handle] = []
        self.order = 0
        self._delete("run")  # A store may have nothing to be read before it was first written to.

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.look()
        finally:
            self._close()
            self.loop.close()

    # ------------------------------------------------------------------ opening

    @rule(
        run_id=_run_ids,
        given=_inputs,
        if_exists=st.sampled_from(("restart", "resume", "return", "attach", "error")),
        if_running=st.sampled_from(("error", "attach", "take_over")),
        pipeline=st.sampled_from(("p", "q")),
        ends=st.sampled_from((True, True, True, False)),
        refuses=st.sampled_from((*[False] * 7, True)),
    )
    def open(
        self,
        run_id: str,
        given: int,
        if_exists: Any,
        if_running: Any,
        pipeline: str,
        ends: bool,
        refuses: bool,
    ) -> None:
        self._open(run_id, State(n=given), if_exists, if_running, pipeline, ends, refuses, None)

    @rule(
        run_id=_run_ids,
        given=_inputs,
        first=st.integers(0, _POSITIONS),
        refuses=st.sampled_from((False, False, True)),
    )
    def open_from(self, run_id: str, given: int, first: int, refuses: bool) -> None:
        """Resume without the commits from a position on."""
        self._open(run_id, State(n=given), "resume", "error", "p", True, refuses, first)

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
        asked: set[tuple[int, str, str]] = set()

        def accept(position: int, branch: str, committed: Committed) -> None:
            asked.add((position, branch, committed.node_id))
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
        stay = {at: kept for at, kept in commits.items() if first is None or at[0] < first}
        same = there and run.last.input == state
        expected: type[StoreError] | None = None
        way = "begin"
        if run.held and if_running != "take_over":
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
        self._same("restored", restored(session), {at: kept.output for at, kept in stay.items()})
        nodes = {at: found.node_id for at, found in session.restored.items()}
        self._same("the nodes of restored", nodes, {at: kept.row.node_id for at, kept in stay.items()})
        self._same("execution", session.execution, len(run.executions))
        self._same("continued", session.continued, way == "continue")
        if way != "begin":
            self._same("accept() saw", asked, {(*at, kept.row.node_id) for at, kept in stay.items()})
        if way == "return":
            assert session.finished is not None, "a finished run was to be returned"
            self._same("finished", session.finished[:2], (run.last.status, run.last.error))
            self._do(self._ending(session, "FAILED", "it may say so"))  # Of what is over it changes nothing.
        else:
            self._same("finished", session.finished, None)
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
        """One who may write; a run is opened for that if there is none."""
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
        """Sessions that somebody else's has come after, or whose run was deleted."""
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
        """The children of a group, at once."""
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
        """As if the acknowledgement was lost: it changes nothing."""
        owner = self._owner(which)
        if owner.sent:
            self._do(self._recording(owner, *_pick(owner.sent, sent)))
            self._compare(owner.run_id)

    @rule(which=_which, how=st.sampled_from(("commit", "fail", "finish", "abandon", "again")))
    def write_too_late(self, which: int, how: str) -> None:
        """Whoever was taken over from is told, and changes nothing."""
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
        """Nobody holds the run any more, and nobody said how it ended."""
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
        """Close the store, make a new one. Sessions of the old one write no more; those not abandoned hold their runs."""
        if abandon:
            for owner in self._owners():
                owner.session.abandon()
                owner.holds = owner.writes = False
        self._close()
        for handle in self.handles:
            handle.closed = True
        self.store = self.make_store()
        self.look()

    @precondition(lambda self: any(handle.closed and handle.writes for handle in self.handles))
    @rule(which=_which)
    def write_to_a_closed_store(self, which: int) -> None:
        handle = _pick([handle for handle in self.handles if handle.closed and handle.writes], which)
        attempt = self._attempt(0, "", "a", (7, 0.5, 3), 1, State(n=-1))
        self._raises(StoreError, self._recording(handle, *attempt))
        self._compare(handle.run_id)

    # ------------------------------------------------------------------ looking

    def look(self) -> None:
        """Everything that can be read says what was written."""
        for run_id in _RUNS:
            self._compare(run_id)
            self._compare_states(run_id)
        begun = sorted(
            (run_id for run_id, run in self.runs.items() if run.executions),
            key=lambda run_id: -self.runs[run_id].last.began,
        )
        assert [run.run_id for run in self.store.list_runs()] == begun, "list_runs() tells another order"
        assert [run.run_id for run in self.store.list_runs(limit=1)] == begun[:1]
        for name in ("p", "q"):
            found = [run.run_id for run in self.store.list_runs(pipeline=name)]
            assert found == [r for r in begun if self.runs[r].last.pipeline == name]
        for status in ("RUNNING", *_ENDS):
            found = [run.run_id for run in self.store.list_runs(status=status)]
            assert found == [r for r in begun if self.runs[r].last.status == status]
        assert self.store.find_run("last") == begun[:1]
        for prefix in ("r", "run", "run:", "é", "x"):
            found = [prefix] if prefix in begun else [r for r in begun if r.startswith(prefix)]
            assert self.store.find_run(prefix) == found, f"find_run({prefix!r})"
        assert self.store.find_run("r", limit=1) == [r for r in begun if r.startswith("r")][:1]

    def _compare(self, run_id: str) -> None:
        """One run, as it is listed, with its whole history."""
        run, record = self.runs.get(run_id, _Run()), self.store.get_run(run_id)
        if not run.executions:
            assert record is None, f"get_run() knows a run that is not there: {record}"
            self._same("attempts()", self.store.attempts(run_id), [])
            return
        assert record is not None, f"run {run_id!r} is gone"
        last = run.last
        tokens, cost, _ = last.used()
        told = (record.run_id, record.pipeline, record.status, record.execution, record.error, record.tokens)
        should = (run_id, last.pipeline, last.status, len(run.executions), last.error, tokens)
        self._same("get_run()", told, should)
        assert abs(record.cost_usd - cost) < 1e-9, f"cost_usd is {record.cost_usd}, not {cost}"
        assert record.nodes == sum(not branch for _, branch in last.commits()), f"nodes is {record.nodes}"
        assert (record.holder is not None) is run.held, f"the holder is {record.holder!r}"
        self._same("attempts()", self.store.attempts(run_id), self._history(last))
        if self.keeps_history:
            for number, execution in enumerate(run.executions, 1):
                told_then = self.store.attempts(run_id, execution=number)
                self._same(f"attempts() of execution {number}", told_then, self._history(execution))

    def _compare_states(self, run_id: str) -> None:
        run = self.runs.get(run_id, _Run())
        if run.executions:
            self._same("input_of()", _SCHEMA.decode(self.store.input_of(run_id)), run.last.input)
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

            self._same(f"load({run_id!r}, {node!r})", self._do(loading()), (newest, newest))

    def _history(self, execution: _Execution) -> list[AttemptRecord]:
        def place(kept: _Kept) -> tuple[Any, ...]:
            at = (kept.row.position, kept.row.started_ns, kept.row.branch, kept.row.attempt)
            return (kept.process, *at) if self.keeps_history else at

        return [_record(kept) for kept in sorted(execution.attempts, key=place)]

    @staticmethod
    def _same(what: str, found: Any, expected: Any) -> None:
        assert found == expected, f"{what}: {found!r}, and should be {expected!r}"

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
        """Attempts at once; each is kept."""

        async def sending() -> None:
            await asyncio.gather(*(self._recording(owner, *attempt) for attempt in attempts))

        self._do(sending())
        for attempt, output in attempts:
            kept = _Kept(attempt, owner.process, output, self._later())
            self.runs[owner.run_id].last.attempts.append(kept)
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

    @staticmethod
    def _next_millisecond() -> None:
        """Which run was begun last is told by the millisecond."""
        now = time.time_ns() // 1_000_000
        while time.time_ns() // 1_000_000 == now:
            time.sleep(0.0002)


def _pick(candidates: Sequence[T], which: int) -> T:
    return candidates[which % len(candidates)]


def _record(kept: _Kept) -> AttemptRecord:
    """An attempt as a store lists it; its output, unless it was discarded."""
    attempt, output = kept.row, kept.output
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
        output=None if output is None or kept.discarded else _SCHEMA.encode(output),
        error_type=error_type,
    )
