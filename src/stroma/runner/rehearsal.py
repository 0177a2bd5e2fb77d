"""Run a pipeline to its end in a test: it gets answers and messages, and its timers pass at once.

Also check that a flow depends only on its input and its steps, by replaying a run of it at another time.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel

from stroma.checkpoint import InMemoryStore, PipelineChanged
from stroma.contracts.schema import schema_of
from stroma.hooks.sets import NodeHooks
from stroma.runner.flows.flow import FlowFunction
from stroma.runner.flows.journal import REPLAY_ONLY
from stroma.runner.flows.suspension import TIME_SHIFT_MS, now_ms
from stroma.trace.result import ExecutionResult, Question, RunStatus

#: Answers in the order in which their questions are asked, or a function of the question; None: no answer.
Answers = Sequence[Any] | Callable[[Question], Any]


@dataclass
class Rehearsal:
    """The surroundings of a run: they reply whenever it is suspended.

    A question gets its answer. If no open question has one, the next message is sent. If none is left, the
    time passes until the run is due.

    Attributes:
        messages: models or JSON data, or (topic, message) tuples.
        places: places of the questions so far, in order. In another run of the same code they get the same
            answers.
    """

    answers: Answers = ()
    messages: Sequence[Any] = ()
    places: list[str] = field(default_factory=list)

    async def run(self, runner: Any, target: Any, state: BaseModel, *, resume: bool) -> ExecutionResult[Any]:
        """Run, and resume, until the run ends or waits for something that nobody gives.

        ``runner``: a StromaRunner, whose module imports this one.
        """
        known: dict[str, Any] = {}
        messages = enumerate(self.messages)
        wake_ms: int | None = None
        token = TIME_SHIFT_MS.set(TIME_SHIFT_MS.get())
        try:
            while True:
                result: ExecutionResult[Any] = await runner.run(target, state, resume=resume)
                resume = True
                if result.status is not RunStatus.SUSPENDED:
                    return result
                new = [one for one in result.questions if one.id not in known]
                answers = [(one, self._answer(one, known)) for one in new]
                replies = [(one.id, answer) for one, answer in answers if answer is not None]
                for question, answer in replies:
                    schema = type(answer) if isinstance(answer, BaseModel) else None
                    await runner.signal(result.run_id, answer, question=question, schema=schema)
                if replies:
                    continue
                number, message = next(messages, (0, None))
                if message is not None:
                    topic, message = message if isinstance(message, tuple) else ("", message)
                    await runner.send(result.run_id, message, topic=topic, id=f"message {number}")
                    continue
                store: Any = runner.checkpoint_manager.store
                before, wake_ms = wake_ms, store.get_run(result.run_id).due_ms
                if wake_ms is None or wake_ms == before:  # Due for a message that it does not take.
                    return result
                TIME_SHIFT_MS.set(TIME_SHIFT_MS.get() + max(0, wake_ms - now_ms()))
        finally:
            TIME_SHIFT_MS.reset(token)

    def _answer(self, question: Question, known: dict[str, Any]) -> Any:
        """Return the answer to a question that this process has not seen; None without one."""
        place = question.id.rpartition(":")[0]
        number = [one.rpartition(":")[0] for one in known].count(place)
        known[question.id] = question
        if not isinstance(self.answers, Sequence):
            return self.answers(question)
        if question.kind == "effect":
            return None
        at = [index for index, other in enumerate(self.places) if other == place]
        if number == len(at):
            at.append(len(self.places))
            self.places.append(place)
        return self.answers[at[number]] if at[number] < len(self.answers) else None


def missing_reply(result: ExecutionResult[Any]) -> str:
    """Return why a suspended run did not end in a rehearsal, and what to pass."""
    for question in result.questions:
        if question.kind == "effect":
            return (
                "nobody knows if the call of an effect happened; pass reconcile=, and let it return the "
                "output or NotDone()"
            )
        return f"nobody answers {question.reason!r}; pass the answer in answers="
    return f"it is {'; '.join(result.suspended)}; pass what it waits for in messages="


_RUN_ID: Final = "check"
#: By how much the clock of a replay differs: in its minute, hour, day and weekday.
_SHIFT: Final = datetime.timedelta(days=1, hours=5, minutes=7, seconds=11)


async def check_flow(
    runner: Any, flow: FlowFunction[Any, Any], state: BaseModel, rehearsal: Rehearsal
) -> ExecutionResult[Any]:
    """Run a flow once, calling its steps, then replay it at another time without a call.

    ``runner``: a StromaRunner, whose module imports this one. Returns the result of the run. Raises
    PipelineChanged for the first difference, ValueError if the flow waits for something that the rehearsal
    does not give.
    """
    store, initial = InMemoryStore(), schema_of(type(state)).copy(state)
    store._has_warned = True  # Of a suspended run that is lost.
    twin = runner._twin(flow, store, run_id=_RUN_ID, hooks=NodeHooks(), inline_wait_seconds=0.0)
    first = await rehearsal.run(twin, flow, initial, resume=False)
    if first.status is RunStatus.SUSPENDED:
        raise ValueError(f"flow {flow.name!r} does not end: {missing_reply(first)}")
    recorded = store._runs[_RUN_ID]
    recorded.steps.pop(0, None)  # The output: the body is to run again.
    recorded.status = "INTERRUPTED"
    token = REPLAY_ONLY.set(frozenset(row.branch for row in first.trace))
    try:
        with _another_time(flow):
            second = await twin.run(flow, initial, resume=True)
    finally:
        REPLAY_ONLY.reset(token)
    if second.status is RunStatus.INTERRUPTED:
        return first  # It makes the calls that had failed, as a resume would.
    before, after = _outcome(first), _outcome(second)
    if before != after:
        raise PipelineChanged(
            f"flow {flow.name!r} ends with {after} when it is replayed, and ended with {before}; a flow may "
            "depend only on its input, its steps, and flow.now(), flow.random() and flow.uuid()"
        )
    return first


def _outcome(result: ExecutionResult[Any]) -> str:
    if result.failure is not None:
        return f"the failure {result.failure.message!r}"
    return f"suspended: {result.suspended}" if result.suspended else repr(result.final_state)


@contextlib.contextmanager
def _another_time(flow: FlowFunction[Any, Any]) -> Iterator[None]:
    """Shift ``time.time()`` and ``datetime.now()``, as far as the module of the flow's function sees them."""
    seconds, real_time, real_ns, real = _SHIFT.total_seconds(), time.time, time.time_ns, datetime.datetime

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

    class Shifted(real, metaclass=Meta):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.now(tz) + _SHIFT

        @classmethod
        def utcnow(cls) -> datetime.datetime:
            return real.now(datetime.UTC).replace(tzinfo=None) + _SHIFT

    shifted: list[tuple[Any, Any]] = [
        (real_time, lambda: real_time() + seconds),
        (real_ns, lambda: real_ns() + int(seconds * 1e9)),
        (real, Shifted),
    ]
    modules: list[Any] = [vars(time), vars(datetime), getattr(flow.body, "__globals__", {})]
    patches = [
        (names, name, new)
        for names in modules
        for name, value in names.items()
        for old, new in shifted
        if value is old
    ]
    before = [(names, name, names[name]) for names, name, _ in patches]
    try:
        for names, name, value in patches:
            names[name] = value
        yield
    finally:
        for names, name, value in before:
            names[name] = value
