"""A model is shown its own mistake, and mends it.

    python examples/repair.py

Needs `pip install "stroma-runner[demo]"`, and neither a key nor a network: the real OpenAI client asks the
demo's provider, which gives its first answer with a field of the wrong type (or, with `malformed` as an
argument, cuts it short). Against OpenAI itself, drop the provider.
"""

import asyncio
import json
import sys
from decimal import Decimal
from typing import Any, Literal

import openai
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from stroma import ExecutionResult, NodeContract, StromaRunner, current_node, stroma_node
from stroma.demo.provider import Provider

INSTRUCTIONS = "TASK: extract\nRead the business document and answer with one JSON object."
DOCUMENT = """INVOICE No. 2026-118
Harrow & Kestrel Ltd
Date: 3 November 2026
Consulting, October 2026
Total due: £1,440.00
"""


class Document(BaseModel):
    text: str


class Invoice(BaseModel):
    kind: Literal["invoice", "credit_note", "other"]
    reference: str | None
    date: str | None
    total: Decimal | None
    flags: list[str]


def read(answer: str) -> Any:
    try:
        return json.loads(answer)
    except ValueError:
        return answer  # Text that is not JSON breaks the contract, and the model gets the error.


async def main(fault: str = "wrong_type") -> ExecutionResult:
    with Provider(faults=[fault]) as provider:
        client = openai.AsyncOpenAI(api_key="demo", base_url=provider.base_url, max_retries=0)

        @stroma_node("extract", NodeContract(node_id="extract", input_schema=Document, output_schema=Invoice))
        async def extract(state: Document) -> tuple[Any, ChatCompletion]:
            node = current_node()
            messages: list[Any] = [
                {"role": "system", "content": INSTRUCTIONS},
                {"role": "user", "content": state.text},
            ]
            mistake = node.last_failure.as_prompt() if node.last_failure else None
            if mistake:
                print(f"--- attempt {node.attempt} says to the model:\n{mistake}\n---")
                messages.append({"role": "user", "content": mistake})
            answer = await client.chat.completions.create(
                model="gpt-4o-mini", messages=messages, response_format={"type": "json_object"}
            )
            # The response beside the output: its tokens are counted and priced, in a failed attempt too.
            return read(answer.choices[0].message.content or ""), answer

        runner = StromaRunner.quick(contract_retries={"extract": 2})
        result = await runner.run([extract], Document(text=DOCUMENT))
        await client.close()
    result.raise_for_status()
    for event in result.trace:
        print(
            f"attempt {event.attempt}: {event.outcome}, {event.usage.tokens} tokens, {event.reason or 'no fault'}"
        )
    print(f"{result.final_state!r} for ${result.total_cost_usd:.6f}")
    return result


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:2]))
