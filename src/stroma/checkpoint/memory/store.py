"""Stores in the memory of this process."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from stroma._utils.logs import get_logger
from stroma.checkpoint.blocked import block
from stroma.checkpoint.cells import MemoryCells
from stroma.checkpoint.decisions import (
    BUDGET_CHANGED,
    COMPLETE,
    ENDED,
    FORK_DUE_MS,
    MESSAGE_SENT,
    UNFINISHED,
    add_news,
    check_resubmission,
    is_due,
    not_waiting,
    other_message,
    takes_no_message,
)
from stroma.checkpoint.entries import RunControl, RunRequest, SentMessage, Waiting
from stroma.checkpoint.errors import CheckpointNotFound, CorruptCheckpoint, RunExists
from stroma.checkpoint.flow_notes import FlowCut, cut_before
from stroma.checkpoint.memory.reader import MemoryReader
from stroma.checkpoint.memory.runs import (
    MemoryRun,
    SavedState,
    position_of,
)
from stroma.checkpoint.memory.session import MemorySession
from stroma.checkpoint.queue import POSTPONED, QUEUED, Candidate, ClaimRequest, QueueEntry, choose
from stroma.contracts.contract import check_id
from stroma.contracts.schema import Schema, describe_error, schema_of
from stroma.failures.errors import BUDGET, PAUSED

__all__ = ["AsyncInMemoryStore", "InMemoryStore"]

logger = get_logger()


_POSTPONED_SECONDS = 5.0  # of a run whose owner was garbage-collected


def _request(run: MemoryRun, control: RunControl) -> None:
    """Make requests about a run hold."""
    run.control = control
    session = run.last_session()
    if session is not None and session.on_control is not None:
        session.on_control(control)


class _MemoryStore(MemoryReader, MemoryCells):
    """Base class of the sync and the async store. All calls are atomic: nothing here awaits."""

    #: Nobody has asked for this store: guards delete what ended long ago, so that memory does not grow.
    is_default = False
    _has_warned = False

    def __init__(self) -> None:
        super().__init__()
        self._runs: dict[str, MemoryRun] = {}

    def open_run(self, request: RunRequest) -> MemorySession:
        run = self._runs.get(request.run_id)
        if run is None:
            run = self._runs[request.run_id] = MemoryRun()
        return MemorySession(run, request, self._warn_of_loss)

    def _warn_of_loss(self, run_id: str) -> None:
        """Warn of the first suspended run."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "run %r is suspended in memory, and is lost when this process ends; pass a durable store, as in "
                'store="sqlite:///runs.db"',
                run_id,
                extra={"run_id": run_id},
            )

    # ---- queue

    async def submit(self, request: RunRequest, entry: QueueEntry) -> bool:
        """Create a QUEUED run, which a worker of this process starts; see DurableStore."""
        run = self._runs.get(check_id(request.run_id, "run id"))
        if run is not None and run.execution:
            same_input = run.input == request.schema.snapshot(request.initial_state)
            check_resubmission(request, run.pipeline, same_input, run.execution, run.status)
            return False
        self.open_run(request).abandon()
        run = self._runs[request.run_id]
        run.status, run.wake_ms, run.queue = QUEUED, entry.due_ms, entry
        return True

    async def claim(self, request: ClaimRequest) -> list[Candidate]:
        """Claim due runs for a worker of this process, the first ones first."""
        candidates: list[Candidate] = []
        live: dict[str, dict[str | None, int]] = {}
        for run_id, run in self._runs.items():
            last = run.last_execution()
            if last is None or run.pipeline not in request.pipelines:
                continue
            code, mark = request.code_of(run.pipeline), run.blocked
            key = run.queue.key
            if last.claim == POSTPONED:
                continue
            if last.holder is not None or last.claim is not None:
                counts = live.setdefault(run.pipeline, {})
                counts[key] = counts.get(key, 0) + 1
                continue
            is_blocked = mark is not None and mark.until_ms > request.now_ms and code.name in mark.codes
            if run.version in ("", *code.versions) and not is_blocked and is_due(last, request.now_ms):
                candidates.append(
                    Candidate(run, run_id, run.pipeline, run.queue.priority, run.wake_ms or 0, key)
                )
        chosen = choose(candidates, live, request)
        for one in chosen:
            one.run.claim_for(request.token, request.seconds)
        return chosen

    async def postpone(self, run_id: str, token: str, due_ms: int) -> None:
        """Give back a claimed run that could not be continued, and make it due at a later time."""
        run = self._runs.get(run_id)
        if run is not None and run.live_claim == token:
            run.claim = None
            if run.status in UNFINISHED:
                run.wake_ms = due_ms
            else:
                run.claim_for(POSTPONED, _POSTPONED_SECONDS)

    async def block(self, run_id: str, message: str, code: str, token: str | None, now_ms: int) -> None:
        """Mark a run as blocked for code that cannot continue it, and end the claim with this token."""
        run = self._runs.get(run_id)
        if run is None or run.session() is not None or run.live_claim not in (None, token):
            return
        run.claim = None
        if run.status in ("RUNNING", *UNFINISHED):
            run.blocked = block(run.blocked, message, code, now_ms)

    # ---- journal

    async def cancel(self, run_id: str) -> bool:
        """Ask the owner of a run to end it; a run without an owner is CANCELLED at once.

        Returns False if the run had ended. Raises CheckpointNotFound.
        """
        run = self._require_run(run_id)
        if run.session() is not None:
            _request(run, run.control._replace(cancel=True))
        elif run.status in ENDED:
            return False
        else:
            _request(run, run.control._replace(cancel=True))
            run.status, run.error, run.wake_ms, run.blocked = "CANCELLED", None, None, None
        return True

    async def pause(self, run_id: str) -> bool:
        """Ask the owner of a run to begin no further attempt; one without an owner is SUSPENDED at once.

        It stays so until somebody resumes it. Returns False if the run had ended. Raises CheckpointNotFound.
        """
        run = self._require_run(run_id)
        is_free = run.session() is None
        if is_free and run.status not in ("RUNNING", *UNFINISHED):
            return False
        _request(run, run.control._replace(pause=True))
        if is_free:
            run.status, run.error, run.wake_ms, run.blocked = "SUSPENDED", PAUSED, None, None
        return True

    async def unpause(self, run_id: str) -> bool:
        """Take a pause back: the run is due, so that a worker continues it.

        Returns False if it was not paused, or has ended. Raises CheckpointNotFound.
        """
        run = self._require_run(run_id)
        if not run.control.pause:
            return False
        run.control = run.control._replace(pause=False)
        if run.session() is None and run.status not in ("RUNNING", *UNFINISHED):
            return False
        run.wake_ms = 0
        return True

    async def set_budget(self, run_id: str, limits: Mapping[str, float]) -> bool:
        """Change limits of a run, by field of ExecutionBudget; one that waits for it is due at once.

        They hold in the present execution, also for those who resume it. Returns False if the run is
        complete. Raises CheckpointNotFound.
        """
        run = self._require_run(run_id)
        is_free = run.session() is None
        if is_free and run.status in COMPLETE:
            return False
        _request(run, run.control._replace(budget={**run.control.budget, **limits}))
        if not is_free:  # It may be about to wait for its budget.
            run.wake_ms = add_news(run.wake_ms, BUDGET_CHANGED)
        elif run.error == BUDGET:
            run.wake_ms = 0
        return True

    def is_request_pending(self, run_id: str) -> bool:
        """Return False: the owner of a run reads a request when it is made."""
        return False

    async def signal(self, run_id: str, waiting: Waiting) -> None:
        """Store the answer that a node waits for; ``waiting`` has the payload.

        Raises CheckpointNotFound, StoreError if the node is no longer waiting for an answer.
        """
        run, at = self._require_run(run_id), (waiting.position, waiting.branch)
        stored = run.waiting.get(at)
        if stored is None or stored.id != waiting.id or stored.payload not in (None, waiting.payload):
            raise not_waiting(run_id, waiting.id)
        if stored.payload is None:
            run.waiting[at], run.wake_ms = stored._replace(payload=waiting.payload), 0

    async def send(self, run_id: str, message: SentMessage) -> None:
        """Store a message to a run, which is due then if it is suspended; see DurableStore."""
        run = self._require_run(run_id)
        known = run.messages.get(message.id)
        if known is not None:
            if not known.is_same_as(message):
                raise other_message(run_id, message.id)
            return
        if run.status in ENDED:
            raise takes_no_message(run_id, run.status)
        run.last_message += 1
        run.messages[message.id] = message._replace(number=run.last_message)
        if run.status == "SUSPENDED":
            run.wake_ms = 0
        elif run.status == "RUNNING":
            run.wake_ms = add_news(run.wake_ms, MESSAGE_SENT)

    async def fork(
        self,
        run_id: str,
        new_run_id: str,
        before: int,
        *,
        edited: tuple[Schema, BaseModel] | None = None,
        state: tuple[Schema, BaseModel] | None = None,
        call: str | None = None,
    ) -> None:
        """Copy what a run committed before a position into a new run; see DurableStore. Raises CheckpointNotFound, RunExists."""
        source, run, initial = self._require_run(run_id), MemoryRun(), state
        if before and before - 1 not in source.states:
            raise CheckpointNotFound(
                f"run {run_id!r} has no output at position {before - 1}, so it cannot be forked before position {before}; fork at an earlier node"
            )
        cut: FlowCut | None = None
        if call is not None:
            calls = [
                (key[1], entry.node_id, source.calls.get(key))
                for key, entry in source.states.items()
                if isinstance(key, tuple) and key[0] == before
            ]
            cut = cut_before(run_id, call, before, calls, source.notes)
        existing = self._runs.get(check_id(new_run_id, "run id"))
        if existing is not None and existing.execution:
            raise RunExists(f"run {new_run_id!r} already exists; use another id for the fork")
        if existing is not None:
            run.states.update(existing.states)  # From save().
        for key, saved in reversed(list(source.newest_states())):
            if isinstance(key, str):
                continue
            position, branch = position_of(key)
            if position < before or (cut is not None and position == before and cut.has_call(branch)):
                copied = saved._replace(row=None)
                if edited is not None and key == before - 1:
                    copied = copied._replace(schema=edited[0], snapshot=edited[0].snapshot(edited[1]))
                elif key in source.calls:  # An edited output is not that of the call.
                    run.calls[key] = source.calls[key]
                run.states[key] = copied
        if cut is not None:
            inside = f"{before}:"
            run.notes = {
                key: data
                for key, data in source.notes.items()
                if key.startswith(inside) and cut.has_note(run_id, key, data)
            }
            run.last_message = source.last_message
            run.waiting = {
                at: one for at, one in source.waiting.items() if at[0] == before and cut.has_call(at[1])
            }
        run.places = {identity: at for identity, at in source.places.items() if at < before}
        run.execution, run.parent, run.status = 1, run_id, "INTERRUPTED"
        run.pipeline, run.schema, run.input = source.pipeline, source.schema, source.input
        run.version = source.version
        run.attribution, run.traceparent = {"session": run_id, **source.attribution}, source.traceparent
        run.start_execution()
        run.wake_ms = run.started_ms + FORK_DUE_MS
        if initial is not None:
            run.schema, run.input = initial[0], initial[0].snapshot(initial[1])
        self._runs[new_run_id] = run

    # ---- simple protocol

    def _save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        run = self._runs.setdefault(check_id(run_id, "run id"), MemoryRun())
        schema = schema_of(type(state))
        run.states.pop(check_id(node_id, "node id"), None)
        run.states[node_id] = SavedState(node_id, schema, schema.snapshot(state), schema.fingerprint, None)

    def _load(self, run_id: str, node_id: str) -> BaseModel | None:
        run = self._runs.get(run_id)
        if run is not None:
            for _, saved in run.newest_states():
                if saved.node_id == node_id:
                    return saved.schema.restore(saved.snapshot)
        return None

    def _save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        self._save(run_id, node_id, coerce(state, schema))

    def _load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        state = self._load(run_id, node_id)
        return None if state is None else as_schema(state, schema, run_id, node_id)

    def delete_now(self, run_id: str) -> None:
        """Delete a run at once; nothing happens if there is none."""
        self._delete(run_id)

    def _delete(self, run_id: str) -> None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            run.epoch += 1  # Fences off the session that has the run open.


