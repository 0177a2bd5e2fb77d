"""Reading from a Redis store. Nothing is changed, except that expired runs are removed from the lists."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final
from urllib.parse import quote, unquote_to_bytes

from stroma.checkpoint.decisions import MESSAGE_SENT
from stroma.checkpoint.decoding import RecordName, decode_number
from stroma.checkpoint.durable.integrity import parse_attempt
from stroma.checkpoint.durable.rows import (
    Annotation,
    EventRow,
    RunExtras,
    RunRow,
    Step,
    StepRow,
)
from stroma.checkpoint.errors import CheckpointLost, CorruptCheckpoint
from stroma.checkpoint.events import EventPlace
from stroma.checkpoint.queue import Candidate, ClaimRequest, QueueFigures
from stroma.checkpoint.records import (
    ATTEMPT_COLUMNS,
    AttemptRecord,
    RunQuery,
    StoreFacts,
    Tally,
    duration_digits,
    end_of_page,
    not_a_mark,
    parse_attempt_mark,
)
from stroma.checkpoint.redis.format import (
    RedisRun,
    annotation_row,
    as_hash,
    as_text,
    decode_tags,
    info_lines,
    node_of,
    prefix_of,
    read_head,
    read_run_row,
    read_step,
    step_row,
    unpack,
)
from stroma.checkpoint.redis.scripts import IDS, RUNS
from stroma.checkpoint.redis.server import RedisLink, script_command

__all__ = ["PAGE", "RedisReader", "run_lost_error"]

PAGE: Final = 200  # rows of one round trip
_MAX_TALLIED: Final = 200  # runs whose attempts are summed up
_TALLY_PAGE: Final = 20  # runs whose attempts are read in one round trip
_MAX_EXAMINED: Final = 2000  # runs that the server examines in one step


#: Place of a run in the list of all runs: (start, id).
_ListPlace = tuple[bytes, bytes]


class RedisReader:
    """The reading half of :class:`stroma.checkpoint.durable.rows.Rows`."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, max_filtered: int | None
    ) -> tuple[list[RunRow], str | None]:
        self._link.send(
            [script_command("stroma:", "sweep")]
        )  # A user with read permission only gets an error here, which is ignored.
        runs: list[RunRow] = []
        end: _ListPlace | None = None
        first = None if after is None else _parse_mark(after)
        for ids, end in self._matching(b"", query, first, max_filtered):  # noqa: B007
            rows = {row.run_id: row for row in self._rows([run_id for run_id, _ in ids])}
            for run_id, start in ids:
                # The run may have changed since the server examined it.
                row = rows.get(as_text(run_id))
                if row is None or not _still_matches(row, query):
                    continue
                runs.append(row)
                if len(runs) == limit:
                    return runs, self._next_page(start, run_id)
        return runs, None if end is None else _mark(*end)

    def candidates(self, pipeline: str, request: ClaimRequest) -> list[Candidate]:
        code = request.code_of(pipeline)
        values = (request.now_ms, request.limit, _MAX_EXAMINED, code.name, random.random())
        replies = self._get(
            *(
                script_command("stroma:", "candidates", pipeline, version, *values)
                for version in ("", *code.versions)
            )
        )
        reply = [part for one in replies for part in one]
        rows = sorted(zip(*(reply[at::5] for at in range(5)), strict=True), key=lambda row: int(row[0]))
        return [
            Candidate(
                prefix_of(as_text(run_id)), as_text(run_id), pipeline, int(priority), int(due), _key(key)
            )
            for _, run_id, priority, due, key in rows
        ]

    def live_runs(self, pipeline: str) -> dict[str | None, int]:
        (reply,) = self._get(script_command("stroma:", "live_runs", pipeline))
        return Counter(map(_key, reply))

    def queue_figures(self, pipeline: str, versions: Sequence[str], now_ms: int) -> QueueFigures:
        values = (now_ms, MESSAGE_SENT + 1, _MAX_EXAMINED)
        replies = self._get(
            *(
                script_command("stroma:", "queue_figures", pipeline, version, *values)
                for version in ("", *versions)
            )
        )
        queued, due, blocked, since = zip(*replies, strict=True)
        return QueueFigures(
            sum(map(int, queued)),
            min(map(int, filter(None, due)), default=None),
            sum(map(int, blocked)),
            min(map(int, filter(None, since)), default=None),
        )

    def events(self, run: RedisRun, execution: int, after: EventPlace, limit: int) -> list[EventRow]:
        start = "({}-{}".format(*after)
        (reply,) = self._get(("XRANGE", f"{run.prefix}events", start, "+", "COUNT", limit))
        places = (EventPlace(*map(int, as_text(name).split("-"))) for name, _ in reply)
        batches = (as_hash(fields).get("data", b"") for _, fields in reply)
        return [EventRow(run, execution, *batch) for batch in zip(places, batches, strict=True)]

    def inputs_of(self, candidates: Sequence[Candidate]) -> dict[Any, tuple[bytes, bytes]]:
        return {}

    def statuses(self, run_ids: Sequence[str]) -> dict[str, str]:
        replies = (
            self._get(*(("HGET", f"{prefix_of(run_id)}run", "status") for run_id in run_ids))
            if run_ids
            else []
        )
        statuses = zip(run_ids, replies, strict=True)
        return {run_id: as_text(status) for run_id, status in statuses if status is not None}

    def _next_page(self, start: bytes, run_id: bytes) -> str | None:
        """Return the start of the next page, if older runs exist; the next page applies the filter."""
        ((examined, *_),) = self._get(
            script_command("stroma:", "find_runs", start, run_id, "-inf", 1, b"", "")
        )
        return _mark(start, run_id) if examined else None

    def _matching(
        self, prefix: bytes, query: RunQuery, place: _ListPlace | None, max_filtered: int | None
    ) -> Iterator[tuple[list[tuple[bytes, bytes]], _ListPlace | None]]:
        """Iterate over pages of (id, start) of runs, the newest first, and the place up to which runs were examined.

        The place is None at the end. The server applies the filter, since a million runs may not match.
        """
        filter_json = _filter_json(query)
        lowest = "-inf" if query.since_ms is None else query.since_ms * 1000
        # Without a filter all runs match, so few are enough.
        limit = PAGE if not prefix and not filter_json else _MAX_EXAMINED
        examined, total = limit, 0
        while examined >= limit and (max_filtered is None or total < max_filtered):
            start, before = place or (b"+inf", b"")
            values = (start, before, lowest, limit, prefix, filter_json)
            (reply,) = self._get(script_command("stroma:", "find_runs", *values))
            (examined, *end), flat = reply[:3], reply[3:]
            ids = list(zip(flat[::2], flat[1::2], strict=True))
            total += examined
            place = None if examined < limit or tuple(end) == place else (end[0], end[1])
            for first in range(0, len(ids), PAGE):
                has_more = first + PAGE < len(ids)
                # A page that ends before the last examined run ends at its own last run.
                yield ids[first : first + PAGE], (_place_of(ids[first + PAGE - 1]) if has_more else place)
            if not ids:
                yield [], place
            if place is None:
                return

    def run_extras(self, runs: list[RunRow], *, failed: int) -> list[RunExtras]:
        extras: list[RunExtras] = []
        for first in range(0, len(runs), PAGE):
            page = runs[first : first + PAGE]
            replies = self._try(
                *(script_command(row.run.prefix, "read_extras", row.execution, failed) for row in page)
            )
            extras += map(_read_extras, replies)
        return extras

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        start = prefix.encode()
        low, high = b"[" + start, b"(" + start + b"\xff"  # No byte of UTF-8 is as high.
        (count,) = self._get(("ZLEXCOUNT", IDS, low, high))
        if count > _MAX_EXAMINED:
            # A search through all runs finds the newest sooner than sorting so many.
            return self._newest_with_prefix(start, limit)
        matches: list[tuple[bool, float, bytes]] = []
        while True:
            (page,) = self._get(("ZRANGEBYLEX", IDS, low, high, "LIMIT", 0, PAGE))
            if page:
                scores = self._get(*(("ZSCORE", RUNS, run_id) for run_id in page))
                matches += (
                    (run_id == start, float(score), run_id)
                    for run_id, score in zip(page, scores, strict=True)
                    if score is not None
                )
                low = b"(" + page[-1]
            if len(page) < PAGE:
                break
        matches.sort(reverse=True)
        run_ids: list[str] = []
        for first in range(0, len(matches), PAGE):
            run_ids += (row.run_id for row in self._rows([m[2] for m in matches[first : first + PAGE]]))
            if len(run_ids) >= limit:
                break
        return run_ids[:limit]

    def _newest_with_prefix(self, prefix: bytes, limit: int) -> list[str]:
        run_ids = [row.run_id for row in self._rows([prefix])]  # An equal id comes first.
        for page, _ in self._matching(prefix, RunQuery(), None, None):
            run_ids += (row.run_id for row in self._rows([run_id for run_id, _ in page if run_id != prefix]))
            if len(run_ids) >= limit:
                break
        return run_ids[:limit]

    def _rows(self, ids: list[bytes]) -> list[RunRow]:
        if not ids:
            return []
        names = [as_text(run_id) for run_id in ids]
        replies = self._try(*(script_command(prefix_of(name), "find", name) for name in names))
        # Runs whose keys have expired, or were lost, have no row.
        return [
            read_run_row(reply, name)
            for name, reply in zip(names, replies, strict=True)
            if isinstance(reply, list | Exception)
        ]

    def attempts(self, run: RedisRun, execution: int) -> Iterator[tuple[AttemptRecord, Step | None]]:
        attempts, steps = self._get(
            ("HGETALL", f"{run.prefix}attempts:{execution}"), ("HGETALL", f"{run.prefix}steps:{execution}")
        )
        outputs = {place: read_step(value) for place, value in as_hash(steps).items()}
        for one in _attempts(attempts):
            step, committed_by = outputs.get(f"{one.position}:{one.branch}", (None, None))
            yield one, step if committed_by in (None, _attempt_key(one)) else None

    def attempt_page(
        self, run: RedisRun, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[AttemptRecord], str | None]:
        # A hash has no order, so each page reads all attempts.
        end = None if after is None else parse_attempt_mark(after)
        (attempts,) = self._attempts_of([(run, execution)])
        rest = [one for one in attempts if end is None or (one.epoch, one.key) > (end.epoch, end.key)]
        return rest[:limit], str(end_of_page(rest[limit - 1])) if len(rest) > limit else None

    def _attempts_of(self, runs: Sequence[tuple[RedisRun, int]]) -> list[list[AttemptRecord]]:
        """Return the attempts of each execution, in the order of the history, without outputs."""
        replies = self._try(
            *(script_command(run.prefix, "read_attempts", execution) for run, execution in runs)
        )
        executions: list[list[AttemptRecord]] = []
        for reply in replies:
            # An error: the keys hold another type.
            attempts, heads = ([], []) if isinstance(reply, Exception) else reply
            outputs = {place: read_head(line) for place, line in as_hash(heads).items()}
            records = _attempts(attempts)
            for one in records:
                size, committed_by = outputs.get(f"{one.position}:{one.branch}", (None, None))
                one.output_bytes = size if committed_by in (None, _attempt_key(one)) else None
            executions.append(records)
        return executions

    def attempts_at(self, run: RedisRun, execution: int, position: int, branch: str) -> list[AttemptRecord]:
        (attempts,) = self._attempts_of([(run, execution)])
        return [one for one in attempts if (one.position, one.branch) == (position, branch)]

    def failed_since(self, run: RedisRun, execution: int, epoch: int) -> list[AttemptRecord]:
        # The server lists the last 20.
        (listed,) = self._get(("LRANGE", f"{run.prefix}failed:{execution}", 0, -1))
        name = RecordName(run.run_id, "list of failed attempts")
        places = [at for at in listed if decode_number(at.partition(b":")[0], name) >= epoch]
        if not places:
            return []
        (values,) = self._get(("HMGET", f"{run.prefix}attempts:{execution}", *places))
        fields = [part for at, value in zip(places, values, strict=True) if value for part in (at, value)]
        return sorted(_attempts(fields), key=lambda attempt: attempt.started_ns + attempt.duration_ns)

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        # The server cannot sum up attempts: all are read, so the limit is lower.
        rows, _ = self.runs(
            RunQuery(since_ms=since_ms), limit=min(runs, _MAX_TALLIED), after=None, max_filtered=None
        )
        sums: dict[tuple[int, str, str, str | None, str | None, int], list[int]] = {}
        count = 0
        for first in range(0, len(rows), _TALLY_PAGE):
            page = rows[first : first + _TALLY_PAGE]
            executions = self._attempts_of([(run.run, run.execution) for run in page])
            for run, run_attempts in zip(page, executions, strict=True):
                for one in run_attempts:
                    key = (
                        run.started_ms // bucket_ms,
                        run.pipeline,
                        one.node_id,
                        one.model,
                        one.failure_class,
                        duration_digits(one.duration_ns),
                    )
                    wasted = one.cost_pico if one.outcome != "success" and one.output_bytes is None else 0
                    totals = sums.setdefault(key, [0] * 6)
                    for i, number in enumerate((1, one.tokens, one.cost_pico, wasted, one.duration_ns)):
                        totals[i] += number
                    totals[5] = max(totals[5], one.duration_ns)
                    count += 1
                if count >= attempts:
                    return [Tally(*key[:5], *totals)._replace(digits=key[5]) for key, totals in sums.items()]
        return [Tally(*key[:5], *totals)._replace(digits=key[5]) for key, totals in sums.items()]

    def facts(self) -> StoreFacts:
        (seconds, micros), *sections = self._get(
            ("TIME",), ("INFO", "server"), ("INFO", "persistence"), ("INFO", "memory")
        )
        info = dict(line.split(":", 1) for section in sections for line in info_lines(section) if ":" in line)
        warnings = []
        if info.get("aof_enabled") == "0":
            warnings.append(
                "appendonly is off: a crash loses data since the last save; set appendonly yes, appendfsync always"
            )
        if info.get("maxmemory_policy", "noeviction") != "noeviction":
            policy = info["maxmemory_policy"]
            warnings.append(f"maxmemory-policy is {policy}: runs may be evicted; set it to noeviction")
        clock_ms = int(seconds) * 1000 + int(micros) // 1000
        return StoreFacts(f"Redis {info.get('redis_version', '?')}", 1, 1, clock_ms, tuple(warnings))

    def step_at(self, run: RedisRun, execution: int, position: int, branch: str) -> StepRow | None:
        place = f"{position}:{branch}"
        node, step = self._get(
            ("HGET", f"{run.prefix}nodes:{execution}", place),
            ("HGET", f"{run.prefix}steps:{execution}", place),
        )
        return None if node is None or step is None else step_row(run.run_id, place, node_of(node), step)

    def _get(self, *commands: tuple[Any, ...]) -> list[Any]:
        replies = self._try(*commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _try(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Return the replies to commands. A reply may be an exception."""
        # Not as a transaction, which a server without free memory refuses.
        return self._link.send(commands)


def run_lost_error(run_id: str, server: str) -> CheckpointLost:
    """Return the error for a run whose data the server has lost."""
    return CheckpointLost(
        f"{server} has lost data of run {run_id!r} that it had acknowledged: it was evicted, flushed, or lost in a crash or "
        "failover; set appendonly yes, appendfsync always and maxmemory-policy noeviction, then resume the run; "
        f"if this error is raised again, delete({run_id!r}) and run it from the beginning"
    )


def _attempts(reply: Any) -> list[AttemptRecord]:
    """Return attempts in the order of the history. A damaged one has only the values from its key."""
    attempts: list[AttemptRecord] = []
    for at, value in as_hash(reply).items():
        epoch, *place, branch = [*at.split(":", 4), *[""] * 5][:5]
        numbers = [int(n) if n.isdecimal() and len(n) < 20 else None for n in (epoch, *place)]
        header = _read_attempt(value)
        if header is None or None in numbers:
            position, started, attempt = numbers[1:]
            header = [position, started, branch, attempt, *[None] * (len(ATTEMPT_COLUMNS) - 4)]
        attempts.append(parse_attempt(header, numbers[0] or 0))
    attempts.sort(key=lambda one: (one.epoch, one.key))
    return attempts


def _read_attempt(value: bytes) -> list[Any] | None:
    """Return the values of an attempt; None if there are others."""
    try:
        header: list[Any] = unpack(value, list, RecordName("", "attempt"))[0]
    except CorruptCheckpoint:
        return None
    return header if len(header) == len(ATTEMPT_COLUMNS) else None


def _attempt_key(attempt: AttemptRecord) -> tuple[int, int, int]:
    """Return what a commit stores of its attempt, see read_step()."""
    return attempt.epoch, attempt.attempt, attempt.started_ns


def _mark(start: bytes, run_id: bytes) -> str:
    return f"{as_text(start)}.{quote(run_id, safe='')}"


def _place_of(item: tuple[bytes, bytes]) -> _ListPlace:
    run_id, start = item
    return start, run_id


def _parse_mark(mark: str) -> _ListPlace:
    """Return the place in the ``next`` of a page. Raises ValueError for any other text."""
    start, _, run_id = mark.partition(".")
    if not (start.isdecimal() and start.isascii() and len(start) < 20 and run_id):
        raise not_a_mark(mark)
    return start.encode(), unquote_to_bytes(run_id)


def _still_matches(row: RunRow, query: RunQuery) -> bool:
    return query.pipeline in (None, row.pipeline) and (not query.statuses or row.status in query.statuses)


def _read_extras(reply: Any) -> RunExtras:
    if isinstance(reply, Exception):
        return RunExtras(None, (), [])  # The keys hold another type.
    annotations, tags, attempts = reply
    parent = next(iter(as_hash(annotations).values()), None)
    parent_id = None if parent is None else annotation_row(Annotation.PARENT, "", parent).node_id
    nothing = [None] * len(ATTEMPT_COLUMNS)
    failed = [parse_attempt(_read_attempt(attempt) or nothing) for attempt in attempts]
    try:
        return RunExtras(parent_id, decode_tags("", tags), failed)
    except CorruptCheckpoint:
        return RunExtras(parent_id, (), failed)  # Its row is damaged, see read_run_row().


def _filter_json(query: RunQuery) -> str:
    """Return the filter of a query for the script; "" if all runs match."""
    text = query.text
    conditions = {
        "pipeline": query.pipeline,
        "statuses": dict.fromkeys(query.statuses, True) or None,
        "tag": query.tag,
        "blocked": query.blocked or None,
        "class": query.failure_class,
        "node": query.node,
        "text": None if text is None else "".join(ch.lower() if ch.isascii() else ch for ch in text),
    }
    conditions = {name: value for name, value in conditions.items() if value is not None}
    return json.dumps(conditions) if conditions else ""


def _key(value: bytes) -> str | None:
    """Return the key of a queued run, which has "=" before it; None for a run without a key."""
    return as_text(value[1:]) if value else None
