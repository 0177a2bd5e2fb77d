"""Clean-ups after a failure, and what a resume makes of them once the failed step works."""

import asyncio
import contextlib
from typing import Any

import pytest
from tests.flows.steps import World, run_of, runner_on
from tests.kit import Num
from tests.shared_stores import IN_PROCESS, store_of

from stroma import (
    Flow,
    InMemoryStore,
    NotDone,
    Pipeline,
    RunStatus,
    SQLiteStore,
    StepFailed,
    StromaRunner,
    current_node,
    stroma_flow,
)
from stroma.testing import crash_at


class Answer(Num):
    pass


class Refused(Exception):
    status_code = 400


class Provider:
    """A provider that makes one charge for each idempotency key."""

    def __init__(self, runner: StromaRunner, turns: int = 0) -> None:
        self.turns = turns
        self.charges: dict[str, int] = {}
        self.calls: list[int] = []
        self.asked: list[str] = []
        self.charge = runner.node("charge", input=Num, output=Num, effect=True, reconcile=self._look)(
            self._charge
        )

    async def _charge(self, state: Num) -> Num:
        self.calls.append(state.n)
        if state.n < 0:
            raise Refused
        charge = Num(n=self.charges.setdefault(current_node().idempotency_key, state.n))
        for _ in range(self.turns):
            await asyncio.sleep(0)
        return charge

    async def _look(self, _: Num, key: str) -> Num | NotDone:
        self.asked.append(key)
        return Num(n=self.charges[key]) if key in self.charges else NotDone()


@pytest.mark.parametrize("kind", IN_PROCESS)
@pytest.mark.parametrize("way", ["step", "flow", "pipeline", "map", "more", "fewer"])
async def test_an_effect_of_a_cleanup_is_made_for_each_input(kind: str, way: str) -> None:
    """G13. A ``finally`` that makes an effect with another input, once the failure is retried, gets that
    one's output; an item of a map whose input is the same is not called again."""
    world = World()
    world.failing.add("bad")
    bad = world.step("bad", lambda _: 7)
    charged: list[list[int]] = []

    with store_of(kind) as store:
        provider = Provider(StromaRunner.quick(store=store))

        @stroma_flow("inner", input=Num, output=Num)
        async def inner(flow: Flow, state: Num) -> Num:
            return await flow.step(provider.charge, state)

        async def settle(flow: Flow, state: Num) -> list[Num]:
            if way == "step":
                return [await flow.step(provider.charge, state)]
            if way in ("flow", "pipeline"):
                return [await flow.run(inner if way == "flow" else Pipeline("p", [provider.charge]), state)]
            others = {"map": ([8], [8]), "more": ([], [8, 9]), "fewer": ([8], [])}[way][state.n == 7]
            items = [Num(n=3), state, *(Num(n=n) for n in others)]
            return await flow.map(provider.charge, items)

        @stroma_flow("f", input=Num, output=Num)
        async def f(flow: Flow, state: Num) -> Num:
            try:
                state = await flow.step(bad, state)
            finally:
                charged.append([one.n for one in await settle(flow, state)])
            await flow.wait_for(Answer, reason="Go on?")
            return state

        assert (await runner_on(store).run(f, Num(n=1))).status is RunStatus.PARTIAL
        world.failing.clear()
        for _ in range(2):
            result = await runner_on(store).run(f, Num(n=1))
            assert result.status is RunStatus.SUSPENDED, result.failure
    expected = {"more": ([3, 1], [3, 7, 8, 9]), "fewer": ([3, 1, 8], [3, 7]), "map": ([3, 1, 8], [3, 7, 8])}
    first, second = expected.get(way, ([1], [7]))
    assert charged == [first, second, second]
    assert sorted(provider.calls) == sorted({*first, *second})
    assert sorted(provider.charges.values()) == sorted({*first, *second})


