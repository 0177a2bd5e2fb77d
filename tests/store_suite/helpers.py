"""Helpers of the conformance tests: states, rows, and sessions of a store."""

import itertools
from typing import Any

from pydantic import BaseModel

from stroma.checkpoint import RunRequest, Waiting
from stroma.checkpoint.identity import mark_of
from stroma.checkpoint.queue import ClaimRequest, RunLimits
from stroma.contracts.schema import Schema, schema_of
from stroma.engine.restore import read_output
from stroma.failures.classes import FailureClass
from stroma.testing.checkpoints import HARD_IDS, State, settled
from stroma.trace.events import AttemptRow, AttemptUsage, Failed

__all__ = [
    "HARD_IDS",
    "ROUNDS",
    "Other",
    "State",
    "begin",
    "commit",
    "fail",
    "finish",
    "has_codec",
    "read_texts",
    "restored",
    "row",
    "settled",
    "suspend_run",
]

_STARTS = itertools.count(1_700_000_000_000_000_000, 1_000_000)

#: Rounds of each race between two clients.
ROUNDS = 20


class Other(BaseModel):
    other: list[int] = []


def row(
    position: int = 0,
    node: str = "node",
    *,
    attempt: int = 1,
    branch: str = "",
    tokens: int = 0,
    cost: float = 0.0,
    ms: int = 0,
    failure: FailureClass | None = None,
    message: str = "",
    output: Any = None,
    schema: Schema | None = None,
) -> AttemptRow:
    """Return one attempt as the engine records it, later than the one before. ``schema``: of its output."""
    reads = schema or schema_of(State)
    return AttemptRow(
        node,
        attempt,
        next(_STARTS),
        ms * 1_000_000,
        (),
        output,
        "success" if failure is None else "failure",
        None if failure is None else Failed(failure, message, None, "ValueError"),
        AttemptUsage(tokens, tokens // 2, cost, "model" if tokens else None),
        position,
        branch,
        None,
        (reads, reads, None),
        None,
        ms * 1_000_000,
    )


async def suspend_run(store: Any, run_id: str) -> Waiting:
    """Record a SUSPENDED run; return the question of its node at position 1."""
    question = Waiting(1, "", "ask", "may I?", "module:Model")
    session = await begin(store, run_id)
    await commit(session, 0, State(n=1))
    await settled(session.suspend(row(1, "ask"), question))
    await finish(session, "SUSPENDED", "may I?")
    return question


async def read_texts(session: Any, position: int, branches: list[str]) -> dict[str, str]:
    """Return the texts of the committed states in some branches."""
    pending = session.committed(position, branches)
    commits = await settled(pending)
    read = {branch: read_output(schema_of(State), commit, None) for branch, commit in commits.items()}
    return {branch: state.text for branch, state in read.items() if isinstance(state, State)}


async def begin(store: Any, run_id: str = "run", state: BaseModel | None = None, **request: Any) -> Any:
    """Open a run; the keywords are fields of RunRequest."""
    state = State() if state is None else state
    opened = store.open_run(RunRequest(run_id, "pipeline", state, schema_of(type(state)), **request))
    return await settled(opened)


async def due_runs(store: Any, now_ms: int, pipeline: str = "pipeline", limit: int = 100) -> list[str]:
    """Return the ids of the runs that a worker would get at a time; they stay free."""
    request = ClaimRequest("look", -1.0, limit, now_ms, {pipeline: RunLimits()})
    return [one.run_id for one in await store.claim(request)]


async def commit(session: Any, position: int, state: BaseModel, node: str = "node", **facts: Any) -> None:
    """Record an attempt that committed a state."""
    schema = schema_of(type(state))
    attempt = row(position, node, output=schema.snapshot(state), schema=schema, **facts)
    await settled(session.record(attempt, schema, state))


async def fail(session: Any, position: int, node: str = "node", **facts: Any) -> AttemptRow:
    """Record an attempt that failed, and return it."""
    facts.setdefault("failure", FailureClass.RECOVERABLE)
    attempt = row(position, node, **facts)
    await settled(session.record(attempt, None, None))
    return attempt


async def finish(
    session: Any, status: str = "COMPLETED", error: str | None = None, cause: AttemptRow | None = None
) -> None:
    """End a run. ``cause``: the attempt that stopped it."""
    mark = cause and mark_of(session.epoch, cause.position, cause.started_ns, cause.attempt, cause.branch)
    await settled(session.end(status, error, cause=mark))


def restored(session: Any, model: type[BaseModel] = State) -> dict[tuple[int, str], BaseModel]:
    """Return the committed states that a session restored."""
    return {at: schema_of(model).restore(commits.output) for at, commits in session.restored.items()}


def has_codec(store: Any) -> bool:
    return getattr(getattr(store, "_payloads", None), "codec", None) is not None
