"""Nodes with a place: a worker of that place calls the function, the run's owner does the rest."""

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.drivers.conftest import Cluster, fleet_of, fresh_id
from tests.drivers.worker_helper import placed_pipeline
from tests.kit import NEVER, ONCE, Num, Text, computing, failing_with, here, node, noting, quick
from tests.servers_temporal import TemporalServer

from stroma import (
    ExecutionBudget,
    FailureClass,
    Flow,
    NodeContract,
    NodeHooks,
    NotDone,
    Pipeline,
    PlaceError,
    RunConfig,
    RunStatus,
    Suspend,
    Usage,
    execute_step,
    parallel,
    stroma_flow,
    stroma_node,
)
from stroma.checkpoint.identity import idempotency_key
from stroma.engine import context as interceptors
from stroma.engine.context import Interceptor
from stroma.engine.execution import current_run
from stroma.runner.events import EventHooks, EventHub
from stroma.temporal import stroma_worker

pytestmark = pytest.mark.slow


def placed(
    node_id: str,
    func: Any,
    place: str | None,
    input: type[Any] = Num,
    output: type[Any] = Num,
    **options: Any,
) -> Any:
    """Return a function as a node with a place."""
    contract = NodeContract(node_id=node_id, input_schema=input, output_schema=output, place=place, **options)
    return stroma_node(node_id, contract)(func)


@contextlib.asynccontextmanager
async def workers(cluster: Cluster, pipeline: Pipeline, **config: Any) -> AsyncIterator[None]:
    """Run a worker that drives runs, and one of the place; both in this process."""
    settings = RunConfig(**{"policy_map": NEVER, "lease_seconds": 10.0, **config})
    place = place_of(cluster)

    def worker(**options: Any) -> Any:
        return stroma_worker(cluster.client, cluster.queue, [pipeline], config=settings, **options)

    async with worker(store=cluster.store), worker(place=place):
        yield


def place_of(cluster: Cluster) -> str:
    return f"{cluster.queue}-gpu"


async def test_a_node_with_a_place(cluster: Cluster) -> None:
    """The function runs at its place with current_node(); hooks, usage and commit are the owner's."""
    seen: list[Any] = []
    ends: list[Any] = []

    ended = noting(ends, lambda run_id, node_id, output, tokens: (node_id, output, tokens))

    async def call(state: Num, context: dict[str, Any]) -> Any:
        run = here()
        seen.append((run.run_id, run.pipeline, run.node_id, run.position, run.attempt, run.kind))
        seen.append((run.idempotency_key, run.remaining_budget.tokens, context["shared"]))
        run.report_usage(input_tokens=3, output_tokens=2, model="a-model-of-ours")
        return Num(n=state.n + 1), Usage(
            input_tokens=10, cached_input_tokens=4, model="a-model-of-ours", cost_usd=0.5
        )

    async def plain(state: Num) -> Num:
        return Num(n=state.n * 10)

    pipeline = Pipeline("p", [node("a", plain), placed("b", call, place_of(cluster)), node("c", plain)])
    run_id = fresh_id()
    config: dict[str, Any] = {
        "budget": ExecutionBudget(max_tokens_total=1000, max_cost_usd=None, max_latency_ms=None),
        "hooks": NodeHooks(on_node_success=ended),
        "context": {"shared": "yes"},
    }
    async with workers(cluster, pipeline, unknown_model="warn", **config):
        result = await cluster.runner.run(pipeline, Num(n=1), run_id=run_id)
    assert (result.status, result.output) == (RunStatus.COMPLETED, Num(n=110))
    assert seen == [(run_id, "p", "b", 1, 1, "node"), (idempotency_key(run_id, 1, 1, ""), 1000, "yes")]
    assert ends == [("a", {"n": 10}, 0), ("b", {"n": 11}, 15), ("c", {"n": 110}, 0)]
    [row] = [one for one in cluster.store.attempts(run_id) if one.node_id == "b"]
    assert (row.tokens, row.model, row.cost_usd) == (15, "a-model-of-ours", 0.5)


