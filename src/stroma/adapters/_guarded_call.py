"""Guarded calls: their execution by the engine, their result for the caller, and functions that make them."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from queue import SimpleQueue
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from pydantic import BaseModel

from stroma._utils.access import message_of
from stroma.adapters._background_loop import Turn, hand_back, start_in_background
from stroma.adapters._state_views import given_to, made_by
from stroma.adapters._step import (
    CallTask,
    Control,
    ErrorAnswer,
    GuardedStep,
    InnerCalls,
    Invoke,
    Undeclared,
    aclose_stream,
    close_stream,
    current_task,
    emit_delta,
    find_halt,
    is_cancelled,
    not_awaitable,
    note_around,
    own_usage,
    stops_caller,
)
from stroma.checkpoint import CorruptCheckpoint, PipelineChanged
from stroma.contracts.contract import NodeContract
from stroma.contracts.node import Node, gives_coroutine, held_by
from stroma.cost.usage import UsageError
from stroma.engine.diagnosis import states_around
from stroma.engine.effects import UnknownOutcome
from stroma.engine.execution import CURRENT, RunningNode
from stroma.engine.loop import execute
from stroma.engine.outcome import GroupStopped, Halt, Place
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure, NodeContext, isinstance_by_type
from stroma.hooks.dispatch import HookNotAsync
from stroma.telemetry.messages import note_request

if TYPE_CHECKING:
    from stroma.adapters._guarded_run import GuardedRun


class Call:
    """One call of a guarded callable. Create it and use one of the four methods, once."""

    __slots__ = (
        "args",
        "around",
        "chunks",
        "count",
        "error",
        "execution",
        "func",
        "has_answer",
        "is_counted",
        "kwargs",
        "raises_own_error",
        "run",
        "step",
        "value",
    )

    def __init__(
        self,
        run: GuardedRun,
        step: GuardedStep,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.run, self.step, self.func, self.args, self.kwargs = run, step, func, args, kwargs
        #: Result and exception of the function in the last attempt.
        self.value: Any = None
        self.error: BaseException | None = None
        #: The caller gets `error`, or `value`, even if the engine records another failure.
        self.raises_own_error = self.has_answer = False
        self.chunks: list[Any] | None = None
        self.count = 0
        #: The usage in `chunks`, those of the present attempt, is counted.
        self.is_counted = False
        self.execution: RunningNode | None = None
        #: The node of another run that makes this call.
        self.around: RunningNode | None = None

    # ------------------------------------------------------------------ kinds of callables

    async def acall(self) -> Any:
        func, args, kwargs = self.func, self.args, self.kwargs

        async def invoke() -> tuple[Any, BaseException | None]:
            return await func(*args, **kwargs), None

        return self._return(await self._execute(invoke))

    def call(self) -> Any:
        with self._in_background() as inbox:
            while isinstance(turn := inbox.get(), Turn):
                error = None
                try:
                    with turn.calling():
                        self.value = not_awaitable(self.step, self.func(*self.args, **self.kwargs))
                except BaseException as raised:
                    if stops_caller(self.step, raised):
                        raise
                    error = raised
                turn.settle(self.value, error)
                error = None  # It references this frame: otherwise a reference cycle.
        return self._return(turn.result())

    @contextmanager
    def _in_background(self) -> Iterator[SimpleQueue[Turn | asyncio.Task[Any]]]:
        """Run the engine in the background. Yields a queue: the calls that it asks for, then its task."""
        inbox: SimpleQueue[Turn | asyncio.Task[Any]] = SimpleQueue()
        base = copy_context()
        engine = self._execute(hand_back(base, inbox.put))
        cancel = start_in_background(engine, base.copy(), inbox.put)
        try:
            yield inbox
        except BaseException:  # The caller is being stopped: the attempt ends as cancelled.
            cancel()
            while isinstance(inbox.get(), Turn):
                pass
            raise

    def stream(self) -> Generator[Any, Any, Any]:
        with self._in_background() as inbox:
            while isinstance(turn := inbox.get(), Turn):
                source: Any = None
                sent: Any = None
                while True:
                    try:
                        with turn.calling():
                            if source is None:
                                source = iter(self.func(*self.args, **self.kwargs))
                            chunk = next(source) if sent is None else source.send(sent)
                    except StopIteration as end:
                        turn.settle(end.value, None)
                        break
                    except BaseException as raised:
                        if stops_caller(self.step, raised):
                            raise
                        if turn.is_over:
                            close_stream(source)
                        turn.settle(None, raised)
                        break
                    self._count_chunk(chunk)
                    try:
                        sent = yield chunk
                    except BaseException:
                        with turn.here():
                            close_stream(source)
                        raise
        return self._return(turn.result())

    async def astream(self) -> AsyncGenerator[Any, Any]:
        inbox: asyncio.Queue[Turn | None] = asyncio.Queue()
        base = copy_context()
        engine = asyncio.get_running_loop().create_task(
            self._execute(hand_back(base, inbox.put_nowait)), context=base.copy()
        )
        engine.add_done_callback(lambda _: inbox.put_nowait(None))
        entry = current_task()
        try:
            while (turn := await inbox.get()) is not None:
                source: Any = None
                advance: Callable[[], Awaitable[Any]] | None = None
                while True:
                    try:
                        async with turn.acalling():
                            if source is None:
                                source = aiter(self.func(*self.args, **self.kwargs))
                            chunk = await (source.__anext__() if advance is None else advance())
                    except StopAsyncIteration:
                        turn.settle(None, None)
                        break
                    except BaseException as raised:
                        if stops_caller(self.step, raised) or (
                            isinstance_by_type(raised, asyncio.CancelledError) and is_cancelled(entry)
                        ):
                            raise
                        if turn.is_over:
                            await aclose_stream(source)
                        turn.settle(None, raised)
                        break
                    self._count_chunk(chunk)
                    try:
                        sent = yield chunk
                    except GeneratorExit:
                        with turn.here():
                            await aclose_stream(source)
                        raise
                    except BaseException as thrown:
                        if not hasattr(source, "athrow"):
                            raise
                        advance = functools.partial(source.athrow, thrown)
                    else:
                        advance = None if sent is None else functools.partial(source.asend, sent)
        except BaseException:
            engine.cancel()
            await asyncio.wait([engine])
            if not engine.cancelled():
                engine.exception()  # Retrieved, so that asyncio does not log it.
            raise
        self._return(engine.result())

    def _count_chunk(self, chunk: Any) -> None:
        self.count += 1
        if self.step.delta is not None and self.execution is not None:
            emit_delta(self.execution, self._view("delta", self.step.delta, chunk))
        if self._collects:
            if self.chunks is None:
                self.chunks = []
            self.chunks.append(chunk)

    def _count_unfinished(self) -> None:
        """Count the usage of a stream that fails or is not read to its end, or of a call that ends too late.

        Once, and never raises.
        """
        step, execution = self.step, self.execution
        has_result = self.count or self.value is not None
        if not has_result or step.usage is None or execution is None or self.is_counted:
            return
        self.is_counted = True
        try:
            result = self.value
            if self.count:
                result = step.collect(self.chunks or []) if step.collect else self.chunks or []
            response = own_usage(step, step.usage(result), execution)
            if response is not None:
                execution.report_usage(response)
        except Exception:  # The chunk with the usage was not read.
            self.run.ctx.run_logger.debug("step %r ended before it reported its usage", step.step_id)

    @property
    def _collects(self) -> bool:
        step = self.step
        return step.collect is not None or step.usage is not None or self._contract() is not None

    # ------------------------------------------------------------------ the engine around it

    def _contract(self) -> NodeContract[Any, Any] | None:
        return self.step.contract or self.run.ctx.registry.find(self.step.step_id)

    async def _execute(self, invoke: Invoke) -> BaseModel | Halt:
        """Execute the call in the run's context, as a child of the current execution if it is of this run."""
        run, step = self.run, self.step
        await run.open(self)
        ctx = run.ctx
        parent = CURRENT.get()
        if parent is not None and parent.ctx is not ctx:
            self.around, parent = parent, None
        halts = run.halts if parent is None else InnerCalls.of(parent).halts
        contract, entry = self._contract(), current_task()
        state = given_to(self.seen_input(), contract)
        position, branch, step_call = run.place(parent, step.step_id, state)
        if (refusal := run.refusal(step.step_id) or run.unknown_effects.get(step.step_id)) is not None:
            halts.append((refusal.failure.exception, refusal))
            run.note(refusal)
            return refusal

        perform = functools.partial(self._perform, invoke, contract, entry)
        place = Place(
            position,
            branch,
            parent=parent,
            contract=contract,
            step=step_call,
            cancelling=entry[1],
            # The journal records the view of the output, not the object that the caller needs.
            restores=False,
            role=step.role,
            is_called=True,
        )
        outcome = await execute(ctx, Node(step.step_id, perform, None, False, True, step.plan), state, place)
        if isinstance(outcome, Halt):
            halts.append((self._error_for_caller(outcome), outcome))
            run.note(outcome)
            if isinstance(outcome.failure.exception, UnknownOutcome):
                run.unknown_effects[step.step_id] = outcome
        elif contract is not None and contract.effect:
            self._take_stated(outcome)
        return outcome

    async def _perform(
        self, invoke: Invoke, contract: NodeContract[Any, Any] | None, entry: CallTask, _: BaseModel
    ) -> Any:
        """Make one call, as the function of the node that the engine executes."""
        run, step_id = self.run, self.step.step_id
        self.value, self.error, self.raises_own_error, self.has_answer = None, None, False, False
        self.chunks, self.is_counted = None, False
        execution = CURRENT.get()
        assert execution is not None
        self.execution = execution
        if self.step.messages is not None:
            note_request(execution, self._view("messages", self.step.messages, self.args, self.kwargs))
        if self.around is not None:
            note_around(execution, self.around)
        refusal = run.refusal(step_id)
        if refusal is not None:  # It was cancelled while it waited for another attempt.
            raise GroupStopped(refusal)
        inner = InnerCalls.of(execution)
        execution.enter(perf_counter_ns())
        try:
            value, error = await invoke()
        except BaseException as raised:
            value, error = None, raised
        finally:
            execution.leave(perf_counter_ns())
        if error is not None:
            return self._handle_error(execution, inner, error, contract, entry)
        self.value = value
        if self.count:
            value = self._stream_result(value)
        meaning = None if self.step.judge is None else self._view("judge", self.step.judge, value)
        if meaning is not None:
            self.has_answer = True
            self._stop(execution, inner, meaning, ErrorAnswer(meaning.value))
        return self._output_of(execution, value, contract)

    def _take_stated(self, output: BaseModel) -> None:
        """Let the caller have the output of an effect that was stated or recorded, not a call's result."""
        execution = self.execution
        if execution is None or (execution.effect is not None and execution.effect.is_stated):
            self.value, self.error = held_by(output), None

    def seen_input(self) -> Any:
        """Return what contracts, hooks and the journal see of the arguments."""
        return self._view("input", self.step.input_view, self.args, self.kwargs)

    def _view(self, what: str, view: Callable[..., Any], *seen: Any) -> Any:
        """Return what a view shows. One that raises is logged and shows None, which a contract may refuse."""
        try:
            return view(*seen)
        except UsageError:  # The engine has rules for these.
            raise
        except Exception as error:
            ctx = self.run.ctx
            ctx.run_logger.warning(
                "the %s view of step %r raised %s; the step is not affected, and the view shows None",
                what,
                self.step.step_id,
                type(error).__name__,
                exc_info=ctx.redactor.mask_error(error),
            )
            return None

    def _stream_result(self, value: Any) -> Any:
        if self.step.collect is not None:
            return self._view("result", self.step.collect, self.chunks or [])
        if self.chunks is not None:
            return self.chunks
        return {"chunks": self.count} if value is None else value

    def _output_of(self, execution: RunningNode, value: Any, contract: NodeContract[Any, Any] | None) -> Any:
        """Return the output for the engine, with the usage that inner calls have not counted."""
        output = made_by(self._view("output", self.step.output_view, value), contract)
        if self.step.messages is not None:
            execution.note_response(value)
        if self.step.usage is None:
            return output
        self.is_counted = True
        response = own_usage(self.step, self._view("usage", self.step.usage, value), execution)
        return output if response is None else (output, response)

    def _handle_error(
        self,
        execution: RunningNode,
        inner: InnerCalls,
        error: BaseException,
        contract: NodeContract[Any, Any] | None,
        entry: CallTask,
    ) -> Any:
        """Raise an exception of the function for the engine, as its meaning requires."""
        self.error = error
        ctx, step = execution.ctx, self.step
        control = None if step.control is None else self._view("control", step.control, error)
        if control is not None:
            self.raises_own_error = True
            if control.outcome == "returned":
                return self._output_of(execution, control.value, contract)
            self._stop(execution, inner, control, error)
        self._count_unfinished()
        where = NodeContext(execution.node_id, execution.attempt, ctx.run_id)
        if isinstance(error, (HookNotAsync, PipelineChanged, CorruptCheckpoint, Undeclared)):
            self.raises_own_error = True
            failure = Failure(error, FailureClass.TERMINAL, where.node_id, where.attempt, message_of(error))
            raise GroupStopped(Halt(failure)) from error
        # A CancelledError without a cancellation of the task is a failure like any other.
        if isinstance(error, Exception) or (
            isinstance_by_type(error, asyncio.CancelledError) and not is_cancelled(entry)
        ):
            halt = find_halt(error, inner.halts)
            # It was retried where it happened: not again at each level above, unless the config says so.
            # A question is never asked again for that.
            if halt is not None and (halt.suspended or step.step_id not in ctx.step_policies):
                self.raises_own_error = True
                terminal = halt.failure.failure_class is FailureClass.TERMINAL
                raise GroupStopped(
                    halt._replace(output=None, partial=halt.partial or not terminal)
                ) from error
            if self.count or inner.is_published or not step.can_retry:
                # The caller has received a part of the result already.
                self.raises_own_error = True
                failure = ctx.diagnose(error, where.node_id, where.attempt)
                terminal = failure.failure_class is FailureClass.TERMINAL
                raise GroupStopped(Halt(failure, partial=not terminal)) from error
        # A time limit ended it.
        execution.is_final = bool(self.count) or inner.is_published or not step.can_retry
        raise error

    def _stop(
        self, execution: RunningNode, inner: InnerCalls, meaning: Control, error: BaseException
    ) -> NoReturn:
        """End the step by an exception, or a result, that is control flow of the framework."""
        self._count_unfinished()
        ctx, is_suspended = execution.ctx, meaning.outcome == "suspended"
        message = str(meaning.value) if meaning.value else message_of(error)
        kind = FailureClass.RECOVERABLE if is_suspended else FailureClass.TERMINAL
        redact = ctx.redactor.redact_question if is_suspended else ctx.redactor.redact_message
        message = redact(message, states_around(execution, execution.input_snapshot))
        if is_suspended and not any(halt.suspended for _, halt in inner.halts):
            ctx.account.note_suspended(message)
        failure = Failure(error, kind, execution.node_id, execution.attempt, message)
        raise GroupStopped(Halt(failure, suspended=is_suspended)) from error

    # ------------------------------------------------------------------ result for the caller

    def _error_for_caller(self, halt: Halt) -> BaseException:
        """Return the exception for the caller: that of the function, unless the engine has another one."""
        if self.error is not None and (self.raises_own_error or halt.failure.exception is self.error):
            return self.error
        error = halt.failure.exception
        if isinstance(self.error, StopIteration) and error.__cause__ is self.error:
            return self.error  # A coroutine cannot raise StopIteration itself.
        return error

    def _return(self, outcome: BaseModel | Halt) -> Any:
        if isinstance(outcome, Halt) and not self.has_answer:
            raise self._error_for_caller(outcome)
        if self.error is not None:  # An exception by which the framework returns.
            raise self.error
        return self.value


