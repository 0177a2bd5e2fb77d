"""A run whose process was killed: the process that resumes it writes the root that the first could not."""

import asyncio
import json
import os
import pathlib
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from tests.kit import Num, failing_with, passing, retry_policies, run_python
from tests.kit import Num as State
from tests.receivers.datadog import DatadogAgent
from tests.receivers.sentry import RecordedSentry

from stroma import Flow, Pipeline, RunStatus, SQLiteStore, StromaRunner, current_node, parallel
from stroma.engine.execution import running_agent
from stroma.telemetry import ExporterHooks, otel_hooks, sentry_hooks

pytest_plugins = ["tests.receivers.fixtures"]

#: A root that the caller has around its runs.
OUTER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class LinesExporter(SpanExporter):
    """Appends each span to a file at once, so that those of a killed process are kept."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._path.open("a") as file:
            for span in spans:
                about = {
                    "name": span.name,
                    "trace_id": span.context.trace_id,
                    "id": span.context.span_id,
                    "parent": span.parent and span.parent.span_id,
                    "start": span.start_time,
                    "end": span.end_time,
                    "links": len(span.links),
                }
                file.write(json.dumps(about) + "\n")
        return SpanExportResult.SUCCESS


def run(path: pathlib.Path, *, dies: bool, traceparent: str | None) -> Any:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(LinesExporter(path / "spans")))
    return run_with(otel_hooks(tracer=provider), path, dies=dies, traceparent=traceparent)


def run_with(
    hooks: ExporterHooks,
    path: pathlib.Path,
    *,
    dies: bool,
    traceparent: str | None = None,
    before_death: Callable[[], Any] = lambda: None,
) -> Any:
    store = SQLiteStore(path / "runs.db")
    runner = StromaRunner.quick(store=store, hooks=hooks, resume=True, lease_seconds=1)

    first = runner.node("first", input=Num, output=Num)(passing())

    @runner.node("second", input=Num, output=Num)
    async def second(state: Num) -> Num:
        if dies:
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)
        return state

    async def go() -> Any:
        async with store:
            result = await runner.run([first, second], Num(), run_id="r", traceparent=traceparent)
            assert await runner.flush(timeout_seconds=20)
            return result

    return asyncio.run(go())


@pytest.mark.slow
@pytest.mark.parametrize("traceparent", [None, OUTER], ids=["alone", "in a trace"])
def test_a_resumed_run_is_one_trace_with_one_root(tmp_path: pathlib.Path, traceparent: str | None) -> None:
    """The nodes of both processes are under one root from the run's begin; one span has its ids."""
    child = os.fork()
    if child == 0:
        run(tmp_path, dies=True, traceparent=traceparent)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert run(tmp_path, dies=False, traceparent=traceparent).status is RunStatus.RESUMED
    first, second, root = map(json.loads, (tmp_path / "spans").read_text().splitlines())
    names = [span["name"] for span in (first, second, root)]
    assert names == ["stroma.node first", "stroma.node second", "invoke_workflow pipeline"]
    assert first["parent"] == second["parent"] == root["id"]
    assert first["trace_id"] == second["trace_id"] == root["trace_id"]
    outer = None if traceparent is None else int(traceparent.split("-")[2], 16)
    assert (root["parent"], root["links"]) == (outer, 0)
    assert root["start"] // 1_000_000 <= first["start"] // 1_000_000
    assert first["end"] < second["start"] <= root["end"]
    assert not trace.get_current_span().get_span_context().is_valid


def run_with_sentry(path: pathlib.Path, mode: str, traceparent: str | None, *, dies: bool) -> None:
    with RecordedSentry(trace_lifecycle=mode) as sentry:

        def write() -> None:
            sentry.client.flush()
            with (path / "spans").open("a") as file:
                file.writelines(json.dumps(span) + "\n" for span in sentry.transport.spans)

        hooks = sentry_hooks(client=sentry.client)
        run_with(hooks, path, dies=dies, traceparent=traceparent, before_death=write)
        write()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["static", "stream"])
