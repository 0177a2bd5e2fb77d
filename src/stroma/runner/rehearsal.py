"""Run a pipeline to its end in a test: it gets answers and messages, and its timers pass at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

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