async def test_events_come_with_the_end_of_a_call(cluster: Cluster) -> None:
    """Readers get a place's events, also in threads and before a failure; of too many the newest."""
    hub = EventHub()

    async def fails(state: Num) -> Any:
        here().emit({"half": ["a", None]}, name="progress")
        raise Mine

    def call(state: Num) -> Num:
        for index in range(2000):
            here().emit(f"{index} {'x' * 490}")
        return state

    place = place_of(cluster)
    pipeline = Pipeline("p", [placed("a", call, place), placed("b", fails, place)])
    async with workers(cluster, pipeline, hooks=EventHooks(hub=hub)):
        await cluster.runner.run(pipeline, Num(), run_id=fresh_id())
    events = list(iter(hub.take, None))
    ends = [event.kind for event in events if event.kind != "node_event"]
    assert ends == ["run_start", "node_start", "node_success", "node_start", "node_failure"]
    *texts, progress = [event for event in events if event.kind == "node_event"]
    numbers = [int(event.data.partition(" ")[0]) for event in texts]
    assert numbers == list(range(2000 - len(texts), 2000))
    assert 900 < len(texts) < 1000
    assert (progress.node_id, progress.name, progress.data) == ("b", "progress", {"half": ["a", None]})


class Refused(Exception):
    """As an SDK raises it: a status, and headers."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"status {status}")
        self.status_code = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Mine(Exception):
    pass


def mine(error: Exception, where: Any) -> FailureClass | None:
    return FailureClass.TERMINAL if isinstance(error, Mine) else None


ERRORS: dict[str, Callable[[], BaseException]] = {
    "ambiguous": lambda: ValueError("odd"),
    "empty": lambda: RuntimeError(),
    "timeout": lambda: TimeoutError("late"),
    "bug": lambda: NameError("name 'x' is not defined"),
    "connection": lambda: ConnectionRefusedError("no"),
    "rate limit": lambda: Refused(429, retry_after="600"),
    "auth": lambda: Refused(401),
    "server": lambda: Refused(503),
    "custom": lambda: Mine("mine"),
    "stray cancellation": lambda: asyncio.CancelledError("stray"),
    "group": lambda: ExceptionGroup("both", [Refused(429, retry_after="300"), TimeoutError()]),
}


async def run_once(cluster: Cluster, func: Any, **config: Any) -> Any:
    """Return the record of the last attempt of a function at its place."""
    run_id = fresh_id()
    pipeline = Pipeline("p", [placed(f"a-{run_id}", func, place_of(cluster), **config.pop("contract", {}))])
    async with workers(cluster, pipeline, **config):
        await cluster.runner.run(pipeline, Num(), run_id=run_id)
    return cluster.store.attempts(run_id)[-1]


@pytest.mark.parametrize("name", ERRORS)
async def test_failures_are_classified_as_in_one_process(cluster: Cluster, name: str) -> None:
    """A failure at its place has the class, reason, wait and message as in one process."""
    waits: list[float | None] = []

    async def fail(state: Num) -> Num:
        here().report_usage(input_tokens=7)
        raise ERRORS[name]()

    def note(self: Any, run: Any, failure: Any) -> Any:
        waits.append(failure.retry_after_seconds)
        return failure

    config: dict[str, Any] = {"classifiers": [mine], "policy_map": NEVER, "unknown_model": "warn"}
    runner = quick(**config, store=cluster.store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interceptor, "diagnosed", note)
        patch.setattr(interceptors, "INTERCEPTORS", [Interceptor()])
        patch.setattr("stroma.engine.context.INTERCEPTORS", [Interceptor()])
        local_id = fresh_id()
        await runner.run([node("a", fail)], Num(), run_id=local_id)
        [local] = cluster.store.attempts(local_id)
        away = await run_once(cluster, fail, **config)
    for field in ("failure_class", "reason", "message", "error_type", "tokens"):
        assert getattr(away, field) == getattr(local, field), field
    assert waits[0] == waits[1]


async def test_an_output_that_breaks_its_contract(cluster: Cluster) -> None:
    """The owner refuses and repairs the output of a place; the next attempt there has the complaint."""
    prompts: list[str | None] = []

    async def call(state: Num) -> Any:
        last = here().last_failure
        prompts.append(None if last is None else last.as_prompt())
        return {"n": "many"} if last is None else {"n": 3}

    run_id = fresh_id()
    pipeline = Pipeline("p", [placed("a", call, place_of(cluster))])
    async with workers(cluster, pipeline, contract_retries={"a": 1}):
        result = await cluster.runner.run(pipeline, Num(), run_id=run_id)
    assert (result.status, result.output) == (RunStatus.COMPLETED, Num(n=3))
    assert prompts[0] is None
    assert prompts[1] is not None
    assert "n:" in prompts[1]
    first, _ = cluster.store.attempts(run_id)
    assert (first.failure_class, first.reason) == ("RECOVERABLE", "contract")


async def test_a_plain_function_at_a_place(cluster: Cluster) -> None:
    """A plain def runs in a thread of its place; an output that is not a value fails its contract."""

    def call(state: Num) -> Any:
        return iter(()) if here().attempt == 1 else {"n": 2}

    row = await run_once(cluster, call, policy_map=ONCE)
    assert (row.reason, row.failure_class, row.attempt) == ("contract", "TERMINAL", 1)


async def test_a_timeout_ends_the_call(cluster: Cluster) -> None:
    """The time limit of the node, and a cancelled run, end the function at its place."""
    ends: asyncio.Queue[str] = asyncio.Queue()

    async def call(state: Num) -> Num:
        await ends.put("begun")
        try:
            await asyncio.Event().wait()
        finally:
            await ends.put("ended")
        return state

    pipeline = Pipeline("p", [placed("slow", call, place_of(cluster))])
    async with workers(cluster, pipeline, node_timeouts={"slow": 700}):
        assert (await cluster.runner.run(pipeline, Num(), run_id=fresh_id())).status is RunStatus.PARTIAL
        assert [await asyncio.wait_for(ends.get(), 30) for _ in range(2)] == ["begun", "ended"]
    async with workers(cluster, pipeline):
        run_id = fresh_id()
        await cluster.runner.submit(pipeline, Num(), run_id=run_id)
        assert await asyncio.wait_for(ends.get(), 30) == "begun"
        await cluster.runner.cancel(run_id)
        assert await asyncio.wait_for(ends.get(), 30) == "ended"
        await cluster.until_status(run_id, "CANCELLED")
    assert cluster.store.attempts(run_id)[-1].outcome == "cancelled"


async def test_an_owner_that_is_shut_down(cluster: Cluster) -> None:
    """A worker whose time to drain is over leaves the call in flight to the run's next owner: one call."""
    calls: list[int] = []
    begun, opened = asyncio.Event(), asyncio.Event()

    async def call(state: Num) -> Num:
        calls.append(state.n)
        begun.set()
        await opened.wait()
        return Num(n=5)

    pipeline = Pipeline("p", [placed("a", call, place_of(cluster), effect=True)])
    handle = await cluster.runner.submit(pipeline, Num(), run_id=fresh_id())

    def worker(**options: Any) -> Any:
        config = RunConfig(policy_map=NEVER)
        return stroma_worker(cluster.client, cluster.queue, [pipeline], config=config, **options)

    async with worker(place=place_of(cluster)):
        async with worker(store=cluster.store, drain_seconds=0.2):
            await asyncio.wait_for(begun.wait(), 30)
        assert await handle.status() == "INTERRUPTED"
        opened.set()
        async with worker(store=cluster.store):
            result = await handle.result(timeout=60)
    assert (result.status, result.output, calls) == (RunStatus.RESUMED, Num(n=5), [0])


