"""Resume, restart and what a run remembers, over every journal store and the simple protocol."""

import asyncio
import re
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, create_model
from tests.checkpoint.damage import reseal
from tests.fixtures import store_fixture
from tests.kit import NEVER, AsyncSimpleStore, Num, SimpleStore, context_of, node, noting, returning, same
from tests.kit import Text as Wrong
from tests.shared_stores import LOCAL

from stroma import (
    BudgetExceeded,
    CheckpointNotFound,
    CorruptCheckpoint,
    ExecutionBudget,
    FailureClass,
    NodeContract,
    NodeHooks,
    PipelineChanged,
    ReliabilityContext,
    RunStatus,
    SQLiteStore,
    StoreError,
    StromaRunner,
    current_node,
    execute_step,
    map_over,
    parallel,
    stroma_node,
)
from stroma.engine.lifecycle import open_run

R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


class Other(BaseModel):
    n: int = 0
    text: str = ""


class Items(BaseModel):
    items: list[int]


class Work:
    """Nodes that add 1, use 10 tokens, count their calls, and fail where they are told to."""

    def __init__(self, *ids: str) -> None:
        self.calls: Counter[str] = Counter()
        self.failing: set[str] = set()
        self.nodes = [self.make(node_id) for node_id in ids]

    def make(self, node_id: str) -> Any:
        async def func(state: Num) -> Any:
            self.calls[node_id] += 1
            if node_id in self.failing:
                raise ValueError(f"{node_id} is broken")
            return {"n": state.n + 1}, 10

        return node(node_id, func)


store = store_fixture(*LOCAL, "sqlite")


def quick(store: Any, **config: Any) -> StromaRunner:
    config.setdefault("policy_map", NEVER)
    config.setdefault("run_id", "r")
    return StromaRunner.quick(store=store, **config)


async def loaded(store: Any, run_id: str, node_id: str, schema: type[BaseModel] = Num) -> Any:
    result = store.load_typed(run_id, node_id, schema)
    return await result if asyncio.iscoroutine(result) else result


@pytest.mark.core
@pytest.mark.parametrize("broken", ["a", "b", "c", "d"])
async def test_resume_goes_on_where_the_run_stopped(store: Any, broken: str) -> None:
    """G5: A resume continues at the first position without a commit, and calls no committed node."""
    work = Work("a", "b", "c", "d")
    work.failing = {broken}
    runner = quick(store)
    first = await runner.run(work.nodes, Num())
    at = "abcd".index(broken)
    assert (first.status, first.final_state) == (RunStatus.PARTIAL, Num(n=at))
    work.failing = set()
    second = await runner.run(work.nodes, Num(), resume=True)
    assert (second.status, second.final_state) == (RunStatus.RESUMED, Num(n=4))
    assert work.calls == {c: 2 if c == broken else 1 for c in "abcd"}
    assert [(event.node_id, event.position) for event in second.trace] == [
        (c, i) for i, c in enumerate("abcd") if i >= at
    ]
    assert second.total_tokens == 10 * (4 - at)


@pytest.mark.core
async def test_the_budget_remembers_failed_attempts_and_money(store: Any) -> None:
    """G6: usage of failed attempts of earlier calls counts against a resume's budget: tokens, dollars."""
    calls: list[int] = []

    async def fails(state: Num) -> Any:
        calls.append(1)
        current_node().report_usage(input_tokens=100_000, model="gpt-4o")  # 0.25 USD
        raise ValueError

    runner = quick(store, resume=True, budget=ExecutionBudget(max_cost_usd=0.6))
    nodes = [node("a", fails)]
    for _ in range(5):
        result = await runner.run(nodes, Num())
        assert result.status is RunStatus.PARTIAL
    assert len(calls) == 3
    assert isinstance(result.failure.exception, BudgetExceeded)
    assert result.total_cost_usd == 0


async def test_running_again_restarts(store: Any) -> None:
    """Running a run id again without resume is a new execution: all is called, with its own totals."""
    work = Work("a", "b")
    runner = quick(store, budget=ExecutionBudget(max_tokens_total=20))
    for n in (1, 2, 3):
        result = await runner.run(work.nodes, Num())
        assert (result.status, result.total_tokens) == (RunStatus.COMPLETED, 20)
        assert work.calls == {"a": n, "b": n}