# ---------------------------------------------------------------------- functions that call others as steps

#: How a callable is called: as a function, a coroutine function, a generator function or an async one.
Kind: TypeAlias = Literal["call", "acall", "stream", "astream"]


def wrapped(
    current: Callable[[], GuardedRun], step: GuardedStep, func: Callable[..., Any], kind: Kind | None
) -> Callable[..., Any]:
    """Return a function that calls another one as a step of the current run, as that one is called.

    ``kind`` states how, where inspection cannot tell.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return Call(current(), step, func, args, kwargs).call()

    async def acall(*args: Any, **kwargs: Any) -> Any:
        return await Call(current(), step, func, args, kwargs).acall()

    def stream(*args: Any, **kwargs: Any) -> Any:
        return (yield from Call(current(), step, func, args, kwargs).stream())

    async def astream(*args: Any, **kwargs: Any) -> Any:
        # The async form of `yield from`.
        parts = Call(current(), step, func, args, kwargs).astream()
        advance: Callable[[], Any] = parts.__anext__
        while True:
            try:
                chunk = await advance()
            except StopAsyncIteration:
                return
            try:
                advance = functools.partial(parts.asend, (yield chunk))
            except GeneratorExit:
                await parts.aclose()
                raise
            except BaseException as thrown:
                advance = functools.partial(parts.athrow, thrown)

    wrappers: dict[Kind, Callable[..., Any]]
    wrappers = {"call": call, "acall": acall, "stream": stream, "astream": astream}
    return wrappers[kind or _kind_of(func)]


def _kind_of(func: Callable[..., Any]) -> Kind:
    while isinstance(func, functools.partial):
        func = func.func
    for candidate in (func, getattr(func, "__call__", None)):  # noqa: B004
        if inspect.isasyncgenfunction(candidate):
            return "astream"
        if inspect.isgeneratorfunction(candidate):
            return "stream"
    return "acall" if gives_coroutine(func) else "call"
