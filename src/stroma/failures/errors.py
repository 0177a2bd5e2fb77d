"""Exceptions that runs raise or record, apart from those of contracts, budgets and stores."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from stroma._utils.text import format_amount
from stroma.cost.budget import BudgetExceeded, Dimension
from stroma.cost.usage import shown
from stroma.failures.classes import FailureClass


class ItemFailure(BaseModel):
    """An item of a map that failed for good without stopping the map.

    Attributes:
        index: 0-based index of the item.
        node_id: the node that failed; if an item is a group or several nodes, the node inside.
        message: of its last attempt, for people: ``Type: message``.
        reason: a stable word for it, such as "rate_limit"; None if unknown.
        attempts: number of attempts; 0 for an item that could not be read.
    """

    index: int
    node_id: str
    failure_class: FailureClass
    message: str
    reason: str | None = None
    attempts: int = 1


#: Reasons of suspended runs: somebody paused it; it reached its budget and waits for a raise.
PAUSED: Final = "paused"
BUDGET: Final = "budget"
#: Beginnings of what a run waits for that has asked a question: the text follows, or what it is about.
WAITING_FOR_ANSWER: Final = "waiting for an answer: "
WAITING_FOR_STATEMENT: Final = "waiting for a statement on the call of an effect"
#: Between the limit and the failure in the error of a run that a limit stopped after another failure.
LAST_FAILURE: Final = "; the last failure: "


class Suspend(Exception):
    """Raised by a node that waits for a person: the run is SUSPENDED and continues once it has the answer.

    Attributes:
        reason: the text of the question.
        schema: class of the answer; None for any JSON value.

    Where: out of a node's function, never out of ``run()``: it is not a failure.
    Cause: the node needs a decision by a person.
    Fix: ``await runner.signal(run_id, answer, question=id)``, with an id of ``result.questions``; then run
    with ``resume=True``; the node finds the answer at ``current_node().signal``.
    """

    schema: type[BaseModel] | None = None  # Of a subclass that does not say, too.
    #: The run, position and branch of the step that has asked, while the exception passes the steps around
    #: it.
    asked_at: tuple[str, int, str] | None = None

    def __init__(self, reason: str, *, schema: type[BaseModel] | None = None) -> None:
        super().__init__(reason)
        if not isinstance(reason, str):
            raise TypeError(f"the reason of Suspend must be a string, got {shown(reason)}")
        if schema is not None and not (isinstance(schema, type) and issubclass(schema, BaseModel)):
            raise TypeError(
                f"the schema of Suspend must be a pydantic model, got {shown(schema)}; pass a "
                "RootModel for plain values"
            )
        self.reason = reason
        self.schema = schema


class RecordedVerdict(NamedTuple):
    """Verdict of the process in which an exception was raised.

    Attributes:
        failure_class, reason, retry_after_seconds: as those of a Failure.
        is_refusal: the request was certainly not carried out, see
            :func:`stroma.failures.refusals.is_refusal`.
        waits: see :func:`stroma.failures.providers.requested_waits`.
    """

    failure_class: FailureClass
    reason: str | None = None
    retry_after_seconds: float | None = None
    is_refusal: bool = False
    waits: tuple[float, ...] = ()


class RunFailed(Exception):
    """A failure in another process: of a run that it executed, or of a node with a place.

    Where: ``result.failure`` of a run that was waited for (``if_running="attach"``), or of a node with a
    place.
    Cause: the run or the node failed in that process; the message is the recorded one.
    Fix: look at its attempts in the store (``stroma show``), then continue the run with ``resume=True``.
    """

    @classmethod
    def recorded(
        cls, message: str, error_type: str | None, verdict: RecordedVerdict | None = None
    ) -> RunFailed:
        """Return one that stands for an exception which a store, or the worker of a place, has recorded."""
        error = cls(message)
        if error_type is not None:
            vars(error)["type_name"] = error_type
        if verdict is not None:
            vars(error)["verdict"] = verdict
        return error


def verdict_of(error: BaseException) -> RecordedVerdict | None:
    """Return the verdict of the process in which an exception was raised; None for one of this process."""
    return vars(error).get("verdict") if type(error) is RunFailed else None


class PlaceError(ValueError):
    """A node with a place cannot be called there; it was not called.

    Where: out of ``run()`` and ``serve()`` before anything is called, and out of ``stroma_worker()``;
    ``result.failure`` of a FAILED run for a step of a flow.
    Cause: the process has no Temporal client, the place is the task queue that drives runs, the server
    refused the call, or the function needs what is not available at a place.
    Fix: drive the run with workers that have a Temporal client, as the message says, or remove the place.
    """


class WorkerLost(Exception):
    """The worker of a place did not answer a call: its process died or was stopped, or the call was ended.

    Where: ``result.failure`` of a PARTIAL run.
    Cause: the process of the place died during the call, in each attempt of the node.
    Fix: see what ends the workers of the place, then run with ``resume=True``.
    """


_UNITS: Final = {"cost": "USD", "tokens": "tokens", "latency": "ms"}
_NAMES: Final = {"cost": "max_cost_usd", "tokens": "max_tokens", "latency": "max_latency_ms"}


#: Reason of the wait for the end of a cooldown.
COOLDOWN: Final = "cooldown"


class Wait(NamedTuple):
    """A call may not start yet.

    Attributes:
        ms: the earliest time to ask again; None if unknown.
        refusal: the reason why it is refused in the end, where that is known already.
    """

    reason: str
    ms: int | None
    refusal: Exception | None = None


class SharedBudgetExceeded(BudgetExceeded):
    """A budget that several runs share has no room for another call.

    Attributes:
        budget: its name.
        dimension: "cost" (USD) or "tokens".
        limit, actual: the limit and the spending of this window; for a node with a separate limit, its own.
        reserved: amount that calls in flight have reserved, in all processes.
        requested: amount that the refused call may use.
        resets_at: when the window ends, in UTC; None for a budget without ``per=``.

    Where: ``result.failure`` of a PARTIAL run; the node was not called.
    Cause: runs that share the budget, in any process, have spent it, or have reserved the rest.
    Fix: run with ``resume=True`` once the next window has started, or raise the limit that the message names.
    """

    def __init__(
        self,
        budget: str,
        dimension: Dimension,
        limit: float,
        actual: float,
        reserved: float,
        requested: float,
        node_id: str,
        resets_at: datetime | None,
        capped: bool = False,
    ) -> None:
        super().__init__(dimension, limit, actual, node_id)
        self.budget = budget
        self.reserved = reserved
        self.requested = requested
        self.resets_at = resets_at
        self.capped = capped

    def __reduce__(self) -> Any:
        figures = (self.limit, self.actual, self.reserved, self.requested)
        where = (self.node_id, self.resets_at, self.capped)
        return type(self), (self.budget, self.dimension, *figures, *where)

    def __str__(self) -> str:
        unit = _UNITS[self.dimension]
        name = "max_cost_usd_by_node" if self.capped else _NAMES[self.dimension]
        whose = f" of node {self.node_id!r}" if self.capped else ""
        if self.resets_at is None:
            way = f"raise {name}, then resume the run"
        else:
            anew = f"{self.resets_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
            way = f"resume the run after {anew}, when it begins anew, or raise {name}"
        spent, reserved, requested = (
            format_amount(one, unit).removesuffix(f" {unit}")
            for one in (self.actual, self.reserved, self.requested)
        )
        return (
            f"shared budget {self.budget!r} has no room for a call of node {self.node_id!r}: "
            f"{name}{whose} is {format_amount(self.limit, unit)}, {spent} spent, {reserved} reserved by "
            f"calls in flight, and this one may take {requested}; {way}"
        )


class LimitError(Exception):
    """A limit that a call can never meet.

    Where: ``result.failure`` of a FAILED run; the node was not called.
    Cause: one call takes more tokens than ``tokens_per_minute`` of its limit.
    Fix: raise ``tokens_per_minute``, lower ``reserve_tokens`` if it is too high, or make the calls smaller;
    then resume.
    """


class WaitedTooLong(Exception):
    """An attempt waited for its turn too long, or would have to.

    Attributes:
        retry_after: seconds until the limit opens again; None if unknown.

    Where: ``result.failure`` of a PARTIAL run; the node was not called.
    Cause: a limit had no room for ``max_wait_seconds``, or the provider has asked all calls to wait longer
    than ``max_retry_after_seconds`` of the node's policy.
    Fix: run with ``resume=True`` later, raise the limit, or ``max_wait_seconds``.
    """

    retry_after: float | None = None


class CircuitOpen(Exception):
    """A provider fails so often that it is not called for some time.

    Attributes:
        key: the provider's host, or the limit of the node.
        retry_after: seconds until it is tried again.

    Where: ``result.failure`` of a PARTIAL run; the node was not called.
    Cause: too many of the last calls failed, and ``Breaker.max_wait_seconds`` is shorter than the remaining
    time.
    Fix: check the provider's status page, then run with ``resume=True``.
    """

    def __init__(self, key: str, retry_after: float) -> None:
        super().__init__(key, retry_after)
        self.key = key
        self.retry_after = retry_after

    def __str__(self) -> str:
        return (
            f"{self.key} failed too often and is not called for another {self.retry_after:.1f} s; "
            "resume the run later, or "
            "raise max_wait_seconds of the breaker"
        )


class RunCancelled(Exception):
    """A guarded run, or plain code with steps, was cancelled from elsewhere: no further step starts.

    Where: out of a framework's call, of a guarded step, or of ``with guard.run()``; ``guard.stopped`` has it
    too. In ``result.failure`` of a step of plain code.
    Cause: ``stroma cancel`` or ``store.cancel()``, in this process or another one.
    Fix: none is needed: finished outputs are stored. Call again in a separate run.
    """
