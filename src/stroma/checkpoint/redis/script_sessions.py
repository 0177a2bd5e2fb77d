"""Lua operations of sessions: find and open a run, commit, end. See ``scripts.py``."""

from __future__ import annotations

from typing import Final

SESSIONS: Final = r"""
function ops.find(id)
  local row = redis.call('HGETALL', run)
  if #row == 0 then
    -- All keys of a run expire at once: if one remains, or the run is still listed, the others were lost.
    local others = redis.call('EXISTS', p .. INPUT, p .. 'attempts:1', p .. 'steps:1')
    if others > 0 then return 'lost' end
    local listed = redis.call('ZSCORE', RUNS, id) or redis.call('ZSCORE', IDS, id)
    if listed and not redis.call('ZSCORE', ENDED, id) then return 'lost' end
    return false
  end
  return {now_ms(), row}
end

-- Makes an open run stay, and lists it.
local function keep(id, execution)
  persist(tonumber(execution))
  redis.call('ZADD', IDS, 0, id)
  redis.call('ZREM', ENDED, id)
end

function ops.begin(id, execution, token)
  local us = now_us()
  if redis.call('HSETNX', run, 'order', us) == 1 then
    -- Keys that eviction left of an earlier run of this id.
    for _, key in ipairs(keys_of(0)) do if key ~= run then redis.call('DEL', key) end end
  else redis.call('DEL', p .. 'events') end
  for _, name in ipairs(EXECUTION_KEYS) do redis.call('DEL', p .. name .. ':' .. execution) end
  redis.call('HSET', run, 'token', token, 'run_id', id, 'nodes', 0, 'identities', 0)
  redis.call('ZADD', RUNS, us, id)
  note_format()
  keep(id, execution)
  sweep(10)
  return redis.call('HINCRBY', run, 'writes', 1)
end

-- Returns true if a commit is a failed item of a map.
local function is_failed_item(steps, field)
  local is_json, head = pcall(cjson.decode, string.match(redis.call('HGET', steps, field), '^[^\n]*'))
  return is_json and type(head) == 'table' and string.find(tostring(head[2]), '^failed item') ~= nil
end

-- Discards commits of an execution, see pack_discard().
local function discard_commits(execution, discard)
  local first, positions, places = unpack(cjson.decode(discard))
  local failed_at, gone = {}, {}
  for _, position in ipairs(positions) do failed_at[position] = true end
  for _, place in ipairs(places) do gone[place] = true end
  local steps, commits, top = p .. 'steps:' .. execution, 0, 0
  for _, field in ipairs(redis.call('HKEYS', steps)) do
    local position = tonumber(string.match(field, '^%d+'))
    if gone[field] or first >= 0 and position >= first
      or failed_at[position] and is_failed_item(steps, field) then redis.call('HDEL', steps, field)
    else
      commits = commits + 1
      if string.match(field, '^%d+:$') then top = top + 1 end
    end
  end
  redis.call('HSET', run, 'commit_count', commits, 'nodes', top)
end

function ops.take_over(id, execution, discard)
  if not is_complete(execution) then return 'lost' end
  redis.call('ZADD', RUNS, 'NX', now_us(), id)
  if discard ~= '' then discard_commits(execution, discard) end
  keep(id, execution)
  return redis.call('HINCRBY', run, 'writes', 1)
end

-- Changes fields of a run, see change(); with the news '1' it wakes workers that listen.
function ops.update(id, news, ...)
  if redis.call('EXISTS', run) == 0 then return 0 end
  change(id, ...)
  redis.call('HINCRBY', run, 'changes', 1)
  if news == '1' then redis.call('PUBLISH', 'stroma:news', '') end
  return 0
end

function ops.commit(token, execution, epoch, owner, acknowledged, lease, at, attempt, cost, tokens, latency,
    failed, place, size, step, identity, position)
  local attempts = p .. 'attempts:' .. execution
  if redis.call('HGET', run, 'token') == token and redis.call('HEXISTS', attempts, at) == 1 then
    return tonumber(redis.call('HGET', run, 'writes'))
  end
  local problem = fence_problem(token, epoch, owner, acknowledged)
  if problem then return problem end
  if not is_complete(execution) then return 'lost' end
  -- The cost first: a sum beyond 64 bits, some nine million dollars, fails before anything is written.
  for _, sum in ipairs({{'cost_pico', cost}, {'tokens', tokens}, {'latency_ns', latency}}) do
    if sum[2] ~= '0' then redis.call('HINCRBY', run, unpack(sum)) end
  end
  local order = place == '' and 0 or redis.call('HINCRBY', run, 'order', 1)
  redis.call('HSET', attempts, at, string.format('%.0f ', order) .. size .. ' ' .. attempt)
  redis.call('HINCRBY', run, 'attempt_count', 1)
  if identity ~= '' and redis.call('HSET', p .. 'identities:' .. execution, identity, position) == 1 then
    redis.call('HINCRBY', run, 'identities', 1)
  end
  if failed ~= '' then
    redis.call('LPUSH', p .. 'failed:' .. execution, at)
    redis.call('LTRIM', p .. 'failed:' .. execution, 0, 19)
  end
  if place ~= '' and redis.call('HSET', p .. 'steps:' .. execution, place, step) == 1 then
    redis.call('HINCRBY', run, 'commit_count', 1)
    if string.match(place, '^%d+:$') then redis.call('HINCRBY', run, 'nodes', 1) end
  end
  local ms = now_ms()
  redis.call('HSET', run, 'updated_ms', ms)
  if redis.call('HEXISTS', run, 'until_ms') == 1 then redis.call('HSET', run, 'until_ms', ms + lease) end
  return redis.call('HINCRBY', run, 'writes', 1)
end

function ops.finish(id, token, execution, epoch, owner, acknowledged, ttl, ...)
  local problem = fence_problem(token, epoch, owner, acknowledged)
  if problem then return problem end
  change(id, ...)
  if ttl ~= '' then
    local ms = now_ms() + ttl
    redis.call('ZADD', ENDED, ms, id)
    for _, key in ipairs(keys_of(tonumber(execution))) do redis.call('PEXPIREAT', key, ms) end
  end
  return redis.call('HINCRBY', run, 'writes', 1)
end

function ops.renew(token, epoch, owner, acknowledged, lease)
  local problem = fence_problem(token, epoch, owner, acknowledged)
  if problem then return problem end
  local f = fields(run, 'writes', 'until_ms', 'run_id')
  if not f.until_ms then return tonumber(f.writes) end
  change(f.run_id or '', 'until_ms', '+' .. lease)
  return redis.call('HINCRBY', run, 'writes', 1)
end

-- Returns true if a worker has claimed a run.
local function is_claimed(claim_until_ms, ms) return number(claim_until_ms) >= ms end

-- Claims a run for a worker; with a negative time, it gives it back; with the token '', it keeps it from all
-- workers. Returns 0 if it is no longer free.
function ops.claim(id, now, token, claim_ms)
  local ms = now_ms()
  local f = fields(run, 'status', 'until_ms', 'wake_ms', 'claim', 'claim_until_ms')
  if not f.status or token ~= '' and is_claimed(f.claim_until_ms, ms) and f.claim ~= token then return 0 end
  if f.status == 'RUNNING' then
    if number(f.until_ms) >= ms then return 0 end
  elseif not f.wake_ms or tonumber(claim_ms) >= 0 and tonumber(f.wake_ms) > tonumber(now) then return 0 end
  change(id, 'claim', token, 'claim_until_ms', '+' .. claim_ms)
  return 1
end
"""
