"""SQL statements of the Postgres store."""

from __future__ import annotations

from typing import Final

# Leases and times use the server's clock, which is the same for all processes.
NOW_MS: Final = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
_LEASE_END: Final = "clock_timestamp() + make_interval(secs => %s)"
RUN_COLUMNS: Final = """r.run, r.run_id, r.pipeline, r.execution, r.status, r.error, r.started_ms, r.updated_ms, r.tokens,
    r.cost_pico, r.latency_ns, r.lease_owner, r.lease_epoch,
    coalesce(extract(epoch FROM r.lease_until - clock_timestamp())::float8, -1.0),
    (SELECT count(*) FROM steps s WHERE s.run = r.run AND s.execution = r.execution AND s.position >= 0
    AND s.branch_key = ''), r.attempt_count, r.commit_count, r.wake_ms, r.expires_ms, r.priority, r.queue_key,
    r.version, r.blocked, r.blocked_since_ms, r.blocked_until_ms, r.blocked_codes,
    CASE WHEN r.claim_until >= clock_timestamp() THEN r.claim END"""
FIND: Final = f"SELECT {RUN_COLUMNS} FROM runs r WHERE run_key = %s"
# Two sessions that open a new run wait for the same row: the second one waits for the first, then sees its
# changes.
LOCK: Final = f"""INSERT INTO runs AS r (run_key, run_id, pipeline, execution, status, started_ms, updated_ms, tokens,
    cost_pico, latency_ns, lease_epoch, attempt_count, commit_count)
    VALUES (%s, %s, '', 0, 'RUNNING', {NOW_MS}, {NOW_MS}, 0, 0, 0, 0, 0, 0)
    ON CONFLICT (run_key) DO UPDATE SET run_key = excluded.run_key RETURNING {RUN_COLUMNS}, r.run = lastval()"""
NEW_INPUT: Final = "INSERT INTO inputs (run, execution, contract, input, sha256) VALUES (%s, %s, %s, %s, %s)"
INPUT: Final = "SELECT contract, input, sha256 FROM inputs WHERE run = %s AND execution = %s"
# A run that was submitted without a version has that of the code which starts it.
_NO_MARK: Final = "blocked = NULL, blocked_since_ms = NULL, blocked_until_ms = NULL, blocked_codes = NULL"
_CLAIM: Final = f"""status = 'RUNNING', {_NO_MARK}, error = NULL, updated_ms = {NOW_MS}, lease_owner = %s, lease_until = {_LEASE_END},
    wake_ms = NULL, claim = NULL, claim_until = NULL, lease_epoch = lease_epoch + 1 WHERE run = %s RETURNING lease_epoch, attempt_count"""
TAKE_OVER: Final = f"""UPDATE runs SET version = CASE WHEN status = 'QUEUED' AND version = '' THEN %s ELSE version END,
    {_CLAIM}"""
BLOCK: Final = """UPDATE runs SET blocked = %s, blocked_since_ms = %s, blocked_until_ms = %s, blocked_codes = %s WHERE run = %s"""
REPLACE_OWNER: Final = "UPDATE runs SET lease_owner = %s WHERE run = %s"
BEGIN: Final = f"""UPDATE runs SET execution = %s, pipeline = %s, version = %s, started_ms = {NOW_MS}, tokens = 0, cost_pico = 0,
    latency_ns = 0, attempt_count = 0, commit_count = 0, {_CLAIM}"""
DISCARD: Final = "DELETE FROM steps WHERE run = %s AND execution = %s AND position >= %s"
COUNT_DISCARDED: Final = "UPDATE runs SET commit_count = commit_count - %s WHERE run = %s"
ROW_COUNTS: Final = """SELECT EXISTS (SELECT FROM inputs WHERE run = %(run)s AND execution = %(execution)s),
    (SELECT count(*) FROM attempts WHERE run = %(run)s AND execution = %(execution)s),
    (SELECT count(*) FROM steps WHERE run = %(run)s AND execution = %(execution)s AND position >= 0)"""
