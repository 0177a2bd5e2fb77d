"""A program whose answer breaks a contract: the model is asked again, and the bill has both answers.

    python examples/adapter_dspy.py

Needs `pip install "stroma-runner[dspy]"`, and neither a key nor a network. Prints:

> 4 degrees
> answer: failure, success
"""

import dspy
from dspy.utils import DummyLM
from pydantic import BaseModel, Field

from stroma import StromaRunner
from stroma.adapters import Guard
from stroma.adapters.dspy import attach


class Question(BaseModel):
    question: str


class Plausible(BaseModel):
    celsius: int = Field(ge=-90, le=60)


class Forecast(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.answer = dspy.Predict("question -> celsius: int")

    def forward(self, question: str) -> dspy.Prediction:
        return self.answer(question=question)


guard = Guard(StromaRunner.quick(contract_retries={"answer": 1}))
program = attach(Forecast(), guard, {"answer": (Question, Plausible)})
with dspy.context(lm=DummyLM([{"celsius": "-300"}, {"celsius": "4"}])):
    print(f"> {program(question='How warm is it?').celsius} degrees")

assert guard.last is not None
outcomes = [event.outcome for event in guard.last.ctx.trace.walk() if event.node_id == "answer"]
print("> answer:", ", ".join(outcomes))
