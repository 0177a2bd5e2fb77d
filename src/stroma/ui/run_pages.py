"""Pages of one run: its timeline and attempts, and one attempt with its payloads."""

from __future__ import annotations

import threading
import time
from typing import Final

from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.history.bars import find_progress, in_order, place_of
from stroma.checkpoint.history.facts import is_at_work, is_interrupted, status_of
from stroma.checkpoint.history.redaction import Payload
from stroma.checkpoint.queue import COMPLETE
from stroma.checkpoint.records import FAILED, AttemptPage, AttemptRecord, RunRecord
from stroma.trace.html import cause, document, rejected_output
from stroma.trace.outline import shown_place
from stroma.trace.story import Story, awaited_topics, fields_named
from stroma.trace.timeline import LEGEND, Timeline, idle_ms
from stroma.ui.actions import can_fork, can_resume, controls_of, may_receive
from stroma.ui.answers import AnswerForm
from stroma.ui.formatting import (
    as_attachment,
    attempt_address,
    attempt_key,
    attempt_rows,
    compare_facts,
    json_file,
    restored_starts,
    state_tree,
    to_address,
)
from stroma.ui.rendering import MAX_SHOWN_BYTES, Renderer
from stroma.ui.run_view import read_limits, totals, trace_link, window_of

#: Maximum number of attempts in the table of a run's page, those listed of a run with more, and those in the
#: timeline.
_MAX_LISTED: Final = 2000
_LISTED_OF_MORE: Final = 500
_MAX_DRAWN: Final = 12_000
_MAX_ANSWERED: Final = 20  # answered questions


#: Facts beside the name of a run, and icons of those that are notes below it.
_FACTS: Final = ("due", "running", "owner", "deaths", "version", "execution")
_NOTES: Final = {
    "failed": "alert",
    "blocked": "alert",
    "answered": "check",
    "closed": "ban",
    "in flight": "ask",
    "unknown": "ask",
    "stated": "check",
    "paused": "pause",
    "waits": "hand",
    "error": "alert",
}


