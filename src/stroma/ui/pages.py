"""Pages: read the data of each and render its template."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, short_id
from stroma.checkpoint.cells import CellStore
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.history import (
    FINISHED,
    NOT_STOPPED,
    History,
    Payload,
    bar_of,
    changes,
    compare,
    in_order,
    is_interrupted,
    place_of,
    status_of,
)
from stroma.checkpoint.records import AttemptRecord, RunQuery, RunRecord
from stroma.failures.classes import FailureClass
from stroma.failures.tracebacks import FailureSite
from stroma.limits.rate_limit import read_cooldowns
from stroma.telemetry.otlp_json import otlp_spans
from stroma.trace.gantt import gantt, idle_ms
from stroma.trace.html import cause, document, head, utc
from stroma.trace.result import RunStatus
from stroma.trace.story import Bar, StopCause, Story, fields_named
from stroma.ui.actions import can_resume, controls_of
from stroma.ui.figures import RUNS, figures_of
from stroma.ui.formatting import (
    as_attachment,
    attempt_address,
    attempt_key,
    cause_text,
    compare_facts,
    compress,
    duration_text,
    json_file,
    mark_controls,
    parse_search,
    restored_starts,
    side_by_side,
    state_tree,
    to_address,
    to_json,
    tone_of,
)
from stroma.ui.overview import BUCKETS, Overview
from stroma.ui.security import IMAGE_POLICY

if TYPE_CHECKING:
    from stroma.ui.security import Keys
    from stroma.ui.settings import Settings

__all__ = ["Pages"]

_PAGE_SIZE: Final = 50
#: Maximum number of attempts on the page of a run.
_MAX_DRAWN: Final = 2000
#: Larger payloads are not shown, only downloadable.
_MAX_SHOWN_BYTES: Final = 1_000_000
_MAX_EXPORTED: Final = 100_000
_SPANS: Final = (1, 7, 30)  # days
_MAX_SUMMED: Final = 200_000  # attempts
_STATUSES: Final = ["RUNNING", *RunStatus]
_MAX_TEXT: Final = 4000  # characters of a parameter


class Pages:
    """Handlers of pages; each response is read from the store."""

    def __init__(self, settings: Settings, history: History, keys: Keys) -> None:
        self._settings = settings
        self._history = history
        self._store = settings.store
        self._keys = keys
        #: Held by requests that need much memory.
        self._large = threading.Lock()
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=select_autoescape(default=True, default_for_string=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=mark_controls,
        )
        self._templates.filters |= {
            "clean": clean, "money": format_usd, "count": format_tokens, "span": format_duration, "took": duration_text, "tone": tone_of, "json": to_json, "short": short_id, "when": utc,
        }  # fmt: skip
        self._templates.globals |= {
            "to": to_address,
            "store_name": settings.name,
            "pipeline_name": settings.pipeline,
            "cooldowns": self._cooldowns,
        }

    def _page(self, template: str, code: int = 200, /, **values: Any) -> Response:
        text = self._templates.get_template(template).render(**values)
        # Stored text may contain lone surrogates, which UTF-8 cannot encode.
        return HTMLResponse(text.encode("utf-8", "replace"), code)

    def _cooldowns(self) -> dict[str, str]:
        """Return the limits in the store that are closed, and for how long."""
        if not isinstance(self._store, CellStore) or not self._store.exists():
            return {}
        try:
            closed = read_cooldowns(self._store)
        except StoreError:  # A damaged limit is reported where it is used.
            return {}
        return {
            name: f"for another {format_duration(ms / 1000)}" if ms else "until a call succeeds"
            for name, ms in closed.items()
        }

    def problem(self, status: int, what: str, more: str) -> Response:
        return self._page("problem.html", status, what=what, more=more)

    # ------------------------------------------------------------------ runs

    def runs(self, request: Request) -> Response:
        params = request.query_params
        text = params.get("q", "")[:_MAX_TEXT].strip()
        status, kind, after = params.get("status", ""), params.get("class", ""), params.get("after")
        if status not in ("", "failed", *_STATUSES) or kind not in ("", *FailureClass):
            raise HTTPException(400, "unknown status or class")
        if not self._store.exists():
            return self._empty()
        query = parse_search(text, status, kind)
        try:
            page = self._history.page(query, _PAGE_SIZE, after)
        except ValueError as error:
            raise HTTPException(400, "unknown page") from error
        records = page.runs
        if text and after is None and query.text is not None:
            # Ids are looked up by prefix, so that old runs are included.
            known = {record.run_id for record in records}
            records = [record for record in self._by_id(text) if record.run_id not in known] + records
        if not records and query == RunQuery() and after is None:
            return self._empty()
        return self._page(
            "runs.html", runs=[self._row(record) for record in records], q=text, status=status, kind=kind,
            statuses=_STATUSES, classes=list(FailureClass), next=page.next, first=after is None, looked=not records and page.next,
        )  # fmt: skip

    def _empty(self) -> Response:
        return self._page("empty.html", command=self._settings.command("run", "FILE.py:NAME"))

    def _by_id(self, text: str) -> list[RunRecord]:
        try:
            ids = [] if text == "last" else self._store.find_run(text, limit=10)
        except ValueError:  # Not a valid id.
            return []
        return [record for run_id in ids if (record := self._history.run(run_id)) is not None]

    def _row(self, record: RunRecord) -> dict[str, Any]:
        return {
            "record": record,
            "status": status_of(record),
            "seconds": max(0, record.updated_ms - record.started_ms) / 1000,
            "failures": f"{record.failures}+" if record.failures >= 20 else str(record.failures or ""),
            "why": cause_text(record),
        }

    # ------------------------------------------------------------------ one run

    def _record(self, request: Request, name: str = "id") -> RunRecord:
        run_id = request.query_params.get(name, "")
        try:
            record = self._history.run(run_id) if self._store.exists() else None
        except ValueError:
            record = None
        if record is None:
            raise HTTPException(404, "unknown run")
        return record

    def run(self, request: Request) -> Response:
        record = self._record(request)
        after = request.query_params.get("after")
        try:
            page = self._history.attempt_page(record.run_id, _MAX_DRAWN, after)
        except ValueError as error:
            raise HTTPException(400, "unknown page") from error
        attempts = in_order(page.attempts)
        known = {attempt_key(attempt) for attempt in attempts}
        cause_attempt = None
        if record.cause is not None:
            # The attempt that stopped the run is always on the page.
            place = self._history.attempts_at(record.run_id, record.cause.position, record.cause.branch)
            cause_attempt = next(
                (a for a in reversed(place) if a.attempt == record.cause.attempt and a.failure_class), None
            )
            if cause_attempt is not None and attempt_key(cause_attempt) not in known:
                attempts = in_order([*attempts, cause_attempt])
        first = min((attempt.started_ns for attempt in attempts), default=0)
        bars = [(bar_of(attempt, first), attempt, attempt_address(record, attempt)) for attempt in attempts]
        waiting = self._history.waiting(record.run_id)
        waits = self._history.flow_waits(record, attempts, waiting) if after is None else []
        story = self._story(record, [bar for bar, _, _ in bars])
        selected = (
            None
            if cause_attempt is None or record.status in NOT_STOPPED
            else bar_of(cause_attempt, first).key
        )
        addresses = {bar.key: address for bar, _, address in bars}
        folded = request.query_params.get("idle") == "folded"
        chart = gantt(
            story.bars, waits, link=lambda bar: addresses[bar.key], selected=selected, fold_idle=folded
        )
        page_response = self._page(
            "run.html", record=record, status=status_of(record), gone=is_interrupted(record), head=Markup(head(story)),
            cause=Markup(cause(story)), gantt=Markup(chart), attempts=[(one, address, bar.at) for bar, one, address in bars],
            waiting=[one for one in waiting if one.payload is None], next=page.next, first=after is None,
            restored=restored_starts(record, attempts), can_resume=can_resume(self._settings, record),
            resume_key=self._keys.form("resume", record.run_id), delete_key=self._keys.form("delete", record.run_id),
            effect_key=self._keys.form("effect", record.run_id),
            control_keys={action: self._keys.form(action, record.run_id) for action in controls_of(record)},
            command=self._resume_command(record), folded=folded, idle=idle_ms(story.bars) > 0, at=after,
        )  # fmt: skip
        return compress(request, page_response)

    def _story(self, record: RunRecord, bars: list[Bar]) -> Story:
        box, why = None, record.cause
        if why is not None and record.status not in NOT_STOPPED:
            at = f"{why.position}.{why.branch}" if why.branch else str(why.position)
            message = why.text or record.error or ""
            box = StopCause(
                why.node_id,
                at,
                why.attempt,
                why.failure_class,
                message,
                why.reason,
                self._resume_command(record),
            )
        facts = [("tags", ", ".join(record.tags))] if record.tags else []
        if record.execution > 1:
            facts.append(("execution", str(record.execution)))
        if record.holder is not None:
            facts.append(("owner", record.holder))
        seconds = max(0, record.updated_ms - record.started_ms) / 1000
        return Story(
            record.run_id, record.pipeline, status_of(record), bars, record.tokens, record.cost_usd, record.started_ms, seconds, box,
            tuple(facts),
        )  # fmt: skip

    def _resume_command(self, record: RunRecord) -> str:
        if record.status in FINISHED:
            return ""
        return self._settings.command("resume", record.run_id, "FILE.py:NAME")

    # ------------------------------------------------------------------ one attempt

    def attempt(self, request: Request) -> Response:
        record = self._record(request)
        attempts, this = self._find_attempt(request, record)
        at = attempts.index(this)
        before = attempts[at - 1] if at else None
        inputs = self._history.input_of(record.run_id, this, max_bytes=_MAX_SHOWN_BYTES)
        output = self._read_output(record, this)
        side = "input" if "(input)" in (this.message or "")[:_MAX_TEXT] else "output"
        invalid_fields = fields_named(this.text or "")
        return self._page(
            "attempt.html", record=record, this=this, place=place_of(this), attempts=[(one, attempt_address(record, one)) for one in attempts],
            input=state_tree(inputs, invalid_fields if side == "input" else []), output=state_tree(output, invalid_fields if side == "output" else []),
            invalid_fields=invalid_fields, before=None if before is None else compare_facts(before, this), key=this.idempotency_key(record.run_id, record.execution),
            in_group=bool(this.branch), committed=this.output_bytes is not None,
            payload=attempt_address(record, this, "/payload"), failure_site=self._failure_site(record, this),
        )  # fmt: skip

    def _failure_site(self, record: RunRecord, this: AttemptRecord) -> FailureSite | None:
        """Return where this attempt failed, if it is the latest failure at its position."""
        if this.failure_class is None:
            return None
        site = self._store.failure_site_of(record.run_id, this.position, this.branch)
        return site if site is not None and site.started_ns == this.started_ns else None

    def _find_attempt(self, request: Request, record: RunRecord) -> tuple[list[AttemptRecord], AttemptRecord]:
        """Return all attempts at a position, and the requested one."""
        params = request.query_params
        position, _, branch = params.get("at", "").partition(".")
        if not (position.isdecimal() and position.isascii() and len(position) < 10):
            raise HTTPException(404, "unknown attempt")
        attempts = self._history.attempts_at(record.run_id, int(position), branch)
        attempts.sort(key=lambda one: one.started_ns)
        this = next((one for one in attempts if str(one.started_ns) == params.get("began")), None)
        if this is None:
            raise HTTPException(404, "unknown attempt")
        return attempts, this

    def _read_output(self, record: RunRecord, this: AttemptRecord) -> Payload:
        if this.output_bytes is None:
            invalid_fields = this.reason == "contract" and "(output)" in (this.message or "")[:_MAX_TEXT]
            return Payload(
                None,
                "no output"
                + (": an output that breaks its contract is not stored" if invalid_fields else ""),
            )
        if this.output_bytes > _MAX_SHOWN_BYTES:
            return Payload(None, f"{this.output_bytes:,} bytes, too large to show")
        return self._history.output_at(record.run_id, this.position, this.branch)

    def payload(self, request: Request) -> Response:
        """Return a state as a file."""
        record = self._record(request)
        _, this = self._find_attempt(request, record)
        side = request.query_params.get("side")
        if side not in ("input", "output"):
            raise HTTPException(404, "side must be input or output")
        with self._large:
            if side == "input":
                payload = self._history.input_of(record.run_id, this)
            else:
                payload = self._history.output_at(record.run_id, this.position, this.branch)
            if payload.problem is not None:
                raise HTTPException(404, payload.problem)
            return json_file(payload.value, f"{side}-{this.position}.json")

    def export(self, request: Request) -> Response:
        """Return the run as an HTML or OTLP file."""
        record = self._record(request)
        with self._large:
            return self._export(record, request.query_params.get("format", ""))

    def _export(self, record: RunRecord, form: str) -> Response:
        if form == "html":
            story = self._history.story(
                record, max_attempts=_MAX_DRAWN, resume_command=self._resume_command(record)
            )
            text = document(story).encode("utf-8", "replace")
            return Response(text, media_type="text/html", headers=as_attachment("run.html"))
        if form != "otlp":
            raise HTTPException(404, "format must be html or otlp")
        attempts, _ = self._history.attempts(record.run_id, _MAX_EXPORTED)
        return json_file(otlp_spans(record, attempts), "run-otlp.json")

    # ------------------------------------------------------------------ two runs, and the pipeline

    def compare(self, request: Request) -> Response:
        params = request.query_params
        if not params.get("b"):
            return self._page("compare.html", a=self._record(request, "a"), b=None)
        a, b = self._record(request, "a"), self._record(request, "b")
        sides = [self._history.attempts(record.run_id, _MAX_DRAWN) for record in (a, b)]
        owners = {
            id(attempt): record
            for (attempts, _), record in zip(sides, (a, b), strict=True)
            for attempt in attempts
        }

        def read(attempt: AttemptRecord) -> Payload:
            return self._read_output(owners[id(attempt)], attempt)

        nodes = compare(sides[0][0], sides[1][0], read)
        inputs = [self._history.input_at(record.run_id, 0, max_bytes=_MAX_SHOWN_BYTES) for record in (a, b)]
        started = changes(
            *(payload.value if payload.problem is None else payload.problem for payload in inputs)
        )
        return self._page(
            "compare.html", a=a, b=b, input=started, more=sides[0][1] or sides[1][1],
            nodes=[side_by_side(one) for one in nodes],
            seconds=[max(0, record.updated_ms - record.started_ms) / 1000 for record in (a, b)],
        )  # fmt: skip

    def overview(self, request: Request) -> Response:
        text = request.query_params.get("days", "7")
        if text not in map(str, _SPANS):
            raise HTTPException(400, "days must be 1, 7 or 30")
        days = int(text)
        bucket_ms = days * 86_400_000 // BUCKETS
        now_ms = time.time_ns() // 1_000_000
        first = now_ms // bucket_ms - BUCKETS
        tallies = self._store.tally(first * bucket_ms, bucket_ms) if self._store.exists() else []
        it = Overview.of(tallies)
        capped = it.total.attempts >= _MAX_SUMMED
        return self._page(
            "overview.html", it=it, days=days, spans=_SPANS, chart=it.chart(first, bucket_ms), capped=capped
        )

    def pipeline(self, request: Request) -> Response:
        name = self._settings.pipeline
        looked_at, nodes = (0, []) if name is None else figures_of(self._store, name)
        has_steps = name is not None and looked_at > 0 and self._history.run_graph(name, RUNS).has_calls
        return self._page(
            "pipeline.html", has_image=self._settings.lineage is not None, nodes=nodes, looked_at=looked_at,
            has_steps=has_steps,
        )  # fmt: skip

    def steps(self, request: Request) -> Response:
        """Return an image of the steps that the latest runs took."""
        name = self._settings.pipeline
        if name is None or not self._store.exists():
            raise HTTPException(404, "no pipeline was passed to stroma ui")
        return _image(self._history.run_graph(name, RUNS).svg())

    def lineage(self, request: Request) -> Response:
        if self._settings.lineage is None:
            raise HTTPException(404, "no pipeline was passed to stroma ui")
        return _image(self._settings.lineage)


def _image(svg: str) -> Response:
    headers = {"content-security-policy": IMAGE_POLICY}
    return Response(svg.encode("utf-8", "replace"), media_type="image/svg+xml", headers=headers)