async def test_a_flow_and_a_map_at_a_place(cluster: Cluster) -> None:
    """Steps of flows, and items of maps, are called at their places."""

    step = placed(fresh_id(), computing(lambda state: Num(n=state.n * 2)), place_of(cluster))

    @stroma_flow("flow", input=Num, output=Num)
    async def body(flow: Flow, state: Num) -> Num:
        first = await flow.step(step, state)
        rest = await flow.map(step, [Num(n=n) for n in range(3)])
        return Num(n=first.n + sum(one.n for one in rest))

    async with workers(cluster, body):
        result = await cluster.runner.run(body, Num(n=4), run_id=fresh_id())
    assert result.output == Num(n=14)


async def test_what_is_not_available_at_a_place(cluster: Cluster) -> None:
    """Questions, and steps that the function calls, are failures that name the fix, not unanswered calls."""

    async def step(state: Num) -> Num:
        context = current_run()
        assert context is not None
        await execute_step("inner", step, state, context)
        return state

    row = await run_once(cluster, failing_with(Suspend, "Well?"), policy_map=ONCE)
    assert (row.failure_class, row.reason) == ("TERMINAL", "place")
    assert "ask in another node" in row.message
    row = await run_once(cluster, step, policy_map=ONCE)
    assert row.failure_class == "TERMINAL"
    assert "call them in another node" in row.message


