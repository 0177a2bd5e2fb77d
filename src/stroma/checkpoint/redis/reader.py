"""Reading from a Redis store. Nothing is changed, except that expired runs are removed from the lists."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from stroma.checkpoint.decisions import MESSAGE_SENT
from stroma.checkpoint.durable.rows import EventRow, RunRow, ScannedRows, matches
from stroma.checkpoint.errors import CheckpointLost
from stroma.checkpoint.events import EventPlace
from stroma.checkpoint.identity import mark_of, parse_mark
from stroma.checkpoint.queue import Candidate, ClaimRequest, QueueFigures
from stroma.checkpoint.records import AttemptRecord, RunQuery, StoreFacts, Tally
from stroma.checkpoint.redis.format import (
    FORMAT,
    RedisRun,
    as_hash,
    as_text,
    prefix_of,
    read_attempts,
    read_run_row,
)
from stroma.checkpoint.redis.scripts import IDS, RUNS
from stroma.checkpoint.redis.server import RedisLink, risks, script_command

PAGE: Final = 200  # rows of one round trip
_MAX_TALLIED: Final = 200  # runs whose attempts are summed up
_MAX_EXAMINED: Final = 2000  # runs that the server examines in one step


_MAX_FAILED: Final = 20  # the server lists the last ones
#: Place of a run in the list of all runs: (start, id).
_ListPlace = tuple[int, str]


class RedisReader(ScannedRows):
    """The reading half of :class:`stroma.checkpoint.durable.rows.Rows`."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, max_filtered: int | None
    ) -> tuple[list[RunRow], str | None]:
        matching: list[tuple[_ListPlace, RunRow]] = []
        place: Any = None if after is None else parse_mark(after, 1, has_text=True)
        examined = 0
        size = _MAX_EXAMINED if replace(query, since_ms=None) != RunQuery() else limit + 1
        while True:
            place, page = self._newest(place, query, size)
            matching += self._matching(page, query)
            examined += size
            runs = [run for _, run in matching[:limit]]
            if len(matching) > limit:
                return runs, mark_of(*matching[limit - 1][0])
            if place is None:
                return runs, None
            if max_filtered is not None and examined >= max_filtered:
                return runs, mark_of(*place)

    def _newest(
        self, place: _ListPlace | None, query: RunQuery, limit: int
    ) -> tuple[_ListPlace | None, list[list[Any]]]:
        """Examine the newest runs before a place in the list of all runs.

        Returns the place of the last one, or None, and (id, start, row) of those that may match.
        """
        start, before = place or ("+inf", "")
        lowest = "-inf" if query.since_ms is None else query.since_ms * 1000
        conditions = (query.pipeline or "", json.dumps(dict.fromkeys(query.statuses, True)))
        # The run before which it continues is one of those read. Users who may only read cannot sweep.
        newest = script_command("stroma:", "newest", start, lowest, limit + 1, *conditions)
        _, reply = self._try(script_command("stroma:", "sweep"), newest)
        if isinstance(reply, Exception):
            raise reply
        last, *page = reply
        end = (int(last[1]), as_text(last[0])) if last else None
        page = [one for one in page if int(one[1]) != start or one[0] < before.encode()]
        return None if end == place else end, page

    def _matching(self, page: list[list[Any]], query: RunQuery) -> list[tuple[_ListPlace, RunRow]]:
        """Return those of these runs that match a query."""
        named = [(as_text(run_id), int(start), row) for run_id, start, row in page]
        runs = [((start, run_id), read_run_row(row, run_id)) for run_id, start, row in named]
        runs = [one for one in runs if matches(query, one[1])]
        if (query.failure_class, query.node) == (None, None):
            return runs
        failures = self.failed([run for _, run in runs], _MAX_FAILED)
        return [
            one for one, failed in zip(runs, failures, strict=True) if any(map(query.matches_failure, failed))
        ]

    def failed(self, runs: Sequence[RunRow], limit: int) -> list[list[AttemptRecord]]:
        failed: list[list[AttemptRecord]] = [[] for _ in runs]
        keys = [f"{run.run.prefix}failed:{run.execution}" for run in runs]
        lists = self._get(*(("LRANGE", key, 0, limit - 1) for key in keys))
        listed = [(at, places) for at, places in enumerate(lists) if places]
        commands = (
            ("HMGET", f"{runs[at].run.prefix}attempts:{runs[at].execution}", *places) for at, places in listed
        )
        for (at, places), values in zip(listed, self._get(*commands), strict=True):
            known = [(as_text(one), value) for one, value in zip(places, values, strict=True) if value]
            attempts = [one for _, one in read_attempts(runs[at].run_id, known)]
            failed[at] = sorted(attempts, key=lambda one: one.started_ns + one.duration_ns, reverse=True)
        return failed

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

    def statuses(self, run_ids: Sequence[str]) -> dict[str, str]:
        replies = (
            self._get(*(("HGET", f"{prefix_of(run_id)}run", "status") for run_id in run_ids))
            if run_ids
            else []
        )
        statuses = zip(run_ids, replies, strict=True)
        return {run_id: as_text(status) for run_id, status in statuses if status is not None}

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        start = prefix.encode()
        low, high = b"[" + start, b"(" + start + b"\xff"  # No byte of UTF-8 is as high.
        newest: list[tuple[bool, float, bytes]] = []
        while True:
            (page,) = self._get(("ZRANGEBYLEX", IDS, low, high, "LIMIT", 0, _MAX_EXAMINED))
            if not page:
                break
            (scores,) = self._get(("ZMSCORE", RUNS, *page))
            known = ((one, score) for one, score in zip(page, scores, strict=True) if score is not None)
            newest += [(run_id == start, float(score), run_id) for run_id, score in known]
            low = b"(" + page[-1]
        newest.sort(reverse=True)
        run_ids: list[str] = []
        for first in range(0, len(newest), PAGE):  # Some may have expired.
            run_ids += (row.run_id for row in self._rows([one for *_, one in newest[first : first + PAGE]]))
            if len(run_ids) >= limit:
                break
        return run_ids[:limit]

    def _rows(self, ids: list[bytes]) -> list[RunRow]:
        if not ids:
            return []
        names = [as_text(run_id) for run_id in ids]
        replies = self._get(*(script_command(prefix_of(name), "find", name) for name in names))
        # Runs whose keys have expired, or were lost, have no row.
        return [
            read_run_row(reply, name)
            for name, reply in zip(names, replies, strict=True)
            if isinstance(reply, list)
        ]

    def _attempts_of(self, runs: Sequence[tuple[RedisRun, int]]) -> list[list[AttemptRecord]]:
        """Return the attempts of each execution, in the order of the history, without outputs."""
        attempts = self._get(*(("HGETALL", f"{run.prefix}attempts:{execution}") for run, execution in runs))
        steps = self._get(*(("HKEYS", f"{run.prefix}steps:{execution}") for run, execution in runs))
        executions: list[list[AttemptRecord]] = []
        for (run, _), one, places in zip(runs, attempts, steps, strict=True):
            numbered = read_attempts(run.run_id, as_hash(one).items(), places)
            executions.append([record for _, record in numbered])
        return executions

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        # The server cannot sum up attempts: all are read, so the limit is lower.
        return super().tally(since_ms, bucket_ms, runs=min(runs, _MAX_TALLIED), attempts=attempts)

    def facts(self) -> StoreFacts:
        settings = self._link.settings()
        system = f"Redis {settings.get('redis_version', '?')}"
        return StoreFacts(system, FORMAT, self.now_ms(), tuple(risks(settings)))

    def now_ms(self) -> int:
        ((seconds, micros),) = self._get(("TIME",))
        return int(seconds) * 1000 + int(micros) // 1000

    def _get(self, *commands: tuple[Any, ...]) -> list[Any]:
        replies = self._try(*commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _try(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Return the replies to commands. A reply may be an exception."""
        # Not as a transaction, which a server without free memory refuses.
        return self._link.send(commands) if commands else []


def run_lost_error(run_id: str, server: str) -> CheckpointLost:
    """Return the error for a run whose data the server has lost."""
    return CheckpointLost(
        f"{server} has lost data of run {run_id!r} that it had acknowledged: it was deleted, evicted, "
        "flushed, or lost in a crash or failover; set appendonly yes, appendfsync always and "
        "maxmemory-policy noeviction, then resume the run; if this error is raised again, "
        f"delete({run_id!r}) and run it from the beginning"
    )


def _key(value: bytes) -> str | None:
    """Return the key of a queued run, which has "=" before it; None for a run without a key."""
    return as_text(value[1:]) if value else None
