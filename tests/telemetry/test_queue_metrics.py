"""Figures of queues and cooldowns of limits, from a store, in every exporter that has metrics."""

import asyncio
import logging
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.fixtures import store_fixture
from tests.kit import Num, node, same
from tests.limits.budget_helper import State
from tests.limits.test_cooldown import NAMES, NO_RETRY, Refused, node_of
from tests.shared_stores import STORES
from tests.telemetry.test_labels import Systems

from stroma import Limit, Pipeline, RunConfig, StromaRunner
from stroma.checkpoint.queue import QueueReading
from stroma.limits.rate_limit import read_cooldowns, read_limit
from stroma.runner import worker
from stroma.runner.pipeline import code_of
from stroma.runner.worker import WorkerHealth
from stroma.telemetry import log_hooks, prometheus_hooks

store = store_fixture(*STORES)

FIGURES = (
    ("stroma.runs.queued", "stroma_runs_queued", ""),
    ("stroma.runs.oldest_due", "stroma_runs_oldest_due_seconds", ""),
    ("stroma.runs.blocked", "stroma_runs_blocked", ""),
    ("stroma.runs.oldest_blocked", "stroma_runs_oldest_blocked_seconds", ""),
)


@pytest.fixture(autouse=True)
def read_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_READ_SECONDS", 0.02)


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_worker_shows_the_queues_that_it_serves(store: Any) -> None:
    """A full worker shows how many runs are queued and since when; no run id or key is a label."""
    systems, gate, entered = Systems(), asyncio.Event(), asyncio.Event()

    async def wait(state: Num) -> Num:
        entered.set()
        await gate.wait()
        return state

    config = RunConfig(hooks=systems.hooks())
    pipeline, idle = (
        Pipeline("p", [node("a", wait)], config=config),
        Pipeline("idle", [node("b", wait)], config=config),
    )
    runner = StromaRunner.quick(store=store)
    for number in range(3):
        await runner.submit(pipeline, Num(), run_id=f"secret-{number}", key="secret")
    await runner.submit(pipeline, Num(), run_id="later", delay=3600)
    health = WorkerHealth()
    served = asyncio.ensure_future(
        runner.serve(pipeline, idle, max_concurrency=1, poll_seconds=0.02, health=health)
    )

    def figures(at: int) -> list[dict[tuple[str, ...], float]]:
        return systems.counts(*FIGURES[at])[:2]

    await entered.wait()
    await until(lambda: figures(0) == [{("p",): 3, ("idle",): 0}] * 2)
    await until(lambda: min(one.get(("p",), 0) for one in figures(1)) > 0.05)
    assert all(0.05 < one["p",] < 60 and one["idle",] == 0 for one in figures(1))
    await until(lambda: health.queued == 3 and 0.05 < (health.oldest_due_seconds or 0) < 60)
    gate.set()
    await until(lambda: figures(0) == [{("p",): 1, ("idle",): 0}] * 2)
    assert all(one["p",] == 0 for one in figures(1))
    assert "secret" not in systems.page()
    await runner.shutdown()
    await served
    assert [figures(0), figures(1)] == [[{}, {}]] * 2


async def test_a_worker_shows_blocked_runs(store: Any) -> None:
    """A worker shows how many runs of its pipelines are blocked and since when; these are not queued."""
    systems = Systems()

    pipeline = Pipeline("p", [node("a", same)], config=RunConfig(hooks=systems.hooks()))
    runner = StromaRunner.quick(store=store)
    code, now_ms = code_of(pipeline), time.time_ns() // 1_000_000
    for number in range(2):
        await runner.submit(pipeline, Num(), run_id=f"r{number}")
        for age in (100_000, 0):  # The second try was now.
            await store.block(f"r{number}", "it differs", code.name, None, now_ms - age)
    health = WorkerHealth()
    served = asyncio.ensure_future(runner.serve(pipeline, poll_seconds=0.02, health=health))

    def figures(at: int) -> list[dict[tuple[str, ...], float]]:
        return systems.counts(*FIGURES[at])[:2]

    await until(lambda: health.blocked == 2)
    assert figures(2) == [{("p",): 2}] * 2
    assert figures(0) == [{("p",): 0}] * 2
    assert all(100 <= one["p",] < 200 for one in figures(3))
    await runner.shutdown()
    await served


def test_processes_that_share_their_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the client of Prometheus cannot remove a gauge, a worker that ends leaves 0."""
    registry = CollectorRegistry()
    read = prometheus_hooks(registry=registry).queue_reader
    assert read is not None
    read("letters", QueueReading(5, 9.0, 1, 2.0))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "any")
    read("letters", None)
    shown = [registry.get_sample_value(name, {"pipeline": "letters"}) for _, name, _ in FIGURES]
    assert shown == [0, 0, 0, 0]


async def test_nobody_reads_without_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker without such an exporter and without a health never asks the store for its figures."""
    runner = StromaRunner.quick()
    asked: list[Any] = []
    monkeypatch.setattr(type(runner.checkpoint_manager.store), "queue_figures", asked.append)

    pipeline = Pipeline("p", [node("a", same)])
    handle = await runner.submit(pipeline, Num())
    served = asyncio.ensure_future(runner.serve(pipeline, poll_seconds=0.02))
    await handle.result(timeout=20)
    await runner.shutdown()
    await served
    assert asked == []


pytest_plugins = ["tests.receivers.fixtures"]


async def close_limit(name: str, hooks: Any = None, store: Any = None, seconds: str = "20") -> None:
    """Run a node whose call closes a limit."""

    async def function(n: int) -> None:
        raise Refused(429, retry_after=seconds)

    limits = {name: Limit(requests_per_minute=100, store=store)}
    runner = StromaRunner.quick(
        limits=limits, node_limits={"call": name}, policy_map=NO_RETRY, hooks=hooks, pipeline="letters"
    )
    await runner.run([node_of(function)], State(n=1))


async def test_all_systems_count_cooldowns() -> None:
    """Each system counts the cooldowns that calls of a pipeline have begun, by limit."""
    systems, name = Systems(), next(NAMES)
    await close_limit(name, systems.hooks())
    names = ("stroma.limit.cooldowns", "stroma_limit_cooldowns_total", "stroma.limit.cooldowns")
    assert systems.counts(*names) == [{tuple(sorted(("letters", name))): 1}] * 3


async def test_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Both log_hooks and the engine write a warning."""
    name = next(NAMES)
    with caplog.at_level(logging.INFO):
        await close_limit(name, log_hooks())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(
        line.endswith(f": limit '{name}' is closed for 20 s because the provider asked to wait")
        for line in warnings
    )
    assert any(
        line.startswith("limit cooldown:") and f"limit={name} delay_s=20.0" in line for line in warnings
    )


async def test_closed_limits_are_found_in_a_store(store: Any) -> None:
    """The limits of a store that are closed can be listed, those that are open again not."""
    first, second = next(NAMES), next(NAMES)
    await close_limit(first, store=store)
    await close_limit(second, store=store, seconds="60")
    await store.change_cell("cooldowns", lambda data, now: (None, None))  # After what was posted before.
    closed = read_cooldowns(store)
    assert sorted(closed) == [first, second]
    assert 55_000 < closed[second] <= 60_000
    state = read_limit(store, first)
    assert (state.requests, state.tokens, state.calls) == (1, 0, 0)
    assert read_limit(store, "other") is None
