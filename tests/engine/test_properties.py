"""Properties of the core, each against a model of its own that shares no code with it."""

import asyncio
import copy
import datetime as dt
import itertools
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, create_model
from tests.contracts import test_schemas
from tests.contracts.values import anything, same, texts
from tests.fixtures import store_fixture
from tests.kit import ONCE, Num, bare, node, noting, words
from tests.shared_stores import LOCAL
from tests.tiers import examples

from stroma import (
    KNOWN_MODELS,
    AsyncInMemoryStore,
    CheckpointManager,
    ExecutionBudget,
    ExecutionTrace,
    FailureClass,
    FailurePolicy,
    NodeHooks,
    RunStatus,
    StromaRunner,
    TraceEvent,
    current_node,
    current_node_or_none,
    map_over,
    parallel,
)
from stroma.hooks.sets import EVENTS

R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


class Planned(Exception):
    """A failure of a given class; with a wait, as an HTTP client would tell that the server asks for one."""

    def __init__(self, kind: FailureClass, wait: float | None = None) -> None:
        super().__init__(f"planned {kind}")
        self.kind = kind
        if wait is not None:
            self.status_code = 429
            self.response = type("Response", (), {"headers": {"retry-after": str(wait)}})


def by_plan(error: Exception, _: Any) -> FailureClass | None:
    return error.kind if isinstance(error, Planned) else None


# ---------------------------------------------------------------------- retries

policies = st.builds(
    FailurePolicy,
    max_retries=st.integers(0, 4),
    backoff_seconds=st.sampled_from([0.0, 0.5, 1.0, 7.0]),
    multiplier=st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e200]),
    max_backoff_seconds=st.sampled_from([0.0, 3.0, 60.0]),
    jitter=st.booleans(),
    max_retry_after_seconds=st.sampled_from([0.0, 10.0, 120.0]),
)
maps = st.dictionaries(st.sampled_from([R, A, T]), policies, max_size=3)
outcomes = st.one_of(
    st.tuples(st.sampled_from([R, A, R, A, T]), st.sampled_from([None, None, 0.0, 2.0, 30.0, 100.0])),
    st.just(("violation", None)),
)
DEFAULTS = {R: (3, 1.0), A: (1, 0.5), T: (0, 0.0)}


@dataclass
class Expected:
    """What the rules of retrying say, computed by nothing but arithmetic."""

    classes: list[FailureClass | None] = field(default_factory=list)
    delays: list[tuple[float, float]] = field(default_factory=list)
    status: RunStatus = RunStatus.COMPLETED


def foretell(plan: list[Any], own: Any, shared: Any, granted: int) -> Expected:
    message = Expected()
    mended = 0
    for calls, (kind, wait) in enumerate(plan, start=1):
        if kind is None:
            message.classes.append(None)
            return message
        mending = kind == "violation" and mended < granted
        kind = (R if mending else T) if kind == "violation" else kind
        message.classes.append(kind)
        if kind is T:
            message.status = RunStatus.FAILED
            return message
        policy = own.get(kind) or shared.get(kind)
        retries, base, times, most, jitter, patience = (
            (*DEFAULTS[kind], 1.0, 60.0, True, 120.0)
            if policy is None
            else (
                policy.max_retries,
                policy.backoff_seconds,
                policy.multiplier,
                policy.max_backoff_seconds,
                policy.jitter,
                policy.max_retry_after_seconds,
            )
        )
        if mending:
            mended += 1
            message.delays.append((0.0, 0.0))
            continue
        before = calls - 1 - mended
        message.status = RunStatus.PARTIAL
        if before >= retries:
            return message
        if wait is not None and wait > patience:
            return message
        growth = math.inf if times > 1e100 and before > 1 else times**before
        top = 0.0 if base == 0 else min(base * growth, most)
        low = 0.0 if jitter else top
        message.delays.append((max(low, wait or 0.0), max(top, wait or 0.0)))
        message.status = RunStatus.COMPLETED
    raise AssertionError("a plan ends with success")


