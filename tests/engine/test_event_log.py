"""What a run tells of its attempts, whole: each line is a promise to whoever watches, resumes or pays for it.

The lines of each scenario stand in ``event_log.txt``. They are the same in a bare run and in one with
settings that concern none of its nodes: a time limit and policies of another node, limits that are far away,
hooks that are delivered at least once, probes that leave all as it is.

usage: python -m tests.engine.test_event_log   writes the file anew, of what the scenarios come to; see what
    has changed, and why
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, field_validator
from tests.engine.event_log import Between, Diary, Journal
from tests.kit import ONCE, Many, Num, computing, here, node, returning, stuck

from stroma import (
    KNOWN_MODELS,
    AsyncInMemoryStore,
    Breaker,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    Limit,
    NodeHooks,
    SharedBudget,
    StoreError,
    Suspend,
    map_over,
    parallel,
)
from stroma.contracts import NotSerialisable
from stroma.engine.context import INTERCEPTORS, Interceptor

#: The same objects for all: runs share a limit by its name.
LIMITS = {"told": Limit(concurrent=5)}
FAR = Limit(concurrent=100)


class Positive(BaseModel):
    n: int

    @field_validator("n")
    @classmethod
    def positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("too small")
        return value


class M(BaseModel):
    m: int = 0


class Both(BaseModel):
    n: int
    m: int


class Late(BaseModel):
    value: Unknown  # noqa: F821


def stopping(error: BaseException) -> type[BaseModel]:
    """Return a model whose validator raises this."""

    class Stops(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def stop(cls, value: int) -> int:
            raise error

    return Stops


def marked(node_id: str, func: Any) -> Any:
    """A node without a contract."""
    func._stroma_node_id = node_id
    return func


def giving(node_id: str, *outcomes: Any, tokens: int = 0, **schemas: Any) -> Any:
    """Returns or raises these, one for each call, the last one from then on; reports its tokens before."""
    left = list(outcomes)

    async def func(state: Any) -> Any:
        if tokens:
            here()
            here().report_usage(input_tokens=tokens)
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return node(node_id, func, **schemas)


def full() -> StoreError:
    """What a store says that is not asked again."""
    error = StoreError("full")
    error.transient = False
    return error


def refusing(error: BaseException) -> Any:
    """Sessions that keep no output."""

    def between(session: Any) -> Any:
        def record(row: Any, schema: Any, output: Any, *call: Any) -> Any:
            if output is not None:
                raise error
            return session.record(row, schema, output, *call)

        return Between(session, record=record)

    return between


def raising(error: BaseException) -> Any:
    def func(*_: Any) -> Any:
        raise error

    return func


def not_async(*_: Any) -> Any:
    """Return nothing that can be awaited."""
    return len(_)


SCENARIOS: dict[str, Callable[[Diary], Coroutine[Any, Any, None]]] = {}
TOLD = Path(__file__).with_name("event_log.txt")


def scenario(func: Any) -> Any:
    """What is noted of it stands in ``event_log.txt``, under its name."""
    SCENARIOS[func.__name__] = func
    return func


@scenario
async def a_chain(diary: Diary) -> None:
    """A plain, an async and a context-taking node return what their contracts made; usage is per attempt."""

    def second(state: Num) -> Any:
        return Num(n=state.n + 10), 7

    async def third(state: Num, context: dict[str, Any]) -> Any:
        return {"m": state.n + context["more"]}

    nodes = [giving("a", {"n": 1}), node("b", second), node("c", third, output=M)]
    await diary.run(nodes, Num(), context={"more": 100})


@scenario
async def an_id_with_two_contracts(diary: Diary) -> None:
    """An id that stands for two contracts in one run is told by the contract of each place."""
    nodes = [giving("a", {"n": 1}), giving("a", {"m": 2}, output=M), giving("b", {"n": 3}, input=M)]
    await diary.run(nodes, Num())


@scenario
async def no_contracts(diary: Diary) -> None:
    """Without a contract what a node returns is kept as it was returned, and each node has its own copy."""
    first = computing(lambda state: {"n": [state.n]})

    async def second(state: Any) -> Any:
        state.root["n"].append(2)
        return "done"

    await diary.run([marked("a", first), marked("b", second)], Num(n=1))


@scenario
async def tried_again(diary: Diary) -> None:
    """A failed attempt is told whole before the next one, which finds it as its last failure; both count."""
    flaky = giving("a", ConnectionError("down"), {"n": 1}, tokens=3)
    await diary.run([flaky], Num(), policy_map=ONCE)


@scenario
async def given_up(diary: Diary) -> None:
    """The last failure is that of the run, and the state the last that was committed."""
    await diary.run([giving("a", {"n": 5}), giving("b", RuntimeError("no"))], Num(), policy_map=ONCE)


@scenario
async def bad_input(diary: Diary) -> None:
    """Input that breaks its contract is a failed attempt without a start."""
    await diary.run([giving("a", {}, input=Positive)], Num())


@scenario
async def bad_input_of_the_next(diary: Diary) -> None:
    """What a node may return need not be what the next one takes: that one fails, and is not called."""
    await diary.run([giving("a", {"n": 0}), giving("b", {}, input=Positive)], Num())


@scenario
async def bad_output(diary: Diary) -> None:
    """Output that breaks its contract is terminal, and was paid for."""
    await diary.run([giving("a", {"n": "none"}, tokens=3)], Num(), policy_map=ONCE)


@scenario
async def repaired(diary: Diary) -> None:
    """A granted repair finds the violation, which is recoverable, and needs no policy that retries."""
    await diary.run([giving("a", {"n": "none"}, {"n": 1}, tokens=3)], Num(), contract_retries={"a": 1})


@scenario
async def not_repaired(diary: Diary) -> None:
    """The last violation is terminal: no more repairs than are granted."""
    await diary.run([giving("a", {"n": "none"})], Num(), contract_retries={"a": 1})


@scenario
async def over_budget(diary: Diary) -> None:
    """What took the run over its limit is kept, and is one failed event; nothing is tried again or called."""
    nodes = [giving("a", ({"n": 1}, 11)), giving("b", {})]
    await diary.run(nodes, Num(), budget=ExecutionBudget(max_tokens_total=10), policy_map=ONCE)


@scenario
async def failed_over_budget(diary: Diary) -> None:
    """An attempt that failed and spent the budget fails with its own error, and is not tried again."""
    nodes = [giving("a", ValueError("no"), tokens=11)]
    await diary.run(nodes, Num(), budget=ExecutionBudget(max_tokens_total=10), policy_map=ONCE)


@scenario
async def over_budget_while_waiting(diary: Diary) -> None:
    """A node that waits for its second attempt while a sibling spends the budget is not called again."""
    started, gate, spent = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def fails(state: Num) -> Any:
        await started.wait()
        raise ConnectionError("down")

    async def spends(state: Num) -> Any:
        started.set()
        await gate.wait()
        return {"m": 1}, 11

    async def lets_it_spend(*_: Any) -> None:
        gate.set()
        await spent.wait()

    async def record_event(*_: Any) -> None:
        spent.set()

    nodes = [parallel(node("a", fails), node("b", spends, output=M))]
    hooks = diary.hooks(node_retry=lets_it_spend, budget_warning=record_event)
    await diary.run(nodes, Num(), budget=ExecutionBudget(max_tokens_total=10), policy_map=ONCE, hooks=hooks)


@scenario
async def bad_usage(diary: Diary) -> None:
    """Usage that cannot be counted fails the attempt, whose output is kept."""
    await diary.run([giving("a", ({"n": 1}, -1)), giving("b", {})], Num(), policy_map=ONCE)


@scenario
async def unpriced(diary: Diary) -> None:
    """A model that must have a price and has none fails the attempt, whose output is kept."""
    nodes = [giving("a", ({"n": 1}, 1, 2, "a-model-of-our-own"))]
    await diary.run(nodes, Num(), unknown_model="error")


@scenario
async def interrupted(diary: Diary) -> None:
    """An interrupt in a node comes out as itself; the attempt is cancelled, and its usage counts."""
    await diary.run([giving("a", KeyboardInterrupt("now"), tokens=3)], Num())


@scenario
async def interrupted_in_input(diary: Diary) -> None:
    """An interrupt in an input's validator comes out as itself: no attempt has begun."""
    await diary.run([giving("a", {"n": 0}), giving("b", {}, input=stopping(SystemExit(3)))], Num())


