"""Attempts that are refused, nodes that cannot be called here, and attempts with a fallback model."""

import asyncio
import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter
from tests.engine.event_log import counted
from tests.kit import (
    NEVER,
    ONCE,
    Num,
    One,
    Positive,
    cancel,
    cancel_after,
    node,
    noting,
    quick,
    quick_without_retries,
    stuck,
)
from tests.shared_stores import store_of

from stroma import (
    AsyncInMemoryStore,
    ExecutionBudget,
    ExecutionResult,
    FailureClass,
    Flow,
    Limit,
    NodeContract,
    NodeHooks,
    Pipeline,
    PlaceError,
    RunStatus,
    SharedBudget,
    StoreError,
    StromaRunner,
    parallel,
    stroma_flow,
    stroma_node,
)

BAD = {"n": "none"}


async def test_a_group_whose_child_was_refused_by_a_store_is_not_tried_again() -> None:
    """Where a shared budget is unknown, no group around the child asks again, whatever its policy says."""
    requests: list[str] = []

    class Down(AsyncInMemoryStore):
        def change_cell(self, *_: Any, **__: Any) -> Any:
            requests.append("asked")
            raise StoreError("down")

    retry = noting(requests, lambda run_id, node_id, *_: f"retry of {node_id}")
    inner = parallel(counted(requests, "a", {}))
    outer = parallel(inner)
    runner = StromaRunner.quick(
        shared_budgets=SharedBudget("held-down-inside", max_tokens=10, store=Down()),
        policy_map=ONCE,
        node_policies=dict.fromkeys((outer.node_id, inner.node_id), ONCE),
        hooks=NodeHooks(on_node_retry=retry),
    )
    result = await runner.run([outer], Num())
    assert (result.status, requests) == (RunStatus.PARTIAL, ["asked"])
    assert (result.failure.reason, result.failure.node_id) == ("store", outer.node_id)


async def test_a_classifier_is_told_where_it_is_asked() -> None:
    """For each failure, a crossed limit and a refusal too, it is given the node, the attempt and the run."""
    requests: list[Any] = []

    def ask(error: Exception, where: Any) -> None:
        requests.append((type(error).__name__, where.node_id, where.attempt, where.run_id))

    runner = StromaRunner.quick(
        policy_map=ONCE,
        classifiers=[ask],
        contract_retries={"b": 1},
        budget=ExecutionBudget(max_tokens_total=10),
    )
    flaky = counted([], "a", ValueError("no"), {"n": 1})
    nodes = [flaky, counted([], "b", BAD, {"n": 2}), counted([], "c", ({"n": 3}, 11))]
    await runner.run(nodes, Num(), run_id="told")
    await runner.run([counted([], "d", {}, input=Positive)], Num(), run_id="told too")
    assert requests == [
        ("ValueError", "a", 1, "told"),
        ("ContractViolation", "b", 1, "told"),
        ("BudgetExceeded", "c", 1, "told"),
        ("ContractViolation", "d", 1, "told too"),
    ]


async def test_a_cancellation_while_a_budget_is_told_comes_out_afterwards() -> None:
    """What the attempt took is counted and its output kept, and the next node is not called."""
    started, calls, settled = asyncio.Event(), list[str](), list[int]()

    class Slow(AsyncInMemoryStore):
        async def change_cell(self, name: str, change: Any) -> Any:
            if calls:
                started.set()
                for _ in range(3):
                    await asyncio.sleep(0)
                settled.append(1)
            return await super().change_cell(name, change)

    shared = SharedBudget("held-slow", max_tokens=100, store=Slow(), reserve_tokens=1)
    store = AsyncInMemoryStore()
    runner = StromaRunner.quick(shared_budgets=shared, store=store)
    nodes = [counted(calls, "a", ({"n": 1}, 7)), counted(calls, "b", {})]
    await cancel_after(runner.run(nodes, Num(), run_id="r"), started)
    assert calls == ["a"]
    state = await shared.state()
    assert (state.spent_tokens, state.reserved_tokens) == (7, 0)
    assert [(row.outcome, row.output) for row in store.attempts("r")] == [("success", b'{"n":1}')]


