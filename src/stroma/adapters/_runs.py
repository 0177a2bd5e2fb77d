"""A run of a guard: from its beginning, in code of any kind, to its end in the journal and the hooks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel

from stroma._engine import Halt
from stroma.adapters._background import run_in_background
from stroma.adapters._calls import Call
from stroma.adapters._steps import Halts, halt_behind
from stroma.adapters._views import given_to
from stroma.context import ReliabilityContext
from stroma.failures import Failure, FailureClass, NodeContext, diagnose
from stroma.hooks import HookError
from stroma.trace import ExecutionResult, RunStatus

if TYPE_CHECKING:
    from stroma.adapters.guard import Guard

__all__ = ["ACTIVE", "GuardedRun"]

#: The runs of guards that are under way here, the innermost last.
ACTIVE: ContextVar[tuple[GuardedRun, ...]] = ContextVar("stroma_guarded_runs", default=())


class GuardedRun:
    """One run of a guard. Use it once, as a context manager: ``with`` or ``async with``.

    Attributes:
        ctx: the run's context: its id, tracker, trace.
        result: what the run came to, once it has ended.
        ended: whether it has.
        ends: whether it will; the run of a guard itself lasts as long as that.
    """

    def __init__(self, guard: Guard, ctx: ReliabilityContext, input: Any = None, *, ends: bool) -> None:
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

    def free_position(self) -> int:
        with self._lock:
            return self.ctx.free_position()

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
        if self.ends:
            await ctx.tell_start(initial)

    # ------------------------------------------------------------------ the end

    async def close(self, error: BaseException | None) -> None:
        """End the run: in the journal, and for the hooks. ``error`` is what came out of the code inside, if anything did."""
        ctx = self.ctx
        status, failure = self._outcome(error)
        self.ended = True
        self.result = ctx.build_result(status, ctx.last_state, failure)
        self.guard.ended(self)
        why = "; ".join(ctx.suspended) if status is RunStatus.SUSPENDED else failure and failure.message
        if isinstance(
            error, GeneratorExit
        ):  # The code around is being closed: nothing may be awaited any more.
            ctx.session.abandon()
            await ctx.tell_end(self.result, now=True)
            return
        cancelled = await ctx.end(status, why or None)
        await ctx.tell_end(self.result)
        if cancelled and error is None:
            raise asyncio.CancelledError
        if error is None and ctx.hook_failures and ctx.config.hook_errors == "raise":
            first = ctx.hook_failures[0]
            raise HookError(
                f"{len(ctx.hook_failures)} hook calls raised; the first: {first.hook}", self.result
            ) from first.exception

    def _outcome(self, error: BaseException | None) -> tuple[RunStatus, Failure | None]:
        spent = self._stopping is not None and self._stopping.spent
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
                    try:
                        part = await anext(source)
                    except StopAsyncIteration:
                        return
                yield part
        except BaseException as error:
            raised = error
            if isinstance(error, GeneratorExit) and hasattr(source, "aclose"):
                with self.here():
                    await source.aclose()
            raise
        finally:
            self._leave()
            await self.close(raised)

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
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._leave()
        await self.close(error)


def _reset(token: Token[tuple[GuardedRun, ...]]) -> None:
    try:
        ACTIVE.reset(token)
    except ValueError:
        pass  # A generator that was thrown away is closed in somebody else's context.