@scenario
async def interrupted_in_output(diary: Diary) -> None:
    """An interrupt in an output's validator ends the attempt, whose usage counts."""
    await diary.run([giving("a", {"n": 0}, tokens=3, output=stopping(KeyboardInterrupt("now")))], Num())


@scenario
async def interrupted_in_a_classifier(diary: Diary) -> None:
    """An interrupt while a failure is classified ends the attempt, whose usage counts."""
    stops = raising(KeyboardInterrupt("now"))
    await diary.run([giving("a", ValueError("no"), tokens=3)], Num(), classifiers=[stops])


@scenario
async def interrupted_in_the_verdict(diary: Diary) -> None:
    """An interrupt while a crossed limit is classified loses no output; it comes out once it is recorded."""
    stops = raising(KeyboardInterrupt("now"))
    budget = ExecutionBudget(max_tokens_total=10)
    await diary.run([giving("a", ({"n": 1}, 11))], Num(), classifiers=[stops], budget=budget)


@scenario
async def interrupted_in_a_commit(diary: Diary) -> None:
    """An interrupt in the store ends the attempt, whose usage counts."""
    once = [True]

    def between(session: Any) -> Any:
        def record(*arguments: Any) -> Any:
            if once.pop():
                once.append(False)
                raise KeyboardInterrupt("now")
            return session.record(*arguments)

        return Between(session, record=record)

    diary.store = Journal(between)
    await diary.run([giving("a", ({"n": 1}, 3))], Num())