async def test_states_over_the_limit_of_the_server(cluster: Cluster) -> None:
    """An input or output over the server's limit is a TERMINAL failure: no further call is made."""
    calls: list[int] = []

    def grow() -> Any:
        async def grow(state: Num) -> Text:
            calls.append(state.n)
            return Text(text="x" * 3_000_000)

        return grow

    place = place_of(cluster)
    away = Pipeline("away", [placed("grow", grow(), place, Num, Text)])
    here = Pipeline("here", [node("grow", grow(), Num, Text), placed("big", pass_on, place, Text, Text)])
    for pipeline, reason in ((away, "too_large"), (here, "place")):
        run_id = fresh_id()
        async with workers(cluster, pipeline, policy_map=ONCE):
            result = await cluster.runner.run(pipeline, Num(), run_id=run_id)
        last = cluster.store.attempts(run_id)[-1]
        assert (result.status, last.failure_class, last.reason) == (RunStatus.FAILED, "TERMINAL", reason)
    assert calls == [0, 0]


async def test_any_text_is_the_id_of_a_node_with_a_place(cluster: Cluster) -> None:
    """A long id of any characters is no reason for the server to refuse a call."""
    pipeline = Pipeline("p", [placed("\U0001f600\n" * 300, pass_on, place_of(cluster))])
    async with workers(cluster, pipeline):
        result = await cluster.runner.run(pipeline, Num(n=1), run_id=fresh_id())
    assert (result.status, result.output) == (RunStatus.COMPLETED, Num(n=1))


async def test_a_worker_of_a_place_without_the_node(cluster: Cluster) -> None:
    """A worker without the node refuses the call: the failure is RECOVERABLE, an effect is not in doubt."""
    place = place_of(cluster)
    pipeline = Pipeline("p", [placed("a", pass_on, place, effect=True)])
    other = Pipeline("other", [node("b", pass_on)])
    run_id = fresh_id()
    async with stroma_worker(cluster.client, cluster.queue, [other], place=place), cluster.worker(pipeline):
        result = await cluster.runner.run(pipeline, Num(), run_id=run_id)
    [row] = cluster.store.attempts(run_id)
    assert (result.status, row.failure_class, row.reason) == (RunStatus.PARTIAL, "RECOVERABLE", "worker_lost")
    assert "start it with the code of the run" in row.message


async def pass_on(state: Any) -> Any:
    return state


def test_the_queue_that_drives_runs_is_no_place(cluster: Cluster) -> None:
    """A place that is the task queue of the runs is refused at a worker's creation and at a flow's call."""
    with pytest.raises(PlaceError, match="pass another place"):
        stroma_worker(cluster.client, "q", [], place="q")
    pipeline = Pipeline("p", [parallel(placed("a", pass_on, cluster.queue), node("b", pass_on))])
    with pytest.raises(PlaceError, match="the run would wait for itself"):
        cluster.worker(Pipeline("p", [node("c", pass_on), *pipeline.nodes]))


