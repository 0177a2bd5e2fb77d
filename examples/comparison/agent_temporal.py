"""An agent finds an order and refunds it, once, after an approval; it continues after an exit and a kill.

Start it three times: alone, with "approve" (and CRASH=1, which kills it in the refund), and alone again.
"""

import asyncio
import os
import sys
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    from world import Move, ask_for_move, find_order, refund, was_refunded


@activity.defn
async def ask(messages: list[str]) -> Move:
    return await ask_for_move(messages)


@activity.defn
async def find(customer: str) -> str:
    return await find_order(customer)


@activity.defn
async def pay(order: str) -> str:
    info = activity.info()
    key = f"{info.workflow_id}:{info.activity_id}"
    return f"refunded {order}" if was_refunded(key) else await refund(order, key)


SECONDS = timedelta(seconds=5)


@workflow.defn
class Support:
    def __init__(self) -> None:
        self.question = ""
        self.approved_by = ""

    @workflow.run
    async def run(self, ticket: str) -> str:
        messages = [ticket]
        while True:
            move = await workflow.execute_activity(ask, messages, start_to_close_timeout=SECONDS)
            if not move.tool:
                return move.argument
            if move.tool == "refund":
                self.question = f"refund {move.argument}?"
                await workflow.wait_condition(lambda: self.approved_by != "")
                self.question = ""
            step = pay if move.tool == "refund" else find
            messages.append(
                await workflow.execute_activity(step, move.argument, start_to_close_timeout=SECONDS)
            )

    @workflow.signal
    def approve(self, by: str) -> None:
        self.approved_by = by

    @workflow.query
    def open_question(self) -> str:
        return self.question


async def main() -> None:
    client = await Client.connect(os.environ["TEMPORAL"], data_converter=pydantic_data_converter)
    async with Worker(client, task_queue="support", workflows=[Support], activities=[ask, find, pay]):
        handle = await client.start_workflow(
            Support.run,
            "a refund, please",
            id="case-7",
            task_queue="support",
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        )
        if "approve" in sys.argv:
            await handle.signal(Support.approve, "Grace")
        answer = asyncio.create_task(handle.result())
        while not answer.done():
            if "approve" not in sys.argv and (question := await handle.query(Support.open_question)):
                print(question)
                return
            await asyncio.wait([answer], timeout=0.1)
        print(await answer)


if __name__ == "__main__":
    asyncio.run(main())
