"""Lua operations on annotations, saved states, cells, and queues of runs. See ``scripts.py``."""

from __future__ import annotations

from typing import Final

RECORDS: Final = r"""
-- With an owner, annotations change only while it owns the run.
function ops.annotate(owner, key, branch, value)
  if owner ~= '' and redis.call('HGET', run, 'owner') ~= owner then return 'changed' end
  local ttl = redis.call('PTTL', run)
  if ttl == -2 then return 0 end
  redis.call('HINCRBY', run, 'changes', 1)
  redis.call('HSET', p .. key, branch, value)
  if ttl >= 0 then redis.call('PEXPIRE', p .. key, ttl) end
  return 0
end

function ops.delete_annotations(owner, key, branch)
  if owner ~= '' and redis.call('HGET', run, 'owner') ~= owner then return 'changed' end
  local deleted
  if branch then deleted = redis.call('HDEL', p .. key, branch)
  else deleted = redis.call('DEL', p .. key) end
  if deleted > 0 and redis.call('EXISTS', run) == 1 then redis.call('HINCRBY', run, 'changes', 1) end
  return 0
end

function ops.save(node, value, ttl)
  local saved, us, expires = p .. SAVED, now_us(), ''
  local remaining = redis.call('PTTL', saved)
  local order = us
  if redis.call('EXISTS', run) == 1 then order = redis.call('HINCRBY', run, 'order', 1) end
  if ttl ~= '' then expires = string.format('%.0f', math.floor(us / 1000) + ttl) end
  redis.call('HSET', saved, node, string.format('%.0f ', order) .. expires .. '\n' .. value)
  if ttl == '' then redis.call('PERSIST', saved)
  elseif remaining == -2 or (remaining >= 0 and remaining < tonumber(ttl)) then redis.call('PEXPIRE', saved,
      ttl) end
  return 0
end

function ops.delete(id)
  local executions = number(redis.call('HGET', run, 'execution'))
  while redis.call('EXISTS', p .. 'attempts:' .. (executions + 1), p .. 'steps:' .. (executions + 1)) > 0 do
    executions = executions + 1
  end
  unlist(id)
  for _, key in ipairs(keys_of(executions)) do redis.call('DEL', key) end
  redis.call('DEL', p .. SAVED)
  redis.call('ZREM', RUNS, id)
  redis.call('ZREM', IDS, id)
  redis.call('ZREM', ENDED, id)
  return 0
end

-- Appends a batch of events. The stream refuses one that is there, and one of an earlier session than the
-- last one.
function ops.append_events(token, execution, id, data, most, ttl)
  local f = fields(run, 'token', 'execution')
  if f.token ~= token or f.execution ~= execution then return 0 end
  local events, left = p .. 'events', redis.call('PTTL', run)
  local reply = redis.pcall('XADD', events, 'MAXLEN', '~', most, id, 'data', data)
  if type(reply) == 'table' and not string.find(reply.err, 'equal or smaller', 1, true) then return reply end
  redis.call('PEXPIRE', events, left >= 0 and math.min(left, ttl) or ttl)
  return 0
end

function ops.read_cell()
  local f = fields(p, 'number', 'data')
  return {now_ms(), f.number or '', f.data}
end

function ops.write_cell(number, maker, data)
  local f = fields(p, 'number', 'maker')
  if f.maker == maker then return 0 end
  if (f.number or '') ~= number then return 'changed' end
  redis.call('HSET', p, 'data', data, 'maker', maker, 'number', (f.number or 0) + 1)
  return 0
end

-- Examines the newest runs from a place on. Returns the (id, start) of the last one, and (id, start, row) of
-- those of this pipeline and one of these statuses, if there are any.
function ops.newest(from, lowest, limit, pipeline, statuses)
  local ids = redis.call('ZREVRANGEBYSCORE', RUNS, from, lowest, 'WITHSCORES', 'LIMIT', 0, limit)
  local reply, wanted, ms = {{ids[#ids - 1], ids[#ids]}}, cjson.decode(statuses), now_ms()
  for i = 1, #ids, 2 do
    local row = prefix_of(ids[i]) .. 'run'
    local f = fields(row, 'pipeline', 'status')
    if (pipeline == '' or f.pipeline == pipeline) and (not next(wanted) or wanted[f.status or '']) then
      local all = redis.call('HGETALL', row)
      if #all > 0 then reply[#reply + 1] = {ids[i], ids[i + 1], {ms, all}} end
    end
  end
  return reply
end

-- Returns (order of submission, id, priority, due, '=' and key or '') of runs of a pipeline that are due and
-- have no claim, the first ones of each key: queued runs, runs that stopped or whose lease is over, and
-- blocked ones that this code has not refused, or long ago. Wakes have the clock of the clients, leases that
-- of the server. Of very many stopped runs, blocked runs and keys, a part is looked at; where: 0 to 1.
function ops.candidates(pipeline, version, now, limit, most, code, where)
  local ms, found, examined = now_ms(), {}, 0
  local place = lane_of(pipeline, version)
  now, limit, most = tonumber(now), tonumber(limit), tonumber(most)
  local function add(id, f, due)
    local key = f.key and '=' .. f.key or ''
    for _, value in ipairs({f.order or '0', id, f.priority or 0, due, key}) do found[#found + 1] = value end
  end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', LATER .. place, '-inf', now, 'LIMIT', 0, most)) do
    redis.call('ZREM', LATER .. place, id)
    run = prefix_of(id) .. 'run'
    list(id, now)
  end
  -- Adds those of these runs that are due. Runs that are in the list no more are removed from it.
  local function add_due(list, ids, blocked)
    local due, taken = {}, {}
    for _, id in ipairs(ids) do
      local f = fields(prefix_of(id) .. 'run', 'status', 'until_ms', 'wake_ms', 'pipeline',
          'claim_until_ms', 'priority', 'key', 'version', 'blocked_until_ms', 'blocked_codes', 'order')
      local status, wake, blocked_until = f.status, f.wake_ms, f.blocked_until_ms
      local stopped = status == 'SUSPENDED' or status == 'INTERRUPTED' or blocked and status == 'QUEUED'
      if f.pipeline ~= pipeline or (f.version or '') ~= version or blocked and not blocked_until
          or not (stopped and (wake or blocked) or status == 'RUNNING') then redis.call('ZREM', list, id)
      elseif not is_claimed(f.claim_until_ms, ms) and (stopped and wake and tonumber(wake) <= now
          or not stopped and (tonumber(f.until_ms or 0) or 0) < ms)
          and (not blocked or tonumber(blocked_until) <= now
            or not string.find(f.blocked_codes or '', code, 1, true)) then
        due[#due + 1] = {id = id, priority = tonumber(f.priority or 0) or 0, key = f.key,
            order = f.order or '0', due = stopped and tonumber(wake) or 0}
      end
    end
    table.sort(due, function(a, b)
      if a.priority ~= b.priority then return a.priority < b.priority end
      if a.due ~= b.due then return a.due < b.due end
      return tonumber(a.order) < tonumber(b.order)
    end)
    for _, one in ipairs(due) do
      local key = one.key or ''
      taken[key] = (taken[key] or 0) + 1
      if taken[key] <= limit then add(one.id, one, one.due) end
    end
  end
  -- Of many, those that are due for longest, and others from a random place on.
  local part, until_ms = most / 4, math.max(now, ms)
  local function due_from(first)
    return redis.call('ZRANGEBYSCORE', DUE .. place, '-inf', until_ms, 'LIMIT', first, part)
  end
  local ids, count = due_from(0), redis.call('ZCOUNT', DUE .. place, '-inf', until_ms)
  local second = part + (count > 2 * part and math.floor(where * (count - part)) or 0)
  for _, id in ipairs(due_from(second)) do ids[#ids + 1] = id end
  add_due(DUE .. place, ids)
  local first = math.floor(where * math.max(redis.call('ZCARD', BLOCKED .. place) - most / 2, 0))
  add_due(BLOCKED .. place, redis.call('ZRANGE', BLOCKED .. place, first, first + most / 2), true)
  local keys = redis.call('SMEMBERS', QUEUE_KEYS .. place)
  for number = 0, #keys do
    local key = number == 0 and '' or keys[(number + math.floor(where * #keys)) % #keys + 1]
    local queue, first, taken = queue_of(place, key), 0, 0
    while taken < limit and examined < most do
      local members = redis.call('ZRANGE', queue, first, first + 99, 'WITHSCORES')
      if #members == 0 then break end
      for at = 1, #members, 2 do
        local due, order, id = string.match(members[at], '^(%d+) (%d+):(.*)$')
        examined = examined + 1
        if due and taken < limit and tonumber(due) <= now then
          local f = fields(prefix_of(id) .. 'run', 'status', 'claim_until_ms')
          if f.status ~= 'QUEUED' then redis.call('ZREM', queue, members[at])  -- The run was lost.
          elseif not is_claimed(f.claim_until_ms, ms) then
            add(id, {priority = members[at + 1], key = key ~= '' and key or nil, order = order},
                tonumber(due))
            taken = taken + 1
          end
        end
      end
      first = first + 100
    end
  end
  return found
end

-- Returns the keys of the runs of a pipeline that have an owner or a claim: '=' and the key, or ''.
function ops.live_runs(pipeline)
  local keys, ms = {}, now_ms()
  redis.call('ZREMRANGEBYSCORE', LIVE .. pipeline, '-inf', '(' .. ms)
  for _, id in ipairs(redis.call('ZRANGE', LIVE .. pipeline, 0, -1)) do
    local key = redis.call('HGET', prefix_of(id) .. 'run', 'key')
    keys[#keys + 1] = key and '=' .. key or ''
  end
  return keys
end

-- Returns how many runs of a lane are queued, and the earliest due time, or '', of queued and stopped runs
-- that are due at a time: of each key and priority, the first member of a queue is due first. Then how many
-- are blocked, and since when.
function ops.queue_figures(pipeline, version, now, least, most)
  local queued, oldest, examined = 0, nil, 0
  local place = lane_of(pipeline, version)
  now, most = tonumber(now), tonumber(most)
  local keys = redis.call('SMEMBERS', QUEUE_KEYS .. place)
  keys[#keys + 1] = ''
  for _, key in ipairs(keys) do
    local queue, above = queue_of(place, key), '-inf'
    queued = queued + redis.call('ZCARD', queue)
    while examined < most do
      local first = redis.call('ZRANGEBYSCORE', queue, above, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
      if #first == 0 then break end
      local due = tonumber(string.match(first[1], '^%d+'))
      if due <= now and (not oldest or due < oldest) then oldest = due end
      above, examined = '(' .. first[2], examined + 1
    end
  end
  queued = queued + redis.call('ZCARD', LATER .. place)
  local later = redis.call('ZRANGEBYSCORE', LATER .. place, '-inf', now, 'WITHSCORES', 'LIMIT', 0, 1)
  if later[2] and (not oldest or tonumber(later[2]) < oldest) then oldest = tonumber(later[2]) end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', DUE .. place, least, now, 'LIMIT', 0, most)) do
    local f = fields(prefix_of(id) .. 'run', 'status', 'wake_ms')
    local due = (f.status == 'SUSPENDED' or f.status == 'INTERRUPTED') and f.wake_ms and tonumber(f.wake_ms)
    if due and (not oldest or due < oldest) then oldest = due end
    if due then break end
  end
  local first = redis.call('ZRANGE', BLOCKED .. place, 0, 0, 'WITHSCORES')
  return {queued, oldest and string.format('%.0f', oldest) or '', redis.call('ZCARD', BLOCKED .. place),
      first[2] or ''}
end

function ops.sweep()
  sweep(1000)
  return 0
end
"""
