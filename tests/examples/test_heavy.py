"""The examples with an embedding model, a FastAPI service and a notebook run without a network."""

import asyncio
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import nbformat
import pytest
import uvicorn
from arq import Retry, create_pool
from arq.connections import RedisSettings
from arq.worker import Worker
from nbclient import NotebookClient
from tests.docs.blocks import reader_env, run_lines, run_python, shown
from tests.kit import passing
from tests.providers.server import Answer, serving
from tests.servers import RedisServer
from tests.servers_temporal import TemporalServer

from stroma import Flow, NodeHooks, stroma_flow

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SYSTEMS = ("stroma", "pydantic_ai", "langgraph", "dbos", "temporal")
#: By task of the comparison: the arguments of each start of a program, what all starts print, and the calls.
STARTS = {"hello": [""], "invoice": ["", ""], "agent": ["", "approve", ""]}
EXPECTED = {
    "hello": [
        "sort 1 failure",
        "sort 2 success",
        "reply 1 success",
        "topic='billing' reply='We look into it: My invoice is wrong'",
    ],
    "invoice": ["euros=12 $0.000288"],
    "agent": ["refund order 17?", "It is refunded."],
}
CALLS = {
    "hello": [],
    "invoice": ["extract", "extract", "extract"],
    "agent": ["model", "find_order", "model", "refund", "model"],
}
# Whatever asks a host by its name, or any host but this one, gets an error.
OFFLINE = """
import socket
def refuse(*arguments, **options):
    raise OSError("this example has no network")
socket.getaddrinfo = refuse
socket.create_connection = refuse
"""


def run(name: str, *arguments: str, home: Path) -> str:
    """What the example prints, in a process without a network and with an empty home."""
    (home / "sitecustomize.py").write_text(OFFLINE)
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(home)}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=100, cwd=home
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_folder_is_embedded_once(tmp_path: Path) -> None:
    """The packaged model embeds every file; afterwards only the changed one, and the best hit answers."""
    folder = tmp_path / "documents"
    folder.mkdir()
    texts = {
        "crash": "A killed process loses nothing that was finished: the work is kept.",
        "price": "Tokens are priced by model, cached input costs less.",
        "soup": "Peel the potatoes, chop an onion, simmer for an hour.",
    }
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text)
    first, second = run("rag_ingestion.py", str(folder), home=tmp_path).split(
        "Again, after one file has changed:"
    )
    assert "left out: ValueError: empty.md is empty" in first
    assert "3 files, 8 calls" in first  # Two for each file; the empty one is tried twice.
    assert re.search(r"^  0\.\d\d  (\w+)\.md", first, re.MULTILINE)[1] == "crash"
    assert "4 files, 2 calls" in second


def test_the_service_without_a_server(tmp_path: Path) -> None:
    """Asked twice, it calls the nodes once."""
    first, second = run("fastapi_service.py", "--once", home=tmp_path).split("second request:")
    assert first.count("event: node_success") == 2
    assert second.count("event: node_skipped") == 2
    assert "event: node_start" not in second
    assert second.count("event: run_end") == 1


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def imported(name: str) -> Any:
    """Return the module of an example. FastAPI's annotations are looked up in it."""
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[str]:
    """Where the service of the example is served."""
    module = imported("fastapi_service")
    server = uvicorn.Server(uvicorn.Config(module.service(tmp_path / "runs.db"), port=0, log_level="error"))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(60):
        while not server.started:
            await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


async def test_a_task_queue_drives_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of arq drive a run over its sleep to its end, and a task that comes twice calls no step twice."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs.db"))
    server = RedisServer()
    try:
        module = imported("dispatch_arq")
        settings = RedisSettings(unix_socket_path=server.socket)
        queue = await create_pool(settings)
        calls: list[str] = []
        for _ in range(2):
            await module.submit(queue, "r", module.Letter(text="hello"))
        module.runner.config = module.runner.config.model_copy(
            update={"hooks": NodeHooks(on_node_start=partial(note, calls))}
        )
        worker = Worker(
            [module.drive],
            redis_settings=settings,
            burst=True,
            poll_delay=0.05,
            handle_signals=False,
            max_burst_jobs=9,
        )
        waiting = asyncio.ensure_future(module.runner.handle("r").result(timeout=60))
        while not waiting.done():
            await worker.async_run()
        result = await waiting
        assert (str(result.status), result.output) == ("RESUMED", module.Letter(text="sent: hello"))
        assert calls.count("send") == 1
        await worker.close()
        await queue.aclose()
    finally:
        server.close()