@pytest.mark.core
async def test_a_restart_forgets_the_commits(store: Any) -> None:
    """After a restart that failed early, resume=True continues the new execution, not the old one."""
    work = Work("a", "b", "c")
    runner = quick(store)
    await runner.run(work.nodes, Num())
    work.failing = {"b"}
    await runner.run(work.nodes, Num(n=100))
    work.failing = set()
    result = await runner.run(work.nodes, Num(n=100), resume=True)
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=103))
    assert work.calls == {"a": 2, "b": 3, "c": 2}


@pytest.mark.parametrize("target", ["a", "b", "c"])
async def test_resume_from_runs_from_that_node_on(store: Any, target: str) -> None:
    """resume_from= skips to that node, discards the commits from it on, and starts from the one before."""
    work = Work("a", "b", "c")
    runner = quick(store)
    await runner.run(work.nodes, Num())
    at = "abc".index(target)
    result = await runner.run(work.nodes, Num(), resume_from=target)
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=3))
    assert work.calls == {c: 1 if i < at else 2 for i, c in enumerate("abc")}
    assert [event.node_id for event in result.trace] == list("abc"[at:])
    assert result.total_tokens == 10 * (3 - at)


@pytest.mark.core
async def test_resume_from_discards_what_follows(store: Any) -> None:
    """After a resume_from that failed, resume=True goes on there: the commits behind it are gone."""
    work = Work("a", "b", "c")
    runner = quick(store)
    await runner.run(work.nodes, Num())
    work.failing = {"b"}
    assert (await runner.run(work.nodes, Num(), resume_from="b")).status is RunStatus.PARTIAL
    work.failing = set()
    result = await runner.run(work.nodes, Num(), resume=True)
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=3))
    assert work.calls == {"a": 1, "b": 3, "c": 2}


@pytest.mark.core
async def test_resume_from_means_the_first_position_with_the_id(store: Any) -> None:
    """resume_from names the first position with that id."""
    work = Work("a", "b")
    nodes = [work.nodes[0], work.nodes[1], work.nodes[0], work.nodes[1]]
    runner = quick(store)
    await runner.run(nodes, Num())
    result = await runner.run(nodes, Num(), resume_from="b")
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=4))
    assert work.calls == {"a": 3, "b": 4}


@pytest.mark.core
async def test_resume_from_without_a_checkpoint(store: Any) -> None:
    """No checkpoint of the node before it is CheckpointNotFound, which names that node; nothing is called."""
    work = Work("a", "b", "c")
    work.failing = {"a"}
    runner = quick(store)
    await runner.run(work.nodes, Num())
    for run_id in ("r", "never-seen"):
        with pytest.raises(CheckpointNotFound, match="'b'"):
            await runner.run(work.nodes, Num(), resume_from="c", run_id=run_id)
    assert work.calls == {"a": 1}


async def test_an_unknown_resume_target(store: Any) -> None:
    """An unknown node is a ValueError that says which ids exist; nothing is called."""
    work = Work("a", "b")
    with pytest.raises(ValueError, match=r"'nope'.*'a', 'b'"):
        await quick(store).run(work.nodes, Num(), resume_from="nope")
    assert work.calls == {}


@pytest.mark.parametrize(("target", "calls"), [("c", 1), ("parallel(a, b)", 2)])
async def test_resume_from_behind_a_group(store: Any, target: str, calls: int) -> None:
    """resume_from behind a group loads its merged state; the group itself discards its children's commits."""
    work = Work("a", "b", "c")
    nodes = [parallel(work.nodes[0], work.nodes[1]), work.nodes[2]]
    runner = quick(store)
    await runner.run(nodes, Num())
    result = await runner.run(nodes, Num(), resume_from=target)
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2))
    assert work.calls == {"a": calls, "b": calls, "c": 2}


