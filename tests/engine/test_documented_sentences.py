"""Sentences of the design that no other file is about."""

import asyncio
import dataclasses
import importlib
import logging
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from genai_prices import data_snapshot
from pydantic import BaseModel
from tests.kit import NEVER, TWICE, Num, node, quick

from stroma import (
    AsyncInMemoryStore,
    CheckpointNotFound,
    ExecutionResult,
    FailureClass,
    FailurePolicy,
    NodeContract,
    NodeHooks,
    Pipeline,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StoreError,
    StromaRunner,
    current_node,
    map_over,
    parallel,
    stroma_node,
)
from stroma.cost import prices


async def plus(state: Num) -> Any:
    return {"n": state.n + 1}


# ---------------------------------------------------------------------- the process around a run

GUEST = """
import asyncio, logging, signal, sys, threading
met = []
sys.addaudithook(lambda event, _: met.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)

def installed():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook, asyncio.get_running_loop().get_exception_handler()
    return handlers, hooks, list(logging.root.handlers), logging.root.level

async def main():
    before = installed()
    import stroma
    from pydantic import BaseModel

    class Num(BaseModel):
        n: int = 0

    async def a(state):
        during.append(installed() == before)
        if len(during) == 1:
            raise TimeoutError("once")
        return {"n": 1}, 5, "gpt-4o-2024-08-06"

    during = []
    node = stroma.stroma_node("a", stroma.NodeContract(node_id="a", input_schema=Num, output_schema=Num))(a)
    now = stroma.FailurePolicy(backoff_seconds=0)
    runner = stroma.StromaRunner.quick(policy_map={stroma.FailureClass.RECOVERABLE: now})
    result = await runner.run([node], Num())
    print(result.status, during, installed() == before, logging.getLogger("stroma").handlers, met)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_guest_in_the_process() -> None:
    """A library installs no signal handler and no global handler, and never phones home."""
    done = subprocess.run([sys.executable, "-c", GUEST], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (
        "COMPLETED [True, True] True [<NullHandler (NOTSET)>] []",
        "",
    )


def test_new_records_are_frozen() -> None:
    """New records are frozen; only the published ones stay what they are."""
    published = {
        "ExecutionResult", "FallbackPolicy", "ModelHint", "NodeContext", "NodeHooks", "NodeUsage",
        "ReliabilityContext", "TraceEvent",
    }  # fmt: skip
    names = (
        "checkpoint.protocols contracts.contract contracts.node cost.budget cost.fallback cost.tracker engine.config"
        " engine.context failures.errors failures.failure failures.policy hooks.dispatch hooks.sets runner.groups"
        " runner.runner runner.steps trace.events trace.result trace.trace"
    )
    modules = [importlib.import_module(f"stroma.{name}") for name in names.split()]
    defined = [
        value
        for module in modules
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    records = {value for value in defined if isinstance(value, type) and dataclasses.is_dataclass(value)}
    thawed = {r.__name__ for r in records if not r.__dataclass_params__.frozen}  # type: ignore[attr-defined]
    assert thawed == published
    assert len(records) >= 2 * len(published)


async def test_prices_are_read_once_and_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The price data is imported off the event loop, and asked once for each model."""
    asked: list[tuple[str, bool]] = []
    find = data_snapshot.DataSnapshot.find_provider_model

    def read(self: Any, model: str, *more: Any) -> Any:
        asked.append((model, threading.current_thread() is threading.main_thread()))
        return find(self, model, *more)

    async def func(state: Num) -> Any:
        return {"n": 1}, 4_000_000, "gpt-5"

    monkeypatch.setattr(prices, "_looked_up", {})
    monkeypatch.setattr(data_snapshot.DataSnapshot, "find_provider_model", read)
    for _ in range(2):
        result = await quick().run([node("a", func), node("b", func)], Num())
        assert result.total_cost_usd == 10.0
    assert asked == [("gpt-5", False)]


# ---------------------------------------------------------------------- what is logged and recorded


class Stubborn:
    """A store of the simple protocol that refuses the first time."""

    def __init__(self) -> None:
        self.refused = False

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        if not self.refused:
            self.refused = True
            raise OSError("not now")

    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return None

    def delete(self, run_id: str) -> None: ...


