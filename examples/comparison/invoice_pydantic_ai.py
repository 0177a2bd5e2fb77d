"""An answer is repaired and booked; it is paid for once, within a budget, although the process is killed in between.

Pydantic AI repairs answers. Retries of its requests, the budget and the record of a run are written here.
"""

import asyncio
import json
import random
from pathlib import Path

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from world import Invoice, Mail, ask_for_euros, crash_if_asked, price_of


class Progress(BaseModel):
    cost_usd: float = 0
    invoice: Invoice | None = None
    is_booked: bool = False


file = Path("mail-7.json")
progress = Progress.model_validate_json(file.read_text()) if file.exists() else Progress()


def save() -> None:
    part = file.with_suffix(".part")
    part.write_text(progress.model_dump_json())
    part.replace(file)


async def request(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    complaints = [str(part.content) for part in messages[-1].parts if part.part_kind == "tool-return"]
    for number in range(4):
        if progress.cost_usd >= 0.10:
            raise RuntimeError("over the budget")
        try:
            response = await ask_for_euros("Twelve EUR", complaints[0] if complaints else None)
            break
        except TimeoutError:
            if number == 3:
                raise
            await asyncio.sleep(random.uniform(0, 0.1 * 2**number))
    progress.cost_usd += price_of(response)
    save()
    return ModelResponse(parts=[ToolCallPart(info.output_tools[0].name, json.dumps(response["answer"]))])


agent = Agent(FunctionModel(request), output_type=Invoice, retries={"output": 2})


async def main() -> None:
    mail = Mail(text="Twelve EUR")
    if progress.invoice is None:
        progress.invoice = (await agent.run(mail.text)).output
        save()
    if not progress.is_booked:
        crash_if_asked()
        progress.is_booked = True
        save()
    print(progress.invoice, f"${progress.cost_usd:.6f}")


asyncio.run(main())
