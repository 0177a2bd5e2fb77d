"""A web page that shows a run as it happens: Starlette, server-sent events, and a run that ends with its reader.

    pip install 'stroma-runner[ui]'
    python examples/streaming.py

Then open http://127.0.0.1:8000, or watch with: curl -N 'http://127.0.0.1:8000/runs?topic=otters'

Close the page in the middle and the run is cancelled: its commits stay in runs.db, and the same id with
``resume=True`` continues there. A run that continues without its reader: ``runner.submit`` and ``follow``.
"""

import asyncio
from collections.abc import AsyncIterator

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, StreamingResponse
from starlette.routing import Route

from stroma import NodeContract, Pipeline, SQLiteStore, StromaRunner, map_over, stroma_node
from stroma.wire import SSE_HEADERS, sse


class Topic(BaseModel):
    topic: str


class Outline(BaseModel):
    topic: str
    questions: list[str]


class Question(BaseModel):
    question: str


class Answer(BaseModel):
    answer: str


@stroma_node("outline", NodeContract(node_id="outline", input_schema=Topic, output_schema=Outline))
async def outline(state: Topic) -> dict[str, object]:
    await asyncio.sleep(0.2)  # A model that takes its time.
    return {
        "topic": state.topic,
        "questions": [f"What do {state.topic} do at {hour}?" for hour in range(8, 18)],
    }


@stroma_node
async def answer(state: Question) -> Answer:
    await asyncio.sleep(0.2)
    return Answer(answer=f"{state.question} Nobody knows.")


pipeline = Pipeline("page", [outline, map_over("questions", answer, into="answers", max_concurrency=2)])
runner = StromaRunner.quick(store=SQLiteStore("runs.db"))

PAGE = """<!doctype html><title>A run</title><pre id="log"></pre><script>
const source = new EventSource("/runs?topic=otters"), log = document.getElementById("log")
const show = e => { const d = JSON.parse(e.data); log.append(`${d.number} ${d.kind} ${d.node_id ?? ""} ${d.branch}\\n`) }
for (const kind of ["run_start", "node_start", "node_success", "node_failure", "map_progress"])
  source.addEventListener(kind, show)
source.addEventListener("run_end", e => { show(e); source.close() })
</script>"""


async def page(request: Request) -> HTMLResponse:
    return HTMLResponse(PAGE)


async def runs(request: Request) -> StreamingResponse:
    topic = Topic(topic=request.query_params.get("topic", "otters"))

    async def messages() -> AsyncIterator[str]:
        # A reader that leaves cancels this generator; leaving the stream then ends the run.
        async with runner.stream(pipeline, topic) as stream:
            async for message in sse(stream):
                yield message

    return StreamingResponse(messages(), headers=SSE_HEADERS)


app = Starlette(routes=[Route("/", page), Route("/runs", runs)])

if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
