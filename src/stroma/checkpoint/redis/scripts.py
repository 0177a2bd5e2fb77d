"""The Lua script that runs in the Redis server: one script, which is loaded completely or not at all.

``EVALSHA sha 1 PREFIX operation arguments...``; every operation is one atomic step. Every operation is
idempotent: after a lost reply the same command is sent again. Redis does not roll back a failed script, so
everything that can fail (no memory, a read-only replica, a sum that overflows) fails at the first write. The
reads and writes of an operation of a store are one step too: ``transact`` checks that the runs it has read
are unchanged, and writes nothing if one of them has changed.

The keys of a run, under its prefix ``stroma:{<id, percent-encoded>}:``

    run            hash: the row of the run. Besides the fields of a RunRow: token, which distinguishes runs
                   of one id; writes and annotated, the numbers of writes of sessions and of changes of
                   annotations; tx, the last transaction that read it before it wrote
    inputs         hash: execution -> input
    steps:E        hash: "position:branch" -> output
    nodes:E        hash: "position:branch" -> number of the commit, and its NodeFacts
    attempts:E     hash: "epoch:position:start:attempt:branch" -> attempt
    failed:E       list: the fields in attempts:E of the last failed attempts, the latest first
    identities:E   hash: identity of a step of plain code -> position
    annotations:P  hash: branch -> annotation, for each kind of Annotation except states from save()
    events         stream: "epoch-last" -> a batch of events of the last execution
    saved          hash: node id -> "order until", a newline, and the state from save()

Of all runs:

    stroma:format              number of the format, from the first run on; states from save() have none
    stroma:runs, stroma:ids    zset: id by start; id, for prefixes
    stroma:ended               zset: id by when its keys expire. A run without keys that is in the first but
                               not in this one has lost them
    stroma:live:<pipeline>     zset: id by the end of its lease or claim
    stroma:cell:<name, percent-encoded>  hash: data of a cell, number and maker of its last change

Of a lane, which is a pipeline and a version:

    stroma:due:<lane>          zset: id by when a worker may continue it: the end of its lease, or wake_ms
    stroma:later:<lane>        zset: id of a queued run by its due time, until it is due
    stroma:queue:<queue_of()>  zset for each key of queued runs that are due: "due order:id" by priority
    stroma:queuekeys:<lane>    set: the keys of queued runs that are due
    stroma:expires:<lane>      zset: id of a queued run by its latest start
    stroma:blocked:<lane>      zset: id by the start of its mark; these runs are in none of the others
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from stroma.checkpoint.durable.rows import Annotation
from stroma.checkpoint.redis.format import (
    EXECUTION_KEYS,
    FORMAT,
    FORMAT_KEY,
    RUN_KEYS,
    annotations_key,
)
from stroma.checkpoint.redis.script_records import RECORDS
from stroma.checkpoint.redis.script_sessions import SESSIONS

RUNS: Final = "stroma:runs"
IDS: Final = "stroma:ids"


def _lua_list(texts: Iterable[str]) -> str:
    return "{" + ", ".join(f"'{text}'" for text in texts) + "}"


# Made from the lists in Python, so that a new kind of record expires and is deleted like all others.
_NAMES: Final = f"""
local RUN_KEYS, EXECUTION_KEYS = {_lua_list(RUN_KEYS)}, {_lua_list(EXECUTION_KEYS)}
local function note_format() redis.call('SETNX', '{FORMAT_KEY}', {FORMAT}) end
local SAVED = '{annotations_key(Annotation.SAVED)}'
"""

_COMMON: Final = r"""
local p, op = KEYS[1], ARGV[1]
local run = p .. 'run'
local RUNS, IDS, ENDED, DUE = 'stroma:runs', 'stroma:ids', 'stroma:ended', 'stroma:due:'
local LIVE, QUEUE, QUEUE_KEYS, BLOCKED = 'stroma:live:', 'stroma:queue:', 'stroma:queuekeys:',
    'stroma:blocked:'
local LATER, EXPIRES = 'stroma:later:', 'stroma:expires:'

local function now_us()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

