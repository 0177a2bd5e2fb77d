"""A process with ten workers that call a provider under a limit.

usage: python -m tests.limits.cooldown_helper KIND PLACE PORT RUNS WHAT

WHAT: "with" the cooldown, or "without" it. It prints "ready", waits for a line, and then prints what it came
to as one line of JSON. With RUNS 0 it makes one call that never ends, which is the probe of a limit that is
closed.
"""

import asyncio
import json
import sys
import time
from typing import Any

from tests.kit import noting
from tests.limits.budget_helper import State
from tests.shared_stores import opened

from stroma import FailureClass, FailurePolicy, Limit, NodeHooks, StromaRunner, stroma_node
from stroma.limits import rate_limit
from stroma.limits.rate_state import CallReport

WORKERS = 10
REQUESTS_PER_MINUTE = 3_000


class Refused(Exception):
    def __init__(self, seconds: str) -> None:
        super().__init__("HTTP 429")
        self.status_code = 429
        self.headers = {"retry-after": seconds}


async def work(store: Any, port: int, runs: int) -> dict[str, Any]:
    """Make the runs, and return when each call began and ended, its refusals, and when cooldowns began."""
    calls: list[tuple[float, float, bool]] = []
    cooldowns: list[tuple[float, float]] = []
    links: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = [
        await asyncio.open_connection("127.0.0.1", port) for _ in range(WORKERS)
    ]

    @stroma_node("call", input=State, output=State)
    async def call(state: State) -> Any:
        begin = time.monotonic()
        link = links.pop()
        link[1].write(b"call\n")
        answer = (await link[0].readline()).decode().split()
        links.append(link)
        calls.append((begin, time.monotonic(), answer[0] == "429"))
        if answer[0] == "429":
            raise Refused(answer[1])
        return {"n": state.n}

    on_cooldown = noting(cooldowns, lambda run_id, limit, seconds: (time.monotonic(), seconds))
    patient = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=1_000, backoff_seconds=0)}
    runner = StromaRunner.quick(
        limits={"call": Limit(requests_per_minute=REQUESTS_PER_MINUTE, store=store)},
        policy_map=patient,
        hooks=NodeHooks(on_limit_cooldown=on_cooldown),
    )
    pending = iter(range(runs))

    async def worker() -> list[str]:
        return [str((await runner.run([call], State(n=n))).status) for n in pending]

    statuses = await asyncio.gather(*(worker() for _ in range(WORKERS)))
    return {
        "calls": calls,
        "cooldowns": cooldowns,
        "statuses": sorted({one for some in statuses for one in some}),
    }


async def probe(store: Any) -> None:
    @stroma_node("call", input=State, output=State)
    async def call(state: State) -> Any:
        print("calling", flush=True)
        await asyncio.sleep(3600)

    limit = Limit(requests_per_minute=REQUESTS_PER_MINUTE, store=store, lease_seconds=1)
    await StromaRunner.quick(limits={"call": limit}).run([call], State())


async def main(kind: str, where: str, port: str, runs: str, what: str) -> None:
    if what == "without":
        rate_limit._end_of_call = lambda failure: CallReport()
    with opened(kind, where) as store:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        if int(runs) == 0:
            await probe(store)
        print(json.dumps(await work(store, int(port), int(runs))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
