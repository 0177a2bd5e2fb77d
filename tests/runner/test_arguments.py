"""What may be given to a runner and as a context; anything else is told before a node is called."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tests.kit import NEVER, Num, SimpleStore, computing, failing_with, node

from stroma import (
    AsyncInMemoryStore,
    CheckpointManager,
    ContractRegistry,
    FailureClass,
    FallbackPolicy,
    InMemoryStore,
    NodeHooks,
    Pipeline,
    RunConfig,
    SQLiteStore,
    StromaRunner,
    Usage,
    current_node,
    open_store,
    parallel,
    stroma_node,
)
from stroma.testing import assert_resumable


@pytest.mark.parametrize("form", [str, Path, "sqlite:///{}".format])
def test_a_runner_takes_the_url_or_path_of_a_store(tmp_path: Path, form: Any) -> None:
    file = tmp_path / "runs.db"
    runner = StromaRunner.quick(store=form(str(file)), run_id="r")
    add = runner.node("add", input=Num, output=Num)(computing(lambda state: Num(n=state.n + 1)))
    assert runner.run_sync([add], Num()).final_state == Num(n=1)
    record = SQLiteStore(file).get_run("r")
    assert record.status == "COMPLETED"


def test_a_url_that_names_no_store_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="mysql:// stores are not available"):
        StromaRunner.quick(store="mysql://host/db")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("redis://:secret@host/0", "store must be a store, got str; pass open_store(url)"),
        (Path("runs.db"), f"store must be a store, got {type(Path()).__name__}; pass open_store(url)"),
        (
            AsyncInMemoryStore,
            "store must be an instance, got the class AsyncInMemoryStore; pass AsyncInMemoryStore(...)",
        ),
        ({}, "store must have save, load and delete, got dict"),
        (None, "store must have save, load and delete, got NoneType"),
    ],
)
def test_what_is_no_store_is_told_when_it_is_given(value: Any, text: str) -> None:
    """Not when the first output is to be kept, which is paid for by then; and no password is told with it."""
    with pytest.raises(TypeError) as caught:
        CheckpointManager(value)
    assert str(caught.value) == text


def test_every_store_is_one() -> None:
    for store in (InMemoryStore(), AsyncInMemoryStore(), open_store("memory://"), SimpleStore()):
        assert CheckpointManager(store).store is store


@pytest.mark.parametrize(
    "value",
    [print, [print], {"on_node_start": print}, "hooks", 5],
    ids=["function", "list", "dict", "text", "number"],
)
def test_what_is_no_set_of_hooks_is_told_when_it_is_given(value: Any) -> None:
    with pytest.raises(TypeError, match=r"is not a set of hooks; make one with NodeHooks\(\.\.\.\)$"):
        StromaRunner.quick(hooks=value)


quick = StromaRunner.quick
NAMED_CLASS = "the initial state must be an instance, got the class Num; pass Num"


async def no_classifier(exception: Exception, context: Any) -> None: ...


async def a_call(state: Num) -> Any: ...


A_NODE = stroma_node("a", input=Num, output=Num)(a_call)


def print_one(outcome: Any) -> None:
    print(outcome)


def many(nodes: Any = (A_NODE,), **options: Any) -> Any:
    return asyncio.run(quick().run_many(nodes, [Num()], **options))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: quick(node_timeouts={"a": 0.5}), ValueError, "got 0.5; pass 500 for 0.5 seconds"),
        (lambda: quick(node_timeouts={"a": timedelta(seconds=3)}), ValueError, "pass 3000 for 3 seconds"),
        (lambda: quick(contract_retries={"a": -1}), ValueError, r"contract_retries\.a\n  Input should be"),
        (lambda: quick(classifiers=[FailureClass.TERMINAL]), TypeError, "pass a function of"),
        (lambda: quick(classifiers=no_classifier), TypeError, "must be a list of functions"),
        (lambda: quick(classifiers=[no_classifier]), TypeError, "must not be async, got .*; define it"),
        (lambda: quick(redact=5), TypeError, "redact must be callable, got 5"),
        (lambda: NodeHooks(on_node_start=5), TypeError, "on_node_start must be callable, got 5"),
        (lambda: FallbackPolicy("a", "b", 80), ValueError, "must be a share from 0 to 1, got 80"),
        (
            lambda: StromaRunner(ContractRegistry(), CheckpointManager(InMemoryStore()), {}),
            TypeError,
            r"config must be a RunConfig, got dict; pass RunConfig\(\.\.\.\)",
        ),
        (
            lambda: StromaRunner(None, CheckpointManager(InMemoryStore())),
            TypeError,
            "registry must be a ContractRegistry, got NoneType",
        ),
        (
            lambda: StromaRunner(ContractRegistry(), InMemoryStore()),
            TypeError,
            r"got InMemoryStore; pass CheckpointManager\(store\)",
        ),
        (lambda: Pipeline("p", [], config={}), TypeError, "config must be a RunConfig"),
        (lambda: Pipeline("p", A_NODE), TypeError, "got node 'a'; put it in a list"),
        (lambda: quick().run_sync(A_NODE, Num()), TypeError, "got node 'a'; put it in a list"),
        (lambda: many(A_NODE), TypeError, "got node 'a'; put it in a list"),
        (
            lambda: quick().run_sync([Pipeline("p", [], config=RunConfig(context="secret"))], Num()),
            TypeError,
            "^a Pipeline is not a stroma node; pass its nodes one by one$",
        ),
        (lambda: parallel([A_NODE]), TypeError, "a list is not a stroma node; pass its nodes one by one"),
        (lambda: many(on_result=no_classifier), TypeError, "on_result must not be async"),
        (lambda: many(on_result=print_one), TypeError, r"called with \(number, outcome\)"),
        (lambda: many(run_ids=["r"]), TypeError, "run_ids must be callable"),
        (lambda: many(max_concurrency=1.5), ValueError, "must be at least 1, got 1.5"),
        (lambda: asyncio.run(quick().serve(on_result=no_classifier)), TypeError, "must not be async"),
        (lambda: quick().run_sync([], Num), TypeError, NAMED_CLASS),
        (lambda: quick().node("a", input=Num, output=Num)(Num()), TypeError, "it is not callable"),
    ],
)
def test_a_setting_of_another_kind_is_refused_where_it_is_written(
    make: Callable[[], Any], error: type[Exception], text: str
) -> None:
    """A setting that cannot mean what was meant is an error that says what to pass."""
    with pytest.raises(error, match=text):
        make()


async def test_a_node_that_was_called_is_refused() -> None:
    """A coroutine in the place of a node says what to pass."""
    called = A_NODE(Num())
    with pytest.raises(TypeError, match="is not a stroma node; pass the node itself, without calling it"):
        await quick().run([called], Num())
    called.close()


def test_classifiers_that_can_be_read_once_are_applied() -> None:
    """The check of an iterator of classifiers does not use it up."""

    def terminal(error: Exception, context: Any) -> FailureClass:
        return FailureClass.TERMINAL

    classifiers: Any = iter([terminal])
    runner = quick(classifiers=classifiers, policy_map=NEVER)
    failure = runner.run_sync([node("a", failing_with(ValueError()))], Num()).failure
    assert failure is not None
    assert failure.failure_class is FailureClass.TERMINAL


@dataclass
class Deps:
    """What nodes share; a copy of it raises."""

    key: SecretStr = field(default_factory=lambda: SecretStr("sk-deps-0123456789"))
    seen: list[Any] = field(default_factory=list)

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the context was copied")

    __copy__ = __deepcopy__


@stroma_node
async def look(state: Num, ctx: Deps) -> Num:
    ctx.seen.append(ctx)
    return state


def runner_of(deps: Deps, **options: Any) -> StromaRunner[Deps]:
    return StromaRunner[Deps].quick(policy_map=NEVER, context=deps, **options)


async def test_nodes_receive_the_object_itself() -> None:
    """``ctx`` is the object of quick(), with_context() or run(), of any class, and not a copy."""
    contexts = first, second, third = Deps(), Deps(), Deps()
    runner = runner_of(first)
    await runner.run([look], Num())
    await runner.run([look], Num(), context=second)
    await runner.with_context(third).run([look], Num())
    assert all(len(one.seen) == 1 and one.seen[0] is one for one in contexts)


async def test_tests_pass_the_object_itself() -> None:
    """assert_resumable() passes the context of the runner, and does not copy it."""
    deps = Deps()
    await assert_resumable(Pipeline("p", [look]), Num(), runner=runner_of(deps), processes=False)
    assert all(one is deps for one in deps.seen)


async def test_secrets_of_the_object_are_masked() -> None:
    """A secret in an attribute of the context does not appear in the message of a failure."""

    @stroma_node
    async def leak(state: Num, ctx: Deps) -> Num:
        raise ValueError(f"denied for {ctx.key.get_secret_value()}")

    result = await runner_of(Deps()).run([leak], Num())
    assert result.failure is not None
    assert "sk-deps" not in str(result.failure)
    assert "denied for" in str(result.failure)


async def test_a_fallback_model_beside_an_object() -> None:
    """A due fallback model is at current_node().model; only a dict also gets a key for it."""
    models: list[str | None] = []

    @stroma_node
    async def spend(state: Num, ctx: Deps) -> tuple[Num, Usage]:
        models.append(current_node().model)
        assert isinstance(ctx, Deps)
        return state, Usage(input_tokens=1, cost_usd=0.9)

    runner = runner_of(Deps(), model_fallbacks=[FallbackPolicy("large", "small")]).with_budget(cost_usd=1.0)
    await runner.run([spend, look, spend], Num())
    assert models == [None, "small"]
