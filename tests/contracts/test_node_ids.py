"""Whose ids nodes have, and ids that nothing has."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import Note, Num, context_of

from stroma import (
    AsyncInMemoryStore,
    ContractRegistry,
    FailurePolicy,
    Flow,
    Limit,
    NodeContract,
    NodeHooks,
    Pipeline,
    RunConfig,
    RunStatus,
    SharedBudget,
    StromaRunner,
    execute_step,
    map_over,
    parallel,
    stroma_node,
)
from stroma.adapters.guard import Guard


class Texts(BaseModel):
    items: list[Note] = [Note()]


async def give_text(state: Any) -> Any:
    return {"text": "x"}


async def give_number(state: Any) -> Any:
    return {"n": 1}


def two_of_one_id(runner: StromaRunner, *, marked: bool = False) -> tuple[Any, Any]:
    """A function that was defined twice with the same id, under different contracts: old and new node."""

    def define(decorator: Any) -> Any:
        async def again(state: Note) -> Any:
            return {"text": "x", "n": 1}

        return decorator(again)

    old: Any = runner.node("a", input=Note, output=Note)
    if marked:
        old = stroma_node("a", input=Note, output=Note)
    return define(old), define(runner.node("a", input=Note, output=Num))


REFUSED = (
    r"again \(.*:\d+\) cannot run as node 'a': the id was later assigned to .*again \(.*:\d+\), with "
    r"another contract"
)


@pytest.mark.parametrize("marked", [False, True], ids=["by the runner", "by stroma_node"])
@pytest.mark.parametrize("place", ["node", "child", "item", "inside"])
async def test_an_old_function_under_a_new_contract_is_refused(place: str, marked: bool) -> None:
    """``run()`` and ``check()`` refuse a function whose id another contract took later."""
    runner = StromaRunner.quick()
    first, second = two_of_one_id(runner, marked=marked)
    nodes: dict[str, Callable[[Any], Any]] = {
        "node": lambda node: node,
        "child": parallel,
        "item": lambda node: map_over("items", node, into="out"),
        "inside": lambda node: parallel(map_over("items", node, into="out")),
    }
    instance = nodes[place]
    for call in (
        lambda: runner.run([instance(first)], Texts()),
        lambda: runner.run(Pipeline("p", [second, instance(first)]), Texts()),
        lambda: anext(runner.stream([instance(first)], Texts())),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            await call()
    with pytest.raises(ValueError, match=REFUSED):
        runner.check([second, instance(first)])
    assert runner.check([second]) == []
    result = await runner.run([second], Note())
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, Num(n=1))


async def test_an_old_step_under_a_new_contract_is_refused() -> None:
    """``execute_step`` refuses it, too, but where the contract is given."""
    runner = StromaRunner.quick()
    first, second = two_of_one_id(runner)
    ctx = context_of(runner)
    with pytest.raises(ValueError, match=REFUSED):
        await execute_step("a", first, Note(), ctx)
    assert (await execute_step("a", second, Note(), ctx)).final_state == Num(n=1)
    contract: NodeContract[Any, Any] = NodeContract(node_id="a", input_schema=Note, output_schema=Note)
    assert (await execute_step("a", first, Note(), ctx, contract=contract)).final_state == Note(text="x")
    assert (await execute_step("b", first, Note(), ctx)).final_state == Note(text="x")


def test_an_id_belongs_to_one_function() -> None:
    """A second function under the id of another one is a ValueError at decoration, which names the file and
    line of both, and changes nothing."""
    runner = StromaRunner.quick()
    runner.node("a", input=Note, output=Note)(give_text)
    refused = (
        rf"^node id 'a' belongs to give_text \({re.escape(__file__)}:\d+\), and {{}} "
        rf"\({re.escape(__file__)}:\d+\) cannot have it too; rename one"
    )
    for output in (Note, Num):
        with pytest.raises(ValueError, match=refused.format("give_number")):
            runner.node("a", input=Note, output=output)(give_number)

    async def body(flow: Flow, state: Note) -> Num:
        return Num()

    with pytest.raises(ValueError, match=refused.format(".*body")):
        runner.flow("a")(body)
    assert runner.registry.get("a").output_schema is Note
    line = give_text.__code__.co_firstlineno
    assert runner.registry.decorated["a"].owner == f"give_text ({__file__}:{line})"
    StromaRunner.quick().node("a", input=Note, output=Num)(give_number)


def test_a_flow_and_a_node_share_the_ids_of_a_runner() -> None:
    """A node under the id of a flow is refused."""
    runner = StromaRunner.quick()

    @runner.flow("a")
    async def body(flow: Flow, state: Note) -> Num:
        return Num()

    with pytest.raises(ValueError, match="node id 'a' belongs to"):
        runner.node("a", input=Note, output=Note)(give_text)


def test_a_module_that_runs_as_a_program_is_the_module_that_others_import() -> None:
    """``python nodes.py`` and ``import nodes`` define the same functions; a copy elsewhere is another."""
    runner = StromaRunner.quick()
    code = "async def give(state): return {'text': 'x'}"

    def define(module: str, file: str) -> Any:
        names: dict[str, Any] = {"__name__": module}
        exec(compile(code, file, "exec"), names)
        return names["give"]

    for module, file in [("__main__", "/a/nodes.py"), ("nodes", "/a/nodes.py"), ("nodes", "<cell 5>")]:
        runner.node("a", input=Note, output=Note)(define(module, file))
    with pytest.raises(ValueError, match="node id 'a' belongs to"):
        runner.node("a", input=Note, output=Note)(define("others", "/a/others.py"))


def test_objects_that_are_called_are_known_by_their_class() -> None:
    """Partials are what they call, and instances are of one definition if they are of one class."""

    class First:
        def __call__(self, state: Note) -> Any: ...

    class Second(First): ...

    runner = StromaRunner.quick()
    a, b = runner.node("a", input=Note, output=Note), runner.node("b", input=Note, output=Note)
    for func in (partial(give_text), give_text, partial(partial(give_text))):
        a(func)
    for instance in (First(), First()):
        b(instance)
    with pytest.raises(ValueError, match="node id 'a' belongs to"):
        a(partial(give_number))
    with pytest.raises(ValueError, match="node id 'b' belongs to"):
        b(Second())


async def test_decorating_again_and_running_the_new_function_is_fine() -> None:
    """As in a notebook: the last function of an id runs, and so do old ones under an equal contract."""
    runner = StromaRunner.quick()

    def decorate() -> Any:
        @runner.node("a", input=Note, output=Note)
        async def a(state: Note) -> Any:
            return {"text": "x"}

        return a

    old, new = decorate(), decorate()
    for node in (new, old):
        assert (await runner.run([node], Note())).status is RunStatus.COMPLETED


async def test_a_contract_that_is_registered_by_hand_still_wins() -> None:
    """``register`` replaces the contract of a node on purpose: no other function has got the id."""
    runner = StromaRunner.quick()
    node = runner.node("a", input=Note, output=Note)(give_number)
    runner.registry.register(NodeContract(node_id="a", input_schema=Note, output_schema=Num))
    assert (await runner.run([node], Note())).final_state == Num(n=1)
    registry = ContractRegistry()
    registry.register(NodeContract(node_id="a", input_schema=Note, output_schema=Num))
    marked = stroma_node("a", input=Note, output=Note)(give_number)
    other = StromaRunner(registry, runner.checkpoint_manager)
    assert (await other.run([marked], Note())).final_state == Num(n=1)
    assert (await StromaRunner.quick().run([marked], Note())).final_state == Note()


async def test_one_function_under_two_ids_and_two_contracts_is_fine() -> None:
    """One function may serve under two ids."""
    runner = StromaRunner.quick()
    a = runner.node("a", input=Note, output=Note)(give_text)
    b = runner.node("b", input=Note, output=Note)(give_text)
    assert (await runner.run([a, b], Note())).status is RunStatus.COMPLETED


POLICY: Any = {"AMBIGUOUS": FailurePolicy(max_retries=0)}


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the texts of warnings without the run that they begin with."""
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [line.partition(": ")[2] if line.startswith("run ") else line for line in lines]


