"""Maps over many items: where items come from and outputs go, collected failures, progress, resuming."""

import asyncio
import gc
import json
import math
import os
import re
import tracemalloc
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, RootModel, create_model
from tests.fixtures import store_fixture
from tests.kit import (
    NEVER,
    ONCE,
    TWICE,
    SimpleStore,
    bare,
    computing,
    failing_with,
    noting,
    passing,
    returning,
)
from tests.kit import Item as Num
from tests.shared_stores import IN_PROCESS

from stroma import (
    AsyncInMemoryStore,
    Breaker,
    BudgetExceeded,
    CheckpointNotFound,
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    Fenced,
    Flow,
    ItemFailure,
    Journal,
    JsonLines,
    Limit,
    MapProgress,
    NodeHooks,
    NotDone,
    PipelineChanged,
    RunStatus,
    SQLiteStore,
    StoreError,
    StromaRunner,
    current_node,
    current_run,
    execute_step,
    map_over,
    parallel,
    stroma_node,
)
from stroma.testing import crash_at


class Made(BaseModel):
    twice: int


class State(BaseModel):
    nums: list[int] = []
    source: str = ""
    other: str = "kept"


class Doubler:
    """A node that doubles, counts its calls, and fails where it is told to."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self.failing: set[int] = set()
        self.error: Callable[[], Exception] = lambda: ValueError("no")
        self.running = self.most = 0

        @stroma_node("double", input=Num, output=Made)
        async def double(state: Num) -> Any:
            self.calls[state.n] += 1
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0)
            self.running -= 1
            if state.n in self.failing:
                raise self.error()
            return {"twice": 2 * state.n}, 3

        self.node = double


@pytest.fixture
def doubler() -> Doubler:
    return Doubler()


store = store_fixture(*IN_PROCESS)


def quick(store: Any, **config: Any) -> StromaRunner:
    config.setdefault("policy_map", NEVER)
    config.setdefault("run_id", "run")
    return StromaRunner.quick(store=store, **config)


def write(path: Path, numbers: Any) -> Path:
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def doubled(numbers: Any) -> list[Any]:
    return [{"twice": 2 * n} for n in numbers]


# ---------------------------------------------------------------------- sources and outputs


@pytest.mark.core
async def test_from_a_file_into_a_file(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """Items are lines of one file, outputs lines of another one, in order; the state goes on as it is."""
    source, out = write(tmp_path / "in.jsonl", range(500)), tmp_path / "out.jsonl"
    work = map_over(JsonLines(source), doubler.node, into=JsonLines(out))
    result = await quick(store).run([work], State())
    assert (result.status, result.failure) == (RunStatus.COMPLETED, None)
    assert result.final_state.model_dump() == State().model_dump()
    assert read(out) == doubled(range(500))
    assert result.total_tokens == 1500
    assert work.node_id == "map_over(in.jsonl, double)"
    assert sorted(os.listdir(tmp_path)) == sorted({"in.jsonl", "out.jsonl", *os.listdir(tmp_path)} - {".out"})
    assert not list(tmp_path.glob(".*.part"))


async def test_the_state_names_the_files(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """JsonLines(field=...) is the file whose path stands in that field of the state."""

    class Paths(BaseModel):
        given: str
        wanted: Path

    write(tmp_path / "in.jsonl", range(3))
    work = map_over(JsonLines(field="given"), doubler.node, into=JsonLines(field="wanted"))
    paths = Paths(given=str(tmp_path / "in.jsonl"), wanted=tmp_path / "out.jsonl")
    result = await quick(store).run([work], paths)
    assert result.status is RunStatus.COMPLETED, result.failure
    assert read(tmp_path / "out.jsonl") == doubled(range(3))


async def test_from_a_file_into_a_field(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """Items of a file can become a list in the state."""
    work = map_over(JsonLines(write(tmp_path / "in", range(9))), doubler.node, into="made")
    result = await quick(store).run([work], State())
    assert result.final_state is not None, result.failure
    assert result.final_state.model_dump()["made"] == doubled(range(9))


@pytest.mark.parametrize("kind", ["list", "generator", "async"])
async def test_from_a_function_into_the_journal(store: Any, doubler: Doubler, kind: str) -> None:
    """A function of the state gives any iterable; outputs in the journal are read by page, in order."""
    closed = []

    async def later(state: State) -> AsyncIterator[Any]:
        try:
            for n in state.nums:
                await asyncio.sleep(0)
                yield {"n": n}
        finally:
            closed.append(True)

    def now(state: State) -> Iterator[Any]:
        for n in state.nums:
            yield Num(n=n)

    gives: Any = {"list": lambda state: state.nums, "generator": now, "async": later}[kind]
    work = map_over(gives, doubler.node, into=Journal())
    runner = quick(store)
    result = await runner.run([work], State(nums=list(range(450))))
    assert result.status is RunStatus.COMPLETED, result.failure
    assert closed == ([True] if kind == "async" else [])
    findings = [pair async for pair in runner.map_outputs("run", work)]
    assert findings == [(n, Made(twice=2 * n)) for n in range(450)]


class Measured(BaseModel):
    value: float
    more: list[float] = [math.inf]


async def test_lines_have_floats_that_json_lacks_as_strings(store: Any, tmp_path: Path) -> None:
    """NaN and infinities of a model are strings in the file of outputs, not null."""
    runner = quick(store)

    @runner.node("measure", input=Num, output=Measured)
    async def measure(state: Num) -> Measured:
        return Measured(value=math.nan)

    work = map_over(JsonLines(write(tmp_path / "in", range(1))), measure, into=JsonLines(tmp_path / "out"))
    assert (await runner.run([work], State())).status is RunStatus.COMPLETED
    assert read(tmp_path / "out") == [{"value": "NaN", "more": ["Infinity"]}]


@pytest.mark.parametrize(("value", "written"), [(b"\xff", "\\xff"), ("cut \ud83d", "cut \ud83d")], ids=type)
async def test_lines_have_what_utf_8_lacks_as_escapes(value: Any, written: str, tmp_path: Path) -> None:
    """Bytes that are not UTF-8, and lone surrogates, do not keep the file of paid outputs from its end."""
    runner = quick(AsyncInMemoryStore())

    class Anything(BaseModel):
        value: Any

    cut = runner.node("cut", input=Num, output=Anything)(computing(lambda _: Anything(value=value)))
    work = map_over(JsonLines(write(tmp_path / "in", range(1))), cut, into=JsonLines(tmp_path / "out"))
    result = await runner.run([work], State())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert read(tmp_path / "out") == [{"value": written}]


@pytest.mark.parametrize(
    ("kind", "value", "written"),
    [
        (list[float], [math.nan, math.inf], ["NaN", "Infinity"]),
        (Any, b"\xff", "\\xff"),
        (Any, "cut \ud83d", "cut \ud83d"),
    ],
    ids=["floats", "bytes", "surrogate"],
)
async def test_lines_have_what_json_lacks(kind: Any, value: Any, written: Any, tmp_path: Path) -> None:
    """Values that JSON or UTF-8 lacks are text or escapes: the file of paid outputs is completed."""
    runner = quick(AsyncInMemoryStore())

    model = create_model("Model", value=(kind, ...))
    give = runner.node("give", input=Num, output=model)(computing(lambda _: model(value=value)))
    work = map_over(JsonLines(write(tmp_path / "in", range(1))), give, into=JsonLines(tmp_path / "out"))
    result = await runner.run([work], State())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert read(tmp_path / "out") == [{"value": written}]


async def test_outputs_without_a_contract(store: Any, tmp_path: Path) -> None:
    """Outputs of a node without a contract are written and read as they were returned."""

    async def echo(state: Any) -> Any:
        return {"got": state.model_dump(), "nan": float("nan")}

    echo._stroma_node_id = "echo"  # type: ignore[attr-defined]
    echo._stroma_contract = None  # type: ignore[attr-defined]
    work = map_over(JsonLines(write(tmp_path / "in", range(2))), echo, into=JsonLines(tmp_path / "out"))
    runner = quick(store)
    result = await runner.run([work], State())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert read(tmp_path / "out") == [{"got": {"n": n}, "nan": "NaN"} for n in range(2)]
    assert [value["got"] async for _, value in runner.map_outputs("run", work)] == [{"n": 0}, {"n": 1}]


async def test_groups_as_items(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """The node of a map may be a group; what its children committed is not run again."""
    left = [1]

    async def fragile(state: Num) -> Any:
        if state.n == 3 and left:
            left.pop()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0.05)  # Until its sibling is committed.
            raise ValueError("once")
        return {"seen": state.n}

    class Seen(BaseModel):
        seen: int

    other = stroma_node("other", input=Num, output=Seen)(fragile)
    source, out = write(tmp_path / "in", range(6)), tmp_path / "out"
    work = map_over(JsonLines(source), parallel(doubler.node, other), into=JsonLines(out), max_concurrency=1)
    runner = quick(store)
    assert (await runner.run([work], State())).status is RunStatus.PARTIAL
    again = await runner.run([work], State(), resume=True)
    assert again.status is RunStatus.RESUMED, again.failure
    assert read(out) == [{"twice": 2 * n, "seen": n} for n in range(6)]
    assert set(doubler.calls.values()) == {1}


async def test_a_map_beside_a_node(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """A map into a file may stand in parallel(): what stands beside it is restored as ever."""
    calls = []

    async def beside(state: State) -> Any:
        calls.append(1)
        return {"other": "done"}

    class Other(BaseModel):
        other: str

    node = stroma_node("beside", input=State, output=Other)(beside)
    doubler.failing = {7}
    source, out = write(tmp_path / "in", range(10)), tmp_path / "out"
    work = parallel(map_over(JsonLines(source), doubler.node, into=JsonLines(out), max_concurrency=1), node)
    runner = quick(store)
    assert (await runner.run([work], State())).status is RunStatus.PARTIAL
    doubler.failing = set()
    result = await runner.run([work], State(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert (len(calls), read(out)) == (1, doubled(range(10)))
    assert [doubler.calls[n] for n in range(10)] == [1] * 7 + [2, 1, 1]


@pytest.mark.parametrize("extra", ["ignore", "allow"])
async def test_what_a_map_passes_on_replaces_no_output(store: Any, doubler: Doubler, extra: Any) -> None:
    """Fields that a map in parallel() passes on unchanged replace no output of its siblings."""

    class Two(BaseModel):
        model_config = ConfigDict(extra=extra)

        left: list[Num] = [Num(n=1)]
        right: list[Num] = [Num(n=2)]

    class Left(BaseModel):
        left: list[Num]

    beside = stroma_node(input=Two, output=Left)(returning({"left": [{"n": 9}]}))
    count = stroma_node(input=Two, output=Num)(returning({"n": 5}))
    left_map = map_over("left", doubler.node, into="left")
    right = map_over("right", doubler.node, into="right")
    doubled, given = [Made(twice=2)], [Num(n=9)]
    cases: list[tuple[Any, Any]] = [
        (parallel(left_map, right), doubled),
        (parallel(parallel(left_map), right), doubled),
        (parallel(left_map, parallel(count, right)), doubled),
        (parallel(left_map, parallel(bare("untyped", returning({"n": 5})), right)), [{"twice": 2}]),
        (parallel(left_map, parallel(bare("giver", returning({"left": [9]})), right)), [9]),
        (parallel(beside, right, map_over("left", doubler.node, into=Journal())), given),
    ]
    for work, left in cases:
        runner = quick(store)
        found = runner.check([work], input_schema=Two)
        assert not [finding for finding in found if finding.kind == "collision"]
        result = await runner.run([work], Two())
        assert result.status is RunStatus.COMPLETED, result.failure
        state: Any = result.final_state
        assert (state.left, state.right) == (left, [Made(twice=4)])


@pytest.mark.parametrize("of_models", [False, True])
@pytest.mark.parametrize("failing", [set(), {1}])
async def test_a_map_of_maps(store: Any, doubler: Doubler, failing: set[int], of_models: bool) -> None:
    """The output of a map of maps fits the next node, and a resume reads it back without a call (G5)."""

    class Row(BaseModel):
        nums: list[Num]

    class Table(BaseModel):
        rows: list[Row]

    class MadeRow(BaseModel):
        made: list[Made]

    class MadeTable(BaseModel):
        out: list[MadeRow]

    def rows(state: Table) -> list[Row]:
        return state.rows

    errors = [ValueError("once")]

    @stroma_node(input=MadeTable, output=MadeTable)
    async def last(state: MadeTable) -> MadeTable:
        if errors:
            raise errors.pop()
        return state

    doubler.failing = failing
    inner = map_over("nums", doubler.node, into="made")
    work = map_over(rows if of_models else "rows", inner, into="out", on_item_failure="collect")
    table = Table(rows=[Row(nums=[Num(n=1), Num(n=2)]), Row(nums=[Num(n=3)])])
    runner = quick(store)
    assert (await runner.run([work, last], table)).status is RunStatus.PARTIAL
    doubler.calls.clear()
    result = await runner.run([work, last], table, resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    made = [MadeRow(made=[Made(twice=2 * num.n) for num in row.nums]) for row in table.rows]
    assert result.final_state == MadeTable(out=made[1:] if failing else made)
    assert not doubler.calls


async def test_nothing_to_do(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """No items give an empty file, and blank lines are no items."""
    (tmp_path / "in").write_text("\n  \n\r\n")
    work = map_over(JsonLines(tmp_path / "in"), doubler.node, into=JsonLines(tmp_path / "out"))
    result = await quick(store).run([work], State())
    assert (result.status, read(tmp_path / "out")) == (RunStatus.COMPLETED, []), result.failure


async def test_lines_of_all_kinds(tmp_path: Path) -> None:
    """A byte order mark, CRLF, a last line without an end and values of any kind are read."""
    same = stroma_node("same", input=RootModel[Any], output=RootModel[Any])(passing())
    (tmp_path / "in").write_bytes(b'\xef\xbb\xbf1\r\n"\xc3\xa9"\r\n\r\n[1, {"a": null}]\n{"a": 1e3}')
    work = map_over(JsonLines(tmp_path / "in"), same, into="out")
    result = await quick(AsyncInMemoryStore()).run([work], State())
    assert result.final_state is not None, result.failure
    assert [one.root for one in result.final_state.out] == [1, "é", [1, {"a": None}], {"a": 1000.0}]  # type: ignore[attr-defined]


@pytest.mark.core
@pytest.mark.parametrize("limit", [1, 3, None])
async def test_so_many_at_once(store: Any, tmp_path: Path, doubler: Doubler, limit: int | None) -> None:
    """max_concurrency bounds the items in flight; where nobody says, 64 of a file run at once."""
    source = write(tmp_path / "in", range(200))
    work = map_over(JsonLines(source), doubler.node, into=JsonLines(tmp_path / "out"), max_concurrency=limit)
    result = await quick(store).run([work], State())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert doubler.most == (limit or 64)


async def test_an_endless_source_is_read_as_far_as_needed(doubler: Doubler) -> None:
    """Items are taken as there is room for them: a budget stops a source without an end, and closes it."""
    taken, closed = [], []

    async def endless(state: State) -> AsyncIterator[Any]:
        n = 0
        try:
            while True:
                taken.append(n)
                yield {"n": n}
                n += 1
        finally:
            closed.append(n)

    work = map_over(endless, doubler.node, into=Journal(), max_concurrency=2)
    budget = ExecutionBudget(max_tokens_total=30)
    result = await quick(AsyncInMemoryStore(), budget=budget).run([work], State())
    assert isinstance(result.failure and result.failure.exception, BudgetExceeded)
    assert len(taken) < 20
    assert len(closed) == 1


# ---------------------------------------------------------------------- stopping and resuming


@pytest.mark.core
async def test_a_resume_runs_only_what_is_left(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """A map that stopped half-way goes on with the items that are not committed; no file before all are."""
    source, out = write(tmp_path / "in", range(700)), tmp_path / "out"
    doubler.failing = {400}
    work = map_over(JsonLines(source), doubler.node, into=JsonLines(out))
    runner = quick(store)
    first = await runner.run([work], State())
    assert (first.status, out.exists()) == (RunStatus.PARTIAL, False)
    doubler.failing = set()
    result = await runner.run([work], State(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert read(out) == doubled(range(700))
    again = {n for n, times in doubler.calls.items() if times > 1}
    assert 400 in again
    assert len(again) <= 64  # Those that were in flight.
    assert first.total_tokens + result.total_tokens == 3 * 700


@pytest.mark.core
async def test_a_budget_stops_in_the_middle(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """Once a limit is crossed nothing more is called, those in flight commit, and nothing is bought twice."""
    source, out = write(tmp_path / "in", range(100)), tmp_path / "out"
    work = map_over(
        JsonLines(source), doubler.node, into=JsonLines(out), max_concurrency=4, on_item_failure="collect"
    )
    first = await quick(store, budget=ExecutionBudget(max_tokens_total=60)).run([work], State())
    assert first.status is RunStatus.PARTIAL
    assert isinstance(first.failure and first.failure.exception, BudgetExceeded)
    assert 20 < sum(doubler.calls.values()) <= 25
    result = await quick(store).run([work], State(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert (result.failed_items, read(out)) == (0, doubled(range(100)))
    assert set(doubler.calls.values()) == {1}


def after_calls(doubler: Doubler, count: int) -> tuple[NodeHooks, asyncio.Event]:
    """Return hooks that set an event once more than so many calls were made."""
    reached = asyncio.Event()

    async def told(run_id: str, node_id: str, state: Any, tokens: int) -> None:
        if sum(doubler.calls.values()) > count:
            reached.set()

    return NodeHooks(on_node_success=told), reached


@pytest.mark.core
async def test_a_shutdown_lets_the_items_in_flight_end(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """A shutdown begins no further item; those in flight commit, and the run is INTERRUPTED."""
    source, out = write(tmp_path / "in", range(300)), tmp_path / "out"
    work = map_over(JsonLines(source), doubler.node, into=JsonLines(out), max_concurrency=4)
    hooks, reached = after_calls(doubler, 50)
    runner = quick(store, hooks=hooks)
    task = asyncio.create_task(runner.run([work], State()))
    await reached.wait()
    await runner.shutdown(drain_seconds=60)
    first = await task
    assert first.status is RunStatus.INTERRUPTED
    assert 50 < sum(doubler.calls.values()) < 120
    assert first.total_tokens == 3 * sum(doubler.calls.values())
    result = await runner.run([work], State(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert (set(doubler.calls.values()), read(out)) == ({1}, doubled(range(300)))


@pytest.mark.core
async def test_a_changed_file_is_refused(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """A resume with other or fewer lines than are done is PipelineChanged; nothing is lost."""
    source, out = write(tmp_path / "in", range(300)), tmp_path / "out"
    doubler.failing = {250}
    work = map_over(JsonLines(source), doubler.node, into=JsonLines(out))
    runner = quick(store)
    await runner.run([work], State())
    doubler.failing = set()
    calls = sum(doubler.calls.values())
    for other, message in (
        ([*range(100), 7, *range(101, 300)], "in has changed since item 100 was recorded; restore it"),
        (range(1, 300), "in has changed since item 0 was recorded; restore it"),
        (range(150), "there are only 150 items where there were more; restore it"),
    ):
        write(source, other)
        with pytest.raises(PipelineChanged, match=message):
            await runner.run([work], State(), resume=True)
    assert sum(doubler.calls.values()) == calls
    write(source, range(300))
    assert (await runner.run([work], State(), resume=True)).status is RunStatus.RESUMED
    assert read(out) == doubled(range(300))


@pytest.mark.core
async def test_added_lines_are_further_items(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """A resume runs the lines that were added to the file, and calls no item again."""
    source, out = write(tmp_path / "in", range(5)), tmp_path / "out"
    doubler.failing = {3}
    work = map_over(JsonLines(source), doubler.node, into=JsonLines(out))
    runner = quick(store)
    await runner.run([work], State())
    doubler.failing = set()
    write(source, range(7))
    assert (await runner.run([work], State(), resume=True)).status is RunStatus.RESUMED
    assert read(out) == doubled(range(7))


@pytest.mark.core
async def test_a_source_that_gives_something_else_is_refused(store: Any, doubler: Doubler) -> None:
    """A function that gives other or fewer items than are done is PipelineChanged, whatever their text is."""
    inputs = [{"n": n, "text": f"<Job object at 0x7f01> {n}"} for n in range(20)]

    def gives(state: State) -> Any:
        return iter(inputs)

    doubler.failing = {15}
    work = map_over(gives, doubler.node, into=Journal(), max_concurrency=1)
    runner = quick(store)
    await runner.run([work], State())
    doubler.failing = set()
    inputs[3] = {"n": 77}
    with pytest.raises(PipelineChanged, match="item 3 that gives returns differs from the recorded one"):
        await runner.run([work], State(), resume=True)
    inputs[3:] = []
    inputs += [{"n": 3, "text": "<Job object at 0x7f01> 3"}]
    with pytest.raises(PipelineChanged, match="there are only 4 items where there were more"):
        await runner.run([work], State(), resume=True)
    inputs[:] = [{"n": n, "text": f"<Job object at 0x7f01> {n}"} for n in range(25)]
    result = await runner.run([work], State(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert len([1 async for _ in runner.map_outputs("run", work)]) == 25


async def test_a_finished_map_is_not_run_again(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """Once the map itself is committed neither its source nor its file is looked at again."""
    last = stroma_node("last", input=State, output=State)(failing_with(ValueError, "later"))
    source, out = write(tmp_path / "in", range(10)), tmp_path / "out"
    nodes = [map_over(JsonLines(source), doubler.node, into=JsonLines(out)), last]
    runner = quick(store)
    assert (await runner.run(nodes, State())).status is RunStatus.PARTIAL
    source.unlink()
    out.unlink()
    again = await runner.run(nodes, State(), resume=True)
    assert (again.failure.message, out.exists()) == ("later", False)
    assert set(doubler.calls.values()) == {1}


async def test_resume_from_the_map_makes_all_anew(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """resume_from= the map runs all of its items again."""
    source, out = write(tmp_path / "in", range(5)), tmp_path / "out"
    work = map_over(JsonLines(source), doubler.node, into=JsonLines(out))
    runner = quick(store)
    await runner.run([work], State())
    result = await runner.run([work], State(), resume_from=work.node_id)
    assert result.status is RunStatus.RESUMED, result.failure
    assert set(doubler.calls.values()) == {2}


@pytest.mark.core
async def test_another_attempt_of_the_map(store: Any, tmp_path: Path, doubler: Doubler) -> None:
    """node_policies may try a map again: only items that are not committed are called."""
    source, out = write(tmp_path / "in", range(300)), tmp_path / "out"
    work = map_over(JsonLines(source), doubler.node, into=JsonLines(out))
    doubler.failing = {150}

    def heal() -> Exception:
        doubler.failing = set()
        return ValueError("once")

    doubler.error = heal
    remembered: list[int] = []

    told = noting(remembered, lambda run_id, node_id, state, tokens: len(current_node().ctx.handover.done))
    runner = quick(store, node_policies={work.node_id: ONCE}, hooks=NodeHooks(on_node_success=told))
    result = await runner.run([work], State())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert read(out) == doubled(range(300))
    assert max(remembered) == 0
    assert {n for n, times in doubler.calls.items() if times > 1} <= set(range(86, 215))


@pytest.mark.parametrize("into", ["field", "file"])
async def test_a_timeout_bounds_the_whole_map(tmp_path: Path, into: str) -> None:
    """node_timeouts under the id of a map ends all of its items; what was committed is not run again."""
    calls: Counter[int] = Counter()
    hangs = [True]

    @stroma_node("hang", input=Num, output=Made)
    async def hang(state: Num) -> Any:
        calls[state.n] += 1
        if state.n == 20 and hangs:
            await asyncio.Event().wait()
        return {"twice": 2 * state.n}

    target: Any = "made" if into == "field" else JsonLines(tmp_path / "out")
    source = JsonLines(write(tmp_path / "in", range(40)))
    work = map_over(source, hang, into=target, max_concurrency=2, on_item_failure="collect")
    store = AsyncInMemoryStore()
    first = await quick(store, node_timeouts={work.node_id: 500}).run([work], State())
    assert (type(first.failure.exception), first.failed_items) == (TimeoutError, 0)
    hangs.clear()
    result = await quick(store).run([work], State(), resume=True)
    assert (result.status, result.failed_items) == (RunStatus.RESUMED, 0), result.failure
    assert {n for n, times in calls.items() if times > 1} == {20}


async def test_taken_over_in_the_middle(tmp_path: Path, doubler: Doubler) -> None:
    """A map whose run is taken over stops with Fenced: nothing is collected; the new owner completes it."""
    source, out = write(tmp_path / "in", range(200)), tmp_path / "out"
    work = map_over(
        JsonLines(source), doubler.node, into=JsonLines(out), max_concurrency=4, on_item_failure="collect"
    )
    reached, go = asyncio.Event(), asyncio.Event()

    async def told(run_id: str, node_id: str, state: Any, tokens: int) -> None:
        if sum(doubler.calls.values()) > 50 and not reached.is_set():
            reached.set()
            await go.wait()

    async with SQLiteStore(tmp_path / "runs.db") as store:
        stale = asyncio.create_task(quick(store, hooks=NodeHooks(on_node_success=told)).run([work], State()))
        await reached.wait()
        owner = await quick(store).run([work], State(), resume=True, if_running="take_over")
        go.set()
        late = await stale
        assert owner.status is RunStatus.RESUMED, owner.failure
        assert isinstance(late.failure and late.failure.exception, Fenced)
        record = store.get_run("run")
        assert record is not None
        committed = [a.branch for a in store.attempts("run") if a.branch and a.output is not None]
    assert (owner.failed_items, late.failed_items, read(out)) == (0, 0, doubled(range(200)))
    assert (record.tokens, len(committed), len(set(committed))) == (600, 200, 200)


async def test_ends_of_items_are_told_again(
    tmp_path: Path, doubler: Doubler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With at-least-once delivery the end of an item is told by the next process, with the output."""
    doubler.failing = {3}
    work = map_over(
        JsonLines(write(tmp_path / "in", range(6))), doubler.node, into=Journal(), max_concurrency=1
    )
    events: list[tuple[str, Any]] = []

    async def success(run_id: str, node_id: str, state: Any, tokens: int) -> None:
        here = current_node()
        if here.redelivered:
            events.append((here.branch, state))

    async with SQLiteStore(tmp_path / "runs.db") as store:
        runner = quick(store, hooks=NodeHooks(on_node_success=success), hook_delivery="at_least_once")
        with monkeypatch.context() as patched:
            # As if the process had died each time before it could note that the hook was told.
            patched.setattr("stroma.checkpoint.durable.session.DurableSession.delivered", lambda *_: None)
            await runner.run([work], State())
        doubler.failing = set()
        result = await runner.run([work], State(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert events == [(str(n), {"twice": 2 * n}) for n in range(3)]


# ---------------------------------------------------------------------- collecting failures


@pytest.mark.core
@pytest.mark.parametrize("into", ["field", "file", "journal"])
async def test_failures_are_collected(store: Any, tmp_path: Path, doubler: Doubler, into: str) -> None:
    """With "collect" the others go on; each that failed is a record with its index, class and message."""
    doubler.failing = {3, 7}
    out = tmp_path / "out.jsonl"
    target: Any = {"field": "made", "file": JsonLines(out), "journal": Journal()}[into]
    source = JsonLines(write(tmp_path / "in", range(10)))
    work = map_over(source, doubler.node, into=target, on_item_failure="collect")
    runner = quick(store)
    result = await runner.run([work], State())
    assert (result.status, result.failed_items, result.failure) == (RunStatus.COMPLETED, 2, None)
    state = result.final_state.model_dump()
    well = [n for n in range(10) if n not in (3, 7)]
    wanted = [
        {
            "index": n,
            "node_id": "double",
            "failure_class": "AMBIGUOUS",
            "message": "ValueError: no",
            "reason": None,
            "attempts": 1,
        }
        for n in (3, 7)
    ]
    if into == "field":
        assert (state["made"], state["made_failures"]) == (doubled(well), wanted)
    elif into == "file":
        assert (read(out), read(tmp_path / "out.failures.jsonl")) == (doubled(well), wanted)
    else:
        findings = [pair async for pair in runner.map_outputs("run", work)]
        assert [index for index, _ in findings] == list(range(10))
        assert [v.model_dump() for _, v in findings if isinstance(v, ItemFailure)] == wanted
        assert [v.model_dump() for _, v in findings if not isinstance(v, ItemFailure)] == doubled(well)
    assert result.total_tokens == 3 * 8


@pytest.mark.core
@pytest.mark.parametrize("into", ["field", "file"])
async def test_failed_items_are_run_again(store: Any, tmp_path: Path, doubler: Doubler, into: str) -> None:
    """A resume leaves failed items as they are; retry_failed_items runs just those and what follows."""
    doubler.failing = {3, 7}
    out = tmp_path / "out.jsonl"
    after: list[int] = []

    async def count(state: Any) -> Any:
        after.append(1)
        return state.model_dump(mode="json")

    count._stroma_node_id = "count"  # type: ignore[attr-defined]
    count._stroma_contract = None  # type: ignore[attr-defined]
    target: Any = "made" if into == "field" else JsonLines(out)
    source = JsonLines(write(tmp_path / "in", range(10)))
    work = [map_over(source, doubler.node, into=target, on_item_failure="collect"), count]
    runner = quick(store)
    await runner.run(work, State())
    doubler.failing = {7}
    entry = await runner.run(work, State(), resume=True)
    assert (entry.status, doubler.calls.total(), len(after)) == (RunStatus.RESUMED, 10, 1)
    assert entry.failed_items == 2  # Of maps that are restored, too.
    returned = await runner.run(work, State(), if_exists="return")
    assert (returned.status, returned.failed_items) == (RunStatus.COMPLETED, 2)
    again = await runner.run(work, State(), resume=True, retry_failed_items=True)
    assert (again.status, again.failed_items) == (RunStatus.RESUMED, 1), again.failure
    assert (doubler.calls[3], doubler.calls[7], doubler.calls.total(), len(after)) == (2, 2, 12, 2)
    doubler.failing = set()
    last = await runner.run(work, State(), resume=True, retry_failed_items=True)
    assert (last.status, last.failed_items, doubler.calls.total()) == (RunStatus.RESUMED, 0, 13)
    assert len(after) == 3
    if into == "file":
        assert (read(out), read(tmp_path / "out.failures.jsonl")) == (doubled(range(10)), [])
    else:
        state = last.final_state.root  # type: ignore[attr-defined]
        assert (state["made"], state["made_failures"]) == (doubled(range(10)), [])
    none_left = await runner.run(work, State(), resume=True, retry_failed_items=True)
    assert (none_left.status, doubler.calls.total(), len(after)) == (RunStatus.RESUMED, 13, 3)


async def test_a_start_at_a_node_retries_no_failed_items(store: Any, doubler: Doubler) -> None:
    """resume_from and a fork use recorded failures: retry_failed_items excludes both, and loses nothing."""

    class Given(State):
        made: list[Made] = []
        made_failures: list[ItemFailure] = []

    doubler.failing = {3}
    made = map_over("nums", doubler.node, into="made", on_item_failure="collect")
    work = [made, stroma_node("last", input=State, output=State)(passing())]
    state, runner = State(nums=[2, 3]), quick(store)
    assert (await runner.run(work, state)).failed_items == 1
    with pytest.raises(ValueError, match="exclude each other"):
        await runner.run(work, state, resume_from="last", retry_failed_items=True)
    with pytest.raises(ValueError, match="a fork retries no failed items"):
        await runner.fork("run", work, at="last", new_run_id="fork", retry_failed_items=True)
    retrying = quick(store, retry_failed_items=True)
    assert (await retrying.run(work, state, resume_from="last")).failed_items == 1
    options: dict[str, Any] = {"output": Given(other="given"), "input_schema": State}
    fork = await retrying.fork("run", work, at=made.node_id, **options)
    assert (fork.status, fork.output.other) == (RunStatus.RESUMED, "given")
    assert (await runner.run(work, state, resume=True)).failed_items == 1
    assert doubler.calls == {2: 1, 3: 1}


@pytest.mark.parametrize("external", [False, True])
async def test_failed_items_of_inner_maps_are_run_again(store: Any, doubler: Doubler, external: bool) -> None:
    """retry_failed_items finds the failed items of a map inside a map, whatever the source of its items."""

    class Row(BaseModel):
        nums: list[Num]

    class Table(BaseModel):
        rows: list[Row]

    def rows(state: Table) -> list[Row]:
        return state.rows

    inner = map_over("nums", doubler.node, into="made", on_item_failure="collect")
    work = [map_over(rows if external else "rows", inner, into="out")]
    table = Table(rows=[Row(nums=[Num(n=1), Num(n=2)]), Row(nums=[Num(n=3)])])
    runner = quick(store)
    doubler.failing = {2, 3}
    assert (await runner.run(work, table)).failed_items == 2
    doubler.failing = {2}
    again = await runner.run(work, table, resume=True, retry_failed_items=True)
    assert (again.status, again.failed_items) == (RunStatus.RESUMED, 1), again.failure
    assert doubler.calls == {1: 1, 2: 2, 3: 2}
    made: Any = again.final_state
    assert [[one.twice for one in row.made] for row in made.out] == [[2], [6]]


async def test_failed_items_inside_a_failed_item_count_after_a_crash(store: Any, doubler: Doubler) -> None:
    """A run counts the failed items of all its maps, also in an item that has failed itself."""

    class Row(BaseModel):
        nums: list[Num]

    class Table(BaseModel):
        rows: list[Row]

    inner = map_over("nums", doubler.node, into="made", on_item_failure="collect")
    row = [inner, bare("refused", failing_with(NotImplementedError))]
    work = [map_over("rows", row, into="out", max_concurrency=1, on_item_failure="collect")]
    table = Table(rows=[Row(nums=[Num(n=1), Num(n=2)]), Row(nums=[Num(n=3)])])
    doubler.failing = {2}
    runner = quick(store)
    assert (await runner.run(work, table, run_id="undisturbed")).failed_items == 3
    with crash_at("before_node", "double", branch="1.0.0"):
        await runner.run(work, table)
    result = await runner.run(work, table, resume=True)
    assert (result.status, result.failed_items) == (RunStatus.RESUMED, 3), result.failure


@pytest.mark.core
@pytest.mark.parametrize("into", ["field", "journal"])
@pytest.mark.parametrize("statement", [{"n": 30}, NotDone()], ids=["done", "not done"])
async def test_a_resume_continues_a_retry_of_failed_items(store: Any, into: str, statement: Any) -> None:
    """A later resume continues a retry of failed items: it uses a statement, not the old failure."""
    declined = ConnectionRefusedError("no connection was made")
    outcomes: list[Exception | Num] = [declined, TimeoutError("unknown"), Num(n=31)]
    runner = quick(store)
    calls = Counter[int]()

    @runner.node(effect=True)
    async def pay(item: Num) -> Num:
        calls[item.n] += 1
        if item.n != 3:
            return item
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    target: Any = "made" if into == "field" else Journal()
    work = [map_over(lambda _: [Num(n=n) for n in range(1, 5)], pay, into=target, on_item_failure="collect")]
    assert (await runner.run(work, State(), run_id="run")).failed_items == 1
    asked = await runner.run(work, State(), run_id="run", resume=True, retry_failed_items=True)
    assert (asked.status, asked.suspended) == (RunStatus.SUSPENDED, ["effect"])
    await runner.signal("run", statement, question=asked.questions[0].id, schema=Num)
    again = await runner.resume(work, "run", input_schema=State)
    assert (again.status, again.failed_items) == (RunStatus.RESUMED, 0)
    assert calls == {1: 1, 2: 1, 3: 2 + isinstance(statement, NotDone), 4: 1}


@pytest.mark.core
@pytest.mark.parametrize("into", ["field", "file"])
async def test_collected_failures_outlive_the_process(
    store: Any, tmp_path: Path, doubler: Doubler, into: str
) -> None:
    """A failure that was collected before the run stopped is kept, not run again; "stop" runs it again."""
    doubler.failing = {3}
    target: Any = "made" if into == "field" else JsonLines(tmp_path / "out")
    source = JsonLines(write(tmp_path / "in", range(30)))
    work = map_over(source, doubler.node, into=target, on_item_failure="collect", max_concurrency=1)
    first = await quick(store, budget=ExecutionBudget(max_tokens_total=30)).run([work], State())
    assert first.status is RunStatus.PARTIAL
    doubler.failing = set()
    result = await quick(store).run([work], State(), resume=True)
    assert (result.status, result.failed_items, doubler.calls[3]) == (RunStatus.RESUMED, 1, 1), result.failure
    assert set(doubler.calls.values()) == {1}

    doubler.failing = {4}
    other = quick(store, run_id="other")
    await quick(store, run_id="other", budget=ExecutionBudget(max_tokens_total=30)).run([work], State())
    doubler.failing = set()
    stops = map_over(source, doubler.node, into=target, max_concurrency=1)
    result = await other.run([stops], State(), resume=True)
    assert (result.status, result.failed_items) == (RunStatus.RESUMED, 0), result.failure
    assert doubler.calls[4] == 3


async def test_retries_come_before_collecting(store: Any, doubler: Doubler) -> None:
    """An item is collected once its own retries are used up, with how many attempts were made."""
    doubler.failing = {1}
    work = map_over("nums", doubler.node, into="made", on_item_failure="collect")
    result = await quick(store, policy_map=TWICE).run([work], State(nums=[0, 1, 2]))
    assert result.final_state is not None, result.failure
    (failed,) = result.final_state.made_failures  # type: ignore[attr-defined]
    assert (failed.index, failed.attempts, doubler.calls[1]) == (1, 3, 3)


@pytest.mark.core
async def test_the_store_lists_the_attempts_of_the_trace(
    store: Any, tmp_path: Path, doubler: Doubler
) -> None:
    """A collected failure is no further attempt: the store and the trace have each failed attempt once."""
    doubler.failing = {1}
    source = write(tmp_path / "in", [0, 1, 2])
    source.write_text(source.read_text() + "no JSON\n")
    work = map_over(JsonLines(source), doubler.node, into="made", on_item_failure="collect")
    result = await quick(store, policy_map=TWICE).run([work], State())
    assert (result.status, result.failed_items) == (RunStatus.COMPLETED, 2), result.failure
    traced = sorted((one.branch, one.attempt, one.outcome) for one in result.trace.walk())
    assert [one for one in traced if one[2] == "failure"] == [
        *(("1", attempt, "failure") for attempt in (1, 2, 3)),
        ("3", 1, "failure"),
    ]
    assert sorted((one.branch, one.attempt, one.outcome) for one in store.attempts("run")) == traced


async def test_collected_exceptions_are_released(doubler: Doubler) -> None:
    """A map holds no exception of an item that failed before, nor what its traceback references."""
    alive, counts = weakref.WeakSet[Exception](), list[int]()

    class Refused(Exception): ...

    def fail() -> Exception:
        gc.collect()
        counts.append(len(alive))
        alive.add(error := Refused())
        return error

    doubler.error, doubler.failing = fail, set(range(9))
    work = map_over("nums", doubler.node, into="made", on_item_failure="collect", max_concurrency=1)
    result = await quick(AsyncInMemoryStore(), policy_map=NEVER).run([work], State(nums=list(range(9))))
    assert (result.failed_items, len(counts)) == (9, 9)
    assert max(counts) <= 1


@pytest.mark.core
async def test_a_store_that_fails_is_not_collected(tmp_path: Path, doubler: Doubler) -> None:
    """What the store cannot keep stops the run, whatever is collected: an item would be lost."""

    class Broken(AsyncInMemoryStore):
        def open_run(self, request: Any) -> Any:
            session = super().open_run(request)
            refused: list[int] = []  # Once: whoever tries to keep something else in its place could.
            record = session.record

            class Session:
                def __getattr__(self, name: str) -> Any:
                    return getattr(session, name)

                def record(self, row: Any, *about: Any) -> Any:
                    if row[10] == "3" and not refused:
                        refused.append(1)
                        error = StoreError("it is full")
                        error.transient = False
                        raise error
                    return record(row, *about)

            return Session()

    work = map_over("nums", doubler.node, into="made", on_item_failure="collect")
    result = await quick(Broken()).run([work], State(nums=list(range(6))))
    assert (result.status, result.failure.message) == (RunStatus.PARTIAL, "it is full")


@pytest.mark.parametrize("by", ["limit", "breaker"])
async def test_an_item_that_is_not_called_is_not_collected(store: Any, doubler: Doubler, by: str) -> None:
    """An item that no limit or breaker lets through stops a collecting map as PARTIAL; a resume calls it."""
    doubler.failing, doubler.error = {2} if by == "breaker" else set(), lambda: ConnectionError("down")
    limit = Limit(requests_per_minute=3 if by == "limit" else 600, max_wait_seconds=0)
    breaker = Breaker(failure_rate=0.1, min_calls=3, max_wait_seconds=0) if by == "breaker" else None
    work = map_over("nums", doubler.node, into="made", on_item_failure="collect", max_concurrency=1)
    state = State(nums=list(range(6)))
    result = await quick(store, limits={"double": limit}, breaker=breaker).run([work], state)
    reason = "limit" if by == "limit" else "circuit_open"
    assert (result.status, result.failure.reason, result.failed_items) == (RunStatus.PARTIAL, reason, 0)
    resumed = await quick(store).run([work], state, resume=True)
    assert (resumed.status, set(doubler.calls)) == (RunStatus.RESUMED, set(range(6)))


# ---------------------------------------------------------------------- bad input


@pytest.mark.core
@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{broken", "line 3 of .*in is not JSON: "),
        (b'"\xff"', "line 3 of .*in is not JSON: "),
        (b'{"n": "many"}', "n: Input should be a valid integer"),
        (b"7 8", "line 3 of .*in is not JSON: "),
    ],
)
@pytest.mark.parametrize("collect", [False, True])
async def test_a_bad_line(
    store: Any, tmp_path: Path, doubler: Doubler, line: bytes, why: str, collect: bool
) -> None:
    """A line that is not a valid input has an event and a failure hook; it ends the map, or is collected."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b'{"n": 0}\n{"n": 1}\n' + line + b'\n{"n": 3}\n')
    work = map_over(
        JsonLines(source),
        doubler.node,
        into=JsonLines(out),
        on_item_failure="collect" if collect else "stop",
        max_concurrency=1,
    )
    hooks: list[str] = []

    async def failed_hook(run_id: str, node_id: str, error: Exception, kind: FailureClass) -> None:
        hooks.extend([str(error)] if node_id == "double" else [])

    runner = quick(store, hooks=NodeHooks(on_node_failure=failed_hook))
    result = await runner.run([work], State())
    (event,) = [one for one in result.trace.walk() if (one.node_id, one.outcome) == ("double", "failure")]
    assert hooks == [event.failure_message]
    assert re.search(why, hooks[0])
    if collect:
        assert (result.status, result.failed_items) == (RunStatus.COMPLETED, 1)
        (failed,) = read(tmp_path / "out.failures.jsonl")
        assert failed["index"] == 2
        assert failed["failure_class"] == "TERMINAL"
        assert re.search(why, failed["message"])
        assert read(out) == doubled([0, 1, 3])
    else:
        assert result.status is RunStatus.FAILED
        assert isinstance(result.failure.exception, ContractViolation)
        assert re.search(why, result.failure.message)
        assert doubler.calls == {0: 1, 1: 1}
    resumed = await runner.run([work], State(), resume=True)
    assert resumed.failed_items == result.failed_items or resumed.status is RunStatus.RESUMED


@pytest.mark.core
async def test_files_that_are_not_there(tmp_path: Path, doubler: Doubler) -> None:
    """A file that cannot be read, or a place that cannot be written, is told before anything is called."""
    good = write(tmp_path / "in", range(3))
    (tmp_path / "link").symlink_to(good)
    for source, into, message in (
        (tmp_path / "none", tmp_path / "out", "cannot read the items of a map"),
        (tmp_path, tmp_path / "out", "cannot read the items of a map"),
        (good, tmp_path / "no" / "out", "directory .*no for the outputs of a map does not exist; create it"),
        (good, tmp_path, "is not a regular file"),
        (good, tmp_path / "link", "in holds the items of the map; pass another path"),
        (good, Path("/dev/null"), "is not a regular file"),
        (Path("/dev/null"), tmp_path / "out", "it is not a regular file, so that"),
    ):
        work = map_over(JsonLines(source), doubler.node, into=JsonLines(into))
        result = await quick(AsyncInMemoryStore()).run([work], State())
        assert re.search(message, result.failure.message), result.failure.message
    work = map_over(JsonLines(field="source"), doubler.node, into=Journal())
    result = await quick(AsyncInMemoryStore()).run([work], State())
    assert (
        "needs the path of a file in field 'source' of the state, and it holds str" in result.failure.message
    )
    assert doubler.calls == {}


async def test_a_line_that_is_too_long(tmp_path: Path, doubler: Doubler, monkeypatch: Any) -> None:
    """A line beyond the limit is refused by its number before anything is called."""
    monkeypatch.setattr("stroma.runner.items._MAX_LINE_BYTES", 20)
    source = tmp_path / "in"
    source.write_text('{"n": 1}\n{"n": 1}' + " " * 30 + "\n")
    work = map_over(JsonLines(source), doubler.node, into=Journal())
    result = await quick(AsyncInMemoryStore()).run([work], State())
    assert "line 2 of" in result.failure.message
    assert doubler.calls == {}


async def test_a_source_that_raises(store: Any, doubler: Doubler) -> None:
    """What a source raises fails the map as it is; what was made is kept, and a resume goes on."""
    broken = [True]

    def gives(state: State) -> Iterator[Any]:
        for n in range(10):
            if n == 7 and broken:
                raise OSError("the shelf is empty")
            yield {"n": n}

    work = map_over(gives, doubler.node, into=Journal(), max_concurrency=1)
    runner = quick(store)
    first = await runner.run([work], State())
    assert first.failure.message == "the shelf is empty"
    broken.clear()
    result = await runner.run([work], State(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert doubler.calls.total() in (10, 11)  # One may have been in flight.


async def test_a_source_that_blocks_does_not_hold_up_a_failure(doubler: Doubler) -> None:
    """An item that fails ends the map even while its source gives nothing more."""
    closed = []

    async def gives(state: State) -> AsyncIterator[Any]:
        try:
            yield {"n": 1}
            await asyncio.Event().wait()
        finally:
            closed.append(1)

    class Endless:
        def __aiter__(self) -> "Endless":
            return self

        async def __anext__(self) -> Any:
            await asyncio.sleep(0)
            return {"n": 1}

        async def aclose(self) -> None:
            closed.append(2)

    doubler.failing = {1}
    for number, source in ((1, gives), (2, lambda state: Endless())):
        work = map_over(source, doubler.node, into=Journal())
        result = await asyncio.wait_for(quick(AsyncInMemoryStore()).run([work], State()), 60)
        assert (result.failure.message, closed) == ("no", [1, 2][:number])


def test_what_is_refused_when_a_map_is_made(doubler: Doubler) -> None:
    """Nonsense is refused where it is written, with what to give in its place."""
    node: Any = doubler.node
    wrong: Any = 3
    inner = map_over("nums", node, into="made")
    apart = map_over("nums", node, into=Journal())
    calls: list[tuple[Any, str, Callable[[], Any]]] = [
        (TypeError, "must be the name of a list field, JsonLines", lambda: map_over(wrong, node, into="a")),
        (TypeError, r"field, JsonLines\(path\) or Journal", lambda: map_over("a", node, into=wrong)),
        (ValueError, "is not the name of a field", lambda: map_over("a b", node, into="a")),
        (ValueError, "is not the name of a field", lambda: map_over("a", node, into="a b")),
        (ValueError, '"stop" or "collect"', lambda: map_over("a", node, into="b", on_item_failure=wrong)),
        (ValueError, "cannot be nested in a map", lambda: map_over("a", inner, into=Journal())),
        (ValueError, "cannot be nested in a map", lambda: map_over("a", parallel(apart, node), into="b")),
        (ValueError, "needs either a path, or field=", lambda: JsonLines()),
        (ValueError, "needs either a path, or field=", lambda: JsonLines("a", field="b")),
        (ValueError, "is not the name of a field", lambda: JsonLines(field="a b")),
    ]
    for error, message, make in calls:
        with pytest.raises(error, match=message):
            make()


async def test_stores_and_runs_without_items(tmp_path: Path, doubler: Doubler) -> None:
    """Outputs that cannot be read back, or maps not in the journal, are told before any call."""
    out = JsonLines(tmp_path / "out")
    result = await quick(SimpleStore()).run([map_over("nums", doubler.node, into=out)], State(nums=[1]))
    assert "SimpleStore has no journal, so the items of a map cannot be read back" in result.failure.message
    assert doubler.calls == {}
    runner = quick(AsyncInMemoryStore())
    entry = map_over("nums", doubler.node, into=Journal())
    doubler.failing = {1}
    await runner.run([entry], State(nums=[1]))
    with pytest.raises(CheckpointNotFound, match=r"has no completed map"):
        _ = [1 async for _ in runner.map_outputs("run", entry)]
    with pytest.raises(TypeError, match="is not a map whose outputs are in the journal"):
        _ = [1 async for _ in runner.map_outputs("run", map_over("nums", doubler.node, into="made"))]
    with pytest.raises(TypeError, match="is not a map whose outputs are in the journal"):
        _ = [1 async for _ in runner.map_outputs("run", doubler.node)]


async def test_by_hand(doubler: Doubler) -> None:
    """A map that is called by hand raises TypeError: it needs a runner."""
    with pytest.raises(TypeError, match="cannot be called directly; run it with a runner"):
        await map_over("nums", doubler.node, into="made")(State())


# ---------------------------------------------------------------------- progress, trace, memory


@pytest.mark.core
@pytest.mark.parametrize("into", ["field", "file"])
async def test_progress(store: Any, tmp_path: Path, doubler: Doubler, into: str) -> None:
    """on_map_progress tells n of m at begin, end and now and then between, restored items among them."""
    source = JsonLines(write(tmp_path / "in", range(50)))
    target: Any = "made" if into == "field" else JsonLines(tmp_path / "out")
    work = map_over(source, doubler.node, into=target, on_item_failure="collect", max_concurrency=1)
    await quick(store, budget=ExecutionBudget(max_tokens_total=60)).run([work], State())
    doubler.failing = {40}
    events: list[MapProgress] = []

    async def progress(run_id: str, node_id: str, text: MapProgress) -> None:
        assert (run_id, node_id, current_node().node_id) == ("run", work.node_id, work.node_id)
        events.append(text)
        raise ValueError("hooks change nothing")

    result = await quick(store, hooks=NodeHooks(on_map_progress=progress)).run([work], State(), resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    first, last = events[0], events[-1]
    assert (first.done, first.total, first.ended) == (0, 50, False)
    assert (last.done, last.total, last.failed, last.restored, last.ended) == (50, 50, 1, 21, True)
    assert [one.done for one in events] == sorted(one.done for one in events)
    assert last.rate > 0
    assert len(events) <= 3 + last.elapsed_seconds / 0.2


@pytest.mark.core
async def test_the_trace_of_many_items_is_short_and_its_sums_exact(doubler: Doubler) -> None:
    """Of a map into the journal first events and failures are kept, others counted: totals stay exact."""
    doubler.failing = set(range(0, 5000, 2))
    work = map_over("nums", doubler.node, into=Journal(), on_item_failure="collect")
    result = await quick(AsyncInMemoryStore()).run([work], State(nums=list(range(5000))))
    assert (result.failed_items, result.total_tokens) == (2500, 7500)
    (event,) = result.trace
    assert len(event.children) + event.left_out.events == 5000
    assert len(event.children) <= 2000
    failed = sum(child.failure is not None for child in event.children)
    assert failed + event.left_out.failures == 2500
    figures = list(result.trace.figures())
    assert sum(tokens for _, tokens, *_ in figures) == 7500
    twin = result.trace.copy()
    assert next(iter(twin)).left_out == event.left_out


@pytest.mark.core
def test_rows_that_are_left_out_are_summed() -> None:
    """What a copy of the rows and a trace that was looked at say of sums is what the rows said."""
    from stroma.trace import AttemptUsage, ExecutionTrace
    from stroma.trace.events import AttemptRow, BoundedRows, Failed

    rows = BoundedRows(1)
    for n in range(4):
        usage = AttemptUsage(10, 4, 0.5, "m")
        failed = Failed(FailureClass.TERMINAL, "no", None, "OSError") if n == 3 else None
        outcome: Any = "failure" if failed else "success"
        rows.append(
            AttemptRow(
                "a",
                1,
                0,
                7,
                {},
                None if failed else {},
                outcome,
                failed,
                usage,
                0,
                str(n),
                "g",
                None,
                None,
                7,
            )
        )
    assert (len(rows), rows.left_out is not None) == (2, True)
    trace = ExecutionTrace("run")
    trace.rows.append(AttemptRow("g", 1, 0, 9, {}, {}, "success", None, None, 0, "", None, None, rows, 9))
    before = sorted(trace.figures(), key=str)
    assert sum(tokens for _, tokens, *_ in before) == 40
    assert sum(cost for _, _, _, cost, *_ in before) == 2.0
    assert (rows.left_out.events, rows.left_out.lost_tokens) == (2, 0)
    copied = trace.copy()
    assert sorted(copied.figures(), key=str) == before
    list(trace.walk())
    after = sorted(trace.figures(), key=str)
    assert [one[:4] for one in after] == [one[:4] for one in before]


@pytest.mark.slow
async def test_memory_is_flat(tmp_path: Path) -> None:
    """Three times the items take no more memory, on a durable store with a file for outputs: also resumed."""
    same = stroma_node("same", input=Num, output=Num)(computing(lambda state: {"n": state.n}))

    async def peak(items: int, *, resumed: bool) -> int:
        source, out = tmp_path / f"in{items}", tmp_path / f"out{items}"
        if not resumed:
            write(source, range(items))
        work = map_over(JsonLines(source), same, into=JsonLines(out), max_concurrency=8)
        async with SQLiteStore(tmp_path / f"{items}.db", synchronous="normal") as store:
            runner = quick(store, run_id="run", resume=True)
            gc.collect()
            tracemalloc.start()
            try:
                result = await runner.run([work], State())
                _, most = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert result.failure is None, result.failure
        return most

    def undo(items: int) -> None:
        import sqlite3

        with sqlite3.connect(tmp_path / f"{items}.db") as db:
            db.execute("DELETE FROM steps WHERE branch = '' AND position >= 0")
            db.execute(f"DELETE FROM steps WHERE branch = '{items - 1}'")
            db.execute("UPDATE runs SET commit_count = (SELECT count(*) FROM steps WHERE position >= 0)")

    await peak(300, resumed=False)  # What is made once.
    small = await peak(1000, resumed=False)
    large = await peak(3000, resumed=False)
    assert large < 1.5 * small
    undo(1000)
    undo(3000)
    small, large = await peak(1000, resumed=True), await peak(3000, resumed=True)
    assert large < 1.5 * small


async def test_failed_items_inside_a_step_are_counted_again(store: Any, doubler: Doubler) -> None:
    """A resume counts the failed items of a map that a step of a flow calls, without calling the step."""
    runner = quick(store)
    collecting = map_over("nums", doubler.node, into="made", on_item_failure="collect")
    doubler.failing = {2}

    @runner.node
    async def step(state: State) -> State:
        await execute_step(collecting.node_id, collecting, state, current_run())
        return state

    @runner.flow
    async def steps(flow: Flow, state: State) -> Num:
        await flow.step(step, state)
        return await flow.wait_for(Num, reason="go on?")

    waiting = await runner.run(steps, State(nums=[1, 2, 3]))
    assert (waiting.status, waiting.failed_items) == (RunStatus.SUSPENDED, 1)
    await runner.signal("run", Num(n=1))
    result = await runner.resume(steps, "run")
    assert (result.status, result.failed_items, doubler.calls.total()) == (RunStatus.RESUMED, 1, 3)