async def test_every_record_carries_the_run_id(caplog: pytest.LogCaptureFixture) -> None:
    """Every record that a run logs is on the logger `stroma` and carries its run_id, whoever it is about."""
    caplog.set_level(logging.DEBUG)
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("once")
        return {"n": 1}, 1, "nobody knows this model"

    async def raising(*_: Any) -> None:
        raise LookupError("a hook's own")

    async def blocking(*_: Any) -> None:
        time.sleep(0.02)

    def lying(error: Exception, context: Any) -> FailureClass | None:
        raise LookupError("a classifier's own")

    hooks = NodeHooks(on_node_start=raising, on_node_success=blocking)
    runner = quick(store=Stubborn(), hooks=hooks, hook_timeout_ms=5, classifiers=[lying], run_id="r")
    assert (await runner.run([node("a", func)], Num())).status is RunStatus.COMPLETED
    said = "\n".join(record.getMessage() for record in caplog.records if record.name == "stroma")
    for part in (
        "classifier",
        "failed at attempt 1",
        "follows in",
        "raised for",
        "blocked",
        "no price",
        "refused",
        "ended",
    ):
        assert part in said
    ours = [record for record in caplog.records if record.name.startswith("stroma")]
    assert {(record.name, getattr(record, "run_id", None)) for record in ours} == {("stroma", "r")}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit], ids=lambda e: e.__name__)
async def test_a_stopped_run_is_recorded_as_interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    """KeyboardInterrupt and SystemExit pass through; the journal says INTERRUPTED, and the run is resumable."""
    store = SQLiteStore(tmp_path / "runs.db")
    calls: list[str] = []

    async def stop(state: Num) -> Any:
        calls.append("b")
        if len(calls) == 2:
            raise error
        return {"n": state.n + 1}

    async def first(state: Num) -> Any:
        calls.append("a")
        return {"n": 10}

    nodes = [node("a", first), node("b", stop)]
    with pytest.raises(error):
        await quick(store=store, run_id="r").run(nodes, Num())
    assert [run.status for run in store.list_runs()] == ["INTERRUPTED"]
    result = await quick(store=store, run_id="r", resume=True).run(nodes, Num())
    assert (result.status, result.final_state, calls) == (RunStatus.RESUMED, Num(n=11), ["a", "b", "b"])


async def test_a_cancelled_run_is_recorded_as_cancelled(tmp_path: Path) -> None:
    """The cancellation of the run's own task passes through; the journal says CANCELLED."""
    store = SQLiteStore(tmp_path / "runs.db")
    waiting = asyncio.Event()

    async def wait(state: Num) -> Any:
        waiting.set()
        await asyncio.Event().wait()

    run = asyncio.create_task(quick(store=store, run_id="r").run([node("a", wait)], Num()))
    await waiting.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert [kept.status for kept in store.list_runs()] == ["CANCELLED"]


# ---------------------------------------------------------------------- hooks


async def test_construction_accepts_a_hook_that_is_not_async() -> None:
    """A hook that is not async is refused at its first call; making and configuring it is accepted."""

    def not_async(*_: Any) -> None: ...

    hooks = NodeHooks(on_node_success=not_async)  # type: ignore[arg-type]
    runner = quick(hooks=RunConfig(hooks=hooks).hooks).with_hooks(hooks | NodeHooks())
    with pytest.raises(TypeError, match="on_node_success"):
        await runner.run([node("a", plus)], Num())


async def test_run_end_fires_when_the_resume_target_has_no_checkpoint() -> None:
    """on_run_end fires also when run() raises once the run has begun; the result's status is INTERRUPTED."""
    seen: list[Any] = []

    async def start(run_id: str, *_: Any) -> None:
        seen.append("start")

    async def end(run_id: str, result: ExecutionResult) -> None:
        seen.append(result.status)

    hooks = NodeHooks(on_run_start=start, on_run_end=end)
    with pytest.raises(CheckpointNotFound):
        await quick(hooks=hooks, resume_from="b").run([node("a", plus), node("b", plus)], Num())
    assert seen == ["start", RunStatus.INTERRUPTED]


