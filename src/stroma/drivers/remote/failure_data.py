"""Failures as plain JSON data."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from stroma.contracts.contract import ContractViolation
from stroma.cost.budget import BudgetExceeded
from stroma.drivers.remote.wire import MAX_TEXT, FailureData, clip
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RemoteFailure, SharedBudgetExceeded
from stroma.failures.failure import Failure, isinstance_by_type
from stroma.trace.plain import jsonable

__all__ = ["decode_failure", "encode_failure"]

_ERRORS: Final = 100  # of a state that breaks its contract


def encode_failure(failure: Failure) -> FailureData:
    """Return a failure as plain data."""
    exc = failure.exception
    data: list[Any] | None = None
    if isinstance_by_type(exc, ContractViolation):
        try:
            data = _violated(exc)
        except Exception:  # Raised by a node without the usual attributes.
            data = None
    elif isinstance_by_type(exc, SharedBudgetExceeded):
        data = _shared(exc)
    elif isinstance_by_type(exc, BudgetExceeded):
        data = [exc.dimension, exc.limit, exc.actual, exc.node_id]
    kind = type(exc)
    encoded: FailureData = {
        "failure_class": failure.failure_class.value,
        "message": clip(failure.message),
        "reason": failure.reason,
        "retry_after": failure.retry_after_seconds,
        "node_id": failure.node_id,
        "attempt": failure.attempt,
        "type": exc.type_name if isinstance_by_type(exc, RemoteFailure) else kind.__name__,
        "full_name": exc.full_name if isinstance_by_type(exc, RemoteFailure) else _full_name(kind),
        "data": data,
    }
    if failure.inner is not None:
        encoded["inner"] = [failure.inner.node_id, failure.inner.attempt]
    return encoded


def _full_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _violated(exc: ContractViolation) -> list[Any]:
    raw, errors = jsonable(exc.raw), [jsonable(error) for error in exc.errors[:_ERRORS]]
    if len(json.dumps(raw)) > MAX_TEXT:
        raw = {"omitted": "too large to be sent"}
    if len(json.dumps(errors)) > MAX_TEXT:
        errors = [
            {
                name: clip(str(e[name])) if name == "msg" else e[name]
                for name in ("type", "loc", "msg")
                if name in e
            }
            for e in errors
            if isinstance(e, dict)
        ]
    data: list[Any] = json.loads(json.dumps([exc.direction, raw, errors]))
    return data


def _shared(exc: SharedBudgetExceeded) -> list[Any]:
    ends = None if exc.resets_at is None else exc.resets_at.isoformat()
    figures = [exc.limit, exc.actual, exc.reserved, exc.requested]
    return [exc.budget, exc.dimension, *figures, exc.node_id, ends, exc.capped]


def decode_failure(record: FailureData) -> Failure:
    """Return the failure of plain data. Exceptions of Stroma are restored; any other one is a RemoteFailure."""
    exc: BaseException
    data, name = record["data"], record["type"]
    if name == "ContractViolation" and data is not None:
        exc = ContractViolation(record["node_id"], data[0], data[1], data[2])
    elif name in ("BudgetExceeded", "DeadlineExceeded", "_Deadline") and data is not None:
        exc = BudgetExceeded(data[0], data[1], data[2], data[3])
    elif name == "SharedBudgetExceeded" and data is not None:
        budget, dimension, limit, actual, reserved, requested, node_id, ends, capped = data
        resets_at = None if ends is None else datetime.fromisoformat(ends)
        exc = SharedBudgetExceeded(
            budget, dimension, limit, actual, reserved, requested, node_id, resets_at, capped
        )
    elif name == "TimeoutError":
        exc = TimeoutError(record["message"])
    else:
        exc = RemoteFailure(record["message"], name, record.get("full_name"))
    failure = Failure(
        exc,
        FailureClass(record["failure_class"]),
        record["node_id"],
        record["attempt"],
        record["message"],
        record["reason"],
        record["retry_after"],
    )
    if "inner" not in record:
        return failure
    node_id, attempt = record["inner"]
    return replace(failure, inner=replace(failure, node_id=node_id, attempt=attempt))
