"""Maps with several nodes: each item goes through them in turn, and each node of an item is a full node."""

import asyncio
import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, RootModel
from tests.fixtures import store_fixture
from tests.kit import (
    NEVER,
    ONCE,
    Text,
    bare,
    computing,
    context_on,
    failing_with,
    node,
    noting,
    open_question,
    quick_without_retries,
    record_hooks,
)
from tests.shared_stores import IN_PROCESS

from stroma import (
    ContractRegistry,
    ContractViolation,
    ExecutionBudget,
    Flow,
    ItemFailure,
    Journal,
    JsonLines,
    NodeContract,
    NodeHooks,
    Pipeline,
    PipelineChanged,
    RunConfig,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    Suspend,
    current_node,
    execute_step,
    map_over,
    parallel,
    stroma_flow,
    stroma_node,
)
from stroma.checkpoint.history.reader import History
from stroma.contracts.checks.lineage import lineage_of
from stroma.contracts.node import find_node
from stroma.testing import RecordedRun, crash_at, replay


class Tickets(BaseModel):
    tickets: list[str] = ["a", "b", "c"]


class Class(BaseModel):
    text: str
    kind: str


class Draft(BaseModel):
    draft: str


class Answer(BaseModel):
    answer: str


class Answers(BaseModel):
    tickets: list[str]
    answers: list[Answer]


class Approval(BaseModel):
    approved: bool


