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
from starlette.responses import HTMLResponse, RedirectResponse, Response

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, short_id
from stroma.checkpoint.cells import CellStore
from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.history import (
    FAILED,
    FINISHED,
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
from stroma.checkpoint.records import AttemptPage, AttemptRecord, RunQuery, RunRecord, end_of_page
from stroma.failures.classes import FailureClass
from stroma.failures.tracebacks import FailureSite
from stroma.limits.rate_limit import read_cooldowns
from stroma.telemetry.otlp_json import otlp_spans
from stroma.trace.gantt import idle_ms
from stroma.trace.html import cause, document, rejected_output, utc
from stroma.trace.result import RunStatus
from stroma.trace.story import Bar, StopCause, Story, fields_named
from stroma.trace.timeline import HATCHES, Timeline, legend
from stroma.ui.actions import MANY, can_fork, can_resume, controls_of
from stroma.ui.components import Column, chip, icon, meter, sparkline, tone_of
from stroma.ui.figures import RUNS, figures_of, rate_boxes
from stroma.ui.formatting import (
    ago,
    as_attachment,
    attempt_address,
    attempt_key,
    attempt_rows,
    cause_text,
    compare_facts,
    compress,
    duration_text,
    json_file,
    mark_controls,
    parse_search,
    restored_starts,
    side_by_side,
    split_price,
    state_tree,
    to_address,
    to_json,
)
from stroma.ui.overview import BUCKETS, Buckets, Overview, runs_chart, stopped_by
from stroma.ui.run_view import (
    find_progress,
    is_at_work,
    open_waits,
    read_limits,
    totals,
    trace_link,
    window_of,
)
from stroma.ui.security import IMAGE_POLICY
from stroma.ui.shared_pages import SharedPages

if TYPE_CHECKING:
    from stroma.ui.security import Keys
    from stroma.ui.settings import Settings

__all__ = ["Pages"]

_PAGE_SIZE: Final = 50
#: Maximum number of attempts in the table of a run's page, those listed of a run with more, and those in the timeline.
_MAX_LISTED: Final = 2000
_LISTED_OF_MORE: Final = 500
_MAX_DRAWN: Final = 12_000
#: Runs that the totals and filters of the list count.
_RECENT: Final = 200
_SPARK: Final = 50
#: Larger payloads are not shown, only downloadable.
_MAX_SHOWN_BYTES: Final = 1_000_000
_MAX_EXPORTED: Final = 100_000
_SPANS: Final = (1, 7, 30)  # days
_MAX_SUMMED: Final = 200_000  # attempts
_MAX_CHARTED: Final = 1000  # runs
_MAX_HELD: Final = 8  # suspended runs of the overview
_STATUSES: Final = ["RUNNING", *RunStatus]
_MAX_TEXT: Final = 4000  # characters of a parameter
_EXAMPLES: Final[dict[Any, Any]] = {str: "", int: 0, float: 0.0, bool: True}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Pages:
    """Handlers of pages; each response is read from the store."""

    def __init__(self, settings: Settings, history: History, keys: Keys) -> None:
        self._settings = settings
        self._history = history
        self._store = settings.store
        self._keys = keys
        self.shared = SharedPages()
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
            "clean": clean, "money": format_usd, "count": format_tokens, "span": format_duration, "took": duration_text, "tone": tone_of, "json": to_json, "short": short_id, "when": utc, "ago": ago,
        }  # fmt: skip
        self._templates.globals |= {
            "to": to_address,
            "store_name": settings.name,
            "pipeline_name": settings.pipeline,
            "cooldowns": self._cooldowns,
            "chip": chip,
            "icon": icon,
            "meter": meter,
            "now_ms": _now_ms,
            "hatches": Markup(HATCHES),
            "here": "",
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
        return self.shared.get(request, None, lambda: self._runs(request))

    def _runs(self, request: Request) -> Response:
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
        rows = [self._row(record) for record in records]
        return self._page(
            "runs.html", here="runs", runs=rows, q=text, status=status, kind=kind, classes=list(FailureClass), next=page.next,
            first=after is None, looked=not records and page.next, longest=max((row["seconds"] for row in rows), default=0),
            dearest=max((row["record"].cost_usd for row in rows), default=0), can_resume_many=any(row["can_resume"] for row in rows),
            many_key=self._keys.form(*MANY), **self._recent(),
        )  # fmt: skip

    def _recent(self) -> dict[str, Any]:
        """Return the totals of the newest runs, and the filters with their counts."""
        records = self._store.list_runs(limit=_RECENT)
        counts: dict[str, int] = {}
        for record in records:
            counts[status_of(record)] = counts.get(status_of(record), 0) + 1
        done = sum(counts.get(one, 0) for one in FINISHED)
        failed = sum(counts.get(one, 0) for one in FAILED)
        columns = [
            Column(
                max(0, record.updated_ms - record.started_ms) / 1000,
                tone_of(status_of(record)),
                f"{status_of(record)}, {clean(record.pipeline, 60)}, {format_duration(max(0, record.updated_ms - record.started_ms) / 1000)}",
            )
            for record in reversed(records[:_SPARK])
        ]
        bad = sum(column.tone == "bad" for column in columns)
        label = f"durations of the last {len(columns)} runs, {bad} of them failed"
        recent = {
            "runs": len(records), "rate": f"{done / (done + failed):.1%}" if done + failed else "no result", "running": counts.get("RUNNING", 0),
            "waiting": counts.get("SUSPENDED", 0), "cost": sum(record.cost_usd for record in records), "drawn": len(columns),
            "words": f"succeeded, {failed:,} failed", "spark": sparkline(columns, label, _SPARK),
        }  # fmt: skip
        filters: list[dict[str, Any]] = [{"status": "", "name": "All", "count": None}]
        if len(set(FAILED) & set(counts)) > 1:
            filters.append({"status": "failed", "name": "Failed or partial", "count": failed})
        filters += [
            {
                "status": one,
                "name": one.capitalize(),
                "count": f"{counts[one]}{'+' if len(records) == _RECENT else ''}",
            }
            for one in _STATUSES
            if one in counts
        ]
        return {"recent": recent, "filters": filters}

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
            "seconds": max(0, (_now_ms() if is_at_work(record) else record.updated_ms) - record.started_ms)
            / 1000,
            "failures": f"{record.failures}+" if record.failures >= 20 else str(record.failures or ""),
            "why": cause_text(record),
            "running": is_at_work(record),
            "can_resume": can_resume(self._settings, record),
        }

    # ------------------------------------------------------------------ one run

    def _record(self, request: Request, name: str = "id") -> RunRecord:
        run_id = request.query_params.get(name, "")
        try:
            record = self._history.run(run_id) if self._store.exists() else None
        except ValueError:
            record = None
        if record is None:
            raise HTTPException(404, "this store has no such run; it may have been deleted")
        return record

    def run(self, request: Request) -> Response:
        run_id = request.query_params.get("id", "")
        return self.shared.get(request, run_id, lambda: self._run(request, self._record(request)))

    def _run(self, request: Request, record: RunRecord) -> Response:
        after = request.query_params.get("after")
        page, rest = self._attempts(record, after)
        listed = in_order(page.attempts)
        cause_attempt = self._cause_attempt(record, [*listed, *rest])
        known = {attempt_key(attempt) for attempt in page.attempts}
        if cause_attempt is not None and attempt_key(cause_attempt) not in known:
            # The attempt that stopped the run is always on the page.
            listed = in_order([*listed, cause_attempt])
            rest = [one for one in rest if attempt_key(one) != attempt_key(cause_attempt)]
        attempts = [*listed, *rest]
        waiting = [one for one in self._history.waiting(record.run_id) if one.payload is None]
        limits = read_limits(self._settings, record)
        timeline, story = self._timeline(request, record, attempts, waiting, cause_attempt)
        drawn = Markup(timeline.draw())  # It escapes all text.
        failed = sum(attempt.failure_class is not None for attempt in attempts)
        run_id = record.run_id
        page_response = self._page(
            "run.html", here="runs", record=record, status=status_of(record), gone=is_interrupted(record),
            totals=totals(record, story, limits, failed), limits=limits, cause=Markup(cause(story)), timeline=drawn, legend=Markup(legend(drawn)),
            attempts=listed, attempt_rows=attempt_rows(
                [(one, attempt_address(record, one), place_of(one)) for one in listed], restored_starts(record, listed)),
            waiting=waiting, answers=[self._answer_form(one) for one in waiting if not one.effect], next=page.next, first=after is None,
            can_resume=can_resume(self._settings, record), selected="" if cause_attempt is None else attempt_address(record, cause_attempt),
            resume_key=self._keys.form("resume", run_id), delete_key=self._keys.form("delete", run_id),
            effect_key=self._keys.form("effect", run_id), approve_key=self._keys.form("approve", run_id),
            control_keys={action: self._keys.form(action, run_id) for action in controls_of(record)}, working=is_at_work(record),
            command=self._resume_command(record), folded=timeline.fold_idle, idle=idle_ms(story.bars) > 0, at=after,
            zoomed=timeline.window is not None, trace=trace_link(self._settings, run_id),
        )  # fmt: skip
        return compress(request, page_response)

    def _attempts(self, record: RunRecord, after: str | None) -> tuple[AttemptPage, list[AttemptRecord]]:
        """Return the attempts to list, and further ones for the timeline. Reads the store once."""
        try:
            page = self._history.attempt_page(record.run_id, _MAX_DRAWN, after)
        except ValueError as error:
            raise HTTPException(400, "unknown page") from error
        if page.next is None and len(page.attempts) <= _MAX_LISTED:
            return page, []
        listed, rest = page.attempts[:_LISTED_OF_MORE], page.attempts[_LISTED_OF_MORE:]
        # Of a run with more, those inside groups and flows are cells; each other one is a row.
        rows = _MAX_LISTED - _LISTED_OF_MORE
        drawn = [one for at, one in enumerate(rest) if one.branch or at < rows]
        return AttemptPage(listed, str(end_of_page(listed[-1]))), drawn

    def _cause_attempt(self, record: RunRecord, attempts: list[AttemptRecord]) -> AttemptRecord | None:
        """Return the attempt that stopped a run; None if no failure did. ``attempts``: those that were read."""
        why = record.cause
        if why is None or record.status not in FAILED:
            return None
        at = why.position, why.branch, why.attempt

        def newest(among: list[AttemptRecord]) -> AttemptRecord | None:
            failed = [
                one for one in among if (one.position, one.branch, one.attempt) == at and one.failure_class
            ]
            return max(failed, key=lambda one: one.started_ns, default=None)

        return newest(attempts) or newest(self._history.attempts_at(record.run_id, why.position, why.branch))

    def _timeline(
        self,
        request: Request,
        record: RunRecord,
        attempts: list[AttemptRecord],
        waiting: list[Waiting],
        cause_attempt: AttemptRecord | None,
    ) -> tuple[Timeline, Story]:
        first = min((attempt.started_ns for attempt in attempts), default=record.started_ms * 1_000_000)
        bars = [bar_of(attempt, first) for attempt in attempts]
        addresses = {id(bar): attempt for bar, attempt in zip(bars, attempts, strict=True)}
        selected = None
        if cause_attempt is not None:
            key = attempt_key(cause_attempt)
            selected = next((bar for bar in bars if attempt_key(addresses[id(bar)]) == key), None)
        is_first = request.query_params.get("after") is None
        at_work = is_at_work(record) and is_first
        lineage = self._settings.lineage if record.pipeline == self._settings.pipeline else None
        names = [] if lineage is None else lineage.top_level
        timeline = Timeline(
            bars, self._history.flow_waits(record, attempts, waiting) if is_first else [],
            link=lambda bar: attempt_address(record, addresses[id(bar)]), attempt_prefix=to_address("/attempt", id=record.run_id),
            selected=selected, fold_idle=request.query_params.get("idle") == "folded", window=window_of(request.query_params),
            now_ms=time.time() * 1000 - first / 1e6 if at_work else None, began_ms=first // 1_000_000,
            progress=find_progress(record, attempts, first, names) if at_work else None,
            pipeline=record.pipeline, open_waits=open_waits(record, attempts, waiting) if is_first and record.status == "SUSPENDED" else {},
        )  # fmt: skip
        return timeline, self._story(record, bars)

    def _answer_form(self, one: Waiting) -> str:
        """Return the beginning of an answer: an object with the fields that its class requires."""
        model = self._settings.find_schema(one) if one.schema_ref else None
        if model is None:
            return "true" if not one.schema_ref else "{}"
        fields = {
            name: _EXAMPLES.get(info.annotation, None)
            for name, info in model.model_fields.items()
            if info.is_required()
        }
        return to_json(fields)

    def _story(self, record: RunRecord, bars: list[Bar]) -> Story:
        box, why = None, record.cause
        if why is not None and record.status in FAILED:
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
        rejected = self._history.rejected_of(record.run_id, this)
        side = "input" if "(input)" in (this.message or "")[:_MAX_TEXT] else "output"
        invalid_fields = fields_named(this.text or "")
        return self._page(
            "attempt.html", here="runs", record=record, this=this, place=place_of(this), attempts=[(one, attempt_address(record, one)) for one in attempts],
            input=state_tree(inputs, invalid_fields if side == "input" else []), output=state_tree(output, invalid_fields if side == "output" else []),
            invalid_fields=invalid_fields, before=None if before is None else compare_facts(before, this), key=this.idempotency_key(record.run_id, record.execution),
            rejected=None if rejected is None else Markup(rejected_output(rejected)),  # It escapes all text.
            in_group=bool(this.branch), committed=this.output_bytes is not None,
            payload=attempt_address(record, this, "/payload"), failure_site=self._failure_site(record, this),
            fork_key=self._keys.form("fork", record.run_id) if can_fork(self._settings, record, this) else "",
            split=split_price(this), trace=trace_link(self._settings, record.run_id),
        )  # fmt: skip

    def trace(self, request: Request) -> Response:
        """Lead to the trace of a run in the telemetry backend."""
        record = self._record(request)
        address = trace_link(self._settings, record.run_id)
        if address is None:
            raise HTTPException(404, "no trace of this run is known, or no --trace-url was passed")
        return RedirectResponse(address, 303)

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
            raise HTTPException(404, "this run has no such attempt; it may have been run again since")
        attempts = self._history.attempts_at(record.run_id, int(position), branch)
        attempts.sort(key=lambda one: one.started_ns)
        began = params.get("began")
        this = next((one for one in reversed(attempts) if began in (None, str(one.started_ns))), None)
        if this is None:
            raise HTTPException(404, "this run has no such attempt; it may have been run again since")
        return attempts, this

    def _read_output(self, record: RunRecord, this: AttemptRecord) -> Payload:
        if this.output_bytes is None:
            return Payload(None, "no output")
        if this.output_bytes > _MAX_SHOWN_BYTES:
            return Payload(None, f"{this.output_bytes:,} bytes, too large to show")
        return self._history.output_at(record.run_id, this.position, this.branch)

    def payload(self, request: Request) -> Response:
        """Return a state as a file."""
        record = self._record(request)
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
        """Return the run as an HTML or OTLP file."""
        record = self._record(request)
        with self._large:
            return self._export(record, request.query_params.get("format", ""))

    def _export(self, record: RunRecord, form: str) -> Response:
        if form == "html":
            story = self._history.story(
                record, max_attempts=_MAX_LISTED, resume_command=self._resume_command(record)
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
        sides = [self._history.attempts(record.run_id, _MAX_LISTED) for record in (a, b)]
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
        buckets = Buckets(_now_ms() // bucket_ms - BUCKETS, bucket_ms)
        since_ms = buckets.first * bucket_ms
        exists = self._store.exists()
        it = Overview.of(self._store.tally(since_ms, bucket_ms) if exists else [])
        newest = self._store.list_runs(limit=_MAX_CHARTED) if exists else []
        runs = [one for one in newest if one.started_ms >= since_ms]
        suspended = [one for one in newest if one.status == "SUSPENDED"]
        held = [self._history.redact_run(one) for one in suspended[:_MAX_HELD]]
        failed = []
        if any(one.status in FAILED for one in runs):
            failed = self._history.page(RunQuery(statuses=FAILED, since_ms=since_ms), _PAGE_SIZE).runs
        done = sum(one.status in FINISHED for one in runs)
        stopped = sum(one.status in FAILED for one in runs)
        return self._page(
            "overview.html", here="overview", it=it, days=days, spans=_SPANS, chart=it.chart(buckets), costs=it.cost_chart(buckets),
            runs_chart=runs_chart(runs, buckets), capped=it.total.attempts >= _MAX_SUMMED, buckets=buckets, held=held, runs=len(runs),
            stopped=stopped, reasons=stopped_by(failed), rate=f"{done / (done + stopped):.1%}" if done + stopped else "no result",
        )  # fmt: skip

    def pipeline(self, request: Request) -> Response:
        name, lineage = self._settings.pipeline, self._settings.lineage
        looked_at, nodes = (0, []) if name is None else figures_of(self._store, name)
        has_steps = name is not None and looked_at > 0 and self._history.run_graph(name, RUNS).has_calls
        drawing = None
        if lineage is not None:
            drawing = Markup(
                lineage.drawing(rate_boxes(nodes), lambda box: to_address("/", q=f"node:{box.title}"))
            )
        return self._page(
            "pipeline.html", here="pipeline", drawing=drawing, nodes=nodes, looked_at=looked_at, has_steps=has_steps,
            slowest=max((one.p95 for one in nodes), default=0), dearest=max((one.cost_usd for one in nodes), default=0),
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
        return _image(self._settings.lineage.svg())


def _image(svg: str) -> Response:
    headers = {"content-security-policy": IMAGE_POLICY}
    return Response(svg.encode("utf-8", "replace"), media_type="image/svg+xml", headers=headers)
