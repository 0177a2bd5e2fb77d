"""One guarded call: the engine around it, what it tells the engine, and what its caller gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from time import perf_counter_ns
from typing import Any, Protocol

from pydantic import BaseModel

from stroma.adapters._background_loop import Turn, hand_back, start_in_background
from stroma.adapters._state_views import given_to, made_by
from stroma.adapters._step import Begun, Halts, Inside, Invoke, Step, counted, halt_behind
from stroma.checkpoint import CorruptCheckpoint, PipelineChanged, StepCall
from stroma.contracts.contract import NodeContract
from stroma.contracts.node import Node
from stroma.cost.usage import Usage, usage_from
from stroma.engine.context import ReliabilityContext
from stroma.engine.current import CURRENT
from stroma.engine.execution import NodeExecution, current_node
from stroma.engine.loop import execute
from stroma.engine.outcome import GroupStopped, Halt, Place
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure, NodeContext, diagnose, isinstance_by_type, message_of
from stroma.hooks.dispatch import HookNotAsync

__all__ = ["Call"]


class Undeclared(TypeError):
    """A plain function returned an awaitable: what it stands for would go on behind the guard's back."""


class StepOwner(Protocol):
    """The run that a call belongs to, as far as a call needs it."""

    ctx: ReliabilityContext
    halts: Halts

    def note(self, halt: Halt) -> None: ...
    async def open(self, first: Call | None = None) -> None: ...
    def place(
        self, parent: NodeExecution | None, step_id: str, given: BaseModel
    ) -> tuple[int, str, StepCall | None]: ...
    def refusal(self, step_id: str) -> Halt | None: ...