@pytest.mark.core
@examples(250)
@given(plan=st.lists(outcomes, max_size=7), own=maps, shared=maps, granted=st.integers(0, 3))
def test_retry_arithmetic(plan: list[Any], own: Any, shared: Any, granted: int) -> None:
    """G3: Calls, classes, delays and the status follow from the outcomes and the policies by arithmetic."""
    plan = [*plan, (None, None)]
    message = foretell(plan, own, shared, granted)
    left = iter(plan)
    attempts: list[int] = []
    slept: list[float] = []
    reports: list[tuple[int, float]] = []

    async def func(state: Num) -> Any:
        attempts.append(current_node().attempt)
        kind, wait = next(left)
        if kind == "violation":
            return {"n": "bad"}
        if kind is not None:
            raise Planned(kind, wait)
        return {"n": 1}

    on_retry = noting(reports, lambda run_id, node_id, attempt, delay, kind: (attempt, delay))

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    runner = StromaRunner.quick(
        policy_map=shared,
        node_policies={"a": own},
        classifiers=[by_plan],
        contract_retries={"a": granted},
        hooks=NodeHooks(on_node_retry=on_retry),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stroma.engine.loop.sleep", sleep)
        result = runner.run_sync([node("a", func)], Num())
    assert [event.failure for event in result.trace] == message.classes
    assert attempts == [event.attempt for event in result.trace] == list(range(1, len(message.classes) + 1))
    assert len(slept) == len(message.delays)
    for delay, (low, high) in zip(slept, message.delays, strict=True):
        assert low <= delay <= high
    assert reports == list(zip(range(2, len(slept) + 2), slept, strict=True))
    assert result.status is message.status


# ---------------------------------------------------------------------- budgets

#: One attempt: input tokens, output tokens, and how it ends.
tries = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from(["ok", "ok", "fail", "bad"])),
    min_size=1,
    max_size=3,
)
trees = st.recursive(
    tries,
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.sampled_from(["parallel", "items"])),
    max_leaves=6,
)
#: How the ids of groups begin.
GROUPS = ("parallel(", "map_over(", "[")
#: Dollars per token, in millionths, of the model that every attempt names.
PRICE_IN, PRICE_OUT = 1, 3


@pytest.fixture(autouse=True)
def _price() -> Iterator[None]:
    KNOWN_MODELS["planned-model"] = (float(PRICE_IN), float(PRICE_OUT))
    yield
    del KNOWN_MODELS["planned-model"]


@dataclass
class Bill:
    """Who is called, and what it comes to, if one node runs after the other."""

    tokens_limit: int | None
    cost_limit: int | None  # millionths
    retries: int
    tokens: int = 0
    cost: int = 0
    calls: list[str] = field(default_factory=list)
    committed: list[str] = field(default_factory=list)
    sums: list[tuple[int, int]] = field(default_factory=list)

    def over(self) -> bool:
        return (self.tokens_limit is not None and self.tokens > self.tokens_limit) or (
            self.cost_limit is not None and self.cost > self.cost_limit
        )

    def run(self, tree: Any, name: str) -> str:
        """ "ok", or why the run stops here: "budget" or "gave up"."""
        if self.over():
            return "budget"
        if isinstance(tree, tuple):
            for i, child in enumerate(tree[0]):
                ended = self.run(child, f"{name}.{i}")
                if ended != "ok":
                    return ended
            return "ok"
        for used, (request, instance, ending) in enumerate([*tree, (0, 0, "ok")]):
            if self.over():
                return "budget"
            self.calls.append(name)
            self.tokens += request + instance
            self.cost += request * PRICE_IN + instance * PRICE_OUT
            self.sums.append((self.tokens, self.cost))
            if ending == "ok":
                self.committed.append(name)
                return "budget" if self.over() else "ok"
            if ending == "bad":
                return "terminal"
            if used >= self.retries:
                return "budget" if self.over() else "gave up"
        raise AssertionError


def build(tree: Any, name: str, calls: list[Any], width: int | None, pauses: Any = lambda: 0) -> Any:
    """Nodes for a tree; each call is noted in ``calls`` as it begins and, with what it spent, as it ends."""
    if isinstance(tree, tuple):
        children = [build(child, f"{name}.{i}", calls, width, pauses) for i, child in enumerate(tree[0])]
        if tree[1] == "items":  # One item, which goes through them in turn.
            return map_over(lambda state: [{"n": 0}], children, into="out")
        return parallel(*children, max_concurrency=width)
    left = iter([*tree, (0, 0, "ok")])

    async def func(state: Num) -> Any:
        given, instance, ending = next(left)
        calls.append((name, None))
        for _ in range(pauses()):
            await asyncio.sleep(0)
        calls.append((name, (given, instance)))
        if ending == "fail":
            current_node().report_usage(input_tokens=given, output_tokens=instance, model="planned-model")
            raise Planned(R)
        return ({"n": "bad"} if ending == "bad" else {"n": 1}), given, instance, "planned-model"

    return node(name, func)


