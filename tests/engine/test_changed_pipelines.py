"""Resuming with another pipeline: refused by name, and nothing else changes."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, RootModel, create_model
from tests.fixtures import store_fixture
from tests.kit import (
    NEVER,
    Num,
    One,
    Three,
    Two,
    bare,
    fail,
    node,
    quick,
    quick_without_retries,
    returning,
    same,
    sleep_forever,
)

from stroma import (
    AsyncInMemoryStore,
    Flow,
    NodeHooks,
    Pipeline,
    PipelineChanged,
    RunStatus,
    SQLiteStore,
    StoreError,
    map_over,
    parallel,
    stroma_flow,
)


@pytest.mark.core
async def test_a_child_of_another_group_is_a_changed_pipeline() -> None:
    """A group does not take over what a child of the same id committed for another group at its position."""
    store = AsyncInMemoryStore()
    broken = [True]

    async def fails(state: Num) -> Any:
        if broken:
            await asyncio.sleep(0.01)
            raise ValueError
        return {"n": 2}

    first, second, third = node("a", returning({"n": 1})), node("b", fails), node("c", fails)
    runner = quick(store=store, run_id="r", policy_map=NEVER)
    assert (await runner.run([parallel(first, second)], Num())).status is RunStatus.PARTIAL
    broken.clear()
    with pytest.raises(PipelineChanged, match=r"parallel\(a, b\)"):
        await runner.run([parallel(first, third)], Num(), resume=True)


async def test_the_run_of_a_flow_is_not_a_list(store: Any) -> None:
    """A list that takes the place of a flow is refused: it would call the saved steps of the flow again."""
    calls: list[int] = []

    async def pay(state: Num) -> Num:
        calls.append(state.n)
        return state

    paid = node("pay", pay)

    @stroma_flow
    async def order(flow: Flow, state: Num) -> Num:
        await flow.step(paid, state)
        return await flow.wait_for(Num, reason="Ship it?")

    runner = quick_without_retries(store=store, run_id="r")
    assert (await runner.run(order, Num(n=1))).status is RunStatus.SUSPENDED
    with pytest.raises(PipelineChanged, match="inside position 0, and 'pay' has no such child"):
        await runner.run(Pipeline("order", [paid]), Num(n=1), resume=True)
    await runner.signal("r", Num(n=2))
    assert (await runner.run(order, Num(n=1), resume=True)).final_state == Num(n=2)
    assert calls == [1]


class Other(BaseModel):
    m: int = 0


@pytest.mark.core
async def test_run_many_recovers_first() -> None:
    """run_many(recover=True) goes on with what was interrupted before it runs its inputs."""
    store, gate = AsyncInMemoryStore(), asyncio.Event()

    async def wait(state: Num) -> Any:
        await gate.wait()
        return state

    pipeline = Pipeline("p", [node("a", wait)])
    runner = quick_without_retries(store=store)
    task = asyncio.create_task(runner.run(pipeline, Num(n=1), run_id="old"))
    await asyncio.sleep(0.01)
    await runner.shutdown(drain_seconds=0)
    assert (await task).status is RunStatus.INTERRUPTED
    gate.set()
    outcomes = await quick_without_retries(store=store).run_many(pipeline, [Num(n=2)], recover=True)
    assert [getattr(outcome, "final_state", None) for outcome in outcomes] == [Num(n=2)]
    old = store.get_run("old")
    assert old.status == "RESUMED"


async def test_a_run_whose_input_no_longer_fits_is_not_recovered(tmp_path: Path) -> None:
    """recover() gives the error of a run whose input no longer fits, and continues the others."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        for name, func in (("r", sleep_forever), ("s", sleep_forever)):
            runner = quick_without_retries(store=store)
            value: BaseModel = Num(n=1) if name == "r" else Other(m=1)
            first = node("a", func, type(value))
            task = asyncio.create_task(runner.run(Pipeline("p", [first]), value, run_id=name))
            await asyncio.sleep(0.05)
            await runner.shutdown(drain_seconds=0)
            await task

        class Wanted(BaseModel):
            model_config = ConfigDict(extra="forbid")
            n: int

        outcomes = await quick_without_retries(store=store).recover(Pipeline("p", [node("a", same, Wanted)]))
    assert isinstance(outcomes["s"], PipelineChanged)
    assert set(outcomes) == {"r", "s"}


async def test_an_output_of_another_kind_is_a_changed_pipeline() -> None:
    """PipelineChanged says so where a root model stands for a record, or the other way round."""
    store = AsyncInMemoryStore()

    runner = quick_without_retries(store=store)
    nodes = [node("a", returning([1]), output=RootModel[list[int]]), node("b", fail, RootModel[list[int]])]
    await runner.run(nodes, Num(), run_id="r")
    changed = [node("a", same), node("b", same)]
    with pytest.raises(StoreError, match="another kind of value"):
        await runner.run(changed, Num(), run_id="r", resume=True)


