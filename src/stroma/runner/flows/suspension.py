"""Waits of a flow: for a time, a message, or the answer of a person. They are durable, and are not steps."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from time import monotonic, perf_counter_ns, time_ns
from typing import Any, Final

from stroma.checkpoint import StoreError, Waiting
from stroma.checkpoint.entries import WITHDRAWN, SentMessage, UnknownCall
from stroma.checkpoint.flow_notes import message_label
from stroma.engine.context import ReliabilityContext
from stroma.engine.effects import REASON, settle_left_calls
from stroma.engine.outcome import STOPPED, Halt, Place, Stopped
from stroma.engine.questions import announce, make_question
from stroma.engine.tasks import Shield, raise_if
from stroma.failures.classes import FailureClass
from stroma.failures.errors import Suspend
from stroma.failures.failure import Failure
from stroma.runner.flows.body_loop import BodyLoop
from stroma.runner.flows.call import FlowCall
from stroma.runner.flows.endings import Endings, StepFailed
from stroma.runner.flows.journal import FlowJournal, misfit_of
from stroma.trace.events import MarkKind, TraceMark

#: How often a flow that only waits looks for a shutdown, and for answers.
_POLL_SECONDS: Final = 0.25
#: By how much the time of flows is ahead, in ms: timers pass at once in a test, and not at all in a replay.
TIME_SHIFT_MS: Final[ContextVar[int]] = ContextVar("stroma_time_shift_ms", default=0)


def now_ms() -> int:
    """Return the time in ms since the epoch."""
    return time_ns() // 1_000_000 + TIME_SHIFT_MS.get()


def text_of_time(ms: int) -> str:
    """Return a time as it is shown: ISO 8601, in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")


