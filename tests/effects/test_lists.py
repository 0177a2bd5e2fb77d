"""Effects in lists: a call is repeated only if somebody states that the one before did not happen."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from tests.effects.shop import Order, Receipt, Refused, Shop
from tests.fixtures import store_fixture
from tests.kit import THRICE, cancel_after, computing, failing_with, forever, noting, open_question, passing
from tests.shared_stores import FAMILIES

from stroma import (
    ExecutionBudget,
    Flow,
    NodeHooks,
    NotDone,
    Pipeline,
    RunStatus,
    StoreError,
    StromaRunner,
    Suspend,
    Unknown,
    current_node,
    parallel,
)
from stroma.engine.context import RunJournal
from stroma.testing import crash_at

store = store_fixture(*FAMILIES)


def pipeline(
    shop: Shop, store: Any, reconcile: Callable[..., Any] | None = None, **config: Any
) -> tuple[StromaRunner, list[Any]]:
    """As each process has it: the same nodes, the same store."""
    runner = StromaRunner.quick(store=store, policy_map=THRICE, **config)

    before = runner.node("before", input=Order, output=Order)(passing())
    charge = runner.node("charge", input=Order, output=Receipt, effect=True, reconcile=reconcile)(shop.charge)

    after = runner.node("after", input=Receipt, output=Receipt)(passing())
    return runner, [before, charge, after]


@pytest.mark.core
@pytest.mark.parametrize("error", [TimeoutError("no answer"), ConnectionResetError("gone"), KeyError("id")])
async def test_a_call_that_may_have_happened_is_not_repeated(store: Any, error: Exception) -> None:
    """G13: A timeout, a lost connection or an AMBIGUOUS failure suspends the run without a further call."""
    shop, seen = Shop(after=[error]), []

    suspended = noting(seen, lambda run_id, node_id, reason: (node_id, reason))
    runner, nodes = pipeline(shop, store, hooks=NodeHooks(on_node_suspended=suspended))
    result = await runner.run(nodes, Order(), run_id="r")
    assert (result.status, result.suspended, shop.calls) == (RunStatus.SUSPENDED, ["effect"], 1)
    assert seen == [("charge", "effect")]
    assert [(e.node_id, e.outcome) for e in result.trace] == [("before", "success"), ("charge", "suspended")]
    question = store.waiting("r")[0]
    assert (question.reason, question.effect.number) == ("effect", 1)
    assert type(error).__name__ in question.effect.cause
    assert question.effect.key == shop.charges[0]
    for _ in range(2):  # Nobody has stated anything meanwhile.
        runner, nodes = pipeline(shop, store)
        again = await runner.run(nodes, Order(), run_id="r", resume=True)
        assert (again.status, shop.calls) == (RunStatus.SUSPENDED, 1)
    assert error.args[0] in store.waiting("r")[0].effect.cause


@pytest.mark.core
async def test_a_person_states_the_outcome(store: Any) -> None:
    """Done: the output is committed without a call. Not done: the effect is called again, once."""
    shop = Shop(after=[TimeoutError()])
    runner, nodes = pipeline(shop, store)
    await runner.run(nodes, Order(), run_id="done")
    with pytest.raises(ValidationError):
        await runner.signal("done", {"number": "none"}, question=open_question(store, "done"))
    with pytest.raises(ValueError, match="NotDone"):
        await runner.signal("done", Unknown(), question=open_question(store, "done"))
    await runner.signal("done", {"number": 7}, question=open_question(store, "done"))
    result = await runner.run(nodes, Order(), run_id="done", resume=True)
    assert (result.status, result.final_state, shop.calls) == (RunStatus.RESUMED, Receipt(number=7), 1)

    shop = Shop(before=[TimeoutError(), TimeoutError()])
    runner, nodes = pipeline(shop, store)
    await runner.run(nodes, Order(), run_id="not done")
    await runner.signal("not done", NotDone(), question=open_question(store, "not done"))
    result = await runner.run(nodes, Order(), run_id="not done", resume=True)
    assert (result.status, shop.calls) == (RunStatus.SUSPENDED, 2)
    for _ in range(2):  # What was stated about the first call says nothing about the second.
        result = await runner.run(nodes, Order(), run_id="not done", resume=True)
        assert (result.status, shop.calls) == (RunStatus.SUSPENDED, 2)
    await runner.signal("not done", NotDone(), question=open_question(store, "not done"))
    result = await runner.run(nodes, Order(), run_id="not done", resume=True)
    assert (result.status, shop.calls, len(shop.charges)) == (RunStatus.RESUMED, 3, 1)


@pytest.mark.core
@pytest.mark.parametrize("is_async", [True, False])
async def test_reconcile_states_the_outcome(store: Any, is_async: bool) -> None:
    """The output that reconcile returns is committed; after NotDone() the failure is retried as any other."""
    for run_id, shop, calls in (
        ("happened", Shop(after=[TimeoutError()]), 1),
        ("did not", Shop(before=[TimeoutError()]), 2),
    ):

        def look(order: Order, key: str, shop: Shop = shop) -> Any:
            return asyncio.run(shop.look(order, key))

        runner, nodes = pipeline(shop, store, shop.look if is_async else look)
        result = await runner.run(nodes, Order(), run_id=run_id)
        assert (result.status, result.final_state) == (RunStatus.COMPLETED, Receipt(number=1))
        assert (shop.calls, len(shop.charges), len(shop.asked)) == (calls, 1, 1)


async def test_a_reconcile_that_cannot_tell_suspends(store: Any) -> None:
    """Unknown(), an exception, a timeout or an invalid output of reconcile lead to a question."""

    def fails(order: Order, key: str) -> Any:
        raise OSError("provider is down")

    for number, (reconcile, cause) in enumerate(
        [
            (lambda order, key: Unknown("still in flight"), "still in flight"),
            (lambda order, key: Unknown, "no answer"),
            (fails, "provider is down"),
            (forever, "TimeoutError"),
            (lambda order, key: None, "None"),
            (lambda order, key: {"number": "x"}, "number"),
        ]
    ):
        shop = Shop(after=[ConnectionResetError("no answer")])
        limit = {"charge": 50} if reconcile is forever else {}
        runner, nodes = pipeline(shop, store, reconcile, node_timeouts=limit)
        result = await runner.run(nodes, Order(), run_id=str(number))
        assert (result.status, shop.calls) == (RunStatus.SUSPENDED, 1)
        assert cause in store.waiting(str(number))[0].effect.cause


@pytest.mark.core
async def test_a_statement_that_comes_during_reconcile_holds(store: Any) -> None:
    """A statement during reconcile that a call happened wins over NotDone(). A later statement is refused."""
    shop, asked = Shop(after=[TimeoutError(), TimeoutError()]), asyncio.Event()
    verdicts: list[Any] = [Unknown()]

    async def look(order: Order, key: str) -> Any:
        asked.set()
        await asyncio.sleep(0.05)
        return verdicts[-1]

    runner, nodes = pipeline(shop, store, look)
    for run_id in ("early", "late"):
        await runner.run(nodes, Order(), run_id=run_id)
    verdicts.append(NotDone())
    question = open_question(store, "early")
    asked.clear()
    running = asyncio.ensure_future(runner.run(nodes, Order(), run_id="early", resume=True))
    await asked.wait()
    await runner.signal("early", {"number": 7}, question=question)
    result = await running
    assert (result.status, result.final_state, shop.calls) == (RunStatus.RESUMED, Receipt(number=7), 2)

    question = open_question(store, "late")
    result = await runner.run(nodes, Order(), run_id="late", resume=True)
    assert (result.status, result.final_state, shop.calls) == (RunStatus.RESUMED, Receipt(number=3), 3)
    with pytest.raises(StoreError, match="the run no longer waits for its answer"):
        await runner.signal("late", {"number": 7}, question=question)


@pytest.mark.parametrize("shape", ["list", "flow"])
async def test_reconcile_is_asked_again_after_a_time(store: Any, shape: str) -> None:
    """After Unknown(retry_seconds=...) a worker continues the run in that time, and asks reconcile again."""
    answers: list[Any] = [Unknown("too early", retry_seconds=0.05)] * 2 + [{"number": 7}]
    shop = Shop(after=[ConnectionResetError("no answer")])
    runner, nodes = pipeline(shop, store, lambda order, key: answers.pop(0))

    @runner.flow("orders", input=Order, output=Receipt)
    async def orders(flow: Flow, order: Order) -> Receipt:
        return await flow.step(nodes[1], order)

    served = Pipeline("orders", nodes) if shape == "list" else orders
    result = await runner.run(served, Order(), run_id="r")
    assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["effect"])
    assert store.get_run("r").due_ms is not None
    serving = asyncio.ensure_future(runner.serve(served, poll_seconds=0.02))
    result = await runner.handle("r", served).result(timeout=30)
    await runner.shutdown()
    await serving
    assert (result.status, result.output) == (RunStatus.RESUMED, Receipt(number=7))
    assert (shop.calls, answers) == (1, [])
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="retry_seconds must be above 0"):
            Unknown(retry_seconds=seconds)


async def test_reconcile_may_never_be_asked_again(store: Any) -> None:
    """The end of a run is recorded, however late Unknown(retry_seconds=...) makes it due."""
    shop = Shop(after=[ConnectionResetError("no answer")])
    runner, nodes = pipeline(shop, store, lambda order, key: Unknown(retry_seconds=1e300))
    await runner.run(nodes, Order(), run_id="r")
    assert store.get_run("r").status == "SUSPENDED"


async def test_an_interrupted_run_does_not_wait_for_an_effect(store: Any) -> None:
    """A run that is shut down beside an effect with Unknown(retry_seconds=...) is due at once."""
    shop = Shop(after=[ConnectionResetError("no answer")])
    asked, never = asyncio.Event(), asyncio.Event()

    async def reconcile(order: Order, key: str) -> Unknown:
        asked.set()
        return Unknown(retry_seconds=3600)

    runner, (before, charge, _) = pipeline(shop, store, reconcile)

    @runner.node("slow", input=Order, output=Order)
    async def slow(order: Order) -> Order:
        await never.wait()
        return order

    run = asyncio.create_task(runner.run([before, parallel(charge, slow)], Order(), run_id="r"))
    await asked.wait()
    while not store.waiting("r"):
        await asyncio.sleep(0.01)
    await runner.shutdown(drain_seconds=0)
    assert (await run).status is RunStatus.INTERRUPTED
    assert store.get_run("r").due_ms == 0


@pytest.mark.core
async def test_a_refused_call_is_an_ordinary_failure(store: Any) -> None:
    """A 4xx, or no connection made, is classified and retried as ever, and nobody is asked."""
    shop = Shop(before=[ConnectionRefusedError(), ConnectionRefusedError()])
    runner, nodes = pipeline(shop, store, shop.look)
    result = await runner.run(nodes, Order(), run_id="r")
    assert (result.status, shop.calls, shop.asked) == (RunStatus.COMPLETED, 3, [])
    shop = Shop(before=[Refused("declined")])
    runner, nodes = pipeline(shop, store)
    result = await runner.run(nodes, Order(), run_id="declined")
    assert (result.status, shop.calls) == (RunStatus.FAILED, 1)
    result = await runner.run(nodes, Order(), run_id="declined", resume=True)
    assert (result.status, shop.calls) == (RunStatus.RESUMED, 2)


@pytest.mark.core
async def test_output_that_breaks_its_contract_does_not_repeat_the_call(store: Any) -> None:
    """An effect whose output is invalid has happened: contract_retries do not call it again."""
    shop = Shop()

    async def broken(order: Order) -> dict[str, Any]:
        return {"number": f"no. {(await shop.charge(order))['number']}"}

    runner = StromaRunner.quick(store=store, contract_retries={"charge": 3})
    charge = runner.node("charge", input=Order, output=Receipt, effect=True)(broken)
    result = await runner.run([charge], Order(), run_id="r")
    assert (result.status, shop.calls) == (RunStatus.SUSPENDED, 1)
    await runner.signal("r", {"number": 1}, question=open_question(store, "r"))
    assert (await runner.run([charge], Order(), run_id="r", resume=True)).final_state == Receipt(number=1)


@pytest.mark.core
@pytest.mark.parametrize("point", ["before_node", "after_node", "after_commit", "after_hooks"])
async def test_a_process_that_dies_around_the_call(store: Any, point: Any) -> None:
    """G13: After a death between intent and commit `reconcile` is called; the charge is made exactly once."""
    shop = Shop()
    runner, nodes = pipeline(shop, store, shop.look)
    with crash_at(point, "charge"):
        await runner.run(nodes, Order(), run_id="r")
    assert len(shop.charges) == (point != "before_node")
    result = await runner.run(nodes, Order(), run_id="r", resume=True)
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Receipt(number=1))
    assert (len(shop.charges), shop.calls) == (1, 1)
    assert len(shop.asked) == (point in ("before_node", "after_node"))


async def test_a_process_that_dies_without_reconcile(store: Any) -> None:
    """Without reconcile a resume asks a person, also if the dead process had not reached the function."""
    points: list[tuple[Any, int]] = [("before_node", 0), ("after_node", 1)]
    for point, charges in points:
        shop = Shop()
        runner, nodes = pipeline(shop, store)
        with crash_at(point, "charge"):
            await runner.run(nodes, Order(), run_id=point)
        result = await runner.run(nodes, Order(), run_id=point, resume=True)
        assert (result.status, result.suspended) == (RunStatus.SUSPENDED, ["effect"])
        assert len(shop.charges) == charges
        assert "process ended" in store.waiting(point)[0].effect.cause


async def test_a_cancelled_call_is_not_repeated(store: Any) -> None:
    """A run that is cancelled during the call of an effect asks for its outcome when it is resumed."""
    called, shop = asyncio.Event(), Shop()

    async def hang(order: Order) -> dict[str, Any]:
        await shop.charge(order)
        called.set()
        await asyncio.Event().wait()
        raise AssertionError

    runner = StromaRunner.quick(store=store)
    charge = runner.node("charge", input=Order, output=Receipt, effect=True, reconcile=shop.look)(hang)
    await cancel_after(runner.run([charge], Order(), run_id="r"), called)
    result = await runner.run([charge], Order(), run_id="r", resume=True)
    assert (result.final_state, shop.calls) == (Receipt(number=1), 1)


async def test_resume_from_before_an_effect_does_not_repeat_it(store: Any) -> None:
    """Discarding an effect's commit does not repeat the call: how it ended is stated first."""
    shop = Shop()
    runner, nodes = pipeline(shop, store, shop.look)
    await runner.run(nodes, Order(), run_id="r")
    result = await runner.run(nodes, Order(), run_id="r", resume_from="before")
    assert (result.final_state, shop.calls, len(shop.asked)) == (Receipt(number=1), 1, 1)