_STEP_COLUMNS: Final = (
    "s.position, s.branch, s.node_id, s.contract, s.schema_ref, s.output, s.sha256, s.number, s.input_key"
)
STEPS: Final = f"SELECT {_STEP_COLUMNS} FROM steps s WHERE run = %s AND execution = %s AND position >= 0"
NOT_LAZILY_LOADED: Final = " AND NOT (position = %s AND branch <> '' AND starts_with(branch, %s))"
STEPS_AT: Final = f"{STEPS} AND position = %s AND branch_key = ANY(%s)"
NEWEST_OUTPUT: Final = f"""SELECT {_STEP_COLUMNS}
    FROM runs r JOIN steps s ON s.run = r.run AND (s.execution = r.execution OR s.position = %s)
    WHERE r.run_key = %s AND s.node_id = %s ORDER BY s.id DESC LIMIT 1"""
_NEW_STEP_COLUMNS: Final = """(run, execution, position, branch_key, branch, node_id, epoch, attempt, started_ns, contract,
    schema_ref, output, sha256, number, input_key)"""
_REPLACE_STEP: Final = """ON CONFLICT (run, execution, position, branch_key) DO UPDATE SET id = excluded.id,
    branch = excluded.branch, node_id = excluded.node_id, epoch = excluded.epoch, attempt = excluded.attempt,
    started_ns = excluded.started_ns, contract = excluded.contract, schema_ref = excluded.schema_ref,
    output = excluded.output, sha256 = excluded.sha256, number = excluded.number, input_key = excluded.input_key"""
ANNOTATE: Final = f"""INSERT INTO steps {_NEW_STEP_COLUMNS}
    VALUES (%s, 0, %s, %s, %s, %s, 0, 0, 0, %s, %s, %s, %s, %s, %s) {_REPLACE_STEP}"""
ANNOTATIONS: Final = (
    f"SELECT {_STEP_COLUMNS} FROM steps s WHERE run = %s AND execution = 0 AND position = ANY(%s) "
    "AND (%s::bytea IS NULL OR branch_key = %s) ORDER BY branch"
)
DELETE_ANNOTATIONS: Final = """DELETE FROM steps WHERE run = %s AND execution = 0 AND position = ANY(%s)
    AND (%s::bytea IS NULL OR branch_key = %s)"""
WITH_REQUESTS: Final = "SELECT run FROM steps WHERE run = ANY(%s) AND execution = 0 AND position = %s"
# The fence: rows change only while this session is the last one that opened the run, and the run counts all
# attempts that were acknowledged to it.
_FENCE: Final = """WHERE run = %(run)s AND lease_epoch = %(epoch)s AND lease_owner = %(owner)s
    AND attempt_count >= %(acknowledged)s"""
# A commit is one statement. It locks the run and checks the fence (the run may be taken over while this waits
# for the lock), adds the attempt, and only with a new attempt its usage and output. An output that replaces
# another one does not count as a commit.
_ATTEMPT_KEY: Final = (
    "%(run)s, %(execution)s, %(epoch)s, %(position)s, %(started_ns)s, %(branch_key)s, %(attempt)s"
)
_RECORD_ATTEMPT: Final = f"""WITH owned AS (SELECT run FROM runs {_FENCE} FOR UPDATE),
    added AS (INSERT INTO attempts (run, execution, epoch, position, started_ns, branch_key, attempt, branch, node_id,
    duration_ns, outcome, failure_class, message, reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type)
    SELECT {_ATTEMPT_KEY}, %(branch)s, %(node_id)s, %(duration_ns)s, %(outcome)s, %(failure_class)s::text,
    %(message)s::text, %(reason)s::text, %(tokens)s, %(output_tokens)s, %(cost_pico)s, %(model)s::text,
    %(function_ns)s, %(group_id)s::text, %(identity)s::text, %(error_type)s::text FROM owned
    ON CONFLICT DO NOTHING RETURNING run),
    counted AS (UPDATE runs SET updated_ms = {NOW_MS},
    lease_until = clock_timestamp() + make_interval(secs => %(lease_seconds)s), tokens = tokens + %(tokens)s,
    cost_pico = cost_pico + %(cost_pico)s, latency_ns = latency_ns + %(latency_ns)s,
    attempt_count = attempt_count + 1, commit_count = commit_count + %(commits)s * (SELECT count(*) FROM added WHERE
    NOT EXISTS (SELECT FROM steps WHERE (run, execution, position, branch_key)
    = (%(run)s, %(execution)s, %(position)s, %(branch_key)s)))
    WHERE run = (SELECT run FROM added) RETURNING attempt_count)"""
