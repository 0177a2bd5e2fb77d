"""The rows of a Postgres store, read and written on one connection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final, LiteralString

import psycopg

from stroma.checkpoint.durable.integrity import parse_attempt, parse_run, require_undamaged
from stroma.checkpoint.durable.rows import (
    Annotation,
    AttemptSummary,
    Fence,
    Opening,
    RunExtras,
    RunRow,
    Step,
    StepRow,
)
from stroma.checkpoint.payloads import BLOB
from stroma.checkpoint.postgres.schema import SCHEMA_VERSION, key
from stroma.checkpoint.records import Attempt, RunQuery, StoreFacts, Tally, attempt_mark
from stroma.checkpoint.sql import Dialect, attempt_page, find_runs, tally

__all__ = ["PostgresRows", "commit_query", "commit_reply"]

# Leases and times go by the server's clock: all who use the store see the same one.
_NOW_MS: Final = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_UNTIL: Final = "clock_timestamp() + make_interval(secs => %s)"
_RUN: Final = """r.run, r.run_id, r.pipeline, r.execution, r.status, r.error, r.started_ms, r.updated_ms, r.tokens,
    r.cost_pico, r.latency_ns, r.lease_owner, r.lease_epoch,
    coalesce(extract(epoch FROM r.lease_until - clock_timestamp())::float8, -1.0),
    (SELECT count(*) FROM steps s WHERE s.run = r.run AND s.execution = r.execution AND s.position >= 0
    AND s.branch_key = ''), r.attempt_count, r.commit_count"""
_DIALECT: Final = Dialect(
    _RUN, "%s", 'strpos(lower({} COLLATE "C"), %s) > 0', "tags t JOIN runs r ON r.run = t.run"
)
_FIND: Final = f"SELECT {_RUN} FROM runs r WHERE run_key = %s"
# Two who open a new run meet at its row: the second one waits for the first, then sees what that one made of it.
_LOCK: Final = f"""INSERT INTO runs AS r (run_key, run_id, pipeline, execution, status, started_ms, updated_ms, tokens,
    cost_pico, latency_ns, lease_epoch, attempt_count, commit_count)
    VALUES (%s, %s, '', 0, 'RUNNING', {_NOW_MS}, {_NOW_MS}, 0, 0, 0, 0, 0, 0)
    ON CONFLICT (run_key) DO UPDATE SET run_key = excluded.run_key RETURNING {_RUN}, r.run = lastval()"""
_NEW_INPUT: Final = "INSERT INTO inputs (run, execution, contract, input, sha256) VALUES (%s, %s, %s, %s, %s)"
_INPUT: Final = "SELECT contract, input, sha256 FROM inputs WHERE run = %s AND execution = %s"
_CLAIM: Final = f"""status = 'RUNNING', error = NULL, updated_ms = {_NOW_MS}, lease_owner = %s, lease_until = {_UNTIL},
    lease_epoch = lease_epoch + 1 WHERE run = %s RETURNING lease_epoch, attempt_count"""
_GO_ON: Final = f"UPDATE runs SET {_CLAIM}"
_BEGIN: Final = f"""UPDATE runs SET execution = %s, pipeline = %s, started_ms = {_NOW_MS}, tokens = 0, cost_pico = 0,
    latency_ns = 0, attempt_count = 0, commit_count = 0, {_CLAIM}"""
_DISCARD: Final = "DELETE FROM steps WHERE run = %s AND execution = %s AND position >= %s"
_DISCARDED: Final = "UPDATE runs SET commit_count = commit_count - %s WHERE run = %s"
_WHOLE: Final = """SELECT EXISTS (SELECT FROM inputs WHERE run = %(run)s AND execution = %(execution)s),
    (SELECT count(*) FROM attempts WHERE run = %(run)s AND execution = %(execution)s),
    (SELECT count(*) FROM steps WHERE run = %(run)s AND execution = %(execution)s AND position >= 0)"""
_STEP_ROW: Final = (
    "s.position, s.branch, s.node_id, s.contract, s.schema_ref, s.output, s.sha256, s.call, s.given"
)
_STEPS: Final = f"SELECT {_STEP_ROW} FROM steps s WHERE run = %s AND execution = %s AND position >= 0"
_NOT_APART: Final = " AND NOT (position = %s AND branch <> '' AND starts_with(branch, %s))"
_SOME: Final = f"{_STEPS} AND position = %s AND branch_key = ANY(%s)"
_NEWEST: Final = f"""SELECT {_STEP_ROW}
    FROM runs r JOIN steps s ON s.run = r.run AND (s.execution = r.execution OR s.position = %s)
    WHERE r.run_key = %s AND s.node_id = %s ORDER BY s.id DESC LIMIT 1"""
_STEP_COLUMNS: Final = """(run, execution, position, branch_key, branch, node_id, epoch, attempt, started_ns, contract,
    schema_ref, output, sha256, call, given)"""
_REPLACE: Final = """ON CONFLICT (run, execution, position, branch_key) DO UPDATE SET id = excluded.id,
    branch = excluded.branch, node_id = excluded.node_id, epoch = excluded.epoch, attempt = excluded.attempt,
    started_ns = excluded.started_ns, contract = excluded.contract, schema_ref = excluded.schema_ref,
    output = excluded.output, sha256 = excluded.sha256, call = excluded.call, given = excluded.given"""
_KEEP: Final = f"""INSERT INTO steps {_STEP_COLUMNS}
    VALUES (%s, 0, %s, %s, %s, %s, 0, 0, 0, %s, %s, %s, %s, %s, %s) {_REPLACE}"""
_KEPT: Final = (
    f"SELECT {_STEP_ROW} FROM steps s WHERE run = %s AND execution = 0 AND position = %s "
    "AND (%s::bytea IS NULL OR branch_key = %s) ORDER BY branch"
)
_DROP: Final = """DELETE FROM steps WHERE run = %s AND execution = 0 AND position = %s
    AND (%s::bytea IS NULL OR branch_key = %s)"""
_WANTED: Final = "SELECT run FROM steps WHERE run = ANY(%s) AND execution = 0 AND position = %s"
# The fence: rows change only while this session is the last one that opened the run, and the run counts all attempts
# that were acknowledged to it.
_FENCE: Final = """WHERE run = %(run)s AND lease_epoch = %(epoch)s AND lease_owner = %(owner)s
    AND attempt_count >= %(acknowledged)s"""
# A commit is one statement: the run is locked and looked at (it may have been taken over while we waited for the
# lock), then comes the attempt, and only with a new one its usage and its output. An output in place of another one is
# no further commit.
_ATTEMPT_KEY: Final = (
    "%(run)s, %(execution)s, %(epoch)s, %(position)s, %(started_ns)s, %(branch_key)s, %(attempt)s"
)
_ATTEMPT: Final = f"""WITH held AS (SELECT run FROM runs {_FENCE} FOR UPDATE),
    kept AS (INSERT INTO attempts (run, execution, epoch, position, started_ns, branch_key, attempt, branch, node_id,
    duration_ns, outcome, failure_class, message, reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type)
    SELECT {_ATTEMPT_KEY}, %(branch)s, %(node_id)s, %(duration_ns)s, %(outcome)s, %(failure_class)s::text,
    %(message)s::text, %(reason)s::text, %(tokens)s, %(output_tokens)s, %(cost_pico)s, %(model)s::text,
    %(function_ns)s, %(group_id)s::text, %(identity)s::text, %(error_type)s::text FROM held
    ON CONFLICT DO NOTHING RETURNING run),
    counted AS (UPDATE runs SET updated_ms = {_NOW_MS},
    lease_until = clock_timestamp() + make_interval(secs => %(lease_seconds)s), tokens = tokens + %(tokens)s,
    cost_pico = cost_pico + %(cost_pico)s, latency_ns = latency_ns + %(latency_ns)s,
    attempt_count = attempt_count + 1, commit_count = commit_count + %(commits)s * (SELECT count(*) FROM kept WHERE
    NOT EXISTS (SELECT FROM steps WHERE (run, execution, position, branch_key)
    = (%(run)s, %(execution)s, %(position)s, %(branch_key)s)))
    WHERE run = (SELECT run FROM kept) RETURNING attempt_count)"""
_OUTPUT: Final = f""", output AS (INSERT INTO steps {_STEP_COLUMNS}
    SELECT run, %(execution)s, %(position)s, %(branch_key)s, %(branch)s, %(node_id)s, %(epoch)s, %(attempt)s,
    %(started_ns)s, %(contract)s, %(schema_ref)s, %(output)s::bytea, %(sha256)s::bytea, %(number)s::bigint,
    %(given)s::bytea FROM kept {_REPLACE})"""
# Whether the attempt is kept, also one that was kept before the run was taken over; and how many there are.
_HELD: Final = f"""SELECT EXISTS (SELECT FROM held) OR EXISTS (SELECT FROM attempts WHERE
    (run, execution, epoch, position, started_ns, branch_key, attempt) = ({_ATTEMPT_KEY})),
    coalesce((SELECT attempt_count FROM counted), (SELECT attempt_count FROM runs {_FENCE}), 0)"""
_COMMIT: Final = f"{_ATTEMPT} {_HELD}"
_COMMIT_OUTPUT: Final = f"{_ATTEMPT}{_OUTPUT} {_HELD}"
_END: Final = f"""UPDATE runs SET status = %(status)s, error = %(error)s,
    updated_ms = coalesce(%(updated_ms)s::bigint, {_NOW_MS}), lease_until = NULL {_FENCE}"""
# In the order of their runs, so that nobody waits for us while we wait for them.
_RENEW: Final = """WITH fences AS (SELECT * FROM
    unnest(%s::bigint[], %s::bigint[], %s::text[], %s::float8[], %s::bigint[])
    AS f(run, epoch, owner, seconds, acknowledged)),
    held AS (SELECT r.run, f.seconds FROM runs r JOIN fences f ON r.run = f.run AND r.lease_epoch = f.epoch
    AND r.lease_owner = f.owner AND r.attempt_count >= f.acknowledged WHERE r.lease_until IS NOT NULL ORDER BY r.run FOR UPDATE OF r)
    UPDATE runs r SET lease_until = clock_timestamp() + make_interval(secs => held.seconds)
    FROM held WHERE r.run = held.run"""
# A session whose run is gone is told that it was deleted, for a day; after that, that it got lost.
_DELETED: Final = f"INSERT INTO deleted (run, deleted_ms) VALUES (%s, {_NOW_MS}) ON CONFLICT DO NOTHING"
_FORGET_DELETED: Final = f"DELETE FROM deleted WHERE deleted_ms < {_NOW_MS} - 24 * 3600 * 1000"
_DELETE: Final = (
    "DELETE FROM tags WHERE run = %s",
    "DELETE FROM steps WHERE run = %s",
    "DELETE FROM inputs WHERE run = %s",
    "DELETE FROM attempts WHERE run = %s",
    "DELETE FROM runs WHERE run = %s",
)
_ATTEMPTS: Final = """SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class, message,
    reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type, epoch FROM attempts
    WHERE run = %s AND execution = %s
    ORDER BY epoch, position, started_ns, branch, attempt"""
# What each attempt committed is looked up here: as a join, a server without statistics of a new table compares all of a
# run's attempts with all of its outputs.
_OUTPUTS: Final = """SELECT epoch, position, started_ns, branch, attempt, contract, schema_ref, output, sha256, call, given
    FROM steps WHERE run = %s AND execution = %s AND position >= 0"""
# Of many runs at once: a query for each would be a way to the server and back for each.
_BESIDE: Final = """SELECT r.run, (SELECT node_id FROM steps p WHERE p.run = r.run AND p.execution = 0 AND p.position = -4),
    ARRAY(SELECT tag FROM tags g WHERE g.run = r.run) FROM runs r WHERE r.run = ANY(%s)"""
_FAILED: Final = """SELECT w.run, f.* FROM unnest(%s::bigint[], %s::bigint[]) AS w(run, execution), LATERAL
    (SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class, message, reason, tokens,
    output_tokens, cost_pico, model, function_ns, group_id, identity, error_type FROM attempts a WHERE a.run = w.run AND a.execution = w.execution
    AND failure_class IS NOT NULL ORDER BY (started_ns + duration_ns) DESC LIMIT %s) f"""
_FAILED_SINCE: Final = """SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class, message,
    reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type FROM attempts WHERE run = %s AND execution = %s AND epoch >= %s
    AND failure_class IS NOT NULL ORDER BY (started_ns + duration_ns) DESC LIMIT 1000"""
_TAG: Final = """INSERT INTO tags (run, tag, started_ms) SELECT r.run, t.tag, r.started_ms FROM runs r,
    unnest(%s::text[]) AS t(tag) WHERE r.run = %s ON CONFLICT DO NOTHING"""
_UNTAG: Final = "DELETE FROM tags WHERE run = %s"
_SIZED: Final = """SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class,
    message, reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type, epoch,
    (SELECT octet_length(s.output)::bigint FROM steps s WHERE (s.run, s.execution, s.position, s.branch_key)
    = (a.run, a.execution, a.position, a.branch_key) AND (s.epoch, s.attempt, s.started_ns)
    = (a.epoch, a.attempt, a.started_ns)) FROM attempts a WHERE run = %s AND execution = %s"""
_IN_ORDER: Final = "ORDER BY epoch, position, started_ns, branch_key, attempt"
_ATTEMPT_PAGE: Final = f"""{_SIZED} AND (epoch, position, started_ns, branch_key, attempt)
    > (%s::bigint, %s::bigint, %s::bigint, %s::bytea, %s::bigint) {_IN_ORDER} LIMIT %s"""
_ATTEMPTS_AT: Final = f"{_SIZED} AND position = %s AND branch_key = %s {_IN_ORDER}"
_IDENTITIES: Final = """SELECT DISTINCT identity, position FROM attempts
    WHERE run = %s AND execution = %s AND identity IS NOT NULL"""
_STEP_AT: Final = f"""SELECT {_STEP_ROW} FROM steps s WHERE run = %s AND execution = %s AND position = %s
    AND branch_key = %s"""
_EXPIRED: Final = """SELECT run_id FROM runs WHERE updated_ms < %s AND (%s OR (execution > 0
    AND status IN ('COMPLETED', 'RESUMED', 'FAILED', 'CANCELLED'))) ORDER BY updated_ms LIMIT %s"""
_BLOBS: Final = """SELECT output FROM steps WHERE substr(output, 1, %(length)s::int) = %(blob)s
    UNION ALL SELECT given FROM steps WHERE substr(given, 1, %(length)s::int) = %(blob)s
    UNION ALL SELECT input FROM inputs WHERE substr(input, 1, %(length)s::int) = %(blob)s"""
_CELL: Final = f"SELECT data, {_NOW_MS} FROM cells WHERE cell_key = %s"
_LOCK_CELL: Final = f"{_CELL} FOR UPDATE"
# Two who make a new cell meet at its row.
_NEW_CELL: Final = f"""INSERT INTO cells AS c (cell_key, name, data) VALUES (%s, %s, '')
    ON CONFLICT (cell_key) DO UPDATE SET name = excluded.name RETURNING c.data, {_NOW_MS}"""
_CLOCK: Final = f"SELECT ''::bytea, {_NOW_MS}"
_SERVER_CLOCK: Final = f"SELECT {_NOW_MS}"
_PUT_CELL: Final = "UPDATE cells SET data = %s WHERE cell_key = %s"
_FACTS: Final = f"""SELECT current_setting('server_version'), (SELECT v FROM meta WHERE k = 'schema_version'), {_NOW_MS},
    current_setting('fsync'), current_setting('full_page_writes')"""
# Ids that begin with a text: a range of the index, and no LIKE, which knows wildcards.
_BY_PREFIX: Final = """SELECT run_id FROM runs WHERE execution > 0
    AND left(run_id, 64) COLLATE "C" >= %s AND left(run_id, 64) COLLATE "C" < %s AND starts_with(run_id, %s)
    ORDER BY run_id = %s DESC, started_ms DESC, run DESC LIMIT %s"""
#: Of so many that sorting them takes long, the newest are found sooner among all runs.
_MANY: Final = 5000
_IS_MANY: Final = """SELECT count(*) FROM (SELECT 1 FROM runs WHERE left(run_id, 64) COLLATE "C" >= %s
    AND left(run_id, 64) COLLATE "C" < %s LIMIT %s) AS counted"""
_NEWEST_OF_MANY: Final = """SELECT run_id FROM runs WHERE execution > 0 AND starts_with(run_id, %s) AND run_id != %s
    ORDER BY started_ms DESC, run DESC LIMIT %s"""
_INDEXED: Final = 64
_LAST_CHARACTERS: Final = "\U0010ffff" * (_INDEXED + 1)


class PostgresRows:
    """See :class:`stroma.checkpoint.durable.rows.Rows`; the transaction is the caller's."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        self.db = db
        #: Fences under which attempts were recorded in this transaction, and how many attempts their runs have by that.
        self.counted: list[tuple[Fence, int]] = []
        #: What find() made in this transaction: without an execution, as if it were not there.
        self._made: RunRow | None = None

    def _execute(
        self, query: LiteralString, values: Sequence[Any] | dict[str, Any] = ()
    ) -> psycopg.Cursor[Any]:
        return self.db.execute(query, values, binary=True)  # As text, an output is twice as long.

    # ------------------------------------------------------------------ runs

    def find(self, run_id: str, *, lock: bool = False) -> RunRow | None:
        if not lock:
            row = self._execute(_FIND, (key(run_id),)).fetchone()
            return None if row is None else parse_run(row)
        found, is_new = self._lock(run_id)
        if is_new:
            self._made = found
        return None if is_new else found

    def _lock(self, run_id: str) -> tuple[RunRow, bool]:
        """The row of a run, made if need be, and whether it was; nobody else changes it, or makes another one."""
        row: Any = self._execute(_LOCK, (key(run_id), run_id)).fetchone()
        found = parse_run(row[:-1])
        require_undamaged(found)
        return found, row[-1]

    def begin(self, found: RunRow | None, opening: Opening) -> Fence:
        if found is None:
            made = self._made
            found = made if made and made.run_id == opening.run_id else self._lock(opening.run_id)[0]
        run, execution = found.run, found.execution + 1
        # Earlier executions stay as history; nothing reads their commits any more.
        self._execute(_NEW_INPUT, (run, execution, opening.contract, opening.input, opening.sha256))
        claim = (execution, opening.pipeline, opening.owner, opening.lease_seconds, run)
        fence = self._fence(run, execution, opening, self._execute(_BEGIN, claim))
        if execution > 1:
            self._execute(_UNTAG, (run,))
        self._tag(opening, run)
        return fence

    def take_over(self, found: RunRow, opening: Opening) -> Fence:
        if opening.discard_from is not None:
            place = (found.run, found.execution, max(opening.discard_from, 0))
            self._execute(_DISCARDED, (self._execute(_DISCARD, place).rowcount, found.run))
        self._tag(opening, found.run)
        claim = (opening.owner, opening.lease_seconds, found.run)
        return self._fence(found.run, found.execution, opening, self._execute(_GO_ON, claim))

    def _tag(self, opening: Opening, run: int) -> None:
        if opening.tags:
            self._execute(_TAG, (list(opening.tags), run))

    @staticmethod
    def _fence(run: int, execution: int, opening: Opening, claimed: psycopg.Cursor[Any]) -> Fence:
        epoch, attempts = claimed.fetchone() or (0, 0)
        return Fence(run, execution, epoch, opening.owner, opening.lease_seconds, attempts)

    def input(self, run: int, execution: int) -> tuple[str, bytes, bytes] | None:
        found: tuple[str, bytes, bytes] | None = self._execute(_INPUT, (run, execution)).fetchone()
        return found

    def steps(self, run: int, execution: int, apart: Sequence[tuple[int, str]] = ()) -> list[StepRow]:
        query, values = _STEPS, list[Any]([run, execution])
        for place in apart:
            query += _NOT_APART
            values += place
        return [_step_row(row) for row in self._execute(query, values).fetchall()]

    def steps_at(self, run: int, execution: int, position: int, branches: Sequence[str]) -> list[StepRow]:
        values = (run, execution, position, [key(branch) for branch in branches])
        return [_step_row(row) for row in self._execute(_SOME, values).fetchall()]

    def is_whole(self, found: RunRow) -> bool:
        at = {"run": found.run, "execution": found.execution}
        ((has_input, *counts),) = self._execute(_WHOLE, at).fetchall()
        return bool(has_input) and counts == [found.attempt_count, found.commit_count]

    def identities(self, run: int, execution: int) -> list[tuple[str, int]]:
        return self._execute(_IDENTITIES, (run, execution)).fetchall()

    def was_deleted(self, run: int) -> bool:
        return bool(self._execute("SELECT 1 FROM deleted WHERE run = %s", (run,)).fetchall())

    def commit(self, fence: Fence, attempt: Attempt, step: Step | None) -> bool:
        is_kept, attempts = commit_reply(self._execute(*commit_query(fence, attempt, step)))
        if is_kept:
            self.counted.append((fence, attempts))
        return is_kept

    def finish(self, fence: Fence, status: str, error: str | None, updated_ms: int | None = None) -> bool:
        values = {"status": status, "error": error, "updated_ms": updated_ms, **asdict(fence)}
        return self._execute(_END, values).rowcount == 1

    def renew(self, fences: list[Fence]) -> None:
        if not fences:
            return
        columns = [(f.run, f.epoch, f.owner, float(f.lease_seconds), f.acknowledged) for f in fences]
        self._execute(_RENEW, [list(column) for column in zip(*columns, strict=True)])

    # ------------------------------------------------------------------ beside the commits

    def annotate(self, run_id: str, position: int, branch: str, node_id: str, step: Step) -> None:
        found, _ = self._lock(run_id)
        self._execute(_KEEP, (found.run, position, key(branch), branch, node_id, *step))

    def annotations(self, run: int, position: int, branch: str | None = None) -> list[StepRow]:
        branch_key = None if branch is None else key(branch)
        found = self._execute(_KEPT, (run, position, branch_key, branch_key)).fetchall()
        return [_step_row(row) for row in found]

    def delete_annotations(self, run: int, position: int, branch: str | None = None) -> None:
        branch_key = None if branch is None else key(branch)
        self._execute(_DROP, (run, position, branch_key, branch_key))

    def cancel_requests(self, runs: list[int]) -> list[int]:
        found = {run for (run,) in self._execute(_WANTED, (runs, Annotation.CANCEL)).fetchall()}
        return [run for run in runs if run in found]

    def newest_output(self, run_id: str, node_id: str) -> StepRow | None:
        row = self._execute(_NEWEST, (Annotation.SAVED, key(run_id), node_id)).fetchone()
        return None if row is None else _step_row(row)

    def delete(self, run_id: str) -> None:
        # The lock first: a commit that is under way would leave its rows behind.
        locked = self._execute("SELECT run FROM runs WHERE run_key = %s FOR UPDATE", (key(run_id),))
        run = locked.fetchone()
        self._execute(_FORGET_DELETED)
        if run is not None:
            self._execute(_DELETED, run)
            for statement in _DELETE:
                self._execute(statement, run)

    # ------------------------------------------------------------------ cells

    def read_cell(self, name: str, *, lock: bool = False) -> tuple[bytes | None, int]:
        row: Any = self._execute(_LOCK_CELL if lock else _CELL, (key(name),)).fetchone()
        if row is None:
            row = self._execute(_NEW_CELL if lock else _CLOCK, (key(name), name) if lock else ()).fetchone()
        # An empty one is there only for the lock.
        return bytes(row[0]) or None, row[1]

    def write_cell(self, name: str, data: bytes) -> None:
        self._execute(_PUT_CELL, (data, key(name)))

    # ------------------------------------------------------------------ retention

    def now_ms(self) -> int:
        ((now,),) = self._execute(_SERVER_CLOCK).fetchall()
        return int(now)

    def expired_run_ids(self, before_ms: int, *, unfinished: bool, limit: int) -> list[str]:
        return [run_id for (run_id,) in self._execute(_EXPIRED, (before_ms, unfinished, limit)).fetchall()]

    def blobs(self) -> list[bytes]:
        values = {"blob": BLOB, "length": len(BLOB)}
        return [payload for (payload,) in self._execute(_BLOBS, values).fetchall()]

    # ------------------------------------------------------------------ reading

    def runs(
        self, query: RunQuery, *, limit: int, after: str | None, look_at: int | None
    ) -> tuple[list[RunRow], str | None]:
        def execute(statement: str, values: list[Any]) -> list[Any]:
            # Made of our own words alone: what is asked for goes as parameters.
            return self.db.execute(statement.encode(), values, binary=True).fetchall()

        return find_runs(execute, parse_run, _DIALECT, query, limit=limit, after=after, look_at=look_at)

    def run_extras(self, runs: list[RunRow], *, failed: int) -> list[RunExtras]:
        if not runs:
            return []
        ids = [found.run for found in runs]
        about = {run: (parent, tags) for run, parent, tags in self._execute(_BESIDE, (ids,)).fetchall()}
        failures: dict[int, list[Attempt]] = {}
        if failed:
            wanted = (ids, [found.execution for found in runs], failed)
            for run, *attempt in self._execute(_FAILED, wanted).fetchall():
                failures.setdefault(run, []).append(parse_attempt(attempt))
        return [RunExtras(about[run][0], tuple(about[run][1]), failures.get(run, [])) for run in ids]

    def find_run_ids(self, prefix: str, limit: int) -> list[str]:
        lowest = prefix[:_INDEXED]
        last = lowest + _LAST_CHARACTERS
        ((number,),) = self._execute(_IS_MANY, (lowest, last, _MANY)).fetchall()
        if number < _MANY:
            found = self._execute(_BY_PREFIX, (lowest, last, prefix, prefix, limit)).fetchall()
            return [run_id for (run_id,) in found]
        that_one = self.find(prefix)
        found = self._execute(_NEWEST_OF_MANY, (prefix, prefix, limit)).fetchall()
        whole = [prefix] if that_one is not None and that_one.execution else []
        return [*whole, *(run_id for (run_id,) in found)][:limit]

    def attempts(self, run: int, execution: int) -> Iterator[tuple[Attempt, Step | None]]:
        outputs = {
            tuple(row[:5]): Step._make(row[5:])
            for row in self._execute(_OUTPUTS, (run, execution)).fetchall()
        }
        for *row, epoch in self._execute(_ATTEMPTS, (run, execution)).fetchall():
            attempt = parse_attempt(row)
            yield attempt, outputs.get((epoch, *attempt[:4]))

    def attempt_page(
        self, run: int, execution: int, *, limit: int, after: str | None
    ) -> tuple[list[AttemptSummary], str | None]:
        epoch, position, started, number, branch = (-1, 0, 0, 0, "") if after is None else attempt_mark(after)
        place = (run, execution, epoch, position, started, key(branch), number, limit + 1)
        return attempt_page(self._execute(_ATTEMPT_PAGE, place).fetchall(), limit)

    def attempts_at(self, run: int, execution: int, position: int, branch: str) -> list[AttemptSummary]:
        found = self._execute(_ATTEMPTS_AT, (run, execution, position, key(branch))).fetchall()
        return attempt_page(found, len(found))[0]

    def failed_since(self, run: int, execution: int, epoch: int) -> list[Attempt]:
        found = self._execute(_FAILED_SINCE, (run, execution, epoch)).fetchall()
        return [Attempt._make(row) for row in reversed(found)]

    def tally(self, since_ms: int, bucket_ms: int, *, runs: int, attempts: int) -> list[Tally]:
        def execute(statement: str, values: list[Any]) -> list[Any]:
            return self.db.execute(statement.encode(), values, binary=True).fetchall()

        return tally(execute, "%s", since_ms, bucket_ms, runs, attempts)

    def facts(self) -> StoreFacts:
        row: Any = self._execute(_FACTS).fetchone()
        version, written, clock_ms, fsync, pages = row
        off = [name for name, value in (("fsync", fsync), ("full_page_writes", pages)) if value == "off"]
        risky = tuple(
            f"{name} is off: a crash of its machine may take what was committed; turn it on" for name in off
        )
        return StoreFacts(f"PostgreSQL {version}", int(written), SCHEMA_VERSION, clock_ms, risky)

    def step_at(self, run: int, execution: int, position: int, branch: str) -> StepRow | None:
        row = self._execute(_STEP_AT, (run, execution, position, key(branch))).fetchone()
        return None if row is None else _step_row(row)


def commit_query(fence: Fence, attempt: Attempt, step: Step | None) -> tuple[LiteralString, dict[str, Any]]:
    """The statement of a commit, and its values. For its answer see :func:`commit_reply`."""
    # What a group took is what functions inside it did; its children's is part of it.
    latency = 0 if attempt.branch else attempt.function_ns
    values = {
        **asdict(fence),
        **attempt._asdict(),
        "branch_key": key(attempt.branch),
        "latency_ns": latency,
        "commits": 0 if step is None else 1,
    }
    if step is None:
        return _COMMIT, values
    return _COMMIT_OUTPUT, {**values, **step._asdict()}


def commit_reply(cursor: psycopg.Cursor[Any]) -> tuple[bool, int]:
    """Return whether an attempt is kept, and how many attempts its execution has by that; 0 if that is unknown."""
    is_kept, attempts = cursor.fetchone() or (False, 0)
    return bool(is_kept), attempts


def _step_row(row: Any) -> StepRow:
    position, branch, node_id, *step = row
    return StepRow(position, branch, node_id, Step._make(step))