async def test_another_execution_is_another_effect(store: Any) -> None:
    """A run id that is restarted is a new execution, with calls and idempotency keys of its own."""
    shop = Shop()
    runner, nodes = pipeline(shop, store, shop.look)
    for _ in range(2):
        await runner.run(nodes, Order(), run_id="r", if_exists="restart")
    assert (shop.calls, len(set(shop.charges)), shop.asked) == (2, 2, [])


async def test_a_time_limit_of_an_effect(store: Any) -> None:
    """node_timeouts bound an effect; what a cancelled call did is asked."""
    shop = Shop()

    async def slow(order: Order) -> dict[str, Any]:
        await shop.charge(order)
        await asyncio.Event().wait()
        raise AssertionError

    runner = StromaRunner.quick(store=store, node_timeouts={"charge": 250})
    charge = runner.node("charge", input=Order, output=Receipt, effect=True, reconcile=shop.look)(slow)
    result = await runner.run([charge], Order(), run_id="r")
    assert (result.final_state, shop.calls, len(shop.asked)) == (Receipt(number=1), 1, 1)


async def test_not_done_is_for_effects_only(store: Any) -> None:
    """signal(NotDone()) for another question is refused, and reconcile= without effect=True."""
    runner = StromaRunner.quick(store=store)
    ask = runner.node("ask", input=Order, output=Order)(failing_with(Suspend, "may I?"))
    await runner.run([ask], Order(), run_id="r")
    for question in (None, open_question(store, "r")):
        with pytest.raises(ValueError, match="about the call of an effect"):
            await runner.signal("r", NotDone(), question=question)
    with pytest.raises(ValidationError, match="effect=True"):
        runner.node("x", input=Order, output=Order, reconcile=lambda order, key: NotDone())(ask)