_RECORD_OUTPUT: Final = f""", output AS (INSERT INTO steps {_NEW_STEP_COLUMNS}
    SELECT run, %(execution)s, %(position)s, %(branch_key)s, %(branch)s, %(node_id)s, %(epoch)s, %(attempt)s,
    %(started_ns)s, %(contract)s, %(schema_ref)s, %(output)s::bytea, %(sha256)s::bytea, %(number)s::bigint,
    %(input_key)s::bytea FROM added {_REPLACE_STEP})"""
# True if the attempt is recorded, also before the run was taken over; and the number of attempts.
_RESULT: Final = f"""SELECT EXISTS (SELECT FROM owned) OR EXISTS (SELECT FROM attempts WHERE
    (run, execution, epoch, position, started_ns, branch_key, attempt) = ({_ATTEMPT_KEY})),
    coalesce((SELECT attempt_count FROM counted), (SELECT attempt_count FROM runs {_FENCE}), 0)"""
COMMIT_ATTEMPT: Final = f"{_RECORD_ATTEMPT} {_RESULT}"
COMMIT_OUTPUT: Final = f"{_RECORD_ATTEMPT}{_RECORD_OUTPUT} {_RESULT}"
# An answer that was stored since the run was claimed makes it due.
FINISH: Final = f"""UPDATE runs SET status = %(status)s, error = %(error)s,
    updated_ms = coalesce(%(updated_ms)s::bigint, {NOW_MS}), lease_until = NULL, {_NO_MARK}, wake_ms = CASE
    WHEN %(status)s::text IN ('SUSPENDED', 'INTERRUPTED', 'QUEUED') THEN least(wake_ms, %(wake_ms)s::bigint) END {_FENCE}"""
WAKE: Final = "UPDATE runs SET wake_ms = %s WHERE run = %s"
# Wakes workers that listen; identical notifications of a transaction are sent once.
NOTIFY: Final = "SELECT pg_notify('stroma_' || current_schema(), '')"
ENQUEUE: Final = """UPDATE runs SET status = 'QUEUED', lease_until = NULL, wake_ms = %s, priority = %s, queue_key = %s,
    expires_ms = %s WHERE run = %s"""
_FREE: Final = "(r.claim_until IS NULL OR r.claim_until < clock_timestamp())"
_CANDIDATE: Final = "SELECT r.run, r.run_id, r.pipeline, r.priority, coalesce(r.wake_ms, 0), r.queue_key"
_SERVED: Final = "(r.version = '' OR r.version = ANY(%(versions)s::text[]))"
_NOT_BLOCKED: Final = "r.blocked_since_ms IS NULL"
_BLOCK_OVER: Final = "(r.blocked_until_ms <= %(now)s OR strpos(r.blocked_codes, %(code)s) = 0)"
_SERVED_DUE: Final = (
    f"FROM runs r WHERE r.pipeline = %(pipeline)s AND r.wake_ms <= %(now)s AND {_SERVED} AND {_FREE}"
)
_DUE: Final = f"{_SERVED_DUE} AND {_NOT_BLOCKED}"
# Other workers skip the rows that one of them is about to claim.
_LOCKED: Final = "FOR UPDATE OF r SKIP LOCKED"
STOPPED: Final = f"""{_CANDIDATE} {_DUE} AND r.status IN ('SUSPENDED', 'INTERRUPTED')
    ORDER BY r.wake_ms LIMIT %(limit)s {_LOCKED}"""
BLOCKED: Final = f"""{_CANDIDATE} {_SERVED_DUE} AND r.blocked_since_ms IS NOT NULL AND {_BLOCK_OVER}
    AND r.status IN ('SUSPENDED', 'INTERRUPTED', 'QUEUED') ORDER BY r.blocked_since_ms LIMIT %(limit)s {_LOCKED}"""