async def test_a_cancelled_attempt_gives_its_place_back() -> None:
    """Under a limit of one at once the next attempt begins when the one before was cancelled or failed."""
    limits = {"held-one": Limit(concurrent=1)}
    started = asyncio.Event()

    def runner() -> StromaRunner:
        return StromaRunner.quick(policy_map=NEVER, limits=limits, node_limits={"a": "held-one"})

    task = asyncio.create_task(runner().run([node("a", stuck(started))], Num()))
    await started.wait()
    waiting = asyncio.create_task(runner().run([counted([], "a", ValueError("no"))], Num()))
    await asyncio.sleep(0)
    assert not waiting.done()
    await cancel(task)
    assert (await waiting).status is RunStatus.PARTIAL
    assert (await runner().run([counted([], "a", {"n": 1})], Num())).status is RunStatus.COMPLETED


COMMAND = "stroma worker FILE:NAME --temporal HOST:PORT --place gpu"


def placed(node_id: str, func: Any, **options: Any) -> Any:
    contract = NodeContract(node_id=node_id, input_schema=Num, output_schema=Num, place="gpu", **options)
    return stroma_node(node_id, contract)(func)


async def never(state: Num) -> Num:
    raise AssertionError("it was called")


async def test_run_refuses_a_node_with_a_place() -> None:
    """Without a Temporal client run() and serve() raise PlaceError before any call, and name the commands."""
    runner = quick()
    first = node("first", never)
    for nodes in ([first, placed("a", never)], [first, parallel(placed("b", never), node("c", never))]):
        with pytest.raises(PlaceError, match=COMMAND):
            await runner.run(nodes, Num())
        with store_of("sqlite") as store:
            with pytest.raises(PlaceError, match=COMMAND):
                await quick(store=store).serve(Pipeline("p", nodes))


async def test_the_decorator_of_a_runner() -> None:
    """runner.node(place=) gives a node its place; an empty one is refused."""
    runner = quick()
    marked = runner.node("a", input=Num, output=Num, place="gpu")(never)
    with pytest.raises(PlaceError, match="place='gpu'"):
        await runner.run([marked], Num())
    with pytest.raises(ValueError, match="place must not be empty"):
        NodeContract(node_id="a", input_schema=Num, output_schema=Num, place="")


@pytest.mark.parametrize("effect", [False, True])
async def test_a_step_with_a_place(effect: bool) -> None:
    """A step of a flow with a place is a TERMINAL failure, without call or retry; an effect not in doubt."""
    step = placed("step", never, effect=effect)

    @stroma_flow("flow", input=Num, output=Num)
    async def body(flow: Flow, state: Num) -> Num:
        return Num(n=(await flow.step(step, state)).n)

    with store_of("sqlite") as store:
        result = await quick(store=store, policy_map=ONCE).run(body, Num())
    failure = result.failure
    assert (result.status, failure.failure_class) == (RunStatus.FAILED, FailureClass.TERMINAL)
    assert failure.reason == "place"
    assert (type(failure.exception), failure.attempt, result.suspended) == (PlaceError, 1, [])


async def test_a_stored_result_is_read_anywhere() -> None:
    """The result of a run with placed nodes can be read in a process that could not run it."""
    with store_of("sqlite") as store:
        runner = quick(store=store)
        pipeline = Pipeline("p", [placed("a", never)])
        handle = await runner.submit(pipeline, Num())
        await runner.cancel(handle.run_id)
        result: ExecutionResult = await handle.result(timeout=10)
    assert result.status is RunStatus.CANCELLED


class User(BaseModel):
    user: str


