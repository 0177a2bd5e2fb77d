"""The child of tests/runner/test_map_kill.py: `python sequence_kill_helper.py DATABASE SIDE_FILE` runs a map,
resuming.

Each call of a node appends its id and its item to the side file. The first call of `check` for item 17 kills
the process.
"""

import asyncio
import os
import signal
import sys
from typing import Any

from pydantic import BaseModel

from stroma import SQLiteStore, StromaRunner, map_over, stroma_node

DEADLY = 17


class Ticket(BaseModel):
    n: int


class Tickets(BaseModel):
    tickets: list[Ticket]


def make(node_id: str, path: str) -> Any:
    @stroma_node(node_id, input=Ticket, output=Ticket)
    async def func(ticket: Ticket) -> Ticket:
        with open(path, "a+") as side:
            side.seek(0)
            call = f"{node_id} {ticket.n}"
            is_first = call not in side.read().splitlines()
            side.write(f"{call}\n")
        if is_first and call == f"check {DEADLY}":
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(0)
        return ticket

    return func


async def main(database: str, side_file: str) -> None:
    steps = [make(node_id, side_file) for node_id in ("classify", "draft", "check")]
    work = map_over("tickets", steps, into="answers", max_concurrency=4)
    async with SQLiteStore(database) as store:
        runner = StromaRunner.quick(store=store, run_id="killed", resume=True)
        result = await runner.run([work], Tickets(tickets=[Ticket(n=n) for n in range(30)]))
    assert result.output is not None, result.failure
    print(result.status, [one.n for one in result.output.answers])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
