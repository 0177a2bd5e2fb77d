"""The rows of a Redis store.

Reading is done at once. What an operation writes is gathered, and sent at its end as one step of the server: it compares
the runs that were read to be changed (find() with ``lock``) with what is there, and each write its session's fence. If
another process was faster, nothing is done, and the operation is done again from the start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from stroma.checkpoint.durable.integrity import require_undamaged
from stroma.checkpoint.durable.operations import fenced_error
from stroma.checkpoint.durable.rows import Annotation, Fence, Opening, RunRow, Step, StepRow
from stroma.checkpoint.errors import CorruptCheckpoint, StoreError
from stroma.checkpoint.payloads import BLOB
from stroma.checkpoint.records import Attempt
from stroma.checkpoint.redis.format import (
    RedisRun,
    as_hash,
    as_text,
    cell_prefix,
    from_hex,
    node_of,
    pack,
    pack_step,
    payloads_of,
    prefix_of,
    read_run_row,
    read_step,
    step_row,
    unpack,
)
from stroma.checkpoint.redis.reader import PAGE, RedisReader, run_lost_error
from stroma.checkpoint.redis.scripts import RUNS, TOMBSTONE_SECONDS
from stroma.checkpoint.redis.server import RedisLink, script_command

__all__ = ["RedisRows", "RunChanged", "commit_command", "is_recorded"]

_ENDED: Final = ("COMPLETED", "RESUMED", "FAILED", "CANCELLED")


class RunChanged(Exception):
    """Another process changed the run since it was read; nothing was done."""


class _Write(NamedTuple):
    """One operation of the script, and what to do with its reply."""

    prefix: str
    values: tuple[Any, ...]
    read: Callable[[Any], None]


class RedisRows(RedisReader):
    """See :class:`stroma.checkpoint.durable.rows.Rows`; whoever uses it calls :meth:`flush` at the end."""

    def __init__(self, link: RedisLink, ttl_ms: int | None) -> None:
        super().__init__(link)
        self._ttl = "" if ttl_ms is None else str(ttl_ms)
        self._writes: list[_Write] = []
        #: Runs that must stay as they were found, by id.
        self._locked: dict[str, RunRow | None] = {}
        #: Those of them that are claimed, which compares what was found by itself.
        self._claimed: set[str] = set()
        #: Owners that this operation writes as, by run id.
        self._owners: dict[str, str] = {}
        #: Changes that cells had when they were read, by name.
        self._numbers: dict[str, bytes] = {}

    def flush(self) -> None:
        """Do what was asked for: all of it, or nothing. Raises Changed, Fenced, CheckpointLost, driver errors."""
        writes, self._writes = self._writes, []
        if not writes:
            return
        checks = [
            (prefix_of(run_id), "", "", "")
            if found is None
            else (found.run.prefix, found.run.token, str(found.run.version), found.run.beside)
            for run_id, found in self._locked.items()
            if run_id not in self._claimed
        ]
        if len(writes) == 1 and not checks:
            (reply,) = self._get(script_command(writes[0].prefix, *writes[0].values))
            replies = [reply]
        else:
            steps = [part for w in writes for part in (len(w.values) + 1, w.prefix, *w.values)]
            about = (os.urandom(8).hex(), json.dumps(checks))
            (replies,) = self._get(script_command(writes[0].prefix, "together", *about, *steps))
            if replies == b"changed":
                raise RunChanged
        for write, reply in zip(writes, replies, strict=False):  # They end with the first one that refuses.
            write.read(reply)

    # ------------------------------------------------------------------ runs

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        (reply,) = self._try(script_command(prefix_of(run_id), "find", run_id))
        if reply == b"lost":
            raise run_lost_error(run_id, self._link.server.name)
        if lock and isinstance(reply, Exception):
            raise reply  # It may be another program's: nothing is written over it.
        found = None if reply is None else read_run_row(reply, run_id)
        if lock:
            require_undamaged(found)
            self._locked[run_id] = found
        return found

    def begin(self, found: RunRow | None, opening: Opening) -> Fence:
        token = os.urandom(8).hex() if found is None else found.run.token
        old = ("", "", "", "")
        if found is not None:
            old = (token, found.run.epoch, found.run.version, found.run.beside)
        execution, epoch = (1, 1) if found is None else (found.execution + 1, found.epoch + 1)
        lease = int(opening.lease_seconds * 1000)
        data = pack([opening.contract, opening.sha256.hex()], opening.input)
        about = (opening.owner, token, execution, epoch, opening.pipeline, lease, data, _tags(opening))
        return self._claim("begin", (*old, *about), found, opening, token, execution, epoch)

    def take_over(self, found: RunRow, opening: Opening) -> Fence:
        run, epoch = found.run, found.epoch + 1
        discard = "" if opening.discard_from is None else max(opening.discard_from, 0)
        lease = int(opening.lease_seconds * 1000)
        read = (run.token, run.epoch, run.version, run.beside)
        told = (*read, opening.owner, found.execution, epoch, lease, discard)
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
        run = RedisRun(opening.run_id, token, epoch, 1 if found is None else found.run.version + 1)
        self._owners[opening.run_id] = opening.owner
        self._claimed.add(opening.run_id)
        self._append(run, operation, opening.run_id, *about)
        return Fence(run, execution, epoch, opening.owner, opening.lease_seconds)

    def input(self, run: RedisRun, execution: int) -> tuple[str, bytes, bytes] | None:
        token = ("HGET", f"{run.prefix}run", "token")
        before, value, after = self._get(token, ("HGET", f"{run.prefix}inputs", execution), token)
        if {as_text(before), as_text(after)} != {run.token}:
            raise RunChanged
        if value is None:
            raise run_lost_error(run.run_id, self._link.server.name)
        header, parts = unpack(value)
        return (str(header[0]), parts[0], from_hex(header[1])) if header else ("", value, b"")

    def steps(self, run: RedisRun, execution: int, apart: Sequence[tuple[int, str]] = ()) -> list[StepRow]:
        if apart:
            return self._steps_but(run, execution, apart)
        state = ("HMGET", f"{run.prefix}run", "token", "epoch", "version", "kept")
        before, nodes, steps, after = self._get(
            state,
            ("HGETALL", f"{run.prefix}nodes:{execution}"),
            ("HGETALL", f"{run.prefix}steps:{execution}"),
            state,
        )
        if before != after or [*map(as_text, before[:3])] != [run.token, str(run.epoch), str(run.version)]:
            raise RunChanged
        nodes, steps = as_hash(nodes), as_hash(steps)
        if len(steps) != int(before[3]) or nodes.keys() != steps.keys():
            raise run_lost_error(run.run_id, self._link.server.name)
        # In the order of their commits: a hash has none of its own.
        told = sorted(steps, key=lambda place: int(nodes[place].partition(b" ")[0]))
        return [step_row(place, node_of(nodes[place]), steps[place]) for place in told]

    def _steps_but(self, run: RedisRun, execution: int, apart: Sequence[tuple[int, str]]) -> list[StepRow]:
        """Only some of the outputs: which there are stands in a hash of its own."""
        state = ("HMGET", f"{run.prefix}run", "token", "epoch", "version", "kept")
        before, nodes, count, after = self._get(
            state,
            ("HGETALL", f"{run.prefix}nodes:{execution}"),
            ("HLEN", f"{run.prefix}steps:{execution}"),
            state,
        )
        if before != after or [*map(as_text, before[:3])] != [run.token, str(run.epoch), str(run.version)]:
            raise RunChanged
        nodes = as_hash(nodes)
        if len(nodes) != int(before[3]) or count != len(nodes):
            raise run_lost_error(run.run_id, self._link.server.name)
        beginnings = tuple(f"{position}:{beginning}" for position, beginning in apart)
        wanted = [place for place in nodes if place.endswith(":") or not place.startswith(beginnings)]
        wanted.sort(key=lambda place: int(nodes[place].partition(b" ")[0]))
        return self._steps_at(run, execution, wanted, nodes)

    def steps_at(
        self, run: RedisRun, execution: int, position: int, branches: Sequence[str]
    ) -> list[StepRow]:
        places = [f"{position}:{branch}" for branch in branches]
        if not places:
            return []
        (found,) = self._get(("HMGET", f"{run.prefix}nodes:{execution}", *places))
        nodes = {place: value for place, value in zip(places, found, strict=True) if value is not None}
        return self._steps_at(run, execution, list(nodes), nodes)

    def _steps_at(
        self, run: RedisRun, execution: int, places: list[str], nodes: Mapping[str, bytes]
    ) -> list[StepRow]:
        told: list[StepRow] = []
        for first in range(0, len(places), PAGE):
            part = places[first : first + PAGE]
            (values,) = self._get(("HMGET", f"{run.prefix}steps:{execution}", *part))
            if None in values:
                raise run_lost_error(run.run_id, self._link.server.name)
            told += (
                step_row(place, node_of(nodes[place]), value)
                for place, value in zip(part, values, strict=True)
            )
        return told

    def identities(self, run: RedisRun, execution: int) -> list[tuple[str, int]]:
        (reply,) = self._get(("HGETALL", f"{run.prefix}called:{execution}"))
        return [(identity, int(position)) for identity, position in as_hash(reply).items()]

    def commit(self, fence: Fence, attempt: Attempt, step: Step | None) -> bool:
        # False, were it told now, would be Fenced: that is raised when the reply is there.
        self._owners[fence.run.run_id] = fence.owner
        self._append(fence.run, *commit_values(fence, attempt, step))
        return True

    def finish(self, fence: Fence, status: str, error: str | None, updated_ms: int | None = None) -> bool:
        run = fence.run
        ttl = self._ttl if status in ("COMPLETED", "RESUMED") else ""
        said = "" if error is None else f"={error}"
        about = (run.token, fence.execution, fence.epoch, fence.owner, run.version, status, said, ttl)
        self._append(run, "finish", run.run_id, *about, "" if updated_ms is None else updated_ms)
        return True

    def is_whole(self, found: RunRow) -> bool:
        return True  # steps() and the claim look at that themselves: both at one moment with what they read.

    def was_deleted(self, run: RedisRun) -> bool:
        (there,) = self._get(("EXISTS", f"{run.prefix}gone:{run.token}"))
        return bool(there)

    def renew(self, fences: list[Fence]) -> None:
        replies = self._link.send(
            [
                script_command(f.run.prefix, "renew", f.run.token, f.epoch, f.owner, f.run.version, _lease(f))
                for f in fences
            ]
        )
        for fence, reply in zip(fences, replies, strict=True):
            if isinstance(reply, int):  # The next commit finds out what else there is to say.
                fence.run.version = max(fence.run.version, reply)

    def _append(self, run: RedisRun, *values: Any) -> None:
        """Have something written as a session, or raise why that is refused."""
        self._writes.append(_Write(run.prefix, values, lambda reply: self._settle(run, reply)))

    def _settle(self, run: RedisRun, reply: Any) -> None:
        if reply == b"changed":
            raise RunChanged
        if not is_recorded(run, reply, self._link.server.name):
            raise fenced_error(self.find(run.run_id), run.run_id)

    # ------------------------------------------------------------------ beside the commits

    def annotate(self, run_id: str, position: int, branch: str, node_id: str, step: Step) -> None:
        if position == Annotation.SAVED:
            value = pack_step(step, 0, 0, 0)
            self._write(prefix_of(run_id), "save", branch, value, self._ttl)
            return
        value = pack([node_id], pack_step(step, 0, 0, 0))
        self._write(prefix_of(run_id), "keep", self._owners.get(run_id, ""), int(position), branch, value)

    def annotations(self, run: RedisRun, position: int, branch: str | None = None) -> list[StepRow]:
        if position == Annotation.PARENT and not run.parent:
            return []
        if branch is None:
            (reply,) = self._get(("HGETALL", f"{run.prefix}beside:{position}"))
            values = sorted(as_hash(reply).items())
        else:
            (reply,) = self._get(("HGET", f"{run.prefix}beside:{position}", branch))
            values = [] if reply is None else [(branch, reply)]
        found = []
        for branch, value in values:
            header, parts = unpack(value)
            node_id, data = (str(header[0]), parts[0]) if header else ("?", b"")
            found.append(StepRow(position, branch, node_id, read_step(data)[0]))
        return found

    def delete_annotations(self, run: RedisRun, position: int, branch: str | None = None) -> None:
        branches = () if branch is None else (branch,)
        self._write(run.prefix, "drop", self._owners.get(run.run_id, ""), int(position), *branches)

    def cancel_requests(self, runs: list[RedisRun]) -> list[RedisRun]:
        replies = self._get(*(("EXISTS", f"{run.prefix}beside:-3") for run in runs)) if runs else []
        return [run for run, there in zip(runs, replies, strict=True) if there]

    def newest_output(self, run_id: str, node_id: str) -> StepRow | None:
        (reply,) = self._get(script_command(prefix_of(run_id), "newest", node_id))
        now, saved, order, place, value, _ = [*reply, None][:6]
        if saved is not None:
            head, _, data = saved.partition(b"\n")
            try:
                number, until = head.split(b" ")
                if (not until or int(until) > now) and int(number) > order:
                    step, header = read_step(data)
                    if header is None:
                        raise ValueError("it is not in our format")
                    return StepRow(Annotation.SAVED, node_id, node_id, step)
            except ValueError as error:
                raise CorruptCheckpoint(
                    f"the checkpoint of node {node_id!r} in run {run_id!r} cannot be read back: {error}; save it again"
                ) from error
        if place is None:
            return None
        if value is None:
            raise run_lost_error(run_id, self._link.server.name)
        return step_row(place.decode(), node_id, value)

    def delete(self, run_id: str) -> None:
        self._write(prefix_of(run_id), "delete", run_id, TOMBSTONE_SECONDS * 1000)

    def _write(self, prefix: str, operation: str, *values: Any) -> None:
        def read(reply: Any) -> None:
            if reply == b"changed":
                raise RunChanged

        self._writes.append(_Write(prefix, (operation, *values), read))

    # ------------------------------------------------------------------ cells

    def read_cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        ((now, self._numbers[name], data),) = self._get(script_command(cell_prefix(name), "cell"))
        return data, now

    def write_cell(self, name: str, data: bytes) -> None:
        self._write(cell_prefix(name), "put_cell", self._numbers[name], os.urandom(8).hex(), data)

    # ------------------------------------------------------------------ retention

    def now_ms(self) -> int:
        ((seconds, micros),) = self._get(("TIME",))
        return int(seconds) * 1000 + int(micros) // 1000

    def expired_run_ids(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        # What only save() kept expires by itself, or was meant to stay.
        found: list[str] = []
        start = 0
        while len(found) < limit:
            page = ("ZRANGEBYSCORE", RUNS, "-inf", f"({before_ms}000", "LIMIT", start, PAGE)
            (ids,) = self._get(page)
            found += (
                row.run_id
                for row in self._rows(ids)
                if row.updated_ms < before_ms and (unfinished or row.status in _ENDED)
            )
            start += PAGE
            if len(ids) < PAGE:
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


# ---------------------------------------------------------------------- commits


def commit_command(fence: Fence, attempt: Attempt, step: Step | None) -> tuple[Any, ...]:
    """Return the command that records an attempt with its usage and output, and renews the lease."""
    return script_command(fence.run.prefix, *commit_values(fence, attempt, step))


def commit_values(fence: Fence, attempt: Attempt, step: Step | None) -> tuple[Any, ...]:
    run = fence.run
    position, started_ns, branch, number, node_id, *_ = attempt
    at = f"{fence.epoch}:{position}:{started_ns}:{number}:{branch}"
    place, data = "", b""
    if step is not None:
        place, data = f"{position}:{branch}", pack_step(step, fence.epoch, number, started_ns)
    # What a group took is what functions inside it did; its children's is part of it.
    sums = (attempt.cost_pico, attempt.tokens, 0 if branch else attempt.function_ns)
    held = (run.token, fence.execution, fence.epoch, fence.owner, run.version, _lease(fence))
    failed = "" if attempt.failure_class is None else 1
    output = (place, node_id, data, attempt.identity or "", position)
    return ("commit", *held, at, pack(list(attempt)), *sums, failed, *output)


def is_recorded(run: RedisRun, reply: Any, server: str) -> bool:
    """Return True if a session's write was executed, False if it was fenced. Raises CheckpointLost, StoreError."""
    if reply == b"lost":
        raise run_lost_error(run.run_id, server)
    if isinstance(reply, int):
        run.version = max(run.version, reply)
        return True
    if reply in (b"fenced", b"deleted"):
        return False
    # No word of the script's: a run must not be told that it was taken over because something between here and the
    # server garbles what it says. What was written, if it was, is found when it is sent again.
    raise StoreError(
        f"{server} answered a write of run {run.run_id!r} with {reply!r:.100}, which is no answer to it; see what stands "
        "between here and the server"
    )


def _tags(opening: Opening) -> str:
    return json.dumps(opening.tags) if opening.tags else ""


def _lease(fence: Fence) -> int:
    return int(fence.lease_seconds * 1000)