async def test_an_intent_that_the_store_refuses_prevents_the_call(store: Any, monkeypatch: Any) -> None:
    """Without its intent in the store an effect is not called; the run is PARTIAL, and a resume calls it."""
    shop = Shop()
    runner, nodes = pipeline(shop, store)
    monkeypatch.setattr("stroma.engine.commit._STORE_DELAYS", ())

    refuse = computing(lambda _: (StoreError("disk full"), None))
    with monkeypatch.context() as patched:
        patched.setattr("stroma.engine.effects.store_notes", refuse)
        result = await runner.run(nodes, Order(), run_id="r")
    assert (result.status, shop.calls) == (RunStatus.PARTIAL, 0)
    result = await runner.run(nodes, Order(), run_id="r", resume=True)
    assert (result.status, shop.calls) == (RunStatus.RESUMED, 1)


async def test_a_charge_whose_commit_is_refused_stays_unknown(store: Any, monkeypatch: Any) -> None:
    """G13: A call whose output the store refuses is unknown; it is settled before another input's call."""
    shop, cents = Shop(), [100, 200]
    runner = StromaRunner.quick(store=store, policy_map=THRICE)
    before = runner.node("before", input=Order, output=Order)(computing(lambda _: Order(cents=cents.pop(0))))
    nodes = [before, runner.node("charge", input=Order, output=Receipt, effect=True)(shop.charge)]
    record = RunJournal.record

    def refuse(self: Any, row: Any, schema: Any = None, output: Any = None, *more: Any) -> Any:
        if output is not None and row.node_id == "charge":
            return StoreError("disk full")
        return record(self, row, schema, output, *more)

    monkeypatch.setattr("stroma.engine.commit._STORE_DELAYS", ())
    with monkeypatch.context() as patched:
        patched.setattr(RunJournal, "record", refuse)
        assert (await runner.run(nodes, Order(), run_id="r")).status is RunStatus.PARTIAL
    (effect,) = store.facts_of("r").effects.values()
    assert effect.is_unknown
    result = await runner.run(nodes, Order(), run_id="r", resume_from="before", if_exists="resume")
    assert (result.status, result.suspended, shop.calls) == (RunStatus.SUSPENDED, ["effect"], 1)


