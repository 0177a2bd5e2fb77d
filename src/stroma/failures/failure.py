"""Failure classes, retry policies, and the pure decision whether to try again."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeGuard, TypeVar, final

from stroma._utils.access import cause_of, context_of, kind_of, members_of, message_of
from stroma._utils.logs import get_logger
from stroma._utils.text import typed
from stroma.contracts.contract import ContractViolation
from stroma.contracts.tagged_json import NotSerialisable
from stroma.cost.budget import BudgetExceeded
from stroma.cost.usage import UsageError
from stroma.failures.classes import FailureClass
from stroma.failures.errors import CircuitOpen, LimitError, PlaceError, WaitedTooLong, WorkerLost, verdict_of
from stroma.failures.providers import read_provider_error

logger = get_logger()


@dataclass
class NodeContext:
    """The place of a failure, for classifiers. ``attempt`` is 1-based."""

    node_id: str
    attempt: int
    run_id: str


StepContext = NodeContext
Classifier = Callable[[Exception, NodeContext], FailureClass | None]


@final
@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt.

    Attributes:
        exception: the exception that the node raised, or that stopped it.
        failure_class: its one class.
        node_id: the node that failed.
        attempt: 1-based.
        message: ``str(exception)``, or the type's name where that is empty or raises; without secrets, and
            without the values that ``RunConfig.redact`` removes from states. Journals, logs, traces and
            exporters have this message. ``str(failure)`` is for people, and has the type in front.
        reason: a stable word for the cause, such as "rate_limit" or "contract"; None if unknown.
        retry_after_seconds: the wait that a server asked for.
        inner: the failure of the node inside that stopped a group; None for a node.
        earlier: the newest output of an earlier attempt that broke its contract, for ``as_prompt()``.
        mark: :attr:`stroma.checkpoint.records.AttemptRecord.mark` of the attempt that stopped the node, of
            the child's for a group; None if no attempt was made, or another one follows.
    """

    exception: BaseException
    failure_class: FailureClass
    node_id: str
    attempt: int
    message: str
    reason: str | None = None
    retry_after_seconds: float | None = None
    inner: Failure | None = field(default=None, repr=False, compare=False)
    earlier: ContractViolation | None = field(default=None, repr=False, compare=False)
    mark: str | None = field(default=None, repr=False, compare=False)

    @property
    def innermost(self) -> Failure:
        """The failure of the node inside that stopped a group; of a node its own."""
        return self.inner or self

    def __str__(self) -> str:
        """Return the failure as people read it: ``Type: message``."""
        return typed(kind_of(self.exception), self.message)

    def as_prompt(self, *, max_chars: int = 2000) -> str | None:
        """Return the corrections for the model as text; None if no output of this node broke its contract.

        They are those of the newest such output: a rate limit in between does not lose them. See
        :meth:`stroma.ContractViolation.as_prompt`.
        """
        newest = self.exception if isinstance_by_type(self.exception, ContractViolation) else self.earlier
        return None if newest is None else newest.as_prompt(max_chars=max_chars)


E = TypeVar("E", bound=BaseException)


def isinstance_by_type(exc: BaseException, kind: type[E]) -> TypeGuard[E]:
    """Return True for an instance, without reading ``__class__``: a hostile exception may raise there."""
    return issubclass(type(exc), kind)


def ends_run(error: BaseException) -> bool:
    """Return True if a validator's or classifier's exception is the end of this run or process, no failure.

    Neither awaits, so a CancelledError is one of its own. A panic of native code is an error of a validator.
    """
    kind = type(error)
    ours = issubclass(kind, (Exception, CancelledError)) or kind.__module__ == "pyo3_runtime"
    return not ours


def classify(
    exc: Exception, context: NodeContext, classifiers: Sequence[Classifier] | None = None
) -> FailureClass:
    """Return the one class of an exception: custom classifiers in order, then provider errors, then defaults.

    A classifier that raises, or answers with no FailureClass, is logged and skipped.

    Args:
        exc: the exception to classify.
        context: the node, attempt and run in which it was raised.
        classifiers: custom classifiers.
    """
    return diagnose(exc, context, classifiers).failure_class


def diagnose(
    exc: BaseException,
    context: NodeContext,
    classifiers: Sequence[Classifier] | None = None,
    run_logger: logging.LoggerAdapter[logging.Logger] = logger,
) -> Failure:
    """Classify an exception and keep what its shape says of the reason and the wait.

    ``run_logger``: gets what a classifier raises.
    """
    known = verdict_of(exc)
    if known is not None:
        kind, reason, seconds = known[:3]
        return Failure(exc, kind, context.node_id, context.attempt, message_of(exc), reason, seconds)
    provider = read_provider_error(exc)
    custom = _ask(exc, context, classifiers, run_logger) if classifiers else None
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


#: Of our own errors and a timeout. The first that fits counts.
_MEANINGS: Final[tuple[tuple[type[BaseException], tuple[FailureClass, str]], ...]] = (
    (ContractViolation, (FailureClass.TERMINAL, "contract")),
    (BudgetExceeded, (FailureClass.RECOVERABLE, "budget")),
    (UsageError, (FailureClass.TERMINAL, "usage")),
    (NotSerialisable, (FailureClass.TERMINAL, "not_serialisable")),
    (TimeoutError, (FailureClass.RECOVERABLE, "timeout")),
    (LimitError, (FailureClass.TERMINAL, "limit")),
    (WaitedTooLong, (FailureClass.RECOVERABLE, "limit")),
    (CircuitOpen, (FailureClass.RECOVERABLE, "circuit_open")),
    (PlaceError, (FailureClass.TERMINAL, "place")),
    (WorkerLost, (FailureClass.RECOVERABLE, "worker_lost")),
)


def _built_in(exc: BaseException) -> tuple[FailureClass | None, str | None]:
    # By type, not isinstance: that asks the object for its __class__, which an exception may answer by
    # raising.
    kind = type(exc)
    if _is_bug(exc):
        return FailureClass.TERMINAL, "bug"
    for base, meaning in _MEANINGS:
        if issubclass(kind, base):
            return meaning
    return None, None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its causes and contexts, and the exceptions in a group."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        cause = pending.pop(0)
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        pending += [cause_of(cause), context_of(cause), *members_of(cause)]


#: Exceptions that only a mistake in the program causes, so that another attempt fails as this one did.
_BUGS: Final = (NameError, ImportError, SyntaxError, NotImplementedError, RecursionError)


def _is_bug(exc: BaseException) -> bool:
    """Return whether an exception, or each leaf of an exception group, is a mistake in the program."""
    leaves = [exc]
    while leaves:
        leaf = leaves.pop()
        if issubclass(type(leaf), BaseExceptionGroup):
            leaves.extend(members_of(leaf))
        elif not issubclass(type(leaf), _BUGS):
            return False
    return True


def _ask(
    exc: BaseException,
    context: NodeContext,
    classifiers: Sequence[Classifier],
    logger: logging.LoggerAdapter[logging.Logger],
) -> FailureClass | None:
    for classifier in classifiers:
        try:
            answer = classifier(exc, context)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            if answer is not None:
                return FailureClass(answer)
        except BaseException as error:
            if ends_run(error):
                raise
            logger.warning(
                "classifier %r raised for node %r; it is skipped",
                classifier,
                context.node_id,
                exc_info=True,
                extra={"run_id": context.run_id},
            )
    return None
