"""SQL statements of the SQLite and the Postgres store.

They are written for PostgreSQL (RETURNING, ON CONFLICT, partial indexes), with named parameters;
:func:`for_sqlite` and :func:`for_postgres` translate them. now_ms() stands for the time in ms since the
epoch, and clock_ms() for the clock of leases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Final

from stroma.checkpoint.decisions import ENDED, MESSAGE_SENT
from stroma.checkpoint.durable.rows import LEASE_TIMES, Annotation, Step
from stroma.checkpoint.queue import MAX_CLAIM_SECONDS
from stroma.checkpoint.records import ATTEMPT_COLUMNS
from stroma.checkpoint.sql.tables import ATTEMPT_TYPES, STEP_TYPES
from stroma.trace.events import COLLECTED, FAILED_ITEM

_SERVER_CLOCK: Final = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_FOR_SQLITE: Final = (
    (r"\b(now_ms|clock_ms)\(\)", r":\1"),
    (r"= ANY\((:\w+)\)", r"IN (SELECT value FROM json_each(\1))"),
    (r"= ANY \(ARRAY(\(.*\))\)", r"IN \1"),
    (r"\bstrpos\(", "instr("),
    (r"\bFOR UPDATE( OF r)?( SKIP LOCKED)?", ""),
)
_FOR_POSTGRES: Final = (
    (r" (NOT INDEXED|INDEXED BY \w+)", ""),
    (r"(?<!:):(\w+)", r"%(\1)s"),
    (r"\b(now_ms|clock_ms)\(\)", _SERVER_CLOCK),
)


@cache
def for_sqlite(statement: str) -> str:
    """Translate a statement. A list is passed as JSON, and both clocks as parameters."""
    return _translate(statement, _FOR_SQLITE)


@cache
def for_postgres(statement: str) -> bytes:
    """Translate a statement. The clock of the server is both clocks."""
    return _translate(statement, _FOR_POSTGRES).encode()


def _translate(statement: str, rules: Iterable[tuple[str, str]]) -> str:
    statement = " ".join(statement.split())  # A rule may match across lines.
    for pattern, replacement in rules:
        statement = re.sub(pattern, replacement, statement)
    return statement


# ---------------------------------------------------------------------- runs

# A claim that ends very late is from before a restart of the machine.
_FREE: Final = f"""(r.claim_until_ms IS NULL
    OR r.claim_until_ms NOT BETWEEN clock_ms() AND clock_ms() + {1000 * MAX_CLAIM_SECONDS})"""
_LEFT_SECONDS: Final = "coalesce(CAST(r.lease_until_ms - clock_ms() AS double precision) / 1000, -1.0)"
RUN_COLUMNS: Final = f"""r.run, r.run_id, r.pipeline, r.execution, r.status, r.error, r.started_ms,
    r.updated_ms, r.tokens, r.cost_pico, r.latency_ns, r.lease_owner, r.lease_epoch, {_LEFT_SECONDS},
    (SELECT count(*) FROM steps s WHERE s.run = r.run AND s.execution = r.execution AND s.position >= 0
    AND s.branch_key = ''), r.attempt_count, r.commit_count, r.wake_ms, r.expires_ms, r.priority, r.queue_key,
    r.version, r.blocked, r.blocked_since_ms, r.blocked_until_ms, r.blocked_codes,
    CASE WHEN NOT {_FREE} THEN r.claim END, r.parent, r.tags, r.cause"""
FIND: Final = f"SELECT {RUN_COLUMNS} FROM runs r WHERE r.run_key = :run_key"
LOCK: Final = f"{FIND} FOR UPDATE OF r"
# Two sessions that create a run at the same time: the second one waits for the first, and gets no row.
NEW_RUN: Final = """INSERT INTO runs (run_key, run_id, pipeline, execution, status, started_ms,
    updated_ms, tokens, cost_pico, latency_ns, lease_epoch) VALUES (:run_key, :run_id, '', 0,
    'RUNNING', now_ms(), now_ms(), 0, 0, 0, 0) ON CONFLICT DO NOTHING RETURNING run"""
_DISCARD: Final = "DELETE FROM steps WHERE run = :run AND execution = :execution"
DISCARD_FROM: Final = f"{_DISCARD} AND position >= :position"
DISCARD_AT: Final = f"{_DISCARD} AND position = :position AND branch_key = :branch_key"
DISCARD_FAILED: Final = f"""{_DISCARD} AND position = ANY(:positions)
    AND substr(contract, 1, {len(FAILED_ITEM)}) = '{FAILED_ITEM}'"""
COUNT_DISCARDED: Final = "UPDATE runs SET commit_count = commit_count - :discarded WHERE run = :run"
ROW_COUNTS: Final = """SELECT (SELECT count(*) FROM attempts WHERE run = :run AND execution = :execution),
    (SELECT count(*) FROM steps WHERE run = :run AND execution = :execution AND position >= 0)"""
# The fence: rows change only while this session is the last one that opened the run, and the run counts all
# attempts that were acknowledged to it.
FENCE: Final = """WHERE run = :run AND lease_epoch = :epoch AND lease_owner = :owner
    AND attempt_count >= :acknowledged"""
#: Columns that have other names than the fields of a RunRow.
_COLUMNS: Final = {
    "owner": "lease_owner",
    "epoch": "lease_epoch",
    "until_ms": "lease_until_ms",
    "key": "queue_key",
}


@cache
def update_run(fields: tuple[tuple[str, bool], ...], *, is_fenced: bool) -> str:
    """Return the statement that sets fields of a run: their names, and True for a time from now on."""

    def value(name: str, is_delay: bool) -> str:
        clock = "clock_ms()" if name in LEASE_TIMES else "now_ms()"
        return f"{clock} + :new_{name}" if is_delay else f":new_{name}"

    values = ", ".join(f"{_COLUMNS.get(name, name)} = {value(name, is_delay)}" for name, is_delay in fields)
    return f"UPDATE runs SET {values} {FENCE if is_fenced else 'WHERE run = :run'}"


# The leases of a process are renewed together: a run that another session has locked must not delay the rest.
RENEW: Final = f"""UPDATE runs SET lease_until_ms = clock_ms() + :lease_ms {FENCE} AND lease_until_ms
    IS NOT NULL AND run IN (SELECT r.run FROM runs r WHERE r.run = :run FOR UPDATE OF r SKIP LOCKED)
    RETURNING run"""
STATUSES: Final = "SELECT run_id, status FROM runs WHERE execution > 0 AND run_key = ANY(:run_keys)"
EXPIRED: Final = f"""SELECT run_id FROM runs WHERE updated_ms < :before_ms AND (:unfinished OR (execution > 0
    AND status IN {ENDED})) ORDER BY updated_ms LIMIT :limit"""
DISCARD_EVENTS: Final = "DELETE FROM events WHERE run = :run"
DELETE_RUN: Final = tuple(
    f"DELETE FROM {table} WHERE run = :run" for table in ("events", "steps", "attempts", "runs")
)

# ---------------------------------------------------------------------- attempts and steps


def _insert(table: str, columns: Iterable[str]) -> str:
    columns = list(columns)
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join(f':{name}' for name in columns)})"


_ATTEMPT: Final = ", ".join(ATTEMPT_COLUMNS)
_NEW_ATTEMPT: Final = ("run", "execution", "epoch", "branch_key", *ATTEMPT_COLUMNS)
_ATTEMPT_OF_STEP: Final = ("epoch", "attempt", "started_ns")
_NEW_STEP: Final = (
    *("run", "execution", "position", "branch_key", "branch", "node_id", *_ATTEMPT_OF_STEP),
    *Step._fields,
)
_REPLACE_STEP: Final = f"""ON CONFLICT (run, execution, position, branch_key) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in ("id", *_NEW_STEP[4:]))}"""
ATTEMPT: Final = f"{_insert('attempts', _NEW_ATTEMPT)} ON CONFLICT DO NOTHING"
STEP: Final = f"{_insert('steps', _NEW_STEP)} {_REPLACE_STEP}"
# An output that replaces another one does not count as a commit.
_COUNT: Final = """UPDATE runs SET updated_ms = now_ms(), lease_until_ms = clock_ms() + :lease_ms,
    tokens = tokens + :tokens, cost_pico = cost_pico + :cost_pico, latency_ns = latency_ns +
    :latency_ns, attempt_count = attempt_count + 1, commit_count = commit_count + :commits * CASE WHEN
    EXISTS (SELECT 1 FROM steps WHERE (run, execution, position, branch_key) = (:run, :execution,
    :position, :branch_key)) THEN 0 ELSE 1 END"""
COUNT: Final = f"{_COUNT} {FENCE} RETURNING attempt_count"
ATTEMPT_COUNT: Final = "SELECT attempt_count FROM runs WHERE run = :run"


def _typed(columns: Iterable[str]) -> str:
    """Return parameters with their types: PostgreSQL does not infer them in a query."""
    types = {**STEP_TYPES, **ATTEMPT_TYPES}
    return ", ".join(
        f"CAST(:{name} AS {types[name][0]})" if name in types else f":{name}" for name in columns
    )


# For a server, a commit is one statement. It locks the run and checks the fence (the run may be taken over
# while this waits for the lock), adds the attempt, and only with a new attempt its usage and output.
_RECORD: Final = f"""WITH owned AS (SELECT run FROM runs {FENCE} FOR UPDATE),
    added AS (INSERT INTO attempts ({", ".join(_NEW_ATTEMPT)}) SELECT {_typed(_NEW_ATTEMPT)} FROM owned
    ON CONFLICT DO NOTHING RETURNING run),
    counted AS ({_COUNT} WHERE run = (SELECT run FROM added) RETURNING attempt_count)"""
_RECORD_OUTPUT: Final = f""", output AS (INSERT INTO steps ({", ".join(_NEW_STEP)})
    SELECT {_typed(_NEW_STEP)} FROM added {_REPLACE_STEP})"""
# True if the attempt is recorded, also before the run was taken over; and the number of attempts.
_RESULT: Final = f"""SELECT EXISTS (SELECT 1 FROM owned) OR EXISTS (SELECT 1 FROM attempts
    WHERE (run, execution, epoch, position, started_ns, branch_key, attempt)
    = (:run, :execution, :epoch, :position, :started_ns, :branch_key, :attempt)),
    coalesce((SELECT attempt_count FROM counted), (SELECT attempt_count FROM runs {FENCE}), 0)"""
COMMIT_ATTEMPT: Final = f"{_RECORD} {_RESULT}"
COMMIT_OUTPUT: Final = f"{_RECORD}{_RECORD_OUTPUT} {_RESULT}"

_STEPS: Final = (
    f"SELECT s.position, s.branch, s.node_id, {', '.join(f's.{name}' for name in Step._fields)} FROM steps s"
)
STEPS: Final = f"{_STEPS} WHERE run = :run AND execution = :execution AND position >= 0"
STEPS_AT: Final = f"""{_STEPS} WHERE run = :run AND execution = :execution AND position = :position
    AND branch_key = ANY(:branch_keys)"""
ANNOTATIONS: Final = f"""{_STEPS} WHERE run = :run AND execution = 0 AND position = ANY(:kinds)
    AND branch_key = coalesce(:branch_key, branch_key) ORDER BY branch"""
DELETE_ANNOTATIONS: Final = """DELETE FROM steps WHERE run = :run AND execution = 0 AND position = ANY(:kinds)
    AND branch_key = coalesce(:branch_key, branch_key)"""
WITH_REQUESTS: Final = f"""SELECT run FROM steps
    WHERE run = ANY(:runs) AND execution = 0 AND position = {Annotation.REQUEST}"""
NEWEST_OUTPUT: Final = f"""{_STEPS} JOIN runs r ON s.run = r.run AND (s.execution = r.execution
    OR s.position = {Annotation.SAVED}) WHERE r.run_key = :run_key AND s.node_id = :node_id ORDER BY s.id
    DESC LIMIT 1"""
BLOBS: Final = " UNION ALL ".join(
    f"SELECT {column} FROM steps WHERE substr({column}, 1, CAST(:length AS integer)) = :blob"
    for column in ("output", "input_key")
)

_IN_ORDER: Final = "ORDER BY epoch, position, started_ns, branch_key, attempt"
_LISTED: Final = f"outcome <> '{COLLECTED}'"
_WITH_SIZE: Final = f"""SELECT {_ATTEMPT}, epoch, (SELECT length(s.output) FROM steps s
    WHERE (s.run, s.execution, s.position, s.branch_key) = (a.run, a.execution, a.position, a.branch_key)
    AND (s.epoch, s.attempt, s.started_ns) = (a.epoch, a.attempt, a.started_ns))
    FROM attempts a WHERE run = :run AND execution = :execution AND {_LISTED}"""
# A page begins after the end of the previous one.
ATTEMPT_PAGE: Final = f"""{_WITH_SIZE} AND (epoch, position, started_ns, branch_key, attempt)
    > (:epoch, :position, :started_ns, :branch_key, :attempt) {_IN_ORDER} LIMIT :limit"""
ATTEMPTS_AT: Final = f"{_WITH_SIZE} AND position = :position AND branch_key = :branch_key {_IN_ORDER}"
# In the order of the index `failed`.
FAILED: Final = f"""SELECT {_ATTEMPT}, epoch FROM attempts WHERE run = :run AND execution = :execution
    AND failure_class IS NOT NULL ORDER BY (started_ns + duration_ns) DESC LIMIT :limit"""
# Uses the index `called`, which has no rows of pipelines.
IDENTITIES: Final = """SELECT DISTINCT identity, position FROM attempts
    WHERE run = :run AND execution = :execution AND identity IS NOT NULL"""

# The sums are floats, since SQLite fails if a sum of integers overflows.
TALLY: Final = f"""SELECT bucket, pipeline, node_id, model, failure_class, count(*), sum(tokens *
    1.0), sum(cost_pico * 1.0), sum(wasted * 1.0), sum(duration_ns * 1.0), max(duration_ns * 1.0),
    digits FROM ( SELECT r.started_ms / :bucket_ms AS bucket, r.pipeline, a.node_id, a.model,
    a.failure_class, a.tokens, a.cost_pico, a.duration_ns, length(CAST(a.duration_ns AS text)) * 100 +
    CAST(substr(CAST(a.duration_ns AS text), 1, 2) AS integer) AS digits, CASE WHEN a.outcome =
    'success' OR EXISTS (SELECT 1 FROM steps s WHERE (s.run, s.execution, s.position, s.branch_key) =
    (a.run, a.execution, a.position, a.branch_key) AND (s.epoch, s.attempt, s.started_ns) = (a.epoch,
    a.attempt, a.started_ns)) THEN 0 ELSE a.cost_pico END AS wasted FROM (SELECT run, execution,
    pipeline, started_ms FROM runs WHERE execution > 0 AND started_ms >= :since_ms ORDER BY started_ms
    DESC, run DESC LIMIT :runs) r JOIN attempts a ON a.run = r.run AND a.execution = r.execution AND
    a.{_LISTED} LIMIT :attempts) t GROUP BY bucket, pipeline, node_id, model, failure_class, digits"""

# ---------------------------------------------------------------------- queue

_CANDIDATE: Final = "SELECT r.run, r.run_id, r.pipeline, r.priority, r.wake_ms, r.queue_key FROM runs r"
_SERVED: Final = "(r.version = '' OR r.version = ANY(:versions))"
_BLOCK_OVER: Final = "(r.blocked_until_ms <= :now OR strpos(r.blocked_codes, :code) = 0)"
_SERVED_DUE: Final = f"r.pipeline = :pipeline AND r.wake_ms <= :now AND {_SERVED} AND {_FREE}"
_DUE: Final = f"{_SERVED_DUE} AND r.blocked_since_ms IS NULL"
# Other workers skip the rows that one of them is about to claim.
_LOCKED: Final = "FOR UPDATE OF r SKIP LOCKED"


def _first_of_each_key(index: str, condition: str) -> tuple[str, str]:
    """Return the queries of the first runs without a key, and of the first ones of each key."""
    order = "r.priority, r.wake_ms, r.run"
    return (
        f"""{_CANDIDATE} INDEXED BY {index} WHERE {condition} AND r.queue_key IS NULL ORDER BY {order}
            LIMIT :limit {_LOCKED}""",
        # An array is made once. A server without statistics would join the subquery row by row.
        f"""{_CANDIDATE} WHERE {condition} AND r.run = ANY (ARRAY(SELECT run FROM (SELECT r.run, row_number()
            OVER (PARTITION BY r.queue_key ORDER BY {order}) AS place FROM runs r INDEXED BY {index} WHERE
            {condition} AND r.queue_key IS NOT NULL) AS placed WHERE place <= :limit)) ORDER BY r.run
            {_LOCKED}""",
    )


_QUEUED: Final = f"{_DUE} AND r.status = 'QUEUED'"
_KEYED: Final = f"FROM runs r INDEXED BY runs_by_key WHERE {_QUEUED} AND r.queue_key IS NOT NULL"
_BY_KEY: Final = "r.queue_key, r.priority, r.wake_ms, r.run"
# A walk along the index, which takes the first runs of a key and skips its other ones: a window function
# would read the whole queue for each claim (45 ms, not 0.4 ms, for 20,000 runs of 10 keys in SQLite).
_QUEUED_OF_EACH_KEY: Final = f"""{_CANDIDATE} NOT INDEXED WHERE {_QUEUED} AND r.run = ANY (ARRAY(
    WITH RECURSIVE placed (run, queue_key, priority, wake_ms, place) AS (
    SELECT * FROM (SELECT r.run, r.queue_key, r.priority, r.wake_ms, 1 {_KEYED} ORDER BY {_BY_KEY} LIMIT 1)
    AS head UNION ALL SELECT n.run, n.queue_key, n.priority, n.wake_ms,
    CASE WHEN n.queue_key = p.queue_key THEN p.place + 1 ELSE 1 END
    FROM placed p JOIN runs n ON n.run = CASE WHEN p.place < :limit
    THEN (SELECT r.run {_KEYED} AND ({_BY_KEY}) > (p.queue_key, p.priority, p.wake_ms, p.run)
        ORDER BY {_BY_KEY} LIMIT 1)
    ELSE (SELECT r.run {_KEYED} AND r.queue_key > p.queue_key ORDER BY {_BY_KEY} LIMIT 1) END)
    SELECT run FROM placed)) ORDER BY r.run {_LOCKED}"""
_STOPPED: Final = f"{_DUE} AND r.status IN ('SUSPENDED', 'INTERRUPTED')"
_BLOCKED: Final = f"""{_SERVED_DUE} AND r.blocked_since_ms IS NOT NULL AND {_BLOCK_OVER}
    AND r.status IN ('SUSPENDED', 'INTERRUPTED', 'QUEUED')"""
CANDIDATES: Final = (
    *_first_of_each_key("runs_by_wake", _STOPPED),
    _first_of_each_key("runs_by_queue", _QUEUED)[0],  # The rows come from the index in order.
    _QUEUED_OF_EACH_KEY,
    *_first_of_each_key("runs_by_block", _BLOCKED),
)
# Of owners on this machine it is known at once that they are gone; they may be few of very many.
RUNNING: Final = f"""SELECT r.run, r.run_id, r.pipeline, r.priority, r.queue_key, r.lease_owner,
    {_LEFT_SECONDS} FROM runs r WHERE r.status = 'RUNNING' AND r.pipeline = :pipeline AND r.execution
    > 0 AND {_FREE} AND {_SERVED} AND (r.blocked_since_ms IS NULL OR {_BLOCK_OVER}) AND
    (r.lease_until_ms IS NULL OR r.lease_until_ms < clock_ms() OR substr(r.lease_owner, 1,
    length(CAST(:machine AS text))) = :machine) ORDER BY r.priority, r.started_ms"""
LOCK_RUNNING: Final = f"""SELECT r.run FROM runs r WHERE r.run = ANY(:runs) AND r.status = 'RUNNING'
    AND {_FREE} AND r.lease_owner = ANY(:owners) ORDER BY r.run {_LOCKED}"""
_LIVE: Final = (
    f"SELECT r.queue_key, r.lease_owner, {_LEFT_SECONDS}, NOT {_FREE} AND r.claim <> '' FROM runs r"
)
LIVE: Final = f"""{_LIVE} WHERE r.status = 'RUNNING' AND r.pipeline = :pipeline AND r.execution > 0
    UNION ALL {_LIVE} WHERE r.pipeline = :pipeline AND r.claim_until_ms IS NOT NULL AND r.status <>
    'RUNNING'"""
CLAIM: Final = (
    "UPDATE runs SET claim = :token, claim_until_ms = clock_ms() + :claim_ms WHERE run = ANY(:runs)"
)
# Each part is one scan of an index.
_FIGURES: Final = (
    "SELECT count(*) AS queued, min(CASE WHEN r.wake_ms <= :now THEN r.wake_ms END) AS due_ms, 0 AS blocked"
)
_WAITING: Final = f"r.pipeline = :pipeline AND r.blocked_since_ms IS NULL AND {_SERVED}"
QUEUE_FIGURES: Final = f"""SELECT sum(queued), min(due_ms), sum(blocked), min(since_ms) FROM (
    {_FIGURES}, CAST(NULL AS bigint) AS since_ms FROM runs r INDEXED BY runs_by_queue WHERE {_WAITING}
    AND r.status = 'QUEUED' AND r.queue_key IS NULL UNION ALL {_FIGURES}, NULL FROM runs r INDEXED BY
    runs_by_key WHERE {_WAITING} AND r.status = 'QUEUED' AND r.queue_key IS NOT NULL UNION ALL SELECT
    0, (SELECT r.wake_ms FROM runs r INDEXED BY runs_by_wake WHERE {_WAITING} AND r.status IN
    ('SUSPENDED', 'INTERRUPTED') AND r.wake_ms <= :now AND r.wake_ms > {MESSAGE_SENT} ORDER BY
    r.wake_ms LIMIT 1), 0, NULL UNION ALL SELECT 0, NULL, count(*), min(r.blocked_since_ms) FROM runs
    r INDEXED BY runs_by_block WHERE r.pipeline = :pipeline AND r.blocked_since_ms IS NOT NULL AND
    {_SERVED}) AS parts"""

# ---------------------------------------------------------------------- events and cells

APPEND_EVENTS: Final = """INSERT INTO events (run, execution, epoch, last, written_ms, data)
    SELECT run, execution, :epoch, :last, now_ms(), :data FROM runs
    WHERE run = :run AND execution = :execution ON CONFLICT DO NOTHING"""
EVENTS: Final = """SELECT epoch, last, data FROM events WHERE run = :run AND (epoch, last) > (:epoch, :last)
    AND execution = :execution ORDER BY epoch, last LIMIT :limit"""
TRIM_EVENTS: Final = """DELETE FROM events WHERE run = :run AND (epoch, last) <= (SELECT epoch, last
    FROM events WHERE run = :run ORDER BY epoch DESC, last DESC LIMIT 1 OFFSET :most)"""
# Processes that delete at the same time do not wait for each other.
EXPIRE_EVENTS: Final = """DELETE FROM events WHERE (run, epoch, last) IN (SELECT run, epoch, last FROM events
    WHERE written_ms < now_ms() - :expiry_ms LIMIT 1000 FOR UPDATE SKIP LOCKED)"""
CELL: Final = "SELECT data, now_ms() FROM cells WHERE cell_key = :cell_key"
LOCK_CELL: Final = f"{CELL} FOR UPDATE"
# Two processes that create a cell wait for the same row.
NEW_CELL: Final = """INSERT INTO cells (cell_key, name, data) VALUES (:cell_key, :name, :data)
    ON CONFLICT (cell_key) DO UPDATE SET name = excluded.name RETURNING data, now_ms()"""
WRITE_CELL: Final = """INSERT INTO cells (cell_key, name, data) VALUES (:cell_key, :name, :data)
    ON CONFLICT (cell_key) DO UPDATE SET data = excluded.data"""
NOW: Final = "SELECT now_ms()"

# ---------------------------------------------------------------------- ids

# Ids with a prefix: a range of the index. LIKE would interpret wildcards.
_HAS_PREFIX: Final = "substr(run_id, 1, length(CAST(:prefix AS text))) = :prefix"
_IN_RANGE: Final = "substr(run_id, 1, 64) >= :first AND substr(run_id, 1, 64) < :last"
BY_PREFIX: Final = f"""SELECT run_id FROM runs WHERE execution > 0 AND {_IN_RANGE} AND {_HAS_PREFIX}
    ORDER BY run_id = :prefix DESC, started_ms DESC, run DESC LIMIT :limit"""