async def _stopped(store: Any) -> Work:
    work = Work("a", "b", "c")
    work.failing = {"c"}
    await quick(store).run(work.nodes, Num())
    work.failing = set()
    return work


@pytest.mark.core
async def test_renamed_nodes_are_a_changed_pipeline(store: Any) -> None:
    """Other ids before the resume point are PipelineChanged, naming both ids; nothing is called."""
    work = await _stopped(store)
    other = Work("a", "x", "c")
    with pytest.raises(PipelineChanged, match=r"'b'.*'x'"):
        await quick(store, resume=True).run(other.nodes, Num())
    swapped = [work.nodes[1], work.nodes[0], work.nodes[2]]
    with pytest.raises(PipelineChanged, match=r"'a'.*'b'"):
        await quick(store, resume=True).run(swapped, Num())
    assert other.calls == {}
    assert work.calls == {"a": 1, "b": 1, "c": 1}
    # The run is as it was: with the right pipeline it goes on.
    assert (await quick(store, resume=True).run(work.nodes, Num())).status is RunStatus.RESUMED


@pytest.mark.core
async def test_another_schema_is_a_changed_pipeline(store: Any) -> None:
    """Another output schema before the resume point is PipelineChanged, naming node and class."""
    work = await _stopped(store)

    nodes = [work.nodes[0], node("b", returning({"n": 1}), Num, Other), work.nodes[2]]
    with pytest.raises(PipelineChanged, match=r"'b'.*Other"):
        await quick(store, resume=True).run(nodes, Num())


class Older(BaseModel):
    n: int
    old: str = "kept"


class Newer(BaseModel):
    n: int
    new: str


def _versions(store: Any, model: type[BaseModel], upcast: Any = None, grouped: bool = False) -> list[Any]:
    """Nodes of two releases of a pipeline: the first gives a model that has changed between them."""

    async def first(state: Num) -> Any:
        return {"n": state.n + 1, "new": "made"}

    async def second(state: Any) -> Any:
        if model is Older:
            raise ValueError("not in this release")
        return {"n": state.n * 10}

    instance: Any = stroma_node("first", input=Num, output=model, upcast=upcast)(first)
    return [parallel(instance) if grouped else instance, node("second", second, input=model)]


@pytest.mark.core
@pytest.mark.parametrize("grouped", [False, True])
async def test_outputs_of_an_earlier_schema_are_brought_up_to_date(store: Any, grouped: bool) -> None:
    """A changed schema with an upcast reads what the earlier one recorded; nothing is run again."""
    assert (
        await quick(store).run(_versions(store, Older, grouped=grouped), Num())
    ).status is RunStatus.PARTIAL
    requests: list[Any] = []

    def upcast(raw: Any) -> Any:
        requests.append(raw)
        return {"n": raw["n"], "new": raw["old"] + "!"}

    nodes = _versions(store, Newer, upcast, grouped)
    seen: list[Any] = []

    skipped = noting(seen, lambda run_id, node_id, state: (node_id, state))
    result = await quick(store, resume=True, hooks=NodeHooks(on_node_skipped=skipped)).run(nodes, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=10))
    assert requests == [{"n": 1, "old": "kept"}]
    assert seen == [("first", {"n": 1, "new": "kept!"})]


async def test_a_changed_schema_is_told_field_by_field(store: Any) -> None:
    """PipelineChanged says which fields are gone and which are new, and what can be done."""
    await quick(store).run(_versions(store, Older), Num())
    with pytest.raises(
        PipelineChanged,
        match=r"'old', which is gone; it lacks 'new', which is new.*upcast.*allow_changes=True",
    ):
        await quick(store, resume=True).run(_versions(store, Newer), Num())


async def test_an_upcast_that_fails_leads_back_to_its_node(store: Any) -> None:
    """What an upcast cannot mend is CorruptCheckpoint, with the node to resume from."""
    await quick(store).run(_versions(store, Older), Num())
    with pytest.raises(CorruptCheckpoint, match="resume_from='first'"):
        await quick(store, resume=True).run(_versions(store, Newer, lambda raw: raw), Num())
    with pytest.raises(CorruptCheckpoint, match="its upcast raised KeyError: 'gone'"):
        await quick(store, resume=True).run(_versions(store, Newer, lambda raw: raw["gone"]), Num())


