"""The rows of a Redis store.

Reads are sent at once. Writes are collected and sent at the end of the operation, as one atomic step of the
server. The step checks that the runs that were read to be changed (find() with ``lock``) are unchanged, and
each write checks the fence of its session. If another process was faster, nothing is written, and the
operation is repeated from the start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from stroma.checkpoint.decisions import ENDED
from stroma.checkpoint.decoding import RecordName, decode_number
from stroma.checkpoint.durable.operations import fence_error
from stroma.checkpoint.durable.rows import Annotation, Delay, EventRow, Fence, Opening, RunRow, Step, StepRow
from stroma.checkpoint.entries import Discard
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.events import EXPIRY_MS, MAX_BATCHES
from stroma.checkpoint.payloads import BLOB
from stroma.checkpoint.queue import COMPLETE, Candidate
from stroma.checkpoint.records import AttemptRecord
from stroma.checkpoint.redis.format import (
    DAMAGED,
    RedisRun,
    annotations_key,
    as_hash,
    as_text,
    cell_prefix,
    pack_attempt,
    pack_discard,
    pack_step,
    payloads_of,
    place_of,
    prefix_of,
    read_attempts,
    read_run_row,
    read_step,
    step_row,
)
from stroma.checkpoint.redis.reader import PAGE, RedisReader, run_lost_error
from stroma.checkpoint.redis.scripts import RUNS
from stroma.checkpoint.redis.server import RedisLink, script_command


class RunChanged(Exception):
    """Another process has changed the run since it was read; nothing was written."""


class _Write(NamedTuple):
    """One operation of the script, and the function that handles its reply, if that matters."""

    prefix: str
    values: tuple[Any, ...]
    on_reply: Callable[[Any], object] | None = None


class RedisRows(RedisReader):
    """See :class:`stroma.checkpoint.durable.rows.Rows`. The caller calls :meth:`flush` at the end."""

    def __init__(self, link: RedisLink, ttl_ms: int | None) -> None:
        super().__init__(link)
        self._ttl = "" if ttl_ms is None else str(ttl_ms)
        self._writes: list[_Write] = []
        #: Runs that must be unchanged when the writes are executed, by id.
        self._locked: dict[str, RunRow | None] = {}
        #: Owners as which this operation writes, by run id.
        self._owners: dict[str, str] = {}
        #: Numbers of the last change of cells when they were read, by name.
        self._cell_numbers: dict[str, bytes] = {}

    def flush(self) -> None:
        """Execute all collected writes, or none. Raises RunChanged, Fenced, CheckpointLost, driver errors."""
        writes, self._writes = self._writes, []
        if not writes:
            return
        checks = [
            (prefix_of(run_id), *(("", "", "") if row is None else row.run.state))
            for run_id, row in self._locked.items()
        ]
        operations = [part for w in writes for part in (len(w.values) + 1, w.prefix, *w.values)]
        transaction = (os.urandom(8).hex(), json.dumps(checks))
        (replies,) = self._get(script_command(writes[0].prefix, "transact", *transaction, *operations))
        if replies == b"changed" or replies[-1] == b"changed":
            raise RunChanged
        for write, reply in zip(writes, replies, strict=False):  # The replies end with the first refusal.
            if write.on_reply is not None:
                write.on_reply(reply)

    # ------------------------------------------------------------------ runs

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        (reply,) = self._try(script_command(prefix_of(run_id), "find", run_id))
        if reply == b"lost":
            raise run_lost_error(run_id, self._link.server.name)
        row = None if reply is None else read_run_row(reply, run_id)
        if lock:
            self._locked[run_id] = row
        return row

    def add_execution(self, run: RunRow | None, opening: Opening, execution: int) -> RedisRun:
        token = os.urandom(8).hex() if run is None else run.run.token
        return self._opened(run, opening.run_id, token, "begin", execution, token)

    def continue_execution(self, run: RunRow, discard: Discard) -> RedisRun:
        values = "" if discard == Discard() else pack_discard(discard)
        return self._opened(run, run.run_id, run.run.token, "take_over", run.execution, values)

    def _opened(self, run: RunRow | None, run_id: str, token: str, operation: str, *values: Any) -> RedisRun:
        """Collect an opening, and return the key of the run after it."""
        epoch, writes = (1, 1) if run is None else (run.epoch + 1, run.run.writes + 1)
        key = RedisRun(run_id, token, epoch, writes)
        on_reply = partial(is_recorded, key, server=self._link.server.name)
        self._writes.append(_Write(key.prefix, (operation, run_id, *values), on_reply))
        return key

    def update(
        self, run: RedisRun, fields: Mapping[str, Any], *, fence: Fence | None = None, is_news: bool = False
    ) -> bool:
        # A refusal raises Fenced in flush(), when the reply is known.
        if "owner" in fields:
            self._owners[run.run_id] = fields["owner"]
        pairs = [part for name, value in fields.items() for part in (name, _field(value))]
        if fence is None:
            self._write(run.prefix, "update", run.run_id, int(is_news), *pairs)
        else:
            ttl = self._ttl if fields["status"] in COMPLETE else ""
            values = (run.token, fence.execution, fence.epoch, fence.owner, run.writes, ttl)
            self._append(fence, "finish", run.run_id, *values, *pairs)
        return True

    # is_complete(): steps() and the claim check this, atomically with what they read.

    def steps(
        self, run: RedisRun, execution: int, lazily_loaded: Sequence[tuple[int, str]] = ()
    ) -> list[StepRow]:
        state = ("HMGET", f"{run.prefix}run", "token", "epoch", "writes", "commit_count")
        read = "HKEYS" if lazily_loaded else "HGETALL"
        before, reply, after = self._get(state, (read, f"{run.prefix}steps:{execution}"), state)
        if before != after or [*map(as_text, before[:3])] != [run.token, str(run.epoch), str(run.writes)]:
            raise RunChanged
        steps = dict.fromkeys(map(as_text, reply), b"") if lazily_loaded else as_hash(reply)
        if len(steps) != int(before[3]):
            raise run_lost_error(run.run_id, self._link.server.name)
        if lazily_loaded:
            prefixes = tuple(f"{position}:{prefix}" for position, prefix in lazily_loaded)
            loaded = [place for place in steps if place.endswith(":") or not place.startswith(prefixes)]
            steps = self._outputs(run, execution, loaded)
        return self._step_rows(run, execution, steps.items())

    def steps_at(self, run: RedisRun, execution: int, places: Sequence[tuple[int, str]]) -> list[StepRow]:
        fields = [f"{position}:{branch}" for position, branch in places]
        if not fields:
            return []
        (values,) = self._get(("HMGET", f"{run.prefix}steps:{execution}", *fields))
        outputs = zip(fields, values, strict=True)
        return self._step_rows(run, execution, (one for one in outputs if one[1] is not None))

    def _step_rows(
        self, run: RedisRun, execution: int, outputs: Iterable[tuple[str, bytes]]
    ) -> list[StepRow]:
        """Decode commits by their places. A damaged one has the node of its attempt."""
        rows = sorted(step_row(run.run_id, place, value) for place, value in outputs)
        if any(row.node_id == DAMAGED for row in rows):
            (attempts,) = self._attempts_of([(run, execution)])
            nodes = {(one.position, one.branch): one.node_id for one in attempts}
            rows = [row._replace(node_id=nodes.get(row[:2], row.node_id)) for row in rows]
        return rows

    def _outputs(self, run: RedisRun, execution: int, places: list[str]) -> dict[str, bytes]:
        """Return the commits at these places in stored form. Raises CheckpointLost if one is missing."""
        outputs: dict[str, bytes] = {}
        for first in range(0, len(places), PAGE):
            part = places[first : first + PAGE]
            (values,) = self._get(("HMGET", f"{run.prefix}steps:{execution}", *part))
            if None in values:
                raise run_lost_error(run.run_id, self._link.server.name)
            outputs.update(zip(part, values, strict=True))
        return outputs

    def identities(self, run: RedisRun, execution: int) -> list[tuple[str, int]]:
        (reply,) = self._get(("HGETALL", f"{run.prefix}identities:{execution}"))
        return [
            (identity, decode_number(position, RecordName(run.run_id, "identity", identity)))
            for identity, position in as_hash(reply).items()
        ]

    def commit(self, fence: Fence, attempt: AttemptRecord, step: Step | None) -> bool:
        # A refusal raises Fenced in flush(), when the reply is known.
        self._owners[fence.run.run_id] = fence.owner
        self._append(fence, *_commit_values(fence, attempt, step))
        return True

    def claim(self, candidates: Sequence[Candidate], token: str, seconds: float) -> list[Candidate]:
        claimed: list[Candidate] = []
        now_ms = max((one.due_ms for one in candidates), default=0)

        def note(one: Candidate, reply: Any) -> None:
            if reply == 1:
                claimed.append(one)

        for one in candidates:
            values = ("claim", one.run_id, now_ms, token, int(seconds * 1000))
            self._writes.append(_Write(prefix_of(one.run_id), values, partial(note, one)))
        return claimed

    def renew(self, fences: list[Fence]) -> list[Fence]:
        replies = self._link.send(
            [
                script_command(
                    f.run.prefix, "renew", f.run.token, f.epoch, f.owner, f.run.writes, _lease_ms(f)
                )
                for f in fences
            ]
        )
        renewed: list[Fence] = []
        for fence, reply in zip(fences, replies, strict=True):
            if isinstance(reply, int):  # For any other reply, the next commit raises the error.
                fence.run.writes = max(fence.run.writes, reply)
                renewed.append(fence)
        return renewed

    def _append(self, fence: Fence, *values: Any) -> None:
        """Collect a write of a session. If it is refused, flush() raises the reason."""
        self._writes.append(_Write(fence.run.prefix, values, lambda reply: self._settle(fence, reply)))

    def _settle(self, fence: Fence, reply: Any) -> None:
        run_id = fence.run.run_id
        if not is_recorded(fence.run, reply, self._link.server.name):
            raise fence_error(self, fence, run_id)

    # ------------------------------------------------------------------ annotations

    def key_of(self, run_id: str) -> RedisRun:
        return RedisRun(run_id, "", 0, 0)  # Its token does not count for annotations.

    def annotate(self, run: RedisRun, position: int, branch: str, node_id: str, step: Step) -> None:
        value = pack_step(node_id, step)
        if position == Annotation.SAVED:
            self._write(run.prefix, "save", branch, value, self._ttl)
        else:
            owner = self._owners.get(run.run_id, "")
            self._write(run.prefix, "annotate", owner, annotations_key(position), branch, value)

    def annotations(self, run: RedisRun, *kinds: Annotation, branch: str | None = None) -> list[StepRow]:
        keys = [f"{run.prefix}{annotations_key(kind)}" for kind in kinds]
        if branch is None:
            replies = self._get(*(("HGETALL", key) for key in keys))
            values = [sorted(as_hash(reply).items()) for reply in replies]
        else:
            replies = self._get(*(("HGET", key, branch) for key in keys))
            values = [[] if reply is None else [(branch, reply)] for reply in replies]
        return [
            StepRow(kind, branch, *read_step(value))
            for kind, of_kind in zip(kinds, values, strict=True)
            for branch, value in of_kind
        ]

    def delete_annotations(self, run: RedisRun, *kinds: Annotation, branch: str | None = None) -> None:
        branches = () if branch is None else (branch,)
        owner = self._owners.get(run.run_id, "")
        for kind in kinds:
            self._write(run.prefix, "delete_annotations", owner, annotations_key(kind), *branches)

    def with_requests(self, runs: list[RedisRun]) -> list[RedisRun]:
        key = annotations_key(Annotation.REQUEST)
        replies = self._get(*(("EXISTS", run.prefix + key) for run in runs)) if runs else []
        return [run for run, exists in zip(runs, replies, strict=True) if exists]

    def newest_output(self, run_id: str, node_id: str) -> StepRow | None:
        prefix = prefix_of(run_id)
        (seconds, micros), saved, execution = self._get(
            ("TIME",), ("HGET", f"{prefix}saved", node_id), ("HGET", f"{prefix}run", "execution")
        )
        number = as_text(execution)
        attempts, places = self._get(
            ("HGETALL", f"{prefix}attempts:{number}"), ("HKEYS", f"{prefix}steps:{number}")
        )
        numbered = read_attempts(run_id, as_hash(attempts).items(), places)
        newest = max(
            ((order, place_of(one)) for order, one in numbered if one.node_id == node_id), default=(0, "")
        )
        if saved is not None:
            head, _, value = saved.partition(b"\n")
            name = RecordName(run_id, "saved state", node_id)
            saved_order, _, until = head.partition(b" ")
            now_ms = int(seconds) * 1000 + int(micros) // 1000
            has_expired = until != b"" and decode_number(until, name) <= now_ms
            if not has_expired and decode_number(saved_order, name) > newest[0]:
                return StepRow(Annotation.SAVED, node_id, node_id, read_step(value)[1])
        if not newest[0]:
            return None
        (value,) = self._get(("HGET", f"{prefix}steps:{number}", newest[1]))
        if value is None:
            raise run_lost_error(run_id, self._link.server.name)
        return step_row(run_id, newest[1], value)

    def delete(self, run_id: str) -> None:
        self._write(prefix_of(run_id), "delete", run_id)

    def _write(self, prefix: str, operation: str, *values: Any) -> None:
        self._writes.append(_Write(prefix, (operation, *values)))

    # ------------------------------------------------------------------ events

    def append_events(self, batches: Sequence[EventRow]) -> None:
        for run, execution, (epoch, last), data, _ in batches:
            values = (run.token, execution, f"{epoch}-{last}", data, MAX_BATCHES, EXPIRY_MS)
            self._write(run.prefix, "append_events", *values)

    # ------------------------------------------------------------------ cells

    def read_cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        ((now, self._cell_numbers[name], data),) = self._get(script_command(cell_prefix(name), "read_cell"))
        return data, now

    def write_cell(self, name: str, data: bytes) -> None:
        self._write(cell_prefix(name), "write_cell", self._cell_numbers[name], os.urandom(8).hex(), data)

    # ------------------------------------------------------------------ retention

    def expired_run_ids(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        # States from save() expire by themselves, or have no expiry. Expired runs leave their ids in the
        # lists.
        self._link.send([script_command("stroma:", "sweep")])
        run_ids: list[str] = []
        start = 0
        while len(run_ids) < limit:
            page = ("ZRANGEBYSCORE", RUNS, "-inf", f"({before_ms}000", "LIMIT", start, PAGE)
            (ids,) = self._get(page)
            run_ids += (
                row.run_id
                for row in self._rows(ids)
                if row.updated_ms < before_ms and (unfinished or row.status in ENDED)
            )
            start += PAGE
            if len(ids) < PAGE:
                break
        return run_ids[:limit]

    def blobs(self) -> Iterator[bytes]:
        for key in self._link.client.scan_iter(match="stroma:{*", count=1000, _type="HASH"):
            part = key.rpartition(b"}:")[2].partition(b":")[0]
            if part not in (b"steps", b"annotations", b"saved"):
                continue
            for _, value in self._link.client.hscan_iter(key, count=100):
                for payload in payloads_of(part, value):
                    if payload.startswith(BLOB):
                        yield payload


# ---------------------------------------------------------------------- commits


def commit_command(fence: Fence, attempt: AttemptRecord, step: Step | None) -> tuple[Any, ...]:
    """Return the command that records an attempt with its usage and output, and renews the lease."""
    return script_command(fence.run.prefix, *_commit_values(fence, attempt, step))


def _commit_values(fence: Fence, attempt: AttemptRecord, step: Step | None) -> tuple[Any, ...]:
    run = fence.run
    position, started_ns, branch, number = attempt.key
    at = f"{fence.epoch}:{position}:{started_ns}:{number}:{branch}"
    output: tuple[Any, ...] = ("", 0, b"")
    if step is not None:
        output = (place_of(attempt), len(step.output), pack_step(attempt.node_id, step))
    # The time of a group includes that of its children.
    usage = (attempt.cost_pico, attempt.tokens, 0 if branch else attempt.function_ns)
    fence_values = (run.token, fence.execution, fence.epoch, fence.owner, run.writes, _lease_ms(fence))
    failed = "" if attempt.failure_class is None else 1
    step_of_code = (attempt.identity or "", position)
    return ("commit", *fence_values, at, pack_attempt(attempt), *usage, failed, *output, *step_of_code)


def is_recorded(run: RedisRun, reply: Any, server: str) -> bool:
    """Return True if a write was executed, False if it was fenced off. Raises CheckpointLost, StoreError."""
    if reply == b"lost":
        raise run_lost_error(run.run_id, server)
    if isinstance(reply, int):
        run.writes = max(run.writes, reply)
        return True
    if reply == b"fenced":
        return False
    # Not a reply of the script, for example from a proxy. The run was not taken over, so this is not Fenced.
    # If the write was executed, a repeated one finds it.
    raise StoreError(
        f"{server} replied to a write of run {run.run_id!r} with an unknown reply {reply!r:.100}; check "
        "proxies between this process and the server"
    )


def _field(value: Any) -> Any:
    """Return a value of a field of a run as ``change`` in the script takes it."""
    return "" if value is None else f"+{value.ms}" if isinstance(value, Delay) else value


def _lease_ms(fence: Fence) -> int:
    return int(fence.lease_seconds * 1000)