def extract_node(runner: StromaRunner) -> Any:
    @runner.node("extract", input=Note, output=Note)
    async def extract(state: Note) -> Any:
        return state

    return extract


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"node_policies": {"extrct": POLICY}}, "node_policies names 'extrct'"),
        ({"node_timeouts": {"extrct": 10_000}}, "node_timeouts names 'extrct'"),
        ({"contract_retries": {"extrct": 3}}, "contract_retries names 'extrct'"),
        (
            {"node_limits": {"extrct": "x", "extract": "x"}, "limits": {"x": Limit(requests_per_minute=10)}},
            "node_limits names 'extrct'",
        ),
        (
            {
                "contract_retries": {"extrct": 3},
                "node_timeouts": {"extrct": 10_000},
                "node_policies": {"extrct": POLICY},
            },
            "node_policies, node_timeouts and contract_retries name 'extrct'",
        ),
        ({"node_timeouts": {"EXTRACT": 10_000}}, "node_timeouts names 'EXTRACT'"),
        ({"shared_budgets": SharedBudget("a", max_tokens=1, nodes=["extrct"])}, "budget 'a' names 'extrct'"),
        (
            {"shared_budgets": [SharedBudget("b", max_cost_usd=1, max_cost_usd_by_node={"extrct": 1})]},
            "budget 'b' names 'extrct'",
        ),
        (
            {"shared_budgets": SharedBudget("c", max_tokens=9, reserve_tokens={"extrct": 1})},
            "budget 'c' names 'extrct'",
        ),
    ],
    ids=[
        "node_policies",
        "node_timeouts",
        "contract_retries",
        "node_limits",
        "several",
        "case",
        "budget of nodes",
        "budget with limits by node",
        "budget with reservations",
    ],
)
async def test_an_id_that_no_node_has_is_refused(options: dict[str, Any], says: str) -> None:
    """An id in a config of neither pipeline nor registry is a ValueError of run() with the nearest one."""
    called: list[str] = []
    runner = StromaRunner.quick(**options, hooks=NodeHooks(on_run_start=starts(called)))
    extract = extract_node(runner)
    for call in (
        lambda: runner.run([extract], Note()),
        lambda: anext(runner.stream([extract], Note())),
        lambda: runner.serve(Pipeline("pipeline", [extract])),
    ):
        with pytest.raises(ValueError) as caught:
            await call()
        assert str(caught.value) == (
            f"{says}, which no node of pipeline 'pipeline' has; did you mean 'extract'?"
        )
    assert called == []


