"""The pipeline of the examples beside this file. It knows nothing of Temporal: `stroma run letters.py:pipeline` runs it here.

The nodes stand in for calls of a model.
"""

import asyncio

from pydantic import BaseModel

from stroma import FailureClass, FailurePolicy, Pipeline, RunConfig, map_over, stroma_node


class Batch(BaseModel):
    letters: list[str]


class Letter(BaseModel):
    letter: str


class Answer(BaseModel):
    answer: str


class Answered(BaseModel):
    answers: list[Answer]


class Digest(BaseModel):
    words: int


@stroma_node
async def read(state: Batch) -> Batch:
    return Batch(letters=[letter.strip() for letter in state.letters])


@stroma_node
async def answer(state: Letter) -> Answer:
    await asyncio.sleep(0.05)
    return Answer(answer=f"Thank you for: {state.letter}")


@stroma_node
async def digest(state: Answered) -> Digest:
    return Digest(words=sum(len(one.answer.split()) for one in state.answers))


pipeline = Pipeline(
    "letters",
    [read, map_over("letters", answer, into="answers", max_concurrency=20), digest],
    config=RunConfig(
        policy_map={FailureClass.RECOVERABLE: FailurePolicy(max_retries=3, backoff_seconds=1.0)}
    ),
)