@scenario
async def asks(diary: Diary) -> None:
    """A node that waits for a person is no failure; its usage counts."""
    await diary.run([giving("a", {"n": 1}), giving("b", Suspend("may I?", schema=M), tokens=3)], Num())


@scenario
async def asks_inside(diary: Diary) -> None:
    """A group around a waiting node is suspended as well, and the groups around it, for the same reason."""
    nodes = [parallel(giving("a", {"n": 1}), parallel(giving("b", Suspend("may I?"))), max_concurrency=1)]
    await diary.run(nodes, Num())


@scenario
async def asks_in_vain(diary: Diary) -> None:
    """A question that the store does not keep is a failure, and the run can be resumed."""
    refuses = raising(full())
    diary.store = Journal(lambda session: Between(session, suspend=refuses))
    await diary.run([giving("a", Suspend("may I?"), tokens=3)], Num(), policy_map=ONCE)


@scenario
async def asks_and_is_cancelled(diary: Diary) -> None:
    """The question is kept, told, and then the cancellation comes out."""
    diary.store = Journal(slowly(diary.started, call="suspend"))
    await diary.cut([giving("a", Suspend("may I?"))], Num())


@scenario
async def asks_in_vain_and_is_cancelled(diary: Diary) -> None:
    """A question that is refused while the run is cancelled is a failure; then the cancellation comes out."""
    diary.store = Journal(slowly(diary.started, refuses=True, call="suspend"))
    await diary.cut([giving("a", Suspend("may I?"))], Num())


@scenario
async def too_late(diary: Diary) -> None:
    """A node that does not end in time fails with a message with its id and limit; its usage counts."""

    async def forever(state: Num) -> Any:
        here().report_usage(input_tokens=3)
        await asyncio.Event().wait()

    await diary.run([node("a", forever)], Num(), node_timeouts={"a": 30})


