"""An answer is repaired and booked; it is paid for once, within a budget, although the process is killed in between."""

import asyncio
import os
from datetime import timedelta
from typing import Any

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.common import RetryPolicy, WorkflowIDConflictPolicy
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    from pydantic import ValidationError
    from world import Invoice, Mail, ask_for_euros, crash_if_asked, price_of


@activity.defn
async def ask(mail: Mail, complaint: str | None) -> dict[str, Any]:
    return await ask_for_euros(mail.text, complaint)


@activity.defn
async def book(invoice: Invoice) -> Invoice:
    crash_if_asked()
    return invoice


RETRIES = RetryPolicy(initial_interval=timedelta(seconds=0.1), maximum_attempts=4)
SECONDS = timedelta(seconds=5)


@workflow.defn
class Inbox:
    @workflow.run
    async def run(self, mail: Mail) -> tuple[Invoice, float]:
        complaint, cost_usd, repairs = None, 0.0, 0
        while True:
            if cost_usd >= 0.10:
                raise ApplicationError("over the budget")
            response = await workflow.execute_activity(
                ask, args=[mail, complaint], start_to_close_timeout=SECONDS, retry_policy=RETRIES
            )
            cost_usd += price_of(response)
            try:
                invoice = Invoice.model_validate(response["answer"])
            except ValidationError as error:
                if repairs == 2:
                    raise ApplicationError(str(error)) from error
                complaint, repairs = str(error), repairs + 1
            else:
                await workflow.execute_activity(book, invoice, start_to_close_timeout=SECONDS)
                return invoice, cost_usd


async def main() -> None:
    client = await Client.connect(os.environ["TEMPORAL"], data_converter=pydantic_data_converter)
    async with Worker(client, task_queue="inbox", workflows=[Inbox], activities=[ask, book]):
        invoice, cost_usd = await client.execute_workflow(
            Inbox.run,
            Mail(text="Twelve EUR"),
            id="mail-7",
            task_queue="inbox",
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        )
        print(invoice, f"${cost_usd:.6f}")


if __name__ == "__main__":
    asyncio.run(main())