@pytest.mark.parametrize("late", ["limit", "pause"])
async def test_an_effect_is_not_called_after_a_limit_or_a_pause(store: Any, late: str) -> None:
    """G6: A call that reconcile allows is not made if a limit was crossed, or the run paused, meanwhile."""
    shop, spent, first = Shop(before=[TimeoutError()]), asyncio.Event(), [Unknown()]

    async def reconcile(order: Order, key: str) -> Any:
        if first:
            return first.pop()
        if late == "pause" and not spent.is_set():
            spent.set()
            await runner.pause("r")
        await spent.wait()
        return NotDone()

    async def spend(order: Order) -> Any:
        return current_node().wait_for(Order, reason="go on?"), 10 if late == "limit" else 0

    async def on_node_failure(*_: Any) -> None:
        spent.set()

    hooks, budget = NodeHooks(on_node_failure=on_node_failure), ExecutionBudget(max_tokens_total=5)
    runner, (_, charge, _) = pipeline(shop, store, reconcile, hooks=hooks, budget=budget)
    group = parallel(charge, runner.node("spend", input=Order, output=Order)(spend))
    await runner.run([group], Order(), run_id="r")
    await runner.signal("r", Order())
    result = await runner.run([group], Order(), run_id="r", resume=True)
    status = RunStatus.PARTIAL if late == "limit" else RunStatus.SUSPENDED
    assert (result.status, shop.calls) == (status, 1), result.failure
    await runner.set_budget("r", tokens=100)
    result = await runner.run([group], Order(), run_id="r", resume=True)
    assert (result.status, shop.calls) == (RunStatus.RESUMED, 2), "then reconcile is asked again"
