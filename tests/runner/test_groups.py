"""Groups, rule by rule: parallel() and map_over()."""

import asyncio
import pickle
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, RootModel
from tests.kit import NEVER, ONCE, Many, Num, computing, context_of, node, record_hooks, returning, same

from stroma import (
    CheckpointManager,
    ContractViolation,
    FailureClass,
    FailurePolicy,
    InMemoryStore,
    NodeContract,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    execute_step,
    map_over,
    parallel,
    stroma_node,
)
from stroma.engine.merged_models import merged_model, with_list

R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


quick = partial(StromaRunner.quick, policy_map=ONCE)


class Left(BaseModel):
    left: int = 0
    both: str = ""


class Right(BaseModel):
    right: int = 0
    both: str = ""


class Items(BaseModel):
    items: list[Any]
    other: str = "kept"


def bare(node_id: str, func: Any) -> Any:
    """A function marked by hand, without a contract."""

    async def marked(state: Any) -> Any:
        return await func(state)

    marked._stroma_node_id = node_id
    marked._stroma_contract = None
    return marked


async def test_a_child_without_a_contract_passes_unvalidated() -> None:
    """A child without a contract gets the state as it is and its output is merged as it was returned."""
    seen: list[Any] = []

    async def func(state: Any) -> Any:
        seen.append(state)
        return {"anything": [object]}

    result = await quick().run([parallel(bare("c", func))], Num(n=3))
    assert seen == [Num(n=3)]
    assert result.final_state.model_dump() == {"anything": [object]}


def test_the_groups_id_and_its_markers() -> None:
    """A group's id is "parallel(a, b)", and it can be marked and told like a node."""
    group = parallel(bare("a", returning({})), bare("b", returning({})))
    assert group.node_id == "parallel(a, b)"
    assert group._stroma_node_id == "parallel(a, b)"


@pytest.mark.core
def test_groups_refuse_nonsense_when_they_are_made() -> None:
    """Zero children is a ValueError; what is no node a TypeError; a concurrency below 1 a ValueError."""
    child = bare("a", returning({}))
    with pytest.raises(ValueError, match="at least one"):
        parallel()
    with pytest.raises(TypeError, match="is not a stroma node"):
        parallel(child, returning({}))
    with pytest.raises(TypeError, match="is not a stroma node"):
        map_over("items", returning({}), into="out")
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="max_concurrency"):
            parallel(child, max_concurrency=bad)
        with pytest.raises(ValueError, match="max_concurrency"):
            map_over("items", child, into="out", max_concurrency=bad)


async def test_the_first_failing_child_cancels_and_awaits_its_siblings() -> None:
    """The first child that stops for good cancels and awaits its siblings before the group fails."""
    started, cleaned = asyncio.Event(), []
    boom = ValueError("boom")

    async def hangs(state: Num) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append("sibling")

    async def fails(state: Num) -> Any:
        await started.wait()
        raise boom

    events: list[str] = []
    nodes = [parallel(bare("hangs", hangs), bare("fails", fails))]
    result = await quick(hooks=record_hooks(events), policy_map=NEVER).run(nodes, Num())
    assert cleaned == ["sibling"]
    assert len(asyncio.all_tasks()) == 1
    assert result.status is RunStatus.PARTIAL
    assert events[4:-1] == ["failure fails", "cancelled hangs", "failure parallel(hangs, fails)"]
    (event,) = result.trace
    assert [(c.node_id, c.outcome) for c in event.children] == [("fails", "failure"), ("hangs", "cancelled")]


@pytest.mark.core
@pytest.mark.parametrize("error", [ValueError("own"), TimeoutError("own"), LookupError("own")], ids=repr)
@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_the_childs_own_exception_and_class_come_out(error: Exception, depth: int) -> None:
    """The group fails with that child's own exception and class, however deep, not with an ExceptionGroup."""

    async def fails(state: Num) -> Any:
        raise error

    group = bare("fails", fails)
    for _ in range(depth):
        group = parallel(bare("good", returning({"g": 1})), group)
    result = await quick(
        policy_map=NEVER, classifiers=[lambda e, c: T if isinstance(e, LookupError) else None]
    ).run([group], Num())
    want = {ValueError: A, TimeoutError: R, LookupError: T}[type(error)]
    assert result.failure.exception is error
    assert result.failure.failure_class is want
    assert result.status is (RunStatus.FAILED if want is T else RunStatus.PARTIAL)
    (event,) = result.trace
    assert (event.failure, event.failure_message) == (want, "own")
    assert result.trace.failures() == [event]


