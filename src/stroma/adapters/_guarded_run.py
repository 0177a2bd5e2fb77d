"""A run of a guard: its start, the steps of other code in it, and its end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import Context, ContextVar, Token, copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import BaseModel

from stroma.adapters._background_loop import Changes, applied, changes_since, run_in_background
from stroma.adapters._guarded_call import Call
from stroma.adapters._state_views import given_to
from stroma.adapters._step import Halts, find_halt
from stroma.checkpoint import CheckpointLost, Fenced, StepCall, StoreError
from stroma.checkpoint.identity import StepCalls
from stroma.contracts.schema import schema_of
from stroma.contracts.tagged_json import NotSerialisable
from stroma.cost.prices import cost_of
from stroma.cost.usage import Usage, as_report
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RunningNode
from stroma.engine.lifecycle import (
    announce_start,
    call_end_hooks,
    call_end_hooks_now,
    end_run,
    heed_requests,
    note_usage,
    open_run,
)
from stroma.engine.metering import note_unpriced
from stroma.engine.outcome import Halt
from stroma.engine.tasks import raise_if
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RunCancelled
from stroma.failures.failure import Failure
from stroma.hooks.sets import HookError
from stroma.runner.pipeline import warn_of_unknown_ids
from stroma.trace.result import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from stroma.adapters.guard import Guard

#: The current runs of guards, the innermost last.
ACTIVE: ContextVar[tuple[GuardedRun, ...]] = ContextVar("stroma_guarded_runs", default=())


_NO_MORE: Final = object()
#: The id under which tokens of no step are counted.
_OUTSIDE: Final = "outside of steps"


class GuardedRun:
    """One run of a guard. Use it once, as a context manager: ``with`` or ``async with``.

    Attributes:
        ctx: the run's context: its id, tracker, trace.
        ended: the run has ended.
        ends: the run ends; that of the guard itself does not.
        is_continuation: its input is what a framework continues its own checkpoint with, such as an answer;
            under ``resume=True`` it may differ from the input that the run began with.
        fatal: what has stopped the run in a tool; the framework would tell the model of it and continue.
    """

    def __init__(self, guard: Guard, ctx: ReliabilityContext, input: Any = None, *, ends: bool) -> None:
        self.guard = guard
        self.ctx = ctx
        self.ends = ends
        self.ended = False
        self.is_continuation = False
        self.fatal: Exception | None = None
        #: On which usage outside of steps is stored at once. None: the end of the run stores it.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._result: ExecutionResult | None = None
        #: The exceptions and stops of calls that are inside no other one.
        self.halts: Halts = []
        #: The suspensions of effects whose last call may have happened, by step id: none of them is called
        #: again.
        self.unknown_effects: dict[str, Halt] = {}
        self._input = input
        self._lock = threading.Lock()
        self._opened = False
        self._opening: concurrent.futures.Future[None] | None = None
        self._stopping: Halt | None = None
        self._token: Token[tuple[GuardedRun, ...]] | None = None
        #: The context of the start and the end of a run that is opened apart, what hooks have set there for
        #: the code of the run, its span above all, and what undoes that in the caller's context.
        self._context: Context | None = None
        self._changes: Changes = ()
        self._applied = ExitStack()

    @property
    def result(self) -> ExecutionResult:
        """The result of the run. Raises RuntimeError before its end."""
        if self._result is None:
            raise RuntimeError(
                f"run {self.ctx.run_id!r} has not ended; read its result after the `with` block"
            )
        return self._result

    @property
    def stopped(self) -> Failure | None:
        """The failure that stopped the run: a spent budget, its exception, or so far its last failed step."""
        if self._result is not None:
            return self._result.failure
        return None if self._stopping is None else self._stopping.failure

    def note(self, halt: Halt) -> None:
        """Record that a step has stopped. A spent budget or a lost run is the cause of all later stops."""
        known = self._stopping
        if halt.suspended or (known is not None and known.spent):
            return
        if isinstance(halt.failure.exception, Fenced | CheckpointLost):
            self._stopping = halt._replace(spent=True)
            return
        # Steps around the failed one fail with the same exception.
        if known is None or known.failure.exception is not halt.failure.exception:
            self._stopping = halt

    def raise_fatal(self) -> None:
        """Raise what a tool has noted as ``fatal``, once."""
        fatal, self.fatal = self.fatal, None
        if fatal is not None:
            raise fatal

    # ------------------------------------------------------------------ usage outside of steps

    def report_usage(self, usage: Usage) -> None:
        """Count tokens that were used in this run and in no step: against its budget, and in its totals.

        They are stored for a resume. Safe to call from any thread. Raises UsageError for tokens without a
        known price where a cost limit could not count them.
        """
        ctx, cost = self.ctx, cost_of(as_report(usage))
        tokens = usage.input_tokens + usage.output_tokens
        with self._lock:
            ctx.cost_tracker.add(_OUTSIDE, tokens, usage.output_tokens, cost or 0.0, 0, usage.model)
        if self._loop is not None:
            with suppress(RuntimeError):  # The loop was closed under it.
                self._loop.call_soon_threadsafe(self._store_usage)
        if cost is None and tokens:
            place = f"run {ctx.run_id!r}, outside of its steps,"
            problem = note_unpriced(ctx, _OUTSIDE, place, usage.model)
            if problem is not None:
                raise problem

    def _store_usage(self) -> None:
        note_usage(self.ctx)
        with suppress(StoreError):  # The next step meets it too.
            pending = self.ctx.session.flush()
            if pending is not None:
                asyncio.ensure_future(pending).add_done_callback(
                    lambda done: done.cancelled() or done.exception()
                )

    def check_budget(self) -> None:
        """Raise BudgetExceeded if what the run has used exceeds its budget. For model calls in no step."""
        if self.ctx.account.limits:
            self.ctx.cost_tracker.check_budget(self.ctx.budget, _OUTSIDE)

    # ------------------------------------------------------------------ cancellation

    def cancel(self) -> None:
        """Cancel the run, from any thread: no further step starts, and one that is running ends."""
        self.ctx.stopping.is_cancelled = True

    def refusal(self, step_id: str) -> Halt | None:
        """Return the stop of a step that would start now, if the run is to end, or is another process's."""
        stopping = self._stopping
        if stopping is not None and isinstance(stopping.failure.exception, Fenced | CheckpointLost):
            return stopping
        if not self.ctx.stopping.is_cancelled:
            return None
        error = RunCancelled(
            f"run {self.ctx.run_id!r} was cancelled and {step_id!r} is not called; call it in another run"
        )
        return Halt(Failure(error, FailureClass.TERMINAL, step_id, 1, str(error)), spent=True)

    def place(
        self, parent: RunningNode | None, step_id: str, state: BaseModel
    ) -> tuple[int, str, StepCall | None]:
        """Return position and branch of a step for an input, and its identity in plain code."""
        digest = _digest(state)
        with self._lock:  # Frameworks call from threads.
            if parent is not None:
                identity = parent.calls.next_of_input(step_id, digest)
                return parent.position, parent.branch_of(identity.text), None
            calls = self.ctx.plain_steps.calls = self.ctx.plain_steps.calls or StepCalls()
            identity = calls.next_of_input(step_id, digest)
            if self.ctx.handover.is_active:  # In a thread without the context of the pipeline's node.
                return 0, identity.text, None
            return self.ctx.place_of(identity.text), "", StepCall(identity.number, None, identity.text)

    # ------------------------------------------------------------------ start

    async def open(self, first: Call | None = None) -> None:
        """Start the run in the store, once, on the event loop of the first caller; others wait for it."""
        while not self._opened:
            own: concurrent.futures.Future[None] = concurrent.futures.Future()
            with self._lock:
                pending, self._opening = self._opening, self._opening or own
            if pending is not None:
                # A caller that is cancelled does not affect the others.
                await asyncio.wait([asyncio.wrap_future(pending)])
                continue
            try:
                await self._open(first)
                self._opened = True
            finally:
                self._opening = None
                own.set_result(None)

    async def _open_apart(self) -> None:
        """Start the run in its own context, and note what hooks set there."""
        base = copy_context()
        await self.open()
        self._changes = changes_since(base)

    async def _close_apart(self, error: BaseException | None) -> None:
        """End a run that was opened in its own context there, unless nothing can be awaited."""
        if isinstance(error, GeneratorExit):
            await self.close(error)
            return
        closing = asyncio.get_running_loop().create_task(self.close(error), context=self._context)
        cancelled: asyncio.CancelledError | None = None
        while not closing.done():  # A cancelled task might not even begin.
            try:
                await asyncio.wait([closing])
            except asyncio.CancelledError as again:
                cancelled = again
        closing.result()
        raise_if(cancelled)

    async def _open(self, first: Call | None) -> None:
        ctx = self.ctx
        value = self._input
        if value is None and first is not None:
            value = first.seen_input()
        initial = (
            value if isinstance(value, BaseModel) and type(value) is not BaseModel else given_to(value, None)
        )
        await open_run(ctx, initial, ends=self.ends, any_input=self.is_continuation)
        if self.guard.runner is not None:  # Otherwise the owner of the context handles cancellation.
            self._loop = asyncio.get_running_loop()
            heed_requests(ctx)
        if self.ends:
            try:
                await announce_start(ctx, initial)
            except BaseException as error:  # Nobody else ends a run that was not entered.
                await self.close(error)
                raise

    # ------------------------------------------------------------------ end

    async def close(self, error: BaseException | None) -> None:
        """Store the end of the run and call its end hooks. ``error``: the exception of the code inside."""
        ctx = self.ctx
        if self.guard.runner is not None:
            ctx.session.on_control = None
        status, failure = self._outcome(error)
        self.ended = True
        self._result = ctx.build_result(status, ctx.last_state, failure)
        self.guard.ended(self)
        reason = (
            "; ".join(ctx.account.suspended) if status is RunStatus.SUSPENDED else failure and str(failure)
        )
        if isinstance(error, GeneratorExit):  # The code around is being closed: nothing can be awaited.
            ctx.journal.abandon()
            call_end_hooks_now(ctx, self.result)
            return
        if self.guard.runner is not None and ctx.config.names_ids:
            warn_of_unknown_ids(ctx, (), self.result, self.guard.runner.warned)
        ctx.journal.cause = failure and failure.mark
        cancelled = await end_run(ctx, status, reason or None)
        self.guard.forget_old(self)
        await call_end_hooks(ctx, self.result)
        if error is None:
            raise_if(cancelled)
        if error is None and ctx.account.hook_failures and ctx.config.hook_errors == "raise":
            first = ctx.account.hook_failures[0]
            raise HookError(
                f"{len(ctx.account.hook_failures)} hook calls raised; the first: {first.hook}", self.result
            ) from first.exception

    def _outcome(self, error: BaseException | None) -> tuple[RunStatus, Failure | None]:
        spent = self._stopping is not None and self._stopping.spent
        stopping = None if self._stopping is None else self._stopping.failure
        if stopping is not None and isinstance(stopping.exception, RunCancelled):
            return RunStatus.CANCELLED, stopping
        if isinstance(error, RunCancelled):
            return RunStatus.CANCELLED, Failure(error, FailureClass.TERMINAL, "run", 1, str(error))
        if error is None:
            if spent and self._stopping is not None:  # The code inside has caught the exception.
                return self._stopping.status, self._stopping.failure
            if self.ctx.account.suspended:
                return RunStatus.SUSPENDED, None
            return RunStatus.RESUMED if self.ctx.session.continued else RunStatus.COMPLETED, None
        if not isinstance(error, Exception):
            stopped = isinstance(error, (asyncio.CancelledError, GeneratorExit))
            return RunStatus.CANCELLED if stopped else RunStatus.INTERRUPTED, None
        halt = self._stopping if spent else find_halt(error, self.halts)
        if halt is not None and halt.suspended:
            return halt.status, None
        if halt is not None:
            recorded = self._stopping
            if recorded is not None and recorded.failure.exception is halt.failure.exception:
                return halt.status, recorded.failure
            return halt.status, halt.failure
        failure = self.ctx.diagnose(error, "run", 1)
        failure = replace(failure, message=self.ctx.redactor.redact_foreign(failure.message))
        terminal = failure.failure_class is FailureClass.TERMINAL
        return RunStatus.FAILED if terminal else RunStatus.PARTIAL, failure

    # ------------------------------------------------------------------ around code

    @contextmanager
    def here(self) -> Iterator[None]:
        """Make the calls inside belong to this run, without a start or an end of it."""
        if self in ACTIVE.get():
            yield  # What is current here may be inside the run, such as a framework's own span.
            return
        token = ACTIVE.set((*ACTIVE.get(), self))
        try:
            with applied(self._changes):
                yield
        finally:
            _reset(token)

    def over(self, start: Callable[[], Iterable[Any]]) -> Generator[Any, None, Any]:
        """Iterate over ``start()`` inside this run, which ends with it. Use it in place of ``with``."""
        self._context = copy_context()
        run_in_background(self._open_apart(), self._context)
        self._register()
        raised: BaseException | None = None
        source: Any = None
        try:
            with self.here():
                source = iter(start())
            while True:
                with self.here():
                    try:
                        part = next(source)
                    except StopIteration as end:
                        return end.value
                yield part
        except BaseException as error:
            raised = error
            if isinstance(error, GeneratorExit) and hasattr(source, "close"):
                with self.here():
                    source.close()
            raise
        finally:
            self._leave()
            run_in_background(self.close(raised), self._context)

    async def aover(self, start: Callable[[], AsyncIterable[Any]]) -> AsyncIterator[Any]:
        """Do the same as :meth:`over` for an async iterator."""
        # Not in the context of the caller, who has the parts: the run is around the framework's code alone.
        self._context = copy_context()
        self._register()
        raised: BaseException | None = None
        source: Any = None
        try:
            await asyncio.get_running_loop().create_task(self._open_apart(), context=self._context)
            with self.here():
                source = aiter(start())
            while True:
                if self.ctx.stopping.is_cancelled:
                    raise RunCancelled(f"run {self.ctx.run_id!r} was cancelled; continue in another run")
                with self.here():
                    part = await anext(source, _NO_MORE)
                if part is _NO_MORE:
                    return
                yield part
        except BaseException as error:
            raised = error
            if isinstance(error, (GeneratorExit, RunCancelled)) and hasattr(source, "aclose"):
                with self.here():
                    await source.aclose()
            raise
        finally:
            self._leave()
            if self._opened:  # Maybe at the moment at which the caller was cancelled.
                await self._close_apart(raised)

    def _register(self) -> None:
        if self.ended or self in self.guard.open_runs:
            raise RuntimeError("a run can be used only once; create another one with guard.run()")
        self.guard.open_runs.append(self)

    def _enter(self) -> None:
        self._register()
        self._token = ACTIVE.set((*ACTIVE.get(), self))

    def _leave(self) -> None:
        if self in self.guard.open_runs:
            self.guard.open_runs.remove(self)
        self._applied.close()
        if self._token is not None:
            _reset(self._token)

    def __enter__(self) -> Self:
        self._context = copy_context()
        run_in_background(self._open_apart(), self._context)
        self._enter()
        self._applied.enter_context(applied(self._changes))
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._leave()
        run_in_background(self.close(error), self._context)

    async def __aenter__(self) -> Self:
        await self.open()
        self._enter()
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._leave()
        await self.close(error)


def active_run() -> GuardedRun | None:
    """Return the innermost run of a guard around this code, or None."""
    return next((run for run in reversed(ACTIVE.get()) if not run.ended), None)


def _digest(state: BaseModel) -> str:
    """Return a digest of an input; "" for one without a stored form."""
    try:
        data = schema_of(type(state)).encode_sorted(state)
    except NotSerialisable:
        return ""
    return hashlib.sha256(data).hexdigest()[:12]


def _reset(token: Token[tuple[GuardedRun, ...]]) -> None:
    try:
        ACTIVE.reset(token)
    except ValueError:
        pass  # A garbage collected generator is closed in another context.