@scenario
async def unread_contract(diary: Diary) -> None:
    """A contract that cannot be read fails the node at once, as its input would."""
    await diary.run([giving("a", {"n": 4}), giving("b", {}, input=Late)], Num(), policy_map=ONCE)


@scenario
async def side_by_side(diary: Diary) -> None:
    """Groups have no usage of their own, and their events are around those of their children."""
    inner = parallel(giving("b", ({"m": 2}, 5), output=M))
    group = parallel(giving("a", ({"n": 1}, 4)), inner, max_concurrency=1)
    nodes = [group, giving("c", {"n": 9}, input=Both)]
    await diary.run(nodes, Num())


@scenario
async def a_child_fails(diary: Diary) -> None:
    """A group fails with the error and the class of its child."""
    nodes = [parallel(giving("a", {"n": 1}), giving("b", TypeError("no"), output=M), max_concurrency=1)]
    await diary.run(nodes, Num())


@scenario
async def a_group_is_tried_again(diary: Diary) -> None:
    """A group with a policy of its own runs only those children again that have not committed."""
    group = parallel(
        giving("a", {"n": 1}, {"n": 2}), giving("b", TypeError("no"), {"m": 3}, output=M), max_concurrency=1
    )
    await diary.run([group], Num(), node_policies={"parallel(a, b)": ONCE})


@scenario
async def a_group_gives_nonsense(diary: Diary) -> None:
    """Outputs that cannot be merged fail the group, not its child."""
    await diary.run([parallel(marked("a", returning(5)))], Num())


@scenario
async def items(diary: Diary) -> None:
    """Each item is an execution of kind item with attempts of its own."""
    each = giving("each", ({"m": 1}, 2), ConnectionError("down"), {"m": 3}, output=M)
    mapped = map_over("items", each, into="made", max_concurrency=1)
    await diary.run([mapped], Many(items=[Num(n=1), Num(n=2)]), policy_map=ONCE)


@scenario
async def refused_by_the_store(diary: Diary) -> None:
    """An output that the store does not keep is a failed attempt, not repeated; the run can be resumed."""
    diary.store = Journal(refusing(full()))
    await diary.run([giving("a", ({"n": 1}, 3)), giving("b", {})], Num(), policy_map=ONCE)


@scenario
async def refused_once(diary: Diary) -> None:
    """A commit that is refused once is tried again, the node is not."""
    refusals = [OSError("busy")]

    def between(session: Any) -> Any:
        def record(*arguments: Any) -> Any:
            if refusals:
                raise refusals.pop()
            return session.record(*arguments)

        return Between(session, record=record)

    diary.store = Journal(between)
    await diary.run([giving("a", {"n": 1})], Num())


@scenario
async def a_failure_that_is_not_kept(diary: Diary) -> None:
    """A failed attempt that the store does not keep stops the run with the store's error."""
    diary.store = Journal(lambda session: Between(session, record=raising(full())))
    await diary.run([giving("a", ValueError("no"), tokens=3)], Num(), policy_map=ONCE)


@scenario
async def not_stored(diary: Diary) -> None:
    """An output without a stored form is terminal."""
    diary.store = Journal(refusing(NotSerialisable("no stored form")))
    await diary.run([giving("a", ({"n": 1}, 3))], Num(), policy_map=ONCE)


@scenario
async def not_called(diary: Diary) -> None:
    """A shared budget that is spent: the first attempt is refused, and nothing is told of a start."""
    shared = SharedBudget("told", max_tokens=10, store=AsyncInMemoryStore())
    nodes = [giving("a", ({"n": 1}, 10)), giving("b", {})]
    await diary.run(nodes, Num(), shared_budgets=shared, policy_map=ONCE)


