"""What the three research agents share: their question and report, the public web, and how they are run.

    python examples/research_pydantic_ai.py               # research_openai_agents.py, research_langgraph.py
    python examples/research_pydantic_ai.py worker        # as many as you like; kill them whenever you like
    python examples/research_pydantic_ai.py ask "Otters"  # submits a question
    stroma ui --db research.db                            # shows the text as it arrives, and asks for approval

The first line does all of it in one process, in memory. The others share research.db, or the store in STROMA_DB.
"""

import asyncio
import os
import sys

from pydantic import BaseModel

from stroma import FlowFunction, InMemoryStore, NotDone, StromaRunner

#: The public web, of one process here: reports by the idempotency keys under which they were published.
PUBLISHED: dict[str, str] = {}


class Question(BaseModel):
    topic: str


class Report(BaseModel):
    text: str


def was_published(_: object, key: str) -> str | NotDone:
    """Answer for an attempt to publish that nobody has seen the end of."""
    return f"published as number {[*PUBLISHED].index(key) + 1}" if key in PUBLISHED else NotDone()


def publish(text: str, key: str) -> str:
    PUBLISHED[key] = text
    return f"published as number {len(PUBLISHED)}"


def main(research: FlowFunction[Question, Report], approval: object) -> None:
    """Run a flow as the command line says."""
    is_demo = len(sys.argv) == 1
    store = InMemoryStore() if is_demo else os.environ.get("STROMA_DB", "sqlite:///research.db")
    runner = StromaRunner.quick(store=store, events="store", lease_seconds=5)
    if is_demo:
        asyncio.run(demo(runner, research, approval))
    elif sys.argv[1] == "worker":
        asyncio.run(runner.serve(research, poll_seconds=0.2))
    else:
        print(asyncio.run(runner.submit(research, Question(topic=sys.argv[2]))).run_id)


async def demo(runner: StromaRunner, research: FlowFunction[Question, Report], approval: object) -> None:
    worker = asyncio.create_task(runner.serve(research, poll_seconds=0.05))
    run, live = await runner.submit(research, Question(topic="otters")), ""
    async for event in run.follow():
        if event.kind == "node_event":
            live += f"{event.data}|"  # A page shows it at once.
        elif event.kind == "node_success" and event.node_id != "research":
            print(f"> {event.node_id} {live}".rstrip())
            live = ""
        elif event.kind == "run_suspended":
            print(f"> {event.details['suspended'][0]}: yes")
            await runner.signal(run.run_id, approval)
    result = await run.result()
    print(f"> {result.output.text}; the web has {list(PUBLISHED.values())}")
    await runner.shutdown()
    await worker
