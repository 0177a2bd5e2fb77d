"""Pages of all runs: the list, the overview, and the pipeline with its figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from stroma._utils.svg import Box
from stroma._utils.text import clean, format_duration
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.history.bars import bar_of
from stroma.checkpoint.history.facts import STATUSES, count_causes, elapsed_seconds, is_at_work, status_of
from stroma.checkpoint.history.run_graph import StepNode
from stroma.checkpoint.queue import QUEUED
from stroma.checkpoint.records import FAILED, RunQuery, RunRecord
from stroma.failures.classes import FailureClass
from stroma.trace.outline import outline, tone_of
from stroma.ui.components import Column, sparkline
from stroma.ui.formatting import cause_text, parse_search, quoted, to_address
from stroma.ui.overview import BUCKETS, Buckets, Overview, runs_chart, success_rate
from stroma.ui.rendering import Renderer, now_ms
from stroma.ui.run_view import find_by_trace
from stroma.ui.security import IMAGE_POLICY
from stroma.ui.settings import Served

#: Maximum number of runs read, and of attempts read from each.
RUNS: Final = 50
_ATTEMPTS: Final = 1000
#: Part of the time or cost of all nodes, from which on a node is marked as hot.
_HOT: Final = 0.4


def rate_boxes(nodes: Sequence[StepNode]) -> Callable[[Box], Box]:
    """Return a function that adds figures to the box of a node, and marks failing and expensive ones."""
    by_id = {one.path[-1]: one for one in nodes}
    ms, cost = sum(one.busy_ms for one in nodes), sum(one.cost_usd for one in nodes)

    def rate(box: Box) -> Box:
        one = by_id.get(box.title)
        if one is None or box.kind in ("parallel", "map_over", "sequence"):
            return box
        heat = max(one.busy_ms / ms if ms else 0.0, one.cost_usd / cost if cost else 0.0)
        return replace(
            box,
            rates=one.lines,
            heat=heat,
            mood="failing" if one.is_failing else "hot" if heat > _HOT else "",
        )

    return rate


def figures_of(store: AsyncStates, pipeline: str) -> tuple[int, list[StepNode]]:
    """Return the number of runs read, and the nodes in order of position. Raises StoreError."""
    if not store.exists():
        return 0, []
    runs = store.run_page(RunQuery(pipeline=pipeline), limit=RUNS).runs
    known: dict[str, StepNode] = {}
    places: dict[str, tuple[int, str]] = {}
    for run in runs:
        attempts = store.attempt_page(run.run_id, limit=_ATTEMPTS).attempts
        first_ns = min((one.started_ns for one in attempts), default=0)
        for top in outline(bar_of(one, first_ns) for one in attempts):
            for _, call in top.walk():
                if call.bars:
                    position, _, branch = call.at.partition(".")
                    place = int(position), branch
                    known.setdefault(call.label, StepNode((call.label,), "node")).add(call)
                    places[call.label] = min(place, places.get(call.label, place))
    return len(runs), sorted(known.values(), key=lambda node: places[node.path[-1]])


_PAGE_SIZE: Final = 50
#: Runs that the totals and filters of the list count.
_RECENT: Final = 200
_SPARK: Final = 50
_SPANS: Final = (1, 7, 30)  # days
_MAX_SUMMED: Final = 200_000  # attempts
_MAX_CHARTED: Final = 1000  # runs
_MAX_HELD: Final = 8  # suspended runs of the overview
_MAX_CAUSES: Final = 10  # of failed runs of the overview
_MAX_TEXT: Final = 4000  # characters of a parameter
_TRACE_ID: Final = re.compile(r"[0-9a-f]{32}")


class Pages:
    """Handlers of the pages of all runs and of the pipeline; each response is read from the store."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._settings, self._store, self._history = renderer.settings, renderer.store, renderer.history

    # ------------------------------------------------------------------ runs

    def runs(self, request: Request) -> Response:
        return self._renderer.shared.get(request, None, lambda: self._runs(request))

    def _runs(self, request: Request) -> Response:
        params = request.query_params
        text = params.get("q", "")[:_MAX_TEXT].strip()
        status, kind, after = params.get("status", ""), params.get("class", ""), params.get("after")
        if status not in ("", "failed", *STATUSES) or kind not in ("", *FailureClass):
            raise HTTPException(400, "unknown status or class")
        if not self._store.exists():
            return self._empty()
        if _TRACE_ID.fullmatch(text):
            run_id = find_by_trace(self._settings, text)
            if run_id is not None:
                return RedirectResponse(to_address("/run", id=run_id), 303)
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
        return self._renderer.page(
            "runs.html",
            here="runs",
            runs=rows,
            q=text,
            status=status,
            kind=kind,
            classes=list(FailureClass),
            next=page.next,
            first=after is None,
            looked=not records and page.next,
            longest=max((row["seconds"] for row in rows), default=0),
            dearest=max((row["record"].cost_usd for row in rows), default=0),
            **self._recent(),
        )

    def _recent(self) -> dict[str, Any]:
        """Return the totals of the newest runs, and the filters with their counts."""
        records = self._store.list_runs(limit=_RECENT)
        counts = Counter(map(status_of, records))
        rate, failed = success_rate(records)
        columns = [
            Column(
                record.seconds,
                tone_of(status_of(record)),
                f"{status_of(record)}, {clean(record.pipeline, 60)}, {format_duration(record.seconds)}",
            )
            for record in reversed(records[:_SPARK])
        ]
        bad = sum(column.tone == "bad" for column in columns)
        label = f"durations of the last {len(columns)} runs, {bad} of them failed"
        recent = {
            "runs": len(records),
            "rate": rate,
            "failed": failed,
            "running": counts["RUNNING"],
            "queued": counts[QUEUED],
            "waiting": counts["SUSPENDED"],
            "cost": sum(record.cost_usd for record in records),
            "drawn": len(columns),
            "spark": sparkline(columns, label, _SPARK),
        }
        filters: list[dict[str, Any]] = [{"status": "", "name": "All", "count": None}]
        if len(set(FAILED) & set(counts)) > 1:
            filters.append({"status": "failed", "name": "Failed or partial", "count": failed})
        more = "+" if len(records) == _RECENT else ""
        filters += [
            {"status": one, "name": one.capitalize(), "count": f"{counts[one]}{more}"}
            for one in STATUSES
            if one in counts
        ]
        return {"recent": recent, "filters": filters}

    def _empty(self) -> Response:
        return self._renderer.page("empty.html", command=self._settings.command("run", None))

    def _by_id(self, text: str) -> list[RunRecord]:
        try:
            ids = [] if text == "last" else self._store.find_run(text, limit=10)
        except ValueError:  # Not a valid id.
            return []
        return [record for run_id in ids if (record := self._history.store.get_run(run_id)) is not None]

    def _row(self, record: RunRecord) -> dict[str, Any]:
        return {
            "record": record,
            "status": status_of(record),
            "seconds": elapsed_seconds(record),
            "failures": f"{record.failures}+" if record.failures >= 20 else str(record.failures or ""),
            "why": cause_text(record),
            "running": is_at_work(record),
        }

    # ------------------------------------------------------------------ overview and pipeline

    def overview(self, request: Request) -> Response:
        text = request.query_params.get("days", "7")
        if text not in map(str, _SPANS):
            raise HTTPException(400, "days must be 1, 7 or 30")
        days = int(text)
        bucket_ms = days * 86_400_000 // BUCKETS
        buckets = Buckets(now_ms() // bucket_ms - BUCKETS, bucket_ms)
        since_ms = buckets.first * bucket_ms
        exists = self._store.exists()
        it = Overview.of(self._store.tally(since_ms, bucket_ms) if exists else [])
        newest = self._store.list_runs(limit=_MAX_CHARTED) if exists else []
        runs = [one for one in newest if one.started_ms >= since_ms]
        queued = sum(one.status == QUEUED for one in newest)
        suspended = [one for one in newest if one.status == "SUSPENDED"]
        held = suspended[:_MAX_HELD]
        marks = [one.blocked.since_ms for one in newest if one.blocked is not None]
        failed = []
        if any(one.status in FAILED for one in runs):
            failed = self._history.page(RunQuery(statuses=FAILED, since_ms=since_ms), _PAGE_SIZE).runs
        rate, stopped = success_rate(runs)
        return self._renderer.page(
            "overview.html",
            here="overview",
            it=it,
            days=days,
            spans=_SPANS,
            chart=it.chart(buckets),
            costs=it.cost_chart(buckets),
            runs_chart=runs_chart(runs, buckets),
            capped=it.total.attempts >= _MAX_SUMMED,
            buckets=buckets,
            held=held,
            runs=len(runs),
            queued=queued,
            blocked=len(marks),
            blocked_since=min(marks, default=0),
            stopped=stopped,
            causes=count_causes(failed)[:_MAX_CAUSES],
            rate=rate,
        )

    def pipeline(self, request: Request) -> Response:
        name, served = self._served(request)
        looked_at, nodes = figures_of(self._store, name)
        has_steps = looked_at > 0 and self._history.run_graph(name, RUNS).has_calls
        failed = {one.path[-1] for one in nodes if one.failed}

        def address(node_id: str) -> str:
            """Return the address of the runs in which a node failed; of all runs for a node that did not."""
            text = f"node:{quoted(node_id)}" if node_id in failed else f"pipeline:{quoted(name)}"
            return to_address("/", q=text)

        drawing = None
        if served.lineage is not None:
            drawing = Markup(served.lineage.drawing(rate_boxes(nodes), lambda box: address(box.title)))
        return self._renderer.page(
            "pipeline.html",
            here="pipeline",
            name=name,
            can_submit=served.submission is not None,
            drawing=drawing,
            nodes=nodes,
            address=address,
            looked_at=looked_at,
            has_steps=has_steps,
            slowest=max((one.quantile(0.95) for one in nodes), default=0),
            dearest=max((one.cost_usd for one in nodes), default=0),
        )

    def steps(self, request: Request) -> Response:
        """Return an image of the steps that the latest runs took."""
        svg = self._history.run_graph(self._served(request)[0], RUNS).svg()
        headers = {"content-security-policy": IMAGE_POLICY}
        return Response(svg.encode("utf-8", "replace"), media_type="image/svg+xml", headers=headers)

    def _served(self, request: Request) -> tuple[str, Served]:
        """Return the pipeline that a request names, by default the first one, with its name."""
        pipelines = self._settings.pipelines
        name = request.query_params.get("name", next(iter(pipelines), ""))
        if name not in pipelines:
            raise HTTPException(404, "stroma ui was started without this pipeline: pass FILE.py:NAME")
        return name, pipelines[name]
