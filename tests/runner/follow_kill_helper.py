"""The workers of tests/runner/test_follow_kill.py: processes that speak, and are killed."""

import asyncio
from typing import Any

from tests.kit import Num, Text, node
from tests.shared_stores import opened

from stroma import Pipeline, StromaRunner, current_node

PARTS = 10


def sentence_of(attempt_id: str) -> list[str]:
    """Return the parts of the sentence that an attempt says: no other attempt says any of them."""
    return [f"<{attempt_id} {i}>" for i in range(PARTS)]


async def speak(state: Any) -> Text:
    sentence = sentence_of(str(current_node().attempt_id))
    for part in sentence:
        current_node().emit(part)
        await asyncio.sleep(0.02)
    return Text(text="".join(sentence))


talk = Pipeline("talk", [node("first", speak, output=Text), node("second", speak, input=Text, output=Text)])


def work(kind: str, where: str, run_id: str) -> None:
    """Execute a run, or continue it; in a process of its own."""

    async def main() -> None:
        async with opened(kind, where) as store:
            runner = StromaRunner.quick(store=store, events="store", if_exists="resume")
            await runner.run(talk, Num(n=1), run_id=run_id)

    asyncio.run(main())