async def test_changes_may_be_allowed(store: Any) -> None:
    """allow_changes continues with what present schemas accept: renamed nodes, other fields, fewer nodes."""
    work = Work("a", "b", "c")
    work.failing = {"c"}
    await quick(store).run(work.nodes, Num())

    async def later(state: Any) -> Any:
        return {"n": state.n + 100}

    middle = node("B", later, input=Other, output=Other)
    nodes = [node("A", later, output=Other), middle, node("C", later, input=Other)]
    with pytest.raises(PipelineChanged):
        await quick(store, resume=True).run(nodes, Num())
    result = await quick(store, resume=True, allow_changes=True).run(nodes, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=102))
    fewer = await quick(store, resume=True, allow_changes=True).run(nodes[:1], Num())
    assert fewer.final_state == Other(n=1)


@pytest.mark.core
async def test_fewer_nodes_are_a_changed_pipeline(store: Any) -> None:
    """A pipeline with fewer nodes than are committed is PipelineChanged."""
    work = await _stopped(store)
    with pytest.raises(PipelineChanged):
        await quick(store, resume=True).run(work.nodes[:1], Num())


async def test_changes_behind_the_resume_point_are_welcome(store: Any) -> None:
    """What stands behind the resume point may change: new nodes, another last one."""
    work = await _stopped(store)
    other = Work("d", "e")
    result = await quick(store, resume=True).run([*work.nodes[:2], *other.nodes], Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=4))


@pytest.mark.core
async def test_another_input_is_refused(store: Any) -> None:
    """resume=True with another input than the run was started with is PipelineChanged; nothing is called."""
    work = await _stopped(store)
    with pytest.raises(PipelineChanged, match="input"):
        await quick(store, resume=True).run(work.nodes, Num(n=5))
    assert work.calls["c"] == 1


async def test_a_changed_group_is_refused(store: Any) -> None:
    """A group whose children changed is PipelineChanged once reached; new children are not called."""
    work = Work("a", "b", "c")
    work.failing = {"c"}
    await quick(store).run([parallel(work.nodes[0], work.nodes[1]), work.nodes[2]], Num())
    other = Work("x")
    with pytest.raises(PipelineChanged):
        await quick(store, resume=True).run([parallel(work.nodes[0], other.nodes[0]), work.nodes[2]], Num())
    assert other.calls == {}


async def test_a_finished_group_is_restored_whole(store: Any) -> None:
    """A committed group is restored as one: its children are neither called nor restored one by one."""
    events: list[str] = []

    skipped = noting(events, lambda run_id, node_id, state: node_id)
    work = Work("a", "b", "c")
    work.failing = {"c"}
    runner = quick(store, resume=True, hooks=NodeHooks(on_node_skipped=skipped))
    nodes = [parallel(work.nodes[0], work.nodes[1]), work.nodes[2]]
    await runner.run(nodes, Num())
    work.failing = set()
    result = await runner.run(nodes, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=2))
    assert work.calls == {"a": 1, "b": 1, "c": 2}
    assert events == ["parallel(a, b)"]


@pytest.mark.core
async def test_items_resume(store: Any) -> None:
    """Each item of a map is journaled on its own: only unfinished items run on resume, in order."""
    calls: Counter[int] = Counter()
    broken = [True]

    class One(BaseModel):
        item: int

    async def func(state: One) -> Any:
        calls[state.item] += 1
        if broken and state.item == 3:
            raise ValueError
        return {"item": state.item * 2}, 1

    nodes = [map_over("items", node("m", func, One, One), into="out", max_concurrency=1)]
    runner = quick(store, resume=True)
    value = Items(items=[1, 2, 3, 4])
    assert (await runner.run(nodes, value)).status is RunStatus.PARTIAL
    assert calls == {1: 1, 2: 1, 3: 1}
    broken.clear()
    second = await runner.run(nodes, value)
    assert second.status is RunStatus.RESUMED, second.failure
    assert calls == {1: 1, 2: 1, 3: 2, 4: 1}
    assert [item["item"] for item in second.final_state.model_dump()["out"]] == [2, 4, 6, 8]
    third = await runner.run(nodes, value)
    assert third.final_state == second.final_state


