"""A stream behind a real web server: examples/streaming.py under uvicorn, read over a socket."""

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

EXAMPLE = Path(__file__).parents[2] / "examples" / "streaming.py"


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Any, str]]:
    """The example as a module, and where it is served."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("streaming_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = uvicorn.Server(uvicorn.Config(module.app, port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(60):
        while not server.started:
            await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield module, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving
        await module.runner.checkpoint_manager.store.aclose()


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def test_a_run_over_http(site: tuple[Any, str]) -> None:
    """A browser gets every event of the run as a message, and the result in the last one."""
    module, url = site
    async with httpx.AsyncClient(timeout=60) as client:
        assert "EventSource" in (await client.get(url)).text
        async with client.stream("GET", f"{url}/runs?topic=owls") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            findings = [event async for event in events(response)]
    assert [event["number"] for event in findings] == list(range(1, len(findings) + 1))
    kinds = [event["kind"] for event in findings]
    assert (kinds[0], kinds[-1]) == ("run_start", "run_end")
    assert kinds.count("node_start") == kinds.count("node_success") == 12
    assert findings[-1]["details"]["status"] == "COMPLETED"
    assert len(findings[-1]["details"]["final_state"]["answers"]) == 10
    assert not module.runner._live.runs


async def test_a_browser_that_leaves(site: tuple[Any, str]) -> None:
    """A browser that leaves in the middle ends the run: it is CANCELLED in the store; nothing is left."""
    module, url = site
    run_id = ""
    async with httpx.AsyncClient(timeout=60) as client, client.stream("GET", f"{url}/runs") as response:
        async for event in events(response):
            run_id = event["run_id"]
            if event["kind"] == "node_success" and event["node_id"] == "answer":
                break
    async with asyncio.timeout(60):
        while module.runner._live.runs:
            await asyncio.sleep(0.01)
    store = module.runner.checkpoint_manager.store
    record = await asyncio.to_thread(store.get_run, run_id)
    assert (record.status, record.holder) == ("CANCELLED", None)
    again = await module.runner.run(module.pipeline, module.Topic(topic="otters"), run_id=run_id, resume=True)
    assert again.status == "RESUMED"
