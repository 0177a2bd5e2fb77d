"""Check that a flow depends only on its input and its steps, by replaying a run of it at another time."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator
from typing import Any, Final

from pydantic import BaseModel

from stroma.checkpoint import InMemoryStore, PipelineChanged
from stroma.contracts.schema import schema_of
from stroma.hooks.sets import NodeHooks
from stroma.runner.flows.flow import FlowFunction
from stroma.runner.flows.journal import REPLAY_ONLY
from stroma.runner.rehearsal import Rehearsal, missing_reply
from stroma.trace.result import ExecutionResult, RunStatus

_RUN_ID: Final = "check"
#: By how much the clock of a replay differs: in its minute, hour, day and weekday.
_SHIFT: Final = datetime.timedelta(days=1, hours=5, minutes=7, seconds=11)


async def check_flow(
    runner: Any, flow: FlowFunction[Any, Any], state: BaseModel, rehearsal: Rehearsal
) -> ExecutionResult[Any]:
    """Run a flow once, calling its steps, then replay it at another time without a call.

    ``runner``: a StromaRunner, whose module imports this one. Returns the result of the run. Raises
    PipelineChanged for the first difference, ValueError if the flow waits for something that the rehearsal
    does not give.
    """
    store, initial = InMemoryStore(), schema_of(type(state)).copy(state)
    store._has_warned = True  # Of a suspended run that is lost.
    twin = runner._twin(flow, store, run_id=_RUN_ID, hooks=NodeHooks(), inline_wait_seconds=0.0)
    first = await rehearsal.run(twin, flow, initial, resume=False)
    if first.status is RunStatus.SUSPENDED:
        raise ValueError(f"flow {flow.name!r} does not end: {missing_reply(first)}")
    recorded = store._runs[_RUN_ID]
    recorded.steps.pop(0, None)  # The output: the body is to run again.
    recorded.row = recorded.row._replace(status="INTERRUPTED")
    token = REPLAY_ONLY.set(frozenset(row.branch for row in first.trace))
    try:
        with _another_time(flow):
            second = await twin.run(flow, initial, resume=True)
    finally:
        REPLAY_ONLY.reset(token)
    if second.status is RunStatus.INTERRUPTED:
        return first  # It makes the calls that had failed, as a resume would.
    before, after = _outcome(first), _outcome(second)
    if before != after:
        raise PipelineChanged(
            f"flow {flow.name!r} ends with {after} when it is replayed, and ended with {before}; a flow may "
            "depend only on its input, its steps, and flow.now(), flow.random() and flow.uuid()"
        )
    return first


def _outcome(result: ExecutionResult[Any]) -> str:
    if result.failure is not None:
        return f"the failure {result.failure.message!r}"
    return f"suspended: {result.suspended}" if result.suspended else repr(result.final_state)


@contextlib.contextmanager
def _another_time(flow: FlowFunction[Any, Any]) -> Iterator[None]:
    """Shift ``time.time()`` and ``datetime.now()``, as far as the module of the flow's function sees them."""
    seconds, real_time, real_ns, real = _SHIFT.total_seconds(), time.time, time.time_ns, datetime.datetime

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

    class Shifted(real, metaclass=Meta):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.now(tz) + _SHIFT

        @classmethod
        def utcnow(cls) -> datetime.datetime:
            return real.now(datetime.UTC).replace(tzinfo=None) + _SHIFT

    shifted: list[tuple[Any, Any]] = [
        (real_time, lambda: real_time() + seconds),
        (real_ns, lambda: real_ns() + int(seconds * 1e9)),
        (real, Shifted),
    ]
    modules: list[Any] = [vars(time), vars(datetime), getattr(flow.body, "__globals__", {})]
    patches = [
        (names, name, new)
        for names in modules
        for name, value in names.items()
        for old, new in shifted
        if value is old
    ]
    before = [(names, name, names[name]) for names, name, _ in patches]
    try:
        for names, name, value in patches:
            names[name] = value
        yield
    finally:
        for names, name, value in before:
            names[name] = value
