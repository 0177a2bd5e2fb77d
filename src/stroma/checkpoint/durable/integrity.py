"""Checks of what is read from a durable store, and errors for what is damaged or lost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, get_type_hints

from stroma.checkpoint.durable.rows import DAMAGED, Annotation, RunRow, Step
from stroma.checkpoint.errors import CheckpointLost, CorruptCheckpoint
from stroma.checkpoint.records import Attempt

__all__ = [
    "checksum",
    "is_intact",
    "lost_error",
    "parse_attempt",
    "parse_run",
    "require_undamaged",
    "storable_text",
    "verify_step",
]


_LARGEST: Final = 2**63 - 1


def lost_error(run_id: str, why: str) -> CheckpointLost:
    """Return the error for a run of which the store has lost what it acknowledged."""
    return CheckpointLost(
        f"run {run_id!r} has lost acknowledged commits: {why}; restore the store from a newer copy and resume, or begin "
        'the run anew (if_exists="restart")'
    )


def parse_run(values: Sequence[Any], run_id: str | None = None) -> RunRow:
    """Return the row of a run; if a value is of a kind that no store writes, one that says so and is DAMAGED.

    ``run_id``: where it is known from elsewhere.
    """
    row = RunRow._make(values)
    fields = zip(row._fields, row, _RUN_KINDS, strict=True)
    wrong = {name: value for name, value, kinds in fields if not _is_one(value, kinds)}
    if not wrong:
        return row
    sane = {name: _SANE.get(name, 0) for name in wrong}
    started = wrong.get("started_ms")
    if isinstance(started, float) and started < _LARGEST:
        sane["started_ms"] = int(started)
    if run_id is not None:
        sane["run_id"] = run_id
    what = ", ".join(f"{name} is {value!a:.60}" for name, value in wrong.items())
    error = f"its row in the store is damaged: {what}; delete the run"
    return row._replace(**{**sane, "status": DAMAGED, "error": error, "owner": None})


def parse_attempt(values: Sequence[Any]) -> Attempt:
    """Return an attempt; if a value is of a kind that no store writes, one that says so and is DAMAGED."""
    row = Attempt._make(values)
    fields = zip(row._fields, row, _ATTEMPT_KINDS, strict=True)
    wrong = {name: kinds for name, value, kinds in fields if not _is_one(value, kinds)}
    if not wrong:
        return row
    sane: dict[str, Any] = {
        name: 0 if kinds is _NUMBER else "" if kinds is _TEXT else None for name, kinds in wrong.items()
    }
    message = f"its row in the store is damaged: {', '.join(wrong)}"
    return row._replace(**{**sane, "outcome": DAMAGED, "failure_class": None, "message": message})


def require_undamaged(found: RunRow | None) -> RunRow | None:
    """Return the row that was found to be changed. Raises CorruptCheckpoint for a damaged one."""
    if found is not None and found.is_damaged:
        raise CorruptCheckpoint(
            f"run {found.run_id!r} cannot be used: {found.error}, then run it from the beginning"
        )
    return found


_TEXT: Final = (str,)


_TEXT_OR_NONE: Final = (str, type(None))


_NUMBER: Final = (int,)


_KINDS: Final[dict[Any, tuple[type, ...]]] = {
    Any: (object,), str: _TEXT, str | None: _TEXT_OR_NONE, int: _NUMBER, float: (int, float),
}  # fmt: skip


_RUN_KINDS: Final = tuple(_KINDS[kind] for kind in get_type_hints(RunRow).values())


_ATTEMPT_KINDS: Final = tuple(_KINDS[kind] for kind in get_type_hints(Attempt).values())


#: What stands in place of values that cannot be read. SQLite sorts texts above all numbers, so that lists, which begin
#: with the newest run, have a start that is a text before this one.
_SANE: Final[dict[str, Any]] = {
    "run_id": "?", "pipeline": "", "started_ms": _LARGEST, "updated_ms": _LARGEST, "left_seconds": -1.0,
}  # fmt: skip


def _is_one(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (
        not isinstance(value, int) or kinds is not _NUMBER or 0 <= value <= _LARGEST
    )


def checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def storable_text(value: str | None) -> str | None:
    """Text that every store can keep: an exception's message may hold a lone surrogate or a NUL."""
    if value is None or (value.isascii() and "\0" not in value):
        return value
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def is_intact(data: Any, sha: Any) -> bool:
    """Return True if the data matches its checksum. Both may be anything in a store from another source."""
    return isinstance(data, bytes) and checksum(data) == sha


def verify_step(step: Step, run_id: str, position: int, node_id: str, branch: str = "") -> None:
    """Raise CorruptCheckpoint, with the way out, if an output is not what was committed."""
    if is_intact(step.output, step.sha256):
        return
    if position == Annotation.SAVED:
        raise CorruptCheckpoint(
            f"the saved state of node {node_id!r} in run {run_id!r} is damaged; save it again"
        )
    target = f"that node (resume_from={node_id!r})"
    if branch:  # Children of groups are no targets of a resume.
        group = step.contract.partition(":")[2]
        named = repr(group) if group and "." not in branch else ""
        target = f"the outermost group around it (resume_from={named})"
    raise CorruptCheckpoint(
        f"the output of node {node_id!r} at position {position} of run {run_id!r} is damaged; resume from {target} "
        "to make it anew"
    )
