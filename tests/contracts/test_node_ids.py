"""Whose ids nodes have, and ids that nothing has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from pydantic import BaseModel

from stroma import (
    ContractRegistry,
    FailurePolicy,
    Flow,
    Limit,
    NodeContract,
    Pipeline,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    StromaRunner,
    execute_step,
    map_over,
    parallel,
    stroma_node,
)
from stroma.drivers.remote.plans import KnownNodes


class Text(BaseModel):
    text: str = ""


class Number(BaseModel):
    n: int = 0


class Texts(BaseModel):
    items: list[Text] = [Text()]


async def give_text(state: Any) -> Any:
    return {"text": "x"}


async def give_number(state: Any) -> Any:
    return {"n": 1}


def two_of_one_id(runner: StromaRunner, *, marked: bool = False) -> tuple[Any, Any]:
    """A function that was defined twice with the same id, under different contracts: the old and the new node."""

    def define(decorator: Any) -> Any:
        async def again(state: Text) -> Any:
            return {"text": "x", "n": 1}

        return decorator(again)

    old: Any = runner.node("a", input=Text, output=Text)
    if marked:
        old = stroma_node("a", NodeContract(node_id="a", input_schema=Text, output_schema=Text))
    return define(old), define(runner.node("a", input=Text, output=Number))


REFUSED = r"again at .* cannot run as node 'a': the id was later assigned to <function .*again at .*>, with another contract"


@pytest.mark.parametrize("marked", [False, True], ids=["by the runner", "by stroma_node"])
@pytest.mark.parametrize("place", ["node", "child", "item", "inside"])
async def test_an_old_function_under_a_new_contract_is_refused(place: str, marked: bool) -> None:
    """``run()`` and ``check()`` refuse a function whose id was later assigned to another one with another contract."""
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
    result = await runner.run([second], Text())
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, Number(n=1))


async def test_an_old_step_under_a_new_contract_is_refused() -> None:
    """``execute_step`` refuses it, too, but where the contract is given."""
    runner = StromaRunner.quick()
    first, second = two_of_one_id(runner)
    ctx = ReliabilityContext.for_run(runner.config, runner.registry, runner.checkpoint_manager)
    with pytest.raises(ValueError, match=REFUSED):
        await execute_step("a", first, Text(), ctx)
    assert (await execute_step("a", second, Text(), ctx)).final_state == Number(n=1)
    contract: NodeContract[Any, Any] = NodeContract(node_id="a", input_schema=Text, output_schema=Text)
    assert (await execute_step("a", first, Text(), ctx, contract=contract)).final_state == Text(text="x")
    assert (await execute_step("b", first, Text(), ctx)).final_state == Text(text="x")


def test_an_old_function_under_a_new_contract_is_refused_by_drivers_on_other_machines() -> None:
    """What freezes a pipeline for workers, and what a worker is given, is looked at in the same way."""
    runner = StromaRunner.quick()
    first, second = two_of_one_id(runner)
    with pytest.raises(ValueError, match=REFUSED):
        KnownNodes.of(Pipeline("p", [first]), runner.registry)
    KnownNodes.of(Pipeline("p", [second]), runner.registry)


def test_an_id_belongs_to_one_function() -> None:
    """A second function under the id of another one is a ValueError at decoration, and changes nothing."""
    runner = StromaRunner.quick()
    runner.node("a", input=Text, output=Text)(give_text)
    refused = r"^node id 'a' belongs to <function give_text at .*>, and <function {} at .*> cannot have it too; rename one"
    for output in (Text, Number):
        with pytest.raises(ValueError, match=refused.format("give_number")):
            runner.node("a", input=Text, output=output)(give_number)

    async def body(flow: Flow, state: Text) -> Number:
        return Number()

    with pytest.raises(ValueError, match=refused.format(".*body")):
        runner.flow("a")(body)
    assert runner.registry.get("a").output_schema is Text
    assert runner.registry.decorated["a"].owner == repr(give_text)
    StromaRunner.quick().node("a", input=Text, output=Number)(give_number)


def test_a_flow_and_a_node_share_the_ids_of_a_runner() -> None:
    """A node under the id of a flow is refused."""
    runner = StromaRunner.quick()

    @runner.flow("a")
    async def body(flow: Flow, state: Text) -> Number:
        return Number()

    with pytest.raises(ValueError, match="node id 'a' belongs to"):
        runner.node("a", input=Text, output=Text)(give_text)


def test_a_module_that_runs_as_a_program_is_the_module_that_others_import() -> None:
    """``python nodes.py`` and ``import nodes`` define the same functions; a copy in another file is another one."""
    runner = StromaRunner.quick()
    code = "async def give(state): return {'text': 'x'}"

    def define(module: str, file: str) -> Any:
        names: dict[str, Any] = {"__name__": module}
        exec(compile(code, file, "exec"), names)
        return names["give"]

    for module, file in [("__main__", "/a/nodes.py"), ("nodes", "/a/nodes.py"), ("nodes", "<cell 5>")]:
        runner.node("a", input=Text, output=Text)(define(module, file))
    with pytest.raises(ValueError, match="node id 'a' belongs to"):
        runner.node("a", input=Text, output=Text)(define("others", "/a/others.py"))


def test_objects_that_are_called_are_known_by_their_class() -> None:
    """Partials are what they call, and instances are of one definition if they are of one class."""

    class First:
        def __call__(self, state: Text) -> Any: ...

    class Second(First): ...

    runner = StromaRunner.quick()
    a, b = runner.node("a", input=Text, output=Text), runner.node("b", input=Text, output=Text)
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
        @runner.node("a", input=Text, output=Text)
        async def a(state: Text) -> Any:
            return {"text": "x"}

        return a

    old, new = decorate(), decorate()
    for node in (new, old):
        assert (await runner.run([node], Text())).status is RunStatus.COMPLETED


async def test_a_contract_that_is_registered_by_hand_still_wins() -> None:
    """``register`` replaces the contract of a node on purpose: no other function has got the id."""
    runner = StromaRunner.quick()
    node = runner.node("a", input=Text, output=Text)(give_number)
    runner.registry.register(NodeContract(node_id="a", input_schema=Text, output_schema=Number))
    assert (await runner.run([node], Text())).final_state == Number(n=1)
    registry = ContractRegistry()
    registry.register(NodeContract(node_id="a", input_schema=Text, output_schema=Number))
    marked = stroma_node("a", NodeContract(node_id="a", input_schema=Text, output_schema=Text))(give_number)
    other = StromaRunner(registry, runner.checkpoint_manager)
    assert (await other.run([marked], Text())).final_state == Number(n=1)


async def test_one_function_under_two_ids_and_two_contracts_is_fine() -> None:
    """One function may serve under two ids."""
    runner = StromaRunner.quick()
    a = runner.node("a", input=Text, output=Text)(give_text)
    b = runner.node("b", input=Text, output=Text)(give_text)
    assert (await runner.run([a, b], Text())).status is RunStatus.COMPLETED


# ---------------------------------------------------------------------- ids that nothing has

POLICY: Any = {"AMBIGUOUS": FailurePolicy(max_retries=0)}


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def extract_node(runner: StromaRunner) -> Any:
    @runner.node("extract", input=Text, output=Text)
    async def extract(state: Text) -> Any:
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
    ],
    ids=["node_policies", "node_timeouts", "contract_retries", "node_limits", "several", "case"],
)
async def test_an_id_that_no_node_has_gets_one_warning(
    options: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An id in a config that no node has gets one warning in all runs of a runner, which names the nearest."""
    runner = StromaRunner.quick(**options)
    extract = extract_node(runner)
    for _ in range(2):
        assert (await runner.run([extract], Text())).status is RunStatus.COMPLETED
    async for _ in runner.stream([extract], Text()):
        pass
    assert warnings_in(caplog) == [
        f"{says}, which no node of pipeline 'pipeline' has; did you mean 'extract'?"
    ]