@pytest.mark.parametrize("traceparent", [None, OUTER], ids=["alone", "in a trace"])
def test_it_is_one_trace_in_sentry(tmp_path: pathlib.Path, mode: str, traceparent: str | None) -> None:
    """The root has the ids of the first process. Of that one's spans Sentry has those that were streamed."""
    child = os.fork()
    if child == 0:
        run_with_sentry(tmp_path, mode, traceparent, dies=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    run_with_sentry(tmp_path, mode, traceparent, dies=False)
    spans = list(map(json.loads, (tmp_path / "spans").read_text().splitlines()))
    (root,) = [span for span in spans if span["name"] == "pipeline"]
    nodes = [span for span in spans if span is not root]
    assert [span["name"] for span in nodes] == (["first", "second"] if mode == "stream" else ["second"])
    assert {span["parent_span_id"] for span in nodes} == {root["span_id"]}
    assert len({span["trace_id"] for span in spans}) == 1
    outer = None if traceparent is None else traceparent.split("-")
    assert root["parent_span_id"] == (None if outer is None else outer[2])
    assert outer is None or root["trace_id"] == outer[1]
    assert "stroma.resumed_from" not in root["data"]


def run_with_datadog(agent: DatadogAgent, code: str, *arguments: str, **variables: str) -> None:
    """Run code in a process that is killed, and in another one."""
    program = (
        "import pathlib, sys; from tests.telemetry.test_lost_roots import run_flow, run_with; "
        "from stroma.telemetry import datadog_hooks; from ddtrace.trace import tracer; "
        "dies, path, traceparent = sys.argv[1] == 'dies', pathlib.Path(sys.argv[2]), sys.argv[-1] or None; "
    )
    for dies in ("dies", ""):
        env = agent.environment(DD_TRACE_PARTIAL_FLUSH_MIN_SPANS="1", **variables)
        run_python(dies, *arguments, code=program + code, status=-signal.SIGKILL if dies else 0, env=env)


@pytest.mark.parametrize(
    ("traceparent", "priority"),
    [(None, 2), (None, -1), (OUTER, 1)],
    ids=["sampled", "not sampled", "in a trace"],
)
def test_it_is_one_trace_in_datadog(
    datadog_agent: DatadogAgent, tmp_path: pathlib.Path, traceparent: str | None, priority: int
) -> None:
    """The nodes that the first process has sent are under the root that the second one sends, and both
    processes make the same decision about sampling."""
    datadog_agent.clear()
    run_with_datadog(
        datadog_agent,
        "run_with(datadog_hooks(), path, dies=dies, traceparent=traceparent, before_death=tracer.flush)",
        str(tmp_path),
        traceparent or "",
        DD_TRACE_SAMPLING_RULES=json.dumps([{"sample_rate": float(priority > 0)}]),
    )
    spans = [span for trace in datadog_agent.traces(at_least=1) for span in trace]
    decisions = [span["metrics"].get("_sampling_priority_v1") for span in spans]
    assert {decision for decision in decisions if decision is not None} == {priority}
    (root,) = [span for span in spans if span["name"] == "stroma.run"]
    nodes = [span for span in spans if span["name"] == "stroma.node"]
    assert sorted(span["resource"] for span in nodes) == ["first", "second"]
    assert {span["parent_id"] for span in nodes} == {root["span_id"]}
    assert len({span["trace_id"] for span in spans}) == 1
    assert root["parent_id"] == (0 if traceparent is None else int(traceparent.split("-")[2], 16))
    assert root["start"] // 1_000_000 <= min(span["start"] for span in nodes) // 1_000_000
    assert not root.get("span_links")
    assert "_dd.span_links" not in root["meta"]


@pytest.mark.slow
def test_a_run_that_ended_its_root_is_not_written_again(tmp_path: pathlib.Path) -> None:
    """A process that is killed after a resume leaves that resume's trace, not the first one."""
    for dies in (False, True, False):
        child = os.fork()
        if child == 0:
            if not dies and not (tmp_path / "spans").exists():
                first(tmp_path)
            else:
                run(tmp_path, dies=dies, traceparent=None)
            os._exit(0)
        os.waitpid(child, 0)
    roots = [
        span
        for span in map(json.loads, (tmp_path / "spans").read_text().splitlines())
        if span["name"] == "invoke_workflow pipeline"
    ]
    assert len({span["id"] for span in roots}) == len(roots) == 2
    assert [span["links"] for span in roots] == [0, 0]


def first(path: pathlib.Path) -> None:
    """Run once so that the second node fails, and the root is ended."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(LinesExporter(path / "spans")))
    store = SQLiteStore(path / "runs.db")
    runner = StromaRunner.quick(store=store, hooks=otel_hooks(tracer=provider))

    node = runner.node("first", input=Num, output=Num)(passing())
    second = runner.node("second", input=Num, output=Num)(failing_with(NotImplementedError))

    async def go() -> None:
        async with store:
            await runner.run([node, second], Num(), run_id="r")

    asyncio.run(go())


def run_flow(
    hooks: ExporterHooks, path: pathlib.Path, *, dies: bool, before_death: Callable[[], Any] = lambda: None
) -> None:
    """Run a flow with a flow, map, agents and group inside; the process may be killed in its last step."""
    store = SQLiteStore(path / "runs.db")
    runner = StromaRunner.quick(
        store=store, hooks=hooks, resume=True, lease_seconds=1, policy_map=retry_policies(1)
    )

    def node(id: str) -> Any:
        @runner.node(id, input=State, output=State)
        async def step(state: State) -> State:
            if id == "each" and current_node().attempt == 1:
                await asyncio.sleep(0.1)  # The map begins with the first attempt.
                raise ConnectionError
            if dies and id == "slow":
                await asyncio.sleep(0.5)  # Its sibling ends, and is stored.
                before_death()
                os.kill(os.getpid(), signal.SIGKILL)
            return state

        return step

    before, look_up, each, quick, slow = map(node, ("before", "look_up", "each", "quick", "slow"))

    @runner.flow
    async def inner(flow: Flow, state: State) -> State:
        await flow.step(look_up, state)
        await flow.map(each, [State(n=1), State(n=2)])
        return state

    @runner.flow
    async def outer(flow: Flow, state: State) -> State:
        await flow.step(before, state)
        await flow.run(inner, state)
        for name in ("clerk", "notary"):
            with running_agent(name), running_agent("helper"):
                await flow.step(look_up, state)
        await flow.run(Pipeline("both", [parallel(quick, slow)]), state)
        return state

    async def go() -> None:
        async with store:
            result = await runner.run(outer, State(), run_id="r")
            assert result.ok, result.failure
            assert await runner.flush(timeout_seconds=20)

    asyncio.run(go())


#: (name, name of the parent) of the spans of the flow, of both processes.
FLOW = [
    ("before", "outer"),
    ("both", "outer"),
    ("clerk", "outer"),
    ("each", "each"),
    ("each", "each"),
    ("each", "inner"),
    ("helper", "clerk"),
    ("helper", "notary"),
    ("inner", "outer"),
    ("look_up", "helper"),
    ("look_up", "helper"),
    ("look_up", "inner"),
    ("notary", "outer"),
    ("outer", ""),
    ("parallel(quick, slow)", "both"),
    ("quick", "parallel(quick, slow)"),
    ("slow", "parallel(quick, slow)"),
]
KINDS = ("invoke_agent ", "invoke_workflow ", "stroma.map ", "stroma.node ")


def names_of(spans: list[dict[str, Any]], name: str, id: str, parent: str) -> list[tuple[str, str]]:
    """Return (name, name of the parent) of spans with these keys."""

    def short(text: str) -> str:
        return text.removeprefix(next((kind for kind in KINDS if text.startswith(kind)), ""))

    names = {span[id]: short(span[name]) for span in spans}
    assert len(names) == len(spans), "each span is sent once"
    assert len({span["trace_id"] for span in spans}) == 1
    return sorted((names[span[id]], names[span[parent]] if span[parent] else "") for span in spans)


def killed_and_resumed_flow(run: Callable[[bool], None]) -> None:
    """Run the flow in a process that is killed, and here."""
    child = os.fork()
    if child == 0:
        run(True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    run(False)


@pytest.mark.slow
def test_parts_and_groups_of_a_killed_run_are_in_its_tree(tmp_path: pathlib.Path) -> None:
    """A resume writes the spans of flow, map, agent and group that the killed process had open."""

    def run(dies: bool) -> None:
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(LinesExporter(tmp_path / "spans")))
        run_flow(otel_hooks(tracer=provider), tmp_path, dies=dies)

    killed_and_resumed_flow(run)
    spans = list(map(json.loads, (tmp_path / "spans").read_text().splitlines()))
    assert names_of(spans, "name", "id", "parent") == FLOW
    by_name = {span["name"]: span for span in spans}
    for part, steps in (
        ("invoke_workflow inner", ("stroma.map each", "stroma.node look_up")),
        ("stroma.map each", ("stroma.node each",)),
        ("invoke_agent clerk", ("invoke_agent helper",)),
    ):
        around = by_name[part]
        inside = [span for span in spans if span["name"] in steps and span["parent"] == around["id"]]
        assert abs(around["start"] - min(span["start"] for span in inside)) < 50_000_000, part
        assert abs(around["end"] - max(span["end"] for span in inside)) < 50_000_000, part


@pytest.mark.slow
def test_parts_of_a_killed_run_are_in_its_tree_in_sentry(tmp_path: pathlib.Path) -> None:
    """So does the exporter to Sentry, where spans are streamed."""

    def run(dies: bool) -> None:
        with RecordedSentry(trace_lifecycle="stream") as sentry:

            def write() -> None:
                sentry.client.flush()
                with (tmp_path / "spans").open("a") as file:
                    file.writelines(json.dumps(span) + "\n" for span in sentry.transport.spans)

            run_flow(sentry_hooks(client=sentry.client), tmp_path, dies=dies, before_death=write)
            write()

    killed_and_resumed_flow(run)
    spans = list(map(json.loads, (tmp_path / "spans").read_text().splitlines()))
    assert names_of(spans, "name", "span_id", "parent_span_id") == FLOW


def test_parts_of_a_killed_run_in_datadog(datadog_agent: DatadogAgent, tmp_path: pathlib.Path) -> None:
    """So does the exporter to Datadog, where ``ddtrace`` had sent a part of the trace."""
    datadog_agent.clear()
    run_with_datadog(
        datadog_agent, "run_flow(datadog_hooks(), path, dies=dies, before_death=tracer.flush)", str(tmp_path)
    )
    spans = [span for trace in datadog_agent.traces(at_least=1) for span in trace]
    assert names_of(spans, "resource", "span_id", "parent_id") == FLOW