@scenario
async def not_called_again(diary: Diary) -> None:
    """A circuit that opened while the node waited: its failure is the cause of what is told."""
    breaker = Breaker(min_calls=1, max_wait_seconds=0, _clock=lambda: 1.0)
    nodes = [giving("a", ConnectionError("down"))]
    await diary.run(nodes, Num(), breaker=breaker, limits=LIMITS, node_limits={"a": "told"}, policy_map=ONCE)


@scenario
async def start_is_not_async(diary: Diary) -> None:
    """The sets before the one whose start is not async see the ends of their starts, the others nothing."""
    sets = [diary.hooks("1 "), NodeHooks(on_node_start=not_async), diary.hooks("3 ")]
    await diary.run([giving("a", {"n": 1})], Num(), hooks=sets)


@scenario
async def cancelled_is_not_async(diary: Diary) -> None:
    """What ended the attempt comes out as itself; that the hook is wrong is in the log."""
    sets = [diary.hooks("1 "), NodeHooks(on_node_cancelled=not_async)]
    await diary.cut([forever("a", diary.started)], Num(), hooks=sets)


@scenario
async def success_is_not_async(diary: Diary) -> None:
    """The hook's error comes out once the output is kept and every set was told."""
    sets = [diary.hooks("1 "), NodeHooks(on_node_success=not_async)]
    await diary.run([giving("a", {"n": 1}), giving("b", {})], Num(), hooks=sets)


def forever(node_id: str, start_event: asyncio.Event, tokens: int = 3) -> Any:
    async def func(state: Any) -> Any:
        here().report_usage(input_tokens=tokens)
        start_event.set()
        await asyncio.Event().wait()

    return node(node_id, func)


@scenario
async def cancelled(diary: Diary) -> None:
    """A cancelled attempt is told and kept, and its usage counts."""
    await diary.cut([giving("a", {"n": 1}), forever("b", diary.started)], Num(), policy_map=ONCE)


@scenario
async def cancelled_inside(diary: Diary) -> None:
    """The cancelled child ends before its group does."""
    nodes = [parallel(giving("a", {"n": 1}), forever("b", diary.started), max_concurrency=1)]
    await diary.cut(nodes, Num(), policy_map=ONCE)


@scenario
async def cancelled_in_a_start_hook(diary: Diary) -> None:
    """What was told to begin is told to end, though it was never called."""
    await diary.cut([giving("a", {"n": 1})], Num(), hooks=diary.hooks(node_start=stuck(diary.started)))


@scenario
async def cancelled_in_an_end_hook(diary: Diary) -> None:
    """A cancellation in an end hook loses no output, and the next node is not called."""
    nodes = [giving("a", {"n": 1}), giving("b", {})]
    await diary.cut(nodes, Num(), hooks=diary.hooks(node_success=stuck(diary.started)))


@scenario
async def cancelled_in_a_wait(diary: Diary) -> None:
    """Between two attempts nothing is begun, so nothing is cancelled but the run."""

    async def begin(*_: Any) -> None:
        diary.started.set()

    nodes, hooks = [giving("a", ConnectionError("down"))], diary.hooks(node_retry=begin)
    slow = {kind: FailurePolicy(backoff_seconds=9, jitter=False) for kind in FailureClass}
    await diary.cut(nodes, Num(), policy_map=slow, hooks=hooks)


def slowly(start_event: asyncio.Event, *, refuses: bool = False, call: str = "record") -> Any:
    """Sessions that keep outputs, or questions, or refuse them, after a while."""

    def between(session: Any) -> Any:
        async def later(*arguments: Any) -> None:
            start_event.set()
            for _ in range(3):
                await asyncio.sleep(0)
            if refuses and (call != "record" or arguments[2] is not None):
                raise full()
            getattr(session, call)(*arguments)

        return Between(session, **{call: later})

    return between