async def test_every_unknown_id_gets_a_warning_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Each id has its warning, also one that is like no other, and one of a pipeline's own config."""
    runner = StromaRunner.quick()
    extract = extract_node(runner)
    config = RunConfig(node_timeouts={"extrct": 10_000, "quite different": 10_000})
    await runner.run(Pipeline("p", [extract], config=config), Text())
    assert warnings_in(caplog) == [
        "node_timeouts names 'extrct', which no node of pipeline 'p' has; did you mean 'extract'?",
        "node_timeouts names 'quite different', which no node of pipeline 'p' has; correct the id",
    ]


async def test_ids_that_a_pipeline_or_the_registry_has_get_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The ids of groups, of what is in them, and of other nodes of the runner are known."""
    runner = StromaRunner.quick(
        node_timeouts={
            "parallel(extract)": 10_000,
            "extract": 10_000,
            "elsewhere": 10_000,
            "map_over(items, one)": 1_000,
        }
    )
    extract = extract_node(runner)
    runner.node("elsewhere", input=Text, output=Text)(give_text)
    one = runner.node("one", input=Text, output=Text)(give_number)
    await runner.run([parallel(extract), map_over("items", one, into="out")], Text())
    assert warnings_in(caplog)[1:] == []  # The first is of a failed attempt.