def starts(called: list[str]) -> Any:
    async def on_run_start(run_id: str, *_: Any) -> None:
        called.append(run_id)

    return on_run_start


async def test_a_fork_under_an_unknown_id_leaves_no_run() -> None:
    """The config of a fork is refused before the fork is stored."""
    store = AsyncInMemoryStore()
    runner = StromaRunner.quick(store=store, run_id="old")
    extract = extract_node(runner)
    await runner.run([extract], Note())
    misspelt = StromaRunner(
        runner.registry, runner.checkpoint_manager, RunConfig(node_timeouts={"extrct": 1})
    )
    with pytest.raises(ValueError, match="'extrct', which no node of pipeline 'pipeline' has"):
        await misspelt.fork("old", [extract], at="extract", new_run_id="new")
    assert [run.run_id for run in store.list_runs()] == ["old"]


async def test_all_unknown_ids_are_named() -> None:
    """The error has a line for each id, also for one like no other and one of a pipeline's config."""
    runner = StromaRunner.quick()
    extract = extract_node(runner)
    config = RunConfig(node_timeouts={"extrct": 10_000, "quite different": 10_000})
    with pytest.raises(ValueError) as caught:
        await runner.run(Pipeline("p", [extract], config=config), Note())
    assert str(caught.value).splitlines() == [
        "node_timeouts names 'extrct', which no node of pipeline 'p' has; did you mean 'extract'?",
        "node_timeouts names 'quite different', which no node of pipeline 'p' has; correct the id, or "
        "register the contract "
        "of that node",
    ]


async def test_ids_that_a_pipeline_or_the_registry_has_are_known() -> None:
    """The ids of groups, of what is in them, of other nodes of the runner and of guarded steps are known."""
    runner = StromaRunner.quick(
        node_timeouts={
            "parallel(extract)": 10_000,
            "extract": 10_000,
            "elsewhere": 10_000,
            "map_over(items, one)": 1_000,
            "tool": 10_000,
        }
    )
    extract = extract_node(runner)
    runner.node("elsewhere", input=Note, output=Note)(give_text)
    Guard(runner).step("tool")(give_number)
    one = runner.node("one", input=Note, output=Note)(give_number)
    result = await runner.run([parallel(extract), map_over("items", one, into="out")], Note())
    assert result.failure is not None  # Of the map, whose items the state does not have.


async def test_ids_of_other_pipelines_are_known(caplog: pytest.LogCaptureFixture) -> None:
    """Pipelines may share a config: nodes of other modules are known while in use, groups warn."""
    config: dict[str, Any] = {
        "node_timeouts": {"extract": 10_000, "elsewhere": 10_000, "parallel(x, y)": 10_000}
    }
    elsewhere = stroma_node("elsewhere", input=Note, output=Note)(give_text)
    runner = StromaRunner.quick(**config)
    extract = extract_node(runner)
    for nodes in ([extract], [elsewhere], [extract]):
        assert (await runner.run(nodes, Note())).status is RunStatus.COMPLETED
    (text,) = warnings_in(caplog)
    assert text.startswith("node_timeouts names 'parallel(x, y)', which no node of a run of 'pipeline' has; ")


