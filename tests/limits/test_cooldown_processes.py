"""Cooldown of a limit that processes share."""

import asyncio
import json
import sys
import time
from typing import Any

import pytest
from tests.limits.budget_helper import State
from tests.limits.cooldown_helper import REQUESTS_PER_MINUTE, WORKERS
from tests.limits.test_cooldown import NO_RETRY, Refused, node_of
from tests.shared_stores import SHARED, opened, place

from stroma import Limit, RunStatus, StromaRunner

PROCESSES = 5
RUNS = 1_000
RATE = 50  # tokens per second
BURST = 50
LATENCY_SECONDS = 0.05
RETRY_AFTER_SECONDS = 1
#: Seconds from the admission of a call to its start, and from a commit to its hook, on a busy machine.
SLACK = 0.25


class Provider:
    """A provider with a token bucket: a call without a token is refused with a usual Retry-After."""

    def __init__(self) -> None:
        self.tokens = float(BURST)
        self.at: float | None = None
        self.served = self.refused = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            now = time.monotonic()
            self.tokens = min(BURST, self.tokens + (now - (self.at or now)) * RATE)
            self.at = now
            if self.tokens >= 1:
                self.tokens -= 1
                self.served += 1
                await asyncio.sleep(LATENCY_SECONDS)
                writer.write(b"ok\n")
            else:
                self.refused += 1
                writer.write(b"429 %d\n" % RETRY_AFTER_SECONDS)
        writer.close()


async def _program(kind: str, where: str, what: str) -> tuple[Provider, float, list[dict[str, Any]]]:
    """Run 50 workers in 5 processes; return the provider, the seconds, and what each process saw."""
    provider = Provider()
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    command = ["-m", "tests.limits.cooldown_helper", kind, where, str(port), str(RUNS // PROCESSES), what]
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        for _ in range(PROCESSES)
    ]
    try:
        for process in processes:
            assert await process.stdout.readline() == b"ready\n"
        for process in processes:
            process.stdin.write(b"\n")
        results = [json.loads(await process.stdout.readline()) for process in processes if process.stdout]
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        server.close()
    calls = [call for result in results for call in result["calls"]]
    seconds = max(end for _, end, _ in calls) - min(begin for begin, _, _ in calls)
    return provider, seconds, results


@pytest.mark.nightly
@pytest.mark.parametrize("kind", SHARED)
async def test_fifty_workers_wait_once(kind: str) -> None:
    """50 workers in 5 processes: a cooldown costs at most the calls in flight and 15 % of ideal time."""
    perfect = (RUNS - BURST) / RATE + LATENCY_SECONDS
    for _ in range(3):  # A machine that is busy otherwise takes time of its own.
        with place(kind) as where:
            provider, seconds, results = await _program(kind, where, "with")
        cooldowns = sorted(tuple(one) for result in results for one in result["cooldowns"])
        calls = sorted(tuple(call) for result in results for call in result["calls"])
        # Nobody calls while it is on; calls that were admitted just before may begin just after.
        early = [
            begin
            for at, closed_for in cooldowns
            for begin, _, _ in calls
            if at + SLACK < begin < at + closed_for - SLACK
        ]
        if seconds <= perfect * 1.15 and not early:
            break
    with place(kind) as where:
        beside, seconds_beside, _ = await _program(kind, where, "without")
    print(
        f"{kind}: with the cooldown {provider.refused} calls refused in {len(cooldowns)} cooldowns, "
        f"{seconds:.1f} s; without it "
        f"{beside.refused} refused, {seconds_beside:.1f} s; a perfect client {perfect:.1f} s"
    )
    assert {status for result in results for status in result["statuses"]} == {"COMPLETED"}
    assert (provider.served, beside.served) == (RUNS, RUNS)
    assert not early
    refusals = [(begin, end) for begin, end, refused in calls if refused]
    for index, (at, _) in enumerate(cooldowns):
        following = cooldowns[index + 1][0] if index + 1 < len(cooldowns) else float("inf")
        previous = cooldowns[index - 1][0] if index else float("-inf")
        first = min(end for begin, end in refusals if begin > previous)
        refused = [begin for begin, end in refusals if first <= end < following and begin > previous]
        in_flight = [begin for begin, end, _ in calls if begin <= at + SLACK and end >= first]
        assert len(refused) <= len(in_flight) <= PROCESSES * WORKERS + len(refused)
    assert provider.refused <= len(cooldowns) * PROCESSES * WORKERS
    assert provider.refused < beside.refused / 4
    assert seconds <= perfect * 1.15


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
async def test_a_process_that_dies_as_the_probe(kind: str) -> None:
    """A limit whose probe was killed is not closed for ever: after lease_seconds another process probes."""
    with place(kind) as where, opened(kind, where) as store:
        calls: list[int] = []

        async def function(n: int) -> None:
            calls.append(n)
            if n == 0:
                raise Refused(429, retry_after_ms="1")

        limit = Limit(requests_per_minute=REQUESTS_PER_MINUTE, store=store, lease_seconds=1)
        runner = StromaRunner.quick(limits={"call": limit}, policy_map=NO_RETRY)
        await runner.run([node_of(function)], State(n=0))
        command = ["-m", "tests.limits.cooldown_helper", kind, where, "0", "0", "with"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        process.stdin.write(b"\n")
        assert await process.stdout.readline() == b"ready\n"
        assert await process.stdout.readline() == b"calling\n"
        waiting = asyncio.create_task(runner.run([node_of(function)], State(n=1)))
        done, _ = await asyncio.wait([waiting], timeout=1.5)
        assert not done  # The lease of a process that lives is renewed.
        process.kill()
        await process.wait()
        assert (await asyncio.wait_for(waiting, 30)).status is RunStatus.COMPLETED
        assert calls == [0, 1]
