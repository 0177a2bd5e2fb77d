"""For the Python of a clean environment with the wheel: ``python -I smoke.py EXTRA``. No pytest."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import BaseModel

import stroma

FRAMEWORKS = (
    "agent_framework",
    "claude_agent_sdk",
    "crewai",
    "deepagents",
    "dspy",
    "google_adk",
    "haystack",
    "langchain",
    "langgraph",
    "litellm",
    "llama_index",
    "openai_agents",
    "pydantic_ai",
)


class Text(BaseModel):
    text: str


class Count(BaseModel):
    words: int


def pipeline(calls: list[str]) -> stroma.Pipeline:
    @stroma.stroma_node("count", stroma.NodeContract(node_id="count", input_schema=Text, output_schema=Count))
    async def count(state: Text) -> tuple[dict[str, int], int, int, str]:
        calls.append(state.text)
        if len(calls) == 1:
            raise TimeoutError("once")
        return {"words": len(state.text.split())}, 100, 10, "gpt-4o-mini"

    return stroma.Pipeline("smoke", [count])


async def run(**options: object) -> stroma.ExecutionResult:
    """A retry, a price, a commit, and a second run of the id that calls nothing."""
    calls: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        async with stroma.SQLiteStore(Path(folder, "runs.db")) as store:
            runner = stroma.StromaRunner.quick(store=store, **options)
            nodes = pipeline(calls)
            result = await runner.run(nodes, Text(text="three small words"), run_id="smoke")
            again = await runner.run(nodes, Text(text="three small words"), run_id="smoke", resume=True)
            await runner.aclose()
    assert (str(result.status), str(again.status)) == ("COMPLETED", "RESUMED"), (result, again, calls)
    assert len(calls) == 2, (result, again, calls)
    assert result.total_cost_usd > 0
    assert again.final_state == Count(words=3)
    return result


def command(*arguments: str) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "stroma"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"stroma {arguments}: {done.returncode}\n{done.stderr}"
    return done.stdout


def core() -> None:
    for name in stroma.__all__:
        getattr(stroma, name)
    assert Path(stroma.__file__).with_name("py.typed").exists()
    assert asyncio.run(run()).total_tokens == 110


def bare() -> None:
    """Without extras there is nothing but the core's own, and what is missing says how to get it."""
    assert importlib.util.find_spec("click") is None
    for needs, make in {
        "redis": lambda: stroma.RedisStore("redis://127.0.0.1:1"),
        "postgres": lambda: stroma.PostgresStore("postgresql://127.0.0.1:1/x"),
        "prometheus": lambda: importlib.import_module("stroma.telemetry").prometheus_hooks(),
        "otel": lambda: importlib.import_module("stroma.telemetry").otel_hooks(),
        "sentry": lambda: importlib.import_module("stroma.telemetry").sentry_hooks(),
        "datadog": lambda: importlib.import_module("stroma.telemetry").datadog_hooks(),
    }.items():
        message = "nothing was missing"
        try:
            make()
        except ImportError as error:
            message = str(error)
        assert f"stroma-runner[{needs}]" in message, message
    done = subprocess.run(
        [str(Path(sys.executable).parent / "stroma")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "stroma-runner[cli]" in done.stderr, done.stderr


def cli() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "flow.py").write_text(
            "from pydantic import BaseModel\n"
            "from stroma import NodeContract, Pipeline, stroma_node\n"
            "class N(BaseModel):\n    n: int\n"
            "@stroma_node('double', NodeContract(node_id='double', input_schema=N, output_schema=N))\n"
            "async def double(state: N) -> dict:\n    return {'n': 2 * state.n}\n"
            "pipeline = Pipeline('double', [double])\n"
        )
        database = str(Path(folder, "runs.db"))
        report = command("run", f"{folder}/flow.py:pipeline", '{"n": 21}', "--db", database, "--json")
        assert "42" in report, report
        assert json.loads(command("runs", "--db", database, "--json"))


def demo() -> None:
    cli()
    assert command("demo").strip()


def redis() -> None:
    stroma.RedisStore("redis://127.0.0.1:1")


def postgres() -> None:
    importlib.import_module("psycopg")
    stroma.PostgresStore("postgresql://127.0.0.1:1/x")


def blobs() -> None:
    importlib.import_module("fsspec")


def otel() -> None:
    trace = importlib.import_module("opentelemetry.sdk.trace")
    export = importlib.import_module("opentelemetry.sdk.trace.export")
    memory = importlib.import_module(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter"
    ).InMemorySpanExporter()
    provider = trace.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    hooks = importlib.import_module("stroma.telemetry").otel_hooks(tracer=provider)
    asyncio.run(run(hooks=hooks))
    assert "stroma.node count" in {span.name for span in memory.get_finished_spans()}


def prometheus() -> None:
    client = importlib.import_module("prometheus_client")
    registry = client.CollectorRegistry()
    asyncio.run(run(hooks=importlib.import_module("stroma.telemetry").prometheus_hooks(registry=registry)))
    assert "stroma_runs_total" in client.generate_latest(registry).decode()


def datadog() -> None:
    importlib.import_module("ddtrace").tracer.enabled = False
    asyncio.run(run(hooks=importlib.import_module("stroma.telemetry").datadog_hooks()))


def sentry() -> None:
    importlib.import_module("sentry_sdk").init()
    asyncio.run(run(hooks=importlib.import_module("stroma.telemetry").sentry_hooks()))


def ui() -> None:
    from stroma.ui import Settings, make_app

    async def status() -> int:
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        with tempfile.TemporaryDirectory() as folder:
            async with stroma.SQLiteStore(Path(folder, "runs.db")) as store:
                app = make_app(Settings(store=store, name="runs.db", hosts=["127.0.0.1:8000"]))
                scope = {
                    "type": "http",
                    "asgi": {"version": "3.0"},
                    "http_version": "1.1",
                    "method": "GET",
                    "scheme": "http",
                    "path": "/",
                    "raw_path": b"/",
                    "query_string": b"",
                    "root_path": "",
                    "headers": [(b"host", b"127.0.0.1:8000")],
                    "server": ("127.0.0.1", 8000),
                    "client": ("127.0.0.1", 1),
                }
                await app(scope, receive, send)
        return int(str(sent[0]["status"]))

    assert asyncio.run(status()) == 200


def temporal() -> None:
    importlib.import_module("stroma.drivers.temporal")


def mcp() -> None:
    importlib.import_module("stroma.adapters.mcp")
    assert "--db" in command("mcp", "--help")


def testing() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_flow.py").write_text(
            "from pydantic import BaseModel\n"
            "from stroma import NodeContract, StromaRunner, stroma_node\n"
            "from stroma.testing import assert_contract_holds, assert_resumable_sync\n"
            "class N(BaseModel):\n    n: int\n"
            "@stroma_node('double', NodeContract(node_id='double', input_schema=N, output_schema=N))\n"
            "async def double(state: N) -> dict:\n    return {'n': 2 * state.n}\n"
            "def test_it_resumes():\n    assert_resumable_sync([double], N(n=1))\n"
            "def test_it_keeps_its_contract():\n    assert_contract_holds(double, examples=20)\n"
            "def test_time(stroma_clock):\n    StromaRunner.quick().run_sync([double], "
            "N(n=1)).raise_for_status()\n"
        )
        output = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "3 passed" in output.stdout, output.stdout + output.stderr


def everything() -> None:
    for check in (cli, redis, postgres, blobs, otel, prometheus, sentry, ui, temporal, mcp):
        check()


_NAMED = (cli, demo, redis, postgres, blobs, otel, prometheus, datadog, sentry, ui, temporal, mcp, testing)
CHECKS = {"bare": bare, "all": everything} | {check.__name__: check for check in _NAMED}


def main(extra: str) -> None:
    core()
    if extra.replace("-", "_") in FRAMEWORKS:
        importlib.import_module(f"stroma.adapters.{extra.replace('-', '_')}")
        return
    CHECKS[extra]()


if __name__ == "__main__":
    main(sys.argv[1])
