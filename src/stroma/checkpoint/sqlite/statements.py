"""SQL statements of the SQLite store."""

from __future__ import annotations

from typing import Final

from stroma.checkpoint.decisions import MESSAGE_SENT
from stroma.checkpoint.durable.rows import Annotation
from stroma.checkpoint.queue import MAX_CLAIM_SECONDS

COLUMNS: Final = """r.run, r.run_id, r.pipeline, r.execution, r.status, r.error, r.started_ms, r.updated_ms, r.tokens,
    r.cost_pico, r.latency_ns, r.lease_owner, r.lease_epoch, r.lease_until_ms, (SELECT count(*) FROM steps s
    WHERE s.run = r.run AND s.execution = r.execution AND s.position >= 0 AND s.branch = ''), r.attempt_count,
    r.commit_count, r.wake_ms, r.expires_ms, r.priority, r.queue_key, r.version, r.blocked, r.blocked_since_ms, r.blocked_until_ms,
    r.blocked_codes, r.claim, r.claim_until_ms"""
RUN: Final = f"SELECT {COLUMNS} FROM runs r"
NEW_RUN: Final = """INSERT INTO runs (run_id, pipeline, execution, status, started_ms, updated_ms, tokens, cost_pico,
    latency_ns, lease_epoch, attempt_count, commit_count) VALUES (?, '', 0, 'RUNNING', ?, ?, 0, 0, 0, 0, 0, 0)"""
RESTART: Final = """UPDATE runs SET execution = ?, pipeline = ?, version = ?, started_ms = ?, tokens = 0, cost_pico = 0,
    latency_ns = 0, attempt_count = 0, commit_count = 0 WHERE run = ?"""
NEW_INPUT: Final = "INSERT INTO inputs (run, execution, contract, input, sha256) VALUES (?, ?, ?, ?, ?)"
INPUT: Final = "SELECT contract, input, sha256 FROM inputs WHERE run = ? AND execution = ?"
# A run that was submitted without a version has that of the code which starts it.
_NO_MARK: Final = "blocked = NULL, blocked_since_ms = NULL, blocked_until_ms = NULL, blocked_codes = NULL"
CLAIM: Final = f"""UPDATE runs SET version = CASE WHEN status = 'QUEUED' AND version = '' THEN ? ELSE version END,
    status = 'RUNNING', error = NULL, updated_ms = ?, lease_owner = ?, lease_until_ms = ?, {_NO_MARK},
    wake_ms = NULL, claim = NULL, claim_until_ms = NULL, lease_epoch = lease_epoch + 1 WHERE run = ? RETURNING lease_epoch, attempt_count"""
BLOCK: Final = """UPDATE runs SET blocked = ?, blocked_since_ms = ?, blocked_until_ms = ?, blocked_codes = ? WHERE run = ?"""
REPLACE_OWNER: Final = "UPDATE runs SET lease_owner = ? WHERE run = ?"
DISCARD: Final = "DELETE FROM steps WHERE run = ? AND execution = ? AND position >= ?"
DISCARDED: Final = "UPDATE runs SET commit_count = commit_count - ? WHERE run = ?"
ROW_COUNTS: Final = """SELECT EXISTS (SELECT 1 FROM inputs WHERE run = :run AND execution = :execution),
    (SELECT count(*) FROM attempts WHERE run = :run AND execution = :execution),
    (SELECT count(*) FROM steps WHERE run = :run AND execution = :execution AND position >= 0)"""
STEPS: Final = """SELECT position, branch, node_id, contract, schema_ref, output, sha256, number, input_key FROM steps
    WHERE run = ? AND execution = ? AND position >= 0"""
NOT_LAZILY_LOADED: Final = " AND NOT (position = ? AND branch <> '' AND substr(branch, 1, ?) = ?)"
ANNOTATIONS: Final = """SELECT position, branch, node_id, contract, schema_ref, output, sha256, number, input_key FROM steps
    WHERE run = ? AND execution = 0 AND position IN (%s) AND branch = coalesce(?, branch) ORDER BY branch"""
DELETE_ANNOTATIONS: Final = """DELETE FROM steps WHERE run = ? AND execution = 0 AND position IN (%s)
    AND branch = coalesce(?, branch)"""
EXPIRED: Final = """SELECT run_id FROM runs WHERE updated_ms < ?
    AND (? OR (execution > 0 AND status IN ('COMPLETED', 'RESUMED', 'FAILED', 'CANCELLED'))) ORDER BY updated_ms LIMIT ?"""