class RunPages:
    """Handlers of the pages of a run; each response is read from the store."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._settings, self._store, self._history = renderer.settings, renderer.store, renderer.history
        #: Held by requests that need much memory.
        self._large = threading.Lock()

    def run(self, request: Request) -> Response:
        run_id = request.query_params.get("id", "")
        return self._renderer.shared.get(
            request, run_id, lambda: self._run(request, self._renderer.find_record(request))
        )

    def _run(self, request: Request, record: RunRecord) -> Response:
        after = request.query_params.get("after")
        page, rest = self._attempts(record, after)
        listed = in_order(page.attempts)
        cause_attempt = self._cause_attempt(record)
        known = {attempt_key(attempt) for attempt in page.attempts}
        if cause_attempt is not None and attempt_key(cause_attempt) not in known:
            # The attempt that stopped the run is always on the page.
            listed = in_order([*listed, cause_attempt])
            rest = [one for one in rest if attempt_key(one) != attempt_key(cause_attempt)]
        attempts = [*listed, *rest]
        questions = self._history.store.waiting(record.run_id)
        waiting = [one for one in questions if one.payload is None]
        limits = read_limits(self._settings, record)
        run_id = record.run_id
        command = self._history.resume_text(record, self._settings.command("resume", record), attempts)
        story = self._history.outline(
            record, attempts, questions, resume_command=command, is_whole=after is None
        )
        timeline = self._timeline(request, record, attempts, story, cause_attempt)
        selected = "" if cause_attempt is None else attempt_address(record, cause_attempt)
        drawn = Markup(timeline.draw())  # It escapes all text.
        failed = sum(attempt.failure_class is not None for attempt in attempts)
        return self._renderer.page(
            "run.html",
            here="runs",
            record=record,
            status=status_of(record),
            gone=is_interrupted(record),
            facts=[fact for fact in story.facts if fact[0] in _FACTS],
            notes=self._notes(story, waiting),
            totals=totals(record, story, limits, failed),
            limits=limits,
            cause=Markup(cause(story, selected)),
            timeline=drawn,
            legend=Markup(LEGEND),
            attempts=listed,
            attempt_rows=attempt_rows(
                [(one, attempt_address(record, one)) for one in listed], restored_starts(record, listed)
            ),
            waiting=waiting,
            answers=[AnswerForm(one) for one in waiting],
            next=page.next,
            first=after is None,
            can_resume=can_resume(self._settings, record),
            selected=selected,
            resume_key=self._renderer.keys.form("resume", run_id),
            delete_key=self._renderer.keys.form("delete", run_id),
            approve_key=self._renderer.keys.form("approve", run_id),
            control_keys={action: self._renderer.keys.form(action, run_id) for action in controls_of(record)},
            working=is_at_work(record),
            command=command,
            started=request.query_params.get("started") and record.status not in ("RUNNING", *COMPLETE),
            folded=timeline.fold_idle,
            idle=idle_ms(story.bars) > 0,
            at=after,
            zoomed=timeline.window is not None,
            trace=trace_link(self._settings, run_id),
            send_key=self._renderer.keys.form("send", run_id) if may_receive(record, attempts) else "",
            topics=awaited_topics(story.waits),
        )

    @staticmethod
    def _notes(story: Story, waiting: list[Waiting]) -> list[tuple[str, str, str]]:
        """Return (label, text, icon) of the facts to show as notes, of answers the last ones.

        The form of an open question, or of a message, has what a run waits for.
        """
        has_form = bool(waiting or awaited_topics(story.waits))
        answers = [fact for fact in story.facts if fact[0] == "answered"]
        hidden = answers[:-_MAX_ANSWERED]
        return [
            (label, text, _NOTES[label])
            for label, text in story.remarks
            if label in _NOTES and not (label == "waits" and has_form) and (label, text) not in hidden
        ]

    def _attempts(self, record: RunRecord, after: str | None) -> tuple[AttemptPage, list[AttemptRecord]]:
        """Return the attempts to list, and further ones for the timeline. Reads the store once."""
        try:
            page = self._history.store.attempt_page(record.run_id, limit=_MAX_DRAWN, after=after)
        except ValueError as error:
            raise HTTPException(400, "unknown page") from error
        if page.next is None and len(page.attempts) <= _MAX_LISTED:
            return page, []
        listed, rest = page.attempts[:_LISTED_OF_MORE], page.attempts[_LISTED_OF_MORE:]
        # Of a run with more, those inside groups and flows are cells; each other one is a row.
        rows = _MAX_LISTED - _LISTED_OF_MORE
        drawn = [one for at, one in enumerate(rest) if one.branch or at < rows]
        return AttemptPage(listed, listed[-1].mark), drawn

    def _cause_attempt(self, record: RunRecord) -> AttemptRecord | None:
        """Return the attempt that stopped a run, with the size of its output, or None."""
        why = record.cause
        if why is None or record.status not in FAILED:
            return None
        there = self._store.attempts_at(record.run_id, why.position, why.branch)
        return next((one for one in there if one.mark == why.mark), None)

    def _timeline(
        self,
        request: Request,
        record: RunRecord,
        attempts: list[AttemptRecord],
        story: Story,
        cause_attempt: AttemptRecord | None,
    ) -> Timeline:
        is_first = request.query_params.get("after") is None
        addresses = {id(bar): attempt for bar, attempt in zip(story.bars, attempts, strict=True)}
        selected = None
        if cause_attempt is not None:
            key = attempt_key(cause_attempt)
            selected = next((bar for bar in story.bars if attempt_key(addresses[id(bar)]) == key), None)
        at_work = is_at_work(record) and is_first
        lineage = self._settings.served(record).lineage
        names = [] if lineage is None else lineage.top_level
        return Timeline(
            story,
            link=lambda bar: attempt_address(record, addresses[id(bar)]),
            attempt_prefix=to_address("/attempt", id=record.run_id),
            selected=selected,
            fold_idle=request.query_params.get("idle") == "folded",
            window=window_of(request.query_params),
            now_ms=time.time() * 1000 - story.first_ns / 1e6 if at_work else None,
            progress=find_progress(record, attempts, story.first_ns, names) if at_work else None,
        )

    # ------------------------------------------------------------------ one attempt

    def attempt(self, request: Request) -> Response:
        record = self._renderer.find_record(request)
        attempts, this = self._find_attempt(request, record)
        at = attempts.index(this)
        before = attempts[at - 1] if at else None
        inputs = self._history.input_of(record.run_id, this, max_bytes=MAX_SHOWN_BYTES)
        output = self._renderer.read_output(record, this)
        rejected = self._history.rejected_of(record.run_id, this)
        message = this.text or ""
        return self._renderer.page(
            "attempt.html",
            here="runs",
            record=record,
            this=this,
            place=shown_place(place_of(this)),
            attempts=[(one, attempt_address(record, one)) for one in attempts],
            input=state_tree(inputs, fields_named(message, "input")),
            output=state_tree(output, fields_named(message, "output")),
            invalid_fields=fields_named(message),
            before=None if before is None else compare_facts(before, this),
            key=this.idempotency_key(record.run_id, record.execution),
            rejected=None if rejected is None else Markup(rejected_output(rejected)),  # It escapes all text.
            in_group=bool(this.branch),
            committed=this.output_bytes is not None,
            payload=attempt_address(record, this, "/payload"),
            failure_site=self._history.failure_site_of(record.run_id, this),
            fork_key=self._renderer.keys.form("fork", record.run_id)
            if can_fork(self._settings, record, this)
            else "",
            trace=trace_link(self._settings, record.run_id),
        )

    def trace(self, request: Request) -> Response:
        """Lead to the trace of a run in the telemetry backend."""
        record = self._renderer.find_record(request)
        address = trace_link(self._settings, record.run_id)
        if address is None:
            raise HTTPException(404, "no trace of this run is known, or no --trace-url was passed")
        return RedirectResponse(address, 303)

    def _find_attempt(self, request: Request, record: RunRecord) -> tuple[list[AttemptRecord], AttemptRecord]:
        """Return all attempts at a position, and the requested one."""
        params = request.query_params
        position, _, branch = params.get("at", "").partition(".")
        if not (position.isdecimal() and position.isascii() and len(position) < 10):
            raise HTTPException(404, "this run has no such attempt; it may have been run again since")
        attempts = self._history.store.attempts_at(record.run_id, int(position), branch)
        attempts.sort(key=lambda one: one.started_ns)
        began = params.get("began")
        this = next((one for one in reversed(attempts) if began in (None, str(one.started_ns))), None)
        if this is None:
            raise HTTPException(404, "this run has no such attempt; it may have been run again since")
        return attempts, this

    def payload(self, request: Request) -> Response:
        """Return a state as a file."""
        record = self._renderer.find_record(request)
        _, this = self._find_attempt(request, record)
        side = request.query_params.get("side")
        if side not in ("input", "output", "rejected"):
            raise HTTPException(404, "side must be input, output or rejected")
        with self._large:
            if side == "rejected":
                rejected = self._history.rejected_of(record.run_id, this)
                problem = "no rejected output is stored" if rejected is None else None
                payload = Payload(None if rejected is None else rejected.to_json(), problem)
            elif side == "input":
                payload = self._history.input_of(record.run_id, this)
            else:
                payload = self._history.output_at(record.run_id, this.position, this.branch)
            if payload.problem is not None:
                raise HTTPException(404, payload.problem)
            return json_file(payload.value, f"{side}-{this.position}.json")

    def export(self, request: Request) -> Response:
        """Return the run as an HTML file."""
        if request.query_params.get("format", "") != "html":
            raise HTTPException(404, "format must be html")
        record = self._renderer.find_record(request)
        with self._large:
            command = self._history.resume_text(record, self._settings.command("resume", record))
            story = self._history.story(record, max_attempts=_MAX_LISTED, resume_command=command)
            text = document(story).encode("utf-8", "replace")
        return Response(text, media_type="text/html", headers=as_attachment("run.html"))