@scenario
async def cancelled_in_a_commit(diary: Diary) -> None:
    """An output whose commit is cancelled is kept and told; then the cancellation comes out."""
    diary.store = Journal(slowly(diary.started))
    await diary.cut([giving("a", ({"n": 1}, 3)), giving("b", {})], Num())


@scenario
async def cancelled_in_a_commit_that_fails(diary: Diary) -> None:
    """A commit that fails while the run is cancelled is a failure; then the cancellation comes out."""
    diary.store = Journal(slowly(diary.started, refuses=True))
    await diary.cut([giving("a", ({"n": 1}, 3)), giving("b", {})], Num())


@scenario
async def cancelled_while_a_failure_is_kept(diary: Diary) -> None:
    """A failure that is kept while the run is cancelled is told, and nothing is tried again."""
    diary.store = Journal(slowly(diary.started))
    await diary.cut([giving("a", ValueError("no"))], Num(), policy_map=ONCE)


@scenario
async def cancelled_and_not_kept(diary: Diary) -> None:
    """The hook of a cancelled attempt is called though its store is interrupted, which then comes out."""
    stops = raising(KeyboardInterrupt("now"))
    diary.store = Journal(lambda session: Between(session, record=stops))
    await diary.cut([forever("a", diary.started)], Num())


@scenario
async def failed_and_not_kept(diary: Diary) -> None:
    """An interrupt while a failed attempt is kept comes out once the failure was told."""
    stops = raising(KeyboardInterrupt("now"))
    diary.store = Journal(lambda session: Between(session, record=stops))
    await diary.run([giving("a", ValueError("no"))], Num(), policy_map=ONCE)


@scenario
async def its_own_cancellation(diary: Diary) -> None:
    """A CancelledError that nobody asked for is a failure like any other."""
    await diary.run([giving("a", asyncio.CancelledError("stray"), {"n": 1})], Num(), policy_map=ONCE)


@scenario
async def its_own_timeout(diary: Diary) -> None:
    """A TimeoutError of the node's is its own, under a time limit too."""
    await diary.run([giving("a", TimeoutError("mine"))], Num(), node_timeouts={"a": 10**6})


@scenario
async def a_group_is_too_late(diary: Diary) -> None:
    """A group's timeout is a failure of the group; what ran inside was cancelled."""
    nodes = [parallel(giving("a", {"n": 1}), forever("b", asyncio.Event()), max_concurrency=1)]
    await diary.run(nodes, Num(), node_timeouts={"parallel(a, b)": 300})


@scenario
async def closed(diary: Diary) -> None:
    """A run that is thrown away tells the end of its attempt, and of itself."""
    await diary.throw_away([giving("a", {"n": 1}), forever("b", diary.started)], Num())


@scenario
async def closed_in_a_hook(diary: Diary) -> None:
    """A run that is thrown away in an end hook has told that end once."""
    nodes = [giving("a", {"n": 1}), giving("b", {})]
    await diary.throw_away(nodes, Num(), hooks=diary.hooks(node_success=stuck(diary.started)))


@scenario
async def closed_in_a_start_hook(diary: Diary) -> None:
    """A run that is thrown away in a start hook tells the end of that attempt."""
    await diary.throw_away([giving("a", {"n": 1})], Num(), hooks=diary.hooks(node_start=stuck(diary.started)))


def never_kept(start_event: asyncio.Event, call: str) -> Any:
    """Sessions that do not come to an end with it."""

    return lambda session: Between(session, **{call: stuck(start_event)})


@scenario
async def closed_in_a_commit(diary: Diary) -> None:
    """A run that is thrown away while an output is kept tells the end of that attempt, and of itself."""
    diary.store = Journal(never_kept(diary.started, "record"))
    await diary.throw_away([giving("a", ({"n": 1}, 3))], Num())


@scenario
async def closed_while_a_failure_is_kept(diary: Diary) -> None:
    """The failed attempt is told to have failed, though nobody knows whether it was kept."""
    diary.store = Journal(never_kept(diary.started, "record"))
    await diary.throw_away([giving("a", ValueError("no"), tokens=3)], Num(), policy_map=ONCE)


