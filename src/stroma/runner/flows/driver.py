"""The driver of a flow: makes the calls of its body, and delivers their ends in the order of their records.

The body runs on a :class:`BodyLoop`, from one event to the next. A call begins once the body waits for it and
everything that is recorded has been delivered. What ends the flow whatever its body does (a crossed budget, a
suspension, a changed body) stops the body at once.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Coroutine
from functools import partial
from time import monotonic
from typing import Any, Final, cast

from stroma.checkpoint import PipelineChanged, StoreError
from stroma.contracts.codec import describe_difference
from stroma.contracts.node import FlowNode, Node
from stroma.engine.context import ReliabilityContext
from stroma.engine.effects import effect_calls, note_input
from stroma.engine.execution import CURRENT, RunningNode
from stroma.engine.outcome import STOPPED, Halt
from stroma.engine.tasks import cancel_all, raise_if
from stroma.hooks.dispatch import HookNotAsync
from stroma.runner.flows.body_loop import BodyLoop
from stroma.runner.flows.call import FlowCall
from stroma.runner.flows.endings import FlowClosed, StepFailed, describe, end_of
from stroma.runner.flows.journal import (
    REPLAY_ONLY,
    Event,
    FlowJournal,
    input_schema,
    message_of,
    read_failure,
)
from stroma.runner.flows.suspension import FlowWaits, now_ms

#: How often a body that does not end is cancelled.
_MAX_CANCELLATIONS: Final = 100
#: An event loop may not take longer timers than a day.
_MAX_TIMER_SECONDS: Final = 3600.0


class FlowDriver(FlowWaits):
    """One flow of a run, with the flows inside it."""

    def __init__(self, ctx: ReliabilityContext, journal: FlowJournal, flow_id: str, position: int) -> None:
        self.outer = asyncio.get_running_loop()
        loop = BodyLoop(self.outer, lambda: self.time_ms() / 1000)
        super().__init__(ctx, journal, flow_id, position, loop)
        self._look_for_records()
        self.closing = False  # The body is being cancelled: further calls raise FlowClosed.
        self.is_over = False
        self.has_siblings = False  # Steps ran side by side.
        self.is_live = False  # Everything that is recorded has been delivered.
        self.called_at = 0  # Number of the last event that the body had noticed at its last call.
        self.execution: RunningNode | None = None  # Of the outermost flow.
        self.context = contextvars.copy_context()  # The variables with which the body begins.
        self.context.run(CURRENT.set, None)
        self._latest_ms = max(self.records.times.values(), default=0)
        self._replay_only = REPLAY_ONLY.get()
        self._main: asyncio.Task[Any] | None = None
        self._task = asyncio.current_task()
        self._cancelling = 0 if self._task is None else self._task.cancelling()
        #: Calls that the body waits for and that have not begun, and those at work.
        self._requested: dict[str, FlowCall] = {}
        self._running: dict[asyncio.Task[Any], FlowCall] = {}
        self._replayed: set[str] = set()  # Branches of the calls in the replay.
        self._withdrawn: list[FlowCall] = []  # Questions that the body gave up in the replay.
        #: Effects that the body gave up; a next call with the same input takes the outcome.
        self._given_up: list[FlowCall] = []
        #: See EffectCalls.
        self._body_calls = effect_calls(ctx).of_bodies[position] = {}

    def _look_for_records(self) -> None:
        """Note if calls may have an earlier record, and if their inputs are stored or compared."""
        records = self.records
        self.is_recorded = bool(records.events or records.loose or records.calls or records.unknown)
        self.needs_input = self.ctx.session.stores_inputs or self.is_recorded

    # ------------------------------------------------------------------ time

    def time_ms(self) -> int:
        """Return the time of the body in ms since the epoch: that of the last event, the same on replay."""
        times, number = self.records.times, self.woken_by
        time_ms = times.get(number)
        if time_ms is None:
            time_ms = times[number] = self._latest_ms = max(now_ms(), self._latest_ms)
            self.journal.note_time(self.position, number, time_ms)
        return time_ms

    # ------------------------------------------------------------------ calls, in the body

    async def request(self, call: FlowCall) -> Any:
        """Wait for the end of a call, and return its output. Raises StepFailed, FlowClosed."""
        if self.closing or self.is_over or call.scope.is_over:
            raise FlowClosed(f"{describe(call.branch)} was awaited after flow {self.flow_id!r} had ended")
        if self.stopping is not None:
            await self.loop.create_future()
        call.requested_at = self.woken_by
        self.ctx.redactor.note_seen(call.state)
        self.calls[call.branch] = call
        if call.topic is not None:
            self.look_at = 0.0
        else:
            self._requested[call.branch] = call
        if type(call.node) is not FlowNode:  # Code of a body calls no effects.
            self._body_calls[call.branch] = False
        if not self.is_live:
            self._replayed.add(call.branch)
        future = call.future = asyncio.Future(loop=self.loop)
        call.context = contextvars.copy_context()
        try:
            call.outcome = await future
        except asyncio.CancelledError:
            self._give_up(call)
            raise
        if type(call.outcome) is StepFailed:
            self._body_calls.pop(call.branch, None)
        elif call.branch in self._body_calls:
            self._body_calls[call.branch] = True
            if call.source:
                self._body_calls[call.source] = True
        return call.take()

    def _give_up(self, call: FlowCall) -> None:
        """Note that the body waits for a call no more. Only an effect runs to its end."""
        call.future = None
        self._body_calls.pop(call.branch, None)
        if self.closing:
            return
        self._requested.pop(call.branch, None)
        # Calls begin before the next event: live and on replay, this one has begun if there was one since.
        has_begun = call.requested_at != self.woken_by
        if call.question is None or not has_begun:
            if call.source:
                self.records.put_back(call.source)
            self._note_given_up(call)
            self.calls.pop(call.branch, None)
            call.give_up()
            self._withdraw_asked(call)
        elif not self.is_live:
            self.calls.pop(call.branch, None)
            self._withdrawn.append(call)
        elif call.task is None:
            self.calls.pop(call.branch, None)
            self._withdraw(call)

    def _note_given_up(self, call: FlowCall) -> None:
        """Note a call that the body gave up, if it is one of an effect."""
        if call.is_effect():
            self._given_up.append(call)
            note_input(self.ctx, (self.position, call.branch), cast("Node", call.node), call.state)

    def _withdraw(self, call: FlowCall) -> None:
        question, call.question = call.question, None
        assert question is not None
        self._start(call, self.withdraw(question))

    def _withdraw_asked(self, call: FlowCall) -> None:
        """Withdraw the questions that nodes inside a call have asked: the body gave the call up."""
        inside = f"{call.branch}."
        questions = [
            one
            for one in self.ctx.session.waiting.values()
            if one.position == self.position
            and (one.branch == call.branch or one.branch.startswith(inside))
            and one.effect is None
            and one.payload is None
        ]
        if not questions or self.stopping is not None:
            return
        if not self.is_live:
            self._withdrawn.append(call)
        elif call.task is None:
            for question in questions:
                self.ctx.account.forget_question(question)
            self._start(call, self.withdraw(*questions))

    # ------------------------------------------------------------------ calls, in the real event loop

    def _start(self, call: FlowCall, work: Coroutine[Any, Any, Any]) -> None:
        # Without a task factory: an eager one would begin the work in the loop of the body, which withdraws
        # questions.
        task = call.task = asyncio.Task(work, loop=self.outer, context=call.context)
        self._running[task] = call
        self.has_siblings |= len(self._running) > 1
        task.add_done_callback(self._end)

    def _begin_requested(self) -> Coroutine[Any, Any, Any] | None:
        """Begin the calls that the body waits for. Return the work of one alone: a task takes 5 us."""
        requested, self._requested = self._requested, {}
        first = next(iter(requested.values()))
        if self.ctx.stopping.is_asked:
            self.stop(STOPPED)
        elif self._replay_only is not None:
            new = next((branch for branch in requested if branch not in self._replay_only), None)
            if new is None:
                self.stop(STOPPED)
            else:
                self.stop_as_changed(f"makes {describe(new)}, which is not recorded")
        elif len(self.calls) == 1 and self._is_alone(first):
            return self._perform_alone(first)
        else:
            for call in requested.values():
                self._start(call, self._restore_or_perform(call) if self.is_recorded else call.perform())
        return None

    def _is_alone(self, call: FlowCall) -> bool:
        """Return True if nothing else of the flow can happen before the end of a call."""
        is_other_at_work = self._running or self.numbers or self.loop.next_time is not None
        if is_other_at_work or call.question is not None or self.is_recorded or self.journal.has_new_values:
            return False
        try:
            return call.context == self.context
        except Exception:  # The body has set variables whose values cannot be compared.
            return False

    async def _perform_alone(self, call: FlowCall) -> None:
        """Perform calls in this task and deliver their ends, for as long as each is alone."""
        task = self._task
        try:
            while True:
                if task is not None and task.cancelling() != self._cancelling:
                    # A cancellation is on its way, and this lets it in; or a node has left one behind.
                    await asyncio.sleep(0)
                    self._cancelling = task.cancelling()
                outcome = await call.perform(self._cancelling)
                if type(outcome) is Halt or self.stopping is not None:
                    return self.finish(call, outcome)
                # Its number is the only one.
                call.end = outcome
                self._deliver(self.number_of.pop(call.branch), call)
                self.numbers.clear()
                requested = self._requested
                if len(requested) != 1 or self.stopping is not None or self.ctx.stopping.is_asked:
                    return None
                (call,) = requested.values()
                if len(self.calls) != 1 or not self._is_alone(call):
                    return None
                requested.clear()
        except (HookNotAsync, PipelineChanged, StoreError) as error:  # What leaves a run.
            self.stop(end_of(error, call.node))
        finally:
            CURRENT.set(None)

    async def _restore_or_perform(self, call: FlowCall) -> Any:
        call.source = call.take_output(self.records)
        if call.source:
            outcome = await call.restore()
            if outcome is not None:
                return outcome
            call.source = ""
        return await call.perform()

    def _end(self, task: asyncio.Task[Any]) -> None:
        """Take the end of a task."""
        call = self._running.pop(task)
        call.task = None
        if task.cancelled():
            number = self.number_of.get(call.branch)
            if not call.is_cancelled:  # Not by the body: the process is being stopped.
                self.stop(asyncio.CancelledError())
            elif number is not None:  # Its output was still committed.
                self.stored[number] = call
            elif call.settles:  # It did not happen.
                self._given_up.remove(call)
            else:
                self._withdraw_asked(call)
            call.is_cancelled = False
        elif (error := task.exception()) is not None:
            self.stop(end_of(error, call.node))
        else:
            self.finish(call, task.result())
        self.wake()

    def finish(self, call: FlowCall, outcome: Any) -> None:
        if self.stopping is not None:
            return
        number = self.number_of.get(call.branch)
        if number is not None and type(outcome) is not Halt:  # It is stored with its commit.
            call.end, self.stored[number] = outcome, call
        elif call.question is not None and call.future is None:  # The body has given it up meanwhile.
            self.calls.pop(call.branch, None)
            self._withdraw(call)
        elif type(outcome) is Halt:
            self._halt(call, outcome)
        elif outcome is not None and (call.future is not None or not call.source):
            call.end, number = outcome, self.number(call.branch)
            self.journal.note_event(self.position, Event(number, call.branch, source=call.source))
            self.unstored[number] = call
        elif call.question is not None:
            call.suspended = call.question.reason

    def _halt(self, call: FlowCall, halt: Halt) -> None:
        if halt.suspended and not self.ctx.stopping.is_paused:
            call.suspended = halt.failure.message
            if call.future is None:
                self._withdraw_asked(call)
        elif halt.suspended:
            self.stop(STOPPED)
        elif halt.spent or halt.partial:
            self.stop(halt)
        elif call.future is not None:
            number = self.number(call.branch)
            call.end = self.failed(call, halt.failure, number)
            self.journal.note_failure(self.position, number, call.branch, halt.failure, call.input_key)
            self.unstored[number] = call

    # ------------------------------------------------------------------ events

    def _turn(self, number: int) -> None:
        """Run the body until it waits, after an event."""
        self.woken_by = self.ctx.journal.noticed = number
        try:
            self.loop.run_ready(self._task)
        except RuntimeError as error:
            self.stop(self.endings.mistake(str(error), self.flow_id))

    def _deliver(self, number: int, what: FlowCall | int) -> None:
        """Deliver an event to the body: a time in ms, or the end of a call that it waits for."""
        if (
            self.ctx.account.limits
            and self.ctx.budget.max_latency_ms is not None
            and self.execution is not None
        ):
            # With the next record, for a process that takes over.
            self.journal.note_busy(self.position, self.execution.busy_ns)
        if isinstance(what, int):
            self.records.times[number] = self._latest_ms = what
            self.loop.end_timers(what)
            self._turn(number)
        else:
            self.calls.pop(what.branch, None)
            what.suspended, what.outcome, future = None, what.end, what.future
            if what.topic is not None:
                self.receiving.discard(what.topic)
                self.look_at = 0.0
            if future is not None and not future.done():
                future.set_result(what.end)
                self._turn(number)
            elif what.message is not None:
                self.journal.free_message(self.position, what.branch, what.message)

    def _deliver_next(self) -> bool:
        """Deliver the next event, if it is stored."""
        if self.numbers[0] not in self.stored:
            return False
        number = self.numbers.popleft()
        what = self.stored.pop(number)
        if isinstance(what, FlowCall):
            self.number_of.pop(what.branch, None)
        self._deliver(number, what)
        return True

    def _is_due(self) -> bool:
        """Return True if timers end now. Not while a question is opened: it may have its answer already."""
        due = self.loop.next_time
        if due is None or due * 1000 > now_ms():
            return False
        return all(call.question is None for call in self._running.values())

    async def _end_timers(self) -> None:
        """End the timers that are due, unless an answer or a message came first."""
        assert self.loop.next_time is not None
        now = max(now_ms(), math.ceil(self.loop.next_time * 1000))
        if not await self.take_messages() and not await self.take_answers(closing=now):
            number = self.number("")
            self.journal.note_event(self.position, Event(number, time_ms=now))
            self.unstored[number] = now

    # ------------------------------------------------------------------ replay

    async def _replay(self) -> None:
        """Deliver what is recorded."""
        self._compare_suspension()
        for event in self.records.events:
            if self.stopping is not None:
                return
            call = self.calls.get(event.branch)
            if call is not None:
                self._requested.pop(event.branch, None)
                call.end = await self._read(call, event)
            elif event.branch and event.branch not in self._replayed:
                self.stop_as_changed(f"does not make {describe(event.branch)}, which is recorded")
            elif event.received is not None:  # The process died before it has freed the message.
                self.journal.free_message(self.position, event.branch, message_of(event.received))
            elif event.source:  # The body gave the call up before it received this output.
                self.records.put_back(event.source)
            if self.stopping is None and (call is not None or not event.branch):
                self._deliver(event.number, event.time_ms if call is None else call)
                self._compare_suspension()
        for branch in self.records.unknown:
            self.stop_as_changed(f"does not make {describe(branch)}, an effect whose outcome is unknown")
        self.is_live = self.stopping is None
        self.records.events, self.records.calls = [], {}
        self._look_for_records()
        self._replayed.clear()
        for call in self._withdrawn:
            if call.question is None:
                self._withdraw_asked(call)
                continue
            known = self.ctx.session.waiting.get((self.position, call.branch))
            if known is not None and known.payload is None:
                self._withdraw(call)

    def _compare_suspension(self) -> None:
        """End a flow that waits for other calls than those for which the run was suspended.

        A body that has ended is closed first, as before the run was suspended.
        """
        if self.is_finished and not self.closing:
            self._close()
        suspended = self.records.suspended
        if suspended is None or suspended[0] != self.woken_by or self.stopping is not None:
            return
        now, before = self.open_branches(), suspended[1]
        if other := next((one for one in now if one not in before), None):
            self.stop_as_changed(f"makes {describe(other)} now, where it waited before")
        elif missing := next((one for one in before if one not in now), None):
            self.stop_as_changed(f"does not make {describe(missing)}, for which it waited before")

    async def _read(self, call: FlowCall, event: Event) -> Any:
        """Return the recorded end of a call. Ends the flow if its input has changed."""
        before, now = self.journal.input_key_of(self.position, event), call.input_key
        if before is not None and now is not None and before != now:
            renewed = input_schema(self.ctx, call.node, call.state).renew_key(before)
            # An input that could not be compared was no obstacle to take the output.
            if renewed != now and (renewed is not None or not event.source):
                makes = f"makes {describe(call.branch)} with {describe_difference(before, now)}"
                return self.stop_as_changed(makes, inputs=(before, now))
        if event.failure is not None:
            return self.failed(call, read_failure(event.failure), event.number)
        if event.received is not None:
            self.take_message(call, message_of(event.received), event.received.problem, event.number)
            return call.end
        try:
            call.source = event.source
            outcome = await call.restore()
            if outcome is None:
                # A group whose schema has changed is assembled again, of children that are restored; and a
                # replay of the test kit has the recorded attempts alone.
                self.number_of[call.branch] = event.number
                outcome = await call.perform()
                del self.number_of[call.branch]
                if type(outcome) is Halt:
                    if outcome.spent or outcome.partial or outcome.suspended:
                        return self.stop(outcome)
                    return self.failed(call, outcome.failure, event.number)
        except (HookNotAsync, PipelineChanged, StoreError) as error:
            return self.stop(end_of(error, call.node))
        self.journal.forget_output(self.position, call.branch)
        return outcome

    def stop_as_changed(
        self, message: str, flow_id: str | None = None, *, inputs: tuple[bytes, bytes] | None = None
    ) -> None:
        """End a flow whose body does not do what is recorded. ``inputs``: see PipelineChanged."""
        body = self._main
        if body is not None and body.done() and not body.cancelled() and (error := body.exception()):
            message = f"raised {self.endings.halt(error, self.flow_id).failure}, and {message}"
        self.stop(self.endings.changed(f"flow {(flow_id or self.flow_id)!r} {message}", self.flow_id, inputs))

    # ------------------------------------------------------------------ from the start to the end

    @property
    def is_finished(self) -> bool:
        """True once the body has returned or raised."""
        return self._main is not None and self._main.done()

    async def run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a body to its end, or to ``stopping``, and return its task. Raises what leaves the run."""
        ctx, stop = self.ctx, partial(self.stop, STOPPED)
        ctx.journal.number_event, ctx.stopping.waits[stop] = self.number, None
        cancelled: asyncio.CancelledError | None = None
        self._main = self.loop.create_task(work, context=self.context.copy())
        try:
            self._turn(0)
            await self._replay()
            await self._run_live()
        finally:
            ctx.stopping.waits.pop(stop, None)
            self.closing = True
            if asyncio._get_running_loop() is self.outer:
                try:
                    await cancel_all(list(self._running))
                except asyncio.CancelledError as error:
                    cancelled = error.with_traceback(None)
                self._end_body()
            self.loop.discard()
            self.is_over, ctx.journal.number_event = True, None
        if self.is_finished and not self._main.cancelled():
            self._main.exception()  # Also if the run is suspended: asyncio reports one that nobody has read.
        raise_if(cancelled)
        if isinstance(self.stopping, BaseException):
            raise self.stopping
        return self._main

    async def _run_live(self) -> None:
        """Make calls and deliver events until the body has ended, or is to end."""
        while self.stopping is None:
            if self.is_finished and not self.closing:
                self._close()  # Before the next event, as on replay.
            elif self.unstored or self.journal.has_new_values:
                await self.store_events()  # Before a call gets a value that a resume must return again.
            elif self._requested and not self.is_finished:
                if (alone := self._begin_requested()) is not None:
                    await alone
            elif self.stored and self._deliver_next():
                continue
            elif self.is_finished:
                if await self._finish_effects():
                    return
            elif self._is_due() and not self.stored:  # Else an event before these is still being stored.
                await self._end_timers()
            elif self._running and self.look_at <= monotonic():
                await self.take_messages()
            elif self._running:
                await self._until_woken(self.look_at - monotonic())
            elif (seconds := await self.settle()) is not None:
                await self._until_woken(seconds)
        while self._running and not isinstance(self.stopping, BaseException):
            await self._until_woken()  # What is at work is committed first.

    async def _until_woken(self, seconds: float = math.inf) -> None:
        due, self.waker = self.loop.next_time, self.outer.create_future()
        if due is not None and not self.stored:
            seconds = min(seconds, max(0.0, due - now_ms() / 1000), _MAX_TIMER_SECONDS)
        timer = None if seconds == math.inf else self.outer.call_later(seconds, self.wake)
        try:
            await self.waker
        finally:
            self.waker = None
            if timer is not None:
                timer.cancel()

    async def _finish_effects(self) -> bool:
        """See effects that the body gave up to their end. Return True if nothing is left to do."""
        if self._running:
            await self._until_woken()
            return False
        unknown = [one for one in self._given_up if one.is_unknown()]
        if not unknown:
            return not await self.ask_about_effects()
        self.calls = {one.branch: one for one in unknown}
        for call in unknown:
            if call.suspended is None:
                call.settles = call.is_cancelled = True  # It ends as cancelled if it did not happen.
                self._start(call, call.perform())
        if not self._running:
            await self.settle()
        return False

    def _close(self) -> None:
        """Cancel what a body that has ended left behind, but for effects."""
        self.closing = True
        calls, self.calls, self._requested = self.calls, {}, {}
        for call in [one for one in calls.values() if one.future is not None]:
            call.future = None
            self._body_calls.pop(call.branch, None)
            self._note_given_up(call)
            if call.question is not None and not self.is_live:
                self._withdrawn.append(call)
            elif call.question is not None and call.suspended is not None:
                self._withdraw(call)
            else:
                call.give_up()
                if call.question is None:
                    self._withdraw_asked(call)
        if self.loop.tasks:
            self.ctx.run_logger.warning(
                "flow %r ended while %d of its tasks were under way; they are cancelled: await them",
                self.flow_id,
                len(self.loop.tasks),
            )
        self._end_body()

    def _end_body(self) -> None:
        """Cancel the tasks of the body until they have ended."""
        self.loop.is_halted = False
        for _ in range(_MAX_CANCELLATIONS):
            tasks = list(self.loop.tasks)
            if not tasks and not self.loop.close_generators():
                return
            for task in tasks:
                task.cancel()
            self._turn(self.woken_by)
        self.ctx.run_logger.warning(
            "flow %r does not end although it was cancelled; let CancelledError and FlowClosed pass",
            self.flow_id,
        )
