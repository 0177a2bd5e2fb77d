"""Checks of data from a durable store, and errors for damaged or lost data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, get_type_hints

from stroma.checkpoint.durable.rows import DAMAGED, Annotation, RunRow, Step, StepRow
from stroma.checkpoint.errors import CheckpointLost, CorruptCheckpoint
from stroma.checkpoint.payloads import UnencodedState
from stroma.checkpoint.records import ATTEMPT_COLUMNS, AttemptRecord

_MAX_INT: Final = 2**63 - 1


def lost_error(run_id: str, why: str) -> CheckpointLost:
    """Return the error for a run whose acknowledged data the store has lost."""
    return CheckpointLost(
        f"run {run_id!r} has lost acknowledged commits: {why}; restore the store from a newer copy and "
        'resume, or restart the run (if_exists="restart")'
    )


def parse_run(
    values: Sequence[Any], run_id: str | None = None, others: Mapping[str, Any] = MappingProxyType({})
) -> RunRow:
    """Return the row of a run. With a value of a type that no store writes, its status is DAMAGED.

    Args:
        run_id: its id, if it is known from elsewhere.
        others: further values of the run that no store writes, by name.
    """
    row = RunRow._make(values)
    fields = zip(row._fields, row, _RUN_TYPES, strict=True)
    wrong = {name: value for name, value, types in fields if not _is_valid(value, types)}
    if not wrong and row.attempt_count and not row.execution:
        wrong = {"execution": row.execution}  # It would begin anew, as if nothing had been recorded.
    if not wrong and not others:
        return row
    defaults = {name: _DEFAULTS.get(name, 0) for name in wrong}
    started = wrong.get("started_ms")
    if isinstance(started, float) and started < _MAX_INT:
        defaults["started_ms"] = int(started)
    if run_id is not None:
        defaults["run_id"] = run_id
    what = ", ".join(f"{name} is {value!a:.60}" for name, value in {**wrong, **others}.items())
    error = f"its row in the store is damaged: {what}; delete the run"
    return row._replace(**{**defaults, "status": DAMAGED, "error": error, "owner": None})


def parse_attempt(values: Sequence[Any], epoch: int = 0, output_bytes: int | None = None) -> AttemptRecord:
    """Return the attempt of stored values. With a type that no store writes, its outcome is DAMAGED."""
    record = AttemptRecord(*values)
    record.epoch, record.output_bytes = epoch, output_bytes
    if all(map(isinstance, values, _ATTEMPT_TYPES)) and all(
        0 <= number <= _MAX_INT for number in values if isinstance(number, int)
    ):
        return record
    columns = zip(ATTEMPT_COLUMNS, values, _ATTEMPT_TYPES, strict=True)
    wrong = {name: types for name, value, types in columns if not _is_valid(value, types)}
    for name, types in wrong.items():
        setattr(record, name, 0 if types is _NUMBER else "" if types is _TEXT else None)
    record.outcome, record.failure_class, record.damaged = DAMAGED, None, True
    record.message = f"its row in the store is damaged: {', '.join(wrong)}"
    return record


def require_undamaged(run: RunRow | None) -> RunRow | None:
    """Return the row of a run. Raises CorruptCheckpoint if it is damaged."""
    if run is not None and run.is_damaged:
        raise CorruptCheckpoint(
            f"run {run.run_id!r} cannot be used: {run.error}, then run it from the beginning"
        )
    return run


_TEXT: Final = (str,)
_TEXT_OR_NONE: Final = (str, type(None))
_NUMBER: Final = (int,)
_TYPES: Final[dict[Any, tuple[type, ...]]] = {
    Any: (object,),
    str: _TEXT,
    str | None: _TEXT_OR_NONE,
    int: _NUMBER,
    int | None: (int, type(None)),
    float: (int, float),
}
_RUN_TYPES: Final = tuple(_TYPES[kind] for kind in get_type_hints(RunRow).values())
_HINTS: Final = get_type_hints(AttemptRecord)
_ATTEMPT_TYPES: Final = tuple(_TYPES[_HINTS[name]] for name in ATTEMPT_COLUMNS)
#: Values in place of those that cannot be read; 0 for all others. SQLite sorts texts above all numbers, so in
#: a list, the newest first, a start that is a text comes before this one.
_DEFAULTS: Final[dict[str, Any]] = {
    "run_id": "?",
    "pipeline": "",
    "version": "",
    "started_ms": _MAX_INT,
    "updated_ms": _MAX_INT,
    "left_seconds": -1.0,
}


def _is_valid(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (
        not isinstance(value, int) or types is not _NUMBER or 0 <= value <= _MAX_INT
    )


def checksum(data: Any) -> Any:
    """Return the SHA-256 digest of data; a state in memory, which nothing can damage, itself."""
    return data if isinstance(data, UnencodedState) else hashlib.sha256(data).digest()


def seal(position: int, branch: str, node_id: str, step: Step) -> Step:
    """Return a step with a checksum of its stored data and its place."""
    return step._replace(sha256=_checksum_of(StepRow(position, branch, node_id, step)))


def is_intact(row: StepRow) -> bool:
    """Return True if a row is unchanged since it was stored.

    Its values may have any type if the store was damaged.
    """
    try:
        return _checksum_of(row) == row.step.sha256
    except (TypeError, ValueError):  # A value has a type that no store writes.
        return False


def _checksum_of(row: StepRow) -> bytes:
    position, branch, node_id, (contract, schema_ref, output, _, number, input_key) = row
    if isinstance(output, UnencodedState):
        return b""
    key_size = None if input_key is None else len(input_key)
    head = json.dumps([position, branch, node_id, contract, schema_ref, number, key_size])
    digest = hashlib.sha256(head.encode())
    digest.update(input_key or b"")
    digest.update(output)
    return digest.digest()


def verify_input(data: Any, sha256: Any, run_id: str) -> None:
    """Raise CorruptCheckpoint if an input is not the one that was stored."""
    if not isinstance(data, bytes | UnencodedState) or checksum(data) != sha256:
        raise CorruptCheckpoint(f"the input of run {run_id!r} is damaged; start a new run with its input")


def verify_step(step: Step, run_id: str, position: int, node_id: str, branch: str = "") -> None:
    """Raise CorruptCheckpoint, with the way to recompute it, if an output is not the committed one."""
    if is_intact(StepRow(position, branch, node_id, step)):
        return
    if position == Annotation.SAVED:
        raise CorruptCheckpoint(
            f"the saved state of node {node_id!r} in run {run_id!r} is damaged; save it again"
        )
    target = f"that node (resume_from={node_id!r})"
    if branch:  # A child of a group cannot be the target of a resume.
        group = step.contract.partition(":")[2]
        group_name = repr(group) if group and "." not in branch else ""
        target = f"the outermost group around it (resume_from={group_name})"
    raise CorruptCheckpoint(
        f"the output of node {node_id!r} at position {position} of run {run_id!r} is damaged; resume from "
        f"{target} to recompute it"
    )