@pytest.mark.parametrize("effect", [pytest.param(False, marks=pytest.mark.nightly), True])
async def test_a_killed_owner(temporal_server: TemporalServer, tmp_path: pathlib.Path, effect: bool) -> None:
    """After SIGKILL of the owner the next one awaits the call in flight: the function is called once."""
    async with fleet_of(temporal_server, tmp_path) as (fleet, runner, store):
        pipeline = placed_pipeline(fleet.queue, effect=effect)
        fleet.start("place")
        owner = fleet.start("owner")
        handle = await runner.submit(pipeline, Num(n=1), run_id=fleet.run_id)
        await fleet.until(lambda: fleet.lines("call"))
        epoch = store.get_run(fleet.run_id).epoch
        owner.kill()
        owner.wait()
        fleet.start("owner")
        await fleet.until(lambda: store.get_run(fleet.run_id).epoch > epoch)
        pathlib.Path(f"{fleet.diary}.go").touch()
        result = await handle.result(timeout=90)
        assert (result.status, result.output) == (RunStatus.RESUMED, Num(n=2))
        assert len(fleet.lines("call")) == 1


async def test_a_killed_worker_of_a_place(temporal_server: TemporalServer, tmp_path: pathlib.Path) -> None:
    """An attempt whose place was killed fails as worker_lost, RECOVERABLE; another worker makes the next."""
    async with fleet_of(temporal_server, tmp_path) as (fleet, runner, store):
        pipeline = placed_pipeline(fleet.queue)
        first = fleet.start("place")
        fleet.start("owner")
        handle = await runner.submit(pipeline, Num(n=1), run_id=fleet.run_id)
        await fleet.until(lambda: fleet.lines("call"))
        first.kill()
        pathlib.Path(f"{fleet.diary}.go").touch()
        second = fleet.start("place")
        result = await handle.result(timeout=90)
        assert (result.status, result.output) == (RunStatus.COMPLETED, Num(n=2))
        assert fleet.lines("call") == [(1, first.pid), (2, second.pid)]
        lost = [one for one in store.attempts(fleet.run_id) if one.failure_class]
        assert [(one.failure_class, one.reason) for one in lost] == [("RECOVERABLE", "worker_lost")]


async def test_an_effect_whose_place_is_lost(temporal_server: TemporalServer, tmp_path: pathlib.Path) -> None:
    """An effect whose place was killed is not called again until it is stated not to have happened (G13)."""
    async with fleet_of(temporal_server, tmp_path) as (fleet, runner, _):
        pipeline = placed_pipeline(fleet.queue, effect=True)
        first = fleet.start("place")
        fleet.start("owner")
        handle = await runner.submit(pipeline, Num(n=1), run_id=fleet.run_id)
        await fleet.until(lambda: fleet.lines("call"))
        first.kill()
        fleet.start("place")
        pathlib.Path(f"{fleet.diary}.go").touch()
        result = await asyncio.wait_for(handle.until_stopped(), 90)
        assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["effect"])
        assert len(fleet.lines("call")) == 1
        await runner.signal(fleet.run_id, NotDone(), question=result.questions[0].id)
        result = await handle.result(timeout=90)
        assert (result.status, result.output) == (RunStatus.RESUMED, Num(n=2))
        assert len(fleet.lines("call")) == 2


async def test_a_message_is_redacted_at_its_place(cluster: Cluster) -> None:
    """A worker of a place sends the message of a failure without what redact removes: Temporal stores it."""

    async def use(state: Text) -> Text:
        raise ValueError(f"no mailbox {state.text}")

    def hide(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "text": "***"} if "text" in state else state

    sent: list[str] = []

    on_node_failure = noting(sent, lambda _run, _node, error, _kind: str(error))
    pipeline = Pipeline("place", [placed("use", use, place_of(cluster), Text, Text)])
    async with workers(cluster, pipeline, redact=hide, hooks=NodeHooks(on_node_failure=on_node_failure)):
        await cluster.runner.run(pipeline, Text(text="ada@example.org"), run_id=fresh_id())
    assert sent == ["no mailbox [redacted]"]
