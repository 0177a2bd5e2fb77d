"""Events that nodes emit, passed as JSON data to the receivers of the run.

``run`` is a RunningNode, which imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from typing import Any, Final, Protocol

from pydantic import BaseModel

from stroma.contracts.schema import schema_of
from stroma.engine.current import ATTEMPT, leave
from stroma.trace.plain import jsonable


class EventReceiver(Protocol):
    """Receives what the nodes of a run emit."""

    def emit(self, node: Any, attempt_id: str, name: str, data: Any) -> None:
        """Take an event of an attempt. Called in any thread. Never raises and never waits."""
        ...

    def flush(self) -> None:
        """Pass on pending events: the run is about to end. Never raises and never waits."""
        ...


def attempt_id_of(run: Any) -> str:
    """Return the id of the present attempt: unique in the run, also over the processes that resume it."""
    attempt_id: str | None = run.attempt_id
    if attempt_id is None:
        run.ctx.journal.attempt_count += 1
        attempt_id = run.attempt_id = f"{run.ctx.session.epoch}-{run.ctx.journal.attempt_count}"
    return attempt_id


async def mark_attempt(run: Any, awaitable: Awaitable[Any]) -> Any:
    """Await a function with the id of its attempt in its context, so that code after it emits nothing."""
    token = ATTEMPT.set((run, attempt_id_of(run)))
    try:
        return await awaitable
    finally:
        leave(token)
        del run, token  # This frame is in the traceback of what is raised: as in NodeAttempt.make().


def emit_event(run: Any, data: Any, name: str) -> None:
    """Renew idle limits and hand an event to the run's receivers. Never waits; bad data is dropped."""
    ctx, mark = run.ctx, ATTEMPT.get()
    attempt_id = run.attempt_id if mark is None or mark[0] is not run else mark[1]
    if attempt_id is None or attempt_id != run.attempt_id or run.ended is not None:
        return
    around = run
    while around is not None:
        if around.idle_timer is not None:
            around.idle_timer.renew()
        around = around.parent
    if not ctx.fire.receivers:
        return
    try:
        plain = _to_json(data)
        if ctx.redactor.is_on:
            shown = ctx.redactor.redact_state({name: plain})
            plain = _to_json(shown.get(name, shown))
    except Exception as error:
        kind = str(error) if type(error) is _NotJson else type(data).__name__
        ctx.warn_once(
            run.node_id,
            f"emits {kind}",
            f"node {run.node_id!r} emitted data that is not JSON, of type {kind}: it is dropped; emit JSON "
            "data or a pydantic model",
        )
        return
    for receiver in ctx.fire.receivers:
        receiver.emit(run, attempt_id, name, plain)


class _NotJson(TypeError):
    """The name of a type that JSON has no form for."""


def _to_json(data: Any) -> Any:
    """Return a copy of data as JSON has it. Raises an exception for data that JSON cannot hold."""
    return data if type(data) is str else json.loads(_ENCODER.encode(data))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return jsonable(schema_of(type(value)).state(value))
    raise _NotJson(type(value).__name__)


_ENCODER: Final = json.JSONEncoder(allow_nan=False, default=_plain)
