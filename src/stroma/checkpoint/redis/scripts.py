"""The Lua script that runs inside the Redis server; one script, so that it is complete or absent.

``EVALSHA sha 1 PREFIX operation arguments...``; every operation is one atomic step. Sent again, each changes nothing:
a reply that was lost is asked for by sending the same once more. A script that fails is not undone by Redis, so
whatever can fail (no memory, a read-only replica, a sum that overflows) fails at the first write. What an operation of a
store reads and then writes is one step too: `together` compares the runs that it has read with what is there, and writes
nothing if one of them has changed.

The keys of a run, under its prefix ``stroma:{<id, percent-encoded>}:``

    run           hash: the row of the run. token tells it from another run of the same id; version is raised by every
                  write of a session, beside by every change beside its commits; kept, tried and calls are how many
                  commits, attempts and identities there must be; tx is the last transaction that read it before it wrote
    inputs        hash: execution -> input
    steps:E       hash: "position:branch" -> output
    nodes:E       hash: "position:branch" -> "order node id", which says what is newest without reading outputs
    attempts:E    hash: "epoch:position:start:attempt:branch" -> attempt
    called:E      hash: identity of a step of plain code -> position
    failed:E      list: the fields in attempts:E of the last of them that failed, the last one first
    beside:P      hash: branch -> what is kept at a position below -1
    saved         hash: node id -> "order until\\n" and what save() kept
    gone:TOKEN    says, for a while, that the run was deleted: it did not get lost

and of all runs: stroma:runs (zset: id by start), stroma:ids (zset: id, for prefixes), stroma:ended (zset: id by when its
keys expire). An id that stands in the first but not in the last one has lost its keys. Beside all runs: a hash
stroma:cell:<name, percent-encoded> for each cell, with its data, and the number and the maker of its last change.
"""

from __future__ import annotations

import hashlib
from typing import Final

__all__ = ["IDS", "RUNS", "SCRIPT", "SHA", "TOMBSTONE_SECONDS"]

RUNS: Final = "stroma:runs"
IDS: Final = "stroma:ids"

#: How long a session that comes too late is told that its run was deleted; after that it is told that it was lost.
TOMBSTONE_SECONDS: Final = 24 * 3600

