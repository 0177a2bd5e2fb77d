"""Open a run in a durable store: begin an execution, continue the last one, or return its result.

All of it is one transaction: a request that is refused changes nothing and fences nobody off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from stroma._utils.text import pluralize
from stroma.checkpoint.decisions import (
    ENDED,
    GIVEN_UP,
    MESSAGE_SENT,
    OPEN,
    UNFINISHED,
    expired_error,
    has_expired,
)
from stroma.checkpoint.decoding import decode_number
from stroma.checkpoint.durable.annotations import (
    RunRecords,
    find_rejected,
    name_of,
    read_due_hooks,
    read_notes,
    read_waiting,
    require_intact,
)
from stroma.checkpoint.durable.control import (
    CANCEL,
    KINDS,
    PAUSE,
    forget_requests,
    last_number,
    request,
    to_control,
)
from stroma.checkpoint.durable.conversion import open_message, to_committed
from stroma.checkpoint.durable.integrity import input_step, lost_error
from stroma.checkpoint.durable.operations import fence_error
from stroma.checkpoint.durable.owner import Owner
from stroma.checkpoint.durable.rows import Annotation, Fence, Opening, Rows, RunEnd, RunRow, Step, StepRow
from stroma.checkpoint.entries import (
    NO_CONTROL,
    Committed,
    Discard,
    Finished,
    PriorUsage,
    RunControl,
    RunRequest,
    Tried,
)
from stroma.checkpoint.errors import CheckpointNotFound, PipelineChanged, RunBusy, RunExists, StoreError
from stroma.checkpoint.payloads import PayloadPlace, Payloads, Stored, UnencodedState
from stroma.checkpoint.queue import COMPLETE, QUEUED
from stroma.checkpoint.records import PICO, AttemptRecord
from stroma.contracts.codec import is_extended, is_same_data
from stroma.contracts.tagged_json import NotSerialisable
from stroma.failures.errors import PAUSED

#: Annotations that every opening of an existing run reads.
_OPENED: Final = (
    *(Annotation.INPUT, Annotation.ATTRIBUTION, Annotation.WAITING, Annotation.NOTE),
    *KINDS,
)
_MAX_TIMED: Final = 10_000  # attempts of a dead process whose times are read
_MAX_FAILED: Final = 1000  # failed attempts that are counted for those that follow the death of a process
#: Returns the annotations of a kind. Raises CorruptCheckpoint for a damaged one.
_Reader: TypeAlias = Callable[[Annotation], list[StepRow]]


class PriorWork(NamedTuple):
    """Records of a run that a new execution discards, and effects that it may call again.

    Attributes:
        nodes: number of committed nodes.
        questions, answers: number of questions without and with an answer.
        effects: ids of the nodes whose effect was called, in any execution.
    """

    nodes: int
    questions: int
    answers: int
    effects: tuple[str, ...]

    def refusal(self, run_id: str, status: str) -> RunExists:
        """Return the error for a run that starts again only on request."""
        counts = (
            (self.nodes, "committed node"),
            (self.questions, "open question"),
            (self.answers, "answered question"),
        )
        has_ended = status in GIVEN_UP
        lost = [] if has_ended else [pluralize(number, noun) for number, noun in counts if number]
        harm = [f"would discard {', '.join(lost)}"] if lost else []
        if self.effects:
            harm.append(f"may call the effect of {', '.join(map(repr, self.effects))} again")
        why = f"; a new execution {' and '.join(harm)}" if harm else ""
        return RunExists(
            f"run {run_id!r} {'has a recorded effect' if has_ended else 'has not ended'} ({status}){why}; "
            'pass resume=True to continue it, or if_exists="restart" to run it from the start'
        )


def is_due(run: RunRow, now_ms: int) -> bool:
    """Return True if a worker may continue a run: its owner is gone, or it stopped and its time has come."""
    if run.status == "RUNNING":
        return run.holder is None
    return run.status in UNFINISHED and run.wake_ms is not None and run.wake_ms <= now_ms


def decide(
    request: RunRequest, last: RunRow, same_input: bool, prior_work: Callable[[], PriorWork]
) -> Literal["begin", "continue", "return"]:
    """Return what to do with the last execution. Raises RunBusy, RunExists, PipelineChanged.

    Args:
        prior_work: called for a request that begins a new execution only if nothing is lost.
    """
    holder = last.holder
    if holder is not None and request.if_running != "take_over":
        what = "" if same_input else " with another input"
        left = max(last.left_seconds, 0.0)
        lease = f" (lease expires in {left:.1f} s)" if math.isfinite(left) else ""
        error = RunBusy(
            f"run {request.run_id!r} is already running{what} in {holder.place}{lease}; "
            'pass if_running="attach" to wait for its result, or use another run id'
        )
        error.holder, error.left_seconds, error.same_input = holder.place, last.left_seconds, same_input
        raise error
    if request.claim is not None and request.claim != last.claim:
        raise RunExists(
            f"run {request.run_id!r} is no longer claimed by this worker; another one may continue it"
        )
    if request.due_ms is not None and not is_due(last, request.due_ms):
        raise RunExists(f"run {request.run_id!r} is not due, its status is {last.status}; resume it instead")
    if request.if_exists == "read":
        if last.status in ("RUNNING", "INTERRUPTED", QUEUED):
            raise RunExists(
                f"run {request.run_id!r} has neither ended nor been suspended, its status is "
                f"{last.status}; wait for it"
            )
        return "return"
    if request.if_exists == "error":
        raise RunExists(
            f"run {request.run_id!r} already exists (execution {last.execution}, {last.status}); use another "
            'run id, or pass if_exists="resume", "return" or "restart"'
        )
    if request.if_exists == "new":
        lost = prior_work()
        if last.status not in GIVEN_UP or lost.effects:
            raise lost.refusal(request.run_id, last.status)
        return "begin"
    if request.if_exists == "restart":
        return "begin"
    if request.discard_from is None and not (same_input or request.any_input):
        raise PipelineChanged(
            f"run {request.run_id!r} was started with another input (or {request.schema.model.__name__} has "
            "changed); pass the same input, or use another run id"
        )
    finished = last.status in COMPLETE
    if request.if_exists == "attach":  # An owner that died is continued.
        finished = last.status != "RUNNING"
    if finished and request.if_exists in ("return", "attach"):
        return "return"
    if request.versions is not None and last.version not in ("", *request.versions):
        raise _other_version(request, last)
    return "continue"


def _other_version(request: RunRequest, last: RunRow) -> PipelineChanged:
    """Return the error for a run whose version the code cannot continue."""
    served = " and ".join(map(repr, request.versions or ())) or "no version"
    return PipelineChanged(
        f"run {request.run_id!r} started with version {last.version!r} of pipeline {last.pipeline!r}, and "
        f"this code serves {served}; resume it with code of that version, or pass "
        f"accepts=({last.version!r},) and keep its steps"
    )


@dataclass
class RunOpener:
    """Opens a run in one transaction.

    Attributes:
        opened: the DurableSession, which gets what the run has.
        opening: what is written for the request; its input is sealed for the first execution.
        plain_input: the input before encryption.
    """

    opened: Any
    payloads: Payloads
    request: RunRequest
    opening: Opening
    plain_input: Stored

    def open(self, rows: Rows) -> None:
        """Open the run. Raises RunBusy, RunExists, PipelineChanged, CheckpointLost, CorruptCheckpoint.

        Raises CheckpointNotFound for a run that was deleted since a dispatcher or a reader has found it.
        """
        opened, request, control = self.opened, self.request, NO_CONTROL
        # An earlier try may have been rolled back.
        opened.finished, opened.completed, opened.lost_start_ms, opened.waiting = None, None, None, {}
        run = rows.find(request.run_id, lock=True)
        annotations: dict[int, list[StepRow]] = {}
        if run is None or not run.execution:
            if request.due_ms is not None or request.if_exists in ("read", "continue"):
                raise CheckpointNotFound(f"run {request.run_id!r} was deleted; check the id and the store")
            action = "begin"
        else:
            annotations = self._read_annotations(rows, run)
            stored = next(iter(annotations.get(Annotation.INPUT, ())), None)
            same_input = has_same_input(stored, run, self.payloads, request, self.opening, self.plain_input)
            action = decide(
                request, run, same_input, lambda: _prior_work(RunRecords.of(rows, run, self.payloads), run)
            )
            # A queued run has its input only.
            is_queued = not (run.attempt_count or run.commit_count)
            if action != "begin" and (stored is None or not (is_queued or rows.is_complete(run))):
                raise lost_error(request.run_id, "some of its rows are missing")
        if action == "begin" or run is None:
            opening = self.opening if self.payloads.codec is None else self._seal_for_next(run)
            opened.fence, opened.version = rows.begin(run, opening), opening.version
        else:
            opened.before, is_first = run, run.status == QUEUED
            records = RunRecords.of(rows, run, self.payloads)
            # A run that was submitted without a version has that of the code which starts it.
            opened.version = run.version or (self.opening.version if is_first else "")
            self.opening = self.opening._replace(version=opened.version)

            def read(kind: Annotation) -> list[StepRow]:
                return require_intact(annotations.get(kind, ()), request.run_id)

            if action == "continue":
                control = to_control([row for kind in KINDS for row in read(kind)], request.run_id)
                opened.held = control._replace(budget={})
            self._load(records, run)
            if action == "return":
                opened.finished = Finished(run.status, self._error_of(run))
                opened.fence = _read_only_fence(run)
            elif control.cancel and run.status not in ENDED:
                # cancel() was acknowledged, and the owner stopped before it noticed.
                self._claim_to_end(records, run, Finished("CANCELLED", None))
            elif control.pause and request.is_automatic and run.status in OPEN:
                # As with a cancel; or its time has come, or its answer. Only a person takes the pause back.
                self._claim_to_end(records, run, Finished("SUSPENDED", PAUSED))
            elif run.expires_ms is not None and has_expired(run.status, run.expires_ms, rows.now_ms()):
                self._claim_to_end(records, run, Finished("FAILED", expired_error(request.run_id)))
            else:
                self._recover(records, run)
                if run.status in COMPLETE and self.request.discard_from is None:
                    opened.completed = run
                opened.control = RunControl(budget=control.budget)
            if action == "continue" and run.status == "RUNNING":
                opened.lost_start_ms = run.started_ms
            opened.continued = action == "continue" and opened.finished is None and not is_first
            self._load_annotations(records, read)

    def _read_annotations(self, rows: Rows, run: RunRow) -> dict[int, list[StepRow]]:
        """Return the annotations by kind: all are read at once, and checked on use."""
        kinds = [*_OPENED, Annotation.DUE_HOOKS] if self.request.deliver else _OPENED
        by_kind: dict[int, list[StepRow]] = {}
        for row in rows.annotations(run.run, *kinds):
            by_kind.setdefault(row.position, []).append(row)
        return by_kind

    def _load(self, records: RunRecords, run: RunRow) -> None:
        """Load usage, steps and commits of the last execution, and resolve what the request discards."""
        opened, request, rows = self.opened, self.request, records.rows
        opened.prior = PriorUsage(run.tokens, run.cost_pico / PICO, run.latency_ns / 1e6)
        if run.attempt_count:  # A queued run has none yet.
            opened.places = dict(rows.identities(run.run, run.execution))
        commits = {
            (row.position, row.branch): to_committed(
                self.payloads, request.run_id, run.execution, row, is_lazy=True
            )
            for row in (rows.steps(run.run, run.execution, request.lazily_loaded) if run.commit_count else ())
            if request.discard_from is None or row.position < request.discard_from
        }
        if request.retry_failed:
            self.request = request.resolve_discard(commits)
        opened.discards = self.request.discard_from is not None
        opened.restored = self.request.accept_commits(commits)
        discard = self.request.discard_of(commits, opened.restored)
        self.opening = self.opening._replace(discard=discard)

    def _recover(self, records: RunRecords, run: RunRow) -> None:
        """Continue the execution, or end it if its process died too often.

        A death is a run with status RUNNING whose owner has died, if that owner records its end.
        It is counted when the run is taken over, so that it costs no write before. Consecutive deaths share
        one annotation: their number, the epoch of the first one (contract), and the epoch of the session that
        counted last (schema_ref).
        """
        opened, request, rows = self.opened, self.request, records.rows
        owner = Owner.read(run.owner)
        has_died = run.status == "RUNNING" and owner is not None and owner.may_die
        deaths = (
            records.one(Annotation.DEATHS) if has_died or run.status == "FAILED" or request.force else None
        )
        number, first_epoch = 0, run.epoch
        if deaths is not None:
            number = deaths.step.number or 0
            if deaths.step.schema_ref == str(run.epoch):
                first_epoch = decode_number(deaths.step.contract, name_of(deaths, request.run_id))
        number += has_died
        if (
            not request.force
            and request.max_recoveries is not None
            and number >= request.max_recoveries
            and (has_died or deaths is not None)
        ):
            error = (
                f"poison: the process died {number} times under this run; see what kills it, then resume it "
                "with force_resume=True, or stroma resume --force"
            )
            if has_died:
                self._claim_to_end(records, run, Finished("FAILED", error))
                self._count_deaths(records, number, first_epoch)
            else:
                opened.fence = _read_only_fence(run)
                opened.finished = Finished("FAILED", self._error_of(run))
            return
        opened.fence = rows.take_over(run, self.opening)
        if request.force:
            records.delete(Annotation.DEATHS)
        elif has_died:
            self._count_deaths(records, number, first_epoch)
            if request.discard_from is None:
                (last_failed,) = rows.failed([run], _MAX_FAILED)
                failed = [one for one in reversed(last_failed) if one.epoch >= first_epoch]
                for one in failed:
                    open_message(self.payloads, request.run_id, run.execution, one)
                tried = _count_failed(failed, opened.restored)
                opened.tried = {at: _with_rejected(records, at, one) for at, one in tried.items()}

    def _claim_to_end(self, records: RunRecords, run: RunRow, finished: Finished) -> None:
        """Take the execution over only to end it: in Session.end(), or now if the caller will not call that.

        The claim fences off an owner that is only slow.
        """
        opened = self.opened
        opened.fence = records.rows.take_over(run, self.opening._replace(discard=Discard()))
        opened.finished = finished
        if not self.request.ends:
            error = records.payloads.seal_text(finished.error, records.place("error"))
            record_end(records, opened.fence, RunEnd(finished.status, error))

    def _count_deaths(self, records: RunRecords, number: int, first_epoch: int) -> None:
        step = Step(str(first_epoch), str(self.opened.fence.epoch), b"", b"", number)
        records.put(Annotation.DEATHS, "", "deaths", step)

    def _error_of(self, run: RunRow) -> str | None:
        return self.payloads.open_text(run.error, PayloadPlace(self.request.run_id, run.execution, "error"))

    def _seal_for_next(self, run: RunRow | None) -> Opening:
        """Seal the input again if it begins another execution than the first, for which it was sealed."""
        opening = self.opening
        execution = 1 if run is None else run.execution + 1
        if execution == 1:
            return opening
        assert isinstance(self.plain_input, bytes)
        sealed = self.payloads.seal_now(
            self.plain_input, PayloadPlace(self.request.run_id, execution, "input")
        )
        return opening._replace(input=input_step(self.request.schema.fingerprint, sealed))

    def _load_annotations(self, records: RunRecords, read: _Reader) -> None:
        """Take over the annotations of the execution, and delete what the request discards."""
        opened, request = self.opened, self.request
        is_claimed = opened.finished is None
        if is_claimed and (opened.held.cancel or opened.held.pause):
            forget_requests(records, CANCEL, PAUSE)  # The caller takes them back.
        opened.attribution = {row.branch: row.node_id for row in read(Annotation.ATTRIBUTION)}
        if opened.traceparent is not None and opened.lost_start_ms is not None:
            attempts, _ = records.rows.attempt_page(
                records.run, records.execution, limit=_MAX_TIMED, after=None
            )
            times: dict[tuple[int, str], tuple[int, int]] = {}
            for one in attempts:
                began, ended = times.get((one.position, one.branch), (one.started_ns, 0))
                ended = max(ended, one.started_ns + int(one.duration_ms * 1e6))
                times[one.position, one.branch] = min(began, one.started_ns), ended
            opened.lost_times = times
        if is_claimed and opened.continued and request.deliver:
            due = [read_due_hooks(records, row) for row in read(Annotation.DUE_HOOKS)]
            opened.undelivered = sorted(due, key=lambda row: row.started_ns)
        first = request.discard_from if is_claimed else None
        opened.notes = read_notes(records, read(Annotation.NOTE), first)
        for row in read(Annotation.WAITING):
            waiting = read_waiting(records, row)
            first = request.discard_from
            # Where the caller's own checkpoint goes on, what is still to be answered is asked again.
            is_asked_again = request.any_input and waiting.payload is None and waiting.effect is None
            if is_asked_again or (first is not None and waiting.position >= first):
                records.delete(Annotation.WAITING, branch=row.branch)
            else:
                opened.waiting[waiting.position, waiting.branch] = waiting


def has_same_input(
    stored: StepRow | None,
    run: RunRow,
    payloads: Payloads,
    request: RunRequest,
    opening: Opening,
    plain_input: Stored,
) -> bool:
    """Return True if the input equals the input of the last execution, or if none is recorded.

    If its class has new fields since, those have their defaults.
    """
    # A run without its input is damaged, which is reported unless the run begins anew.
    if stored is None or (opening.input is not None and stored.step.output == opening.input.output):
        return True
    # A codec may produce different bytes for equal input, and so may dicts in another order.
    try:
        require_intact([stored], request.run_id)
        place = PayloadPlace(request.run_id, run.execution, "input")
        recorded = payloads.open(stored.step.output, place, f"the input of run {request.run_id!r}")
        other = plain_input.encode() if isinstance(plain_input, UnencodedState) else plain_input
        return is_same_data(recorded, other) or (
            is_extended(other, recorded)
            and is_same_data(request.schema.encode(request.schema.decode(recorded), secrets=True), other)
        )
    except (NotSerialisable, ValueError):
        return (
            False  # A state in memory may have no stored form, and a changed class may refuse the recorded.
        )
    except StoreError:
        if request.if_exists in ("new", "restart", "error") or request.discard_from is not None:
            return False  # These do not use the old input, so an unreadable one is no error.
        raise


def release_run(records: RunRecords, session: Any) -> None:
    """Undo a claim: the run is as before, or INTERRUPTED if it had started. Raises Fenced."""
    fence, before, rows = session.fence, session.before, records.rows
    if session.finished is not None:  # It was claimed only to be ended.
        finish_execution(records, fence, RunEnd(session.finished.status, session.finished.error))
    elif before is None or before.status == "RUNNING" or session.discards:
        record_end(records, fence, RunEnd("INTERRUPTED"))
    else:
        end = RunEnd(before.status, before.error, before.wake_ms, before.updated_ms, before.cause)
        now = rows.find(records.run_id, lock=True)
        record_end(records, fence, end, None if now is None else now.wake_ms)
        if session.held.pause:
            request(records, PAUSE)
    if before is not None and before.mark is not None:
        rows.block(before, before.mark)


def finish_execution(records: RunRecords, fence: Fence, end: RunEnd, read: int | None = None) -> None:
    """Record how an execution stopped; its error is sealed here. Raises StoreError.

    ``read``: number of the last message that its session has read; None: it waited for none.
    """
    run = records.rows.find(records.run_id, lock=True) if end.status in UNFINISHED else None
    news_ms = None if run is None else run.wake_ms
    if news_ms == MESSAGE_SENT and (read is None or read == last_number(records)):
        news_ms = None
    if end.error is not None:
        end = end._replace(error=records.payloads.seal_text(end.error, records.place("error")))
    record_end(records, fence, end, news_ms)


def record_end(records: RunRecords, fence: Fence, end: RunEnd, news_ms: int | None = None) -> None:
    """Record how an execution stopped, with its error in stored form. Raises Fenced, CheckpointLost.

    ``news_ms``: from when on it is due because of what came since it was claimed, such as an answer.
    """
    if end.status in UNFINISHED:
        times = [0 if end.status == "INTERRUPTED" and end.wake_ms is None else end.wake_ms, news_ms]
        end = end._replace(wake_ms=min((ms for ms in times if ms is not None), default=None))
    elif end.wake_ms is not None:
        end = end._replace(wake_ms=None)
    if not records.rows.finish(fence, end):
        raise fence_error(records.rows, fence, records.run_id)
    if end.status == "CANCELLED":
        forget_requests(records, CANCEL)


def _read_only_fence(run: RunRow) -> Fence:
    return Fence(run.run, run.execution, run.epoch, "", 0.0)


def _count_failed(
    failed: Iterable[AttemptRecord], restored: Mapping[tuple[int, str], Committed]
) -> dict[tuple[int, str], Tried]:
    """Count the failed attempts of what is not committed. ``failed``: in the order of their ends."""
    counts: dict[tuple[int, str], Tried] = {}
    for attempt in failed:
        at = attempt.position, attempt.branch
        # A retried group retries its children from the start.
        inside = f"{attempt.branch}." if attempt.branch else ""
        for other in [
            other for other in counts if other[0] == at[0] and other != at and other[1].startswith(inside)
        ]:
            del counts[other]
        before = counts.get(at)
        if at not in restored:
            attempts, repairs = (0, 0) if before is None else before[:2]
            last = Tried(
                attempts + 1,
                repairs,
                attempt.node_id,
                attempt.failure_class or "",
                attempt.message or "",
                attempt.reason,
                attempt.error_type,
                attempt.mark,
                None if before is None else before.broken_ns,
            )
            if last.is_repaired:
                last = last._replace(repairs=repairs + 1, broken_ns=attempt.started_ns)
            counts[at] = last
    return counts


def _with_rejected(records: RunRecords, at: tuple[int, str], tried: Tried) -> Tried:
    if tried.broken_ns is None:
        return tried
    return tried._replace(rejected=find_rejected(records, *at, tried.broken_ns))


def _prior_work(records: RunRecords, run: RunRow) -> PriorWork:
    annotations = records.all(Annotation.WAITING, Annotation.EFFECT)
    is_answered = [bool(row.step.output) for row in annotations if row.position == Annotation.WAITING]
    effects = sorted(row.branch for row in annotations if row.position == Annotation.EFFECT)
    return PriorWork(run.nodes, is_answered.count(False), is_answered.count(True), tuple(effects))