store = store_fixture("async-memory", "sqlite")


async def _state_of(store: Any, run_id: str) -> Any:
    """What a durable store says of a run: its row but for times of looking, its attempts and its input."""
    if not isinstance(store, SQLiteStore):
        return None
    return store.get_run(run_id), store.attempts(run_id), store.input_of(run_id)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("how", [{"resume": True}, {"resume_from": "c"}], ids=["resume", "resume_from"])
@pytest.mark.parametrize("change", ["id", "schema", "order"])
async def test_a_refused_resume_changes_nothing(
    change: str, how: dict[str, Any], finished: bool, store: Any
) -> None:
    """A resume refused because the pipeline changed leaves the run's status and commits as they were."""
    calls: list[str] = []
    broken = [not finished]

    def make(name: str, output: Any) -> Callable[..., Any]:
        async def func(state: Any) -> Any:
            calls.append(name)
            if name == "c" and broken[0]:
                raise ValueError("later")
            return output

        return func

    a = node("a", make("a", {"a": 1}), Num, One)
    b = node("b", make("b", {"b": 1}), One, Two)
    c = node("c", make("c", {"c": 1}), Two, Three)
    other = node("other", make("other", {"a": 1}), Num, One)
    changed = node("a", make("a", {"a": 1}), Num, create_model("One", a=(str, "")))
    nodes = {"id": [other, b, c], "schema": [changed, b, c], "order": [b, a, c]}[change]
    runner = quick_without_retries(store=store, run_id="r")
    await runner.run([a, b, c], Num())
    before = await _state_of(store, "r")
    calls.clear()
    with pytest.raises(PipelineChanged):
        await runner.run(nodes, Num(), **how)
    assert calls == []
    assert await _state_of(store, "r") == before
    broken[0] = False
    result = await runner.run([a, b, c], Num(), resume=True)
    assert result.final_state == Three(c=1)
    assert calls == ([] if finished else ["c"])


class Lists(BaseModel):
    left: list[str]
    right: list[str]


class Text(BaseModel):
    t: str


async def test_a_map_over_another_field_is_another_pipeline(store: Any) -> None:
    """Outputs of one field's items are never taken for those of another: the resume says what changed."""
    broken = [True]
    calls: list[str] = []
    left_done = asyncio.Event()

    async def up(state: Text) -> Any:
        calls.append(state.t)
        if state.t == "l2" and broken[0]:
            await left_done.wait()
            raise ValueError("no")
        return {"t": state.t.upper()}

    async def success(*_: Any) -> None:
        left_done.set()

    item = node("up", up, Text, Text)
    data = Lists(left=["l1", "l2"], right=["r1", "r2"])
    runner = quick_without_retries(store=store, run_id="q", hooks=NodeHooks(on_node_success=success))
    assert (await runner.run([map_over("left", item, into="left")], data)).status is RunStatus.PARTIAL
    broken[0] = False
    calls.clear()
    with pytest.raises(PipelineChanged, match=r"map_over\(left, up\).*map_over\(right, up\)"):
        await runner.run([map_over("right", item, into="right")], data, resume=True)
    assert "r1" not in calls


async def test_what_no_store_can_write_resumes_in_memory() -> None:
    """Without a contract a node may return anything: in memory, a lock in its output is there on resume."""
    lock = threading.Lock()
    broken = [True]
    calls: list[str] = []
    done = asyncio.Event()

    async def a(state: Any) -> Any:
        calls.append("a")
        return {"lock": lock, "n": [1]}

    async def b(state: Any) -> Any:
        calls.append("b")
        await done.wait()
        if broken[0]:
            raise ValueError("b")
        return {"b": 1}

    async def success(*_: Any) -> None:
        done.set()

    for nodes in ([parallel(bare("a", a), bare("b", b))], [bare("a", a), bare("b", b)]):
        calls.clear()
        done.clear()
        broken[0] = True
        runner = quick_without_retries(run_id="z", hooks=NodeHooks(on_node_success=success))
        assert (await runner.run(nodes, Num())).status is RunStatus.PARTIAL
        broken[0] = False
        result = await runner.run(nodes, Num(), resume=True)
        assert result.status is RunStatus.RESUMED, result.failure
        assert calls == ["a", "b", "b"]
        if len(nodes) == 1:
            assert result.final_state.model_dump() == {"lock": lock, "n": [1], "b": 1}
