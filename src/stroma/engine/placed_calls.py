"""Places: nodes whose function another worker calls for the owner of the run.

The id of a call is stored before the call is sent, and deleted with the record of the attempt. So an owner
that resumes the run awaits a call in flight, and does not repeat it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from typing import Any, NamedTuple, cast

from stroma.checkpoint.decoding import RecordName, decode_json
from stroma.contracts.contract import NodeContract
from stroma.contracts.copying import Snapshot
from stroma.contracts.tagged_json import NotSerialisable
from stroma.engine.execution import RunningNode
from stroma.failures.errors import PlaceError


class OpenCall(NamedTuple):
    """A call at a place, in flight or about to start.

    Attributes:
        state: the input in stored form.
        is_sent: an earlier owner of the run has sent it, or was about to.
    """

    id: str
    state: bytes
    is_sent: bool


def place_error(caller: Any, contract: NodeContract[Any, Any]) -> PlaceError | None:
    """Return why a node with a place cannot be called in this process; None if it can.

    ``caller``: the :class:`stroma.drivers.temporal.place.TemporalCaller` of the process; None without one.
    """
    node_id, place = contract.node_id, contract.place
    if caller is None:
        return PlaceError(
            f"node {node_id!r} has place={place!r}, and this process has no Temporal client to call it "
            "with; start "
            f"`stroma worker FILE:NAME --temporal HOST:PORT --place {place}` and a worker without --place, "
            "then submit the run with `stroma submit FILE:NAME --temporal HOST:PORT`"
        )
    if place == caller.own_place:
        return PlaceError(
            f"node {node_id!r} has place={place!r}, which is the task queue that drives its runs: the run "
            "would wait for itself; pass another place, or another task queue for the runs"
        )
    return None


def open_call(run: RunningNode, contract: NodeContract[Any, Any], snapshot: Snapshot) -> OpenCall:
    """Return an earlier owner's call without a recorded end, if its input is the same; else a new one.

    Raises PlaceError for a place that cannot be called in this process, and for an input without a stored
    form.
    """
    key = _note_key(run)
    problem = place_error(run.ctx.journal.caller, contract)
    if problem is not None:
        raise problem
    assert run.schemas is not None
    schema = run.schemas[0]
    try:
        state = schema.encode(schema.restore(snapshot))
    except NotSerialisable as error:
        raise PlaceError(
            f"the input of node {run.node_id!r} cannot be sent to its place: {error}; give the node an "
            "input that JSON can hold"
        ) from error
    # Another attempt in this process is another call.
    noted = cast("dict[str, bytes]", run.ctx.session.notes).pop(key, None)
    if noted is not None:
        call_id, digest = decode_json(noted, tuple[str, str], RecordName(run.run_id, "note", key))
        if digest == _digest(state):
            return OpenCall(call_id, state, True)
    return OpenCall(f"{run.idempotency_key}:{uuid.uuid4().hex[:12]}", state, False)


def note_call(run: RunningNode, call: OpenCall | None) -> None:
    """Record that a call will be sent, or (None) is over; stored with the attempt at the latest."""
    note = None if call is None else json.dumps([call.id, _digest(call.state)]).encode()
    run.ctx.session.note(_note_key(run), note)


async def call_at_place(run: RunningNode, contract: NodeContract[Any, Any], *_: Any) -> Any:
    """Return what the function returns. A cancellation ends the call, unless the next owner needs it."""
    ctx, call, is_over = run.ctx, run.placed_call, True
    try:
        return await ctx.journal.caller.call(run, contract, call)
    except asyncio.CancelledError:
        # Otherwise this process is shut down.
        is_over = not ctx.stopping.is_cancelled or (ctx.stopping.holds and not ctx.stopping.is_paused)
        if is_over:
            await ctx.journal.caller.cancel(call)
        raise
    finally:
        if is_over:
            note_call(run, None)


def _note_key(run: RunningNode) -> str:
    return f"{run.position}:call:{run.branch}"


def _digest(state: bytes) -> str:
    return hashlib.sha256(state).hexdigest()[:32]