async def in_node(own: dict[str, Any], look: Callable[[Any], Any]) -> Any:
    """What ``look`` makes of the context dict that a node gets while a fallback for it is due."""
    runner = quick_without_retries(budget=ExecutionBudget(max_cost_usd=1), context=own).with_model_fallback(
        "gpt-4o", to="small", at_budget_pct=0
    )
    seen: list[Any] = []

    async def a(state: Num, ctx: Any) -> Any:
        seen.append(look(ctx))
        return {"a": 1}

    result = await runner.run([node("a", a, output=One)], Num())
    result.raise_for_status()
    return seen[0]


FULL = {"user": "u", "_stroma_model": "small"}


READERS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "json": (lambda ctx: json.loads(json.dumps(ctx)), FULL),
    "indented json": (lambda ctx: json.loads(json.dumps(ctx, indent=1, sort_keys=True)), FULL),
    "dict": (dict, FULL),
    "**": (lambda ctx: {**ctx}, FULL),
    "keywords": (lambda ctx: (lambda **mapping: mapping)(**ctx), FULL),
    "update": (lambda ctx: (copied := {}, copied.update(ctx))[0], FULL),
    "|": (lambda ctx: {} | ctx, FULL),
    "| first": (lambda ctx: ctx | {}, FULL),
    "copy": (copy.copy, FULL),
    ".copy": (lambda ctx: ctx.copy(), FULL),
    "deepcopy": (copy.deepcopy, FULL),
    "pickle": (lambda ctx: pickle.loads(pickle.dumps(ctx)), FULL),
    "pydantic dict": (lambda ctx: TypeAdapter(dict[str, Any]).validate_python(ctx), FULL),
    "pydantic model": (lambda ctx: User.model_validate(ctx), User(user="u")),
    "pydantic json": (lambda ctx: json.loads(TypeAdapter(Any).dump_json(ctx)), FULL),
    "reversed": (lambda ctx: list(reversed(ctx)), ["_stroma_model", "user"]),
    "list": (list, ["user", "_stroma_model"]),
    "len": (len, 2),
    "format": (lambda ctx: "{user} {_stroma_model}".format_map(ctx), "u small"),
    "repr": (lambda ctx: repr(ctx), repr(FULL)),
    "==": (lambda ctx: (ctx == FULL, ctx != FULL), (True, False)),
    "items": (lambda ctx: dict(ctx.items()), FULL),
}


@pytest.mark.parametrize("reader", READERS)
async def test_the_context_with_a_fallback_reads_like_a_dict(reader: str) -> None:
    """While a fallback is due, ctx has the model's name for all readers, the user's dict has not."""
    look, expected = READERS[reader]
    own = {"user": "u"}
    assert await in_node(own, look) == expected
    assert own == {"user": "u"}


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, dict, lambda c: pickle.loads(pickle.dumps(c))])
async def test_writes_reach_the_users_dict_and_copies_are_apart(make: Callable[[Any], Any]) -> None:
    """What a node writes to ctx is in the user's dict and in every later reading; copies are separate."""
    own: dict[str, Any] = {"user": "u", "old": 1}

    def write(ctx: Any) -> Any:
        copied = make(ctx)
        copied["lost"] = 1
        ctx["kept"] = [1]
        del ctx["old"]
        ctx |= {"more": 2, "last": 3}
        assert ctx.popitem() == ("last", 3)
        assert ctx.pop("user") == "u"
        return type(copied), json.loads(json.dumps(ctx)), TypeAdapter(dict[str, Any]).validate_python(ctx)

    now = {"kept": [1], "more": 2, "_stroma_model": "small"}
    assert await in_node(own, write) == (dict, now, now)
    assert own == {"kept": [1], "more": 2}


async def test_a_cleared_context_keeps_the_fallback() -> None:
    """A node that clears its ctx clears the user's dict, and still finds the model's name."""
    own = {"user": "u"}
    assert await in_node(own, lambda ctx: (ctx.clear(), dict(ctx))[1]) == {"_stroma_model": "small"}
    assert own == {}
