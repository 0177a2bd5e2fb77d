"""A run of a guard: from its beginning, in code of any kind, to its end in the journal and the hooks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from typing import Any, Final, Protocol, Self

from pydantic import BaseModel

from stroma.adapters._background_loop import run_in_background
from stroma.adapters._guarded_call import Call
from stroma.adapters._state_views import given_to
from stroma.adapters._step import Halts, halt_behind
from stroma.checkpoint import StepCall
from stroma.checkpoint.identity import StepCalls
from stroma.contracts.schema import schema_of
from stroma.contracts.tagged_json import NotSerialisable
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution
from stroma.engine.outcome import Halt
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RunCancelled
from stroma.failures.failure import Failure, NodeContext, diagnose, text_of
from stroma.hooks.sets import HookError
from stroma.runner.runner import StromaRunner
from stroma.trace.result import ExecutionResult, RunStatus

__all__ = ["ACTIVE", "GuardedRun"]

#: The runs of guards that are under way here, the innermost last.
ACTIVE: ContextVar[tuple[GuardedRun, ...]] = ContextVar("stroma_guarded_runs", default=())


_NO_MORE: Final = object()


class RunOwner(Protocol):
    """The guard that a run belongs to, as far as a run needs it.

    Attributes:
        runner: None if the runs are somebody else's.
        open_runs: those that have begun and not ended.
    """

    runner: StromaRunner | None
    open_runs: list[GuardedRun]

    def ended(self, run: GuardedRun) -> None: ...


class GuardedRun:
    """One run of a guard. Use it once, as a context manager: ``with`` or ``async with``.

    Attributes:
        ctx: the run's context: its id, tracker, trace.
        result: what the run came to, once it has ended.
        ended: whether it has.
        ends: whether it will; the run of a guard itself lasts as long as that.
    """

    def __init__(self, guard: RunOwner, ctx: ReliabilityContext, input: Any = None, *, ends: bool) -> None:
        self.guard = guard
        self.ctx = ctx
        self.ends = ends
        self.ended = False
        self.result: ExecutionResult | None = None
        #: What stopped for good, by what it raised; of calls that are inside no other.
        self.halts: Halts = []
        self._input = input
        self._lock = threading.Lock()
        self._opened = False
        self._opening: concurrent.futures.Future[None] | None = None
        self._stopping: Halt | None = None
        #: Whether somebody has asked for its end; the task that is told so, its loop, and whether it was.
        self.cancelling = False
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = False
        self._begun_with = 0
        self._token: Token[tuple[GuardedRun, ...]] | None = None

    @property
    def stopped(self) -> Failure | None:
        """What stopped the run: a crossed limit, else what came out of it, or, while it lasts, the last step that stopped."""
        if self.result is not None:
            return self.result.failure
        return None if self._stopping is None else self._stopping.failure

    def note(self, halt: Halt) -> None:
        """A step has stopped. The first crossed limit is what all that follows comes from."""
        known = self._stopping
        if halt.suspended or (known is not None and known.spent):
            return
        # The step in which it happened has been told already; those around it fail with the same.
        if known is None or known.failure.exception is not halt.failure.exception:
            self._stopping = halt

    # ------------------------------------------------------------------ asked to end

    def cancel(self) -> None:
        """End the run, from any thread: no step begins any more, and an async one that is under way is cancelled."""
        self.cancelling = self.ctx.cancelled = True
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._tell)
            except RuntimeError:  # The loop was closed under it.
                pass

    def _tell(self) -> None:
        if not self._told and not self.ended and self._task is not None:
            self._told = True
            self._task.cancel()

    def refusal(self, step_id: str) -> Halt | None:
        """What a step that would begin now comes to, if the run shall end."""
        if not self.cancelling:
            return None
        error = RunCancelled(
            f"run {self.ctx.run_id!r} was cancelled; {step_id!r} was not begun: call again, in a run of its own"
        )
        return Halt(Failure(error, FailureClass.TERMINAL, step_id, 1, str(error)), spent=True)

    def _watch(self) -> None:
        """From here on the task that runs is cancelled if somebody asks for the end of the run."""
        task = asyncio.current_task()
        self._begun_with = 0 if task is None else task.cancelling()
        self._task, self._loop = task, asyncio.get_running_loop()

    async def _met(self, error: BaseException | None) -> BaseException | None:
        """What came out since, a cancellation of ours as RunCancelled; the task is cancelled by us no longer."""
        task, told, self._task, self._told = self._task, self._told, None, False
        if not told or task is None:
            return error
        if error is None:  # It ended without meeting the cancellation.
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        if task.uncancel() > self._begun_with:  # By somebody else, too.
            return asyncio.CancelledError() if error is None else error
        return self._cancelled() if isinstance(error, asyncio.CancelledError) else error

    def _cancelled(self) -> RunCancelled:
        return RunCancelled(
            f"run {self.ctx.run_id!r} was cancelled; what it has finished is kept: call again, in a run of its own"
        )

    def place(
        self, parent: NodeExecution | None, step_id: str, given: BaseModel
    ) -> tuple[int, str, StepCall | None]:
        """Where a step stands that is called with an input: position and branch, and in plain code what it is known by."""
        digest = _digest(given)
        with self._lock:  # Frameworks call from threads.
            if parent is not None:
                identity = parent.calls.next_of_input(step_id, digest)
                return parent.position, parent.branch_of(identity.text), None
            calls = self.ctx.plain_steps.calls = self.ctx.plain_steps.calls or StepCalls()
            identity = calls.next_of_input(step_id, digest)
            if (
                self.ctx.handover.is_active
            ):  # In a thread that knows nothing of the node of the pipeline that began it.
                return 0, identity.text, None
            return self.ctx.place_of(identity.text), "", StepCall(identity.number, None, identity.text)

    # ------------------------------------------------------------------ the beginning

    async def open(self, first: Call | None = None) -> None:
        """Begin the run in the store, once, on whichever event loop comes first; the others wait for it."""
        while not self._opened:
            mine: concurrent.futures.Future[None] = concurrent.futures.Future()
            with self._lock:
                waits_for, self._opening = self._opening, self._opening or mine
            if waits_for is not None:
                # One that is given up spoils it for none.
                await asyncio.wait([asyncio.wrap_future(waits_for)])
                continue
            try:
                await self._open(first)
                self._opened = True
            finally:
                self._opening = None
                mine.set_result(None)

    async def _open(self, first: Call | None) -> None:
        ctx = self.ctx
        given = self._input
        if given is None and first is not None:
            given = first.step.given(first.args, first.kwargs)
        initial = (
            given if isinstance(given, BaseModel) and type(given) is not BaseModel else given_to(given, None)
        )
        await ctx.open(initial, ends=self.ends)
        if self.guard.runner is not None:  # Else the run is somebody else's, who is told.
            ctx.session.on_cancel = self.cancel
        if self.ends:
            await ctx.announce_start(initial)

    # ------------------------------------------------------------------ the end

    async def close(self, error: BaseException | None) -> None:
        """End the run: in the journal, and for the hooks. ``error`` is what came out of the code inside, if anything did."""
        ctx = self.ctx
        if self.guard.runner is not None:
            ctx.session.on_cancel = None
        status, failure = self._outcome(error)
        self.ended = True
        self.result = ctx.build_result(status, ctx.last_state, failure)
        self.guard.ended(self)
        why = "; ".join(ctx.suspended) if status is RunStatus.SUSPENDED else failure and text_of(failure)
        if isinstance(
            error, GeneratorExit
        ):  # The code around is being closed: nothing may be awaited any more.
            ctx.session.abandon()
            ctx.call_end_hooks_now(self.result)
            return
        cancelled = await ctx.end(status, why or None)
        await ctx.call_end_hooks(self.result)
        if cancelled and error is None:
            raise asyncio.CancelledError
        if error is None and ctx.hook_failures and ctx.config.hook_errors == "raise":
            first = ctx.hook_failures[0]
            raise HookError(
                f"{len(ctx.hook_failures)} hook calls raised; the first: {first.hook}", self.result
            ) from first.exception

    def _outcome(self, error: BaseException | None) -> tuple[RunStatus, Failure | None]:
        spent = self._stopping is not None and self._stopping.spent
        stopping = None if self._stopping is None else self._stopping.failure
        if stopping is not None and isinstance(stopping.exception, RunCancelled):
            return RunStatus.CANCELLED, stopping
        if isinstance(error, RunCancelled):
            return RunStatus.CANCELLED, Failure(error, FailureClass.TERMINAL, "run", 1, str(error))
        if error is None:
            if spent and self._stopping is not None:  # Whoever was told has swallowed it.
                return RunStatus.PARTIAL, self._stopping.failure
            if self.ctx.suspended:
                return RunStatus.SUSPENDED, None
            return RunStatus.RESUMED if self.ctx.session.continued else RunStatus.COMPLETED, None
        if not isinstance(error, Exception):
            stopped = isinstance(error, (asyncio.CancelledError, GeneratorExit))
            return RunStatus.CANCELLED if stopped else RunStatus.INTERRUPTED, None
        halt = self._stopping if spent else halt_behind(error, self.halts)
        if halt is not None and halt.suspended:
            return halt.status, None
        if halt is not None:
            known = self._stopping
            same = known is not None and known.failure.exception is halt.failure.exception
            return halt.status, known.failure if same and known is not None else halt.failure
        failure = diagnose(error, NodeContext("run", 1, self.ctx.run_id), self.ctx.classifiers)
        terminal = failure.failure_class is FailureClass.TERMINAL
        return RunStatus.FAILED if terminal else RunStatus.PARTIAL, failure

    # ------------------------------------------------------------------ around code

    @contextmanager
    def here(self) -> Iterator[None]:
        """What is called inside belongs to this run. It neither begins nor ends it."""
        token = ACTIVE.set((*ACTIVE.get(), self))
        try:
            yield
        finally:
            _reset(token)

    def over(self, start: Callable[[], Iterable[Any]]) -> Generator[Any, None, Any]:
        """The parts that ``start()`` gives, each made inside this run, which ends with them. Use it in place of ``with``."""
        run_in_background(self.open())
        self._begin()
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
            run_in_background(self.close(raised))

    async def aover(self, start: Callable[[], AsyncIterable[Any]]) -> AsyncIterator[Any]:
        """The same for an async iterator."""
        await self.open()
        self._begin()
        raised: BaseException | None = None
        source: Any = None
        try:
            with self.here():
                source = aiter(start())
            while True:
                with self.here():
                    part = await self._next(source)
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
            await self.close(raised)

    async def _next(self, source: AsyncIterator[Any]) -> Any:
        if self.cancelling:
            raise self._cancelled()
        self._watch()
        part: Any = _NO_MORE
        error: BaseException | None = None
        try:
            part = await anext(source, _NO_MORE)
        except BaseException as raised:
            error = raised
        met = await self._met(error)
        if met is not None:
            raise met from (None if met is error else error)
        return part

    def _begin(self) -> None:
        if self.ended or self in self.guard.open_runs:
            raise RuntimeError("a run can be used once; make another one with guard.run()")
        self.guard.open_runs.append(self)

    def _enter(self) -> None:
        self._begin()
        self._token = ACTIVE.set((*ACTIVE.get(), self))

    def _leave(self) -> None:
        if self in self.guard.open_runs:
            self.guard.open_runs.remove(self)
        if self._token is not None:
            _reset(self._token)

    def __enter__(self) -> Self:
        run_in_background(self.open())
        self._enter()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._leave()
        run_in_background(self.close(error))

    async def __aenter__(self) -> Self:
        await self.open()
        self._enter()
        self._watch()
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._leave()
        met = await self._met(error)
        await self.close(met)
        if met is not error and met is not None:
            raise met from error


def _digest(given: BaseModel) -> str:
    """What tells inputs apart; "" for those without a stored form."""
    try:
        data = schema_of(type(given)).encode(given)
    except NotSerialisable:
        return ""
    # An address is another one in each process.
    return "" if b" object at 0x" in data else hashlib.sha256(data).hexdigest()[:12]


def _reset(token: Token[tuple[GuardedRun, ...]]) -> None:
    try:
        ACTIVE.reset(token)
    except ValueError:
        pass  # A generator that was thrown away is closed in somebody else's context.