class World:
    """Three nodes that classify, draft and check, note their calls, and fail where they are told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.classify = self._node(
            "classify", Text, Class, "text", lambda s: {"text": s.text, "kind": f"{s.text}1"}
        )
        self.draft = self._node("draft", Class, Draft, "text", lambda s: {"draft": f"{s.kind}2"})
        self.check = self._node("check", Draft, Answer, "draft", lambda s: {"answer": f"{s.draft}3"})
        self.nodes = [self.classify, self.draft, self.check]

    def _node(self, node_id: str, input: Any, output: Any, field: str, work: Any) -> Any:
        async def func(state: Any) -> Any:
            call = f"{node_id} {getattr(state, field)[0]}"
            self.calls.append(call)
            await asyncio.sleep(0)
            if call in self.failing:
                raise self.failing[call]
            return work(state), 5

        return node(node_id, func, input, output)


@pytest.fixture
def world() -> World:
    return World()


store = store_fixture(*IN_PROCESS)


def answers(result: Any) -> list[str]:
    assert result.failure is None, result.failure
    return [one.answer for one in result.final_state.answers]


@pytest.mark.core
async def test_each_item_goes_through_the_nodes_in_turn(world: World, store: Any) -> None:
    """Each node gets the output of the one before it; the last outputs are the list, in item order."""
    work = map_over("tickets", world.nodes, into="answers", max_concurrency=1)
    result = await quick_without_retries(store=store).run([work], Tickets(), run_id="run")
    assert (result.status, answers(result)) == (RunStatus.COMPLETED, ["a123", "b123", "c123"])
    assert world.calls == [f"{name} {item}" for item in "abc" for name in ("classify", "draft", "check")]
    assert result.total_tokens == 45
    assert work.node_id == "map_over(tickets, [classify, draft, check])"
    (group,) = result.trace
    assert [(e.node_id, e.branch) for e in group.children] == [
        ("[classify, draft, check]", branch) for branch in "012"
    ]
    second = group.children[1]
    assert (second.input_state, second.output_state) == ({"text": "b"}, {"answer": "b123"})
    assert [
        (e.node_id, e.branch, e.input_state, e.output_state, e.usage.tokens) for e in second.children
    ] == [
        ("classify", "1.0", {"text": "b"}, {"text": "b", "kind": "b1"}, 5),
        ("draft", "1.1", {"text": "b", "kind": "b1"}, {"draft": "b12"}, 5),
        ("check", "1.2", {"draft": "b12"}, {"answer": "b123"}, 5),
    ]


async def test_items_do_not_wait_for_each_other(world: World) -> None:
    """Different items are at different nodes at the same time, at most max_concurrency at any."""
    held, running, most = asyncio.Event(), Counter[str](), 0

    async def slow(state: Text) -> Any:
        nonlocal most
        running[state.text] += 1
        most = max(most, len(+running))
        if state.text == "a":
            await held.wait()
        return {"text": state.text, "kind": state.text}

    async def last(state: Class) -> dict[str, str]:
        await asyncio.sleep(0)
        running[state.text] -= 1
        if state.text == "c":
            held.set()  # The last item is through all nodes while the first one is in its first.
        return {"answer": state.kind}

    steps = (node("slow", slow, Text, Class), node("last", last, Class, Answer))
    work = map_over("tickets", steps, into="answers", max_concurrency=2)
    result = await asyncio.wait_for(quick_without_retries().run([work], Tickets()), 10)
    assert answers(result) == ["a", "b", "c"]
    assert most == 2


async def test_a_sequence_of_one_is_that_node(world: World) -> None:
    """A list or a tuple of one node is the same map as with the node alone."""
    for alone in ([world.classify], (world.classify,)):
        work = map_over("tickets", alone, into="answers")
        assert work.node_id == "map_over(tickets, classify)"
        assert work.children == (find_node(world.classify),)


def test_what_is_no_sequence_of_nodes(world: World) -> None:
    """No nodes are a ValueError; a flow, and what is no node, the same TypeError as elsewhere."""

    @stroma_flow("talk", input=Text, output=Text)
    async def talk(flow: Flow, state: Text) -> Text:
        return state

    for empty in ([], ()):
        with pytest.raises(ValueError, match="needs at least one node"):
            map_over("tickets", empty, into="answers")
    with pytest.raises(TypeError, match="flow 'talk' cannot be in a group"):
        map_over("tickets", [world.classify, talk], into="answers")
    wrong: Any = [world.classify, lambda state: state]
    with pytest.raises(TypeError, match="is not a stroma node"):
        map_over("tickets", wrong, into="answers")
    inner = map_over("x", world.draft, into=Journal())
    with pytest.raises(ValueError, match="cannot be nested in a map"):
        map_over("tickets", [world.classify, inner], into="answers")


async def test_outputs_of_any_kind(store: Any) -> None:
    """Nodes without a contract, and root models, hand on what they return; the last may return anything."""
    split = computing(lambda state: [state.text, state.text])
    count = computing(lambda state: len(state.root))
    words = node("split", split, Text, RootModel[list[str]])
    work = map_over("tickets", [words, bare("count", count)], into="counts")
    runner = quick_without_retries(store=store)
    result = await runner.run([work], Tickets(), run_id="run")
    assert result.final_state is not None, result.failure
    assert result.final_state.model_dump()["counts"] == [2, 2, 2]
    lists = map_over("tickets", [words, bare("same", computing(lambda state: state.root))], into="lists")
    result = await runner.run([lists], Tickets(tickets=["x"]), run_id="lists")
    assert result.final_state is not None, result.failure
    assert result.final_state.model_dump()["lists"] == [["x", "x"]]


async def test_groups_and_maps_inside(world: World, store: Any) -> None:
    """A node of a sequence may be parallel() or another map, and the sequence may be inside parallel()."""

    class Parts(BaseModel):
        parts: list[str]

    class Sizes(BaseModel):
        sizes: list[int]

    class First(BaseModel):
        first: str

    class Both(First):
        sizes: list[int]

    async def split(state: Text) -> dict[str, Any]:
        world.calls.append("split")
        return {"parts": [state.text, state.text * 2]}

    size = computing(lambda state: len(state.text))

    async def first(state: Parts) -> dict[str, str]:
        return {"first": state.parts[0]}

    join = computing(lambda state: {"answer": f"{state.first}{sum(state.sizes)}"})
    sizes = map_over("parts", node("size", size, Text, RootModel[int]), into="sizes")
    group = parallel(sizes, node("first", first, Parts, First))
    steps = [node("split", split, Text, Parts), group, node("join", join, Both, Answer)]
    work = parallel(map_over("tickets", steps, into="answers"), node("classes", _tickets, Tickets, Tickets))
    assert quick_without_retries().check([work]) == []
    runner = quick_without_retries(store=store)
    result = await runner.run([work], Tickets(), run_id="run")
    assert answers(result) == ["a3", "b3", "c3"]
    again = await runner.run([work], Tickets(), run_id="run", resume=True)
    assert (again.status, answers(again)) == (RunStatus.RESUMED, ["a3", "b3", "c3"])
    assert world.calls == ["split"] * 3


async def _tickets(state: Any) -> Any:
    return state


async def test_no_item_that_has_ended_takes_memory(world: World, store: Any) -> None:
    """With outputs in the journal, those between the nodes of an item are forgotten once it has ended."""
    held: list[int] = []

    hook = noting(held, lambda run_id, node_id, state: len(current_node().ctx.handover.done))
    work = map_over("tickets", world.nodes, into=Journal(), max_concurrency=1)
    hooks = NodeHooks(on_node_start=hook)
    runner = quick_without_retries(store=store, node_policies={work.node_id: ONCE}, hooks=hooks)
    result = await runner.run([work], Tickets(tickets=["a"] * 50), run_id="run")
    assert result.status is RunStatus.COMPLETED, result.failure
    assert max(held) == 2


async def test_as_a_step(world: World, store: Any) -> None:
    """The map is a step of a flow and of plain code, and resumes inside of it."""
    work = map_over("tickets", world.nodes, into="answers", max_concurrency=1)

    @stroma_flow("talk", input=Tickets, output=Answers)
    async def talk(flow: Flow, state: Tickets) -> Any:
        done = await flow.step(work, state)
        return Answers.model_validate(done, from_attributes=True)

    runner = quick_without_retries(store=store)
    world.failing["check b"] = ValueError("no")
    assert (await runner.run([talk], Tickets(), run_id="flow")).status is RunStatus.PARTIAL
    world.failing.clear()
    world.calls.clear()
    again = await runner.run([talk], Tickets(), run_id="flow", resume=True)
    assert answers(again) == ["a123", "b123", "c123"]
    assert world.calls == ["check b", "classify c", "draft c", "check c"]

    config = RunConfig(run_id="steps", policy_map=NEVER)
    ctx = context_on(store, config)
    step = await execute_step("work", work, Tickets(), ctx)
    assert answers(step) == ["a123", "b123", "c123"]


async def test_policies_timeouts_and_hooks_are_those_of_each_node(world: World) -> None:
    """node_policies and node_timeouts name nodes of the sequence, and hooks see each of them."""

    async def slow(state: Class) -> dict[str, str]:
        if current_node().attempt == 1:
            await asyncio.Event().wait()
        return {"draft": state.kind}

    seen: list[str] = []
    work = map_over("tickets", [world.classify, node("draft", slow, Class, Draft)], into="drafts")
    runner = quick_without_retries(
        node_timeouts={"draft": 20}, node_policies={"draft": ONCE}, hooks=record_hooks(seen)
    )
    result = await runner.run([work], Tickets(tickets=["a"]))
    assert result.status is RunStatus.COMPLETED, result.failure
    assert seen == [
        "run_start",
        "start map_over(tickets, [classify, draft])",
        "map_progress",
        "start [classify, draft]",
        "start classify",
        "success classify",
        "start draft",
        "failure draft",
        "retry draft",
        "start draft",
        "success draft",
        "success [classify, draft]",
        "map_progress",
        "success map_over(tickets, [classify, draft])",
        "run_end",
    ]


async def test_an_item_fails_with_one_of_its_nodes(world: World, store: Any) -> None:
    """Collected, it is one ItemFailure that names node and attempts; its later nodes are not called."""
    world.failing["draft b"] = TimeoutError("no")
    work = map_over("tickets", world.nodes, into="answers", on_item_failure="collect")
    runner = StromaRunner.quick(store=store, policy_map=ONCE)
    result = await runner.run([work], Tickets(), run_id="run")
    assert (answers(result), result.failed_items) == (["a123", "c123"], 1)
    (failed,) = result.final_state.answers_failures  # type: ignore[attr-defined]
    assert failed == ItemFailure(
        index=1,
        node_id="draft",
        failure_class=failed.failure_class,
        message="TimeoutError: no",
        reason=failed.reason,
        attempts=2,
    )
    assert "check b" not in world.calls
    world.failing.clear()
    world.calls.clear()
    again = await runner.run([work], Tickets(), run_id="run", resume=True)
    assert (again.failed_items, world.calls) == (1, [])
    again = await runner.run([work], Tickets(), run_id="run", resume=True, retry_failed_items=True)
    assert (answers(again), again.failed_items) == (["a123", "b123", "c123"], 0)
    assert world.calls == ["draft b", "check b"]


async def test_a_failure_of_a_group_names_the_node_inside() -> None:
    """An item that is a parallel() fails with one of its children, the node of its ItemFailure."""
    group = parallel(node("bad", failing_with(ValueError, "no"), Text))
    work = map_over("tickets", group, into="out", on_item_failure="collect")
    result = await quick_without_retries().run([work], Tickets(tickets=["a"]))
    assert [one.node_id for one in result.final_state.out_failures] == ["bad"]  # type: ignore[attr-defined]


async def test_the_failure_of_a_run_has_that_of_the_node(world: World) -> None:
    """result.failure is that of the map, and its ``inner`` names the node and the attempt."""
    world.failing["check b"] = ValueError("no")
    work = map_over("tickets", world.nodes, into="answers")
    result = await StromaRunner.quick(policy_map=ONCE).run([work], Tickets())
    assert (result.failure.node_id, result.failure.message) == (work.node_id, "no")
    assert (result.failure.inner.node_id, result.failure.inner.attempt) == ("check", 2)
    assert result.failure.inner.inner is None


async def test_an_output_that_breaks_the_contract_of_the_next_node(world: World) -> None:
    """The next node rejects it as its input, and is not called."""
    other = computing(lambda state: {"text": state.root})
    work = map_over("tickets", [bare("other", other), world.draft], into="answers")
    result = await quick_without_retries().run([work], Tickets(tickets=["a"]))
    violation = result.failure.exception
    assert isinstance(violation, ContractViolation)
    assert (violation.node_id, violation.direction, world.calls) == ("draft", "input", [])


async def test_a_budget_ends_an_item_between_two_nodes(world: World, store: Any) -> None:
    """Once the budget is spent no further node of any item is called; with more of it the rest is."""
    work = map_over("tickets", world.nodes, into="answers", max_concurrency=1, on_item_failure="collect")

    def runner(tokens: int) -> StromaRunner:
        return quick_without_retries(store=store, budget=ExecutionBudget(max_tokens_total=tokens))

    result = await runner(21).run([work], Tickets(), run_id="run")
    assert (result.status, result.failure.reason) == (RunStatus.PARTIAL, "budget")
    assert world.calls == ["classify a", "draft a", "check a", "classify b", "draft b"]
    world.calls.clear()
    again = await runner(100).run([work], Tickets(), run_id="run", resume=True)
    assert answers(again) == ["a123", "b123", "c123"]
    assert world.calls == ["check b", "classify c", "draft c", "check c"]


@pytest.mark.core
@pytest.mark.parametrize("into", ["answers", "journal", "file"])
@pytest.mark.parametrize("point", ["before_node", "after_node", "after_commit", "after_hooks"])
async def test_a_death_between_two_nodes_of_an_item(
    world: World, store: Any, tmp_path: Path, into: str, point: str
) -> None:
    """Another process calls the nodes of an item that were not committed, and no other one."""
    goal: Any = {"journal": Journal(), "file": JsonLines(tmp_path / "out.jsonl")}.get(into, into)
    work = map_over("tickets", world.nodes, into=goal, max_concurrency=1)
    runner = quick_without_retries(store=store)
    with crash_at(point, "draft", branch="1.1") as crash:
        await runner.run([work], Tickets(), run_id="run")
        raise AssertionError("the run came to its end")
    assert (crash.boundary.node_id, crash.boundary.branch) == ("draft", "1.1")
    world.calls.clear()
    result = await runner.run([work], Tickets(), run_id="run", resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    again = ["draft b"] if point in ("before_node", "after_node") else []
    assert world.calls == [*again, "check b", "classify c", "draft c", "check c"]
    expected = [Answer(answer=f"{item}123") for item in "abc"]
    if into == "answers":
        assert answers(result) == [one.answer for one in expected]
    elif into == "file":
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        assert [Answer(**json.loads(line)) for line in lines] == expected
    else:
        assert [output async for _, output in runner.map_outputs("run", work)] == expected


async def test_failed_items_that_are_tried_again_begin_where_they_failed(world: World, store: Any) -> None:
    """Also when items are restored in parts: what one committed before its failure is not called again."""
    world.failing["check b"] = ValueError("no")
    work = map_over("tickets", world.nodes, into=Journal(), on_item_failure="collect")
    runner = quick_without_retries(store=store)
    assert (await runner.run([work], Tickets(), run_id="run")).failed_items == 1
    world.failing.clear()
    world.calls.clear()
    again = await runner.run([work], Tickets(), run_id="run", resume=True, retry_failed_items=True)
    assert (again.failed_items, world.calls) == (0, ["check b"])


async def test_what_follows_a_map_whose_failed_items_are_tried_again(store: Any) -> None:
    """The nodes after an inner map in a sequence are called again with new outputs, those before are not."""
    calls: list[str] = []
    broken = [True]

    class Parts(BaseModel):
        parts: list[str]

    class Sizes(BaseModel):
        sizes: list[int]

    async def split(state: Text) -> dict[str, Any]:
        calls.append("split")
        return {"parts": [state.text, state.text * 2]}

    async def size(state: Text) -> int:
        if broken[0] and len(state.text) == 2:
            raise ValueError("no")
        return len(state.text)

    async def total(state: Sizes) -> dict[str, str]:
        calls.append("total")
        return {"answer": str(sum(state.sizes))}

    async def same(state: Answer) -> Answer:
        calls.append("same")
        return state

    sizes = map_over(
        "parts", node("size", size, Text, RootModel[int]), into="sizes", on_item_failure="collect"
    )
    last = parallel(node("same", same, Answer, Answer))
    steps = [node("split", split, Text, Parts), sizes, node("total", total, Sizes, Answer), last]
    work = map_over("tickets", steps, into="answers")
    runner = quick_without_retries(store=store)
    first = await runner.run([work], Tickets(tickets=["x"]), run_id="run")
    assert (answers(first), first.failed_items) == (["1"], 1)
    calls.clear()
    broken[0] = False
    again = await runner.run(
        [work], Tickets(tickets=["x"]), run_id="run", resume=True, retry_failed_items=True
    )
    assert (answers(again), again.failed_items) == (["3"], 0)
    assert calls == ["total", "same"]


async def test_an_approval_in_the_middle_of_an_item(world: World, store: Any) -> None:
    """A node that waits for a person suspends its item; others go on; an answer calls only the rest."""

    async def approve(state: Draft) -> Draft:
        world.calls.append(f"approve {state.draft[0]}")
        if state.draft.startswith("b") and current_node().signal is None:
            raise Suspend("may it go out?", schema=Approval)
        return state

    steps = [world.classify, world.draft, node("approve", approve, Draft, Draft), world.check]
    work = map_over("tickets", steps, into="answers")
    runner = quick_without_retries(store=store)
    result = await runner.run([work], Tickets(), run_id="run")
    assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["may it go out?"])
    assert "check b" not in world.calls
    assert {"check a", "check c"} <= {*world.calls}
    await runner.signal("run", {"approved": True}, question=open_question(store, "run", branch="1.2"))
    world.calls.clear()
    again = await runner.run([work], Tickets(), run_id="run", resume=True)
    assert answers(again) == ["a123", "b123", "c123"]
    assert world.calls == ["approve b", "check b"]


async def test_a_cancellation_that_a_node_has_left_behind() -> None:
    """A node may end with a cancelled task; a CancelledError of the next one is a failure like any other."""

    async def leaves_one(state: Text) -> Text:
        asyncio.current_task().cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return state

    steps = [
        node("leaves", leaves_one, Text, Text),
        node("raises", failing_with(asyncio.CancelledError, "a stray one"), Text, Text),
    ]
    nodes = [map_over("tickets", steps, into="out")]
    result = await quick_without_retries().run(nodes, Tickets(tickets=["a"]))
    assert (result.status, result.failure.message) == (RunStatus.PARTIAL, "a stray one")


async def test_another_node_in_the_sequence(world: World, store: Any) -> None:
    """A resume with other nodes in the sequence is refused before anything is called."""
    world.failing["check b"] = ValueError("no")
    runner = quick_without_retries(store=store)
    await runner.run([map_over("tickets", world.nodes, into="answers")], Tickets(), run_id="run")
    world.calls.clear()
    other = map_over("tickets", [world.classify, world.draft], into="answers")
    with pytest.raises(PipelineChanged):
        await runner.run([other], Tickets(), run_id="run", resume=True)
    assert world.calls == []


@pytest.mark.parametrize("into", ["answers", "journal"])
async def test_a_new_schema_of_the_last_node(world: World, store: Any, into: str) -> None:
    """With an upcast of the last node, ended items are read with its new schema, no node is called again."""
    goal: Any = Journal() if into == "journal" else into
    calls: list[str] = []

    def steps(last: Any) -> Any:
        return map_over("tickets", [world.classify, world.draft, last], into=goal, max_concurrency=1)

    class More(BaseModel):
        answer: str
        sure: bool

    world.failing["check c"] = ValueError("no")
    runner = quick_without_retries(store=store)
    await runner.run([steps(world.check)], Tickets(), run_id="run")
    world.calls.clear()

    async def check(state: Draft) -> dict[str, Any]:
        calls.append(state.draft)
        return {"answer": state.draft, "sure": True}

    contract = NodeContract(
        node_id="check", input_schema=Draft, output_schema=More, upcast=lambda old: {**old, "sure": False}
    )
    work = steps(stroma_node("check", contract)(check))
    result = await runner.run([work], Tickets(), run_id="run", resume=True)
    assert result.status is RunStatus.RESUMED, result.failure
    assert (world.calls, calls) == ([], ["c12"])
    if into == "journal":
        outputs: Any = [output async for _, output in runner.map_outputs("run", work)]
    else:
        outputs = result.final_state.answers  # type: ignore[union-attr]
    second = More(answer="a123", sure=False)
    assert outputs == [second, More(answer="b123", sure=False), More(answer="c12", sure=True)]


def test_two_nodes_of_a_sequence_that_do_not_fit(world: World) -> None:
    """The checker finds a node that lacks what the next one takes, and its message names both."""

    class Other(BaseModel):
        words: int

    other = node("other", world.draft, Class, Other)
    nodes = [map_over("tickets", [world.classify, other, world.check], into="x")]
    findings = quick_without_retries().check(nodes)
    assert [(f.severity, f.kind, f.source, f.target, f.path, f.source_at, f.target_at) for f in findings] == [
        ("error", "missing", "other", "check", "draft", "0.0.1", "0.0.2")
    ]
    (finding,) = findings
    assert "'check' needs draft" in finding.message
    assert "'other'" in finding.fix


def test_a_field_that_a_node_in_the_middle_drops(world: World) -> None:
    """The checker names the earlier node of the sequence that gave a field."""

    class Wanted(BaseModel):
        draft: str
        kind: str

    last = node("last", world.check, Wanted, Answer)
    nodes = [map_over("tickets", [world.classify, world.draft, last], into="x")]
    (finding,) = quick_without_retries().check(nodes)
    assert "'classify' gave it, and 'draft' does not hand it on" in finding.message


def test_items_fit_the_first_node_and_outputs_are_of_the_last(world: World) -> None:
    """Plain items become the first node's only required field; the last output is checked after the map."""
    work = map_over("tickets", world.nodes, into="answers")
    after = node("after", _tickets, Answers, Answers)
    start = node("start", _tickets, Tickets, Tickets)
    assert quick_without_retries().check([start, work, after]) == []

    class Wrong(BaseModel):
        answers: list[Draft]

    (finding,) = quick_without_retries().check([start, work, node("after", _tickets, Wrong, Wrong)])
    assert (finding.source, finding.target) == ("check", "after")