@scenario
async def closed_while_a_question_is_kept(diary: Diary) -> None:
    """The attempt that asked is told as one that was cut short."""
    diary.store = Journal(never_kept(diary.started, "suspend"))
    await diary.throw_away([giving("a", Suspend("may I?"))], Num())


@scenario
async def closed_while_an_interrupted_attempt_is_kept(diary: Diary) -> None:
    """The end of what was interrupted is told."""
    diary.store = Journal(never_kept(diary.started, "record"))
    await diary.throw_away([giving("a", KeyboardInterrupt("now"), tokens=3)], Num())


@scenario
async def interrupted_while_a_question_is_kept(diary: Diary) -> None:
    """The attempt that asked is one event, told and kept as cancelled; the interrupt comes out."""
    stops = raising(KeyboardInterrupt("now"))
    diary.store = Journal(lambda session: Between(session, suspend=stops))
    await diary.run([giving("a", Suspend("may I?"), tokens=3)], Num())


@contextlib.contextmanager
def dear_model() -> Iterator[None]:
    """One that costs a dollar for a token, and two for one that it makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KNOWN_MODELS, "told-dear", (1_000_000.0, 2_000_000.0))
        yield


@scenario
async def priced(diary: Diary) -> None:
    """What is returned and what is reported add up, each at its model's price; the last one is the model."""

    async def pays(state: Num) -> Any:
        here().report_usage(input_tokens=3, output_tokens=1, model="told-dear")
        return {"n": 1}, 2, 5, "told-dear"

    nodes = [node("a", pays), giving("b", ({"n": 2}, 4, "told-dear"))]
    with dear_model():
        await diary.run(nodes, Num(), budget=ExecutionBudget(max_cost_usd=20))


@scenario
async def cancelled_and_priced(diary: Diary) -> None:
    """What a cancelled attempt had reported is priced and counts."""

    async def pays(state: Num) -> Any:
        here().report_usage(input_tokens=3, output_tokens=1, model="told-dear")
        diary.started.set()
        await asyncio.Event().wait()

    with dear_model():
        await diary.cut([node("a", pays)], Num(), budget=ExecutionBudget(max_cost_usd=20))


@scenario
async def dear_and_bad(diary: Diary) -> None:
    """Of two faults in the usage of one attempt, what was returned is told; what can be counted counts."""

    async def pays(state: Num) -> Any:
        here().report_usage(input_tokens=3, model="a-model-of-our-own")
        return {"n": 1}, -5

    await diary.run([node("a", pays)], Num(), unknown_model="error", policy_map=ONCE)


@scenario
async def warned(diary: Diary) -> None:
    """At four fifths of a limit the hook is told once, with what was used and what is the limit."""
    nodes = [giving("a", ({"n": 1}, 79)), giving("b", ({"n": 2}, 1)), giving("c", ({"n": 3}, 1))]
    await diary.run(nodes, Num(), budget=ExecutionBudget(max_tokens_total=100))


@scenario
async def warned_by_a_failure(diary: Diary) -> None:
    """A failed attempt uses up a limit as well."""
    nodes = [giving("a", ConnectionError("down"), {"n": 1}, tokens=45)]
    await diary.run(nodes, Num(), budget=ExecutionBudget(max_tokens_total=100), policy_map=ONCE)


@scenario
async def interrupted_in_a_start_hook(diary: Diary) -> None:
    """Every set has seen the start, and sees the end of what was never called."""
    sets = [diary.hooks("1 ", node_start=_stops), diary.hooks("2 ")]
    await diary.run([giving("a", {})], Num(), hooks=sets)


@scenario
async def interrupted_in_an_end_hook(diary: Diary) -> None:
    """The output is kept, every set is told, and the next node is not called."""
    sets = [diary.hooks("1 "), diary.hooks("2 ", node_success=_stops)]
    await diary.run([giving("a", {"n": 1}), giving("b", {})], Num(), hooks=sets)


