"""Failure classes, retry policies, and the pure decision whether to try again."""

from __future__ import annotations

import logging
import random
from asyncio import CancelledError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeGuard, TypeVar, cast, final

from pydantic import BaseModel, ConfigDict, Field

from stroma._deferred import Deferred
from stroma._words import typed
from stroma.classifiers import read_provider_error
from stroma.contracts import ContractViolation
from stroma.cost import BudgetExceeded
from stroma.refusals import CircuitOpen, LimitError, WaitedTooLong
from stroma.schemas import NotSerialisable, stamped
from stroma.usage import UsageError, shown

__all__ = [
    "Classifier",
    "Failure",
    "FailureClass",
    "FailurePolicy",
    "ItemFailure",
    "NodeContext",
    "PolicyMap",
    "Retry",
    "RetryBudget",
    "RunFailed",
    "StepContext",
    "Stop",
    "Suspend",
    "classify",
    "decide",
    "default_policy_map",
    "diagnose",
    "is_a",
    "kind_of",
    "text_of",
]

logger = logging.getLogger("stroma")


class FailureClass(StrEnum):
    """What a failure means for trying again."""

    RECOVERABLE = "RECOVERABLE"
    TERMINAL = "TERMINAL"
    AMBIGUOUS = "AMBIGUOUS"

    # The same number, without a call of Python for each look into a policy map: names are values here.
    __hash__ = str.__hash__


class ItemFailure(Deferred):
    """An item of a map that failed for good while the others went on.

    Attributes:
        index: which item, 0-based.
        node_id: the node that failed.
        message: of its last attempt, as in the trace.
        reason: a stable word for it, such as "rate_limit"; None if unknown.
        attempts: how many were made; 0 for an item that could not be read.
    """

    index: int
    node_id: str
    failure_class: FailureClass
    message: str
    reason: str | None = None
    attempts: int = 1


class FailurePolicy(Deferred):
    """How often, and after how long, a node is tried again.

    Attributes:
        max_retries: further attempts after the first.
        backoff_seconds: the delay before the first retry; with ``jitter`` the upper end of a uniform draw from 0.
        multiplier: what each further delay is multiplied by.
        max_backoff_seconds: no computed delay is longer. A server's Retry-After may be.
        jitter: draw each delay uniformly from 0 to the computed one.
        max_retry_after_seconds: a server that asks to wait longer stops the run as PARTIAL instead.
    """

    model_config = ConfigDict(extra="forbid")

    max_retries: int = Field(default=3, ge=0)
    backoff_seconds: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    multiplier: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    max_backoff_seconds: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    jitter: bool = True
    max_retry_after_seconds: float = Field(default=120.0, ge=0)


PolicyMap = dict[FailureClass, FailurePolicy]

#: Unvalidated: a program that goes by them needs no validator of policies.
_DEFAULTS: PolicyMap = {
    FailureClass.RECOVERABLE: FailurePolicy.model_construct(max_retries=3, backoff_seconds=1.0),
    FailureClass.TERMINAL: FailurePolicy.model_construct(max_retries=0, backoff_seconds=0.0),
    FailureClass.AMBIGUOUS: FailurePolicy.model_construct(max_retries=1, backoff_seconds=0.5),
}


def default_policy_map() -> PolicyMap:
    """RECOVERABLE 3 retries within 1 s each, TERMINAL none, AMBIGUOUS 1 within 0.5 s. A fresh dict."""
    # New ones, since a policy can be changed; made in the shortest way, since every run's config has three.
    return {failure_class: stamped(policy) for failure_class, policy in _DEFAULTS.items()}


@dataclass
class NodeContext:
    """Where a failure happened, for classifiers. ``attempt`` is 1-based."""

    node_id: str
    attempt: int
    run_id: str


StepContext = NodeContext
Classifier = Callable[[Exception, NodeContext], FailureClass | None]