# Without keys, the rows come from the index in order.
QUEUED: Final = f"""{_CANDIDATE} {_DUE} AND r.status = 'QUEUED' AND r.queue_key IS NULL
    ORDER BY r.priority, r.wake_ms, r.run LIMIT %(limit)s {_LOCKED}"""
QUEUED_BY_KEY: Final = f"""{_CANDIDATE} {_DUE} AND r.status = 'QUEUED' AND r.run IN (SELECT run FROM (SELECT r.run,
    row_number() OVER (PARTITION BY r.queue_key ORDER BY r.priority, r.wake_ms, r.run) AS place {_DUE}
    AND r.status = 'QUEUED' AND r.queue_key IS NOT NULL) AS placed WHERE place <= %(limit)s) ORDER BY r.run {_LOCKED}"""
# Each part is one scan of an index.
_OF_PIPELINE: Final = f"FROM runs r WHERE r.pipeline = %(pipeline)s AND {_SERVED}"
QUEUE_FIGURES: Final = f"""SELECT sum(queued), min(due_ms), sum(blocked), min(since_ms) FROM (
    SELECT count(*) AS queued, min(CASE WHEN wake_ms <= %(now)s THEN wake_ms END) AS due_ms, 0 AS blocked,
    NULL::bigint AS since_ms {_OF_PIPELINE} AND {_NOT_BLOCKED} AND status = 'QUEUED' AND queue_key IS NULL
    UNION ALL SELECT count(*), min(CASE WHEN wake_ms <= %(now)s THEN wake_ms END), 0, NULL
    {_OF_PIPELINE} AND {_NOT_BLOCKED} AND status = 'QUEUED' AND queue_key IS NOT NULL
    UNION ALL SELECT 0, (SELECT wake_ms {_OF_PIPELINE} AND {_NOT_BLOCKED} AND status IN ('SUSPENDED', 'INTERRUPTED')
    AND wake_ms <= %(now)s AND wake_ms > %(news)s ORDER BY wake_ms LIMIT 1), 0, NULL
    UNION ALL SELECT 0, NULL, count(*), min(blocked_since_ms) {_OF_PIPELINE} AND blocked_since_ms IS NOT NULL) AS parts"""
# Of owners on this machine it is known at once that they are gone; they may be few of very many.
RUNNING: Final = f"""SELECT run, run_id, pipeline, priority, queue_key, lease_owner,
    coalesce(extract(epoch FROM lease_until - clock_timestamp())::float8, -1.0) FROM runs r
    WHERE status = 'RUNNING' AND pipeline = %(pipeline)s AND execution > 0 AND {_FREE}
    AND {_SERVED} AND ({_NOT_BLOCKED} OR {_BLOCK_OVER})
    AND (lease_until IS NULL OR lease_until < clock_timestamp() OR starts_with(lease_owner, %(machine)s))
    ORDER BY started_ms"""
LIVE: Final = f"""SELECT queue_key, lease_owner, coalesce(extract(epoch FROM lease_until - clock_timestamp())::float8, -1.0),
    NOT {_FREE} AND r.claim <> '' FROM runs r WHERE pipeline = %s AND (status = 'RUNNING' OR r.claim_until >= clock_timestamp())"""
INPUTS: Final = """SELECT r.run, i.input, i.sha256 FROM runs r JOIN inputs i ON i.run = r.run AND i.execution = r.execution
    WHERE r.run = ANY(%s)"""
CLAIM_RUNS: Final = "UPDATE runs SET claim = %s, claim_until = clock_timestamp() + make_interval(secs => %s) WHERE run = ANY(%s)"
LOCK_RUNNING: Final = f"""SELECT r.run FROM runs r WHERE r.run = ANY(%s) AND r.status = 'RUNNING' AND {_FREE}
    AND r.lease_owner = ANY(%s) ORDER BY r.run {_LOCKED}"""