@pytest.mark.core
async def test_children_retry_by_their_own_policies() -> None:
    """Each child has its own retries; the group has none unless node_policies names its id."""
    calls: Counter[str] = Counter()

    def flaky(name: str, failures: int) -> Any:
        async def func(state: Num) -> Any:
            calls[name] += 1
            if calls[name] <= failures:
                raise TimeoutError
            return {name: calls[name]}

        return bare(name, func)

    retries = {R: FailurePolicy(max_retries=2, backoff_seconds=0)}
    result = await quick(policy_map=retries).run([parallel(flaky("a", 2), flaky("b", 1))], Num())
    assert result.status is RunStatus.COMPLETED
    assert calls == {"a": 3, "b": 2}
    calls.clear()
    result = await quick(policy_map=retries).run([parallel(flaky("a", 9))], Num())
    assert result.status is RunStatus.PARTIAL
    assert calls == {"a": 3}
    assert len(result.trace) == 1


async def test_a_child_that_refuses_to_be_cancelled_is_kept() -> None:
    """G4: The output of a child that finishes despite its cancellation is committed."""
    store = InMemoryStore()
    started = asyncio.Event()

    async def stubborn(state: Num) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return {"paid": 1}, 5

    async def fails(state: Num) -> Any:
        await started.wait()
        raise ValueError

    nodes = [parallel(bare("stubborn", stubborn), bare("fails", fails))]
    result = await quick(store=store, run_id="r", policy_map=NEVER).run(nodes, Num())
    assert isinstance(result.failure.exception, ValueError)
    assert result.total_tokens == 5
    outcomes = {c.node_id: c.outcome for e in result.trace for c in e.children}
    assert outcomes == {"stubborn": "success", "fails": "failure"}
    assert store.load("r", "stubborn") is not None