class Steps:
    """Plain code around execute_step, on one store; counts what is called with what."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.calls: list[str] = []

    def context(self, **config: Any) -> ReliabilityContext:
        runner = quick(self.store, resume=True, **config)
        return context_of(runner)

    async def step(self, ctx: ReliabilityContext, step_id: str, n: int) -> Any:
        async def add(state: Num) -> Any:
            self.calls.append(f"{step_id} {state.n}")
            return {"n": state.n + 1}

        return (await execute_step(step_id, add, Num(n=n), ctx)).final_state


@pytest.mark.core
async def test_a_step_with_another_input_is_refused(store: Any) -> None:
    """The n-th call of a step id with another input is an error with both inputs and the changed fields."""
    steps = Steps(store)
    ctx = steps.context()
    await steps.step(ctx, "add", 1)
    await steps.step(ctx, "add", 2)
    again = steps.context()
    assert await steps.step(again, "add", 1) == Num(n=2)
    with pytest.raises(PipelineChanged, match="call 2 of step 'add' was recorded with other") as raised:
        await steps.step(again, "add", 7)
    assert raised.value.inputs == (b'{"n":2}', b'{"n":7}')
    assert steps.calls == ["add 1", "add 2"]


async def test_the_input_of_a_step_may_get_fields_with_defaults(store: Any) -> None:
    """After a deploy that adds a field with a default to an input, a step returns its recorded output."""
    steps = Steps(store)
    ctx = steps.context()
    await steps.step(ctx, "add", 1)
    await steps.step(ctx, "add", 2)
    longer, again = create_model("Longer", n=(int, 0), more=(str, "yes")), steps.context()
    result = await execute_step("add", same, longer(n=1), again)
    assert result.final_state == longer(n=2)
    with pytest.raises(PipelineChanged, match="other values of 'more'"):
        await execute_step("add", same, longer(n=2, more="no"), again)


@pytest.mark.core
async def test_steps_are_known_by_the_call_of_their_id(store: Any) -> None:
    """What a step id's n-th call recorded is found again, whatever other steps were called before."""
    steps = Steps(store)
    ctx = steps.context()
    await steps.step(ctx, "first", 0)
    await steps.step(ctx, "add", 1)
    await steps.step(ctx, "add", 2)
    again = steps.context()
    assert await steps.step(again, "first", 0) == Num(n=1)
    assert await steps.step(again, "new", 5) == Num(n=6)
    assert await steps.step(again, "add", 1) == Num(n=2)
    assert await steps.step(again, "add", 2) == Num(n=3)
    assert await steps.step(again, "add", 3) == Num(n=4)
    assert steps.calls == ["first 0", "add 1", "add 2", "new 5", "add 3"]
    last = steps.context()
    for step_id, n in (("first", 0), ("new", 5), ("add", 1), ("add", 2), ("add", 3)):
        assert await steps.step(last, step_id, n) == Num(n=n + 1)
    assert len(steps.calls) == 5


class Unkept(BaseModel):
    model_config = {"arbitrary_types_allowed": True}
    n: int
    lock: Any


async def test_a_step_input_without_a_stored_form_is_not_compared(store: Any) -> None:
    """An input that cannot be stored does not keep a step from being recorded and found again."""
    steps = Steps(store)

    async def add(state: Unkept) -> Any:
        steps.calls.append(f"add {state.n}")
        return {"n": state.n + 1}

    contract: NodeContract[Any, Any] = NodeContract(node_id="add", input_schema=Unkept, output_schema=Num)
    for _ in range(2):
        ctx = steps.context()
        await open_run(ctx, Num())
        result = await execute_step("add", add, Unkept(n=1, lock=object()), ctx, contract=contract)
        assert result.final_state == Num(n=2)
    assert steps.calls == ["add 1"]