class FlowWaits:
    """The questions, sleeps and waits for messages of a flow, and its suspension when nothing else is left.

    An event is the end of a call, or a time in ms. It is numbered when its record is written, and delivered
    in that order once it is stored.
    """

    woken_by = 0  # Number of the last event that the body noticed.

    def __init__(
        self, ctx: ReliabilityContext, journal: FlowJournal, flow_id: str, position: int, loop: BodyLoop
    ) -> None:
        self.ctx, self.journal, self.flow_id, self.position = ctx, journal, flow_id, position
        self.loop = loop
        self.records = journal.records(position)
        self.endings = Endings(ctx)
        #: Numbers of the events that are not delivered yet, in order, and by branch those of calls.
        self.numbers: deque[int] = deque()
        self.number_of: dict[str, int] = {}
        #: What the events are, by number.
        self.stored: dict[int, FlowCall | int] = {}
        self.unstored: dict[int, FlowCall | int] = {}
        self.failures: list[int] = []  # Numbers of the events that were failures.
        #: By branch the calls that the body waits for, and after its end effects that it has given up.
        self.calls: dict[str, FlowCall] = {}
        self.sleeps: dict[str, str] = {}  # Reasons of the open sleeps, by branch.
        #: Topics of the messages that are not delivered yet. The next one of a topic is taken after that, so
        #: that they stay in order if the body gives a call up meanwhile.
        self.receiving: set[str] = set()
        self.look_at = math.inf  # When to look for messages, by the monotonic clock.
        self.stopping: Halt | Stopped | BaseException | None = None  # The end, whatever the body does.
        self.waker: asyncio.Future[None] | None = None

    def clock_ms(self) -> float:
        """Return the time in ms since the epoch on the clock of the attempts, with which waits are shown."""
        return (perf_counter_ns() + self.ctx.journal.epoch_ns) / 1e6

    def open_branches(self) -> list[str]:
        """Return the branches of the calls that the body waits for."""
        return sorted(call.branch for call in self.calls.values() if call.future is not None)

    def finish(self, call: FlowCall, outcome: Any) -> None:
        """Take what a call came to: deliver it once it is recorded, or wait, or end the flow."""
        raise NotImplementedError

    def stop(self, end: Halt | Stopped | BaseException) -> None:
        if self.stopping is None:
            self.stopping, self.loop.is_halted = end, True
        self.wake()

    def wake(self) -> None:
        """Have the driver look at what is to be done."""
        if self.waker is not None and not self.waker.done():
            self.waker.set_result(None)

    def receive(self, call: FlowCall, message: SentMessage) -> None:
        """Give a message to a call: deliver it once it is recorded."""
        number, problem = self.number(call.branch), call.problem_of(message)
        self.take_message(call, message, problem, number)
        self.journal.note_message(self.position, number, call.branch, message, problem)
        self.unstored[number] = call

    def take_message(self, call: FlowCall, message: SentMessage, problem: str | None, number: int) -> None:
        call.message = message
        call.end = message if problem is None else self.failed(call, misfit_of(problem), number)

    def failed(self, call: FlowCall, failure: Failure, number: int) -> StepFailed:
        error = StepFailed(failure, (*call.scope.names, failure.node_id))
        error.event, error.__cause__ = number, failure.exception
        self.failures.append(number)
        return error

    def number(self, branch: str) -> int:
        """Return the number of the event that the end of a call is. Called when its record is written."""
        number = self.number_of.get(branch)
        if number is None:
            number = self.records.last = self.records.last + 1
            self.numbers.append(number)
            if branch:
                self.number_of[branch] = number
        return number

    async def store_events(self) -> None:
        events, self.unstored, self.journal.has_new_values = self.unstored, {}, False
        await self.flush()
        self.stored |= events

    async def flush(self) -> None:
        """Store what was noted. Ends the flow if the store refuses it."""
        await self.see_through(self.ctx.session.flush)

    async def see_through(self, write: Callable[[], object]) -> None:
        shield, problem = Shield(), None
        try:
            pending = write()
            if isinstance(pending, Awaitable):
                problem = await shield.finish(pending)
        except Exception as error:
            problem = error
        if problem is not None:
            failure = Failure(problem, FailureClass.RECOVERABLE, self.flow_id, 1, str(problem), "store")
            self.stop(Halt(failure, partial=True))
        raise_if(shield.cancellation)

    # ------------------------------------------------------------------ questions

    async def open_question(self, call: FlowCall) -> bytes | None:
        """Store a question, unless it is. Return its answer in stored form; None if there is none yet."""
        question, session = call.question, self.ctx.session
        assert question is not None
        known = session.waiting.get((question.position, question.branch))
        is_new = known is None or known.number != question.number
        if known is not None and known.is_answered:
            return known.payload
        if is_new:  # When it was asked, for those who look at the run.
            session.note(f"{question.position}:w:{question.branch}", str(self.clock_ms()).encode())
        if known != question:  # Its text or its class may have changed.
            await self.see_through(partial(session.ask, question))
        if is_new and self.stopping is None:
            await announce(self.ctx, question)
        return None

    async def withdraw(self, *questions: Waiting) -> None:
        """Have no further answer accepted: the body does not wait for one. Accepted ones stay valid."""
        for question in questions:
            await self.see_through(partial(self.ctx.session.ask, question._replace(payload=WITHDRAWN)))

    async def take_answers(self, *, closing: int | None = None) -> bool:
        """Deliver the answers of open questions. Return True if there is one.

        ``closing``: a time in ms, at which questions expire; those that nobody has answered are closed.
        """
        questions = [call for call in self.calls.values() if call.question is not None and call.task is None]
        if not questions:
            return False
        if closing is not None:
            for call in questions:
                if call.wake_ms is not None and call.wake_ms <= closing and call.question is not None:
                    await self.withdraw(call.question)
        try:
            answers = self.ctx.session.answers()
            by_place = answers if isinstance(answers, Mapping) else await answers
        except StoreError as error:
            self.ctx.run_logger.warning("answers cannot be read now: %s", error)
            return False
        answered = [
            (call, answer.payload)
            for call in questions
            if (answer := by_place.get((self.position, call.branch))) is not None
            and answer.is_answered
            and call.future is not None
        ]
        for call, payload in answered:
            self.finish(call, payload)
        return bool(answered)

    # ------------------------------------------------------------------ messages

    async def take_messages(self) -> bool:
        """Give messages to the calls that wait for one, in the order of both. Return True if there is one."""
        calls = [
            (call, call.topic)
            for call in self.calls.values()
            if call.topic is not None and call.message is None
        ]
        self.look_at = monotonic() + _POLL_SECONDS if calls else math.inf
        inbox, has_taken = self.journal.inbox, False
        if any(not inbox.has(topic) for _, topic in calls):
            await self.see_through(partial(inbox.read, self.ctx.session))
        for call, topic in calls if self.stopping is None else ():
            if topic not in self.receiving and inbox.has(topic):
                self.receiving.add(topic)
                self.receive(call, inbox.take(topic))
                has_taken = True
        return has_taken

    # ------------------------------------------------------------------ nothing is at work

    async def settle(self) -> float | None:
        """End a wait, or the flow. Return how many seconds it waits in this process; None if it goes on."""
        ctx = self.ctx
        if ctx.stopping.is_asked:
            self.stop(STOPPED)
            return None
        if await self.take_messages() or self.stopping is not None or await self.take_answers():
            return None
        questions = [call.question for call in self.calls.values() if call.question is not None]
        topics = dict.fromkeys(call.topic for call in self.calls.values())
        messages = [f"waiting for a {message_label(topic)}" for topic in topics if topic is not None]
        reasons = [*(question.reason for question in questions), *messages]
        # A suspended step has reported its own.
        of_steps = [call.suspended for call in self.calls.values() if call.suspended is not None]
        wake = self.loop.next_time
        wake_ms = None if wake is None else math.ceil(wake * 1000)
        if wake_ms is not None:
            remaining = wake_ms - now_ms()
            if remaining <= ctx.config.inline_wait_seconds * 1000:
                return min(_POLL_SECONDS, max(0.0, remaining / 1000))
            if not reasons and not of_steps:
                reasons = list(self.sleeps.values()) or [f"sleeping until {text_of_time(wake_ms)}"]
        elif not reasons and not of_steps:
            message = (
                f"the body of flow {self.flow_id!r} waits, and no step, timer or question of it is open; "
                "check its events, locks and queues"
            )
            self.stop(self.endings.mistake(message, self.flow_id))
            return None
        ctx.journal.wake_by(wake_ms)
        for question in questions:
            ctx.account.note_question(question)
        ctx.account.suspended += tuple(messages if questions else reasons)
        self._suspend("; ".join([*of_steps, *reasons]))
        return None

    def _suspend(self, reason: str) -> None:
        self.journal.note_suspension(self.position, self.woken_by, self.open_branches())
        failure = Failure(Suspend(reason), FailureClass.RECOVERABLE, self.flow_id, 1, reason)
        self.stop(Halt(failure, suspended=True))

    async def ask_about_effects(self) -> bool:
        """Suspend a flow that ends while outcomes of effects are unknown; False without any."""
        ctx, session = self.ctx, self.ctx.session
        unknown = settle_left_calls(ctx, self.position)
        for place, call in unknown:
            known = session.waiting.get(place)
            contract = ctx.registry.find(call.node_id)
            about = UnknownCall(call.key, call.number, "no call took its outcome, and the flow has ended")
            schema = None if contract is None else contract.output_schema
            question = make_question(session, Place(*place), call.node_id, REASON, schema, about)
            if known is None or known.number != question.number:
                await self.see_through(partial(session.ask, question))
                if self.stopping is None:
                    await announce(ctx, question)
            ctx.account.note_question(question)
        if unknown and self.stopping is None:
            self._suspend(REASON)
        return bool(unknown)

    def mark(self, kind: MarkKind, branch: str, reason: str, began_ms: float) -> None:
        """Show a wait in the trace."""
        now = self.clock_ms()
        at_utc = datetime.fromtimestamp(now / 1000, UTC)
        self.ctx.trace.marks.append(
            TraceMark(self.flow_id, 1, self.position, branch, kind, reason, max(0, now - began_ms), at_utc)
        )
