"""The pairing of hooks, driven step by step: real runs on one event loop whose clock stands still unless it
is moved."""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pydantic import BaseModel
from tests.kit import TWICE
from tests.tiers import examples

from stroma import (
    AsyncInMemoryStore,
    CheckpointManager,
    ContractRegistry,
    ExecutionBudget,
    ExecutionResult,
    FailureClass,
    NodeContract,
    NodeHooks,
    RunConfig,
    StromaRunner,
    current_node,
    current_node_or_none,
    map_over,
    parallel,
    stroma_node,
)

LIMIT_MS = 1000
END_OF = {"success": "on_node_success", "failure": "on_node_failure", "cancelled": "on_node_cancelled"}

#: Where an attempt stands: run, node, position, branch, and its number with those of the groups around it.
Place = tuple[str, str, int, str, tuple[int, ...]]


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time is moved by hand."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def settle(self, most: int = 2000) -> bool:
        """Turn until nothing more happens by itself, or ``most`` times. Whether nothing more happens."""
        ready: Any = getattr(self, "_ready")  # noqa: B009  # No public way tells that a loop is idle.
        for _ in range(most):
            self.call_soon(self.stop)
            self.run_forever()  # One turn: also what the clock has brought up.
            if not ready:
                return True
        return False


class State(BaseModel):
    n: int = 0
    items: list[dict[str, Any]] = [{"n": 1, "items": [{"n": 2}]}, {"n": 3, "items": []}]


class Planned(Exception):
    def __init__(self, failure_class: FailureClass) -> None:
        super().__init__(failure_class)
        self.failure_class = failure_class


def by_plan(error: Exception, context: Any) -> FailureClass | None:
    return error.failure_class if isinstance(error, Planned) else None


class SlowStore:
    """A store of the simple protocol, whose commits take some turns of the loop."""

    def __init__(self) -> None:
        inner = AsyncInMemoryStore()
        self._save, self.load, self.delete = inner.save, inner.load, inner.delete

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        await self._save(run_id, node_id, state)


#: A node, one with a time limit, one that runs a pipeline of its own, or a group of those.
leaves = st.sampled_from(["node", "node", "timed"])
plans: st.SearchStrategy[Any] = st.recursive(
    leaves,
    lambda inner: (
        st.tuples(
            st.sampled_from(["parallel", "parallel", "bound", "nested"]),
            st.lists(inner, min_size=1, max_size=3),
        )
        | st.tuples(st.just("map"), st.lists(inner, min_size=1, max_size=2))
    ),
    max_leaves=4,
)
deeds = st.sampled_from(
    [
        "ok",
        "ok",
        "ok",
        "recoverable",
        "recoverable",
        "terminal",
        "ambiguous",
        "stray",
        "over",
        "broken",
        "deaf",
    ]
)
#: How far the loop turns before the next thing happens; None: until it is idle.
turns = st.none() | st.integers(0, 12)
antics = st.sampled_from(["", "", "", "raise", "stray", "suspend", "suspend", "hang", "deaf"])