async def test_a_budget_may_name_nodes_of_other_processes() -> None:
    """One known node is enough for a shared budget that names several."""
    budget = SharedBudget("d", max_tokens=9, nodes=["extract", "elsewhere"], reserve_tokens={"extract": 1})
    runner = StromaRunner.quick(shared_budgets=budget)
    assert (await runner.run([extract_node(runner)], Note())).status is RunStatus.COMPLETED


async def test_limits_that_no_node_uses_are_refused() -> None:
    """Limits that no known node has are a ValueError; one node of the runner with one is enough."""
    limits = {"answer_llm": Limit(requests_per_minute=10), "other_llm": Limit(requests_per_minute=10)}
    runner = StromaRunner.quick(limits=limits)
    extract = extract_node(runner)
    with pytest.raises(
        ValueError,
        match=r"^no node of pipeline 'pipeline' uses any of the limits \('answer_llm', 'other_llm'\); "
        r"assign them with",
    ):
        await runner.run([extract], Note())
    runner.node("answer_llm", input=Note, output=Note)(give_text)
    assert (await runner.run([extract], Note())).status is RunStatus.COMPLETED


# called


def flow_of(runner: StromaRunner) -> Any:
    marked = stroma_node("marked", input=Note, output=Note)
    step = marked(give_text)
    later = stroma_node("later", input=Note, output=Note)(give_text)

    @runner.flow("flow", input=Note, output=Note)
    async def flow(flow: Flow, state: Note) -> Note:
        state = await flow.step(step, state)
        return await flow.step(later, state) if state.text == "again" else state

    return flow


WARNED = "which no node of a run of 'flow' has;"


async def test_a_flow_warns_at_its_end_of_ids_that_it_did_not_call(caplog: pytest.LogCaptureFixture) -> None:
    """Ids that neither a flow nor the registry has get one warning when the flow ends."""
    runner = StromaRunner.quick(
        node_timeouts={"flow": 10_000, "marked": 10_000, "markd": 10_000, "registered": 10_000},
        limits={"llm": Limit(requests_per_minute=10)},
    )
    runner.node("registered", input=Note, output=Note)(give_number)
    flow = flow_of(runner)
    for _ in range(2):
        assert (await runner.run(flow, Note())).status is RunStatus.COMPLETED
    assert warnings_in(caplog) == [
        f"node_timeouts names 'markd', {WARNED} did you mean 'marked'?",
        "no node of a run of 'flow' uses any of the limits ('llm'); assign them with node_limits={node id: "
        "name}",
    ]


async def test_a_flow_that_did_not_call_all_again_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    """A resumed flow, one that failed and one whose result is returned have not called all of their steps."""
    config: dict[str, Any] = {"node_timeouts": {"markd": 10_000}, "run_id": "r"}
    store = AsyncInMemoryStore()
    failing = StromaRunner.quick(store=store, **config)

    @failing.flow("flow", input=Note, output=Note)
    async def flow(flow: Flow, state: Note) -> Note:
        raise ValueError("no")

    assert (await failing.run(flow, Note())).status is not RunStatus.COMPLETED
    runner = StromaRunner.quick(store=store, **config)
    again = flow_of(runner)
    assert (await runner.run(again, Note(), resume=True)).status is RunStatus.RESUMED
    caplog.clear()
    for _ in range(2):
        await runner.run(again, Note(), if_exists="return")
    assert warnings_in(caplog) == []


def test_a_guard_warns_at_the_end_of_ids_that_it_did_not_call(caplog: pytest.LogCaptureFixture) -> None:
    """Ids of a config that no step of a guarded run has, and none of the guard, get one warning."""
    runner = StromaRunner.quick(
        node_timeouts={"tool": 10_000, "other": 10_000, "tol": 10_000}, pipeline="flow"
    )
    guard = Guard(runner)
    guard.step("other")(give_number)

    @guard.step("tool")
    def tool() -> str:
        return "x"

    for _ in range(2):
        with guard.run():
            tool()
    assert warnings_in(caplog) == [f"node_timeouts names 'tol', {WARNED} did you mean 'tool'?"]