STATUSES: Final = "SELECT run_id, status FROM runs WHERE execution > 0 AND run_key = ANY(%s)"
# In the order of their runs, to avoid deadlocks.
RENEW: Final = """WITH fences AS (SELECT * FROM
    unnest(%s::bigint[], %s::bigint[], %s::text[], %s::float8[], %s::bigint[])
    AS f(run, epoch, owner, seconds, acknowledged)),
    owned AS (SELECT r.run, f.seconds FROM runs r JOIN fences f ON r.run = f.run AND r.lease_epoch = f.epoch
    AND r.lease_owner = f.owner AND r.attempt_count >= f.acknowledged WHERE r.lease_until IS NOT NULL ORDER BY r.run FOR UPDATE OF r)
    UPDATE runs r SET lease_until = clock_timestamp() + make_interval(secs => owned.seconds)
    FROM owned WHERE r.run = owned.run RETURNING r.run, r.lease_epoch"""
# For a day, a session of a deleted run gets the error that it was deleted; after that, that it was lost.
RECORD_DELETED: Final = f"INSERT INTO deleted (run, deleted_ms) VALUES (%s, {NOW_MS}) ON CONFLICT DO NOTHING"
FORGET_DELETED: Final = f"DELETE FROM deleted WHERE deleted_ms < {NOW_MS} - 24 * 3600 * 1000"
APPEND_EVENTS: Final = f"""INSERT INTO events (run, execution, epoch, last, written_ms, data)
    SELECT b.run, b.execution, b.epoch, b.last, {NOW_MS}, b.data
    FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bytea[]) AS b(run, execution, epoch, last, data)
    JOIN runs r ON r.run = b.run AND r.execution = b.execution ON CONFLICT DO NOTHING"""
EVENTS: Final = """SELECT epoch, last, data FROM events WHERE run = %s AND (epoch, last) > (%s, %s) AND execution = %s
    ORDER BY epoch, last LIMIT %s"""
TRIM_EVENTS: Final = """DELETE FROM events WHERE run = %(run)s AND (epoch, last) <= (SELECT epoch, last FROM events
    WHERE run = %(run)s ORDER BY epoch DESC, last DESC LIMIT 1 OFFSET %(most)s)"""
# Processes that delete at the same time do not wait for each other.
EXPIRE_EVENTS: Final = f"""DELETE FROM events WHERE ctid = ANY(ARRAY(SELECT ctid FROM events WHERE written_ms < {NOW_MS} - %s
    LIMIT 1000 FOR UPDATE SKIP LOCKED))"""
DISCARD_EVENTS: Final = "DELETE FROM events WHERE run = %s"
DELETE_RUN: Final = (
    DISCARD_EVENTS,
    "DELETE FROM tags WHERE run = %s",
    "DELETE FROM steps WHERE run = %s",
    "DELETE FROM inputs WHERE run = %s",
    "DELETE FROM attempts WHERE run = %s",
    "DELETE FROM runs WHERE run = %s",
)
ATTEMPTS: Final = """SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class, message,
    reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type, epoch FROM attempts
    WHERE run = %s AND execution = %s
    ORDER BY epoch, position, started_ns, branch, attempt"""
# Joined with the attempts in Python: a server without statistics of a new table would compare all attempts of
# a run with all of its outputs.
OUTPUTS: Final = """SELECT epoch, position, started_ns, branch, attempt, contract, schema_ref, output, sha256, number, input_key
    FROM steps WHERE run = %s AND execution = %s AND position >= 0"""
# For many runs at once: one query for each run would be one round trip for each.
EXTRAS: Final = """SELECT r.run, (SELECT node_id FROM steps p WHERE p.run = r.run AND p.execution = 0 AND p.position = %s),
    ARRAY(SELECT tag FROM tags g WHERE g.run = r.run) FROM runs r WHERE r.run = ANY(%s)"""
FAILED_ATTEMPTS: Final = """SELECT w.run, f.* FROM unnest(%s::bigint[], %s::bigint[]) AS w(run, execution), LATERAL
    (SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class, message, reason, tokens,
    output_tokens, cost_pico, model, function_ns, group_id, identity, error_type FROM attempts a WHERE a.run = w.run AND a.execution = w.execution
    AND failure_class IS NOT NULL ORDER BY (started_ns + duration_ns) DESC LIMIT %s) f"""
FAILED_SINCE: Final = """SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class, message,
    reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type FROM attempts WHERE run = %s AND execution = %s AND epoch >= %s
    AND failure_class IS NOT NULL ORDER BY (started_ns + duration_ns) DESC LIMIT 1000"""
