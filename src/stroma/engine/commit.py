"""Commits: the row of an attempt, and its store call, which must be finished."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel

from stroma._utils.access import type_name
from stroma._utils.bounded_copy import BoundedCopy, map_texts
from stroma._utils.secrets import MASK, declared_secrets
from stroma.checkpoint import StoreError
from stroma.contracts.contract import ContractViolation
from stroma.contracts.copying import Snapshot
from stroma.contracts.tagged_json import NotSerialisable
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RunningNode
from stroma.engine.redaction import Redactor
from stroma.engine.tasks import Shield, as_store_error
from stroma.failures.failure import Failure, ends_run
from stroma.failures.tracebacks import failure_site_writer
from stroma.trace.events import AttemptRow, Failed, Outcome
from stroma.trace.rejected import MISSING, Complaint, RejectedOutput

#: Between tries of a commit that the store refused.
_STORE_DELAYS: Final = (0.02, 0.1, 0.4)


def record_failure_site(run: RunningNode, begin: int, failure: Failure) -> None:
    """Record the place of the failure beside the attempt."""
    if run.children is None and failure.exception.__traceback__ is not None:
        try:
            run.ctx.session.record_failure_site(
                run.position,
                run.branch,
                run.attempt,
                begin + run.ctx.journal.epoch_ns,
                failure_site_writer(failure.exception),
            )
        except Exception as error:  # Its source, its file name: anything can be odd.
            run.ctx.run_logger.debug("the traceback of node %r is not recorded: %r", run.node_id, error)


def record_rejected(
    run: RunningNode, begin: int, snapshot: Snapshot, output: Any, violation: Exception
) -> None:
    """Record an output that broke its contract beside the attempt, in the session and the trace."""
    ctx = run.ctx
    keep = ctx.config.keep_rejected
    if keep == "no" or not isinstance(violation, ContractViolation):
        return
    try:
        ctx.redactor.note_attempt(snapshot)
        data = encode_rejected(output, violation, keep, ctx.redactor)
        place = run.position, run.branch, begin + ctx.journal.epoch_ns
        ctx.trace.record_rejected(*place, data)
        ctx.session.record_rejected(*place, data)
    except BaseException as error:  # The output is of any class, and redact is the user's.
        if ends_run(error):
            raise
        ctx.run_logger.debug("the rejected output of node %r is not recorded: %r", run.node_id, error)


def failed_of(failure: Failure, outcome: Outcome | None = None) -> Failed:
    """Return the record of a failure for a row. A suspension has a reason, but no type of exception."""
    error_type = None if outcome == "suspended" else type_name(failure.exception)
    return Failed(failure.failure_class, failure.message, failure.reason, error_type)


async def settle(
    ctx: ReliabilityContext,
    row: AttemptRow | RunningNode,
    pending: Awaitable[None] | Exception | None,
    again: Callable[[], Awaitable[None] | Exception | None],
    *,
    repeats: bool = True,
) -> tuple[Exception | None, asyncio.CancelledError | None]:
    """Finish a store call, and repeat one that the store refuses temporarily, unless ``repeats`` is False.

    Return the reason of a final refusal, and a cancellation of the task in the meantime.
    """
    shield = Shield()
    delays = iter(_STORE_DELAYS if repeats else ())
    while True:
        error = await shield.finish(pending) if isinstance(pending, Awaitable) else pending
        if error is None or isinstance(error, NotSerialisable):
            return error, shield.cancellation
        delay = None if isinstance(error, StoreError) and not error.transient else next(delays, None)
        if delay is None:
            break
        ctx.run_logger.warning(
            "the store refused attempt %d of node %r: %s; trying again", row.attempt, row.node_id, error
        )
        await shield.finish(asyncio.sleep(delay))
        pending = again()
    if isinstance(error, StoreError):
        return error, shield.cancellation
    wrapped = StoreError(f"the store could not record node {row.node_id!r} of run {ctx.run_id!r}: {error}")
    wrapped.__cause__ = error
    return wrapped, shield.cancellation


async def store_notes(run: RunningNode) -> tuple[Exception | None, asyncio.CancelledError | None]:
    """Store the notes of the session now. Return the same as :func:`settle`."""

    def flush() -> Awaitable[None] | Exception | None:
        try:
            return run.ctx.session.flush()
        except BaseException as error:
            return as_store_error(error)

    return await settle(run.ctx, run, flush(), flush)


_MAX_BYTES: Final = {"redacted": 64 * 1024, "full": 1024 * 1024}
_MOST_COMPLAINTS: Final = 50
_COMPLAINT_BYTES: Final = 16 * 1024
#: Separates texts that are masked together: looking for many secrets in each of many texts takes seconds.
_BETWEEN: Final = "\ue000\0\ue001"


def encode_rejected(
    output: Any, violation: ContractViolation, keep: Literal["redacted", "full"], redactor: Redactor
) -> bytes:
    """Return the stored form of an output, without secrets. Raises what the user's own classes raise."""
    from stroma.contracts.repair_prompt import complaints  # Runs with valid outputs do not need it.

    schema = violation.schema
    declared = declared_secrets(schema)
    redactor.secrets.note(output, schema)
    copy = BoundedCopy(_MAX_BYTES[keep], declared.names, MASK)
    value = MASK if declared.is_whole else copy.copy(output)
    if not declared.is_whole:
        value = map_texts(value, lambda texts: [MASK if declared.reveals(text) else text for text in texts])
    errors = violation.errors[:_MOST_COMPLAINTS]
    faults = [Complaint(*one) for one in complaints(errors, violation.raw, schema, redactor.secrets)]
    whole = RejectedOutput(value, copy.is_cut, tuple(faults), len(violation.errors) - len(errors))
    if keep == "redacted":
        whole = redactor.hide_rejected(whole)
    return _fitted(_masked(whole, redactor), _MAX_BYTES[keep]).encode()


