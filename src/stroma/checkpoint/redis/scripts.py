"""The Lua script that runs in the Redis server: one script, which is loaded completely or not at all.

``EVALSHA sha 1 PREFIX operation arguments...``; every operation is one atomic step. Every operation is
idempotent, or performed by ``transact``, which is: after a lost reply the same command is sent again. Redis
does not roll back a failed script, so everything that can fail (no memory, a read-only replica, a sum that
overflows) fails at the first write. The reads and writes of an operation of a store are one step too:
``transact`` checks that the runs it has read are unchanged, and writes nothing if one of them has changed.

The keys of a run, under its prefix ``stroma:{<id, percent-encoded>}:``

    run            hash: the row of the run. Besides the fields of a RunRow: token, which distinguishes runs
                   of one id; writes and changes, the numbers of writes of sessions and of other changes of
                   the row and of annotations; tx, the last transaction that read it before it wrote, and its
                   replies; queued, its member in a queue
    steps:E        hash: "position:branch" -> output
    attempts:E     hash: "epoch:position:start:attempt:branch" -> number of its commit, size of its output (0
                   without one), attempt
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
    stroma:blocked:<lane>      zset: id by the start of its mark; these runs are in none of the others
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from stroma.checkpoint.durable.rows import Annotation
from stroma.checkpoint.redis.format import EXECUTION_KEYS, FORMAT, FORMAT_KEY, RUN_KEYS, annotations_key
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
local SAVED, INPUT = '{annotations_key(Annotation.SAVED)}', '{annotations_key(Annotation.INPUT)}'
"""

_COMMON: Final = r"""
local p, op = KEYS[1], ARGV[1]
local run = p .. 'run'
local RUNS, IDS, ENDED, DUE = 'stroma:runs', 'stroma:ids', 'stroma:ended', 'stroma:due:'
local LIVE, QUEUE, QUEUE_KEYS, BLOCKED = 'stroma:live:', 'stroma:queue:', 'stroma:queuekeys:',
    'stroma:blocked:'
local LATER = 'stroma:later:'

-- One time for all of a step: the start of a run is its place in the list of all runs.
local time
local function now_us()
  time = time or redis.call('TIME')
  return time[1] * 1000000 + time[2]
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
  return has('steps', f.commit_count) and has('attempts', f.attempt_count)
    and has('identities', f.identities) and redis.call('EXISTS', p .. INPUT) == 1
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

-- Returns the key of the queue of a lane for runs of one key; '': for runs without a key.
local function queue_of(lane, key) return QUEUE .. #lane .. ':' .. lane .. ':' .. key end

local function number(value) return tonumber(value or 0) or 0 end

-- The lists that a run is in follow from its row. Removes it from all of them, by the row as it is.
local function unlist(id)
  local f = fields(run, 'pipeline', 'version', 'key', 'queued')
  if not f.pipeline then return end
  local place, key = lane_of(f.pipeline, f.version or ''), f.key or ''
  for _, list in ipairs({DUE, LATER, BLOCKED}) do redis.call('ZREM', list .. place, id) end
  redis.call('ZREM', LIVE .. f.pipeline, id)
  if not f.queued then return end
  redis.call('ZREM', queue_of(place, key), f.queued)
  redis.call('HDEL', run, 'queued')
  if redis.call('EXISTS', queue_of(place, key)) == 0 then redis.call('SREM', QUEUE_KEYS .. place, key) end
end

-- Adds a run that is in no list to those that its row says. A queued run that is due at this time is in the
-- queue of its key.
local function list(id, now)
  local f = fields(run, 'pipeline', 'version', 'status', 'key', 'priority', 'order', 'wake_ms', 'until_ms',
      'claim', 'claim_until_ms', 'blocked_since_ms')
  if not f.pipeline then return end
  local place, is_running = lane_of(f.pipeline, f.version or ''), f.status == 'RUNNING'
  local live = math.max(is_running and number(f.until_ms) or 0, f.claim and number(f.claim_until_ms) or 0)
  if live > 0 then redis.call('ZADD', LIVE .. f.pipeline, live, id) end
  if f.blocked_since_ms then redis.call('ZADD', BLOCKED .. place, f.blocked_since_ms, id)
  elseif is_running then redis.call('ZADD', DUE .. place, number(f.until_ms), id)
  elseif f.wake_ms and (f.status == 'SUSPENDED' or f.status == 'INTERRUPTED') then
    redis.call('ZADD', DUE .. place, f.wake_ms, id)
  elseif f.wake_ms and f.status == 'QUEUED' then
    if number(f.wake_ms) > now then return redis.call('ZADD', LATER .. place, f.wake_ms, id) end
    local key, member = f.key or '', string.format('%015.0f %018.0f:', f.wake_ms, f.order) .. id
    redis.call('ZADD', queue_of(place, key), f.priority, member)
    redis.call('HSET', run, 'queued', member)
    if key ~= '' then redis.call('SADD', QUEUE_KEYS .. place, key) end
  end
end

-- Changes fields of the run, given as names and values, and with them its lists. The value '' deletes a
-- field; '+5' in a field of a time is the time in 5 ms.
local function change(id, ...)
  local values, ms = {...}, now_ms()
  unlist(id)
  for at = 1, #values, 2 do
    local name, value = values[at], values[at + 1]
    local delay = string.match(name, '_ms$') and string.match(value, '^%+(.+)$')
    if value == '' then redis.call('HDEL', run, name)
    else redis.call('HSET', run, name, delay and ms + delay or value) end
  end
  list(id, ms)
end

local ops = {}
"""

_DISPATCH: Final = r"""
-- Performs several operations, none if a run has changed. ARGV: the name of the transaction, the runs that
-- must be unchanged (prefix, token, writes, changes), and for each operation its length, prefix, name and
-- values. The replies end with the first refusal, which undoes no operation before it, see Rows. The name and
-- the replies are stored with these runs, where a repeated transaction finds them.
local function transact()
  local tx, checks, at, replies = ARGV[2], cjson.decode(ARGV[3]), 4, {}
  for _, check in ipairs(checks) do
    local prefix, token, writes, changes = unpack(check)
    local f = fields(prefix .. 'run', 'token', 'writes', 'changes', 'tx')
    if f.tx and string.sub(f.tx, 1, #tx) == tx then return cjson.decode(string.sub(f.tx, #tx + 1)) end
    if (f.token or '') ~= token or (f.writes or '') ~= writes or (f.changes or '') ~= changes then
      return 'changed'
    end
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
    local read = check[1] .. 'run'
    if redis.call('EXISTS', read) == 1 then redis.call('HSET', read, 'tx', tx .. cjson.encode(replies)) end
  end
  return replies
end

if op == 'transact' then return transact() end
return ops[op](unpack(ARGV, 2))
"""

SCRIPT: Final = _NAMES + _COMMON + SESSIONS + RECORDS + _DISPATCH
SHA: Final = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