@pytest.mark.parametrize("kind", IN_PROCESS)
@pytest.mark.parametrize("way", ["step", "map", "flow", "pipeline", "sleep", "question"])
async def test_a_fallback_under_way_when_the_flow_ends_need_not_come_again(kind: str, way: str) -> None:
    """A branch falls back on other calls while its sibling ends the flow: no change if neither step fails."""
    world = World()
    world.failing |= {"bad", "worse"}
    world.turns.update({"notify": 400, "worse": 40})
    bad, worse, notify = world.step("bad"), world.step("worse"), world.step("notify")
    fallback = world.step("fallback")

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        for _ in range(50):
            state = await flow.step(fallback, state)
        return state

    async def fall_back(flow: Flow, state: Num) -> None:
        if way == "step":
            await inner(flow, state)
        elif way == "map":
            await flow.map(fallback, [Num(n=n) for n in range(50)], max_concurrency=1)
        elif way == "flow":
            await flow.run(inner, state)
        elif way == "pipeline":
            await flow.run(Pipeline("p", [fallback] * 50), state)
        elif way == "sleep":
            await flow.sleep(1)
        else:
            await flow.wait_for(Answer, reason="Go on?", timeout=30)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        async def other() -> None:
            try:
                await flow.step(worse, state)
            except StepFailed:
                await fall_back(flow, state)

        await asyncio.gather(_fail_late(flow, state, bad, notify), other())
        return state

    with store_of(kind) as store:
        assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
        world.failing.clear()
        result = await runner_on(store).run(f, Num())
    assert result.status is RunStatus.RESUMED, result.failure


async def test_a_cleanup_may_call_a_node_that_a_cancelled_flow_called() -> None:
    """A step of a clean-up need not come again, though a step of an inner flow has its identity there."""
    world, store = World(), InMemoryStore()
    world.failing.add("bad")
    world.turns.update({"bad": 40, "log 0": 10**6})
    bad, log = world.step("bad"), world.step("log")

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(log, state)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(flow.step(bad, state))
                group.create_task(flow.run(inner, state))
        except ExceptionGroup:
            await flow.step(log, Num(n=1))
            raise
        return state

    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    world.failing.clear()
    world.turns.clear()
    result = await runner_on(store).run(f, Num())
    assert result.status is RunStatus.RESUMED, result.failure


async def _fail_late(flow: Flow, state: Num, bad: Any, notify: Any) -> None:
    """Call a step that fails, another one after its failure, and fail."""
    try:
        await flow.step(bad, state)
    except StepFailed:
        await flow.step(notify, state)
        raise


async def _give_up(call: Any) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(call, 0.01)


@pytest.mark.core  # Python 3.12 and newer cancel in the task of the body.
@pytest.mark.parametrize("kind", IN_PROCESS)
@pytest.mark.parametrize("way", ["step", "map", "flow", "question", "sleep", "late"])
@pytest.mark.parametrize("ends", ["step", "body"])
async def test_a_cleanup_that_gives_up_on_a_call_need_not_come_again(kind: str, way: str, ends: str) -> None:
    """A clean-up that cancels a call and makes another one after it does not hinder the resume."""
    world = World()
    world.turns["slow"] = 10**6
    bad, slow, notify = world.step("bad"), world.step("slow"), world.step("notify")
    is_failing = True

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        return await flow.step(slow, await flow.step(notify, state))

    async def clean_up(flow: Flow, state: Num) -> None:
        if way == "step":
            await _give_up(flow.step(slow, state))
        elif way == "map":
            await _give_up(flow.map(slow, [state]))
        elif way == "flow":
            await _give_up(flow.run(inner, state))
        elif way == "question":
            await _give_up(flow.wait_for(Answer, reason="Go on?", timeout=30))
        elif way == "sleep":
            await _give_up(flow.sleep(30))
        else:
            later = asyncio.create_task(flow.step(slow, state))
            await flow.step(notify, state)
            later.cancel()
            await asyncio.wait([later])
        await flow.step(notify, Num(n=9))

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            state = await flow.step(bad, state)
            if ends == "body" and is_failing:
                raise KeyError("a bug of the body")
        except Exception:
            await clean_up(flow, state)
            raise
        return state

    if ends == "step":
        world.failing.add("bad")
    with store_of(kind) as store:
        assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
        world.failing.clear()
        is_failing = False
        for _ in range(2):
            result = await runner_on(store).run(f, Num())
            assert result.status is RunStatus.RESUMED, result.failure


