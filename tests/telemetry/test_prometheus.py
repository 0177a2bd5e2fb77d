"""prometheus_hooks: the numbers that a real Prometheus server answers with."""

import asyncio
import pathlib
import uuid
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from tests.kit import ONCE, TWICE, Num, computing, environment, failing_with, returning, run_python
from tests.receivers.prometheus import SharedPrometheus, check_metrics

from stroma import ExecutionBudget, NodeHooks, RunStatus, StromaRunner, Usage, current_node, parallel
from stroma.telemetry import prometheus_hooks
from stroma.telemetry.metrics import MetricLabels

pytest_plugins = ["tests.receivers.fixtures"]


def quick(registry: CollectorRegistry, **config: Any) -> StromaRunner:
    config.setdefault("hooks", prometheus_hooks(registry=registry))
    return StromaRunner.quick(policy_map=TWICE, **config)


def node(runner: StromaRunner, name: str, *, failures: int = 0, tokens: int = 100) -> Any:
    @runner.node(name, input=Num, output=Num)
    async def call(state: Num) -> Any:
        if current_node().attempt <= failures:
            current_node().report_usage(input_tokens=tokens, model="gpt-4o-mini")
            raise ConnectionError("no")
        await asyncio.sleep(0.015)
        return state, tokens, tokens, "gpt-4o-mini"

    return call


async def test_a_server_answers_with_the_right_numbers(prometheus: SharedPrometheus) -> None:
    """PromQL over a scraped run: counts, quantiles, tokens and cost are those of the results."""
    registry, pipeline = CollectorRegistry(), f"letters-{uuid.uuid4().hex[:8]}"
    runner = quick(registry, pipeline=pipeline)
    nodes = [node(runner, "draft", failures=1), parallel(node(runner, "a"), node(runner, "b"))]
    results = [await runner.run(nodes, Num()) for _ in range(3)]
    failing = quick(registry, pipeline=pipeline)
    results.append(await failing.run([node(failing, "bad", failures=9)], Num()))

    def of(text: str) -> str:
        return text.replace("$P", f'pipeline="{pipeline}"')

    with prometheus.exposing(registry):
        await asyncio.to_thread(prometheus.scraped)
        value = prometheus.value
        assert value(of('stroma_runs_total{$P,status="COMPLETED"}')) == 3
        assert value(of('stroma_runs_total{$P,status="PARTIAL"}')) == 1
        assert value(of("stroma_runs_in_progress{$P}")) == 0
        executions = value(of("sum(stroma_node_executions_total{$P})"))
        assert executions == sum(len(list(result.trace.walk())) for result in results) == 3 * 5 + 3
        failed = of('sum(stroma_node_executions_total{$P,outcome="failure",failure_class="RECOVERABLE"})')
        assert value(failed) == 3 + 3
        assert value(of("sum(stroma_node_retries_total{$P})")) == 3 + 2
        tokens = of('sum(stroma_tokens_total{$P,model="gpt-4o-mini"})')
        assert value(tokens) == sum(result.total_tokens for result in results)
        cost = value(of("sum(stroma_cost_usd_total{$P})"))
        assert cost == pytest.approx(sum(result.total_cost_usd for result in results))
        # The nodes sleep for 15 ms: the half of them is in the bucket that ends at 20 or, on a busy machine,
        # above.
        median = of(
            'histogram_quantile(0.5, sum by (le) (stroma_node_duration_seconds_bucket{$P,node_id="a"}))'
        )
        assert 0.01 < value(median) < 0.64
        assert value(of("sum(stroma_run_duration_seconds_count{$P})")) == 4


@pytest.mark.slow
async def test_the_names_are_good_names() -> None:
    """`promtool check metrics` finds nothing to say about a page with every metric on it."""
    registry = CollectorRegistry()

    hooks = prometheus_hooks(registry=registry) | NodeHooks(on_node_start=failing_with(RuntimeError))
    runner = quick(registry, budget=ExecutionBudget(max_tokens_total=150), hooks=hooks)
    nodes = [node(runner, "a"), node(runner, "b")]
    await runner.run(nodes, Num(), run_id="r")
    resumed = quick(registry, store=runner.checkpoint_manager.store, hooks=hooks)
    await resumed.run(nodes, Num(), run_id="r", resume=True)
    page = generate_latest(registry).decode()
    for name in (
        "runs_total",
        "budget_exceeded_total",
        "budget_warnings_total",
        "hook_errors_total",
        "nodes_skipped_total",
    ):
        assert f"\nstroma_{name}{{" in page
    check_metrics(registry)