SCRIPT: Final = r"""
local p, op = KEYS[1], ARGV[1]
local run = p .. 'run'
local MOST = 100000  -- executions of a run: a damaged row may count any number
local RUNS, IDS, ENDED = 'stroma:runs', 'stroma:ids', 'stroma:ended'

local function now_us()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

local function now_ms() return math.floor(now_us() / 1000) end

local function keys_of(executions)
  local keys = {run, p .. 'inputs'}
  for place = 2, 9 do keys[#keys + 1] = p .. 'beside:-' .. place end
  for e = 1, math.min(executions, MOST) do
    for _, name in ipairs({'steps:', 'nodes:', 'attempts:', 'failed:', 'called:'}) do keys[#keys + 1] = p .. name .. e end
  end
  return keys
end

local function live(executions)
  if redis.call('PTTL', run) >= 0 then
    for _, key in ipairs(keys_of(executions)) do redis.call('PERSIST', key) end
  end
end

-- Whether an execution has all the rows that its run counts: eviction takes any key.
local function whole(e)
  local f = redis.call('HMGET', run, 'kept', 'tried', 'calls')
  local kept, tried, calls = tonumber(f[1]), tonumber(f[2]), tonumber(f[3] or 0)
  return redis.call('HLEN', p .. 'steps:' .. e) == kept and redis.call('HLEN', p .. 'nodes:' .. e) == kept
    and redis.call('HLEN', p .. 'attempts:' .. e) == tried and redis.call('HLEN', p .. 'called:' .. e) == calls
    and redis.call('EXISTS', p .. 'inputs') == 1
end

-- Why a session may not write; nil if it may.
local function fenced(token, epoch, owner, seen)
  local f = redis.call('HMGET', run, 'token', 'epoch', 'owner', 'version')
  if not f[1] then return redis.call('EXISTS', p .. 'gone:' .. token) == 1 and 'deleted' or 'lost' end
  if f[1] ~= token then return 'fenced' end
  if tonumber(f[2]) < tonumber(epoch) then return 'lost' end
  if f[2] ~= epoch or f[3] ~= owner then return 'fenced' end
  if tonumber(f[4]) < tonumber(seen) then return 'lost' end
  return nil
end

-- Drop what expired from the lists, a few at a time.
local function sweep(most)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', ENDED, '-inf', '(' .. now_ms(), 'LIMIT', 0, most)) do
    redis.call('ZREM', RUNS, id)
    redis.call('ZREM', IDS, id)
    redis.call('ZREM', ENDED, id)
  end
end

local ops = {}

function ops.find(id)
  local f = redis.call('HGETALL', run)
  if #f == 0 then
    -- All keys of a run expire at the same moment: what is left of one, or still listed, says that the rest got lost.
    if redis.call('EXISTS', p .. 'inputs', p .. 'attempts:1', p .. 'nodes:1', p .. 'steps:1') > 0 then return 'lost' end
    local listed = redis.call('ZSCORE', RUNS, id) or redis.call('ZSCORE', IDS, id)
    if listed and not redis.call('ZSCORE', ENDED, id) then return 'lost' end
    return false
  end
  return {now_ms(), f, redis.call('EXISTS', p .. 'beside:-4')}
end

-- A JSON list of texts, and those of another one that it lacks.
local function together(kept, more)
  local list, has = cjson.decode(kept), {}
  for _, tag in ipairs(list) do has[tag] = true end
  for _, tag in ipairs(cjson.decode(more)) do
    if not has[tag] then list[#list + 1] = tag end
  end
  return cjson.encode(list)
end

function ops.begin(id, old_token, old_epoch, old_version, old_beside, owner, token, execution, epoch, pipeline, lease, input, tags)
  local f = redis.call('HMGET', run, 'token', 'epoch', 'version', 'owner', 'beside')
  if f[4] == owner then return tonumber(f[3]) end
  if (f[1] or '') ~= old_token then return 'changed' end
  if f[1] and (f[2] ~= old_epoch or f[3] ~= old_version or (f[5] or '') ~= old_beside) then return 'changed' end
  local us = now_us()
  local ms = math.floor(us / 1000)
  local version = (f[3] or 0) + 1
  redis.call('HSET', run, 'token', token, 'run_id', id, 'pipeline', pipeline, 'execution', execution,
    'status', 'RUNNING', 'started_ms', ms, 'updated_ms', ms, 'tokens', 0, 'cost_pico', 0, 'latency_ns', 0,
    'owner', owner, 'epoch', epoch, 'until_ms', ms + lease, 'nodes', 0, 'kept', 0, 'tried', 0, 'calls', 0, 'version', version)
  redis.call('HDEL', run, 'error', 'tags')
  if tags ~= '' then redis.call('HSET', run, 'tags', tags) end
  if not f[1] then
    redis.call('HSET', run, 'order', us)
    -- What eviction left of an earlier run of this id is none of ours.
    for _, key in ipairs(keys_of(0)) do if key ~= run then redis.call('DEL', key) end end
  end
  for _, name in ipairs({'steps:', 'nodes:', 'attempts:', 'failed:', 'called:'}) do redis.call('DEL', p .. name .. execution) end
  redis.call('HSET', p .. 'inputs', execution, input)
  live(tonumber(execution))
  redis.call('ZADD', RUNS, us, id)
  redis.call('ZADD', IDS, 0, id)
  redis.call('ZREM', ENDED, id)
  sweep(10)
  return version
end

function ops.go_on(id, token, old_epoch, old_version, old_beside, owner, execution, epoch, lease, discard, tags)
  local f = redis.call('HMGET', run, 'token', 'epoch', 'version', 'owner', 'beside')
  if f[4] == owner then return tonumber(f[3]) end
  if f[1] ~= token or f[2] ~= old_epoch or f[3] ~= old_version or (f[5] or '') ~= old_beside then return 'changed' end
  if not whole(execution) then return 'lost' end
  local ms = now_ms()
  local version = f[3] + 1
  redis.call('HSET', run, 'status', 'RUNNING', 'owner', owner, 'epoch', epoch, 'until_ms', ms + lease,
    'updated_ms', ms, 'version', version)
  redis.call('HDEL', run, 'error')
  if tags ~= '' then redis.call('HSET', run, 'tags', together(redis.call('HGET', run, 'tags') or '[]', tags)) end
  if discard ~= '' then
    local steps, nodes, kept, top = p .. 'steps:' .. execution, p .. 'nodes:' .. execution, 0, 0
    for _, field in ipairs(redis.call('HKEYS', nodes)) do
      if tonumber(string.match(field, '^%d+')) >= tonumber(discard) then
        redis.call('HDEL', steps, field)
        redis.call('HDEL', nodes, field)
      else
        kept = kept + 1
        if string.match(field, '^%d+:$') then top = top + 1 end
      end
    end
    redis.call('HSET', run, 'kept', kept, 'nodes', top)
  end
  live(tonumber(execution))
  redis.call('ZADD', RUNS, 'NX', now_us(), id)
  redis.call('ZADD', IDS, 0, id)
  redis.call('ZREM', ENDED, id)
  return version
end

function ops.commit(token, execution, epoch, owner, seen, lease, at, attempt, cost, tokens, latency, failed, place, node, step, identity, position)
  local attempts = p .. 'attempts:' .. execution
  if redis.call('HGET', run, 'token') == token and redis.call('HEXISTS', attempts, at) == 1 then
    return tonumber(redis.call('HGET', run, 'version'))
  end
  local why = fenced(token, epoch, owner, seen)
  if why then return why end
  if not whole(execution) then return 'lost' end
  local sums = {{'cost_pico', cost}, {'tokens', tokens}, {'latency_ns', latency}}
  for i, sum in ipairs(sums) do
    local reply = sum[2] ~= '0' and redis.pcall('HINCRBY', run, sum[1], sum[2])
    if type(reply) == 'table' and reply.err then
      for j = 1, i - 1 do
        if sums[j][2] ~= '0' then redis.call('HINCRBY', run, sums[j][1], '-' .. sums[j][2]) end
      end
      return reply
    end
  end
  redis.call('HSET', attempts, at, attempt)
  redis.call('HINCRBY', run, 'tried', 1)
  if identity ~= '' and redis.call('HSET', p .. 'called:' .. execution, identity, position) == 1 then
    redis.call('HINCRBY', run, 'calls', 1)
  end
  if failed ~= '' then
    redis.call('LPUSH', p .. 'failed:' .. execution, at)
    redis.call('LTRIM', p .. 'failed:' .. execution, 0, 19)
  end
  if place ~= '' then
    local order = redis.call('HINCRBY', run, 'order', 1)
    redis.call('HSET', p .. 'nodes:' .. execution, place, string.format('%.0f ', order) .. node)
    if redis.call('HSET', p .. 'steps:' .. execution, place, step) == 1 then
      redis.call('HINCRBY', run, 'kept', 1)
      if string.match(place, '^%d+:$') then redis.call('HINCRBY', run, 'nodes', 1) end
    end
  end
  local ms = now_ms()
  redis.call('HSET', run, 'updated_ms', ms)
  if redis.call('HEXISTS', run, 'until_ms') == 1 then redis.call('HSET', run, 'until_ms', ms + lease) end
  return redis.call('HINCRBY', run, 'version', 1)
end

function ops.finish(id, token, execution, epoch, owner, seen, status, error, ttl, updated)
  local why = fenced(token, epoch, owner, seen)
  if why then return why end
  local ms = now_ms()
  redis.call('HSET', run, 'status', status, 'updated_ms', updated ~= '' and updated or ms)
  if error ~= '' then
    redis.call('HSET', run, 'error', string.sub(error, 2))
  else
    redis.call('HDEL', run, 'error')
  end
  redis.call('HDEL', run, 'until_ms')
  local version = redis.call('HINCRBY', run, 'version', 1)
  if ttl ~= '' then
    redis.call('ZADD', ENDED, ms + ttl, id)
    for _, key in ipairs(keys_of(tonumber(execution))) do redis.call('PEXPIREAT', key, ms + ttl) end
  end
  return version
end

function ops.renew(token, epoch, owner, seen, lease)
  local why = fenced(token, epoch, owner, seen)
  if why then return why end
  if redis.call('HEXISTS', run, 'until_ms') == 0 then return tonumber(redis.call('HGET', run, 'version')) end
  redis.call('HSET', run, 'until_ms', now_ms() + lease)
  return redis.call('HINCRBY', run, 'version', 1)
end

-- What is beside the commits changes only while the run is the owner's, where one is named.
function ops.keep(owner, position, branch, value)
  if owner ~= '' and redis.call('HGET', run, 'owner') ~= owner then return 'changed' end
  local left = redis.call('PTTL', run)
  if left == -2 then return 0 end
  redis.call('HINCRBY', run, 'beside', 1)
  redis.call('HSET', p .. 'beside:' .. position, branch, value)
  if left >= 0 then redis.call('PEXPIRE', p .. 'beside:' .. position, left) end
  return 0
end

function ops.drop(owner, position, branch)
  if owner ~= '' and redis.call('HGET', run, 'owner') ~= owner then return 'changed' end
  local gone
  if branch then gone = redis.call('HDEL', p .. 'beside:' .. position, branch)
  else gone = redis.call('DEL', p .. 'beside:' .. position) end
  if gone > 0 and redis.call('EXISTS', run) == 1 then redis.call('HINCRBY', run, 'beside', 1) end
  return 0
end

function ops.save(node, value, ttl)
  local saved, us, expires = p .. 'saved', now_us(), ''
  local left = redis.call('PTTL', saved)
  local order = us
  if redis.call('EXISTS', run) == 1 then order = redis.call('HINCRBY', run, 'order', 1) end
  if ttl ~= '' then expires = string.format('%.0f', math.floor(us / 1000) + ttl) end
  redis.call('HSET', saved, node, string.format('%.0f ', order) .. expires .. '\n' .. value)
  if ttl == '' then redis.call('PERSIST', saved)
  elseif left == -2 or (left >= 0 and left < tonumber(ttl)) then redis.call('PEXPIRE', saved, ttl) end
  return 0
end

function ops.newest(node)
  local saved = redis.call('HGET', p .. 'saved', node)
  local order, place, step = 0, false, false
  local execution = redis.call('HGET', run, 'execution')
  if execution then
    local rows = redis.call('HGETALL', p .. 'nodes:' .. execution)
    for i = 1, #rows, 2 do
      local space = string.find(rows[i + 1], ' ', 1, true)
      if string.sub(rows[i + 1], space + 1) == node then
        local number = tonumber(string.sub(rows[i + 1], 1, space - 1))
        if number > order then order, place = number, rows[i] end
      end
    end
    if place then step = redis.call('HGET', p .. 'steps:' .. execution, place) end
  end
  return {now_ms(), saved, order, place, step, execution}
end

function ops.delete(id, tombstone)
  local f = redis.pcall('HMGET', run, 'token', 'execution')
  if f.err then f = {} end
  local executions = tonumber(f[2] or 0) or 0
  if not (executions >= 0 and executions <= MOST) then executions = 0 end
  while redis.call('EXISTS', p .. 'attempts:' .. (executions + 1), p .. 'steps:' .. (executions + 1)) > 0 do
    executions = executions + 1
  end
  for _, key in ipairs(keys_of(executions)) do redis.call('DEL', key) end
  redis.call('DEL', p .. 'saved')
  redis.call('ZREM', RUNS, id)
  redis.call('ZREM', IDS, id)
  redis.call('ZREM', ENDED, id)
  if f[1] then redis.call('SET', p .. 'gone:' .. f[1], 1, 'PX', tombstone) end
  return 0
end

function ops.cell()
  local f = redis.call('HMGET', p, 'number', 'data')
  return {now_ms(), f[1] or '', f[2]}
end

function ops.put_cell(number, maker, data)
  local f = redis.call('HMGET', p, 'number', 'maker')
  if f[2] == maker then return 0 end
  if (f[1] or '') ~= number then return 'changed' end
  redis.call('HSET', p, 'data', data, 'maker', maker, 'number', (f[1] or 0) + 1)
  return 0
end

-- The last attempts that failed, the last one first; as many of them as are wanted.
local function failures(prefix, execution, most)
  local found = {}
  for _, at in ipairs(redis.call('LRANGE', prefix .. 'failed:' .. execution, 0, most - 1)) do
    local attempt = redis.call('HGET', prefix .. 'attempts:' .. execution, at)
    if attempt then found[#found + 1] = attempt end
  end
  return found
end

function ops.beside(execution, most)
  return {redis.call('HGETALL', p .. 'beside:-4'), redis.call('HGET', run, 'tags'),
    tonumber(most) > 0 and failures(p, execution, tonumber(most)) or {}}
end

-- Every attempt of an execution, and the first line of what each place of it committed: outputs may be large.
function ops.told(execution)
  local heads, key = {}, p .. 'steps:' .. execution
  for _, place in ipairs(redis.call('HKEYS', key)) do
    heads[#heads + 1] = place
    heads[#heads + 1] = string.sub(string.match(redis.call('HGET', key, place), '^[^\n]*'), 1, 4000)
  end
  return {redis.call('HGETALL', p .. 'attempts:' .. execution), heads}
end

-- Whether a run is one of those that are asked for.
local function fits(want, id)
  local name = string.gsub(id, '[^%w_.~-]', function(c) return string.format('%%%02X', string.byte(c)) end)
  local prefix = 'stroma:{' .. name .. '}:'
  local f = redis.call('HMGET', prefix .. 'run', 'pipeline', 'status', 'tags', 'error', 'execution')
  if not f[1] or (want.pipeline and f[1] ~= want.pipeline) then return false end
  if want.statuses and not want.statuses[f[2]] then return false end
  if want.tag then
    local tagged = false
    for _, tag in ipairs(f[3] and cjson.decode(f[3]) or {}) do tagged = tagged or tag == want.tag end
    if not tagged then return false end
  end
  if want.text then
    local there = false
    for _, part in ipairs({id, f[1], f[4] or ''}) do
      there = there or string.find(string.lower(part), want.text, 1, true) ~= nil
    end
    if not there then return false end
  end
  if want.class or want.node then
    local failed = false
    for _, attempt in ipairs(failures(prefix, f[5], 20)) do
      local header = cjson.decode(string.match(attempt, '^[^\n]*'))[1]
      failed = failed or ((not want.node or header[5] == want.node) and (not want.class or header[8] == want.class))
    end
    if not failed then return false end
  end
  return true
end

-- Of some of all runs, the one begun last first, from a place on: how many were looked at and where that ended; then the
-- ids that begin with a text and are asked for, with their starts. A few thousand at once hold up nobody for long.
local function surely_fits(want, id)
  local read, fitting = pcall(fits, want, id)  -- A damaged run is none of those that are asked for.
  return read and fitting
end

function ops.matching(from, before, lowest, most, beginning, asked)
  -- The run that it goes on behind is among them.
  local room = before ~= '' and most + 1 or most
  local ids = redis.call('ZREVRANGEBYSCORE', RUNS, from, lowest, 'WITHSCORES', 'LIMIT', 0, room)
  local found, want = {#ids / 2, ids[#ids] or '', ids[#ids - 1] or ''}, asked ~= '' and cjson.decode(asked)
  for i = 1, #ids, 2 do
    local id, start = ids[i], ids[i + 1]
    local told = before ~= '' and start == from and id >= before
    if told then found[1] = found[1] - 1
    elseif string.sub(id, 1, #beginning) == beginning and (not want or surely_fits(want, id)) then
      found[#found + 1] = id
      found[#found + 1] = start
    end
  end
  return found
end

function ops.sweep()
  sweep(1000)
  return 0
end

-- Operations on what was read before, all of them or none: ARGV is the name of the transaction, the runs that must be as
-- they were read (prefix, token, version, beside), and for each operation its length, prefix, name and values. The replies
-- end with the first one that refuses. Sent again, it does not compare: it finds its name, and each operation what it did.
local function together()
  local tx, checks, at, replies = ARGV[2], cjson.decode(ARGV[3]), 4, {}
  for _, check in ipairs(checks) do
    local f = redis.call('HMGET', check[1] .. 'run', 'token', 'version', 'beside', 'tx')
    if f[4] ~= tx and ((f[1] or '') ~= check[2] or (f[2] or '') ~= check[3] or (f[3] or '') ~= check[4]) then
      return 'changed'
    end
  end
  -- A cell that has changed refuses all: it is compared before the commit that settles in it is made.
  local step = at
  while step <= #ARGV do
    if ARGV[step + 2] == 'put_cell' then
      local f = redis.call('HMGET', ARGV[step + 1], 'number', 'maker')
      if f[2] ~= ARGV[step + 4] and (f[1] or '') ~= ARGV[step + 3] then return 'changed' end
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
    if redis.call('EXISTS', check[1] .. 'run') == 1 then redis.call('HSET', check[1] .. 'run', 'tx', tx) end
  end
  return replies
end

if op == 'together' then return together() end
return ops[op](unpack(ARGV, 2))
"""

SHA: Final = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