@pytest.mark.parametrize("kind", IN_PROCESS)
async def test_a_fallback_that_gave_up_on_a_step_need_not_come_again(kind: str) -> None:
    """A branch gives up on a step after its sibling has failed, and is under way when that ends the flow."""
    world = World()
    world.failing |= {"bad", "worse"}
    world.turns.update({"notify": 400, "worse": 40, "slow": 10**6, "fallback": 10**6})
    bad, worse, notify = world.step("bad"), world.step("worse"), world.step("notify")
    fallback, slow = world.step("fallback"), world.step("slow")

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        await flow.step(worse, state)
        return state

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        async def other() -> None:
            try:
                await flow.run(inner, state)
            except StepFailed:
                await _give_up(flow.step(slow, state))
                await flow.step(fallback, state)

        await asyncio.gather(_fail_late(flow, state, bad, notify), other())
        return state

    with store_of(kind) as store:
        assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
        world.failing.clear()
        result = await runner_on(store).run(f, Num())
    assert result.status is RunStatus.RESUMED, result.failure


@pytest.mark.parametrize("kind", IN_PROCESS)
@pytest.mark.parametrize("ends", ["step", "body"])
async def test_a_map_of_a_cleanup_that_failed_need_not_come_again(kind: str, ends: str) -> None:
    """What a clean-up's map committed before an item failed is not taken for the map in its place."""
    world = World()
    world.failing.add("mail 11")
    pay, mail = world.step("pay"), world.step("mail")
    is_failing = True
    if ends == "step":
        world.failing.add("pay")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            state = await flow.step(pay, state)
            if ends == "body" and is_failing:
                raise KeyError("a bug of the body")
        except Exception:
            await flow.map(mail, [Num(n=10), Num(n=11)], max_concurrency=1)
            raise
        return (await flow.map(mail, [Num(n=1), Num(n=2)], max_concurrency=1))[1]

    with store_of(kind) as store:
        assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
        world.failing.clear()
        is_failing = False
        if ends == "step":  # The clean-up is tried again, and the flow ends with the failure before it.
            assert (await runner_on(store).run(f, Num())).failure.node_id == "pay"
        for _ in range(2):
            result = await runner_on(store).run(f, Num())
            assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=3)), result.failure
    assert world.calls[-2:] == ["mail 1", "mail 2"]


@pytest.mark.parametrize("awaits", [True, False])
async def test_the_loser_of_a_race_is_not_called_again(awaits: bool) -> None:
    """A step that the body gave up on before a later step failed stays cancelled."""
    world, store = World(), InMemoryStore()
    world.failing.add("send")
    world.turns.update({"model 0": 10**6, "send": 40})
    model, send = world.step("model"), world.step("send")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        tasks = [asyncio.create_task(flow.step(model, Num(n=n))) for n in range(2)]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if awaits:
            await asyncio.wait(pending)
        return await flow.step(send, done.pop().result())

    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    world.failing.clear()
    world.calls.clear()
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state, world.calls) == (RunStatus.RESUMED, Num(n=3), ["send 2"])


@pytest.mark.parametrize("kind", IN_PROCESS)
@pytest.mark.parametrize("way", ["step", "flow", "pipeline", "nested", "failed"])
async def test_a_cleanup_may_be_finished_by_another_process(kind: str, way: str) -> None:
    """G5: The process dies in a clean-up, the next one finishes it, and a resume makes what was cancelled."""
    world = World()
    world.failing.add("bad")
    world.turns.update({"bad": 40, "pack": 10**6})
    bad, pack, tell, report = (world.step(name) for name in ("bad", "pack", "tell", "report"))

    @stroma_flow("ship", input=Num, output=Num)
    async def ship(flow: Flow, state: Num) -> Num:
        if way == "failed":
            await flow.step(bad, state)
        return await flow.step(pack, await flow.step(tell, state))

    @stroma_flow("outer", input=Num, output=Num)
    async def outer(flow: Flow, state: Num) -> Num:
        return await flow.run(ship, state)

    def send(flow: Flow, state: Num) -> Any:
        if way == "step":
            return flow.step(pack, state)
        inside: Any = {"pipeline": Pipeline("p", [pack]), "nested": outer}.get(way, ship)
        return flow.run(inside, state)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(flow.step(bad, state))
                group.create_task(send(flow, state))
        except ExceptionGroup:
            await flow.step(tell, Num(n=5))
            await flow.step(report, Num(n=5))
            raise
        return state

    with store_of(kind) as store:
        run = run_of(f, store)
        await world.live(run, "report 5")
        assert (await world.live(run)).status is RunStatus.PARTIAL
        world.failing.clear()
        world.turns.clear()
        for _ in range(2):
            result = await world.live(run)
            assert result.status is RunStatus.RESUMED, result.failure


