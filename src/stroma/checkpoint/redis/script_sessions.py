"""Lua operations of sessions: find and open a run, commit, end. See ``scripts.py``."""

from __future__ import annotations

from typing import Final

SESSIONS: Final = r"""
function ops.find(id)
  local row = redis.call('HGETALL', run)
  if #row == 0 then
    -- All keys of a run expire at once: if one remains, or the run is still listed, the others were lost.
    local others = redis.call('EXISTS', p .. 'inputs', p .. 'attempts:1', p .. 'nodes:1', p .. 'steps:1')
    if others > 0 then return 'lost' end
    local listed = redis.call('ZSCORE', RUNS, id) or redis.call('ZSCORE', IDS, id)
    if listed and not redis.call('ZSCORE', ENDED, id) then return 'lost' end
    return false
  end
  return {now_ms(), row}
end

-- Lists an open run, whose owner has a lease.
local function list_open(id, execution, until_ms)
  persist(tonumber(execution))
  redis.call('ZADD', IDS, 0, id)
  redis.call('ZREM', ENDED, id)
  redis.call('ZADD', DUE .. lane(), until_ms, id)
  set_live(id, redis.call('HGET', run, 'pipeline') or '', until_ms)
end

function ops.begin(id, owner, execution, epoch, lease, tags, flow_version, token, pipeline, input)
  local f = fields(run, 'token', 'writes', 'owner')
  if f.owner == owner then return tonumber(f.writes) end
  local us = now_us()
  local ms = math.floor(us / 1000)
  local writes = (f.writes or 0) + 1
  if f.token then
    leave_queues(id)
    set_wake(id, '')
    redis.call('HDEL', run, 'priority', 'key', 'expires_ms')
    redis.call('DEL', p .. 'events')
  end
  redis.call('HSET', run, 'token', token, 'run_id', id, 'pipeline', pipeline, 'version', flow_version,
    'execution', execution,
    'status', 'RUNNING', 'started_ms', ms, 'updated_ms', ms, 'tokens', 0, 'cost_pico', 0, 'latency_ns', 0,
    'owner', owner, 'epoch', epoch, 'until_ms', ms + lease, 'nodes', 0, 'commit_count', 0,
    'attempt_count', 0, 'identities', 0, 'writes', writes)
  redis.call('HDEL', run, 'error', 'tags')
  if tags ~= '' then redis.call('HSET', run, 'tags', tags) end
  if not f.token then
    redis.call('HSET', run, 'order', us)
    -- Keys that eviction left of an earlier run of this id.
    for _, key in ipairs(keys_of(0)) do if key ~= run then redis.call('DEL', key) end end
  end
  for _, name in ipairs(EXECUTION_KEYS) do redis.call('DEL', p .. name .. ':' .. execution) end
  redis.call('HSET', p .. 'inputs', execution, input)
  redis.call('ZADD', RUNS, us, id)
  note_format()
  list_open(id, execution, ms + lease)
  sweep(10)
  return writes
end

function ops.take_over(id, owner, execution, epoch, lease, tags, flow_version, discard)
  local f = fields(run, 'writes', 'owner')
  if f.owner == owner then return tonumber(f.writes) end
  if not is_complete(execution) then return 'lost' end
  local ms = now_ms()
  local writes = f.writes + 1
  redis.call('HSET', run, 'status', 'RUNNING', 'owner', owner, 'epoch', epoch, 'until_ms', ms + lease,
    'updated_ms', ms, 'writes', writes)
  leave_queues(id)
  redis.call('HDEL', run, 'error', 'wake_ms')
  redis.call('HSET', run, 'version', flow_version)
  if tags ~= '' then redis.call('HSET', run, 'tags', tags) end
  if discard ~= '' then
    local steps, nodes, commits, top = p .. 'steps:' .. execution, p .. 'nodes:' .. execution, 0, 0
    for _, field in ipairs(redis.call('HKEYS', nodes)) do
      if tonumber(string.match(field, '^%d+')) >= tonumber(discard) then
        redis.call('HDEL', steps, field)
        redis.call('HDEL', nodes, field)
      else
        commits = commits + 1
        if string.match(field, '^%d+:$') then top = top + 1 end
      end
    end
    redis.call('HSET', run, 'commit_count', commits, 'nodes', top)
  end
  redis.call('ZADD', RUNS, 'NX', now_us(), id)
  list_open(id, execution, ms + lease)
  return writes
end

function ops.replace_owner(owner)
  redis.call('HSET', run, 'owner', owner)
  return 0
end

function ops.commit(token, execution, epoch, owner, acknowledged, lease, at, attempt, cost, tokens, latency,
    failed, place, node, step, identity, position)
  local attempts = p .. 'attempts:' .. execution
  if redis.call('HGET', run, 'token') == token and redis.call('HEXISTS', attempts, at) == 1 then
    return tonumber(redis.call('HGET', run, 'writes'))
  end
  local problem = fence_problem(token, epoch, owner, acknowledged)
  if problem then return problem end
  if not is_complete(execution) then return 'lost' end
  local added = {}
  for name, value in pairs({cost_pico = cost, tokens = tokens, latency_ns = latency}) do
    local reply = value ~= '0' and redis.pcall('HINCRBY', run, name, value)
    if type(reply) == 'table' and reply.err then
      for before, sum in pairs(added) do redis.call('HINCRBY', run, before, '-' .. sum) end
      return reply
    end
    if reply then added[name] = value end
  end
  redis.call('HSET', attempts, at, attempt)
  redis.call('HINCRBY', run, 'attempt_count', 1)
  if identity ~= '' and redis.call('HSET', p .. 'identities:' .. execution, identity, position) == 1 then
    redis.call('HINCRBY', run, 'identities', 1)
  end
  if failed ~= '' then
    redis.call('LPUSH', p .. 'failed:' .. execution, at)
    redis.call('LTRIM', p .. 'failed:' .. execution, 0, 19)
  end
  if place ~= '' then
    local order = redis.call('HINCRBY', run, 'order', 1)
    redis.call('HSET', p .. 'nodes:' .. execution, place, string.format('%.0f ', order) .. node)
    if redis.call('HSET', p .. 'steps:' .. execution, place, step) == 1 then
      redis.call('HINCRBY', run, 'commit_count', 1)
      if string.match(place, '^%d+:$') then redis.call('HINCRBY', run, 'nodes', 1) end
    end
  end
  local ms = now_ms()
  redis.call('HSET', run, 'updated_ms', ms)
  if redis.call('HEXISTS', run, 'until_ms') == 1 then redis.call('HSET', run, 'until_ms', ms + lease) end
  return redis.call('HINCRBY', run, 'writes', 1)
end

function ops.finish(id, token, execution, epoch, owner, acknowledged, status, error, ttl, updated, wake)
  local problem = fence_problem(token, epoch, owner, acknowledged)
  if problem then return problem end
  local ms = now_ms()
  leave_queues(id)
  redis.call('HSET', run, 'status', status, 'updated_ms', updated ~= '' and updated or ms)
  if error ~= '' then
    redis.call('HSET', run, 'error', string.sub(error, 2))
  else
    redis.call('HDEL', run, 'error')
  end
  redis.call('HDEL', run, 'until_ms')
  set_wake(id, wake)
  local writes = redis.call('HINCRBY', run, 'writes', 1)
  if ttl ~= '' then
    redis.call('ZADD', ENDED, ms + ttl, id)
    for _, key in ipairs(keys_of(tonumber(execution))) do redis.call('PEXPIREAT', key, ms + ttl) end
  end
  return writes
end

function ops.renew(token, epoch, owner, acknowledged, lease)
  local problem = fence_problem(token, epoch, owner, acknowledged)
  if problem then return problem end
  if redis.call('HEXISTS', run, 'until_ms') == 0 then return tonumber(redis.call('HGET', run, 'writes')) end
  local ms = now_ms()
  redis.call('HSET', run, 'until_ms', ms + lease)
  local f = fields(run, 'pipeline', 'run_id')
  redis.call('ZADD', DUE .. lane(), 'XX', ms + lease, f.run_id or '')
  set_live(f.run_id or '', f.pipeline or '', ms + lease)
  return redis.call('HINCRBY', run, 'writes', 1)
end

-- Releases an execution that has not started, until a worker opens it.
function ops.enqueue(id, owner, due, priority, key, expires)
  local f = fields(run, 'owner', 'pipeline')
  if f.owner ~= owner then return 'changed' end
  redis.call('ZREM', DUE .. lane(), id)
  redis.call('ZREM', LIVE .. f.pipeline, id)
  redis.call('HSET', run, 'status', 'QUEUED', 'priority', priority)
  redis.call('HDEL', run, 'until_ms', 'error')
  if key ~= '' then redis.call('HSET', run, 'key', string.sub(key, 2)) end
  if expires ~= '' then redis.call('HSET', run, 'expires_ms', expires) end
  set_wake(id, due)
  return redis.call('HINCRBY', run, 'writes', 1)
end

-- Returns true if a worker has claimed a run.
local function is_claimed(claim_until, ms) return (tonumber(claim_until or 0) or 0) >= ms end

-- Claims a run for a worker; with a negative time, it gives it back; with the token '', it keeps it from all
-- workers. Returns 0 if it is no longer free.
function ops.claim(id, now, token, claim_ms)
  local ms = now_ms()
  local f = fields(run, 'status', 'until_ms', 'wake_ms', 'claim', 'claim_until', 'pipeline')
  if not f.status or token ~= '' and is_claimed(f.claim_until, ms) and f.claim ~= token then return 0 end
  if f.status == 'RUNNING' then
    if (tonumber(f.until_ms or 0) or 0) >= ms then return 0 end
  elseif not f.wake_ms or tonumber(claim_ms) >= 0 and tonumber(f.wake_ms) > tonumber(now) then return 0 end
  redis.call('HSET', run, 'claim', token, 'claim_until', ms + claim_ms)
  if tonumber(claim_ms) < 0 or token == '' then redis.call('ZREM', LIVE .. f.pipeline, id)
  else set_live(id, f.pipeline, ms + claim_ms) end
  return 1
end

-- Marks a run as blocked, so that it is in no queue; without values, deletes the mark.
function ops.block(id, message, since, blocked_until, codes)
  local status = redis.call('HGET', run, 'status')
  if not status then return 0 end
  if message then
    leave_queue(id)
    redis.call('ZREM', DUE .. lane(), id)
    redis.call('HSET', run, 'blocked', message, 'blocked_since_ms', since,
      'blocked_until_ms', blocked_until, 'blocked_codes', codes)
    redis.call('ZADD', BLOCKED .. lane(), since, id)
  elseif unblock(id) then
    local wake = redis.call('HGET', run, 'wake_ms')
    if status == 'RUNNING' then redis.call('ZADD', DUE .. lane(), 0, id)
    elseif wake then set_wake(id, wake) end
  end
  return 0
end

-- Sets from when on a run is due if it is suspended, or will be; '': never by itself.
function ops.wake(id, wake)
  local status = redis.call('HGET', run, 'status')
  if not status then return 0 end
  if status ~= 'RUNNING' then
    set_wake(id, wake)
    if wake == '0' then report_news() end
  elseif wake ~= '' then redis.call('HSET', run, 'wake_ms', wake)
  else redis.call('HDEL', run, 'wake_ms') end
  return 0
end
"""
