"""An agent finds an order and refunds it, once, after an approval; it continues after an exit and a kill.

Start it three times: alone, with "approve" (and CRASH=1, which kills it in the refund), and alone again. Pydantic AI has
tools and approvals. The record of a run is written here.
"""

import asyncio
import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic_ai import Agent, DeferredToolRequests, DeferredToolResults, RunContext
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from world import ask_for_move, find_order, refund, was_refunded


class Case(BaseModel):
    messages: str = "[]"
    question: str = ""
    is_approved: bool = False


file = Path("case-7.json")


def load() -> Case:
    return Case.model_validate_json(file.read_text()) if file.exists() else Case()


def save(case: Case) -> None:
    part = file.with_suffix(".part")
    part.write_text(case.model_dump_json())
    part.replace(file)


async def request(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    results = [
        str(part.content) for message in messages for part in message.parts if part.part_kind == "tool-return"
    ]
    move = await ask_for_move(["a refund, please", *results])
    if move.tool:
        return ModelResponse(parts=[ToolCallPart(move.tool, {"argument": move.argument})])
    return ModelResponse(parts=[TextPart(move.argument)])


agent = Agent(FunctionModel(request), output_type=[str, DeferredToolRequests])


@agent.tool_plain(name="find_order")
async def find(argument: str) -> str:
    return await find_order(argument)


@agent.tool(name="refund", requires_approval=True)
async def pay(context: RunContext, argument: str) -> str:
    key = f"case-7:{context.tool_call_id}"
    return f"refunded {argument}" if was_refunded(key) else await refund(argument, key)


async def main() -> None:
    case = load()
    if not case.question:
        result = await agent.run("a refund, please")
        assert isinstance(result.output, DeferredToolRequests)
        (call,) = result.output.approvals
        case.messages = result.all_messages_json().decode()
        case.question = f"refund {call.args_as_dict()['argument']}?"
        save(case)
    if "approve" in sys.argv:
        case.is_approved = True
        save(case)
    if not case.is_approved:
        print(case.question)
        return
    messages = ModelMessagesTypeAdapter.validate_json(case.messages)
    calls = [part for part in messages[-1].parts if isinstance(part, ToolCallPart)]
    approvals = DeferredToolResults(approvals={call.tool_call_id: True for call in calls})
    result = await agent.run(message_history=messages, deferred_tool_results=approvals)
    print(result.output)


asyncio.run(main())
