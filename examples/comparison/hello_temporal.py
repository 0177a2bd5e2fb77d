"""Two typed steps; the first call times out and is repeated; every attempt is listed."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.common import RetryPolicy
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    from world import Reply, Sorted, Ticket, ask_for_topic


@contextmanager
def listed() -> Iterator[None]:
    info = activity.info()
    try:
        yield
    except Exception:
        print(info.activity_type, info.attempt, "failure")
        raise
    print(info.activity_type, info.attempt, "success")


@activity.defn
async def sort(ticket: Ticket) -> Sorted:
    with listed():
        return Sorted(text=ticket.text, topic=await ask_for_topic(ticket.text))


@activity.defn
async def reply(state: Sorted) -> Reply:
    with listed():
        return Reply(topic=state.topic, reply=f"We look into it: {state.text}")


RETRIES = RetryPolicy(initial_interval=timedelta(seconds=0.1), maximum_attempts=4)
MINUTE = timedelta(minutes=1)


@workflow.defn
class Tickets:
    @workflow.run
    async def run(self, ticket: Ticket) -> Reply:
        state = await workflow.execute_activity(
            sort, ticket, start_to_close_timeout=MINUTE, retry_policy=RETRIES
        )
        return await workflow.execute_activity(
            reply, state, start_to_close_timeout=MINUTE, retry_policy=RETRIES
        )


async def main() -> None:
    client = await Client.connect(os.environ["TEMPORAL"], data_converter=pydantic_data_converter)
    async with Worker(client, task_queue="hello", workflows=[Tickets], activities=[sort, reply]):
        ticket = Ticket(text="My invoice is wrong")
        print(await client.execute_workflow(Tickets.run, ticket, id="hello", task_queue="hello"))


if __name__ == "__main__":
    asyncio.run(main())