limits = st.one_of(st.none(), st.integers(0, 250))


@examples(150)
@given(
    plan=st.lists(trees, max_size=4),
    tokens=limits,
    cost=limits,
    retries=st.integers(0, 3),
    exact=st.none() | st.integers(0, 9),
)
def test_budgets_of_one_node_after_the_other(
    plan: list[Any], tokens: int | None, cost: int | None, retries: int, exact: int | None
) -> None:
    """Totals, calls and status are those of the sum, nothing follows a crossed limit; a resume continues."""
    if exact is not None:  # Limits that are met exactly: what it comes to after some call.
        free = Bill(None, None, retries)
        for i, tree in enumerate(plan):
            if free.run(tree, f"n{i}") != "ok":
                break
        if free.sums:
            tokens, cost = free.sums[exact % len(free.sums)]
    bill = Bill(tokens, cost, retries)
    ended = "ok"
    for i, tree in enumerate(plan):
        ended = bill.run(tree, f"n{i}")
        if ended != "ok":
            break
    calls: list[Any] = []
    nodes = [build(tree, f"n{i}", calls, 1) for i, tree in enumerate(plan)]
    store = AsyncInMemoryStore()
    policy = {R: FailurePolicy(max_retries=retries, backoff_seconds=0)}

    def go(budget: ExecutionBudget) -> Any:
        runner = StromaRunner.quick(
            store=store, run_id="r", resume=True, policy_map=policy, classifiers=[by_plan], budget=budget
        )
        return runner.run_sync(nodes, Num())

    result = go(
        ExecutionBudget(max_tokens_total=tokens, max_cost_usd=None if cost is None else cost / 1_000_000)
    )
    assert [name for name, used in calls if used is None] == bill.calls
    assert result.total_tokens == bill.tokens
    assert result.total_cost_usd == pytest.approx(bill.cost / 1_000_000, abs=1e-12)
    expected = {"ok": RunStatus.COMPLETED, "terminal": RunStatus.FAILED}.get(ended, RunStatus.PARTIAL)
    # A failure that takes the run over its limit is still that failure; it is the budget that forbids another
    # call.
    assert result.status is expected, (ended, result.failure)
    events = [event for event in result.trace.walk() if not event.node_id.startswith(GROUPS)]
    assert Counter(event.node_id for event in events) == Counter(bill.calls)
    assert sum(event.usage.tokens for event in events) == bill.tokens

    before = len(calls)
    again = go(ExecutionBudget())
    later = [name for name, used in calls[before:] if used is None]
    assert not set(later) & set(bill.committed)
    spent = sum(sum(used) for _, used in calls[before:] if used is not None)
    assert again.total_tokens == spent
    if again.status is RunStatus.RESUMED:
        leaves = [event.node_id for event in again.trace.walk() if not event.children]
        assert set(leaves) | set(bill.committed) >= {
            name for i, tree in enumerate(plan) for name in _names(tree, f"n{i}")
        }


def _names(tree: Any, name: str) -> list[str]:
    if isinstance(tree, tuple):
        return [leaf for i, child in enumerate(tree[0]) for leaf in _names(child, f"{name}.{i}")]
    return [name]