def coerce(state: BaseModel, schema: type[BaseModel]) -> BaseModel:
    """Return a state as an instance of a schema. Raises TypeError if ``schema`` is no model, ValidationError."""
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        raise TypeError("schema must be a BaseModel type")
    return schema_of(schema).convert(state)


def as_schema(state: BaseModel, schema: type[BaseModel], run_id: str, node_id: str) -> BaseModel:
    """Return a loaded state as an instance of a schema. Raises CorruptCheckpoint if it is not one."""
    try:
        return coerce(state, schema)
    except TypeError:
        raise
    except Exception as error:
        why, cause = describe_error(error)
        raise CorruptCheckpoint(
            f"the checkpoint of node {node_id!r} in run {run_id!r} is not a {schema.__name__}: {why}; "
            "restore the schema, or run the node again"
        ) from cause


class InMemoryStore(_MemoryStore):
    """Store in the memory of this process, with sync calls. A state that is not serialisable is stored as a copy."""

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        self._save(run_id, node_id, state)

    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return self._load(run_id, node_id)

    def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        self._save_typed(run_id, node_id, state, schema)

    def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Load as an instance of ``schema``; raises CorruptCheckpoint if the state is not one."""
        return self._load_typed(run_id, node_id, schema)

    def delete(self, run_id: str) -> None:
        self._delete(run_id)


class AsyncInMemoryStore(_MemoryStore):
    """Store in the memory of this process, with async calls. The default of ``StromaRunner.quick``."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        self._save(run_id, node_id, state)

    async def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return self._load(run_id, node_id)

    async def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        self._save_typed(run_id, node_id, state, schema)

    async def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Load as an instance of ``schema``; raises CorruptCheckpoint if the state is not one."""
        return self._load_typed(run_id, node_id, schema)

    async def delete(self, run_id: str) -> None:
        self._delete(run_id)
