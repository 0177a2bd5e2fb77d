"""Two typed steps; the first call times out and is repeated; every attempt is listed."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from dbos import DBOS
from world import Reply, Sorted, Ticket, ask_for_topic


@contextmanager
def listed(name: str) -> Iterator[None]:
    number = (DBOS.step_status.current_attempt or 0) + 1
    try:
        yield
    except Exception:
        print(name, number, "failure")
        raise
    print(name, number, "success")


def is_temporary(error: BaseException) -> bool:
    return isinstance(error, TimeoutError)


retried = DBOS.step(retries_allowed=True, max_attempts=4, interval_seconds=0.1, should_retry=is_temporary)


@retried
async def sort(ticket: Ticket) -> Sorted:
    with listed("sort"):
        return Sorted(text=ticket.text, topic=await ask_for_topic(ticket.text))


@retried
async def reply(state: Sorted) -> Reply:
    with listed("reply"):
        return Reply(topic=state.topic, reply=f"We look into it: {state.text}")


@DBOS.workflow()
async def tickets(ticket: Ticket) -> Reply:
    return await reply(await sort(ticket))


async def main() -> None:
    DBOS(config={"name": "hello", "system_database_url": "sqlite:///hello.db", "log_level": "ERROR"})
    DBOS.launch()
    print(await tickets(Ticket(text="My invoice is wrong")))
    DBOS.destroy()


asyncio.run(main())