@examples(100)
@given(
    plan=st.lists(trees, max_size=3),
    tokens=st.integers(0, 250),
    width=st.sampled_from([None, None, 2]),
    pauses=st.lists(st.integers(0, 3), min_size=1, max_size=10),
)
def test_budgets_with_children_side_by_side(
    plan: list[Any], tokens: int, width: int | None, pauses: list[int]
) -> None:
    """Whatever the interleaving: no call begins once the ended ones are over the limit; all are billed."""
    calls: list[Any] = []
    suspend = itertools.cycle(pauses)
    nodes = [build(tree, f"n{i}", calls, width, lambda: next(suspend)) for i, tree in enumerate(plan)]
    result = StromaRunner.quick(
        policy_map={R: FailurePolicy(max_retries=1, backoff_seconds=0)},
        classifiers=[by_plan],
        budget=ExecutionBudget(max_tokens_total=tokens),
    ).run_sync(nodes, Num())
    spent = 0
    for _, used in calls:
        if used is None:
            assert spent <= tokens
        else:
            spent += sum(used)
    assert result.total_tokens == spent
    if spent > tokens:
        assert result.status is not RunStatus.COMPLETED
    else:
        assert result.failure is None or result.failure.reason != "budget"
    events = [event for event in result.trace.walk() if not event.node_id.startswith(GROUPS)]
    assert Counter(event.node_id for event in events) == Counter(name for name, used in calls if used is None)


# ---------------------------------------------------------------------- merging

values: st.SearchStrategy[Any] = (
    st.integers() | st.text(max_size=3) | st.none() | st.lists(st.integers(), max_size=2)
)
outputs = st.tuples(
    st.dictionaries(st.sampled_from("abcde"), values, max_size=4), st.booleans(), st.integers(0, 3)
)
groups = st.recursive(
    outputs, lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda c: [c]), max_leaves=6
)


def _merged(tree: Any) -> dict[str, Any]:
    if isinstance(tree, tuple):
        return dict(tree[0])
    out: dict[str, Any] = {}
    for child in tree[0]:
        out.update(_merged(child))
    return out


def _grow(tree: Any, name: str, width: int | None) -> Any:
    if not isinstance(tree, tuple):
        children = [_grow(child, f"{name}.{i}", width) for i, child in enumerate(tree[0])]
        return parallel(*children, max_concurrency=width)
    output, typed, pause = tree

    async def func(state: Num) -> Any:
        for _ in range(pause):
            await asyncio.sleep(0)
        return output

    if not typed:
        return bare(name, func)
    fields: dict[str, Any] = {key: (type(value), ...) for key, value in output.items()}
    return node(name, func, Num, create_model("Out", **fields))


@pytest.mark.core
@examples(120)
@given(tree=groups, width=st.sampled_from([None, 1, 2]))
def test_outputs_merge_in_argument_order(tree: Any, width: int | None) -> None:
    """Outputs merge like dict.update in argument order, however typed and nested, whenever they end."""
    assume(not isinstance(tree, tuple))
    group = _grow(tree, "g", width)
    result = StromaRunner.quick().run_sync([group], Num())
    assert result.failure is None, result.failure
    (event,) = result.trace
    assert event.output_state == _merged(tree)
    assert asyncio.run(_by_hand(group)) == _merged(tree)


async def _by_hand(group: Any) -> Any:
    return await group(Num())


# ---------------------------------------------------------------------- diff

