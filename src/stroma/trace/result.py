"""Result of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal

from pydantic import BaseModel, Field, PlainSerializer
from pydantic_core import core_schema

from stroma._utils.access import kind_of
from stroma._utils.text import typed
from stroma.failures.failure import Failure
from stroma.trace.redaction import Redact, Shown, hide_words
from stroma.trace.trace import ExecutionTrace

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from stroma.trace.story import Story

    StateT = TypeVar("StateT", bound=BaseModel, default=BaseModel)
else:
    from typing import TypeVar

    StateT = TypeVar("StateT")


class RunStatus(StrEnum):
    """The outcome of a run."""

    COMPLETED = "COMPLETED"
    FAILED = "FAILED"  # a terminal failure: trying the same again will not help
    PARTIAL = "PARTIAL"  # stopped for now: finished nodes are stored, a later resume may succeed
    RESUMED = "RESUMED"  # completed, continuing an earlier run
    CANCELLED = "CANCELLED"  # the run's task was cancelled; resumable
    SUSPENDED = "SUSPENDED"  # a node waits for a person; resumable
    INTERRUPTED = "INTERRUPTED"  # the process was asked to stop, or run() raised; resumable


class _AnyValue:
    """Metadata of a field whose class pydantic need not know: its values pass unchanged."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.any_schema()


def _failure_as_dict(failure: Failure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    return {
        "type": kind_of(failure.exception),
        "message": failure.message,
        "failure_class": failure.failure_class.value,
        "node_id": failure.node_id,
        "attempt": failure.attempt,
        "reason": failure.reason,
        "retry_after_seconds": failure.retry_after_seconds,
    }


@dataclass(frozen=True, slots=True)
class HookFailure:
    """One exception that a hook raised. It did not change the run."""

    hook: str
    node_id: str | None
    exception: BaseException


@dataclass(frozen=True, slots=True)
class Question:
    """A question that a suspended run asks.

    Attributes:
        id: identifies the question in its run, for ``runner.signal(run_id, answer, question=id)``. It
            identifies the call that asks, not the text or the class of the answer: a reworded question has
            the same id.
        reason: the text of the question; "effect" if it is how a call of an effect ended.
        kind: "approval", or "effect" for a question that takes the output of a call, or NotDone().
        node_id: the node or flow that asks.
        schema: JSON schema of the answer; None for any JSON value.
        text: the question for people: ``reason``, and of an effect the call that it is about, with its
            idempotency key.
    """

    id: str
    reason: str
    kind: Literal["approval", "effect"]
    node_id: str
    schema: Mapping[str, Any] | None = field(default=None, hash=False, repr=False)
    text: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Total:
    """Sum over all processes of an execution: tokens (input + output), and US dollars."""

    tokens: int = 0
    cost_usd: float = 0.0


@dataclass
class ExecutionResult(Shown, Generic[StateT]):
    """The result of a run.

    Pydantic serialises it, and a FastAPI endpoint that is annotated ``-> ExecutionResult[Out]`` returns it,
    as ``run_id``, ``status``, ``final_state`` (an object or null), ``total_cost_usd``, ``total_tokens``,
    ``total`` (``tokens`` and ``cost_usd``), ``failure`` (null, or ``type``, ``message``, ``failure_class``,
    ``node_id``, ``attempt``, ``reason``, ``retry_after_seconds``), ``unpriced_models``, ``suspended``,
    ``failed_items`` and ``questions``; without the trace and errors of hooks. The message is the exception's
    own text, without secrets and values that ``redact`` removes.

    Attributes:
        run_id: id of the run.
        status: how the run ended.
        trace: the attempts of the run, in order.
        final_state: the last committed state, else the initial one.
        total_cost_usd: US dollars that this call spent, failed attempts included.
        total_tokens: input + output of this call, failed attempts included.
        total: the same for the whole execution, including earlier processes before a resume.
        failure: the failure that stopped the run, or None.
        suspended: reasons of a SUSPENDED run; one line per node.
        failed_items: number of failed items of its maps that did not stop the run, see ``on_item_failure``.
        hook_errors: exceptions of hooks, which changed nothing.
        questions: the open questions of a SUSPENDED run; ``suspended`` has their texts too.
        unpriced_models: models without a known price, which count as 0 USD; "(no model)" for tokens without a
            model.
    """

    run_id: str
    status: RunStatus
    final_state: StateT | None
    trace: Annotated[ExecutionTrace, _AnyValue(), Field(exclude=True)]
    total_cost_usd: float
    total_tokens: int
    failure: Annotated[Failure | None, _AnyValue(), PlainSerializer(_failure_as_dict)] = None
    hook_errors: Annotated[list[HookFailure], _AnyValue(), Field(exclude=True)] = field(default_factory=list)
    unpriced_models: list[str] = field(default_factory=list)
    suspended: list[str] = field(default_factory=list)
    failed_items: int = 0
    questions: tuple[Question, ...] = ()
    total: Total = field(default_factory=Total)

    def _story(self, redact: Redact | None = None) -> Story:
        from stroma.trace.story import StopCause

        story, failure, box = self.trace._story(redact), self.failure, None
        if failure is not None:
            hidden = self.trace._hidden(redact)
            message = typed(kind_of(failure.exception), hide_words(redact, failure.message, hidden))
            stopped = failure.innermost
            place = (stopped.node_id, stopped.attempt, message, "failure")
            failed = [
                bar for bar in story.bars if (bar.node_id, bar.attempt, bar.message, bar.outcome) == place
            ]
            at = max(failed, key=lambda bar: bar.began_ms, default=None)
            box = StopCause(
                stopped.node_id,
                "?" if at is None else at.at,
                stopped.attempt,
                failure.failure_class.value,
                message,
                failure.reason,
            )
        facts = [("unpriced", ", ".join(self.unpriced_models))] if self.unpriced_models else []
        reasons = {one.reason for one in self.questions}
        texts = [one.text for one in self.questions] + [one for one in self.suspended if one not in reasons]
        facts += [("waits", hide_words(redact, text, self.trace._hidden(redact))) for text in texts]
        return dataclasses.replace(
            story,
            run_id=self.run_id,
            status=self.status.value,
            tokens=self.total_tokens,
            cost_usd=self.total_cost_usd,
            box=box,
            facts=tuple(facts),
        )

    @property
    def ok(self) -> bool:
        """True if every node has ended well: the status is COMPLETED, or RESUMED after a resume."""
        return self.status in (RunStatus.COMPLETED, RunStatus.RESUMED)

    @property
    def output(self) -> StateT:
        """The output of the run. Raises what stopped it; RuntimeError if it has no output."""
        self.raise_for_status()
        if not self.ok or self.final_state is None:
            raise RuntimeError(f"run {self.run_id!r} is {self.status} and has no output; resume it")
        return self.final_state

    def raise_for_status(self) -> None:
        """Raise the exception that stopped the run, if one did."""
        if self.failure is not None:
            raise self.failure.exception