async def test_no_run_id_is_a_label() -> None:
    """Neither a run id nor a message is ever a label, so that no series is made per run."""
    registry = CollectorRegistry()
    runner = quick(registry)
    for n in range(3):
        await runner.run([node(runner, "bad", failures=9)], Num(), run_id=f"run-{n}-of-many")
    page = generate_latest(registry).decode()
    assert "of-many" not in page
    assert '"no"' not in page
    series = {line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")}
    await runner.run([node(runner, "bad", failures=9)], Num())
    assert {
        line.rpartition(" ")[0]
        for line in generate_latest(registry).decode().splitlines()
        if not line.startswith("#")
    } == series


async def test_sets_share_a_registry() -> None:
    """Two factories on one registry feed the same metrics; two registries do not mix."""
    one, other = CollectorRegistry(), CollectorRegistry()
    for registry, runs in ((one, 2), (other, 1), (one, 1)):
        runner = quick(registry)
        for _ in range(runs):
            await runner.run([node(runner, "a")], Num())
    labels = {"pipeline": "pipeline", "status": "COMPLETED"}
    assert one.get_sample_value("stroma_runs_total", labels) == 3
    assert other.get_sample_value("stroma_runs_total", labels) == 1


@pytest.mark.core
async def test_the_gauge_comes_down_whichever_way_a_run_ends() -> None:
    """Runs that fail, are cancelled, or whose coroutine is closed leave the gauge at what it was."""
    registry = CollectorRegistry()
    runner = quick(registry)

    @runner.node("slow", input=Num, output=Num)
    async def slow(state: Num) -> Num:
        await asyncio.sleep(60)
        return state

    def gauge() -> float | None:
        return registry.get_sample_value("stroma_runs_in_progress", {"pipeline": "pipeline"})

    task = asyncio.create_task(runner.run([slow], Num()))
    closed: Any = runner.run([slow], Num())
    closed.send(None)
    await asyncio.sleep(0.01)
    assert gauge() == 2
    task.cancel()
    await asyncio.wait([task])
    closed.close()
    assert gauge() == 0
    assert (
        registry.get_sample_value("stroma_runs_total", {"pipeline": "pipeline", "status": "CANCELLED"}) == 1
    )


async def test_any_text_can_be_a_label() -> None:
    """Ids with quotes, newlines or lone surrogates in models break no scrape."""
    registry = CollectorRegistry()
    runner = quick(registry)
    odd = runner.node('a"b\n\\ é', input=Num, output=Num)(computing(lambda state: (state, 1, "model \udcff")))
    assert (await runner.run([odd], Num())).status is RunStatus.COMPLETED
    assert runner.config.hooks.errors == {}
    generate_latest(registry).decode()


@pytest.mark.slow
def test_a_killed_process_leaves_no_gauge_raised(tmp_path: pathlib.Path) -> None:
    """Where processes share their metrics, runs in progress are those of living processes."""
    program = """
import asyncio, os, sys
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from pydantic import BaseModel
from stroma import StromaRunner
from stroma.telemetry import prometheus_hooks

class State(BaseModel):
    n: int = 0

def go(ending):
    runner = StromaRunner.quick(hooks=prometheus_hooks())

    @runner.node("node", input=State, output=State)
    async def node(state: State) -> State:
        ending()
        return state

    asyncio.run(runner.run([node], State()))

def page():
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return [line for line in generate_latest(registry).decode().splitlines() if "runs_in_progress{" in line]

child = os.fork()
if child == 0:
    go(lambda: os.kill(os.getpid(), 9))
os.waitpid(child, 0)
multiprocess.mark_process_dead(child)
go(lambda: print(page()))
print(page())
"""
    pages = run_python(code=program, env=environment(PROMETHEUS_MULTIPROC_DIR=tmp_path)).splitlines()
    line = 'stroma_runs_in_progress{pipeline="pipeline"}'
    assert pages == [f"['{line} 1.0']", f"['{line} 0.0']"]


async def test_units_reasons_and_caches() -> None:
    """Pages of OpenMetrics have units; attempts are counted by reason of failure, cached tokens apart."""
    registry = CollectorRegistry()
    runner = StromaRunner.quick(hooks=prometheus_hooks(registry=registry), policy_map=ONCE)

    @runner.node("ask", input=Num, output=Num)
    async def ask(state: Num) -> Any:
        if current_node().attempt == 1:
            raise ConnectionError
        return state, Usage(100, 5, 60, 20, model="gpt-4o-mini")

    await runner.run([ask], Num())
    page = openmetrics.generate_latest(registry).decode()
    assert [line for line in page.splitlines() if line.startswith("# UNIT")] == [
        "# UNIT stroma_run_duration_seconds seconds",
        "# UNIT stroma_node_duration_seconds seconds",
        "# UNIT stroma_tokens tokens",
        "# UNIT stroma_cached_tokens tokens",
        "# UNIT stroma_cost_usd usd",
        "# UNIT stroma_runs_oldest_due_seconds seconds",
        "# UNIT stroma_runs_oldest_blocked_seconds seconds",
    ]
    place = {"pipeline": "pipeline", "node_id": "ask"}
    failed = {**place, "outcome": "failure", "failure_class": "RECOVERABLE", "reason": "connection"}
    assert registry.get_sample_value("stroma_node_executions_total", failed) == 1
    of_model = {**place, "model": "gpt-4o-mini", "agent": ""}
    cached = {
        cache: registry.get_sample_value("stroma_cached_tokens_total", {**of_model, "cache": cache})
        for cache in ("read", "write")
    }
    assert cached == {"read": 60, "write": 20}
    assert registry.get_sample_value("stroma_tokens_total", {**of_model, "direction": "input"}) == 100
    labels = MetricLabels()
    assert len({labels.reason(f"reason {number}") for number in range(1000)}) == 51


async def test_a_limit_behind_a_broken_contract_is_counted() -> None:
    """A run that a limit stopped is counted, also if its last output broke its contract."""
    registry = CollectorRegistry()
    budget = ExecutionBudget(max_tokens_total=150)
    runner = quick(registry, pipeline="masked", budget=budget, contract_retries={"a": 5})
    breaks = runner.node("a", input=Num, output=Num)(returning(({"n": "x"}, 100, 0, "gpt-4o-mini")))
    result = await runner.run([breaks], Num())
    assert (result.status, len(result.trace)) == (RunStatus.PARTIAL, 2)
    counted = registry.get_sample_value(
        "stroma_budget_exceeded_total", {"pipeline": "masked", "dimension": "tokens"}
    )
    assert counted == 1