@pytest.mark.parametrize("way", ["timeout", "sibling", "map", "race", "not begun"])
async def test_an_effect_that_a_body_gives_up_is_made_once(way: str) -> None:
    """G13: An effect that a timeout, a failed sibling, a map or a lost race cuts off runs to its end, and the
    next call with its input takes its outcome; so does the run that is resumed."""
    world, store = World(), InMemoryStore()
    world.failing.add("last")
    bad, first, last = world.step("bad"), world.step("first"), world.step("last")
    world.failing.add("bad")
    provider = Provider(StromaRunner.quick(store=store), turns=3000)

    async def cut_off(flow: Flow, order: Num) -> None:
        if way == "timeout":
            for _ in range(3):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(flow.step(provider.charge, order), 0.001)
        elif way == "sibling":
            with contextlib.suppress(ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(flow.step(provider.charge, order))
                    group.create_task(flow.step(bad, order))
        elif way == "map":
            with contextlib.suppress(StepFailed):
                await flow.map(provider.charge, [order, Num(n=-1)])
        else:
            task = asyncio.create_task(flow.step(provider.charge, order))
            await (flow.step(first, order) if way == "race" else asyncio.sleep(0))
            task.cancel()
            await asyncio.wait([task])

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        await flow.step(first, state)
        await cut_off(flow, Num(n=500))
        charged = await flow.step(provider.charge, Num(n=500))
        return await flow.step(last, charged)

    assert (await runner_on(store).run(f, Num())).status is RunStatus.PARTIAL
    world.failing.clear()
    result = await runner_on(store).run(f, Num())
    assert (result.status, result.final_state) == (RunStatus.RESUMED, Num(n=501)), result.failure
    assert list(provider.charges.values()) == [500]
    assert provider.asked == []


async def test_a_flow_inside_ends_after_the_effects_that_it_gives_up() -> None:
    """G13: The effect that an inner flow gave up is looked up after a death, although it has returned."""
    world, store = World(), InMemoryStore()
    first = world.step("first")
    provider = Provider(StromaRunner.quick(store=store), turns=20)
    left: list[asyncio.Task[Num]] = []

    @stroma_flow("inner", input=Num, output=Num)
    async def inner(flow: Flow, state: Num) -> Num:
        task = asyncio.create_task(flow.step(provider.charge, state))
        left.append(asyncio.create_task(flow.step(provider.charge, Num(n=6))))
        await flow.step(first, state)
        task.cancel()
        return state

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        return await flow.step(first, await flow.run(inner, state))

    with crash_at("after_node", "charge"):
        await runner_on(store).run(f, Num(n=5))
    result = await runner_on(store).run(f, Num(n=5))
    assert result.status is RunStatus.RESUMED, result.failure
    made = [at.branch for at in store.attempts("r") if at.outcome == "success" and at.node_id == "charge"]
    assert sorted(made) == ["inner#0.charge#0", "inner#0.charge#1"]
    assert sorted(provider.charges.values()) == [5, 6]
    assert provider.asked


async def test_an_effect_that_ended_after_the_body_is_not_looked_up_again() -> None:
    """G5: A death between the commit of an effect that was given up and the flow's output harms neither."""
    world, store = World(), InMemoryStore()
    first = world.step("first")
    provider = Provider(StromaRunner.quick(store=store), turns=20)

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        task = asyncio.create_task(flow.step(provider.charge, state))
        await flow.step(first, state)
        task.cancel()
        return state

    with crash_at("after_commit", "charge"):
        await runner_on(store).run(f, Num(n=5))
    result = await runner_on(store).run(f, Num(n=5))
    assert result.status is RunStatus.RESUMED, result.failure
    assert [at.outcome for at in store.attempts("r") if at.node_id == "charge"] == ["success"]
    assert provider.asked == []


async def test_an_effect_that_a_body_left_behind_is_looked_up_after_a_death() -> None:
    """G13: The effect of a task that nobody awaits, in flight at a death, is looked up as the replay ends."""
    world, store = World(), InMemoryStore()
    first = world.step("first")
    provider = Provider(StromaRunner.quick(store=store), turns=20)
    left: list[asyncio.Task[Num]] = []

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        left.append(asyncio.create_task(flow.step(provider.charge, state)))
        return await flow.step(first, state)

    with crash_at("after_node", "charge"):
        await runner_on(store).run(f, Num(n=5))
    result = await runner_on(store).run(f, Num(n=5))
    assert result.status is RunStatus.RESUMED, result.failure
    assert [at.outcome for at in store.attempts("r") if at.node_id == "charge"] == ["success"]
    assert (len(provider.calls), len(provider.asked)) == (1, 1)


async def test_a_flow_that_fails_beside_an_unknown_effect_waits_for_it_and_resumes() -> None:
    """G6: A flow that ended while a call of it waits for a person is suspended; its replay closes first."""
    store = InMemoryStore()
    runner = runner_on(store)
    calls: list[str] = []

    @runner.node("lost", input=Num, output=Num, effect=True)
    async def lost(state: Num) -> Num:
        calls.append("lost")
        raise ConnectionResetError("connection reset by peer")

    @runner.node("refused", input=Num, output=Num)
    async def refused(state: Num) -> Num:
        calls.append("refused")
        while not store.waiting("r"):
            await asyncio.sleep(0)
        raise Refused

    @runner.flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        first, _ = await asyncio.gather(flow.step(lost, state), flow.step(refused, state))
        return first

    suspended = await runner.run(f, Num())
    assert suspended.status is RunStatus.SUSPENDED, suspended.failure
    await runner.signal("r", Num(n=7), question=suspended.questions[0].id)
    result = await runner.run(f, Num())
    assert (result.status, result.failure and result.failure.node_id) == (RunStatus.FAILED, "refused")
    assert calls == ["lost", "refused"]


async def test_an_effect_given_up_before_it_was_called_has_no_attempt() -> None:
    """G13: An effect that waits for a free place when the body gives it up is neither called nor recorded."""
    world, store = World(), InMemoryStore()
    quick, slow = world.step("quick"), world.step("slow")
    world.turns["slow"] = 20
    provider = Provider(StromaRunner.quick(store=store))
    left: list[asyncio.Task[Num]] = []

    @stroma_flow("inner", input=Num, output=Num, max_concurrency=1)
    async def inner(flow: Flow, state: Num) -> Num:
        occupied = asyncio.create_task(flow.step(slow, state))
        left.append(asyncio.create_task(flow.step(provider.charge, Num(n=5))))
        return await occupied

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        inside = asyncio.create_task(flow.run(inner, state))
        await flow.step(quick, state)
        left[0].cancel()
        return await inside

    result = await runner_on(store).run(f, Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    assert [at.node_id for at in store.attempts("r") if at.node_id == "charge"] == []
    assert (provider.calls, provider.asked) == ([], [])


async def test_wide_gathers_store_notes_in_proportion_to_their_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """G12: Each of several wide gathers stores as much as the first: no commit carries another's data."""
    from stroma.checkpoint.durable import session

    stored: list[int] = []
    record_notes = session.record_notes

    def count(records: Any, notes: Any) -> None:
        stored.append(len(notes))
        record_notes(records, notes)

    monkeypatch.setattr(session, "record_notes", count)
    world = World()
    add, bad = world.step("add"), world.step("bad")
    world.failing.add("bad")

    @stroma_flow("f", input=Num, output=Num)
    async def f(flow: Flow, state: Num) -> Num:
        for _ in range(3):
            steps = [flow.step(add, Num(n=n)) for n in range(40)]
            await asyncio.gather(
                *steps, *(flow.step(bad, Num(n=n)) for n in range(10)), return_exceptions=True
            )
        return state

    async with SQLiteStore(tmp_path / "runs.db", synchronous="normal") as opened:
        result = await runner_on(opened).run(f, Num())
    assert result.status is RunStatus.COMPLETED, result.failure
    # A note for each failure, and a few of the run.
    assert 30 <= sum(stored) <= 30 + 10