def violation_of(node_id: str, rejected: RejectedOutput, schema: type[BaseModel]) -> ContractViolation:
    """Return the violation that a stored output stands for, with masked and perhaps cut values."""
    errors: list[dict[str, Any]] = []
    for one in rejected.complaints:
        value = rejected.at(one.path)
        error = {"type": "missing"} if value is MISSING else {"type": "recorded", "input": value}
        errors.append({**error, "loc": one.path, "msg": one.message})
    raw = rejected.value if isinstance(rejected.value, dict) else {"value": rejected.value}
    violation = ContractViolation(node_id, "output", raw, errors)
    violation.schema = schema
    return violation


def _masked(whole: RejectedOutput, redactor: Redactor) -> RejectedOutput:
    """Return an output without the secrets that the run has met."""

    def mask(texts: Sequence[str]) -> list[str]:
        masked = redactor.mask(_BETWEEN.join(texts)).split(_BETWEEN)
        # Else a secret, or a text, has what separates them in it.
        return masked if len(masked) == len(texts) else [MASK] * len(texts)

    plain = [[list(one.path), one.message] for one in whole.complaints]
    value, plain = map_texts([whole.value, plain], mask)
    return whole._replace(
        value=value, complaints=tuple(Complaint(tuple(path), message) for path, message in plain)
    )


def _fitted(whole: RejectedOutput, max_bytes: int) -> RejectedOutput:
    """Return an output cut to so many bytes; complaints have a quarter of the smaller limit."""
    few: list[Complaint] = []
    size = 0
    for one in whole.complaints:
        size += len(RejectedOutput(None, False, (one,)).encode())
        if size > _COMPLAINT_BYTES:
            break
        few.append(one)
    more = whole.more + len(whole.complaints) - len(few)
    empty = RejectedOutput(None, True, tuple(few), more)
    copy = BoundedCopy(max_bytes - len(empty.encode()))
    value = copy.copy(whole.value)
    return empty._replace(value=value, is_cut=whole.is_cut or copy.is_cut)
