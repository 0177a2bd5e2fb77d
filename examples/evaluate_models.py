"""Two models at the same task: what each gets right, what it costs, and where exactly they differ.

    python examples/evaluate_models.py

Needs `pip install "stroma-runner[cli]"`, and neither a key nor a network: two scripted "models" answer in
place of real ones.
"""

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import BaseModel

from stroma import ExecutionResult, Pipeline, SQLiteStore, StromaRunner, map_over, stroma_node

TICKETS = {
    "The invoice is wrong": "billing",
    "It crashes when I press save": "bug",
    "I was charged twice": "billing",
    "How do I export my data?": "question",
    "Why does it crash, and who pays me back?": "bug",
}


class Tickets(BaseModel):
    texts: list[str]


class Ticket(BaseModel):
    text: str


class Label(BaseModel):
    label: str


def small(text: str) -> tuple[str, int]:
    return (
        "billing" if "charged" in text or "pays" in text else "bug" if "crash" in text else "question"
    ), 20


def large(text: str) -> tuple[str, int]:
    words = ("crash", "bug"), ("invoice", "billing"), ("charged", "billing")
    return next((label for word, label in words if word in text), "question"), 60


def evaluation(model: str) -> Pipeline:
    answer = {"gpt-4o-mini": small, "gpt-4o": large}[model]

    @stroma_node
    async def classify(ticket: Ticket) -> tuple[Label, int, int, str]:
        label, tokens = answer(ticket.text)
        # (output, input tokens, output tokens, model): with the response of a real client, (output, response)
        # says the same.
        return Label(label=label), 40, tokens, model

    return Pipeline("evaluation", [map_over("texts", classify, into="labels", max_concurrency=4)])


async def main(database: Path) -> None:
    async with SQLiteStore(database) as store:
        runner = StromaRunner.quick(store=store)
        for model in ("gpt-4o-mini", "gpt-4o"):
            # The model's name is the run's id, so that the runs can be asked for by it, and compared a year
            # from now.
            result = await runner.run(evaluation(model), Tickets(texts=list(TICKETS)), run_id=model)
            print(f"{model:12s} {right(result)} of {len(TICKETS)} right for ${result.total_cost_usd:.6f}")


def right(result: ExecutionResult) -> int:
    labels = [label.label for label in result.final_state.labels]  # type: ignore[union-attr]
    return sum(label == wanted for label, wanted in zip(labels, TICKETS.values(), strict=True))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder, "runs.db")
        asyncio.run(main(database))
        command = ["diff", "gpt-4o-mini", "gpt-4o", "--only-changed", "--db", str(database)]
        print("\n$ stroma " + " ".join(command[:-2]), flush=True)
        done = subprocess.run([sys.executable, "-m", "stroma", *command], check=False)
        print(f"\nexit code {done.returncode}: 6 says that they differ, so that a script can stop there")
