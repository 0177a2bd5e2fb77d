"""Reads of the Redis store. One request reads everything; the only change is the removal of expired data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final
from urllib.parse import quote, unquote_to_bytes

from stroma.checkpoint.durable.integrity import parse_attempt
from stroma.checkpoint.durable.rows import AttemptSummary, RunExtras, RunRow, Step, StepRow
from stroma.checkpoint.errors import CheckpointLost
from stroma.checkpoint.records import Attempt, RunQuery, StoreFacts, Tally, attempt_mark
from stroma.checkpoint.redis.format import (
    RedisRun,
    as_hash,
    as_text,
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
from stroma.checkpoint.sql import attempt_page

__all__ = ["PAGE", "RedisReader", "run_lost_error"]

PAGE: Final = 200
_TALLIED: Final = 200  # runs whose attempts are summed up
_AT_ONCE: Final = 20  # runs whose attempts are asked for in one round trip
_LOOKED_AT: Final = 2000  # runs that the server goes through at once


class RedisReader:
    """The half of :class:`stroma.checkpoint.durable.rows.Rows` that tells of runs."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, look_at: int | None
    ) -> tuple[list[RunRow], str | None]:
        self._link.send(
            [script_command("stroma:", "sweep")]
        )  # Whoever may only read is refused, and no harm done.
        found: list[RunRow] = []
        seen_to: tuple[bytes, bytes] | None = None
        start_at = None if after is None else _marked(after)
        for told, seen_to in self._matching(b"", query, start_at, look_at):  # noqa: B007
            rows = {row.run_id: row for row in self._rows([run_id for run_id, _ in told])}
            for run_id, start in told:
                # It is read after it was found, and may have become another one.
                row = rows.get(as_text(run_id))
                if row is None or not _still(row, query):
                    continue
                found.append(row)
                if len(found) == limit:
                    return found, self._more(start, run_id)
        return found, None if seen_to is None else _mark(*seen_to)

    def _more(self, start: bytes, run_id: bytes) -> str | None:
        """Return the start of the next page, if older runs exist; the next page applies the filter."""
        ((looked_at, *_),) = self._get(
            script_command("stroma:", "matching", start, run_id, "-inf", 1, b"", "")
        )
        return _mark(start, run_id) if looked_at else None

    def _matching(
        self, beginning: bytes, query: RunQuery, place: tuple[bytes, bytes] | None, look_at: int | None
    ) -> Iterator[tuple[list[tuple[bytes, bytes]], tuple[bytes, bytes] | None]]:
        """(id, start) of runs, the one begun last first, and up to where it was looked; None at the end.

        The server looks at them: there may be a million that do not match.
        """
        asked = _asked(query)
        lowest = "-inf" if query.since_ms is None else query.since_ms * 1000
        # Without a condition all of them match, and few are enough.
        most = PAGE if not beginning and not asked else _LOOKED_AT
        looked_at, seen = most, 0
        while looked_at >= most and (look_at is None or seen < look_at):
            start, before = place or (b"+inf", b"")
            about = (start, before, lowest, most, beginning, asked)
            (looked_at, *end), ids = self._found(script_command("stroma:", "matching", *about))
            seen += looked_at
            if looked_at < most or tuple(end) == place:
                place = None
            else:
                place = (end[0], end[1])
            for first in range(0, len(ids), PAGE):
                rest = first + PAGE < len(ids)
                # In the midst of what was looked at, a page ends at the last one that was told.
                yield ids[first : first + PAGE], (_place_of(ids[first + PAGE - 1]) if rest else place)
            if not ids:
                yield [], place
            if place is None:
                return

    def _found(self, command: tuple[Any, ...]) -> tuple[list[Any], list[tuple[bytes, bytes]]]:
        (reply,) = self._get(command)
        ids = reply[3:]
        return reply[:3], list(zip(ids[::2], ids[1::2], strict=True))

    def run_extras(self, runs: list[RunRow], *, failed: int) -> list[RunExtras]:
        told: list[RunExtras] = []
        for first in range(0, len(runs), PAGE):
            some = runs[first : first + PAGE]
            replies = self._try(
                *(script_command(row.run.prefix, "beside", row.execution, failed) for row in some)
            )
            told += map(_beside, replies)
        return told

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        beginning = prefix.encode()
        low, high = b"[" + beginning, b"(" + beginning + b"\xff"  # No byte of UTF-8 is that high.
        (count,) = self._get(("ZLEXCOUNT", IDS, low, high))
        if count > _LOOKED_AT:
            # So many that the newest of them are found sooner among all runs than by sorting them.
            return self._newest_of_many(beginning, limit)
        matches: list[tuple[bool, float, bytes]] = []
        while True:
            (page,) = self._get(("ZRANGEBYLEX", IDS, low, high, "LIMIT", 0, PAGE))
            if page:
                scores = self._get(*(("ZSCORE", RUNS, run_id) for run_id in page))
                matches += (
                    (run_id == beginning, float(score), run_id)
                    for run_id, score in zip(page, scores, strict=True)
                    if score is not None
                )
                low = b"(" + page[-1]
            if len(page) < PAGE:
                break
        matches.sort(reverse=True)
        found: list[str] = []
        for start in range(0, len(matches), PAGE):
            found += (row.run_id for row in self._rows([m[2] for m in matches[start : start + PAGE]]))
            if len(found) >= limit:
                break
        return found[:limit]

    def _newest_of_many(self, beginning: bytes, limit: int) -> list[str]:
        found = [row.run_id for row in self._rows([beginning])]  # That very one first, if there is one.
        for told, _ in self._matching(beginning, RunQuery(), None, None):
            ids = [run_id for run_id, _ in told if run_id != beginning]
            found += (row.run_id for row in self._rows(ids))
            if len(found) >= limit:
                break
        return found[:limit]

    def _rows(self, ids: list[bytes]) -> list[RunRow]:
        if not ids:
            return []
        names = [as_text(run_id) for run_id in ids]
        replies = self._try(*(script_command(prefix_of(name), "find", name) for name in names))
        # Those whose keys have expired, or got lost, have no row any more.
        return [
            read_run_row(reply, name)
            for name, reply in zip(names, replies, strict=True)
            if isinstance(reply, list | Exception)
        ]

    def attempts(self, run: RedisRun, execution: int) -> Iterator[tuple[Attempt, Step | None]]:
        attempts, steps = self._get(
            ("HGETALL", f"{run.prefix}attempts:{execution}"), ("HGETALL", f"{run.prefix}steps:{execution}")
        )
        outputs = {place: read_step(value) for place, value in as_hash(steps).items()}
        for epoch, attempt in _attempts(attempts):
            step, by = outputs.get(f"{attempt.position}:{attempt.branch}", (None, None))
            yield attempt, step if by in (None, [epoch, attempt.attempt, attempt.started_ns]) else None

    def attempt_page(
        self, run: RedisRun, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[AttemptSummary], str | None]:
        # A hash has no order: the server tells all attempts for each page.
        first = None
        if after is not None:
            epoch, position, started, number, branch = attempt_mark(after)
            first = (epoch, (position, started, branch, number))
        (told,) = self._told([(run, execution)])
        rest = [one for one in told if first is None or (one.epoch, one.attempt[:4]) > first]
        return attempt_page([(*one.attempt, one.epoch, one.size) for one in rest[: limit + 1]], limit)

    def _told(self, runs: Sequence[tuple[RedisRun, int]]) -> list[list[AttemptSummary]]:
        """Of each execution its attempts, in the order in which history is told, without outputs."""
        replies = self._try(*(script_command(run.prefix, "told", execution) for run, execution in runs))
        found: list[list[AttemptSummary]] = []
        for reply in replies:
            attempts, heads = (
                ([], []) if isinstance(reply, Exception) else reply
            )  # Keys that hold something else.
            outputs = {place: read_head(line) for place, line in as_hash(heads).items()}
            told = []
            for epoch, attempt in _attempts(attempts):
                size, by = outputs.get(f"{attempt.position}:{attempt.branch}", (None, None))
                mine = by in (None, [epoch, attempt.attempt, attempt.started_ns])
                told.append(AttemptSummary(attempt, size if mine else None, epoch))
            found.append(told)
        return found

    def attempts_at(self, run: RedisRun, execution: int, position: int, branch: str) -> list[AttemptSummary]:
        (told,) = self._told([(run, execution)])
        return [one for one in told if (one.attempt.position, one.attempt.branch) == (position, branch)]

    def failed_since(self, run: RedisRun, execution: int, epoch: int) -> list[Attempt]:
        # As many as the server lists: the last 20.
        (listed,) = self._get(("LRANGE", f"{run.prefix}failed:{execution}", 0, -1))
        places = [at for at in listed if int(at.partition(b":")[0]) >= epoch]
        if not places:
            return []
        (values,) = self._get(("HMGET", f"{run.prefix}attempts:{execution}", *places))
        told = [part for at, value in zip(places, values, strict=True) if value for part in (at, value)]
        found = [attempt for _, attempt in _attempts(told)]
        return sorted(found, key=lambda attempt: attempt.started_ns + attempt.duration_ns)

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        # The server has no sums of attempts: they are read, and so these are fewer.
        found, _ = self.runs(RunQuery(since_ms=since_ms), limit=min(runs, _TALLIED), after=None, look_at=None)
        sums: dict[tuple[int, str, str, str | None, str | None], list[int]] = {}
        seen = 0
        for first in range(0, len(found), _AT_ONCE):
            some = found[first : first + _AT_ONCE]
            for run, told in zip(some, self._told([(run.run, run.execution) for run in some]), strict=True):
                for one, size, _ in told:
                    key = (
                        run.started_ms // bucket_ms,
                        run.pipeline,
                        one.node_id,
                        one.model,
                        one.failure_class,
                    )
                    wasted = one.cost_pico if one.outcome != "success" and size is None else 0
                    of = sums.setdefault(key, [0] * 6)
                    for i, number in enumerate((1, one.tokens, one.cost_pico, wasted, one.duration_ns)):
                        of[i] += number
                    of[5] = max(of[5], one.duration_ns)
                    seen += 1
                if seen >= attempts:
                    return [Tally(*key, *of) for key, of in sums.items()]
        return [Tally(*key, *of) for key, of in sums.items()]

    def facts(self) -> StoreFacts:
        (seconds, micros), *found = self._get(
            ("TIME",), ("INFO", "server"), ("INFO", "persistence"), ("INFO", "memory")
        )
        info = dict(line.split(":", 1) for part in found for line in info_lines(part) if ":" in line)
        risky = []
        if info.get("aof_enabled") == "0":
            risky.append(
                "appendonly is off: a crash takes what was not saved yet; set appendonly yes, appendfsync always"
            )
        if info.get("maxmemory_policy", "noeviction") != "noeviction":
            policy = info["maxmemory_policy"]
            risky.append(f"maxmemory-policy is {policy}: runs may be evicted; set it to noeviction")
        clock_ms = int(seconds) * 1000 + int(micros) // 1000
        return StoreFacts(f"Redis {info.get('redis_version', '?')}", 1, 1, clock_ms, tuple(risky))

    def step_at(self, run: RedisRun, execution: int, position: int, branch: str) -> StepRow | None:
        place = f"{position}:{branch}"
        node, step = self._get(
            ("HGET", f"{run.prefix}nodes:{execution}", place),
            ("HGET", f"{run.prefix}steps:{execution}", place),
        )
        return None if node is None or step is None else step_row(place, node_of(node), step)

    def _get(self, *commands: tuple[Any, ...]) -> list[Any]:
        replies = self._try(*commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _try(self, *commands: tuple[Any, ...]) -> list[Any]:
        """The replies, errors among them."""
        # Not as a transaction: a server that is out of memory refuses those.
        return self._link.send(commands)


def run_lost_error(run_id: str, server: str) -> CheckpointLost:
    return CheckpointLost(
        f"what {server} kept of run {run_id!r} is gone, or older than what it acknowledged: it was evicted, flushed, or "
        "lost in a crash or failover; set appendonly yes, appendfsync always and maxmemory-policy noeviction, then "
        f"resume the run; if that says the same, delete({run_id!r}) and run it from the beginning"
    )


def _attempts(reply: Any) -> list[tuple[int, Attempt]]:
    """(epoch, attempt) in the order in which history is told; of one that cannot be read, what its place says."""
    told: list[tuple[int, Attempt]] = []
    for at, value in as_hash(reply).items():
        epoch, *place, branch = [*at.split(":", 4), *[""] * 5][:5]
        if not all(number.isdecimal() and len(number) < 20 for number in (epoch, *place)):
            continue  # It has none.
        header, _ = unpack(value)
        if header is None or len(header) != len(Attempt._fields):
            position, started, attempt = map(int, place)
            header = [position, started, branch, attempt, *[None] * (len(Attempt._fields) - 4)]
        told.append((int(epoch), parse_attempt(header)))
    told.sort(key=lambda one: (one[0], one[1][:4]))
    return told


def _mark(start: bytes, run_id: bytes) -> str:
    return f"{as_text(start)}.{quote(run_id, safe='')}"


def _place_of(told: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    run_id, start = told
    return start, run_id


def _marked(mark: str) -> tuple[bytes, bytes]:
    """(start, id) of where a page ended. Raises ValueError for what no page gave."""
    start, _, run_id = mark.partition(".")
    if not (start.isdecimal() and start.isascii() and len(start) < 20 and run_id):
        raise ValueError(f"{mark[:100]!r} is not where a page ended; give the `next` of a page")
    return start.encode(), unquote_to_bytes(run_id)


def _still(row: RunRow, query: RunQuery) -> bool:
    return query.pipeline in (None, row.pipeline) and (not query.statuses or row.status in query.statuses)


def _beside(reply: Any) -> RunExtras:
    if isinstance(reply, Exception):
        return RunExtras(None, (), [])  # Keys that hold something else.
    beside, tags, attempts = reply
    parent = next(iter(as_hash(beside).values()), None)
    header = None if parent is None else unpack(parent)[0]
    failed = [
        parse_attempt(facts)
        for attempt in attempts
        if len(facts := unpack(attempt)[0] or []) == len(Attempt._fields)
    ]
    return RunExtras(None if header is None else str(header[0]), _tags_of(tags), failed)


def _tags_of(data: bytes | None) -> tuple[str, ...]:
    try:
        return tuple(map(str, json.loads(data))) if data else ()
    except (ValueError, TypeError):
        return ()


def _asked(query: RunQuery) -> str:
    """Return the filter of a query as the script reads it; "" for any run."""
    text = query.text
    want = {
        "pipeline": query.pipeline,
        "statuses": dict.fromkeys(query.statuses, True) or None,
        "tag": query.tag,
        "class": query.failure_class,
        "node": query.node,
        "text": None if text is None else "".join(ch.lower() if ch.isascii() else ch for ch in text),
    }
    given = {name: value for name, value in want.items() if value is not None}
    return json.dumps(given) if given else ""