local function now_ms() return math.floor(now_us() / 1000) end

-- Returns fields of a hash by their names, false for missing ones.
local function fields(key, ...)
  local values, result = redis.call('HMGET', key, ...), {}
  for i, name in ipairs({...}) do result[name] = values[i] end
  return result
end

local function keys_of(executions)
  local keys = {}
  for _, name in ipairs(RUN_KEYS) do keys[#keys + 1] = p .. name end
  for e = 1, executions do
    for _, name in ipairs(EXECUTION_KEYS) do keys[#keys + 1] = p .. name .. ':' .. e end
  end
  return keys
end

-- Removes the expiry of a run.
local function persist(executions)
  if redis.call('PTTL', run) >= 0 then
    for _, key in ipairs(keys_of(executions)) do redis.call('PERSIST', key) end
  end
end

-- Returns true if an execution has all rows that its run counts: eviction may remove any key.
local function is_complete(e)
  local f = fields(run, 'commit_count', 'attempt_count', 'identities')
  local function has(name, rows) return redis.call('HLEN', p .. name .. ':' .. e) == tonumber(rows or 0) end
  return has('steps', f.commit_count) and has('nodes', f.commit_count) and has('attempts', f.attempt_count)
    and has('identities', f.identities) and redis.call('EXISTS', p .. 'inputs') == 1
end

-- Returns the reason why a session may not write; nil if it may.
local function fence_problem(token, epoch, owner, acknowledged)
  local f = fields(run, 'token', 'epoch', 'owner', 'writes')
  if not f.token then return 'lost' end
  if f.token ~= token then return 'fenced' end
  if tonumber(f.epoch) < tonumber(epoch) then return 'lost' end
  if f.epoch ~= epoch or f.owner ~= owner then return 'fenced' end
  if tonumber(f.writes) < tonumber(acknowledged) then return 'lost' end
  return nil
end

-- Removes expired runs from the lists, a few at a time.
local function sweep(limit)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', ENDED, '-inf', '(' .. now_ms(), 'LIMIT', 0, limit)) do
    redis.call('ZREM', RUNS, id)
    redis.call('ZREM', IDS, id)
    redis.call('ZREM', ENDED, id)
  end
end

-- Returns the prefix of the keys of a run.
local function prefix_of(id)
  local name = string.gsub(id, '[^%w_.~-]', function(c) return string.format('%%%02X', string.byte(c)) end)
  return 'stroma:{' .. name .. '}:'
end

-- Returns the lane of a pipeline and a version, '' for runs without one. No NUL is in a name.
local function lane_of(pipeline, version) return version == '' and pipeline or pipeline .. '\0' .. version end

-- Returns the lane of the run.
local function lane()
  local f = fields(run, 'pipeline', 'version')
  return lane_of(f.pipeline or '', f.version or '')
end

-- Returns the key of the queue of a lane for runs of one key; '': for runs without a key.
local function queue_of(lane, key) return QUEUE .. #lane .. ':' .. lane .. ':' .. key end

local function leave_queue(id)
  local f, place = fields(run, 'queued', 'key'), lane()
  redis.call('ZREM', LATER .. place, id)
  redis.call('ZREM', EXPIRES .. place, id)
  if not f.queued then return end
  local key = f.key or ''
  local queue = queue_of(place, key)
  redis.call('ZREM', queue, f.queued)
  redis.call('HDEL', run, 'queued')
  if key ~= '' and redis.call('EXISTS', queue) == 0 then redis.call('SREM', QUEUE_KEYS .. place, key) end
end

-- Wakes workers that listen.
local function report_news() redis.call('PUBLISH', 'stroma:news', '') end

-- Adds a run that is due to the queue of its key.
local function join_due(place, id, f)
  local key, member = f.key or '', string.format('%015.0f %018.0f:', f.wake_ms, f.order) .. id
  redis.call('ZADD', queue_of(place, key), f.priority, member)
  redis.call('HSET', prefix_of(id) .. 'run', 'queued', member)
  if key ~= '' then redis.call('SADD', QUEUE_KEYS .. place, key) end
end

local function join_queue(id, due)
  leave_queue(id)
  redis.call('HSET', run, 'wake_ms', due)
  local f, place = fields(run, 'key', 'priority', 'order', 'wake_ms', 'expires_ms'), lane()
  if f.expires_ms then redis.call('ZADD', EXPIRES .. place, f.expires_ms, id) end
  if tonumber(due) > now_ms() then redis.call('ZADD', LATER .. place, due, id) else join_due(place, id, f) end
  report_news()
end

-- Stores from when on a worker may continue a run that stopped; '': never by itself.
local function set_wake(id, wake)
  if wake == '' then
    redis.call('HDEL', run, 'wake_ms')
    redis.call('ZREM', DUE .. lane(), id)
  elseif redis.call('HEXISTS', run, 'blocked') == 1 then redis.call('HSET', run, 'wake_ms', wake)
  elseif redis.call('HGET', run, 'status') == 'QUEUED' then join_queue(id, wake)
  else
    redis.call('HSET', run, 'wake_ms', wake)
    redis.call('ZADD', DUE .. lane(), wake, id)
  end
end

-- Deletes the mark of a blocked run, and returns true if it had one.
local function unblock(id)
  redis.call('ZREM', BLOCKED .. lane(), id)
  return redis.call('HDEL', run, 'blocked', 'blocked_since_ms', 'blocked_until_ms', 'blocked_codes') > 0
end

-- Records until when a run has an owner or a claim.
local function set_live(id, pipeline, until_ms)
  redis.call('ZADD', LIVE .. pipeline, until_ms, id)
end

-- Ends the claim of a run, its place in the queue, and its mark.
local function leave_queues(id)
  leave_queue(id)
  unblock(id)
  redis.call('HDEL', run, 'claim', 'claim_until')
  redis.call('ZREM', LIVE .. (redis.call('HGET', run, 'pipeline') or ''), id)
end

local ops = {}
"""

_DISPATCH: Final = r"""
-- Performs several operations, none if a run has changed. ARGV: the name of the transaction, the runs that
-- must be unchanged (prefix, token, writes, annotated), and for each operation its length, prefix, name and
-- values. The replies end with the first refusal, which undoes no operation before it, see Rows. A
-- repeated transaction finds its name and skips the checks; each of its operations finds its earlier changes.
local function transact()
  local tx, checks, at, replies = ARGV[2], cjson.decode(ARGV[3]), 4, {}
  for _, check in ipairs(checks) do
    local f = fields(check.prefix .. 'run', 'token', 'writes', 'annotated', 'tx')
    if f.tx ~= tx and ((f.token or '') ~= check.token or (f.writes or '') ~= check.writes
        or (f.annotated or '') ~= check.annotated) then return 'changed' end
  end
  -- Checks the cells before the first write, since a commit that belongs to a change of a cell comes earlier.
  local step = at
  while step <= #ARGV do
    if ARGV[step + 2] == 'write_cell' then
      local cell, number, maker = ARGV[step + 1], ARGV[step + 3], ARGV[step + 4]
      local f = fields(cell, 'number', 'maker')
      if f.maker ~= maker and (f.number or '') ~= number then return 'changed' end
    end
    step = step + ARGV[step] + 1
  end
  while at <= #ARGV do
    local last = at + ARGV[at]
    p = ARGV[at + 1]
    run = p .. 'run'
    local reply = ops[ARGV[at + 2]](unpack(ARGV, at + 3, last))
    if type(reply) == 'table' and reply.err then return reply end
    replies[#replies + 1] = reply
    if type(reply) == 'string' then return replies end
    at = last + 1
  end
  for _, check in ipairs(checks) do
    local read = check.prefix .. 'run'
    if redis.call('EXISTS', read) == 1 then redis.call('HSET', read, 'tx', tx) end
  end
  return replies
end

if op == 'transact' then return transact() end
return ops[op](unpack(ARGV, 2))
"""

SCRIPT: Final = _NAMES + _COMMON + SESSIONS + RECORDS + _DISPATCH
SHA: Final = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