# ---------------------------------------------------------------------- groups


class Asked(Exception):
    """What an HTTP client raises when the server asks to wait."""

    status_code = 429
    response = type("Response", (), {"status_code": 429, "headers": {"retry-after": "7"}})


async def test_a_groups_retry_obeys_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: what the server asked a child to wait is waited for by the group that is tried again."""
    delays: list[float] = []
    calls: list[int] = []

    async def note(delay: float) -> None:
        delays.append(delay)

    async def func(state: Num) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise Asked
        return {"n": 1}

    monkeypatch.setattr("stroma.engine.loop.sleep", note)
    group = parallel(node("a", func))
    result = await quick(policy_map=NEVER, node_policies={group.node_id: TWICE}).run([group], Num())
    assert (result.status, delays) == (RunStatus.COMPLETED, [7.0])


async def test_contract_repair_of_children() -> None:
    """contract_retries grants further attempts to children and items too; the next one sees the violation."""
    seen: list[str] = []

    async def func(state: Any) -> Any:
        run = current_node()
        assert run is not None
        seen.append(f"{run.kind} {run.attempt} {run.last_failure and run.last_failure.failure_class}")
        return {"n": "no number" if run.attempt == 1 else 1}

    class Many(BaseModel):
        items: list[dict[str, int]] = [{"n": 1}]

    runner = quick(policy_map=NEVER, contract_retries={"a": 1})
    for group in (parallel(node("a", func, Many)), map_over("items", node("a", func), into="out")):
        result = await runner.run([group], Many())
        assert result.status is RunStatus.COMPLETED, result.failure
    assert seen == ["node 1 None", "node 2 RECOVERABLE", "item 1 None", "item 2 RECOVERABLE"]


class Nested(BaseModel):
    items: list[Any]


@pytest.mark.parametrize("item", [[1, [2]], {"x": [1]}], ids=["list", "dict"])
async def test_every_attempt_of_an_item_gets_a_pristine_input(item: Any) -> None:
    """Each retry of an item sees it as it was, also where no contract copies it."""
    seen: list[str] = []

    async def func(state: Any) -> Any:
        seen.append(repr(state))
        (state.root if hasattr(state, "root") else state.x).append("spoilt")
        raise ValueError

    func._stroma_node_id, func._stroma_contract = "a", None  # type: ignore[attr-defined]
    given = Nested(items=[item])
    await quick().run([map_over("items", func, into="out")], given)
    assert len(seen) == 3
    assert len(set(seen)) == 1
    assert "spoilt" not in repr(given)


# ---------------------------------------------------------------------- money


async def test_what_was_refused_for_its_price_is_not_bought_again() -> None:
    """unknown_model="error" keeps the output: a resume goes on behind it, without another call."""
    store = AsyncInMemoryStore()
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        return {"n": 7}, 5, "nobody knows this model"

    nodes = [node("a", func), node("b", plus)]
    runner = quick(store=store, run_id="r", unknown_model="error")
    assert (await runner.run(nodes, Num())).status is RunStatus.FAILED
    result = await runner.run(nodes, Num(), resume=True)
    assert (result.status, result.final_state, len(calls)) == (RunStatus.RESUMED, Num(n=8), 1)


@pytest.mark.core
async def test_what_the_end_of_a_run_shows_is_redacted() -> None:
    """``redact`` runs before any hook sees a state: the final one, those of the trace, and that of a violation."""
    seen: list[Any] = []

    async def end(run_id: str, result: Any) -> None:
        seen.append(result)

    class Secretive(BaseModel):
        name: str = "secret"

    class Strict(BaseModel):
        name: str

    async def first(state: Secretive) -> Any:
        return {"name": "secret too"}

    async def second(state: Secretive) -> Any:
        return {"name": 5, "why": "secret again"}

    nodes = [
        stroma_node("first", NodeContract(node_id="first", input_schema=Secretive, output_schema=Secretive))(
            first
        ),
        stroma_node("second", NodeContract(node_id="second", input_schema=Secretive, output_schema=Strict))(
            second
        ),
    ]
    hooks = NodeHooks(on_run_end=end)
    runner = StromaRunner.quick(hooks=[hooks, hooks], redact=lambda state: dict.fromkeys(state, "***"))
    result = await runner.run(nodes, Secretive())
    assert len(seen) == 2
    for shown in seen:
        assert shown.final_state.name == "***"
        assert all("secret" not in str(event) for event in shown.trace.walk())
        assert "secret" not in str(shown.failure.exception.raw)
        assert "secret" not in str(shown.failure.exception.errors)
    assert result.final_state == Secretive(name="secret too")
    assert result.trace.events_for("first")[0].input_state == {"name": "secret"}
    assert "secret" in str(result.failure.exception.raw)  # type: ignore[union-attr, attr-defined]


# ---------------------------------------------------------------------- found without a test


@pytest.mark.core
async def test_the_time_of_an_event_is_the_start_of_its_attempt() -> None:
    """``timestamp_utc`` is when the attempt's function was called, in UTC, whatever was waited for before and after."""
    called: list[datetime] = []

    async def func(state: Num) -> Any:
        called.append(datetime.now(UTC))
        await asyncio.sleep(0.02)
        if len(called) == 1:
            raise ConnectionError("again")
        return {"n": 1}

    async def slow(*_: Any) -> None:
        await asyncio.sleep(0.02)

    policies = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=1, backoff_seconds=0.02, jitter=False)}
    hooks = NodeHooks(on_node_start=slow, on_node_success=slow)
    result = await quick(policy_map=policies, hooks=hooks).run([node("a", func)], Num())
    assert [event.timestamp_utc.tzinfo for event in result.trace] == [UTC, UTC]
    for event, began in zip(result.trace, called, strict=True):
        assert abs(event.timestamp_utc - began) < timedelta(milliseconds=15)