class Call:
    """One call of a guarded callable. Make it, drive it in one of the four ways, once."""

    __slots__ = (
        "args",
        "chunks",
        "count",
        "error",
        "execution",
        "func",
        "kwargs",
        "run",
        "step",
        "stopped",
        "value",
    )

    def __init__(
        self,
        run: StepOwner,
        step: Step,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.run, self.step, self.func, self.args, self.kwargs = run, step, func, args, kwargs
        #: What the last attempt's function returned or raised.
        self.value: Any = None
        self.error: BaseException | None = None
        #: Whether that is what comes out, though the failure that the engine knows of is another one.
        self.stopped = False
        self.chunks: list[Any] | None = None
        self.count = 0
        self.execution: NodeExecution | None = None

    # ------------------------------------------------------------------ four ways to be called

    async def acall(self) -> Any:
        func, args, kwargs = self.func, self.args, self.kwargs

        async def invoke() -> tuple[Any, BaseException | None]:
            return await func(*args, **kwargs), None

        return self._ended(await self._execute(invoke))

    def call(self) -> Any:
        inbox: SimpleQueue[Turn | asyncio.Task[Any]] = SimpleQueue()
        base = copy_context()
        engine = self._execute(hand_back(base, inbox.put))
        cancel = start_in_background(engine, base, inbox.put)
        try:
            while isinstance(turn := inbox.get(), Turn):
                value, error = None, None
                try:
                    with turn.here():
                        value = _not_awaitable(self.step, self.func(*self.args, **self.kwargs))
                except BaseException as raised:
                    if _ends_all(self.step, raised):
                        raise
                    error = raised
                turn.settle(value, error)
                # A frame that an exception of its own refers to is garbage for the collector alone.
                value = error = None
        except BaseException:  # The caller is told to stop: the attempt ends as cancelled.
            cancel()
            while isinstance(inbox.get(), Turn):
                pass
            raise
        return self._ended(turn.result())

    def stream(self) -> Generator[Any, Any, Any]:
        inbox: SimpleQueue[Turn | asyncio.Task[Any]] = SimpleQueue()
        base = copy_context()
        cancel = start_in_background(self._execute(hand_back(base, inbox.put)), base, inbox.put)
        try:
            while isinstance(turn := inbox.get(), Turn):
                source: Any = None
                advance: Callable[[], Any] | None = None
                while True:
                    try:
                        with turn.here():
                            if source is None:
                                source = iter(self.func(*self.args, **self.kwargs))
                            chunk = next(source) if advance is None else advance()
                    except StopIteration as end:
                        turn.settle(end.value, None)
                        break
                    except BaseException as raised:
                        if _ends_all(self.step, raised):
                            raise
                        turn.settle(None, raised)
                        break
                    self._saw(chunk)
                    try:
                        sent = yield chunk
                    except GeneratorExit:
                        with turn.here():
                            _close(source)
                        raise
                    except BaseException as thrown:
                        if not hasattr(source, "throw"):
                            raise
                        advance = partial(source.throw, thrown)
                    else:
                        advance = None if sent is None else partial(source.send, sent)
        except BaseException:
            self._abandoned()
            cancel()
            while isinstance(inbox.get(), Turn):
                pass
            raise
        return self._ended(turn.result())

    async def astream(self) -> AsyncGenerator[Any, Any]:
        inbox: asyncio.Queue[Turn | None] = asyncio.Queue()
        base = copy_context()
        engine = asyncio.get_running_loop().create_task(
            self._execute(hand_back(base, inbox.put_nowait)), context=base.copy()
        )
        engine.add_done_callback(lambda _: inbox.put_nowait(None))
        begun = _begun()
        try:
            while (turn := await inbox.get()) is not None:
                source: Any = None
                advance: Callable[[], Awaitable[Any]] | None = None
                while True:
                    try:
                        with turn.here():
                            if source is None:
                                source = aiter(self.func(*self.args, **self.kwargs))
                            chunk = await (source.__anext__() if advance is None else advance())
                    except StopAsyncIteration:
                        turn.settle(None, None)
                        break
                    except BaseException as raised:
                        if _ends_all(self.step, raised) or _is_cancelled(begun):
                            raise
                        turn.settle(None, raised)
                        break
                    self._saw(chunk)
                    try:
                        sent = yield chunk
                    except GeneratorExit:
                        with turn.here():
                            await _aclose(source)
                        raise
                    except BaseException as thrown:
                        if not hasattr(source, "athrow"):
                            raise
                        advance = partial(source.athrow, thrown)
                    else:
                        advance = None if sent is None else partial(source.asend, sent)
        except BaseException:
            self._abandoned()
            engine.cancel()
            await asyncio.wait([engine])
            if not engine.cancelled():
                engine.exception()  # Looked at: the caller is told to stop, and nothing else.
            raise
        self._ended(engine.result())

    def _saw(self, chunk: Any) -> None:
        self.count += 1
        if self._collects:
            if self.chunks is None:
                self.chunks = []
            self.chunks.append(chunk)

    def _abandoned(self) -> None:
        """Nobody reads the stream any further: what its parts say that it used is paid for all the same."""
        if self.count and self.step.usage is not None and self.execution is not None:
            try:
                response = self.step.usage(self._streamed(None))
                if response is not None:
                    self.execution.report_usage(response)
            except Exception:  # The part that has the usage did not come.
                self.run.ctx.run_logger.debug(
                    "step %r was abandoned before it said what it used", self.step.step_id
                )

    @property
    def _collects(self) -> bool:
        step = self.step
        return step.collect is not None or step.usage is not None or self._contract() is not None

    # ------------------------------------------------------------------ the engine around it

    def _contract(self) -> NodeContract[Any, Any] | None:
        return self.step.contract or self.run.ctx.registry.find(self.step.step_id)

    async def _execute(self, invoke: Invoke) -> BaseModel | Halt:
        """Run the call as an execution of the run's context: of its own, or inside the one that is under way here."""
        run, step = self.run, self.step
        await run.open(self)
        ctx = run.ctx
        parent = current_node()
        if parent is not None and parent.ctx is not ctx:
            parent = None
        halts = run.halts if parent is None else Inside.of(parent).halts
        contract, begun = self._contract(), _begun()
        given = given_to(step.given(self.args, self.kwargs), contract)
        position, branch, known_as = run.place(parent, step.step_id, given)
        if (refused := run.refusal(step.step_id)) is not None:
            halts.append((refused.failure.exception, refused))
            run.note(refused)
            return refused

        async def perform(_: BaseModel) -> Any:
            self.error, self.stopped = None, False
            execution = CURRENT.get()
            assert execution is not None
            self.execution = execution
            if (refused := run.refusal(step.step_id)) is not None:  # While it waited for another attempt.
                raise GroupStopped(refused)
            inside = Inside.of(execution)
            execution.enter(perf_counter_ns())
            try:
                value, error = await invoke()
            except BaseException as raised:
                value, error = None, raised
            finally:
                execution.leave(perf_counter_ns())
            if error is not None:
                return self._failed(execution, inside, error, contract, begun)
            self.value = value
            if self.count:
                value = self._streamed(value)
            return self._returned(execution, value, contract)

        place = Place(
            position,
            branch,
            parent=parent,
            contract=contract,
            step=known_as,
            cancelling=begun[1],
            # What is recorded of an output is what contracts see of it, and not the object that the caller needs.
            restores=False,
        )
        outcome = await execute(ctx, Node(step.step_id, perform, None, False, True, step.plan), given, place)
        if isinstance(outcome, Halt):
            halts.append((self._raised(outcome), outcome))
            run.note(outcome)
        return outcome

    def _streamed(self, value: Any) -> Any:
        if self.step.collect is not None:
            return self.step.collect(self.chunks or [])
        if self.chunks is not None:
            return self.chunks
        return {"chunks": self.count} if value is None else value

    def _returned(self, execution: NodeExecution, value: Any, contract: NodeContract[Any, Any] | None) -> Any:
        """The output for the engine, with what was used that nobody inside has counted."""
        output = made_by(self.step.made(value), contract)
        if self.step.usage is None:
            return output
        response = self.step.usage(value)
        if response is None:
            return output
        counted_in, counted_out = counted(execution.children or []) if self.step.includes else (0, 0)
        if not (counted_in or counted_out):
            return output, response
        used = response if isinstance(response, Usage) else usage_from(response)
        left_in, left_out = max(0, used.input_tokens - counted_in), max(0, used.output_tokens - counted_out)
        return (output, Usage(left_in, left_out, model=used.model)) if left_in or left_out else output

    def _failed(
        self,
        execution: NodeExecution,
        inside: Inside,
        error: BaseException,
        contract: NodeContract[Any, Any] | None,
        begun: Begun,
    ) -> Any:
        """What the engine is told of an exception: raises it, or what it means."""
        self.error = error
        ctx, step = execution.ctx, self.step
        control = None if step.control is None else step.control(error)
        where = NodeContext(execution.node_id, execution.attempt, ctx.run_id)
        if control is not None:
            self.stopped = True
            if control.outcome == "returned":
                return self._returned(execution, control.value, contract)
            said = str(control.value) if control.value else message_of(error)
            waits = control.outcome == "suspended"
            kind = FailureClass.RECOVERABLE if waits else FailureClass.TERMINAL
            if waits and not any(halt.suspended for _, halt in inside.halts):
                ctx.suspended.append(said)
            raise GroupStopped(Halt(_failure(error, kind, where, said), suspended=waits)) from error
        if isinstance(error, (HookNotAsync, PipelineChanged, CorruptCheckpoint, Undeclared)):
            self.stopped = True
            raise GroupStopped(
                Halt(_failure(error, FailureClass.TERMINAL, where, message_of(error)))
            ) from error
        # A cancellation that nobody has asked for is a failure like any other.
        if isinstance(error, Exception) or (
            isinstance_by_type(error, asyncio.CancelledError) and not _is_cancelled(begun)
        ):
            halt = halt_behind(error, inside.halts)
            # It was tried again where it happened: not once more at each level above, unless the config asks for that.
            if halt is not None and step.step_id not in ctx.step_policies:
                self.stopped = True
                terminal = halt.failure.failure_class is FailureClass.TERMINAL
                raise GroupStopped(
                    Halt(halt.failure, partial=halt.partial or not terminal, spent=halt.spent)
                ) from error
            if self.count or inside.handed_on or not step.again:
                # What was handed on cannot be taken back.
                self.stopped = True
                failure = diagnose(error, where, ctx.classifiers)
                terminal = failure.failure_class is FailureClass.TERMINAL
                raise GroupStopped(Halt(failure, partial=not terminal)) from error
        raise error

    # ------------------------------------------------------------------ what comes out

    def _raised(self, halt: Halt) -> BaseException:
        """What the caller gets: what the function raised, unless the engine has found something else."""
        if self.error is not None and (self.stopped or halt.failure.exception is self.error):
            return self.error
        found = halt.failure.exception
        if isinstance(self.error, StopIteration) and found.__cause__ is self.error:
            return self.error  # No coroutine can raise one.
        return found

    def _ended(self, outcome: BaseModel | Halt) -> Any:
        if isinstance(outcome, Halt):
            raise self._raised(outcome)
        if self.error is not None:  # Its way to return.
            raise self.error
        return self.value


def _failure(error: BaseException, kind: FailureClass, where: NodeContext, message: str) -> Failure:
    return Failure(error, kind, where.node_id, where.attempt, message)


def _ends_all(step: Step, error: BaseException) -> bool:
    """Return whether the caller itself is told to stop, by what is no Exception and means nothing to the framework."""
    if isinstance(error, (Exception, asyncio.CancelledError)):
        return False
    return step.control is None or step.control(error) is None


def _begun() -> Begun:
    task = asyncio.current_task()
    return task, 0 if task is None else task.cancelling()


def _is_cancelled(begun: Begun) -> bool:
    """Whether the running task is being cancelled; if something was begun in it, since then."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > (begun[1] if task is begun[0] else 0)


def _not_awaitable(step: Step, value: Any) -> Any:
    if isinstance(value, Awaitable):
        close = getattr(value, "close", None)
        if close is not None:
            close()
        raise Undeclared(
            f"step {step.step_id!r} looks like a plain function and returned a {type(value).__name__}; "
            "define it with `async def`, or mark it with inspect.markcoroutinefunction"
        )
    return value


def _close(source: Any) -> None:
    if hasattr(source, "close"):
        source.close()


async def _aclose(source: Any) -> None:
    if hasattr(source, "aclose"):
        await source.aclose()
