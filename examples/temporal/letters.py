"""The pipeline of the examples beside this file. It knows nothing of Temporal: `stroma run letters.py:pipeline` runs it here.

The nodes stand in for calls of a model.
"""

import asyncio

from pydantic import BaseModel

from stroma import FailureClass, FailurePolicy, NodeContract, Pipeline, RunConfig, map_over, stroma_node


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


@stroma_node("read", NodeContract(node_id="read", input_schema=Batch, output_schema=Batch))
async def read(state: Batch) -> dict[str, list[str]]:
    return {"letters": [letter.strip() for letter in state.letters]}


@stroma_node("answer", NodeContract(node_id="answer", input_schema=Letter, output_schema=Answer))
async def answer(state: Letter) -> dict[str, str]:
    await asyncio.sleep(0.05)
    return {"answer": f"Thank you for: {state.letter}"}


@stroma_node("digest", NodeContract(node_id="digest", input_schema=Answered, output_schema=Digest))
async def digest(state: Answered) -> dict[str, int]:
    return {"words": sum(len(one.answer.split()) for one in state.answers)}


pipeline = Pipeline(
    "letters",
    [read, map_over("letters", answer, into="answers", max_concurrency=20), digest],
    config=RunConfig(
        policy_map={FailureClass.RECOVERABLE: FailurePolicy(max_retries=3, backoff_seconds=1.0)}
    ),
)
