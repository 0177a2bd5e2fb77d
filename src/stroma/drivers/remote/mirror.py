"""Copy of a run in a journal store, written when it has ended or is suspended, for the command line and web interface.

The truth is the driver's. A run is copied to the store when no process works on it any more, so that no local
runner takes it for an orphaned run (``recover()``).
"""

# Which keys a value has depends on where it stands.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, Final, cast

from pydantic import BaseModel

from stroma._utils.logs import get_logger
from stroma._utils.text import typed
from stroma.checkpoint import PipelineChanged, RunRequest, Session, Waiting
from stroma.contracts.schema import Schema, schema_of
from stroma.drivers.remote.results import Reader, fetch, unpack
from stroma.drivers.remote.state import decode_inside
from stroma.drivers.remote.wire import SegmentReport
from stroma.failures.classes import FailureClass
from stroma.trace.events import NO_USAGE, AttemptRow, AttemptUsage, Failed
from stroma.trace.result import RunStatus

__all__ = ["mirror"]

logger = get_logger()
#: Attempts of one run that are written; a map of more items leaves the others out.
_MOST: Final = 5_000


async def mirror(
    store: Any, report: SegmentReport, reader: Reader, initial: BaseModel, tags: tuple[str, ...]
) -> None:
    """Write a run, or a segment of it, to a journal store. Raises StoreError."""
    try:
        session = await _open(store, report, initial, tags, "resume" if report["segment"] else "restart")
    except PipelineChanged:  # The store has another run of that id, or an earlier segment was never written.
        session = await _open(store, report, initial, tags, "restart")
    writer = _Writer(session, report, reader)
    for row in report["rows"]:
        await writer.write(row, None)
    failure = report["failure"]
    why = (
        "; ".join(report["suspended"]) or None
        if failure is None
        else typed(failure["type"], failure["message"])
    )
    await _done(session.end(report["status"], why))
    if writer.left_out:
        logger.warning(
            "%d attempts of run %r are not copied to the store", writer.left_out, report["run_id"],
            extra={"run_id": report["run_id"]},
        )  # fmt: skip


async def _open(
    store: Any, report: SegmentReport, initial: BaseModel, tags: tuple[str, ...], if_exists: Any
) -> Session:
    request = RunRequest(
        report["run_id"],
        report["pipeline"],
        initial,
        schema_of(type(initial)),
        if_exists,
        if_running="take_over",
        tags=tags,
    )
    return cast("Session", await _done(store.open_run(request)))


async def _done(pending: Any) -> Any:
    return await pending if inspect.isawaitable(pending) else pending


class _Writer:
    def __init__(self, session: Session, report: SegmentReport, reader: Reader) -> None:
        self._session = session
        self._reader = reader
        self._waiting = {(w["position"], w["branch"]): w for w in report["waiting"]}
        self._written = 0
        self.left_out = 0

    async def write(self, row: dict[str, Any], group: str | None) -> None:
        """Write a row after its children, in the order of the engine."""
        for child in row["children"] or ():
            await self.write(child, row["id"])
        for pack in row.get("packs") or ():
            for child in unpack(await fetch(self._reader.payloads, pack))["rows"]:
                await self.write(child, row["id"])
        self._written += 1
        if self._written > _MOST and group is not None:
            self.left_out += 1
            return
        failure = row["failure"]
        mirrored = AttemptRow(
            row["id"], row["attempt"], row["started_ns"], row["duration_ns"], {}, None, row["outcome"],
            None if failure is None else Failed(FailureClass(failure[0]), *failure[1:]),
            _usage_of(row), row["position"], row["branch"], group, None, None,
            row.get("function_ns", row["duration_ns"]),
        )  # fmt: skip
        waits = self._waiting.get((row["position"], row["branch"]))
        if row["outcome"] == "suspended" and waits is not None:
            request = Waiting(
                waits["position"], waits["branch"], waits["node_id"], waits["reason"], waits["schema_ref"]
            )
            await _done(self._session.suspend(mirrored, request))
            return
        schema: Schema | None = None
        output: BaseModel | None = None
        value = self._reader.value(row["output"])
        if value is not None:
            output = await self._reader.state(value)
            schema = schema_of(type(output))
        await _done(self._session.record(mirrored, schema, output))


def _usage_of(row: dict[str, Any]) -> AttemptUsage | None:
    """Return the usage of an attempt with the steps inside it, which have no rows."""
    used, inside = row["usage"], decode_inside(row.get("inside"))
    usage = None if used is None else AttemptUsage(*used)
    if inside is None:
        return usage
    usage = usage or NO_USAGE
    return replace(
        usage,
        tokens=usage.tokens + sum(tokens for _, tokens, *_ in inside.figures),
        output_tokens=usage.output_tokens + sum(output for _, _, output, *_ in inside.figures),
        cost_usd=usage.cost_usd + sum(cost for _, _, _, cost, *_ in inside.figures),
    )


def is_mirrored(status: str) -> bool:
    """Return True if a local runner does not recover a run of this status by itself."""
    return status not in ("RUNNING", RunStatus.INTERRUPTED)