async def _stops(*_: Any) -> None:
    raise KeyboardInterrupt("now")


@scenario
async def the_only_start_is_not_async(diary: Diary) -> None:
    """Without another set nobody is told of an end."""
    await diary.run([giving("a", {})], Num(), hooks=NodeHooks(on_node_start=not_async))


@scenario
async def hidden(diary: Diary) -> None:
    """What ``redact`` takes out of a state is in no hook or log line; nodes, journal and result have it."""

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(state, "hidden")

    nodes = [giving("a", {"n": 5}), giving("b", {"n": "secret"}), giving("c", {})]
    await diary.run(nodes, Num(n=4), redact=redact, contract_retries={"b": 1})


@scenario
async def hidden_input(diary: Diary) -> None:
    """The same for an input that breaks its contract."""

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(state, "hidden")

    await diary.run([giving("a", {"n": 0}), giving("b", {}, input=Positive)], Num(n=4), redact=redact)


FAR_LIMITS = {"limits": {"far": FAR}, "node_limits": dict.fromkeys(("a", "b", "each"), "far")}
#: The settings that all scenarios run in: a bare run, and one with every mechanism that may not change it, at
#: once.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "budget": ExecutionBudget(max_tokens_total=10**9, max_latency_ms=10**9),
        "hook_delivery": "at_least_once",
        "node_policies": {"other": ONCE},
        "node_timeouts": {"other": 10**6},
        **FAR_LIMITS,
    },
}
#: Waiting for a turn takes turns of the loop: the one is thrown away there, of the other the siblings change
#: places.
WITHOUT_LIMITS = ("closed", "over_budget_while_waiting")


def recorded(name: str) -> list[str]:
    section = TOLD.read_text().split(f"== {name}\n", 1)[1]
    return section.split("\n== ", 1)[0].strip().splitlines()


async def note(name: str, setting: str = "plain") -> list[str]:
    config = SETTINGS[setting]
    if name in WITHOUT_LIMITS:
        config = {key: value for key, value in config.items() if key not in FAR_LIMITS}
    probes = [Interceptor(), Interceptor()] if setting == "everything" else []
    INTERCEPTORS.extend(probes)
    try:
        with Diary(config) as diary:
            await SCENARIOS[name](diary)
    finally:
        for probe in probes:
            INTERCEPTORS.remove(probe)
    return diary.lines


@pytest.mark.core
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", SCENARIOS)
async def test_what_is_told_of_a_run(name: str, setting: str) -> None:
    """Hooks, log, trace, journal and result say line for line what the scenario is known to come to."""
    assert await note(name, setting) == recorded(name)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_run_that_nobody_watches_comes_to_the_same(name: str) -> None:
    """Without hooks and without a log the trace, the journal and the result say the same."""
    diary = Diary({"hooks": NodeHooks()})
    await SCENARIOS[name](diary)
    if any("run_start" in line for line in diary.lines):
        return  # It is about hooks.
    report = recorded(name)
    entries = (
        "journal ",
        "row ",
        "raised ",
        *(("result ", "event ", "  ") if not _ends_early(report) else ()),
    )
    assert diary.lines == [line for line in report if line.startswith(entries) and "'hidden'" not in line]


def _ends_early(report: list[str]) -> bool:
    """Whether it has no result, which is what has the trace."""
    return not any(line.startswith("result ") for line in report)


def test_every_scenario_is_told() -> None:
    """The file has the scenarios in order, and no other."""
    assert [line[3:] for line in TOLD.read_text().splitlines() if line.startswith("== ")] == list(SCENARIOS)


async def _write() -> None:
    """Note all of them anew; look at what changes."""
    parts = ["\n".join([f"== {name}", *await note(name)]) for name in SCENARIOS]
    TOLD.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    asyncio.run(_write())
