"""Two typed steps; the first call times out and is repeated; every attempt is listed.

Pydantic AI repeats requests of its models and answers that it refuses. The retries of other steps are written here.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel
from world import Reply, Sorted, Ticket, ask_for_topic

In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)


async def call(step: Callable[[In], Awaitable[Out]], state: In) -> Out:
    number = 1
    while True:
        try:
            output = await step(state)
        except TimeoutError:
            print(step.__name__, number, "failure")
            if number == 4:
                raise
            await asyncio.sleep(random.uniform(0, 0.1 * 2 ** (number - 1)))
            number += 1
        else:
            print(step.__name__, number, "success")
            return output


async def sort(ticket: Ticket) -> Sorted:
    return Sorted(text=ticket.text, topic=await ask_for_topic(ticket.text))


async def reply(state: Sorted) -> Reply:
    return Reply(topic=state.topic, reply=f"We look into it: {state.text}")


async def main() -> None:
    print(await call(reply, await call(sort, Ticket(text="My invoice is wrong"))))


asyncio.run(main())