def test_lineage_goes_from_node_to_node(world: World) -> None:
    """The lineage links each node of a sequence with the one before it, in JSON, Mermaid and as an image."""
    work = map_over("tickets", world.nodes, into="answers")
    lineage = lineage_of("pipe", [find_node(work)], ContractRegistry())
    data = lineage.data()
    assert [(one["at"], one["node_id"], one["kind"], one["group"]) for one in data["nodes"]][1:] == [
        ("0", "map_over(tickets, [classify, draft, check]) into answers", "map_over", None),
        ("0.0", "[classify, draft, check]", "sequence", "0"),
        ("0.0.0", "classify", "node", "0.0"),
        ("0.0.1", "draft", "node", "0.0"),
        ("0.0.2", "check", "node", "0.0"),
    ]
    edges = [(one["from"], one["field"], one["to"], one["feeds"]) for one in data["edges"]]
    assert edges[1:] == [
        ("0.0.0", "text", "0.0.1", "text"),
        ("0.0.0", "kind", "0.0.1", "kind"),
        ("0.0.1", "draft", "0.0.2", "draft"),
    ]
    assert 'n0_0_1 -->|"draft"| n0_0_2' in lineage.mermaid()
    assert "[classify, draft, check]" in lineage.svg()


async def test_the_journal_shows_the_input_of_each_node(world: World, tmp_path: Path) -> None:
    """Read from the store, the input of each node of an item is the output of the one before it."""
    with SQLiteStore(tmp_path / "runs.db") as store:
        work = map_over("tickets", world.nodes, into="answers")
        result = await quick_without_retries(store=store).run([work], Tickets(), run_id="run")
        history = History(store)
        attempts, _ = history.attempts("run", 100)
        inputs = {one.branch: history.input_of("run", one).value for one in attempts}
        story = history.story(store.get_run("run"))  # type: ignore[arg-type]
    assert (inputs["1"], inputs["1.0"]) == ("b", "b")
    page = result.to_html()
    assert all(node_id in page for node_id in ("[classify, draft, check]", "classify", "draft", "check"))
    assert inputs["1.1"] == {"text": "b", "kind": "b1"}
    assert inputs["1.2"] == {"draft": "b12"}
    assert {bar.at: bar.input_state for bar in story.bars}["0.1.2"] == {"draft": "b12"}


