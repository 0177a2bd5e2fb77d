"""Invoices from e-mails into books: a provider that misbehaves, a bookkeeping system that is down, nothing paid for twice.

    python examples/document_pipeline.py

Needs `pip install "stroma-runner[demo]"`, and neither a key nor a network: the real OpenAI client asks a
provider on this machine.
"""

import asyncio
import json
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import openai
from pydantic import BaseModel

from stroma import (
    ExecutionResult,
    FailureClass,
    FailurePolicy,
    NodeContract,
    Pipeline,
    SQLiteStore,
    StromaRunner,
    current_node,
    stroma_node,
)
from stroma.demo.provider import Provider

INVOICE = """INVOICE No. 2026-118
Harrow & Kestrel Ltd
Date: 3 November 2026
Consulting, October 2026
Total due: £1,440.00
"""


class Mail(BaseModel):
    text: str


class Invoice(BaseModel):
    kind: Literal["invoice", "credit_note"]
    reference: str
    total: Decimal


class Entry(BaseModel):
    reference: str
    net: Decimal
    vat: Decimal


class Booked(BaseModel):
    receipt: str


async def main() -> ExecutionResult:
    calls = {"extract": 0, "post": 0}
    ledger_is_up = False

    # The first call is refused for a moment, the second one gets an answer whose total is not a number.
    faults = ["429", "wrong_type"]
    with Provider(faults=faults) as provider, tempfile.TemporaryDirectory() as folder:
        client = openai.AsyncOpenAI(api_key="demo", base_url=provider.base_url, max_retries=0)

        @stroma_node("extract", NodeContract(node_id="extract", input_schema=Mail, output_schema=Invoice))
        async def extract(mail: Mail) -> Any:
            calls["extract"] += 1
            answer = await client.chat.completions.create(
                model="gpt-4o-mini",
                messages=[
                    {"role": "system", "content": "TASK: extract"},
                    {"role": "user", "content": mail.text},
                ],
            )
            # Beside the output, the response: tokens of failed attempts count, too.
            return json.loads(answer.choices[0].message.content or ""), answer

        @stroma_node("split", NodeContract(node_id="split", input_schema=Invoice, output_schema=Entry))
        async def split(invoice: Invoice) -> dict[str, Any]:
            net = (invoice.total / Decimal("1.2")).quantize(Decimal("0.01"))
            return {"reference": invoice.reference, "net": net, "vat": invoice.total - net}

        @stroma_node
        async def post(entry: Entry) -> Booked:
            calls["post"] += 1
            if not ledger_is_up:
                raise ConnectionError("the ledger does not answer")
            node = current_node()
            # The same key at every attempt, in every process: the ledger can tell a repetition from a second
            # booking.
            return Booked(receipt=f"{entry.net} + {entry.vat} booked under the key {node.idempotency_key}")

        pipeline = Pipeline("invoices", [extract, split, post])
        async with SQLiteStore(Path(folder) / "runs.db") as store:
            runner = StromaRunner.quick(
                store=store,
                contract_retries={"extract": 1},  # One more attempt after an answer that breaks the contract.
                policy_map={FailureClass.RECOVERABLE: FailurePolicy(max_retries=2, backoff_seconds=0.05)},
            )
            first = await runner.run(pipeline, Mail(text=INVOICE), run_id="mail-118")
            tell("Monday, the ledger is down", first)
            ledger_is_up = True
            second = await runner.run(pipeline, Mail(text=INVOICE), run_id="mail-118", resume=True)
            tell("Tuesday, the same run again", second)
        await client.close()
    print(f"\nThe model was asked {calls['extract']} times in all: on Tuesday not at all.")
    return second


def tell(title: str, result: ExecutionResult) -> None:
    print(f"\n{title}: {result.status}, ${result.total_cost_usd:.6f} for this call")
    for event in result.trace:
        print(f"  {event.node_id:8s} attempt {event.attempt}: {event.outcome} {event.reason or ''}".rstrip())
    print(f"  {result.final_state!r}")


if __name__ == "__main__":
    asyncio.run(main())
