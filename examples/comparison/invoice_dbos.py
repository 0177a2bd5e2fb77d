"""An answer is repaired and booked; it is paid for once, within a budget, although the process is killed in between."""

import asyncio
from typing import Any

from dbos import DBOS, SetWorkflowID
from pydantic import ValidationError
from world import Invoice, Mail, ask_for_euros, crash_if_asked, price_of


def is_temporary(error: BaseException) -> bool:
    return isinstance(error, TimeoutError)


@DBOS.step(retries_allowed=True, max_attempts=4, interval_seconds=0.1, should_retry=is_temporary)
async def ask(mail: Mail, complaint: str | None) -> dict[str, Any]:
    return await ask_for_euros(mail.text, complaint)


@DBOS.step()
async def book(invoice: Invoice) -> Invoice:
    crash_if_asked()
    return invoice


@DBOS.workflow()
async def inbox(mail: Mail) -> tuple[Invoice, float]:
    complaint, cost_usd, repairs = None, 0.0, 0
    while True:
        if cost_usd >= 0.10:
            raise RuntimeError("over the budget")
        response = await ask(mail, complaint)
        cost_usd += price_of(response)
        try:
            invoice = Invoice.model_validate(response["answer"])
        except ValidationError as error:
            if repairs == 2:
                raise
            complaint, repairs = str(error), repairs + 1
        else:
            return await book(invoice), cost_usd


async def main() -> None:
    DBOS(
        config={
            "name": "invoice",
            "system_database_url": "sqlite:///runs.db",
            "application_version": "1",
            "log_level": "ERROR",
        }
    )
    DBOS.launch()  # It continues what a killed process left.
    with SetWorkflowID("mail-7"):
        handle = await DBOS.start_workflow_async(inbox, Mail(text="Twelve EUR"))
    invoice, cost_usd = await handle.get_result()
    print(invoice, f"${cost_usd:.6f}")
    DBOS.destroy()


asyncio.run(main())