@pytest.mark.core
@pytest.mark.parametrize("ended", ["well", "failed", "raised", "cancelled"])
async def test_the_end_of_plain_code_is_recorded(tmp_path: Path, ended: str) -> None:
    """``async with ctx:`` around plain code notes in the journal how the run ended."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        steps = Steps(store)

        async def plain() -> None:
            async with steps.context() as ctx:
                await steps.step(ctx, "add", 1)
                assert store.get_run("r").status == "RUNNING"  # type: ignore[union-attr]
                if ended == "failed":

                    async def broken(state: Num) -> Any:
                        raise ValueError("broken")

                    await execute_step("broken", broken, Num(), ctx)
                elif ended == "raised":
                    raise KeyError("of the loop's own")
                elif ended == "cancelled":
                    await asyncio.Event().wait()

        task = asyncio.create_task(plain())
        if ended == "cancelled":
            while not steps.calls or store.get_run("r").nodes == 0:  # type: ignore[union-attr]
                await asyncio.sleep(0.001)
            task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        expected = {
            "well": "COMPLETED",
            "failed": "PARTIAL",
            "raised": "INTERRUPTED",
            "cancelled": "CANCELLED",
        }
        assert store.get_run("r").status == expected[ended]  # type: ignore[union-attr]
        assert type(outcome) is {"raised": KeyError, "cancelled": asyncio.CancelledError}.get(
            ended, type(None)
        )


@pytest.mark.core
async def test_a_run_that_is_cancelled_while_it_opens_is_closed_again(tmp_path: Path) -> None:
    """Cancelled while the store opens it, a run is CANCELLED there, not RUNNING for ever."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        work = Work("a")
        task = asyncio.create_task(quick(store).run(work.nodes, Num()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert store.get_run("r").status == "CANCELLED"  # type: ignore[union-attr]
        assert not work.calls


async def test_a_damaged_child_names_the_group_to_resume_from(tmp_path: Path) -> None:
    """Children of groups are no targets of a resume: the error for a damaged one leads to the group."""
    async with SQLiteStore(tmp_path / "runs.db") as store:
        work = Work("a", "b")
        sequence = [parallel(*work.nodes)]
        work.failing = {"b"}
        await quick(store).run(sequence, Num())
        with sqlite3.connect(tmp_path / "runs.db") as db:
            db.execute("UPDATE steps SET output = x'7b7d' WHERE position >= 0")
        db.close()
        message = re.escape("group around it (resume_from='parallel(a, b)')")
        with pytest.raises(CorruptCheckpoint, match=message):
            await quick(store).run(sequence, Num(), resume=True)
        work.failing = set()
        result = await quick(store).run(sequence, Num(), resume_from="parallel(a, b)")
        assert result.status is RunStatus.RESUMED
        with sqlite3.connect(tmp_path / "runs.db") as db:
            output = b'["stroma/1",3]'
            db.execute("UPDATE steps SET output = ? WHERE branch = '0'", (output,))
            reseal(db)
            db.execute("DELETE FROM steps WHERE branch = '' AND position >= 0")
            db.execute("UPDATE runs SET commit_count = (SELECT count(*) FROM steps WHERE position >= 0)")
        db.close()
        with pytest.raises(CorruptCheckpoint, match=re.escape("resume_from='parallel(a, b)'")):
            await quick(store).run(sequence, Num(), resume=True)


@pytest.mark.parametrize("make", [SimpleStore, AsyncSimpleStore])
async def test_custom_stores_keep_checkpoints_and_resume_from(make: Any) -> None:
    """A custom store of the simple protocol, sync or async, gets every output and serves resume_from."""
    store = make()
    work = Work("a", "b", "c")
    runner = quick(store)
    await runner.run(work.nodes, Num())
    assert store.states == {("r", "a"): Num(n=1), ("r", "b"): Num(n=2), ("r", "c"): Num(n=3)}
    result = await runner.run(work.nodes, Num(), resume_from="c")
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=3))
    assert work.calls == {"a": 1, "b": 1, "c": 2}
    with pytest.raises(CheckpointNotFound, match="'a'"):
        await runner.run(work.nodes, Num(), resume_from="b", run_id="other")
    await runner.checkpoint_manager.clear("r")
    assert store.states == {}