class Queued:
    """A queue of arq that notes its tasks."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Any, ...]] = []

    async def enqueue_job(self, *task: Any, **options: Any) -> None:
        self.tasks.append((*task, options["_defer_until"]))


async def test_a_task_queue_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task enqueues a blocked run for the time of the next try, and is repeated if the store fails."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs.db"))
    module, queue = imported("dispatch_arq"), Queued()

    @stroma_flow("remind", version="2", input=module.Letter, output=module.Letter)
    async def changed(flow: Flow, letter: Any) -> Any:
        return letter

    await module.runner.submit(changed, module.Letter(text="hello"), run_id="r")
    submitted = datetime.now(UTC)
    assert await module.drive({"redis": queue}, "r") == "Blocked"
    ((*task, until),) = queue.tasks
    assert task == ["drive", "r"]
    assert until > submitted
    broken = tmp_path / "broken.db"
    broken.write_text("not a database")
    monkeypatch.setenv("RUNS", str(broken))
    with pytest.raises(Retry):
        await imported("dispatch_arq").drive({"redis": queue}, "r")


SLOW = """
import asyncio, pathlib
import dispatch_arq
from dispatch_arq import WorkerSettings
from stroma import Flow, NodeHooks, stroma_flow

async def wait(run_id, node_id, input_state):
    pathlib.Path("entered").touch()
    await asyncio.sleep(1)

update = {"hooks": NodeHooks(on_node_start=wait), "inline_wait_seconds": 5}
dispatch_arq.runner.config = dispatch_arq.runner.config.model_copy(update=update)
"""


async def test_the_end_of_a_worker_cancels_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At SIGTERM arq cancels its tasks; the current run ends its step, is not CANCELLED, and is repeated."""
    monkeypatch.setenv("RUNS", str(tmp_path / "runs.db"))
    (tmp_path / "slow.py").write_text(SLOW)
    server = RedisServer()
    try:
        module = imported("dispatch_arq")
        queue = await create_pool(RedisSettings(unix_socket_path=server.socket))
        await module.submit(queue, "r", module.Letter(text="hello"))
        folders = os.pathsep.join([str(EXAMPLES), str(tmp_path)])
        env = {**os.environ, "PYTHONPATH": folders, "REDIS_URL": server.url}
        command = [sys.executable, "-m", "arq", "slow.WorkerSettings"]
        worker = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
        async with asyncio.timeout(60):
            while not (tmp_path / "entered").exists():
                assert worker.poll() is None, worker.communicate()
                await asyncio.sleep(0.02)
        worker.send_signal(signal.SIGTERM)
        err = (await asyncio.to_thread(worker.communicate, timeout=60))[1]
        assert await module.runner.handle("r").status() in ("INTERRUPTED", "COMPLETED"), err
        assert await queue.zcard("arq:queue") == 1, err
        await queue.aclose()
    finally:
        server.close()


def test_the_page_about_fastapi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service, its client and its worker do what the page shows."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "howto" / "approval-service.md").read_text("utf-8")
    printed = {line: lines for line, _, lines in run_python(text, "service_fastapi") if lines}
    assert list(printed.values()) == [*shown(text).values()]