BLOBS: Final = """SELECT output FROM steps WHERE substr(output, 1, :length) = :blob
    UNION ALL SELECT input_key FROM steps WHERE substr(input_key, 1, :length) = :blob
    UNION ALL SELECT input FROM inputs WHERE substr(input, 1, :length) = :blob"""
NEWEST: Final = f"""SELECT s.position, s.branch, s.node_id, s.contract, s.schema_ref, s.output, s.sha256, s.number, s.input_key
    FROM runs r JOIN steps s ON s.run = r.run AND (s.execution = r.execution OR s.position = {Annotation.SAVED})
    WHERE r.run_id = ? AND s.node_id = ? ORDER BY s.id DESC LIMIT 1"""
ATTEMPT: Final = """INSERT INTO attempts (run, execution, epoch, position, started_ns, branch, attempt, node_id,
    duration_ns, outcome, failure_class, message, reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""
STEP: Final = """INSERT OR REPLACE INTO steps (run, execution, position, branch, node_id, epoch, attempt, started_ns,
    contract, schema_ref, output, sha256, number, input_key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# The fence: rows change only while this session is the last one that opened the run, and the run counts all
# attempts that were acknowledged to it. An output that replaces another one does not count as a commit.
_FENCE: Final = "WHERE run = ? AND lease_epoch = ? AND lease_owner = ? AND attempt_count >= ?"
COUNT: Final = f"""UPDATE runs SET updated_ms = ?, lease_until_ms = ?, tokens = tokens + ?, cost_pico = cost_pico + ?,
    latency_ns = latency_ns + ?, attempt_count = attempt_count + 1, commit_count = commit_count + ? {_FENCE}"""
# 2 us instead of 12: without the sign, SQLite compiles the statement again for each position, because of the
# partial index `requests`.
IS_COMMITTED: Final = "SELECT 1 FROM steps WHERE run = ? AND execution = ? AND position = +? AND branch = ?"
ATTEMPT_COUNT: Final = "SELECT attempt_count FROM runs WHERE run = ?"
# An answer that was stored since the run was claimed makes it due.
END: Final = f"""UPDATE runs SET status = ?, error = ?, updated_ms = ?, lease_until_ms = NULL,
    wake_ms = CASE WHEN ? THEN coalesce(min(wake_ms, ?), wake_ms, ?) END, {_NO_MARK} {_FENCE}"""
WAKE: Final = "UPDATE runs SET wake_ms = ? WHERE run = ?"
ENQUEUE: Final = """UPDATE runs SET status = 'QUEUED', lease_until_ms = NULL, wake_ms = ?, priority = ?, queue_key = ?,
    expires_ms = ? WHERE run = ?"""
_FREE: Final = (
    f"(claim_until_ms IS NULL OR claim_until_ms NOT BETWEEN :clock AND :clock + {1000 * MAX_CLAIM_SECONDS})"
)
_CANDIDATE: Final = "run, run_id, pipeline, priority, wake_ms, queue_key"
# :versions is a list, with a line break around each; see ``_versions_value()``.
_SERVED: Final = "instr(:versions, char(10) || version || char(10)) > 0"
_NOT_BLOCKED: Final = "blocked_since_ms IS NULL"
_BLOCK_OVER: Final = "(blocked_until_ms <= :now OR instr(blocked_codes, :code) = 0)"
STOPPED: Final = f"""SELECT {_CANDIDATE} FROM runs INDEXED BY runs_by_wake WHERE pipeline = :pipeline AND wake_ms <= :now
    AND status IN ('SUSPENDED', 'INTERRUPTED') AND {_NOT_BLOCKED} AND {_SERVED} AND {_FREE} ORDER BY wake_ms LIMIT :limit"""
BLOCKED: Final = f"""SELECT {_CANDIDATE} FROM runs INDEXED BY runs_by_block WHERE pipeline = :pipeline
    AND blocked_since_ms IS NOT NULL AND {_BLOCK_OVER} AND status IN ('SUSPENDED', 'INTERRUPTED', 'QUEUED')
    AND wake_ms <= :now AND {_SERVED} AND {_FREE} ORDER BY blocked_since_ms LIMIT :limit"""
# Without keys, the rows come from the index in order.
QUEUED: Final = f"""SELECT {_CANDIDATE} FROM runs INDEXED BY runs_by_queue WHERE pipeline = :pipeline AND status = 'QUEUED' AND queue_key IS NULL
    AND wake_ms <= :now AND {_NOT_BLOCKED} AND {_SERVED} AND {_FREE} ORDER BY priority, wake_ms, run LIMIT :limit"""
QUEUED_BY_KEY: Final = f"""SELECT {_CANDIDATE} FROM (SELECT *, row_number() OVER (PARTITION BY queue_key
    ORDER BY priority, wake_ms, run) AS place FROM runs INDEXED BY runs_by_key WHERE pipeline = :pipeline AND status = 'QUEUED'
    AND queue_key IS NOT NULL AND wake_ms <= :now AND {_NOT_BLOCKED} AND {_SERVED} AND {_FREE}) WHERE place <= :limit ORDER BY run"""
# Each part is one scan of an index.
QUEUE_FIGURES: Final = f"""SELECT sum(queued), min(due_ms), sum(blocked), min(since_ms) FROM (
    SELECT count(*) AS queued, min(CASE WHEN wake_ms <= :now THEN wake_ms END) AS due_ms, 0 AS blocked, NULL AS since_ms
    FROM runs INDEXED BY runs_by_queue WHERE pipeline = :pipeline AND status = 'QUEUED' AND queue_key IS NULL
    AND {_NOT_BLOCKED} AND {_SERVED}
    UNION ALL SELECT count(*), min(CASE WHEN wake_ms <= :now THEN wake_ms END), 0, NULL
    FROM runs INDEXED BY runs_by_key WHERE pipeline = :pipeline AND status = 'QUEUED' AND queue_key IS NOT NULL
    AND {_NOT_BLOCKED} AND {_SERVED}
    UNION ALL SELECT 0, (SELECT wake_ms FROM runs INDEXED BY runs_by_wake WHERE pipeline = :pipeline
    AND status IN ('SUSPENDED', 'INTERRUPTED') AND {_NOT_BLOCKED} AND wake_ms <= :now AND wake_ms > {MESSAGE_SENT}
    AND {_SERVED} ORDER BY wake_ms LIMIT 1), 0, NULL
    UNION ALL SELECT 0, NULL, count(*), min(blocked_since_ms) FROM runs INDEXED BY runs_by_block
    WHERE pipeline = :pipeline AND blocked_since_ms IS NOT NULL AND {_SERVED})"""
_RUNNING: Final = f"""SELECT run, run_id, pipeline, priority, queue_key, lease_owner, lease_until_ms, {_FREE}, claim FROM runs
    WHERE status = 'RUNNING' AND pipeline = :pipeline AND execution > 0"""
RUNNING: Final = f"{_RUNNING} ORDER BY started_ms"
SERVED_RUNNING: Final = f"{_RUNNING} AND {_SERVED} AND ({_NOT_BLOCKED} OR {_BLOCK_OVER}) ORDER BY started_ms"
CLAIMED: Final = f"""SELECT queue_key, count(*) FROM runs WHERE pipeline = :pipeline AND claim_until_ms IS NOT NULL
    AND NOT {_FREE} AND status <> 'RUNNING' GROUP BY queue_key"""
INPUTS: Final = """SELECT r.run, i.input, i.sha256 FROM runs r JOIN inputs i ON i.run = r.run AND i.execution = r.execution
    WHERE r.run IN (%s)"""
KEEP_CLAIM: Final = "UPDATE runs SET claim = ?, claim_until_ms = ? WHERE run = ?"
STATUSES: Final = "SELECT run_id, status FROM runs WHERE execution > 0 AND run_id IN (%s)"
RENEW: Final = f"UPDATE runs SET lease_until_ms = ? {_FENCE} AND lease_until_ms IS NOT NULL"
TAG: Final = """INSERT INTO tags (run, tag, started_ms) SELECT run, ?, started_ms FROM runs WHERE run = ?
    ON CONFLICT DO NOTHING"""
UNTAG: Final = "DELETE FROM tags WHERE run = ?"
# For a day, a session of a deleted run gets the error that it was deleted; after that, that it was lost.
DELETED: Final = "INSERT OR REPLACE INTO deleted (run, deleted_ms) SELECT run, ? FROM runs WHERE run_id = ?"
FORGET_DELETED: Final = "DELETE FROM deleted WHERE deleted_ms < ?"
APPEND_EVENTS: Final = """INSERT OR IGNORE INTO events (run, execution, epoch, last, written_ms, data)
    SELECT run, execution, ?, ?, ?, ? FROM runs WHERE run = ? AND execution = ?"""
EVENTS: Final = """SELECT epoch, last, data FROM events WHERE run = ? AND (epoch, last) > (?, ?) AND execution = ?
    ORDER BY epoch, last LIMIT ?"""
TRIM_EVENTS: Final = """DELETE FROM events WHERE run = :run AND (epoch, last) <= (SELECT epoch, last FROM events
    WHERE run = :run ORDER BY epoch DESC, last DESC LIMIT 1 OFFSET :most)"""
EXPIRE_EVENTS: Final = """DELETE FROM events WHERE id IN (SELECT id FROM events ORDER BY id LIMIT 1000)
    AND written_ms < ?"""
DISCARD_EVENTS: Final = "DELETE FROM events WHERE run = ?"
DELETE: Final = (
    "DELETE FROM events WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM tags WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM steps WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM inputs WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM attempts WHERE run = (SELECT run FROM runs WHERE run_id = ?)",
    "DELETE FROM runs WHERE run_id = ?",
)
ATTEMPTS: Final = """SELECT a.position, a.started_ns, a.branch, a.attempt, a.node_id, a.duration_ns, a.outcome,
    a.failure_class, a.message, a.reason, a.tokens, a.output_tokens, a.cost_pico, a.model, a.function_ns, a.group_id, a.identity, a.error_type,
    s.contract, s.schema_ref, s.output, s.sha256, s.number, s.input_key FROM attempts a
    LEFT JOIN steps s ON s.run = a.run AND s.execution = a.execution AND s.position = a.position
    AND s.branch = a.branch AND s.epoch = a.epoch AND s.attempt = a.attempt AND s.started_ns = a.started_ns
    WHERE a.run = ? AND a.execution = ? ORDER BY a.epoch, a.position, a.started_ns, a.branch, a.attempt"""
# In the order of the key; a page begins after the end of the previous one.
_WITH_SIZE: Final = """SELECT a.position, a.started_ns, a.branch, a.attempt, a.node_id, a.duration_ns, a.outcome,
    a.failure_class, a.message, a.reason, a.tokens, a.output_tokens, a.cost_pico, a.model, a.function_ns, a.group_id, a.identity, a.error_type, a.epoch,
    (SELECT length(s.output) FROM steps s WHERE s.run = a.run AND s.execution = a.execution AND s.position = a.position
    AND s.branch = a.branch AND s.epoch = a.epoch AND s.attempt = a.attempt AND s.started_ns = a.started_ns)
    FROM attempts a WHERE a.run = ? AND a.execution = ?"""
_IN_ORDER: Final = "ORDER BY a.epoch, a.position, a.started_ns, a.branch, a.attempt"
ATTEMPT_PAGE: Final = f"""{_WITH_SIZE} AND (a.epoch, a.position, a.started_ns, a.branch, a.attempt) > (?, ?, ?, ?, ?)
    {_IN_ORDER} LIMIT ?"""
ATTEMPTS_AT: Final = f"{_WITH_SIZE} AND a.position = ? AND a.branch = ? {_IN_ORDER}"
STEP_AT: Final = """SELECT position, branch, node_id, contract, schema_ref, output, sha256, number, input_key FROM steps
    WHERE run = ? AND execution = ? AND position = ? AND branch = ?"""
# In the order of the index `failed`.
FAILED: Final = """SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class, message,
    reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type FROM attempts WHERE run = ? AND execution = ?
    AND failure_class IS NOT NULL ORDER BY started_ns + duration_ns DESC LIMIT ?"""
FAILED_SINCE: Final = """SELECT position, started_ns, branch, attempt, node_id, duration_ns, outcome, failure_class, message,
    reason, tokens, output_tokens, cost_pico, model, function_ns, group_id, identity, error_type FROM attempts WHERE run = ? AND execution = ? AND epoch >= ?
    AND failure_class IS NOT NULL ORDER BY started_ns + duration_ns DESC LIMIT 1000"""
# Uses the index `called`, which has no rows of pipelines.
IDENTITIES: Final = """SELECT DISTINCT identity, position FROM attempts
    WHERE run = ? AND execution = ? AND identity IS NOT NULL"""
PARENTS: Final = (
    f"SELECT node_id FROM steps WHERE run = ? AND execution = 0 AND position = {Annotation.PARENT}"
)
WITH_REQUESTS: Final = f"SELECT run FROM steps WHERE position = {Annotation.REQUEST}"
# Ids with a prefix: a range of the index. LIKE would interpret wildcards and ignore case.
BY_PREFIX: Final = """SELECT run_id FROM runs WHERE execution > 0 AND run_id >= ? AND run_id < ?
    AND substr(run_id, 1, ?) = ? ORDER BY run_id = ? DESC, started_ms DESC, run DESC LIMIT ?"""
COUNT_WITH_PREFIX: Final = (
    "SELECT count(*) FROM (SELECT 1 FROM runs WHERE run_id >= ? AND run_id < ? LIMIT ?)"
)
NEWEST_OF_MANY: Final = """SELECT run_id FROM runs INDEXED BY runs_by_start WHERE execution > 0 AND substr(run_id, 1, ?) = ?
    AND run_id != ? ORDER BY started_ms DESC, run DESC LIMIT ?"""
