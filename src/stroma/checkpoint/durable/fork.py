"""Fork a run: copy what it committed before a position into a new run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from stroma.checkpoint.decisions import FORK_DUE_MS
from stroma.checkpoint.decoding import storable_text
from stroma.checkpoint.durable.annotations import (
    Notes,
    RunRecords,
    place_of_cause,
    read_notes,
    read_waiting,
    record_notes,
    record_waiting,
)
from stroma.checkpoint.durable.control import last_number, note_last
from stroma.checkpoint.durable.integrity import input_step, seal, verify_step
from stroma.checkpoint.durable.rows import Annotation, Opening, Rows, RunEnd, RunRow, Step, StepRow
from stroma.checkpoint.entries import OF_FLOW, StepCall
from stroma.checkpoint.errors import CheckpointNotFound, RunExists
from stroma.checkpoint.flow_notes import FlowCut, cut_before
from stroma.checkpoint.payloads import PayloadPlace, Payloads
from stroma.checkpoint.records import AttemptRecord


def fork_run(
    rows: Rows,
    payloads: Payloads,
    source: str,
    opening: Opening,
    before: int,
    edited: Step | None,
    edited_node: str | None = None,
    call: str | None = None,
) -> None:
    """Copy what a run committed before a position into a new run; ``edited`` replaces the last output.

    ``edited_node``: id of the node of that output; without it the run must have one. ``call``: copy what the
    flow at that position got before the end of this call, too; ``edited`` is then the output of the call.
    Raises CheckpointNotFound, RunExists, CorruptCheckpoint.
    """
    origin = rows.find(source)
    stored = None
    if origin is not None:
        stored = RunRecords.of(rows, origin, payloads).one(Annotation.INPUT)
    if origin is None or stored is None:
        raise CheckpointNotFound(f"there is no run {source!r} to fork; check the id and the store")
    steps = list(rows.steps(origin.run, origin.execution))
    needed = before - 1
    if edited is not None and edited_node is not None and call is None:
        steps = [row for row in steps if (row.position, row.branch) != (needed, "")]
        steps.append(StepRow(needed, "", edited_node, edited))
        needed -= 1 if before > 1 else 0
    if before and all((row.position, row.branch) != (needed, "") for row in steps):
        raise CheckpointNotFound(
            f"run {source!r} has no output at position {needed}, so it cannot be forked before position "
            f"{before}; fork at an earlier node, or give the state of that output"
        )
    existing = rows.find(opening.run_id, lock=True)
    if existing is not None and existing.execution:
        raise RunExists(f"run {opening.run_id!r} already exists; use another id for the fork")
    recorded = RunRecords.of(rows, origin, payloads)
    old, new = recorded.place, partial(PayloadPlace, opening.run_id, 1)
    if opening.input is None:
        data = payloads.move(stored.step.output, old("input"), new("input"), f"the input of run {source!r}")
        opening = opening._replace(input=input_step(stored.step.contract, data))
    cut, notes = None, dict[str, bytes]()
    if call is not None:
        notes = read_notes(recorded, recorded.all(Annotation.NOTE), None)
        calls = [(row.branch, row.node_id, _call_of(row.step)) for row in steps if row.position == before]
        stopped = _stopped_call(rows, origin, before)
        if edited is not None and stopped is not None and call == stopped[1]:
            call = stopped[0]  # Not an earlier call of the node, which has an output.
        cut = cut_before(source, call, before, calls, notes, stopped)
    steps = [
        row
        for row in steps
        if row.position < before or (cut is not None and row.position == before and cut.has_call(row.branch))
    ]
    edited_place = (before - 1, "")
    if edited is not None and cut is not None:
        edited_place = (before, cut.branch)
        outer, _, index = cut.branch.rpartition(".")
        if index.isdecimal() and not outer.rpartition(".")[2].startswith("*"):
            raise CheckpointNotFound(
                f"call {call!r} of run {source!r} is inside a group, so its output cannot be given; fork at "
                "the group"
            )
        place = PayloadPlace(opening.run_id, 1, "output", before - 1)
        output = payloads.move(
            edited.output, place, new("output", *edited_place), "the output given at the fork"
        )
        edited = edited._replace(output=output, number=OF_FLOW - cut.number)
        steps.append(StepRow(*edited_place, cut.node_id, edited))
    identities = {position: identity for identity, position in rows.identities(origin.run, origin.execution)}
    fence = rows.begin(existing, opening._replace(pipeline=origin.pipeline, version=origin.version))
    forked_ns = rows.now_ms() * 1_000_000
    steps.sort(key=lambda row: (row.position, max(0, OF_FLOW - (row.step.number or 0))))
    for number, (position, branch, node_id, step) in enumerate(steps):
        if step is not edited:
            verify_step(step, source, position, node_id, branch)
        message = None
        if edited is not None and (position, branch) == edited_place:
            message = payloads.seal_text("output given at the fork", new("message", position, branch))
            is_new = edited_node is not None or cut is not None
            step = edited if is_new else edited._replace(contract=step.contract)
        elif payloads.codec is not None:
            step = _reseal_step(payloads, step, old, new, position, branch)
        # The number keeps the order of commits, and of the calls of flows.
        attempt = AttemptRecord(
            position, forked_ns + number, branch, 1, node_id, 0, "forked", message=message
        )
        attempt.identity = identities.get(position)
        rows.commit(fence, attempt, seal(position, branch, node_id, step))
    copied = RunRecords(rows, fence.run, opening.run_id, fence.execution, payloads)
    if cut is not None:
        _copy_flow(recorded, copied, before, cut, notes)
    called = {row.branch for row in recorded.all(Annotation.EFFECT)}
    record_notes(
        copied, {(Annotation.EFFECT, row.node_id): b"called" for row in steps if row.node_id in called}
    )
    rows.update(fence.run, {"parent": source})
    copied.put(Annotation.ATTRIBUTION, "session", source)
    for row in recorded.all(Annotation.ATTRIBUTION):
        copied.put(Annotation(row.position), row.branch, row.node_id, row.step)
    why = f"forked from run {source!r} before " + (f"position {before}" if call is None else f"call {call!r}")
    error = payloads.seal_text(storable_text(why), new("error"))
    rows.finish(fence, RunEnd("INTERRUPTED", error, rows.now_ms() + FORK_DUE_MS))


def _stopped_call(rows: Rows, origin: RunRow, position: int) -> tuple[str, str] | None:
    """Return branch and node id of the call of the flow at a position whose failure stopped the run."""
    if origin.cause is None:
        return None
    at, branch = place_of_cause(origin.run_id, origin.cause)
    attempts = rows.attempts_at(origin.run, origin.execution, at, branch) if at == position and branch else ()
    return next(((branch, one.node_id) for one in attempts if one.mark == origin.cause), None)


def _call_of(step: Step) -> StepCall | None:
    return None if step.number is None else StepCall(step.number, None)


def _copy_flow(
    recorded: RunRecords, copied: RunRecords, position: int, cut: FlowCut, notes: Mapping[str, bytes]
) -> None:
    """Copy the notes about the part of a flow, and the answers that it got."""
    source = recorded.run_id
    earlier: Notes = {
        (Annotation.NOTE, key): data
        for key, data in notes.items()
        if key.startswith(f"{position}:") and cut.has_note(source, key, data)
    }
    record_notes(copied, earlier)
    # Messages to the fork have other numbers than those that the flow has got.
    note_last(copied, last_number(recorded))
    for row in recorded.all(Annotation.WAITING):
        answer = read_waiting(recorded, row)
        if answer.position == position and cut.has_call(answer.branch):
            record_waiting(copied, answer)


def _reseal_step(
    payloads: Payloads,
    step: Step,
    old: Callable[..., PayloadPlace],
    new: Callable[..., PayloadPlace],
    position: int,
    branch: str,
) -> Step:
    """Seal the payloads of a step for its place in the new run."""

    def move(stored: bytes, kind: str) -> bytes:
        what = f"the {kind} at position {position}"
        return payloads.move(stored, old(kind, position, branch), new(kind, position, branch), what)

    output = move(step.output, "output")
    input_key = None if step.input_key is None else move(step.input_key, "step input")
    return step._replace(output=output, input_key=input_key)