TAG: Final = """INSERT INTO tags (run, tag, started_ms) SELECT r.run, t.tag, r.started_ms FROM runs r,
    unnest(%s::text[]) AS t(tag) WHERE r.run = %s ON CONFLICT DO NOTHING"""
UNTAG: Final = "DELETE FROM tags WHERE run = %s"
_WITH_SIZE: Final = """SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class,
    message, reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type, epoch,
    (SELECT octet_length(s.output)::bigint FROM steps s WHERE (s.run, s.execution, s.position, s.branch_key)
    = (a.run, a.execution, a.position, a.branch_key) AND (s.epoch, s.attempt, s.started_ns)
    = (a.epoch, a.attempt, a.started_ns)) FROM attempts a WHERE run = %s AND execution = %s"""
_IN_ORDER: Final = "ORDER BY epoch, position, started_ns, branch_key, attempt"
ATTEMPT_PAGE: Final = f"""{_WITH_SIZE} AND (epoch, position, started_ns, branch_key, attempt)
    > (%s::bigint, %s::bigint, %s::bigint, %s::bytea, %s::bigint) {_IN_ORDER} LIMIT %s"""
ATTEMPTS_AT: Final = f"{_WITH_SIZE} AND position = %s AND branch_key = %s {_IN_ORDER}"
IDENTITIES: Final = """SELECT DISTINCT identity, position FROM attempts
    WHERE run = %s AND execution = %s AND identity IS NOT NULL"""
STEP_AT: Final = f"""SELECT {_STEP_COLUMNS} FROM steps s WHERE run = %s AND execution = %s AND position = %s
    AND branch_key = %s"""
EXPIRED: Final = """SELECT run_id FROM runs WHERE updated_ms < %s AND (%s OR (execution > 0
    AND status IN ('COMPLETED', 'RESUMED', 'FAILED', 'CANCELLED'))) ORDER BY updated_ms LIMIT %s"""
BLOBS: Final = """SELECT output FROM steps WHERE substr(output, 1, %(length)s::int) = %(blob)s
    UNION ALL SELECT input_key FROM steps WHERE substr(input_key, 1, %(length)s::int) = %(blob)s
    UNION ALL SELECT input FROM inputs WHERE substr(input, 1, %(length)s::int) = %(blob)s"""
CELL: Final = f"SELECT data, {NOW_MS} FROM cells WHERE cell_key = %s"
LOCK_CELL: Final = f"{CELL} FOR UPDATE"
# Two processes that create a cell wait for the same row.
NEW_CELL: Final = f"""INSERT INTO cells AS c (cell_key, name, data) VALUES (%s, %s, '')
    ON CONFLICT (cell_key) DO UPDATE SET name = excluded.name RETURNING c.data, {NOW_MS}"""
EMPTY_CELL: Final = f"SELECT ''::bytea, {NOW_MS}"
SERVER_CLOCK: Final = f"SELECT {NOW_MS}"
WRITE_CELL: Final = "UPDATE cells SET data = %s WHERE cell_key = %s"
FACTS: Final = f"""SELECT current_setting('server_version'), (SELECT v FROM meta WHERE k = 'schema_version'), {NOW_MS},
    current_setting('fsync'), current_setting('full_page_writes')"""
# Ids with a prefix: a range of the index. LIKE would interpret wildcards.
BY_PREFIX: Final = """SELECT run_id FROM runs WHERE execution > 0
    AND left(run_id, 64) COLLATE "C" >= %s AND left(run_id, 64) COLLATE "C" < %s AND starts_with(run_id, %s)
    ORDER BY run_id = %s DESC, started_ms DESC, run DESC LIMIT %s"""
COUNT_WITH_PREFIX: Final = """SELECT count(*) FROM (SELECT 1 FROM runs WHERE left(run_id, 64) COLLATE "C" >= %s
    AND left(run_id, 64) COLLATE "C" < %s LIMIT %s) AS counted"""
NEWEST_WITH_PREFIX: Final = """SELECT run_id FROM runs WHERE execution > 0 AND starts_with(run_id, %s) AND run_id != %s
    ORDER BY started_ms DESC, run DESC LIMIT %s"""
