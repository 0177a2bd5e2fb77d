"""Submit runs to a durable store, and claim them for a worker. Each is one transaction."""

from __future__ import annotations

from stroma.checkpoint.decisions import check_resubmission
from stroma.checkpoint.durable.integrity import checksum
from stroma.checkpoint.durable.rows import Opening, Rows
from stroma.checkpoint.durable.session_open import has_same_input
from stroma.checkpoint.entries import RunRequest
from stroma.checkpoint.payloads import Payloads, Stored
from stroma.checkpoint.queue import Candidate, ClaimRequest, QueueEntry, choose

__all__ = ["claim_runs", "submit_run"]


def submit_run(
    rows: Rows, payloads: Payloads, request: RunRequest, opening: Opening, data: Stored, entry: QueueEntry
) -> bool:
    """Create a QUEUED run. Return False if it exists with the same pipeline and input. Raises RunExists."""
    run = rows.find(request.run_id, lock=True)
    if run is not None and run.execution:
        is_same = has_same_input(rows, run, payloads, request, opening, data)
        check_resubmission(request, run.pipeline, is_same, run.execution, run.status)
        return False
    rows.enqueue(rows.begin(run, opening), entry)
    return True


def claim_runs(rows: Rows, payloads: Payloads, request: ClaimRequest) -> list[Candidate]:
    """Claim due runs for a worker, the first ones first; see :func:`stroma.checkpoint.queue.choose`."""
    limited = [name for name, limits in request.pipelines.items() if any(one is not None for one in limits)]
    for name in sorted(limited):  # Of two workers that count live runs, one waits for the other.
        _, _ = rows.read_cell(f"stroma claims of {name}", lock=True)
    candidates = [one for name in request.pipelines for one in rows.candidates(name, request)]
    counted = {*limited, *(one.pipeline for one in candidates if one.key is not None)}
    chosen = choose(candidates, {name: rows.live_runs(name) for name in counted}, request)
    if not chosen:
        return []
    for name in limited:
        rows.write_cell(f"stroma claims of {name}", request.token.encode())
    claimed = rows.claim(chosen, request.token, request.seconds)
    inputs = rows.inputs_of(chosen)
    if not inputs:
        return claimed
    return [one._replace(input=_plain_input(payloads, *inputs[one.run])) for one in claimed]


def _plain_input(payloads: Payloads, data: bytes, sha256: bytes) -> bytes | None:
    """Return an input that needs no decoding; damage is reported when the run is opened."""
    return data if payloads.is_plain(data) and checksum(data) == sha256 else None
