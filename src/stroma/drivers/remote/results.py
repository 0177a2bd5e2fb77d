"""A report as the result that a local run gives."""

# Which keys a request or a reply has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import hashlib
import json
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import StoreError
from stroma.checkpoint.payloads import BlobStore
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState
from stroma.drivers.remote.failure_data import decode_failure
from stroma.drivers.remote.plans import KnownNodes
from stroma.drivers.remote.state import decode_inside
from stroma.drivers.remote.wire import ClassName, SegmentReport, Value
from stroma.engine.merged_models import spelled_out
from stroma.failures.classes import FailureClass
from stroma.failures.errors import RemoteFailure
from stroma.hooks.dispatch import HookNotAsync
from stroma.trace.events import NO_USAGE, AttemptUsage, TraceEvent
from stroma.trace.result import ExecutionResult, HookFailure, RunStatus
from stroma.trace.trace import ExecutionTrace

__all__ = ["Reader", "broken_of", "fetch", "no_room_error", "read_value", "result_of", "unpack"]


def no_room_error(size: int, room: int) -> StoreError:
    """Return the error of a state that is too large for the run, where there is no payload store."""
    error = StoreError(
        f"a state of {size} bytes does not fit into the run, which has room for {max(0, room)} more; pass a payload store to "
        "the worker and the client: payloads="
    )
    error.transient = False
    return error


def read_value(payloads: BlobStore | None, value: Value) -> str:
    """Return the text of a value. Raises StoreError for one whose blob cannot be read."""
    if "text" in value:
        return value["text"]
    if payloads is None:
        raise StoreError(f"a state is stored in blob {value['blob']}; pass the payload store: payloads=")
    data = payloads.get(value["blob"])
    if data is None or hashlib.sha256(data).hexdigest() != value["blob"]:
        raise StoreError(f"blob {value['blob']} is missing or damaged in {payloads!r}; restore it")
    return data.decode()


async def fetch(payloads: BlobStore | None, value: Value) -> str:
    """Return what :func:`read_value` returns, without stopping the event loop for a blob."""
    return value["text"] if "text" in value else await asyncio.to_thread(read_value, payloads, value)


def unpack(text: str) -> dict[str, Any]:
    """Return the content of a pack."""
    packed: dict[str, Any] = json.loads(text)
    return packed


class Reader:
    """Reads the events of one run."""

    def __init__(
        self, known: KnownNodes, payloads: BlobStore | None, run_id: str, values: list[Value]
    ) -> None:
        self._known = known
        self.payloads = payloads
        self._run_id = run_id
        self._values = values

    async def event(self, row: dict[str, Any]) -> TraceEvent:
        failure, used = row["failure"], row["usage"]
        children = [await self.event(child) for child in row["children"] or ()]
        for pack in row.get("packs") or ():
            packed = unpack(await fetch(self.payloads, pack))["rows"]
            children += [await self.event(child) for child in packed]
        seconds, ns = divmod(row["started_ns"], 1_000_000_000)
        input_value = self.value(row["input"])
        output_value = self.value(row["output"])
        return TraceEvent(
            node_id=row["id"],
            run_id=self._run_id,
            attempt=row["attempt"],
            timestamp_utc=datetime.fromtimestamp(seconds, UTC).replace(microsecond=ns // 1000),
            input_state={}
            if input_value is None
            else await self._state(input_value, self._known.takes(row["id"], row["position"], row["branch"])),
            output_state=None if output_value is None else await self._state(output_value, None),
            duration_ms=row["duration_ns"] // 1_000_000,
            failure=None if failure is None else FailureClass(failure[0]),
            failure_message=None if failure is None else failure[1],
            outcome=row["outcome"],
            reason=None if failure is None else failure[2],
            error_type=None if failure is None else failure[3],
            children=children,
            usage=NO_USAGE if used is None else AttemptUsage(*used),
            position=row["position"],
            branch=row["branch"],
            left_out=decode_inside(row.get("inside")),
            function_ms=row.get("function_ns", row["duration_ns"]) // 1_000_000,
        )

    def value(self, reference: Any) -> Value | None:
        """Return a state of a row, which may refer to it by number."""
        return self._values[reference] if isinstance(reference, int) else reference

    async def _state(self, value: Value, taken: ClassName | None) -> dict[str, Any]:
        text = await fetch(self.payloads, value)
        cls = value["cls"]
        if cls[0] == "raw":
            raw = schema_of(UntypedState).decode_raw(text.encode())
            return raw if isinstance(raw, dict) else {"root": raw}
        try:
            model = self._known.decode(text, taken or cls)
        except ValueError:  # Its class has changed since.
            raw = schema_of(UntypedState).decode_raw(text.encode())
            return raw if isinstance(raw, dict) else {"root": raw}
        return schema_of(type(model)).state(model)

    async def state(self, value: Value) -> BaseModel:
        return self._known.decode(await fetch(self.payloads, value), value["cls"])


async def result_of(report: SegmentReport, known: KnownNodes, payloads: BlobStore | None) -> ExecutionResult:
    """Return the result of a run with its trace. Raises StoreError if a state cannot be read."""
    reader = Reader(known, payloads, report["run_id"], report["values"])
    trace = ExecutionTrace(report["run_id"])
    for row in report["rows"]:
        trace.append(await reader.event(row))
    failure = report["failure"]
    return ExecutionResult(
        run_id=report["run_id"],
        status=RunStatus(report["status"]),
        final_state=spelled_out(await reader.state(report["final"])),
        trace=trace,
        total_cost_usd=report["cost_usd"],
        total_tokens=report["tokens"],
        failure=None if failure is None else decode_failure(failure),
        hook_errors=[
            HookFailure(hook, node_id, RemoteFailure(message, name))
            for hook, node_id, name, message in report["hook_errors"]
        ],
        unpriced_models=list(report["unpriced"]),
        suspended=list(report["suspended"]),
        failed_items=report["failed_items"],
    )


def broken_of(report: SegmentReport, result: ExecutionResult) -> HookNotAsync | None:
    """Return the programming error that ended a run and is raised by ``run()``, or None."""
    if report["broken"] is None:
        return None
    error = HookNotAsync(report["broken"][1])
    error.result = result
    return error
