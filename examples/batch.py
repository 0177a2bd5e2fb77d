"""10,000 reviews from a file into a file: killed half-way, and resumed: what was committed is not paid for again.

    python examples/batch.py            # or with another number of reviews: python examples/batch.py 500

Needs `pip install stroma-runner`, and neither a key nor a network. The memory it takes does not grow with the
number of items.
"""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import BaseModel

from stroma import (
    JsonLines,
    MapProgress,
    NodeHooks,
    Pipeline,
    SQLiteStore,
    StromaRunner,
    Usage,
    map_over,
    stroma_node,
)


class Review(BaseModel):
    text: str


class Verdict(BaseModel):
    positive: bool


class Nothing(BaseModel):
    pass


@stroma_node
async def judge(review: Review) -> tuple[Verdict, Usage]:
    await asyncio.sleep(0)  # A model that takes its time.
    if not review.text:
        raise ValueError("there is nothing to judge")
    return Verdict(positive="good" in review.text), Usage(
        input_tokens=30, output_tokens=2, model="gpt-4o-mini"
    )


async def work(folder: Path) -> None:
    # One review without a text must not end the whole batch: its failure is collected, beside the outputs.
    verdicts = map_over(
        JsonLines(str(folder / "reviews.jsonl")),
        judge,
        into=JsonLines(str(folder / "verdicts.jsonl")),
        max_concurrency=50,
        on_item_failure="collect",
    )

    async def on_progress(run_id: str, node_id: str, progress: MapProgress) -> None:
        print(
            f"{progress.done} of {progress.total or '?'} done, {progress.restored} of them before", flush=True
        )

    async with SQLiteStore(folder / "runs.db") as store:
        # On one machine, a process that was killed is known to be gone: its run is taken over at once.
        runner = StromaRunner.quick(store=store, hooks=NodeHooks(on_map_progress=on_progress))
        result = await runner.run(Pipeline("reviews", [verdicts]), Nothing(), run_id="reviews", resume=True)
    print(
        f"{result.status}: {result.failed_items} failed, this process paid ${result.total_cost_usd:.4f}",
        flush=True,
    )


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = ["a good book" if number % 3 else "a book" for number in range(count)]
        texts[count // 3] = ""
        (folder / "reviews.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        command = [sys.executable, __file__, "--work", name]

        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
            assert first.stdout is not None
            line = ""
            for line in first.stdout:
                if int(line.split()[0]) >= count // 4:
                    first.send_signal(signal.SIGKILL)
                    break
        print(f"The first process was killed at: {line.strip()}")

        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        print(f"The second one, at its end:      {done[-2]}\n{done[-1]}")
        outputs = (folder / "verdicts.jsonl").read_text().splitlines()
        failures = (folder / "verdicts.failures.jsonl").read_text().splitlines()
        print(f"{len(outputs)} verdicts, the first is {outputs[0]}; 1 failure: {failures[0][:80]}...")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        asyncio.run(work(Path(sys.argv[2])))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 10_000)
