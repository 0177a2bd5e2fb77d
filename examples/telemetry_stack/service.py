"""A service that handles letters all day, some of them badly: something to look at in Grafana and Phoenix.

    docker compose up --build

Metrics are at port 9464, traces go to OTEL_EXPORTER_OTLP_TRACES_ENDPOINT. `python service.py 3` ends after
three letters.
"""

import asyncio
import itertools
import os
import random
import sys

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import start_http_server
from pydantic import BaseModel

from stroma import FailureClass, FailurePolicy, StromaRunner, Usage, parallel
from stroma.telemetry import log_hooks, otel_hooks, prometheus_hooks

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
runner = StromaRunner.quick(
    hooks=otel_hooks(tracer=provider, content="redacted") | prometheus_hooks() | log_hooks(),
    policy_map={FailureClass.RECOVERABLE: FailurePolicy(max_retries=2, backoff_seconds=0.2)},
    pipeline="letters",
)


class Letter(BaseModel):
    number: int


class Tone(BaseModel):
    tone: str


class Answer(BaseModel):
    answer: str


class Reply(BaseModel):
    tone: str
    answer: str


async def call_a_model(name: str) -> None:
    await asyncio.sleep(random.uniform(0.05, 0.4))
    if random.random() < 0.1:
        raise ConnectionError(f"{name} is overloaded")


@runner.node
async def tone(state: Letter) -> tuple[Tone, Usage]:
    await call_a_model("tone")
    return Tone(tone=random.choice(["warm", "cross"])), Usage(
        input_tokens=210, output_tokens=4, model="gpt-4o-mini"
    )


@runner.node
async def answer(state: Letter) -> tuple[Answer, Usage]:
    await call_a_model("answer")
    return Answer(answer=f"Thank you for letter {state.number}."), Usage(
        input_tokens=480, output_tokens=90, model="gpt-4o"
    )


@runner.node
async def post(state: Reply) -> Reply:
    if random.random() < 0.05:
        raise PermissionError("the mail room is closed")
    return state


async def main(letters: int | None) -> None:
    for number in itertools.islice(itertools.count(1), letters):
        user = random.choice(["ada", "grace", "edsger"])
        await runner.run(
            [parallel(tone, answer), post], Letter(number=number), conversation=f"of {user}", user=user
        )
        await asyncio.sleep(0.5)
    await runner.aclose()
    provider.shutdown()


if __name__ == "__main__":
    start_http_server(int(os.environ.get("METRICS_PORT", "9464")))
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else None))