async def test_messages_hide_what_earlier_nodes_made(world: World, tmp_path: Path, caplog: Any) -> None:
    """Quoting a hidden output of an earlier node shows it in no attempt, of groups too."""

    async def fails(state: Class) -> Any:
        raise ValueError(f"cannot draft {state.kind}")

    secret = computing(lambda state: {"text": state.text, "kind": "sesame-street"})

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        return {key: "hidden" if key == "kind" else value for key, value in state.items()}

    nodes = [node("secret", secret, Text, Class), node("fails", fails, Class, Draft)]
    work = map_over("tickets", nodes, into="drafts")
    with SQLiteStore(tmp_path / "runs.db") as store:
        result = await quick_without_retries(store=store, redact=redact).run(
            [work], Tickets(tickets=["a"]), run_id="run"
        )
        assert result.status is RunStatus.PARTIAL
        history = History(store, redact)
        attempts, _ = history.attempts("run", 100)
        single = [one for at in ("", "0", "0.1") for one in history.store.attempts_at("run", 0, at)]
        record = history.store.get_run("run")
    stored = [one.message for one in (*attempts, *single) if one.message]
    messages = [*stored, record.error, record.cause.message]
    assert len(messages) == 8
    assert {str(message).removeprefix("ValueError: ") for message in messages} == {"cannot draft [redacted]"}
    assert "sesame" not in caplog.text


async def test_a_replay_takes_the_outputs_of_each_node(world: World, tmp_path: Path) -> None:
    """A recorded run is replayed without calls; a node that behaves differently is found."""
    with SQLiteStore(tmp_path / "runs.db") as store:
        work = map_over("tickets", world.nodes, into="answers")
        await quick_without_retries(store=store).run([work], Tickets(), run_id="run")
        recorded = RecordedRun.read(store, "run")
    world.calls.clear()
    again = await replay(recorded, Pipeline("pipe", [work]))
    again.assert_same()
    assert (world.calls, again.status) == ([], RunStatus.COMPLETED)

    class Strict(BaseModel):
        draft: int

    other = node("check", world.check, Strict, Answer)
    changed = await replay(
        recorded, [map_over("tickets", [world.classify, world.draft, other], into="answers")]
    )
    assert any(one.kind == "contract" and one.node_id == "check" for one in changed.differences)