@pytest.mark.core
@pytest.mark.parametrize("limit", [1, 2, 3, None])
@pytest.mark.parametrize("kind", ["parallel", "map_over", "by-hand"])
async def test_max_concurrency(limit: int | None, kind: str) -> None:
    """max_concurrency bounds how many children or items run at once, in a run and by hand."""
    running = 0
    most = 0

    async def func(state: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1
        return {"n": 1}

    child = node("c", func)
    if kind == "map_over":
        group = map_over("items", child, into="out", max_concurrency=limit)
        await quick().run([group], Items(items=[{"n": i} for i in range(7)]))
    else:
        group = parallel(*[child] * 7, max_concurrency=limit)
        await (group(Num()) if kind == "by-hand" else quick().run([group], Num()))
    assert most == (limit or 7)


async def test_waiting_for_a_place_is_in_no_childs_duration() -> None:
    """A child that waits for a place under max_concurrency has neither started nor spends its timeout."""

    async def sleeps(state: Num) -> Any:
        await asyncio.sleep(0.2)
        return {"n": 1}

    # The last one would be over its time with its waiting, and has 500 ms to spare without it.
    group = parallel(*[bare(f"c{i}", sleeps) for i in range(4)], max_concurrency=1)
    result = await quick(node_timeouts={f"c{i}": 700 for i in range(4)}, policy_map=NEVER).run([group], Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    (event,) = result.trace
    assert all(child.duration_ms < 700 for child in event.children)


async def test_a_group_called_by_hand() -> None:
    """Called by hand, await parallel(a, b)(state) calls each child once and gives the merged dict."""
    calls: Counter[str] = Counter()

    async def one(state: Num) -> Any:
        calls["one"] += 1
        state.n = 99
        return {"one": 1, "x": 1}, 5

    async def two(state: Num, ctx: dict[str, Any]) -> Any:
        calls["two"] += 1
        return Left(left=state.n)

    def three(state: Num) -> Any:
        calls["three"] += 1
        return {"x": 3}, 1, "gpt-4o"

    group = parallel(node("one", one), parallel(node("two", two)), node("three", three))
    given = Num(n=5)
    assert await group(given) == {"one": 1, "x": 3, "left": 5, "both": ""}
    assert calls == {"one": 1, "two": 1, "three": 1}
    assert given == Num(n=5)


async def test_a_group_as_a_step() -> None:
    """execute_step takes a group in place of a function."""
    runner = quick()
    ctx = context_of(runner)
    result = await execute_step("g", parallel(bare("a", returning({"a": 1}))), Num(), ctx)
    assert result.final_state.model_dump() == {"a": 1}


async def test_the_final_state_of_a_group_has_the_fields_of_its_children() -> None:
    """What children without a contract gave is read by its name, also from JSON."""

    def gives(name: str) -> Any:
        return bare(name, returning({name: [name]}))

    nodes = [parallel(gives("left"), gives("right"))]
    state: Any = (await quick().run(nodes, Num())).final_state
    assert (state.left, state.model_dump()) == (["left"], {"left": ["left"], "right": ["right"]})
    assert type(state).model_validate_json(state.model_dump_json()) == state
    assert (await quick().run(nodes, Num())).final_state == state
    odd: Any = (await quick().run([parallel(*map(gives, ("left", "not a name", "copy")))], Num())).final_state
    assert odd.model_dump() == {"left": ["left"], "not a name": ["not a name"], "copy": ["copy"]}


@pytest.mark.parametrize("opened", [False, True])
async def test_the_merged_class_reads_its_own_checkpoint_back(opened: bool) -> None:
    """The merged state is a model instance whose class reads its own checkpoint back."""
    store = InMemoryStore()
    children = [node("l", returning({"left": 1, "both": "l"}), Num, Left)]
    if opened:
        children.append(bare("free", returning({"free": {"deep": [1]}})))
    group = parallel(*children)
    result = await quick(store=store, run_id="r").run([group], Num())
    state = result.final_state
    kind = type(state)
    assert kind.model_validate(state.model_dump()) == state
    assert kind.model_validate_json(state.model_dump_json()) == state
    assert await CheckpointManager(store).resume("r", group.node_id, kind) == state
    again = await quick(store=store, run_id="r", resume=True).run([group], Num())
    assert again.status is RunStatus.RESUMED
    assert again.final_state == state


@pytest.mark.parametrize("later", ["nothing", "untyped", "open", "group"])
async def test_outputs_before_one_with_any_fields_are_stored(tmp_path: Path, later: str) -> None:
    """A model in an output is stored and fits the next node, also before a child that may give any field."""

    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")

    class Nested(BaseModel):
        num: Num
        nums: list[Num]

    children: list[Any] = [node("l", returning({"num": {"n": 1}, "nums": [{"n": 2}]}), Num, Nested)]
    if later == "untyped":
        children.append(bare("free", returning({"free": 1})))
    elif later != "nothing":
        opened = node("o", returning({"free": 1}), Num, Open)
        children.append(opened if later == "open" else parallel(opened))
    failing = [1]

    async def last(state: Nested) -> Nested:
        if failing:
            raise PermissionError(failing.pop())
        return state

    nodes = [parallel(*children), node("last", last, Nested, Nested)]
    async with SQLiteStore(tmp_path / "runs.db") as store:
        assert (await quick(store=store, policy_map=NEVER).run(nodes, Num(), run_id="r")).failure
        result = await quick(store=store).run(nodes, Num(), run_id="r", resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert result.final_state == Nested(num=Num(n=1), nums=[Num(n=2)])


async def test_a_registered_contract_counts_in_a_group() -> None:
    """In a group too the registry's contract of a child wins over its marker."""
    runner = quick()
    child = node("c", returning({"n": 1, "left": 5}))
    runner.registry.register(NodeContract(node_id="c", input_schema=Num, output_schema=Left))
    result = await runner.run([parallel(child)], Num())
    assert result.final_state.model_dump() == {"left": 5, "both": ""}


class Word(BaseModel):
    word: str
    upper: bool = True


class Root(RootModel[int]):
    pass


async def test_scalar_items() -> None:
    """A scalar item is the value of the node's only required field, or of a root model."""

    async def shout(state: Word) -> Any:
        return {"word": state.word.upper() if state.upper else state.word}

    nodes = [map_over("items", node("shout", shout, Word, Word), into="out")]
    result = await quick().run(nodes, Items(items=["a", "b"]))
    assert [w["word"] for w in result.final_state.model_dump()["out"]] == ["A", "B"]
    nodes = [map_over("items", node("add", computing(lambda state: state.root + 1), Root, Root), into="out")]
    result = await quick().run(nodes, Items(items=[1, 2]))
    assert result.status is RunStatus.COMPLETED, result.failure
    assert result.final_state.model_dump()["out"] == [2, 3]


async def test_model_items_of_a_typed_list() -> None:
    """Items that are models are validated by the node's own input contract, and a bad one fails the group."""

    group = map_over("items", node("same", same), into="items")
    result = await quick().run([group], Many(items=[Num(n=1), Num(n=2)]))
    assert result.final_state.model_dump() == {"items": [{"n": 1}, {"n": 2}]}
    bad = await quick().run([group], Items(items=[{"n": 1}, {"n": "x"}]))
    assert bad.status is RunStatus.FAILED
    assert isinstance(bad.failure.exception, ContractViolation)
    assert bad.failure.exception.direction == "input"


@pytest.mark.parametrize(
    "state", [Num(n=1), Items.model_construct(items="abc"), Items.model_construct(items=None)], ids=repr
)
async def test_a_field_that_is_no_list(state: BaseModel) -> None:
    """map_over over what is no list fails with a message that names the field; the node is not called."""
    calls: list[Any] = []

    async def func(state: Any) -> Any:
        calls.append(state)
        return {"n": 1}

    result = await quick().run([map_over("items", node("a", func), into="out")], state)
    assert result.status in (RunStatus.FAILED, RunStatus.PARTIAL)
    assert "'items'" in result.failure.message
    assert calls == []


class DictRoot(RootModel[dict[str, Any]]):
    pass


@pytest.mark.core
@pytest.mark.parametrize(
    ("contract", "returned"),
    [
        (None, {"items": ["a", "b"], "other": Num(n=1)}),
        (None, Items(items=["a", "b"])),
        (DictRoot, {"items": ["a", "b"], "other": [1]}),
    ],
    ids=["dict", "model", "root-model"],
)
async def test_map_over_what_no_class_names_the_fields_of(contract: Any, returned: Any) -> None:
    """map_over finds its list in the output of a node without a contract or in a root model of a dict."""
    given = []

    async def shout(state: Word) -> Any:
        return {"word": state.word.upper()}

    async def end(state: Any) -> Any:
        given.append(state)
        return {"n": 1}

    marked = (
        None if contract is None else NodeContract(node_id="free", input_schema=Num, output_schema=contract)
    )
    first = stroma_node("free", marked)(computing(lambda _: returned))
    last = stroma_node("end", None)(end)
    group = map_over("items", node("shout", shout, Word, Word), into="out")
    result = await quick().run([first, group, last], Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    (state,) = given
    entry = returned if isinstance(returned, dict) else {"items": ["a", "b"], "other": "kept"}
    assert {name: getattr(state, name) for name in entry} == entry
    assert state.out == [Word(word="A"), Word(word="B")]


async def test_a_list_that_is_not_there_is_told_with_what_is() -> None:
    """Of a state without a class the message names the keys that it has."""
    first = stroma_node("free", None)(returning({"things": [], "more": 1}))
    result = await quick().run([first, map_over("items", node("a", returning({})), into="out")], Num())
    assert result.failure.message == (
        "map_over needs a list in field 'items', got NoneType; the state has the fields: things, more"
    )


@pytest.mark.core
@pytest.mark.parametrize("how", ["map_over", "parallel"])
async def test_keys_that_are_no_names_are_refused(how: str) -> None:
    """A dict with other keys than text cannot be merged, and says so before it is stored."""
    first = stroma_node("free", None)(returning({"items": [1], 7: "seven"}))
    nodes = (
        [parallel(first)]
        if how == "parallel"
        else [first, map_over("items", node("a", returning({})), into="out")]
    )
    result = await quick().run(nodes, Num())
    assert "got the key 7; use text for all keys" in result.failure.message


async def test_map_over_a_group() -> None:
    """map_over takes a group: each item goes through all its children."""
    both = parallel(
        node("l", returning({"left": 1}), Num, Left), node("r", returning({"right": 2}), Num, Right)
    )
    result = await quick().run([map_over("items", both, into="out")], Items(items=[{"n": 1}, {"n": 2}]))
    assert result.status is RunStatus.COMPLETED, result.failure
    assert result.final_state.model_dump()["out"] == [{"left": 1, "both": "", "right": 2}] * 2


async def test_map_over_keeps_extra_fields() -> None:
    """The other fields of the state are kept, extra ones and lossless ones too."""

    class Wide(BaseModel):
        model_config = ConfigDict(extra="allow")
        items: list[int]
        raw: bytes = b"\xff"

    class One(BaseModel):
        item: int

    group = map_over("items", node("same", same, One, One), into="out")
    result = await quick().run([group], Wide(items=[1], raw=b"\x00\xff", more={"k": [1]}))
    assert result.status is RunStatus.COMPLETED, result.failure
    state: Any = result.final_state
    assert (state.raw, state.more, state.out) == (b"\x00\xff", {"k": [1]}, [One(item=1)])


async def test_a_childs_own_timeout_is_its_own() -> None:
    """node_timeouts under a child's id bound that child in each of its attempts."""

    async def hangs(state: Num) -> Any:
        await asyncio.Event().wait()

    result = await quick(node_timeouts={"hangs": 10}).run([parallel(bare("hangs", hangs))], Num())
    assert "'hangs'" in result.failure.message
    (event,) = result.trace
    assert [(c.attempt, c.failure) for c in event.children] == [(1, R), (2, R)]


async def test_a_result_with_the_output_of_groups_can_be_pickled() -> None:
    """Another process reads a pickled result of groups in groups, though it has not run them."""
    inner = parallel(
        node("left", returning({"left": 1}), Items, Left), map_over("items", node("n", same), into="out")
    )
    group = parallel(inner, node("right", returning({"right": 2}), Items, Right))
    result = await quick().run([group], Items(items=[{"n": 1}]))
    data = pickle.dumps(result)
    merged_model.cache_clear()
    with_list.cache_clear()
    copy = pickle.loads(data)
    assert copy.final_state.model_dump() == result.final_state.model_dump()
    assert copy.trace.to_json() == result.trace.to_json()