@pytest.mark.core
@pytest.mark.parametrize("make", [SimpleStore, AsyncSimpleStore])
async def test_custom_stores_own_what_they_keep(make: Any) -> None:
    """What a custom store keeps is its own object: nothing that runs later changes it."""
    store = make()

    async def spoils(state: Num) -> Any:
        state.n = 99
        return {"n": 2}

    work = Work("a")
    result = await quick(store).run([*work.nodes, node("spoils", spoils)], Num())
    assert isinstance(result.final_state, Num)
    result.final_state.n = 99
    assert store.states == {("r", "a"): Num(n=1), ("r", "spoils"): Num(n=2)}


async def test_a_custom_store_cannot_resume_by_itself() -> None:
    """resume=True on a store without a journal is a StoreError that says what to use; nothing is called."""
    work = Work("a")
    with pytest.raises(StoreError, match="resume_from="):
        await quick(SimpleStore(), resume=True).run(work.nodes, Num())
    assert work.calls == {}


async def test_a_checkpoint_of_another_class_is_corrupt() -> None:
    """A stored state that does not fit its schema is CorruptCheckpoint, a TypeError as published."""
    store = SimpleStore()
    work = Work("a", "b")
    store.states["r", "a"] = Wrong(text="x")
    with pytest.raises(CorruptCheckpoint):
        await quick(store).run(work.nodes, Num(), resume_from="b")
    assert issubclass(CorruptCheckpoint, TypeError)
    assert work.calls == {}


async def test_saved_by_hand_counts_for_resume_from(store: Any) -> None:
    """A state saved through CheckpointManager serves resume_from as one that a run saved."""
    work = Work("a", "b")
    runner = quick(store)
    await runner.checkpoint_manager.checkpoint("r", "a", Num(n=41))
    result = await runner.run(work.nodes, Num(), resume_from="b")
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=42))
    assert work.calls == {"b": 1}


async def test_what_is_stored_can_be_loaded_by_node(store: Any) -> None:
    """Committed outputs can be read back by run and node id, and deleting a run takes them all."""
    work = Work("a", "b")
    runner = quick(store)
    await runner.run(work.nodes, Num())
    await runner.run(work.nodes, Num(n=10), run_id="other")
    assert [await loaded(store, "r", c) for c in "ab"] == [Num(n=1), Num(n=2)]
    await runner.checkpoint_manager.clear("r")
    assert [await loaded(store, "r", c) for c in "ab"] == [None, None]
    assert await loaded(store, "other", "b") == Num(n=12)
    with pytest.raises(CheckpointNotFound):
        await runner.run(work.nodes, Num(), resume_from="b")


@pytest.mark.core
async def test_usage_counts_across_resumes(store: Any) -> None:
    """G6: A resume's budget, but not its totals, has earlier spend, also of failed and cancelled attempts."""
    inside = asyncio.Event()
    mode = ["cancel"]
    calls: list[str] = []

    async def first(state: Num) -> Any:
        calls.append("first")
        return state, 10

    async def second(state: Num) -> Any:
        calls.append(f"second {mode[0]}")
        current_node().report_usage(input_tokens=20)
        if mode[0] == "cancel":
            inside.set()
            await asyncio.Event().wait()
        if mode[0] == "fail":
            raise ValueError
        return state

    nodes = [node("first", first), node("second", second)]
    runner = quick(store, resume=True).with_budget(tokens=69)
    task = asyncio.create_task(runner.run(nodes, Num()))
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    mode[0] = "fail"
    failed = await runner.run(nodes, Num())
    assert (failed.status, failed.total_tokens) == (RunStatus.PARTIAL, 20)
    mode[0] = "ok"
    over = await runner.run(nodes, Num())  # 10 + 20 + 20 + 20
    assert (over.status, over.total_tokens) == (RunStatus.PARTIAL, 20)
    assert isinstance(over.failure.exception, BudgetExceeded)
    assert over.failure.exception.actual == 70
    assert calls == ["first", "second cancel", "second fail", "second ok"]
