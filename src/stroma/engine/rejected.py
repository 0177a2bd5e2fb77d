"""Outputs that broke their contract, in the form in which they are stored.

Loaded with the first one: runs with valid outputs do not need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel

from stroma._utils.bounded_copy import BoundedCopy, map_texts
from stroma._utils.secrets import MASK, declared_secrets
from stroma.contracts.contract import ContractViolation
from stroma.contracts.repair_prompt import complaints
from stroma.engine.redaction import Redactor
from stroma.trace.rejected import MISSING, Complaint, RejectedOutput

__all__ = ["encode_rejected", "violation_of"]

_MAX_BYTES: Final = {"redacted": 64 * 1024, "full": 1024 * 1024}
_MOST_COMPLAINTS: Final = 50
_COMPLAINT_BYTES: Final = 16 * 1024
#: Separates texts that are masked together: looking for many secrets in each of many texts takes seconds.
_BETWEEN: Final = "\ue000\0\ue001"


def encode_rejected(
    output: Any, violation: ContractViolation, keep: Literal["redacted", "full"], redactor: Redactor
) -> bytes:
    """Return the stored form of an output, without secrets. Raises what the user's own classes raise."""
    schema = violation.schema
    declared = declared_secrets(schema)
    redactor.secrets.note(output, schema)
    copy = BoundedCopy(_MAX_BYTES[keep], declared.names, MASK)
    value = MASK if declared.is_whole else copy.copy(output)
    if not declared.is_whole:
        value = map_texts(value, lambda texts: [MASK if declared.reveals(text) else text for text in texts])
    errors = violation.errors[:_MOST_COMPLAINTS]
    faults = [Complaint(*one) for one in complaints(errors, schema, redactor.secrets)]
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