@pytest.mark.core
def test_what_a_policy_is_unless_it_says_otherwise() -> None:
    """A policy's delays do not grow, are drawn, end at 60 s, and a server may ask for up to 120 s."""
    policy = FailurePolicy()
    assert (policy.max_retries, policy.backoff_seconds) == (3, 1.0)
    assert (policy.multiplier, policy.max_backoff_seconds, policy.jitter) == (1.0, 60.0, True)
    assert policy.max_retry_after_seconds == 120.0


@pytest.mark.core
async def test_a_store_that_cannot_be_opened_is_an_error_of_run(tmp_path: Path) -> None:
    """A store that cannot be opened comes out of run() as a StoreError: no node is called, no hook is told."""
    told: list[str] = []

    async def tell(*_: Any) -> None:
        told.append("hook")

    async def func(state: Num) -> Any:
        told.append("node")
        return state

    store = SQLiteStore(tmp_path)  # A directory.
    hooks = NodeHooks(on_run_start=tell, on_run_end=tell, on_node_start=tell)
    with pytest.raises(StoreError):
        await quick(store=store, hooks=hooks).run([node("a", func)], Num())
    assert told == []


@pytest.mark.core
@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", 5])
def test_a_pipeline_has_a_name_that_stores_can_keep(name: Any) -> None:
    """What no store can keep is refused as the name of a pipeline, where it is given."""
    with pytest.raises(ValueError, match="pipeline name"):
        Pipeline(name, [])
    with pytest.raises(ValueError, match="pipeline"):
        RunConfig(pipeline=name)


@pytest.mark.core
async def test_a_bare_list_goes_by_the_name_in_the_config() -> None:
    """A list of nodes is called what RunConfig(pipeline=...) says, a Pipeline by its own name, in hooks and nodes."""
    names: list[str] = []

    async def start(run_id: str, pipeline: str, state: dict[str, Any]) -> None:
        names.append(pipeline)

    async def func(state: Num) -> Any:
        current = current_node()
        assert current is not None
        names.append(current.pipeline)
        return state

    runner = quick(pipeline="orders", hooks=NodeHooks(on_run_start=start))
    await runner.run([node("a", func)], Num())
    await runner.run(Pipeline("returns", [node("a", func)]), Num())
    assert names == ["orders", "orders", "returns", "returns"]