def test_the_page_about_requests(tmp_path: Path) -> None:
    """The service with a worker in its process streams an answer as the page shows, and reports failures."""
    chunk = {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o-mini",
        "choices": [],
    }
    parts = [{"index": 0, "delta": {"content": text}, "finish_reason": None} for text in ("Be", "cause.")]
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    chunks = [*({**chunk, "choices": [part]} for part in parts), {**chunk, "usage": usage}]
    text = (ROOT / "docs" / "howto" / "start-from-a-request.md").read_text("utf-8")
    with serving() as provider:
        refused = Answer(400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
        url = provider.url(Answer(body="".join(f"data: {json.dumps(one)}\n\n" for one in chunks)), refused)
        env = reader_env() | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "any"}
        run_lines(text, "start-from-a-request", tmp_path, env)


@pytest.fixture(scope="module")
def temporal() -> Iterator[str]:
    server = TemporalServer()
    yield server.address
    server.kill()


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("task", EXPECTED)
def test_programs_of_the_comparison_agree(task: str, system: str, temporal: str, tmp_path: Path) -> None:
    """Each program of a task prints the same, and repeats nothing after a kill."""
    env = {**os.environ, "TEMPORAL": temporal}
    printed: list[str] = []
    for argument in STARTS[task]:
        is_killed = argument == "approve" or (task == "invoice" and not printed)
        if is_killed:
            printed.append("")
        command = [sys.executable, str(EXAMPLES / "comparison" / f"{task}_{system}.py"), argument]
        done = subprocess.run(
            command,
            env=env | ({"CRASH": "1"} if is_killed else {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
            cwd=tmp_path,
        )
        assert (done.returncode == -signal.SIGKILL) == is_killed, done.stderr
        printed += done.stdout.splitlines()
    assert [line for line in printed if line] == EXPECTED[task]
    log = tmp_path / "calls.log"
    calls = [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []
    assert calls == CALLS[task]


async def note(calls: list[str], run_id: str, node_id: str, input_state: dict[str, Any]) -> None:
    calls.append(node_id)


async def test_the_service_behind_a_real_server(site: str) -> None:
    """A run is streamed over HTTP; a reader that leaves in the middle gets the rest when it asks again."""
    async with httpx.AsyncClient(timeout=60) as client:
        async with client.stream("PUT", f"{site}/reports/owls") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line == "event: node_success":
                    break
        async with asyncio.timeout(60):
            # Until the server has seen that its reader is gone, the run has an owner.
            while (again := await client.put(f"{site}/reports/owls")).status_code == 409:
                await asyncio.sleep(0.01)
    result = events(again.text)
    assert [event["kind"] for event in result][:2] == ["run_start", "node_skipped"]
    assert result[-1]["details"]["final_state"] == {"text": "owls: What they eat, Where they sleep"}


def test_the_notebook_draws_its_run() -> None:
    """Every cell runs; the result is shown as a picture with the failed attempt."""
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(shown) == 1
    assert "<svg" in shown[0]
    assert "the provider is slow today" in shown[0]
    assert "COMPLETED" in outputs[-1].text


def test_the_notebook_is_kept_with_its_pictures() -> None:
    """Who reads it without running it sees the run, too."""
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert any(
        "text/html" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", [])
    )


async def test_a_result_is_the_answer_of_an_endpoint() -> None:
    """A FastAPI endpoint annotated `-> ExecutionResult[Out]` answers with the fields of its schema."""
    from fastapi import FastAPI
    from pydantic import BaseModel

    from stroma import ExecutionResult, StromaRunner

    class Text(BaseModel):
        text: str

    runner = StromaRunner.quick()

    ask = runner.node("ask", input=Text, output=Text)(passing())
    app = FastAPI()

    async def answer() -> Any:
        return await runner.run([ask], Text(text="hello"), run_id="r1")

    app.get("/answer", response_model=ExecutionResult[Text])(answer)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        body = (await client.get("/answer")).json()
        schema = (await client.get("/openapi.json")).json()
    assert (body["run_id"], body["status"], body["final_state"]) == ("r1", "COMPLETED", {"text": "hello"})
    assert body["failure"] is None
    (fields,) = [
        one["properties"] for name, one in schema["components"]["schemas"].items() if "Result" in name
    ]
    assert set(fields) == set(body)
