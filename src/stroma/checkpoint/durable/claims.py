"""Submit runs to a durable store, and claim them for a worker. Each is one transaction."""

from __future__ import annotations

from collections.abc import Callable

from stroma.checkpoint.decisions import check_resubmission
from stroma.checkpoint.durable.integrity import checksum
from stroma.checkpoint.durable.rows import Opening, Rows, RunRow
from stroma.checkpoint.entries import RunRequest
from stroma.checkpoint.payloads import Payloads
from stroma.checkpoint.queue import Candidate, ClaimRequest, QueueEntry, choose

__all__ = ["claim_runs", "submit_run"]


def submit_run(
    rows: Rows,
    request: RunRequest,
    opening: Opening,
    entry: QueueEntry,
    has_same_input: Callable[[Rows, RunRow], bool],
) -> bool:
    """Create a QUEUED run. Return False if it exists already, with the same pipeline and input. Raises RunExists."""
    run = rows.find(request.run_id, lock=True)
    if run is not None and run.execution:
        check_resubmission(request, run.pipeline, has_same_input(rows, run), run.execution, run.status)
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