WHEN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
plain: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([0.0, -0.0, 1.0, 0.5, math.nan, math.inf, -math.inf])
    | st.text(max_size=3)
    | st.sampled_from(["nan", "1", "inf"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
states = st.dictionaries(st.sampled_from(["a", "b"]), plain, max_size=2)


def _event(
    node_id: str,
    attempt: int,
    given: Any,
    instance: Any,
    failure: FailureClass | None,
    message: str | None,
    children: Any,
) -> TraceEvent:
    return TraceEvent(
        node_id=node_id,
        run_id="r",
        attempt=attempt,
        timestamp_utc=WHEN,
        input_state=given,
        output_state=instance,
        duration_ms=1,
        failure=failure,
        failure_message=message,
        children=[replace(child, branch=str(i)) for i, child in enumerate(children)],
    )


def events(children: st.SearchStrategy[Any]) -> st.SearchStrategy[TraceEvent]:
    return st.builds(
        _event,
        st.sampled_from(["a", "b", "c"]),
        st.integers(1, 2),
        states,
        st.none() | states,
        st.none() | st.sampled_from([R, A, T]),
        st.none() | st.text(max_size=3),
        children,
    )


histories = st.lists(
    events(
        st.just([]) | st.lists(events(st.just([]) | st.lists(events(st.just([])), max_size=2)), max_size=2)
    ),
    max_size=4,
)


def _trace(history: list[TraceEvent], run_id: str = "r") -> ExecutionTrace:
    trace = ExecutionTrace(run_id)
    for event in copy.deepcopy(history):
        trace.append(event)
    return trace


def _differ(a: ExecutionTrace, b: ExecutionTrace) -> list[str]:
    """What diff says, checked to be the same from either side but for who lacks what."""
    there, back = a.diff(b), b.diff(a)
    swap = {"Missing event": "Extra event", "Extra event": "Missing event"}
    kinds = Counter(" ".join(line.split()[:2]) for line in there)
    assert kinds == Counter(swap.get(kind, kind) for kind in (" ".join(line.split()[:2]) for line in back))
    return there


def _elsewhere(event: TraceEvent) -> TraceEvent:
    return replace(
        event,
        run_id="another",
        timestamp_utc=WHEN + dt.timedelta(days=1),
        duration_ms=9,
        children=[_elsewhere(child) for child in reversed(event.children)],
    )


@examples(80)
@given(histories)
def test_a_trace_equals_itself(history: list[TraceEvent]) -> None:
    """A trace differs neither from itself nor the same history of another run at another time and pace."""
    assert _differ(_trace(history), _trace(history)) == []
    assert _differ(_trace(history), _trace([_elsewhere(event) for event in history], "another")) == []


def _literal(value: Any) -> str:
    """Text that tells any two values of our strategies apart."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k!r}:{_literal(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_literal, value)) + "]"
    return f"{type(value).__name__}:{value!r}"


changes = st.one_of(
    st.tuples(st.just("input_state"), states),
    st.tuples(st.just("output_state"), st.none() | states),
    st.tuples(st.just("failure"), st.none() | st.sampled_from([R, A, T])),
    st.tuples(st.just("failure_message"), st.none() | st.text(max_size=3)),
    st.tuples(st.just("outcome"), st.sampled_from(["success", "failure", "cancelled", "suspended"])),
)


@examples(300)
@given(history=histories, change=changes, where=st.integers(0, 30))
def test_any_single_change_of_an_event_is_one_line(
    history: list[TraceEvent], change: tuple[str, Any], where: int
) -> None:
    """One changed state, class, message or outcome, at any depth, is told once, under its top-level event."""
    assume(history)
    changed = _trace(history)
    spots = list(changed.walk())
    event = spots[where % len(spots)]
    what, value = change
    assume(_literal(getattr(event, what)) != _literal(value))
    setattr(event, what, value)
    top = next(e for e in changed if event is e or any(event is c for c in _below(e)))
    (line,) = _differ(_trace(history), changed)
    assert line.startswith(f"Difference for {top.node_id} attempt {top.attempt}")
    if event is top:
        assert what in line


def _below(event: TraceEvent) -> Iterator[TraceEvent]:
    for child in event.children:
        yield child
        yield from _below(child)


@examples(100)
@given(history=histories, new=events(st.just([])), where=st.integers(0, 4))
def test_an_event_more_or_less_is_one_line(history: list[TraceEvent], new: TraceEvent, where: int) -> None:
    """An event that only one trace has is told once, as missing or extra, with its place among repeats."""
    where = min(where, len(history))
    assume(all((e.node_id, e.attempt) != (new.node_id, new.attempt) for e in history[where:]))
    longer = [*history[:where], new, *history[where:]]
    (line,) = _differ(_trace(history), _trace(longer))
    repeats = sum((e.node_id, e.attempt) == (new.node_id, new.attempt) for e in longer)
    assert line.startswith(f"Extra event in other trace: {new.node_id} attempt {new.attempt}")
    assert line.endswith(f"(occurrence {repeats})") == (repeats > 1)


# ---------------------------------------------------------------------- hooks


@examples(100)
@given(history=histories, where=st.integers(0, 4))
def test_a_changed_order_is_one_line(history: list[TraceEvent], where: int) -> None:
    """Two neighbours that changed places are told once, as a difference of order."""
    assume(where + 1 < len(history))
    a, b = history[where : where + 2]
    assume((a.node_id, a.attempt) != (b.node_id, b.attempt))
    swapped = [*history[:where], b, a, *history[where + 2 :]]
    (line,) = _differ(_trace(history), _trace(swapped))
    assert line.startswith("Difference for order")


STARTS, ENDS = ("on_node_start",), ("on_node_success", "on_node_failure", "on_node_cancelled")
#: What one call of a node does: how it ends, how often it suspends before.
deeds = st.tuples(
    st.sampled_from(["ok", "ok", "ok", "fail", "terminal", "violate", "stray", "nested", "thread"]),
    st.integers(0, 2),
)
plans = st.recursive(
    st.lists(deeds, min_size=1, max_size=3),
    lambda inner: st.tuples(
        st.lists(inner, min_size=1, max_size=3), st.sampled_from(["parallel", "bound", "map"])
    ),
    max_leaves=5,
)
#: What one call of a hook does.
antics = st.sampled_from(["", "", "", "suspend", "suspend", "raise", "odd", "stray", "hang"])


class Odd(BaseException):
    """No Exception, and no request to stop either."""


@dataclass
class Watch:
    """Several sets of hooks that misbehave by a script, and the log of what every one of them saw."""

    sets: int
    script: list[str]
    log: list[tuple[str, int, Any]] = field(default_factory=list)
    busy: Counter[Any] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    calls: int = 0

    def hooks(self) -> list[NodeHooks]:
        return [
            NodeHooks(**{event: self._hook(event, index) for event in EVENTS}) for index in range(self.sets)
        ]

    def _hook(self, event: str, index: int) -> Callable[..., Awaitable[None]]:
        async def hook(run_id: str, *arguments: Any) -> None:
            run = current_node_or_none()
            # The maps of a run report side by side.
            place: Any = f"{run_id} {arguments[0]}" if event == "on_map_progress" else run_id
            attempt = 0
            if event.startswith("on_node"):
                if run is None or (run.run_id, run.node_id) != (run_id, arguments[0]):
                    self.wrong.append(f"{event} of {arguments[0]} was called in {run!r}")
                    return
                place, attempt = (run.run_id, run.position, run.branch), run.attempt
            self.log.append((event, index, (place, attempt)))
            if self.busy[place]:
                self.wrong.append(f"two hooks at once of {place}")
            self.busy[place] += 1
            try:
                await self._misbehave()
            finally:
                self.busy[place] -= 1

        return hook

    async def _misbehave(self) -> None:
        antic = self.script[self.calls % len(self.script)]
        self.calls += 1
        if antic == "suspend":
            await asyncio.sleep(0)
        elif antic == "raise":
            raise LookupError("a hook's own")
        elif antic == "odd":
            raise Odd
        elif antic == "stray":
            raise asyncio.CancelledError
        elif antic == "hang":
            await asyncio.Event().wait()

    def check(self) -> None:
        """Starts first to last, ends last to first, each start one end, calls one after the other."""
        assert self.wrong == []
        by_place: dict[Any, list[tuple[str, int, int]]] = {}
        for event, index, (place, attempt) in self.log:
            by_place.setdefault(place, []).append((event, index, attempt))
        order, reverse = list(range(self.sets)), list(range(self.sets))[::-1]
        for place, seen in by_place.items():
            rounds = [
                (event, attempt, [i for _, i, _ in calls])
                for (event, attempt), calls in (
                    (key, list(group)) for key, group in itertools.groupby(seen, key=lambda c: (c[0], c[2]))
                )
            ]
            open_ = False
            for event, _, indexes in rounds:
                if event in ("on_budget_warning", "on_map_progress"):  # Of the run, and repeated.
                    assert indexes == order * (len(indexes) // self.sets)
                    continue
                assert indexes == (reverse if event in (*ENDS, "on_run_end") else order), (place, rounds)
                if event in ("on_run_start", *STARTS):
                    assert not open_
                    open_ = True
                elif event in (*ENDS, "on_run_end"):
                    assert open_ or event == "on_run_end"
                    open_ = False
                elif event == "on_node_retry":
                    assert not open_
            assert not open_, (place, rounds)
        self._check_nesting()

    def _check_nesting(self) -> None:
        """What stands inside a group, or inside a run, begins after its start and ends before its end."""
        open_: set[Any] = set()
        for event, index, (place, _) in self.log:
            if index != 0 or event in ("on_budget_warning", "on_node_retry"):
                continue
            if isinstance(place, str):
                if event == "on_run_end":
                    assert not any(run == place for run, _, _ in open_)
                continue
            run, position, branch = place
            if event in STARTS:
                outer = branch.rpartition(".")[0] if "." in branch else ""
                assert not branch or (run, position, outer) in open_, self.log
                open_.add(place)
            else:
                below = [p for p in open_ if p[:2] == place[:2] and p != place and _is_below(p[2], branch)]
                assert below == [], (event, place, self.log)
                open_.discard(place)
        assert open_ == set()


def _is_below(branch: str, of: str) -> bool:
    return branch != of and (not of or branch.startswith(f"{of}."))


class Items(BaseModel):
    n: int = 0
    items: list[dict[str, int]] = [{"n": 1}, {"n": 2}]


def _act(plan: Any, name: str, runner: Any, tally: Counter[str]) -> Any:
    if isinstance(plan, tuple):
        children, kind = plan
        created_items = [_act(child, f"{name}{'abc'[i]}", runner, tally) for i, child in enumerate(children)]
        if kind == "map" and not any(isinstance(child, tuple) for child in children):
            return map_over("items", created_items, into="out")
        return parallel(*created_items, max_concurrency=1 if kind == "bound" else None)
    left = iter(plan)

    async def func(state: Any) -> Any:
        tally["called"] += 1
        deed, pauses = next(left, ("ok", 0))
        for _ in range(pauses):
            await asyncio.sleep(0)
        if deed == "fail":
            raise Planned(R)
        if deed == "terminal":
            raise Planned(T)
        if deed == "violate":
            return {"n": "bad"}, 1
        if deed == "stray":
            raise asyncio.CancelledError
        if deed == "nested":
            inner = _act([("fail", 1), ("ok", 0)], f"{name}~", runner, tally)
            await runner.run([inner], Items(), run_id=f"nested {name} {tally['called']}")
        if deed == "thread":
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)
        return {"n": 1}, 3

    return node(name, func, Items, Items)


@examples(300)
@given(
    plan=st.lists(plans, min_size=1, max_size=3),
    script=st.lists(antics, min_size=1, max_size=12),
    sets=st.integers(1, 3),
    cancel_after=st.none() | st.integers(0, 60),
    again=st.booleans(),
    regroup=st.booleans(),
)
def test_hooks_are_ordered_nested_and_paired(
    plan: list[Any], script: list[str], sets: int, cancel_after: int | None, again: bool, regroup: bool
) -> None:
    """G9: Every start has one end under failures, timeouts, cancellations, retries and raising hooks."""
    watch = Watch(sets, script)
    tally: Counter[str] = Counter()
    runner = StromaRunner.quick(
        hooks=watch.hooks(),
        hook_timeout_ms=1,
        classifiers=[by_plan],
        policy_map=ONCE,
        budget=ExecutionBudget(max_tokens_total=20),
    )

    async def go() -> None:
        nodes = [_act(p, f"n{i}", runner, tally) for i, p in enumerate(plan)]
        if regroup:  # Groups are tried again, too.
            runner.with_node_policies({n._stroma_node_id: ONCE for n in nodes if hasattr(n, "children")})
        task = asyncio.create_task(runner.run(nodes, Items(), run_id="outer"))
        if cancel_after is not None:
            for _ in range(cancel_after):
                await asyncio.sleep(0)
            task.cancel()
            if again:
                await asyncio.sleep(0)
                task.cancel()
        try:
            result = await task
        except asyncio.CancelledError:
            assert cancel_after is not None
        else:
            ran = Counter((e.position, e.branch, e.attempt) for e in result.trace.walk())
            saw = Counter(
                (p[1], p[2], n) for e, i, (p, n) in watch.log if e in STARTS and i == 0 and p[0] == "outer"
            )
            assert ran == saw
            tops = Counter((e.node_id, e.position, e.attempt) for e in result.trace)
            assert all(n == 1 for n in tops.values())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())
    watch.check()
    starts = sum(event == "on_node_start" for event, _, _ in watch.log)
    assert starts >= tally["called"] * sets


# ---------------------------------------------------------------------- stores


models = test_schemas.trees | anything.map(lambda value: test_schemas.Loose(value=value))
store = store_fixture(*LOCAL, "sqlite")


_fresh = itertools.count()


@examples(60)
@given(state=models, under=texts)
async def test_states_come_back_from_every_store(store: Any, state: BaseModel, under: str) -> None:
    """What a store gives back equals what it was given by hand, as a run's input, as a node's output."""
    kind = type(state)
    run_id = f"{next(_fresh)} {under.replace(chr(0), '')}"
    manager = CheckpointManager(store)
    await manager.checkpoint(run_id, "by hand", state)
    assert same(await manager.resume(run_id, "by hand", kind), state)
    pristine = copy.deepcopy(state)
    calls: list[str] = []

    def first(given: Any) -> Any:
        async def func(state: Any) -> Any:
            calls.append("first")
            assert same(state, pristine)
            return state

        return node("first", func, kind, kind)

    async def second(state: Any) -> Any:
        calls.append("second")
        assert same(state, pristine)
        if len(calls) == 2:
            raise Planned(T)
        return state

    nodes = [first(state), node("second", second, kind, kind)]
    runner = StromaRunner.quick(store=store, resume=True, classifiers=[by_plan])
    assert (await runner.run(nodes, state, run_id=run_id)).status is RunStatus.FAILED
    result = await runner.run(nodes, state, run_id=run_id)
    assert result.failure is None, result.failure
    assert result.status is RunStatus.RESUMED
    assert calls == ["first", "second", "second"]
    assert same(result.final_state, pristine)
    assert same(await manager.resume(run_id, "first", kind), pristine)
    (event,) = result.trace
    assert same(kind.model_validate(event.output_state, by_alias=True, by_name=True), pristine)


nasty = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    | st.sampled_from(list(":/\\*%_?#[]{}|'\";,. \n\r\t-aA")),
    min_size=1,
    max_size=5,
) | st.sampled_from([" a", "a ", "x" * 3000, *words("a:b a b a: :b é é A a% a_ .. 🙂 -1 0")])


@examples(25)
@given(pairs=st.lists(st.tuples(nasty, nasty), min_size=2, max_size=8, unique=True))
async def test_pairs_of_ids_never_collide(store: Any, pairs: list[tuple[str, str]]) -> None:
    """Ids of any characters: one (run, node) pair never finds or deletes another's state."""
    manager = CheckpointManager(store)
    for run_id, _ in pairs:
        await manager.clear(run_id)
    for i, (run_id, node_id) in enumerate(pairs):
        await manager.checkpoint(run_id, node_id, Num(n=i))
    for i, (run_id, node_id) in enumerate(pairs):
        assert await manager.resume(run_id, node_id, Num) == Num(n=i)
    gone = pairs[0][0]
    await manager.clear(gone)
    for i, (run_id, node_id) in enumerate(pairs):
        assert await manager.resume(run_id, node_id, Num) == (None if run_id == gone else Num(n=i))
    for run_id, _ in pairs:
        await manager.clear(run_id)


@examples(15)
@given(
    run_ids=st.lists(nasty, min_size=2, max_size=4, unique=True),
    node_ids=st.lists(nasty, min_size=2, max_size=4),
)
async def test_runs_with_any_ids_are_kept_apart(store: Any, run_ids: list[str], node_ids: list[str]) -> None:
    """Runs and nodes of any names, at once: each run has its own outputs, and resumes on those."""

    def step(node_id: str) -> Any:
        async def func(state: Num) -> Any:
            await asyncio.sleep(0)
            return {"n": state.n + 1}

        return node(node_id, func)

    nodes = [step(node_id) for node_id in node_ids]
    for run_id in run_ids:
        await CheckpointManager(store).clear(run_id)
    runner = StromaRunner.quick(store=store)
    for resume, status in ((False, RunStatus.COMPLETED), (True, RunStatus.RESUMED)):
        results = await asyncio.gather(
            *[runner.run(nodes, Num(n=100 * i), run_id=r, resume=resume) for i, r in enumerate(run_ids)]
        )
        for i, (run_id, result) in enumerate(zip(run_ids, results, strict=True)):
            assert (result.run_id, result.status) == (run_id, status), result.failure
            assert result.final_state == Num(n=100 * i + len(nodes))
    for i, run_id in enumerate(run_ids):
        last = max(k for k, node_id in enumerate(node_ids) if node_id == node_ids[0])
        match = await CheckpointManager(store).resume(run_id, node_ids[0], Num)
        assert match == Num(n=100 * i + last + 1)
