"""A FastAPI service that streams a run, and returns the same run to a repeated request.

    pip install stroma-runner fastapi uvicorn
    python examples/fastapi_service.py
    curl -N -X PUT http://127.0.0.1:8000/reports/otters     # in another terminal, as often as you like

The id in the address is the run's id, so a client that lost its connection repeats its request and gets the
rest: what is committed is not paid for again. The run ends with its connection: for runs that continue without
their reader see docs/howto/start-from-a-request.md. Without a terminal to spare: python examples/fastapi_service.py
--once
"""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from stroma import Pipeline, RunBusy, SQLiteStore, StreamEvent, StromaRunner, stroma_node
from stroma.wire import SSE_HEADERS, sse


class Topic(BaseModel):
    topic: str


class Outline(BaseModel):
    topic: str
    headings: list[str]


class Report(BaseModel):
    text: str


@stroma_node
async def outline(state: Topic) -> Outline:
    await asyncio.sleep(0.05)  # A model that takes its time.
    return Outline(topic=state.topic, headings=["What they eat", "Where they sleep"])


@stroma_node
async def write(state: Outline) -> Report:
    await asyncio.sleep(0.05)
    return Report(text=f"{state.topic}: " + ", ".join(state.headings))


report = Pipeline("report", [outline, write])


def service(database: Path) -> FastAPI:
    store = SQLiteStore(database)
    runner = StromaRunner.quick(store=store)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        # A deploy: nodes in flight end and are committed, and no other starts; the next process continues
        # their runs.
        await runner.shutdown(drain_seconds=10)
        await store.aclose()

    app = FastAPI(title="Reports", lifespan=lifespan)

    @app.put("/reports/{topic}")
    async def stream(topic: str) -> StreamingResponse:
        run = runner.stream(report, Topic(topic=topic), run_id=topic, resume=True)
        events = aiter(run)
        try:
            # Asked for before the answer begins, so that what run() would raise becomes a status and not a
            # broken stream.
            first = await anext(events)
        except RunBusy as error:
            raise HTTPException(409, str(error)) from error

        async def parts() -> AsyncIterator[StreamEvent]:
            # A client that leaves cancels this generator, and with it the run; its commits stay.
            async with run:
                yield first
                async for event in events:
                    yield event

        return StreamingResponse(sse(parts()), headers=SSE_HEADERS)

    return app


async def once(database: Path) -> None:
    """The service without a server, asked twice."""
    import httpx

    transport = httpx.ASGITransport(app=service(database))
    async with httpx.AsyncClient(transport=transport, base_url="http://reports") as client:
        for attempt in ("first", "second"):
            print(f"{attempt} request:")
            async with client.stream("PUT", "/reports/otters") as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("event:"):
                        print(f"  {line}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--once"]:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(once(Path(folder, "runs.db")))
    else:
        import uvicorn

        uvicorn.run(service(Path("runs.db")))
