"""Checks of data from a durable store, and errors for damaged or lost data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from stroma.checkpoint.durable.rows import Annotation, Step, StepRow
from stroma.checkpoint.errors import CheckpointLost, CorruptCheckpoint
from stroma.checkpoint.payloads import UnencodedState


def lost_error(run_id: str, why: str) -> CheckpointLost:
    """Return the error for a run whose acknowledged data the store has lost."""
    return CheckpointLost(
        f"run {run_id!r} has lost acknowledged commits: {why}; restore the store from a newer copy and "
        'resume, or restart the run (if_exists="restart")'
    )


def checksum(data: bytes) -> bytes:
    """Return the SHA-256 digest of data."""
    return hashlib.sha256(data).digest()


def seal(position: int, branch: str, node_id: str, step: Step) -> Step:
    """Return a step with a checksum of its stored data and its place. Nothing damages a state in memory."""
    if isinstance(step.output, UnencodedState):
        return step
    return step._replace(sha256=_checksum_of(StepRow(position, branch, node_id, step)))


def input_step(contract: str, data: Any) -> Step:
    """Return the input of an execution as its annotation has it."""
    return seal(Annotation.INPUT, "", "", Step(contract, "", data, b""))


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
