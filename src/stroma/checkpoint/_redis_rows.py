"""The rows of a Redis store.

Reading is done at once. What an operation writes is gathered, and sent at its end as one transaction: each step of it
compares what it builds on (the run's token, epoch and version as they were read, or the session's fence) with what is
there. If another process was faster, nothing is done, and the operation is done again from the start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

from stroma.checkpoint._redis_format import (
    Run,
    cell_prefix,
    from_hex,
    node_of,
    pack,
    pack_step,
    pairs,
    payloads_of,
    prefix_of,
    read_head,
    read_step,
    run_row,
    step_row,
    text,
    unpack,
)
from stroma.checkpoint._redis_scripts import IDS, RUNS, TOMBSTONE_SECONDS
from stroma.checkpoint._redis_server import Link, script
from stroma.checkpoint._rows import (
    PARENT,
    SAVED,
    Attempt,
    Beside,
    Fence,
    Opening,
    RunRow,
    Step,
    StepRow,
    Tally,
    Told,
    fenced,
)
from stroma.checkpoint._sql_reading import attempt_mark, attempt_page
from stroma.checkpoint.errors import CheckpointLost, CorruptCheckpoint
from stroma.checkpoint.payloads import BLOB
from stroma.checkpoint.records import RunQuery, StoreFacts

__all__ = ["Changed", "RedisRows", "commit_command", "kept_or_raise", "lost"]

_PAGE: Final = 200
_TALLIED: Final = 200  # runs whose attempts are summed up
_AT_ONCE: Final = 20  # runs whose attempts are asked for in one round trip
_LOOKED_AT: Final = 2000  # runs that the server goes through at once
_ENDED: Final = ("COMPLETED", "RESUMED", "FAILED", "CANCELLED")


class Changed(Exception):
    """Another process changed the run since it was read; nothing was done."""


class _Write(NamedTuple):
    """One step of a transaction, and what to do with its reply."""

    command: tuple[Any, ...]
    read: Callable[[Any], None]


class RedisRows:
    """See :class:`stroma.checkpoint._rows.Rows`; whoever uses it calls :meth:`flush` at the end."""

    def __init__(self, link: Link, ttl_ms: int | None) -> None:
        self._link = link
        self._ttl = "" if ttl_ms is None else str(ttl_ms)
        self._writes: list[_Write] = []
        #: Runs that must stay as they were found, by id.
        self._locked: dict[str, RunRow | None] = {}
        #: Owners that this operation writes as, by run id.
        self._owners: dict[str, str] = {}
        #: Changes that cells had when they were read, by name.
        self._numbers: dict[str, bytes] = {}

    def flush(self) -> None:
        """Do what was asked for: all of it, or nothing. Raises Changed, Fenced, CheckpointLost, driver errors."""
        writes, self._writes = self._writes, []
        if not writes:
            return
        replies = self._link.send([write.command for write in writes], atomic=len(writes) > 1)
        for write, reply in zip(writes, replies, strict=True):
            if isinstance(reply, Exception):
                raise reply
            write.read(reply)

    # ------------------------------------------------------------------ runs

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        (reply,) = self._get(script(prefix_of(run_id), "find", run_id))
        if reply == b"lost":
            raise lost(run_id, self._link.server.name)
        found = None if reply is None else run_row(reply)
        if lock:
            self._locked[run_id] = found
        return found

    def begin(self, found: RunRow | None, opening: Opening) -> Fence:
        token = os.urandom(8).hex() if found is None else found.run.token
        old = ("", "", "") if found is None else (token, found.run.epoch, found.run.version)
        execution, epoch = (1, 1) if found is None else (found.execution + 1, found.epoch + 1)
        lease = int(opening.lease_seconds * 1000)
        data = pack([opening.contract, opening.sha256.hex()], opening.input)
        about = (opening.owner, token, execution, epoch, opening.pipeline, lease, data, _tags(opening))
        return self._claim("begin", (*old, *about), found, opening, token, execution, epoch)

    def go_on(self, found: RunRow, opening: Opening) -> Fence:
        run, epoch = found.run, found.epoch + 1
        discard = "" if opening.discard_from is None else max(opening.discard_from, 0)
        lease = int(opening.lease_seconds * 1000)
        told = (run.token, run.epoch, run.version, opening.owner, found.execution, epoch, lease, discard)
        about = (*told, _tags(opening))
        return self._claim("go_on", about, found, opening, run.token, found.execution, epoch)

    def _claim(
        self,
        operation: str,
        about: tuple[Any, ...],
        found: RunRow | None,
        opening: Opening,
        token: str,
        execution: int,
        epoch: int,
    ) -> Fence:
        run = Run(opening.run_id, token, epoch, 1 if found is None else found.run.version + 1)
        self._owners[opening.run_id] = opening.owner
        command = script(run.prefix, operation, opening.run_id, *about)
        self._writes.append(_Write(command, lambda reply: self._settle(run, reply)))
        return Fence(run, execution, epoch, opening.owner, opening.lease_seconds)

    def input(self, run: Run, execution: int) -> tuple[str, bytes, bytes] | None:
        token = ("HGET", f"{run.prefix}run", "token")
        before, value, after = self._get(token, ("HGET", f"{run.prefix}inputs", execution), token)
        if {text(before), text(after)} != {run.token}:
            raise Changed
        if value is None:
            raise lost(run.run_id, self._link.server.name)
        header, parts = unpack(value)
        return (str(header[0]), parts[0], from_hex(header[1])) if header else ("", value, b"")

    def steps(self, run: Run, execution: int, apart: Sequence[tuple[int, str]] = ()) -> list[StepRow]:
        if apart:
            return self._steps_but(run, execution, apart)
        state = ("HMGET", f"{run.prefix}run", "token", "epoch", "version", "kept")
        before, nodes, steps, after = self._get(
            state,
            ("HGETALL", f"{run.prefix}nodes:{execution}"),
            ("HGETALL", f"{run.prefix}steps:{execution}"),
            state,
        )
        if before != after or [*map(text, before[:3])] != [run.token, str(run.epoch), str(run.version)]:
            raise Changed
        nodes, steps = pairs(nodes), pairs(steps)
        if len(steps) != int(before[3]) or nodes.keys() != steps.keys():
            raise lost(run.run_id, self._link.server.name)
        # In the order of their commits: a hash has none of its own.
        told = sorted(steps, key=lambda place: int(nodes[place].partition(b" ")[0]))
        return [step_row(place, node_of(nodes[place]), steps[place]) for place in told]

    def _steps_but(self, run: Run, execution: int, apart: Sequence[tuple[int, str]]) -> list[StepRow]:
        """Only some of the outputs: which there are stands in a hash of its own."""
        state = ("HMGET", f"{run.prefix}run", "token", "epoch", "version", "kept")
        before, nodes, count, after = self._get(
            state,
            ("HGETALL", f"{run.prefix}nodes:{execution}"),
            ("HLEN", f"{run.prefix}steps:{execution}"),
            state,
        )
        if before != after or [*map(text, before[:3])] != [run.token, str(run.epoch), str(run.version)]:
            raise Changed
        nodes = pairs(nodes)
        if len(nodes) != int(before[3]) or count != len(nodes):
            raise lost(run.run_id, self._link.server.name)
        beginnings = tuple(f"{position}:{beginning}" for position, beginning in apart)
        wanted = [place for place in nodes if place.endswith(":") or not place.startswith(beginnings)]
        wanted.sort(key=lambda place: int(nodes[place].partition(b" ")[0]))
        return self._steps_at(run, execution, wanted, nodes)

    def some(self, run: Run, execution: int, position: int, branches: Sequence[str]) -> list[StepRow]:
        places = [f"{position}:{branch}" for branch in branches]
        if not places:
            return []
        (found,) = self._get(("HMGET", f"{run.prefix}nodes:{execution}", *places))
        nodes = {place: value for place, value in zip(places, found, strict=True) if value is not None}
        return self._steps_at(run, execution, list(nodes), nodes)

    def _steps_at(
        self, run: Run, execution: int, places: list[str], nodes: Mapping[str, bytes]
    ) -> list[StepRow]:
        told: list[StepRow] = []
        for first in range(0, len(places), _PAGE):
            part = places[first : first + _PAGE]
            (values,) = self._get(("HMGET", f"{run.prefix}steps:{execution}", *part))
            if None in values:
                raise lost(run.run_id, self._link.server.name)
            told += (
                step_row(place, node_of(nodes[place]), value)
                for place, value in zip(part, values, strict=True)
            )
        return told

    def commit(self, fence: Fence, attempt: Attempt, step: Step | None) -> bool:
        # False, were it told now, would be Fenced: that is raised when the reply is there.
        self._owners[fence.run.run_id] = fence.owner
        command = commit_command(fence, attempt, step)
        self._writes.append(_Write(command, lambda reply: self._settle(fence.run, reply)))
        return True

    def finish(self, fence: Fence, status: str, error: str | None) -> bool:
        run = fence.run
        ttl = self._ttl if status in ("COMPLETED", "RESUMED") else ""
        said = "" if error is None else f"={error}"
        exact = "exact" if run.run_id in self._locked and run.run_id not in self._owners else ""
        about = (run.token, fence.execution, fence.epoch, fence.owner, run.version, status, said, ttl, exact)
        command = script(run.prefix, "finish", run.run_id, *about)
        self._writes.append(_Write(command, lambda reply: self._settle(run, reply)))
        return True

    def renew(self, fences: list[Fence]) -> None:
        replies = self._link.send(
            [
                script(f.run.prefix, "renew", f.run.token, f.epoch, f.owner, f.run.version, _lease(f))
                for f in fences
            ]
        )
        for fence, reply in zip(fences, replies, strict=True):
            if isinstance(reply, int):  # The next commit finds out what else there is to say.
                fence.run.version = max(fence.run.version, reply)

    def _settle(self, run: Run, reply: Any) -> None:
        if reply == b"changed" or (reply == b"fenced" and run.run_id in self._locked):
            raise Changed
        if not kept_or_raise(run, reply, self._link.server.name):
            raise fenced(self.find(run.run_id), run.run_id)

    # ------------------------------------------------------------------ beside the commits

    def keep(self, run_id: str, position: int, branch: str, node_id: str, step: Step) -> None:
        if position == SAVED:
            value = pack_step(step, 0, 0, 0)
            self._write(prefix_of(run_id), "save", branch, value, self._ttl)
            return
        value = pack([node_id], pack_step(step, 0, 0, 0))
        self._write(prefix_of(run_id), "keep", *self._guard(run_id), position, branch, value)

    def kept(self, run: Run, position: int, branch: str | None = None) -> list[StepRow]:
        if position == PARENT and not run.parent:
            return []
        if branch is None:
            (reply,) = self._get(("HGETALL", f"{run.prefix}beside:{position}"))
            values = sorted(pairs(reply).items())
        else:
            (reply,) = self._get(("HGET", f"{run.prefix}beside:{position}", branch))
            values = [] if reply is None else [(branch, reply)]
        found = []
        for branch, value in values:
            header, parts = unpack(value)
            node_id, data = (str(header[0]), parts[0]) if header else ("?", b"")
            found.append(StepRow(position, branch, node_id, read_step(data)[0]))
        return found

    def drop(self, run: Run, position: int, branch: str | None = None) -> None:
        branches = () if branch is None else (branch,)
        self._write(run.prefix, "drop", *self._guard(run.run_id), position, *branches)

    def wanted(self, runs: list[Run]) -> list[Run]:
        replies = self._get(*(("EXISTS", f"{run.prefix}beside:-3") for run in runs)) if runs else []
        return [run for run, there in zip(runs, replies, strict=True) if there]

    def newest(self, run_id: str, node_id: str) -> StepRow | None:
        (reply,) = self._get(script(prefix_of(run_id), "newest", node_id))
        now, saved, order, place, value, _ = [*reply, None][:6]
        if saved is not None:
            head, _, data = saved.partition(b"\n")
            try:
                number, until = head.split(b" ")
                if (not until or int(until) > now) and int(number) > order:
                    step, header = read_step(data)
                    if header is None:
                        raise ValueError("it is not in our format")
                    return StepRow(SAVED, node_id, node_id, step)
            except ValueError as error:
                raise CorruptCheckpoint(
                    f"the checkpoint of node {node_id!r} in run {run_id!r} cannot be read back: {error}; save it again"
                ) from error
        if place is None:
            return None
        if value is None:
            raise lost(run_id, self._link.server.name)
        return step_row(place.decode(), node_id, value)

    def delete(self, run_id: str) -> None:
        found = self._locked.get(run_id)
        as_found = ("", "") if found is None else (found.run.token, found.run.version)
        self._write(prefix_of(run_id), "delete", run_id, TOMBSTONE_SECONDS * 1000, *as_found)

    def _guard(self, run_id: str) -> tuple[str, str]:
        """(token, owner) that must be the run's for something to be kept beside its commits; "" if any will do."""
        owner, found = self._owners.get(run_id, ""), self._locked.get(run_id)
        return ("" if owner or found is None else found.run.token), owner

    def _write(self, prefix: str, operation: str, *values: Any) -> None:
        def read(reply: Any) -> None:
            if reply == b"changed":
                raise Changed

        self._writes.append(_Write(script(prefix, operation, *values), read))

    # ------------------------------------------------------------------ cells

    def cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        ((now, self._numbers[name], data),) = self._get(script(cell_prefix(name), "cell"))
        return data, now

    def put_cell(self, name: str, data: bytes) -> None:
        self._write(cell_prefix(name), "put_cell", self._numbers[name], os.urandom(8).hex(), data)

    # ------------------------------------------------------------------ retention

    def expired(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        # What only save() kept expires by itself, or was meant to stay.
        found: list[str] = []
        start = 0
        while len(found) < limit:
            page = ("ZRANGEBYSCORE", RUNS, "-inf", f"({before_ms}000", "LIMIT", start, _PAGE)
            (ids,) = self._get(page)
            found += (
                row.run_id
                for row in self._rows(ids)
                if row.updated_ms < before_ms and (unfinished or row.status in _ENDED)
            )
            start += _PAGE
            if len(ids) < _PAGE:
                break
        return found[:limit]

    def blobs(self) -> Iterator[bytes]:
        for key in self._link.client.scan_iter(match="stroma:{*", count=1000, _type="HASH"):
            part = key.rpartition(b"}:")[2].partition(b":")[0]
            if part not in (b"inputs", b"steps", b"beside", b"saved"):
                continue
            for _, value in self._link.client.hscan_iter(key, count=100):
                for payload in payloads_of(part, value):
                    if payload.startswith(BLOB):
                        yield payload

    # ------------------------------------------------------------------ reading

    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, look_at: int | None
    ) -> tuple[list[RunRow], str | None]:
        self._link.send([script("stroma:", "sweep")])  # Whoever may only read is refused, and no harm done.
        found: list[RunRow] = []
        seen_to: tuple[bytes, bytes] | None = None
        start_at = None if after is None else _marked(after)
        for told, seen_to in self._matching(b"", query, start_at, look_at):  # noqa: B007
            rows = {row.run_id: row for row in self._rows([run_id for run_id, _ in told])}
            for run_id, start in told:
                # It is read after it was found, and may have become another one.
                row = rows.get(run_id.decode())
                if row is None or not _still(row, query):
                    continue
                found.append(row)
                if len(found) == limit:
                    return found, self._more(start, run_id)
        return found, None if seen_to is None else _mark(*seen_to)

    def _more(self, start: bytes, run_id: bytes) -> str | None:
        """Where the next page begins, if any run is older: whether it is asked for, the next page tells."""
        ((looked_at, *_),) = self._get(script("stroma:", "matching", start, run_id, "-inf", 1, b"", ""))
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
        most = _PAGE if not beginning and not asked else _LOOKED_AT
        looked_at, seen = most, 0
        while looked_at >= most and (look_at is None or seen < look_at):
            start, before = place or (b"+inf", b"")
            about = (start, before, lowest, most, beginning, asked)
            (looked_at, *end), ids = self._found(script("stroma:", "matching", *about))
            seen += looked_at
            if looked_at < most or tuple(end) == place:
                place = None
            else:
                place = (end[0], end[1])
            for first in range(0, len(ids), _PAGE):
                rest = first + _PAGE < len(ids)
                # In the midst of what was looked at, a page ends at the last one that was told.
                yield ids[first : first + _PAGE], (_place_of(ids[first + _PAGE - 1]) if rest else place)
            if not ids:
                yield [], place
            if place is None:
                return

    def _found(self, command: tuple[Any, ...]) -> tuple[list[Any], list[tuple[bytes, bytes]]]:
        (reply,) = self._get(command)
        ids = reply[3:]
        return reply[:3], list(zip(ids[::2], ids[1::2], strict=True))

    def beside(self, runs: list[RunRow], *, failed: int) -> list[Beside]:
        told: list[Beside] = []
        for first in range(0, len(runs), _PAGE):
            some = runs[first : first + _PAGE]
            replies = self._get(*(script(row.run.prefix, "beside", row.execution, failed) for row in some))
            told += map(_beside, replies)
        return told

    def ids(self, prefix: str, limit: int) -> list[str]:
        beginning = prefix.encode()
        low, high = b"[" + beginning, b"(" + beginning + b"\xff"  # No byte of UTF-8 is that high.
        (count,) = self._get(("ZLEXCOUNT", IDS, low, high))
        if count > _LOOKED_AT:
            # So many that the newest of them are found sooner among all runs than by sorting them.
            return self._newest_of_many(beginning, limit)
        matches: list[tuple[bool, float, bytes]] = []
        while True:
            (page,) = self._get(("ZRANGEBYLEX", IDS, low, high, "LIMIT", 0, _PAGE))
            if page:
                scores = self._get(*(("ZSCORE", RUNS, run_id) for run_id in page))
                matches += (
                    (run_id == beginning, float(score), run_id)
                    for run_id, score in zip(page, scores, strict=True)
                    if score is not None
                )
                low = b"(" + page[-1]
            if len(page) < _PAGE:
                break
        matches.sort(reverse=True)
        found: list[str] = []
        for start in range(0, len(matches), _PAGE):
            found += (row.run_id for row in self._rows([m[2] for m in matches[start : start + _PAGE]]))
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
        # Those whose keys have expired, or got lost, have no row any more.
        replies = self._get(*(script(prefix_of(run_id.decode()), "find", run_id) for run_id in ids))
        return [run_row(reply) for reply in replies if isinstance(reply, list)]

    def attempts(self, run: Run, execution: int) -> Iterator[tuple[Attempt, Step | None]]:
        attempts, steps = self._get(
            ("HGETALL", f"{run.prefix}attempts:{execution}"), ("HGETALL", f"{run.prefix}steps:{execution}")
        )
        outputs = {place: read_step(value) for place, value in pairs(steps).items()}
        for epoch, attempt in _attempts(run, attempts):
            step, by = outputs.get(f"{attempt.position}:{attempt.branch}", (None, None))
            yield attempt, step if by in (None, [epoch, attempt.attempt, attempt.started_ns]) else None

    def attempt_page(
        self, run: Run, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[Told], str | None]:
        # A hash has no order: the server tells all attempts for each page.
        first = None
        if after is not None:
            epoch, position, started, number, branch = attempt_mark(after)
            first = (epoch, (position, started, branch, number))
        (told,) = self._told([(run, execution)])
        rest = [one for one in told if first is None or (one.epoch, one.attempt[:4]) > first]
        return attempt_page([(*one.attempt, one.epoch, one.size) for one in rest[: limit + 1]], limit)

    def _told(self, runs: Sequence[tuple[Run, int]]) -> list[list[Told]]:
        """Of each execution its attempts, in the order in which history is told, without outputs."""
        replies = self._get(*(script(run.prefix, "told", execution) for run, execution in runs))
        found = []
        for (run, _), (attempts, heads) in zip(runs, replies, strict=True):
            outputs = {place: read_head(line) for place, line in pairs(heads).items()}
            told = []
            for epoch, attempt in _attempts(run, attempts):
                size, by = outputs.get(f"{attempt.position}:{attempt.branch}", (None, None))
                mine = by in (None, [epoch, attempt.attempt, attempt.started_ns])
                told.append(Told(attempt, size if mine else None, epoch))
            found.append(told)
        return found

    def attempts_at(self, run: Run, execution: int, position: int, branch: str) -> list[Told]:
        (told,) = self._told([(run, execution)])
        return [one for one in told if (one.attempt.position, one.attempt.branch) == (position, branch)]

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
        info = dict(line.split(":", 1) for part in found for line in _lines(part) if ":" in line)
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

    def step_at(self, run: Run, execution: int, position: int, branch: str) -> StepRow | None:
        place = f"{position}:{branch}"
        node, step = self._get(
            ("HGET", f"{run.prefix}nodes:{execution}", place),
            ("HGET", f"{run.prefix}steps:{execution}", place),
        )
        return None if node is None or step is None else step_row(place, node_of(node), step)

    def _get(self, *commands: tuple[Any, ...]) -> list[Any]:
        # Not as a transaction: a server that is out of memory refuses those.
        replies = self._link.send(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies


# ---------------------------------------------------------------------- commits


def commit_command(fence: Fence, attempt: Attempt, step: Step | None) -> tuple[Any, ...]:
    """What keeps an attempt, its usage and its output, and renews the lease."""
    run, execution, epoch, owner, _ = fence
    position, started_ns, branch, number, node_id, *_ = attempt
    at = f"{epoch}:{position}:{started_ns}:{number}:{branch}"
    place, data = "", b""
    if step is not None:
        place, data = f"{position}:{branch}", pack_step(step, epoch, number, started_ns)
    # What a group took is its own wall time; its children's is part of it.
    sums = (attempt.cost_pico, attempt.tokens, 0 if branch else attempt.duration_ns)
    about = (run.token, execution, epoch, owner, run.version, _lease(fence), at, pack(list(attempt)))
    failed = "" if attempt.failure_class is None else 1
    return script(run.prefix, "commit", *about, *sums, failed, place, node_id, data)


def kept_or_raise(run: Run, reply: Any, server: str) -> bool:
    """Whether a session's write was done; False if its fence is in the way. Raises CheckpointLost."""
    if reply == b"lost":
        raise lost(run.run_id, server)
    if isinstance(reply, int):
        run.version = max(run.version, reply)
        return True
    return False


def lost(run_id: str, server: str) -> CheckpointLost:
    return CheckpointLost(
        f"what {server} kept of run {run_id!r} is gone, or older than what it acknowledged: it was evicted, flushed, or "
        "lost in a crash or failover; set appendonly yes, appendfsync always and maxmemory-policy noeviction, then "
        f"resume the run; if that says the same, delete({run_id!r}) and run it from the beginning"
    )


def _attempts(run: Run, reply: Any) -> list[tuple[int, Attempt]]:
    """(epoch, attempt) in the order in which history is told. Raises CorruptCheckpoint."""
    told: list[tuple[int, Attempt]] = []
    for at, value in pairs(reply).items():
        header, _ = unpack(value)
        if header is None or len(header) != len(Attempt._fields):
            raise CorruptCheckpoint(
                f"attempt {at} of run {run.run_id!r} cannot be read back; its outputs can: resume the run, or delete it"
            )
        told.append((int(at.partition(":")[0]), Attempt._make(header)))
    told.sort(key=lambda one: (one[0], one[1][:4]))
    return told


def _tags(opening: Opening) -> str:
    return json.dumps(opening.tags) if opening.tags else ""


def _mark(start: bytes, run_id: bytes) -> str:
    return f"{text(start)}.{quote(run_id.decode(), safe='')}"


def _place_of(told: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    run_id, start = told
    return start, run_id


def _marked(mark: str) -> tuple[bytes, bytes]:
    """(start, id) of where a page ended. Raises ValueError for what no page gave."""
    start, _, run_id = mark.partition(".")
    if not (start.isdecimal() and start.isascii() and len(start) < 20 and run_id):
        raise ValueError(f"{mark[:100]!r} is not where a page ended; give the `next` of a page")
    return start.encode(), unquote(run_id, errors="strict").encode()


def _still(row: RunRow, query: RunQuery) -> bool:
    return query.pipeline in (None, row.pipeline) and (not query.statuses or row.status in query.statuses)


def _beside(reply: list[Any]) -> Beside:
    beside, tags, attempts = reply
    parent = next(iter(pairs(beside).values()), None)
    header = None if parent is None else unpack(parent)[0]
    failed = [
        Attempt._make(facts)
        for attempt in attempts
        if len(facts := unpack(attempt)[0] or []) == len(Attempt._fields)
    ]
    return Beside(None if header is None else str(header[0]), tuple(json.loads(tags)) if tags else (), failed)


def _asked(query: RunQuery) -> str:
    """What a run must be, as the script reads it; "" for any."""
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


def _lines(info: Any) -> list[str]:
    """The lines of a reply to INFO, which some drivers have read already."""
    if isinstance(info, dict):
        return [f"{name}:{value}" for name, value in info.items()]
    return text(info).splitlines()


def _lease(fence: Fence) -> int:
    return int(fence.lease_seconds * 1000)
