"""Reading the runs of one store, redacted."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from stroma._utils.text import clean
from stroma.checkpoint.decisions import OPEN
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.entries import NOT_DONE, Waiting
from stroma.checkpoint.errors import CheckpointNotFound, CorruptCheckpoint
from stroma.checkpoint.history.bars import (
    bar_of,
    failed_input,
    first_start_ns,
    in_order,
    open_waits,
    resumes_of,
    wait_bars,
)
from stroma.checkpoint.history.comparison import Change, NodeDiff, changes, compare
from stroma.checkpoint.history.facts import elapsed_seconds, facts_of, is_plain_code, status_of, unanswered
from stroma.checkpoint.history.redaction import Payload, decode_payload, redact_value, too_large
from stroma.checkpoint.history.run_graph import RunGraph
from stroma.checkpoint.identity import is_called, place_before
from stroma.checkpoint.records import FAILED, AttemptRecord, RunPage, RunQuery, RunRecord
from stroma.contracts.schema import has_secrets
from stroma.failures.tracebacks import FailureSite
from stroma.trace.events import place_text
from stroma.trace.redaction import Redact, hide_rejected
from stroma.trace.rejected import RejectedOutput
from stroma.trace.story import Bar, StopCause, Story

_MAX_STATE_BYTES: Final = 1_000_000  # of one state in a drawing
_MAX_STATES_BYTES: Final = 20_000_000  # of all states in a drawing of a run
_ATTEMPT_PAGE_SIZE: Final = 5000
_NOT_COMMITTED: Final = "nothing is committed here"

#: The id of a map, with the name of the field that holds its items.
_MAP: Final = re.compile(r"map_over\((.+?), ")


def _now_ms(record: RunRecord) -> int:
    """Return until when a run is drawn: now, or its last record if it has ended."""
    return time.time_ns() // 1_000_000 if record.status in OPEN else record.updated_ms


@dataclass(frozen=True, slots=True)
class History:
    """Reads one store. Every method raises StoreError.

    Attributes:
        redact: see RunConfig; applied to every state that is returned. Messages were redacted when they were
            recorded.
    """

    store: AsyncStates
    redact: Redact | None = None

    # ------------------------------------------------------------------ runs

    def page(self, query: RunQuery, limit: int, after: str | None = None) -> RunPage:
        """Return a page of the runs that match a query; its statuses are those of :func:`status_of`.

        Raises ValueError if ``after`` is not from a page.
        """
        statuses = query.statuses
        if "INTERRUPTED" in statuses:
            query = replace(query, statuses=(*statuses, "RUNNING"))
        page = self.store.run_page(query, limit=limit, after=after)
        return RunPage([one for one in page.runs if not statuses or status_of(one) in statuses], page.next)

    def runs(self, query: RunQuery, limit: int) -> list[RunRecord]:
        """Return at most ``limit`` runs that match a query, the newest first."""
        runs: list[RunRecord] = []
        after = None
        while len(runs) < limit:
            page = self.page(query, limit - len(runs), after)
            runs += page.runs
            after = page.next
            if after is None:
                break
        return runs

    def answer_of(self, one: Waiting, max_bytes: int | None = None) -> Payload:
        """Return the answer to a question; of the call of an effect, its stated output or "not done"."""
        if one.payload is None or not one.is_answered:
            return Payload(None, "it is not answered")
        return Payload("not done") if one.payload == NOT_DONE else self._decode(one.payload, max_bytes)

    def answer_text(self, one: Waiting) -> str:
        """Return the answer to a question as text."""
        value, problem = self.answer_of(one, _MAX_STATE_BYTES)
        return clean(problem or json.dumps(value, ensure_ascii=False), 300)

    def describe_answer(self, one: Waiting) -> str:
        """Return an answered question and its answer; of the call of an effect, what was stated."""
        node, answer = clean(one.node_id, 100), self.answer_text(one)
        if one.effect is None or not one.is_answered:
            return f'{node} asked "{clean(one.reason, 500)}": {answer}'
        what = "did not happen" if one.payload == NOT_DONE else f"happened: {answer}"
        return f"{node}: a person stated that call {one.effect.number} {what}"

    def flow_waits(
        self,
        record: RunRecord,
        attempts: Sequence[AttemptRecord],
        waiting: Sequence[Waiting] | None = None,
        first_ns: int | None = None,
    ) -> list[Bar]:
        """Return the waits of a run's flows as bars beside those of its attempts.

        ``waiting``: the questions of the run, if they were read before. ``first_ns``: start of the drawing;
        the first attempt by default.
        """
        if waiting is None:
            waiting = self.store.waiting(record.run_id)
        branches = [*(one.branch for one in attempts), *(one.branch for one in waiting)]
        if attempts and not any(map(is_called, branches)):
            return []  # Without a flow, a store need not be asked for more.
        notes = self.store.flow_notes(record.run_id)
        first_ns = first_start_ns(record, attempts) if first_ns is None else first_ns
        return wait_bars(waiting, notes, first_ns, _now_ms(record))

    # ------------------------------------------------------------------ attempts

    def attempts(self, run_id: str, limit: int = sys.maxsize) -> tuple[list[AttemptRecord], bool]:
        """Return the first attempts of the last execution, without outputs, and True if there are more."""
        attempts: list[AttemptRecord] = []
        after = None
        while len(attempts) < limit:
            most = min(limit - len(attempts), _ATTEMPT_PAGE_SIZE)
            page = self.store.attempt_page(run_id, limit=most, after=after)
            attempts += page.attempts
            after = page.next
            if after is None:
                break
        return in_order(attempts), after is not None

    def run_graph(self, pipeline: str, max_runs: int | None = None) -> RunGraph:
        """Return the graph of the recorded runs of a pipeline, or of the newest ``max_runs``."""
        graph = RunGraph(pipeline)
        after = None
        while True:
            page = self.store.run_page(
                RunQuery(pipeline=pipeline), limit=min(max_runs or 50, 50), after=after
            )
            for record in page.runs:
                attempts, _ = self.attempts(record.run_id, sys.maxsize)
                first_ns = min((one.started_ns for one in attempts), default=0)
                bars = [bar_of(one, first_ns) for one in attempts]
                graph.add_run(bars, self.flow_waits(record, attempts), status_of(record))
                if graph.runs == max_runs:
                    return graph
            after = page.next
            if after is None:
                return graph

    # ------------------------------------------------------------------ states

    def output_at(
        self, run_id: str, position: int, branch: str = "", *, max_bytes: int | None = None
    ) -> Payload:
        """Return the committed output at a place, without its content above ``max_bytes``."""
        try:
            data = self.store.output_of(run_id, position, branch)
        except CorruptCheckpoint as error:
            return Payload(None, str(error))
        return Payload(None, _NOT_COMMITTED) if data is None else self._decode(data, max_bytes)

    def input_at(self, run_id: str, position: int, *, max_bytes: int | None = None) -> Payload:
        """Return the input of a position: the output before it, or the input of the run."""
        if position:
            before = self.output_at(run_id, position - 1, max_bytes=max_bytes)
            if before.problem == _NOT_COMMITTED:
                return Payload(None, "the output before it is no longer in the store")
            return before
        try:
            return self._decode(self.store.input_of(run_id), max_bytes)
        except (CorruptCheckpoint, CheckpointNotFound) as error:
            return Payload(None, str(error))

    def input_of(self, run_id: str, attempt: AttemptRecord, *, max_bytes: int | None = None) -> Payload:
        """Return the input of an attempt. Use :class:`Inputs` for many attempts of one run."""
        return Inputs(self, run_id).of(attempt, max_bytes)

    def call_input(self, run_id: str, position: int, branch: str) -> Payload | None:
        """Return the input of a call of a flow; None if none is recorded."""
        try:
            data = self.store.call_input_of(run_id, position, branch)
        except CorruptCheckpoint as error:
            return Payload(None, str(error))
        if data is None:
            data = failed_input(self.store.flow_notes(run_id), position, branch)
        return None if data is None or has_secrets(data) else self._decode(data)

    def rejected_of(self, run_id: str, attempt: AttemptRecord) -> RejectedOutput | None:
        """Return the output that broke its contract in an attempt; None if none is stored.

        In place of a damaged one, its value is the error: the rest of the run is still shown.
        """
        if attempt.output_bytes is not None or attempt.outcome not in ("failure", "suspended"):
            return None
        try:
            rejected = self.store.rejected_of(run_id, attempt.position, attempt.branch, attempt.started_ns)
        except CorruptCheckpoint as error:
            return RejectedOutput(f"[{error}]", True, ())
        return None if rejected is None else hide_rejected(self.redact, rejected)

    def failure_site_of(self, run_id: str, attempt: AttemptRecord) -> FailureSite | None:
        """Return where an attempt failed, if it is the latest failure at its place and is not damaged."""
        if attempt.failure_class is None:
            return None
        try:
            site = self.store.failure_site_of(run_id, attempt.position, attempt.branch)
        except CorruptCheckpoint:  # The rest of the attempt is still shown.
            return None
        return site if site is not None and site.started_ns == attempt.started_ns else None

    def output_of(self, attempt: AttemptRecord, *, max_bytes: int | None = None) -> Payload:
        """Return the output that an attempt was read with, without its content above ``max_bytes``."""
        if attempt.damaged:
            return Payload(None, "the output is damaged")
        if attempt.output is None:
            return Payload(None, "it committed nothing")
        return self._decode(attempt.output, max_bytes)

    def _decode(self, data: bytes, max_bytes: int | None = None) -> Payload:
        payload = decode_payload(data, max_bytes)
        return payload if payload.problem is not None else Payload(redact_value(self.redact, payload.value))

    def compare(self, a: RunRecord, b: RunRecord) -> tuple[list[Change], list[NodeDiff]]:
        """Return the differences between the inputs of two runs, and their nodes in pairs."""
        inputs = [self.input_at(record.run_id, 0).shown for record in (a, b)]
        attempts = [self.store.attempts(record.run_id) for record in (a, b)]
        return changes(*inputs), compare(attempts[0], attempts[1], self.output_of)

    # ------------------------------------------------------------------ drawing

    def facts(self, record: RunRecord) -> list[tuple[str, str]]:
        """Return (label, text) of each fact about a run beside its attempts."""
        run_id = record.run_id
        questions = self.store.waiting(run_id)
        return list(facts_of(record, self.store.facts_of(run_id), questions, self.describe_answer))

    def outline(
        self,
        record: RunRecord,
        attempts: Sequence[AttemptRecord],
        waiting: Sequence[Waiting] | None = None,
        *,
        resume_command: str = "",
        is_whole: bool = True,
    ) -> Story:
        """Return what every drawing of a run shows, without the states of its attempts.

        ``waiting``: the questions of the run, if they were read before. ``is_whole``: the attempts begin
            with the first one; without it, waits and resumes are left out.
        """
        waiting = self.store.waiting(record.run_id) if waiting is None else waiting
        facts = self.store.facts_of(record.run_id)
        first_ns = first_start_ns(record, attempts, has_deaths=is_whole and facts.deaths > 0)
        waits = self.flow_waits(record, attempts, waiting, first_ns) if is_whole else []
        return Story(
            run_id=record.run_id,
            pipeline=record.pipeline,
            status=status_of(record),
            bars=[bar_of(one, first_ns) for one in attempts],
            tokens=record.tokens,
            cost_usd=record.cost_usd,
            began_ms=record.started_ms,
            seconds=elapsed_seconds(record),
            box=self._cause_box(record, resume_command),
            facts=list(facts_of(record, facts, waiting, self.describe_answer)),
            waits=waits,
            resumes=resumes_of(attempts, waits, facts.effects.values(), first_ns) if is_whole else (),
            open_waits=open_waits(record, attempts, unanswered(waiting)) if is_whole else {},
            first_ns=first_ns,
        )

    def story(
        self, record: RunRecord, *, max_attempts: int = 5000, states: bool = True, resume_command: str = ""
    ) -> Story:
        """Return what a drawing of a run shows by itself, its first attempts with their idempotency keys.

        ``states``: include answers, and the input and output of each attempt, except large ones.
        """
        attempts, has_more = self.attempts(record.run_id, max_attempts)
        story = self.outline(record, attempts, resume_command=resume_command)
        for bar, attempt in zip(story.bars, attempts, strict=True):
            bar.idempotency_key = attempt.idempotency_key(record.run_id, record.execution)
        if states:
            self._add_states(record, story, attempts)
        elif story.box is not None:
            story = replace(story, box=replace(story.box, rejected=None))
        facts = [fact for fact in story.facts if states or fact[0] != "answered"]
        return replace(story, left_out=1 if has_more else 0, facts=facts)

    def resume_text(
        self, record: RunRecord, command: str, attempts: Sequence[AttemptRecord] | None = None
    ) -> str:
        """Return how to resume a run that failed: a command, or of plain code the keywords for its program.

        ``attempts``: some of its own, if they were read before.
        """
        if attempts is None:
            attempts = self.store.attempt_page(record.run_id, limit=1).attempts
        return f"run_id={record.run_id!r}, resume=True" if is_plain_code(attempts) else command

    def _cause_box(self, record: RunRecord, resume_command: str) -> StopCause | None:
        """Return the box of the cause that stopped a run; None if no failure did."""
        cause = record.cause
        if cause is None or record.status not in FAILED:
            return None
        return StopCause(
            cause.node_id,
            place_text(cause.position, cause.branch),
            cause.attempt,
            str(cause.failure_class),
            cause.text or record.error or "",
            cause.reason,
            resume_command,
            self.rejected_of(record.run_id, cause) if cause.reason == "contract" else None,
        )

    def _add_states(self, record: RunRecord, story: Story, attempts: list[AttemptRecord]) -> None:
        inputs = Inputs(self, record.run_id, attempts)
        free_bytes = _MAX_STATES_BYTES
        for bar, attempt in zip(story.bars, attempts, strict=True):
            bar.rejected = self.rejected_of(record.run_id, attempt)
            payload = inputs.of(attempt, _MAX_STATE_BYTES)
            bar.input_state = payload.value if payload.problem is None else {"omitted": payload.problem}
            size = attempt.output_bytes
            if size is not None and size <= min(_MAX_STATE_BYTES, free_bytes):
                free_bytes -= size
                bar.output_state = self.output_at(record.run_id, attempt.position, attempt.branch).value
            elif size is not None:
                bar.output_state = {"omitted": f"{size:,} bytes"}


class Inputs:
    """The inputs of a run's attempts, as far as the store has them; each is read once.

    A child of a group has the input of its group, an item of a map that item of it, and a child of a sequence
    the output of the one before it.

    Args:
        attempts: attempts whose groups need not be looked up.
    """

    def __init__(self, history: History, run_id: str, attempts: Iterable[AttemptRecord] = ()) -> None:
        self._history = history
        self._run_id = run_id
        #: The id of the group around each place with a known attempt.
        self._groups = {(one.position, one.branch): one.group_id for one in attempts}
        self._payloads: dict[tuple[int, str], Payload] = {}

    def of(self, attempt: AttemptRecord, max_bytes: int | None = None) -> Payload:
        """Return the input of an attempt, without its content above ``max_bytes``."""
        self._groups[attempt.position, attempt.branch] = attempt.group_id
        payload = self._at(attempt.position, attempt.branch)
        if max_bytes is None or payload.problem is not None:
            return payload
        size = len(json.dumps(payload.value))
        return payload if size <= max_bytes else too_large(size)

    def _at(self, position: int, branch: str) -> Payload:
        place = position, branch
        if place not in self._payloads:
            self._payloads[place] = self._read(position, branch)
        return self._payloads[place]

    def _read(self, position: int, branch: str) -> Payload:
        if not branch:
            return self._history.input_at(self._run_id, position, max_bytes=_MAX_STATES_BYTES)
        call_input = self._history.call_input(self._run_id, position, branch) if is_called(branch) else None
        if call_input is not None:
            return call_input
        outer, _, index = branch.rpartition(".")
        group = self._group_around(position, branch)
        if group is None and is_called(branch):
            return Payload(None, "the input of this call is not recorded")
        if group is None:
            return Payload(
                None,
                "the group around it has not ended, so its part of the group's input is not recorded yet",
            )
        before = place_before(branch, group)
        if before is not None:
            return self._history.output_at(self._run_id, position, before, max_bytes=_MAX_STATES_BYTES)
        group_input = self._at(position, outer)
        match = _MAP.match(group)
        if match is None or group_input.problem is not None:
            return group_input
        items = group_input.value.get(match[1]) if isinstance(group_input.value, dict) else None
        if not isinstance(items, list) or not index.isdecimal() or int(index) >= len(items):
            return Payload(None, f"it is an item of {match[1]}, which is not in the state")
        return Payload(items[int(index)])

    def _group_around(self, position: int, branch: str) -> str | None:
        place = position, branch
        if place not in self._groups:
            attempts = self._history.store.attempts_at(self._run_id, position, branch)
            self._groups[place] = attempts[-1].group_id if attempts else None
        return self._groups[place]