class HookMachine(RuleBasedStateMachine):
    """G9, step by step: every start has one end, whatever nodes, hooks and cancellations do, and in whatever
    order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Clock()
        self.settled = True
        self.sets = 1
        self.wrong: list[str] = []
        self.started_count = 0
        self.tasks: dict[str, asyncio.Task[ExecutionResult]] = {}
        self.cancelled: set[str] = set()
        self.antics: deque[str] = deque()
        # What hooks saw: which sets, in their order, were called with the start and with the end of each
        # attempt.
        self.starts: dict[Place, list[int]] = {}
        self.ends: dict[Place, list[tuple[str, int]]] = {}
        self.groups: set[Place] = set()
        self.run_starts: dict[str, list[int]] = {}
        self.run_ends: dict[str, list[int]] = {}
        self.results: dict[str, ExecutionResult] = {}
        self.busy: Counter[Any] = Counter()
        # What nodes do: the functions in flight, each with what it waits for.
        self.flying: dict[Place, asyncio.Future[str]] = {}
        self.deaf: set[str] = set()

    @initialize(sets=st.integers(1, 3), slow=st.booleans(), regroup=st.booleans())
    def make(self, sets: int, slow: bool, regroup: bool) -> None:
        self.sets = sets
        self.regroup = regroup
        self.store = SlowStore() if slow else AsyncInMemoryStore()
        self.hooks = [self._hooks(index) for index in range(sets)]

    # ------------------------------------------------------------------ hooks

    def _hooks(self, index: int) -> NodeHooks:
        def hook(event: str) -> Callable[..., Awaitable[None]]:
            async def called(run_id: str, *arguments: Any) -> None:
                place: Any = run_id
                if event.startswith("on_node"):
                    place = self._place(run_id, arguments[0])
                self._saw(event, index, place, arguments)
                self.busy[place] += 1
                try:
                    await self._misbehave()
                finally:
                    self.busy[place] -= 1

            return called

        events = ("on_run_start", "on_node_start", "on_node_retry", "on_run_end", *END_OF.values())
        return NodeHooks(**{event: hook(event) for event in events})

    def _place(self, run_id: str, node_id: str) -> Place:
        run = current_node_or_none()
        if run is None or (run.run_id, run.node_id) != (run_id, node_id):
            self.wrong.append(f"called for {node_id} of {run_id} in {run!r}")
            return run_id, node_id, -1, "", ()
        attempts, outer = [run.attempt], run.parent
        while outer is not None:
            attempts.append(outer.attempt)
            outer = outer.parent
        place = run_id, node_id, run.position, run.branch, tuple(attempts)
        if run.kind == "group":
            self.groups.add(place)
        return place

    def _saw(self, event: str, index: int, place: Any, arguments: tuple[Any, ...]) -> None:
        def claim(true: bool, what: str) -> None:
            if not true:
                self.wrong.append(f"{event} of set {index} at {place}: {what}")

        claim(self.busy[place] == 0, "another hook of it runs")
        if event == "on_run_start":
            claim(self.run_starts.setdefault(place, []) == list(range(index)), "out of order")
            self.run_starts[place].append(index)
        elif event == "on_run_end":
            claim(len(self.run_starts.get(place, ())) == self.sets, "the run has not begun")
            claim(not [p for p in self._open() if p[0] == place], "a node of the run has no end yet")
            expected = [self.sets - 1 - n for n in range(len(self.run_ends.setdefault(place, [])) + 1)]
            self.run_ends[place].append(index)
            claim(self.run_ends[place] == expected, "out of order")
            self.results[place] = arguments[0]
        elif event == "on_node_start":
            claim(place not in self.ends, "has ended")
            claim(self.starts.setdefault(place, []) == list(range(index)), "out of order")
            self.starts[place].append(index)
            before = (*place[:4], (place[4][0] - 1, *place[4][1:]))
            claim(
                place[4][0] == 1 or len(self.ends.get(before, ())) == self.sets,
                "the attempt before has no end",
            )
        elif event == "on_node_retry":
            claim(len(self.ends.get(place, ())) == self.sets, "the failed attempt has no end")
        else:
            claim(len(self.starts.get(place, ())) == self.sets, "has not begun for every set")
            claim(place not in self.flying, "its function is in flight")
            expected_ends = [
                (event, self.sets - 1 - n) for n in range(len(self.ends.setdefault(place, [])) + 1)
            ]
            self.ends[place].append((event, index))
            claim(self.ends[place] == expected_ends, f"ends are {self.ends[place]}")

    async def _misbehave(self) -> None:
        antic = self.antics.popleft() if self.antics else ""
        if antic == "raise":
            raise LookupError("a hook's own")
        if antic == "stray":
            raise asyncio.CancelledError
        if antic == "suspend":
            await asyncio.sleep(0)
        if antic == "hang":
            await asyncio.Event().wait()
        if antic == "deaf":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await asyncio.Event().wait()

    def _open(self) -> list[Place]:
        return [place for place in self.starts if len(self.ends.get(place, ())) < self.sets]

    # ------------------------------------------------------------------ nodes

    def _node(self, plan: Any, name: str, timeouts: dict[str, int]) -> Any:
        kind, inner = (plan, []) if isinstance(plan, str) else plan
        if kind in ("parallel", "bound", "map"):
            outputs = [self._node(child, f"{name}{'abc'[i]}", timeouts) for i, child in enumerate(inner)]
            if kind == "map":
                return map_over("items", outputs, into="out")
            return parallel(*outputs, max_concurrency=1 if kind == "bound" else None)
        if kind == "timed":
            timeouts[name] = LIMIT_MS

        async def func(state: State) -> Any:
            run = current_node()
            place = self._place(run.run_id, name)
            if len(self.starts.get(place, ())) != self.sets or place in self.ends:
                self.wrong.append(f"the function of {place} runs outside its hooks")
            self.flying[place] = self.loop.create_future()
            try:
                if kind == "nested":
                    await self._run(f"{run.run_id}/{place[1:]}", inner)
                return await self._obey(place)
            finally:
                del self.flying[place]

        contract: NodeContract[Any, Any] = NodeContract(node_id=name, input_schema=State, output_schema=State)
        return stroma_node(name, contract)(func)

    async def _obey(self, place: Place) -> Any:
        deed = await self.flying[place]
        if deed == "deaf":  # From now on it does not listen to who cancels it.
            self.deaf.add(place[0])
            self.flying[place] = self.loop.create_future()
            try:
                deed = await self.flying[place]
            except asyncio.CancelledError:
                deed = "ok"
        if deed == "stray":
            raise asyncio.CancelledError
        if deed in ("recoverable", "terminal", "ambiguous"):
            raise Planned(FailureClass(deed.upper()))
        if deed == "broken":
            return {"n": "no number"}, 1
        return {"n": 1}, 1000 if deed == "over" else 1

    async def _run(self, run_id: str, plan: list[Any]) -> ExecutionResult:
        timeouts: dict[str, int] = {}
        nodes = [self._node(part, f"n{i}", timeouts) for i, part in enumerate(plan)]
        groups = [node._stroma_node_id for node in nodes if hasattr(node, "children")]
        config = RunConfig(
            run_id=run_id,
            hooks=self.hooks,
            hook_timeout_ms=LIMIT_MS,
            classifiers=[by_plan],
            policy_map=TWICE,
            node_policies=dict.fromkeys(groups, TWICE) if self.regroup else {},
            node_timeouts=timeouts,
            budget=ExecutionBudget(max_tokens_total=100),
        )
        runner = StromaRunner(ContractRegistry(), CheckpointManager(self.store), config)
        return await runner.run(nodes, State())

    # ------------------------------------------------------------------ what happens

    def _go(self, turns: int | None) -> None:
        self.settled = self.loop.settle() if turns is None else self.loop.settle(turns)

    def _unfinished(self) -> list[str]:
        return [name for name, task in self.tasks.items() if not task.done()]

    def _cancel(self, name: str) -> None:
        if self.tasks[name].cancel():
            self.cancelled.add(name)

    @precondition(lambda self: len(self._unfinished()) < 3)
    @rule(plan=st.lists(plans, min_size=1, max_size=2), turns=turns)
    def start_a_run(self, plan: list[Any], turns: int | None) -> None:
        self.started_count += 1
        name = f"run {self.started_count}"
        self.tasks[name] = self.loop.create_task(self._run(name, plan))
        self._go(turns)

    @precondition(lambda self: any(not gate.done() for gate in self.flying.values()))
    @rule(which=st.integers(0, 20), deed=deeds, turns=turns, then_cancel=st.booleans())
    def let_a_function_end(self, which: int, deed: str, turns: int | None, then_cancel: bool) -> None:
        waiting = sorted(place for place, gate in self.flying.items() if not gate.done())
        place = waiting[which % len(waiting)]
        self.flying[place].set_result(deed)
        self._go(turns)
        if then_cancel:
            self._cancel(place[0].partition("/")[0])
            self._go(None)

    @precondition(lambda self: self._unfinished())
    @rule(which=st.integers(0, 2), times=st.integers(1, 2), turns=turns)
    def cancel_a_run(self, which: int, times: int, turns: int | None) -> None:
        names = self._unfinished()
        for _ in range(times):
            self._cancel(names[which % len(names)])
        self._go(turns)

    @rule(script=st.lists(antics, min_size=1, max_size=6))
    def spoil_the_next_hooks(self, script: list[str]) -> None:
        self.antics.extend(script)

    @rule()
    def let_time_pass(self) -> None:
        """Hooks and functions that hang reach their limits."""
        self.loop.now += 1.1 * LIMIT_MS / 1000
        self._go(None)

    @rule()
    def let_things_settle(self) -> None:
        self._go(None)

    # ------------------------------------------------------------------ what holds

    @invariant()
    def nothing_is_out_of_order(self) -> None:
        assert self.wrong == []

    @invariant()
    def an_open_start_has_a_function_in_flight(self) -> None:
        open_ = self._open()
        assert set(self.flying) <= set(open_)
        if not self.settled:
            return
        for place in open_:
            if self.busy[place] or place in self.flying:
                continue
            # Otherwise it is a group, and something inside it is under way.
            assert place in self.groups, f"{place} has neither ended nor a function in flight"
            inside = [p for p in (*open_, *self.busy) if p[:1] == place[:1] and _is_inside(p, place)]
            assert any(p in open_ or self.busy[p] for p in inside), f"nothing is under way in {place}"

    @invariant()
    def a_cancelled_run_ends_at_once(self) -> None:
        """But for hooks within their limits, and functions that do not listen."""
        for name in self.cancelled if self.settled else ():
            held = any(_is_of(place if isinstance(place, str) else place[0], name) for place in +self.busy)
            assert held or self._is_deaf(name) or self.tasks[name].done(), (
                f"{name} was cancelled, and goes on"
            )

    def _is_deaf(self, name: str) -> bool:
        return any(_is_of(run, name) for run in self.deaf)

    def teardown(self) -> None:
        try:
            for _ in range(300):
                if not self._unfinished():
                    break
                self.antics.clear()
                for gate in self.flying.values():
                    if not gate.done():
                        gate.set_result("ok")
                self.let_time_pass()
                self.nothing_is_out_of_order()
                self.an_open_start_has_a_function_in_flight()
                self.a_cancelled_run_ends_at_once()
            self._check_the_end()
        finally:
            for _ in range(20):  # After a failure: leave nothing behind for the next example.
                for task in asyncio.all_tasks(self.loop):
                    task.cancel()
                self.loop.now += LIMIT_MS
                self.loop.settle()
            self.loop.close()

    def _check_the_end(self) -> None:
        assert self._unfinished() == []
        assert asyncio.all_tasks(self.loop) == set()
        assert self.wrong == []
        assert self._open() == []
        assert self.flying == {}
        assert +self.busy == Counter()
        for name, task in self.tasks.items():
            if name in self.cancelled and not self._is_deaf(name):
                assert task.cancelled(), f"{name} was cancelled, and ended otherwise"
            if not task.cancelled():
                task.result()
            else:
                assert name in self.cancelled, f"nobody cancelled {name}"
                if name not in self.run_starts:
                    continue  # It was cancelled before it began.
            assert name in self.results
        everyone = list(range(self.sets))
        assert all(sets == everyone for sets in self.run_starts.values())
        assert self.run_starts.keys() == self.run_ends.keys()
        assert all(sets == everyone[::-1] for sets in self.run_ends.values())
        for run_id, result in self.results.items():
            # One event for each attempt, with the outcome that the hooks were told.
            events = Counter(
                (node_id, position, branch, attempts[0], ends[0][0])
                for (run, node_id, position, branch, attempts), ends in self.ends.items()
                if run == run_id
            )
            traced = Counter(
                (event.node_id, event.position, event.branch, event.attempt, END_OF[event.outcome])
                for event in result.trace.walk()
            )
            assert traced == events


def _is_of(run_id: str, name: str) -> bool:
    """Whether a run is the one of that name, or runs inside it."""
    return run_id == name or run_id.startswith(f"{name}/")


def _is_inside(place: Any, group: Place) -> bool:
    """Whether a place is one of a group's own in the present attempt of the group."""
    if not isinstance(place, tuple) or place[2] != group[2] or place[3] == group[3]:
        return False
    depth = len(group[4])
    return place[4][-depth:] == group[4] and (not group[3] or place[3].startswith(f"{group[3]}."))


TestHookMachine = HookMachine.TestCase
TestHookMachine.settings = examples(300, stateful_step_count=30)