@final
@dataclass(frozen=True, slots=True, init=False)
class Failure:
    """One failed attempt.

    Attributes:
        exception: what the node raised, or what stopped it.
        failure_class: its one class.
        node_id: the node that failed.
        attempt: 1-based.
        message: ``str(exception)``, or the type's name where that is empty or raises.
        reason: a stable word for what happened, such as "rate_limit" or "contract"; None if unknown.
        retry_after_seconds: the wait a server asked for.
    """

    exception: BaseException
    failure_class: FailureClass
    node_id: str
    attempt: int
    message: str
    reason: str | None = None
    retry_after_seconds: float | None = None

    def __init__(
        self,
        exception: BaseException,
        failure_class: FailureClass,
        node_id: str,
        attempt: int,
        message: str,
        reason: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        # The way that a frozen dataclass takes around itself is five times as long.
        _put_exception(self, exception)
        _put_class(self, failure_class)
        _put_node_id(self, node_id)
        _put_attempt(self, attempt)
        _put_message(self, message)
        _put_reason(self, reason)
        _put_wait(self, retry_after_seconds)

    def as_prompt(self, *, max_chars: int = 2000) -> str | None:
        """What a model has to correct in its answer, as a text for it; None for a failure that it cannot mend.

        See :meth:`stroma.ContractViolation.as_prompt`.
        """
        if is_a(self.exception, ContractViolation):
            return self.exception.as_prompt(max_chars=max_chars)
        return None


_put_exception, _put_class, _put_node_id, _put_attempt, _put_message, _put_reason, _put_wait = (
    vars(Failure)[field.name].__set__ for field in fields(Failure)
)

E = TypeVar("E", bound=BaseException)


def is_a(exc: BaseException, kind: type[E]) -> TypeGuard[E]:
    """isinstance without asking the object for its ``__class__``, which a hostile exception answers by raising."""
    return issubclass(type(exc), kind)


class Suspend(Exception):
    """Raised by a node that has to wait for a person: the run stops as SUSPENDED and goes on once it has the answer.

    Attributes:
        reason: what for, in words.
        schema: what the answer must satisfy; None if any JSON value will do.

    Where: out of a node's function, never out of ``run()``: it is no failure.
    Cause: the node needs a decision that nobody has made yet.
    Mend: ``await runner.signal(run_id, answer)``, then run with ``resume=True``; the node finds the answer at
        ``current_node().signal``.
    """

    schema: type[BaseModel] | None = None  # Of a subclass that does not say, too.

    def __init__(self, reason: str, *, schema: type[BaseModel] | None = None) -> None:
        super().__init__(reason)
        if schema is not None and not (isinstance(schema, type) and issubclass(schema, BaseModel)):
            raise TypeError(
                f"Suspend asks for {shown(schema)}; give a pydantic model, a RootModel for plain values"
            )
        self.reason = reason
        self.schema = schema


class RunFailed(Exception):
    """A run that somebody else was at work on did not complete; the message is theirs.

    Where: ``result.failure`` of a run that was waited for (``if_running="attach"``).
    Cause: the run failed, or gave up, where it was run.
    Mend: look at its attempts in the store (``stroma show``), then continue it with ``resume=True``.
    """

    @classmethod
    def recorded(cls, message: str, error_type: str | None) -> RunFailed:
        """Return one that stands for an exception which a store has recorded."""
        error = cls(message)
        if error_type is not None:
            vars(error)["type_name"] = error_type
        return error


def ends_run(error: BaseException) -> bool:
    """Return whether what a validator or a classifier raised is no failure, but the end of this run or process.

    Neither awaits, so a CancelledError is one of its own. A panic of native code is an error of a validator.
    """
    kind = type(error)
    ours = issubclass(kind, (Exception, CancelledError)) or kind.__module__ == "pyo3_runtime"
    return not ours


def message_of(exc: BaseException) -> str:
    """``str(exc)``, or the type's name where that is empty or raises. Lone surrogates become escapes: it is stored."""
    try:
        said = str(exc)
        if type(said) is not str or not said.isascii():
            said = said.encode("utf-8", "backslashreplace").decode()
        return said or type(exc).__name__
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return type(exc).__name__


def kind_of(exc: BaseException) -> str | None:
    """Return the name of an exception's type, also of one that was raised in another process.

    None for a RunFailed whose message is that of a whole run: it begins with the type.
    """
    name = getattr(type(exc), "__name__", "Exception")
    if name in ("RemoteFailure", "RunFailed"):  # It stands for one of another process.
        name = vars(exc).get("type_name", name)
        return None if name == "RunFailed" else str(name)
    return str(name)


def text_of(failure: Failure) -> str:
    """Return a failure as people read it: ``Type: message``."""
    return typed(kind_of(failure.exception), failure.message)


def classify(
    exc: Exception, context: NodeContext, classifiers: Sequence[Classifier] | None = None
) -> FailureClass:
    """The one class of an exception: custom classifiers in order, then what providers' errors mean, then defaults.

    A classifier that raises, or answers with no FailureClass, is logged and skipped.
    """
    return diagnose(exc, context, classifiers).failure_class


def diagnose(
    exc: BaseException, context: NodeContext, classifiers: Sequence[Classifier] | None = None
) -> Failure:
    """Classify an exception and keep what its shape says of the reason and the wait."""
    provider = read_provider_error(exc)
    custom = _ask(exc, context, classifiers) if classifiers else None
    failure_class, reason = _built_in(exc)
    # Our own errors are what they are, whatever they were raised from.
    if provider is not None and (failure_class is None or reason in ("timeout", "bug")):
        failure_class, reason = FailureClass(provider.failure_class), provider.reason
    return Failure(
        exception=exc,
        failure_class=custom or failure_class or FailureClass.AMBIGUOUS,
        node_id=context.node_id,
        attempt=context.attempt,
        message=message_of(exc),
        reason=reason,
        retry_after_seconds=provider.retry_after
        if provider is not None and reason == provider.reason
        else None,
    )


def _built_in(exc: BaseException) -> tuple[FailureClass | None, str | None]:
    # By type, not isinstance: that asks the object for its __class__, which an exception may answer by raising.
    kind = type(exc)
    if _is_bug(exc):
        return FailureClass.TERMINAL, "bug"
    if issubclass(kind, ContractViolation):
        return FailureClass.TERMINAL, "contract"
    if issubclass(kind, BudgetExceeded):
        return FailureClass.RECOVERABLE, "budget"
    if issubclass(kind, UsageError):
        return FailureClass.TERMINAL, "usage"
    if issubclass(kind, NotSerialisable):
        return FailureClass.TERMINAL, "not_serialisable"
    if issubclass(kind, TimeoutError):
        return FailureClass.RECOVERABLE, "timeout"
    if issubclass(kind, LimitError):
        return FailureClass.TERMINAL, "limit"
    if issubclass(kind, WaitedTooLong):
        return FailureClass.RECOVERABLE, "limit"
    if issubclass(kind, CircuitOpen):
        return FailureClass.RECOVERABLE, "circuit_open"
    return None, None


#: The members of an exception group, whatever its class says of that name.
_members: Final[Callable[[BaseException], tuple[BaseException, ...]]] = cast(
    "Any", BaseExceptionGroup
).exceptions.__get__
#: Exceptions that only a mistake in the program causes, so that another attempt fails as this one did.
_BUGS: Final = (NameError, ImportError, SyntaxError, NotImplementedError, RecursionError)


def _is_bug(exc: BaseException) -> bool:
    """Return whether an exception, or each leaf of an exception group, is a mistake in the program."""
    leaves = [exc]
    while leaves:
        leaf = leaves.pop()
        if issubclass(type(leaf), BaseExceptionGroup):
            leaves.extend(_members(leaf))
        elif not issubclass(type(leaf), _BUGS):
            return False
    return True


def _ask(exc: BaseException, context: NodeContext, classifiers: Sequence[Classifier]) -> FailureClass | None:
    for classifier in classifiers:
        try:
            answer = classifier(exc, context)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            if answer is not None:
                return FailureClass(answer)
        except BaseException as error:
            if ends_run(error):
                raise
            logger.warning(
                "classifier %r raised for node %r; it is skipped", classifier, context.node_id,
                exc_info=True, extra={"run_id": context.run_id},
            )  # fmt: skip
    return None


class RetryBudget:
    """Counts retries by (run id, node id), for code that retries by hand. The engine keeps its own counts."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}

    def increment(self, run_id: str, node_id: str) -> int:
        """Count one more retry and return the new count."""
        count = self._counts.get((run_id, node_id), 0) + 1
        self._counts[run_id, node_id] = count
        return count

    def exhausted(self, run_id: str, node_id: str, policy: FailurePolicy) -> bool:
        """Whether the retries of a policy are used up."""
        return self._counts.get((run_id, node_id), 0) >= policy.max_retries


# ---------------------------------------------------------------------- the decision


class Retry(NamedTuple):
    """Try again after ``delay_seconds``."""

    delay_seconds: float


class Stop(NamedTuple):
    """Try no more. ``why`` is a sentence for the log."""

    why: str


def policy_for(
    failure_class: FailureClass,
    node_policies: Mapping[FailureClass, FailurePolicy] | None,
    policy_map: PolicyMap,
) -> FailurePolicy:
    """The node's own policy for a class, else the run's, else the built-in default."""
    if node_policies is not None and failure_class in node_policies:
        return node_policies[failure_class]
    return policy_map.get(failure_class) or _DEFAULTS[failure_class]


def decide(
    failure: Failure, policy: FailurePolicy, *, attempt: int, draw: Callable[[], float] = random.random
) -> Retry | Stop:
    """Whether a failed attempt is followed by another. Pure, but for ``draw`` (uniform in 0..1).

    ``attempt`` is 1-based: attempt n was the (n-1)-th retry, so one count serves all classes. Attempts that were
    granted on top (to mend a broken contract) are not in it.
    """
    if failure.failure_class is FailureClass.TERMINAL:
        return Stop("a terminal failure is not retried")
    retries = attempt - 1
    if retries >= policy.max_retries:
        return Stop(f"gave up after {failure.attempt} attempt{'s' if failure.attempt > 1 else ''}")
    try:
        delay = min(policy.backoff_seconds * policy.multiplier**retries, policy.max_backoff_seconds)
    except OverflowError:
        delay = policy.max_backoff_seconds
    if policy.jitter:
        delay *= draw()
    asked = failure.retry_after_seconds
    if asked is not None:
        if asked > policy.max_retry_after_seconds:
            return Stop(f"the server asks to come back in {asked:.6g} s")
        delay = max(delay, asked)
    return Retry(delay)


_NO_RETRIES: Final = FailurePolicy.model_construct(max_retries=0, backoff_seconds=0.0)


def follow_up(
    failure: Failure,
    own: Mapping[FailureClass, FailurePolicy] | None,
    policy_map: PolicyMap,
    *,
    attempt: int,
    group: bool,
    repairing: bool,
    repairs: int,
    draw: Callable[[], float] = random.random,
) -> Retry | Stop:
    """:func:`decide` under the policy that holds for a node or group; what every driver asks. Pure, but for ``draw``.

    ``own``: what ``node_policies`` says of it. ``repairs``: attempts that were granted so far to mend a broken output
    contract; ``repairing``: another one is.
    """
    if own is None and group:
        # Its children had their retries; a group has its own only if asked.
        return decide(failure, _NO_RETRIES, attempt=attempt, draw=draw)
    policy = policy_for(failure.failure_class, own, policy_map)
    if repairing:
        # The attempt was granted, whatever the policy says; it only lends its delay.
        return decide(failure, policy.model_copy(update={"max_retries": 1}), attempt=1, draw=draw)
    return decide(failure, policy, attempt=attempt - repairs, draw=draw)
