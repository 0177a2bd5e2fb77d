"""An agent finds an order and refunds it, once, after an approval; it continues after an exit and a kill.

Start it three times: alone, with "approve" (and CRASH=1, which kills it in the refund), and alone again.
"""

import asyncio
import sys

from dbos import DBOS, SetWorkflowID
from world import Move, ask_for_move, find_order, refund, was_refunded


@DBOS.step()
async def ask(messages: list[str]) -> Move:
    return await ask_for_move(messages)


@DBOS.step()
async def find(customer: str) -> str:
    return await find_order(customer)


@DBOS.step()
async def pay(order: str) -> str:
    key = f"{DBOS.workflow_id}:{DBOS.step_id}"
    return f"refunded {order}" if was_refunded(key) else await refund(order, key)


@DBOS.workflow()
async def support(ticket: str) -> str:
    messages = [ticket]
    while (move := await ask(messages)).tool:
        if move.tool == "refund":
            await DBOS.set_event_async("question", f"refund {move.argument}?")
            while await DBOS.recv_async("approval", timeout_seconds=86400) is None:
                pass
            await DBOS.set_event_async("question", "")
        step = pay if move.tool == "refund" else find
        messages.append(await step(move.argument))
    return move.argument


async def main() -> None:
    DBOS(
        config={
            "name": "agent",
            "system_database_url": "sqlite:///runs.db",
            "application_version": "1",
            "log_level": "ERROR",
        }
    )
    DBOS.launch()  # It continues what another process left.
    with SetWorkflowID("case-7"):
        handle = await DBOS.start_workflow_async(support, "a refund, please")
    if "approve" in sys.argv:
        await DBOS.send_async("case-7", "Grace", "approval", idempotency_key="case-7")
    elif question := await DBOS.get_event_async("case-7", "question", timeout_seconds=60):
        print(question)
        return
    print(await handle.get_result())


asyncio.run(main())
